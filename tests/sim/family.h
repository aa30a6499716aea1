/*
 * Volumes with a history: a volume, its snapshots, the clones of these, their snapshots, ..., each
 * volume with a driver of its own (driver.h) in one world, and random changes of that history while
 * the drivers go on writing.
 *
 * The array model gets a history too: what a snapshot must hold is copied when it is made, and
 * compared with what a view of it shows, then and at any later time. Everything that changes the
 * history may be cut short by the death of whoever does it; afterwards it has happened or it has
 * not, and what there is decides which of both the model goes on with.
 *
 *   contents   of volumes and snapshots (G2, G7), also through views that are open for long, and
 *              while the snapshot is being removed: then reads may fail, but are never wrong
 *   changed    the block status since a snapshot shows every block that differs, and none that
 *              nobody wrote to
 *   depth      is how many clones down a block was written
 *   stored     all that is named is there; when everything is cleaned up, nothing else (stored.h)
 */
#ifndef TESTS_SIM_FAMILY_H
#define TESTS_SIM_FAMILY_H

#include "driver.h"

struct family_config {
    struct drv_config drv; /* of the first volume */
    bool deaths;           /* processes may die */
    bool power;            /* and the machine */
};

struct family_counts {
    uint64_t snapshots, removed, renamed, clones, rollbacks, flattened, deleted, resized, groups;
    uint64_t deaths, cut_short;  /* changes of history whose process died */
    uint64_t happened;           /* ... and that were there all the same */
    uint64_t refused;            /* as they had to be */
    uint64_t views_compared, views_lost, blocks_changed, depths;
};

/* Runs `steps` requests (and what comes between them), and looks at everything in the end. False:
 * something is wrong, and was printed. Adds to `counts`. */
bool family_run(const struct family_config *config, uint64_t steps, struct family_counts *counts);

#endif
