/* Index rows against a plain array, and refusal of everything that is not one (G5). */
#include "test.h"

#include "chance.h"
#include "base/hash.h"
#include "volume/keys.h"
#include "volume/rows.h"

struct plain {
    int fixed; /* -1: data */
    uint64_t branch, epoch;
};

static void assert_is(const struct row1 *row, const struct plain *model)
{
    uint32_t n_data = 0;
    bool uniform = true;
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        const struct row_source *s = row1_data(row, i);
        if (model[i].fixed < 0) {
            n_data++;
            assert_non_null(s);
            assert_true(s->branch == model[i].branch && s->epoch == model[i].epoch);
        } else {
            assert_null(s);
            assert_int_equal(row->source[i], model[i].fixed);
        }
        uniform = uniform && model[i].fixed == model[0].fixed;
    }
    assert_int_equal(row->n_data, n_data);
    assert_int_equal(row1_uniform(row), uniform && model[0].fixed >= 0 ? model[0].fixed : -1);
}

static void assert_round_trip(const struct row1 *row, const struct plain *model)
{
    static uint8_t bytes[ROW_BYTES_MAX], again[ROW_BYTES_MAX];
    struct key k, other;
    key_row(&k, 1, 1, 2, 3);
    key_row(&other, 1, 1, 2, 4);
    size_t len = row1_encode(row, key_slice(&k), bytes);
    assert_true(len <= sizeof bytes);
    struct row1 back;
    assert_true(row1_decode(&back, key_slice(&k), (struct slice){bytes, len}));
    assert_is(&back, model);
    assert_int_equal(row1_encode(&back, key_slice(&k), again), len);
    assert_memory_equal(bytes, again, len);
    row1_free(&back);
    assert_false(row1_decode(&back, key_slice(&other), (struct slice){bytes, len}));
    assert_int_equal(row1_uniform(&back), SOURCE_ABSENT);
    assert_null(back.sources);
}

static void rows_follow_a_plain_array(void **state)
{
    (void)state;
    struct chance c = chance_begin("rows");
    for (int round = 0; round < 30; round++) {
        static struct plain model[INDEX_FANOUT];
        memset(model, 0, sizeof model);
        struct row1 row;
        row1_init(&row);
        assert_is(&row, model);
        /* From few sources that come back to one never seen before each time. */
        uint64_t variety = 1 + chance_wide(&c) % 100000;
        int steps = 200 + (int)chance_below(&c, 6000);
        for (int step = 0; step < steps; step++) {
            unsigned first = (unsigned)chance_below(&c, INDEX_FANOUT);
            if (chance_below(&c, 20) == 0) {
                unsigned end = first + (unsigned)chance_below(&c, INDEX_FANOUT - first + 1);
                uint16_t fixed = (uint16_t)chance_below(&c, 3);
                row1_fill(&row, first, end, fixed);
                for (unsigned i = first; i < end; i++)
                    model[i] = (struct plain){.fixed = fixed};
                continue;
            }
            uint64_t branch = 1 + chance_below(&c, 3), epoch = chance_below(&c, variety);
            unsigned end = first + 1 + (unsigned)chance_below(&c, 8);
            for (unsigned i = first; i < end && i < INDEX_FANOUT; i++) {
                struct plain want = {-1, branch, epoch};
                bool same =
                    model[i].fixed == -1 && model[i].branch == branch && model[i].epoch == epoch;
                assert_int_equal(row1_set_data(&row, i, branch, epoch), !same);
                model[i] = want;
            }
            if (step % 500 == 0)
                assert_round_trip(&row, model);
        }
        assert_is(&row, model);
        assert_round_trip(&row, model);
        assert_true(row.n_sources <= 2 * INDEX_FANOUT);
        row1_fill(&row, 0, INDEX_FANOUT, SOURCE_HOLE);
        assert_int_equal(row1_uniform(&row), SOURCE_HOLE);
        assert_int_equal(row.n_data, 0);
        row1_free(&row);
    }
}

