/*
 * What the parts of the client library's double know of each other.
 *
 * One lock guards everything. Calls of a program are taken under it on the calling thread,
 * up to what the real client decides by itself; what the cluster decides becomes an event of
 * the network thread, which is whoever is inside fdb_run_network(). Only that thread makes
 * futures ready and calls back, never with the lock held.
 *
 *   map.c      the cluster's keys with all their versions, and who wrote where lately
 *   writes.c   what a transaction has written so far, seen by its own reads
 *   loop.c     events and futures
 *   server.c   the cluster: read versions, reads, commits, watches, faults
 *   client.c   transactions as the client library has them
 *   api.c      the functions a program finds: databases, network, errors
 *   control.c  double.h
 */
#ifndef TESTS_FDB_INSIDE_H
#define TESTS_FDB_INSIDE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "base/check.h"
#include "base/list.h"
#include "base/mem.h"
#include "c_api.h"
#include "double.h"

#define EXPORT __attribute__((visibility("default")))

enum fdb_error {
    E_TOO_OLD = 1007,
    E_FUTURE = 1009,
    E_CONFLICT = 1020,
    E_UNKNOWN = 1021,
    E_TXN_CANCELLED = 1025,
    E_TIMED_OUT = 1031,
    E_MANY_WATCHES = 1032,
    E_WATCHES_DISABLED = 1034,
    E_UNREADABLE = 1036,
    E_BEHIND = 1037,
    E_CHANGED = 1039,
    E_CANCELLED = 1101,
    E_RELEASED = 1102,
    E_NO_CLUSTER_FILE = 1515,
    E_INVALID = 2000,
    E_OUTSIDE = 2004,
    E_INVERTED = 2005,
    E_OPTION_VALUE = 2006,
    E_OPTION = 2007,
    E_NO_NETWORK = 2008,
    E_NETWORK_TWICE = 2009,
    E_VERSION_SET = 2010,
    E_VERSION_INVALID = 2011,
    E_LIMITS = 2012,
    E_NOT_SET = 2015,
    E_DURING_COMMIT = 2017,
    E_MUTATION = 2018,
    E_RESTARTED = 2025,
    E_BLOCKED = 2026,
    E_TOO_LARGE = 2101,
    E_KEY_LARGE = 2102,
    E_VALUE_LARGE = 2103,
    E_CONNECTION_STRING = 2104,
    E_MANY_TAGS = 2109,
    E_TAG_LONG = 2110,
    E_NO_MODULE = 2113,
    E_SPECIAL_WRITE = 2114,
    E_API_UNSET = 2200,
    E_API_TWICE = 2201,
    E_API_INVALID = 2202,
    E_API_UNSUPPORTED = 2203,
    E_EXACT_UNLIMITED = 2210,
};

#define KEY_BYTES_MAX 10000u
#define SYSTEM_KEY_BYTES_MAX 30000u
#define VALUE_BYTES_MAX 100000u
#define TXN_BYTES_MAX 10000000u
/* What the real client charges for a mutation and for a conflict range beside their bytes. */
#define MUTATION_BYTES 44u
#define RANGE_BYTES 24u
#define TAGS_MAX 5u

/* --- bytes ---------------------------------------------------------------------------- */

/* Shared, never changed once filled. */
struct blob {
    uint32_t refs, len;
    uint8_t data[];
};

struct blob *blob_new(const void *data, size_t len);
struct blob *blob_ref(struct blob *b); /* NULL stays NULL */
void blob_unref(struct blob *b);
struct blob *blob_after(const struct blob *b); /* the next possible key: with a zero byte */
int blob_compare(const struct blob *a, const struct blob *b);
int bytes_compare(const void *a, size_t a_len, const void *b, size_t b_len);

/* [begin, end) */
struct range {
    struct blob *begin, *end;
};

struct ranges {
    struct range *items;
    size_t n, cap;
};

void ranges_add(struct ranges *rs, struct blob *begin, struct blob *end); /* takes both refs */
void ranges_tidy(struct ranges *rs); /* sorted; those that touch are one */
bool ranges_meet(const struct ranges *tidy, const struct range *r);
uint64_t ranges_bytes(const struct ranges *rs);
void ranges_free(struct ranges *rs);

/* --- map.c ---------------------------------------------------------------------------- */

struct node;

struct node *map_seek(const uint8_t *key, size_t len); /* the first node at or behind */
struct node *map_before(const uint8_t *key, size_t len);
struct node *map_next(const struct node *n);
const struct blob *map_key(const struct node *n);
struct blob *map_value(const struct node *n, int64_t version);       /* NULL: not there then */
void map_set(struct blob *key, struct blob *value, int64_t version); /* value NULL: removed */
void map_clear(const struct blob *begin, const struct blob *end, int64_t version);
/* Versions below this are forgotten, and no longer held. */
void map_forget(int64_t oldest);
int64_t map_superseded_version(void); /* of the oldest value held for old readers; 0: none */
uint64_t map_superseded_bytes(void);
void map_free(void);

