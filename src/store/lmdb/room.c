/*
 * Room: what lets a write be answered before its data has its place (G6).
 *
 * A reservation is a number taken against a claim. A claim is the part of the
 * free space that this process may use; the claims of all processes together
 * never exceed what is free, because each sets its own inside a write
 * transaction. So reserving is two additions, and a commit that was reserved
 * finds its space, in the data file and in LMDB's file.
 *
 * LMDB's pages are counted by what keys can cost at worst: the page a key lies
 * in is copied, may be split, and so may the one that holds the free runs. The
 * file is allocated ahead of LMDB's last page by what is reserved and by an
 * emergency part, which trims and clean-up use when the disk is full.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/log.h"
#include "store/lmdb/engine.h"

#define INDEX_BYTES_PER_KEY 12288u
#define DATA_STEP_BYTES_MAX (64ull << 20)
#define DATA_STEP_BYTES_MIN (1ull << 20)
#define INDEX_STEP_BYTES_MAX (16ull << 20)
#define INDEX_STEP_BYTES_MIN (64ull << 10)
#define CLAIM_AHEAD_UNITS ((int64_t)(256ull << 20) / SPACE_UNIT_BYTES)
#define CLAIM_AHEAD_INDEX ((int64_t)(32ull << 20))
#define INDEX_TIGHT_BYTES ((int64_t)(1ull << 20))
#define GROW_STEPS_MAX 4096

enum status lm_space_read(struct lm_reader *reader, struct space *sp)
{
    *sp = (struct space){.data_units = 1, .next = 1};
    MDB_val v;
    struct slice key = {space_record_key, sizeof space_record_key - 1};
    enum status st = lm_tree_get(&reader->tree, LM_DB_STORE, key, &v);
    return st == ST_NOTFOUND ? ST_OK : st ? st : space_parse(sp, &v);
}

uint64_t lm_body_cost(const struct store *store, uint64_t body_len)
{
    (void)store;
    return round_up_u64(body_len, SPACE_UNIT_BYTES);
}

uint64_t lm_index_cost(uint64_t keys)
{
    return keys * INDEX_BYTES_PER_KEY;
}

static int64_t units_of(uint64_t bytes)
{
    return (int64_t)((bytes + SPACE_UNIT_BYTES - 1) / SPACE_UNIT_BYTES);
}

bool lm_reserve(struct store *store, struct store_reservation want)
{
    struct lm *lm = lm_of(store);
    int64_t units = units_of(want.body_bytes), index = (int64_t)lm_index_cost(want.keys);
    if (units + atomic_fetch_add(&lm->reserved_units, units) > atomic_load(&lm->claim_units)) {
        atomic_fetch_sub(&lm->reserved_units, units);
        return false;
    }
    if (index + atomic_fetch_add(&lm->reserved_index, index) > atomic_load(&lm->claim_index)) {
        atomic_fetch_sub(&lm->reserved_index, index);
        atomic_fetch_sub(&lm->reserved_units, units);
        return false;
    }
    return true;
}

void lm_unreserve(struct store *store, struct store_reservation what)
{
    struct lm *lm = lm_of(store);
    atomic_fetch_sub(&lm->reserved_units, units_of(what.body_bytes));
    atomic_fetch_sub(&lm->reserved_index, (int64_t)lm_index_cost(what.keys));
}

static uint64_t index_used_bytes(struct lm *lm)
{
    MDB_envinfo info;
    mdb_env_info(lm->mdb, &info);
    return (info.me_last_pgno + 1) * (uint64_t)lm->page_bytes;
}

static uint64_t disk_available(struct lm *lm)
{
    struct statvfs vfs;
    if (fstatvfs(lm->dir_fd, &vfs) < 0)
        return 0;
    return (uint64_t)vfs.f_bavail * vfs.f_frsize;
}

/* Pages of LMDB's own free list that this transaction may use. A walk, so only where the
 * room ahead of the last page does not do. */
