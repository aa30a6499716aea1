/*
 * Writes, zeroes, trims and flushes: into the open generation and the log.
 *
 * A write first asks for what it may use up (memory, log room, space in the
 * store), so that once it took effect nothing it needs can be missing. Then it
 * takes effect in one go (G3) and is answered when its log record survives the
 * process, or at its commit where there is no log (G1).
 */
#include "volume/internal.h"

static const uint8_t zeros[BLOCK_SIZE_MAX];

static void zero_granted(struct volume *vol, struct vol_io *io);

static uint64_t last_block(const struct volume *vol, const struct vol_io *io)
{
    return (io->offset + io->length - 1) >> vol->block_shift;
}

/* Blocks whose buffers the request may need: all of a write's, the edges of a zero. */
static uint64_t blocks_needed(const struct volume *vol, const struct vol_io *io)
{
    uint64_t first = io->offset >> vol->block_shift;
    if (io->kind == IO_WRITE)
        return last_block(vol, io) - first + 1;
    uint64_t end = io->offset + io->length;
    uint64_t edges = (io->offset & (vol->block_size - 1)) != 0;
    if ((end & (vol->block_size - 1)) && end != vol->size)
        edges++;
    return edges;
}

static struct store_reservation space_for(const struct volume *vol, uint64_t blocks)
{
    return (struct store_reservation){
        .body_bytes = blocks * store_body_cost(vol->shard->store, vol->block_size),
        .keys = blocks * weight_keys_each(vol)};
}

static bool space_covers(struct store_reservation have, struct store_reservation want)
{
    return have.body_bytes >= want.body_bytes && have.keys >= want.keys;
}

static void space_move(struct store_reservation *from, struct store_reservation *to,
                       struct store_reservation what)
{
    CHECK(space_covers(*from, what));
    from->body_bytes -= what.body_bytes;
    from->keys -= what.keys;
    to->body_bytes += what.body_bytes;
    to->keys += what.keys;
}

/* More credit than this is given back to the store. */
#define CREDIT_BYTES_MAX (4ull << 20)

static void credit_trim(struct shard *s)
{
    if (s->credit.body_bytes > CREDIT_BYTES_MAX || s->space_waiting) {
        store_unreserve(s->store, s->credit);
        s->credit = (struct store_reservation){0, 0};
    }
}

static void space_answered(struct store_reserve_wait *wait, enum status st)
{
    struct shard *s = container_of(wait, struct shard, space_wait);
    s->space_waiting = false;
    if (st == ST_OK) {
        s->credit.body_bytes += wait->want.body_bytes;
        s->credit.keys += wait->want.keys;
    } else {
        s->space_refused = true;
    }
    shard_wake_writers(s);
}

/* Whether anything is on its way that may give space back. */
static bool space_may_come(struct shard *s)
{
    bool may = false;
    list_for_each_safe(l, next, &s->volumes)
    {
        struct volume *vol = container_of(l, struct volume, link);
        if (vol->ownership != VOL_OWNED)
            continue;
        if (!gen_empty(vol->open) || vol->gens_queued)
            may = true;
        if (cleaner_kick(vol, true))
            may = true;
    }
    return may;
}

/* Takes space for the request: 1 taken, 0 wait, -1 there is none. */
static int space_take(struct shard *s, struct vol_io *io, struct store_reservation want)
{
    if (space_covers(s->credit, want)) {
        space_move(&s->credit, &io->held_space, want);
        return 1;
    }
    if (store_reserve(s->store, want)) {
        io->held_space = want;
        return 1;
    }
    if (s->space_waiting)
        return 0;
    if (s->space_refused) {
        if (space_may_come(s))
            return 0;
        s->space_refused = false;
        return -1;
    }
    s->space_waiting = true;
    credit_trim(s);
    s->space_wait.want = want;
    s->space_wait.done = space_answered;
    store_reserve_wait(s->store, s->env, &s->space_wait);
    return 0;
}

