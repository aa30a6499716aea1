/*
 * The simulated NBD clients; client.h says what they are like.
 *
 * Everything a client does is an event of its own reactor. Whatever happens to a connection, an
 * operation stays in its slot until it was answered or given up; `conn` says where it was sent.
 */
#include "client.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"
#include "nbd/proto.h"
#include "trace.h"

#define TICK_NS 50000000ull
#define CONNECT_NS_MAX 5000000000ull
#define SLOTS (CLIENT_DEPTH_MAX + 2)
#define READ_ALL_SECTORS 128u /* in one request */
#define LARGE_SECTORS_MAX 512u
#define HOT_SECTORS 64u
#define STATUS_EXTENTS_MAX 4096u
#define NOWHERE UINT32_MAX
#define UNKNOWN_MAX 6u /* so often a snapshot is asked for under its names */
#define MS 1000000ull

enum op_kind { OP_READ, OP_WRITE, OP_ZERO, OP_TRIM, OP_FLUSH, OP_STATUS };
static const char *const op_names[] = {"read", "write", "zero", "trim", "flush", "block status"};

struct op {
    bool used, all; /* all: a part of client_read_all() */
    enum op_kind kind;
    uint16_t flags;
    uint32_t no; /* in the history; 0: not known there (flush, block status) */
    uint64_t first; /* sectors */
    uint32_t n;
    uint64_t cookie;
    uint32_t conn; /* index, or NOWHERE */
    unsigned times_sent;
    uint64_t not_before_ns, sent_ns;
    uint8_t *data; /* of a read */
    uint64_t got;  /* bytes of it */
    uint32_t error;
};

enum conn_state { CONN_CLOSED, CONN_CONNECTING, CONN_GREETING, CONN_OPTIONS, CONN_READY };

struct conn {
    struct client *client;
    uint32_t index;
    enum conn_state state;
    struct stream *stream;
    uint32_t no; /* among all connections of all clients */
    unsigned gateway;
    bool structured, wants_structured, trying;
    uint64_t since_ns;
    unsigned n_options; /* unanswered */
    uint32_t options[3];
    bool has_context;
    uint8_t *in; /* received, and not whole yet */
    size_t in_len, in_cap;
};

struct client {
    struct client_config c;
    struct sim_env *env;
    struct conn conns[CLIENT_CONNECTIONS_MAX];
    struct op ops[SLOTS];
    unsigned n_ops;
    uint64_t next_cookie, answered;
    unsigned gateway;
    bool stopped, leaving, gone, resting;
    unsigned name, unknown;  /* of its own names: the present one, and how often it was unknown */
    uint64_t reads_at_ns;    /* takes no answers until then */
    uint32_t burst;          /* requests left in this one */
    uint64_t read_all_at;    /* next sector; n_sectors: none */
    unsigned n_reading_all;
    bool flush_wanted;
};

/* How a stream is left; END_GONE: it has ended by itself. */
enum ending { END_CLOSE, END_KILL, END_VANISH, END_GONE };
static const char *const ending_names[] = {"closed", "killed", "vanished", "gone"};

static void pump(struct client *c);
static void conn_lost(struct conn *conn, enum ending how, const char *why);

static struct sim *sim_of(const struct client *c)
{
    return c->c.all->sim;
}

static uint64_t now_ns(const struct client *c)
{
    return sim_now_ns(c->c.all->sim);
}

static uint64_t below(const struct client *c, uint64_t n)
{
    return sim_below(sim_of(c), n);
}

static bool percent(const struct client *c, unsigned p)
{
    return below(c, 100) < p;
}

static void note(struct clients *all, uint64_t what, uint64_t value)
{
    all->hash = hash_mix(hash_mix(hash_mix(all->hash, what), value), sim_now_ns(all->sim));
}

__attribute__((format(printf, 2, 3))) static void violation(struct client *c, const char *format,
                                                            ...)
{
    struct clients *all = c->c.all;
    if (all->violation[0])
        return;
    int n = snprintf(all->violation, sizeof all->violation, "%s: ", c->c.name);
    va_list args;
    va_start(args, format);
    vsnprintf(all->violation + n, sizeof all->violation - (size_t)n, format, args);
    va_end(args);
}

void clients_init(struct clients *all, struct sim *sim, struct net *net, struct history *history,
                  uint32_t n_sectors)
{
    memset(all, 0, sizeof *all);
    all->sim = sim;
    all->net = net;
    all->history = history;
    all->n_sectors = n_sectors;
    all->changing = mem_zalloc(n_sectors);
}

/* --- operations ----------------------------------------------------------------------- */

static bool is_change(const struct op *op)
{
    return op->kind == OP_WRITE || op->kind == OP_ZERO || op->kind == OP_TRIM;
}

static bool is_free(const struct client *c, uint64_t first, uint32_t n)
{
    return !memchr(c->c.all->changing + first, 1, n);
}

static void hold(struct client *c, const struct op *op, bool held)
{
    if (is_change(op))
        memset(c->c.all->changing + op->first, held, op->n);
}

