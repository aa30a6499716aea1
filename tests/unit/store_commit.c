/* Commits, checks, ranges, bodies, reservations and opening of the embedded store. */
#include <fcntl.h>
#include <sys/wait.h>

#include "store_test.h"

static int begin(void **state)
{
    return test_begin(state, false);
}

static int begin_own_cache(void **state)
{
    return test_begin(state, true);
}

static void test_set_get_clear(void **state)
{
    struct test_store *t = *state;
    test_expect(t, "a", NULL);
    assert_int_equal(test_set(t, "a", "one"), ST_OK);
    assert_int_equal(test_set(t, "b", ""), ST_OK);
    test_expect(t, "a", "one");
    test_expect(t, "b", "");
    assert_int_equal(test_set(t, "a", "two"), ST_OK);
    test_expect(t, "a", "two");
    struct store_mutation m = {.kind = STORE_CLEAR, .key = text("a")};
    assert_int_equal(test_commit(t, NULL, 0, &m, 1), ST_OK);
    test_expect(t, "a", NULL);
    assert_int_equal(test_commit(t, NULL, 0, &m, 1), ST_OK);
}

static void test_survives_reopening(void **state)
{
    struct test_store *t = *state;
    assert_int_equal(test_set(t, "kept", "value"), ST_OK);
    store_close(t->store);
    test_store_reopen(t);
    test_expect(t, "kept", "value");
}

static void test_mutations_in_order(void **state)
{
    struct test_store *t = *state;
    struct store_mutation m[] = {
        {.kind = STORE_SET, .key = text("k1"), .head = text("x")},
        {.kind = STORE_SET, .key = text("k2"), .head = text("y")},
        {.kind = STORE_CLEAR_RANGE, .key = text("k"), .head = text("l")},
        {.kind = STORE_SET, .key = text("k1"), .head = text("z")},
        {.kind = STORE_SET, .key = text("l"), .head = text("outside")},
    };
    assert_int_equal(test_commit(t, NULL, 0, m, 5), ST_OK);
    test_expect(t, "k1", "z");
    test_expect(t, "k2", NULL);
    test_expect(t, "l", "outside");
}

static void test_checks(void **state)
{
    struct test_store *t = *state;
    struct store_mutation m = {.kind = STORE_SET, .key = text("k"), .head = text("v")};
    struct store_mutation late = {.kind = STORE_SET, .key = text("late"), .head = text("v")};
    struct store_check absent = {STORE_CHECK_ABSENT, text("k"), text("")};
    struct store_check is_v = {STORE_CHECK_VALUE, text("k"), text("v")};
    struct store_check is_w = {STORE_CHECK_VALUE, text("k"), text("w")};
    struct store_check empty = {STORE_CHECK_EMPTY, text("j"), text("k")};
    struct store_check not_empty = {STORE_CHECK_EMPTY, text("j"), text("l")};
    assert_int_equal(test_commit(t, &is_v, 1, &m, 1), ST_CONFLICT);
    test_expect(t, "k", NULL);
    assert_int_equal(test_commit(t, &absent, 1, &m, 1), ST_OK);
    assert_int_equal(test_commit(t, &absent, 1, &late, 1), ST_CONFLICT);
    assert_int_equal(test_commit(t, &is_w, 1, &late, 1), ST_CONFLICT);
    assert_int_equal(test_commit(t, &not_empty, 1, &late, 1), ST_CONFLICT);
    test_expect(t, "late", NULL);
    assert_int_equal(test_commit(t, &empty, 1, &late, 1), ST_OK);
    assert_int_equal(test_commit(t, &is_v, 1, &late, 1), ST_OK);
    test_expect(t, "late", "v");
}

/* Many commits in one transaction: each counts up from what it expects; wrong ones between
 * them are refused alone. */