/* Which ranges a commit wrote, for later conflict checks; takes what is in `rs`. */
void history_add(int64_t version, struct ranges *rs);
bool history_meets(int64_t after, const struct ranges *reads);
void history_forget(int64_t oldest);

/* --- writes.c ------------------------------------------------------------------------- */

enum mutation_type {
    M_SET = 0,
    M_CLEAR_RANGE = 1,
    M_ADD = 2,
    M_AND = 6,
    M_OR = 7,
    M_XOR = 8,
    M_APPEND_IF_FITS = 9,
    M_MAX = 12,
    M_MIN = 13,
    M_VERSIONSTAMPED_KEY = 14,
    M_VERSIONSTAMPED_VALUE = 15,
    M_BYTE_MIN = 16,
    M_BYTE_MAX = 17,
    M_COMPARE_AND_CLEAR = 20,
};

struct mutation {
    enum mutation_type type;
    struct blob *key, *value; /* M_CLEAR_RANGE: value is the end */
};

/* A mutation that needs to know what was there. */
struct atomic_op {
    enum mutation_type type;
    struct blob *operand;
};

enum written { W_NOT, W_SET, W_CLEARED, W_ATOMIC, W_UNREADABLE };

/* What holds for one key, and for all keys between it and the entry behind. */
struct write {
    struct blob *key;
    struct blob *value;    /* W_SET */
    struct atomic_op *ops; /* W_ATOMIC, W_UNREADABLE: on top of the cluster's value */
    size_t n_ops;
    enum written at;
    bool gap_cleared;
    bool at_conflicts, gap_conflicts; /* others' reads of it conflict with this transaction */
};

/* Sorted; the first entry's key is empty once there is any. */
struct writes {
    struct write *items;
    size_t n, cap;
    struct mutation *stamped; /* M_VERSIONSTAMPED_KEY: their keys are not known yet */
    size_t n_stamped, stamped_cap;
};

void writes_set(struct writes *w, struct blob *key, struct blob *value, bool conflicts);
void writes_atomic(struct writes *w, enum mutation_type type, struct blob *key,
                   struct blob *operand, bool conflicts);
void writes_clear(struct writes *w, struct blob *begin, struct blob *end, bool conflicts);
void writes_conflict(struct writes *w, struct blob *begin, struct blob *end);
void writes_copy(struct writes *to, const struct writes *from);
void writes_free(struct writes *w);
bool writes_empty(const struct writes *w);
/* The entry that holds for this key, and whether as its own (else as part of the gap). */
const struct write *writes_find(const struct writes *w, const uint8_t *key, size_t len,
                                bool *exact);
/* The mutations and write conflicts that a commit sends. */
void writes_send(const struct writes *w, struct mutation **mutations, size_t *n,
                 struct ranges *conflicts);
/* Adds to `reads` those parts of [begin, end) whose content is the cluster's. */
void writes_unwritten(const struct writes *w, struct blob *begin, struct blob *end,
                      struct ranges *reads);
/* The value after an operation on `old` (NULL: no key); a new reference, NULL: no key. */
struct blob *atomic_apply(const struct atomic_op *op, struct blob *old);
struct blob *atomic_apply_all(const struct write *w, struct blob *old);

/* Keys as a transaction sees them: its writes over the cluster at a version. */
struct view {
    const struct writes *writes; /* NULL: none */
    int64_t version;
};

struct seen {
    const struct blob *key; /* valid while the lock is held */
    struct blob *value;     /* a reference */
};

/* The first key at or behind / the last key before; false: none. `unreadable` is set where
 * a key was met whose value nobody knows yet. */
bool view_at_or_after(const struct view *v, const uint8_t *key, size_t len, struct seen *out,
                      bool *unreadable);
bool view_before(const struct view *v, const uint8_t *key, size_t len, struct seen *out,
                 bool *unreadable);

/* --- loop.c --------------------------------------------------------------------------- */

enum future_kind { F_VOID, F_INT64, F_UINT64, F_VALUE, F_RANGE, F_KEYS };

/* What an unsettled future of a transaction stands for. */
enum op { OP_NONE, OP_VERSION, OP_GET, OP_RANGE, OP_WATCH, OP_COMMIT, OP_ON_ERROR, OP_OTHER };

struct selector {
    struct blob *key;
    bool or_equal;
    int offset;
};

struct range_request {
    struct selector begin, end;
    uint64_t rows_max, bytes_max; /* UINT64_MAX: no limit */
    bool reverse;
};

