/*
 * Commits: checks, mutations, and certainty about what became of them.
 *
 * Every commit belongs to a lane: a key of this handle's own in which each
 * commit leaves its number. A commit also takes a read conflict on its lane's
 * key. So when FoundationDB can't say whether a commit happened (1021), or that
 * it may happen still (1031, 1101), the answer can be had: read the key. It
 * holds the number: the commit happened. It does not: write a higher number, and
 * once that has committed the other one can never happen, because its conflict
 * fails. A lane carries one commit at a time, so numbers in it only rise.
 *
 * Checks are reads in the same transaction, which conflict with whoever changes
 * them. The commits of a volume's owner need no reads: the commit before, in the
 * same lane, proved that the owner key was ours at its version, so this one is
 * sent with that version as its read version and a read conflict on the owner
 * key; any change since makes it fail, and then it is done the long way, which
 * tells. Meanwhile a ticket, a read version asked for at the time the one before
 * was sent, has to be there too: that is how a cluster throttles its clients.
 *
 * Writing transactions have no timeout and are never cancelled.
 */
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/log.h"
#include "store/fdb/engine.h"

#define FRESH_NS 600000000000ull

/* A read version asked for to be throttled by; freed by its own task. */
struct fd_ticket {
    struct list link; /* fr->tickets */
    struct fd_wait wait;
    struct fr *fr;
    struct fd_lane *lane; /* NULL: nobody is interested any more */
    FDBTransaction *tr;
    FDBFuture *future;
    struct fd_commit *waiter;
    bool background;
};

struct fd_commit {
    struct list link; /* fr->commits, fr->committing */
    struct store_commit *commit;
    struct fr *fr;
    struct fd_lane *lane;
    FDBTransaction *tr;
    FDBFuture *future;  /* of the commit */
    FDBFuture **checks; /* of the reads */
    struct fd_wait wait;
    struct fd_retry retry;
    uint64_t started_ns, sent_ns;
    uint64_t id;   /* its number in the lane, new for each attempt */
    uint64_t tomb; /* the number that a settling transaction writes */
    bool side;     /* which of the lane's two keys it uses */
    struct env_task task;
};

static void begin(struct fd_commit *c);
static void settle(struct fd_commit *c);
static void take_lane(struct fr *fr);

/* --- lanes --------------------------------------------------------------------------- */

static void ticket_ready(struct fd_wait *wait);

static void lane_forget(struct fd_lane *lane)
{
    lane->known_version = 0;
}

static uint64_t check_hash(const struct store_check *k)
{
    return hash64(k->value.data, k->value.len, hash64(k->key.data, k->key.len, 0));
}

static bool lane_knows(const struct fd_lane *lane, const struct store_commit *c, uint64_t hash,
                       uint64_t now_ns)
{
    const struct store_check *k = &c->checks[0];
    return lane->known_version && lane->known_hash == hash &&
           now_ns - lane->known_ns < FD_VERSION_AGE_MAX_NS &&
           lane->known_key_len == k->key.len && lane->known_value_len == k->value.len &&
           memcmp(lane->known, k->key.data, k->key.len) == 0 &&
           memcmp(lane->known + k->key.len, k->value.data, k->value.len) == 0;
}

static int compare(struct slice a, struct slice b)
{
    int c = memcmp(a.data, b.data, a.len < b.len ? a.len : b.len);
    return c ? c : a.len < b.len ? -1 : a.len > b.len;
}

static bool touches(const struct store_commit *c, struct slice key)
{
    for (size_t i = 0; i < c->n_mutations; i++) {
        const struct store_mutation *m = &c->mutations[i];
        if (m->kind == STORE_CLEAR_RANGE ? compare(m->key, key) <= 0 && compare(key, m->head) < 0
                                         : compare(m->key, key) == 0)
            return true;
    }
    return false;
}

