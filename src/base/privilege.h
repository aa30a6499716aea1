/*
 * Giving up root's rights, for good: another user and his groups, no capabilities, and no program
 * that is run later gets any back.
 */
#ifndef BASE_PRIVILEGE_H
#define BASE_PRIVILEGE_H

#include <stdbool.h>
#include <sys/types.h>

#include "base/status.h"

#define PRIVILEGE_NAME_BYTES 64u

struct privilege_user {
    char name[PRIVILEGE_NAME_BYTES]; /* "" where the number has none */
    char home[256];
    uid_t uid;
    gid_t gid;
};

/* NAME[:GROUP], either as a name or a number; without a group the user's own. ST_INVAL with a
 * sentence: there is no such user or group. Blocks where users come over a network. */
enum status privilege_find(const char *text, struct privilege_user *out, struct err *e);

/* Makes this process the user's, also for files and signals, and where the environment says where
 * his files are. Nothing is done where it is his already. While there is one thread. ST_PERM,
 * ST_UNAVAIL: it can't be, and the process is to end. */
enum status privilege_become(const struct privilege_user *user, struct err *e);

/* Gives up what is left: capabilities, unless the process is root's, and the chance to get any by
 * running a program. While there is one thread. */
enum status privilege_keep_none(struct err *e);

#endif
