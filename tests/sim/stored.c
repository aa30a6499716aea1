/*
 * The stored form, looked at; stored.h says for what.
 *
 * All keys are read into tables first, sorted as the store has them. Then each volume and each
 * snapshot is gone through row by row, and what it names is marked; what is not marked in the end
 * must be explained.
 */
#include "stored.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "volume/ancestry.h"
#include "volume/records.h"
#include "volume/rows.h"

struct row_key {
    uint64_t branch, level, no, epoch;
};

struct stored_row {
    struct row_key at;
    bool named, gone_through;
    uint64_t n_data; /* below it, once gone through */
    size_t len;
    uint8_t *bytes;
};

struct block_key {
    uint64_t branch, epoch, no;
};

struct stored_block {
    struct block_key at;
    bool named;
};

struct stored_snapshot {
    uint64_t branch, epoch;
    struct snapshot_record rec;
};

struct stored_trash {
    uint64_t branch;
    struct trash_record rec;
};

struct stored_child {
    uint64_t branch, epoch, child;
    bool claimed;
};

struct stored_branch {
    uint64_t branch;
    bool has_header, has_state, has_ancestry, has_name, removed;
    struct header_record header;
    struct state_record state;
    struct ancestry_record ancestry;
};

struct stored {
    struct world *world;
    bool clean;
    struct stored_row *rows;
    size_t n_rows, cap_rows;
    struct stored_block *blocks;
    size_t n_blocks, cap_blocks;
    struct stored_snapshot *snapshots;
    size_t n_snapshots, cap_snapshots;
    struct stored_trash *trash;
    size_t n_trash, cap_trash;
    struct stored_child *children;
    size_t n_children, cap_children;
    struct stored_branch *branches;
    size_t n_branches, cap_branches;
    uint64_t *rows2; /* numbers of the level-2 rows there are, in any branch */
    size_t n_rows2, cap_rows2;
    struct row2 row2;
    struct row1 row1;
    struct stored_counts counts;
    bool wrong;
};

static char what[400];

