/*
 * Snapshots, one thing at a time: what is in one, what its view shows, what survives, and the
 * freeze (G7). Random mixes of all this are in volume_model_test.
 */
#include "test.h"

#include <stdio.h>

#include "../sim/driver.h"
#include "../sim/stored.h"
#include "base/mem.h"
#include "volume/internal.h"

#define SIZE (64u << 20)
#define BS 4096u
#define LOOK_BYTES (1u << 20) /* tests write in here */

static struct drv *start(uint64_t seed, bool log)
{
    struct drv_config config = {
        .seed = seed,
        .size = SIZE,
        .block_size = BS,
        .codec = CODEC_LZ4,
        .n_regions = 1,
        .cache_bytes = 64u << 20,
        .damaged = true, /* its check of the store knows no snapshots */
        .no_log = !log,
    };
    struct drv *d = drv_new(&config);
    drv_open(d);
    drv_request_ownership(d);
    drv_drain(d);
    return d;
}

static void end(struct drv *d)
{
    drv_close(d);
    assert_true(drv_free(d));
}

static struct asked asked(const char *name)
{
    struct asked c = drv_asked(name);
    static uint8_t ids;
    c.op.id[0] = ++ids;
    return c;
}

static enum status wait_for(struct drv *d, struct asked *c)
{
    enum status st = drv_answer(d, c);
    if (st != ST_OK)
        assert_true(c->op.err.text[0]);
    return st;
}

static enum status snapshot(struct drv *d, const char *name, uint64_t *epoch)
{
    struct asked c = asked(name);
    volume_snapshot_create(d->p->vol, &c.op);
    enum status st = wait_for(d, &c);
    if (epoch)
        *epoch = c.op.epoch;
    return st;
}

struct looking {
    struct volume *vol;
    struct volume_watcher watcher;
    bool lost;
};

static void view_lost(struct volume_watcher *w, const char *why)
{
    (void)why;
    container_of(w, struct looking, watcher)->lost = true;
}

static bool is_lost(void *arg)
{
    return ((struct looking *)arg)->lost;
}

static enum status view_open(struct drv *d, uint64_t epoch, struct looking *v)
{
    enum status st;
    *v = (struct looking){.watcher = {.lost = view_lost}};
    v->vol = drv_view_open(d, d->p->shard, d->p->env, d->branch, epoch, &st);
    if (v->vol)
        volume_watch_loss(v->vol, &v->watcher);
    return st;
}

static void view_close(struct drv *d, struct looking *v)
{
    volume_unwatch_loss(&v->watcher);
    drv_view_close(d, v->vol, d->p->env);
}

static uint8_t seen[LOOK_BYTES], now[LOOK_BYTES], before[LOOK_BYTES];

/* What a snapshot holds stays, whatever is written, zeroed or trimmed later, also when its blocks
 * are read again by another process. */
static void holds_what_was_written_before(void **state)
{
    (void)state;
    for (unsigned log = 0; log < 2; log++) {
        struct drv *d = start(1 + log, log);
        uint64_t epoch, second;
        struct looking v;
        drv_write(d, 100, 50000, 0);
        drv_write(d, 200000, 70000, 0);
        drv_read(d, 0, LOOK_BYTES, before);
        assert_int_equal(snapshot(d, "one", &epoch), ST_OK);
        drv_write(d, 4000, 9000, 0);
        drv_zero(d, 210000, 30000, true, 0);
        assert_int_equal(snapshot(d, "two", &second), ST_OK);
        assert_int_equal(second, epoch + 1);
        drv_write(d, 0, LOOK_BYTES, 0);
        for (unsigned again = 0; again < 2; again++) {
            assert_int_equal(view_open(d, epoch, &v), ST_OK);
            assert_int_equal(volume_epoch(v.vol), epoch);
            assert_int_equal(drv_view_read(d, v.vol, 0, LOOK_BYTES, seen), ST_OK);
            assert_memory_equal(seen, before, LOOK_BYTES);
            view_close(d, &v);
            drv_reopen(d, true);
        }
        drv_read(d, 0, LOOK_BYTES, now);
        drv_verify_all(d);
        end(d);
    }
}

