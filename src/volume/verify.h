/*
 * Verifying a volume: everything that it and its snapshots name is read, every hash checked, the
 * counts compared, and what is stored and named by nothing is found.
 *
 * It looks at the store by itself and not through an open volume, so what the cache of an owner
 * holds says nothing here. What is looked at must not change: the volume's state at a snapshot that
 * was made for this, or the volume itself while nobody owns it. Others may remove snapshots
 * meanwhile, and the owner clears what nothing names; so before anything is told to be wrong, it is
 * looked at again together with what may explain it.
 *
 * Memory is bounded by what one level-2 row covers. It blocks, as walk.h says.
 */
#ifndef VOLUME_VERIFY_H
#define VOLUME_VERIFY_H

#include "volume/walk.h"

enum verify_what {
    VERIFY_BLOCK_MISSING, /* the index names it, and it is not there */
    VERIFY_BLOCK_DAMAGED, /* its hash is another */
    VERIFY_BYTES_LOST, /* a write covered a part of a block that could not be read; the rest is lost
                        */
    VERIFY_ROW_MISSING,
    VERIFY_ROW_DAMAGED,
    VERIFY_ROW_COUNT,     /* level 2 says another number of data blocks than level 1 */
    VERIFY_COUNT,         /* the volume or snapshot says another number than its rows */
    VERIFY_BLOCK_UNNAMED, /* stored, and nothing names it or is about to clear it */
    VERIFY_ROW_UNNAMED,
    VERIFY_RECORD,     /* damaged, or of something that is not there */
    VERIFY_UNREADABLE, /* the store can't list its keys from there on */
};

#define VERIFY_KEY_BYTES 96u

struct verify_finding {
    enum verify_what what;
    /* Who sees it: the first and last of verify.states. VERIFY_NOBODY: no state does. */
    size_t first_state, last_state;
    uint64_t offset, length;    /* bytes of the volume; 0, 0: not in a certain place */
    char key[VERIFY_KEY_BYTES]; /* as docs/format.md writes keys: the first, where they are several
                                 */
    uint64_t n_keys;            /* several: so many keys one behind the other */
    uint64_t said, is;          /* of counts */
    bool repaired;
};
#define VERIFY_NOBODY SIZE_MAX

/* A snapshot, or the volume itself (the last one, where verify.upto is 0). */
struct verify_state {
    uint64_t epoch;
    struct snapshot_record rec; /* of the volume itself: its size and data_blocks; no name */
    bool is_volume;
    bool gone; /* out: it was removed meanwhile, and what is wrong with it is not told */
};

struct verify {
    struct store *store; /* in */
    struct env *env;
    void (*run_once)(struct env *env);
    uint64_t branch;
    uint64_t upto; /* in: the epoch of a snapshot made for this; 0: nobody owns the volume */
    bool repair;   /* in: only where upto is 0 */
    /* In. Every now and then; false: stop. */
    bool (*go_on)(struct verify *v);
    /* In. In no certain order; ranges that belong together come as one. */
    void (*found)(struct verify *v, const struct verify_finding *f);

    struct header_record header; /* out, from the first call on */
    struct verify_state *states; /* by epoch; freed by verify_free() */
    size_t n_states;
    uint64_t n_blocks, n_bytes; /* blocks read, and bytes of the volume in them */
    uint64_t n_rows;
    uint64_t n_wrong, n_repaired;
    struct verify_run *run;
};

/* ST_OK: all was looked at (n_wrong says what of it); ST_SHUTDOWN (go_on() said so); ST_BUSY
 * (somebody took the volume meanwhile, or the snapshot is gone); ST_NOTFOUND, ST_UNAVAIL, ST_IO. */
enum status verify_run(struct verify *v, struct err *e);
void verify_free(struct verify *v);

#endif
