/*
 * A double of FoundationDB's client library, and of a cluster behind it, in memory.
 *
 * It is built as `libfdb_c.so` into a folder of its own, so that a program loads it exactly
 * as it would load the real library (LD_LIBRARY_PATH names that folder). It behaves as
 * version 7.3 does where nothing else is asked of it, and it is there for what a real cluster
 * does seldom or never: every error at any moment, commits with an unknown outcome, commits
 * that happen long after their caller has been told of a timeout, answers in any order.
 *
 * This header is how a test talks to it. The library is not linked but loaded, so all of it
 * hangs on one symbol:
 *
 *     const struct fdb_double *d = dlsym(library, FDB_DOUBLE_SYMBOL);
 *
 * A program that cannot be talked to is told by its environment, when the library is
 * loaded: FDB_DOUBLE="seed=7,unknown_happened=50,delay_us_max=300" (names of FDB_DOUBLE_CONFIG).
 *
 * There is one cluster for all databases that are opened. Any thread may call any of this.
 *
 * With `manual` there is no network thread: whoever owns the clock runs what is due, and all
 * callbacks are called from there (a simulator, in one thread). So it replays exactly.
 *
 * Requests are decided (faults, delays) in the order in which they are made, from one seeded
 * generator: what the same calls in the same order meet is the same.
 */
#ifndef TESTS_FDB_DOUBLE_H
#define TESTS_FDB_DOUBLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FDB_DOUBLE_SYMBOL "fdb_double"

/* Numbers one can set. "one in N": 0 is never. X(name, value after reset) */
#define FDB_DOUBLE_CONFIG(X)                                                                       \
    X(api, 730)        /* newest API version of this library; also its release */                  \
    X(seed, 1)         /* setting it starts the generator again */                                 \
    X(delay_us_max, 0) /* each request takes 0 .. this on its way, and so does its answer */       \
    X(window_ms, 5000) /* versions older than this are too old (1007) */                           \
    X(history_bytes_max, 256 << 20) /* superseded values beyond this are too old early */          \
    X(retry_delay_us_max, -1) /* bounds the delay of on_error; -1: as long as the real one */      \
    X(version_step, 0) /* versions go on by this at every commit, and not with time; 0: time */    \
    X(batch_us, 0) /* a commit opens a batch for 0 .. this: those that arrive share its version */ \
    /* faults of reads, one in N */                                                                \
    X(read_too_old, 0)    /* 1007 */                                                               \
    X(read_future, 0)     /* 1009 */                                                               \
    X(read_behind, 0)     /* 1037 */                                                               \
    X(range_short, 0)     /* a range's answer is cut anywhere, with more to come */                \
    X(range_short_own, 2) /* cut where it meets own writes, as the real client may */              \
    X(grv_delayed, 0)     /* a read version takes grv_delay_ms */                                  \
    X(grv_delay_ms, 20)                                                                            \
    /* faults of commits that write, one in N */                                                   \
    X(conflict, 0)         /* 1020 where there is none */                                          \
    X(too_large, 0)        /* 2101 */                                                              \
    X(unknown_happened, 0) /* 1021; it happened, unless there was a conflict */                    \
    X(unknown_lost, 0)     /* 1021; it did not happen */                                           \
    X(changed_happened, 0) /* 1039 */                                                              \
    X(changed_lost, 0)     /* 1039 */                                                              \
    X(timeout_late, 0)     /* 1031 at once; arrives within late_ms_max, conflicts checked then */  \
    X(cancelled_late, 0)   /* 1101, likewise */                                                    \
    X(late_ms_max, 20)                                                                             \
    X(commit_slow, 0) /* it, or its answer, takes up to slow_ms_max longer */                      \
    X(slow_ms_max, 50)                                                                             \
    /* faults of watches, one in N */                                                              \
    X(watch_cancelled, 0)     /* 1101 */                                                           \
    X(watch_future, 0)        /* 1009 */                                                           \
    X(watch_spurious, 0)      /* fires without a change */                                         \
    X(watch_delay_ms_max, 20) /* these three happen within that time */                            \
    /* the state of the cluster */                                                                 \
    X(down, 0)          /* 1: nothing is answered; all that is asked waits for 0 */                \
    X(incompatible, 0)  /* 1: of another protocol: only get_server_protocol answers */             \
    X(stalled, 0)       /* 1: of the right one, and yet only get_server_protocol answers */        \
    X(grv_ms, 0)        /* throttled: every read version takes this long */                        \
    X(batch_stopped, 0) /* 1: transactions of batch priority get no read version until 0 */        \
    X(create_error, 0)  /* what fdb_create_database returns */                                     \
    X(open_error, 0)    /* what every operation on a database opened from now on gets */

