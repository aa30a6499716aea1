/*
 * Ending a kernel device, whoever attached it.
 */
#ifndef DEVICE_DETACH_H
#define DEVICE_DETACH_H

#include <stdbool.h>

#include "base/status.h"

/* Detaches the device, ends its keeper and waits until both are over. ST_BUSY, with a sentence that
 * says who has it: it is in use, and not `force`. *lingers: it was cut off, but stays until those
 * who have it open close it. Blocks. */
enum status device_detach(int index, bool force, bool *lingers, struct err *e);

#endif
