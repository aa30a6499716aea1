/*
 * Block status: what the index says about a range, without reading data.
 *
 * A walk goes over the level-1 rows of the range. What a level-2 row says about one is often
 * enough: all of it is zeros, all of it is data, or it is the very row that the other side of a
 * comparison has. The rest are loaded many at a time and not kept: a map of a big volume
 * looks at each of them once, and would leave nothing else in memory. Only a walk that needs a
 * single row goes through the index, because the next question is often about the same one.
 * Rows that stand close together are read as one range, until that turns out to bring too many
 * versions of them that nobody asked for.
 *
 * What came that way may be outdated: a row that is in memory counts before it, and one that the
 * index does not name any more, or that was not there, is asked for through the index.
 */
#include <stdlib.h>

#include "volume/internal.h"

#define READ_ROWS_MIN 16u
#define READ_ROWS_MAX 512u
/* After so many rows a request is answered in part: those that had to be loaded, and those of level 2
 * that were looked at. */
#define LOADS_MAX 8192u
#define ROWS2_MAX 1024u
#define ROW_KEY_BYTES 48u

/* The two sides of a comparison; other walks have the first one only. */
enum { SIDE_VOL, SIDE_SINCE, SIDES };

/* A level-1 row that is read past the index. */
struct read_row {
    uint64_t no, branch, epoch;
    uint8_t side, key_len;
    uint8_t key[ROW_KEY_BYTES];
};

/* The rows of one read, in the order of their numbers. */
struct row_batch {
    struct status_walk *walk;
    struct store_read read;
    struct store_get *gets;
    struct store_range range; /* instead of the gets, which are filled from it */
    struct key begin, end;
    uint32_t n, next;
    bool failed;
    struct row1 plain[SIDES]; /* the one that was looked at last */
    struct read_row rows[];
};

struct status_walk {
    struct row_wait wait;
    struct vol_io *io; /* NULL: answered already */
    struct volume *vol;
    struct volume *since; /* NULL: nothing is compared */
    struct list link; /* in shard->walks while `io` */
    uint64_t at, stop;
    unsigned loads, rows2;
    bool reading;
    struct row_batch *batch;
    uint64_t depth_branch; /* whose depth is known ... */
    uint32_t depth;
};

static void walk_step(struct status_walk *w);

/* --- what is found ------------------------------------------------------------------- */

/* Where all blocks of a part of a row come from. */
struct origin {
    int kind; /* SOURCE_ABSENT, ZERO, HOLE, or SOURCE_FIRST and `src` */
    struct row_source src;
};

static uint32_t allocation_of(int kind)
{
    return kind == SOURCE_FIRST  ? 0
           : kind == SOURCE_ZERO ? VOL_EXTENT_ZERO
                                 : VOL_EXTENT_ZERO | VOL_EXTENT_HOLE;
}

/* 1: the volume's own; then one more for each branch on the way to it. */
static uint32_t branch_depth(struct status_walk *w, uint64_t branch)
{
    const struct ancestry_record *a = &w->vol->ancestry;
    uint64_t before = w->vol->branch;
    uint32_t depth = 1;
    if (w->depth && w->depth_branch == branch)
        return w->depth;
    for (uint32_t i = 0; i < a->n_segments && before != branch; i++)
        if (a->segments[i].branch != before) {
            before = a->segments[i].branch;
            depth++;
        }
    w->depth_branch = branch;
    w->depth = before == branch ? depth : 1; /* (a row that can't be read names nothing) */
    return w->depth;
}

/* Whether the contents may differ. What names nothing that exists is like nothing. */
static bool differs(const struct origin *a, const struct origin *b)
{
    if (a->kind != SOURCE_FIRST || b->kind != SOURCE_FIRST)
        return (a->kind == SOURCE_FIRST) != (b->kind == SOURCE_FIRST);
    return a->src.branch != b->src.branch || a->src.epoch != b->src.epoch || !a->src.branch;
}

