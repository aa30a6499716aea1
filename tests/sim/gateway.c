/*
 * Gateways of the simulator; gateway.h says what they are.
 *
 * What a process does from its main function, session_begin() and session_end() above all,
 * waits in the middle of calls; so it has a stack of its own here and goes on in the events of
 * its first reactor.
 */
#include "gateway.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/process.h"
#include "fiber.h"
#include "server/connection.h"
#include "stores.h"
#include "trace.h"
#include "volume/internal.h"

#define LANES_MAX 3u
#define AGAIN_MS 500u
#define TURN_NS_MAX 20000u
#define POST_NS_MAX 20000u
#define WORK_NS_MAX 100000u
#define PORT 10809u
#define SQUEEZE_ROUNDS 4u
/* Boot clocks of machines have nothing in common. */
#define CLOCK_APART_NS 1000000000000u

struct reactor {
    struct sim_env *env;
    struct gateway *gateway;
    struct list hooks;
    bool turn_due, turned;
};

struct gateway {
    struct gateway_config config;
    const char *name;
    unsigned number;
    struct process_id id;
    enum gateway_state state;
    bool paused;
    struct gateway *older;
    struct sim *sim;
    struct store *store;
    struct reactor reactors[LANES_MAX];
    struct lane lanes[LANES_MAX];
    struct server_config server_config;
    struct server server;
    struct session session;
    struct env_timer again;
    char address[64];
    struct fiber *main; /* its main function */
    bool waits; /* for the next event of its first reactor */
    bool rested;
};

/* Of the world that runs, the newest first. */
static struct gateway *newest;
static uint64_t boots[NET_HOSTS_MAX]; /* times that each host died */

/* --- reactors ------------------------------------------------------------------------- */

struct env *reactor_env(struct reactor *r)
{
    return &r->env->base;
}

void reactor_hook_add(struct reactor *r, struct reactor_hook *hook)
{
    list_add_tail(&r->hooks, &hook->link);
}

void reactor_hook_remove(struct reactor_hook *hook)
{
    list_remove(&hook->link);
}

void reactor_expects(struct reactor *r, bool soon)
{
    (void)r; /* no time passes in falling asleep */
    (void)soon;
}

static void run_hooks(struct reactor *r)
{
    for (struct list *l = r->hooks.next, *next; l != &r->hooks; l = next) {
        next = l->next;
        struct reactor_hook *hook = container_of(l, struct reactor_hook, link);
        hook->run(hook);
    }
}

static void turn(void *arg)
{
    struct reactor *r = arg;
    r->turn_due = false;
    r->turned = true;
    run_hooks(r);
}

static void go_on(struct gateway *g)
{
    g->waits = false;
    fiber_go_on(g->main);
}

/* A turn of a loop has one event or several. */
static void event_over(struct sim_env *env)
{
    struct reactor *r = env->user;
    struct gateway *g = r->gateway;
    if (r->turned) {
        r->turned = false;
    } else if (!r->turn_due) {
        if (sim_one_in(g->sim, 2)) {
            run_hooks(r);
        } else {
            r->turn_due = true;
            sim_at(env, sim_below(g->sim, TURN_NS_MAX), turn, r);
        }
    }
    if (r == &g->reactors[0] && g->waits && !env->dead)
        go_on(g);
}

static void reactor_init(struct reactor *r, struct gateway *g)
{
    r->gateway = g;
    r->env = sim_env_new(g->sim);
    r->env->name = g->name;
    r->env->user = r;
    r->env->after = event_over;
    r->env->work_delay_ns_max = WORK_NS_MAX;
    r->env->post_delay_ns_max = POST_NS_MAX;
    r->env->clock_ppm = g->config.clock_ppm;
    r->env->clock_ahead_ns = g->config.host * CLOCK_APART_NS;
    list_init(&r->hooks);
}

/* --- who a process is ------------------------------------------------------------------- */

void __wrap_process_self(struct process_id *id);
bool __wrap_process_ended(const struct process_id *id);
pid_t __wrap_getpid(void);
int __wrap_gethostname(char *name, size_t len);

