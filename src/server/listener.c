/*
 * Listening sockets. All are non-blocking and watched by one loop; accepted sockets get
 * their options here, so that a connection need not know its family.
 */
#include "server/listener.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <uv.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"

#define BACKLOG 1024
#define ACCEPTS_PER_EVENT 64
/* A peer that does not acknowledge for so long is gone: shorter than the time after which
 * the usual clients give a request up. */
#define TCP_USER_TIMEOUT_MS 20000
#define KEEPALIVE_IDLE_S 15
#define KEEPALIVE_INTERVAL_S 5
#define KEEPALIVE_PROBES 3

struct listen_socket {
    uv_poll_t poll; /* first: the handle is the socket's memory */
    struct listeners *owner;
    int fd;
    bool is_unix, watched;
    char path[108];
    dev_t dev; /* of the socket file, to remove no other */
    ino_t ino;
    char address[LISTENER_ADDRESS_MAX];
};

struct listeners {
    struct listen_socket *sockets[LISTENER_SOCKETS_MAX];
    const char *addresses[LISTENER_SOCKETS_MAX];
    size_t n;
    bool resting;
    void (*take)(void *arg, const struct accepted *a);
    void *arg;
};

struct listeners *listeners_new(void)
{
    return mem_zalloc(sizeof(struct listeners));
}

static struct listen_socket *add_socket(struct listeners *l, int fd, bool is_unix)
{
    struct listen_socket *s = mem_zalloc(sizeof *s);
    s->owner = l;
    s->fd = fd;
    s->is_unix = is_unix;
    l->sockets[l->n] = s;
    l->addresses[l->n] = s->address;
    l->n++;
    return s;
}

/* --- Unix sockets ------------------------------------------------------------------- */

/* Removes a socket file that nobody listens on any more. */
static enum status remove_stale(const struct sockaddr_un *sa, struct err *e)
{
    struct stat st;
    if (lstat(sa->sun_path, &st) != 0)
        return ST_OK; /* nothing there; other trouble shows at the bind */
    if (!S_ISSOCK(st.st_mode))
        return fail(e, ST_UNAVAIL, "cannot listen on unix:%s: there is a file that is no socket",
                    sa->sun_path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return fail(e, ST_UNAVAIL, "cannot make a socket: %s", strerror(errno));
    int rc = connect(fd, (const struct sockaddr *)sa, sizeof *sa);
    int why = errno;
    close(fd);
    if (rc == 0 || why == EAGAIN)
        return fail(e, ST_UNAVAIL, "cannot listen on unix:%s: the address is in use by another "
                    "process", sa->sun_path);
    if (why == ECONNREFUSED && unlink(sa->sun_path) != 0)
        return fail(e, ST_UNAVAIL, "cannot remove the old socket %s: %s", sa->sun_path,
                    strerror(errno));
    return ST_OK;
}

static enum status open_unix(struct listeners *l, const char *path, struct err *e)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    size_t len = strlen(path);
    if (len == 0 || len >= sizeof sa.sun_path)
        return fail(e, ST_INVAL, "unix:%s: a socket's path has 1 to %zu bytes", path,
                    sizeof sa.sun_path - 1);
    memcpy(sa.sun_path, path, len + 1);
    enum status st = remove_stale(&sa, e);
    if (st != ST_OK)
        return st;

    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct stat file;
    if (fd < 0 || bind(fd, (struct sockaddr *)&sa, sizeof sa) != 0 || listen(fd, BACKLOG) != 0 ||
        lstat(path, &file) != 0) {
        st = fail(e, ST_UNAVAIL, "cannot listen on unix:%s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return st;
    }
    struct listen_socket *s = add_socket(l, fd, true);
    memcpy(s->path, path, len + 1);
    s->dev = file.st_dev;
    s->ino = file.st_ino;
    snprintf(s->address, sizeof s->address, "unix:%s", path);
    return ST_OK;
}

/* --- TCP ------------------------------------------------------------------------------- */

static void format_address(const struct sockaddr *sa, socklen_t len, char *out, size_t size)
{
    char host[64] = "?", port[16] = "?";
    getnameinfo(sa, len, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    bool v6 = sa->sa_family == AF_INET6;
    snprintf(out, size, v6 ? "[%s]:%s" : "%s:%s", host, port);
}

static int open_tcp_socket(const struct addrinfo *ai)
{
    int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    /* Each family has its own socket, so that ":PORT" is not taken twice. */
    if (ai->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) != 0 || listen(fd, BACKLOG) != 0) {
        int why = errno;
        close(fd);
        errno = why;
        return -1;
    }
    return fd;
}

static enum status open_tcp(struct listeners *l, const char *text, struct err *e)
{
    const char *colon = strrchr(text, ':');
    if (!colon || !colon[1])
        return fail(e, ST_INVAL, "%s: not an address to listen on (HOST:PORT or unix:PATH)", text);
    char host[256];
    size_t len = (size_t)(colon - text);
    const char *from = text;
    if (len >= 2 && from[0] == '[' && from[len - 1] == ']') {
        from++;
        len -= 2;
    } else if (memchr(from, ':', len)) {
        return fail(e, ST_INVAL, "%s: an IPv6 address stands in brackets ([::1]:10809)", text);
    }
    if (len >= sizeof host)
        return fail(e, ST_INVAL, "%s: the host's name is too long", text);
    memcpy(host, from, len);
    host[len] = '\0';

    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found;
    int rc = getaddrinfo(len ? host : NULL, colon + 1, &hints, &found);
    if (rc != 0)
        return fail(e, rc == EAI_SERVICE ? ST_INVAL : ST_UNAVAIL, "cannot listen on %s: %s", text,
                    gai_strerror(rc));

