/*
 * The store double; mem_store.h says what it does.
 *
 * Keys are a skip list whose levels come from the key's hash, so that the same keys make
 * the same list. Each request is a few events of the asking reactor: it is executed at one
 * moment between being asked and being answered, and all of it at that moment.
 */
#include "mem_store.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"

#define LEVELS 20u
#define DELAY_NS 300000u
#define BODY_UNIT 4096u
#define GATHER_RECORDS 64u

struct node {
    uint8_t *key;
    size_t key_len;
    uint8_t *head, *body;
    size_t head_len, body_len;
    unsigned levels;
    struct node *next[];
};

struct record {
    uint64_t stream, hash;
    uint8_t meta[32];
    uint8_t *payload; /* NULL: lost */
    uint32_t payload_len;
    struct iovec *iov; /* until submitted */
    int n_iov;
    bool lost;
};

struct mem_log {
    struct store_log base; /* what the layers above hold; first */
    struct list link;
    struct mem_store *db;
    struct handle *owner; /* NULL: closed, or its process died */
    struct sim_env *env; /* its reactor */
    uint8_t session[STORE_ID_BYTES];
    uint64_t id, capacity;
    struct record *records; /* record of sequence number n at n - 1 */
    size_t n, cap;
    uint64_t submitted, synced; /* so many records */
    uint64_t keep_from;         /* sequence number of the first that is needed */
    uint64_t keep_answered, used_bytes;
    bool poisoned;
    struct list syncs;
    bool syncing;
    uint64_t sync_upto;
};

struct session_entry {
    struct list link;
    uint8_t id[STORE_ID_BYTES];
    struct handle *handle;
    bool alive;
};

struct handle {
    struct store base; /* first */
    struct list link;
    struct mem_store *db;
    struct sim_env *env; /* where the process does what is no reactor's: its first reactor */
    bool dead;
    struct list commits; /* store_commit.link, in order, not yet executed */
    bool committing;
    struct list watches;
    uint64_t last_ack_ns;
    uint64_t reserved_bytes, reserved_keys;
    uint64_t out; /* requests not answered yet */
    struct sim_env *net; /* where its commits happen: not where it runs, if that may stand still */
    uint64_t stalled_until_ns, answer_delay_ns;
};

struct mem_store {
    struct sim *sim;
    struct mem_config config;
    struct mem_faults faults;
    bool stopped;
    uint64_t stopped_ns;
    struct node *head;
    struct list handles, logs, sessions;
    uint64_t next_log_id;
    void (*kill)(void *arg, struct store *handle);
    void *kill_arg;
    struct mem_counts counts;
    struct sim_env *net; /* needs_heartbeat */
    uint64_t stalled_until_ns;
    void (*before_commit)(void *arg, struct store *handle, const struct store_commit *commit);
    void *before_commit_arg;
    struct store_commit *swapped; /* MEM_SWAPS_COMMITS: put off behind the next */
};

/* A reactor of the process: what it asks for is answered there. */
static struct sim_env *reactor_of(struct env *env)
{
    return container_of(env, struct sim_env, base);
}

static struct handle *handle_of(struct store *store)
{
    return container_of(store, struct handle, base);
}

/* The layers above did what they promised not to do. */
static void broken(struct mem_store *db, const char *what)
{
    if (++db->counts.broken_promises <= 10)
        fprintf(stderr, "store double: %s\n", what);
}

/* --- the map ------------------------------------------------------------------------- */

static int compare(const void *a, size_t a_len, const void *b, size_t b_len)
{
    size_t n = a_len < b_len ? a_len : b_len;
    int c = n ? memcmp(a, b, n) : 0;
    return c ? c : a_len < b_len ? -1 : a_len > b_len;
}

static struct node *node_new(struct slice key, unsigned levels)
{
    struct node *n = mem_zalloc(sizeof *n + levels * sizeof n->next[0]);
    n->levels = levels;
    n->key = mem_alloc(key.len);
    if (key.len)
        memcpy(n->key, key.data, key.len);
    n->key_len = key.len;
    return n;
}

static void node_free(struct node *n)
{
    free(n->key);
    free(n->head);
    free(n->body);
    free(n);
}

/* The first node at or behind `key`; with the last nodes before it on each level. */
static struct node *map_seek(const struct mem_store *db, struct slice key,
                             struct node *before[LEVELS])
{
    struct node *at = db->head;
    for (unsigned l = LEVELS; l-- > 0;) {
        while (at->next[l] &&
               compare(at->next[l]->key, at->next[l]->key_len, key.data, key.len) < 0)
            at = at->next[l];
        if (before)
            before[l] = at;
    }
    return at->next[0];
}

static struct node *map_before(const struct mem_store *db, struct slice key)
{
    struct node *before[LEVELS];
    map_seek(db, key, before);
    return before[0] == db->head ? NULL : before[0];
}

static struct node *map_find(const struct mem_store *db, struct slice key)
{
    struct node *n = map_seek(db, key, NULL);
    return n && compare(n->key, n->key_len, key.data, key.len) == 0 ? n : NULL;
}

static uint64_t body_cost(uint64_t len)
{
    return round_up_u64(len, BODY_UNIT);
}

static void *copy_bytes(struct slice s)
{
    if (!s.len)
        return NULL;
    return memcpy(mem_alloc(s.len), s.data, s.len);
}

static void map_set(struct mem_store *db, const struct store_mutation *m)
{
    struct node *before[LEVELS];
    struct node *n = map_seek(db, m->key, before);
    if (!n || compare(n->key, n->key_len, m->key.data, m->key.len) != 0) {
        uint64_t h = hash64(m->key.data, m->key.len, 7);
        unsigned levels = 1 + (unsigned)__builtin_ctzll(h | 1ull << (LEVELS * 2 - 2)) / 2;
        n = node_new(m->key, levels);
        for (unsigned l = 0; l < levels; l++) {
            n->next[l] = before[l]->next[l];
            before[l]->next[l] = n;
        }
        db->counts.keys++;
    } else if (db->config.lie == MEM_LOSES_MUTATIONS && m->body.len && n->body_len &&
               sim_one_in(db->sim, 50)) {
        return;
    }
    db->counts.body_bytes_used -= body_cost(n->body_len);
    free(n->head);
    free(n->body);
    n->head = copy_bytes(m->head);
    n->body = copy_bytes(m->body);
    n->head_len = m->head.len;
    n->body_len = m->body.len;
    db->counts.body_bytes_used += body_cost(n->body_len);
}

