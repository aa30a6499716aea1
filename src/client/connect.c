/* A connection to an NBD server; see connect.h. */
#include "client/connect.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"

/* An answer to GO that is longer, and more answers than so many, are no NBD server's. */
#define REPLY_BYTES_MAX 8192u
#define REPLIES_MAX 100u
/* The longest data of an option: the name of an export, and a little more. */
#define OPTION_BYTES_MAX (NBD_STRING_BYTES_MAX + 64u)
/* Where a server states nothing ("Size constraints"). */
#define BLOCK_MIN_UNSTATED 512u
#define REPLY_IS_ERROR 0x80000000u
#define OLDSTYLE_MAGIC 0x00420281861253ull

struct hello {
    const struct nbd_uri *uri;
    struct nbd_client_export *export;
    uint64_t deadline_ns, timeout_ns;
    int fd;
    bool no_zeroes;
};

/* Waits until the socket is ready for `events`. */
static enum status wait_ready(const struct hello *h, short events, struct err *e)
{
    for (;;) {
        uint64_t now = now_ns();
        int left_ms = now < h->deadline_ns ? (int)((h->deadline_ns - now) / NS_PER_MS) + 1 : 0;
        int n = left_ms ? poll(&(struct pollfd){.fd = h->fd, .events = events}, 1, left_ms) : 0;
        if (n > 0)
            return ST_OK;
        if (n < 0 && errno == EINTR)
            return fail(e, ST_SHUTDOWN, "interrupted while connecting");
        if (n < 0)
            return fail(e, ST_IO, "cannot wait for the server: %s", strerror(errno));
        if (!left_ms)
            return fail(e, ST_IO, "the server did not finish the handshake within %g s",
                        (double)h->timeout_ns / (double)NS_PER_S);
    }
}

static enum status closed(struct err *e)
{
    return fail(e, ST_IO, "the server closed the connection during the handshake");
}

static enum status get(const struct hello *h, void *to, size_t len, struct err *e)
{
    uint8_t *at = to;
    while (len > 0) {
        enum status st = wait_ready(h, POLLIN, e);
        if (st != ST_OK)
            return st;
        ssize_t n = recv(h->fd, at, len, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno == ECONNRESET))
            return closed(e);
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return fail(e, ST_IO, "cannot receive from the server: %s", strerror(errno));
        at += n > 0 ? n : 0;
        len -= n > 0 ? (size_t)n : 0;
    }
    return ST_OK;
}

static enum status put(const struct hello *h, const void *from, size_t len, struct err *e)
{
    const uint8_t *at = from;
    while (len > 0) {
        enum status st = wait_ready(h, POLLOUT, e);
        if (st != ST_OK)
            return st;
        ssize_t n = send(h->fd, at, len, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET))
            return closed(e);
        if (n < 0 && errno != EAGAIN && errno != EINTR)
            return fail(e, ST_IO, "cannot send to the server: %s", strerror(errno));
        at += n > 0 ? n : 0;
        len -= n > 0 ? (size_t)n : 0;
    }
    return ST_OK;
}

/* --- connecting ---------------------------------------------------------------------------- */

static enum status reach(struct hello *h, const struct sockaddr *to, socklen_t len, struct err *e)
{
    h->fd = socket(to->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (h->fd < 0)
        return fail(e, ST_IO, "cannot make a socket: %s", strerror(errno));
    int error = connect(h->fd, to, len) == 0 ? 0 : errno;
    if (error == EINPROGRESS) {
        enum status st = wait_ready(h, POLLOUT, e);
        if (st != ST_OK)
            return st;
        socklen_t size = sizeof error;
        if (getsockopt(h->fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0)
            error = errno;
    }
    const struct nbd_uri *uri = h->uri;
    /* EAGAIN: a unix socket whose queue of connections is full. */
    if (error && uri->is_unix)
        return fail(e, ST_IO, "cannot connect to %s: %s", uri->socket,
                    error == EAGAIN ? "the server takes no more connections" : strerror(error));
    if (error)
        return fail(e, ST_IO, "cannot connect to %s port %s: %s", uri->host, uri->port,
                    strerror(error));
    return ST_OK;
}

static void drop(struct hello *h)
{
    if (h->fd >= 0)
        close(h->fd);
    h->fd = -1;
}

static enum status reach_unix(struct hello *h, struct err *e)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    memcpy(to.sun_path, h->uri->socket, sizeof to.sun_path);
    return reach(h, (const struct sockaddr *)&to, sizeof to, e);
}

static enum status reach_tcp(struct hello *h, struct err *e)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int why = getaddrinfo(h->uri->host, h->uri->port, &hints, &found);
    if (why != 0)
        return fail(e, ST_IO, "cannot find the host \"%s\": %s", h->uri->host, gai_strerror(why));
    enum status st = ST_IO;
    for (struct addrinfo *a = found; a && st != ST_OK && st != ST_SHUTDOWN; a = a->ai_next) {
        drop(h);
        st = reach(h, a->ai_addr, a->ai_addrlen, e);
    }
    freeaddrinfo(found);
    int one = 1;
    if (st == ST_OK && setsockopt(h->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) != 0)
        return fail(e, ST_IO, "cannot set TCP_NODELAY: %s", strerror(errno));
    return st;
}

