/*
 * The block status against plain arrays: random writes, zeroes and trims, snapshots between them,
 * clones of snapshots and clones of these; then everything is compared with everything: what is
 * allocated, how deep in the chain of clones it lies, what differs from an older snapshot. SEED=n
 * replays one.
 */
#include "test.h"

#include <stdio.h>

#include "../sim/driver.h"
#include "../sim/seeds.h"
#include "base/mem.h"
#include "volume/internal.h"
#include "volume/rows.h"

#define BS 4096u
#define ROW_BLOCKS INDEX_FANOUT
/* More than one level-2 row, and a last block that is not whole. */
#define SIZE ((5ull << 30) + 3 * 512)
#define BLOCKS ((SIZE + BS - 1) / BS)
#define CHAIN 3u
#define IMAGES 4u
#define EXTENTS 300u
#define WRITE_BLOCKS_MAX 40u

enum { ABSENT, ZERO, HOLE, DATA };

/* What a volume or snapshot is, block by block. */
struct image {
    uint64_t branch, epoch; /* epoch 0: the volume itself */
    struct block {
        uint32_t version : 24; /* DATA: another one for each write */
        uint32_t kind : 2;
        uint32_t depth : 6; /* of the volume that wrote it in the chain; the last one is 1 */
    } *blocks;
};

struct bench {
    struct drv *d;
    struct volume *vol;
    unsigned level; /* of the volume in the chain of clones */
    struct image now;
    struct image snapshots[IMAGES];
    unsigned n_snapshots;
    struct image parent; /* the snapshot it is a clone of, where level is not 0 */
    uint32_t version;
};

/* --- requests ------------------------------------------------------------------------ */

struct waiting {
    struct vol_io io;
    struct volume_open open;
    struct vol_history_op history;
    struct catalog_op catalog;
    struct shard *shard;
    bool granted, answered;
};

static bool is_answered(void *arg)
{
    struct waiting *w = arg;
    shard_submit(w->shard);
    return w->answered;
}

static void wait_for(struct bench *b, struct waiting *w)
{
    w->shard = b->d->p->shard;
    assert_true(world_run_until(b->d->world, b->d->p->env, is_answered, w));
}

static void io_done(struct vol_io *io)
{
    container_of(io, struct waiting, io)->answered = true;
}

static void io_granted(struct vol_io *io)
{
    container_of(io, struct waiting, io)->granted = true;
}

static bool is_granted(void *arg)
{
    return ((struct waiting *)arg)->granted;
}

static void write_blocks(struct bench *b, uint64_t first, uint64_t n)
{
    static uint8_t data[WRITE_BLOCKS_MAX * BS];
    struct waiting w = {.io = {.done = io_done, .granted = io_granted, .offset = first * BS}};
    w.io.length = min_u64(n * BS, SIZE - w.io.offset);
    memset(data, (int)(1 + b->version % 255), sizeof data);
    w.granted = volume_write_begin(b->vol, &w.io);
    assert_true(world_run_until(b->d->world, b->d->p->env, is_granted, &w));
    assert_int_equal(w.io.st, ST_OK);
    volume_write_commit(b->vol, &w.io, data);
    wait_for(b, &w);
    assert_int_equal(w.io.st, ST_OK);
    b->version++;
    for (uint64_t i = first; i < first + n; i++)
        b->now.blocks[i] = (struct block){b->version & 0xffffff, DATA, 1};
}

static void zero_blocks(struct bench *b, uint64_t first, uint64_t n, bool keep)
{
    struct waiting w = {.io = {.done = io_done, .offset = first * BS}};
    w.io.length = min_u64(n * BS, SIZE - w.io.offset);
    if (keep) {
        w.io.flags = VOL_NO_HOLE;
        volume_zero(b->vol, &w.io);
    } else {
        volume_trim(b->vol, &w.io);
    }
    wait_for(b, &w);
    assert_int_equal(w.io.st, ST_OK);
    uint32_t kind = keep ? ZERO : b->level ? HOLE : ABSENT;
    for (uint64_t i = first; i < first + n; i++)
        b->now.blocks[i] = (struct block){0, kind & 3, 1};
}

