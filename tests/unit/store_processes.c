/*
 * Several processes on one store: each test forks children that open it
 * themselves.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

#include "store/lmdb/engine.h"
#include "store_test.h"

#define NOBODY 65534u

/* The folder; each process opens the store for itself. */
static char dir[200];

static int begin(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/store-processes-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int end(void **state)
{
    (void)state;
    test_folder_remove(dir);
    return 0;
}

static void store_here(struct test_store *t, unsigned lease_ms)
{
    snprintf(t->dir, sizeof t->dir, "%s", dir);
    snprintf(t->uri, sizeof t->uri, "lmdb:%s", dir);
    test_env_start(&t->env);
    struct err e = {0};
    if (store_open(t->uri, &(struct store_options){.flags = STORE_CREATE, .lease_ms = lease_ms}, &t->store, &e))
        fail_msg("store_open: %s", e.text);
}

static void store_leave(struct test_store *t)
{
    store_close(t->store);
    test_env_stop(&t->env);
}

static pid_t child(void (*run)(int ready_fd), int *ready_fd)
{
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        close(fds[0]);
        alarm(60);
        run(fds[1]);
        _exit(0);
    }
    close(fds[1]);
    *ready_fd = fds[0];
    return pid;
}

static void say_ready(int fd)
{
    CHECK(write(fd, "r", 1) == 1);
}

static void wait_ready(int fd)
{
    char c;
    assert_int_equal(read(fd, &c, 1), 1);
}

