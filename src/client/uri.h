/*
 * NBD URIs, as doc/uri.md of the NBD project states them, without TLS:
 *
 *   nbd://HOST[:PORT][/EXPORT]            TCP; an IPv6 address stands in brackets
 *   nbd+unix:///[EXPORT]?socket=PATH
 */
#ifndef CLIENT_URI_H
#define CLIENT_URI_H

#include <stdbool.h>
#include <sys/un.h>

#include "base/status.h"
#include "nbd/proto.h"

#define NBD_URI_HOST_BYTES_MAX 255u
#define NBD_URI_PORT "10809"

struct nbd_uri {
    bool is_unix;
    char host[NBD_URI_HOST_BYTES_MAX + 1]; /* TCP: a name or an address, without brackets */
    char port[6];                          /* TCP: a number from 1 to 65535 */
    char socket[sizeof((struct sockaddr_un *)0)->sun_path];
    char export[NBD_STRING_BYTES_MAX + 1]; /* empty: the server's default */
};

/* Reads `text` into `uri`. ST_INVAL with a sentence where it is no such URI. */
enum status nbd_uri_parse(const char *text, struct nbd_uri *uri, struct err *e);

/* Longest canonical form: scheme, host or socket, port and export, each byte written as three. */
#define NBD_URI_TEXT_BYTES (3 * (NBD_STRING_BYTES_MAX + NBD_URI_HOST_BYTES_MAX) + 40)

/* Writes the canonical form of `uri`, by which two are the same or not: the port stands in it, and
 * what does not have to be encoded is not. Returns `out`. */
const char *nbd_uri_format(const struct nbd_uri *uri, char out[NBD_URI_TEXT_BYTES]);

#endif
