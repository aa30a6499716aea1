/*
 * Volumes with a history; family.h says what is done and checked.
 */
#include "family.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/mem.h"
#include "stored.h"
#include "volume/internal.h"

#define VOLUMES_MAX 5u
#define SNAPSHOTS_OF_ONE_MAX 8u
#define DEEDS_MAX 3u /* of one volume at a time */
#define VIEWERS_MAX 3u
#define EXTENTS_ASKED 20u

typedef unsigned long long ull;

struct family;
struct member;

/* Contents: of a snapshot, as they must be. Arrays by region, as in the driver. */
struct kept {
    struct list link; /* member.snapshots, the oldest first; nowhere once it is gone */
    struct member *of;
    unsigned refs; /* its list, deeds and viewers */
    char name[NAME_BYTES_MAX + 1];
    uint8_t id[SNAPSHOT_ID_BYTES];
    uint64_t epoch; /* 0: not known yet */
    uint64_t size;
    uint64_t effects; /* drv.effects then */
    uint8_t **bytes, **alloc;
    uint64_t **touched;
    bool unsure;          /* member.unsure then */
    struct effect *maybe; /* it holds the first so many of these, too; see resolve() */
    size_t n_maybe;
    unsigned n_clones;
    unsigned n_leaving; /* of these: being removed or flattened just now */
    bool gone, seen;
    bool late_clone; /* one whose command died may have come later */
};

enum deed_kind { DEED_CREATE, DEED_REMOVE, DEED_RENAME, DEED_FLATTEN };

/* A change of a volume's history that is under way. */
struct deed {
    struct vol_history_op op;
    struct list link; /* member.deeds */
    struct member *of;
    enum deed_kind kind;
    struct kept *k;
    size_t at;        /* create: so many effects were in the journal */
    bool exact;       /* create: it was owned, so the snapshot holds just these */
    bool had_clones;  /* remove: at any time since */
    size_t frozen_at; /* with a token: from here on in the journal there is nothing ... */
    uint64_t frozen_id; /* ... of a request that began after this one */
    bool contended;   /* others were about the same snapshot at the same time */
    bool name_went;   /* create, rename: its new name was another snapshot's for a while */
};

struct member {
    struct family *f;
    struct drv *d;
    struct kept *parent; /* it is a clone of */
    struct list snapshots;
    struct list deeds;
    size_t n_snapshots, n_deeds;
    uint8_t **born_depth; /* of blocks that were not touched since it was made; 0: not data */
    unsigned depth_max;
    bool unsure;    /* blocks that were touched may not have been: a death took the last effects */
    /* Bit n: the volume n up the chain, 0 being itself, was flattened in part: blocks that were not
     * touched may be that one's own. */
    uint64_t flattened;
    bool copied;    /* ... and may count as changed, though they are as they were */
    bool had_snapshots;
};

/* A process that has a snapshot open, and nothing else. */
struct viewer {
    struct process *p;
    struct kept *k;
    struct volume *vol;
    struct volume_watcher watcher;
    bool lost;
};

struct family {
    struct family_config c;
    struct family_counts *counts;
    struct member *members[VOLUMES_MAX];
    unsigned n_members;
    struct viewer *viewers[VIEWERS_MAX];
    unsigned n_viewers;
    uint64_t names;
    struct drv *d; /* of the first volume, which stays; for chance and complaints */
};

static bool is_well(const struct family *f)
{
    for (unsigned i = 0; i < f->n_members; i++)
        if (f->members[i]->d->violated)
            return false;
    return true;
}

/* For a person who replays a seed: TRACE_FAMILY=1 prints what happens to the history, and
 * has what is stored looked at after each step. */
static void trace(const struct member *m, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static void trace(const struct member *m, const char *format, ...)
{
    char text[200];
    va_list args;
    if (!getenv("TRACE_FAMILY"))
        return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "%12llu ns: branch %llu: %s\n", (ull)world_now_ns(m->d->world),
            (ull)m->d->branch, text);
}

/* --- contents ------------------------------------------------------------------------ */

static unsigned n_regions(const struct family *f)
{
    return f->d->n_regions;
}

static uint64_t n_blocks(const struct family *f, unsigned region)
{
    return f->d->regions[region].len / f->d->c.block_size + 1;
}

static uint8_t **bytes_new(const struct family *f)
{
    uint8_t **bytes = mem_zalloc(n_regions(f) * sizeof *bytes);
    for (unsigned i = 0; i < n_regions(f); i++)
        bytes[i] = mem_zalloc(f->d->regions[i].len + n_blocks(f, i));
    return bytes;
}

static void arrays_free(const struct family *f, void *arrays_arg)
{
    void **arrays = arrays_arg;
    for (unsigned i = 0; arrays && i < n_regions(f); i++)
        free(arrays[i]);
    free(arrays);
}

/* What the volume holds now. */
static struct kept *kept_new(struct member *m)
{
    struct family *f = m->f;
    struct kept *k = mem_zalloc(sizeof *k);
    list_init(&k->link);
    k->of = m;
    k->refs = 1;
    k->size = m->d->size;
    k->effects = m->d->effects;
    k->unsure = m->unsure;
    k->bytes = bytes_new(f);
    k->alloc = bytes_new(f);
    k->touched = mem_zalloc(n_regions(f) * sizeof *k->touched);
    for (unsigned i = 0; i < n_regions(f); i++) {
        const struct region *r = &m->d->regions[i];
        size_t touched = n_blocks(f, i) * sizeof *k->touched[i];
        memcpy(k->bytes[i], r->now, r->len);
        memcpy(k->alloc[i], r->alloc, n_blocks(f, i));
        k->touched[i] = mem_alloc(touched);
        memcpy(k->touched[i], r->touched, touched);
    }
    return k;
}

static void kept_put(const struct family *f, struct kept *k)
{
    if (--k->refs > 0)
        return;
    arrays_free(f, k->bytes);
    arrays_free(f, k->alloc);
    arrays_free(f, k->touched);
    free(k->maybe);
    free(k);
}

static void kept_add(struct kept *k)
{
    list_add_tail(&k->of->snapshots, &k->link);
    k->of->n_snapshots++;
    k->of->had_snapshots = true;
    k->refs++;
}

/* A snapshot no longer has this name. Who is just giving it to another one may be told that it is
 * taken: that was looked at before. */
static void name_goes(struct member *m, const char *name)
{
    list_for_each (l, &m->deeds) {
        struct deed *deed = container_of(l, struct deed, link);
        const char *wanted = deed->kind == DEED_RENAME ? deed->op.to : deed->op.name;
        if (deed->kind == DEED_CREATE || deed->kind == DEED_RENAME)
            deed->name_went |= !strcmp(wanted, name);
    }
}

/* The snapshot is no more. */
static void kept_gone(struct family *f, struct kept *k)
{
    name_goes(k->of, k->name);
    k->gone = true;
    k->of->n_snapshots--;
    list_remove(&k->link);
    kept_put(f, k);
}

static struct kept *kept_of_epoch(const struct member *m, uint64_t epoch)
{
    list_for_each (l, &m->snapshots) {
        struct kept *k = container_of(l, struct kept, link);
        if (k->epoch == epoch)
            return k;
    }
    return NULL;
}

