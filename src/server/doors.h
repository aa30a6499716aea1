/*
 * The sockets of a server, from before its store is opened: an address that can't be had is found
 * before anything is made, and ports below 1024 are bound while the process still may.
 */
#ifndef SERVER_DOORS_H
#define SERVER_DOORS_H

#include "base/status.h"
#include "server/listener.h"

struct server_config;

struct doors {
    struct listeners *nbd, *http; /* NULL: not open, or the server has taken them over */
};

/* Opens what the configuration names (listen, http) and takes what a service manager handed over.
 * `owner` as in listeners_new().
 * Errors as listeners_open() and listeners_inherit() give them. In any case doors_close() follows. */
enum status doors_open(struct doors *d, const struct server_config *config, uid_t owner,
                       struct err *e);

/* With the rights that the server has while it serves: as listeners_claim(). */
enum status doors_claim(struct doors *d, struct err *e);

void doors_close(struct doors *d);

#endif
