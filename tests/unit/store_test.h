/*
 * What the tests of the embedded store share: a fresh folder, and commits,
 * reads and reservations that wait for their answer.
 */
#ifndef TESTS_STORE_TEST_H
#define TESTS_STORE_TEST_H

#include <ftw.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "test.h"

#include "base/bytes.h"
#include "base/mem.h"
#include "chance.h"
#include "env_test.h"
#include "store/log.h"
#include "store/store.h"

#define LEASE_MS 1000u

static inline struct slice text(const char *s)
{
    return (struct slice){s, strlen(s)};
}

static inline int test_unlink(const char *path, const struct stat *sb, int flag, struct FTW *ftw)
{
    (void)sb;
    (void)flag;
    (void)ftw;
    return remove(path);
}

static inline void test_folder_remove(const char *dir)
{
    nftw(dir, test_unlink, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

struct test_store {
    struct test_env env;
    struct store *store;
    bool own_cache; /* see store_options */
    char dir[200], uri[220];
};

static inline void test_store_reopen(struct test_store *t)
{
    struct err e = {0};
    struct store_options options = {
        .flags = STORE_CREATE, .lease_ms = LEASE_MS, .own_cache = t->own_cache};
    enum status st = store_open(t->uri, &options, &t->store, &e);
    if (st)
        fail_msg("store_open: %s: %s", status_text(st), e.text);
}

/* A store in a new folder below `base` (NULL: TMPDIR or /tmp). */
static inline void test_store_begin(struct test_store *t, const char *base)
{
    if (!base)
        base = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    snprintf(t->dir, sizeof t->dir, "%s/store-test-XXXXXX", base);
    assert_non_null(mkdtemp(t->dir));
    snprintf(t->uri, sizeof t->uri, "lmdb:%s", t->dir);
    test_env_start(&t->env);
    test_store_reopen(t);
}

static inline void test_store_end(struct test_store *t)
{
    if (t->store)
        store_close(t->store);
    t->store = NULL;
    test_env_stop(&t->env);
    test_folder_remove(t->dir);
}

/* For tests whose state is a store in a new folder. */
static inline int test_begin(void **state, bool own_cache)
{
    struct test_store *t = mem_zalloc(sizeof *t);
    t->own_cache = own_cache;
    test_store_begin(t, NULL);
    *state = t;
    return 0;
}

static inline int test_end(void **state)
{
    test_store_end(*state);
    free(*state);
    return 0;
}

struct test_commit {
    struct store_commit commit;
    bool done;
    enum status st;
};

static inline void test_commit_done(struct store_commit *commit, enum status st)
{
    struct test_commit *c = container_of(commit, struct test_commit, commit);
    c->done = true;
    c->st = st;
}

static inline void test_commit_start(struct test_store *t, struct test_commit *c)
{
    c->done = false;
    c->commit.done = test_commit_done;
    store_commit(t->store, &t->env.env, &c->commit);
}

static inline enum status test_commit(struct test_store *t, const struct store_check *checks,
                                      size_t n_checks, const struct store_mutation *mutations,
                                      size_t n_mutations)
{
    struct test_commit c = {.commit = {.checks = checks,
                                       .n_checks = n_checks,
                                       .mutations = mutations,
                                       .n_mutations = n_mutations}};
    test_commit_start(t, &c);
    test_env_until(&t->env, &c.done);
    return c.st;
}

static inline enum status test_set(struct test_store *t, const char *key, const char *head)
{
    struct store_mutation m = {.kind = STORE_SET, .key = text(key), .head = text(head)};
    return test_commit(t, NULL, 0, &m, 1);
}

struct test_read {
    struct store_read read;
    bool done;
    enum status st;
};

static inline void test_read_done(struct store_read *read, enum status st)
{
    struct test_read *r = container_of(read, struct test_read, read);
    r->done = true;
    r->st = st;
}

/* The caller releases. */
static inline enum status test_read(struct test_store *t, struct test_read *r)
{
    r->done = false;
    r->read.done = test_read_done;
    store_read(t->store, &t->env.env, &r->read);
    test_env_until(&t->env, &r->done);
    return r->st;
}

/* Compares the head of `key` with `head` (NULL: the key must be absent). */
static inline void test_expect(struct test_store *t, const char *key, const char *head)
{
    struct store_get get = {.key = text(key)};
    struct test_read r = {.read = {.gets = &get, .n_gets = 1}};
    assert_int_equal(test_read(t, &r), ST_OK);
    if (head) {
        assert_int_equal(get.st, ST_OK);
        assert_int_equal(get.head.len, strlen(head));
        assert_memory_equal(get.head.data, head, strlen(head));
    } else {
        assert_int_equal(get.st, ST_NOTFOUND);
    }
    store_read_release(&r.read);
}

struct test_wait {
    struct store_reserve_wait wait;
    bool done;
    enum status st;
};

static inline void test_wait_done(struct store_reserve_wait *wait, enum status st)
{
    struct test_wait *w = container_of(wait, struct test_wait, wait);
    w->done = true;
    w->st = st;
}

/* Reserves at once or by waiting. */
static inline enum status test_reserve(struct test_store *t, uint64_t body_bytes, uint64_t keys)
{
    struct store_reservation want = {body_bytes, keys};
    if (store_reserve(t->store, want))
        return ST_OK;
    struct test_wait w = {.wait = {.want = want, .done = test_wait_done}};
    store_reserve_wait(t->store, &t->env.env, &w.wait);
    test_env_until(&t->env, &w.done);
    return w.st;
}

#endif
