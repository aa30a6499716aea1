/*
 * The commit thread: takes everything that queued up while it was busy into one
 * write transaction (group commit), in the order it came.
 *
 * Order on the disk: bodies, fdatasync of the data file, LMDB's commit. Until the
 * last of these nothing that anybody can find refers to the new bodies, and what
 * they replace is left alone until no crash can bring it back (space.h).
 *
 * A commit's checks and its need for space are settled before its first
 * mutation, so one that is refused leaves nothing behind. Where LMDB fails in the
 * middle of one, the transaction is undone and redone without it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define ROUND_COMMITS_MAX 1024u
#define ROUND_BYTES_MAX (128ull << 20)
#define RECLAIM_EXTENTS_MAX 65536u
#define PROGRESS_EVERY 256u

#define BODY_PIECES_MAX 256u
#define STRETCH_MAX 4096u
#define STRETCH_PIECES (STRETCH_MAX + BODY_PIECES_MAX)
/* Below that many keys nothing is won. Of STRETCH_OF keys STRETCH_FIRST are set first: a page
 * with half of its entries then has room for the others that belong there, and some more. */
#define STRETCH_MIN 64u
#define STRETCH_FIRST 11u
#define STRETCH_OF 20u

#define IDLE_MS 1000u
#define WAIT_AGAIN_MS 20u
#define WAIT_GIVE_UP_NS 2000000000u
#define SETTLE_TRIES 20
#define SETTLE_PAUSE_US 250000u

#define PUNCH_RUN_UNITS_MIN ((1u << 20) / SPACE_UNIT_BYTES)
#define PUNCH_UNITS_MAX ((1ull << 30) / SPACE_UNIT_BYTES)
#define PUNCH_SLACK_BYTES (256ull << 20)
#define PUNCH_LOOKS 65536u

/* Keys that are set together (mutate_stretch), and the pieces of their bodies. */
struct stretch {
    uint32_t first[STRETCH_MAX + 1]; /* of `pieces` */
    uint64_t pieces[STRETCH_PIECES];
};

/* One transaction in the making. */
struct round {
    struct lm *lm;
    MDB_txn *txn;
    MDB_cursor *keys;
    struct space sp;

    struct store_commit *commits[ROUND_COMMITS_MAX];
    bool excluded[ROUND_COMMITS_MAX]; /* failed in an earlier attempt; its result stands */
    size_t n_commits;

    struct space_extents runs; /* space for the bodies of the commit at hand */
    size_t run;                /* the one in use, and units used of it */
    uint64_t run_used;
    struct lm_payload *payload;
    struct lm_warm *warm;
    bool applied; /* some commit took effect */
    int64_t unreserved_units;
    uint8_t *value; /* LM_VALUE_BYTES_MAX */
    struct stretch stretch;
};

static MDB_val to_val(struct slice s)
{
    return (MDB_val){s.len, (void *)(uintptr_t)s.data};
}

/* ---- payloads ---- */

/* Puts a body into the space taken for the commit and says where in `pieces`. */
static void body_place(struct round *r, struct slice body, uint64_t *pieces, uint32_t *n_pieces)
{
    const uint8_t *data = body.data;
    size_t left = body.len;
    while (left > 0) {
        CHECK(r->run < r->runs.n && *n_pieces < BODY_PIECES_MAX);
        const struct space_extent *run = &r->runs.v[r->run];
        uint64_t start = run->start + r->run_used;
        uint64_t units =
            min_u64((left + SPACE_UNIT_BYTES - 1) / SPACE_UNIT_BYTES, run->units - r->run_used);
        size_t len = min_u64(left, units * SPACE_UNIT_BYTES);
        lm_payload_add(r->payload, start * SPACE_UNIT_BYTES, data, len);
        pieces[(*n_pieces)++] = space_pack(start, units);
        data += len;
        left -= len;
        r->run_used += units;
        if (r->run_used == run->units) {
            r->run++;
            r->run_used = 0;
        }
    }
}

/* ---- one commit ---- */

/* A value as the transaction sees it. */
static enum status value_get(struct round *r, struct slice key, struct lm_value *v)
{
    MDB_val k = to_val(key), data;
    enum status st = lm_guard_key(r->lm->guard, LM_DB_KEYS, key, 0);
    if (!st && !r->lm->sealed && lm_lookup(&r->lm->guard->base, key, v) == ST_IO)
        st = ST_IO;
    if (st)
        return st;
    int rc = mdb_cursor_get(r->keys, &k, &data, MDB_SET);
    return rc == MDB_NOTFOUND ? ST_NOTFOUND : rc ? ST_IO : lm_value_parse(&k, &data, v);
}

