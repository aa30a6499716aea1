/*
 * A driver for one volume: random requests, and a plain array that says what the volume must
 * hold. It runs in a simulated world, or in a real one on an engine (world.h).
 *
 * Effects are kept in a journal in the order in which the volume took them. While the
 * process lives, a read must show the array as it was when the read was asked for, or,
 * where later effects overlap it, one of the values since then. After a crash the whole
 * volume is read back and must equal the array after some prefix of the journal (G2, G3),
 * one that reaches as far as what was answered (G1).
 *
 * A volume larger than memory is looked at through regions: requests lie in them, but
 * zeroes and trims may span any number of them.
 */
#ifndef TESTS_SIM_DRIVER_H
#define TESTS_SIM_DRIVER_H

#include "volume/catalog.h"
#include "volume/session.h"
#include "volume/volume.h"
#include "world.h"

struct drv_config {
    uint64_t seed;
    uint64_t size; /* bytes, a multiple of 512 */
    uint32_t block_size;
    int codec;
    uint64_t cache_bytes;
    bool no_log;        /* answer at the commit although the store has a log */
    unsigned n_regions; /* 1: one from 0 to the end; more: spread over the volume */
    uint64_t region_bytes;
    uint64_t write_bytes_max; /* longest write; 0: 4 MiB */
    uint64_t log_bytes;
    uint32_t seal_age_ms;
    uint32_t store_timeout_ms;
    uint32_t owner_wait_ms;
    bool resize;       /* sizes change now and then */
    bool expect_nospc; /* writes may be refused; not checked against the array */
    bool faults;       /* requests may fail with ST_IO */
    bool damaged;      /* the store is damaged on purpose: drv_close does not check it */
    struct world *world; /* NULL: a simulated one with `store`, from the seed; the driver's */
    struct mem_config store;
    /* Another driver, whose world this one shares, and which volume it drives: a clone that is there
     * already and holds nothing but zeros as far as the array goes, until told otherwise. */
    struct drv *beside;
    const char *name; /* NULL: "v" */
    uint64_t branch;  /* 0: it is made */
};

struct region {
    uint64_t start, len;
    uint8_t *now, *base; /* after all of the journal, and before it */
    uint8_t *alloc;      /* per block: ALLOC_* */
    uint64_t *touched;   /* per block: the last effect there, in numbers of drv.effects; 0: none */
};

enum { ALLOC_HOLE, ALLOC_DATA, ALLOC_UNKNOWN };

enum effect_kind { EFFECT_WRITE, EFFECT_ZERO, EFFECT_RESIZE };

struct effect {
    enum effect_kind kind;
    uint64_t off, len, id;
    uint8_t pattern;
    bool answered;
    bool failed;  /* answered with an error: it may be there or not, from now on */
    bool suspect; /* shown to a reader before it was answered */
};

/* One process: a handle of the store, a session, a shard, the volume. */
struct process {
    struct env *env;
    struct store *store;
    struct session session;
    struct shard *shard;
    struct volume *vol;
    struct volume_open open;
    struct volume_watcher watcher;
    struct process *beside; /* another volume open on the same shard; see process_beside */
    bool opened, closed, lost, dead;
    /* What it had under way when it was stopped. */
    bool stopped;
    struct list flying, ready, shown;
    size_t n_flying, n_inline, cap_inline;
    uint8_t **inline_data;
};

struct drv {
    struct drv_config c;
    struct world *world;
    struct sim *sim; /* the world's, these two: for tests of simulated ones */
    struct mem_store *db;
    struct list ring; /* the drivers that share the world */
    uint64_t chance; /* the driver's own, apart from the world's */
    uint64_t branch, size, base_size;
    char name[NAME_BYTES_MAX + 1];
    struct process *p;
    struct region *regions;
    unsigned n_regions;
    struct effect *journal;
    size_t n_journal, cap_journal;
    uint64_t next_id;
    uint64_t effects; /* there were so many, in the journal or in those before it */
    uint64_t durable;   /* effects that must survive the machine */
    uint64_t answered;  /* ... the process */
    struct list flying; /* requests */
    struct list ready;  /* writes that were granted and wait for their commit */
    struct list shown;  /* answered reads whose buffers are still "being sent" */
    uint8_t **inline_data;
    size_t n_inline, cap_inline;
    size_t n_flying;
    size_t n_others; /* requests of the test's own that are to be waited for, too */
    bool suspects; /* some effect is one; judged after the step */
    uint64_t seen_nospc, seen_io, reads_checked, bytes_checked, requests;
    bool quiet; /* violations are expected: no message */
    bool violated;
    char what[400]; /* the first violation */
};

struct drv *drv_new(const struct drv_config *config);
/* False where anything was violated (it was printed, unless `quiet`). */
bool drv_free(struct drv *d);

