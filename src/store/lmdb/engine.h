/*
 * The embedded engine, inside: what its files share.
 *
 * A store is a folder: keys, small values and free space in LMDB (data.mdb),
 * bodies out of place in one data file (blocks), write logs (log/), sessions
 * (session/), and two files that carry nothing worth keeping: `processes`, by
 * which the processes that have the store open know of each other, and `bell`,
 * by which they wake each other. docs/format-lmdb.md states all of it to the byte.
 *
 * Threads: one commit thread per open store does every write transaction, and has a few
 * to write bodies and a few to bring pages of the index into memory; a few others do the reads; one minder thread watches over a stuck writer
 * lock and over keys; each open log has a thread for its syncs.
 */
#ifndef STORE_LMDB_ENGINE_H
#define STORE_LMDB_ENGINE_H

#include <dirent.h>
#include <lmdb.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "store/lmdb/space.h"
#include "store/log.h"
#include "store/store.h"

#define LM_HEAD_BYTES_MAX 65536u
#define LM_BODY_BYTES_MAX (1u << 20)
#define LM_BATCH_BYTES_MAX (64ull << 20)

#define LM_ID_TEXT_BYTES 33u /* a session or store id in hex, with its end */

#define LM_READ_THREADS_MAX 16u

struct lm;
struct lm_guard;
struct lm_reader;
struct lm_slot;
struct lm_read_thread;

/* Free space that a process may use. */
struct lm_claims {
    int64_t units; /* of the data file */
    int64_t index; /* bytes of data.mdb */
};

/* Work for the commit thread other than a store_commit: `run` is called inside a write
 * transaction, perhaps more than once (the transaction may be redone), and must leave no
 * trace outside of it. */
struct lm_job {
    enum status (*run)(struct lm_job *job, MDB_txn *txn);
    struct list link;
    enum status result;
    bool finished;
};

struct lm {
    struct store base;
    struct list open_link; /* in the list of stores this process has open */
    dev_t dev;
    ino_t ino;

    char dir[400];
    int dir_fd, blocks_fd, session_fd, log_fd;
    int direct_fd; /* the data file too, for reads past the page cache; -1: not to be used */
    uid_t uid;
    gid_t gid;
    mode_t mode; /* for files */
    uint8_t uuid[STORE_ID_BYTES];
    unsigned lease_ms;
    bool own_cache; /* store_options.own_cache */

    MDB_env *mdb;
    MDB_dbi store_dbi, keys_dbi, logs_dbi;
    struct space_dbis space_dbis;
    unsigned page_bytes;
    uint8_t *map; /* where LMDB has data.mdb */
    size_t map_bytes;
    bool sealed; /* its pages have seals, and what has none is damaged */
    struct lm_guard *guard;
    _Atomic uint64_t damage_told_ns; /* it was logged that a page is damaged */

    /* Readers. `env_lock` guards the list and the count; a reopening commit thread sets
     * `closed` and waits until no reader is out. */
    pthread_mutex_t env_lock;
    pthread_cond_t env_cond;
    struct lm_reader *readers;
    unsigned n_readers_idle, n_readers_out;
    bool closed;
    _Atomic bool broken; /* LMDB could not be brought back: nothing works until it is */

    /* Reads that no thread has taken, and the threads, made when they are needed. */
    pthread_mutex_t read_lock;
    struct list reads;
    struct lm_read_thread *read_threads[LM_READ_THREADS_MAX];
    unsigned n_read_threads, n_read_threads_max;
    _Atomic bool read_threads_stop;

    /* The commit thread's queues. */
    pthread_t commit_thread;
    bool commit_thread_runs;
    pthread_mutex_t queue_lock;
    pthread_cond_t queue_cond, job_cond;
    struct list commits, waits, jobs;
    bool stopping;