static struct kept *kept_named(const struct member *m, const char *name)
{
    list_for_each (l, &m->snapshots) {
        struct kept *k = container_of(l, struct kept, link);
        if (!strcmp(k->name, name))
            return k;
    }
    return NULL;
}

static struct kept *any_snapshot(struct member *m)
{
    uint64_t n = drv_below(m->d, m->n_snapshots);
    list_for_each (l, &m->snapshots) {
        if (n-- == 0)
            return container_of(l, struct kept, link);
    }
    return NULL;
}

static void leave_parent(struct member *m)
{
    if (!m->parent)
        return;
    m->parent->n_clones--;
    kept_put(m->f, m->parent);
    m->parent = NULL;
}

/* What the volume holds becomes what the snapshot holds. */
static void become(struct member *m, const struct kept *k)
{
    struct drv *d = m->d;
    for (unsigned i = 0; i < d->n_regions; i++) {
        struct region *r = &d->regions[i];
        memcpy(r->now, k->bytes[i], r->len);
        memcpy(r->alloc, k->alloc[i], n_blocks(m->f, i));
        if (k->of == m)
            memcpy(r->touched, k->touched[i], n_blocks(m->f, i) * sizeof *r->touched);
    }
    drv_array_changed(d, k->size);
}

/* How deep a block may lie that holds anything but zeros. */
static bool depth_fits(const struct member *m, bool unsure, uint64_t touched, uint8_t born,
                       uint32_t depth)
{
    if (depth == (touched || !born ? 1 : born))
        return true;
    return depth > 0 && depth <= 64 && (unsure || m->flattened >> (depth - 1) & 1);
}

/* --- views --------------------------------------------------------------------------- */

static uint64_t count_wrong(struct family *f, const struct kept *k, uint8_t *const *actual)
{
    uint64_t n = 0;
    for (unsigned i = 0; i < n_regions(f); i++) {
        if (memcmp(k->bytes[i], actual[i], f->d->regions[i].len) == 0)
            continue;
        for (uint64_t b = 0; b < f->d->regions[i].len; b++)
            n += k->bytes[i][b] != actual[i][b];
    }
    return n;
}

/* Compares; where it is not known yet which of the effects under way at the making it holds, finds
 * that out. */
static void resolve(struct family *f, struct drv *d, struct kept *k, uint8_t *const *actual)
{
    uint64_t n = count_wrong(f, k, actual);
    for (size_t e = 0; n && e < k->n_maybe; e++) {
        for (unsigned i = 0; i < n_regions(f); i++)
            drv_effect_onto(&k->maybe[e], f->d->regions[i].start, f->d->regions[i].len,
                            k->bytes[i]);
        n = count_wrong(f, k, actual);
    }
    k->n_maybe = 0;
    if (!n)
        return;
    for (unsigned i = 0; i < n_regions(f); i++)
        for (uint64_t b = 0; b < f->d->regions[i].len; b++)
            if (k->bytes[i][b] != actual[i][b]) {
                drv_violation(d, "G7: snapshot %s of branch %llu, epoch %llu: byte %llu is %02x and "
                                 "should be %02x (and %llu more)",
                              k->name, (ull)k->of->d->branch, (ull)k->epoch,
                              (ull)(f->d->regions[i].start + b), actual[i][b], k->bytes[i][b],
                              (ull)n - 1);
                return;
            }
}

/* Reads all of a view and compares. */
static void compare_view(struct family *f, struct drv *d, struct volume *view, struct kept *k)
{
    uint8_t **actual = bytes_new(f);
    if (volume_size(view) != k->size)
        drv_violation(d, "snapshot %s has %llu bytes and should have %llu", k->name,
                      (ull)volume_size(view), (ull)k->size);
    for (unsigned i = 0; i < n_regions(f) && !d->violated; i++) {
        const struct region *r = &f->d->regions[i];
        uint64_t end = min_u64(r->start + r->len, k->size);
        for (uint64_t at = r->start; at < end && !d->violated;) {
            uint64_t n = min_u64(end - at, 1 + drv_below(d, VOLUME_READ_BYTES_MAX));
            enum status st = drv_view_read(d, view, at, n, actual[i] + (at - r->start));
            if (st != ST_OK && !d->violated)
                drv_violation(d, "snapshot %s can't be read at %llu+%llu: %s", k->name, (ull)at,
                              (ull)n, status_text(st));
            at += n;
        }
    }
    if (!d->violated)
        resolve(f, d, k, actual);
    f->counts->views_compared++;
    arrays_free(f, actual);
}

/* It was removed, or that is under way. */
static bool is_removed(const struct kept *k)
{
    bool removed = k->gone;
    list_for_each (l, &k->of->deeds) {
        const struct deed *deed = container_of(l, const struct deed, link);
        removed |= deed->kind == DEED_REMOVE && deed->k == k;
    }
    return removed;
}

/* On the shard of the volume or of another process. */
static void verify_snapshot(struct member *m, struct kept *k)
{
    struct drv *d = m->d;
    enum status st;
    struct process *p = d->p && drv_one_in(d, 2) ? d->p : process_start(d);
    if (d->violated)
        return;
    struct volume *view = drv_view_open(d, p->shard, p->env, d->branch, k->epoch, &st);
    if (!view) {
        drv_violation(d, "snapshot %s of branch %llu, epoch %llu does not open: %s", k->name,
                      (ull)d->branch, (ull)k->epoch, status_text(st));
        return;
    }
    compare_view(m->f, d, view, k);
    if (!d->violated)
        drv_view_close(d, view, p->env);
    if (!d->violated && p != d->p)
        process_stop(d, p);
}

static void verify_any(struct member *m)
{
    struct kept *k = any_snapshot(m);
    if (k && !is_removed(k))
        verify_snapshot(m, k);
}

static void view_lost(struct volume_watcher *w, const char *why)
{
    (void)why;
    container_of(w, struct viewer, watcher)->lost = true;
}

static void viewer_open(struct member *m)
{
    struct family *f = m->f;
    struct drv *d = m->d;
    struct kept *k = any_snapshot(m);
    enum status st;
    if (f->n_viewers == VIEWERS_MAX || !k || (k->n_maybe && is_removed(k)))
        return;
    struct viewer *v = mem_zalloc(sizeof *v);
    k->refs++;
    *v = (struct viewer){.p = process_start(d), .k = k, .watcher = {.lost = view_lost}};
    v->vol = v->p ? drv_view_open(d, v->p->shard, v->p->env, d->branch, k->epoch, &st) : NULL;
    if (v->vol) {
        f->viewers[f->n_viewers++] = v;
        volume_watch_loss(v->vol, &v->watcher);
        if (k->n_maybe)
            compare_view(f, d, v->vol, k);
        return;
    }
    if (v->p && (!is_removed(k) || st != ST_NOTFOUND))
        drv_violation(d, "snapshot %s does not open: %s", k->name, status_text(st));
    if (!d->violated)
        process_stop(d, v->p);
    kept_put(f, k);
    free(v);
}

