/*
 * The life of a connection: accepted, negotiated, moved to the reactor of its volume,
 * served, closed. connection.h has the rules on what a client may make the server hold.
 */
#include "server/connection.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "server/tls.h"

/* Of LANE_RECEIVE_BYTES each. */
#define DRAIN_READS_MAX 256u
#define TICK_MS 500u
#define TICK_STOPPING_MS 20u
#define TRICKLE_PART 3u
#define RECEIVE_PIECES 256
#define TLS_SHOWN_BYTES 96
/* Of the workers, which are four at least; the others are the store's. */
#define TLS_STEPS_AT_ONCE 1u
/* Lines of one kind in the log, in LOG_LIMIT_WINDOW_NS. */
#define LINES_MAX 50u
#define LINES_ENTERED_MAX 500u /* after a restart all clients come at once */
#define BITMAP_NAME_BYTES (sizeof NBD_CONTEXT_BITMAP_PREFIX + NAME_BYTES_MAX)
/* Three numbers of 64 bits. */
#define IDENTITY_BYTES (sizeof NBD_CONTEXT_IDENTITY_PREFIX + 3 * 17)
/* Part of a reactor's cache that replies to all its connections may hold back. */
#define REPLY_CACHE_PART 8

uint64_t lane_now_ms(const struct lane *lane)
{
    return env_now_ns(lane->env) / 1000000;
}

/* The same, at a moment from which on requests are taken, or at which all that was answered is sent. */
static uint64_t mark_ms(struct lane *lane)
{
    uint64_t now_ns = env_now_ns(lane->env);
    metrics_mark(&lane->metrics, now_ns);
    return now_ns / 1000000;
}

static void settle(struct conn *c);

/* --- the log ------------------------------------------------------------------------------ */

static void limit_lines(struct lane *lane, enum lane_line line, enum log_level level,
                        const char *what)
{
    lane->lines[line] = (struct log_limit){.what = what, .level = level, .lines_max = LINES_MAX};
}

static void lines_init(struct lane *lane)
{
    limit_lines(lane, LINE_ENTERED, LOG_LEVEL_INFO, "clients that entered an export");
    limit_lines(lane, LINE_NO_EXPORT, LOG_LEVEL_INFO, "clients without an export");
    limit_lines(lane, LINE_NO_TLS, LOG_LEVEL_WARNING, "clients refused for want of TLS");
    limit_lines(lane, LINE_TLS_REFUSED, LOG_LEVEL_WARNING, "failed TLS sessions");
    limit_lines(lane, LINE_TURNED_AWAY, LOG_LEVEL_WARNING, "clients turned away");
    limit_lines(lane, LINE_CLOSED, LOG_LEVEL_WARNING, "clients closed");
    limit_lines(lane, LINE_NO_ROLE, LOG_LEVEL_WARNING, "clients that may not write");
    lane->lines[LINE_ENTERED].lines_max = LINES_ENTERED_MAX;
}

bool lane_may_log(struct lane *lane, enum lane_line line)
{
    return log_limit_may(&lane->lines[line], env_now_ns(lane->env), 1);
}

/* --- handshakes under way ------------------------------------------------------------------ */

/* Clients that share an address are in one group, and some others by chance: of IPv6 what a network
 * has, since a client has as many as it likes of the rest. */
static uint16_t *handshake_group(struct server *server, const struct peer *p)
{
    uint8_t key[8] = {0};
    if (p->way == PEER_TCP)
        memcpy(key, p->ip, min_u64(p->ip_bytes, sizeof key));
    else
        memcpy(key, &p->uid, sizeof p->uid);
    return &server->handshakes_from[hash64(key, sizeof key, server->group_seed) % HANDSHAKE_GROUPS];
}

static void handshake_enters(struct conn *c)
{
    struct server *server = c->lane->server;
    list_add_tail(&server->handshakes, &c->handshake_link);
    server->n_handshakes++;
    ++*handshake_group(server, &c->peer);
}

static void handshake_leaves(struct conn *c)
{
    struct server *server = c->lane->server;
    list_remove(&c->handshake_link);
    server->n_handshakes--;
    --*handshake_group(server, &c->peer);
}

/* The one that is to give way to a new one; NULL: none can, because all wait for the store. */
static struct conn *handshake_to_end(struct server *server)
{
    const uint16_t *most = NULL;
    struct conn *oldest = NULL;
    for (unsigned i = 0; i < HANDSHAKE_GROUPS && !most; i++)
        if (server->handshakes_from[i] > server->n_handshakes / 2)
            most = &server->handshakes_from[i];
    list_for_each (l, &server->handshakes) {
        struct conn *c = container_of(l, struct conn, handshake_link);
        if (c->phase != CONN_HANDSHAKE || c->lookup || c->tls_step)
            continue;
        if (!most || handshake_group(server, &c->peer) == most)
            return c;
        if (!oldest)
            oldest = c;
    }
    return oldest;
}

/* --- the end ------------------------------------------------------------------------------ */

static void lane_check_stopped(struct lane *lane)
{
    if (!lane->stopping || lane->stopped || lane->n_conns || lane->n_works)
        return;
    lane->stopped = true;
    env_timer_stop(lane->env, &lane->tick);
    server_lane_stopped(lane);
}

void lane_work_begun(struct lane *lane)
{
    lane->n_works++;
}

void lane_work_ended(struct lane *lane)
{
    lane->n_works--;
    lane_check_stopped(lane);
}

static void volume_closed(void *arg)
{
    lane_work_ended(arg);
}

static void close_volume(struct lane *lane, struct volume *vol)
{
    lane_work_begun(lane);
    volume_close(vol, volume_closed, lane);
}

static void lane_remove_conn(struct lane *lane, struct conn *c)
{
    list_remove(&c->link);
    lane->n_conns--;
}

static void opened_given_back(struct env_task *task)
{
    struct conn *c = container_of(task, struct conn, task);
    c->opened = NULL;
    conn_try_free(c);
}

/* Closes what is open of a connection on a lane: its volume, and what its dirty bitmaps count from. */
static void close_volumes(struct lane *lane, struct conn *c, struct volume *vol)
{
    for (unsigned i = 0; i < HANDSHAKE_CONTEXTS_MAX; i++)
        if (c->contexts[i].since) {
            close_volume(lane, c->contexts[i].since);
            c->contexts[i].since = NULL;
        }
    close_volume(lane, vol);
}

static void give_opened_back(struct env_task *task)
{
    struct conn *c = container_of(task, struct conn, task);
    volume_unwatch_loss(&c->watcher);
    close_volumes(c->opened_lane, c, c->opened);
    c->task.run = opened_given_back;
    env_post(c->lane->env, &c->task);
}

