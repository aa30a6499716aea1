/*
 * A load for an NBD server; see load.h.
 *
 * A request has a slot of its connection, whose number is the cookie, from when it is queued until
 * its reply. Queued requests are a ring of slots and of headers beside each other, so that the
 * headers of reads leave as one piece of memory.
 */
#include "bench/load.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/mem.h"
#include "base/clock.h"
#include "bench/payload.h"
#include "bench/random.h"
#include "nbd/proto.h"

/* Stays in the processor's cache, and takes the replies of a socket's buffer at once. */
#define SCRATCH_BYTES (256u << 10)
#define SEND_IOVECS 512u
#define SEND_BYTES_SOFT (2u << 20)
#define EVENTS_MAX 64

enum slot_state { SLOT_FREE, SLOT_READ, SLOT_WRITE, SLOT_FLUSH };

struct slot {
    uint64_t begun_ns, offset;
    uint64_t first_unit; /* of what is written */
    enum slot_state state;
};

struct connection {
    int fd;
    bool wants_write; /* epoll tells when there is room */
    /* Slots: as many as the depth, and one for a FLUSH. */
    struct slot *slots;
    uint32_t *free_slots, n_free;
    uint32_t in_flight, writes_in_flight;
    /* Queued, and not sent, or not wholly: a ring. */
    uint32_t *queue;
    uint8_t *headers;
    uint32_t queue_first, queue_len, queue_cap;
    uint64_t first_sent; /* bytes of the first */
    /* Replies. */
    uint8_t carry[NBD_SIMPLE_REPLY_BYTES];
    uint32_t carry_len;
    uint64_t skip;    /* bytes of a read's payload that are still to come ... */
    uint32_t reading; /* ... and its slot */
    uint64_t heard_ns;
    /* What it asks for. */
    struct random random;
    uint64_t first_place, n_places, next_place; /* sequential: its part; else all */
    uint64_t n_left, next_unit;
    uint64_t writes_until_flush; /* 0: a FLUSH comes before the next write */
    bool flushing;
    bool drawn, drawn_write; /* a request that waits for its turn */
    uint64_t drawn_offset;
};

struct load {
    const struct load_options *o;
    struct load_result *r;
    struct nbd_client_export export;
    struct connection *connections;
    uint32_t n_connections;
    int epoll; /* -1: one connection */
    struct payload payload;
    struct payload_stamps stamps;
    uint8_t *scratch;
    uint64_t begun_ns, now_ns, next_tick_ns;
    uint64_t in_flight; /* of all connections */
    bool ending;        /* nothing new is asked for */
    struct err *e;
};

/* --- asking -------------------------------------------------------------------------------- */

static void queue(struct load *l, struct connection *c, enum slot_state state, uint64_t offset)
{
    uint32_t slot = c->free_slots[--c->n_free];
    uint32_t at = c->queue_first + c->queue_len++;
    at -= at >= c->queue_cap ? c->queue_cap : 0;
    uint16_t command = state == SLOT_READ    ? NBD_CMD_READ
                       : state == SLOT_WRITE ? NBD_CMD_WRITE
                                             : NBD_CMD_FLUSH;
    uint8_t *header = c->headers + (size_t)at * NBD_REQUEST_BYTES;
    put_be32(header, NBD_REQUEST_MAGIC);
    put_be16(header + 4, state == SLOT_WRITE && l->o->fua ? NBD_CMD_FLAG_FUA : 0);
    put_be16(header + 6, command);
    put_be64(header + 8, slot);
    put_be64(header + 16, offset);
    put_be32(header + 24, state == SLOT_FLUSH ? 0 : l->o->block_size);
    c->queue[at] = slot;
    c->slots[slot] = (struct slot){l->now_ns, offset, c->next_unit, state};
    if (state == SLOT_WRITE) {
        c->next_unit += payload_units(l->o->block_size);
        c->writes_in_flight++;
    }
    if (c->in_flight++ == 0)
        c->heard_ns = l->now_ns;
    l->in_flight++;
}