/* --- the handshake ------------------------------------------------------------------------- */

static enum status greet(struct hello *h, struct err *e)
{
    uint8_t greeting[NBD_GREETING_BYTES], flags[NBD_CLIENT_FLAGS_BYTES];
    enum status st = get(h, greeting, sizeof greeting, e);
    if (st != ST_OK)
        return st;
    if (get_be64(greeting) != NBD_MAGIC)
        return fail(e, ST_UNSUP, "what answers there is no NBD server");
    if (get_be64(greeting + 8) == OLDSTYLE_MAGIC)
        return fail(e, ST_UNSUP, "the server speaks the old NBD handshake only");
    uint16_t offered = get_be16(greeting + 16);
    if (get_be64(greeting + 8) != NBD_OPTION_MAGIC || !(offered & NBD_FLAG_FIXED_NEWSTYLE))
        return fail(e, ST_UNSUP, "the server does not speak the fixed newstyle handshake");
    h->no_zeroes = offered & NBD_FLAG_NO_ZEROES;
    put_be32(flags, NBD_FLAG_C_FIXED_NEWSTYLE | (h->no_zeroes ? NBD_FLAG_C_NO_ZEROES : 0));
    return put(h, flags, sizeof flags, e);
}

static enum status put_option(struct hello *h, uint32_t option, const uint8_t *data, size_t len,
                              struct err *e)
{
    uint8_t all[NBD_OPTION_HEADER_BYTES + OPTION_BYTES_MAX];
    put_be64(all, NBD_OPTION_MAGIC);
    put_be32(all + 8, option);
    put_be32(all + 12, (uint32_t)len);
    if (len > 0)
        memcpy(all + NBD_OPTION_HEADER_BYTES, data, len);
    return put(h, all, NBD_OPTION_HEADER_BYTES + len, e);
}

static enum status take_info(struct hello *h, const uint8_t *data, uint32_t len, bool *described,
                             struct err *e)
{
    uint16_t what = len >= 2 ? get_be16(data) : UINT16_MAX;
    if (what == NBD_INFO_EXPORT && len == 12) {
        h->export->size = get_be64(data + 2);
        h->export->flags = get_be16(data + 10);
        *described = true;
    } else if (what == NBD_INFO_BLOCK_SIZE && len == 14) {
        h->export->block_min = get_be32(data + 2);
        h->export->payload_max = get_be32(data + 10);
        if (h->export->block_min == 0)
            return fail(e, ST_UNSUP, "the server has blocks of 0 bytes");
    } else if (what == UINT16_MAX || what == NBD_INFO_EXPORT || what == NBD_INFO_BLOCK_SIZE) {
        return fail(e, ST_UNSUP, "the server describes the export in a way that is not NBD's");
    }
    return ST_OK;
}