static void map_remove(struct mem_store *db, struct slice key)
{
    struct node *before[LEVELS];
    struct node *n = map_seek(db, key, before);
    if (!n || compare(n->key, n->key_len, key.data, key.len) != 0)
        return;
    for (unsigned l = 0; l < n->levels; l++)
        before[l]->next[l] = n->next[l];
    db->counts.keys--;
    db->counts.body_bytes_used -= body_cost(n->body_len);
    node_free(n);
}

static struct slice node_key(const struct node *n)
{
    return (struct slice){n->key, n->key_len};
}

static void map_remove_range(struct mem_store *db, struct slice begin, struct slice end)
{
    for (;;) {
        struct node *n = map_seek(db, begin, NULL);
        if (!n || compare(n->key, n->key_len, end.data, end.len) >= 0)
            return;
        struct key_copy {
            uint8_t bytes[STORE_KEY_BYTES_MAX];
        } copy;
        size_t len = n->key_len;
        memcpy(copy.bytes, n->key, len);
        map_remove(db, (struct slice){copy.bytes, len});
    }
}

/* --- reads --------------------------------------------------------------------------- */

struct chunk {
    struct chunk *next;
};

static void *arena_take(struct store_read *read, size_t len)
{
    struct chunk *c = mem_alloc(sizeof *c + len);
    c->next = read->arena;
    read->arena = c;
    return c + 1;
}

static struct slice arena_copy(struct store_read *read, const void *data, size_t len)
{
    if (!len)
        return (struct slice){NULL, 0};
    return (struct slice){memcpy(arena_take(read, len), data, len), len};
}

static void mem_read_release(struct store_read *read)
{
    struct chunk *c = read->arena;
    read->arena = NULL;
    while (c) {
        struct chunk *next = c->next;
        free(c);
        c = next;
    }
}

#define LOOK_AGAIN_NS 1000000u

static void read_answer(void *arg)
{
    struct store_read *read = arg;
    struct mem_store *db = handle_of(read->store)->db;
    if (db->stopped && !handle_of(read->store)->dead) {
        uint64_t waited_ns = sim_now_ns(db->sim) - db->stopped_ns;
        if (!db->config.timeout_ms || waited_ns < db->config.timeout_ms * 1000000ull) {
            sim_at(reactor_of(read->work.env), LOOK_AGAIN_NS, read_answer, read);
            return;
        }
        read->result = ST_UNAVAIL;
    }
    handle_of(read->store)->out--;
    if (handle_of(read->store)->dead)
        read->result = ST_IO;
    read->done(read, read->result);
}

static void read_digest(void *arg)
{
    struct store_read *read = arg;
    struct sim_env *env = reactor_of(read->work.env);
    if (read->result == ST_OK && read->digest)
        read->digest(read);
    sim_at(env, sim_delay_ns(env->sim, 20000), read_answer, read);
}

static void get_run(struct mem_store *db, struct store_read *read, struct store_get *get)
{
    const struct node *n = map_find(db, get->key);
    get->st = ST_NOTFOUND;
    get->head = (struct slice){NULL, 0};
    get->body_len = 0;
    if (!n)
        return;
    get->st = ST_OK;
    get->head = arena_copy(read, n->head, n->head_len);
    get->body_len = (uint32_t)n->body_len;
    if (!get->body)
        return;
    if (n->body_len > get->body_cap ||
        (db->faults.get_fails && sim_one_in(db->sim, db->faults.get_fails)))
        get->st = ST_IO;
    else if (n->body_len)
        memcpy(get->body, n->body, n->body_len);
}

static void range_run(struct mem_store *db, struct store_read *read, struct store_range *range)
{
    size_t cap = 0;
    struct store_pair *pairs = NULL;
    range->n_pairs = 0;
    range->more = false;
    if (!range->limit)
        broken(db, "a range without a limit");
    struct node *n = range->reverse ? map_before(db, range->end) : map_seek(db, range->begin, NULL);
    while (n) {
        if (range->reverse ? compare(n->key, n->key_len, range->begin.data, range->begin.len) < 0
                           : compare(n->key, n->key_len, range->end.data, range->end.len) >= 0)
            break;
        if (range->n_pairs == range->limit) {
            range->more = true;
            break;
        }
        mem_grow(&pairs, &cap, range->n_pairs + 1, sizeof *pairs);
        pairs[range->n_pairs++] =
            (struct store_pair){.key = arena_copy(read, n->key, n->key_len),
                                .head = arena_copy(read, n->head, n->head_len),
                                .body_len = (uint32_t)n->body_len};
        n = range->reverse ? map_before(db, node_key(n)) : n->next[0];
    }
    range->pairs = arena_take(read, range->n_pairs * sizeof *pairs + 1);
    if (range->n_pairs)
        memcpy(range->pairs, pairs, range->n_pairs * sizeof *pairs);
    free(pairs);
}

static uint64_t stalled_ns(const struct handle *h);

static void read_run(void *arg)
{
    struct store_read *read = arg;
    struct handle *h = handle_of(read->store);
    struct sim_env *env = reactor_of(read->work.env);
    struct mem_store *db = h->db;
    uint64_t stalled = stalled_ns(h);
    if (stalled) {
        sim_at(env, stalled, read_run, read);
        return;
    }
    read->result = ST_OK;
    if (h->dead) {
        read->result = ST_IO;
    } else if (db->faults.reads_unavailable && sim_one_in(db->sim, db->faults.reads_unavailable)) {
        read->result = ST_UNAVAIL;
    } else {
        for (uint32_t i = 0; i < read->n_gets; i++)
            get_run(db, read, &read->gets[i]);
        for (uint32_t i = 0; i < read->n_ranges; i++)
            range_run(db, read, &read->ranges[i]);
    }
    sim_at(env, sim_delay_ns(env->sim, 20000), read_digest, read);
}

static void mem_read(struct store *store, struct env *env, struct store_read *read)
{
    struct handle *h = handle_of(store);
    struct sim_env *reactor = reactor_of(env);
    read->store = store;
    read->work.env = env;
    read->arena = NULL;
    h->db->counts.reads++;
    h->db->counts.own_reads += read->own;
    h->db->counts.background_reads += read->background;
    h->out++;
    sim_at(reactor, sim_delay_ns(reactor->sim, h->db->config.read_ns_max), read_run, read);
}

