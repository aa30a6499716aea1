/*
 * A disk that fails, and a disk that hands back other bytes than were written
 * (G5). The doubles here are this program's own fdatasync, pwrite and
 * sync calls, which LMDB and the store use too.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "store_test.h"

/* What the doubles refuse, by the end of the file's name. */
static const char *_Atomic fail_sync_of;
static const char *_Atomic fail_sync_write_of; /* only writes to descriptors that sync */
static _Atomic int fail_times;
static _Atomic int fail_opens; /* so many of "blocks", to read it */

static bool is_file(int fd, const char *end)
{
    char link[40], path[400];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    size_t len = strlen(end);
    return n > (ssize_t)len && memcmp(path + n - (ssize_t)len, end, len) == 0;
}

static bool fails(int fd, const char *end)
{
    return end && is_file(fd, end) && fail_times > 0 && fail_times-- > 0;
}

int fdatasync(int fd)
{
    if (fails(fd, fail_sync_of)) {
        errno = EIO;
        return -1;
    }
    return fsync(fd);
}

/* Writes the bytes and fails, as a write-through does whose disk then says no. */
static ssize_t write_and_refuse(int fd, const void *data, size_t len, off_t at)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};
    const char *end = fail_sync_write_of;
    bool refuse = end && (fcntl(fd, F_GETFL) & O_DSYNC) && fails(fd, end);
    ssize_t n = pwritev(fd, &iov, 1, at);
    if (refuse) {
        errno = EIO;
        return -1;
    }
    return n;
}

/* Labels, for the headers rename pwrite where file offsets have 64 bits. */
ssize_t double_pwrite(int fd, const void *data, size_t len, off_t at) __asm__("pwrite");
ssize_t double_pwrite64(int fd, const void *data, size_t len, off_t at) __asm__("pwrite64");

ssize_t double_pwrite(int fd, const void *data, size_t len, off_t at)
{
    return write_and_refuse(fd, data, len, at);
}

ssize_t double_pwrite64(int fd, const void *data, size_t len, off_t at)
{
    return write_and_refuse(fd, data, len, at);
}

int double_openat(int at, const char *path, int flags, ...) __asm__("openat");
int double_openat64(int at, const char *path, int flags, ...) __asm__("openat64");

static int open_or_refuse(int at, const char *path, int flags, mode_t mode)
{
    if ((flags & O_ACCMODE) == O_RDONLY && strcmp(path, "blocks") == 0 &&
        fail_opens > 0 && fail_opens-- > 0) {
        errno = EMFILE;
        return -1;
    }
    return (int)syscall(SYS_openat, at, path, flags, mode);
}

int double_openat(int at, const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open_or_refuse(at, path, flags, mode);
}

int double_openat64(int at, const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open_or_refuse(at, path, flags, mode);
}

static int begin(void **state)
{
    fail_sync_of = fail_sync_write_of = NULL;
    fail_opens = 0;
    return test_begin(state, false);
}

static int end(void **state)
{
    fail_times = 0;
    return test_end(state);
}

static enum status set_body(struct test_store *t, const char *key, uint8_t fill)
{
    uint8_t body[10000];
    memset(body, fill, sizeof body);
    struct store_mutation m = {STORE_SET, text(key), text("h"), {body, sizeof body}};
    return test_commit(t, NULL, 0, &m, 1);
}

static void expect_body(struct test_store *t, const char *key, uint8_t fill)
{
    uint8_t got[10000], want[10000];
    memset(want, fill, sizeof want);
    struct store_get get = {.key = text(key), .body = got, .body_cap = sizeof got};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    assert_int_equal(test_read(t, &r), ST_OK);
    assert_int_equal(get.st, ST_OK);
    assert_memory_equal(got, want, sizeof want);
    store_read_release(&r.read);
}

