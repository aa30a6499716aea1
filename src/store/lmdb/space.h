/*
 * Free space of the data file, kept in LMDB so that all processes share it and
 * so that a transaction that does not happen gives back what it took.
 *
 * A unit is 4 KiB. Every unit but the first is in exactly one place: in a body,
 * in a free run (backed by the file system), in a hole (free, but its space
 * given back to the file system, so that it must be had again before use), or
 * pending: freed by a transaction that a crash could still undo or a reader
 * still look behind. Pending space becomes free once the transaction that freed
 * it is older than the version before the last and than every reader.
 */
#ifndef STORE_LMDB_SPACE_H
#define STORE_LMDB_SPACE_H

#include <lmdb.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define SPACE_UNIT_BYTES 4096u
#define SPACE_EXTENT_UNITS_MAX 0xffffffu

struct lm_guard;

struct space_dbis {
    MDB_dbi store, free, holes, pending;
};

struct space_extent {
    uint64_t start, units;
};

/* A growing array of extents. */
struct space_extents {
    struct space_extent *v;
    size_t n, cap;
};

void space_extents_add(struct space_extents *list, uint64_t start, uint64_t units);
void space_extents_free(struct space_extents *list);

/* Extents in 64 bits: start << 24 | units. */
static inline uint64_t space_pack(uint64_t start, uint64_t units)
{
    return start << 24 | units;
}

static inline struct space_extent space_unpack(uint64_t packed)
{
    return (struct space_extent){packed >> 24, packed & SPACE_EXTENT_UNITS_MAX};
}

/* Free space as one write transaction sees and changes it. */
struct space {
    MDB_txn *txn;
    struct space_dbis dbis;
    struct lm_guard *guard; /* keeps LMDB off damaged pages; may be NULL */
    bool dirty;
    struct space_extents freed; /* by this transaction */

    /* The record in LMDB. */
    uint64_t data_units;    /* length of the data file */
    uint64_t free_units;    /* in free runs */
    uint64_t hole_units;    /* in holes */
    uint64_t pending_units; /* in pending records */
    uint64_t next;          /* where the search for free runs goes on */
    uint64_t commits;       /* transactions so far */
    uint64_t token;         /* drawn by chance by the last of them */
};

/* Reads the record; where there is none, an empty data file of one unit. ST_IO where it
 * is damaged. */
enum status space_load(struct space *sp, MDB_txn *txn, const struct space_dbis *dbis,
                       struct lm_guard *guard);

/* The record's key, and the counters of a record: all there is of `sp` then. ST_IO. */
extern const char space_record_key[6];
enum status space_parse(struct space *sp, const MDB_val *record);

/* Writes the pending records and the record, with a new token. Nothing may be changed
 * afterwards. */
enum status space_save(struct space *sp, uint64_t token);

/* Frees the memory that `sp` holds. */
void space_release(struct space *sp);

/* Takes `units` units out of the free runs, in as few and as long pieces as come along,
 * and adds them to `out`. ST_NOSPC (and nothing taken) where free_units are too few. */
enum status space_take(struct space *sp, uint64_t units, struct space_extents *out);

/* Frees an extent that the state before this transaction may hold. */
void space_free_later(struct space *sp, uint64_t start, uint64_t units);

/* Frees an extent that nobody ever knew of (new in the data file). */
enum status space_free_now(struct space *sp, uint64_t start, uint64_t units);

/* Makes what transactions before `oldest` freed free for use, up to `limit` extents. */
enum status space_reclaim(struct space *sp, uint64_t oldest, size_t limit);

/* Moves up to `units` units in free runs of at least `run_min` units into holes that are
 * not punched yet, looking at no more than `look_max` runs. Returns how many in *moved. */
enum status space_make_holes(struct space *sp, uint64_t units, uint64_t run_min, size_t look_max,
                             uint64_t *moved);

/* The first hole that is not punched (ST_NOTFOUND: none), and a note that it is now. */
enum status space_hole_unpunched(struct space *sp, struct space_extent *hole);
enum status space_hole_punched(struct space *sp, const struct space_extent *hole);

/* The first hole, punched or not; ST_NOTFOUND. */
enum status space_hole_first(struct space *sp, struct space_extent *hole);

/* The first `units` units of a hole are backed again: free. */
enum status space_hole_backed(struct space *sp, const struct space_extent *hole, uint64_t units);

/* Walks all records and compares their sums with the counters; for tests and checks.
 * ST_IO where they differ or runs overlap. */
enum status space_check(struct space *sp);

#endif