/* A view cannot be changed, and needs no owner. */
static void a_view_is_read_only(void **state)
{
    (void)state;
    struct drv *d = start(3, true);
    uint64_t epoch;
    struct looking v;
    drv_write(d, 0, 5000, 0);
    assert_int_equal(snapshot(d, "s", &epoch), ST_OK);
    assert_int_equal(view_open(d, epoch, &v), ST_OK);
    struct asked c = drv_asked("");
    c.op.io.length = 4096;
    volume_trim(v.vol, &c.op.io);
    assert_int_equal(drv_answer(d, &c), ST_PERM);
    c = asked("t");
    volume_snapshot_create(v.vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_PERM);
    c = drv_asked("");
    volume_flush(v.vol, &c.op.io);
    assert_int_equal(drv_answer(d, &c), ST_OK);
    view_close(d, &v);
    struct looking none;
    assert_int_equal(view_open(d, epoch + 7, &none), ST_NOTFOUND);
    end(d);
}

/* Names: taken ones, impossible ones, unknown ones. */
static void names(void **state)
{
    (void)state;
    struct drv *d = start(4, true);
    assert_int_equal(snapshot(d, "a", NULL), ST_OK);
    assert_int_equal(snapshot(d, "-a", NULL), ST_INVAL);
    assert_int_equal(snapshot(d, "b", NULL), ST_OK);
    struct asked c = asked("d");
    memset(c.op.id, 0xa1, sizeof c.op.id);
    volume_snapshot_create(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_OK);
    uint64_t epoch = c.op.epoch;
    for (unsigned same = 0; same < 2; same++) {
        c = asked("d");
        memset(c.op.id, same ? 0xa1 : 0xa2, sizeof c.op.id);
        volume_snapshot_create(d->p->vol, &c.op);
        assert_int_equal(wait_for(d, &c), same ? ST_OK : ST_EXISTS);
    }
    assert_int_equal(c.op.epoch, epoch);
    c = asked("a");
    snprintf(c.op.to, sizeof c.op.to, "b");
    volume_snapshot_rename(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_EXISTS);
    c = asked("a");
    snprintf(c.op.to, sizeof c.op.to, "c");
    volume_snapshot_rename(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_OK);
    c = asked("a");
    volume_snapshot_remove(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_NOTFOUND);
    drv_reopen(d, true);
    drv_request_ownership(d);
    assert_int_equal(snapshot(d, "c", NULL), ST_EXISTS);
    assert_int_equal(snapshot(d, "a", NULL), ST_OK);
    end(d);
}

/* A removed snapshot's view is lost, and never shows anything else meanwhile; a clone keeps it. */
static void removal(void **state)
{
    (void)state;
    struct drv *d = start(5, true);
    uint64_t epoch;
    struct looking v;
    drv_write(d, 0, 100000, 0);
    assert_int_equal(snapshot(d, "s", &epoch), ST_OK);
    drv_write(d, 0, 100000, 0);

    struct key child;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct child_record rec = {.created_ns = 1};
    key_child(&child, d->branch, epoch, 77);
    size_t len = child_encode(&rec, key_slice(&child), bytes);
    mem_store_put(d->db, key_slice(&child), (struct slice){bytes, len}, (struct slice){0});
    struct asked c = asked("s");
    volume_snapshot_remove(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_BUSY);
    assert_true(mem_store_damage(d->db, key_slice(&child), MEM_REMOVE));

    assert_int_equal(view_open(d, epoch, &v), ST_OK);
    c = asked("s");
    volume_snapshot_remove(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_OK);
    assert_true(world_run_until(d->world, d->p->env, is_lost, &v));
    assert_int_not_equal(drv_view_read(d, v.vol, 0, 4096, seen), ST_OK);
    view_close(d, &v);
    assert_int_equal(view_open(d, epoch, &v), ST_NOTFOUND);
    drv_verify_all(d);
    end(d);
}