static void test_group_order_and_isolation(void **state)
{
    struct test_store *t = *state;
    enum { N = 200 };
    static struct test_commit c[N];
    static struct store_check checks[N];
    static struct store_mutation m[N];
    static char from[N][16], to[N][16];
    assert_int_equal(test_set(t, "n", "0"), ST_OK);
    int value = 0;
    for (int i = 0; i < N; i++) {
        bool wrong = i % 3 == 1;
        snprintf(from[i], sizeof from[i], "%d", wrong ? value + 1 : value);
        snprintf(to[i], sizeof to[i], "%d", value + 1);
        if (!wrong)
            value++;
        checks[i] = (struct store_check){STORE_CHECK_VALUE, text("n"), text(from[i])};
        m[i] = (struct store_mutation){.kind = STORE_SET, .key = text("n"), .head = text(to[i])};
        c[i].commit = (struct store_commit){
            .checks = &checks[i], .n_checks = 1, .mutations = &m[i], .n_mutations = 1};
    }
    for (int i = 0; i < N; i++)
        test_commit_start(t, &c[i]);
    for (int i = 0; i < N; i++) {
        test_env_until(&t->env, &c[i].done);
        assert_int_equal(c[i].st, i % 3 == 1 ? ST_CONFLICT : ST_OK);
    }
    char last[16];
    snprintf(last, sizeof last, "%d", value);
    test_expect(t, "n", last);
}

static void test_limits_are_refused(void **state)
{
    struct test_store *t = *state;
    uint8_t *big = mem_zalloc(2u << 20);
    struct store_mutation m[2] = {{.kind = STORE_SET, .key = text("fine"), .head = text("x")},
                                  {.kind = STORE_SET, .key = {big, 512}}};
    assert_int_equal(test_commit(t, NULL, 0, m, 2), ST_INVAL);
    m[1].key.len = 0;
    assert_int_equal(test_commit(t, NULL, 0, m, 2), ST_INVAL);
    m[1] = (struct store_mutation){STORE_SET, text("k"), {big, 65537}, {NULL, 0}};
    assert_int_equal(test_commit(t, NULL, 0, m, 2), ST_INVAL);
    m[1] = (struct store_mutation){STORE_SET, text("k"), {big, 1}, {big, (1u << 20) + 1}};
    assert_int_equal(test_commit(t, NULL, 0, m, 2), ST_INVAL);
    test_expect(t, "fine", NULL);
    m[1] = (struct store_mutation){STORE_SET, {big, 511}, {big, 65536}, {big, 1u << 20}};
    assert_int_equal(test_commit(t, NULL, 0, m, 2), ST_OK);
    free(big);
}

static void range_expect(struct test_store *t, const char *from, const char *to, uint32_t limit,
                         bool reverse, const char *want, bool more)
{
    struct store_range range = {
        .begin = text(from), .end = text(to), .limit = limit, .reverse = reverse};
    struct test_read r = {.read = {.ranges = &range, .n_ranges = 1}};
    assert_int_equal(test_read(t, &r), ST_OK);
    assert_int_equal(range.n_pairs, strlen(want));
    for (uint32_t i = 0; i < range.n_pairs; i++) {
        assert_int_equal(range.pairs[i].key.len, 1);
        assert_memory_equal(range.pairs[i].key.data, want + i, 1);
        assert_memory_equal(range.pairs[i].head.data, want + i, 1);
    }
    assert_int_equal(range.more, more);
    store_read_release(&r.read);
}

static void test_ranges(void **state)
{
    struct test_store *t = *state;
    range_expect(t, "a", "z", 10, false, "", false);
    range_expect(t, "a", "z", 10, true, "", false);
    for (const char *k = "bdfhj"; *k; k++) {
        char key[2] = {*k, 0};
        assert_int_equal(test_set(t, key, key), ST_OK);
    }
    range_expect(t, "a", "z", 10, false, "bdfhj", false);
    range_expect(t, "a", "z", 10, true, "jhfdb", false);
    range_expect(t, "", "z", 5, false, "bdfhj", false);
    range_expect(t, "b", "j", 10, false, "bdfh", false);
    range_expect(t, "b", "j", 10, true, "hfdb", false);
    range_expect(t, "c", "i", 2, false, "df", true);
    range_expect(t, "c", "i", 2, true, "hf", true);
    range_expect(t, "c", "i", 3, true, "hfd", false);
    range_expect(t, "e", "e", 10, false, "", false);
    range_expect(t, "k", "z", 10, true, "", false);
    range_expect(t, "a", "b", 10, true, "", false);
}

