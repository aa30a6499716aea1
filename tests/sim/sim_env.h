/*
 * A simulated environment: the clock, timers, worker threads and chance of base/env.h in
 * one thread, driven from a seed.
 *
 * A `struct sim` is a world with one clock and one queue of events, ordered by time and, at
 * the same time, by when they were put in. A `struct sim_env` is one reactor in it. The same
 * seed gives the same order of everything, so a failure is replayed by its seed.
 */
#ifndef TESTS_SIM_SIM_ENV_H
#define TESTS_SIM_SIM_ENV_H

#include <stdbool.h>
#include <stdint.h>

#include "base/env.h"

struct sim;
struct sim_event;

struct sim_env {
    struct env base;
    struct sim *sim;
    struct list timers; /* env_timer.link, by due_ns, which is the world's time */
    struct list link;   /* the sim's */
    uint64_t work_delay_ns_max;
    bool paused, dead;
    struct sim_event *held; /* events of a paused reactor */
    size_t n_held, cap_held;

    /* The caller's to set. */
    const char *name; /* for the trace */
    void *user;
    void (*after)(struct sim_env *env); /* called after each of its events; may be NULL */
    uint64_t post_delay_ns_max; /* tasks of other reactors come so much later, in order */
    int clock_ppm;              /* its clock runs so much faster than the world's ... */
    uint64_t clock_ahead_ns;    /* ... and was so far ahead at the world's beginning */

    uint64_t posts_upto_ns;
};

struct sim *sim_new(uint64_t seed);
void sim_free(struct sim *sim); /* events that were not run are forgotten */

struct sim_env *sim_env_new(struct sim *sim);
void sim_env_free(struct sim_env *env);

/* Takes a reactor with all that it still waits for out of its world into one of its own, so
 * that the remains of a dead process can be cleared away while the world stands still. */
struct sim *sim_env_detach(struct sim_env *env);

/* The reactor stands still while the world and its clock go on (SIGSTOP, a paused virtual
 * machine), and goes on later with all that is overdue. */
void sim_env_pause(struct sim_env *env);
void sim_env_resume(struct sim_env *env);

/* Its process dies: nothing of it runs again, whatever is asked of it. Nothing is freed. May be
 * called by one of its own events. */
void sim_env_kill(struct sim_env *env);

uint64_t sim_now_ns(const struct sim *sim);

/* Whose event runs just now; NULL: none. */
struct sim_env *sim_running(const struct sim *sim);

/* Chance: 64 bits; 0 .. n - 1; one time in n. */
uint64_t sim_random(struct sim *sim);
uint64_t sim_below(struct sim *sim, uint64_t n);
bool sim_one_in(struct sim *sim, uint64_t n);

/* A delay of up to `max_ns`: often none, seldom ten times as much. */
uint64_t sim_delay_ns(struct sim *sim, uint64_t max_ns);

/* Runs `fn(arg)` on the reactor of `env`, `delay_ns` from now. */
void sim_at(struct sim_env *env, uint64_t delay_ns, void (*fn)(void *arg), void *arg);

/* Takes the events of `env` with this `arg` out of the queue. */
void sim_forget(struct sim_env *env, const void *arg);

/* Runs the next event; false where there is none. */
bool sim_step(struct sim *sim);

/* The same, but only one that is due by `limit_ns`; the clock goes there where there is none. */
bool sim_step_by(struct sim *sim, uint64_t limit_ns);

/* Runs events until `cond(arg)` holds; false where the world came to rest first or `steps_max`
 * events did not do (a hang). */
bool sim_run_until(struct sim *sim, bool (*cond)(void *arg), void *arg, uint64_t steps_max);

/* Runs events until there are none; false where `steps_max` did not do. */
bool sim_run_idle(struct sim *sim, uint64_t steps_max);

/* For session_begin: one turn of the reactor's loop. */
void sim_run_once(struct env *env);

#endif
