/*
 * The double of FoundationDB's client library (tests/fdb), against what the real one does.
 *
 * The first part holds for both: with FDB_TEST_LIBRARY (the real libfdb_c.so) and
 * FDB_TEST_CLUSTER_FILE (a cluster that nothing else uses) set, it runs against those, which
 * is how one sees that the double behaves like the real thing. The second part is about
 * faults and about what only the double can do.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "chance.h"
#include "test.h"
#include "../fdb/c_api.h"
#include "../fdb/double.h"

/* clang-format off */
#define FUNCTIONS(X)                                                                               \
    X(fdb_select_api_version_impl)                                                                 \
    X(fdb_get_max_api_version)                                                                     \
    X(fdb_get_client_version)                                                                      \
    X(fdb_get_error)                                                                               \
    X(fdb_error_predicate)                                                                         \
    X(fdb_network_set_option)                                                                      \
    X(fdb_setup_network)                                                                           \
    X(fdb_run_network)                                                                             \
    X(fdb_stop_network)                                                                            \
    X(fdb_create_database)                                                                         \
    X(fdb_database_destroy)                                                                        \
    X(fdb_database_set_option)                                                                     \
    X(fdb_database_get_main_thread_busyness)                                                       \
    X(fdb_database_get_server_protocol)                                                            \
    X(fdb_database_create_transaction)                                                             \
    X(fdb_transaction_destroy)                                                                     \
    X(fdb_transaction_cancel)                                                                      \
    X(fdb_transaction_reset)                                                                       \
    X(fdb_transaction_set_option)                                                                  \
    X(fdb_transaction_set_read_version)                                                            \
    X(fdb_transaction_get_read_version)                                                            \
    X(fdb_transaction_get)                                                                         \
    X(fdb_transaction_get_range)                                                                   \
    X(fdb_transaction_watch)                                                                       \
    X(fdb_transaction_get_estimated_range_size_bytes)                                              \
    X(fdb_transaction_get_range_split_points)                                                      \
    X(fdb_transaction_get_approximate_size)                                                        \
    X(fdb_transaction_set)                                                                         \
    X(fdb_transaction_atomic_op)                                                                   \
    X(fdb_transaction_clear)                                                                       \
    X(fdb_transaction_clear_range)                                                                 \
    X(fdb_transaction_add_conflict_range)                                                          \
    X(fdb_transaction_commit)                                                                      \
    X(fdb_transaction_get_committed_version)                                                       \
    X(fdb_transaction_on_error)                                                                    \
    X(fdb_future_destroy)                                                                          \
    X(fdb_future_cancel)                                                                           \
    X(fdb_future_release_memory)                                                                   \
    X(fdb_future_is_ready)                                                                         \
    X(fdb_future_block_until_ready)                                                                \
    X(fdb_future_set_callback)                                                                     \
    X(fdb_future_get_error)                                                                        \
    X(fdb_future_get_int64)                                                                        \
    X(fdb_future_get_uint64)                                                                       \
    X(fdb_future_get_value)                                                                        \
    X(fdb_future_get_keyvalue_array)                                                               \
    X(fdb_future_get_key_array)
/* clang-format on */

static struct {
#define X(name) __typeof__(name) *name;
    FUNCTIONS(X)
#undef X
} f;

enum option {
    NO_CONFLICT = 30,
    RYW_DISABLE = 51,
    PRIORITY_BATCH = 201,
    ACCESS_SYSTEM_KEYS = 301,
    TIMEOUT = 500,
    RETRY_LIMIT = 501,
    MAX_RETRY_DELAY = 502,
    SIZE_LIMIT = 503,
    READ_PRIORITY_LOW = 510,
    TAG = 800,
};

enum { WANT_ALL = -2, ITERATOR = -1, EXACT = 0, SMALL = 1, SERIAL = 4 };
enum { ADD = 2, OR = 7, MAX = 12, BYTE_MAX = 17, COMPARE_AND_CLEAR = 20 };
enum { READ, WRITE };

static const struct fdb_double *d; /* NULL: the real library */
static const char *cluster_file;
static pthread_t network;
static FDBDatabase *db;

#define K(text) ((const uint8_t *)(text)), ((int)(sizeof(text) - 1))
#define PREFIX "double-test/"

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static FDBTransaction *begin(void)
{
    FDBTransaction *t;
    assert_int_equal(f.fdb_database_create_transaction(db, &t), 0);
    return t;
}

/* Waits; the error. The future stays. */
static fdb_error_t wait_for(FDBFuture *x)
{
    assert_int_equal(f.fdb_future_block_until_ready(x), 0);
    assert_true(f.fdb_future_is_ready(x));
    return f.fdb_future_get_error(x);
}

/* Waits; the error. The future is gone. */
static fdb_error_t done(FDBFuture *x)
{
    fdb_error_t error = wait_for(x);
    f.fdb_future_destroy(x);
    return error;
}

static fdb_error_t commit(FDBTransaction *t)
{
    return done(f.fdb_transaction_commit(t));
}

static void set(FDBTransaction *t, const char *key, const char *value)
{
    f.fdb_transaction_set(t, (const uint8_t *)key, (int)strlen(key), (const uint8_t *)value,
                          (int)strlen(value));
}

static void clear(FDBTransaction *t, const char *begin_key, const char *end_key)
{
    f.fdb_transaction_clear_range(t, (const uint8_t *)begin_key, (int)strlen(begin_key),
                                  (const uint8_t *)end_key, (int)strlen(end_key));
}

static FDBFuture *ask(FDBTransaction *t, const char *key, bool snapshot)
{
    return f.fdb_transaction_get(t, (const uint8_t *)key, (int)strlen(key), snapshot);
}

/* The value as a string in a static buffer; NULL: none. Errors end the test. */
static const char *value_of(FDBFuture *x)
{
    static char text[256];
    fdb_bool_t present;
    const uint8_t *value;
    int len;
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_value(x, &present, &value, &len), 0);
    if (present) {
        assert_true(len < (int)sizeof text);
        memcpy(text, value, (size_t)len);
        text[len] = 0;
    }
    f.fdb_future_destroy(x);
    return present ? text : NULL;
}

static const char *get(FDBTransaction *t, const char *key)
{
    return value_of(ask(t, key, false));
}

/* Commits, with retries where that is harmless: all writes of these tests are blind sets. */
static void commit_surely(FDBTransaction *t)
{
    assert_int_equal(commit(t), 0);
    f.fdb_transaction_destroy(t);
}

static void put(const char *key, const char *value)
{
    FDBTransaction *t = begin();
    set(t, key, value);
    commit_surely(t);
}

static void put_bytes(FDBTransaction *t, const char *key, size_t len, int fill)
{
    uint8_t *value = malloc(len ? len : 1);
    memset(value, fill, len);
    f.fdb_transaction_set(t, (const uint8_t *)key, (int)strlen(key), value, (int)len);
    free(value);
}

static int64_t read_version(FDBTransaction *t)
{
    int64_t version;
    FDBFuture *x = f.fdb_transaction_get_read_version(t);
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_int64(x, &version), 0);
    f.fdb_future_destroy(x);
    return version;
}

static void option_number(FDBTransaction *t, int option, int64_t value)
{
    assert_int_equal(f.fdb_transaction_set_option(t, option, (const uint8_t *)&value, sizeof value),
                     0);
}

struct pairs {
    FDBFuture *future;
    const FDBKeyValue *items;
    int n;
    fdb_bool_t more;
};

static FDBFuture *ask_range(FDBTransaction *t, const char *begin_key, bool begin_after,
                            const char *end_key, int limit, int bytes, int mode, int iteration,
                            bool reverse)
{
    return f.fdb_transaction_get_range(t, (const uint8_t *)begin_key, (int)strlen(begin_key),
                                       begin_after, 1, (const uint8_t *)end_key,
                                       (int)strlen(end_key), 0, 1, limit, bytes, mode, iteration, 0,
                                       reverse);
}

static struct pairs pairs_of(FDBFuture *x)
{
    struct pairs p = {.future = x};
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_keyvalue_array(x, &p.items, &p.n, &p.more), 0);
    return p;
}

static void assert_key(const struct pairs *p, int i, const char *key)
{
    assert_true(i < p->n);
    assert_int_equal(p->items[i].key_length, strlen(key));
    assert_memory_equal(p->items[i].key, key, strlen(key));
}

static int empty(void **state)
{
    (void)state;
    if (d)
        d->reset();
    FDBTransaction *t = begin();
    clear(t, PREFIX, "double-test0");
    commit_surely(t);
    return 0;
}

/* Nothing is left behind, and nothing was done that must not be done. */
static int clean(void **state)
{
    (void)state;
    if (!d)
        return 0;
    d->set("down", 0);
    assert_true(d->settle(5000));
    assert_int_equal(d->count("futures_alive"), 0);
    assert_int_equal(d->count("transactions_alive"), 0);
    return 0;
}

/* --- before the network, and its start --------------------------------------------------- */

static void *run_network(void *unused)
{
    (void)unused;
    return (void *)(intptr_t)f.fdb_run_network();
}

