/*
 * What is stored and named by nothing.
 *
 * The branch's keys are listed and compared with what was named: by count and sum of hashes for
 * each state, so that nothing needs to be remembered; only where these differ each key is looked
 * for in the index.
 *
 * A block of epoch x is named, if at all, by the oldest state of epoch x or later: whatever came
 * later can only have it from there. The same is true of rows.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "volume/verify_internal.h"

#define KEYS_PER_READ 4096u
/* Where reading keys reads their bodies. */
#define LIST_PARTS 16u
#define KEYS_PER_PART 32u
#define LEAKS_PER_LOOK 256u

/* ---- reasons ---- */

void verify_reasons_free(struct reasons *why)
{
    free(why->trash);
    free(why->removed);
    free(why->live);
    *why = (struct reasons){0};
}

bool verify_reason_trash(struct reasons *why, const struct store_pair *pair)
{
    struct trash t;
    uint64_t branch;
    if (!key_parse_trash(pair->key, &branch, &t.n) || !trash_decode(pair->key, pair->head, &t.rec))
        return false;
    mem_grow(&why->trash, &why->cap_trash, why->n_trash + 1, sizeof *why->trash);
    why->trash[why->n_trash++] = t;
    return true;
}

bool verify_reason_snapshot(struct reasons *why, const struct store_pair *pair,
                            struct snapshot_record *rec, uint64_t *epoch)
{
    uint64_t branch;
    if (!key_parse_snapshot(pair->key, &branch, epoch))
        return false;
    if (!snapshot_decode(pair->key, pair->head, rec)) {
        why->unknown_upto = max_u64(why->unknown_upto, *epoch);
        return false;
    }
    if (rec->removed) {
        mem_grow(&why->removed, &why->cap_removed, why->n_removed + 1, sizeof *why->removed);
        why->removed[why->n_removed++] = *epoch;
    } else {
        mem_grow(&why->live, &why->cap_live, why->n_live + 1, sizeof *why->live);
        why->live[why->n_live++] = *epoch;
    }
    return true;
}

