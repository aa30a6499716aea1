/*
 * How long requests took: a histogram of times, from which percentiles come.
 *
 * Buckets are as wide as their values call for: 128 of them between each power of two and the
 * next, so that a percentile is within 0.4 % of a value that was counted, whatever its size.
 * Counting is a few instructions and allocates nothing.
 */
#ifndef BENCH_LATENCY_H
#define BENCH_LATENCY_H

#include <stdint.h>

#define LATENCY_STEP_BITS 7u
#define LATENCY_VALUE_BITS 42u /* an hour; what is longer counts as that, but in `max_ns` */
#define LATENCY_BUCKETS ((LATENCY_VALUE_BITS - LATENCY_STEP_BITS + 1) << LATENCY_STEP_BITS)

/* All zeros: nothing counted. One thread at a time. */
struct latency {
    uint64_t count, sum_ns, max_ns;
    uint64_t buckets[LATENCY_BUCKETS];
};

static inline uint32_t latency_bucket(uint64_t ns)
{
    if (ns >> LATENCY_VALUE_BITS)
        return LATENCY_BUCKETS - 1;
    if (ns >> LATENCY_STEP_BITS == 0)
        return (uint32_t)ns;
    uint32_t shift = 63u - (uint32_t)__builtin_clzll(ns) - LATENCY_STEP_BITS;
    return (shift << LATENCY_STEP_BITS) + (uint32_t)(ns >> shift);
}

static inline void latency_count(struct latency *l, uint64_t ns)
{
    l->count++;
    l->sum_ns += ns;
    if (ns > l->max_ns)
        l->max_ns = ns;
    l->buckets[latency_bucket(ns)]++;
}

/* The smallest time that `percent` of those counted do not exceed; 0 where there are none. */
double latency_percentile_ns(const struct latency *l, double percent);

/* 0 where there are none. */
double latency_mean_ns(const struct latency *l);

#endif