    /* Space. Reservations are taken against claims: what this process may use of the free
     * space all processes share. Only the commit thread sets claims. */
    _Atomic int64_t claim_units, reserved_units;
    _Atomic int64_t claim_index, reserved_index; /* bytes of data.mdb */
    uint64_t emergency_bytes;                    /* of data.mdb, for what is not reserved */
    uint64_t index_end;                          /* data.mdb is allocated up to here */
    uint64_t index_used_before;                  /* when the claims were prepared */
    bool index_tight;                            /* counted on pages of LMDB's free list */
    bool no_fallocate, no_punch;
    struct lm_claims claims_before;
    int64_t round_units;       /* taken by commits of the transaction at hand, still reserved */
    uint64_t pending_units;    /* after the last transaction */
    uint64_t waits_refused_ns; /* since when a reservation has been kept waiting; 0: none */
    bool work_left;            /* free runs may be worth punching */

    /* Other processes. */
    _Atomic uint64_t probe_told_ns; /* it was logged that a session could not be probed */
    int processes_fd, bell_fd;
    void *processes_map;
    struct lm_slot *slot;
    int own_slot;

    /* The minder. */
    pthread_t minder_thread;
    bool minder_runs;
    int minder_stop_fd, inotify_fd;
    _Atomic uint64_t lock_wait_since_ns; /* the commit thread waits for the writer lock; or 0 */
    pthread_mutex_t watch_lock;
    struct list watches;
    uint64_t watch_filter[16]; /* bits of the hashes of armed keys; may have stale bits */
    _Atomic unsigned n_watches;
    uint64_t watched_txn;
};

static inline struct lm *lm_of(struct store *store)
{
    return (struct lm *)(void *)store;
}

/* ---- seal.c ---- */

/* LMDB's pages, as far as they are read here. */
#define LM_PAGE_HEADER_BYTES 16u
#define LM_PAGE_FLAGS_AT 10u
#define LM_PAGE_LOWER_AT 12u /* end of the pointers */
#define LM_PAGE_UPPER_AT 14u /* begin of the entries */
#define LM_PAGE_BRANCH 1u
#define LM_PAGE_LEAF 2u
#define LM_PAGE_OVERFLOW 4u /* a large value; the number of pages lies at LM_PAGE_LOWER_AT, 4 bytes */
#define LM_PAGE_META 8u

/* Of a meta page: all that has a meaning, with its seal. */
#define LM_META_BYTES 160u
#define LM_META_FREE_AT 40u /* a database's record, see tree.c */
#define LM_META_MAIN_AT 88u
#define LM_META_LAST_PAGE_AT 136u
#define LM_META_TXN_AT 144u

/* Whether a branch or leaf, a run of pages with a large value, or meta page `slot`, is what was
 * written. The page's number is under its seal, but for its place the caller looks. */
bool lm_seal_page_fits(const uint8_t *page, size_t len);
bool lm_seal_run_fits(const uint8_t *run, size_t len);
bool lm_seal_meta_fits(const uint8_t meta[LM_META_BYTES], unsigned slot);

/* Where this thread's last mdb_env_open() mapped data.mdb, whose descriptor is `fd`. */
bool lm_seal_map(int fd, uint8_t **map, size_t *len);

/* What LMDB calls instead of pwrite, writev and mmap. */
ssize_t lm_seal_pwrite(int fd, const void *data, size_t len, off_t at);
ssize_t lm_seal_writev(int fd, const struct iovec *iov, int n_iov);
void *lm_seal_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset);

/* ---- touch.c ---- */

/* Has lm_touch() wait for SIGBUS, in the whole process; what it does not wait for goes where it went
 * before. Whenever a map is made; any thread. */
void lm_touch_begin(void);

/* Brings `len` bytes at `p`, the beginning of a page of LMDB's map, in. False: the disk does not give
 * them, or the file ends before. Any thread. */
bool lm_touch(const uint8_t *p, size_t len);

/* ---- tree.c ---- */

enum lm_db { LM_DB_STORE, LM_DB_KEYS, LM_DB_LOGS, LM_DB_FREE, LM_DB_HOLES, LM_DB_PENDING, LM_DBS,
             LM_DB_PAGES = LM_DBS, /* LMDB's own: which pages are free */
             LM_DB_MAIN,           /* and where the others are */
             LM_DB_ALL };

