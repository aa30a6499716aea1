/*
 * Generations: what changed since the last commit, and its way into the store.
 *
 * The open generation takes writes. Sealed, it is prepared (its index rows and
 * the bases of partly written blocks are loaded), encoded on worker threads,
 * built (the index in memory is changed, the commit is put together) and
 * committed, under a check of the owner key. Only one generation is between
 * prepared and built, and only one is being committed, so commits happen strictly
 * in order: that is the prefix (G2) and the atomicity (G3) of what survives.
 */
#include <stdlib.h>

#include "volume/internal.h"

#define ENCODE_BLOCKS 64u
#define BASES_AT_ONCE 256u
#define RETRY_MS 1000u
#define BASE_TRIES 3u

/* Memory that lives as long as the generation's commit. */
struct chunk {
    struct chunk *next;
    size_t used, size;
    uint8_t bytes[];
};

/* A level-2 row that is stored, and that a range of the generation covers whole. */
struct gen_scan {
    uint64_t row2;
    uint32_t place; /* where it was found: 0 is the branch itself, then the segments */
    uint32_t n_data;
    uint64_t epoch; /* of its newest version under the own branch; 0: none there */
    uint64_t epoch_rows1; /* the newest of the level-1 rows of the own branch it names; 0: none */
    bool versions;  /* there are others, older or in segments */
    bool fixed;     /* a range of this generation has changed it already */
};

struct gen_base {
    struct gen_item *item;
    struct buf *buf;
    struct key key;
    struct block_place place;
    struct slice mask; /* not empty: the stored block itself has lost bytes */
    bool ok;
};

struct gen_bases {
    struct store_read read;
    struct gen *gen;
    struct gen_base base[BASES_AT_ONCE];
    struct store_get gets[BASES_AT_ONCE];
    uint32_t n;
};

struct gen_encode {
    struct env_work work;
    struct gen *gen;
    size_t first, n;
    uint8_t *out;   /* encoded bodies, each on a border of BLOCK_SIZE_MIN; NULL: stored as they are */
    uint8_t *heads;
};

struct row2_read {
    struct store_read read;
    struct store_range range;
    struct key begin, end;
    uint64_t branch, after, upto; /* only these epochs count */
    struct gen *gen;
};

static void scan_place_done(struct gen *g);
static void prepare_step(struct gen *g);
static void pipeline_step(struct volume *vol);

static void *arena_alloc(struct gen *g, size_t size)
{
    struct chunk *c = g->arena;
    size = (size + 7) & ~(size_t)7;
    if (!c || c->size - c->used < size) {
        size_t cap = size > 65536 ? size : 65536;
        c = mem_alloc(sizeof *c + cap);
        *c = (struct chunk){.next = g->arena, .size = cap};
        g->arena = c;
    }
    c->used += size;
    return c->bytes + c->used - size;
}

struct gen *gen_open(struct volume *vol)
{
    struct gen *g = mem_zalloc(sizeof *g);
    g->vol = vol;
    g->no = ++vol->gen_next;
    weight_begin(g);
    list_init(&g->dirty);
    list_init(&g->waiters);
    list_add_tail(&vol->gens, &g->link);
    vol->open = g;
    return g;
}

bool gen_empty(const struct gen *g)
{
    return !g->n_dirty && !g->n_ranges && !g->n_clears && !g->force && list_empty(&g->waiters) &&
           !g->n_trash_done && !g->n_snapshots_done && !g->gap_closed.upto && !g->n_adopts &&
           !g->new_size;
}

void gen_touch(struct volume *vol, struct blk *e, struct vol_io *io)
{
    struct gen *g = vol->open;
    struct shard *s = vol->shard;
    if (e->gen != g->no) {
        blocks_dequeue(&s->blocks, e);
        e->gen = g->no;
        e->charged = false;
        list_add_tail(&g->dirty, &e->dirty);
        g->n_dirty++;
        weight_touch(g, e->no);
        if (!g->opened_ns) {
            g->opened_ns = env_now_ns(s->env);
            shard_age_start(s);
        }
    }
    if (!e->buf || e->charged)
        return;
    e->charged = true;
    g->dirty_bytes += vol->block_size;
    weight_data(g, e);
    if (!io) {
        s->write_bytes += vol->block_size;
        return;
    }
    CHECK(io->held_bytes >= vol->block_size);
    io->held_bytes -= vol->block_size;
    uint64_t cost = store_body_cost(s->store, vol->block_size);
    CHECK(io->held_space.body_bytes >= cost && io->held_space.keys >= io->held_keys_each);
    io->held_space.body_bytes -= cost;
    io->held_space.keys -= io->held_keys_each;
    g->reserved.body_bytes += cost;
    g->reserved.keys += io->held_keys_each;
}

void gen_adopt(struct volume *vol, unsigned level, uint64_t no)
{
    uint64_t weight = weight_of_row(vol);
    gen_make_fit(vol, 0, weight);
    struct gen *g = vol->open;
    g->weight += weight;
    mem_grow(&g->adopts, &g->cap_adopts, g->n_adopts + 1, sizeof *g->adopts);
    g->adopts[g->n_adopts++] = (struct gen_adopt){.no = no, .level = level};
    if (!g->opened_ns)
        g->opened_ns = env_now_ns(vol->shard->env);
    shard_age_start(vol->shard);
}

void gen_untouch(struct volume *vol, struct blk *e)
{
    struct gen *g = vol->open;
    struct shard *s = vol->shard;
    if (e->gen == g->no) {
        list_remove(&e->dirty);
        g->n_dirty--;
        if (e->charged) {
            /* Its space stays reserved until the commit: simpler, and never too little. */
            g->dirty_bytes -= vol->block_size;
            s->write_bytes -= vol->block_size;
        }
        e->charged = false;
    }
    e->gen = 0;
    blocks_enqueue(&s->blocks, e);
}

static int by_block(const void *a, const void *b)
{
    uint64_t x = ((const struct gen_item *)a)->no, y = ((const struct gen_item *)b)->no;
    return x < y ? -1 : x > y;
}

void gen_seal(struct volume *vol, bool force)
{
    struct gen *g = vol->open;
    if (vol->lost || !g || (gen_empty(g) && !force))
        return;
    size_t i = 0;
    g->items = g->n_dirty ? mem_alloc(g->n_dirty * sizeof *g->items) : NULL;
    struct list *l;
    while ((l = list_pop(&g->dirty))) {
        struct blk *e = container_of(l, struct blk, dirty);
        struct gen_item *item = &g->items[i++];
        *item = (struct gen_item){.no = e->no,
                                  .buf = e->buf ? buf_ref(e->buf) : NULL,
                                  .full = e->full,
                                  .zero = e->zero,
                                  .hole = e->hole,
                                  .bad_base = e->bad_base};
        if (!e->full)
            mask_copy(&item->mask, &e->mask, vol->block_size);
        e->charged = false;
    }
    CHECK(i == g->n_dirty);
    g->n_items = i;
    if (i)
        qsort(g->items, i, sizeof *g->items, by_block);
    g->stage = GEN_SEALED;
    vol->gens_queued++;
    struct gen *next = gen_open(vol);
    next->replayed_log = g->replayed_log;
    pipeline_step(vol);
}

/* --- prepare: rows, then bases ------------------------------------------------------- */

/* Once more does no harm but to memory; who comes again comes soon. */
static void pin_row(struct gen *g, struct row_slot *r)
{
    for (size_t i = g->n_pinned; i > 0 && i + 8 > g->n_pinned; i--)
        if (g->pinned[i - 1] == r)
            return;
    mem_grow(&g->pinned, &g->cap_pinned, g->n_pinned + 1, sizeof *g->pinned);
    g->pinned[g->n_pinned++] = r;
    row_pin(r);
}

