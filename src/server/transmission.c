/*
 * The transmission phase: requests to the volume, and its answers to replies.
 *
 * The way of a cached read is straight through transmission_take(): parsed where it was
 * received, looked up at once, its header written and its blocks referred to in the
 * connection's output. Everything slower leaves a struct request behind, which its answer
 * finds again.
 *
 * A write is received whole before it takes effect (G3). A short one is used where it was
 * received; for a longer one the volume gives the buffers that will be its cache, and the
 * connection reads the socket straight into these.
 *
 * Volume callbacks may come in the middle of another connection's turn, so they only queue
 * replies and wake connections; they never parse.
 */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "server/connection.h"

/* How often is looked whether the writing role is free. */
#define CLAIM_AGAIN_MS 20u

/* --- requests and pieces -------------------------------------------------------------- */

static struct request *request_new(struct conn *c, const struct nbd_request *r)
{
    struct lane *lane = c->lane;
    struct request *q = lane->free_requests;
    if (q) {
        lane->free_requests = q->next_free;
        lane->n_free_requests--;
    } else {
        q = mem_alloc(sizeof *q);
    }
    q->conn = c;
    q->to = (struct nbd_reply_to){.cookie = r->cookie,
                                  .offset = r->offset,
                                  .structured = c->session.structured,
                                  .extended = c->session.extended};
    q->command = r->command;
    q->flags = r->flags;
    q->wanted = 0;
    q->n_pieces = 0;
    q->more = q->head_sent = false;
    q->answered = q->failed = false;
    q->begun_ns = lane->metrics.mark_ns;
    list_init(&q->stalled);
    q->next = r->offset;
    q->end = r->offset + r->length;
    q->st = ST_OK;
    c->n_requests++;
    c->lane->n_requests++;
    return q;
}

static void request_free(struct request *q)
{
    struct conn *c = q->conn;
    struct lane *lane = c->lane;
    CHECK(q->n_pieces == 0 && c->n_requests > 0);
    if (q->answered)
        metrics_answered(&lane->metrics, &c->metrics, q->command, q->begun_ns, q->to.offset,
                         q->end - q->to.offset, q->failed);
    list_remove(&q->stalled);
    if (c->alone == q)
        c->alone = NULL;
    c->n_requests--;
    lane->n_requests--;
    if (lane->n_free_requests < REQUESTS_KEPT_MAX) {
        q->next_free = lane->free_requests;
        lane->free_requests = q;
        lane->n_free_requests++;
    } else {
        free(q);
    }
}

/* A request was answered, or its connection is gone: the connection may go on or go. */
static void request_over(struct request *q)
{
    struct conn *c = q->conn;
    request_free(q);
    if (c->phase == CONN_DEAD)
        conn_try_free(c);
    else
        conn_wake(c);
}

void transmission_free_kept(struct lane *lane)
{
    while (lane->free_requests) {
        struct request *q = lane->free_requests;
        lane->free_requests = q->next_free;
        free(q);
    }
    lane->n_free_requests = 0;
}

static void piece_init(struct piece *p, struct request *q, uint64_t offset, uint64_t length,
                       void (*done)(struct vol_io *io))
{
    memset(&p->io, 0, sizeof p->io);
    p->request = q;
    p->heap = p == &q->piece ? NULL : p;
    p->io.done = done;
    p->io.offset = offset;
    p->io.length = length;
    if (q->flags & NBD_CMD_FLAG_FUA)
        p->io.flags = VOL_FUA;
    q->n_pieces++;
}

static void piece_give_segs(struct piece *p)
{
    uint32_t n = VOL_SEGS(p->io.length, volume_block_size(p->request->conn->vol));
    p->io.segs = n <= SEGS_INLINE ? p->inline_segs : mem_alloc(n * sizeof *p->io.segs);
    p->io.segs_cap = n;
}

static void piece_over(struct piece *p)
{
    struct request *q = p->request;
    if (p->io.segs != p->inline_segs)
        free(p->io.segs);
    p->io.segs = NULL;
    free(p->io.extents);
    p->io.extents = NULL;
    q->n_pieces--;
    free(p->heap);
}

/* --- replies without data ----------------------------------------------------------------- */

