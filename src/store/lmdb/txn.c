/*
 * LMDB transactions. Read transactions are cached, so that a read costs a renewal
 * and no allocation. Write transactions are taken by one thread and say in the
 * shared file that they hold the lock.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define READERS_IDLE_MAX 32u
/* As long as it is being settled whether a commit happened (commit.c), with some to spare. */
#define SETTLING_NS_MAX 10000000000u
#define SETTLING_LOOK_US 5000u
#define GHOST_LOOK_US 200u
#define VERSION_TRIES 64u
#define READER_SLOTS 512u
#define RESIDENT_FILE_BYTES_MAX (24ull << 20)

static void reader_free(struct lm_reader *reader)
{
    lm_tree_free(&reader->tree);
    if (reader->txn)
        mdb_txn_abort(reader->txn);
    free(reader);
}

/* Takes a cached reader, or NULL; counts it as out either way. */
static struct lm_reader *reader_pop(struct lm *lm)
{
    pthread_mutex_lock(&lm->env_lock);
    while (lm->closed)
        pthread_cond_wait(&lm->env_cond, &lm->env_lock);
    lm->n_readers_out++;
    struct lm_reader *reader = lm->readers;
    if (reader) {
        lm->readers = reader->next;
        lm->n_readers_idle--;
    }
    pthread_mutex_unlock(&lm->env_lock);
    return reader;
}

static void reader_put_back(struct lm *lm, struct lm_reader *reader)
{
    pthread_mutex_lock(&lm->env_lock);
    if (reader && lm->n_readers_idle < READERS_IDLE_MAX && !lm->closed) {
        reader->next = lm->readers;
        lm->readers = reader;
        lm->n_readers_idle++;
        reader = NULL;
    }
    pthread_mutex_unlock(&lm->env_lock);
    /* Freed before it is counted as back: until then LMDB stays open. */
    if (reader)
        reader_free(reader);
    pthread_mutex_lock(&lm->env_lock);
    if (--lm->n_readers_out == 0)
        pthread_cond_broadcast(&lm->env_cond);
    pthread_mutex_unlock(&lm->env_lock);
}

static int reader_start(struct lm *lm, struct lm_reader *reader)
{
    if (!reader->txn) {
        int rc = mdb_txn_begin(lm->mdb, NULL, MDB_RDONLY, &reader->txn);
        if (rc == MDB_READERS_FULL) {
            int dead;
            mdb_reader_check(lm->mdb, &dead);
            rc = mdb_txn_begin(lm->mdb, NULL, MDB_RDONLY, &reader->txn);
        }
        return rc;
    }
    return mdb_txn_renew(reader->txn);
}

/* A version's meta page is written over two versions later: where that has just happened there is
 * a newer one to be had. Where there is none the page is damaged. */
static enum status reader_look(struct lm_reader *reader)
{
    for (unsigned i = 0; i < VERSION_TRIES; i++) {
        uint64_t version = mdb_txn_id(reader->txn);
        enum status st = lm_tree_load(&reader->tree, version);
        if (st != ST_BUSY)
            return st;
        mdb_txn_reset(reader->txn);
        if (mdb_txn_renew(reader->txn))
            return ST_IO;
        if (mdb_txn_id(reader->txn) == version)
            break;
    }
    lm_tree_report(&reader->tree, mdb_txn_id(reader->txn) & 1);
    return ST_IO;
}

static enum status read_try(struct lm *lm, struct lm_reader **out, int *rc)
{
    struct lm_reader *reader = reader_pop(lm);
    if (!reader) {
        reader = mem_zalloc(sizeof *reader);
        lm_tree_init(&reader->tree, lm, READER_SLOTS);
    }
    *rc = atomic_load(&lm->broken) ? MDB_PANIC : reader_start(lm, reader);
    enum status st = *rc == MDB_READERS_FULL ? ST_UNAVAIL : lm_status(*rc);
    if (!st)
        st = reader_look(reader);
    if (st) {
        reader_free(reader);
        reader_put_back(lm, NULL);
        return st;
    }
    *out = reader;
    return ST_OK;
}

enum status lm_read_begin_now(struct lm *lm, struct lm_reader **out)
{
    int rc = 0;
    *out = NULL;
    enum status st = atomic_load(&lm->broken) ? ST_UNAVAIL : read_try(lm, out, &rc);
    if (rc)
        log_error("store %s: cannot begin a read: %s", lm->dir, mdb_strerror(rc));
    return st;
}

enum status lm_read_begin(struct lm *lm, struct lm_reader **out)
{
    *out = NULL;
    int rc;
    enum status st = read_try(lm, out, &rc);
    uint64_t since_ns = rc == MDB_PANIC ? lm_now_ns() : 0;
    /* LMDB gives nothing away after a commit of which it does not know whether it happened. The
     * commit thread finds out, also where it can't open LMDB again at once, and reads wait for
     * that. */
    while (rc == MDB_PANIC && lm_now_ns() - since_ns < SETTLING_NS_MAX) {
        usleep(SETTLING_LOOK_US);
        st = read_try(lm, out, &rc);
    }
    if (rc)
        log_error("store %s: cannot begin a read: %s", lm->dir, mdb_strerror(rc));
    return st;
}

void lm_read_end(struct lm *lm, struct lm_reader *reader)
{
    mdb_txn_reset(reader->txn);
    reader_put_back(lm, reader);
}

