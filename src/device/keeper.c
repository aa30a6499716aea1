/* Keeps one kernel device connected; see keeper.h. */
#include "device/keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "client/connect.h"

#define HANDSHAKE_NS (5 * NS_PER_S)
#define BACKOFF_MIN_MS 100u
#define BACKOFF_MAX_MS 3000u
/* A connection may be said to be dead a moment before the kernel takes another in its place, and
 * would then not be replaced; so once more, spare ones are offered so much later. */
#define OFFER_AGAIN_MS 1000u
#define DISMISS_WAIT_MS 10000

/* The kernel asks for pages, and for so many bytes at once at least. */
#define BLOCK_BYTES_MIN 512u
#define BLOCK_BYTES_MAX 4096u
#define REQUEST_BYTES (128u << 10)

/* When a peer that is silent counts as gone. Long enough for a server that reads nothing for a
 * while. */
#define KEEPALIVE_IDLE_S 5
#define KEEPALIVE_INTERVAL_S 2
#define KEEPALIVE_PROBES 3
#define UNACKNOWLEDGED_MS 30000

/* What the kernel does only where the server says that it can, and goes on doing on every later
 * connection. */
#define FLAGS_RELIED_ON                                                                            \
    (NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES)

/* --- signals ------------------------------------------------------------------------------- */

static volatile sig_atomic_t told_to_end;

static void on_signal(int signum)
{
    (void)signum;
    told_to_end = 1;
}

static void mask_signals(int how)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(how, &set, NULL);
}

void keeper_catch_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal}; /* without SA_RESTART: waits end */
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
}

/* --- connections --------------------------------------------------------------------------- */

static uint64_t usable_size(uint64_t size, uint32_t block_size)
{
    return size / block_size * block_size;
}

/* Whether a device can be made of the export. */
static enum status check_new(const struct keeper *k, const struct nbd_client_export *x,
                             struct err *e)
{
    uint32_t block = x->block_min;
    if ((block & (block - 1)) != 0 || block > BLOCK_BYTES_MAX)
        return fail(e, ST_UNSUP,
                    "%s has blocks of %u bytes: Linux takes powers of two up to %u only",
                    k->backend, block, BLOCK_BYTES_MAX);
    if (x->payload_max < REQUEST_BYTES)
        return fail(e, ST_UNSUP, "%s takes %u bytes at once at most: Linux sends up to %u",
                    k->backend, x->payload_max, REQUEST_BYTES);
    if (x->size < BLOCK_BYTES_MAX)
        return fail(e, ST_UNSUP, "%s has %llu bytes: too few for a device", k->backend,
                    (unsigned long long)x->size);
    if (k->options->connections > 1 && !(x->flags & NBD_FLAG_CAN_MULTI_CONN))
        return fail(e, ST_UNSUP,
                    "the server of %s does not offer several connections to one client: attach it "
                    "with --connections 1",
                    k->backend);
    return ST_OK;
}

/* Whether the export is what the device was made of, as far as that shows. */
static enum status check_same(const struct keeper *k, const struct nbd_client_export *x,
                              struct err *e)
{
    if (k->record.identity[0] && x->identity[0] && strcmp(k->record.identity, x->identity) != 0)
        return fail(e, ST_CONFLICT,
                    "%s is another volume of that name now, not the one the device was made of",
                    k->backend);
    if (usable_size(x->size, k->block_size) < k->size)
        return fail(e, ST_CONFLICT,
                    "%s has %llu bytes now and the device %llu: it was shrunk or is another volume",
                    k->backend, (unsigned long long)x->size, (unsigned long long)k->size);
    if (!(k->flags & NBD_FLAG_READ_ONLY) && (x->flags & NBD_FLAG_READ_ONLY))
        return fail(e, ST_CONFLICT, "%s can only be read now, and the device is one to write to",
                    k->backend);
    if (k->flags & ~x->flags & FLAGS_RELIED_ON)
        return fail(e, ST_CONFLICT,
                    "the server of %s can't do all that it could when the device was attached",
                    k->backend);
    if (k->block_size % x->block_min != 0 || x->payload_max < REQUEST_BYTES)
        return fail(e, ST_CONFLICT,
                    "the server of %s takes other sizes of requests than when the device was "
                    "attached",
                    k->backend);
    return ST_OK;
}

