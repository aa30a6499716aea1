/*
 * Blocks between memory and their stored form: zero detection, compression,
 * and the hash that binds a block to its volume, place and version (G5).
 *
 * Stored, a block is a head (codec, flags, lengths, generation, hash, and where
 * the base was unreadable a mask of the valid bytes) and a body (the payload). A
 * block that does not shrink by at least one store unit is stored plain. Pure
 * functions; any thread.
 */
#ifndef VOLUME_CODEC_H
#define VOLUME_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "volume/records.h"

#define BLOCK_SIZE_MIN 4096u
#define BLOCK_SIZE_MAX 65536u
#define BLOCK_HEAD_BYTES_MAX 64u

/* Where and when a block belongs; the hash covers it. */
struct block_place {
    uint64_t branch, epoch, block;
};

/* A codec with its level; level 0 means the library's default. */
struct codec {
    enum codec_kind kind;
    int level;
};

/* Per-thread scratch for compression contexts and staging; one per worker call is fine,
 * reuse is cheaper. */
struct codec_scratch;
struct codec_scratch *codec_scratch_get(void); /* the calling thread's own, freed at its end */

/* Whether all `len` bytes are zero; stops at the first that is not. */
bool block_is_zero(const uint8_t *data, size_t len);

/* A guess at whether `len` bytes compress, from an eighth of them in the middle. Bytes that do not
 * come in long stretches (videos, archives, what is encrypted), so behind a block that did not
 * shrink this saves most of the work of finding out again. */
bool block_may_shrink(const uint8_t *data, uint32_t len);

/* Encodes `len` bytes (the block size). Compressed bytes go to `out` (room for `len`
 * bytes), and *body is `out` or, where stored plain, `data` itself. `save_unit`: compress
 * only where it saves at least one of these (bytes, a power of two; the store's
 * allocation unit). `mask`, `mask_len`: NULL and 0 for a whole block; else run lengths
 * made by block_mask_encode, stored in the head after its fixed part. Returns the length
 * of the head written to `head` (BLOCK_HEAD_BYTES_MAX + mask_len bytes of room). */
size_t block_encode(struct codec codec, const struct block_place *place, uint64_t generation,
                    const uint8_t *data, uint32_t len, uint32_t save_unit, struct slice mask,
                    uint8_t *out, uint8_t *head, struct slice *body);

/* Decodes in place: `data` holds the stored body (`body_len` bytes) and has room for
 * `len`, the block size; afterwards it holds the block. *mask points into `head` at the
 * run lengths of valid bytes, or is empty for a whole block. False where head or body is
 * not what was stored at `place` (nothing in `data` may be used then). */
bool block_decode(const struct block_place *place, struct slice head, uint8_t *data,
                  uint32_t body_len, uint32_t len, struct slice *mask);

#endif