/* Bodies of every kind of length, overwritten many times, against an array. */
static void test_bodies_model(void **state)
{
    struct test_store *t = *state;
    enum { KEYS = 60, STEPS = 400 };
    struct chance chance = chance_begin("bodies");
    uint8_t *bodies[KEYS] = {0};
    uint32_t lens[KEYS] = {0};
    uint8_t *got = mem_alloc_aligned(4096, 1u << 20);
    for (int step = 0; step < STEPS; step++) {
        struct store_mutation m[8];
        char keys[8][8];
        size_t n = 1 + chance_below(&chance, 8), key = chance_below(&chance, KEYS - 8);
        for (size_t i = 0; i < n; i++, key++) {
            snprintf(keys[i], sizeof keys[i], "key%02zu", key);
            free(bodies[key]);
            bodies[key] = NULL;
            lens[key] = 0;
            m[i] = (struct store_mutation){.kind = STORE_CLEAR, .key = text(keys[i])};
            if (chance_below(&chance, 5) == 0)
                continue;
            lens[key] =
                (uint32_t)(1 + chance_below(&chance, chance_below(&chance, 10) ? 20000 : 1u << 20));
            bodies[key] = mem_alloc(lens[key]);
            chance_fill(&chance, bodies[key], lens[key] < 64 ? lens[key] : 64);
            memset(bodies[key] + (lens[key] < 64 ? lens[key] : 64), (int)chance_u64(&chance),
                   lens[key] < 64 ? 0 : lens[key] - 64);
            m[i] = (struct store_mutation){.kind = STORE_SET,
                                           .key = text(keys[i]),
                                           .head = text("head"),
                                           .body = {bodies[key], lens[key]}};
        }
        assert_int_equal(test_commit(t, NULL, 0, m, n), ST_OK);
        if (step % 16)
            continue;
        for (size_t k = 0; k < KEYS; k++) {
            char name[8];
            snprintf(name, sizeof name, "key%02zu", k);
            struct store_get get = {.key = text(name), .body = got, .body_cap = 1u << 20};
            struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
            assert_int_equal(test_read(t, &r), ST_OK);
            assert_int_equal(get.st, bodies[k] ? ST_OK : ST_NOTFOUND);
            assert_int_equal(get.body_len, lens[k]);
            if (bodies[k])
                assert_memory_equal(got, bodies[k], lens[k]);
            store_read_release(&r.read);
        }
    }
    struct store_info info;
    struct err e = {0};
    assert_int_equal(store_info(t->store, &info, &e), ST_OK);
    uint64_t keys_found, bytes, sum = 0;
    assert_int_equal(store_usage(t->store, text("k"), text("l"), &keys_found, &bytes, &e), ST_OK);
    uint64_t live = 0;
    for (size_t k = 0; k < KEYS; k++) {
        live += bodies[k] != NULL;
        sum += round_up_u64(lens[k], 4096);
        free(bodies[k]);
    }
    assert_int_equal(keys_found, live);
    assert_true(bytes >= sum && bytes < sum + 200 * live + 1);
    free(got);
}

/* One read call for many bodies that lie side by side, some read without their body, some into
 * memory that is not aligned. */
