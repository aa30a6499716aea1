/*
 * The simulated network; net.h says what it is like.
 *
 * A stream is two pipes. All bytes of a pipe that its reader has not read lie in one buffer;
 * how far they came is told by positions: read <= arrived <= left <= sent. One piece is on its
 * way at a time. What the hosts do (buffers, acknowledgements, resets) are events of the
 * network's own reactor and go on while processes stand still.
 */
#include "net.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"
#include "server/wire.h"

#define FIRST_FD 1000
#define LATENCY_NS_MAX 50000u
#define WAKE_NS_MAX 20000u
/* A piece that was lost is sent again after so long. */
#define AGAIN_NS_MIN 200000000u
#define AGAIN_NS_MAX 900000000u
/* When a host gives up a peer that it does not hear of. */
#define GIVE_UP_NS_MIN 20000000000u
#define GIVE_UP_NS_MAX 30000000000u
#define BUFFER_BYTES_MIN 4096u
#define BUFFER_BYTES_MAX (256u << 10)
/* What systems offer a reader who does not read, at least. */
#define WINDOW_BYTES_MIN (64u << 10)
#define NOT_YET UINT64_MAX

struct pipe {
    struct stream *stream;
    struct end *from, *to;
    uint8_t *bytes; /* [base, sent) */
    size_t cap;
    uint64_t base, read, arrived, left, sent;
    uint64_t end; /* the stream ends here; NOT_YET */
    bool end_arrived;
    bool moving;         /* [arrived, left) is on its way */
    uint64_t window;     /* the receiver's host holds so much unread */
    uint64_t send_room;  /* the sender's host takes so much unacknowledged */
};

struct end {
    struct stream *stream;
    struct pipe *in, *out;
    unsigned host;
    bool gone;      /* its process is done with it */
    bool broke_off; /* ... and not in good order: the peer is to be told by a reset */
    bool silent;    /* nothing comes from it and nothing reaches it */
    bool host_died; /* ... until its host is back */
    int error;      /* what its process hears instead of more bytes: an errno */
};

/* A wire's time on one reactor. */
struct watch {
    struct wire *wire; /* NULL: detached */
    struct sim_env *env;
    void (*on_events)(void *arg, int events);
    void (*detached)(void *arg);
    void *arg;
    int events;
    bool woken; /* a look at it is under way */
};

struct wire {
    struct end *end;
    struct watch *watch;
};

struct listener {
    struct sim_env *env;
    void (*accept)(void *arg, int fd, unsigned from_host);
    void *arg;
    bool closed;
};

struct host {
    struct listener *listener;
    bool down;
};

struct stream {
    struct list link; /* net->streams */
    struct net *net;
    struct end client, server;
    struct pipe up, down;
    unsigned n_events; /* of it, under way */
    enum { CONNECTING, ANSWERED, CONNECTED } state; /* ANSWERED: the client does not know yet */
    bool knocking;                                  /* the connect, or its answer, is under way */

    struct sim_env *client_env;
    const struct stream_events *events;
    void *arg;
    bool told, reads, woken; /* the client: connected() was called; ...; an event is under way */

    struct listener *listener;
    struct sim_env *server_env; /* the one it was accepted on */
    struct wire *wire;
    bool accepted;
    int fd;
    uint64_t silences; /* counts the times its two hosts could not hear each other */
    bool was_broken;
};

struct net {
    struct sim *sim;
    struct sim_env *env;
    struct list streams;
    struct host hosts[NET_HOSTS_MAX];
    bool cut[NET_HOSTS_MAX][NET_HOSTS_MAX];
    struct stream **by_fd;
    size_t n_fds, cap_fds;
    uint64_t latency_ns_max;
    uint32_t loss_one_in;
};

static struct net *the_net;

static void wake(struct end *e);
static void transmit(struct pipe *p);
static void knock(struct stream *s);

/* --- streams -------------------------------------------------------------------------- */

