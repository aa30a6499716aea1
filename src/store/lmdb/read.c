/*
 * Reads, on threads of their own: those that wait are taken together, with one LMDB read
 * transaction for all their gets and ranges, held until the bodies are read (bodies.c), so that
 * their space can't be given to others meanwhile.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/mem.h"
#include "store/lmdb/engine.h"

#define CHUNK_BYTES 8192u
#define READS_AT_ONCE 32u
#define BYTES_AT_ONCE (256u << 10)
#define THREADS_MIN 4u

/* Memory of one read, freed as a whole. */
struct chunk {
    struct chunk *next;
    size_t used, cap;
};

static void *arena_take(struct store_read *read, size_t len)
{
    len = round_up_u64(len, 16);
    struct chunk *c = read->arena;
    if (!c || c->cap - c->used < len) {
        size_t cap = len > CHUNK_BYTES / 4 ? len + CHUNK_BYTES : CHUNK_BYTES;
        struct chunk *fresh = mem_alloc(sizeof *fresh + cap);
        *fresh = (struct chunk){c, 0, cap};
        read->arena = c = fresh;
    }
    void *p = (uint8_t *)(c + 1) + c->used;
    c->used += len;
    return p;
}

static struct slice arena_copy(struct store_read *read, const void *data, size_t len)
{
    if (len == 0)
        return (struct slice){NULL, 0};
    void *p = arena_take(read, len);
    memcpy(p, data, len);
    return (struct slice){p, len};
}

void lm_read_release(struct store_read *read)
{
    struct chunk *c = read->arena;
    read->arena = NULL;
    while (c) {
        struct chunk *next = c->next;
        free(c);
        c = next;
    }
}

/* ---- gets and ranges ---- */

static void get_one(struct store_read *read, struct lm_tree *tree, struct lm_bodies *bodies,
                    struct store_get *get)
{
    struct lm_value v;
    get->head = (struct slice){NULL, 0};
    get->body_len = 0;
    get->st = lm_lookup(tree, get->key, &v);
    if (get->st)
        return;
    get->head = arena_copy(read, v.head.data, v.head.len);
    get->body_len = v.body_len;
    if (!get->body || v.body_len == 0)
        return;
    if (v.body_len > get->body_cap)
        get->st = ST_IO;
    else
        lm_bodies_add(bodies, read, get, &v);
}

static int compare_vals(const MDB_val *a, const MDB_val *b)
{
    return lm_key_compare(a, (struct slice){b->mv_data, b->mv_size});
}

static void pair_add(struct store_read *read, struct store_range *range, size_t *cap,
                     const MDB_val *k, const struct lm_value *v)
{
    if (range->n_pairs == *cap) {
        size_t more = *cap ? *cap * 2 : min_u64(range->limit, 64);
        struct store_pair *grown = arena_take(read, more * sizeof *grown);
        if (*cap)
            memcpy(grown, range->pairs, *cap * sizeof *grown);
        range->pairs = grown;
        *cap = more;
    }
    range->pairs[range->n_pairs++] =
        (struct store_pair){.key = arena_copy(read, k->mv_data, k->mv_size),
                            .head = arena_copy(read, v->head.data, v->head.len),
                            .body_len = v->body_len};
}

/* Keys must go strictly in one direction: one that changed in place breaks that, or the
 * hash of its value, or lies on the border, where the entry beyond is checked as well. */
static enum status range_forward(struct store_read *read, struct lm_tree *tree,
                                 struct store_range *range)
{
    struct lm_cursor cursor = lm_cursor(tree, LM_DB_KEYS);
    MDB_val k, data, last = {0, NULL};
    size_t cap = 0;
    enum status st = lm_seek(&cursor, range->begin, &k, &data);
    if (st)
        return st == ST_NOTFOUND ? ST_OK : st;
    for (;;) {
        struct lm_value v;
        if (lm_value_parse(&k, &data, &v) || (last.mv_size && compare_vals(&k, &last) <= 0))
            return ST_IO;
        if (lm_key_compare(&k, range->end) >= 0)
            return ST_OK;
        if (range->n_pairs == range->limit) {
            range->more = true;
            return ST_OK;
        }
        pair_add(read, range, &cap, &k, &v);
        last = k;
        st = lm_cursor_next(&cursor, &k, &data);
        if (st)
            return st == ST_NOTFOUND ? ST_OK : st;
    }
}

