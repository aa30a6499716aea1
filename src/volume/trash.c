/*
 * Trash: the space behind trims that edited only the index.
 *
 * Such a trim left a trash record that names a range of blocks and the epochs that no snapshot held
 * then. Batch by batch the cleaner reads which keys of those exist there. Who decides about a
 * key is the oldest state that could name it (cleaner.h). Where that is the volume itself, keys
 * are candidates, and whether the index still names one is decided when the generation they were
 * added to is built, so a block written again meanwhile stays. Where it is a snapshot, its rows
 * are read.
 *
 * Where clearing a range costs nothing and reading one costs all its data (limits.clears_ranges),
 * blocks are not looked for, but the first one of a batch: all behind that are candidates, row by row
 * of the index.
 */
#include "volume/cleaner.h"
#include "volume/rowread.h"

#include <stdlib.h>

#define RUNS_SPARE 8u /* what a row may have become more ragged until it is cleared */

/* Of a record whose keys a snapshot decides about. */
struct trash_judge {
    struct cleaner *c;
    uint64_t epoch; /* the snapshot's */
    struct row_reader rows;
    /* Keys that were found and are to be judged from keys[at] on. */
    struct trash_key {
        uint64_t no, epoch;
    } keys[CLEAN_BATCH_KEYS];
    uint32_t n_keys, at;
    unsigned level; /* of the keys */
};

/* What was left to the build of a generation was not cleared if a snapshot came between. And a
 * snapshot that decided and is removed can't any more: rows it has in common with the volume may go. */
static bool outdated(const struct cleaner *c)
{
    const struct trash_judge *j = c->trash.judge;
    return c->trash.changes != c->vol->history_changes ||
           (j && !history_is_live(&c->vol->history, j->epoch));
}

bool clean_trash_wanted(const struct cleaner *c)
{
    const struct clean_trash *t = &c->trash;
    return !t->found_none || t->seen_next != c->vol->state.trash_next || outdated(c);
}

bool clean_trash_begin(struct cleaner *c)
{
    if (!clean_trash_wanted(c))
        return false;
    c->trash.found_none = false;
    c->what = CLEAN_TRASH;
    return true;
}

void clean_trash_drop(struct cleaner *c)
{
    struct trash_judge *j = c->trash.judge;
    if (!j)
        return;
    row_reader_free(&j->rows);
    free(j);
    c->trash.judge = NULL;
}

/* --- records -------------------------------------------------------------------------- */

static void judge_ready(struct row_reader *r, enum status st)
{
    struct trash_judge *j = container_of(r, struct trash_judge, rows);
    struct cleaner *c = j->c;
    cleaner_answered(c, st);
    cleaner_read_over(c);
}

/* False: it can't be told what the snapshot that decides sees. */
static bool record_begin(struct cleaner *c, uint64_t snapshot)
{
    struct volume *vol = c->vol;
    struct clean_trash *t = &c->trash;
    struct ancestry_record where;
    if (snapshot && !cleaner_own_segments(vol, snapshot, t->rec.after, &where))
        return false;
    t->have = true;
    t->level = 0;
    t->epoch = t->rec.after + 1;
    t->next = t->rec.first_block;
    t->sweep_end = 0;
    t->rows_done = false;
    if (snapshot) {
        struct trash_judge *j = t->judge = mem_zalloc(sizeof *j);
        j->c = c;
        j->epoch = snapshot;
        row_reader_init(&j->rows, vol->shard->store, vol->shard->env);
        j->rows.how = owner_read(vol);
        j->rows.how.background = true;
        j->rows.ready = judge_ready;
        row_reader_look_at(&j->rows, &where);
    }
    return true;
}

/* A record was read: begins it, or leaves it where it is. */
static void record_came(struct cleaner *c, const struct store_pair *pair)
{
    struct volume *vol = c->vol;
    struct clean_trash *t = &c->trash;
    const struct history *h = &vol->history;
    bool sound = trash_decode(pair->key, pair->head, &t->rec);
    uint64_t snapshot = sound ? history_live_at_or_above(h, t->rec.after + 1) : 0;
    if (!sound || snapshot != history_live_at_or_above(h, t->rec.epoch)) {
        log_volume_error(vol->name,
                         "volume %s: a trash record is damaged: the space behind it is not given "
                         "back", vol->name);
        t->from = t->n + 1;
    } else if (!record_begin(c, snapshot)) {
        if (!t->unknown_told)
            log_volume_error(vol->name,
                             "volume %s: the ancestry does not say what the snapshot of epoch "
                             "%llu names: the space behind trims is not given back",
                             vol->name, (unsigned long long)snapshot);
        t->unknown_told = true;
        t->from = t->n + 1;
    }
}

