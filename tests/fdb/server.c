/*
 * The cluster: gives read versions, reads, decides commits, watches. Each request was rolled
 * for when it was made; here it arrives, and its answer leaves, both possibly late.
 */
#include "inside.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

#define VERSIONS_PER_S 1000000
#define FUTURE_WAIT_VERSIONS 1000000
#define PAIR_BYTES 24u /* that a row counts for, beside its key and value */

/* splitmix64 */
static uint64_t chance_u64(void)
{
    uint64_t z = g.random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t chance_below(uint64_t n)
{
    return n ? chance_u64() % n : 0;
}

bool one_in(int64_t n)
{
    return n > 0 && !g.instant && chance_below((uint64_t)n) == 0;
}

uint64_t random_delay_ns(void)
{
    return g.config.delay_us_max > 0 && !g.instant
               ? chance_below((uint64_t)g.config.delay_us_max * 1000u + 1u)
               : 0;
}

fdb_error_t fault_of_read(void)
{
    /* All are rolled for, so that one fault more or less moves none of the others. */
    bool too_old = one_in(g.config.read_too_old);
    bool future = one_in(g.config.read_future);
    bool behind = one_in(g.config.read_behind);
    return too_old ? E_TOO_OLD : future ? E_FUTURE : behind ? E_BEHIND : 0;
}

/* --- versions -------------------------------------------------------------------------- */

static int64_t clock_version(void)
{
    if (g.config.version_step > 0)
        return g.version_last;
    return g.version_base +
           (int64_t)((now_ns() - g.version_base_ns) / (1000000000u / VERSIONS_PER_S));
}

void cluster_forget(int64_t oldest)
{
    if (oldest > g.version_oldest)
        g.version_oldest = oldest;
    map_forget(g.version_oldest);
    history_forget(g.version_oldest);
    g.version_forgot = g.version_oldest;
}

/* Time goes on: what is too old is so at once, but its memory is freed for many versions together
 * (a key's values are looked through for it). */
static void cluster_age(int64_t now)
{
    int64_t window = g.config.window_ms * (VERSIONS_PER_S / 1000);
    if (now - window > g.version_oldest)
        g.version_oldest = now - window;
    if (g.version_oldest - g.version_forgot > window / 16)
        cluster_forget(g.version_oldest);
}

/* The newest version that is there as a whole; it is one that can be read from now on, so the
 * next batch's is higher. */
int64_t version_now(void)
{
    int64_t clock = clock_version();
    if (!g.batch_version && clock > g.version_last)
        g.version_last = clock;
    int64_t now = g.batch_version ? g.batch_before : g.version_last;
    cluster_age(now);
    return now;
}

/* Until the end of the batch that is open. */
static uint64_t batch_left_ns(void)
{
    uint64_t now = now_ns();
    return g.batch_version && g.batch_until_ns > now ? g.batch_until_ns - now : 0;
}

static void version_answer(struct event *e)
{
    FDBTransaction *t = e->t;
    if (t->gen != e->gen || t->version_state != VERSION_ASKED)
        return;
    t->version_state = VERSION_KNOWN;
    t->read_version = e->version;
    txn_version_known(t);
}

static void version_arrives(struct event *e)
{
    struct event *answer = event_new(WAY_ANSWER, version_answer, NULL, e->t);
    answer->gen = e->gen;
    answer->version = version_now();
    event_post(answer, random_delay_ns());
}

void version_request(FDBTransaction *t)
{
    t->version_state = VERSION_ASKED;
    g.counts.grvs++;
    g.counts.grvs_batch += t->batch;
    g.counts.grvs_immediate += t->immediate;
    txn_count_tags(t);
    uint64_t delay_ns = random_delay_ns() + (uint64_t)g.config.grv_ms * 1000000u;
    if (one_in(g.config.grv_delayed)) {
        g.counts.grv_delayed++;
        delay_ns += (uint64_t)g.config.grv_delay_ms * 1000000u;
    }
    struct event *e = event_new(WAY_REQUEST, version_arrives, NULL, t);
    e->batch = t->batch;
    event_post(e, delay_ns);
}

/* --- reads ----------------------------------------------------------------------------- */

static void get_arrives(FDBFuture *f, FDBTransaction *t)
{
    struct view v = {.writes = f->has_view ? &f->writes : NULL, .version = t->read_version};
    const struct node *n = map_seek(f->key->data, f->key->len);
    struct blob *stored =
        n && blob_compare(map_key(n), f->key) == 0 ? map_value(n, v.version) : NULL;
    bool exact = false;
    const struct write *e = writes_find(v.writes, f->key->data, f->key->len, &exact);
    struct blob *value =
        e && exact && e->at == W_ATOMIC ? atomic_apply_all(e, stored) : blob_ref(stored);
    if (!f->snapshot)
        ranges_add(&t->reads_made, blob_ref(f->key), blob_after(f->key));
    if (f->op == OP_WATCH) {
        if (!watch_begin(f, t, value))
            future_settle(f, E_MANY_WATCHES);
        blob_unref(value);
        return;
    }
    f->present = value != NULL;
    if (value) {
        f->bytes = mem_alloc(value->len ? value->len : 1);
        memcpy(f->bytes, value->data, value->len);
        f->bytes_len = value->len;
        blob_unref(value);
    }
    future_settle(f, 0);
}

/* The key a selector means, in [empty, all keys' end). A new reference. */
static struct blob *selector_key(const struct selector *s, const struct view *v,
                                 const struct blob *max, bool *unreadable)
{
    /* Counted from the first key at or behind (behind, if or_equal) the one that is given. */
    struct blob *at = s->or_equal ? blob_after(s->key) : blob_ref(s->key);
    struct seen seen;
    int offset = s->offset;
    for (; offset < 1; offset++) {
        if (!view_before(v, at->data, at->len, &seen, unreadable)) {
            blob_unref(at);
            return blob_new(NULL, 0);
        }
        blob_unref(at);
        at = blob_new(seen.key->data, seen.key->len);
        blob_unref(seen.value);
    }
    if (s->offset < 1)
        return at;
    /* For a range's end, where the key of "first at or behind" lies does not matter. */
    for (; offset > 1; offset--) {
        if (!view_at_or_after(v, at->data, at->len, &seen, unreadable)) {
            blob_unref(at);
            return blob_new(max->data, max->len);
        }
        blob_unref(at);
        at = blob_after(seen.key);
        blob_unref(seen.value);
    }
    return at;
}

struct rows {
    struct seen *items;
    size_t n, cap;
    uint64_t bytes;
};

static void range_arrives(FDBFuture *f, FDBTransaction *t)
{
    const struct range_request *r = &f->range;
    struct view v = {.writes = f->has_view ? &f->writes : NULL, .version = t->read_version};
    bool unreadable = false;
    struct blob *max = blob_new(t->system_read ? "\xff\xff" : "\xff", t->system_read ? 2 : 1);
    struct blob *begin = selector_key(&r->begin, &v, max, &unreadable);
    struct blob *end = selector_key(&r->end, &v, max, &unreadable);
    if (blob_compare(end, max) > 0) {
        blob_unref(end);
        end = blob_ref(max);
    }
    struct rows rows = {0};
    uint64_t charged = 0;
    bool had_own = false;
    struct blob *last = NULL; /* the key that was returned last */
    unreadable = false;
    for (;;) {
        struct seen s;
        bool unknown = false;
        bool found = r->reverse ? view_before(&v, last ? last->data : end->data,
                                              last ? last->len : end->len, &s, &unknown)
                                : view_at_or_after(&v, last ? last->data : begin->data,
                                                   last ? last->len : begin->len, &s, &unknown);
        if (!found)
            break;
        if (r->reverse ? blob_compare(s.key, begin) < 0 : blob_compare(s.key, end) >= 0) {
            blob_unref(s.value);
            break;
        }
        /* The real client reads what it does not know in one request, and does not send another
         * one for what it has to read behind keys of its own, if it has rows to give. */
        bool exact = false;
        const struct write *own = writes_find(v.writes, s.key->data, s.key->len, &exact);
        bool is_own = own && exact && own->at == W_SET;
        if (f->cut_at_own && had_own && !is_own) {
            blob_unref(s.value);
            f->more = true;
            break;
        }
        had_own |= is_own;
        unreadable |= unknown;
        mem_grow(&rows.items, &rows.cap, rows.n + 1, sizeof *rows.items);
        rows.items[rows.n++] = s;
        rows.bytes += s.key->len + s.value->len;
        charged += PAIR_BYTES + s.key->len + s.value->len;
        blob_unref(last);
        last = r->reverse ? blob_new(s.key->data, s.key->len) : blob_after(s.key);
        if (rows.n >= r->rows_max || charged >= r->bytes_max || rows.n == f->rows_cut) {
            g.counts.range_short += rows.n == f->rows_cut;
            f->more = true;
            break;
        }
    }
    if (!f->snapshot) {
        struct blob *from = blob_compare(r->begin.key, begin) < 0 ? r->begin.key : begin;
        struct blob *to = blob_compare(r->end.key, end) > 0 ? r->end.key : end;
        if (r->begin.offset == 1)
            from = begin;
        if (r->end.offset == 1)
            to = end;
        if (f->more && r->reverse)
            from = last;
        else if (f->more)
            to = last;
        writes_unwritten(v.writes, from, to, &t->reads_made);
    }
    f->pairs = mem_zalloc((rows.n ? rows.n : 1) * sizeof *f->pairs);
    f->bytes = mem_alloc(rows.bytes ? rows.bytes : 1);
    f->bytes_len = rows.bytes;
    f->n = (int)rows.n;
    uint8_t *at = f->bytes;
    for (size_t i = 0; i < rows.n; i++) {
        const struct seen *s = &rows.items[i];
        f->pairs[i].key = at;
        f->pairs[i].key_length = (int)s->key->len;
        memcpy(at, s->key->data, s->key->len);
        at += s->key->len;
        f->pairs[i].value = at;
        f->pairs[i].value_length = (int)s->value->len;
        memcpy(at, s->value->data, s->value->len);
        at += s->value->len;
        blob_unref(s->value);
    }
    free(rows.items);
    blob_unref(last);
    blob_unref(begin);
    blob_unref(end);
    blob_unref(max);
    future_settle(f, unreadable ? E_UNREADABLE : 0);
}

static void read_arrives(struct event *e)
{
    FDBFuture *f = e->f;
    if (f->settled)
        return;
    FDBTransaction *t = e->t;
    int64_t now = version_now();
    fdb_error_t error = f->fault;
    if (error == E_TOO_OLD)
        g.counts.read_too_old++;
    else if (error == E_FUTURE)
        g.counts.read_future++;
    else if (error == E_BEHIND)
        g.counts.read_behind++;
    else if (t->read_version < g.version_oldest)
        error = E_TOO_OLD;
    else if (t->read_version > now) {
        /* A version of the near future is waited for. */
        int64_t ahead = t->read_version - now;
        if (ahead <= FUTURE_WAIT_VERSIONS && g.config.version_step <= 0) {
            struct event *again = event_new(WAY_REQUEST, read_arrives, f, t);
            uint64_t wait_ns = (uint64_t)ahead * (1000000000u / VERSIONS_PER_S);
            event_post(again, max_u64(wait_ns, batch_left_ns()));
            return;
        }
        error = E_FUTURE;
    }
    if (error)
        future_settle(f, error);
    else if (f->op == OP_RANGE)
        range_arrives(f, t);
    else
        get_arrives(f, t);
}

void read_send(FDBFuture *f)
{
    f->waits_version = false;
    struct event *e = event_new(WAY_REQUEST, read_arrives, f, f->txn);
    event_post(e, f->delay_ns);
}

/* --- commits --------------------------------------------------------------------------- */

void commit_free(struct commit *c)
{
    for (size_t i = 0; i < c->n_mutations; i++) {
        blob_unref(c->mutations[i].key);
        blob_unref(c->mutations[i].value);
    }
    free(c->mutations);
    ranges_free(&c->reads);
    ranges_free(&c->writes);
    if (c->f)
        future_unref(c->f);
    list_remove(&c->link);
    free(c);
}

/* The commit's version and place in its batch, where the last four bytes say. A new reference. */
static struct blob *stamped(const struct blob *from, int64_t version)
{
    uint32_t place = g.batch_size; /* in the batch */
    struct blob *b = blob_new(from->data, from->len - 4u);
    uint32_t at = (uint32_t)from->data[b->len] | (uint32_t)from->data[b->len + 1] << 8 |
                  (uint32_t)from->data[b->len + 2] << 16 | (uint32_t)from->data[b->len + 3] << 24;
    for (uint32_t i = 0; i < 10; i++)
        b->data[at + i] = (uint8_t)(i < 8 ? (uint64_t)version >> (56 - 8 * i)
                                         : place >> (72 - 8 * i));
    return b;
}

static void mutate(struct commit *c, const struct mutation *m, int64_t version)
{
    struct blob *key = m->key;
    if (m->type == M_CLEAR_RANGE) {
        map_clear(key, m->value, version);
    } else if (m->type == M_SET) {
        map_set(key, m->value, version);
    } else if (m->type == M_VERSIONSTAMPED_KEY) {
        key = stamped(m->key, version);
        map_set(key, m->value, version);
        ranges_add(&c->writes, blob_ref(key), blob_after(key));
        blob_unref(key);
    } else if (m->type == M_VERSIONSTAMPED_VALUE) {
        struct blob *value = stamped(m->value, version);
        map_set(key, value, version);
        blob_unref(value);
    } else {
        const struct node *n = map_seek(key->data, key->len);
        struct blob *old = n && blob_compare(map_key(n), key) == 0 ? map_value(n, version) : NULL;
        struct atomic_op op = {m->type, m->value};
        struct blob *value = atomic_apply(&op, old);
        map_set(key, value, version);
        blob_unref(value);
    }
}

static void watches_look(void);

static void batch_over(struct event *e)
{
    if (e->gen == g.batch_seq)
        batch_end();
}

static void batch_begin(void)
{
    g.batch_before = g.version_last;
    g.version_last += g.config.version_step > 0 ? g.config.version_step : 1;
    g.batch_version = g.version_last;
    g.batch_size = 0;
    g.batch_seq++;
    uint64_t ns = 0;
    if (g.config.batch_us > 0 && !g.instant)
        ns = chance_below((uint64_t)g.config.batch_us * 1000u + 1u);
    g.batch_until_ns = now_ns() + ns;
    if (!ns)
        return; /* it ends with this commit */
    struct event *e = event_new(WAY_CLUSTER, batch_over, NULL, NULL);
    e->gen = g.batch_seq;
    event_post(e, ns);
}

void batch_end(void)
{
    if (!g.batch_version)
        return;
    g.batch_version = 0;
    while (g.config.history_bytes_max > 0 &&
           map_superseded_bytes() > (uint64_t)g.config.history_bytes_max)
        cluster_forget(map_superseded_version());
    watches_look();
}

/* Conflicts are those with writes at versions above the read version. So within a batch a commit
 * is refused for what came before it; and one that reads at the version of a batch, because its own
 * last commit was in it, is told nothing of what came behind that one in the same batch. */
fdb_error_t commit_decide(struct commit *c, int64_t *version)
{
    version_now();
    if (c->read_version < g.version_oldest || history_meets(c->read_version, &c->reads)) {
        g.counts.commits_refused++;
        return c->read_version < g.version_oldest ? E_TOO_OLD : E_CONFLICT;
    }
    if (g.batch_version)
        g.counts.batched++;
    else
        batch_begin();
    *version = g.batch_version;
    for (size_t i = 0; i < c->n_mutations; i++)
        mutate(c, &c->mutations[i], *version);
    g.batch_size++;
    history_add(*version, &c->writes);
    g.counts.commits_happened++;
    g.counts.bytes_committed += c->bytes;
    if (g.instant || g.batch_until_ns <= now_ns())
        batch_end();
    return 0;
}

static void commit_answered(struct event *e)
{
    FDBFuture *f = e->f;
    if (f->settled)
        return;
    FDBTransaction *t = e->t;
    g.counts.unknown_answers += e->error == E_UNKNOWN || e->error == E_CHANGED ||
                                e->error == E_TIMED_OUT || e->error == E_CANCELLED;
    if (!e->error) {
        t->committed_version = e->version;
        watches_activate(t);
    } else {
        watches_cancel(t, e->error);
    }
    if (e->error == E_TIMED_OUT && !t->reset_error) {
        /* As if its own timeout had run out. */
        future_settle(f, E_TIMED_OUT);
        txn_fail(t, E_TIMED_OUT);
        return;
    }
    future_settle(f, e->error);
}

static void commit_answer(FDBFuture *f, FDBTransaction *t, fdb_error_t error, int64_t version,
                          uint64_t delay_ns)
{
    struct event *e = event_new(WAY_ANSWER, commit_answered, f, t);
    e->error = error;
    e->version = version;
    event_post(e, delay_ns);
}

static void commit_lands(struct event *e)
{
    struct commit *c = e->commit;
    if (!c)
        return; /* dropped by a reset */
    int64_t version;
    bool told = c->f->settled, refused = commit_decide(c, &version) != 0;
    g.counts.late_refused += told && refused;
    g.counts.late_landed += told && !refused;
    commit_free(c);
}

static void commit_arrives(struct event *e)
{
    struct commit *c = e->commit;
    if (!c) {
        /* Dropped by a reset. */
        commit_answer(e->f, e->t, E_UNKNOWN, -1, 0);
        return;
    }
    int64_t version = -1;
    fdb_error_t error = 0;
    bool late = false;
    switch (c->fate) {
    case FATE_TRUE:
        error = commit_decide(c, &version);
        break;
    case FATE_CONFLICT:
        error = E_CONFLICT;
        g.counts.conflict++;
        break;
    case FATE_TOO_LARGE:
        error = E_TOO_LARGE;
        g.counts.too_large++;
        break;
    case FATE_UNKNOWN_HAPPENED:
        commit_decide(c, &version);
        error = E_UNKNOWN;
        g.counts.unknown_happened++;
        break;
    case FATE_UNKNOWN_LOST:
        error = E_UNKNOWN;
        g.counts.unknown_lost++;
        break;
    case FATE_CHANGED_HAPPENED:
        commit_decide(c, &version);
        error = E_CHANGED;
        g.counts.changed_happened++;
        break;
    case FATE_CHANGED_LOST:
        error = E_CHANGED;
        g.counts.changed_lost++;
        break;
    case FATE_TIMEOUT_LATE:
        error = E_TIMED_OUT;
        late = true;
        g.counts.timeout_late++;
        break;
    case FATE_CANCELLED_LATE:
        error = E_CANCELLED;
        late = true;
        g.counts.cancelled_late++;
        break;
    }
    if (version >= 0 && (e->db->dead || e->db->paused || e->db->cut))
        g.counts.away_landed++;
    if (e->f->settled && !late) {
        /* Its caller gave it up while it was on its way. */
        g.counts.late_landed += version >= 0;
        g.counts.late_refused += version < 0;
    }
    /* Those of a batch are answered when it is over, also where the answer is that nobody knows:
     * the client finds out first that the commit is not on its way any more. */
    commit_answer(e->f, e->t, error, version, c->answer_delay_ns + (late ? 0 : batch_left_ns()));
    if (!late) {
        commit_free(c);
        return;
    }
    c->given_up = true;
    struct event *lands = event_new(WAY_CLUSTER, commit_lands, NULL, NULL);
    lands->commit = c;
    c->event = lands;
    event_post(lands, 1 + chance_below((uint64_t)g.config.late_ms_max * 1000000u + 1u));
}

static enum fate fate_of_commit(void)
{
    const struct fdb_double_config *k = &g.config;
    const int64_t rates[] = {
        [FATE_CONFLICT] = k->conflict,
        [FATE_TOO_LARGE] = k->too_large,
        [FATE_UNKNOWN_HAPPENED] = k->unknown_happened,
        [FATE_UNKNOWN_LOST] = k->unknown_lost,
        [FATE_CHANGED_HAPPENED] = k->changed_happened,
        [FATE_CHANGED_LOST] = k->changed_lost,
        [FATE_TIMEOUT_LATE] = k->timeout_late,
        [FATE_CANCELLED_LATE] = k->cancelled_late,
    };
    enum fate fate = FATE_TRUE;
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++)
        if (one_in(rates[i]) && fate == FATE_TRUE)
            fate = (enum fate)i;
    return fate;
}