/* The database's name in LMDB. */
extern const char *const lm_db_names[LM_DBS];

/* One version of data.mdb, read from LMDB's map without LMDB. As long as a transaction of LMDB holds
 * the version its pages do not change. One thread at a time. */
struct lm_tree {
    struct lm *lm;
    bool loaded;
    uint64_t txn_id, last_page;
    struct {
        uint64_t page;
        unsigned depth; /* 0: the database is empty */
    } roots[LM_DB_ALL];

    /* Pages that were found to be whole, by their number: the turn, and the page. */
    uint64_t *whole;
    uint32_t whole_mask, turn;
};

/* `slots`: how many pages it remembers to be whole, a power of two. */
void lm_tree_init(struct lm_tree *t, struct lm *lm, uint32_t slots);
void lm_tree_free(struct lm_tree *t);

/* Looks at version `txn_id` from here on; pages are looked at anew. ST_BUSY: its meta page is
 * damaged, or has been written over for a newer version. ST_IO: what names the databases is
 * damaged. */
enum status lm_tree_load(struct lm_tree *t, uint64_t txn_id);

#define LM_DEPTH_MAX 32u

struct lm_cursor {
    struct lm_tree *tree;
    enum lm_db db;
    unsigned depth; /* 0: at no entry */
    struct {
        const uint8_t *page;
        unsigned at, n; /* entry, and how many there are */
    } level[LM_DEPTH_MAX];
};

static inline struct lm_cursor lm_cursor(struct lm_tree *tree, enum lm_db db)
{
    return (struct lm_cursor){.tree = tree, .db = db};
}

/* Each gives the entry that it moved to, in the map. ST_NOTFOUND: there is none. ST_IO: a page on
 * the way is damaged. The values of LM_DB_KEYS have hashes of their own, and are not looked at if
 * they are large. */
enum status lm_cursor_first(struct lm_cursor *c, MDB_val *k, MDB_val *v);
enum status lm_cursor_last(struct lm_cursor *c, MDB_val *k, MDB_val *v);
enum status lm_cursor_seek(struct lm_cursor *c, struct slice key, MDB_val *k, MDB_val *v);
enum status lm_cursor_next(struct lm_cursor *c, MDB_val *k, MDB_val *v);
enum status lm_cursor_prev(struct lm_cursor *c, MDB_val *k, MDB_val *v);

/* The value of exactly `key`; ST_NOTFOUND, ST_IO. */
enum status lm_tree_get(struct lm_tree *t, enum lm_db db, struct slice key, MDB_val *v);

/* The way to where `key` is (*exact) or would be; in the leaf that may be behind the last entry. */
enum status lm_cursor_way(struct lm_cursor *c, struct slice key, bool *exact);

/* Looks at a large value that the cursor is at, if it is one. */
enum status lm_cursor_big_look(struct lm_cursor *c);

/* Looks at a page; and at a branch, for the page that its entry `at`, or its last one, names. False
 * and 0: damaged. */
bool lm_tree_look(struct lm_tree *t, uint64_t page, bool leaf);
uint64_t lm_tree_child(struct lm_tree *t, uint64_t page, unsigned at);

/* Says in the log that a page is damaged, now and then. */
void lm_tree_report(struct lm_tree *t, uint64_t page);

/* memcmp, and where one begins with the other that is the larger one. */
int lm_key_compare(const MDB_val *a, struct slice b);

/* ---- guard.c ---- */

/* What stands between a write transaction and damaged pages: LMDB follows and copies whatever it
 * finds, so each page it may come to is looked at before. All of these are harmless in a store
 * without seals. Commit thread, inside a write transaction. */
struct lm_guard {
    struct lm *lm;
    struct lm_tree base; /* the version that the transaction is based on */
    MDB_dbi dbi[LM_DBS];

