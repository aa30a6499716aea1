/*
 * Commits: how large those of stores without a log may become, what goes into which, who waits
 * for them, and when those of stores with a log come.
 *
 * Index rows of the worst form are put into the simulated store directly, because writing
 * them there would take millions of requests.
 */
#include "test.h"

#include "../sim/driver.h"
#include "base/hash.h"
#include "base/mem.h"
#include "volume/internal.h"

#define COMMIT_BYTES_MAX 9500000u /* FoundationDB's limit, less some room */
#define BATCH_BYTES_MAX (4u << 20)

static struct drv *start(uint64_t seed, uint64_t size, uint32_t block_size)
{
    struct drv_config config = {
        .seed = seed,
        .size = size,
        .block_size = block_size,
        .codec = CODEC_NONE,
        .n_regions = size > 1ull << 30 ? 2 : 1,
        .region_bytes = 1u << 20,
        .cache_bytes = 128u << 20,
        .damaged = true, /* rows name blocks that are not there */
        .store = {.batch_bytes_max = BATCH_BYTES_MAX, .commit_bytes_max = COMMIT_BYTES_MAX},
    };
    return drv_new(&config);
}

static void end(struct drv *d)
{
    struct mem_counts counts;
    unsigned long long seed = d->c.seed;
    mem_store_counts(d->db, &counts);
    if (!d->violated)
        print_message("# largest commit: %llu bytes in %llu\n",
                      (unsigned long long)counts.commit_bytes_most,
                      (unsigned long long)counts.commits);
    if (!d->violated)
        drv_close(d);
    if (!drv_free(d))
        fail_msg("to replay: SEED=%llu\n", seed);
}

/* The volume becomes a clone, so that its rows may name many sources. */
static void make_clone(struct drv *d)
{
    struct key key;
    struct slice head, body;
    struct header_record header;
    uint8_t bytes[RECORD_BYTES_MAX];
    key_header(&key, d->branch);
    assert_true(mem_store_peek(d->db, key_slice(&key), &head, &body));
    assert_true(header_decode(key_slice(&key), head, &header));
    header.parent_branch = 77;
    header.parent_epoch = 1;
    size_t len = header_encode(&header, key_slice(&key), bytes);
    mem_store_put(d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){0});
}

enum row_form { ROW_OF_SOURCES, ROW_OF_DATA, ROW_OF_HOLES };

static void put_row1(struct drv *d, uint64_t no, enum row_form form)
{
    struct row1 row;
    struct key key;
    static uint8_t bytes[ROW_BYTES_MAX];
    row1_init(&row);
    for (unsigned i = 0; i < INDEX_FANOUT; i++)
        if (form == ROW_OF_SOURCES)
            row1_set_data(&row, i, UINT64_MAX - i, UINT64_MAX - no);
        else if (form == ROW_OF_DATA || i % 2)
            row1_set_data(&row, i, d->branch, 1);
    key_row(&key, d->branch, 1, no, 1);
    size_t len = row1_encode(&row, key_slice(&key), bytes);
    mem_store_put(d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){0});
    row1_free(&row);
}

/* A level-2 row that names level-1 rows of different counts, from `first` on. */
static void put_row2(struct drv *d, uint64_t no, unsigned n_rows)
{
    struct row2 row;
    struct key key;
    static uint8_t bytes[ROW_BYTES_MAX];
    row2_init(&row);
    for (unsigned i = 0; i < n_rows; i++)
        row.entry[i] =
            (struct row2_entry){.kind = ROW2_ROW, .epoch = 1, .n_data = (uint16_t)(1024 - i % 2)};
    key_row(&key, d->branch, 2, no, 1);
    size_t len = row2_encode(&row, key_slice(&key), bytes);
    mem_store_put(d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){0});
}

/* Requests that are all there at once, as from one batch. */
struct batch {
    struct drv *d;
    struct op {
        struct vol_io io;
        struct batch *batch;
        bool ready, over;
        enum status st;
    } *ops;
    size_t n, open;
};

static void op_done(struct vol_io *io)
{
    struct op *op = container_of(io, struct op, io);
    op->over = true;
    op->st = io->st;
    op->batch->open--;
}

static void op_granted(struct vol_io *io)
{
    struct op *op = container_of(io, struct op, io);
    if (io->st != ST_OK)
        op_done(io);
    else
        op->ready = true;
}

