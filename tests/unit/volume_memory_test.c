/*
 * The bounds of the volume layer: memory under writers that never rest (G6), a store that is
 * full (G6), a store that is damaged (G5), and a trim of everything (G7), under simulation.
 */
#include "test.h"

#include <time.h>

#include "../sim/driver.h"
#include "../sim/seeds.h"
#include "base/mem.h"
#include "volume/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#define SLOWER 12.0 /* under sanitizers */
#else
#define SLOWER 1.0
#endif

static double cpu_s(void)
{
    return (double)clock() / CLOCKS_PER_SEC;
}

static void end(struct drv *d)
{
    uint64_t seed = d->c.seed;
    if (!d->violated)
        drv_close(d);
    if (!drv_free(d))
        fail_msg("to replay: SEED=%llu\n", (unsigned long long)seed);
}

/* --- memory ------------------------------------------------------------------------------ */

#define WRITERS 64u
#define READERS 8u
#define SLACK_BYTES (2u << 20)

struct client {
    struct vol_io io;
    struct crowd *crowd;
    struct vol_seg segs[VOL_SEGS(VOLUME_PIECE_BYTES, 4096)];
    unsigned left;
    bool reads, ready;
};

struct crowd {
    struct drv *d;
    struct client *clients;
    unsigned busy;
    uint64_t most;
};

static void client_next(struct client *c);

static void client_done(struct vol_io *io)
{
    struct client *c = container_of(io, struct client, io);
    if (io->st != ST_OK)
        drv_violation(c->crowd->d, "a client was answered %s", status_text(io->st));
    if (c->reads)
        volume_release_segs(io);
    c->crowd->busy--;
    client_next(c);
}

static void client_granted(struct vol_io *io)
{
    container_of(io, struct client, io)->ready = true;
}

static void client_next(struct client *c)
{
    struct drv *d = c->crowd->d;
    if (!c->left)
        return;
    c->left--;
    c->crowd->busy++;
    uint64_t length = c->reads ? VOLUME_READ_BYTES_MAX : VOLUME_PIECE_BYTES;
    uint64_t unit = drv_one_in(d, 2) ? d->c.block_size : 512;
    c->io = (struct vol_io){.done = client_done,
                            .granted = client_granted,
                            .length = length,
                            .offset = drv_below(d, (d->size - length) / unit) * unit,
                            .segs = c->segs,
                            .segs_cap = sizeof c->segs / sizeof c->segs[0]};
    if (c->reads) {
        if (volume_read(d->p->vol, &c->io))
            client_done(&c->io);
    } else if (volume_write_begin(d->p->vol, &c->io)) {
        client_granted(&c->io);
    }
}

/* The payload has arrived. */
static void client_write(struct client *c)
{
    struct drv *d = c->crowd->d;
    c->ready = false;
    if (c->io.st != ST_OK) {
        drv_violation(d, "a writer was refused: %s", status_text(c->io.st));
        return;
    }
    volume_write_buffers(d->p->vol, &c->io);
    for (uint32_t i = 0; i < c->io.n_segs; i++)
        memset(c->segs[i].buf->data + c->segs[i].offset, (int)drv_below(d, 255) + 1,
               c->segs[i].len);
    volume_write_commit(d->p->vol, &c->io, NULL);
}

static void look_at_memory(struct crowd *crowd)
{
    struct drv *d = crowd->d;
    uint64_t used = buf_pool_used(d->p->shard->pool);
    if (used > crowd->most)
        crowd->most = used;
    if (used > d->c.cache_bytes + SLACK_BYTES)
        drv_violation(d, "%llu bytes in buffers, with a budget of %llu", (unsigned long long)used,
                      (unsigned long long)d->c.cache_bytes);
}