/* Whether there is no key in [begin, end). */
static enum status range_check_empty(struct round *r, struct slice begin, struct slice end)
{
    MDB_val k = to_val(begin), data;
    struct lm_guard *g = r->lm->guard;
    struct lm_cursor base = lm_cursor(&g->base, LM_DB_KEYS);
    enum status st = begin.len ? lm_guard_key(g, LM_DB_KEYS, begin, 0) : lm_guard_ends(g, LM_DB_KEYS);
    MDB_val base_k, base_data;
    if (!st && !r->lm->sealed && lm_seek(&base, begin, &base_k, &base_data) == ST_IO)
        st = ST_IO;
    if (st)
        return st;
    int rc = mdb_cursor_get(r->keys, &k, &data, begin.len ? MDB_SET_RANGE : MDB_FIRST);
    if (rc)
        return rc == MDB_NOTFOUND ? ST_OK : ST_IO;
    return lm_key_compare(&k, end) < 0 ? ST_CONFLICT : ST_OK;
}

static enum status check_one(struct round *r, const struct store_check *check)
{
    struct lm_value v;
    enum status st;
    switch (check->kind) {
    case STORE_CHECK_VALUE:
        st = value_get(r, check->key, &v);
        if (st)
            return st == ST_NOTFOUND ? ST_CONFLICT : st;
        return v.head.len == check->value.len &&
                       (v.head.len == 0 || memcmp(v.head.data, check->value.data, v.head.len) == 0)
                   ? ST_OK
                   : ST_CONFLICT;
    case STORE_CHECK_ABSENT:
        st = value_get(r, check->key, &v);
        return st == ST_NOTFOUND ? ST_OK : st == ST_OK ? ST_CONFLICT : st;
    case STORE_CHECK_EMPTY:
        return range_check_empty(r, check->key, check->value);
    }
    return ST_INVAL;
}

/* What a commit needs of the data file and the index. ST_INVAL where it breaks a limit. */
static enum status commit_measure(const struct store_commit *c, uint64_t *units, uint64_t *keys)
{
    *units = *keys = 0;
    for (size_t i = 0; i < c->n_mutations; i++) {
        const struct store_mutation *m = &c->mutations[i];
        if (m->kind == STORE_CLEAR_RANGE)
            continue;
        if (m->key.len == 0 || m->key.len > STORE_KEY_BYTES_MAX)
            return ST_INVAL;
        if (m->kind != STORE_SET)
            continue;
        if (m->head.len > LM_HEAD_BYTES_MAX || m->body.len > LM_BODY_BYTES_MAX)
            return ST_INVAL;
        *units += (m->body.len + SPACE_UNIT_BYTES - 1) / SPACE_UNIT_BYTES;
        *keys += 1 + m->head.len / STORE_KEY_HEAD_BYTES;
    }
    return ST_OK;
}

/* Sees that a commit without a reservation takes nothing that somebody reserved. */
static enum status commit_admit(struct round *r, uint64_t units, uint64_t keys)
{
    struct lm *lm = r->lm;
    uint64_t index = lm_index_cost(keys);
    if (units > 0) {
        atomic_fetch_add(&lm->reserved_units, (int64_t)units);
        r->unreserved_units += (int64_t)units;
        if (lm_spare_units(lm, &r->sp) < 0) {
            enum status st = lm_make_room(lm, &r->sp, 0, 0);
            if (st && st != ST_NOSPC)
                return st;
            if (lm_spare_units(lm, &r->sp) < 0)
                return ST_NOSPC;
        }
    }
    /* Small commits that bring no bodies are how a full store gets room again. */
    uint64_t free_use = units ? 0 : lm->emergency_bytes / 4;
    if (index > free_use && lm_spare_index(lm, r->txn) < (int64_t)index) {
        enum status st = lm_make_room(lm, &r->sp, 0, index);
        if (st && st != ST_NOSPC)
            return st;
        int64_t spare = lm_spare_index(lm, r->txn);
        if (spare + (int64_t)free_use < (int64_t)index)
            return ST_NOSPC;
    }
    return ST_OK;
}

static void pieces_free(struct round *r, const MDB_val *key, const MDB_val *old)
{
    struct lm_value v;
    if (lm_value_parse(key, old, &v)) {
        log_error("store %s: the value replaced or cleared just now was damaged; the space of its "
                  "body, if it had one, stays taken",
                  r->lm->dir);
        return;
    }
    for (uint32_t i = 0; i < v.n_pieces; i++) {
        struct space_extent ext = space_unpack(get_le64(v.pieces + 8 * (size_t)i));
        space_free_later(&r->sp, ext.start, ext.units);
    }
}

