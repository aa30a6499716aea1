/*
 * Seeds for simulated tests. SEED: the first one (default: from the clock); SEEDS: how many;
 * STEPS: requests per seed. What is used is printed, so that a failure can be replayed.
 */
#ifndef TESTS_SIM_SEEDS_H
#define TESTS_SIM_SEEDS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct seeds {
    uint64_t first, count, steps;
};

static inline uint64_t seeds_env(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

static inline struct seeds seeds_begin(const char *what, uint64_t count, uint64_t steps)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t clock = ((uint64_t)now.tv_sec * 1000000007u + (uint64_t)now.tv_nsec) % 1000000000u;
    struct seeds s = {seeds_env("SEED", clock), seeds_env("SEEDS", count),
                      seeds_env("STEPS", steps)};
    printf("# %s: SEED=%llu SEEDS=%llu STEPS=%llu\n", what, (unsigned long long)s.first,
           (unsigned long long)s.count, (unsigned long long)s.steps);
    fflush(stdout);
    return s;
}

#endif
