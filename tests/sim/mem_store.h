/*
 * A store double: what store.h and log.h promise, in memory, for tests.
 *
 * It is no engine and keeps nothing. It is there so that the layers above meet every
 * order of events an engine may produce, and deaths and faults at any point, from a seed.
 * One `struct mem_store` is the medium; each process that has it open has a handle (a
 * `struct store`), with its own queue of commits, watches, reservations and logs.
 *
 * A process may die: what it appended to its log and did not submit is gone, commits
 * under way happened or not, and its handle answers everything with errors from then on,
 * so that its remains can be taken apart like any others. The power may go: then submitted
 * but unsynced log records are gone too, or some of them.
 *
 * It can also be told to break its promises (enum mem_lie), to show that the tests notice.
 */
#ifndef TESTS_SIM_MEM_STORE_H
#define TESTS_SIM_MEM_STORE_H

#include "sim_env.h"
#include "store/log.h"
#include "store/store.h"

struct mem_store;

enum mem_lie {
    MEM_HONEST,
    MEM_LOSES_SUBMITS,      /* submitted records do not survive the process */
    MEM_IGNORES_SYNC,       /* a sync is answered and nothing was made to survive */
    MEM_REPLAYS_OVER_HOLES, /* a replay goes on behind a record that is missing */
    MEM_ACKS_EARLY,         /* commits are answered before they happened, and lost in a crash */
    MEM_SWAPS_COMMITS,      /* a commit happens after the one behind it */
    MEM_TEARS_COMMITS,      /* a commit under way in a crash happens in part */
    MEM_IGNORES_CHECKS,     /* checks are taken as passed */
    MEM_LOSES_MUTATIONS,    /* now and then a body that was set is the old one */
};

struct mem_config {
    bool has_log;
    bool clears_ranges;                               /* as in struct store_limits */
    /* Nobody can tell whether a process lives, and commits that were sent happen although
     * their sender stands still. */
    bool needs_heartbeat;
    uint64_t batch_bytes_max;                         /* 0: 16 MiB */
    uint64_t commit_bytes_max;                        /* 0: without end; see limits */
    uint64_t capacity_bytes;                          /* of bodies; 0: without end */
    uint64_t read_ns_max, commit_ns_max, sync_ns_max; /* random delays; 0: 300 us */
    uint32_t timeout_ms;                              /* of reads while it is stopped; 0: none */
    uint64_t commit_bytes_per_ms;                     /* a slow medium; 0: bytes take no time */
    enum mem_lie lie;
};

struct mem_store *mem_store_new(struct sim *sim, const struct mem_config *config);
void mem_store_free(struct mem_store *db); /* no handle is open */

/* Another process opens the store; `env` is its first reactor, and what others of its reactors ask
 * for is answered there. store_close() ends it. */
struct store *mem_store_attach(struct mem_store *db, struct sim_env *env);

/* The process of this handle dies now. */
void mem_store_crash_process(struct store *handle);
/* The machine loses power: all processes were crashed before. */
void mem_store_power_cut(struct mem_store *db);
/* Called when somebody ends the process of a session (store_session_kill). It must crash it. */
void mem_store_on_kill(struct mem_store *db, void (*kill)(void *arg, struct store *handle),
                       void *arg);

/* From now on this session looks dead to everybody, although its process goes on. */
void mem_store_believe_dead(struct mem_store *db, const uint8_t id[STORE_ID_BYTES]);

/* For stores with heartbeats. Nothing of this handle (NULL: of anybody) gets through to the store
 * for so long; what was sent before may still come back. Answers to its commits take so much
 * longer on their way back. */
void mem_store_stall(struct mem_store *db, struct store *handle, uint64_t ns);
void mem_store_late_answers(struct store *handle, uint64_t ns);
/* What was sent through this handle and stalls gets through now. */
void mem_store_let_through(struct store *handle);
/* Called before each commit is executed (NULL: no more). */
void mem_store_before_commit(struct mem_store *db,
                             void (*see)(void *arg, struct store *handle,
                                         const struct store_commit *commit),
                             void *arg);

/* Faults, from now on: one in so many (0: never). */
struct mem_faults {
    uint32_t commit_fails;      /* ST_IO, nothing happened */
    uint32_t get_fails;         /* ST_IO for one get that asks for a body */
    uint32_t reads_unavailable; /* ST_UNAVAIL for a whole read */
    uint32_t log_submit_fails, log_sync_fails;
    uint32_t commit_slow, slow_ms_max; /* takes up to so much longer */
    enum status commit_status; /* 0: ST_IO */
};
void mem_store_set_faults(struct mem_store *db, struct mem_faults faults);
/* It answers nothing until told to go on: requests wait, whether they were executed already or
 * not. Reads only for config.timeout_ms, where that is set. */
void mem_store_stop(struct mem_store *db, bool stopped);
void mem_store_set_capacity(struct mem_store *db, uint64_t bytes);

/* For looking: numbers, and the value of a key (false: not there). */
struct mem_counts {
    uint64_t keys, body_bytes_used, reserved_bytes, reserved_keys;
    uint64_t commits, reads, submits, syncs, conflicts, replayed_records, log_records_lost;
    uint64_t own_reads, background_reads, background_commits;
    uint64_t commit_bytes_most; /* the largest commit so far */
    uint64_t broken_promises; /* of the layers above: see the message on stderr */
};
void mem_store_counts(const struct mem_store *db, struct mem_counts *counts);
uint64_t mem_store_keys_in(struct mem_store *db, struct slice begin, struct slice end);
/* Puts a key there, as if it had always been. */
void mem_store_put(struct mem_store *db, struct slice key, struct slice head, struct slice body);
bool mem_store_peek(struct mem_store *db, struct slice key, struct slice *head, struct slice *body);
/* The nth key (from 0) in [begin, end); false past the last. Valid until it is removed. */
bool mem_store_nth_key(struct mem_store *db, struct slice begin, struct slice end, uint64_t n,
                       struct slice *key);

/* Calls `see` for each key in [begin, end), in order. */
void mem_store_each(struct mem_store *db, struct slice begin, struct slice end,
                    void (*see)(void *arg, struct slice key, struct slice head, struct slice body),
                    void *arg);

/* Writes a value past everybody. */
void mem_store_poke(struct mem_store *db, struct slice key, struct slice head);

/* Damage: flips a bit of the head or the body of a key, or takes the key away. */
enum mem_damage { MEM_FLIP_HEAD, MEM_FLIP_BODY, MEM_REMOVE };
bool mem_store_damage(struct mem_store *db, struct slice key, enum mem_damage what);

#endif
