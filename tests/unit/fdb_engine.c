/*
 * The FoundationDB engine against the test double of its client library: what the engine says
 * at the head of its files, and what is known to go wrong with FoundationDB, one by one and on
 * purpose. (store_contract asks what all engines promise, with faults at random.)
 *
 * The reactor runs on this thread and only where a test lets it, so that a test can bring about
 * any moment: nothing of the engine goes on while the double is being looked at.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../fdb/double.h"
#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "chance.h"
#include "server/reactor.h"
#include "store/store.h"
#include "test.h"

#define PATIENCE_MS 60000u
#define PREFIX "test"
#define WEEK_VERSIONS (7ull * 24 * 3600 * 1000000)
/* The engine's longest heads and bodies, as store->limits has them. */
#define FD_HEAD 32768u
#define FD_BODY 65536u

static const struct fdb_double *d;
static char cluster_file[] = "/tmp/fdb-engine-test-XXXXXX";
static char exe[400];

struct side {
    struct reactor *reactor;
    struct env *env;
    struct store *store;
};

static struct side a, b; /* b: a second reactor, which has no store of its own unless opened */
static struct chance chance;

static struct slice text(const char *s)
{
    return (struct slice){s, strlen(s)};
}

/* --- waiting --------------------------------------------------------------------------- */

static uint64_t clock_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void nothing(struct env_timer *timer)
{
    (void)timer;
}

/* One turn, of `ms` at most. */
static void turn(struct side *s, unsigned ms)
{
    struct env_timer timer = {.fire = nothing};
    env_timer_start(s->env, &timer, ms);
    reactor_run_once(s->env);
    env_timer_stop(s->env, &timer);
}

