/*
 * The cleaner: what removed snapshots, rollbacks and trims leave goes, all of it, and nothing that
 * somebody still names; whatever happens meanwhile (G7). After each test the store is looked
 * through (sim/stored.h).
 *
 * In a simulated world, on stores of both kinds (limits.clears_ranges); with STORE set (engine_test.h)
 * on an engine of the program.
 */
#include "engine_test.h"

#include "../sim/driver.h"
#include "../sim/real_world.h"
#include "../sim/seeds.h"
#include "../sim/stored.h"
#include "base/mem.h"
#include "volume/internal.h"

#define BS 4096u
#define UNIT2 ((uint64_t)BS << (2 * INDEX_SHIFT)) /* bytes below one level-2 row: 4 GiB */
#define SIZE (3 * UNIT2 + 40 * BS)
#define REGION (2u << 20)
#define SNAPSHOTS 16u

static bool on_engine;

/* How the store of a test is. */
struct kind {
    bool clears_ranges, log;
};
static const struct kind kinds[] = {{false, true}, {true, false}, {false, false}};
#define KINDS (on_engine ? 1u : 3u)

/* A volume, and what its snapshots must show. */
struct past {
    struct drv *d;
    struct held {
        char name[16];
        uint64_t epoch;
        uint8_t *bytes; /* of all regions */
    } held[SNAPSHOTS];
    unsigned n, named;
};

/* read_ns_max: as of mem_config. */
static struct past start_slow(uint64_t seed, const struct kind *kind, uint64_t read_ns_max)
{
    struct drv_config config = {
        .seed = seed,
        .size = SIZE,
        .block_size = BS,
        .codec = CODEC_NONE,
        .n_regions = 4, /* at the begin, at the end, and on both sides of level-2 rows */
        .region_bytes = REGION,
        .write_bytes_max = 200000,
        .cache_bytes = 64u << 20,
        .no_log = !kind->log,
        .seal_age_ms = 20,
        .store = {.has_log = kind->log,
                  .read_ns_max = read_ns_max,
                  .clears_ranges = kind->clears_ranges,
                  .commit_bytes_max = kind->log ? 0 : 9u << 20},
    };
    struct err e;
    struct real_config real = {.uri = engine.uri, .seed = seed};
    if (on_engine) {
        uint64_t c = seed;
        engine_reset(seed, &c);
        config.world = world_real_new(&real, &e);
        if (!config.world)
            fail_msg("%s", e.text);
    }
    struct past p = {.d = drv_new(&config)};
    drv_open(p.d);
    drv_request_ownership(p.d);
    assert_true(drv_drain(p.d));
    return p;
}

static struct past start_on(uint64_t seed, const struct kind *kind)
{
    return start_slow(seed, kind, 0);
}

/* --- asking for things ----------------------------------------------------------------- */

static void await(struct drv *d, struct asked *c)
{
    if (drv_answer(d, c) != ST_OK)
        fail_msg("%s", c->op.err.text);
}

/* Everything that was asked for is answered, so that the arrays are what a snapshot must hold. */
static uint64_t snapshot(struct past *p)
{
    struct drv *d = p->d;
    assert_true(p->n < SNAPSHOTS && drv_drain(d));
    struct held *h = &p->held[p->n++];
    snprintf(h->name, sizeof h->name, "s%u", p->named++);
    h->bytes = mem_alloc((size_t)d->n_regions * REGION);
    for (unsigned i = 0; i < d->n_regions; i++)
        memcpy(h->bytes + (size_t)i * REGION, d->regions[i].now, d->regions[i].len);
    struct asked c = drv_asked(h->name);
    volume_snapshot_create(d->p->vol, &c.op);
    await(d, &c);
    h->epoch = c.op.epoch;
    return h->epoch;
}

static void forget(struct past *p, unsigned i)
{
    free(p->held[i].bytes);
    memmove(&p->held[i], &p->held[i + 1], (p->n - i - 1) * sizeof p->held[0]);
    p->n--;
}

static void remove_nth(struct past *p, unsigned i)
{
    struct asked c = drv_asked(p->held[i].name);
    volume_snapshot_remove(p->d->p->vol, &c.op);
    await(p->d, &c);
    forget(p, i);
}

static bool is_clean(void *arg)
{
    return volume_is_clean(((struct drv *)arg)->p->vol);
}