static void viewer_close(struct family *f, unsigned i)
{
    struct viewer *v = f->viewers[i];
    volume_unwatch_loss(&v->watcher);
    drv_view_close(f->d, v->vol, v->p->env);
    if (f->d->violated)
        return;
    process_stop(f->d, v->p);
    kept_put(f, v->k);
    if (v->lost)
        f->counts->views_lost++;
    f->viewers[i] = f->viewers[--f->n_viewers];
    free(v);
}

/* A piece of a snapshot that is open for long. */
static void viewer_read(struct family *f, unsigned which)
{
    struct viewer *v = f->viewers[which];
    struct drv *d = f->d;
    const struct region *r = &d->regions[drv_below(d, d->n_regions)];
    uint64_t end = min_u64(r->start + r->len, v->k->size);
    if (end <= r->start)
        return;
    uint64_t at = r->start + drv_below(d, end - r->start);
    uint64_t n = 1 + drv_below(d, min_u64(end - at, 6 * d->c.block_size));
    uint8_t *bytes = mem_alloc(n);
    enum status st = drv_view_read(d, v->vol, at, n, bytes);
    if (d->violated)
        return;
    bool gone = is_removed(v->k);
    if (st != ST_OK && !gone)
        drv_violation(d, "snapshot %s can't be read at %llu+%llu: %s", v->k->name, (ull)at, (ull)n,
                      status_text(st));
    if (st == ST_OK && memcmp(bytes, v->k->bytes[r - d->regions] + (at - r->start), n) != 0)
        drv_violation(d, "G7: snapshot %s%s: a read of %llu+%llu shows other bytes than it holds",
                      v->k->name, gone ? ", which was removed" : "", (ull)at, (ull)n);
    free(bytes);
}

/* --- block status -------------------------------------------------------------------- */

struct expected {
    struct member *m;
    const uint8_t *bytes, *since_bytes;
    const uint64_t *touched;
    const uint8_t *born;
    bool unsure;
    const struct kept *since; /* NULL: depth is asked for */
    bool own;                 /* `since` is of the same branch */
};

static void check_block(struct drv *d, const struct expected *x, const struct region *r,
                        uint64_t from, uint64_t end, uint32_t flags)
{
    uint64_t bs = d->c.block_size, b = (from - r->start) / bs;
    const uint8_t *bytes = x->bytes + (from - r->start);
    struct family *f = x->m->f;
    uint8_t born = x->born ? x->born[b] : 0;
    if (!x->since) {
        bool zero = block_is_zero(bytes, end - from);
        f->counts->depths++;
        if (flags > x->m->depth_max)
            drv_violation(d, "the block at %llu lies %u deep in a chain of %u", (ull)from, flags,
                          x->m->depth_max);
        if (!zero && !depth_fits(x->m, x->unsure, x->touched[b], born, flags))
            drv_violation(d, "the block at %llu lies %u deep and should lie %u deep", (ull)from,
                          flags, x->touched[b] || !born ? 1 : born);
        return;
    }
    bool differs = memcmp(bytes, x->since_bytes + (from - r->start), end - from) != 0;
    bool changed = flags & VOL_EXTENT_CHANGED;
    f->counts->blocks_changed += differs;
    if (differs && !changed)
        drv_violation(d, "the block at %llu differs from that of snapshot %s, and is called "
                         "unchanged",
                      (ull)from, x->since->name);
    /* (Of a clone: since it was made.) */
    uint64_t then = x->own ? x->since->effects : 0;
    if (changed && x->touched[b] <= then && !x->m->copied)
        drv_violation(d, "nobody touched the block at %llu since snapshot %s, and it is called "
                         "changed",
                      (ull)from, x->since->name);
}

/* Asks for the status of all regions of a volume or a view of one. */
static void check_status_of(struct drv *d, struct volume *vol, struct volume *since,
                            struct expected *x, uint8_t *const *bytes, uint64_t *const *touched,
                            uint64_t size)
{
    struct vol_extent extents[EXTENTS_ASKED];
    uint64_t bs = d->c.block_size;
    for (unsigned i = 0; i < d->n_regions && !d->violated; i++) {
        const struct region *r = &d->regions[i];
        uint64_t stop = min_u64(r->start + r->len, size);
        x->bytes = bytes[i];
        x->touched = touched[i];
        x->since_bytes = x->since ? x->since->bytes[i] : NULL;
        x->born = x->m->born_depth ? x->m->born_depth[i] : NULL;
        for (uint64_t at = r->start; at < stop && !d->violated;) {
            struct asked a = drv_asked("");
            struct vol_io *io = &a.op.io;
            io->offset = at;
            io->length = stop - at;
            io->extents = extents;
            io->extents_cap = 1 + (uint32_t)drv_below(d, EXTENTS_ASKED);
            io->status_of = since ? VOL_STATUS_CHANGED : VOL_STATUS_DEPTH;
            io->since = since;
            volume_status(vol, io);
            if (!drv_until(d, drv_is_answered, &a))
                return;
            if (io->st != ST_OK || !io->n_extents)
                drv_violation(d, "the block status (%d) at %llu fails: %s", (int)io->status_of,
                              (ull)at, status_text(io->st));
            for (uint32_t e = 0; e < io->n_extents && !d->violated; e++) {
                uint64_t end = at + extents[e].length;
                if (!extents[e].length || end > stop)
                    drv_violation(d, "the block status is empty or longer than what was asked");
                for (; at < end && !d->violated; at = min_u64(end, (at / bs + 1) * bs))
                    check_block(d, x, r, at, min_u64(end, (at / bs + 1) * bs), extents[e].flags);
            }
        }
    }
}

/* Where the volume came from, or one of its own snapshots. */
static struct kept *any_ancestor(struct member *m)
{
    struct kept *k = any_snapshot(m);
    if (m->parent && (!k || drv_one_in(m->d, 3)))
        k = m->parent;
    return k;
}

/* Of the volume, or of one of its snapshots: what changed since an older one, or the depth. */
static void check_status(struct member *m)
{
    struct drv *d = m->d;
    enum status st;
    if (!drv_drain(d) || drv_sync(d) != ST_OK)
        return;
    struct kept *since = drv_one_in(d, 3) ? NULL : any_ancestor(m);
    struct kept *at = drv_one_in(d, 4) ? any_snapshot(m) : NULL;
    if ((since && since->n_maybe) || (at && at->n_maybe))
        return;
    /* (What is older is asked for what is newer.) */
    if (at && since && since->of == m && since->epoch > at->epoch) {
        struct kept *k = at;
        at = since;
        since = k;
    }
    struct volume *older = NULL, *newer = NULL;
    if (since)
        older = drv_view_open(d, d->p->shard, d->p->env, since->of->d->branch, since->epoch, &st);
    if (since && !older)
        drv_violation(d, "snapshot %s does not open: %s", since->name, status_text(st));
    if (at && !d->violated)
        newer = drv_view_open(d, d->p->shard, d->p->env, d->branch, at->epoch, &st);
    if (at && !newer && !d->violated)
        drv_violation(d, "snapshot %s does not open: %s", at->name, status_text(st));
    if (d->violated)
        return;
    struct expected x = {.m = m,
                         .since = since,
                         .own = since && since->of == m,
                         .unsure = at ? at->unsure || m->unsure : m->unsure};
    uint8_t **bytes = mem_alloc(d->n_regions * sizeof *bytes);
    uint64_t **touched = mem_alloc(d->n_regions * sizeof *touched);
    for (unsigned i = 0; i < d->n_regions; i++) {
        bytes[i] = at ? at->bytes[i] : d->regions[i].now;
        touched[i] = at ? at->touched[i] : d->regions[i].touched;
    }
    check_status_of(d, newer ? newer : d->p->vol, older, &x, bytes, touched,
                    at ? at->size : d->size);
    free(bytes);
    free(touched);
    if (newer && !d->violated)
        drv_view_close(d, newer, d->p->env);
    if (older && !d->violated)
        drv_view_close(d, older, d->p->env);
}

