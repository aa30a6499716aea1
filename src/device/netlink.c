/* The kernel's nbd devices over generic netlink; see netlink.h. */
#include "device/netlink.h"

#include <errno.h>
#include <limits.h>
#include <linux/nbd-netlink.h>
#include <netlink/genl/ctrl.h>
#include <netlink/genl/genl.h>
#include <netlink/netlink.h>

#include "base/check.h"
#include "base/mem.h"

struct netlink {
    struct nl_sock *calls, *events;
    int family;
};

/* One call under way. */
struct call {
    bool over;
    int error; /* an errno */
    int index; /* that the kernel answered; -1: none */
};

static struct nl_sock *connected_socket(void)
{
    struct nl_sock *s = nl_socket_alloc();
    CHECK(s);
    if (genl_connect(s) == 0)
        return s;
    nl_socket_free(s);
    return NULL;
}

enum status netlink_open(struct netlink **out, struct err *e)
{
    struct netlink *n = mem_zalloc(sizeof *n);
    n->calls = connected_socket();
    n->events = connected_socket();
    int group = -1;
    if (n->calls && n->events) {
        n->family = genl_ctrl_resolve(n->calls, NBD_GENL_FAMILY_NAME);
        group = genl_ctrl_resolve_grp(n->calls, NBD_GENL_FAMILY_NAME, NBD_GENL_MCAST_GROUP_NAME);
    }
    enum status st = ST_OK;
    if (!n->calls || !n->events)
        st = fail(e, ST_UNAVAIL, "cannot open a netlink socket to the kernel: %s", strerror(errno));
    else if (n->family < 0 || group < 0)
        st = fail(e, ST_UNAVAIL,
                  "the kernel has no nbd devices: load its module, as root, with \"modprobe nbd\"");
    else if (nl_socket_add_membership(n->events, group) < 0 ||
             nl_socket_set_nonblocking(n->events) < 0)
        st = fail(e, ST_UNAVAIL, "cannot listen for what the kernel says of its nbd devices");
    if (st != ST_OK) {
        netlink_close(n);
        return st;
    }
    *out = n;
    return ST_OK;
}

void netlink_close(struct netlink *n)
{
    if (!n)
        return;
    if (n->calls)
        nl_socket_free(n->calls);
    if (n->events)
        nl_socket_free(n->events);
    free(n);
}

/* --- asking -------------------------------------------------------------------------------- */

static struct nl_msg *begin(struct netlink *n, uint8_t command, int index)
{
    struct nl_msg *msg = nlmsg_alloc();
    CHECK(msg &&
          genlmsg_put(msg, NL_AUTO_PORT, NL_AUTO_SEQ, n->family, 0, 0, command, NBD_GENL_VERSION));
    if (index >= 0)
        CHECK(nla_put_u32(msg, NBD_ATTR_INDEX, (uint32_t)index) == 0);
    return msg;
}

static int on_answer(struct nl_msg *msg, void *arg)
{
    struct call *call = arg;
    struct nlattr *attrs[NBD_ATTR_MAX + 1];
    if (genlmsg_parse(nlmsg_hdr(msg), 0, attrs, NBD_ATTR_MAX, NULL) == 0 && attrs[NBD_ATTR_INDEX])
        call->index = (int)nla_get_u32(attrs[NBD_ATTR_INDEX]);
    return NL_OK;
}

static int on_ack(struct nl_msg *msg, void *arg)
{
    (void)msg;
    ((struct call *)arg)->over = true;
    return NL_STOP;
}

static int on_error(struct sockaddr_nl *from, struct nlmsgerr *error, void *arg)
{
    (void)from;
    struct call *call = arg;
    call->over = true;
    call->error = -error->error;
    return NL_STOP;
}

/* Sends the message, which is freed, and waits for what the kernel says. */
static int ask(struct netlink *n, struct nl_msg *msg, struct call *call)
{
    *call = (struct call){.index = -1};
    struct nl_cb *cb = nl_cb_alloc(NL_CB_DEFAULT);
    CHECK(cb);
    nl_cb_set(cb, NL_CB_VALID, NL_CB_CUSTOM, on_answer, call);
    nl_cb_set(cb, NL_CB_ACK, NL_CB_CUSTOM, on_ack, call);
    nl_cb_err(cb, NL_CB_CUSTOM, on_error, call);
    int sent = nl_send_auto(n->calls, msg);
    nlmsg_free(msg);
    /* The answer and the acknowledgement come one after the other. */
    while (sent >= 0 && !call->over) {
        int got = nl_recvmsgs(n->calls, cb);
        if (got < 0 && got != -NLE_INTR && !call->over)
            sent = got;
    }
    nl_cb_put(cb);
    return sent < 0 ? EIO : call->error;
}

