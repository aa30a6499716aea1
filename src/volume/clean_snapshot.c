/*
 * Removed snapshots: what nobody but they named.
 *
 * Of the removed snapshot of epoch d, whose neighbours among the live ones are p < d < q (no p: 0;
 * no q: the volume itself), goes what is stored under epochs above p, is seen at d and is not at q.
 * What is older than that, p names; what d does not see, another removed snapshot did. So it is
 * enough to compare the rows that were stored in the epochs above p: level-2 rows that d and q
 * have in common are passed over, and so are equal entries of different ones. The work is
 * what was changed, not what there is.
 *
 * Blocks and level-1 rows go first, their level-2 row behind them, the record last. So whoever
 * goes through it again finds what is left: a level-1 row that is not there went with all of its
 * blocks.
 */
#include "volume/cleaner.h"
#include "volume/rowread.h"

#include <stdlib.h>

#define TRIES_MAX 3u

struct clean_snapshot {
    struct cleaner *c;
    uint64_t epoch, p, q;
    uint64_t changes;  /* history_changes when q was chosen */
    bool next_known;
    bool row2_known;   /* old->row2 and new->row2 are those of this one ... */
    uint64_t row2;     /* ... the level-2 row that is compared */
    unsigned entry;    /* its next entry */
    unsigned tries;    /* in vain, of this entry */
    struct row_reader old, new;
};

/* --- begin and end -------------------------------------------------------------------- */

static void rows_ready(struct cleaner *c, enum status st)
{
    cleaner_answered(c, st);
    cleaner_read_over(c);
}

static void old_ready(struct row_reader *r, enum status st)
{
    rows_ready(container_of(r, struct clean_snapshot, old)->c, st);
}

static void new_ready(struct row_reader *r, enum status st)
{
    rows_ready(container_of(r, struct clean_snapshot, new)->c, st);
}

static void reader_begin(struct cleaner *c, struct row_reader *r,
                         void (*ready)(struct row_reader *r, enum status st))
{
    row_reader_init(r, c->vol->shard->store, c->vol->shard->env);
    r->how = owner_read(c->vol);
    r->how.background = true;
    r->ready = ready;
}

void clean_snapshot_drop(struct cleaner *c)
{
    struct clean_snapshot *s = c->snapshot;
    if (!s)
        return;
    row_reader_free(&s->old);
    row_reader_free(&s->new);
    free(s);
    c->snapshot = NULL;
}

/* It can't be told what it names: its record stays, for the volume's next owner. */
static void leave(struct cleaner *c)
{
    struct history_entry *entry = history_find(&c->vol->history, c->snapshot->epoch);
    CHECK(entry && entry->rec.removed);
    log_volume_error(c->vol->name,
                     "volume %s: the ancestry does not say which rows of epoch %llu a removed "
                     "snapshot names: they are not given back",
                     c->vol->name, (unsigned long long)entry->epoch);
    entry->cleared = true;
    clean_snapshot_drop(c);
    c->what = CLEAN_NOTHING;
}

bool clean_snapshot_begin(struct cleaner *c)
{
    struct volume *vol = c->vol;
    const struct history *h = &vol->history;
    size_t i = 0;
    while (i < h->n && !(h->v[i].rec.removed && !h->v[i].cleared))
        i++;
    if (i == h->n)
        return false;
    struct clean_snapshot *s = c->snapshot = mem_zalloc(sizeof *s);
    struct ancestry_record where;
    s->c = c;
    s->epoch = h->v[i].epoch;
    s->p = history_live_below(h, s->epoch);
    reader_begin(c, &s->old, old_ready);
    reader_begin(c, &s->new, new_ready);
    c->what = CLEAN_SNAPSHOT;
    if (!cleaner_own_segments(vol, s->epoch, s->p, &where)) {
        leave(c);
        return true;
    }
    row_reader_look_at(&s->old, &where);
    /* Generations that were built while it was live left alone what it names. */
    c->settled_gen = vol->open->no - 1;
    return true;
}

/* Nothing is left of it but its record, which goes with this generation. */
static void finished(struct cleaner *c)
{
    struct volume *vol = c->vol;
    struct history_entry *entry = history_find(&vol->history, c->snapshot->epoch);
    CHECK(entry && entry->rec.removed);
    struct gen *g = cleaner_room(c, weight_of_clears(1));
    mem_grow(&g->snapshots_done, &g->cap_snapshots_done, g->n_snapshots_done + 1,
             sizeof *g->snapshots_done);
    g->snapshots_done[g->n_snapshots_done++] = entry->epoch;
    entry->cleared = true;
    clean_snapshot_drop(c);
    c->what = CLEAN_NOTHING;
    cleaner_added(c, 1);
}

/* --- what only d names ---------------------------------------------------------------- */

/* The epoch of a block's key that only d names, or 0. `kept`: the row q sees in its row's place, or
 * NULL. */