struct commit *commit_new(FDBTransaction *t)
{
    struct commit *c = mem_zalloc(sizeof *c);
    list_add_tail(&g.commits, &c->link);
    writes_send(&t->writes, &c->mutations, &c->n_mutations, &c->writes);
    ranges_tidy(&c->writes);
    ranges_tidy(&t->reads_made);
    c->reads = t->reads_made;
    t->reads_made = (struct ranges){0};
    writes_free(&t->writes);
    for (size_t i = 0; i < c->n_mutations; i++)
        c->bytes += c->mutations[i].key->len + c->mutations[i].value->len;
    c->charged_bytes = c->bytes + c->n_mutations * MUTATION_BYTES + ranges_bytes(&c->reads) +
                       ranges_bytes(&c->writes);
    return c;
}

void commit_send(FDBFuture *f, FDBTransaction *t, struct commit *c)
{
    c->f = future_ref(f);
    c->read_version = t->read_version;
    c->fate = fate_of_commit();
    uint64_t delay_ns = random_delay_ns();
    c->answer_delay_ns = random_delay_ns();
    if (one_in(g.config.commit_slow)) {
        uint64_t slow_ns = chance_below((uint64_t)g.config.slow_ms_max * 1000000u + 1u);
        g.counts.commit_slow++;
        *(chance_below(2) ? &delay_ns : &c->answer_delay_ns) += slow_ns;
    }
    if (!g.instant) {
        delay_ns += f->db->commit_ns;
        c->answer_delay_ns += f->db->answer_ns;
    }
    g.counts.commits_tried++;
    g.counts.commits_batch += t->batch;
    txn_count_tags(t);
    struct event *e = event_new(WAY_REQUEST, commit_arrives, f, t);
    e->commit = c;
    c->event = e;
    event_post(e, delay_ns);
}