static void wait_clean(struct past *p)
{
    struct drv *d = p->d;
    assert_true(drv_drain(d));
    drv_request_ownership(d);
    assert_true(drv_drain(d));
    assert_true(world_run_until(d->world, d->p->env, is_clean, d));
}

/* --- looking at it --------------------------------------------------------------------- */

/* Each snapshot shows what it showed when it was made. */
static void compare_snapshots(struct past *p)
{
    struct drv *d = p->d;
    uint8_t *seen = mem_alloc(REGION);
    for (unsigned i = 0; i < p->n; i++) {
        const struct held *h = &p->held[i];
        enum status st;
        struct volume *view = drv_view_open(d, d->p->shard, d->p->env, d->branch, h->epoch, &st);
        assert_int_equal(st, ST_OK);
        for (unsigned k = 0; k < d->n_regions; k++) {
            const struct region *r = &d->regions[k];
            for (uint64_t at = 0; at < r->len; at += VOLUME_READ_BYTES_MAX) {
                uint64_t n = min_u64(r->len - at, VOLUME_READ_BYTES_MAX);
                assert_int_equal(drv_view_read(d, view, r->start + at, n, seen + at), ST_OK);
            }
            if (memcmp(seen, h->bytes + (size_t)k * REGION, r->len))
                fail_msg("snapshot %s (epoch %llu) shows something else in region %u", h->name,
                         (unsigned long long)h->epoch, k);
        }
        drv_view_close(d, view, d->p->env);
        assert_false(d->violated);
    }
    free(seen);
}

/* Nothing is left that nobody names; everything shows what it must. */
static struct stored_counts look(struct past *p)
{
    struct drv *d = p->d;
    struct stored_counts counts;
    wait_clean(p);
    compare_snapshots(p);
    drv_reopen(d, true);
    assert_false(d->violated);
    process_close(d, d->p);
    const char *wrong = stored_check(d->world, true, &counts);
    if (wrong)
        fail_msg("seed %llu: %s", (unsigned long long)d->c.seed, wrong);
    assert_int_equal(counts.snapshots, p->n);
    process_open(d, d->p);
    drv_request_ownership(d);
    drv_verify_all(d);
    compare_snapshots(p);
    assert_false(d->violated);
    return counts;
}

static void end(struct past *p)
{
    struct drv *d = p->d;
    look(p);
    while (p->n)
        forget(p, 0);
    drv_close(d);
    const char *wrong = world_end(d->world);
    if (wrong)
        fail_msg("%s", wrong);
    assert_true(drv_free(d));
}

/* Writes into all regions, and trims of every size: in part, blocks, rows, level-2 rows. */
static void go_on(struct past *p, unsigned steps)
{
    struct drv *d = p->d;
    drv_steps(d, steps);
    if (drv_one_in(d, 2))
        drv_zero(d, drv_below(d, 2 * UNIT2), UNIT2 + drv_below(d, UNIT2), true, 0);
    if (drv_one_in(d, 4))
        drv_zero(d, 0, SIZE, true, 0);
    drv_steps(d, steps);
    assert_true(drv_drain(d));
}

/* --- removed snapshots ----------------------------------------------------------------- */

/* The oldest, the newest, one between two, two neighbours, all. */
static void any_of_several_goes(void **state)
{
    (void)state;
    static const unsigned orders[][6] = {
        {0, 0, 0, 0, 0, 0}, {5, 4, 3, 2, 1, 0}, {2, 2, 3, 0, 1, 0}, {1, 3, 1, 1, 0, 0}};
    for (unsigned k = 0; k < KINDS; k++) {
        for (unsigned o = 0; o < 4; o++) {
            struct past p = start_on(10 * k + o, &kinds[k]);
            for (unsigned i = 0; i < 6; i++) {
                go_on(&p, 30);
                snapshot(&p);
            }
            go_on(&p, 30);
            for (unsigned i = 0; i < 6; i++) {
                remove_nth(&p, orders[o][i]);
                if (o != 3 || i % 2)
                    look(&p);
            }
            end(&p);
        }
    }
}

/* Only what changed is looked at: a snapshot without changes goes without reading one row of the
 * first level, and with one changed block it takes two, however much there is. */
