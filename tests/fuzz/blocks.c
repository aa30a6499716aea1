/*
 * Blocks of a volume and masks of their valid bytes, from any bytes.
 *
 * At stake: G5, a block is what was written at its place or an error, never other bytes; and a block
 * whose base is lost has its valid bytes and no others. The hash stops what a medium does to it; here
 * most inputs get a right one, so that what stands behind it (lengths, codecs, the decompressors,
 * masks) is reached.
 *
 * An input: what to do (1 byte), choices, then the bytes of a head's mask and of a body.
 *
 * Oracle: encode, then decode gives the same bytes; with a bit flipped, in another place, or with
 * another length nothing. Masks behave as an array of one byte for each byte does. A stored block
 * that decodes gives the same each time.
 *
 * Code: src/volume/codec.c src/volume/mask.c
 */
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/mem.h"
#include "volume/codec.h"
#include "volume/mask.h"

#define HEAD_BYTES 24u
#define HASH_AT 16u

/* Mostly the smallest: it is quickest. */
static uint32_t take_size(struct fuzz_input *in)
{
    static const uint8_t shifts[16] = {[11] = 1, [12] = 2, [13] = 2, [14] = 3, [15] = 4};
    return BLOCK_SIZE_MIN << shifts[fuzz_take(in, 1) % 16];
}

/* As codec.c hashes a block. */
static void seal(const struct block_place *place, uint8_t *head, size_t head_len,
                 const uint8_t *body, size_t body_len)
{
    uint64_t seed = hash_mix(hash_mix(place->branch, place->epoch), place->block);
    seed = hash64(head, HASH_AT, seed);
    if (head_len > HEAD_BYTES)
        seed = hash64(head + HEAD_BYTES, head_len - HEAD_BYTES, seed);
    put_le64(head + HASH_AT, hash64(body, body_len, seed));
}

/* --- masks --------------------------------------------------------------------------------- */

static void check_mask(const struct mask *m, const uint8_t *plain, uint32_t size)
{
    uint32_t at = 0, begin, end, n = 0;
    while (at < size && mask_next_run(m, size, at, &begin, &end)) {
        CHECK(begin >= at && end > begin && end <= size);
        CHECK(!memchr(plain + at, 1, begin - at) && !memchr(plain + begin, 0, end - begin));
        n += end - begin;
        at = end;
    }
    CHECK(!memchr(plain + at, 1, size - at));
    CHECK(mask_full(m, size) == (n == size));
}

static void mask_there_and_back(const struct mask *m, const uint8_t *plain, uint32_t size)
{
    struct mask back;
    uint8_t *stored;
    size_t len = mask_encode(m, size, &stored);
    CHECK(len > 0 && len <= mask_bytes_max(size));
    CHECK(mask_decode(&back, size, (struct slice){stored, len}));
    check_mask(&back, plain, size);
    mask_free(&back);
    free(stored);
}

/* A mask from pairs of numbers, mostly whole sectors, and another one merged into it. */
static void try_masks(struct fuzz_input *in)
{
    uint32_t size = take_size(in);
    struct mask m[2];
    uint8_t *plain[2], *data = mem_alloc(size), *base = mem_alloc(size);
    for (unsigned n = 0; n < 2; n++) {
        mask_init(&m[n]);
        plain[n] = mem_zalloc(size);
        unsigned runs = (unsigned)fuzz_take(in, 1) % 40;
        /* So many runs that the stored form is a bit for each byte. */
        for (uint32_t i = runs == 39 ? (uint32_t)fuzz_take(in, 1) : size; i < size; i += 7) {
            mask_add(&m[n], size, i, i + 1);
            plain[n][i] = 1;
        }
        uint32_t unit = fuzz_take(in, 1) % 4 ? 512 : 1;
        while (runs-- > 0) {
            uint32_t a = (uint32_t)fuzz_take(in, 2) * unit % (size + unit);
            uint32_t b = (uint32_t)fuzz_take(in, 2) * unit % (size + unit);
            uint32_t from = a < b ? a : b, to = a < b ? b : a;
            mask_add(&m[n], size, from, to);
            memset(plain[n] + from, 1, to - from);
            CHECK(mask_covers(&m[n], from, to));
        }
        check_mask(&m[n], plain[n], size);
        mask_there_and_back(&m[n], plain[n], size);
    }
    /* data: 1 where valid in the first, base 2 where valid in the second. */
    for (uint32_t i = 0; i < size; i++) {
        data[i] = plain[0][i];
        base[i] = plain[1][i] ? 2 : 9;
    }
    mask_merge(&m[0], size, data, base, &m[1]);
    for (uint32_t i = 0; i < size; i++) {
        CHECK(data[i] == (plain[0][i] ? 1 : plain[1][i] ? 2 : 0));
        plain[0][i] |= plain[1][i];
    }
    check_mask(&m[0], plain[0], size);
    struct mask copy;
    mask_copy(&copy, &m[0], size);
    check_mask(&copy, plain[0], size);
    mask_free(&copy);
    memset(data, 7, size);
    mask_fill_rest(&m[0], size, data, fuzz_take(in, 1) % 2 ? base : NULL);
    for (uint32_t i = 0; i < size; i++)
        CHECK(!plain[0][i] || data[i] == 7);
    for (unsigned n = 0; n < 2; n++) {
        mask_free(&m[n]);
        free(plain[n]);
    }
    free(data);
    free(base);
}

