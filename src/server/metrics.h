/*
 * What the server counts about requests and connections.
 *
 * Each lane counts its own, in memory that stays until the process ends, so that whoever reads
 * (report.h, series.h) needs no lock and disturbs nobody. Requests are counted when they are
 * answered, by volume and command; those of VOLUME@SNAPSHOT count for VOLUME.
 *
 * How long a request took is from when it was parsed until its reply was handed to the kernel (or
 * to the queue of a client that takes none). The clock is read once per receive and once per turn
 * of the loop, which the lane does anyway: what was answered between two readings is booked at the
 * second one.
 */
#ifndef SERVER_METRICS_H
#define SERVER_METRICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/counter.h"
#include "base/loglimit.h"
#include "nbd/proto.h"
#include "volume/volume.h"

/* Volumes with counters of their own, all lanes together; what comes later counts as METRICS_REST.
 */
#define METRICS_VOLUMES_MAX 1000u
#define METRICS_REST "(others)" /* no volume can be called that */
#define METRICS_HEAT_CELLS 256u
#define METRICS_ENDED_MAX 128u

/* Commands are numbered as NBD does. There is no answer to DISC; its place is that of all that is
 * no command. */
#define METRICS_COMMANDS 8u
#define METRICS_OTHER NBD_CMD_DISC
extern const char *const metrics_command_names[METRICS_COMMANDS];

struct metrics_command {
    struct histogram latency; /* its count is that of the requests */
    uint64_t bytes;           /* of those that succeeded */
    uint64_t errors;
};

struct metrics_volume {
    struct metrics_volume *next; /* metrics_next() */
    char name[NAME_BYTES_MAX + 1];
    struct metrics_command commands[METRICS_COMMANDS];
    uint64_t booked; /* requests, ever: tells who looks on whether anything has happened */
    /* Requests that touched each 2^heat_shift bytes: reads; changes. They wrap around. */
    uint32_t heat_shift;
    uint32_t heat[2][METRICS_HEAT_CELLS];

    struct series_part *series; /* of series.c and its thread */

    /* The lane's. */
    struct volume_stats closed; /* counted by volumes of this name that are closed */
    size_t report_no;           /* of report.c */
    uint64_t heat_bytes;        /* the size heat_shift was chosen for */
    struct metrics_volume *next_touched;
    bool touched;
    uint32_t fresh_mask;              /* commands with something in `fresh` */
    uint32_t fresh[METRICS_COMMANDS]; /* answered since the clock was read last */
};

/* A connection's part. The lane's alone. */
struct metrics_client {
    struct metrics_volume *vol;
    bool has_heat;            /* it is the volume, not a snapshot */
    const char *who, *export; /* for the log; as long as the connection */
    uint64_t requests, errors, read_bytes, written_bytes;
};

struct metrics_ended {
    const struct metrics_client *client;
    uint64_t begun_ns, offset, length;
    uint16_t command;
};

enum metrics_handshake {
    METRICS_ENTERED, /* an export */
    METRICS_LEFT,    /* the client went without having chosen one: it only listed them, say */
    METRICS_FAILED,
    METRICS_HANDSHAKES,
};

/* The process. */
struct metrics {
    uint64_t slow_ns; /* requests that take longer are logged; 0: none */
    atomic_uint n_volumes;
};

struct metrics_lane {
    struct metrics *all;
    struct env *env;
    struct metrics_volume *volumes; /* metrics_first() */
    struct metrics_volume *rest;    /* NULL until it is needed */
    uint64_t mark_ns;               /* the clock when it was read last */
    struct metrics_volume *touched;
    unsigned n_ended;
    struct metrics_ended ended[METRICS_ENDED_MAX];

    uint64_t accepted, turned_away, closed; /* connections; of this lane */
    uint64_t handshakes[METRICS_HANDSHAKES];
    uint64_t n_slow;
    struct log_limit slow_lines;
};