static int load(void **state)
{
    (void)state;
    const char *path = getenv("FDB_TEST_LIBRARY");
    cluster_file = getenv("FDB_TEST_CLUSTER_FILE");
    bool real = path && cluster_file;
    void *lib = dlopen(real ? path : "libfdb_c.so", RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
        print_error("%s\n", dlerror());
        return -1;
    }
#define X(name)                                                                                    \
    *(void **)&f.name = dlsym(lib, #name);                                                         \
    if (!f.name)                                                                                   \
        return -1;
    FUNCTIONS(X)
#undef X
    d = dlsym(lib, FDB_DOUBLE_SYMBOL);
    if (!real) {
        static char path_of_file[] = "/tmp/fdb-double-XXXXXX";
        int fd = mkstemp(path_of_file);
        static const char text[] = "# for a test\ntest:test@127.0.0.1:4500\n";
        if (fd < 0 || write(fd, text, sizeof text - 1) != sizeof text - 1)
            return -1;
        close(fd);
        cluster_file = path_of_file;
    }
    return real == (d == NULL) ? 0 : -1;
}

static void test_version_is_selected_once(void **state)
{
    (void)state;
    int max = f.fdb_get_max_api_version();
    assert_int_equal(f.fdb_select_api_version_impl(max + 10, max + 10), 2203);
    assert_int_equal(f.fdb_select_api_version_impl(max, max - 10), 2202);
    assert_int_equal(f.fdb_select_api_version_impl(max, max), 0);
    assert_int_equal(f.fdb_select_api_version_impl(max, max), 2201);
}

static void test_nothing_works_before_the_network(void **state)
{
    (void)state;
    assert_int_equal(f.fdb_run_network(), 2008);
    assert_int_equal(f.fdb_stop_network(), 2008);
    assert_int_equal(f.fdb_create_database(cluster_file, &db), 2008);
    assert_int_equal(f.fdb_network_set_option(7777, NULL, 0), 2007);
    assert_int_equal(f.fdb_setup_network(), 0);
    assert_int_equal(f.fdb_setup_network(), 2009);
    assert_int_equal(pthread_create(&network, NULL, run_network, NULL), 0);
    assert_int_equal(f.fdb_create_database(cluster_file, &db), 0);
}

static void cluster_file_error(const char *path, fdb_error_t error)
{
    FDBDatabase *bad;
    FDBTransaction *t;
    assert_int_equal(f.fdb_create_database(path, &bad), 0);
    assert_int_equal(f.fdb_database_create_transaction(bad, &t), 0);
    assert_int_equal(done(ask(t, "a", false)), error);
    assert_int_equal(done(f.fdb_transaction_get_read_version(t)), error);
    f.fdb_transaction_set(t, K("a"), K("b"));
    assert_int_equal(commit(t), error);
    assert_int_equal(done(f.fdb_transaction_on_error(t, error)), error);
    assert_int_equal(done(f.fdb_database_get_server_protocol(bad, 0)), error);
    f.fdb_transaction_destroy(t);
    f.fdb_database_destroy(bad);
}

static void test_cluster_file_errors_come_with_the_first_answer(void **state)
{
    (void)state;
    cluster_file_error("/nonexistent/fdb.cluster", 1515);
    char path[] = "/tmp/fdb-double-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, "garbage\n", 8), 8);
    close(fd);
    cluster_file_error(path, 2104);
    unlink(path);
}

static void test_errors_are_classed(void **state)
{
    (void)state;
    static const struct {
        fdb_error_t code;
        bool maybe, not_committed;
    } cases[] = {{1007, 0, 1}, {1009, 0, 1}, {1020, 0, 1}, {1021, 1, 0}, {1025, 0, 0},
                 {1031, 0, 0}, {1037, 0, 1}, {1038, 0, 1}, {1039, 1, 0}, {1042, 0, 1},
                 {1051, 0, 1}, {1078, 0, 1}, {1101, 0, 0}, {1213, 0, 1}, {1223, 0, 1},
                 {2017, 0, 0}, {2101, 0, 0}, {2103, 0, 0}, {1500, 0, 0}, {0, 0, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fdb_error_t code = cases[i].code;
        assert_int_equal(f.fdb_error_predicate(50000, code),
                         cases[i].maybe || cases[i].not_committed);
        assert_int_equal(f.fdb_error_predicate(50001, code), cases[i].maybe);
        assert_int_equal(f.fdb_error_predicate(50002, code), cases[i].not_committed);
    }
    assert_string_equal(f.fdb_get_error(1020),
                        "Transaction not committed due to conflict with another transaction");
    assert_string_equal(f.fdb_get_error(99999), "An unknown error occurred");
}

static void test_protocol_is_that_of_the_client(void **state)
{
    (void)state;
    char text[32];
    uint64_t protocol;
    FDBFuture *x = f.fdb_database_get_server_protocol(db, 0);
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_uint64(x, &protocol), 0);
    f.fdb_future_destroy(x);
    snprintf(text, sizeof text, "%llx", (unsigned long long)protocol & 0xfffffffffffffffull);
    const char *version = f.fdb_get_client_version();
    assert_string_equal(strrchr(version, ',') + 1, text);
    assert_true(f.fdb_database_get_main_thread_busyness(db) >= 0);
}

/* --- reads and writes --------------------------------------------------------------------- */

static void test_values_are_kept(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    assert_null(get(t, PREFIX "a"));
    set(t, PREFIX "a", "1");
    set(t, PREFIX "empty", "");
    int64_t version = 0;
    assert_int_equal(f.fdb_transaction_get_committed_version(t, &version), 0);
    assert_int_equal(version, -1);
    int64_t before = read_version(t);
    assert_int_equal(commit(t), 0);
    assert_int_equal(f.fdb_transaction_get_committed_version(t, &version), 0);
    assert_true(version > before);
    f.fdb_transaction_reset(t);
    assert_true(read_version(t) >= version);
    assert_string_equal(get(t, PREFIX "a"), "1");
    assert_string_equal(get(t, PREFIX "empty"), "");
    assert_null(get(t, PREFIX "aa"));
    f.fdb_transaction_clear(t, K(PREFIX "a"));
    assert_int_equal(commit(t), 0);
    f.fdb_transaction_reset(t);
    assert_null(get(t, PREFIX "a"));
    f.fdb_transaction_destroy(t);
}

static void test_own_writes_are_read(void **state)
{
    (void)state;
    put(PREFIX "b", "stored");
    put(PREFIX "d", "stored");
    put(PREFIX "f", "stored");
    FDBTransaction *t = begin();
    set(t, PREFIX "a", "own");
    set(t, PREFIX "b", "own");
    clear(t, PREFIX "c", PREFIX "e");
    set(t, PREFIX "d1", "own");
    FDBFuture *early = ask(t, PREFIX "f", false);
    FDBFuture *early_range = ask_range(t, PREFIX, false, PREFIX "z", 100, 0, EXACT, 0, false);
    set(t, PREFIX "f", "later");
    assert_string_equal(value_of(early), "stored"); /* as of when it was asked */
    struct pairs p = pairs_of(early_range);
    assert_int_equal(p.n, 4);
    assert_key(&p, 0, PREFIX "a");
    assert_key(&p, 1, PREFIX "b");
    assert_key(&p, 2, PREFIX "d1");
    assert_key(&p, 3, PREFIX "f");
    assert_memory_equal(p.items[1].value, "own", 3);
    assert_memory_equal(p.items[3].value, "stored", 6);
    f.fdb_future_destroy(p.future);
    assert_string_equal(get(t, PREFIX "b"), "own");
    assert_null(get(t, PREFIX "d"));
    assert_string_equal(value_of(ask(t, PREFIX "f", true)), "later");
    p = pairs_of(ask_range(t, PREFIX, false, PREFIX "z", 100, 0, EXACT, 0, true));
    assert_int_equal(p.n, 4);
    assert_key(&p, 0, PREFIX "f");
    assert_key(&p, 3, PREFIX "a");
    f.fdb_future_destroy(p.future);
    assert_int_equal(commit(t), 0);
    f.fdb_transaction_reset(t);
    p = pairs_of(ask_range(t, PREFIX, false, PREFIX "z", 0, 0, WANT_ALL, 0, false));
    assert_int_equal(p.n, 4);
    f.fdb_future_destroy(p.future);
    f.fdb_transaction_destroy(t);
}

static void test_without_own_writes(void **state)
{
    (void)state;
    put(PREFIX "a", "stored");
    FDBTransaction *t = begin();
    assert_int_equal(f.fdb_transaction_set_option(t, RYW_DISABLE, NULL, 0), 0);
    set(t, PREFIX "a", "own");
    assert_string_equal(get(t, PREFIX "a"), "stored");
    assert_int_equal(done(f.fdb_transaction_watch(t, K(PREFIX "a"))), 1034);
    f.fdb_transaction_destroy(t);
}

static void test_reads_are_as_of_one_version(void **state)
{
    (void)state;
    put(PREFIX "a", "old");
    put(PREFIX "b", "old");
    FDBTransaction *t = begin();
    int64_t version = read_version(t);
    put(PREFIX "a", "new");
    FDBTransaction *u = begin();
    clear(u, PREFIX "b", PREFIX "c");
    commit_surely(u);
    assert_string_equal(get(t, PREFIX "a"), "old");
    struct pairs p = pairs_of(ask_range(t, PREFIX, false, PREFIX "z", 0, 0, WANT_ALL, 0, false));
    assert_int_equal(p.n, 2);
    f.fdb_future_destroy(p.future);
    u = begin();
    f.fdb_transaction_set_read_version(u, version);
    assert_string_equal(get(u, PREFIX "b"), "old");
    f.fdb_transaction_reset(u);
    assert_null(get(u, PREFIX "b"));
    f.fdb_transaction_destroy(u);
    f.fdb_transaction_destroy(t);
}

static void test_read_versions_can_be_wrong(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    int64_t version = read_version(t);
    f.fdb_transaction_set_read_version(t, version);
    assert_int_equal(done(ask(t, "a", false)), 2010);
    f.fdb_transaction_reset(t);
    f.fdb_transaction_set_read_version(t, 0);
    assert_int_equal(done(ask(t, "a", false)), 2011);
    f.fdb_transaction_reset(t);
    f.fdb_transaction_set_read_version(t, version + 1000000000);
    assert_int_equal(done(ask(t, "a", false)), 1009);
    f.fdb_transaction_reset(t);
    f.fdb_transaction_set_read_version(t, version > 1000000000 ? version - 1000000000 : 1);
    assert_int_equal(done(ask(t, "a", false)), 1007);
    f.fdb_transaction_reset(t);
    f.fdb_transaction_set_read_version(t, version > 1000000000 ? version - 1000000000 : 1);
    set(t, PREFIX "a", "1");
    assert_int_equal(commit(t), 1007);
    f.fdb_transaction_destroy(t);
}

/* --- ranges -------------------------------------------------------------------------------- */

static void fill_rows(int n, size_t value_len)
{
    FDBTransaction *t = begin();
    for (int i = 0; i < n; i++) {
        char key[64];
        snprintf(key, sizeof key, PREFIX "row/%05d", i);
        put_bytes(t, key, value_len, i);
    }
    commit_surely(t);
}

/* How many rows a request is answered with at first. */
static int first_piece(int limit, int bytes, int mode, int iteration, bool *more)
{
    FDBTransaction *t = begin();
    struct pairs p = pairs_of(
        ask_range(t, PREFIX "row/", false, PREFIX "row0", limit, bytes, mode, iteration, false));
    *more = p.more;
    int n = p.n;
    f.fdb_future_destroy(p.future);
    f.fdb_transaction_destroy(t);
    return n;
}

static void test_ranges_come_in_pieces(void **state)
{
    (void)state;
    fill_rows(300, 1000);
    static const struct {
        int limit, bytes, mode, iteration, rows;
        bool more;
    } cases[] = {
        {0, 0, WANT_ALL, 0, 77, true},   {0, 0, SERIAL, 0, 77, true},
        {0, 0, SMALL, 0, 1, true},       {0, 0, ITERATOR, 1, 4, true},
        {0, 0, ITERATOR, 2, 6, true},    {0, 0, ITERATOR, 100, 77, true},
        {0, 5000, WANT_ALL, 0, 5, true}, {7, 0, WANT_ALL, 0, 7, true},
        {300, 0, EXACT, 0, 300, true},   {301, 0, EXACT, 0, 300, false},
        {0, 5000, EXACT, 0, 5, true},    {0, 200000, EXACT, 0, 77, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bool more;
        int n =
            first_piece(cases[i].limit, cases[i].bytes, cases[i].mode, cases[i].iteration, &more);
        if (n != cases[i].rows || more != cases[i].more)
            print_error("case %zu: %d rows, more %d\n", i, n, more);
        assert_int_equal(n, cases[i].rows);
        assert_int_equal(more, cases[i].more);
    }
    /* All of it, forwards and backwards. */
    for (int reverse = 0; reverse < 2; reverse++) {
        FDBTransaction *t = begin();
        char begin_key[64] = PREFIX "row/", end_key[64] = PREFIX "row0";
        bool after = false, more = true;
        int n = 0;
        for (int iteration = 1; more; iteration++) {
            struct pairs p = pairs_of(
                ask_range(t, begin_key, after, end_key, 0, 0, ITERATOR, iteration, reverse));
            for (int i = 0; i < p.n; i++) {
                char key[64];
                snprintf(key, sizeof key, PREFIX "row/%05d", reverse ? 299 - n : n);
                assert_key(&p, i, key);
                n++;
            }
            more = p.more;
            if (more) {
                const FDBKeyValue *last = &p.items[p.n - 1];
                snprintf(reverse ? end_key : begin_key, sizeof begin_key, "%.*s", last->key_length,
                         (const char *)last->key);
                after = !reverse;
            }
            f.fdb_future_destroy(p.future);
        }
        assert_int_equal(n, 300);
        f.fdb_transaction_destroy(t);
    }
}

/* A range that meets keys of the transaction's own may be given in more pieces. */
static void test_ranges_over_own_writes_are_whole(void **state)
{
    (void)state;
    fill_rows(40, 100);
    FDBTransaction *t = begin();
    for (int i = 0; i < 40; i += 3) {
        char key[64];
        snprintf(key, sizeof key, PREFIX "row/%05d", i);
        if (i % 2)
            put_bytes(t, key, 100, 'x');
        else
            f.fdb_transaction_clear(t, (const uint8_t *)key, (int)strlen(key));
    }
    for (int reverse = 0; reverse < 2; reverse++) {
        char begin_key[64] = PREFIX "row/", end_key[64] = PREFIX "row0";
        bool after = false, more = true;
        int next = reverse ? 39 : 0;
        while (more) {
            struct pairs p =
                pairs_of(ask_range(t, begin_key, after, end_key, 0, 0, WANT_ALL, 0, reverse));
            for (int i = 0; i < p.n; i++) {
                char key[64];
                while (next % 3 == 0 && next % 2 == 0)
                    next += reverse ? -1 : 1;
                snprintf(key, sizeof key, PREFIX "row/%05d", next);
                assert_key(&p, i, key);
                assert_int_equal(p.items[i].value[0], next % 3 == 0 ? 'x' : next);
                next += reverse ? -1 : 1;
            }
            more = p.more;
            if (more) {
                assert_true(p.n > 0);
                const FDBKeyValue *last = &p.items[p.n - 1];
                snprintf(reverse ? end_key : begin_key, sizeof begin_key, "%.*s", last->key_length,
                         (const char *)last->key);
                after = !reverse;
            }
            f.fdb_future_destroy(p.future);
        }
        assert_int_equal(next, reverse ? 0 : 40);
    }
    f.fdb_transaction_destroy(t);
}

static fdb_error_t range_error(const char *begin_key, const char *end_key, int limit, int mode,
                               int iteration)
{
    FDBTransaction *t = begin();
    fdb_error_t error =
        done(ask_range(t, begin_key, false, end_key, limit, 0, mode, iteration, false));
    f.fdb_transaction_destroy(t);
    return error;
}

static void test_ranges_can_be_wrong(void **state)
{
    (void)state;
    assert_int_equal(range_error("a", "b", 0, EXACT, 0), 2210);
    assert_int_equal(range_error("a", "b", 0, ITERATOR, 0), 2000);
    assert_int_equal(range_error("a", "b", 0, 17, 0), 2000);
    assert_int_equal(range_error("a", "b", -5, WANT_ALL, 0), 2012);
    assert_int_equal(range_error("a", "\xff\x01", 0, WANT_ALL, 0), 2004);
    assert_int_equal(range_error("a", "\xff", 1, WANT_ALL, 0), 0);
    FDBTransaction *t = begin();
    struct pairs p = pairs_of(ask_range(t, "b", false, "a", 0, 0, WANT_ALL, 0, false));
    assert_int_equal(p.n, 0);
    assert_false(p.more);
    f.fdb_future_destroy(p.future);
    f.fdb_transaction_destroy(t);
}

static void selected(FDBTransaction *t, const char *key, bool or_equal, int offset,
                     const char *first)
{
    FDBFuture *x = f.fdb_transaction_get_range(t, (const uint8_t *)key, (int)strlen(key), or_equal,
                                               offset, K(PREFIX "z"), 0, 1, 1, 0, EXACT, 0, 0, 0);
    struct pairs p = pairs_of(x);
    assert_int_equal(p.n, 1);
    assert_key(&p, 0, first);
    f.fdb_future_destroy(x);
}

static void test_selectors(void **state)
{
    (void)state;
    for (char c = 'b'; c <= 'h'; c = (char)(c + 2))
        put((char[]){'d', 'o', 'u', 'b', 'l', 'e', '-', 't', 'e', 's', 't', '/', c, 0}, "1");
    FDBTransaction *t = begin();
    for (int own = 0; own < 2; own++) {
        selected(t, PREFIX "d", false, 1, PREFIX "d"); /* first at or behind */
        selected(t, PREFIX "d", true, 1, PREFIX "f");  /* first behind */
        selected(t, PREFIX "d", true, 0, PREFIX "d");  /* last at or before */
        selected(t, PREFIX "d", false, 0, PREFIX "b"); /* last before */
        selected(t, PREFIX "e", true, 0, PREFIX "d");
        selected(t, PREFIX "c", false, 2, PREFIX "f");
        selected(t, PREFIX "h", false, -1, PREFIX "d");
        /* The same keys again, now written by itself. */
        f.fdb_transaction_clear(t, K(PREFIX "c"));
        set(t, PREFIX "d", "own");
        set(t, PREFIX "f", "own");
    }
    f.fdb_transaction_destroy(t);
}

static void test_sizes_are_estimated(void **state)
{
    (void)state;
    fill_rows(10, 1000);
    FDBTransaction *t = begin();
    FDBFuture *x =
        f.fdb_transaction_get_estimated_range_size_bytes(t, K(PREFIX "row/"), K(PREFIX "row0"));
    int64_t bytes;
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_int64(x, &bytes), 0);
    assert_true(bytes >= 0);
    f.fdb_future_destroy(x);
    x = f.fdb_transaction_get_range_split_points(t, K(PREFIX "row/"), K(PREFIX "row0"), 3000);
    const FDBKey *keys;
    int n;
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_key_array(x, &keys, &n), 0);
    assert_true(n >= 2);
    assert_memory_equal(keys[0].key, PREFIX "row/", (size_t)keys[0].key_length);
    assert_memory_equal(keys[n - 1].key, PREFIX "row0", (size_t)keys[n - 1].key_length);
    f.fdb_future_destroy(x);
    assert_int_equal(done(f.fdb_transaction_get_estimated_range_size_bytes(t, K("b"), K("a"))),
                     2005);
    f.fdb_transaction_destroy(t);
}

