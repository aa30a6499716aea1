/*
 * A store in front of an engine's whose process can die, for tests in one real process.
 *
 * While the process lives everything goes through to the engine. When it dies, whatever it
 * waits for is answered with errors, so that its remains can be taken apart like any others;
 * but commits that the engine was given are the engine's: they land or they do not, later,
 * when another process may long have taken over. Requests are therefore copied whole.
 *
 * For engines without a log (a log belongs to the real process). Who asks whether such a process
 * has ended is told so: programs with this are linked with process_self and process_ended of
 * base/process.h wrapped (-Wl,--wrap), and sessions begun after mortal_store_new() are of a
 * process of its own.
 */
#ifndef TESTS_SIM_MORTAL_STORE_H
#define TESTS_SIM_MORTAL_STORE_H

#include "store/store.h"

/* What outlives processes. */
struct graveyard {
    struct list stores;   /* of all processes, until the engine's handle is closed */
    struct list sessions; /* of dead ones */
    bool deaths_unknown;  /* nobody is told of them */
    uint64_t deaths;
    uint64_t late_landed, late_refused, late_failed; /* commits of dead processes */
};

void graveyard_init(struct graveyard *g);
/* Nothing of a dead process is under way any more. */
bool graveyard_is_quiet(const struct graveyard *g);
/* Everything was closed. */
void graveyard_destroy(struct graveyard *g);

/* Takes the engine's handle over; store_close() closes both, when the engine is done. */
struct store *mortal_store_new(struct graveyard *g, struct store *engine, struct env *env);

/* Its process dies now. */
void mortal_store_kill(struct store *store);

#endif
