/* Wires on real sockets, watched with uv_poll; wire.h says what they are. */
#include "server/wire.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <uv.h>

#include "base/check.h"
#include "base/mem.h"

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
};

struct wire *wire_new(int fd)
{
    struct wire *w = mem_zalloc(sizeof *w);
    w->fd = fd;
    return w;
}

void wire_attach(struct wire *w, struct reactor *r, void (*on_events)(void *arg, int events),
                 void *arg)
{
    CHECK(!w->attached);
    CHECK(uv_poll_init(reactor_loop(r), &w->poll, w->fd) == 0);
    w->poll.data = w;
    w->attached = true;
    w->events = 0;
    w->on_events = on_events;
    w->arg = arg;
}

static void on_poll(uv_poll_t *handle, int status, int events)
{
    struct wire *w = handle->data;
    if (status < 0) {
        /* libuv has stopped watching it. */
        w->events = 0;
        w->on_events(w->arg, 0);
    } else if (events) {
        w->on_events(w->arg, events);
    }
}

void wire_watch(struct wire *w, int events)
{
    if (events == w->events)
        return;
    w->events = events;
    if (events)
        CHECK(uv_poll_start(&w->poll, events, on_poll) == 0);
    else
        uv_poll_stop(&w->poll);
}

static void on_closed(uv_handle_t *handle)
{
    struct wire *w = handle->data;
    w->attached = false;
    w->detached(w->arg);
}

void wire_detach(struct wire *w, void (*done)(void *arg))
{
    w->detached = done;
    uv_close((uv_handle_t *)&w->poll, on_closed);
}

ssize_t wire_receive(struct wire *w, struct iovec *iov, size_t n)
{
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = n};
    ssize_t got;
    do
        got = recvmsg(w->fd, &m, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    return got;
}

ssize_t wire_send(struct wire *w, struct iovec *iov, size_t n)
{
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = n};
    ssize_t sent;
    do
        sent = sendmsg(w->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    return sent;
}

ssize_t wire_peek(struct wire *w, void *out, size_t len)
{
    return recv(w->fd, out, len, MSG_PEEK | MSG_DONTWAIT);
}

void wire_close(struct wire *w)
{
    CHECK(!w->attached);
    close(w->fd);
    free(w);
}