static void crowd_run(bool has_log, uint32_t block_size, uint64_t seed)
{
    struct drv_config config = {
        .seed = seed,
        .size = 512u << 20,
        .block_size = block_size,
        .codec = CODEC_LZ4,
        .n_regions = 2,
        .region_bytes = 1u << 20,
        .store = {.has_log = has_log, .commit_bytes_per_ms = 50, .read_ns_max = 2000000},
    };
    struct drv *d = drv_new(&config);
    struct crowd crowd = {.d = d};
    crowd.clients = mem_zalloc((WRITERS + READERS) * sizeof *crowd.clients);
    drv_open(d);
    for (unsigned i = 0; i < WRITERS + READERS; i++) {
        struct client *c = &crowd.clients[i];
        c->crowd = &crowd;
        c->reads = i >= WRITERS;
        c->left = c->reads ? 40 : 2;
        client_next(c);
    }
    uint64_t steps = 0;
    while (crowd.busy && !d->violated && ++steps < 5000000) {
        for (unsigned i = 0; i < WRITERS; i++)
            if (crowd.clients[i].ready && drv_one_in(d, 3)) {
                client_write(&crowd.clients[i]);
                look_at_memory(&crowd);
            }
        shard_submit(d->p->shard);
        bool ready = false;
        for (unsigned i = 0; i < WRITERS; i++)
            ready |= crowd.clients[i].ready;
        if (!sim_step_by(d->sim, ready ? sim_now_ns(d->sim) + 1000000 : UINT64_MAX) && !ready)
            break;
        look_at_memory(&crowd);
    }
    if (crowd.busy && !d->violated)
        drv_violation(d, "%u clients are never answered", crowd.busy);
    if (!d->violated)
        print_message("# most in buffers: %llu KiB of %llu\n", (unsigned long long)crowd.most >> 10,
                      (unsigned long long)d->c.cache_bytes >> 10);
    if (!d->violated && drv_flush(d) != ST_OK)
        drv_violation(d, "the flush at the end failed");
    bool ok = !d->violated;
    end(d);
    if (ok)
        free(crowd.clients);
}

static void writers_stay_within_the_budget(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("writers", 1, 0);
    for (uint64_t i = 0; i < s.count; i++) {
        crowd_run(true, 4096, s.first + i);
        crowd_run(true, 65536, s.first + i);
        crowd_run(false, 16384, s.first + i);
    }
}

/* --- a full store ------------------------------------------------------------------------ */

static void a_full_store_refuses_writes_only(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("full store", 12, 500);
    uint64_t refused = 0;
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t seed = s.first + i;
        struct drv_config config = {
            .seed = seed,
            .size = 8u << 20,
            .block_size = 4096u << seed % 5,
            .codec = CODEC_NONE,
            .expect_nospc = true,
            .write_bytes_max = seed % 3 ? 200000 : 0,
            .store = {.has_log = seed % 2, .capacity_bytes = (2u << 20) + seed % 3 * 900000},
        };
        struct drv *d = drv_new(&config);
        drv_open(d);
        for (unsigned round = 0; round < 4 && !d->violated; round++) {
            drv_steps(d, s.steps / 4);
            if (!d->violated && drv_drain(d) && drv_flush(d) != ST_OK)
                drv_violation(d, "a flush failed because the store is full");
            drv_verify_all(d);
        }
        /* Full to the brim, as far as whole blocks go. */
        uint64_t bs = config.block_size;
        bool full = false;
        if (!d->violated && drv_zero(d, config.size / 2, config.size / 2, true, 0) != ST_OK)
            drv_violation(d, "a trim failed because the store is full");
        for (uint64_t at = 0; at < config.size && !d->violated; at += bs) {
            enum status st = drv_write(d, at, bs, 0);
            full |= st == ST_NOSPC;
            if (st != ST_OK && st != ST_NOSPC)
                drv_violation(d, "a write to a full store gave %s", status_text(st));
        }
        if (!d->violated && !full)
            drv_violation(d, "the store never got full");
        if (!d->violated && drv_flush(d) != ST_OK)
            drv_violation(d, "a flush failed because the store is full");
        drv_verify_all(d);
        /* Also one that would need space for its edges, which may stay then. */
        if (!d->violated && drv_zero(d, 100, 3 * bs, true, 0) != ST_OK)
            drv_violation(d, "an unaligned trim failed because the store is full");
        if (!d->violated && drv_zero(d, 0, config.size / 2, true, 0) != ST_OK)
            drv_violation(d, "a trim failed because the store is full");
        for (uint64_t at = 0; at < config.size / 4 && !d->violated; at += bs)
            if (drv_write(d, at, bs, 0) != ST_OK && at < 512u << 10)
                drv_violation(d, "no space at %llu after half of the volume was trimmed",
                              (unsigned long long)at);
        drv_verify_all(d);
        refused += d->seen_nospc;
        if (!d->violated)
            drv_reopen(d, true);
        drv_verify_all(d);
        end(d);
    }
    print_message("# %llu requests refused on the way\n", (unsigned long long)refused);
}

