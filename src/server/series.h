/*
 * The last two minutes, second by second: how much was read and written, how long that took, and
 * where in each volume.
 *
 * Once a second the counters of all lanes are compared with what they were (metrics.h); the lanes
 * notice nothing of that. One thread.
 */
#ifndef SERVER_SERIES_H
#define SERVER_SERIES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "server/metrics.h"

#define SERIES_POINTS 120u
#define SERIES_NO_TIME UINT32_MAX
#define SERIES_HEAT_HALF_LIFE_S 60u

enum series_direction { SERIES_READ, SERIES_WRITE, SERIES_DIRECTIONS };

/* What happened in one second. */
struct series_point {
    struct {
        uint64_t requests, bytes;
        uint32_t p50_us, p99_us; /* SERIES_NO_TIME: there were no requests */
    } of[SERIES_DIRECTIONS];
};

/* A volume by name, or all together. */
struct series_volume {
    struct series_volume *next;
    char name[NAME_BYTES_MAX + 1];
    struct series_point points[SERIES_POINTS];

    struct histogram took[SERIES_DIRECTIONS]; /* in the second that is being added up */
    uint64_t bytes[SERIES_DIRECTIONS];
    uint32_t heat_shift;
    uint64_t heat_tick; /* what `heat` is as of */
    float heat[SERIES_DIRECTIONS][METRICS_HEAT_CELLS];
};

struct series {
    uint64_t n_ticks;
    struct series_volume all;
    struct series_volume *volumes;
};

struct server;

/* To be called once a second. */
void series_tick(struct series *s, struct server *server);

/* NULL where nobody had the volume open. */
const struct series_volume *series_find(const struct series *s, const char *name);

/* The point of `back` seconds ago, 0 being the last whole second; n of them there are. */
size_t series_n(const struct series *s);
const struct series_point *series_point(const struct series *s, const struct series_volume *v,
                                        size_t back);

/* How much is left by now of what is in v->heat. */
float series_heat_left(const struct series *s, const struct series_volume *v);

/* `per_mille` of the times in `h` are not longer; SERIES_NO_TIME where there are none. */
uint32_t series_percentile_us(const struct histogram *h, unsigned per_mille);

/* After the last tick, while the lanes are still there. */
void series_free(struct series *s, struct server *server);

#endif
