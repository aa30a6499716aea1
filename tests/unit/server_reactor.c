/* The environment on libuv: order of tasks, timers, work, hooks, a clean end. */
#include "test.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include "server/reactor.h"

struct note {
    struct env_task task;
    int n;
};

static int seen[1000], n_seen;

static void take(struct env_task *task)
{
    seen[n_seen++] = container_of(task, struct note, task)->n;
}

static struct reactor *fresh(void)
{
    struct reactor *r;
    struct err e = {0};
    assert_int_equal(reactor_new(&r, &e), ST_OK);
    n_seen = 0;
    return r;
}

static void tasks_keep_their_order(void **state)
{
    (void)state;
    struct reactor *r = fresh();
    struct note notes[100];
    for (int i = 0; i < 100; i++) {
        notes[i] = (struct note){.task.run = take, .n = i};
        env_post(reactor_env(r), &notes[i].task);
    }
    assert_int_equal(n_seen, 0);
    while (n_seen < 100)
        reactor_run_once(reactor_env(r));
    for (int i = 0; i < 100; i++)
        assert_int_equal(seen[i], i);
    reactor_free(r);
}

static struct reactor *target;
static struct note from_afar[500];

static void *post_all(void *arg)
{
    (void)arg;
    for (int i = 0; i < 500; i++) {
        from_afar[i] = (struct note){.task.run = take, .n = i};
        env_post(reactor_env(target), &from_afar[i].task);
    }
    return NULL;
}

static void tasks_from_another_thread(void **state)
{
    (void)state;
    target = fresh();
    struct err e;
    assert_int_equal(reactor_start(target, &e), ST_OK);
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, post_all, NULL), 0);
    pthread_join(t, NULL);
    reactor_stop(target);
    reactor_join(target);
    reactor_free(target); /* runs what was still waiting */
    assert_int_equal(n_seen, 500);
    for (int i = 0; i < 500; i++)
        assert_int_equal(seen[i], i);
}

struct tick {
    struct env_timer timer;
    int n;
};

static void fire(struct env_timer *timer)
{
    seen[n_seen++] = container_of(timer, struct tick, timer)->n;
}

static void timers_fire_in_order(void **state)
{
    (void)state;
    struct reactor *r = fresh();
    struct env *env = reactor_env(r);
    static const unsigned delays[] = {30, 10, 20, 0, 40};
    struct tick ticks[5] = {0};
    uint64_t start = env_now_ns(env);
    for (int i = 0; i < 5; i++) {
        ticks[i] = (struct tick){.timer.fire = fire, .n = i};
        env_timer_start(env, &ticks[i].timer, delays[i]);
    }
    env_timer_stop(env, &ticks[2].timer);
    env_timer_stop(env, &ticks[2].timer);
    env_timer_start(env, &ticks[0].timer, 5); /* moved */
    while (n_seen < 4)
        reactor_run_once(env);
    assert_true(env_now_ns(env) - start >= 40 * 1000000u);
    static const int order[] = {3, 0, 1, 4};
    for (int i = 0; i < 4; i++)
        assert_int_equal(seen[i], order[i]);
    reactor_free(r);
}

static _Atomic pthread_t worker;
static int worked;

static void do_work(struct env_work *work)
{
    (void)work;
    worker = pthread_self();
}

static void work_done(struct env_work *work)
{
    (void)work;
    worked++;
}

static void work_runs_elsewhere(void **state)
{
    (void)state;
    struct reactor *r = fresh();
    struct env_work work[10] = {{0}};
    worked = 0;
    for (int i = 0; i < 10; i++) {
        work[i].work = do_work;
        work[i].done = work_done;
        env_work(reactor_env(r), &work[i]);
    }
    assert_int_equal(worked, 0);
    while (worked < 5)
        reactor_run_once(reactor_env(r));
    reactor_free(r); /* waits for the others */
    assert_int_equal(worked, 10);
    assert_false(pthread_equal(worker, pthread_self()));
}

static int hook_runs;

static void count_hook(struct reactor_hook *hook)
{
    (void)hook;
    hook_runs++;
}

