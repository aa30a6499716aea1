/*
 * What a volume and each of its snapshots take, from the index alone.
 *
 * A block of the branch belongs to the oldest snapshot that names it, and is given back when none
 * does: removing a snapshot frees what it names, the next one does not, and the one before could
 * not (its epoch is younger). The volume may be in use: then it is counted as it is just then, and
 * what changes meanwhile may be counted in part.
 */
#ifndef VOLUME_USAGE_H
#define VOLUME_USAGE_H

#include "volume/catalog.h"
#include "volume/walk.h"

/* Blocks, of one state. */
struct usage_state {
    uint64_t named;     /* as data, own and inherited */
    uint64_t inherited; /* of these, in other branches */
    uint64_t born;      /* own ones that no older state can name */
    uint64_t exclusive; /* of these, what removing it would free; of the volume itself: what no
                           snapshot has */
};

struct usage {
    struct store *store; /* in */
    struct env *env;
    void (*run_once)(struct env *env);
    const struct catalog_entry *entry;        /* in: the volume */
    const struct catalog_snapshot *snapshots; /* in: its snapshots, oldest first */
    size_t n_snapshots;
    bool (*go_on)(struct usage *u); /* in: false: stop */

    struct usage_state
        *states;      /* out: of each snapshot, then of the volume; freed by usage_free() */
    bool uncertain;   /* out: some rows could not be read */
    struct walk walk; /* private */
    struct walk_state *walked;
};

/* ST_OK, ST_SHUTDOWN, ST_UNAVAIL, ST_IO. Blocks, as walk.h says. */
enum status usage_run(struct usage *u, struct err *e);
void usage_free(struct usage *u);

#endif