/* `why`: a sentence that goes along where the reply has room for one; may be empty. */
static void reply_error_to(struct conn *c, const struct nbd_reply_to *to, uint32_t error,
                           const char *why)
{
    bool tells = c->out_tells || error != NBD_EIO;
    size_t len = to->structured || to->extended ? strnlen(why, NBD_STRING_BYTES_MAX) : 0;
    out_head_done(c, nbd_put_error(out_head(c), to, error, (uint16_t)len));
    if (len) {
        char *text = mem_alloc(len);
        memcpy(text, why, len);
        out_data(c, text, len, out_owner_malloc(text));
    }
    c->out_tells = tells;
}

/* The same for what the volume answered. */
static void reply_failure_to(struct conn *c, const struct nbd_reply_to *to, enum status st)
{
    reply_error_to(c, to, nbd_error_of(st), st == ST_PERM ? volume_refusal(c->vol) : "");
}

static void set_late_why(struct conn *c, const char *why)
{
    free(c->late_why);
    c->late_why = *why ? mem_strdup(why) : NULL;
}

/* A request that no struct request was made for is answered, or as good as. */
static void count_now(struct conn *c, const struct nbd_request *r, bool failed)
{
    struct metrics_lane *ml = &c->lane->metrics;
    metrics_answered(ml, &c->metrics, r->command, ml->mark_ns, r->offset, r->length, failed);
}

/* Refuses a request that no struct request was made for; `payload` bytes of it are still to
 * come, `why` may be empty. The reply waits for them: clients (libnbd) do not expect an answer to a
 * request that they have not sent whole. */
static void refuse(struct conn *c, const struct nbd_request *r, uint32_t error, uint64_t payload,
                   const char *why)
{
    struct nbd_reply_to to = {.cookie = r->cookie,
                              .offset = r->offset,
                              .structured = c->session.structured,
                              .extended = c->session.extended};
    count_now(c, r, true);
    if (!payload) {
        reply_error_to(c, &to, error, why);
        return;
    }
    c->discard = payload;
    c->late_error = error;
    set_late_why(c, why);
    c->late_to = to;
}

static void succeed(struct conn *c, const struct nbd_request *r)
{
    struct nbd_reply_to to = {.cookie = r->cookie,
                              .offset = r->offset,
                              .structured = c->session.structured,
                              .extended = c->session.extended};
    out_head_done(c, nbd_put_success(out_head(c), &to, r->command == NBD_CMD_READ));
    count_now(c, r, false);
}

/* Whether what became of a request is told. */
static bool tells(const struct conn *c)
{
    return c->phase == CONN_SERVING && !c->withdraws;
}

/* The request's last piece was answered. */
static void reply_outcome(struct request *q)
{
    struct conn *c = q->conn;
    if (tells(c)) {
        q->answered = true;
        q->failed = q->st != ST_OK;
        if (c->client.export->mixed)
            export_answered(&c->client, q->st == ST_OK, lane_now_ms(c->lane));
        if (q->st == ST_OK)
            out_head_done(c, nbd_put_success(out_head(c), &q->to, false));
        else
            reply_failure_to(c, &q->to, q->st);
    }
    request_over(q);
}

/* --- reads -------------------------------------------------------------------------------- */

static bool is_all_zeros(const struct vol_io *io)
{
    for (uint32_t i = 0; i < io->n_segs; i++) {
        if (io->segs[i].buf)
            return false;
    }
    return true;
}

/* Puts the blocks of an answered piece into the output, which takes the references over. */
static void send_segs(struct conn *c, struct vol_io *io)
{
    for (uint32_t i = 0; i < io->n_segs; i++) {
        const struct vol_seg *s = &io->segs[i];
        if (s->buf)
            out_data(c, s->buf->data + s->offset, s->len, (uintptr_t)s->buf);
        else
            out_zeros(c, s->len);
    }
    io->n_segs = 0;
}

static void reply_piece(struct request *q, struct vol_io *io)
{
    struct conn *c = q->conn;
    bool chunks = q->to.structured || q->to.extended;
    uint32_t len = (uint32_t)io->length;
    if (!chunks) {
        if (!q->head_sent)
            out_head_done(c, nbd_put_simple(out_head(c), q->to.cookie, NBD_SUCCESS));
    } else {
        /* All of the chunk is there already, so it can't fail and may be the last. */
        uint16_t flags = io->offset + len == q->end ? NBD_REPLY_FLAG_DONE : 0;
        if (is_all_zeros(io)) {
            out_head_done(c, nbd_put_hole(out_head(c), &q->to, flags, io->offset, len));
            io->n_segs = 0;
        } else {
            out_head_done(c, nbd_put_data(out_head(c), &q->to, flags, io->offset, len));
        }
    }
    q->head_sent = true;
    send_segs(c, io);
}

