/*
 * Seals: the hashes that LMDB's pages carry.
 *
 * LMDB hashes nothing, so a flipped bit in a page of its own leads it astray: to an old version of
 * a page, past keys that are there, or out of its map. Therefore the copy of LMDB that this program
 * is linked with has the calls by which it writes its file, and maps it, under other names (see
 * meson.build): they come here, and every page gets its seal on its way to the disk. Where the seal
 * lies LMDB never looks: in the field of a page's header that is used for keys of fixed
 * size only, in the gap between a page's pointers and its entries, and behind the struct in its
 * meta pages. docs/format-lmdb.md states all of it.
 *
 * No context is needed for that: what LMDB writes is a page, a run of pages for a large value, the
 * first two meta pages, or what changes in one of them, and each can be told by itself. The seals
 * are in the pages of every store; whether they are looked at is the reader's business (tree.c).
 */
#include <errno.h>
#include <lmdb.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/hash.h"
#include "store/lmdb/engine.h"

_Static_assert(sizeof(size_t) == 8, "pages as LMDB writes them on machines of 64 bits");

#define META_SEAL_AT 152u /* the end of LMDB's struct */
#define META_WRITE_AT 32u /* LMDB writes it from here on */
#define META_WRITE_BYTES (META_SEAL_AT - META_WRITE_AT)
#define META_SEED 0x4c4d4d54u
#define META_MAGIC 0xbeefc0deu
#define META_VERSION 1u

#define PAGE_HASHED_FROM 10u /* the page's own number is compared, the short seal lies before this */
#define PAGE_SHORT_AT 8u
#define SEAL_LONG 0x8000u /* in the place of the short one: there is a long one */
#define SEAL_SHORT_FOR_0 0x4000u

/* All bytes, one upon the other: any one flipped bit shows. */
static uint8_t bytes_xor(const uint8_t *p, size_t len)
{
    uint64_t a = 0, b = 0, x, y;
    size_t i = 0;
    for (; i + 16 <= len; i += 16) {
        memcpy(&x, p + i, 8);
        memcpy(&y, p + i + 8, 8);
        a ^= x;
        b ^= y;
    }
    a ^= b;
    a ^= a >> 32;
    a ^= a >> 16;
    a ^= a >> 8;
    uint8_t all = (uint8_t)a;
    for (; i < len; i++)
        all ^= p[i];
    return all;
}

/* 15 bits, and never 0: so neither kind of seal is one flipped bit from the other. */
static uint16_t short_seal(const uint8_t *p, size_t len)
{
    unsigned low = bytes_xor(p + PAGE_HASHED_FROM, len - PAGE_HASHED_FROM);
    uint64_t hash = hash64(p + PAGE_HASHED_FROM, len - PAGE_HASHED_FROM, get_le64(p));
    unsigned seal = (unsigned)(hash & 0x7f) << 8 | low;
    return (uint16_t)(seal ? seal : SEAL_SHORT_FOR_0);
}

/* Where the long seal lies; 0: there is no room for it. */
static size_t long_seal_at(const uint8_t *p)
{
    unsigned lower = get_le16(p + LM_PAGE_LOWER_AT), upper = get_le16(p + LM_PAGE_UPPER_AT);
    return upper >= lower + 8u ? upper - 8u : 0;
}

static uint64_t long_seal(const uint8_t *p, size_t len)
{
    size_t lower = get_le16(p + LM_PAGE_LOWER_AT), upper = get_le16(p + LM_PAGE_UPPER_AT);
    uint64_t front = hash64(p + PAGE_HASHED_FROM, lower - PAGE_HASHED_FROM, get_le64(p));
    return hash64(p + upper, len - upper, front);
}

static bool bounds_fit(const uint8_t *p, size_t len)
{
    unsigned lower = get_le16(p + LM_PAGE_LOWER_AT), upper = get_le16(p + LM_PAGE_UPPER_AT);
    return lower >= LM_PAGE_HEADER_BYTES && lower % 2 == 0 && lower <= upper && upper <= len;
}

bool lm_seal_page_fits(const uint8_t *page, size_t len)
{
    if (!bounds_fit(page, len))
        return false;
    size_t at = long_seal_at(page);
    if (get_le16(page + PAGE_SHORT_AT) == SEAL_LONG)
        return at && get_le64(page + at) == long_seal(page, len);
    return lm_seal_run_fits(page, len);
}

