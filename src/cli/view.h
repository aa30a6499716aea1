/*
 * Snapshots opened by a command that reads them, and walks along what is in them or has changed.
 */
#ifndef CLI_VIEW_H
#define CLI_VIEW_H

#include "cli/run.h"
#include "volume/volume.h"

/* Opens the snapshot `snap` of a volume. On failure run->op.err says why. */
enum status view_open(struct run *run, struct shard *shard, const struct catalog_entry *entry,
                      const struct catalog_snapshot *snap, struct volume **out);

/* Closes it, or NULL. */
void view_close(struct run *run, struct volume *vol);

/* Makes a snapshot of the volume with all that was answered so far, for the time of the command, and
 * finds it: entry->snapshot. On failure prints why and returns the exit status. */
int view_snapshot(struct run *run, struct catalog_entry *entry);

/* Removes it again. On failure prints why, and what may be left, and returns the exit status. */
int view_drop_snapshot(struct run *run, const struct catalog_entry *entry);

#define EXTENTS_PER_ASK 1024u

struct extent {
    uint64_t offset, length; /* bytes; length 0: there is none any more */
    uint32_t flags;          /* VOL_EXTENT_... */
};

/* A walk along a volume. */
struct extents {
    struct run *run; /* private */
    struct volume *vol, *since;
    uint64_t at, end;
    uint32_t mask;
    struct vol_io io;
    bool answered;
    struct vol_extent got[EXTENTS_PER_ASK];
    uint32_t n, next;
};

/* All of `vol`, or with `since` (on the same shard) what has changed since that. Neighbours that
 * differ in no flag of `mask` are given as one. */
void extents_begin(struct extents *x, struct run *run, struct volume *vol, struct volume *since,
                   uint32_t mask);

/* The next one. On failure run->op.err says why. */
enum status extents_next(struct extents *x, struct extent *out);

#endif