static uint32_t flags_of(struct status_walk *w, const struct origin from[SIDES])
{
    const struct origin *a = &from[SIDE_VOL];
    switch (w->io->status_of) {
    case VOL_STATUS_ALLOCATION:
        break;
    case VOL_STATUS_DEPTH:
        return a->kind == SOURCE_ABSENT  ? 0
               : a->kind == SOURCE_FIRST ? branch_depth(w, a->src.branch)
                                         : 1;
    case VOL_STATUS_CHANGED:
        if (!differs(a, &from[SIDE_SINCE]))
            return 0;
        return VOL_EXTENT_CHANGED | allocation_of(a->kind);
    }
    return allocation_of(a->kind);
}

/* Everything up to block `end` has these flags. False: no more can be told. */
static bool put(struct status_walk *w, uint64_t end, uint32_t flags)
{
    struct vol_io *io = w->io;
    uint64_t upto = min_u64(end << w->vol->block_shift, w->stop);
    if (io->n_extents && io->extents[io->n_extents - 1].flags == flags) {
        io->extents[io->n_extents - 1].length += upto - w->at;
    } else {
        if (io->n_extents == io->extents_cap || (io->n_extents && (io->flags & VOL_REQ_ONE)))
            return false;
        io->extents[io->n_extents++] = (struct vol_extent){upto - w->at, flags};
    }
    w->at = upto;
    return true;
}

/* --- one level-1 row ----------------------------------------------------------------- */

/* What one side has of a level-1 row. */
struct side_row {
    const struct row2_entry *entry;
    const struct row1 *row; /* NULL: the entry says all, or it is not there */
};

static bool is_row(const struct row2_entry *e)
{
    return e->kind == ROW2_ROW;
}

/* Of a level-2 row that can't be read (index.c): nothing of it is there. */
static bool is_bad(const struct row2_entry *e)
{
    return is_row(e) && !e->epoch;
}

/* No data in it, or nothing else. */
static bool is_zeros(const struct row2_entry *e)
{
    return !is_row(e) || (!e->n_data && !is_bad(e));
}

static bool is_full(const struct row2_entry *e)
{
    return is_row(e) && (e->n_data == INDEX_FANOUT || is_bad(e));
}

static bool same_row(const struct status_walk *w, const struct row2_entry *a,
                     const struct row2_entry *b)
{
    return is_row(a) && is_row(b) && a->epoch == b->epoch && !is_bad(a) &&
           row2_branch(w->vol, a) == row2_branch(w->since, b);
}

/* Whether the entries of level 2 say all about a row: then with these flags. */
static bool entries_suffice(struct status_walk *w, const struct side_row side[SIDES],
                            uint32_t *flags)
{
    const struct row2_entry *a = side[SIDE_VOL].entry, *b = side[SIDE_SINCE].entry;
    struct origin from[SIDES] = {{.kind = is_row(a) ? SOURCE_FIRST : a->kind}};
    bool known = !is_row(a) || is_bad(a) ||
                 (w->io->status_of != VOL_STATUS_DEPTH && is_full(a));
    if (w->io->status_of == VOL_STATUS_CHANGED) {
        if (same_row(w, a, b) || (is_zeros(a) && is_zeros(b))) {
            *flags = 0;
            return true;
        }
        /* Data on one side and none on the other; or it can't be told. */
        known = known && (is_full(a) ? is_zeros(b) || is_bad(a) || is_bad(b) : is_full(b));
        from[SIDE_SINCE].kind = is_zeros(b) ? SOURCE_ABSENT : SOURCE_FIRST;
    }
    *flags = flags_of(w, from);
    return known;
}

/* How far from `i` on, below `end`, the entries are alike. */
static unsigned run_end(const uint16_t *source, unsigned i, unsigned end)
{
    uint16_t first = source[i];
    uint64_t four = first * 0x0001000100010001ull, these[4];
    for (i++; i + 16 <= end; i += 16) {
        memcpy(these, source + i, sizeof these);
        if ((these[0] ^ four) | (these[1] ^ four) | (these[2] ^ four) | (these[3] ^ four))
            break;
    }
    while (i < end && source[i] == first)
        i++;
    return i;
}

/* Whether a row has to be looked at once entries_suffice() said no. */
static bool is_needed(const struct row2_entry *e, unsigned side)
{
    return is_row(e) && !is_bad(e) && (side == SIDE_VOL || e->n_data);
}