static void wrong(struct stored *s, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void wrong(struct stored *s, const char *format, ...)
{
    va_list args;
    if (s->wrong)
        return;
    s->wrong = true;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
}

typedef unsigned long long ull;

/* --- reading ------------------------------------------------------------------------- */

static struct stored_branch *branch_of(struct stored *s, uint64_t branch)
{
    for (size_t i = 0; i < s->n_branches; i++)
        if (s->branches[i].branch == branch)
            return &s->branches[i];
    mem_grow(&s->branches, &s->cap_branches, s->n_branches + 1, sizeof *s->branches);
    s->branches[s->n_branches] = (struct stored_branch){.branch = branch};
    return &s->branches[s->n_branches++];
}

static void see_row(struct stored *s, struct row_key at, struct slice head)
{
    mem_grow(&s->rows, &s->cap_rows, s->n_rows + 1, sizeof *s->rows);
    struct stored_row *row = &s->rows[s->n_rows++];
    *row = (struct stored_row){.at = at, .len = head.len, .bytes = mem_alloc(head.len + 1)};
    memcpy(row->bytes, head.data, head.len);
    if (at.level != 2)
        return;
    for (size_t i = 0; i < s->n_rows2; i++)
        if (s->rows2[i] == at.no)
            return;
    mem_grow(&s->rows2, &s->cap_rows2, s->n_rows2 + 1, sizeof *s->rows2);
    s->rows2[s->n_rows2++] = at.no;
}

/* A key of several parts; false where it is none. */
static bool see_part(struct stored *s, struct slice key, struct slice head)
{
    uint64_t branch, a, b;
    unsigned level;
    char name[NAME_BYTES_MAX + 1];
    struct name_record named;
    if (key_parse_block(key, &branch, &a, &b)) {
        mem_grow(&s->blocks, &s->cap_blocks, s->n_blocks + 1, sizeof *s->blocks);
        s->blocks[s->n_blocks++] = (struct stored_block){.at = {branch, a, b}};
    } else if (key_parse_row(key, &branch, &level, &a, &b)) {
        see_row(s, (struct row_key){branch, level, a, b}, head);
    } else if (key_parse_snapshot(key, &branch, &a)) {
        mem_grow(&s->snapshots, &s->cap_snapshots, s->n_snapshots + 1, sizeof *s->snapshots);
        struct stored_snapshot *snap = &s->snapshots[s->n_snapshots++];
        *snap = (struct stored_snapshot){.branch = branch, .epoch = a};
        if (!snapshot_decode(key, head, &snap->rec))
            wrong(s, "the record of snapshot %llu of branch %llu does not decode", (ull)a,
                  (ull)branch);
    } else if (key_parse_trash(key, &branch, &a)) {
        mem_grow(&s->trash, &s->cap_trash, s->n_trash + 1, sizeof *s->trash);
        struct stored_trash *t = &s->trash[s->n_trash++];
        *t = (struct stored_trash){.branch = branch};
        if (!trash_decode(key, head, &t->rec))
            wrong(s, "a trash record of branch %llu does not decode", (ull)branch);
    } else if (key_parse_child(key, &branch, &a, &b)) {
        struct child_record rec;
        mem_grow(&s->children, &s->cap_children, s->n_children + 1, sizeof *s->children);
        s->children[s->n_children++] =
            (struct stored_child){.branch = branch, .epoch = a, .child = b};
        if (!child_decode(key, head, &rec))
            wrong(s, "a child record of branch %llu does not decode", (ull)branch);
    } else if (key_parse_name(key, name)) {
        if (!name_decode(key, head, &named))
            wrong(s, "the name record %s does not decode", name);
        else if (branch_of(s, named.branch)->has_name)
            wrong(s, "branch %llu has two names", (ull)named.branch);
        else
            branch_of(s, named.branch)->has_name = true;
    } else {
        return false;
    }
    return true;
}

static bool is_key(struct slice key, const struct key *k)
{
    return key.len == k->len && !memcmp(key.data, k->bytes, k->len);
}

static void see(void *arg, struct slice key, struct slice head)
{
    struct stored *s = arg;
    struct key k;
    uint64_t branch;
    uint8_t id[SESSION_ID_BYTES];
    struct stored_branch *b;
    bool fits = true;
    if (see_part(s, key, head))
        return;
    if (key_parse_branch(key, 'h', &branch)) {
        b = branch_of(s, branch);
        b->has_header = true;
        fits = header_decode(key, head, &b->header);
    } else if (key_parse_branch(key, 'a', &branch)) {
        b = branch_of(s, branch);
        b->has_state = true;
        fits = state_decode(key, head, &b->state);
    } else if (key_parse_branch(key, 'l', &branch)) {
        b = branch_of(s, branch);
        b->has_ancestry = true;
        fits = ancestry_decode(key, head, &b->ancestry);
    } else if (key_parse_branch(key, 'g', &branch)) {
        struct removed_record rec;
        branch_of(s, branch)->removed = true;
        fits = removed_decode(key, head, &rec);
    } else if (key_parse_branch(key, 'o', &branch)) {
        struct owner_record rec;
        (void)branch_of(s, branch);
        fits = owner_decode(key, head, &rec);
    } else if (key_parse_branch(key, 'q', &branch) || key_parse_branch(key, 'r', &branch)) {
        (void)branch_of(s, branch);
    } else if (!key_parse_session(key, id)) {
        key_store_meta(&k);
        bool known = is_key(key, &k);
        key_branch_counter(&k);
        if (!known && !is_key(key, &k))
            wrong(s, "a key that is none of ours");
    }
    if (!fits)
        wrong(s, "a record ('%c') of branch %llu does not decode", ((const char *)key.data)[1], (ull)branch);
}

/* --- looking things up --------------------------------------------------------------- */

static int compare(uint64_t a, uint64_t b)
{
    return a < b ? -1 : a > b;
}

static int compare_rows(struct row_key a, struct row_key b)
{
    int c = compare(a.branch, b.branch);
    c = c ? c : compare(a.level, b.level);
    c = c ? c : compare(a.no, b.no);
    return c ? c : compare(a.epoch, b.epoch);
}

static int compare_blocks(struct block_key a, struct block_key b)
{
    int c = compare(a.branch, b.branch);
    c = c ? c : compare(a.epoch, b.epoch);
    return c ? c : compare(a.no, b.no);
}

/* The first row at or behind that key. */
static size_t seek_row(const struct stored *s, struct row_key at)
{
    size_t from = 0, to = s->n_rows;
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if (compare_rows(s->rows[middle].at, at) < 0)
            from = middle + 1;
        else
            to = middle;
    }
    return from;
}

