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

struct lm_slot;
struct lm_read_thread;

/* Free space that a process may use. */
struct lm_claims {
    int64_t units; /* of the data file */
    int64_t index; /* bytes of data.mdb */
};

/* One cached read transaction with a cursor over `keys`. */
struct lm_reader {
    MDB_txn *txn;
    MDB_cursor *cursor;
    struct lm_reader *next;
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

    /* Readers. `env_lock` guards the list and the count; a reopening commit thread sets
     * `closed` and waits until no reader is out. */
    pthread_mutex_t env_lock;
    pthread_cond_t env_cond;
    struct lm_reader *readers;
    unsigned n_readers_idle, n_readers_out;
    bool closed;
    _Atomic bool broken; /* LMDB could not be brought back: nothing works any more */

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

/* `id` in hex. */
void lm_id_text(const uint8_t id[STORE_ID_BYTES], char text[LM_ID_TEXT_BYTES]);

uint64_t lm_now_ns(void);

/* Locks `fd` with flock, waiting no longer than a lease and some seconds: its holder may be
 * a process that was stopped. False: errno says why. */
bool lm_flock(struct lm *lm, int fd);

/* Lists the folder that `fd` is open on; from here on closedir() closes that. NULL: `fd` is -1 or no
 * folder; it is closed, and errno says why. Any thread. */
DIR *lm_folder_list(int fd);

/* ---- txn.c ---- */

/* A read transaction on the newest version. Any thread. ST_UNAVAIL, ST_IO. */
enum status lm_read_begin(struct lm *lm, struct lm_reader **out);

/* `failed`: LMDB reported an error in it, it is not used again. */
void lm_read_end(struct lm *lm, struct lm_reader *reader, bool failed);

/* Drops all cached readers. */
void lm_readers_drop(struct lm *lm);

/* Finds where LMDB has mapped data.mdb. False where it has not, or that can't be told. The
 * caller sees to it that LMDB is not reopened meanwhile. */
bool lm_map_find(struct lm *lm, void **map, size_t *len);

/* Keeps LMDB's map from counting as memory of this process without bound. Any thread. */
void lm_map_trim(struct lm *lm);

/* A write transaction; waits for other processes. Commit thread (or before it runs). */
enum status lm_write_begin(struct lm *lm, MDB_txn **out);

/* Ends it. lm_write_commit gives what mdb_txn_commit gave. */
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

/* An exact get that also proves absence: where `key` is not there, the neighbours of the
 * place where it would be must fit, so that a damaged key can't make one vanish silently.
 * ST_OK, ST_NOTFOUND, ST_IO; *failed is set where LMDB reported an error. */
enum status lm_lookup(MDB_cursor *cursor, struct slice key, struct lm_value *v, bool *failed);

/* Positions `cursor` on the first key >= `key` and checks it and the one before it.
 * ST_NOTFOUND past the end. */
enum status lm_seek(MDB_cursor *cursor, struct slice key, MDB_val *k, MDB_val *data, bool *failed);

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
 * ST_NOTFOUND where it is gone already. */
enum status lm_process_kill(pid_t pid, uint64_t start_time, struct err *e);

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

/* What LMDB holds of a log: where the records that are still needed begin. */
struct lm_log_start {
    uint8_t session[STORE_ID_BYTES];
    uint64_t capacity;
    uint64_t offset; /* of record `seq`, counted from the log's first byte ever */
    uint64_t seq;
};

enum status lm_log_start_get(struct lm *lm, MDB_txn *txn, uint64_t id, struct lm_log_start *start);
enum status lm_log_start_put(struct lm *lm, MDB_txn *txn, uint64_t id,
                             const struct lm_log_start *start);

/* The header of a log's file; and reads and checks that of `fd`. */
void lm_log_header_build(uint8_t block[LM_LOG_HEADER_BYTES], uint64_t id,
                         const uint8_t session[STORE_ID_BYTES], uint64_t capacity);
enum status lm_log_header_read(int fd, uint64_t *id, uint8_t session[STORE_ID_BYTES],
                               uint64_t *capacity);

/* Keeps the file of a log as the spare, or removes it where there is one. */
void lm_log_file_discard(struct lm *lm, uint64_t id);

/* The hash in a record's header, over its first 72 bytes. */
uint64_t lm_log_header_hash(const uint8_t header[LM_LOG_RECORD_BYTES], uint64_t log_id);

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