static int set_put(struct round *r, const struct store_mutation *m, const uint64_t *pieces,
                   uint32_t n_pieces)
{
    MDB_val k = to_val(m->key), old;
    if (lm_guard_key(r->lm->guard, LM_DB_KEYS, m->key, m->head.len))
        return MDB_CORRUPTED;
    int rc = mdb_cursor_get(r->keys, &k, &old, MDB_SET);
    if (rc == 0)
        pieces_free(r, &k, &old);
    else if (rc != MDB_NOTFOUND)
        return rc;
    MDB_val v = {.mv_data = r->value};
    v.mv_size = lm_value_build(r->value, &k, mdb_txn_id(r->txn), m->head, (uint32_t)m->body.len,
                               pieces, n_pieces);
    return mdb_cursor_put(r->keys, &k, &v, 0);
}

/* How many of the `n` mutations at `m` set keys that ascend. */
static size_t stretch_length(const struct store_mutation *m, size_t n)
{
    size_t i = 0;
    while (i < n && i < STRETCH_MAX && m[i].kind == STORE_SET) {
        MDB_val k = to_val(m[i].key);
        if (i > 0 && lm_key_compare(&k, m[i - 1].key) <= 0)
            break;
        i++;
    }
    return i;
}

/* Sets keys that ascend; *n at most, afterwards as many as it did.
 *
 * LMDB splits a full page in the middle. Keys that are new and come in their order would leave
 * every page half empty behind them: an index of twice the size, in memory and to be written. So
 * somewhat more than half of them are set first, spread evenly, and the rest into the room that is
 * left in the pages then. The bodies lie in the order of the keys all the same. */
static int mutate_stretch(struct round *r, const struct store_mutation *m, size_t *n)
{
    struct stretch *s = &r->stretch;
    size_t used = 0, i;
    for (i = 0; i < *n && used + BODY_PIECES_MAX <= STRETCH_PIECES; i++) {
        uint32_t n_pieces = 0;
        body_place(r, m[i].body, s->pieces + used, &n_pieces);
        s->first[i] = (uint32_t)used;
        used += n_pieces;
    }
    s->first[i] = (uint32_t)used;
    *n = i;
    MDB_val k = to_val(m->key), old;
    if (lm_guard_key(r->lm->guard, LM_DB_KEYS, m->key, 0))
        return MDB_CORRUPTED;
    int rc = i < STRETCH_MIN ? 0 : mdb_cursor_get(r->keys, &k, &old, MDB_SET);
    bool twice = rc == MDB_NOTFOUND;
    if (rc && !twice)
        return rc;
    for (unsigned pass = 0; pass <= twice; pass++) {
        for (i = 0; i < *n; i++) {
            bool first = i * STRETCH_FIRST % STRETCH_OF < STRETCH_FIRST;
            if (twice && first != (pass == 0))
                continue;
            rc = set_put(r, &m[i], s->pieces + s->first[i], s->first[i + 1] - s->first[i]);
            if (rc)
                return rc;
            if (i % PROGRESS_EVERY == PROGRESS_EVERY - 1)
                lm_lock_progress(r->lm);
        }
    }
    return 0;
}

/* Removes the entry that the cursor is at. */
static int entry_del(struct round *r, const MDB_val *k, const MDB_val *old)
{
    if (lm_guard_around(r->lm->guard, LM_DB_KEYS, (struct slice){k->mv_data, k->mv_size}))
        return MDB_CORRUPTED;
    pieces_free(r, k, old);
    return mdb_cursor_del(r->keys, 0);
}

static int mutate_clear(struct round *r, struct slice key)
{
    MDB_val k = to_val(key), old;
    if (lm_guard_key(r->lm->guard, LM_DB_KEYS, key, 0))
        return MDB_CORRUPTED;
    int rc = mdb_cursor_get(r->keys, &k, &old, MDB_SET);
    return rc == MDB_NOTFOUND ? 0 : rc ? rc : entry_del(r, &k, &old);
}

static int mutate_clear_range(struct round *r, struct slice begin, struct slice end)
{
    MDB_val k = to_val(begin), old;
    unsigned n = 0;
    struct lm_guard *g = r->lm->guard;
    if (begin.len ? lm_guard_key(g, LM_DB_KEYS, begin, 0) : lm_guard_ends(g, LM_DB_KEYS))
        return MDB_CORRUPTED;
    int rc = mdb_cursor_get(r->keys, &k, &old, begin.len ? MDB_SET_RANGE : MDB_FIRST);
    while (rc == 0 && lm_key_compare(&k, end) < 0) {
        rc = entry_del(r, &k, &old);
        if (rc)
            return rc;
        if (++n % PROGRESS_EVERY == 0)
            lm_lock_progress(r->lm);
        rc = mdb_cursor_get(r->keys, &k, &old, MDB_NEXT);
    }
    return rc == MDB_NOTFOUND ? 0 : rc;
}