static struct stored_row *find_row(struct stored *s, struct row_key at)
{
    size_t i = seek_row(s, at);
    bool found = i < s->n_rows && compare_rows(s->rows[i].at, at) == 0;
    return found ? &s->rows[i] : NULL;
}

static struct stored_block *find_block(struct stored *s, struct block_key at)
{
    size_t from = 0, to = s->n_blocks;
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        int c = compare_blocks(s->blocks[middle].at, at);
        if (c == 0)
            return &s->blocks[middle];
        if (c < 0)
            from = middle + 1;
        else
            to = middle;
    }
    return NULL;
}

/* The newest level-2 row of a branch in the epochs (after, upto]. */
static struct stored_row *newest_row2(struct stored *s, uint64_t branch, uint64_t no,
                                      uint64_t after, uint64_t upto)
{
    size_t i = seek_row(s, (struct row_key){branch, 2, no, upto + 1});
    if (i == 0 || after >= upto)
        return NULL;
    struct stored_row *row = &s->rows[i - 1];
    bool fits = row->at.branch == branch && row->at.level == 2 && row->at.no == no &&
                row->at.epoch > after;
    return fits ? row : NULL;
}

/* --- what a volume or a snapshot names ----------------------------------------------- */

struct view {
    struct stored *s;
    const char *of; /* for messages, with branch and epoch */
    bool is_snapshot;
    uint64_t branch, epoch, size;
    uint32_t block_size;
    struct ancestry_record ancestry;
    uint64_t n_data;
};

static struct stored_row *visible_row2(struct view *v, uint64_t no)
{
    const struct ancestry_record *a = &v->ancestry;
    /* (A snapshot's says all, own epochs too.) */
    struct stored_row *row =
        v->is_snapshot ? NULL : newest_row2(v->s, v->branch, no, a->after, v->epoch);
    for (uint32_t i = 0; i < a->n_segments && !row; i++)
        row = newest_row2(v->s, a->segments[i].branch, no, a->segments[i].after,
                          a->segments[i].upto);
    return row;
}

static void go_through_row1(struct view *v, struct stored_row *row)
{
    struct stored *s = v->s;
    struct key key;
    row->gone_through = true;
    key_row(&key, row->at.branch, 1, row->at.no, row->at.epoch);
    row1_free(&s->row1);
    if (!row1_decode(&s->row1, key_slice(&key), (struct slice){row->bytes, row->len})) {
        wrong(s, "level-1 row %llu of branch %llu, epoch %llu does not decode", (ull)row->at.no,
              (ull)row->at.branch, (ull)row->at.epoch);
        return;
    }
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        const struct row_source *source = row1_data(&s->row1, i);
        uint64_t no = (row->at.no << INDEX_SHIFT) + i;
        if (!source)
            continue;
        row->n_data++;
        struct stored_block *block =
            find_block(s, (struct block_key){source->branch, source->epoch, no});
        if (!block)
            wrong(s, "block %llu of branch %llu, epoch %llu is not there; the row of branch %llu, "
                     "epoch %llu names it, which counts for %s of branch %llu, epoch %llu",
                  (ull)no, (ull)source->branch, (ull)source->epoch, (ull)row->at.branch,
                  (ull)row->at.epoch, v->of, (ull)v->branch, (ull)v->epoch);
        else
            block->named = true;
    }
}