/* Lets the reactor run until `condition` holds. */
#define UNTIL(s, condition)                                                                        \
    for (uint64_t end_ms = clock_ms() + PATIENCE_MS; !(condition);) {                              \
        turn(s, 2);                                                                                \
        if (clock_ms() > end_ms)                                                                   \
            fail_msg("line %d: in vain: %s\n", __LINE__, #condition);                              \
    }

/* Lets only the double run until `condition` holds. */
#define MEANWHILE(condition)                                                                       \
    for (uint64_t end_ms = clock_ms() + PATIENCE_MS; !(condition);) {                              \
        usleep(50);                                                                                \
        if (clock_ms() > end_ms)                                                                   \
            fail_msg("line %d: in vain: %s\n", __LINE__, #condition);                              \
    }

/* Lets the reactor run for so long: for what must not happen, and for what counts time. */
static void pass(struct side *s, unsigned ms)
{
    for (uint64_t end = clock_ms() + ms; clock_ms() < end;)
        turn(s, 2);
}

static void faults(const char *settings)
{
    if (!d->set_many(settings))
        fail_msg("the double does not know all of %s\n", settings);
}

static uint64_t count(const char *name)
{
    int64_t n = d->count(name);
    if (n < 0)
        fail_msg("the double does not count %s\n", name);
    return (uint64_t)n;
}

/* Lets all that is on its way come, tickets and renewals too: what is sent next is sent at once. */
static void rest(struct side *s)
{
    assert_true(d->settle(5000));
    turn(s, 1);
}

/* --- keys as they are in the cluster ----------------------------------------------------- */

struct raw {
    uint8_t bytes[700];
    size_t len;
};

static struct raw raw_of(const char *prefix, const void *key, size_t len)
{
    struct raw r;
    size_t n = strlen(prefix);
    r.bytes[0] = 2;
    memcpy(r.bytes + 1, prefix, n);
    r.bytes[n + 1] = 0;
    memcpy(r.bytes + n + 2, key, len);
    r.len = n + 2 + len;
    return r;
}

/* As another client would: a head without a body. */
static void put(const char *key, const char *head)
{
    struct raw k = raw_of(PREFIX, key, strlen(key));
    uint8_t value[200] = {(uint8_t)strlen(head)};
    memcpy(value + 2, head, strlen(head));
    assert_true(d->put(k.bytes, k.len, value, 2 + strlen(head)));
}

/* What the cluster holds for `key`; "-": nothing. */
static const char *held(const char *key)
{
    static char out[200];
    struct raw k = raw_of(PREFIX, key, strlen(key));
    void *value;
    size_t len;
    if (!d->get(k.bytes, k.len, &value, &len))
        return "-";
    assert_true(len >= 2 && len < sizeof out);
    memcpy(out, (char *)value + 2, len - 2);
    out[len - 2] = 0;
    free(value);
    return out;
}

static void see_one(void *arg, const void *key, size_t key_len, const void *value, size_t len)
{
    (void)key, (void)key_len, (void)value, (void)len;
    ++*(unsigned *)arg;
}

static unsigned keys_under(const char *prefix, const void *begin, size_t len)
{
    unsigned n = 0;
    struct raw from = raw_of(prefix, begin, len), to = from;
    to.bytes[to.len++] = 0xff;
    d->each(from.bytes, from.len, to.bytes, to.len, see_one, &n);
    return n;
}

/* --- requests ---------------------------------------------------------------------------- */

struct one_commit {
    struct store_commit commit;
    struct store_check check;
    struct store_mutation mutation;
    unsigned done;
    enum status st;
};

static void commit_done(struct store_commit *commit, enum status st)
{
    struct one_commit *c = container_of(commit, struct one_commit, commit);
    c->done++;
    c->st = st;
}

static void commit_send(struct side *s, struct one_commit *c)
{
    c->commit.done = commit_done;
    c->done = 0;
    store_commit(s->store, s->env, &c->commit);
    assert_int_equal(c->done, 0);
}

/* key = head if `check` has the head `is` (NULL: if it is absent; check NULL: anyway). */
static void set_start(struct side *s, struct one_commit *c, const char *key, const char *head,
                      const char *check, const char *is)
{
    *c = (struct one_commit){.mutation = {.kind = STORE_SET, .key = text(key), .head = text(head)}};
    c->commit.mutations = &c->mutation;
    c->commit.n_mutations = 1;
    if (check) {
        c->check = (struct store_check){is ? STORE_CHECK_VALUE : STORE_CHECK_ABSENT, text(check),
                                        text(is ? is : "")};
        c->commit.checks = &c->check;
        c->commit.n_checks = 1;
    }
    commit_send(s, c);
}

static enum status answer(struct side *s, struct one_commit *c)
{
    UNTIL(s, c->done);
    assert_int_equal(c->done, 1);
    return c->st;
}

static enum status set_if(struct side *s, const char *key, const char *head, const char *check,
                          const char *is)
{
    struct one_commit c;
    set_start(s, &c, key, head, check, is);
    return answer(s, &c);
}

static enum status set(struct side *s, const char *key, const char *head)
{
    return set_if(s, key, head, NULL, NULL);
}

struct one_read {
    struct store_read read;
    struct store_get get;
    bool done;
    enum status st;
};

static void read_done(struct store_read *read, enum status st)
{
    struct one_read *r = container_of(read, struct one_read, read);
    CHECK(!r->done);
    r->done = true;
    r->st = st;
}

static void read_start(struct side *s, struct one_read *r, const char *key, bool own)
{
    *r = (struct one_read){.get = {.key = text(key)}};
    r->read = (struct store_read){.gets = &r->get, .n_gets = 1, .own = own, .done = read_done};
    store_read(s->store, s->env, &r->read);
    assert_false(r->done);
}

static const char *read_answer(struct side *s, struct one_read *r)
{
    static char out[200];
    UNTIL(s, r->done);
    assert_int_equal(r->st, ST_OK);
    if (r->get.st == ST_NOTFOUND) {
        strcpy(out, "-");
    } else {
        assert_int_equal(r->get.st, ST_OK);
        assert_true(r->get.head.len < sizeof out);
        memcpy(out, r->get.head.data, r->get.head.len);
        out[r->get.head.len] = 0;
    }
    store_read_release(&r->read);
    return out;
}

static const char *plain(struct side *s, const char *key)
{
    struct one_read r;
    read_start(s, &r, key, false);
    return read_answer(s, &r);
}

static const char *own(struct side *s, const char *key)
{
    struct one_read r;
    read_start(s, &r, key, true);
    return read_answer(s, &r);
}

static enum status read_all(struct side *s, struct one_read *r)
{
    r->read.done = read_done;
    r->done = false;
    store_read(s->store, s->env, &r->read);
    UNTIL(s, r->done);
    return r->st;
}

/* --- setting up -------------------------------------------------------------------------- */

static struct store *open_store(const char *prefix, const struct store_options *options)
{
    struct err e;
    struct store *store;
    char uri[200];
    snprintf(uri, sizeof uri, "fdb:%s?prefix=%s", cluster_file, prefix);
    if (store_open(uri, options, &store, &e) != ST_OK)
        fail_msg("%s: %s\n", uri, e.text);
    return store;
}

static void reopen(const struct store_options *options)
{
    if (a.store)
        store_close(a.store);
    a.store = open_store(PREFIX, options);
}

static int begin(void **state)
{
    struct err e;
    (void)state;
    d->reset();
    assert_int_equal(reactor_new(&a.reactor, &e), ST_OK);
    assert_int_equal(reactor_new(&b.reactor, &e), ST_OK);
    a.env = reactor_env(a.reactor);
    b.env = reactor_env(b.reactor);
    a.store = b.store = NULL;
    reopen(&(struct store_options){0});
    /* What opening took is not what tests count. */
    return 0;
}

/* Whatever happened: nothing is left over, and nothing was done that must not be. */
static int end(void **state)
{
    (void)state;
    if (b.store)
        store_close(b.store);
    if (a.store)
        store_close(a.store);
    a.store = b.store = NULL;
    reactor_free(b.reactor);
    reactor_free(a.reactor);
    struct fdb_double_counts c;
    put("last", ""); /* the double lets go of cancelled watches when something changes */
    if (!d->settle(10000))
        fail_msg("the double does not come to rest\n");
    d->counts(&c);
    if (c.violations)
        fail_msg("libfdb_c is not used as it must be: %s\n", d->violation());
    assert_int_equal(c.futures_alive, 0);
    assert_int_equal(c.transactions_alive, 0);
    assert_int_equal(c.databases_alive, 0);
    assert_int_equal(c.watches_alive, 0);
    /* Options that would take away what the engine relies on. */
    assert_int_equal(c.causal_write_risky, 0);
    assert_int_equal(c.timeouts_set, 0);
    assert_int_equal(c.retry_limits_set, 0);
    assert_int_equal(c.retry_delays_set, 0);
    assert_int_equal(c.grvs_immediate, 0);
    return 0;
}

/* --- unknown outcomes --------------------------------------------------------------------- */

/* It happened, and another client wrote over it before it was known here: that must stay. */
static void happened_is_found_out(void **state)
{
    (void)state;
    static const char *const kinds[] = {"unknown_happened", "changed_happened"};
    for (unsigned i = 0; i < 2; i++) {
        struct one_commit c;
        char key[16];
        snprintf(key, sizeof key, "k%u", i);
        uint64_t happened = count("commits_happened");
        d->set(kinds[i], 1);
        set_start(&a, &c, key, "ours", key, NULL);
        UNTIL(&a, count(kinds[i]) == 1);
        d->set(kinds[i], 0);
        assert_string_equal(held(key), "ours");
        put(key, "theirs");
        assert_int_equal(answer(&a, &c), ST_OK);
        assert_string_equal(held(key), "theirs");
        assert_int_equal(count("commits_happened"), happened + 2);
        assert_string_equal(own(&a, key), "theirs");
        pass(&a, 20);
        assert_int_equal(c.done, 1);
    }
}

static void lost_is_done_again(void **state)
{
    (void)state;
    static const char *const kinds[] = {"unknown_lost", "changed_lost"};
    for (unsigned i = 0; i < 2; i++) {
        struct one_commit c;
        char key[16];
        snprintf(key, sizeof key, "k%u", i);
        d->set(kinds[i], 1);
        set_start(&a, &c, key, "ours", key, NULL);
        UNTIL(&a, count(kinds[i]) == 1);
        d->set(kinds[i], 0);
        assert_string_equal(held(key), "-");
        assert_int_equal(answer(&a, &c), ST_OK);
        assert_string_equal(held(key), "ours");
        /* Had another one come first, it would be told. */
        snprintf(key, sizeof key, "l%u", i);
        d->set(kinds[i], 1);
        set_start(&a, &c, key, "ours", key, NULL);
        UNTIL(&a, count(kinds[i]) == 2);
        d->set(kinds[i], 0);
        put(key, "theirs");
        assert_int_equal(answer(&a, &c), ST_CONFLICT);
        assert_string_equal(held(key), "theirs");
    }
}

/* One after the other, and while one is being settled. */
static void several_unknown_in_a_row(void **state)
{
    (void)state;
    struct one_commit c;
    faults("unknown_lost=1,retry_delay_us_max=100");
    set_start(&a, &c, "k", "v", "k", NULL);
    UNTIL(&a, count("unknown_lost") >= 12);
    assert_int_equal(c.done, 0);
    faults("unknown_lost=0,unknown_happened=1");
    /* Settling happens without its being known, then the commit itself. */
    assert_int_equal(answer(&a, &c), ST_OK);
    assert_true(count("unknown_happened") >= 2);
    assert_string_equal(held("k"), "v");
    set_start(&a, &c, "k", "w", "k", "v");
    assert_int_equal(answer(&a, &c), ST_OK);
    assert_string_equal(held("k"), "w");
}

/* Given up on the way, it may land as long as it is not overtaken, and never afterwards. */
static void late_commits_do_not_overtake(void **state)
{
    (void)state;
    static const char *const kinds[] = {"timeout_late", "cancelled_late"};
    unsigned overtaken = 0, landed = 0;
    for (unsigned i = 0; i < 60; i++) {
        const char *kind = kinds[i % 2];
        struct one_commit c;
        uint64_t before = count(kind);
        d->set("late_ms_max", i < 30 ? 3 : 60);
        d->set(kind, 1);
        set_start(&a, &c, "k", "early", NULL, NULL);
        UNTIL(&a, count(kind) == before + 1);
        d->set(kind, 0);
        assert_int_equal(answer(&a, &c), ST_OK);
        assert_string_equal(held("k"), "early");
        assert_int_equal(set(&a, "k", "newer"), ST_OK);
        overtaken += count("late_alive") > 0;
        landed += count("late_alive") == 0;
        assert_true(d->settle(5000));
        assert_string_equal(held("k"), "newer");
    }
    print_message("# %u overtaken, %u not\n", overtaken, landed);
    assert_true(overtaken > 5);
    assert_true(count("late_refused") > 5);
}

/* One that lands while it is being asked about was a success, not a conflict with itself. */
static void late_commits_are_told_truthfully(void **state)
{
    (void)state;
    unsigned landed = 0;
    faults("retry_delay_us_max=100,delay_us_max=300,late_ms_max=2");
    for (unsigned i = 0; i < 150; i++) {
        char key[16];
        struct one_commit c;
        uint64_t before = count("cancelled_late");
        snprintf(key, sizeof key, "k%u", i);
        faults("cancelled_late=1");
        set_start(&a, &c, key, "v", key, NULL);
        UNTIL(&a, count("cancelled_late") > before);
        faults("cancelled_late=0");
        uint64_t was = count("late_landed");
        assert_int_equal(answer(&a, &c), ST_OK);
        assert_string_equal(held(key), "v");
        landed += count("late_landed") > was;
    }
    print_message("# %u landed by themselves\n", landed);
    assert_true(landed > 5 && landed < 150);
}

/* The settling itself given up on its way: it lands late or not at all, and the truth is told. */
static void settling_lands_late(void **state)
{
    (void)state;
    struct one_commit c;
    char was[16] = "0", is[16];
    chance = chance_begin("fdb_engine");
    d->set("seed", (int64_t)(chance_u64(&chance) >> 1));
    assert_int_equal(set(&a, "n", "0"), ST_OK);
    faults(
        "retry_delay_us_max=200,delay_us_max=100,late_ms_max=3,unknown_happened=8,"
        "unknown_lost=8,changed_happened=16,changed_lost=16,timeout_late=16,cancelled_late=16,"
        "conflict=16,read_behind=20,read_too_old=30,read_future=30,grv_delayed=20,grv_delay_ms=2");
    /* A counter, each step of which needs the one before: none twice, none missed. */
    for (unsigned i = 1; i <= 400; i++) {
        snprintf(is, sizeof is, "%u", i);
        set_start(&a, &c, "n", is, "n", was);
        assert_int_equal(answer(&a, &c), ST_OK);
        assert_string_equal(held("n"), is);
        if (i % 4 == 0)
            assert_string_equal(own(&a, "n"), is);
        if (i % 7 == 0)
            assert_string_equal(plain(&a, "n"), is);
        strcpy(was, is);
    }
    assert_true(count("late_landed") > 5 && count("late_refused") > 5);
    faults("unknown_happened=0,unknown_lost=0,changed_happened=0,changed_lost=0,timeout_late=0,"
           "cancelled_late=0,conflict=0,read_behind=0,read_too_old=0,read_future=0");
    assert_true(d->settle(5000));
    assert_string_equal(held("n"), "400");
}

/* What an owner sent before it lost its volume and lands afterwards. */
static void fenced_commits_never_land(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        struct one_commit c;
        faults("late_ms_max=20");
        assert_int_equal(set(&a, "owner", "A"), ST_OK);
        assert_int_equal(set_if(&a, "data", "mine", "owner", "A"), ST_OK);
        /* The known way, or the long one. */
        if (i) {
            put("owner", "A");
        }
        rest(&a);
        uint64_t refused = count("late_refused");
        d->set("timeout_late", 1);
        set_start(&a, &c, "data", "late", "owner", "A");
        if (i) {
            /* (The refusal of the known way comes first.) */
            UNTIL(&a, count("timeout_late") > i);
        } else {
            MEANWHILE(count("timeout_late") == 1);
        }
        d->set("timeout_late", 0);
        put("owner", "B");
        assert_true(d->settle(5000));
        assert_int_equal(c.done, 0);
        assert_string_equal(held("data"), "mine");
        assert_true(count("late_refused") > refused);
        assert_int_equal(answer(&a, &c), ST_CONFLICT);
        assert_string_equal(held("data"), "mine");
    }
}

/* --- an owner's commits --------------------------------------------------------------------- */

static void owner(void)
{
    assert_int_equal(set(&a, "owner", "A"), ST_OK);
    assert_int_equal(set_if(&a, "data", "0", "owner", "A"), ST_OK);
    rest(&a);
}

static void owners_commits_need_one_read_version(void **state)
{
    (void)state;
    owner();
    struct fdb_double_counts before, after;
    d->counts(&before);
    for (unsigned i = 0; i < 20; i++) {
        char is[16];
        snprintf(is, sizeof is, "%u", i);
        assert_int_equal(set_if(&a, "data", is, "owner", "A"), ST_OK);
        assert_string_equal(held("data"), is);
    }
    d->counts(&after);
    assert_int_equal(after.gets, before.gets);
    assert_int_equal(after.ranges, before.ranges);
    assert_int_equal(after.grvs, before.grvs + 20);
    assert_int_equal(after.commits_tried, before.commits_tried + 20);
    /* After a while of silence what was known is too old: the long way again, and back. */
    pass(&a, 2100);
    assert_int_equal(set_if(&a, "data", "late", "owner", "A"), ST_OK);
    assert_int_equal(count("gets"), before.gets + 1);
    assert_int_equal(set_if(&a, "data", "later", "owner", "A"), ST_OK);
    assert_int_equal(count("gets"), before.gets + 1);
}

static void a_new_owner_is_noticed(void **state)
{
    (void)state;
    owner();
    uint64_t gets = count("gets"), refused = count("commits_refused");
    /* Touched, but the same: looked at again. */
    put("owner", "A");
    assert_int_equal(set_if(&a, "data", "1", "owner", "A"), ST_OK);
    assert_int_equal(count("commits_refused"), refused + 1);
    assert_int_equal(count("gets"), gets + 1);
    assert_string_equal(held("data"), "1");
    put("owner", "B");
    assert_int_equal(set_if(&a, "data", "2", "owner", "A"), ST_CONFLICT);
    assert_int_equal(set_if(&a, "data", "3", "owner", "A"), ST_CONFLICT);
    assert_string_equal(held("data"), "1");
    /* There and back again. */
    put("owner", "A");
    assert_int_equal(set_if(&a, "data", "4", "owner", "A"), ST_OK);
    struct raw k = raw_of(PREFIX, "own", 3), end_of = raw_of(PREFIX, "ownes", 5);
    d->clear(k.bytes, k.len, end_of.bytes, end_of.len);
    assert_int_equal(set_if(&a, "data", "5", "owner", "A"), ST_CONFLICT);
    assert_string_equal(held("data"), "4");
    /* Another check is not taken for the known one: another value, a prefix, another key. */
    put("owner", "A");
    assert_int_equal(set_if(&a, "data", "6", "owner", "A"), ST_OK);
    assert_int_equal(set_if(&a, "data", "7", "owner", "AA"), ST_CONFLICT);
    assert_int_equal(set_if(&a, "data", "7", "ownerA", ""), ST_CONFLICT);
    assert_int_equal(set_if(&a, "data", "7", "owner", ""), ST_CONFLICT);
    assert_int_equal(set_if(&a, "data", "7", "owner", NULL), ST_CONFLICT);
    assert_string_equal(held("data"), "6");
}

/* What comes behind a commit in the same batch has its version: one that would read at that
 * version next would be told of no conflict. */
static void a_new_owner_in_the_same_batch_is_noticed(void **state)
{
    (void)state;
    uint64_t shared = 0;
    for (unsigned i = 0; shared < 3; i++) {
        assert_true(i < 50);
        faults("batch_us=0");
        owner();
        uint64_t happened = count("commits_happened"), batched = count("batched");
        struct one_commit c;
        faults("batch_us=100000");
        set_start(&a, &c, "data", "1", "owner", "A");
        MEANWHILE(count("commits_happened") > happened);
        put("owner", "B");
        shared += count("batched") - batched;
        assert_int_equal(answer(&a, &c), ST_OK);
        assert_int_equal(set_if(&a, "data", "2", "owner", "A"), ST_CONFLICT);
        assert_string_equal(held("data"), "1");
    }
}

/* What a commit does to the key that it checks, it knows. */
static void own_changes_of_the_checked_key(void **state)
{
    (void)state;
    struct store_mutation ways[] = {
        {.kind = STORE_SET, .key = text("owner"), .head = text("B")},
        {.kind = STORE_CLEAR, .key = text("owner")},
        {.kind = STORE_CLEAR_RANGE, .key = text("owner"), .head = text("owner0")},
        {.kind = STORE_CLEAR_RANGE, .key = text("o"), .head = text("p")},
    };
    for (unsigned i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        owner();
        struct one_commit c = {.check = {STORE_CHECK_VALUE, text("owner"), text("A")}};
        c.commit = (struct store_commit){
            .checks = &c.check, .n_checks = 1, .mutations = &ways[i], .n_mutations = 1};
        commit_send(&a, &c);
        assert_int_equal(answer(&a, &c), ST_OK);
        assert_int_equal(set_if(&a, "data", "x", "owner", "A"), ST_CONFLICT);
        assert_string_equal(held("data"), "0");
    }
    /* A range up to it leaves it alone. */
    owner();
    struct store_mutation beside = {
        .kind = STORE_CLEAR_RANGE, .key = text("o"), .head = text("owner")};
    struct one_commit c = {.check = {STORE_CHECK_VALUE, text("owner"), text("A")}};
    c.commit = (struct store_commit){
        .checks = &c.check, .n_checks = 1, .mutations = &beside, .n_mutations = 1};
    commit_send(&a, &c);
    assert_int_equal(answer(&a, &c), ST_OK);
    uint64_t gets = count("gets");
    assert_int_equal(set_if(&a, "data", "x", "owner", "A"), ST_OK);
    assert_int_equal(count("gets"), gets);
}

static void known_versions_that_are_too_old(void **state)
{
    (void)state;
    owner();
    uint64_t refused = count("commits_refused");
    d->forget_versions();
    assert_int_equal(set_if(&a, "data", "1", "owner", "A"), ST_OK);
    assert_int_equal(count("commits_refused"), refused + 1);
    assert_string_equal(held("data"), "1");
    d->forget_versions();
    uint64_t gets = count("gets");
    assert_string_equal(own(&a, "data"), "1");
    /* Not tried again with the version that was refused. */
    assert_int_equal(count("gets"), gets + 2);
}

/* A cluster throttles by answering read versions late. */
static void read_versions_throttle_commits(void **state)
{
    (void)state;
    owner();
    faults("grv_ms=100");
    uint64_t start = clock_ms();
    for (unsigned i = 0; i < 6; i++)
        assert_int_equal(set_if(&a, "data", "1", "owner", "A"), ST_OK);
    /* The first has what was asked for before. */
    assert_true(clock_ms() - start >= 500);
    assert_true(clock_ms() - start < 5000);
    /* So late that what was known is too old when it comes: the long way. */
    faults("grv_ms=2300");
    assert_int_equal(set_if(&a, "data", "2", "owner", "A"), ST_OK);
    assert_int_equal(set_if(&a, "data", "3", "owner", "A"), ST_OK);
    struct one_commit c;
    set_start(&a, &c, "data", "4", "owner", "A");
    pass(&a, 50);
    faults("grv_ms=0");
    uint64_t gets = count("gets");
    assert_int_equal(answer(&a, &c), ST_OK);
    assert_int_equal(count("gets"), gets + 1);
    assert_string_equal(held("data"), "4");
}

static void set_background(struct side *s, struct one_commit *c, const char *head)
{
    *c = (struct one_commit){
        .check = {STORE_CHECK_VALUE, text("owner"), text("A")},
        .mutation = {.kind = STORE_SET, .key = text("data"), .head = text(head)},
    };
    c->commit = (struct store_commit){.checks = &c->check,
                                      .n_checks = 1,
                                      .mutations = &c->mutation,
                                      .n_mutations = 1,
                                      .background = true};
    commit_send(s, c);
}

/* A volume's clean-up is held back; its owner's writes, which check the same key, are not. */
static void held_back_background_holds_nothing_else(void **state)
{
    (void)state;
    struct one_commit c, first, second;
    owner();
    faults("batch_stopped=1");
    set_background(&a, &c, "0"); /* with the read version that is there */
    assert_int_equal(answer(&a, &c), ST_OK);
    assert_int_equal(set_if(&a, "data", "1", "owner", "A"), ST_OK);
    uint64_t tried = count("commits_tried");
    /* One of these may have what the write before it left. */
    set_background(&a, &first, "2");
    set_background(&a, &second, "2");
    pass(&a, 100);
    assert_true(first.done + second.done <= 1);
    assert_int_equal(count("commits_tried"), tried + first.done + second.done);
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(set_if(&a, "data", "3", "owner", "A"), ST_OK);
    assert_true(first.done + second.done <= 1);
    faults("batch_stopped=0");
    assert_int_equal(answer(&a, &first), ST_OK);
    assert_int_equal(answer(&a, &second), ST_OK);
    assert_string_equal(held("data"), "2");
}

/* However they are mixed, blind commits take what lanes nobody needs, and no new ones. */
static void lanes_are_used_again(void **state)
{
    (void)state;
    owner();
    for (unsigned i = 0; i < 50; i++) {
        assert_int_equal(set_if(&a, "data", "1", "owner", "A"), ST_OK);
        assert_int_equal(set(&a, "other", "1"), ST_OK);
        assert_int_equal(set(&a, "another", "1"), ST_OK);
    }
    for (unsigned i = 0; i < 50; i++)
        assert_int_equal(set(&a, "other", "1"), ST_OK);
    unsigned lanes = keys_under(PREFIX, "\x02x\x00", 3);
    print_message("# %u lanes\n", lanes);
    assert_true(lanes >= 1 && lanes <= 4);
    /* As many as are under way at once, and they go with the store. */
    static struct one_commit many[300];
    for (unsigned i = 0; i < 300; i++)
        set_start(&a, &many[i], "k", "v", NULL, NULL);
    for (unsigned i = 0; i < 300; i++)
        assert_int_equal(answer(&a, &many[i]), ST_OK);
    lanes = keys_under(PREFIX, "\x02x\x00", 3);
    assert_true(lanes > 100 && lanes <= 2 * 128);
    reopen(&(struct store_options){0});
    assert_int_equal(keys_under(PREFIX, "\x02x\x00", 3), 0);
}

/* --- reads ---------------------------------------------------------------------------------- */

static void own_reads_see_own_commits(void **state)
{
    (void)state;
    owner();
    uint64_t grvs = count("grvs");
    for (unsigned i = 0; i < 50; i++) {
        char is[16];
        snprintf(is, sizeof is, "%u", i);
        assert_int_equal(set_if(&a, "data", is, "owner", "A"), ST_OK);
        assert_string_equal(own(&a, "data"), is);
    }
    /* None of them asked for a version, unless time went by. */
    assert_true(count("grvs") <= grvs + 50 + 5);
    /* A version is renewed while it is good still: the read does not wait for that. */
    pass(&a, 100);
    assert_true(d->settle(1000));
    grvs = count("grvs");
    faults("grv_ms=3000");
    uint64_t start = clock_ms();
    assert_string_equal(own(&a, "data"), "49");
    assert_true(clock_ms() - start < 1500);
    assert_int_equal(count("grvs"), grvs + 1);
    faults("grv_ms=0");
    /* One that is too old is not used. */
    pass(&a, 3200);
    put("data", "theirs");
    pass(&a, 2200);
    assert_string_equal(own(&a, "data"), "theirs");
}

/* A read version on its way when the change was made is not good for reads begun after it. */
static void plain_reads_are_fresh(void **state)
{
    (void)state;
    chance = chance_begin("fdb_engine");
    faults("delay_us_max=3000");
    for (unsigned i = 0; i < 150; i++) {
        struct one_read before, after;
        char is[16];
        snprintf(is, sizeof is, "%u", i);
        read_start(&a, &before, "k", i % 2);
        uint64_t until_us = chance_below(&chance, 6000);
        for (uint64_t us = 0; us < until_us; us += 1000)
            usleep(500);
        put("k", is);
        read_start(&a, &after, "k", false);
        assert_string_equal(read_answer(&a, &after), is);
        read_answer(&a, &before);
    }
}

/* Its version is not known here, only that it is there. */
static void own_reads_see_settled_commits(void **state)
{
    (void)state;
    struct one_commit c;
    owner();
    for (unsigned i = 0; i < 20; i++) {
        char is[16];
        snprintf(is, sizeof is, "settled %u", i);
        assert_int_equal(set_if(&a, "data", "before", "owner", "A"), ST_OK);
        assert_string_equal(own(&a, "data"), "before");
        rest(&a);
        uint64_t n = count("unknown_happened");
        faults("unknown_happened=1");
        set_start(&a, &c, "data", is, "owner", "A");
        MEANWHILE(count("unknown_happened") == n + 1);
        faults("unknown_happened=0");
        assert_int_equal(answer(&a, &c), ST_OK);
        assert_string_equal(own(&a, "data"), is);
    }
}

/* The answer to an older commit, of a lower version, comes after the other was settled. */
static void own_reads_see_settled_commits_among_others(void **state)
{
    (void)state;
    unsigned met = 0;
    for (unsigned i = 0; i < 200 && met < 3; i++) {
        struct one_commit slow, settled;
        owner();
        d->set("seed", i + 1);
        faults("delay_us_max=100000");
        uint64_t happened = count("commits_happened"), unknown = count("unknown_happened");
        set_start(&a, &slow, "slow", "there", "owner", "A");
        MEANWHILE(count("commits_happened") == happened + 1);
        faults("delay_us_max=0,unknown_happened=1");
        set_start(&a, &settled, "settled", "there", NULL, NULL);
        UNTIL(&a, count("unknown_happened") == unknown + 1);
        faults("unknown_happened=0");
        assert_int_equal(answer(&a, &settled), ST_OK);
        met += slow.done == 0;
        assert_int_equal(answer(&a, &slow), ST_OK);
        assert_string_equal(own(&a, "settled"), "there");
        assert_string_equal(own(&a, "slow"), "there");
        struct raw from = raw_of(PREFIX, "s", 1), to = raw_of(PREFIX, "t", 1);
        d->clear(from.bytes, from.len, to.bytes, to.len);
        reopen(&(struct store_options){0});
    }
    assert_int_equal(met, 3);
}

static void key_number(char key[8], unsigned i)
{
    memcpy(key, "block", 5);
    put_be16((uint8_t *)key + 5, (uint16_t)i);
    key[7] = 0;
}

/* Runs of keys that follow each other, as ranges, against what is known to be there. */
static void runs_are_as_single_gets(void **state)
{
    (void)state;
    enum { KEYS = 400, BODY = 1000, GETS = 120 };
    static bool there[KEYS];
    static uint8_t bodies[GETS][BODY + 10];
    char keys[GETS][8], key[8];
    chance = chance_begin("fdb_engine");
    for (unsigned i = 0; i < KEYS; i++) {
        /* Keys that a range meets and nobody asks for: longer ones, and shorter ones. */
        uint8_t value[2 + 3 + BODY] = {3};
        key_number(key, i);
        there[i] = chance_below(&chance, 4) > 0;
        memcpy(value + 2, "h", 1);
        put_be16(value + 3, (uint16_t)i);
        memset(value + 5, (int)i, BODY);
        size_t len = 5 + i % BODY;
        struct raw k = raw_of(PREFIX, key, 7);
        if (there[i])
            assert_true(d->put(k.bytes, k.len, value, len));
        k.bytes[k.len++] = (uint8_t)chance_below(&chance, 256);
        if (chance_below(&chance, 2))
            assert_true(d->put(k.bytes, k.len, value, len));
        k = raw_of(PREFIX, key, 6);
        assert_true(d->put(k.bytes, k.len, value, len));
    }
    uint64_t ranges = count("ranges"), gets_before = count("gets");
    unsigned asked = 0;
    for (unsigned round = 0; round < 300; round++) {
        struct store_get gets[GETS] = {0};
        unsigned n = 1 + (unsigned)chance_below(&chance, GETS), at = 0;
        unsigned number[GETS];
        d->set("range_short", round % 3 == 2 ? 2 : 0);
        for (unsigned i = 0; i < n; i++) {
            at = chance_below(&chance, 8) ? at + 1 : (unsigned)chance_below(&chance, KEYS);
            at %= KEYS;
            number[i] = at;
            key_number(keys[i], at);
            gets[i] = (struct store_get){.key = {keys[i], 7}, .body = bodies[i], .body_cap = BODY};
            if (chance_below(&chance, 20) == 0)
                gets[i].body = NULL;
            if (chance_below(&chance, 20) == 0)
                gets[i].body_cap = 3;
        }
        asked += n;
        struct one_read r = {.read = {.gets = gets, .n_gets = n, .own = round % 2}};
        assert_int_equal(read_all(&a, &r), ST_OK);
        for (unsigned i = 0; i < n; i++) {
            unsigned k = number[i], len = k % BODY;
            if (!there[k]) {
                assert_int_equal(gets[i].st, ST_NOTFOUND);
                continue;
            }
            assert_int_equal(gets[i].st, gets[i].body && len > gets[i].body_cap ? ST_IO : ST_OK);
            assert_int_equal(gets[i].head.len, 3);
            assert_int_equal(get_be16((const uint8_t *)gets[i].head.data + 1), k);
            assert_int_equal(gets[i].body_len, len);
            for (unsigned x = 0; gets[i].body && gets[i].st == ST_OK && x < len; x++)
                assert_int_equal(bodies[i][x], k & 0xff);
        }
        store_read_release(&r.read);
    }
    assert_true(count("range_short") > 0);
    print_message("# %u gets: %llu single, %llu ranges\n", asked,
                  (unsigned long long)(count("gets") - gets_before),
                  (unsigned long long)(count("ranges") - ranges));
    assert_true(count("ranges") - ranges > 300);
    /* A long one: a range of 64 costs the cluster one question, not 64. */
    struct store_get gets[100] = {0};
    d->set("range_short", 0);
    for (unsigned i = 0; i < 100; i++) {
        key_number(keys[i], i + 200);
        gets[i] = (struct store_get){.key = {keys[i], 7}, .body = bodies[i], .body_cap = 600};
    }
    ranges = count("ranges"), gets_before = count("gets");
    struct one_read r = {.read = {.gets = gets, .n_gets = 100}};
    assert_int_equal(read_all(&a, &r), ST_OK);
    store_read_release(&r.read);
    assert_int_equal(count("ranges"), ranges + 2);
    assert_int_equal(count("gets"), gets_before);
}

/* Across replies of 80 kB, and replies that are shorter than asked for. */
static void ranges_come_in_pieces(void **state)
{
    (void)state;
    enum { KEYS = 3000 };
    char key[32], head[160];
    memset(head, 'h', sizeof head);
    for (unsigned i = 0; i < KEYS; i++) {
        snprintf(key, sizeof key, "k%05u", i * 2);
        snprintf(head, sizeof head, "%0120u", i);
        put(key, head);
    }
    static const unsigned limits[] = {1, 2, 499, 500, 501, KEYS - 1, KEYS, KEYS + 1, 65536};
    for (unsigned i = 0; i < 2 * 2 * 9; i++) {
        bool reverse = i % 2;
        unsigned limit = limits[i / 4], from = i % 5 * 100, to = KEYS - i % 3 * 7;
        char from_key[32], to_key[32];
        d->set("range_short", i / 2 % 2 ? 3 : 0);
        d->set("read_behind", i / 2 % 2 ? 40 : 0);
        d->set("retry_delay_us_max", 100);
        /* Bounds on keys that are there and between them. */
        snprintf(from_key, sizeof from_key, "k%05u", from ? from * 2 - i % 2 : 0);
        snprintf(to_key, sizeof to_key, "k%05u", to * 2 - i % 2);
        struct store_range range = {
            .begin = text(from_key), .end = text(to_key), .limit = limit, .reverse = reverse};
        struct one_read r = {.read = {.ranges = &range, .n_ranges = 1}};
        assert_int_equal(read_all(&a, &r), ST_OK);
        unsigned all = to - from, n = limit < all ? limit : all;
        assert_int_equal(range.n_pairs, n);
        assert_int_equal(range.more, all > limit);
        for (unsigned p = 0; p < n; p++) {
            unsigned at = reverse ? to - 1 - p : from + p;
            snprintf(key, sizeof key, "k%05u", at * 2);
            snprintf(head, sizeof head, "%0120u", at);
            assert_int_equal(range.pairs[p].key.len, 6);
            assert_memory_equal(range.pairs[p].key.data, key, 6);
            assert_int_equal(range.pairs[p].head.len, 120);
            assert_memory_equal(range.pairs[p].head.data, head, 120);
            assert_int_equal(range.pairs[p].body_len, 0);
        }
        store_read_release(&r.read);
    }
    d->set("read_behind", 0);
}

static void errors_of_reads_are_not_told(void **state)
{
    (void)state;
    static const char *const kinds[] = {"read_too_old", "read_future", "read_behind"};
    assert_int_equal(set(&a, "k", "v"), ST_OK);
    faults("retry_delay_us_max=100");
    for (unsigned i = 0; i < 3; i++) {
        struct one_read r;
        /* Some in a row, with and without a version that was known. */
        d->set(kinds[i], 1);
        read_start(&a, &r, "k", i % 2);
        UNTIL(&a, count(kinds[i]) >= 4);
        assert_false(r.done);
        d->set(kinds[i], 0);
        assert_string_equal(read_answer(&a, &r), "v");
    }
    /* A commit's checks are reads, too. */
    faults("read_behind=2,read_future=3,read_too_old=3");
    for (unsigned i = 0; i < 50; i++)
        assert_int_equal(set_if(&a, "k", "v", i % 2 ? "k" : "l", i % 2 ? "v" : NULL), ST_OK);
    faults("read_behind=0,read_future=0,read_too_old=0");
}

static void values_of_others_are_damage(void **state)
{
    (void)state;
    static const struct {
        const char *key, *value;
        size_t len;
    } bad[] = {{"k1", "", 0}, {"k2", "x", 1}, {"k3", "\xff\xff", 2}, {"k4", "\x03\x00hh", 4}};
    uint8_t body[8][8];
    put("k0", "good");
    put("k5", "good");
    for (unsigned i = 0; i < 4; i++) {
        struct raw k = raw_of(PREFIX, bad[i].key, 2);
        assert_true(d->put(k.bytes, k.len, bad[i].value, bad[i].len));
    }
    for (unsigned run = 0; run < 2; run++) {
        static const char *const names[] = {"k0", "k1", "k2", "k3", "k4", "k5"};
        static const char *const longer[] = {"k0", "k1", "k2", "k3", "k4", "k5"};
        struct store_get gets[6] = {0};
        for (unsigned i = 0; i < 6; i++)
            gets[i] = (struct store_get){
                .key = text(run ? longer[i] : names[i]), .body = body[i], .body_cap = 8};
        struct one_read r = {.read = {.gets = gets, .n_gets = 6}};
        assert_int_equal(read_all(&a, &r), ST_OK);
        for (unsigned i = 0; i < 6; i++)
            assert_int_equal(gets[i].st, i == 0 || i == 5 ? ST_OK : ST_IO);
        store_read_release(&r.read);
    }
    struct store_range range = {.begin = text("k"), .end = text("l"), .limit = 10};
    struct one_read r = {.read = {.ranges = &range, .n_ranges = 1}};
    assert_int_equal(read_all(&a, &r), ST_IO);
    store_read_release(&r.read);
    /* What is not of the form is not the value that a check wants either. */
    assert_int_equal(set_if(&a, "x", "y", "k1", ""), ST_CONFLICT);
    assert_int_equal(set_if(&a, "x", "y", "k1", NULL), ST_CONFLICT);
    assert_int_equal(set(&a, "k1", "mended"), ST_OK);
    assert_string_equal(plain(&a, "k1"), "mended");
}

/* --- timeouts -------------------------------------------------------------------------------- */

static enum status read_result(struct side *s, struct one_read *r)
{
    UNTIL(s, r->done);
    store_read_release(&r->read);
    return r->st;
}

static void reads_end_in_time(void **state)
{
    (void)state;
    struct one_read waits_version, waits_value, second;
    uint64_t start;
    reopen(&(struct store_options){.timeout_ms = 400});
    assert_int_equal(set(&a, "k", "v"), ST_OK);
    assert_string_equal(own(&a, "k"), "v");
    for (unsigned round = 0; round < 2; round++) {
        faults("down=1");
        start = clock_ms();
        read_start(&a, &waits_value, "k", true);
        read_start(&a, &waits_version, "k", false);
        assert_int_equal(read_result(&a, &waits_value), ST_UNAVAIL);
        assert_int_equal(read_result(&a, &waits_version), ST_UNAVAIL);
        assert_true(clock_ms() - start >= 390);
        assert_true(clock_ms() - start < 3000);
        /* The question for a version is on its way still: who joins it has a timeout as well. */
        pass(&a, 300);
        start = clock_ms();
        read_start(&a, &second, "k", false);
        assert_int_equal(read_result(&a, &second), ST_UNAVAIL);
        assert_true(clock_ms() - start < 3000);
        /* Between two attempts. */
        faults("down=0");
        assert_string_equal(plain(&a, "k"), "v");
        faults("read_behind=1");
        start = clock_ms();
        read_start(&a, &second, "k", false);
        assert_int_equal(read_result(&a, &second), ST_UNAVAIL);
        assert_true(clock_ms() - start < 3000);
        faults("read_behind=0");
        assert_string_equal(plain(&a, "k"), "v");
        assert_string_equal(own(&a, "k"), "v");
    }
}

/* Commits have no timeout: they wait. Meanwhile it is said what they wait for. */
static void commits_wait_and_the_state_says_so(void **state)
{
    (void)state;
    struct one_commit known, blind, checked;
    struct store_info info;
    reopen(&(struct store_options){.timeout_ms = 400});
    owner();
    faults("down=1");
    uint64_t start = clock_ms();
    set_start(&a, &known, "data", "1", "owner", "A");
    set_start(&a, &blind, "blind", "1", NULL, NULL);
    set_start(&a, &checked, "absent", "1", "absent", NULL);
    assert_int_equal(store_info(a.store, &info, NULL), ST_OK);
    assert_string_equal(info.state, "");
    UNTIL(&a, store_info(a.store, &info, NULL) == ST_OK && info.state[0]);
    assert_true(clock_ms() - start >= 5000);
    assert_true(clock_ms() - start < 20000);
    print_message("# %s\n", info.state);
    assert_non_null(strstr(info.state, "FoundationDB has not answered for "));
    assert_non_null(strstr(info.state, "can't be reached"));
    assert_int_equal(known.done + blind.done + checked.done, 0);
    faults("down=0");
    assert_int_equal(answer(&a, &known), ST_OK);
    assert_int_equal(answer(&a, &blind), ST_OK);
    assert_int_equal(answer(&a, &checked), ST_OK);
    UNTIL(&a, store_info(a.store, &info, NULL) == ST_OK && !info.state[0]);
}

/* That a read was given up is no answer. */
static void the_state_stays_without_an_answer(void **state)
{
    (void)state;
    struct store_info info;
    struct one_read r;
    reopen(&(struct store_options){.timeout_ms = 7500});
    assert_int_equal(set(&a, "k", "v"), ST_OK);
    faults("down=1");
    read_start(&a, &r, "k", false);
    assert_int_equal(read_result(&a, &r), ST_UNAVAIL);
    pass(&a, 1500);
    assert_int_equal(store_info(a.store, &info, NULL), ST_OK);
    assert_non_null(strstr(info.state, "FoundationDB has not answered for "));
    faults("down=0");
    assert_string_equal(plain(&a, "k"), "v");
    UNTIL(&a, store_info(a.store, &info, NULL) == ST_OK && !info.state[0]);
}

/* A cluster that answers, but not what it holds back. */
static void the_state_names_what_limits(void **state)
{
    (void)state;
    struct one_commit c, more;
    struct store_info info;
    owner();
    d->set_health("{\"batch_limited\":true,\"tps_limit\":123.4,\"worst_log_queue\":1610612736,"
                  "\"worst_storage_durability_lag\":7500000,\"worst_storage_queue\":1048576}");
    faults("batch_stopped=1");
    set_background(&a, &c, "1");
    assert_int_equal(answer(&a, &c), ST_OK);
    set_background(&a, &more, "2"); /* waits for its ticket alone */
    UNTIL(&a, store_info(a.store, &info, NULL) == ST_OK && info.state[0]);
    print_message("# %s\n", info.state);
    assert_non_null(strstr(info.state, "it limits clients to 123 transactions a second"));
    assert_non_null(strstr(info.state, "batch: held back"));
    assert_non_null(strstr(info.state, "log queue 1536 MiB"));
    assert_non_null(strstr(info.state, "storage queue 1 MiB"));
    assert_non_null(strstr(info.state, "storage 7.5 s behind"));
    assert_int_equal(more.done, 0);
    faults("batch_stopped=0");
    assert_int_equal(answer(&a, &more), ST_OK);
    UNTIL(&a, store_info(a.store, &info, NULL) == ST_OK && !info.state[0]);
}

/* --- watches --------------------------------------------------------------------------------- */

struct watched {
    struct store_watch watch;
    char key[16];
    unsigned fired;
};

static void watch_fired(struct store_watch *watch)
{
    container_of(watch, struct watched, watch)->fired++;
}

static void arm(struct side *s, struct watched *w)
{
    w->fired = 0;
    w->watch = (struct store_watch){.key = text(w->key), .fired = watch_fired};
    store_watch(s->store, s->env, &w->watch);
    assert_int_equal(w->fired, 0);
}

/* A change that a read begun after arming does not show fires, at whatever moment it comes and
 * whatever becomes of the watch. */
static void armed_then_read_misses_nothing(void **state)
{
    (void)state;
    enum { WATCHES = 60 };
    static struct watched w[WATCHES];
    static struct one_read reads[WATCHES];
    unsigned needed = 0;
    char was[WATCHES][16], is[16];
    chance = chance_begin("fdb_engine");
    for (unsigned i = 0; i < WATCHES; i++) {
        snprintf(w[i].key, sizeof w[i].key, "k%u", i);
        put(w[i].key, "0");
    }
    for (unsigned round = 1; round <= 12; round++) {
        faults("delay_us_max=2000,watch_delay_ms_max=3");
        d->set("watch_cancelled", round % 4 == 1 ? 4 : 0);
        d->set("watch_future", round % 4 == 2 ? 4 : 0);
        d->set("watch_spurious", round % 4 == 3 ? 4 : 0);
        snprintf(is, sizeof is, "%u", round);
        /* A version that is known serves watches; or none is. */
        if (round % 2)
            assert_int_equal(set(&a, "mine", is), ST_OK);
        for (unsigned i = 0; i < WATCHES; i++)
            arm(&a, &w[i]);
        for (unsigned i = 0; i < WATCHES; i++)
            read_start(&a, &reads[i], w[i].key, false);
        /* The change while they are on their way, or after they have come (or failed). */
        bool after = round % 2 == 0 || round > 8;
        for (unsigned i = 0; i < WATCHES && after; i++)
            strcpy(was[i], read_answer(&a, &reads[i]));
        if (round > 8)
            pass(&a, 10);
        for (unsigned i = 0; i < WATCHES; i++) {
            if (chance_below(&chance, 4) == 0)
                turn(&a, 1);
            put(w[i].key, is);
        }
        for (unsigned i = 0; i < WATCHES && !after; i++)
            strcpy(was[i], read_answer(&a, &reads[i]));
        for (unsigned i = 0; i < WATCHES; i++) {
            needed += strcmp(was[i], is) != 0;
            if (strcmp(was[i], is) != 0)
                UNTIL(&a, w[i].fired);
            store_watch_stop(&w[i].watch);
            assert_true(w[i].fired <= 1);
        }
    }
    print_message("# %u had to fire\n", needed);
    assert_true(needed > 100);
    faults("delay_us_max=0");
}

/* A watch that nothing disturbs does not fire, by a change elsewhere either. */
static void watches_are_quiet(void **state)
{
    (void)state;
    struct watched w = {.key = "k"};
    arm(&a, &w);
    assert_true(d->settle(1000));
    put("kk", "1");
    put("j", "1");
    pass(&a, 200);
    assert_int_equal(w.fired, 0);
    assert_int_equal(count("watches_alive"), 1);
    put("k", "1");
    UNTIL(&a, w.fired);
    assert_int_equal(count("watches_alive"), 0);
    store_watch_stop(&w.watch);
}

/* 1032: the library has no more than ten thousand. */
static void too_many_watches_fire_too(void **state)
{
    (void)state;
    enum { WATCHES = 10020 };
    struct watched *w = mem_zalloc(WATCHES * sizeof *w);
    unsigned fired = 0;
    for (unsigned i = 0; i < WATCHES; i++) {
        snprintf(w[i].key, sizeof w[i].key, "k%u", i);
        arm(&a, &w[i]);
    }
    for (uint64_t end_ms = clock_ms() + PATIENCE_MS; fired < 20 && clock_ms() < end_ms;) {
        turn(&a, 10);
        fired = 0;
        for (unsigned i = 0; i < WATCHES; i++)
            fired += w[i].fired;
    }
    assert_int_equal(fired, 20);
    assert_int_equal(count("watches_alive"), 10000);
    for (unsigned i = 0; i < WATCHES; i++)
        store_watch_stop(&w[i].watch);
    put("other", "");
    assert_int_equal(count("watches_alive"), 0);
    /* Room for others again. */
    arm(&a, &w[0]);
    pass(&a, 20);
    put("k0", "x");
    UNTIL(&a, w[0].fired);
    free(w);
}

static void stopped_watches_never_fire(void **state)
{
    (void)state;
    enum { WATCHES = 40 };
    static struct watched w[WATCHES];
    chance = chance_begin("fdb_engine");
    for (unsigned round = 0; round < 30; round++) {
        bool stopped[WATCHES] = {false};
        faults("delay_us_max=1000,watch_cancelled=5,watch_spurious=3,watch_delay_ms_max=2");
        for (unsigned i = 0; i < WATCHES; i++) {
            snprintf(w[i].key, sizeof w[i].key, "k%u", i);
            arm(&a, &w[i]);
        }
        for (unsigned k = 0; k < 3 * WATCHES; k++) {
            unsigned i = (unsigned)chance_below(&chance, WATCHES);
            switch (chance_below(&chance, 3)) {
            case 0:
                put(w[i].key, round % 2 ? "a" : "b");
                break;
            case 1:
                if (!stopped[i]) {
                    store_watch_stop(&w[i].watch);
                    stopped[i] = true;
                    w[i].fired = 0;
                }
                break;
            default:
                turn(&a, 1);
            }
        }
        for (unsigned i = 0; i < WATCHES; i++) {
            if (stopped[i])
                assert_int_equal(w[i].fired, 0);
            else
                store_watch_stop(&w[i].watch);
            memset(&w[i].watch, 0xdb, sizeof w[i].watch); /* it may be freed */
        }
        /* Some are still on their way out when the store is closed. */
        if (round % 3 == 0)
            turn(&a, 1);
        reopen(&(struct store_options){0});
    }
}

/* Closing while the cluster does not answer, at each stage of a watch. */
static void stopped_watches_do_not_hinder_closing(void **state)
{
    (void)state;
    for (unsigned stage = 0; stage < 5; stage++) {
        struct watched w = {.key = "k"};
        if (stage != 1)
            assert_int_equal(set(&a, "mine", "x"), ST_OK); /* a version is known */
        if (stage == 4) {
            arm(&a, &w);
            pass(&a, 20);
        }
        faults("down=1");
        if (stage != 4)
            arm(&a, &w);
        if (stage == 2)
            pass(&a, 20);
        store_watch_stop(&w.watch);
        if (stage == 3)
            pass(&a, 20);
        uint64_t start = clock_ms();
        store_close(a.store);
        a.store = NULL;
        assert_true(clock_ms() - start < 5000);
        /* What was posted for it runs afterwards. */
        pass(&a, 5);
        faults("down=0");
        assert_true(d->settle(5000));
        a.store = open_store(PREFIX, &(struct store_options){0});
    }
}

/* --- background ------------------------------------------------------------------------------- */

static void background_is_of_batch_priority(void **state)
{
    (void)state;
    struct one_commit c;
    struct one_read r;
    struct fdb_double_counts n;
    owner();
    d->counts(&n);
    assert_int_equal(n.grvs_batch + n.commits_batch + n.reads_low, 0);
    faults("retry_delay_us_max=100,read_behind=1");
    /* A read, three times refused at first. */
    r = (struct one_read){.get = {.key = text("data")}};
    r.read =
        (struct store_read){.gets = &r.get, .n_gets = 1, .background = true, .done = read_done};
    uint64_t gets = n.gets, grvs = n.grvs;
    store_read(a.store, a.env, &r.read);
    UNTIL(&a, count("read_behind") >= 3);
    faults("read_behind=0");
    assert_string_equal(read_answer(&a, &r), "0");
    d->counts(&n);
    assert_true(n.gets - gets >= 4);
    assert_int_equal(n.reads_low, n.gets - gets);
    assert_int_equal(n.grvs_batch, n.grvs - grvs);
    /* A commit the long way, refused at each stage. */
    put("owner", "A");
    d->counts(&n);
    uint64_t low = n.reads_low, batch = n.commits_batch, grvs_batch = n.grvs_batch;
    gets = n.gets, grvs = n.grvs;
    uint64_t tried = n.commits_tried;
    faults("read_behind=3,conflict=2,seed=5");
    for (unsigned i = 0; i < 12; i++) {
        set_background(&a, &c, "1");
        assert_int_equal(answer(&a, &c), ST_OK);
    }
    faults("read_behind=0,conflict=0");
    d->counts(&n);
    assert_true(n.read_behind > 3 && n.conflict > 2);
    assert_int_equal(n.commits_batch - batch, n.commits_tried - tried);
    assert_int_equal(n.reads_low - low, n.gets - gets);
    assert_int_equal(n.grvs_batch - grvs_batch, n.grvs - grvs);
    /* Others are not. */
    d->counts(&n);
    low = n.reads_low, batch = n.commits_batch, grvs_batch = n.grvs_batch;
    assert_int_equal(set_if(&a, "data", "2", "owner", "A"), ST_OK);
    assert_int_equal(set(&a, "data", "2"), ST_OK);
    assert_string_equal(plain(&a, "data"), "2");
    assert_string_equal(own(&a, "data"), "2");
    assert_int_equal(set_if(&a, "x", "2", "x", NULL), ST_OK);
    d->counts(&n);
    assert_int_equal(n.reads_low, low);
    assert_int_equal(n.commits_batch, batch);
    assert_int_equal(n.grvs_batch, grvs_batch);
}

static void volumes_have_tags(void **state)
{
    (void)state;
    owner();
    for (unsigned i = 0; i < 5; i++) {
        struct one_commit c = {.check = {STORE_CHECK_VALUE, text("owner"), text("A")},
                               .mutation = {STORE_SET, text("data"), text("1"), {NULL, 0}}};
        struct one_read r = {.get = {.key = text("data")}};
        c.commit = (struct store_commit){.checks = &c.check,
                                         .n_checks = 1,
                                         .mutations = &c.mutation,
                                         .n_mutations = 1,
                                         .tag = 7};
        r.read = (struct store_read){.gets = &r.get, .n_gets = 1, .tag = 8, .own = i % 2};
        if (i == 3)
            faults("retry_delay_us_max=100,conflict=2,read_behind=2");
        uint64_t commits = d->tag_count("v7"), reads = d->tag_count("v8");
        uint64_t tried = count("commits_tried"), gets = count("gets");
        commit_send(&a, &c);
        assert_int_equal(answer(&a, &c), ST_OK);
        /* The commit, the read version to be throttled by, and what it reads. */
        assert_true(d->tag_count("v7") - commits >= 2 * (count("commits_tried") - tried));
        gets = count("gets");
        assert_int_equal(read_all(&a, &r), ST_OK);
        store_read_release(&r.read);
        assert_int_equal(d->tag_count("v8") - reads, count("gets") - gets);
    }
    faults("conflict=0,read_behind=0");
    uint64_t commits = d->tag_count("v7"), reads = d->tag_count("v8");
    assert_int_equal(set_if(&a, "data", "1", "owner", "A"), ST_OK);
    assert_string_equal(own(&a, "data"), "1");
    assert_int_equal(d->tag_count("v7"), commits);
    assert_int_equal(d->tag_count("v8"), reads);
}

/* --- limits ----------------------------------------------------------------------------------- */

/* Commits of `n` mutations of one kind with the longest keys; how they are answered. */
static enum status many(enum store_mutation_kind kind, size_t n, size_t key_len, size_t head_len)
{
    struct store_mutation *m = mem_zalloc(n * sizeof *m);
    uint8_t *keys = mem_zalloc(n * 2 * 512), *head = mem_zalloc(FD_HEAD + 1);
    for (size_t i = 0; i < n; i++) {
        uint8_t *key = keys + i * 2 * 512;
        memset(key, 'k', 512);
        put_be32(key, (uint32_t)i * 2);
        memset(key + 512, 'k', 512);
        put_be32(key + 512, (uint32_t)i * 2 + 1);
        m[i] = (struct store_mutation){kind, {key, key_len}, {head, head_len}, {NULL, 0}};
        if (kind == STORE_CLEAR)
            m[i].head.len = 0;
        if (kind == STORE_CLEAR_RANGE)
            m[i].head = (struct slice){key + 512, STORE_KEY_BYTES_MAX};
    }
    struct one_commit c = {.commit = {.mutations = m, .n_mutations = n}};
    commit_send(&a, &c);
    enum status st = answer(&a, &c);
    free(m);
    free(keys);
    free(head);
    return st;
}

/* Whatever it is made of: either it fits, or nothing of it is sent. */
static void commits_too_large_are_not_sent(void **state)
{
    (void)state;
    char longest[65];
    memset(longest, 'p', 64);
    longest[64] = 0;
    store_close(a.store);
    a.store = open_store(longest, &(struct store_options){0});
    static const struct {
        enum store_mutation_kind kind;
        size_t key_len, head_len, least; /* it is not much less than could be */
    } kinds[] = {
        {STORE_SET, 511, 0, 4800},       {STORE_SET, 4, 0, 30000},
        {STORE_SET, 4, FD_HEAD, 270},    {STORE_CLEAR, 511, 0, 3600},
        {STORE_CLEAR, 4, 0, 24000},      {STORE_CLEAR_RANGE, 511, 0, 3600},
        {STORE_CLEAR_RANGE, 4, 0, 6500},
    };
    for (unsigned i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        /* The most that is taken. */
        size_t low = 1, high = 200000;
        while (low + low / 50 + 1 < high) {
            size_t mid = (low + high) / 2;
            uint64_t tried = count("commits_tried");
            enum status st = many(kinds[i].kind, mid, kinds[i].key_len, kinds[i].head_len);
            if (st == ST_OK) {
                assert_int_equal(count("commits_tried"), tried + 1);
                low = mid;
            } else {
                assert_int_equal(st, ST_INVAL);
                assert_int_equal(count("commits_tried"), tried);
                high = mid;
            }
        }
        assert_int_equal(count("violations"), 0);
        print_message("# kind %d, keys of %zu, heads of %zu: %zu\n", kinds[i].kind,
                      kinds[i].key_len, kinds[i].head_len, low);
        assert_true(low >= kinds[i].least);
    }
    /* One that the cluster finds too large all the same. */
    faults("too_large=1");
    uint64_t tried = count("commits_tried");
    assert_int_equal(set(&a, "k", "v"), ST_INVAL);
    assert_int_equal(count("commits_tried"), tried + 1);
    faults("too_large=0");
    assert_int_equal(set(&a, "k", "v"), ST_OK);
    assert_int_equal(d->count("size_limits_set"), 0);
}

static void longest_keys_and_values(void **state)
{
    (void)state;
    char longest[65];
    static uint8_t head[FD_HEAD + 1], body[FD_BODY + 1], out[FD_BODY + 1];
    uint8_t key[512];
    memset(longest, 'p', 64);
    longest[64] = 0;
    memset(key, 0xff, sizeof key);
    memset(head, 'h', sizeof head);
    memset(body, 'b', sizeof body);
    store_close(a.store);
    a.store = open_store(longest, &(struct store_options){0});
    uint64_t tried = count("commits_tried");
    static const struct {
        size_t key, head, body;
        enum status st;
    } cases[] = {
        {511, FD_HEAD, FD_BODY, ST_OK},
        {512, 1, 1, ST_INVAL},
        {0, 1, 1, ST_INVAL},
        {511, FD_HEAD + 1, 0, ST_INVAL},
        {511, 0, FD_BODY + 1, ST_INVAL},
        {511, FD_HEAD, FD_BODY + 1, ST_INVAL},
        {1, 0, 0, ST_OK},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct one_commit c = {
            .mutation = {
                STORE_SET, {key, cases[i].key}, {head, cases[i].head}, {body, cases[i].body}}};
        c.commit = (struct store_commit){.mutations = &c.mutation, .n_mutations = 1};
        commit_send(&a, &c);
        assert_int_equal(answer(&a, &c), cases[i].st);
    }
    assert_int_equal(count("commits_tried"), tried + 2);
    /* A range of such keys, and all there is. */
    struct store_get get = {.key = {key, 511}, .body = out, .body_cap = sizeof out};
    struct store_range ranges[2] = {
        {.begin = {key, 510}, .end = {key, 511}, .limit = 9},
        {.begin = {key, 1}, .end = {key, 511}, .limit = 9},
    };
    struct one_read r = {.read = {.gets = &get, .n_gets = 1, .ranges = ranges, .n_ranges = 2}};
    assert_int_equal(read_all(&a, &r), ST_OK);
    assert_int_equal(get.st, ST_OK);
    assert_int_equal(get.head.len, FD_HEAD);
    assert_int_equal(get.body_len, FD_BODY);
    assert_memory_equal(out, body, FD_BODY);
    assert_int_equal(ranges[0].n_pairs, 0);
    assert_int_equal(ranges[1].n_pairs, 1);
    store_read_release(&r.read);
    struct one_commit c = {.mutation = {STORE_CLEAR_RANGE, {key, 510}, {key, 511}, {NULL, 0}}};
    c.commit = (struct store_commit){.mutations = &c.mutation, .n_mutations = 1};
    commit_send(&a, &c);
    assert_int_equal(answer(&a, &c), ST_OK);
    struct raw k = raw_of(longest, key, 511);
    void *value;
    size_t len;
    assert_true(d->get(k.bytes, k.len, &value, &len));
    free(value);
}

/* --- quota ------------------------------------------------------------------------------------ */

struct one_wait {
    struct store_reserve_wait wait;
    bool done;
    enum status st;
};

static void wait_done(struct store_reserve_wait *wait, enum status st)
{
    struct one_wait *w = container_of(wait, struct one_wait, wait);
    w->done = true;
    w->st = st;
}

static void wait_start(struct side *s, struct one_wait *w, uint64_t bytes)
{
    *w = (struct one_wait){.wait = {.want = {bytes, 0}, .done = wait_done}};
    store_reserve_wait(a.store, s->env, &w->wait);
    assert_false(w->done);
}

static enum status reserve_wait(uint64_t bytes)
{
    struct one_wait w;
    wait_start(&a, &w, bytes);
    UNTIL(&a, w.done);
    return w.st;
}

static bool reserve(uint64_t bytes)
{
    return store_reserve(a.store, (struct store_reservation){bytes, 0});
}

static void unreserve(uint64_t bytes)
{
    store_unreserve(a.store, (struct store_reservation){bytes, 0});
}

static void quota_is_kept(void **state)
{
    (void)state;
    struct store_info info;
    struct err e;
    static uint8_t big[60000];
    /* Without a quota there is always room. */
    assert_true(reserve(UINT32_MAX));
    assert_int_equal(reserve_wait(UINT32_MAX), ST_OK);
    reopen(&(struct store_options){.quota_bytes = 1000000});
    assert_false(reserve(1)); /* not measured yet */
    assert_int_equal(reserve_wait(1000001), ST_NOSPC);
    assert_int_equal(reserve_wait(400000), ST_OK);
    assert_true(reserve(400000));
    assert_false(reserve(400000));
    assert_int_equal(reserve_wait(400000), ST_NOSPC);
    /* Keys count, too. */
    assert_false(store_reserve(a.store, (struct store_reservation){0, 200000 / 64 + 1}));
    /* What was given out counts until it is measured, also when it was given back: it may have
     * become data. */
    assert_int_equal(reserve_wait(0), ST_OK);
    unreserve(400000);
    assert_true(reserve(400000));
    assert_true(reserve(200000));
    unreserve(600000);
    assert_false(reserve(500000));
    assert_int_equal(reserve_wait(400000), ST_OK);
    /* Another client's data is measured when somebody waits. */
    for (unsigned i = 0; i < 5; i++) {
        char key[16];
        snprintf(key, sizeof key, "theirs%u", i);
        struct raw k = raw_of(PREFIX, key, strlen(key));
        assert_true(d->put(k.bytes, k.len, big, sizeof big));
        k = raw_of("other", key, strlen(key)); /* of another store: does not count */
        assert_true(d->put(k.bytes, k.len, big, sizeof big));
    }
    unreserve(400000);
    unreserve(400000);
    assert_int_equal(reserve_wait(750000), ST_NOSPC);
    assert_int_equal(reserve_wait(650000), ST_OK);
    assert_int_equal(store_info(a.store, &info, &e), ST_OK);
    assert_true(info.bytes_used >= 300000 && info.bytes_used < 302000);
    assert_int_equal(info.bytes_available, 1000000 - info.bytes_used);
    unreserve(650000);
    /* Room that they give back counts when it is asked for. */
    struct raw from = raw_of(PREFIX, "theirs", 6), to = raw_of(PREFIX, "theirt", 6);
    d->clear(from.bytes, from.len, to.bytes, to.len);
    assert_int_equal(reserve_wait(950000), ST_OK);
    unreserve(950000);
    assert_int_equal(
        store_usage(a.store, text("a"), text("z"), &(uint64_t){0}, &info.bytes_used, &e), ST_OK);
    assert_int_equal(info.bytes_used, 0);
}

/* Two reactors that measure at the same time count what was given out once. */
static void quota_is_kept_by_all_reactors(void **state)
{
    (void)state;
    struct one_wait w[2];
    reopen(&(struct store_options){.quota_bytes = 1000000});
    assert_int_equal(reserve_wait(0), ST_OK);
    assert_true(reserve(300000));
    faults("down=1");
    wait_start(&a, &w[0], 0);
    wait_start(&b, &w[1], 0);
    faults("down=0");
    UNTIL(&a, w[0].done);
    UNTIL(&b, w[1].done);
    assert_true(w[0].st == ST_OK && w[1].st == ST_OK);
    assert_true(reserve(600000));
    assert_false(reserve(200000));
    unreserve(900000);
}

/* --- opening ---------------------------------------------------------------------------------- */

/* Each in a process of its own, as the library can be loaded once; all begin at the start, as
 * some take long. */
struct child {
    const char *name, *environment, *uri; /* %s: the cluster file */
    const char *flags;
    FILE *out;
    char said[4000];
    int status;
};

static struct child children[] = {
    {.name = "630", .environment = "FDB_DOUBLE=api=630", .uri = "fdb:%s"},
    {.name = "710", .environment = "FDB_DOUBLE=api=710", .uri = "fdb:%s"},
    {.name = "730", .environment = "FDB_DOUBLE=api=730", .uri = "fdb:%s"},
    {.name = "740", .environment = "FDB_DOUBLE=api=740", .uri = "fdb:%s"},
    {.name = "newer", .environment = "FDB_DOUBLE=api=800", .uri = "fdb:%s"},
    {.name = "older", .environment = "FDB_DOUBLE=api=620", .uri = "fdb:%s"},
    {.name = "incompatible", .environment = "FDB_DOUBLE=incompatible=1", .uri = "fdb:%s"},
    {.name = "down", .environment = "FDB_DOUBLE=down=1", .uri = "fdb:%s"},
    {.name = "stalled", .environment = "FDB_DOUBLE=stalled=1", .uri = "fdb:%s"},
    {.name = "waits", .environment = "FDB_DOUBLE=down=1", .uri = "fdb:%s", .flags = "wait"},
    {.name = "locked", .environment = "FDB_DOUBLE=open_error=1038", .uri = "fdb:%s"},
    {.name = "refused", .environment = "FDB_DOUBLE=open_error=2104", .uri = "fdb:%s"},
    {.name = "not created", .environment = "FDB_DOUBLE=create_error=2104", .uri = "fdb:%s"},
    {.name = "no library", .environment = "FDB_NBD_LIBFDB_C=/nowhere/libfdb_c.so", .uri = "fdb:%s"},
    {.name = "no functions", .environment = "FDB_NBD_LIBFDB_C=libz.so.1", .uri = "fdb:%s"},
    {.name = "by environment", .environment = "FDB_CLUSTER_FILE=/nowhere/named", .uri = "fdb:"},
};

#define N_CHILDREN (sizeof children / sizeof children[0])

static void children_start(void)
{
    for (unsigned i = 0; i < N_CHILDREN; i++) {
        struct child *c = &children[i];
        char uri[200], command[900];
        const char *at = strchr(c->uri, '%');
        snprintf(uri, sizeof uri, "%.*s%s", at ? (int)(at - c->uri) : 100, c->uri,
                 at ? cluster_file : "");
        snprintf(command, sizeof command, "%s '%s' --open '%s' %s 2>&1 </dev/null", c->environment,
                 exe, uri, c->flags ? c->flags : "");
        c->out = popen(command, "r");
        CHECK(c->out);
    }
}

static struct child *child(const char *name)
{
    unsigned i = 0;
    while (strcmp(children[i].name, name) != 0)
        CHECK(++i < N_CHILDREN);
    struct child *c = &children[i];
    if (c->out) {
        size_t n = fread(c->said, 1, sizeof c->said - 1, c->out);
        c->said[n] = 0;
        c->status = pclose(c->out);
        c->out = NULL;
        print_message("# %s: %.*s\n", name, (int)strcspn(c->said, "\n"), c->said);
        if (c->status)
            fail_msg("%s: status %d: %s\n", name, c->status, c->said);
    }
    return c;
}

static void said(const char *name, const char *what)
{
    if (!strstr(child(name)->said, what))
        fail_msg("%s: expected \"%s\" in \"%s\"\n", name, what, child(name)->said);
}

static void versions_of_the_library(void **state)
{
    (void)state;
    said("630", "opened: fdb (client library 6.3.0, API 630)\nread: v\n");
    said("710", "opened: fdb (client library 7.1.0, API 710)\nread: v\n");
    said("730", "opened: fdb (client library 7.3.0, API 730)\nread: v\n");
    said("740", "opened: fdb (client library 7.4.0, API 740)\nread: v\n");
    said("newer", "opened: fdb (client library 8.0.0, API 740)\nread: v\n");
    said("older", "store unavailable: FoundationDB's client library is too old (API version 620, "
                  "630 is needed): install that of FoundationDB 6.3 or newer\n");
}

static void what_is_wrong_is_one_sentence(void **state)
{
    (void)state;
    said("incompatible", " speaks protocol 0fdb00b07400 and the client library (7.3.0) "
                         "0fdb00b07300: install the library of the cluster's version");
    said("incompatible", "took 1");
    said("down", " does not answer: is it running? fdbcli -C ");
    said("down", "took 1");
    said("stalled", " does not answer: is it running? fdbcli -C ");
    said("locked", " is locked");
    said("refused", " is not a FoundationDB cluster file: ");
    said("not created", " is not a FoundationDB cluster file: ");
    said("no library", "FDB_NBD_LIBFDB_C names no library that can be loaded: ");
    said("no functions", "FoundationDB's client library lacks fdb_");
    said("by environment", "there is no FoundationDB cluster file /nowhere/named that can be read");
    /* With STORE_WAIT it says that it waits, for what, and that it is over. */
    said("waits", "waiting for FoundationDB since 2 s: the FoundationDB cluster of ");
    said("waits", "FoundationDB answers after ");
    said("waits", "read: v\n");
}

static void refused(const char *uri, enum status st, const char *what)
{
    struct err e = {0};
    struct store *store;
    assert_int_equal(store_open(uri, &(struct store_options){0}, &store, &e), st);
    assert_null(store);
    if (!strstr(e.text, what))
        fail_msg("%s: expected \"%s\" in \"%s\"\n", uri, what, e.text);
}

static void cluster_files_that_are_no_good(void **state)
{
    (void)state;
    char path[] = "/tmp/fdb-engine-test-bad-XXXXXX", uri[200];
    refused("fdb:/nowhere/fdb.cluster", ST_UNAVAIL,
            "there is no FoundationDB cluster file /nowhere/fdb.cluster that can be read (No such "
            "file or directory): copy it from a machine of the cluster, or name it: ");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    snprintf(uri, sizeof uri, "fdb:%s", path);
    refused(uri, ST_UNAVAIL, " is not a FoundationDB cluster file: ");
    assert_true(dprintf(fd, "this is no cluster file\n") > 0);
    refused(uri, ST_UNAVAIL, " is not a FoundationDB cluster file: ");
    assert_int_equal(fchmod(fd, 0), 0);
    close(fd);
    if (geteuid() == 0)
        assert_int_equal(setresuid(65534, 65534, 0), 0);
    refused(uri, ST_UNAVAIL, "that can be read (Permission denied): ");
    if (getuid() == 65534)
        assert_int_equal(setresuid(0, 0, 0), 0);
    unlink(path);
}

static void stores_of_other_forms(void **state)
{
    (void)state;
    char uri[700], longest[66];
    memset(longest, 'p', 65);
    longest[65] = 0;
    static const char *const bad[] = {"", "a b", "a?b", "a=b", "a%20", "\xc3\xa4", "a\\b"};
    for (unsigned i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        snprintf(uri, sizeof uri, "fdb:%s?prefix=%s", cluster_file, bad[i]);
        refused(uri, ST_INVAL, "must have 1 to 64 letters, digits or ._-/: in it");
    }
    snprintf(uri, sizeof uri, "fdb:%s?prefix=%s", cluster_file, longest);
    refused(uri, ST_INVAL, "must have 1 to 64 letters");
    static const char *const forms[] = {"?", "?prefix", "?Prefix=a", "?tenant=a", "?x&prefix=a"};
    for (unsigned i = 0; i < sizeof forms / sizeof forms[0]; i++) {
        snprintf(uri, sizeof uri, "fdb:%s%s", cluster_file, forms[i]);
        refused(uri, ST_INVAL, "a FoundationDB store is fdb:[CLUSTER_FILE][?prefix=TEXT]");
    }
    memset(uri, 'x', sizeof uri - 1);
    uri[sizeof uri - 1] = 0;
    memcpy(uri, "fdb:/", 5);
    refused(uri, ST_INVAL, "is longer than 399 bytes");
    /* All that is allowed. */
    struct store *store = open_store("Az09._-/:", &(struct store_options){0});
    store_close(store);
}

/* Prefixes that begin alike, too. */
static void stores_do_not_see_each_other(void **state)
{
    (void)state;
    struct store *all = a.store;
    static const char *const prefixes[] = {"a", "ab", "a/b", "a/", "b"};
    struct store *stores[5];
    for (unsigned i = 0; i < 5; i++) {
        a.store = stores[i] = open_store(prefixes[i], &(struct store_options){0});
        assert_int_equal(set(&a, "k", prefixes[i]), ST_OK);
        assert_int_equal(set(&a, "b", prefixes[i]), ST_OK);
    }
    for (unsigned i = 0; i < 5; i++) {
        uint64_t keys, bytes;
        struct err e;
        a.store = stores[i];
        assert_string_equal(plain(&a, "k"), prefixes[i]);
        struct store_range range = {.begin = {"\0", 1}, .end = {"\xff", 1}, .limit = 100};
        struct one_read r = {.read = {.ranges = &range, .n_ranges = 1}};
        assert_int_equal(read_all(&a, &r), ST_OK);
        /* (And the keys of commits.) */
        unsigned seen = 0;
        for (uint32_t p = 0; p < range.n_pairs; p++)
            seen += *(const uint8_t *)range.pairs[p].key.data >= 'a';
        assert_int_equal(seen, 2);
        store_read_release(&r.read);
        assert_int_equal(store_usage(a.store, text("k"), text("l"), &keys, &bytes, &e), ST_OK);
        assert_int_equal(bytes, 2 * strlen(prefixes[i]) + 5);
    }
    a.store = stores[0];
    struct one_commit c = {.mutation = {STORE_CLEAR_RANGE, {"\0", 1}, {"\xff", 1}, {NULL, 0}}};
    c.commit = (struct store_commit){.mutations = &c.mutation, .n_mutations = 1};
    commit_send(&a, &c);
    assert_int_equal(answer(&a, &c), ST_OK);
    for (unsigned i = 0; i < 5; i++) {
        a.store = stores[i];
        assert_string_equal(plain(&a, "k"), i ? prefixes[i] : "-");
    }
    a.store = all;
    for (unsigned i = 0; i < 5; i++)
        store_close(stores[i]);
}

static struct raw lane_key(const char *prefix, unsigned n)
{
    char key[] = "\x02x\x00\x01"
                 "8 bytes."
                 "\x00\x14\x15n";
    key[4] = (char)('A' + n / 26);
    key[5] = (char)('A' + n % 26);
    key[15] = (char)(1 + n % 200);
    return raw_of(prefix, key, 16);
}

/* What processes left that died is cleared by servers, after a week. */
static void old_lanes_are_cleared(void **state)
{
    (void)state;
    enum { LANES = 3000 };
    /* A commit that takes the cluster's versions far beyond a week. */
    assert_true(d->set("version_step", 2 * WEEK_VERSIONS));
    assert_true(d->put((const uint8_t *)"z", 1, (const uint8_t *)"z", 1));
    assert_true(d->set("version_step", 1));
    uint64_t v = (uint64_t)d->version();
    assert_true(v > WEEK_VERSIONS + 1000000000);
    for (unsigned i = 0; i < LANES; i++) {
        uint8_t value[16];
        put_le64(value, i);
        put_le64(value + 8, i % 3 == 0   ? v - WEEK_VERSIONS - 1000000
                             : i % 3 == 1 ? v - WEEK_VERSIONS + 1000000000
                             : i % 2      ? v
                                          : 0);
        struct raw k = lane_key(PREFIX, i % 676);
        k.bytes[k.len++] = (uint8_t)(i / 676);
        assert_true(d->put(k.bytes, k.len, value, 16));
        k = lane_key("other", i % 676);
        k.bytes[k.len++] = (uint8_t)(i / 676);
        if (i < 30)
            assert_true(d->put(k.bytes, k.len, value, 16));
    }
    struct raw odd = raw_of(PREFIX, "\x02x\x00\x01odd", 7), beside = raw_of(PREFIX, "\x02y\x00", 3);
    uint8_t old[16] = {0};
    assert_true(d->put(odd.bytes, odd.len, old, 15));
    assert_true(d->put(beside.bytes, beside.len, old, 16));
    reopen(&(struct store_options){0});
    assert_int_equal(keys_under(PREFIX, "\x02x\x00", 3), LANES + 1);
    reopen(&(struct store_options){.flags = STORE_WAIT});
    assert_int_equal(keys_under(PREFIX, "\x02x\x00", 3), LANES / 3 * 2 + 1);
    assert_int_equal(keys_under(PREFIX, "\x02y\x00", 3), 1);
    assert_int_equal(keys_under("other", "\x02x\x00", 3), 30);
}

/* --- closing ---------------------------------------------------------------------------------- */

/* With all that may be under way by itself: read versions, tickets, their retries. */
static void closing_leaves_nothing(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 6; i++) {
        owner();
        faults(i % 2 ? "down=1" : "grv_ms=500");
        pass(&a, 60);
        struct one_commit c;
        if (!(i % 2)) {
            set_start(&a, &c, "data", "1", "owner", "A");
            assert_int_equal(answer(&a, &c), ST_OK);
            assert_string_equal(own(&a, "data"), "1"); /* begins a renewal */
        }
        uint64_t start = clock_ms();
        store_close(a.store);
        assert_true(clock_ms() - start < 3000);
        a.store = NULL;
        pass(&a, 5);
        faults("down=0,grv_ms=0");
        a.store = open_store(PREFIX, &(struct store_options){0});
    }
    /* Reactors that are freed before what was posted to them ran. */
    owner();
    faults("grv_ms=500");
    assert_int_equal(set_if(&a, "data", "1", "owner", "A"), ST_OK);
    pass(&a, 60);
    assert_string_equal(own(&a, "data"), "1");
}