/* All mutations of a commit. Failure leaves a transaction that must be undone. */
static enum status commit_mutate(struct round *r, const struct store_commit *c)
{
    for (size_t i = 0, n; i < c->n_mutations; i += n) {
        const struct store_mutation *m = &c->mutations[i];
        int rc = 0;
        n = 1;
        switch (m->kind) {
        case STORE_SET:
            n = stretch_length(m, c->n_mutations - i);
            rc = mutate_stretch(r, m, &n);
            break;
        case STORE_CLEAR:
            rc = mutate_clear(r, m->key);
            break;
        case STORE_CLEAR_RANGE:
            rc = mutate_clear_range(r, m->key, m->head);
            break;
        }
        if (rc) {
            log_error("store %s: a commit failed in LMDB: %s", r->lm->dir, mdb_strerror(rc));
            return lm_status(rc) == ST_NOSPC ? ST_NOSPC : ST_IO;
        }
        if (i / PROGRESS_EVERY != (i + n) / PROGRESS_EVERY)
            lm_lock_progress(r->lm);
    }
    return c->log ? lm_log_commit_apply(r->lm, r->txn, c) : ST_OK;
}

/* Decides one commit: its answer goes to c->result. Anything but ST_OK back from here
 * means that the transaction can't be used any more. */
static enum status commit_one(struct round *r, struct store_commit *c)
{
    uint64_t units, keys;
    c->result = commit_measure(c, &units, &keys);
    for (size_t i = 0; i < c->n_checks && c->result == ST_OK; i++)
        c->result = check_one(r, &c->checks[i]);
    if (c->result == ST_OK && !c->reserved) {
        c->result = commit_admit(r, units, keys);
    } else if (c->result == ST_OK && r->sp.free_units < units) {
        enum status st = lm_make_room(r->lm, &r->sp, units, 0);
        if (st && st != ST_NOSPC)
            return c->result = st;
    }
    if (c->result)
        return ST_OK;
    r->runs.n = 0;
    r->run = 0;
    r->run_used = 0;
    c->result = space_take(&r->sp, units, &r->runs);
    if (c->result == ST_NOSPC) {
        if (c->reserved)
            log_error("store %s: space that was reserved is not there", r->lm->dir);
        return ST_OK;
    }
    if (c->result)
        return c->result;
    r->lm->round_units += (int64_t)units;
    r->applied = true;
    c->result = commit_mutate(r, c);
    return c->result;
}

/* ---- one attempt ---- */

static void attempt_undo(struct round *r)
{
    lm_payload_cancel(r->payload);
    if (r->keys)
        mdb_cursor_close(r->keys);
    r->keys = NULL;
    if (r->txn)
        lm_write_abort(r->lm, r->txn);
    r->txn = NULL;
    space_release(&r->sp);
    r->sp = (struct space){0};
    atomic_fetch_sub(&r->lm->reserved_units, r->unreserved_units);
    r->unreserved_units = 0;
    r->lm->round_units = 0;
}

static enum status attempt_begin(struct round *r)
{
    r->applied = false;
    r->lm->round_units = 0;
    enum status st = lm_write_begin(r->lm, &r->txn);
    if (st)
        return st;
    st = space_load(&r->sp, r->txn, &r->lm->space_dbis, r->lm->guard);
    if (st) {
        log_error("store %s: the record of free space is damaged", r->lm->dir);
        return ST_IO;
    }
    if (r->sp.pending_units > 0) {
        uint64_t oldest = lm_oldest_version(r->lm, mdb_txn_id(r->txn));
        st = space_reclaim(&r->sp, oldest, RECLAIM_EXTENTS_MAX);
        if (st) {
            log_error("store %s: the records of freed space are damaged", r->lm->dir);
            return ST_IO;
        }
    }
    return mdb_cursor_open(r->txn, r->lm->keys_dbi, &r->keys) ? ST_IO : ST_OK;
}

/* Runs all commits that are not excluded. On failure *culprit is the one to leave out, or
 * n_commits where it is none's fault. */
static enum status attempt_commits(struct round *r, size_t *culprit)
{
    *culprit = r->n_commits;
    for (size_t i = 0; i < r->n_commits; i++) {
        if (r->excluded[i])
            continue;
        enum status st = commit_one(r, r->commits[i]);
        if (st) {
            *culprit = i;
            return st;
        }
        lm_lock_progress(r->lm);
    }
    return ST_OK;
}

