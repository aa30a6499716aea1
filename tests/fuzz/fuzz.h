/*
 * What the fuzzers share. Each target is a file of its own that opens with what it feeds to which
 * code, the guarantee that is at stake, and its oracle: what besides the sanitizers says that
 * something is wrong. A line "Code:" names the sources whose coverage counts (tests/fuzz/run.py).
 */
#ifndef FUZZ_FUZZ_H
#define FUZZ_FUZZ_H

#include <stddef.h>
#include <stdint.h>

#include "base/check.h"

/* What libFuzzer calls. One input; always 0. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
/* Where a target has it: once, before all inputs. */
int LLVMFuzzerInitialize(int *argc, char ***argv);
/* Where a target has it: changes the input at `data`, `max` bytes of room, and returns its new
 * length. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);
/* libFuzzer's own way to change bytes, for such a mutator. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max);

/* The rest of an input, from which a target takes its choices. Behind the end everything is 0. */
struct fuzz_input {
    const uint8_t *at, *end;
};

static inline struct fuzz_input fuzz_input(const uint8_t *data, size_t size)
{
    return (struct fuzz_input){data, data + size};
}

static inline size_t fuzz_left(const struct fuzz_input *in)
{
    return (size_t)(in->end - in->at);
}

/* `n` bytes (8 at most) as a number, little-endian. */
static inline uint64_t fuzz_take(struct fuzz_input *in, unsigned n)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < n && in->at < in->end; i++)
        v |= (uint64_t)*in->at++ << (8 * i);
    return v;
}

#endif