/* Overwriting one block in every epoch must not let the table grow with the history. */
static void stale_sources_go_away(void **state)
{
    (void)state;
    struct row1 row;
    row1_init(&row);
    for (uint64_t epoch = 1; epoch <= 100000; epoch++)
        assert_true(row1_set_data(&row, (unsigned)(epoch % 7), 1, epoch));
    assert_true(row.n_sources <= 128 && row.cap_sources <= 128);
    assert_int_equal(row.n_data, 7);
    for (unsigned i = 0; i < 7; i++)
        assert_int_equal(row1_data(&row, i)->epoch % 7, i);
    row1_free(&row);
}

static void the_largest_row_fits(void **state)
{
    (void)state;
    static struct plain model[INDEX_FANOUT];
    struct row1 row;
    row1_init(&row);
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        model[i] = (struct plain){-1, UINT64_MAX, UINT64_MAX - i};
        row1_set_data(&row, i, UINT64_MAX, UINT64_MAX - i);
    }
    assert_round_trip(&row, model);
    /* A full table whose every entry is replaced, again and again. */
    struct row1 back;
    static uint8_t bytes[ROW_BYTES_MAX];
    struct key k;
    key_row(&k, 1, 1, 0, 1);
    size_t len = row1_encode(&row, key_slice(&k), bytes);
    assert_true(row1_decode(&back, key_slice(&k), (struct slice){bytes, len}));
    for (uint64_t n = 0; n < 5 * INDEX_FANOUT; n++) {
        unsigned i = (unsigned)(n % INDEX_FANOUT);
        model[i] = (struct plain){-1, 1, n};
        row1_set_data(&back, i, 1, n);
    }
    assert_is(&back, model);
    row1_free(&back);
    row1_free(&row);

    static struct row2 row2, back2;
    row2_init(&row2);
    for (unsigned i = 0; i < INDEX_FANOUT; i++)
        row2.entry[i] = (struct row2_entry){UINT64_MAX - i, INDEX_FANOUT, ROW2_ROW, UINT64_MAX - i % 2};
    len = row2_encode(&row2, key_slice(&k), bytes);
    assert_true(row2_decode(&back2, key_slice(&k), (struct slice){bytes, len}));
    assert_int_equal(row2_n_data(&back2), INDEX_FANOUT * INDEX_FANOUT);
}

static void level_2_round_trip(void **state)
{
    (void)state;
    struct chance c = chance_begin("level 2");
    struct key k;
    for (int round = 0; round < 300; round++) {
        static struct row2 row, back;
        static uint8_t bytes[ROW_BYTES_MAX], again[ROW_BYTES_MAX];
        row2_init(&row);
        uint64_t n_data = 0, runs = chance_below(&c, 2000);
        for (uint64_t n = 0; n < runs; n++) {
            unsigned first = (unsigned)chance_below(&c, INDEX_FANOUT);
            unsigned end = first + 1 + (unsigned)chance_below(&c, 9);
            struct row2_entry e = {.kind = (uint8_t)chance_below(&c, 4)};
            if (e.kind == ROW2_ROW) {
                e.epoch = chance_wide(&c);
                e.n_data = (uint16_t)chance_below(&c, INDEX_FANOUT + 1);
                e.branch = round % 2 ? chance_wide(&c) : 0;
            }
            for (unsigned i = first; i < end && i < INDEX_FANOUT; i++)
                row.entry[i] = e;
        }
        for (unsigned i = 0; i < INDEX_FANOUT; i++)
            n_data += row.entry[i].n_data;
        assert_int_equal(row2_n_data(&row), n_data);
        key_row(&k, 1, 2, (uint64_t)round, 1);
        size_t len = row2_encode(&row, key_slice(&k), bytes);
        assert_true(row2_decode(&back, key_slice(&k), (struct slice){bytes, len}));
        for (unsigned i = 0; i < INDEX_FANOUT; i++) {
            assert_int_equal(back.entry[i].kind, row.entry[i].kind);
            assert_int_equal(back.entry[i].epoch, row.entry[i].epoch);
            assert_int_equal(back.entry[i].n_data, row.entry[i].n_data);
            assert_int_equal(back.entry[i].branch, row.entry[i].branch);
        }
        assert_int_equal(row2_encode(&back, key_slice(&k), again), len);
        assert_memory_equal(bytes, again, len);
        key_row(&k, 1, 2, (uint64_t)round + 1, 1);
        assert_false(row2_decode(&back, key_slice(&k), (struct slice){bytes, len}));
        assert_int_equal(row2_n_data(&back), 0);
    }
}