static uint64_t garbage_epoch(const struct clean_snapshot *s, const struct row1 *row,
                              const struct row1 *kept, unsigned i)
{
    const struct row_source *src = row1_data(row, i);
    if (!src || src->branch != s->c->vol->branch || src->epoch <= s->p || src->epoch > s->epoch)
        return 0;
    const struct row_source *now = kept ? row1_data(kept, i) : NULL;
    return now && now->branch == src->branch && now->epoch == src->epoch ? 0 : src->epoch;
}

/* Of a level-1 row that q does not see: its blocks that q does not name either, then itself. */
static void clear_row1(struct clean_snapshot *s, uint64_t no, uint64_t epoch, const struct row1 *row,
                       const struct row1 *kept)
{
    struct cleaner *c = s->c;
    uint64_t keys = 1;
    for (unsigned i = 0; i < INDEX_FANOUT; i++)
        keys += garbage_epoch(s, row, kept, i) != 0;
    cleaner_room(c, weight_of_clears(keys));
    for (unsigned i = 0; i < INDEX_FANOUT;) {
        uint64_t of = garbage_epoch(s, row, kept, i);
        unsigned end = i + 1;
        while (end < INDEX_FANOUT && garbage_epoch(s, row, kept, end) == of)
            end++;
        if (of)
            cleaner_add_clear(c, (struct gen_clear){.epoch = of,
                                                    .no = (no << INDEX_SHIFT) + i,
                                                    .n_blocks = end - i,
                                                    .certain = true});
        i = end;
    }
    cleaner_add_clear(c, (struct gen_clear){.epoch = epoch, .no = no, .level = 1, .certain = true});
    cleaner_added(c, keys);
}

/* The row is compared: the level-2 row goes, where q has another one, and the next one comes. */
static void row2_done(struct clean_snapshot *s, bool clear)
{
    struct cleaner *c = s->c;
    if (clear) {
        cleaner_room(c, weight_of_clears(1));
        cleaner_add_clear(c, (struct gen_clear){.epoch = s->old.row2_at.epoch,
                                                .no = s->row2,
                                                .level = 2,
                                                .certain = true});
        cleaner_added(c, 1);
    }
    s->row2++;
    s->next_known = s->row2_known = false;
}

/* The entries that were got past stay so: what was garbage is garbage. */
static void row2_again(struct clean_snapshot *s)
{
    row_reader_look_at(&s->old, &s->old.where);
    row_reader_look_at(&s->new, &s->new.where);
}

static void tell_damaged(const struct clean_snapshot *s, unsigned level, uint64_t no)
{
    log_volume_error(s->c->vol->name,
                     "volume %s: index row %llu of level %u is damaged or missing: some of what a "
                     "removed snapshot named is not given back",
                     s->c->vol->name, (unsigned long long)no, level);
}

/* Where the level-1 row of an entry is stored. */
static struct row_source entry_at(const struct volume *vol, const struct row2_entry *e)
{
    return (struct row_source){e->branch ? e->branch : vol->branch, e->epoch};
}

/* Whether an entry is to be compared: only d sees its level-1 row. */
static bool entry_differs(const struct clean_snapshot *s, unsigned i)
{
    const struct row2_entry *old = &s->old.row2.entry[i], *new = &s->new.row2.entry[i];
    if (old->kind != ROW2_ROW || old->branch || old->epoch <= s->p || old->epoch > s->epoch)
        return false;
    return new->kind != ROW2_ROW || new->branch || new->epoch != old->epoch;
}

/* Reads the level-1 rows of the next entries that differ: as many as make about a batch. */
static void read_rows1(struct clean_snapshot *s)
{
    struct cleaner *c = s->c;
    uint64_t blocks = 0;
    for (unsigned i = s->entry; i < INDEX_FANOUT && blocks < CLEAN_BATCH_KEYS; i++) {
        const struct row2_entry *old = &s->old.row2.entry[i], *new = &s->new.row2.entry[i];
        uint64_t no = (s->row2 << INDEX_SHIFT) + i;
        if (!entry_differs(s, i))
            continue;
        if (!row_reader_want(&s->old, no, entry_at(c->vol, old)))
            break;
        if (new->kind == ROW2_ROW)
            row_reader_want(&s->new, no, entry_at(c->vol, new));
        blocks += old->n_data;
    }
    /* Counted first: an answer must not find the other read not begun. */
    c->reading += s->old.n_wanted ? 1 : 0;
    c->reading += s->new.n_wanted ? 1 : 0;
    row_reader_start(&s->old);
    row_reader_start(&s->new);
}