/* --- changes of history -------------------------------------------------------------- */

static void choose_name(struct family *f, const char *what, char *out)
{
    snprintf(out, NAME_BYTES_MAX + 1, "%s%llu", what, (ull)++f->names);
}

/* Whether it may have clones, and whether it has for certain. */
static bool may_have_clones(const struct kept *k)
{
    return k->n_clones || k->late_clone;
}

static bool keeps_clones(const struct kept *k)
{
    return k->n_clones > k->n_leaving;
}

static void deed_free(struct deed *deed)
{
    list_remove(&deed->link);
    deed->of->n_deeds--;
    if (deed->kind == DEED_FLATTEN)
        deed->k->n_leaving--;
    kept_put(deed->of->f, deed->k);
    free(deed);
}

static void create_happened(struct deed *deed, uint64_t epoch)
{
    struct kept *k = deed->k;
    struct drv *d = deed->of->d;
    if (!deed->exact && d->n_journal > deed->at) {
        k->unsure = true;
        k->n_maybe = d->n_journal - deed->at;
        k->maybe = mem_alloc(k->n_maybe * sizeof *k->maybe);
        memcpy(k->maybe, d->journal + deed->at, k->n_maybe * sizeof *k->maybe);
        for (unsigned i = 0; i < d->n_regions; i++) {
            memset(k->alloc[i], ALLOC_UNKNOWN, n_blocks(deed->of->f, i));
            memcpy(k->touched[i], d->regions[i].touched,
                   n_blocks(deed->of->f, i) * sizeof *k->touched[i]);
        }
    }
    k->epoch = epoch;
    kept_add(k);
    /* It stands in the store behind all that it holds. */
    d->answered = max_u64(d->answered, deed->at);
    d->durable = max_u64(d->durable, deed->at);
    deed->of->f->counts->snapshots++;
}

static void create_done(struct deed *deed)
{
    struct drv *d = deed->of->d;
    struct kept *k = deed->k;
    const struct vol_history_op *op = &deed->op;
    trace(deed->of, "snapshot %s: %s, epoch %llu", k->name, status_text(op->io.st),
          (ull)op->epoch);
    bool taken = kept_named(deed->of, k->name) != NULL;
    if (op->io.st != ST_OK) {
        deed->of->f->counts->refused++;
        if (!(op->io.st == ST_EXISTS && (taken || deed->name_went)) &&
            !(op->io.st == ST_BUSY && op->token))
            drv_violation(d, "snapshot %s can't be made: %s", k->name, op->err.text);
        return;
    }
    if (taken)
        drv_violation(d, "a second snapshot %s was made", k->name);
    if (op->token)
        for (size_t i = deed->frozen_at; i < d->n_journal; i++)
            if (d->journal[i].kind != EFFECT_RESIZE && d->journal[i].id > deed->frozen_id)
                drv_violation(d, "G7: a change that began after a freeze took effect before the "
                                 "snapshot %s",
                              k->name);
    create_happened(deed, op->epoch);
}

static void remove_done(struct deed *deed)
{
    struct member *m = deed->of;
    struct kept *k = deed->k;
    enum status st = deed->op.io.st;
    trace(m, "snapshot %s of epoch %llu removed: %s", k->name, (ull)k->epoch, status_text(st));
    if (st == ST_OK) {
        if (keeps_clones(k))
            drv_violation(m->d, "snapshot %s was removed and has clones", k->name);
        kept_gone(m->f, k);
        m->f->counts->removed++;
    } else if ((st == ST_BUSY && ((deed->had_clones || may_have_clones(k)) || deed->contended)) ||
               (st == ST_NOTFOUND && deed->contended)) {
        m->f->counts->refused++;
    } else {
        drv_violation(m->d, "snapshot %s can't be removed: %s", k->name, deed->op.err.text);
    }
}

static void rename_done(struct deed *deed)
{
    struct member *m = deed->of;
    enum status st = deed->op.io.st;
    if (st == ST_OK) {
        if (kept_named(m, deed->op.to))
            drv_violation(m->d, "two snapshots have the name %s now", deed->op.to);
        name_goes(m, deed->k->name);
        memcpy(deed->k->name, deed->op.to, sizeof deed->k->name);
        m->f->counts->renamed++;
    } else if ((st == ST_EXISTS && (kept_named(m, deed->op.to) || deed->name_went)) ||
               ((st == ST_NOTFOUND || st == ST_BUSY) && deed->contended)) {
        m->f->counts->refused++;
    } else {
        drv_violation(m->d, "snapshot %s can't be renamed: %s", deed->op.name, deed->op.err.text);
    }
}

/* The volume is nobody's clone any more. */
static void flattened(struct member *m)
{
    leave_parent(m);
    for (unsigned i = 0; i < m->d->n_regions; i++)
        memset(m->born_depth[i], 0, n_blocks(m->f, i));
    m->depth_max = 1;
    m->flattened = 0;
    m->f->counts->flattened++;
    trace(m, "flattened");
}

/* False: it goes on with the next part. */
static bool flatten_done(struct deed *deed)
{
    struct member *m = deed->of;
    struct vol_history_op *op = &deed->op;
    if (op->io.st == ST_BUSY && m->had_snapshots) {
        m->f->counts->refused++;
        return true;
    }
    if (op->io.st != ST_OK) {
        drv_violation(m->d, "it can't be flattened: %s", op->err.text);
        return true;
    }
    if (op->io.offset >= m->d->size) {
        flattened(m);
        return true;
    }
    if (drv_one_in(m->d, 30))
        return true; /* left half done */
    uint64_t next = op->io.offset;
    op->io = (struct vol_io){.done = op->io.done, .offset = next};
    volume_flatten(m->d->p->vol, op);
    return false;
}

static void deed_done(struct vol_io *io)
{
    struct deed *deed = container_of(container_of(io, struct vol_history_op, io), struct deed, op);
    struct drv *d = deed->of->d;
    bool over = true;
    if (!d->p) {
        d->n_others--; /* its process died: see settle() */
        return;
    }
    drv_look(d);
    switch (deed->kind) {
    case DEED_CREATE:
        create_done(deed);
        break;
    case DEED_REMOVE:
        remove_done(deed);
        break;
    case DEED_RENAME:
        rename_done(deed);
        break;
    case DEED_FLATTEN:
        over = flatten_done(deed);
        break;
    }
    if (over) {
        d->n_others--;
        deed_free(deed);
    }
}

