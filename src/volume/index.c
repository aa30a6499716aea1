#include "volume/index.h"

#include <stdlib.h>

#include "volume/internal.h"
#include "volume/rowread.h"

#define ROWS_LOADED_AT_ONCE 512u
#define ROWS2_AHEAD 16u
#define RETRY_MS 1000u

void index_init(struct index *ix)
{
    ix->table_mask = 63;
    ix->count = 0;
    ix->table = mem_zalloc((ix->table_mask + 1) * sizeof *ix->table);
}

static uint64_t slot_hash(unsigned level, uint64_t no)
{
    uint64_t h = (no * 2 + level) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 31;
}

/* A level-1 row that names many epochs has a long table: up to as much again as the row. */
static uint64_t slot_bytes(const struct row_slot *r)
{
    return r->level == 1 ? offsetof(struct row_slot, row1) + sizeof(struct row1) +
                               r->row1.cap_sources * sizeof *r->row1.sources
                         : sizeof(struct row_slot);
}

void index_recount(struct row_slot *r)
{
    struct rows_lru *rows = &r->vol->shard->rows;
    rows->bytes -= r->bytes;
    r->bytes = slot_bytes(r);
    rows->bytes += r->bytes;
}

static struct row_slot *slot_find(const struct volume *vol, unsigned level, uint64_t no)
{
    const struct index *ix = &vol->index;
    struct row_slot *r = ix->table[slot_hash(level, no) & ix->table_mask];
    while (r && (r->no != no || r->level != level))
        r = r->chain;
    return r;
}

static void slot_free(struct row_slot *r)
{
    struct index *ix = &r->vol->index;
    struct row_slot **p = &ix->table[slot_hash(r->level, r->no) & ix->table_mask];
    CHECK(r->pins == 0 && !r->loading && list_empty(&r->waiters));
    while (*p != r)
        p = &(*p)->chain;
    *p = r->chain;
    ix->count--;
    r->vol->shard->rows.bytes -= r->bytes;
    list_remove(&r->lru);
    if (r->level == 1)
        row1_free(&r->row1);
    free(r);
}

static void rows_bound(struct rows_lru *rows)
{
    unsigned looked = 0;
    struct list *l = rows->lru.prev;
    while (rows->bytes > rows->bytes_max && l != &rows->lru && looked++ < 64) {
        struct row_slot *r = container_of(l, struct row_slot, lru);
        l = l->prev;
        if (r->pins || r->loading || !list_empty(&r->waiters)) {
            list_remove(&r->lru);
            list_add_head(&rows->lru, &r->lru);
        } else {
            slot_free(r);
        }
    }
}

static void table_grow(struct index *ix)
{
    uint64_t mask = (ix->table_mask + 1) * 2 - 1;
    struct row_slot **table = mem_zalloc((mask + 1) * sizeof *table);
    for (uint64_t i = 0; i <= ix->table_mask; i++) {
        struct row_slot *r = ix->table[i];
        while (r) {
            struct row_slot *next = r->chain;
            struct row_slot **slot = &table[slot_hash(r->level, r->no) & mask];
            r->chain = *slot;
            *slot = r;
            r = next;
        }
    }
    free(ix->table);
    ix->table = table;
    ix->table_mask = mask;
}

static struct row_slot *slot_new(struct volume *vol, unsigned level, uint64_t no)
{
    struct index *ix = &vol->index;
    struct rows_lru *rows = &vol->shard->rows;
    rows_bound(rows);
    if (ix->count > ix->table_mask)
        table_grow(ix);
    size_t size = level == 1 ? offsetof(struct row_slot, row1) + sizeof(struct row1)
                             : sizeof(struct row_slot);
    struct row_slot *r = mem_alloc(size);
    memset(r, 0, offsetof(struct row_slot, row1));
    r->vol = vol;
    r->level = (uint8_t)level;
    r->no = no;
    list_init(&r->waiters);
    struct row_slot **slot = &ix->table[slot_hash(level, no) & ix->table_mask];
    r->chain = *slot;
    *slot = r;
    ix->count++;
    list_add_head(&rows->lru, &r->lru);
    if (level == 1)
        row1_init(&r->row1);
    else
        row2_init(&r->row2);
    index_recount(r);
    return r;
}

