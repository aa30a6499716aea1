#include "volume/rowread.h"

#include "base/check.h"

/* --- one level-2 row ------------------------------------------------------------------ */

void row2_place(struct row2_place *place, const struct ancestry_segment *segment, uint64_t no,
                struct store_range *range)
{
    key_row(&place->begin, segment->branch, 2, no, segment->after + 1);
    key_row(&place->end, segment->branch, 2, no, segment->upto + 1);
    *range = (struct store_range){.begin = key_slice(&place->begin),
                                  .end = key_slice(&place->end),
                                  .limit = 1,
                                  .reverse = true};
}

enum row_found row2_take(const struct store_range *ranges, uint32_t n_ranges, struct row2 *row,
                         struct row_source *at)
{
    *at = (struct row_source){0};
    for (uint32_t i = 0; i < n_ranges; i++) {
        if (!ranges[i].n_pairs)
            continue;
        const struct store_pair *pair = &ranges[i].pairs[0];
        uint64_t no;
        unsigned level;
        if (!key_parse_row(pair->key, &at->branch, &level, &no, &at->epoch)) {
            *at = (struct row_source){0};
            row2_init(row);
            return ROW_DAMAGED;
        }
        return row2_decode(row, pair->key, pair->head) ? ROW_THERE : ROW_DAMAGED;
    }
    row2_init(row);
    return ROW_MISSING;
}

uint32_t row2_search(struct row2_search *search, const struct ancestry_record *where, uint64_t no,
                     struct store_range *ranges)
{
    for (uint32_t i = 0; i < where->n_segments; i++)
        row2_place(&search->places[i], &where->segments[i], no, &ranges[i]);
    search->ranges = ranges;
    search->n_ranges = where->n_segments;
    return search->n_ranges;
}

enum row_found row2_found(const struct row2_search *search, struct row2 *row, struct row_source *at)
{
    return row2_take(search->ranges, search->n_ranges, row, at);
}

/* --- the reader ----------------------------------------------------------------------- */

void row_reader_init(struct row_reader *r, struct store *store, struct env *env)
{
    r->store = store;
    r->env = env;
}

static void forget_rows1(struct row_reader *r)
{
    for (unsigned i = 0; i < r->n_rows; i++)
        row1_free(&r->rows[i].row);
    r->n_rows = 0;
}

void row_reader_look_at(struct row_reader *r, const struct ancestry_record *where)
{
    CHECK(!r->reading);
    forget_rows1(r);
    r->row2_read = false;
    r->n_wanted = 0;
    if (where != &r->where)
        r->where = *where;
}

void row_reader_free(struct row_reader *r)
{
    CHECK(!r->reading);
    forget_rows1(r);
}

static void row2_read(struct store_read *read, enum status st)
{
    struct row_reader *r = container_of(read, struct row_reader, read);
    r->reading = false;
    r->row2_read = st == ST_OK;
    if (st == ST_OK)
        r->row2_found = row2_found(&r->search, &r->row2, &r->row2_at);
    store_read_release(read);
    r->ready(r, st);
}

bool row_reader_row2(struct row_reader *r, uint64_t no)
{
    CHECK(!r->reading);
    if (r->row2_read && r->row2_no == no)
        return true;
    r->row2_read = false;
    r->row2_no = no;
    r->read = r->how;
    r->read.ranges = r->ranges;
    r->read.n_ranges = row2_search(&r->search, &r->where, no, r->ranges);
    if (!r->read.n_ranges) {
        r->row2_found = ROW_MISSING;
        r->row2_read = true;
        return true;
    }
    r->read.done = row2_read;
    r->reading = true;
    store_read(r->store, r->env, &r->read);
    return false;
}

const struct row_reader_row *row_reader_row1(const struct row_reader *r, uint64_t no,
                                             struct row_source at)
{
    if (r->n_wanted)
        return NULL; /* what was asked for has taken their place */
    for (unsigned i = 0; i < r->n_rows; i++) {
        const struct row_reader_row *row = &r->rows[i];
        if (row->no == no && row->at.branch == at.branch && row->at.epoch == at.epoch)
            return row;
    }
    return NULL;
}

bool row_reader_want(struct row_reader *r, uint64_t no, struct row_source at)
{
    CHECK(!r->reading);
    if (r->n_wanted == ROW_READER_ROWS)
        return false;
    if (!r->n_wanted)
        forget_rows1(r);
    struct row_reader_row *row = &r->rows[r->n_wanted];
    *row = (struct row_reader_row){.no = no, .at = at};
    key_row(&r->keys[r->n_wanted], at.branch, 1, no, at.epoch);
    r->gets[r->n_wanted] = (struct store_get){.key = key_slice(&r->keys[r->n_wanted])};
    r->n_wanted++;
    return true;
}

static void rows1_read(struct store_read *read, enum status st)
{
    struct row_reader *r = container_of(read, struct row_reader, read);
    r->reading = false;
    for (unsigned i = 0; i < r->n_wanted && st == ST_OK; i++) {
        struct row_reader_row *row = &r->rows[r->n_rows++];
        const struct store_get *get = &r->gets[i];
        row1_init(&row->row);
        if (get->st == ST_NOTFOUND)
            row->found = ROW_MISSING;
        else if (get->st == ST_OK && row1_decode(&row->row, get->key, get->head))
            row->found = ROW_THERE;
        else
            row->found = ROW_DAMAGED;
    }
    r->n_wanted = 0;
    store_read_release(read);
    r->ready(r, st);
}

bool row_reader_start(struct row_reader *r)
{
    CHECK(!r->reading);
    if (!r->n_wanted)
        return false;
    r->read = r->how;
    r->read.gets = r->gets;
    r->read.n_gets = r->n_wanted;
    r->read.done = rows1_read;
    r->reading = true;
    store_read(r->store, r->env, &r->read);
    return true;
}
