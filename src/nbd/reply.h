/*
 * Replies of the transmission phase: headers written into memory of the caller's.
 * Inline and nearly without branches, because one stands before every cached
 * block that leaves. Payloads are not copied here: the caller sends them behind
 * the header.
 *
 * With extended headers every reply is a chunk that repeats the offset of its
 * request; with structured replies READ and BLOCK_STATUS are answered in chunks,
 * and so are errors; the rest are simple replies.
 */
#ifndef NBD_REPLY_H
#define NBD_REPLY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "base/status.h"
#include "nbd/proto.h"

/* The longest header any function here writes (an extended chunk with the fixed part of its
 * payload). */
#define NBD_REPLY_HEAD_MAX 64u

/* Where the replies to one request go. */
struct nbd_reply_to {
    uint64_t cookie; /* as in struct nbd_request */
    uint64_t offset; /* of the request */
    bool structured, extended;
};

/* A simple reply; data of a READ follows. Returns the bytes written. */
static inline size_t nbd_put_simple(uint8_t *p, uint64_t cookie, uint32_t error)
{
    put_be32(p, NBD_SIMPLE_REPLY_MAGIC);
    put_be32(p + 4, error);
    memcpy(p + 8, &cookie, 8);
    return NBD_SIMPLE_REPLY_BYTES;
}

/* A chunk header for `len` bytes of payload. */
static inline size_t nbd_put_chunk(uint8_t *p, const struct nbd_reply_to *to, uint16_t flags,
                                   uint16_t type, uint32_t len)
{
    put_be16(p + 4, flags);
    put_be16(p + 6, type);
    memcpy(p + 8, &to->cookie, 8);
    if (to->extended) {
        put_be32(p, NBD_EXTENDED_REPLY_MAGIC);
        put_be64(p + 16, to->offset);
        put_be64(p + 24, len);
        return NBD_EXTENDED_REPLY_BYTES;
    }
    put_be32(p, NBD_STRUCTURED_REPLY_MAGIC);
    put_be32(p + 16, len);
    return NBD_STRUCTURED_REPLY_BYTES;
}

/* Header of an OFFSET_DATA chunk; `len` bytes (1 .. 2^32-9) of data from `offset` follow. */
static inline size_t nbd_put_data(uint8_t *p, const struct nbd_reply_to *to, uint16_t flags,
                                  uint64_t offset, uint32_t len)
{
    size_t n = nbd_put_chunk(p, to, flags, NBD_REPLY_TYPE_OFFSET_DATA, 8 + len);
    put_be64(p + n, offset);
    return n + 8;
}

/* A whole OFFSET_HOLE chunk: `len` (not 0) bytes from `offset` read as zeros. */
static inline size_t nbd_put_hole(uint8_t *p, const struct nbd_reply_to *to, uint16_t flags,
                                  uint64_t offset, uint32_t len)
{
    size_t n = nbd_put_chunk(p, to, flags, NBD_REPLY_TYPE_OFFSET_HOLE, 12);
    put_be64(p + n, offset);
    put_be32(p + n + 8, len);
    return n + 12;
}

/* Header of a BLOCK_STATUS or, with extended headers, BLOCK_STATUS_EXT chunk for `count` (1 ..
 * NBD_STATUS_EXTENTS_MAX) descriptors of nbd_extent_bytes() each, which follow. */
static inline size_t nbd_extent_bytes(bool extended)
{
    return extended ? 16 : 8;
}

static inline size_t nbd_put_status(uint8_t *p, const struct nbd_reply_to *to, uint16_t flags,
                                    uint32_t context_id, uint32_t count)
{
    uint32_t len = count * (uint32_t)nbd_extent_bytes(to->extended);
    if (to->extended) {
        size_t n = nbd_put_chunk(p, to, flags, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 8 + len);
        put_be32(p + n, context_id);
        put_be32(p + n + 4, count);
        return n + 8;
    }
    size_t n = nbd_put_chunk(p, to, flags, NBD_REPLY_TYPE_BLOCK_STATUS, 4 + len);
    put_be32(p + n, context_id);
    return n + 4;
}

/* One descriptor. In the short form `length` is below 2^32. */
static inline size_t nbd_put_extent(uint8_t *p, bool extended, uint64_t length, uint32_t flags)
{
    if (extended) {
        put_be64(p, length);
        put_be64(p + 8, flags);
        return 16;
    }
    put_be32(p, (uint32_t)length);
    put_be32(p + 4, flags);
    return 8;
}

/* The last chunk of a reply that brings nothing. */
static inline size_t nbd_put_none(uint8_t *p, const struct nbd_reply_to *to)
{
    return nbd_put_chunk(p, to, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0);
}

/* The whole reply to a request that succeeded and has no data. `is_read`: a READ of length
 * 0, which must be a chunk once structured replies are agreed. */
static inline size_t nbd_put_success(uint8_t *p, const struct nbd_reply_to *to, bool is_read)
{
    if (to->extended || (to->structured && is_read))
        return nbd_put_none(p, to);
    return nbd_put_simple(p, to->cookie, NBD_SUCCESS);
}

/* The last (or only) message of a reply that failed: an ERROR chunk, which `message_len` (0 ..
 * NBD_STRING_BYTES_MAX) bytes of UTF-8 for a person follow, or a simple reply, which has no room
 * for any: 0 there. */
static inline size_t nbd_put_error(uint8_t *p, const struct nbd_reply_to *to, uint32_t error,
                                   uint16_t message_len)
{
    if (!to->extended && !to->structured)
        return nbd_put_simple(p, to->cookie, error);
    size_t n =
        nbd_put_chunk(p, to, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, 6 + (uint32_t)message_len);
    put_be32(p + n, error);
    put_be16(p + n + 4, message_len);
    return n + 6;
}

/* The last message of a READ that failed at `offset` after other chunks of it were sent:
 * what was sent before counts. Structured or extended only. */
static inline size_t nbd_put_error_offset(uint8_t *p, const struct nbd_reply_to *to,
                                          uint32_t error, uint64_t offset)
{
    size_t n = nbd_put_chunk(p, to, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR_OFFSET, 14);
    put_be32(p + n, error);
    put_be16(p + n + 4, 0);
    put_be64(p + n + 6, offset);
    return n + 14;
}

/* The error value a client gets for `st`; NBD_SUCCESS for ST_OK. */
uint32_t nbd_error_of(enum status st);

#endif
