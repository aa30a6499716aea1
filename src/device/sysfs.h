/*
 * What can be seen of the kernel's nbd devices: /sys/block/nbdN, and who has one of them in use.
 */
#ifndef DEVICE_SYSFS_H
#define DEVICE_SYSFS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* The longest text that the kernel is given as a backend: it shows it in a page, unchecked. */
#define SYSFS_BACKEND_BYTES_MAX 2000u
/* The kernel's minor numbers end here. */
#define SYSFS_INDEX_MAX ((1 << 20) - 1)

struct sysfs_device {
    int index;
    bool attached, read_only;
    uint32_t pid;           /* that attached it; it may have ended since */
    uint32_t n_connections; /* as far as the kernel shows: no more than there are processors */
    uint32_t block_size;    /* bytes */
    uint64_t size;          /* bytes */
    char backend[SYSFS_BACKEND_BYTES_MAX + 1]; /* that it was attached with; may be empty */
};

/* "/dev/nbd3", a link to it, or "nbd3": 3. ST_INVAL with a sentence for all else. */
enum status sysfs_parse(const char *text, int *index, struct err *e);

/* Looks at one device; where there is none of that number it is not attached. */
void sysfs_read(int index, struct sysfs_device *d);

/* All devices there are, by number; freed with free(). */
struct sysfs_device *sysfs_list(size_t *n);

/* For how long a request may wait for its answer before the driver looks after it, in ms. A kernel
 * without that setting takes 30 s. */
void sysfs_set_request_check(int index, uint32_t interval_ms);

/* ST_BUSY, with a sentence that says by whom, where the device or a partition of it is mounted,
 * swapped to, part of another device, or open. What only looks, as udev does at new devices, has a
 * second to end. Blocks. */
enum status sysfs_check_unused(int index, struct err *e);

#endif