void conn_try_free(struct conn *c)
{
    struct lane *lane = c->lane;
    if (c->phase != CONN_DEAD || c->attached || c->n_requests || c->lookup || c->tls_step)
        return;
    if (c->opened) {
        /* It had opened a volume for an export it never entered. */
        if (c->task.run != give_opened_back) {
            c->task.run = give_opened_back;
            env_post(c->opened_lane->env, &c->task);
        }
        return;
    }
    lane_remove_conn(lane, c);
    counter_add(&lane->metrics.closed, 1);
    metrics_client_leave(&lane->metrics);
    if (c->handshake) {
        handshake_free(c->handshake);
        free(c->handshake);
        handshake_leaves(c);
    }
    if (c->client.export)
        export_leave(&c->client);
    if (c->vol)
        close_volumes(lane, c, c->vol);
    atomic_fetch_sub(&lane->server->n_conns, 1);
    free(c);
    server_conn_gone(lane);
    lane_check_stopped(lane);
}

static void drop_wire(struct conn *c)
{
    wire_close(c->wire);
    c->wire = NULL;
    conn_try_free(c);
}

static void wire_gone(void *arg)
{
    struct conn *c = arg;
    c->attached = false;
    if (!c->tls_step) /* it comes back otherwise */
        drop_wire(c);
}

void conn_die(struct conn *c, const char *why)
{
    if (c->phase == CONN_DEAD)
        return;
    bool serving = c->phase == CONN_SERVING;
    CHECK(c->phase != CONN_MOVING);
    if (c->phase == CONN_HANDSHAKE)
        counter_add(&c->lane->metrics.handshakes[c->left ? METRICS_LEFT : METRICS_FAILED], 1);
    c->phase = CONN_DEAD;
    const char *trouble = c->tls_step ? NULL : wire_tls_trouble(c->wire);
    if (trouble && lane_may_log(c->lane, LINE_TLS_REFUSED))
        log_client_info(c->peer.address, NULL, "client %s: its TLS session broke: %s",
                        c->peer.address, trouble);
    log_client_debug(c->peer.address, serving ? volume_name(c->vol) : NULL,
                     "client %s: connection closed: %s", c->peer.address, why);
    list_remove(&c->ready_link);
    list_remove(&c->flush_link);
    list_remove(&c->handshake_link);
    list_remove(&c->tls_link);
    if (serving) {
        env_timer_stop(c->lane->env, &c->claim_timer);
        leftover_end(c);
        transmission_abandon(c);
        volume_unwatch_loss(&c->watcher);
        out_drop(c);
    }
    free(c->stash);
    c->stash = NULL;
    c->stash_len = 0;
    wire_detach(c->wire, wire_gone);
}

void conn_wake(struct conn *c)
{
    if (c->phase != CONN_DEAD && list_empty(&c->ready_link))
        list_add_tail(&c->lane->ready, &c->ready_link);
}

/* --- bytes and events ------------------------------------------------------------------------ */

static void on_wire(void *arg, int events);

static void attach(struct conn *c)
{
    wire_attach(c->wire, c->lane->reactor, on_wire, c);
    c->attached = true;
}

/* Keeps what is at `data` (maybe inside the stash) for later. */
static void stash_keep(struct conn *c, const uint8_t *data, size_t len)
{
    uint8_t *kept = NULL;
    if (len) {
        CHECK(len <= LANE_RECEIVE_BYTES);
        kept = mem_alloc(len);
        memcpy(kept, data, len);
    }
    free(c->stash);
    c->stash = kept;
    c->stash_len = (uint32_t)len;
}

/* --- handshake: questions ------------------------------------------------------------------------ */

/* A question of the handshake that the store or another lane has to answer. The connection
 * stays until it is back, dead or not. */
struct lookup {
    struct conn *conn;
    struct access_view *view; /* what the client may open, since it asked */
    bool all_snapshots;       /* of the export may be seen by it */
    struct export_search search;
    struct catalog_op list;
    bool is_list, list_there;
    size_t list_at;
    bool opens;
    char name[FULL_NAME_BYTES]; /* of what was found */
    struct catalog_op snapshots;
    const char **contexts; /* that are offered */
    size_t n_contexts;
    char (*bitmaps)[BITMAP_NAME_BYTES]; /* names of some of them */
    /* What is opened on `target`: the volume (`opening` is -1), then the snapshot each dirty bitmap
     * that was selected counts from (by its place among the contexts; 0: it is none). */
    struct lane *target;
    struct volume_open open;
    int opening;
    uint64_t since_epochs[HANDSHAKE_CONTEXTS_MAX];
    struct volume *vol;
    uint64_t size;
    uint32_t block_size;
    struct env_task task;
};

static void handshake_pump(struct conn *c);

static void lookup_free(struct conn *c)
{
    struct lookup *l = c->lookup;
    if (l->list_there)
        catalog_op_free(&l->list);
    access_view_free(l->view);
    free(l->contexts);
    free(l->bitmaps);
    free(l);
    c->lookup = NULL;
}

static struct lookup *lookup_new(struct conn *c)
{
    struct lookup *l = mem_zalloc(sizeof *l);
    l->conn = c;
    l->view = access_view_new(c->lane->access, &c->peer);
    c->lookup = l;
    return l;
}

/* True where the connection died meanwhile; the lookup is gone then. */
static bool lookup_is_orphan(struct conn *c)
{
    if (c->phase != CONN_DEAD)
        return false;
    lookup_free(c);
    conn_try_free(c);
    return true;
}

static void list_came(struct catalog_op *op)
{
    struct lookup *l = container_of(op, struct lookup, list);
    struct conn *c = l->conn;
    l->list_there = true;
    export_hide(op, l->view);
    if (!lookup_is_orphan(c))
        handshake_pump(c);
}

static void answer_list(struct conn *c)
{
    struct lookup *l = c->lookup;
    struct handshake *h = c->handshake;
    for (; l->list.st == ST_OK && l->list_at < l->list.n_entries; l->list_at++) {
        const struct catalog_entry *e = &l->list.entries[l->list_at];
        if (!handshake_list_item(h, e->name, e->header.description))
            return;
    }
    handshake_list_done(h, l->list.st, l->list.err.text);
    lookup_free(c);
}

/* The snapshot behind a metadata context that is a dirty bitmap; NULL: it is none. */
static const char *bitmap_snapshot(const char *context)
{
    size_t len = sizeof NBD_CONTEXT_BITMAP_PREFIX - 1;
    return strncmp(context, NBD_CONTEXT_BITMAP_PREFIX, len) == 0 ? context + len : NULL;
}