/* --- conflicts ------------------------------------------------------------------------------ */

static void test_what_was_read_conflicts(void **state)
{
    (void)state;
    put(PREFIX "a", "1");
    enum { GET, SNAPSHOT, RANGE, RANGE_LIMITED, ADDED, BLIND, OWN, OWN_BEFORE, WATCHED, CASES };
    static const struct {
        const char *changed;
        fdb_error_t error;
    } cases[CASES] = {
        [GET] = {PREFIX "a", 1020},     [SNAPSHOT] = {PREFIX "a", 0},
        [RANGE] = {PREFIX "c", 1020},   [RANGE_LIMITED] = {PREFIX "c", 0},
        [ADDED] = {PREFIX "c", 1020},   [BLIND] = {PREFIX "x", 0},
        [OWN] = {PREFIX "x", 0},        [OWN_BEFORE] = {PREFIX "x", 1020},
        [WATCHED] = {PREFIX "a", 1020},
    };
    for (int i = 0; i < CASES; i++) {
        FDBTransaction *t = begin();
        read_version(t);
        FDBFuture *watch = NULL;
        switch (i) {
        case GET:
            get(t, PREFIX "a");
            break;
        case SNAPSHOT:
            value_of(ask(t, PREFIX "a", true));
            break;
        case RANGE:
            done(ask_range(t, PREFIX, false, PREFIX "d", 0, 0, WANT_ALL, 0, false));
            break;
        case RANGE_LIMITED:
            done(ask_range(t, PREFIX, false, PREFIX "d", 1, 0, WANT_ALL, 0, false));
            break;
        case ADDED:
            assert_int_equal(
                f.fdb_transaction_add_conflict_range(t, K(PREFIX "b"), K(PREFIX "d"), READ), 0);
            break;
        case OWN: /* what one has written oneself is not read from the cluster */
            set(t, PREFIX "x", "own");
            get(t, PREFIX "x");
            break;
        case OWN_BEFORE:
            get(t, PREFIX "x");
            set(t, PREFIX "x", "own");
            break;
        case WATCHED:
            watch = f.fdb_transaction_watch(t, K(PREFIX "a"));
            break;
        default:
            break;
        }
        set(t, PREFIX "x", "mine");
        char value[16];
        snprintf(value, sizeof value, "other %d", i);
        if (watch)
            usleep(20000);
        put(cases[i].changed, value);
        fdb_error_t error = commit(t);
        if (error != cases[i].error)
            print_error("case %d\n", i);
        assert_int_equal(error, cases[i].error);
        if (watch)
            assert_int_equal(done(watch), 1020);
        f.fdb_transaction_destroy(t);
        t = begin();
        clear(t, PREFIX "c", PREFIX "d");
        commit_surely(t);
    }
}

static void test_what_was_written_conflicts(void **state)
{
    (void)state;
    enum { SET, CLEAR, CLEAR_RANGE, ATOMIC, ADDED, NOT_SET, NEXT_ONLY, CASES };
    static const fdb_error_t errors[CASES] = {
        [SET] = 1020,   [CLEAR] = 1020, [CLEAR_RANGE] = 1020, [ATOMIC] = 1020,
        [ADDED] = 1020, [NOT_SET] = 0,  [NEXT_ONLY] = 1020};
    for (int i = 0; i < CASES; i++) {
        FDBTransaction *t = begin(), *u = begin();
        get(t, PREFIX "m");
        set(t, PREFIX "x", "1");
        switch (i) {
        case SET:
            set(u, PREFIX "m", "1");
            break;
        case CLEAR:
            f.fdb_transaction_clear(u, K(PREFIX "m"));
            break;
        case CLEAR_RANGE:
            clear(u, PREFIX "a", PREFIX "z");
            break;
        case ATOMIC:
            f.fdb_transaction_atomic_op(u, K(PREFIX "m"), K("\1\0"), ADD);
            break;
        case ADDED:
            assert_int_equal(
                f.fdb_transaction_add_conflict_range(u, K(PREFIX "l"), K(PREFIX "n"), WRITE), 0);
            break;
        case NOT_SET:
        case NEXT_ONLY:
            assert_int_equal(f.fdb_transaction_set_option(u, NO_CONFLICT, NULL, 0), 0);
            set(u, PREFIX "m", "1");
            if (i == NEXT_ONLY)
                set(u, PREFIX "m", "2");
            break;
        default:
            break;
        }
        commit_surely(u);
        fdb_error_t error = commit(t);
        if (error != errors[i])
            print_error("case %d\n", i);
        assert_int_equal(error, errors[i]);
        f.fdb_transaction_destroy(t);
    }
    assert_int_equal(f.fdb_transaction_add_conflict_range(NULL, K("b"), K("a"), READ), 2005);
}

static void test_atomic_operations(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    f.fdb_transaction_atomic_op(t, K(PREFIX "n"), K("\xff\0"), ADD);
    f.fdb_transaction_atomic_op(t, K(PREFIX "n"), K("\2\0"), ADD);
    FDBFuture *x = ask(t, PREFIX "n", false);
    fdb_bool_t present;
    const uint8_t *value;
    int len;
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_value(x, &present, &value, &len), 0);
    assert_true(present && len == 2 && value[0] == 1 && value[1] == 1);
    f.fdb_future_destroy(x);
    f.fdb_transaction_atomic_op(t, K(PREFIX "max"), K("b"), BYTE_MAX);
    f.fdb_transaction_atomic_op(t, K(PREFIX "max"), K("a"), BYTE_MAX);
    commit_surely(t);
    t = begin();
    f.fdb_transaction_atomic_op(t, K(PREFIX "n"), K("\1\0"), ADD);
    f.fdb_transaction_atomic_op(t, K(PREFIX "max"), K("b"), COMPARE_AND_CLEAR);
    commit_surely(t);
    t = begin();
    x = ask(t, PREFIX "n", false);
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_value(x, &present, &value, &len), 0);
    assert_true(present && len == 2 && value[0] == 2 && value[1] == 1);
    f.fdb_future_destroy(x);
    assert_null(get(t, PREFIX "max"));
    f.fdb_transaction_atomic_op(t, K(PREFIX "n"), K("\1\0"), 99);
    assert_int_equal(commit(t), 2018);
    f.fdb_transaction_destroy(t);
}