/* --- one client's way to the cluster ---------------------------------------------------- */

static void become_unknown(struct commit *c)
{
    if (c->fate == FATE_TRUE && chance_below(2))
        c->fate = chance_below(2) ? FATE_UNKNOWN_HAPPENED : FATE_UNKNOWN_LOST;
}

/* What is behind the place of the cut goes on; a commit may do so for long. All else waits, as the
 * client library sends it again when it has new connections. */
static bool cut_one(struct event *e, uint64_t now)
{
    if (e->unsent)
        return true;
    if (e->way == WAY_ANSWER) {
        e->through = chance_below(2);
    } else if (e->commit && e->way == WAY_REQUEST) {
        uint64_t kind = chance_below(3);
        e->through = kind != 0;
        if (kind == 2)
            e->due_ns = max_u64(e->due_ns, now) +
                        chance_below((uint64_t)g.config.late_ms_max * 1000000u + 1u);
    }
    return true;
}

/* A commit whose connection broke under it is one of unknown outcome; one whose connection only
 * stood still is late. */
static bool heal_one(struct event *e, uint64_t now)
{
    bool held = !e->through && (e->way == WAY_REQUEST || e->way == WAY_ANSWER);
    e->through = false;
    if (!held)
        return true;
    if (e->due_ns <= now)
        e->due_ns = now + random_delay_ns();
    if (e->commit && e->way == WAY_REQUEST) {
        become_unknown(e->commit);
    } else if (e->run == commit_answered && !e->error && chance_below(2)) {
        e->error = E_UNKNOWN;
        g.counts.cut_unknown++;
    }
    return true;
}