void index_destroy(struct volume *vol)
{
    struct index *ix = &vol->index;
    for (uint64_t i = 0; i <= ix->table_mask; i++)
        while (ix->table[i])
            slot_free(ix->table[i]);
}

bool index_loading(const struct volume *vol)
{
    const struct index *ix = &vol->index;
    for (uint64_t i = 0; i <= ix->table_mask; i++)
        for (struct row_slot *r = ix->table[i]; r; r = r->chain)
            if (r->loading)
                return true;
    return false;
}

/* A volume's own epochs and those of its ancestry, or all of a view's, are asked for in one read. */
_Static_assert(ANCESTRY_STORED_MAX + 1 <= STORE_RANGES_MAX && ANCESTRY_MAX <= STORE_RANGES_MAX,
               "a level-2 row is looked for in one read");

struct row_load {
    struct store_read read;
    struct store_get get; /* level 1: the row; level 2 of a view: the record of its snapshot */
    struct key key;
    struct row_slot *slot;
    struct env_timer retry;
    uint32_t n_places; /* level 2: the first one that has a row counts */
    struct store_range *ranges;
    struct row2_place places[];
};

/* Sources that name nothing: the store lacks them, so every read of them is EIO (G5). */
static void row1_make_bad(struct row1 *row)
{
    row1_free(row);
    row1_init(row);
    for (unsigned i = 0; i < INDEX_FANOUT; i++)
        row1_set_data(row, i, 0, 0);
}

static void row2_make_bad(struct row2 *row)
{
    for (unsigned i = 0; i < INDEX_FANOUT; i++)
        row->entry[i] = (struct row2_entry){.kind = ROW2_ROW, .epoch = 0, .n_data = 0};
}

static void fix_slot(struct row_slot *r, uint8_t kind)
{
    if (r->loading) {
        r->overridden = true;
        r->override = kind;
    } else if (r->level == 1) {
        row1_fill(&r->row1, 0, INDEX_FANOUT, kind);
    } else {
        for (unsigned i = 0; i < INDEX_FANOUT; i++)
            r->row2.entry[i] = (struct row2_entry){.kind = kind};
    }
}

static void load_read(struct row_load *load);

static void load_again(struct env_timer *timer)
{
    load_read(container_of(timer, struct row_load, retry));
}

/* Takes the row out of the first place that has one. False: it is damaged. */
static bool take_row2(struct row_load *load)
{
    struct row_slot *r = load->slot;
    struct row_source at;
    if (row2_take(load->ranges, load->n_places, &r->row2, &at) == ROW_DAMAGED)
        return false;
    r->epoch = at.epoch;
    r->branch = at.branch;
    for (unsigned k = 0; at.branch != r->vol->branch && k < INDEX_FANOUT; k++) {
        struct row2_entry *entry = &r->row2.entry[k];
        if (entry->kind == ROW2_ROW && !entry->branch)
            entry->branch = at.branch;
    }
    return true;
}

static void load_done(struct store_read *read, enum status st)
{
    struct row_load *load = container_of(read, struct row_load, read);
    struct row_slot *r = load->slot;
    struct volume *vol = r->vol;
    bool bad = st != ST_OK;

    if (bad && st != ST_IO && !vol->lost) {
        /* The store is out of reach: that says nothing about the row, which would be stored
         * as a damaged one with the next change below it. */
        store_read_release(read);
        load->retry.fire = load_again;
        env_timer_start(vol->shard->env, &load->retry, RETRY_MS);
        return;
    }

    if (r->level == 2) {
        /* Without its snapshot a view would find older rows in the place of cleared ones. */
        if (vol->view_epoch && !bad && !view_stands(&load->get))
            volume_lose(vol, "the snapshot was removed");
        bad = bad || vol->lost || !take_row2(load);
        if (bad)
            row2_make_bad(&r->row2);
        bad = bad && !vol->lost;
    } else {
        bad = bad || load->get.st != ST_OK ||
              !row1_decode(&r->row1, load->get.key, load->get.head);
        if (bad)
            row1_make_bad(&r->row1);
    }
    if (bad) {
        vol->stats.hash_errors++;
        log_volume_error(vol->name,
                         "volume %s: index row %llu of level %u is damaged or missing (%s): the "
                         "blocks it covers can't be read",
                         vol->name, (unsigned long long)r->no, r->level,
                         status_text(st != ST_OK ? st : load->get.st));
    }
    store_read_release(read);
    free(load->ranges);
    free(load);
    r->loading = false;
    if (r->overridden) {
        r->overridden = false;
        fix_slot(r, r->override);
        if (r->level == 2) {
            /* Not where it was found: that may be a version which only a removed snapshot names,
             * the cleaner's, not to be let go of with the next change. */
            r->branch = vol->branch;
            r->epoch = r->override_epoch;
        }
    }
    index_recount(r);
    if (r->level == 1) {
        struct row_slot *r2 = slot_find(vol, 2, r->no >> INDEX_SHIFT);
        row_unpin(r2);
    }
    struct list waiters = LIST_INIT(waiters);
    list_splice_tail(&waiters, &r->waiters);
    row_pin(r);
    struct list *l;
    while ((l = list_pop(&waiters))) {
        struct row_wait *w = container_of(l, struct row_wait, link);
        w->ready(w);
    }
    row_unpin(r);
    volume_progress(vol);
}

