/*
 * Listening sockets. All are non-blocking and watched by one loop; accepted sockets get
 * their options here, so that a connection need not know its family.
 *
 * They are opened long before they listen: whether an address can be had is known before a store
 * is made, and while one is waited for clients are refused and can try another server.
 *
 * A server that is to replace another one listens where that one still does. For TCP all our
 * sockets allow it (SO_REUSEPORT) once they listen: not before, so that without being asked
 * to replace anything the kernel refuses a second one as ever. It would deal new
 * connections out to both; a filter gives them all to the newest. A Unix socket is
 * bound under another name and moved over the old one.
 */
#include "server/listener.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/filter.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include <uv.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"

/* The kernel takes net.core.somaxconn at most. Who finds no room comes again after a second. */
#define BACKLOG 4096
#define ACCEPTS_PER_EVENT 64
/* A peer that does not acknowledge for so long is gone: shorter than the time after which
 * the usual clients give a request up. */
#define TCP_USER_TIMEOUT_MS 20000
#define KEEPALIVE_IDLE_S 15
#define KEEPALIVE_INTERVAL_S 5
#define KEEPALIVE_PROBES 3
/* The kernel takes twice that, and less where net.core.wmem_max is smaller. */
#define UNIX_SEND_BYTES (512 << 10)

struct listen_socket {
    uv_poll_t poll; /* first: the handle is the socket's memory */
    struct listeners *owner;
    int fd;
    bool is_unix, watched;
    bool replace; /* as listeners_open() was told */
    bool listens;
    bool taken; /* somebody listened there already */
    char path[108];
    char new_path[108]; /* where it is until it is moved to `path`; "" when it is there */
    dev_t dev; /* of the socket file, to remove no other */
    ino_t ino;
    char address[LISTENER_ADDRESS_MAX];
};

struct listeners {
    struct listen_socket *sockets[LISTENER_SOCKETS_MAX];
    const char *addresses[LISTENER_SOCKETS_MAX];
    size_t n;
    bool resting;
    uid_t owner; /* of the sockets; -1: whoever opens them */
    void (*take)(void *arg, const struct accepted *a);
    void *arg;
};

struct listeners *listeners_new(uid_t owner)
{
    struct listeners *l = mem_zalloc(sizeof *l);
    l->owner = owner;
    return l;
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

static enum status cannot_listen(const char *text, struct err *e)
{
    return fail(e, ST_UNAVAIL, "cannot listen on %s: %s", text, strerror(errno));
}

/* Who listens at a Unix socket: *pid, and the state of its file; 0: nobody, and a file that one
 * left behind was removed. */
static enum status find_unix_holder(const char *path, uint32_t *pid, struct stat *file,
                                    struct err *e)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    memcpy(sa.sun_path, path, strlen(path) + 1);
    *pid = 0;
    if (lstat(path, file) != 0)
        return ST_OK; /* nothing there; other trouble shows at the bind */
    if (!S_ISSOCK(file->st_mode))
        return fail(e, ST_UNAVAIL, "cannot listen on unix:%s: there is a file that is no socket",
                    path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return fail(e, ST_UNAVAIL, "cannot make a socket: %s", strerror(errno));
    int rc = connect(fd, (const struct sockaddr *)&sa, sizeof sa);
    int why = errno;
    struct ucred peer = {.pid = 0};
    socklen_t len = sizeof peer;
    if (rc == 0)
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len);
    close(fd);
    if (rc == 0 && peer.pid > 0)
        *pid = (uint32_t)peer.pid;
    else if (rc == 0 || (why != ECONNREFUSED && why != ENOENT))
        *pid = UINT32_MAX; /* somebody, who can't be made out */
    else if (why == ECONNREFUSED && unlink(path) != 0)
        return fail(e, ST_UNAVAIL, "cannot remove the old socket %s: %s", path, strerror(errno));
    return ST_OK;
}

/* Binds under a name of its own beside the socket it is to replace, and lets the same
 * clients in. */