static struct op *op_new(struct client *c, enum op_kind kind, uint64_t first, uint32_t n)
{
    struct clients *all = c->c.all;
    struct op *op = c->ops;
    while (op->used)
        op++;
    CHECK(op < c->ops + SLOTS);
    *op = (struct op){.used = true,
                      .kind = kind,
                      .first = first,
                      .n = n,
                      .conn = NOWHERE,
                      .cookie = ++c->next_cookie << 8 | (uint64_t)(op - c->ops)};
    c->n_ops++;
    if (kind == OP_READ)
        op->data = mem_alloc((size_t)n * HISTORY_SECTOR);
    if (kind == OP_FLUSH || kind == OP_STATUS || c->c.snapshot)
        return op;
    enum history_kind as = kind == OP_READ    ? HISTORY_READ
                           : kind == OP_WRITE ? HISTORY_WRITE
                                              : HISTORY_ZERO;
    op->no = history_begin(all->history, now_ns(c), as, first, n);
    hold(c, op, true);
    return op;
}

static void op_over(struct client *c, struct op *op)
{
    hold(c, op, false);
    free(op->data);
    if (op->all)
        c->n_reading_all--;
    op->used = false;
    c->n_ops--;
}

static void op_give_up(struct client *c, struct op *op)
{
    struct clients *all = c->c.all;
    if (op->no) {
        history_given_up(all->history, now_ns(c), op->no);
        if (is_change(op)) {
            all->counts.given_up++;
            trace(c->c.name, "gives up %s %u", op_names[op->kind], op->no);
        }
    }
    op_over(c, op);
}

static const char *op_text(const struct op *op, char out[96])
{
    size_t n = (size_t)snprintf(out, 96, "%s", op_names[op->kind]);
    if (op->no)
        n += (size_t)snprintf(out + n, 96 - n, " %u", op->no);
    if (op->kind != OP_FLUSH)
        snprintf(out + n, 96 - n, " of sectors %llu to %llu%s", (unsigned long long)op->first,
                 (unsigned long long)(op->first + op->n - 1),
                 op->flags & NBD_CMD_FLAG_FUA ? " (FUA)" : "");
    return out;
}

/* --- sending -------------------------------------------------------------------------- */

static void put_request(uint8_t head[NBD_REQUEST_BYTES], const struct op *op)
{
    static const uint16_t commands[] = {
        [OP_READ] = NBD_CMD_READ,   [OP_WRITE] = NBD_CMD_WRITE, [OP_ZERO] = NBD_CMD_WRITE_ZEROES,
        [OP_TRIM] = NBD_CMD_TRIM,   [OP_FLUSH] = NBD_CMD_FLUSH, [OP_STATUS] = NBD_CMD_BLOCK_STATUS};
    bool flush = op->kind == OP_FLUSH;
    put_be32(head, NBD_REQUEST_MAGIC);
    put_be16(head + 4, op->flags);
    put_be16(head + 6, commands[op->kind]);
    put_be64(head + 8, op->cookie);
    put_be64(head + 16, flush ? 0 : op->first * HISTORY_SECTOR);
    put_be32(head + 24, flush ? 0 : op->n * HISTORY_SECTOR);
}

/* The request with its payload, to be freed. */
static uint8_t *op_bytes(const struct op *op, size_t *len)
{
    *len = NBD_REQUEST_BYTES + (op->kind == OP_WRITE ? (size_t)op->n * HISTORY_SECTOR : 0);
    uint8_t *bytes = mem_alloc(*len);
    put_request(bytes, op);
    if (op->kind == OP_WRITE)
        for (uint32_t i = 0; i < op->n; i++)
            history_fill(op->no, op->first + i,
                         bytes + NBD_REQUEST_BYTES + (size_t)i * HISTORY_SECTOR);
    return bytes;
}

static void op_send(struct client *c, struct op *op, struct conn *conn)
{
    struct clients *all = c->c.all;
    size_t len;
    char text[96];
    op->conn = conn->index;
    op->sent_ns = now_ns(c);
    op->got = 0;
    op->error = 0;
    if (op->times_sent++)
        all->counts.resends++;
    else
        all->counts.requests++;
    if (op->no)
        history_sent(all->history, now_ns(c), op->no, conn->no);
    trace(c->c.name, "%s %s, connection %u", op->times_sent > 1 ? "sends again:" : "sends",
          op_text(op, text), conn->no);
    uint8_t *bytes = op_bytes(op, &len);
    stream_send(conn->stream, bytes, len);
    free(bytes);
}

/* A connection for it that is in transmission, or NULL. */
static struct conn *conn_for(struct client *c, const struct op *op)
{
    struct conn *ready[CLIENT_CONNECTIONS_MAX];
    unsigned n = 0;
    for (unsigned i = 0; i < c->c.n_connections; i++)
        if (c->conns[i].state == CONN_READY && (op->kind != OP_STATUS || c->conns[i].has_context))
            ready[n++] = &c->conns[i];
    if (n <= 1)
        return n ? ready[0] : NULL;
    return ready[c->c.by_offset ? op->first / HOT_SECTORS % n : below(c, n)];
}

/* --- what to ask for ------------------------------------------------------------------ */

static uint32_t pick_length(struct client *c)
{
    uint64_t kind = below(c, 100);
    uint32_t n_max = c->c.all->n_sectors, n;
    if (percent(c, c->c.mix.large))
        n = 1 + (uint32_t)below(c, LARGE_SECTORS_MAX);
    else if (kind < 60)
        n = 1 + (uint32_t)below(c, 8);
    else if (kind < 75)
        n = 1 + (uint32_t)below(c, 32);
    else
        n = 8u << below(c, 2);
    return n < n_max ? n : n_max;
}

