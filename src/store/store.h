/*
 * The store: ordered keys and values with atomic commits, the smallest interface
 * that FoundationDB and an embedded engine both give without pretending.
 *
 * read, commit and watch are all there is; engines that can answer a write
 * before it is committed also offer a write log (log.h beside this file).
 * Everything is asynchronous and completes on the caller's reactor, never from
 * inside the call. Requests are structures of the caller's: it owns them and all
 * memory they point at until `done` was called.
 *
 * Values have two parts: a small `head`, and an optional `body`, which an engine
 * may keep elsewhere (the embedded engine puts bodies out of place into its data
 * file and heads into its index). Whoever writes a body puts its hash into the
 * head; engines hash what is their own.
 */
#ifndef STORE_STORE_H
#define STORE_STORE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/counter.h"
#include "base/env.h"
#include "base/list.h"
#include "base/status.h"

struct store;

#define STORE_KEY_BYTES_MAX 511u /* and at least 1 */
#define STORE_ID_BYTES 16u
#define STORE_RANGES_MAX 64u /* in one read */

/* What an engine can take and offers; constant after open. */
struct store_limits {
    uint32_t head_bytes_max;  /* longest value head (and longest value without a body) */
    uint32_t body_bytes_max;  /* longest body */
    uint64_t batch_bytes_max; /* most bytes (heads and bodies) in one commit that performs well */
    uint64_t commit_bytes_max; /* a commit with more (keys, heads, bodies) is refused: ST_INVAL */
    uint32_t body_bytes_best; /* bodies of about this size perform best: the default block size */
    bool clears_ranges;       /* STORE_CLEAR_RANGE costs the same however much there is, and reading
                                 a range costs as much as its bodies: clean-up need not look */
    bool has_log;             /* log.h works: writes may be answered from it */
    bool needs_heartbeat;     /* dead processes are known by silence only (no session_probe) */
};

/* One exact key. */
struct store_get {
    struct slice key;     /* in; owned by the caller until released */
    void *body;           /* in: where the body goes; NULL: the body is not read */
    uint32_t body_cap;    /* in: bytes at `body`; a longer body gives ST_IO for this get; what is
                             behind a shorter one may be overwritten */
    enum status st;       /* out: ST_OK, ST_NOTFOUND, or ST_IO for this key alone */
    struct slice head;    /* out: the engine's, until store_read_release */
    uint32_t body_len;    /* out: length of the body, also where it was not read */
};

struct store_pair {
    struct slice key;
    struct slice head;
    uint32_t body_len;
};

/* The keys in [begin, end), at most `limit` of them, from the front or the back. Bodies
 * are not read. */
struct store_range {
    struct slice begin, end;  /* in */
    uint32_t limit;           /* in: 1 .. 65536 */
    bool reverse;             /* in: start from the end; pairs come in falling order */
    struct store_pair *pairs; /* out: the engine's, until store_read_release */
    uint32_t n_pairs;         /* out */
    bool more;                /* out: the limit cut the answer short */
};

/* Gets and ranges answered together as of one version, which is not older than any
 * commit acknowledged anywhere before the read began. */
struct store_read {
    struct store_get *gets;
    struct store_range *ranges;
    uint32_t n_gets, n_ranges;
    /* All keys are changed by nobody but this reactor (it owns their volume): a version not
     * older than the last commit answered to this reactor will do, which saves asking for one. */
    bool own;
    bool background; /* may wait while others are busy: clean-up, verify, export */
    uint64_t tag;    /* the volume it is for, so that an operator can throttle it; 0: none */
    /* Optional: called once when all values are there, on a worker thread where the engine
     * has one (so that decoding is not the reactor's work), before `done`. Not called
     * where the whole read failed. */
    void (*digest)(struct store_read *read);
    /* ST_OK (single gets may have failed, see st), or what made the whole read fail:
     * ST_IO (a range met a damaged value, too), ST_UNAVAIL (store_options.timeout_ms). */
    void (*done)(struct store_read *read, enum status st);

