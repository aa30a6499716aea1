/*
 * The lanes of a server together, from the first to the last: made, kept in order, stopped.
 * The end: no handshakes any more, then every lane answers what is under way, closes its
 * connections, commits its volumes and gives them back. Here is no process and no socket:
 * those are server.c's, or a simulator's.
 */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "server/connection.h"

#define CLEAR_EVERY_MS 30000u
#define HANDSHAKES_MAX_LEAST 128u
/* How long volumes may take to commit after the last connection, before the process ends
 * without (what was answered is in the log and will be replayed, or committed where the
 * store has no log). */
#define COMMIT_MAX_MS 60000u
#define COMMIT_NO_LOG_MAX_MS 5000u

/* --- housekeeping ------------------------------------------------------------------- */

static void keeper_go(struct env_timer *timer);

static void keeper_rest(struct keeper *k, unsigned ms)
{
    k->busy = false;
    if (k->lane->server->stopping) {
        lane_work_ended(k->lane);
        return;
    }
    env_timer_start(k->lane->env, &k->timer, ms);
}

static void keeper_swept(struct session_sweep *sweep)
{
    struct keeper *k = container_of(sweep, struct keeper, sweep);
    if (sweep->n_cleared > 0)
        log_info("cleaned up after %u servers or commands that ended without a word",
                 sweep->n_cleared);
    keeper_rest(k, sweep->n_suspects ? SESSION_LOOK_MS : CLEAR_EVERY_MS);
}