static void answer_export(struct conn *c)
{
    struct lookup *l = c->lookup;
    const struct catalog_entry *e = &l->search.entry;
    char description[EXPORT_DESCRIPTION_BYTES], identity[IDENTITY_BYTES],
        peer[PEER_TEXT_BYTES];
    export_description(e, description);
    /* Other stores have branches of the same number, but not made in the same nanosecond. */
    snprintf(identity, sizeof identity,
             NBD_CONTEXT_IDENTITY_PREFIX "%" PRIx64 "-%" PRIx64 "-%" PRIx64, e->branch,
             e->header.created_ns, e->snapshot.epoch);
    struct nbd_export x = {
        .name = l->name,
        .description = description,
        .size = l->size,
        .block_size = l->block_size,
        .read_only = c->lane->server->config->read_only || l->search.read_only,
        .contexts = l->contexts,
        .n_contexts = l->n_contexts,
        .identity = identity};
    enum status st = l->search.st;
    if (st != ST_OK && lane_may_log(c->lane, LINE_NO_EXPORT))
        log_client_info(c->peer.address, NULL, "client %s: no export for it: %s%s",
                        peer_text(&c->peer, peer), l->search.err.text,
                        l->search.denied ? " (no access rule grants it)" : "");
    handshake_export(c->handshake, st, &x, l->search.err.text);
    lookup_free(c);
    handshake_pump(c);
}

static void open_came_back(struct env_task *task)
{
    struct lookup *l = container_of(task, struct lookup, task);
    struct conn *c = l->conn;
    c->opened = l->vol;
    c->opened_lane = l->target;
    if (l->open.st != ST_OK) {
        l->search.st = l->open.st;
        l->search.err = l->open.err;
    }
    if (!lookup_is_orphan(c))
        answer_export(c);
}

static void on_lost(struct volume_watcher *w, const char *why)
{
    conn_die(container_of(w, struct conn, watcher), why);
}

static void on_early_loss(struct volume_watcher *w, const char *why)
{
    (void)why;
    container_of(w, struct conn, watcher)->lost = true;
}

static void open_next(struct lookup *l);

static void open_done(struct volume_open *op)
{
    struct lookup *l = container_of(op, struct lookup, open);
    struct conn *c = l->conn;
    if (op->st == ST_OK && l->opening < 0) {
        l->vol = op->vol;
        l->size = volume_size(op->vol);
        l->block_size = volume_block_size(op->vol);
        c->watcher.lost = on_early_loss;
        volume_watch_loss(op->vol, &c->watcher);
    } else if (op->st == ST_OK) {
        c->contexts[l->opening].since = op->vol;
    } else if (l->vol) {
        volume_unwatch_loss(&c->watcher);
        close_volumes(l->target, c, l->vol);
        l->vol = NULL;
    }
    if (op->st == ST_OK)
        open_next(l);
    else
        env_post(c->lane->env, &l->task);
}

/* Opens the next of what the connection needs; goes back when that is all. */
static void open_next(struct lookup *l)
{
    const struct catalog_entry *e = &l->search.entry;
    do
        l->opening++;
    while (l->opening >= 0 && l->opening < (int)HANDSHAKE_CONTEXTS_MAX &&
           !l->since_epochs[l->opening]);
    if (l->opening == (int)HANDSHAKE_CONTEXTS_MAX) {
        env_post(l->conn->lane->env, &l->task);
        return;
    }
    bool is_bitmap = l->opening >= 0;
    l->open = (struct volume_open){
        .branch = e->branch,
        .epoch = is_bitmap ? l->since_epochs[l->opening] : e->snapshot.epoch,
        .read_only = l->conn->lane->server->config->read_only,
        .closed = &metrics_volume(&l->target->metrics, e->name)->closed,
        .done = open_done};
    if (is_bitmap)
        snprintf(l->open.name, sizeof l->open.name, "%s@%s", e->name,
                 bitmap_snapshot(l->conn->handshake->result.contexts[l->opening].name));
    else
        memcpy(l->open.name, l->name, sizeof l->open.name);
    volume_open(l->target->shard, &l->open);
}

static void open_there(struct env_task *task)
{
    struct lookup *l = container_of(task, struct lookup, task);
    l->task.run = open_came_back;
    l->opening = -2;
    open_next(l);
}

/* Whether the snapshots of the export matter for the answer. */
static bool needs_snapshots(const struct lookup *l)
{
    const struct handshake *h = l->conn->handshake;
    if (!l->opens)
        return handshake_asks_below(h, NBD_CONTEXT_BITMAP_PREFIX);
    if (!handshake_selected_for(h, l->name))
        return false;
    for (uint32_t i = 0; i < h->result.n_contexts; i++)
        if (bitmap_snapshot(h->result.contexts[i].name))
            return true;
    return false;
}

/* Whether there can be a dirty bitmap from this snapshot for this client: those of a snapshot are
 * from older ones. */
static bool is_before(const struct lookup *l, const struct catalog_snapshot *s)
{
    const struct catalog_entry *e = &l->search.entry;
    if (e->snapshot.epoch && s->epoch >= e->snapshot.epoch)
        return false;
    return l->all_snapshots || access_view_right(l->view, e->name, s->rec.name) != ACCESS_NONE;
}

/* The contexts to choose from; those of snapshots only as far as somebody asks for them. */
static void offer_contexts(struct lookup *l)
{
    const struct handshake *h = l->conn->handshake;
    const struct catalog_op *op = &l->snapshots;
    size_t max = min_u64(op->n_snapshots, CONN_BITMAPS_LISTED), n = 0;
    l->contexts = mem_alloc((CONTEXTS_ALWAYS + max) * sizeof *l->contexts);
    memcpy(l->contexts, transmission_context_names, sizeof transmission_context_names);
    l->bitmaps = mem_alloc(max * sizeof *l->bitmaps);
    for (size_t i = op->n_snapshots; i > 0 && n < max; i--) {
        const struct catalog_snapshot *s = &op->snapshots[i - 1];
        snprintf(l->bitmaps[n], sizeof l->bitmaps[n], NBD_CONTEXT_BITMAP_PREFIX "%s", s->rec.name);
        if (!is_before(l, s) || !handshake_asks_for(h, l->bitmaps[n]))
            continue;
        l->contexts[CONTEXTS_ALWAYS + n] = l->bitmaps[n];
        n++;
    }
    l->n_contexts = CONTEXTS_ALWAYS + n;
}

/* What the dirty bitmaps that the client has selected count from. */
static enum status find_since(struct lookup *l)
{
    const struct handshake_result *r = &l->conn->handshake->result;
    const struct catalog_op *op = &l->snapshots;
    for (uint32_t i = 0; i < r->n_contexts; i++) {
        const char *name = bitmap_snapshot(r->contexts[i].name);
        for (size_t k = 0; name && k < op->n_snapshots && !l->since_epochs[i]; k++)
            if (strcmp(op->snapshots[k].rec.name, name) == 0 && is_before(l, &op->snapshots[k]))
                l->since_epochs[i] = op->snapshots[k].epoch;
        if (name && !l->since_epochs[i])
            return fail(&l->search.err, ST_NOTFOUND,
                        "%s has no snapshot \"%s\" any more, which the metadata context %s needs",
                        l->search.entry.name, name, r->contexts[i].name);
    }
    return ST_OK;
}