struct FDB_future {
    uint32_t magic;
    uint32_t refs;
    FDBDatabase *db; /* a reference; NULL: of a call that named none */
    enum future_kind kind;
    bool settled; /* decided, perhaps not to be seen yet */
    bool ready, released, destroyed, calling;
    fdb_error_t error;
    FDBCallback callback;
    void *callback_arg;
    struct list fire_link;

    /* result */
    int64_t number;
    bool present, more;
    uint8_t *bytes; /* of the value, or of all keys and values */
    size_t bytes_len;
    FDBKeyValue *pairs;
    FDBKey *keys;
    int n;

    /* the operation, until it is settled */
    enum op op;
    FDBTransaction *txn; /* a reference, while linked */
    struct list txn_link;
    bool snapshot, waits_version;
    bool has_view; /* `writes` is what the transaction had written when it was asked */
    struct writes writes;
    struct blob *key;
    struct range_request range;
    fdb_error_t fault;
    bool cut_at_own;
    uint64_t rows_cut; /* a range's answer is cut after so many rows; 0: not */
    uint64_t delay_ns, answer_delay_ns;
};

/* Between whom something happens: what a cut holds up, or a process that stands still. */
enum way {
    WAY_LOCAL,   /* in the client */
    WAY_REQUEST, /* from the client to the cluster */
    WAY_ANSWER,  /* back */
    WAY_CLUSTER, /* in the cluster */
};

struct event {
    uint64_t due_ns, seq;
    void (*run)(struct event *e);
    enum way way;
    bool batch;   /* not while batch priority is stopped */
    bool idle;    /* nobody waits for it: a timer */
    bool through; /* was past the place of the cut */
    bool unsent;  /* a request that its process had not yet handed over when it stood still */
    FDBFuture *f;
    FDBTransaction *t;
    FDBDatabase *db; /* a reference; of f or t, else NULL */
    struct commit *commit;
    struct watch *watch;
    uint64_t gen;
    int64_t version;
    fdb_error_t error;
};

uint64_t now_ns(void);
struct event *event_new(enum way way, void (*run)(struct event *e), FDBFuture *f,
                        FDBTransaction *t);
void event_post(struct event *e, uint64_t delay_ns);
void event_free(struct event *e);
void events_release_held(void); /* those held up may run, as far as the settings allow now */
bool events_pending(void);      /* any that somebody may wait for */
/* Looks at all that is on its way from or to `db`; false from `see`: it is dropped. */
void events_each(FDBDatabase *db, bool (*see)(struct event *e, uint64_t now));
void events_instant(void); /* runs what was asked for while `instant` is on */
void events_run_due(void);
uint64_t events_next_due_ns(void); /* UINT64_MAX: none */

FDBFuture *future_new(enum future_kind kind, FDBDatabase *db);
FDBFuture *future_ref(FDBFuture *f);
void future_unref(FDBFuture *f);
/* The result is there (filled in before) or the error. Any thread; nothing happens to one
 * that was settled before. */
void future_settle(FDBFuture *f, fdb_error_t error);
/* Futures and transactions that ended keep their memory for a while, so that a later use is
 * seen and does no harm. */
void bury(void *object);
void graves_free(void);

/* --- server.c ------------------------------------------------------------------------- */

enum fate {
    FATE_TRUE,
    FATE_CONFLICT,
    FATE_TOO_LARGE,
    FATE_UNKNOWN_HAPPENED,
    FATE_UNKNOWN_LOST,
    FATE_CHANGED_HAPPENED,
    FATE_CHANGED_LOST,
    FATE_TIMEOUT_LATE,
    FATE_CANCELLED_LATE,
};

/* A commit on its way. The transaction may be gone by the time it arrives. */
struct commit {
    struct mutation *mutations;
    size_t n_mutations;
    struct ranges reads, writes;
    int64_t read_version;
    enum fate fate;
    bool given_up;       /* its caller is told something before it arrives */
    FDBFuture *f;        /* NULL: not sent */
    struct event *event; /* on its way */
    uint64_t bytes, charged_bytes;
    uint64_t answer_delay_ns;
    struct list link;
};

struct watch {
    struct list link; /* of its transaction until that has committed, then of the cluster */
    FDBFuture *f;
    FDBDatabase *db;
    struct blob *key, *value;
    bool changed;
};

uint64_t chance_below(uint64_t n);
bool one_in(int64_t n);
uint64_t random_delay_ns(void);
fdb_error_t fault_of_read(void);
int64_t version_now(void);
void version_request(FDBTransaction *t);
void read_send(FDBFuture *f);
struct commit *commit_new(FDBTransaction *t); /* takes its writes and read conflicts */
void commit_send(FDBFuture *f, FDBTransaction *t, struct commit *c);
/* What happens to one database, as double.h has it. The lock is held. */
void link_cut(FDBDatabase *db, bool cut);
void link_pause(FDBDatabase *db, bool paused);
void link_die(FDBDatabase *db);
fdb_error_t commit_decide(struct commit *c, int64_t *version);
void batch_end(void); /* what it took in can be seen from now on */
void commit_free(struct commit *c);
bool watch_begin(FDBFuture *f, FDBTransaction *t, struct blob *value);
void watch_end(struct watch *w, fdb_error_t error);
void watches_written(FDBTransaction *t);
void watches_activate(FDBTransaction *t);
void watches_cancel(FDBTransaction *t, fdb_error_t error);
void cluster_forget(int64_t oldest);
void cluster_reset(void);