/* Where the first of some rising epochs stands that is not below `epoch`. */
static size_t place_of(const uint64_t *epochs, size_t n, uint64_t epoch)
{
    size_t low = 0, high = n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (epochs[middle] < epoch)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Whether it is known that nothing may name what stands there in that epoch, in blocks [first,
 * end): somebody is about to clear it, or what may name it can't be told. */
static bool explained(const struct verify_run *vr, const struct reasons *why, uint64_t epoch,
                      uint64_t first, uint64_t end)
{
    if (epoch <= why->unknown_upto || !walk_epoch_counts(&why->ancestry, vr->v->branch, epoch))
        return true;
    for (size_t i = 0; i < why->n_trash; i++) {
        const struct trash_record *t = &why->trash[i].rec;
        if (epoch > t->after && epoch <= t->epoch && t->first_block < end && first < t->end_block)
            return true;
    }
    /* The oldest snapshot that could name it is removed: then what was only its is being cleared.
     */
    size_t removed = place_of(why->removed, why->n_removed, epoch);
    size_t live = place_of(why->live, why->n_live, epoch);
    return removed < why->n_removed &&
           (live == why->n_live || why->removed[removed] < why->live[live]);
}

/* ---- what nothing names ---- */

/* The oldest state that can name what is of `epoch`; n_states: there is none. */
static size_t state_of(const struct verify_run *vr, uint64_t epoch)
{
    size_t low = 0, high = vr->v->n_states;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (vr->v->states[middle].epoch < epoch)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void verify_rows_answered(struct row_reader *rows, enum status st)
{
    struct verify_run *vr = container_of(rows, struct verify_run, rows);
    vr->rows_answered = true;
    vr->rows_st = st;
}

static bool rows_wait(struct verify_run *vr)
{
    while (!vr->rows_answered)
        vr->v->run_once(vr->v->env);
    vr->rows_answered = false;
    if (vr->rows_st != ST_OK && vr->st == ST_OK)
        vr->st = fail(vr->e, vr->rows_st, "cannot read the index: %s", status_text(vr->rows_st));
    return vr->rows_st == ST_OK;
}

/* Whether a state names a row or block of its own branch, or may, for its index can't be read. */
static bool names(struct verify_run *vr, size_t state, const struct thing *t)
{
    struct row_reader *rows = &vr->rows;
    if (vr->rows_state != state) {
        struct ancestry_record where;
        if (!ancestry_of_snapshot(&vr->ancestry, vr->v->branch, vr->v->states[state].epoch, &where))
            return true;
        row_reader_look_at(rows, &where);
        vr->rows_state = state;
    }
    uint64_t row1 = t->level ? t->no : t->no >> INDEX_SHIFT;
    uint64_t row2 = t->level == 2 ? t->no : row1 >> INDEX_SHIFT;
    if (!row_reader_row2(rows, row2) && !rows_wait(vr))
        return true;
    if (rows->row2_found == ROW_DAMAGED)
        return true;
    if (t->level == 2)
        return rows->row2_at.branch == t->at.branch && rows->row2_at.epoch == t->at.epoch;
    const struct row2_entry *e = &rows->row2.entry[row1 & (INDEX_FANOUT - 1)];
    if (e->kind != ROW2_ROW)
        return false;
    struct row_source at = {e->branch ? e->branch : rows->row2_at.branch, e->epoch};
    if (t->level == 1)
        return at.branch == t->at.branch && at.epoch == t->at.epoch;
    const struct row_reader_row *row = row_reader_row1(rows, row1, at);
    if (!row) {
        row_reader_want(rows, row1, at);
        if (!row_reader_start(rows) || !rows_wait(vr))
            return true;
        row = row_reader_row1(rows, row1, at);
    }
    if (!row || row->found != ROW_THERE)
        return true;
    const struct row_source *src = row1_data(&row->row, t->no & (INDEX_FANOUT - 1));
    return src && src->branch == t->at.branch && src->epoch == t->at.epoch;
}

static uint64_t first_block(const struct thing *t)
{
    return t->no << t->level * INDEX_SHIFT;
}

static uint64_t end_block(const struct thing *t)
{
    return (t->no + 1) << t->level * INDEX_SHIFT;
}

/* Looks again at keys that seem to be named by nothing, together with what may explain them. */
static void leaks_look(struct verify_run *vr)
{
    struct verify *v = vr->v;
    static const enum verify_what whats[] = {VERIFY_BLOCK_UNNAMED, VERIFY_ROW_UNNAMED,
                                             VERIFY_ROW_UNNAMED};
    struct key keys[LEAKS_PER_LOOK], trash[2], snapshots[2], ancestry;
    struct store_get gets[LEAKS_PER_LOOK + 2];
    struct store_range ranges[2];
    size_t n = vr->n_suspects;
    for (size_t i = 0; i < n; i++) {
        verify_thing_key(&vr->suspects[i].thing, &keys[i]);
        gets[i] = (struct store_get){.key = key_slice(&keys[i])};
    }
    key_ancestry(&ancestry, v->branch);
    gets[n] = (struct store_get){.key = key_slice(&ancestry)};
    gets[n + 1] = (struct store_get){.key = key_slice(&vr->owner_key)};
    key_prefix_branch(&trash[0], 't', v->branch);
    key_prefix_branch(&snapshots[0], 'v', v->branch);
    trash[1] = trash[0];
    snapshots[1] = snapshots[0];
    key_prefix_end(&trash[1]);
    key_prefix_end(&snapshots[1]);
    ranges[0] = (struct store_range){
        .begin = key_slice(&trash[0]), .end = key_slice(&trash[1]), .limit = RECORDS_MAX};
    ranges[1] = (struct store_range){
        .begin = key_slice(&snapshots[0]), .end = key_slice(&snapshots[1]), .limit = RECORDS_MAX};
    struct walk_read r = {
        .read = {.gets = gets, .n_gets = (uint32_t)n + 2, .ranges = ranges, .n_ranges = 2}};
    struct reasons why = {0};
    enum status st = verify_read_wait(vr, &r);
    bool known = st == ST_OK && !ranges[0].more && !ranges[1].more;
    if (!known && vr->st == ST_OK)
        vr->st = fail(vr->e, ST_IO, "cannot read the trash records and snapshots");
    struct snapshot_record rec;
    uint64_t epoch;
    for (uint32_t i = 0; i < ranges[0].n_pairs && known; i++)
        verify_reason_trash(&why, &ranges[0].pairs[i]);
    for (uint32_t i = 0; i < ranges[1].n_pairs && known; i++)
        verify_reason_snapshot(&why, &ranges[1].pairs[i], &rec, &epoch);
    if (known && gets[n].st == ST_OK)
        known = ancestry_decode(gets[n].key, gets[n].head, &why.ancestry);
    if (!v->upto && known && !verify_owner_stands(vr, &gets[n + 1]) && vr->st == ST_OK)
        vr->st = fail(vr->e, ST_BUSY, "somebody has taken the volume in use meanwhile");
    struct store_mutation clears[LEAKS_PER_LOOK];
    size_t n_clears = 0, leaks[LEAKS_PER_LOOK];
    for (size_t i = 0; i < n && known && vr->st == ST_OK; i++) {
        const struct thing *t = &vr->suspects[i].thing;
        /* Snapshots that were removed since the beginning, and are cleared already. */
        size_t state = state_of(vr, t->at.epoch);
        bool moved = false;
        if (state < v->n_states && !v->states[state].is_volume) {
            moved = true;
            for (size_t k = 0; k < why.n_live && moved; k++)
                moved = why.live[k] != v->states[state].epoch;
        }
        if (gets[i].st == ST_NOTFOUND || moved ||
            explained(vr, &why, t->at.epoch, first_block(t), end_block(t)))
            continue;
        leaks[n_clears] = i;
        clears[n_clears++] = (struct store_mutation){.kind = STORE_CLEAR, .key = gets[i].key};
    }
    /* Where a part of the index may be lost, what it named is worth keeping. */
    bool repaired = false;
    if (v->repair && n_clears && !vr->index_lost && !vr->counts_differ && vr->st == ST_OK)
        repaired = verify_repair(vr, NULL, clears, n_clears);
    for (size_t i = 0; i < n_clears; i++) {
        const struct thing *t = &vr->suspects[leaks[i]].thing;
        struct verdict verdict = {.what = whats[t->level]};
        verify_tell_thing(vr, t, &verdict, VERIFY_NOBODY, VERIFY_NOBODY, repaired);
        vr->n_leaks++;
    }
    store_read_release(&r.read);
    verify_reasons_free(&why);
    vr->n_suspects = 0;
}

static void leak_suspect(struct verify_run *vr, const struct thing *t)
{
    if (explained(vr, &vr->reasons, t->at.epoch, first_block(t), end_block(t)))
        return;
    verify_suspect_add(vr, &(struct suspect){*t, 0});
    if (vr->n_suspects == LEAKS_PER_LOOK)
        leaks_look(vr);
}

void verify_walk_unseen(struct walk *w, uint64_t no, uint64_t epoch)
{
    struct verify_run *vr = verify_run_of(w);
    struct thing t = {2, no, {vr->v->branch, epoch}};
    /* Judged at once: the suspects of the walk are others. */
    if (explained(vr, &vr->reasons, epoch, first_block(&t), end_block(&t)))
        return;
    struct suspect *kept = vr->suspects;
    size_t n_kept = vr->n_suspects, cap_kept = vr->cap_suspects;
    vr->suspects = NULL;
    vr->n_suspects = vr->cap_suspects = 0;
    verify_suspect_add(vr, &(struct suspect){t, 0});
    leaks_look(vr);
    free(vr->suspects);
    vr->suspects = kept;
    vr->n_suspects = n_kept;
    vr->cap_suspects = cap_kept;
}

/* Keys of blocks or rows of this branch, [begin, end). */
struct listing {
    struct key begin, end;
    struct thing last; /* that was listed */
    bool any, over;
};

typedef void (*each_key)(struct verify_run *vr, const struct thing *t, void *arg);

/* The keys from this one on can't be read. */
static void tell_unreadable(struct verify_run *vr, const struct listing *l)
{
    struct verify_finding f = {
        .what = VERIFY_UNREADABLE, .first_state = VERIFY_NOBODY, .last_state = VERIFY_NOBODY};
    if (l->any)
        verify_key_text(&l->last, f.key);
    else
        snprintf(f.key, sizeof f.key, "(\"%c\", %" PRIu64 ")", l->begin.bytes[1], vr->v->branch);
    verify_tell(vr, &f);
}

/* Takes in what a read found of a part, which goes on behind that. */
static void listing_take(struct verify_run *vr, struct listing *l, const struct store_range *range,
                         each_key each, void *arg)
{
    for (uint32_t i = 0; i < range->n_pairs && vr->st == ST_OK; i++) {
        struct slice key = range->pairs[i].key;
        struct thing t = {0};
        if (!key_parse_row(key, &t.at.branch, &t.level, &t.no, &t.at.epoch) &&
            !key_parse_block(key, &t.at.branch, &t.at.epoch, &t.no))
            continue;
        l->last = t;
        l->any = true;
        each(vr, &t, arg);
    }
    l->over = !range->more;
    if (l->over)
        return;
    struct slice key = range->pairs[range->n_pairs - 1].key;
    memcpy(l->begin.bytes, key.data, key.len);
    l->begin.len = key.len;
    l->begin.bytes[l->begin.len++] = 0;
}

/* Goes through the keys of all parts, which are read side by side. */
static void listings_run(struct verify_run *vr, struct listing *parts, size_t n, uint32_t limit,
                         each_key each, void *arg)
{
    struct verify *v = vr->v;
    while (vr->st == ST_OK) {
        struct store_range ranges[LIST_PARTS];
        struct listing *of[LIST_PARTS];
        uint32_t n_ranges = 0;
        for (size_t i = 0; i < n; i++) {
            if (parts[i].over)
                continue;
            of[n_ranges] = &parts[i];
            ranges[n_ranges++] = (struct store_range){.begin = key_slice(&parts[i].begin),
                                                      .end = key_slice(&parts[i].end),
                                                      .limit = limit};
        }
        if (n_ranges == 0)
            return;
        struct walk_read r = {.read = {.ranges = ranges, .n_ranges = n_ranges}};
        enum status st = verify_read_wait(vr, &r);
        if (st != ST_OK && st != ST_IO && vr->st == ST_OK)
            vr->st = st;
        for (uint32_t i = 0; i < n_ranges && st == ST_OK; i++)
            listing_take(vr, of[i], &ranges[i], each, arg);
        store_read_release(&r.read);
        if (st == ST_IO) {
            tell_unreadable(vr, of[0]);
            return;
        }
        if (vr->st == ST_OK && !v->go_on(v))
            vr->st = fail(vr->e, ST_SHUTDOWN, "interrupted");
    }
}

/* The oldest epoch from *epoch on that has blocks. */
static bool next_epoch(struct verify_run *vr, uint64_t *epoch)
{
    struct key begin, end;
    key_prefix_blocks(&begin, vr->v->branch, *epoch);
    key_prefix_branch(&end, 'b', vr->v->branch);
    key_prefix_end(&end);
    struct store_range range = {.begin = key_slice(&begin), .end = key_slice(&end), .limit = 1};
    struct walk_read r = {.read = {.ranges = &range, .n_ranges = 1}};
    enum status st = verify_read_wait(vr, &r);
    uint64_t branch, no;
    bool found =
        st == ST_OK && range.n_pairs && key_parse_block(range.pairs[0].key, &branch, epoch, &no);
    store_read_release(&r.read);
    if (st != ST_OK && vr->st == ST_OK)
        vr->st = fail(vr->e, st, "cannot list the blocks: %s", status_text(st));
    return found;
}

/* Goes through all keys of blocks ('b') or rows ('i'). Where reading keys brings their bodies
 * along, piece after piece would take a round trip for each few of them: parts are read side by
 * side. */
static void keys_list(struct verify_run *vr, char tag, each_key each, void *arg)
{
    struct verify *v = vr->v;
    if (tag == 'i' || !v->store->limits.clears_ranges) {
        struct listing all = {0};
        key_prefix_branch(&all.begin, tag, v->branch);
        all.end = all.begin;
        key_prefix_end(&all.end);
        listings_run(vr, &all, 1, KEYS_PER_READ, each, arg);
        return;
    }
    for (uint64_t epoch = 0; vr->st == ST_OK && next_epoch(vr, &epoch); epoch++) {
        struct listing parts[LIST_PARTS] = {0};
        for (uint64_t i = 0; i < LIST_PARTS; i++) {
            key_block(&parts[i].begin, v->branch, epoch, vr->walk.n_blocks * i / LIST_PARTS);
            if (i > 0)
                parts[i - 1].end = parts[i].begin;
        }
        key_prefix_blocks(&parts[LIST_PARTS - 1].end, v->branch, epoch + 1);
        listings_run(vr, parts, LIST_PARTS, KEYS_PER_PART, each, arg);
    }
}

static void sum_key(struct verify_run *vr, const struct thing *t, void *arg)
{
    struct sum *sums = arg;
    size_t state = state_of(vr, t->at.epoch);
    if (state == vr->v->n_states && !vr->v->upto)
        leak_suspect(vr, t); /* of an epoch that has not begun */
    else if (state < vr->v->n_states && t->level < 2)
        verify_sum_add(&sums[state], t->at.epoch, t->no);
}

/* Of the states in which something is stored that is not named, or the other way round. */
static void search_key(struct verify_run *vr, const struct thing *t, void *arg)
{
    const bool *differs = arg;
    size_t state = state_of(vr, t->at.epoch);
    if (t->level == 2 || state == vr->v->n_states || !differs[state])
        return;
    if (!names(vr, state, t))
        leak_suspect(vr, t);
}

void verify_leaks_find(struct verify_run *vr, char tag, const struct sum *named)
{
    struct verify *v = vr->v;
    struct sum *stored = mem_zalloc(v->n_states * sizeof *stored);
    bool *differs = mem_zalloc(v->n_states * sizeof *differs), any = false;
    keys_list(vr, tag, sum_key, stored);
    for (size_t i = 0; i < v->n_states; i++) {
        differs[i] = stored[i].n != named[i].n || stored[i].hashes != named[i].hashes;
        any |= differs[i];
    }
    if (any)
        keys_list(vr, tag, search_key, differs);
    if (vr->n_suspects && vr->st == ST_OK)
        leaks_look(vr);
    free(stored);
    free(differs);
}
