/*
 * A store in memory and an environment with a clock of its own, for unit tests of what is
 * built on store.h: everything happens when the test turns the crank, in the order started.
 * Heads only.
 */
#ifndef TESTS_UNIT_MEMORY_STORE_H
#define TESTS_UNIT_MEMORY_STORE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"
#include "chance.h"
#include "store/store.h"

struct memory_pair {
    uint8_t *key, *value;
    size_t key_len, value_len;
};

struct memory_store {
    struct store store; /* first: what the engine's functions are given */
    struct env env;
    struct chance chance;
    uint64_t now_ns;
    struct env_task *first_task, **last_task;
    struct list timers, watches;
    struct memory_pair *pairs; /* sorted */
    size_t n_pairs, cap_pairs;
    /* What the test wants to go wrong or be so. */
    unsigned conflicts;      /* so many commits fail their checks */
    enum status read_status; /* reads give this */
    enum store_liveness probe;
    void (*before_commit)(struct memory_store *m); /* called once before the next commit */
    unsigned commits;                              /* that went through */
};

static inline struct memory_store *memory_of(struct store *store)
{
    return container_of(store, struct memory_store, store);
}

static int memory_compare(const uint8_t *a, size_t a_len, const uint8_t *b, size_t b_len)
{
    int c = memcmp(a, b, a_len < b_len ? a_len : b_len);
    return c ? c : a_len < b_len ? -1 : a_len > b_len;
}

