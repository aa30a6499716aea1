/*
 * Rows by key: what a snapshot, or the volume as it is stored, sees of the index, past the rows that
 * the index of an open volume has in memory (index.h). For the cleaner and for whoever walks a
 * volume that nobody has open.
 */
#ifndef VOLUME_ROWREAD_H
#define VOLUME_ROWREAD_H

#include "store/store.h"
#include "volume/ancestry.h"
#include "volume/rows.h"

enum row_found {
    ROW_THERE,
    ROW_MISSING,
    ROW_DAMAGED, /* it is there, and can't be read */
};

/* One place where a level-2 row may be. */
struct row2_place {
    struct key begin, end;
};

/* Fills `range`, which is to be read, for the newest version of the level-2 row `no` in a segment. */
void row2_place(struct row2_place *place, const struct ancestry_segment *segment, uint64_t no,
                struct store_range *range);

/* What the ranges, read, have of it: the first one that has any counts. *at: its key's branch and epoch
 * (where it is damaged too). Missing: all of its blocks are ABSENT. */
enum row_found row2_take(const struct store_range *ranges, uint32_t n_ranges, struct row2 *row,
                         struct row_source *at);

/* The search for one level-2 row in all the places it may be in. */
struct row2_search {
    struct row2_place places[ANCESTRY_MAX];
    const struct store_range *ranges;
    uint32_t n_ranges;
};

/* Prepares `ranges` (room for ANCESTRY_MAX) for the level-2 row `no` in `where`, which has nothing but
 * segments (as ancestry_of_snapshot() gives them), and returns how many they are. The caller reads
 * them; `search` and `ranges` stay where they are until row2_found(). */
uint32_t row2_search(struct row2_search *search, const struct ancestry_record *where, uint64_t no,
                     struct store_range *ranges);

/* What the read of the ranges found. */
enum row_found row2_found(const struct row2_search *search, struct row2 *row,
                          struct row_source *at);

/* --- a reader ------------------------------------------------------------------------- */

#define ROW_READER_ROWS 64u

struct row_reader_row {
    uint64_t no;
    struct row_source at;
    enum row_found found;
    struct row1 row;
};

/* Reads rows of one state of a branch when somebody asks for them, and keeps the last ones. Zeroed
 * memory, then row_reader_init(). One thread. */
struct row_reader {
    struct store *store;
    struct env *env;
    struct store_read how;         /* own, background, tag: of each read */
    struct ancestry_record where;  /* segments */
    /* What was asked for is there, or (not ST_OK) nothing of it; ask again. */
    void (*ready)(struct row_reader *r, enum status st);
    bool reading;

    bool row2_read;
    uint64_t row2_no;
    enum row_found row2_found;
    struct row_source row2_at;
    struct row2 row2;
    struct row_reader_row rows[ROW_READER_ROWS];
    unsigned n_rows;

    struct store_read read;
    struct row2_search search;
    struct store_range ranges[ANCESTRY_MAX];
    struct key keys[ROW_READER_ROWS];
    struct store_get gets[ROW_READER_ROWS];
    unsigned n_wanted;
};

void row_reader_init(struct row_reader *r, struct store *store, struct env *env);
/* Another state from here on, or the same read anew: forgets all rows. Not while reading. */
void row_reader_look_at(struct row_reader *r, const struct ancestry_record *where);
/* Frees what it holds, not the reader. Not while reading. */
void row_reader_free(struct row_reader *r);

/* True when the level-2 row `no` is in r->row2, row2_found and row2_at; else it is read, and `ready`
 * called. Not while reading. */
bool row_reader_row2(struct row_reader *r, uint64_t no);

/* The level-1 row stored under these, or NULL where it was not read. */
const struct row_reader_row *row_reader_row1(const struct row_reader *r, uint64_t no,
                                             struct row_source at);
/* Asks for a level-1 row; false: no more of them at once. row_reader_start() then reads all that were
 * asked for, in the place of those it has; false: there are none. Not while reading. */
bool row_reader_want(struct row_reader *r, uint64_t no, struct row_source at);
bool row_reader_start(struct row_reader *r);

#endif