static void keeper_answered(struct catalog_op *op)
{
    struct keeper *k = container_of(op, struct keeper, op);
    struct server *server = k->lane->server;
    bool again = op->st == ST_OK && k->more;
    catalog_op_free(op);
    if (again || server->stopping || !server->session->timed) {
        keeper_rest(k, again ? 0 : CLEAR_EVERY_MS);
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

static void tell_lanes(struct server *s)
{
    if (s->lanes_told || s->n_handshakes)
        return;
    s->lanes_told = true;
    /* Connections that moved are before this in each lane's queue. */
    for (unsigned i = 0; i < s->n_lanes; i++) {
        struct lane *lane = &s->lanes[i];
        lane->task.run = lane_stop_task;
        env_post(lane->env, &lane->task);
    }
}

void server_conn_gone(struct lane *lane)
{
    if (lane->no == 0 && lane->server->stopping)
        tell_lanes(lane->server);
}

static void lane_stopped_task(struct env_task *task)
{
    struct lane *lane = container_of(task, struct lane, task);
    struct server *s = lane->server;
    if (++s->n_lanes_stopped == s->n_lanes)
        s->all_stopped(s);
}

void server_lane_stopped(struct lane *lane)
{
    lane->task.run = lane_stopped_task;
    env_post(lane->server->lanes[0].env, &lane->task);
}

static void lane_drain_task(struct env_task *task)
{
    lane_drain(container_of(task, struct lane, drain_task));
}

static void drain(struct env_task *task)
{
    struct server *s = container_of(task, struct server, drain_task);
    if (s->stopping)
        return;
    log_info("draining: all volumes are given back, and no clients are taken any more");
    lane_stop_handshakes(&s->lanes[0]);
    for (unsigned i = 0; i < s->n_lanes; i++) {
        s->lanes[i].drain_task.run = lane_drain_task;
        env_post(s->lanes[i].env, &s->lanes[i].drain_task);
    }
}

void server_lane_drained(struct lane *lane)
{
    struct server *s = lane->server;
    /* (At an end without a drain nobody has to be told.) */
    if (atomic_fetch_add(&s->n_lanes_drained, 1) + 1 < s->n_lanes || !atomic_load(&s->draining))
        return;
    atomic_store(&s->drained, true);
    log_info("drained: all volumes were given back");
}

void server_drain(struct server *s)
{
    if (atomic_exchange(&s->draining, true))
        return;
    s->drain_task.run = drain;
    env_post(s->lanes[0].env, &s->drain_task);
}

static void overdue(struct env_timer *timer)
{
    struct server *s = container_of(timer, struct server, end_timer);
    s->overdue(s);
}

void lanes_stop(struct server *s)
{
    struct lane *lane = &s->lanes[0];
    s->stopping = true;
    keeper_stop(&s->keeper);
    lane_stop_handshakes(lane);
    /* Without a log nothing that was answered can be waiting for a commit. */
    unsigned commit_ms = s->store->limits.has_log ? COMMIT_MAX_MS : COMMIT_NO_LOG_MAX_MS;
    env_timer_start(lane->env, &s->end_timer, s->limits.drain_ms + commit_ms);
    tell_lanes(s);
}

/* --- access ----------------------------------------------------------------------------- */

/* On its way to one lane. */
struct access_change {
    struct env_task task;
    struct lane *lane;
    struct access *access; /* held */
};

static void change_access(struct env_task *task)
{
    struct access_change *change = container_of(task, struct access_change, task);
    lane_use_access(change->lane, change->access);
    access_release(change->access);
    free(change);
}

void lanes_use_access(struct server *s, struct access *access)
{
    /* At once where handshakes are: who is let in by the old rules is on its way to a lane behind
     * the new ones, or there before them, and either meets them there. */
    lane_use_access(&s->lanes[0], access);
    for (unsigned i = 1; i < s->n_lanes; i++) {
        struct access_change *change = mem_zalloc(sizeof *change);
        *change = (struct access_change){.task.run = change_access,
                                         .lane = &s->lanes[i],
                                         .access = access_hold(access)};
        env_post(s->lanes[i].env, &change->task);
    }
}

/* --- starting and the end ------------------------------------------------------------------- */

static unsigned or_default(unsigned value, unsigned otherwise)
{
    return value ? value : otherwise;
}

/* Half of the connections; with few of them most. */
static unsigned usual_handshakes(unsigned connections_max)
{
    return connections_max < 2 * HANDSHAKES_MAX_LEAST ? HANDSHAKES_MAX_LEAST : connections_max / 2;
}

void server_fill_limits(struct server *s)
{
    s->limits = *s->config;
    s->limits.connections_max = or_default(s->config->connections_max, SERVER_CONNECTIONS_USUAL);
    s->limits.handshakes_max = or_default(
        s->config->handshakes_max, usual_handshakes(s->limits.connections_max));
    s->limits.handshake_timeout_ms = or_default(s->config->handshake_timeout_ms, 10000);
    s->limits.pause_close_ms = or_default(s->config->pause_close_ms, 10000);
    s->limits.receive_timeout_ms = or_default(s->config->receive_timeout_ms, 30000);
    s->limits.drain_ms = or_default(s->config->drain_ms, 10000);
    list_init(&s->handshakes);
    list_init(&s->tls_waiting);
    s->metrics.slow_ns = (uint64_t)s->config->slow_ms * 1000000;
}

enum status lanes_open(struct server *s, struct err *e)
{
    for (unsigned i = 0; i < s->n_lanes; i++) {
        struct lane *lane = &s->lanes[i];
        struct shard_config config = {.store = s->store,
                                      .env = reactor_env(lane->reactor),
                                      .session = s->session,
                                      .cache_bytes = s->config->cache_bytes / s->n_lanes,
                                      .store_timeout_ms = s->config->store_timeout_ms,
                                      .owner_wait_ms = s->config->owner_wait_ms};
        enum status st = shard_new(&config, &lane->shard, e);
        if (st != ST_OK)
            return st;
        lane_init(lane);
    }
    return ST_OK;
}

void lanes_begin(struct server *s)
{
    s->keeper.lane = &s->lanes[0];
    s->keeper.timer.fire = keeper_go;
    s->end_timer.fire = overdue;
    if (!s->config->read_only)
        env_timer_start(s->lanes[0].env, &s->keeper.timer, CLEAR_EVERY_MS);
}

void lanes_close(struct server *s)
{
    for (unsigned i = 0; i < s->n_lanes; i++) {
        struct lane *lane = &s->lanes[i];
        if (!lane->shard)
            continue;
        lane_destroy(lane);
        shard_free(lane->shard);
        lane->shard = NULL;
    }
    session_sweep_free(&s->keeper.sweep);
}