/* A piece failed. False: the connection had to be closed. */
static bool reply_read_error(struct request *q, enum status st)
{
    struct conn *c = q->conn;
    uint32_t error = nbd_error_of(st);
    if (!q->head_sent) {
        reply_failure_to(c, &q->to, st);
        return true;
    }
    if (q->to.structured || q->to.extended) {
        out_head_done(c, nbd_put_error_offset(out_head(c), &q->to, error, q->next));
        return true;
    }
    conn_die(c, "a read failed after part of its data was sent, which a simple reply cannot tell");
    return false;
}

/* Takes an answered piece into account; true when the request is over. */
static bool read_answered(struct request *q)
{
    struct conn *c = q->conn;
    struct piece *p = &q->piece;
    enum status st = p->io.st;
    bool over = true;
    if (!tells(c)) {
        volume_release_segs(&p->io);
    } else if (st != ST_OK) {
        q->answered = q->failed = reply_read_error(q, st);
    } else {
        reply_piece(q, &p->io);
        q->next += p->io.length;
        over = q->answered = q->next == q->end;
    }
    piece_over(p);
    return over;
}

static void read_done(struct vol_io *io);

/* Bytes of replies under way: a read or block status that the volume has not answered. */
static void reading(struct conn *c, uint64_t begun, uint64_t ended)
{
    c->reading_bytes += begun - ended;
    c->lane->reply_bytes += begun - ended;
}

/* Whether a long read has to wait until more of it was sent. */
static bool is_far_ahead(const struct conn *c)
{
    return c->out_bytes >=
           (lane_is_short(c->lane) ? CONN_REPLY_BYTES_SHORT : CONN_REPLY_BYTES_MAX);
}

/* The longest piece of a read; less than VOLUME_READ_BYTES_MAX while memory is short. */
static uint64_t read_piece_max(const struct conn *c)
{
    return lane_is_short(c->lane) ? CONN_REPLY_BYTES_SHORT : VOLUME_READ_BYTES_MAX;
}

/* Reads on from q->next; true when the request is over, false when an answer will come. */
static bool read_on(struct request *q)
{
    struct conn *c = q->conn;
    struct piece *p = &q->piece;
    for (;;) {
        if (q->head_sent && is_far_ahead(c)) {
            list_add_tail(&c->stalled, &q->stalled);
            return false;
        }
        /* With simple replies only a read that goes alone may come in several pieces, and
         * without fragments none. */
        bool whole = !q->to.structured && !q->to.extended ? c->alone != q
                                                          : q->flags & NBD_CMD_FLAG_DF;
        uint64_t len = min_u64(q->end - q->next, whole ? VOLUME_READ_BYTES_MAX : read_piece_max(c));
        piece_init(p, q, q->next, len, read_done);
        piece_give_segs(p);
        if (!volume_read(c->vol, &p->io)) {
            reading(c, len, 0);
            return false;
        }
        if (read_answered(q))
            return true;
    }
}

static void read_done(struct vol_io *io)
{
    struct request *q = container_of(io, struct piece, io)->request;
    reading(q->conn, 0, io->length);
    if (read_answered(q) || read_on(q))
        request_over(q);
}

static void take_read(struct conn *c, const struct nbd_request *r)
{
    bool chunks = c->session.structured || c->session.extended;
    bool is_long = r->length > read_piece_max(c);
    if (is_long && (r->flags & NBD_CMD_FLAG_DF)) {
        refuse(c, r, NBD_EOVERFLOW, 0, "");
        return;
    }
    struct request *q = request_new(c, r);
    if (is_long && !chunks) {
        c->alone = q;
        if (c->n_requests > 1) {
            list_add_tail(&c->stalled, &q->stalled);
            return;
        }
    }
    if (read_on(q))
        request_free(q);
}

