/*
 * Transactions as the client library has them: what it knows and refuses by itself, in
 * which order things wait for each other, and what a reset or an error makes of them.
 */
#include "inside.h"

#include <limits.h>
#include <stdlib.h>

#define TXN_MAGIC 0x74786e21u
#define DB_MAGIC 0x64622121u
#define DEAD_MAGIC 0xdeadbeefu
#define REPLY_BYTES_MAX 80000u
#define BACKOFF_NS 10000000u
#define BACKOFF_NS_MAX 1000000000u
#define TOO_OLD_DELAY_NS 10000000u

enum txn_option {
    O_CAUSAL_WRITE_RISKY = 10,
    O_NEXT_WRITE_NO_CONFLICT = 30,
    O_RYW_DISABLE = 51,
    O_PRIORITY_IMMEDIATE = 200,
    O_PRIORITY_BATCH = 201,
    O_ACCESS_SYSTEM_KEYS = 301,
    O_READ_SYSTEM_KEYS = 302,
    O_TIMEOUT = 500,
    O_RETRY_LIMIT = 501,
    O_MAX_RETRY_DELAY = 502,
    O_SIZE_LIMIT = 503,
    O_READ_PRIORITY_LOW = 510,
    O_SNAPSHOT_RYW_ENABLE = 600,
    O_SNAPSHOT_RYW_DISABLE = 601,
    O_TAG = 800,
    O_AUTO_THROTTLE_TAG = 801,
};

/* --- databases ------------------------------------------------------------------------- */

FDBDatabase *db_ref(FDBDatabase *db)
{
    db->refs++;
    return db;
}

void db_unref(FDBDatabase *db)
{
    if (--db->refs)
        return;
    db->magic = DEAD_MAGIC;
    free(db);
}

/* --- transactions ---------------------------------------------------------------------- */

FDBTransaction *txn_ref(FDBTransaction *t)
{
    t->refs++;
    return t;
}

void txn_unref(FDBTransaction *t)
{
    if (--t->refs)
        return;
    CHECK(t->destroyed && list_empty(&t->pending) && list_empty(&t->watches));
    db_unref(t->db);
    t->magic = DEAD_MAGIC;
    bury(t);
}

static bool alive(FDBTransaction *t, const char *what)
{
    if (t && t->magic == TXN_MAGIC && !t->destroyed)
        return true;
    violation("%s of a transaction that was destroyed", what);
    return false;
}

void txn_count_tags(const FDBTransaction *t)
{
    for (unsigned i = 0; i < t->n_tags; i++) {
        size_t k = 0;
        while (k < g.n_tags && blob_compare(g.tags[k].tag, t->tags[i]) != 0)
            k++;
        if (k == g.n_tags) {
            mem_grow(&g.tags, &g.tags_cap, g.n_tags + 1, sizeof *g.tags);
            g.tags[g.n_tags++] = (struct tag_use){blob_ref(t->tags[i]), 0};
        }
        g.tags[k].n++;
    }
}

static void pend(FDBFuture *f, FDBTransaction *t, enum op op)
{
    f->op = op;
    f->txn = txn_ref(t);
    list_add_tail(&t->pending, &f->txn_link);
    if (op == OP_GET || op == OP_RANGE || op == OP_WATCH)
        t->reads++;
}

static void commit_ready(FDBTransaction *t);

void txn_settled(FDBFuture *f)
{
    FDBTransaction *t = f->txn;
    f->txn = NULL;
    list_remove(&f->txn_link);
    if (f->op == OP_GET || f->op == OP_RANGE || f->op == OP_WATCH) {
        t->reads--;
        /* A read that its caller cancelled goes on in the real client, and succeeds. */
        if (f->settled && f->error && f->error != E_CANCELLED && !t->read_error)
            t->read_error = f->error;
        if (t->commit_waiting && !t->reads)
            commit_ready(t);
    } else if (f->op == OP_COMMIT) {
        if (t->commit_waiting == f)
            t->commit_waiting = NULL;
        if (t->unsent) {
            commit_free(t->unsent);
            t->unsent = NULL;
        }
    }
    txn_unref(t);
}

static void fail_pending(FDBTransaction *t, fdb_error_t error)
{
    t->commit_waiting = NULL;
    while (!list_empty(&t->pending))
        future_settle(container_of(t->pending.next, FDBFuture, txn_link), error);
}

void txn_fail(FDBTransaction *t, fdb_error_t error)
{
    if (t->reset_error)
        return;
    t->reset_error = error;
    fail_pending(t, error);
}

/* What the native transaction below loses at once: everything but what was written. */
static void forget_version(FDBTransaction *t)
{
    t->gen++;
    t->version_state = VERSION_NONE;
    watches_cancel(t, E_TXN_CANCELLED);
}

/* Everything but options that stay over on_error(). */
static void forget_all(FDBTransaction *t)
{
    forget_version(t);
    writes_free(&t->writes);
    ranges_free(&t->reads_made);
    t->bytes_approx = 0;
    t->commit_started = false;
    t->reset_error = t->deferred = t->read_error = 0;
    t->ryw_disabled = t->next_write_no_conflict = t->system_read = t->system_write = false;
    t->batch = t->immediate = t->read_low = false;
    t->snapshot_ryw = 1;
    t->options.size_limit = t->db->defaults.size_limit;
    for (unsigned i = 0; i < t->n_tags; i++)
        blob_unref(t->tags[i]);
    t->n_tags = 0;
    fail_pending(t, E_TXN_CANCELLED);
}

