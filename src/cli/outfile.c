/* The file an export goes to; see outfile.h. */
#include "cli/outfile.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/mem.h"
#include "cli/progress.h"
#include "server/reactor.h"

#define HALF_BYTES (4u << 20)
#define ZEROS_BYTES (1u << 20)
/* A reader that takes nothing is waited for, but an interruption is noticed. */
#define LOOK_MS 200
#define PIPE_WRITE_BYTES (64u << 10)

static const uint8_t zeros[ZEROS_BYTES];

enum status outfile_failed(const struct outfile *f, int error, struct err *e)
{
    if (error == EFBIG)
        return fail(e, ST_IO,
                    "cannot write %s: no file there may be that large; --stream writes only what "
                    "the volume holds",
                    f->name);
    return fail(e, error == ENOSPC ? ST_NOSPC : ST_IO, "cannot write %s: %s", f->name,
                strerror(error));
}

static enum status open_stdout(struct outfile *f, struct err *e)
{
    if (isatty(STDOUT_FILENO))
        return fail(e, ST_INVAL, "the volume's bytes are not for a terminal: redirect the output");
    f->name = "standard output";
    f->kind = OUTFILE_PIPE;
    f->fd = STDOUT_FILENO;
    return ST_OK;
}

static enum status open_device(struct outfile *f, struct err *e)
{
    /* O_EXCL: not one that is mounted. */
    f->fd = open(f->name, O_WRONLY | O_EXCL | O_CLOEXEC);
    off_t size = f->fd >= 0 ? lseek(f->fd, 0, SEEK_END) : -1;
    if (size < 0)
        return fail(e, ST_IO, "cannot open %s: %s", f->name, strerror(errno));
    f->kind = OUTFILE_DEVICE;
    f->device_bytes = (uint64_t)size;
    return ST_OK;
}