static void pipe_init(struct pipe *p, struct stream *s, struct end *from, struct end *to)
{
    struct sim *sim = s->net->sim;
    *p = (struct pipe){.stream = s, .from = from, .to = to, .end = NOT_YET};
    from->out = p;
    to->in = p;
    p->window = (uint64_t)WINDOW_BYTES_MIN << sim_below(sim, 3);
    p->send_room = (uint64_t)BUFFER_BYTES_MIN << sim_below(sim, 7);
    CHECK(p->window <= BUFFER_BYTES_MAX && p->send_room <= BUFFER_BYTES_MAX);
}

static void pipe_put(struct pipe *p, const void *data, size_t len)
{
    size_t have = (size_t)(p->sent - p->base);
    if (!len)
        return;
    if (have + len > p->cap && p->read > p->base) {
        have = (size_t)(p->sent - p->read);
        memmove(p->bytes, p->bytes + (p->read - p->base), have);
        p->base = p->read;
    }
    mem_grow(&p->bytes, &p->cap, have + len, 1);
    memcpy(p->bytes + have, data, len);
    p->sent += len;
}

static const uint8_t *pipe_unread(const struct pipe *p, size_t *len)
{
    *len = (size_t)(p->arrived - p->read);
    return p->bytes + (p->read - p->base);
}

static void pipe_took(struct pipe *p, size_t len)
{
    p->read += len;
    if (p->read == p->sent)
        p->base = p->read;
    transmit(p);
}

/* Nothing more of it arrives. */
static void pipe_cut_off(struct pipe *p)
{
    p->sent = p->left = p->arrived;
}

static void stream_settle(struct stream *s)
{
    if (s->state == CONNECTING && s->client.gone && !s->knocking)
        s->server.gone = true;
    if (s->n_events || !s->client.gone || !s->server.gone || s->wire)
        return;
    list_remove(&s->link);
    if (s->fd)
        s->net->by_fd[s->fd - FIRST_FD] = NULL;
    free(s->up.bytes);
    free(s->down.bytes);
    free(s);
}

static bool is_broken(const struct stream *s)
{
    const struct net *net = s->net;
    if (s->client.silent || s->server.silent || net->cut[s->client.host][s->server.host])
        return true;
    return s->state == CONNECTING && net->hosts[s->server.host].down;
}

static uint64_t latency_ns(struct net *net)
{
    if (net->loss_one_in && sim_one_in(net->sim, net->loss_one_in))
        return AGAIN_NS_MIN + sim_below(net->sim, AGAIN_NS_MAX - AGAIN_NS_MIN);
    return sim_delay_ns(net->sim, net->latency_ns_max);
}

static void event_over(struct stream *s)
{
    s->n_events--;
    stream_settle(s);
}

/* An event of the network about this stream, which ends with event_over(). */
static void stream_event(struct stream *s, uint64_t delay_ns, void (*fn)(void *arg), void *arg)
{
    s->n_events++;
    sim_at(s->net->env, delay_ns, fn, arg);
}

/* The process hears of no more than what arrived, and an error. */
static void end_break(struct end *e, int error)
{
    if (e->error || e->gone)
        return;
    e->error = error;
    pipe_cut_off(e->out);
    pipe_cut_off(e->in);
    wake(e);
}

static void reset_arrives(void *arg)
{
    struct end *e = arg;
    if (!is_broken(e->stream))
        end_break(e, ECONNRESET);
    event_over(e->stream);
}

/* Tells the peer of this end that there is nobody. */
static void send_reset(struct end *from)
{
    struct stream *s = from->stream;
    struct end *to = from == &s->client ? &s->server : &s->client;
    if (!to->gone && !to->error)
        stream_event(s, latency_ns(s->net), reset_arrives, to);
}

struct patience {
    struct end *end;
    uint64_t silences;
};

static void give_up(void *arg)
{
    struct patience *p = arg;
    struct stream *s = p->end->stream;
    if (is_broken(s) && s->silences == p->silences)
        end_break(p->end, ETIMEDOUT);
    free(p);
    event_over(s);
}

static void begin_to_give_up(struct end *e)
{
    struct stream *s = e->stream;
    if (e->gone || e->error)
        return;
    struct patience *p = mem_alloc(sizeof *p);
    *p = (struct patience){e, s->silences};
    uint64_t span = GIVE_UP_NS_MAX - GIVE_UP_NS_MIN;
    stream_event(s, GIVE_UP_NS_MIN + sim_below(s->net->sim, span), give_up, p);
}

