/*
 * What the keeper of a device tells other processes: a lock, which says that it lives and who it
 * is, and a file with its state. Both are in RECORD_FOLDER, which only root writes.
 *
 * The lock is of the process and ends with it, however that ends.
 */
#ifndef DEVICE_RECORD_H
#define DEVICE_RECORD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "client/connect.h"
#include "device/sysfs.h"

#define RECORD_FOLDER "/run/fdb-nbd-device"

struct record {
    char uri[SYSFS_BACKEND_BYTES_MAX + 1];
    char identity[NBD_CLIENT_IDENTITY_BYTES]; /* of the volume; may be empty */
    uint32_t connections, dead; /* as many as there are to be, and how many of them are dead */
    uint64_t since_ns;          /* wall clock: when it came to be so */
    char error[sizeof((struct err *)0)->text]; /* what became of the last try; may be empty */
};

/* One process at a time attaches or detaches: *fd is closed to let the next. Blocks. */
enum status record_lock_all(int *fd, struct err *e);

/* Makes this process the keeper of the device; *fd is closed at its end. ST_BUSY: there is one. */
enum status record_lock(int index, int *fd, struct err *e);

/* The process that keeps the device; 0: none. */
uint32_t record_keeper(int index);

/* Writes the state. What can't be written is missed by `device list` only. */
void record_write(int index, const struct record *r);
void record_remove(int index);

/* False where there is none, or none that can be read. */
bool record_read(int index, struct record *r);

#endif