static uint64_t pick_first(struct client *c, uint32_t n)
{
    uint32_t all = c->c.all->n_sectors;
    uint64_t room = all - n + 1;
    uint64_t first = below(c, percent(c, c->c.mix.hot) ? min_u64(room, HOT_SECTORS) : room);
    /* Blocks are written whole, and in part. */
    return below(c, 3) ? first : first & ~7ull;
}

static struct op *ask_something(struct client *c)
{
    const struct client_mix *mix = &c->c.mix;
    unsigned chance = (unsigned)below(c, 100);
    enum op_kind kind = OP_READ;
    if (chance < mix->writes)
        kind = OP_WRITE;
    else if ((chance -= mix->writes) < mix->zeros)
        kind = OP_ZERO;
    else if ((chance -= mix->zeros) < mix->trims)
        kind = OP_TRIM;
    else if ((chance -= mix->trims) < mix->flushes)
        kind = OP_FLUSH;
    else if ((chance -= mix->flushes) < mix->statuses)
        kind = OP_STATUS;

    uint32_t n = pick_length(c);
    if ((kind == OP_ZERO || kind == OP_TRIM || kind == OP_STATUS) && below(c, 4) == 0)
        n = 1 + (uint32_t)below(c, c->c.all->n_sectors / 4);
    uint64_t first = pick_first(c, n);
    if (kind == OP_WRITE || kind == OP_ZERO || kind == OP_TRIM) {
        /* One change of a sector at a time: elsewhere, then, or a read instead. */
        for (int tries = 0; !is_free(c, first, n) && tries < 4; tries++)
            first = pick_first(c, n);
        if (!is_free(c, first, n) && c->c.only_writes)
            return op_new(c, OP_FLUSH, 0, 0);
        if (!is_free(c, first, n)) {
            kind = OP_READ;
            n = n < LARGE_SECTORS_MAX ? n : LARGE_SECTORS_MAX;
        }
    }
    struct op *op = op_new(c, kind, first, n);
    if (is_change(op) && percent(c, mix->fua))
        op->flags |= NBD_CMD_FLAG_FUA;
    if (kind == OP_ZERO && below(c, 2))
        op->flags |= NBD_CMD_FLAG_NO_HOLE;
    if (kind == OP_STATUS && below(c, 2))
        op->flags |= NBD_CMD_FLAG_REQ_ONE;
    return op;
}

static void pause_over(void *arg)
{
    struct client *c = arg;
    if (c->gone)
        return;
    c->resting = false;
    c->burst = 1 + (uint32_t)below(c, c->c.burst_max);
    pump(c);
}

static void rest(struct client *c, uint64_t ns)
{
    if (c->resting)
        return;
    c->resting = true;
    sim_at(c->env, ns, pause_over, c);
}

static void send_or_drop(struct client *c, struct op *op)
{
    struct conn *conn = conn_for(c, op);
    if (conn)
        op_send(c, op, conn);
    else if (op->kind == OP_STATUS && client_is_connected(c))
        op_over(c, op); /* the connection that could be asked that is gone */
}

/* The next thing to ask for, in the order of urgency; false: nothing now. */
static bool ask_next(struct client *c)
{
    struct clients *all = c->c.all;
    struct op *op;
    if (c->n_ops >= c->c.depth)
        return false;
    if (c->flush_wanted) {
        c->flush_wanted = false;
        op = op_new(c, OP_FLUSH, 0, 0);
    } else if (c->read_all_at < all->n_sectors) {
        uint64_t n = min_u64(READ_ALL_SECTORS, all->n_sectors - c->read_all_at);
        op = op_new(c, OP_READ, c->read_all_at, (uint32_t)n);
        op->all = true;
        c->n_reading_all++;
        c->read_all_at += n;
    } else if (!c->stopped && c->burst) {
        op = ask_something(c);
        c->burst--;
    } else {
        if (!c->stopped)
            rest(c, below(c, c->c.pause_ms_max * MS + 1));
        return false;
    }
    send_or_drop(c, op);
    return true;
}

/* Sends what waits and asks for more. */
static void pump(struct client *c)
{
    uint64_t now = now_ns(c);
    if (c->gone || c->leaving || !client_is_connected(c))
        return;
    unsigned from = (unsigned)below(c, SLOTS);
    for (unsigned i = 0; i < SLOTS && c->n_ops; i++) {
        struct op *op = &c->ops[(from + i) % SLOTS];
        if (op->used && op->conn == NOWHERE && op->not_before_ns <= now)
            send_or_drop(c, op);
    }
    while (ask_next(c))
        continue;
}

/* --- answers -------------------------------------------------------------------------- */

static void op_succeeded(struct client *c, struct op *op)
{
    struct clients *all = c->c.all;
    char text[96];
    uint64_t seen = op->data ? hash64(op->data, (size_t)op->n * HISTORY_SECTOR, 0) : op->kind;
    note(all, op->cookie, seen);
    trace(c->c.name, "is answered: %s", op_text(op, text));
    if (op->no)
        history_answered(all->history, now_ns(c), op->no, op->data);
    if (c->c.snapshot) {
        if (op->data && op->sent_ns >= *c->c.settled_ns)
            history_snapshot_shown(all->history, now_ns(c), c->c.snapshot, op->first, op->n,
                                   op->data);
        all->counts.snapshot_reads++;
        op_over(c, op);
        return;
    }
    all->counts.answered++;
    all->served[c->conns[op->conn].gateway]++;
    c->answered++;
    op_over(c, op);
}

