/*
 * The random numbers of a load: reproducible from a seed, and cheap. (splitmix64)
 */
#ifndef BENCH_RANDOM_H
#define BENCH_RANDOM_H

#include <stdint.h>

struct random {
    uint64_t state;
};

/* Each number has its own image. */
static inline uint64_t random_mix(uint64_t v)
{
    v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9u;
    v = (v ^ (v >> 27)) * 0x94d049bb133111ebu;
    return v ^ (v >> 31);
}

static inline uint64_t random_u64(struct random *r)
{
    return random_mix(r->state += 0x9e3779b97f4a7c15u);
}

/* 0 to n - 1; no division. */
static inline uint64_t random_below(struct random *r, uint64_t n)
{
    __extension__ typedef unsigned __int128 u128;
    return (uint64_t)(((u128)random_u64(r) * n) >> 64);
}

#endif
