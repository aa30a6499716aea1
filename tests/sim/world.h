/*
 * What the driver runs a volume in: a clock, a store, and processes that have it open.
 *
 * The simulated world owns time and order and is replayed from its seed. The real one is a
 * reactor of the server in the test's own thread and an engine of the program; there the seed
 * gives the requests, not their timing.
 */
#ifndef TESTS_SIM_WORLD_H
#define TESTS_SIM_WORLD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/env.h"
#include "mem_store.h"
#include "store/store.h"

struct world;

/* How long to wait for what must come: events in a simulated world, seconds in a real one. */
struct patience {
    uint64_t used, until_ns;
};

struct world_ops {
    uint64_t (*now_ns)(struct world *w);
    bool (*step)(struct world *w, uint64_t limit_ns);
    bool (*patient)(struct world *w, struct patience *p);
    bool (*run_until)(struct world *w, struct env *env, bool (*cond)(void *arg), void *arg);
    struct store *(*attach)(struct world *w, struct env **env, struct err *e);
    void (*detach)(struct world *w, struct env *env, struct store *store);
    void (*stop)(struct world *w, struct env *env);
    void (*crash)(struct world *w, struct store *store);
    void (*power_cut)(struct world *w);
    void (*look)(struct world *w);
    bool (*peek)(struct world *w, struct slice key, struct slice *head);
    void (*each)(struct world *w, struct slice begin, struct slice end,
                 void (*see)(void *arg, struct slice key, struct slice head), void *arg);
    const char *(*end)(struct world *w);
    void (*free)(struct world *w);
};

struct world {
    const struct world_ops *ops;
    /* For session_begin: one turn of a reactor's loop. */
    void (*run_once)(struct env *env);
    uint32_t lease_ms;
    uint64_t long_ns;  /* now and then the driver lets so much time pass */
    struct sim *sim;   /* NULL in a real one, these two */
    struct mem_store *db;
};

struct world *world_sim_new(uint64_t seed, const struct mem_config *config);

static inline uint64_t world_now_ns(struct world *w)
{
    return w->ops->now_ns(w);
}

/* Something that happens by `limit_ns`; false where there is no such thing, and then it is
 * `limit_ns` (UINT64_MAX: where nothing will ever happen). */
static inline bool world_step(struct world *w, uint64_t limit_ns)
{
    return w->ops->step(w, limit_ns);
}

/* Zero-initialise; ask before each step. False: it hangs. */
static inline bool world_patient(struct world *w, struct patience *p)
{
    return w->ops->patient(w, p);
}

/* Lets the reactor of `env` run, and its world or what is left of it, until the condition
 * holds; false where that does not come. */
static inline bool world_run_until(struct world *w, struct env *env, bool (*cond)(void *arg),
                                   void *arg)
{
    return w->ops->run_until(w, env, cond, arg);
}

/* A process starts: its reactor and its handle of the store. NULL: `e` says why. */
static inline struct store *world_attach(struct world *w, struct env **env, struct err *e)
{
    return w->ops->attach(w, env, e);
}

/* It has ended, or its remains were taken apart. */
static inline void world_detach(struct world *w, struct env *env, struct store *store)
{
    w->ops->detach(w, env, store);
}

/* It stands still: from now on its reactor runs only when waited for by itself. */
static inline void world_stop(struct world *w, struct env *env)
{
    w->ops->stop(w, env);
}

/* It dies. Its handle answers errors from now on; what the store was given goes its own way. */
static inline void world_crash(struct world *w, struct store *store)
{
    w->ops->crash(w, store);
}

static inline void world_power_cut(struct world *w)
{
    w->ops->power_cut(w);
}

/* For looking at what is stored: look, then the others show it as it was then. No commit may
 * be under way. */
static inline void world_look(struct world *w)
{
    w->ops->look(w);
}

static inline bool world_peek(struct world *w, struct slice key, struct slice *head)
{
    return w->ops->peek(w, key, head);
}

static inline void world_each(struct world *w, struct slice begin, struct slice end,
                              void (*see)(void *arg, struct slice key, struct slice head),
                              void *arg)
{
    w->ops->each(w, begin, end, see, arg);
}

/* All processes have ended. NULL, or what is wrong with what they left. */
static inline const char *world_end(struct world *w)
{
    return w->ops->end(w);
}

static inline void world_free(struct world *w)
{
    w->ops->free(w);
}

#endif