static void change(struct bench *b)
{
    struct drv *d = b->d;
    static const uint64_t lengths[] = {1, WRITE_BLOCKS_MAX, 3 * ROW_BLOCKS, 400 * ROW_BLOCKS};
    /* Mostly in some rows, so that changes meet. */
    uint64_t first = drv_one_in(d, 3) ? drv_below(d, BLOCKS)
                                      : drv_below(d, 3) * 600 * ROW_BLOCKS + drv_below(d, 3000);
    uint64_t kind = drv_below(d, 8);
    uint64_t n = 1 + drv_below(d, lengths[drv_below(d, kind < 5 ? 2 : 4)]);
    n = min_u64(n, BLOCKS - first);
    if (kind < 5)
        write_blocks(b, first, n);
    else
        zero_blocks(b, first, n, kind == 5);
}

static struct image copy_of(const struct image *image, uint64_t epoch)
{
    struct image copy = {.branch = image->branch, .epoch = epoch};
    copy.blocks = mem_alloc(BLOCKS * sizeof *copy.blocks);
    memcpy(copy.blocks, image->blocks, BLOCKS * sizeof *copy.blocks);
    return copy;
}

static void history_done(struct vol_io *io)
{
    struct vol_history_op *op = container_of(io, struct vol_history_op, io);
    container_of(op, struct waiting, history)->answered = true;
}

static void take_snapshot(struct bench *b)
{
    struct waiting w = {.history = {.io = {.done = history_done}}};
    snprintf(w.history.name, sizeof w.history.name, "s%u", b->n_snapshots);
    volume_snapshot_create(b->vol, &w.history);
    wait_for(b, &w);
    assert_int_equal(w.history.io.st, ST_OK);
    b->snapshots[b->n_snapshots++] = copy_of(&b->now, w.history.epoch);
}

static void open_done(struct volume_open *op)
{
    container_of(op, struct waiting, open)->answered = true;
}

static struct volume *open_image(struct bench *b, const struct image *image)
{
    struct waiting w = {
        .open = {.branch = image->branch, .epoch = image->epoch, .name = "v", .done = open_done}};
    volume_open(b->d->p->shard, &w.open);
    wait_for(b, &w);
    assert_int_equal(w.open.st, ST_OK);
    return w.open.vol;
}

static void closed(void *arg)
{
    ((struct waiting *)arg)->answered = true;
}

static void close_image(struct bench *b, struct volume *vol)
{
    struct waiting w = {0};
    volume_close(vol, closed, &w);
    wait_for(b, &w);
}

/* --- what the status must say -------------------------------------------------------- */

static uint32_t allocation(const struct block *block)
{
    return block->kind == DATA   ? 0
           : block->kind == ZERO ? VOL_EXTENT_ZERO
                                 : VOL_EXTENT_ZERO | VOL_EXTENT_HOLE;
}

static uint32_t expected(enum vol_status_of of, const struct image *now, const struct image *since,
                         uint64_t no)
{
    const struct block *block = &now->blocks[no];
    if (of == VOL_STATUS_ALLOCATION)
        return allocation(block);
    if (of == VOL_STATUS_DEPTH)
        return block->kind == ABSENT ? 0 : block->kind == DATA ? block->depth : 1;
    return block->version == since->blocks[no].version ? 0
                                                       : VOL_EXTENT_CHANGED | allocation(block);
}