static uint64_t index_free_listed(struct lm *lm, MDB_txn *txn)
{
    uint64_t pages = 0, oldest = lm_oldest_version(lm, mdb_txn_id(txn));
    struct lm_cursor c = lm_cursor(&lm->guard->base, LM_DB_PAGES);
    MDB_val k, v;
    enum status st = lm_cursor_first(&c, &k, &v);
    for (; !st; st = lm_cursor_next(&c, &k, &v)) {
        size_t id, n;
        if (k.mv_size != sizeof id || v.mv_size < sizeof n)
            break;
        memcpy(&id, k.mv_data, sizeof id);
        memcpy(&n, v.mv_data, sizeof n);
        if (id >= oldest)
            break;
        pages += n;
    }
    return pages * lm->page_bytes;
}

/* Allocates data.mdb up to `end`, or as far towards it as the disk goes; in steps that leave most of a
 * small disk to bodies. */
static void index_back(struct lm *lm, uint64_t end)
{
    mdb_filehandle_t fd;
    mdb_env_get_fd(lm->mdb, &fd);
    uint64_t part = round_up_u64(disk_available(lm) / 16 + 1, INDEX_STEP_BYTES_MIN);
    uint64_t step = min_u64(part, INDEX_STEP_BYTES_MAX);
    for (int i = 0; i < GROW_STEPS_MAX && lm->index_end < end; i++) {
        uint64_t to = lm->index_end + step;
        if (lm->index_end == 0)
            to = round_up_u64(index_used_bytes(lm), INDEX_STEP_BYTES_MIN);
        int rc = 0;
        if (lm->no_fallocate) {
            rc = disk_available(lm) > to - lm->index_end ? 0 : -1;
            errno = ENOSPC;
        } else {
            do
                rc = fallocate(fd, 0, (off_t)lm->index_end, (off_t)(to - lm->index_end));
            while (rc < 0 && errno == EINTR);
        }
        if (rc == 0) {
            lm->index_end = to;
        } else if (errno == EOPNOTSUPP && !lm->no_fallocate) {
            lm->no_fallocate = true;
            log_warning("the file system of %s cannot set space aside: should it fill up, writes "
                        "that were answered may fail to reach the store",
                        lm->dir);
        } else if (step > INDEX_STEP_BYTES_MIN && lm->index_end != 0) {
            step /= 2;
        } else {
            return;
        }
    }
}

/* What of data.mdb all claims of this process may come to. Where the part ahead of the last
 * page is not `enough`, LMDB's free list counts as well. */
static int64_t index_max(struct lm *lm, MDB_txn *txn, int64_t others, int64_t enough)
{
    uint64_t used = index_used_bytes(lm);
    int64_t room = (int64_t)lm->index_end - (int64_t)used - (int64_t)lm->emergency_bytes - others;
    if (room >= enough || lm->index_end == 0) {
        lm->index_tight = false;
        return room;
    }
    lm->index_tight = true;
    return room + (int64_t)index_free_listed(lm, txn);
}

void lm_index_ahead(struct lm *lm)
{
    uint64_t want = index_used_bytes(lm) + lm->emergency_bytes;
    int64_t reserved = atomic_load(&lm->reserved_index);
    if (reserved > 0)
        want += (uint64_t)reserved;
    if (lm->index_end < want)
        index_back(lm, want);
}

/* What the transaction at hand took for its commits is reserved as well until they are
 * answered; it must not count twice. */
int64_t lm_spare_units(struct lm *lm, const struct space *sp)
{
    return (int64_t)sp->free_units + lm->round_units - lm_claims_of_others(lm).units -
           atomic_load(&lm->reserved_units);
}

int64_t lm_spare_index(struct lm *lm, MDB_txn *txn)
{
    int64_t reserved = atomic_load(&lm->reserved_index);
    return index_max(lm, txn, lm_claims_of_others(lm).index, reserved) - reserved;
}

/* Gives a hole its space back, or lengthens the file, by about `step` bytes. */
static enum status grow_once(struct lm *lm, struct space *sp, uint64_t step)
{
    uint64_t units = step / SPACE_UNIT_BYTES;
    struct space_extent hole;
    enum status st = space_hole_first(sp, &hole);
    if (st == ST_OK) {
        units = min_u64(units, hole.units);
        st = lm_datafile_back(lm, hole.start, units);
        return st ? st : space_hole_backed(sp, &hole, units);
    }
    if (st != ST_NOTFOUND)
        return st;
    st = lm_datafile_back(lm, sp->data_units, units);
    if (st)
        return st;
    uint64_t start = sp->data_units;
    sp->data_units += units;
    return space_free_now(sp, start, units);
}