void link_cut(FDBDatabase *db, bool cut)
{
    if (db->cut == cut)
        return;
    db->cut = cut;
    events_each(db, cut ? cut_one : heal_one);
}

static bool pause_one(struct event *e, uint64_t now)
{
    (void)now;
    e->unsent = e->way == WAY_REQUEST && !e->through && chance_below(2);
    return true;
}

static bool resume_one(struct event *e, uint64_t now)
{
    if (e->unsent && e->due_ns <= now)
        e->due_ns = now + random_delay_ns();
    e->unsent = false;
    return true;
}

void link_pause(FDBDatabase *db, bool paused)
{
    if (db->paused == paused)
        return;
    db->paused = paused;
    events_each(db, paused ? pause_one : resume_one);
}

/* Commits that its machine had taken in arrive. Nobody hears of anything. */
static bool die_one(struct event *e, uint64_t now)
{
    (void)now;
    if (e->way == WAY_REQUEST && e->commit && !e->unsent && (e->through || chance_below(2)))
        return true;
    if (e->way == WAY_REQUEST && e->commit)
        commit_free(e->commit);
    e->commit = NULL;
    return false;
}

void link_die(FDBDatabase *db)
{
    db->dead = true;
    events_each(db, die_one);
    list_for_each_safe (l, next, &g.watches) {
        struct watch *w = container_of(l, struct watch, link);
        if (w->db == db)
            watch_end(w, E_CANCELLED);
    }
}

