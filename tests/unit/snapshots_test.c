/* The snapshots of a volume in memory (volume/history.h). */
#include <stdio.h>

#include "test.h"

#include "volume/history.h"

static struct snapshot_record named(const char *name, bool removed)
{
    struct snapshot_record rec = {.removed = removed};
    snprintf(rec.name, sizeof rec.name, "%s", name);
    return rec;
}

static void add(struct history *h, uint64_t epoch, const char *name, bool removed)
{
    struct snapshot_record rec = named(name, removed);
    history_add(h, epoch, &rec);
}

static void no_snapshots(void **state)
{
    (void)state;
    struct history h = {0};
    assert_int_equal(history_newest_live(&h), 0);
    assert_int_equal(history_live_below(&h, 7), 0);
    assert_int_equal(history_live_at_or_above(&h, 0), 0);
    assert_null(history_find(&h, 1));
    assert_null(history_find_name(&h, "a"));
    history_forget(&h, 1);
    history_forget_all(&h);
}

static void neighbours_are_live_ones(void **state)
{
    (void)state;
    struct history h = {0};
    /* In any order, and as many as make the array grow. */
    for (uint64_t epoch = 99; epoch > 9; epoch -= 2)
        add(&h, epoch, "old", true);
    add(&h, 6, "c", false);
    add(&h, 2, "a", false);
    add(&h, 4, "b", true);
    add(&h, 8, "d", true);

    assert_int_equal(history_live_below(&h, 2), 0);
    assert_int_equal(history_live_below(&h, 3), 2);
    assert_int_equal(history_live_below(&h, 6), 2);
    assert_int_equal(history_live_below(&h, 7), 6);
    assert_int_equal(history_live_at_or_above(&h, 1), 2);
    assert_int_equal(history_live_at_or_above(&h, 2), 2);
    assert_int_equal(history_live_at_or_above(&h, 3), 6);
    assert_int_equal(history_live_at_or_above(&h, 7), 0);
    assert_int_equal(history_newest_live(&h), 6);

    assert_true(history_is_live(&h, 6));
    assert_false(history_is_live(&h, 4));
    assert_false(history_is_live(&h, 5));
    history_find(&h, 6)->rec.removed = 1;
    assert_false(history_is_live(&h, 6));
    assert_int_equal(history_newest_live(&h), 2);
    assert_int_equal(history_live_at_or_above(&h, 3), 0);

    history_forget(&h, 2);
    assert_null(history_find(&h, 2));
    assert_int_equal(history_newest_live(&h), 0);
    for (size_t i = 1; i < h.n; i++)
        assert_true(h.v[i - 1].epoch < h.v[i].epoch);
    assert_int_equal(h.n, 48);
    history_forget_all(&h);
    assert_int_equal(h.n, 0);
}

/* A removed snapshot's name is free for another one. */
static void names_are_of_live_ones(void **state)
{
    (void)state;
    struct history h = {0};
    add(&h, 3, "daily", true);
    assert_null(history_find_name(&h, "daily"));
    add(&h, 5, "daily", false);
    add(&h, 7, "daily2", false);
    assert_int_equal(history_find_name(&h, "daily")->epoch, 5);
    assert_int_equal(history_find(&h, 3)->epoch, 3);
    assert_null(history_find_name(&h, "dail"));
    history_forget_all(&h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_snapshots),
        cmocka_unit_test(neighbours_are_live_ones),
        cmocka_unit_test(names_are_of_live_ones),
    };
    return cmocka_run_group_tests_name("snapshots", tests, NULL, NULL);
}
