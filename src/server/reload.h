/*
 * What SIGHUP reads anew: the access file, the credentials of TLS.
 *
 * Each is read and checked on a worker thread, because files and the names of users may come over a
 * network, and put in use on lane 0's thread. What can't be read or makes no sense is not used: the
 * old stays, and the log says so.
 */
#ifndef SERVER_RELOAD_H
#define SERVER_RELOAD_H

#include <stdbool.h>
#include <stddef.h>

#include "base/env.h"
#include "base/status.h"

#define RELOAD_HOOKS_MAX 8u

struct reload_hook {
    const char *what; /* "the access rules", for log lines */
    void *arg;
    /* Reads it: *loaded, or a failure with its sentence. A WORKER THREAD, while the old is in use. */
    enum status (*load)(void *arg, void **loaded, struct err *e);
    /* Takes it over and uses it from now on. Lane 0's thread. */
    void (*use)(void *arg, void *loaded);
    /* Frees what was loaded and is not wanted any more. Lane 0's thread. */
    void (*drop)(void *loaded);

    void *loaded; /* from here on reload.c's */
    enum status st;
    struct err err;
};

struct reload {
    struct env *env;
    struct reload_hook hooks[RELOAD_HOOKS_MAX];
    size_t n;
    struct env_work work;
    bool busy, again, ended;
};

/* Has SIGHUP kept for later from now on, until the server handles it: it would end the process.
 * Where that was started on a terminal that is gone, it still does. Before there are threads. */
void reload_keep_early(void);
/* Whether one was kept. */
bool reload_was_asked_for_early(void);

/* Lane 0's thread, or before it runs; `env` is that of lane 0. */
void reload_init(struct reload *r, struct env *env);
void reload_add(struct reload *r, struct reload_hook hook);

/* Reads all anew; once more when that is under way. Lane 0's thread. */
void reload_begin(struct reload *r);

/* Nothing is put in use any more; `r` stays until the reactor is freed. Lane 0's thread. */
void reload_end(struct reload *r);

#endif