/* Compares the level-1 rows of one entry; false where they have to be read (again). */
static bool compare_entry(struct clean_snapshot *s)
{
    struct volume *vol = s->c->vol;
    const struct row2_entry *old = &s->old.row2.entry[s->entry];
    const struct row2_entry *new = &s->new.row2.entry[s->entry];
    uint64_t no = (s->row2 << INDEX_SHIFT) + s->entry;
    const struct row_reader_row *was = row_reader_row1(&s->old, no, entry_at(vol, old));
    const struct row_reader_row *now =
        new->kind == ROW2_ROW ? row_reader_row1(&s->new, no, entry_at(vol, new)) : NULL;
    if (!was || (new->kind == ROW2_ROW && !now)) {
        read_rows1(s);
        return false;
    }
    if (was->found == ROW_MISSING)
        return true;
    if (now && now->found != ROW_THERE) {
        /* The volume may have put another row in its place since its level-2 row was read. */
        if (!s->q && s->tries++ < TRIES_MAX) {
            row2_again(s);
            return false;
        }
        tell_damaged(s, 1, no);
        return true;
    }
    if (was->found == ROW_DAMAGED)
        tell_damaged(s, 1, no);
    clear_row1(s, no, old->epoch, &was->row, now ? &now->row : NULL);
    return true;
}

/* --- the walk over the level-2 rows --------------------------------------------------- */

static void next_read(struct store_read *read, enum status st)
{
    struct cleaner *c = container_of(read, struct cleaner, read);
    struct clean_snapshot *s = c->snapshot;
    if (cleaner_answered(c, st)) {
        uint64_t branch, no = UINT64_MAX, epoch;
        unsigned level;
        if (c->ranges[0].n_pairs &&
            !key_parse_row(c->ranges[0].pairs[0].key, &branch, &level, &no, &epoch))
            no = UINT64_MAX;
        s->row2 = no;
        s->next_known = true;
    }
    store_read_release(read);
    cleaner_read_over(c);
}

/* Looks for the next level-2 row that the branch has of its own. */
static void find_next(struct clean_snapshot *s)
{
    struct cleaner *c = s->c;
    key_row(&c->begin[0], c->vol->branch, 2, s->row2, 0);
    key_prefix_rows(&c->end[0], c->vol->branch, 2);
    key_prefix_end(&c->end[0]);
    c->ranges[0] = (struct store_range){.limit = 1};
    cleaner_read(c, 1, next_read);
}

/* What was read of the volume itself counts only while there is no snapshot of it; what was read of a
 * snapshot, while that is not removed: then rows it has in common with the volume may go. */
static bool q_holds(const struct clean_snapshot *s)
{
    const struct volume *vol = s->c->vol;
    return s->q ? history_is_live(&vol->history, s->q) : s->changes == vol->history_changes;
}

/* False where it can't be told what q sees. */
static bool choose_q(struct clean_snapshot *s)
{
    struct volume *vol = s->c->vol;
    struct ancestry_record where;
    s->q = history_live_at_or_above(&vol->history, s->epoch + 1);
    s->changes = vol->history_changes;
    if (!cleaner_own_segments(vol, s->q ? s->q : vol->header.epoch, s->p, &where))
        return false;
    row_reader_look_at(&s->new, &where);
    row_reader_look_at(&s->old, &s->old.where);
    s->entry = s->tries = 0;
    return true;
}

/* Has the two level-2 rows; false while they are read. */
static bool have_rows2(struct clean_snapshot *s)
{
    struct cleaner *c = s->c;
    c->reading++;
    if (!row_reader_row2(&s->old, s->row2))
        return false;
    if (s->old.row2_found == ROW_MISSING) {
        c->reading--;
        return true;
    }
    if (!row_reader_row2(&s->new, s->row2))
        return false;
    c->reading--;
    return true;
}

void clean_snapshot_step(struct cleaner *c)
{
    struct clean_snapshot *s = c->snapshot;
    if (!s->next_known) {
        find_next(s);
        return;
    }
    if (s->row2 == UINT64_MAX) {
        finished(c);
        return;
    }
    if (!s->row2_known || !q_holds(s)) {
        if (!choose_q(s)) {
            leave(c);
            return;
        }
        s->row2_known = true;
    }
    if (!have_rows2(s))
        return;
    if (s->old.row2_found == ROW_MISSING || (s->new.row2_at.epoch == s->old.row2_at.epoch &&
                                             s->new.row2_found != ROW_MISSING)) {
        row2_done(s, false);
        return;
    }
    if (s->old.row2_found == ROW_DAMAGED || s->new.row2_found != ROW_THERE) {
        /* Where it is q's that can't be read, nothing is known to be garbage. */
        tell_damaged(s, 2, s->row2);
        row2_done(s, s->new.row2_found == ROW_THERE);
        return;
    }
    while (s->entry < INDEX_FANOUT && !c->wait_gen) {
        if (entry_differs(s, s->entry) && !compare_entry(s))
            return;
        s->entry++;
        s->tries = 0;
    }
    if (s->entry == INDEX_FANOUT && !c->wait_gen)
        row2_done(s, true);
}
