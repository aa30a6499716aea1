/*
 * The last two minutes; series.h says of what.
 */
#include "server/series.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "server/connection.h"

/* What is left after a second: the sixtieth root of one half. */
#define HEAT_LEFT 0.98851402f
#define HEAT_SECONDS_MAX (20u * SERIES_HEAT_HALF_LIFE_S)

/* The counters of a lane's volume when they were looked at last. */
struct series_part {
    struct series_volume *volume;
    uint64_t booked;
    struct histogram took[SERIES_DIRECTIONS];
    uint64_t bytes[SERIES_DIRECTIONS];
    uint32_t heat[SERIES_DIRECTIONS][METRICS_HEAT_CELLS];
};

static const uint16_t commands[SERIES_DIRECTIONS] = {
    [SERIES_READ] = NBD_CMD_READ, [SERIES_WRITE] = NBD_CMD_WRITE};

/* --- percentiles --------------------------------------------------------------------------- */

uint32_t series_percentile_us(const struct histogram *h, unsigned per_mille)
{
    uint64_t count = histogram_count(h), below = 0;
    if (!count)
        return SERIES_NO_TIME;
    double rank = (double)count * per_mille / 1000;
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
        uint64_t n = h->buckets[i];
        if (n && (double)(below + n) >= rank) {
            double low = i ? (double)(1u << (i - 1)) : 0, high = (double)(1u << i);
            if (i == HISTOGRAM_BUCKETS - 1)
                return 1u << (i - 1);
            return (uint32_t)(low + (high - low) * (rank - (double)below) / (double)n + 0.5);
        }
        below += n;
    }
    return SERIES_NO_TIME;
}

/* --- heat ---------------------------------------------------------------------------------- */

float series_heat_left(const struct series *s, const struct series_volume *v)
{
    uint64_t seconds = s->n_ticks - v->heat_tick;
    float left = 1;
    if (seconds > HEAT_SECONDS_MAX)
        return 0;
    while (seconds-- > 0)
        left *= HEAT_LEFT;
    return left;
}

static void add_heat(const struct series *s, struct series_volume *v, struct series_part *part,
                     const struct metrics_volume *mv)
{
    uint32_t shift = __atomic_load_n(&mv->heat_shift, __ATOMIC_RELAXED);
    float left = v->heat_shift == shift ? series_heat_left(s, v) : 0;
    for (unsigned d = 0; d < SERIES_DIRECTIONS; d++)
        for (unsigned i = 0; i < METRICS_HEAT_CELLS; i++) {
            uint32_t now = __atomic_load_n(&mv->heat[d][i], __ATOMIC_RELAXED);
            v->heat[d][i] = v->heat[d][i] * left + (float)(now - part->heat[d][i]);
            part->heat[d][i] = now;
        }
    v->heat_shift = shift;
    v->heat_tick = s->n_ticks;
}

/* --- a second ------------------------------------------------------------------------------ */

static struct series_volume *volume_of(struct series *s, const char *name)
{
    for (struct series_volume *v = s->volumes; v; v = v->next)
        if (strcmp(v->name, name) == 0)
            return v;
    struct series_volume *v = mem_zalloc(sizeof *v);
    memcpy(v->name, name, strlen(name) + 1);
    for (unsigned i = 0; i < SERIES_POINTS; i++)
        for (unsigned d = 0; d < SERIES_DIRECTIONS; d++)
            v->points[i].of[d].p50_us = v->points[i].of[d].p99_us = SERIES_NO_TIME;
    v->next = s->volumes;
    s->volumes = v;
    return v;
}

static void add(struct histogram *to, const struct histogram *what, const struct histogram *less)
{
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
        to->buckets[i] += what->buckets[i] - less->buckets[i];
}

static void look_at(struct series *s, struct metrics_volume *mv)
{
    if (!mv->series) {
        mv->series = mem_zalloc(sizeof *mv->series);
        mv->series->volume = volume_of(s, mv->name);
    }
    struct series_part *part = mv->series;
    uint64_t booked = counter_get(&mv->booked);
    if (booked == part->booked)
        return;
    part->booked = booked;
    for (unsigned d = 0; d < SERIES_DIRECTIONS; d++) {
        struct histogram now = {0};
        uint64_t bytes = counter_get(&mv->commands[commands[d]].bytes);
        histogram_gather(&now, &mv->commands[commands[d]].latency);
        add(&part->volume->took[d], &now, &part->took[d]);
        add(&s->all.took[d], &now, &part->took[d]);
        part->volume->bytes[d] += bytes - part->bytes[d];
        s->all.bytes[d] += bytes - part->bytes[d];
        part->took[d] = now;
        part->bytes[d] = bytes;
    }
    add_heat(s, part->volume, part, mv);
}

static void end_second(const struct series *s, struct series_volume *v)
{
    struct series_point *p = &v->points[s->n_ticks % SERIES_POINTS];
    for (unsigned d = 0; d < SERIES_DIRECTIONS; d++) {
        p->of[d].requests = histogram_count(&v->took[d]);
        p->of[d].bytes = v->bytes[d];
        p->of[d].p50_us = p->of[d].p99_us = SERIES_NO_TIME;
        if (p->of[d].requests) {
            p->of[d].p50_us = series_percentile_us(&v->took[d], 500);
            p->of[d].p99_us = series_percentile_us(&v->took[d], 990);
            v->took[d] = (struct histogram){0};
        }
        v->bytes[d] = 0;
    }
}

void series_tick(struct series *s, struct server *server)
{
    s->n_ticks++;
    for (unsigned i = 0; i < server->n_lanes; i++)
        for (struct metrics_volume *mv = metrics_first(&server->lanes[i].metrics); mv;
             mv = metrics_next(mv))
            look_at(s, mv);
    for (struct series_volume *v = s->volumes; v; v = v->next)
        end_second(s, v);
    end_second(s, &s->all);
}

const struct series_volume *series_find(const struct series *s, const char *name)
{
    for (const struct series_volume *v = s->volumes; v; v = v->next)
        if (strcmp(v->name, name) == 0)
            return v;
    return NULL;
}

size_t series_n(const struct series *s)
{
    return s->n_ticks < SERIES_POINTS ? s->n_ticks : SERIES_POINTS;
}

const struct series_point *series_point(const struct series *s, const struct series_volume *v,
                                        size_t back)
{
    return &v->points[(s->n_ticks - back) % SERIES_POINTS];
}

void series_free(struct series *s, struct server *server)
{
    for (unsigned i = 0; i < server->n_lanes; i++)
        for (struct metrics_volume *mv = metrics_first(&server->lanes[i].metrics); mv;
             mv = metrics_next(mv)) {
            free(mv->series);
            mv->series = NULL;
        }
    while (s->volumes) {
        struct series_volume *v = s->volumes;
        s->volumes = v->next;
        free(v);
    }
}
