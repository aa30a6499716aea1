/*
 * Finding the servers that a new one replaces (serve --replace), and telling them to end.
 *
 * Only a process is told that is certainly meant: one that listens at an address of ours and
 * has a live session in the same store under its own identity (base/process.h). If anybody
 * else listens there, nobody is told anything and the new server does not start.
 */
#ifndef SERVER_REPLACE_H
#define SERVER_REPLACE_H

#include <sys/types.h>

#include "base/env.h"
#include "base/status.h"
#include "server/listener.h"
#include "store/store.h"

#define RIVALS_MAX 16u

struct rival {
    uint32_t pid;
    int pidfd;
};

struct rivals {
    struct rival all[RIVALS_MAX];
    size_t n;
};

/* Finds the servers that listen where `l` wants to, and makes sure that each may be told to
 * end; those it had found before stay. Drives `env` by `run_once`. To be called once before
 * anything is changed, and again after listeners_listen(), by when this process has its
 * session: of two that replace the same server at least one finds the other then, and the
 * one that started later stays. */
enum status rivals_find(struct rivals *r, const struct listeners *l, struct store *store,
                        struct env *env, void (*run_once)(struct env *env), struct err *e);

/* Tells them all to end (SIGTERM, with a value by which they know why). */
void rivals_tell(const struct rivals *r);

void rivals_free(struct rivals *r);

/* Has it noted from now on who sends SIGTERM; whoever handles the signal does so as before. And
 * the process that sent it by rivals_tell(), 0 where none did. */
void replace_note_successor(void);
pid_t replace_successor(void);

#endif