static void op_failed(struct client *c, struct op *op)
{
    struct clients *all = c->c.all;
    char text[96];
    note(all, op->cookie, op->error);
    trace(c->c.name, "is answered with error %u: %s", op->error, op_text(op, text));
    switch (op->error) {
    case NBD_EPERM:
    case NBD_ENOSPC:
        all->counts.refused += is_change(op);
        all->counts.errors += !is_change(op);
        break;
    case NBD_EIO:
    case NBD_ESHUTDOWN:
        all->counts.errors++;
        break;
    default:
        violation(c, "error %u for a good request: %s", op->error, op_text(op, text));
    }
    if (op->no)
        history_failed(all->history, now_ns(c), op->no);
    if (!op->all && percent(c, c->c.gives_up)) {
        op_give_up(c, op);
        return;
    }
    struct conn *conn = &c->conns[op->conn];
    op->conn = NOWHERE;
    op->not_before_ns = now_ns(c) + (50 + below(c, 450)) * MS;
    /* It may be this connection that is not let write any more. */
    if (op->error == NBD_EPERM && below(c, 3) == 0)
        conn_lost(conn, END_CLOSE, "is given up");
}

static void op_answered(struct client *c, struct op *op)
{
    char text[96];
    if (!op->error && op->kind == OP_READ && op->got != (uint64_t)op->n * HISTORY_SECTOR)
        violation(c, "%llu bytes for a %s", (unsigned long long)op->got, op_text(op, text));
    if (op->error)
        op_failed(c, op);
    else
        op_succeeded(c, op);
}

static struct op *op_of(struct conn *conn, uint64_t cookie)
{
    struct client *c = conn->client;
    struct op *op = &c->ops[(cookie & 0xff) % SLOTS];
    if (op->used && op->cookie == cookie && op->conn == conn->index)
        return op;
    violation(c, "an answer to what was not asked, or was answered before (connection %u)",
              conn->no);
    return NULL;
}

/* Bytes of a whole message of the transmission phase; 0: more are needed to know, or it makes no
 * sense (a violation then). */
static size_t message_bytes(struct conn *conn, const uint8_t *p, size_t len)
{
    if (len < NBD_SIMPLE_REPLY_BYTES)
        return 0;
    if (get_be32(p) == NBD_SIMPLE_REPLY_MAGIC) {
        const struct op *op = op_of(conn, get_be64(p + 8));
        if (!op)
            return 0;
        bool data = op->kind == OP_READ && get_be32(p + 4) == 0;
        if (data && conn->structured) {
            violation(conn->client, "a simple reply with data where structured ones were agreed");
            return 0;
        }
        return NBD_SIMPLE_REPLY_BYTES + (data ? (size_t)op->n * HISTORY_SECTOR : 0);
    }
    if (get_be32(p) != NBD_STRUCTURED_REPLY_MAGIC || !conn->structured) {
        violation(conn->client, "a reply that begins with %08x", get_be32(p));
        return 0;
    }
    if (len < NBD_STRUCTURED_REPLY_BYTES)
        return 0;
    size_t payload = get_be32(p + 16);
    if (payload > 8 + LARGE_SECTORS_MAX * HISTORY_SECTOR + STATUS_EXTENTS_MAX * 8) {
        violation(conn->client, "a chunk of %zu bytes", payload);
        return 0;
    }
    return NBD_STRUCTURED_REPLY_BYTES + payload;
}

/* Puts a part of a read's data where it belongs. */
static void take_data(struct client *c, struct op *op, uint64_t offset, const uint8_t *data,
                      uint64_t len)
{
    uint64_t begin = op->first * HISTORY_SECTOR, all = (uint64_t)op->n * HISTORY_SECTOR;
    char text[96];
    if (op->kind != OP_READ || offset < begin || len > all || offset - begin > all - len) {
        violation(c, "data at %llu in the answer to a %s", (unsigned long long)offset,
                  op_text(op, text));
        return;
    }
    if (data)
        memcpy(op->data + (offset - begin), data, len);
    else
        memset(op->data + (offset - begin), 0, len);
    op->got += len;
}

static void take_extents(struct client *c, struct op *op, const uint8_t *p, size_t len)
{
    uint64_t bytes = 0;
    char text[96];
    if (op->kind != OP_STATUS || len < 12 || (len - 4) % 8) {
        violation(c, "extents in the answer to a %s", op_text(op, text));
        return;
    }
    for (size_t at = 4; at < len; at += 8)
        bytes += get_be32(p + at);
    bool longer = bytes > (uint64_t)op->n * HISTORY_SECTOR;
    if (bytes == 0 || (longer && op->flags & NBD_CMD_FLAG_REQ_ONE))
        violation(c, "extents of %llu bytes in the answer to a %s", (unsigned long long)bytes,
                  op_text(op, text));
}

static void take_chunk(struct conn *conn, const uint8_t *p)
{
    struct client *c = conn->client;
    struct op *op = op_of(conn, get_be64(p + 8));
    uint16_t type = get_be16(p + 6);
    size_t len = get_be32(p + 16);
    const uint8_t *payload = p + NBD_STRUCTURED_REPLY_BYTES;
    if (!op)
        return;
    if (type == NBD_REPLY_TYPE_OFFSET_DATA && len > 8)
        take_data(c, op, get_be64(payload), payload + 8, len - 8);
    else if (type == NBD_REPLY_TYPE_OFFSET_HOLE && len == 12)
        take_data(c, op, get_be64(payload), NULL, get_be32(payload + 8));
    else if (type == NBD_REPLY_TYPE_BLOCK_STATUS)
        take_extents(c, op, payload, len);
    else if ((type == NBD_REPLY_TYPE_ERROR || type == NBD_REPLY_TYPE_ERROR_OFFSET) && len >= 6 &&
             get_be32(payload) != 0)
        op->error = get_be32(payload);
    else if (type != NBD_REPLY_TYPE_NONE || len)
        violation(c, "a chunk of type %u with %zu bytes", type, len);
    if (get_be16(p + 4) & NBD_REPLY_FLAG_DONE)
        op_answered(c, op);
}

