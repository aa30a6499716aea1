/*
 * The kernel's nbd devices, as it lets programs set them up: generic netlink, family "nbd"
 * (linux/nbd-netlink.h).
 *
 * Functions that ask the kernel return 0 or an errno of its own, because what that means depends on
 * what was asked and the caller has the sentence for it. One thread at a time.
 */
#ifndef DEVICE_NETLINK_H
#define DEVICE_NETLINK_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* How a device begins. */
struct netlink_device {
    const char *backend; /* what the kernel shows for it, and wants to hear with every change */
    uint64_t size;       /* bytes */
    uint32_t block_size; /* bytes; logical and physical */
    uint16_t flags;      /* transmission flags */
    /* How long a request may take until its connection is given up and it is sent again on another;
     * 0: for ever, which goes with one connection only. */
    uint32_t request_timeout_s;
    uint64_t dead_conn_timeout_s; /* for how long requests wait while there is no connection */
};

struct netlink;

/* Opens it, and from here on listens for connections that die. ST_UNAVAIL with a sentence: the
 * kernel has no nbd devices. To be closed. */
enum status netlink_open(struct netlink **out, struct err *e);
void netlink_close(struct netlink *n);

/* Makes device *index (-1: the kernel chooses, and it is told there) of connections that are in
 * transmission. The kernel keeps the sockets; the caller's descriptors are his to close. */
int netlink_connect(struct netlink *n, int *index, const struct netlink_device *d, const int *fds,
                    size_t n_fds);

/* Offers the device sockets: each takes the place of a connection that is dead. Ones for which
 * there is no such place are not kept, without an error. */
int netlink_give(struct netlink *n, int index, const char *backend, const int *fds, size_t n_fds);

/* Sets what can change later. */
int netlink_resize(struct netlink *n, int index, const char *backend, uint64_t size);
int netlink_set_timeouts(struct netlink *n, int index, const struct netlink_device *d);

/* Ends a device: all that waits fails. */
int netlink_disconnect(struct netlink *n, int index);

/* Becomes readable when there is something for netlink_dead_links(). Stays the netlink's. */
int netlink_events_fd(const struct netlink *n);

/* How many connections of the device were said to have died since it was asked last. UINT_MAX: some
 * of what was said got lost. Does not wait. */
unsigned netlink_dead_links(struct netlink *n, int index);

#endif