    struct store *store; /* the engine's, from here on */
    struct env *env;
    struct env_work work;
    struct env_task task;
    struct list link;
    void *arena, *batch;
    uint32_t bodies_pending;
    enum status result;
};

enum store_check_kind {
    STORE_CHECK_VALUE,  /* `key` has exactly the head `value` */
    STORE_CHECK_ABSENT, /* `key` does not exist */
    STORE_CHECK_EMPTY,  /* no key in [key, value) exists */
};

struct store_check {
    enum store_check_kind kind;
    struct slice key, value;
};

enum store_mutation_kind {
    STORE_SET,         /* key = head + body */
    STORE_CLEAR,       /* key is removed; its absence is no error */
    STORE_CLEAR_RANGE, /* all keys in [key, head) are removed; meant for ranges that hold few,
                          unless limits.clears_ranges */
};

struct store_mutation {
    enum store_mutation_kind kind;
    struct slice key, head, body;
};

struct store_log;

/* Checks, then mutations in the order given: all or nothing, durable when answered. */
struct store_commit {
    const struct store_check *checks;
    const struct store_mutation *mutations;
    size_t n_checks, n_mutations;
    /* Other processes may watch a key that this commit changes: wake them at once. */
    bool wake_watchers;
    bool background; /* as in struct store_read */
    uint64_t tag;
    /* The space this commit's bodies and keys may use was reserved (store_reserve): it does
     * not fail for lack of space, short of a medium that breaks promises. Commits without
     * a reservation may be answered ST_NOSPC. */
    bool reserved;
    /* Where set: with this commit, records of `log` below sequence number `log_keep_from`
     * are no longer needed by anybody and their room may be reused. */
    struct store_log *log;
    uint64_t log_keep_from;
    /* ST_OK; ST_CONFLICT (a check failed, nothing happened); ST_NOSPC, ST_IO, ST_UNAVAIL,
     * ST_INVAL (nothing happened: an engine settles unknown outcomes itself, however long that
     * takes; a commit is never given up half way). */
    void (*done)(struct store_commit *commit, enum status st);

    struct store *store; /* the engine's, from here on */
    struct env *env;
    struct list link;
    struct env_task task;
    uint64_t log_start[2];
    enum status result;
};

/* Tells once that `key` may have changed since store_watch(). Late or spurious is
 * allowed, never is not. Arm, then read: a change between the two fires. */
struct store_watch {
    struct slice key; /* owned by the caller while armed */
    void (*fired)(struct store_watch *watch);

    struct store *store; /* the engine's, from here on */
    struct env *env;
    struct list link;
    struct env_task task;
    uint64_t seen;
    int state;
};

enum store_liveness { STORE_SESSION_ALIVE, STORE_SESSION_DEAD, STORE_SESSION_UNKNOWN };

/* Space for bodies and keys of a later commit. */
struct store_reservation {
    uint64_t body_bytes; /* each body rounded up by the caller to store_body_cost() */
    uint64_t keys;       /* keys set, any kind; one more for every STORE_KEY_HEAD_BYTES of a long head */
};
#define STORE_KEY_HEAD_BYTES 2000u

/* A request for space that is not there at once: the engine tries to make room (grows
 * its file) and answers ST_OK (taken) or ST_NOSPC. */
struct store_reserve_wait {
    struct store_reservation want;
    void (*done)(struct store_reserve_wait *wait, enum status st);

    struct store *store; /* the engine's, from here on */
    struct env *env;
    struct list link;
    struct env_task task;
    enum status result;
};

#define STORE_BYTES_UNKNOWN UINT64_MAX

struct store_info {
    char uri[512];            /* as a person would give it */
    char engine[64];          /* "lmdb"; "fdb" and the versions in use */
    char state[256];          /* empty: it works; else what is wrong, as a sentence */
    uint64_t bytes_used;      /* space that holds something, data and index */
    uint64_t bytes_free;      /* inside the store's files, reusable */
    uint64_t bytes_available; /* the store could still grow by this much; may be UNKNOWN */
};

