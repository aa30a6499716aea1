/*
 * The server from start to a clean end. All lanes are made before the first connection is
 * accepted; the end goes the other way round: no new connections, no handshakes, then every
 * lane answers what is under way, closes its connections, commits its volumes and gives them
 * back.
 */
#include "server/server.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <uv.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "server/connection.h"
#include "volume/recovery.h"
#include "volume/session.h"

#define CLEAR_EVERY_MS 30000u
/* How long volumes may take to commit after the last connection, before the process ends
 * without (what was answered is in the log and will be replayed, or committed where the
 * store has no log). */
#define COMMIT_MAX_MS 60000u
#define COMMIT_NO_LOG_MAX_MS 5000u

/* Gives the space of removed volumes back, a batch at a time, and clears the records of sessions
 * that are over. */
struct keeper {
    struct lane *lane;
    struct catalog_op op;
    struct session_sweep sweep;
    struct env_timer timer;
    bool more, busy;
};

struct running {
    struct server server; /* first */
    struct keeper keeper;
    uv_signal_t signals[2];
    struct env_timer end_timer;
    unsigned n_signals, n_lanes_stopped;
    bool lanes_told;
};

static struct running *running_of(struct lane *lane)
{
    return (struct running *)(void *)lane->server;
}

/* --- housekeeping ------------------------------------------------------------------- */

static void keeper_go(struct env_timer *timer);

static void keeper_rest(struct keeper *k, bool again)
{
    k->busy = false;
    if (k->lane->server->stopping) {
        lane_work_ended(k->lane);
        return;
    }
    env_timer_start(k->lane->env, &k->timer, again ? 0 : CLEAR_EVERY_MS);
}

static void keeper_swept(struct session_sweep *sweep)
{
    struct keeper *k = container_of(sweep, struct keeper, sweep);
    if (sweep->n_cleared > 0)
        log_info("cleaned up after %u servers or commands that ended without a word",
                 sweep->n_cleared);
    keeper_rest(k, false);
}

static void keeper_answered(struct catalog_op *op)
{
    struct keeper *k = container_of(op, struct keeper, op);
    struct server *server = k->lane->server;
    bool again = op->st == ST_OK && k->more;
    catalog_op_free(op);
    if (again || server->stopping || !server->session->timed) {
        keeper_rest(k, again);
        return;
    }
    k->sweep.done = keeper_swept;
    session_sweep_run(&k->sweep, server->session);
}

static void keeper_go(struct env_timer *timer)
{
    struct keeper *k = container_of(timer, struct keeper, timer);
    k->busy = true;
    k->more = false;
    memset(&k->op, 0, sizeof k->op);
    k->op.done = keeper_answered;
    catalog_clear_removed(&k->op, k->lane->server->store, k->lane->env, &k->more);
}

static void keeper_stop(struct keeper *k)
{
    env_timer_stop(k->lane->env, &k->timer);
    if (k->busy)
        lane_work_begun(k->lane);
}

/* --- stopping --------------------------------------------------------------------------- */

static void lane_stop_task(struct env_task *task)
{
    lane_stop(container_of(task, struct lane, task));
}

static void tell_lanes(struct running *r)
{
    if (r->lanes_told || r->server.n_handshakes)
        return;
    r->lanes_told = true;
    /* Connections that moved are before this in each lane's queue. */
    for (unsigned i = 0; i < r->server.n_lanes; i++) {
        struct lane *lane = &r->server.lanes[i];
        lane->task.run = lane_stop_task;
        env_post(lane->env, &lane->task);
    }
}

void server_conn_gone(struct lane *lane)
{
    if (lane->no == 0 && lane->server->stopping)
        tell_lanes(running_of(lane));
}

static void lane_stopped_task(struct env_task *task)
{
    struct lane *lane = container_of(task, struct lane, task);
    struct running *r = running_of(lane);
    if (++r->n_lanes_stopped < r->server.n_lanes)
        return;
    for (unsigned i = 0; i < r->server.n_lanes; i++)
        reactor_stop(r->server.lanes[i].reactor);
}