/* The lane that serves a volume; its snapshots are spread over all of them. */
static struct lane *lane_of(struct server *server, const struct catalog_entry *e)
{
    return &server->lanes[(e->branch + e->snapshot.epoch) % server->n_lanes];
}

static void export_found(struct lookup *l)
{
    struct conn *c = l->conn;
    if (l->search.st == ST_OK && !l->opens)
        offer_contexts(l);
    catalog_op_free(&l->snapshots);
    if (l->search.st != ST_OK || !l->opens) {
        answer_export(c);
        return;
    }
    l->target = lane_of(c->lane->server, &l->search.entry);
    l->task.run = open_there;
    env_post(l->target->env, &l->task);
}

static void snapshots_came(struct catalog_op *op)
{
    struct lookup *l = container_of(op, struct lookup, snapshots);
    struct conn *c = l->conn;
    if (c->phase == CONN_DEAD)
        catalog_op_free(op);
    if (lookup_is_orphan(c))
        return;
    if (op->st != ST_OK) {
        l->search.st = op->st;
        l->search.err = op->err;
    } else if (l->opens) {
        l->search.st = find_since(l);
    }
    export_found(l);
}

static void search_came(struct export_search *search)
{
    struct lookup *l = container_of(search, struct lookup, search);
    struct conn *c = l->conn;
    if (lookup_is_orphan(c))
        return;
    if (search->st == ST_OK) {
        l->size = export_size(&search->entry);
        l->block_size = search->entry.header.block_size;
        export_name(&search->entry, l->name);
        l->all_snapshots = access_view_right(l->view, search->entry.name, "") != ACCESS_NONE;
    }
    if (search->st == ST_OK && needs_snapshots(l)) {
        l->snapshots.done = snapshots_came;
        catalog_snapshots(&l->snapshots, c->lane->server->store, c->lane->env,
                          search->entry.branch);
        return;
    }
    export_found(l);
}

static void ask_list(struct conn *c)
{
    struct lookup *l = lookup_new(c);
    l->is_list = true;
    l->list.done = list_came;
    catalog_list(&l->list, c->lane->server->store, c->lane->env);
}

static void ask_export(struct conn *c)
{
    struct lookup *l = lookup_new(c);
    l->search.done = search_came;
    l->search.view = l->view;
    const char *name = handshake_export_name(c->handshake, &l->opens);
    export_find(&l->search, c->lane->server->store, c->lane->env, name,
                c->lane->server->config->default_export);
}

/* --- access ------------------------------------------------------------------------------------- */

/* Closes a connection that has more than the rules give it; false then. */
static bool keeps_access(struct conn *c)
{
    char volume[NAME_BYTES_MAX + 1], snapshot[NAME_BYTES_MAX + 1], peer[PEER_TEXT_BYTES];
    if (!c->lane->access)
        return true;
    struct access_view *view = access_view_new(c->lane->access, &c->peer);
    bool is_name = name_split(c->export_name, volume, snapshot);
    CHECK(is_name);
    enum access_right right = access_view_right(view, volume, snapshot);
    access_view_free(view);
    if (right >= (c->session.read_only ? ACCESS_READ : ACCESS_WRITE))
        return true;
    log_warning("client %s: closed: the access rules do not let it %s %s any more",
                peer_text(&c->peer, peer), right == ACCESS_NONE ? "open" : "write",
                c->export_name);
    conn_die(c, "it may not have what it has any more");
    return false;
}

void lane_use_access(struct lane *lane, struct access *access)
{
    access_release(lane->access);
    lane->access = access_hold(access);
    list_for_each_safe (l, next, &lane->conns) {
        struct conn *c = container_of(l, struct conn, link);
        if (c->phase == CONN_SERVING)
            keeps_access(c);
    }
}

/* --- moving to the volume's lane ----------------------------------------------------------------- */

static void arrive(struct env_task *task)
{
    struct conn *c = container_of(task, struct conn, task);
    struct lane *lane = c->lane;
    list_add_tail(&lane->conns, &c->link);
    lane->n_conns++;
    c->phase = CONN_SERVING;
    c->since_ms = 0;
    attach(c);
    c->client.host = c->peer.host;
    c->client.is_busy = transmission_is_busy;
    c->writer.name = c->peer.address;
    export_join(&lane->exports, volume_branch(c->vol), volume_epoch(c->vol), volume_name(c->vol),
                lane->server->config->shared, &c->client);
    metrics_client_enter(&lane->metrics, &c->metrics, c->peer.address, c->client.export->name,
                         volume_epoch(c->vol) != 0, volume_size(c->vol));
    c->watcher.lost = on_lost;
    if (c->lost) {
        conn_die(c, "its volume was lost");
        return;
    }
    if (!keeps_access(c))
        return;
    if (lane->stopping || atomic_load(&lane->server->draining))
        c->stopping = true;
    conn_wake(c);
}

static void depart(void *arg)
{
    struct conn *c = arg;
    struct lane *from = c->lane;
    c->attached = false;
    lane_remove_conn(from, c);
    handshake_leaves(c);
    c->lane = c->opened_lane;
    c->vol = c->opened;
    c->opened = NULL;
    c->opened_lane = NULL;
    c->task.run = arrive;
    env_post(c->lane->env, &c->task);
    server_conn_gone(from);
    lane_check_stopped(from);
}

static enum context_kind context_kind(const char *name)
{
    unsigned kind = 0;
    while (kind < CONTEXTS_ALWAYS && strcmp(transmission_context_names[kind], name) != 0)
        kind++;
    return (enum context_kind)kind;
}

/* How a client came that enters, for the log: "" without TLS. */
static const char *show_tls(const struct tls_info *t, char out[TLS_SHOWN_BYTES])
{
    if (!t)
        return "";
    snprintf(out, TLS_SHOWN_BYTES, " over %s (%s)", t->version, t->cipher);
    return out;
}

static void enter_transmission(struct conn *c)
{
    struct handshake_result *r = &c->handshake->result;
    struct nbd_session *s = &c->session;
    char peer[PEER_TEXT_BYTES];
    s->structured = r->structured;
    s->extended = r->extended;
    s->read_only = r->flags & NBD_FLAG_READ_ONLY;
    s->n_contexts = r->n_contexts;
    for (uint32_t i = 0; i < r->n_contexts; i++) {
        c->context_ids[i] = r->contexts[i].id;
        c->contexts[i].kind = context_kind(r->contexts[i].name);
        CHECK(!c->contexts[i].since == (c->contexts[i].kind != CONTEXT_BITMAP));
    }
    s->context_ids = c->context_ids;
    char over[TLS_SHOWN_BYTES];
    counter_add(&c->lane->metrics.handshakes[METRICS_ENTERED], 1);
    snprintf(c->export_name, sizeof c->export_name, "%s", r->name);
    if (lane_may_log(c->lane, LINE_ENTERED))
        log_client_info(c->peer.address, r->name, "client %s entered export %s%s%s",
                        peer_text(&c->peer, peer), r->name, s->read_only ? " (read-only)" : "",
                        show_tls(wire_tls_info(c->wire), over));
    handshake_free(c->handshake);
    free(c->handshake);
    c->handshake = NULL;
    c->phase = CONN_MOVING;
    wire_detach(c->wire, depart);
}

