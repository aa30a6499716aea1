#include "volume/walk.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

#define VERSIONS_PER_READ 16u
#define PAIRS_PER_READ (ROW_READER_ROWS / 2) /* a row, and the one before it */
#define ACTUAL_UNKNOWN UINT16_MAX

/* A level-2 row as the state at hand sees it. */
struct version {
    enum row_found found;
    struct row_source at;
    struct row2 row;
};

/* The own versions of one level-2 row, in the order of their epochs. */
struct versions {
    struct walk_read r;
    struct store_range range;
    struct key begin, end;
    bool held;     /* the answer is in use */
    bool failed;   /* they can't be listed */
    uint32_t next; /* in range.pairs */
};

struct walk_run {
    struct walk *walk;
    struct row_reader rows;
    bool rows_ready;
    enum status rows_st;
    struct ancestry_record inherited;
    struct versions versions;
    struct version *before, *now;
    uint16_t actual[INDEX_FANOUT]; /* data blocks of the level-1 rows of `now` */
    struct row1 none, fixed_before, fixed_now;
};

/* ---- reading ---- */

static void read_done(struct store_read *read, enum status st)
{
    struct walk_read *r = container_of(read, struct walk_read, read);
    r->st = st;
    r->answered = true;
}

enum status walk_read(struct walk_read *r, struct store *store, struct env *env,
                      void (*run_once)(struct env *env))
{
    r->answered = false;
    r->read.background = true;
    r->read.done = read_done;
    store_read(store, env, &r->read);
    while (!r->answered)
        run_once(env);
    return r->st;
}

static enum status read_wait(struct walk_run *wr, struct walk_read *r)
{
    struct walk *w = wr->walk;
    r->read.tag = w->branch;
    return walk_read(r, w->store, w->env, w->run_once);
}

static void rows_ready(struct row_reader *rows, enum status st)
{
    struct walk_run *wr = container_of(rows, struct walk_run, rows);
    wr->rows_ready = true;
    wr->rows_st = st;
}

static enum status rows_wait(struct walk_run *wr)
{
    while (!wr->rows_ready)
        wr->walk->run_once(wr->walk->env);
    wr->rows_ready = false;
    return wr->rows_st;
}

/* ---- ancestry ---- */

bool walk_epoch_counts(const struct ancestry_record *ancestry, uint64_t branch, uint64_t epoch)
{
    bool counts = epoch > ancestry->after;
    for (uint32_t i = 0; i < ancestry->n_segments && !counts; i++) {
        const struct ancestry_segment *s = &ancestry->segments[i];
        counts = s->branch == branch && epoch > s->after && epoch <= s->upto;
    }
    return counts;
}

void walk_inherited(const struct ancestry_record *ancestry, uint64_t branch,
                    struct ancestry_record *out)
{
    out->after = 0;
    out->n_segments = 0;
    for (uint32_t i = 0; i < ancestry->n_segments; i++)
        if (ancestry->segments[i].branch != branch)
            out->segments[out->n_segments++] = ancestry->segments[i];
}

/* ---- which level-2 rows there are ---- */

/* The first level-2 row from *no on that anything is stored of, in the branch or where it inherits
 * from. ST_NOTFOUND: none. ST_IO: what comes next can't be told. */
static enum status row2_next(struct walk_run *wr, uint64_t *no)
{
    struct walk *w = wr->walk;
    struct key begin[ANCESTRY_MAX + 1], end[ANCESTRY_MAX + 1];
    struct store_range ranges[ANCESTRY_MAX + 1];
    uint32_t n = 0;
    for (uint32_t i = 0; i <= wr->inherited.n_segments; i++, n++) {
        uint64_t branch = i ? wr->inherited.segments[i - 1].branch : w->branch;
        key_row(&begin[i], branch, 2, *no, 0);
        key_prefix_rows(&end[i], branch, 2);
        key_prefix_end(&end[i]);
        ranges[i] = (struct store_range){
            .begin = key_slice(&begin[i]), .end = key_slice(&end[i]), .limit = 1};
    }
    struct walk_read r = {.read = {.ranges = ranges, .n_ranges = n}};
    enum status st = read_wait(wr, &r);
    bool found = false;
    uint64_t least = 0;
    for (uint32_t i = 0; i < n && st == ST_OK; i++) {
        uint64_t branch, row, epoch;
        unsigned level;
        if (ranges[i].n_pairs == 0)
            continue;
        if (!key_parse_row(ranges[i].pairs[0].key, &branch, &level, &row, &epoch))
            st = ST_IO;
        else if (!found || row < least)
            least = row;
        found = true;
    }
    store_read_release(&r.read);
    if (st == ST_OK && !found)
        st = ST_NOTFOUND;
    if (st == ST_OK)
        *no = least;
    return st;
}