void server_lane_stopped(struct lane *lane)
{
    lane->task.run = lane_stopped_task;
    env_post(lane->server->lanes[0].env, &lane->task);
}

static void end_without(struct env_timer *timer)
{
    const struct running *r = container_of(timer, struct running, end_timer);
    bool answered_in_log = r->server.store->limits.has_log;
    /* (Answered at its log record, which is replayed, or at its commit.) */
    log_error("the store did not take the last commits in time; ending without them. Nothing that "
              "was answered is lost: it is %s",
              answered_in_log ? "in the log and comes back at the next start"
                              : "committed already; what was not answered is dropped");
    _exit(1);
}

static void stop(struct running *r)
{
    struct server *s = &r->server;
    struct lane *lane = &s->lanes[0];
    s->stopping = true;
    listeners_close(s->listeners);
    s->listeners = NULL;
    keeper_stop(&r->keeper);
    lane_stop_handshakes(lane);
    /* Without a log nothing that was answered can be waiting for a commit. */
    unsigned commit_ms = s->store->limits.has_log ? COMMIT_MAX_MS : COMMIT_NO_LOG_MAX_MS;
    env_timer_start(lane->env, &r->end_timer, s->limits.drain_ms + commit_ms);
    tell_lanes(r);
}

static void on_signal(uv_signal_t *handle, int signum)
{
    struct running *r = handle->data;
    r->n_signals++;
    if (r->n_signals == 1) {
        log_info("%s: stopping", signum == SIGINT ? "interrupted" : "asked to end");
        stop(r);
        return;
    }
    log_info("asked again: not waiting for requests under way");
    r->server.drain_now = true;
}

static void signals_begin(struct running *r)
{
    static const int numbers[] = {SIGTERM, SIGINT};
    for (int i = 0; i < 2; i++) {
        CHECK(uv_signal_init(reactor_loop(r->server.lanes[0].reactor), &r->signals[i]) == 0);
        r->signals[i].data = r;
        CHECK(uv_signal_start(&r->signals[i], on_signal, numbers[i]) == 0);
    }
}

/* --- starting ------------------------------------------------------------------------------ */

static void raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static unsigned or_default(unsigned value, unsigned otherwise)
{
    return value ? value : otherwise;
}

static void fill_limits(struct server *s)
{
    s->limits = *s->config;
    s->limits.connections_max = or_default(s->config->connections_max, 1024);
    s->limits.handshakes_max = or_default(s->config->handshakes_max, 128);
    s->limits.handshake_timeout_ms = or_default(s->config->handshake_timeout_ms, 10000);
    s->limits.pause_close_ms = or_default(s->config->pause_close_ms, 10000);
    s->limits.receive_timeout_ms = or_default(s->config->receive_timeout_ms, 30000);
    s->limits.drain_ms = or_default(s->config->drain_ms, 10000);
}

static enum status open_lanes(struct server *s, struct err *e)
{
    for (unsigned i = 0; i < s->n_lanes; i++) {
        struct lane *lane = &s->lanes[i];
        struct shard_config config = {.store = s->store,
                                      .env = reactor_env(lane->reactor),
                                      .session = s->session,
                                      .cache_bytes = s->config->cache_bytes / s->n_lanes,
                                      .store_timeout_ms = s->config->store_timeout_ms};
        enum status st = shard_new(&config, &lane->shard, e);
        if (st != ST_OK)
            return st;
        lane_init(lane);
    }
    return ST_OK;
}

static void close_lanes(struct server *s)
{
    for (unsigned i = 0; i < s->n_lanes; i++) {
        struct lane *lane = &s->lanes[i];
        if (!lane->shard)
            continue;
        lane_destroy(lane);
        shard_free(lane->shard);
        lane->shard = NULL;
    }
}

static void take_connection(void *arg, const struct accepted *a)
{
    struct server *s = arg;
    conn_accept(&s->lanes[0], a);
}