/* Where entry `i` comes from; and *end, which is lowered to where that ends. */
static struct origin origin_of(const struct side_row *side, unsigned i, unsigned *end)
{
    struct origin from = {.kind = SOURCE_FIRST};
    if (side->row) {
        const struct row_source *src = row1_data(side->row, i);
        *end = run_end(side->row->source, i, *end);
        if (src)
            from.src = *src;
        else
            from.kind = side->row->source[i];
    } else if (!is_bad(side->entry)) {
        from.kind = is_row(side->entry) ? SOURCE_ABSENT : side->entry->kind;
    }
    return from;
}

/* The blocks of a row, from w->at on. False: no more can be told. */
static bool put_row(struct status_walk *w, const struct side_row side[SIDES], uint64_t row)
{
    unsigned i = (w->at >> w->vol->block_shift) & (INDEX_FANOUT - 1);
    while (i < INDEX_FANOUT && w->at < w->stop) {
        struct origin from[SIDES] = {{.kind = SOURCE_ABSENT}};
        unsigned end = INDEX_FANOUT;
        from[SIDE_VOL] = origin_of(&side[SIDE_VOL], i, &end);
        if (w->since)
            from[SIDE_SINCE] = origin_of(&side[SIDE_SINCE], i, &end);
        if (!put(w, (row << INDEX_SHIFT) + end, flags_of(w, from)))
            return false;
        i = end;
    }
    return true;
}

/* --- rows read past the index -------------------------------------------------------- */

static struct volume *side_volume(const struct status_walk *w, unsigned side)
{
    return side == SIDE_VOL ? w->vol : w->since;
}

static unsigned n_sides(const struct status_walk *w)
{
    return w->since ? SIDES : 1;
}

static void batch_free(struct status_walk *w)
{
    struct row_batch *b = w->batch;
    if (!b)
        return;
    w->batch = NULL;
    for (unsigned s = 0; s < SIDES; s++)
        row1_free(&b->plain[s]);
    store_read_release(&b->read);
    free(b->gets);
    free(b);
}

static int compare_keys(struct slice a, struct slice b)
{
    int c = memcmp(a.data, b.data, min_u64(a.len, b.len));
    return c ? c : a.len < b.len ? -1 : a.len > b.len;
}

/* Takes out of the range what was asked for. Where it was cut short, the rest was not asked for. */
static void take_range(struct row_batch *b)
{
    const struct store_range *range = &b->range;
    for (uint32_t i = 0; i < b->n; i++) {
        struct store_get *get = &b->gets[i];
        uint32_t low = 0, high = range->n_pairs;
        while (low < high) {
            uint32_t at = (low + high) / 2;
            if (compare_keys(range->pairs[at].key, get->key) < 0)
                low = at + 1;
            else
                high = at;
        }
        if (low == range->n_pairs && range->more) {
            b->n = i;
            return;
        }
        bool found = low < range->n_pairs && !compare_keys(range->pairs[low].key, get->key);
        get->st = found ? ST_OK : ST_NOTFOUND;
        if (found)
            get->head = range->pairs[low].head;
    }
}

static void batch_came(struct store_read *read, enum status st)
{
    struct row_batch *b = container_of(read, struct row_batch, read);
    struct status_walk *w = b->walk;
    struct volume *vol = w->vol;
    b->failed = st != ST_OK;
    if (read->n_ranges && st == ST_OK) {
        take_range(b);
        vol->rows_crowded |= b->range.more;
    }
    w->reading = false;
    vol->fetches--;
    if (w->io) {
        walk_step(w);
        return;
    }
    batch_free(w);
    free(w);
    volume_progress(vol);
}

/* The place of a row among those that were read; -1: it is not one of them. */
static int batch_find(struct status_walk *w, unsigned side, uint64_t row)
{
    struct row_batch *b = w->batch;
    if (!b)
        return -1;
    while (b->next < b->n && b->rows[b->next].no < row)
        b->next++;
    for (uint32_t i = b->next; i < b->n && b->rows[i].no == row; i++)
        if (b->rows[i].side == side)
            return (int)i;
    return -1;
}