    /* Per database the leaf that was looked at last together with all that is around it. */
    const uint8_t *around[LM_DB_ALL];

    struct lm_cursor free;      /* in the list of free pages */
    bool free_begun, free_ended;
    uint64_t free_pages;        /* in what was looked at of it */
    uint64_t free_spare;        /* records looked at beyond the need */
    uint64_t need, need_spare;  /* pages LMDB may have to take; and records */
};

struct lm_guard *lm_guard_new(struct lm *lm);
void lm_guard_free(struct lm_guard *g);

/* Transaction `txn_id` begins. ST_IO where what names the databases is damaged. */
enum status lm_guard_begin(struct lm_guard *g, uint64_t txn_id);

/* What a transaction reads when it is committed. */
enum status lm_guard_end(struct lm_guard *g);

/* Setting, reading, or seeking from, `key`; removing it, or going on from it to the next or the one
 * before. `bytes` are to be set. ST_IO: not to be done. */
enum status lm_guard_key(struct lm_guard *g, enum lm_db db, struct slice key, size_t bytes);
enum status lm_guard_around(struct lm_guard *g, enum lm_db db, struct slice key);

/* Going to the first or last key of a database. */
enum status lm_guard_ends(struct lm_guard *g, enum lm_db db);

/* ---- engine.c ---- */

/* Opens LMDB and its databases in the store's folder; `create` makes what is missing.
 * ST_NOTFOUND, ST_FORMAT, ST_IO, ST_UNAVAIL. */
enum status lm_env_open(struct lm *lm, bool create, struct err *e);
void lm_env_close(struct lm *lm);

/* The status an LMDB return code stands for. */
enum status lm_status(int rc);

/* Gives a new file the folder's owner, group and mode. Failures are ignored: without the
 * right to do it the file belongs to whoever runs. */
void lm_file_adopt(const struct lm *lm, int fd);

/* Where root works on the store of a user: from here to the end this thread opens files with that
 * user's rights. Who owns the folder may put a link in the place of any file, and nothing that the
 * user could not open himself may be opened, given to him or written for him. Returns whether there
 * is something to end. */
bool lm_owner_begin(const struct lm *lm);
void lm_owner_end(bool begun);

/* `id` in hex. */
void lm_id_text(const uint8_t id[STORE_ID_BYTES], char text[LM_ID_TEXT_BYTES]);

uint64_t lm_now_ns(void);

/* Whether a line may be logged that was last logged at *told_ns (0: never), at least `every_ns` ago;
 * notes that it is now. Any thread, and one of several at once. */
bool lm_may_tell(_Atomic uint64_t *told_ns, uint64_t every_ns);

/* Locks `fd` with flock, waiting no longer than a lease and some seconds: its holder may be
 * a process that was stopped. False: errno says why. */
bool lm_flock(struct lm *lm, int fd);

/* Lists the folder that `fd` is open on; from here on closedir() closes that. NULL: `fd` is -1 or no
 * folder; it is closed, and errno says why. Any thread. */
DIR *lm_folder_list(int fd);

/* ---- txn.c ---- */

/* A cached read transaction, which holds a version, and the way to read that. */
struct lm_reader {
    MDB_txn *txn;
    struct lm_tree tree;
    struct lm_reader *next;
};

/* A read transaction on the newest version. Waits where it is being settled whether the last commit
 * happened. Any thread but a reactor's and the commit thread. ST_UNAVAIL, ST_IO. */
enum status lm_read_begin(struct lm *lm, struct lm_reader **out);

/* The same, but does not wait: ST_IO or ST_UNAVAIL then. Any thread. */
enum status lm_read_begin_now(struct lm *lm, struct lm_reader **out);

void lm_read_end(struct lm *lm, struct lm_reader *reader);

/* Drops all cached readers. */
void lm_readers_drop(struct lm *lm);

/* Keeps LMDB's map from counting as memory of this process without bound. Any thread. */
void lm_map_trim(struct lm *lm);