bool write_try_grant(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    if (vol->lost || io->offset + io->length > vol->size) {
        io->st = vol->lost ? ST_PERM : ST_NOSPC;
        return true;
    }
    uint64_t blocks = blocks_needed(vol, io);
    uint64_t bytes = blocks << vol->block_shift;
    if (bytes && s->write_bytes && s->write_bytes + bytes > s->write_bytes_max)
        return false;
    if (vol->gens_queued >= GENERATIONS_QUEUED_MAX || vol->reads_first)
        return false;
    uint64_t record = 0;
    if (shard_uses_log(s)) {
        record = store_log_record_bytes(io->kind == IO_WRITE ? io->length : 0);
        if (s->log_held + record > store_log_room(s->log))
            return false;
    }
    if (blocks) {
        int space = space_take(s, io, space_for(vol, blocks));
        if (space < 0) {
            /* A trim goes on without its edges: what they hold may stay. */
            if (io->kind == IO_TRIM) {
                io->held_bytes = 0;
            } else {
                io->st = ST_NOSPC;
                return true;
            }
            bytes = 0;
        } else if (!space) {
            return false;
        }
    }
    s->write_bytes += bytes;
    io->held_bytes = bytes;
    io->held_keys_each = blocks ? (uint32_t)(io->held_space.keys / blocks) : 0;
    s->log_held += record;
    io->held_log = record;
    io->st = ST_OK;
    io->stage = IO_GRANTED;
    return true;
}

/* Gives back what the request held and its effect did not use. */
static void release_held(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    s->write_bytes -= io->held_bytes;
    s->log_held -= io->held_log;
    io->held_bytes = io->held_log = 0;
    space_move(&io->held_space, &s->credit, io->held_space);
    credit_trim(s);
}

bool write_needs_no_space(const struct vol_io *io)
{
    return io->kind != IO_WRITE && blocks_needed(io->vol, io) == 0;
}

/* The common begin: true when decided. */
static bool admit(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    CHECK(io->length > 0 && io->offset + io->length >= io->offset);
    bool read_only = vol->read_only || (vol->served_read_only && !(io->flags & IO_BY_COMMAND));
    if (read_only || io->offset + io->length > vol->size) {
        io->st = read_only ? ST_PERM : ST_NOSPC;
        return true;
    }
    if (!owner_lets_write(vol, io)) {
        io->st = ST_PERM;
        return true;
    }
    bool ahead = shard_lacks_space(s) && write_needs_no_space(io);
    if ((ahead || list_empty(&s->write_waiters)) && write_try_grant(vol, io))
        return true;
    io->stage = IO_WAITING;
    list_add_tail(&s->write_waiters, &io->link);
    shard_seal_for_room(s);
    return false;
}

bool volume_write_begin(struct volume *vol, struct vol_io *io)
{
    CHECK(io->length <= VOLUME_PIECE_BYTES);
    io->kind = IO_WRITE;
    volume_begin_io(vol, io);
    if (!owner_ready(vol, io))
        return false;
    if (!admit(vol, io))
        return false;
    if (io->st != ST_OK) {
        io->vol = NULL;
        vol->busy--;
    }
    return true;
}

void write_granted(struct volume *vol, struct vol_io *io)
{
    if (io->kind == IO_WRITE) {
        bool refused = io->st != ST_OK;
        if (refused) {
            io->vol = NULL;
            vol->busy--;
        }
        io->granted(io); /* who is refused may free it */
        if (refused)
            volume_progress(vol);
    } else if (io->st != ST_OK) {
        volume_end_io(vol, io, io->st);
    } else {
        zero_granted(vol, io);
    }
}

void volume_write_buffers(struct volume *vol, struct vol_io *io)
{
    CHECK(io->stage == IO_GRANTED);
    uint32_t mask = vol->block_size - 1;
    uint64_t left = io->length;
    uint32_t lo = (uint32_t)(io->offset & mask);
    io->n_segs = 0;
    while (left) {
        CHECK(io->n_segs < io->segs_cap);
        uint32_t len = (uint32_t)min_u64(vol->block_size - lo, left);
        io->segs[io->n_segs++] = (struct vol_seg){
            .buf = blocks_buf(&vol->shard->blocks, vol->block_size), .offset = lo, .len = len};
        left -= len;
        lo = 0;
    }
}

void volume_release_segs(struct vol_io *io)
{
    for (uint32_t i = 0; i < io->n_segs; i++)
        if (io->segs[i].buf)
            buf_unref(io->segs[i].buf);
    io->n_segs = 0;
}