void transmission_go_on(struct conn *c)
{
    struct list now = LIST_INIT(now);
    list_splice_tail(&now, &c->stalled);
    for (struct list *l; (l = list_pop(&now));) {
        struct request *q = container_of(l, struct request, stalled);
        if ((q->head_sent && is_far_ahead(c)) || (q == c->alone && c->n_requests > 1))
            list_add_tail(&c->stalled, &q->stalled);
        else if (read_on(q))
            request_free(q);
    }
}

/* --- block status ---------------------------------------------------------------------------- */

const char *const transmission_context_names[CONTEXTS_ALWAYS] = {
    [CONTEXT_ALLOCATION] = NBD_CONTEXT_ALLOCATION,
    [CONTEXT_DEPTH] = NBD_CONTEXT_DEPTH,
};

static enum vol_status_of status_of(enum context_kind kind)
{
    switch (kind) {
    case CONTEXT_DEPTH:
        return VOL_STATUS_DEPTH;
    case CONTEXT_BITMAP:
        return VOL_STATUS_CHANGED;
    case CONTEXT_ALLOCATION:
        break;
    }
    return VOL_STATUS_ALLOCATION;
}

/* An extent's flags as a context shows them: those of base:allocation and the depth are the
 * volume's. */
static uint32_t context_flags(enum context_kind kind, uint32_t flags)
{
    if (kind != CONTEXT_BITMAP)
        return flags;
    return flags & VOL_EXTENT_CHANGED ? NBD_STATE_DIRTY : 0;
}

/* Writes the descriptors of a context; neighbours that look the same to it become one. */
static uint32_t put_extents(uint8_t *out, bool extended, enum context_kind kind,
                            const struct vol_io *io)
{
    uint32_t n = 0;
    size_t size = nbd_extent_bytes(extended);
    for (uint32_t i = 0; i < io->n_extents;) {
        uint32_t flags = context_flags(kind, io->extents[i].flags);
        uint64_t length = 0;
        while (i < io->n_extents && context_flags(kind, io->extents[i].flags) == flags)
            length += io->extents[i++].length;
        nbd_put_extent(out + n++ * size, extended, length, flags);
    }
    return n;
}

static void reply_status(struct request *q, uint32_t at)
{
    struct conn *c = q->conn;
    const struct vol_io *io = &q->piece.io;
    size_t size = nbd_extent_bytes(q->to.extended);
    CHECK(io->n_extents > 0);
    uint8_t *out = mem_alloc(io->n_extents * size);
    uint32_t n = put_extents(out, q->to.extended, c->contexts[at].kind, io);
    uint16_t flags = 0;
    if (!q->wanted)
        flags = NBD_REPLY_FLAG_DONE;
    out_head_done(c, nbd_put_status(out_head(c), &q->to, flags, c->context_ids[at], n));
    out_data(c, out, n * size, out_owner_malloc(out));
}

static void ask_status(struct request *q);

static void status_done(struct vol_io *io)
{
    struct piece *p = container_of(io, struct piece, io);
    struct request *q = p->request;
    struct conn *c = q->conn;
    uint32_t at = (uint32_t)__builtin_ctz(q->wanted);
    q->wanted &= q->wanted - 1;
    reading(c, 0, io->extents_cap * sizeof *io->extents);
    if (!tells(c))
        q->wanted = 0;
    else if (io->st == ST_OK)
        reply_status(q, at);
    else if (io->st == ST_NOTFOUND)
        reply_error_to(c, &q->to, NBD_EINVAL,
                       "the snapshot that this dirty bitmap counts from was removed");
    else
        reply_failure_to(c, &q->to, io->st);
    bool more = q->wanted && io->st == ST_OK;
    q->answered = !more && tells(c);
    q->failed = io->st != ST_OK;
    piece_over(p);
    if (more)
        ask_status(q);
    else
        request_over(q);
}

/* Asks the volume about the first context that is still wanted; the next one follows when it was
 * answered, so that a request holds one list of extents at a time. */
static void ask_status(struct request *q)
{
    struct conn *c = q->conn;
    struct piece *p = &q->piece;
    unsigned at = (unsigned)__builtin_ctz(q->wanted);
    bool one = q->flags & NBD_CMD_FLAG_REQ_ONE;
    piece_init(p, q, q->next, q->end - q->next, status_done);
    p->io.flags = one ? VOL_REQ_ONE : 0;
    p->io.status_of = status_of(c->contexts[at].kind);
    p->io.since = c->contexts[at].since;
    p->io.extents_cap = one ? 1 : CONN_STATUS_EXTENTS_MAX;
    p->io.extents = mem_alloc(p->io.extents_cap * sizeof *p->io.extents);
    reading(c, p->io.extents_cap * sizeof *p->io.extents, 0);
    volume_status(c->vol, &p->io);
}