/* Whether the last row with data in it reaches over the end. */
static void check_end(struct view *v, const struct stored_row *row)
{
    uint64_t first = row->at.no << INDEX_SHIFT;
    uint64_t n_blocks = (v->size + v->block_size - 1) / v->block_size;
    struct key key;
    if (first + INDEX_FANOUT <= n_blocks)
        return;
    key_row(&key, row->at.branch, 1, row->at.no, row->at.epoch);
    row1_free(&v->s->row1);
    if (row1_decode(&v->s->row1, key_slice(&key), (struct slice){row->bytes, row->len}))
        for (unsigned i = 0; i < INDEX_FANOUT; i++)
            if (first + i >= n_blocks && row1_data(&v->s->row1, i))
                wrong(v->s, "block %llu lies past the end of %s of branch %llu, epoch %llu",
                      (ull)first + i, v->of, (ull)v->branch, (ull)v->epoch);
}

static void go_through_row2(struct view *v, uint64_t no)
{
    struct stored *s = v->s;
    struct stored_row *row = visible_row2(v, no);
    struct key key;
    if (!row)
        return;
    row->named = true;
    key_row(&key, row->at.branch, 2, no, row->at.epoch);
    if (!row2_decode(&s->row2, key_slice(&key), (struct slice){row->bytes, row->len})) {
        wrong(s, "level-2 row %llu of branch %llu, epoch %llu does not decode", (ull)no,
              (ull)row->at.branch, (ull)row->at.epoch);
        return;
    }
    for (unsigned i = 0; i < INDEX_FANOUT && !s->wrong; i++) {
        const struct row2_entry *e = &s->row2.entry[i];
        if (e->kind != ROW2_ROW)
            continue;
        uint64_t branch = e->branch ? e->branch : row->at.branch;
        struct row_key at = {branch, 1, (no << INDEX_SHIFT) + i, e->epoch};
        struct stored_row *row1 = find_row(s, at);
        if (!row1) {
            wrong(s, "level-1 row %llu of branch %llu, epoch %llu is not there; %s of branch %llu, "
                     "epoch %llu names it",
                  (ull)at.no, (ull)branch, (ull)at.epoch, v->of, (ull)v->branch, (ull)v->epoch);
            return;
        }
        row1->named = true;
        if (!row1->gone_through)
            go_through_row1(v, row1);
        check_end(v, row1);
        if (row1->n_data != e->n_data)
            wrong(s, "level-1 row %llu of branch %llu, epoch %llu has %llu data blocks, level 2 "
                     "says %u",
                  (ull)at.no, (ull)branch, (ull)at.epoch, (ull)row1->n_data, e->n_data);
        v->n_data += row1->n_data;
    }
}

static void go_through(struct view *v, uint64_t data_blocks)
{
    struct stored *s = v->s;
    for (size_t i = 0; i < s->n_rows2 && !s->wrong; i++)
        go_through_row2(v, s->rows2[i]);
    if (v->n_data != data_blocks)
        wrong(s, "%s of branch %llu, epoch %llu has %llu data blocks, its record says %llu", v->of,
              (ull)v->branch, (ull)v->epoch, (ull)v->n_data, (ull)data_blocks);
}

static struct stored_snapshot *find_snapshot(struct stored *s, uint64_t branch, uint64_t epoch)
{
    for (size_t i = 0; i < s->n_snapshots; i++)
        if (s->snapshots[i].branch == branch && s->snapshots[i].epoch == epoch)
            return &s->snapshots[i];
    return NULL;
}

