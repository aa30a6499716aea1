/*
 * A process that stays behind when the command ends.
 */
#ifndef DEVICE_BACKGROUND_H
#define DEVICE_BACKGROUND_H

#include <stdbool.h>

#include "base/status.h"

/* What the process that stays has to say to the one that waits. */
struct background_report {
    int index; /* of the device it keeps */
    struct err err;
};

struct background {
    bool stays; /* this is the process that stays */
    int pipe;
};

/* Makes the process that stays: both return. Before any thread is begun. */
enum status background_begin(struct background *b, struct err *e);

/* In the one that waits: until the other has reported. ST_IO: it ended without a word. */
enum status background_wait(struct background *b, struct background_report *report, struct err *e);

/* In the one that stays: reports. Then it belongs to no terminal and no folder, and what it logs
 * goes to the journal, if there is one. */
void background_report(struct background *b, const struct background_report *report);

#endif