static void timer_ends(struct event *e)
{
    FDBTransaction *t = e->t;
    if (t->destroyed || t->timer != e->gen || t->reset_error)
        return;
    g.counts.timed_out++;
    txn_fail(t, E_TIMED_OUT);
}

static void timer_start(FDBTransaction *t)
{
    t->timer++;
    if (t->options.timeout_ms <= 0)
        return;
    struct event *e = event_new(WAY_LOCAL, timer_ends, NULL, t);
    e->gen = t->timer;
    e->idle = true;
    uint64_t due = t->creation_ns + (uint64_t)t->options.timeout_ms * 1000000u, now = now_ns();
    event_post(e, due > now ? due - now : 0);
}

static void begin_anew(FDBTransaction *t)
{
    t->options = t->db->defaults;
    t->backoff_ns = BACKOFF_NS;
    t->retries = 0;
    t->creation_ns = now_ns();
    t->committed_version = -1;
    timer_start(t);
}

EXPORT fdb_error_t fdb_database_create_transaction(FDBDatabase *db, FDBTransaction **out)
{
    lock();
    FDBTransaction *t = mem_zalloc(sizeof *t);
    t->magic = TXN_MAGIC;
    t->refs = 1;
    t->db = db_ref(db);
    list_init(&t->pending);
    list_init(&t->watches);
    g.counts.transactions++;
    g.counts.transactions_alive++;
    forget_all(t);
    begin_anew(t);
    *out = t;
    unlock();
    return 0;
}

EXPORT void fdb_transaction_destroy(FDBTransaction *t)
{
    lock();
    if (alive(t, "fdb_transaction_destroy")) {
        g.counts.transactions_alive--;
        txn_fail(t, E_TXN_CANCELLED);
        forget_all(t);
        t->timer++;
        t->destroyed = true;
        txn_unref(t);
    }
    unlock();
}

EXPORT void fdb_transaction_cancel(FDBTransaction *t)
{
    lock();
    if (alive(t, "fdb_transaction_cancel"))
        txn_fail(t, E_TXN_CANCELLED);
    unlock();
}

EXPORT void fdb_transaction_reset(FDBTransaction *t)
{
    lock();
    if (alive(t, "fdb_transaction_reset")) {
        forget_all(t);
        begin_anew(t);
    }
    unlock();
}

/* Whether a transaction commits or has committed; every call but a few spoils it then. */
static bool used_during_commit(FDBTransaction *t, const char *what)
{
    if (!t->commit_started)
        return false;
    violation("%s of a transaction that is committing or has committed", what);
    txn_fail(t, E_DURING_COMMIT);
    return true;
}

/* Whether a call that answers by a future may go on. */
static fdb_error_t enter(FDBTransaction *t, const char *what)
{
    if (t->deferred || t->db->error)
        return t->deferred ? t->deferred : t->db->error;
    if (used_during_commit(t, what))
        return E_DURING_COMMIT;
    return t->reset_error;
}

/* Whether a call without an answer may go on; its error comes with the next future. */
static bool enter_mute(FDBTransaction *t, const char *what)
{
    if (!alive(t, what) || t->deferred || t->db->error)
        return false;
    if (used_during_commit(t, what)) {
        t->deferred = E_DURING_COMMIT;
        return false;
    }
    return true;
}

/* A future of a new operation, which has failed already where `error` is set. */
static FDBFuture *begin(FDBTransaction *t, enum future_kind kind, enum op op, fdb_error_t error)
{
    FDBFuture *f = future_new(kind, t ? t->db : NULL);
    if (error)
        future_settle(f, error);
    else
        pend(f, t, op);
    return f;
}

/* --- options --------------------------------------------------------------------------- */

static bool option_known(int option)
{
    static const short known[] = {10,  20,  21,  23,  30,  40,  50,   51,   52,   110,  120,
                                  130, 200, 201, 300, 301, 302, 303,  304,  400,  401,  402,
                                  403, 404, 405, 406, 500, 501, 502,  503,  504,  505,  507,
                                  508, 509, 510, 511, 600, 601, 700,  701,  702,  710,  711,
                                  712, 713, 714, 800, 801, 900, 1000, 1100, 1101, 1102, 2000};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i] == option)
            return true;
    return false;
}

static fdb_error_t option_number(const uint8_t *value, int len, int64_t min, int64_t max,
                                 int64_t *out)
{
    int64_t v;
    if (!value || len != (int)sizeof v)
        return E_OPTION_VALUE;
    memcpy(&v, value, sizeof v);
    if (v < min || v > max)
        return E_OPTION_VALUE;
    *out = v;
    return 0;
}

static fdb_error_t option_number_of(struct txn_options *o, int option, const uint8_t *value,
                                    int len)
{
    switch (option) {
    case O_TIMEOUT:
        return option_number(value, len, 0, INT_MAX, &o->timeout_ms);
    case O_RETRY_LIMIT:
        return option_number(value, len, -1, INT_MAX, &o->retry_limit);
    case O_MAX_RETRY_DELAY:
        return option_number(value, len, 0, INT_MAX, &o->max_delay_ms);
    default:
        return option_number(value, len, 32, TXN_BYTES_MAX, &o->size_limit);
    }
}

