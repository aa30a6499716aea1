/*
 * The volume against a plain array: random requests of every kind, size and alignment, many
 * in flight, over a cache so small that everything is evicted (sim/driver.h says what is
 * checked). SEED=n replays one; SEEDS and STEPS say how many and how long.
 */
#include "test.h"

#include "../sim/driver.h"
#include "../sim/seeds.h"
#include "base/mem.h"
#include "volume/internal.h"

struct chooser {
    uint64_t state;
};

static uint64_t pick(struct chooser *c, uint64_t n)
{
    c->state = c->state * 6364136223846793005u + 1442695040888963407u;
    return (c->state >> 33) % n;
}

static void run(const struct drv_config *config, uint64_t steps)
{
    struct drv *d = drv_new(config);
    drv_open(d);
    for (uint64_t done = 0; done < steps && !d->violated;) {
        uint64_t n = 1 + drv_below(d, steps);
        drv_steps(d, n);
        done += n;
        if (!d->violated && drv_one_in(d, 2))
            drv_reopen(d, drv_one_in(d, 2));
    }
    if (!d->violated)
        drv_verify_all(d);
    if (!d->violated)
        drv_reopen(d, true);
    if (!d->violated)
        drv_verify_all(d);
    if (!d->violated)
        drv_close(d);
    if (!drv_free(d))
        fail_msg("to replay: SEED=%llu\n", (unsigned long long)config->seed);
}

static struct drv_config any_config(uint64_t seed, struct chooser *c)
{
    *c = (struct chooser){seed * 2654435761u + 12345};
    (void)pick(c, 2);
    struct drv_config config = {
        .seed = seed,
        .block_size = 4096u << pick(c, 5),
        .codec = (int)pick(c, 3),
        .cache_bytes = VOLUME_CACHE_BYTES_MIN,
        .no_log = pick(c, 5) == 0,
        .seal_age_ms = pick(c, 3) ? 0 : 5,
        .store = {.has_log = pick(c, 3) != 0, .batch_bytes_max = pick(c, 2) ? 0 : 1u << 20,
                  .clears_ranges = seed % 3 == 0},
    };
    if (pick(c, 4) == 0)
        config.log_bytes = 8u << 20;
    /* As small as the volume layer bears it: generations end where their commits would not fit. */
    if (seed % 2)
        config.store.commit_bytes_max = COMMIT_BYTES_MIN;
    return config;
}

/* A volume of a few MiB: requests meet each other all the time. */
static void small_volumes(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("small volumes", 25, 700);
    for (uint64_t i = 0; i < s.count; i++) {
        struct chooser c;
        struct drv_config config = any_config(s.first + i, &c);
        config.size = 512 * (1 + pick(&c, pick(&c, 3) ? 16384 : 40));
        config.resize = true;
        run(&config, s.steps);
    }
}

/* One larger than the cache: everything is evicted and comes back. */
static void volumes_larger_than_the_cache(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("volumes larger than the cache", 5, 1500);
    for (uint64_t i = 0; i < s.count; i++) {
        struct chooser c;
        struct drv_config config = any_config(s.first + i, &c);
        config.size = (48u << 20) + 512 * (1 + 2 * pick(&c, 1000));
        run(&config, s.steps);
    }
}

/* Terabytes, of which some hundred places are looked at: index rows of both levels come and
 * go, and trims run over many of them. */
static void huge_volumes(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("huge volumes", 12, 1000);
    for (uint64_t i = 0; i < s.count; i++) {
        struct chooser c;
        struct drv_config config = any_config(s.first + i, &c);
        config.size = ((1ull << 40) << pick(&c, 7)) - 512 * pick(&c, 3);
        config.n_regions = 20 + (unsigned)pick(&c, 400);
        config.region_bytes = (1 + pick(&c, 12)) * config.block_size;
        run(&config, s.steps);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_volumes),
        cmocka_unit_test(volumes_larger_than_the_cache),
        cmocka_unit_test(huge_volumes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