static void check_parent(struct stored *s, const struct stored_branch *b)
{
    const struct header_record *h = &b->header;
    const struct stored_snapshot *parent = find_snapshot(s, h->parent_branch, h->parent_epoch);
    if (!h->parent_branch)
        return;
    if (!parent || parent->rec.removed)
        wrong(s, "branch %llu is a clone of a snapshot that is %s", (ull)b->branch,
              parent ? "removed" : "not there");
    for (size_t i = 0; i < s->n_children; i++) {
        struct stored_child *c = &s->children[i];
        if (c->branch != h->parent_branch || c->epoch != h->parent_epoch || c->child != b->branch)
            continue;
        c->claimed = true;
        return;
    }
    wrong(s, "branch %llu is a clone, and its parent has no child record", (ull)b->branch);
}

static void check_branch(struct stored *s, const struct stored_branch *b)
{
    if (b->removed) {
        if (b->has_name)
            wrong(s, "branch %llu is removed and has a name", (ull)b->branch);
        if (s->clean)
            wrong(s, "removed branch %llu was not cleared", (ull)b->branch);
        return;
    }
    if (!b->has_header || !b->has_state || !b->has_name) {
        wrong(s, "branch %llu lacks its %s", (ull)b->branch,
              !b->has_header ? "header" : !b->has_state ? "state" : "name");
        return;
    }
    s->counts.volumes++;
    check_parent(s, b);
    struct view head = {.s = s,
                        .of = "the volume",
                        .branch = b->branch,
                        .epoch = b->header.epoch,
                        .size = b->header.size,
                        .block_size = b->header.block_size,
                        .ancestry = b->ancestry};
    go_through(&head, b->state.data_blocks);
    uint64_t after, upto;
    if (s->clean && ancestry_gap(&b->ancestry, b->branch, &after, &upto))
        wrong(s, "branch %llu still has the gap of a rollback, epochs %llu to %llu",
              (ull)b->branch, (ull)after + 1, (ull)upto);
    for (size_t i = 0; i < s->n_snapshots && !s->wrong; i++) {
        const struct stored_snapshot *snap = &s->snapshots[i];
        if (snap->branch != b->branch)
            continue;
        if (snap->epoch >= b->header.epoch)
            wrong(s, "branch %llu is in epoch %llu and has a snapshot of epoch %llu",
                  (ull)b->branch, (ull)b->header.epoch, (ull)snap->epoch);
        if (!(b->header.features.incompat & FEATURE_INCOMPAT_HISTORY))
            wrong(s, "branch %llu has a snapshot, and its header does not tell", (ull)b->branch);
        if (snap->rec.removed && s->clean)
            wrong(s, "branch %llu: the removed snapshot of epoch %llu was not cleared",
                  (ull)b->branch, (ull)snap->epoch);
        if (snap->rec.removed)
            continue;
        s->counts.snapshots++;
        struct view v = {.s = s,
                         .of = "the snapshot",
                         .is_snapshot = true,
                         .branch = b->branch,
                         .epoch = snap->epoch,
                         .size = snap->rec.size,
                         .block_size = b->header.block_size};
        if (!ancestry_of_snapshot(&b->ancestry, b->branch, snap->epoch, &v.ancestry)) {
            wrong(s, "branch %llu: epoch %llu of a snapshot was rolled back", (ull)b->branch,
                  (ull)snap->epoch);
            return;
        }
        go_through(&v, snap->rec.data_blocks);
    }
}

/* --- what nobody names --------------------------------------------------------------- */