/* Pins the rows of one block where they are in memory; else starts loading. */
static bool have_rows(struct gen *g, uint64_t no)
{
    struct volume *vol = g->vol;
    uint64_t row = no >> INDEX_SHIFT;
    if (!index_have(vol, no, no + 1, &g->row_wait))
        return false;
    struct row_slot *r1 = index_row1(vol, row);
    pin_row(g, index_row2(vol, row >> INDEX_SHIFT));
    if (r1)
        pin_row(g, r1);
    return true;
}

static void rows_came(struct row_wait *wait)
{
    prepare_step(container_of(wait, struct gen, row_wait));
}

/* Starts loading for what comes next, so that loads do not go one by one. */
static bool item_rows(struct gen *g)
{
    struct volume *vol = g->vol;
    while (g->prepare_at < g->n_items) {
        uint64_t no = g->items[g->prepare_at].no;
        if (!have_rows(g, no)) {
            size_t ahead = g->prepare_at + 1;
            for (unsigned n = 0; n < 64 && ahead < g->n_items; n++, ahead++) {
                struct row_wait none = {.ready = NULL};
                if (!index_have(vol, g->items[ahead].no, g->items[ahead].no + 1, &none))
                    index_wait_stop(&none);
            }
            return false;
        }
        g->prepare_at++;
    }
    return true;
}

static uint64_t newest_row1(const struct row2 *row)
{
    uint64_t epoch = 0;
    for (unsigned i = 0; i < INDEX_FANOUT; i++)
        if (row->entry[i].kind == ROW2_ROW && !row->entry[i].branch)
            epoch = max_u64(epoch, row->entry[i].epoch);
    return epoch;
}

static void row2_scanned(struct store_read *read, enum status st)
{
    struct row2_read *r2 = container_of(read, struct row2_read, read);
    struct gen *g = r2->gen;
    struct volume *vol = g->vol;
    const struct gen_range *range = &g->ranges[g->scan_range];
    uint64_t end_row2 = range->end >> (2 * INDEX_SHIFT);

    g->inflight--;
    if (st != ST_OK && !vol->lost) {
        store_read_release(read);
        free(r2);
        env_timer_start(vol->shard->env, &g->retry, RETRY_MS);
        return;
    }
    struct row2 *row = mem_alloc(sizeof *row);
    g->scan_next = end_row2;
    for (uint32_t i = 0; i < r2->range.n_pairs; i++) {
        const struct store_pair *pair = &r2->range.pairs[i];
        uint64_t branch, no, epoch;
        unsigned level;
        if (!key_parse_row(pair->key, &branch, &level, &no, &epoch))
            continue;
        /* (The versions of one row may be more than one answer holds.) */
        if (r2->range.more && i + 1 == r2->range.n_pairs) {
            g->scan_next = no;
            g->scan_epoch = epoch + 1;
        }
        if (epoch <= r2->after || epoch > r2->upto)
            continue;
        struct gen_scan *s = g->n_scan ? &g->scan[g->n_scan - 1] : NULL;
        if (!s || s->row2 != no || s->place != g->scan_place) {
            mem_grow(&g->scan, &g->cap_scan, g->n_scan + 1, sizeof *g->scan);
            s = &g->scan[g->n_scan++];
            *s = (struct gen_scan){.row2 = no, .place = g->scan_place, .versions = g->scan_place > 0};
        }
        s->versions |= s->epoch != 0;
        /* The newest comes last and is the one that counts. A damaged one counts nothing, and may
         * name anything. */
        bool whole = row2_decode(row, pair->key, pair->head);
        s->n_data = whole ? (uint32_t)row2_n_data(row) : 0;
        if (r2->branch == vol->branch) {
            s->epoch = epoch;
            s->epoch_rows1 = whole ? newest_row1(row) : epoch;
        }
    }
    free(row);
    store_read_release(read);
    free(r2);
    if (g->scan_next >= end_row2)
        scan_place_done(g);
    prepare_step(g);
}

static int by_row2(const void *a, const void *b)
{
    uint64_t x = ((const struct gen_scan *)a)->row2, y = ((const struct gen_scan *)b)->row2;
    return x < y ? -1 : x > y;
}

static int by_row2_and_place(const void *a, const void *b)
{
    const struct gen_scan *x = a, *y = b;
    int order = by_row2(a, b);
    return order ? order : x->place < y->place ? -1 : x->place > y->place;
}

static struct gen_scan *find_scan(struct gen *g, uint64_t row2)
{
    struct gen_scan probe = {.row2 = row2};
    return g->n_scan ? bsearch(&probe, g->scan, g->n_scan, sizeof probe, by_row2) : NULL;
}

/* Several ranges may have found the same row: it counts once. Found in several places, the first
 * counts. */
static void scans_sort(struct gen *g)
{
    size_t n = 0;
    if (g->n_scan)
        qsort(g->scan, g->n_scan, sizeof *g->scan, by_row2_and_place);
    for (size_t i = 0; i < g->n_scan; i++) {
        if (!n || g->scan[n - 1].row2 != g->scan[i].row2)
            g->scan[n++] = g->scan[i];
        else
            g->scan[n - 1].versions |= g->scan[i].versions;
    }
    g->n_scan = n;
}

/* This place is looked through: the next one, or the next range. */
static void scan_place_done(struct gen *g)
{
    g->scan_next = g->scan_epoch = 0;
    if (g->scan_place++ < g->vol->ancestry.n_segments)
        return;
    g->scan_place = 0;
    g->scan_range++;
}

static struct ancestry_segment scan_segment(const struct gen *g)
{
    const struct volume *vol = g->vol;
    if (g->scan_place)
        return vol->ancestry.segments[g->scan_place - 1];
    return (struct ancestry_segment){vol->branch, vol->ancestry.after, vol->header.epoch};
}

/* For each range: the rows at its edges, and which level-2 rows it covers whole. */
static bool range_rows(struct gen *g)
{
    struct volume *vol = g->vol;
    while (g->scan_range < g->n_ranges) {
        const struct gen_range *range = &g->ranges[g->scan_range];
        if (!have_rows(g, range->first) || !have_rows(g, range->end - 1))
            return false;
        uint64_t unit = 1ull << (2 * INDEX_SHIFT);
        uint64_t first = (range->first + unit - 1) / unit, end = range->end / unit;
        uint64_t from = max_u64(first, g->scan_next);
        if (from >= end) {
            scan_place_done(g);
            continue;
        }
        if (g->link.prev != &vol->gens) {
            /* The rows that older generations change are not in the store yet. */
            g->scan_waits = true;
            return false;
        }
        struct row2_read *r2 = mem_zalloc(sizeof *r2);
        struct ancestry_segment at = scan_segment(g);
        r2->gen = g;
        r2->branch = at.branch;
        r2->after = at.after;
        r2->upto = at.upto;
        key_row(&r2->begin, at.branch, 2, from, from == g->scan_next ? g->scan_epoch : 0);
        key_row(&r2->end, at.branch, 2, end, 0);
        r2->range = (struct store_range){
            .begin = key_slice(&r2->begin), .end = key_slice(&r2->end), .limit = 1024};
        r2->read = owner_read(vol);
        r2->read.ranges = &r2->range;
        r2->read.n_ranges = 1;
        r2->read.done = row2_scanned;
        g->inflight++;
        store_read(vol->shard->store, vol->shard->env, &r2->read);
        return false;
    }
    scans_sort(g);
    return true;
}