/* GO or INFO was refused for a reason. */
static enum status refused(const struct hello *h, uint32_t type, const uint8_t *data, uint32_t len,
                           struct err *e)
{
    int n = (int)min_u64(len, 300);
    const char *said = n ? ": " : "";
    switch (type) {
    case NBD_REP_ERR_UNKNOWN:
        return fail(e, ST_NOTFOUND, "the server has no export \"%.200s\"%s%.*s", h->uri->export,
                    said, n, (const char *)data);
    case NBD_REP_ERR_TLS_REQD:
        return fail(e, ST_UNSUP, "the server wants TLS, which this command does not speak");
    default:
        return fail(e, ST_IO, "the server refuses the export \"%.200s\" (0x%x)%s%.*s",
                    h->uri->export, type, said, n, (const char *)data);
    }
}

static enum status not_nbd(uint32_t option, struct err *e)
{
    const char *name = option == NBD_OPT_GO                 ? "GO"
                       : option == NBD_OPT_INFO             ? "INFO"
                       : option == NBD_OPT_STRUCTURED_REPLY ? "STRUCTURED_REPLY"
                                                            : "LIST_META_CONTEXT";
    return fail(e, ST_IO, "the server answers %s in a way that is not NBD's", name);
}

/* One answer to an option. */
struct answer {
    uint32_t type, len;
    uint8_t data[REPLY_BYTES_MAX];
};

static enum status get_answer(struct hello *h, uint32_t option, struct answer *a, struct err *e)
{
    uint8_t head[NBD_OPTION_REPLY_BYTES];
    enum status st = get(h, head, sizeof head, e);
    if (st != ST_OK)
        return st;
    a->type = get_be32(head + 12);
    a->len = get_be32(head + 16);
    if (get_be64(head) != NBD_OPTION_REPLY_MAGIC || get_be32(head + 8) != option ||
        a->len > sizeof a->data)
        return not_nbd(option, e);
    return get(h, a->data, a->len, e);
}

/* GO or INFO. ST_UNSUP without a sentence: the server does not know it. */
static enum status ask(struct hello *h, uint32_t option, struct err *e)
{
    uint8_t data[NBD_STRING_BYTES_MAX + 8];
    size_t len = strlen(h->uri->export);
    put_be32(data, (uint32_t)len);
    memcpy(data + 4, h->uri->export, len);
    put_be16(data + 4 + len, 1);
    put_be16(data + 6 + len, NBD_INFO_BLOCK_SIZE);
    enum status st = put_option(h, option, data, len + 8, e);
    bool described = false;
    for (unsigned n = 0; st == ST_OK && n < REPLIES_MAX; n++) {
        struct answer a;
        st = get_answer(h, option, &a, e);
        if (st != ST_OK)
            return st;
        if (a.type == NBD_REP_ACK && described)
            return ST_OK;
        if (a.type == NBD_REP_ERR_UNSUP)
            return ST_UNSUP;
        if (a.type & REPLY_IS_ERROR)
            return refused(h, a.type, a.data, a.len, e);
        if (a.type != NBD_REP_INFO)
            return not_nbd(option, e);
        st = take_info(h, a.data, a.len, &described, e);
    }
    return st != ST_OK ? st : not_nbd(option, e);
}

/* Sends an option and takes the answers up to the last one, which may be an error: not one of ours.
 * What tells who the volume is goes to the export. */
static enum status ask_aside(struct hello *h, uint32_t option, const uint8_t *data, size_t len,
                             bool *agreed, struct err *e)
{
    static const char prefix[] = NBD_CONTEXT_IDENTITY_PREFIX;
    enum status st = put_option(h, option, data, len, e);
    for (unsigned n = 0; st == ST_OK && n < REPLIES_MAX; n++) {
        struct answer a;
        char *identity = h->export->identity;
        st = get_answer(h, option, &a, e);
        if (st != ST_OK)
            return st;
        *agreed = a.type == NBD_REP_ACK;
        if (*agreed || a.type & REPLY_IS_ERROR)
            return ST_OK;
        if (a.type == NBD_REP_META_CONTEXT && a.len >= 4 + sizeof prefix &&
            a.len - 4 < NBD_CLIENT_IDENTITY_BYTES &&
            memcmp(a.data + 4, prefix, sizeof prefix - 1) == 0 &&
            !memchr(a.data + 4, 0, a.len - 4)) {
            memcpy(identity, a.data + 4, a.len - 4);
            identity[a.len - 4] = '\0';
        }
    }
    return st != ST_OK ? st : not_nbd(option, e);
}

