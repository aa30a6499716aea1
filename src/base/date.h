/*
 * Moments of the wall clock as people read them.
 */
#ifndef BASE_DATE_H
#define BASE_DATE_H

#include <stdint.h>

#define DATE_BYTES 32u

/* Writes nanoseconds since 1970 as 2026-01-31T23:59:59Z into `out` and returns it. */
const char *date_format(uint64_t ns, char out[DATE_BYTES]);

#endif
