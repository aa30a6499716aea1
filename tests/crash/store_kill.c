/*
 * kill -9 of a process that commits, at random moments, again and again on one
 * store, while this process has it open too (G1, G2, G3): every answered commit
 * is there, whole, and nothing of one that did not happen; the next process goes
 * on from there.
 */
#include <signal.h>
#include <sys/wait.h>

#include "../unit/store_test.h"

#define KEYS 16

static char dir[] = "/tmp/store-kill-XXXXXX";

static size_t body_len(uint64_t n, uint64_t key)
{
    struct chance c = {n * 100 + key};
    return 1 + chance_below(&c, 60000);
}

static void store_here(struct test_store *t)
{
    snprintf(t->uri, sizeof t->uri, "lmdb:%s", dir);
    test_env_start(&t->env);
    test_store_reopen(t);
}

static uint64_t get_number(struct test_store *t)
{
    struct store_get get = {.key = text("n")};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    CHECK(test_read(t, &r) == ST_OK);
    uint64_t n = get.st == ST_OK ? get_le64(get.head.data) : 0;
    store_read_release(&r.read);
    return n;
}

/* Commit n writes half of the keys, with n in each body, and says so when it is answered. */
static void commit_on(int answers)
{
    struct test_store t = {0};
    store_here(&t);
    uint8_t *bodies = mem_alloc(KEYS * 60001), number[8], old[8];
    char names[KEYS][8];
    uint64_t n = get_number(&t);
    for (;;) {
        put_le64(old, n++);
        put_le64(number, n);
        struct store_check check = {
            n == 1 ? STORE_CHECK_ABSENT : STORE_CHECK_VALUE, text("n"), {old, 8}};
        struct store_mutation m[KEYS + 1] = {
            {.kind = STORE_SET, .key = text("n"), .head = {number, 8}}};
        size_t count = 1;
        for (uint64_t k = n % 2; k < KEYS; k += 2) {
            snprintf(names[k], sizeof names[k], "k%02d", (int)k);
            memset(bodies + k * 60001, (int)n, body_len(n, k));
            m[count++] = (struct store_mutation){
                STORE_SET, text(names[k]), {number, 8}, {bodies + k * 60001, body_len(n, k)}};
        }
        CHECK(test_commit(&t, &check, 1, m, count) == ST_OK);
        CHECK(write(answers, &n, sizeof n) == sizeof n);
    }
}

static void expect_whole(struct test_store *t, uint64_t n)
{
    static uint8_t body[60001];
    for (uint64_t k = 0; k < KEYS; k++) {
        uint64_t writer = n % 2 == k % 2 ? n : n - 1;
        char name[8];
        snprintf(name, sizeof name, "k%02d", (int)k);
        struct store_get get = {.key = text(name), .body = body, .body_cap = sizeof body};
        struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
        assert_int_equal(test_read(t, &r), ST_OK);
        if (writer == 0 || n == 0) {
            assert_int_equal(get.st, ST_NOTFOUND);
        } else {
            assert_int_equal(get.st, ST_OK);
            assert_int_equal(get_le64(get.head.data), writer);
            assert_int_equal(get.body_len, body_len(writer, k));
            for (size_t i = 0; i < get.body_len; i++)
                assert_int_equal(body[i], (uint8_t)writer);
        }
        store_read_release(&r.read);
    }
}

static void test_kills(void **state)
{
    (void)state;
    const char *given = getenv("KILLS");
    int kills = given ? atoi(given) : 60;
    struct chance chance = chance_begin("kills");
    assert_non_null(mkdtemp(dir));
    uint64_t n = 0;
    for (int i = 0; i < kills; i++) {
        int fds[2];
        assert_int_equal(pipe(fds), 0);
        fflush(NULL);
        pid_t pid = fork();
        if (pid == 0) {
            close(fds[0]);
            alarm(60);
            commit_on(fds[1]);
        }
        close(fds[1]);
        /* Every other time this process holds the store open when the other one dies. */
        struct test_store t = {0};
        if (i % 2)
            store_here(&t);
        uint64_t answered = n, got;
        assert_int_equal(read(fds[0], &got, sizeof got), sizeof got);
        usleep((unsigned)chance_below(&chance, 20000));
        kill(pid, SIGKILL);
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        do
            answered = got;
        while (read(fds[0], &got, sizeof got) == sizeof got);
        close(fds[0]);
        if (i % 2 == 0)
            store_here(&t);
        n = get_number(&t);
        assert_true(n == answered || n == answered + 1);
        expect_whole(&t, n);
        assert_int_equal(test_set(&t, "mine", "x"), ST_OK);
        store_close(t.store);
        test_env_stop(&t.env);
    }
    print_message("# %d kills, %d commits\n", kills, (int)n);
    test_folder_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kills),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