static void draw(const struct load *l, struct connection *c)
{
    const struct load_options *o = l->o;
    c->drawn_write = o->reads_percent == 0 ||
                     (o->reads_percent < 100 && random_below(&c->random, 100) >= o->reads_percent);
    uint64_t place;
    if (o->sequential) {
        place = c->next_place++;
        if (c->next_place == c->n_places)
            c->next_place = 0;
    } else {
        place = random_below(&c->random, c->n_places);
    }
    c->drawn_offset = o->start + (c->first_place + place) * o->block_size;
    c->drawn = true;
}

/* Queues what may be asked for now. */
static void ask(struct load *l, struct connection *c)
{
    while (!l->ending) {
        if (l->o->flush_every && c->writes_until_flush == 0 && !c->flushing &&
            c->writes_in_flight == 0) {
            queue(l, c, SLOT_FLUSH, 0);
            c->flushing = true;
        }
        if (c->n_left == 0 || c->in_flight - c->flushing >= l->o->depth)
            return;
        if (!c->drawn)
            draw(l, c);
        if (c->drawn_write && l->o->flush_every && c->writes_until_flush == 0)
            return;
        queue(l, c, c->drawn_write ? SLOT_WRITE : SLOT_READ, c->drawn_offset);
        c->drawn = false;
        c->n_left--;
        if (c->drawn_write && l->o->flush_every)
            c->writes_until_flush--;
    }
}

/* Describes the queue, or its beginning, for one call. */
static unsigned gather(struct load *l, const struct connection *c, struct iovec *iov, size_t *bytes)
{
    unsigned n = 0;
    uint64_t from = c->first_sent;
    uint32_t at = c->queue_first;
    l->stamps.used = 0;
    *bytes = 0;
    for (uint32_t i = 0; i < c->queue_len && n + 3 <= SEND_IOVECS && *bytes < SEND_BYTES_SOFT;
         i++) {
        const struct slot *slot = &c->slots[c->queue[at]];
        uint8_t *header = c->headers + (size_t)at * NBD_REQUEST_BYTES;
        if (from < NBD_REQUEST_BYTES) {
            size_t len = (size_t)(NBD_REQUEST_BYTES - from);
            if (n > 0 && (uint8_t *)iov[n - 1].iov_base + iov[n - 1].iov_len == header)
                iov[n - 1].iov_len += len;
            else
                iov[n++] = (struct iovec){header + from, len};
            *bytes += len;
            from = NBD_REQUEST_BYTES;
        }
        if (slot->state == SLOT_WRITE) {
            uint64_t done = from - NBD_REQUEST_BYTES;
            size_t put = 0;
            n += payload_put(&l->payload, slot->first_unit, done, l->o->block_size, &l->stamps,
                             iov + n, SEND_IOVECS - n, &put);
            *bytes += put;
            if (done + put < l->o->block_size)
                break;
        }
        from = 0;
        at = at + 1 == c->queue_cap ? 0 : at + 1;
    }
    return n;
}

/* `n` bytes of the queue were sent. */
static void sent(const struct load *l, struct connection *c, size_t n)
{
    uint64_t left = c->first_sent + n;
    while (c->queue_len > 0) {
        const struct slot *slot = &c->slots[c->queue[c->queue_first]];
        uint64_t len =
            NBD_REQUEST_BYTES + (slot->state == SLOT_WRITE ? (uint64_t)l->o->block_size : 0);
        if (left < len)
            break;
        left -= len;
        c->queue_first = c->queue_first + 1 == c->queue_cap ? 0 : c->queue_first + 1;
        c->queue_len--;
    }
    c->first_sent = left;
}

static enum status lost(struct load *l, const char *doing, int error)
{
    if (error == 0 || error == EPIPE || error == ECONNRESET)
        return fail(l->e, ST_IO, "the server closed the connection");
    return fail(l->e, ST_IO, "cannot %s the server: %s", doing, strerror(error));
}

