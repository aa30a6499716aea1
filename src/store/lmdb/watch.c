/*
 * Watches. What this process commits fires its own watches by key. What others
 * commit is noticed by the minder, woken by the bell or once a second: it
 * compares every watched value with what it was when the watch was armed. Values
 * without a body carry the number of the transaction that wrote them, so that
 * one written again differs.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

enum { WATCH_IDLE = 0, WATCH_ARMED, WATCH_POSTED };

static void filter_add(struct lm *lm, uint64_t hash)
{
    lm->watch_filter[hash >> 6 & 15] |= 1ull << (hash & 63);
}

/* Hash of the value of `key` in the newest version; 0 where there is none. */
static uint64_t value_hash(struct lm_reader *reader, struct slice key)
{
    MDB_val data;
    if (key.len == 0 || lm_tree_get(&reader->tree, LM_DB_KEYS, key, &data) ||
        data.mv_size > LM_VALUE_BYTES_MAX)
        return 0;
    return hash64(data.mv_data, data.mv_size, 1) | 1;
}

/* A firing on its way to the reactor. It is not part of the watch, so that a watch which was
 * stopped meanwhile may be freed at once; `watch` is NULL then. */
struct firing {
    struct env_task task;
    struct store_watch *watch;
};

static void firing_run(struct env_task *task)
{
    struct firing *firing = container_of(task, struct firing, task);
    struct store_watch *watch = firing->watch;
    free(firing);
    if (!watch)
        return;
    /* Off the list, so nobody but this reactor touches it any more. */
    watch->state = WATCH_IDLE;
    watch->fired(watch);
}

/* Under watch_lock. */
static void watch_fire(struct lm *lm, struct store_watch *watch)
{
    list_remove(&watch->link);
    atomic_fetch_sub(&lm->n_watches, 1);
    struct firing *firing = mem_alloc(sizeof *firing);
    firing->task.run = firing_run;
    firing->watch = watch;
    watch->state = WATCH_POSTED;
    watch->seen = (uint64_t)(uintptr_t)firing;
    env_post(watch->env, &firing->task);
}

void lm_watch(struct store *store, struct env *env, struct store_watch *watch)
{
    struct lm *lm = lm_of(store);
    watch->store = store;
    watch->env = env;
    struct lm_reader *reader;
    bool readable = lm_read_begin_now(lm, &reader) == ST_OK;
    if (readable) {
        watch->seen = value_hash(reader, watch->key);
        lm_read_end(lm, reader);
    }
    pthread_mutex_lock(&lm->watch_lock);
    watch->state = WATCH_ARMED;
    list_add_tail(&lm->watches, &watch->link);
    filter_add(lm, lm_key_hash(watch->key.data, watch->key.len));
    atomic_fetch_add(&lm->n_watches, 1);
    /* A commit between the look above and this line found no watch to fire: the next
     * recheck must not believe that it has seen this version. */
    lm->watched_txn = 0;
    if (!readable)
        watch_fire(lm, watch);
    pthread_mutex_unlock(&lm->watch_lock);
}

void lm_watch_stop(struct store_watch *watch)
{
    if (!watch->store)
        return;
    struct lm *lm = lm_of(watch->store);
    pthread_mutex_lock(&lm->watch_lock);
    if (watch->state == WATCH_ARMED) {
        list_remove(&watch->link);
        atomic_fetch_sub(&lm->n_watches, 1);
        watch->state = WATCH_IDLE;
    } else if (watch->state == WATCH_POSTED) {
        ((struct firing *)(uintptr_t)watch->seen)->watch = NULL;
        watch->state = WATCH_IDLE;
    }
    if (list_empty(&lm->watches))
        memset(lm->watch_filter, 0, sizeof lm->watch_filter);
    pthread_mutex_unlock(&lm->watch_lock);
}

bool lm_watch_filter(struct lm *lm, uint64_t key_hash)
{
    pthread_mutex_lock(&lm->watch_lock);
    bool maybe = lm->watch_filter[key_hash >> 6 & 15] >> (key_hash & 63) & 1;
    pthread_mutex_unlock(&lm->watch_lock);
    return maybe;
}

void lm_watch_changed(struct lm *lm, uint64_t key_hash)
{
    pthread_mutex_lock(&lm->watch_lock);
    list_for_each_safe (pos, tmp, &lm->watches) {
        struct store_watch *watch = container_of(pos, struct store_watch, link);
        if (lm_key_hash(watch->key.data, watch->key.len) == key_hash)
            watch_fire(lm, watch);
    }
    pthread_mutex_unlock(&lm->watch_lock);
}

static int compare(struct slice a, struct slice b)
{
    int c = memcmp(a.data, b.data, a.len < b.len ? a.len : b.len);
    return c ? c : a.len < b.len ? -1 : a.len > b.len;
}

void lm_watch_changed_range(struct lm *lm, struct slice begin, struct slice end)
{
    pthread_mutex_lock(&lm->watch_lock);
    list_for_each_safe (pos, tmp, &lm->watches) {
        struct store_watch *watch = container_of(pos, struct store_watch, link);
        if (compare(watch->key, begin) >= 0 && compare(watch->key, end) < 0)
            watch_fire(lm, watch);
    }
    pthread_mutex_unlock(&lm->watch_lock);
}

void lm_watch_recheck(struct lm *lm)
{
    if (atomic_load(&lm->n_watches) == 0)
        return;
    struct lm_reader *reader;
    if (lm_read_begin_now(lm, &reader))
        return;
    uint64_t version = mdb_txn_id(reader->txn);
    pthread_mutex_lock(&lm->watch_lock);
    bool moved = version != lm->watched_txn;
    lm->watched_txn = version;
    if (moved) {
        list_for_each_safe (pos, tmp, &lm->watches) {
            struct store_watch *watch = container_of(pos, struct store_watch, link);
            if (value_hash(reader, watch->key) != watch->seen)
                watch_fire(lm, watch);
        }
    }
    pthread_mutex_unlock(&lm->watch_lock);
    lm_read_end(lm, reader);
}

void lm_bell_ring(struct lm *lm)
{
    /* A written byte rather than a new time stamp: also who may not own the file can ring. */
    ssize_t n;
    do
        n = pwrite(lm->bell_fd, "\n", 1, 0);
    while (n < 0 && errno == EINTR);
}
