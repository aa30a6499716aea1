/*
 * The driver; driver.h says what it checks.
 */
#include "driver.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "stored.h"
#include "volume/internal.h"

#define FLYING_MAX 40u
#define EXTENTS 16u

enum request_kind {
    R_READ,
    R_WRITE,
    R_ZERO,
    R_TRIM,
    R_FLUSH,
    R_SYNC,
    R_STATUS,
    R_PREFETCH,
    R_RESIZE
};

struct request {
    struct vol_io io;
    struct list link; /* flying, ready, or shown */
    struct drv *d;
    enum request_kind kind;
    uint64_t id;
    uint8_t pattern;
    bool zombie;  /* its process died: nothing it says counts */
    bool buffers; /* a write that receives into buffers */
    bool effective;
    uint64_t effect;      /* index in the journal */
    uint64_t journal_at;  /* a read, a status: effects before this one must show */
    uint64_t answered_at; /* a flush: effects answered before it began */
    uint8_t *snapshot;    /* a read: what must show */
    uint64_t shown_hash;
    bool waiting_zero;
    bool alone;          /* a status: nothing else was under way */
    enum status *result; /* somebody waits for it */
    bool *finished;
    uint8_t *out;
    struct vol_extent extents[EXTENTS];
};

/* --- chance and complaints ----------------------------------------------------------- */