void volume_write_abort(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    if (io->stage == IO_WAITING || io->stage == IO_PARKED)
        list_remove(&io->link);
    volume_release_segs(io);
    release_held(vol, io);
    io->stage = IO_IDLE;
    io->vol = NULL;
    vol->busy--;
    if (!list_empty(&s->write_waiters))
        shard_wake_writers(s);
    volume_progress(vol);
}

/* An entry for a block about to change, which knows at least what no load can tell better. */
static struct blk *entry_to_change(struct volume *vol, uint64_t no)
{
    struct blocks *t = &vol->shard->blocks;
    struct blk *e = blocks_find(t, vol->tag, no);
    if (e)
        return e;
    e = blocks_add(t, vol, vol->tag, no, entries_of(vol, no));
    if (overlay_lookup(vol, no) >= 0)
        e->zero = e->full = true;
    return e;
}

static void entry_full(struct blk *e)
{
    e->full = true;
    e->bad_base = false;
    mask_free(&e->mask);
}

/* Puts the bytes [lo, hi) of a block into the cache. They come from `src`, or lie already at
 * their place in `fresh`. `fresh` (may be NULL) becomes the block's buffer where that
 * saves a copy. A buffer somebody else refers to is never written. */
static void apply_bytes(struct volume *vol, struct vol_io *io, uint64_t no, uint32_t lo,
                        uint32_t hi, const uint8_t *src, struct buf *fresh)
{
    struct blocks *t = &vol->shard->blocks;
    uint32_t size = vol->block_size;
    struct blk *e = entry_to_change(vol, no);
    bool whole = lo == 0 && hi == size;

    if (!whole && e->buf && e->buf->refs == 1) {
        memcpy(e->buf->data + lo, src ? src : fresh->data + lo, hi - lo);
    } else {
        struct buf *old = e->buf;
        struct buf *b;
        if (whole && src && old && old->refs == 1)
            b = buf_ref(old);
        else
            b = fresh ? buf_ref(fresh) : blocks_buf(t, size);
        if (src)
            memcpy(b->data + lo, src, hi - lo);
        if (!whole && (e->zero || !old)) {
            /* Bytes outside the mask never leave, but a mask may be filled in later. */
            memset(b->data, 0, lo);
            memset(b->data + hi, 0, size - hi);
        } else if (!whole) {
            memcpy(b->data, old->data, lo);
            memcpy(b->data + hi, old->data + hi, size - hi);
        }
        if (old)
            buf_unref(old);
        else
            vol->cached_blocks++;
        e->buf = b;
    }
    e->zero = e->hole = false;
    if (whole) {
        entry_full(e);
    } else if (!e->full) {
        mask_add(&e->mask, size, lo, hi);
        uint64_t end = (no + 1) << vol->block_shift;
        if (end > vol->size) {
            /* What lies behind the end of the volume is zeros, stored as such. */
            uint32_t tail = (uint32_t)(vol->size & (size - 1));
            if (!mask_covers(&e->mask, tail, size)) {
                memset(e->buf->data + tail, 0, size - tail);
                mask_add(&e->mask, size, tail, size);
            }
        }
        if (mask_full(&e->mask, size))
            entry_full(e);
    }
    gen_touch(vol, e, io);
}

static void zero_entry(struct blk *e, bool hole)
{
    if (e->buf) {
        buf_unref(e->buf);
        e->buf = NULL;
        e->vol->cached_blocks--;
    }
    e->zero = true;
    e->hole = hole;
    entry_full(e);
}

static void zero_part(struct volume *vol, struct vol_io *io, uint64_t no, uint32_t lo, uint32_t hi,
                      bool hole)
{
    struct blk *e = entry_to_change(vol, no);
    if (!e->zero) {
        apply_bytes(vol, io, no, lo, hi, zeros, NULL);
        return;
    }
    /* Zeros already; but what is not to be a hole has to become allocated. */
    if (!hole)
        e->hole = false;
    gen_touch(vol, e, NULL);
}