/* Trims of less than a block, one behind the other, where there is no space for what they would
 * leave: all who wait for space wait for a commit that may give some, so these must make none. */
static void trims_that_change_nothing_are_no_commits(void **state)
{
    (void)state;
    for (unsigned has_log = 0; has_log < 2; has_log++) {
        struct drv_config config = {
            .seed = 1,
            .size = 8u << 20,
            .block_size = 4096,
            .codec = CODEC_NONE,
            .expect_nospc = true,
            .store = {.has_log = has_log, .capacity_bytes = 1u << 20},
        };
        struct drv *d = drv_new(&config);
        drv_open(d);
        uint64_t at = 0;
        while (at < config.size && !d->violated && drv_write(d, at, 4096, 0) == ST_OK)
            at += 4096;
        if (!d->violated && drv_sync(d) != ST_OK)
            drv_violation(d, "a full store commits no more");
        struct volume_stats before, after;
        volume_get_stats(d->p->vol, &before);
        for (unsigned i = 0; i < 10 && !d->violated; i++)
            if (drv_zero(d, i * 4096 + 100, 6, true, 0) != ST_OK)
                drv_violation(d, "an unaligned trim failed because the store is full");
        if (!d->violated && drv_sync(d) != ST_OK)
            drv_violation(d, "a full store commits no more");
        volume_get_stats(d->p->vol, &after);
        if (!d->violated && (at == config.size || after.commits != before.commits))
            drv_violation(d, "%llu commits after %llu bytes were written, and nothing changed",
                          (unsigned long long)(after.commits - before.commits),
                          (unsigned long long)at);
        end(d);
    }
}

/* --- damage ------------------------------------------------------------------------------ */

static struct slice key_of(struct key *k)
{
    return key_slice(k);
}

/* What a block reads as: everything must be right or an error, and `bad` says which. */
static void expect_block(struct drv *d, uint64_t no, uint32_t lo, uint32_t hi, bool bad)
{
    uint8_t got[BLOCK_SIZE_MAX];
    uint64_t at = no * d->c.block_size + lo;
    if (d->violated)
        return;
    enum status st = drv_read(d, at, hi - lo, got);
    if (bad ? st != ST_IO : st != ST_OK)
        drv_violation(d, "bytes %u to %u of block %llu: %s", lo, hi, (unsigned long long)no,
                      status_text(st));
    if (st == ST_OK && memcmp(got, d->regions[0].now + at, hi - lo) != 0)
        drv_violation(d, "bytes %u to %u of block %llu are wrong", lo, hi, (unsigned long long)no);
}

