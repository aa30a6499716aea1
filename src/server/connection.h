/*
 * Connections: the life of one, and the part of the server that each reactor has.
 *
 * A connection negotiates on reactor 0, moves to the reactor of its volume, and
 * is served there. Its socket is a wire (wire.h), raw and non-blocking: one read
 * takes in many requests, all are parsed and looked up in place, and what they are
 * answered with leaves in one write.
 *
 * Handshakes are what anybody can begin. They have a limit in number and in time. Past the number
 * (handshakes_max, or connections_max together with those that are served) the oldest one gives
 * way to the next: of the address that has most of them, if one does, else of all; so silent
 * clients keep nobody out, and one that floods keeps out only itself. The computing that TLS takes
 * is done by a worker, for one client after another, so that whoever begins sessions by the
 * thousand does not take the reactor's time.
 *
 * A client can make the server hold: one receive buffer per reactor (shared),
 * what was read and cannot be parsed yet (up to LANE_RECEIVE_BYTES), replies
 * that it does not take (CONN_REPLY_BYTES_MAX, beyond which nothing more of it
 * is parsed; about CONN_REPLY_BYTES_SHORT while all connections of the reactor
 * together have more than their part of the cache waiting), CONN_REQUESTS_MAX
 * requests (more while all connections of the reactor together have less than
 * LANE_REQUESTS_MAX), and the block buffers the volume grants, for as long as the payload
 * keeps coming (receive_timeout_ms). And the kernel: what the socket takes of replies (over a
 * Unix socket up to 1 MiB, see listener.c).
 *
 * A connection is paused (not read) while the volume grants no memory or the
 * client takes no replies. If it is paused for longer than pause_close_ms and
 * its volume has another connection (the last one stays), it is closed with what is unread: its
 * client may have given up and sent the same writes again elsewhere, and over TCP
 * the end of such a connection cannot be seen behind a closed window (G8). A
 * Unix socket's end is always seen. For the same reason requests are taken in well ahead of
 * what the store has answered: what is read was sent before what comes on another connection
 * later, and the sooner all is read the sooner the end shows.
 */
#ifndef SERVER_CONNECTION_H
#define SERVER_CONNECTION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/buf.h"
#include "base/list.h"
#include "base/loglimit.h"
#include "nbd/handshake.h"
#include "nbd/reply.h"
#include "nbd/request.h"
#include "server/access.h"
#include "server/exports.h"
#include "server/listener.h"
#include "server/metrics.h"
#include "server/peer.h"
#include "server/reactor.h"
#include "server/server.h"
#include "server/wire.h"
#include "volume/recovery.h"
#include "volume/session.h"
#include "volume/volume.h"

#define LANE_RECEIVE_BYTES (64u << 10)
/* A write of up to this many bytes is waited for and taken where it was received; a longer one
 * gets block buffers to be received into. */
#define CONN_IN_PLACE_BYTES_MAX (32u << 10)
#define CONN_REQUESTS_MAX 256u
#define LANE_REQUESTS_MAX 8192u
#define CONN_REPLY_BYTES_MAX (4u << 20)
#define CONN_REPLY_BYTES_SHORT (64u << 10)
#define CONN_STATUS_EXTENTS_MAX 4096u
#define HANDSHAKE_GROUPS 4096u

#define OUT_PIECES 512u
#define OUT_HEAD_BYTES (16u << 10)
#define OUT_KEPT_MAX 8u
#define REQUESTS_KEPT_MAX 1024u

/* Bytes on their way to a client: headers lie here, payloads are referred to. */
struct out {
    struct out *next;
    uint32_t first, n;   /* pieces [first, n) are unsent */
    uint32_t head_bytes; /* used */
    struct iovec pieces[OUT_PIECES];
    uintptr_t owners[OUT_PIECES]; /* what to give back: a struct buf, or a malloc with bit 0 set */
    uint8_t heads[OUT_HEAD_BYTES];
};

enum { SEGS_INLINE = VOL_SEGS(65536, 4096) };

/* One request to the volume: all of an NBD request, or a piece of a long one. */
struct piece {
    struct vol_io io;
    struct request *request;
    void *heap; /* itself, where it is not part of its request */
    struct vol_seg inline_segs[SEGS_INLINE];
};