static struct batch *batch_new(struct drv *d, size_t n)
{
    struct batch *b = mem_zalloc(sizeof *b);
    b->d = d;
    b->n = n;
    b->ops = mem_zalloc(n * sizeof *b->ops);
    for (size_t i = 0; i < n; i++)
        b->ops[i] = (struct op){.batch = b, .io = {.done = op_done, .granted = op_granted}};
    return b;
}

static uint8_t payload[VOLUME_PIECE_BYTES];

static void batch_writes(struct batch *b)
{
    for (size_t i = 0; i < b->n; i++)
        if (b->ops[i].ready) {
            b->ops[i].ready = false;
            volume_write_commit(b->d->p->vol, &b->ops[i].io, payload);
        }
}

static void batch_write(struct batch *b, size_t i, uint64_t offset, uint64_t length)
{
    struct op *op = &b->ops[i];
    op->io.offset = offset;
    op->io.length = length;
    b->open++;
    if (volume_write_begin(b->d->p->vol, &op->io))
        op_granted(&op->io);
}

static void batch_trim(struct batch *b, size_t i, uint64_t offset, uint64_t length)
{
    struct op *op = &b->ops[i];
    op->io.offset = offset;
    op->io.length = length;
    b->open++;
    volume_trim(b->d->p->vol, &op->io);
}

/* Until all is answered; all of it well, where `good`. */
static void batch_run(struct batch *b, bool good)
{
    struct drv *d = b->d;
    batch_writes(b);
    shard_submit(d->p->shard);
    for (uint64_t steps = 0; b->open && steps < 3000000; steps++) {
        struct mem_counts counts;
        mem_store_counts(d->db, &counts);
        if (counts.broken_promises || !sim_step(d->sim))
            break;
        batch_writes(b);
        shard_submit(d->p->shard);
    }
    if (b->open)
        drv_violation(d, "%zu requests are never answered", b->open);
    for (size_t i = 0; i < b->n && good; i++)
        if (b->ops[i].over && b->ops[i].st != ST_OK)
            drv_violation(d, "a request failed: %s", status_text(b->ops[i].st));
}

static void batch_free(struct batch *b)
{
    free(b->ops);
    free(b);
}

/* Owned and at rest, so that nothing is in the way of what comes. */
static void open_and_own(struct drv *d)
{
    drv_open(d);
    drv_request_ownership(d);
    drv_drain(d);
}

/* --- sizes ------------------------------------------------------------------------------- */

/* Each write changes another row of 24 KiB: 1024 of them fit one generation by their data. */
static void writes_under_the_longest_rows(void **state)
{
    (void)state;
    for (uint32_t bs = 4096; bs <= 65536; bs *= 4) {
        struct drv *d = start(bs, 16ull << 40, bs);
        enum { N = 600 };
        make_clone(d);
        uint64_t row_bytes = (uint64_t)bs << INDEX_SHIFT;
        for (uint64_t i = 0; i < N; i++)
            put_row1(d, i * 1024 % 5000 * 3, ROW_OF_SOURCES);
        for (uint64_t no = 0; no < 16; no++)
            put_row2(d, no, 1024);
        open_and_own(d);
        struct batch *b = batch_new(d, N);
        for (uint64_t i = 0; i < N; i++)
            batch_write(b, i, (i * 1024 % 5000 * 3) * row_bytes + drv_below(d, 1000) * bs, bs);
        batch_run(b, true);
        batch_free(b);
        end(d);
    }
}

/* Each trim takes two times 1023 blocks out of rows full of data, a key each. */
static void trims_with_long_edges(void **state)
{
    (void)state;
    for (uint32_t bs = 4096; bs <= 65536; bs *= 4) {
        struct drv *d = start(bs, 16ull << 40, bs);
        enum { N = 256 };
        uint64_t row_bytes = (uint64_t)bs << INDEX_SHIFT;
        for (uint64_t no = 0; no < 2; no++)
            put_row2(d, no, 1024);
        for (uint64_t no = 0; no < 2048; no++)
            put_row1(d, no, no % 50 ? ROW_OF_DATA : ROW_OF_HOLES);
        open_and_own(d);
        struct batch *b = batch_new(d, N);
        for (uint64_t i = 0; i < N; i++) {
            uint64_t rows = i == 200 ? 1030 : 3;
            batch_trim(b, i, i * 3 * row_bytes + bs, rows * row_bytes - 2 * bs);
        }
        batch_run(b, true);
        if (!d->violated && !sim_run_idle(d->sim, 10000000))
            drv_violation(d, "the cleaner does not come to an end");
        batch_free(b);
        end(d);
    }
}

