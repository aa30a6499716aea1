/*
 * The volume against a plain array, as in volume_model_test.c, on the engines of the program:
 * the same driver and the same checks, in real time, with the real reactor (sim/real_world.h).
 *
 * STORE and FAULTS say on what (engine_test.h); SEED, SEEDS, STEPS which seeds and how many
 * requests each, and LONG=1 asks for 10,000 seeds where there are faults.
 *
 * So against a real cluster:
 *
 *     STORE=fdb:/etc/foundationdb/fdb.cluster SEEDS=20 build/tests/test_volume_engine_test
 *
 * Every seed has a store (a prefix) of its own, which is removed again. On engines without a
 * log processes die, too, while commits they have given to the engine land or do not, under the
 * eyes of the next owner (sim/mortal_store.h). A seed gives requests and rates; the order of
 * events is the machine's, so a replay meets the same only by and large.
 */
#include "engine_test.h"

#include <pthread.h>

#include "../sim/driver.h"
#include "../sim/family.h"
#include "../sim/real_world.h"
#include "../sim/seeds.h"

#define SEEDS_FOR_ALL_FAULTS 200u /* with so many each kind of fault must have happened */

/* What happened over all seeds of this run. */
static struct totals {
    uint64_t seeds, requests, reads_checked, bytes_checked, reopens, takeovers, outages;
    uint64_t deaths, late_landed, late_refused, late_failed;
    struct family_counts family;
} totals;

/* The cluster stops answering, for a moment; a thread ends that, because opening and closing a
 * store wait for it. */
static pthread_t outage;
static bool outage_on;
static unsigned outage_ms;

static void *outage_run(void *arg)
{
    (void)arg;
    usleep(outage_ms * 1000);
    engine_set("down", 0);
    return NULL;
}

static void outage_end(void)
{
    if (outage_on)
        pthread_join(outage, NULL);
    outage_on = false;
}

static void maybe_outage(struct drv *d)
{
    if (!engine.faults || !drv_one_in(d, 6))
        return;
    outage_end();
    totals.outages++;
    outage_ms = 1 + (unsigned)drv_below(d, 60);
    engine_set("down", 1);
    outage_on = pthread_create(&outage, NULL, outage_run, NULL) == 0;
    if (!outage_on)
        engine_set("down", 0);
}

/* --- one seed ------------------------------------------------------------------------- */

/* An empty store, and what kind of volume is in it. */
static struct drv_config configure(uint64_t seed, uint64_t *c, bool mortal)
{
    struct err e;
    *c = seed * 2654435761u + 4711;
    (void)engine_pick(c, 2);
    engine_reset(seed, c);
    struct drv_config config = {
        .seed = seed,
        .block_size = 4096u << engine_pick(c, 5),
        .codec = (int)engine_pick(c, 3),
        .no_log = engine_pick(c, 5) == 0,
        .seal_age_ms = 1 + (uint32_t)engine_pick(c, 3) * 20,
        .log_bytes = 8u << 20,
        .write_bytes_max = engine_pick(c, 2) ? 0 : 300000,
    };
    switch (engine_pick(c, 8)) {
    case 0: /* terabytes, of which a few dozen places are looked at */
        config.size = ((1ull << 40) << engine_pick(c, 7)) - 512 * engine_pick(c, 3);
        config.n_regions = 10 + (unsigned)engine_pick(c, 60);
        config.region_bytes = (1 + engine_pick(c, 12)) * config.block_size;
        break;
    case 1: /* a few blocks only: requests meet each other all the time */
        config.size = 512 * (1 + engine_pick(c, 600));
        config.resize = true;
        break;
    default:
        config.size = 512 * (1 + engine_pick(c, 16384));
        config.resize = true;
    }
    struct real_config real = {.uri = engine.uri, .seed = seed, .mortal = mortal};
    /* Heartbeats, and now and then takeovers after silence. */
    if (engine_pick(c, 3) == 0)
        real.lease_ms = 100 + (uint32_t)engine_pick(c, 200);
    real.deaths_unknown = real.lease_ms && engine_pick(c, 6) == 0;
    config.world = world_real_new(&real, &e);
    if (!config.world)
        fail_msg("seed %llu: %s\n", (unsigned long long)seed, e.text);
    return config;
}

static struct drv *begin(uint64_t seed, uint64_t *c, bool mortal)
{
    struct drv_config config = configure(seed, c, mortal);
    struct drv *d = drv_new(&config);
    if (!d->violated)
        drv_open(d);
    return d;
}

static void end(struct drv *d)
{
    uint64_t seed = d->c.seed;
    outage_end();
    if (!d->violated)
        drv_verify_all(d);
    if (!d->violated && drv_one_in(d, 2))
        engine_calm();
    if (!d->violated)
        drv_reopen(d, true);
    if (!d->violated)
        drv_verify_all(d);
    if (!d->violated)
        drv_close(d);
    const struct graveyard *g = world_real_graveyard(d->world);
    totals.deaths += g->deaths;
    totals.requests += d->requests;
    totals.reads_checked += d->reads_checked;
    totals.bytes_checked += d->bytes_checked;
    totals.seeds++;
    struct world *world = d->world;
    const char *wrong = d->violated ? NULL : world_end(world);
    if (wrong)
        drv_violation(d, "%s", wrong);
    totals.late_landed += g->late_landed;
    totals.late_refused += g->late_refused;
    totals.late_failed += g->late_failed;
    if (!drv_free(d))
        fail_msg("to replay: SEED=%llu SEEDS=1\n", (unsigned long long)seed);
    engine_count(seed);
}

