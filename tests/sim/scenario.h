/*
 * One seed of the simulator: a store, gateways, clients and commands, what goes wrong with them,
 * and whether what the clients saw can have happened.
 *
 * First comes a storm, as wild as the seed says: some are calm, some know one kind of fault only,
 * so that what is rare has room. Then everything is healed, and everything has to work again:
 * the clients go on until there were enough requests and read everything back, and so does a last
 * one through one gateway and then through another; all gateways end in good order.
 *
 * After every event, at most one gateway may answer for the volume, and only the one that the
 * store names as its owner (G4).
 */
#ifndef TESTS_SIM_SCENARIO_H
#define TESTS_SIM_SCENARIO_H

#include <stdbool.h>
#include <stdint.h>

enum scenario_engine { SCENARIO_ANY, SCENARIO_LOG, SCENARIO_FDB };

struct scenario_options {
    uint64_t seed;
    enum scenario_engine engine; /* ANY: the seed says which */
    uint32_t requests;           /* at least; 0: 1000 */
    bool trace;
};

/* Whether a run without any fails: it would prove less than it says. */
enum scenario_needed {
    OPTIONAL,
    NEEDED,
    NEEDED_FDB, /* ... where there were seeds with that engine */
};

/* How much there was of what; X(name, what to call it in a summary, enum scenario_needed). */
#define SCENARIO_COUNTS(X)                                                                         \
    X(seeds_log, "seeds, log store", OPTIONAL)                                                     \
    X(seeds_fdb, "seeds, FoundationDB engine", OPTIONAL)                                           \
    X(requests, "client requests", NEEDED)                                                         \
    X(resends, "requests sent again", NEEDED)                                                      \
    X(takeovers, "takeovers from an owner that had not let go", NEEDED)                            \
    X(handovers, "handovers by an owner that let go", NEEDED)                                      \
    X(fenced, "sessions that were ended by others", NEEDED_FDB)                                    \
    X(crashes, "gateways that crashed", NEEDED)                                                    \
    X(host_deaths, "... with their hosts", OPTIONAL)                                               \
    X(ended, "... ended by others, or for want of the store", OPTIONAL)                            \
    X(pauses, "gateways that stood still", NEEDED)                                                 \
    X(long_pauses, "... for longer than their lease", NEEDED)                                      \
    X(replacements, "gateways that were replaced in good order", OPTIONAL)                         \
    X(commits, "commits", NEEDED)                                                                  \
    X(conflicts, "commits that were refused by a check", OPTIONAL)                                 \
    X(unknown_outcomes, "commits whose outcome was unknown", NEEDED_FDB)                           \
    X(late_commits, "... that happened late", NEEDED_FDB)                                          \
    X(late_refused, "... that came too late to happen", OPTIONAL)                                  \
    X(store_cuts, "gateways cut off from the store", OPTIONAL)                                     \
    X(store_downs, "times when the store answered nobody", OPTIONAL)                               \
    X(late_answers, "gateways whose commits were answered late", NEEDED_FDB)                        \
    X(held_commits, "gateways whose commits came late", NEEDED_FDB)                                \
    X(aimed_pauses, "gateways that woke as they were being fenced", NEEDED_FDB)                    \
    X(forced, "gateways that took a volume by force", NEEDED_FDB)                                   \
    X(squeezes, "times when a gateway was short of memory", NEEDED)                                \
    X(client_cuts, "clients cut off from a gateway", OPTIONAL)                                     \
    X(connections, "connections", NEEDED)                                                          \
    X(connections_lost, "connections lost", NEEDED)                                                \
    X(timeouts, "connections ended for want of an answer", OPTIONAL)                               \
    X(client_deaths, "clients that died", OPTIONAL)                                                \
    X(half_sent, "... in the middle of sending a write", OPTIONAL)                                 \
    X(given_up, "changes given up", OPTIONAL)                                                      \
    X(given_up_there, "... that were there", OPTIONAL)                                             \
    X(given_up_gone, "... that never were", OPTIONAL)                                              \
    X(refused, "changes refused", OPTIONAL)                                                        \
    X(errors, "other errors", OPTIONAL)                                                            \
    X(migrations, "migrations", OPTIONAL)                                                          \
    X(snapshots, "snapshots made", NEEDED)                                                         \
    X(snapshots_whole, "... read and compared, each at least once", NEEDED)                        \
    X(snapshot_reads, "... requests for that", OPTIONAL)                                           \
    X(snapshots_removed, "... removed", NEEDED)                                                    \
    X(groups, "... of two volumes at one instant, compared", NEEDED)                               \
    X(clones, "clones made and compared", NEEDED)                                                  \
    X(rollbacks, "rollbacks compared", NEEDED)                                                     \
    X(commands, "commands", OPTIONAL)                                                              \
    X(commands_failed, "... that were refused or failed", OPTIONAL)                                \
    X(commands_killed, "... killed half way", OPTIONAL)                                            \
    X(events, "events", OPTIONAL)                                                                  \
    X(simulated_ms, "simulated milliseconds", OPTIONAL)

struct scenario_counts {
#define SCENARIO_FIELD(name, text, needed) uint64_t name;
    SCENARIO_COUNTS(SCENARIO_FIELD)
#undef SCENARIO_FIELD
};

struct scenario_result {
    bool failed;
    char what[1500]; /* what was wrong */
    uint64_t hash;   /* of all that happened */
    struct scenario_counts counts;
};

/* Runs a seed, once in the life of a process: nothing is taken apart afterwards. */
void scenario_run(const struct scenario_options *options, struct scenario_result *result);

#endif