/* --- watches --------------------------------------------------------------------------- */

bool watch_begin(FDBFuture *f, FDBTransaction *t, struct blob *value)
{
    if (t->db->watches >= t->db->watches_max)
        return false;
    t->db->watches++;
    struct watch *w = mem_zalloc(sizeof *w);
    w->f = future_ref(f);
    w->db = db_ref(t->db);
    w->key = blob_ref(f->key);
    w->value = blob_ref(value);
    list_add_tail(&t->watches, &w->link);
    g.counts.watches_alive++;
    /* From here on it is no read any more that a commit waits for. */
    txn_settled(f);
    watches_written(t);
    return true;
}

void watch_end(struct watch *w, fdb_error_t error)
{
    list_remove(&w->link);
    w->db->watches--;
    g.counts.watches_alive--;
    if (!error && !w->f->settled)
        g.counts.watches_fired++;
    future_settle(w->f, error);
    future_unref(w->f);
    db_unref(w->db);
    blob_unref(w->key);
    blob_unref(w->value);
    free(w);
}

static bool is_value(const struct blob *a, const struct blob *b)
{
    return a && b ? blob_compare(a, b) == 0 : a == b;
}

/* A transaction's own later writes are changes too. */
void watches_written(FDBTransaction *t)
{
    list_for_each_safe (l, next, &t->watches) {
        struct watch *w = container_of(l, struct watch, link);
        bool exact = false;
        const struct write *e = writes_find(&t->writes, w->key->data, w->key->len, &exact);
        if (!e || (exact ? e->at == W_NOT : !e->gap_cleared))
            continue;
        const struct blob *value = exact && e->at == W_SET ? e->value : NULL;
        if (!exact || e->at == W_SET || e->at == W_CLEARED ? !is_value(value, w->value) : true)
            watch_end(w, 0);
    }
}