/* So that a server whose machine is gone, or which lost its address to another, is noticed. */
static void set_keepalive(int fd)
{
    static const struct {
        int level, name, value;
    } all[] = {
        {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_S},
        {IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S},
        {IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_PROBES},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        setsockopt(fd, all[i].level, all[i].name, &all[i].value, sizeof all[i].value);
}

/* One connection that has reached transmission. */
static enum status connect_one(const struct keeper *k, int *fd, struct nbd_client_export *x,
                               struct err *e)
{
    mask_signals(SIG_UNBLOCK);
    enum status st = nbd_client_connect(&k->options->uri, HANDSHAKE_NS, fd, x, e);
    mask_signals(SIG_BLOCK);
    if (st == ST_OK && !k->options->uri.is_unix)
        set_keepalive(*fd);
    return st;
}

/* What the export is like now. */
static enum status look_at(const struct keeper *k, struct nbd_client_export *x, struct err *e)
{
    mask_signals(SIG_UNBLOCK);
    enum status st = nbd_client_look(&k->options->uri, HANDSHAKE_NS, x, e);
    mask_signals(SIG_BLOCK);
    return st;
}

static void close_all(int *fds, size_t n)
{
    for (size_t i = 0; i < n; i++)
        close(fds[i]);
}

/* The first connections: all, or none. *x is what the export is like, with its identity. */
static enum status connect_all(const struct keeper *k, int fds[KEEPER_CONNECTIONS_MAX],
                               struct nbd_client_export *x, struct err *e)
{
    struct nbd_client_export same;
    enum status st = look_at(k, x, e);
    if (st == ST_OK)
        st = check_new(k, x, e);
    for (uint32_t n = 0; n < k->options->connections && st == ST_OK; n++) {
        st = connect_one(k, &fds[n], &same, e);
        if (st != ST_OK)
            close_all(fds, n);
    }
    return st;
}

/* --- attaching ----------------------------------------------------------------------------- */

static struct netlink_device settings(const struct keeper *k)
{
    const struct keeper_options *o = k->options;
    return (struct netlink_device){
        .backend = k->backend,
        .size = k->size,
        .block_size = k->block_size,
        .flags = k->flags,
        .request_timeout_s = o->connections > 1 ? o->request_timeout_s : 0,
        .dead_conn_timeout_s = o->dead_conn_timeout_s,
    };
}

/* Looks for a device that the URI is attached to already. ST_BUSY: one with a keeper. k->index is
 * one without, or -1. */
static enum status find_attached(struct keeper *k, struct err *e)
{
    size_t n;
    struct sysfs_device *all = sysfs_list(&n);
    enum status st = ST_OK;
    for (size_t i = 0; i < n && st == ST_OK; i++) {
        if (!all[i].attached || strcmp(all[i].backend, k->backend) != 0)
            continue;
        k->index = all[i].index;
        uint32_t keeper = record_keeper(k->index);
        if (keeper)
            st = fail(e, ST_BUSY, "%s is attached already: it is /dev/nbd%d, kept by process %u",
                      k->backend, k->index, keeper);
    }
    free(all);
    return st;
}

static enum status attach_new(struct keeper *k, const struct nbd_client_export *x, const int *fds,
                              struct err *e)
{
    const struct keeper_options *o = k->options;
    k->index = o->index;
    k->block_size = x->block_min > BLOCK_BYTES_MIN ? x->block_min : BLOCK_BYTES_MIN;
    k->size = usable_size(x->size, k->block_size);
    k->flags = x->flags;
    if (o->read_only)
        k->flags |= NBD_FLAG_READ_ONLY;
    struct netlink_device d = settings(k);
    int error = netlink_connect(k->netlink, &k->index, &d, fds, o->connections);
    switch (error) {
    case 0:
        k->attached = true;
        return ST_OK;
    case EPERM:
        return fail(e, ST_PERM, "the kernel lets only root (CAP_SYS_ADMIN) attach devices");
    case EBUSY:
        return fail(e, ST_BUSY, "/dev/nbd%d is in use: name another device, or none", o->index);
    default:
        if (o->index < 0)
            return fail(e, ST_IO,
                        "there is no free nbd device, and the kernel makes no new one: %s",
                        strerror(error));
        return fail(e, ST_IO, "the kernel does not attach /dev/nbd%d: %s", o->index,
                    strerror(error));
    }
}

/* Goes on with what another keeper left. */
static enum status adopt(struct keeper *k, const struct nbd_client_export *x, const int *fds,
                         struct err *e)
{
    struct sysfs_device d;
    struct record left;
    sysfs_read(k->index, &d);
    if (record_read(k->index, &left) && strcmp(left.uri, k->backend) == 0)
        strcpy(k->record.identity, left.identity);
    k->block_size = d.block_size;
    k->size = d.size;
    k->flags = x->flags;
    if (d.read_only)
        k->flags |= NBD_FLAG_READ_ONLY;
    else if (k->options->read_only)
        return fail(e, ST_BUSY,
                    "/dev/nbd%d is attached to %s already, and not read-only: detach it first",
                    k->index, k->backend);
    struct err why;
    if (!d.read_only && (x->flags & NBD_FLAG_READ_ONLY))
        k->flags &= (uint16_t)~NBD_FLAG_READ_ONLY;
    if (check_same(k, x, &why) != ST_OK)
        return fail(e, why.st, "cannot go on with /dev/nbd%d: %s", k->index, why.text);
    struct netlink_device set = settings(k);
    int error = netlink_set_timeouts(k->netlink, k->index, &set);
    if (!error)
        error = netlink_give(k->netlink, k->index, k->backend, fds, k->options->connections);
    if (error)
        return fail(e, ST_IO, "cannot go on with /dev/nbd%d: %s", k->index, strerror(error));
    /* Which of its connections are dead was said to nobody. */
    k->offer = true;
    k->attached = true;
    log_info("/dev/nbd%d: going on with %s", k->index, k->backend);
    return ST_OK;
}

/* With the lock that lets nobody else attach or detach. */
static enum status attach_locked(struct keeper *k, const struct nbd_client_export *x,
                                 const int *fds, struct err *e)
{
    const struct keeper_options *o = k->options;
    enum status st = find_attached(k, e);
    if (st != ST_OK)
        return st;
    bool found = k->index >= 0;
    if (found && o->index >= 0 && o->index != k->index)
        return fail(e, ST_BUSY, "%s is attached already: it is /dev/nbd%d", k->backend, k->index);
    if (!found && o->index >= 0) {
        struct sysfs_device d;
        sysfs_read(o->index, &d);
        if (d.attached)
            return fail(e, ST_BUSY, "/dev/nbd%d is in use: it is attached to %s", o->index,
                        d.backend[0] ? d.backend : "what another program said");
    }
    st = found ? adopt(k, x, fds, e) : attach_new(k, x, fds, e);
    /* One that has not noticed yet that its device was detached by others. */
    if (st == ST_OK)
        st = keeper_dismiss(k->index, e);
    if (st == ST_OK)
        st = record_lock(k->index, &k->lock_fd, e);
    if (st != ST_OK && k->attached && !found)
        netlink_disconnect(k->netlink, k->index);
    if (st != ST_OK)
        k->attached = false;
    return st;
}

static uint64_t wall_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return timespec_ns(ts);
}

