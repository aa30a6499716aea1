/*
 * The look at what is stored (sim/stored.h): it takes what the volume layer leaves, and finds each
 * thing that is planted there or taken away.
 */
#include "test.h"

#include <string.h>

#include "../sim/driver.h"
#include "../sim/stored.h"
#include "volume/catalog.h"

#define BS 4096u

struct made {
    struct drv *d;
    uint64_t epoch; /* of the snapshot */
};

/* A volume with blocks 0 to 7, a snapshot of these, and newer blocks 0 to 3; closed. */
static struct made make(void)
{
    struct drv_config config = {.seed = 1, .size = 1u << 20, .block_size = BS, .damaged = true};
    struct made m = {.d = drv_new(&config)};
    struct asked a = drv_asked("s");
    drv_open(m.d);
    for (unsigned i = 0; i < 8; i++)
        assert_int_equal(drv_write(m.d, i * BS, BS, 0), ST_OK);
    volume_snapshot_create(m.d->p->vol, &a.op);
    assert_int_equal(drv_answer(m.d, &a), ST_OK);
    m.epoch = a.op.epoch;
    for (unsigned i = 0; i < 4; i++)
        assert_int_equal(drv_write(m.d, i * BS, BS, 0), ST_OK);
    drv_close(m.d);
    assert_false(m.d->violated);
    assert_null(stored_check(m.d->world, true, NULL));
    return m;
}

static void finds(struct made *m, bool clean, const char *words)
{
    const char *wrong = stored_check(m->d->world, clean, NULL);
    if (!wrong || !strstr(wrong, words))
        fail_msg("expected \"...%s...\", it says: %s\n", words, wrong ? wrong : "nothing");
}

static void put_block(struct made *m, uint64_t epoch, uint64_t no)
{
    struct key key;
    key_block(&key, m->d->branch, epoch, no);
    mem_store_put(m->d->db, key_slice(&key), (struct slice){"x", 1}, (struct slice){NULL, 0});
}

static void end(struct made *m)
{
    assert_true(drv_free(m->d));
}

static void what_is_named_is_there(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        struct made m = make();
        struct key key;
        /* One that only the snapshot names, one that only the volume does. */
        key_block(&key, m.d->branch, m.epoch + i, 2);
        assert_true(mem_store_damage(m.d->db, key_slice(&key), MEM_REMOVE));
        finds(&m, false, "block 2 of branch 1");
        end(&m);
    }
    struct made m = make();
    struct key key;
    key_row(&key, m.d->branch, 1, 0, m.epoch);
    assert_true(mem_store_damage(m.d->db, key_slice(&key), MEM_REMOVE));
    finds(&m, false, "level-1 row 0 of branch 1, epoch 1 is not there");
    end(&m);
    m = make();
    key_snapshot(&key, m.d->branch, m.epoch);
    assert_true(mem_store_damage(m.d->db, key_slice(&key), MEM_FLIP_HEAD));
    finds(&m, false, "does not decode");
    end(&m);
}

static void what_nobody_names_is_found(void **state)
{
    (void)state;
    struct made m = make();
    put_block(&m, m.epoch, 100);
    finds(&m, false, "block 100 of branch 1, epoch 1 is there and nothing names it");
    end(&m);
    m = make();
    struct key key;
    key_row(&key, m.d->branch, 1, 9, m.epoch);
    mem_store_put(m.d->db, key_slice(&key), (struct slice){"x", 1}, (struct slice){NULL, 0});
    finds(&m, false, "level-1 row 9 of branch 1, epoch 1 is there and nothing names it");
    end(&m);
    /* What is gone with its snapshot. */
    m = make();
    key_snapshot(&key, m.d->branch, m.epoch);
    assert_true(mem_store_damage(m.d->db, key_slice(&key), MEM_REMOVE));
    finds(&m, false, "is there and nothing names it");
    end(&m);
}

static void what_is_about_to_be_cleared_may_be_there(void **state)
{
    (void)state;
    struct made m = make();
    struct trash_record rec = {
        .after = m.epoch - 1, .epoch = m.epoch, .first_block = 100, .end_block = 101};
    uint8_t bytes[RECORD_BYTES_MAX];
    struct key key;
    key_trash(&key, m.d->branch, 7);
    size_t len = trash_encode(&rec, key_slice(&key), bytes);
    mem_store_put(m.d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){NULL, 0});
    put_block(&m, m.epoch, 100);
    assert_null(stored_check(m.d->world, false, NULL));
    finds(&m, true, "block 100 of branch 1, epoch 1 is there");
    put_block(&m, m.epoch + 1, 100);
    finds(&m, false, "block 100 of branch 1, epoch 2 is there");
    end(&m);
}

static void clones_and_parents_know_each_other(void **state)
{
    (void)state;
    struct made m = make();
    struct child_record rec = {0};
    uint8_t bytes[RECORD_BYTES_MAX];
    struct key key;
    key_child(&key, m.d->branch, m.epoch, 77);
    size_t len = child_encode(&rec, key_slice(&key), bytes);
    mem_store_put(m.d->db, key_slice(&key), (struct slice){bytes, len}, (struct slice){NULL, 0});
    finds(&m, false, "a child record of branch 77, which is no clone of it");
    end(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_named_is_there),
        cmocka_unit_test(what_nobody_names_is_found),
        cmocka_unit_test(what_is_about_to_be_cleared_may_be_there),
        cmocka_unit_test(clones_and_parents_know_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