static void test_many_gets_at_once(void **state)
{
    struct test_store *t = *state;
    enum { N = 300, ROOM = 8192 };
    static struct store_mutation m[N];
    static struct store_get gets[N];
    static char names[N][8];
    uint8_t *bodies = mem_alloc(N * 5000), *got = mem_alloc_aligned(4096, N * ROOM);
    struct chance chance = chance_begin("gets");
    chance_fill(&chance, bodies, N * 5000);
    for (size_t i = 0; i < N; i++) {
        snprintf(names[i], sizeof names[i], "k%03zu", i);
        m[i] = (struct store_mutation){
            STORE_SET, text(names[i]), text("h"), {bodies + 5000 * i, 1 + i * 16}};
        gets[i] = (struct store_get){.key = text(names[i]),
                                     .body = i % 7 ? got + ROOM * i + (i % 3 == 2) : NULL,
                                     .body_cap = i == 100 ? 10 : ROOM - (i % 3 == 2)};
    }
    assert_int_equal(test_commit(t, NULL, 0, m, N), ST_OK);
    struct test_read r = {.read = {.gets = gets, .n_gets = N}};
    assert_int_equal(test_read(t, &r), ST_OK);
    for (size_t i = 0; i < N; i++) {
        assert_int_equal(gets[i].body_len, 1 + i * 16);
        assert_int_equal(gets[i].st, i == 100 ? ST_IO : ST_OK);
        if (i % 7 && i != 100)
            assert_memory_equal(got + ROOM * i + (i % 3 == 2), bodies + 5000 * i, 1 + i * 16);
    }
    store_read_release(&r.read);
    free(bodies);
    free(got);
}

static void test_reservations(void **state)
{
    struct test_store *t = *state;
    assert_int_equal(store_body_cost(t->store, 1), 4096);
    assert_int_equal(store_body_cost(t->store, 4096), 4096);
    assert_int_equal(test_reserve(t, 1u << 20, 10), ST_OK);
    /* The engine makes more room than was asked for, so this one does not wait. */
    struct store_reservation small = {1u << 20, 1};
    assert_true(store_reserve(t->store, small));
    store_unreserve(t->store, small);
    uint8_t *body = mem_zalloc(1u << 20);
    struct store_mutation m = {STORE_SET, text("k"), text("h"), {body, 1u << 20}};
    struct test_commit c = {.commit = {.mutations = &m, .n_mutations = 1, .reserved = true}};
    test_commit_start(t, &c);
    test_env_until(&t->env, &c.done);
    assert_int_equal(c.st, ST_OK);
    store_unreserve(t->store, (struct store_reservation){1u << 20, 10});
    assert_int_equal(test_reserve(t, 1ull << 50, 1), ST_NOSPC);
    free(body);
}

static void test_opening(void **state)
{
    struct test_store *t = *state;
    struct store *other;
    struct err e = {0};
    assert_int_equal(store_open(t->uri, &(struct store_options){.lease_ms = LEASE_MS}, &other, &e), ST_BUSY);
    assert_null(other);
    assert_int_equal(store_open("lmdb:/nonexistent/folder", &(struct store_options){.lease_ms = LEASE_MS}, &other, &e), ST_NOTFOUND);
    assert_non_null(strstr(e.text, "/nonexistent/folder"));
    assert_int_equal(store_open("tape:/dev/st0", &(struct store_options){.lease_ms = LEASE_MS}, &other, &e), ST_INVAL);
    assert_non_null(strstr(e.text, "lmdb:DIRECTORY"));
    assert_int_equal(store_open("lmdb:", &(struct store_options){.lease_ms = LEASE_MS}, &other, &e), ST_INVAL);

    char empty[] = "/tmp/store-empty-XXXXXX", uri[64], path[64];
    assert_non_null(mkdtemp(empty));
    snprintf(uri, sizeof uri, "lmdb:%s", empty);
    assert_int_equal(store_open(uri, &(struct store_options){.lease_ms = LEASE_MS}, &other, &e), ST_NOTFOUND);
    assert_int_equal(rmdir(empty), 0); /* nothing was made in it */
    assert_int_equal(mkdir(empty, 0770), 0);
    assert_int_equal(chmod(empty, 0770), 0);
    assert_int_equal(store_open(uri, &(struct store_options){.flags = STORE_CREATE, .lease_ms = LEASE_MS}, &other, &e), ST_OK);
    store_close(other);
    const char *files[] = {"data.mdb", "lock.mdb", "blocks", "processes", "bell"};
    for (size_t i = 0; i < 5; i++) {
        struct stat sb;
        snprintf(path, sizeof path, "%s/%s", empty, files[i]);
        assert_int_equal(stat(path, &sb), 0);
        assert_int_equal(sb.st_mode & 0777, 0660);
    }
    assert_int_equal(store_open(uri, &(struct store_options){.lease_ms = LEASE_MS}, &other, &e), ST_OK);
    store_close(other);
    snprintf(path, sizeof path, "%s/blocks", empty);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(store_open(uri, &(struct store_options){.lease_ms = LEASE_MS}, &other, &e), ST_FORMAT);
    assert_non_null(strstr(e.text, "blocks"));
    test_folder_remove(empty);
}