/* Index of the first pair not before `key`. */
static size_t memory_lower(const struct memory_store *m, struct slice key)
{
    size_t low = 0, high = m->n_pairs;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (memory_compare(m->pairs[mid].key, m->pairs[mid].key_len, key.data, key.len) < 0)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static struct memory_pair *memory_find(const struct memory_store *m, struct slice key)
{
    size_t i = memory_lower(m, key);
    if (i == m->n_pairs ||
        memory_compare(m->pairs[i].key, m->pairs[i].key_len, key.data, key.len) != 0)
        return NULL;
    return &m->pairs[i];
}

static void memory_clear_range(struct memory_store *m, size_t first, size_t end)
{
    for (size_t i = first; i < end; i++) {
        free(m->pairs[i].key);
        free(m->pairs[i].value);
    }
    if (first < end)
        memmove(m->pairs + first, m->pairs + end, (m->n_pairs - end) * sizeof *m->pairs);
    m->n_pairs -= end - first;
}

static void memory_set(struct memory_store *m, struct slice key, struct slice value)
{
    struct memory_pair *p = memory_find(m, key);
    if (p) {
        free(p->value);
    } else {
        size_t i = memory_lower(m, key);
        mem_grow(&m->pairs, &m->cap_pairs, m->n_pairs + 1, sizeof *m->pairs);
        p = &m->pairs[i];
        memmove(p + 1, p, (m->n_pairs++ - i) * sizeof *p);
        p->key = mem_alloc(key.len);
        memcpy(p->key, key.data, key.len);
        p->key_len = key.len;
    }
    p->value = mem_alloc(value.len);
    if (value.len)
        memcpy(p->value, value.data, value.len);
    p->value_len = value.len;
}

static void memory_post(struct env *env, struct env_task *task)
{
    struct memory_store *m = container_of(env, struct memory_store, env);
    task->next = NULL;
    *m->last_task = task;
    m->last_task = &task->next;
}

static uint64_t memory_now(struct env *env)
{
    return container_of(env, struct memory_store, env)->now_ns;
}

static void memory_timer_stop(struct env *env, struct env_timer *timer)
{
    (void)env;
    if (timer->link.next)
        list_remove(&timer->link);
    timer->link.next = timer->link.prev = NULL;
}

static void memory_timer_start(struct env *env, struct env_timer *timer, uint64_t delay_ms)
{
    struct memory_store *m = container_of(env, struct memory_store, env);
    memory_timer_stop(env, timer);
    timer->due_ns = m->now_ns + delay_ms * 1000000u;
    list_add_tail(&m->timers, &timer->link);
}

static void memory_random(struct env *env, void *out, size_t len)
{
    chance_fill(&container_of(env, struct memory_store, env)->chance, out, len);
}

static struct slice memory_copy(const void *data, size_t len)
{
    void *copy = mem_alloc(len);
    if (len)
        memcpy(copy, data, len);
    return (struct slice){copy, len};
}

static void memory_free_slice(struct slice s)
{
    free((void *)(uintptr_t)s.data);
}

static void memory_read_done(struct env_work *work)
{
    struct store_read *read = container_of(work, struct store_read, work);
    read->done(read, read->result);
}

/* A worker's `done` without a worker. */
struct memory_turn {
    struct env_task task;
    struct env_work *work;
};

static void memory_turned(struct env_task *task)
{
    struct memory_turn *t = container_of(task, struct memory_turn, task);
    struct env_work *work = t->work;
    free(t);
    work->done(work);
}

static void memory_read(struct store *store, struct env *env, struct store_read *read)
{
    struct memory_store *m = memory_of(store);
    read->store = store;
    read->result = m->read_status;
    for (uint32_t i = 0; i < read->n_gets; i++) {
        struct store_get *g = &read->gets[i];
        const struct memory_pair *p = memory_find(m, g->key);
        g->st = p ? ST_OK : ST_NOTFOUND;
        g->head = p ? memory_copy(p->value, p->value_len) : (struct slice){NULL, 0};
        g->body_len = 0;
    }
    for (uint32_t i = 0; i < read->n_ranges; i++) {
        struct store_range *r = &read->ranges[i];
        size_t first = memory_lower(m, r->begin), end = memory_lower(m, r->end);
        CHECK(!r->reverse && r->limit > 0);
        size_t n = end > first ? end - first : 0;
        r->more = n > r->limit;
        r->n_pairs = r->more ? r->limit : (uint32_t)n;
        r->pairs = mem_zalloc(r->n_pairs * sizeof *r->pairs);
        for (uint32_t k = 0; k < r->n_pairs; k++) {
            const struct memory_pair *p = &m->pairs[first + k];
            r->pairs[k].key = memory_copy(p->key, p->key_len);
            r->pairs[k].head = memory_copy(p->value, p->value_len);
        }
    }
    read->work.done = memory_read_done;
    struct memory_turn *turn = mem_zalloc(sizeof *turn);
    turn->task.run = memory_turned;
    turn->work = &read->work;
    env_post(env, &turn->task);
}

static void memory_read_release(struct store_read *read)
{
    for (uint32_t i = 0; i < read->n_gets; i++)
        memory_free_slice(read->gets[i].head);
    for (uint32_t i = 0; i < read->n_ranges; i++) {
        for (uint32_t k = 0; k < read->ranges[i].n_pairs; k++) {
            memory_free_slice(read->ranges[i].pairs[k].key);
            memory_free_slice(read->ranges[i].pairs[k].head);
        }
        free(read->ranges[i].pairs);
    }
}

static bool memory_check_holds(const struct memory_store *m, const struct store_check *c)
{
    const struct memory_pair *p = memory_find(m, c->key);
    switch (c->kind) {
    case STORE_CHECK_VALUE:
        return p && p->value_len == c->value.len &&
               memcmp(p->value, c->value.data, c->value.len) == 0;
    case STORE_CHECK_ABSENT:
        return !p;
    case STORE_CHECK_EMPTY:
        break;
    }
    return memory_lower(m, c->key) == memory_lower(m, c->value);
}

static void memory_watch_fired(struct env_task *task)
{
    struct store_watch *w = container_of(task, struct store_watch, task);
    if (w->state == 2)
        w->fired(w);
}

/* All watches of the key fire, whether or not its value changed. */
static void memory_wake(struct memory_store *m, struct slice key)
{
    list_for_each_safe (l, tmp, &m->watches) {
        struct store_watch *w = container_of(l, struct store_watch, link);
        if (memory_compare(w->key.data, w->key.len, key.data, key.len) != 0)
            continue;
        list_remove(&w->link);
        w->state = 2;
        w->task.run = memory_watch_fired;
        env_post(w->env, &w->task);
    }
}

static void memory_commit_run(struct env_task *task)
{
    struct store_commit *c = container_of(task, struct store_commit, task);
    struct memory_store *m = memory_of(c->store);
    void (*before)(struct memory_store *) = m->before_commit;
    m->before_commit = NULL;
    if (before)
        before(m);
    if (m->conflicts > 0) {
        m->conflicts--;
        c->done(c, ST_CONFLICT);
        return;
    }
    for (size_t i = 0; i < c->n_checks; i++) {
        if (!memory_check_holds(m, &c->checks[i])) {
            c->done(c, ST_CONFLICT);
            return;
        }
    }
    for (size_t i = 0; i < c->n_mutations; i++) {
        const struct store_mutation *mut = &c->mutations[i];
        size_t at = memory_lower(m, mut->key);
        CHECK(mut->body.len == 0);
        if (mut->kind == STORE_SET)
            memory_set(m, mut->key, mut->head);
        else if (mut->kind == STORE_CLEAR)
            memory_clear_range(m, at, at + (memory_find(m, mut->key) ? 1 : 0));
        else
            memory_clear_range(m, at, memory_lower(m, mut->head));
        memory_wake(m, mut->key);
    }
    m->commits++;
    c->done(c, ST_OK);
}

static void memory_commit(struct store *store, struct env *env, struct store_commit *commit)
{
    commit->store = store;
    commit->task.run = memory_commit_run;
    env_post(env, &commit->task);
}

static void memory_watch(struct store *store, struct env *env, struct store_watch *watch)
{
    watch->store = store;
    watch->env = env;
    watch->state = 1;
    list_add_tail(&memory_of(store)->watches, &watch->link);
}

static void memory_watch_stop(struct store_watch *watch)
{
    /* A fired one may still wait for its turn: it must not come. */
    struct memory_store *m = memory_of(watch->store);
    if (watch->state == 1)
        list_remove(&watch->link);
    for (struct env_task **t = &m->first_task; *t; t = &(*t)->next) {
        if (*t != &watch->task)
            continue;
        *t = watch->task.next;
        if (!*t)
            m->last_task = t;
        break;
    }
    watch->state = 0;
}

static enum store_liveness memory_probe(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    (void)id;
    return memory_of(store)->probe;
}

static enum status memory_session_begin(struct store *store, const uint8_t id[STORE_ID_BYTES],
                                        struct err *e)
{
    (void)store;
    (void)id;
    (void)e;
    return ST_OK;
}

static void memory_session_end(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    (void)store;
    (void)id;
}

static enum status memory_info(struct store *store, struct store_info *info, struct err *e)
{
    (void)store;
    (void)e;
    *info = (struct store_info){.uri = "memory:test", .engine = "memory"};
    return ST_OK;
}

static void memory_store_init(struct memory_store *m, const char *what)
{
    static const struct env_ops env_ops = {.now_ns = memory_now,
                                           .realtime_ns = memory_now,
                                           .timer_start = memory_timer_start,
                                           .timer_stop = memory_timer_stop,
                                           .post = memory_post,
                                           .random = memory_random};
    static const struct store_ops store_ops = {.read = memory_read,
                                               .read_release = memory_read_release,
                                               .commit = memory_commit,
                                               .watch = memory_watch,
                                               .watch_stop = memory_watch_stop,
                                               .session_begin = memory_session_begin,
                                               .session_end = memory_session_end,
                                               .session_probe = memory_probe,
                                               .info = memory_info};
    memset(m, 0, sizeof *m);
    m->chance = chance_begin(what);
    m->env.ops = &env_ops;
    m->store.ops = &store_ops;
    m->store.limits.body_bytes_best = 32768; /* no engine's */
    m->now_ns = 1000000000ull;
    m->last_task = &m->first_task;
    list_init(&m->timers);
    list_init(&m->watches);
}

/* Runs one task, or the timer that is due next. False: nothing is left to happen. */
static bool memory_turn_once(struct memory_store *m)
{
    struct env_task *task = m->first_task;
    if (task) {
        m->first_task = task->next;
        if (!m->first_task)
            m->last_task = &m->first_task;
        task->run(task);
        return true;
    }
    struct env_timer *next = NULL;
    list_for_each (l, &m->timers) {
        struct env_timer *t = container_of(l, struct env_timer, link);
        if (!next || t->due_ns < next->due_ns)
            next = t;
    }
    if (!next)
        return false;
    memory_timer_stop(&m->env, next);
    if (next->due_ns > m->now_ns)
        m->now_ns = next->due_ns;
    next->fire(next);
    return true;
}

static void memory_store_free(struct memory_store *m)
{
    CHECK(!m->first_task && list_empty(&m->timers) && list_empty(&m->watches));
    memory_clear_range(m, 0, m->n_pairs);
    free(m->pairs);
}

#endif