/* Whose event runs just now. (What is no gateway is nobody's process: it can't be told whether
 * it lives, on a host where no gateway is.) */
static const struct gateway *running(void)
{
    const struct sim_env *env = newest ? sim_running(newest->sim) : NULL;
    return env && env->after == event_over ? ((struct reactor *)env->user)->gateway : NULL;
}

void __wrap_process_self(struct process_id *id)
{
    const struct gateway *g = running();
    *id = g ? g->id : (struct process_id){0};
}

bool __wrap_process_ended(const struct process_id *id)
{
    const struct gateway *asks = running();
    /* (After a boot of its host its processes can't be told from those of another machine.) */
    if (!asks || memcmp(id->boot, asks->id.boot, sizeof id->boot) != 0)
        return false;
    for (const struct gateway *g = newest; g; g = g->older)
        if (!memcmp(&g->id, id, sizeof *id))
            return g->state == GATEWAY_DEAD || g->state == GATEWAY_ENDED;
    return false;
}

pid_t __wrap_getpid(void)
{
    const struct gateway *g = running();
    return g ? (pid_t)g->id.pid : 1;
}

int __wrap_gethostname(char *name, size_t len)
{
    const struct gateway *g = running();
    if (g)
        snprintf(name, len, "host-%u", g->config.host);
    else
        snprintf(name, len, "elsewhere");
    return 0;
}

static void identify(struct gateway *g)
{
    memset(&g->id, 0, sizeof g->id); /* compared as bytes */
    g->id.boot[0] = 1;
    g->id.boot[1] = (uint8_t)g->config.host;
    memcpy(g->id.boot + 8, &boots[g->config.host], sizeof boots[0]);
    g->id.pid_namespace = 1;
    g->id.start_ticks = g->number;
    g->id.pid = 1000 + g->number;
}

/* --- the main function ------------------------------------------------------------------ */

/* One event of the first reactor. */
static void run_once(struct env *env)
{
    struct reactor *r = container_of(env, struct sim_env, base)->user;
    r->gateway->waits = true;
    fiber_wait();
}

static void rested(struct env_timer *timer)
{
    container_of(timer, struct gateway, again)->rested = true;
}

static void rest(struct gateway *g)
{
    struct env *env = reactor_env(&g->reactors[0]);
    g->rested = false;
    g->again.fire = rested;
    env_timer_start(env, &g->again, AGAIN_MS);
    while (!g->rested)
        run_once(env);
}

static enum status come_up(struct gateway *g, struct err *e)
{
    struct env *env = reactor_env(&g->reactors[0]);
    enum status st = session_begin(&g->session, g->store, env, run_once, g->config.lease_ms,
                                   g->address, e);
    if (st != ST_OK)
        return st;
    st = lanes_open(&g->server, e);
    if (st == ST_OK)
        return ST_OK;
    lanes_close(&g->server);
    session_end(&g->session, env, run_once);
    return st;
}

static void take_connection(void *arg, int fd, unsigned from_host)
{
    struct gateway *g = arg;
    struct accepted a = {.fd = fd, .peer.way = PEER_TCP};
    if (from_host == g->config.host)
        snprintf(a.peer.host, sizeof a.peer.host, "local");
    else
        snprintf(a.peer.host, sizeof a.peer.host, "10.0.0.%u", from_host);
    snprintf(a.peer.address, sizeof a.peer.address, "10.0.0.%u:%d", from_host, fd);
    conn_accept(&g->server.lanes[0], &a);
}

static void all_stopped(struct server *s)
{
    container_of(s, struct gateway, server)->waits = true;
}

static void overdue(struct server *s)
{
    struct gateway *g = container_of(s, struct gateway, server);
    log_error("the store did not take the last commits in time; ending without them");
    gateway_crash(g, false);
}

