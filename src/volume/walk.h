/*
 * A walk through the index of a branch as it is stored: its snapshots and the volume itself, oldest
 * first, and of each only what it does not have in common with the one before. So a thousand
 * snapshots cost what changed between them, and each row and block is met once, by the first that
 * names it.
 *
 * Nothing is held but two level-2 rows and some level-1 rows. The branch need not be open; what is
 * gone through must not change meanwhile: snapshots do not, the volume itself does not while nobody
 * owns it.
 *
 * A walk blocks: it turns the loop of its environment until what it reads is there.
 */
#ifndef VOLUME_WALK_H
#define VOLUME_WALK_H

#include "base/status.h"
#include "volume/rowread.h"

/* A snapshot, or the volume itself. */
struct walk_state {
    uint64_t epoch;  /* in: its own, or the current one */
    uint64_t n_data; /* out: blocks it names as data, own and inherited */
    bool uncertain;  /* out: some of its rows are lost: `n_data` is too low, perhaps */
};

/* A level-1 row as one state sees it. */
struct walk_row {
    enum row_found found;
    struct row_source at;   /* of its key; epoch 0: not stored, all of it is one fixed source */
    const struct row1 *row; /* all ABSENT where it is not ROW_THERE */
};

struct walk {
    struct store *store; /* in */
    struct env *env;
    void (*run_once)(struct env *env);
    uint64_t branch;
    const struct ancestry_record *ancestry; /* as the volume itself has it */
    uint64_t n_blocks;                      /* of the largest state */
    struct walk_state *states;              /* by epoch, which rise */
    size_t n_states;

    /* In. Each may be NULL. `state` is an index into `states`. */
    /* Between two rows. False: the walk ends. */
    bool (*go_on)(struct walk *w);
    /* The level-2 row `no` is another one for this state than for the one before. `at`: of its key,
     * zeros where it is missing; branch only where it can't even be told which one it would be:
     * then nothing more is said of the row, for any state from this one on. */
    void (*row2)(struct walk *w, size_t state, uint64_t no, struct row_source at,
                 enum row_found found);
    /* A level-2 row of the branch that is stored and not visible for any state it could be visible
     * for. */
    void (*unseen)(struct walk *w, uint64_t no, uint64_t epoch);
    /* The level-1 row `no` is another one for this state than for the one before (the first: than
     * all ABSENT). */
    void (*row1)(struct walk *w, size_t state, uint64_t no, const struct walk_row *before,
                 const struct walk_row *now);
    /* Level 2 (the row at `at`) says another number of data blocks than level 1 has. */
    void (*miscount)(struct walk *w, size_t state, uint64_t no, struct row_source at, unsigned said,
                     unsigned is);
    /* All of the level-2 row `no` has been told for this state; for all states. */
    void (*state_over)(struct walk *w, size_t state, uint64_t no);
    void (*row2_over)(struct walk *w, uint64_t no);

    uint64_t n_rows; /* out: rows read */
    struct walk_run *run;
};

/* ST_OK; ST_SHUTDOWN (go_on() said so); ST_UNAVAIL, ST_IO (the store could not be read at all).
 * Damaged rows are told, not failed on. */
enum status walk_run(struct walk *w, struct err *e);

/* A read that is waited for: what is to be read goes into `read`, which the caller releases. */
struct walk_read {
    struct store_read read;
    bool answered;
    enum status st;
};
enum status walk_read(struct walk_read *r, struct store *store, struct env *env,
                      void (*run_once)(struct env *env));

/* What states of a branch see, by what the volume itself sees: whether own rows of an epoch are
 * visible to any (they are not where they were rolled back), and where those are that it inherited.
 */
bool walk_epoch_counts(const struct ancestry_record *ancestry, uint64_t branch, uint64_t epoch);
void walk_inherited(const struct ancestry_record *ancestry, uint64_t branch,
                    struct ancestry_record *out);

#endif