static bool clear_rows(struct gen *g)
{
    while (g->prepare_at < g->n_items + g->n_clears) {
        const struct gen_clear *c = &g->clears[g->prepare_at - g->n_items];
        uint64_t no = c->level ? c->no << INDEX_SHIFT : c->no;
        if (!c->certain && !have_rows(g, no))
            return false;
        g->prepare_at++;
    }
    return true;
}

static bool adopt_rows(struct gen *g)
{
    size_t before = g->n_items + g->n_clears;
    while (g->prepare_at < before + g->n_adopts) {
        const struct gen_adopt *a = &g->adopts[g->prepare_at - before];
        if (!have_rows(g, a->no << (a->level * INDEX_SHIFT)))
            return false;
        g->prepare_at++;
    }
    return true;
}

static struct gen_item *find_item(struct gen *g, uint64_t no)
{
    struct gen_item probe = {.no = no};
    return g->n_items ? bsearch(&probe, g->items, g->n_items, sizeof probe, by_block) : NULL;
}

/* What lies under the valid bytes of a block: `data` (NULL: zeros), all of it or where `had`
 * says, or nothing where `lost`. */
struct base {
    const uint8_t *data;
    const struct mask *had;
    bool lost;
};

/* Lays a base under one version. The bytes it fills are in nobody's use, because they were
 * not valid. */
static void lay_under(uint32_t size, uint8_t *data, struct mask *mask, bool *full, bool *bad,
                      const struct base *base)
{
    if (*full)
        return;
    if (!base->lost && !base->had) {
        mask_fill_rest(mask, size, data, base->data);
        *full = true;
    } else if (!base->lost) {
        mask_merge(mask, size, data, base->data, base->had);
        *full = mask_full(mask, size);
    }
    *bad = !*full;
    if (*full)
        mask_free(mask);
}

/* The base of a partly written block is known: it completes every later version too, because
 * none of the bytes they lack was written in between. */
static void base_known(struct gen *g, struct gen_item *item, const struct base *base)
{
    struct volume *vol = g->vol;
    uint32_t size = vol->block_size;
    struct blk *e = blocks_find(&vol->shard->blocks, vol->tag, item->no);

    lay_under(size, item->buf->data, &item->mask, &item->full, &item->bad_base, base);
    for (struct list *l = g->link.next; l != &vol->gens; l = l->next) {
        struct gen *later = container_of(l, struct gen, link);
        struct gen_item *version = find_item(later, item->no);
        if (version && !version->zero)
            lay_under(size, version->buf->data, &version->mask, &version->full,
                      &version->bad_base, base);
    }
    if (e && e->buf && e->gen >= g->no)
        lay_under(size, e->buf->data, &e->mask, &e->full, &e->bad_base, base);
    if (item->bad_base) {
        /* What is stored for the lost bytes must be one thing: zeros, in a buffer that no
         * later load changes. */
        struct buf *copy = blocks_buf(&vol->shard->blocks, size);
        struct mask rest;
        memcpy(copy->data, item->buf->data, size);
        mask_copy(&rest, &item->mask, size);
        mask_fill_rest(&rest, size, copy->data, NULL);
        mask_free(&rest);
        buf_unref(item->buf);
        item->buf = copy;
    }
}

static void bases_digest(struct store_read *read)
{
    struct gen_bases *b = container_of(read, struct gen_bases, read);
    uint32_t size = b->gen->vol->block_size;
    for (uint32_t i = 0; i < b->n; i++) {
        struct gen_base *base = &b->base[i];
        base->ok = b->gets[i].st == ST_OK &&
                   block_decode(&base->place, b->gets[i].head, base->buf->data,
                                b->gets[i].body_len, size, &base->mask);
    }
}

static void bases_read(struct store_read *read, enum status st)
{
    struct gen_bases *b = container_of(read, struct gen_bases, read);
    struct gen *g = b->gen;
    struct volume *vol = g->vol;
    /* A store out of reach says nothing about these blocks, and what a disk failed to read once
     * it may read the next time; what is given up here is lost. */
    bool unread = st == ST_IO;
    for (uint32_t i = 0; i < b->n && st == ST_OK; i++)
        unread |= b->gets[i].st == ST_IO;
    if (!vol->lost && ((st != ST_OK && st != ST_IO) || (unread && g->base_tries++ < BASE_TRIES))) {
        g->bases_wanted = (size_t)(b->base[0].item - g->items);
        for (uint32_t i = 0; i < b->n; i++)
            buf_unref(b->base[i].buf);
        store_read_release(read);
        free(b);
        g->inflight--;
        env_timer_start(vol->shard->env, &g->retry, RETRY_MS);
        return;
    }
    g->base_tries = 0;
    for (uint32_t i = 0; i < b->n; i++) {
        struct gen_base *got = &b->base[i];
        struct gen_item *item = got->item;
        bool ok = st == ST_OK && got->ok;
        struct mask had;
        mask_init(&had);
        if (ok && got->mask.len)
            ok = mask_decode(&had, vol->block_size, got->mask);
        if (!ok) {
            vol->stats.hash_errors++;
            log_volume_error(vol->name,
                             "volume %s: block %llu can't be read: %s; what was not overwritten "
                             "of it is lost",
                             vol->name, (unsigned long long)item->no,
                             st != ST_OK              ? status_text(st)
                             : b->gets[i].st == ST_OK ? "its hash does not match"
                                                      : status_text(b->gets[i].st));
        }
        if (!item->full && !vol->lost)
            base_known(g, item,
                       &(struct base){.data = got->buf->data,
                                      .had = got->mask.len ? &had : NULL,
                                      .lost = !ok});
        mask_free(&had);
        buf_unref(got->buf);
    }
    store_read_release(read);
    free(b);
    g->inflight--;
    prepare_step(g);
}

/* Finds the base of each partly written block: zeros, or a read. */
static bool item_bases(struct gen *g)
{
    struct volume *vol = g->vol;
    struct gen_bases *b = NULL;
    while (g->bases_wanted < g->n_items) {
        struct gen_item *item = &g->items[g->bases_wanted];
        struct blk *e = blocks_find(&vol->shard->blocks, vol->tag, item->no);
        if (!item->full && !item->bad_base && e && e->buf == item->buf && e->full) {
            /* A read loaded it meanwhile. */
            mask_free(&item->mask);
            item->full = true;
        }
        if (item->full || item->bad_base) {
            g->bases_wanted++;
            continue;
        }
        struct row_source src;
        if (index_lookup(vol, item->no, &src) != SOURCE_FIRST) {
            base_known(g, item, &(struct base){.data = NULL});
            g->bases_wanted++;
            continue;
        }
        if (!b) {
            b = mem_zalloc(sizeof *b);
            b->gen = g;
        }
        if (b->n == BASES_AT_ONCE)
            break;
        struct gen_base *base = &b->base[b->n];
        base->item = item;
        base->place = (struct block_place){src.branch, src.epoch, item->no};
        base->buf = blocks_buf(&vol->shard->blocks, vol->block_size);
        key_block(&base->key, src.branch, src.epoch, item->no);
        b->gets[b->n++] = (struct store_get){
            .key = key_slice(&base->key), .body = base->buf->data, .body_cap = vol->block_size};
        g->bases_wanted++;
    }
    if (!b)
        return true;
    b->read = owner_read(vol);
    b->read.gets = b->gets;
    b->read.n_gets = b->n;
    b->read.digest = bases_digest;
    b->read.done = bases_read;
    g->inflight++;
    store_read(vol->shard->store, vol->shard->env, &b->read);
    return false;
}

/* --- encode, on workers -------------------------------------------------------------- */

