/*
 * A store that stops answering, with a store timeout: requests fail after it and not before,
 * nothing that was answered is lost, nothing goes out of order, memory stays bounded, and all
 * goes on when the store answers again (G1, G2, G6).
 */
#include "test.h"

#include "../sim/driver.h"
#include "../sim/seeds.h"
#include "base/mem.h"
#include "volume/internal.h"

#define TIMEOUT_MS 800u

static void end(struct drv *d)
{
    unsigned long long seed = d->c.seed;
    if (!d->violated)
        drv_verify_all(d);
    if (!d->violated)
        drv_close(d);
    if (!drv_free(d))
        fail_msg("to replay: SEED=%llu\n", seed);
}

static struct drv_config config_of(uint64_t seed, bool has_log)
{
    return (struct drv_config){
        .seed = seed,
        .size = 8u << 20,
        .block_size = 4096u << seed % 5,
        .codec = (int)(seed % 3),
        .faults = true,
        .store_timeout_ms = TIMEOUT_MS,
        .write_bytes_max = seed % 2 ? 100000 : 0,
        .store = {.has_log = has_log, .timeout_ms = seed % 4 < 2 ? TIMEOUT_MS : 0},
    };
}

/* The store stops and goes on, again and again, and now and then the process dies while it
 * stands; what was answered must be there, and everything a prefix. */
static void stops_under_load(void **state)
{
    (void)state;
    struct seeds s = seeds_begin("stops", 16, 250);
    uint64_t timeouts = 0;
    for (uint64_t i = 0; i < s.count; i++) {
        struct drv_config config = config_of(s.first + i, (s.first + i) % 8 == 7);
        struct drv *d = drv_new(&config);
        drv_open(d);
        for (unsigned round = 0; round < 4 && !d->violated; round++) {
            drv_steps(d, s.steps / 4);
            mem_store_stop(d->db, true);
            for (unsigned k = 0; k < 10 && !d->violated; k++) {
                drv_steps(d, 12);
                drv_wait_ms(d, drv_below(d, 400));
            }
            struct volume_stats stats;
            volume_get_stats(d->p->vol, &stats);
            timeouts += stats.timeouts;
            if (!d->violated && drv_one_in(d, 3)) {
                bool power = drv_one_in(d, 2);
                drv_crash(d, power);
                mem_store_stop(d->db, false);
                drv_recover(d, power);
            }
            mem_store_stop(d->db, false);
            if (!d->violated && drv_drain(d) && drv_sync(d) != ST_OK && drv_sync(d) != ST_OK)
                drv_violation(d, "a sync fails although the store works again");
            drv_verify_all(d);
        }
        end(d);
    }
    assert_true(timeouts > 0);
}

/* How long a request takes to be answered, and how. */
struct timed {
    struct vol_io io;
    struct vol_seg segs[2];
    struct vol_extent extents[4];
    struct drv *d;
    bool answered;
    uint64_t began_ns, took_ms;
    enum status st;
};

static void timed_done(struct vol_io *io)
{
    struct timed *t = container_of(io, struct timed, io);
    t->answered = true;
    t->took_ms = (sim_now_ns(t->d->sim) - t->began_ns) / 1000000;
    t->st = io->st;
    if (io->n_segs)
        volume_release_segs(io);
}

static void timed_begin(struct drv *d, struct timed *t, uint64_t offset, uint64_t length)
{
    *t = (struct timed){.d = d,
                        .began_ns = sim_now_ns(d->sim),
                        .io = {.done = timed_done,
                               .granted = timed_done,
                               .offset = offset,
                               .length = length,
                               .segs_cap = 2,
                               .extents_cap = 4}};
    t->io.segs = t->segs;
    t->io.extents = t->extents;
}

static void timed_write(struct drv *d, struct timed *t, uint64_t offset, const void *data)
{
    timed_begin(d, t, offset, 4096);
    if (!volume_write_begin(d->p->vol, &t->io))
        return;
    assert_int_equal(t->io.st, ST_OK);
    volume_write_commit(d->p->vol, &t->io, data);
    shard_submit(d->p->shard);
}