/* One NBD request from its parsing to its reply. */
struct request {
    struct request *next_free;
    struct conn *conn;
    struct nbd_reply_to to;
    uint16_t command, flags;
    uint32_t wanted;       /* BLOCK_STATUS: a bit for each context */
    uint32_t n_pieces;     /* unanswered */
    bool more;             /* WRITE: not all pieces have begun */
    bool head_sent;        /* READ: part of the reply is out already */
    bool answered, failed; /* for the metrics: wholly; with an error */
    uint64_t begun_ns;     /* lane->metrics.mark_ns when it was taken */
    struct list stalled;   /* conn->stalled: READ that goes on when replies were sent */
    uint64_t next, end;    /* READ, WRITE: what no piece was made for yet */
    enum status st;        /* first failure */
    struct piece piece;    /* the first, and for most the only one */
};

enum receive_state {
    RECEIVE_NOTHING,
    RECEIVE_WAITS,   /* the volume has not granted memory yet */
    RECEIVE_GRANTED, /* it has; where the payload goes is decided when some is there */
    RECEIVE_BUFFERS, /* into block buffers */
};

/* What was read ahead of its turn, and the question whether its client is still there: see
 * leftover.c. */
struct leftover {
    uint64_t checked;    /* volume_times_taken() when it was answered last ... */
    uint64_t looked;     /* ... and asked */
    /* A change waits for the volume since then, or was refused and there is more behind it; 0: none
     * does; the volume's when that began, and when it was looked at first after that. */
    uint64_t since_ms, lineage_then, lineage;
    bool keeps;          /* the volume from being idle */
    bool in_doubt;       /* others changed the volume, and no end was seen yet */
    bool waits;          /* nothing is taken until it is answered */
    enum status refused; /* the volume can't be had, nor what was sent before that was said */
    uint8_t *bytes;      /* [at, len) are unused */
    size_t at, len, cap;
    struct env_timer timer;
};

/* Metadata contexts. Every export has the first ones; besides, for each snapshot that the volume has
 * from before, a dirty bitmap: what has changed since. */
enum context_kind { CONTEXT_ALLOCATION, CONTEXT_DEPTH, CONTEXT_BITMAP };
#define CONTEXTS_ALWAYS 2u
/* So many dirty bitmaps are listed, those of the newest snapshots; all can be selected. */
#define CONN_BITMAPS_LISTED 1024u

enum conn_phase {
    CONN_HANDSHAKE,
    CONN_MOVING, /* between two reactors */
    CONN_SERVING,
    CONN_DEAD, /* waits for its last requests and its wire */
};

struct lane;
struct server;

struct conn {
    struct list link;        /* lane->conns */
    struct list ready_link;  /* lane->ready */
    struct list flush_link;  /* lane->flush */
    struct list handshake_link; /* server->handshakes */
    struct list tls_link;      /* server->tls_waiting */
    struct lane *lane;
    struct wire *wire;
    bool attached; /* the wire is, to the lane's reactor */
    bool hung_up;  /* the peer closed its side: seen by the wire */
    bool at_end;   /* nothing more comes: end of the stream, or DISC */
    bool withdraws; /* inside transmission_withdraw() */
    bool stopping; /* finish what is under way, then close */
    bool left;     /* the client ended the handshake in good order */
    bool blocked;  /* the socket takes no more */
    bool drained;  /* the socket had no more when it was read last */
    enum conn_phase phase;
    uint64_t id;         /* counts connections */
    uint64_t begun_ns;   /* accepted then, since 1970 */
    struct peer peer;
    char export_name[FULL_NAME_BYTES]; /* by which it was opened; "" during the handshake */
    uint64_t since_ms; /* begin of the handshake, or of the pause (0: not paused) */

    /* Handshake. */
    struct handshake *handshake;
    bool tls_begun, tls_told; /* that this client was refused for want of TLS */
    struct tls_step *tls_step; /* on a worker; the wire's session is its alone */
    struct lookup *lookup; /* a question under way */
    struct volume *opened; /* for the export it is about to enter; lives on opened_lane */
    struct lane *opened_lane;