/* A write transaction, with lm->guard at its begin; waits for other processes. Commit thread. */
enum status lm_write_begin(struct lm *lm, MDB_txn **out);

/* Ends it. lm_write_commit gives what mdb_txn_commit gave, or MDB_CORRUPTED where that would have met
 * a damaged page: then it did not happen. */
int lm_write_commit(struct lm *lm, MDB_txn *txn);
void lm_write_abort(struct lm *lm, MDB_txn *txn);

/* Closes LMDB and opens it again, after an error that LMDB does not go on from. Commit
 * thread. */
enum status lm_reopen(struct lm *lm);

/* The oldest version that a reader in any process may still look at, at most
 * `txn_id` - 1. Inside write transaction `txn_id`. */
uint64_t lm_oldest_version(struct lm *lm, uint64_t txn_id);

/* ---- value.c ---- */

/* A stored value, taken apart; pointers into LMDB's page. */
struct lm_value {
    struct slice head;
    const uint8_t *pieces; /* n_pieces packed extents, unaligned */
    uint32_t n_pieces;
    uint32_t body_len;
};

uint64_t lm_key_hash(const void *key, size_t len);

/* Takes `data` apart after checking it against its hash; ST_IO where it does not fit. */
enum status lm_value_parse(const MDB_val *key, const MDB_val *data, struct lm_value *v);

/* The stored form of a value in `out`; returns its length. `pieces` are packed extents. */
size_t lm_value_build(uint8_t *out, const MDB_val *key, uint64_t txn_id, struct slice head,
                      uint32_t body_len, const uint64_t *pieces, uint32_t n_pieces);

#define LM_VALUE_BYTES_MAX (16u + 8u * 256u + 8u + LM_HEAD_BYTES_MAX)

/* An exact get in LM_DB_KEYS. In a store without seals it also proves absence: where `key` is not
 * there, the neighbours of the place where it would be must fit, so that a damaged key can't make one
 * vanish silently. ST_OK, ST_NOTFOUND, ST_IO. */
enum status lm_lookup(struct lm_tree *tree, struct slice key, struct lm_value *v);

/* Positions `c` on the first key >= `key` and checks it, and without seals the one before it too.
 * ST_NOTFOUND past the end. */
enum status lm_seek(struct lm_cursor *c, struct slice key, MDB_val *k, MDB_val *data);

/* ---- read.c ---- */

void lm_read(struct store *store, struct env *env, struct store_read *read);
void lm_read_release(struct store_read *read);
enum status lm_usage(struct store *store, struct slice begin, struct slice end, uint64_t *keys,
                     uint64_t *bytes, struct err *e);

/* One of the runs that were added for `read` has ended. */
void lm_read_body_ended(struct store_read *read);

/* Nothing is being read. */
void lm_read_threads_stop(struct lm *lm);

/* ---- bodies.c ---- */

/* What one thread reads of the data file. */
struct lm_bodies;

/* `direct_fd` as in struct lm. Where something was read in the background, `wake_fd`, an
 * eventfd, becomes readable. */
struct lm_bodies *lm_bodies_new(int fd, int direct_fd, int wake_fd);
void lm_bodies_free(struct lm_bodies *b); /* nothing is under way */

/* Notes that the body of `v` is to be read into get->body, which has room for it: counts
 * read->bodies_pending up by the runs that makes. Where one can't be read, get->st is ST_IO. May
 * start what was added before, and wait for it. */
void lm_bodies_add(struct lm_bodies *b, struct store_read *read, struct store_get *get,
                   const struct lm_value *v);

/* Begins what was added. lm_read_body_ended() is called for each run, from inside here, or
 * from a later lm_bodies_reap(). */
void lm_bodies_start(struct lm_bodies *b);
void lm_bodies_reap(struct lm_bodies *b);
bool lm_bodies_flying(const struct lm_bodies *b); /* whether a reap has something to wait for */

/* ---- commit.c ---- */

void lm_commit(struct store *store, struct env *env, struct store_commit *commit);
void lm_reserve_wait(struct store *store, struct env *env, struct store_reserve_wait *wait);