static void damaged_blocks_are_errors(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("damaged blocks", 15, 0);
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t seed = s.first + i;
        struct drv_config config = {
            .seed = seed,
            .size = 4u << 20,
            .block_size = 4096u << seed % 5,
            .codec = (int)(seed / 5 % 3),
            .damaged = true,
            .store = {.has_log = seed % 2},
        };
        uint32_t bs = config.block_size;
        struct drv *d = drv_new(&config);
        drv_open(d);
        for (uint64_t no = 0; no < 20; no++)
            drv_write(d, no * bs, bs, 0);
        drv_reopen(d, true);
        bool bad[20] = {false};
        static const enum mem_damage kinds[] = {MEM_FLIP_BODY, MEM_FLIP_HEAD, MEM_REMOVE};
        for (uint64_t no = 4; no < 7; no++) {
            struct key key;
            key_block(&key, d->branch, 1, no);
            /* A block of zeros has no key that could be damaged. */
            bad[no] = mem_store_damage(d->db, key_of(&key), kinds[no - 4]);
        }
        for (uint64_t no = 0; no < 20; no++)
            expect_block(d, no, 0, bs, bad[no]);
        /* Written in part: the written bytes count, the rest stays lost. */
        uint32_t lo = 100 + (uint32_t)drv_below(d, 900), len = 1 + (uint32_t)drv_below(d, 1500);
        for (uint64_t no = 4; no < 7; no++)
            if (drv_write(d, no * bs + lo, len, 0) != ST_OK)
                drv_violation(d, "a damaged block can't be written");
        for (unsigned round = 0; round < 3 && !d->violated; round++) {
            for (uint64_t no = 0; no < 20; no++) {
                expect_block(d, no, lo, lo + len, false);
                expect_block(d, no, 0, lo, bad[no]);
                expect_block(d, no, lo + len, bs, bad[no]);
                expect_block(d, no, lo + len - 1, lo + len + 1, bad[no]);
            }
            if (round == 0 && drv_flush(d) != ST_OK)
                drv_violation(d, "a flush fails because a block is damaged");
            if (round == 1)
                drv_reopen(d, true);
        }
        /* A second part, then all of it: nothing of the damage is left. */
        for (uint64_t no = 4; no < 7; no++)
            drv_write(d, no * bs + lo + len, 512, 0);
        drv_reopen(d, drv_one_in(d, 2));
        for (uint64_t no = 4; no < 7; no++) {
            expect_block(d, no, lo, lo + len + 512, false);
            expect_block(d, no, 0, lo, bad[no]);
            drv_write(d, no * bs, lo, 0);
            drv_write(d, no * bs + lo + len + 512, bs - lo - len - 512, 0);
            expect_block(d, no, 0, bs, false);
        }
        drv_reopen(d, true);
        drv_verify_all(d);
        end(d);
    }
}

static void damaged_rows_are_errors(void **state)
{
    (void)state;
    for (unsigned level = 1; level <= 2; level++) {
        for (unsigned kind = 0; kind < 2; kind++) {
            struct drv_config config = {
                .seed = level * 10 + kind,
                .size = 12u << 20,
                .block_size = 4096,
                .codec = CODEC_NONE,
                .damaged = true,
                .store = {.has_log = true},
            };
            struct drv *d = drv_new(&config);
            drv_open(d);
            /* Rows 0, 1 and 2 of level 1. */
            for (uint64_t no = 0; no < 3000; no += 100)
                drv_write(d, no * 4096, 4096, 0);
            drv_reopen(d, true);
            struct key key;
            key_row(&key, d->branch, level, level == 1 ? 1 : 0, 1);
            /* A row that is gone is no row of level 2 at all; nothing can tell. */
            if (!mem_store_damage(d->db, key_of(&key),
                                  kind && level == 1 ? MEM_REMOVE : MEM_FLIP_HEAD))
                drv_violation(d, "there is no row of level %u", level);
            for (uint64_t no = 0; no < 3000; no += 50) {
                bool below = level == 2 || (no >= 1024 && no < 2048);
                expect_block(d, no, 0, 4096, below);
            }
            /* One block written: it is back, the others are not, also not as zeros. */
            drv_write(d, 1500 * 4096, 4096, 0);
            drv_write(d, 1600 * 4096 + 512, 1024, 0);
            drv_sync(d);
            for (unsigned round = 0; round < 2; round++) {
                expect_block(d, 1500, 0, 4096, false);
                expect_block(d, 1600, 512, 1536, false);
                expect_block(d, 1600, 0, 512, true);
                expect_block(d, 1501, 0, 4096, true);
                expect_block(d, 1400, 0, 4096, true);
                expect_block(d, 200, 0, 4096, level == 2);
                drv_reopen(d, true);
            }
            /* A trim brings all of it back, as zeros. */
            drv_zero(d, 0, config.size, true, 0);
            drv_verify_all(d);
            drv_reopen(d, true);
            drv_verify_all(d);
            end(d);
        }
    }
}