/* All of [first, end) becomes zeros by one line in the generation. */
static void zero_range(struct volume *vol, uint64_t first, uint64_t end, bool hole)
{
    uint64_t regions = ((end - 1) >> ENTRY_REGION_SHIFT) - (first >> ENTRY_REGION_SHIFT) + 1;
    for (uint64_t i = 0; i < regions && i < ENTRY_LISTS; i++) {
        list_for_each_safe(l, next, entries_of(vol, first + (i << ENTRY_REGION_SHIFT)))
        {
            struct blk *e = container_of(l, struct blk, in_vol);
            if (e->no < first || e->no >= end)
                continue;
            gen_untouch(vol, e);
            /* The range speaks for it from now on; only whoever is at work on it needs it. */
            if (e->pins || e->fetching || !list_empty(&e->waiters))
                zero_entry(e, hole);
            else
                blocks_drop(&vol->shard->blocks, e);
        }
    }
    struct gen *g = vol->open;
    uint8_t kind = hole ? SOURCE_HOLE : SOURCE_ZERO;
    weight_range(g, first, end);
    if (g->n_ranges && g->ranges[g->n_ranges - 1].end == first &&
        g->ranges[g->n_ranges - 1].kind == kind) {
        g->ranges[g->n_ranges - 1].end = end;
        return;
    }
    mem_grow(&g->ranges, &g->cap_ranges, g->n_ranges + 1, sizeof *g->ranges);
    g->ranges[g->n_ranges++] = (struct gen_range){first, end, kind};
    vol->n_ranges_unbuilt++;
    vol->n_ranges_uncommitted++;
    if (g->n_ranges == 1 && !g->opened_ns)
        g->opened_ns = env_now_ns(vol->shard->env);
    shard_age_start(vol->shard);
}

/* Zeroes bytes; `edges`: also those of blocks covered in part. */
static void apply_zeros(struct volume *vol, struct vol_io *io, uint64_t offset, uint64_t length,
                        bool hole, bool edges)
{
    uint32_t in_block = vol->block_size - 1;
    uint64_t end = offset + length;
    uint64_t first = offset >> vol->block_shift;
    uint64_t last = end >> vol->block_shift;
    uint32_t lo = (uint32_t)(offset & in_block), hi = (uint32_t)(end & in_block);

    if (hi && end == vol->size) {
        /* The last block ends with the volume. */
        hi = 0;
        last++;
    }
    if (lo && first == last) {
        if (edges)
            zero_part(vol, io, first, lo, hi, hole);
        return;
    }
    if (lo) {
        if (edges)
            zero_part(vol, io, first, lo, vol->block_size, hole);
        first++;
    }
    if (hi && edges)
        zero_part(vol, io, last, 0, hi, hole);
    if (last <= first)
        return;
    if (last - first <= TRIM_EACH_MAX) {
        for (uint64_t no = first; no < last; no++) {
            struct blk *e = entry_to_change(vol, no);
            zero_entry(e, hole);
            gen_touch(vol, e, NULL);
        }
    } else {
        zero_range(vol, first, last, hole);
    }
}

/* The same in as many generations as it takes: one, short of petabytes. Cut at whole pieces of
 * 4 MiB (G3), counted from the first whole block. `io` NULL: replayed, or for a resize. */
static void zeros_in_pieces(struct volume *vol, struct vol_io *io, uint64_t offset,
                            uint64_t length, bool hole, bool edges)
{
    uint64_t blocks_max = weight_zeros_max(vol);
    uint64_t bytes_max =
        blocks_max > UINT64_MAX >> vol->block_shift ? UINT64_MAX : blocks_max << vol->block_shift;
    do {
        uint64_t len = length;
        if (len > bytes_max) {
            uint64_t lead = -offset & (vol->block_size - 1);
            len = lead + (bytes_max - vol->block_size) / VOLUME_PIECE_BYTES * VOLUME_PIECE_BYTES;
        }
        uint64_t first = offset >> vol->block_shift;
        uint64_t end = ((offset + len - 1) >> vol->block_shift) + 1;
        gen_make_fit(vol, io ? io->held_bytes : 0, weight_of_zeros(vol, first, end));
        vol->open->has_changes |= io || vol->replaying;
        apply_zeros(vol, io, offset, len, hole, edges);
        offset += len;
        length -= len;
    } while (length);
}

/* Stored form of a record's meta (docs/format.md): kind, flags, offset, length. */
#define META_HOLE 1u
#define META_EDGES 2u

static void record_meta(uint8_t meta[32], uint8_t kind, uint8_t flags, const struct vol_io *io)
{
    memset(meta, 0, 32);
    meta[0] = kind;
    meta[1] = flags;
    put_le64(meta + 8, io->offset);
    put_le64(meta + 16, io->length);
}