/* --- watches ------------------------------------------------------------------------- */

enum { WATCH_IDLE, WATCH_ARMED, WATCH_POSTED, WATCH_STOPPED };

static void watch_run(struct env_task *task)
{
    struct store_watch *w = container_of(task, struct store_watch, task);
    if (w->state == WATCH_POSTED) {
        w->state = WATCH_IDLE;
        w->fired(w);
    }
}

static void watch_fire(struct store_watch *w)
{
    list_remove(&w->link);
    w->state = WATCH_POSTED;
    w->task.run = watch_run;
    env_post(w->env, &w->task);
}

static void mem_watch(struct store *store, struct env *env, struct store_watch *w)
{
    struct handle *h = handle_of(store);
    w->store = store;
    w->env = env;
    w->state = WATCH_ARMED;
    list_add_tail(&h->watches, &w->link);
    /* Spurious is allowed. */
    if (!h->dead && sim_one_in(h->db->sim, 10))
        watch_fire(w);
}

/* The caller may free the watch after this, so one that was posted leaves the queue. */
static void mem_watch_stop(struct store_watch *w)
{
    if (w->state == WATCH_ARMED) {
        list_remove(&w->link);
    } else if (w->state == WATCH_POSTED) {
        sim_forget(reactor_of(w->env), &w->task);
    }
    w->state = WATCH_STOPPED;
}

static void watches_changed(struct mem_store *db, struct slice begin, struct slice end, bool one)
{
    list_for_each (l, &db->handles) {
        struct handle *h = container_of(l, struct handle, link);
        list_for_each_safe (m, next, &h->watches) {
            struct store_watch *w = container_of(m, struct store_watch, link);
            int c = compare(w->key.data, w->key.len, begin.data, begin.len);
            if (one ? c == 0 : c >= 0 && compare(w->key.data, w->key.len, end.data, end.len) < 0)
                watch_fire(w);
        }
    }
}

/* --- commits ------------------------------------------------------------------------- */

static bool check_passes(struct mem_store *db, const struct store_check *c)
{
    const struct node *n;
    switch (c->kind) {
    case STORE_CHECK_VALUE:
        n = map_find(db, c->key);
        return n && compare(n->head, n->head_len, c->value.data, c->value.len) == 0;
    case STORE_CHECK_ABSENT:
        return !map_find(db, c->key);
    case STORE_CHECK_EMPTY:
        n = map_seek(db, c->key, NULL);
        return !n || compare(n->key, n->key_len, c->value.data, c->value.len) >= 0;
    }
    return false;
}

static struct mem_log *log_of(struct store_log *log)
{
    return (struct mem_log *)(void *)log;
}

static void apply(struct mem_store *db, struct store_commit *commit, size_t n_mutations)
{
    for (size_t i = 0; i < n_mutations; i++) {
        const struct store_mutation *m = &commit->mutations[i];
        if (m->key.len == 0 || m->key.len > STORE_KEY_BYTES_MAX)
            broken(db, "a key that is empty or too long");
        switch (m->kind) {
        case STORE_SET:
            map_set(db, m);
            watches_changed(db, m->key, m->key, true);
            break;
        case STORE_CLEAR:
            map_remove(db, m->key);
            watches_changed(db, m->key, m->key, true);
            break;
        case STORE_CLEAR_RANGE:
            map_remove_range(db, m->key, m->head);
            watches_changed(db, m->key, m->head, false);
            break;
        }
    }
    if (commit->log && n_mutations == commit->n_mutations) {
        struct mem_log *log = log_of(commit->log);
        log->keep_from = max_u64(log->keep_from, commit->log_keep_from);
    }
}

/* As the FoundationDB engine counts with its longest prefix: keys as such, and twice in each
 * conflict range. */
#define PREFIX_BYTES 66u
static uint64_t commit_whole_bytes(const struct store_commit *commit)
{
    uint64_t n = 1000;
    for (size_t i = 0; i < commit->n_checks; i++)
        n += 2 * (commit->checks[i].key.len + commit->checks[i].value.len + 2 * PREFIX_BYTES);
    for (size_t i = 0; i < commit->n_mutations; i++) {
        const struct store_mutation *m = &commit->mutations[i];
        n += 64 + 3 * (m->key.len + PREFIX_BYTES) + m->head.len + m->body.len;
    }
    return n;
}

/* Executes a commit: checks, then everything or nothing. */
static enum status commit_execute(struct handle *h, struct store_commit *commit)
{
    struct mem_store *db = h->db;
    if (db->before_commit)
        db->before_commit(db->before_commit_arg, &h->base, commit);
    if (db->faults.commit_fails && sim_one_in(db->sim, db->faults.commit_fails))
        return db->faults.commit_status ? db->faults.commit_status : ST_IO;
    for (size_t i = 0; i < commit->n_checks; i++)
        if (!check_passes(db, &commit->checks[i])) {
            db->counts.conflicts++;
            if (db->config.lie != MEM_IGNORES_CHECKS)
                return ST_CONFLICT;
        }
    uint64_t sum = 0;
    for (size_t i = 0; i < commit->n_mutations; i++) {
        const struct store_mutation *m = &commit->mutations[i];
        if (m->kind == STORE_SET)
            sum += body_cost(m->body.len);
        if (m->kind != STORE_CLEAR_RANGE && m->head.len > h->base.limits.head_bytes_max)
            broken(db, "a head that is too long");
        if (m->body.len > h->base.limits.body_bytes_max)
            broken(db, "a body that is too long");
    }
    uint64_t whole = commit_whole_bytes(commit);
    db->counts.commit_bytes_most = max_u64(db->counts.commit_bytes_most, whole);
    if (whole > h->base.limits.commit_bytes_max) {
        broken(db, "a commit that is too large");
        return ST_INVAL;
    }
    if (!commit->reserved && db->config.capacity_bytes &&
        db->counts.body_bytes_used + db->counts.reserved_bytes + sum > db->config.capacity_bytes &&
        sum)
        return ST_NOSPC;
    apply(db, commit, commit->n_mutations);
    if (db->config.capacity_bytes && sum && db->counts.body_bytes_used > db->config.capacity_bytes)
        broken(db, "a commit that was reserved for does not fit");
    db->counts.commits++;
    db->counts.background_commits += commit->background;
    return ST_OK;
}

