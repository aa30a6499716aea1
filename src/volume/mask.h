/*
 * Which bytes of a partly written block are valid.
 *
 * Almost all writes are made of whole 512-byte sectors, so the mask is 128 bits;
 * the first write that is not gets a bit per byte.
 */
#ifndef VOLUME_MASK_H
#define VOLUME_MASK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"

struct mask {
    uint64_t sectors[2];
    uint64_t *bytes; /* NULL: `sectors` says it all; else a bit per byte, block_size / 64 words */
};

/* Nothing valid. */
static inline void mask_init(struct mask *m)
{
    *m = (struct mask){{0, 0}, NULL};
}

void mask_free(struct mask *m);
void mask_copy(struct mask *to, const struct mask *from, uint32_t block_size);

/* Marks [from, to) of a block as valid. */
void mask_add(struct mask *m, uint32_t block_size, uint32_t from, uint32_t to);

bool mask_covers(const struct mask *m, uint32_t from, uint32_t to);
static inline bool mask_full(const struct mask *m, uint32_t block_size)
{
    return mask_covers(m, 0, block_size);
}

/* Copies the bytes of `base` (zeros where NULL) to `data` wherever the mask says they are
 * not valid. */
void mask_fill_rest(const struct mask *m, uint32_t block_size, uint8_t *data, const uint8_t *base);

/* Finds the first run of valid bytes at or behind `from`; false where there is none. */
bool mask_next_run(const struct mask *m, uint32_t block_size, uint32_t from, uint32_t *begin,
                   uint32_t *end);

/* The stored form, for a block whose base is lost: a byte that tells which of two forms
 * follows, then runs of valid bytes as pairs of 32-bit little-endian integers (begin, end),
 * rising (form 0), or a bit per byte (form 1), whichever is shorter. *out is allocated, the
 * caller frees it. */
size_t mask_encode(const struct mask *m, uint32_t block_size, uint8_t **out);

/* The longest that mask_encode makes. */
static inline size_t mask_bytes_max(uint32_t block_size)
{
    return 1 + block_size / 8;
}

/* The reverse: false where the bytes are not a mask of such a block. */
bool mask_decode(struct mask *m, uint32_t block_size, struct slice stored);

/* Copies those bytes of `base` to `data` that `base_valid` has and `m` lacks, and adds them to
 * `m`. */
void mask_merge(struct mask *m, uint32_t block_size, uint8_t *data, const uint8_t *base,
                const struct mask *base_valid);

#endif