/* A copy of a whole store, made while others change it. */
struct store_backup {
    const char *to; /* in: where, in the engine's own terms */
    /* In: called every now and then on the calling thread, may be NULL. False: stop. */
    bool (*progress)(struct store_backup *backup);
    /* Out, while it runs too; `total`: 0 until it is known. */
    _Atomic uint64_t done_bytes, total_bytes;
    uint64_t n_damaged; /* out: things that are damaged in the store, and so in the copy */
};

struct store_ops {
    void (*close)(struct store *store);
    void (*read)(struct store *store, struct env *env, struct store_read *read);
    void (*read_release)(struct store_read *read);
    void (*commit)(struct store *store, struct env *env, struct store_commit *commit);
    void (*watch)(struct store *store, struct env *env, struct store_watch *watch);
    void (*watch_stop)(struct store_watch *watch);
    bool (*reserve)(struct store *store, struct store_reservation want);
    void (*reserve_wait)(struct store *store, struct env *env, struct store_reserve_wait *wait);
    void (*unreserve)(struct store *store, struct store_reservation what);
    uint64_t (*body_cost)(const struct store *store, uint64_t body_len);
    enum status (*session_begin)(struct store *store, const uint8_t id[STORE_ID_BYTES], struct err *e);
    void (*session_end)(struct store *store, const uint8_t id[STORE_ID_BYTES]);
    enum store_liveness (*session_probe)(struct store *store, const uint8_t id[STORE_ID_BYTES]);
    enum status (*session_kill)(struct store *store, const uint8_t id[STORE_ID_BYTES], struct err *e);
    enum status (*info)(struct store *store, struct store_info *info, struct err *e);
    enum status (*usage)(struct store *store, struct slice begin, struct slice end, uint64_t *keys,
                         uint64_t *bytes, struct err *e);
    /* NULL: the engine has means of its own. */
    enum status (*backup)(struct store *store, struct store_backup *backup, struct err *e);
    const struct store_log_ops *log; /* NULL where limits.has_log is false */
};

/* What an engine counts; any thread reads them (base/counter.h). */
struct store_counters {
    uint64_t retries;   /* attempts that failed and were made again */
};

/* Engines embed this as their first member. */
struct store {
    const struct store_ops *ops;
    struct store_limits limits;
    struct store_counters counters;
};

enum store_open_flags {
    STORE_CREATE = 1, /* make an empty store where there is none */
    STORE_WAIT = 2,   /* one that can't be reached is waited for, without end */
};

struct store_options {
    unsigned flags;       /* enum store_open_flags */
    unsigned lease_ms;    /* how long a process that stands in the way (holds the embedded
                             engine's writer lock and does nothing) is borne */
    unsigned timeout_ms;  /* reads that the store does not answer for so long fail with
                             ST_UNAVAIL; 0: they wait. Commits always wait */
    bool own_cache;       /* the caller's cache has most of the memory there is: what is read need
                             not be kept by the system as well */
    uint64_t quota_bytes; /* reservations beyond this many bytes in use are refused; 0: none */
};

/* Opens the store `uri` names: "lmdb:DIRECTORY", "fdb:[CLUSTER_FILE][?prefix=TEXT]". Blocks
 * for moments (STORE_WAIT: until it answers); any thread, before its reactors run. On
 * failure *out is NULL, `e` says why, and the status is ST_NOTFOUND (no store there), ST_INVAL
 * (no such scheme, or not of its form), ST_FORMAT, ST_UNAVAIL. */
enum status store_open(const char *uri, const struct store_options *options, struct store **out,
                       struct err *e);

/* Ends what engines keep running in the background. Once, before the process ends and after
 * all stores were closed; none can be opened afterwards. */
void store_shutdown(void);

/* No request, watch or log may be outstanding. */
static inline void store_close(struct store *store)
{
    store->ops->close(store);
}

static inline void store_read(struct store *store, struct env *env, struct store_read *read)
{
    CHECK(read->n_gets + read->n_ranges > 0 && read->n_ranges <= STORE_RANGES_MAX);
    store->ops->read(store, env, read);
}

