/*
 * Blocks between memory and their stored form.
 *
 * The head, integers little-endian:
 *
 *    0  u8   version, 1
 *    1  u8   codec of the body: 0 plain, 1 lz4 (block format), 2 zstd (one frame)
 *    2  u8   flags: 1 = a mask of valid bytes follows the fixed part
 *    3  u8   0
 *    4  u32  length of the block in bytes
 *    8  u64  generation that wrote it
 *   16  u64  hash
 *   24       the mask, up to the end of the head
 *
 * The hash is XXH3 over the body as stored, seeded with a mix of the block's place and
 * of everything in the head but the hash itself. So one comparison says that these bytes
 * are what was written, here, by that generation; nothing is looked at before it matched,
 * and the decompressors never see bytes that they did not produce.
 */
#include "volume/codec.h"

#include <lz4.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"

#define HEAD_VERSION 1
#define HEAD_BYTES 24u
#define HASH_AT 16u
#define FLAG_MASK 1u
#define PROBE_BYTES_MIN 1024u

_Static_assert(HEAD_BYTES <= BLOCK_HEAD_BYTES_MAX, "callers leave room for the fixed part");

struct codec_scratch {
    void *lz4_state;
    ZSTD_CCtx *zstd_c;
    ZSTD_DCtx *zstd_d;
    uint8_t body[BLOCK_SIZE_MAX]; /* the stored body while the block takes its place */
};

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static _Thread_local struct codec_scratch *scratch_own;

static void scratch_free(void *p)
{
    struct codec_scratch *s = p;
    scratch_own = NULL;
    free(s->lz4_state);
    ZSTD_freeCCtx(s->zstd_c);
    ZSTD_freeDCtx(s->zstd_d);
    free(s);
}

/* The key is there for its destructor alone; the pointer is faster to come by. */
static void scratch_key_make(void)
{
    CHECK(pthread_key_create(&scratch_key, scratch_free) == 0);
}

struct codec_scratch *codec_scratch_get(void)
{
    if (!scratch_own) {
        CHECK(pthread_once(&scratch_once, scratch_key_make) == 0);
        scratch_own = mem_zalloc(sizeof *scratch_own);
        scratch_own->lz4_state = mem_alloc((size_t)LZ4_sizeofState());
        CHECK(pthread_setspecific(scratch_key, scratch_own) == 0);
    }
    return scratch_own;
}

/* zstd's contexts are large; most stores never need them. */
static ZSTD_CCtx *zstd_compressor(struct codec_scratch *s)
{
    if (!s->zstd_c)
        CHECK((s->zstd_c = ZSTD_createCCtx()) != NULL);
    return s->zstd_c;
}

static ZSTD_DCtx *zstd_decompressor(struct codec_scratch *s)
{
    if (!s->zstd_d)
        CHECK((s->zstd_d = ZSTD_createDCtx()) != NULL);
    return s->zstd_d;
}

bool block_is_zero(const uint8_t *data, size_t len)
{
    if (len == 0)
        return true;
    /* Zero at the front, and each byte like the one after it. */
    return data[0] == 0 && memcmp(data, data + 1, len - 1) == 0;
}

/* Compresses into `out` and returns the length, or 0 where it would be over `cap`. */
static size_t compress(struct codec codec, const uint8_t *data, uint32_t len, uint8_t *out,
                       uint32_t cap)
{
    struct codec_scratch *s = codec_scratch_get();
    switch (codec.kind) {
    case CODEC_LZ4: {
        int n = LZ4_compress_fast_extState(s->lz4_state, (const char *)data, (char *)out, (int)len,
                                           (int)cap, 1);
        return n > 0 ? (size_t)n : 0;
    }
    case CODEC_ZSTD: {
        size_t n = ZSTD_compressCCtx(zstd_compressor(s), out, cap, data, len, codec.level);
        return ZSTD_isError(n) ? 0 : n;
    }
    case CODEC_NONE:
        break;
    }
    return 0;
}

static uint64_t block_hash(const struct block_place *place, const uint8_t *head, size_t head_len,
                           const uint8_t *body, size_t body_len)
{
    uint64_t seed = hash_mix(hash_mix(place->branch, place->epoch), place->block);
    seed = hash64(head, HASH_AT, seed);
    if (head_len > HEAD_BYTES)
        seed = hash64(head + HEAD_BYTES, head_len - HEAD_BYTES, seed);
    return hash64(body, body_len, seed);
}

bool block_may_shrink(const uint8_t *data, uint32_t len)
{
    struct codec_scratch *s = codec_scratch_get();
    uint32_t probe = len / 8;
    if (probe < PROBE_BYTES_MIN)
        return true;
    return LZ4_compress_fast_extState(s->lz4_state, (const char *)data + (len - probe) / 2,
                                      (char *)s->body, (int)probe, (int)probe - 1, 1) > 0;
}

size_t block_encode(struct codec codec, const struct block_place *place, uint64_t generation,
                    const uint8_t *data, uint32_t len, uint32_t save_unit, struct slice mask,
                    uint8_t *out, uint8_t *head, struct slice *body)
{
    CHECK(len > 0 && len <= BLOCK_SIZE_MAX && save_unit > 0);
    uint32_t cap = (uint32_t)round_up_u64(len, save_unit) - save_unit;
    size_t packed = 0;
    if (codec.kind != CODEC_NONE && cap > 0)
        packed = compress(codec, data, len, out, cap);
    *body = packed ? (struct slice){out, packed} : (struct slice){data, len};

    head[0] = HEAD_VERSION;
    head[1] = (uint8_t)(packed ? codec.kind : CODEC_NONE);
    head[2] = mask.len ? FLAG_MASK : 0;
    head[3] = 0;
    put_le32(head + 4, len);
    put_le64(head + 8, generation);
    if (mask.len)
        memcpy(head + HEAD_BYTES, mask.data, mask.len);
    size_t head_len = HEAD_BYTES + mask.len;
    put_le64(head + HASH_AT, block_hash(place, head, head_len, body->data, body->len));
    return head_len;
}

bool block_decode(const struct block_place *place, struct slice head, uint8_t *data,
                  uint32_t body_len, uint32_t len, struct slice *mask)
{
    const uint8_t *h = head.data;
    *mask = (struct slice){NULL, 0};
    if (head.len < HEAD_BYTES || body_len == 0 || body_len > len || len > BLOCK_SIZE_MAX)
        return false;
    if (get_le64(h + HASH_AT) != block_hash(place, h, head.len, data, body_len))
        return false;

    bool has_mask = head.len > HEAD_BYTES;
    if (h[0] != HEAD_VERSION || h[2] != (has_mask ? FLAG_MASK : 0) || h[3] != 0 ||
        get_le32(h + 4) != len)
        return false;
    if (has_mask)
        *mask = (struct slice){h + HEAD_BYTES, head.len - HEAD_BYTES};

    if (h[1] == CODEC_NONE)
        return body_len == len;
    struct codec_scratch *s = codec_scratch_get();
    memcpy(s->body, data, body_len);
    switch (h[1]) {
    case CODEC_LZ4:
        return LZ4_decompress_safe((const char *)s->body, (char *)data, (int)body_len, (int)len) ==
               (int)len;
    case CODEC_ZSTD:
        return ZSTD_decompressDCtx(zstd_decompressor(s), data, len, s->body, body_len) == len;
    default:
        return false;
    }
}
