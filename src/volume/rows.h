/*
 * Index rows: where each block of a volume comes from, as plain memory and as
 * the run-length bytes that are stored. No I/O, no volumes.
 *
 * A level-1 row covers INDEX_FANOUT blocks and names a source for each. A
 * level-2 row covers INDEX_FANOUT level-1 rows: for each either one source for
 * all its blocks (ABSENT, ZERO, HOLE) or the epoch under which its level-1 row is
 * stored. So the trim of a terabyte edits a few level-2 rows.
 */
#ifndef VOLUME_ROWS_H
#define VOLUME_ROWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"

#define INDEX_FANOUT 1024u
#define INDEX_SHIFT 10u
#define ROW_BYTES_MAX 32768u

/* A source is one of the three fixed ones, or an index into the row's table. */
enum { SOURCE_ABSENT = 0, SOURCE_ZERO = 1, SOURCE_HOLE = 2, SOURCE_FIRST = 3 };
/* ABSENT: zeros, never written (a hole). ZERO: zeros, allocated. HOLE: zeros, trimmed in a clone.
 * A row is complete by itself: what a clone has from its parent is named in it. */

struct row_source {
    uint64_t branch, epoch;
};

struct row1 {
    uint16_t source[INDEX_FANOUT];
    uint16_t n_sources, cap_sources;
    uint32_t n_data; /* entries at or above SOURCE_FIRST */
    struct row_source *sources;
};

enum { ROW2_ABSENT = 0, ROW2_ZERO = 1, ROW2_HOLE = 2, ROW2_ROW = 3 };

struct row2_entry {
    uint64_t epoch; /* ROW2_ROW: the level-1 row's */
    uint16_t n_data; /* ROW2_ROW: data blocks in it, for usage (1024 fits) */
    uint8_t kind;
    uint64_t branch; /* ROW2_ROW: the level-1 row's, where it is another than this row's; else 0 */
};

struct row2 {
    struct row2_entry entry[INDEX_FANOUT];
};

/* All entries ABSENT, no sources. row1_free frees the table, not the row. */
void row1_init(struct row1 *row);
void row1_free(struct row1 *row);
void row2_init(struct row2 *row);

/* Sets the entries [first, end) to a fixed source (SOURCE_ABSENT, ZERO, HOLE). */
void row1_fill(struct row1 *row, unsigned first, unsigned end, uint16_t fixed);

/* Sets one entry to data stored under (branch, epoch); false if it was that already, so
 * that the caller knows whether the row changed. Compacts the table when it grows stale. */
bool row1_set_data(struct row1 *row, unsigned i, uint64_t branch, uint64_t epoch);

/* The source of an entry, or NULL where it is a fixed one. */
static inline const struct row_source *row1_data(const struct row1 *row, unsigned i)
{
    uint16_t s = row->source[i];
    return s >= SOURCE_FIRST ? &row->sources[s - SOURCE_FIRST] : NULL;
}

/* The fixed source all entries share (ABSENT, ZERO, HOLE), or -1. */
int row1_uniform(const struct row1 *row);

/* Data blocks named below a level-2 row. */
uint64_t row2_n_data(const struct row2 *row);

/* The longest stored forms: of a level-1 row that names up to `n_sources` (INDEX_FANOUT at most)
 * sources, of a level-2 row with epochs up to `epoch` and entries of other branches up to
 * `branch` (0: it has none). */
size_t row1_bytes_max(unsigned n_sources);
size_t row2_bytes_max(uint64_t epoch, uint64_t branch);

/* Stored form: at most ROW_BYTES_MAX bytes, a version byte first, ending with a hash bound
 * to `key`. Decode initialises `row` first (row1: free what it held before calling) and
 * gives false, with the row all ABSENT, for anything that is not a whole row of that key. */
size_t row1_encode(const struct row1 *row, struct slice key, uint8_t out[ROW_BYTES_MAX]);
bool row1_decode(struct row1 *row, struct slice key, struct slice bytes);
size_t row2_encode(const struct row2 *row, struct slice key, uint8_t out[ROW_BYTES_MAX]);
bool row2_decode(struct row2 *row, struct slice key, struct slice bytes);

#endif
