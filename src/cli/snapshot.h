/*
 * What the files of `fdb-nbd snapshot` share.
 */
#ifndef CLI_SNAPSHOT_H
#define CLI_SNAPSHOT_H

#include "cli/change.h"

#define SNAPSHOT_GROUP_MAX 64u

/* VOLUME@SNAPSHOT as it was typed, taken apart. */
struct snapshot_name {
    const char *text;
    char volume[NAME_BYTES_MAX + 1], snapshot[NAME_BYTES_MAX + 1];
};

/* Makes snapshots of several volumes at one instant, or none. */
int snapshot_group_create(struct run *run, const struct snapshot_name *names, size_t n);

/* Makes a volume what it was. */
int snapshot_rollback(struct run *run, const char *name, bool destroy_newer, bool yes);

/* Waits, where the volume is in this command's hands, until the space that nothing names any more
 * is given back; until then, or until somebody else wants the volume, or Ctrl-C. `what` completes
 * "clearing ...". */
void snapshot_settle(struct change *c, const char *what);

#endif
