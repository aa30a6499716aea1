/*
 * The block table of a shard: every block of its volumes that is in memory, and
 * which of them leaves when room is needed.
 *
 * Replacement is S3-FIFO: new blocks enter a small queue and reach the main one
 * only when they were used again before they reached its end, so a scan passes
 * through a tenth of the cache and leaves the rest alone. Dirty blocks are in no
 * queue: they can't leave.
 */
#ifndef VOLUME_BLOCKS_H
#define VOLUME_BLOCKS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/list.h"
#include "volume/mask.h"

struct volume;

enum { BLK_NO_QUEUE, BLK_SMALL, BLK_MAIN };

struct blk {
    struct blk *chain; /* hash chain */
    struct volume *vol;
    uint64_t tag; /* the volume's number in this shard */
    uint64_t no;
    struct buf *buf;     /* contents; NULL while nothing is known or where `zero` */
    uint64_t gen;        /* newest uncommitted generation that changed it; 0: clean */
    struct list dirty;   /* in the open generation's list, where gen is that one's number */
    struct list queue;   /* in the replacement queues */
    struct list in_vol;  /* in its volume's list */
    struct list waiters; /* of fetches that wait for its base */
    struct mask mask;    /* which bytes of buf are valid, where not `full` */
    uint32_t pins;       /* fetches that need it to stay */
    bool full;           /* all bytes are known (in buf, or zero) */
    bool zero;           /* all zeros, no buf */
    bool hole;           /* with `zero` and dirty: its space is given back */
    bool fetching;       /* its base is being read */
    bool bad_base;       /* the base could not be read: bytes outside the mask are EIO */
    bool charged;        /* the open generation counts its buffer and its space */
    bool ahead;          /* reading it starts the next read-ahead */
    uint8_t which, freq; /* replacement */
};

struct blocks {
    struct blk **table;
    uint64_t table_mask;
    uint64_t count;
    struct buf_pool *pool;
    struct list small, main;
    uint64_t small_count, main_count;
    uint64_t count_max; /* entries, with or without a buffer */
    uint32_t *ghost;
    uint64_t ghost_mask;
    struct list free;
    uint64_t free_count;
};

void blocks_init(struct blocks *t, struct buf_pool *pool);
void blocks_destroy(struct blocks *t); /* the table is empty */

/* `tag` tells the volumes of a shard apart; it is a number and not an address so that a
 * simulated run takes the same decisions every time. */
static inline uint64_t blocks_hash(uint64_t tag, uint64_t no)
{
    uint64_t h = no * 0x9e3779b97f4a7c15u ^ tag * 0xd6e8feb86659fd93u;
    return h ^ h >> 29;
}

/* The entry of a block, or NULL. */
static inline struct blk *blocks_find(const struct blocks *t, uint64_t tag, uint64_t no)
{
    struct blk *e = t->table[blocks_hash(tag, no) & t->table_mask];
    while (e && (e->no != no || e->tag != tag))
        e = e->chain;
    return e;
}

/* Makes an entry with nothing known, in no queue. There must be none. `vol_list` is the
 * volume's list of its entries. */
struct blk *blocks_add(struct blocks *t, struct volume *vol, uint64_t tag, uint64_t no,
                       struct list *vol_list);

/* Removes an entry, whatever it holds. Not while pinned or waited for. */
void blocks_drop(struct blocks *t, struct blk *e);

/* Puts a clean entry into the replacement queues (again). */
void blocks_enqueue(struct blocks *t, struct blk *e);

/* Takes it out of them (it became dirty). */
void blocks_dequeue(struct blocks *t, struct blk *e);

/* Evicts clean blocks until `bytes` fit into the pool's budget, or none is left that may go. */
void blocks_make_room(struct blocks *t, uint64_t bytes);

/* A buffer, with room made for it. */
static inline struct buf *blocks_buf(struct blocks *t, uint32_t size)
{
    if (buf_pool_room(t->pool) < size)
        blocks_make_room(t, size);
    return buf_new(t->pool, size);
}

/* Whether the bytes [from, to) of the block are known. */
static inline bool blk_has(const struct blk *e, uint32_t from, uint32_t to)
{
    return e->full || (e->buf && mask_covers(&e->mask, from, to));
}

#endif