/* Single blocks, each the only one of its row, become holes. */
static void trims_of_single_blocks(void **state)
{
    (void)state;
    struct drv *d = start(1, 64ull << 40, 4096);
    enum { N = 4000 };
    uint64_t row_bytes = 4096ull << INDEX_SHIFT;
    make_clone(d);
    for (uint64_t no = 0; no < 4; no++)
        put_row2(d, no, 1024);
    for (uint64_t no = 0; no < N; no++)
        put_row1(d, no, ROW_OF_SOURCES);
    open_and_own(d);
    struct batch *b = batch_new(d, N);
    for (uint64_t i = 0; i < N; i++)
        batch_trim(b, i, i * row_bytes + i % 1024 * 4096, 4096);
    batch_run(b, true);
    batch_free(b);
    end(d);
}

static uint64_t keys_with(struct drv *d, char tag)
{
    struct key begin, stop;
    key_prefix_branch(&begin, tag, d->branch);
    stop = begin;
    key_prefix_end(&stop);
    return mem_store_keys_in(d->db, key_slice(&begin), key_slice(&stop));
}

/* Everything is trimmed at once, in one generation where it fits: 100,000 scattered blocks of
 * `size` bytes, each below rows of its own. */
static void trim_everything(uint64_t size, uint32_t bs, bool in_one)
{
    struct drv *d = start(size >> 40, size, bs);
    uint64_t rows = size / bs >> INDEX_SHIFT;
    struct key key;
    uint8_t head[BLOCK_HEAD_BYTES_MAX] = {0};
    static uint8_t bytes[ROW_BYTES_MAX];
    uint64_t *nos = mem_alloc(100000 * sizeof *nos);
    size_t n = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        uint64_t no = rows / 100000 * i;
        struct row1 row;
        row1_init(&row);
        row1_set_data(&row, 5, d->branch, 1);
        key_row(&key, d->branch, 1, no, 1);
        size_t len = row1_encode(&row, key_slice(&key), bytes);
        mem_store_put(d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){0});
        row1_free(&row);
        key_block(&key, d->branch, 1, (no << INDEX_SHIFT) + 5);
        mem_store_put(d->db, key_slice(&key), (struct slice){head, sizeof head}, (struct slice){0});
        nos[n++] = no;
    }
    for (size_t i = 0; i < n;) {
        struct row2 row;
        uint64_t row2 = nos[i] >> INDEX_SHIFT;
        row2_init(&row);
        for (; i < n && nos[i] >> INDEX_SHIFT == row2; i++)
            row.entry[nos[i] % INDEX_FANOUT] =
                (struct row2_entry){.kind = ROW2_ROW, .epoch = 1, .n_data = 1};
        key_row(&key, d->branch, 2, row2, 1);
        size_t len = row2_encode(&row, key_slice(&key), bytes);
        mem_store_put(d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){0});
    }
    free(nos);
    /* The count of the state record must fit. */
    struct slice value, body;
    struct state_record st;
    key_state(&key, d->branch);
    assert_true(mem_store_peek(d->db, key_slice(&key), &value, &body));
    assert_true(state_decode(key_slice(&key), value, &st));
    st.data_blocks = n;
    size_t len = state_encode(&st, key_slice(&key), bytes);
    mem_store_put(d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){0});

    open_and_own(d);
    struct volume_stats before, after;
    volume_get_stats(d->p->vol, &before);
    if (drv_zero(d, 0, size, true, 0) != ST_OK)
        drv_violation(d, "the trim failed");
    if (!d->violated) {
        volume_get_stats(d->p->vol, &after);
        if (in_one != (after.commits == before.commits + 1))
            drv_violation(d, "%llu commits", (unsigned long long)(after.commits - before.commits));
        if (after.data_blocks)
            drv_violation(d, "%llu blocks are left", (unsigned long long)after.data_blocks);
    }
    if (!d->violated && !sim_run_idle(d->sim, 10000000))
        drv_violation(d, "the cleaner does not come to an end");
    if (!d->violated && (keys_with(d, 'b') || keys_with(d, 'i') || keys_with(d, 't')))
        drv_violation(d, "%llu blocks, %llu rows, %llu trash records are left",
                      (unsigned long long)keys_with(d, 'b'), (unsigned long long)keys_with(d, 'i'),
                      (unsigned long long)keys_with(d, 't'));
    end(d);
}

