/*
 * What the files of the volume layer share: the shard, the volume, the
 * generation, and who calls whom.
 *
 *   volume.c      opening and closing, the life of a volume
 *   owner.c       taking and giving back ownership, the mailbox
 *   write.c       writes, zeroes, trims, flushes into the open generation
 *   fetch.c       reads, and what must be loaded for them
 *   extents.c     the block status
 *   generation.c  from a sealed generation to a commit
 *   weight.c      the most a generation's commit can have, before it is built
 *   index.c       the rows in memory
 *   ancestry.c    where the rows of a volume are
 *   history.c     the snapshots of a volume
 *   snapshot.c    making, removing and renaming them
 *   view.c        snapshots as volumes nobody owns
 *   cleaner.c     space that nobody needs any more; trash.c, clean_*.c: its kinds (cleaner.h)
 *   rowread.c     rows past the index in memory
 *   flatten.c     making what is inherited the volume's own
 *   replay.c      the log of an owner that died
 *   timeout.c     requests that the store keeps waiting too long
 *   shard.c       limits, and the batch that ends with one log write
 *
 * One thread: everything here runs on the shard's reactor, but the `work` and
 * `digest` functions, which touch only what their request owns.
 */
#ifndef VOLUME_INTERNAL_H
#define VOLUME_INTERNAL_H

#include "base/check.h"
#include "base/log.h"
#include "base/loglimit.h"
#include "base/mem.h"
#include "store/log.h"
#include "volume/ancestry.h"
#include "volume/blocks.h"
#include "volume/codec.h"
#include "volume/history.h"
#include "volume/index.h"
#include "volume/session.h"
#include "volume/volume.h"

#define TRIM_EACH_MAX 64u          /* trims of up to so many blocks mark each one */
#define GENERATION_RANGES_MAX 256u
#define GENERATION_BLOCKS_MAX 16384u
#define GENERATIONS_QUEUED_MAX 8u
#define GENERATION_ROWS_COUNTED 256u
#define READ_COMMITS_MAX 2u /* a read that waited for so many commits comes before new writes */
/* A commit takes at least this much: a write of 4 MiB with its index rows (weight.c). */
#define COMMIT_BYTES_MIN (5ull << 20)

/* Kinds of log records; stored (docs/format.md). */
enum io_kind {
    IO_READ,
    IO_WRITE,
    IO_ZERO,
    IO_TRIM,
    IO_FLUSH,
    IO_SYNC,
    IO_RESIZE,
    IO_STATUS,
    IO_PREFETCH,
    IO_OWN,
    IO_SNAPSHOT,
    IO_SNAPSHOT_REMOVE,
    IO_SNAPSHOT_RENAME,
    IO_FLATTEN,
};
enum io_stage {
    IO_IDLE,
    IO_PARKED,   /* until the volume is owned */
    IO_WAITING,  /* for memory, log room or space; or for a commit */
    IO_GRANTED,
    IO_LOGGED,
    IO_STARTING, /* inside volume_read */
    IO_LOOKED,   /* status: known; answered when what it saw has committed */
    IO_FINISHED, /* and answered there */
};

enum { RECORD_WRITE = 1, RECORD_ZERO = 2, RECORD_TRIM = 3 };

struct shard {
    struct store *store;
    struct env *env;
    struct session *session;
    struct session_member *member; /* NULL: the store knows dead processes by itself */
    bool adrift;                   /* the session ended; the next one has not begun */
    bool in_doubt;                 /* it may have ended: requests are parked, nothing is answered */
    struct env_timer doubt_timer;
    uint64_t incarnation;          /* counts the sessions there were */
    struct store_log *log; /* NULL: writes are answered at their commit */
    struct buf_pool *pool;
    struct blocks blocks;
    struct rows_lru rows;
    struct list volumes;
    uint64_t next_tag;
    uint32_t seal_age_ms;
    uint32_t owner_wait_ms;
    bool background; /* reads may wait while others are busy */
    bool leaving; /* the process is about to end: all volumes are given back soon */

    /* G6. What writes hold: dirty blocks of all generations and buffers being received. */
    uint64_t write_bytes, write_bytes_max;
    /* What reads under way hold. */
    uint64_t read_bytes, read_bytes_max;
    uint64_t generation_bytes_max;
    uint64_t commit_bytes_max; /* the store's */
    uint64_t log_held; /* log room promised to writes that were begun */
    struct store_reservation credit; /* reserved in the store and not yet used by a write */
    struct list write_waiters, read_waiters; /* vol_io.link */
    struct store_reserve_wait space_wait;
    bool space_waiting, space_refused, seal_wanted;

