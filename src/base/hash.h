/*
 * The hash over everything stored (G5): XXH3, 64 bits. Not cryptographic: it is
 * there against media, memory and software that hand back other bytes than were
 * written, not against an attacker who can write to the store.
 */
#ifndef BASE_HASH_H
#define BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

/* XXH3-64 of `len` bytes under `seed`. Any thread. */
uint64_t hash64(const void *data, size_t len, uint64_t seed);

/* Two integers mixed into one, for binding a hash to where its data belongs. */
static inline uint64_t hash_mix(uint64_t a, uint64_t b)
{
    a ^= b + 0x9e3779b97f4a7c15u + (a << 6) + (a >> 2);
    a ^= a >> 33;
    a *= 0xff51afd7ed558ccdu;
    a ^= a >> 33;
    a *= 0xc4ceb9fe1a85ec53u;
    return a ^ (a >> 33);
}

#endif