/* --- limits --------------------------------------------------------------------------------- */

static fdb_error_t set_error(size_t key_len, size_t value_len, int first_byte)
{
    uint8_t *key = malloc(key_len), *value = malloc(value_len + 1);
    memset(key, 'k', key_len);
    memcpy(key, PREFIX, sizeof PREFIX - 1);
    if (first_byte)
        key[0] = (uint8_t)first_byte;
    memset(value, 'v', value_len + 1);
    FDBTransaction *t = begin();
    f.fdb_transaction_set(t, key, (int)key_len, value, (int)value_len);
    fdb_error_t error = commit(t);
    f.fdb_transaction_destroy(t);
    free(key);
    free(value);
    return error;
}

static void test_limits(void **state)
{
    (void)state;
    assert_int_equal(set_error(10000, 1, 0), 0);
    assert_int_equal(set_error(10001, 1, 0), 2102);
    assert_int_equal(set_error(100, 100000, 0), 0);
    assert_int_equal(set_error(100, 100001, 0), 2103);
    assert_int_equal(set_error(100, 1, 0xff), 2004);
    FDBTransaction *t = begin();
    assert_int_equal(done(ask(t, "\xff", false)), 2004);
    f.fdb_transaction_reset(t);
    f.fdb_transaction_clear_range(t, K("b"), K("a"));
    assert_int_equal(commit(t), 2005);
    f.fdb_transaction_destroy(t);
}

static void test_transactions_have_a_size(void **state)
{
    (void)state;
    for (int fits = 0; fits < 2; fits++) {
        FDBTransaction *t = begin();
        for (int i = 0; i < 100; i++) {
            char key[64];
            snprintf(key, sizeof key, PREFIX "big/%05d", i);
            put_bytes(t, key, fits ? 99500 : 99950, 0);
        }
        assert_int_equal(commit(t), fits ? 0 : 2101);
        f.fdb_transaction_destroy(t);
    }
    FDBTransaction *t = begin();
    put_bytes(t, PREFIX "size", 1000, 0);
    FDBFuture *x = f.fdb_transaction_get_approximate_size(t);
    int64_t bytes;
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_int64(x, &bytes), 0);
    print_message("# a set of 16 and 1000 bytes: %lld\n", (long long)bytes);
    assert_true(bytes >= 1016 + 24 + 33 && bytes < 1016 + 24 + 33 + 100);
    f.fdb_future_destroy(x);
    option_number(t, SIZE_LIMIT, 1000);
    assert_int_equal(commit(t), 2101);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 2101)), 2101);
    f.fdb_transaction_reset(t);
    put_bytes(t, PREFIX "size", 1000, 0); /* the option went with the reset */
    assert_int_equal(commit(t), 0);
    f.fdb_transaction_destroy(t);
    /* The exact limit for one set. */
    int64_t low = 1000, high = 2000;
    while (low < high) {
        int64_t mid = (low + high) / 2;
        t = begin();
        put_bytes(t, PREFIX "size", 1000, 0);
        option_number(t, SIZE_LIMIT, mid);
        fdb_error_t error = commit(t);
        assert_true(error == 0 || error == 2101);
        f.fdb_transaction_destroy(t);
        if (error)
            low = mid + 1;
        else
            high = mid;
    }
    print_message("# it commits under a limit of %lld\n", (long long)low);
    assert_true(low == bytes);
}

/* --- transactions that are not usable -------------------------------------------------------- */

static void test_use_while_committing(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    set(t, PREFIX "a", "1");
    FDBFuture *c = f.fdb_transaction_commit(t);
    FDBFuture *x = ask(t, PREFIX "b", false);
    assert_int_equal(done(x), 2017);
    fdb_error_t error = done(c);
    assert_true(error == 2017 || error == 0); /* 0: it was quicker */
    assert_int_equal(done(f.fdb_transaction_commit(t)), 2017);
    f.fdb_transaction_reset(t);
    assert_int_equal(commit(t), 0);
    set(t, PREFIX "b", "1"); /* after a commit that is over, without a reset */
    assert_int_equal(done(ask(t, PREFIX "b", false)), 2017);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 2017)), 2017);
    f.fdb_transaction_reset(t);
    assert_null(get(t, PREFIX "b"));
    f.fdb_transaction_destroy(t);
}

static void test_commit_waits_for_reads(void **state)
{
    (void)state;
    put(PREFIX "a", "1");
    FDBTransaction *t = begin();
    FDBFuture *x = ask(t, PREFIX "a", false), *y = ask(t, PREFIX "a", true);
    set(t, PREFIX "b", "1");
    FDBFuture *c = f.fdb_transaction_commit(t);
    assert_int_equal(done(c), 0);
    assert_true(f.fdb_future_is_ready(x) && f.fdb_future_is_ready(y));
    assert_string_equal(value_of(x), "1");
    assert_string_equal(value_of(y), "1");
    f.fdb_transaction_destroy(t);
    /* And fails with them. */
    t = begin();
    f.fdb_transaction_set_read_version(t, 1);
    x = ask(t, PREFIX "a", true);
    set(t, PREFIX "b", "1");
    c = f.fdb_transaction_commit(t);
    assert_int_equal(done(c), 1007);
    assert_int_equal(done(x), 1007);
    f.fdb_transaction_destroy(t);
}

static void test_cancelled_transactions(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    FDBFuture *x = ask(t, PREFIX "a", false);
    f.fdb_transaction_cancel(t);
    fdb_error_t error = done(x);
    assert_true(error == 1025 || error == 0);
    assert_int_equal(done(ask(t, PREFIX "a", false)), 1025);
    assert_int_equal(done(f.fdb_transaction_get_read_version(t)), 1025);
    assert_int_equal(commit(t), 1025);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 1020)), 1025);
    f.fdb_transaction_reset(t);
    assert_null(get(t, PREFIX "a"));
    x = ask(t, PREFIX "a", false);
    f.fdb_transaction_reset(t);
    error = done(x);
    assert_true(error == 1025 || error == 0);
    x = ask(t, PREFIX "a", false);
    f.fdb_transaction_destroy(t);
    error = done(x);
    assert_true(error == 1025 || error == 0);
}

static void test_timeouts(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    option_number(t, TIMEOUT, 50);
    usleep(150000);
    assert_int_equal(done(ask(t, PREFIX "a", false)), 1031);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 1031)), 1031);
    f.fdb_transaction_reset(t);
    assert_null(get(t, PREFIX "a"));
    usleep(100000);
    assert_null(get(t, PREFIX "a")); /* the option is gone */
    f.fdb_transaction_reset(t);
    option_number(t, TIMEOUT, 100);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 1020)), 0);
    usleep(200000);
    assert_int_equal(done(ask(t, PREFIX "a", false)), 1031); /* counted from the beginning */
    f.fdb_transaction_destroy(t);
}

static void test_options_can_be_wrong(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    assert_int_equal(f.fdb_transaction_set_option(t, 7777, NULL, 0), 2007);
    assert_int_equal(f.fdb_transaction_set_option(t, TIMEOUT, K("abc")), 0);
    assert_int_equal(done(ask(t, "a", false)), 2006);
    f.fdb_transaction_reset(t);
    assert_int_equal(f.fdb_transaction_set_option(t, PRIORITY_BATCH, K("x")), 0);
    assert_int_equal(done(ask(t, "a", false)), 2006);
    f.fdb_transaction_reset(t);
    for (int i = 0; i < 6; i++)
        assert_int_equal(f.fdb_transaction_set_option(t, TAG, (const uint8_t *)"123456" + i, 1), 0);
    assert_int_equal(done(ask(t, "a", false)), 2109);
    f.fdb_transaction_destroy(t);
}

/* --- on_error -------------------------------------------------------------------------------- */

static void test_on_error(void **state)
{
    (void)state;
    static const struct {
        fdb_error_t code, answer;
    } cases[] = {{1007, 0},    {1009, 0},    {1020, 0},    {1021, 0},    {1037, 0},
                 {1213, 0},    {1025, 1025}, {1031, 1031}, {1101, 1101}, {2017, 2017},
                 {2101, 2101}, {1500, 1500}, {0, 2000}};
    FDBTransaction *t = begin();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        set(t, PREFIX "a", "1");
        assert_int_equal(done(f.fdb_transaction_on_error(t, cases[i].code)), cases[i].answer);
        if (cases[i].answer) {
            assert_int_equal(done(ask(t, PREFIX "a", false)), 1025);
            f.fdb_transaction_reset(t);
        } else {
            assert_null(get(t, PREFIX "a")); /* begins anew */
        }
    }
    f.fdb_transaction_destroy(t);
    t = begin();
    option_number(t, RETRY_LIMIT, 2);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 1020)), 0);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 1020)), 0);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 1020)), 1020);
    f.fdb_transaction_destroy(t);
    /* Options that do not last. */
    t = begin();
    option_number(t, SIZE_LIMIT, 100);
    assert_int_equal(done(f.fdb_transaction_on_error(t, 1020)), 0);
    put_bytes(t, PREFIX "a", 1000, 0);
    assert_int_equal(commit(t), 0);
    f.fdb_transaction_destroy(t);
    /* A future that is still out. */
    t = begin();
    FDBFuture *x = ask(t, PREFIX "a", false);
    FDBFuture *e = f.fdb_transaction_on_error(t, 1007);
    fdb_error_t error = done(x);
    assert_true(error == 0 || error == 1025);
    assert_int_equal(done(e), 0);
    f.fdb_transaction_destroy(t);
}

static void test_backoff_grows_and_is_kept(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    int64_t start = now_ms();
    for (int i = 0; i < 8; i++)
        assert_int_equal(done(f.fdb_transaction_on_error(t, 1020)), 0);
    int64_t grown = now_ms() - start;
    assert_true(grown > 150); /* 10 + 20 + ... + 1280 ms, each times a chance of 0 .. 1 */
    f.fdb_transaction_reset(t);
    option_number(t, MAX_RETRY_DELAY, 5);
    start = now_ms();
    for (int i = 0; i < 8; i++)
        assert_int_equal(done(f.fdb_transaction_on_error(t, 1020)), 0);
    assert_true(now_ms() - start < 200);
    f.fdb_transaction_destroy(t);
}

/* --- watches --------------------------------------------------------------------------------- */

static bool fires_within(FDBFuture *watch, int ms)
{
    for (int64_t end = now_ms() + ms; now_ms() < end; usleep(1000))
        if (f.fdb_future_is_ready(watch))
            return true;
    return false;
}