static fdb_error_t option_set(FDBTransaction *t, int option, const uint8_t *value, int len)
{
    fdb_error_t error;
    switch (option) {
    case O_TIMEOUT:
        error = option_number_of(&t->options, option, value, len);
        if (!error) {
            g.counts.timeouts_set += t->options.timeout_ms > 0;
            timer_start(t);
        }
        return error;
    case O_RETRY_LIMIT:
        g.counts.retry_limits_set++;
        return option_number_of(&t->options, option, value, len);
    case O_MAX_RETRY_DELAY:
        g.counts.retry_delays_set++;
        return option_number_of(&t->options, option, value, len);
    case O_SIZE_LIMIT:
        g.counts.size_limits_set++;
        return option_number_of(&t->options, option, value, len);
    case O_TAG:
    case O_AUTO_THROTTLE_TAG:
        if (!value)
            return E_OPTION_VALUE;
        if (len > 255)
            return E_TAG_LONG;
        for (unsigned i = 0; i < t->n_tags; i++)
            if (bytes_compare(t->tags[i]->data, t->tags[i]->len, value, (size_t)len) == 0)
                return 0;
        if (t->n_tags == TAGS_MAX)
            return E_MANY_TAGS;
        t->tags[t->n_tags++] = blob_new(value, (size_t)len);
        return 0;
    default:
        break;
    }
    bool takes_value = (option >= 402 && option <= 405) || option == 504 || option == 900 ||
                       option == 2000 || option == 401 || option == 130;
    if (value && len && !takes_value)
        return E_OPTION_VALUE;
    switch (option) {
    case O_CAUSAL_WRITE_RISKY:
        g.counts.causal_write_risky++;
        break;
    case O_NEXT_WRITE_NO_CONFLICT:
        t->next_write_no_conflict = true;
        break;
    case O_RYW_DISABLE:
        if (t->reads || !writes_empty(&t->writes) || t->reads_made.n)
            return E_INVALID;
        t->ryw_disabled = true;
        break;
    case O_PRIORITY_IMMEDIATE:
        t->immediate = true;
        t->batch = false;
        break;
    case O_PRIORITY_BATCH:
        t->batch = true;
        t->immediate = false;
        break;
    case O_ACCESS_SYSTEM_KEYS:
        t->system_write = true;
        t->system_read = true;
        break;
    case O_READ_SYSTEM_KEYS:
        t->system_read = true;
        break;
    case O_READ_PRIORITY_LOW:
        t->read_low = true;
        break;
    case O_SNAPSHOT_RYW_ENABLE:
        t->snapshot_ryw++;
        break;
    case O_SNAPSHOT_RYW_DISABLE:
        t->snapshot_ryw--;
        break;
    default:
        break;
    }
    return 0;
}

EXPORT fdb_error_t fdb_transaction_set_option(FDBTransaction *t, int option, const uint8_t *value,
                                              int value_len)
{
    lock();
    fdb_error_t error = 0;
    if (!alive(t, "fdb_transaction_set_option"))
        error = E_INVALID;
    else if (!option_known(option))
        error = E_OPTION;
    else if (!t->deferred && !t->db->error)
        t->deferred = option_set(t, option, value, value_len);
    unlock();
    return error;
}

EXPORT fdb_error_t fdb_database_set_option(FDBDatabase *db, int option, const uint8_t *value,
                                           int value_len)
{
    static const short known[] = {10,  20,  21,  22,  26,  27,  405, 500, 501, 502,
                                  503, 504, 505, 506, 700, 701, 702, 800, 900};
    bool found = false;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        found |= known[i] == option;
    if (!found)
        return E_OPTION;
    lock();
    if (option >= O_TIMEOUT && option <= O_SIZE_LIMIT) {
        option_number_of(&db->defaults, option, value, value_len);
    } else if (option == 20) {
        int64_t n;
        if (option_number(value, value_len, 0, 1000000, &n) == 0)
            db->watches_max = (uint64_t)n;
    }
    unlock();
    return 0;
}

/* --- read versions --------------------------------------------------------------------- */

/* Goes on with an operation whose transaction has its read version. */
static void go(FDBFuture *f, FDBTransaction *t)
{
    f->waits_version = false;
    if (f->op == OP_VERSION) {
        f->number = t->read_version;
        future_settle(f, 0);
    } else if (f->op == OP_COMMIT) {
        struct commit *c = t->unsent;
        t->unsent = NULL;
        commit_send(f, t, c);
    } else {
        read_send(f);
    }
}

static void with_version(FDBFuture *f, FDBTransaction *t)
{
    if (t->version_state == VERSION_KNOWN) {
        go(f, t);
        return;
    }
    f->waits_version = true;
    if (t->version_state == VERSION_NONE)
        version_request(t);
}

void txn_version_known(FDBTransaction *t)
{
    list_for_each_safe (l, next, &t->pending) {
        FDBFuture *f = container_of(l, FDBFuture, txn_link);
        if (f->waits_version)
            go(f, t);
    }
}

EXPORT void fdb_transaction_set_read_version(FDBTransaction *t, int64_t version)
{
    lock();
    if (alive(t, "fdb_transaction_set_read_version") && !t->deferred && !t->db->error) {
        if (t->version_state != VERSION_NONE) {
            t->deferred = E_VERSION_SET;
        } else if (version <= 0) {
            t->deferred = E_VERSION_INVALID;
        } else {
            t->version_state = VERSION_KNOWN;
            t->read_version = version;
        }
    }
    unlock();
}

