/*
 * The session: this process in the eyes of others.
 *
 * An owner key names a session (an incarnation); whoever wants a volume that a
 * session owns asks, waits, or finds that the session is dead. One per process,
 * shared by its shards; immutable while they run.
 */
#ifndef VOLUME_SESSION_H
#define VOLUME_SESSION_H

#include "base/env.h"
#include "base/status.h"
#include "store/store.h"
#include "volume/records.h"

struct session {
    struct store *store;
    uint8_t id[SESSION_ID_BYTES];
    uint32_t lease_ms;
    uint32_t pid;
    char host[HOST_BYTES_MAX + 1];
    char address[HOST_BYTES_MAX + 1];
};

/* Registers a new incarnation with a random id: with the engine, and as a session record in
 * the store. `address`: where this process listens, or the name of the command. Drives `env`
 * by `run_once` (one turn of its loop) until the record is committed: before the reactor
 * serves. */
enum status session_begin(struct session *s, struct store *store, struct env *env,
                          void (*run_once)(struct env *env), uint32_t lease_ms,
                          const char *address, struct err *e);

/* Takes the record and the registration away; no volume may be owned any more. */
void session_end(struct session *s, struct env *env, void (*run_once)(struct env *env));

#endif