static void the_work_is_what_changed(void **state)
{
    (void)state;
    if (on_engine)
        return;
    for (unsigned k = 0; k < KINDS; k++) {
        struct past p = start_on(100 + k, &kinds[k]);
        for (unsigned i = 0; i < 60; i++)
            drv_write(p.d, i * (8u << 20), BS, 0);
        snapshot(&p);
        snapshot(&p);
        drv_write(p.d, 5 * (8u << 20), BS, 0);
        snapshot(&p);
        wait_clean(&p);
        struct mem_counts before, after;
        mem_store_counts(p.d->db, &before);
        remove_nth(&p, 0);
        wait_clean(&p);
        mem_store_counts(p.d->db, &after);
        uint64_t unchanged = after.background_reads - before.background_reads;
        mem_store_counts(p.d->db, &before);
        remove_nth(&p, 0);
        wait_clean(&p);
        mem_store_counts(p.d->db, &after);
        assert_int_equal(after.background_reads - before.background_reads, unchanged + 2);
        assert_in_range(unchanged, 1, 12);
        end(&p);
    }
}

/* A snapshot of the volume as it is now has no younger neighbour: what the volume lets go of before
 * the removal is known, while it is under way, and afterwards goes all the same. */
static void removed_under_writes(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("removed under writes", on_engine ? 4 : 30, 40);
    for (uint64_t s = 0; s < seeds.count; s++) {
        struct past p = start_on(seeds.first + s, &kinds[(seeds.first + s) % KINDS]);
        struct drv *d = p.d;
        for (unsigned round = 0; round < 6; round++) {
            for (unsigned i = 0; i < 3; i++) {
                drv_steps(d, seeds.steps);
                snapshot(&p);
            }
            drv_steps(d, seeds.steps);
            while (p.n > round / 2) {
                struct asked c = drv_asked(p.held[drv_below(d, p.n)].name);
                volume_snapshot_remove(d->p->vol, &c.op);
                while (!c.answered && !d->violated)
                    drv_steps(d, 3);
                assert_int_equal(c.op.io.st, ST_OK);
                unsigned i = 0;
                while (strcmp(p.held[i].name, c.op.name))
                    i++;
                forget(&p, i);
                if (drv_one_in(d, 3))
                    go_on(&p, 10);
                if (drv_one_in(d, 4))
                    snapshot(&p);
                drv_steps(d, drv_below(d, 30));
            }
        }
        end(&p);
    }
}

/* A removed snapshot is compared with the volume while that replaces row after row, each of which the
 * cleaner may have wanted to read: however often that happens, nothing is taken for damaged and
 * left. */
static void compared_under_writes(void **state)
{
    (void)state;
    if (on_engine)
        return;
    const uint64_t row = (uint64_t)BS << INDEX_SHIFT, rows = 300;
    for (unsigned k = 0; k < 6; k++) {
        struct past p = start_slow(400 + k, &kinds[k % KINDS], 8000000);
        struct drv *d = p.d;
        for (unsigned n = 0; n < 3; n++) {
            for (uint64_t i = 0; i < rows; i++) {
                drv_write(d, i * row + 3 * BS, BS, 0);
                if (i % 32 == 31)
                    assert_true(drv_drain(d));
            }
            snapshot(&p);
        }
        while (p.n)
            remove_nth(&p, p.n - 1);
        for (uint64_t i = 0; i < rows; i++) {
            drv_write(d, i * 7 % rows * row + 5 * BS, BS, 0);
            drv_moment(d, 12);
        }
        end(&p);
    }
}

/* What is counted for a range to be cleared covers it, with the longest end. */
static void a_cleared_range_weighs_what_was_counted(void **state)
{
    (void)state;
    struct key begin, end;
    key_block(&begin, UINT64_MAX, UINT64_MAX, 0);
    key_block(&end, UINT64_MAX, UINT64_MAX, UINT32_MAX);
    struct store_mutation m = {
        .kind = STORE_CLEAR_RANGE, .key = key_slice(&begin), .head = key_slice(&end)};
    assert_in_range(weight_of_mutation(&m), 1, weight_of_clears(1));
}

/* --- ancestry that does not tell ---------------------------------------------------------- */

/* Two snapshots that name the same and each something of its own. */
static struct past start_with_two(uint64_t seed, const struct kind *kind)
{
    struct past p = start_on(seed, kind);
    struct drv *d = p.d;
    for (unsigned i = 0; i < 2; i++) {
        drv_write(d, i * 200000, 300000, 0);
        drv_write(d, UNIT2, 100000, 0);
        snapshot(&p);
    }
    drv_write(d, 300000, 300000, 0);
    wait_clean(&p);
    return p;
}