/* The whole volume by requests of any kind. */
static void check(struct bench *b, enum vol_status_of of, const struct image *now,
                  const struct image *since)
{
    static struct vol_extent extents[EXTENTS];
    struct drv *d = b->d;
    struct volume *vol = now->epoch ? open_image(b, now) : b->vol;
    struct volume *before = since ? open_image(b, since) : NULL;
    uint64_t at = 0;
    while (at < SIZE) {
        struct waiting w = {.io = {.done = io_done,
                                   .offset = at,
                                   .length = SIZE - at,
                                   .extents = extents,
                                   .extents_cap = EXTENTS,
                                   .status_of = of,
                                   .since = before}};
        if (drv_one_in(d, 3))
            w.io.length = 1 + drv_below(d, min_u64(SIZE - at, 1ull << (9 + drv_below(d, 24))));
        if (drv_one_in(d, 3))
            w.io.extents_cap = 1 + (uint32_t)drv_below(d, EXTENTS);
        if (drv_one_in(d, 8))
            w.io.flags = VOL_REQ_ONE;
        volume_status(vol, &w.io);
        wait_for(b, &w);
        assert_int_equal(w.io.st, ST_OK);
        assert_in_range(w.io.n_extents, 1, w.io.flags ? 1 : w.io.extents_cap);
        for (uint32_t i = 0; i < w.io.n_extents; i++) {
            const struct vol_extent *e = &extents[i];
            assert_true(e->length > 0);
            assert_false(i && e->flags == extents[i - 1].flags);
            for (uint64_t no = at / BS; no <= (at + e->length - 1) / BS; no++)
                if (e->flags != expected(of, now, since, no))
                    fail_msg("block %llu of %llu@%llu, status of %d since %llu: %u, not %u",
                             (unsigned long long)no, (unsigned long long)now->branch,
                             (unsigned long long)now->epoch, (int)of,
                             since ? (unsigned long long)since->epoch : 0, e->flags,
                             expected(of, now, since, no));
            at += e->length;
        }
        assert_true(at <= w.io.offset + w.io.length);
    }
    if (before)
        close_image(b, before);
    if (now->epoch)
        close_image(b, vol);
}

static void check_all(struct bench *b)
{
    for (unsigned i = 0; i <= b->n_snapshots; i++) {
        const struct image *now = i < b->n_snapshots ? &b->snapshots[i] : &b->now;
        check(b, VOL_STATUS_ALLOCATION, now, NULL);
        check(b, VOL_STATUS_DEPTH, now, NULL);
        for (unsigned k = 0; k < i; k++)
            check(b, VOL_STATUS_CHANGED, now, &b->snapshots[k]);
        /* The sources of blocks mean the same in all branches. */
        if (b->level)
            check(b, VOL_STATUS_CHANGED, now, &b->parent);
    }
}

/* --- the chain of clones ------------------------------------------------------------- */

static void op_done(struct catalog_op *op)
{
    container_of(op, struct waiting, catalog)->answered = true;
}

/* A clone of the volume's snapshot `no` takes its place. */
static void go_to_clone(struct bench *b, unsigned no)
{
    char text[32];
    struct drv *d = b->d;
    struct waiting w = {.catalog = {.done = op_done}};
    snprintf(text, sizeof text, "%s%u@s%u", b->level ? "c" : "v", b->level, no);
    catalog_find(&w.catalog, d->p->store, d->p->env, text);
    wait_for(b, &w);
    assert_int_equal(w.catalog.st, ST_OK);
    struct waiting made = {.catalog = {.done = op_done}};
    struct volume_spec spec = {.codec = -1};
    snprintf(spec.name, sizeof spec.name, "c%u", ++b->level);
    catalog_clone(&made.catalog, d->p->store, d->p->env, &w.catalog.entries[0], &spec);
    wait_for(b, &made);
    assert_int_equal(made.catalog.st, ST_OK);
    catalog_op_free(&w.catalog);
    catalog_op_free(&made.catalog);

    made = (struct waiting){.catalog = {.done = op_done}};
    catalog_find(&made.catalog, d->p->store, d->p->env, spec.name);
    wait_for(b, &made);
    assert_int_equal(made.catalog.st, ST_OK);
    close_image(b, b->vol);
    free(b->parent.blocks);
    free(b->now.blocks);
    b->parent = b->snapshots[no];
    b->now = copy_of(&b->parent, 0);
    b->now.branch = made.catalog.entries[0].branch;
    for (uint64_t i = 0; i < BLOCKS; i++)
        b->now.blocks[i].depth = (b->now.blocks[i].depth + 1) & 63;
    catalog_op_free(&made.catalog);
    for (unsigned i = 0; i < b->n_snapshots; i++)
        if (i != no)
            free(b->snapshots[i].blocks);
    b->n_snapshots = 0;
    b->vol = open_image(b, &b->now);
}