/* Some requests, an outage perhaps, and now and then a flush or a commit after a while. */
static void work(struct drv *d, uint64_t steps)
{
    maybe_outage(d);
    drv_steps(d, steps);
    if (d->violated || !drv_one_in(d, 3))
        return;
    drv_wait_ms(d, drv_below(d, 6));
    enum status st = d->violated ? ST_OK : drv_one_in(d, 2) ? drv_flush(d) : drv_sync(d);
    if (st != ST_OK && !d->violated)
        drv_violation(d, "a flush failed: %s", status_text(st));
}

static struct seeds seeds_of(const char *what, uint64_t count, uint64_t steps)
{
    if (seeds_env("LONG", 0) && engine.faults)
        count = 5000; /* and as many of the other test */
    if (seeds_env("SLOW", 1) > 1)
        count = count / 4 + 1;
    return seeds_begin(what, count, steps);
}

/* Ends in good order, within a process and of the process. */
static void requests_and_reopenings(void **state)
{
    (void)state;
    struct seeds s = seeds_of("requests and reopenings", engine.faults ? 120 : 12,
                              engine.faults ? 100 : 300);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv *d = begin(s.first + i, &c, false);
        for (uint64_t done = 0; done < s.steps && !d->violated;) {
            uint64_t n = 1 + drv_below(d, s.steps / 2);
            work(d, n);
            done += n;
            if (!d->violated && drv_one_in(d, 2)) {
                drv_reopen(d, drv_one_in(d, 2));
                totals.reopens++;
            }
        }
        end(d);
    }
}

/* One life after the other, each ended by death; some while they take over. */
static void deaths(void **state)
{
    (void)state;
    struct seeds s = seeds_of("deaths", engine.faults ? 80 : 12, engine.faults ? 60 : 150);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        struct drv *d = begin(s.first + i, &c, true);
        for (unsigned life = 0; life < 3 && !d->violated; life++) {
            work(d, drv_below(d, s.steps));
            if (!d->violated)
                drv_moment(d, drv_below(d, 40));
            /* What was just answered is what is the easiest to lose. */
            if (!d->violated && drv_one_in(d, 3))
                drv_flush(d);
            if (d->violated)
                break;
            drv_crash(d, false);
            while (!d->violated && drv_one_in(d, 3)) {
                drv_open(d);
                if (d->violated)
                    break;
                drv_request_ownership(d);
                drv_moment(d, drv_below(d, 60));
                drv_crash(d, false);
            }
            if (!d->violated)
                drv_recover(d, false);
            totals.takeovers++;
        }
        end(d);
    }
}

/* Snapshots, clones and rollbacks, as in volume_history_test.c. */
static void histories(void **state)
{
    (void)state;
    struct seeds s = seeds_of("histories", engine.faults ? 24 : 10, engine.faults ? 250 : 500);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t c;
        bool mortal = !engine.is_lmdb && (s.first + i) % 2;
        struct family_config config = {.drv = configure(s.first + i, &c, mortal), .deaths = mortal};
        if (config.drv.n_regions > 1) {
            config.drv.n_regions = 5 + config.drv.n_regions % 20;
            config.drv.region_bytes = (1 + engine_pick(&c, 6)) * config.drv.block_size;
        }
        /* (All snapshots are kept in memory, too.) */
        config.drv.size = config.drv.n_regions > 1 ? config.drv.size
                                                   : min_u64(config.drv.size, 2u << 20);
        if (!family_run(&config, s.steps, &totals.family))
            fail_msg("to replay: SEED=%llu SEEDS=1\n", (unsigned long long)(s.first + i));
        engine_count(s.first + i);
    }
}

/* --- what happened -------------------------------------------------------------------- */

static void every_kind_happened(void **state)
{
    (void)state;
    engine_tell("seeds", totals.seeds);
    engine_tell("requests", totals.requests);
    engine_tell("reads checked", totals.reads_checked);
    engine_tell("bytes checked", totals.bytes_checked);
    engine_tell("reopened", totals.reopens);
    engine_tell("processes that died", totals.deaths);
    engine_tell("takeovers compared", totals.takeovers);
    engine_tell("commits of dead ones: landed", totals.late_landed);
    engine_tell("  refused", totals.late_refused);
    engine_tell("  failed", totals.late_failed);
    engine_tell("outages of the cluster", totals.outages);
    engine_tell("snapshots", totals.family.snapshots);
    engine_tell("  compared", totals.family.views_compared);
    engine_tell("clones", totals.family.clones);
    engine_tell("rollbacks", totals.family.rollbacks);
    engine_tell("changes of history cut short", totals.family.cut_short);
    if (!engine.fake)
        return;
    engine_tell("commits", engine.sum.commits_happened);
    engine_tell("  truly refused", engine.sum.commits_refused);
    engine_tell("retries", engine.sum.retries);
    engine_tell("gets", engine.sum.gets);
    engine_tell("ranges", engine.sum.ranges);
    if (!engine.faults)
        return;
    unsigned never = engine_tell_faults();
    if (totals.seeds >= SEEDS_FOR_ALL_FAULTS &&
        (never || !totals.outages || !totals.late_landed ||
         (totals.seeds >= 1000 && !totals.late_refused)))
        fail_msg("some kinds of faults never happened\n");
}

int main(void)
{
    const struct CMUnitTest with_log[] = {
        cmocka_unit_test(requests_and_reopenings),
        cmocka_unit_test(histories),
        cmocka_unit_test(every_kind_happened),
    };
    const struct CMUnitTest without_log[] = {
        cmocka_unit_test(requests_and_reopenings),
        cmocka_unit_test(deaths),
        cmocka_unit_test(histories),
        cmocka_unit_test(every_kind_happened),
    };
    engine_choose();
    return engine_done(engine.is_lmdb ? cmocka_run_group_tests(with_log, NULL, NULL)
                                      : cmocka_run_group_tests(without_log, NULL, NULL));
}