/* A payload sync that failed: ST_IO and the old value; the retry writes elsewhere and counts. */
static void test_payload_sync_fails(void **state)
{
    struct test_store *t = *state;
    assert_int_equal(set_body(t, "k", 1), ST_OK);
    fail_sync_of = "/blocks";
    fail_times = 2;
    assert_int_equal(set_body(t, "k", 2), ST_IO);
    expect_body(t, "k", 1);
    assert_int_equal(set_body(t, "k", 3), ST_IO);
    assert_int_equal(set_body(t, "k", 4), ST_OK);
    expect_body(t, "k", 4);
    store_close(t->store);
    test_store_reopen(t);
    expect_body(t, "k", 4);
}

/* LMDB's own sync, before its meta page: nothing happened, and it goes on. */
static void test_index_sync_fails(void **state)
{
    struct test_store *t = *state;
    assert_int_equal(set_body(t, "k", 1), ST_OK);
    fail_sync_of = "/data.mdb";
    fail_times = 1;
    assert_int_equal(set_body(t, "k", 2), ST_IO);
    expect_body(t, "k", 1);
    assert_int_equal(set_body(t, "k", 3), ST_OK);
    store_close(t->store);
    test_store_reopen(t);
    expect_body(t, "k", 3);
}

/* The meta page's write: whether the commit happened is settled before it is answered, and
 * the answer is true afterwards and after a restart. */
static void test_meta_write_fails(void **state)
{
    struct test_store *t = *state;
    for (int times = 1; times <= 3; times++) {
        assert_int_equal(set_body(t, "k", 1), ST_OK);
        fail_sync_write_of = "/data.mdb";
        fail_times = times;
        enum status st = set_body(t, "k", 2);
        assert_int_equal(fail_times, 0);
        assert_true(st == ST_OK || st == ST_IO);
        expect_body(t, "k", st == ST_OK ? 2 : 1);
        store_close(t->store);
        test_store_reopen(t);
        expect_body(t, "k", st == ST_OK ? 2 : 1);
        assert_int_equal(set_body(t, "k", 3), ST_OK);
        expect_body(t, "k", 3);
    }
}

/* The same where LMDB can't be opened again at once, for want of descriptors: it is tried again,
 * and the store goes on. */
static void test_reopen_fails(void **state)
{
    struct test_store *t = *state;
    assert_int_equal(set_body(t, "k", 1), ST_OK);
    fail_sync_write_of = "/data.mdb";
    fail_times = 2;
    fail_opens = 2;
    enum status st = set_body(t, "k", 2);
    assert_int_equal(fail_times, 0);
    assert_int_equal(fail_opens, 0);
    assert_true(st == ST_OK || st == ST_IO);
    expect_body(t, "k", st == ST_OK ? 2 : 1);
    assert_int_equal(set_body(t, "k", 3), ST_OK);
    expect_body(t, "k", 3);
}

/* A data file that can't be opened is no reason to call the store damaged. */
static void test_data_file_not_opened(void **state)
{
    struct test_store *t = *state;
    store_close(t->store);
    t->store = NULL;
    char uri[320];
    snprintf(uri, sizeof uri, "lmdb:%s", t->dir);
    struct err e = {0};
    fail_opens = 1;
    assert_int_equal(store_open(uri, &(struct store_options){.lease_ms = LEASE_MS}, &t->store, &e),
                     ST_UNAVAIL);
    assert_non_null(strstr(e.text, "blocks: Too many open files"));
    test_store_reopen(t);
}

static void flip(const char *path, uint64_t at, uint8_t mask)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    uint8_t byte;
    CHECK(fd >= 0 && pread(fd, &byte, 1, (off_t)at) == 1);
    byte ^= mask;
    struct iovec iov = {&byte, 1};
    CHECK(pwritev(fd, &iov, 1, (off_t)at) == 1);
    close(fd);
}

enum { SMALL = 8 };

/* Reads every key singly and all as a range; counts what is refused. Anything else than an
 * error or the right bytes is a failure (exit 3). */