/* Finds out which volume it is, where the server tells such things. It may not be asked before
 * structured replies are agreed on. */
static enum status identify(struct hello *h, struct err *e)
{
    static const char query[] = NBD_NAMESPACE_OURS;
    uint8_t data[NBD_STRING_BYTES_MAX + 12 + sizeof query];
    size_t name_len = strlen(h->uri->export), query_len = sizeof query - 1;
    put_be32(data, (uint32_t)name_len);
    memcpy(data + 4, h->uri->export, name_len);
    put_be32(data + 4 + name_len, 1);
    put_be32(data + 8 + name_len, (uint32_t)query_len);
    memcpy(data + 12 + name_len, query, query_len);
    bool agreed = false;
    enum status st = ask_aside(h, NBD_OPT_STRUCTURED_REPLY, NULL, 0, &agreed, e);
    if (st == ST_OK && agreed)
        st = ask_aside(h, NBD_OPT_LIST_META_CONTEXT, data, 12 + name_len + query_len, &agreed, e);
    return st;
}

static enum status export_name(struct hello *h, struct err *e)
{
    uint8_t info[10 + NBD_EXPORT_NAME_ZEROES];
    enum status st = put_option(h, NBD_OPT_EXPORT_NAME, (const uint8_t *)h->uri->export,
                                strlen(h->uri->export), e);
    if (st == ST_OK)
        st = get(h, info, h->no_zeroes ? 10 : sizeof info, e);
    if (st != ST_OK)
        return st;
    h->export->size = get_be64(info);
    h->export->flags = get_be16(info + 8);
    return ST_OK;
}

/* Up to the answer to `option`: GO or INFO. h->fd is the caller's to close, also after an error. */
static enum status meet(struct hello *h, uint32_t option, struct err *e)
{
    *h->export = (struct nbd_client_export){.block_min = BLOCK_MIN_UNSTATED,
                                            .payload_max = NBD_PAYLOAD_BYTES_MAX};
    enum status st = h->uri->is_unix ? reach_unix(h, e) : reach_tcp(h, e);
    if (st == ST_OK)
        st = greet(h, e);
    if (st == ST_OK && option == NBD_OPT_INFO)
        st = identify(h, e);
    if (st == ST_OK)
        st = ask(h, option, e);
    if (st == ST_UNSUP && e->text[0] == '\0')
        st = export_name(h, e);
    if (st == ST_OK && h->export->size > INT64_MAX)
        st = fail(e, ST_UNSUP, "the server says that the export has %llu bytes",
                  (unsigned long long)h->export->size);
    return st;
}

static struct hello begin(const struct nbd_uri *uri, uint64_t timeout_ns,
                          struct nbd_client_export *export)
{
    return (struct hello){uri, export, now_ns() + timeout_ns, timeout_ns, -1, false};
}

/* Hands the sentence on, if anybody wants it. */
static enum status ended(enum status st, const struct err *why, struct err *e)
{
    if (st != ST_OK && e)
        *e = *why;
    return st;
}

enum status nbd_client_connect(const struct nbd_uri *uri, uint64_t timeout_ns, int *fd,
                               struct nbd_client_export *export, struct err *e)
{
    struct hello h = begin(uri, timeout_ns, export);
    struct err why = {0};
    enum status st = meet(&h, NBD_OPT_GO, &why);
    int blocking = 0;
    if (st == ST_OK && ioctl(h.fd, FIONBIO, &blocking) != 0)
        st = fail(&why, ST_IO, "cannot set up the socket: %s", strerror(errno));
    if (st != ST_OK)
        drop(&h);
    *fd = h.fd;
    return ended(st, &why, e);
}

enum status nbd_client_look(const struct nbd_uri *uri, uint64_t timeout_ns,
                            struct nbd_client_export *export, struct err *e)
{
    struct hello h = begin(uri, timeout_ns, export);
    struct err why = {0};
    enum status st = meet(&h, NBD_OPT_INFO, &why);
    /* To one that went on to transmission, which INFO does not, this is as good as any end. */
    if (st == ST_OK)
        put_option(&h, NBD_OPT_ABORT, NULL, 0, NULL);
    drop(&h);
    return ended(st, &why, e);
}