/* Damage anywhere: right bytes or an error, never others. */
static void any_damage_is_noticed(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("any damage", 60, 0);
    uint64_t errors = 0;
    for (uint64_t i = 0; i < s.count; i++) {
        uint64_t seed = s.first + i;
        struct drv_config config = {
            .seed = seed,
            .size = (1u << 20) + 512 * (seed % 77),
            .block_size = 4096u << seed % 3,
            .codec = (int)(seed / 3 % 3),
            .damaged = true,
            .store = {.has_log = seed % 2},
        };
        uint32_t bs = config.block_size;
        struct drv *d = drv_new(&config);
        drv_open(d);
        drv_steps(d, 60);
        if (d->violated || !drv_drain(d)) {
            end(d);
            continue;
        }
        process_stop(d, d->p);
        struct key begin, stop;
        key_prefix_branch(&begin, drv_one_in(d, 2) ? 'b' : 'i', d->branch);
        stop = begin;
        key_prefix_end(&stop);
        uint64_t n = mem_store_keys_in(d->db, key_of(&begin), key_of(&stop));
        struct slice key;
        bool damaged =
            n && mem_store_nth_key(d->db, key_of(&begin), key_of(&stop), drv_below(d, n), &key);
        if (damaged) {
            uint8_t copy[KEY_BYTES_MAX];
            memcpy(copy, key.data, key.len);
            damaged = mem_store_damage(d->db, (struct slice){copy, key.len},
                                       drv_one_in(d, 2) ? MEM_FLIP_HEAD : MEM_FLIP_BODY);
        }
        drv_open(d);
        uint64_t bad = 0;
        for (uint64_t at = 0; at < config.size && !d->violated; at += bs) {
            uint8_t got[BLOCK_SIZE_MAX];
            uint64_t len = min_u64(bs, config.size - at);
            enum status st = drv_read(d, at, len, got);
            if (st == ST_IO)
                bad++;
            else if (st != ST_OK || memcmp(got, d->regions[0].now + at, len) != 0)
                drv_violation(d, "block %llu is wrong after damage (%s)",
                              (unsigned long long)(at / bs), status_text(st));
        }
        if (!damaged && bad)
            drv_violation(d, "errors without damage");
        errors += bad;
        end(d);
    }
    assert_true(errors > 0 || s.count < 20);
}

/* A header, owner or state record that is damaged: the volume is refused. */
static void damaged_records_are_refused(void **state)
{
    (void)state;
    for (unsigned which = 0; which < 3; which++) {
        struct drv_config config = {.seed = which,
                                    .size = 1u << 20,
                                    .block_size = 4096,
                                    .damaged = true,
                                    .store = {.has_log = true}};
        struct drv *d = drv_new(&config);
        drv_open(d);
        drv_write(d, 0, 4096, 0);
        drv_drain(d);
        process_stop(d, d->p);
        struct key key;
        if (which == 0)
            key_header(&key, d->branch);
        else if (which == 1)
            key_owner(&key, d->branch);
        else
            key_state(&key, d->branch);
        assert_true(mem_store_damage(d->db, key_of(&key), MEM_FLIP_HEAD));
        d->quiet = true;
        d->p = process_start(d);
        uint8_t got[512];
        bool opened = process_open(d, d->p);
        assert_true(opened == (which != 0));
        if (opened) {
            assert_int_equal(drv_read(d, 0, 512, got), ST_IO);
            assert_false(d->violated);
        }
        d->violated = false;
        process_stop(d, d->p);
        assert_true(drv_free(d));
    }
}

/* --- a trim of everything ---------------------------------------------------------------- */