static void take_status(struct conn *c, const struct nbd_request *r, uint32_t wanted)
{
    struct request *q = request_new(c, r);
    q->wanted = wanted;
    ask_status(q);
}

/* --- writes ------------------------------------------------------------------------------------ */

static bool is_change(const struct nbd_request *r)
{
    return r->command == NBD_CMD_WRITE || r->command == NBD_CMD_TRIM ||
           r->command == NBD_CMD_WRITE_ZEROES;
}

bool transmission_is_busy(struct export_client *client)
{
    const struct conn *c = container_of(client, struct conn, client);
    return c->n_requests || c->receive != RECEIVE_NOTHING || c->discard || c->stash_len ||
           c->out_first;
}

static bool has_waited_for_role(const struct conn *c)
{
    const struct server_config *limits = &c->lane->server->limits;
    /* (What was paused for longer may have been sent again elsewhere, see connection.h.) */
    return lane_now_ms(c->lane) - c->claim_since_ms >=
           min_u64(limits->owner_wait_ms, limits->pause_close_ms);
}

static void claim_again(struct env_timer *timer)
{
    struct conn *c = container_of(timer, struct conn, claim_timer);
    enum export_claim claim = export_claim(&c->client, lane_now_ms(c->lane));
    c->claim_over = claim == CLAIM_WAIT && has_waited_for_role(c);
    if (claim == CLAIM_WAIT && !c->claim_over) {
        env_timer_start(c->lane->env, timer, CLAIM_AGAIN_MS);
        return;
    }
    c->claim_waits = false;
    conn_wake(c);
}

/* Whether a change is taken now. CLAIM_WAIT: the connection waits. */
static enum export_claim claim_role(struct conn *c)
{
    if (c->client.writes)
        return CLAIM_YES;
    if (c->claim_refused)
        return CLAIM_NO;
    bool over = c->claim_over;
    enum export_claim claim = export_claim(&c->client, lane_now_ms(c->lane));
    c->claim_over = false;
    if (claim == CLAIM_WAIT && !over) {
        c->claim_since_ms = lane_now_ms(c->lane);
        over = has_waited_for_role(c);
    }
    if (claim == CLAIM_WAIT && !over) {
        c->claim_waits = true;
        c->claim_timer.fire = claim_again;
        env_timer_start(c->lane->env, &c->claim_timer, CLAIM_AGAIN_MS);
        return CLAIM_WAIT;
    }
    if (claim != CLAIM_YES && !c->claim_told) {
        c->claim_told = true;
        if (lane_may_log(c->lane, LINE_NO_ROLE))
            log_client_warning(c->peer.address, volume_name(c->vol),
                               "client %s may not write volume %s: %s", c->peer.address,
                               volume_name(c->vol), c->client.refusal);
    }
    c->claim_refused = claim != CLAIM_YES;
    return claim == CLAIM_YES ? CLAIM_YES : CLAIM_NO;
}

/* Clients that coordinate their writes know what others write. */
static struct vol_writer *writer_of(struct conn *c)
{
    return c->client.export->shared ? NULL : &c->writer;
}

static void owned(struct vol_io *io)
{
    struct piece *p = container_of(io, struct piece, io);
    struct request *q = p->request;
    struct conn *c = q->conn;
    enum status st = io->st;
    piece_over(p);
    leftover_own_answered(c, st);
    request_over(q);
}

void transmission_own(struct conn *c)
{
    const struct nbd_request none = {0};
    struct request *q = request_new(c, &none);
    piece_init(&q->piece, q, 0, 0, owned);
    q->piece.io.writer = writer_of(c);
    volume_own(c->vol, &q->piece.io);
}

/* Whether a change may be taken as far as its connection and volume are concerned. */
static enum leftover_verdict may_change(struct conn *c, const struct nbd_request *r,
                                        enum status *refused)
{
    return !is_change(r) || leftover_is_checked(c) ? LEFTOVER_NONE : leftover_check(c, refused);
}

