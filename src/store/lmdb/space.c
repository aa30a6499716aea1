/*
 * Free space in LMDB: free runs and holes by their start, pending frees by the
 * transaction that freed them, and one record of counters.
 *
 * Next-fit: a transaction takes what it needs in one sweep that goes on where
 * the one before ended, long runs before short ones, so that bodies committed
 * together lie together. A body may lie in several pieces, therefore no free
 * unit is ever too small to be used.
 */
#include "store/lmdb/space.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define RECORD_BYTES 72u
#define RUN_BYTES 16u
#define RUN_UNITS_MAX 0xffffffffu
#define HOLE_PUNCHED 1u

/* Pending records stay below half a page, so that LMDB needs no run of pages for one. */
#define PENDING_EXTENTS_MAX 200u
#define PENDING_KEY_BYTES 12u

/* Runs at least this long are taken first; so many shorter ones are passed over for it. */
#define LONG_RUN_UNITS 16u
#define LONG_RUN_LOOKS 4096u

const char space_record_key[6] = "space";

void space_extents_add(struct space_extents *list, uint64_t start, uint64_t units)
{
    if (list->n > 0) {
        struct space_extent *last = &list->v[list->n - 1];
        if (last->start + last->units == start) {
            last->units += units;
            return;
        }
    }
    mem_grow(&list->v, &list->cap, list->n + 1, sizeof *list->v);
    list->v[list->n++] = (struct space_extent){start, units};
}

void space_extents_free(struct space_extents *list)
{
    free(list->v);
    *list = (struct space_extents){0};
}

static enum status from_lmdb(int rc)
{
    switch (rc) {
    case MDB_SUCCESS:
        return ST_OK;
    case MDB_NOTFOUND:
        return ST_NOTFOUND;
    case MDB_MAP_FULL:
        return ST_NOSPC;
    default:
        return ST_IO;
    }
}

/* Corruption that would make a walk through the records end early must not look like their
 * end, so ST_NOTFOUND only ever stands for the real end of a database. */
struct run {
    uint64_t start;
    uint32_t units;
    uint32_t flags;
};

static uint64_t run_hash(uint64_t start, const uint8_t *value)
{
    return hash64(value, 8, hash_mix(start, 0x52554e53u));
}

static enum status run_parse(const MDB_val *k, const MDB_val *v, struct run *run)
{
    if (k->mv_size != 8 || v->mv_size != RUN_BYTES)
        return ST_IO;
    const uint8_t *p = v->mv_data;
    run->start = get_be64(k->mv_data);
    run->units = get_le32(p);
    run->flags = get_le32(p + 4);
    if (run->units == 0 || get_le64(p + 8) != run_hash(run->start, p))
        return ST_IO;
    return ST_OK;
}

static enum lm_db db_of(const struct space *sp, MDB_dbi dbi)
{
    return dbi == sp->dbis.free ? LM_DB_FREE : LM_DB_HOLES;
}

/* Before the cursor moves: `at` is where it goes, or for MDB_NEXT and MDB_PREV the run it is at. */
static enum status run_guard(struct space *sp, MDB_dbi dbi, MDB_cursor_op op, uint64_t at)
{
    uint8_t key[8];
    put_be64(key, at);
    struct slice k = {key, sizeof key};
    if (op == MDB_FIRST || op == MDB_LAST)
        return lm_guard_ends(sp->guard, db_of(sp, dbi));
    return op == MDB_SET_RANGE ? lm_guard_key(sp->guard, db_of(sp, dbi), k, 0)
                               : lm_guard_around(sp->guard, db_of(sp, dbi), k);
}

static enum status run_get(struct space *sp, MDB_cursor *c, MDB_cursor_op op, uint64_t at,
                           struct run *run)
{
    uint8_t key[8];
    put_be64(key, at);
    enum status st = run_guard(sp, mdb_cursor_dbi(c), op, at);
    if (st)
        return st;
    MDB_val k = {sizeof key, key}, v;
    int rc = mdb_cursor_get(c, &k, &v, op);
    return rc ? from_lmdb(rc) : run_parse(&k, &v, run);
}

static enum status run_put(struct space *sp, MDB_dbi dbi, const struct run *run)
{
    uint8_t key[8], value[RUN_BYTES];
    put_be64(key, run->start);
    put_le32(value, run->units);
    put_le32(value + 4, run->flags);
    put_le64(value + 8, run_hash(run->start, value));
    MDB_val k = {sizeof key, key}, v = {sizeof value, value};
    enum status st = run_guard(sp, dbi, MDB_SET_RANGE, run->start);
    return st ? st : from_lmdb(mdb_put(sp->txn, dbi, &k, &v, 0));
}