/* --- client.c ------------------------------------------------------------------------- */

enum version_state { VERSION_NONE, VERSION_ASKED, VERSION_KNOWN };

struct txn_options {
    int64_t timeout_ms, retry_limit, max_delay_ms, size_limit;
};

struct FDB_database {
    uint32_t magic;
    uint32_t refs;
    fdb_error_t error; /* what every operation gets */
    struct txn_options defaults;
    uint64_t watches_max, watches;
    uint64_t commit_ns, answer_ns; /* that its commits and their answers take longer */
    bool cut, paused, dead;
};

struct FDB_transaction {
    uint32_t magic;
    uint32_t refs;
    bool destroyed;
    FDBDatabase *db;
    uint64_t gen;            /* counts resets, so that late answers are known to be for the past */
    struct list pending;     /* FDB_future.txn_link */
    struct list watches;     /* begun, not committed */
    fdb_error_t reset_error; /* no longer usable: cancelled, timed out, used during commit */
    fdb_error_t deferred;    /* of a call that returns nothing; the next future has it */
    fdb_error_t read_error;  /* of a read; a commit fails with it */
    bool commit_started;
    FDBFuture *commit_waiting; /* for the reads before it; no reference, it is in `pending` */
    struct commit *unsent;     /* for a read version */
    unsigned reads;            /* outstanding */
    enum version_state version_state;
    int64_t read_version, committed_version;
    struct writes writes;
    struct ranges reads_made; /* read conflicts */
    uint64_t bytes_approx;
    struct txn_options options;
    bool ryw_disabled, next_write_no_conflict, system_read, system_write, batch, immediate;
    bool read_low;
    int snapshot_ryw;
    struct blob *tags[TAGS_MAX];
    unsigned n_tags;
    uint64_t backoff_ns, creation_ns, timer;
    int64_t retries;
};

FDBDatabase *db_ref(FDBDatabase *db);
void db_unref(FDBDatabase *db);
FDBTransaction *txn_ref(FDBTransaction *t);
void txn_unref(FDBTransaction *t);
void txn_settled(FDBFuture *f); /* a future of a transaction has just been settled */
void txn_version_known(FDBTransaction *t);
void txn_fail(FDBTransaction *t, fdb_error_t error); /* unusable from now on */
void txn_count_tags(const FDBTransaction *t);

/* --- what there is one of ------------------------------------------------------------- */

struct tag_use {
    struct blob *tag;
    uint64_t n;
};

struct double_state {
    pthread_mutex_t lock;
    pthread_cond_t work;  /* the network thread has something to do */
    pthread_cond_t ready; /* some future became ready, or an event ran */
    int api_selected;
    bool network_setup, network_ran, network_running, network_stop;
    bool dispatching; /* an event or a callback is running */
    pthread_t network_thread;
    /* No thread: whoever has the clock calls. */
    bool manual, manual_running;
    uint64_t (*clock)(void *arg);
    void (*wake)(void *arg, uint64_t due_ns);
    void *clock_arg;
    bool instant; /* what is asked for is answered inside the call, whatever the settings say */
    struct fdb_double_config config;
    struct fdb_double_counts counts;
    uint64_t random;
    int64_t version_base; /* version_now() at version_base_ns */
    uint64_t version_base_ns;
    int64_t version_last;   /* the newest that was committed or given out */
    int64_t version_oldest; /* that can still be read */
    int64_t version_forgot; /* what could be read only before this was freed */
    int64_t batch_version;  /* of the batch that is open; 0: none. What it took in is decided and
                               stands in the map, but nobody can have a version to see it with */
    int64_t batch_before;   /* the newest version that can be read meanwhile */
    uint64_t batch_until_ns;
    uint64_t batch_seq;  /* counts batches */
    uint32_t batch_size; /* commits in the open one */
    struct list watches;
    struct list commits; /* on their way */
    char *health;
    char violation[200];
    struct tag_use *tags;
    size_t n_tags, tags_cap;
};

extern struct double_state g;

void lock(void);
void unlock(void);
bool on_network_thread(void);
/* The caller did what it must not do. */
void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool config_set_by_name(const char *name, size_t len, int64_t value);
void config_changed(void);
int api_version(void);

#endif