static enum status range_reverse(struct store_read *read, struct lm_tree *tree,
                                 struct store_range *range)
{
    struct lm_cursor cursor = lm_cursor(tree, LM_DB_KEYS);
    MDB_val k, data, last = {0, NULL};
    size_t cap = 0;
    if (range->end.len == 0)
        return ST_OK;
    enum status st = lm_seek(&cursor, range->end, &k, &data);
    if (st && st != ST_NOTFOUND)
        return st;
    st = st ? lm_cursor_last(&cursor, &k, &data) : lm_cursor_prev(&cursor, &k, &data);
    for (; !st; st = lm_cursor_prev(&cursor, &k, &data)) {
        struct lm_value v;
        if (lm_value_parse(&k, &data, &v) || (last.mv_size && compare_vals(&k, &last) >= 0))
            return ST_IO;
        if (lm_key_compare(&k, range->begin) < 0)
            return ST_OK;
        if (range->n_pairs == range->limit) {
            range->more = true;
            return ST_OK;
        }
        pair_add(read, range, &cap, &k, &v);
        last = k;
    }
    return st == ST_NOTFOUND ? ST_OK : st;
}

/* ---- requests ---- */

/* Reads that see the same version. */
struct read_batch {
    struct lm *lm;
    struct lm_reader *reader;
    unsigned pending; /* reads whose bodies are not all there */
};

static void batch_unref(struct read_batch *batch)
{
    if (--batch->pending > 0)
        return;
    lm_read_end(batch->lm, batch->reader);
    free(batch);
}

static void read_posted(struct env_task *task)
{
    struct store_read *read = container_of(task, struct store_read, task);
    read->done(read, read->result);
}

static void read_answer(struct store_read *read)
{
    if (read->result == ST_OK && read->digest)
        read->digest(read);
    read->task.run = read_posted;
    env_post(read->env, &read->task);
}

void lm_read_body_ended(struct store_read *read)
{
    if (--read->bodies_pending > 0)
        return;
    batch_unref(read->batch);
    read_answer(read);
}

static void read_start(struct store_read *read, struct read_batch *batch,
                       struct lm_bodies *bodies)
{
    struct lm_tree *tree = &batch->reader->tree;
    for (uint32_t i = 0; i < read->n_gets; i++)
        get_one(read, tree, bodies, &read->gets[i]);
    for (uint32_t i = 0; i < read->n_ranges; i++) {
        struct store_range *range = &read->ranges[i];
        range->pairs = NULL;
        range->n_pairs = 0;
        range->more = false;
        enum status st = range->reverse ? range_reverse(read, tree, range)
                                        : range_forward(read, tree, range);
        if (st)
            read->result = st;
    }
}

static void reads_run(struct lm *lm, struct lm_bodies *bodies, struct list *reads, unsigned n)
{
    struct lm_reader *reader;
    enum status st = lm_read_begin(lm, &reader);
    struct read_batch *batch = NULL;
    if (!st) {
        batch = mem_alloc(sizeof *batch);
        *batch = (struct read_batch){.lm = lm, .reader = reader, .pending = n};
    }
    struct list *l;
    while ((l = list_pop(reads))) {
        struct store_read *read = container_of(l, struct store_read, link);
        if (st) {
            read->result = st;
            read_answer(read);
            continue;
        }
        read->batch = batch;
        read->bodies_pending = 1; /* not answered while it is looked at */
        read_start(read, batch, bodies);
        lm_read_body_ended(read);
    }
    lm_bodies_start(bodies);
}

/* ---- threads ---- */

/* Reads go to the first thread that is not busy, so that those that come together are started
 * together, and others join in only where the first ones are held up. */
struct lm_read_thread {
    struct lm *lm;
    pthread_t thread;
    int wake_fd;
    bool busy; /* it will look for reads before it waits */
    struct lm_bodies *bodies;
};

static void wake(struct lm_read_thread *t)
{
    uint64_t one = 1;
    CHECK(write(t->wake_fd, &one, sizeof one) == (ssize_t)sizeof one);
}

static struct lm_read_thread *idle_thread(struct lm *lm)
{
    for (unsigned i = 0; i < lm->n_read_threads; i++) {
        struct lm_read_thread *t = lm->read_threads[i];
        if (!t->busy) {
            t->busy = true;
            return t;
        }
    }
    return NULL;
}

/* Takes some of the reads that wait; where others are left, another thread is to be woken. */
static unsigned reads_take(struct lm_read_thread *t, struct list *reads,
                           struct lm_read_thread **other)
{
    struct lm *lm = t->lm;
    unsigned n = 0;
    uint64_t bytes = 0;
    *other = NULL;
    pthread_mutex_lock(&lm->read_lock);
    struct list *l;
    while (n < READS_AT_ONCE && bytes < BYTES_AT_ONCE && (l = list_pop(&lm->reads))) {
        const struct store_read *read = container_of(l, struct store_read, link);
        for (uint32_t i = 0; i < read->n_gets; i++)
            bytes += read->gets[i].body_cap;
        list_add_tail(reads, l);
        n++;
    }
    t->busy = n > 0;
    if (!list_empty(&lm->reads))
        *other = idle_thread(lm);
    pthread_mutex_unlock(&lm->read_lock);
    return n;
}