/* The commit's check held at `version` and still does after it. */
static void lane_learn(struct fd_lane *lane, const struct store_commit *c, int64_t version,
                       uint64_t asked_ns)
{
    lane_forget(lane);
    if (c->n_checks != 1 || c->checks[0].kind != STORE_CHECK_VALUE ||
        touches(c, c->checks[0].key))
        return;
    const struct store_check *k = &c->checks[0];
    mem_grow(&lane->known, &lane->known_cap, k->key.len + k->value.len, 1);
    memcpy(lane->known, k->key.data, k->key.len);
    memcpy(lane->known + k->key.len, k->value.data, k->value.len);
    lane->known_key_len = k->key.len;
    lane->known_value_len = k->value.len;
    lane->known_hash = check_hash(k);
    lane->known_version = version;
    lane->known_ns = asked_ns;
}

static void ticket_drop(struct fd_lane *lane)
{
    if (lane->ticket)
        lane->ticket->lane = NULL;
    lane->ticket = NULL;
}

/* An idle lane for `c`, one that knows its check where there is one. */
static struct fd_lane *lane_for(struct fr *fr, const struct store_commit *c)
{
    if (c->n_checks == 1 && c->checks[0].kind == STORE_CHECK_VALUE) {
        uint64_t hash = check_hash(&c->checks[0]), now = env_now_ns(fr->env);
        list_for_each (l, &fr->lanes) {
            struct fd_lane *lane = container_of(l, struct fd_lane, link);
            if (lane_knows(lane, c, hash, now))
                return lane;
        }
    }
    struct fd_lane *lane = NULL;
    /* One whose knowledge is still good is left to its volume while there may be others. */
    uint64_t now = env_now_ns(fr->env);
    list_for_each (l, &fr->lanes) {
        struct fd_lane *idle = container_of(l, struct fd_lane, link);
        if (!idle->known_version || now - idle->known_ns >= FD_VERSION_AGE_MAX_NS) {
            lane = idle;
            break;
        }
    }
    if (!lane && fr->n_lanes == FD_LANES_MAX && !list_empty(&fr->lanes))
        lane = container_of(fr->lanes.next, struct fd_lane, link);
    if (!lane && fr->n_lanes < FD_LANES_MAX) {
        lane = mem_zalloc(sizeof *lane);
        lane->no = fr->n_lanes++;
        list_init(&lane->link);
    }
    if (lane) {
        lane_forget(lane);
        ticket_drop(lane);
    }
    return lane;
}

/* --- the end --------------------------------------------------------------------------- */

static void commit_free(struct fd_commit *c)
{
    if (c->tr)
        fdb.transaction_destroy(c->tr);
    list_remove(&c->link);
    free(c->checks);
    free(c);
}

static void finish(struct fd_commit *c, enum status st)
{
    struct store_commit *commit = c->commit;
    struct fr *fr = c->fr;
    fr->heard_ns = env_now_ns(fr->env);
    if (c->lane)
        list_add_tail(&fr->lanes, &c->lane->link);
    commit_free(c);
    take_lane(fr);
    commit->done(commit, st);
}

static void refuse_task(struct env_task *task)
{
    finish(container_of(task, struct fd_commit, task), ST_INVAL);
}

/* --- settling an unknown outcome ------------------------------------------------------- */

/* A lane has two keys, used in turn: a commit that reads at the version before the last one's may
 * not conflict with what that one wrote. */
static uint32_t slot_of(const struct fd_commit *c)
{
    return 2 * c->lane->no + c->side;
}

/* Leaves a number in the lane. A version of just now (0: none is known) tells whoever clears what
 * dead processes left how old it is, by the cluster's own clock. */
static void lane_put(struct fd_commit *c, uint64_t number)
{
    struct fr *fr = c->fr;
    struct fd_key key;
    uint8_t value[FD_LANE_VALUE_BYTES];
    put_le64(value, number);
    bool fresh = env_now_ns(fr->env) - fr->version_ns < FRESH_NS;
    put_le64(value + 8, fresh ? (uint64_t)fr->version : 0);
    fd_key_lane(fr, &key, slot_of(c));
    fdb.transaction_set(c->tr, key.bytes, key.len, value, sizeof value);
}