/* Clients of several hosts share the volume, and their requests matter to the role. */
static void tell_export(struct conn *c, const struct nbd_request *r)
{
    bool fua = r->flags & NBD_CMD_FLAG_FUA;
    enum export_request kind = r->command == NBD_CMD_FLUSH ? EXPORT_FLUSH
                               : !is_change(r)             ? EXPORT_OTHER
                               : fua                       ? EXPORT_CHANGE_FUA
                                                           : EXPORT_CHANGE;
    export_took(&c->client, kind, c->n_requests == 0);
}

static void change_done(struct vol_io *io)
{
    struct piece *p = container_of(io, struct piece, io);
    struct request *q = p->request;
    if (q->st == ST_OK)
        q->st = io->st;
    piece_over(p);
    if (q->n_pieces == 0 && !q->more)
        reply_outcome(q);
}

/* The volume has decided on a piece: its payload may come, or is to be thrown away. */
static void write_begun(struct conn *c, struct piece *p)
{
    struct request *q = p->request;
    if (p->io.st == ST_OK) {
        c->receive = RECEIVE_GRANTED;
        c->receiving = p;
        c->grants++;
        return;
    }
    c->receive = RECEIVE_NOTHING;
    c->receiving = NULL;
    /* The rest of the request is not tried: consecutive pieces are a prefix (G2). */
    c->discard += p->io.length + (q->end - q->next);
    c->late_request = q;
    q->more = true;
    if (q->st == ST_OK)
        q->st = p->io.st;
    piece_over(p);
}

/* All of a refused payload was thrown away: now its request can be answered. */
static void discarded(struct conn *c)
{
    if (c->late_error) {
        reply_error_to(c, &c->late_to, c->late_error, c->late_why ? c->late_why : "");
        c->late_error = 0;
        set_late_why(c, "");
    }
    struct request *q = c->late_request;
    c->late_request = NULL;
    if (q) {
        q->more = false;
        if (q->n_pieces == 0)
            reply_outcome(q);
    }
}

static void write_granted(struct vol_io *io)
{
    struct piece *p = container_of(io, struct piece, io);
    struct conn *c = p->request->conn;
    write_begun(c, p);
    conn_wake(c);
}

static void write_next_piece(struct request *q)
{
    struct conn *c = q->conn;
    uint64_t len = min_u64(q->end - q->next, VOLUME_PIECE_BYTES);
    struct piece *p = q->piece.request ? mem_zalloc(sizeof *p) : &q->piece;
    piece_init(p, q, q->next, len, change_done);
    p->io.writer = writer_of(c);
    p->io.granted = write_granted;
    q->next += len;
    q->more = q->next < q->end;
    if (volume_write_begin(c->vol, &p->io)) {
        write_begun(c, p);
    } else {
        c->receive = RECEIVE_WAITS;
        c->receiving = p;
    }
}

static void write_received(struct conn *c, const void *data)
{
    struct piece *p = c->receiving;
    struct request *q = p->request;
    c->receive = RECEIVE_NOTHING;
    c->receiving = NULL;
    bool more = q->more;
    volume_write_commit(c->vol, &p->io, data);
    if (more && c->phase == CONN_SERVING)
        write_next_piece(q);
}

int transmission_receive_iov(struct conn *c, struct iovec *iov, int max, size_t *bytes)
{
    *bytes = 0;
    if (c->receive != RECEIVE_BUFFERS)
        return 0;
    const struct vol_io *io = &c->receiving->io;
    int n = 0;
    uint32_t at = c->receive_at;
    for (uint32_t i = c->receive_seg; i < io->n_segs && n < max; i++) {
        const struct vol_seg *s = &io->segs[i];
        iov[n++] = (struct iovec){s->buf->data + s->offset + at, s->len - at};
        *bytes += s->len - at;
        at = 0;
    }
    return n;
}

void transmission_received(struct conn *c, size_t n)
{
    const struct vol_io *io = &c->receiving->io;
    while (n) {
        const struct vol_seg *s = &io->segs[c->receive_seg];
        uint32_t k = (uint32_t)min_u64(n, s->len - c->receive_at);
        n -= k;
        c->receive_at += k;
        if (c->receive_at == s->len) {
            c->receive_seg++;
            c->receive_at = 0;
        }
    }
    if (c->receive_seg == io->n_segs)
        write_received(c, NULL);
}

