/*
 * The environment on libuv; reactor.h says what for.
 *
 * Tasks posted by the reactor's own thread take a list without a lock and without waking
 * anything; those of other threads take one lock and wake the loop. Timers are few (the
 * layers above sweep where they have many), so a sorted list and one libuv timer serve them.
 * They count time by the boot clock, which goes on while the machine sleeps.
 *
 * A client that sends one request after another waits for us, and we for it; each time one of two
 * cores falls asleep and has to be woken, which on a virtual machine takes longer than all the rest.
 * So the loop stays awake for a moment (reactor_expects). What that may cost is bounded: a look in
 * vain, of AWAKE_NS, is preceded by QUICK_MIN answers that followed one another within QUICK_NS.
 */
#include "server/reactor.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include <uv.h>

#include "base/check.h"
#include "base/mem.h"

#define NS_PER_MS 1000000u
#define WORKER_THREADS_MIN 4u
#define WORKER_THREADS_MAX 64u

#define AWAKE_NS 50000u
#define QUICK_NS 150000u
#define QUICK_MIN 16u
/* So long between two looks: somebody else wanted the core, and is let alone for a while. */
#define PUSHED_ASIDE_NS 25000u
#define ASIDE_NS 10000000u

struct task_queue {
    struct env_task *first, **last;
};

struct reactor {
    struct env env; /* first: an env of ours is a reactor */
    uv_loop_t loop;
    uv_async_t wake;
    uv_timer_t timer;
    uv_prepare_t before_poll;
    uv_check_t after_poll;
    uv_idle_t hurry; /* active: the next poll does not wait */
    pthread_t thread;
    bool has_thread;
    atomic_bool stopping;
    atomic_ulong owner;      /* the thread that runs the loop, as pthread_self() */
    struct task_queue local; /* posted by the owner */
    pthread_mutex_t lock;
    struct task_queue remote; /* under the lock */
    struct list timers;       /* by due_ns */
    struct list hooks;
    size_t n_working;
    /* Looking for what a client sends next. */
    bool expects, awake;
    unsigned n_awake_max; /* reactors at once */
    uint64_t expects_since_ns, looked_ns, aside_until_ns;
    uint32_t n_quick; /* answers that followed the one before closely */
    /* In reactor_run_once(): something ran before the poll, which must not wait then, because
     * it may have been what the caller is waiting for. */
    bool single, ran;
};

static struct reactor *reactor_of(struct env *env)
{
    return container_of(env, struct reactor, env);
}

/* --- clocks and chance ------------------------------------------------------------ */

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    CHECK(clock_gettime(clock, &t) == 0);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t now_ns(struct env *env)
{
    (void)env;
    return clock_ns(CLOCK_BOOTTIME);
}

static uint64_t realtime_ns(struct env *env)
{
    (void)env;
    return clock_ns(CLOCK_REALTIME);
}

static void random_bytes(struct env *env, void *out, size_t len)
{
    (void)env;
    for (size_t got = 0; got < len;) {
        ssize_t n = getrandom((char *)out + got, len - got, 0);
        CHECK(n > 0 || errno == EINTR);
        if (n > 0)
            got += (size_t)n;
    }
}

/* --- tasks -------------------------------------------------------------------------- */

static void queue_init(struct task_queue *q)
{
    q->first = NULL;
    q->last = &q->first;
}

static void queue_put(struct task_queue *q, struct env_task *task)
{
    task->next = NULL;
    *q->last = task;
    q->last = &task->next;
}

static void queue_move(struct task_queue *to, struct task_queue *from)
{
    if (!from->first)
        return;
    *to->last = from->first;
    to->last = from->last;
    queue_init(from);
}

static bool on_owner(struct reactor *r)
{
    return atomic_load_explicit(&r->owner, memory_order_relaxed) == (unsigned long)pthread_self();
}

static void post(struct env *env, struct env_task *task)
{
    struct reactor *r = reactor_of(env);
    if (on_owner(r)) {
        queue_put(&r->local, task);
        return;
    }
    pthread_mutex_lock(&r->lock);
    bool was_empty = !r->remote.first;
    queue_put(&r->remote, task);
    pthread_mutex_unlock(&r->lock);
    if (was_empty)
        uv_async_send(&r->wake);
}

/* Runs what was posted up to now; what these tasks post waits for the next call. */
static void run_tasks(struct reactor *r)
{
    struct task_queue now;
    queue_init(&now);
    queue_move(&now, &r->local);
    while (now.first) {
        struct env_task *task = now.first;
        now.first = task->next;
        r->ran = true;
        task->run(task);
    }
}

static void take_remote(struct reactor *r)
{
    pthread_mutex_lock(&r->lock);
    queue_move(&r->local, &r->remote);
    pthread_mutex_unlock(&r->lock);
}

static void on_wake(uv_async_t *handle)
{
    take_remote(handle->data);
}

/* --- timers ---------------------------------------------------------------------------- */

static void on_timer(uv_timer_t *handle);

