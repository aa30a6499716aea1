/*
 * A disk that fills up (G6): what was reserved is committed, what can't be
 * reserved is refused, clearing works on a full disk and gives the space back
 * without a restart.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <sys/wait.h>

#include "store_test.h"

#define BODY 16384u
#define PER_COMMIT 8

static char mount_point[] = "/tmp/store-full-XXXXXX";
static bool have_mount;

static int disk_begin(uint64_t mib)
{
    char options[64];
    snprintf(options, sizeof options, "size=%lluM", (unsigned long long)mib);
    return mount("store-test", mount_point, "tmpfs", 0, options);
}

static int group_begin(void **state)
{
    (void)state;
    if (!mkdtemp(mount_point))
        return -1;
    have_mount = unshare(CLONE_NEWNS) == 0 &&
                 mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 && disk_begin(64) == 0;
    if (have_mount)
        umount(mount_point);
    else
        print_message("# no small disk: mounting a tmpfs is not allowed here (%s)\n",
                      strerror(errno));
    return 0;
}

static int group_end(void **state)
{
    (void)state;
    rmdir(mount_point);
    return 0;
}

static int begin(void **state)
{
    *state = NULL;
    if (!have_mount)
        return 0;
    if (disk_begin(64) < 0)
        return -1;
    struct test_store *t = mem_zalloc(sizeof *t);
    test_store_begin(t, mount_point);
    *state = t;
    return 0;
}

static int end(void **state)
{
    if (!*state)
        return 0;
    test_store_end(*state);
    free(*state);
    return umount(mount_point);
}

struct keys {
    char name[PER_COMMIT][16];
    uint8_t body[PER_COMMIT][BODY];
    struct store_mutation m[PER_COMMIT];
};

static uint32_t body_len(uint64_t number)
{
    struct chance c = {number};
    return (uint32_t)(BODY - chance_below(&c, 9000));
}

static void keys_make(struct keys *k, uint64_t first, uint64_t salt)
{
    for (size_t i = 0; i < PER_COMMIT; i++) {
        uint64_t number = first + i;
        snprintf(k->name[i], sizeof k->name[i], "block-%08llu", (unsigned long long)number);
        struct chance c = {number + salt};
        memset(k->body[i], (int)chance_u64(&c), BODY);
        put_le64(k->body[i], number + salt);
        k->m[i] = (struct store_mutation){
            STORE_SET, text(k->name[i]), text("head"), {k->body[i], body_len(number)}};
    }
}

/* Reserves for PER_COMMIT bodies and commits them; what was reserved must go in. */
static enum status store_some(struct test_store *t, struct keys *k, uint64_t first, uint64_t salt)
{
    keys_make(k, first, salt);
    struct store_reservation want = {(uint64_t)BODY * PER_COMMIT, PER_COMMIT};
    enum status st = test_reserve(t, want.body_bytes, want.keys);
    if (st)
        return st;
    struct test_commit c = {
        .commit = {.mutations = k->m, .n_mutations = PER_COMMIT, .reserved = true}};
    test_commit_start(t, &c);
    test_env_until(&t->env, &c.done);
    assert_int_equal(c.st, ST_OK);
    store_unreserve(t->store, want);
    return ST_OK;
}

static void expect(struct test_store *t, uint64_t number, uint64_t salt)
{
    static uint8_t got[BODY];
    char name[16];
    snprintf(name, sizeof name, "block-%08llu", (unsigned long long)number);
    struct store_get get = {.key = text(name), .body = got, .body_cap = BODY};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    assert_int_equal(test_read(t, &r), ST_OK);
    assert_int_equal(get.st, ST_OK);
    assert_int_equal(get.body_len, body_len(number));
    assert_int_equal(get_le64(got), number + salt);
    struct chance c = {number + salt};
    assert_int_equal(got[body_len(number) - 1], (uint8_t)chance_u64(&c));
    store_read_release(&r.read);
}

static uint64_t fill(struct test_store *t, struct keys *k, uint64_t salt)
{
    uint64_t n = 0;
    while (store_some(t, k, n, salt) == ST_OK) {
        n += PER_COMMIT;
        assert_true(n < 100000);
    }
    return n;
}

static void clear_range(struct test_store *t, uint64_t from, uint64_t to)
{
    char begin_key[16], end_key[16];
    snprintf(begin_key, sizeof begin_key, "block-%08llu", (unsigned long long)from);
    snprintf(end_key, sizeof end_key, "block-%08llu", (unsigned long long)to);
    struct store_mutation m[] = {
        {.kind = STORE_CLEAR_RANGE, .key = text(begin_key), .head = text(end_key)},
        {.kind = STORE_SET, .key = text("trimmed"), .head = text("yes")},
    };
    assert_int_equal(test_commit(t, NULL, 0, m, 2), ST_OK);
}

static void test_fill_trim_fill(void **state)
{
    if (!*state)
        skip();
    struct test_store *t = *state;
    struct keys *k = mem_alloc(sizeof *k);
    for (uint64_t turn = 0; turn < 3; turn++) {
        uint64_t n = fill(t, k, turn);
        print_message("# turn %d: %d bodies on a disk of 64 MiB\n", (int)turn, (int)n);
        assert_true(n * 12000 > 30u << 20);
        keys_make(k, n, turn);
        assert_int_equal(test_commit(t, NULL, 0, k->m, PER_COMMIT), ST_NOSPC);
        for (uint64_t i = 0; i < n; i += 97)
            expect(t, i, turn);
        /* Small things still go. */
        for (int i = 0; i < 50; i++)
            assert_int_equal(test_set(t, "owner", i % 2 ? "a" : "b"), ST_OK);
        clear_range(t, 0, n / 2);
        assert_int_equal(store_some(t, k, 0, turn + 100), ST_OK);
        expect(t, 0, turn + 100);
        expect(t, n - 1, turn);
        clear_range(t, 0, 99999999);
    }
    free(k);
}

