#include "volume/mask.h"

#include <stdlib.h>

#include "base/check.h"
#include "base/mem.h"

#define SECTOR 512u

void mask_free(struct mask *m)
{
    free(m->bytes);
    m->bytes = NULL;
}

void mask_copy(struct mask *to, const struct mask *from, uint32_t block_size)
{
    *to = *from;
    if (from->bytes) {
        to->bytes = mem_alloc(block_size / 8);
        memcpy(to->bytes, from->bytes, block_size / 8);
    }
}

static void bits_set(uint64_t *words, uint32_t from, uint32_t to)
{
    while (from < to) {
        uint32_t bit = from % 64;
        uint32_t n = to - from < 64 - bit ? to - from : 64 - bit;
        uint64_t ones = n == 64 ? ~0ull : (1ull << n) - 1;
        words[from / 64] |= ones << bit;
        from += n;
    }
}

/* The first bit in [from, to) that has the value `want`, or `to`. */
static uint32_t bits_find(const uint64_t *words, uint32_t from, uint32_t to, bool want)
{
    while (from < to) {
        uint64_t w = words[from / 64];
        if (!want)
            w = ~w;
        w >>= from % 64;
        if (w) {
            uint32_t at = from + (uint32_t)__builtin_ctzll(w);
            return at < to ? at : to;
        }
        from = (from / 64 + 1) * 64;
    }
    return to;
}

/* Goes from a bit per sector to a bit per byte. */
static void mask_refine(struct mask *m, uint32_t block_size)
{
    m->bytes = mem_zalloc(block_size / 8);
    for (uint32_t s = 0; s < block_size / SECTOR; s++)
        if (m->sectors[s / 64] >> (s % 64) & 1)
            bits_set(m->bytes, s * SECTOR, (s + 1) * SECTOR);
}

void mask_add(struct mask *m, uint32_t block_size, uint32_t from, uint32_t to)
{
    CHECK(from <= to && to <= block_size);
    if (!m->bytes && (from % SECTOR || to % SECTOR))
        mask_refine(m, block_size);
    if (m->bytes)
        bits_set(m->bytes, from, to);
    else
        bits_set(m->sectors, from / SECTOR, to / SECTOR);
}

bool mask_covers(const struct mask *m, uint32_t from, uint32_t to)
{
    if (m->bytes)
        return bits_find(m->bytes, from, to, false) == to;
    uint32_t end = (to + SECTOR - 1) / SECTOR;
    return bits_find(m->sectors, from / SECTOR, end, false) == end;
}

bool mask_next_run(const struct mask *m, uint32_t block_size, uint32_t from, uint32_t *begin,
                   uint32_t *end)
{
    uint32_t unit = m->bytes ? 1 : SECTOR;
    const uint64_t *words = m->bytes ? m->bytes : m->sectors;
    uint32_t n = block_size / unit;
    uint32_t b = bits_find(words, from / unit, n, true);
    if (b == n)
        return false;
    /* The sector of `from` may be valid from before it on. */
    *begin = b * unit > from ? b * unit : from;
    *end = bits_find(words, b, n, false) * unit;
    return true;
}

void mask_fill_rest(const struct mask *m, uint32_t block_size, uint8_t *data, const uint8_t *base)
{
    uint32_t at = 0;
    while (at < block_size) {
        uint32_t begin = block_size, end = block_size;
        if (!mask_next_run(m, block_size, at, &begin, &end))
            begin = end = block_size;
        if (base)
            memcpy(data + at, base + at, begin - at);
        else
            memset(data + at, 0, begin - at);
        at = end;
    }
}

#define FORM_RUNS 0u
#define FORM_BITS 1u

size_t mask_encode(const struct mask *m, uint32_t block_size, uint8_t **out)
{
    size_t limit = 1 + block_size / 8;
    uint8_t *p = *out = mem_zalloc(limit);
    size_t n = 1;
    uint32_t at = 0, begin, end;
    p[0] = FORM_RUNS;
    while (at < block_size && mask_next_run(m, block_size, at, &begin, &end)) {
        if (n + 8 > limit)
            break;
        put_le32(p + n, begin);
        put_le32(p + n + 4, end);
        n += 8;
        at = end;
    }
    if (at >= block_size || !mask_next_run(m, block_size, at, &begin, &end))
        return n;
    /* Only a mask of single bytes has so many runs. */
    CHECK(m->bytes);
    p[0] = FORM_BITS;
    for (uint32_t i = 0; i < block_size / 64; i++)
        put_le64(p + 1 + i * 8, m->bytes[i]);
    return limit;
}

bool mask_decode(struct mask *m, uint32_t block_size, struct slice stored)
{
    const uint8_t *p = stored.data;
    uint32_t last = 0;
    mask_init(m);
    if (!stored.len)
        return false;
    if (p[0] == FORM_BITS) {
        if (stored.len != 1 + block_size / 8)
            return false;
        m->bytes = mem_alloc(block_size / 8);
        for (uint32_t i = 0; i < block_size / 64; i++)
            m->bytes[i] = get_le64(p + 1 + i * 8);
        return true;
    }
    if (p[0] != FORM_RUNS || stored.len % 8 != 1)
        return false;
    for (size_t i = 1; i < stored.len; i += 8) {
        uint32_t begin = get_le32(p + i), end = get_le32(p + i + 4);
        if (begin < last || end <= begin || end > block_size) {
            mask_free(m);
            return false;
        }
        mask_add(m, block_size, begin, end);
        last = end;
    }
    return true;
}

void mask_merge(struct mask *m, uint32_t block_size, uint8_t *data, const uint8_t *base,
                const struct mask *base_valid)
{
    uint32_t at = 0, begin, end;
    while (at < block_size && mask_next_run(base_valid, block_size, at, &begin, &end)) {
        uint32_t from = begin;
        while (from < end) {
            uint32_t b = end, e = end;
            if (!mask_next_run(m, block_size, from, &b, &e) || b > end)
                b = e = end;
            if (b > from)
                memcpy(data + from, base + from, b - from);
            from = e < end ? e : end;
        }
        at = end;
    }
    for (at = 0; at < block_size && mask_next_run(base_valid, block_size, at, &begin, &end);
         at = end)
        mask_add(m, block_size, begin, end);
}
