/*
 * Looks at everything that is stored, as docs/format.md says it, and without the volume layer:
 * whether all that a volume, a snapshot or a clone names is there, whether the counts are right, and
 * whether anything is there that nobody names and nobody is about to clear.
 */
#ifndef TESTS_SIM_STORED_H
#define TESTS_SIM_STORED_H

#include "world.h"

struct stored_counts {
    uint64_t volumes, snapshots, rows, blocks;
    uint64_t garbage; /* rows and blocks that are about to be cleared */
};

/* NULL, or what is wrong (valid until the next call). `clean`: all the space behind trims, removed
 * snapshots and volumes and rollbacks was given back, so nothing may be left of them. No commit
 * may be under way. `counts` may be NULL. */
const char *stored_check(struct world *w, bool clean, struct stored_counts *counts);

#endif
