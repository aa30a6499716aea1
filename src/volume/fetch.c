/*
 * Reads: from the cache where it can, else one load for all that a request
 * misses.
 */
#include <stdlib.h>

#include "volume/internal.h"

#define AHEAD_MIN (128u << 10)
#define AHEAD_MAX (1u << 20)

struct fetch_block {
    struct blk *e;
    struct fetch *fetch;
    struct list wait; /* in e->waiters, where another fetch loads it */
    struct buf *buf;
    struct key key;
    struct block_place place;
    struct slice mask;
    uint32_t get;
    bool wanted, ok;
};

struct fetch {
    struct volume *vol;
    struct vol_io *io; /* NULL: read-ahead, or nobody waits for it any more */
    struct list link;  /* in shard->fetches where `io` */
    uint64_t first, end; /* blocks */
    struct row_wait row_wait;
    struct store_read read;
    struct store_get *gets;
    unsigned pending;
    bool looked_up;
    struct fetch_block block[];
};

static void fetch_run(struct fetch *f);
static void fetch_finish(struct fetch *f);

int overlay_lookup(const struct volume *vol, uint64_t no)
{
    if (!vol->n_ranges_unbuilt)
        return -1;
    for (struct list *l = vol->gens.prev; l != &vol->gens; l = l->prev) {
        const struct gen *g = container_of(l, struct gen, link);
        if (g->stage >= GEN_BUILT)
            break;
        for (size_t i = g->n_ranges; i > 0; i--)
            if (no >= g->ranges[i - 1].first && no < g->ranges[i - 1].end)
                return g->ranges[i - 1].kind;
    }
    return -1;
}

void blk_complete(struct volume *vol, struct blk *e, struct buf *base)
{
    if (e->full) {
        if (base)
            buf_unref(base);
        return;
    }
    if (e->buf) {
        mask_fill_rest(&e->mask, vol->block_size, e->buf->data, base ? base->data : NULL);
        if (base)
            buf_unref(base);
    } else if (base) {
        e->buf = base;
        vol->cached_blocks++;
    } else {
        e->zero = true;
    }
    e->full = true;
    e->bad_base = false;
    mask_free(&e->mask);
}

/* Without a log nothing is shown that is not committed yet: the newest generation that has to
 * commit before [first, end) may be read, or NULL. */
static struct gen *must_commit_first(struct volume *vol, uint64_t first, uint64_t end)
{
    uint64_t newest = 0;
    if (shard_uses_log(vol->shard))
        return NULL;
    for (uint64_t no = first; no < end; no++) {
        const struct blk *e = blocks_find(&vol->shard->blocks, vol->tag, no);
        if (e && e->gen > newest)
            newest = e->gen;
    }
    for (struct list *l = vol->gens.prev; l != &vol->gens; l = l->prev) {
        struct gen *g = container_of(l, struct gen, link);
        if (g->no == newest)
            return g;
        for (size_t i = 0; i < g->n_ranges; i++)
            if (g->ranges[i].first < end && first < g->ranges[i].end)
                return g;
    }
    return NULL;
}

/* When it has committed, newer writes may be there already. A read that met that before keeps
 * further ones from being granted, so that it comes to its turn: those granted are few. */
static void wait_for_commit(struct volume *vol, struct gen *g, struct vol_io *io)
{
    if (!io->first && ++io->commits_waited >= READ_COMMITS_MAX) {
        io->first = true;
        vol->reads_first++;
    }
    list_add_tail(&g->waiters, &io->link);
    /* At the end of the batch, as for writes: what came together commits together. */
    if (g->stage == GEN_OPEN && !vol->gens_queued)
        vol->shard->seal_wanted = true;
}

/* --- the way of cached blocks -------------------------------------------------------- */

static void ahead_hit(struct volume *vol, struct blk *e);
static void ahead_miss(struct volume *vol, uint64_t offset, uint64_t length);

/* Whether a range that is not committed yet lies over one of the blocks. */
static bool range_uncommitted(const struct volume *vol, uint64_t first, uint64_t end)
{
    if (!vol->n_ranges_uncommitted)
        return false;
    list_for_each(l, &vol->gens)
    {
        const struct gen *g = container_of(l, struct gen, link);
        for (size_t i = 0; i < g->n_ranges; i++)
            if (g->ranges[i].first < end && first < g->ranges[i].end)
                return true;
    }
    return false;
}