/* The path between its hosts broke, or is there again. */
static void path_changed(struct stream *s)
{
    bool broken = is_broken(s);
    if (broken && !s->was_broken) {
        s->silences++;
        begin_to_give_up(&s->client);
        begin_to_give_up(&s->server);
    }
    s->was_broken = broken;
    if (broken)
        return;
    knock(s);
    transmit(&s->up);
    transmit(&s->down);
    if (s->client.broke_off)
        send_reset(&s->client);
    if (s->server.broke_off)
        send_reset(&s->server);
}

static void paths_changed(struct net *net)
{
    list_for_each_safe (l, next, &net->streams)
        path_changed(container_of(l, struct stream, link));
}

/* --- bytes on their way ------------------------------------------------------------------- */

static void arrive(void *arg)
{
    struct pipe *p = arg;
    struct stream *s = p->stream;
    p->moving = false;
    if (is_broken(s)) {
        p->left = p->arrived; /* to be sent again */
    } else if (p->to->gone || p->to->error) {
        if (p->left > p->arrived)
            send_reset(p->to);
        p->read = p->arrived = p->left;
        p->end_arrived = p->left == p->end;
        transmit(p);
    } else {
        p->arrived = p->left;
        p->end_arrived = p->left == p->end;
        wake(p->to);
        if (p->from == &s->server)
            wake(p->from); /* there is room again */
        transmit(p);
    }
    event_over(s);
}

static void transmit(struct pipe *p)
{
    struct stream *s = p->stream;
    struct sim *sim = s->net->sim;
    if (p->moving || s->state != CONNECTED || is_broken(s) || p->from->error)
        return;
    if (p->left == p->sent) {
        if (p->end != p->left || p->end_arrived)
            return;
    } else {
        uint64_t room = p->window - (p->left - p->read), n = p->sent - p->left;
        if (!room)
            return;
        if (n > room)
            n = room;
        /* Often all that there is; else a packet, or any part. */
        uint64_t kind = sim_below(sim, 8);
        if (kind == 0)
            n = 1 + sim_below(sim, n);
        else if (kind == 1 && n > 1448)
            n = 1448;
        p->left += n;
    }
    p->moving = true;
    stream_event(s, latency_ns(s->net), arrive, p);
}

/* --- the end of a stream -------------------------------------------------------------------- */

static void end_gone(struct end *e)
{
    e->gone = true;
    pipe_took(e->in, (size_t)(e->in->arrived - e->in->read));
}

static void end_reset(struct end *e)
{
    /* What is on its way may come before the reset or not at all. */
    e->out->sent = e->out->left;
    end_gone(e);
    e->broke_off = true;
    send_reset(e);
}

static void end_close(struct end *e)
{
    e->out->end = e->out->sent;
    end_gone(e);
    transmit(e->out);
}

/* Its process was killed: the host closes it. */
static void end_kill(struct end *e)
{
    struct stream *s = e->stream;
    struct pipe *p = e->out;
    struct sim *sim = s->net->sim;
    bool unread = e->in->arrived > e->in->read;
    if (e->error) {
        end_gone(e);
    } else if (unread || s->state != CONNECTED || sim_one_in(sim, 4)) {
        end_reset(e);
    } else {
        p->sent = p->left;
        end_close(e);
    }
}

/* --- the client's end ------------------------------------------------------------------------- */

static void client_closed(struct stream *s, bool reset)
{
    if (s->client.error)
        end_gone(&s->client);
    else
        end_close(&s->client);
    s->events->closed(s->arg, reset);
}

static void client_event(void *arg)
{
    struct stream *s = arg;
    struct pipe *p = &s->down;
    s->woken = false;
    if (!s->client.gone && s->state == CONNECTED && !s->told) {
        s->told = true;
        s->events->connected(s->arg);
    }
    size_t len;
    const uint8_t *bytes = pipe_unread(p, &len);
    if (!s->client.gone && s->reads && len) {
        s->events->data(s->arg, bytes, len);
        if (!s->client.gone)
            pipe_took(p, len);
    }
    if (!s->client.gone && p->read == p->arrived) {
        if (s->client.error)
            client_closed(s, true);
        else if (p->end_arrived)
            client_closed(s, false);
    }
    event_over(s);
}

