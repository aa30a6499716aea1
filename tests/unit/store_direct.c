/*
 * Bodies past the page cache, where the kernel or the disk will not have it so. The doubles are
 * this program's own pwritev and syscall: they refuse what goes to descriptors with O_DIRECT, and
 * asynchronous reads and writes.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "aio_double.h"
#include "double.h"
#include "store_test.h"

#define N 40u
#define SCATTERED 3000u
#define FILLS_MAX 2000u
#define PLACES_MIN 16u
#define BODY_BYTES 50000u /* several batches for the writer threads, and a rest behind whole units */

enum direct_fault { DIRECT_WORKS, DIRECT_EINVAL, DIRECT_EIO, DIRECT_SHORT };

static _Atomic int fault;      /* enum direct_fault */
static _Atomic int fault_times;
static _Atomic long refused_call; /* SYS_io_...; 0: none */
static _Atomic unsigned n_direct, n_refused, n_at_once;

ssize_t double_pwritev(int fd, const struct iovec *iov, int n, off_t at) __asm__("pwritev");
ssize_t double_pwritev64(int fd, const struct iovec *iov, int n, off_t at) __asm__("pwritev64");

ssize_t double_pwritev(int fd, const struct iovec *iov, int n, off_t at)
{
    ssize_t (*real_pwritev)(int, const struct iovec *, int, off_t);
    real("pwritev", &real_pwritev);
    if (!(fcntl(fd, F_GETFL) & O_DIRECT))
        return real_pwritev(fd, iov, n, at);
    n_direct++;
    if (fault == DIRECT_WORKS || fault_times-- <= 0)
        return real_pwritev(fd, iov, n, at);
    n_refused++;
    if (fault == DIRECT_SHORT)
        return real_pwritev(fd, &(struct iovec){iov[0].iov_base, 4096}, 1, at);
    errno = fault == DIRECT_EIO ? EIO : EINVAL;
    return -1;
}

ssize_t double_pwritev64(int fd, const struct iovec *iov, int n, off_t at)
{
    return double_pwritev(fd, iov, n, at);
}

