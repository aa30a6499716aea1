/* The simulated world: the clock of sim_env.h and the store of mem_store.h. */
#include <stdlib.h>

#include "base/mem.h"
#include "world.h"

#define HANG_STEPS 3000000u

static struct sim_env *env_of(struct env *env)
{
    return container_of(env, struct sim_env, base);
}

static uint64_t now_ns(struct world *w)
{
    return sim_now_ns(w->sim);
}

static bool step(struct world *w, uint64_t limit_ns)
{
    return limit_ns == UINT64_MAX ? sim_step(w->sim) : sim_step_by(w->sim, limit_ns);
}

static bool patient(struct world *w, struct patience *p)
{
    (void)w;
    return p->used++ < HANG_STEPS;
}

static bool run_until(struct world *w, struct env *env, bool (*cond)(void *arg), void *arg)
{
    (void)w;
    return sim_run_until(env_of(env)->sim, cond, arg, HANG_STEPS);
}

static struct store *attach(struct world *w, struct env **env, struct err *e)
{
    (void)e;
    struct sim_env *own = sim_env_new(w->sim);
    *env = &own->base;
    return mem_store_attach(w->db, own);
}

static void detach(struct world *w, struct env *env, struct store *store)
{
    struct sim *own = env_of(env)->sim == w->sim ? NULL : env_of(env)->sim;
    /* Work of worker threads and spurious events run out. */
    if (own)
        sim_run_idle(own, HANG_STEPS);
    store_close(store);
    sim_env_free(env_of(env));
    if (own)
        sim_free(own);
}

static void stop(struct world *w, struct env *env)
{
    if (env_of(env)->sim == w->sim)
        sim_env_detach(env_of(env));
}

/* The world stands still while the remains are taken apart. */
static void crash(struct world *w, struct store *store)
{
    (void)w;
    mem_store_crash_process(store);
}

static void power_cut(struct world *w)
{
    mem_store_power_cut(w->db);
}

static void look(struct world *w)
{
    (void)w;
}

static bool peek(struct world *w, struct slice key, struct slice *head)
{
    struct slice body;
    return mem_store_peek(w->db, key, head, &body);
}

struct seen {
    void (*see)(void *arg, struct slice key, struct slice head);
    void *arg;
};

static void see_one(void *arg, struct slice key, struct slice head, struct slice body)
{
    const struct seen *s = arg;
    (void)body;
    s->see(s->arg, key, head);
}

static void each(struct world *w, struct slice begin, struct slice end,
                 void (*see)(void *arg, struct slice key, struct slice head), void *arg)
{
    mem_store_each(w->db, begin, end, see_one, &(struct seen){see, arg});
}

static const char *end(struct world *w)
{
    struct mem_counts counts;
    mem_store_counts(w->db, &counts);
    return counts.broken_promises ? "the store was not used as it says" : NULL;
}

static void world_sim_free(struct world *w)
{
    mem_store_free(w->db);
    sim_free(w->sim);
    free(w);
}

static const struct world_ops ops = {
    .now_ns = now_ns,
    .step = step,
    .patient = patient,
    .run_until = run_until,
    .attach = attach,
    .detach = detach,
    .stop = stop,
    .crash = crash,
    .power_cut = power_cut,
    .look = look,
    .peek = peek,
    .each = each,
    .end = end,
    .free = world_sim_free,
};

struct world *world_sim_new(uint64_t seed, const struct mem_config *config)
{
    struct world *w = mem_zalloc(sizeof *w);
    w->ops = &ops;
    w->run_once = sim_run_once;
    w->lease_ms = 3000;
    w->long_ns = 3000000000;
    w->sim = sim_new(seed);
    w->db = mem_store_new(w->sim, config);
    return w;
}