static enum status run_del(struct space *sp, MDB_dbi dbi, uint64_t start)
{
    uint8_t key[8];
    put_be64(key, start);
    MDB_val k = {sizeof key, key};
    enum status st = lm_guard_around(sp->guard, db_of(sp, dbi), (struct slice){key, sizeof key});
    if (st)
        return st;
    int rc = mdb_del(sp->txn, dbi, &k, NULL);
    return rc == MDB_NOTFOUND ? ST_IO : from_lmdb(rc);
}

static void record_build(const struct space *sp, uint8_t out[RECORD_BYTES])
{
    put_le64(out + 8, sp->data_units);
    put_le64(out + 16, sp->free_units);
    put_le64(out + 24, sp->hole_units);
    put_le64(out + 32, sp->pending_units);
    put_le64(out + 40, sp->next);
    put_le64(out + 48, sp->commits);
    put_le64(out + 56, sp->token);
    put_le64(out + 64, 0);
    put_le64(out, hash64(out + 8, RECORD_BYTES - 8, 0x53504143u));
}

static const struct slice record_slice = {space_record_key, sizeof space_record_key - 1};

enum status space_load(struct space *sp, MDB_txn *txn, const struct space_dbis *dbis,
                       struct lm_guard *guard)
{
    *sp = (struct space){.txn = txn, .dbis = *dbis, .guard = guard};
    MDB_val k = {record_slice.len, (void *)(uintptr_t)record_slice.data}, v;
    enum status st = lm_guard_key(guard, LM_DB_STORE, record_slice, 0);
    if (st)
        return st;
    int rc = mdb_get(txn, dbis->store, &k, &v);
    if (rc == MDB_NOTFOUND) {
        sp->data_units = 1;
        sp->next = 1;
        return ST_OK;
    }
    return rc ? from_lmdb(rc) : space_parse(sp, &v);
}

enum status space_parse(struct space *sp, const MDB_val *record)
{
    if (record->mv_size != RECORD_BYTES)
        return ST_IO;
    uint8_t rec[RECORD_BYTES];
    memcpy(rec, record->mv_data, sizeof rec);
    if (get_le64(rec) != hash64(rec + 8, RECORD_BYTES - 8, 0x53504143u))
        return ST_IO;
    sp->data_units = get_le64(rec + 8);
    sp->free_units = get_le64(rec + 16);
    sp->hole_units = get_le64(rec + 24);
    sp->pending_units = get_le64(rec + 32);
    sp->next = get_le64(rec + 40);
    sp->commits = get_le64(rec + 48);
    sp->token = get_le64(rec + 56);
    return ST_OK;
}

static int extent_compare(const void *a, const void *b)
{
    const struct space_extent *x = a, *y = b;
    return x->start < y->start ? -1 : x->start > y->start;
}

static enum status pending_put(struct space *sp, uint32_t index, uint8_t *value, uint32_t n)
{
    uint8_t key[PENDING_KEY_BYTES];
    put_be64(key, mdb_txn_id(sp->txn));
    put_be32(key + 8, index);
    put_le64(value, hash64(value + 8, 8 * (size_t)n, hash64(key, sizeof key, 0)));
    MDB_val k = {sizeof key, key}, v = {8 + 8 * (size_t)n, value};
    enum status st = lm_guard_key(sp->guard, LM_DB_PENDING, (struct slice){key, sizeof key}, 0);
    if (!st)
        st = lm_guard_ends(sp->guard, LM_DB_PENDING);
    return st ? st : from_lmdb(mdb_put(sp->txn, sp->dbis.pending, &k, &v, MDB_APPEND));
}

/* Writes what this transaction freed, sorted and joined. */
static enum status pending_write(struct space *sp)
{
    if (sp->freed.n == 0)
        return ST_OK;
    qsort(sp->freed.v, sp->freed.n, sizeof *sp->freed.v, extent_compare);
    uint8_t value[8 + 8 * PENDING_EXTENTS_MAX];
    uint32_t n = 0, index = 0;
    size_t i = 0;
    while (i < sp->freed.n) {
        uint64_t start = sp->freed.v[i].start, units = sp->freed.v[i].units;
        for (i++; i < sp->freed.n && sp->freed.v[i].start == start + units; i++)
            units += sp->freed.v[i].units;
        CHECK(i == sp->freed.n || sp->freed.v[i].start > start + units);
        while (units > 0) {
            uint64_t part = min_u64(units, SPACE_EXTENT_UNITS_MAX);
            put_le64(value + 8 + 8 * (size_t)n, space_pack(start, part));
            start += part;
            units -= part;
            if (++n == PENDING_EXTENTS_MAX) {
                enum status st = pending_put(sp, index++, value, n);
                if (st)
                    return st;
                n = 0;
            }
        }
    }
    return n ? pending_put(sp, index, value, n) : ST_OK;
}