static void log_op(struct volume *vol, struct vol_io *io, uint8_t kind, uint8_t flags,
                   const struct iovec *iov, int n_iov, uint32_t payload)
{
    struct shard *s = vol->shard;
    struct gen *g = vol->open;
    if (!shard_uses_log(s)) {
        list_add_tail(&g->waiters, &io->link);
        return;
    }
    uint8_t meta[32];
    record_meta(meta, kind, flags, io);
    uint64_t seq = store_log_append(s->log, vol->branch, meta, iov, n_iov, payload);
    if (!g->first_seq)
        g->first_seq = seq;
    g->last_seq = vol->last_seq = seq;
    s->log_dirty = true;
    io->stage = IO_LOGGED;
    list_add_tail(&s->submitted, &io->link);
}

/* So much of blocks that lie close together is worth a commit: a larger one would not change
 * fewer pages of the index, and the log has room for several, so that one fills and one is
 * encoded while one commits. */
#define SEAL_DENSE_BYTES (16u << 20)
#define DENSE_BLOCKS_PER_ROW (INDEX_FANOUT / 4)

static bool dense_enough(const struct volume *vol)
{
    const struct gen *g = vol->open;
    return g->dirty_bytes >= SEAL_DENSE_BYTES && vol->gens_queued < 2 &&
           g->n_dirty >= (uint64_t)g->n_rows1 * DENSE_BLOCKS_PER_ROW;
}

/* Behind it: stores without a log commit as soon as they can (at the end of the batch), the
 * others when a generation is full, or dense, or old, or when half of the log is in use. */
static void operation_done(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    release_held(vol, io);
    s->seal_wanted |= !shard_uses_log(s);
    /* A full one is prepared and encoded while the one before commits. */
    if (vol->open->dirty_bytes >= s->generation_bytes_max ||
        (shard_uses_log(s) &&
         (dense_enough(vol) || (!vol->gens_queued && store_log_room(s->log) <
                                                         store_log_capacity(s->log) / 2))))
        gen_seal(vol, false);
}

void volume_write_commit(struct volume *vol, struct vol_io *io, const void *data)
{
    CHECK(io->stage == IO_GRANTED && io->vol == vol && (data || io->n_segs));
    struct iovec iov[VOLUME_PIECE_BYTES / BLOCK_SIZE_MIN + 2];
    int n_iov = 0;
    const uint8_t *src = data;
    uint64_t no = io->offset >> vol->block_shift;
    uint32_t lo = (uint32_t)(io->offset & (vol->block_size - 1));
    uint64_t left = io->length;

    /* Until now it waited for its client. */
    io->tick = vol->shard->tick;
    if (vol->lost || io->offset + io->length > vol->size) {
        /* Lost, or made smaller, while the payload was on its way. */
        volume_release_segs(io);
        release_held(vol, io);
        io_finish_soon(vol, io, vol->lost ? ST_PERM : ST_NOSPC);
        return;
    }
    gen_make_fit(vol, io->held_bytes, weight_of_write(vol, no, last_block(vol, io) + 1));
    vol->open->has_changes = true;
    if (data)
        iov[n_iov++] = (struct iovec){.iov_base = (void *)(uintptr_t)data, .iov_len = io->length};
    for (uint32_t i = 0; left; i++, no++) {
        uint32_t len = (uint32_t)min_u64(vol->block_size - lo, left);
        struct buf *fresh = NULL;
        if (!data) {
            CHECK(i < io->n_segs && io->segs[i].len == len && io->segs[i].offset == lo);
            fresh = io->segs[i].buf;
            iov[n_iov++] = (struct iovec){.iov_base = fresh->data + lo, .iov_len = len};
        }
        apply_bytes(vol, io, no, lo, lo + len, src, fresh);
        if (src)
            src += len;
        left -= len;
        lo = 0;
    }
    log_op(vol, io, RECORD_WRITE, 0, iov, n_iov, (uint32_t)io->length);
    if (io->stage != IO_LOGGED)
        volume_release_segs(io);
    operation_done(vol, io);
}

/* Whether it covers a block as a whole, where one that ends with the volume counts. */
static bool covers_a_block(const struct volume *vol, const struct vol_io *io)
{
    return last_block(vol, io) - (io->offset >> vol->block_shift) + 1 > blocks_needed(vol, io);
}

