/*
 * Wires on real sockets, watched with uv_poll; wire.h says what they are.
 *
 * A wire with a TLS session (tls.h) looks the same from outside. The session may hold bytes that
 * no event of the socket tells of: while there may be some, an idle handle tells. It may have bytes
 * to send that no caller knows of: the wire watches for its socket itself.
 */
#include "server/wire.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <uv.h>

#include "base/check.h"
#include "base/mem.h"
#include "server/tls.h"

_Static_assert((int)WIRE_READABLE == UV_READABLE && (int)WIRE_WRITABLE == UV_WRITABLE &&
                   (int)WIRE_HANG_UP == UV_DISCONNECT,
               "what to watch for needs no translation");

struct wire {
    uv_poll_t poll;
    int fd;
    int events; /* watched for */
    bool attached;
    void (*on_events)(void *arg, int events);
    void (*detached)(void *arg);
    void *arg;
    /* With TLS only. */
    struct tls_session *tls;
    bool stands, lent;
    int polled;     /* the events, and what the session waits for */
    uv_idle_t idle; /* there when attached; runs while the session may have more to read */
    unsigned n_closing;
};

struct wire *wire_new(int fd)
{
    struct wire *w = mem_zalloc(sizeof *w);
    w->fd = fd;
    return w;
}

static void attach_idle(struct wire *w)
{
    CHECK(uv_idle_init(w->poll.loop, &w->idle) == 0);
    w->idle.data = w;
}

void wire_attach(struct wire *w, struct reactor *r, void (*on_events)(void *arg, int events),
                 void *arg)
{
    CHECK(!w->attached);
    CHECK(uv_poll_init(reactor_loop(r), &w->poll, w->fd) == 0);
    w->poll.data = w;
    w->attached = true;
    w->events = w->polled = 0;
    w->on_events = on_events;
    w->arg = arg;
    if (w->tls)
        attach_idle(w);
}

static void watch_tls(struct wire *w);

static void on_poll(uv_poll_t *handle, int status, int events)
{
    struct wire *w = handle->data;
    if (status < 0) {
        /* libuv has stopped watching it. */
        w->events = w->polled = 0;
        w->on_events(w->arg, 0);
        return;
    }
    if (w->tls && events & UV_WRITABLE) {
        if (!tls_flush(w->tls)) {
            w->on_events(w->arg, 0);
            return;
        }
        watch_tls(w);
        events &= w->events;
    }
    if (events)
        w->on_events(w->arg, events);
}

static void on_idle(uv_idle_t *handle)
{
    struct wire *w = handle->data;
    w->on_events(w->arg, WIRE_READABLE);
}

static void poll_for(struct wire *w, int events)
{
    if (events)
        CHECK(uv_poll_start(&w->poll, events, on_poll) == 0);
    else
        uv_poll_stop(&w->poll);
}

/* Something changed in what is watched for or in the session. */
static void watch_tls(struct wire *w)
{
    if (w->lent)
        return;
    int events = w->events | (tls_has_unsent(w->tls) ? WIRE_WRITABLE : 0);
    if (events != w->polled) {
        w->polled = events;
        poll_for(w, events);
    }
    if (w->events & WIRE_READABLE && tls_has_more(w->tls))
        uv_idle_start(&w->idle, on_idle);
    else
        uv_idle_stop(&w->idle);
}

void wire_watch(struct wire *w, int events)
{
    if (w->tls) {
        w->events = events;
        watch_tls(w);
        return;
    }
    if (events == w->events)
        return;
    w->events = events;
    poll_for(w, events);
}

static void on_closed(uv_handle_t *handle)
{
    struct wire *w = handle->data;
    if (--w->n_closing)
        return;
    w->attached = false;
    w->detached(w->arg);
}

void wire_detach(struct wire *w, void (*done)(void *arg))
{
    w->detached = done;
    w->n_closing = w->tls ? 2 : 1;
    uv_close((uv_handle_t *)&w->poll, on_closed);
    if (w->tls)
        uv_close((uv_handle_t *)&w->idle, on_closed);
}

ssize_t wire_receive(struct wire *w, struct iovec *iov, size_t n)
{
    if (w->tls)
        return tls_receive(w->tls, iov, n);
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = n};
    ssize_t got;
    do
        got = recvmsg(w->fd, &m, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    return got;
}

ssize_t wire_send(struct wire *w, struct iovec *iov, size_t n)
{
    if (w->tls)
        return tls_send(w->tls, iov, n);
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = n};
    ssize_t sent;
    do
        sent = sendmsg(w->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    return sent;
}

ssize_t wire_peek(struct wire *w, void *out, size_t len)
{
    if (w->tls)
        return tls_peek(w->tls, out, len);
    return recv(w->fd, out, len, MSG_PEEK | MSG_DONTWAIT);
}

bool wire_has_unread(struct wire *w)
{
    int unread = 0;
    return (w->tls && tls_has_unread(w->tls)) ||
           (ioctl(w->fd, FIONREAD, &unread) == 0 && unread > 0);
}

void wire_begin_tls(struct wire *w, struct tls_credentials *credentials)
{
    CHECK(w->attached && !w->tls);
    w->tls = tls_session_new(credentials, w->fd);
    w->polled = w->events;
    attach_idle(w);
}

enum status wire_handshake(struct wire *w, struct err *e)
{
    enum status st = tls_handshake(w->tls, e);
    w->stands = st == ST_OK;
    return st;
}

void wire_lend(struct wire *w, bool lent)
{
    CHECK(w->tls && w->lent != lent);
    w->lent = lent;
    if (!lent || !w->attached)
        return;
    w->events = w->polled = 0;
    uv_poll_stop(&w->poll);
    uv_idle_stop(&w->idle);
}

const struct tls_info *wire_tls_info(const struct wire *w)
{
    return w->stands ? tls_info(w->tls) : NULL;
}

const char *wire_tls_trouble(const struct wire *w)
{
    return w->tls ? tls_trouble(w->tls) : NULL;
}

void wire_close(struct wire *w)
{
    CHECK(!w->attached);
    if (w->tls)
        tls_session_free(w->tls);
    close(w->fd);
    free(w);
}
