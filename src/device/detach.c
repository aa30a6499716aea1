/* Ending a kernel device; see detach.h. */
#include "device/detach.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "device/keeper.h"

#define GONE_WAIT_NS (10 * NS_PER_S)
/* A device that was torn from its users is not waited for. */
#define FORCED_WAIT_NS (NS_PER_S / 2)
#define GONE_LOOK_US 10000

/* The kernel takes a device apart after the last of its users. */
static bool is_gone(int index, uint64_t wait_ns)
{
    struct sysfs_device d;
    uint64_t until = now_ns() + wait_ns;
    for (;;) {
        sysfs_read(index, &d);
        if (!d.attached || now_ns() >= until)
            return !d.attached;
        usleep(GONE_LOOK_US);
    }
}

static enum status detach_locked(int index, bool force, bool *lingers, struct err *e)
{
    struct netlink *netlink;
    enum status st = netlink_open(&netlink, e);
    if (st != ST_OK)
        return st;
    struct sysfs_device d;
    sysfs_read(index, &d);
    if (!d.attached)
        st = fail(e, ST_IO, "/dev/nbd%d is not attached", index);
    else if (!force)
        st = sysfs_check_unused(index, e);
    int error = st == ST_OK ? netlink_disconnect(netlink, index) : 0;
    netlink_close(netlink);
    if (error)
        return fail(e, error == EPERM ? ST_PERM : ST_IO,
                    "the kernel does not detach /dev/nbd%d: %s", index, strerror(error));
    if (st == ST_OK)
        st = keeper_dismiss(index, e);
    if (st == ST_OK) {
        record_remove(index);
        *lingers = !is_gone(index, force ? FORCED_WAIT_NS : GONE_WAIT_NS);
    }
    return st;
}

enum status device_detach(int index, bool force, bool *lingers, struct err *e)
{
    int lock_fd;
    enum status st = record_lock_all(&lock_fd, e);
    if (st != ST_OK)
        return st;
    st = detach_locked(index, force, lingers, e);
    close(lock_fd);
    return st;
}
