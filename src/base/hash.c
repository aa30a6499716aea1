/* XXH3 from the library; kept out of the header so that its users don't depend on it. */
#include "base/hash.h"

#include <xxhash.h>

uint64_t hash64(const void *data, size_t len, uint64_t seed)
{
    return XXH3_64bits_withSeed(data, len, seed);
}
