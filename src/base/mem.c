/* Allocation that aborts instead of failing; mem.h says why that is safe here. */
#include "base/mem.h"

#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

static _Noreturn void out_of_memory(size_t size)
{
    fprintf(stderr, "fdb-nbd: the system has no memory left (%zu bytes asked for)\n", size);
    abort();
}

/* By itself glibc takes the largest block that was ever freed for a usual size from then on: such
 * blocks are cut from its heaps, of which there are eight for each processor, and each heap may keep
 * twice as much. Set here, the limits stay as they are. */
#define MAPPED_BYTES_MIN (1 << 20)   /* blocks of this size are mappings of their own */
#define HEAP_SPARE_BYTES (2 << 20)   /* what a heap keeps at its end */

void mem_give_back(void)
{
    mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
    mallopt(M_TRIM_THRESHOLD, HEAP_SPARE_BYTES);
}

void *mem_alloc(size_t size)
{
    void *p = malloc(size ? size : 1);
    if (!p)
        out_of_memory(size);
    return p;
}

void *mem_zalloc(size_t size)
{
    void *p = calloc(1, size ? size : 1);
    if (!p)
        out_of_memory(size);
    return p;
}

void *mem_alloc_aligned(size_t align, size_t size)
{
    void *p = aligned_alloc(align, size);
    if (!p)
        out_of_memory(size);
    return p;
}

void *mem_realloc(void *p, size_t size)
{
    void *q = realloc(p, size ? size : 1);
    if (!q)
        out_of_memory(size);
    return q;
}

char *mem_strdup(const char *text)
{
    size_t size = strlen(text) + 1;
    return memcpy(mem_alloc(size), text, size);
}

void mem_grow(void *items_ptr, size_t *cap, size_t want, size_t size)
{
    if (want <= *cap)
        return;
    size_t n = *cap ? *cap : 8;
    while (n < want) {
        CHECK(n <= SIZE_MAX / 2);
        n *= 2;
    }
    CHECK(size > 0 && n <= SIZE_MAX / size);

    /* items_ptr is the address of a pointer of whatever type the elements have. */
    void *items;
    memcpy(&items, items_ptr, sizeof items);
    items = mem_realloc(items, n * size);
    memcpy(items_ptr, &items, sizeof items);
    *cap = n;
}