uint64_t row2_branch(const struct volume *vol, const struct row2_entry *entry)
{
    return entry->branch ? entry->branch : vol->branch;
}

static void add_place(struct row_load *load, struct ancestry_segment at)
{
    row2_place(&load->places[load->n_places], &at, load->slot->no, &load->ranges[load->n_places]);
    load->n_places++;
}

static void load_row2(struct row_slot *r)
{
    struct volume *vol = r->vol;
    const struct ancestry_record *a = &vol->ancestry;
    uint32_t n = a->n_segments + 1;
    struct row_load *load = mem_zalloc(sizeof *load + n * sizeof load->places[0]);
    load->ranges = mem_zalloc(n * sizeof *load->ranges);
    load->slot = r;
    r->loading = true;
    /* What is stored may be older than a trim that is on its way. */
    int kind = built_range_over(vol, r->no, &r->override_epoch);
    if (kind >= 0) {
        r->overridden = true;
        r->override = (uint8_t)kind;
    }
    if (vol->view_epoch)
        key_snapshot(&load->key, vol->branch, vol->view_epoch);
    else
        add_place(load, (struct ancestry_segment){vol->branch, a->after, vol->header.epoch});
    for (uint32_t i = 0; i < a->n_segments; i++)
        add_place(load, a->segments[i]);
    load_read(load);
}

static void load_row1(struct row_slot *r, const struct row2_entry *entry)
{
    struct row_load *load = mem_zalloc(sizeof *load);
    load->slot = r;
    r->loading = true;
    key_row(&load->key, row2_branch(r->vol, entry), 1, r->no, entry->epoch);
    load_read(load);
}

static void load_read(struct row_load *load)
{
    struct volume *vol = load->slot->vol;
    load->read = owner_read(vol);
    load->read.done = load_done;
    load->read.ranges = load->ranges;
    load->read.n_ranges = load->n_places;
    load->get = (struct store_get){.key = key_slice(&load->key)};
    load->read.gets = &load->get;
    load->read.n_gets = load->key.len ? 1 : 0;
    store_read(vol->shard->store, vol->shard->env, &load->read);
}

static void touch(struct row_slot *r)
{
    struct rows_lru *rows = &r->vol->shard->rows;
    if (rows->lru.next != &r->lru) {
        list_remove(&r->lru);
        list_add_head(&rows->lru, &r->lru);
    }
}

bool index_have(struct volume *vol, uint64_t first, uint64_t end, struct row_wait *wait)
{
    struct row_slot *missing = NULL;
    unsigned started = 0;
    uint64_t row = first >> INDEX_SHIFT;
    uint64_t last_row = (end - 1) >> INDEX_SHIFT;

    while (row <= last_row && started < ROWS_LOADED_AT_ONCE) {
        uint64_t no2 = row >> INDEX_SHIFT;
        struct row_slot *r2 = slot_find(vol, 2, no2);
        if (!r2) {
            r2 = slot_new(vol, 2, no2);
            load_row2(r2);
            started++;
        }
        if (r2->loading) {
            missing = r2;
            row = (no2 + 1) << INDEX_SHIFT;
            continue;
        }
        touch(r2);
        const struct row2_entry *entry = &r2->row2.entry[row & (INDEX_FANOUT - 1)];
        struct row_slot *r1 = slot_find(vol, 1, row);
        if (r1 || entry->kind == ROW2_ROW) {
            if (!r1) {
                /* Held until the level-1 row is there, so that a change of its entry
                 * meanwhile can't be overlooked. */
                row_pin(r2);
                r1 = slot_new(vol, 1, row);
                load_row1(r1, entry);
                started++;
            }
            /* Also where a trim has overtaken the load and the entry names no row any more. */
            if (r1->loading)
                missing = r1;
            else
                touch(r1);
        }
        row++;
    }
    if (missing)
        list_add_tail(&missing->waiters, &wait->link);
    return !missing;
}