/* Gives back what a finished read holds. Reactor thread of the read. Every read that was
 * answered must be released, failed ones too. */
static inline void store_read_release(struct store_read *read)
{
    read->store->ops->read_release(read);
}

/* Commits of one reactor are applied in the order given where limits.has_log; on other
 * engines whoever needs an order waits for the answer. */
static inline void store_commit(struct store *store, struct env *env, struct store_commit *commit)
{
    store->ops->commit(store, env, commit);
}

static inline void store_watch(struct store *store, struct env *env, struct store_watch *watch)
{
    store->ops->watch(store, env, watch);
}

/* After this returns the watch does not fire and may be freed. Reactor thread of the watch.
 * Harmless on one that fired already. */
static inline void store_watch_stop(struct store_watch *watch)
{
    watch->store->ops->watch_stop(watch);
}

/* Takes space for a later commit at once if it is known to be there; false: ask with
 * store_reserve_wait. Never blocks; any reactor. */
static inline bool store_reserve(struct store *store, struct store_reservation want)
{
    return store->ops->reserve(store, want);
}

static inline void store_reserve_wait(struct store *store, struct env *env,
                                      struct store_reserve_wait *wait)
{
    store->ops->reserve_wait(store, env, wait);
}

/* Gives a reservation (or a part) back: after its commit was answered, or unused. */
static inline void store_unreserve(struct store *store, struct store_reservation what)
{
    store->ops->unreserve(store, what);
}

/* What a body of `body_len` bytes takes in the store, for reservations. */
static inline uint64_t store_body_cost(const struct store *store, uint64_t body_len)
{
    return store->ops->body_cost(store, body_len);
}

/* Registers this process as the session `id`, so that others can tell whether it lives
 * (the engine's own means: a lock that dies with the process, its pid and start time).
 * Blocks for moments. */
static inline enum status store_session_begin(struct store *store,
                                              const uint8_t id[STORE_ID_BYTES], struct err *e)
{
    return store->ops->session_begin(store, id, e);
}

static inline void store_session_end(struct store *store, const uint8_t id[STORE_ID_BYTES])
{
    store->ops->session_end(store, id);
}

/* Whether the process behind a session lives. UNKNOWN where the engine can't tell. */
static inline enum store_liveness store_session_probe(struct store *store,
                                                      const uint8_t id[STORE_ID_BYTES])
{
    return store->ops->session_probe(store, id);
}

/* Ends the process behind a session for good (pidfd, SIGKILL) and waits for its end; for
 * owners that have been silent for longer than a lease. First it is watched for up to 2 s:
 * one that is alive and at work, only slow, is not ended: ST_BUSY. ST_UNSUP where an engine
 * can't. Blocks: on a worker thread. */
static inline enum status store_session_kill(struct store *store,
                                             const uint8_t id[STORE_ID_BYTES], struct err *e)
{
    return store->ops->session_kill(store, id, e);
}

/* For people. Blocks for moments. */
static inline enum status store_info(struct store *store, struct store_info *info, struct err *e)
{
    return store->ops->info(store, info, e);
}

/* How many keys [begin, end) holds and what their heads and bodies take in the store.
 * May walk the range (bounded: past a million keys it may extrapolate); an engine that only
 * estimates bytes says 0 keys. Blocks: not on a reactor that serves. */
static inline enum status store_usage(struct store *store, struct slice begin, struct slice end,
                                      uint64_t *keys, uint64_t *bytes, struct err *e)
{
    return store->ops->usage(store, begin, end, keys, bytes, e);
}

/* Copies the store as it is at one moment after the call, with every write that was answered before
 * the call. The copy opens as a store of its own in which no session lives. All or nothing: where
 * this fails, nothing is at `to`. ST_UNSUP, ST_EXISTS (there is something at `to`), ST_BUSY
 * (another backup goes there), ST_SHUTDOWN (progress() said so), ST_NOSPC, ST_UNAVAIL, ST_IO.
 * Blocks for as long as it takes. */
enum status store_backup(struct store *store, struct store_backup *backup, struct err *e);

#endif
