/*
 * Recovery after processes that died: volumes they owned are taken over, what
 * their logs hold is committed, and their logs and session records go.
 *
 * Each volume would recover by itself when it is used next; doing all at the
 * start of a server bounds how long logs stay around.
 */
#ifndef VOLUME_RECOVERY_H
#define VOLUME_RECOVERY_H

#include "base/status.h"
#include "volume/volume.h"

struct recovery {
    void (*done)(struct recovery *r); /* in */
    enum status st;                   /* out: ST_OK also where a single volume failed (logged) */
    struct err err;                   /* out */
    unsigned volumes, sessions;       /* out: how many of each were recovered, removed */

    void *state; /* the recovery's, from here on */
};

/* Recovers all volumes whose owner is known to be dead. On `shard`'s reactor thread; `done` is
 * called there, not from inside. Harmless while other servers do the same. */
void recover_dead_sessions(struct recovery *r, struct shard *shard);

#endif