void lm_readers_drop(struct lm *lm)
{
    pthread_mutex_lock(&lm->env_lock);
    struct lm_reader *list = lm->readers;
    lm->readers = NULL;
    lm->n_readers_idle = 0;
    pthread_mutex_unlock(&lm->env_lock);
    while (list) {
        struct lm_reader *next = list->next;
        reader_free(list);
        list = next;
    }
}

/* Pages of files that are mapped here, and shared memory. */
static uint64_t resident_file_bytes(void)
{
    uint64_t shared = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f)
        return 0;
    if (fscanf(f, "%*u %*u %" SCNu64, &shared) != 1)
        shared = 0;
    fclose(f);
    return shared * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Every page of data.mdb that was ever read stays in the page tables and so counts as this
 * process's memory, up to the whole index: more than its memory limit, for pages that are
 * the page cache's. MADV_DONTNEED takes them out of the page tables, no more: the map is
 * shared and read-only (LMDB writes through its descriptor), so nothing is in it that the
 * page cache has not, and a reader in the middle of a page takes a minor fault and goes on.
 *
 * Counted as a reader, because LMDB is not closed (and its address not given to another
 * mapping) as long as one is out. */
void lm_map_trim(struct lm *lm)
{
    if (resident_file_bytes() <= RESIDENT_FILE_BYTES_MAX || atomic_load(&lm->broken))
        return;
    pthread_mutex_lock(&lm->env_lock);
    bool closed = lm->closed;
    lm->n_readers_out += !closed;
    pthread_mutex_unlock(&lm->env_lock);
    if (closed)
        return;
    (void)madvise(lm->map, lm->map_bytes, MADV_DONTNEED);
    reader_put_back(lm, NULL);
}

enum status lm_write_begin(struct lm *lm, MDB_txn **out)
{
    *out = NULL;
    if (atomic_load(&lm->broken))
        return ST_UNAVAIL;
    lm_lock_state_set(lm, LM_LOCK_WANTED);
    atomic_store(&lm->lock_wait_since_ns, lm_now_ns());
    int rc = mdb_txn_begin(lm->mdb, NULL, 0, out);
    /* The lock of one who died is free at once, while bodies it wrote may still be on their way to
     * the disk, into space that is free for us. Its slot is its own until they have arrived. */
    while (rc == 0 && lm_lock_has_ghost(lm))
        usleep(GHOST_LOOK_US);
    atomic_store(&lm->lock_wait_since_ns, 0);
    lm_lock_state_set(lm, rc ? LM_LOCK_NONE : LM_LOCK_HELD);
    if (rc) {
        *out = NULL;
        log_error("store %s: cannot begin a transaction: %s", lm->dir, mdb_strerror(rc));
        if (rc == MDB_PANIC)
            atomic_store(&lm->broken, true);
        return lm_status(rc);
    }
    enum status st = lm_guard_begin(lm->guard, mdb_txn_id(*out));
    if (st) {
        lm_write_abort(lm, *out);
        *out = NULL;
    }
    return st;
}

/* The state is taken back after the lock is gone. A process that is stopped just then
 * looks like a holder and is killed only if somebody waits for a lease time, while
 * nothing but it could have been in the way. */
int lm_write_commit(struct lm *lm, MDB_txn *txn)
{
    if (lm_guard_end(lm->guard)) {
        lm_write_abort(lm, txn);
        return MDB_CORRUPTED;
    }
    int rc = mdb_txn_commit(txn);
    lm_lock_state_set(lm, LM_LOCK_NONE);
    return rc;
}

void lm_write_abort(struct lm *lm, MDB_txn *txn)
{
    mdb_txn_abort(txn);
    lm_lock_state_set(lm, LM_LOCK_NONE);
}

enum status lm_reopen(struct lm *lm)
{
    pthread_mutex_lock(&lm->env_lock);
    lm->closed = true;
    while (lm->n_readers_out > 0)
        pthread_cond_wait(&lm->env_cond, &lm->env_lock);
    pthread_mutex_unlock(&lm->env_lock);
    lm_readers_drop(lm);
    lm->guard->base.loaded = false;
    lm_env_close(lm);
    struct err e = {0};
    enum status st = lm_env_open(lm, false, &e);
    if (st)
        log_error("cannot open the store %s again: %s", lm->dir, e.text);
    /* (What was in the way may go: whoever is told tries again.) */
    atomic_store(&lm->broken, st != ST_OK);
    pthread_mutex_lock(&lm->env_lock);
    lm->closed = false;
    pthread_cond_broadcast(&lm->env_cond);
    pthread_mutex_unlock(&lm->env_lock);
    return st;
}

/* mdb_reader_list() tells of the readers in text only: "pid thread txnid", with a dash for
 * a reader that looks at nothing. */
static int reader_line(const char *line, void *arg)
{
    uint64_t *oldest = arg;
    int pid;
    char thread[40];
    uint64_t txn_id;
    if (sscanf(line, "%d %39s %" SCNu64, &pid, thread, &txn_id) == 3 && txn_id < *oldest)
        *oldest = txn_id;
    return 0;
}

uint64_t lm_oldest_version(struct lm *lm, uint64_t txn_id)
{
    uint64_t oldest = txn_id - 1;
    if (mdb_reader_list(lm->mdb, reader_line, &oldest) < 0)
        return 0;
    if (oldest < txn_id - 1) {
        /* Perhaps a reader that died. */
        int dead = 0;
        if (mdb_reader_check(lm->mdb, &dead) == 0 && dead > 0) {
            oldest = txn_id - 1;
            if (mdb_reader_list(lm->mdb, reader_line, &oldest) < 0)
                return 0;
        }
    }
    return oldest;
}
