/*
 * Random inputs for unit tests: seeded from the environment variable SEED or the clock,
 * and printed, so that a failure can be replayed.
 */
#ifndef TESTS_UNIT_CHANCE_H
#define TESTS_UNIT_CHANCE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct chance {
    uint64_t state;
};

static inline struct chance chance_begin(const char *what)
{
    const char *given = getenv("SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t seed = given ? strtoull(given, NULL, 0)
                          : (uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec;
    printf("# %s: SEED=%llu\n", what, (unsigned long long)seed);
    return (struct chance){seed};
}

/* splitmix64 */
static inline uint64_t chance_u64(struct chance *c)
{
    uint64_t z = c->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 0 .. n - 1 */
static inline uint64_t chance_below(struct chance *c, uint64_t n)
{
    return chance_u64(c) % n;
}

/* Any number of bits is as likely as any other: small numbers are met too. */
static inline uint64_t chance_wide(struct chance *c)
{
    uint64_t bits = chance_below(c, 65);
    return bits == 0 ? 0 : chance_u64(c) >> (64 - bits);
}

static inline void chance_fill(struct chance *c, void *out, size_t len)
{
    uint8_t *at = out;
    for (size_t i = 0; i < len; i++)
        at[i] = (uint8_t)chance_u64(c);
}

#endif