/* --- handshake ------------------------------------------------------------------------------------ */

/* The client closed its side; what it had not read yet makes that an error. */
static bool has_gone(int error)
{
    return error == ECONNRESET || error == EPIPE;
}

/* Sends what there is; true when all was sent. */
static bool handshake_flush(struct conn *c)
{
    for (;;) {
        size_t len;
        const uint8_t *p = handshake_output(c->handshake, &len);
        if (!len)
            return true;
        union {
            const void *in;
            void *base;
        } out = {p};
        struct iovec iov = {out.base, len};
        ssize_t n = wire_send(c->wire, &iov, 1);
        if (n >= 0) {
            handshake_sent(c->handshake, (size_t)n);
        } else {
            /* Whoever is told to go need not hear it. */
            c->left = c->handshake->option == NBD_OPT_ABORT || has_gone(errno);
            if (errno != EAGAIN || c->handshake->want == HANDSHAKE_CLOSE)
                conn_die(c, "its handshake could not be answered");
            return false;
        }
    }
}

/* One call of wire_handshake(), on a worker. */
struct tls_step {
    struct env_work work;
    struct conn *conn;
    enum status st;
    struct err err;
};

static void peer_took_tls(struct conn *c)
{
    const struct tls_info *t = wire_tls_info(c->wire);
    _Static_assert(PEER_NAME_BYTES == TLS_NAME_BYTES, "both hold the same names");
    c->peer.tls = t->is_psk ? PEER_TLS_PSK : PEER_TLS_CERTIFICATE;
    memcpy(c->peer.tls_name, t->name, PEER_NAME_BYTES);
    memcpy(c->peer.tls_common_name, t->common_name, PEER_NAME_BYTES);
}

static void tls_next(struct server *server);

static void tls_stepped(struct env_work *work)
{
    struct tls_step *step = container_of(work, struct tls_step, work);
    struct conn *c = step->conn;
    struct server *server = c->lane->server;
    c->tls_step = NULL;
    server->n_tls_steps--;
    wire_lend(c->wire, false);
    if (c->phase == CONN_DEAD) {
        if (!c->attached)
            drop_wire(c);
    } else if (step->st == ST_OK) {
        peer_took_tls(c);
        handshake_tls_started(c->handshake);
        handshake_pump(c);
    } else if (step->st == ST_BUSY) {
        settle(c);
    } else {
        if (lane_may_log(c->lane, LINE_TLS_REFUSED))
            log_warning("client %s: refused at its TLS handshake: %s", c->peer.address,
                        step->err.text);
        conn_die(c, "no TLS session");
    }
    free(step);
    tls_next(server);
}

static void tls_work(struct env_work *work)
{
    struct tls_step *step = container_of(work, struct tls_step, work);
    step->st = wire_handshake(step->conn->wire, &step->err);
}

/* Begins the next steps that may run now. */
static void tls_next(struct server *server)
{
    struct list *l;
    while (server->n_tls_steps < TLS_STEPS_AT_ONCE && (l = list_pop(&server->tls_waiting))) {
        struct conn *c = container_of(l, struct conn, tls_link);
        struct tls_step *step = mem_zalloc(sizeof *step);
        *step = (struct tls_step){.work = {.work = tls_work, .done = tls_stepped}, .conn = c};
        c->tls_step = step;
        server->n_tls_steps++;
        wire_lend(c->wire, true);
        env_work(c->lane->env, &step->work);
    }
}

/* The TLS session that the client was promised has something to do. Its turn comes. */
static void handshake_tls(struct conn *c)
{
    struct server *server = c->lane->server;
    if (c->tls_step || !list_empty(&c->tls_link))
        return;
    if (!c->tls_begun) {
        CHECK(!c->stash_len); /* nothing that came in plain text is taken for more */
        c->tls_begun = true;
        wire_begin_tls(c->wire, server->tls);
    }
    wire_watch(c->wire, 0);
    list_add_tail(&server->tls_waiting, &c->tls_link);
    tls_next(server);
}

/* A client that is refused for want of TLS, or for what it sent before it, and may not show why. */
static void tell_about_tls(struct conn *c)
{
    const struct handshake *h = c->handshake;
    bool news = (h->lacked_tls || h->spoke_before_tls) && !c->tls_told;
    bool may = news && lane_may_log(c->lane, LINE_NO_TLS);
    if (may && h->lacked_tls)
        log_warning("client %s: refused: it came without TLS, which this server requires "
                    "(--tls require)",
                    c->peer.address);
    if (may && h->spoke_before_tls)
        log_warning("client %s: closed: it sent data behind STARTTLS without waiting for the "
                    "answer, or somebody between put it there",
                    c->peer.address);
    c->tls_told |= news;
}

static void handshake_pump(struct conn *c)
{
    struct handshake *h = c->handshake;
    while (c->phase == CONN_HANDSHAKE) {
        tell_about_tls(c);
        if (!handshake_flush(c))
            break;
        if (atomic_load(&c->lane->server->draining) && !c->lookup &&
            (h->want == HANDSHAKE_LIST || h->want == HANDSHAKE_EXPORT)) {
            c->left = true;
            handshake_shutdown(h);
        } else if (h->want == HANDSHAKE_BYTES) {
            if (!c->stash_len)
                break;
            size_t used = handshake_feed(h, c->stash, c->stash_len);
            stash_keep(c, c->stash + used, c->stash_len - used);
        } else if (h->want == HANDSHAKE_LIST) {
            if (!c->lookup)
                ask_list(c);
            if (!c->lookup->list_there)
                break;
            answer_list(c);
        } else if (h->want == HANDSHAKE_EXPORT) {
            if (!c->lookup)
                ask_export(c);
            break;
        } else if (h->want == HANDSHAKE_TLS) {
            handshake_tls(c);
            break;
        } else if (h->want == HANDSHAKE_READY) {
            enter_transmission(c);
        } else {
            c->left = h->option == NBD_OPT_ABORT;
            conn_die(c, "the handshake ended without an export");
        }
    }
    if (c->phase == CONN_HANDSHAKE)
        settle(c);
}