long syscall(long number, ...)
{
    long (*real_syscall)(long, ...);
    real("syscall", &real_syscall);
    long a[6];
    va_list args;
    va_start(args, number);
    aio_double_arguments(a, args);
    va_end(args);
    if (number == refused_call) {
        n_refused++;
        errno = number == SYS_io_setup ? ENOSYS : EAGAIN;
        return -1;
    }
    long result;
    if (aio_double_call(number, a, double_pwritev, &result)) {
        n_at_once += number == SYS_io_getevents;
        return result;
    }
    return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static unsigned n_fills;

static int begin(void **state)
{
    fault = DIRECT_WORKS;
    fault_times = INT32_MAX;
    refused_call = 0;
    n_direct = n_refused = n_at_once = 0;
    return test_begin(state, true);
}

/* Some file systems have no O_DIRECT; then there is nothing to see here. */
static void needs_direct(struct test_store *t)
{
    char path[300];
    snprintf(path, sizeof path, "%s/blocks", t->dir);
    int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        skip();
    close(fd);
}

static void fill(uint8_t *body, unsigned key, unsigned version)
{
    for (unsigned i = 0; i < BODY_BYTES; i++)
        body[i] = (uint8_t)(i / 512 + key * 7 + version * 31);
}

static enum status set_all(struct test_store *t, unsigned version)
{
    static struct store_mutation m[N];
    static char names[N][8];
    uint8_t *bodies = mem_alloc(N * BODY_BYTES);
    for (unsigned i = 0; i < N; i++) {
        fill(bodies + (size_t)i * BODY_BYTES, i, version);
        snprintf(names[i], sizeof names[i], "k%02u", i);
        m[i] = (struct store_mutation){
            STORE_SET, text(names[i]), text("h"), {bodies + (size_t)i * BODY_BYTES, BODY_BYTES}};
    }
    enum status st = test_commit(t, NULL, 0, m, N);
    free(bodies);
    return st;
}

/* Into aligned memory, with room for the last unit's padding, so that reads are direct too. */
static void expect_all(struct test_store *t, unsigned version)
{
    enum { ROOM = 53248 };
    static struct store_get gets[N];
    static char names[N][8];
    uint8_t *got = mem_alloc_aligned(4096, (size_t)N * ROOM), *want = mem_alloc(BODY_BYTES);
    for (unsigned i = 0; i < N; i++) {
        snprintf(names[i], sizeof names[i], "k%02u", i);
        gets[i] = (struct store_get){
            .key = text(names[i]), .body = got + (size_t)i * ROOM, .body_cap = ROOM};
    }
    struct test_read r = {.read = {.gets = gets, .n_gets = N}};
    assert_int_equal(test_read(t, &r), ST_OK);
    for (unsigned i = 0; i < N; i++) {
        fill(want, i, version);
        assert_int_equal(gets[i].st, ST_OK);
        assert_int_equal(gets[i].body_len, BODY_BYTES);
        assert_memory_equal(got + (size_t)i * ROOM, want, BODY_BYTES);
    }
    store_read_release(&r.read);
    free(want);
    free(got);
}

static void reopen(struct test_store *t)
{
    store_close(t->store);
    test_store_reopen(t);
}

static void test_bodies_go_past_the_page_cache(void **state)
{
    struct test_store *t = *state;
    needs_direct(t);
    assert_int_equal(set_all(t, 1), ST_OK);
    assert_true(n_direct > 0);
    expect_all(t, 1);
}

/* A file system that takes O_DIRECT at open and refuses it at a write. */
static void test_refused_writes_go_through_it(void **state)
{
    struct test_store *t = *state;
    needs_direct(t);
    fault = DIRECT_EINVAL;
    assert_int_equal(set_all(t, 1), ST_OK);
    assert_true(n_refused > 0);
    expect_all(t, 1);
    n_direct = 0;
    assert_int_equal(set_all(t, 2), ST_OK);
    assert_int_equal(n_direct, 0); /* not asked again */
    reopen(t);
    expect_all(t, 2);
}

/* One of the commit's writes fails, on one of the threads: ST_IO, and the old bodies stand. */
static void test_failed_write_fails_the_commit(void **state)
{
    struct test_store *t = *state;
    needs_direct(t);
    assert_int_equal(set_all(t, 1), ST_OK);
    fault = DIRECT_EIO;
    fault_times = 1;
    assert_int_equal(set_all(t, 2), ST_IO);
    assert_int_equal(n_refused, 1);
    expect_all(t, 1);
    assert_int_equal(set_all(t, 3), ST_OK);
    expect_all(t, 3);
    reopen(t);
    expect_all(t, 3);
}

/* Leaves free units that do not touch, and hardly any others. */
static void scatter(struct test_store *t)
{
    static struct store_mutation m[SCATTERED];
    static char names[SCATTERED][8];
    static uint8_t zeros[1u << 18];
    unsigned n_odd = 0;
    for (unsigned i = 0; i < SCATTERED; i++) {
        snprintf(names[i], sizeof names[i], "s%05u", i);
        m[i] = (struct store_mutation){STORE_SET, text(names[i]), {0}, {zeros, 4096}};
    }
    assert_int_equal(test_commit(t, NULL, 0, m, SCATTERED), ST_OK);
    for (unsigned i = 1; i < SCATTERED; i += 2)
        m[n_odd++] = (struct store_mutation){STORE_CLEAR, text(names[i]), {0}, {0}};
    assert_int_equal(test_commit(t, NULL, 0, m, n_odd), ST_OK);
    /* Long runs are used before; then a body is written in many places. */
    unsigned before = n_direct;
    for (unsigned i = 0; i < FILLS_MAX && n_direct < before + PLACES_MIN; i++) {
        char name[16];
        before = n_direct;
        snprintf(name, sizeof name, "fill%u", n_fills++);
        m[0] = (struct store_mutation){STORE_SET, text(name), {0}, {zeros, sizeof zeros}};
        assert_int_equal(test_commit(t, NULL, 0, m, 1), ST_OK);
    }
    assert_true(n_direct >= before + PLACES_MIN);
    n_at_once = 0;
}

static void test_scattered_bodies_are_written_at_once(void **state)
{
    struct test_store *t = *state;
    needs_direct(t);
    scatter(t);
    assert_int_equal(set_all(t, 1), ST_OK);
    assert_true(n_at_once > 0);
    reopen(t);
    expect_all(t, 1);
}

static void test_scattered_writes_that_fail(void **state)
{
    static const enum status of[] = {
        [DIRECT_EINVAL] = ST_OK, [DIRECT_EIO] = ST_IO, [DIRECT_SHORT] = ST_OK};
    struct test_store *t = *state;
    needs_direct(t);
    assert_int_equal(set_all(t, 1), ST_OK);
    scatter(t);
    for (enum direct_fault f = DIRECT_SHORT; f >= DIRECT_EINVAL; f--) {
        fault = (int)f;
        fault_times = 3;
        assert_int_equal(set_all(t, 1 + f), of[f]);
        assert_true(n_at_once > 0 && n_refused > 0);
        fault = DIRECT_WORKS;
        expect_all(t, of[f] ? 1 + DIRECT_SHORT : 1 + f);
        n_refused = 0;
        if (f > DIRECT_EINVAL)
            scatter(t);
    }
    reopen(t);
    expect_all(t, 1 + DIRECT_EINVAL);
}

static void test_short_writes_are_completed(void **state)
{
    struct test_store *t = *state;
    needs_direct(t);
    fault = DIRECT_SHORT;
    assert_int_equal(set_all(t, 1), ST_OK);
    assert_true(n_refused > 0);
    reopen(t);
    expect_all(t, 1);
}

/* Containers may forbid it, or the system's contexts are all in use. */
static void test_without_asynchronous_io(void **state)
{
    struct test_store *t = *state;
    needs_direct(t);
    scatter(t);
    assert_int_equal(set_all(t, 1), ST_OK);
    refused_call = SYS_io_submit;
    expect_all(t, 1);
    assert_true(n_refused > 0);
    scatter(t);
    n_refused = 0;
    assert_int_equal(set_all(t, 2), ST_OK);
    assert_true(n_refused > 0);
    expect_all(t, 2);
    n_refused = 0;
    refused_call = SYS_io_setup;
    reopen(t);
    expect_all(t, 2);
    assert_true(n_refused > 0);
    scatter(t);
    assert_int_equal(set_all(t, 3), ST_OK);
    expect_all(t, 3);
    refused_call = 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_bodies_go_past_the_page_cache, begin, test_end),
        cmocka_unit_test_setup_teardown(test_refused_writes_go_through_it, begin, test_end),
        cmocka_unit_test_setup_teardown(test_failed_write_fails_the_commit, begin, test_end),
        cmocka_unit_test_setup_teardown(test_short_writes_are_completed, begin, test_end),
        cmocka_unit_test_setup_teardown(test_scattered_bodies_are_written_at_once, begin,
                                        test_end),
        cmocka_unit_test_setup_teardown(test_scattered_writes_that_fail, begin, test_end),
        cmocka_unit_test_setup_teardown(test_without_asynchronous_io, begin, test_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