static uint64_t draw_token(void)
{
    uint64_t token = 0;
    if (getrandom(&token, sizeof token, 0) != (ssize_t)sizeof token)
        token = lm_now_ns();
    return token;
}

/* After a failed mdb_txn_commit: finds out, and makes durable, whether the transaction with
 * `token` happened. LMDB writes the old meta page back when writing the new one failed, but
 * what the disk holds then is not known until another commit has gone through. Until that
 * is settled nobody may be answered, so without an end to it the process stops. */
static bool settle(struct lm *lm, uint64_t token)
{
    for (int i = 0; i < SETTLE_TRIES; i++) {
        if (i > 0)
            usleep(SETTLE_PAUSE_US);
        struct space sp = {0};
        MDB_txn *txn;
        if (lm_reopen(lm))
            continue;
        if (lm_write_begin(lm, &txn))
            continue;
        bool happened = false;
        enum status st = space_load(&sp, txn, &lm->space_dbis, lm->guard);
        if (!st) {
            happened = sp.token == token;
            /* Keeps the token if it is ours, so that another round of this sees it too. */
            st = space_save(&sp, happened ? token : draw_token());
        }
        space_release(&sp);
        if (st) {
            lm_write_abort(lm, txn);
            continue;
        }
        if (lm_write_commit(lm, txn) == 0)
            return happened;
    }
    log_error("store %s: the disk does not tell whether a commit happened; stopping, so that "
              "nothing false is answered",
              lm->dir);
    abort();
}

/* Makes the transaction durable. */
static enum status attempt_finish(struct round *r)
{
    struct lm *lm = r->lm;
    bool wrote;
    enum status st = lm_payload_finish(r->payload, &wrote);
    if (st)
        return st;
    if (wrote && fdatasync(lm->blocks_fd) < 0) {
        log_error("store %s: cannot sync the data file: %s", lm->dir, strerror(errno));
        return errno == ENOSPC || errno == EDQUOT ? ST_NOSPC : ST_IO;
    }
    lm_lock_progress(lm);
    struct lm_claims claims;
    lm_claims_prepare(lm, &r->sp, r->txn, &claims);
    uint64_t token = draw_token();
    st = space_save(&r->sp, token);
    if (st) {
        lm_claims_publish(lm, &claims, false);
        return st;
    }
    mdb_cursor_close(r->keys);
    r->keys = NULL;
    int rc = lm_write_commit(lm, r->txn);
    r->txn = NULL;
    if (rc) {
        log_error("store %s: cannot commit: %s", lm->dir, mdb_strerror(rc));
        /* Before the meta page is written LMDB's commit is all undone; after, it can't go on. */
        MDB_txn *probe;
        int probe_rc = mdb_txn_begin(lm->mdb, NULL, MDB_RDONLY, &probe);
        if (probe_rc == 0)
            mdb_txn_abort(probe);
        if (probe_rc == 0 || !settle(lm, token)) {
            lm_claims_publish(lm, &claims, false);
            return lm_status(rc) == ST_NOSPC ? ST_NOSPC : ST_IO;
        }
    }
    lm_claims_publish(lm, &claims, true);
    atomic_fetch_sub(&lm->reserved_units, r->unreserved_units);
    r->unreserved_units = 0;
    lm->round_units = 0;
    lm->pending_units = r->sp.pending_units;
    space_release(&r->sp);
    return ST_OK;
}

/* ---- reservations that had to wait ---- */

static bool wait_take(struct lm *lm, const struct space *sp, MDB_txn *txn, int64_t units,
                      int64_t index)
{
    atomic_fetch_add(&lm->reserved_units, units);
    atomic_fetch_add(&lm->reserved_index, index);
    if (lm_spare_units(lm, sp) >= 0 && lm_spare_index(lm, txn) >= 0)
        return true;
    atomic_fetch_sub(&lm->reserved_units, units);
    atomic_fetch_sub(&lm->reserved_index, index);
    return false;
}

static void wait_cost(const struct store_reserve_wait *w, int64_t *units, int64_t *index)
{
    *units = (int64_t)((w->want.body_bytes + SPACE_UNIT_BYTES - 1) / SPACE_UNIT_BYTES);
    *index = (int64_t)lm_index_cost(w->want.keys);
}

/* Tries all waiting reservations; those that can't be had have ST_NOSPC afterwards. */
static enum status waits_try(struct round *r, struct list *waits)
{
    bool full = false;
    list_for_each (pos, waits) {
        struct store_reserve_wait *w = container_of(pos, struct store_reserve_wait, link);
        int64_t units, index;
        wait_cost(w, &units, &index);
        w->result = ST_NOSPC;
        bool taken = wait_take(r->lm, &r->sp, r->txn, units, index);
        if (!taken && !full) {
            enum status st = lm_make_room(r->lm, &r->sp, (uint64_t)units, (uint64_t)index);
            if (st && st != ST_NOSPC)
                return st;
            full = st == ST_NOSPC;
            taken = wait_take(r->lm, &r->sp, r->txn, units, index);
        }
        if (taken)
            w->result = ST_OK;
    }
    return ST_OK;
}