/* A row that was read, if it is (still) the one that its entry names. */
static const struct row1 *batch_row(struct status_walk *w, unsigned side, uint64_t row,
                                    const struct row2_entry *entry)
{
    struct row_batch *b = w->batch;
    int i = batch_find(w, side, row);
    if (i < 0 || b->failed)
        return NULL;
    const struct read_row *r = &b->rows[i];
    const struct store_get *get = &b->gets[i];
    if (r->epoch != entry->epoch || r->branch != row2_branch(side_volume(w, side), entry) ||
        get->st != ST_OK)
        return NULL;
    row1_free(&b->plain[side]);
    return row1_decode(&b->plain[side], get->key, get->head) ? &b->plain[side] : NULL;
}

static const struct row1 *find_row(struct status_walk *w, unsigned side, uint64_t row,
                                   const struct row2_entry *entry)
{
    struct row_slot *r = index_row1(side_volume(w, side), row);
    return r ? &r->row1 : batch_row(w, side, row, entry);
}

/* The level-2 rows over `row`, which are in memory. */
static void get_entries(const struct status_walk *w, uint64_t row, struct side_row side[SIDES])
{
    for (unsigned s = 0; s < n_sides(w); s++) {
        struct row_slot *r2 = index_row2(side_volume(w, s), row >> INDEX_SHIFT);
        side[s] = (struct side_row){.entry = &r2->row2.entry[row & (INDEX_FANOUT - 1)]};
    }
}

/* Adds what has to be read of a row to `b` (NULL: only counts); gives how many rows that is. */
static uint32_t batch_add(struct status_walk *w, struct row_batch *b, uint64_t row,
                          const struct side_row side[SIDES])
{
    uint32_t n = 0, flags;
    if (entries_suffice(w, side, &flags))
        return 0;
    for (unsigned s = 0; s < n_sides(w); s++) {
        const struct row2_entry *entry = side[s].entry;
        if (!is_needed(entry, s) || index_row1(side_volume(w, s), row))
            continue;
        n++;
        if (!b)
            continue;
        struct read_row *r = &b->rows[b->n];
        struct key key;
        *r = (struct read_row){.no = row,
                               .branch = row2_branch(side_volume(w, s), entry),
                               .epoch = entry->epoch,
                               .side = (uint8_t)s};
        key_row(&key, r->branch, 1, row, r->epoch);
        CHECK(key.len <= ROW_KEY_BYTES);
        memcpy(r->key, key.bytes, key.len);
        b->gets[b->n++] = (struct store_get){.key = {r->key, key.len}};
    }
    return n;
}

/* The most extents a row can become, as far as its entries tell. */
static uint32_t extents_max(const struct status_walk *w, const struct side_row side[SIDES])
{
    uint32_t n = 1;
    for (unsigned s = 0; s < n_sides(w); s++) {
        uint32_t data = side[s].entry->n_data;
        n += 2 * (uint32_t)min_u64(data, INDEX_FANOUT - min_u64(data, INDEX_FANOUT));
    }
    return n;
}

/* From `row` on: up to where rows are worth being read together, all below one level-2 row. *n: how
 * many these are. */
static uint64_t batch_end(struct status_walk *w, uint64_t row, uint32_t *n)
{
    uint64_t end = min_u64(((row >> INDEX_SHIFT) + 1) << INDEX_SHIFT,
                           (((w->stop - 1) >> w->vol->block_shift) >> INDEX_SHIFT) + 1);
    uint64_t room = 2 * (uint64_t)(w->io->extents_cap - w->io->n_extents), extents = 0;
    *n = 0;
    for (; row < end && *n + SIDES <= READ_ROWS_MAX && (*n < READ_ROWS_MIN || extents < room);
         row++) {
        struct side_row side[SIDES];
        get_entries(w, row, side);
        uint32_t more = batch_add(w, NULL, row, side);
        *n += more;
        extents += more ? extents_max(w, side) : 0;
    }
    return row;
}

/* Whether the rows are worth being read as a range; if so, prepares that. */
static bool make_range(struct row_batch *b, bool crowded)
{
    const struct read_row *first = &b->rows[0], *last = &b->rows[b->n - 1];
    if (crowded || last->no - first->no >= 2 * (uint64_t)b->n)
        return false;
    for (uint32_t i = 1; i < b->n; i++)
        if (b->rows[i].branch != first->branch)
            return false;
    key_row(&b->begin, first->branch, 1, first->no, 0);
    key_row(&b->end, first->branch, 1, last->no + 1, 0);
    b->range = (struct store_range){.begin = key_slice(&b->begin),
                                    .end = key_slice(&b->end),
                                    .limit = 2 * b->n + READ_ROWS_MIN};
    return true;
}