/* What has been counted since the last reset. */
#define FDB_DOUBLE_COUNTS(X)                                                                       \
    X(transactions) /* created */                                                                  \
    X(grvs)                                                                                        \
    X(gets)                                                                                        \
    X(ranges)                                                                                      \
    X(commits_tried) /* that had something to write and were sent */                               \
    X(commits_happened)                                                                            \
    X(commits_refused) /* for a true conflict or a true age */                                     \
    X(batched) /* commits that happened in a batch that another one had opened */                  \
    X(commits_empty)   /* of transactions that wrote nothing */                                    \
    X(bytes_committed) /* keys and values */                                                       \
    X(retries)         /* on_error that led to a retry */                                          \
    X(read_too_old)    /* faults, by the name of their setting */                                  \
    X(read_future)                                                                                 \
    X(read_behind)                                                                                 \
    X(range_short)                                                                                 \
    X(grv_delayed)                                                                                 \
    X(conflict)                                                                                    \
    X(too_large)                                                                                   \
    X(unknown_happened)                                                                            \
    X(unknown_lost)                                                                                \
    X(changed_happened)                                                                            \
    X(changed_lost)                                                                                \
    X(timeout_late)                                                                                \
    X(cancelled_late)                                                                              \
    X(watch_cancelled)                                                                             \
    X(watch_future)                                                                                \
    X(watch_spurious)                                                                              \
    X(late_landed) /* commits given up by their caller that happened afterwards */                 \
    X(late_refused)                                                                                \
    X(commit_slow)                                                                                 \
    X(unknown_answers) /* commits answered with 1021, 1031, 1039 or 1101 */                        \
    X(cut_unknown)     /* of these, those that were to be told that it happened when a cut came */ \
    X(away_landed)     /* commits that happened while their database was dead, paused or cut */    \
    X(watches_fired)                                                                               \
    X(grvs_batch) /* asked with PRIORITY_BATCH */                                                  \
    X(commits_batch)                                                                               \
    X(grvs_immediate)     /* asked with PRIORITY_SYSTEM_IMMEDIATE */                               \
    X(reads_low)          /* reads with READ_PRIORITY_LOW */                                       \
    X(causal_write_risky) /* transactions that set an option nobody here should set */             \
    X(timeouts_set)       /* transactions with a TIMEOUT */                                        \
    X(retry_limits_set)                                                                            \
    X(size_limits_set)                                                                             \
    X(retry_delays_set)                                                                            \
    X(timed_out)  /* transactions that ran into their TIMEOUT */                                   \
    X(violations) /* see fdb_double.violation */                                                   \
    /* levels, not sums: reset leaves them */                                                      \
    X(futures_alive)                                                                               \
    X(transactions_alive)                                                                          \
    X(databases_alive)                                                                             \
    X(watches_alive)                                                                               \
    X(late_alive) /* commits still on their way whose callers were told otherwise */               \
    X(keys)                                                                                        \
    X(bytes_held) /* memory of keys and values, all versions and transactions */

struct fdb_double_config {
#define X(name, value) int64_t name;
    FDB_DOUBLE_CONFIG(X)
#undef X
};

struct fdb_double_counts {
#define X(name) uint64_t name;
    FDB_DOUBLE_COUNTS(X)
#undef X
};

