/*
 * The snapshots of a volume in its owner's memory, by epoch, with those that are removed and not
 * cleared yet. Plain memory: no I/O, no volumes.
 *
 * Only live snapshots (not removed) hold anything: whoever asks for a neighbour gets a live one.
 */
#ifndef VOLUME_HISTORY_H
#define VOLUME_HISTORY_H

#include <stddef.h>
#include <stdint.h>

#include "volume/records.h"

struct history_entry {
    uint64_t epoch;
    struct snapshot_record rec;
    /* Removed, and nothing is left of it but its record, which goes with a commit (or stays, where
     * this owner can't clear it). */
    bool cleared;
};

/* Zero-initialised: no snapshots. */
struct history {
    struct history_entry *v; /* by epoch, oldest first */
    size_t n, cap;
};

/* The newest live snapshot of an epoch below `epoch`; 0: none. */
uint64_t history_live_below(const struct history *h, uint64_t epoch);

/* The oldest live snapshot of `epoch` or a later one; 0: none, only the volume itself is younger. */
uint64_t history_live_at_or_above(const struct history *h, uint64_t epoch);

/* The newest live snapshot; 0: none. */
uint64_t history_newest_live(const struct history *h);

bool history_is_live(const struct history *h, uint64_t epoch);

/* The live snapshot of that name, the snapshot of that epoch (also a removed one), or NULL. They are
 * `h`'s and move with its next change. */
struct history_entry *history_find_name(const struct history *h, const char *name);
struct history_entry *history_find(const struct history *h, uint64_t epoch);

/* Adds a snapshot, which has an epoch of its own; forgets one, if it is there; forgets all. */
void history_add(struct history *h, uint64_t epoch, const struct snapshot_record *rec);
void history_forget(struct history *h, uint64_t epoch);
void history_forget_all(struct history *h);

#endif
