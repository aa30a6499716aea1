/*
 * The cleaner: gives back the space behind trims that edited only the index.
 *
 * Such a trim left a trash record that names a range of blocks. Batch by batch
 * the cleaner reads which keys exist there and adds them to a generation as
 * candidates; whether the index still names one is decided when that generation
 * is built, so a block written again meanwhile stays. Where clearing a range costs
 * nothing and reading one costs all its data (limits.clears_ranges), blocks are not
 * looked for: all of the range are candidates, row by row of the index. A record goes with the
 * commit that finishes it; a crash at any point leaves it to be gone through
 * again.
 */
#include <stdlib.h>

#include "volume/internal.h"

#define BATCH_KEYS 2048u
#define RUNS_SPARE 8u /* what a row may have become more ragged until it is cleared */

struct cleaner {
    struct volume *vol;
    struct store_read read;
    struct store_range range;
    struct key begin, end;
    struct row_wait row_wait;
    bool reading; /* the store, or rows of the index */
    bool waits_rows;
    bool urgent;
    bool have;           /* a record is being gone through */
    uint64_t n;          /* its number */
    uint64_t after;      /* records below this one are done, as far as generations go */
    struct trash_record rec;
    unsigned level;      /* 0: blocks; 1: level-1 rows */
    uint64_t next;
    size_t batch;        /* keys given to generations since the last wait */
    uint64_t wait_gen;   /* go on when this generation has committed; 0: not waiting */
    bool found_none;
    uint64_t seen_next;  /* state.trash_next when no record was found */
};

static void clean_step(struct cleaner *c);

/* The record is gone through: it goes with this generation. */
static void record_done(struct cleaner *c, struct gen *g)
{
    mem_grow(&g->trash_done, &g->cap_trash_done, g->n_trash_done + 1, sizeof *g->trash_done);
    g->trash_done[g->n_trash_done++] = c->n;
    c->after = c->n + 1;
    c->have = false;
}

/* Candidates were added: more of them, or their commit first. */
static void batch_added(struct cleaner *c, struct gen *g)
{
    struct volume *vol = c->vol;
    if (!g->opened_ns)
        g->opened_ns = env_now_ns(vol->shard->env);
    shard_age_start(vol->shard);
    if (c->batch < BATCH_KEYS && g->n_trash_done < BATCH_KEYS) {
        clean_step(c);
        return;
    }
    c->wait_gen = g->no;
    gen_seal(vol, false);
}

static void rows_came(struct row_wait *wait)
{
    struct cleaner *c = container_of(wait, struct cleaner, row_wait);
    struct volume *vol = c->vol;
    c->reading = c->waits_rows = false;
    if (vol->ownership == VOL_OWNED && c->have)
        clean_step(c);
    volume_progress(vol);
}

/* How many ranges clear what the index does not name of blocks [first, end) of one row. */
static uint32_t runs_of(struct volume *vol, uint64_t first, uint64_t end)
{
    struct row_slot *r1 = index_row1(vol, first >> INDEX_SHIFT);
    uint32_t runs = 1;
    for (uint64_t no = first + 1; r1 && no < end; no++)
        runs += r1->row1.source[no & (INDEX_FANOUT - 1)] !=
                r1->row1.source[(no - 1) & (INDEX_FANOUT - 1)];
    return runs;
}

/* Adds all blocks of the record as candidates, as far as a batch goes. */
static void sweep_blocks(struct cleaner *c)
{
    struct volume *vol = c->vol;
    struct gen *g = vol->open;
    while (c->next < c->rec.end_block && c->batch < BATCH_KEYS) {
        uint64_t end = min_u64((c->next / INDEX_FANOUT + 1) * INDEX_FANOUT, c->rec.end_block);
        if (!index_have(vol, c->next, c->next + 1, &c->row_wait)) {
            c->reading = c->waits_rows = true;
            return;
        }
        uint32_t runs = runs_of(vol, c->next, end) + RUNS_SPARE;
        if (g->weight + weight_of_clears(runs + 1) > vol->shard->commit_bytes_max) {
            c->batch = BATCH_KEYS;
            break;
        }
        weight_clears(g, runs);
        mem_grow(&g->clears, &g->cap_clears, g->n_clears + 1, sizeof *g->clears);
        g->clears[g->n_clears++] = (struct gen_clear){.epoch = c->rec.epoch,
                                                      .no = c->next,
                                                      .n_blocks = (uint32_t)(end - c->next),
                                                      .runs_max = runs};
        c->batch++;
        c->next = end;
    }
    if (c->next >= c->rec.end_block) {
        c->level = 1;
        c->next = c->rec.first_block >> INDEX_SHIFT;
    }
    batch_added(c, g);
}

