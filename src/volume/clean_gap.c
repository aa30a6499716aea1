/*
 * Epochs that were rolled back: nothing of them counts any more, so all keys of those epochs are
 * cleared, and then the branch's own epochs join again (ancestry.h).
 */
#include "volume/cleaner.h"

bool clean_gap_begin(struct cleaner *c)
{
    struct volume *vol = c->vol;
    struct clean_gap *gap = &c->gap;
    *gap = (struct clean_gap){0};
    if (!ancestry_gap(&vol->ancestry, vol->branch, &gap->after, &gap->upto))
        return false;
    /* Where clearing a range costs nothing the blocks go with the commit that closes the gap. */
    gap->level = vol->shard->store->limits.clears_ranges ? 1 : 0;
    c->what = CLEAN_GAP;
    return true;
}

/* There is nothing of it left. */
static void close_gap(struct cleaner *c)
{
    struct gen *g = cleaner_room(c, weight_of_clears(1) + weight_of_record());
    g->gap_closed = (struct gen_gap){.after = c->gap.after, .upto = c->gap.upto};
    c->what = CLEAN_NOTHING;
    /* As long as it is not committed the gap is there, and would be found again. */
    cleaner_wait(c);
}

static void gap_read(struct store_read *read, enum status st)
{
    struct cleaner *c = container_of(read, struct cleaner, read);
    struct clean_gap *gap = &c->gap;
    if (!cleaner_answered(c, st)) {
        store_read_release(read);
        cleaner_read_over(c);
        return;
    }
    const struct store_range *range = &c->ranges[0];
    cleaner_room(c, weight_of_clears(range->n_pairs));
    uint64_t n = 0;
    for (uint32_t i = 0; i < range->n_pairs; i++) {
        uint64_t branch, no, epoch;
        unsigned level = 0;
        struct slice key = range->pairs[i].key;
        bool fits = gap->level ? key_parse_row(key, &branch, &level, &no, &epoch)
                               : key_parse_block(key, &branch, &epoch, &no);
        if (!fits)
            continue;
        gap->row = no;
        gap->epoch = epoch;
        if (epoch <= gap->after || epoch > gap->upto)
            continue;
        cleaner_add_clear(c, (struct gen_clear){
                                 .epoch = epoch, .no = no, .level = (uint8_t)level, .certain = true});
        n++;
    }
    if (range->more) {
        /* From the key behind the last one on. */
        if (gap->level)
            gap->epoch++;
        else
            gap->row++;
    } else {
        gap->level++;
        gap->row = gap->epoch = 0;
    }
    store_read_release(read);
    if (n)
        cleaner_added(c, n);
    cleaner_read_over(c);
}

void clean_gap_step(struct cleaner *c)
{
    struct volume *vol = c->vol;
    struct clean_gap *gap = &c->gap;
    if (gap->level > 2) {
        close_gap(c);
        return;
    }
    if (gap->level == 0) {
        key_block(&c->begin[0], vol->branch, max_u64(gap->epoch, gap->after + 1), gap->row);
        key_prefix_blocks(&c->end[0], vol->branch, gap->upto + 1);
        c->ranges[0] = (struct store_range){.limit = CLEAN_BATCH_KEYS};
    } else {
        key_row(&c->begin[0], vol->branch, gap->level, gap->row, gap->epoch);
        key_prefix_rows(&c->end[0], vol->branch, gap->level);
        key_prefix_end(&c->end[0]);
        c->ranges[0] = (struct store_range){.limit = CLEAN_ROWS_READ};
    }
    cleaner_read(c, 1, gap_read);
}