enum status space_save(struct space *sp, uint64_t token)
{
    enum status st = pending_write(sp);
    if (st)
        return st;
    sp->freed.n = 0;
    sp->commits++;
    sp->token = token;
    uint8_t rec[RECORD_BYTES];
    record_build(sp, rec);
    MDB_val k = {record_slice.len, (void *)(uintptr_t)record_slice.data}, v = {sizeof rec, rec};
    st = lm_guard_key(sp->guard, LM_DB_STORE, record_slice, 0);
    return st ? st : from_lmdb(mdb_put(sp->txn, sp->dbis.store, &k, &v, 0));
}

void space_release(struct space *sp)
{
    space_extents_free(&sp->freed);
}

/* One sweep over the free runs of at least `run_min` units, from `sp->next` once around,
 * looking at no more than `looks` runs. `*need` goes down by what was taken. */
static enum status take_sweep(struct space *sp, MDB_cursor *c, uint64_t *need, uint32_t run_min,
                              size_t looks, struct space_extents *out)
{
    const uint64_t begin = sp->next;
    bool wrapped = false;
    struct run run;
    enum status st = run_get(sp, c, MDB_SET_RANGE, begin, &run);
    while (*need > 0 && looks-- > 0) {
        if (st == ST_NOTFOUND) {
            if (wrapped)
                return ST_OK;
            wrapped = true;
            st = run_get(sp, c, MDB_FIRST, 0, &run);
            continue;
        }
        if (st)
            return st;
        if (wrapped && run.start >= begin)
            return ST_OK;
        if (run.units < run_min) {
            st = run_get(sp, c, MDB_NEXT, run.start, &run);
            continue;
        }
        uint32_t units = (uint32_t)min_u64(run.units, *need);
        st = run_guard(sp, sp->dbis.free, MDB_NEXT, run.start);
        if (st)
            return st;
        int rc = mdb_cursor_del(c, 0);
        if (rc)
            return from_lmdb(rc);
        space_extents_add(out, run.start, units);
        *need -= units;
        sp->free_units -= units;
        sp->next = run.start + units;
        if (units < run.units) {
            struct run rest = {run.start + units, run.units - units, 0};
            return run_put(sp, sp->dbis.free, &rest);
        }
        st = run_get(sp, c, MDB_SET_RANGE, sp->next, &run);
    }
    return st == ST_NOTFOUND ? ST_OK : st;
}

enum status space_take(struct space *sp, uint64_t units, struct space_extents *out)
{
    if (units == 0)
        return ST_OK;
    if (units > sp->free_units)
        return ST_NOSPC;
    sp->dirty = true;
    MDB_cursor *c;
    int rc = mdb_cursor_open(sp->txn, sp->dbis.free, &c);
    if (rc)
        return from_lmdb(rc);
    uint64_t need = units;
    enum status st = take_sweep(sp, c, &need, LONG_RUN_UNITS, LONG_RUN_LOOKS + units, out);
    /* Twice: the sweep that finds the records' end may have begun in their middle. */
    for (int i = 0; i < 2 && !st && need > 0; i++)
        st = take_sweep(sp, c, &need, 1, SIZE_MAX, out);
    mdb_cursor_close(c);
    if (!st && need > 0)
        return ST_IO; /* the counters promised more than the records hold */
    return st;
}

void space_free_later(struct space *sp, uint64_t start, uint64_t units)
{
    sp->dirty = true;
    sp->pending_units += units;
    space_extents_add(&sp->freed, start, units);
}

/* Adds a run to the free ones, joined with its neighbours. ST_IO where it overlaps one. */
static enum status free_insert(struct space *sp, MDB_cursor *c, uint64_t start, uint64_t units)
{
    if (start == 0 || units == 0 || units > RUN_UNITS_MAX || start + units > sp->data_units)
        return ST_IO;
    struct run next, prev, run = {start, (uint32_t)units, 0};
    enum status st = run_get(sp, c, MDB_SET_RANGE, start, &next);
    if (st && st != ST_NOTFOUND)
        return st;
    bool have_next = !st;
    st = have_next ? run_get(sp, c, MDB_PREV, next.start, &prev)
                   : run_get(sp, c, MDB_LAST, 0, &prev);
    if (st && st != ST_NOTFOUND)
        return st;
    bool have_prev = !st;
    if (have_next && next.start < start + units)
        return ST_IO;
    if (have_prev && prev.start + prev.units > start)
        return ST_IO;
    sp->dirty = true;
    sp->free_units += units;
    if (have_next && next.start == start + units &&
        (uint64_t)run.units + next.units <= RUN_UNITS_MAX) {
        st = run_del(sp, sp->dbis.free, next.start);
        if (st)
            return st;
        run.units += next.units;
    }
    if (have_prev && prev.start + prev.units == start &&
        (uint64_t)run.units + prev.units <= RUN_UNITS_MAX) {
        run.start = prev.start;
        run.units += prev.units;
    }
    return run_put(sp, sp->dbis.free, &run);
}