static void waits_undo(struct lm *lm, struct list *waits)
{
    list_for_each (pos, waits) {
        struct store_reserve_wait *w = container_of(pos, struct store_reserve_wait, link);
        if (w->result != ST_OK)
            continue;
        int64_t units, index;
        wait_cost(w, &units, &index);
        atomic_fetch_sub(&lm->reserved_units, units);
        atomic_fetch_sub(&lm->reserved_index, index);
        w->result = ST_NOSPC;
    }
}

/* ---- answers ---- */

static void commit_answer(struct env_task *task)
{
    struct store_commit *c = container_of(task, struct store_commit, task);
    if (c->log && c->result == ST_OK)
        lm_log_commit_answered(c);
    c->done(c, c->result);
}

static void wait_answer(struct env_task *task)
{
    struct store_reserve_wait *w = container_of(task, struct store_reserve_wait, task);
    w->done(w, w->result);
}

static void fire_watches(struct lm *lm, const struct store_commit *c)
{
    for (size_t i = 0; i < c->n_mutations; i++) {
        const struct store_mutation *m = &c->mutations[i];
        if (m->kind == STORE_CLEAR_RANGE) {
            lm_watch_changed_range(lm, m->key, m->head);
            continue;
        }
        uint64_t hash = lm_key_hash(m->key.data, m->key.len);
        if (lm_watch_filter(lm, hash))
            lm_watch_changed(lm, hash);
    }
}

static void round_answer(struct round *r)
{
    struct lm *lm = r->lm;
    bool ring = false;
    for (size_t i = 0; i < r->n_commits; i++) {
        struct store_commit *c = r->commits[i];
        if (c->result == ST_OK && atomic_load(&lm->n_watches) > 0)
            fire_watches(lm, c);
        ring |= c->result == ST_OK && c->wake_watchers;
    }
    if (ring)
        lm_bell_ring(lm);
    for (size_t i = 0; i < r->n_commits; i++) {
        struct store_commit *c = r->commits[i];
        c->task.run = commit_answer;
        env_post(c->env, &c->task);
    }
}

/* Answers waiting reservations; those for which space may still come stay in the list until
 * it is clear that they waited in vain. */
static void waits_answer(struct lm *lm, struct list *waits)
{
    bool hope = lm->pending_units > 0 || atomic_load(&lm->reserved_units) > 0 ||
                atomic_load(&lm->reserved_index) > 0;
    uint64_t now = lm_now_ns();
    bool refused = false;
    list_for_each (pos, waits)
        refused |= container_of(pos, struct store_reserve_wait, link)->result != ST_OK;
    if (!refused || lm->waits_refused_ns == 0)
        lm->waits_refused_ns = refused ? now : 0;
    bool give_up = !hope || now - lm->waits_refused_ns > WAIT_GIVE_UP_NS;
    list_for_each_safe (pos, tmp, waits) {
        struct store_reserve_wait *w = container_of(pos, struct store_reserve_wait, link);
        if (w->result != ST_OK && !give_up)
            continue;
        list_remove(&w->link);
        w->task.run = wait_answer;
        env_post(w->env, &w->task);
    }
    if (give_up)
        lm->waits_refused_ns = 0;
}

/* ---- giving space back to the file system ---- */

/* Holes are punched one transaction after the one that made them holes, and inside a
 * transaction: whoever wants the space has to take the writer lock first. */
static enum status punch_some(struct round *r)
{
    struct lm *lm = r->lm;
    struct space_extent hole;
    uint64_t punched = 0;
    enum status st;
    while (punched < PUNCH_UNITS_MAX && (st = space_hole_unpunched(&r->sp, &hole)) == ST_OK) {
        st = lm_datafile_punch(lm, hole.start, hole.units);
        st = st ? space_hole_backed(&r->sp, &hole, hole.units) : space_hole_punched(&r->sp, &hole);
        if (st)
            return st;
        punched += hole.units;
        lm_lock_progress(lm);
    }
    if (lm->no_punch)
        return ST_OK;
    int64_t slack = (int64_t)(PUNCH_SLACK_BYTES / SPACE_UNIT_BYTES);
    int64_t used = (int64_t)(r->sp.data_units - r->sp.free_units - r->sp.hole_units);
    if (slack > used / 4 + PUNCH_RUN_UNITS_MIN * 16)
        slack = used / 4 + PUNCH_RUN_UNITS_MIN * 16;
    int64_t spare = lm_spare_units(lm, &r->sp);
    /* Some more than the slack, or every little free run would be punched by itself. */
    if (spare <= slack + slack / 2)
        return ST_OK;
    uint64_t moved;
    st = space_make_holes(&r->sp, min_u64((uint64_t)(spare - slack), PUNCH_UNITS_MAX),
                          PUNCH_RUN_UNITS_MIN, PUNCH_LOOKS, &moved);
    lm->work_left = moved > 0;
    return st;
}