/* Takes a whole message; returns its bytes, or 0 where there is none. */
static size_t take_reply(struct conn *conn, const uint8_t *p, size_t len)
{
    struct client *c = conn->client;
    size_t bytes = message_bytes(conn, p, len);
    if (!bytes || len < bytes)
        return 0;
    if (get_be32(p) == NBD_STRUCTURED_REPLY_MAGIC) {
        take_chunk(conn, p);
        return bytes;
    }
    struct op *op = op_of(conn, get_be64(p + 8));
    op->error = get_be32(p + 4);
    if (bytes > NBD_SIMPLE_REPLY_BYTES)
        take_data(c, op, op->first * HISTORY_SECTOR, p + NBD_SIMPLE_REPLY_BYTES,
                  bytes - NBD_SIMPLE_REPLY_BYTES);
    op_answered(c, op);
    return bytes;
}

/* --- connections ---------------------------------------------------------------------- */

static void conn_try(void *arg);

static bool is_cut(const struct conn *conn)
{
    const struct client *c = conn->client;
    return c->c.all->cut[conn->gateway][c->c.host];
}

/* How it is left while its gateway would see that. */
static enum ending loud_ending(struct client *c)
{
    return below(c, 2) ? END_CLOSE : END_KILL;
}

/* How long the oldest request has been waiting on it. */
static uint64_t waits_ns(const struct conn *conn)
{
    const struct client *c = conn->client;
    uint64_t since = now_ns(c);
    for (const struct op *op = c->ops; op < c->ops + SLOTS; op++)
        if (op->used && op->conn == conn->index && op->sent_ns < since)
            since = op->sent_ns;
    return now_ns(c) - since;
}

/* Whether all changes under way on it have been waiting for so long that its gateway ends it by
 * itself. */
static bool may_vanish(const struct conn *conn)
{
    const struct client *c = conn->client;
    for (const struct op *op = c->ops; op < c->ops + SLOTS; op++)
        if (op->used && op->conn == conn->index && is_change(op) &&
            now_ns(c) - op->sent_ns <= c->c.timeout_ms * MS)
            return false;
    return true;
}

static void try_again(struct conn *conn, uint64_t delay_ns)
{
    if (conn->trying || conn->client->gone || conn->client->leaving)
        return;
    conn->trying = true;
    sim_at(conn->client->env, delay_ns, conn_try, conn);
}

/* Takes the stream away; what was under way on it waits for another one. */
static void conn_end(struct conn *conn, enum ending how)
{
    struct client *c = conn->client;
    if (conn->state == CONN_CLOSED)
        return;
    if (how == END_CLOSE)
        stream_close(conn->stream);
    else if (how == END_KILL)
        stream_kill(conn->stream);
    else if (how == END_VANISH)
        stream_vanish(conn->stream);
    conn->stream = NULL;
    conn->state = CONN_CLOSED;
    conn->in_len = 0;
    for (struct op *op = c->ops; op < c->ops + SLOTS; op++) {
        if (!op->used || op->conn != conn->index)
            continue;
        op->conn = NOWHERE;
        if (c->c.all->refusals && is_change(op))
            history_failed(c->c.all->history, now_ns(c), op->no);
    }
}

static void next_gateway(struct client *c)
{
    if (!c->c.stays)
        c->gateway = (c->gateway + 1) % c->c.all->n_gateways;
}

/* All connections go to one gateway; but what could not be heard has to take its time. */
static void leave_others(struct client *c)
{
    for (unsigned i = 0; i < c->c.n_connections; i++) {
        struct conn *other = &c->conns[i];
        if (other->state == CONN_CLOSED || other->gateway == c->gateway || is_cut(other))
            continue;
        enum ending end = loud_ending(c);
        trace(c->c.name, "connection %u to gateway %u: left as well; %s", other->no,
              other->gateway + 1, ending_names[end]);
        conn_end(other, end);
        try_again(other, below(c, 100 * MS));
    }
}

/* Ended by whatever: goes on here or elsewhere. */
static void conn_lost(struct conn *conn, enum ending how, const char *why)
{
    struct client *c = conn->client;
    bool was_ready = conn->state == CONN_READY;
    trace(c->c.name, "connection %u to gateway %u: %s; %s", conn->no, conn->gateway + 1, why,
          ending_names[how]);
    note(c->c.all, conn->no, how);
    if (was_ready)
        c->c.all->counts.connections_lost++;
    /* Where it was not reached, most likely elsewhere. */
    if (conn->gateway == c->gateway && below(c, 4) < (was_ready ? 1 : 3))
        next_gateway(c);
    conn_end(conn, how);
    if (!c->c.mixes_gateways)
        leave_others(c);
    try_again(conn, below(c, 4) ? below(c, 20 * MS) : below(c, 500 * MS));
    pump(c);
}

