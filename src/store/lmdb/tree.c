/*
 * Reading LMDB's file without LMDB.
 *
 * LMDB believes every page. Here a page is looked at before it is followed: that it is the one that
 * was meant, that its bounds fit, and in a store with seals (seal.c) that it is what was
 * written. So damage is an error for the keys below it, and never another answer. A version's first
 * page is one of LMDB's two meta pages, which say where the list of free pages and the main database
 * begin; the main database says where the named ones do.
 *
 * The pages of a version stay as long as some transaction of LMDB holds it, which is what LMDB is
 * still needed for when something is read.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define NODE_BYTES 8u
#define NODE_BIG 1u      /* the value lies in pages of its own */
#define NODE_DATABASE 2u /* it is the record of a database */
#define RECORD_BYTES 48u
#define RECORD_DEPTH_AT 6u
#define RECORD_ROOT_AT 40u
#define DAMAGE_TELL_NS 1000000000u

const char *const lm_db_names[LM_DBS] = {
    [LM_DB_STORE] = "store", [LM_DB_KEYS] = "keys",   [LM_DB_LOGS] = "logs",
    [LM_DB_FREE] = "free",   [LM_DB_HOLES] = "holes", [LM_DB_PENDING] = "pending",
};

int lm_key_compare(const MDB_val *a, struct slice b)
{
    size_t both = a->mv_size < b.len ? a->mv_size : b.len;
    int c = both ? memcmp(a->mv_data, b.data, both) : 0;
    return c ? c : a->mv_size < b.len ? -1 : a->mv_size > b.len;
}

void lm_tree_init(struct lm_tree *t, struct lm *lm, uint32_t slots)
{
    *t = (struct lm_tree){.lm = lm, .whole_mask = slots - 1};
    t->whole = mem_zalloc(slots * sizeof *t->whole);
}

void lm_tree_free(struct lm_tree *t)
{
    free(t->whole);
}

/* ---- pages ---- */

/* Once a second at most: there may be many reads of one page, and many pages. */
void lm_tree_report(struct lm_tree *t, uint64_t page)
{
    if (lm_may_tell(&t->lm->damage_told_ns, DAMAGE_TELL_NS))
        log_error("store %s: page %" PRIu64 " of data.mdb is damaged, or the disk can't read it; what "
                  "lies below it can't be read or changed: restore the store from a backup",
                  t->lm->dir, page);
}

static const uint8_t *damaged(struct lm_tree *t, uint64_t page)
{
    lm_tree_report(t, page);
    return NULL;
}

static unsigned page_entries(const uint8_t *p)
{
    return (get_le16(p + LM_PAGE_LOWER_AT) - LM_PAGE_HEADER_BYTES) / 2;
}

/* NULL: damaged. */
static const uint8_t *page_get(struct lm_tree *t, uint64_t page, unsigned flags)
{
    const size_t len = t->lm->page_bytes;
    if (page < 2 || page > t->last_page)
        return damaged(t, page);
    const uint8_t *p = t->lm->map + page * len;
    uint64_t *slot = &t->whole[page & t->whole_mask], mark = (uint64_t)t->turn << 32 | page;
    if (*slot != mark && !lm_touch(p, len))
        return damaged(t, page);
    if (get_le16(p + LM_PAGE_FLAGS_AT) != flags)
        return damaged(t, page);
    if (*slot == mark)
        return p;
    unsigned lower = get_le16(p + LM_PAGE_LOWER_AT), upper = get_le16(p + LM_PAGE_UPPER_AT);
    if (get_le64(p) != page || lower <= LM_PAGE_HEADER_BYTES || lower % 2 || lower > upper ||
        upper > len)
        return damaged(t, page);
    if (t->lm->sealed && !lm_seal_page_fits(p, len))
        return damaged(t, page);
    *slot = mark;
    return p;
}

/* An entry of a page. */
struct node {
    const uint8_t *data;
    uint32_t data_len;
    unsigned flags;
    MDB_val key;
    uint64_t child;
};

