/*
 * Keeping LMDB off damaged pages while it writes.
 *
 * A write transaction follows pages, copies them, and writes the copies, with new seals: damage that
 * it met would be made whole. It can't be told what LMDB reads, but it can be foreseen. As long as a
 * page was not changed by the transaction it is a page of the version that the transaction is based
 * on, and is reached by the same keys. So before LMDB is sent to a key, the way there is
 * walked in that version, and every page on it looked at (tree.c).
 *
 * LMDB comes to more pages than those on the way to a key. Where a key is removed and too little is
 * left in a page, it is joined with the one beside it, or takes an entry of that; the same may go on
 * in the branches above, and where a branch gives or takes an entry the lowest key below it is
 * looked up. And where pages were joined, keys that would lie between the last entry of one and the
 * first of the next may be looked for in either. So where something is removed, where it is
 * gone on from key to key, and where a key would lie at the border of its leaf, on each level the
 * pages on both sides of the way are looked at as well, and the first way down from each of them.
 * What is joined with a page later was beside it, or beside something that was removed between.
 *
 * New pages come from LMDB's list of free pages, whose records have no other hash than their pages'
 * seals. It takes them in order, as many as it needs, so they are looked at as far as a need that is
 * never less than the real one, and where a value or a record takes several pages in a row, as
 * far beyond as LMDB goes for such a row.
 */
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "store/lmdb/engine.h"

#define GUARD_SLOTS 65536u
#define NEED_AT_END 64u
#define ROW_RECORDS 60u /* LMDB reads so many records more for each page of a row */
#define ROW_FROM 500u   /* a record of so many pages takes a row of pages itself */
#define PAGE_FIRST 2u

struct lm_guard *lm_guard_new(struct lm *lm)
{
    struct lm_guard *g = mem_zalloc(sizeof *g);
    g->lm = lm;
    lm_tree_init(&g->base, lm, GUARD_SLOTS);
    return g;
}

void lm_guard_free(struct lm_guard *g)
{
    if (!g)
        return;
    lm_tree_free(&g->base);
    free(g);
}

enum status lm_guard_begin(struct lm_guard *g, uint64_t txn_id)
{
    memset(g->around, 0, sizeof g->around);
    g->free = lm_cursor(&g->base, LM_DB_PAGES);
    g->free_begun = g->free_ended = false;
    g->free_pages = g->free_spare = g->need = g->need_spare = 0;
    /* Also in a store without seals: reads that go before a change use it. */
    enum status st = lm_tree_load(&g->base, txn_id - 1);
    if (st == ST_BUSY) {
        lm_tree_report(&g->base, (txn_id - 1) & 1);
        st = ST_IO;
    }
    return st;
}

/* ---- ways ---- */

/* Down from `page`, which is `levels` above a leaf, along the first entries. */
static bool first_way(struct lm_guard *g, uint64_t page, unsigned levels)
{
    for (; levels > 0; levels--) {
        page = lm_tree_child(&g->base, page, 0);
        if (!page)
            return false;
    }
    return lm_tree_look(&g->base, page, true);
}

/* The pages on both sides of the cursor's way. */
static enum status look_around(struct lm_guard *g, struct lm_cursor *c)
{
    unsigned depth = c->depth;
    const uint8_t *leaf = c->level[depth - 1].page;
    if (g->around[c->db] == leaf)
        return ST_OK;
    uint64_t left = 0, right = 0;
    for (unsigned l = 0; l + 1 < depth; l++) {
        uint64_t page = get_le64(c->level[l].page);
        unsigned at = c->level[l].at, n = c->level[l].n, below = depth - 2 - l;
        uint64_t beside[3] = {0};
        if (at > 0 || left)
            beside[0] = lm_tree_child(&g->base, at > 0 ? page : left, at > 0 ? at - 1 : UINT32_MAX);
        beside[1] = lm_tree_child(&g->base, page, at);
        if (at + 1 < n || right)
            beside[2] = lm_tree_child(&g->base, at + 1 < n ? page : right, at + 1 < n ? at + 1 : 0);
        if ((!beside[0] && (at > 0 || left)) || (!beside[2] && (at + 1 < n || right)))
            return ST_IO;
        for (unsigned i = 0; i < 3; i++)
            if (beside[i] && !first_way(g, beside[i], below))
                return ST_IO;
        left = beside[0];
        right = beside[2];
    }
    g->around[c->db] = leaf;
    return ST_OK;
}

/* ---- the list of free pages ---- */