static void main_function(void *arg)
{
    struct gateway *g = arg;
    struct env *env = reactor_env(&g->reactors[0]);
    struct err e = {0};
    while (come_up(g, &e) != ST_OK) {
        log_warning("%s; starting again", e.text);
        rest(g);
    }
    lanes_begin(&g->server);
    net_listen(g->config.net, g->config.host, g->reactors[0].env, take_connection, g);
    g->state = GATEWAY_UP;
    log_info("listening on %s", g->address);
    fiber_wait(); /* until all_stopped() */

    lanes_close(&g->server);
    session_end(&g->session, env, run_once);
    env_timer_stop(env, &g->server.end_timer);
    simstore_detach(g->config.store, g->store);
    for (unsigned i = 0; i < g->config.lanes; i++)
        CHECK(list_empty(&g->reactors[i].env->timers) && list_empty(&g->reactors[i].hooks));
    log_info("ended");
    g->state = GATEWAY_ENDED;
}

static void begin(void *arg)
{
    go_on(arg);
}

static void kill_owner(void *arg, struct store *store)
{
    (void)arg;
    for (struct gateway *g = newest; g; g = g->older)
        if (g->store == store)
            gateway_crash(g, false);
}

struct gateway *gateway_start(const struct gateway_config *config, const char *name)
{
    CHECK(config->lanes >= 1 && config->lanes <= LANES_MAX && config->host < NET_HOSTS_MAX);
    CHECK(!getenv("FDB_NBD_TEST_SKIP_LEASE"));
    struct gateway *g = mem_zalloc(sizeof *g);
    g->config = *config;
    g->name = name;
    g->sim = net_sim(config->net);
    if (newest && newest->sim != g->sim)
        newest = NULL;
    g->older = newest;
    g->number = newest ? newest->number + 1 : 1;
    newest = g;
    identify(g);
    snprintf(g->address, sizeof g->address, "10.0.0.%u:%u", config->host, PORT);
    for (unsigned i = 0; i < config->lanes; i++)
        reactor_init(&g->reactors[i], g);
    g->store = simstore_attach(config->store, g->reactors[0].env);
    simstore_on_kill(config->store, kill_owner, NULL);

    g->server_config = (struct server_config){.store = g->store,
                                              .shared = config->shared,
                                              .cache_bytes = config->cache_bytes,
                                              .threads = config->lanes,
                                              .lease_ms = config->lease_ms,
                                              .store_timeout_ms = config->store_timeout_ms,
                                              .owner_wait_ms = config->owner_wait_ms,
                                              .pause_close_ms = config->pause_close_ms};
    struct server *s = &g->server;
    s->config = &g->server_config;
    s->store = g->store;
    s->session = &g->session;
    s->lanes = g->lanes;
    s->all_stopped = all_stopped;
    s->overdue = overdue;
    server_fill_limits(s);
    for (s->n_lanes = 0; s->n_lanes < config->lanes; s->n_lanes++) {
        struct lane *lane = &s->lanes[s->n_lanes];
        lane->server = s;
        lane->no = s->n_lanes;
        lane->reactor = &g->reactors[s->n_lanes];
    }

    g->main = fiber_new(main_function, g);
    sim_at(g->reactors[0].env, sim_below(g->sim, TURN_NS_MAX), begin, g);
    return g;
}

enum gateway_state gateway_state(const struct gateway *g)
{
    return g->state;
}

/* --- what befalls it -------------------------------------------------------------------- */

static bool is_gone(const struct gateway *g)
{
    return g->state == GATEWAY_ENDED || g->state == GATEWAY_DEAD;
}

static void on_signal(void *arg)
{
    struct gateway *g = arg;
    log_info("asked to end: stopping");
    net_listen(g->config.net, g->config.host, g->reactors[0].env, NULL, NULL);
    lanes_stop(&g->server);
}

void gateway_stop(struct gateway *g)
{
    if (g->state == GATEWAY_STARTING)
        gateway_crash(g, false);
    if (g->state != GATEWAY_UP)
        return;
    g->state = GATEWAY_STOPPING;
    sim_at(g->reactors[0].env, 0, on_signal, g);
}

void gateway_crash(struct gateway *g, bool host_too)
{
    if (is_gone(g))
        return;
    trace(g->name, host_too ? "its machine dies" : "dies");
    g->state = GATEWAY_DEAD;
    if (host_too)
        boots[g->config.host]++;
    struct sim_env *envs[LANES_MAX];
    for (unsigned i = 0; i < g->config.lanes; i++) {
        envs[i] = g->reactors[i].env;
        sim_env_kill(envs[i]);
    }
    net_process_died(g->config.net, envs, g->config.lanes, host_too);
    simstore_died(g->config.store, g->store);
}