static void commit_answer(void *arg)
{
    struct store_commit *commit = arg;
    struct handle *h = handle_of(commit->store);
    if (h->db->stopped && !h->dead) {
        sim_at(reactor_of(commit->env), LOOK_AGAIN_NS, commit_answer, commit);
        return;
    }
    h->out--;
    if (h->dead)
        commit->result = ST_CONFLICT;
    else if (commit->result == ST_OK && commit->log) {
        struct mem_log *log = log_of(commit->log);
        uint64_t upto = min_u64(commit->log_keep_from, log->n + 1);
        for (; log->keep_answered < upto; log->keep_answered++)
            log->used_bytes -=
                store_log_record_bytes(log->records[log->keep_answered - 1].payload_len);
    }
    commit->done(commit, commit->result);
}

static void commits_start(struct handle *h);

static void answer_later(struct handle *h, struct store_commit *commit)
{
    uint64_t now = sim_now_ns(h->env->sim);
    uint64_t at = now + sim_delay_ns(h->env->sim, h->db->config.commit_ns_max / 2);
    at += h->answer_delay_ns;
    h->last_ack_ns = max_u64(at, h->last_ack_ns);
    sim_at(reactor_of(commit->env), h->last_ack_ns - now, commit_answer, commit);
}

/* For how long nothing gets through to the store. */
static uint64_t stalled_ns(const struct handle *h)
{
    uint64_t until = max_u64(h->stalled_until_ns, h->db->stalled_until_ns);
    uint64_t now = sim_now_ns(h->db->sim);
    return !h->dead && until > now ? until - now : 0;
}

static void commit_run(void *arg)
{
    struct handle *h = arg;
    if (h->db->stopped && !h->dead) {
        sim_at(h->env, LOOK_AGAIN_NS, commit_run, h);
        return;
    }
    h->committing = false;
    uint64_t stalled = stalled_ns(h);
    if (stalled && !list_empty(&h->commits)) {
        h->committing = true;
        sim_at(h->net, stalled, commit_run, h);
        return;
    }
    struct list *l = list_pop(&h->commits);
    if (!l)
        return;
    struct store_commit *commit = container_of(l, struct store_commit, link);
    if (h->dead) {
        commit->result = ST_CONFLICT;
        answer_later(h, commit);
    } else {
        commit->result = commit_execute(h, commit);
        answer_later(h, commit);
    }
    commits_start(h);
}

static uint64_t commit_bytes(const struct store_commit *commit)
{
    uint64_t n = 0;
    for (size_t i = 0; i < commit->n_mutations; i++)
        n += commit->mutations[i].body.len + commit->mutations[i].head.len;
    return n;
}

static void commits_start(struct handle *h)
{
    if (h->committing || list_empty(&h->commits))
        return;
    h->committing = true;
    struct mem_store *db = h->db;
    struct store_commit *commit = container_of(h->commits.next, struct store_commit, link);
    uint64_t ns = sim_delay_ns(h->env->sim, db->config.commit_ns_max);
    if (db->faults.commit_slow && sim_one_in(db->sim, db->faults.commit_slow))
        ns += sim_below(db->sim, db->faults.slow_ms_max * 1000000ull + 1);
    if (db->config.commit_bytes_per_ms)
        ns += commit_bytes(commit) * 1000000 / db->config.commit_bytes_per_ms;
    sim_at(h->dead ? h->env : h->net, h->dead ? 1000 : ns, commit_run, h);
}

/* A lie needs the commit after its maker has freed it. */
static struct store_commit *commit_copy(const struct store_commit *from)
{
    struct store_commit *c = mem_alloc(sizeof *c);
    struct store_check *checks = mem_zalloc((from->n_checks + 1) * sizeof *checks);
    struct store_mutation *ms = mem_zalloc((from->n_mutations + 1) * sizeof *ms);
    *c = *from;
    for (size_t i = 0; i < from->n_checks; i++) {
        checks[i] = from->checks[i];
        checks[i].key.data = copy_bytes(checks[i].key);
        checks[i].value.data = copy_bytes(checks[i].value);
    }
    for (size_t i = 0; i < from->n_mutations; i++) {
        ms[i] = from->mutations[i];
        ms[i].key.data = copy_bytes(ms[i].key);
        ms[i].head.data = copy_bytes(ms[i].head);
        ms[i].body.data = copy_bytes(ms[i].body);
    }
    c->checks = checks;
    c->mutations = ms;
    c->log = NULL;
    return c;
}

static void commit_copy_free(struct store_commit *c)
{
    for (size_t i = 0; i < c->n_checks; i++) {
        free((void *)(uintptr_t)c->checks[i].key.data);
        free((void *)(uintptr_t)c->checks[i].value.data);
    }
    for (size_t i = 0; i < c->n_mutations; i++) {
        free((void *)(uintptr_t)c->mutations[i].key.data);
        free((void *)(uintptr_t)c->mutations[i].head.data);
        free((void *)(uintptr_t)c->mutations[i].body.data);
    }
    free((void *)(uintptr_t)c->checks);
    free((void *)(uintptr_t)c->mutations);
    free(c);
}

/* Answers at once and does it later, or never. */
static void lie_early(struct handle *h, struct store_commit *commit)
{
    struct mem_store *db = h->db;
    if (db->swapped) {
        commit_execute(h, db->swapped);
        commit_copy_free(db->swapped);
    }
    db->swapped = commit_copy(commit);
    commit->result = ST_OK;
    answer_later(h, commit);
}

/* Of two commits the later one first. */
static void lie_swap(struct handle *h, struct store_commit *commit)
{
    struct mem_store *db = h->db;
    struct store_commit *held = db->swapped;
    if (!held && sim_one_in(db->sim, 3)) {
        db->swapped = commit_copy(commit);
        commit->result = ST_OK;
        answer_later(h, commit);
        return;
    }
    commit->result = commit_execute(h, commit);
    answer_later(h, commit);
    if (held) {
        commit_execute(h, held);
        commit_copy_free(held);
        db->swapped = NULL;
    }
}

static bool carries_bodies(const struct store_commit *commit)
{
    for (size_t i = 0; i < commit->n_mutations; i++)
        if (commit->mutations[i].body.len)
            return true;
    return false;
}

static void mem_commit(struct store *store, struct env *env, struct store_commit *commit)
{
    struct handle *h = handle_of(store);
    struct mem_store *db = h->db;
    commit->store = store;
    commit->env = env;
    commit->result = ST_OK;
    h->out++;
    if (!h->dead && db->config.lie == MEM_ACKS_EARLY && carries_bodies(commit)) {
        lie_early(h, commit);
        return;
    }
    if (!h->dead && db->config.lie == MEM_SWAPS_COMMITS && carries_bodies(commit)) {
        lie_swap(h, commit);
        return;
    }
    list_add_tail(&h->commits, &commit->link);
    commits_start(h);
}

