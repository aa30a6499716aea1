/*
 * Many keys that are new and ascend, as those of blocks written one after another (mutate_stretch
 * in store/lmdb/commit.c): the pages of the index are full afterwards, and bodies lie in the order
 * of their keys. What LMDB holds is looked at through LMDB itself, once the store is closed.
 */
#include <lmdb.h>

#include "store/lmdb/engine.h"
#include "store_test.h"

#define KEYS 3000u
#define COMMITS 8u
#define BODY_BYTES 5000u
#define HEAD "of about the length"

static int begin(void **state)
{
    return test_begin(state, false);
}

static void set_keys(struct test_store *t, unsigned commit, unsigned step)
{
    static struct store_mutation m[KEYS];
    static char names[KEYS][16];
    static uint8_t bodies[KEYS][BODY_BYTES];
    for (unsigned i = 0; i < KEYS; i++) {
        unsigned no = (commit * KEYS + i) * step;
        snprintf(names[i], sizeof names[i], "k%08u", no);
        memset(bodies[i], (int)(no % 251), BODY_BYTES);
        m[i] = (struct store_mutation){
            STORE_SET, text(names[i]), text(HEAD), {bodies[i], BODY_BYTES}};
    }
    assert_int_equal(test_commit(t, NULL, 0, m, KEYS), ST_OK);
}

static void expect_keys(struct test_store *t, unsigned n)
{
    static uint8_t body[BODY_BYTES], want[BODY_BYTES];
    for (unsigned no = 0; no < n; no += 97) {
        char name[16];
        snprintf(name, sizeof name, "k%08u", no);
        struct store_get get = {.key = text(name), .body = body, .body_cap = BODY_BYTES};
        struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
        assert_int_equal(test_read(t, &r), ST_OK);
        assert_int_equal(get.st, ST_OK);
        memset(want, (int)(no % 251), BODY_BYTES);
        assert_memory_equal(body, want, BODY_BYTES);
        store_read_release(&r.read);
    }
}

struct seen {
    double fill;                     /* of the leaves' bytes, those of entries */
    unsigned n_keys, n_bodies_after; /* bodies that lie behind that of the key before */
};

static struct seen look(const char *dir)
{
    struct seen seen = {0};
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    MDB_cursor *c;
    MDB_stat stat;
    assert_int_equal(mdb_env_create(&env), 0);
    mdb_env_set_maxdbs(env, 16);
    assert_int_equal(mdb_env_open(env, dir, MDB_RDONLY, 0600), 0);
    assert_int_equal(mdb_txn_begin(env, NULL, MDB_RDONLY, &txn), 0);
    assert_int_equal(mdb_dbi_open(txn, "keys", 0, &dbi), 0);
    assert_int_equal(mdb_stat(txn, dbi, &stat), 0);
    assert_int_equal(mdb_cursor_open(txn, dbi, &c), 0);
    size_t bytes = 0;
    uint64_t before = 0;
    MDB_val k, data;
    for (int rc = mdb_cursor_get(c, &k, &data, MDB_FIRST); rc == 0;
         rc = mdb_cursor_get(c, &k, &data, MDB_NEXT)) {
        /* As LMDB does: a head of 8 bytes, an index of 2, an even length. */
        bytes += 10 + ((k.mv_size + data.mv_size + 1) & ~(size_t)1);
        if (((const char *)k.mv_data)[0] != 'k')
            continue;
        struct lm_value v;
        assert_int_equal(lm_value_parse(&k, &data, &v), ST_OK);
        uint64_t start = space_unpack(get_le64(v.pieces)).start;
        seen.n_keys++;
        seen.n_bodies_after += start > before;
        before = start;
    }
    seen.fill = (double)bytes / ((double)stat.ms_leaf_pages * (stat.ms_psize - 16.0));
    mdb_cursor_close(c);
    mdb_txn_abort(txn);
    mdb_env_close(env);
    return seen;
}

static void test_pages_are_filled(void **state)
{
    struct test_store *t = *state;
    assert_int_equal(test_set(t, "a", "before all of them"), ST_OK);
    assert_int_equal(test_set(t, "z", "behind all of them"), ST_OK);
    for (unsigned i = 0; i < COMMITS; i++)
        set_keys(t, i, 1);
    expect_keys(t, COMMITS * KEYS);
    store_close(t->store);
    struct seen seen = look(t->dir);
    print_message("%.0f%% full, %u of %u bodies in order\n", seen.fill * 100, seen.n_bodies_after,
                  seen.n_keys);
    assert_int_equal(seen.n_keys, COMMITS * KEYS);
    assert_true(seen.fill > 0.85);
    assert_true(seen.n_bodies_after > seen.n_keys - seen.n_keys / 100);
    test_store_reopen(t);
    expect_keys(t, COMMITS * KEYS);
}

/* New keys between others, and keys that were there: what was set last is what is read. */
static void test_between_others(void **state)
{
    struct test_store *t = *state;
    set_keys(t, 0, 2);
    set_keys(t, 0, 1);
    expect_keys(t, KEYS);
    set_keys(t, 0, 1);
    set_keys(t, 1, 1);
    expect_keys(t, 2 * KEYS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_pages_are_filled, begin, test_end),
        cmocka_unit_test_setup_teardown(test_between_others, begin, test_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