EXPORT FDBFuture *fdb_transaction_get_read_version(FDBTransaction *t)
{
    lock();
    FDBFuture *f;
    if (!alive(t, "fdb_transaction_get_read_version")) {
        f = begin(NULL, F_INT64, OP_NONE, E_INVALID);
    } else {
        fdb_error_t error = t->deferred    ? t->deferred
                            : t->db->error ? t->db->error
                                           : t->reset_error;
        f = begin(t, F_INT64, OP_VERSION, error);
        if (!error)
            with_version(f, t);
    }
    unlock();
    return f;
}

/* --- reads ----------------------------------------------------------------------------- */

static bool special(const uint8_t *key, int len)
{
    return len >= 2 && key[0] == 0xff && key[1] == 0xff;
}

static bool outside_reads(const FDBTransaction *t, const uint8_t *key, int len, bool end)
{
    const char *max = t->system_read ? "\xff\xff" : "\xff";
    int c = bytes_compare(key, (size_t)len, max, strlen(max));
    return end ? c > 0 : c >= 0;
}

static bool outside_writes(const FDBTransaction *t, const uint8_t *key, int len, bool end)
{
    const char *max = t->system_write ? "\xff\xff" : "\xff";
    int c = bytes_compare(key, (size_t)len, max, strlen(max));
    return end ? c > 0 : c >= 0;
}

static bool key_too_long(const uint8_t *key, int len)
{
    return (size_t)len > (len && key[0] == 0xff ? SYSTEM_KEY_BYTES_MAX : KEY_BYTES_MAX);
}

static void special_answer(struct event *e)
{
    FDBFuture *f = e->f;
    static const char aggregate[] = "\xff\xff/metrics/health/aggregate";
    if (f->settled)
        return;
    if (bytes_compare(f->key->data, f->key->len, aggregate, sizeof aggregate - 1) != 0) {
        future_settle(f, E_NO_MODULE);
        return;
    }
    f->present = true;
    f->bytes_len = strlen(g.health);
    f->bytes = mem_alloc(f->bytes_len + 1);
    memcpy(f->bytes, g.health, f->bytes_len + 1);
    future_settle(f, 0);
}

static void roll_read(FDBFuture *f, FDBTransaction *t)
{
    f->fault = fault_of_read();
    f->delay_ns = random_delay_ns();
    g.counts.reads_low += t->read_low;
    txn_count_tags(t);
}

EXPORT FDBFuture *fdb_transaction_get(FDBTransaction *t, const uint8_t *key, int key_len,
                                      fdb_bool_t snapshot)
{
    FDBFuture *f;
    lock();
    if (!alive(t, "fdb_transaction_get")) {
        f = begin(NULL, F_VALUE, OP_NONE, E_INVALID);
        unlock();
        return f;
    }
    g.counts.gets++;
    if (special(key, key_len) && !t->deferred && !t->db->error) {
        f = begin(t, F_VALUE, OP_OTHER, t->reset_error);
        if (!t->reset_error) {
            f->key = blob_new(key, (size_t)key_len);
            struct event *e = event_new(WAY_REQUEST, special_answer, f, t);
            event_post(e, random_delay_ns());
        }
        unlock();
        return f;
    }
    fdb_error_t error = enter(t, "fdb_transaction_get");
    if (!error && outside_reads(t, key, key_len, false))
        error = E_OUTSIDE;
    if (error || key_too_long(key, key_len)) {
        f = future_new(F_VALUE, t->db);
        future_settle(f, error); /* no key is that long: not there */
        unlock();
        return f;
    }
    f = begin(t, F_VALUE, OP_GET, 0);
    f->snapshot = snapshot;
    f->key = blob_new(key, (size_t)key_len);
    bool own = !t->ryw_disabled && (!snapshot || t->snapshot_ryw > 0);
    bool exact = false;
    const struct write *e = own ? writes_find(&t->writes, key, (size_t)key_len, &exact) : NULL;
    if (e && ((exact && (e->at == W_SET || e->at == W_CLEARED || e->at == W_UNREADABLE)) ||
              (!exact && e->gap_cleared))) {
        /* What it is does not depend on the cluster. */
        if (exact && e->at == W_SET) {
            f->present = true;
            f->bytes_len = e->value->len;
            f->bytes = mem_alloc(f->bytes_len ? f->bytes_len : 1);
            memcpy(f->bytes, e->value->data, f->bytes_len);
        }
        future_settle(f, exact && e->at == W_UNREADABLE ? E_UNREADABLE : 0);
        unlock();
        return f;
    }
    f->has_view = own;
    if (e && exact && e->at == W_ATOMIC)
        writes_copy(&f->writes, &t->writes);
    roll_read(f, t);
    with_version(f, t);
    unlock();
    return f;
}

static uint64_t bytes_of_mode(int mode, int iteration, bool *valid)
{
    static const unsigned by_iteration[] = {4096,  6144,  9216,  13824, 20736,
                                            31104, 46656, 69984, 80000, 120000};
    enum { WANT_ALL = -2, ITERATOR, EXACT, SMALL, MEDIUM, LARGE, SERIAL };
    *valid = true;
    switch (mode) {
    case WANT_ALL:
    case SERIAL:
        return 80000;
    case LARGE:
        return 4096;
    case MEDIUM:
        return 1000;
    case SMALL:
        return 256;
    case EXACT:
        return UINT64_MAX;
    case ITERATOR:
        *valid = iteration > 0;
        return by_iteration[iteration < 1 ? 0 : iteration > 10 ? 9 : iteration - 1];
    default:
        *valid = false;
        return 0;
    }
}