    struct list submitted; /* writes whose records wait for shard_submit */
    bool log_dirty;        /* something was appended since the last submit */
    bool log_failed;
    uint64_t log_submitted_seq; /* records below survive the process */
    uint64_t log_synced_seq;    /* records below are known to survive the machine */
    struct env_timer age_timer;
    bool age_running;

    /* See timeout.c. */
    uint32_t store_timeout_ms;
    uint32_t tick;
    struct env_timer tick_timer;
    bool tick_running, timeout_told;
    struct list fetches, walks; /* loads that somebody waits for; see fetch.c, extents.c */
    struct log_limit unread;    /* lines about blocks that can't be read, as often as one reads */
};

struct gen_range {
    uint64_t first, end; /* blocks */
    uint8_t kind;        /* SOURCE_ZERO or SOURCE_HOLE */
};

/* One version of one block in a sealed generation. */
struct gen_item {
    uint64_t no;
    struct buf *buf; /* NULL: zeros */
    struct mask mask;
    bool full, zero, hole, bad_base;
    bool encoded_zero; /* data that turned out to be zeros */
    uint32_t head_len;
    uint8_t *head;
    struct slice body;
};

/* In vol_io.flags: not a client's, so it may change a volume that is served read-only. */
#define IO_BY_COMMAND (1u << 31)

/* Something to be cleared, found by the cleaner. What is `certain` nobody names or ever will; else
 * that is so where the index does not name it when the generation is built. */
struct gen_clear {
    uint64_t epoch, no;
    uint8_t level;     /* 0: a block; 1, 2: a row (2: certain) */
    bool certain;
    uint32_t n_blocks; /* level 0, not 0: so many of one level-1 row, whether they are there or not */
    uint32_t runs_max; /* not certain: more ranges than that have no room in this commit */
};

/* A row that is to be stored as the volume's own. */
struct gen_adopt {
    uint64_t no;
    unsigned level;
};

/* Epochs after `after`, up to `upto`, that were rolled back; upto 0: none. */
struct gen_gap {
    uint64_t after, upto;
};

enum gen_stage {
    GEN_OPEN,
    GEN_SEALED,
    GEN_PREPARING,
    GEN_ENCODING,
    GEN_ENCODED,
    GEN_BUILT,
    GEN_COMMITTING,
};

struct gen {
    struct list link; /* vol->gens, oldest first */
    struct volume *vol;
    uint64_t no;
    enum gen_stage stage;
    struct list dirty; /* blk.dirty while open */
    uint64_t n_dirty, dirty_bytes;
    uint64_t epoch;  /* what it stores is of; known when it is built */
    uint64_t weight; /* the most bytes its commit can have; see weight.c */
    uint32_t n_rows1; /* level-1 rows that blocks in it belong to; some counted more than once */
    uint64_t rows_counted[GENERATION_ROWS_COUNTED]; /* rows in the weight; not all of them */
    struct store_reservation reserved;
    struct gen_range *ranges;
    size_t n_ranges, cap_ranges;
    struct gen_clear *clears; /* candidates of the cleaner */
    size_t n_clears, cap_clears;
    uint64_t *trash_done; /* ("t", branch, n) that are finished with this commit */
    size_t n_trash_done, cap_trash_done;
    /* The clears that are not certain and `trash_done` count only if history_changes is this when it is
     * built. */
    bool unsure;
    uint64_t unsure_changes;
    uint64_t *snapshots_done; /* epochs of removed snapshots that are finished with this commit */
    size_t n_snapshots_done, cap_snapshots_done;
    struct gen_gap gap_closed; /* with this commit */
    bool detach; /* with this commit the volume has no parent any more */
    struct gen_adopt *adopts;
    size_t n_adopts, cap_adopts;
    struct ancestry_record *ancestry; /* stored by this commit; NULL: it stays */
    uint64_t trash_first, trash_end; /* build: blocks for the next trash record */
    uint64_t first_seq, last_seq; /* log records; first 0: none */
    uint64_t replayed_log, replayed_seq; /* while replaying another log */
    uint64_t new_size; /* 0: the size stays */
    struct snapshot_record *snapshot; /* made of all up to this generation; NULL: none ... */
    uint64_t snapshot_epoch;          /* ... known when it is built */
    bool force; /* commit even with nothing in it */
    bool has_changes; /* of clients: see state_record.changed */
    uint64_t opened_ns;
    struct list waiters; /* vol_ios answered by the commit */

