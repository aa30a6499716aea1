/*
 * The stores a simulated world can have, behind one face.
 *
 *   SIMSTORE_LOG    the store double of mem_store.h, as the embedded engine behaves: a write log,
 *                   dead processes known at once, a process that stands still can be ended
 *   SIMSTORE_FDB    the program's own FoundationDB engine (src/store/fdb) on the double of its
 *                   client library (tests/fdb), whose events are events of this world
 *
 * The double is loaded as the program loads FoundationDB's library: FDB_NBD_LIBFDB_C names it, or
 * else it is expected where the build puts it, beside the test programs. It has one cluster, so a
 * real process can have one world with such a store, and seeds are run in a process each. What
 * processes of the world leave behind when they die is never freed.
 */
#ifndef TESTS_SIM_STORES_H
#define TESTS_SIM_STORES_H

#include "sim_env.h"
#include "store/store.h"

struct simstore;

enum simstore_kind { SIMSTORE_LOG, SIMSTORE_FDB };

/* What goes wrong, one in so many requests; 0: never. */
struct simstore_faults {
    uint32_t commit_slow;     /* takes up to slow_ms */
    uint32_t slow_ms;
    uint32_t commit_fails;    /* log: ST_IO, nothing happened. fdb: retryable errors */
    uint32_t commit_unknown;  /* fdb: 1021, 1031, 1039, 1101; happened, did not, or does so later */
    uint32_t late_ms_max;     /* ... by this much */
    uint32_t read_fails;      /* fdb: 1007, 1009, 1037, and what goes wrong with watches */
};

struct simstore_counts {
    uint64_t commits;   /* that happened */
    uint64_t conflicts; /* that were refused */
    uint64_t reads;     /* fdb: gets and ranges */
    uint64_t unknown_outcomes; /* commits whose sender was told that nobody knows */
    uint64_t late_commits;     /* ... and that happened after that */
    uint64_t late_refused;     /* ... or were refused then */
    uint64_t away_commits; /* happened while their process was dead, stood still or was cut off */
    uint64_t batched;          /* commits that came into a batch behind another one */
    uint64_t violations; /* the layers above did what they must not do: text on stderr */
};

/* How long things take is from the seed, too. */
struct simstore *simstore_new(struct sim *sim, enum simstore_kind kind, uint64_t seed);
enum simstore_kind simstore_kind(const struct simstore *ss);

/* A process opens it: at once (what store_open() would wait for has no duration here). `env`: its
 * first reactor; requests are answered on the one that asks. */
struct store *simstore_attach(struct simstore *ss, struct sim_env *env);
/* It has nothing under way and ends; at once. Its reactors have to run, or be forgotten, until
 * they are at rest. */
void simstore_detach(struct simstore *ss, struct store *store);
/* It died: what it had sent goes its own way, and its reactors are given nothing any more but what
 * they have already (none may run again). */
void simstore_died(struct simstore *ss, struct store *store);
/* Log store: called when somebody ends the process of a session; it must crash that gateway. */
void simstore_on_kill(struct simstore *ss, void (*kill)(void *arg, struct store *store), void *arg);

/* fdb. Nothing of this process gets through, nor any answer back to it, until healed; what was
 * under way gets through all the same, or late, or was lost (and is settled by the engine). */
void simstore_cut(struct simstore *ss, struct store *store, bool cut);
/* fdb. What this process commits from now on takes so much longer on its way, and the answers on
 * theirs. */
void simstore_slow(struct simstore *ss, struct store *store, uint32_t commit_ms,
                   uint32_t answer_ms);
/* The process stands still, as its reactors do (sim_env_pause): what it had handed to the network
 * goes its own way, what it had not waits until it goes on. */
void simstore_paused(struct simstore *ss, struct store *store, bool paused);
/* The store answers nobody. */
void simstore_down(struct simstore *ss, bool down);
void simstore_set_faults(struct simstore *ss, const struct simstore_faults *faults);
void simstore_counts(struct simstore *ss, struct simstore_counts *counts);

/* For looking past everybody: the newest committed value under a key; false: none. *head is
 * valid until the next call. */
bool simstore_peek(struct simstore *ss, struct slice key, struct slice *head);

#endif
