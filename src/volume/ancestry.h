/*
 * Ancestry: in which branches, and of which epochs, the rows of a volume or of one of its
 * snapshots are to be looked for.
 *
 * A volume's own rows come first, then those of the snapshot it was cloned from, and so on. A row is
 * complete by itself, so the first one found is the answer, and what was looked up once says
 * everything: how long the chain is matters to the load of a level-2 row (a million blocks)
 * only, which asks for all segments at once.
 *
 * A rollback to the snapshot of epoch S, made in epoch R, leaves the volume with the segments
 * (own, after R) and (own, .. S]: the gap between is what was rolled back.
 */
#ifndef VOLUME_ANCESTRY_H
#define VOLUME_ANCESTRY_H

#include "volume/records.h"

/* What the snapshot of `epoch` of a branch sees, from what the branch sees now: all of `out`'s
 * segments, own ones included, out->after being unused (0). False: an epoch that was rolled
 * back, or more segments than there can be. */
bool ancestry_of_snapshot(const struct ancestry_record *now, uint64_t branch, uint64_t epoch,
                          struct ancestry_record *out);

/* What a clone of that snapshot begins with. False: as above, or a clone can't have so many. */
bool ancestry_of_clone(const struct ancestry_record *now, uint64_t branch, uint64_t epoch,
                       struct ancestry_record *out);

/* Rolls the branch back to the snapshot of `epoch`; `last` is its newest epoch so far, `now->after`
 * is `last` afterwards. False: more segments than there can be. */
bool ancestry_roll_back(struct ancestry_record *now, uint64_t branch, uint64_t epoch,
                        uint64_t last);

/* The oldest gap of a branch: epochs after *after, up to *upto, were rolled back and are to be
 * cleared. False: there is none. */
bool ancestry_gap(const struct ancestry_record *now, uint64_t branch, uint64_t *after,
                  uint64_t *upto);

/* The gap that ends with `upto` holds nothing any more: forgets it. */
void ancestry_close_gap(struct ancestry_record *now, uint64_t branch, uint64_t upto);

/* Nothing is inherited any more: forgets all branches but this one. */
void ancestry_forget_parents(struct ancestry_record *now, uint64_t branch);

/* Whether there is nothing to say, so that no record needs to be stored. */
bool ancestry_empty(const struct ancestry_record *now);

#endif