static void encode_work(struct env_work *work)
{
    struct gen_encode *enc = container_of(work, struct gen_encode, work);
    struct gen *g = enc->gen;
    const struct volume *vol = g->vol;
    uint32_t size = vol->block_size;
    uint8_t *out = enc->out;
    uint8_t *head = enc->heads;
    bool shrinks = true; /* the block before did */

    for (size_t i = enc->first; i < enc->first + enc->n; i++) {
        struct gen_item *item = &g->items[i];
        if (item->zero)
            continue;
        if (item->full && block_is_zero(item->buf->data, size)) {
            item->encoded_zero = true;
            continue;
        }
        struct block_place place = {vol->branch, vol->header.epoch, item->no};
        struct slice mask = {NULL, 0};
        uint8_t *runs = NULL;
        item->head = head;
        if (item->bad_base) {
            mask.len = mask_encode(&item->mask, size, &runs);
            mask.data = runs;
            item->head = mem_alloc(BLOCK_HEAD_BYTES_MAX + mask.len);
        }
        struct codec codec = vol->codec;
        if (!out || (!shrinks && !block_may_shrink(item->buf->data, size)))
            codec.kind = CODEC_NONE;
        item->head_len = (uint32_t)block_encode(codec, &place, g->no, item->buf->data, size,
                                                BLOCK_SIZE_MIN, mask, out, item->head,
                                                &item->body);
        free(runs);
        shrinks = item->body.data != item->buf->data;
        if (shrinks)
            out += round_up_u64(item->body.len, BLOCK_SIZE_MIN);
        if (!item->bad_base)
            head += BLOCK_HEAD_BYTES_MAX;
    }
}

static void encode_done(struct env_work *work)
{
    struct gen_encode *enc = container_of(work, struct gen_encode, work);
    struct gen *g = enc->gen;
    g->inflight--;
    if (--g->encodes_left == 0)
        g->stage = GEN_ENCODED;
    if (g->vol->lost)
        volume_progress(g->vol);
    else if (g->stage == GEN_ENCODED)
        pipeline_step(g->vol);
}

static void encode_start(struct gen *g)
{
    struct volume *vol = g->vol;
    size_t n = (g->n_items + ENCODE_BLOCKS - 1) / ENCODE_BLOCKS;
    g->stage = GEN_ENCODING;
    if (!n) {
        g->stage = GEN_ENCODED;
        pipeline_step(vol);
        return;
    }
    g->encodes = mem_zalloc(n * sizeof *g->encodes);
    g->encodes_left = n;
    for (size_t i = 0; i < n; i++) {
        struct gen_encode *enc = &g->encodes[i];
        enc->gen = g;
        enc->first = i * ENCODE_BLOCKS;
        enc->n = min_u64(ENCODE_BLOCKS, g->n_items - enc->first);
        enc->heads = mem_alloc(enc->n * BLOCK_HEAD_BYTES_MAX);
        if (vol->codec.kind != CODEC_NONE && vol->block_size > BLOCK_SIZE_MIN)
            enc->out = mem_alloc_aligned(BLOCK_SIZE_MIN, enc->n * vol->block_size);
        enc->work.work = encode_work;
        enc->work.done = encode_done;
        g->inflight++;
        env_work(vol->shard->env, &enc->work);
    }
}

static void prepare_step(struct gen *g)
{
    if (g->vol->lost) {
        volume_progress(g->vol);
        return;
    }
    if (!range_rows(g) || !item_rows(g) || !clear_rows(g) || !adopt_rows(g) ||
        !item_bases(g))
        return;
    encode_start(g);
}

static void prepare_retry(struct env_timer *timer)
{
    prepare_step(container_of(timer, struct gen, retry));
}

/* --- build: the index in memory changes, the commit is put together ------------------ */

static struct slice keep_key(struct gen *g, const struct key *k)
{
    uint8_t *copy = arena_alloc(g, k->len);
    memcpy(copy, k->bytes, k->len);
    return (struct slice){copy, k->len};
}

static struct slice keep_bytes(struct gen *g, const void *data, size_t len)
{
    void *copy = arena_alloc(g, len);
    memcpy(copy, data, len);
    return (struct slice){copy, len};
}

static void mutate(struct gen *g, enum store_mutation_kind kind, const struct key *key,
                   struct slice head, struct slice body)
{
    mem_grow(&g->mutations, &g->cap_mutations, g->n_mutations + 1, sizeof *g->mutations);
    g->mutations[g->n_mutations++] =
        (struct store_mutation){.kind = kind, .key = keep_key(g, key), .head = head, .body = body};
}

static void clear_key(struct gen *g, const struct key *key)
{
    mutate(g, STORE_CLEAR, key, (struct slice){0}, (struct slice){0});
}

/* What a hole is in this volume: nothing to say where nothing is below it. */
static uint8_t hole_kind(const struct volume *vol, uint8_t kind)
{
    return kind == SOURCE_HOLE && !vol->header.parent_branch ? SOURCE_ABSENT : kind;
}

int built_range_over(const struct volume *vol, uint64_t row2, uint64_t *epoch)
{
    uint64_t first = row2 << (2 * INDEX_SHIFT), end = (row2 + 1) << (2 * INDEX_SHIFT);
    if (!vol->n_ranges_uncommitted)
        return -1;
    for (struct list *l = vol->gens.prev; l != &vol->gens; l = l->prev) {
        const struct gen *g = container_of(l, struct gen, link);
        if (g->stage < GEN_BUILT)
            continue;
        for (size_t i = g->n_ranges; i > 0; i--)
            if (g->ranges[i - 1].first <= first && end <= g->ranges[i - 1].end) {
                *epoch = g->epoch;
                return hole_kind(vol, g->ranges[i - 1].kind);
            }
    }
    return -1;
}

static void row_changed(struct gen *g, struct row_slot *r)
{
    pin_row(g, r);
    r->changed = true;
}

/* Whether nobody but the volume as it is now names what stands under a key of this branch and epoch:
 * then it goes when the volume lets go of it. */
static bool unshared(const struct volume *vol, uint64_t branch, uint64_t epoch)
{
    return branch == vol->branch && epoch > vol->protected_epoch && epoch > 0;
}

/* The index lets go of this version of a block. */
static void drop_source(struct gen *g, const struct row_source *src, uint64_t no)
{
    if (unshared(g->vol, src->branch, src->epoch)) {
        struct key key;
        key_block(&key, src->branch, src->epoch, no);
        clear_key(g, &key);
    }
}

static void drop_block(struct gen *g, const struct row_slot *r1, uint64_t no)
{
    const struct row_source *src = row1_data(&r1->row1, no & (INDEX_FANOUT - 1));
    if (!src)
        return;
    g->vol->data_blocks--;
    drop_source(g, src, no);
}

/* A row that was stored under another epoch is stored under the current one from now on. */
static void drop_row(struct gen *g, unsigned level, uint64_t no, uint64_t branch, uint64_t epoch)
{
    if (epoch != g->vol->header.epoch && unshared(g->vol, branch, epoch)) {
        struct key key;
        key_row(&key, branch, level, no, epoch);
        clear_key(g, &key);
    }
}

static void set_fixed(struct gen *g, uint64_t no, uint8_t kind)
{
    struct volume *vol = g->vol;
    unsigned i = no & (INDEX_FANOUT - 1);
    if (index_lookup(vol, no, NULL) == kind)
        return;
    struct row_slot *r1 = index_edit_row1(vol, no >> INDEX_SHIFT);
    drop_block(g, r1, no);
    row1_fill(&r1->row1, i, i + 1, kind);
    row_changed(g, r1);
}