struct watched {
    struct store_watch watch;
    bool fired;
};

static void watch_fired(struct store_watch *watch)
{
    container_of(watch, struct watched, watch)->fired = true;
}

static void test_watch_own_commits(void **state)
{
    struct test_store *t = *state;
    struct watched a = {.watch = {.key = text("a"), .fired = watch_fired}};
    struct watched b = {.watch = {.key = text("b"), .fired = watch_fired}};
    struct watched c = {.watch = {.key = text("c"), .fired = watch_fired}};
    assert_int_equal(test_set(t, "b", "same"), ST_OK);
    store_watch(t->store, &t->env.env, &a.watch);
    store_watch(t->store, &t->env.env, &b.watch);
    store_watch(t->store, &t->env.env, &c.watch);
    assert_int_equal(test_set(t, "a", "x"), ST_OK);
    test_env_until(&t->env, &a.fired);
    assert_false(b.fired);
    struct store_mutation m = {.kind = STORE_CLEAR_RANGE, .key = text("b"), .head = text("c")};
    assert_int_equal(test_commit(t, NULL, 0, &m, 1), ST_OK);
    test_env_until(&t->env, &b.fired);
    /* Stopped after it was posted and before it ran. */
    struct store_mutation set_c = {.kind = STORE_SET, .key = text("c"), .head = text("x")};
    struct test_commit commit = {.commit = {.mutations = &set_c, .n_mutations = 1}};
    test_commit_start(t, &commit);
    usleep(100000);
    store_watch_stop(&c.watch);
    memset(&c.watch, 0xff, sizeof c.watch); /* it may be freed now */
    test_env_until(&t->env, &commit.done);
    while (test_env_step(&t->env, 50))
        ;
    assert_false(c.fired);
    store_watch_stop(&a.watch);
}

static void test_sessions(void **state)
{
    struct test_store *t = *state;
    uint8_t id[16] = "session-number-", other[16] = "another-session";
    struct err e = {0};
    assert_int_equal(store_session_probe(t->store, id), STORE_SESSION_DEAD);
    assert_int_equal(store_session_begin(t->store, id, &e), ST_OK);
    assert_int_equal(store_session_probe(t->store, id), STORE_SESSION_ALIVE);
    store_session_end(t->store, id);
    assert_int_equal(store_session_probe(t->store, id), STORE_SESSION_DEAD);
    assert_int_equal(store_session_kill(t->store, other, &e), ST_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_set_get_clear, begin, test_end),
        cmocka_unit_test_setup_teardown(test_survives_reopening, begin, test_end),
        cmocka_unit_test_setup_teardown(test_mutations_in_order, begin, test_end),
        cmocka_unit_test_setup_teardown(test_checks, begin, test_end),
        cmocka_unit_test_setup_teardown(test_group_order_and_isolation, begin, test_end),
        cmocka_unit_test_setup_teardown(test_limits_are_refused, begin, test_end),
        cmocka_unit_test_setup_teardown(test_ranges, begin, test_end),
        cmocka_unit_test_setup_teardown(test_bodies_model, begin, test_end),
        cmocka_unit_test_setup_teardown(test_many_gets_at_once, begin, test_end),
        {"test_bodies_model past the page cache", test_bodies_model, begin_own_cache,
         test_end, NULL},
        {"test_many_gets_at_once past the page cache", test_many_gets_at_once, begin_own_cache,
         test_end, NULL},
        cmocka_unit_test_setup_teardown(test_reservations, begin, test_end),
        cmocka_unit_test_setup_teardown(test_opening, begin, test_end),
        cmocka_unit_test_setup_teardown(test_watch_own_commits, begin, test_end),
        cmocka_unit_test_setup_teardown(test_sessions, begin, test_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
