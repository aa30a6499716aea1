/*
 * Reactors: the environment of base/env.h on libuv, one event loop and, but for
 * the first, one thread each.
 *
 * Commands that only need an environment run one reactor by hand
 * (reactor_run_once); the server gives each its thread.
 */
#ifndef SERVER_REACTOR_H
#define SERVER_REACTOR_H

#include <stdbool.h>
#include <stddef.h>

#include "base/env.h"
#include "base/list.h"
#include "base/status.h"

struct reactor;
struct uv_loop_s;

/* Something to be done once per turn of the loop, after the events of that turn were handled
 * and again before the loop waits for the next ones. */
struct reactor_hook {
    struct list link;
    void (*run)(struct reactor_hook *hook);
};

/* Makes a reactor; nothing runs yet. Main thread. */
enum status reactor_new(struct reactor **out, struct err *e);

/* Starts a thread that runs the loop until reactor_stop(). */
enum status reactor_start(struct reactor *r, struct err *e);

/* Runs the loop on the calling thread until reactor_stop(). */
void reactor_run(struct reactor *r);

/* Makes the loop end soon, whatever it still waits for. ANY thread. */
void reactor_stop(struct reactor *r);

/* Waits for the thread of a reactor that was stopped; nothing where it has none. */
void reactor_join(struct reactor *r);

/* Frees a reactor that does not run: waits for work on other threads, runs what was posted,
 * and closes what is left of its own. Whoever put handles into its loop has closed them
 * (the close callbacks may still be due). */
void reactor_free(struct reactor *r);

struct env *reactor_env(struct reactor *r);
struct uv_loop_s *reactor_loop(struct reactor *r);

/* One turn of the loop of a reactor that is not run otherwise: waits for an event, handles
 * what there is. Takes the environment, because that is what the layers below hold. */
void reactor_run_once(struct env *env);

/* A client was answered and asks one thing after another: the next request may follow at once,
 * unless not `soon`. Where such requests have followed one another closely for a while, the loop
 * looks for the next one for some microseconds before it sleeps: being woken costs more. Never on
 * a machine with one core, nor on more than half of the cores. Reactor thread. */
void reactor_expects(struct reactor *r, bool soon);

/* Hooks run in the order added. Reactor thread, or while it does not run. */
void reactor_hook_add(struct reactor *r, struct reactor_hook *hook);
void reactor_hook_remove(struct reactor_hook *hook);

#endif
