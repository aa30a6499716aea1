/*
 * Block buffers: page-aligned, counted, from one pool per reactor with a budget.
 *
 * Everything a client can make the server hold (received payloads, cached
 * blocks, blocks on their way to a client) lives in these, so the budget of the
 * pool is the memory bound (G6). Counts are plain integers: a buffer belongs to
 * one reactor. A worker thread may read the bytes of a buffer that the reactor
 * keeps a reference to.
 */
#ifndef BASE_BUF_H
#define BASE_BUF_H

#include <stdbool.h>
#include <stdint.h>

struct buf_pool;

struct buf {
    uint8_t *data;
    uint32_t refs;
    uint32_t size; /* 4096 << n, up to 65536 */
    struct buf_pool *pool;
    struct buf *next_free; /* the pool's */
    struct buf_slab *slab; /* the pool's */
};

/* A pool that means to stay within `budget_bytes`. */
struct buf_pool *buf_pool_new(uint64_t budget_bytes);

/* All buffers must have been returned. */
void buf_pool_free(struct buf_pool *pool);

/* A buffer of `size` bytes (a power of two, 4096 to 65536) with one reference and
 * undefined contents. Goes over the budget rather than fail: keeping inside it is what
 * buf_pool_room() and the volume layer's eviction are for. */
struct buf *buf_new(struct buf_pool *pool, uint32_t size);

static inline struct buf *buf_ref(struct buf *b)
{
    b->refs++;
    return b;
}

void buf_release(struct buf *b); /* the last reference went; use buf_unref */

static inline void buf_unref(struct buf *b)
{
    if (--b->refs == 0)
        buf_release(b);
}

/* Bytes in live buffers, the budget, and what is left of it (0 when over). */
uint64_t buf_pool_used(const struct buf_pool *pool);
uint64_t buf_pool_budget(const struct buf_pool *pool);
uint64_t buf_pool_room(const struct buf_pool *pool);

#endif