static void handshake_read(struct conn *c)
{
    struct lane *lane = c->lane;
    /* Fed only while nothing is stashed: see settle(). */
    struct iovec iov = {lane->receive, LANE_RECEIVE_BYTES};
    ssize_t n = wire_receive(c->wire, &iov, 1);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        c->left = n == 0 || has_gone(errno);
        conn_die(c, n ? strerror(errno) : "the client closed it during the handshake");
        return;
    }
    size_t used = handshake_feed(c->handshake, lane->receive, (size_t)n);
    stash_keep(c, lane->receive + used, (size_t)n - used);
}

/* --- transmission ---------------------------------------------------------------------------------- */

static bool may_read(const struct conn *c)
{
    return !c->at_end && !c->stopping && transmission_may_take(c);
}

/* Nothing more will be taken from this client: what is half received is undone, what is
 * under way is answered, then the connection ends. */
static void take_no_more(struct conn *c)
{
    c->at_end = true;
    transmission_withdraw(c);
    stash_keep(c, NULL, 0);
    leftover_drop(c);
}

/* The lane did not turn for so long that clients may have gone elsewhere meanwhile: a process
 * that was stopped, a machine that was paused. */
static bool stood_still(struct lane *lane)
{
    return mark_ms(lane) - lane->turned_ms >= lane->server->limits.pause_close_ms;
}

/* To be asked before anything is read, and before a turn is taken for one like others: it may have
 * begun with anything. */
static void notice_standstill(struct lane *lane)
{
    if (stood_still(lane)) {
        lane->turned_ms = lane->metrics.mark_ns / 1000000;
        leftover_stood_still(lane);
    }
}

/* One read from the socket and all it brings. False: the socket has no more, or the connection
 * takes no more. */
static bool serve_once(struct conn *c)
{
    struct lane *lane = c->lane;
    notice_standstill(lane);
    if (c->phase != CONN_SERVING)
        return false;
    struct iovec iov[RECEIVE_PIECES];
    size_t payload;
    size_t n_iov = (size_t)transmission_receive_iov(c, iov, RECEIVE_PIECES, &payload);
    uint32_t kept = c->stash_len;
    if (kept)
        memcpy(lane->receive, c->stash, kept);
    /* What follows the payload comes along, unless there may be more of it than pieces. */
    if (n_iov < RECEIVE_PIECES)
        iov[n_iov++] = (struct iovec){lane->receive + kept, LANE_RECEIVE_BYTES - kept};

    size_t asked = 0;
    for (size_t i = 0; i < n_iov; i++)
        asked += iov[i].iov_len;
    /* What waited for a grant, which came with the last submit, fills the buffer: resume() goes on
     * with it. */
    if (asked == 0)
        return false;
    bool was_ahead = leftover_has_bytes(c); /* then the socket may have more */
    ssize_t got = leftover_receive(c, iov, n_iov);
    if (got < 0) {
        c->drained = errno == EAGAIN;
        if (!c->drained)
            conn_die(c, strerror(errno));
        return false;
    }
    if (got == 0) {
        take_no_more(c);
        return false;
    }
    c->received += (uint64_t)got;
    c->drained = !was_ahead && (size_t)got < asked;
    /* In doubt from here on: then these requests wait instead of their replies. */
    shard_may_answer(lane->shard);
    size_t n = (size_t)got, direct = min_u64(n, payload);
    if (direct) {
        transmission_received(c, direct);
        n -= direct;
    }
    size_t len = kept + n;
    size_t used = transmission_take(c, lane->receive, len);
    if (c->phase != CONN_DEAD) {
        /* Before the buffer is used again: the log takes in the payloads that lie in it. */
        stash_keep(c, lane->receive + used, len - used);
    }
    shard_submit(lane->shard);
    return (was_ahead || (size_t)got == asked) && c->phase == CONN_SERVING && may_read(c);
}

/* Takes in what has come. Where other connections share the volume, all of it: what a client
 * sent before it gave this connection up must not be found behind what it sends on another one
 * (G8). Bounded, since a client may be as quick as we are. */
static void serve_events(struct conn *c)
{
    unsigned n = export_has_several(c->client.export) ? DRAIN_READS_MAX : 1;
    while (n-- > 0 && c->phase == CONN_SERVING && may_read(c) && serve_once(c))
        continue;
}

static void parse_stash(struct conn *c)
{
    struct lane *lane = c->lane;
    shard_may_answer(lane->shard);
    /* Payloads are used where they lie until the submit, so the old stash stays until then. */
    uint8_t *data = c->stash;
    size_t len = c->stash_len;
    c->stash = NULL;
    c->stash_len = 0;
    size_t used = transmission_take(c, data, len);
    shard_submit(lane->shard);
    if (c->phase != CONN_DEAD && used < len)
        stash_keep(c, data + used, len - used);
    free(data);
}

/* Goes on with what was put aside. */
static void resume(struct conn *c)
{
    bool was_paused = c->since_ms;
    transmission_go_on(c);
    if (c->phase == CONN_SERVING && c->stash_len && !c->at_end && !c->stopping)
        parse_stash(c);
    /* What came while it was paused is older than what comes on another connection next. (And no
     * event of the socket tells of what was read ahead.) */
    if (was_paused && c->phase == CONN_SERVING && may_read(c))
        serve_events(c);
    while (c->phase == CONN_SERVING && leftover_has_bytes(c) && may_read(c) && serve_once(c))
        continue;
}

/* Whether the client announced its end: all that it sent and nobody read yet ends with
 * NBD_CMD_DISC. Only what fits the receive buffer is looked at. */
static bool said_goodbye(struct conn *c)
{
    struct lane *lane = c->lane;
    size_t head_bytes = nbd_request_bytes(&c->session);
    if (leftover_has_bytes(c))
        return false;
    ssize_t n = wire_peek(c->wire, lane->receive, LANE_RECEIVE_BYTES);
    if (n < (ssize_t)head_bytes || n == LANE_RECEIVE_BYTES)
        return false;
    return nbd_request_is_disconnect(&c->session, lane->receive + (size_t)n - head_bytes);
}

/* The peer closed its side. One that said so first is owed all it asked for. Of one that just
 * went, what is unread is thrown away: it may have sent the same again on another connection,
 * where newer requests were answered already (G8). */
static void hang_up(struct conn *c)
{
    c->hung_up = true;
    if (may_read(c) && said_goodbye(c)) {
        while (c->phase == CONN_SERVING && may_read(c) && serve_once(c))
            continue;
    }
    if (c->phase == CONN_SERVING && !c->at_end)
        take_no_more(c);
}

/* Whether all that has come was read. */
static bool is_drained(const struct conn *c)
{
    uint8_t byte;
    return c->drained || wire_peek(c->wire, &byte, 1) < 0;
}

