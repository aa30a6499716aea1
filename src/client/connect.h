/*
 * A connection to an NBD server, up to transmission: fixed newstyle, GO or, where a server does not
 * know that, EXPORT_NAME; without TLS, structured replies and extended headers. What a server may
 * say is bounded, in length and in time.
 */
#ifndef CLIENT_CONNECT_H
#define CLIENT_CONNECT_H

#include <stdint.h>

#include "base/status.h"
#include "client/uri.h"

/* Longer ones are taken as none. */
#define NBD_CLIENT_IDENTITY_BYTES 100u

struct nbd_client_export {
    uint64_t size;        /* bytes */
    uint16_t flags;       /* transmission flags */
    uint32_t block_min;   /* bytes: what offsets and lengths must be multiples of */
    uint32_t payload_max; /* bytes in a request; what the protocol has where it isn't said */
    /* From a look at a server of our kind: which volume it is, whatever it is called. Else "". */
    char identity[NBD_CLIENT_IDENTITY_BYTES];
};

/* Connects and enters transmission, within timeout_ns. ST_OK: *fd is a blocking socket, to be
 * closed by the caller. Else *fd is -1 and `e` a sentence; ST_NOTFOUND: no such export;
 * ST_SHUTDOWN: a signal came. Blocks. */
enum status nbd_client_connect(const struct nbd_uri *uri, uint64_t timeout_ns, int *fd,
                               struct nbd_client_export *export, struct err *e);

/* Asks what the export is like (INFO), and leaves; otherwise as nbd_client_connect. */
enum status nbd_client_look(const struct nbd_uri *uri, uint64_t timeout_ns,
                            struct nbd_client_export *export, struct err *e);

#endif