static struct deed *deed_new(struct member *m, enum deed_kind kind, struct kept *k)
{
    struct deed *deed = mem_zalloc(sizeof *deed);
    deed->of = m;
    deed->kind = kind;
    deed->k = k;
    deed->op.io.done = deed_done;
    list_for_each (l, &m->deeds) {
        struct deed *other = container_of(l, struct deed, link);
        if (other->k == k)
            other->contended = deed->contended = true;
    }
    list_add_tail(&m->deeds, &deed->link);
    m->n_deeds++;
    m->d->n_others++;
    return deed;
}

/* `token` not 0: under that freeze, which began before any request after `frozen_id`. */
static void create(struct member *m, uint64_t token, size_t frozen_at, uint64_t frozen_id)
{
    struct drv *d = m->d;
    if (m->n_snapshots >= SNAPSHOTS_OF_ONE_MAX)
        return;
    drv_look(d);
    struct kept *k = kept_new(m);
    struct deed *deed = deed_new(m, DEED_CREATE, k);
    m->had_snapshots = true;
    const struct kept *other = any_snapshot(m);
    deed->at = d->n_journal;
    deed->exact = volume_is_owned(d->p->vol);
    deed->frozen_at = frozen_at;
    deed->frozen_id = frozen_id;
    if (other && drv_one_in(d, 20))
        memcpy(k->name, other->name, sizeof k->name);
    else
        choose_name(m->f, "s", k->name);
    for (unsigned i = 0; i < sizeof k->id; i++)
        k->id[i] = (uint8_t)drv_chance(d);
    memcpy(deed->op.name, k->name, sizeof deed->op.name);
    memcpy(deed->op.id, k->id, sizeof deed->op.id);
    deed->op.token = token;
    volume_snapshot_create(d->p->vol, &deed->op);
}

static void remove_one(struct member *m)
{
    struct kept *k = any_snapshot(m);
    if (!k)
        return;
    k->refs++;
    struct deed *deed = deed_new(m, DEED_REMOVE, k);
    deed->had_clones = k->n_clones > 0;
    memcpy(deed->op.name, k->name, sizeof deed->op.name);
    volume_snapshot_remove(m->d->p->vol, &deed->op);
}

static void rename_one(struct member *m)
{
    struct kept *k = any_snapshot(m);
    if (!k)
        return;
    k->refs++;
    struct deed *deed = deed_new(m, DEED_RENAME, k);
    const struct kept *other = any_snapshot(m);
    memcpy(deed->op.name, k->name, sizeof deed->op.name);
    if (drv_one_in(m->d, 5) && other != k)
        memcpy(deed->op.to, other->name, sizeof deed->op.to);
    else
        choose_name(m->f, "r", deed->op.to);
    volume_snapshot_rename(m->d->p->vol, &deed->op);
}

static bool has_deed(const struct member *m, enum deed_kind kind)
{
    list_for_each (l, &m->deeds) {
        if (container_of(l, const struct deed, link)->kind == kind)
            return true;
    }
    return false;
}

static void flatten(struct member *m)
{
    if (!m->parent || has_deed(m, DEED_FLATTEN))
        return;
    m->flattened |= 1;
    m->copied = true;
    m->parent->refs++;
    m->parent->n_leaving++;
    struct deed *deed = deed_new(m, DEED_FLATTEN, m->parent);
    volume_flatten(m->d->p->vol, &deed->op);
}

/* --- commands: processes that come for one change of the catalog ---------------------- */

struct command {
    struct catalog_op op;
    struct family *f;
    struct drv *d; /* for waiting and complaints */
    struct env *env;
    struct store *store;
    bool finished, died;
};

static void command_done(struct catalog_op *op)
{
    container_of(op, struct command, op)->finished = true;
}

static bool is_finished(void *arg)
{
    return ((const struct command *)arg)->finished;
}

static bool command_begin(struct family *f, struct drv *d, struct command *c)
{
    struct err e;
    *c = (struct command){.f = f, .d = d, .op.done = command_done};
    c->store = world_attach(d->world, &c->env, &e);
    if (!c->store)
        drv_violation(d, "the store does not open: %s", e.text);
    return c->store != NULL;
}

/* The next question of the same command. */
static void command_again(struct command *c)
{
    catalog_op_free(&c->op);
    c->op = (struct catalog_op){.done = command_done};
    c->finished = false;
}

static bool command_wait(struct command *c)
{
    return drv_until(c->d, is_finished, c);
}

/* Waits, or has it die on the way. */
static bool command_wait_or_die(struct command *c)
{
    struct family *f = c->f;
    if (!f->c.deaths || !drv_one_in(c->d, 3))
        return command_wait(c);
    drv_moment(c->d, drv_below(c->d, drv_one_in(c->d, 2) ? 6 : 40));
    if (c->finished)
        return true;
    c->died = true;
    f->counts->deaths++;
    f->counts->cut_short++;
    world_crash(c->d->world, c->store);
    world_stop(c->d->world, c->env);
    if (!world_run_until(c->d->world, c->env, is_finished, c))
        drv_violation(c->d, "an operation of a dead command is never answered");
    return !c->d->violated;
}

static void command_end(struct command *c)
{
    if (c->d->violated)
        return;
    catalog_op_free(&c->op);
    world_detach(c->d->world, c->env, c->store);
}

/* One entry of the catalog, into *entry. */
static enum status find(struct command *c, const char *name, struct catalog_entry *entry)
{
    command_again(c);
    catalog_find(&c->op, c->store, c->env, name);
    if (!command_wait(c))
        return ST_SHUTDOWN;
    if (c->op.st == ST_OK)
        *entry = c->op.entries[0];
    return c->op.st;
}

static enum status find_snapshot(struct command *c, const struct kept *k,
                                 struct catalog_entry *entry)
{
    char name[2 * NAME_BYTES_MAX + 2];
    snprintf(name, sizeof name, "%s@%s", k->of->d->name, k->name);
    enum status st = find(c, name, entry);
    if (st == ST_OK && (entry->snapshot.epoch != k->epoch || entry->snapshot.rec.size != k->size ||
                        memcmp(entry->snapshot.rec.id, k->id, sizeof k->id) != 0))
        drv_violation(c->d, "%s is found with epoch %llu and %llu bytes", name,
                      (ull)entry->snapshot.epoch, (ull)entry->snapshot.rec.size);
    return st;
}

/* Another one, after the first died: did it happen? */
static void look_again(struct command *c)
{
    struct family *f = c->f;
    struct drv *d = c->d;
    command_end(c);
    if (!d->violated)
        command_begin(f, d, c);
}

/* --- members ------------------------------------------------------------------------- */

static struct member *member_new(struct family *f, struct drv *d, struct kept *parent)
{
    struct member *m = mem_zalloc(sizeof *m);
    m->f = f;
    m->d = d;
    m->depth_max = 1;
    list_init(&m->snapshots);
    list_init(&m->deeds);
    f->members[f->n_members++] = m;
    if (!parent)
        return m;
    m->parent = parent;
    parent->refs++;
    parent->n_clones++;
    list_for_each (l, &parent->of->deeds) {
        struct deed *deed = container_of(l, struct deed, link);
        deed->had_clones |= deed->k == parent;
    }
    m->unsure = parent->unsure;
    m->flattened = parent->of->flattened << 1;
    m->copied = parent->of->flattened != 0;
    m->depth_max = parent->of->depth_max + 1;
    m->born_depth = bytes_new(f);
    for (unsigned i = 0; i < n_regions(f); i++)
        for (uint64_t b = 0; b < n_blocks(f, i); b++) {
            uint8_t born = parent->of->born_depth ? parent->of->born_depth[i][b] : 0;
            m->born_depth[i][b] = (uint8_t)((parent->touched[i][b] || !born ? 1 : born) + 1);
        }
    become(m, parent);
    return m;
}