static void settle_again(struct fd_retry *retry, bool lasting)
{
    struct fd_commit *c = container_of(retry, struct fd_commit, retry);
    if (lasting) {
        fdb.transaction_destroy(c->tr);
        c->tr = NULL;
    }
    settle(c);
}

/* From the start, with a new number: the transaction that settled the last one is used up. */
static void begin_anew(struct fd_commit *c)
{
    fdb.transaction_destroy(c->tr);
    c->tr = NULL;
    begin(c);
}

static void settle_committed(struct fd_wait *wait)
{
    struct fd_commit *c = container_of(wait, struct fd_commit, wait);
    int code = fdb.future_get_error(c->future);
    fdb.future_destroy(c->future);
    c->future = NULL;
    if (code) {
        /* Also where this one's outcome is unknown: the next look tells. */
        fd_retry(c->fr, &c->retry, c->tr, code, settle_again);
        return;
    }
    /* It did not happen and can't any more. */
    begin_anew(c);
}

static void settle_read(struct fd_wait *wait)
{
    struct fd_commit *c = container_of(wait, struct fd_commit, wait);
    struct fr *fr = c->fr;
    int present = 0, len = 0;
    const uint8_t *value = NULL;
    int code = fdb.future_get_value(c->future, &present, &value, &len);
    uint64_t number = !code && present && len == FD_LANE_VALUE_BYTES ? get_le64(value) : 0;
    fdb.future_destroy(c->future);
    c->future = NULL;
    if (code) {
        fd_retry(fr, &c->retry, c->tr, code, settle_again);
        return;
    }
    if (number == c->id) {
        c->lane->side = c->side;
        lane_forget(c->lane);
        fd_version_committed(fr, 0, 0);
        finish(c, ST_OK);
        return;
    }
    if (number > c->id) {
        /* An earlier attempt to settle was the one that happened. */
        begin_anew(c);
        return;
    }
    lane_put(c, c->tomb);
    c->future = fdb.transaction_commit(c->tr);
    fd_wait_one(fr, &c->wait, c->future, settle_committed);
}

static void settle(struct fd_commit *c)
{
    struct fr *fr = c->fr;
    struct fd_key key;
    c->tomb = ++c->lane->seq;
    fd_transaction(fr->fd, &c->tr, false, c->commit->tag);
    fd_key_lane(fr, &key, slot_of(c));
    c->future = fdb.transaction_get(c->tr, key.bytes, key.len, 0);
    fd_wait_one(fr, &c->wait, c->future, settle_read);
}

/* --- the commit itself ------------------------------------------------------------------ */

/* Whatever is not known to have had no effect is settled: 1021, 1031, 1039 and 1101, and what
 * nobody has thought of. */
static bool surely_not_committed(int code)
{
    return code == FDB_DATABASE_LOCKED ||
           (code >= FDB_CALL_REFUSED_FIRST && code <= FDB_CALL_REFUSED_LAST &&
            code != FDB_USED_DURING_COMMIT) ||
           fdb.error_predicate(FDB_PREDICATE_RETRYABLE_NOT_COMMITTED, code);
}

static void begin_again(struct fd_retry *retry, bool lasting)
{
    struct fd_commit *c = container_of(retry, struct fd_commit, retry);
    if (lasting) {
        fdb.transaction_destroy(c->tr);
        c->tr = NULL;
    }
    begin(c);
}

/* An attempt failed and nothing happened. */
static void attempt_failed(struct fd_commit *c, int code)
{
    lane_forget(c->lane);
    if (!fdb.error_predicate(FDB_PREDICATE_RETRYABLE, code) && code != FDB_DATABASE_LOCKED) {
        log_error("FoundationDB refuses a commit of %zu mutations: %s (%d)", c->commit->n_mutations,
                  fdb.get_error(code), code);
        finish(c, code == FDB_TRANSACTION_TOO_LARGE ? ST_INVAL : ST_IO);
        return;
    }
    fd_retry(c->fr, &c->retry, c->tr, code, begin_again);
}