/* What to wait for next, or the end. */
static void settle(struct conn *c)
{
    if (c->tls_step || !list_empty(&c->tls_link))
        return; /* nothing is waited for before its turn */
    if (c->phase == CONN_HANDSHAKE) {
        size_t unsent;
        handshake_output(c->handshake, &unsent);
        enum handshake_want want = c->handshake->want;
        bool hears = (want == HANDSHAKE_BYTES || want == HANDSHAKE_TLS) && !unsent;
        wire_watch(c->wire,
                   (hears ? WIRE_READABLE : 0) | (unsent ? WIRE_WRITABLE : 0) | WIRE_HANG_UP);
        return;
    }
    if (c->phase != CONN_SERVING)
        return;
    if (c->stopping && !c->at_end)
        take_no_more(c);
    if (c->at_end && c->n_requests == 0 && !c->out_first) {
        conn_die(c, c->stopping ? "the server takes no requests any more" : "the client is done");
        return;
    }
    if ((c->leftover.since_ms || c->claim_refused) && !c->leftover.waits && !c->claim_waits &&
        !c->stash_len && !leftover_has_bytes(c) && is_drained(c))
        leftover_drained(c);
    bool reads = may_read(c);
    wire_watch(c->wire, (reads ? WIRE_READABLE : 0) | (c->blocked ? WIRE_WRITABLE : 0) |
                            (c->hung_up ? 0 : WIRE_HANG_UP));
    if (reads || c->at_end || c->stopping)
        c->since_ms = 0;
    else if (!c->since_ms)
        c->since_ms = lane_now_ms(c->lane);
}

static void on_wire(void *arg, int events)
{
    struct conn *c = arg;
    if (c->phase == CONN_DEAD || c->phase == CONN_MOVING)
        return;
    bool in_tls = c->phase == CONN_HANDSHAKE && c->handshake->want == HANDSHAKE_TLS;
    if (!events) {
        c->left = true;
        /* Its session says what the client may have disliked. */
        if (in_tls)
            handshake_tls(c);
        else
            conn_die(c, "the connection broke");
        return;
    }
    if (c->phase == CONN_HANDSHAKE) {
        if (events & WIRE_READABLE && !in_tls) {
            handshake_read(c);
        } else if (events & WIRE_HANG_UP && !(events & WIRE_WRITABLE) && !in_tls) {
            c->left = true;
            conn_die(c, "the client closed it during the handshake");
        }
        if (c->phase == CONN_HANDSHAKE)
            handshake_pump(c);
        return;
    }
    if (events & WIRE_WRITABLE) {
        c->blocked = false;
        if (list_empty(&c->flush_link))
            list_add_tail(&c->lane->flush, &c->flush_link);
    }
    if (events & WIRE_HANG_UP && !c->hung_up)
        hang_up(c);
    else if (events & WIRE_READABLE && may_read(c))
        serve_events(c);
    if (c->phase == CONN_SERVING)
        settle(c);
}

/* --- the turn of a lane --------------------------------------------------------------------------- */

static void lane_turn(struct reactor_hook *hook)
{
    struct lane *lane = container_of(hook, struct lane, hook);
    struct list *l;
    bool may;
    notice_standstill(lane);
    do {
        while ((l = list_pop(&lane->ready))) {
            struct conn *c = container_of(l, struct conn, ready_link);
            resume(c);
            settle(c);
        }
        shard_submit(lane->shard);
        /* All that these replies tell was looked up before this (G4). That the store kept a
         * request waiting too long may be told at any time. */
        may = list_empty(&lane->flush) || shard_may_answer(lane->shard);
        struct list kept = LIST_INIT(kept);
        while ((l = list_pop(&lane->flush))) {
            struct conn *c = container_of(l, struct conn, flush_link);
            if (!may && c->out_tells) {
                list_add_tail(&kept, &c->flush_link);
                continue;
            }
            if (c->blocked)
                continue; /* settled: WRITABLE comes */
            if (!out_flush(c)) {
                conn_die(c, "its replies could not be sent");
                continue;
            }
            if (!c->blocked &&
                (c->stash_len || leftover_has_bytes(c) || !list_empty(&c->stalled)) &&
                (transmission_may_take(c) || !list_empty(&c->stalled)))
                conn_wake(c);
            settle(c);
        }
        list_splice_tail(&lane->flush, &kept);
    } while (!list_empty(&lane->ready) || (may && !list_empty(&lane->flush)));
    lane->turned_ms = mark_ms(lane);
    /* A single request, answered at once: its client waited for that. */
    if (lane->n_taken)
        reactor_expects(lane->reactor, lane->n_taken == 1 && lane->n_requests == 0);
    lane->n_taken = 0;
}

/* Told to give its volumes back, and none is open any more. (On lane 0 there may be handshakes of
 * clients that are about to be refused.) */
static void check_drained(struct lane *lane)
{
    if (!lane->draining || lane->drained || !list_empty(&lane->exports) || lane->n_works)
        return;
    lane->drained = true;
    server_lane_drained(lane);
}

/* A client that stops in the middle of a payload keeps memory from others. So does one that
 * only trickles: while others wait, a piece has to be whole in a part of that time. Which of these
 * has run out; 0: none. */
static unsigned stalled_ms(struct conn *c, unsigned timeout_ms)
{
    bool inside = c->receive == RECEIVE_GRANTED || c->receive == RECEIVE_BUFFERS;
    if (!inside || c->received != c->received_seen)
        c->idle_ticks = 0;
    c->received_seen = c->received;
    if (!inside || c->grants != c->grants_seen || !shard_writers_wait(c->lane->shard))
        c->held_ticks = 0;
    c->grants_seen = c->grants;
    if (!inside)
        return 0;
    if (c->idle_ticks++ >= timeout_ms / TICK_MS)
        return timeout_ms;
    return c->held_ticks++ >= timeout_ms / TRICKLE_PART / TICK_MS ? timeout_ms / TRICKLE_PART : 0;
}

/* Whether a connection was paused for so long that its client may have sent the same again on
 * another one. The last connection of a volume stays: with nobody else to overtake it, what
 * it holds is not old; and through a snapshot nothing is changed. Waiting for the volume itself to
 * become ours does not count, and waiting for the writing role has its own end. */
static bool is_stale(const struct conn *c, uint64_t now_ms, unsigned pause_close_ms)
{
    if (c->peer.way != PEER_TCP || c->claim_waits || !c->since_ms ||
        now_ms - c->since_ms < pause_close_ms || volume_epoch(c->vol) || !volume_is_owned(c->vol))
        return false;
    return export_has_several(c->client.export);
}