/* A trash record of the first epoch, and so judged by a snapshot, comes to the store. */
static struct key put_trash_of_first(struct drv *d)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct trash_record rec = {.epoch = 1, .end_block = 100};
    key_trash(&key, d->branch, 1000);
    size_t len = trash_encode(&rec, key_slice(&key), bytes);
    mem_store_put(d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){0});
    return key;
}

/* Where it can't be told what a state sees, nothing goes, and whoever can tell does it. */
static void what_cannot_be_told_stays(void **state)
{
    (void)state;
    if (on_engine)
        return;
    for (unsigned k = 0; k < KINDS; k++) {
        struct past p = start_with_two(500 + k, &kinds[k]);
        struct drv *d = p.d;
        struct key snap, trash = put_trash_of_first(d);
        struct slice head, body;
        key_snapshot(&snap, d->branch, p.held[0].epoch);
        /* As if both had been rolled back. */
        d->p->vol->ancestry.after = p.held[1].epoch;
        snapshot(&p); /* after which trash is looked for anew */
        remove_nth(&p, 0);
        assert_true(world_run_until(d->world, d->p->env, is_clean, d));
        assert_true(mem_store_peek(d->db, key_slice(&snap), &head, &body));
        assert_true(mem_store_peek(d->db, key_slice(&trash), &head, &body));
        drv_reopen(d, true);
        look(&p);
        assert_false(mem_store_peek(d->db, key_slice(&snap), &head, &body));
        assert_false(mem_store_peek(d->db, key_slice(&trash), &head, &body));
        end(&p);
    }
}

/* However many ancestors there are, what the branch itself has is known. */
static void many_ancestors_do_not_matter(void **state)
{
    (void)state;
    if (on_engine)
        return;
    for (unsigned k = 0; k < KINDS; k++) {
        struct past p = start_with_two(510 + k, &kinds[k]);
        struct drv *d = p.d;
        struct key snap, trash = put_trash_of_first(d);
        struct slice head, body;
        key_snapshot(&snap, d->branch, p.held[0].epoch);
        struct ancestry_record *a = &d->p->vol->ancestry, was = *a;
        while (a->n_segments < ANCESTRY_MAX)
            a->segments[a->n_segments++] = (struct ancestry_segment){.branch = UINT32_MAX, .upto = 1};
        snapshot(&p); /* after which trash is looked for anew */
        remove_nth(&p, 0);
        assert_true(world_run_until(d->world, d->p->env, is_clean, d));
        assert_false(mem_store_peek(d->db, key_slice(&snap), &head, &body));
        assert_false(mem_store_peek(d->db, key_slice(&trash), &head, &body));
        *a = was;
        end(&p);
    }
}

/* --- trash ----------------------------------------------------------------------------- */

/* A trim of much under the eyes of a snapshot that comes before it was cleared: what was written
 * into the range again is the snapshot's, and stays until that goes. */
static void trash_is_judged_by_who_may_name_it(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("trash under snapshots", on_engine ? 4 : 40, 30);
    for (uint64_t s = 0; s < seeds.count; s++) {
        struct past p = start_on(seeds.first + s, &kinds[(seeds.first + s) % KINDS]);
        struct drv *d = p.d;
        for (unsigned round = 0; round < 5; round++) {
            drv_steps(d, seeds.steps);
            drv_drain(d);
            drv_zero(d, drv_below(d, REGION), UNIT2 + drv_below(d, UNIT2), true, 0);
            drv_zero(d, drv_below(d, REGION / 2), REGION / 4, true, 0);
            drv_steps(d, seeds.steps / 3);
            snapshot(&p);
            drv_steps(d, drv_below(d, seeds.steps));
            if (drv_one_in(d, 2))
                drv_zero(d, 0, SIZE, true, 0);
            if (drv_one_in(d, 3))
                remove_nth(&p, (unsigned)drv_below(d, p.n));
            if (drv_one_in(d, 3))
                look(&p);
        }
        while (p.n)
            remove_nth(&p, (unsigned)drv_below(d, p.n));
        end(&p);
    }
}

/* After snapshots were removed the volume has blocks of many epochs, and one trim of it all leaves one
 * record. */