/* Changes wait while frozen; with the token of the freeze a snapshot is made, with another not. */
static void freeze(void **state)
{
    (void)state;
    struct drv *d = start(6, true);
    uint64_t epoch;
    struct looking v;
    drv_write(d, 0, 4096, 0);
    drv_read(d, 0, LOOK_BYTES, before);
    assert_true(volume_freeze(d->p->vol, 5, 1000));
    assert_false(volume_freeze(d->p->vol, 4, 1000));
    struct asked write = asked("");
    write.op.io.offset = 0;
    write.op.io.length = 8192;
    volume_zero(d->p->vol, &write.op.io);
    drv_wait_ms(d, 500);
    assert_false(write.answered);
    struct asked c = asked("s");
    c.op.token = 6;
    volume_snapshot_create(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_BUSY);
    c = asked("s");
    c.op.token = 5;
    volume_snapshot_create(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_OK);
    epoch = c.op.epoch;
    volume_thaw(d->p->vol, 6);
    assert_false(write.answered);
    volume_thaw(d->p->vol, 5);
    shard_submit(d->p->shard);
    assert_int_equal(wait_for(d, &write), ST_OK);
    assert_int_equal(view_open(d, epoch, &v), ST_OK);
    assert_int_equal(drv_view_read(d, v.vol, 0, LOOK_BYTES, seen), ST_OK);
    assert_memory_equal(seen, before, LOOK_BYTES);
    view_close(d, &v);
    /* Nobody comes back: it ends by itself. */
    assert_true(volume_freeze(d->p->vol, 7, 1000));
    write.answered = false;
    volume_zero(d->p->vol, &write.op.io);
    drv_wait_ms(d, 1500);
    shard_submit(d->p->shard);
    assert_int_equal(wait_for(d, &write), ST_OK);
    c = asked("t");
    c.op.token = 7;
    volume_snapshot_create(d->p->vol, &c.op);
    assert_int_equal(wait_for(d, &c), ST_BUSY);
    end(d);
}

static bool trim_is_built(void *arg)
{
    const struct volume *vol = ((const struct drv *)arg)->p->vol;
    return vol->n_ranges_uncommitted && !vol->n_ranges_unbuilt;
}

static bool is_clean(void *arg)
{
    return volume_is_clean(arg);
}

/* A row of the index that is read while a trim of all of it is on its way to the store is found as
 * only the snapshot names it. When that is removed, what it named is found by that row: the next
 * write must leave it to the cleaner. */
static void row_read_under_a_trim(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        const uint64_t row2_bytes = (uint64_t)BS << (2 * INDEX_SHIFT);
        struct drv_config config = {
            .seed = seed,
            .size = 10 * row2_bytes,
            .block_size = BS,
            .n_regions = 5,
            .region_bytes = 4 * BS,
            .store = {.has_log = true, .commit_ns_max = 20000000},
        };
        struct drv *d = drv_new(&config);
        uint64_t at = d->regions[2].start;
        drv_open(d);
        drv_write(d, at, BS, 0);
        assert_int_equal(snapshot(d, "s", NULL), ST_OK);
        drv_reopen(d, true);
        drv_request_ownership(d);
        drv_drain(d);
        assert_int_equal(drv_zero(d, row2_bytes / 2, 9 * row2_bytes, true, 0), ST_OK);
        assert_true(drv_until(d, trim_is_built, d));
        drv_read(d, at, BS, seen);
        struct asked removal = asked("s");
        volume_snapshot_remove(d->p->vol, &removal.op);
        assert_int_equal(wait_for(d, &removal), ST_OK);
        drv_write(d, at + BS, BS, 0);
        assert_int_equal(drv_sync(d), ST_OK);
        drv_until(d, is_clean, d->p->vol);
        drv_close(d);
        const char *wrong = stored_check(d->world, true, NULL);
        if (wrong)
            fail_msg("seed %llu: %s", (unsigned long long)seed, wrong);
        assert_true(drv_free(d));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(holds_what_was_written_before),
        cmocka_unit_test(a_view_is_read_only),
        cmocka_unit_test(names),
        cmocka_unit_test(removal),
        cmocka_unit_test(freeze),
        cmocka_unit_test(row_read_under_a_trim),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