static enum status open_partial(struct outfile *f, struct err *e)
{
    uint32_t number;
    env_random(f->run->env, &number, sizeof number);
    /* Through a symbolic link, so that the link stays one. */
    f->path = realpath(f->name, NULL);
    if (!f->path)
        f->path = mem_strdup(f->name);
    if (asprintf(&f->partial, "%s.partial-%08x", f->path, number) < 0)
        abort();
    f->kind = OUTFILE_FILE;
    f->fd = open(f->partial, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (f->fd < 0) {
        fail(e, ST_IO, "cannot make %s: %s", f->partial, strerror(errno));
        free(f->partial);
        f->partial = NULL;
        return ST_IO;
    }
    return ST_OK;
}

enum status outfile_open(struct outfile *f, struct run *run, const char *name, bool force,
                         struct err *e)
{
    struct stat stat_now;
    *f = (struct outfile){.run = run, .name = name, .fd = -1, .force = force};
    if (name[0] == '\0')
        return fail(e, ST_INVAL, "the name of the file is empty");
    if (strcmp(name, "-") == 0)
        return open_stdout(f, e);
    if (stat(name, &stat_now) != 0) {
        if (lstat(name, &stat_now) == 0)
            return fail(e, ST_IO, "%s is a link to something that is not there", name);
        return open_partial(f, e);
    }
    bool device = S_ISBLK(stat_now.st_mode);
    if ((S_ISREG(stat_now.st_mode) || device) && !force)
        return fail(e, ST_EXISTS, "%s is there already: --force overwrites it", name);
    if (S_ISREG(stat_now.st_mode))
        return open_partial(f, e);
    if (device)
        return open_device(f, e);
    f->kind = OUTFILE_PIPE;
    f->fd = open(name, O_WRONLY | O_CLOEXEC);
    return f->fd >= 0 ? ST_OK : fail(e, ST_IO, "cannot open %s: %s", name, strerror(errno));
}

/* --- one after the other --------------------------------------------------------------------- */

static void half_write(struct env_work *work)
{
    struct outfile_half *half = container_of(work, struct outfile_half, work);
    struct outfile *f = half->file;
    size_t most = f->kind == OUTFILE_PIPE ? PIPE_WRITE_BYTES : half->len;
    for (size_t at = 0; at < half->len && half->error == 0;) {
        struct pollfd ready = {.fd = f->fd, .events = POLLOUT};
        if (interrupted()) {
            half->error = EINTR;
            return;
        }
        if (poll(&ready, 1, LOOK_MS) <= 0)
            continue;
        ssize_t n = write(f->fd, half->bytes + at, min_u64(half->len - at, most));
        if (n >= 0)
            at += (size_t)n;
        else if (errno != EINTR && errno != EAGAIN)
            half->error = errno;
    }
}

static void half_written(struct env_work *work)
{
    struct outfile_half *half = container_of(work, struct outfile_half, work);
    half->busy = false;
    if (half->error && !half->file->error)
        half->file->error = half->error;
}

static void half_wait(struct outfile *f, struct outfile_half *half)
{
    while (half->busy)
        reactor_run_once(f->run->env);
}

/* Writes what has gathered, behind the other half. */
static void half_start(struct outfile *f)
{
    struct outfile_half *half = &f->halves[f->filling];
    f->filling ^= 1;
    half_wait(f, &f->halves[f->filling]);
    f->halves[f->filling].len = 0;
    if (f->error)
        return;
    half->file = f;
    half->work = (struct env_work){.work = half_write, .done = half_written};
    half->busy = true;
    env_work(f->run->env, &half->work);
}

enum status outfile_put(struct outfile *f, const void *data, size_t len, struct err *e)
{
    const uint8_t *from = data;
    while (len > 0) {
        struct outfile_half *half = &f->halves[f->filling];
        if (!half->bytes)
            half->bytes = mem_alloc(HALF_BYTES);
        size_t n = min_u64(len, HALF_BYTES - half->len);
        memcpy(half->bytes + half->len, from, n);
        half->len += n;
        from += n;
        len -= n;
        if (half->len == HALF_BYTES)
            half_start(f);
    }
    return f->error ? outfile_failed(f, f->error, e) : ST_OK;
}

enum status outfile_put_zeros(struct outfile *f, uint64_t len, struct err *e)
{
    enum status st = ST_OK;
    while (st == ST_OK && len > 0) {
        size_t n = min_u64(len, sizeof zeros);
        st = outfile_put(f, zeros, n, e);
        len -= n;
    }
    return st;
}

/* --- anywhere -------------------------------------------------------------------------------- */

int outfile_write(struct outfile *f, uint64_t offset, struct iovec *parts, int n)
{
    while (n > 0) {
        ssize_t done = pwritev(f->fd, parts, n, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done < 0 ? errno : EIO;
        offset += (uint64_t)done;
        while (n > 0 && (size_t)done >= parts->iov_len) {
            done -= (ssize_t)parts->iov_len;
            parts++;
            n--;
        }
        if (n > 0) {
            parts->iov_base = (uint8_t *)parts->iov_base + done;
            parts->iov_len -= (size_t)done;
        }
    }
    return 0;
}

int outfile_zero(struct outfile *f, uint64_t offset, uint64_t len)
{
    if (fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len) == 0)
        return 0;
    while (len > 0) {
        size_t n = min_u64(len, sizeof zeros);
        uint8_t *bytes = (uint8_t *)(uintptr_t)zeros;
        struct iovec part = {bytes, n};
        int error = interrupted() ? EINTR : outfile_write(f, offset, &part, 1);
        if (error)
            return error;
        offset += n;
        len -= n;
    }
    return 0;
}

enum status outfile_set_size(struct outfile *f, uint64_t size, struct err *e)
{
    return ftruncate(f->fd, (off_t)size) == 0 ? ST_OK : outfile_failed(f, errno, e);
}

/* --- the end --------------------------------------------------------------------------------- */

static int sync_folder(const char *path)
{
    char *copy = mem_strdup(path);
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(copy);
    if (fd < 0)
        return errno;
    int error = fsync(fd) == 0 ? 0 : errno;
    close(fd);
    return error;
}

/* Gives the file its name. */
static int name_file(struct outfile *f)
{
    if (f->force)
        return rename(f->partial, f->path) == 0 ? 0 : errno;
    /* Not over one that was made meanwhile. */
    if (renameat2(AT_FDCWD, f->partial, AT_FDCWD, f->path, RENAME_NOREPLACE) == 0)
        return 0;
    /* Some file systems have no such thing, but hard links. */
    if (errno == EINVAL && link(f->partial, f->path) == 0)
        return unlink(f->partial) == 0 ? 0 : errno;
    return errno;
}

static void settle(void *arg)
{
    struct outfile *f = arg;
    if (f->kind == OUTFILE_PIPE)
        return;
    if (fsync(f->fd) != 0) {
        f->error = errno;
        return;
    }
    if (f->kind == OUTFILE_FILE && (f->error = name_file(f)) == 0) {
        free(f->partial);
        f->partial = NULL;
        f->error = sync_folder(f->path);
    }
}

enum status outfile_finish(struct outfile *f, struct err *e)
{
    if (f->halves[f->filling].len > 0)
        half_start(f);
    half_wait(f, &f->halves[0]);
    half_wait(f, &f->halves[1]);
    if (f->error == 0)
        run_aside(f->run, settle, f);
    return f->error ? outfile_failed(f, f->error, e) : ST_OK;
}

void outfile_close(struct outfile *f)
{
    for (unsigned i = 0; i < 2; i++) {
        half_wait(f, &f->halves[i]);
        free(f->halves[i].bytes);
    }
    if (f->fd >= 0 && f->fd != STDOUT_FILENO)
        close(f->fd);
    if (f->partial)
        unlink(f->partial);
    free(f->partial);
    free(f->path);
}
