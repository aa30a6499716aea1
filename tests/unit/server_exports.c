/* Who may write to an export: the rules at the head of server/exports.h. */
#include "test.h"

#include "server/exports.h"

struct client {
    struct export_client base;
    bool busy;
};

static struct list exports;
static uint64_t now_ms;

static bool is_busy(struct export_client *base)
{
    return container_of(base, struct client, base)->busy;
}

static void enter(struct client *c, const char *host)
{
    *c = (struct client){.base = {.host = host, .is_busy = is_busy}};
    export_join(&exports, 7, 0, "v", false, &c->base);
}

static void leave(struct client *c)
{
    export_leave(&c->base);
}

static enum export_claim claim(struct client *c)
{
    return export_claim(&c->base, now_ms);
}

/* As a connection does: what is not mixed is not told. */
static void asks(struct client *c, enum export_request kind)
{
    if (c->base.export->mixed)
        export_took(&c->base, kind, !c->busy);
    c->busy = true;
}

static void gets(struct client *c, enum export_request kind, bool success)
{
    if (c->base.export->mixed && kind != EXPORT_OTHER)
        export_answered(&c->base, success, now_ms);
    c->busy = false;
}

static void does(struct client *c, enum export_request kind)
{
    asks(c, kind);
    now_ms++;
    gets(c, kind, true);
}

static int begin(void **state)
{
    (void)state;
    list_init(&exports);
    now_ms = 1000000;
    return 0;
}

static int end(void **state)
{
    (void)state;
    return !list_empty(&exports);
}

static void first_host_writes_until_its_writers_left(void **state)
{
    (void)state;
    struct client a, a2, b, a3;
    enter(&a, "A");
    enter(&a2, "A");
    enter(&b, "B");
    assert_int_equal(claim(&a), CLAIM_YES);
    assert_int_equal(claim(&a2), CLAIM_YES);
    assert_int_equal(claim(&b), CLAIM_WAIT);
    assert_non_null(strstr(b.base.refusal, "written by A"));
    leave(&a);
    assert_int_equal(claim(&b), CLAIM_WAIT);
    leave(&a2);
    enter(&a3, "A"); /* it has not written */
    assert_int_equal(claim(&b), CLAIM_YES);
    assert_int_equal(claim(&a3), CLAIM_WAIT);
    leave(&b);
    assert_int_equal(claim(&a3), CLAIM_YES);
    leave(&a3);
}

/* A migration: in at any time before the last flush, and 100 ms after it. */
static void role_moves_after_a_flush(void **state)
{
    (void)state;
    struct client a, a2, b, c, late, again;
    enter(&a, "A");
    assert_int_equal(claim(&a), CLAIM_YES);
    enter(&a2, "A");
    does(&a, EXPORT_CHANGE);
    enter(&b, "B");
    enter(&c, "B");
    does(&b, EXPORT_OTHER);
    does(&a, EXPORT_FLUSH);
    does(&b, EXPORT_OTHER); /* the silence of others does not matter */
    now_ms += EXPORT_QUIET_MS - 2;
    assert_int_equal(claim(&b), CLAIM_WAIT);
    now_ms++;
    enter(&late, "B");
    assert_int_equal(claim(&late), CLAIM_WAIT);
    leave(&late);
    assert_int_equal(claim(&b), CLAIM_YES);
    assert_int_equal(claim(&c), CLAIM_YES);
    /* Those of the first host are out, the ones that never wrote too. */
    assert_int_equal(claim(&a), CLAIM_NO);
    assert_int_equal(claim(&a2), CLAIM_NO);
    assert_non_null(strstr(a.base.refusal, "B writes this volume"));
    enter(&again, "A");
    assert_int_equal(claim(&again), CLAIM_WAIT);
    leave(&b);
    leave(&c);
    assert_int_equal(claim(&again), CLAIM_YES);
    assert_int_equal(claim(&a), CLAIM_NO);
    leave(&a);
    leave(&a2);
    leave(&again);
}

