/*
 * The simulated environment; sim_env.h says what it is for.
 *
 * Posts, work and store requests are events in a heap. Timers are few and often moved, so
 * they stay in a sorted list per reactor; the earliest of all reactors is remembered until a
 * timer changes.
 */
#include "sim_env.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"

struct sim_event {
    uint64_t at_ns, seq;
    void (*fn)(void *arg);
    void *arg;
    struct sim_env *env;
};

struct sim {
    uint64_t now_ns, next_seq, chance;
    struct sim_event *heap;
    size_t n, cap;
    struct list envs;
    struct sim_env *running;
    /* The earliest timer and its reactor, where `timer_known`; NULL: there is none. */
    struct env_timer *timer;
    struct sim_env *timer_env;
    bool timer_known;
};

static bool before(const struct sim_event *a, const struct sim_event *b)
{
    return a->at_ns != b->at_ns ? a->at_ns < b->at_ns : a->seq < b->seq;
}

static void heap_put(struct sim *sim, struct sim_event e)
{
    mem_grow(&sim->heap, &sim->cap, sim->n + 1, sizeof *sim->heap);
    size_t i = sim->n++;
    while (i > 0 && before(&e, &sim->heap[(i - 1) / 2])) {
        sim->heap[i] = sim->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    sim->heap[i] = e;
}

static struct sim_event heap_take(struct sim *sim)
{
    struct sim_event top = sim->heap[0], last = sim->heap[--sim->n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= sim->n)
            break;
        if (child + 1 < sim->n && before(&sim->heap[child + 1], &sim->heap[child]))
            child++;
        if (!before(&sim->heap[child], &last))
            break;
        sim->heap[i] = sim->heap[child];
        i = child;
    }
    if (sim->n)
        sim->heap[i] = last;
    return top;
}

struct sim *sim_new(uint64_t seed)
{
    struct sim *sim = mem_zalloc(sizeof *sim);
    sim->chance = seed ^ 0x5bd1e9955bd1e995u;
    sim->now_ns = 1000000000;
    list_init(&sim->envs);
    return sim;
}

void sim_free(struct sim *sim)
{
    CHECK(list_empty(&sim->envs));
    free(sim->heap);
    free(sim);
}

uint64_t sim_now_ns(const struct sim *sim)
{
    return sim->now_ns;
}

