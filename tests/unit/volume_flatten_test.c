/*
 * Flatten: a clone gets all its blocks and rows of its own, under writes, after deaths, and with blocks
 * that can't be read; then its parent can go, and it still shows what it must.
 */
#include "test.h"

#include <stdio.h>

#include "../sim/driver.h"
#include "../sim/seeds.h"
#include "../sim/stored.h"
#include "base/mem.h"
#include "volume/internal.h"

#define BS 4096u
#define UNIT2 ((uint64_t)BS << (2 * INDEX_SHIFT)) /* bytes below one level-2 row: 4 GiB */
#define SIZE (2 * UNIT2 + 40 * BS + 1536)
#define REGION (2u << 20)

struct kind {
    bool clears_ranges, log;
};
static const struct kind kinds[] = {{false, true}, {true, false}, {false, false}};

/* --- volumes, snapshots, clones -------------------------------------------------------- */

static void await(struct drv *d, struct waited *w)
{
    if (drv_op_wait(d, d->p->env, w) != ST_OK)
        fail_msg("%s", w->op.err.text);
}

static struct catalog_entry find(struct drv *d, const char *name)
{
    struct waited w = {.op = {.done = drv_op_done}};
    catalog_find(&w.op, d->p->store, d->p->env, name);
    await(d, &w);
    struct catalog_entry entry = w.op.entries[0];
    catalog_op_free(&w.op);
    return entry;
}

static void snapshot(struct drv *d, const char *name)
{
    struct asked c = drv_asked(name);
    assert_true(drv_drain(d));
    volume_snapshot_create(d->p->vol, &c.op);
    assert_int_equal(drv_answer(d, &c), ST_OK);
}

/* The driver goes on with a clone of the volume's snapshot. */
static void go_to_clone(struct drv *d, const char *of, const char *name)
{
    drv_reopen(d, true);
    process_close(d, d->p);
    struct catalog_entry from = find(d, of);
    struct volume_spec spec = {.codec = -1};
    snprintf(spec.name, sizeof spec.name, "%s", name);
    struct waited made = {.op = {.done = drv_op_done}};
    catalog_clone(&made.op, d->p->store, d->p->env, &from, &spec);
    await(d, &made);
    catalog_op_free(&made.op);
    d->branch = find(d, name).branch;
    process_open(d, d->p);
    drv_request_ownership(d);
    assert_true(drv_drain(d));
}

/* A clone in which something of everything is inherited, and something is not. */
static struct drv *start(uint64_t seed, unsigned generations)
{
    const struct kind *kind = &kinds[seed % 3];
    struct drv_config config = {
        .seed = seed,
        .size = SIZE,
        .block_size = BS,
        .codec = CODEC_LZ4,
        .n_regions = 5,
        .region_bytes = REGION,
        .write_bytes_max = 300000,
        .cache_bytes = 64u << 20,
        .no_log = !kind->log,
        .seal_age_ms = 20,
        .store = {.has_log = kind->log,
                  .clears_ranges = kind->clears_ranges,
                  .commit_bytes_max = kind->log ? 0 : 9u << 20},
    };
    struct drv *d = drv_new(&config);
    drv_open(d);
    drv_request_ownership(d);
    for (unsigned i = 0; i < generations; i++) {
        char name[16], of[16];
        snprintf(of, sizeof of, "%s%.0u@s", i ? "c" : "v", i);
        snprintf(name, sizeof name, "c%u", i + 1);
        /* Allocated zeros make rows without data, in one level-2 row nothing else. */
        drv_zero(d, 30u << 20, 10u << 20, false, VOL_NO_HOLE);
        drv_zero(d, UNIT2 + UNIT2 / 2, 3u << 20, false, VOL_NO_HOLE);
        drv_zero(d, UNIT2 + UNIT2 / 2 + (1u << 20), 500000, true, 0);
        drv_steps(d, 60);
        snapshot(d, "s");
        go_to_clone(d, of, name);
        if (drv_one_in(d, 2))
            drv_steps(d, 40);
    }
    return d;
}

