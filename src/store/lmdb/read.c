/*
 * Reads, on worker threads: one LMDB read transaction for all gets and ranges of
 * a request, held until the bodies are read, so that their space can't be given
 * to others meanwhile. Bodies that lie side by side are read by one call.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/mem.h"
#include "store/lmdb/engine.h"

#define CHUNK_BYTES 8192u
#define SEGMENTS 128u

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

/* ---- bodies ---- */

/* A piece of a body on its way into memory. */
struct segment {
    uint64_t offset;
    uint8_t *to;
    uint32_t len, padded; /* the padding of the last unit is read over */
    struct store_get *get;
};

struct gather {
    int fd;
    unsigned n;
    uint64_t end; /* where the next segment must begin to be part of the same call */
    struct segment segs[SEGMENTS];
};

static bool segment_read(int fd, const struct segment *seg)
{
    size_t done = 0;
    while (done < seg->len) {
        ssize_t n = pread(fd, seg->to + done, seg->len - done, (off_t)(seg->offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        done += (size_t)n;
    }
    return true;
}

static void gather_flush(struct gather *g)
{
    uint8_t padding[SPACE_UNIT_BYTES];
    struct iovec iov[2 * SEGMENTS];
    int n_iov = 0;
    size_t total = 0;
    for (unsigned i = 0; i < g->n; i++) {
        struct segment *seg = &g->segs[i];
        iov[n_iov++] = (struct iovec){seg->to, seg->len};
        total += seg->len;
        if (i + 1 < g->n && seg->padded > seg->len) {
            iov[n_iov++] = (struct iovec){padding, seg->padded - seg->len};
            total += seg->padded - seg->len;
        }
    }
    if (g->n > 1 && preadv(g->fd, iov, n_iov, (off_t)g->segs[0].offset) == (ssize_t)total) {
        g->n = 0;
        return;
    }
    /* One by one, so that a bad sector fails only what lies on it. */
    for (unsigned i = 0; i < g->n; i++)
        if (!segment_read(g->fd, &g->segs[i]))
            g->segs[i].get->st = ST_IO;
    g->n = 0;
}

static void gather_add(struct gather *g, const struct segment *seg)
{
    if (g->n > 0 && (g->n == SEGMENTS || g->end != seg->offset))
        gather_flush(g);
    g->segs[g->n++] = *seg;
    g->end = seg->offset + seg->padded;
}

static void body_gather(struct gather *g, struct store_get *get, const struct lm_value *v)
{
    uint32_t left = v->body_len;
    uint8_t *to = get->body;
    for (uint32_t i = 0; i < v->n_pieces && left > 0; i++) {
        struct space_extent ext = space_unpack(get_le64(v->pieces + 8 * (size_t)i));
        uint32_t padded = (uint32_t)min_u64(ext.units, 256) * SPACE_UNIT_BYTES;
        uint32_t len = left < padded ? left : padded;
        struct segment seg = {ext.start * SPACE_UNIT_BYTES, to, len, padded, get};
        gather_add(g, &seg);
        to += len;
        left -= len;
    }
    if (left > 0)
        get->st = ST_IO;
}

/* ---- gets and ranges ---- */

static void get_one(struct store_read *read, MDB_cursor *cursor, struct gather *g,
                    struct store_get *get, bool *failed)
{
    struct lm_value v;
    get->head = (struct slice){NULL, 0};
    get->body_len = 0;
    get->st = lm_lookup(cursor, get->key, &v, failed);
    if (get->st)
        return;
    get->head = arena_copy(read, v.head.data, v.head.len);
    get->body_len = v.body_len;
    if (!get->body || v.body_len == 0)
        return;
    if (v.body_len > get->body_cap)
        get->st = ST_IO;
    else
        body_gather(g, get, &v);
}

static int compare(const MDB_val *a, struct slice b)
{
    int c = memcmp(a->mv_data, b.data, a->mv_size < b.len ? a->mv_size : b.len);
    return c ? c : a->mv_size < b.len ? -1 : a->mv_size > b.len;
}

static int compare_vals(const MDB_val *a, const MDB_val *b)
{
    return compare(a, (struct slice){b->mv_data, b->mv_size});
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
static enum status range_forward(struct store_read *read, MDB_cursor *cursor,
                                 struct store_range *range, bool *failed)
{
    MDB_val k, data, last = {0, NULL};
    size_t cap = 0;
    enum status st = lm_seek(cursor, range->begin, &k, &data, failed);
    if (st)
        return st == ST_NOTFOUND ? ST_OK : st;
    for (;;) {
        struct lm_value v;
        if (lm_value_parse(&k, &data, &v) || (last.mv_size && compare_vals(&k, &last) <= 0))
            return ST_IO;
        if (compare(&k, range->end) >= 0)
            return ST_OK;
        if (range->n_pairs == range->limit) {
            range->more = true;
            return ST_OK;
        }
        pair_add(read, range, &cap, &k, &v);
        last = k;
        int rc = mdb_cursor_get(cursor, &k, &data, MDB_NEXT);
        if (rc == MDB_NOTFOUND)
            return ST_OK;
        if (rc) {
            *failed = true;
            return ST_IO;
        }
    }
}

static enum status range_reverse(struct store_read *read, MDB_cursor *cursor,
                                 struct store_range *range, bool *failed)
{
    MDB_val k, data, last = {0, NULL};
    size_t cap = 0;
    if (range->end.len == 0)
        return ST_OK;
    enum status st = lm_seek(cursor, range->end, &k, &data, failed);
    if (st && st != ST_NOTFOUND)
        return st;
    int rc = mdb_cursor_get(cursor, &k, &data, st ? MDB_LAST : MDB_PREV);
    for (; rc == 0; rc = mdb_cursor_get(cursor, &k, &data, MDB_PREV)) {
        struct lm_value v;
        if (lm_value_parse(&k, &data, &v) || (last.mv_size && compare_vals(&k, &last) >= 0))
            return ST_IO;
        if (compare(&k, range->begin) < 0)
            return ST_OK;
        if (range->n_pairs == range->limit) {
            range->more = true;
            return ST_OK;
        }
        pair_add(read, range, &cap, &k, &v);
        last = k;
    }
    if (rc != MDB_NOTFOUND) {
        *failed = true;
        return ST_IO;
    }
    return ST_OK;
}

static void read_work(struct env_work *work)
{
    struct store_read *read = container_of(work, struct store_read, work);
    struct lm *lm = lm_of(read->store);
    struct lm_reader *reader;
    read->result = lm_read_begin(lm, &reader);
    if (read->result)
        return;
    bool failed = false;
    struct gather g;
    g.fd = lm->blocks_fd;
    g.n = 0;
    for (uint32_t i = 0; i < read->n_gets; i++)
        get_one(read, reader->cursor, &g, &read->gets[i], &failed);
    for (uint32_t i = 0; i < read->n_ranges; i++) {
        struct store_range *range = &read->ranges[i];
        range->pairs = NULL;
        range->n_pairs = 0;
        range->more = false;
        enum status st = range->reverse ? range_reverse(read, reader->cursor, range, &failed)
                                        : range_forward(read, reader->cursor, range, &failed);
        if (st)
            read->result = st;
    }
    if (g.n > 0)
        gather_flush(&g);
    lm_read_end(lm, reader, failed);
    if (read->result == ST_OK && read->digest)
        read->digest(read);
}

static void read_done(struct env_work *work)
{
    struct store_read *read = container_of(work, struct store_read, work);
    read->done(read, read->result);
}

void lm_read(struct store *store, struct env *env, struct store_read *read)
{
    read->store = store;
    read->arena = NULL;
    read->result = ST_OK;
    read->work.work = read_work;
    read->work.done = read_done;
    read->work.env = env;
    env_work(env, &read->work);
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
    MDB_val k = {begin.len, (void *)(uintptr_t)begin.data}, data;
    int rc = mdb_cursor_get(reader->cursor, &k, &data, begin.len ? MDB_SET_RANGE : MDB_FIRST);
    while (rc == 0 && compare(&k, end) < 0) {
        struct lm_value v;
        (*keys)++;
        *bytes += k.mv_size + min_u64(data.mv_size, LM_VALUE_BYTES_MAX);
        if (lm_value_parse(&k, &data, &v) == ST_OK)
            *bytes += round_up_u64(v.body_len, SPACE_UNIT_BYTES);
        rc = mdb_cursor_get(reader->cursor, &k, &data, MDB_NEXT);
    }
    bool failed = rc != 0 && rc != MDB_NOTFOUND;
    lm_read_end(lm, reader, failed);
    return failed ? fail(e, ST_IO, "the index of the store %s is damaged: %s", lm->dir,
                         mdb_strerror(rc))
                  : ST_OK;
}