static void arm(struct reactor *r)
{
    if (list_empty(&r->timers)) {
        uv_timer_stop(&r->timer);
        return;
    }
    uint64_t due = container_of(r->timers.next, struct env_timer, link)->due_ns;
    uint64_t now = clock_ns(CLOCK_BOOTTIME);
    uint64_t ms = due > now ? (due - now + NS_PER_MS - 1) / NS_PER_MS : 0;
    /* libuv counts from the time of the current turn, which may be long ago. */
    uv_update_time(&r->loop);
    CHECK(uv_timer_start(&r->timer, on_timer, ms, 0) == 0);
}

static void on_timer(uv_timer_t *handle)
{
    struct reactor *r = handle->data;
    uint64_t now = clock_ns(CLOCK_BOOTTIME);
    /* What is started meanwhile with no delay waits for the next turn: due_ns > now. */
    while (!list_empty(&r->timers)) {
        struct env_timer *t = container_of(r->timers.next, struct env_timer, link);
        if (t->due_ns > now)
            break;
        list_remove(&t->link);
        t->link.next = NULL;
        r->ran = true;
        t->fire(t);
    }
    arm(r);
}

static void timer_stop(struct env *env, struct env_timer *timer)
{
    struct reactor *r = reactor_of(env);
    if (!timer->link.next)
        return;
    bool was_first = r->timers.next == &timer->link;
    list_remove(&timer->link);
    timer->link.next = NULL;
    if (was_first)
        arm(r);
}

static void timer_start(struct env *env, struct env_timer *timer, uint64_t delay_ms)
{
    struct reactor *r = reactor_of(env);
    timer_stop(env, timer);
    timer->due_ns = clock_ns(CLOCK_BOOTTIME) + delay_ms * NS_PER_MS;
    struct list *after = r->timers.prev;
    while (after != &r->timers &&
           container_of(after, struct env_timer, link)->due_ns > timer->due_ns)
        after = after->prev;
    list_add_head(after, &timer->link);
    if (r->timers.next == &timer->link)
        arm(r);
}

/* --- work ------------------------------------------------------------------------------- */

_Static_assert(sizeof(uv_work_t) <= sizeof(((struct env_work *)0)->impl),
               "env_work has room for libuv's request");

static uv_work_t *request_of(struct env_work *work)
{
    return (uv_work_t *)(void *)work->impl;
}

static void on_work(uv_work_t *request)
{
    struct env_work *work = request->data;
    work->work(work);
}

static void on_worked(uv_work_t *request, int status)
{
    struct env_work *work = request->data;
    CHECK(status == 0);
    reactor_of(work->env)->n_working--;
    work->done(work);
}

static void start_work(struct env *env, struct env_work *work)
{
    struct reactor *r = reactor_of(env);
    work->env = env;
    request_of(work)->data = work;
    r->n_working++;
    CHECK(uv_queue_work(&r->loop, request_of(work), on_work, on_worked) == 0);
}

static const struct env_ops ops = {
    .now_ns = now_ns,
    .realtime_ns = realtime_ns,
    .timer_start = timer_start,
    .timer_stop = timer_stop,
    .post = post,
    .work = start_work,
    .random = random_bytes,
};

/* --- staying awake ------------------------------------------------------------------------ */

static atomic_uint n_awake; /* reactors that are */

static unsigned awake_max(void)
{
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) == 0 ? (unsigned)CPU_COUNT(&cores) / 2 : 0;
}

static void fall_asleep(struct reactor *r)
{
    if (r->awake)
        atomic_fetch_sub_explicit(&n_awake, 1, memory_order_relaxed);
    r->awake = r->expects = false;
}

static bool wake_up(struct reactor *r)
{
    if (atomic_fetch_add_explicit(&n_awake, 1, memory_order_relaxed) < r->n_awake_max)
        r->awake = true;
    else
        atomic_fetch_sub_explicit(&n_awake, 1, memory_order_relaxed);
    return r->awake;
}

void reactor_expects(struct reactor *r, bool soon)
{
    if (!soon || r->n_awake_max == 0) {
        fall_asleep(r);
        return;
    }
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    if (now - r->expects_since_ns >= QUICK_NS)
        r->n_quick = 0;
    else if (r->n_quick < QUICK_MIN)
        r->n_quick++;
    r->expects_since_ns = r->looked_ns = now;
    r->expects = true;
}

/* Whether the loop looks again instead of sleeping. */
static bool stays_awake(struct reactor *r)
{
    if (!r->expects)
        return false;
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    if (r->awake && now - r->looked_ns >= PUSHED_ASIDE_NS)
        r->aside_until_ns = now + ASIDE_NS;
    r->looked_ns = now;
    bool quick = r->n_quick == QUICK_MIN;
    if (quick && now - r->expects_since_ns < AWAKE_NS && now >= r->aside_until_ns &&
        r->n_working == 0 && (r->awake || wake_up(r)))
        return true;
    if (r->awake)
        r->n_quick = 0; /* in vain */
    fall_asleep(r);
    return false;
}

/* --- the loop ------------------------------------------------------------------------------ */

static void on_hurry(uv_idle_t *handle)
{
    (void)handle; /* its being there is what counts */
}

