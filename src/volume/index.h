/*
 * The index of a volume in memory: rows that were loaded, rows that changed.
 *
 * A lookup needs the level-2 row of a block and, where that says so, its level-1
 * row. index_have() tells whether they are there and starts loading them if not.
 * Rows leave memory by age, but never while pinned: needed by a generation on its
 * way, which includes changed and not yet committed.
 */
#ifndef VOLUME_INDEX_H
#define VOLUME_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "base/list.h"
#include "store/store.h"
#include "volume/keys.h"
#include "volume/rows.h"

struct volume;

struct row_slot {
    struct row_slot *chain;
    struct volume *vol;
    struct list lru;
    struct list waiters; /* row_wait.link */
    uint64_t no;
    uint8_t level;
    bool loading;
    bool overridden;  /* while loading: what arrives is outdated, all entries are `override` */
    uint8_t override;
    uint64_t override_epoch; /* ... and, of level 2, stored under this epoch, if at all */
    uint64_t bytes; /* counted in rows_lru.bytes */
    unsigned pins;
    bool changed; /* by the generation that is being built */
    /* Level 2: under which key it is stored, as far as generations were built; branch 0: it is not
     * stored. */
    uint64_t branch, epoch;
    union {
        struct row1 row1;
        struct row2 row2;
    };
};

/* Rows of all volumes of a shard, oldest last. */
struct rows_lru {
    struct list lru;
    uint64_t bytes, bytes_max;
};

struct index {
    struct row_slot **table;
    uint64_t table_mask, count;
};

struct row_wait {
    struct list link;
    void (*ready)(struct row_wait *wait);
};

void index_init(struct index *ix);
void index_destroy(struct volume *vol);   /* drops all rows; none is loading */
bool index_loading(const struct volume *vol);

/* The branch of the level-1 row that an entry of a level-2 row names. */
uint64_t row2_branch(const struct volume *vol, const struct row2_entry *entry);

/* True when all rows for blocks [first, end) are in memory. Else loads what is missing and
 * calls wait->ready once when it makes sense to ask again. A row whose stored form is
 * damaged is replaced by one whose every block is an error to read (G5). */
bool index_have(struct volume *vol, uint64_t first, uint64_t end, struct row_wait *wait);
void index_wait_stop(struct row_wait *wait);

/* The same for a level-2 row alone. Where the one before it is in memory, which is how a walk
 * comes along, some of those that follow below `end_row2` are loaded with it. */
bool index_have_row2(struct volume *vol, uint64_t row2, uint64_t end_row2, struct row_wait *wait);

/* The source of a block whose rows are in memory: SOURCE_ABSENT, ZERO, HOLE, or
 * SOURCE_FIRST with *src filled. */
int index_lookup(struct volume *vol, uint64_t no, struct row_source *src);

/* Level-2 row, level-1 row in memory, or NULL. */
struct row_slot *index_row2(struct volume *vol, uint64_t row2);
/* Whether a level-2 row is in memory or on its way. */
bool index_knows_row2(const struct volume *vol, uint64_t row2);
struct row_slot *index_row1(struct volume *vol, uint64_t row1);
/* The level-1 row, made from what level 2 says where it is not stored. Its level-2 row is in
 * memory. */
struct row_slot *index_edit_row1(struct volume *vol, uint64_t row1);

/* Its memory may have become more, or less. */
void index_recount(struct row_slot *r);

static inline void row_pin(struct row_slot *r)
{
    r->pins++;
}

static inline void row_unpin(struct row_slot *r)
{
    r->pins--;
}

/* Level-1 rows [first, end) have one fixed source for all their blocks now, as their level-2
 * entries say: makes rows in memory or on their way say so too. */
void index_fix_rows1(struct volume *vol, uint64_t first_row1, uint64_t end_row1, uint8_t kind);
/* The same for a level-2 row that may be loading just now or not be in memory at all. `epoch`:
 * under which it is stored from now on, if at all. */
void index_fix_row2(struct volume *vol, uint64_t row2, uint8_t kind, uint64_t epoch);

#endif
