/*
 * Which process this is, so that another one on the same machine can tell for
 * certain that it has ended, without waiting for anything.
 *
 * A process id alone says little: it is used again, and means something else in
 * another container. With the boot of the machine, the namespaces and the start
 * time it names one process for good.
 */
#ifndef BASE_PROCESS_H
#define BASE_PROCESS_H

#include <stdbool.h>
#include <stdint.h>

#define PROCESS_BOOT_BYTES 16u

struct process_id {
    uint8_t boot[PROCESS_BOOT_BYTES]; /* of the machine; all zero: not known */
    uint64_t pid_namespace, time_namespace; /* inodes; no time namespaces here: 0 */
    uint64_t start_ticks;                   /* since boot */
    uint32_t pid;
};

/* This process. What can't be found out stays zero, and nobody can tell then. */
void process_self(struct process_id *id);

/* Whether that process is known to have ended. False where it lives, and where that can't be
 * told from here: another machine, another container, no /proc. Blocks for moments. */
bool process_ended(const struct process_id *id);

/* A pidfd of that very process, which lives; to be closed by the caller. -1 where it has ended,
 * and where it can't be told from others here. */
int process_pidfd(const struct process_id *id);

#endif