/* ---- the versions of a level-2 row ---- */

static void versions_release(struct versions *v)
{
    if (v->held)
        store_read_release(&v->r.read);
    v->held = false;
}

/* Reads on from the key in v->begin. */
static enum status versions_read(struct walk_run *wr)
{
    struct versions *v = &wr->versions;
    versions_release(v);
    v->range = (struct store_range){
        .begin = key_slice(&v->begin), .end = key_slice(&v->end), .limit = VERSIONS_PER_READ};
    v->r = (struct walk_read){.read = {.ranges = &v->range, .n_ranges = 1}};
    v->next = 0;
    enum status st = read_wait(wr, &v->r);
    v->held = true;
    v->failed = st == ST_IO;
    if (st != ST_OK)
        v->range.n_pairs = 0;
    return st == ST_IO ? ST_OK : st;
}

static enum status versions_begin(struct walk_run *wr, uint64_t no)
{
    struct versions *v = &wr->versions;
    key_row(&v->begin, wr->walk->branch, 2, no, 0);
    key_row(&v->end, wr->walk->branch, 2, no + 1, 0);
    return versions_read(wr);
}

/* The next version, which stays the next one; NULL: there is none (*st is ST_OK then), or the store
 * can't be read. */
static const struct store_pair *versions_peek(struct walk_run *wr, uint64_t *epoch, enum status *st)
{
    struct versions *v = &wr->versions;
    *st = ST_OK;
    if (v->failed)
        return NULL;
    if (v->next == v->range.n_pairs) {
        if (!v->range.more)
            return NULL;
        uint64_t branch, no, last;
        unsigned level;
        struct slice key = v->range.pairs[v->next - 1].key;
        v->failed = !key_parse_row(key, &branch, &level, &no, &last);
        if (!v->failed) {
            key_row(&v->begin, branch, 2, no, last + 1);
            *st = versions_read(wr);
        }
        return *st == ST_OK ? versions_peek(wr, epoch, st) : NULL;
    }
    uint64_t branch, no;
    unsigned level;
    const struct store_pair *pair = &v->range.pairs[v->next];
    v->failed = !key_parse_row(pair->key, &branch, &level, &no, epoch);
    return v->failed ? NULL : pair;
}

/* What all states inherit where none of the branch's own is there yet. */
static enum status inherited_read(struct walk_run *wr, uint64_t no)
{
    struct row2_search search;
    struct store_range ranges[ANCESTRY_MAX];
    struct version *v = wr->now;
    v->found = ROW_MISSING;
    v->at = (struct row_source){0};
    row2_init(&v->row);
    struct walk_read r = {.read = {.ranges = ranges}};
    r.read.n_ranges = row2_search(&search, &wr->inherited, no, ranges);
    if (r.read.n_ranges == 0)
        return ST_OK;
    enum status st = read_wait(wr, &r);
    if (st == ST_OK)
        v->found = row2_found(&search, &v->row, &v->at);
    else if (st == ST_IO)
        v->found = ROW_DAMAGED;
    store_read_release(&r.read);
    wr->walk->n_rows += v->found == ROW_THERE;
    return st == ST_IO ? ST_OK : st;
}

/* Brings wr->now to what a state of `epoch` sees; *changed: it is another row than before. */
static enum status version_advance(struct walk_run *wr, uint64_t no, uint64_t epoch, bool *changed)
{
    struct walk *w = wr->walk;
    uint64_t at;
    enum status st;
    const struct store_pair *pair;
    bool taken = false;
    while ((pair = versions_peek(wr, &at, &st)) && at <= epoch) {
        wr->versions.next++;
        if (!walk_epoch_counts(w->ancestry, w->branch, at))
            continue;
        if (taken && w->unseen)
            w->unseen(w, no, wr->now->at.epoch);
        if (!taken) {
            struct version *was = wr->before;
            wr->before = wr->now;
            wr->now = was;
        }
        taken = *changed = true;
        wr->now->at = (struct row_source){w->branch, at};
        wr->now->found =
            row2_decode(&wr->now->row, pair->key, pair->head) ? ROW_THERE : ROW_DAMAGED;
        w->n_rows++;
    }
    return st;
}