uint64_t drv_chance(struct drv *d)
{
    uint64_t z = d->chance += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t drv_below(struct drv *d, uint64_t n)
{
    return n ? drv_chance(d) % n : 0;
}

bool drv_one_in(struct drv *d, uint64_t n)
{
    return drv_below(d, n) == 0;
}

void drv_violation(struct drv *d, const char *format, ...)
{
    va_list args;
    if (d->violated)
        return;
    d->violated = true;
    va_start(args, format);
    vsnprintf(d->what, sizeof d->what, format, args);
    va_end(args);
    if (!d->quiet)
        fprintf(stderr, "seed %llu: volume %s: %s\n", (unsigned long long)d->c.seed, d->name,
                d->what);
}

/* --- contents ------------------------------------------------------------------------ */

static uint64_t word(uint64_t id, uint64_t at)
{
    uint64_t z = id * 0x9e3779b97f4a7c15u + at * 0xd6e8feb86659fd93u;
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93u;
    return z ^ (z >> 32);
}

void drv_fill(uint64_t id, uint8_t pattern, uint64_t off, uint64_t len, uint8_t *out)
{
    if (pattern == 1) {
        memset(out, (int)(id % 255 + 1), len);
        return;
    }
    if (pattern == 2) {
        memset(out, 0, len);
        return;
    }
    for (uint64_t i = 0; i < len;) {
        uint64_t at = off + i, w = word(id, pattern == 3 ? at / 512 : at / 8);
        uint8_t bytes[8];
        memcpy(bytes, &w, 8);
        for (unsigned k = at % 8; k < 8 && i < len; k++, i++)
            out[i] = bytes[k];
    }
}

void drv_effect_onto(const struct effect *e, uint64_t start, uint64_t len, uint8_t *bytes)
{
    uint64_t from = max_u64(e->off, start), to = min_u64(e->off + e->len, start + len);
    if (from >= to)
        return;
    if (e->kind == EFFECT_WRITE)
        drv_fill(e->id, e->pattern, from, to - from, bytes + (from - start));
    else
        memset(bytes + (from - start), 0, to - from);
}

static bool overlaps(const struct effect *e, uint64_t off, uint64_t len)
{
    return e->off < off + len && off < e->off + e->len;
}

static void mark_alloc(struct drv *d, const struct effect *e, bool hole)
{
    uint64_t bs = d->c.block_size;
    for (unsigned i = 0; i < d->n_regions; i++) {
        struct region *r = &d->regions[i];
        uint64_t from = max_u64(e->off, r->start), to = min_u64(e->off + e->len, r->start + r->len);
        if (from >= to)
            continue;
        for (uint64_t b = from / bs; b * bs < to; b++) {
            uint8_t *a = &r->alloc[b - r->start / bs];
            r->touched[b - r->start / bs] = d->effects;
            bool whole = b * bs >= e->off && min_u64((b + 1) * bs, d->size) <= e->off + e->len;
            if (e->kind == EFFECT_WRITE)
                *a = ALLOC_DATA;
            else if (whole)
                *a = hole ? ALLOC_HOLE : ALLOC_DATA;
            else if (*a != ALLOC_DATA)
                *a = ALLOC_UNKNOWN;
        }
    }
}

/* For a person who replays a seed: TRACE_AT=byte prints what happens to that byte. */
static void trace(const struct drv *d, uint64_t off, uint64_t len, const char *what, uint64_t id)
{
    static bool asked, wanted;
    static uint64_t at;
    if (!asked) {
        const char *text = getenv("TRACE_AT");
        asked = true;
        wanted = text != NULL;
        at = text ? strtoull(text, NULL, 0) : 0;
    }
    if (wanted && off <= at && at < off + len)
        fprintf(stderr, "%12llu ns: %s %llu: %llu+%llu (block %llu of %llu bytes)\n",
                (unsigned long long)world_now_ns(d->world), what, (unsigned long long)id,
                (unsigned long long)off, (unsigned long long)len,
                (unsigned long long)(at / d->c.block_size), (unsigned long long)d->c.block_size);
}

/* A request took effect: into the array and the journal. */
static void take_effect(struct drv *d, struct request *r)
{
    struct effect e = {.kind = r->kind == R_WRITE ? EFFECT_WRITE : EFFECT_ZERO,
                       .off = r->io.offset,
                       .len = r->io.length,
                       .id = r->id,
                       .pattern = r->pattern};
    bool hole = r->kind == R_TRIM || !(r->io.flags & VOL_NO_HOLE);
    if (r->kind == R_RESIZE) {
        e.kind = EFFECT_RESIZE;
        e.off = r->io.new_size;
        e.len = d->size > e.off ? d->size - e.off : 0;
        e.id = r->io.new_size;
    }
    mem_grow(&d->journal, &d->cap_journal, d->n_journal + 1, sizeof *d->journal);
    d->journal[d->n_journal] = e;
    d->effects++;
    r->effect = d->n_journal++;
    r->effective = true;
    r->waiting_zero = false;
    trace(d, e.off, e.len, e.kind == EFFECT_WRITE ? "write" : hole ? "trim" : "zero", r->id);
    if (e.len) {
        mark_alloc(d, &e, hole);
        for (unsigned i = 0; i < d->n_regions; i++)
            drv_effect_onto(&e, d->regions[i].start, d->regions[i].len, d->regions[i].now);
    }
    if (r->kind == R_RESIZE)
        d->size = e.id;
}

/* Zeroes and trims that waited for room take effect somewhere inside a call or an event. The
 * order among them makes no difference. */
void drv_look(struct drv *d)
{
    list_for_each (l, &d->flying) {
        struct request *r = container_of(l, struct request, link);
        if (r->waiting_zero && r->io.stage != IO_PARKED && r->io.stage != IO_WAITING &&
            r->io.st == ST_OK)
            take_effect(d, r);
    }
}

/* --- reads --------------------------------------------------------------------------- */

static struct region *region_of(struct drv *d, uint64_t off)
{
    for (unsigned i = 0; i < d->n_regions; i++)
        if (off >= d->regions[i].start && off < d->regions[i].start + d->regions[i].len)
            return &d->regions[i];
    return NULL;
}

static void segs_copy(const struct vol_io *io, uint8_t *out)
{
    uint64_t at = 0;
    for (uint32_t i = 0; i < io->n_segs; i++) {
        const struct vol_seg *s = &io->segs[i];
        if (s->buf)
            memcpy(out + at, s->buf->data + s->offset, s->len);
        else
            memset(out + at, 0, s->len);
        at += s->len;
    }
    CHECK(at == io->length);
}

static bool process_uses_log(const struct drv *d)
{
    return shard_uses_log(d->p->shard);
}

/* Whether byte `at` of a read may have the value `got`: one that a later effect gave it. */
static bool later_value(struct drv *d, const struct request *r, uint64_t at, uint8_t got)
{
    for (size_t j = d->n_journal; j > r->journal_at; j--) {
        const struct effect *e = &d->journal[j - 1];
        uint8_t byte = 0;
        if (!overlaps(e, at, 1))
            continue;
        drv_effect_onto(e, at, 1, &byte);
        if (byte == got)
            return true;
    }
    list_for_each (l, &d->flying) {
        const struct request *z = container_of(l, const struct request, link);
        if (z->waiting_zero && got == 0 && z->io.offset <= at && at < z->io.offset + z->io.length)
            return true;
    }
    return false;
}

/* On stores that answer at the commit: no piece of a write that is not answered. Long runs
 * of random bytes can't be there by chance. */
static void check_nothing_early(struct drv *d, struct request *r, const uint8_t *got)
{
    if (process_uses_log(d) || d->violated)
        return;
    for (size_t j = r->journal_at; j < d->n_journal; j++) {
        const struct effect *e = &d->journal[j];
        if (e->answered || e->kind != EFFECT_WRITE || e->pattern != 0 ||
            !overlaps(e, r->io.offset, r->io.length))
            continue;
        uint64_t from = max_u64(e->off, r->io.offset);
        uint64_t to = min_u64(e->off + e->len, r->io.offset + r->io.length);
        uint8_t want[16];
        for (uint64_t at = from; at + 16 <= to; at += 16) {
            drv_fill(e->id, e->pattern, at, 16, want);
            if (!memcmp(want, got + (at - r->io.offset), 16)) {
                /* It may be answered later in this very step. */
                d->suspects = d->journal[j].suspect = true;
                return;
            }
        }
    }
}

static void judge_suspects(struct drv *d)
{
    if (!d->suspects)
        return;
    d->suspects = false;
    for (size_t j = 0; j < d->n_journal; j++) {
        struct effect *e = &d->journal[j];
        if (e->suspect && !e->answered && !e->failed)
            drv_violation(d, "a read showed a write (%llu+%llu) that is not committed",
                          (unsigned long long)e->off, (unsigned long long)e->len);
        e->suspect = false;
    }
}

static void check_read(struct drv *d, struct request *r)
{
    uint8_t *got = mem_alloc(r->io.length);
    segs_copy(&r->io, got);
    trace(d, r->io.offset, r->io.length, "read", r->id);
    d->reads_checked++;
    d->bytes_checked += r->io.length;
    if (memcmp(got, r->snapshot, r->io.length) != 0)
        for (uint64_t i = 0; i < r->io.length && !d->violated; i++)
            if (got[i] != r->snapshot[i] && !later_value(d, r, r->io.offset + i, got[i])) {
                uint64_t at = r->io.offset + i;
                drv_violation(d,
                              "a read of %llu+%llu shows %02x at %llu (byte %llu of block %llu) "
                              "instead of %02x",
                              (unsigned long long)r->io.offset, (unsigned long long)r->io.length,
                              got[i], (unsigned long long)at,
                              (unsigned long long)(at % d->c.block_size),
                              (unsigned long long)(at / d->c.block_size), r->snapshot[i]);
            }
    check_nothing_early(d, r, got);
    r->shown_hash = hash64(got, r->io.length, 0);
    free(got);
}

static void request_free(struct request *r)
{
    free(r->io.segs);
    free(r->snapshot);
    free(r);
}

/* The reply was sent: what its buffers hold is still what was read. */
static void unshow(struct drv *d, struct request *r)
{
    uint8_t *got = mem_alloc(r->io.length);
    segs_copy(&r->io, got);
    if (hash64(got, r->io.length, 0) != r->shown_hash)
        drv_violation(d, "the buffers of a reply changed before it was sent (%llu+%llu)",
                      (unsigned long long)r->io.offset, (unsigned long long)r->io.length);
    free(got);
    volume_release_segs(&r->io);
    list_remove(&r->link);
    request_free(r);
}

/* --- answers ------------------------------------------------------------------------- */

static void check_status(struct drv *d, struct request *r)
{
    uint64_t at = r->io.offset, sum = 0;
    uint64_t bs = d->c.block_size;
    if (!r->io.n_extents) {
        drv_violation(d, "a block status without an extent");
        return;
    }
    for (uint32_t i = 0; i < r->io.n_extents; i++) {
        const struct vol_extent *x = &r->io.extents[i];
        if (!x->length || ((x->flags & VOL_EXTENT_HOLE) && !(x->flags & VOL_EXTENT_ZERO)))
            drv_violation(d, "an extent that makes no sense");
        for (unsigned k = 0; k < d->n_regions && r->alone; k++) {
            struct region *g = &d->regions[k];
            uint64_t from = max_u64(at, g->start), to = min_u64(at + x->length, g->start + g->len);
            for (uint64_t b = from; b < to && !d->violated; b = (b / bs + 1) * bs) {
                uint64_t end = min_u64((b / bs + 1) * bs, to);
                uint8_t alloc = g->alloc[b / bs - g->start / bs];
                if ((x->flags & VOL_EXTENT_ZERO) &&
                    !block_is_zero(g->now + (b - g->start), end - b))
                    drv_violation(d, "the block status calls data at %llu zeros",
                                  (unsigned long long)b);
                if (alloc == ALLOC_HOLE && !(x->flags & VOL_EXTENT_HOLE))
                    drv_violation(d, "the block status calls the hole at %llu data (flags %u)",
                                  (unsigned long long)b, x->flags);
                if (alloc == ALLOC_DATA && (x->flags & VOL_EXTENT_HOLE))
                    drv_violation(d, "the block status calls what stands at %llu a hole",
                                  (unsigned long long)b);
            }
        }
        at += x->length;
        sum += x->length;
    }
    if (sum > r->io.length)
        drv_violation(d, "the block status is longer than what was asked");
    if ((r->io.flags & VOL_REQ_ONE) && r->io.n_extents != 1)
        drv_violation(d, "more than the one extent asked for");
}

static void answered_effect(struct drv *d, struct request *r)
{
    if (!r->effective)
        take_effect(d, r);
    d->journal[r->effect].answered = true;
    trace(d, r->io.offset, r->io.length, "answered", r->id);
    d->answered = max_u64(d->answered, r->effect + 1);
    if ((r->io.flags & VOL_FUA) || !process_uses_log(d) || r->kind == R_RESIZE)
        d->durable = max_u64(d->durable, r->effect + 1);
}

static bool failure_allowed(struct drv *d, const struct request *r)
{
    if (d->c.faults && r->io.st == ST_IO) {
        d->seen_io++;
        return true;
    }
    if (d->c.faults && r->io.st == ST_UNAVAIL)
        return true;
    if (d->c.faults && r->io.st == ST_NOSPC)
        return true; /* a commit failed with it, although it had reserved */
    if (d->c.expect_nospc && r->io.st == ST_NOSPC && (r->kind == R_WRITE || r->kind == R_ZERO)) {
        d->seen_nospc++;
        return true;
    }
    return false;
}

static void request_finish(struct request *r)
{
    struct drv *d = r->d;
    list_remove(&r->link);
    d->n_flying--;
    if (r->result)
        *r->result = r->io.st;
    if (r->finished)
        *r->finished = true;
    request_free(r);
}

static void done(struct vol_io *io)
{
    struct request *r = container_of(io, struct request, io);
    struct drv *d = r->d;
    bool keep = false;
    if (r->zombie) {
        if (r->kind == R_READ && io->st == ST_OK)
            volume_release_segs(io);
        request_finish(r);
        return;
    }
    if (io->st != ST_OK) {
        if (!r->result && !failure_allowed(d, r))
            drv_violation(d, "request %d of %llu+%llu failed: %s", (int)r->kind,
                          (unsigned long long)io->offset, (unsigned long long)io->length,
                          status_text(io->st));
        /* (Where the store failed, it may still get there, and need not.) */
        if (r->kind == R_WRITE && r->effective && !r->result && !d->c.faults)
            drv_violation(d, "a write that took effect was answered with an error");
        if (r->effective)
            d->journal[r->effect].failed = true;
        request_finish(r);
        return;
    }
    switch (r->kind) {
    case R_READ:
        if (r->out)
            segs_copy(io, r->out);
        else
            check_read(d, r);
        keep = !r->result && drv_one_in(d, 3);
        if (!keep)
            volume_release_segs(io);
        break;
    case R_WRITE:
    case R_ZERO:
    case R_TRIM:
        answered_effect(d, r);
        break;
    case R_RESIZE:
        answered_effect(d, r);
        break;
    case R_FLUSH:
    case R_SYNC:
        d->durable = max_u64(d->durable, r->answered_at);
        break;
    case R_STATUS:
        check_status(d, r);
        break;
    case R_PREFETCH:
        break;
    }
    if (keep) {
        list_remove(&r->link);
        d->n_flying--;
        list_add_tail(&d->shown, &r->link);
    } else {
        request_finish(r);
    }
}

/* --- writes -------------------------------------------------------------------------- */

static void write_now(struct request *r)
{
    struct drv *d = r->d;
    list_remove(&r->link);
    list_add_tail(&d->flying, &r->link);
    drv_look(d);
    take_effect(d, r);
    if (r->buffers) {
        r->io.segs_cap = VOL_SEGS(r->io.length, d->c.block_size);
        r->io.segs = mem_zalloc(r->io.segs_cap * sizeof *r->io.segs);
        volume_write_buffers(d->p->vol, &r->io);
        uint64_t at = r->io.offset;
        for (uint32_t i = 0; i < r->io.n_segs; i++) {
            const struct vol_seg *s = &r->io.segs[i];
            drv_fill(r->id, r->pattern, at, s->len, s->buf->data + s->offset);
            at += s->len;
        }
        volume_write_commit(d->p->vol, &r->io, NULL);
    } else {
        uint8_t *data = mem_alloc(r->io.length);
        drv_fill(r->id, r->pattern, r->io.offset, r->io.length, data);
        mem_grow(&d->inline_data, &d->cap_inline, d->n_inline + 1, sizeof *d->inline_data);
        d->inline_data[d->n_inline++] = data;
        volume_write_commit(d->p->vol, &r->io, data);
    }
}

static void write_withdraw(struct request *r, struct volume *vol)
{
    struct drv *d = r->d;
    volume_write_abort(vol, &r->io);
    request_finish(r);
    drv_look(d);
}

static void granted(struct vol_io *io)
{
    struct request *r = container_of(io, struct request, io);
    struct drv *d = r->d;
    if (io->st != ST_OK) {
        if (!r->zombie && !r->result && !failure_allowed(d, r))
            drv_violation(d, "a write of %llu+%llu was refused: %s", (unsigned long long)io->offset,
                          (unsigned long long)io->length, status_text(io->st));
        request_finish(r);
        return;
    }
    list_remove(&r->link);
    list_add_tail(&d->ready, &r->link);
}

void drv_submit(struct drv *d)
{
    shard_submit(d->p->shard);
    drv_look(d);
    judge_suspects(d);
    for (size_t i = 0; i < d->n_inline; i++)
        free(d->inline_data[i]);
    d->n_inline = 0;
}

/* Some of the writes whose payload "has arrived", in any order. */
static void write_some(struct drv *d, bool all)
{
    while (!list_empty(&d->ready) && (all || !drv_one_in(d, 4))) {
        struct request *r = container_of(d->ready.next, struct request, link);
        list_for_each (l, &d->ready) {
            if (drv_one_in(d, 3))
                break;
            r = container_of(l, struct request, link);
        }
        if (drv_one_in(d, 24) && !r->result)
            write_withdraw(r, d->p->vol);
        else
            write_now(r);
    }
}

/* --- random requests ----------------------------------------------------------------- */

static struct request *request_new(struct drv *d, enum request_kind kind)
{
    struct request *r = mem_zalloc(sizeof *r);
    r->d = d;
    r->kind = kind;
    r->id = ++d->next_id;
    r->io.done = done;
    r->io.granted = granted;
    r->io.extents = r->extents;
    list_add_tail(&d->flying, &r->link);
    d->n_flying++;
    d->requests++;
    return r;
}

/* A place and a length in a region: small and at the edges of blocks more often than not. */
static void choose(struct drv *d, uint64_t max, uint64_t *off, uint64_t *len)
{
    uint64_t bs = d->c.block_size;
    struct region *g;
    uint64_t end;
    do {
        g = &d->regions[drv_below(d, d->n_regions)];
        end = min_u64(g->start + g->len, d->size);
    } while (end <= g->start);
    uint64_t room = end - g->start;
    uint64_t window = drv_one_in(d, 2) ? min_u64(room, 24 * bs) : room;
    uint64_t at = g->start + drv_below(d, window);
    switch (drv_below(d, 5)) {
    case 0:
        break;
    case 1:
        at = at / 512 * 512;
        break;
    case 2:
        at = at / bs * bs + drv_below(d, 9);
        break;
    default:
        at = at / bs * bs;
    }
    uint64_t n;
    switch (drv_below(d, 12)) {
    case 0:
        n = 1;
        break;
    case 1:
    case 2:
        n = 1 + drv_below(d, 700);
        break;
    case 3:
    case 4:
        n = 512 * (1 + drv_below(d, 40));
        break;
    case 5:
        n = drv_one_in(d, 12) ? 1 + drv_below(d, max) : 1 + drv_below(d, 4 * bs);
        break;
    case 6:
        n = drv_one_in(d, 12) ? max : (at / bs + 1) * bs - at;
        break;
    case 7:
        n = bs - 1 + drv_below(d, 3);
        break;
    default:
        n = bs * (1 + drv_below(d, 8));
    }
    if (at < g->start)
        at = g->start;
    if (at >= end)
        at = end - 1;
    n = min_u64(n, end - at);
    *off = at;
    *len = max_u64(1, min_u64(n, max));
}

static void start_read(struct drv *d, struct request *r)
{
    struct region *g = region_of(d, r->io.offset);
    CHECK(g);
    r->io.segs_cap = VOL_SEGS(r->io.length, d->c.block_size);
    r->io.segs = mem_zalloc(r->io.segs_cap * sizeof *r->io.segs);
    r->snapshot = mem_alloc(r->io.length);
    memcpy(r->snapshot, g->now + (r->io.offset - g->start), r->io.length);
    r->journal_at = d->n_journal;
    if (volume_read(d->p->vol, &r->io))
        done(&r->io);
}

static void start_zero(struct drv *d, struct request *r)
{
    r->waiting_zero = true;
    if (r->kind == R_TRIM && d->c.expect_nospc && !r->result) {
        /* Without space the edges of a trim may keep what they hold: only whole blocks, so
         * that what must be there is known. */
        uint64_t bs = d->c.block_size, stop = r->io.offset + r->io.length;
        r->io.offset = r->io.offset / bs * bs;
        r->io.length = min_u64(d->size, round_up_u64(stop, bs)) - r->io.offset;
    }
    if (r->kind == R_TRIM)
        volume_trim(d->p->vol, &r->io);
    else
        volume_zero(d->p->vol, &r->io);
    drv_look(d);
}

/* Zeroes and trims may go over regions and what lies between them. */
static void choose_span(struct drv *d, uint64_t *off, uint64_t *len)
{
    choose(d, 8u << 20, off, len);
    uint64_t bs = d->c.block_size;
    if (drv_one_in(d, 8))
        *len = min_u64(d->size - *off, (1 + drv_below(d, 200)) * bs);
    if (d->n_regions > 1 && drv_one_in(d, 4)) {
        uint64_t o2, l2;
        choose(d, 8u << 20, &o2, &l2);
        uint64_t from = *off < o2 ? *off : o2, to = max_u64(*off + *len, o2 + l2);
        if (drv_one_in(d, 8) || to - from < 1ull << 40) {
            *off = from;
            *len = to - from;
        }
    }
    if (drv_one_in(d, 400)) {
        *off = 0;
        *len = d->size;
    }
}

static void start_write(struct drv *d, struct request *r)
{
    static const uint8_t patterns[] = {0, 0, 0, 1, 1, 2, 3, 3};
    r->pattern = patterns[drv_below(d, sizeof patterns)];
    r->buffers = drv_one_in(d, 2);
    if (drv_one_in(d, 16))
        r->io.flags |= VOL_FUA;
    if (volume_write_begin(d->p->vol, &r->io))
        granted(&r->io);
    drv_look(d);
}

static bool nothing_flies(const struct drv *d)
{
    return !d->n_flying && !d->n_others;
}

void drv_request(struct drv *d)
{
    static const uint8_t kinds[] = {
        R_READ,  R_READ,  R_READ,  R_READ,  R_READ,  R_READ, R_READ, R_WRITE, R_WRITE,  R_WRITE,
        R_WRITE, R_WRITE, R_WRITE, R_WRITE, R_WRITE, R_ZERO, R_TRIM, R_FLUSH, R_STATUS, R_PREFETCH};
    if (d->n_flying >= FLYING_MAX)
        return;
    enum request_kind kind = kinds[drv_below(d, sizeof kinds)];
    if (kind == R_STATUS && drv_one_in(d, 3))
        drv_drain(d);
    if (d->violated)
        return;
    bool alone = nothing_flies(d);
    struct request *r = request_new(d, kind);
    switch (kind) {
    case R_READ:
        choose(d, VOLUME_READ_BYTES_MAX, &r->io.offset, &r->io.length);
        start_read(d, r);
        break;
    case R_WRITE:
        choose(d, d->c.write_bytes_max ? d->c.write_bytes_max : VOLUME_PIECE_BYTES, &r->io.offset,
               &r->io.length);
        start_write(d, r);
        break;
    case R_ZERO:
        choose_span(d, &r->io.offset, &r->io.length);
        if (drv_one_in(d, 2))
            r->io.flags |= VOL_NO_HOLE;
        if (r->io.length > 64ull << 30)
            r->io.flags &= ~(uint32_t)VOL_NO_HOLE;
        if (drv_one_in(d, 16))
            r->io.flags |= VOL_FUA;
        start_zero(d, r);
        break;
    case R_TRIM:
        choose_span(d, &r->io.offset, &r->io.length);
        start_zero(d, r);
        break;
    case R_FLUSH:
        r->answered_at = d->answered;
        volume_flush(d->p->vol, &r->io);
        break;
    case R_STATUS:
        choose_span(d, &r->io.offset, &r->io.length);
        r->io.extents_cap = 1 + (uint32_t)drv_below(d, EXTENTS);
        if (drv_one_in(d, 4))
            r->io.flags |= VOL_REQ_ONE;
        r->alone = alone;
        volume_status(d->p->vol, &r->io);
        if (alone) {
            drv_submit(d);
            drv_drain(d);
        }
        break;
    case R_PREFETCH:
        choose(d, 8u << 20, &r->io.offset, &r->io.length);
        volume_prefetch(d->p->vol, &r->io);
        break;
    case R_SYNC:
    case R_RESIZE:
        break;
    }
}

/* An event due by `limit_ns`; false where there is none. */
static bool step_by(struct drv *d, uint64_t limit_ns)
{
    bool went = world_step(d->world, limit_ns);
    drv_look(d);
    judge_suspects(d);
    list_for_each (l, &d->ring) {
        struct drv *other = container_of(l, struct drv, ring);
        drv_look(other);
        judge_suspects(other);
    }
    if (d->p && d->p->shard) {
        uint64_t used = buf_pool_used(d->p->shard->pool);
        if (used > d->c.cache_bytes + (8u << 20))
            drv_violation(d, "%llu bytes in buffers with a budget of %llu",
                          (unsigned long long)used, (unsigned long long)d->c.cache_bytes);
    }
    return went;
}

static bool step(struct drv *d)
{
    return step_by(d, UINT64_MAX);
}

void drv_breathe(struct drv *d)
{
    /* Mostly less than a commit takes, now and then long enough for everything to come to rest,
     * and a part of what is due at once. */
    static const uint64_t spans_ns[] = {0, 5000, 50000, 50000, 200000, 200000, 1000000, 5000000};
    uint64_t span = drv_one_in(d, 40) ? d->world->long_ns : spans_ns[drv_below(d, 8)];
    uint64_t limit = world_now_ns(d->world) + drv_below(d, span + 1);
    uint64_t n = drv_one_in(d, 2) ? 10000 : drv_below(d, 20);
    for (uint64_t i = 0; i < n && !d->violated; i++)
        if (!step_by(d, limit))
            break;
    list_for_each_safe (l, next, &d->shown) {
        if (drv_one_in(d, 3))
            unshow(d, container_of(l, struct request, link));
    }
}

static uint64_t random_size(struct drv *d)
{
    uint64_t max = d->regions[0].len;
    return max_u64(512, (max - drv_below(d, drv_one_in(d, 2) ? max / 8 : max)) / 512 * 512);
}

void drv_steps(struct drv *d, uint64_t n)
{
    for (uint64_t i = 0; i < n && !d->violated; i++) {
        uint64_t batch = 1 + drv_below(d, drv_one_in(d, 8) ? 12 : 3);
        for (uint64_t k = 0; k < batch && !d->violated; k++, i++)
            drv_request(d);
        if (d->violated)
            return;
        write_some(d, false);
        if (!drv_one_in(d, 12))
            drv_submit(d);
        drv_breathe(d);
        if (d->c.resize && drv_one_in(d, 150) && drv_drain(d))
            drv_resize(d, random_size(d));
    }
}

bool drv_drain(struct drv *d)
{
    struct patience p = {0};
    while (!d->violated && world_patient(d->world, &p)) {
        write_some(d, true);
        drv_submit(d);
        while (!list_empty(&d->shown))
            unshow(d, container_of(d->shown.next, struct request, link));
        if (nothing_flies(d))
            return true;
        if (!step(d) && list_empty(&d->ready) && !nothing_flies(d)) {
            if (list_empty(&d->flying)) {
                drv_violation(d, "a request of the test's is never answered");
                continue;
            }
            const struct request *r = container_of(d->flying.next, const struct request, link);
            drv_violation(d, "a request (%d, %llu+%llu) is never answered", (int)r->kind,
                          (unsigned long long)r->io.offset, (unsigned long long)r->io.length);
        }
    }
    if (!d->violated)
        drv_violation(d, "requests are not answered: it hangs");
    return false;
}

bool drv_until(struct drv *d, bool (*cond)(void *arg), void *arg)
{
    struct patience p = {0};
    while (!d->violated && !cond(arg)) {
        if (!world_patient(d->world, &p)) {
            drv_violation(d, "what is waited for does not come: it hangs");
            break;
        }
        if (d->p && d->p->vol) {
            write_some(d, true);
            drv_submit(d);
        }
        if (!cond(arg) && !step(d) && !cond(arg) && list_empty(&d->ready)) {
            drv_violation(d, "what is waited for never comes");
            break;
        }
    }
    return !d->violated;
}

/* --- one request to its end ---------------------------------------------------------- */

static enum status run_one(struct drv *d, bool *finished, const enum status *st)
{
    struct patience p = {0};
    while (!*finished && !d->violated && world_patient(d->world, &p)) {
        write_some(d, true);
        drv_submit(d);
        if (*finished)
            break;
        if (!step(d) && !*finished && list_empty(&d->ready))
            drv_violation(d, "a request is never answered");
    }
    if (!*finished && !d->violated)
        drv_violation(d, "a request is not answered: it hangs");
    return *finished ? *st : ST_SHUTDOWN;
}

enum status drv_write(struct drv *d, uint64_t off, uint64_t len, uint32_t flags)
{
    enum status st = ST_OK;
    bool finished = false;
    struct request *r = request_new(d, R_WRITE);
    r->result = &st;
    r->finished = &finished;
    r->io.offset = off;
    r->io.length = len;
    start_write(d, r);
    if (!finished)
        r->io.flags |= flags;
    return run_one(d, &finished, &st);
}

enum status drv_zero(struct drv *d, uint64_t off, uint64_t len, bool trim, uint32_t flags)
{
    enum status st = ST_OK;
    bool finished = false;
    struct request *r = request_new(d, trim ? R_TRIM : R_ZERO);
    r->result = &st;
    r->finished = &finished;
    r->io.offset = off;
    r->io.length = len;
    r->io.flags = flags;
    start_zero(d, r);
    return run_one(d, &finished, &st);
}

enum status drv_flush(struct drv *d)
{
    enum status st = ST_OK;
    bool finished = false;
    struct request *r = request_new(d, R_FLUSH);
    r->result = &st;
    r->finished = &finished;
    r->answered_at = d->answered;
    volume_flush(d->p->vol, &r->io);
    return run_one(d, &finished, &st);
}

enum status drv_sync(struct drv *d)
{
    enum status st = ST_OK;
    bool finished = false;
    struct request *r = request_new(d, R_SYNC);
    r->result = &st;
    r->finished = &finished;
    r->answered_at = d->answered;
    volume_sync(d->p->vol, &r->io);
    return run_one(d, &finished, &st);
}

enum status drv_resize(struct drv *d, uint64_t size)
{
    enum status st = ST_OK;
    bool finished = false;
    struct request *r = request_new(d, R_RESIZE);
    r->result = &st;
    r->finished = &finished;
    r->io.new_size = size; /* the journal's entry is made when it is answered */
    volume_resize(d->p->vol, &r->io, size, true);
    run_one(d, &finished, &st);
    if (finished && st == ST_OK && volume_size(d->p->vol) != size)
        drv_violation(d, "the size is not what was asked for");
    return st;
}

enum status drv_read(struct drv *d, uint64_t off, uint64_t len, uint8_t *out)
{
    enum status st = ST_OK;
    bool finished = false;
    struct request *r = request_new(d, R_READ);
    r->result = &st;
    r->finished = &finished;
    r->out = out;
    r->io.offset = off;
    r->io.length = len;
    r->io.segs_cap = VOL_SEGS(len, d->c.block_size);
    r->io.segs = mem_zalloc(r->io.segs_cap * sizeof *r->io.segs);
    if (volume_read(d->p->vol, &r->io))
        done(&r->io);
    return run_one(d, &finished, &st);
}

/* --- what the test asks itself --------------------------------------------------------- */

struct asked drv_asked(const char *name)
{
    struct asked a = {.op = {.io = {.done = drv_answered}}};
    snprintf(a.op.name, sizeof a.op.name, "%s", name);
    return a;
}

void drv_answered(struct vol_io *io)
{
    struct vol_history_op *op = container_of(io, struct vol_history_op, io);
    container_of(op, struct asked, op)->answered = true;
}

bool drv_is_answered(void *arg)
{
    return ((const struct asked *)arg)->answered;
}

enum status drv_answer(struct drv *d, struct asked *a)
{
    if (world_run_until(d->world, d->p->env, drv_is_answered, a))
        return a->op.io.st;
    drv_violation(d, "what the test asked for is never answered");
    return ST_SHUTDOWN;
}

void drv_op_done(struct catalog_op *op)
{
    container_of(op, struct waited, op)->done = true;
}

static bool op_is_done(void *arg)
{
    return ((const struct waited *)arg)->done;
}

enum status drv_op_wait(struct drv *d, struct env *env, struct waited *w)
{
    if (world_run_until(d->world, env, op_is_done, w))
        return w->op.st;
    drv_violation(d, "an operation of the catalog is never answered");
    return ST_SHUTDOWN;
}

/* --- processes ----------------------------------------------------------------------- */

static void opened(struct volume_open *op)
{
    container_of(op, struct process, open)->opened = true;
}

static bool is_opened(void *arg)
{
    return ((struct process *)arg)->opened;
}

static void closed(void *arg)
{
    ((struct process *)arg)->closed = true;
}

static bool is_closed(void *arg)
{
    return ((struct process *)arg)->closed;
}

static void lost(struct volume_watcher *w, const char *why)
{
    (void)why;
    container_of(w, struct process, watcher)->lost = true;
}

bool process_open(struct drv *d, struct process *p)
{
    p->opened = p->closed = p->lost = false;
    p->open = (struct volume_open){.branch = d->branch, .done = opened};
    memcpy(p->open.name, d->name, sizeof p->open.name);
    volume_open(p->shard, &p->open);
    if (!world_run_until(d->world, p->env, is_opened, p))
        drv_violation(d, "the volume does not open");
    else if (p->open.st != ST_OK)
        drv_violation(d, "the volume does not open: %s", p->open.err.text);
    p->vol = p->open.vol;
    if (!p->vol)
        return false;
    p->watcher.lost = lost;
    volume_watch_loss(p->vol, &p->watcher);
    return true;
}

struct view_opening {
    struct volume_open op;
    bool opened;
};

static void view_opened(struct volume_open *op)
{
    container_of(op, struct view_opening, op)->opened = true;
}

static bool is_view_opened(void *arg)
{
    return ((const struct view_opening *)arg)->opened;
}

struct volume *drv_view_open(struct drv *d, struct shard *shard, struct env *env, uint64_t branch,
                             uint64_t epoch, enum status *st)
{
    struct view_opening opening = {
        .op = {.branch = branch, .epoch = epoch, .done = view_opened, .name = "view"}};
    volume_open(shard, &opening.op);
    if (!world_run_until(d->world, env, is_view_opened, &opening))
        drv_violation(d, "a snapshot does not open");
    *st = opening.opened ? opening.op.st : ST_SHUTDOWN;
    return opening.op.vol;
}

static void view_closed(void *arg)
{
    *(bool *)arg = true;
}

static bool is_view_closed(void *arg)
{
    return *(const bool *)arg;
}

void drv_view_close(struct drv *d, struct volume *view, struct env *env)
{
    bool closed = false;
    volume_close(view, view_closed, &closed);
    if (!world_run_until(d->world, env, is_view_closed, &closed))
        drv_violation(d, "a snapshot does not close");
}

enum status drv_view_read(struct drv *d, struct volume *view, uint64_t off, uint64_t len,
                          uint8_t *out)
{
    struct asked a = drv_asked("");
    struct vol_io *io = &a.op.io;
    io->offset = off;
    io->length = len;
    io->segs_cap = VOL_SEGS(len, d->c.block_size);
    io->segs = mem_zalloc(io->segs_cap * sizeof *io->segs);
    a.answered = volume_read(view, io);
    if (!drv_until(d, drv_is_answered, &a))
        return ST_SHUTDOWN; /* (What is under way stays, as everything does after a violation.) */
    if (io->st == ST_OK) {
        for (uint32_t i = 0; i < io->n_segs; i++) {
            const struct vol_seg *s = &io->segs[i];
            if (s->buf)
                memcpy(out, s->buf->data + s->offset, s->len);
            else
                memset(out, 0, s->len);
            out += s->len;
        }
        volume_release_segs(io);
    }
    free(io->segs);
    return io->st;
}

struct process *process_start(struct drv *d)
{
    struct process *p = mem_zalloc(sizeof *p);
    struct err e;
    p->store = world_attach(d->world, &p->env, &e);
    if (!p->store) {
        drv_violation(d, "the store does not open: %s", e.text);
        free(p);
        return NULL;
    }
    enum status st;
    unsigned tries = 0;
    do
        st = session_begin(&p->session, p->store, p->env, d->world->run_once, d->world->lease_ms,
                           "test", &e);
    while (st != ST_OK && d->c.faults && ++tries < 100);
    if (st != ST_OK)
        drv_violation(d, "no session: %s", e.text);
    struct shard_config config = {.store = p->store,
                                  .env = p->env,
                                  .session = &p->session,
                                  .cache_bytes = d->c.cache_bytes,
                                  .log_bytes = d->c.log_bytes,
                                  .no_log = d->c.no_log,
                                  .seal_age_ms = d->c.seal_age_ms,
                                  .store_timeout_ms = d->c.store_timeout_ms,
                                  .owner_wait_ms = d->c.owner_wait_ms};
    if (shard_new(&config, &p->shard, &e) != ST_OK)
        drv_violation(d, "no shard: %s", e.text);
    return p;
}

void process_close(struct drv *d, struct process *p)
{
    if (!p->vol)
        return;
    volume_unwatch_loss(&p->watcher);
    volume_close(p->vol, closed, p);
    if (!world_run_until(d->world, p->env, is_closed, p))
        drv_violation(d, "the volume does not close");
    p->vol = NULL;
}

static bool session_is_quiet(void *arg)
{
    return !((const struct process *)arg)->session.committing;
}

static void process_free(struct drv *d, struct process *p)
{
    if (p->beside)
        process_close(d, p->beside);
    free(p->beside);
    if (p->dead)
        session_stop(&p->session);
    shard_free(p->shard);
    if (!p->dead)
        session_end(&p->session, p->env, d->world->run_once);
    else if (!world_run_until(d->world, p->env, session_is_quiet, p))
        drv_violation(d, "a heartbeat of a dead process is never answered");
    world_detach(d->world, p->env, p->store);
    free(p);
}

void process_stop(struct drv *d, struct process *p)
{
    process_close(d, p);
    process_free(d, p);
}

struct remains {
    struct drv *d;
    struct process *p;
};

/* A generation of the replay waits for the store, which answers the dead nothing: for ever. */
static bool replay_hangs(const struct process *p)
{
    return p->vol && !p->vol->lost && p->vol->replaying && p->vol->gens_queued;
}

/* Or some that were granted now and must be withdrawn, or what they wait for never comes. */
static bool no_zombies(void *arg)
{
    const struct remains *r = arg;
    return nothing_flies(r->d) || !list_empty(&r->d->ready) || replay_hangs(r->p);
}

/* The process is dead. What is left of it in memory is taken apart (where time is simulated, in
 * a world of its own) by the code that also handles a lost volume. */
static void bury(struct drv *d, struct process *p)
{
    world_stop(d->world, p->env);
    session_stop(&p->session);
    list_for_each_safe (l, next, &d->shown) {
        struct request *r = container_of(l, struct request, link);
        volume_release_segs(&r->io);
        list_remove(&r->link);
        request_free(r);
    }
    list_for_each (l, &d->flying) {
        container_of(l, struct request, link)->zombie = true;
    }
    list_for_each_safe (l, next, &d->ready) {
        struct request *r = container_of(l, struct request, link);
        volume_write_abort(p->vol, &r->io);
        request_finish(r);
    }
    list_for_each_safe (l, next, &d->flying) {
        struct request *r = container_of(l, struct request, link);
        if (r->kind == R_WRITE && (r->io.stage == IO_WAITING || r->io.stage == IO_PARKED)) {
            volume_write_abort(p->vol, &r->io);
            request_finish(r);
        }
    }
    shard_submit(p->shard);
    /* Else it would try what the store refuses the dead for ever. */
    volume_lose_all(p->shard);
    /* (One that is just being taken would be taken under another session; see replay_hangs.) */
    for (size_t i = 0; i < d->n_inline; i++)
        free(d->inline_data[i]);
    d->n_inline = 0;
    /* Writes in line may have been granted on the way. */
    for (unsigned i = 0; i < 1000 && !nothing_flies(d); i++) {
        while (!list_empty(&d->ready)) {
            struct request *r = container_of(d->ready.next, struct request, link);
            volume_write_abort(p->vol, &r->io);
            request_finish(r);
        }
        if (replay_hangs(p))
            volume_lose(p->vol, "its process died");
        world_run_until(d->world, p->env, no_zombies, &(struct remains){d, p});
    }
    if (d->n_others)
        drv_violation(d, "after the volume was lost a request of the test's is never answered");
    if (d->n_flying) {
        const struct request *r = container_of(d->flying.next, const struct request, link);
        drv_violation(d, "after the volume was lost a request (%d, stage %d) is never answered",
                      (int)r->kind, r->io.stage);
    }
    if (d->violated)
        return;
    process_close(d, p);
    if (!d->violated)
        process_free(d, p);
}

void drv_stop_process(struct drv *d, struct process *p)
{
    world_stop(d->world, p->env);
    p->stopped = true;
    list_init(&p->flying);
    list_init(&p->ready);
    list_init(&p->shown);
    list_splice_tail(&p->flying, &d->flying);
    list_splice_tail(&p->ready, &d->ready);
    list_splice_tail(&p->shown, &d->shown);
    p->n_flying = d->n_flying;
    p->n_inline = d->n_inline;
    p->cap_inline = d->cap_inline;
    p->inline_data = d->inline_data;
    d->n_flying = d->n_inline = d->cap_inline = 0;
    d->inline_data = NULL;
    d->p = NULL;
}

void process_crash(struct drv *d, struct process *p)
{
    if (p->stopped) {
        if (!drv_drain(d))
            return;
        list_splice_tail(&d->flying, &p->flying);
        list_splice_tail(&d->ready, &p->ready);
        list_splice_tail(&d->shown, &p->shown);
        d->n_flying = p->n_flying;
        free(d->inline_data);
        d->n_inline = p->n_inline;
        d->cap_inline = p->cap_inline;
        d->inline_data = p->inline_data;
    }
    p->dead = true;
    world_crash(d->world, p->store);
    bury(d, p);
}

/* --- the whole ----------------------------------------------------------------------- */

uint64_t drv_make_volume(struct drv *d, const char *name)
{
    struct env *env;
    struct err e;
    struct store *store = world_attach(d->world, &env, &e);
    if (!store) {
        drv_violation(d, "the store does not open: %s", e.text);
        return 0;
    }
    struct volume_spec spec = {
        .size = d->c.size, .block_size = d->c.block_size, .codec = d->c.codec};
    snprintf(spec.name, sizeof spec.name, "%s", name);
    struct waited w = {.op = {.done = drv_op_done}};
    catalog_create(&w.op, store, env, &spec);
    if (drv_op_wait(d, env, &w) != ST_OK)
        drv_violation(d, "the volume can't be made: %s", w.op.err.text);
    catalog_op_free(&w.op);
    w = (struct waited){.op = {.done = drv_op_done}};
    catalog_find(&w.op, store, env, name);
    CHECK(drv_op_wait(d, env, &w) == ST_OK);
    uint64_t branch = w.op.entries[0].branch;
    catalog_op_free(&w.op);
    world_detach(d->world, env, store);
    return branch;
}

struct process *process_beside(struct drv *d, struct process *p, uint64_t *branch)
{
    struct process *q = p->beside = mem_zalloc(sizeof *q);
    uint64_t own = d->branch;
    q->env = p->env;
    q->store = p->store;
    q->shard = p->shard;
    if (!*branch)
        *branch = drv_make_volume(d, "w");
    d->branch = *branch;
    process_open(d, q);
    d->branch = own;
    return q;
}

/* The ith of the places that are looked at. */
static void place_region(struct drv *d, unsigned i)
{
    struct region *r = &d->regions[i];
    uint64_t bs = d->c.block_size;
    r->len = d->n_regions == 1 ? d->c.size : d->c.region_bytes / bs * bs;
    if (d->n_regions == 1)
        return;
    uint64_t slot = d->c.size / d->n_regions;
    r->start = i * slot / bs * bs;
    /* The edges of index rows of both levels are where it goes wrong. */
    uint64_t unit = drv_one_in(d, 2) ? bs << 10 : bs << 20;
    uint64_t edge = (r->start + unit - 1) / unit * unit;
    if (!drv_one_in(d, 4) && edge >= r->start + r->len / 2 && edge < r->start + slot - r->len)
        r->start = edge - (drv_one_in(d, 2) ? r->len / 2 / bs * bs : 0);
}

static void make_regions(struct drv *d)
{
    uint64_t bs = d->c.block_size;
    d->n_regions = d->c.n_regions ? d->c.n_regions : 1;
    d->regions = mem_zalloc(d->n_regions * sizeof *d->regions);
    for (unsigned i = 0; i < d->n_regions; i++) {
        struct region *r = &d->regions[i];
        if (d->c.beside) {
            r->start = d->c.beside->regions[i].start;
            r->len = d->c.beside->regions[i].len;
        } else {
            place_region(d, i);
        }
        r->now = mem_zalloc(r->len);
        r->base = mem_zalloc(r->len);
        r->alloc = mem_zalloc(r->len / bs + 2);
        r->touched = mem_zalloc((r->len / bs + 2) * sizeof *r->touched);
    }
}

struct drv *drv_new(const struct drv_config *config)
{
    struct drv *d = mem_zalloc(sizeof *d);
    d->c = *config;
    if (!d->c.cache_bytes)
        d->c.cache_bytes = VOLUME_CACHE_BYTES_MIN;
    d->chance = config->seed;
    list_init(&d->ring);
    if (d->c.beside) {
        list_add_tail(&d->c.beside->ring, &d->ring);
        d->c.world = d->c.beside->world;
    }
    d->world = d->c.world ? d->c.world : world_sim_new(config->seed, &d->c.store);
    d->sim = d->world->sim;
    d->db = d->world->db;
    d->size = d->base_size = config->size;
    list_init(&d->flying);
    list_init(&d->ready);
    list_init(&d->shown);
    log_set_level((enum log_level)(LOG_LEVEL_ERROR + 1));
    snprintf(d->name, sizeof d->name, "%s", d->c.name ? d->c.name : "v");
    d->branch = d->c.branch ? d->c.branch : drv_make_volume(d, d->name);
    make_regions(d);
    return d;
}

bool drv_free(struct drv *d)
{
    bool last = list_empty(&d->ring);
    const char *wrong = d->violated || !last ? NULL : world_end(d->world);
    if (wrong)
        drv_violation(d, "%s", wrong);
    list_remove(&d->ring);
    /* After a violation anything may be left over: memory is the least of it. */
    if (d->violated) {
        static struct drv *abandoned[64] __attribute__((used));
        static unsigned n;
        abandoned[n++ % 64] = d;
        return false;
    }
    if (last)
        world_free(d->world);
    for (unsigned i = 0; i < d->n_regions; i++) {
        free(d->regions[i].now);
        free(d->regions[i].base);
        free(d->regions[i].alloc);
        free(d->regions[i].touched);
    }
    free(d->regions);
    free(d->journal);
    free(d->inline_data);
    free(d);
    return true;
}

void drv_open(struct drv *d)
{
    d->p = process_start(d);
    if (d->p)
        process_open(d, d->p);
}

/* --- the stored form ----------------------------------------------------------------- */

void drv_check_store(struct drv *d)
{
    const char *wrong = stored_check(d->world, false, NULL);
    if (wrong)
        drv_violation(d, "%s", wrong);
}

/* (An engine is looked at only while nobody writes.) */
static bool may_look(const struct drv *d)
{
    return !d->c.damaged && !d->violated && (d->sim || list_empty(&d->ring));
}

void drv_close(struct drv *d)
{
    if (!drv_drain(d))
        return;
    process_stop(d, d->p);
    d->p = NULL;
    if (may_look(d))
        drv_check_store(d);
}

/* Everything up to here is in the store: the journal begins anew. */
void drv_checkpoint(struct drv *d)
{
    for (unsigned i = 0; i < d->n_regions; i++)
        memcpy(d->regions[i].base, d->regions[i].now, d->regions[i].len);
    d->base_size = d->size;
    d->n_journal = 0;
    d->durable = d->answered = 0;
}

void drv_array_changed(struct drv *d, uint64_t size)
{
    d->size = size;
    drv_checkpoint(d);
}

void drv_reopen(struct drv *d, bool new_process)
{
    if (!drv_drain(d))
        return;
    process_close(d, d->p);
    if (may_look(d))
        drv_check_store(d);
    if (d->violated)
        return;
    if (new_process) {
        process_free(d, d->p);
        d->p = process_start(d);
    }
    if (d->p)
        process_open(d, d->p);
    drv_checkpoint(d);
    trace(d, 0, d->size, "reopened", new_process);
}

/* Reads all regions into `actual`. */
static bool read_back(struct drv *d, uint8_t **actual)
{
    for (unsigned i = 0; i < d->n_regions; i++) {
        const struct region *r = &d->regions[i];
        actual[i] = mem_zalloc(r->len);
        uint64_t end = min_u64(r->start + r->len, volume_size(d->p->vol));
        for (uint64_t at = r->start; at < end && !d->violated;) {
            uint64_t n = min_u64(end - at, VOLUME_READ_BYTES_MAX);
            enum status st = drv_read(d, at, n, actual[i] + (at - r->start));
            for (unsigned tries = 0; d->c.faults && st != ST_OK && tries < 1000; tries++)
                st = drv_read(d, at, n, actual[i] + (at - r->start));
            if (st != ST_OK)
                drv_violation(d, "%llu+%llu can't be read back: %s", (unsigned long long)at,
                              (unsigned long long)n, status_text(st));
            at += n;
        }
    }
    return !d->violated;
}

void drv_verify_all(struct drv *d)
{
    uint8_t **actual = mem_zalloc(d->n_regions * sizeof *actual);
    if (drv_drain(d) && read_back(d, actual))
        for (unsigned i = 0; i < d->n_regions; i++) {
            const struct region *r = &d->regions[i];
            for (uint64_t k = 0; k < r->len && !d->violated; k++)
                if (actual[i][k] != r->now[k])
                    drv_violation(d, "byte %llu is %02x and should be %02x",
                                  (unsigned long long)(r->start + k), actual[i][k], r->now[k]);
        }
    for (unsigned i = 0; i < d->n_regions; i++)
        free(actual[i]);
    free(actual);
}

static uint64_t mismatches(const uint8_t *a, const uint8_t *b, uint64_t len)
{
    uint64_t n = 0;
    if (!memcmp(a, b, len))
        return 0;
    for (uint64_t i = 0; i < len; i++)
        n += a[i] != b[i];
    return n;
}

/* Zeroes of more than that may be cut into several commits (G3 holds for 4 MiB), the first bytes
 * first. Half of what goes into one now: in another epoch a row may have weighed twice as much. */
static uint64_t whole_bytes_max(const struct drv *d)
{
    uint64_t blocks = weight_zeros_max(d->p->vol);
    return blocks == UINT64_MAX ? UINT64_MAX : blocks / 2 * d->c.block_size;
}

/* Finds the prefix of the journal that the volume now holds. */
static void match_prefix(struct drv *d, uint8_t **actual, uint64_t at_least)
{
    uint64_t wrong = 0, size = d->base_size, actual_size = volume_size(d->p->vol);
    uint64_t best = 0, best_wrong = UINT64_MAX;
    size_t found = SIZE_MAX;
    for (unsigned i = 0; i < d->n_regions; i++) {
        struct region *r = &d->regions[i];
        memcpy(r->now, r->base, r->len);
        wrong += mismatches(r->now, actual[i], r->len);
    }
    for (size_t k = 0;; k++) {
        if (!wrong && size == actual_size && k >= at_least) {
            found = k;
            break;
        }
        if (wrong < best_wrong) {
            best_wrong = wrong;
            best = k;
        }
        if (k == d->n_journal)
            break;
        const struct effect *e = &d->journal[k];
        bool in_pieces = e->kind == EFFECT_ZERO && e->len > whole_bytes_max(d) && k >= at_least;
        for (unsigned i = 0; i < d->n_regions; i++) {
            struct region *r = &d->regions[i];
            if (in_pieces && !wrong && size == actual_size)
                break; /* the first pieces of it are there */
            uint64_t from = max_u64(e->off, r->start);
            uint64_t to = min_u64(e->off + e->len, r->start + r->len);
            if (from >= to)
                continue;
            uint64_t o = from - r->start;
            wrong -= mismatches(r->now + o, actual[i] + o, to - from);
            drv_effect_onto(e, r->start, r->len, r->now);
            wrong += mismatches(r->now + o, actual[i] + o, to - from);
        }
        if (e->kind == EFFECT_RESIZE)
            size = e->id;
    }
    if (found == SIZE_MAX) {
        drv_violation(d,
                      "after a crash the volume is no prefix of the %zu effects that holds the "
                      "first %llu: nearest to the first %llu, with %llu bytes wrong%s",
                      d->n_journal, (unsigned long long)at_least, (unsigned long long)best,
                      (unsigned long long)best_wrong, size == actual_size ? "" : "; another size");
        return;
    }
    d->size = size;
}

void drv_recover(struct drv *d, bool power)
{
    uint8_t **actual = mem_zalloc(d->n_regions * sizeof *actual);
    if (!d->p)
        drv_open(d);
    if (!d->violated && read_back(d, actual)) {
        match_prefix(d, actual, power ? d->durable : d->answered);
        drv_checkpoint(d);
        for (unsigned i = 0; i < d->n_regions; i++)
            memset(d->regions[i].alloc, ALLOC_UNKNOWN, d->regions[i].len / d->c.block_size + 1);
    }
    for (unsigned i = 0; i < d->n_regions; i++)
        free(actual[i]);
    free(actual);
}

void drv_crash(struct drv *d, bool power)
{
    struct process *p = d->p;
    /* (It went on while others that die with it were buried.) */
    drv_look(d);
    p->dead = true;
    world_crash(d->world, p->store);
    if (power)
        world_power_cut(d->world);
    d->p = NULL;
    bury(d, p);
}

void drv_request_ownership(struct drv *d)
{
    struct request *r = request_new(d, R_PREFETCH);
    r->io.offset = 0;
    r->io.length = 1;
    volume_prefetch(d->p->vol, &r->io);
}

void drv_wait_ms(struct drv *d, uint64_t ms)
{
    uint64_t until = world_now_ns(d->world) + ms * 1000000;
    write_some(d, true);
    drv_submit(d);
    while (!d->violated && world_now_ns(d->world) < until) {
        step_by(d, until);
        write_some(d, true);
        drv_submit(d);
    }
}

static void knocked(struct vol_io *io)
{
    struct knock *k = container_of(io, struct knock, io);
    k->answered = true;
    k->st = io->st;
    if (io->st == ST_OK)
        volume_release_segs(io);
}

void drv_knock(struct process *p, struct knock *k)
{
    *k = (struct knock){.io = {.done = knocked, .length = 1, .segs_cap = 2}};
    k->io.segs = k->segs;
    if (volume_read(p->vol, &k->io))
        knocked(&k->io);
}

void drv_two_owners(struct drv *d)
{
    struct process *a = d->p, *b = process_start(d);
    process_open(d, b);
    /* The second one thinks that the first is dead and is wrong. */
    mem_store_believe_dead(d->db, a->session.id);
    for (unsigned round = 0; round < 20 && !d->violated; round++) {
        d->p = round % 2 ? b : a;
        drv_steps(d, 30);
        drv_drain(d);
        if (!d->violated)
            drv_sync(d);
    }
}

void drv_moment(struct drv *d, uint64_t steps)
{
    uint64_t limit = world_now_ns(d->world) + 2000000;
    while (steps-- > 0 && !d->violated && step_by(d, limit)) {
    }
}
