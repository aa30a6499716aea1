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
#include "volume/session.h"
#include "volume/volume.h"

struct recovery {
    void (*done)(struct recovery *r); /* in */
    enum status st;                   /* out: ST_OK also where a single volume failed (logged) */
    struct err err;                   /* out */
    unsigned volumes, sessions;       /* out: how many of each were recovered, removed */

    void *state; /* the recovery's, from here on */
};

/* Recovers all volumes whose owner is known to be dead. On `shard`'s reactor thread; `done` is
 * called there, not from inside. Harmless while other servers do the same. On a store with
 * heartbeats there is nothing to recover, and nobody is waited for: one sweep (below). */
void recover_dead_sessions(struct recovery *r, struct shard *shard);

/* On a store with heartbeats: takes away the records of sessions that are over, so that they do
 * not pile up. Those that were fenced or whose process is known to have ended go at once,
 * others when they have stood still for long enough over several sweeps. */
struct session_sweep {
    void (*done)(struct session_sweep *sweep); /* in */
    unsigned n_cleared;                        /* out, of the last sweep */
    unsigned n_suspects; /* out: it is worth sweeping again in SESSION_LOOK_MS; session_is_suspect */

    struct session *session; /* the sweep's, from here on */
    struct session_sight *sights;
    size_t n_sights;
    struct key begin, end;
    struct store_range range;
    struct store_read read;
    struct store_check *checks;
    struct store_mutation *clears;
    size_t n_checks, n_clears;
    struct store_commit commit;
};

/* Sweeps once; the same structure (zero-initialised at first) again and again. On the home thread
 * of `session`; `done` comes there, not from inside. */
void session_sweep_run(struct session_sweep *sweep, struct session *session);
/* Frees what one without a sweep under way holds. */
void session_sweep_free(struct session_sweep *sweep);

#endif