static void the_library_ends(void **state)
{
    (void)state;
    struct store *store;
    d->reset();
    store_shutdown();
    assert_int_equal(d->count("databases_alive"), 0);
    assert_int_equal(d->count("futures_alive"), 0);
    /* Once for all, and no harm twice. */
    store_shutdown();
    (void)store;
}

/* --- the process of a child ---------------------------------------------------------------------
 */

/* Brings the cluster up once the engine has said that it waits. */
static void *bring_up(void *arg)
{
    const char *log = arg;
    char said_so[4000];
    for (;;) {
        FILE *f = fopen(log, "r");
        size_t n = f ? fread(said_so, 1, sizeof said_so - 1, f) : 0;
        if (f)
            fclose(f);
        said_so[n] = 0;
        if (strstr(said_so, "waiting for FoundationDB"))
            break;
        usleep(10000);
    }
    d->set("down", 0);
    return NULL;
}

static int open_in_child(const char *uri, bool wait)
{
    struct err e = {0};
    struct store_info info;
    char log[] = "/tmp/fdb-engine-test-log-XXXXXX";
    pthread_t thread;
    uint64_t start = clock_ms();
    int out = dup(1);
    if (wait) {
        int fd = mkstemp(log);
        CHECK(fd >= 0 && dup2(fd, 2) == 2);
        CHECK(pthread_create(&thread, NULL, bring_up, log) == 0);
    }
    enum status st =
        store_open(uri, &(struct store_options){.flags = wait ? STORE_WAIT : 0}, &a.store, &e);
    if (wait) {
        char line[600];
        pthread_join(thread, NULL);
        FILE *f = fopen(log, "r");
        while (f && fgets(line, sizeof line, f))
            dprintf(out, "%s", line);
        if (f)
            fclose(f);
        unlink(log);
    }
    if (st) {
        CHECK(!a.store);
        dprintf(out, "%s: %s\ntook %llu s\n", status_text(st), e.text,
                (unsigned long long)(clock_ms() - start) / 1000);
    } else {
        CHECK(reactor_new(&a.reactor, &e) == ST_OK);
        a.env = reactor_env(a.reactor);
        CHECK(store_info(a.store, &info, NULL) == ST_OK);
        dprintf(out, "opened: %s\n", info.engine);
        CHECK(set_if(&a, "k", "v", "k", NULL) == ST_OK);
        CHECK(set_if(&a, "k", "v", "k", "v") == ST_OK);
        dprintf(out, "read: %s\n", plain(&a, "k"));
        store_close(a.store);
        reactor_free(a.reactor);
    }
    store_shutdown();
    if (d && (d->count("violations") || d->count("futures_alive") ||
              d->count("transactions_alive") || d->count("databases_alive"))) {
        dprintf(out, "left over, or: %s\n", d->violation());
        return 1;
    }
    return 0;
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        TEST(happened_is_found_out),
        TEST(lost_is_done_again),
        TEST(several_unknown_in_a_row),
        TEST(late_commits_do_not_overtake),
        TEST(late_commits_are_told_truthfully),
        TEST(settling_lands_late),
        TEST(fenced_commits_never_land),
        TEST(owners_commits_need_one_read_version),
        TEST(a_new_owner_is_noticed),
        TEST(a_new_owner_in_the_same_batch_is_noticed),
        TEST(own_changes_of_the_checked_key),
        TEST(known_versions_that_are_too_old),
        TEST(read_versions_throttle_commits),
        TEST(held_back_background_holds_nothing_else),
        TEST(lanes_are_used_again),
        TEST(own_reads_see_own_commits),
        TEST(plain_reads_are_fresh),
        TEST(own_reads_see_settled_commits),
        TEST(own_reads_see_settled_commits_among_others),
        TEST(runs_are_as_single_gets),
        TEST(ranges_come_in_pieces),
        TEST(errors_of_reads_are_not_told),
        TEST(values_of_others_are_damage),
        TEST(reads_end_in_time),
        TEST(commits_wait_and_the_state_says_so),
        TEST(the_state_stays_without_an_answer),
        TEST(the_state_names_what_limits),
        TEST(armed_then_read_misses_nothing),
        TEST(watches_are_quiet),
        TEST(too_many_watches_fire_too),
        TEST(stopped_watches_never_fire),
        TEST(stopped_watches_do_not_hinder_closing),
        TEST(background_is_of_batch_priority),
        TEST(volumes_have_tags),
        TEST(commits_too_large_are_not_sent),
        TEST(longest_keys_and_values),
        TEST(quota_is_kept),
        TEST(quota_is_kept_by_all_reactors),
        TEST(cluster_files_that_are_no_good),
        TEST(stores_of_other_forms),
        TEST(stores_do_not_see_each_other),
        TEST(old_lanes_are_cleared),
        TEST(closing_leaves_nothing),
        cmocka_unit_test(versions_of_the_library),
        cmocka_unit_test(what_is_wrong_is_one_sentence),
        cmocka_unit_test(the_library_ends),
    };
    void *library = dlopen("libfdb_c.so", RTLD_NOW | RTLD_LOCAL);
    d = library ? dlsym(library, FDB_DOUBLE_SYMBOL) : NULL;
    if (!d) {
        fprintf(stderr, "the libfdb_c that is found is no double: %s\n",
                library ? "it is the real one" : dlerror());
        return 1;
    }
    if (argc > 2 && strcmp(argv[1], "--open") == 0)
        return open_in_child(argv[2], argc > 3 && strcmp(argv[3], "wait") == 0);
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    int fd = mkstemp(cluster_file);
    if (n < 0 || fd < 0 || dprintf(fd, "double:double@127.0.0.1:4500\n") < 0 || fchmod(fd, 0644))
        return 1;
    close(fd);
    log_set_level((enum log_level)(LOG_LEVEL_ERROR + 1));
    if (getenv("ONLY"))
        cmocka_set_test_filter(getenv("ONLY"));
    else
        children_start();
    int rc = cmocka_run_group_tests_name("fdb_engine", tests, NULL, NULL);
    unlink(cluster_file);
    return rc;
}