/* Runs `job` on the commit thread and waits for it. Any thread but that one. */
enum status lm_job_run(struct lm *lm, struct lm_job *job);

enum status lm_commit_thread_start(struct lm *lm, struct err *e);
void lm_commit_thread_stop(struct lm *lm);

/* ---- room.c ---- */

bool lm_reserve(struct store *store, struct store_reservation want);
void lm_unreserve(struct store *store, struct store_reservation what);
uint64_t lm_body_cost(const struct store *store, uint64_t body_len);

/* What `keys` keys may take of data.mdb while they are committed. */
uint64_t lm_index_cost(uint64_t keys);

/* Tries to have `units` free units and `index` bytes of index beyond what is reserved and
 * what other processes claim: gives holes their space back, grows the files; some more than
 * asked for where the disk has it. ST_NOSPC, ST_IO. Inside a write transaction. */
enum status lm_make_room(struct lm *lm, struct space *sp, uint64_t units, uint64_t index);

/* Sees that the emergency part and what is reserved of data.mdb is allocated, as far as the
 * disk goes. Inside a write transaction. */
void lm_index_ahead(struct lm *lm);

/* The counters of free space in the version that a reader looks at. ST_IO. */
enum status lm_space_read(struct lm_reader *reader, struct space *sp);

/* Room beyond what is reserved and what other processes claim; may be negative. */
int64_t lm_spare_units(struct lm *lm, const struct space *sp);
int64_t lm_spare_index(struct lm *lm, MDB_txn *txn);

/* Sets this process's claims by what is free at the end of a transaction, which must be
 * published once it is known whether that transaction happened. They go down before it
 * commits and up after it did. Inside the write transaction. */
void lm_claims_prepare(struct lm *lm, const struct space *sp, MDB_txn *txn,
                       struct lm_claims *claims);
void lm_claims_publish(struct lm *lm, const struct lm_claims *claims, bool committed);

/* ---- datafile.c ---- */

/* Reads in the first unit of the data file whether the store has seals; without that file it has
 * none. ST_FORMAT, ST_UNAVAIL. */
enum status lm_datafile_look(struct lm *lm, struct err *e);

/* Opens or makes the data file. */
enum status lm_datafile_open(struct lm *lm, bool create, struct err *e);

/* The ballast: the file `reserve`, there to be given up when a disk so full that not even a
 * session file fits would keep the store from being used, and so from being emptied. Makes
 * it as large as there is room, up to 1 MiB. */
void lm_ballast_make(struct lm *lm);

/* Gives it up. False: there was none, trying again is of no use. */
bool lm_ballast_drop(struct lm *lm);

/* Makes [start, start + units) of the data file real space. ST_NOSPC, ST_IO. */
enum status lm_datafile_back(struct lm *lm, uint64_t start, uint64_t units);

/* Gives the space behind [start, start + units) back to the file system. ST_UNSUP. */
enum status lm_datafile_punch(struct lm *lm, uint64_t start, uint64_t units);

/* Asks a file system that copies on write to write this new, empty file in place: there
 * space had beforehand is worth nothing for the second write. */
void lm_file_in_place(int fd);

/* Writes all of `iov` at byte `offset`. ST_NOSPC, ST_IO. Changes `iov`. */
enum status lm_write_all(int fd, struct iovec *iov, int n_iov, uint64_t offset);

/* ---- payload.c ---- */

/* The bodies of one transaction at a time, on their way to the data file. Commit thread. */
struct lm_payload;

struct lm_payload *lm_payload_new(struct lm *lm);

/* Nothing is under way. */
void lm_payload_free(struct lm_payload *payload);

/* Writes a body, or a part of it, to byte `offset` of the data file, where a unit begins; zeros
 * up to the end of its last unit. `data` must stay as it is until all is finished or cancelled. */
void lm_payload_add(struct lm_payload *payload, uint64_t offset, const void *data, size_t len);