/* Overwriting on a disk that is nearly full: some reservations are refused, no reserved
 * commit fails, and no body is damaged. */
static void test_overwrite_when_full(void **state)
{
    if (!*state)
        skip();
    struct test_store *t = *state;
    struct keys *k = mem_alloc(sizeof *k);
    struct chance chance = chance_begin("overwrite");
    uint64_t n = fill(t, k, 0), salts[100000 / PER_COMMIT] = {0}, done = 0;
    clear_range(t, n - PER_COMMIT * 20, n);
    n -= PER_COMMIT * 20;
    for (int i = 0; i < 400; i++) {
        uint64_t at = chance_below(&chance, n / PER_COMMIT);
        if (store_some(t, k, at * PER_COMMIT, (uint64_t)i + 1000) == ST_OK) {
            salts[at] = (uint64_t)i + 1000;
            done++;
        }
    }
    print_message("# %d of 400 overwrites\n", (int)done);
    assert_true(done >= 390);
    for (uint64_t at = 0; at < n / PER_COMMIT; at++)
        expect(t, at * PER_COMMIT + at % PER_COMMIT, salts[at]);
    free(k);
}

/* Everything is reserved before anything is committed: all of it must go in, while other
 * commits try to take the space away. */
static void test_reserved_first_committed_last(void **state)
{
    if (!*state)
        skip();
    struct test_store *t = *state;
    struct keys *k = mem_alloc(sizeof *k);
    struct store_reservation want = {(uint64_t)BODY * PER_COMMIT, PER_COMMIT};
    uint64_t n = 0;
    while (test_reserve(t, want.body_bytes, want.keys) == ST_OK)
        n++;
    print_message("# %d MiB reserved at once\n", (int)(n * want.body_bytes >> 20));
    assert_true(n * want.body_bytes > 12u << 20);
    uint64_t stolen = 0;
    for (uint64_t i = 0; i < n; i++) {
        keys_make(k, 50000 + i * PER_COMMIT, 0);
        stolen += test_commit(t, NULL, 0, k->m, PER_COMMIT) == ST_OK;
        keys_make(k, i * PER_COMMIT, 7);
        struct test_commit c = {
            .commit = {.mutations = k->m, .n_mutations = PER_COMMIT, .reserved = true}};
        test_commit_start(t, &c);
        test_env_until(&t->env, &c.done);
        assert_int_equal(c.st, ST_OK);
        store_unreserve(t->store, want);
    }
    print_message("# %d others got in\n", (int)stolen);
    for (uint64_t i = 0; i < n * PER_COMMIT; i += 13)
        expect(t, i, 7);
    free(k);
}

/* After a restart on a full disk the store opens, reads, and can be emptied. */
static void test_restart_when_full(void **state)
{
    if (!*state)
        skip();
    struct test_store *t = *state;
    struct keys *k = mem_alloc(sizeof *k);
    uint64_t n = fill(t, k, 0);
    /* Take what the store left to the disk. */
    char path[300];
    snprintf(path, sizeof path, "%s/ballast", mount_point);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    while (fwrite(k, 1, 4096, f) == 4096)
        ;
    fclose(f);
    store_close(t->store);
    test_store_reopen(t);
    expect(t, n - 1, 0);
    clear_range(t, 0, n);
    assert_int_equal(store_some(t, k, 0, 9), ST_OK);
    expect(t, 3, 9);
    unlink(path);
    free(k);
}

/* Takes what is left of the disk, to the last inode's block. */
static void disk_stuff(const char *path)
{
    static const char block[4096];
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    assert_true(fd >= 0);
    for (size_t size = sizeof block; size > 0; size /= 2)
        while (write(fd, block, size) == (ssize_t)size)
            ;
    close(fd);
}

/* Server after server is killed on a disk without a free block: the next one can always
 * begin its session, for a ballast was set aside while there was space. */
static void test_session_when_full(void **state)
{
    if (!*state)
        skip();
    struct test_store *t = *state;
    char stuffing[300], reserve[300];
    snprintf(stuffing, sizeof stuffing, "%s/stuffing", mount_point);
    snprintf(reserve, sizeof reserve, "%s/reserve", t->dir);
    struct stat sb;
    assert_int_equal(stat(reserve, &sb), 0);
    assert_true(sb.st_size == 1 << 20 && sb.st_blocks * 512 >= 1 << 20);
    store_close(t->store);
    t->store = NULL;
    for (uint8_t turn = 0; turn < 4; turn++) {
        disk_stuff(stuffing);
        fflush(NULL);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            struct err e = {0};
            uint8_t id[STORE_ID_BYTES] = {turn, 1};
            if (store_open(t->uri, &(struct store_options){.lease_ms = LEASE_MS}, &t->store, &e) ||
                store_session_begin(t->store, id, &e)) {
                fprintf(stderr, "# turn %d: %s\n", turn, e.text);
                _exit(1);
            }
            kill(getpid(), SIGKILL);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status));
    }
    unlink(stuffing);
    test_store_reopen(t);
    assert_int_equal(stat(reserve, &sb), 0);
    assert_int_equal(sb.st_size, 1 << 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_fill_trim_fill, begin, end),
        cmocka_unit_test_setup_teardown(test_overwrite_when_full, begin, end),
        cmocka_unit_test_setup_teardown(test_reserved_first_committed_last, begin, end),
        cmocka_unit_test_setup_teardown(test_restart_when_full, begin, end),
        cmocka_unit_test_setup_teardown(test_session_when_full, begin, end),
    };
    return cmocka_run_group_tests(tests, group_begin, group_end);
}