static bool row1_decodes(struct slice key, struct slice bytes)
{
    struct row1 row;
    bool ok = row1_decode(&row, key, bytes);
    if (!ok) {
        assert_null(row.sources);
        assert_int_equal(row1_uniform(&row), SOURCE_ABSENT);
    }
    row1_free(&row);
    return ok;
}

static bool row2_decodes(struct slice key, struct slice bytes)
{
    static struct row2 row;
    return row2_decode(&row, key, bytes);
}

static void cut_and_flipped_rows_are_refused(void **state)
{
    (void)state;
    struct chance c = chance_begin("hostile rows");
    static uint8_t bytes[ROW_BYTES_MAX];
    struct key k;
    struct row1 row;
    static struct row2 row2;
    row1_init(&row);
    row2_init(&row2);
    for (unsigned i = 0; i < 40; i++) {
        row1_set_data(&row, (unsigned)chance_below(&c, INDEX_FANOUT), 1, chance_below(&c, 9));
        row2.entry[chance_below(&c, INDEX_FANOUT)] =
            (struct row2_entry){chance_wide(&c), 17, ROW2_ROW, 0};
    }
    for (unsigned level = 1; level <= 2; level++) {
        key_row(&k, 9, level, 0, 2);
        size_t len = level == 1 ? row1_encode(&row, key_slice(&k), bytes)
                                : row2_encode(&row2, key_slice(&k), bytes);
        bool (*decodes)(struct slice, struct slice) = level == 1 ? row1_decodes : row2_decodes;
        assert_true(decodes(key_slice(&k), (struct slice){bytes, len}));
        for (size_t cut = 0; cut < len; cut++) {
            uint8_t *shorter = malloc(cut ? cut : 1);
            assert_non_null(shorter);
            memcpy(shorter, bytes, cut);
            assert_false(decodes(key_slice(&k), (struct slice){shorter, cut}));
            free(shorter);
        }
        for (size_t bit = 0; bit < len * 8; bit++) {
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            assert_false(decodes(key_slice(&k), (struct slice){bytes, len}));
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        }
        assert_false(decodes(key_slice(&k), (struct slice){bytes, ROW_BYTES_MAX + 1}));
    }
    row1_free(&row);
}

static struct slice sealed(const struct key *k, uint8_t *bytes, size_t len)
{
    put_le64(bytes + len, hash64(bytes, len, hash64(k->bytes, k->len, 0)));
    return (struct slice){bytes, len + 8};
}

/* Behind a right hash anything is still bounded: rows changed at random and sealed again
 * either are refused, or are rows that encode to the same bytes. */