/* Tells `device list` how it is, where that has changed. */
static void note(struct keeper *k, const char *error)
{
    struct record *r = &k->record;
    if (r->since_ns && r->dead == k->dead && strcmp(r->error, error) == 0)
        return;
    if (!r->since_ns || !r->dead != !k->dead)
        r->since_ns = wall_ns();
    r->dead = k->dead;
    snprintf(r->error, sizeof r->error, "%s", error);
    record_write(k->index, r);
}

enum status keeper_attach(struct keeper *k, const struct keeper_options *options, struct err *e)
{
    *k = (struct keeper){.options = options, .index = -1, .lock_fd = -1};
    mask_signals(SIG_BLOCK);
    char text[NBD_URI_TEXT_BYTES];
    nbd_uri_format(&options->uri, text);
    if (strlen(text) > SYSFS_BACKEND_BYTES_MAX)
        return fail(e, ST_INVAL, "the URI is longer than the %u bytes that a device can bear",
                    SYSFS_BACKEND_BYTES_MAX);
    strcpy(k->backend, text);
    enum status st = netlink_open(&k->netlink, e);
    if (st != ST_OK)
        return st;
    int fds[KEEPER_CONNECTIONS_MAX], lock_fd;
    struct nbd_client_export x;
    st = connect_all(k, fds, &x, e);
    if (st != ST_OK)
        return st;
    st = record_lock_all(&lock_fd, e);
    if (st == ST_OK) {
        st = attach_locked(k, &x, fds, e);
        close(lock_fd);
    }
    close_all(fds, options->connections);
    if (st != ST_OK)
        return st;
    if (options->connections == 1)
        sysfs_set_request_check(k->index, options->resend_ms);
    strcpy(k->record.uri, k->backend);
    if (!k->record.identity[0])
        strcpy(k->record.identity, x.identity);
    k->record.connections = options->connections;
    note(k, "");
    return ST_OK;
}

