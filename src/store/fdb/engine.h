/*
 * What the files of the FoundationDB engine share.
 *
 *   api.c       the client library and its network thread
 *   engine.c    opening and closing, waiting for the cluster
 *   versions.c  read versions, fetched for many at once
 *   read.c      store_read
 *   commit.c    store_commit: checks, lanes, unknown outcomes
 *   watch.c     store_watch
 *   room.c      quota, usage, what to tell people
 *   health.c    whether the cluster answers, and why not
 *
 * Threads: everything that belongs to a reactor (struct fr) is touched on that
 * reactor's thread only. The network thread runs the callbacks of futures; they
 * count down and post a task to the reactor, and do nothing else.
 */
#ifndef STORE_FDB_ENGINE_H
#define STORE_FDB_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/check.h"
#include "base/list.h"
#include "base/mem.h"
#include "store/fdb/api.h"
#include "store/store.h"

#define FD_BODY_BYTES_MAX 65536u
#define FD_HEAD_BYTES_MAX 32768u
#define FD_BATCH_BYTES_MAX (4u << 20)
/* Of FoundationDB's 10,000,000 for keys, values and conflict ranges. */
#define FD_COMMIT_BYTES_MAX 9500000u
#define FD_MUTATION_OVERHEAD 72u
#define FD_PREFIX_BYTES_MAX 80u
#define FD_KEY_BYTES_MAX (FD_PREFIX_BYTES_MAX + STORE_KEY_BYTES_MAX + 1)
#define FD_REACTORS_MAX 80u
#define FD_LANES_MAX 128u
#define FD_LANE_VALUE_BYTES 16u /* u64 number, u64 version */

/* A version serves own reads and fenced commits for so long; FoundationDB keeps 5 s. */
#define FD_VERSION_AGE_MAX_NS 2000000000ull
/* Older than this, a fresh one is asked for ahead of need. */
#define FD_VERSION_AGE_RENEW_NS 50000000ull

struct fd;
struct fr;

/* A key with the store's prefix in front. */
struct fd_key {
    uint8_t bytes[FD_KEY_BYTES_MAX];
    int len;
};

/* What a callback of the library finds in memory was put there before the callback was set. The
 * library sees to that by means which ThreadSanitizer knows only where it was built with it. */
#ifdef __SANITIZE_THREAD__
void __tsan_release(void *what);
void __tsan_acquire(void *what);
#define fd_hand_over(what) __tsan_release(what)
#define fd_take_over(what) __tsan_acquire(what)
#else
#define fd_hand_over(what) ((void)(what))
#define fd_take_over(what) ((void)(what))
#endif

/* One or more futures somebody waits for: `ready` runs on the reactor when all are. The
 * memory is the waiter's; it stays valid until then. */
struct fd_wait {
    struct env_task task;
    struct env *env;
    void (*ready)(struct fd_wait *wait);
    _Atomic uint32_t left;
};

/* A pause after an error, as long as FoundationDB's own backoff wants it. */
struct fd_retry {
    struct fd_wait wait;
    struct env_timer timer;
    struct env *env;
    FDBFuture *future;
    void (*again)(struct fd_retry *retry, bool lasting);
    unsigned pause_ms; /* the last one after an error that lasts */
};

/* Somebody who wants a read version. */
struct fd_version_wait {
    struct list link;
    void (*ready)(struct fd_version_wait *w, int64_t version);
};

/* A transaction whose only purpose is to get a read version. */
struct fd_grv {
    struct fr *fr;
    FDBTransaction *tr;
    FDBFuture *future;
    struct fd_wait wait;
    struct fd_retry retry;
    bool background, flying;
    uint64_t asked_ns;
    struct list waiting, served; /* fd_version_wait: for the next one; for this one */
};

/* A chain of commits, one at a time, under one commit-id key; see commit.c. */
struct fd_lane {
    struct list link; /* fr->lanes while idle, least recently used first */
    uint32_t no;
    uint64_t seq;     /* the newest id used */
    bool side;        /* the key the last commit wrote */
    /* What the last commit proved: this key had this value at this version. */
    uint64_t known_hash;
    uint8_t *known; /* key, value */
    size_t known_key_len, known_value_len, known_cap;
    int64_t known_version;
    uint64_t known_ns;
    struct fd_ticket *ticket;
};

/* One reactor's part of an open store. */
struct fr {
    struct fd *fd;
    struct env *env;
    struct fd_grv *grv[2]; /* by `background` */
    int64_t version;      /* the newest known to hold all that was answered here; 0: none */
    uint64_t version_ns;  /* when it was asked for */
    uint64_t version_floor_ns; /* what was asked for before may be too old for own reads */
    struct list lanes;    /* idle */
    struct list commits;  /* waiting for a lane */
    struct list reads, committing, watches, tickets; /* under way */
    uint32_t n_lanes, no;
    uint8_t *value; /* to put values together in */
    struct env_timer tick; /* while anything is under way */
    bool ticking;
    uint64_t heard_ns; /* when the cluster last answered something */
    struct health *health;
    struct list room_waits;
};

