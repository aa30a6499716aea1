/*
 * What a client left behind that is gone (G8).
 *
 * Requests that change a volume wait while it is at another server. A client that gives the
 * connection up meanwhile sends them again elsewhere, is answered, writes something newer, and is
 * answered; then the volume comes here. What still lies on the old connection must not be applied
 * now. The end of the connection tells, but over TCP it comes behind the data: as long as more is
 * unread than its window holds, nobody sees it, and what is lost on the way comes later.
 *
 * So changes wait unparsed, where there is nothing to take back. When the volume was taken, and others
 * had changed it while it was waited for, then before the first change of a connection is let in all
 * that its client has sent is read ahead, which opens the window, and the end gets a moment to
 * arrive. Where the client waited for longer than pause_close_ms, or there is too much to read, the
 * connection is closed: a client that lives sends it all again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "server/connection.h"

#define AHEAD_BYTES_MAX (1u << 20)
/* All connections of a reactor together (G6). */
#define AHEAD_BYTES_LANE_MAX (16u << 20)
#define AHEAD_BYTES_EACH (64u << 10)
/* Longer than what is lost on the way takes to come again. */
#define MOMENT_MS 1000u

/* While a client's moment lasts, the volume is not idle: it would go to and fro between servers that
 * both have clients who wait. */
static void keep(struct conn *c, bool on)
{
    if (c->leftover.keeps != on)
        volume_keep(c->vol, on);
    c->leftover.keeps = on;
}

static void go_on(struct env_timer *timer)
{
    struct conn *c = container_of(timer, struct conn, leftover.timer);
    keep(c, false);
    c->leftover.waits = false;
    conn_wake(c);
}

void leftover_end(struct conn *c)
{
    env_timer_stop(c->lane->env, &c->leftover.timer);
    keep(c, false);
    leftover_drop(c);
}

static void wait_a_moment(struct conn *c)
{
    keep(c, true);
    c->leftover.waits = c->leftover.in_doubt = true;
    if (!c->leftover.since_ms)
        c->leftover.since_ms = lane_now_ms(c->lane);
    c->leftover.timer.fire = go_on;
    env_timer_start(c->lane->env, &c->leftover.timer, MOMENT_MS);
}

void leftover_own_answered(struct conn *c, enum status st)
{
    struct leftover *l = &c->leftover;
    l->waits = false;
    l->refused = st;
    if (!l->lineage)
        l->lineage = volume_lineage(c->vol);
}

void leftover_drained(struct conn *c)
{
    c->leftover.since_ms = c->leftover.lineage = 0;
    c->leftover.refused = ST_OK;
    c->claim_refused = false;
}

enum ahead { AHEAD_ALL, AHEAD_NEWS, AHEAD_END, AHEAD_TOO_MUCH };

/* Reads all that has come. AHEAD_NEWS: there was something since the last look. */
static enum ahead look_ahead(struct conn *c)
{
    struct leftover *l = &c->leftover;
    size_t before = l->len;
    for (;;) {
        if (l->len - l->at >= AHEAD_BYTES_MAX || c->lane->ahead_bytes >= AHEAD_BYTES_LANE_MAX)
            return AHEAD_TOO_MUCH;
        size_t cap = l->cap;
        mem_grow(&l->bytes, &l->cap, l->len + AHEAD_BYTES_EACH, 1);
        c->lane->ahead_bytes += l->cap - cap;
        struct iovec iov = {l->bytes + l->len, AHEAD_BYTES_EACH};
        ssize_t n = wire_receive(c->wire, &iov, 1);
        if (n < 0 && errno == EAGAIN) {
            bool news = l->len > before;
            if (!leftover_has_bytes(c))
                leftover_drop(c);
            return news ? AHEAD_NEWS : AHEAD_ALL;
        }
        if (n <= 0)
            return AHEAD_END;
        l->len += (size_t)n;
    }
}

enum leftover_verdict leftover_check(struct conn *c, enum status *refused)
{
    struct leftover *l = &c->leftover;
    if (l->refused != ST_OK) {
        *refused = l->refused;
        return LEFTOVER_REFUSED;
    }
    if (!volume_is_owned(c->vol)) {
        if (!l->since_ms) {
            l->since_ms = lane_now_ms(c->lane);
            l->lineage_then = volume_lineage(c->vol);
        }
        l->waits = true;
        transmission_own(c);
        return LEFTOVER_WAIT;
    }
    uint64_t taken = volume_times_taken(c->vol);
    bool long_ago = l->since_ms && lane_now_ms(c->lane) - l->since_ms >=
                                       c->lane->server->limits.pause_close_ms;
    bool changed = volume_changed_before_taken(c->vol) ||
                   (l->lineage && l->lineage != volume_lineage(c->vol)) || l->in_doubt ||
                   (long_ago && l->lineage_then != volume_lineage(c->vol));
    /* (A Unix socket's end is always seen.) */
    if (c->peer.way == PEER_TCP && changed) {
        bool first = l->looked != taken;
        enum ahead ahead = look_ahead(c);
        l->looked = taken;
        if (ahead == AHEAD_TOO_MUCH || (first && long_ago)) {
            if (lane_may_log(c->lane, LINE_CLOSED))
                log_client_warning(c->peer.address, volume_name(c->vol),
                                   "client %s: closed: it waited while others changed its volume at "
                                   "another server, and can't be told from one that went there "
                                   "itself",
                                   c->peer.address);
            conn_die(c, "it waited for its volume too long");
            return LEFTOVER_WAIT;
        }
        if (first || ahead != AHEAD_ALL) {
            /* An end is seen by itself, and ends the connection. */
            wait_a_moment(c);
            return LEFTOVER_WAIT;
        }
    }
    l->checked = taken;
    l->in_doubt = false;
    leftover_drained(c);
    return LEFTOVER_NONE;
}

void leftover_stood_still(struct lane *lane)
{
    list_for_each_safe (l, next, &lane->conns) {
        struct conn *c = container_of(l, struct conn, link);
        if (c->phase != CONN_SERVING || c->peer.way != PEER_TCP || !wire_has_unread(c->wire) ||
            (volume_is_owned(c->vol) && !export_has_several(c->client.export)))
            continue;
        if (lane_may_log(lane, LINE_CLOSED))
            log_client_warning(c->peer.address, volume_name(c->vol),
                               "client %s: closed: this server stood still, and the client may "
                               "have sent elsewhere what lies here",
                               c->peer.address);
        conn_die(c, "the server stood still");
    }
}

ssize_t leftover_receive(struct conn *c, struct iovec *iov, size_t n)
{
    struct leftover *l = &c->leftover;
    size_t got = 0;
    if (!leftover_has_bytes(c))
        return wire_receive(c->wire, iov, n);
    for (size_t i = 0; i < n && l->at < l->len; i++) {
        size_t part = min_u64(iov[i].iov_len, l->len - l->at);
        memcpy(iov[i].iov_base, l->bytes + l->at, part);
        l->at += part;
        got += part;
    }
    if (l->at == l->len)
        leftover_drop(c);
    return (ssize_t)got;
}

void leftover_drop(struct conn *c)
{
    struct leftover *l = &c->leftover;
    c->lane->ahead_bytes -= l->cap;
    free(l->bytes);
    l->bytes = NULL;
    l->len = l->at = l->cap = 0;
}