/* --- space --------------------------------------------------------------------------- */

static bool mem_reserve(struct store *store, struct store_reservation want)
{
    struct handle *h = handle_of(store);
    struct mem_store *db = h->db;
    if (h->dead)
        return false;
    if (db->config.capacity_bytes &&
        db->counts.body_bytes_used + db->counts.reserved_bytes + want.body_bytes >
            db->config.capacity_bytes)
        return false;
    /* It may also just not know yet. */
    if (db->config.capacity_bytes && sim_one_in(db->sim, 8))
        return false;
    h->reserved_bytes += want.body_bytes;
    h->reserved_keys += want.keys;
    db->counts.reserved_bytes += want.body_bytes;
    db->counts.reserved_keys += want.keys;
    return true;
}

static void reserve_answer(void *arg)
{
    struct store_reserve_wait *w = arg;
    struct handle *h = handle_of(w->store);
    struct mem_store *db = h->db;
    h->out--;
    w->result = ST_NOSPC;
    if (!h->dead && (!db->config.capacity_bytes ||
                     db->counts.body_bytes_used + db->counts.reserved_bytes + w->want.body_bytes <=
                         db->config.capacity_bytes)) {
        h->reserved_bytes += w->want.body_bytes;
        h->reserved_keys += w->want.keys;
        db->counts.reserved_bytes += w->want.body_bytes;
        db->counts.reserved_keys += w->want.keys;
        w->result = ST_OK;
    }
    w->done(w, w->result);
}

static void mem_reserve_wait(struct store *store, struct env *env, struct store_reserve_wait *w)
{
    struct handle *h = handle_of(store);
    w->store = store;
    w->env = env;
    h->out++;
    struct sim_env *reactor = reactor_of(env);
    sim_at(reactor, sim_delay_ns(reactor->sim, h->db->config.commit_ns_max), reserve_answer, w);
}

static void mem_unreserve(struct store *store, struct store_reservation what)
{
    struct handle *h = handle_of(store);
    struct mem_store *db = h->db;
    if (h->dead)
        return;
    if (what.body_bytes > h->reserved_bytes || what.keys > h->reserved_keys) {
        broken(db, "more space is given back than was reserved");
        return;
    }
    h->reserved_bytes -= what.body_bytes;
    h->reserved_keys -= what.keys;
    db->counts.reserved_bytes -= what.body_bytes;
    db->counts.reserved_keys -= what.keys;
}

static uint64_t mem_body_cost(const struct store *store, uint64_t len)
{
    (void)store;
    return body_cost(len);
}

/* --- sessions ------------------------------------------------------------------------ */

static struct session_entry *session_find(struct mem_store *db, const uint8_t *id)
{
    list_for_each (l, &db->sessions) {
        struct session_entry *s = container_of(l, struct session_entry, link);
        if (!memcmp(s->id, id, STORE_ID_BYTES))
            return s;
    }
    return NULL;
}

static enum status mem_session_begin(struct store *store, const uint8_t id[STORE_ID_BYTES],
                                     struct err *e)
{
    struct handle *h = handle_of(store);
    if (session_find(h->db, id))
        return fail(e, ST_EXISTS, "this session exists");
    struct session_entry *s = mem_zalloc(sizeof *s);
    memcpy(s->id, id, STORE_ID_BYTES);
    s->handle = h;
    s->alive = true;
    list_add_tail(&h->db->sessions, &s->link);
    return ST_OK;
}

static void mem_session_end(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    struct session_entry *s = session_find(handle_of(store)->db, id);
    if (s) {
        list_remove(&s->link);
        free(s);
    }
}

static enum store_liveness mem_session_probe(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    const struct session_entry *s = session_find(handle_of(store)->db, id);
    if (handle_of(store)->db->config.needs_heartbeat)
        return STORE_SESSION_UNKNOWN;
    return s && s->alive ? STORE_SESSION_ALIVE : STORE_SESSION_DEAD;
}

static enum status mem_session_kill(struct store *store, const uint8_t id[STORE_ID_BYTES],
                                    struct err *e)
{
    struct mem_store *db = handle_of(store)->db;
    struct session_entry *s = session_find(db, id);
    if (db->config.needs_heartbeat)
        return fail(e, ST_UNSUP, "nobody here reaches other processes");
    if (!s || !s->alive)
        return ST_OK;
    if (!db->kill)
        return fail(e, ST_UNSUP, "nobody here ends processes");
    db->kill(db->kill_arg, &s->handle->base);
    return s->alive ? fail(e, ST_IO, "it still lives") : ST_OK;
}

static enum status mem_info(struct store *store, struct store_info *info, struct err *e)
{
    (void)e;
    const struct mem_store *db = handle_of(store)->db;
    *info = (struct store_info){.uri = "double:", .engine = "double"};
    info->bytes_used = db->counts.body_bytes_used;
    return ST_OK;
}

static enum status mem_usage(struct store *store, struct slice begin, struct slice end,
                             uint64_t *keys, uint64_t *bytes, struct err *e)
{
    (void)e;
    const struct mem_store *db = handle_of(store)->db;
    *keys = *bytes = 0;
    for (struct node *n = map_seek(db, begin, NULL);
         n && compare(n->key, n->key_len, end.data, end.len) < 0; n = n->next[0]) {
        ++*keys;
        *bytes += n->head_len + body_cost(n->body_len);
    }
    return ST_OK;
}

/* --- the log ------------------------------------------------------------------------- */

static const struct mem_log *log_of_const(const struct store_log *log)
{
    return (const struct mem_log *)(const void *)log;
}

static enum status log_open(struct store *store, struct env *env,
                            const uint8_t session[STORE_ID_BYTES], uint64_t bytes,
                            struct store_log **out, struct err *e)
{
    (void)e;
    struct handle *h = handle_of(store);
    struct mem_log *log = mem_zalloc(sizeof *log);
    log->env = reactor_of(env);
    log->base.store = store;
    log->db = h->db;
    log->owner = h;
    memcpy(log->session, session, STORE_ID_BYTES);
    log->id = ++h->db->next_log_id * 0x1000193;
    log->capacity = bytes;
    log->keep_from = log->keep_answered = 1;
    list_init(&log->syncs);
    list_add_tail(&h->db->logs, &log->link);
    *out = &log->base;
    return ST_OK;
}