/* Answered within the timeout and not long behind it, or not before it, with an error. */
static void expect_late(const struct timed *t)
{
    assert_true(t->answered);
    assert_int_equal(t->st, ST_IO);
    assert_in_range(t->took_ms, TIMEOUT_MS * 9 / 10, TIMEOUT_MS * 13 / 10);
}

static void is_closed_now(void *arg)
{
    *(bool *)arg = true;
}

static void one_of_each_kind(uint32_t read_timeout_ms)
{
    struct drv_config config = config_of(1, false);
    config.block_size = 4096;
    config.size = 8ull << 30; /* rows that are not in memory */
    config.n_regions = 2;
    config.region_bytes = 1u << 20;
    config.store.timeout_ms = read_timeout_ms;
    struct drv *d = drv_new(&config);
    static uint8_t data[4096], got[4096];
    struct timed write, trim, flush, read_dirty, read_store, read_row, status;
    memset(data, 0x77, sizeof data);
    drv_open(d);
    assert_int_equal(drv_write(d, 4096, 4096, 0), ST_OK);
    assert_int_equal(drv_write(d, 8192, 4096, 0), ST_OK);
    drv_reopen(d, true);
    assert_int_equal(drv_read(d, 8192, 4096, got), ST_OK);
    mem_store_stop(d->db, true);

    timed_write(d, &write, 0, data);
    timed_begin(d, &trim, 1u << 20, 65536);
    volume_trim(d->p->vol, &trim.io);
    timed_begin(d, &flush, 0, 0);
    volume_flush(d->p->vol, &flush.io);
    struct timed *reads[] = {&read_dirty, &read_store, &read_row};
    static const uint64_t offsets[] = {0, 4096, 6ull << 30};
    for (unsigned i = 0; i < 3; i++) {
        timed_begin(d, reads[i], offsets[i], 4096);
        assert_false(volume_read(d->p->vol, &reads[i]->io));
    }
    timed_begin(d, &status, 5ull << 30, 1u << 20);
    volume_status(d->p->vol, &status.io);
    /* What is cached and clean is answered meanwhile. */
    struct timed cached;
    timed_begin(d, &cached, 8192, 4096);
    assert_true(volume_read(d->p->vol, &cached.io));
    volume_release_segs(&cached.io);
    drv_wait_ms(d, 2 * TIMEOUT_MS);
    expect_late(&write);
    expect_late(&trim);
    expect_late(&read_dirty);
    expect_late(&read_store);
    expect_late(&read_row);
    expect_late(&status);
    assert_true(flush.answered);

    /* The write is not in yet, so no flush may succeed; one that waits does when it is. */
    struct timed second;
    timed_begin(d, &second, 0, 0);
    volume_flush(d->p->vol, &second.io);
    drv_wait_ms(d, 2 * TIMEOUT_MS);
    expect_late(&second);
    timed_begin(d, &second, 0, 0);
    volume_flush(d->p->vol, &second.io);
    drv_wait_ms(d, TIMEOUT_MS / 2);
    assert_false(second.answered);
    mem_store_stop(d->db, false);
    drv_wait_ms(d, 100);
    assert_true(second.answered && second.st == ST_OK);
    assert_int_equal(drv_read(d, 0, 4096, got), ST_OK);
    assert_memory_equal(got, data, sizeof data);
    assert_int_equal(drv_read(d, 4096, 4096, got), ST_OK);
    struct volume_stats stats;
    volume_get_stats(d->p->vol, &stats);
    assert_int_equal(stats.hash_errors, 0);
    drv_close(d);
    assert_true(drv_free(d));
}

static void each_kind_of_request_ends(void **state)
{
    (void)state;
    one_of_each_kind(0);
    one_of_each_kind(TIMEOUT_MS); /* reads end in the store */
}

/* A block status ends while the many rows it needs are being read, and what comes of them later is
 * let go; also where the volume was closed meanwhile. */
