/* The allocator of the data file against a model: no overlap, no leak, and no reuse of what
 * a crash or a reader may still need. */
#include "store/lmdb/space.h"

#include <lmdb.h>

#include "store_test.h"

#define UNITS_MAX 4000u
#define LIVE_MAX 600u

struct model {
    char dir[64];
    MDB_env *env;
    struct space_dbis dbis;
    uint64_t data_units;
    /* For every unit: 0 free, 1 live, else 2 + the transaction that freed it. */
    uint64_t owner[UNITS_MAX];
    struct space_extents live[LIVE_MAX];
};

static void model_begin(struct model *m)
{
    memset(m, 0, sizeof *m);
    strcpy(m->dir, "/tmp/store-space-XXXXXX");
    assert_non_null(mkdtemp(m->dir));
    assert_int_equal(mdb_env_create(&m->env), 0);
    mdb_env_set_mapsize(m->env, 64u << 20);
    mdb_env_set_maxdbs(m->env, 4);
    /* The model is about what is where, not about crashes: those have their own tests. */
    assert_int_equal(mdb_env_open(m->env, m->dir, MDB_NOSYNC | MDB_NOTLS, 0600), 0);
    MDB_txn *txn;
    assert_int_equal(mdb_txn_begin(m->env, NULL, 0, &txn), 0);
    assert_int_equal(mdb_dbi_open(txn, "store", MDB_CREATE, &m->dbis.store), 0);
    assert_int_equal(mdb_dbi_open(txn, "free", MDB_CREATE, &m->dbis.free), 0);
    assert_int_equal(mdb_dbi_open(txn, "holes", MDB_CREATE, &m->dbis.holes), 0);
    assert_int_equal(mdb_dbi_open(txn, "pending", MDB_CREATE, &m->dbis.pending), 0);
    assert_int_equal(mdb_txn_commit(txn), 0);
    m->data_units = 1;
}

static void model_end(struct model *m)
{
    mdb_env_close(m->env);
    for (size_t i = 0; i < LIVE_MAX; i++)
        space_extents_free(&m->live[i]);
    test_folder_remove(m->dir);
}

/* Whatever was just taken must have been free in the model. */
static void model_take(struct model *m, const struct space_extents *got, uint64_t oldest)
{
    for (size_t i = 0; i < got->n; i++) {
        for (uint64_t u = got->v[i].start; u < got->v[i].start + got->v[i].units; u++) {
            assert_in_range(u, 1, m->data_units - 1);
            if (m->owner[u] >= 2)
                assert_true(m->owner[u] - 2 < oldest);
            else
                assert_int_equal(m->owner[u], 0);
            m->owner[u] = 1;
        }
    }
}

static void model_free(struct model *m, struct space *sp, size_t slot)
{
    struct space_extents *e = &m->live[slot];
    for (size_t i = 0; i < e->n; i++) {
        space_free_later(sp, e->v[i].start, e->v[i].units);
        for (uint64_t u = e->v[i].start; u < e->v[i].start + e->v[i].units; u++) {
            assert_int_equal(m->owner[u], 1);
            m->owner[u] = 2 + mdb_txn_id(sp->txn);
        }
    }
    e->n = 0;
}

static void model_compare(struct model *m, struct space *sp)
{
    uint64_t live = 0;
    for (uint64_t u = 1; u < m->data_units; u++)
        live += m->owner[u] == 1;
    assert_int_equal(sp->data_units, m->data_units);
    assert_int_equal(sp->data_units - 1,
                     live + sp->free_units + sp->hole_units + sp->pending_units);
    assert_int_equal(space_check(sp), ST_OK);
}

static void model_holes(struct space *sp, struct chance *chance)
{
    uint64_t moved;
    struct space_extent hole;
    assert_int_equal(space_make_holes(sp, 40, 1 + chance_below(chance, 8), 1000, &moved), ST_OK);
    if (chance_below(chance, 2) && space_hole_unpunched(sp, &hole) == ST_OK)
        assert_int_equal(space_hole_punched(sp, &hole), ST_OK);
    if (chance_below(chance, 2) && space_hole_first(sp, &hole) == ST_OK)
        assert_int_equal(space_hole_backed(sp, &hole, 1 + chance_below(chance, hole.units)), ST_OK);
}

static void model_step(struct model *m, struct space *sp, struct chance *chance, uint64_t oldest)
{
    size_t ops = chance_below(chance, 12);
    for (size_t i = 0; i < ops; i++) {
        size_t slot = chance_below(chance, LIVE_MAX);
        if (m->live[slot].n) {
            model_free(m, sp, slot);
            continue;
        }
        uint64_t units = 1 + chance_below(chance, chance_below(chance, 6) ? 6 : 60);
        if (units > sp->free_units && sp->data_units + units <= UNITS_MAX) {
            assert_int_equal(space_take(sp, units, &m->live[slot]), ST_NOSPC);
            assert_int_equal(m->live[slot].n, 0);
            uint64_t start = sp->data_units;
            sp->data_units += units;
            m->data_units += units;
            assert_int_equal(space_free_now(sp, start, units), ST_OK);
        }
        enum status st = space_take(sp, units, &m->live[slot]);
        if (st == ST_OK) {
            uint64_t sum = 0;
            for (size_t j = 0; j < m->live[slot].n; j++)
                sum += m->live[slot].v[j].units;
            assert_int_equal(sum, units);
            model_take(m, &m->live[slot], oldest);
        } else {
            assert_int_equal(st, ST_NOSPC);
            assert_true(units > sp->free_units);
        }
    }
    if (chance_below(chance, 8) == 0)
        model_holes(sp, chance);
}

