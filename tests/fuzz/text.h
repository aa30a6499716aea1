/* The parts of the target "text": what people write. Each takes one input. */
#ifndef FUZZ_TEXT_H
#define FUZZ_TEXT_H

#include "fuzz.h"

void try_config(const uint8_t *data, size_t size);
void try_access(const uint8_t *data, size_t size);

#endif