/* Waits until everything added is written, if not yet durable. `wrote`: there was anything.
 * ST_NOSPC, ST_IO. */
enum status lm_payload_finish(struct lm_payload *payload, bool *wrote);

/* Waits until nothing is under way any more; what was added may be written or not. */
void lm_payload_cancel(struct lm_payload *payload);

/* ---- warm.c ---- */

/* Looks keys up ahead of the commit thread, so that it need not wait for their pages one by one.
 * Commit thread. */
struct lm_warm;

struct lm_warm *lm_warm_new(struct lm *lm);
void lm_warm_free(struct lm_warm *warm); /* not between a begin and its end */

/* Begins with the keys of a transaction, if the last one had to wait for pages. `commits` and what
 * they refer to must stay until lm_warm_end(). */
void lm_warm_begin(struct lm_warm *warm, struct store_commit *const *commits, size_t n);

/* The transaction, of `n_keys` mutations, needs no more of them. */
void lm_warm_end(struct lm_warm *warm, uint64_t n_keys);

/* ---- watch.c ---- */

void lm_watch(struct store *store, struct env *env, struct store_watch *watch);
void lm_watch_stop(struct store_watch *watch);

/* Fires watches of `key_hash`: this process's commit changed the key. */
void lm_watch_changed(struct lm *lm, uint64_t key_hash);

/* Whether a watched key may have this hash. */
bool lm_watch_filter(struct lm *lm, uint64_t key_hash);

/* Fires watches whose keys lie in [begin, end). */
void lm_watch_changed_range(struct lm *lm, struct slice begin, struct slice end);

/* Compares every watched key with what it was when armed, if the store changed at all. */
void lm_watch_recheck(struct lm *lm);

/* Wakes the minders of all processes. */
void lm_bell_ring(struct lm *lm);

/* ---- minder.c ---- */

enum status lm_minder_start(struct lm *lm, struct err *e);
void lm_minder_stop(struct lm *lm);

/* ---- processes.c ---- */

enum status lm_processes_open(struct lm *lm, struct err *e);
void lm_processes_close(struct lm *lm);

enum lm_lock_state { LM_LOCK_NONE, LM_LOCK_WANTED, LM_LOCK_HELD };
void lm_lock_state_set(struct lm *lm, enum lm_lock_state state);

/* Counted up while this process holds the lock, so that a slow one is not taken for one
 * that stands still. */
void lm_lock_progress(struct lm *lm);

/* Space claimed by other live processes; and this one's claim made known. */
struct lm_claims lm_claims_of_others(struct lm *lm);
void lm_claims_share(struct lm *lm, const struct lm_claims *claims);

/* A process that holds, or may hold, the writer lock. */
struct lm_holder {
    int slot;
    int32_t pid;
    uint64_t start_time, turn, progress;
};
bool lm_lock_holder(struct lm *lm, struct lm_holder *holder);

/* Whether another process that has not ended says that it holds the writer lock, which this one got:
 * it is dying, and may have writes under way; or has only just given it up. Commit thread. */
bool lm_lock_has_ghost(struct lm *lm);

/* Start time of `pid` in clock ticks after boot, 0 where there is no such process; `state`
 * (may be NULL) gets its state letter. */
uint64_t lm_process_start_time(pid_t pid, char *state);

/* Watches for up to 1.5 s whether the process `pid` that started at `start_time` does
 * anything. False where it is stopped, stands still, is gone, or can't be seen from here. */
bool lm_process_at_work(pid_t pid, uint64_t start_time);

/* Ends the process `pid` that started at `start_time` and waits up to 10 s for its end.
 * ST_NOTFOUND where it is gone already. ST_PERM also where root works on a user's store and that user
 * could not end it: who has the store writes what is believed of its processes. */
enum status lm_process_kill(const struct lm *lm, pid_t pid, uint64_t start_time, struct err *e);

/* ---- session.c ---- */