/* ---- the thread ---- */

static void round_fail(struct round *r, enum status st)
{
    for (size_t i = 0; i < r->n_commits; i++)
        if (!r->excluded[i])
            r->commits[i]->result = st;
}

/* Leaves out the commits that had no reservation, after the disk turned out to be full. */
static bool exclude_unreserved(struct round *r)
{
    bool any = false;
    for (size_t i = 0; i < r->n_commits; i++) {
        if (!r->excluded[i] && !r->commits[i]->reserved && r->commits[i]->result == ST_OK) {
            r->excluded[i] = true;
            r->commits[i]->result = ST_NOSPC;
            any = true;
        }
    }
    return any;
}

static void round_run(struct round *r, struct list *waits, bool idle)
{
    struct lm *lm = r->lm;
    memset(r->excluded, 0, sizeof r->excluded);
    enum status st = ST_OK;
    /* Every further attempt leaves out at least one commit more. */
    for (size_t tries = 0; tries <= r->n_commits + 1; tries++) {
        size_t culprit = r->n_commits;
        st = attempt_begin(r);
        if (!st) {
            lm_index_ahead(lm);
            uint64_t n_keys = 0;
            for (size_t i = 0; i < r->n_commits; i++)
                n_keys += r->commits[i]->n_mutations;
            lm_warm_begin(r->warm, r->commits, r->n_commits);
            st = attempt_commits(r, &culprit);
            lm_warm_end(r->warm, n_keys);
        }
        if (!st)
            st = waits_try(r, waits);
        if (!st && idle) {
            lm->work_left = false;
            st = punch_some(r);
        }
        if (!st) {
            bool needed = r->applied || r->sp.dirty || r->sp.pending_units > 0;
            if (!needed) {
                lm->pending_units = 0;
                struct lm_claims claims;
                lm_claims_prepare(lm, &r->sp, r->txn, &claims);
                lm_claims_publish(lm, &claims, true);
                attempt_undo(r);
                return;
            }
            st = attempt_finish(r);
            if (!st)
                return;
        }
        waits_undo(lm, waits);
        attempt_undo(r);
        if (culprit < r->n_commits) {
            r->excluded[culprit] = true;
            continue;
        }
        if (st == ST_NOSPC && exclude_unreserved(r))
            continue;
        break;
    }
    round_fail(r, st);
}

static bool job_run(struct lm *lm, struct lm_job *job)
{
    MDB_txn *txn;
    job->result = lm_write_begin(lm, &txn);
    if (job->result)
        return false;
    job->result = job->run(job, txn);
    if (job->result) {
        lm_write_abort(lm, txn);
        return false;
    }
    int rc = lm_write_commit(lm, txn);
    if (rc)
        job->result = lm_status(rc);
    MDB_txn *probe;
    if (rc && mdb_txn_begin(lm->mdb, NULL, MDB_RDONLY, &probe) == 0)
        mdb_txn_abort(probe);
    else if (rc)
        (void)settle(lm, 0);
    return rc == 0;
}

static void jobs_run(struct lm *lm, struct list *jobs)
{
    struct list *pos;
    while ((pos = list_pop(jobs))) {
        struct lm_job *job = container_of(pos, struct lm_job, link);
        job_run(lm, job);
        pthread_mutex_lock(&lm->queue_lock);
        job->finished = true;
        pthread_cond_broadcast(&lm->job_cond);
        pthread_mutex_unlock(&lm->queue_lock);
    }
}

/* Moves what fits into one transaction from `queue` into the round. */
static void round_fill(struct round *r, struct list *queue)
{
    uint64_t bytes = 0;
    r->n_commits = 0;
    while (!list_empty(queue) && r->n_commits < ROUND_COMMITS_MAX) {
        struct store_commit *c = container_of(queue->next, struct store_commit, link);
        for (size_t i = 0; i < c->n_mutations; i++)
            bytes += c->mutations[i].head.len + c->mutations[i].body.len;
        if (r->n_commits > 0 && bytes > ROUND_BYTES_MAX)
            break;
        list_remove(&c->link);
        r->commits[r->n_commits++] = c;
    }
}