static void begin(struct bench *b, uint64_t seed)
{
    struct drv_config config = {.seed = seed,
                                .size = SIZE,
                                .block_size = BS,
                                .n_regions = 2,
                                .region_bytes = BS,
                                .cache_bytes = VOLUME_CACHE_BYTES_MIN,
                                .damaged = true, /* its check of the store knows no clones */
                                .no_log = seed % 3 == 0,
                                .store = {.has_log = seed % 2, .clears_ranges = seed % 4 == 0}};
    *b = (struct bench){.d = drv_new(&config)};
    b->d->p = process_start(b->d);
    b->now.branch = drv_make_volume(b->d, "v0");
    b->now.blocks = mem_zalloc(BLOCKS * sizeof *b->now.blocks);
    b->vol = open_image(b, &b->now);
}

static void end(struct bench *b)
{
    close_image(b, b->vol);
    process_stop(b->d, b->d->p);
    b->d->p = NULL;
    for (unsigned i = 0; i < b->n_snapshots; i++)
        free(b->snapshots[i].blocks);
    free(b->parent.blocks);
    free(b->now.blocks);
    assert_true(drv_free(b->d));
}

static void histories_and_clones(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("histories and clones", 20, 60);
    for (uint64_t i = 0; i < s.count; i++) {
        struct bench b;
        begin(&b, s.first + i);
        while (b.level < CHAIN) {
            for (unsigned k = 0; k < IMAGES; k++) {
                for (uint64_t step = drv_below(b.d, s.steps); step > 0; step--)
                    change(&b);
                take_snapshot(&b);
            }
            for (uint64_t step = drv_below(b.d, 5); step > 0; step--)
                change(&b);
            check_all(&b);
            go_to_clone(&b, (unsigned)drv_below(b.d, IMAGES));
            check(&b, VOL_STATUS_CHANGED, &b.now, &b.parent);
        }
        end(&b);
    }
}

/* The whole status, which has to be `n` extents. */
static void expect(struct bench *b, const struct image *since, unsigned n,
                   const struct vol_extent *wanted)
{
    static struct vol_extent extents[EXTENTS];
    struct volume *before = open_image(b, since);
    struct waiting w = {.io = {.done = io_done,
                               .length = volume_size(b->vol),
                               .extents = extents,
                               .extents_cap = EXTENTS,
                               .status_of = VOL_STATUS_CHANGED,
                               .since = before}};
    volume_status(b->vol, &w.io);
    wait_for(b, &w);
    close_image(b, before);
    assert_int_equal(w.io.st, ST_OK);
    assert_int_equal(w.io.n_extents, n);
    for (unsigned i = 0; i < n; i++) {
        assert_int_equal(extents[i].length, wanted[i].length);
        assert_int_equal(extents[i].flags, wanted[i].flags);
    }
}

static void resize(struct bench *b, uint64_t size)
{
    struct waiting w = {.io = {.done = io_done}};
    volume_resize(b->vol, &w.io, size, true);
    wait_for(b, &w);
    assert_int_equal(w.io.st, ST_OK);
}

/* What lies behind the end of the snapshot was zeros then. */
static void other_sizes(void **state)
{
    (void)state;
    struct bench b;
    const uint64_t half = BLOCKS / 2, mib = 1u << 20;
    begin(&b, 1);
    write_blocks(&b, half - 2, 10);
    take_snapshot(&b);
    resize(&b, half * BS);
    take_snapshot(&b);
    resize(&b, SIZE);
    expect(&b, &b.snapshots[0], 3,
           (const struct vol_extent[]){{half * BS, 0},
                                       {8 * BS, VOL_EXTENT_CHANGED | VOL_EXTENT_ZERO |
                                                    VOL_EXTENT_HOLE},
                                       {SIZE - (half + 8) * BS, 0}});
    expect(&b, &b.snapshots[1], 1, (const struct vol_extent[]){{SIZE, 0}});
    write_blocks(&b, half + mib / BS, 1);
    zero_blocks(&b, half + 2 * mib / BS, 1, true);
    expect(&b, &b.snapshots[1], 3,
           (const struct vol_extent[]){{half * BS + mib, 0},
                                       {BS, VOL_EXTENT_CHANGED},
                                       {SIZE - half * BS - mib - BS, 0}});
    end(&b);
}