static void *read_thread(void *arg)
{
    struct lm_read_thread *t = arg;
    for (;;) {
        struct list reads = LIST_INIT(reads);
        struct lm_read_thread *other;
        unsigned n = reads_take(t, &reads, &other);
        if (other)
            wake(other);
        if (n > 0) {
            reads_run(t->lm, t->bodies, &reads, n);
        } else {
            if (atomic_load(&t->lm->read_threads_stop) && !lm_bodies_flying(t->bodies))
                return NULL;
            uint64_t count;
            while (read(t->wake_fd, &count, sizeof count) < 0)
                CHECK(errno == EINTR);
        }
        lm_bodies_reap(t->bodies);
    }
}

static struct lm_read_thread *thread_new(struct lm *lm)
{
    struct lm_read_thread *t = mem_zalloc(sizeof *t);
    t->lm = lm;
    t->busy = true;
    t->wake_fd = eventfd(0, EFD_CLOEXEC);
    if (t->wake_fd >= 0) {
        t->bodies = lm_bodies_new(lm->blocks_fd, lm->direct_fd, t->wake_fd);
        if (pthread_create(&t->thread, NULL, read_thread, t) == 0)
            return t;
        lm_bodies_free(t->bodies);
        close(t->wake_fd);
    }
    free(t);
    return NULL;
}

/* Where they wait for the disk one by one, it takes many to keep it busy. */
static unsigned threads_max(const struct lm *lm)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (lm->direct_fd < 0 || cores > (long)LM_READ_THREADS_MAX)
        return LM_READ_THREADS_MAX;
    return cores > (long)THREADS_MIN ? (unsigned)cores : THREADS_MIN;
}

void lm_read(struct store *store, struct env *env, struct store_read *read)
{
    struct lm *lm = lm_of(store);
    read->store = store;
    read->env = env;
    read->arena = NULL;
    read->result = ST_OK;
    pthread_mutex_lock(&lm->read_lock);
    list_add_tail(&lm->reads, &read->link);
    struct lm_read_thread *t = idle_thread(lm);
    if (lm->n_read_threads == 0)
        lm->n_read_threads_max = threads_max(lm);
    if (!t && lm->n_read_threads < lm->n_read_threads_max) {
        struct lm_read_thread *fresh = thread_new(lm);
        if (fresh)
            lm->read_threads[lm->n_read_threads++] = fresh;
        CHECK(lm->n_read_threads > 0);
    }
    pthread_mutex_unlock(&lm->read_lock);
    if (t)
        wake(t);
}

void lm_read_threads_stop(struct lm *lm)
{
    atomic_store(&lm->read_threads_stop, true);
    for (unsigned i = 0; i < lm->n_read_threads; i++) {
        struct lm_read_thread *t = lm->read_threads[i];
        wake(t);
        pthread_join(t->thread, NULL);
        lm_bodies_free(t->bodies);
        close(t->wake_fd);
        free(t);
    }
    lm->n_read_threads = 0;
}

enum status lm_usage(struct store *store, struct slice begin, struct slice end, uint64_t *keys,
                     uint64_t *bytes, struct err *e)
{
    struct lm *lm = lm_of(store);
    *keys = *bytes = 0;
    struct lm_reader *reader;
    enum status st = lm_read_begin(lm, &reader);
    if (st)
        return fail(e, st, "cannot read the store %s", lm->dir);
    struct lm_cursor cursor = lm_cursor(&reader->tree, LM_DB_KEYS);
    MDB_val k, data;
    st = begin.len ? lm_cursor_seek(&cursor, begin, &k, &data) : lm_cursor_first(&cursor, &k, &data);
    while (!st && lm_key_compare(&k, end) < 0) {
        struct lm_value v;
        (*keys)++;
        *bytes += k.mv_size + min_u64(data.mv_size, LM_VALUE_BYTES_MAX);
        if (lm_value_parse(&k, &data, &v) == ST_OK)
            *bytes += round_up_u64(v.body_len, SPACE_UNIT_BYTES);
        st = lm_cursor_next(&cursor, &k, &data);
    }
    lm_read_end(lm, reader);
    return st && st != ST_NOTFOUND ? fail(e, ST_IO, "the index of the store %s is damaged", lm->dir)
                                   : ST_OK;
}