static void log_free(struct mem_log *log)
{
    for (size_t i = 0; i < log->n; i++) {
        free(log->records[i].payload);
        free(log->records[i].iov);
    }
    list_remove(&log->link);
    free(log->records);
    free(log);
}

static void log_close(struct store_log *base, bool remove)
{
    struct mem_log *log = log_of(base);
    if (!list_empty(&log->syncs))
        broken(log->db, "a log is closed while a sync is not answered");
    /* One who died before it could do so has removed nothing. */
    bool dead = log->owner->dead;
    log->owner = NULL;
    if (remove && !dead)
        log_free(log);
}

static uint64_t log_id(const struct store_log *log)
{
    return log_of_const(log)->id;
}

static uint64_t log_next_seq(const struct store_log *log)
{
    return log_of_const(log)->n + 1;
}

static uint64_t log_room(const struct store_log *base)
{
    const struct mem_log *log = log_of_const(base);
    return log->capacity - log->used_bytes;
}

static uint64_t log_capacity(const struct store_log *log)
{
    return log_of_const(log)->capacity;
}

/* Writes what was appended and not written; at most `most` records. */
static void log_write(struct mem_log *log, uint64_t most)
{
    for (; log->submitted < log->n && most > 0; most--) {
        struct record *r = &log->records[log->submitted++];
        uint32_t at = 0;
        r->payload = mem_alloc(r->payload_len);
        for (int i = 0; i < r->n_iov; i++) {
            memcpy(r->payload + at, r->iov[i].iov_base, r->iov[i].iov_len);
            at += (uint32_t)r->iov[i].iov_len;
        }
        free(r->iov);
        r->iov = NULL;
        if (hash64(r->payload, r->payload_len, 0) != r->hash)
            broken(log->db, "the payload of a log record changed between append and submit");
    }
}

static uint64_t log_append(struct store_log *base, uint64_t stream, const uint8_t meta[32],
                           const struct iovec *iov, int n_iov, uint32_t payload_len)
{
    struct mem_log *log = log_of(base);
    uint64_t bytes = store_log_record_bytes(payload_len);
    if (bytes > log_room(base))
        broken(log->db, "a log record is appended where there is no room");
    if (log->n - log->submitted >= GATHER_RECORDS && !log->owner->dead && !log->poisoned)
        log_write(log, UINT64_MAX);
    mem_grow(&log->records, &log->cap, log->n + 1, sizeof *log->records);
    struct record *r = &log->records[log->n++];
    *r = (struct record){.stream = stream, .payload_len = payload_len, .n_iov = n_iov};
    memcpy(r->meta, meta, sizeof r->meta);
    r->iov = mem_alloc((size_t)n_iov * sizeof *iov + 1);
    uint32_t sum = 0;
    uint8_t *flat = mem_alloc(payload_len);
    for (int i = 0; i < n_iov; i++) {
        r->iov[i] = iov[i];
        if (sum + iov[i].iov_len <= payload_len && iov[i].iov_len)
            memcpy(flat + sum, iov[i].iov_base, iov[i].iov_len);
        sum += (uint32_t)iov[i].iov_len;
    }
    CHECK(sum == payload_len);
    r->hash = hash64(flat, payload_len, 0);
    free(flat);
    log->used_bytes += bytes;
    return log->n;
}

static enum status log_submit(struct store_log *base)
{
    struct mem_log *log = log_of(base);
    log->db->counts.submits++;
    if (log->owner->dead || log->poisoned)
        return ST_IO;
    if (log->db->faults.log_submit_fails &&
        sim_one_in(log->db->sim, log->db->faults.log_submit_fails)) {
        log->poisoned = true;
        return ST_IO;
    }
    log_write(log, UINT64_MAX);
    return ST_OK;
}

static void syncs_start(struct mem_log *log);

static void sync_end(void *arg)
{
    struct mem_log *log = arg;
    struct handle *h = log->owner;
    enum status st = ST_OK;
    log->syncing = false;
    if (h->dead || log->poisoned) {
        st = ST_IO;
    } else if (log->db->faults.log_sync_fails &&
               sim_one_in(log->db->sim, log->db->faults.log_sync_fails)) {
        log->poisoned = true;
        st = ST_IO;
    } else if (log->db->config.lie != MEM_IGNORES_SYNC) {
        log->synced = max_u64(log->synced, log->sync_upto);
    }
    log->db->counts.syncs++;
    struct list done = LIST_INIT(done);
    struct list rest = LIST_INIT(rest);
    struct list *l;
    while ((l = list_pop(&log->syncs))) {
        struct store_log_sync *sync = container_of(l, struct store_log_sync, link);
        bool covered = st != ST_OK || (uintptr_t)sync->task.next <= log->sync_upto;
        list_add_tail(covered ? &done : &rest, &sync->link);
    }
    list_splice_tail(&log->syncs, &rest);
    syncs_start(log);
    while ((l = list_pop(&done))) {
        struct store_log_sync *sync = container_of(l, struct store_log_sync, link);
        sync->done(sync, st);
    }
}

static void syncs_start(struct mem_log *log)
{
    if (log->syncing || list_empty(&log->syncs))
        return;
    log->syncing = true;
    log->sync_upto = log->submitted;
    sim_at(log->env, sim_delay_ns(log->env->sim, log->db->config.sync_ns_max), sync_end, log);
}

static void log_sync(struct store_log *base, struct store_log_sync *sync)
{
    struct mem_log *log = log_of(base);
    /* How many records it is about, kept in a field that is the engine's. */
    sync->task.next = (struct env_task *)(uintptr_t)log->submitted;
    list_add_tail(&log->syncs, &sync->link);
    syncs_start(log);
}

static struct mem_log *log_find(struct mem_store *db, uint64_t id)
{
    list_for_each (l, &db->logs) {
        struct mem_log *log = container_of(l, struct mem_log, link);
        if (log->id == id)
            return log;
    }
    return NULL;
}