static void sealed_nonsense_is_refused_or_canonical(void **state)
{
    (void)state;
    struct chance c = chance_begin("sealed rows");
    struct key k;
    key_row(&k, 1, 1, 1, 1);
    static uint8_t good[ROW_BYTES_MAX], bad[ROW_BYTES_MAX + 8], again[ROW_BYTES_MAX];
    struct row1 row, back;
    static struct row2 row2, back2;
    row1_init(&row);
    row2_init(&row2);
    for (unsigned i = 0; i < 100; i++) {
        row1_set_data(&row, (unsigned)chance_below(&c, INDEX_FANOUT), 1, chance_below(&c, 5));
        row2.entry[chance_below(&c, INDEX_FANOUT)] =
            (struct row2_entry){chance_below(&c, 3), 17, ROW2_ROW, 0};
    }
    for (int i = 0; i < 40000; i++) {
        bool level_1 = chance_below(&c, 2) == 0;
        size_t len = (level_1 ? row1_encode(&row, key_slice(&k), good)
                              : row2_encode(&row2, key_slice(&k), good)) -
                     8;
        memcpy(bad, good, len);
        for (uint64_t n = 1 + chance_below(&c, 3); n > 0; n--)
            bad[chance_below(&c, len)] = (uint8_t)chance_u64(&c);
        if (chance_below(&c, 4) == 0)
            len = chance_below(&c, len);
        struct slice bytes = sealed(&k, bad, len);
        if (level_1 && row1_decode(&back, key_slice(&k), bytes)) {
            assert_int_equal(row1_encode(&back, key_slice(&k), again), bytes.len);
            assert_memory_equal(again, bad, bytes.len);
            row1_free(&back);
        }
        if (!level_1 && row2_decode(&back2, key_slice(&k), bytes)) {
            assert_int_equal(row2_encode(&back2, key_slice(&k), again), bytes.len);
            assert_memory_equal(again, bad, bytes.len);
        }
    }
    row1_free(&row);
}

/* Random rows of every make, and the longest there can be, stay below what is said of them. */
static void no_row_is_longer_than_its_bound(void **state)
{
    (void)state;
    struct chance c = chance_begin("row bounds");
    static uint8_t out[ROW_BYTES_MAX];
    static struct row2 row2;
    struct key k;
    for (unsigned round = 0; round < 400; round++) {
        struct row1 row;
        unsigned n = 1 + (unsigned)chance_below(&c, round % 2 ? 3 : INDEX_FANOUT);
        bool longest = round % 8 < 2;
        if (round == 0)
            n = INDEX_FANOUT;
        row1_init(&row);
        for (unsigned i = 0; i < INDEX_FANOUT; i++)
            if (longest || chance_below(&c, 3))
                row1_set_data(&row, i, UINT64_MAX - (longest ? i % n : chance_below(&c, n)),
                              UINT64_MAX);
        key_row(&k, 1, 1, round, 1);
        size_t len = row1_encode(&row, key_slice(&k), out);
        assert_true(len <= row1_bytes_max(n));
        if (longest && n == INDEX_FANOUT)
            assert_true(len + 126 > row1_bytes_max(n));
        row1_free(&row);

        uint64_t epoch = chance_u64(&c) >> chance_below(&c, 64);
        for (unsigned i = 0; i < INDEX_FANOUT; i++)
            row2.entry[i] =
                (struct row2_entry){.kind = longest ? ROW2_ROW : (uint8_t)chance_below(&c, 4),
                                    .epoch = epoch,
                                    .n_data = (uint16_t)(INDEX_FANOUT - i % 2)};
        len = row2_encode(&row2, key_slice(&k), out);
        assert_true(len <= row2_bytes_max(epoch, 0));
        if (longest)
            assert_int_equal(len, row2_bytes_max(epoch, 0));
    }
    assert_true(row1_bytes_max(INDEX_FANOUT) <= ROW_BYTES_MAX);
    assert_true(row2_bytes_max(UINT64_MAX, UINT64_MAX) <= ROW_BYTES_MAX);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_follow_a_plain_array),
        cmocka_unit_test(stale_sources_go_away),
        cmocka_unit_test(the_largest_row_fits),
        cmocka_unit_test(level_2_round_trip),
        cmocka_unit_test(no_row_is_longer_than_its_bound),
        cmocka_unit_test(cut_and_flipped_rows_are_refused),
        cmocka_unit_test(sealed_nonsense_is_refused_or_canonical),
    };
    return cmocka_run_group_tests_name("rows", tests, NULL, NULL);
}