bool index_have_row2(struct volume *vol, uint64_t row2, uint64_t end_row2, struct row_wait *wait)
{
    struct row_slot *r = slot_find(vol, 2, row2);
    if (r && !r->loading) {
        touch(r);
        return true;
    }
    if (!r) {
        bool goes_on = row2 && slot_find(vol, 2, row2 - 1);
        uint64_t end = goes_on ? min_u64(row2 + ROWS2_AHEAD, end_row2) : row2 + 1;
        r = slot_new(vol, 2, row2);
        load_row2(r);
        for (uint64_t no = row2 + 1; no < end; no++)
            if (!slot_find(vol, 2, no))
                load_row2(slot_new(vol, 2, no));
    }
    list_add_tail(&r->waiters, &wait->link);
    return false;
}

void index_wait_stop(struct row_wait *wait)
{
    if (wait->link.next)
        list_remove(&wait->link);
}

int index_lookup(struct volume *vol, uint64_t no, struct row_source *src)
{
    uint64_t row = no >> INDEX_SHIFT;
    struct row_slot *r1 = slot_find(vol, 1, row);
    if (r1) {
        CHECK(!r1->loading);
        const struct row_source *s = row1_data(&r1->row1, no & (INDEX_FANOUT - 1));
        if (!s)
            return r1->row1.source[no & (INDEX_FANOUT - 1)];
        if (src)
            *src = *s;
        return SOURCE_FIRST;
    }
    struct row_slot *r2 = slot_find(vol, 2, row >> INDEX_SHIFT);
    CHECK(r2 && !r2->loading);
    uint8_t kind = r2->row2.entry[row & (INDEX_FANOUT - 1)].kind;
    CHECK(kind != ROW2_ROW);
    return kind;
}

struct row_slot *index_row2(struct volume *vol, uint64_t row2)
{
    struct row_slot *r = slot_find(vol, 2, row2);
    return r && !r->loading ? r : NULL;
}

struct row_slot *index_row1(struct volume *vol, uint64_t row1)
{
    struct row_slot *r = slot_find(vol, 1, row1);
    return r && !r->loading ? r : NULL;
}

struct row_slot *index_edit_row1(struct volume *vol, uint64_t row1)
{
    struct row_slot *r = slot_find(vol, 1, row1);
    if (r) {
        CHECK(!r->loading);
        return r;
    }
    struct row_slot *r2 = index_row2(vol, row1 >> INDEX_SHIFT);
    CHECK(r2);
    uint8_t kind = r2->row2.entry[row1 & (INDEX_FANOUT - 1)].kind;
    CHECK(kind != ROW2_ROW);
    row_pin(r2);
    r = slot_new(vol, 1, row1);
    row_unpin(r2);
    row1_fill(&r->row1, 0, INDEX_FANOUT, kind);
    return r;
}

bool index_knows_row2(const struct volume *vol, uint64_t row2)
{
    return slot_find(vol, 2, row2) != NULL;
}

void index_fix_rows1(struct volume *vol, uint64_t first_row1, uint64_t end_row1, uint8_t kind)
{
    struct index *ix = &vol->index;
    if (end_row1 - first_row1 <= ix->count) {
        for (uint64_t row = first_row1; row < end_row1; row++) {
            struct row_slot *r = slot_find(vol, 1, row);
            if (r)
                fix_slot(r, kind);
        }
        return;
    }
    for (uint64_t i = 0; i <= ix->table_mask; i++)
        for (struct row_slot *r = ix->table[i]; r; r = r->chain)
            if (r->level == 1 && r->no >= first_row1 && r->no < end_row1)
                fix_slot(r, kind);
}

void index_fix_row2(struct volume *vol, uint64_t row2, uint8_t kind, uint64_t epoch)
{
    struct row_slot *r = slot_find(vol, 2, row2);
    if (!r)
        return;
    fix_slot(r, kind);
    r->override_epoch = epoch;
}