    /* Transmission. */
    struct nbd_session session;
    uint32_t context_ids[HANDSHAKE_CONTEXTS_MAX];
    struct {
        enum context_kind kind;
        struct volume *since; /* of a dirty bitmap: the snapshot, on the lane of `vol` */
    } contexts[HANDSHAKE_CONTEXTS_MAX];
    struct volume *vol;
    struct export_client client; /* client.export NULL: not there yet */
    struct vol_writer writer;
    struct leftover leftover;
    struct metrics_client metrics;
    /* A request that changes the volume waits for the writing role (exports.h); nothing of the
     * connection is taken meanwhile. */
    bool claim_waits, claim_over, claim_told;
    bool claim_refused; /* and so is all that was sent before that was said */
    uint64_t claim_since_ms;
    struct env_timer claim_timer;
    struct volume_watcher watcher;
    bool lost; /* the volume was, before the connection arrived at its lane */
    uint8_t *stash; /* received and not parsed */
    uint32_t stash_len;
    uint64_t discard; /* payload bytes to be thrown away */
    uint64_t grants, grants_seen; /* pieces begun; at the last tick */
    unsigned held_ticks;          /* for so many ticks one piece kept others waiting */
    struct request *late_request; /* refused; answered when its payload was thrown away */
    struct nbd_reply_to late_to;  /* the same where there is no struct request, if late_error */
    uint32_t late_error;
    char *late_why; /* a copy; NULL: none */
    enum receive_state receive;
    struct piece *receiving;
    uint32_t receive_seg, receive_at; /* RECEIVE_BUFFERS: position */
    uint32_t n_requests;              /* under way */
    uint64_t reading_bytes;           /* reads under way */
    struct list stalled;              /* reads that wait until replies were sent */
    /* A long READ with simple replies: its data must not be interrupted by other replies, so
     * it waits for those under way, and nothing is parsed until it is answered. */
    struct request *alone;
    struct out *out_first, *out_last;
    uint64_t out_bytes;
    bool out_tells; /* something else in there than "that could not be done now" (EIO) */
    uint64_t received, received_seen; /* bytes, now and at the last tick ... */
    unsigned idle_ticks;              /* ... and ticks without any, inside a payload */

    struct env_task task; /* on its way to another lane */
};

/* What clients can have a lane say in the log as often as they like. */
enum lane_line {
    LINE_ENTERED,     /* an export */
    LINE_NO_EXPORT,   /* for this client */
    LINE_NO_TLS,      /* where it is required, or plain text behind STARTTLS */
    LINE_TLS_REFUSED, /* a handshake of TLS, or a session of it that broke */
    LINE_TURNED_AWAY,
    LINE_CLOSED, /* for what the client did or left undone */
    LINE_NO_ROLE, /* to write */
    LANE_LINES,
};

/* One reactor's part of the server. */
struct lane {
    struct server *server;
    unsigned no;
    struct reactor *reactor;
    struct env *env;
    struct shard *shard;
    struct reactor_hook hook;
    struct env_timer tick;
    struct list conns;
    unsigned n_conns;
    struct list ready; /* conns that may go on parsing */
    struct list flush; /* conns with replies to send */
    struct list exports;
    struct access *access; /* the rules in force, held; NULL: none, all is allowed */
    unsigned n_works; /* volumes being closed, and other work that has to end first */
    bool stopping, stopped;
    bool draining, drained; /* ends its connections; none is left, and no volume */
    uint64_t drain_until_ms;
    struct env_task task, drain_task;
    struct request *free_requests;
    unsigned n_free_requests, n_requests; /* kept; under way */
    unsigned n_taken; /* requests, since the last turn was over */
    struct out *free_outs;
    unsigned n_free_outs;
    uint8_t *receive; /* LANE_RECEIVE_BYTES */
    uint64_t turned_ms; /* when the last turn was over */
    struct metrics_lane metrics;
    struct log_limit lines[LANE_LINES];
    uint64_t ahead_bytes; /* held by leftover.c */
    /* Replies unsent and reads under way of all its connections. */
    uint64_t reply_bytes, reply_bytes_max;
};

/* Gives the space of removed volumes back, a batch at a time, and clears the records of sessions
 * that are over. */
struct keeper {
    struct lane *lane;
    struct catalog_op op;
    struct session_sweep sweep;
    struct env_timer timer;
    bool more, busy;
};