    struct gen_item *items;
    size_t n_items;
    size_t bases_wanted; /* items before this one have their base or wait for its read */
    unsigned base_tries;
    unsigned inflight;   /* reads, works and commits that will come back to it */
    struct row_wait row_wait;
    struct row_slot **pinned;
    size_t n_pinned, cap_pinned;
    size_t prepare_at;
    struct gen_scan *scan; /* level-2 rows that a range covers whole */
    size_t n_scan, cap_scan;
    size_t scan_range;
    bool scan_waits; /* for the generations before it to be committed */
    bool zeros_built; /* zeros have stored a level-2 row */
    uint64_t scan_next, scan_epoch; /* where to go on in the place that is looked through ... */
    uint32_t scan_place;            /* ... the branch itself (0), or a segment of its ancestry */
    struct gen_encode *encodes;
    size_t encodes_left;
    struct store_mutation *mutations;
    size_t n_mutations, cap_mutations;
    struct chunk *arena;
    struct store_check check;
    struct store_commit commit;
    uint64_t commit_sent_ns;
    struct env_timer retry;
    unsigned tries;
    struct state_record state_after;
};

/* The cached blocks of a volume, in lists by region, so that a trim of gigabytes looks at few
 * blocks outside of it. */
#define ENTRY_LISTS 1024u
#define ENTRY_REGION_SHIFT 18u

enum vol_ownership { VOL_UNOWNED, VOL_ACQUIRING, VOL_OWNED, VOL_RELEASING };

struct volume {
    struct shard *shard;
    struct list link; /* shard->volumes */
    uint64_t tag;
    uint64_t branch;
    char name[FULL_NAME_BYTES];
    bool read_only;        /* its format has features this build can only read */
    bool served_read_only; /* clients may not write; commands may resize */
    bool importing; /* its header may say that an import is not complete */
    bool lost, closing, in_progress;
    unsigned refs;
    struct env_task free_task;
    struct env_task fail_task;
    bool free_posted, fail_posted;
    unsigned busy; /* requests under way */
    unsigned reads_first; /* reads that new writes wait for */
    unsigned fetches; /* loads under way, read-ahead too */
    uint64_t requests; /* counts requests, to tell an idle volume */
    uint64_t last_seq; /* of its records in the shard's log */
    struct header_record header;
    uint32_t block_size, block_shift;
    uint64_t size;
    struct codec codec;

    enum vol_ownership ownership;
    struct owner_record owner;
    uint8_t owner_bytes[RECORD_BYTES_MAX]; /* as stored: what every commit checks */
    size_t owner_len;
    struct key owner_key;
    struct acquire *acquire;
    struct release *release;
    struct state_record state; /* as of the newest committed generation */
    uint64_t view_epoch; /* 0: the volume itself; else it is a view of that snapshot */
    struct view *view;
    struct ancestry_record ancestry; /* of an owner: as stored; of a view: all its segments */
    uint64_t committed_epoch;        /* of an owner: snapshots up to this one are in the store */
    unsigned snapshots_unbuilt;      /* that generations hold */
    bool frozen;                     /* changes that are not begun wait */
    uint64_t freeze_token;
    struct env_timer freeze_timer;
    /* Of an owner. A snapshot is in it from when its generation was built (`history_changes` counts
     * that), because what is built after that must leave alone what it names. */
    struct history history;
    uint64_t history_changes;
    /* P: the newest live snapshot's epoch; 0: none. What the index drops of an epoch up to here, of
     * this branch, a snapshot may name. */
    uint64_t protected_epoch;
    /* Blocks up to here are its own or about to be (flatten.c), if that was begun when it had been
     * taken so often. */
    uint64_t flatten_upto, flatten_taken;
    /* Counts, from 1, how often somebody else was found to have changed the data while this process
     * did not own it: see struct vol_writer. */
    uint64_t lineage;
    uint64_t changed;          /* state.changed when it was last known here, if `changed_known` */
    bool changed_known;
    char changed_by[384];
    uint64_t times_taken;
    /* The owner key may name this session although the volume is not owned: it was taken for nobody, or
     * what became of that is not known yet. */
    bool may_be_ours;
    unsigned kept;             /* see volume_keep() */
    bool changed_before_taken; /* between the first request that wanted it, and its being taken */
    struct list parked;        /* requests that wait for ownership */
    char refusal[768];         /* see volume_refusal() */
    uint64_t refusal_told_ns;
    struct list watchers;
    void (*release_done)(struct volume *vol, void *arg);
    void *release_arg;
    struct mailbox *mailbox;
    void (*close_done)(void *arg);
    void *close_arg;
    struct list reopen; /* volume_opens that wait for the end of a close */

