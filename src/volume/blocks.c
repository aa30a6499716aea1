#include "volume/blocks.h"

#include <stdlib.h>

#include "base/check.h"
#include "base/mem.h"
#include "volume/internal.h"

#define FREE_MAX 1024u
#define SCAN_MAX 256u /* entries looked at for one eviction before giving up */

static uint64_t power_of_two_above(uint64_t v)
{
    uint64_t p = 1024;
    while (p < v)
        p <<= 1;
    return p;
}

void blocks_init(struct blocks *t, struct buf_pool *pool)
{
    uint64_t most = buf_pool_budget(pool) / 4096;
    *t = (struct blocks){.pool = pool};
    list_init(&t->small);
    list_init(&t->main);
    list_init(&t->free);
    t->count_max = most;
    t->table_mask = power_of_two_above(most / 2) - 1;
    t->table = mem_zalloc((t->table_mask + 1) * sizeof *t->table);
    t->ghost_mask = power_of_two_above(most / 4) - 1;
    t->ghost = mem_zalloc((t->ghost_mask + 1) * sizeof *t->ghost);
}

void blocks_destroy(struct blocks *t)
{
    CHECK(t->count == 0);
    struct list *l;
    while ((l = list_pop(&t->free)))
        free(container_of(l, struct blk, queue));
    free(t->table);
    free(t->ghost);
}

/* Zero blocks have no buffer, so the budget of buffers does not bound them. */
static void bound_count(struct blocks *t);

struct blk *blocks_add(struct blocks *t, struct volume *vol, uint64_t tag, uint64_t no,
                       struct list *vol_list)
{
    if (t->count >= t->count_max)
        bound_count(t);
    struct list *l = list_pop(&t->free);
    struct blk *e;
    if (l) {
        e = container_of(l, struct blk, queue);
        t->free_count--;
    } else {
        e = mem_alloc(sizeof *e);
    }
    struct blk **slot = &t->table[blocks_hash(tag, no) & t->table_mask];
    *e = (struct blk){.vol = vol, .tag = tag, .no = no, .chain = *slot};
    *slot = e;
    list_init(&e->dirty);
    list_init(&e->queue);
    list_init(&e->waiters);
    list_add_tail(vol_list, &e->in_vol);
    t->count++;
    return e;
}

void blocks_drop(struct blocks *t, struct blk *e)
{
    CHECK(e->pins == 0 && list_empty(&e->waiters) && !e->fetching);
    blocks_dequeue(t, e);
    list_remove(&e->dirty);
    list_remove(&e->in_vol);
    struct blk **p = &t->table[blocks_hash(e->tag, e->no) & t->table_mask];
    while (*p != e)
        p = &(*p)->chain;
    *p = e->chain;
    if (e->buf) {
        buf_unref(e->buf);
        e->vol->cached_blocks--;
    }
    mask_free(&e->mask);
    t->count--;
    if (t->free_count < FREE_MAX) {
        list_add_head(&t->free, &e->queue);
        t->free_count++;
    } else {
        free(e);
    }
}

void blocks_dequeue(struct blocks *t, struct blk *e)
{
    if (e->which == BLK_NO_QUEUE)
        return;
    list_remove(&e->queue);
    if (e->which == BLK_SMALL)
        t->small_count--;
    else
        t->main_count--;
    e->which = BLK_NO_QUEUE;
}

static void enqueue_in(struct blocks *t, struct blk *e, uint8_t which)
{
    e->which = which;
    if (which == BLK_SMALL) {
        list_add_head(&t->small, &e->queue);
        t->small_count++;
    } else {
        list_add_head(&t->main, &e->queue);
        t->main_count++;
    }
}

static uint32_t *ghost_slot(struct blocks *t, const struct blk *e, uint32_t *print)
{
    uint64_t h = blocks_hash(e->tag, e->no);
    *print = (uint32_t)(h >> 32) | 1;
    return &t->ghost[(h ^ h >> 17) & t->ghost_mask];
}

void blocks_enqueue(struct blocks *t, struct blk *e)
{
    CHECK(e->gen == 0);
    if (e->which != BLK_NO_QUEUE)
        return;
    uint32_t print;
    uint32_t *ghost = ghost_slot(t, e, &print);
    if (*ghost == print) {
        *ghost = 0;
        enqueue_in(t, e, BLK_MAIN);
    } else {
        enqueue_in(t, e, e->freq > 1 ? BLK_MAIN : BLK_SMALL);
    }
}

/* One step of replacement: true when an entry went. */
static bool evict_one(struct blocks *t)
{
    for (unsigned i = 0; i < SCAN_MAX; i++) {
        bool small = t->small_count && (t->small_count * 10 >= t->main_count || !t->main_count);
        struct list *queue = small ? &t->small : &t->main;
        if (list_empty(queue))
            return false;
        struct blk *e = container_of(queue->prev, struct blk, queue);
        blocks_dequeue(t, e);
        if (e->pins || e->fetching || !list_empty(&e->waiters)) {
            enqueue_in(t, e, small ? BLK_SMALL : BLK_MAIN);
        } else if (small && e->freq > 1) {
            e->freq = 0;
            enqueue_in(t, e, BLK_MAIN);
        } else if (!small && e->freq > 0) {
            e->freq--;
            enqueue_in(t, e, BLK_MAIN);
        } else {
            if (small) {
                uint32_t print;
                uint32_t *ghost = ghost_slot(t, e, &print);
                *ghost = print;
            }
            blocks_drop(t, e);
            return true;
        }
    }
    return false;
}

static void bound_count(struct blocks *t)
{
    while (t->count >= t->count_max && evict_one(t)) {
    }
}

void blocks_make_room(struct blocks *t, uint64_t bytes)
{
    while (buf_pool_room(t->pool) < bytes && evict_one(t)) {
    }
}
