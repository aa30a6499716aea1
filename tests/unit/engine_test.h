/*
 * Which engine a test runs on, by its environment:
 *
 *     STORE   "lmdb:[DIRECTORY]" (the default), "fdb:CLUSTER_FILE[?prefix=TEXT]" (a cluster, with
 *             the libfdb_c that the loader finds), or "double": FoundationDB's test double, which
 *             must be that libfdb_c: LD_LIBRARY_PATH=build/tests/fdb
 *     FAULTS  1: the double injects all the faults it knows, at rates from the seed
 */
#ifndef TESTS_UNIT_ENGINE_TEST_H
#define TESTS_UNIT_ENGINE_TEST_H

#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

#include "../fdb/double.h"
#include "test.h"

struct engine {
    char uri[300];
    bool is_lmdb, faults;
    const struct fdb_double *fake; /* NULL: not on the double */
    char cluster_file[64];
    struct fdb_double_counts sum; /* of engine_count() */
};

static struct engine engine;

static inline uint64_t engine_pick(uint64_t *state, uint64_t n)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (*state >> 33) % n;
}

static inline void engine_set(const char *name, uint64_t value)
{
    if (!engine.fake->set(name, (int64_t)value)) {
        fprintf(stderr, "the double knows no %s\n", name);
        abort();
    }
}

#define ENGINE_FAULTS(X)                                                                           \
    X(read_too_old, "1007 reads too old")                                                          \
    X(read_future, "1009 reads of the future")                                                     \
    X(read_behind, "1037 storage behind")                                                          \
    X(grv_delayed, "slow read versions")                                                           \
    X(conflict, "1020 without a conflict")                                                         \
    X(unknown_happened, "1021 that happened")                                                      \
    X(unknown_lost, "1021 that did not")                                                           \
    X(changed_happened, "1039 that happened")                                                      \
    X(changed_lost, "1039 that did not")                                                           \
    X(timeout_late, "1031, on its way")                                                            \
    X(cancelled_late, "1101, on its way")                                                          \
    X(watch_cancelled, "watches cancelled")                                                        \
    X(watch_future, "watches 1009")                                                                \
    X(watch_spurious, "watches for nothing")

/* An empty cluster. With faults: most seeds meet some kinds of them often, some meet all. */
static inline void engine_reset(uint64_t seed, uint64_t *c)
{
    static const char *const kinds[] = {
#define X(name, text) #name,
        ENGINE_FAULTS(X)
#undef X
    };
    static const uint64_t delays_us[] = {0, 0, 50, 300, 1500}, batches_us[] = {0, 200, 2000};
    if (!engine.fake)
        return;
    engine.fake->reset();
    engine_set("seed", seed);
    if (!engine.faults)
        return;
    uint64_t often = 2 + engine_pick(c, 30);
    bool all = engine_pick(c, 4) == 0;
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (all || engine_pick(c, 3) == 0)
            /* (One bad read of hundreds has all of them read anew.) */
            engine_set(kinds[i], (strncmp(kinds[i], "read_", 5) ? often : often * 20) +
                                     engine_pick(c, 20));
    engine_set("delay_us_max", delays_us[engine_pick(c, 5)]);
    engine_set("batch_us", batches_us[engine_pick(c, 3)]);
    engine_set("grv_delay_ms", 1 + engine_pick(c, 10));
    engine_set("late_ms_max", 1 + engine_pick(c, 30));
    engine_set("watch_delay_ms_max", 1 + engine_pick(c, 20));
    engine_set("retry_delay_us_max", 100 + engine_pick(c, 2000));
    if (engine_pick(c, 4) == 0)
        engine_set("window_ms", 300 + engine_pick(c, 1000));
}

/* No more faults from now on. */
static inline void engine_calm(void)
{
    if (!engine.faults)
        return;
#define X(name, text) engine_set(#name, 0);
    ENGINE_FAULTS(X)
#undef X
    engine_set("window_ms", 5000);
}

/* After all stores were closed: nothing is left over, nothing was done that must not be. Adds
 * the counts up. */
static inline void engine_count(uint64_t seed)
{
    struct fdb_double_counts counts;
    unsigned long long n = seed;
    if (!engine.fake)
        return;
    if (!engine.fake->settle(10000))
        fail_msg("seed %llu: the double does not come to rest\n", n);
    engine.fake->counts(&counts);
    if (counts.violations)
        fail_msg("seed %llu: libfdb_c is not used as it must be: %s\n", n,
                 engine.fake->violation());
    if (counts.futures_alive || counts.transactions_alive)
        fail_msg("seed %llu: %llu futures and %llu transactions are left over\n", n,
                 (unsigned long long)counts.futures_alive,
                 (unsigned long long)counts.transactions_alive);
#define X(name) engine.sum.name += counts.name;
    FDB_DOUBLE_COUNTS(X)
#undef X
}

static inline void engine_tell(const char *what, uint64_t n)
{
    print_message("# %-30s %12llu\n", what, (unsigned long long)n);
}

/* Prints how often each kind of fault happened; how many kinds never did. */
static inline unsigned engine_tell_faults(void)
{
    unsigned never = 0;
#define X(name, text)                                                                              \
    engine_tell(text, engine.sum.name);                                                            \
    never += engine.sum.name == 0;
    ENGINE_FAULTS(X)
    X(batched, "commits in others' batches")
    X(late_landed, "given up, landed later")
    X(late_refused, "given up, refused later")
#undef X
    return never;
}

/* Once, first. */
static inline void engine_choose(void)
{
    const char *uri = getenv("STORE"), *text = getenv("FAULTS");
    snprintf(engine.uri, sizeof engine.uri, "%s", uri && *uri ? uri : "lmdb:");
    engine.is_lmdb = strncmp(engine.uri, "lmdb:", 5) == 0;
    engine.faults = text && *text == '1';
    if (!strcmp(engine.uri, "double")) {
        void *library = dlopen("libfdb_c.so", RTLD_NOW | RTLD_LOCAL);
        engine.fake = library ? dlsym(library, FDB_DOUBLE_SYMBOL) : NULL;
        if (!engine.fake) {
            fprintf(stderr, "the libfdb_c that is found is no double: %s\n",
                    library ? "it is the real one" : dlerror());
            exit(1);
        }
        snprintf(engine.cluster_file, sizeof engine.cluster_file, "/tmp/engine-test-XXXXXX");
        int fd = mkstemp(engine.cluster_file);
        if (fd < 0 || dprintf(fd, "double:double@127.0.0.1:4500\n") < 0)
            exit(1);
        close(fd);
        snprintf(engine.uri, sizeof engine.uri, "fdb:%s", engine.cluster_file);
    }
    if (engine.faults && !engine.fake) {
        fprintf(stderr, "FAULTS=1 needs STORE=double\n");
        exit(1);
    }
}

static inline int engine_done(int rc)
{
    if (engine.cluster_file[0])
        unlink(engine.cluster_file);
    return rc;
}

#endif