/* All volumes but the driver's go, and what they left. */
static void remove_others(struct drv *d, unsigned generations)
{
    for (unsigned i = generations; i-- > 0;) {
        char name[16];
        snprintf(name, sizeof name, "%s%.0u", i ? "c" : "v", i);
        struct catalog_entry entry = find(d, name);
        struct waited w = {.op = {.done = drv_op_done}};
        catalog_remove(&w.op, d->p->store, d->p->env, &entry, true);
        await(d, &w);
        catalog_op_free(&w.op);
    }
    bool more = true;
    while (more) {
        struct waited w = {.op = {.done = drv_op_done}};
        catalog_clear_removed(&w.op, d->p->store, d->p->env, &more);
        await(d, &w);
        catalog_op_free(&w.op);
    }
}

static bool is_clean(void *arg)
{
    return volume_is_clean(((struct drv *)arg)->p->vol);
}

/* The clone has no parent, the parent is gone, and nothing was lost with it. */
static void end(struct drv *d, unsigned generations)
{
    drv_verify_all(d);
    drv_sync(d);
    drv_request_ownership(d);
    assert_true(drv_drain(d));
    assert_true(world_run_until(d->world, d->p->env, is_clean, d));
    assert_int_equal(d->p->vol->header.parent_branch, 0);
    assert_true(ancestry_empty(&d->p->vol->ancestry));
    drv_reopen(d, true);
    process_close(d, d->p);
    remove_others(d, generations);
    struct stored_counts counts;
    const char *wrong = stored_check(d->world, true, &counts);
    if (wrong)
        fail_msg("seed %llu: %s", (unsigned long long)d->c.seed, wrong);
    assert_int_equal(counts.volumes, 1);
    process_open(d, d->p);
    drv_verify_all(d);
    assert_false(d->violated);
    drv_close(d);
    assert_true(drv_free(d));
}

/* --- flattening ------------------------------------------------------------------------ */

static struct asked *flatten_part(struct drv *d, uint64_t offset)
{
    struct asked *c = mem_zalloc(sizeof *c);
    *c = drv_asked("");
    c->op.io.offset = offset;
    volume_flatten(d->p->vol, &c->op);
    return c;
}

/* Part after part; how many. */
static unsigned flatten(struct drv *d)
{
    unsigned parts = 0;
    for (uint64_t at = 0; at < volume_size(d->p->vol); parts++) {
        struct asked *c = flatten_part(d, at);
        if (drv_answer(d, c) != ST_OK)
            fail_msg("seed %llu: %s", (unsigned long long)d->c.seed, c->op.err.text);
        assert_true(c->op.io.offset > at);
        at = c->op.io.offset;
        free(c);
    }
    return parts;
}

static void a_clone_gets_its_own(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 9; seed++) {
        unsigned generations = 1 + (unsigned)(seed / 3);
        struct drv *d = start(seed, generations);
        assert_true(drv_drain(d));
        drv_sync(d);
        uint64_t changed_by_clients = d->p->vol->state.changed;
        flatten(d);
        drv_sync(d);
        /* Nothing changed for those who are connected. */
        assert_int_equal(d->p->vol->state.changed, changed_by_clients);
        /* Once more: there is nothing to do. */
        assert_int_equal(flatten(d), 1);
        end(d, generations);
    }
}

static uint32_t status_at(struct drv *d, uint64_t offset)
{
    struct vol_extent extent;
    struct asked c = drv_asked("");
    c.op.io.offset = offset;
    c.op.io.length = BS;
    c.op.io.extents = &extent;
    c.op.io.extents_cap = 1;
    volume_status(d->p->vol, &c.op.io);
    assert_int_equal(drv_answer(d, &c), ST_OK);
    return extent.flags;
}