/* Uses payload that lies in memory; returns the bytes used. */
static size_t receive_payload(struct conn *c, const uint8_t *data, size_t len)
{
    struct vol_io *io = &c->receiving->io;
    if (c->receive == RECEIVE_GRANTED) {
        if (len >= io->length) {
            size_t used = io->length;
            write_received(c, data);
            return used;
        }
        piece_give_segs(c->receiving);
        volume_write_buffers(c->vol, io);
        c->receive = RECEIVE_BUFFERS;
        c->receive_seg = c->receive_at = 0;
    }
    size_t used = 0;
    while (used < len && c->receive == RECEIVE_BUFFERS) {
        const struct vol_seg *s = &io->segs[c->receive_seg];
        size_t n = min_u64(len - used, s->len - c->receive_at);
        memcpy(s->buf->data + s->offset + c->receive_at, data + used, n);
        used += n;
        transmission_received(c, n);
    }
    return used;
}

/* Not answered: the client has not sent all of it. Earlier pieces may be under way. */
static void give_up_unsent(struct request *q)
{
    q->more = false;
    if (q->n_pieces == 0)
        request_free(q);
}

void transmission_abort_receive(struct conn *c)
{
    struct request *refused = c->late_request;
    c->late_request = NULL;
    c->late_error = 0;
    set_late_why(c, "");
    c->discard = 0;
    if (refused)
        give_up_unsent(refused);
    if (c->receive == RECEIVE_NOTHING)
        return;
    struct piece *p = c->receiving;
    struct request *q = p->request;
    c->receive = RECEIVE_NOTHING;
    c->receiving = NULL;
    volume_write_abort(c->vol, &p->io);
    piece_over(p);
    give_up_unsent(q);
}

static bool is_of(struct vol_io *io, const void *arg)
{
    if (io->done != change_done && io->done != read_done && io->done != status_done &&
        io->done != owned)
        return false;
    return container_of(io, struct piece, io)->request->conn == arg;
}

void transmission_withdraw(struct conn *c)
{
    transmission_abort_receive(c);
    c->withdraws = true;
    volume_withdraw(c->vol, is_of, c);
    c->withdraws = false;
}

void transmission_abandon(struct conn *c)
{
    transmission_withdraw(c);
    for (struct list *l; (l = list_pop(&c->stalled));)
        request_free(container_of(l, struct request, stalled));
}

/* --- all others ----------------------------------------------------------------------------------- */

static void take_change(struct conn *c, const struct nbd_request *r)
{
    if (r->length == 0) {
        succeed(c, r);
        return;
    }
    struct request *q = request_new(c, r);
    if (r->command == NBD_CMD_WRITE) {
        q->piece.request = NULL; /* the first piece is the request's own */
        write_next_piece(q);
        return;
    }
    struct piece *p = &q->piece;
    piece_init(p, q, r->offset, r->length, change_done);
    p->io.writer = writer_of(c);
    if (r->command == NBD_CMD_TRIM) {
        volume_trim(c->vol, &p->io);
        return;
    }
    /* FAST_ZERO needs nothing: zeroing only marks blocks, which is always faster than a write. */
    if (r->flags & NBD_CMD_FLAG_NO_HOLE)
        p->io.flags |= VOL_NO_HOLE;
    volume_zero(c->vol, &p->io);
}

static void take_flush(struct conn *c, const struct nbd_request *r)
{
    struct request *q = request_new(c, r);
    piece_init(&q->piece, q, 0, 0, change_done);
    volume_flush(c->vol, &q->piece.io);
}

static void take_cache(struct conn *c, const struct nbd_request *r)
{
    struct request *q = request_new(c, r);
    piece_init(&q->piece, q, r->offset, r->length, change_done);
    volume_prefetch(c->vol, &q->piece.io);
}