static void run_turn(struct reactor *r)
{
    run_tasks(r);
    for (struct list *l = r->hooks.next, *next; l != &r->hooks; l = next) {
        next = l->next;
        struct reactor_hook *hook = container_of(l, struct reactor_hook, link);
        hook->run(hook);
    }
}

static void on_after_poll(uv_check_t *handle)
{
    run_turn(handle->data);
}

static void on_before_poll(uv_prepare_t *handle)
{
    struct reactor *r = handle->data;
    run_turn(r);
    if (r->local.first || (r->single && r->ran) || stays_awake(r))
        uv_idle_start(&r->hurry, on_hurry);
    else
        uv_idle_stop(&r->hurry);
    if (atomic_load(&r->stopping))
        uv_stop(&r->loop);
}

static void set_worker_threads(void)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned n = cores > (long)WORKER_THREADS_MIN ? (unsigned)cores : WORKER_THREADS_MIN;
    char text[16];
    snprintf(text, sizeof text, "%u", n < WORKER_THREADS_MAX ? n : WORKER_THREADS_MAX);
    setenv("UV_THREADPOOL_SIZE", text, 0);
}

enum status reactor_new(struct reactor **out, struct err *e)
{
    set_worker_threads();
    struct reactor *r = mem_zalloc(sizeof *r);
    r->env.ops = &ops;
    r->n_awake_max = awake_max();
    queue_init(&r->local);
    queue_init(&r->remote);
    pthread_mutex_init(&r->lock, NULL);
    list_init(&r->timers);
    list_init(&r->hooks);
    atomic_store(&r->owner, (unsigned long)pthread_self());

    int rc = uv_loop_init(&r->loop);
    if (rc != 0) {
        pthread_mutex_destroy(&r->lock);
        free(r);
        *out = NULL;
        return fail(e, ST_IO, "cannot start an event loop: %s", uv_strerror(rc));
    }
    r->wake.data = r->timer.data = r->before_poll.data = r->after_poll.data = r->hurry.data = r;
    rc = uv_async_init(&r->loop, &r->wake, on_wake);
    CHECK(rc == 0);
    uv_timer_init(&r->loop, &r->timer);
    uv_idle_init(&r->loop, &r->hurry);
    uv_prepare_init(&r->loop, &r->before_poll);
    uv_check_init(&r->loop, &r->after_poll);
    uv_prepare_start(&r->before_poll, on_before_poll);
    uv_check_start(&r->after_poll, on_after_poll);
    *out = r;
    return ST_OK;
}

void reactor_run(struct reactor *r)
{
    atomic_store(&r->owner, (unsigned long)pthread_self());
    while (!atomic_load(&r->stopping))
        uv_run(&r->loop, UV_RUN_DEFAULT);
}

void reactor_run_once(struct env *env)
{
    struct reactor *r = reactor_of(env);
    atomic_store(&r->owner, (unsigned long)pthread_self());
    r->single = true;
    r->ran = false;
    uv_run(&r->loop, UV_RUN_ONCE);
    r->single = false;
}

static void *thread_main(void *arg)
{
    reactor_run(arg);
    return NULL;
}

enum status reactor_start(struct reactor *r, struct err *e)
{
    int rc = pthread_create(&r->thread, NULL, thread_main, r);
    if (rc != 0)
        return fail(e, ST_NOMEM, "cannot start a thread: %s", strerror(rc));
    r->has_thread = true;
    return ST_OK;
}

void reactor_stop(struct reactor *r)
{
    atomic_store(&r->stopping, true);
    uv_async_send(&r->wake);
}

void reactor_join(struct reactor *r)
{
    if (!r->has_thread)
        return;
    pthread_join(r->thread, NULL);
    r->has_thread = false;
}

void reactor_free(struct reactor *r)
{
    if (!r)
        return;
    reactor_join(r);
    fall_asleep(r);
    atomic_store(&r->owner, (unsigned long)pthread_self());
    atomic_store(&r->stopping, false);

    take_remote(r);
    while (r->n_working > 0 || r->local.first) {
        reactor_run_once(&r->env);
        take_remote(r);
    }

    uv_close((uv_handle_t *)&r->wake, NULL);
    uv_close((uv_handle_t *)&r->timer, NULL);
    uv_close((uv_handle_t *)&r->hurry, NULL);
    uv_close((uv_handle_t *)&r->before_poll, NULL);
    uv_close((uv_handle_t *)&r->after_poll, NULL);
    uv_run(&r->loop, UV_RUN_DEFAULT);
    CHECK(uv_loop_close(&r->loop) == 0);
    CHECK(list_empty(&r->timers));
    pthread_mutex_destroy(&r->lock);
    free(r);
}

struct env *reactor_env(struct reactor *r)
{
    return &r->env;
}

uv_loop_t *reactor_loop(struct reactor *r)
{
    return &r->loop;
}

void reactor_hook_add(struct reactor *r, struct reactor_hook *hook)
{
    list_add_tail(&r->hooks, &hook->link);
}

void reactor_hook_remove(struct reactor_hook *hook)
{
    list_remove(&hook->link);
}
