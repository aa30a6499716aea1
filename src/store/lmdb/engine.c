/*
 * Opening and closing a store in a folder: finds or makes its files, checks that
 * this build understands them, starts its threads.
 */
#include "store/lmdb/engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/fsuid.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "store/engines.h"

#define FORMAT_VERSION 1u
#define FEATURES_COMPAT_KNOWN 0ull
#define FEATURE_SEALED 1ull /* every page of data.mdb has a seal (seal.c) */
#define FEATURES_RO_COMPAT_KNOWN FEATURE_SEALED
#define FEATURES_INCOMPAT_KNOWN 0ull

#define META_BYTES 64u
#define MAP_BYTES_MAX (1ull << 40)
#define MAP_BYTES_MIN (16ull << 20)
#define READERS_MAX 1024u
#define NAMED_DBS_MAX 8u
#define EMERGENCY_BYTES_MIN (4ull << 20)
#define EMERGENCY_BYTES_MAX (32ull << 20)
#define LEASE_MS_MIN 100u
#define FLOCK_WAIT_NS 5000000000u
#define OPEN_SLOTS 64u
#define LOOK_TRIES 5u
#define LOOK_PAUSE_US 1000u

static const char meta_key[] = "store";
static const char making_name[] = "making";

/* LMDB must not be opened twice in one process: closing one would drop the other's locks. */
static pthread_mutex_t open_lock = PTHREAD_MUTEX_INITIALIZER;
static struct list open_stores = LIST_INIT(open_stores);

uint64_t lm_now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_BOOTTIME, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

bool lm_may_tell(_Atomic uint64_t *told_ns, uint64_t every_ns)
{
    uint64_t now = lm_now_ns(), told = atomic_load(told_ns);
    return (told == 0 || now - told >= every_ns) &&
           atomic_compare_exchange_strong(told_ns, &told, now);
}

void lm_id_text(const uint8_t id[STORE_ID_BYTES], char text[LM_ID_TEXT_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < STORE_ID_BYTES; i++) {
        text[2 * i] = digits[id[i] >> 4];
        text[2 * i + 1] = digits[id[i] & 15];
    }
    text[2 * STORE_ID_BYTES] = '\0';
}

enum status lm_status(int rc)
{
    switch (rc) {
    case 0:
        return ST_OK;
    case MDB_NOTFOUND:
        return ST_NOTFOUND;
    case MDB_MAP_FULL:
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return ST_NOSPC;
    case MDB_READERS_FULL:
    case MDB_MAP_RESIZED:
    case MDB_PANIC:
    case EACCES:
    case EROFS:
    case ENOMEM:
    case EMFILE:
    case ENFILE:
        return ST_UNAVAIL;
    case MDB_VERSION_MISMATCH:
    case MDB_INVALID:
        return ST_FORMAT;
    default:
        return ST_IO;
    }
}

void lm_file_adopt(const struct lm *lm, int fd)
{
    if (fchown(fd, lm->uid, lm->gid) < 0)
        (void)!fchown(fd, (uid_t)-1, lm->gid);
    (void)fchmod(fd, lm->mode);
}

/* setfsuid() tells no errors, and a number that no user has changes nothing: so it is asked. */
static bool files_as(uid_t uid, gid_t gid)
{
    setfsgid(gid);
    setfsuid(uid);
    return (uid_t)setfsuid((uid_t)-1) == uid;
}

bool lm_owner_begin(const struct lm *lm)
{
    if (geteuid() != 0 || lm->uid == 0 || (uid_t)setfsuid((uid_t)-1) == lm->uid)
        return false;
    if (files_as(lm->uid, lm->gid))
        return true;
    lm_owner_end(true);
    return false;
}

void lm_owner_end(bool begun)
{
    if (begun)
        (void)files_as(geteuid(), getegid());
}