static void committed(struct fd_wait *wait)
{
    struct fd_commit *c = container_of(wait, struct fd_commit, wait);
    struct fr *fr = c->fr;
    int64_t version = 0;
    int code = fdb.future_get_error(c->future);
    fdb.future_destroy(c->future);
    c->future = NULL;
    if (!code) {
        int other = fdb.transaction_get_committed_version(c->tr, &version);
        CHECK(other == 0 && version > 0);
        fd_version_committed(fr, version, c->sent_ns);
        c->lane->side = c->side;
        /* One that FoundationDB took in the same batch, behind this one, has the same version:
         * only the version before is one at which the check is known to have held. */
        lane_learn(c->lane, c->commit, version - 1, c->sent_ns);
        finish(c, ST_OK);
        return;
    }
    if (!surely_not_committed(code)) {
        lane_forget(c->lane);
        fdb.transaction_destroy(c->tr);
        c->tr = NULL;
        settle(c);
        return;
    }
    attempt_failed(c, code);
}

static void conflict_on(FDBTransaction *tr, struct fd_key *key)
{
    struct fd_key end = *key;
    end.bytes[end.len++] = 0;
    int code = fdb.transaction_add_conflict_range(tr, key->bytes, key->len, end.bytes, end.len,
                                                  FDB_CONFLICT_READ);
    CHECK(code == 0);
}

static void ticket_start(struct fr *fr, struct fd_lane *lane, const struct store_commit *commit)
{
    if (lane->ticket)
        return;
    struct fd_ticket *t = lane->ticket = mem_zalloc(sizeof *t);
    t->fr = fr;
    t->lane = lane;
    t->background = commit->background;
    fd_transaction(fr->fd, &t->tr, commit->background, commit->tag);
    t->future = fdb.transaction_get_read_version(t->tr);
    list_add_tail(&fr->tickets, &t->link);
    fd_wait_one(fr, &t->wait, t->future, ticket_ready);
}

/* All checks hold, or will make the commit fail: puts the mutations in and sends it. */
static void send(struct fd_commit *c)
{
    struct fr *fr = c->fr;
    const struct store_commit *commit = c->commit;
    struct fd_key key, end;
    for (size_t i = 0; i < commit->n_mutations; i++) {
        const struct store_mutation *m = &commit->mutations[i];
        fd_key_make(fr->fd, &key, m->key);
        if (m->kind == STORE_SET) {
            uint32_t len = fd_value_put(fr->value, m->head, m->body);
            fdb.transaction_set(c->tr, key.bytes, key.len, fr->value, (int)len);
        } else if (m->kind == STORE_CLEAR) {
            fdb.transaction_clear(c->tr, key.bytes, key.len);
        } else {
            fd_key_make(fr->fd, &end, m->head);
            fdb.transaction_clear_range(c->tr, key.bytes, key.len, end.bytes, end.len);
        }
    }
    fd_key_lane(fr, &key, slot_of(c));
    conflict_on(c->tr, &key);
    lane_put(c, c->id);
    c->sent_ns = env_now_ns(fr->env);
    c->future = fdb.transaction_commit(c->tr);
    ticket_start(fr, c->lane, commit);
    fd_wait_one(fr, &c->wait, c->future, committed);
}

static void send_known(struct fd_commit *c)
{
    struct fd_key key;
    fdb.transaction_set_read_version(c->tr, c->lane->known_version);
    fd_key_make(c->fr->fd, &key, c->commit->checks[0].key);
    conflict_on(c->tr, &key);
    send(c);
}

static bool check_holds(const struct store_check *k, FDBFuture *future, int *code)
{
    struct slice head, body;
    if (k->kind == STORE_CHECK_EMPTY) {
        const struct fdb_key_value *kv;
        int count = 0, more;
        *code = fdb.future_get_keyvalue_array(future, &kv, &count, &more);
        return count == 0;
    }
    int present = 0, len = 0;
    const uint8_t *value = NULL;
    *code = fdb.future_get_value(future, &present, &value, &len);
    if (*code || k->kind == STORE_CHECK_ABSENT)
        return !present;
    return present && fd_value_parse(value, len, &head, &body) && compare(head, k->value) == 0;
}