static void wake_client(struct stream *s)
{
    if (s->woken || s->client.gone)
        return;
    s->woken = true;
    s->n_events++;
    sim_at(s->client_env, sim_delay_ns(s->net->sim, WAKE_NS_MAX), client_event, s);
}

void stream_send(struct stream *s, const void *bytes, size_t len)
{
    CHECK(!s->client.gone);
    if (s->client.error)
        return;
    pipe_put(&s->up, bytes, len);
    transmit(&s->up);
}

uint64_t stream_unsent(const struct stream *s)
{
    return s->up.sent - s->up.arrived;
}

void stream_read(struct stream *s, bool on)
{
    s->reads = on;
    if (on)
        wake_client(s);
}

void stream_close(struct stream *s)
{
    CHECK(!s->client.gone);
    if (s->client.error)
        end_gone(&s->client);
    else
        end_close(&s->client);
    stream_settle(s);
}

void stream_kill(struct stream *s)
{
    CHECK(!s->client.gone);
    end_kill(&s->client);
    stream_settle(s);
}

void stream_vanish(struct stream *s)
{
    CHECK(!s->client.gone);
    s->client.silent = true;
    pipe_cut_off(&s->up);
    end_gone(&s->client);
    path_changed(s);
    stream_settle(s);
}

/* --- connecting ------------------------------------------------------------------------------ */

static void accept_event(void *arg)
{
    struct stream *s = arg;
    struct listener *l = s->listener;
    if (l->closed) {
        if (!s->server.gone)
            end_reset(&s->server);
    } else if (!s->server.gone) {
        s->accepted = true;
        l->accept(l->arg, s->fd, s->client.host);
    }
    event_over(s);
}

static void knocked(void *arg)
{
    struct stream *s = arg;
    struct net *net = s->net;
    s->knocking = false;
    if (is_broken(s)) {
        path_changed(s);
    } else if (s->state == ANSWERED) {
        s->state = CONNECTED;
        wake(&s->client);
        transmit(&s->up);
        transmit(&s->down);
    } else if (s->client.gone) {
        s->server.gone = true;
    } else if (!net->hosts[s->server.host].listener) {
        s->server.gone = true;
        end_break(&s->client, ECONNREFUSED);
    } else {
        s->listener = net->hosts[s->server.host].listener;
        s->server_env = s->listener->env;
        s->state = ANSWERED;
        mem_grow(&net->by_fd, &net->cap_fds, net->n_fds + 1, sizeof *net->by_fd);
        net->by_fd[net->n_fds++] = s;
        s->fd = FIRST_FD + (int)net->n_fds - 1;
        s->n_events++;
        sim_at(s->server_env, sim_delay_ns(net->sim, WAKE_NS_MAX), accept_event, s);
        knock(s);
    }
    event_over(s);
}

/* The connect is on its way, or its answer. */
static void knock(struct stream *s)
{
    if (s->state == CONNECTED || s->knocking || s->client.error || is_broken(s))
        return;
    s->knocking = true;
    stream_event(s, latency_ns(s->net), knocked, s);
}

struct stream *net_connect(struct net *net, struct sim_env *env, unsigned from_host,
                           unsigned to_host, const struct stream_events *events, void *arg)
{
    CHECK(from_host < NET_HOSTS_MAX && to_host < NET_HOSTS_MAX);
    struct stream *s = mem_zalloc(sizeof *s);
    s->net = net;
    s->client_env = env;
    s->events = events;
    s->arg = arg;
    s->reads = true;
    s->client.stream = s->server.stream = s;
    s->client.host = from_host;
    s->server.host = to_host;
    pipe_init(&s->up, s, &s->client, &s->server);
    pipe_init(&s->down, s, &s->server, &s->client);
    list_add_tail(&net->streams, &s->link);
    path_changed(s);
    return s;
}

/* --- wires ------------------------------------------------------------------------------------ */

