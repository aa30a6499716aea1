/*
 * What a load writes: noise, or noise with zeros in it where it is to compress.
 *
 * Written data is made of units of 4 KiB. A unit begins with a stamp of 16 bytes that no other unit
 * of the load has; the rest comes out of a pool of noise, at a place that the stamp says. So
 * nothing is copied or made for a request, and still no two blocks are the same: a server that
 * compresses or looks for equal blocks gains nothing that it was not meant to. Of each 512 bytes of
 * the pool the last ones are zeros, as many as are to compress.
 *
 * Units are numbered; the bytes of a unit are a function of seed and number alone.
 */
#ifndef BENCH_PAYLOAD_H
#define BENCH_PAYLOAD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define PAYLOAD_UNIT_BYTES 4096u
#define PAYLOAD_STAMP_BYTES 16u

struct payload {
    uint8_t *pool;
    uint64_t seed;
};

/* Room for the stamps that a call of payload_put() refers to. */
struct payload_stamps {
    uint8_t bytes[512][PAYLOAD_STAMP_BYTES];
    unsigned used;
};

/* Makes the pool, some MiB; compressible: percent. Freed with payload_free(), which is harmless for
 * one that is all zeros. */
void payload_init(struct payload *p, uint64_t seed, unsigned compressible);
void payload_free(struct payload *p);

static inline uint64_t payload_units(uint64_t bytes)
{
    return (bytes + PAYLOAD_UNIT_BYTES - 1) / PAYLOAD_UNIT_BYTES;
}

/* Refers to the bytes `from` to `to` of a payload whose units have the numbers from `first_unit`
 * on: sets up to `max` (2 or more) of `iov`, adds what they cover to *bytes and returns how many
 * were set. Stops earlier where `iov` or `stamps` are used up. What is referred to is good until
 * `stamps` is used anew. */
unsigned payload_put(const struct payload *p, uint64_t first_unit, uint64_t from, uint64_t to,
                     struct payload_stamps *stamps, struct iovec *iov, unsigned max, size_t *bytes);

#endif