/* ---- level 1 ---- */

static struct row_source entry_at(const struct version *v, unsigned i)
{
    const struct row2_entry *e = &v->row.entry[i];
    if (e->kind != ROW2_ROW)
        return (struct row_source){0};
    return (struct row_source){e->branch ? e->branch : v->at.branch, e->epoch};
}

static bool entry_changed(const struct walk_run *wr, unsigned i)
{
    const struct row2_entry *was = &wr->before->row.entry[i], *is = &wr->now->row.entry[i];
    struct row_source a = entry_at(wr->before, i), b = entry_at(wr->now, i);
    return was->kind != is->kind || a.branch != b.branch || a.epoch != b.epoch;
}

/* A row that is stored, as it was read, or one that is all of one kind, made in `fixed`. */
static void row_of(struct walk_run *wr, const struct version *v, uint64_t no, struct row1 *fixed,
                   struct walk_row *out)
{
    unsigned i = no & (INDEX_FANOUT - 1);
    *out = (struct walk_row){.found = ROW_THERE, .at = entry_at(v, i), .row = fixed};
    if (v->row.entry[i].kind != ROW2_ROW) {
        row1_fill(fixed, 0, INDEX_FANOUT, v->row.entry[i].kind);
        return;
    }
    const struct row_reader_row *row = row_reader_row1(&wr->rows, no, out->at);
    out->found = row ? row->found : ROW_MISSING;
    out->row = out->found == ROW_THERE ? &row->row : &wr->none;
    wr->walk->n_rows++;
}

static void row1_tell(struct walk_run *wr, size_t state, uint64_t no)
{
    struct walk *w = wr->walk;
    struct walk_row before, now;
    unsigned i = no & (INDEX_FANOUT - 1);
    row_of(wr, wr->before, no, &wr->fixed_before, &before);
    row_of(wr, wr->now, no, &wr->fixed_now, &now);
    wr->actual[i] = now.found == ROW_THERE ? (uint16_t)now.row->n_data : ACTUAL_UNKNOWN;
    if (w->row1)
        w->row1(w, state, no, &before, &now);
}

/* Tells the level-1 rows below the level-2 row `no` that are others than before. */
static enum status rows1_tell(struct walk_run *wr, size_t state, uint64_t no)
{
    uint64_t first = no << INDEX_SHIFT;
    for (unsigned i = 0; i < INDEX_FANOUT;) {
        unsigned end = i, pairs = 0;
        for (; end < INDEX_FANOUT && pairs < PAIRS_PER_READ; end++) {
            if (!entry_changed(wr, end))
                continue;
            if (wr->before->row.entry[end].kind == ROW2_ROW)
                row_reader_want(&wr->rows, first + end, entry_at(wr->before, end));
            if (wr->now->row.entry[end].kind == ROW2_ROW)
                row_reader_want(&wr->rows, first + end, entry_at(wr->now, end));
            pairs++;
        }
        enum status st = row_reader_start(&wr->rows) ? rows_wait(wr) : ST_OK;
        /* (A single row that can't be read is told as damaged.) */
        if (st != ST_OK)
            return st;
        for (; i < end; i++)
            if (entry_changed(wr, i))
                row1_tell(wr, state, first + i);
        if (wr->walk->go_on && !wr->walk->go_on(wr->walk))
            return ST_SHUTDOWN;
    }
    return ST_OK;
}

