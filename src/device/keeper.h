/*
 * Keeps one kernel device connected: one small process for each, which shakes hands and gives the
 * kernel the sockets. The kernel moves the data itself.
 *
 * The kernel says when a connection has died and holds requests meanwhile; the keeper makes a new
 * one, looks whether what is there still fits the device, and hands it over. It tries for ever.
 * From time to time it looks whether the export has grown, and lets the device grow too; a device
 * never shrinks.
 *
 * What was in flight on a connection that died is sent again by the driver's timer. With one
 * connection, without a limit for requests, that timer only looks whether the request's connection
 * was replaced: so it may be short, however long a server takes to answer. With several, the kernel
 * knows no such mode: there the timer gives connections up.
 *
 * If the keeper ends, the device stays as it is, without anybody who replaces connections; another
 * keeper can go on with it.
 */
#ifndef DEVICE_KEEPER_H
#define DEVICE_KEEPER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "client/uri.h"
#include "device/netlink.h"
#include "device/record.h"
#include "device/sysfs.h"

#define KEEPER_CONNECTIONS_MAX 16u
/* Ten years; the kernel counts in less. */
#define KEEPER_DEAD_CONN_TIMEOUT_MAX_S (10ull * 365 * 86400)

struct keeper_options {
    struct nbd_uri uri;
    int index; /* of the device; -1: any */
    bool read_only;
    uint32_t connections;         /* 1 to KEEPER_CONNECTIONS_MAX */
    uint32_t resend_ms;           /* with one connection: how often the timer above looks */
    uint32_t request_timeout_s;   /* with several: when a connection is given up */
    uint64_t dead_conn_timeout_s; /* for how long requests wait for a connection */
    uint32_t size_poll_ms;
};

struct keeper {
    const struct keeper_options *options;
    struct netlink *netlink;
    char backend[SYSFS_BACKEND_BYTES_MAX + 1]; /* the URI in its one form */
    int index, lock_fd;
    bool attached, detached;
    uint64_t size;       /* bytes: of the device */
    uint32_t block_size; /* bytes */
    uint16_t flags;      /* transmission flags the kernel goes by */
    uint32_t dead;       /* so many connections are to be replaced */
    bool offer;          /* whether spare ones are to be offered at the next look; see keeper.c */
    uint32_t backoff_ms; /* until the next try, after the last one failed */
    uint64_t try_ns, look_ns;
    struct record record; /* as it was written last */
};

/* From here on SIGTERM and SIGINT end what the keeper does, at points of its choice. */
void keeper_catch_signals(void);

/* Shakes hands and attaches: on success k->index is the device's. One that is attached to the same
 * URI but has no keeper is gone on with. Blocks; keeper_end() is to be called in any case. */
enum status keeper_attach(struct keeper *k, const struct keeper_options *options, struct err *e);

/* Keeps the device until it is detached, or a signal comes: it stays attached then. */
void keeper_run(struct keeper *k);

void keeper_end(struct keeper *k);

/* Tells the keeper of the device, if there is one, to end, and waits until it has. ST_BUSY with a
 * sentence: it does not. */
enum status keeper_dismiss(int index, struct err *e);

#endif