static void record_read(struct store_read *read, enum status st)
{
    struct cleaner *c = container_of(read, struct cleaner, read);
    struct clean_trash *t = &c->trash;
    struct volume *vol = c->vol;
    if (!cleaner_answered(c, st)) {
        store_read_release(read);
        cleaner_read_over(c);
        return;
    }
    const struct store_pair *pair = c->ranges[0].n_pairs ? &c->ranges[0].pairs[0] : NULL;
    uint64_t branch;
    if (pair && key_parse_trash(pair->key, &branch, &t->n)) {
        record_came(c, pair);
    } else {
        t->found_none = true;
        t->seen_next = t->asked_next;
        c->what = CLEAN_NOTHING;
        if (c->urgent)
            gen_seal(vol, false);
    }
    store_read_release(read);
    cleaner_run(c);
    /* Who waits for space need not wait for trash any more. */
    if (t->found_none)
        shard_wake_writers(vol->shard);
    volume_progress(vol);
}

static void read_record(struct cleaner *c)
{
    struct clean_trash *t = &c->trash;
    t->asked_next = c->vol->state.trash_next;
    key_trash(&c->begin[0], c->vol->branch, t->from);
    key_prefix_branch(&c->end[0], 't', c->vol->branch);
    key_prefix_end(&c->end[0]);
    c->ranges[0] = (struct store_range){.limit = 1};
    cleaner_read(c, 1, record_read);
}

/* The record is gone through: it goes with this generation. */
static void record_done(struct cleaner *c)
{
    struct clean_trash *t = &c->trash;
    struct gen *g = cleaner_room(c, weight_of_clears(1));
    cleaner_unsure(c);
    mem_grow(&g->trash_done, &g->cap_trash_done, g->n_trash_done + 1, sizeof *g->trash_done);
    g->trash_done[g->n_trash_done++] = t->n;
    t->from = t->n + 1;
    t->have = false;
    clean_trash_drop(c);
    c->what = CLEAN_NOTHING;
    cleaner_added(c, 1);
}

/* Of level 0: goes on with this block of this epoch, or what comes behind it. */
static void go_to(struct clean_trash *t, uint64_t epoch, uint64_t block)
{
    t->epoch = epoch;
    t->next = max_u64(t->rec.first_block, block);
    if (t->next >= t->rec.end_block) {
        t->epoch++;
        t->next = t->rec.first_block;
    }
    if (t->epoch > t->rec.epoch) {
        t->level = 1;
        t->next = t->rec.first_block >> INDEX_SHIFT;
        t->epoch = 0;
    }
}

/* --- judged by a snapshot ------------------------------------------------------------- */

/* What the snapshot sees of a level-1 row, as far as it can name keys of `epoch` in it. */
enum seen {
    SEEN_NOTHING, /* it can name none */
    SEEN_ROW,     /* *at: it is stored there */
    SEEN_UNKNOWN, /* it can't be read: all may be named */
};

/* The level-2 row is known. */
static enum seen judge_entry(const struct trash_judge *j, uint64_t row1, uint64_t epoch,
                             struct row_source *at)
{
    const struct row2_entry *e = &j->rows.row2.entry[row1 & (INDEX_FANOUT - 1)];
    if (j->rows.row2_found == ROW_DAMAGED)
        return SEEN_UNKNOWN;
    if (j->rows.row2_found == ROW_MISSING || e->kind != ROW2_ROW || e->branch || e->epoch < epoch)
        return SEEN_NOTHING;
    *at = (struct row_source){j->c->vol->branch, e->epoch};
    return SEEN_ROW;
}

static bool judge_has_row2(struct trash_judge *j, uint64_t row1)
{
    j->c->reading++;
    if (!row_reader_row2(&j->rows, row1 >> INDEX_SHIFT))
        return false;
    j->c->reading--;
    return true;
}

static void judge_read(struct trash_judge *j)
{
    j->c->reading++;
    row_reader_start(&j->rows);
}

/* Whether the row names what stands under this epoch. */
static bool row_names(const struct row_reader_row *row, const struct volume *vol, uint64_t no,
                      uint64_t epoch)
{
    const struct row_source *src = row1_data(&row->row, no & (INDEX_FANOUT - 1));
    return src && src->branch == vol->branch && src->epoch == epoch;
}