static void batch_read(struct store_read *read, enum status st)
{
    struct cleaner *c = container_of(read, struct cleaner, read);
    struct volume *vol = c->vol;
    c->reading = false;
    if (st != ST_OK || vol->ownership != VOL_OWNED) {
        store_read_release(read);
        c->found_none = st != ST_OK;
        volume_progress(vol);
        return;
    }
    gen_make_fit(vol, 0, weight_of_clears(c->range.n_pairs + 1));
    struct gen *g = vol->open;
    uint64_t last = 0;
    for (uint32_t i = 0; i < c->range.n_pairs; i++) {
        uint64_t branch, no = 0, epoch = 0;
        unsigned level;
        struct slice key = c->range.pairs[i].key;
        bool fits = c->level ? key_parse_row(key, &branch, &level, &no, &epoch)
                             : key_parse_block(key, &branch, &epoch, &no);
        last = no;
        if (!fits || epoch != c->rec.epoch)
            continue;
        mem_grow(&g->clears, &g->cap_clears, g->n_clears + 1, sizeof *g->clears);
        g->clears[g->n_clears++] = (struct gen_clear){.epoch = epoch, .no = no, .level = c->level};
        c->batch++;
    }
    weight_clears(g, c->range.n_pairs + 1); /* the record is one more */
    bool more = c->range.more;
    store_read_release(read);
    if (more) {
        /* Of a row there may be several epochs, and the limit may cut between them: seeing a
         * key twice is harmless, standing still is not. */
        c->next = max_u64(last + (c->level ? 0 : 1), c->next + 1);
    } else if (c->level == 0) {
        c->level = 1;
        c->next = c->rec.first_block >> INDEX_SHIFT;
    } else {
        record_done(c, g);
    }
    batch_added(c, g);
}

static void record_read(struct store_read *read, enum status st)
{
    struct cleaner *c = container_of(read, struct cleaner, read);
    struct volume *vol = c->vol;
    c->reading = false;
    if (st == ST_OK && c->range.n_pairs) {
        uint64_t branch;
        const struct store_pair *pair = &c->range.pairs[0];
        if (key_parse_trash(pair->key, &branch, &c->n) &&
            trash_decode(pair->key, pair->head, &c->rec)) {
            c->have = true;
            c->level = 0;
            c->next = c->rec.first_block;
        } else {
            log_error("volume %s: a trash record is damaged: the space behind it is not given back",
                      vol->name);
            c->after = c->n + 1;
            c->found_none = true;
        }
    } else {
        c->found_none = true;
        c->seen_next = vol->state.trash_next;
    }
    store_read_release(read);
    if (vol->ownership == VOL_OWNED) {
        if (c->have)
            clean_step(c);
        else if (c->urgent)
            gen_seal(vol, false);
        /* Who waits for space need not wait for trash any more. */
        if (!c->have)
            shard_wake_writers(vol->shard);
    }
    volume_progress(vol);
}

static void clean_step(struct cleaner *c)
{
    struct volume *vol = c->vol;
    struct shard *s = vol->shard;
    if (c->have && c->level == 0 && s->store->limits.clears_ranges) {
        sweep_blocks(c);
        return;
    }
    c->reading = true;
    c->read = owner_read(vol);
    c->read.background = true;
    if (!c->have) {
        key_trash(&c->begin, vol->branch, c->after);
        key_prefix_branch(&c->end, 't', vol->branch);
        key_prefix_end(&c->end);
        c->range = (struct store_range){.limit = 1};
        c->read.done = record_read;
    } else if (c->level == 0) {
        key_block(&c->begin, vol->branch, c->rec.epoch, c->next);
        key_block(&c->end, vol->branch, c->rec.epoch, c->rec.end_block);
        c->range = (struct store_range){.limit = BATCH_KEYS};
        c->read.done = batch_read;
    } else {
        uint64_t end = (c->rec.end_block + INDEX_FANOUT - 1) >> INDEX_SHIFT;
        key_row(&c->begin, vol->branch, 1, c->next, 0);
        key_row(&c->end, vol->branch, 1, end, 0);
        c->range = (struct store_range){.limit = BATCH_KEYS};
        c->read.done = batch_read;
    }
    c->range.begin = key_slice(&c->begin);
    c->range.end = key_slice(&c->end);
    c->read.ranges = &c->range;
    c->read.n_ranges = 1;
    store_read(s->store, s->env, &c->read);
}

bool trash_kick(struct volume *vol, bool urgent)
{
    struct cleaner *c = vol->cleaner;
    if (vol->ownership != VOL_OWNED || vol->read_only)
        return false;
    if (!c) {
        c = vol->cleaner = mem_zalloc(sizeof *c);
        c->vol = vol;
        c->row_wait.ready = rows_came;
    }
    c->urgent = urgent;
    if (c->found_none && c->seen_next == vol->state.trash_next)
        return false;
    c->found_none = false;
    if (!c->reading && !c->wait_gen) {
        c->batch = 0;
        clean_step(c);
    }
    return true;
}

void trash_committed(struct volume *vol, struct gen *g)
{
    struct cleaner *c = vol->cleaner;
    if (!c || vol->ownership != VOL_OWNED || c->reading || g->no < c->wait_gen)
        return;
    bool waited = c->wait_gen != 0;
    c->wait_gen = 0;
    if (waited || c->seen_next != vol->state.trash_next) {
        c->found_none = false;
        c->batch = 0;
        clean_step(c);
    }
}

bool trash_busy(const struct volume *vol)
{
    return vol->cleaner && vol->cleaner->reading;
}

void trash_stop(struct volume *vol)
{
    struct cleaner *c = vol->cleaner;
    if (!c)
        return;
    c->have = c->found_none = false;
    c->wait_gen = c->after = 0;
    if (c->waits_rows) {
        index_wait_stop(&c->row_wait);
        c->reading = c->waits_rows = false;
    }
    if (!c->reading) {
        vol->cleaner = NULL;
        free(c);
    }
}