void keeper_end(struct keeper *k)
{
    if (k->detached)
        record_remove(k->index);
    if (k->lock_fd >= 0)
        close(k->lock_fd);
    netlink_close(k->netlink);
}

/* --- keeping ------------------------------------------------------------------------------- */

static bool is_still_ours(const struct keeper *k)
{
    struct sysfs_device d;
    sysfs_read(k->index, &d);
    /* (Older kernels keep no backend.) */
    return d.attached && (!d.backend[0] || strcmp(d.backend, k->backend) == 0);
}

static void grow(struct keeper *k, const struct nbd_client_export *x)
{
    uint64_t size = usable_size(x->size, k->block_size);
    if (size <= k->size)
        return;
    int error = netlink_resize(k->netlink, k->index, k->backend, size);
    if (error) {
        log_warning("/dev/nbd%d: cannot grow to %llu bytes: %s", k->index, (unsigned long long)size,
                    strerror(error));
        return;
    }
    log_info("/dev/nbd%d: has grown from %llu to %llu bytes", k->index, (unsigned long long)k->size,
             (unsigned long long)size);
    k->size = size;
}

/* Makes a connection and gives it to the kernel. */
static enum status give_one(struct keeper *k, struct err *e)
{
    int fd;
    struct nbd_client_export x;
    /* A connection for the kernel can't be asked which volume it is to. */
    enum status st = look_at(k, &x, e);
    if (st == ST_OK)
        st = check_same(k, &x, e);
    if (st == ST_OK)
        st = connect_one(k, &fd, &x, e);
    if (st != ST_OK)
        return st;
    st = check_same(k, &x, e);
    int error = st == ST_OK ? netlink_give(k->netlink, k->index, k->backend, &fd, 1) : 0;
    if (error)
        st = fail(e, ST_IO, "the kernel takes no connection for /dev/nbd%d: %s", k->index,
                  strerror(error));
    close(fd);
    if (st == ST_OK)
        grow(k, &x);
    return st;
}

static void replace_dead(struct keeper *k)
{
    struct err e = {0};
    enum status st = ST_OK;
    while (k->dead > 0 && !told_to_end && (st = give_one(k, &e)) == ST_OK) {
        k->dead--;
        k->backoff_ms = 0;
        k->offer = true;
        k->look_ns = now_ns() + OFFER_AGAIN_MS * NS_PER_MS;
        log_info("/dev/nbd%d: connected again to %s", k->index, k->backend);
    }
    if (st != ST_OK && st != ST_SHUTDOWN) {
        if (strcmp(e.text, k->record.error) != 0)
            log_warning("/dev/nbd%d: trying on: %s", k->index, e.text);
        uint32_t next = k->backoff_ms ? 2 * k->backoff_ms : BACKOFF_MIN_MS;
        k->backoff_ms = next < BACKOFF_MAX_MS ? next : BACKOFF_MAX_MS;
        k->try_ns = now_ns() + k->backoff_ms * NS_PER_MS;
    }
    note(k, e.text);
}

