/*
 * Where the control socket of a server is: a Unix socket by which commands on the same machine talk
 * to it (http.h).
 *
 * One directory holds those of all servers of a user, each named after its process: PID.sock. A
 * server that was killed leaves its own behind; the next one that starts removes it.
 */
#ifndef SERVER_CONTROL_H
#define SERVER_CONTROL_H

#include <sys/types.h>

#include "base/status.h"

#define CONTROL_PATH_BYTES 108u /* as in struct sockaddr_un */

/* The directory where this user's servers have their control sockets: /run/fdb-nbd for root; else
 * what a service manager gave ($RUNTIME_DIRECTORY), /run/fdb-nbd where it is this user's,
 * $XDG_RUNTIME_DIR/fdb-nbd, or /tmp/fdb-nbd-UID. */
enum status control_directory(char out[CONTROL_PATH_BYTES], struct err *e);

/* As root, for a server that is to become another user's: makes /run/fdb-nbd his where it is not
 * there, so that root's commands find the server. One that is there is left as it is. */
void control_make_directory_for(uid_t uid, gid_t gid);

/* The socket of the process `pid` in there. */
enum status control_path(pid_t pid, char out[CONTROL_PATH_BYTES], struct err *e);

/* Makes the socket at `path`, or, where that is NULL, this process's in the directory, which is
 * made as well: non-blocking, listening, for this user alone. One that a dead server left there is
 * replaced; ST_UNAVAIL where somebody listens, or it can't be made. */
enum status control_open(const char *path, char out[CONTROL_PATH_BYTES], int *fd, struct err *e);

/* Connects to a control socket. ST_NOTFOUND: nobody listens, its server is gone (then the file may
 * be removed); ST_PERM, ST_UNAVAIL. */
enum status control_connect(const char *path, int *fd, struct err *e);

#endif