static bool node_get(struct lm_tree *t, const uint8_t *p, unsigned i, bool leaf, struct node *n)
{
    const size_t len = t->lm->page_bytes;
    unsigned at = get_le16(p + LM_PAGE_HEADER_BYTES + 2 * i);
    if (at < LM_PAGE_HEADER_BYTES || at + NODE_BYTES > len)
        return false;
    const uint8_t *node = p + at;
    size_t key_len = get_le16(node + 6), end = at + NODE_BYTES + key_len;
    n->flags = get_le16(node + 4);
    n->key = (MDB_val){key_len, (void *)(uintptr_t)(node + NODE_BYTES)};
    n->data = node + NODE_BYTES + key_len;
    n->data_len = get_le32(node);
    n->child = n->data_len | (uint64_t)n->flags << 32;
    if (leaf)
        end += n->flags & NODE_BIG ? sizeof(uint64_t) : n->data_len;
    return end <= len;
}

/* A value that has pages of its own. */
static enum status big_value(struct lm_tree *t, const struct node *n, bool check, MDB_val *v)
{
    uint64_t page = get_le64(n->data), bytes = t->lm->page_bytes;
    if (page < 2 || page > t->last_page)
        return damaged(t, page), ST_IO;
    const uint8_t *p = t->lm->map + page * bytes;
    if (!lm_touch(p, bytes))
        return damaged(t, page), ST_IO;
    uint64_t pages = get_le32(p + LM_PAGE_LOWER_AT);
    if (get_le64(p) != page || get_le16(p + LM_PAGE_FLAGS_AT) != LM_PAGE_OVERFLOW || pages == 0 ||
        pages > t->last_page - page + 1 ||
        LM_PAGE_HEADER_BYTES + (uint64_t)n->data_len > pages * bytes ||
        !lm_touch(p, pages * bytes))
        return damaged(t, page), ST_IO;
    if (check && t->lm->sealed && !lm_seal_run_fits(p, pages * bytes))
        return damaged(t, page), ST_IO;
    *v = (MDB_val){n->data_len, (void *)(uintptr_t)(p + LM_PAGE_HEADER_BYTES)};
    return ST_OK;
}

static enum status node_value(struct lm_tree *t, const struct node *n, bool check, MDB_val *v)
{
    if (n->flags & NODE_BIG)
        return big_value(t, n, check, v);
    *v = (MDB_val){n->data_len, (void *)(uintptr_t)n->data};
    return ST_OK;
}

/* ---- cursors ---- */

static enum status bad_page(struct lm_cursor *c, unsigned level)
{
    lm_tree_report(c->tree, get_le64(c->level[level].page));
    c->depth = 0;
    return ST_IO;
}

/* Enters a page as level `level` of the way. */
static bool enter(struct lm_cursor *c, unsigned level, uint64_t page)
{
    bool leaf = level + 1 == c->tree->roots[c->db].depth;
    const uint8_t *p = page_get(c->tree, page, leaf ? LM_PAGE_LEAF : LM_PAGE_BRANCH);
    if (!p)
        return false;
    c->level[level].page = p;
    c->level[level].n = page_entries(p);
    c->level[level].at = 0;
    return true;
}

/* From level `from`, whose entry is chosen, down to a leaf along the first or last entries. */
static enum status descend(struct lm_cursor *c, unsigned from, bool last)
{
    unsigned depth = c->tree->roots[c->db].depth;
    for (unsigned l = from; l + 1 < depth; l++) {
        struct node n;
        if (!node_get(c->tree, c->level[l].page, c->level[l].at, false, &n))
            return bad_page(c, l);
        if (!enter(c, l + 1, n.child)) {
            c->depth = 0;
            return ST_IO;
        }
        if (last)
            c->level[l + 1].at = c->level[l + 1].n - 1;
    }
    c->depth = depth;
    return ST_OK;
}

static enum status entry(struct lm_cursor *c, MDB_val *k, MDB_val *v)
{
    unsigned l = c->depth - 1;
    struct node n;
    if (!node_get(c->tree, c->level[l].page, c->level[l].at, true, &n))
        return bad_page(c, l);
    *k = n.key;
    return node_value(c->tree, &n, c->db != LM_DB_KEYS, v);
}

