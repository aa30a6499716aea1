/* What the keeper of a device tells other processes; see record.h. */
#include "device/record.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_BYTES 64

static const char *path_of(int index, const char *kind, char out[PATH_BYTES])
{
    snprintf(out, PATH_BYTES, RECORD_FOLDER "/nbd%d.%s", index, kind);
    return out;
}

/* Whoever asks may know which devices are kept, whatever the umask of whoever attached them: to
 * one who can't read that they would all be "unkept". */
static enum status open_lock(const char *path, int *fd, struct err *e)
{
    if (mkdir(RECORD_FOLDER, 0755) == 0)
        (void)!chmod(RECORD_FOLDER, 0755);
    else if (errno != EEXIST)
        return fail(e, ST_IO, "cannot make the folder " RECORD_FOLDER ": %s", strerror(errno));
    *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (*fd < 0)
        return fail(e, ST_IO, "cannot open %s: %s", path, strerror(errno));
    (void)!fchmod(*fd, 0644);
    return ST_OK;
}

enum status record_lock_all(int *fd, struct err *e)
{
    enum status st = open_lock(RECORD_FOLDER "/lock", fd, e);
    while (st == ST_OK && flock(*fd, LOCK_EX) != 0) {
        if (errno == EINTR)
            st = fail(e, ST_SHUTDOWN, "interrupted while waiting for another attach or detach");
        else
            st = fail(e, ST_IO, "cannot lock " RECORD_FOLDER "/lock: %s", strerror(errno));
        close(*fd);
    }
    return st;
}

enum status record_lock(int index, int *fd, struct err *e)
{
    char path[PATH_BYTES];
    enum status st = open_lock(path_of(index, "lock", path), fd, e);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (st != ST_OK || fcntl(*fd, F_SETLK, &lock) == 0)
        return st;
    close(*fd);
    return fail(e, ST_BUSY, "/dev/nbd%d is kept by process %u", index, record_keeper(index));
}

uint32_t record_keeper(int index)
{
    char path[PATH_BYTES];
    int fd = open(path_of(index, "lock", path), O_RDONLY | O_CLOEXEC);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    bool kept = fd >= 0 && fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
    if (fd >= 0)
        close(fd);
    return kept ? (uint32_t)lock.l_pid : 0;
}

void record_write(int index, const struct record *r)
{
    char path[PATH_BYTES], part[PATH_BYTES], error[sizeof r->error];
    strcpy(error, r->error);
    /* What a server said may be in it. */
    for (char *c = error; *c; c++)
        if ((unsigned char)*c < 0x20 || (unsigned char)*c >= 0x7f)
            *c = '?';
    json_t *json = json_pack("{s:s, s:s, s:I, s:I, s:I, s:s}", "uri", r->uri, "identity",
                             r->identity, "connections", (json_int_t)r->connections, "dead",
                             (json_int_t)r->dead, "since", (json_int_t)r->since_ns, "error", error);
    if (json && json_dump_file(json, path_of(index, "part", part), JSON_COMPACT) == 0 &&
        chmod(part, 0644) == 0)
        rename(part, path_of(index, "json", path));
    json_decref(json);
}

void record_remove(int index)
{
    char path[PATH_BYTES];
    unlink(path_of(index, "json", path));
}

bool record_read(int index, struct record *r)
{
    char path[PATH_BYTES];
    const char *uri = "", *identity = "", *error = "";
    json_int_t connections = 0, dead = 0, since = 0;
    *r = (struct record){0};
    json_t *json = json_load_file(path_of(index, "json", path), 0, NULL);
    bool good = json && json_unpack(json, "{s:s, s:s, s:I, s:I, s:I, s:s}", "uri", &uri, "identity",
                                    &identity, "connections", &connections, "dead", &dead, "since",
                                    &since, "error", &error) == 0;
    if (good) {
        r->connections = (uint32_t)connections;
        r->dead = (uint32_t)dead;
        r->since_ns = (uint64_t)since;
        snprintf(r->uri, sizeof r->uri, "%s", uri);
        snprintf(r->identity, sizeof r->identity, "%s", identity);
        snprintf(r->error, sizeof r->error, "%s", error);
    }
    json_decref(json);
    return good;
}