    struct list entries[ENTRY_LISTS]; /* blk.in_vol, see entries_of() */
    struct index index;
    bool rows_crowded; /* its level-1 rows have many versions: not to be read as ranges */
    struct list gens; /* oldest first; the last one is open */
    struct gen *open;
    uint64_t gen_next;
    uint64_t committed_gen;  /* all up to this one are in the store */
    uint64_t owed_gen; /* up to this one there are writes that were answered with an error */
    uint64_t n_ranges_unbuilt; /* ranges of generations that the index does not show yet */
    uint64_t n_ranges_uncommitted;
    unsigned gens_queued;
    bool replaying;
    uint64_t data_blocks; /* as of the newest built generation */
    struct cleaner *cleaner;

    struct {
        uint64_t next, window;
    } streams[4];
    unsigned stream_victim;
    struct volume_stats stats;
    struct volume_stats *closed; /* see struct volume_open */
    uint64_t cached_blocks;      /* entries with a buffer */
};

/* A read by the owner of the volume, for which what its own last commit left is new enough:
 * whatever generations have not committed yet, the layers above keep in memory. */
static inline struct store_read owner_read(const struct volume *vol)
{
    return (struct store_read){
        .own = true, .tag = vol->branch, .background = vol->shard->background};
}

static inline struct list *entries_of(struct volume *vol, uint64_t no)
{
    return &vol->entries[(no >> ENTRY_REGION_SHIFT) % ENTRY_LISTS];
}

/* --- shard.c --------------------------------------------------------------------- */

/* Something was given back (a commit, a sent reply): grant who waits, in order. */
void shard_wake_writers(struct shard *s);
void shard_wake_readers(struct shard *s);
/* Whether volumes may be taken and kept under this process's session: it holds, and there was no
 * other since `incarnation` (in: of the question's begin; s->incarnation where it begins now). */
bool shard_has_session(struct shard *s, uint64_t incarnation);
/* Makes sure that open generations are sealed when they are old enough. */
void shard_age_start(struct shard *s);
/* The lowest log record that a generation other than `done` (and older ones of its volume)
 * still needs. */
uint64_t shard_log_keep(struct shard *s, const struct gen *done);
/* Somebody waits for what commits give back: seals where nothing is on its way already (more
 * would only make generations small), unless the wait is for the store to make room. */
void shard_seal_for_room(struct shard *s);
/* The log can't be trusted any more: from here on writes are answered at their commit. */
void shard_log_gave_up(struct shard *s);
static inline bool shard_uses_log(const struct shard *s)
{
    return s->log && !s->log_failed;
}

/* --- volume.c -------------------------------------------------------------------- */

/* Answers `io` with `st` from the loop, not from inside the call. */
void io_finish_soon(struct volume *vol, struct vol_io *io, enum status st);
/* Bookkeeping around each request that may be under way for a while. */
void volume_begin_io(struct volume *vol, struct vol_io *io);
void volume_end_io(struct volume *vol, struct vol_io *io, enum status st);
/* Loses the volume for good: nothing is answered or committed any more (G4). */
void volume_lose(struct volume *vol, const char *why);
/* Loses all that the shard owns, because its session ended; tells how many that were. Volumes that
 * are being taken are not lost: they are taken under the next session. */
unsigned volume_lose_all(struct shard *s);
/* Drops all cached blocks and rows; everything is committed. */
void volume_drop_cache(struct volume *vol);
/* Something ended: goes on with a loss, a release or a close that waited for it. The volume
 * itself goes later, from the loop. */
void volume_progress(struct volume *vol);
/* Whether the header says that an import into it is not complete, which is for that import alone. */
bool volume_import_unfinished(const struct volume *vol, const struct header_record *h);
enum status volume_set_header(struct volume *vol, const struct header_record *h, struct err *e);
/* Answers all requests that wait for ownership or memory with ST_PERM. */
void volume_fail_waiting(struct volume *vol);
/* Answers what was parked, from the loop. */
void volume_fail_parked_soon(struct volume *vol);
void volume_tell_watchers(struct volume *vol, const char *why);