static void block_status_of_many_rows_ends(void **state)
{
    (void)state;
    const uint64_t row_bytes = 4096u * 1024;
    for (unsigned i = 0; i < 4; i++) {
        struct drv_config config = config_of(3 + i, false);
        struct timed status;
        config.block_size = 4096;
        config.size = 8ull << 30;
        config.n_regions = 2;
        config.region_bytes = 1u << 20;
        config.store.timeout_ms = i & 1 ? TIMEOUT_MS : 0;
        struct drv *d = drv_new(&config);
        drv_open(d);
        for (unsigned row = 0; row < 100; row++)
            assert_int_equal(drv_zero(d, row * row_bytes, 4096, false, VOL_NO_HOLE), ST_OK);
        drv_reopen(d, true);
        /* Level 2 is in memory, level 1 is not. */
        assert_int_equal(drv_zero(d, 200 * row_bytes, 4096, true, 0), ST_OK);
        assert_int_equal(drv_sync(d), ST_OK);
        mem_store_stop(d->db, true);
        timed_begin(d, &status, 0, 100 * row_bytes);
        volume_status(d->p->vol, &status.io);
        drv_wait_ms(d, 2 * TIMEOUT_MS);
        expect_late(&status);
        if (i & 2) {
            mem_store_stop(d->db, false);
            timed_begin(d, &status, 0, 100 * row_bytes);
            volume_status(d->p->vol, &status.io);
            drv_wait_ms(d, TIMEOUT_MS / 2);
            assert_true(status.answered && status.st == ST_OK);
            assert_int_equal(status.io.n_extents, 4);
            assert_int_equal(status.extents[0].length, 4096);
            assert_int_equal(status.extents[1].length, row_bytes - 4096);
        } else {
            volume_unwatch_loss(&d->p->watcher);
            bool closed = false;
            volume_close(d->p->vol, is_closed_now, &closed);
            d->p->vol = NULL;
            drv_wait_ms(d, 100);
            assert_false(closed);
            mem_store_stop(d->db, false);
            drv_wait_ms(d, 3000);
            assert_true(closed);
        }
        drv_close(d);
        assert_true(drv_free(d));
    }
}

/* Who waits for the volume itself ends, too, and gets it later. */
static void parked_requests_end(void **state)
{
    (void)state;
    for (unsigned timeout_ms = 0; timeout_ms <= TIMEOUT_MS; timeout_ms += TIMEOUT_MS) {
        struct drv_config config = config_of(2, false);
        static uint8_t data[4096];
        struct timed write, read;
        config.store.timeout_ms = timeout_ms;
        struct drv *d = drv_new(&config);
        drv_open(d);
        mem_store_stop(d->db, true);
        timed_begin(d, &read, 0, 4096);
        assert_false(volume_read(d->p->vol, &read.io));
        timed_write(d, &write, 0, data);
        drv_wait_ms(d, 2 * TIMEOUT_MS);
        assert_true(read.answered && read.st != ST_OK);
        assert_true(write.answered && write.st != ST_OK);
        mem_store_stop(d->db, false);
        drv_wait_ms(d, 3000);
        assert_int_equal(drv_write(d, 0, 4096, 0), ST_OK);
        end(d);
    }
}

/* Writers that never rest while the store stands: what they hold stays bounded. */
static void memory_stays_bounded(void **state)
{
    (void)state;
    struct drv_config config = config_of(3, false);
    config.size = 256u << 20;
    config.write_bytes_max = 0;
    struct drv *d = drv_new(&config);
    drv_open(d);
    drv_steps(d, 50);
    mem_store_stop(d->db, true);
    for (unsigned i = 0; i < 400 && !d->violated; i++) {
        /* (The driver looks at the buffers in use at every step.) */
        for (unsigned k = 0; k < 8; k++)
            drv_request(d);
        drv_wait_ms(d, 100);
    }
    struct volume_stats stats;
    volume_get_stats(d->p->vol, &stats);
    assert_true(stats.timeouts > 100);
    assert_true(stats.dirty_bytes <= d->p->shard->write_bytes_max + VOLUME_PIECE_BYTES);
    mem_store_stop(d->db, false);
    drv_drain(d);
    end(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stops_under_load),
        cmocka_unit_test(each_kind_of_request_ends),
        cmocka_unit_test(block_status_of_many_rows_ends),
        cmocka_unit_test(parked_requests_end),
        cmocka_unit_test(memory_stays_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