static void test_watches(void **state)
{
    (void)state;
    put(PREFIX "w", "1");
    FDBTransaction *t = begin();
    FDBFuture *w = f.fdb_transaction_watch(t, K(PREFIX "w"));
    FDBFuture *absent = f.fdb_transaction_watch(t, K(PREFIX "absent"));
    assert_int_equal(commit(t), 0);
    f.fdb_transaction_destroy(t);
    assert_false(fires_within(w, 100));
    put(PREFIX "w", "1"); /* the same again */
    put(PREFIX "other", "2");
    assert_false(fires_within(w, 100));
    assert_false(fires_within(absent, 1));
    put(PREFIX "w", "2");
    assert_true(fires_within(w, 5000));
    assert_int_equal(done(w), 0);
    put(PREFIX "absent", "here");
    assert_true(fires_within(absent, 5000));
    assert_int_equal(done(absent), 0);

    /* Changed between its version and its commit: a change. */
    t = begin();
    w = f.fdb_transaction_watch(t, K(PREFIX "w"));
    usleep(50000);
    put(PREFIX "w", "3");
    assert_int_equal(commit(t), 0); /* it writes nothing, so it cannot conflict */
    assert_true(fires_within(w, 5000));
    assert_int_equal(done(w), 0);

    /* Against what the same transaction writes. */
    f.fdb_transaction_reset(t);
    set(t, PREFIX "w", "4");
    w = f.fdb_transaction_watch(t, K(PREFIX "w"));
    assert_int_equal(commit(t), 0);
    assert_false(fires_within(w, 100));
    put(PREFIX "w", "3");
    assert_true(fires_within(w, 5000));
    assert_int_equal(done(w), 0);
    f.fdb_transaction_reset(t);
    w = f.fdb_transaction_watch(t, K(PREFIX "w"));
    usleep(50000);
    set(t, PREFIX "w", "5");
    assert_true(fires_within(w, 5000));
    assert_int_equal(done(w), 0);

    /* Of a transaction that ends without a commit. */
    f.fdb_transaction_reset(t);
    w = f.fdb_transaction_watch(t, K(PREFIX "w"));
    usleep(50000);
    assert_false(f.fdb_future_is_ready(w));
    f.fdb_transaction_reset(t);
    assert_true(fires_within(w, 5000));
    assert_int_equal(done(w), 1025);

    /* Its future destroyed, or cancelled. */
    w = f.fdb_transaction_watch(t, K(PREFIX "w"));
    absent = f.fdb_transaction_watch(t, K(PREFIX "none"));
    assert_int_equal(commit(t), 0);
    f.fdb_transaction_destroy(t);
    f.fdb_future_destroy(w);
    f.fdb_future_cancel(absent);
    assert_true(fires_within(absent, 5000));
    assert_int_equal(done(absent), 1101);
}

static void test_too_many_watches(void **state)
{
    (void)state;
    FDBDatabase *old = db;
    assert_int_equal(f.fdb_create_database(cluster_file, &db), 0);
    int64_t max = 2;
    assert_int_equal(f.fdb_database_set_option(db, 20, (const uint8_t *)&max, sizeof max), 0);
    FDBTransaction *t = begin();
    FDBFuture *w[3];
    for (int i = 0; i < 3; i++)
        w[i] = f.fdb_transaction_watch(t, K(PREFIX "many"));
    fdb_error_t error = 0;
    for (int64_t end = now_ms() + 5000; !error && now_ms() < end; usleep(1000))
        for (int i = 0; i < 3; i++)
            if (f.fdb_future_is_ready(w[i]))
                error = f.fdb_future_get_error(w[i]);
    assert_int_equal(error, 1032);
    for (int i = 0; i < 3; i++)
        f.fdb_future_destroy(w[i]);
    f.fdb_transaction_destroy(t);
    f.fdb_database_destroy(db);
    db = old;
}

/* --- futures and their callbacks ---------------------------------------------------------------
 */

struct called {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    int calls;
    pthread_t thread;
    fdb_error_t error;
    FDBTransaction *block_on;
    fdb_error_t blocked;
};

static void callback(FDBFuture *x, void *arg)
{
    struct called *c = arg;
    fdb_error_t blocked = 0;
    if (c->block_on) {
        FDBFuture *y = f.fdb_transaction_get(c->block_on, K(PREFIX "zz"), 0);
        blocked = f.fdb_future_block_until_ready(y);
        f.fdb_future_destroy(y);
    }
    pthread_mutex_lock(&c->lock);
    c->calls++;
    c->thread = pthread_self();
    c->error = f.fdb_future_get_error(x);
    c->blocked = blocked;
    pthread_cond_signal(&c->cond);
    pthread_mutex_unlock(&c->lock);
}

static void wait_called(struct called *c)
{
    pthread_mutex_lock(&c->lock);
    while (!c->calls)
        pthread_cond_wait(&c->cond, &c->lock);
    pthread_mutex_unlock(&c->lock);
}

#define CALLED                                                                                     \
    {                                                                                              \
        .lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER                        \
    }

static void test_callbacks(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    struct called c = CALLED;
    FDBFuture *x = f.fdb_transaction_get_read_version(t);
    assert_int_equal(f.fdb_future_set_callback(x, callback, &c), 0);
    wait_called(&c);
    assert_true(f.fdb_future_is_ready(x));
    /* Ready by now: at once, and here. */
    struct called now = CALLED;
    assert_int_equal(f.fdb_future_set_callback(x, callback, &now), 0);
    assert_int_equal(now.calls, 1);
    assert_true(pthread_equal(now.thread, pthread_self()));
    f.fdb_future_destroy(x);
    /* What is asked of the cluster is answered on the network thread. */
    for (int i = 0; i < 20; i++) {
        f.fdb_transaction_reset(t);
        struct called asked = CALLED;
        x = f.fdb_transaction_get_read_version(t);
        assert_int_equal(f.fdb_future_set_callback(x, callback, &asked), 0);
        wait_called(&asked);
        assert_true(pthread_equal(asked.thread, network) ||
                    pthread_equal(asked.thread, pthread_self()));
        assert_int_equal(asked.calls, 1);
        f.fdb_future_destroy(x);
    }
    /* Blocking there would be for ever. */
    struct called blocks = CALLED;
    f.fdb_transaction_reset(t);
    FDBTransaction *u = begin();
    blocks.block_on = u;
    x = f.fdb_transaction_watch(t, K(PREFIX "block"));
    assert_int_equal(commit(t), 0);
    assert_int_equal(f.fdb_future_set_callback(x, callback, &blocks), 0);
    put(PREFIX "block", "1");
    wait_called(&blocks);
    assert_true(pthread_equal(blocks.thread, network));
    assert_int_equal(blocks.blocked, 2026);
    f.fdb_future_destroy(x);
    f.fdb_transaction_destroy(u);
    /* Of one that is cancelled, and of one that is destroyed. */
    f.fdb_transaction_reset(t);
    struct called gone = CALLED;
    x = f.fdb_transaction_watch(t, K(PREFIX "block"));
    FDBFuture *y = f.fdb_transaction_watch(t, K(PREFIX "block"));
    assert_int_equal(commit(t), 0);
    assert_int_equal(f.fdb_future_set_callback(x, callback, &gone), 0);
    f.fdb_future_cancel(x);
    wait_called(&gone);
    assert_int_equal(gone.error, 1101);
    assert_true(pthread_equal(gone.thread, network));
    f.fdb_future_destroy(x);
    static struct called destroyed = CALLED;
    assert_int_equal(f.fdb_future_set_callback(y, callback, &destroyed), 0);
    f.fdb_future_destroy(y);
    wait_called(&destroyed);
    usleep(20000);
    pthread_mutex_lock(&destroyed.lock);
    assert_int_equal(destroyed.calls, 1);
    pthread_mutex_unlock(&destroyed.lock);
    assert_int_equal(destroyed.error, 1101);
    f.fdb_transaction_destroy(t);
}

static void test_futures_give_what_they_hold(void **state)
{
    (void)state;
    put(PREFIX "a", "1");
    FDBTransaction *t = begin();
    FDBFuture *x = f.fdb_transaction_watch(t, K(PREFIX "a"));
    int64_t number;
    assert_int_equal(f.fdb_future_get_error(x), 2015);
    f.fdb_future_destroy(x);
    x = ask(t, PREFIX "a", false);
    assert_int_equal(wait_for(x), 0);
    fdb_bool_t present;
    const uint8_t *value;
    int len;
    assert_int_equal(f.fdb_future_get_value(x, &present, &value, &len), 0);
    f.fdb_future_release_memory(x);
    assert_int_equal(f.fdb_future_get_value(x, &present, &value, &len), 1102);
    f.fdb_future_destroy(x);
    f.fdb_transaction_reset(t);
    x = f.fdb_transaction_get_read_version(t);
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_int64(x, &number), 0);
    assert_true(number > 0);
    f.fdb_future_destroy(x);
    f.fdb_transaction_destroy(t);
}

static void test_health_is_told(void **state)
{
    (void)state;
    FDBTransaction *t = begin();
    FDBFuture *x = f.fdb_transaction_get(t, K("\xff\xff/metrics/health/aggregate"), 0);
    fdb_bool_t present;
    const uint8_t *value;
    int len;
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_value(x, &present, &value, &len), 0);
    assert_true(present);
    print_message("# %.*s\n", len, value);
    assert_true(len > 2 && value[0] == '{' && value[len - 1] == '}');
    f.fdb_future_destroy(x);
    assert_int_equal(done(f.fdb_transaction_get(t, K("\xff\xff/nothing/here"), 0)), 2113);
    f.fdb_transaction_destroy(t);
}

/* --- against a model ----------------------------------------------------------------------------
 */

/* Two transactions at a time do random things to a few keys; a model says what each read must
 * give and which commit must fail. */
enum { MODEL_KEYS = 24, MODEL_STEPS = 6000 };

struct cell {
    bool present;
    uint16_t value;
};

enum cell_state { CELL_STORED, CELL_KNOWN, CELL_ATOMIC };

struct model_txn {
    FDBTransaction *t;
    bool begun, wrote;
    struct cell cells[MODEL_KEYS]; /* as it sees them */
    enum cell_state states[MODEL_KEYS];
    bool read[MODEL_KEYS], written[MODEL_KEYS];
    /* The same of what lies between a key and the next, which ranges reach and keys don't. */
    bool gap_read[MODEL_KEYS], gap_written[MODEL_KEYS];
    uint16_t added[MODEL_KEYS]; /* CELL_ATOMIC: to whatever is there when it commits */
    int64_t begun_at;
};

struct model {
    struct chance chance;
    struct cell cells[MODEL_KEYS];
    int64_t changed_at[MODEL_KEYS]; /* the number of the commit */
    int64_t gap_changed_at[MODEL_KEYS];
    int64_t commits;
    struct model_txn txns[2];
};

static const char *model_key(int i)
{
    static char text[4][32];
    static int next;
    char *key = text[next++ % 4];
    snprintf(key, sizeof text[0], PREFIX "model/%02d", i);
    return key;
}

static void model_see(struct model_txn *m, int i, bool snapshot)
{
    if (!snapshot && m->states[i] != CELL_KNOWN)
        m->read[i] = true;
}

static void model_see_gap(struct model_txn *m, int i, bool snapshot)
{
    if (!snapshot && !m->gap_written[i])
        m->gap_read[i] = true;
}

static void model_write(struct model_txn *m, int i, bool present, uint16_t value)
{
    m->cells[i] = (struct cell){present, value};
    m->states[i] = CELL_KNOWN;
    m->wrote = m->written[i] = true;
}

static void model_get(struct model_txn *m, int i, bool snapshot)
{
    fdb_bool_t present;
    const uint8_t *value;
    int len;
    FDBFuture *x = ask(m->t, model_key(i), snapshot);
    assert_int_equal(wait_for(x), 0);
    assert_int_equal(f.fdb_future_get_value(x, &present, &value, &len), 0);
    assert_int_equal(present, m->cells[i].present);
    if (present) {
        assert_int_equal(len, 2);
        assert_int_equal(value[0] | value[1] << 8, m->cells[i].value);
    }
    f.fdb_future_destroy(x);
    model_see(m, i, snapshot);
}