struct server {
    const struct server_config *config;
    struct server_config limits; /* config with its defaults filled in */
    struct store *store;
    struct session *session;
    struct tls_credentials *tls; /* of new sessions; lane 0 only; NULL: no TLS */
    struct lane *lanes;
    unsigned n_lanes;
    struct metrics metrics;
    /* What the process has to know of, on lane 0's thread: now and then (may be NULL); every
     * lane has closed everything; the store does not take the last commits in time. */
    void (*tick)(struct server *s);
    void (*all_stopped)(struct server *s);
    void (*overdue)(struct server *s);
    struct keeper keeper;
    struct env_timer end_timer;
    /* Handshakes under way, the oldest first, and how many there are of each group of addresses;
     * those whose TLS session has something to do, and how many of them are on workers. Lane 0
     * only. */
    struct list handshakes, tls_waiting;
    unsigned n_handshakes, n_tls_steps;
    uint16_t handshakes_from[HANDSHAKE_GROUPS];
    uint64_t group_seed;
    atomic_uint n_conns;   /* all lanes */
    uint64_t conns_ever;   /* lane 0 only */
    unsigned n_lanes_stopped;
    bool stopping, lanes_told;
    atomic_bool drain_now; /* stop waiting for requests under way */
    atomic_bool draining;  /* all volumes are given back, and no clients taken any more */
    atomic_bool drained;   /* they all are given back */
    atomic_uint n_lanes_drained;
    struct env_task drain_task;
};

/* --- connection.c ----------------------------------------------------------------------- */

/* Prepares a lane whose reactor and shard exist. */
void lane_init(struct lane *lane);

/* Ends the handshakes under way, all of which are on lane 0. */
void lane_stop_handshakes(struct lane *lane);

/* Begins to end the connections of the lane, which closes their volumes, and ends those that still
 * come at once; at the latest after limits.drain_ms. It tells by `lane->drained` and
 * server_lane_drained() when no volume is open any more. Reactor thread. */
void lane_drain(struct lane *lane);

/* Begins to close all connections and volumes of the lane; it tells by `lane->stopped` and
 * server_lane_stopped() when all are gone. Reactor thread. */
void lane_stop(struct lane *lane);

/* Frees what a stopped lane holds. */
void lane_destroy(struct lane *lane);

/* Work under way that a lane waits for before it is stopped. */
void lane_work_begun(struct lane *lane);
void lane_work_ended(struct lane *lane);

/* Puts these rules (NULL: none) in force on the lane, and closes the connections that have more
 * than they give. Reactor thread. */
void lane_use_access(struct lane *lane, struct access *access);

/* Takes an accepted connection on lane 0. */
void conn_accept(struct lane *lane, const struct accepted *a);

/* Ends a connection now: what is unread or unsent is dropped, a half-received write undone. */
void conn_die(struct conn *c, const char *why);

/* Something changed (a request ended, a grant came): looks at it again in this turn of the
 * loop, or the next. */
void conn_wake(struct conn *c);

/* A request of a dead connection ended; frees the connection with the last one. */
void conn_try_free(struct conn *c);

/* Whether one more line of this kind may be written now; to be asked once for each. */
bool lane_may_log(struct lane *lane, enum lane_line line);

/* Milliseconds of the environment's clock. */
uint64_t lane_now_ms(const struct lane *lane);

/* --- output.c ----------------------------------------------------------------------------- */

/* Room for a header of up to NBD_REPLY_HEAD_MAX bytes, to be finished with out_head_done(). */
uint8_t *out_head(struct conn *c);
void out_head_done(struct conn *c, size_t len);

/* `len` bytes at `data` behind what is there; `owner` is given back when they were sent (0:
 * nobody's). */
void out_data(struct conn *c, const void *data, size_t len, uintptr_t owner);
void out_zeros(struct conn *c, uint64_t len);
static inline uintptr_t out_owner_malloc(void *p)
{
    return (uintptr_t)p | 1;
}

/* Sends what the socket takes. False: the connection is broken. Sets c->blocked. */
bool out_flush(struct conn *c);

/* Throws all away. */
void out_drop(struct conn *c);
void out_free_kept(struct lane *lane);

/* --- transmission.c ------------------------------------------------------------------------ */

/* The names of the metadata contexts that every export has. */
extern const char *const transmission_context_names[CONTEXTS_ALWAYS];

/* Parses and carries out what `data` holds; returns the bytes used. */
size_t transmission_take(struct conn *c, uint8_t *data, size_t len);

/* Memory for replies is short: every connection gets by with little. */
static inline bool lane_is_short(const struct lane *lane)
{
    return lane->reply_bytes >= lane->reply_bytes_max;
}

/* Whether more requests may be parsed now. A connection without replies under way always may,
 * so whatever holds one up ends with what it has under way itself. */
