/*
 * What the files of the cleaner share:
 *
 *   cleaner.c         what there is to clear, in which order and how much at a time
 *   clean_gap.c       epochs that were rolled back
 *   clean_snapshot.c  what only removed snapshots named
 *   trash.c           what trims left that edited only the index
 *
 * What may be cleared? A key of the volume's own branch and of epoch x is named by the state of the
 * volume at the end of x, by those after it, and from some moment on never again (but the
 * current epoch's keys, which can be written anew). Only the live snapshots and the volume as it is
 * now count as states. So a key is garbage where the oldest of those that are not older than x does
 * not name it: q(x). And what was found to be garbage stays garbage, whatever happens
 * between the look and the commit, with three exceptions that have to be watched:
 *
 *   - q(x) is the volume itself, and before its rows were read a snapshot was made of it: then it may
 *     have let go since then of what that snapshot names.
 *   - q(x) is a snapshot, and before its rows were read it was removed: then the volume may have
 *     replaced rows that were q(x)'s too, and cleared them.
 *   - x is the current epoch. What is cleared of that is decided when the generation is built.
 *
 * What the volume lets go of while q(x) is itself goes by its own doing (generation.c), so what it
 * still names when it is looked at is not the cleaner's business any more.
 */
#ifndef VOLUME_CLEANER_H
#define VOLUME_CLEANER_H

#include "volume/internal.h"

#define CLEAN_BATCH_KEYS 2048u
#define CLEAN_ROWS_READ 256u /* rows of a range, which are read whole */

enum clean_what { CLEAN_NOTHING, CLEAN_GAP, CLEAN_SNAPSHOT, CLEAN_TRASH };

struct clean_gap {
    uint64_t after, upto;
    unsigned level; /* 0: blocks; 1, 2: rows */
    uint64_t row, epoch; /* from here on */
};

/* Memory that is needed while a snapshot is cleared, or trash judged by one. */
struct clean_snapshot;
struct trash_judge;

struct clean_trash {
    bool have;          /* a record is being gone through */
    uint64_t n;         /* its number */
    uint64_t from;      /* records below this one are done, as far as generations go */
    struct trash_record rec;
    unsigned level;     /* 0: blocks; 1: level-1 rows */
    uint64_t epoch;     /* the next key's */
    uint64_t next;      /* ... block or row */
    uint64_t sweep_end; /* all blocks up to here, whether they are there or not; 0: look first */
    bool rows_done;
    struct trash_judge *judge; /* the snapshot that decides; NULL: the volume itself */
    uint64_t changes;    /* history_changes when the first record was begun */
    uint64_t asked_next; /* state.trash_next when records were looked for */
    bool found_none;     /* ... in vain ... */
    uint64_t seen_next;  /* ... when it was this */
    bool unknown_told;   /* that there are records which can't be judged was logged */
};

struct cleaner {
    struct volume *vol;
    enum clean_what what;
    bool stopped;      /* what is under way ends, and nothing else begins */
    bool urgent;       /* somebody waits for space */
    bool waits_rows;   /* of the index in memory */
    unsigned reading;  /* reads of the store */
    bool running;
    size_t batch;      /* keys given to generations since the last wait */
    uint64_t wait_gen; /* go on when this generation has committed; 0: not waiting */
    uint64_t changes;  /* history_changes when ... */
    uint64_t settled_gen; /* ... the generations up to this one had been sealed */
    struct env_timer retry;
    bool retrying;
    unsigned failures;

    struct store_read read;
    struct store_range ranges[2];
    struct key begin[2], end[2];
    struct row_wait row_wait;

    struct clean_gap gap;
    struct clean_snapshot *snapshot;
    struct clean_trash trash;
};

/* --- cleaner.c ------------------------------------------------------------------------ */

/* Goes on with what is under way, or begins the next thing. */
void cleaner_run(struct cleaner *c);
/* Reads c->ranges[0 .. n), which are c->begin and c->end, in the background. */
void cleaner_read(struct cleaner *c, uint32_t n, void (*done)(struct store_read *read, enum status st));
/* To be called first where one of the cleaner's reads was answered: false where that ends it (it
 * failed, which is tried again later, or the cleaner was stopped). */
bool cleaner_answered(struct cleaner *c, enum status st);
/* To be called last there. */
void cleaner_read_over(struct cleaner *c);
/* Makes room in the open generation, and returns it, for what has this weight. */
struct gen *cleaner_room(struct cleaner *c, uint64_t weight);
/* `n` keys were given to the open generation: where those are a batch, waits for its commit. */
void cleaner_added(struct cleaner *c, uint64_t n);
/* Waits for the commit of all that was given to generations, if it is not committed yet. */
void cleaner_wait(struct cleaner *c);
/* Adds it to the open generation, in which cleaner_room() made room. */
void cleaner_add_clear(struct cleaner *c, struct gen_clear clear);
/* What is in the open generation for trash counts only if no snapshot was made since the first record
 * was begun until it is built. */
void cleaner_unsure(struct cleaner *c);
/* The segments of the volume's own branch that the state of `epoch` sees, above the epoch `above`.
 * False: that can't be told, so nothing is known to be garbage. */
bool cleaner_own_segments(const struct volume *vol, uint64_t epoch, uint64_t above,
                          struct ancestry_record *out);

/* --- the kinds of work ---------------------------------------------------------------- */

/* Begin: false where there is nothing of the kind. Step: one read, or one batch. They set c->what to
 * CLEAN_NOTHING at their end. Drop: frees what they hold; nothing is under way. */
bool clean_gap_begin(struct cleaner *c);
void clean_gap_step(struct cleaner *c);

bool clean_snapshot_begin(struct cleaner *c);
void clean_snapshot_step(struct cleaner *c);
void clean_snapshot_drop(struct cleaner *c);

bool clean_trash_begin(struct cleaner *c);
void clean_trash_step(struct cleaner *c);
void clean_trash_drop(struct cleaner *c);
/* Whether there may be trash to look for. */
bool clean_trash_wanted(const struct cleaner *c);

#endif