static void zero_granted(struct volume *vol, struct vol_io *io)
{
    bool hole = !(io->flags & VOL_NO_HOLE);
    bool edges = io->held_bytes != 0 || blocks_needed(vol, io) == 0;
    if (!edges && !covers_a_block(vol, io)) {
        /* It changes nothing. A commit of nothing would be one more that all who wait for space
         * wait for first, since a commit may give some. */
        release_held(vol, io);
        io_finish_soon(vol, io, ST_OK);
        return;
    }
    zeros_in_pieces(vol, io, io->offset, io->length, hole, edges);
    log_op(vol, io, io->kind == IO_TRIM ? RECORD_TRIM : RECORD_ZERO,
           (uint8_t)((hole ? META_HOLE : 0) | (edges ? META_EDGES : 0)), NULL, 0, 0);
    operation_done(vol, io);
}

static void zero_begin(struct volume *vol, struct vol_io *io)
{
    if (!admit(vol, io))
        return;
    if (io->st != ST_OK)
        io_finish_soon(vol, io, io->st);
    else
        zero_granted(vol, io);
}

void volume_zero(struct volume *vol, struct vol_io *io)
{
    io->kind = IO_ZERO;
    volume_begin_io(vol, io);
    if (owner_ready(vol, io))
        zero_begin(vol, io);
}

void volume_trim(struct volume *vol, struct vol_io *io)
{
    io->kind = IO_TRIM;
    io->flags &= ~(uint32_t)VOL_NO_HOLE;
    volume_begin_io(vol, io);
    if (owner_ready(vol, io))
        zero_begin(vol, io);
}

static void fua_synced(struct store_log_sync *sync, enum status st)
{
    struct vol_io *io = container_of(sync, struct vol_io, sync);
    struct volume *vol = io->vol;
    struct shard *s = vol->shard;
    if (st == ST_OK) {
        s->log_synced_seq = max_u64(s->log_synced_seq, io->sync_upto);
        volume_end_io(vol, io, vol->lost ? ST_PERM : ST_OK);
    } else {
        /* The kernel may have dropped what it could not write, so the log proves nothing
         * any more; the data is still here and goes the other way. */
        shard_log_gave_up(s);
        flush_by_commit(vol, io);
    }
}

static void log_sync(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    io->sync_upto = s->log_submitted_seq;
    io->sync.done = fua_synced;
    store_log_sync(s->log, &io->sync);
}

void write_logged(struct volume *vol, struct vol_io *io)
{
    volume_release_segs(io);
    if (io->flags & VOL_FUA)
        log_sync(vol, io);
    else
        volume_end_io(vol, io, vol->lost ? ST_PERM : ST_OK);
}

void flush_by_commit(struct volume *vol, struct vol_io *io)
{
    if (vol->lost) {
        io_finish_soon(vol, io, ST_PERM);
        return;
    }
    gen_seal(vol, false);
    struct list *l = vol->gens.prev; /* the open one */
    if (l->prev == &vol->gens) {
        io_finish_soon(vol, io, vol->lost ? ST_PERM : ST_OK);
        return;
    }
    list_add_tail(&container_of(l->prev, struct gen, link)->waiters, &io->link);
}

/* Without a log what was answered is committed. But what was answered with an error has to be
 * in before a flush may succeed. */
static void flush_without_log(struct volume *vol, struct vol_io *io)
{
    list_for_each(l, &vol->gens)
    {
        struct gen *g = container_of(l, struct gen, link);
        if (g->no == vol->owed_gen) {
            list_add_tail(&g->waiters, &io->link);
            return;
        }
    }
    io_finish_soon(vol, io, vol->lost ? ST_PERM : ST_OK);
}

static void flush_begin(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    if (io->kind == IO_FLUSH && !s->log)
        flush_without_log(vol, io);
    else if (io->kind == IO_SYNC || !shard_uses_log(s))
        flush_by_commit(vol, io);
    else if (vol->last_seq < s->log_synced_seq || (gen_empty(vol->open) && !vol->gens_queued))
        io_finish_soon(vol, io, ST_OK);
    else
        log_sync(vol, io);
}

void volume_flush(struct volume *vol, struct vol_io *io)
{
    io->kind = IO_FLUSH;
    volume_begin_io(vol, io);
    if (vol->ownership == VOL_UNOWNED && !vol->lost)
        io_finish_soon(vol, io, ST_OK); /* what was answered was committed when it was given back */
    else if (owner_ready(vol, io))
        flush_begin(vol, io);
}