/* Asks for the rows that decide about the keys from the next one on. */
static void read_for_keys(struct trash_judge *j)
{
    uint64_t first = j->keys[j->at].no >> INDEX_SHIFT, last = UINT64_MAX;
    for (uint32_t i = j->at; i < j->n_keys; i++) {
        uint64_t row1 = j->keys[i].no >> INDEX_SHIFT;
        struct row_source at;
        if (row1 >> INDEX_SHIFT != first >> INDEX_SHIFT)
            break;
        if (row1 == last || judge_entry(j, row1, j->keys[i].epoch, &at) != SEEN_ROW)
            continue;
        if (!row_reader_want(&j->rows, row1, at))
            break;
        last = row1;
    }
    judge_read(j);
}

/* Blocks, one by one; false: rows are being read. */
static bool judge_block(struct trash_judge *j, bool *garbage)
{
    const struct trash_key *key = &j->keys[j->at];
    uint64_t row1 = key->no >> INDEX_SHIFT;
    struct row_source at;
    if (!judge_has_row2(j, row1))
        return false;
    enum seen seen = judge_entry(j, row1, key->epoch, &at);
    if (seen == SEEN_ROW) {
        const struct row_reader_row *row = row_reader_row1(&j->rows, row1, at);
        if (!row) {
            read_for_keys(j);
            return false;
        }
        *garbage = row->found == ROW_THERE && !row_names(row, j->c->vol, key->no, key->epoch);
        return true;
    }
    *garbage = seen == SEEN_NOTHING;
    return true;
}

/* A level-1 row is garbage where the snapshot sees another one. */
static bool judge_row(struct trash_judge *j, bool *garbage)
{
    const struct trash_key *key = &j->keys[j->at];
    struct row_source at;
    if (!judge_has_row2(j, key->no))
        return false;
    enum seen seen = judge_entry(j, key->no, key->epoch, &at);
    *garbage = seen == SEEN_NOTHING || (seen == SEEN_ROW && at.epoch != key->epoch);
    return true;
}

/* Goes through the keys that were found, as far as their rows are known and a batch goes. */
static void judge_keys(struct trash_judge *j)
{
    struct cleaner *c = j->c;
    while (j->at < j->n_keys && !c->wait_gen) {
        const struct trash_key *key = &j->keys[j->at];
        bool garbage;
        if (!(j->level ? judge_row(j, &garbage) : judge_block(j, &garbage)))
            return;
        j->at++;
        if (!garbage)
            continue;
        cleaner_room(c, weight_of_clears(1));
        cleaner_add_clear(c, (struct gen_clear){.epoch = key->epoch,
                                                .no = key->no,
                                                .level = (uint8_t)j->level,
                                                .certain = true});
        cleaner_added(c, 1);
    }
}

/* How many ranges clear what the snapshot does not name of one row's blocks [first, end); `row` NULL:
 * it names none. */
static uint64_t runs_not_named(const struct trash_judge *j, const struct row_reader_row *row,
                               uint64_t first, uint64_t end)
{
    uint64_t runs = row ? 0 : 1;
    bool was_named = true;
    for (uint64_t no = first; row && no < end; no++) {
        bool is_named = row_names(row, j->c->vol, no, j->c->trash.epoch);
        runs += was_named && !is_named;
        was_named = is_named;
    }
    return runs;
}

/* Adds what the snapshot does not name of one row's blocks [first, end). */
static void sweep_row(struct trash_judge *j, const struct row_reader_row *row, uint64_t first,
                      uint64_t end)
{
    struct cleaner *c = j->c;
    uint64_t epoch = c->trash.epoch, runs = runs_not_named(j, row, first, end);
    if (!runs)
        return;
    cleaner_room(c, weight_of_clears(runs));
    for (uint64_t no = first; no < end;) {
        bool is_named = row && row_names(row, c->vol, no, epoch);
        uint64_t behind = row ? no + 1 : end;
        while (behind < end && row_names(row, c->vol, behind, epoch) == is_named)
            behind++;
        if (!is_named)
            cleaner_add_clear(c, (struct gen_clear){.epoch = epoch,
                                                    .no = no,
                                                    .n_blocks = (uint32_t)(behind - no),
                                                    .certain = true});
        no = behind;
    }
    cleaner_added(c, runs);
}

