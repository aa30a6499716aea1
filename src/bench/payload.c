/* What a load writes; see payload.h. */
#include "bench/payload.h"

#include <stdlib.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "bench/random.h"

#define CELL_BYTES 512u
#define POOL_BYTES (16u << 20)
#define POOL_PLACES (POOL_BYTES / CELL_BYTES)

void payload_init(struct payload *p, uint64_t seed, unsigned compressible)
{
    /* A unit may begin at the last place: the first ones are there once more. */
    size_t len = POOL_BYTES + PAYLOAD_UNIT_BYTES;
    uint32_t noise_bytes = CELL_BYTES * (100 - compressible) / 100;
    *p = (struct payload){mem_zalloc(len), seed};
    struct random random = {seed};
    for (size_t cell = 0; cell < POOL_BYTES; cell += CELL_BYTES) {
        for (uint32_t i = 0; i < noise_bytes; i += 8) {
            uint64_t noise = random_u64(&random);
            memcpy(p->pool + cell + i, &noise, min_u64(8, noise_bytes - i));
        }
    }
    memcpy(p->pool + POOL_BYTES, p->pool, PAYLOAD_UNIT_BYTES);
}

void payload_free(struct payload *p)
{
    free(p->pool);
    *p = (struct payload){0};
}

unsigned payload_put(const struct payload *p, uint64_t first_unit, uint64_t from, uint64_t to,
                     struct payload_stamps *stamps, struct iovec *iov, unsigned max, size_t *bytes)
{
    unsigned n = 0;
    while (from < to && n + 2 <= max && stamps->used < sizeof stamps->bytes / PAYLOAD_STAMP_BYTES) {
        uint64_t unit = from / PAYLOAD_UNIT_BYTES, at = from % PAYLOAD_UNIT_BYTES;
        uint64_t end = min_u64(PAYLOAD_UNIT_BYTES, to - unit * PAYLOAD_UNIT_BYTES);
        uint64_t number = random_mix(p->seed + 0x9e3779b97f4a7c15u) + first_unit + unit;
        uint64_t first = random_mix(number), second = random_mix(first + p->seed);
        if (at < PAYLOAD_STAMP_BYTES) {
            uint8_t *stamp = stamps->bytes[stamps->used++];
            put_le64(stamp, first);
            put_le64(stamp + 8, second);
            iov[n++] = (struct iovec){stamp + at, min_u64(PAYLOAD_STAMP_BYTES, end) - at};
            at = PAYLOAD_STAMP_BYTES;
        }
        if (at < end)
            iov[n++] = (struct iovec){p->pool + second % POOL_PLACES * CELL_BYTES + at, end - at};
        *bytes += (size_t)(unit * PAYLOAD_UNIT_BYTES + end - from);
        from = unit * PAYLOAD_UNIT_BYTES + end;
    }
    return n;
}
