/*
 * Verifying, inside: what its files share.
 *
 *   verify.c          reads what is named, judges it, tells and repairs
 *   verify_unnamed.c  finds what is stored and named by nothing
 */
#ifndef VOLUME_VERIFY_INTERNAL_H
#define VOLUME_VERIFY_INTERNAL_H

#include "base/check.h"
#include "base/mem.h"
#include "volume/verify.h"

#define BATCHES 4u
#define BATCH_BLOCKS 64u
#define RECORDS_MAX 65536u

/* A block or row, as somebody names it. */
struct thing {
    unsigned level; /* 0: block; 1, 2: row */
    uint64_t no;
    struct row_source at;
};

struct verdict {
    bool good;
    enum verify_what what;
    uint32_t from, to; /* bytes of the block that are lost */
};

struct suspect {
    struct thing thing;
    size_t state;
};

/* What is wrong from `first_state` on. */
struct problem {
    struct thing thing;
    struct verdict verdict;
    size_t first_state;
    uint32_t next; /* of the same level-1 row; NONE: the last one */
};

struct batch {
    struct verify_run *vr;
    struct store_read read;
    struct store_get gets[BATCH_BLOCKS];
    struct key keys[BATCH_BLOCKS];
    struct suspect blocks[BATCH_BLOCKS];
    struct verdict verdicts[BATCH_BLOCKS];
    uint8_t *data;
    uint32_t n;
    bool busy;
};

struct sum {
    uint64_t n, hashes;
};

struct trash {
    struct trash_record rec;
    uint64_t n;
};

/* What may explain that nothing names a key. */
struct reasons {
    struct ancestry_record ancestry;
    struct trash *trash;
    size_t n_trash, cap_trash;
    uint64_t *removed, *live; /* epochs of snapshots, rising */
    size_t n_removed, cap_removed, n_live, cap_live;
    uint64_t unknown_upto; /* epochs up to here are not judged: a snapshot's record is damaged */
};

struct verify_run {
    struct verify *v;
    struct err *e;
    enum status st; /* what ended it */
    struct ancestry_record ancestry;
    struct state_record state;
    struct reasons reasons;
    struct key owner_key;
    uint8_t *owner_bytes; /* NULL: there is no such record */
    size_t owner_len;

    struct walk walk;
    struct walk_state *walked;
    struct batch batches[BATCHES];
    struct batch *filling;
    struct suspect *suspects;
    size_t n_suspects, cap_suspects;
    struct problem *problems; /* below the level-2 row at hand */
    size_t n_problems, cap_problems;
    uint32_t first_problem[INDEX_FANOUT]; /* by level-1 row */
    uint32_t row2_problem;
    struct sum *blocks_named, *rows_named; /* by state: own ones of epochs that are only its */
    bool index_lost;                       /* some row, or a whole part, could not be read */
    bool counts_differ;
    uint64_t n_leaks;

    struct row_reader rows;
    bool rows_answered;
    enum status rows_st;
    size_t rows_state; /* whose rows `rows` reads */

    /* The finding at hand, while others may still belong to it. */
    struct verify_finding finding;
    struct thing last;
    bool have_finding;
};

static inline struct verify_run *verify_run_of(struct walk *w)
{
    return container_of(w, struct verify_run, walk);
}

/* ---- verify.c ---- */

void verify_key_text(const struct thing *t, char out[VERIFY_KEY_BYTES]);
void verify_thing_key(const struct thing *t, struct key *key);

/* Tells of something wrong; of a block or row, together with those before and behind it of which
 * the same is true. */
void verify_tell(struct verify_run *vr, const struct verify_finding *f);
void verify_tell_thing(struct verify_run *vr, const struct thing *t, const struct verdict *verdict,
                       size_t first_state, size_t last_state, bool repaired);

void verify_suspect_add(struct verify_run *vr, const struct suspect *s);
void verify_sum_add(struct sum *sum, uint64_t epoch, uint64_t no);
enum status verify_read_wait(struct verify_run *vr, struct walk_read *r);

/* Whether the owner's record is what it was. */
bool verify_owner_stands(const struct verify_run *vr, const struct store_get *get);

/* Changes something while nobody owns the volume. False: it could not be done. */
bool verify_repair(struct verify_run *vr, const struct store_check *check,
                   const struct store_mutation *mutations, size_t n);

/* ---- verify_unnamed.c ---- */

void verify_reasons_free(struct reasons *why);
/* Takes in a trash record; false: it is none. */
bool verify_reason_trash(struct reasons *why, const struct store_pair *pair);
/* Takes in a snapshot's record; false: it is damaged. */
bool verify_reason_snapshot(struct reasons *why, const struct store_pair *pair,
                            struct snapshot_record *rec, uint64_t *epoch);

/* A level-2 row that no state sees, found by the walk. */
void verify_walk_unseen(struct walk *w, uint64_t no, uint64_t epoch);
void verify_rows_answered(struct row_reader *rows, enum status st);
/* Finds what of blocks ('b') or rows ('i') is stored and named by nothing. */
void verify_leaks_find(struct verify_run *vr, char tag, const struct sum *named);

#endif
