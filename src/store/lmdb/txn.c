/*
 * LMDB transactions. Read transactions are cached with their cursors, so that a
 * read costs a renewal and no allocation. Write transactions are taken by one
 * thread and say in the shared file that they hold the lock.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define READERS_IDLE_MAX 32u
#define GHOST_LOOK_US 200u
#define RESIDENT_FILE_BYTES_MAX (24ull << 20)

static void reader_free(struct lm_reader *reader)
{
    if (reader->cursor)
        mdb_cursor_close(reader->cursor);
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
        return rc ? rc : mdb_cursor_open(reader->txn, lm->keys_dbi, &reader->cursor);
    }
    int rc = mdb_txn_renew(reader->txn);
    return rc ? rc : mdb_cursor_renew(reader->txn, reader->cursor);
}

enum status lm_read_begin(struct lm *lm, struct lm_reader **out)
{
    *out = NULL;
    if (atomic_load(&lm->broken))
        return ST_UNAVAIL;
    struct lm_reader *reader = reader_pop(lm);
    if (!reader)
        reader = mem_zalloc(sizeof *reader);
    int rc = atomic_load(&lm->broken) ? MDB_PANIC : reader_start(lm, reader);
    if (rc) {
        log_error("store %s: cannot begin a read: %s", lm->dir, mdb_strerror(rc));
        lm_read_end(lm, reader, true);
        return rc == MDB_READERS_FULL ? ST_UNAVAIL : lm_status(rc);
    }
    *out = reader;
    return ST_OK;
}

void lm_read_end(struct lm *lm, struct lm_reader *reader, bool failed)
{
    if (failed) {
        reader_free(reader);
        reader = NULL;
    } else {
        mdb_txn_reset(reader->txn);
    }
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

bool lm_map_find(struct lm *lm, void **map, size_t *len)
{
    struct stat sb;
    FILE *maps = NULL;
    if (fstatat(lm->dir_fd, "data.mdb", &sb, 0) == 0)
        maps = fopen("/proc/self/maps", "re");
    if (!maps)
        return false;
    /* Some file systems (btrfs, overlays) show another device here than stat() does: then
     * the name and the inode will do, where they fit one mapping only. */
    unsigned exact = 0, alike = 0;
    char line[8192];
    while (fgets(line, sizeof line, maps)) {
        uint64_t from, to, ino;
        unsigned dev_major, dev_minor;
        char perms[8];
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %7s %*x %x:%x %" SCNu64, &from, &to, perms,
                   &dev_major, &dev_minor, &ino) != 6 ||
            ino != sb.st_ino || strcmp(perms, "r--s") != 0 || !strstr(line, "/data.mdb\n"))
            continue;
        bool same = dev_major == major(sb.st_dev) && dev_minor == minor(sb.st_dev);
        alike++;
        if (exact && !same)
            continue;
        exact += same;
        *map = (void *)(uintptr_t)from;
        *len = (size_t)(to - from);
    }
    fclose(maps);
    return exact == 1 || (exact == 0 && alike == 1);
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
 * mapping) as long as one is out; looked up anew each time for the same reason. */
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
    void *map;
    size_t len;
    if (lm_map_find(lm, &map, &len))
        (void)madvise(map, len, MADV_DONTNEED);
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
    return ST_OK;
}

/* The state is taken back after the lock is gone. A process that is stopped just then
 * looks like a holder and is killed only if somebody waits for a lease time, while
 * nothing but it could have been in the way. */
int lm_write_commit(struct lm *lm, MDB_txn *txn)
{
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
    lm_env_close(lm);
    struct err e = {0};
    enum status st = lm_env_open(lm, false, &e);
    if (st) {
        log_error("cannot open the store %s again: %s", lm->dir, e.text);
        atomic_store(&lm->broken, true);
    }
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