static enum status log_replay(struct store *store, uint64_t id, uint64_t stream, uint64_t after_seq,
                              bool (*take)(void *arg, const struct store_log_record *rec),
                              void *arg, struct err *e)
{
    struct mem_store *db = handle_of(store)->db;
    struct mem_log *log = log_find(db, id);
    if (handle_of(store)->dead)
        return fail(e, ST_UNAVAIL, "this process is dead");
    if (!log)
        return fail(e, ST_NOTFOUND, "there is no write log %llu", (unsigned long long)id);
    const struct session_entry *s = session_find(db, log->session);
    if (log->owner && !log->owner->dead && s && s->alive)
        broken(db, "the log of a living process is replayed");
    for (uint64_t seq = log->keep_from; seq <= log->submitted; seq++) {
        const struct record *r = &log->records[seq - 1];
        if (r->lost) {
            if (db->config.lie == MEM_REPLAYS_OVER_HOLES)
                continue;
            break;
        }
        if (r->stream != stream || seq <= after_seq)
            continue;
        struct store_log_record rec = {
            .seq = seq, .stream = stream, .payload = r->payload, .payload_len = r->payload_len};
        memcpy(rec.meta, r->meta, sizeof rec.meta);
        db->counts.replayed_records++;
        if (!take(arg, &rec))
            break;
    }
    return ST_OK;
}

static enum status log_remove_unused(struct store *store, const uint64_t *needed, size_t n,
                                     struct err *e)
{
    struct mem_store *db = handle_of(store)->db;
    (void)e;
    list_for_each_safe (l, next, &db->logs) {
        struct mem_log *log = container_of(l, struct mem_log, link);
        bool keep = log->owner && !log->owner->dead;
        for (size_t i = 0; i < n; i++)
            keep |= needed[i] == log->id;
        if (!keep && !log->owner)
            log_free(log);
    }
    return ST_OK;
}

static const struct store_log_ops log_ops = {
    .open = log_open,
    .close = log_close,
    .id = log_id,
    .next_seq = log_next_seq,
    .room = log_room,
    .capacity = log_capacity,
    .append = log_append,
    .submit = log_submit,
    .sync = log_sync,
    .replay = log_replay,
    .remove_unused = log_remove_unused,
};

/* --- the medium and its handles ------------------------------------------------------ */

static void mem_close(struct store *store)
{
    struct handle *h = handle_of(store);
    struct mem_store *db = h->db;
    if (h->out || !list_empty(&h->commits) || h->committing)
        broken(db, "a store is closed while requests are not answered");
    if (!list_empty(&h->watches))
        broken(db, "a store is closed while watches are armed");
    if (!h->dead && (h->reserved_bytes || h->reserved_keys))
        broken(db, "a store is closed while space is reserved");
    list_for_each_safe (l, next, &db->sessions) {
        struct session_entry *s = container_of(l, struct session_entry, link);
        if (s->handle == h) {
            list_remove(&s->link);
            free(s);
        }
    }
    list_remove(&h->link);
    free(h);
}

static const struct store_ops mem_ops = {
    .close = mem_close,
    .read = mem_read,
    .read_release = mem_read_release,
    .commit = mem_commit,
    .watch = mem_watch,
    .watch_stop = mem_watch_stop,
    .reserve = mem_reserve,
    .reserve_wait = mem_reserve_wait,
    .unreserve = mem_unreserve,
    .body_cost = mem_body_cost,
    .session_begin = mem_session_begin,
    .session_end = mem_session_end,
    .session_probe = mem_session_probe,
    .session_kill = mem_session_kill,
    .info = mem_info,
    .usage = mem_usage,
    .log = &log_ops,
};

struct mem_store *mem_store_new(struct sim *sim, const struct mem_config *config)
{
    struct mem_store *db = mem_zalloc(sizeof *db);
    db->sim = sim;
    db->config = *config;
    if (!db->config.batch_bytes_max)
        db->config.batch_bytes_max = 16u << 20;
    if (!db->config.commit_bytes_max)
        db->config.commit_bytes_max = UINT64_MAX;
    if (!db->config.read_ns_max)
        db->config.read_ns_max = DELAY_NS;
    if (!db->config.commit_ns_max)
        db->config.commit_ns_max = DELAY_NS;
    if (!db->config.sync_ns_max)
        db->config.sync_ns_max = DELAY_NS;
    db->head = node_new((struct slice){NULL, 0}, LEVELS);
    list_init(&db->handles);
    list_init(&db->logs);
    list_init(&db->sessions);
    if (db->config.needs_heartbeat)
        db->net = sim_env_new(sim);
    return db;
}

void mem_store_free(struct mem_store *db)
{
    CHECK(list_empty(&db->handles));
    while (!list_empty(&db->logs))
        log_free(container_of(db->logs.next, struct mem_log, link));
    for (struct node *n = db->head; n;) {
        struct node *next = n->next[0];
        node_free(n);
        n = next;
    }
    if (db->swapped)
        commit_copy_free(db->swapped);
    if (db->net)
        sim_env_free(db->net);
    free(db);
}

struct store *mem_store_attach(struct mem_store *db, struct sim_env *env)
{
    struct handle *h = mem_zalloc(sizeof *h);
    h->base.ops = &mem_ops;
    h->base.limits = (struct store_limits){.head_bytes_max = 65536,
                                           .body_bytes_max = 1u << 20,
                                           .batch_bytes_max = db->config.batch_bytes_max,
                                           .commit_bytes_max = db->config.commit_bytes_max,
                                           .body_bytes_best = 16384,
                                           .clears_ranges = db->config.clears_ranges,
                                           .has_log = db->config.has_log,
                                           .needs_heartbeat = db->config.needs_heartbeat};
    h->db = db;
    h->env = env;
    h->net = db->net ? db->net : env;
    list_init(&h->commits);
    list_init(&h->watches);
    list_add_tail(&db->handles, &h->link);
    return &h->base;
}

