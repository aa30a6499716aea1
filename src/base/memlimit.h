/*
 * How much memory this process may use at most, the system's copies of the files it reads
 * included.
 */
#ifndef BASE_MEMLIMIT_H
#define BASE_MEMLIMIT_H

#include <stdint.h>

/* Bytes: the machine's memory or the lowest limit of the control groups that the process is in
 * (version 1 and 2), as far as it can be seen. Reads some small files. */
uint64_t memory_limit_bytes(void);

#endif