enum status lm_make_room(struct lm *lm, struct space *sp, uint64_t units, uint64_t index)
{
    struct lm_claims others = lm_claims_of_others(lm);
    uint64_t disk = disk_available(lm);
    int64_t reserved = atomic_load(&lm->reserved_index);
    uint64_t ahead = min_u64(disk / 16, INDEX_STEP_BYTES_MAX);
    uint64_t want = index_used_bytes(lm) + lm->emergency_bytes + index + ahead;
    if (reserved + others.index > 0)
        want += (uint64_t)(reserved + others.index);
    /* Half the step ahead is enough to do without another one. */
    if (lm->index_end < want - ahead / 2)
        index_back(lm, want);

    uint64_t step = min_u64(disk / 16, DATA_STEP_BYTES_MAX);
    step = round_up_u64(step < DATA_STEP_BYTES_MIN ? DATA_STEP_BYTES_MIN : step, SPACE_UNIT_BYTES);
    int64_t low = (int64_t)units + (int64_t)(step / SPACE_UNIT_BYTES / 2);
    int64_t spare = lm_spare_units(lm, sp);
    for (int i = 0; i < GROW_STEPS_MAX && spare < low; i++) {
        uint64_t lack = (uint64_t)(low - spare) * SPACE_UNIT_BYTES;
        uint64_t before = sp->free_units;
        enum status st = grow_once(lm, sp, round_up_u64(lack, step));
        if (st == ST_NOSPC && step > DATA_STEP_BYTES_MIN) {
            step = round_up_u64(step / 2, SPACE_UNIT_BYTES);
            low = (int64_t)units;
            continue;
        }
        if (st == ST_NOSPC)
            break;
        if (st)
            return st;
        spare += (int64_t)(sp->free_units - before);
    }
    if (spare < (int64_t)units || lm_spare_index(lm, sp->txn) < (int64_t)index)
        return ST_NOSPC;
    return ST_OK;
}

static int64_t claim_of(int64_t max, int64_t reserved, int64_t ahead)
{
    int64_t rest = max - reserved;
    int64_t want = reserved + (rest / 2 > ahead ? rest / 2 : ahead);
    int64_t claim = want < max ? want : max;
    return claim > 0 ? claim : 0;
}

static int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

void lm_claims_prepare(struct lm *lm, const struct space *sp, MDB_txn *txn,
                       struct lm_claims *claims)
{
    struct lm_claims others = lm_claims_of_others(lm);
    struct lm_claims old = {atomic_load(&lm->claim_units), atomic_load(&lm->claim_index)};
    lm->claims_before = old;
    int64_t units_max = (int64_t)sp->free_units - others.units;
    int64_t reserved_index = atomic_load(&lm->reserved_index);
    int64_t idx_max = index_max(lm, txn, others.index, reserved_index + INDEX_TIGHT_BYTES);
    claims->units = claim_of(units_max, atomic_load(&lm->reserved_units), CLAIM_AHEAD_UNITS);
    claims->index = claim_of(idx_max, reserved_index, CLAIM_AHEAD_INDEX);
    atomic_store(&lm->claim_units, min_i64(old.units, claims->units));
    atomic_store(&lm->claim_index, min_i64(old.index, claims->index));
    /* What was reserved against the old claim in the meantime stays good: either its taker
     * saw the lower claim, or its reservation is seen here. */
    claims->units = max_i64(claims->units, min_i64(units_max, atomic_load(&lm->reserved_units)));
    claims->index = max_i64(claims->index, min_i64(idx_max, atomic_load(&lm->reserved_index)));
    lm->index_used_before = index_used_bytes(lm);
    struct lm_claims both = {max_i64(old.units, claims->units), max_i64(old.index, claims->index)};
    lm_claims_share(lm, &both);
}

void lm_claims_publish(struct lm *lm, const struct lm_claims *claims, bool committed)
{
    struct lm_claims c = committed ? *claims : lm->claims_before;
    if (committed) {
        c.index -= (int64_t)(index_used_bytes(lm) - lm->index_used_before);
        if (lm->index_tight)
            c.index = min_i64(c.index, atomic_load(&lm->reserved_index));
    }
    lm_claims_share(lm, &c);
    atomic_store(&lm->claim_units, c.units);
    atomic_store(&lm->claim_index, c.index);
}
