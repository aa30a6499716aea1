/* How long requests took; see latency.h. */
#include "bench/latency.h"

/* The middle of what a bucket counts. */
static double bucket_ns(uint32_t bucket)
{
    uint32_t step = bucket >> LATENCY_STEP_BITS;
    uint32_t shift = step > 0 ? step - 1 : 0;
    uint64_t first = (uint64_t)(bucket - (shift << LATENCY_STEP_BITS)) << shift;
    return (double)first + (double)((1ull << shift) - 1) / 2;
}

double latency_percentile_ns(const struct latency *l, double percent)
{
    /* (A little less, or rounding would ask for one more.) */
    double wanted = percent / 100 * (double)l->count * (1 - 1e-12);
    uint64_t seen = 0;
    for (uint32_t i = 0; i < LATENCY_BUCKETS && l->count > 0; i++) {
        seen += l->buckets[i];
        if (l->buckets[i] == 0 || (double)seen < wanted)
            continue;
        /* The bucket's upper half, or all of it, may be above every value there was. */
        double ns = bucket_ns(i);
        return seen == l->count || ns > (double)l->max_ns ? (double)l->max_ns : ns;
    }
    return 0;
}

double latency_mean_ns(const struct latency *l)
{
    return l->count ? (double)l->sum_ns / (double)l->count : 0;
}
