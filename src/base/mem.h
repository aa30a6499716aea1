/*
 * Allocation that can't fail where it is called: running out of memory outside
 * the budgeted buffers (buf.h) means the machine is out of memory, and a server
 * that stops then loses nothing that was answered.
 */
#ifndef BASE_MEM_H
#define BASE_MEM_H

#include <stddef.h>

/* As malloc, calloc, realloc, strdup, but abort with a message instead of NULL.
 * Freed with free(). Any thread. */
void *mem_alloc(size_t size) __attribute__((malloc, returns_nonnull));
void *mem_zalloc(size_t size) __attribute__((malloc, returns_nonnull));
/* At a multiple of `align`, a power of two that `size` is a multiple of. */
void *mem_alloc_aligned(size_t align, size_t size) __attribute__((malloc, returns_nonnull));
void *mem_realloc(void *p, size_t size) __attribute__((returns_nonnull));
char *mem_strdup(const char *text) __attribute__((malloc, returns_nonnull));

/* Has the C library give back what is freed, instead of keeping tens of MiB for each thread that
 * ever had a burst. Once, before the first thread. */
void mem_give_back(void);

/* Makes room for at least `want` elements in the growing array *items of *cap
 * elements of `size` bytes; doubles. */
void mem_grow(void *items_ptr, size_t *cap, size_t want, size_t size);

#endif