/* splitmix64 */
uint64_t sim_random(struct sim *sim)
{
    uint64_t z = sim->chance += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t sim_below(struct sim *sim, uint64_t n)
{
    return n ? sim_random(sim) % n : 0;
}

bool sim_one_in(struct sim *sim, uint64_t n)
{
    return sim_below(sim, n) == 0;
}

uint64_t sim_delay_ns(struct sim *sim, uint64_t max_ns)
{
    uint64_t kind = sim_below(sim, 32);
    if (kind < 6)
        return 0;
    return sim_below(sim, max_ns + 1) * (kind == 31 ? 10 : 1);
}

void sim_at(struct sim_env *env, uint64_t delay_ns, void (*fn)(void *arg), void *arg)
{
    struct sim *sim = env->sim;
    struct sim_event e = {sim->now_ns + delay_ns, sim->next_seq++, fn, arg, env};
    if (env->dead)
        return;
    if (!env->paused) {
        heap_put(sim, e);
        return;
    }
    mem_grow(&env->held, &env->cap_held, env->n_held + 1, sizeof *env->held);
    env->held[env->n_held++] = e;
}

/* --- env_ops ------------------------------------------------------------------------- */

static struct sim_env *of(struct env *env)
{
    return container_of(env, struct sim_env, base);
}

/* The reactor's clock at a time of the world, and the other way round, rounded up. */
static uint64_t local_ns(const struct sim_env *env, uint64_t world_ns)
{
    int64_t drift = (int64_t)(world_ns / 1000) * env->clock_ppm / 1000;
    return world_ns + env->clock_ahead_ns + (uint64_t)drift;
}

static uint64_t world_delay_ns(const struct sim_env *env, uint64_t local_delay_ns)
{
    if (!env->clock_ppm)
        return local_delay_ns;
    /* In microseconds, a few more, so that it is never too early. */
    uint64_t rate = (uint64_t)(1000000 + (int64_t)env->clock_ppm);
    return ((local_delay_ns / 1000 + 2) * 1000000 / rate + 2) * 1000;
}

static uint64_t op_now(struct env *env)
{
    return local_ns(of(env), of(env)->sim->now_ns);
}

static uint64_t op_realtime(struct env *env)
{
    return of(env)->sim->now_ns + 1700000000ull * 1000000000ull;
}

static void op_timer_stop(struct env *env, struct env_timer *timer)
{
    if (!timer->link.next)
        return;
    if (of(env)->sim->timer == timer)
        of(env)->sim->timer_known = false;
    list_remove(&timer->link);
    timer->link.next = timer->link.prev = NULL;
}

static void op_timer_start(struct env *env, struct env_timer *timer, uint64_t delay_ms)
{
    struct sim_env *own = of(env);
    op_timer_stop(env, timer);
    if (own->dead)
        return;
    timer->due_ns = own->sim->now_ns + world_delay_ns(own, delay_ms * 1000000);
    struct list *after = own->timers.prev;
    while (after != &own->timers &&
           container_of(after, struct env_timer, link)->due_ns > timer->due_ns)
        after = after->prev;
    list_add_head(after, &timer->link);
    own->sim->timer_known = false;
}

static void task_run(void *arg)
{
    struct env_task *task = arg;
    task->run(task);
}

static void op_post(struct env *env, struct env_task *task)
{
    struct sim_env *to = of(env);
    struct sim *sim = to->sim;
    if (!to->post_delay_ns_max || sim->running == to) {
        sim_at(to, 0, task_run, task);
        return;
    }
    uint64_t at_ns = sim->now_ns + sim_delay_ns(sim, to->post_delay_ns_max);
    if (at_ns < to->posts_upto_ns)
        at_ns = to->posts_upto_ns;
    to->posts_upto_ns = at_ns;
    sim_at(to, at_ns - sim->now_ns, task_run, task);
}

static void work_done(void *arg)
{
    struct env_work *work = arg;
    work->done(work);
}

static void work_run(void *arg)
{
    struct env_work *work = arg;
    struct sim_env *env = of(work->env);
    work->work(work);
    sim_at(env, sim_delay_ns(env->sim, env->work_delay_ns_max), work_done, work);
}

static void op_work(struct env *env, struct env_work *work)
{
    work->env = env;
    sim_at(of(env), sim_delay_ns(of(env)->sim, of(env)->work_delay_ns_max), work_run, work);
}

static void op_random(struct env *env, void *out, size_t len)
{
    uint8_t *at = out;
    for (size_t i = 0; i < len; i++)
        at[i] = (uint8_t)sim_random(of(env)->sim);
}

static const struct env_ops ops = {
    .now_ns = op_now,
    .realtime_ns = op_realtime,
    .timer_start = op_timer_start,
    .timer_stop = op_timer_stop,
    .post = op_post,
    .work = op_work,
    .random = op_random,
};

struct sim_env *sim_env_new(struct sim *sim)
{
    struct sim_env *env = mem_zalloc(sizeof *env);
    env->base.ops = &ops;
    env->sim = sim;
    env->work_delay_ns_max = 200000;
    list_init(&env->timers);
    list_add_tail(&sim->envs, &env->link);
    return env;
}

/* Takes out the events of `env`, all or those with `arg`. */
static void forget(struct sim_env *env, const void *arg)
{
    struct sim *sim = env->sim;
    struct sim_event *all = sim->heap;
    size_t n = sim->n;
    sim->heap = NULL;
    sim->n = sim->cap = 0;
    for (size_t i = 0; i < n; i++)
        if (all[i].env != env || (arg && all[i].arg != arg))
            heap_put(sim, all[i]);
    free(all);
}

void sim_env_pause(struct sim_env *env)
{
    struct sim *sim = env->sim;
    struct sim_event *all = sim->heap;
    size_t n = sim->n;
    CHECK(!env->paused);
    env->paused = true;
    sim->timer_known = false;
    if (env->dead)
        return;
    sim->heap = NULL;
    sim->n = sim->cap = 0;
    for (size_t i = 0; i < n; i++) {
        if (all[i].env != env) {
            heap_put(sim, all[i]);
            continue;
        }
        mem_grow(&env->held, &env->cap_held, env->n_held + 1, sizeof *env->held);
        env->held[env->n_held++] = all[i];
    }
    free(all);
}

void sim_env_resume(struct sim_env *env)
{
    struct sim *sim = env->sim;
    CHECK(env->paused);
    env->paused = false;
    sim->timer_known = false;
    for (size_t i = 0; i < env->n_held; i++) {
        struct sim_event e = env->held[i];
        if (e.at_ns < sim->now_ns)
            e.at_ns = sim->now_ns;
        heap_put(sim, e);
    }
    env->n_held = 0;
    /* A loop that was stopped while it waited hears of what came before it looks at its timers;
     * one that was stopped elsewhere does not. */
    bool timers_last = sim_one_in(sim, 2);
    list_for_each (l, &env->timers) {
        struct env_timer *t = container_of(l, struct env_timer, link);
        if (timers_last && t->due_ns <= sim->now_ns)
            t->due_ns = sim->now_ns + 1;
    }
}

void sim_forget(struct sim_env *env, const void *arg)
{
    forget(env, arg);
}

void sim_env_free(struct sim_env *env)
{
    CHECK(!env->paused);
    forget(env, NULL);
    free(env->held);
    CHECK(list_empty(&env->timers));
    list_remove(&env->link);
    if (env->sim->running == env)
        env->sim->running = NULL;
    free(env);
}

void sim_env_kill(struct sim_env *env)
{
    struct sim *sim = env->sim;
    if (env->dead)
        return;
    env->dead = true;
    forget(env, NULL);
    env->n_held = 0;
    while (!list_empty(&env->timers))
        op_timer_stop(&env->base, container_of(env->timers.next, struct env_timer, link));
    sim->timer_known = false;
}

struct sim *sim_env_detach(struct sim_env *env)
{
    struct sim *from = env->sim, *to = sim_new(sim_random(from));
    struct sim_event *all = from->heap;
    size_t n = from->n;
    to->now_ns = from->now_ns;
    to->next_seq = from->next_seq;
    from->heap = NULL;
    from->n = from->cap = 0;
    for (size_t i = 0; i < n; i++)
        heap_put(all[i].env == env ? to : from, all[i]);
    free(all);
    list_remove(&env->link);
    list_add_tail(&to->envs, &env->link);
    from->timer_known = false;
    env->sim = to;
    return to;
}

/* --- running ------------------------------------------------------------------------- */

static struct env_timer *earliest_timer(struct sim *sim)
{
    if (sim->timer_known)
        return sim->timer;
    sim->timer = NULL;
    list_for_each (e, &sim->envs) {
        struct sim_env *env = container_of(e, struct sim_env, link);
        if (env->paused || list_empty(&env->timers))
            continue;
        struct env_timer *t = container_of(env->timers.next, struct env_timer, link);
        if (!sim->timer || t->due_ns < sim->timer->due_ns) {
            sim->timer = t;
            sim->timer_env = env;
        }
    }
    sim->timer_known = true;
    return sim->timer;
}

bool sim_step_by(struct sim *sim, uint64_t limit_ns)
{
    const struct env_timer *timer = earliest_timer(sim);
    if ((sim->n && sim->heap[0].at_ns <= limit_ns) || (timer && timer->due_ns <= limit_ns))
        return sim_step(sim);
    if (limit_ns > sim->now_ns)
        sim->now_ns = limit_ns;
    return false;
}

/* The event of a reactor is over, unless that freed the reactor. */
static void ran(struct sim *sim, struct sim_env *env, struct sim_env *before)
{
    if (sim->running == env && env->after && !env->dead)
        env->after(env);
    sim->running = before;
}

bool sim_step(struct sim *sim)
{
    struct sim_env *before = sim->running;
    struct env_timer *timer = earliest_timer(sim);
    if (timer && (!sim->n || timer->due_ns < sim->heap[0].at_ns)) {
        struct sim_env *env = sim->timer_env;
        if (timer->due_ns > sim->now_ns)
            sim->now_ns = timer->due_ns;
        op_timer_stop(&env->base, timer);
        sim->running = env;
        timer->fire(timer);
        ran(sim, env, before);
        return true;
    }
    if (!sim->n)
        return false;
    struct sim_event e = heap_take(sim);
    CHECK(e.at_ns >= sim->now_ns);
    sim->now_ns = e.at_ns;
    sim->running = e.env;
    e.fn(e.arg);
    ran(sim, e.env, before);
    return true;
}

struct sim_env *sim_running(const struct sim *sim)
{
    return sim->running;
}

bool sim_run_until(struct sim *sim, bool (*cond)(void *arg), void *arg, uint64_t steps_max)
{
    for (uint64_t i = 0; i < steps_max; i++) {
        if (cond(arg))
            return true;
        if (!sim_step(sim))
            return cond(arg);
    }
    fprintf(stderr, "simulation: %llu steps were not enough: it hangs or runs in a circle\n",
            (unsigned long long)steps_max);
    return false;
}

bool sim_run_idle(struct sim *sim, uint64_t steps_max)
{
    for (uint64_t i = 0; i < steps_max; i++)
        if (!sim_step(sim))
            return true;
    fprintf(stderr, "simulation: %llu steps did not bring it to rest\n",
            (unsigned long long)steps_max);
    return false;
}

void sim_run_once(struct env *env)
{
    CHECK(sim_step(of(env)->sim));
}
