/*
 * Counters and histograms that one thread writes and others read while it does.
 *
 * The writer adds with a plain load and store: no locked instruction, so counting costs it what
 * any addition does. Readers see each number whole and never going back; numbers that belong
 * together (a sum and its count) may be a moment apart.
 */
#ifndef BASE_COUNTER_H
#define BASE_COUNTER_H

#include <stdint.h>

static inline uint64_t counter_get(const uint64_t *c)
{
    return __atomic_load_n(c, __ATOMIC_RELAXED);
}

/* The one thread that writes it. */
static inline void counter_add(uint64_t *c, uint64_t n)
{
    __atomic_store_n(c, __atomic_load_n(c, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}

/* Any thread, for what is rare. */
static inline void counter_add_shared(uint64_t *c, uint64_t n)
{
    __atomic_fetch_add(c, n, __ATOMIC_RELAXED);
}

/* Times. Bucket i counts those of up to 2^i microseconds that no lower one does; the last one all
 * that are longer. */
#define HISTOGRAM_BUCKETS 28u

struct histogram {
    uint64_t buckets[HISTOGRAM_BUCKETS];
    uint64_t sum_ns;
};

static inline unsigned histogram_bucket(uint64_t ns)
{
    if (ns <= 1000)
        return 0;
    unsigned i = 64u - (unsigned)__builtin_clzll((ns - 1) / 1000);
    return i < HISTOGRAM_BUCKETS - 1 ? i : HISTOGRAM_BUCKETS - 1;
}

/* `n` times of `ns` each. The one thread that writes it. */
static inline void histogram_add(struct histogram *h, uint64_t ns, uint64_t n)
{
    counter_add(&h->buckets[histogram_bucket(ns)], n);
    counter_add(&h->sum_ns, ns * n);
}

/* Adds what `h`, which may be written meanwhile, holds to one of the caller's. */
static inline void histogram_gather(struct histogram *to, const struct histogram *h)
{
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
        to->buckets[i] += counter_get(&h->buckets[i]);
    to->sum_ns += counter_get(&h->sum_ns);
}

static inline uint64_t histogram_count(const struct histogram *h)
{
    uint64_t n = 0;
    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
        n += counter_get(&h->buckets[i]);
    return n;
}

#endif