/* Files that LMDB makes itself. */
static void adopt_by_name(const struct lm *lm, const char *name)
{
    int fd = openat(lm->dir_fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return;
    if (fchownat(fd, "", lm->uid, lm->gid, AT_EMPTY_PATH) < 0)
        (void)!fchownat(fd, "", (uid_t)-1, lm->gid, AT_EMPTY_PATH);
    close(fd);
    (void)!fchmodat(lm->dir_fd, name, lm->mode, 0);
}

static int env_try(struct lm *lm, size_t map_bytes)
{
    int rc = mdb_env_create(&lm->mdb);
    if (rc)
        return rc;
    rc = mdb_env_set_mapsize(lm->mdb, map_bytes);
    if (!rc)
        rc = mdb_env_set_maxreaders(lm->mdb, READERS_MAX);
    if (!rc)
        rc = mdb_env_set_maxdbs(lm->mdb, NAMED_DBS_MAX);
    if (!rc) {
        /* The owner may have no way there by the folder's name, where only root has one. */
        char here[40];
        bool as_owner = geteuid() == 0 && lm->uid != 0;
        snprintf(here, sizeof here, "/proc/self/fd/%d", lm->dir_fd);
        rc = mdb_env_open(lm->mdb, as_owner ? here : lm->dir, MDB_NORDAHEAD | MDB_NOTLS, lm->mode);
    }
    if (!rc) {
        mdb_filehandle_t fd;
        mdb_env_get_fd(lm->mdb, &fd);
        /* Else it is another copy of LMDB, one that does not call what it must. */
        CHECK(lm_seal_map(fd, &lm->map, &lm->map_bytes));
    }
    if (rc)
        lm_env_close(lm);
    return rc;
}

static int dbis_open(struct lm *lm, MDB_txn *txn, unsigned flags)
{
    MDB_dbi *const dbis[LM_DBS] = {
        [LM_DB_STORE] = &lm->store_dbi,        [LM_DB_KEYS] = &lm->keys_dbi,
        [LM_DB_LOGS] = &lm->logs_dbi,          [LM_DB_FREE] = &lm->space_dbis.free,
        [LM_DB_HOLES] = &lm->space_dbis.holes, [LM_DB_PENDING] = &lm->space_dbis.pending,
    };
    for (size_t i = 0; i < LM_DBS; i++) {
        int rc = mdb_dbi_open(txn, lm_db_names[i], flags, dbis[i]);
        if (rc)
            return rc;
    }
    lm->space_dbis.store = lm->store_dbi;
    return 0;
}

static enum status meta_read(struct lm *lm, struct lm_tree *tree, struct err *e)
{
    MDB_val v;
    enum status st =
        lm_tree_get(tree, LM_DB_STORE, (struct slice){meta_key, sizeof meta_key - 1}, &v);
    if (st)
        return fail(e, st, "cannot read the description of the store %s: %s", lm->dir,
                    status_text(st));
    uint8_t meta[META_BYTES];
    if (v.mv_size != META_BYTES)
        return fail(e, ST_FORMAT, "%s is no store this program knows", lm->dir);
    memcpy(meta, v.mv_data, sizeof meta);
    if (get_le64(meta) != hash64(meta + 8, META_BYTES - 8, 0))
        return fail(e, ST_FORMAT,
                    "the description of the store %s is damaged: restore it from a backup",
                    lm->dir);
    uint32_t version = get_le32(meta + 8);
    uint64_t ro_compat = get_le64(meta + 24) & ~FEATURES_RO_COMPAT_KNOWN;
    uint64_t incompat = get_le64(meta + 32) & ~FEATURES_INCOMPAT_KNOWN;
    if (version != FORMAT_VERSION || incompat || ro_compat)
        return fail(e, ST_FORMAT,
                    "the store %s was written by a newer version of this program (format %u, "
                    "features %#llx): use that version",
                    lm->dir, version, (unsigned long long)(incompat | ro_compat));
    memcpy(lm->uuid, meta + 40, STORE_ID_BYTES);
    if (lm->sealed != ((get_le64(meta + 24) & FEATURE_SEALED) != 0))
        return fail(e, ST_FORMAT,
                    "%s/blocks and %s/data.mdb do not belong together: restore the whole folder from "
                    "one backup",
                    lm->dir, lm->dir);
    return ST_OK;
}

static int meta_write(struct lm *lm, MDB_txn *txn)
{
    uint8_t meta[META_BYTES] = {0};
    put_le32(meta + 8, FORMAT_VERSION);
    put_le32(meta + 12, SPACE_UNIT_BYTES);
    put_le64(meta + 16, FEATURES_COMPAT_KNOWN);
    put_le64(meta + 24, lm->sealed ? FEATURE_SEALED : 0);
    put_le64(meta + 32, FEATURES_INCOMPAT_KNOWN);
    memcpy(meta + 40, lm->uuid, STORE_ID_BYTES);
    put_le64(meta, hash64(meta + 8, META_BYTES - 8, 0));
    MDB_val k = {sizeof meta_key - 1, (void *)(uintptr_t)meta_key}, v = {sizeof meta, meta};
    return mdb_put(txn, lm->store_dbi, &k, &v, MDB_NOOVERWRITE);
}

/* Makes the databases and the description of a new store. Alone in the folder: the caller
 * holds its lock. */
static enum status store_format(struct lm *lm, struct err *e)
{
    lm->sealed = true;
    if (getrandom(lm->uuid, sizeof lm->uuid, 0) != (ssize_t)sizeof lm->uuid)
        return fail(e, ST_UNAVAIL, "cannot draw a random store id: %s", strerror(errno));
    MDB_txn *txn;
    int rc = mdb_txn_begin(lm->mdb, NULL, 0, &txn);
    if (rc)
        return fail(e, lm_status(rc), "cannot write the store %s: %s", lm->dir, mdb_strerror(rc));
    rc = dbis_open(lm, txn, MDB_CREATE);
    if (!rc)
        rc = meta_write(lm, txn);
    if (rc) {
        mdb_txn_abort(txn);
        return fail(e, lm_status(rc), "cannot write the store %s: %s", lm->dir, mdb_strerror(rc));
    }
    enum status st = lm_datafile_open(lm, true, e);
    if (st) {
        mdb_txn_abort(txn);
        return st;
    }
    close(lm->blocks_fd);
    lm->blocks_fd = -1;
    rc = mdb_txn_commit(txn);
    if (rc)
        return fail(e, lm_status(rc), "cannot write the store %s: %s", lm->dir, mdb_strerror(rc));
    return ST_OK;
}

static int env_begin(struct lm *lm)
{
    /* Address space may be limited; the map need only be as large as the index grows. */
    int rc = ENOMEM;
    lm_touch_begin();
    for (uint64_t size = MAP_BYTES_MAX; rc == ENOMEM && size >= MAP_BYTES_MIN; size /= 2)
        rc = env_try(lm, size);
    return rc;
}

/* The newest version, before others may read. */
static enum status version_open(struct lm *lm, MDB_txn **txn, struct lm_tree *tree)
{
    lm_tree_init(tree, lm, OPEN_SLOTS);
    enum status st = ST_BUSY;
    for (unsigned i = 0; i < LOOK_TRIES && st == ST_BUSY; i++) {
        int rc = mdb_txn_begin(lm->mdb, NULL, MDB_RDONLY, txn);
        st = rc ? lm_status(rc) : lm_tree_load(tree, mdb_txn_id(*txn));
        if (!rc && st)
            mdb_txn_abort(*txn);
    }
    if (st)
        lm_tree_free(tree);
    return st == ST_BUSY ? ST_IO : st;
}

static void version_close(MDB_txn *txn, struct lm_tree *tree)
{
    lm_tree_free(tree);
    mdb_txn_abort(txn);
}

/* How many pages from `first` on LMDB's free list names. */
static uint64_t pages_free_from(struct lm *lm, uint64_t first)
{
    MDB_txn *txn;
    struct lm_tree tree;
    uint64_t pages = 0;
    if (version_open(lm, &txn, &tree))
        return 0;
    struct lm_cursor c = lm_cursor(&tree, LM_DB_PAGES);
    MDB_val k, v;
    enum status st = lm_cursor_first(&c, &k, &v);
    for (; !st; st = lm_cursor_next(&c, &k, &v)) {
        const size_t *list = v.mv_data;
        size_t n = v.mv_size / sizeof *list;
        for (size_t i = 1; i < n && i <= list[0]; i++)
            pages += list[i] >= first;
    }
    version_close(txn, &tree);
    return pages;
}

/* A read behind the end of a mapped file is a SIGBUS, so a file that was cut short must be
 * seen before. The one whole file that is shorter than LMDB's last page ends in pages that
 * were taken and freed within one transaction: never written, and never read. */
static enum status length_check(struct lm *lm, struct err *e)
{
    MDB_envinfo info;
    MDB_stat stat;
    struct stat sb;
    /* In this order: the file may grow in between, and does not shrink. */
    mdb_env_info(lm->mdb, &info);
    mdb_env_stat(lm->mdb, &stat);
    lm->page_bytes = stat.ms_psize;
    uint64_t need = ((uint64_t)info.me_last_pgno + 1) * stat.ms_psize;
    if (fstatat(lm->dir_fd, "data.mdb", &sb, 0) < 0)
        return fail(e, ST_UNAVAIL, "cannot look at %s/data.mdb: %s", lm->dir, strerror(errno));
    uint64_t there = (uint64_t)sb.st_size;
    if (there >= need)
        return ST_OK;
    bool whole = false;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t from = (there + page - 1) / page * page, to = (need + page - 1) / page * page;
    if (to <= lm->map_bytes) {
        /* Zeros in the place of what is missing, so that the free list can be walked. */
        whole = from == to || mmap(lm->map + from, to - from, PROT_READ,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
        uint64_t first = there / stat.ms_psize;
        whole = whole && pages_free_from(lm, first) == info.me_last_pgno + 1 - first;
    }
    lm_env_close(lm);
    if (!whole)
        return fail(e, ST_UNAVAIL,
                    "%s/data.mdb is cut short: %llu bytes, needs %llu; restore it from a backup",
                    lm->dir, (unsigned long long)there, (unsigned long long)need);
    int rc = env_begin(lm);
    return rc ? fail(e, lm_status(rc), "cannot open the store %s: %s", lm->dir, mdb_strerror(rc))
              : ST_OK;
}

/* Whether both of LMDB's meta pages are what was written, and of versions that follow each other.
 * LMDB goes by whichever has the higher number and looks like one: with the newer one
 * damaged, an older state would come back without a word. A meta page lies in one sector and so is
 * written whole or not at all, also where the power goes; therefore a damaged one is damage. */
static bool metas_fit(int fd, unsigned *slot)
{
    uint8_t metas[2][LM_META_BYTES];
    uint64_t page_bytes = 0;
    for (*slot = 0; *slot < 2; ++*slot) {
        if (pread(fd, metas[*slot], LM_META_BYTES, (off_t)(*slot * page_bytes)) != LM_META_BYTES ||
            !lm_seal_meta_fits(metas[*slot], *slot))
            return false;
        page_bytes = get_le32(metas[0] + LM_META_FREE_AT);
    }
    uint64_t a = get_le64(metas[0] + LM_META_TXN_AT), b = get_le64(metas[1] + LM_META_TXN_AT);
    return (a == 0 && b == 0) || (a % 2 == 0 && (b == a + 1 || b + 1 == a));
}

static enum status metas_check(struct lm *lm, struct err *e)
{
    int fd = openat(lm->dir_fd, "data.mdb", O_RDONLY | O_CLOEXEC);
    struct stat sb;
    if (fd < 0 && errno != ENOENT)
        return fail(e, ST_UNAVAIL, "cannot open %s/data.mdb: %s", lm->dir, strerror(errno));
    if (fd < 0 || fstat(fd, &sb) < 0 || sb.st_size == 0) {
        if (fd >= 0)
            close(fd);
        return ST_OK; /* LMDB will say so, or make it */
    }
    unsigned slot;
    bool fit = metas_fit(fd, &slot);
    /* Others may be writing them just now. */
    for (unsigned i = 0; i < LOOK_TRIES && !fit; i++) {
        usleep(LOOK_PAUSE_US);
        fit = metas_fit(fd, &slot);
    }
    close(fd);
    if (fit)
        return ST_OK;
    if (slot < 2)
        return fail(e, ST_IO,
                    "meta page %u of %s/data.mdb is damaged, so that nobody can tell what was "
                    "committed last: restore the store from a backup",
                    slot, lm->dir);
    return fail(e, ST_IO,
                "the meta pages of %s/data.mdb do not follow each other: one of them was lost; "
                "restore the store from a backup",
                lm->dir);
}

/* Opens the databases of a store that is there; ST_NOTFOUND: nothing was ever committed. */
static enum status store_read_in(struct lm *lm, struct err *e)
{
    MDB_txn *txn;
    struct lm_tree tree;
    enum status st = version_open(lm, &txn, &tree);
    if (st)
        return fail(e, st, "cannot read the store %s: %s", lm->dir,
                    st == ST_IO ? "data.mdb is damaged; restore it from a backup"
                                : status_text(st));
    if (tree.roots[LM_DB_MAIN].depth == 0) {
        version_close(txn, &tree);
        return ST_NOTFOUND;
    }
    st = meta_read(lm, &tree, e);
    lm_tree_free(&tree);
    int rc = st ? 0 : dbis_open(lm, txn, 0);
    if (st || rc)
        mdb_txn_abort(txn);
    else
        /* Handles opened in a transaction are kept only if it is committed. */
        mdb_txn_commit(txn);
    /* (What is missing here must not look like a store that was never made.) */
    return rc ? fail(e, rc == MDB_NOTFOUND ? ST_IO : lm_status(rc), "cannot read the store %s: %s",
                     lm->dir, mdb_strerror(rc))
              : st;
}

enum status lm_env_open(struct lm *lm, bool create, struct err *e)
{
    enum status st = lm_datafile_look(lm, e);
    if (!st && lm->sealed)
        st = metas_check(lm, e);
    if (st)
        return st;
    int rc = env_begin(lm);
    if (rc)
        return fail(e, lm_status(rc), "cannot open the store %s: %s", lm->dir, mdb_strerror(rc));
    st = length_check(lm, e);
    if (!st)
        st = store_read_in(lm, e);
    if (st != ST_NOTFOUND)
        return st;
    if (!create)
        return fail(e, ST_NOTFOUND, "there is no store in %s: one was begun there and not finished",
                    lm->dir);
    return store_format(lm, e);
}

void lm_env_close(struct lm *lm)
{
    if (lm->mdb)
        mdb_env_close(lm->mdb);
    lm->mdb = NULL;
}

/* mkdir -p; the last is for this user alone, as all that will be in it. */
static int folders_make(const char *path)
{
    char part[sizeof((struct lm *)0)->dir];
    size_t len = strlen(path);
    for (size_t i = 1; i <= len; i++) {
        if (path[i] != '/' && path[i] != '\0')
            continue;
        memcpy(part, path, i);
        part[i] = '\0';
        if (mkdir(part, path[i] ? 0750 : 0700) < 0 && errno != EEXIST)
            return -1;
    }
    return 0;
}

static int subfolder_open(struct lm *lm, const char *name)
{
    if (mkdirat(lm->dir_fd, name, 0700) == 0) {
        int fd = openat(lm->dir_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        struct stat sb;
        if (fd >= 0 && fstat(lm->dir_fd, &sb) == 0) {
            if (fchown(fd, lm->uid, lm->gid) < 0)
                (void)!fchown(fd, (uid_t)-1, lm->gid);
            (void)fchmod(fd, sb.st_mode & 07777);
        }
        if (fd >= 0 && fsync(lm->dir_fd) < 0) {
            int why = errno;
            close(fd);
            errno = why;
            return -1;
        }
        return fd;
    }
    int why = errno;
    int fd = openat(lm->dir_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        errno = why;
    struct stat sb;
    if (fd >= 0 && geteuid() == 0 && lm->uid != 0 && fstat(fd, &sb) == 0 && sb.st_uid != lm->uid) {
        /* Root makes files there, so a link must not lead it to a folder of somebody else. */
        close(fd);
        errno = EPERM;
        return -1;
    }
    return fd;
}

/* Opens the folder, and sees whether there is a store in it. */
static enum status folder_open(struct lm *lm, unsigned flags, struct err *e)
{
    bool create = flags & STORE_CREATE;
    struct stat sb;
    if (stat(lm->dir, &sb) == 0 && !S_ISDIR(sb.st_mode))
        return fail(e, create ? ST_UNAVAIL : ST_NOTFOUND,
                    "there is no store in %s: it is not a folder", lm->dir);
    if (create && folders_make(lm->dir) < 0)
        return fail(e, ST_UNAVAIL, "cannot make the folder %s: %s", lm->dir, strerror(errno));
    lm->dir_fd = open(lm->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lm->dir_fd < 0 || fstat(lm->dir_fd, &sb) < 0)
        return errno == ENOENT || errno == ENOTDIR
                   ? fail(e, ST_NOTFOUND, "there is no store in %s: there is no such folder",
                          lm->dir)
                   : fail(e, ST_UNAVAIL, "cannot open the folder %s: %s", lm->dir, strerror(errno));
    lm->dev = sb.st_dev;
    lm->ino = sb.st_ino;
    lm->uid = sb.st_uid;
    lm->gid = sb.st_gid;
    lm->mode = sb.st_mode & 0666;
    if (!create && faccessat(lm->dir_fd, "data.mdb", F_OK, AT_EACCESS) < 0)
        return errno == ENOENT
                   ? fail(e, ST_NOTFOUND, "there is no store in the folder %s", lm->dir)
                   : fail(e, ST_UNAVAIL, "cannot look into %s: %s", lm->dir, strerror(errno));
    return ST_OK;
}

bool lm_flock(struct lm *lm, int fd)
{
    uint64_t until = lm_now_ns() + (uint64_t)lm->lease_ms * 1000000u + FLOCK_WAIT_NS;
    while (flock(fd, LOCK_EX | LOCK_NB) < 0) {
        if (errno != EWOULDBLOCK && errno != EINTR)
            return false;
        if (lm_now_ns() > until) {
            errno = ETIMEDOUT;
            return false;
        }
        usleep(10000);
    }
    return true;
}

DIR *lm_folder_list(int fd)
{
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    int why = errno;
    if (!dir && fd >= 0)
        close(fd);
    errno = why;
    return dir;
}

/* The folder's lock, so that two processes do not make one store at once. */
static enum status folder_lock(struct lm *lm, struct err *e)
{
    if (lm_flock(lm, lm->dir_fd))
        return ST_OK;
    if (errno == ETIMEDOUT)
        return fail(e, ST_UNAVAIL,
                    "another process has been opening the store %s for too long: end it", lm->dir);
    return fail(e, ST_UNAVAIL, "cannot lock the folder %s: %s", lm->dir, strerror(errno));
}

static enum status registered(struct lm *lm, struct err *e)
{
    enum status st = ST_OK;
    pthread_mutex_lock(&open_lock);
    list_for_each (pos, &open_stores) {
        struct lm *other = container_of(pos, struct lm, open_link);
        if (other->dev == lm->dev && other->ino == lm->ino)
            st = fail(e, ST_BUSY, "this process has the store %s open already", lm->dir);
    }
    if (!st)
        list_add_tail(&open_stores, &lm->open_link);
    pthread_mutex_unlock(&open_lock);
    return st;
}

static void teardown(struct lm *lm)
{
    lm_minder_stop(lm);
    lm_read_threads_stop(lm);
    lm_commit_thread_stop(lm);
    lm_readers_drop(lm);
    lm_env_close(lm);
    lm_guard_free(lm->guard);
    lm_processes_close(lm);
    int *fds[] = {&lm->blocks_fd,  &lm->direct_fd, &lm->bell_fd,
                  &lm->session_fd, &lm->log_fd,    &lm->dir_fd};
    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
        if (*fds[i] >= 0)
            close(*fds[i]);
    pthread_mutex_lock(&open_lock);
    list_remove(&lm->open_link);
    pthread_mutex_unlock(&open_lock);
    pthread_mutex_destroy(&lm->env_lock);
    pthread_cond_destroy(&lm->env_cond);
    pthread_mutex_destroy(&lm->queue_lock);
    pthread_cond_destroy(&lm->queue_cond);
    pthread_cond_destroy(&lm->job_cond);
    pthread_mutex_destroy(&lm->watch_lock);
    pthread_mutex_destroy(&lm->read_lock);
    free(lm);
}

static void lm_close(struct store *store)
{
    teardown(lm_of(store));
}

static enum status lm_info(struct store *store, struct store_info *info, struct err *e)
{
    struct lm *lm = lm_of(store);
    *info = (struct store_info){.engine = "lmdb"};
    snprintf(info->uri, sizeof info->uri, "lmdb:%s", lm->dir);
    struct statvfs vfs;
    if (fstatvfs(lm->dir_fd, &vfs) < 0)
        return fail(e, ST_UNAVAIL, "cannot ask for the free space of %s: %s", lm->dir,
                    strerror(errno));
    struct lm_reader *reader;
    enum status st = lm_read_begin_now(lm, &reader);
    if (st)
        return fail(e, st, "cannot read the store %s", lm->dir);
    struct space sp;
    st = lm_space_read(reader, &sp);
    MDB_envinfo env_info;
    mdb_env_info(lm->mdb, &env_info);
    lm_read_end(lm, reader);
    if (st)
        return fail(e, st, "the record of free space in the store %s is damaged", lm->dir);
    uint64_t unused = sp.free_units + sp.hole_units + sp.pending_units;
    info->bytes_used = (sp.data_units - unused) * SPACE_UNIT_BYTES +
                       ((uint64_t)env_info.me_last_pgno + 1) * lm->page_bytes;
    info->bytes_free = (sp.free_units + sp.pending_units) * SPACE_UNIT_BYTES;
    info->bytes_available = (uint64_t)vfs.f_bavail * vfs.f_frsize;
    return ST_OK;
}

static const struct store_ops ops = {
    .close = lm_close,
    .read = lm_read,
    .read_release = lm_read_release,
    .commit = lm_commit,
    .watch = lm_watch,
    .watch_stop = lm_watch_stop,
    .reserve = lm_reserve,
    .reserve_wait = lm_reserve_wait,
    .unreserve = lm_unreserve,
    .body_cost = lm_body_cost,
    .session_begin = lm_session_begin,
    .session_end = lm_session_end,
    .session_probe = lm_session_probe,
    .session_kill = lm_session_kill,
    .info = lm_info,
    .usage = lm_usage,
    .backup = lm_backup,
    .log = &lm_log_ops,
};

static struct lm *lm_new(unsigned lease_ms)
{
    struct lm *lm = mem_zalloc(sizeof *lm);
    lm->base.ops = &ops;
    lm->base.limits = (struct store_limits){.head_bytes_max = LM_HEAD_BYTES_MAX,
                                            .body_bytes_max = LM_BODY_BYTES_MAX,
                                            .batch_bytes_max = LM_BATCH_BYTES_MAX,
                                            .commit_bytes_max = UINT64_MAX,
                                            .body_bytes_best = 16384,
                                            .has_log = true,
                                            .needs_heartbeat = false};
    lm->lease_ms = lease_ms < LEASE_MS_MIN ? LEASE_MS_MIN : lease_ms;
    lm->dir_fd = lm->blocks_fd = lm->direct_fd = lm->session_fd = lm->log_fd = -1;
    lm->processes_fd = lm->bell_fd = lm->minder_stop_fd = lm->inotify_fd = -1;
    lm->guard = lm_guard_new(lm);
    list_init(&lm->open_link);
    list_init(&lm->commits);
    list_init(&lm->waits);
    list_init(&lm->jobs);
    list_init(&lm->watches);
    pthread_mutex_init(&lm->env_lock, NULL);
    pthread_cond_init(&lm->env_cond, NULL);
    pthread_mutex_init(&lm->queue_lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&lm->queue_cond, &attr);
    pthread_condattr_destroy(&attr);
    pthread_cond_init(&lm->job_cond, NULL);
    pthread_mutex_init(&lm->watch_lock, NULL);
    pthread_mutex_init(&lm->read_lock, NULL);
    list_init(&lm->reads);
    return lm;
}

/* The files that are made where they are missing. May be called again after it failed. */
static enum status small_files_open(struct lm *lm, struct err *e)
{
    if (lm->session_fd < 0)
        lm->session_fd = subfolder_open(lm, "session");
    if (lm->session_fd >= 0 && lm->log_fd < 0)
        lm->log_fd = subfolder_open(lm, "log");
    if (lm->log_fd >= 0 && lm->bell_fd < 0)
        lm->bell_fd = openat(lm->dir_fd, "bell", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (lm->bell_fd < 0)
        return fail(e, errno == ENOSPC || errno == EDQUOT ? ST_NOSPC : ST_UNAVAIL,
                    "cannot write in the folder %s: %s", lm->dir, strerror(errno));
    struct stat sb;
    if (fstat(lm->bell_fd, &sb) == 0 &&
        ((sb.st_mode & 0777) != lm->mode || sb.st_uid != lm->uid || sb.st_gid != lm->gid))
        lm_file_adopt(lm, lm->bell_fd);
    return lm_processes_open(lm, e);
}

/* ---- a store in the making ---- */

/*
 * A store is made in several steps, and the power may go between any two of them, or files come out
 * of it without their names. So the first step is a file, "making", and the last one takes it away:
 * who finds it begins anew. Nobody can have written to the store by then.
 */

static bool there(const struct lm *lm, const char *name)
{
    return faccessat(lm->dir_fd, name, F_OK, AT_EACCESS) == 0;
}

/* Makes the names on the way to the folder durable, some of which may be new: up to the root of the
 * file system, or to where this user may not look. */
static int path_sync(const struct lm *lm)
{
    struct stat at, below;
    int fd = lm->dir_fd, rc = fstat(fd, &below);
    while (rc == 0) {
        int up = openat(fd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd != lm->dir_fd)
            close(fd);
        if (up < 0)
            return errno == EACCES ? 0 : -1;
        fd = up;
        rc = fstat(fd, &at);
        if (rc == 0 && (at.st_dev != below.st_dev || at.st_ino == below.st_ino))
            break;
        /* (Not every file system can.) */
        if (rc == 0 && fsync(fd) < 0 && errno != EINVAL)
            rc = -1;
        below = at;
    }
    int why = errno;
    if (fd != lm->dir_fd)
        close(fd);
    errno = why;
    return rc;
}

/* *making: the store is to be made, and nothing of it is there yet. */
static enum status making_begin(struct lm *lm, bool *making, struct err *e)
{
    *making = there(lm, making_name);
    if (*making) {
        static const char *const begun[] = {"data.mdb", "lock.mdb", "blocks"};
        for (size_t i = 0; i < sizeof begun / sizeof begun[0]; i++)
            if (unlinkat(lm->dir_fd, begun[i], 0) < 0 && errno != ENOENT)
                return fail(e, ST_UNAVAIL, "cannot remove %s/%s, which was begun and not finished: %s",
                            lm->dir, begun[i], strerror(errno));
    } else if (there(lm, "data.mdb") || there(lm, "blocks")) {
        return ST_OK;
    }
    int fd = openat(lm->dir_fd, making_name, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd >= 0) {
        lm_file_adopt(lm, fd);
        close(fd);
    }
    if (fd < 0 || fsync(lm->dir_fd) < 0 || path_sync(lm) < 0)
        return fail(e, errno == ENOSPC || errno == EDQUOT ? ST_NOSPC : ST_UNAVAIL,
                    "cannot make a store in the folder %s: %s", lm->dir, strerror(errno));
    *making = true;
    return ST_OK;
}

static enum status making_end(struct lm *lm, struct err *e)
{
    if (fsync(lm->dir_fd) < 0 || unlinkat(lm->dir_fd, making_name, 0) < 0 ||
        fsync(lm->dir_fd) < 0)
        return fail(e, ST_UNAVAIL, "cannot make a store in the folder %s: %s", lm->dir,
                    strerror(errno));
    return ST_OK;
}

static enum status files_open(struct lm *lm, unsigned flags, struct err *e)
{
    struct statvfs vfs;
    if (fstatvfs(lm->dir_fd, &vfs) < 0)
        return fail(e, ST_UNAVAIL, "cannot look at the disk of %s: %s", lm->dir, strerror(errno));
    uint64_t disk = (uint64_t)vfs.f_blocks * vfs.f_frsize;
    lm->emergency_bytes = min_u64(max_u64(disk / 64, EMERGENCY_BYTES_MIN), EMERGENCY_BYTES_MAX);
    bool create = flags & STORE_CREATE, making = false;
    if (!create && there(lm, making_name))
        return fail(e, ST_NOTFOUND, "there is no store in %s: one was begun there and not finished",
                    lm->dir);
    enum status st = create ? making_begin(lm, &making, e) : ST_OK;
    if (st)
        return st;
    /* Whoever made it may have died before that was durable: "making" would be there again after a
     * power cut, and have what is written from now on begun anew. (Not every file system can.) */
    if (!making && fsync(lm->dir_fd) < 0 && errno != EINVAL && errno != EROFS)
        return fail(e, ST_UNAVAIL, "cannot sync the folder %s: %s", lm->dir, strerror(errno));
    /* (A copy of a store may lack the second.) */
    static const char *const names[] = {"data.mdb", "lock.mdb"};
    bool fresh[2];
    for (int i = 0; i < 2; i++)
        fresh[i] = !there(lm, names[i]);
    st = lm_env_open(lm, create, e);
    for (int i = 0; i < 2; i++)
        if (fresh[i])
            adopt_by_name(lm, names[i]);
    if (!st)
        st = lm_datafile_open(lm, false, e);
    if (st)
        return st;
    st = small_files_open(lm, e);
    if (st == ST_NOSPC && lm_ballast_drop(lm)) {
        lm_processes_close(lm);
        st = small_files_open(lm, e);
    }
    if (!st && making)
        st = making_end(lm, e);
    if (!st)
        lm_ballast_make(lm);
    return st;
}

/* Root at work on the store of a user who has no such rights, an administrator's command beside a
 * service: that user's processes must be able to end this one, should it stand still while it
 * holds the writer lock (minder.c). A signal is allowed where the real user is the sender. What
 * this process may do stays as it is, that goes by the effective user; and files take the owner
 * of the folder. */
static void belong_to_owner(const struct lm *lm)
{
    if (geteuid() == 0 && getuid() == 0 && lm->uid != 0)
        (void)!setresuid(lm->uid, (uid_t)-1, (uid_t)-1);
}

static enum status lm_open(const char *rest, const struct store_options *options,
                           struct store **out, struct err *e)
{
    struct lm *lm = lm_new(options->lease_ms);
    size_t len = strlen(rest);
    while (len > 1 && rest[len - 1] == '/')
        len--;
    if (len == 0 || len >= sizeof lm->dir) {
        teardown(lm);
        return fail(e, ST_INVAL,
                    "a store is given as lmdb:DIRECTORY, with a path of at most %zu bytes",
                    sizeof lm->dir - 1);
    }
    memcpy(lm->dir, rest, len);
    lm->own_cache = options->own_cache;
    enum status st = folder_open(lm, options->flags, e);
    if (!st)
        st = registered(lm, e);
    if (!st)
        belong_to_owner(lm);
    /* The threads go on so. */
    bool as_owner = !st && lm_owner_begin(lm);
    if (!st)
        st = folder_lock(lm, e);
    if (!st)
        st = files_open(lm, options->flags, e);
    if (!st)
        st = lm_commit_thread_start(lm, e);
    if (!st)
        st = lm_minder_start(lm, e);
    lm_owner_end(as_owner);
    if (lm->dir_fd >= 0)
        flock(lm->dir_fd, LOCK_UN);
    if (st) {
        teardown(lm);
        return st;
    }
    *out = &lm->base;
    return ST_OK;
}

const struct store_engine store_engine_lmdb = {
    .scheme = "lmdb",
    .form = "lmdb:DIRECTORY",
    .open = lm_open,
};