static void put_option(uint8_t *out, size_t *at, uint32_t option, const uint8_t *data, uint32_t len)
{
    put_be64(out + *at, NBD_OPTION_MAGIC);
    put_be32(out + *at + 8, option);
    put_be32(out + *at + 12, len);
    if (len)
        memcpy(out + *at + NBD_OPTION_HEADER_BYTES, data, len);
    *at += NBD_OPTION_HEADER_BYTES + len;
}

/* All options at once: who sent them may, and nothing in between depends on an answer. */
static void send_options(struct conn *conn)
{
    struct client *c = conn->client;
    const char *name = c->c.names[0] ? c->c.names[c->name] : c->c.all->names[c->c.all->name];
    uint32_t name_len = (uint32_t)strlen(name);
    uint32_t context_len = (uint32_t)strlen(NBD_CONTEXT_ALLOCATION);
    uint8_t out[1024], data[512];
    size_t at = NBD_CLIENT_FLAGS_BYTES;
    put_be32(out, NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES);
    conn->n_options = 0;
    put_be32(data, name_len);
    memcpy(data + 4, name, name_len);
    if (conn->wants_structured) {
        put_option(out, &at, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
        uint8_t *p = data + 4 + name_len;
        put_be32(p, 1);
        put_be32(p + 4, context_len);
        memcpy(p + 8, NBD_CONTEXT_ALLOCATION, context_len);
        put_option(out, &at, NBD_OPT_SET_META_CONTEXT, data, 12 + name_len + context_len);
        conn->options[conn->n_options++] = NBD_OPT_GO;
        conn->options[conn->n_options++] = NBD_OPT_SET_META_CONTEXT;
        conn->options[conn->n_options++] = NBD_OPT_STRUCTURED_REPLY;
    } else {
        conn->options[conn->n_options++] = NBD_OPT_GO;
    }
    put_be16(data + 4 + name_len, 0);
    put_option(out, &at, NBD_OPT_GO, data, 6 + name_len);
    stream_send(conn->stream, out, at);
    conn->state = CONN_OPTIONS;
}

static void take_export_info(struct conn *conn, const uint8_t *p, size_t len)
{
    struct client *c = conn->client;
    if (len < 2 || get_be16(p) != NBD_INFO_EXPORT)
        return;
    uint64_t needed = (uint64_t)c->c.all->n_sectors * HISTORY_SECTOR;
    uint16_t wanted = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA |
                      NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_CAN_MULTI_CONN;
    if (c->c.read_only)
        wanted = NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_CAN_MULTI_CONN;
    uint64_t size = len == 12 ? get_be64(p + 2) : 0;
    if ((size != needed && size != needed + c->c.all->tail_bytes) ||
        (get_be16(p + 10) & wanted) != wanted)
        violation(c, "an export of %llu bytes with flags %04x", (unsigned long long)size,
                  size ? get_be16(p + 10) : 0);
}

/* It looks for nothing any more. */
static void find_nothing(struct client *c)
{
    trace(c->c.name, "finds neither %s nor %s", c->c.names[0], c->c.names[1]);
    c->gone = true;
    for (unsigned i = 0; i < c->c.n_connections; i++)
        conn_end(&c->conns[i], END_CLOSE);
    for (struct op *op = c->ops; op < c->ops + SLOTS; op++)
        if (op->used)
            op_over(c, op);
}

static void option_refused(struct conn *conn, uint32_t type)
{
    struct client *c = conn->client;
    struct clients *all = c->c.all;
    if (type == NBD_REP_ERR_UNKNOWN && c->c.names[0]) {
        c->name = !c->name;
        if (++c->unknown == UNKNOWN_MAX) {
            find_nothing(c);
            return;
        }
    } else if (type == NBD_REP_ERR_UNKNOWN) {
        all->name = !all->name; /* it was renamed */
    }
    conn_lost(conn, END_CLOSE, type == NBD_REP_ERR_UNKNOWN ? "no such export" : "refused");
}

/* A reply to an option; returns its bytes, 0: not whole, or the connection is gone. */
static size_t take_option_reply(struct conn *conn, const uint8_t *p, size_t len)
{
    struct client *c = conn->client;
    if (len < NBD_OPTION_REPLY_BYTES)
        return 0;
    uint32_t option = get_be32(p + 8), type = get_be32(p + 12), data_len = get_be32(p + 16);
    if (get_be64(p) != NBD_OPTION_REPLY_MAGIC || data_len > NBD_STRING_BYTES_MAX + 64 ||
        !conn->n_options || option != conn->options[conn->n_options - 1]) {
        violation(c, "a reply of type %u to option %u", type, option);
        return 0;
    }
    if (len < NBD_OPTION_REPLY_BYTES + data_len)
        return 0;
    if (type == NBD_REP_INFO) {
        take_export_info(conn, p + NBD_OPTION_REPLY_BYTES, data_len);
    } else if (type == NBD_REP_META_CONTEXT) {
        conn->has_context = true;
    } else if (type == NBD_REP_ACK) {
        conn->n_options--;
        if (option == NBD_OPT_STRUCTURED_REPLY)
            conn->structured = true;
    } else if (option == NBD_OPT_GO) {
        option_refused(conn, type);
        return 0;
    } else {
        conn->n_options--; /* (of an export it does not know, no contexts are told) */
    }
    if (!conn->n_options) {
        conn->state = CONN_READY;
        c->unknown = 0;
        trace(c->c.name, "connection %u to gateway %u: in transmission", conn->no,
              conn->gateway + 1);
    }
    return NBD_OPTION_REPLY_BYTES + data_len;
}

static size_t take_greeting(struct conn *conn, const uint8_t *p, size_t len)
{
    if (len < NBD_GREETING_BYTES)
        return 0;
    if (get_be64(p) != NBD_MAGIC || get_be64(p + 8) != NBD_OPTION_MAGIC ||
        !(get_be16(p + 16) & NBD_FLAG_FIXED_NEWSTYLE)) {
        violation(conn->client, "a greeting that is none");
        return 0;
    }
    send_options(conn);
    return NBD_GREETING_BYTES;
}

/* Takes what is whole; the bytes used. */
static size_t take_messages(struct conn *conn, const uint8_t *p, size_t len)
{
    const struct client *c = conn->client;
    uint32_t no = conn->no;
    size_t at = 0, used;
    do {
        used = conn->state == CONN_GREETING ? take_greeting(conn, p + at, len - at)
               : conn->state == CONN_OPTIONS ? take_option_reply(conn, p + at, len - at)
               : conn->state == CONN_READY   ? take_reply(conn, p + at, len - at)
                                             : 0;
        at += used;
    } while (used && conn->no == no && conn->state != CONN_CLOSED && !c->gone &&
             !c->c.all->violation[0]);
    return at;
}

static void on_data(void *arg, const uint8_t *bytes, size_t len)
{
    struct conn *conn = arg;
    struct client *c = conn->client;
    uint32_t no = conn->no;
    if (conn->in_len) {
        mem_grow(&conn->in, &conn->in_cap, conn->in_len + len, 1);
        memcpy(conn->in + conn->in_len, bytes, len);
        len += conn->in_len;
        bytes = conn->in;
    }
    size_t used = take_messages(conn, bytes, len);
    if (conn->no == no && conn->state != CONN_CLOSED) {
        conn->in_len = len - used;
        if (conn->in_len) {
            mem_grow(&conn->in, &conn->in_cap, conn->in_len, 1);
            memmove(conn->in, bytes + used, conn->in_len);
        }
    }
    pump(c);
}

static void on_connected(void *arg)
{
    struct conn *conn = arg;
    conn->state = CONN_GREETING;
}

static void on_closed(void *arg, bool reset)
{
    struct conn *conn = arg;
    conn_lost(conn, END_GONE, reset ? "reset, or refused" : "closed by the gateway");
}

static void conn_try(void *arg)
{
    static const struct stream_events events = {
        .connected = on_connected, .data = on_data, .closed = on_closed};
    struct conn *conn = arg;
    struct client *c = conn->client;
    struct clients *all = c->c.all;
    conn->trying = false;
    if (c->gone || c->leaving || conn->state != CONN_CLOSED)
        return;
    conn->no = ++all->last_connection;
    conn->gateway = c->gateway;
    conn->state = CONN_CONNECTING;
    conn->since_ns = now_ns(c);
    conn->structured = conn->has_context = false;
    conn->in_len = 0;
    all->counts.connections++;
    trace(c->c.name, "connection %u: to gateway %u", conn->no, conn->gateway + 1);
    conn->stream = net_connect(all->net, c->env, c->c.host, all->gateways[conn->gateway], &events,
                               conn);
    stream_read(conn->stream, now_ns(c) >= c->reads_at_ns);
}

/* --- time ----------------------------------------------------------------------------- */

static bool waits_too_long(const struct client *c, const struct conn *conn)
{
    if (conn->state == CONN_CLOSED)
        return false;
    if (conn->state != CONN_READY)
        return now_ns(c) - conn->since_ns > CONNECT_NS_MAX;
    return waits_ns(conn) > c->c.timeout_ms * MS;
}

static void tick(void *arg)
{
    struct client *c = arg;
    if (c->gone)
        return;
    for (unsigned i = 0; i < c->c.n_connections && !c->leaving; i++) {
        struct conn *conn = &c->conns[i];
        if (waits_too_long(c, conn)) {
            bool vanishes = is_cut(conn) || below(c, 3) == 0;
            if (vanishes && !may_vanish(conn) && is_cut(conn))
                continue; /* later */
            vanishes &= may_vanish(conn);
            c->c.all->counts.timeouts++;
            conn_lost(conn, vanishes ? END_VANISH : loud_ending(c), "no answer for too long");
        }
    }
    pump(c);
    sim_at(c->env, TICK_NS, tick, c);
}

/* --- from outside --------------------------------------------------------------------- */

struct client *client_start(const struct client_config *config, bool quiet)
{
    struct client *c = mem_zalloc(sizeof *c);
    c->c = *config;
    CHECK(config->n_connections >= 1 && config->n_connections <= CLIENT_CONNECTIONS_MAX);
    CHECK(config->depth >= 1 && config->depth <= CLIENT_DEPTH_MAX);
    c->env = sim_env_new(config->all->sim);
    c->gateway = config->gateway;
    c->stopped = quiet;
    c->read_all_at = config->all->n_sectors;
    for (unsigned i = 0; i < config->n_connections; i++) {
        struct conn *conn = &c->conns[i];
        conn->client = c;
        conn->index = i;
        conn->wants_structured = config->structured & (1u << i);
        try_again(conn, below(c, 20 * MS));
    }
    trace(c->c.name, "begins on host %u", config->host);
    tick(c);
    return c;
}

void client_stop(struct client *c)
{
    c->stopped = true;
}

void client_go(struct client *c)
{
    c->stopped = false;
    pump(c);
}

void client_hurry(struct client *c)
{
    c->c.pause_ms_max = 10;
}

bool client_is_idle(const struct client *c)
{
    return !c->n_ops && !c->flush_wanted && c->read_all_at == c->c.all->n_sectors;
}

bool client_is_connected(const struct client *c)
{
    for (unsigned i = 0; i < c->c.n_connections; i++)
        if (c->conns[i].state == CONN_READY)
            return true;
    return false;
}

uint64_t client_answered(const struct client *c)
{
    return c->answered;
}

const char *client_name(const struct client *c)
{
    return c->c.name;
}

unsigned client_host(const struct client *c)
{
    return c->c.host;
}

void client_read_all(struct client *c)
{
    c->read_all_at = 0;
    pump(c);
}

void client_flush(struct client *c)
{
    c->flush_wanted = true;
    pump(c);
}

static void set_reading(struct client *c, bool on)
{
    for (unsigned i = 0; i < c->c.n_connections; i++)
        if (c->conns[i].state != CONN_CLOSED)
            stream_read(c->conns[i].stream, on);
}

static void read_again(void *arg)
{
    struct client *c = arg;
    if (!c->gone && now_ns(c) >= c->reads_at_ns) {
        trace(c->c.name, "takes answers again");
        set_reading(c, true);
    }
}

void client_do_not_read(struct client *c, uint32_t ms)
{
    trace(c->c.name, "takes no answers for %u ms", ms);
    c->reads_at_ns = now_ns(c) + ms * MS;
    set_reading(c, false);
    sim_at(c->env, ms * MS, read_again, c);
}

void client_turn_to(struct client *c, unsigned gateway)
{
    c->gateway = gateway;
}

void client_move(struct client *c, unsigned gateway)
{
    c->gateway = gateway;
    c->c.mixes_gateways = false;
    trace(c->c.name, "moves to gateway %u", gateway + 1);
    leave_others(c);
}

void client_lose_connection(struct client *c)
{
    struct conn *conn = &c->conns[below(c, c->c.n_connections)];
    if (conn->state != CONN_CLOSED && !is_cut(conn))
        conn_lost(conn, loud_ending(c), "breaks");
}

void client_leave(struct client *c)
{
    CHECK(client_is_idle(c));
    trace(c->c.name, "leaves");
    c->leaving = c->gone = true;
    for (unsigned i = 0; i < c->c.n_connections; i++) {
        struct conn *conn = &c->conns[i];
        uint8_t goodbye[NBD_REQUEST_BYTES] = {0};
        put_be32(goodbye, NBD_REQUEST_MAGIC);
        put_be16(goodbye + 6, NBD_CMD_DISC);
        if (conn->state == CONN_READY)
            stream_send(conn->stream, goodbye, sizeof goodbye);
        conn_end(conn, END_CLOSE);
    }
}

/* The beginning of a write, and no more. What was not sent whole does not count as sent, and must
 * never be seen. */
static void send_half(struct client *c)
{
    struct clients *all = c->c.all;
    uint32_t n = 1 + (uint32_t)below(c, min_u64(all->n_sectors, 2 * HOT_SECTORS));
    uint64_t first = pick_first(c, n);
    struct op wanted = {.kind = OP_WRITE};
    const struct conn *conn = conn_for(c, &wanted);
    size_t len;
    if (!conn || !is_free(c, first, n) || c->n_ops == SLOTS)
        return;
    struct op *op = op_new(c, OP_WRITE, first, n);
    uint8_t *bytes = op_bytes(op, &len);
    size_t part = 1 + below(c, len - 1);
    trace(c->c.name, "sends %zu of %zu bytes of write %u, connection %u", part, len, op->no,
          conn->no);
    stream_send(conn->stream, bytes, part);
    free(bytes);
    all->counts.half_sent++;
}

uint32_t client_die(struct client *c, enum client_death how)
{
    if (how == CLIENT_KILLED_HALF)
        send_half(c);
    for (unsigned i = 0; i < c->c.n_connections; i++)
        if (c->conns[i].state != CONN_CLOSED && is_cut(&c->conns[i]))
            how = CLIENT_VANISHED;
    trace(c->c.name, how == CLIENT_VANISHED ? "is gone with its host" : "is killed");
    note(c->c.all, c->c.host, how);
    c->c.all->counts.deaths++;
    c->gone = true;
    for (unsigned i = 0; i < c->c.n_connections; i++)
        conn_end(&c->conns[i], how == CLIENT_VANISHED ? END_VANISH : END_KILL);
    for (struct op *op = c->ops; op < c->ops + SLOTS; op++)
        if (op->used)
            op_give_up(c, op);
    return how == CLIENT_VANISHED ? c->c.all->stale_ms : 0;
}

bool client_found_nothing(const struct client *c)
{
    return c->unknown == UNKNOWN_MAX;
}

bool client_is_gone(const struct client *c)
{
    return c->gone;
}

void client_describe(const struct client *c, char *out, size_t len)
{
    char text[96];
    unsigned ready = 0;
    for (unsigned i = 0; i < c->c.n_connections; i++)
        ready += c->conns[i].state == CONN_READY;
    int n = snprintf(out, len, "%s: %u of %u connections, %u requests under way", c->c.name, ready,
                     c->c.n_connections, c->n_ops);
    for (const struct op *op = c->ops; op < c->ops + SLOTS; op++)
        if (op->used && n > 0 && (size_t)n < len) {
            snprintf(out + n, len - (size_t)n, ", %s", op_text(op, text));
            return;
        }
}