static void watch_fault(struct event *e)
{
    list_for_each_safe (l, next, &g.watches) {
        struct watch *w = container_of(l, struct watch, link);
        if (w->f != e->f)
            continue;
        if (e->error == E_CANCELLED)
            g.counts.watch_cancelled++;
        else if (e->error == E_FUTURE)
            g.counts.watch_future++;
        else
            g.counts.watch_spurious++;
        watch_end(w, e->error);
        return;
    }
}

static void watch_fires(struct event *e)
{
    list_for_each_safe (l, next, &g.watches) {
        struct watch *w = container_of(l, struct watch, link);
        if (w->f == e->f) {
            watch_end(w, 0);
            return;
        }
    }
}

static void watch_look(struct watch *w)
{
    int64_t version = version_now(); /* (forgets what is too old) */
    const struct node *n = map_seek(w->key->data, w->key->len);
    struct blob *value =
        n && blob_compare(map_key(n), w->key) == 0 ? map_value(n, version) : NULL;
    if (w->changed || is_value(value, w->value))
        return;
    w->changed = true; /* the news is on its way */
    struct event *e = event_new(WAY_ANSWER, watch_fires, w->f, NULL);
    event_post(e, random_delay_ns());
}

static void watches_look(void)
{
    list_for_each_safe (l, next, &g.watches) {
        struct watch *w = container_of(l, struct watch, link);
        if (w->f->settled) {
            watch_end(w, 0);
            continue;
        }
        watch_look(w);
    }
}