void volume_sync(struct volume *vol, struct vol_io *io)
{
    io->kind = IO_SYNC;
    volume_begin_io(vol, io);
    if (owner_ready(vol, io))
        flush_begin(vol, io);
}

bool volume_is_resizing(const struct volume *vol)
{
    bool resizing = vol->header.size != vol->size;
    list_for_each(l, &vol->gens)
        resizing |= container_of(l, struct gen, link)->new_size != 0;
    return resizing;
}

static void resize_begin(struct volume *vol, struct vol_io *io)
{
    if (vol->read_only || io->new_size == 0 || io->new_size % 512) {
        io_finish_soon(vol, io, vol->read_only ? ST_PERM : ST_INVAL);
        return;
    }
    if (volume_is_resizing(vol)) {
        io_finish_soon(vol, io, ST_BUSY);
        return;
    }
    gen_seal(vol, false);
    if (io->new_size < vol->size) {
        /* The cut-off part reads as zeros should the volume grow again. */
        zeros_in_pieces(vol, NULL, io->new_size, vol->size - io->new_size, true, true);
        vol->size = io->new_size;
    }
    vol->open->new_size = io->new_size;
    vol->open->force = true;
    list_add_tail(&vol->open->waiters, &io->link);
    gen_seal(vol, true);
}

void volume_resize(struct volume *vol, struct vol_io *io, uint64_t size, bool shrink)
{
    io->kind = IO_RESIZE;
    io->new_size = size;
    volume_begin_io(vol, io);
    if (size < vol->size && !shrink)
        io_finish_soon(vol, io, ST_INVAL);
    else if (owner_ready(vol, io))
        resize_begin(vol, io);
}

void write_resume(struct volume *vol, struct vol_io *io)
{
    switch (io->kind) {
    case IO_WRITE:
        if (admit(vol, io))
            write_granted(vol, io);
        break;
    case IO_ZERO:
    case IO_TRIM:
        zero_begin(vol, io);
        break;
    case IO_FLUSH:
    case IO_SYNC:
        flush_begin(vol, io);
        break;
    case IO_RESIZE:
        resize_begin(vol, io);
        break;
    case IO_SNAPSHOT:
    case IO_SNAPSHOT_REMOVE:
    case IO_SNAPSHOT_RENAME:
        snapshot_resume(vol, io);
        break;
    case IO_FLATTEN:
        flatten_resume(vol, io);
        break;
    default:
        fetch_resume(vol, io);
    }
}

/* The generation that holds the end of a record says how far the log is applied. */
static void replay_reached(struct volume *vol, const struct store_log_record *rec)
{
    vol->open->replayed_seq = rec->seq;
    vol->open->force = true;
}

void write_replay(struct volume *vol, const struct store_log_record *rec)
{
    uint8_t kind = rec->meta[0], flags = rec->meta[1];
    uint64_t offset = get_le64(rec->meta + 8), length = get_le64(rec->meta + 16);

    if (!length || offset + length < offset || offset + length > vol->size ||
        (kind == RECORD_WRITE && length != rec->payload_len)) {
        log_volume_error(vol->name,
                         "volume %s: log record %llu does not fit the volume: left out",
                         vol->name, (unsigned long long)rec->seq);
        replay_reached(vol, rec);
        return;
    }
    if (kind != RECORD_WRITE) {
        zeros_in_pieces(vol, NULL, offset, length, flags & META_HOLE, flags & META_EDGES);
        replay_reached(vol, rec);
        return;
    }
    const uint8_t *src = rec->payload;
    uint64_t no = offset >> vol->block_shift;
    uint64_t end_no = ((offset + length - 1) >> vol->block_shift) + 1;
    uint32_t lo = (uint32_t)(offset & (vol->block_size - 1));
    gen_make_fit(vol, (end_no - no) << vol->block_shift, weight_of_write(vol, no, end_no));
    vol->open->has_changes = true;
    while (length) {
        uint32_t len = (uint32_t)min_u64(vol->block_size - lo, length);
        apply_bytes(vol, NULL, no++, lo, lo + len, src, NULL);
        src += len;
        length -= len;
        lo = 0;
    }
    replay_reached(vol, rec);
}