EXPORT FDBFuture *fdb_transaction_get_range(FDBTransaction *t, const uint8_t *begin_key,
                                            int begin_len, fdb_bool_t begin_or_equal,
                                            int begin_offset, const uint8_t *end_key, int end_len,
                                            fdb_bool_t end_or_equal, int end_offset, int limit,
                                            int target_bytes, int mode, int iteration,
                                            fdb_bool_t snapshot, fdb_bool_t reverse)
{
    FDBFuture *f;
    fdb_error_t error = 0;
    bool valid;
    lock();
    if (!alive(t, "fdb_transaction_get_range")) {
        f = begin(NULL, F_RANGE, OP_NONE, E_INVALID);
        unlock();
        return f;
    }
    g.counts.ranges++;
    uint64_t mode_bytes = bytes_of_mode(mode, iteration, &valid);
    if (mode == 0 && !limit && !target_bytes)
        error = E_EXACT_UNLIMITED;
    else if (!valid)
        error = E_INVALID;
    if (!error)
        error = enter(t, "fdb_transaction_get_range");
    if (!error &&
        (outside_reads(t, begin_key, begin_len, true) || outside_reads(t, end_key, end_len, true)))
        error = E_OUTSIDE;
    if (!error && (limit < 0 || target_bytes < 0))
        error = E_LIMITS;
    if (error) {
        f = begin(NULL, F_RANGE, OP_NONE, error);
        unlock();
        return f;
    }
    f = begin(t, F_RANGE, OP_RANGE, 0);
    f->snapshot = snapshot;
    /* However much is asked for: the cluster answers with so much at a time. */
    if (mode_bytes > REPLY_BYTES_MAX && (target_bytes || mode_bytes != UINT64_MAX))
        mode_bytes = REPLY_BYTES_MAX;
    f->range = (struct range_request){
        .begin = {blob_new(begin_key, (size_t)begin_len), begin_or_equal, begin_offset},
        .end = {blob_new(end_key, (size_t)end_len), end_or_equal, end_offset},
        .rows_max = limit ? (uint64_t)limit : UINT64_MAX,
        .bytes_max = target_bytes && (uint64_t)target_bytes < mode_bytes ? (uint64_t)target_bytes
                                                                         : mode_bytes,
        .reverse = reverse,
    };
    if (begin_offset >= end_offset &&
        bytes_compare(begin_key, (size_t)begin_len, end_key, (size_t)end_len) >= 0 &&
        (begin_or_equal || !end_or_equal)) {
        future_settle(f, 0);
        unlock();
        return f;
    }
    f->has_view = !t->ryw_disabled && (!snapshot || t->snapshot_ryw > 0);
    if (f->has_view)
        writes_copy(&f->writes, &t->writes);
    roll_read(f, t);
    bool cut = one_in(g.config.range_short), cut_at_own = one_in(g.config.range_short_own);
    uint64_t rows = 1 + chance_below(8);
    f->rows_cut = cut && f->range.bytes_max != UINT64_MAX ? rows : 0;
    f->cut_at_own = cut_at_own && f->range.bytes_max != UINT64_MAX;
    with_version(f, t);
    unlock();
    return f;
}

EXPORT FDBFuture *fdb_transaction_watch(FDBTransaction *t, const uint8_t *key, int key_len)
{
    FDBFuture *f;
    lock();
    if (!alive(t, "fdb_transaction_watch")) {
        f = begin(NULL, F_VOID, OP_NONE, E_INVALID);
        unlock();
        return f;
    }
    fdb_error_t error = enter(t, "fdb_transaction_watch");
    if (!error && t->ryw_disabled)
        error = E_WATCHES_DISABLED;
    if (!error && outside_reads(t, key, key_len, false))
        error = E_OUTSIDE;
    if (!error && key_too_long(key, key_len))
        error = E_KEY_LARGE;
    f = begin(t, F_VOID, OP_WATCH, error);
    if (error) {
        unlock();
        return f;
    }
    f->key = blob_new(key, (size_t)key_len);
    bool exact = false;
    const struct write *e = writes_find(&t->writes, key, (size_t)key_len, &exact);
    if (e && ((exact && (e->at == W_SET || e->at == W_CLEARED)) || (!exact && e->gap_cleared))) {
        struct blob *value = exact && e->at == W_SET ? blob_ref(e->value) : NULL;
        if (!watch_begin(f, t, value))
            future_settle(f, E_MANY_WATCHES);
        blob_unref(value);
    } else {
        f->has_view = true;
        if (e && exact && e->at == W_ATOMIC)
            writes_copy(&f->writes, &t->writes);
        roll_read(f, t);
        with_version(f, t);
    }
    unlock();
    return f;
}

/* --- estimates ------------------------------------------------------------------------- */