/* Fills io->segs from the cache; false at the first byte that is not there or, with
 * `committed`, at the first block that changed since the last commit. */
static bool segs_from_cache(struct volume *vol, struct vol_io *io, bool committed)
{
    const struct blocks *t = &vol->shard->blocks;
    uint32_t size = vol->block_size;
    uint64_t no = io->offset >> vol->block_shift;
    uint32_t lo = (uint32_t)(io->offset & (size - 1));
    uint64_t left = io->length;
    io->n_segs = 0;
    while (left) {
        uint32_t len = (uint32_t)min_u64(size - lo, left);
        struct blk *e = blocks_find(t, vol->tag, no);
        if (!e || (committed && e->gen) || !blk_has(e, lo, lo + len)) {
            volume_release_segs(io);
            return false;
        }
        if (e->freq < 3)
            e->freq++;
        if (e->ahead)
            ahead_hit(vol, e);
        CHECK(io->n_segs < io->segs_cap);
        io->segs[io->n_segs++] =
            (struct vol_seg){.buf = e->zero ? NULL : buf_ref(e->buf), .offset = lo, .len = len};
        left -= len;
        lo = 0;
        no++;
    }
    return true;
}

void volume_warm(const struct volume *vol, const uint64_t *offsets, uint32_t n)
{
    const struct blocks *t = &vol->shard->blocks;
    struct blk **slots[VOLUME_WARM_MAX], *e[VOLUME_WARM_MAX];
    CHECK(n <= VOLUME_WARM_MAX);
    for (uint32_t i = 0; i < n; i++) {
        slots[i] = &t->table[blocks_hash(vol->tag, offsets[i] >> vol->block_shift) & t->table_mask];
        __builtin_prefetch(slots[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        e[i] = *slots[i];
        if (e[i]) {
            __builtin_prefetch(e[i]);
            __builtin_prefetch(&e[i]->freq, 1);
        }
    }
    for (uint32_t i = 0; i < n; i++)
        if (e[i] && e[i]->buf)
            __builtin_prefetch(e[i]->buf, 1);
    for (uint32_t i = 0; i < n; i++)
        if (e[i] && e[i]->buf) /* the copy into the socket begins there */
            __builtin_prefetch(e[i]->buf->data + (offsets[i] & (vol->block_size - 1)));
}

static void read_begin(struct volume *vol, struct vol_io *io);

bool volume_read(struct volume *vol, struct vol_io *io)
{
    CHECK(io->length > 0 && io->length <= VOLUME_READ_BYTES_MAX);
    /* Without a log nothing may be shown that could still vanish. */
    bool committed = !shard_uses_log(vol->shard);
    if (volume_is_owned(vol) &&
        io->offset + io->length <= vol->size &&
        !(committed &&
          range_uncommitted(vol, io->offset >> vol->block_shift,
                            ((io->offset + io->length - 1) >> vol->block_shift) + 1)) &&
        segs_from_cache(vol, io, committed)) {
        vol->stats.cache_hits++;
        io->st = ST_OK;
        return true;
    }
    io->kind = IO_READ;
    io->n_segs = 0;
    vol->stats.cache_misses++;
    volume_begin_io(vol, io);
    if (!owner_ready(vol, io))
        return false;
    uint64_t offset = io->offset, length = io->length;
    io->stage = IO_STARTING;
    read_begin(vol, io);
    bool finished = io->stage == IO_FINISHED;
    if (io->stage == IO_STARTING)
        io->stage = IO_IDLE;
    ahead_miss(vol, offset, length);
    return finished;
}

/* --- misses -------------------------------------------------------------------------- */

static void rows_came(struct row_wait *wait)
{
    fetch_run(container_of(wait, struct fetch, row_wait));
}

static struct fetch *fetch_new(struct volume *vol, struct vol_io *io, uint64_t first, uint64_t end)
{
    struct fetch *f = mem_zalloc(sizeof *f + (end - first) * sizeof f->block[0]);
    f->vol = vol;
    f->io = io;
    f->first = first;
    f->end = end;
    f->row_wait.ready = rows_came;
    vol->shard->read_bytes += (end - first) << vol->block_shift;
    vol->fetches++;
    list_init(&f->link);
    if (io)
        list_add_tail(&vol->shard->fetches, &f->link);
    return f;
}

bool fetch_try_grant(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    uint64_t first = io->offset >> vol->block_shift;
    uint64_t end = ((io->offset + io->length - 1) >> vol->block_shift) + 1;
    if (s->read_bytes && s->read_bytes + ((end - first) << vol->block_shift) > s->read_bytes_max)
        return false;
    if (io->stage == IO_WAITING)
        list_remove(&io->link);
    if (io->stage != IO_STARTING)
        io->stage = IO_GRANTED;
    fetch_run(fetch_new(vol, io, first, end));
    return true;
}

static void read_begin(struct volume *vol, struct vol_io *io)
{
    struct shard *s = vol->shard;
    if (io->offset + io->length > vol->size) {
        io_finish_soon(vol, io, ST_INVAL);
        return;
    }
    uint64_t first = io->offset >> vol->block_shift;
    uint64_t end = ((io->offset + io->length - 1) >> vol->block_shift) + 1;
    struct gen *g = must_commit_first(vol, first, end);
    if (g) {
        wait_for_commit(vol, g, io);
        return;
    }
    if (list_empty(&s->read_waiters) && fetch_try_grant(vol, io))
        return;
    io->stage = IO_WAITING;
    list_add_tail(&s->read_waiters, &io->link);
}

static void fetch_digest(struct store_read *read)
{
    struct fetch *f = container_of(read, struct fetch, read);
    uint32_t size = f->vol->block_size;
    for (uint64_t i = 0; i < f->end - f->first; i++) {
        struct fetch_block *b = &f->block[i];
        if (!b->wanted)
            continue;
        const struct store_get *get = &f->gets[b->get];
        b->ok = get->st == ST_OK && block_decode(&b->place, get->head, b->buf->data,
                                                 get->body_len, size, &b->mask);
    }
}

static void wake_waiters(struct blk *e)
{
    struct list *l;
    while ((l = list_pop(&e->waiters))) {
        struct fetch *f = container_of(l, struct fetch_block, wait)->fetch;
        if (--f->pending == 0)
            fetch_finish(f);
    }
}

/* A base that could not be read, or is itself stored with lost bytes. */
static void base_damaged(struct volume *vol, struct blk *e, struct fetch_block *b)
{
    struct mask had;
    if (!b->ok || !mask_decode(&had, vol->block_size, b->mask)) {
        /* Nothing is remembered of it: it may read the next time. Where the block was written
         * in part, its generation decides what is lost. */
        buf_unref(b->buf);
        return;
    }
    e->bad_base = true;
    if (e->buf) {
        mask_merge(&e->mask, vol->block_size, e->buf->data, b->buf->data, &had);
        mask_free(&had);
        buf_unref(b->buf);
    } else {
        e->buf = b->buf;
        vol->cached_blocks++;
        e->mask = had;
    }
    if (mask_full(&e->mask, vol->block_size))
        blk_complete(vol, e, NULL);
}

static void fetch_read(struct store_read *read, enum status st)
{
    struct fetch *f = container_of(read, struct fetch, read);
    struct volume *vol = f->vol;
    for (uint64_t i = 0; i < f->end - f->first; i++) {
        struct fetch_block *b = &f->block[i];
        struct blk *e = b->e;
        if (!b->wanted)
            continue;
        b->ok = b->ok && st == ST_OK;
        e->fetching = false;
        if (!b->ok && !e->full && st != ST_UNAVAIL) {
            vol->stats.hash_errors++;
            if (log_limit_may(&vol->shard->unread, env_now_ns(vol->shard->env), 1))
                log_volume_error(vol->name, "volume %s: block %llu can't be read: %s", vol->name,
                                 (unsigned long long)(f->first + i),
                                 st != ST_OK                   ? status_text(st)
                                 : f->gets[b->get].st == ST_OK ? "its hash does not match"
                                 : f->gets[b->get].st == ST_NOTFOUND
                                     ? "the index names it and the store lacks it"
                                     : status_text(f->gets[b->get].st));
        }
        if (e->full || (b->ok && !b->mask.len))
            blk_complete(vol, e, b->buf);
        else
            base_damaged(vol, e, b);
        b->buf = NULL;
        if (e->gen == 0)
            blocks_enqueue(&vol->shard->blocks, e);
    }
    store_read_release(read);
    f->pending++;
    for (uint64_t i = 0; i < f->end - f->first; i++)
        if (f->block[i].wanted)
            wake_waiters(f->block[i].e);
    f->pending -= 2;
    if (f->pending == 0)
        fetch_finish(f);
}

static void fetch_run(struct fetch *f)
{
    struct volume *vol = f->vol;
    struct shard *s = vol->shard;
    uint32_t n_gets = 0;

    if (vol->lost) {
        fetch_finish(f);
        return;
    }
    if (!index_have(vol, f->first, f->end, &f->row_wait))
        return;
    f->looked_up = true;
    f->pending = 1; /* nothing finishes it while blocks are looked at */
    for (uint64_t i = 0; i < f->end - f->first; i++) {
        struct fetch_block *b = &f->block[i];
        uint64_t no = f->first + i;
        struct blk *e = blocks_find(&s->blocks, vol->tag, no);
        if (!e) {
            e = blocks_add(&s->blocks, vol, vol->tag, no, entries_of(vol, no));
            if (overlay_lookup(vol, no) >= 0)
                e->zero = e->full = true;
        }
        b->e = e;
        b->fetch = f;
        e->pins++;
        if (e->full || e->bad_base) {
            if (e->gen == 0)
                blocks_enqueue(&s->blocks, e);
            continue;
        }
        if (e->fetching) {
            f->pending++;
            list_add_tail(&e->waiters, &b->wait);
            continue;
        }
        struct row_source src;
        if (index_lookup(vol, no, &src) != SOURCE_FIRST) {
            blk_complete(vol, e, NULL);
            if (e->gen == 0)
                blocks_enqueue(&s->blocks, e);
            continue;
        }
        b->wanted = true;
        b->get = n_gets++;
        b->place = (struct block_place){src.branch, src.epoch, no};
        e->fetching = true;
    }
    if (n_gets) {
        f->gets = mem_zalloc(n_gets * sizeof *f->gets);
        for (uint64_t i = 0; i < f->end - f->first; i++) {
            struct fetch_block *b = &f->block[i];
            if (!b->wanted)
                continue;
            b->buf = blocks_buf(&s->blocks, vol->block_size);
            key_block(&b->key, b->place.branch, b->place.epoch, b->place.block);
            f->gets[b->get] = (struct store_get){
                .key = key_slice(&b->key), .body = b->buf->data, .body_cap = vol->block_size};
        }
        f->pending++;
        f->read = owner_read(vol);
        f->read.gets = f->gets;
        f->read.n_gets = n_gets;
        f->read.digest = fetch_digest;
        f->read.done = fetch_read;
        store_read(s->store, s->env, &f->read);
    }
    if (--f->pending == 0)
        fetch_finish(f);
}

static void fetch_finish(struct fetch *f)
{
    struct volume *vol = f->vol;
    struct shard *s = vol->shard;
    struct vol_io *io = f->io;
    enum status st = vol->lost ? ST_PERM : ST_OK;

    /* Writes that came while it loaded must be committed before they are shown. */
    struct gen *newer = io && st == ST_OK ? must_commit_first(vol, f->first, f->end) : NULL;
    if (io && st == ST_OK && !newer && !segs_from_cache(vol, io, false))
        st = ST_IO;
    for (uint64_t i = 0; f->looked_up && i < f->end - f->first; i++) {
        struct blk *e = f->block[i].e;
        /* What could not be read is not kept, so that the next reader tries again. */
        if (--e->pins == 0 && e->gen == 0 && !e->full && !e->fetching && list_empty(&e->waiters))
            blocks_drop(&s->blocks, e);
    }
    s->read_bytes -= (f->end - f->first) << vol->block_shift;
    vol->fetches--;
    list_remove(&f->link);
    free(f->gets);
    free(f);
    if (newer) {
        wait_for_commit(vol, newer, io);
    } else if (io && io->stage == IO_STARTING) {
        /* Nothing had to be loaded after all: volume_read gives the answer itself. */
        io->stage = IO_FINISHED;
        io->st = st;
        io->vol = NULL;
        vol->busy--;
    } else if (io) {
        volume_end_io(vol, io, st);
    } else {
        volume_progress(vol);
    }
    if (!list_empty(&s->read_waiters))
        shard_wake_readers(s);
}

/* --- read-ahead ---------------------------------------------------------------------- */

/* Loads blocks nobody asked for yet, unless memory is short. */
static void ahead_start(struct volume *vol, uint64_t offset, uint64_t length)
{
    struct shard *s = vol->shard;
    if (offset >= vol->size || vol->closing)
        return;
    length = min_u64(length, vol->size - offset);
    uint64_t first = offset >> vol->block_shift;
    uint64_t end = ((offset + length - 1) >> vol->block_shift) + 1;
    if (s->read_bytes + ((end - first) << vol->block_shift) > s->read_bytes_max / 2)
        return;
    fetch_run(fetch_new(vol, NULL, first, end));
    struct blk *e = blocks_find(&s->blocks, vol->tag, first);
    if (e)
        e->ahead = true;
}

/* A miss: where it goes on from an earlier one, load more than was asked for. */
static void ahead_miss(struct volume *vol, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length;
    for (unsigned i = 0; i < 4; i++) {
        if (vol->streams[i].next != offset || !offset)
            continue;
        uint64_t window = min_u64(max_u64(vol->streams[i].window * 2, AHEAD_MIN), AHEAD_MAX);
        vol->streams[i].window = window;
        vol->streams[i].next = end + window;
        ahead_start(vol, end, window);
        return;
    }
    unsigned i = vol->stream_victim++ % 4;
    vol->streams[i].next = end;
    vol->streams[i].window = 0;
}

static void ahead_hit(struct volume *vol, struct blk *e)
{
    uint64_t at = e->no << vol->block_shift;
    e->ahead = false;
    for (unsigned i = 0; i < 4; i++) {
        uint64_t next = vol->streams[i].next, window = vol->streams[i].window;
        if (!window || at >= next || next - at > window + vol->block_size)
            continue;
        window = min_u64(window * 2, AHEAD_MAX);
        vol->streams[i].window = window;
        vol->streams[i].next = next + window;
        ahead_start(vol, next, window);
        return;
    }
}

void volume_prefetch(struct volume *vol, struct vol_io *io)
{
    io->kind = IO_PREFETCH;
    volume_begin_io(vol, io);
    if (owner_ready(vol, io))
        fetch_resume(vol, io);
}

void volume_own(struct volume *vol, struct vol_io *io)
{
    io->kind = IO_OWN;
    volume_begin_io(vol, io);
    if (owner_ready(vol, io))
        fetch_resume(vol, io);
}

void fetch_collect(struct shard *s, bool (*late)(const struct shard *s, const struct vol_io *io),
                   struct list *to)
{
    list_for_each_safe(l, next, &s->fetches)
    {
        struct fetch *f = container_of(l, struct fetch, link);
        if (!late(s, f->io))
            continue;
        list_remove(&f->link);
        list_add_tail(to, &f->io->link);
        f->io = NULL;
    }
}

void fetch_resume(struct volume *vol, struct vol_io *io)
{
    if (vol->lost) {
        volume_end_io(vol, io, ST_PERM);
        return;
    }
    switch (io->kind) {
    case IO_READ:
        read_begin(vol, io);
        break;
    case IO_OWN:
        io_finish_soon(vol, io, owner_lets_write(vol, io) ? ST_OK : ST_PERM);
        break;
    case IO_PREFETCH:
        ahead_start(vol, io->offset, min_u64(io->length, AHEAD_MAX));
        io_finish_soon(vol, io, ST_OK);
        break;
    default:
        extents_resume(vol, io);
    }
}