void mem_store_crash_process(struct store *store)
{
    struct handle *h = handle_of(store);
    struct mem_store *db = h->db;
    if (h->dead)
        return;
    /* What was under way happened up to some point. */
    while (!list_empty(&h->commits) && !sim_one_in(db->sim, 2)) {
        struct store_commit *commit =
            container_of(list_pop(&h->commits), struct store_commit, link);
        commit_execute(h, commit);
        commit->result = ST_CONFLICT;
        answer_later(h, commit);
    }
    if (db->config.lie == MEM_TEARS_COMMITS && !list_empty(&h->commits)) {
        struct store_commit *commit =
            container_of(list_pop(&h->commits), struct store_commit, link);
        apply(db, commit, sim_below(db->sim, commit->n_mutations));
        answer_later(h, commit);
    }
    if (db->swapped) {
        commit_copy_free(db->swapped);
        db->swapped = NULL;
    }
    list_for_each (l, &db->logs) {
        struct mem_log *log = container_of(l, struct mem_log, link);
        if (log->owner != h)
            continue;
        /* Appending may have written some of it already. */
        if (!log->poisoned)
            log_write(log, sim_below(db->sim, log->n - log->submitted + 1));
        if (db->config.lie == MEM_LOSES_SUBMITS && log->submitted > log->synced)
            log->records[log->synced].lost = true;
        for (size_t i = log->submitted; i < log->n; i++)
            log->records[i].lost = true;
    }
    h->dead = true;
    if (db->net && h->committing) {
        /* The rest is answered where its remains are. */
        sim_forget(db->net, h);
        h->committing = false;
        commits_start(h);
    }
    db->counts.reserved_bytes -= h->reserved_bytes;
    db->counts.reserved_keys -= h->reserved_keys;
    h->reserved_bytes = h->reserved_keys = 0;
    list_for_each (l, &db->sessions) {
        struct session_entry *s = container_of(l, struct session_entry, link);
        if (s->handle == h)
            s->alive = false;
    }
}

void mem_store_power_cut(struct mem_store *db)
{
    list_for_each (l, &db->handles)
        CHECK(container_of(l, struct handle, link)->dead);
    list_for_each (l, &db->logs) {
        struct mem_log *log = container_of(l, struct mem_log, link);
        bool prefix = sim_one_in(db->sim, 2);
        uint64_t cut = log->synced + sim_below(db->sim, log->submitted - log->synced + 1);
        for (uint64_t i = log->synced; i < log->submitted; i++)
            if (prefix ? i >= cut : sim_one_in(db->sim, 3)) {
                db->counts.log_records_lost += !log->records[i].lost;
                log->records[i].lost = true;
            }
        /* What is left lies on the disk. */
        log->synced = log->submitted;
    }
}

void mem_store_believe_dead(struct mem_store *db, const uint8_t id[STORE_ID_BYTES])
{
    struct session_entry *s = session_find(db, id);
    CHECK(s);
    s->alive = false;
}

void mem_store_on_kill(struct mem_store *db, void (*kill)(void *arg, struct store *handle),
                       void *arg)
{
    db->kill = kill;
    db->kill_arg = arg;
}

void mem_store_stall(struct mem_store *db, struct store *handle, uint64_t ns)
{
    CHECK(db->net);
    *(handle ? &handle_of(handle)->stalled_until_ns : &db->stalled_until_ns) =
        sim_now_ns(db->sim) + ns;
}

void mem_store_late_answers(struct store *handle, uint64_t ns)
{
    handle_of(handle)->answer_delay_ns = ns;
}

void mem_store_let_through(struct store *handle)
{
    struct handle *h = handle_of(handle);
    h->stalled_until_ns = 0;
    if (!h->committing)
        return;
    sim_forget(h->net, h);
    do
        commit_run(h);
    while (!list_empty(&h->commits));
    sim_forget(h->net, h);
    h->committing = false;
}

void mem_store_before_commit(struct mem_store *db,
                             void (*see)(void *arg, struct store *handle,
                                         const struct store_commit *commit),
                             void *arg)
{
    db->before_commit = see;
    db->before_commit_arg = arg;
}

void mem_store_set_faults(struct mem_store *db, struct mem_faults faults)
{
    db->faults = faults;
}

void mem_store_stop(struct mem_store *db, bool stopped)
{
    db->stopped = stopped;
    db->stopped_ns = sim_now_ns(db->sim);
}

void mem_store_set_capacity(struct mem_store *db, uint64_t bytes)
{
    db->config.capacity_bytes = bytes;
}

void mem_store_counts(const struct mem_store *db, struct mem_counts *counts)
{
    *counts = db->counts;
}

uint64_t mem_store_keys_in(struct mem_store *db, struct slice begin, struct slice end)
{
    uint64_t count = 0;
    for (struct node *n = map_seek(db, begin, NULL);
         n && compare(n->key, n->key_len, end.data, end.len) < 0; n = n->next[0])
        count++;
    return count;
}

bool mem_store_nth_key(struct mem_store *db, struct slice begin, struct slice end, uint64_t nth,
                       struct slice *key)
{
    for (struct node *n = map_seek(db, begin, NULL);
         n && compare(n->key, n->key_len, end.data, end.len) < 0; n = n->next[0])
        if (nth-- == 0) {
            *key = node_key(n);
            return true;
        }
    return false;
}

void mem_store_each(struct mem_store *db, struct slice begin, struct slice end,
                    void (*see)(void *arg, struct slice key, struct slice head, struct slice body),
                    void *arg)
{
    for (struct node *n = map_seek(db, begin, NULL);
         n && compare(n->key, n->key_len, end.data, end.len) < 0; n = n->next[0])
        see(arg, node_key(n), (struct slice){n->head, n->head_len},
            (struct slice){n->body, n->body_len});
}

void mem_store_put(struct mem_store *db, struct slice key, struct slice head, struct slice body)
{
    map_set(db, &(struct store_mutation){
                    .kind = STORE_SET, .key = key, .head = head, .body = body});
}

bool mem_store_peek(struct mem_store *db, struct slice key, struct slice *head, struct slice *body)
{
    const struct node *n = map_find(db, key);
    if (!n)
        return false;
    *head = (struct slice){n->head, n->head_len};
    *body = (struct slice){n->body, n->body_len};
    return true;
}

void mem_store_poke(struct mem_store *db, struct slice key, struct slice head)
{
    map_set(db, &(struct store_mutation){.kind = STORE_SET, .key = key, .head = head});
}

bool mem_store_damage(struct mem_store *db, struct slice key, enum mem_damage what)
{
    struct node *n = map_find(db, key);
    if (!n)
        return false;
    switch (what) {
    case MEM_FLIP_HEAD:
        if (!n->head_len)
            return false;
        n->head[sim_below(db->sim, n->head_len)] ^= (uint8_t)(1u << sim_below(db->sim, 8));
        return true;
    case MEM_FLIP_BODY:
        if (!n->body_len)
            return false;
        n->body[sim_below(db->sim, n->body_len)] ^= (uint8_t)(1u << sim_below(db->sim, 8));
        return true;
    case MEM_REMOVE:
        map_remove(db, key);
        return true;
    }
    return false;
}