static void estimate_arrives(struct event *e)
{
    FDBFuture *f = e->f;
    if (f->settled)
        return;
    int64_t chunk = e->version, bytes = 0, piece = 0;
    const struct blob *begin = f->range.begin.key, *end = f->range.end.key;
    size_t keys_cap = 0, n = 0, total = 0;
    struct blob **points = NULL;
    mem_grow(&points, &keys_cap, 2, sizeof *points);
    points[n++] = blob_new(begin->data, begin->len);
    for (const struct node *at = map_seek(begin->data, begin->len);
         at && blob_compare(map_key(at), end) < 0; at = map_next(at)) {
        const struct blob *value = map_value(at, INT64_MAX);
        if (!value)
            continue;
        if (chunk > 0 && piece >= chunk) {
            mem_grow(&points, &keys_cap, n + 2, sizeof *points);
            points[n++] = blob_new(map_key(at)->data, map_key(at)->len);
            piece = 0;
        }
        bytes += map_key(at)->len + value->len;
        piece += map_key(at)->len + value->len;
    }
    points[n++] = blob_new(end->data, end->len);
    f->number = bytes;
    if (f->kind == F_KEYS) {
        for (size_t i = 0; i < n; i++)
            total += points[i]->len;
        f->bytes = mem_alloc(total + 1);
        f->bytes_len = total;
        f->keys = mem_alloc(n * sizeof *f->keys);
        f->n = (int)n;
        uint8_t *out = f->bytes;
        for (size_t i = 0; i < n; i++) {
            f->keys[i].key = out;
            f->keys[i].key_length = (int)points[i]->len;
            memcpy(out, points[i]->data, points[i]->len);
            out += points[i]->len;
        }
    }
    for (size_t i = 0; i < n; i++)
        blob_unref(points[i]);
    free(points);
    future_settle(f, 0);
}

static FDBFuture *estimate(FDBTransaction *t, enum future_kind kind, const uint8_t *begin_key,
                           int begin_len, const uint8_t *end_key, int end_len, int64_t chunk,
                           const char *what)
{
    FDBFuture *f;
    lock();
    fdb_error_t error = 0;
    if (!alive(t, what))
        error = E_INVALID;
    else if (bytes_compare(begin_key, (size_t)begin_len, end_key, (size_t)end_len) > 0)
        error = E_INVERTED;
    else
        error = enter(t, what);
    f = begin(t, kind, OP_OTHER, error);
    if (!error) {
        f->range.begin.key = blob_new(begin_key, (size_t)begin_len);
        f->range.end.key = blob_new(end_key, (size_t)end_len);
        struct event *e = event_new(WAY_REQUEST, estimate_arrives, f, t);
        e->version = chunk;
        event_post(e, random_delay_ns());
    }
    unlock();
    return f;
}

EXPORT FDBFuture *
fdb_transaction_get_estimated_range_size_bytes(FDBTransaction *t, const uint8_t *begin_key,
                                               int begin_len, const uint8_t *end_key, int end_len)
{
    return estimate(t, F_INT64, begin_key, begin_len, end_key, end_len, 0,
                    "fdb_transaction_get_estimated_range_size_bytes");
}

EXPORT FDBFuture *fdb_transaction_get_range_split_points(FDBTransaction *t,
                                                         const uint8_t *begin_key, int begin_len,
                                                         const uint8_t *end_key, int end_len,
                                                         int64_t chunk_bytes)
{
    return estimate(t, F_KEYS, begin_key, begin_len, end_key, end_len, chunk_bytes,
                    "fdb_transaction_get_range_split_points");
}

EXPORT FDBFuture *fdb_transaction_get_approximate_size(FDBTransaction *t)
{
    FDBFuture *f;
    lock();
    fdb_error_t error = !alive(t, "fdb_transaction_get_approximate_size") ? E_INVALID
                        : t->deferred                                     ? t->deferred
                                                                          : t->db->error;
    f = begin(t, F_INT64, OP_OTHER, error);
    if (!error) {
        f->number = (int64_t)t->bytes_approx;
        future_settle(f, 0);
    }
    unlock();
    return f;
}

/* --- writes ---------------------------------------------------------------------------- */

static bool next_write_conflicts(FDBTransaction *t)
{
    bool conflicts = !t->next_write_no_conflict;
    t->next_write_no_conflict = false;
    return conflicts;
}

static void charge_key(FDBTransaction *t, size_t key_len, size_t value_len, bool conflicts)
{
    t->bytes_approx += key_len + value_len + MUTATION_BYTES;
    if (conflicts)
        t->bytes_approx += RANGE_BYTES + 2 * key_len + 1;
}

static void written(FDBTransaction *t)
{
    if (!list_empty(&t->watches))
        watches_written(t);
}

/* 0, or what such a key and value get. */
static fdb_error_t write_error(FDBTransaction *t, const uint8_t *key, int key_len, int value_len)
{
    if (outside_writes(t, key, key_len, false))
        return E_OUTSIDE;
    if (key_too_long(key, key_len)) {
        violation("a key of %d bytes", key_len);
        return E_KEY_LARGE;
    }
    if ((unsigned)value_len > VALUE_BYTES_MAX) {
        violation("a value of %d bytes", value_len);
        return E_VALUE_LARGE;
    }
    return 0;
}