enum status space_free_now(struct space *sp, uint64_t start, uint64_t units)
{
    MDB_cursor *c;
    int rc = mdb_cursor_open(sp->txn, sp->dbis.free, &c);
    if (rc)
        return from_lmdb(rc);
    enum status st = free_insert(sp, c, start, units);
    mdb_cursor_close(c);
    return st;
}

/* Frees the extents of one pending record. */
static enum status pending_free(struct space *sp, MDB_cursor *free_cursor, const MDB_val *k,
                                const uint8_t *value, size_t len, size_t *n_extents)
{
    if (len < 16 || len % 8 || len > 8 + 8 * PENDING_EXTENTS_MAX ||
        get_le64(value) != hash64(value + 8, len - 8, hash64(k->mv_data, k->mv_size, 0)))
        return ST_IO;
    for (size_t i = 8; i < len; i += 8) {
        struct space_extent ext = space_unpack(get_le64(value + i));
        enum status st = free_insert(sp, free_cursor, ext.start, ext.units);
        if (st)
            return st;
        if (sp->pending_units < ext.units)
            return ST_IO;
        sp->pending_units -= ext.units;
        (*n_extents)++;
    }
    return ST_OK;
}

enum status space_reclaim(struct space *sp, uint64_t oldest, size_t limit)
{
    if (sp->pending_units == 0)
        return ST_OK;
    MDB_cursor *c, *fc;
    int rc = mdb_cursor_open(sp->txn, sp->dbis.pending, &c);
    if (rc)
        return from_lmdb(rc);
    rc = mdb_cursor_open(sp->txn, sp->dbis.free, &fc);
    if (rc) {
        mdb_cursor_close(c);
        return from_lmdb(rc);
    }
    enum status st = lm_guard_ends(sp->guard, LM_DB_PENDING);
    size_t n = 0;
    MDB_val k, v;
    while (!st && n < limit && !(rc = mdb_cursor_get(c, &k, &v, MDB_FIRST))) {
        if (k.mv_size != PENDING_KEY_BYTES) {
            st = ST_IO;
            break;
        }
        if (get_be64(k.mv_data) >= oldest)
            break;
        /* Inserting moves pages under `k` and `v`. */
        uint8_t key[PENDING_KEY_BYTES], value[8 + 8 * PENDING_EXTENTS_MAX];
        memcpy(key, k.mv_data, sizeof key);
        size_t len = min_u64(v.mv_size, sizeof value);
        memcpy(value, v.mv_data, len);
        MDB_val kept = {sizeof key, key};
        st = v.mv_size == len ? pending_free(sp, fc, &kept, value, len, &n) : ST_IO;
        if (!st)
            st = lm_guard_around(sp->guard, LM_DB_PENDING, (struct slice){key, sizeof key});
        if (st)
            break;
        rc = mdb_cursor_del(c, 0);
        if (rc)
            break;
    }
    mdb_cursor_close(fc);
    mdb_cursor_close(c);
    return st ? st : rc == MDB_NOTFOUND ? ST_OK : from_lmdb(rc);
}

enum status space_make_holes(struct space *sp, uint64_t units, uint64_t run_min, size_t look_max,
                             uint64_t *moved)
{
    *moved = 0;
    MDB_cursor *c;
    int rc = mdb_cursor_open(sp->txn, sp->dbis.free, &c);
    if (rc)
        return from_lmdb(rc);
    struct run run;
    /* From the end: the front of the file is where the next data goes. */
    enum status st = run_get(sp, c, MDB_LAST, 0, &run);
    while (!st && *moved < units && look_max-- > 0) {
        if (run.units < run_min || units - *moved < run_min) {
            st = run_get(sp, c, MDB_PREV, run.start, &run);
            continue;
        }
        uint32_t part = (uint32_t)min_u64(run.units, units - *moved);
        struct run hole = {run.start + run.units - part, part, 0};
        struct run rest = {run.start, run.units - part, 0};
        st = rest.units ? run_put(sp, sp->dbis.free, &rest)
                        : run_del(sp, sp->dbis.free, run.start);
        if (!st)
            st = run_put(sp, sp->dbis.holes, &hole);
        if (st)
            break;
        sp->dirty = true;
        sp->free_units -= part;
        sp->hole_units += part;
        *moved += part;
        st = run_get(sp, c, MDB_SET_RANGE, run.start, &run);
        if (!st || st == ST_NOTFOUND)
            st = run_get(sp, c, st ? MDB_LAST : MDB_PREV, run.start, &run);
    }
    mdb_cursor_close(c);
    return st == ST_NOTFOUND ? ST_OK : st;
}