void gateway_pause(struct gateway *g)
{
    if (is_gone(g) || g->paused)
        return;
    trace(g->name, "stands still");
    g->paused = true;
    for (unsigned i = 0; i < g->config.lanes; i++)
        sim_env_pause(g->reactors[i].env);
    simstore_paused(g->config.store, g->store, true);
}

void gateway_resume(struct gateway *g)
{
    if (is_gone(g) || !g->paused)
        return;
    trace(g->name, "goes on");
    g->paused = false;
    for (unsigned i = 0; i < g->config.lanes; i++)
        sim_env_resume(g->reactors[i].env);
    simstore_paused(g->config.store, g->store, false);
}

void gateway_cut_store(struct gateway *g, bool cut)
{
    if (is_gone(g) || simstore_kind(g->config.store) == SIMSTORE_LOG)
        return;
    trace(g->name, cut ? "is cut off from the store" : "reaches the store again");
    simstore_cut(g->config.store, g->store, cut);
}

void gateway_slow_store(struct gateway *g, uint32_t commit_ms, uint32_t answer_ms)
{
    if (!is_gone(g) && simstore_kind(g->config.store) == SIMSTORE_FDB)
        simstore_slow(g->config.store, g->store, commit_ms, answer_ms);
}

static void squeeze_lane(void *arg)
{
    struct shard *s = ((struct lane *)arg)->shard;
    /* (Each round what was asked for lately comes nearer to going.) */
    for (unsigned i = 0; s && i < SQUEEZE_ROUNDS; i++)
        blocks_make_room(&s->blocks, buf_pool_budget(s->pool));
}

void gateway_squeeze(struct gateway *g)
{
    if (g->state != GATEWAY_UP)
        return;
    trace(g->name, "is short of memory");
    for (unsigned i = 0; i < g->config.lanes; i++)
        sim_at(g->reactors[i].env, 0, squeeze_lane, &g->lanes[i]);
}

void gateway_use_force(struct gateway *g, bool on)
{
    if (g->state != GATEWAY_UP)
        return;
    trace(g->name, on ? "takes volumes by force" : "takes no volumes by force any more");
    g->session.skip_lease = on;
}

/* --- looking ------------------------------------------------------------------------------ */

static const struct shard *shard_of(const struct gateway *g, uint64_t branch)
{
    if (g->state != GATEWAY_UP && g->state != GATEWAY_STOPPING)
        return NULL;
    return g->lanes[branch % g->config.lanes].shard;
}

static bool has_volume(const struct shard *s, uint64_t branch, enum vol_ownership ownership)
{
    list_for_each (l, &s->volumes) {
        const struct volume *vol = container_of(l, struct volume, link);
        if (vol->branch == branch && vol->ownership == ownership && !vol->lost)
            return true;
    }
    return false;
}

bool gateway_may_answer(struct gateway *g, uint64_t branch)
{
    const struct shard *s = shard_of(g, branch);
    if (!s || s->adrift || s->in_doubt || (s->member && !session_holds(s->session, s->env)))
        return false;
    return has_volume(s, branch, VOL_OWNED);
}

bool gateway_wants(struct gateway *g, uint64_t branch)
{
    const struct shard *s = shard_of(g, branch);
    return s && has_volume(s, branch, VOL_ACQUIRING);
}

bool gateway_owns_in_store(struct gateway *g, uint64_t branch)
{
    struct key key;
    struct slice head;
    struct owner_record owner;
    key_owner(&key, branch);
    return !is_gone(g) && simstore_peek(g->config.store, key_slice(&key), &head) &&
           owner_decode(key_slice(&key), head, &owner) &&
           !memcmp(owner.session, g->session.id, sizeof owner.session);
}

uint64_t gateway_sessions_ended(struct gateway *g)
{
    return atomic_load(&g->session.n_ended);
}

bool gateway_is_paused(const struct gateway *g)
{
    return g->paused;
}