/* One change of a commit by another client: value set, `end` NULL: key = value; `end` set:
 * [key, end) cleared; both NULL: key cleared. */
struct fdb_double_change {
    const void *key;
    size_t key_len;
    const void *value;
    size_t value_len;
    const void *end;
    size_t end_len;
};

struct fdb_double {
    /* An empty cluster, all settings and counters as at the start (but `api`, which stays once
     * a version was selected). Commits on their way are dropped. Versions go on from where no
     * old read version is good any more. Futures, transactions and databases stay. */
    void (*reset)(void);

    void (*config_get)(struct fdb_double_config *config);
    void (*config_set)(const struct fdb_double_config *config);
    bool (*set)(const char *name, int64_t value); /* one setting; false: no such name */
    bool (*set_many)(const char *text);           /* "name=value,..." as in FDB_DOUBLE */

    void (*counts)(struct fdb_double_counts *counts);
    int64_t (*count)(const char *name); /* one counter; -1: no such name */
    /* How many read versions, reads and commits were asked for with this transaction tag. */
    uint64_t (*tag_count)(const char *tag);
    /* The last thing a caller did that it must not do; empty: nothing. Counted, and the call
     * is answered as the real library would where it would survive. Valid until reset. */
    const char *(*violation)(void);

    /* What `\xff\xff/metrics/health/aggregate` holds. */
    void (*set_health)(const char *json);

    /* As another client would, in one commit, at once: a batch that is open takes it in, behind
     * all others, and ends. False where the same cluster would have refused it (too long). */
    bool (*commit)(const struct fdb_double_change *changes, size_t n);
    bool (*put)(const void *key, size_t key_len, const void *value, size_t value_len);
    void (*clear)(const void *begin, size_t begin_len, const void *end, size_t end_len);
    /* The newest value: false: there is none. Else *value is the caller's, to be freed. */
    bool (*get)(const void *key, size_t key_len, void **value, size_t *value_len);
    /* Every key of [begin, end) with its newest value, in order. `see` may not call back. */
    void (*each)(const void *begin, size_t begin_len, const void *end, size_t end_len,
                 void (*see)(void *arg, const void *key, size_t key_len, const void *value,
                             size_t value_len),
                 void *arg);
    int64_t (*version)(void); /* what a read version asked for now would be */
    /* The cluster forgets: from now on every version before this moment is too old. */
    void (*forget_versions)(void);
    /* Waits until nothing is on its way (late commits, answers) but watches, backoff and what
     * is held up by `down` and its like. False: not within so many milliseconds. Not from a
     * callback. */
    bool (*settle)(unsigned timeout_ms);

    /* Before the network is started, and for good: fdb_run_network() returns at once, and time
     * is what `now` says, in ns. What is due is run by run_due(), on the calling thread, which
     * counts as the network thread meanwhile. next_due_ns(): when to call that, UINT64_MAX: there
     * is nothing. `wake` is called when that became earlier, from inside a call of the library,
     * but not of run_due(); it may not call back. */
    void (*manual)(uint64_t (*now)(void *arg), void (*wake)(void *arg, uint64_t due_ns), void *arg);
    void (*run_due)(void);
    uint64_t (*next_due_ns)(void);
    /* manual: while on, everything asked for is answered inside the call, without faults and
     * whatever is down or cut: for what blocks, which has no duration then. */
    void (*instant)(bool on);

    /* What happens to one client; `db` is its FDBDatabase. Cut off: nothing passes, either way,
     * but what was behind the place of the cut. After it was healed, commits that were under
     * way arrive late, or end as unknown (1021). */
    void (*cut)(void *db, bool cut);
    /* Its commits take so much longer on their way, and their answers on the way back: those that
     * are sent from now on. */
    void (*slow)(void *db, uint64_t commit_ms, uint64_t answer_ms);
    /* manual: its process stands still. What it had not handed over waits, and so do answers. */
    void (*pause)(void *db, bool paused);
    /* manual: its process has died. Commits that were handed over arrive; it is never called
     * back, and what it had is never freed. */
    void (*die)(void *db);
};

#endif