/* Rows that can't be read name nothing, so they are never the same as anything (G5). */
static void damaged_rows(void **state)
{
    (void)state;
    struct bench b;
    struct key key;
    begin(&b, 1);
    write_blocks(&b, 0, 4);
    write_blocks(&b, 1u << (2 * INDEX_SHIFT), 4);
    take_snapshot(&b);
    expect(&b, &b.snapshots[0], 1, (const struct vol_extent[]){{SIZE, 0}});
    close_image(&b, b.vol);
    key_row(&key, b.now.branch, 2, 1, b.snapshots[0].epoch);
    assert_true(mem_store_damage(b.d->db, key_slice(&key), MEM_FLIP_HEAD));
    b.vol = open_image(&b, &b.now);
    const uint64_t row2 = (uint64_t)BS << (2 * INDEX_SHIFT);
    expect(&b, &b.snapshots[0], 2,
           (const struct vol_extent[]){{row2, 0}, {SIZE - row2, VOL_EXTENT_CHANGED}});
    end(&b);
}

static void expect_all(struct drv *d, uint64_t off, uint64_t len, uint32_t flags)
{
    struct vol_extent x;
    struct asked a = drv_asked("");
    a.op.io.offset = off;
    a.op.io.length = len;
    a.op.io.extents = &x;
    a.op.io.extents_cap = 1;
    volume_status(d->p->vol, &a.op.io);
    assert_int_equal(drv_answer(d, &a), ST_OK);
    assert_int_equal(a.op.io.n_extents, 1);
    assert_int_equal(x.length, len);
    assert_int_equal(x.flags, flags);
}

/* Of zeroes and trims that reach the store together the last one counts, also in level-2 rows that
 * are neither stored nor in memory: a trim takes back the zeros before it, and zeros a trim. */
static void zeros_and_trims_together(void **state)
{
    (void)state;
    const uint64_t row2 = (uint64_t)BS << (2 * INDEX_SHIFT);
    const uint32_t zero = VOL_EXTENT_ZERO, hole = VOL_EXTENT_ZERO | VOL_EXTENT_HOLE;
    struct drv_config config = {
        .seed = 1,
        .size = 10 * row2,
        .block_size = BS,
        .n_regions = 2,
        .region_bytes = BS,
        .store = {.has_log = true},
    };
    struct drv *d = drv_new(&config);
    drv_open(d);
    drv_request_ownership(d);
    drv_drain(d);
    /* The rows at the borders are loaded, those between are not: zeros in 1 to 7, holes in 2 to 6, zeros
     * in 3. */
    assert_int_equal(drv_zero(d, row2 / 2, 8 * row2, false, VOL_NO_HOLE), ST_OK);
    assert_int_equal(drv_zero(d, row2 + row2 / 2, 6 * row2, true, 0), ST_OK);
    assert_int_equal(drv_zero(d, 2 * row2 + row2 / 2, 2 * row2, false, VOL_NO_HOLE), ST_OK);
    assert_int_equal(d->p->vol->open->n_ranges, 3);
    assert_int_equal(drv_sync(d), ST_OK);
    for (unsigned again = 0; again < 2; again++) {
        expect_all(d, row2, row2 / 2, zero);
        expect_all(d, 3 * row2, row2, zero);
        expect_all(d, 5 * row2, 2 * row2, hole);
        drv_reopen(d, true);
    }
    drv_close(d);
    assert_true(drv_free(d));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(histories_and_clones),
        cmocka_unit_test(other_sizes),
        cmocka_unit_test(damaged_rows),
        cmocka_unit_test(zeros_and_trims_together),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