static void test_against_model(void **state)
{
    (void)state;
    struct model *m = mem_alloc(sizeof *m);
    struct chance chance = chance_begin("space");
    model_begin(m);
    MDB_txn *reader = NULL;
    uint64_t reader_version = 0;
    for (int step = 0; step < 6000; step++) {
        MDB_txn *txn;
        assert_int_equal(mdb_txn_begin(m->env, NULL, 0, &txn), 0);
        uint64_t oldest = mdb_txn_id(txn) - 1;
        if (reader && reader_version < oldest)
            oldest = reader_version;
        struct space sp;
        assert_int_equal(space_load(&sp, txn, &m->dbis, NULL), ST_OK);
        assert_int_equal(space_reclaim(&sp, oldest, 1 + chance_below(&chance, 50)), ST_OK);
        bool undo = chance_below(&chance, 10) == 0;
        if (undo) {
            /* What an undone transaction did must leave no trace. */
            struct space_extents got = {0};
            (void)space_take(&sp, 1 + chance_below(&chance, 20), &got);
            space_extents_free(&got);
            mdb_txn_abort(txn);
            space_release(&sp);
            continue;
        }
        model_step(m, &sp, &chance, oldest);
        if (step % 20 == 0)
            model_compare(m, &sp);
        assert_int_equal(space_save(&sp, 1), ST_OK);
        assert_int_equal(mdb_txn_commit(txn), 0);
        space_release(&sp);
        if (reader && chance_below(&chance, 30) == 0) {
            mdb_txn_abort(reader);
            reader = NULL;
        } else if (!reader && chance_below(&chance, 30) == 0) {
            assert_int_equal(mdb_txn_begin(m->env, NULL, MDB_RDONLY, &reader), 0);
            reader_version = mdb_txn_id(reader);
        }
    }
    if (reader)
        mdb_txn_abort(reader);

    /* Everything is freed: after three transactions it is one run, apart from holes. */
    uint64_t free_units = 0;
    for (int i = 0; i < 4; i++) {
        MDB_txn *txn;
        struct space sp;
        assert_int_equal(mdb_txn_begin(m->env, NULL, 0, &txn), 0);
        assert_int_equal(space_load(&sp, txn, &m->dbis, NULL), ST_OK);
        assert_int_equal(space_reclaim(&sp, mdb_txn_id(txn) - 1, SIZE_MAX), ST_OK);
        for (size_t s = 0; i == 0 && s < LIVE_MAX; s++)
            model_free(m, &sp, s);
        struct space_extent hole;
        while (space_hole_first(&sp, &hole) == ST_OK)
            assert_int_equal(space_hole_backed(&sp, &hole, hole.units), ST_OK);
        free_units = sp.free_units;
        assert_int_equal(space_save(&sp, 1), ST_OK);
        MDB_stat stat;
        mdb_stat(txn, m->dbis.free, &stat);
        if (i == 3)
            assert_int_equal(stat.ms_entries, 1);
        assert_int_equal(mdb_txn_commit(txn), 0);
        space_release(&sp);
    }
    assert_int_equal(free_units, m->data_units - 1);
    model_end(m);
    free(m);
}

/* A record that was changed is noticed and never believed. */
static void test_damage_is_noticed(void **state)
{
    (void)state;
    struct model *m = mem_alloc(sizeof *m);
    model_begin(m);
    MDB_txn *txn;
    struct space sp;
    struct space_extents got = {0};
    assert_int_equal(mdb_txn_begin(m->env, NULL, 0, &txn), 0);
    assert_int_equal(space_load(&sp, txn, &m->dbis, NULL), ST_OK);
    sp.data_units = 101;
    assert_int_equal(space_free_now(&sp, 1, 100), ST_OK);
    assert_int_equal(space_free_now(&sp, 50, 10), ST_IO);
    assert_int_equal(space_free_now(&sp, 100, 10), ST_IO);
    assert_int_equal(space_save(&sp, 1), ST_OK);
    MDB_cursor *c;
    MDB_val k, v;
    assert_int_equal(mdb_cursor_open(txn, m->dbis.free, &c), 0);
    assert_int_equal(mdb_cursor_get(c, &k, &v, MDB_FIRST), 0);
    uint8_t value[16];
    memcpy(value, v.mv_data, sizeof value);
    value[1] ^= 1;
    v.mv_data = value;
    assert_int_equal(mdb_cursor_put(c, &k, &v, MDB_CURRENT), 0);
    assert_int_equal(space_take(&sp, 10, &got), ST_IO);
    mdb_cursor_close(c);
    space_release(&sp);
    space_extents_free(&got);
    mdb_txn_abort(txn);
    model_end(m);
    free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_model),
        cmocka_unit_test(test_damage_is_noticed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