struct fd {
    struct store base;
    FDBDatabase *db;
    struct store_options options;
    char uri[512], cluster[400], prefix_text[FD_PREFIX_BYTES_MAX];
    uint8_t prefix[FD_PREFIX_BYTES_MAX];
    int prefix_len;
    int64_t first_version; /* the cluster's first answer */
    uint8_t writer[8]; /* random, once there is a reactor: names the lanes of this handle */
    pthread_mutex_t lock; /* adding to reactors[] */
    struct fr *reactors[FD_REACTORS_MAX];
    _Atomic uint32_t n_reactors;
    struct room *room;
    pthread_mutex_t state_lock;
    char state[256];             /* empty: it answers */
    _Atomic uint64_t silent_since_ns; /* 0: it answers */
};

static inline struct fd *fd_of(struct store *store)
{
    return (struct fd *)(void *)store;
}

/* The part of the reactor behind `env`; made at its first use. Its thread. */
struct fr *fd_reactor(struct fd *fd, struct env *env);

void fd_key_make(const struct fd *fd, struct fd_key *k, struct slice key);
/* ("x", writer, reactor, lane): where a lane keeps the id of its last commit. */
void fd_key_lane(const struct fr *fr, struct fd_key *k, uint32_t lane);
/* All keys of the store: [begin, end). */
void fd_key_bounds(const struct fd *fd, struct fd_key *begin, struct fd_key *end);

/* A value as stored: u16 length of the head, head, body. */
uint32_t fd_value_put(uint8_t *out, struct slice head, struct slice body);
/* False where it is not of that form. */
bool fd_value_parse(const uint8_t *value, int len, struct slice *head, struct slice *body);

/* Calls wait->ready on the reactor when `future` is ready. */
void fd_wait_one(struct fr *fr, struct fd_wait *wait, FDBFuture *future,
                 void (*ready)(struct fd_wait *wait));
/* The same for several: begin with the count, then one call each. */
void fd_wait_begin(struct fr *fr, struct fd_wait *wait, uint32_t n,
                   void (*ready)(struct fd_wait *wait));
void fd_wait_add(struct fd_wait *wait, FDBFuture *future);

/* After `tr` met the error `code`: calls `again` when it may be tried again; the transaction
 * is reset and keeps its backoff. `lasting`: the error is none that passes by itself, as far as
 * FoundationDB knows; then a pause has gone by, at first a short one, at last a second. */
void fd_retry(struct fr *fr, struct fd_retry *retry, FDBTransaction *tr, int code,
              void (*again)(struct fd_retry *retry, bool lasting));

/* Gives up waiting for one future at close: cancels it and waits until its callback has run.
 * wait->ready still comes, from the reactor's queue; the future is destroyed here. */
void fd_wait_abandon(struct fd_wait *wait, FDBFuture *future);

/* Makes *tr where it is NULL, and gives it the usual options: no memory of its own writes,
 * priority, tag. To be called again after each error and reset, which take them away. */
void fd_transaction(struct fd *fd, FDBTransaction **tr, bool background, uint64_t tag);

/* Waits for `future` on the calling thread, `ms` at most; false: it is not ready. For
 * opening, closing and people's questions; not on a reactor that serves. */
bool fd_block(FDBFuture *future, uint64_t ms);

/* --- versions.c -------------------------------------------------------------------- */

void fd_versions_init(struct fr *fr);
void fd_versions_close(struct fr *fr);
/* Calls w->ready, never from inside, with a version not older than any commit answered
 * anywhere before this call. Versions of later calls are not lower. */
void fd_version_get(struct fr *fr, bool background, struct fd_version_wait *w);
/* Withdraws one that was not served yet. */
void fd_version_stop(struct fd_version_wait *w);
/* A version that is good for own reads right now, or 0. */
int64_t fd_version_own(struct fr *fr);
/* A commit was answered; its version, or 0 where only its success is known. */
void fd_version_committed(struct fr *fr, int64_t version, uint64_t asked_ns);

/* --- read.c, commit.c, watch.c ------------------------------------------------------ */

void fd_read(struct store *store, struct env *env, struct store_read *read);
void fd_read_release(struct store_read *read);
/* Gives up reads that are older than the timeout. */
void fd_reads_expire(struct fr *fr, uint64_t now_ns);
uint64_t fd_reads_oldest_ns(const struct fr *fr);

void fd_commit(struct store *store, struct env *env, struct store_commit *commit);
uint64_t fd_commits_oldest_ns(const struct fr *fr);
void fd_lanes_close(struct fr *fr);

void fd_watch(struct store *store, struct env *env, struct store_watch *watch);
void fd_watch_stop(struct store_watch *watch);
void fd_watches_close(struct fr *fr);

/* --- room.c ------------------------------------------------------------------------- */

void fd_room_open(struct fd *fd);
void fd_room_close(struct fd *fd);
bool fd_reserve(struct store *store, struct store_reservation want);
void fd_reserve_wait(struct store *store, struct env *env, struct store_reserve_wait *wait);
void fd_unreserve(struct store *store, struct store_reservation what);
uint64_t fd_body_cost(const struct store *store, uint64_t body_len);
enum status fd_info(struct store *store, struct store_info *info, struct err *e);
enum status fd_usage(struct store *store, struct slice begin, struct slice end, uint64_t *keys,
                     uint64_t *bytes, struct err *e);

/* --- health.c ------------------------------------------------------------------------ */

/* What the cluster says of its health (the value of the special key), as a person would put it;
 * false where it says that nothing is wrong. */
bool fd_health_describe(const uint8_t *value, int len, char *out, size_t size);
extern const char fd_health_key[];

/* Something was sent, or waits: from now on it is looked after whether answers come. */
void fd_health_watch(struct fr *fr);
void fd_health_close(struct fr *fr);

#endif