static void one_trim_of_many_epochs(void **state)
{
    (void)state;
    for (unsigned k = 0; k < KINDS; k++) {
        struct past p = start_on(200 + k, &kinds[k]);
        struct drv *d = p.d;
        for (unsigned i = 0; i < 10; i++) {
            drv_write(d, i * 100000, 40000, 0);
            drv_write(d, UNIT2 - 100000, 200000, 0);
            snapshot(&p);
        }
        while (p.n > 1)
            remove_nth(&p, 1);
        wait_clean(&p);
        if (k != 1) {
            /* With rows that nobody has in memory. */
            drv_reopen(d, true);
            drv_request_ownership(d);
            drv_drain(d);
        }
        uint64_t next = d->p->vol->state.trash_next;
        drv_zero(d, 0, SIZE, true, 0);
        drv_sync(d);
        assert_int_equal(d->p->vol->state.trash_next, next + 1);
        struct stored_counts counts = look(&p);
        remove_nth(&p, 0);
        assert_true(counts.blocks > 0);
        counts = look(&p);
        assert_int_equal(counts.blocks, 0);
        /* Under a snapshot that holds everything there is nothing to leave. */
        drv_write(d, 0, 100000, 0);
        snapshot(&p);
        wait_clean(&p);
        next = d->p->vol->state.trash_next;
        drv_zero(d, 0, SIZE, true, 0);
        drv_sync(d);
        assert_int_equal(d->p->vol->state.trash_next, next);
        end(&p);
    }
}

static void write_full(struct drv *d, uint64_t off, uint64_t len)
{
    uint8_t *bytes = mem_alloc(len);
    memset(bytes, 0x5a, len);
    struct asked c = drv_asked("");
    c.op.io.granted = drv_answered;
    c.op.io.offset = off;
    c.op.io.length = (uint32_t)len;
    if (!volume_write_begin(d->p->vol, &c.op.io))
        assert_true(world_run_until(d->world, d->p->env, drv_is_answered, &c));
    c.answered = false;
    volume_write_commit(d->p->vol, &c.op.io, bytes);
    shard_submit(d->p->shard);
    await(d, &c);
    free(bytes);
}

/* Of what a trash record says, a snapshot may name all, over more rows than are looked at in one go,
 * and no client may write: the cleaner gets past it. Behind it is what nobody names. */
static void trash_that_is_all_named_goes(void **state)
{
    (void)state;
    if (on_engine)
        return;
    const uint64_t start = 1u << 30, part = 64u << 10, named = 16u << 20;
    for (unsigned k = 0; k < KINDS; k++) {
        struct past p = start_on(300 + k, &kinds[k]);
        struct drv *d = p.d;
        for (uint64_t at = 0; at < named; at += part)
            write_full(d, start + at, part);
        snapshot(&p);
        drv_reopen(d, true);
        process_close(d, d->p);
        struct key trash, left;
        uint8_t bytes[RECORD_BYTES_MAX];
        struct slice head, body;
        key_trash(&trash, d->branch, 0);
        struct trash_record rec = {.epoch = p.held[0].epoch,
                                   .first_block = start / BS,
                                   .end_block = (start + named) / BS + 1};
        size_t len = trash_encode(&rec, key_slice(&trash), bytes);
        mem_store_put(d->db, key_slice(&trash), (struct slice){bytes, len}, (struct slice){0});
        key_block(&left, d->branch, rec.epoch, rec.end_block - 1);
        mem_store_put(d->db, key_slice(&left), (struct slice){bytes, 1}, (struct slice){0});
        process_open(d, d->p);
        drv_request_ownership(d);
        assert_true(drv_drain(d));
        assert_true(world_run_until(d->world, d->p->env, is_clean, d));
        assert_false(mem_store_peek(d->db, key_slice(&trash), &head, &body));
        assert_false(mem_store_peek(d->db, key_slice(&left), &head, &body));
        end(&p);
    }
}

/* --- rollbacks ------------------------------------------------------------------------- */

