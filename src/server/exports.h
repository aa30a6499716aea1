/*
 * Exports: from the name a client gives to a volume, and who may write to one.
 *
 * VOLUME@SNAPSHOT is an export of its own, for reading, which every server has at any time and nobody
 * needs to own. It is not in the list of exports: a list is for people who look for a disk, and
 * there may be thousands of snapshots to each. "snapshot list" knows them.
 *
 * Two hosts that write to one volume destroy a file system as surely through one server as
 * through two. So on each export one client host has the writing role. A host is an address;
 * all clients on Unix sockets and on the loopback are one.
 *
 * - Whoever writes (or zeroes, or trims) first has it, for as long as a connection of that host
 *   that wrote is open.
 * - The first write of another host waits until the role is free or moves, only its connection
 *   being paused, for server_config.owner_wait_ms (and no longer than pause_close_ms,
 *   connection.h) at most. Then it is refused: EPERM, with a sentence that names the host that
 *   writes.
 * - The role moves to a connection that wants to write, if
 *     a) the host that has it left everything in order and is silent: the last request of all its
 *        connections was a FLUSH, asked for when none of them had anything else under way (or
 *        a write with FUA, all before which such a FLUSH has covered); it succeeded;
 *        and EXPORT_QUIET_MS have passed since it was answered; and
 *     b) the connection that wants to write had entered before that FLUSH (that write) was asked
 *        for.
 *   That is a virtual machine that moves: the destination opens the image while the source runs;
 *   the source drains, flushes, and does no more; then the destination writes. A host that
 *   comes later, while another has a file system mounted, however idle, does not get it.
 * - The connections that the first host had when the role moved never write again: what they know
 *   of the volume is old. EPERM, with a sentence that names the new host. A new connection of
 *   that host is a host's that comes later, as above.
 *
 * Served --shared there are no such rules. What somebody else changed through another server is
 * looked after by the volume (struct vol_writer in volume/volume.h).
 */
#ifndef SERVER_EXPORTS_H
#define SERVER_EXPORTS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/env.h"
#include "base/list.h"
#include "base/status.h"
#include "server/access.h"
#include "volume/catalog.h"

#define EXPORT_QUIET_MS 100u
#define EXPORT_HOST_BYTES 64u
/* So much of a name that is none stands in a sentence. */
#define EXPORT_NAME_SHOWN_BYTES 141u

/* A search for the volume behind a name. The caller owns it until `done`. */
struct export_search {
    void (*done)(struct export_search *search); /* in */
    enum status st;                             /* out */
    struct err err;                             /* out: a sentence where st is not ST_OK */
    struct catalog_entry entry;                 /* out */
    /* in: what the client may do, held until `done`; NULL: all that there is */
    const struct access_view *view;
    bool read_only; /* out: the client may not write it, or nobody can */
    bool denied;    /* out: the view is why it was not found */

    struct catalog_op op; /* the search's, from here on */
    struct env_task task;
    bool by_name;
    char name[EXPORT_NAME_SHOWN_BYTES];
};

/* Finds volume `name`, or a snapshot; "" is `default_name` or, where that is NULL, the only volume
 * that the client may open. ST_NOTFOUND where there is none.
 *
 * With a view, one that the client may not open is not there: the answer is the same sentence, and
 * nothing is looked up, so that the time it takes does not tell either. */
void export_find(struct export_search *search, struct store *store, struct env *env,
                 const char *name, const char *default_name);

/* What was found, as clients are told. */
#define EXPORT_DESCRIPTION_BYTES (DESCRIPTION_BYTES_MAX + 2 * NAME_BYTES_MAX + 64)
void export_name(const struct catalog_entry *entry, char out[FULL_NAME_BYTES]);
void export_description(const struct catalog_entry *entry, char out[EXPORT_DESCRIPTION_BYTES]);
uint64_t export_size(const struct catalog_entry *entry);

/* A volume or snapshot with connections on one reactor. One thread. */
struct export {
    struct list link;
    uint64_t branch, epoch; /* epoch 0: the volume itself */
    char name[FULL_NAME_BYTES]; /* for messages */
    bool shared;
    /* There are clients of several hosts and rules for them: only then what is requested and
     * answered has to be told (export_took, export_answered). */
    bool mixed;
    struct list clients;
    uint64_t n_entered; /* clients, ever */
    unsigned n_writers;
    char writer[EXPORT_HOST_BYTES]; /* has the role where n_writers is not 0 */

    /* Of the host that has the role, while mixed. */
    bool uncovered; /* it may have changed something that no FLUSH has covered */
    bool settling;  /* the last it asked for is a FLUSH or FUA write that leaves all in order ... */
    bool is_flush;
    bool settled; /* ... and that succeeded, ... */
    uint64_t settled_ms;      /* ... at this time */
    uint64_t settled_entered; /* clients that had entered when it was asked for */
};

/* Leaves of the volumes that catalog_list() gave those that the client may open. */
void export_hide(struct catalog_op *list, const struct access_view *view);

/* A connection, as its export knows it. Part of the connection. */
struct export_client {
    const char *host; /* in; stays, and is shorter than EXPORT_HOST_BYTES */
    /* in: whether anything of it is under way: being received, answered or sent */
    bool (*is_busy)(struct export_client *client);

    struct export *export; /* the export's, from here on */
    struct list link;
    uint64_t entered;
    bool writes; /* may write, and counts among the writers */
    bool barred; /* never may any more */
    char refusal[256]; /* a sentence: why it may not */
};

/* The client enters the export of `branch` (its snapshot of `epoch`; 0: itself) in the list, which is
 * made where there is none. */
void export_join(struct list *exports, uint64_t branch, uint64_t epoch, const char *name,
                 bool shared, struct export_client *client);
void export_leave(struct export_client *client);

static inline bool export_has_several(const struct export *x)
{
    return x->clients.next != x->clients.prev;
}

enum export_claim {
    CLAIM_YES,
    CLAIM_WAIT, /* not now; no event tells when: ask again */
    CLAIM_NO,   /* never; see client->refusal */
};

/* Whether the client may write: it does, from a yes on. CLAIM_WAIT fills its refusal too, for the
 * one who has waited long enough. */
enum export_claim export_claim(struct export_client *client, uint64_t now_ms);

/* Requests, as far as they matter here. */
enum export_request { EXPORT_CHANGE, EXPORT_CHANGE_FUA, EXPORT_FLUSH, EXPORT_OTHER };

/* While export->mixed: a request of the client was taken; `alone`: it has none under way. */
void export_took(struct export_client *client, enum export_request kind, bool alone);
/* While export->mixed: a change or flush was answered. */
void export_answered(struct export_client *client, bool success, uint64_t now_ms);

#endif