static int look_at_all(const char *uri)
{
    struct test_store t = {0};
    struct err e = {0};
    if (store_open(uri, &(struct store_options){.lease_ms = LEASE_MS}, &t.store, &e))
        return 1;
    test_env_start(&t.env);
    int refused = 0;
    char key[16], head[32];
    for (int i = 0; i < SMALL; i++) {
        snprintf(key, sizeof key, "key-%02d", i);
        snprintf(head, sizeof head, "the value of key %02d", i);
        struct store_get get = {.key = text(key)};
        struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
        enum status st = test_read(&t, &r);
        st = st ? st : get.st;
        if (st == ST_OK &&
            (get.head.len != strlen(head) || memcmp(get.head.data, head, get.head.len)))
            return 3;
        if (st == ST_NOTFOUND)
            return 3;
        refused += st != ST_OK;
        store_read_release(&r.read);
        /* A key that is not there must not come into being either. */
        snprintf(key, sizeof key, "key-%02d+", i);
        get.key = text(key);
        if (test_read(&t, &r) == ST_OK && get.st == ST_OK)
            return 3;
        store_read_release(&r.read);
    }
    for (int reverse = 0; reverse < 2; reverse++) {
        struct store_range range = {
            .begin = text("key-"), .end = text("key."), .limit = 100, .reverse = reverse};
        struct test_read r = {.read = {.ranges = &range, .n_ranges = 1}};
        if (test_read(&t, &r) == ST_OK) {
            if (range.n_pairs != SMALL)
                return 3;
            for (int i = 0; i < SMALL; i++) {
                snprintf(head, sizeof head, "the value of key %02d", reverse ? SMALL - 1 - i : i);
                if (range.pairs[i].head.len != strlen(head) ||
                    memcmp(range.pairs[i].head.data, head, strlen(head)))
                    return 3;
            }
        } else {
            refused++;
        }
        store_read_release(&r.read);
    }
    _exit(refused ? 2 : 0);
}

static void test_flips_in_an_index_page(void **state)
{
    struct test_store *t = *state;
    char key[16], head[32], path[300];
    for (int i = 0; i < SMALL; i++) {
        snprintf(key, sizeof key, "key-%02d", i);
        snprintf(head, sizeof head, "the value of key %02d", i);
        assert_int_equal(test_set(t, key, head), ST_OK);
    }
    store_close(t->store);
    t->store = NULL;
    snprintf(path, sizeof path, "%s/data.mdb", t->dir);
    /* The page in use, and older ones like it. */
    struct stat sb;
    assert_int_equal(stat(path, &sb), 0);
    uint8_t *copy = mem_alloc((size_t)sb.st_size);
    int fd = open(path, O_RDONLY);
    assert_int_equal(read(fd, copy, (size_t)sb.st_size), sb.st_size);
    close(fd);
    int outcomes[5] = {0};
    uint64_t pages = 0;
    for (uint64_t page = 2; page < (uint64_t)sb.st_size / 4096; page++) {
        const uint8_t *p = copy + page * 4096;
        if (!memmem(p, 4096, "the value of key 07", 19) ||
            !memmem(p, 4096, "the value of key 00", 19))
            continue;
        pages++;
        /* Every byte in use: the header with the table of entries, and the entries. */
        uint16_t lower = get_le16(p + 12), upper = get_le16(p + 14);
        for (uint64_t at = 0; at < 4096; at = at + 1 == lower ? upper : at + 1) {
            flip(path, page * 4096 + at, (uint8_t)(1u << at % 8));
            fflush(NULL);
            pid_t pid = fork();
            if (pid == 0) {
                /* LMDB may stop the process where a page makes no sense to it; cmocka must
                 * not go on with the tests in it then. */
                const int signals[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL};
                for (size_t i = 0; i < 5; i++)
                    signal(signals[i], SIG_DFL);
                (void)!freopen("/dev/null", "w", stderr);
                alarm(20);
                _exit(look_at_all(t->uri));
            }
            int status;
            assert_int_equal(waitpid(pid, &status, 0), pid);
            int outcome = WIFEXITED(status) ? WEXITSTATUS(status) : 4;
            if (outcome == 3 || outcome == 4)
                print_message("# page %d byte %d: %s %d\n", (int)page, (int)at,
                              outcome == 3 ? "WRONG" : "signal",
                              WIFEXITED(status) ? 0 : WTERMSIG(status));
            assert_true(outcome <= 4);
            outcomes[outcome]++;
            flip(path, page * 4096 + at, (uint8_t)(1u << at % 8));
        }
    }
    print_message("# %d pages: %d right, %d refused to open, %d refused, %d wrong, %d stopped\n",
                  (int)pages, outcomes[0], outcomes[1], outcomes[2], outcomes[3], outcomes[4]);
    assert_true(pages > 0);
    assert_int_equal(outcomes[3], 0);
    assert_true(outcomes[2] > 100);
    free(copy);
    test_store_reopen(t);
}