static int bind_beside(struct listen_socket *s, struct sockaddr_un *sa, const struct stat *old)
{
    int len = snprintf(s->new_path, sizeof s->new_path, "%s.%d", s->path, (int)getpid());
    if (len < 0 || (size_t)len >= sizeof s->new_path) {
        s->new_path[0] = '\0';
        errno = ENAMETOOLONG;
        return -1;
    }
    unlink(s->new_path); /* of a process that had our id and died */
    memcpy(sa->sun_path, s->new_path, (size_t)len + 1);
    if (bind(s->fd, (struct sockaddr *)sa, sizeof *sa) != 0)
        return -1;
    /* Only root can give it away; anybody else has the right owner already, or is refused
     * because he may not end the other server. */
    if (chmod(s->new_path, old->st_mode & 07777) == 0 &&
        (lchown(s->new_path, old->st_uid, old->st_gid) == 0 || errno == EPERM))
        return 0;
    int why = errno;
    unlink(s->new_path);
    errno = why;
    return -1;
}

static enum status open_unix(struct listeners *l, const char *path, bool replace, struct err *e)
{
    size_t len = strlen(path);
    if (len == 0 || len >= sizeof ((struct sockaddr_un *)NULL)->sun_path)
        return fail(e, ST_INVAL, "unix:%s: a socket's path has 1 to %zu bytes", path,
                    sizeof ((struct sockaddr_un *)NULL)->sun_path - 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return fail(e, ST_UNAVAIL, "cannot make a socket: %s", strerror(errno));
    struct listen_socket *s = add_socket(l, fd, true);
    s->replace = replace;
    snprintf(s->address, sizeof s->address, "unix:%s", path);
    memcpy(s->path, path, len + 1);
    return ST_OK;
}

/* Whether this user can make a file in the folder that `path` is in; errno. */
static bool may_make(const char *path)
{
    const char *slash = strrchr(path, '/');
    char folder[108];
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path) : 0, path);
    return faccessat(AT_FDCWD, !slash ? "." : folder[0] ? folder : "/", W_OK | X_OK,
                     AT_EACCESS) == 0;
}

static enum status listen_unix(struct listen_socket *s, const struct sockaddr_un *sa,
                               struct err *e)
{
    struct stat file;
    if (lstat(sa->sun_path, &file) != 0 || listen(s->fd, BACKLOG) != 0)
        return cannot_listen(s->address, e);
    s->dev = file.st_dev;
    s->ino = file.st_ino;
    s->listens = true;
    return ST_OK;
}

static enum status claim_unix(struct listen_socket *s, struct err *e)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    struct stat file;
    uint32_t pid;
    enum status st = find_unix_holder(s->path, &pid, &file, e);
    if (st != ST_OK)
        return st;
    if (pid && !s->replace)
        return fail(e, ST_UNAVAIL, "cannot listen on %s: the address is in use by another process",
                    s->address);
    if (!may_make(s->path))
        return cannot_listen(s->address, e);
    s->taken = pid != 0;
    if (!s->taken)
        return ST_OK;
    if (bind_beside(s, &sa, &file) != 0)
        return cannot_listen(s->address, e);
    return listen_unix(s, &sa, e);
}

static enum status bind_unix(struct listen_socket *s, struct err *e)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    memcpy(sa.sun_path, s->path, strlen(s->path) + 1);
    if (bind(s->fd, (const struct sockaddr *)&sa, sizeof sa) != 0)
        return cannot_listen(s->address, e);
    return listen_unix(s, &sa, e);
}

enum status listeners_claim(struct listeners *l, struct err *e)
{
    enum status st = ST_OK;
    for (size_t i = 0; i < l->n && st == ST_OK; i++)
        if (l->sockets[i]->is_unix && !l->sockets[i]->listens)
            st = claim_unix(l->sockets[i], e);
    return st;
}

/* --- TCP ------------------------------------------------------------------------------- */

static void share_port(int fd)
{
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
}