static void trash_record(struct gen *g, const struct trash_record *rec)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    key_trash(&key, g->vol->branch, g->state_after.trash_next++);
    size_t len = trash_encode(rec, key_slice(&key), bytes);
    mutate(g, STORE_SET, &key, keep_bytes(g, bytes, len), (struct slice){0});
}

static void put_trash(struct gen *g)
{
    if (g->trash_first == g->trash_end)
        return;
    trash_record(g, &(struct trash_record){.after = g->vol->protected_epoch,
                                           .epoch = g->vol->header.epoch,
                                           .first_block = g->trash_first,
                                           .end_block = g->trash_end});
    g->trash_first = g->trash_end = 0;
}

/* What one trim left becomes one record, with what lies close before it: the cleaner reads the
 * keys that exist, so untouched holes between cost nothing and live blocks little. */
static void add_trash(struct gen *g, uint64_t first, uint64_t end, uint64_t trim_first)
{
    bool near = first >= g->trash_end && trim_first <= g->trash_end + 2 * INDEX_FANOUT;
    if (g->trash_first != g->trash_end && !near)
        put_trash(g);
    if (g->trash_first == g->trash_end)
        g->trash_first = first;
    g->trash_end = end;
}

/* Whether something goes with this level-1 row that nobody else names: a row that is shared names
 * only what is. (Epoch 0: its level-2 row was damaged, so what it was is not known.) */
static bool may_leave_trash(const struct volume *vol, const struct row2_entry *entry)
{
    return !entry->epoch || unshared(vol, row2_branch(vol, entry), entry->epoch);
}

/* Whole level-1 rows [row, end) inside one level-2 row get one source. */
static void fix_rows1(struct gen *g, uint64_t row, uint64_t end, uint8_t kind, uint64_t trim_first)
{
    struct volume *vol = g->vol;
    struct row_slot *r2 = index_row2(vol, row >> INDEX_SHIFT);
    CHECK(r2);
    bool trash = false;
    for (uint64_t r = row; r < end; r++) {
        struct row2_entry *entry = &r2->row2.entry[r & (INDEX_FANOUT - 1)];
        if (entry->kind == ROW2_ROW) {
            struct row_slot *r1 = index_row1(vol, r);
            vol->data_blocks -= r1 ? r1->row1.n_data : entry->n_data;
            trash |= may_leave_trash(vol, entry);
        }
        *entry = (struct row2_entry){.kind = kind};
    }
    row_changed(g, r2);
    index_fix_rows1(vol, row, end, kind);
    if (trash)
        add_trash(g, row << INDEX_SHIFT, end << INDEX_SHIFT, trim_first);
}

/* Whether zeros before this range, in the same generation, have stored a level-2 row that was not
 * there before. */
static bool zeroed_before(const struct gen *g, const struct gen_range *range, uint64_t row2)
{
    uint64_t first = row2 << (2 * INDEX_SHIFT), end = (row2 + 1) << (2 * INDEX_SHIFT);
    for (const struct gen_range *r = g->ranges; g->zeros_built && r < range; r++)
        if (r->kind == SOURCE_ZERO && r->first <= first && end <= r->end)
            return true;
    return false;
}

static void fix_row2(struct gen *g, const struct gen_range *range, uint64_t row2, uint8_t kind,
                     struct gen_scan *scan)
{
    struct volume *vol = g->vol;
    struct row_slot *r2 = index_row2(vol, row2);
    struct key key;
    bool trash = false;
    if (r2) {
        for (unsigned i = 0; i < INDEX_FANOUT; i++) {
            const struct row2_entry *entry = &r2->row2.entry[i];
            if (entry->kind != ROW2_ROW)
                continue;
            /* A row that this generation changed already counts for itself. */
            struct row_slot *r1 = index_row1(vol, (row2 << INDEX_SHIFT) + i);
            vol->data_blocks -= r1 ? r1->row1.n_data : entry->n_data;
            trash |= may_leave_trash(vol, entry);
        }
    } else if (scan && !scan->fixed) {
        trash = unshared(vol, vol->branch, scan->epoch_rows1);
        vol->data_blocks -= scan->n_data;
    }
    if (scan)
        scan->fixed = true;
    index_fix_row2(vol, row2, kind, vol->header.epoch);
    index_fix_rows1(vol, row2 << INDEX_SHIFT, (row2 + 1) << INDEX_SHIFT, kind);
    key_row(&key, vol->branch, 2, row2, vol->header.epoch);
    if (r2) {
        row_changed(g, r2); /* build_rows2() stores it */
    } else if (!scan && kind != SOURCE_ZERO) {
        CHECK(!trash); /* nothing was stored: that says it already */
        if (zeroed_before(g, range, row2))
            clear_key(g, &key);
    } else if (kind == SOURCE_ABSENT && scan->epoch == vol->header.epoch && !scan->versions) {
        clear_key(g, &key);
    } else {
        if (scan && scan->epoch)
            drop_row(g, 2, row2, vol->branch, scan->epoch);
        struct row2 *row = mem_alloc(sizeof *row);
        uint8_t *bytes = mem_alloc(ROW_BYTES_MAX);
        for (unsigned i = 0; i < INDEX_FANOUT; i++)
            row->entry[i] = (struct row2_entry){.kind = kind};
        size_t len = row2_encode(row, key_slice(&key), bytes);
        mutate(g, STORE_SET, &key, keep_bytes(g, bytes, len), (struct slice){0});
        free(bytes);
        free(row);
    }
    if (trash)
        add_trash(g, row2 << (2 * INDEX_SHIFT), (row2 + 1) << (2 * INDEX_SHIFT), range->first);
}

static void build_range(struct gen *g, const struct gen_range *range)
{
    struct volume *vol = g->vol;
    uint8_t kind = hole_kind(vol, range->kind);
    uint64_t no = range->first;
    uint64_t unit1 = INDEX_FANOUT, unit2 = 1ull << (2 * INDEX_SHIFT);

    while (no < range->end) {
        if (no % unit1 || range->end - no < unit1) {
            uint64_t stop = min_u64(range->end, (no / unit1 + 1) * unit1);
            for (; no < stop; no++)
                set_fixed(g, no, kind);
        } else if (no % unit2 || range->end - no < unit2) {
            uint64_t stop = min_u64(range->end / unit1 * unit1, (no / unit2 + 1) * unit2);
            fix_rows1(g, no >> INDEX_SHIFT, stop >> INDEX_SHIFT, kind, range->first);
            no = stop;
        } else {
            uint64_t end_row2 = range->end / unit2;
            uint64_t row2 = no / unit2;
            if (kind != SOURCE_ZERO) {
                /* Rows that are neither stored nor in memory say ABSENT already, which is as good. */
                for (; row2 < end_row2; row2++) {
                    struct gen_scan *scan = find_scan(g, row2);
                    if (scan || index_knows_row2(vol, row2) || zeroed_before(g, range, row2))
                        fix_row2(g, range, row2, kind, scan);
                }
            } else {
                g->zeros_built = true;
                for (; row2 < end_row2; row2++)
                    fix_row2(g, range, row2, kind, find_scan(g, row2));
            }
            no = end_row2 * unit2;
        }
    }
}

static void build_item(struct gen *g, const struct gen_item *item)
{
    struct volume *vol = g->vol;
    struct key key;
    if (item->zero || item->encoded_zero) {
        set_fixed(g, item->no, hole_kind(vol, item->zero && item->hole ? SOURCE_HOLE : SOURCE_ZERO));
        return;
    }
    uint64_t row = item->no >> INDEX_SHIFT;
    struct row_slot *r1 = index_edit_row1(vol, row);
    unsigned i = item->no & (INDEX_FANOUT - 1);
    const struct row_source *had = row1_data(&r1->row1, i);
    if (!had)
        vol->data_blocks++;
    else if (had->branch != vol->branch || had->epoch != vol->header.epoch)
        drop_source(g, had, item->no);
    if (row1_set_data(&r1->row1, i, vol->branch, vol->header.epoch))
        row_changed(g, r1);
    key_block(&key, vol->branch, vol->header.epoch, item->no);
    mutate(g, STORE_SET, &key, (struct slice){item->head, item->head_len}, item->body);
}