static void hooks_run_each_turn(void **state)
{
    (void)state;
    struct reactor *r = fresh();
    struct reactor_hook hook = {.run = count_hook};
    struct note note = {.task.run = take, .n = 1};
    hook_runs = 0;
    reactor_hook_add(r, &hook);
    env_post(reactor_env(r), &note.task);
    reactor_run_once(reactor_env(r));
    assert_true(hook_runs > 0);
    reactor_hook_remove(&hook);
    int before = hook_runs;
    env_post(reactor_env(r), &note.task);
    reactor_run_once(reactor_env(r));
    assert_int_equal(hook_runs, before);
    reactor_free(r);
}

struct bell {
    struct env_timer timer;
    bool rang;
};

static void ring(struct env_timer *timer)
{
    container_of(timer, struct bell, timer)->rang = true;
}

/* Runs of the hooks until a timer ends the waiting, whose own are a few. */
#define FEW_RUNS 10
static int runs_while_waiting(struct reactor *r)
{
    struct bell bell = {.timer.fire = ring};
    hook_runs = 0;
    env_timer_start(reactor_env(r), &bell.timer, 3);
    while (!bell.rang)
        reactor_run_once(reactor_env(r));
    return hook_runs;
}

static void answer(struct reactor *r, int n)
{
    while (n-- > 0)
        reactor_expects(r, true);
}

/* Whether the loop looked for more; another program may have pushed it aside, so it has several
 * chances. */
static bool stays_awake_after(struct reactor *r, int n)
{
    for (int i = 0; i < 20; i++) {
        answer(r, n);
        if (runs_while_waiting(r) > FEW_RUNS)
            return true;
        usleep(11000); /* it lets others have the core for so long */
    }
    return false;
}

static void stays_awake_for_quick_clients_only(void **state)
{
    (void)state;
    cpu_set_t cores;
    bool may = sched_getaffinity(0, sizeof cores, &cores) == 0 && CPU_COUNT(&cores) > 1;
    struct reactor *r = fresh();
    struct reactor_hook hook = {.run = count_hook};
    reactor_hook_add(r, &hook);
    assert_int_equal(stays_awake_after(r, 100), may);
    /* In vain, so not again for a single answer; nor for a few. */
    answer(r, 1);
    assert_true(runs_while_waiting(r) <= FEW_RUNS);
    answer(r, 10);
    assert_true(runs_while_waiting(r) <= FEW_RUNS);
    /* Something else came. */
    answer(r, 100);
    reactor_expects(r, false);
    assert_true(runs_while_waiting(r) <= FEW_RUNS);
    /* Answers that are far apart. */
    for (int i = 0; i < 100; i++) {
        answer(r, 1);
        usleep(200);
    }
    assert_true(runs_while_waiting(r) <= FEW_RUNS);
    reactor_hook_remove(&hook);
    reactor_free(r);
}

static void one_core_is_left_to_others(void **state)
{
    (void)state;
    cpu_set_t all, one;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    size_t first = 0;
    while (!CPU_ISSET(first, &all))
        first++;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    struct reactor *r = fresh();
    struct reactor_hook hook = {.run = count_hook};
    reactor_hook_add(r, &hook);
    assert_false(stays_awake_after(r, 100));
    reactor_hook_remove(&hook);
    reactor_free(r);
    assert_int_equal(sched_setaffinity(0, sizeof all, &all), 0);
}

static void random_differs(void **state)
{
    (void)state;
    struct reactor *r = fresh();
    unsigned char a[64], b[64];
    env_random(reactor_env(r), a, sizeof a);
    env_random(reactor_env(r), b, sizeof b);
    assert_memory_not_equal(a, b, sizeof a);
    assert_true(env_realtime_ns(reactor_env(r)) > 1600000000ull * 1000000000u);
    reactor_free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tasks_keep_their_order), cmocka_unit_test(tasks_from_another_thread),
        cmocka_unit_test(timers_fire_in_order),   cmocka_unit_test(work_runs_elsewhere),
        cmocka_unit_test(hooks_run_each_turn),    cmocka_unit_test(random_differs),
        cmocka_unit_test(stays_awake_for_quick_clients_only),
        cmocka_unit_test(one_core_is_left_to_others),
    };
    return cmocka_run_group_tests_name("server_reactor", tests, NULL, NULL);
}
