/*
 * Volumes with a history against an array model with one: writes, zeroes and trims while snapshots
 * come and go, clones are made of them and clones of these, volumes are rolled back, flattened,
 * resized and removed, and processes die in the middle of each (sim/family.h says what is
 * checked). SEED=n replays one; SEEDS and STEPS say how many and how long.
 */
#include "test.h"

#include "../sim/family.h"
#include "../sim/seeds.h"
#include "volume/internal.h"

static struct family_counts counts;

static uint64_t pick(uint64_t *state, uint64_t n)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (*state >> 33) % n;
}

static struct family_config any_config(uint64_t seed, uint64_t *c)
{
    *c = seed * 2654435761u + 31337;
    (void)pick(c, 2);
    struct family_config config = {
        .drv = {.seed = seed,
                .block_size = 4096u << pick(c, 5),
                .codec = (int)pick(c, 3),
                .no_log = pick(c, 5) == 0,
                .seal_age_ms = pick(c, 3) ? 0 : 5,
                .write_bytes_max = pick(c, 3) ? 200000 : 0,
                .store = {.has_log = pick(c, 3) != 0,
                          .batch_bytes_max = pick(c, 2) ? 0 : 1u << 20,
                          .clears_ranges = seed % 3 == 0}},
    };
    if (pick(c, 4) == 0)
        config.drv.log_bytes = 8u << 20;
    if (seed % 2)
        config.drv.store.commit_bytes_max = COMMIT_BYTES_MIN;
    return config;
}

static void run(struct family_config *config, uint64_t steps)
{
    if (!family_run(config, steps, &counts))
        fail_msg("to replay: SEED=%llu SEEDS=1\n", (unsigned long long)config->drv.seed);
}

/* A volume of up to two MiB: the same blocks are written in every epoch. */
static void small_volumes(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("small volumes", 30, 900);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct family_config config = any_config(s.first + i, &c);
        config.drv.size = 512 * (1 + pick(&c, pick(&c, 3) ? 4096 : 200));
        config.drv.resize = true;
        run(&config, s.steps);
    }
}

/* The same with deaths of processes and of the machine. */
static void deaths(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("deaths", 40, 700);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct family_config config = any_config(s.first + i, &c);
        config.drv.size = 512 * (1 + pick(&c, pick(&c, 3) ? 4096 : 200));
        config.drv.resize = pick(&c, 2);
        config.deaths = true;
        config.power = pick(&c, 2);
        run(&config, s.steps);
    }
}

/* Terabytes, of which some places are looked at: rows of both levels have histories, and trims run
 * over many of them. */
static void huge_volumes(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("huge volumes", 12, 700);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct family_config config = any_config(s.first + i, &c);
        config.drv.size = ((1ull << 40) << pick(&c, 7)) - 512 * pick(&c, 3);
        config.drv.n_regions = 5 + (unsigned)pick(&c, 20);
        config.drv.region_bytes = (1 + pick(&c, 6)) * config.drv.block_size;
        config.deaths = pick(&c, 2);
        run(&config, s.steps);
    }
}

static void what_happened(void **state)
{
    (void)state;
#define TELL(text, n) printf("# %-36s %8llu\n", text, (unsigned long long)(n))
    TELL("snapshots", counts.snapshots);
    TELL("  removed, renamed", counts.removed + counts.renamed);
    TELL("  compared", counts.views_compared);
    TELL("  lost while open, being removed", counts.views_lost);
    TELL("  of several volumes", counts.groups);
    TELL("clones", counts.clones);
    TELL("  flattened", counts.flattened);
    TELL("volumes removed", counts.deleted);
    TELL("rollbacks", counts.rollbacks);
    TELL("refused, as they had to be", counts.refused);
    TELL("deaths", counts.deaths);
    TELL("  within such a change", counts.cut_short);
    TELL("    which had happened", counts.happened);
    TELL("changed blocks seen", counts.blocks_changed);
    TELL("depths seen", counts.depths);
#undef TELL
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_volumes),
        cmocka_unit_test(deaths),
        cmocka_unit_test(huge_volumes),
        cmocka_unit_test(what_happened),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