static inline bool transmission_may_take(const struct conn *c)
{
    uint64_t pending = c->out_bytes + c->reading_bytes;
    bool room = c->n_requests < CONN_REQUESTS_MAX || c->lane->n_requests < LANE_REQUESTS_MAX;
    return c->receive != RECEIVE_WAITS && !c->alone && !c->claim_waits &&
           !c->leftover.waits && room &&
           (lane_is_short(c->lane) ? pending == 0 : pending < CONN_REPLY_BYTES_MAX);
}

/* Where the rest of a payload being received goes: fills `iov` (up to `max`) and returns how
 * many. 0: there is none. */
int transmission_receive_iov(struct conn *c, struct iovec *iov, int max, size_t *bytes);

/* Whether anything of the connection is under way: see export_client.is_busy. */
bool transmission_is_busy(struct export_client *client);

/* `n` bytes were received into these. */
void transmission_received(struct conn *c, size_t n);

/* Goes on with reads that waited for replies to leave. */
void transmission_go_on(struct conn *c);

/* Asks for the ownership of the volume for the connection; leftover_own_answered() hears. */
void transmission_own(struct conn *c);

/* Undoes a write that is being received, or forgets a refused one whose payload is. */
void transmission_abort_receive(struct conn *c);

/* The client is gone, or will have to connect again: the same, and takes back unanswered what
 * waits for the volume to become ours. Its client may send it again elsewhere, and by the time the
 * volume is ours, newer requests may have been answered there (G8). */
void transmission_withdraw(struct conn *c);

/* The connection is dead: the same, and ends the requests that the volume does not know of. */
void transmission_abandon(struct conn *c);

void transmission_free_kept(struct lane *lane);

/* --- leftover.c --------------------------------------------------------------------------- */

enum leftover_verdict {
    LEFTOVER_NONE,    /* a change may be taken */
    LEFTOVER_WAIT,    /* not yet: the connection waits, or is dead */
    LEFTOVER_REFUSED, /* no: *refused says why */
};

/* To be asked, before a change is taken, where leftover_is_checked() says no. */
enum leftover_verdict leftover_check(struct conn *c, enum status *refused);

static inline bool leftover_is_checked(const struct conn *c)
{
    return c->leftover.checked == volume_times_taken(c->vol) && volume_is_owned(c->vol);
}

/* What transmission_own() asked for is answered. */
void leftover_own_answered(struct conn *c, enum status st);

/* The lane stood still for longer than pause_close_ms: closes connections of which something lies
 * unread since who knows when, and whose clients may have gone elsewhere. */
void leftover_stood_still(struct lane *lane);

/* As wire_receive; first what was read ahead. */
ssize_t leftover_receive(struct conn *c, struct iovec *iov, size_t n);
static inline bool leftover_has_bytes(const struct conn *c)
{
    return c->leftover.at < c->leftover.len;
}
/* All that the client has sent was taken. */
void leftover_drained(struct conn *c);
void leftover_drop(struct conn *c);
/* The connection dies. */
void leftover_end(struct conn *c);

/* --- lanes.c ----------------------------------------------------------------------------- */

/* Fills s->limits: the configuration's, or what is usual. */
void server_fill_limits(struct server *s);

/* Opens all lanes, whose reactors exist and do not run yet; what shard_new gives. */
enum status lanes_open(struct server *s, struct err *e);

/* Puts access rules in force on all lanes; keeps its own references. Lane 0's reactor thread. */
void lanes_use_access(struct server *s, struct access *access);

/* Begins the housekeeping. On lane 0's reactor, or before it runs. */
void lanes_begin(struct server *s);

/* Begins to end all that runs on the lanes, which goes on to s->all_stopped or s->overdue. No
 * connection is accepted from now on. Lane 0's reactor thread. */
void lanes_stop(struct server *s);

/* Frees the lanes that are open, stopped or never run; no reactor runs any more. s->end_timer goes
 * on: the session's end has to be in time, too. */
void lanes_close(struct server *s);

/* Begins to give all volumes back and to refuse new clients; the process goes on. Any thread. */
void server_drain(struct server *s);

/* A lane that drains has no volume open any more. Its reactor thread. */
void server_lane_drained(struct lane *lane);

/* A connection has left the lane. Its reactor thread. */
void server_conn_gone(struct lane *lane);

/* A lane has closed everything. Its reactor thread. */
void server_lane_stopped(struct lane *lane);

#endif