/* Sends the queue as far as the socket takes it. */
static enum status send_queue(struct load *l, struct connection *c)
{
    struct iovec iov[SEND_IOVECS];
    while (c->queue_len > 0) {
        size_t bytes;
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = gather(l, c, iov, &bytes)};
        ssize_t n = message.msg_iovlen == 1
                        ? send(c->fd, iov[0].iov_base, iov[0].iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
                        : sendmsg(c->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            return lost(l, "send to", errno);
        if (n > 0)
            sent(l, c, (size_t)n);
        if (n < 0 || (size_t)n < bytes)
            break;
    }
    bool wants = c->queue_len > 0;
    if (wants != c->wants_write && l->epoll >= 0) {
        struct epoll_event event = {.events = EPOLLIN | (wants ? (uint32_t)EPOLLOUT : 0),
                                    .data.ptr = c};
        if (epoll_ctl(l->epoll, EPOLL_CTL_MOD, c->fd, &event) != 0)
            return lost(l, "wait for", errno);
    }
    c->wants_write = wants;
    return ST_OK;
}

/* --- answers ------------------------------------------------------------------------------- */

static const char *error_name(uint32_t error)
{
    switch (error) {
    case NBD_EPERM:
        return "EPERM";
    case NBD_EIO:
        return "EIO";
    case NBD_ENOMEM:
        return "ENOMEM";
    case NBD_EINVAL:
        return "EINVAL";
    case NBD_ENOSPC:
        return "ENOSPC";
    case NBD_EOVERFLOW:
        return "EOVERFLOW";
    case NBD_ENOTSUP:
        return "ENOTSUP";
    case NBD_ESHUTDOWN:
        return "ESHUTDOWN";
    default:
        return "an unknown error";
    }
}

static void failed(struct load *l, const struct slot *slot, uint32_t error)
{
    l->ending = true;
    if (l->r->n_errors++ > 0)
        return;
    if (slot->state == SLOT_FLUSH)
        fail(l->e, ST_IO, "the server answered a FLUSH with %s (%u)", error_name(error), error);
    else
        fail(l->e, ST_IO, "the server answered a %s of %u bytes at %llu with %s (%u)",
             slot->state == SLOT_READ ? "READ" : "WRITE", l->o->block_size,
             (unsigned long long)slot->offset, error_name(error), error);
}

/* All of the reply was received. */
static void answered(struct load *l, struct connection *c, uint32_t number, bool good)
{
    struct slot *slot = &c->slots[number];
    enum load_op op = slot->state == SLOT_READ    ? LOAD_READ
                      : slot->state == SLOT_WRITE ? LOAD_WRITE
                                                  : LOAD_FLUSH;
    /* The final FLUSH is told apart. */
    if (good && (op != LOAD_FLUSH || c->flushing))
        latency_count(&l->r->op[op], l->now_ns - slot->begun_ns);
    if (op == LOAD_WRITE) {
        c->writes_in_flight--;
    } else if (op == LOAD_FLUSH && c->flushing) {
        c->flushing = false;
        c->writes_until_flush = l->o->flush_every;
    }
    slot->state = SLOT_FREE;
    c->free_slots[c->n_free++] = number;
    c->in_flight--;
    l->in_flight--;
}

static enum status take_reply(struct load *l, struct connection *c, const uint8_t *head)
{
    if (get_be32(head) != NBD_SIMPLE_REPLY_MAGIC)
        return fail(l->e, ST_IO, "the server sent something that is not a simple reply");
    uint32_t error = get_be32(head + 4);
    uint64_t cookie = get_be64(head + 8);
    if (cookie >= c->queue_cap || c->slots[cookie].state == SLOT_FREE)
        return fail(l->e, ST_IO, "the server sent a reply to a request that was not made");
    const struct slot *slot = &c->slots[cookie];
    if (error)
        failed(l, slot, error);
    if (!error && slot->state == SLOT_READ) {
        c->skip = l->o->block_size;
        c->reading = (uint32_t)cookie;
    } else {
        answered(l, c, (uint32_t)cookie, !error);
    }
    return ST_OK;
}

/* Takes in what came: `len` bytes at `at`. */
static enum status take(struct load *l, struct connection *c, const uint8_t *at, size_t len)
{
    for (;;) {
        if (c->skip > 0) {
            size_t n = (size_t)min_u64(c->skip, len);
            c->skip -= n;
            at += n;
            len -= n;
            if (c->skip == 0)
                answered(l, c, c->reading, true);
        }
        if (c->skip > 0 || len < NBD_SIMPLE_REPLY_BYTES)
            break;
        enum status st = take_reply(l, c, at);
        if (st != ST_OK)
            return st;
        at += NBD_SIMPLE_REPLY_BYTES;
        len -= NBD_SIMPLE_REPLY_BYTES;
    }
    memcpy(c->carry, at, len);
    c->carry_len = (uint32_t)len;
    return ST_OK;
}

/* Receives once, and asks for more in the places of what was answered. flags: of recv(). */
static enum status receive(struct load *l, struct connection *c, int flags)
{
    memcpy(l->scratch, c->carry, c->carry_len);
    ssize_t n = recv(c->fd, l->scratch + c->carry_len, SCRATCH_BYTES - c->carry_len, flags);
    int error = n < 0 ? errno : 0;
    l->now_ns = now_ns();
    if (error == EINTR)
        l->next_tick_ns = l->now_ns;
    if (error == EAGAIN || error == EINTR)
        return ST_OK;
    if (n <= 0)
        return lost(l, "receive from", error);
    c->heard_ns = l->now_ns;
    if (l->now_ns - l->begun_ns >= l->o->time_ns)
        l->ending = true;
    enum status st = take(l, c, l->scratch, c->carry_len + (size_t)n);
    if (st != ST_OK)
        return st;
    ask(l, c);
    return send_queue(l, c);
}

/* --- the loop ------------------------------------------------------------------------------ */

/*
 * Whatever waits is interrupted by a signal every LOAD_TICK_MS, so that it needs no time limit of
 * its own: one that is armed and disarmed for each reply was seen to cost up to a fifth of the
 * requests that go one by one.
 */
struct ticker {
    struct sigaction action;
};

static void on_alarm(int number)
{
    (void)number;
}

static void set_alarm(uint64_t us)
{
    struct timeval interval = {.tv_usec = (suseconds_t)us};
    setitimer(ITIMER_REAL, &(struct itimerval){interval, interval}, NULL);
}

static void ticker_begin(struct ticker *t)
{
    struct sigaction action = {.sa_handler = on_alarm}; /* without SA_RESTART */
    sigemptyset(&action.sa_mask);
    sigaction(SIGALRM, &action, &t->action);
    set_alarm(LOAD_TICK_MS * 1000u);
}

static void ticker_end(const struct ticker *t)
{
    set_alarm(0);
    sigaction(SIGALRM, &t->action, NULL);
}

static enum status tick(struct load *l)
{
    l->next_tick_ns = l->now_ns + LOAD_TICK_MS * NS_PER_MS;
    if (l->now_ns - l->begun_ns >= l->o->time_ns)
        l->ending = true;
    uint64_t n_requests = l->r->op[LOAD_READ].count + l->r->op[LOAD_WRITE].count;
    if (l->o->tick && !l->o->tick(l->o->arg, l->now_ns, n_requests))
        l->ending = true;
    for (uint32_t i = 0; i < l->n_connections; i++) {
        const struct connection *c = &l->connections[i];
        if (c->in_flight > 0 && l->now_ns - c->heard_ns > l->o->timeout_ns)
            return fail(l->e, ST_IO, "the server has not answered for %g s",
                        (double)l->o->timeout_ns / (double)NS_PER_S);
    }
    return ST_OK;
}

static enum status wait_one(struct load *l)
{
    struct connection *c = &l->connections[0];
    if (!c->wants_write)
        return receive(l, c, 0);
    struct pollfd ready = {.fd = c->fd, .events = POLLIN | POLLOUT};
    int n = poll(&ready, 1, -1);
    if (n < 0 && errno != EINTR)
        return lost(l, "wait for", errno);
    if (n > 0 && ready.revents & ~POLLOUT)
        return receive(l, c, MSG_DONTWAIT);
    if (n > 0)
        return send_queue(l, c);
    l->next_tick_ns = l->now_ns = now_ns();
    return ST_OK;
}

static enum status wait_some(struct load *l)
{
    struct epoll_event events[EVENTS_MAX];
    int n = epoll_wait(l->epoll, events, EVENTS_MAX, -1);
    if (n < 0 && errno != EINTR)
        return lost(l, "wait for", errno);
    if (n < 0)
        l->next_tick_ns = l->now_ns = now_ns();
    enum status st = ST_OK;
    for (int i = 0; i < n && st == ST_OK; i++) {
        struct connection *c = events[i].data.ptr;
        if (events[i].events & ~(uint32_t)EPOLLOUT)
            st = receive(l, c, MSG_DONTWAIT);
        else
            st = send_queue(l, c);
    }
    return st;
}

/* Until everything that was asked for is answered. */
static enum status finish(struct load *l)
{
    enum status st = ST_OK;
    while (st == ST_OK && l->in_flight > 0) {
        st = l->epoll < 0 ? wait_one(l) : wait_some(l);
        if (st == ST_OK && l->now_ns >= l->next_tick_ns)
            st = tick(l);
    }
    return st;
}

static enum status final_flush(struct load *l)
{
    l->ending = true;
    if (l->o->reads_percent == 100 || !(l->export.flags & NBD_FLAG_SEND_FLUSH) ||
        l->r->n_errors > 0)
        return ST_OK;
    uint64_t begun_ns = l->now_ns = now_ns();
    enum status st = ST_OK;
    for (uint32_t i = 0; i < l->n_connections && st == ST_OK; i++) {
        queue(l, &l->connections[i], SLOT_FLUSH, 0);
        st = send_queue(l, &l->connections[i]);
    }
    if (st == ST_OK)
        st = finish(l);
    l->r->flushed = true;
    l->r->final_flush_ns = l->now_ns - begun_ns;
    return st;
}

/* --- CPU time ------------------------------------------------------------------------------ */

static uint64_t client_cpu_ns(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (uint64_t)(r.ru_utime.tv_sec + r.ru_stime.tv_sec) * NS_PER_S +
           (uint64_t)(r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1000u;
}

/* What all threads of the process have used, those that have ended too: utime and stime of
 * /proc/PID/stat, but not in steps of 10 ms. False where there is no such process. */
static bool process_cpu_ns(uint32_t pid, uint64_t *ns)
{
    clockid_t clock;
    struct timespec ts;
    if (clock_getcpuclockid((pid_t)pid, &clock) != 0 || clock_gettime(clock, &ts) != 0)
        return false;
    *ns = timespec_ns(ts);
    return true;
}

/* --- setting up ---------------------------------------------------------------------------- */

/* What the server does not offer is not asked for. */
static enum status check_export(struct load *l)
{
    const struct load_options *o = l->o;
    const struct nbd_client_export *x = &l->export;
    bool writes = o->reads_percent < 100;
    uint16_t flags = x->flags & NBD_FLAG_HAS_FLAGS ? x->flags : 0;
    if (writes && (flags & NBD_FLAG_READ_ONLY))
        return fail(l->e, ST_PERM, "the export is read-only");
    if (o->flush_every && !(flags & NBD_FLAG_SEND_FLUSH))
        return fail(l->e, ST_UNSUP, "the server does not offer FLUSH, which --flush-every needs");
    if (o->fua && writes && !(flags & NBD_FLAG_SEND_FUA))
        return fail(l->e, ST_UNSUP, "the server does not offer FUA, which --fua needs");
    if (o->block_size % x->block_min || o->start % x->block_min)
        return fail(l->e, ST_UNSUP, "the server wants %s to be a multiple of %u bytes",
                    o->block_size % x->block_min ? "the size of requests" : "--start",
                    x->block_min);
    if (o->block_size > x->payload_max)
        return fail(l->e, ST_UNSUP, "the server takes requests of at most %u bytes",
                    x->payload_max);
    if (o->start > x->size || o->size > x->size - o->start)
        return fail(l->e, ST_UNSUP, "the export has only %llu bytes", (unsigned long long)x->size);
    l->r->size = o->size ? o->size : x->size - o->start;
    if (l->r->size / o->block_size < (o->sequential ? o->n_connections : 1))
        return fail(l->e, ST_UNSUP, "%llu bytes are too few for requests of %u bytes%s",
                    (unsigned long long)l->r->size, o->block_size,
                    o->sequential && o->n_connections > 1 ? " on each connection" : "");
    if (o->bytes_max && o->bytes_max / o->block_size < o->n_connections)
        return fail(l->e, ST_UNSUP, "--bytes is less than a request%s",
                    o->n_connections > 1 ? " on each connection" : "");
    return ST_OK;
}

/* The first of `n` things that part `i` of `parts` gets. */
static uint64_t part(uint64_t n, uint64_t i, uint64_t parts)
{
    return n / parts * i + min_u64(i, n % parts);
}

static void prepare(struct load *l, struct connection *c, uint32_t i)
{
    const struct load_options *o = l->o;
    uint64_t n = l->n_connections, places = l->r->size / o->block_size;
    uint64_t requests = o->bytes_max ? o->bytes_max / o->block_size : UINT64_MAX;
    c->first_place = o->sequential ? part(places, i, n) : 0;
    c->n_places = o->sequential ? part(places, i + 1, n) - c->first_place : places;
    c->n_left = o->bytes_max ? part(requests, i + 1, n) - part(requests, i, n) : UINT64_MAX;
    c->random.state = random_mix(o->seed + i);
    c->next_unit = (uint64_t)i << 48;
    c->writes_until_flush = o->flush_every;
    c->queue_cap = o->depth + 1;
    c->slots = mem_zalloc(c->queue_cap * sizeof *c->slots);
    c->queue = mem_zalloc(c->queue_cap * sizeof *c->queue);
    c->free_slots = mem_zalloc(c->queue_cap * sizeof *c->free_slots);
    c->headers = mem_zalloc((size_t)c->queue_cap * NBD_REQUEST_BYTES);
    for (uint32_t slot = c->queue_cap; slot > 0; slot--)
        c->free_slots[c->n_free++] = slot - 1;
}

static enum status connect_all(struct load *l, const struct nbd_uri *uri)
{
    for (uint32_t i = 0; i < l->o->n_connections; i++) {
        struct connection *c = &l->connections[i];
        struct nbd_client_export export;
        struct err why;
        enum status st = nbd_client_connect(uri, l->o->timeout_ns, &c->fd, &export, &why);
        if (st != ST_OK && l->o->n_connections > 1)
            return fail(l->e, st, "connection %u of %u: %s", i + 1, l->o->n_connections, why.text);
        if (st != ST_OK)
            return fail(l->e, st, "%s", why.text);
        l->n_connections++;
        if (i > 0 && (export.size != l->export.size || export.flags != l->export.flags))
            return fail(l->e, ST_IO, "connection %u of %u was given another export than the first",
                        i + 1, l->o->n_connections);
        l->export = export;
        st = i == 0 ? check_export(l) : ST_OK;
        if (st != ST_OK)
            return st;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (l->epoll >= 0 && epoll_ctl(l->epoll, EPOLL_CTL_ADD, c->fd, &event) != 0)
            return lost(l, "set up the connection to", errno);
    }
    for (uint32_t i = 0; i < l->n_connections; i++)
        prepare(l, &l->connections[i], i);
    return ST_OK;
}

static void disconnect_all(struct load *l, bool politely)
{
    uint8_t bye[NBD_REQUEST_BYTES] = {0};
    put_be32(bye, NBD_REQUEST_MAGIC);
    put_be16(bye + 6, NBD_CMD_DISC);
    for (uint32_t i = 0; i < l->n_connections; i++) {
        struct connection *c = &l->connections[i];
        /* Whether it is heard makes no difference any more. */
        if (politely && send(c->fd, bye, sizeof bye, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            politely = false;
        close(c->fd);
        free(c->slots);
        free(c->queue);
        free(c->free_slots);
        free(c->headers);
    }
}

static enum status run(struct load *l)
{
    const struct load_options *o = l->o;
    uint64_t server_begun = 0, server_ended = 0;
    if (o->server_pid && !process_cpu_ns(o->server_pid, &server_begun))
        return fail(l->e, ST_NOTFOUND, "there is no process %u", o->server_pid);
    uint64_t client_begun = client_cpu_ns();
    l->begun_ns = l->now_ns = now_ns();
    l->next_tick_ns = l->now_ns + LOAD_TICK_MS * NS_PER_MS;
    enum status st = ST_OK;
    for (uint32_t i = 0; i < l->n_connections && st == ST_OK; i++) {
        ask(l, &l->connections[i]);
        st = send_queue(l, &l->connections[i]);
    }
    if (st == ST_OK)
        st = finish(l);
    if (st == ST_OK)
        st = final_flush(l);
    l->r->elapsed_ns = l->now_ns - l->begun_ns;
    l->r->client_cpu_ns = client_cpu_ns() - client_begun;
    l->r->server_cpu_known = o->server_pid && process_cpu_ns(o->server_pid, &server_ended);
    l->r->server_cpu_ns = server_ended - server_begun;
    return st == ST_OK && l->r->n_errors > 0 ? ST_IO : st;
}

enum status load_run(const struct nbd_uri *uri, const struct load_options *o, struct load_result *r,
                     struct err *e)
{
    struct err unwanted;
    struct load l = {.o = o, .r = r, .epoll = -1, .e = e ? e : &unwanted};
    CHECK(o->depth >= 1 && o->depth <= LOAD_DEPTH_MAX);
    CHECK(o->n_connections >= 1 && o->n_connections <= LOAD_CONNECTIONS_MAX);
    CHECK(o->block_size >= LOAD_BLOCK_BYTES_MIN && o->block_size <= LOAD_BLOCK_BYTES_MAX);
    CHECK(o->reads_percent <= 100 && o->compressible <= 100);
    *r = (struct load_result){0};
    if (o->n_connections > 1) {
        l.epoll = epoll_create1(EPOLL_CLOEXEC);
        if (l.epoll < 0)
            return fail(e, ST_IO, "cannot wait for several connections: %s", strerror(errno));
    }
    l.connections = mem_zalloc(o->n_connections * sizeof *l.connections);
    l.scratch = mem_zalloc(SCRATCH_BYTES);
    enum status st = connect_all(&l, uri);
    if (st == ST_OK) {
        if (o->reads_percent < 100)
            payload_init(&l.payload, o->seed, o->compressible);
        struct ticker ticker;
        ticker_begin(&ticker);
        st = run(&l);
        ticker_end(&ticker);
    }
    disconnect_all(&l, st == ST_OK);
    payload_free(&l.payload);
    free(l.scratch);
    free(l.connections);
    if (l.epoll >= 0)
        close(l.epoll);
    return st;
}