static void model_range(struct model *all, struct model_txn *m)
{
    struct chance *c = &all->chance;
    int from = (int)chance_below(c, MODEL_KEYS), to = (int)chance_below(c, MODEL_KEYS + 1);
    int limit = 1 + (int)chance_below(c, MODEL_KEYS);
    bool reverse = chance_below(c, 2), snapshot = chance_below(c, 3) == 0;
    bool after = chance_below(c, 3) == 0;
    int first = from + after, expected = 0, last = -1;
    FDBFuture *x = f.fdb_transaction_get_range(
        m->t, (const uint8_t *)model_key(from), (int)strlen(model_key(from)), after, 1,
        (const uint8_t *)model_key(to), (int)strlen(model_key(to)), 0, 1, limit, 0, EXACT, 0,
        snapshot, reverse);
    struct pairs p = pairs_of(x);
    for (int k = 0; k < to - first && expected < limit; k++) {
        int i = reverse ? to - 1 - k : first + k;
        if (!m->cells[i].present)
            continue;
        assert_key(&p, expected, model_key(i));
        const uint8_t *value = p.items[expected].value;
        assert_int_equal(value[0] | value[1] << 8, m->cells[i].value);
        expected++;
        last = i;
    }
    assert_int_equal(p.n, expected);
    assert_int_equal(p.more, expected == limit);
    bool whole = expected < limit;
    if (whole)
        last = reverse ? first : to - 1;
    int begin = reverse ? last : first, end = reverse ? to - 1 : last;
    for (int i = begin; i < to && i <= end; i++) {
        model_see(m, i, snapshot);
        if (whole || reverse || i < end)
            model_see_gap(m, i, snapshot);
    }
    if (after && from < to && (whole || !reverse))
        model_see_gap(m, from, snapshot);
    f.fdb_future_destroy(x);
}

static void model_begin(struct model *all, struct model_txn *m)
{
    FDBTransaction *t = m->t;
    *m = (struct model_txn){.t = t, .begun = true, .begun_at = all->commits};
    memcpy(m->cells, all->cells, sizeof m->cells);
    f.fdb_transaction_reset(t);
    read_version(t);
}

static void model_commit(struct model *all, struct model_txn *m)
{
    bool conflict = false;
    for (int i = 0; i < MODEL_KEYS; i++)
        conflict |= (m->read[i] && all->changed_at[i] > m->begun_at) ||
                    (m->gap_read[i] && all->gap_changed_at[i] > m->begun_at);
    assert_int_equal(commit(m->t), m->wrote && conflict ? 1020 : 0);
    m->begun = false;
    if (!m->wrote || conflict)
        return;
    all->commits++;
    for (int i = 0; i < MODEL_KEYS; i++) {
        if (m->gap_written[i])
            all->gap_changed_at[i] = all->commits;
        if (!m->written[i])
            continue;
        /* What adds to a value adds to the one that is there by then. */
        if (m->states[i] == CELL_ATOMIC)
            all->cells[i] = (struct cell){
                true, (uint16_t)(all->cells[i].value * all->cells[i].present + m->added[i])};
        else
            all->cells[i] = m->cells[i];
        all->changed_at[i] = all->commits;
    }
}

static void model_step(struct model *all, struct model_txn *m)
{
    struct chance *c = &all->chance;
    int i = (int)chance_below(c, MODEL_KEYS), k = (int)chance_below(c, MODEL_KEYS + 1);
    uint16_t value = (uint16_t)chance_u64(c);
    uint8_t bytes[2] = {(uint8_t)value, (uint8_t)(value >> 8)};
    const uint8_t *key = (const uint8_t *)model_key(i);
    int key_len = (int)strlen(model_key(i));
    switch (chance_below(c, 12)) {
    case 0:
    case 1:
        f.fdb_transaction_set(m->t, key, key_len, bytes, 2);
        model_write(m, i, true, value);
        break;
    case 2:
        f.fdb_transaction_clear(m->t, key, key_len);
        model_write(m, i, false, 0);
        break;
    case 3:
        if (i >= k || k - i > 5)
            break;
        clear(m->t, model_key(i), model_key(k));
        for (int j = i; j < k; j++) {
            model_write(m, j, false, 0);
            m->gap_written[j] = true;
        }
        break;
    case 4: {
        bool known = m->states[i] == CELL_KNOWN;
        f.fdb_transaction_atomic_op(m->t, key, key_len, bytes, 2, ADD);
        if (known) {
            model_write(m, i, true, (uint16_t)(m->cells[i].value * m->cells[i].present + value));
        } else {
            m->cells[i].value = (uint16_t)(m->cells[i].value * m->cells[i].present + value);
            m->cells[i].present = true;
            m->wrote = m->written[i] = true;
            m->states[i] = CELL_ATOMIC;
            m->added[i] = (uint16_t)(m->added[i] + value);
        }
        break;
    }
    case 5:
    case 6:
    case 7:
        model_get(m, i, chance_below(c, 3) == 0);
        break;
    case 8:
    case 9:
        model_range(all, m);
        break;
    case 10:
        model_commit(all, m);
        break;
    default:
        if (chance_below(c, 4) == 0)
            m->begun = false;
        break;
    }
}

static void test_two_transactions_do_what_a_model_says(void **state)
{
    (void)state;
    static struct model all;
    memset(&all, 0, sizeof all);
    all.chance = chance_begin("model");
    for (int i = 0; i < 2; i++)
        all.txns[i].t = begin();
    for (int step = 0; step < MODEL_STEPS; step++) {
        struct model_txn *m = &all.txns[chance_below(&all.chance, 2)];
        if (!m->begun)
            model_begin(&all, m);
        model_step(&all, m);
    }
    for (int i = 0; i < 2; i++)
        f.fdb_transaction_destroy(all.txns[i].t);
}

/* --- faults: the double alone ------------------------------------------------------------------
 */

static bool stored(const char *key, const char *value)
{
    void *bytes;
    size_t len;
    if (!d->get(key, strlen(key), &bytes, &len))
        return value == NULL;
    bool same = value && len == strlen(value) && memcmp(bytes, value, len) == 0;
    free(bytes);
    return same;
}

static void test_every_fault_of_reads(void **state)
{
    (void)state;
    if (!d)
        skip();
    static const struct {
        const char *name;
        fdb_error_t error;
    } cases[] = {{"read_too_old", 1007}, {"read_future", 1009}, {"read_behind", 1037}};
    put(PREFIX "a", "1");
    FDBTransaction *t = begin();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_true(d->set(cases[i].name, 1));
        assert_int_equal(done(ask(t, PREFIX "a", false)), cases[i].error);
        assert_int_equal(done(ask_range(t, PREFIX, false, PREFIX "z", 0, 0, WANT_ALL, 0, false)),
                         cases[i].error);
        assert_int_equal(d->count(cases[i].name), 2);
        assert_true(d->set(cases[i].name, 0));
        assert_int_equal(done(f.fdb_transaction_on_error(t, cases[i].error)), 0);
        assert_string_equal(get(t, PREFIX "a"), "1");
        f.fdb_transaction_reset(t);
    }
    d->set("grv_delayed", 1);
    d->set("grv_delay_ms", 60);
    int64_t start = now_ms();
    read_version(t);
    assert_true(now_ms() - start >= 60);
    f.fdb_transaction_destroy(t);
    assert_false(d->set("no_such_setting", 1));
    assert_int_equal(d->count("no_such_counter"), -1);
}

static void test_every_fault_of_commits(void **state)
{
    (void)state;
    if (!d)
        skip();
    static const struct {
        const char *name;
        fdb_error_t error;
        bool happens, late, retryable;
    } cases[] = {
        {"conflict", 1020, false, false, true},        {"too_large", 2101, false, false, false},
        {"unknown_happened", 1021, true, false, true}, {"unknown_lost", 1021, false, false, true},
        {"changed_happened", 1039, true, false, true}, {"changed_lost", 1039, false, false, true},
        {"timeout_late", 1031, true, true, false},     {"cancelled_late", 1101, true, true, false},
    };
    d->set("late_ms_max", 100);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        FDBTransaction *t = begin();
        d->put(PREFIX "a", strlen(PREFIX "a"), "old", 3);
        assert_string_equal(get(t, PREFIX "a"), "old");
        set(t, PREFIX "a", cases[i].name);
        assert_true(d->set(cases[i].name, 1));
        assert_int_equal(commit(t), cases[i].error);
        assert_true(d->set(cases[i].name, 0));
        assert_int_equal(d->count(cases[i].name), 1);
        assert_int_equal(done(f.fdb_transaction_on_error(t, cases[i].error)),
                         cases[i].retryable ? 0 : cases[i].error);
        if (cases[i].late)
            assert_true(d->settle(5000));
        assert_int_equal(d->count("late_alive"), 0);
        assert_true(stored(PREFIX "a", cases[i].happens ? cases[i].name : "old"));
        f.fdb_transaction_destroy(t);
    }
    assert_int_equal(d->count("late_landed"), 2);
}

static void test_late_commits_are_checked_when_they_land(void **state)
{
    (void)state;
    if (!d)
        skip();
    d->set("late_ms_max", 200);
    int refused = 0, landed = 0;
    for (int i = 0; i < 40; i++) {
        FDBTransaction *t = begin();
        d->put(PREFIX "owner", strlen(PREFIX "owner"), "me", 2);
        d->put(PREFIX "data", strlen(PREFIX "data"), "old", 3);
        get(t, PREFIX "owner");
        set(t, PREFIX "data", "late");
        d->set("timeout_late", 1);
        assert_int_equal(commit(t), 1031);
        d->set("timeout_late", 0);
        bool before = stored(PREFIX "data", "late");
        /* From here on it cannot land any more, wherever it is. */
        d->put(PREFIX "owner", strlen(PREFIX "owner"), "you", 3);
        before |= stored(PREFIX "data", "late");
        assert_true(d->settle(5000));
        assert_int_equal(stored(PREFIX "data", "late"), before);
        refused += !before;
        landed += before;
        f.fdb_transaction_destroy(t);
    }
    assert_int_equal(d->count("late_refused"), refused);
    assert_int_equal(d->count("late_landed"), landed);
    assert_true(refused > 0);
}

/* One that writes `key` if nobody has written `checked` since `version` (0: anyway). */
static FDBTransaction *checking(const char *key, const char *value, const char *checked,
                                int64_t version)
{
    FDBTransaction *t = begin();
    char end[64];
    if (version) {
        f.fdb_transaction_set_read_version(t, version);
        snprintf(end, sizeof end, "%s%c", checked, 1);
        assert_int_equal(f.fdb_transaction_add_conflict_range(
                             t, (const uint8_t *)checked, (int)strlen(checked),
                             (const uint8_t *)end, (int)strlen(end), READ),
                         0);
    }
    set(t, key, value);
    return t;
}

static int64_t committed_version(FDBTransaction *t)
{
    int64_t version = 0;
    assert_int_equal(f.fdb_transaction_get_committed_version(t, &version), 0);
    f.fdb_transaction_destroy(t);
    return version;
}