bool lm_seal_run_fits(const uint8_t *run, size_t len)
{
    return get_le16(run + PAGE_SHORT_AT) == short_seal(run, len);
}

/* Seals a page, or a run of pages with a large value. */
static void page_seal(uint8_t *p, size_t len)
{
    unsigned flags = get_le16(p + LM_PAGE_FLAGS_AT);
    if ((flags == LM_PAGE_BRANCH || flags == LM_PAGE_LEAF) && bounds_fit(p, len)) {
        size_t at = long_seal_at(p);
        if (at)
            put_le64(p + at, long_seal(p, len));
        put_le16(p + PAGE_SHORT_AT, at ? SEAL_LONG : short_seal(p, len));
    } else if (flags == LM_PAGE_OVERFLOW) {
        put_le16(p + PAGE_SHORT_AT, short_seal(p, len));
    }
}

/* ---- meta pages ---- */

static void meta_front(uint8_t m[META_WRITE_AT], unsigned slot)
{
    memset(m, 0, META_WRITE_AT);
    put_le64(m, slot);
    put_le16(m + LM_PAGE_FLAGS_AT, LM_PAGE_META);
    put_le32(m + LM_PAGE_HEADER_BYTES, META_MAGIC);
    put_le32(m + LM_PAGE_HEADER_BYTES + 4, META_VERSION);
}

bool lm_seal_meta_fits(const uint8_t meta[LM_META_BYTES], unsigned slot)
{
    uint8_t front[META_WRITE_AT];
    meta_front(front, slot);
    return memcmp(meta, front, sizeof front) == 0 &&
           get_le64(meta + META_SEAL_AT) == hash64(meta, META_SEAL_AT, META_SEED);
}

/* The part of a meta page that changes, and its seal with it: all in the first sector. */
static ssize_t meta_write(int fd, const void *data, unsigned slot, off_t at)
{
    uint8_t meta[LM_META_BYTES];
    meta_front(meta, slot);
    memcpy(meta + META_WRITE_AT, data, META_WRITE_BYTES);
    put_le64(meta + META_SEAL_AT, hash64(meta, META_SEAL_AT, META_SEED));
    ssize_t n = pwrite(fd, meta + META_WRITE_AT, sizeof meta - META_WRITE_AT, at);
    if (n < 0)
        return n;
    if (n < (ssize_t)(sizeof meta - META_WRITE_AT)) {
        errno = EIO;
        return -1;
    }
    return META_WRITE_BYTES;
}

/* ---- what LMDB calls ---- */

static _Thread_local void *last_map;
static _Thread_local size_t last_map_bytes;
static _Thread_local int last_map_fd = -1;

ssize_t lm_seal_pwrite(int fd, const void *data, size_t len, off_t at)
{
    /* LMDB's own memory, of which it writes a page only once. */
    uint8_t *p = (uint8_t *)(uintptr_t)data;
    if (len == META_WRITE_BYTES)
        return meta_write(fd, data, at == META_WRITE_AT ? 0 : 1, at);
    if (at == 0) {
        for (unsigned slot = 0; slot < 2; slot++) {
            uint8_t *meta = p + slot * (len / 2);
            put_le64(meta + META_SEAL_AT, hash64(meta, META_SEAL_AT, META_SEED));
        }
    } else {
        page_seal(p, len);
    }
    return pwrite(fd, data, len, at);
}

ssize_t lm_seal_writev(int fd, const struct iovec *iov, int n_iov)
{
    for (int i = 0; i < n_iov; i++)
        page_seal(iov[i].iov_base, iov[i].iov_len);
    return writev(fd, iov, n_iov);
}

void *lm_seal_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
    void *map = mmap(addr, len, prot, flags, fd, offset);
    if (map != MAP_FAILED) {
        last_map = map;
        last_map_bytes = len;
        last_map_fd = fd;
    }
    return map;
}

bool lm_seal_map(int fd, uint8_t **map, size_t *len)
{
    *map = last_map;
    *len = last_map_bytes;
    return last_map_fd == fd;
}