static void lane_tick(struct env_timer *timer)
{
    struct lane *lane = container_of(timer, struct lane, tick);
    const struct server_config *limits = &lane->server->limits;
    uint64_t now = lane_now_ms(lane);
    bool give_up =
        lane->draining && (now >= lane->drain_until_ms || lane->server->drain_now);
    list_for_each_safe (l, next, &lane->conns) {
        struct conn *c = container_of(l, struct conn, link);
        if (c->phase == CONN_HANDSHAKE) {
            if (now - c->since_ms < limits->handshake_timeout_ms)
                continue;
            /* So ends a client, too, that does not like what it saw and keeps that to itself. */
            if (c->handshake->want == HANDSHAKE_TLS && lane_may_log(lane, LINE_TLS_REFUSED))
                log_warning("client %s: closed: its TLS handshake did not come to an end within "
                            "%u ms",
                            c->peer.address, limits->handshake_timeout_ms);
            conn_die(c, "the handshake took too long");
        } else if (c->phase == CONN_SERVING) {
            bool stale = is_stale(c, now, limits->pause_close_ms);
            if (stale && lane_may_log(lane, LINE_CLOSED))
                log_client_warning(c->peer.address, volume_name(c->vol),
                                   "client %s: closed after it had to wait for %u ms: its volume "
                                   "has another connection, where it may have sent the same again",
                                   c->peer.address, limits->pause_close_ms);
            unsigned stalled = stalled_ms(c, limits->receive_timeout_ms);
            if (stalled) {
                if (lane_may_log(lane, LINE_CLOSED))
                    log_client_warning(c->peer.address, volume_name(c->vol),
                                       "client %s: closed: the rest of a write did not come "
                                       "within %u ms",
                                       c->peer.address, stalled);
                conn_die(c, "half a write");
            }
            if (stale || give_up)
                conn_die(c, stale ? "paused for too long" : "the server stopped waiting for it");
        }
    }
    metrics_tick(&lane->metrics, env_now_ns(lane->env));
    for (unsigned i = 0; i < LANE_LINES; i++)
        log_limit_tick(&lane->lines[i], env_now_ns(lane->env));
    shard_tell_left_out(lane->shard);
    if (lane->no == 0 && lane->server->tick)
        lane->server->tick(lane->server);
    check_drained(lane);
    if (!lane->stopped)
        env_timer_start(lane->env, &lane->tick,
                        lane->draining && !lane->drained ? TICK_STOPPING_MS : TICK_MS);
}

void lane_init(struct lane *lane)
{
    lane->env = reactor_env(lane->reactor);
    metrics_lane_init(&lane->metrics, &lane->server->metrics, lane->env);
    lines_init(lane);
    lane->receive = mem_alloc(LANE_RECEIVE_BYTES);
    lane->reply_bytes_max =
        lane->server->config->cache_bytes / lane->server->n_lanes / REPLY_CACHE_PART;
    list_init(&lane->conns);
    list_init(&lane->ready);
    list_init(&lane->flush);
    list_init(&lane->exports);
    lane->access = access_hold(lane->server->config->access);
    lane->hook.run = lane_turn;
    reactor_hook_add(lane->reactor, &lane->hook);
    lane->turned_ms = lane_now_ms(lane);
    lane->tick.fire = lane_tick;
    env_timer_start(lane->env, &lane->tick, TICK_MS);
}

/* Ends the connections whose requests wait for their volume to become ours: without an answer the
 * client sends them again, to whoever serves it next, while "not permitted" would be final. */
static void die_waiting(struct lane *lane)
{
    list_for_each_safe (l, next, &lane->conns) {
        struct conn *c = container_of(l, struct conn, link);
        if (c->phase == CONN_SERVING && c->n_requests && !volume_is_owned(c->vol))
            conn_die(c, "the server is stopping and has not got its volume");
    }
}

void lane_drain(struct lane *lane)
{
    if (!lane->draining) {
        lane->draining = true;
        die_waiting(lane);
        shard_wait_no_more(lane->shard);
        lane->drain_until_ms = lane_now_ms(lane) + lane->server->limits.drain_ms;
    }
    list_for_each_safe (l, next, &lane->conns) {
        struct conn *c = container_of(l, struct conn, link);
        if (c->phase == CONN_SERVING) {
            c->stopping = true;
            conn_wake(c);
        }
    }
    env_timer_start(lane->env, &lane->tick, TICK_STOPPING_MS);
}

void lane_stop(struct lane *lane)
{
    lane_drain(lane);
    lane->stopping = true;
    lane_check_stopped(lane);
}

void lane_destroy(struct lane *lane)
{
    CHECK(list_empty(&lane->conns) && list_empty(&lane->exports) && lane->reply_bytes == 0 &&
          lane->ahead_bytes == 0);
    env_timer_stop(lane->env, &lane->tick);
    reactor_hook_remove(&lane->hook);
    metrics_lane_free(&lane->metrics);
    transmission_free_kept(lane);
    out_free_kept(lane);
    access_release(lane->access);
    free(lane->receive);
}

/* --- accepting -------------------------------------------------------------------------------------- */

/* Whether there is room for one more connection, or was made. */
static bool make_room(struct server *server)
{
    if (atomic_load(&server->n_conns) < server->limits.connections_max &&
        server->n_handshakes < server->limits.handshakes_max)
        return true;
    struct conn *c = handshake_to_end(server);
    if (c)
        conn_die(c, "its handshake gave way to another one");
    return c;
}

void conn_accept(struct lane *lane, const struct accepted *a)
{
    struct server *server = lane->server;
    if (server->stopping || !make_room(server)) {
        if (!server->stopping && lane_may_log(lane, LINE_TURNED_AWAY))
            log_client_warning(a->peer.address, NULL,
                               "client %s turned away: there are %u connections already",
                               a->peer.address, atomic_load(&server->n_conns));
        counter_add(&lane->metrics.turned_away, 1);
        wire_close(wire_new(a->fd));
        return;
    }
    struct conn *c = mem_zalloc(sizeof *c);
    counter_add(&lane->metrics.accepted, 1);
    c->id = ++server->conns_ever;
    c->begun_ns = env_realtime_ns(lane->env);
    c->lane = lane;
    c->wire = wire_new(a->fd);
    c->peer = a->peer;
    c->phase = CONN_HANDSHAKE;
    c->since_ms = lane_now_ms(lane);
    list_init(&c->ready_link);
    list_init(&c->flush_link);
    list_init(&c->tls_link);
    list_init(&c->stalled);
    list_add_tail(&lane->conns, &c->link);
    lane->n_conns++;
    handshake_enters(c);
    atomic_fetch_add(&server->n_conns, 1);
    attach(c);
    c->handshake = mem_alloc(sizeof *c->handshake);
    handshake_init(c->handshake, server->config->tls);
    handshake_pump(c);
}

void lane_stop_handshakes(struct lane *lane)
{
    list_for_each_safe (l, next, &lane->conns) {
        struct conn *c = container_of(l, struct conn, link);
        if (c->phase != CONN_HANDSHAKE)
            continue;
        handshake_shutdown(c->handshake);
        c->left = true;
        handshake_flush(c);
        conn_die(c, "the server is stopping");
    }
}