    enum status st = ST_OK;
    size_t n_before = l->n;
    int why = EADDRNOTAVAIL;
    for (const struct addrinfo *ai = found; ai && st == ST_OK; ai = ai->ai_next) {
        if (l->n == LISTENER_SOCKETS_MAX) {
            st = fail(e, ST_INVAL, "more than %u addresses to listen on", LISTENER_SOCKETS_MAX);
            break;
        }
        int fd = open_tcp_socket(ai);
        if (fd >= 0) {
            struct listen_socket *s = add_socket(l, fd, false);
            struct sockaddr_storage sa = {0};
            socklen_t sa_len = sizeof sa;
            getsockname(fd, (struct sockaddr *)&sa, &sa_len);
            format_address((struct sockaddr *)&sa, sa_len, s->address, sizeof s->address);
            continue;
        }
        why = errno;
        /* A name may stand for addresses of a family that this machine does not have. */
        if (why != EADDRNOTAVAIL && why != EAFNOSUPPORT)
            st = fail(e, ST_UNAVAIL, "cannot listen on %s: %s", text, strerror(why));
    }
    freeaddrinfo(found);
    if (st == ST_OK && l->n == n_before)
        st = fail(e, ST_UNAVAIL, "cannot listen on %s: %s", text, strerror(why));
    return st;
}

enum status listeners_open(struct listeners *l, const char *text, struct err *e)
{
    if (l->n == LISTENER_SOCKETS_MAX)
        return fail(e, ST_INVAL, "more than %u addresses to listen on", LISTENER_SOCKETS_MAX);
    if (strncmp(text, "unix:", 5) == 0)
        return open_unix(l, text + 5, e);
    return open_tcp(l, text, e);
}

/* --- accepting ---------------------------------------------------------------------------- */

static void set_tcp_options(int fd)
{
    int on = 1, timeout_ms = TCP_USER_TIMEOUT_MS;
    int idle = KEEPALIVE_IDLE_S, interval = KEEPALIVE_INTERVAL_S, probes = KEEPALIVE_PROBES;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof timeout_ms);
}

static bool is_loopback(const struct sockaddr *sa)
{
    if (sa->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)sa;
        return ntohl(in->sin_addr.s_addr) >> 24 == 127;
    }
    if (sa->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)sa;
        return IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr);
    }
    return true;
}

static void describe_peer(struct accepted *a, const struct sockaddr *sa, socklen_t len)
{
    if (!a->is_tcp) {
        snprintf(a->host, sizeof a->host, "local");
        snprintf(a->address, sizeof a->address, "unix socket");
        return;
    }
    format_address(sa, len, a->address, sizeof a->address);
    if (is_loopback(sa))
        snprintf(a->host, sizeof a->host, "local");
    else
        getnameinfo(sa, len, a->host, sizeof a->host, NULL, 0, NI_NUMERICHOST);
}

static void watch(struct listen_socket *s, bool on);

static void on_readable(uv_poll_t *handle, int status, int events)
{
    struct listen_socket *s = (struct listen_socket *)handle;
    struct listeners *l = s->owner;
    (void)events;
    if (status < 0)
        return;
    for (int i = 0; i < ACCEPTS_PER_EVENT; i++) {
        struct sockaddr_storage sa = {0};
        socklen_t len = sizeof sa;
        int fd = accept4(s->fd, (struct sockaddr *)&sa, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            struct accepted a = {.fd = fd, .is_tcp = !s->is_unix};
            describe_peer(&a, (struct sockaddr *)&sa, len);
            if (a.is_tcp)
                set_tcp_options(fd);
            l->take(l->arg, &a);
            continue;
        }
        if (errno == EAGAIN)
            return;
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            log_warning("no new connections for a moment: %s", strerror(errno));
            l->resting = true;
            for (size_t k = 0; k < l->n; k++)
                watch(l->sockets[k], false);
            return;
        }
        /* A connection that ended before it was accepted, or the like. */
    }
}

static void watch(struct listen_socket *s, bool on)
{
    if (on)
        CHECK(uv_poll_start(&s->poll, UV_READABLE, on_readable) == 0);
    else
        uv_poll_stop(&s->poll);
}

void listeners_start(struct listeners *l, uv_loop_t *loop,
                     void (*take)(void *arg, const struct accepted *a), void *arg)
{
    l->take = take;
    l->arg = arg;
    for (size_t i = 0; i < l->n; i++) {
        struct listen_socket *s = l->sockets[i];
        CHECK(uv_poll_init(loop, &s->poll, s->fd) == 0);
        s->watched = true;
        watch(s, true);
    }
}

void listeners_resume(struct listeners *l)
{
    if (!l->resting)
        return;
    l->resting = false;
    for (size_t i = 0; i < l->n; i++)
        watch(l->sockets[i], true);
}

static void on_closed(uv_handle_t *handle)
{
    struct listen_socket *s = (struct listen_socket *)handle;
    close(s->fd);
    free(s);
}

void listeners_close(struct listeners *l)
{
    if (!l)
        return;
    for (size_t i = 0; i < l->n; i++) {
        struct listen_socket *s = l->sockets[i];
        struct stat st;
        if (s->is_unix && lstat(s->path, &st) == 0 && st.st_dev == s->dev && st.st_ino == s->ino)
            unlink(s->path);
        if (s->watched) {
            uv_close((uv_handle_t *)&s->poll, on_closed);
        } else {
            close(s->fd);
            free(s);
        }
    }
    free(l);
}

const char *const *listeners_addresses(const struct listeners *l, size_t *n)
{
    *n = l->n;
    return l->addresses;
}