/* Moves to the leaf after or before. */
static enum status step(struct lm_cursor *c, bool back)
{
    for (unsigned l = c->depth - 1; l-- > 0;) {
        if (back ? c->level[l].at == 0 : c->level[l].at + 1 >= c->level[l].n)
            continue;
        c->level[l].at += back ? -1u : 1u;
        return descend(c, l, back);
    }
    c->depth = 0;
    return ST_NOTFOUND;
}

static enum status end_get(struct lm_cursor *c, bool last, MDB_val *k, MDB_val *v)
{
    c->depth = 0;
    if (c->tree->roots[c->db].depth == 0)
        return ST_NOTFOUND;
    if (!enter(c, 0, c->tree->roots[c->db].page))
        return ST_IO;
    if (last)
        c->level[0].at = c->level[0].n - 1;
    enum status st = descend(c, 0, last);
    return st ? st : entry(c, k, v);
}

enum status lm_cursor_first(struct lm_cursor *c, MDB_val *k, MDB_val *v)
{
    return end_get(c, false, k, v);
}

enum status lm_cursor_last(struct lm_cursor *c, MDB_val *k, MDB_val *v)
{
    return end_get(c, true, k, v);
}

/* Of a branch the last entry whose key is not above `key` (the first one's key means nothing), of
 * a leaf the first whose key is not below; *exact: it is that key. */
static bool search(struct lm_cursor *c, unsigned l, bool leaf, struct slice key, bool *exact)
{
    const uint8_t *p = c->level[l].page;
    unsigned low = leaf ? 0 : 1, high = c->level[l].n;
    *exact = false;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        struct node n;
        if (!node_get(c->tree, p, middle, leaf, &n))
            return false;
        int order = lm_key_compare(&n.key, key);
        if (order == 0) {
            *exact = true;
            low = leaf ? middle : middle + 1;
            break;
        }
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    c->level[l].at = leaf ? low : low - 1;
    return true;
}

enum status lm_cursor_way(struct lm_cursor *c, struct slice key, bool *exact)
{
    unsigned depth = c->tree->roots[c->db].depth;
    c->depth = 0;
    if (depth == 0)
        return ST_NOTFOUND;
    uint64_t page = c->tree->roots[c->db].page;
    for (unsigned l = 0; l < depth; l++) {
        bool leaf = l + 1 == depth;
        struct node n;
        if (!enter(c, l, page))
            return ST_IO;
        if (!search(c, l, leaf, key, exact))
            return bad_page(c, l);
        if (leaf)
            break;
        if (!node_get(c->tree, c->level[l].page, c->level[l].at, false, &n))
            return bad_page(c, l);
        page = n.child;
    }
    c->depth = depth;
    return ST_OK;
}

enum status lm_cursor_seek(struct lm_cursor *c, struct slice key, MDB_val *k, MDB_val *v)
{
    bool exact;
    enum status st = lm_cursor_way(c, key, &exact);
    if (!st && c->level[c->depth - 1].at >= c->level[c->depth - 1].n)
        st = step(c, false);
    return st ? st : entry(c, k, v);
}

enum status lm_cursor_next(struct lm_cursor *c, MDB_val *k, MDB_val *v)
{
    unsigned l = c->depth - 1;
    if (c->level[l].at + 1 < c->level[l].n) {
        c->level[l].at++;
    } else {
        enum status st = step(c, false);
        if (st)
            return st;
    }
    return entry(c, k, v);
}

enum status lm_cursor_prev(struct lm_cursor *c, MDB_val *k, MDB_val *v)
{
    unsigned l = c->depth - 1;
    if (c->level[l].at > 0) {
        c->level[l].at--;
    } else {
        enum status st = step(c, true);
        if (st)
            return st;
    }
    return entry(c, k, v);
}

enum status lm_tree_get(struct lm_tree *t, enum lm_db db, struct slice key, MDB_val *v)
{
    struct lm_cursor c = lm_cursor(t, db);
    bool exact;
    MDB_val k;
    enum status st = lm_cursor_way(&c, key, &exact);
    if (st)
        return st;
    return exact ? entry(&c, &k, v) : ST_NOTFOUND;
}