static void expect_exit_0(pid_t pid)
{
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static bool get_number(struct test_store *t, const char *key, uint64_t *value)
{
    struct store_get get = {.key = text(key)};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    CHECK(test_read(t, &r) == ST_OK);
    bool there = get.st == ST_OK;
    *value = there ? get_le64(get.head.data) : 0;
    store_read_release(&r.read);
    return there;
}

#define COUNTS 150

/* Counts a shared number up with checks, and writes a body of its own each time. */
static void count_up(int ready_fd)
{
    struct test_store t = {0};
    store_here(&t, 5000);
    say_ready(ready_fd);
    uint8_t body[20000];
    memset(body, getpid() & 255, sizeof body);
    char key[32];
    for (int done = 0; done < COUNTS;) {
        uint64_t n;
        bool there = get_number(&t, "count", &n);
        uint8_t old[8], fresh[8];
        put_le64(old, n);
        put_le64(fresh, n + 1);
        snprintf(key, sizeof key, "body-%d-%d", (int)getpid(), done % 10);
        struct store_check check = {
            there ? STORE_CHECK_VALUE : STORE_CHECK_ABSENT, text("count"), {old, 8}};
        struct store_mutation m[] = {
            {.kind = STORE_SET, .key = text("count"), .head = {fresh, 8}},
            {.kind = STORE_SET, .key = text(key), .head = text("h"), .body = {body, sizeof body}},
        };
        enum status st = test_commit(&t, &check, 1, m, 2);
        CHECK(st == ST_OK || st == ST_CONFLICT);
        done += st == ST_OK;
    }
    for (int i = 0; i < 10; i++) {
        uint8_t got[20000];
        snprintf(key, sizeof key, "body-%d-%d", (int)getpid(), i);
        struct store_get get = {.key = text(key), .body = got, .body_cap = sizeof got};
        struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
        CHECK(test_read(&t, &r) == ST_OK && get.st == ST_OK);
        CHECK(memcmp(got, body, sizeof body) == 0);
        store_read_release(&r.read);
    }
    store_leave(&t);
}

static void test_concurrent_counters(void **state)
{
    (void)state;
    enum { N = 3 };
    pid_t pids[N];
    int fds[N];
    for (int i = 0; i < N; i++)
        pids[i] = child(count_up, &fds[i]);
    for (int i = 0; i < N; i++) {
        expect_exit_0(pids[i]);
        close(fds[i]);
    }
    struct test_store t = {0};
    store_here(&t, 5000);
    uint64_t n;
    assert_true(get_number(&t, "count", &n));
    assert_int_equal(n, N * COUNTS);
    store_leave(&t);
}

/* Commits without end, so that being stopped hits it with the writer lock held sooner or
 * later. */
static void commit_forever(int ready_fd)
{
    struct test_store t = {0};
    store_here(&t, 60000);
    say_ready(ready_fd);
    uint8_t *body = mem_zalloc(1u << 20);
    for (int i = 0;; i++) {
        struct store_mutation m[8];
        char keys[8][8];
        for (int j = 0; j < 8; j++) {
            snprintf(keys[j], sizeof keys[j], "k%d", j);
            m[j] = (struct store_mutation){STORE_SET, text(keys[j]), text("h"), {body, 1u << 20}};
        }
        CHECK(test_commit(&t, NULL, 0, m, 8) == ST_OK);
    }
}

/* Whether the process was killed; its parent need not have been told yet. */
static bool has_ended(pid_t pid)
{
    char state = 0;
    return lm_process_start_time(pid, &state) == 0 || state == 'Z' || state == 'X';
}

/* Who is stopped while it holds the writer lock is killed after a lease, and its half-done
 * transaction leaves nothing behind. */
static void test_stopped_lock_holder_is_killed(void **state)
{
    (void)state;
    bool killed = false;
    for (int turn = 0; turn < 20 && !killed; turn++) {
        int fd, status;
        pid_t pid = child(commit_forever, &fd);
        wait_ready(fd);
        struct test_store t = {0};
        store_here(&t, 300);
        usleep(30000 + 7000 * (unsigned)turn);
        kill(pid, SIGSTOP);
        waitpid(pid, &status, WUNTRACED);
        assert_int_equal(test_set(&t, "after", "x"), ST_OK);
        test_expect(&t, "after", "x");
        killed = has_ended(pid);
        if (!killed)
            kill(pid, SIGKILL);
        waitpid(pid, &status, 0);
        assert_int_equal(test_set(&t, "after", "y"), ST_OK);
        store_leave(&t);
        close(fd);
    }
    assert_true(killed);
}

/* Says that it holds the lock, which it does not: as one that is dying, whose writes are not through
 * yet. */
static void haunt(int ready_fd)
{
    struct test_store t = {0};
    store_here(&t, 60000);
    lm_lock_state_set((struct lm *)(void *)t.store, LM_LOCK_HELD);
    say_ready(ready_fd);
    for (;;)
        pause();
}

/* The writer lock of one who died is free at once, but what it wrote last may come to the disk
 * later: until it is gone nobody may write, perhaps to the same place. */
static void test_writes_of_one_who_dies_are_waited_for(void **state)
{
    (void)state;
    int fd, status;
    pid_t ghost = child(haunt, &fd);
    wait_ready(fd);
    pid_t killer = fork();
    assert_true(killer >= 0);
    if (killer == 0) {
        usleep(300000);
        kill(ghost, SIGKILL);
        _exit(0);
    }
    struct test_store t = {0};
    store_here(&t, 60000);
    assert_int_equal(test_set(&t, "after", "x"), ST_OK);
    assert_true(has_ended(ghost));
    test_expect(&t, "after", "x");
    waitpid(ghost, &status, 0);
    waitpid(killer, &status, 0);
    store_leave(&t);
    close(fd);
}

/* A process that is stopped without the lock is left alone. */
static void open_and_sleep(int ready_fd)
{
    struct test_store t = {0};
    store_here(&t, 60000);
    CHECK(test_set(&t, "mine", "1") == ST_OK);
    say_ready(ready_fd);
    for (;;)
        pause();
}

static void test_idle_stopped_process_lives(void **state)
{
    (void)state;
    int fd, status;
    pid_t pid = child(open_and_sleep, &fd);
    wait_ready(fd);
    kill(pid, SIGSTOP);
    waitpid(pid, &status, WUNTRACED);
    struct test_store t = {0};
    store_here(&t, 100);
    uint64_t end_ns = test_env_now(NULL) + 600000000u;
    while (test_env_now(NULL) < end_ns)
        assert_int_equal(test_set(&t, "other", "x"), ST_OK);
    assert_int_equal(waitpid(pid, &status, WNOHANG), 0);
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    store_leave(&t);
    close(fd);
}

struct watched {
    struct store_watch watch;
    bool fired;
};

static void watch_fired(struct store_watch *watch)
{
    container_of(watch, struct watched, watch)->fired = true;
}

static void watch_and_answer(int ready_fd)
{
    struct test_store t = {0};
    store_here(&t, 5000);
    for (int i = 0; i < 2; i++) {
        struct watched w = {.watch = {.key = text("request"), .fired = watch_fired}};
        store_watch(t.store, &t.env.env, &w.watch);
        say_ready(ready_fd);
        test_env_until(&t.env, &w.fired);
        struct store_mutation m = {
            .kind = STORE_SET, .key = text(i ? "answer2" : "answer1"), .head = text("done")};
        struct test_commit c = {
            .commit = {.mutations = &m, .n_mutations = 1, .wake_watchers = i == 0}};
        test_commit_start(&t, &c);
        test_env_until(&t.env, &c.done);
        CHECK(c.st == ST_OK);
    }
    store_leave(&t);
}

/* With the bell at once, without it within the second that watches are looked over. */
static void test_watch_across_processes(void **state)
{
    (void)state;
    int fd;
    pid_t pid = child(watch_and_answer, &fd);
    struct test_store t = {0};
    store_here(&t, 5000);
    for (int i = 0; i < 2; i++) {
        wait_ready(fd);
        struct watched w = {
            .watch = {.key = text(i ? "answer2" : "answer1"), .fired = watch_fired}};
        store_watch(t.store, &t.env.env, &w.watch);
        struct store_mutation m = {
            .kind = STORE_SET, .key = text("request"), .head = text("please")};
        struct test_commit c = {
            .commit = {.mutations = &m, .n_mutations = 1, .wake_watchers = i == 0}};
        uint64_t t0 = test_env_now(NULL);
        test_commit_start(&t, &c);
        test_env_until(&t.env, &c.done);
        test_env_until(&t.env, &w.fired);
        uint64_t took_ms = (test_env_now(NULL) - t0) / 1000000u;
        print_message("# watch %s the bell: %d ms there and back\n", i ? "without" : "with",
                      (int)took_ms);
        assert_true(took_ms < (i ? 5000 : 800));
    }
    expect_exit_0(pid);
    store_leave(&t);
    close(fd);
}

static const uint8_t session[16] = "child's session";

static void session_and_log(int ready_fd)
{
    struct test_store t = {0};
    struct err e = {0};
    struct store_log *log;
    store_here(&t, 5000);
    CHECK(store_session_begin(t.store, session, &e) == ST_OK);
    CHECK(store_log_open(t.store, &t.env.env, session, 4u << 20, &log, &e) == ST_OK);
    uint8_t meta[32] = {0};
    struct iovec iov = {(void *)(uintptr_t) "payload", 7};
    for (int i = 0; i < 3; i++)
        CHECK(store_log_append(log, 9, meta, &iov, 1, 7) != 0);
    CHECK(store_log_submit(log) == ST_OK);
    uint64_t id = store_log_id(log);
    CHECK(write(ready_fd, &id, sizeof id) == sizeof id);
    for (;;)
        pause();
}

static bool count_record(void *arg, const struct store_log_record *rec)
{
    assert_int_equal(rec->payload_len, 7);
    assert_memory_equal(rec->payload, "payload", 7);
    (*(int *)arg)++;
    return true;
}

/* G1: what a process submitted is there after it was killed; its death is known at once. */
static void test_session_killed_and_log_replayed(void **state)
{
    (void)state;
    int fd, status, n = 0;
    pid_t pid = child(session_and_log, &fd);
    uint64_t id;
    assert_int_equal(read(fd, &id, sizeof id), sizeof id);
    struct test_store t = {0};
    struct err e = {0};
    store_here(&t, 5000);
    assert_int_equal(store_session_probe(t.store, session), STORE_SESSION_ALIVE);
    assert_int_equal(store_log_remove_unused(t.store, NULL, 0, &e), ST_OK);
    kill(pid, SIGSTOP);
    assert_int_equal(store_session_probe(t.store, session), STORE_SESSION_ALIVE);
    assert_int_equal(store_session_kill(t.store, session, &e), ST_OK);
    assert_int_equal(store_session_probe(t.store, session), STORE_SESSION_DEAD);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    assert_int_equal(store_log_replay(t.store, id, 9, 0, count_record, &n, &e), ST_OK);
    assert_int_equal(n, 3);
    assert_int_equal(store_log_remove_unused(t.store, &id, 1, &e), ST_OK);
    assert_int_equal(store_log_replay(t.store, id, 9, 0, count_record, &n, &e), ST_OK);
    assert_int_equal(store_log_remove_unused(t.store, NULL, 0, &e), ST_OK);
    assert_int_equal(store_log_replay(t.store, id, 9, 0, count_record, &n, &e), ST_NOTFOUND);
    char path[300];
    snprintf(path, sizeof path, "%s/session/6368696c6427732073657373696f6e00", dir);
    assert_int_not_equal(access(path, F_OK), 0);
    store_leave(&t);
    close(fd);
}

static void session_and_work(int ready_fd)
{
    struct test_store t = {0};
    struct err e = {0};
    store_here(&t, 5000);
    CHECK(store_session_begin(t.store, session, &e) == ST_OK);
    say_ready(ready_fd);
    for (;;)
        usleep(400000);
}

/* Who is at work is not ended; who stands still is, even where nobody stopped it. */
static void test_session_at_work_is_not_killed(void **state)
{
    (void)state;
    int fd, status;
    char c;
    pid_t pid = child(session_and_work, &fd);
    wait_ready(fd);
    struct test_store t = {0};
    struct err e = {0};
    store_here(&t, 5000);
    assert_int_equal(store_session_kill(t.store, session, &e), ST_BUSY);
    assert_non_null(strstr(e.text, "alive and at work"));
    assert_int_equal(waitpid(pid, &status, WNOHANG), 0);
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    close(fd);
    assert_int_equal(store_log_remove_unused(t.store, NULL, 0, &e), ST_OK); /* its file */
    store_leave(&t);
    pid = child(session_and_log, &fd);
    assert_int_equal(read(fd, &c, 1), 1);
    store_here(&t, 5000);
    assert_int_equal(store_session_kill(t.store, session, &e), ST_OK);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    store_leave(&t);
    close(fd);
}

static void *live_on(void *arg)
{
    while (pause())
        continue;
    return arg;
}

_Noreturn static void session_whose_first_thread_ends(int ready_fd)
{
    struct test_store t = {0};
    struct err e = {0};
    pthread_t other;
    store_here(&t, 5000);
    CHECK(store_session_begin(t.store, session, &e) == ST_OK);
    CHECK(pthread_create(&other, NULL, live_on, NULL) == 0);
    say_ready(ready_fd);
    pthread_exit(NULL);
}

/* A process that is being killed is a zombie as soon as its first thread has ended; its files, and
 * so the session, go with the last one. Who is late in killing it waits for that. */
static void test_session_of_a_half_dead_process(void **state)
{
    (void)state;
    int fd, status;
    pid_t pid = child(session_whose_first_thread_ends, &fd);
    wait_ready(fd);
    struct test_store t = {0};
    struct err e = {0};
    store_here(&t, 5000);
    char run_state = 0;
    for (int ms = 0; ms < 30000 && run_state != 'Z'; ms++) {
        assert_int_not_equal(lm_process_start_time(pid, &run_state), 0);
        usleep(1000);
    }
    assert_int_equal(run_state, 'Z');
    assert_int_equal(store_session_probe(t.store, session), STORE_SESSION_ALIVE);
    if (store_session_kill(t.store, session, &e) != ST_OK)
        fail_msg("%s", e.text);
    assert_int_equal(store_session_probe(t.store, session), STORE_SESSION_DEAD);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    /* Killed for good, and so it is. */
    assert_int_equal(store_session_kill(t.store, session, &e), ST_OK);
    store_leave(&t);
    close(fd);
}

_Noreturn static void stranger(int ready_fd)
{
    say_ready(ready_fd);
    live_on(NULL);
    _exit(0);
}

_Noreturn static void one_of_the_owner(int ready_fd)
{
    CHECK(setresuid(NOBODY, (uid_t)-1, (uid_t)-1) == 0); /* as belong_to_owner() has it */
    stranger(ready_fd);
}

/* What a store says of its processes its owner can write: nobody else's is ended for it by root. */
static void test_root_ends_only_what_the_owner_could(void **state)
{
    (void)state;
    if (geteuid() != 0)
        skip();
    void (*const runs[])(int) = {stranger, one_of_the_owner};
    const struct lm theirs = {.uid = NOBODY};
    for (unsigned i = 0; i < 2; i++) {
        int fd, status;
        pid_t pid = child(runs[i], &fd);
        wait_ready(fd);
        uint64_t start_time = lm_process_start_time(pid, NULL);
        struct err e = {0};
        assert_int_equal(lm_process_kill(&theirs, pid, start_time, &e), i ? ST_OK : ST_PERM);
        assert_int_equal(waitpid(pid, &status, WNOHANG), i ? pid : 0);
        if (!i) {
            kill(pid, SIGKILL);
            assert_int_equal(waitpid(pid, &status, 0), pid);
        }
        close(fd);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_concurrent_counters, begin, end),
        cmocka_unit_test_setup_teardown(test_stopped_lock_holder_is_killed, begin, end),
        cmocka_unit_test_setup_teardown(test_writes_of_one_who_dies_are_waited_for, begin, end),
        cmocka_unit_test_setup_teardown(test_idle_stopped_process_lives, begin, end),
        cmocka_unit_test_setup_teardown(test_watch_across_processes, begin, end),
        cmocka_unit_test_setup_teardown(test_session_killed_and_log_replayed, begin, end),
        cmocka_unit_test_setup_teardown(test_session_at_work_is_not_killed, begin, end),
        cmocka_unit_test_setup_teardown(test_session_of_a_half_dead_process, begin, end),
        cmocka_unit_test(test_root_ends_only_what_the_owner_could),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