static void member_free(struct member *m)
{
    struct family *f = m->f;
    unsigned i = 0;
    while (f->members[i] != m)
        i++;
    f->members[i] = f->members[--f->n_members];
    list_for_each_safe (l, next, &m->snapshots) {
        kept_gone(f, container_of(l, struct kept, link));
    }
    arrays_free(f, m->born_depth);
    leave_parent(m);
    free(m);
}

static void clone_one(struct member *of)
{
    struct family *f = of->f;
    struct drv *d = of->d;
    struct kept *k = any_snapshot(of);
    struct catalog_entry entry;
    struct command c;
    struct volume_spec spec = {.codec = -1};
    if (f->n_members == VOLUMES_MAX || !k || has_deed(of, DEED_RENAME) || has_deed(of, DEED_REMOVE))
        return;
    /* Blocks that came with unknown effects must be known before they are anybody else's. */
    if (k->n_maybe)
        verify_snapshot(of, k);
    if (d->violated || !command_begin(f, d, &c))
        return;
    enum status st = find_snapshot(&c, k, &entry);
    if (st != ST_OK && !d->violated)
        drv_violation(d, "snapshot %s is not found: %s", k->name, c.op.err.text);
    if (d->violated)
        return;
    choose_name(f, "c", spec.name);
    command_again(&c);
    catalog_clone(&c.op, c.store, c.env, &entry, &spec);
    if (!command_wait_or_die(&c))
        return;
    if (!c.died && c.op.st != ST_OK)
        drv_violation(d, "snapshot %s can't be cloned: %s", k->name, c.op.err.text);
    bool died = c.died;
    if (died)
        look_again(&c);
    st = d->violated ? ST_SHUTDOWN : find(&c, spec.name, &entry);
    if (st != ST_OK && !died && !d->violated)
        drv_violation(d, "clone %s was made and is not there", spec.name);
    command_end(&c);
    k->late_clone |= died && st != ST_OK;
    if (st != ST_OK || d->violated)
        return;
    f->counts->happened += died;
    f->counts->clones++;
    if (entry.header.size != k->size || entry.header.parent_branch != d->branch ||
        entry.header.parent_epoch != k->epoch)
        drv_violation(d, "clone %s is not of snapshot %s", spec.name, k->name);
    struct drv_config config = d->c;
    config.beside = d;
    config.name = spec.name;
    config.branch = entry.branch;
    config.seed = drv_chance(d);
    config.no_log = drv_one_in(d, 4);
    struct drv *e = drv_new(&config);
    e->c.seed = d->c.seed; /* for messages */
    member_new(f, e, k);
    drv_open(e);
    trace(of, "clone of epoch %llu: branch %llu", (ull)k->epoch, (ull)entry.branch);
}

/* Ends the process in good order; nothing of the volume is under way afterwards. */
static bool shut(struct member *m)
{
    if (!drv_drain(m->d))
        return false;
    process_stop(m->d, m->d->p);
    m->d->p = NULL;
    drv_checkpoint(m->d);
    return !m->d->violated;
}

static void delete_one(struct member *m)
{
    struct family *f = m->f;
    struct drv *d = m->d;
    struct catalog_entry entry;
    struct command c;
    bool cloned = false, may_be_cloned = false;
    if (f->n_members == 1 || d == f->d || !drv_drain(d))
        return;
    for (unsigned i = 0; i < f->n_viewers; i++)
        if (f->viewers[i]->k->of == m)
            return;
    list_for_each (l, &m->snapshots) {
        const struct kept *k = container_of(l, const struct kept, link);
        cloned |= keeps_clones(k);
        may_be_cloned |= may_have_clones(k);
    }
    if (!shut(m) || !command_begin(f, d, &c))
        return;
    bool with = !drv_one_in(d, 5);
    if (find(&c, d->name, &entry) != ST_OK)
        drv_violation(d, "volume %s is not found", d->name);
    if (d->violated)
        return;
    command_again(&c);
    if (m->parent)
        m->parent->n_leaving++;
    catalog_remove(&c.op, c.store, c.env, &entry, with);
    if (!command_wait_or_die(&c))
        return;
    bool died = c.died, refused = (m->n_snapshots && !with) || cloned;
    enum status st = c.op.st;
    if (!died && (st == ST_EXISTS ? !refused && !may_be_cloned : refused || st != ST_OK))
        drv_violation(d, "removing volume %s with %zu snapshots%s: %s", d->name, m->n_snapshots,
                      cloned ? " and clones" : "", status_text(st));
    if (died)
        look_again(&c);
    bool there = !d->violated && find(&c, d->name, &entry) == ST_OK;
    if (there && died && !refused) {
        /* What the dead one has sent may still come, or has just come. */
        command_again(&c);
        catalog_remove(&c.op, c.store, c.env, &entry, with);
        if (command_wait(&c) && c.op.st != ST_EXISTS) {
            there = false;
            if (c.op.st != ST_OK && c.op.st != ST_NOTFOUND)
                drv_violation(d, "removing volume %s again: %s", d->name, status_text(c.op.st));
        }
    }
    command_end(&c);
    if (m->parent)
        m->parent->n_leaving--;
    if (d->violated)
        return;
    if (!there && refused)
        drv_violation(d, "volume %s was removed with its %s", d->name,
                      cloned ? "clones" : "snapshots");
    if (there) {
        f->counts->refused += refused;
        drv_open(d);
        return;
    }
    f->counts->happened += died;
    f->counts->deleted++;
    trace(m, "removed");
    member_free(m);
    drv_free(d);
}

/* Clears what removed volumes left; a part of it, where it may die. */
static void clear_removed(struct family *f, bool all)
{
    struct command c;
    bool more = true;
    if (!command_begin(f, f->d, &c))
        return;
    while (more && !c.died && !f->d->violated) {
        command_again(&c);
        catalog_clear_removed(&c.op, c.store, c.env, &more);
        if (!(all ? command_wait(&c) : command_wait_or_die(&c)))
            return;
        if (!c.died && c.op.st != ST_OK)
            drv_violation(f->d, "removed volumes are not cleared: %s", c.op.err.text);
        if (!all && drv_one_in(f->d, 3))
            break;
    }
    command_end(&c);
}

/* --- deaths -------------------------------------------------------------------------- */

/* Takes the volume, so that all that its last owner sent is in the store or never will be. */
static void take(struct member *m)
{
    struct asked a = drv_asked("");
    volume_own(m->d->p->vol, &a.op.io);
    if (drv_until(m->d, drv_is_answered, &a) && a.op.io.st != ST_OK)
        drv_violation(m->d, "the volume is not to be had: %s", status_text(a.op.io.st));
}