static void checks_read(struct fd_wait *wait)
{
    struct fd_commit *c = container_of(wait, struct fd_commit, wait);
    bool hold = true;
    int failure = 0;
    for (size_t i = 0; i < c->commit->n_checks; i++) {
        int code;
        hold &= check_holds(&c->commit->checks[i], c->checks[i], &code);
        if (code)
            failure = code;
    }
    for (size_t i = 0; i < c->commit->n_checks; i++)
        fdb.future_destroy(c->checks[i]);
    if (failure)
        attempt_failed(c, failure);
    else if (!hold)
        finish(c, ST_CONFLICT);
    else
        send(c);
}

static void read_checks(struct fd_commit *c)
{
    const struct store_commit *commit = c->commit;
    struct fr *fr = c->fr;
    struct fd_key key, end;
    if (!c->checks)
        c->checks = mem_alloc(commit->n_checks * sizeof(FDBFuture *));
    fd_wait_begin(fr, &c->wait, (uint32_t)commit->n_checks, checks_read);
    for (size_t i = 0; i < commit->n_checks; i++) {
        const struct store_check *k = &commit->checks[i];
        fd_key_make(fr->fd, &key, k->key);
        if (k->kind == STORE_CHECK_EMPTY) {
            fd_key_make(fr->fd, &end, k->value);
            c->checks[i] = fdb.transaction_get_range(c->tr, key.bytes, key.len, 0, 1, end.bytes,
                                                     end.len, 0, 1, 1, 0, FDB_STREAMING_EXACT, 0, 0,
                                                     0);
        } else {
            c->checks[i] = fdb.transaction_get(c->tr, key.bytes, key.len, 0);
        }
        fd_wait_add(&c->wait, c->checks[i]);
    }
}

static void lane_read(struct fd_wait *wait)
{
    struct fd_commit *c = container_of(wait, struct fd_commit, wait);
    int code = fdb.future_get_error(c->future);
    fdb.future_destroy(c->future);
    c->future = NULL;
    if (code)
        attempt_failed(c, code);
    else
        send(c);
}

/* A commit without checks would get its read version when it is sent, and possibly late: later
 * than the number that is to make it fail. Reading gives it one now. */
static void read_lane(struct fd_commit *c)
{
    struct fd_key key;
    fd_key_lane(c->fr, &key, slot_of(c));
    c->future = fdb.transaction_get(c->tr, key.bytes, key.len, 0);
    fd_wait_one(c->fr, &c->wait, c->future, lane_read);
}

/* One attempt, from the start; nothing of it has happened, and nothing of an earlier one will. */
static void begin(struct fd_commit *c)
{
    struct fr *fr = c->fr;
    const struct store_commit *commit = c->commit;
    c->id = ++c->lane->seq;
    c->side = !c->lane->side;
    fd_transaction(fr->fd, &c->tr, commit->background, commit->tag);
    struct fd_ticket *ticket = c->lane->ticket;
    if (c->lane->known_version && ticket && ticket->background != commit->background) {
        /* A cluster may hold back background work for long, and nothing else. */
        ticket_drop(c->lane);
        ticket_start(fr, c->lane, commit);
        ticket = c->lane->ticket;
    }
    if (c->lane->known_version) {
        if (ticket)
            ticket->waiter = c;
        else
            send_known(c);
    } else if (commit->n_checks) {
        read_checks(c);
    } else {
        read_lane(c);
    }
}

static void ticket_ready(struct fd_wait *wait)
{
    struct fd_ticket *t = container_of(wait, struct fd_ticket, wait);
    struct fd_commit *c = t->lane ? t->waiter : NULL;
    int code = fdb.future_get_error(t->future);
    if (t->lane)
        t->lane->ticket = NULL;
    list_remove(&t->link);
    fdb.future_destroy(t->future);
    fdb.transaction_destroy(t->tr);
    struct fr *fr = t->fr;
    free(t);
    if (!c)
        return;
    /* It may have been so late that the version is too old by now; or the cluster refused it,
     * and the long way asks again. */
    if (code || env_now_ns(fr->env) - c->lane->known_ns >= FD_VERSION_AGE_MAX_NS) {
        lane_forget(c->lane);
        begin(c);
    } else {
        send_known(c);
    }
}