enum status lm_session_begin(struct store *store, const uint8_t id[STORE_ID_BYTES], struct err *e);
void lm_session_end(struct store *store, const uint8_t id[STORE_ID_BYTES]);
enum store_liveness lm_session_probe(struct store *store, const uint8_t id[STORE_ID_BYTES]);
enum status lm_session_kill(struct store *store, const uint8_t id[STORE_ID_BYTES], struct err *e);

/* Removes the files of dead sessions that are not among the `n` ids at `keep`. */
void lm_sessions_sweep(struct lm *lm, const uint8_t (*keep)[STORE_ID_BYTES], size_t n);

/* ---- log.c, replay.c ---- */

extern const struct store_log_ops lm_log_ops;

#define LM_LOG_RECORD_MAGIC 0x676f4c57u
#define LM_LOG_RECORD_BYTES 80u
#define LM_LOG_HEADER_BYTES 4096u

/* The stream of marks: headers without a record, in the place of the record that comes next. */
#define LM_LOG_MARK_STREAM UINT64_MAX

/* What LMDB holds of a log: where the records that are still needed begin. */
struct lm_log_start {
    uint8_t session[STORE_ID_BYTES];
    uint64_t capacity;
    uint64_t offset; /* of record `seq`, counted from the log's first byte ever */
    uint64_t seq;
};

enum status lm_log_start_get(struct lm_tree *tree, uint64_t id, struct lm_log_start *start);
/* Puts it and removes it; MDB_NOTFOUND is none's fault. Inside a write transaction. */
enum status lm_log_start_put(struct lm *lm, MDB_txn *txn, uint64_t id,
                             const struct lm_log_start *start);
enum status lm_log_start_remove(struct lm *lm, MDB_txn *txn, uint64_t id);

/* The header of a log's file; and reads and checks that of `fd`. */
void lm_log_header_build(uint8_t block[LM_LOG_HEADER_BYTES], uint64_t id,
                         const uint8_t session[STORE_ID_BYTES], uint64_t capacity);
enum status lm_log_header_read(int fd, uint64_t *id, uint8_t session[STORE_ID_BYTES],
                               uint64_t *capacity);

/* Keeps the file of a log as the spare, or removes it where there is one. */
void lm_log_file_discard(struct lm *lm, uint64_t id);

/* The hash in a record's header, over its first 72 bytes. */
uint64_t lm_log_header_hash(const uint8_t header[LM_LOG_RECORD_BYTES], uint64_t log_id);

/* The mark that stands where record `seq` will: those below `synced_seq` are known to be synced. */
void lm_log_mark_build(uint8_t header[LM_LOG_RECORD_BYTES], uint64_t log_id, uint64_t seq,
                       uint64_t synced_seq);

/* Start of the records that commit needs, from the log_keep_from it carries. Reactor. */
void lm_log_commit_begin(struct store_commit *commit);
void lm_log_commit_answered(struct store_commit *commit);
/* Writes it. Inside the transaction. */
enum status lm_log_commit_apply(struct lm *lm, MDB_txn *txn, const struct store_commit *commit);

enum status lm_log_replay(struct store *store, uint64_t log_id, uint64_t stream, uint64_t after_seq,
                          bool (*take)(void *arg, const struct store_log_record *rec), void *arg,
                          struct err *e);
enum status lm_log_remove_unused(struct store *store, const uint64_t *needed, size_t n_needed,
                                 struct err *e);

/* Copies log `id` into the empty file `to_fd` while its session may append: every record that
 * was appended before the call and that LMDB does not call unneeded by then, and no later one
 * without those before it. *start: what LMDB of the copy has to say; the copy's ring is as long
 * as what is in it. Damage is copied as it is and counted. ST_NOTFOUND: nobody needs the log any more;
 * ST_IO, ST_NOSPC. */
enum status lm_log_copy(struct lm *lm, uint64_t id, int to_fd, struct lm_log_start *start,
                        uint64_t *n_damaged, struct err *e);

/* ---- backup.c ---- */

enum status lm_backup(struct store *store, struct store_backup *backup, struct err *e);

#endif