static int readiness(const struct end *e)
{
    const struct pipe *out = e->out;
    uint64_t room = out->send_room - (out->sent - out->arrived);
    return (e->in->arrived > e->in->read || e->in->end_arrived ? WIRE_READABLE : 0) |
           (room >= out->send_room / 2 ? WIRE_WRITABLE : 0) |
           (e->in->end_arrived ? WIRE_HANG_UP : 0);
}

static void wake_wire(struct wire *w);

static void look(void *arg)
{
    struct watch *watch = arg;
    watch->woken = false;
    struct wire *w = watch->wire;
    if (!w) {
        if (!watch->detached)
            free(watch);
        return;
    }
    if (w->end->error && watch->events) {
        watch->events = 0;
        watch->on_events(watch->arg, 0);
        return;
    }
    int events = watch->events & readiness(w->end);
    if (!events)
        return;
    /* It stays until it is detached, and then until this is over. */
    watch->woken = true;
    watch->on_events(watch->arg, events);
    watch->woken = false;
    if (watch->wire)
        wake_wire(watch->wire);
}

static void wake_wire(struct wire *w)
{
    struct watch *watch = w->watch;
    if (!watch || watch->woken || !watch->events)
        return;
    if (!w->end->error && !(watch->events & readiness(w->end)))
        return;
    watch->woken = true;
    struct sim *sim = w->end->stream->net->sim;
    sim_at(watch->env, sim_delay_ns(sim, WAKE_NS_MAX), look, watch);
}

static void wake(struct end *e)
{
    struct stream *s = e->stream;
    if (e == &s->client)
        wake_client(s);
    else if (s->wire)
        wake_wire(s->wire);
}

struct wire *wire_new(int fd)
{
    CHECK(fd >= FIRST_FD && (size_t)(fd - FIRST_FD) < the_net->n_fds);
    struct stream *s = the_net->by_fd[fd - FIRST_FD];
    CHECK(s && s->accepted && !s->wire);
    struct wire *w = mem_zalloc(sizeof *w);
    w->end = &s->server;
    s->wire = w;
    return w;
}

void wire_attach(struct wire *w, struct reactor *r, void (*on_events)(void *arg, int events),
                 void *arg)
{
    CHECK(!w->watch);
    w->watch = mem_zalloc(sizeof *w->watch);
    w->watch->wire = w;
    w->watch->env = container_of(reactor_env(r), struct sim_env, base);
    w->watch->on_events = on_events;
    w->watch->arg = arg;
}

void wire_watch(struct wire *w, int events)
{
    w->watch->events = events;
    wake_wire(w);
}

static void detached(void *arg)
{
    struct watch *watch = arg;
    void (*done)(void *of) = watch->detached;
    void *of = watch->arg;
    watch->detached = NULL;
    if (!watch->woken)
        free(watch);
    done(of);
}

void wire_detach(struct wire *w, void (*done)(void *arg))
{
    struct watch *watch = w->watch;
    CHECK(watch && done);
    w->watch = NULL;
    watch->wire = NULL;
    watch->detached = done;
    sim_at(watch->env, 0, detached, watch);
}

static size_t copy_unread(struct end *e, const struct iovec *iov, size_t n)
{
    size_t have, taken = 0;
    const uint8_t *bytes = pipe_unread(e->in, &have);
    for (size_t i = 0; i < n && taken < have; i++) {
        size_t part = iov[i].iov_len < have - taken ? iov[i].iov_len : have - taken;
        memcpy(iov[i].iov_base, bytes + taken, part);
        taken += part;
    }
    return taken;
}

static ssize_t receive(struct wire *w, const struct iovec *iov, size_t n, bool take)
{
    struct end *e = w->end;
    size_t got = copy_unread(e, iov, n);
    if (got) {
        if (take)
            pipe_took(e->in, got);
        return (ssize_t)got;
    }
    if (e->error) {
        errno = e->error;
        return -1;
    }
    if (e->in->end_arrived && e->in->read == e->in->arrived)
        return 0;
    errno = EAGAIN;
    return -1;
}

ssize_t wire_receive(struct wire *w, struct iovec *iov, size_t n)
{
    return receive(w, iov, n, true);
}

ssize_t wire_peek(struct wire *w, void *out, size_t len)
{
    return receive(w, &(struct iovec){out, len}, 1, false);
}