/* A socket at that address, which does not listen yet; -1 and errno. */
static int open_tcp_socket(const struct addrinfo *ai, uid_t owner, bool replace, bool *taken)
{
    int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    /* The kernel shares a port among sockets of one user only. */
    if (owner != (uid_t)-1 && fchown(fd, owner, (gid_t)-1) != 0)
        log_debug("a socket stays root's: %s", strerror(errno));
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    /* Each family has its own socket, so that ":PORT" is not taken twice. */
    if (ai->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    int rc = bind(fd, ai->ai_addr, ai->ai_addrlen);
    *taken = rc != 0 && errno == EADDRINUSE && replace;
    if (*taken) {
        share_port(fd);
        rc = bind(fd, ai->ai_addr, ai->ai_addrlen);
    }
    if (rc != 0) {
        int why = errno;
        close(fd);
        errno = why;
        return -1;
    }
    if (replace)
        share_port(fd);
    return fd;
}

static enum status open_tcp(struct listeners *l, const char *text, bool replace, struct err *e)
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
    /* A bare system may have no /etc/hosts, where this name usually stands, and no name server. */
    if (rc != 0 && strcmp(host, "localhost") == 0) {
        hints.ai_flags = 0;
        rc = getaddrinfo(NULL, colon + 1, &hints, &found);
    }
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
        bool taken = false;
        int fd = open_tcp_socket(ai, l->owner, replace, &taken);
        if (fd >= 0) {
            struct listen_socket *s = add_socket(l, fd, false);
            s->taken = taken;
            s->replace = replace;
            struct sockaddr_storage sa = {0};
            socklen_t sa_len = sizeof sa;
            getsockname(fd, (struct sockaddr *)&sa, &sa_len);
            peer_format_address((struct sockaddr *)&sa, sa_len, s->address, sizeof s->address);
            continue;
        }
        why = errno;
        /* A name may stand for addresses of a family that this machine does not have. */
        if (taken)
            st = fail(e, ST_UNAVAIL, "cannot listen on %s: %s: by another program, or by a server "
                      "that another user runs", text, strerror(why));
        else if (why != EADDRNOTAVAIL && why != EAFNOSUPPORT)
            st = fail(e, ST_UNAVAIL, "cannot listen on %s: %s", text, strerror(why));
    }
    freeaddrinfo(found);
    if (st == ST_OK && l->n == n_before)
        st = fail(e, ST_UNAVAIL, "cannot listen on %s: %s", text, strerror(why));
    return st;
}

enum status listeners_open(struct listeners *l, const char *text, bool replace, struct err *e)
{
    if (l->n == LISTENER_SOCKETS_MAX)
        return fail(e, ST_INVAL, "more than %u addresses to listen on", LISTENER_SOCKETS_MAX);
    if (strncmp(text, "unix:", 5) == 0)
        return open_unix(l, text + 5, replace, e);
    return open_tcp(l, text, replace, e);
}

/* --- sockets of a service manager ------------------------------------------------------- */

static void name_unix(struct listen_socket *s, const struct sockaddr_un *sa, socklen_t len)
{
    size_t n = len > offsetof(struct sockaddr_un, sun_path)
                   ? len - offsetof(struct sockaddr_un, sun_path)
                   : 0;
    bool abstract = n > 0 && !sa->sun_path[0];
    snprintf(s->address, sizeof s->address, "unix:%s%.*s", abstract ? "@" : "",
             (int)(n - abstract), sa->sun_path + abstract);
}

static enum status inherit(struct listeners *l, int fd, struct err *e)
{
    struct sockaddr_storage sa = {0};
    socklen_t len = sizeof sa;
    if (sd_is_socket(fd, AF_UNSPEC, SOCK_STREAM, 1) <= 0 ||
        getsockname(fd, (struct sockaddr *)&sa, &len) != 0 ||
        (sa.ss_family != AF_INET && sa.ss_family != AF_INET6 && sa.ss_family != AF_UNIX))
        return fail(e, ST_INVAL, "LISTEN_FDS: descriptor %d is no TCP or Unix socket that listens "
                    "(in a .socket unit: ListenStream=, Accept=no)", fd);
    if (l->n == LISTENER_SOCKETS_MAX)
        return fail(e, ST_INVAL, "LISTEN_FDS: more than %u sockets", LISTENER_SOCKETS_MAX);
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0)
        return fail(e, ST_UNAVAIL, "LISTEN_FDS: descriptor %d can't be used: %s", fd,
                    strerror(errno));
    struct listen_socket *s = add_socket(l, fd, sa.ss_family == AF_UNIX);
    s->listens = true;
    if (s->is_unix)
        name_unix(s, (const struct sockaddr_un *)(const void *)&sa, len);
    else
        peer_format_address((const struct sockaddr *)&sa, len, s->address, sizeof s->address);
    return ST_OK;
}

enum status listeners_inherit(struct listeners *l, size_t *n, struct err *e)
{
    enum status st = ST_OK;
    /* Other threads may look at the environment just now, so it is left as it is; it names the
     * process that is meant, and the descriptors are closed on exec. */
    int found = sd_listen_fds(0);
    *n = found > 0 ? (size_t)found : 0;
    if (found < 0)
        return fail(e, ST_INVAL, "LISTEN_PID and LISTEN_FDS make no sense: %s", strerror(-found));
    for (int i = 0; i < found && st == ST_OK; i++)
        st = inherit(l, SD_LISTEN_FDS_START + i, e);
    return st;
}