static struct deed *deed_of(struct member *m, enum deed_kind kind, const struct kept *k)
{
    list_for_each (l, &m->deeds) {
        struct deed *deed = container_of(l, struct deed, link);
        if (deed->kind == kind && deed->k == k)
            return deed;
    }
    return NULL;
}

/* A snapshot that is there. */
static void settle_snapshot(struct member *m, const struct catalog_snapshot *s)
{
    struct kept *k = kept_of_epoch(m, s->epoch);
    if (!k) {
        list_for_each_safe (l, next, &m->deeds) {
            struct deed *deed = container_of(l, struct deed, link);
            if (deed->kind != DEED_CREATE ||
                memcmp(deed->k->id, s->rec.id, sizeof s->rec.id) != 0)
                continue;
            create_happened(deed, s->epoch);
            m->f->counts->happened++;
            k = deed->k;
            break;
        }
    }
    if (!k || memcmp(k->id, s->rec.id, sizeof k->id) != 0) {
        drv_violation(m->d, "after a death there is a snapshot %s of epoch %llu that nobody made",
                      s->rec.name, (ull)s->epoch);
        return;
    }
    if (strcmp(k->name, s->rec.name) != 0) {
        const struct deed *deed = deed_of(m, DEED_RENAME, k);
        if (!deed || strcmp(deed->op.to, s->rec.name) != 0)
            drv_violation(m->d, "snapshot %s is called %s after a death", k->name, s->rec.name);
        memcpy(k->name, s->rec.name, sizeof k->name);
        m->f->counts->happened++;
    }
    k->seen = true;
}


/* What became of what was under way; the volume is open and ours. */
static void settle(struct member *m)
{
    struct family *f = m->f;
    struct drv *d = m->d;
    struct command c;
    struct catalog_entry entry;
    if (!command_begin(f, d, &c))
        return;
    catalog_snapshots(&c.op, c.store, c.env, d->branch);
    if (!command_wait(&c))
        return;
    if (c.op.st != ST_OK)
        drv_violation(d, "the snapshots are not told: %s", c.op.err.text);
    list_for_each (l, &m->snapshots) {
        container_of(l, struct kept, link)->seen = false;
    }
    for (size_t i = 0; i < c.op.n_snapshots && !d->violated; i++)
        settle_snapshot(m, &c.op.snapshots[i]);
    list_for_each_safe (l, next, &m->snapshots) {
        struct kept *k = container_of(l, struct kept, link);
        if (k->seen || d->violated)
            continue;
        if (!deed_of(m, DEED_REMOVE, k))
            drv_violation(d, "after a death snapshot %s is gone", k->name);
        if (keeps_clones(k))
            drv_violation(d, "snapshot %s was removed and has clones", k->name);
        f->counts->happened++;
        kept_gone(f, k);
    }
    if (!d->violated && has_deed(m, DEED_FLATTEN) && find(&c, d->name, &entry) == ST_OK &&
        !entry.header.parent_branch) {
        f->counts->happened++;
        flattened(m);
    }
    command_end(&c);
    list_for_each_safe (l, next, &m->deeds) {
        f->counts->cut_short++;
        deed_free(container_of(l, struct deed, link));
    }
}

static void recover(struct member *m, bool power)
{
    struct drv *d = m->d;
    if (!d->p)
        drv_open(d);
    if (!d->violated)
        take(m);
    if (!d->violated)
        settle(m);
    if (!d->violated)
        drv_recover(d, power);
    m->unsure = true;
}

/* One process dies, or with the power all of them. */
static void die(struct family *f, struct member *m, bool power)
{
    f->counts->deaths++;
    if (!power) {
        drv_crash(m->d, false);
        return;
    }
    while (f->n_viewers && is_well(f))
        viewer_close(f, f->n_viewers - 1);
    for (unsigned i = 0; i < f->n_members && is_well(f); i++)
        drv_crash(f->members[i]->d, false);
    if (is_well(f))
        world_power_cut(f->d->world);
}

static void crash_one(struct member *m)
{
    struct family *f = m->f;
    bool power = f->c.power && drv_one_in(m->d, 3);
    /* In the middle of a change, more often than not. */
    if (m->n_deeds < DEEDS_MAX && !drv_one_in(m->d, 4)) {
        if (drv_one_in(m->d, 2))
            create(m, 0, 0, 0);
        else
            remove_one(m);
        drv_moment(m->d, drv_below(m->d, 12));
    } else {
        drv_moment(m->d, drv_below(m->d, 60));
    }
    trace(m, power ? "dies with the machine" : "dies");
    if (!m->d->violated)
        die(f, m, power);
    /* The next one may die while it takes over. */
    while (is_well(f) && drv_one_in(m->d, 3)) {
        drv_open(m->d);
        if (m->d->violated)
            return;
        drv_request_ownership(m->d);
        drv_moment(m->d, drv_below(m->d, 120));
        if (!m->d->violated)
            drv_crash(m->d, false);
    }
    for (unsigned i = 0; i < f->n_members && is_well(f); i++)
        if (!f->members[i]->d->p)
            recover(f->members[i], power);
}

/* --- rollback ------------------------------------------------------------------------ */

/* The volume holds what the snapshot held; those that were newer are gone. */
static void rolled_back(struct member *m, struct kept *to)
{
    list_for_each_safe (l, next, &m->snapshots) {
        struct kept *k = container_of(l, struct kept, link);
        if (k->epoch > to->epoch)
            kept_gone(m->f, k);
    }
    become(m, to);
    m->unsure = to->unsure;
    m->f->counts->rollbacks++;
    trace(m, "rolled back to epoch %llu", (ull)to->epoch);
}

static void roll_back(struct member *m)
{
    struct family *f = m->f;
    struct drv *d = m->d;
    struct catalog_entry entry;
    struct command c;
    bool newer = false, cloned = false, may_be_cloned = false;
    struct kept *to = drv_drain(d) ? any_snapshot(m) : NULL;
    if (!to)
        return;
    if (to->n_maybe)
        verify_snapshot(m, to);
    if (d->violated)
        return;
    /* Where the owner died, it had no change of history under way: else it would be settled first. */
    bool dead = f->c.deaths && drv_one_in(d, 2);
    if (dead) {
        drv_steps(d, drv_below(d, 20));
        if (!d->violated)
            drv_moment(d, drv_below(d, 20));
        if (!d->violated)
            drv_crash(d, false);
    } else if (!shut(m)) {
        return;
    }
    list_for_each (l, &m->snapshots) {
        const struct kept *k = container_of(l, const struct kept, link);
        newer |= k->epoch > to->epoch;
        cloned |= k->epoch > to->epoch && keeps_clones(k);
        may_be_cloned |= k->epoch > to->epoch && may_have_clones(k);
    }
    if (d->violated || !command_begin(f, d, &c))
        return;
    if (find_snapshot(&c, to, &entry) != ST_OK)
        drv_violation(d, "snapshot %s is not found: %s", to->name, c.op.err.text);
    if (d->violated)
        return;
    bool destroy = !drv_one_in(d, 4), refused = cloned || (newer && !destroy);
    uint64_t epoch = entry.header.epoch;
    command_again(&c);
    catalog_rollback(&c.op, c.store, c.env, &entry, destroy);
    if (!command_wait_or_die(&c))
        return;
    bool died = c.died;
    enum status st = c.op.st;
    if (!died && (st == ST_EXISTS ? !refused && !may_be_cloned
                                  : refused || (st != ST_OK && st != ST_NOSPC)))
        drv_violation(d, "rolling back to %s%s%s: %s (%s)", to->name,
                      newer ? " with newer ones" : "", cloned ? " and clones" : "",
                      status_text(st), c.op.err.text);
    if (died)
        look_again(&c);
    if (d->violated)
        return;
    /* Who has the volume then has settled what the command left. */
    drv_open(d);
    if (!d->violated)
        take(m);
    if (!d->violated && find(&c, d->name, &entry) != ST_OK)
        drv_violation(d, "volume %s is not found", d->name);
    command_end(&c);
    if (d->violated)
        return;
    bool happened = entry.header.epoch > epoch;
    if (!died && happened != (st == ST_OK))
        drv_violation(d, "rolling back to %s was answered with %s, and the volume is in epoch %llu "
                         "after %llu",
                      to->name, status_text(st), (ull)entry.header.epoch, (ull)epoch);
    if (happened && refused)
        drv_violation(d, "it was rolled back to %s over newer snapshots", to->name);
    f->counts->refused += !died && st == ST_EXISTS;
    if (happened) {
        f->counts->happened += died;
        rolled_back(m, to);
        if (volume_size(d->p->vol) != to->size)
            drv_violation(d, "it was rolled back to %s and has %llu bytes", to->name,
                          (ull)volume_size(d->p->vol));
        drv_verify_all(d);
    } else if (dead) {
        settle(m);
        drv_recover(d, false);
        m->unsure = true;
    }
}