static void role_moves_back(void **state)
{
    (void)state;
    struct client a, b;
    enter(&a, "A");
    assert_int_equal(claim(&a), CLAIM_YES);
    enter(&b, "B");
    does(&a, EXPORT_FLUSH);
    now_ms += EXPORT_QUIET_MS;
    assert_int_equal(claim(&b), CLAIM_YES);
    leave(&a);
    enter(&a, "A");
    does(&b, EXPORT_CHANGE);
    does(&b, EXPORT_FLUSH);
    now_ms += EXPORT_QUIET_MS;
    assert_int_equal(claim(&a), CLAIM_YES);
    assert_int_equal(claim(&b), CLAIM_NO);
    leave(&a);
    leave(&b);
}

/* Each of these leaves something open; a flush makes it good. */
static void role_stays(void **state)
{
    (void)state;
    struct client a, a2, b;
    for (unsigned what = 0; what < 9; what++) {
        enter(&a, "A");
        enter(&a2, "A");
        assert_int_equal(claim(&a), CLAIM_YES);
        if (what == 0)
            does(&a, EXPORT_FLUSH); /* it was not there yet */
        enter(&b, "B");
        switch (what) {
        case 1: /* a change behind it */
            does(&a, EXPORT_FLUSH);
            does(&a, EXPORT_CHANGE);
            break;
        case 2: /* a read behind it */
            does(&a, EXPORT_FLUSH);
            does(&a, EXPORT_OTHER);
            break;
        case 3: /* ... on another connection */
            does(&a, EXPORT_FLUSH);
            does(&a2, EXPORT_OTHER);
            break;
        case 4: /* it failed */
            asks(&a, EXPORT_FLUSH);
            gets(&a, EXPORT_FLUSH, false);
            break;
        case 5: /* it is under way */
            asks(&a, EXPORT_FLUSH);
            break;
        case 6: /* a write was under way when it was asked for */
            asks(&a2, EXPORT_CHANGE);
            does(&a, EXPORT_FLUSH);
            gets(&a2, EXPORT_CHANGE, true);
            break;
        case 7: /* the next request is on its way in */
            does(&a, EXPORT_FLUSH);
            a2.busy = true;
            break;
        case 8: /* only the last write is covered */
            does(&a, EXPORT_CHANGE);
            does(&a, EXPORT_CHANGE_FUA);
            break;
        }
        now_ms += 100000;
        if (claim(&b) != CLAIM_WAIT)
            fail_msg("case %u: it may write\n", what);
        a.busy = a2.busy = false;
        does(&a, EXPORT_FLUSH);
        now_ms += EXPORT_QUIET_MS;
        assert_int_equal(claim(&b), CLAIM_YES);
        leave(&a);
        leave(&a2);
        leave(&b);
    }
}

static void role_moves_after_a_write_with_fua(void **state)
{
    (void)state;
    struct client a, b;
    enter(&a, "A");
    assert_int_equal(claim(&a), CLAIM_YES);
    enter(&b, "B");
    does(&a, EXPORT_CHANGE);
    does(&a, EXPORT_FLUSH);
    does(&a, EXPORT_CHANGE_FUA);
    now_ms += EXPORT_QUIET_MS;
    assert_int_equal(claim(&b), CLAIM_YES);
    leave(&a);
    leave(&b);
}

static void shared_exports_have_no_rules(void **state)
{
    (void)state;
    struct client a = {.base = {.host = "A", .is_busy = is_busy}};
    struct client b = {.base = {.host = "B", .is_busy = is_busy}};
    export_join(&exports, 7, 0, "v", true, &a.base);
    export_join(&exports, 7, 0, "v", true, &b.base);
    assert_false(a.base.export->mixed);
    assert_int_equal(claim(&a), CLAIM_YES);
    assert_int_equal(claim(&b), CLAIM_YES);
    leave(&a);
    leave(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(first_host_writes_until_its_writers_left, begin, end),
        cmocka_unit_test_setup_teardown(role_moves_after_a_flush, begin, end),
        cmocka_unit_test_setup_teardown(role_moves_back, begin, end),
        cmocka_unit_test_setup_teardown(role_stays, begin, end),
        cmocka_unit_test_setup_teardown(role_moves_after_a_write_with_fua, begin, end),
        cmocka_unit_test_setup_teardown(shared_exports_have_no_rules, begin, end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