EXPORT void fdb_transaction_set(FDBTransaction *t, const uint8_t *key, int key_len,
                                const uint8_t *value, int value_len)
{
    lock();
    if (enter_mute(t, "fdb_transaction_set")) {
        bool conflicts = next_write_conflicts(t);
        t->deferred = write_error(t, key, key_len, value_len);
        if (!t->deferred) {
            charge_key(t, (size_t)key_len, (size_t)value_len, conflicts);
            writes_set(&t->writes, blob_new(key, (size_t)key_len),
                       blob_new(value, (size_t)value_len), conflicts);
            written(t);
        }
    }
    unlock();
}

EXPORT void fdb_transaction_atomic_op(FDBTransaction *t, const uint8_t *key, int key_len,
                                      const uint8_t *param, int param_len, int type)
{
    static const unsigned known = 1u << M_ADD | 1u << M_AND | 1u << M_OR | 1u << M_XOR |
                                  1u << M_APPEND_IF_FITS | 1u << M_MAX | 1u << M_MIN |
                                  1u << M_VERSIONSTAMPED_KEY | 1u << M_VERSIONSTAMPED_VALUE |
                                  1u << M_BYTE_MIN | 1u << M_BYTE_MAX | 1u << M_COMPARE_AND_CLEAR;
    lock();
    if (enter_mute(t, "fdb_transaction_atomic_op")) {
        bool conflicts = next_write_conflicts(t);
        fdb_error_t error = write_error(t, key, key_len, param_len);
        if (!error && (type < 0 || type > 20 || !(known >> type & 1)))
            error = E_MUTATION;
        const uint8_t *stamp = type == M_VERSIONSTAMPED_KEY ? key : param;
        int len = type == M_VERSIONSTAMPED_KEY ? key_len : param_len;
        if (!error && (type == M_VERSIONSTAMPED_KEY || type == M_VERSIONSTAMPED_VALUE)) {
            int64_t at =
                len < 4
                    ? INT64_MAX
                    : (int64_t)((uint32_t)stamp[len - 4] | (uint32_t)stamp[len - 3] << 8 |
                                (uint32_t)stamp[len - 2] << 16 | (uint32_t)stamp[len - 1] << 24);
            if (at > len - 14)
                error = E_INVALID;
        }
        t->deferred = error;
        if (!error) {
            charge_key(t, (size_t)key_len, (size_t)param_len, conflicts);
            writes_atomic(&t->writes, (enum mutation_type)type, blob_new(key, (size_t)key_len),
                          blob_new(param, (size_t)param_len), conflicts);
            written(t);
        }
    }
    unlock();
}

/* Longer keys than any that exist are cut: the range then is the same. */
static struct blob *bound(const uint8_t *key, int len)
{
    size_t max = len && key[0] == 0xff ? SYSTEM_KEY_BYTES_MAX : KEY_BYTES_MAX;
    return blob_new(key, (size_t)len > max ? max + 1 : (size_t)len);
}

EXPORT void fdb_transaction_clear(FDBTransaction *t, const uint8_t *key, int key_len)
{
    lock();
    if (enter_mute(t, "fdb_transaction_clear")) {
        bool conflicts = next_write_conflicts(t);
        if (outside_writes(t, key, key_len, false)) {
            t->deferred = E_OUTSIDE;
        } else if (!key_too_long(key, key_len)) {
            struct blob *k = blob_new(key, (size_t)key_len);
            uint64_t bytes = 2u * k->len + 1u + RANGE_BYTES;
            t->bytes_approx += conflicts ? 2 * bytes : bytes;
            writes_clear(&t->writes, k, blob_after(k), conflicts);
            written(t);
        }
    }
    unlock();
}

EXPORT void fdb_transaction_clear_range(FDBTransaction *t, const uint8_t *begin_key, int begin_len,
                                        const uint8_t *end_key, int end_len)
{
    lock();
    if (alive(t, "fdb_transaction_clear_range") && !t->deferred && !t->db->error &&
        bytes_compare(begin_key, (size_t)begin_len, end_key, (size_t)end_len) > 0) {
        t->deferred = E_INVERTED;
    } else if (enter_mute(t, "fdb_transaction_clear_range")) {
        bool conflicts = next_write_conflicts(t);
        if (outside_writes(t, begin_key, begin_len, true) ||
            outside_writes(t, end_key, end_len, true)) {
            t->deferred = E_OUTSIDE;
        } else {
            uint64_t bytes = (uint64_t)begin_len + (uint64_t)end_len;
            t->bytes_approx += bytes + MUTATION_BYTES + (conflicts ? bytes + RANGE_BYTES : 0);
            struct blob *begin_at = bound(begin_key, begin_len), *end_at = bound(end_key, end_len);
            if (blob_compare(begin_at, end_at) < 0) {
                writes_clear(&t->writes, begin_at, end_at, conflicts);
                written(t);
            } else {
                blob_unref(begin_at);
                blob_unref(end_at);
            }
        }
    }
    unlock();
}