static void batch_read(struct status_walk *w, uint64_t row, uint64_t end, uint32_t n)
{
    struct shard *s = w->vol->shard;
    batch_free(w);
    struct row_batch *b = mem_zalloc(sizeof *b + n * sizeof b->rows[0]);
    b->walk = w;
    b->gets = mem_alloc(n * sizeof *b->gets);
    for (unsigned i = 0; i < SIDES; i++)
        row1_init(&b->plain[i]);
    for (; row < end; row++) {
        struct side_row side[SIDES];
        get_entries(w, row, side);
        batch_add(w, b, row, side);
    }
    CHECK(b->n == n);
    w->batch = b;
    w->reading = true;
    w->loads += n;
    w->vol->fetches++;
    b->read = owner_read(w->vol);
    if (make_range(b, w->vol->rows_crowded)) {
        b->read.ranges = &b->range;
        b->read.n_ranges = 1;
    } else {
        b->read.gets = b->gets;
        b->read.n_gets = n;
    }
    b->read.done = batch_came;
    store_read(s->store, s->env, &b->read);
}

/* --- the walk ------------------------------------------------------------------------ */

enum walked { WALK_ON, WALK_WAITS, WALK_OVER };

static bool took_long(const struct status_walk *w)
{
    return w->io->n_extents && (w->loads > LOADS_MAX || w->rows2 > ROWS2_MAX);
}

/* What is missing of a row, through the index. */
static enum walked load_one(struct status_walk *w, uint64_t row, const struct side_row side[SIDES])
{
    bool needed[SIDES] = {false};
    for (unsigned s = 0; s < n_sides(w); s++)
        needed[s] = is_needed(side[s].entry, s);
    for (unsigned s = 0; s < n_sides(w); s++)
        if (needed[s] && !index_have(side_volume(w, s), row << INDEX_SHIFT,
                                     (row << INDEX_SHIFT) + 1, &w->wait)) {
            w->loads++;
            return WALK_WAITS;
        }
    return WALK_ON;
}

static enum walked load_rows(struct status_walk *w, uint64_t row, const struct side_row side[SIDES])
{
    uint32_t n;
    if (took_long(w))
        return WALK_OVER;
    bool tried = batch_find(w, SIDE_VOL, row) >= 0 || batch_find(w, SIDE_SINCE, row) >= 0;
    if (tried || (w->io->flags & VOL_REQ_ONE))
        return load_one(w, row, side);
    uint64_t end = batch_end(w, row, &n);
    if (n <= n_sides(w))
        return load_one(w, row, side);
    batch_read(w, row, end, n);
    return WALK_WAITS;
}

/* The rest of the level-2 row at w->at. */
static enum walked walk_row2(struct status_walk *w)
{
    uint32_t shift = w->vol->block_shift + INDEX_SHIFT;
    uint64_t row = w->at >> shift, row2 = row >> INDEX_SHIFT;
    uint64_t end_row2 = ((w->vol->size - 1) >> (shift + INDEX_SHIFT)) + 1;
    for (unsigned s = 0; s < n_sides(w); s++)
        if (!index_have_row2(side_volume(w, s), row2, end_row2, &w->wait)) {
            w->loads++;
            if (!took_long(w))
                return WALK_WAITS;
            index_wait_stop(&w->wait);
            return WALK_OVER;
        }
    for (; row >> INDEX_SHIFT == row2 && w->at < w->stop; row++) {
        struct side_row side[SIDES];
        uint32_t flags;
        bool missing = false;
        get_entries(w, row, side);
        if (entries_suffice(w, side, &flags)) {
            if (!put(w, (row + 1) << INDEX_SHIFT, flags))
                return WALK_OVER;
            continue;
        }
        for (unsigned s = 0; s < n_sides(w); s++)
            if (is_needed(side[s].entry, s)) {
                side[s].row = find_row(w, s, row, side[s].entry);
                missing |= !side[s].row;
            }
        if (missing)
            return load_rows(w, row, side);
        if (!put_row(w, side, row))
            return WALK_OVER;
    }
    w->rows2++;
    return took_long(w) ? WALK_OVER : WALK_ON;
}