static enum status hole_find(struct space *sp, bool unpunched, struct space_extent *hole)
{
    MDB_cursor *c;
    int rc = mdb_cursor_open(sp->txn, sp->dbis.holes, &c);
    if (rc)
        return from_lmdb(rc);
    struct run run;
    enum status st = run_get(sp, c, MDB_FIRST, 0, &run);
    while (!st && unpunched && (run.flags & HOLE_PUNCHED))
        st = run_get(sp, c, MDB_NEXT, run.start, &run);
    mdb_cursor_close(c);
    if (!st)
        *hole = (struct space_extent){run.start, run.units};
    return st;
}

enum status space_hole_unpunched(struct space *sp, struct space_extent *hole)
{
    return hole_find(sp, true, hole);
}

enum status space_hole_first(struct space *sp, struct space_extent *hole)
{
    return hole_find(sp, false, hole);
}

enum status space_hole_punched(struct space *sp, const struct space_extent *hole)
{
    sp->dirty = true;
    struct run run = {hole->start, (uint32_t)hole->units, HOLE_PUNCHED};
    return run_put(sp, sp->dbis.holes, &run);
}

enum status space_hole_backed(struct space *sp, const struct space_extent *hole, uint64_t units)
{
    CHECK(units > 0 && units <= hole->units && sp->hole_units >= units);
    enum status st = run_del(sp, sp->dbis.holes, hole->start);
    if (!st && units < hole->units) {
        struct run rest = {hole->start + units, (uint32_t)(hole->units - units), HOLE_PUNCHED};
        st = run_put(sp, sp->dbis.holes, &rest);
    }
    if (!st)
        st = space_free_now(sp, hole->start, units);
    if (!st)
        sp->hole_units -= units;
    return st;
}

/* Adds up the runs of a database and sees that they rise without overlapping. */
static enum status runs_sum(struct space *sp, MDB_dbi dbi, uint64_t *sum)
{
    *sum = 0;
    MDB_cursor *c;
    int rc = mdb_cursor_open(sp->txn, dbi, &c);
    if (rc)
        return from_lmdb(rc);
    uint64_t end = 1;
    struct run run;
    enum status st = run_get(sp, c, MDB_FIRST, 0, &run);
    for (; !st; st = run_get(sp, c, MDB_NEXT, run.start, &run)) {
        if (run.start < end || run.start + run.units > sp->data_units) {
            st = ST_IO;
            break;
        }
        end = run.start + run.units;
        *sum += run.units;
    }
    mdb_cursor_close(c);
    return st == ST_NOTFOUND ? ST_OK : st;
}

static enum status pending_sum(struct space *sp, uint64_t *sum)
{
    *sum = 0;
    MDB_cursor *c;
    int rc = mdb_cursor_open(sp->txn, sp->dbis.pending, &c);
    if (rc)
        return from_lmdb(rc);
    MDB_val k, v;
    rc = mdb_cursor_get(c, &k, &v, MDB_FIRST);
    for (; !rc; rc = mdb_cursor_get(c, &k, &v, MDB_NEXT))
        for (size_t i = 8; i + 8 <= v.mv_size; i += 8)
            *sum += space_unpack(get_le64((const uint8_t *)v.mv_data + i)).units;
    mdb_cursor_close(c);
    return rc == MDB_NOTFOUND ? ST_OK : from_lmdb(rc);
}

enum status space_check(struct space *sp)
{
    uint64_t free_sum, hole_sum, pending;
    enum status st = runs_sum(sp, sp->dbis.free, &free_sum);
    if (!st)
        st = runs_sum(sp, sp->dbis.holes, &hole_sum);
    if (!st)
        st = pending_sum(sp, &pending);
    if (st)
        return st;
    for (size_t i = 0; i < sp->freed.n; i++)
        pending += sp->freed.v[i].units;
    bool same =
        free_sum == sp->free_units && hole_sum == sp->hole_units && pending == sp->pending_units;
    return same ? ST_OK : ST_IO;
}