/* ---- what a guard looks at besides ---- */

bool lm_tree_look(struct lm_tree *t, uint64_t page, bool leaf)
{
    return page_get(t, page, leaf ? LM_PAGE_LEAF : LM_PAGE_BRANCH) != NULL;
}

uint64_t lm_tree_child(struct lm_tree *t, uint64_t page, unsigned at)
{
    const uint8_t *p = page_get(t, page, LM_PAGE_BRANCH);
    struct node n;
    if (!p)
        return 0;
    unsigned entries = page_entries(p);
    if (!node_get(t, p, at < entries ? at : entries - 1, false, &n))
        return lm_tree_report(t, page), 0;
    return n.child;
}

enum status lm_cursor_big_look(struct lm_cursor *c)
{
    unsigned l = c->depth - 1;
    struct node n;
    MDB_val v;
    if (!node_get(c->tree, c->level[l].page, c->level[l].at, true, &n))
        return bad_page(c, l);
    return n.flags & NODE_BIG ? big_value(c->tree, &n, true, &v) : ST_OK;
}

/* ---- versions ---- */

static bool root_set(struct lm_tree *t, enum lm_db db, const uint8_t *record)
{
    uint64_t root = get_le64(record + RECORD_ROOT_AT);
    unsigned depth = get_le16(record + RECORD_DEPTH_AT);
    bool empty = root == UINT64_MAX;
    t->roots[db].page = root;
    t->roots[db].depth = empty ? 0 : depth;
    return empty || (depth > 0 && depth <= LM_DEPTH_MAX);
}

/* Where the named databases begin. One that is not there is empty. */
static enum status roots_load(struct lm_tree *t)
{
    for (unsigned db = 0; db < LM_DBS; db++) {
        MDB_val v;
        struct slice name = {lm_db_names[db], strlen(lm_db_names[db])};
        struct lm_cursor c = lm_cursor(t, LM_DB_MAIN);
        bool exact = false;
        t->roots[db].depth = 0;
        enum status st = lm_cursor_way(&c, name, &exact);
        if (st == ST_NOTFOUND || (!st && !exact))
            continue;
        if (st)
            return st;
        struct node n;
        unsigned l = c.depth - 1;
        if (!node_get(t, c.level[l].page, c.level[l].at, true, &n) || !(n.flags & NODE_DATABASE) ||
            node_value(t, &n, true, &v) || v.mv_size != RECORD_BYTES ||
            !root_set(t, (enum lm_db)db, v.mv_data))
            return bad_page(&c, l);
    }
    return ST_OK;
}

enum status lm_tree_load(struct lm_tree *t, uint64_t txn_id)
{
    if (++t->turn == 0) {
        memset(t->whole, 0, (t->whole_mask + (size_t)1) * sizeof *t->whole);
        t->turn = 1;
    }
    if (t->loaded && t->txn_id == txn_id)
        return ST_OK;
    t->loaded = false;
    unsigned slot = txn_id & 1;
    uint8_t meta[LM_META_BYTES];
    memcpy(meta, t->lm->map + (size_t)slot * t->lm->page_bytes, sizeof meta);
    uint64_t there = get_le64(meta + LM_META_TXN_AT);
    bool fits = !t->lm->sealed || lm_seal_meta_fits(meta, slot);
    if (!fits || there != txn_id)
        return ST_BUSY;
    t->txn_id = txn_id;
    t->last_page = get_le64(meta + LM_META_LAST_PAGE_AT);
    if (t->last_page >= t->lm->map_bytes / t->lm->page_bytes ||
        !root_set(t, LM_DB_PAGES, meta + LM_META_FREE_AT) ||
        !root_set(t, LM_DB_MAIN, meta + LM_META_MAIN_AT))
        return lm_tree_report(t, slot), ST_IO;
    enum status st = roots_load(t);
    t->loaded = st == ST_OK;
    return st;
}