static void carry_out(struct conn *c, const struct nbd_request *r)
{
    c->lane->n_taken++;
    switch (r->command) {
    case NBD_CMD_READ:
        if (r->length)
            take_read(c, r);
        else
            succeed(c, r);
        break;
    case NBD_CMD_WRITE:
    case NBD_CMD_TRIM:
    case NBD_CMD_WRITE_ZEROES:
        take_change(c, r);
        break;
    case NBD_CMD_FLUSH:
        take_flush(c, r);
        break;
    case NBD_CMD_CACHE:
        if (r->length)
            take_cache(c, r);
        else
            succeed(c, r);
        break;
    case NBD_CMD_BLOCK_STATUS:
        take_status(c, r, (1u << c->session.n_contexts) - 1);
        break;
    case NBD_CMD_DISC:
        c->at_end = true;
        break;
    default:
        CHECK(!"a command nbd_request_parse() does not let through");
    }
}

/* Several reads in a row are mostly of blocks that lie far apart in memory. Returns the bytes of
 * those it has seen to. */
static size_t warm_reads(const struct conn *c, const uint8_t *data, size_t len, size_t head_bytes)
{
    uint64_t offsets[VOLUME_WARM_MAX];
    uint32_t n = 0;
    size_t at = 0;
    for (; n < VOLUME_WARM_MAX && len - at >= head_bytes; at += head_bytes) {
        if (nbd_request_command(data + at) != NBD_CMD_READ)
            break;
        offsets[n++] = nbd_request_offset(data + at);
    }
    if (n > 1)
        volume_warm(c->vol, offsets, n);
    return at;
}

size_t transmission_take(struct conn *c, uint8_t *data, size_t len)
{
    const size_t head_bytes = nbd_request_bytes(&c->session);
    size_t at = 0, warm = 0;
    /* The volume may have been resized. */
    if (c->session.size != volume_size(c->vol)) {
        c->session.size = volume_size(c->vol);
        metrics_client_resized(&c->metrics, c->session.size);
    }
    while (c->phase == CONN_SERVING && !c->at_end) {
        if (c->discard) {
            size_t n = min_u64(c->discard, len - at);
            c->discard -= n;
            at += n;
            if (c->discard)
                break;
            discarded(c);
        }
        if (c->receive == RECEIVE_WAITS)
            break;
        if (c->receive != RECEIVE_NOTHING) {
            if (at == len)
                break;
            at += receive_payload(c, data + at, len - at);
            continue;
        }
        if (len - at < head_bytes || !transmission_may_take(c))
            break;

        if (at >= warm)
            warm = at + warm_reads(c, data + at, len - at, head_bytes);
        struct nbd_request r;
        switch (nbd_request_parse(&c->session, data + at, &r)) {
        case NBD_REQUEST_OK:
            break;
        case NBD_REQUEST_REFUSE:
            at += head_bytes;
            refuse(c, &r, r.error, r.payload_len, "");
            continue;
        case NBD_REQUEST_DISCONNECT:
            conn_die(c, "the client sent what is no request, or one beyond all limits");
            return len;
        }

        if (r.payload_len) {
            size_t have = len - at - head_bytes;
            if (nbd_request_has_status_payload(&r)) {
                uint32_t wanted;
                if (have < r.payload_len)
                    break;
                if (c->client.export->mixed)
                    tell_export(c, &r);
                at += head_bytes + r.payload_len;
                if (nbd_request_parse_status(&c->session, data + at - r.payload_len, &r,
                                             &wanted) == NBD_REQUEST_OK)
                    take_status(c, &r, wanted);
                else
                    refuse(c, &r, r.error, 0, "");
                continue;
            }
            /* A short write whose end is still to come is worth waiting for. */
            if (have < r.payload_len && r.payload_len <= CONN_IN_PLACE_BYTES_MAX)
                break;
        }
        enum status refused = ST_OK;
        enum leftover_verdict verdict = may_change(c, &r, &refused);
        if (verdict == LEFTOVER_WAIT)
            break;
        if (verdict == LEFTOVER_REFUSED) {
            at += head_bytes;
            refuse(c, &r, nbd_error_of(refused), r.payload_len,
                   refused == ST_PERM ? volume_refusal(c->vol) : "");
            continue;
        }
        enum export_claim claim = is_change(&r) ? claim_role(c) : CLAIM_YES;
        if (claim == CLAIM_WAIT)
            break;
        at += head_bytes;
        if (claim == CLAIM_NO) {
            refuse(c, &r, NBD_EPERM, r.payload_len, c->client.refusal);
            continue;
        }
        if (c->client.export->mixed)
            tell_export(c, &r);
        carry_out(c, &r);
    }
    return at;
}