static void count(struct walk_run *wr, size_t state, uint64_t no, bool changed)
{
    struct walk *w = wr->walk;
    struct walk_state *s = &w->states[state];
    if (wr->now->found == ROW_DAMAGED)
        s->uncertain = true;
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        const struct row2_entry *e = &wr->now->row.entry[i];
        if (e->kind != ROW2_ROW)
            continue;
        if (wr->actual[i] == ACTUAL_UNKNOWN) {
            s->uncertain = true;
            continue;
        }
        s->n_data += wr->actual[i];
        if (changed && e->n_data != wr->actual[i] && w->miscount)
            w->miscount(w, state, (no << INDEX_SHIFT) + i, wr->now->at, e->n_data, wr->actual[i]);
    }
}

static void row2_lost(struct walk_run *wr, size_t from, uint64_t no)
{
    struct walk *w = wr->walk;
    for (size_t i = from; i < w->n_states; i++)
        w->states[i].uncertain = true;
    if (w->row2)
        w->row2(w, from, no, (struct row_source){.branch = w->branch}, ROW_DAMAGED);
}

static enum status row2_walk(struct walk_run *wr, uint64_t no)
{
    struct walk *w = wr->walk;
    row2_init(&wr->before->row);
    wr->before->at = (struct row_source){0};
    enum status st = inherited_read(wr, no);
    if (st == ST_OK)
        st = versions_begin(wr, no);
    for (size_t i = 0; i < w->n_states && st == ST_OK; i++) {
        /* (The first state has what is inherited in common with none.) */
        bool changed = i == 0;
        struct version *inherited = wr->now;
        st = version_advance(wr, no, w->states[i].epoch, &changed);
        if (st == ST_OK && wr->versions.failed) {
            row2_lost(wr, i, no);
            break;
        }
        if (i == 0 && wr->now != inherited) {
            row2_init(&wr->before->row);
            wr->before->at = (struct row_source){0};
        }
        if (st == ST_OK && changed) {
            if (w->row2)
                w->row2(w, i, no, wr->now->at, wr->now->found);
            if (wr->now->found != ROW_DAMAGED)
                st = rows1_tell(wr, i, no);
        }
        if (st == ST_OK)
            count(wr, i, no, changed);
        if (st == ST_OK && changed && w->state_over)
            w->state_over(w, i, no);
    }
    versions_release(&wr->versions);
    if (st == ST_OK && w->row2_over)
        w->row2_over(w, no);
    return st;
}

static enum status all_rows(struct walk_run *wr)
{
    struct walk *w = wr->walk;
    uint64_t n_rows2 = (w->n_blocks + (1ull << 2 * INDEX_SHIFT) - 1) >> 2 * INDEX_SHIFT;
    for (uint64_t no = 0;; no++) {
        uint64_t asked = no;
        enum status st = row2_next(wr, &no);
        if (st == ST_NOTFOUND)
            return ST_OK;
        if (st == ST_IO && asked < n_rows2) {
            row2_lost(wr, 0, asked);
            if (w->row2_over)
                w->row2_over(w, asked);
            no = asked;
            continue;
        }
        if (st == ST_OK)
            st = row2_walk(wr, no);
        if (st != ST_OK)
            return st;
    }
}

enum status walk_run(struct walk *w, struct err *e)
{
    struct walk_run *wr = w->run = mem_zalloc(sizeof *wr);
    wr->walk = w;
    w->n_rows = 0;
    for (size_t i = 0; i < w->n_states; i++) {
        w->states[i].n_data = 0;
        w->states[i].uncertain = false;
    }
    walk_inherited(w->ancestry, w->branch, &wr->inherited);
    row_reader_init(&wr->rows, w->store, w->env);
    wr->rows.how = (struct store_read){.background = true, .tag = w->branch};
    wr->rows.ready = rows_ready;
    wr->before = mem_zalloc(sizeof *wr->before);
    wr->now = mem_zalloc(sizeof *wr->now);
    row1_init(&wr->none);
    row1_init(&wr->fixed_before);
    row1_init(&wr->fixed_now);
    enum status st = all_rows(wr);
    if (st == ST_SHUTDOWN)
        fail(e, st, "interrupted");
    else if (st != ST_OK)
        fail(e, st, "cannot read the index: %s", status_text(st));
    versions_release(&wr->versions);
    row_reader_free(&wr->rows);
    row1_free(&wr->none);
    row1_free(&wr->fixed_before);
    row1_free(&wr->fixed_now);
    free(wr->before);
    free(wr->now);
    free(wr);
    w->run = NULL;
    return st;
}
