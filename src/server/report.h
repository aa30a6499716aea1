/*
 * A report: what the lanes have just now, for other threads to look at.
 *
 * Counters of requests can be read at any time (metrics.h). All else of volumes and connections
 * belongs to the reactor of its lane, so each lane copies it when it is asked to, between two
 * turns; that also tells whether it turns. Whoever asks waits for a moment at most: what a lane
 * does not tell in time is missing.
 *
 * All functions on one thread, that of the one who asks.
 */
#ifndef SERVER_REPORT_H
#define SERVER_REPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "server/connection.h"

/* A volume that somebody had open here since the process started. One for each lane and name; of
 * those that are METRICS_REST together. */
struct report_volume {
    const struct metrics_volume *counters; /* its name, too */
    struct volume_stats stats; /* of all that have had this name; gauges: of those open now */
    bool open, owned;          /* the volume itself, not just snapshots */
    uint64_t branch, size;
    uint32_t block_size;
    unsigned n_clients;
};

struct report_client {
    uint64_t id, begun_ns; /* since 1970 */
    struct peer peer;
    char export[FULL_NAME_BYTES]; /* empty during the handshake */
    bool read_only;
    unsigned in_flight;
    uint64_t requests, errors, read_bytes, written_bytes;
};

struct report_lane {
    bool there; /* it told in time; else all is as it was told last */
    struct report_volume *volumes;
    struct report_client *clients;
    size_t n_volumes, cap_volumes, n_clients, cap_clients;
    struct shard_memory memory;
    unsigned n_owned, n_open; /* volumes, not snapshots */
};

struct report;

struct report *report_new(struct server *s);
/* Once no reactor runs any more, and what was posted has run. */
void report_free(struct report *r);
/* From here on lanes tell nothing more. Any thread. */
void report_stop(struct report *r);

/* Asks all lanes, and waits for `wait_ms` at most. False where one did not tell. */
bool report_ask(struct report *r, unsigned wait_ms);
const struct report_lane *report_lane(const struct report *r, unsigned no);

/* A volume by name, all lanes together. */
struct report_total {
    const char *name;
    struct metrics_command commands[METRICS_COMMANDS]; /* as they are now */
    struct report_volume sum;                          /* (but for its counters) */
};
/* All that somebody had open here, by name, the rest last; *n of them. Freed with the next call. */
const struct report_total *report_totals(struct report *r, size_t *n);

/* Now, by the clock of volume_stats.dirty_since_ns. */
uint64_t report_now_ns(const struct report *r);

#endif