/* Whether the index names this version of a block. */
static bool named(struct volume *vol, uint64_t no, uint64_t epoch)
{
    struct row_source src;
    return index_lookup(vol, no, &src) == SOURCE_FIRST && src.branch == vol->branch &&
           src.epoch == epoch;
}

/* The first block from `no` on, below `end`, whose being named is `is`; else `end`. */
static uint64_t next_named(struct volume *vol, uint64_t no, uint64_t end, uint64_t epoch, bool is)
{
    while (no < end && named(vol, no, epoch) != is)
        no++;
    return no;
}

static void clear_run(struct gen *g, uint64_t epoch, uint64_t first, uint64_t end)
{
    struct volume *vol = g->vol;
    struct key begin, behind;
    key_block(&begin, vol->branch, epoch, first);
    key_block(&behind, vol->branch, epoch, end);
    /* One that goes on where the last one ended makes it longer. */
    struct store_mutation *last = g->n_mutations ? &g->mutations[g->n_mutations - 1] : NULL;
    if (last && last->kind == STORE_CLEAR_RANGE && last->head.len == begin.len &&
        memcmp(last->head.data, begin.bytes, begin.len) == 0)
        last->head = keep_key(g, &behind);
    else
        mutate(g, STORE_CLEAR_RANGE, &begin, keep_key(g, &behind), (struct slice){0});
}

/* Clears what the index does not name of some blocks of one row, without looking whether it is
 * there. */
static void build_clear_blocks(struct gen *g, const struct gen_clear *c)
{
    struct volume *vol = g->vol;
    uint64_t end = c->no + c->n_blocks;
    uint32_t runs = 0;
    if (!index_row1(vol, c->no >> INDEX_SHIFT)) {
        clear_run(g, c->epoch, c->no, end);
        return;
    }
    for (uint64_t no = next_named(vol, c->no, end, c->epoch, false); no < end; runs++) {
        no = next_named(vol, no, end, c->epoch, true);
        no = next_named(vol, no, end, c->epoch, false);
    }
    if (runs > c->runs_max) {
        /* The row was written since: it is left to a later generation. */
        trash_record(g, &(struct trash_record){.after = c->epoch - 1,
                                               .epoch = c->epoch,
                                               .first_block = c->no,
                                               .end_block = end});
        return;
    }
    for (uint64_t no = next_named(vol, c->no, end, c->epoch, false); no < end;) {
        uint64_t behind = next_named(vol, no, end, c->epoch, true);
        clear_run(g, c->epoch, no, behind);
        no = next_named(vol, behind, end, c->epoch, false);
    }
}

static void build_clear_certain(struct gen *g, const struct gen_clear *c)
{
    struct volume *vol = g->vol;
    struct key key;
    uint64_t end = c->no + max_u64(c->n_blocks, 1);
    /* Keys of the current epoch may be written anew. */
    CHECK(c->epoch < vol->header.epoch);
    if (c->level) {
        key_row(&key, vol->branch, c->level, c->no, c->epoch);
        clear_key(g, &key);
        return;
    }
    if (vol->shard->store->limits.clears_ranges) {
        clear_run(g, c->epoch, c->no, end);
        return;
    }
    for (uint64_t no = c->no; no < end; no++) {
        key_block(&key, vol->branch, c->epoch, no);
        clear_key(g, &key);
    }
}

static void build_clear(struct gen *g, const struct gen_clear *c)
{
    struct volume *vol = g->vol;
    struct key key;
    if (c->certain) {
        build_clear_certain(g, c);
        return;
    }
    if (g->unsure_changes != vol->history_changes)
        return; /* a snapshot may name it now: the cleaner looks again */
    /* What the current index does not name, a snapshot may. */
    CHECK(!history_live_at_or_above(&vol->history, c->epoch));
    if (c->n_blocks) {
        build_clear_blocks(g, c);
        return;
    }
    if (c->level == 0) {
        if (named(vol, c->no, c->epoch))
            return;
        key_block(&key, vol->branch, c->epoch, c->no);
    } else {
        struct row_slot *r2 = index_row2(vol, c->no >> INDEX_SHIFT);
        const struct row2_entry *entry = &r2->row2.entry[c->no & (INDEX_FANOUT - 1)];
        if (entry->kind == ROW2_ROW && !entry->branch && entry->epoch == c->epoch)
            return;
        key_row(&key, vol->branch, 1, c->no, c->epoch);
    }
    clear_key(g, &key);
}

/* Writes changed level-1 rows and what they mean for their level-2 rows. */
static void build_rows1(struct gen *g, uint8_t *bytes)
{
    struct volume *vol = g->vol;
    size_t n = g->n_pinned;
    for (size_t i = 0; i < n; i++) {
        struct row_slot *r1 = g->pinned[i];
        if (r1->level != 1 || !r1->changed)
            continue;
        r1->changed = false;
        index_recount(r1);
        struct row_slot *r2 = index_row2(vol, r1->no >> INDEX_SHIFT);
        CHECK(r2);
        struct row2_entry *entry = &r2->row2.entry[r1->no & (INDEX_FANOUT - 1)];
        struct row2_entry was = *entry;
        int uniform = row1_uniform(&r1->row1);
        struct key key;
        key_row(&key, vol->branch, 1, r1->no, vol->header.epoch);
        if (uniform >= 0) {
            *entry = (struct row2_entry){.kind = (uint8_t)uniform};
            if (was.kind == ROW2_ROW && row2_branch(vol, &was) == vol->branch &&
                was.epoch == vol->header.epoch)
                clear_key(g, &key);
        } else {
            *entry = (struct row2_entry){.kind = ROW2_ROW,
                                         .epoch = vol->header.epoch,
                                         .n_data = (uint16_t)r1->row1.n_data};
            size_t len = row1_encode(&r1->row1, key_slice(&key), bytes);
            mutate(g, STORE_SET, &key, keep_bytes(g, bytes, len), (struct slice){0});
        }
        if (was.kind == ROW2_ROW)
            drop_row(g, 1, r1->no, row2_branch(vol, &was), was.epoch);
        if (entry->kind != was.kind || entry->epoch != was.epoch || entry->n_data != was.n_data ||
            entry->branch != was.branch)
            row_changed(g, r2);
    }
}

static void build_rows2(struct gen *g, uint8_t *bytes)
{
    struct volume *vol = g->vol;
    for (size_t i = 0; i < g->n_pinned; i++) {
        struct row_slot *r2 = g->pinned[i];
        if (r2->level != 2 || !r2->changed)
            continue;
        r2->changed = false;
        bool absent = vol->header.epoch == 1 && !vol->ancestry.n_segments;
        for (unsigned k = 0; absent && k < INDEX_FANOUT; k++)
            absent = r2->row2.entry[k].kind == ROW2_ABSENT;
        struct key key;
        key_row(&key, vol->branch, 2, r2->no, vol->header.epoch);
        if (absent) {
            clear_key(g, &key);
        } else {
            size_t len = row2_encode(&r2->row2, key_slice(&key), bytes);
            mutate(g, STORE_SET, &key, keep_bytes(g, bytes, len), (struct slice){0});
            drop_row(g, 2, r2->no, r2->branch, r2->epoch);
        }
        r2->branch = absent ? 0 : vol->branch;
        r2->epoch = absent ? 0 : vol->header.epoch;
    }
}