static void run_lanes(struct running *r)
{
    struct server *s = &r->server;
    size_t n;
    signals_begin(r);
    listeners_start(s->listeners, reactor_loop(s->lanes[0].reactor), take_connection, s);
    r->keeper.lane = &s->lanes[0];
    r->keeper.timer.fire = keeper_go;
    if (!s->config->read_only)
        env_timer_start(s->lanes[0].env, &r->keeper.timer, CLEAR_EVERY_MS);
    r->end_timer.fire = end_without;

    const char *const *addresses = listeners_addresses(s->listeners, &n);
    for (size_t i = 0; i < n; i++)
        log_info("listening on %s", addresses[i]);
    if (s->config->ready)
        s->config->ready(s->config->arg, addresses, n);

    reactor_run(s->lanes[0].reactor);
    for (unsigned i = 1; i < s->n_lanes; i++)
        reactor_join(s->lanes[i].reactor);
    for (int i = 0; i < 2; i++)
        uv_close((uv_handle_t *)&r->signals[i], NULL);
}

static enum status start_threads(struct server *s, struct err *e)
{
    for (unsigned i = 1; i < s->n_lanes; i++) {
        enum status st = reactor_start(s->lanes[i].reactor, e);
        if (st == ST_OK)
            continue;
        while (--i > 0) {
            reactor_stop(s->lanes[i].reactor);
            reactor_join(s->lanes[i].reactor);
        }
        return st;
    }
    return ST_OK;
}

static enum status serve(struct running *r, struct err *e)
{
    struct server *s = &r->server;
    struct session session;
    size_t n;
    for (size_t i = 0; i < s->config->n_listen; i++) {
        enum status st = listeners_open(s->listeners, s->config->listen[i], e);
        if (st != ST_OK)
            return st;
    }
    const char *address = listeners_addresses(s->listeners, &n)[0];
    struct env *env = reactor_env(s->lanes[0].reactor);
    enum status st =
        session_begin(&session, s->store, env, reactor_run_once, s->config->lease_ms, address, e);
    if (st != ST_OK)
        return st;
    s->session = &session;
    st = open_lanes(s, e);
    if (st == ST_OK)
        st = start_threads(s, e);
    if (st == ST_OK)
        run_lanes(r);
    close_lanes(s);
    session_sweep_free(&r->keeper.sweep);
    session_end(&session, env, reactor_run_once);
    env_timer_stop(env, &r->end_timer);
    return st;
}

enum status server_run(const struct server_config *config, struct err *e)
{
    CHECK(config->n_listen >= 1 && config->n_listen <= SERVER_LISTEN_MAX);
    CHECK(config->threads >= 1 && config->threads <= SERVER_THREADS_MAX);
    raise_descriptor_limit();
    signal(SIGPIPE, SIG_IGN);

    struct running *r = mem_zalloc(sizeof *r);
    struct server *s = &r->server;
    s->config = config;
    s->store = config->store;
    fill_limits(s);
    s->lanes = mem_zalloc(config->threads * sizeof *s->lanes);
    s->listeners = listeners_new();

    enum status st = ST_OK;
    while (st == ST_OK && s->n_lanes < config->threads) {
        struct lane *lane = &s->lanes[s->n_lanes];
        lane->server = s;
        lane->no = s->n_lanes;
        st = reactor_new(&lane->reactor, e);
        if (st == ST_OK)
            s->n_lanes++;
    }
    if (st == ST_OK)
        st = serve(r, e);
    listeners_close(s->listeners);
    for (unsigned i = 0; i < s->n_lanes; i++)
        reactor_join(s->lanes[i].reactor);
    /* Before the reactors: an engine may have timers on them, and tasks on their way. */
    store_close(config->store);
    for (unsigned i = 0; i < s->n_lanes; i++)
        reactor_free(s->lanes[i].reactor);
    free(s->lanes);
    free(r);
    return st;
}