/* --- owner.c --------------------------------------------------------------------- */

/* Whether requests may go on. If not, `io` was parked: write_resume() gets it when the volume is
 * owned, or it is answered with an error. */
bool owner_ready(struct volume *vol, struct vol_io *io);
/* Whether `io`, a change, comes from a writer that may write; if not, it is told why. */
bool owner_lets_write(struct volume *vol, struct vol_io *io);
/* Before the volume goes: finds out whether the owner key names this session, and gives it back. */
void owner_settle(struct volume *vol);
/* The session of this process is in doubt no more: goes on with what was parked for that. */
void owner_resume(struct volume *vol);
/* Commits everything and gives the owner key back. */
void owner_release(struct volume *vol, void (*done)(struct volume *vol, void *arg), void *arg);
/* Goes on with a release where what it waited for is done. */
void owner_progress(struct volume *vol);
/* Whether nothing of it is under way that would come back to the volume. */
bool owner_quiet(const struct volume *vol);
/* Stops what can be stopped: the volume is lost or about to be freed. */
void owner_forget(struct volume *vol);

/* --- snapshot.c ------------------------------------------------------------------ */

/* A generation with a snapshot was built: what comes now belongs to the next epoch. */
void snapshot_built(struct gen *g);
/* Goes on with a change of the history that was parked. */
void snapshot_resume(struct volume *vol, struct vol_io *io);
/* Answers the one who asked for a snapshot. */
void snapshot_answer(struct vol_io *io, uint64_t epoch, enum status st);
/* Without resuming anything. */
void freeze_end(struct volume *vol);

/* --- view.c ---------------------------------------------------------------------- */

/* Whether the snapshot record that was read says that the view's snapshot is still there. */
bool view_stands(const struct store_get *get);
/* Watches the snapshot of a view that was just opened. */
void view_start(struct volume *vol);
/* Whether nothing is under way; then it may stop. */
bool view_quiet(const struct volume *vol);
void view_stop(struct volume *vol);

/* --- write.c --------------------------------------------------------------------- */

/* Goes on with a request that was parked until the volume was owned. */
void write_resume(struct volume *vol, struct vol_io *io);
/* Decides a waiting write, zero or trim: true when io->st says how; false: not yet. */
bool write_try_grant(struct volume *vol, struct vol_io *io);
/* Whether it takes no space in the store: it must not stand behind one that waits for some. */
bool write_needs_no_space(const struct vol_io *io);
static inline bool shard_lacks_space(const struct shard *s)
{
    return s->space_waiting || s->space_refused;
}
/* Goes on with one that was decided while it waited. */
void write_granted(struct volume *vol, struct vol_io *io);
/* Its log record survives the process: answers it, or syncs first (FUA). */
void write_logged(struct volume *vol, struct vol_io *io);
/* Brings a log record of a dead owner into the open generation. */
void write_replay(struct volume *vol, const struct store_log_record *rec);
/* Whether a new size is on its way to the store; one that was answered with an error may be. */
bool volume_is_resizing(const struct volume *vol);
/* Answers `io` when everything written so far has committed. */
void flush_by_commit(struct volume *vol, struct vol_io *io);

/* --- fetch.c --------------------------------------------------------------------- */

void fetch_resume(struct volume *vol, struct vol_io *io);
/* Starts a read that waited for memory; false: still none. */
bool fetch_try_grant(struct volume *vol, struct vol_io *io);
/* What the newest unbuilt range over `no` makes of it: SOURCE_ZERO, SOURCE_HOLE, or -1. */
int overlay_lookup(const struct volume *vol, uint64_t no);
/* Lays `base` (NULL: zeros) under the valid bytes of `e`, which is complete afterwards. Takes
 * over the reference to `base`. */
void blk_complete(struct volume *vol, struct blk *e, struct buf *base);

/* Takes the requests for which `late` holds away from what is loaded for them. */
void fetch_collect(struct shard *s, bool (*late)(const struct shard *s, const struct vol_io *io),
                   struct list *to);

/* --- extents.c ------------------------------------------------------------------- */

/* Goes on with a block status that was parked, or that waited for a commit. */
void extents_resume(struct volume *vol, struct vol_io *io);
/* Takes the requests for which `late` holds away from their walks. */
void extents_collect(struct shard *s, bool (*late)(const struct shard *s, const struct vol_io *io),
                     struct list *to);