static void build_state(struct gen *g)
{
    struct volume *vol = g->vol;
    struct shard *s = vol->shard;
    struct state_record *st = &g->state_after;
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    st->generation = g->no;
    if (g->has_changes)
        st->changed = g->no;
    st->data_blocks = vol->data_blocks;
    for (uint32_t i = 0; i < st->n_logs; i++) {
        if (g->replayed_log && st->logs[i].log_id == g->replayed_log)
            st->logs[i].applied_seq = max_u64(st->logs[i].applied_seq, g->replayed_seq);
        else if (!vol->replaying && s->log && st->logs[i].log_id == store_log_id(s->log))
            st->logs[i].applied_seq = max_u64(st->logs[i].applied_seq, g->last_seq);
    }
    key_state(&key, vol->branch);
    size_t len = state_encode(st, key_slice(&key), bytes);
    mutate(g, STORE_SET, &key, keep_bytes(g, bytes, len), (struct slice){0});
    if (g->snapshot) {
        g->snapshot->size = vol->header.size;
        g->snapshot->data_blocks = vol->data_blocks;
        key_snapshot(&key, vol->branch, vol->header.epoch);
        len = snapshot_encode(g->snapshot, key_slice(&key), bytes);
        mutate(g, STORE_SET, &key, keep_bytes(g, bytes, len), (struct slice){0});
        snapshot_built(g);
    }
    if (g->new_size || g->snapshot || g->detach) {
        struct header_record header = vol->header;
        if (g->new_size)
            header.size = g->new_size;
        key_header(&key, vol->branch);
        len = header_encode(&header, key_slice(&key), bytes);
        mutate(g, STORE_SET, &key, keep_bytes(g, bytes, len), (struct slice){0});
    }
    for (size_t i = 0; i < g->n_trash_done && g->unsure_changes == vol->history_changes; i++) {
        key_trash(&key, vol->branch, g->trash_done[i]);
        clear_key(g, &key);
    }
    for (size_t i = 0; i < g->n_snapshots_done; i++) {
        key_snapshot(&key, vol->branch, g->snapshots_done[i]);
        clear_key(g, &key);
    }
}

/* The ancestry as the newest generation that was built before this one leaves it. */
static const struct ancestry_record *ancestry_before(const struct gen *g)
{
    for (struct list *l = g->link.prev; l != &g->vol->gens; l = l->prev) {
        const struct gen *before = container_of(l, struct gen, link);
        if (before->ancestry)
            return before->ancestry;
    }
    return &g->vol->ancestry;
}

static void build_adopt(struct gen *g, const struct gen_adopt *a)
{
    struct volume *vol = g->vol;
    struct row_slot *r = a->level == 2 ? index_row2(vol, a->no) : index_row1(vol, a->no);
    if (r)
        row_changed(g, r);
}

static void put_ancestry(struct gen *g)
{
    struct key key;
    uint8_t bytes[RECORD_BYTES_MAX];
    key_ancestry(&key, g->vol->branch);
    if (ancestry_empty(g->ancestry)) {
        clear_key(g, &key);
        return;
    }
    size_t len = ancestry_encode(g->ancestry, key_slice(&key), bytes);
    mutate(g, STORE_SET, &key, keep_bytes(g, bytes, len), (struct slice){0});
}

/* Nothing of the epochs that were rolled back is left: they are epochs like others again. And nothing
 * is inherited any more, so there is no parent. In memory the ancestry changes with the commit:
 * until then what is stored may still have keys of those epochs. */
static void build_ancestry(struct gen *g)
{
    struct volume *vol = g->vol;
    if (!g->gap_closed.upto && !g->detach)
        return;
    if (g->gap_closed.upto && vol->shard->store->limits.clears_ranges) {
        struct key begin, end;
        key_prefix_blocks(&begin, vol->branch, g->gap_closed.after + 1);
        key_prefix_blocks(&end, vol->branch, g->gap_closed.upto + 1);
        mutate(g, STORE_CLEAR_RANGE, &begin, keep_key(g, &end), (struct slice){0});
    }
    g->ancestry = mem_alloc(sizeof *g->ancestry);
    *g->ancestry = *ancestry_before(g);
    if (g->gap_closed.upto)
        ancestry_close_gap(g->ancestry, vol->branch, g->gap_closed.upto);
    if (g->detach) {
        struct key child;
        CHECK(!history_newest_live(&vol->history));
        ancestry_forget_parents(g->ancestry, vol->branch);
        key_child(&child, vol->header.parent_branch, vol->header.parent_epoch, vol->branch);
        clear_key(g, &child);
        vol->header.parent_branch = vol->header.parent_epoch = 0;
    }
    put_ancestry(g);
}

/* Everything that was counted when it came must cover what came of it. */
static void check_weight(const struct gen *g)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < g->n_mutations; i++)
        sum += weight_of_mutation(&g->mutations[i]);
    CHECK(sum <= g->weight && sum <= g->vol->shard->commit_bytes_max);
}

static void build(struct gen *g, const struct state_record *before)
{
    struct volume *vol = g->vol;
    uint8_t *bytes = mem_alloc(ROW_BYTES_MAX);
    g->state_after = *before;
    g->epoch = vol->header.epoch;
    for (size_t i = 0; i < g->n_pinned; i++)
        CHECK(!g->pinned[i]->loading);
    for (size_t i = 0; i < g->n_ranges; i++)
        build_range(g, &g->ranges[i]);
    put_trash(g);
    vol->n_ranges_unbuilt -= g->n_ranges;
    for (size_t i = 0; i < g->n_items; i++)
        build_item(g, &g->items[i]);
    for (size_t i = 0; i < g->n_clears; i++)
        build_clear(g, &g->clears[i]);
    for (size_t i = 0; i < g->n_adopts; i++)
        build_adopt(g, &g->adopts[i]);
    build_rows1(g, bytes);
    build_rows2(g, bytes);
    build_ancestry(g);
    build_state(g);
    free(bytes);
    check_weight(g);
}

/* --- commit -------------------------------------------------------------------------- */

static void gen_free(struct gen *g)
{
    struct volume *vol = g->vol;
    struct shard *s = vol->shard;
    env_timer_stop(s->env, &g->retry);
    index_wait_stop(&g->row_wait);
    for (size_t i = 0; i < g->n_items; i++) {
        struct gen_item *item = &g->items[i];
        if (item->buf)
            buf_unref(item->buf);
        mask_free(&item->mask);
        if (item->bad_base && item->head)
            free(item->head);
    }
    if (g->encodes) {
        for (size_t i = 0; i < (g->n_items + ENCODE_BLOCKS - 1) / ENCODE_BLOCKS; i++) {
            free(g->encodes[i].out);
            free(g->encodes[i].heads);
        }
        free(g->encodes);
    }
    for (size_t i = 0; i < g->n_pinned; i++)
        row_unpin(g->pinned[i]);
    while (g->arena) {
        struct chunk *next = g->arena->next;
        free(g->arena);
        g->arena = next;
    }
    s->write_bytes -= g->dirty_bytes;
    vol->n_ranges_uncommitted -= g->n_ranges;
    store_unreserve(s->store, g->reserved);
    list_remove(&g->link);
    free(g->items);
    free(g->ranges);
    free(g->clears);
    free(g->trash_done);
    free(g->snapshot);
    free(g->snapshots_done);
    free(g->adopts);
    free(g->ancestry);
    free(g->scan);
    free(g->pinned);
    free(g->mutations);
    free(g);
}