bool wire_has_unread(struct wire *w)
{
    size_t have;
    pipe_unread(w->end->in, &have);
    return have > 0;
}

ssize_t wire_send(struct wire *w, struct iovec *iov, size_t n)
{
    struct pipe *p = w->end->out;
    if (w->end->error) {
        errno = EPIPE;
        return -1;
    }
    uint64_t room = p->send_room - (p->sent - p->arrived);
    size_t sent = 0;
    for (size_t i = 0; i < n && room; i++) {
        size_t part = iov[i].iov_len < room ? iov[i].iov_len : (size_t)room;
        pipe_put(p, iov[i].iov_base, part);
        sent += part;
        room -= part;
    }
    if (!sent) {
        errno = EAGAIN;
        return -1;
    }
    transmit(p);
    return (ssize_t)sent;
}

void wire_close(struct wire *w)
{
    struct end *e = w->end;
    struct stream *s = e->stream;
    CHECK(!w->watch);
    s->wire = NULL;
    free(w);
    if (!e->gone) {
        if (e->error)
            end_gone(e);
        else if (e->in->arrived > e->in->read)
            end_reset(e);
        else
            end_close(e);
    }
    stream_settle(s);
}

/* --- hosts -------------------------------------------------------------------------------------- */

struct net *net_new(struct sim *sim)
{
    struct net *net = mem_zalloc(sizeof *net);
    net->sim = sim;
    net->env = sim_env_new(sim);
    net->env->name = "network";
    net->latency_ns_max = LATENCY_NS_MAX;
    list_init(&net->streams);
    the_net = net;
    return net;
}

struct sim *net_sim(const struct net *net)
{
    return net->sim;
}

void net_set_delays(struct net *net, uint64_t latency_ns_max, uint32_t loss_one_in)
{
    net->latency_ns_max = latency_ns_max;
    net->loss_one_in = loss_one_in;
}

void net_listen(struct net *net, unsigned host, struct sim_env *env,
                void (*accept)(void *arg, int fd, unsigned from_host), void *arg)
{
    CHECK(host < NET_HOSTS_MAX);
    struct host *h = &net->hosts[host];
    if (!accept) {
        if (h->listener && h->listener->env == env) {
            h->listener->closed = true;
            h->listener = NULL;
        }
        return;
    }
    /* (The one before stays for those that it has not accepted yet.) */
    struct listener *l = mem_zalloc(sizeof *l);
    *l = (struct listener){.env = env, .accept = accept, .arg = arg};
    h->listener = l;
    if (!h->down)
        return;
    h->down = false;
    list_for_each (s, &net->streams) {
        struct stream *stream = container_of(s, struct stream, link);
        if (stream->server.host == host && stream->server.host_died) {
            stream->server.silent = false;
            stream->server.broke_off = true;
        }
    }
    paths_changed(net);
}

void net_cut(struct net *net, unsigned host, unsigned other_host, bool cut)
{
    CHECK(host < NET_HOSTS_MAX && other_host < NET_HOSTS_MAX && host != other_host);
    net->cut[host][other_host] = net->cut[other_host][host] = cut;
    paths_changed(net);
}

static bool is_one_of(const struct sim_env *env, struct sim_env *const *envs, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (envs[i] == env)
            return true;
    return false;
}

void net_process_died(struct net *net, struct sim_env *const *envs, size_t n, bool host_too)
{
    for (unsigned i = 0; i < NET_HOSTS_MAX; i++) {
        struct host *h = &net->hosts[i];
        if (!h->listener || !is_one_of(h->listener->env, envs, n))
            continue;
        h->listener->closed = true;
        h->listener = NULL;
        h->down = host_too;
    }
    list_for_each_safe (l, next, &net->streams) {
        struct stream *s = container_of(l, struct stream, link);
        struct end *e = &s->server;
        if (!s->server_env || !is_one_of(s->server_env, envs, n))
            continue;
        s->wire = NULL;
        if (e->gone)
            continue;
        if (host_too) {
            e->silent = e->host_died = true;
            pipe_cut_off(e->out);
            end_gone(e);
            path_changed(s);
        } else {
            end_kill(e);
        }
        stream_settle(s);
    }
}
