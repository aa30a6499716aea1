/*
 * A real world for the driver: one reactor of the server, run by the test's own thread, and a
 * fresh store on an engine of the program.
 *
 * On engines without a log processes can die (mortal_store.h). Waiting is for conditions, and
 * bounded: a minute, times the environment variable SLOW.
 */
#ifndef TESTS_SIM_REAL_WORLD_H
#define TESTS_SIM_REAL_WORLD_H

#include "mortal_store.h"
#include "world.h"

struct real_config {
    /* "lmdb:[DIRECTORY]" (a new folder is made there, or in TMPDIR, and removed again), or
     * "fdb:[CLUSTER_FILE][?prefix=TEXT]" (keys go below a prefix of their own, which is cleared
     * again). */
    const char *uri;
    uint64_t seed; /* part of the prefix */
    bool mortal;   /* processes die; not on engines with a log */
    bool deaths_unknown;
    uint32_t lease_ms; /* 0: so long that none ends */
};

/* NULL: `e` says why. */
struct world *world_real_new(const struct real_config *config, struct err *e);

const struct graveyard *world_real_graveyard(struct world *w);
struct env *world_real_env(struct world *w);

#endif