/* Asks for the rows of the sweep from the next one on. */
static void read_for_sweep(struct trash_judge *j)
{
    const struct clean_trash *t = &j->c->trash;
    uint64_t row1 = t->next >> INDEX_SHIFT;
    uint64_t end = min_u64((t->sweep_end - 1) >> INDEX_SHIFT, row1 | (INDEX_FANOUT - 1)) + 1;
    for (; row1 < end; row1++) {
        struct row_source at;
        if (judge_entry(j, row1, t->epoch, &at) == SEEN_ROW && !row_reader_want(&j->rows, row1, at))
            break;
    }
    judge_read(j);
}

/* Adds all blocks up to sweep_end that the snapshot does not name, as far as a batch goes. */
static void judge_sweep(struct trash_judge *j)
{
    struct cleaner *c = j->c;
    struct clean_trash *t = &c->trash;
    while (t->next < t->sweep_end && !c->wait_gen) {
        uint64_t row1 = t->next >> INDEX_SHIFT;
        uint64_t first = t->next, end = min_u64((row1 + 1) << INDEX_SHIFT, t->sweep_end);
        struct row_source at;
        const struct row_reader_row *row = NULL;
        if (!judge_has_row2(j, row1))
            return;
        enum seen seen = judge_entry(j, row1, t->epoch, &at);
        if (seen == SEEN_ROW) {
            row = row_reader_row1(&j->rows, row1, at);
            if (!row) {
                read_for_sweep(j);
                return;
            }
            if (row->found != ROW_THERE)
                seen = SEEN_UNKNOWN;
        }
        t->next = end;
        if (seen != SEEN_UNKNOWN)
            sweep_row(j, row, first, end);
    }
}

/* --- judged by the volume itself ------------------------------------------------------ */

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

/* Adds all blocks up to sweep_end as candidates, as far as a batch goes. */
static void sweep_blocks(struct cleaner *c)
{
    struct volume *vol = c->vol;
    struct clean_trash *t = &c->trash;
    while (t->next < t->sweep_end && !c->wait_gen) {
        uint64_t end = min_u64((t->next / INDEX_FANOUT + 1) * INDEX_FANOUT, t->sweep_end);
        if (!index_have(vol, t->next, t->next + 1, &c->row_wait)) {
            c->waits_rows = true;
            return;
        }
        uint32_t runs = runs_of(vol, t->next, end) + RUNS_SPARE;
        cleaner_room(c, weight_of_clears(runs));
        cleaner_add_clear(c, (struct gen_clear){.epoch = t->epoch,
                                                .no = t->next,
                                                .n_blocks = (uint32_t)(end - t->next),
                                                .runs_max = runs});
        t->next = end;
        cleaner_added(c, 1);
    }
}

/* --- looking for keys ----------------------------------------------------------------- */

/* Where it is the volume itself that decides, the keys become candidates, else they wait for the
 * snapshot's rows. */
static void keys_found(struct cleaner *c)
{
    struct clean_trash *t = &c->trash;
    struct trash_judge *j = t->judge;
    const struct store_range *range = &c->ranges[0];
    uint64_t last = t->next, last_epoch = 0, n = 0;
    if (j) {
        j->level = t->level;
        j->n_keys = j->at = 0;
    } else {
        cleaner_room(c, weight_of_clears(range->n_pairs));
    }
    for (uint32_t i = 0; i < range->n_pairs; i++) {
        uint64_t branch, no = 0, epoch = 0;
        unsigned level;
        struct slice key = range->pairs[i].key;
        bool fits = t->level ? key_parse_row(key, &branch, &level, &no, &epoch)
                             : key_parse_block(key, &branch, &epoch, &no);
        if (!fits)
            continue;
        last = no;
        last_epoch = epoch;
        if (epoch <= t->rec.after || epoch > t->rec.epoch)
            continue;
        if (j)
            j->keys[j->n_keys++] = (struct trash_key){no, epoch};
        else
            cleaner_add_clear(c, (struct gen_clear){
                                     .epoch = epoch, .no = no, .level = (uint8_t)t->level});
        n++;
    }
    /* On from the key behind the last one. */
    if (t->level == 0) {
        t->next = last + 1;
    } else {
        t->next = last;
        t->epoch = last_epoch + 1;
    }
    if (!j && n)
        cleaner_added(c, n);
}