/* Without a log: the newest generation that the index shows already and that has not committed,
 * or NULL. */
static struct gen *newest_shown(struct volume *vol)
{
    if (shard_uses_log(vol->shard))
        return NULL;
    for (struct list *l = vol->gens.prev; l != &vol->gens; l = l->prev) {
        struct gen *g = container_of(l, struct gen, link);
        if (g->stage >= GEN_BUILT)
            return g;
    }
    return NULL;
}

static void walk_end(struct status_walk *w, enum status st)
{
    struct vol_io *io = w->io;
    struct volume *vol = w->vol;
    list_remove(&w->link);
    batch_free(w);
    free(w);
    struct gen *shown = st == ST_OK ? newest_shown(vol) : NULL;
    if (shown) {
        io->stage = IO_LOOKED;
        list_add_tail(&shown->waiters, &io->link);
        return;
    }
    io_finish_soon(vol, io, st);
}

static void walk_step(struct status_walk *w)
{
    enum walked walked = WALK_ON;
    while (walked == WALK_ON && !w->vol->lost && !(w->since && w->since->lost))
        walked = w->at < w->stop ? walk_row2(w) : WALK_OVER;
    if (walked != WALK_WAITS)
        walk_end(w, w->vol->lost                ? ST_PERM
                    : walked == WALK_OVER ? ST_OK
                                          : ST_NOTFOUND);
}

static void rows_came(struct row_wait *wait)
{
    walk_step(container_of(wait, struct status_walk, wait));
}

static void walk_begin(struct volume *vol, struct vol_io *io)
{
    struct status_walk *w = mem_zalloc(sizeof *w);
    io->n_extents = 0;
    w->io = io;
    w->vol = vol;
    w->since = io->status_of == VOL_STATUS_CHANGED ? io->since : NULL;
    w->at = io->offset;
    w->stop = io->offset + io->length;
    w->wait.ready = rows_came;
    list_add_tail(&vol->shard->walks, &w->link);
    walk_step(w);
}

void extents_collect(struct shard *s, bool (*late)(const struct shard *s, const struct vol_io *io),
                     struct list *to)
{
    list_for_each_safe(l, next, &s->walks)
    {
        struct status_walk *w = container_of(l, struct status_walk, link);
        if (!late(s, w->io))
            continue;
        index_wait_stop(&w->wait);
        list_remove(&w->link);
        list_add_tail(to, &w->io->link);
        w->io = NULL;
        if (!w->reading) {
            batch_free(w);
            free(w);
        }
    }
}

void volume_status(struct volume *vol, struct vol_io *io)
{
    CHECK(io->length > 0 && io->extents_cap > 0 && io->offset + io->length <= vol->size);
    CHECK(io->status_of != VOL_STATUS_CHANGED ||
          (io->since->view_epoch && io->since->shard == vol->shard &&
           io->since->block_size == vol->block_size));
    io->kind = IO_STATUS;
    volume_begin_io(vol, io);
    if (owner_ready(vol, io))
        extents_resume(vol, io);
}

void extents_resume(struct volume *vol, struct vol_io *io)
{
    if (vol->lost) {
        volume_end_io(vol, io, ST_PERM);
        return;
    }
    /* The answer comes from the index alone, so what was written must be in it. */
    if (io->stage == IO_LOOKED) {
        io_finish_soon(vol, io, ST_OK);
    } else if (io->stage == IO_IDLE && !vol->view_epoch &&
               (!gen_empty(vol->open) || vol->gens_queued)) {
        struct gen *newest = vol->open;
        io->stage = IO_WAITING;
        if (gen_empty(newest))
            newest = container_of(newest->link.prev, struct gen, link);
        list_add_tail(&newest->waiters, &io->link);
        if (shard_uses_log(vol->shard))
            gen_seal(vol, false);
        else
            vol->shard->seal_wanted = true;
    } else {
        walk_begin(vol, io);
    }
}