/* --- who else listens there ------------------------------------------------------------ */

/* An address and port as /proc/net/tcp has them: the words of the address in hexadecimal as
 * they lie in memory. */
struct tcp_place {
    uint32_t words[4];
    size_t n_words; /* 1: IPv4, 4: IPv6 */
    unsigned port;
};

static bool place_of(int fd, struct tcp_place *p)
{
    struct sockaddr_storage sa = {0};
    socklen_t len = sizeof sa;
    if (getsockname(fd, (struct sockaddr *)&sa, &len) != 0)
        return false;
    if (sa.ss_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)&sa;
        p->n_words = 1;
        p->words[0] = in->sin_addr.s_addr;
        p->port = ntohs(in->sin_port);
        return true;
    }
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)&sa;
    p->n_words = 4;
    memcpy(p->words, &in6->sin6_addr, sizeof p->words);
    p->port = ntohs(in6->sin6_port);
    return sa.ss_family == AF_INET6;
}

/* A listening socket out of a line of /proc/net/tcp or tcp6; false where it is none. */
static bool parse_listening(const char *line, size_t n_words, struct tcp_place *p, uint64_t *inode)
{
    int at = 0, used = 0;
    unsigned state;
    if (sscanf(line, " %*[0-9]: %n", &at) < 0 || !at)
        return false;
    line += at;
    p->n_words = n_words;
    for (size_t i = 0; i < n_words; i++) {
        if (sscanf(line, "%8" SCNx32 "%n", &p->words[i], &used) != 1 || used != 8)
            return false;
        line += used;
    }
    return sscanf(line, ":%X %*[0-9A-F]:%*X %X %*s %*s %*s %*u %*u %" SCNu64, &p->port, &state,
                  inode) == 3 &&
           state == TCP_LISTEN;
}

static bool is_any(const struct tcp_place *p)
{
    for (size_t i = 0; i < p->n_words; i++)
        if (p->words[i])
            return false;
    return true;
}

static bool is_same(const struct tcp_place *a, const struct tcp_place *b)
{
    return a->port == b->port && !memcmp(a->words, b->words, a->n_words * sizeof *a->words);
}

/* Gives the inodes of others' sockets that listen where `s` is bound, up to `max`; *n_same of
 * them, counting those beyond `max` too, have exactly its address. */
static size_t tcp_holders(const struct listen_socket *s, uint64_t *inodes, size_t max,
                          size_t *n_same)
{
    struct tcp_place ours, theirs;
    struct stat self;
    uint64_t inode;
    size_t n = 0;
    *n_same = 0;
    if (!place_of(s->fd, &ours) || fstat(s->fd, &self) != 0)
        return 0;
    FILE *f = fopen(ours.n_words == 1 ? "/proc/self/net/tcp" : "/proc/self/net/tcp6", "re");
    if (!f)
        return 0;
    char *line = NULL;
    size_t cap = 0;
    while (getline(&line, &cap, f) > 0) {
        if (!parse_listening(line, ours.n_words, &theirs, &inode) || inode == self.st_ino ||
            theirs.port != ours.port)
            continue;
        bool same = is_same(&ours, &theirs);
        if (!same && !is_any(&ours) && !is_any(&theirs))
            continue;
        *n_same += same;
        if (n < max)
            inodes[n++] = inode;
    }
    free(line);
    fclose(f);
    return n;
}

static enum status unknown_holder(const struct listen_socket *s, struct err *e)
{
    return fail(e, ST_UNAVAIL, "cannot listen on %s: the address is in use by a process that can't "
                "be made out", s->address);
}

static enum status find_holders(const struct listen_socket *s, struct listen_holder *out,
                                size_t max, size_t *n, struct err *e)
{
    uint64_t inodes[LISTENER_SOCKETS_MAX];
    size_t n_same;
    if (s->is_unix) {
        struct stat file;
        uint32_t pid;
        /* Without a name of its own it is the one that listens there. */
        if (!s->new_path[0])
            return ST_OK;
        enum status st = find_unix_holder(s->path, &pid, &file, e);
        if (st != ST_OK || !pid)
            return st;
        if (pid == UINT32_MAX || *n == max)
            return unknown_holder(s, e);
        out[(*n)++] = (struct listen_holder){.address = s->address, .pid = pid};
        return ST_OK;
    }
    size_t found = tcp_holders(s, inodes, LISTENER_SOCKETS_MAX, &n_same);
    if (*n + found > max || (!found && s->taken && !s->listens))
        return unknown_holder(s, e);
    for (size_t i = 0; i < found; i++)
        out[(*n)++] = (struct listen_holder){.address = s->address, .inode = inodes[i]};
    return ST_OK;
}