EXPORT fdb_error_t fdb_transaction_add_conflict_range(FDBTransaction *t, const uint8_t *begin_key,
                                                      int begin_len, const uint8_t *end_key,
                                                      int end_len, int type)
{
    enum { READ, WRITE };
    if (bytes_compare(begin_key, (size_t)begin_len, end_key, (size_t)end_len) > 0)
        return E_INVERTED;
    if (type != READ && type != WRITE)
        return E_INVALID;
    lock();
    if (enter_mute(t, "fdb_transaction_add_conflict_range")) {
        bool outside = type == READ ? outside_reads(t, begin_key, begin_len, true) ||
                                          outside_reads(t, end_key, end_len, true)
                                    : outside_writes(t, begin_key, begin_len, true) ||
                                          outside_writes(t, end_key, end_len, true);
        struct blob *begin_at = bound(begin_key, begin_len), *end_at = bound(end_key, end_len);
        if (outside) {
            t->deferred = E_OUTSIDE;
        } else if (blob_compare(begin_at, end_at) < 0) {
            t->bytes_approx += (uint64_t)begin_len + (uint64_t)end_len + RANGE_BYTES;
            if (type == WRITE)
                writes_conflict(&t->writes, blob_ref(begin_at), blob_ref(end_at));
            else
                writes_unwritten(t->ryw_disabled ? NULL : &t->writes, begin_at, end_at,
                                 &t->reads_made);
        }
        blob_unref(begin_at);
        blob_unref(end_at);
    }
    unlock();
    return 0;
}

/* --- commit and on_error --------------------------------------------------------------- */

/* All reads before the commit are over. */
static void commit_ready(FDBTransaction *t)
{
    FDBFuture *f = t->commit_waiting;
    if (t->reset_error)
        return; /* it is about to be told */
    t->commit_waiting = NULL;
    if (t->read_error) {
        future_settle(f, t->read_error);
        return;
    }
    if (writes_empty(&t->writes)) {
        g.counts.commits_empty++;
        t->committed_version = -1;
        watches_activate(t);
        future_settle(f, 0);
        return;
    }
    t->unsent = commit_new(t);
    if (t->unsent->charged_bytes > (uint64_t)t->options.size_limit) {
        violation("a transaction of %llu bytes", (unsigned long long)t->unsent->charged_bytes);
        watches_cancel(t, E_TOO_LARGE);
        future_settle(f, E_TOO_LARGE);
        return;
    }
    with_version(f, t);
}

EXPORT FDBFuture *fdb_transaction_commit(FDBTransaction *t)
{
    FDBFuture *f;
    lock();
    if (!alive(t, "fdb_transaction_commit")) {
        f = begin(NULL, F_VOID, OP_NONE, E_INVALID);
    } else {
        fdb_error_t error = enter(t, "fdb_transaction_commit");
        f = begin(t, F_VOID, OP_COMMIT, error);
        if (!error) {
            t->commit_started = true;
            t->commit_waiting = f;
            if (!t->reads)
                commit_ready(t);
        }
    }
    unlock();
    return f;
}

EXPORT fdb_error_t fdb_transaction_get_committed_version(FDBTransaction *t, int64_t *version)
{
    lock();
    fdb_error_t error = alive(t, "fdb_transaction_get_committed_version") ? 0 : E_INVALID;
    if (!error)
        *version = t->committed_version;
    unlock();
    return error;
}

static void delay_ends(struct event *e)
{
    FDBFuture *f = e->f;
    if (f->settled)
        return;
    FDBTransaction *t = e->t;
    future_ref(f);
    /* The future leaves the transaction before all others are told that it begins anew. */
    struct list *link = &f->txn_link;
    CHECK(f->txn == t);
    list_remove(link);
    forget_all(t);
    list_add_tail(&t->pending, link);
    future_settle(f, 0);
    future_unref(f);
}

EXPORT FDBFuture *fdb_transaction_on_error(FDBTransaction *t, fdb_error_t code)
{
    FDBFuture *f;
    lock();
    if (!alive(t, "fdb_transaction_on_error")) {
        f = begin(NULL, F_VOID, OP_NONE, E_INVALID);
        unlock();
        return f;
    }
    fdb_error_t error = t->reset_error;
    if (!error) {
        bool over = t->options.retry_limit >= 0 && t->retries >= t->options.retry_limit;
        t->retries++;
        if (over)
            error = code;
    }
    uint64_t delay_ns = 0;
    uint64_t delay_ns_max = (uint64_t)t->options.max_delay_ms * 1000000u;
    if (error) {
        /* Stays as it is. */
    } else if (code == E_TOO_OLD || code == E_FUTURE) {
        delay_ns = TOO_OLD_DELAY_NS < delay_ns_max ? TOO_OLD_DELAY_NS : delay_ns_max;
    } else if (code == E_CHANGED) {
        delay_ns = 0;
    } else if (code == E_CONFLICT || code == E_UNKNOWN || code == 1038 || code == 1042 ||
               code == 1078 || code == E_BEHIND || code == 1051 || code == 1213 || code == 1079 ||
               code == 1223) {
        delay_ns = chance_below(t->backoff_ns);
        t->backoff_ns = t->backoff_ns * 2 < delay_ns_max ? t->backoff_ns * 2 : delay_ns_max;
    } else {
        error = code ? code : E_INVALID;
    }
    if (error && !t->reset_error && api_version() >= 610)
        txn_fail(t, E_TXN_CANCELLED);
    f = begin(t, F_VOID, OP_ON_ERROR, error);
    if (!error) {
        g.counts.retries++;
        if (g.config.retry_delay_us_max >= 0 &&
            delay_ns > (uint64_t)g.config.retry_delay_us_max * 1000u)
            delay_ns = (uint64_t)g.config.retry_delay_us_max * 1000u;
        forget_version(t);
        event_post(event_new(WAY_LOCAL, delay_ends, f, t), delay_ns);
    }
    unlock();
    return f;
}