/* Whether somebody is about to clear what stands there in that epoch, of blocks [first, end). */
static bool is_garbage(struct stored *s, uint64_t branch, uint64_t epoch, uint64_t first,
                       uint64_t end)
{
    const struct stored_branch *b = branch_of(s, branch);
    if (b->removed)
        return true;
    for (size_t i = 0; i < s->n_trash; i++) {
        const struct stored_trash *t = &s->trash[i];
        if (t->branch == branch && epoch > t->rec.after && epoch <= t->rec.epoch &&
            t->rec.first_block < end && first < t->rec.end_block)
            return true;
    }
    /* In the ancestry, a gap is what lies between two of the branch's own segments. */
    const struct ancestry_record *a = &b->ancestry;
    uint64_t above = a->after;
    for (uint32_t i = 0; i < a->n_segments && a->segments[i].branch == branch; i++) {
        if (epoch > a->segments[i].upto && epoch <= above)
            return true;
        above = a->segments[i].after;
    }
    for (size_t i = 0; i < s->n_snapshots; i++) {
        const struct stored_snapshot *removed = &s->snapshots[i];
        uint64_t before = 0;
        if (removed->branch != branch || !removed->rec.removed || epoch > removed->epoch)
            continue;
        for (size_t k = 0; k < s->n_snapshots; k++) {
            const struct stored_snapshot *live = &s->snapshots[k];
            if (live->branch == branch && !live->rec.removed && live->epoch < removed->epoch)
                before = max_u64(before, live->epoch);
        }
        if (epoch > before)
            return true;
    }
    return false;
}

static void check_rest(struct stored *s)
{
    for (size_t i = 0; i < s->n_rows && !s->wrong; i++) {
        const struct stored_row *row = &s->rows[i];
        unsigned shift = row->at.level == 2 ? 2 * INDEX_SHIFT : INDEX_SHIFT;
        s->counts.rows++;
        if (row->named)
            continue;
        s->counts.garbage++;
        if (s->clean || !is_garbage(s, row->at.branch, row->at.epoch, row->at.no << shift,
                                    (row->at.no + 1) << shift))
            wrong(s, "level-%llu row %llu of branch %llu, epoch %llu is there and nothing names it",
                  (ull)row->at.level, (ull)row->at.no, (ull)row->at.branch, (ull)row->at.epoch);
    }
    for (size_t i = 0; i < s->n_blocks && !s->wrong; i++) {
        const struct stored_block *block = &s->blocks[i];
        s->counts.blocks++;
        if (block->named)
            continue;
        s->counts.garbage++;
        if (s->clean || !is_garbage(s, block->at.branch, block->at.epoch, block->at.no,
                                    block->at.no + 1))
            wrong(s, "block %llu of branch %llu, epoch %llu is there and nothing names it",
                  (ull)block->at.no, (ull)block->at.branch, (ull)block->at.epoch);
    }
    for (size_t i = 0; i < s->n_children && !s->wrong; i++) {
        const struct stored_child *c = &s->children[i];
        if (!c->claimed && !branch_of(s, c->branch)->removed)
            wrong(s, "the snapshot of epoch %llu of branch %llu has a child record of branch %llu, "
                     "which is no clone of it",
                  (ull)c->epoch, (ull)c->branch, (ull)c->child);
    }
    for (size_t i = 0; i < s->n_snapshots && !s->wrong; i++)
        if (!branch_of(s, s->snapshots[i].branch)->has_header &&
            !branch_of(s, s->snapshots[i].branch)->removed)
            wrong(s, "branch %llu has a snapshot and no header", (ull)s->snapshots[i].branch);
    if (s->clean && s->n_trash)
        wrong(s, "branch %llu still has a trash record", (ull)s->trash[0].branch);
}

const char *stored_check(struct world *w, bool clean, struct stored_counts *counts)
{
    struct stored s = {.world = w, .clean = clean};
    row1_init(&s.row1);
    world_look(w);
    world_each(w, (struct slice){"\x01", 1}, (struct slice){"\x02x", 2}, see, &s);
    for (size_t i = 0; i < s.n_branches && !s.wrong; i++)
        check_branch(&s, &s.branches[i]);
    if (!s.wrong)
        check_rest(&s);
    if (counts)
        *counts = s.counts;
    for (size_t i = 0; i < s.n_rows; i++)
        free(s.rows[i].bytes);
    row1_free(&s.row1);
    free(s.rows);
    free(s.blocks);
    free(s.snapshots);
    free(s.trash);
    free(s.children);
    free(s.branches);
    free(s.rows2);
    return s.wrong ? what : NULL;
}