/* Also where nothing else is below a level-2 row. */
static void allocated_zeros_stay_allocated(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 3; seed++) {
        struct drv *d = start(seed, 0);
        drv_zero(d, UNIT2, 4u << 20, false, VOL_NO_HOLE);
        snapshot(d, "s");
        go_to_clone(d, "v@s", "c1");
        assert_int_equal(status_at(d, UNIT2), VOL_EXTENT_ZERO);
        flatten(d);
        drv_reopen(d, true);
        assert_int_equal(status_at(d, UNIT2), VOL_EXTENT_ZERO);
        assert_int_equal(status_at(d, UNIT2 + (4u << 20)), VOL_EXTENT_ZERO | VOL_EXTENT_HOLE);
        end(d, 1);
    }
}

/* What clients write meanwhile is not overtaken. */
static void under_writes(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("flatten under writes", 30, 8);
    for (uint64_t s = 0; s < seeds.count; s++) {
        struct drv *d = start(seeds.first + s, 1 + (unsigned)(s % 2));
        for (uint64_t at = 0; at < volume_size(d->p->vol);) {
            struct asked *c = flatten_part(d, at);
            while (!c->answered && !d->violated)
                drv_steps(d, seeds.steps);
            assert_int_equal(c->op.io.st, ST_OK);
            at = c->op.io.offset;
            free(c);
        }
        drv_steps(d, 50);
        end(d, 1 + (unsigned)(s % 2));
    }
}

static void after_deaths(void **state)
{
    (void)state;
    struct seeds seeds = seeds_begin("flatten and deaths", 30, 8);
    for (uint64_t s = 0; s < seeds.count; s++) {
        struct drv *d = start(seeds.first + s, 1);
        struct asked *lost[64];
        unsigned n = 0;
        for (uint64_t at = 0; at < volume_size(d->p->vol);) {
            struct asked *c = flatten_part(d, at);
            bool dies = n < 40 && drv_one_in(d, 3);
            for (uint64_t i = 1 + drv_below(d, 400); !c->answered && (i || !dies); i -= i > 0)
                drv_moment(d, 1);
            if (dies) {
                bool power = drv_one_in(d, 2);
                lost[n++] = c;
                drv_crash(d, power);
                drv_recover(d, power);
                assert_false(d->violated);
                continue;
            }
            assert_int_equal(c->op.io.st, ST_OK);
            at = c->op.io.offset;
            free(c);
        }
        while (n)
            free(lost[--n]);
        end(d, 1);
    }
}

/* Snapshots of the clone hold what is inherited, also one that is made on the way. */
static void not_with_snapshots(void **state)
{
    (void)state;
    for (uint64_t seed = 100; seed < 112; seed++) {
        struct drv *d = start(seed, 1);
        struct asked *first = flatten_part(d, 0);
        struct asked made = drv_asked("t");
        for (uint64_t n = drv_below(d, 300); n && !first->answered; n--)
            drv_moment(d, 1);
        volume_snapshot_create(d->p->vol, &made.op);
        assert_int_equal(drv_answer(d, &made), ST_OK);
        enum status st = drv_answer(d, first);
        /* It was faster as a whole, or it did not come to its end. */
        bool whole = st == ST_OK && first->op.io.offset == volume_size(d->p->vol);
        assert_true(st == ST_OK || st == ST_BUSY);
        assert_true(!whole || !d->p->vol->header.parent_branch);
        for (uint64_t at = first->op.io.offset; !whole; at = 0) {
            struct asked *c = flatten_part(d, at);
            assert_int_equal(drv_answer(d, c), ST_BUSY);
            assert_true(c->op.err.text[0]);
            assert_int_not_equal(d->p->vol->header.parent_branch, 0);
            free(c);
            if (at == 0)
                break;
        }
        made.answered = false;
        volume_snapshot_remove(d->p->vol, &made.op);
        assert_int_equal(drv_answer(d, &made), ST_OK);
        free(first);
        flatten(d);
        end(d, 1);
    }
}