static void trims_of_everything(void **state)
{
    (void)state;
    trim_everything(64ull << 40, 16384, true);
    trim_everything(64ull << 40, 4096, true);
    trim_everything(1ull << 56, 65536, false);
}

/* A resize cuts off as much. */
static void shrinking_from_petabytes(void **state)
{
    (void)state;
    struct drv *d = start(3, 1ull << 52, 4096);
    open_and_own(d);
    for (unsigned i = 0; i < 50; i++)
        drv_write(d, (1ull << 51) + ((uint64_t)i << 44), 4096, 0);
    assert_int_equal(drv_resize(d, 1u << 20), ST_OK);
    end(d);
}

/* --- what the store is told of requests ---------------------------------------------------- */

static void cleared(struct catalog_op *op)
{
    (void)op;
}

/* Once owned, all that the volume reads is read as its owner; the cleaner's in the background. */
static void reads_say_what_they_are(void **state)
{
    (void)state;
    struct mem_counts before, after;
    struct drv *d = start(5, 1u << 30, 4096);
    d->c.damaged = false;
    open_and_own(d);
    drv_write(d, 0, 4u << 20, 0);
    drv_write(d, 512u << 20, 4096, 0);
    drv_reopen(d, true);
    drv_request_ownership(d);
    drv_drain(d);
    assert_true(sim_run_idle(d->sim, 1000000)); /* the mailbox was looked into */
    mem_store_counts(d->db, &before);
    static uint8_t got[1 << 20];
    drv_read(d, 0, sizeof got, got);
    drv_write(d, (512u << 20) + 5, 100, 0); /* its base is read */
    mem_store_counts(d->db, &after);
    assert_true(after.reads > before.reads);
    assert_int_equal(after.own_reads - before.own_reads, after.reads - before.reads);
    assert_int_equal(after.background_reads, before.background_reads);
    before = after;
    assert_int_equal(drv_zero(d, 0, 1u << 30, true, 0), ST_OK);
    assert_true(sim_run_idle(d->sim, 1000000));
    mem_store_counts(d->db, &after);
    assert_true(after.background_reads > before.background_reads);
    assert_int_equal(after.own_reads - before.own_reads, after.reads - before.reads);
    assert_int_equal(keys_with(d, 'b'), 0);

    /* What is left of removed volumes is nobody's, so not read as an owner. */
    bool more = false;
    struct catalog_op clear = {.done = cleared};
    before = after;
    catalog_clear_removed(&clear, d->p->store, d->p->env, &more);
    assert_true(sim_run_idle(d->sim, 1000000));
    catalog_op_free(&clear);
    mem_store_counts(d->db, &after);
    assert_int_equal(after.reads - before.reads, 1);
    assert_int_equal(after.background_reads - before.background_reads, 1);
    assert_int_equal(after.own_reads, before.own_reads);
    end(d);
}

/* --- what waits for which commit ----------------------------------------------------------- */

/* Two writers who never leave a block alone, and a read of it. */
struct rewriter {
    struct vol_io io;
    struct drv *d;
    uint64_t left;
};

static void rewrite(struct rewriter *w);

static void rewriter_granted(struct vol_io *io)
{
    struct rewriter *w = container_of(io, struct rewriter, io);
    if (io->st == ST_OK)
        volume_write_commit(w->d->p->vol, io, payload);
}

static void rewriter_done(struct vol_io *io)
{
    rewrite(container_of(io, struct rewriter, io));
}

static void rewrite(struct rewriter *w)
{
    if (!w->left)
        return;
    w->left--;
    w->io = (struct vol_io){.done = rewriter_done, .granted = rewriter_granted, .length = 4096};
    if (volume_write_begin(w->d->p->vol, &w->io))
        rewriter_granted(&w->io);
}

struct reader {
    struct vol_io io;
    struct vol_seg segs[300];
    bool answered;
};

static void reader_done(struct vol_io *io)
{
    container_of(io, struct reader, io)->answered = true;
    volume_release_segs(io);
}

static bool reader_start(struct drv *d, struct reader *r, uint64_t offset, uint64_t length)
{
    *r = (struct reader){.io = {.done = reader_done, .offset = offset, .length = length,
                                .segs_cap = 300}};
    r->io.segs = r->segs;
    if (!volume_read(d->p->vol, &r->io))
        return false;
    reader_done(&r->io);
    return true;
}