void watches_activate(FDBTransaction *t)
{
    for (struct list *l; (l = list_pop(&t->watches));) {
        struct watch *w = container_of(l, struct watch, link);
        list_add_tail(&g.watches, &w->link);
        if (w->f->settled) {
            watch_end(w, 0);
            continue;
        }
        bool cancelled = one_in(g.config.watch_cancelled);
        bool future = one_in(g.config.watch_future);
        bool spurious = one_in(g.config.watch_spurious);
        uint64_t delay_ns = chance_below((uint64_t)g.config.watch_delay_ms_max * 1000000u + 1u);
        if (cancelled || future || spurious) {
            struct event *e = event_new(WAY_ANSWER, watch_fault, w->f, NULL);
            e->error = cancelled ? E_CANCELLED : future ? E_FUTURE : 0;
            event_post(e, delay_ns);
        }
        watch_look(w);
    }
}

void watches_cancel(FDBTransaction *t, fdb_error_t error)
{
    for (struct list *l; (l = list_pop(&t->watches));)
        watch_end(container_of(l, struct watch, link), error);
}

/* --- all over -------------------------------------------------------------------------- */

void cluster_reset(void)
{
    list_for_each_safe (l, next, &g.commits) {
        struct commit *c = container_of(l, struct commit, link);
        if (!c->event)
            continue; /* of a transaction that has not sent it */
        c->event->commit = NULL;
        commit_free(c);
    }
    list_for_each_safe (l, next, &g.watches)
        watch_end(container_of(l, struct watch, link), E_CANCELLED);
    history_forget(INT64_MAX);
    map_free();
    /* Whoever still has a version from before cannot read anything with it. */
    batch_end();
    int64_t now = version_now();
    g.version_base = now + 2 * 5 * VERSIONS_PER_S;
    g.version_base_ns = now_ns();
    g.version_last = g.version_oldest = g.version_forgot = g.version_base;
}