/* An offset that was never reached is no way around the work. */
static void the_end_is_reached_from_the_begin(void **state)
{
    (void)state;
    struct drv *d = start(200, 1);
    struct asked *c = flatten_part(d, volume_size(d->p->vol));
    assert_int_equal(drv_answer(d, c), ST_OK);
    free(c);
    flatten(d);
    end(d, 1);
}

/* A block of the parent that can't be read keeps the parent, and says so; written anew, it is no
 * matter any more. */
static void a_lost_block_keeps_the_parent(void **state)
{
    (void)state;
    struct drv *d = start(300, 1);
    d->c.damaged = true;
    drv_write(d, 0, BS, 0);
    drv_sync(d);
    struct row_source src = {0};
    uint64_t no = 0;
    for (; no < REGION / BS && src.branch != d->branch - 1; no++)
        if (index_row1(d->p->vol, 0))
            (void)index_lookup(d->p->vol, no, &src);
    assert_int_equal(src.branch, d->branch - 1);
    no--;
    struct key key;
    key_block(&key, src.branch, src.epoch, no);
    drv_reopen(d, true);
    drv_request_ownership(d);
    assert_true(drv_drain(d));
    assert_true(mem_store_damage(d->db, key_slice(&key), MEM_FLIP_BODY));
    struct asked *c = flatten_part(d, 0);
    assert_int_equal(drv_answer(d, c), ST_IO);
    assert_true(c->op.io.offset <= no * BS);
    assert_non_null(strstr(c->op.err.text, "parent"));
    assert_int_equal(d->p->vol->header.parent_branch, d->branch - 1);
    free(c);
    drv_write(d, no * BS, BS, 0);
    flatten(d);
    end(d, 1);
}

/* A resize that was answered with an error and still waits for its commit: the header that a flatten
 * writes does not take the size back. */
static void a_size_on_its_way_stays(void **state)
{
    (void)state;
    struct drv *d = start(0, 1);
    assert_true(drv_drain(d));
    drv_sync(d);
    uint64_t at = 0, size = volume_size(d->p->vol) + (64u << 20);
    d->c.faults = true;
    mem_store_set_faults(d->db, (struct mem_faults){.commit_fails = 1});
    struct asked resize = drv_asked("");
    volume_resize(d->p->vol, &resize.op.io, size, false);
    assert_int_equal(drv_answer(d, &resize), ST_IO);
    bool failing = true;
    while (failing || at < volume_size(d->p->vol)) {
        struct asked *c = flatten_part(d, at);
        for (unsigned n = 0; n < 3000 && !c->answered; n++)
            drv_moment(d, 1);
        if (failing && (!c->answered || c->op.io.st == ST_BUSY)) {
            mem_store_set_faults(d->db, (struct mem_faults){0});
            failing = false;
        }
        enum status st = drv_answer(d, c);
        assert_true(st == ST_OK || st == ST_BUSY);
        at = c->op.io.offset;
        free(c);
        if (st == ST_BUSY)
            drv_sync(d);
    }
    drv_sync(d);
    assert_int_equal(d->p->vol->header.parent_branch, 0);
    assert_int_equal(volume_size(d->p->vol), size);
    assert_int_equal(find(d, "c1").header.size, size);
    d->size = d->base_size = size;
    d->c.damaged = true; /* its arrays know the old size */
    end(d, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_clone_gets_its_own),
        cmocka_unit_test(allocated_zeros_stay_allocated),
        cmocka_unit_test(under_writes),
        cmocka_unit_test(after_deaths),
        cmocka_unit_test(not_with_snapshots),
        cmocka_unit_test(the_end_is_reached_from_the_begin),
        cmocka_unit_test(a_lost_block_keeps_the_parent),
        cmocka_unit_test(a_size_on_its_way_stays),
    };
    return cmocka_run_group_tests_name("flatten", tests, NULL, NULL);
}
