/*
 * Block buffers, cut from slabs of 2 MiB.
 *
 * A slab is one mapping of one size class. Its size lets the kernel back it with a huge
 * page, and giving whole slabs back keeps memory use honest after a burst. Within a class
 * the buffer freed last is taken first, because its bytes are the likeliest to be in the
 * CPU's caches; slabs that have both free and used buffers are taken before empty ones,
 * so that slabs do get empty. A few empty slabs are kept, so that a load that swings
 * around a slab boundary does not map and unmap all the time.
 */
#include "base/buf.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/check.h"
#include "base/list.h"
#include "base/mem.h"

#define SLAB_BYTES (2u << 20)
#define SIZE_MIN 4096u
#define CLASSES 5u /* 4, 8, 16, 32, 64 KiB */
#define EMPTY_SLABS_KEPT 4u

struct buf_slab {
    struct list link; /* in partial or empty of its class; alone while all are in use */
    struct buf *free; /* LIFO */
    uint32_t n_used, n_bufs;
    uint32_t size_class;
    uint8_t *memory;
    struct buf bufs[];
};

struct size_class {
    struct list partial; /* slabs with free and used buffers; the one freed into last first */
    struct list empty;   /* slabs without a used buffer */
};

struct buf_pool {
    uint64_t budget_bytes, used_bytes;
    uint32_t n_empty; /* slabs without a used buffer, of all classes */
    uint32_t n_slabs;
    struct size_class classes[CLASSES];
};

static uint32_t class_of(uint32_t size)
{
    CHECK(size >= SIZE_MIN && size <= SIZE_MIN << (CLASSES - 1) && (size & (size - 1)) == 0);
    return (uint32_t)__builtin_ctz(size) - (uint32_t)__builtin_ctz(SIZE_MIN);
}

/* Maps a slab on a 2 MiB boundary: asks for twice as much and gives the ends back. */
static uint8_t *map_slab(void)
{
    uint8_t *p = mmap(NULL, 2 * (size_t)SLAB_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        fprintf(stderr, "fdb-nbd: the system has no memory left for block buffers\n");
        abort();
    }
    size_t before = (size_t)(-(uintptr_t)p & (SLAB_BYTES - 1));
    if (before)
        munmap(p, before);
    munmap(p + before + SLAB_BYTES, SLAB_BYTES - before);
    return p + before;
}

static struct buf_slab *slab_new(struct buf_pool *pool, uint32_t size_class)
{
    uint32_t size = SIZE_MIN << size_class;
    uint32_t n = SLAB_BYTES / size;
    struct buf_slab *slab = mem_zalloc(sizeof *slab + n * sizeof slab->bufs[0]);
    slab->memory = map_slab();
    slab->n_bufs = n;
    slab->size_class = size_class;
    for (uint32_t i = n; i-- > 0;) {
        struct buf *b = &slab->bufs[i];
        b->data = slab->memory + (size_t)i * size;
        b->size = size;
        b->pool = pool;
        b->slab = slab;
        b->next_free = slab->free;
        slab->free = b;
    }
    pool->n_slabs++;
    return slab;
}

static void slab_free(struct buf_pool *pool, struct buf_slab *slab)
{
    munmap(slab->memory, SLAB_BYTES);
    free(slab);
    pool->n_slabs--;
}

struct buf_pool *buf_pool_new(uint64_t budget_bytes)
{
    struct buf_pool *pool = mem_zalloc(sizeof *pool);
    pool->budget_bytes = budget_bytes;
    for (uint32_t i = 0; i < CLASSES; i++) {
        list_init(&pool->classes[i].partial);
        list_init(&pool->classes[i].empty);
    }
    return pool;
}

void buf_pool_free(struct buf_pool *pool)
{
    if (!pool)
        return;
    CHECK(pool->used_bytes == 0);
    for (uint32_t i = 0; i < CLASSES; i++) {
        for (struct list *l; (l = list_pop(&pool->classes[i].empty));)
            slab_free(pool, container_of(l, struct buf_slab, link));
    }
    CHECK(pool->n_slabs == 0);
    free(pool);
}

struct buf *buf_new(struct buf_pool *pool, uint32_t size)
{
    uint32_t c = class_of(size);
    struct size_class *class = &pool->classes[c];
    struct buf_slab *slab;
    if (!list_empty(&class->partial)) {
        slab = container_of(class->partial.next, struct buf_slab, link);
    } else {
        struct list *l = list_pop(&class->empty);
        if (l) {
            slab = container_of(l, struct buf_slab, link);
            pool->n_empty--;
        } else {
            slab = slab_new(pool, c);
        }
        list_add_head(&class->partial, &slab->link);
    }

    struct buf *b = slab->free;
    slab->free = b->next_free;
    if (++slab->n_used == slab->n_bufs)
        list_remove(&slab->link);
    pool->used_bytes += size;
    b->refs = 1;
    return b;
}

void buf_release(struct buf *b)
{
    struct buf_slab *slab = b->slab;
    struct buf_pool *pool = b->pool;
    struct size_class *class = &pool->classes[slab->size_class];

    CHECK(b->refs == 0); /* dropped once too often otherwise */
    b->next_free = slab->free;
    slab->free = b;
    pool->used_bytes -= b->size;

    bool was_full = slab->n_used == slab->n_bufs;
    if (--slab->n_used == 0) {
        list_remove(&slab->link);
        if (pool->n_empty < EMPTY_SLABS_KEPT) {
            list_add_head(&class->empty, &slab->link);
            pool->n_empty++;
        } else {
            slab_free(pool, slab);
        }
    } else if (was_full) {
        list_add_head(&class->partial, &slab->link);
    }
}

uint64_t buf_pool_used(const struct buf_pool *pool)
{
    return pool->used_bytes;
}

uint64_t buf_pool_budget(const struct buf_pool *pool)
{
    return pool->budget_bytes;
}

uint64_t buf_pool_room(const struct buf_pool *pool)
{
    return pool->used_bytes < pool->budget_bytes ? pool->budget_bytes - pool->used_bytes : 0;
}
