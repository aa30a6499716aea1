/*
 * The volume: what the NBD server reads from and writes to.
 *
 * A shard is one reactor's part of the process: its buffers, its write log, its
 * open volumes. A volume lives on one shard and is touched by that reactor's
 * thread only, so there are no locks. Requests are `struct vol_io`s of the
 * caller's. A write takes effect when volume_write_commit() is called, in that
 * order, and is answered when it would survive the process (G1): on stores with
 * a write log after shard_submit(), else when its generation has committed.
 *
 * All functions here run on the shard's reactor thread; callbacks too, never
 * from inside the call that started the request unless said.
 */
#ifndef VOLUME_VOLUME_H
#define VOLUME_VOLUME_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/counter.h"
#include "base/env.h"
#include "base/status.h"
#include "store/log.h"
#include "volume/records.h"

/* G3: longer writes are consecutive pieces of this many bytes. */
#define VOLUME_PIECE_BYTES (4u << 20)
/* The longest read in one request to the volume; callers split longer ones. */
#define VOLUME_READ_BYTES_MAX (1u << 20)
#define VOLUME_CACHE_BYTES_MIN (32ull << 20)

struct shard;
struct volume;
struct session;

struct shard_config {
    struct store *store;
    struct env *env;
    struct session *session;  /* this process's, see session.h */
    uint64_t cache_bytes;     /* budget of all block buffers, at least VOLUME_CACHE_BYTES_MIN */
    uint64_t log_bytes;       /* 0: a size fitting cache_bytes */
    bool background;          /* its reads may wait while others are busy: export, verify */
    bool no_log;              /* answer at the commit although the store has a log (commands) */
    uint32_t seal_age_ms;     /* 0: 1000 */
    /* A request that has waited about so long for the store is answered ST_IO; 0: it waits. */
    uint32_t store_timeout_ms;
    /* For so long (and the moment a question takes) requests wait for another server, which lives,
     * to let go of their volume. 0: it is asked once. */
    uint32_t owner_wait_ms;
};

/* Makes a shard: pool and log. Blocks while the log is written through; before the reactor
 * serves. */
enum status shard_new(const struct shard_config *config, struct shard **out, struct err *e);

/* Frees a shard whose volumes are all closed. */
void shard_free(struct shard *shard);

/* This process is about to end. Requests of ours wait no longer for the owners of volumes: those that
 * do are answered ST_PERM, without any effect. Others that ask for a volume of ours are not told
 * that it is in use, but wait until the requests under way are over and it is given back. */
void shard_wait_no_more(struct shard *shard);

/* To be called once after each batch of requests (after parsing what one socket read
 * brought, before sending replies): writes the log records that gathered in one call and
 * answers the writes among them: their `done` is called from inside. Cheap when nothing
 * gathered. */
void shard_submit(struct shard *shard);

/* To be asked before a batch of requests is taken, so that none is looked up in vain, and
 * once for each batch of replies, after whatever they tell was looked up and before
 * the first of them is sent (G4). False: this process's session is in doubt, and the replies
 * are kept until it holds again, which runs the loop, or has ended, which loses the volumes,
 * whose watchers drop the replies. One clock call where the store needs heartbeats, none
 * elsewhere. */
bool shard_may_answer(struct shard *shard);

/* Whether writes wait for memory, log room or space that others hold. */
bool shard_writers_wait(const struct shard *shard);

/* A run of bytes of a block buffer; buf NULL: that many zeros. */
struct vol_seg {
    struct buf *buf;
    uint32_t offset, len;
};

/* What a block status tells, and what the flags of its extents mean. */
enum vol_status_of {
    VOL_STATUS_ALLOCATION, /* VOL_EXTENT_HOLE, VOL_EXTENT_ZERO */
    /* The flags are a number: 0: never written; 1: in the volume itself; 2: inherited from the
     * snapshot it is a clone of; 3: which that has inherited; ... */
    VOL_STATUS_DEPTH,
    /* VOL_EXTENT_CHANGED where the contents may differ from those of `since`, and there the flags of
     * VOL_STATUS_ALLOCATION too. What lies behind the end of `since` has changed where it holds
     * data. */
    VOL_STATUS_CHANGED,
};

struct vol_extent {
    uint64_t length;
    uint32_t flags;
};
#define VOL_EXTENT_HOLE 1u /* the bits of base:allocation */
#define VOL_EXTENT_ZERO 2u
#define VOL_EXTENT_CHANGED 4u

enum vol_io_flags {
    VOL_FUA = 1,      /* answered only when it would survive the machine */
    VOL_NO_HOLE = 2,  /* zero: stays allocated in the block status */
    VOL_REQ_ONE = 4,  /* status: one extent, not longer than asked */
};

