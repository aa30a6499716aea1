/*
 * Pages of the index that are looked up ahead of the commit thread (store/lmdb/warm.c): begun
 * after a transaction that waited for pages, ended after one that did not. The double is this
 * program's own getrusage, which tells how often a thread waited for a page.
 */
#include <stdatomic.h>
#include <sys/resource.h>

#include "double.h"
#include "store_test.h"

#define KEYS 4000u
#define TRIES 1000

static _Atomic long faults_each_time; /* by which the answer grows each time a thread asks */
static _Atomic bool known;            /* the first that asked is the commit thread */
static _Atomic unsigned n_by_others;

int getrusage(__rusage_who_t who, struct rusage *usage)
{
    int (*real_getrusage)(__rusage_who_t, struct rusage *);
    static __thread long faults;
    static __thread bool is_commit_thread;
    real("getrusage", &real_getrusage);
    int rc = real_getrusage(who, usage);
    if (who != RUSAGE_THREAD)
        return rc;
    if (!atomic_exchange(&known, true))
        is_commit_thread = true;
    n_by_others += !is_commit_thread;
    usage->ru_majflt = faults += faults_each_time;
    return rc;
}

static int begin(void **state)
{
    faults_each_time = 0;
    known = false;
    n_by_others = 0;
    return test_begin(state, false);
}

static void set_all(struct test_store *t, const char *head)
{
    static struct store_mutation m[KEYS + 1];
    static char names[KEYS][8];
    for (unsigned i = 0; i < KEYS; i++) {
        snprintf(names[i], sizeof names[i], "k%05u", i);
        m[i] = (struct store_mutation){STORE_SET, text(names[i]), text(head), {0}};
    }
    /* A range may begin before all keys. */
    m[KEYS] = (struct store_mutation){STORE_CLEAR_RANGE, text(""), text("a"), {0}};
    assert_int_equal(test_commit(t, NULL, 0, m, KEYS + 1), ST_OK);
    test_expect(t, "k00000", head);
    test_expect(t, "k03999", head);
}

static void test_transactions_that_wait_are_helped(void **state)
{
    struct test_store *t = *state;
    set_all(t, "without");
    set_all(t, "waits");
    assert_int_equal(n_by_others, 0);

    faults_each_time = 1000;
    set_all(t, "the first that waits");
    assert_int_equal(n_by_others, 0);
    for (int i = 0; i < TRIES && !n_by_others; i++)
        set_all(t, i % 2 ? "odd" : "even");
    assert_true(n_by_others > 0);

    faults_each_time = 0;
    set_all(t, "helped for the last time");
    n_by_others = 0;
    set_all(t, "no");
    set_all(t, "more");
    assert_int_equal(n_by_others, 0);
}

/* A small one in between neither begins nor ends it. */
static void test_small_transactions_do_not_count(void **state)
{
    struct test_store *t = *state;
    faults_each_time = 1000;
    assert_int_equal(test_set(t, "k", "1"), ST_OK);
    faults_each_time = 0;
    set_all(t, "not helped");
    assert_int_equal(n_by_others, 0);

    for (int i = 0; i < TRIES && !n_by_others; i++) {
        faults_each_time = 1000;
        set_all(t, "waits");
        faults_each_time = 0;
        assert_int_equal(test_set(t, "k", "2"), ST_OK);
        n_by_others = 0;
        set_all(t, "helped");
    }
    assert_true(n_by_others > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_transactions_that_wait_are_helped, begin, test_end),
        cmocka_unit_test_setup_teardown(test_small_transactions_do_not_count, begin, test_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