/* The volume is what its nth snapshot holds; younger ones are gone. */
static void roll_back(struct past *p, unsigned nth)
{
    struct drv *d = p->d;
    const struct held *h = &p->held[nth];
    drv_reopen(d, true);
    process_close(d, d->p);
    char name[32];
    snprintf(name, sizeof name, "v@%s", h->name);
    struct waited find = {.op = {.done = drv_op_done}}, roll = {.op = {.done = drv_op_done}};
    catalog_find(&find.op, d->p->store, d->p->env, name);
    assert_int_equal(drv_op_wait(d, d->p->env, &find), ST_OK);
    catalog_rollback(&roll.op, d->p->store, d->p->env, &find.op.entries[0], true);
    if (drv_op_wait(d, d->p->env, &roll) != ST_OK)
        fail_msg("%s", roll.op.err.text);
    catalog_op_free(&find.op);
    catalog_op_free(&roll.op);
    for (unsigned i = 0; i < d->n_regions; i++) {
        struct region *r = &d->regions[i];
        memcpy(r->now, h->bytes + (size_t)i * REGION, r->len);
        memcpy(r->base, r->now, r->len);
        memset(r->alloc, ALLOC_UNKNOWN, r->len / BS + 1);
    }
    while (p->n > nth + 1)
        forget(p, p->n - 1);
    process_open(d, d->p);
}

/* Of the epochs between nothing stays, also where one rollback follows another, deaths come between,
 * and the snapshot it went back to is removed before they are cleared. */
static void rolled_back_epochs_go(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("rollbacks", on_engine ? 4 : 40, 25);
    for (uint64_t s = 0; s < seeds.count; s++) {
        struct past p = start_on(seeds.first + s, &kinds[(seeds.first + s) % KINDS]);
        struct drv *d = p.d;
        for (unsigned round = 0; round < 6; round++) {
            for (uint64_t n = 1 + drv_below(d, 3); n > 0; n--) {
                go_on(&p, (unsigned)drv_below(d, seeds.steps));
                snapshot(&p);
            }
            go_on(&p, (unsigned)drv_below(d, seeds.steps));
            if (drv_one_in(d, 3))
                remove_nth(&p, (unsigned)drv_below(d, p.n));
            if (p.n)
                roll_back(&p, (unsigned)drv_below(d, p.n));
            drv_steps(d, drv_below(d, 10));
            for (uint64_t n = drv_below(d, 60); n > 0; n--)
                drv_moment(d, 1);
            if (!on_engine && drv_one_in(d, 3)) {
                drv_crash(d, false);
                drv_recover(d, false);
            }
            if (p.n && drv_one_in(d, 3))
                remove_nth(&p, p.n - 1);
            if (drv_one_in(d, 3))
                look(&p);
        }
        end(&p);
    }
}

/* --- deaths ---------------------------------------------------------------------------- */

/* Whoever comes next goes on where the one that died stood. */
static void resumed_after_deaths(void **state)
{
    (void)state;
    if (on_engine)
        return;
    struct seeds seeds = seeds_begin("deaths", 40, 30);
    for (uint64_t s = 0; s < seeds.count; s++) {
        struct past p = start_on(seeds.first + s, &kinds[(seeds.first + s) % KINDS]);
        struct drv *d = p.d;
        for (unsigned i = 0; i < 4; i++) {
            go_on(&p, (unsigned)seeds.steps);
            snapshot(&p);
        }
        go_on(&p, (unsigned)seeds.steps);
        while (p.n || drv_one_in(d, 2)) {
            if (p.n)
                remove_nth(&p, (unsigned)drv_below(d, p.n));
            if (drv_one_in(d, 3))
                drv_zero(d, 0, SIZE, true, 0);
            if (drv_one_in(d, 3))
                drv_steps(d, 20);
            for (uint64_t n = drv_below(d, 200); n > 0; n--)
                drv_moment(d, 1);
            bool power = drv_one_in(d, 2);
            drv_crash(d, power);
            drv_recover(d, power);
            assert_false(d->violated);
        }
        end(&p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_of_several_goes),
        cmocka_unit_test(the_work_is_what_changed),
        cmocka_unit_test(removed_under_writes),
        cmocka_unit_test(compared_under_writes),
        cmocka_unit_test(a_cleared_range_weighs_what_was_counted),
        cmocka_unit_test(what_cannot_be_told_stays),
        cmocka_unit_test(many_ancestors_do_not_matter),
        cmocka_unit_test(trash_is_judged_by_who_may_name_it),
        cmocka_unit_test(one_trim_of_many_epochs),
        cmocka_unit_test(trash_that_is_all_named_goes),
        cmocka_unit_test(rolled_back_epochs_go),
        cmocka_unit_test(resumed_after_deaths),
    };
    const char *uri = getenv("STORE");
    on_engine = uri && *uri;
    if (on_engine)
        engine_choose();
    int rc = engine_done(cmocka_run_group_tests_name("cleaner", tests, NULL, NULL));
    if (on_engine)
        store_shutdown();
    return rc;
}