/* One that writes and keeps in mind what it wrote: a connection. The caller's, from its first
 * request to its last; zero-initialise, then set `name`. Once it has written, it may go on
 * as long as nobody else changes the data while this process does not own the volume: a file
 * system that is mounted here would be destroyed by its next write. Then its writes, zeroes and
 * trims are answered ST_PERM, for good; reads are not. */
struct vol_writer {
    const char *name; /* in: for the log */
    uint64_t lineage; /* the volume's, from here on */
    bool told;
};

/* One request. The caller owns it and keeps it until answered. Zero-initialise, then set
 * the fields marked "in". */
struct vol_io {
    void (*done)(struct vol_io *io);    /* in: the answer is in `st` */
    void (*granted)(struct vol_io *io); /* in, writes only: volume_write_begin came through */
    uint64_t offset, length;            /* in; inside the volume */
    uint32_t flags;                     /* in: enum vol_io_flags */
    struct vol_writer *writer;          /* in: who changes something; NULL: it does not matter */
    enum status st;                     /* out */
    /* read (out) and write (buffers to receive into): pieces in order; memory for
     * segs_cap of them is the caller's. VOL_SEGS(length, block_size) suffice. A read's
     * buffers are referenced: the caller calls volume_release_segs when they were sent. */
    struct vol_seg *segs;
    uint32_t n_segs, segs_cap;
    struct vol_extent *extents; /* status: memory of the caller's for extents_cap */
    uint32_t n_extents, extents_cap;
    enum vol_status_of status_of; /* status: in */
    struct volume *since;         /* status of changes, in: a view on the same shard, with blocks of
                                     the same size; a reference of the caller's */

    struct volume *vol; /* the volume's, from here on */
    struct list link;
    struct env_task task;
    struct store_log_sync sync;
    uint64_t sync_upto;
    uint64_t held_bytes, held_log;
    uint32_t held_keys_each; /* of held_space.keys, for each block */
    uint64_t new_size;
    struct store_reservation held_space;
    uint32_t tick; /* since then it waits for the store; see timeout.c */
    uint8_t kind, stage;
    uint8_t commits_waited; /* by a read; see wait_for_commit() */
    bool first;             /* new writes of its volume wait for it */
};

#define VOL_SEGS(length, block_size) ((uint32_t)((length) / (block_size) + 2))

/* --- opening --------------------------------------------------------------------- */

/* A volume as it must be known before any request: size for the negotiation. The same
 * structure serves all connections of a shard to that branch. Opening needs no ownership:
 * the first request that needs it takes it (replaying the log of an owner that died).
 * `done` may be called from inside. On failure *vol is NULL and `e` says why.
 *
 * A view is a snapshot. It never changes, so it needs no owner: any number of processes can have it
 * open. All requests but those that change something work on it. If the snapshot is removed
 * meanwhile, its watchers are told that it is lost. */
struct volume_open {
    uint64_t branch;           /* in */
    uint64_t epoch;            /* in: 0: the volume; else its snapshot of that epoch: a view */
    char name[FULL_NAME_BYTES]; /* in: for messages */
    bool read_only;            /* in: clients may not change it */
    bool importing;            /* in: it may be one with an import that is not complete */
    /* In: where what it has counted is added when it is freed; NULL: nowhere. Stays until then. Of the
     * first who opens it. */
    struct volume_stats *closed;
    void (*done)(struct volume_open *op);
    struct volume *vol;        /* out: one reference, see volume_close */
    enum status st;            /* out */
    struct err err;            /* out */

    struct shard *shard; /* the volume's, from here on */
    struct list link;
    struct key keys[4];
    struct store_read read;
    struct store_get gets[4];
};
void volume_open(struct shard *shard, struct volume_open *op);

/* Gives one reference back. With the last one the volume commits everything, gives its
 * ownership back and is freed; `done` (may be NULL) is called with `arg` then. No request
 * of this reference may be unanswered. */
void volume_close(struct volume *vol, void (*done)(void *arg), void *arg);

/* Current values; the size may change under an open volume (resize). */
uint64_t volume_size(const struct volume *vol);
uint32_t volume_block_size(const struct volume *vol);
uint64_t volume_branch(const struct volume *vol);
uint64_t volume_epoch(const struct volume *vol); /* of a view; 0: the volume itself */
const char *volume_name(const struct volume *vol); /* when it was opened */
const char *volume_description(const struct volume *vol);

/* Whether this process owns it just now (a view is everybody's). While it does not, requests wait for
 * the ownership. */