static void test_commits_share_the_version_of_a_batch(void **state)
{
    (void)state;
    if (!d)
        skip();
    uint64_t shown = 0;
    for (unsigned i = 0; shown < 3; i++) {
        assert_true(i < 100);
        d->set("batch_us", 0);
        put(PREFIX "owner", "me");
        int64_t before = d->version();
        uint64_t batched = (uint64_t)d->count("batched");
        /* Its caller goes on as the owner; another one takes the volume in the same batch; a third
         * is refused for what came before it in the batch. */
        FDBTransaction *data = checking(PREFIX "data", "1", PREFIX "owner", before);
        FDBTransaction *owner = checking(PREFIX "owner", "you", PREFIX "owner", before);
        FDBTransaction *late = checking(PREFIX "data", "2", PREFIX "owner", before);
        d->set("batch_us", 100000);
        FDBFuture *x = f.fdb_transaction_commit(data), *y = f.fdb_transaction_commit(owner),
                  *z = f.fdb_transaction_commit(late);
        while (d->count("commits_refused") == 0 && !f.fdb_future_is_ready(z))
            usleep(50);
        if (!f.fdb_future_is_ready(x)) {
            /* Not to be seen yet. */
            FDBTransaction *reader = begin();
            assert_string_equal(get(reader, PREFIX "owner"), "me");
            f.fdb_transaction_destroy(reader);
        }
        assert_int_equal(done(x), 0);
        assert_int_equal(done(y), 0);
        assert_int_equal(done(z), 1020);
        f.fdb_transaction_destroy(late);
        FDBTransaction *reader = begin();
        assert_string_equal(get(reader, PREFIX "owner"), "you");
        f.fdb_transaction_destroy(reader);
        int64_t version = committed_version(data);
        if (committed_version(owner) != version)
            continue; /* the batch was over too soon */
        assert_int_equal((uint64_t)d->count("batched"), batched + 1);
        shown++;
        d->set("batch_us", 0);
        /* The hole: at the version of its own commit the new owner makes no conflict. */
        FDBTransaction *t = checking(PREFIX "data", "3", PREFIX "owner", version);
        commit_surely(t);
        /* At the version before it does. */
        t = checking(PREFIX "data", "4", PREFIX "owner", version - 1);
        assert_int_equal(commit(t), 1020);
        f.fdb_transaction_destroy(t);
    }
}

static void test_given_up_commits_still_happen(void **state)
{
    (void)state;
    if (!d)
        skip();
    d->set("delay_us_max", 20000);
    int happened = 0;
    for (int i = 0; i < 20; i++) {
        FDBTransaction *t = begin();
        char value[16];
        snprintf(value, sizeof value, "%d", i);
        read_version(t);
        set(t, PREFIX "a", value);
        FDBFuture *x = f.fdb_transaction_commit(t);
        if (i % 4 == 0)
            f.fdb_future_cancel(x);
        else if (i % 4 == 1)
            f.fdb_transaction_cancel(t);
        else if (i % 4 == 2)
            f.fdb_transaction_reset(t);
        else
            f.fdb_transaction_destroy(t);
        assert_int_equal(done(x), i % 4 == 0 ? 1101 : 1025);
        if (i % 4 != 3)
            f.fdb_transaction_destroy(t);
        assert_true(d->settle(5000));
        happened += stored(PREFIX "a", value);
    }
    assert_int_equal(happened, 20);
    assert_int_equal(d->count("late_landed"), 20);
}