static void keys_read(struct store_read *read, enum status st)
{
    struct cleaner *c = container_of(read, struct cleaner, read);
    struct clean_trash *t = &c->trash;
    if (!cleaner_answered(c, st)) {
        store_read_release(read);
        cleaner_read_over(c);
        return;
    }
    const struct store_range *here = &c->ranges[0], *behind = &c->ranges[1];
    bool found = here->n_pairs > 0, more = here->more;
    uint64_t branch, block = 0, epoch = t->epoch + 1;
    if (found)
        keys_found(c);
    if (t->level == 1) {
        t->rows_done = !more;
    } else if (!more) {
        /* The next epoch that has any. */
        if (c->read.n_ranges == 1 || !behind->n_pairs)
            epoch = t->rec.epoch + 1;
        else if (key_parse_block(behind->pairs[0].key, &branch, &epoch, &block) &&
                 epoch == t->epoch)
            block = t->rec.end_block; /* the epoch goes on behind the range */
        go_to(t, epoch, block);
    }
    store_read_release(read);
    cleaner_read_over(c);
}

static void first_read(struct store_read *read, enum status st)
{
    struct cleaner *c = container_of(read, struct cleaner, read);
    struct clean_trash *t = &c->trash;
    if (cleaner_answered(c, st)) {
        uint64_t branch, block = 0, epoch = t->rec.epoch + 1;
        if (c->ranges[0].n_pairs)
            key_parse_block(c->ranges[0].pairs[0].key, &branch, &epoch, &block);
        go_to(t, epoch, block);
        if (t->level == 0 && t->epoch == epoch)
            t->sweep_end = min_u64(t->rec.end_block, (t->next / INDEX_FANOUT + CLEAN_BATCH_KEYS) *
                                                         INDEX_FANOUT);
    }
    store_read_release(read);
    cleaner_read_over(c);
}

/* Blocks one by one: those of this epoch, and where the next epoch begins. */
static void look_for_blocks(struct cleaner *c)
{
    const struct volume *vol = c->vol;
    const struct clean_trash *t = &c->trash;
    bool last = t->epoch == t->rec.epoch;
    key_block(&c->begin[0], vol->branch, t->epoch, t->next);
    key_block(&c->end[0], vol->branch, t->epoch, t->rec.end_block);
    c->begin[1] = c->end[0];
    key_prefix_blocks(&c->end[1], vol->branch, t->rec.epoch + 1);
    c->ranges[0] = (struct store_range){.limit = CLEAN_BATCH_KEYS};
    c->ranges[1] = (struct store_range){.limit = 1};
    cleaner_read(c, last ? 1 : 2, keys_read);
}

static void look_for_first_block(struct cleaner *c)
{
    const struct volume *vol = c->vol;
    const struct clean_trash *t = &c->trash;
    key_block(&c->begin[0], vol->branch, t->epoch, t->next);
    key_prefix_blocks(&c->end[0], vol->branch, t->rec.epoch + 1);
    c->ranges[0] = (struct store_range){.limit = 1};
    cleaner_read(c, 1, first_read);
}

static void look_for_rows(struct cleaner *c)
{
    const struct volume *vol = c->vol;
    const struct clean_trash *t = &c->trash;
    uint64_t end = (t->rec.end_block + INDEX_FANOUT - 1) >> INDEX_SHIFT;
    key_row(&c->begin[0], vol->branch, 1, t->next, t->epoch);
    key_row(&c->end[0], vol->branch, 1, end, 0);
    c->ranges[0] = (struct store_range){.limit = CLEAN_ROWS_READ};
    cleaner_read(c, 1, keys_read);
}

static void sweep(struct cleaner *c)
{
    struct clean_trash *t = &c->trash;
    if (t->judge)
        judge_sweep(t->judge);
    else
        sweep_blocks(c);
    if (t->next >= t->sweep_end) {
        t->sweep_end = 0;
        go_to(t, t->epoch, t->next);
    }
}

void clean_trash_step(struct cleaner *c)
{
    struct clean_trash *t = &c->trash;
    if (outdated(c)) {
        /* All records are gone through anew. */
        clean_trash_drop(c);
        t->have = false;
        t->from = 0;
        t->changes = c->vol->history_changes;
    }
    if (!t->have)
        read_record(c);
    else if (t->judge && t->judge->at < t->judge->n_keys)
        judge_keys(t->judge);
    else if (t->level == 0 && t->sweep_end)
        sweep(c);
    else if (t->level == 0 && c->vol->shard->store->limits.clears_ranges)
        look_for_first_block(c);
    else if (t->level == 0)
        look_for_blocks(c);
    else if (!t->rows_done)
        look_for_rows(c);
    else
        record_done(c);
}
