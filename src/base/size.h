/*
 * Sizes as people write and read them: 512M, 10G, 1.5T; powers of 1024.
 */
#ifndef BASE_SIZE_H
#define BASE_SIZE_H

#include <stdbool.h>
#include <stdint.h>

/* Reads "10G", "512M", "64KiB", "1.5T", "4096" into bytes. False where the text is not
 * a size, has anything behind it, or does not fit 63 bits. */
bool size_parse(const char *text, uint64_t *bytes);

/* Writes `bytes` for a person ("1.0 GiB", "512 B") into `out` and returns it. */
const char *size_format(uint64_t bytes, char out[24]);

#endif