/* --- several at one instant ------------------------------------------------------------ */

static bool has_no_deeds(void *arg)
{
    return ((const struct member *)arg)->n_deeds == 0;
}

static void group(struct family *f)
{
    struct member *a = f->members[drv_below(f->d, f->n_members)];
    struct member *b = f->members[drv_below(f->d, f->n_members)];
    struct member *both[] = {a, b};
    size_t frozen_at[2];
    uint64_t frozen_id[2], token = drv_chance(f->d) | 1;
    if (a == b || drv_sync(a->d) != ST_OK || drv_sync(b->d) != ST_OK)
        return;
    for (unsigned i = 0; i < 2; i++) {
        struct drv *d = both[i]->d;
        if (!volume_is_owned(d->p->vol))
            return;
        drv_look(d);
        frozen_at[i] = d->n_journal;
        frozen_id[i] = d->next_id;
        volume_freeze(d->p->vol, token, 200);
    }
    for (unsigned n = (unsigned)drv_below(f->d, 10); n > 0 && is_well(f); n--) {
        struct drv *d = both[n % 2]->d;
        drv_request(d);
        drv_submit(d);
        drv_moment(d, drv_below(d, 6));
    }
    for (unsigned i = 0; i < 2 && is_well(f); i++)
        create(both[i], token, frozen_at[i], frozen_id[i]);
    for (unsigned i = 0; i < 2 && is_well(f); i++)
        drv_until(both[i]->d, has_no_deeds, both[i]);
    for (unsigned i = 0; i < 2 && is_well(f); i++)
        volume_thaw(both[i]->d->p->vol, token);
    f->counts->groups++;
}

/* --- all of it ------------------------------------------------------------------------- */

static void change(struct member *m)
{
    struct family *f = m->f;
    struct drv *d = m->d;
    uint64_t what = drv_below(d, 100);
    if (what < 50 && m->n_deeds == DEEDS_MAX)
        return;
    if (what < 24)
        create(m, 0, 0, 0);
    else if (what < 38)
        remove_one(m);
    else if (what < 44)
        rename_one(m);
    else if (what < 50)
        flatten(m);
    else if (what < 60)
        clone_one(m);
    else if (what < 66)
        roll_back(m);
    else if (what < 68)
        delete_one(m);
    else if (what < 74)
        check_status(m);
    else if (what < 78)
        viewer_open(m);
    else if (what < 80 && f->n_viewers)
        viewer_close(f, (unsigned)drv_below(d, f->n_viewers));
    else if (what < 82)
        group(f);
    else if (what < 84)
        clear_removed(f, false);
    else if (what < 88)
        verify_any(m);
    else if (what < 92)
        drv_reopen(d, drv_one_in(d, 2));
    else if (f->c.deaths)
        crash_one(m);
}

static bool is_clean(void *arg)
{
    return volume_is_clean(arg);
}

/* Everything must be as it should be, and given back. */
static void look_at_everything(struct family *f)
{
    while (f->n_viewers && is_well(f))
        viewer_close(f, f->n_viewers - 1);
    for (unsigned i = 0; i < f->n_members && is_well(f); i++) {
        struct member *m = f->members[i];
        if (!drv_drain(m->d))
            return;
        drv_verify_all(m->d);
        if (!m->d->violated)
            drv_reopen(m->d, true);
        if (!m->d->violated)
            drv_verify_all(m->d);
        if (!m->d->violated)
            check_status(m);
        list_for_each (l, &m->snapshots) {
            if (!m->d->violated)
                verify_snapshot(m, container_of(l, struct kept, link));
        }
        if (!m->d->violated)
            take(m);
        if (!m->d->violated)
            drv_until(m->d, is_clean, m->d->p->vol);
    }
    if (is_well(f))
        clear_removed(f, true);
    for (unsigned i = 0; i < f->n_members && is_well(f); i++)
        shut(f->members[i]);
    const char *wrong = is_well(f) ? stored_check(f->d->world, true, NULL) : NULL;
    if (wrong)
        drv_violation(f->d, "%s", wrong);
}

bool family_run(const struct family_config *config, uint64_t steps, struct family_counts *counts)
{
    struct family *f = mem_zalloc(sizeof *f);
    f->c = *config;
    f->counts = counts;
    f->d = drv_new(&config->drv);
    member_new(f, f->d, NULL);
    if (!f->d->violated)
        drv_open(f->d);
    for (uint64_t done = 0; done < steps && is_well(f);) {
        struct member *m = f->members[drv_below(f->d, f->n_members)];
        uint64_t n = 1 + drv_below(f->d, 16);
        drv_steps(m->d, n);
        done += n;
        if (is_well(f) && f->n_viewers && drv_one_in(f->d, 2))
            viewer_read(f, (unsigned)drv_below(f->d, f->n_viewers));
        if (is_well(f) && drv_one_in(f->d, 2))
            change(m);
        bool looks = drv_one_in(f->d, 8) || getenv("TRACE_FAMILY");
        if (is_well(f) && f->d->sim && looks)
            drv_check_store(f->d);
    }
    if (is_well(f))
        look_at_everything(f);
    if (!is_well(f))
        return false; /* (What is under way keeps hold of everything.) */
    while (f->n_members > 1) {
        struct member *m = f->members[f->n_members - 1];
        struct drv *d = m->d;
        if (d == f->d) {
            f->members[f->n_members - 1] = f->members[0];
            f->members[0] = m;
            continue;
        }
        member_free(m);
        if (!drv_free(d))
            return false;
    }
    struct drv *d = f->d;
    member_free(f->members[0]);
    free(f);
    return drv_free(d);
}