/* `snapshot_epoch`: of the snapshot that was committed; 0: none. */
static void answer_waiters(struct volume *vol, struct list *waiters, uint64_t snapshot_epoch,
                           enum status st)
{
    struct list *l;
    while ((l = list_pop(waiters))) {
        struct vol_io *io = container_of(l, struct vol_io, link);
        if (io->kind == IO_READ || io->kind == IO_STATUS)
            fetch_resume(vol, io);
        else if (io->kind == IO_SNAPSHOT || io->kind == IO_FLATTEN)
            snapshot_answer(io, snapshot_epoch, st);
        else
            volume_end_io(vol, io, st);
    }
}

void gen_owes(struct gen *g, const struct vol_io *io)
{
    if (io->kind == IO_WRITE || io->kind == IO_ZERO || io->kind == IO_TRIM)
        g->vol->owed_gen = max_u64(g->vol->owed_gen, g->no);
}

static void commit_start(struct gen *g);

static void commit_retry(struct env_timer *timer)
{
    struct gen *g = container_of(timer, struct gen, retry);
    if (!g->vol->lost)
        commit_start(g);
}

/* The commit failed and nothing happened: the data stays dirty, whoever waits for its
 * durability is told, and it is tried again until it succeeds (G6). Where the medium fails,
 * that goes for all who wait for this commit; a store that is full or out of reach makes
 * writes wait instead. */
static void commit_failed(struct gen *g, enum status st)
{
    struct volume *vol = g->vol;
    struct list told = LIST_INIT(told);
    vol->stats.commit_retries++;
    if (g->tries++ % 30 == 0)
        log_volume_error(vol->name,
                         "volume %s: a commit failed: %s; it is tried again every %u ms, writes "
                         "wait", vol->name, status_text(st), RETRY_MS);
    list_for_each_safe(l, next, &g->waiters)
    {
        const struct vol_io *io = container_of(l, struct vol_io, link);
        /* A snapshot that was told to have failed must not be there later. */
        bool waits = io->kind == IO_SNAPSHOT || io->kind == IO_FLATTEN;
        if ((st == ST_IO && !waits) || io->kind == IO_FLUSH || io->kind == IO_SYNC ||
            io->kind == IO_RESIZE) {
            list_remove(l);
            list_add_tail(&told, l);
            gen_owes(g, io);
        }
    }
    struct list *l;
    while ((l = list_pop(&told)))
        volume_end_io(vol, container_of(l, struct vol_io, link), st == ST_NOSPC ? ST_NOSPC : ST_IO);
    g->stage = GEN_COMMITTING;
    g->retry.fire = commit_retry;
    env_timer_start(vol->shard->env, &g->retry, RETRY_MS);
}

static void commit_done(struct store_commit *commit, enum status st)
{
    struct gen *g = container_of(commit, struct gen, commit);
    struct volume *vol = g->vol;
    struct shard *s = vol->shard;

    g->inflight--;
    if (vol->lost) {
        volume_progress(vol);
        return;
    }
    if (st == ST_CONFLICT) {
        vol->stats.conflicts++;
        volume_lose(vol, "another server owns it now");
        volume_progress(vol);
        return;
    }
    if (st != ST_OK) {
        commit_failed(g, st);
        return;
    }
    vol->stats.commits++;
    histogram_add(&vol->stats.commit_time, env_now_ns(s->env) - g->commit_sent_ns, 1);
    vol->state = g->state_after;
    vol->committed_gen = g->no;
    uint64_t snapshot_epoch = g->snapshot ? g->snapshot_epoch : 0;
    if (snapshot_epoch)
        vol->committed_epoch = snapshot_epoch;
    if (g->new_size) {
        vol->header.size = g->new_size;
        vol->size = g->new_size;
    }
    for (size_t i = 0; i < g->n_items; i++) {
        struct blk *e = blocks_find(&s->blocks, vol->tag, g->items[i].no);
        if (e && e->gen == g->no) {
            e->gen = 0;
            blocks_enqueue(&s->blocks, e);
        }
    }
    for (size_t i = 0; i < g->n_snapshots_done; i++)
        history_forget(&vol->history, g->snapshots_done[i]);
    if (g->ancestry)
        vol->ancestry = *g->ancestry;
    s->space_refused = false;
    s->timeout_told = false;
    vol->gens_queued--;
    struct list waiters = LIST_INIT(waiters);
    list_splice_tail(&waiters, &g->waiters);
    cleaner_committed(vol, g);
    gen_free(g);
    /* First the next commit, then the answers: the store is the slower one. */
    if (!vol->gens_queued && !shard_uses_log(s))
        gen_seal(vol, false);
    pipeline_step(vol);
    answer_waiters(vol, &waiters, snapshot_epoch, ST_OK);
    shard_wake_writers(s);
    volume_progress(vol);
}

static void commit_start(struct gen *g)
{
    struct volume *vol = g->vol;
    struct shard *s = vol->shard;
    g->stage = GEN_COMMITTING;
    g->check = (struct store_check){.kind = STORE_CHECK_VALUE,
                                    .key = key_slice(&vol->owner_key),
                                    .value = {vol->owner_bytes, vol->owner_len}};
    g->commit = (struct store_commit){.checks = &g->check,
                                      .n_checks = 1,
                                      .mutations = g->mutations,
                                      .n_mutations = g->n_mutations,
                                      .reserved = true,
                                      .tag = vol->branch,
                                      .done = commit_done};
    if (s->log) {
        g->commit.log = s->log;
        g->commit.log_keep_from = shard_log_keep(s, g);
    }
    g->inflight++;
    g->commit_sent_ns = env_now_ns(s->env);
    store_commit(s->store, s->env, &g->commit);
}

/* Moves each generation on as far as its place in the line allows. */
static void pipeline_step(struct volume *vol)
{
    if (vol->lost)
        return;
    list_for_each_safe(l, next, &vol->gens)
    {
        struct gen *g = container_of(l, struct gen, link);
        struct gen *before =
            l->prev == &vol->gens ? NULL : container_of(l->prev, struct gen, link);
        switch (g->stage) {
        case GEN_PREPARING:
            if (g->scan_waits && !before) {
                g->scan_waits = false;
                prepare_step(g);
            }
            return;
        case GEN_OPEN:
        case GEN_ENCODING:
            return;
        case GEN_SEALED:
            g->stage = GEN_PREPARING;
            g->row_wait.ready = rows_came;
            g->retry.fire = prepare_retry;
            prepare_step(g);
            return;
        case GEN_ENCODED:
            build(g, before ? &before->state_after : &vol->state);
            g->stage = GEN_BUILT;
            break;
        case GEN_BUILT:
        case GEN_COMMITTING:
            break;
        }
        if (g->stage == GEN_BUILT && !before)
            commit_start(g);
    }
}

bool gen_all_quiet(const struct volume *vol)
{
    list_for_each(l, &vol->gens)
        if (container_of(l, struct gen, link)->inflight)
            return false;
    return true;
}

void gen_fail_waiters(struct volume *vol)
{
    struct list waiters = LIST_INIT(waiters);
    list_for_each(l, &vol->gens)
        list_splice_tail(&waiters, &container_of(l, struct gen, link)->waiters);
    answer_waiters(vol, &waiters, 0, ST_PERM);
}

void gen_free_all(struct volume *vol)
{
    while (!list_empty(&vol->gens)) {
        struct gen *g = container_of(vol->gens.next, struct gen, link);
        struct list *l;
        while ((l = list_pop(&g->dirty)))
            container_of(l, struct blk, dirty)->gen = 0;
        CHECK(list_empty(&g->waiters));
        gen_free(g);
    }
    vol->open = NULL;
}
