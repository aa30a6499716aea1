/*
 * Exports: from the name a client gives to a volume, and who may write to one.
 */
#ifndef SERVER_EXPORTS_H
#define SERVER_EXPORTS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/env.h"
#include "base/list.h"
#include "base/status.h"
#include "volume/catalog.h"

/* A search for the volume behind a name. The caller owns it until `done`. */
struct export_search {
    void (*done)(struct export_search *search); /* in */
    enum status st;                             /* out */
    struct err err;                             /* out: a sentence where st is not ST_OK */
    struct catalog_entry entry;                 /* out */

    struct catalog_op op; /* the search's, from here on */
};

/* Finds volume `name`; "" is `default_name` or, where that is NULL, the store's only volume.
 * ST_NOTFOUND where there is none. */
void export_find(struct export_search *search, struct store *store, struct env *env,
                 const char *name, const char *default_name);

/* A volume with connections on one reactor. Two hosts writing to one volume destroy a file
 * system as surely through one server as through two, so the first client address that
 * writes keeps the others from writing while any connection of it that wrote is open. */
struct export {
    struct list link;
    uint64_t branch;
    unsigned n_connections, n_writers;
    char writer[64]; /* host of the writers */
};

/* The export of `branch` in the list, made where there is none; one connection more. */
struct export *export_join(struct list *exports, uint64_t branch);

/* One connection less; `was_writer`: export_claim had said yes to it. */
void export_leave(struct export *x, bool was_writer);

/* Whether a connection from `host` may write; a yes counts it among the writers. */
bool export_claim(struct export *x, const char *host);

#endif