/* --- blocks -------------------------------------------------------------------------------- */

static struct block_place take_place(struct fuzz_input *in)
{
    struct block_place p;
    p.branch = fuzz_take(in, 1);
    p.epoch = fuzz_take(in, 1);
    p.block = fuzz_take(in, 2);
    return p;
}

/* A block whose bytes repeat the rest of the input, so that it is long and still compresses. */
static void try_encode(struct fuzz_input *in)
{
    struct block_place place = take_place(in), other = place;
    struct codec codec = {(enum codec_kind)(fuzz_take(in, 1) % 3), (int)(fuzz_take(in, 1) % 4)};
    uint32_t size = take_size(in), unit = fuzz_take(in, 1) % 2 ? 4096 : 1;
    uint64_t generation = fuzz_take(in, 2), noise = fuzz_take(in, 2), flip = fuzz_take(in, 4);
    uint8_t mask_bytes[17], head[BLOCK_HEAD_BYTES_MAX + sizeof mask_bytes];
    size_t mask_len = fuzz_take(in, 1) % sizeof mask_bytes;
    for (size_t i = 0; i < mask_len; i++)
        mask_bytes[i] = (uint8_t)fuzz_take(in, 1);
    uint8_t *data = mem_zalloc(size), *out = mem_alloc(size), *stored = mem_alloc(size);
    size_t left = fuzz_left(in);
    for (uint32_t i = 0; i < size && left > 0; i++)
        data[i] = in->at[i % left];
    for (uint32_t i = 0; i + 8 <= size && i / 8 < noise; i += 8)
        put_le64(data + i, hash_mix(noise, i));
    CHECK(block_is_zero(data, size) == (data[0] == 0 && memcmp(data, data + 1, size - 1) == 0));
    (void)block_may_shrink(data, size);

    struct slice body, mask;
    size_t head_len = block_encode(codec, &place, generation, data, size, unit,
                                   (struct slice){mask_bytes, mask_len}, out, head, &body);
    CHECK(head_len <= sizeof head && body.len > 0 && body.len <= size);
    CHECK(body.len == size || body.len + unit <= size || round_up_u64(body.len, unit) < size);
    memcpy(stored, body.data, body.len);
    CHECK(block_decode(&place, (struct slice){head, head_len}, stored, (uint32_t)body.len, size,
                       &mask));
    CHECK(memcmp(stored, data, size) == 0);
    CHECK(mask.len == mask_len && (!mask_len || memcmp(mask.data, mask_bytes, mask_len) == 0));

    memcpy(stored, body.data, body.len);
    other.block++;
    CHECK(!block_decode(&other, (struct slice){head, head_len}, stored, (uint32_t)body.len, size,
                        &mask));
    size_t bit = flip % ((head_len + body.len) * 8);
    uint8_t *byte = bit / 8 < head_len ? head + bit / 8 : stored + bit / 8 - head_len;
    *byte ^= (uint8_t)(1u << bit % 8);
    CHECK(!block_decode(&place, (struct slice){head, head_len}, stored, (uint32_t)body.len, size,
                        &mask));
    free(data);
    free(out);
    free(stored);
}

/* A stored block that was never encoded. */
static void try_decode(struct fuzz_input *in)
{
    struct block_place place = take_place(in);
    uint32_t size = take_size(in);
    bool sealed = fuzz_take(in, 1) % 8 != 0, real_length = fuzz_take(in, 1) % 8 != 0;
    size_t head_len = min_u64(fuzz_take(in, 2) % 600, fuzz_left(in));
    uint8_t *head = mem_alloc(head_len + 1), *data = mem_zalloc(size), *again = mem_zalloc(size);
    if (head_len > 0)
        memcpy(head, in->at, head_len);
    in->at += head_len;
    size_t body_len = min_u64(fuzz_left(in), size);
    if (body_len > 0)
        memcpy(data, in->at, body_len);
    if (head_len >= HEAD_BYTES && real_length)
        put_le32(head + 4, size);
    if (head_len >= HEAD_BYTES && sealed)
        seal(&place, head, head_len, data, body_len);
    memcpy(again, data, body_len);
    struct slice mask, mask_again, stored = {head, head_len};
    bool good = block_decode(&place, stored, data, (uint32_t)body_len, size, &mask);
    CHECK(block_decode(&place, stored, again, (uint32_t)body_len, size, &mask_again) == good);
    if (good) {
        struct mask m;
        CHECK(memcmp(data, again, size) == 0 && mask.len == head_len - HEAD_BYTES);
        if (mask.len > 0 && mask_decode(&m, size, mask)) {
            uint32_t at = 0, begin, end;
            for (; at < size && mask_next_run(&m, size, at, &begin, &end); at = end)
                CHECK(begin < end && end <= size && mask_covers(&m, begin, end));
            mask_fill_rest(&m, size, data, again);
            CHECK(memcmp(data, again, size) == 0);
            mask_free(&m);
        }
    }
    free(head);
    free(data);
    free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = fuzz_input(data, size);
    switch (fuzz_take(&in, 1) % 4) {
    case 0:
        try_masks(&in);
        break;
    case 1:
        try_encode(&in);
        break;
    default:
        try_decode(&in);
    }
    return 0;
}