bool volume_is_owned(const struct volume *vol);

/* How often this process took it; and whether somebody changed its data between the first request
 * that asked for it to be taken, and its being taken. */
uint64_t volume_times_taken(const struct volume *vol);
bool volume_changed_before_taken(const struct volume *vol);
/* Between on and off it does not count as idle, and is not handed over (any number of these). */
void volume_keep(struct volume *vol, bool on);
/* Another number each time it was found that others changed its data. */
uint64_t volume_lineage(const struct volume *vol);

/* A sentence about the last request that was answered ST_PERM, for whoever sent it: who has the
 * volume, since when, or why else. Empty where there was none; holds until the loop turns. */
const char *volume_refusal(const struct volume *vol);

/* Called (reactor thread) when this process lost the volume for good or an administrator
 * evicted it: connections to it must be closed at once; requests in flight are answered
 * with errors. Any number of watchers; each stays the caller's. */
struct volume_watcher {
    void (*lost)(struct volume_watcher *w, const char *why);
    struct list link;
};
void volume_watch_loss(struct volume *vol, struct volume_watcher *w);
void volume_unwatch_loss(struct volume_watcher *w);

/* --- requests -------------------------------------------------------------------- */

/* Reads at these places follow at once: brings what looking them up needs into the processor's
 * cache, for all at the same time instead of one after the other. Changes nothing; any offsets. */
#define VOLUME_WARM_MAX 32u
void volume_warm(const struct volume *vol, const uint64_t *offsets, uint32_t n);

/* Read `length` (1 .. VOLUME_READ_BYTES_MAX) bytes. True: answered already, `io` holds the
 * result and `done` is not called; that is the way of cached blocks. False: `done` comes. */
bool volume_read(struct volume *vol, struct vol_io *io);
void volume_release_segs(struct vol_io *io);

/* A write in two steps, so that its payload can be received straight into the buffers that
 * become the cache. Begin asks for memory, log room and store space for `length` (1 ..
 * VOLUME_PIECE_BYTES) bytes. True: answered already: go on where io->st is ST_OK, else
 * (ST_NOSPC, ST_PERM, ...) discard the payload and reply with the error. False: `granted`
 * will be called with the same meaning; the connection pauses meanwhile. */
bool volume_write_begin(struct volume *vol, struct vol_io *io);

/* After a grant: fills io->segs with fresh buffers to receive the payload into. Optional:
 * a payload that lies in memory already needs none. */
void volume_write_buffers(struct volume *vol, struct vol_io *io);

/* The payload is complete, at `data` or, where that is NULL, in the buffers: the write takes
 * effect now. `data` must stay until shard_submit() returned. `done` comes from inside a
 * later shard_submit, or later still. */
void volume_write_commit(struct volume *vol, struct vol_io *io, const void *data);

/* Instead of commit: nothing happened (the client went away half way). Also withdraws a begin
 * that is still waiting; `granted` is not called then. */
void volume_write_abort(struct volume *vol, struct vol_io *io);

/* Takes back what waits for the volume to become ours, of the requests that `is_meant` names: it
 * has not begun and never will. Their `done` is called from inside, with ST_SHUTDOWN. (Writes that
 * wait for their grant: volume_write_abort.) */
void volume_withdraw(struct volume *vol, bool (*is_meant)(struct vol_io *io, const void *arg),
                     const void *arg);

/* Make `length` (any) bytes zero; trim also gives their space back. Answered as writes. */
void volume_zero(struct volume *vol, struct vol_io *io);
void volume_trim(struct volume *vol, struct vol_io *io);

/* Answers when every write answered before this call would survive the machine. */
void volume_flush(struct volume *vol, struct vol_io *io);

/* Answers when this process owns the volume and io->writer may write, or ST_PERM. */
void volume_own(struct volume *vol, struct vol_io *io);

/* Loads `length` bytes into the cache (at most a part of it); answers at once. */
void volume_prefetch(struct volume *vol, struct vol_io *io);

/* Block status of `length` bytes into io->extents: at least one extent, none empty, together
 * at least one byte and at most `length` bytes long; shorter where extents_cap is reached
 * or it would take long. ST_NOTFOUND: the snapshot that io->since is a view of was removed. */
void volume_status(struct volume *vol, struct vol_io *io);

/* --- control --------------------------------------------------------------------- */

/* Changes the size (bytes, a multiple of 512); what is cut off is trimmed. */
void volume_resize(struct volume *vol, struct vol_io *io, uint64_t size, bool shrink);

/* Commits everything that was written so far. */
void volume_sync(struct volume *vol, struct vol_io *io);