static void test_faults_of_watches(void **state)
{
    (void)state;
    if (!d)
        skip();
    static const struct {
        const char *name;
        fdb_error_t error;
    } cases[] = {{"watch_cancelled", 1101}, {"watch_future", 1009}, {"watch_spurious", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        d->set(cases[i].name, 1);
        FDBTransaction *t = begin();
        FDBFuture *w = f.fdb_transaction_watch(t, K(PREFIX "w"));
        assert_int_equal(commit(t), 0);
        assert_int_equal(done(w), cases[i].error);
        assert_int_equal(d->count(cases[i].name), 1);
        d->set(cases[i].name, 0);
        f.fdb_transaction_destroy(t);
    }
    assert_int_equal(d->count("watches_alive"), 0);
}

static void test_a_cluster_that_is_away(void **state)
{
    (void)state;
    if (!d)
        skip();
    put(PREFIX "a", "1");
    FDBTransaction *t = begin(), *u = begin();
    get(u, PREFIX "a");
    d->set("down", 1);
    FDBFuture *x = ask(t, PREFIX "a", false);
    set(u, PREFIX "a", "2");
    FDBFuture *c = f.fdb_transaction_commit(u);
    FDBFuture *p = f.fdb_database_get_server_protocol(db, 0);
    usleep(50000);
    assert_false(f.fdb_future_is_ready(x) || f.fdb_future_is_ready(c) || f.fdb_future_is_ready(p));
    assert_true(stored(PREFIX "a", "1"));
    d->set("down", 0);
    assert_int_equal(done(x), 0);
    assert_int_equal(done(c), 0);
    assert_int_equal(done(p), 0);
    assert_true(stored(PREFIX "a", "2"));
    /* A timeout is the client's own, and does not wait. */
    f.fdb_transaction_reset(t);
    d->set("down", 1);
    option_number(t, TIMEOUT, 30);
    assert_int_equal(done(ask(t, PREFIX "a", false)), 1031);
    /* Another protocol: told, and nothing else. */
    d->set("down", 0);
    d->set("incompatible", 1);
    f.fdb_transaction_reset(t);
    x = ask(t, PREFIX "a", false);
    p = f.fdb_database_get_server_protocol(db, 0);
    uint64_t protocol;
    assert_int_equal(wait_for(p), 0);
    assert_int_equal(f.fdb_future_get_uint64(p, &protocol), 0);
    f.fdb_future_destroy(p);
    assert_int_equal(protocol, 0x1fdb00b074000000u); /* with the flag that servers set */
    assert_false(f.fdb_future_is_ready(x));
    d->set("incompatible", 0);
    assert_int_equal(done(x), 0);
    f.fdb_transaction_destroy(t);
    f.fdb_transaction_destroy(u);
}

static void test_throttling(void **state)
{
    (void)state;
    if (!d)
        skip();
    d->set("batch_stopped", 1);
    FDBTransaction *t = begin(), *u = begin();
    assert_int_equal(f.fdb_transaction_set_option(t, PRIORITY_BATCH, NULL, 0), 0);
    assert_int_equal(f.fdb_transaction_set_option(t, TAG, K("volume-7")), 0);
    assert_int_equal(f.fdb_transaction_set_option(t, READ_PRIORITY_LOW, NULL, 0), 0);
    FDBFuture *x = ask(t, PREFIX "a", false);
    assert_null(get(u, PREFIX "a"));
    assert_false(f.fdb_future_is_ready(x));
    d->set("batch_stopped", 0);
    assert_int_equal(done(x), 0);
    set(t, PREFIX "b", "1");
    assert_int_equal(commit(t), 0);
    assert_int_equal(d->count("grvs_batch"), 1);
    assert_int_equal(d->count("commits_batch"), 1);
    assert_int_equal(d->count("reads_low"), 1);
    assert_int_equal(d->tag_count("volume-7"), 3);
    assert_int_equal(d->tag_count("volume-8"), 0);
    d->set("grv_ms", 50);
    f.fdb_transaction_reset(u);
    int64_t start = now_ms();
    read_version(u);
    assert_true(now_ms() - start >= 50);
    d->set_health("{\"tps_limit\":1}");
    x = f.fdb_transaction_get(u, K("\xff\xff/metrics/health/aggregate"), 0);
    assert_string_equal(value_of(x), "{\"tps_limit\":1}");
    f.fdb_transaction_destroy(t);
    f.fdb_transaction_destroy(u);
}

static void test_versions_get_too_old(void **state)
{
    (void)state;
    if (!d)
        skip();
    put(PREFIX "a", "1");
    FDBTransaction *t = begin();
    get(t, PREFIX "a");
    d->set("window_ms", 50);
    assert_string_equal(get(t, PREFIX "a"), "1");
    usleep(80000);
    assert_int_equal(done(ask(t, PREFIX "b", false)), 1007);
    f.fdb_transaction_reset(t);
    get(t, PREFIX "a");
    set(t, PREFIX "a", "2");
    usleep(80000);
    assert_int_equal(commit(t), 1007);
    d->set("window_ms", 5000);
    f.fdb_transaction_reset(t);
    get(t, PREFIX "a");
    d->forget_versions();
    assert_int_equal(done(ask(t, PREFIX "b", false)), 1007);
    /* Versions that go on with commits only. */
    d->set("version_step", 10);
    int64_t version = d->version();
    usleep(2000);
    assert_int_equal(d->version(), version);
    put(PREFIX "a", "3");
    assert_int_equal(d->version(), version + 10);
    /* Of a key that changes all the time, what is in the window is as it was. */
    d->set_many("version_step=1000,window_ms=3");
    int64_t versions[20];
    for (int i = 0; i < 20; i++) {
        char value[16];
        snprintf(value, sizeof value, "%d", i);
        if (i % 4 == 3)
            d->clear(PREFIX "a", strlen(PREFIX "a"), PREFIX "b", strlen(PREFIX "b"));
        else
            d->put(PREFIX "a", strlen(PREFIX "a"), value, strlen(value));
        versions[i] = d->version();
        for (int k = i; k >= 0 && k >= i - 6; k--) {
            f.fdb_transaction_reset(t);
            f.fdb_transaction_set_read_version(t, versions[k]);
            if (k < i - 3) {
                assert_int_equal(done(ask(t, PREFIX "a", false)), 1007);
            } else if (k % 4 == 3) {
                assert_null(get(t, PREFIX "a"));
            } else {
                snprintf(value, sizeof value, "%d", k);
                assert_string_equal(get(t, PREFIX "a"), value);
            }
        }
    }
    f.fdb_transaction_destroy(t);
}

static void test_faults_follow_the_seed(void **state)
{
    (void)state;
    if (!d)
        skip();
    char outcomes[3][200];
    for (int round = 0; round < 3; round++) {
        d->reset();
        d->set_many("unknown_lost=4,conflict=5,read_behind=4,retry_delay_us_max=0,version_step=1");
        d->set("seed", round == 2 ? 8 : 7);
        for (size_t i = 0; i < sizeof outcomes[0]; i++) {
            FDBTransaction *t = begin();
            fdb_error_t error = done(ask(t, PREFIX "a", true));
            if (!error) {
                set(t, PREFIX "a", "1");
                error = commit(t);
            }
            outcomes[round][i] = (char)error;
            f.fdb_transaction_destroy(t);
        }
    }
    assert_memory_equal(outcomes[0], outcomes[1], sizeof outcomes[0]);
    assert_memory_not_equal(outcomes[0], outcomes[2], sizeof outcomes[0]);
}

static void test_violations_are_told(void **state)
{
    (void)state;
    if (!d)
        skip();
    assert_string_equal(d->violation(), "");
    FDBTransaction *t = begin();
    FDBFuture *x = ask(t, PREFIX "a", false);
    assert_int_equal(done(x), 0);
    assert_false(f.fdb_future_is_ready(x));
    assert_string_equal(d->violation(), "fdb_future_is_ready of a future that was destroyed");
    f.fdb_future_destroy(x);
    assert_int_equal(d->count("violations"), 2);
    assert_int_equal(d->count("futures_alive"), 0);
    set(t, PREFIX "a", "1");
    assert_int_equal(commit(t), 0);
    set(t, PREFIX "a", "1");
    assert_int_equal(d->count("violations"), 3);
    f.fdb_transaction_reset(t);
    x = f.fdb_transaction_get_read_version(t);
    assert_int_equal(wait_for(x), 0);
    fdb_bool_t present;
    const uint8_t *value;
    int len;
    assert_int_equal(f.fdb_future_get_value(x, &present, &value, &len), 2000);
    f.fdb_future_destroy(x);
    assert_int_equal(d->count("violations"), 4);
    f.fdb_transaction_destroy(t);
    assert_int_equal(d->count("transactions_alive"), 0);
    assert_int_equal(done(ask(t, PREFIX "a", false)), 2000);
    f.fdb_transaction_destroy(t);
    assert_int_equal(d->count("violations"), 6);
    assert_int_equal(d->count("transactions_alive"), 0);
}

static void count_key(void *arg, const void *key, size_t key_len, const void *value,
                      size_t value_len)
{
    (void)key;
    (void)key_len;
    (void)value;
    (void)value_len;
    ++*(int *)arg;
}

static void test_another_client(void **state)
{
    (void)state;
    if (!d)
        skip();
    FDBTransaction *t = begin();
    get(t, PREFIX "a");
    FDBFuture *w = f.fdb_transaction_watch(t, K(PREFIX "b"));
    usleep(10000);
    struct fdb_double_change changes[] = {
        {.key = PREFIX "a", .key_len = strlen(PREFIX "a"), .value = "1", .value_len = 1},
        {.key = PREFIX "c", .key_len = strlen(PREFIX "c"), .value = "", .value_len = 0},
        {.key = PREFIX "b", .key_len = strlen(PREFIX "b"), .value = "2", .value_len = 1},
        {.key = PREFIX "c", .key_len = strlen(PREFIX "c")},
    };
    assert_true(d->commit(changes, 4));
    set(t, PREFIX "x", "1");
    assert_int_equal(commit(t), 1020);
    assert_int_equal(done(w), 1020);
    int n = 0;
    d->each(PREFIX, strlen(PREFIX), "e", 1, count_key, &n);
    assert_int_equal(n, 2);
    assert_true(stored(PREFIX "c", NULL));
    d->clear(PREFIX, strlen(PREFIX), "e", 1);
    assert_int_equal(d->count("keys"), 0);
    f.fdb_transaction_destroy(t);
}

static void test_memory_does_not_pile_up(void **state)
{
    (void)state;
    if (!d)
        skip();
    uint64_t most = 0;
    d->set_many("version_step=1000,window_ms=3"); /* three commits back */
    for (int i = 0; i < 200; i++) {
        FDBTransaction *t = begin();
        for (int k = 0; k < 16; k++) {
            char key[64];
            snprintf(key, sizeof key, PREFIX "m/%d", (i + k) % 20);
            put_bytes(t, key, 65536, i);
        }
        if (i % 10 == 0)
            clear(t, PREFIX "m/", PREFIX "m0");
        commit_surely(t);
        uint64_t held = (uint64_t)d->count("bytes_held");
        most = held > most ? held : most;
    }
    assert_true(most < 8u << 20);
    /* Within the window, what is held has a bound. */
    d->set_many("version_step=0,window_ms=5000");
    d->set("history_bytes_max", 8 << 20);
    for (int i = 0; i < 200; i++) {
        FDBTransaction *t = begin();
        put_bytes(t, PREFIX "m", 100000, i);
        put_bytes(t, PREFIX "n", 100000, i);
        commit_surely(t);
        assert_true(d->count("bytes_held") < 12 << 20);
    }
    d->reset();
    assert_int_equal(d->count("bytes_held"), 0);
}

/* Many threads move money between accounts under every fault at once; what
 * has an unknown outcome is left alone. Whatever happened: no money may be made or lost. */
enum { ACCOUNTS = 8, THREADS = 4, TRANSFERS = 150, MONEY = 1000 };

struct transfers {
    pthread_t thread;
    int number, unknown;
};

static fdb_error_t number_of(FDBTransaction *t, const char *key, int *out)
{
    FDBFuture *x = ask(t, key, false);
    f.fdb_future_block_until_ready(x);
    fdb_bool_t present = 0;
    const uint8_t *value;
    int len;
    fdb_error_t error = f.fdb_future_get_value(x, &present, &value, &len);
    *out = 0;
    if (!error && present) {
        char text[32] = "";
        memcpy(text, value, (size_t)len < sizeof text ? (size_t)len : sizeof text - 1);
        *out = atoi(text);
    }
    f.fdb_future_destroy(x);
    return error;
}

static void *transfer(void *arg)
{
    struct transfers *me = arg;
    uint64_t random = (uint64_t)me->number * 7919 + 1;
    for (int i = 0; i < TRANSFERS; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        int from = (int)(random >> 33) % ACCOUNTS, to = (int)(random >> 40) % ACCOUNTS;
        int amount = (int)(random >> 50) % 10;
        if (from == to)
            continue;
        char from_key[64], to_key[64], mark[64], text[32];
        snprintf(from_key, sizeof from_key, PREFIX "account/%d", from);
        snprintf(to_key, sizeof to_key, PREFIX "account/%d", to);
        snprintf(mark, sizeof mark, PREFIX "mark/%d/%d", me->number, i);
        FDBTransaction *t = begin();
        bool over = false;
        while (!over) {
            int a, b;
            fdb_error_t error = number_of(t, from_key, &a);
            if (!error)
                error = number_of(t, to_key, &b);
            bool tried = false;
            if (!error) {
                snprintf(text, sizeof text, "%d", a - amount);
                set(t, from_key, text);
                snprintf(text, sizeof text, "%d", b + amount);
                set(t, to_key, text);
                set(t, mark, "1");
                tried = true;
                error = commit(t);
            }
            if (!error)
                break;
            over = tried && (error == 1021 || error == 1039 || error == 1031 || error == 1101);
            me->unknown += over;
            if (!over && done(f.fdb_transaction_on_error(t, error)))
                f.fdb_transaction_reset(t);
        }
        f.fdb_transaction_destroy(t);
    }
    return NULL;
}

static void test_no_money_is_made(void **state)
{
    (void)state;
    if (!d)
        skip();
    for (unsigned seed = 1; seed <= 3; seed++) {
        d->reset();
        assert_true(d->set_many("delay_us_max=300,retry_delay_us_max=500,read_too_old=50,"
                                "read_future=60,read_behind=70,conflict=20,too_large=50,"
                                "unknown_happened=20,unknown_lost=20,changed_happened=40,"
                                "changed_lost=40,timeout_late=20,cancelled_late=30,late_ms_max=30,"
                                "range_short=5"));
        d->set("seed", seed);
        for (int i = 0; i < ACCOUNTS; i++) {
            char key[64];
            snprintf(key, sizeof key, PREFIX "account/%d", i);
            d->put(key, strlen(key), "1000", 4);
        }
        static struct transfers threads[THREADS];
        memset(threads, 0, sizeof threads);
        for (int i = 0; i < THREADS; i++) {
            threads[i].number = i;
            assert_int_equal(pthread_create(&threads[i].thread, NULL, transfer, &threads[i]), 0);
        }
        int unknown = 0;
        for (int i = 0; i < THREADS; i++) {
            pthread_join(threads[i].thread, NULL);
            unknown += threads[i].unknown;
        }
        assert_true(d->settle(5000));
        int sum = 0;
        for (int i = 0; i < ACCOUNTS; i++) {
            char key[64], text[32] = "";
            void *value;
            size_t len;
            snprintf(key, sizeof key, PREFIX "account/%d", i);
            assert_true(d->get(key, strlen(key), &value, &len));
            memcpy(text, value, len < sizeof text ? len : sizeof text - 1);
            free(value);
            sum += atoi(text);
        }
        assert_int_equal(sum, ACCOUNTS * MONEY);
        struct fdb_double_counts counts;
        d->counts(&counts);
        assert_true(unknown > 0 && counts.unknown_happened && counts.unknown_lost &&
                    counts.timeout_late && counts.cancelled_late && counts.late_refused);
        print_message("# seed %u: %llu commits happened of %llu, %d unknown, %llu late landed, "
                      "%llu late refused\n",
                      seed, (unsigned long long)counts.commits_happened,
                      (unsigned long long)counts.commits_tried, unknown,
                      (unsigned long long)counts.late_landed,
                      (unsigned long long)counts.late_refused);
        assert_int_equal(counts.violations, 0);
    }
}

static void test_settings_come_from_the_environment(void **state)
{
    (void)state;
    if (!d)
        skip();
    char command[600], line[64] = "";
    ssize_t n = readlink("/proc/self/exe", command + 100, 400);
    assert_true(n > 0 && n < 400);
    command[100 + n] = 0;
    static char whole[700];
    snprintf(whole, sizeof whole,
             "FDB_DOUBLE=api=630,seed=99,unknown_happened=50,late_ms_max=0x10 '%s' --settings",
             command + 100);
    FILE *child = popen(whole, "r");
    assert_non_null(child);
    assert_non_null(fgets(line, sizeof line, child));
    assert_int_equal(pclose(child), 0);
    assert_string_equal(line, "630 99 50 16\n");
}

static int print_settings(void)
{
    void *state = NULL;
    if (load(&state))
        return 1;
    struct fdb_double_config config;
    d->config_get(&config);
    printf("%d %lld %lld %lld\n", f.fdb_get_max_api_version(), (long long)config.seed,
           (long long)config.unknown_happened, (long long)config.late_ms_max);
    unlink(cluster_file);
    return 0;
}

/* --- the end -----------------------------------------------------------------------------------
 */

static void test_network_ends(void **state)
{
    (void)state;
    f.fdb_database_destroy(db);
    assert_int_equal(f.fdb_stop_network(), 0);
    void *result;
    assert_int_equal(pthread_join(network, &result), 0);
    assert_int_equal((intptr_t)result, 0);
    assert_int_equal(f.fdb_run_network(), 2025);
    if (d) {
        unlink(cluster_file);
        d->reset();
        assert_int_equal(d->count("databases_alive"), 0);
        assert_int_equal(d->count("bytes_held"), 0);
    }
}

#define T(name) cmocka_unit_test_setup_teardown(name, empty, clean)

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--settings") == 0)
        return print_settings();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_version_is_selected_once),
        cmocka_unit_test(test_nothing_works_before_the_network),
        T(test_cluster_file_errors_come_with_the_first_answer),
        T(test_errors_are_classed),
        T(test_protocol_is_that_of_the_client),
        T(test_values_are_kept),
        T(test_own_writes_are_read),
        T(test_without_own_writes),
        T(test_reads_are_as_of_one_version),
        T(test_read_versions_can_be_wrong),
        T(test_ranges_come_in_pieces),
        T(test_ranges_over_own_writes_are_whole),
        T(test_ranges_can_be_wrong),
        T(test_selectors),
        T(test_sizes_are_estimated),
        T(test_what_was_read_conflicts),
        T(test_what_was_written_conflicts),
        T(test_atomic_operations),
        T(test_limits),
        T(test_transactions_have_a_size),
        T(test_use_while_committing),
        T(test_commit_waits_for_reads),
        T(test_cancelled_transactions),
        T(test_timeouts),
        T(test_options_can_be_wrong),
        T(test_on_error),
        T(test_backoff_grows_and_is_kept),
        T(test_watches),
        T(test_too_many_watches),
        T(test_callbacks),
        T(test_futures_give_what_they_hold),
        T(test_health_is_told),
        T(test_two_transactions_do_what_a_model_says),
        T(test_every_fault_of_reads),
        T(test_every_fault_of_commits),
        T(test_late_commits_are_checked_when_they_land),
        T(test_commits_share_the_version_of_a_batch),
        T(test_given_up_commits_still_happen),
        T(test_faults_of_watches),
        T(test_a_cluster_that_is_away),
        T(test_throttling),
        T(test_versions_get_too_old),
        T(test_faults_follow_the_seed),
        T(test_violations_are_told),
        T(test_another_client),
        T(test_memory_does_not_pile_up),
        T(test_no_money_is_made),
        T(test_settings_come_from_the_environment),
        cmocka_unit_test(test_network_ends),
    };
    return cmocka_run_group_tests_name("fdb_double", tests, load, NULL);
}