/* A record is the count of its pages and their numbers, in falling order. */
static bool free_record_fits(const struct lm_guard *g, const MDB_val *k, const MDB_val *v)
{
    const uint8_t *p = v->mv_data;
    if (k->mv_size != 8 || v->mv_size < 8 || v->mv_size % 8 || get_le64(p) > v->mv_size / 8 - 1)
        return false;
    uint64_t n = get_le64(p), above = g->base.last_page + 1;
    for (uint64_t i = 1; i <= n; i++) {
        uint64_t page = get_le64(p + 8 * i);
        if (page >= above || page < PAGE_FIRST)
            return false;
        above = page;
    }
    return true;
}

static enum status free_look(struct lm_guard *g)
{
    while (!g->free_ended && (g->free_pages < g->need || g->free_spare < g->need_spare)) {
        MDB_val k, v;
        enum status st = g->free_begun ? lm_cursor_next(&g->free, &k, &v)
                                       : lm_cursor_first(&g->free, &k, &v);
        g->free_begun = true;
        if (st == ST_NOTFOUND) {
            g->free_ended = true;
            break;
        }
        if (st)
            return st;
        if (!free_record_fits(g, &k, &v)) {
            lm_tree_report(&g->base, get_le64(g->free.level[g->free.depth - 1].page));
            return ST_IO;
        }
        st = look_around(g, &g->free);
        if (st)
            return st;
        g->free_spare += g->free_pages >= g->need;
        g->free_pages += get_le64(v.mv_data);
    }
    return ST_OK;
}

/* One more change, which takes a new page for each on its way, and for each that is split. */
static enum status need_more(struct lm_guard *g, enum lm_db db, bool around, size_t bytes)
{
    uint64_t pages = 2u * g->base.roots[db].depth + 4u;
    uint64_t row = bytes / g->lm->page_bytes;
    g->need += around ? 2 * pages : pages + row;
    if (row > 1)
        g->need_spare += ROW_RECORDS * (row + 1);
    return free_look(g);
}

enum status lm_guard_end(struct lm_guard *g)
{
    if (!g->lm->sealed)
        return ST_OK;
    struct lm_cursor c = lm_cursor(&g->base, LM_DB_PAGES);
    MDB_val k, v;
    g->need += NEED_AT_END + LM_DBS * (2u * g->base.roots[LM_DB_MAIN].depth + 2u);
    if (g->need > ROW_FROM)
        g->need_spare += ROW_RECORDS * (g->need / ROW_FROM + 1);
    enum status st = free_look(g);
    if (!st)
        st = lm_cursor_last(&c, &k, &v);
    return st == ST_NOTFOUND ? ST_OK : st ? st : look_around(g, &c);
}

/* ---- keys ---- */

static enum status key_look(struct lm_guard *g, enum lm_db db, struct slice key, bool around)
{
    struct lm_cursor c = lm_cursor(&g->base, db);
    bool exact;
    enum status st = lm_cursor_way(&c, key, &exact);
    if (st)
        return st == ST_NOTFOUND ? ST_OK : st;
    unsigned at = c.level[c.depth - 1].at, n = c.level[c.depth - 1].n;
    if (exact)
        st = lm_cursor_big_look(&c);
    if (!st && (around || (!exact && (at == 0 || at == n))))
        st = look_around(g, &c);
    return st;
}

enum status lm_guard_key(struct lm_guard *g, enum lm_db db, struct slice key, size_t bytes)
{
    if (!g || !g->lm->sealed)
        return ST_OK;
    enum status st = need_more(g, db, false, bytes);
    return st ? st : key_look(g, db, key, false);
}

enum status lm_guard_around(struct lm_guard *g, enum lm_db db, struct slice key)
{
    if (!g || !g->lm->sealed)
        return ST_OK;
    enum status st = need_more(g, db, true, 0);
    return st ? st : key_look(g, db, key, true);
}

enum status lm_guard_ends(struct lm_guard *g, enum lm_db db)
{
    if (!g || !g->lm->sealed)
        return ST_OK;
    for (unsigned last = 0; last < 2; last++) {
        struct lm_cursor c = lm_cursor(&g->base, db);
        MDB_val k, v;
        enum status st = last ? lm_cursor_last(&c, &k, &v) : lm_cursor_first(&c, &k, &v);
        if (!st)
            st = lm_cursor_big_look(&c);
        if (!st)
            st = look_around(g, &c);
        if (st && st != ST_NOTFOUND)
            return st;
    }
    return ST_OK;
}