/* A change of the volume's history, which takes its ownership as a write does. The caller owns it
 * until io.done; io.st is the answer, and where that is not ST_OK `err` a sentence. */
struct vol_history_op {
    struct vol_io io;              /* in: done */
    char name[NAME_BYTES_MAX + 1]; /* in: of the snapshot */
    char to[NAME_BYTES_MAX + 1];   /* in: rename */
    uint8_t id[SNAPSHOT_ID_BYTES]; /* in: create: random */
    uint64_t created_ns;           /* in: create: since 1970; 0: now */
    uint64_t token;                /* in: create: not 0: only if frozen under this token, else ST_BUSY */
    uint64_t epoch;                /* out: of the snapshot */
    struct err err;                /* out */

    struct key key, children, children_end; /* the volume's, from here on */
    uint8_t was[RECORD_BYTES_MAX], bytes[RECORD_BYTES_MAX];
    struct store_check checks[3];
    struct store_mutation mutation;
    struct store_commit commit;
    struct store_read read;
    struct store_get get;
    struct store_range range;
};

/* Makes a snapshot that holds exactly the writes that took effect before this call, and so all that
 * were answered. ST_EXISTS, ST_NOSPC (SNAPSHOTS_MAX), ST_INVAL (no such name can be). Asked for again
 * with the same name and id, it is ST_OK: whoever got no answer asks again. */
void volume_snapshot_create(struct volume *vol, struct vol_history_op *op);
/* Removes one; what only it holds is given back in the background. ST_NOTFOUND; ST_BUSY where it has
 * clones. Does not disturb clients of the volume. */
void volume_snapshot_remove(struct volume *vol, struct vol_history_op *op);
/* ST_NOTFOUND, ST_EXISTS, ST_INVAL. */
void volume_snapshot_rename(struct volume *vol, struct vol_history_op *op);

/* Changes that begin from now on wait, for `ms` at most or until volume_thaw() with the same token:
 * for snapshots of several volumes at one instant. False: it is frozen under another token, and that
 * counts: whoever comes first gets all his volumes, if all are asked for in one order. */
bool volume_freeze(struct volume *vol, uint64_t token, uint32_t ms);
void volume_thaw(struct volume *vol, uint64_t token);

/* Whether the space behind trims, removed snapshots and rollbacks is all given back, as far as is
 * known; only the owner's answer means something. It is worked on while the volume is owned. */
bool volume_is_clean(const struct volume *vol);

/* Makes blocks that the volume has from its parent its own, from byte op->io.offset (in) on, some of
 * them: then op->io.offset is where to go on (which may be further back, after the volume changed
 * hands). Past the end (io.offset == the size) the volume has no parent any more. ST_BUSY where it
 * has snapshots, which hold inherited blocks too; ST_IO where some can't be read: they begin at
 * io.offset or within a piece behind it. */
void volume_flatten(struct volume *vol, struct vol_history_op *op);

/* One of these four changes, as a letter asks for it: mail->kind is a MAIL_SNAPSHOT_* or MAIL_FLATTEN.
 * Fills what goes into `op`, but for io.done, which is there. */
void volume_history(struct volume *vol, struct vol_history_op *op, const struct mail_record *mail);

struct volume_stats {
    uint64_t dirty_bytes, cached_bytes, generation, data_blocks;
    uint64_t dirty_since_ns; /* begin of the oldest change that is not committed; 0: there is none */
    /* These count; see volume_open.closed. */
    uint64_t cache_hits, cache_misses, hash_errors, commits, commit_retries, timeouts;
    uint64_t conflicts; /* commits refused because another server owned it by then */
    uint64_t fencings;  /* sessions of others that were fenced to take it */
    struct histogram commit_time;
};
void volume_get_stats(const struct volume *vol, struct volume_stats *stats);
/* What volume_open() was told as `closed` when it was opened first. */
struct volume_stats *volume_counts_into(const struct volume *vol);
/* Adds what counts in `from` to `to`. */
void volume_stats_add(struct volume_stats *to, const struct volume_stats *from);

/* Calls `look` for each volume and view that is open. It must open and close none. */
void shard_look(const struct shard *shard, void (*look)(void *arg, const struct volume *vol),
                void *arg);
/* What its cache holds, dirty blocks among it, and the most it may, in bytes. */
struct shard_memory {
    uint64_t used_bytes, dirty_bytes, limit_bytes;
};
void shard_get_memory(const struct shard *shard, struct shard_memory *memory);

/* Says how many log lines were left out, if any were. Now and then. */
void shard_tell_left_out(struct shard *shard);

#endif