static uint64_t commit_bytes(const struct fd *fd, const struct store_commit *commit)
{
    uint64_t bytes = 1000;
    for (size_t i = 0; i < commit->n_mutations; i++) {
        const struct store_mutation *m = &commit->mutations[i];
        uint64_t key = m->key.len + (uint64_t)fd->prefix_len;
        bytes += FD_MUTATION_OVERHEAD;
        /* The key counts again in the conflict range, twice. What is cleared is a range, also
         * where it is one key. */
        if (m->kind == STORE_SET)
            bytes += 3 * key + m->head.len + m->body.len;
        else if (m->kind == STORE_CLEAR)
            bytes += 4 * key;
        else
            bytes += 2 * (key + m->head.len + (uint64_t)fd->prefix_len);
    }
    for (size_t i = 0; i < commit->n_checks; i++)
        bytes += 2 * (commit->checks[i].key.len + commit->checks[i].value.len +
                      2 * (uint64_t)fd->prefix_len);
    return bytes;
}

static void take_lane(struct fr *fr)
{
    while (!list_empty(&fr->commits)) {
        struct fd_commit *c = container_of(fr->commits.next, struct fd_commit, link);
        struct fd_lane *lane = lane_for(fr, c->commit);
        if (!lane)
            return;
        list_remove(&lane->link);
        c->lane = lane;
        list_remove(&c->link);
        list_add_tail(&fr->committing, &c->link);
        begin(c);
    }
}

static bool key_fits(struct slice key)
{
    return key.len > 0 && key.len <= STORE_KEY_BYTES_MAX;
}

void fd_commit(struct store *store, struct env *env, struct store_commit *commit)
{
    struct fd *fd = fd_of(store);
    struct fr *fr = fd_reactor(fd, env);
    struct fd_commit *c = mem_zalloc(sizeof *c);
    commit->store = store;
    c->commit = commit;
    c->fr = fr;
    c->started_ns = env_now_ns(env);
    bool fits = commit_bytes(fd, commit) <= FD_COMMIT_BYTES_MAX;
    for (size_t i = 0; i < commit->n_mutations; i++) {
        const struct store_mutation *m = &commit->mutations[i];
        fits = fits && key_fits(m->key) && (m->kind != STORE_CLEAR_RANGE || key_fits(m->head)) &&
               (m->kind != STORE_SET ||
                (m->head.len <= FD_HEAD_BYTES_MAX && m->body.len <= FD_BODY_BYTES_MAX));
    }
    if (!fits) {
        list_add_tail(&fr->committing, &c->link);
        c->task.run = refuse_task;
        env_post(env, &c->task);
        return;
    }
    list_add_tail(&fr->commits, &c->link);
    fd_health_watch(fr);
    take_lane(fr);
}

uint64_t fd_commits_oldest_ns(const struct fr *fr)
{
    uint64_t oldest = UINT64_MAX;
    if (!list_empty(&fr->commits))
        oldest = container_of(fr->commits.next, struct fd_commit, link)->started_ns;
    if (!list_empty(&fr->committing))
        oldest = min_u64(oldest, container_of(fr->committing.next, struct fd_commit, link)->started_ns);
    return oldest;
}

static void ticket_freed_late(struct fd_wait *wait)
{
    free(container_of(wait, struct fd_ticket, wait));
}

void fd_lanes_close(struct fr *fr)
{
    struct list *l;
    while ((l = list_pop(&fr->tickets))) {
        struct fd_ticket *t = container_of(l, struct fd_ticket, link);
        t->wait.ready = ticket_freed_late;
        fd_wait_abandon(&t->wait, t->future);
        fdb.transaction_destroy(t->tr);
    }
    while ((l = list_pop(&fr->lanes))) {
        struct fd_lane *lane = container_of(l, struct fd_lane, link);
        free(lane->known);
        free(lane);
    }
}