/* A truncated data file: errors for what is gone, the rest is right. */
static void test_truncated_data_file(void **state)
{
    struct test_store *t = *state;
    char path[300];
    assert_int_equal(set_body(t, "a", 1), ST_OK);
    assert_int_equal(set_body(t, "b", 2), ST_OK);
    snprintf(path, sizeof path, "%s/blocks", t->dir);
    assert_int_equal(truncate(path, 4096 + 3 * 4096), 0);
    expect_body(t, "a", 1);
    uint8_t got[10000];
    struct store_get get = {.key = text("b"), .body = got, .body_cap = sizeof got};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    assert_int_equal(test_read(t, &r), ST_OK);
    assert_int_equal(get.st, ST_IO);
    store_read_release(&r.read);
}

/* A data.mdb that lost its end is refused at the door, wherever it was cut; bytes behind its
 * last page are nobody's. */
static void test_index_cut_short(void **state)
{
    struct test_store *t = *state;
    char path[300], copy[300], key[32], head[1000];
    memset(head, 'h', sizeof head);
    for (int i = 0; i < 300; i++) {
        snprintf(key, sizeof key, "key-%03d", i);
        struct store_mutation m = {STORE_SET, text(key), {head, sizeof head}, {NULL, 0}};
        assert_int_equal(test_commit(t, NULL, 0, &m, 1), ST_OK);
    }
    store_close(t->store);
    t->store = NULL;
    snprintf(path, sizeof path, "%s/data.mdb", t->dir);
    snprintf(copy, sizeof copy, "%s/copy", t->dir);
    char command[700];
    snprintf(command, sizeof command, "cp %s %s", path, copy);
    assert_int_equal(system(command), 0);
    snprintf(command, sizeof command, "cp %s %s", copy, path);
    int refused = 0;
    for (int pages = 2; pages < 160; pages++) {
        assert_int_equal(truncate(path, pages * 4096 - (pages % 3) * 100), 0);
        struct err e = {0};
        enum status st = store_open(t->uri, &(struct store_options){.lease_ms = LEASE_MS}, &t->store, &e);
        if (st == ST_OK) {
            test_expect(t, "nothing", NULL);
            store_close(t->store);
        } else if (pages > 2) {
            assert_int_equal(st, ST_UNAVAIL);
            assert_non_null(strstr(e.text, "is cut short"));
            refused++;
        }
        t->store = NULL;
        assert_int_equal(system(command), 0);
    }
    print_message("# %d lengths of data.mdb refused\n", refused);
    assert_true(refused > 60);
    test_store_reopen(t);
    test_expect(t, "nothing", NULL);
    /* A file in the place of the folder. */
    struct err e = {0};
    struct store *none;
    char uri[320];
    snprintf(uri, sizeof uri, "lmdb:%s", copy);
    assert_int_equal(store_open(uri, &(struct store_options){.lease_ms = LEASE_MS}, &none, &e), ST_NOTFOUND);
    assert_non_null(strstr(e.text, "not a folder"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_payload_sync_fails, begin, end),
        cmocka_unit_test_setup_teardown(test_index_sync_fails, begin, end),
        cmocka_unit_test_setup_teardown(test_meta_write_fails, begin, end),
        cmocka_unit_test_setup_teardown(test_reopen_fails, begin, end),
        cmocka_unit_test_setup_teardown(test_data_file_not_opened, begin, end),
        cmocka_unit_test_setup_teardown(test_flips_in_an_index_page, begin, end),
        cmocka_unit_test_setup_teardown(test_truncated_data_file, begin, end),
        cmocka_unit_test_setup_teardown(test_index_cut_short, begin, end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