/* The medium and its world, without a volume: for tests with their own ideas. */
uint64_t drv_chance(struct drv *d);
uint64_t drv_below(struct drv *d, uint64_t n);
bool drv_one_in(struct drv *d, uint64_t n);
void drv_violation(struct drv *d, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A process starts and opens the volume. */
struct process *process_start(struct drv *d);
/* Opens the volume in a process that has no volume open. */
bool process_open(struct drv *d, struct process *p);
/* Makes a volume like the driver's; its branch. */
uint64_t drv_make_volume(struct drv *d, const char *name);
/* Opens another volume, made here, in the same process and shard. */
struct process *process_beside(struct drv *d, struct process *p, uint64_t *branch);
/* Closes the volume and waits; then the process ends in good order. */
void process_close(struct drv *d, struct process *p);
void process_stop(struct drv *d, struct process *p);
/* It dies. drv_bury() afterwards frees its remains. */
void process_crash(struct drv *d, struct process *p);

/* It stands still from now on (until it is crashed); what it had under way stays unanswered
 * and is not waited for. */
void drv_stop_process(struct drv *d, struct process *p);

void drv_open(struct drv *d);  /* process_start into d->p */
void drv_close(struct drv *d); /* drains, and ends d->p in good order */
void drv_reopen(struct drv *d, bool new_process);

/* What a test asks of a volume itself: a change of its history, or any request (op.io). */
struct asked {
    struct vol_history_op op;
    bool answered;
};
/* To be handed to the volume; `name`: op.name. */
struct asked drv_asked(const char *name);
/* For op.io.done; drv_asked() sets it. */
void drv_answered(struct vol_io *io);
/* Of a struct asked, for drv_until() and world_run_until(). */
bool drv_is_answered(void *arg);
/* Runs the world until the driver's process has the answer. ST_SHUTDOWN (and a violation): none
 * comes. */
enum status drv_answer(struct drv *d, struct asked *a);

/* An operation of the catalog that a test begins: op.done is drv_op_done. */
struct waited {
    struct catalog_op op;
    bool done;
};
void drv_op_done(struct catalog_op *op);
/* Runs the world until a process (its `env`) has the answer. ST_SHUTDOWN (and a violation): none
 * comes. */
enum status drv_op_wait(struct drv *d, struct env *env, struct waited *w);

/* Opens a snapshot (of the driver's volume or another one) on the shard of a process. NULL: it can't
 * be, `st` says why. drv_view_close() waits until it is closed. */
struct volume *drv_view_open(struct drv *d, struct shard *shard, struct env *env, uint64_t branch,
                             uint64_t epoch, enum status *st);
void drv_view_close(struct drv *d, struct volume *view, struct env *env);
/* Reads of a view, at most VOLUME_READ_BYTES_MAX. ST_SHUTDOWN (and a violation): no answer comes. */
enum status drv_view_read(struct drv *d, struct volume *view, uint64_t off, uint64_t len,
                          uint8_t *out);
/* Runs the world, with what has arrived for this volume, until the condition holds; false (and a
 * violation) where that does not come. */
bool drv_until(struct drv *d, bool (*cond)(void *arg), void *arg);

/* Issues one random request; runs the world for a moment; both, many times. */
void drv_request(struct drv *d);
void drv_breathe(struct drv *d);
/* Some events, none of them later than a moment from now. */
void drv_moment(struct drv *d, uint64_t steps);
void drv_steps(struct drv *d, uint64_t n);
void drv_submit(struct drv *d);
/* What took effect inside calls and events that the driver did not make. */
void drv_look(struct drv *d);
/* Waits until everything is answered; false (and a violation) where that does not come. */
bool drv_drain(struct drv *d);

/* The process dies, or the machine; the volume is opened by another one and compared. */
void drv_crash(struct drv *d, bool power);
void drv_recover(struct drv *d, bool power);
/* Looks at all that is stored (stored.h); the volume is closed. */
void drv_check_store(struct drv *d);
/* Reads everything and compares with the array: nothing may be missing. */
void drv_verify_all(struct drv *d);

/* Sends a request that needs the volume owned, and does not wait for it. */
void drv_request_ownership(struct drv *d);
/* Lets time pass, and what happens in it. */
void drv_wait_ms(struct drv *d, uint64_t ms);

/* A read of the first byte by another process, not waited for. */
struct knock {
    struct vol_io io;
    struct vol_seg segs[2];
    bool answered;
    enum status st;
};
void drv_knock(struct process *p, struct knock *k);

/* With a store that checks nothing: a second process takes the volume while the first one
 * writes; then both write, and neither may notice, but the contents must. */
void drv_two_owners(struct drv *d);

/* One request each, to its end. */
enum status drv_write(struct drv *d, uint64_t off, uint64_t len, uint32_t flags);
enum status drv_zero(struct drv *d, uint64_t off, uint64_t len, bool trim, uint32_t flags);
enum status drv_flush(struct drv *d);
enum status drv_sync(struct drv *d);
enum status drv_resize(struct drv *d, uint64_t size);
enum status drv_read(struct drv *d, uint64_t off, uint64_t len, uint8_t *out);

/* What the array says of bytes; `start`, `len`: what `bytes` holds. */
void drv_effect_onto(const struct effect *e, uint64_t start, uint64_t len, uint8_t *bytes);
/* All that was written is in the store: the journal begins anew. */
void drv_checkpoint(struct drv *d);
/* The array is another one from now on (clones, rollbacks): now, alloc and touched of all regions were
 * changed, and `size` is the volume's. */
void drv_array_changed(struct drv *d, uint64_t size);

/* The bytes a write puts at volume offset `off`. */
void drv_fill(uint64_t id, uint8_t pattern, uint64_t off, uint64_t len, uint8_t *out);

#endif