void metrics_lane_init(struct metrics_lane *ml, struct metrics *all, struct env *env);
void metrics_lane_free(struct metrics_lane *ml);

/* The counters of a volume on this lane ("VOLUME" or "VOLUME@SNAPSHOT"); made where there are none.
 * The lane's thread. */
struct metrics_volume *metrics_volume(struct metrics_lane *ml, const char *export);

/* All of a lane, the newest first. Any thread. */
static inline struct metrics_volume *metrics_first(const struct metrics_lane *ml)
{
    return __atomic_load_n(&ml->volumes, __ATOMIC_ACQUIRE);
}
static inline struct metrics_volume *metrics_next(const struct metrics_volume *mv)
{
    return mv->next;
}

/* A connection serves its export from here on; `size` is the volume's now, and to be told when it
 * has become another. */
void metrics_client_enter(struct metrics_lane *ml, struct metrics_client *mc, const char *who,
                          const char *export, bool is_snapshot, uint64_t size);
void metrics_client_resized(struct metrics_client *mc, uint64_t size);
/* A client is about to be freed. */
void metrics_client_leave(struct metrics_lane *ml);

void metrics_book(struct metrics_lane *ml, uint64_t now_ns);

/* The clock was read. */
static inline void metrics_mark(struct metrics_lane *ml, uint64_t now_ns)
{
    if (ml->touched || ml->n_ended)
        metrics_book(ml, now_ns);
    ml->mark_ns = now_ns;
}

/* Says how many slow requests were left out of the log, once the next may be shown. Now and then.
 */
void metrics_tick(struct metrics_lane *ml, uint64_t now_ns);

static inline void metrics_heat(struct metrics_volume *mv, uint16_t command, uint64_t offset,
                                uint64_t length)
{
    uint64_t first = offset >> mv->heat_shift;
    uint64_t last = (offset + length - 1) >> mv->heat_shift;
    uint32_t *cells = mv->heat[command != NBD_CMD_READ];
    if (last >= METRICS_HEAT_CELLS)
        last = METRICS_HEAT_CELLS - 1;
    for (uint64_t i = first; i <= last; i++)
        __atomic_store_n(&cells[i], cells[i] + 1, __ATOMIC_RELAXED);
}

/* A request was answered, which was taken when the clock said `begun_ns` (ml->mark_ns then).
 * `failed`: with an error. */
void metrics_answered_later(struct metrics_lane *ml, const struct metrics_client *mc,
                            uint16_t command, uint64_t begun_ns, uint64_t offset, uint64_t length);

static inline void metrics_answered(struct metrics_lane *ml, struct metrics_client *mc,
                                    uint16_t command, uint64_t begun_ns, uint64_t offset,
                                    uint64_t length, bool failed)
{
    struct metrics_volume *mv = mc->vol;
    if (command >= METRICS_COMMANDS)
        command = METRICS_OTHER;
    bool is_change =
        command == NBD_CMD_WRITE || command == NBD_CMD_TRIM || command == NBD_CMD_WRITE_ZEROES;
    mc->requests++;
    if (failed) {
        mc->errors++;
        counter_add(&mv->commands[command].errors, 1);
    } else if (length && (is_change || command == NBD_CMD_READ || command == NBD_CMD_CACHE)) {
        counter_add(&mv->commands[command].bytes, length);
        if (command == NBD_CMD_READ)
            mc->read_bytes += length;
        else if (command == NBD_CMD_WRITE)
            mc->written_bytes += length;
        if (mc->has_heat && command != NBD_CMD_CACHE)
            metrics_heat(mv, command, offset, length);
    }
    if (begun_ns != ml->mark_ns) {
        metrics_answered_later(ml, mc, command, begun_ns, offset, length);
        return;
    }
    mv->fresh[command]++;
    mv->fresh_mask |= 1u << command;
    if (!mv->touched) {
        mv->touched = true;
        mv->next_touched = ml->touched;
        ml->touched = mv;
    }
}

#endif
