/*
 * The environment: all that the layers above `base` may know of time, threads
 * and chance.
 *
 * One `struct env` is one reactor: a thread with an event loop. The volume and
 * store layers reach clocks, timers, worker threads and randomness through it
 * only, so that the same code runs under libuv in the server and under a
 * simulator that owns time and order. Everything here but env_post is called on
 * the reactor's own thread, and every callback runs there (but env_work.work).
 */
#ifndef BASE_ENV_H
#define BASE_ENV_H

#include <stddef.h>
#include <stdint.h>

#include "base/list.h"

struct env;

/* Something to run soon on the reactor. The caller owns it; it must stay valid
 * until it ran. */
struct env_task {
    struct env_task *next;
    void (*run)(struct env_task *task);
};

/* A one-shot timer; zero-initialise, set `fire`. The caller owns it and stops it
 * before freeing it. */
struct env_timer {
    struct list link; /* the environment's; not linked (next == NULL) while stopped */
    uint64_t due_ns;
    void (*fire)(struct env_timer *timer);
};

/* Work for another thread: `work` runs on a worker, then `done` on the reactor. The
 * caller owns it until `done` was called. `impl` is the environment's. */
struct env_work {
    void (*work)(struct env_work *work);
    void (*done)(struct env_work *work);
    struct env *env;
    void *impl[20];
};

struct env_ops {
    uint64_t (*now_ns)(struct env *env);
    uint64_t (*realtime_ns)(struct env *env);
    void (*timer_start)(struct env *env, struct env_timer *timer, uint64_t delay_ms);
    void (*timer_stop)(struct env *env, struct env_timer *timer);
    void (*post)(struct env *env, struct env_task *task);
    void (*work)(struct env *env, struct env_work *work);
    void (*random)(struct env *env, void *out, size_t len);
};

struct env {
    const struct env_ops *ops;
};

/* A clock that never goes back and counts time during which the machine was
 * suspended (CLOCK_BOOTTIME), in nanoseconds. */
static inline uint64_t env_now_ns(struct env *env)
{
    return env->ops->now_ns(env);
}

/* Wall clock, nanoseconds since 1970; for people only, never for decisions. */
static inline uint64_t env_realtime_ns(struct env *env)
{
    return env->ops->realtime_ns(env);
}

/* Calls timer->fire once, `delay_ms` from now at the earliest; a running timer is moved. */
static inline void env_timer_start(struct env *env, struct env_timer *timer, uint64_t delay_ms)
{
    env->ops->timer_start(env, timer, delay_ms);
}

/* After this returns `fire` is not called. Harmless on a stopped timer. */
static inline void env_timer_stop(struct env *env, struct env_timer *timer)
{
    env->ops->timer_stop(env, timer);
}

/* Runs `task` on the reactor of `env`, in the order posted, never from inside this call.
 * ANY thread. */
static inline void env_post(struct env *env, struct env_task *task)
{
    env->ops->post(env, task);
}

static inline void env_work(struct env *env, struct env_work *work)
{
    env->ops->work(env, work);
}

/* Unpredictable bytes in production, seeded ones in the simulator. */
static inline void env_random(struct env *env, void *out, size_t len)
{
    env->ops->random(env, out, len);
}

#endif