static void put_sockets(struct nl_msg *msg, const int *fds, size_t n_fds)
{
    struct nlattr *all = nla_nest_start(msg, NBD_ATTR_SOCKETS);
    CHECK(all);
    for (size_t i = 0; i < n_fds; i++) {
        struct nlattr *item = nla_nest_start(msg, NBD_SOCK_ITEM);
        CHECK(item && nla_put_u32(msg, NBD_SOCK_FD, (uint32_t)fds[i]) == 0);
        nla_nest_end(msg, item);
    }
    nla_nest_end(msg, all);
}

static void put_timeouts(struct nl_msg *msg, const struct netlink_device *d)
{
    CHECK(nla_put_u64(msg, NBD_ATTR_TIMEOUT, d->request_timeout_s) == 0 &&
          nla_put_u64(msg, NBD_ATTR_DEAD_CONN_TIMEOUT, d->dead_conn_timeout_s) == 0);
}

int netlink_connect(struct netlink *n, int *index, const struct netlink_device *d, const int *fds,
                    size_t n_fds)
{
    struct nl_msg *msg = begin(n, NBD_CMD_CONNECT, *index);
    CHECK(nla_put_u64(msg, NBD_ATTR_SIZE_BYTES, d->size) == 0 &&
          nla_put_u64(msg, NBD_ATTR_BLOCK_SIZE_BYTES, d->block_size) == 0 &&
          nla_put_u64(msg, NBD_ATTR_SERVER_FLAGS, d->flags) == 0 &&
          nla_put_string(msg, NBD_ATTR_BACKEND_IDENTIFIER, d->backend) == 0);
    put_timeouts(msg, d);
    put_sockets(msg, fds, n_fds);
    struct call call;
    int error = ask(n, msg, &call);
    if (!error && call.index >= 0)
        *index = call.index;
    return !error && *index < 0 ? EIO : error;
}

static struct nl_msg *begin_change(struct netlink *n, int index, const char *backend)
{
    struct nl_msg *msg = begin(n, NBD_CMD_RECONFIGURE, index);
    CHECK(nla_put_string(msg, NBD_ATTR_BACKEND_IDENTIFIER, backend) == 0);
    return msg;
}

int netlink_give(struct netlink *n, int index, const char *backend, const int *fds, size_t n_fds)
{
    struct nl_msg *msg = begin_change(n, index, backend);
    put_sockets(msg, fds, n_fds);
    struct call call;
    return ask(n, msg, &call);
}

int netlink_resize(struct netlink *n, int index, const char *backend, uint64_t size)
{
    struct nl_msg *msg = begin_change(n, index, backend);
    CHECK(nla_put_u64(msg, NBD_ATTR_SIZE_BYTES, size) == 0);
    struct call call;
    return ask(n, msg, &call);
}

int netlink_set_timeouts(struct netlink *n, int index, const struct netlink_device *d)
{
    struct nl_msg *msg = begin_change(n, index, d->backend);
    put_timeouts(msg, d);
    struct call call;
    return ask(n, msg, &call);
}

int netlink_disconnect(struct netlink *n, int index)
{
    struct call call;
    return ask(n, begin(n, NBD_CMD_DISCONNECT, index), &call);
}

/* --- listening ----------------------------------------------------------------------------- */

struct deaths {
    int index;
    unsigned n;
};

static int on_event(struct nl_msg *msg, void *arg)
{
    struct deaths *deaths = arg;
    struct nlattr *attrs[NBD_ATTR_MAX + 1];
    struct nlmsghdr *head = nlmsg_hdr(msg);
    if (genlmsg_valid_hdr(head, 0) && genlmsg_hdr(head)->cmd == NBD_CMD_LINK_DEAD &&
        genlmsg_parse(head, 0, attrs, NBD_ATTR_MAX, NULL) == 0 && attrs[NBD_ATTR_INDEX] &&
        (int)nla_get_u32(attrs[NBD_ATTR_INDEX]) == deaths->index)
        deaths->n++;
    return NL_OK;
}

/* What nobody asked for answers no question. */
static int on_number(struct nl_msg *msg, void *arg)
{
    (void)msg;
    (void)arg;
    return NL_OK;
}

int netlink_events_fd(const struct netlink *n)
{
    return nl_socket_get_fd(n->events);
}

unsigned netlink_dead_links(struct netlink *n, int index)
{
    struct deaths deaths = {.index = index};
    struct nl_cb *cb = nl_cb_alloc(NL_CB_DEFAULT);
    CHECK(cb);
    nl_cb_set(cb, NL_CB_SEQ_CHECK, NL_CB_CUSTOM, on_number, NULL);
    nl_cb_set(cb, NL_CB_VALID, NL_CB_CUSTOM, on_event, &deaths);
    int got;
    do
        got = nl_recvmsgs(n->events, cb);
    while (got >= 0);
    nl_cb_put(cb);
    return got == -NLE_AGAIN ? deaths.n : UINT_MAX;
}