/* --- timeout.c ------------------------------------------------------------------- */

/* Makes sure that time is counted while requests are under way. */
void timeout_start(struct shard *s);

/* --- generation.c ---------------------------------------------------------------- */

struct gen *gen_open(struct volume *vol);
/* Closes the open generation where it holds anything (or `force`), and starts the next. */
void gen_seal(struct volume *vol, bool force);
/* Tells whether a generation would change the store. */
bool gen_empty(const struct gen *g);
/* Links a changed entry into the open generation. With `io`, its buffer and its space in the
 * store are charged to the generation, out of what `io` holds, unless they are already. */
void gen_touch(struct volume *vol, struct blk *e, struct vol_io *io);
/* Takes it out again (a range covers it now). */
void gen_untouch(struct volume *vol, struct blk *e);
/* What the newest range that was built and is not committed makes of all blocks of a level-2
 * row (a source), and *epoch under which the row is then stored, if at all; or -1. Only for a row
 * that is not in memory: no other change is pending. */
int built_range_over(const struct volume *vol, uint64_t row2, uint64_t *epoch);
/* Whether nothing will come back to any generation; then, the volume being lost, they go. */
bool gen_all_quiet(const struct volume *vol);
void gen_free_all(struct volume *vol);
/* `io`, which waits for the commit, is answered with an error instead: if it wrote something,
 * no flush succeeds before that is in. */
void gen_owes(struct gen *g, const struct vol_io *io);
/* Answers the requests that wait for commits, because there will be none. */
void gen_fail_waiters(struct volume *vol);

/* Stores the level-1 or level-2 row as the volume's own with the open generation, although nothing
 * in it changes. */
void gen_adopt(struct volume *vol, unsigned level, uint64_t no);

/* --- flatten.c ------------------------------------------------------------------- */

/* Goes on with one that was parked until the volume was owned. */
void flatten_resume(struct volume *vol, struct vol_io *io);

/* --- weight.c -------------------------------------------------------------------- */

/* What a mutation counts for in a commit, as all the weights here do. */
uint64_t weight_of_mutation(const struct store_mutation *m);
/* The most that a request could add: a write of blocks [first, end); zeros over them, which
 * may write the first and the last one in part; n keys cleared. */
uint64_t weight_of_write(const struct volume *vol, uint64_t first, uint64_t end);
uint64_t weight_of_zeros(const struct volume *vol, uint64_t first, uint64_t end);
uint64_t weight_of_clears(uint64_t n);
/* A row of either level, with the level-2 row above it. */
uint64_t weight_of_row(const struct volume *vol);
/* A record beside those that any commit may have. */
uint64_t weight_of_record(void);
/* Zeros over more blocks than this need not fit one generation. */
uint64_t weight_zeros_max(const struct volume *vol);
/* What a request did add: a changed block, its contents, a range, n keys cleared. */
void weight_begin(struct gen *g);
void weight_touch(struct gen *g, uint64_t no);
void weight_data(struct gen *g, const struct blk *e);
void weight_range(struct gen *g, uint64_t first, uint64_t end);
void weight_clears(struct gen *g, uint64_t n);
/* Keys to reserve in the store for each block that is written: its own and, after a snapshot, those of
 * rows that have to be copied, as store_reservation counts them. */
uint64_t weight_keys_each(const struct volume *vol);
/* Before an operation takes effect that dirties up to `bytes` and adds up to `weight`: it must
 * fit into one generation (G3), so the open one is sealed where it would not. */
void gen_make_fit(struct volume *vol, uint64_t bytes, uint64_t weight);

/* --- replay.c -------------------------------------------------------------------- */

/* Brings the records of `vol->state.logs` into the volume and commits them. */
void replay_start(struct volume *vol, void (*done)(struct volume *vol, enum status st));

/* --- cleaner.c ------------------------------------------------------------------- */

/* To be called when there may be something to clear. `urgent`: somebody waits for space. True where
 * it has work. */
bool cleaner_kick(struct volume *vol, bool urgent);
/* A generation has committed: goes on with what waited for it. */
void cleaner_committed(struct volume *vol, struct gen *g);
/* Whether a read of it is under way. */
bool cleaner_busy(const struct volume *vol);
/* The volume is given back, lost or freed. To be called again once it is not busy. */
void cleaner_stop(struct volume *vol);

#endif