/* Waits until there is something to do, `pause_ms` at most (0: without end). False: the
 * store is closing and nothing is left. */
static bool queue_wait(struct lm *lm, unsigned pause_ms, struct list *commits, struct list *waits,
                       struct list *jobs)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += pause_ms / 1000;
    until.tv_nsec += (long)(pause_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&lm->queue_lock);
    int rc = 0;
    while (list_empty(commits) && list_empty(&lm->commits) && list_empty(&lm->waits) &&
           list_empty(&lm->jobs) && !lm->stopping && rc != ETIMEDOUT)
        rc = pause_ms ? pthread_cond_timedwait(&lm->queue_cond, &lm->queue_lock, &until)
                      : pthread_cond_wait(&lm->queue_cond, &lm->queue_lock);
    list_splice_tail(commits, &lm->commits);
    list_splice_tail(waits, &lm->waits);
    list_splice_tail(jobs, &lm->jobs);
    bool go_on = !lm->stopping || !list_empty(commits) || !list_empty(waits) || !list_empty(jobs);
    pthread_mutex_unlock(&lm->queue_lock);
    return go_on;
}

static void *commit_thread(void *arg)
{
    struct lm *lm = arg;
    struct round *r = mem_zalloc(sizeof *r);
    r->lm = lm;
    r->value = mem_alloc(LM_VALUE_BYTES_MAX);
    r->payload = lm_payload_new(lm);
    r->warm = lm_warm_new(lm);
    struct list commits = LIST_INIT(commits), waits = LIST_INIT(waits), jobs = LIST_INIT(jobs);
    for (;;) {
        unsigned pause_ms = !list_empty(&waits)                      ? WAIT_AGAIN_MS
                            : lm->pending_units > 0 || lm->work_left ? IDLE_MS
                                                                     : 0;
        if (!queue_wait(lm, pause_ms, &commits, &waits, &jobs))
            break;
        jobs_run(lm, &jobs);
        round_fill(r, &commits);
        bool idle = r->n_commits == 0 && list_empty(&waits);
        if (idle && pause_ms == 0)
            continue;
        round_run(r, &waits, idle);
        if (r->n_commits > 0) {
            /* What was freed may be worth giving back once there is time. */
            lm->work_left = true;
            round_answer(r);
        }
        waits_answer(lm, &waits);
    }
    space_extents_free(&r->runs);
    lm_payload_free(r->payload);
    lm_warm_free(r->warm);
    free(r->value);
    free(r);
    return NULL;
}

enum status lm_commit_thread_start(struct lm *lm, struct err *e)
{
    int rc = pthread_create(&lm->commit_thread, NULL, commit_thread, lm);
    if (rc)
        return fail(e, ST_UNAVAIL, "cannot start a thread: %s", strerror(rc));
    lm->commit_thread_runs = true;
    return ST_OK;
}

void lm_commit_thread_stop(struct lm *lm)
{
    if (!lm->commit_thread_runs)
        return;
    pthread_mutex_lock(&lm->queue_lock);
    lm->stopping = true;
    pthread_cond_signal(&lm->queue_cond);
    pthread_mutex_unlock(&lm->queue_lock);
    pthread_join(lm->commit_thread, NULL);
    lm->commit_thread_runs = false;
}

static void enqueue(struct lm *lm, struct list *queue, struct list *link)
{
    pthread_mutex_lock(&lm->queue_lock);
    list_add_tail(queue, link);
    pthread_cond_signal(&lm->queue_cond);
    pthread_mutex_unlock(&lm->queue_lock);
}

void lm_commit(struct store *store, struct env *env, struct store_commit *commit)
{
    struct lm *lm = lm_of(store);
    commit->store = store;
    commit->env = env;
    if (commit->log)
        lm_log_commit_begin(commit);
    enqueue(lm, &lm->commits, &commit->link);
}

void lm_reserve_wait(struct store *store, struct env *env, struct store_reserve_wait *wait)
{
    struct lm *lm = lm_of(store);
    wait->store = store;
    wait->env = env;
    wait->result = ST_NOSPC;
    enqueue(lm, &lm->waits, &wait->link);
}

enum status lm_job_run(struct lm *lm, struct lm_job *job)
{
    job->finished = false;
    pthread_mutex_lock(&lm->queue_lock);
    list_add_tail(&lm->jobs, &job->link);
    pthread_cond_signal(&lm->queue_cond);
    while (!job->finished)
        pthread_cond_wait(&lm->job_cond, &lm->queue_lock);
    pthread_mutex_unlock(&lm->queue_lock);
    return job->result;
}