static void reads_come_to_their_turn(void **state)
{
    (void)state;
    enum { WRITERS = 8, WRITES = 400 };
    struct drv *d = start(6, 1u << 20, 4096);
    static struct rewriter w[WRITERS];
    static struct reader r;
    struct mem_counts before, after;
    open_and_own(d);
    for (unsigned i = 0; i < WRITERS; i++) {
        w[i] = (struct rewriter){.d = d, .left = WRITES};
        rewrite(&w[i]);
        shard_submit(d->p->shard);
        for (unsigned k = 0; k < 3; k++)
            sim_step(d->sim);
    }
    mem_store_counts(d->db, &before);
    assert_false(reader_start(d, &r, 0, 8192));
    while (!r.answered && sim_step(d->sim))
        shard_submit(d->p->shard);
    mem_store_counts(d->db, &after);
    assert_true(r.answered);
    print_message("# read after %llu commits\n",
                  (unsigned long long)(after.commits - before.commits));
    assert_true(after.commits - before.commits <= 6);
    assert_true(w[0].left > WRITES / 2);
    assert_int_equal(d->p->vol->reads_first, 0);
    for (bool busy = true; busy && sim_step(d->sim);) {
        shard_submit(d->p->shard);
        busy = d->p->vol->busy != 0;
    }
    for (unsigned i = 0; i < WRITERS; i++)
        assert_int_equal(w[i].left, 0);
    end(d);
}

/* Clean blocks are read from the cache, whatever else is dirty; changed ones after their commit
 * only, and so are those below a trim. */
static void clean_blocks_need_no_wait(void **state)
{
    (void)state;
    struct drv *d = start(7, 8u << 20, 4096);
    static uint8_t got[1 << 20];
    static struct reader r;
    struct volume_stats stats;
    open_and_own(d);
    drv_write(d, 0, 1u << 20, 0);
    assert_int_equal(drv_read(d, 0, sizeof got, got), ST_OK);
    volume_get_stats(d->p->vol, &stats);
    uint64_t hits = stats.cache_hits;

    struct batch *b = batch_new(d, 3);
    batch_write(b, 0, 4096, 4096);
    batch_writes(b);
    batch_trim(b, 1, 512u << 10, 512u << 10);
    assert_true(reader_start(d, &r, 0, 4096));
    assert_true(reader_start(d, &r, 8192, (512u << 10) - 8192));
    volume_get_stats(d->p->vol, &stats);
    assert_int_equal(stats.cache_hits, hits + 2);
    static struct reader dirty, trimmed;
    /* The trim's zeros are in the cache, but not to be shown. */
    struct op *ahead = &b->ops[2];
    ahead->io.offset = 640u << 10;
    ahead->io.length = 128u << 10;
    b->open++;
    volume_prefetch(d->p->vol, &ahead->io);
    assert_false(reader_start(d, &dirty, 0, 8192));
    assert_false(reader_start(d, &trimmed, 700u << 10, 4096));
    shard_submit(d->p->shard);
    /* The same while it commits. */
    assert_true(reader_start(d, &r, 0, 4096));
    assert_false(dirty.answered || trimmed.answered);
    batch_run(b, true);
    while (!(dirty.answered && trimmed.answered) && sim_step(d->sim)) {
    }
    assert_true(dirty.answered && trimmed.answered);
    assert_true(reader_start(d, &r, 0, 8192));
    volume_get_stats(d->p->vol, &stats);
    assert_int_equal(stats.cache_hits, hits + 4);
    batch_free(b);
    end(d);
}

/* What came together commits together, also with reads, flushes and questions in between. */
static void a_batch_is_one_generation(void **state)
{
    (void)state;
    struct drv *d = start(8, 8u << 20, 4096);
    static struct reader r;
    struct mem_counts before, after;
    open_and_own(d);
    assert_true(sim_run_idle(d->sim, 1000000));
    mem_store_counts(d->db, &before);
    enum { N = 24 };
    struct batch *b = batch_new(d, N);
    struct vol_extent extents[4];
    for (size_t i = 0; i < N; i++) {
        struct op *op = &b->ops[i];
        if (i % 6 == 3) {
            b->open++;
            volume_flush(d->p->vol, &op->io);
        } else if (i % 6 == 5) {
            op->io.length = 65536;
            op->io.extents = extents;
            op->io.extents_cap = 4;
            b->open++;
            volume_status(d->p->vol, &op->io);
        } else {
            batch_write(b, i, i * 4096, 4096);
            batch_writes(b);
        }
        if (i == 2)
            assert_false(reader_start(d, &r, 0, 4096));
    }
    batch_run(b, true);
    assert_true(sim_run_idle(d->sim, 1000000));
    mem_store_counts(d->db, &after);
    assert_true(r.answered);
    assert_int_equal(after.commits - before.commits, 1);
    batch_free(b);
    end(d);
}