/* Whether the export has grown; and spare connections, where it is not certain that none is needed.
 */
static void look(struct keeper *k)
{
    struct nbd_client_export x;
    struct err e = {0};
    enum status st = ST_OK;
    if (k->offer) {
        for (uint32_t i = 0; i < k->options->connections && st == ST_OK; i++)
            st = give_one(k, &e);
        k->offer = st != ST_OK;
    } else {
        st = look_at(k, &x, &e);
        if (st == ST_OK)
            st = check_same(k, &x, &e);
        if (st == ST_OK)
            grow(k, &x);
    }
    if (st == ST_CONFLICT)
        note(k, e.text);
    else if (st == ST_OK)
        note(k, "");
    k->look_ns = now_ns() + k->options->size_poll_ms * NS_PER_MS;
}

/* Takes in what the kernel says. */
static void hear(struct keeper *k)
{
    unsigned dead = netlink_dead_links(k->netlink, k->index);
    if (dead == UINT_MAX) {
        k->offer = true;
        k->look_ns = 0;
    } else if (dead > 0) {
        k->dead += dead;
        if (k->dead > k->options->connections)
            k->dead = k->options->connections;
        log_info("/dev/nbd%d: lost the connection to %s", k->index, k->backend);
        note(k, k->record.error);
    }
}

/* Memory may be short because pages can't be written to this very device: the keeper must need none
 * that is not there, wait for none to be written, and not be ended for it. */
static void stay_able(void)
{
    if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) != 0)
        log_debug("cannot lock memory: %s", strerror(errno));
#ifdef PR_SET_IO_FLUSHER
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
#endif
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "-1000", 5) != 5)
        log_debug("cannot set oom_score_adj: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
}

void keeper_run(struct keeper *k)
{
    sigset_t none;
    sigemptyset(&none);
    stay_able();
    if (!k->offer)
        k->look_ns = now_ns() + k->options->size_poll_ms * NS_PER_MS;
    while (!told_to_end) {
        hear(k);
        uint64_t now = now_ns();
        if (k->dead > 0 && now >= k->try_ns) {
            if (!is_still_ours(k))
                break;
            replace_dead(k);
            continue;
        }
        if (k->dead == 0 && now >= k->look_ns) {
            if (!is_still_ours(k))
                break;
            look(k);
            continue;
        }
        uint64_t next = k->dead > 0 ? k->try_ns : k->look_ns;
        struct timespec wait = {.tv_sec = (time_t)((next - now) / NS_PER_S),
                                .tv_nsec = (long)((next - now) % NS_PER_S)};
        struct pollfd events = {.fd = netlink_events_fd(k->netlink), .events = POLLIN};
        ppoll(&events, 1, &wait, &none);
    }
    k->detached = !is_still_ours(k);
    log_info("/dev/nbd%d: %s", k->index,
             !k->detached ? "told to end: it stays attached, and nobody replaces its connections"
                          : "is detached");
}

/* --- ending one ---------------------------------------------------------------------------- */

enum status keeper_dismiss(int index, struct err *e)
{
    uint32_t pid = record_keeper(index);
    int fd = pid ? (int)syscall(SYS_pidfd_open, (pid_t)pid, 0) : -1;
    /* It may have ended since, and its number be another's. */
    bool same = fd >= 0 && record_keeper(index) == pid;
    bool over = !same;
    if (same && syscall(SYS_pidfd_send_signal, fd, SIGTERM, NULL, 0) == 0)
        over = poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, DISMISS_WAIT_MS) > 0;
    if (fd >= 0)
        close(fd);
    return over ? ST_OK
                : fail(e, ST_BUSY, "process %u, which keeps /dev/nbd%d, does not end", pid, index);
}
