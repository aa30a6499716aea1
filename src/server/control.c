/*
 * The control socket's place in the file system; control.h says where that is.
 */
#include "server/control.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG 16
#define SWEEP_MAX 1000u /* files looked at */

static enum status too_long(const char *path, struct err *e)
{
    return fail(e, ST_INVAL, "%s: the path of a socket has at most %u bytes", path,
                CONTROL_PATH_BYTES - 1);
}

#define ROOTS_DIRECTORY "/run/fdb-nbd"

static bool is_ours(const char *directory)
{
    struct stat st;
    return lstat(directory, &st) == 0 && S_ISDIR(st.st_mode) && st.st_uid == geteuid();
}

void control_make_directory_for(uid_t uid, gid_t gid)
{
    if (geteuid() == 0 && uid != 0 && mkdir(ROOTS_DIRECTORY, 0750) == 0 &&
        lchown(ROOTS_DIRECTORY, uid, gid) != 0)
        rmdir(ROOTS_DIRECTORY);
}

enum status control_directory(char out[CONTROL_PATH_BYTES], struct err *e)
{
    const char *given = getenv("RUNTIME_DIRECTORY"), *xdg = getenv("XDG_RUNTIME_DIR");
    int len;
    if (geteuid() == 0)
        len = snprintf(out, CONTROL_PATH_BYTES, ROOTS_DIRECTORY);
    else if (given && given[0] == '/')
        len = snprintf(out, CONTROL_PATH_BYTES, "%.*s", (int)strcspn(given, ":"), given);
    else if (is_ours(ROOTS_DIRECTORY))
        len = snprintf(out, CONTROL_PATH_BYTES, ROOTS_DIRECTORY);
    else if (xdg && xdg[0] == '/')
        len = snprintf(out, CONTROL_PATH_BYTES, "%s/fdb-nbd", xdg);
    else
        len = snprintf(out, CONTROL_PATH_BYTES, "/tmp/fdb-nbd-%lu", (unsigned long)geteuid());
    return len < (int)CONTROL_PATH_BYTES ? ST_OK : too_long(out, e);
}

enum status control_path(pid_t pid, char out[CONTROL_PATH_BYTES], struct err *e)
{
    char directory[CONTROL_PATH_BYTES];
    enum status st = control_directory(directory, e);
    if (st != ST_OK)
        return st;
    int len = snprintf(out, CONTROL_PATH_BYTES, "%s/%ld.sock", directory, (long)pid);
    return len < (int)CONTROL_PATH_BYTES ? ST_OK : too_long(out, e);
}

/* Others must not be able to put something in there: /tmp is everybody's. */
static enum status make_directory(const char *path, struct err *e)
{
    struct stat st;
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        return fail(e, ST_UNAVAIL, "cannot make the directory %s: %s", path, strerror(errno));
    if (lstat(path, &st) != 0 || !S_ISDIR(st.st_mode))
        return fail(e, ST_UNAVAIL, "%s is no directory", path);
    if ((st.st_uid != geteuid() && geteuid() != 0) || (st.st_mode & 022) != 0)
        return fail(e, ST_UNAVAIL, "%s belongs to another user, or others may write there", path);
    return ST_OK;
}

enum status control_connect(const char *path, int *fd, struct err *e)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof sa.sun_path)
        return too_long(path, e);
    memcpy(sa.sun_path, path, strlen(path) + 1);
    *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*fd < 0)
        return fail(e, ST_UNAVAIL, "cannot make a socket: %s", strerror(errno));
    if (connect(*fd, (const struct sockaddr *)&sa, sizeof sa) == 0)
        return ST_OK;
    int why = errno;
    close(*fd);
    *fd = -1;
    return fail(e,
                why == ECONNREFUSED || why == ENOENT ? ST_NOTFOUND
                : why == EACCES || why == EPERM      ? ST_PERM
                                                     : ST_UNAVAIL,
                "cannot connect to %s: %s", path,
                why == ECONNREFUSED ? "no server listens there any more" : strerror(why));
}

static enum status open_at(const char *path, int *fd, struct err *e)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    struct stat st;
    int other;
    if (strlen(path) >= sizeof sa.sun_path || !*path)
        return too_long(path, e);
    memcpy(sa.sun_path, path, strlen(path) + 1);
    if (lstat(path, &st) == 0) {
        if (!S_ISSOCK(st.st_mode))
            return fail(e, ST_UNAVAIL, "%s: there is a file that is no socket", path);
        enum status found = control_connect(path, &other, NULL);
        if (found == ST_OK)
            close(other);
        if (found != ST_NOTFOUND)
            return fail(e, ST_UNAVAIL, "%s: another process listens there", path);
        if (unlink(path) != 0)
            return fail(e, ST_UNAVAIL, "cannot remove the old socket %s: %s", path,
                        strerror(errno));
    }
    *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (*fd < 0)
        return fail(e, ST_UNAVAIL, "cannot make a socket: %s", strerror(errno));
    /* The file gets the mode that the socket has when it is bound. */
    if (fchmod(*fd, 0600) == 0 && bind(*fd, (const struct sockaddr *)&sa, sizeof sa) == 0 &&
        listen(*fd, BACKLOG) == 0)
        return ST_OK;
    int why = errno;
    close(*fd);
    *fd = -1;
    return fail(e, ST_UNAVAIL, "cannot listen on %s: %s", path, strerror(why));
}

/* Removes what servers that were killed left there: nobody listens, and their process is gone (one
 * that is just starting does not listen yet). */
static void sweep(const char *directory)
{
    DIR *dir = opendir(directory);
    char path[CONTROL_PATH_BYTES];
    unsigned n = 0;
    if (!dir)
        return;
    for (const struct dirent *e; (e = readdir(dir)) && n < SWEEP_MAX; n++) {
        long pid = 0;
        int end = 0, fd;
        if (sscanf(e->d_name, "%ld.sock%n", &pid, &end) != 1 || !end || e->d_name[end] ||
            pid <= 0 || control_path((pid_t)pid, path, NULL) != ST_OK)
            continue;
        if (kill((pid_t)pid, 0) == 0 || errno != ESRCH)
            continue;
        enum status st = control_connect(path, &fd, NULL);
        if (st == ST_OK)
            close(fd);
        else if (st == ST_NOTFOUND)
            unlink(path);
    }
    closedir(dir);
}

enum status control_open(const char *path, char out[CONTROL_PATH_BYTES], int *fd, struct err *e)
{
    enum status st = ST_OK;
    if (path && strlen(path) >= CONTROL_PATH_BYTES)
        return too_long(path, e);
    if (path) {
        memcpy(out, path, strlen(path) + 1);
    } else {
        char directory[CONTROL_PATH_BYTES];
        st = control_directory(directory, e);
        if (st == ST_OK)
            st = make_directory(directory, e);
        if (st == ST_OK)
            sweep(directory);
        if (st == ST_OK)
            st = control_path(getpid(), out, e);
    }
    return st == ST_OK ? open_at(out, fd, e) : st;
}