/* While one commits, a full one is made ready, also where no request comes behind it. */
static void the_next_one_is_ready(void **state)
{
    (void)state;
    struct drv *d = start(9, 64u << 20, 4096);
    open_and_own(d);
    enum { N = 5 };
    struct batch *b = batch_new(d, N);
    batch_write(b, 0, 0, 4096);
    batch_writes(b);
    shard_submit(d->p->shard);
    for (size_t i = 1; i < N; i++)
        batch_write(b, i, i << 20, 1u << 20);
    batch_writes(b);
    shard_submit(d->p->shard);
    const struct volume *vol = d->p->vol;
    assert_int_equal(vol->gens_queued, 2);
    const struct gen *first = container_of(vol->gens.next, struct gen, link);
    const struct gen *second = container_of(first->link.next, struct gen, link);
    assert_int_equal(second->n_items, 1024);
    /* The first takes its time: the store does not answer. */
    while (first->stage != GEN_COMMITTING && sim_step(d->sim)) {
    }
    mem_store_stop(d->db, true);
    for (unsigned i = 0; i < 3000; i++)
        sim_step(d->sim);
    assert_int_equal(first->stage, GEN_COMMITTING);
    assert_int_equal(second->stage, GEN_BUILT);
    uint64_t one = second->no;
    mem_store_stop(d->db, false);
    while (vol->committed_gen + 1 < one && sim_step(d->sim)) {
    }
    assert_int_equal(second->stage, GEN_COMMITTING);
    batch_run(b, true);
    batch_free(b);
    end(d);
}

/* Milliseconds from a write of `bytes`, answered from the log, to its commit. */
static uint64_t ms_until_committed(struct drv *d, uint64_t bytes)
{
    const struct volume *vol = d->p->vol;
    struct batch *b = batch_new(d, 1);
    batch_write(b, 0, 0, bytes);
    batch_run(b, true);
    assert_int_equal(b->ops[0].st, ST_OK);
    uint64_t no = vol->open->no, began_ns = world_now_ns(d->world);
    while (vol->committed_gen < no && sim_step(d->sim)) {
    }
    batch_free(b);
    return (world_now_ns(d->world) - began_ns) / 1000000;
}

/* Where a log answers, a generation gathers for a second; but what would be waited for is committed
 * as soon as it is worth a commit, or a snapshot would have to write it. */
static void much_is_committed_early(void **state)
{
    (void)state;
    struct drv_config config = {.seed = 10,
                                .size = 8u << 20,
                                .block_size = 4096,
                                .codec = CODEC_NONE,
                                .n_regions = 1,
                                .region_bytes = 1u << 20,
                                .cache_bytes = 128u << 20,
                                .damaged = true,
                                .store = {.has_log = true}};
    struct drv *d = drv_new(&config);
    open_and_own(d);
    assert_true(sim_run_idle(d->sim, 1000000));
    uint64_t little_ms = ms_until_committed(d, 64 << 10);
    uint64_t much_ms = ms_until_committed(d, 1 << 20);
    assert_in_range(little_ms, 990, 1110);
    assert_in_range(much_ms, 90, 120);
    end(d);
}

int main(void)
{
    memset(payload, 0x5a, sizeof payload);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(writes_under_the_longest_rows),
        cmocka_unit_test(trims_with_long_edges),
        cmocka_unit_test(trims_of_single_blocks),
        cmocka_unit_test(trims_of_everything),
        cmocka_unit_test(shrinking_from_petabytes),
        cmocka_unit_test(reads_say_what_they_are),
        cmocka_unit_test(reads_come_to_their_turn),
        cmocka_unit_test(clean_blocks_need_no_wait),
        cmocka_unit_test(a_batch_is_one_generation),
        cmocka_unit_test(the_next_one_is_ready),
        cmocka_unit_test(much_is_committed_early),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