static uint64_t keys_with(struct drv *d, char tag)
{
    struct key begin, stop;
    key_prefix_branch(&begin, tag, d->branch);
    stop = begin;
    key_prefix_end(&stop);
    return mem_store_keys_in(d->db, key_of(&begin), key_of(&stop));
}

static void trim_of_64_tib(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("64 TiB", 1, 100000);
    struct drv_config config = {
        .seed = s.first,
        .size = 64ull << 40,
        .block_size = 16384,
        .codec = CODEC_LZ4,
        .n_regions = 2,
        .region_bytes = 1u << 20,
        .cache_bytes = 64ull << 20,
        .store = {.has_log = true, .batch_bytes_max = 64u << 20},
    };
    struct drv *d = drv_new(&config);
    drv_open(d);
    double t = cpu_s();
    for (uint64_t i = 0; i < s.steps && !d->violated; i++)
        drv_write(d, drv_below(d, config.size / 4096) * 4096, 4096, 0);
    drv_sync(d);
    print_message("# %llu scattered writes: %.2f s of CPU\n", (unsigned long long)s.steps,
                  cpu_s() - t);
    struct volume_stats stats;
    volume_get_stats(d->p->vol, &stats);
    assert_true(stats.data_blocks > s.steps * 3 / 4 && stats.data_blocks <= s.steps);
    assert_true(keys_with(d, 'b') == stats.data_blocks);

    /* Opened by another process, up to the first byte read. */
    drv_drain(d);
    process_stop(d, d->p);
    d->p = process_start(d);
    t = cpu_s();
    process_open(d, d->p);
    uint8_t byte;
    drv_read(d, config.size / 2, 1, &byte);
    double opening = cpu_s() - t;
    print_message("# opening: %.4f s of CPU\n", opening);

    t = cpu_s();
    for (uint64_t at = 0; at < config.size && !d->violated; at += 2ull << 30)
        if (drv_zero(d, at, 2ull << 30, true, 0) != ST_OK)
            drv_violation(d, "a trim failed");
    drv_flush(d);
    double trimming = cpu_s() - t;
    print_message("# trim in requests of 2 GiB: %.3f s of CPU\n", trimming);
    t = cpu_s();
    if (!d->violated)
        drv_sync(d);
    for (unsigned i = 0; i < 100 && !d->violated; i++) {
        uint8_t got[4096];
        uint64_t at = drv_below(d, config.size / 4096) * 4096;
        if (drv_read(d, at, sizeof got, got) != ST_OK || !block_is_zero(got, sizeof got))
            drv_violation(d, "what was trimmed is not zeros at %llu", (unsigned long long)at);
    }
    if (!d->violated && !sim_run_idle(d->sim, 10000000))
        drv_violation(d, "the cleaner does not come to an end");
    print_message("# cleaning: %.2f s of CPU\n", cpu_s() - t);
    if (!d->violated) {
        volume_get_stats(d->p->vol, &stats);
        if (stats.data_blocks || keys_with(d, 'b') || keys_with(d, 'i') || keys_with(d, 't'))
            drv_violation(
                d,
                "left behind a trim of everything: %llu data blocks by count, "
                "%llu blocks, %llu rows, %llu trash records",
                (unsigned long long)stats.data_blocks, (unsigned long long)keys_with(d, 'b'),
                (unsigned long long)keys_with(d, 'i'), (unsigned long long)keys_with(d, 't'));
    }
    end(d);
    assert_true(opening < 0.05 * SLOWER);
    assert_true(trimming < 1.0 * SLOWER);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(writers_stay_within_the_budget),
        cmocka_unit_test(a_full_store_refuses_writes_only),
        cmocka_unit_test(trims_that_change_nothing_are_no_commits),
        cmocka_unit_test(damaged_blocks_are_errors),
        cmocka_unit_test(damaged_rows_are_errors),
        cmocka_unit_test(any_damage_is_noticed),
        cmocka_unit_test(damaged_records_are_refused),
        cmocka_unit_test(trim_of_64_tib),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