enum status listeners_holders(const struct listeners *l, struct listen_holder *out, size_t max,
                              size_t *n, struct err *e)
{
    enum status st = ST_OK;
    *n = 0;
    for (size_t i = 0; i < l->n && st == ST_OK; i++)
        st = find_holders(l->sockets[i], out, max, n, e);
    return st;
}

/* --- taking over ------------------------------------------------------------------------- */

/* The kernel numbers the sockets of one address as they began to listen; a filter that says
 * `no` gives all new connections to that one. When others have gone the number is none any
 * more, and it goes back to dealing them out, to whoever is left. Where it can't be had, both
 * get some. */
static void draw_all(int fd, size_t no)
{
    struct sock_filter say_no = BPF_STMT(BPF_RET | BPF_K, (uint32_t)no);
    struct sock_fprog program = {.len = 1, .filter = &say_no};
    setsockopt(fd, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof program);
}

static enum status listen_tcp(struct listen_socket *s, struct err *e)
{
    uint64_t inode;
    size_t n_same = 0;
    if (s->replace)
        tcp_holders(s, &inode, 1, &n_same);
    if (listen(s->fd, BACKLOG) != 0)
        return cannot_listen(s->address, e);
    s->listens = true;
    share_port(s->fd);
    if (n_same)
        draw_all(s->fd, n_same);
    return ST_OK;
}

enum status listeners_listen(struct listeners *l, struct err *e)
{
    enum status st = ST_OK;
    for (size_t i = 0; i < l->n && st == ST_OK; i++)
        if (!l->sockets[i]->listens)
            st = l->sockets[i]->is_unix ? bind_unix(l->sockets[i], e)
                                        : listen_tcp(l->sockets[i], e);
    return st;
}

enum status listeners_take_names(struct listeners *l, struct err *e)
{
    for (size_t i = 0; i < l->n; i++) {
        struct listen_socket *s = l->sockets[i];
        if (!s->new_path[0])
            continue;
        if (rename(s->new_path, s->path) != 0)
            return cannot_listen(s->address, e);
        s->new_path[0] = '\0';
    }
    return ST_OK;
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

/* A long reply leaves in a few large parts instead of many small ones, each with its own wake-ups.
 * (TCP finds its own size.) */
static void set_unix_options(int fd)
{
    int bytes = UNIX_SEND_BYTES;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

static void watch(struct listen_socket *s, bool on);

static void tell_no_more(int why)
{
    struct rlimit limit;
    if (why == EMFILE && getrlimit(RLIMIT_NOFILE, &limit) == 0)
        log_warning("no new connections for a moment: this process may open %llu files, and has; to "
                    "serve more clients raise the limit (systemd: LimitNOFILE=, shell: ulimit -Hn)",
                    (unsigned long long)limit.rlim_cur);
    else
        log_warning("no new connections for a moment: %s", strerror(why));
}

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
            struct accepted a = {.fd = fd};
            peer_fill(&a.peer, fd, (struct sockaddr *)&sa, len);
            if (a.peer.way == PEER_TCP)
                set_tcp_options(fd);
            else
                set_unix_options(fd);
            l->take(l->arg, &a);
            continue;
        }
        if (errno == EAGAIN)
            return;
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            tell_no_more(errno);
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
        const char *path = s->new_path[0] ? s->new_path : s->path;
        if (path[0] && lstat(path, &st) == 0 && st.st_dev == s->dev && st.st_ino == s->ino)
            unlink(path);
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

int listeners_descriptor(const struct listeners *l, size_t i)
{
    return l->sockets[i]->fd;
}

bool listeners_is_exposed(const struct listeners *l, size_t i)
{
    const struct listen_socket *s = l->sockets[i];
    struct sockaddr_storage sa = {0};
    socklen_t len = sizeof sa;
    return !s->is_unix && (getsockname(s->fd, (struct sockaddr *)&sa, &len) != 0 ||
                           !peer_is_loopback((const struct sockaddr *)&sa));
}

bool listeners_is_loopback(const struct listeners *l, size_t i)
{
    return !l->sockets[i]->is_unix && !listeners_is_exposed(l, i);
}
