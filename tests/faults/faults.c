/*
 * A double for the system calls on files: preloaded into a program, it counts those on the files
 * below one folder, by kind and file, and lets the one that it is told to fail.
 *
 * What stands in for what: open, read, pread, preadv, preadv2; write, writev, pwrite, pwritev,
 * pwritev2; io_submit and io_getevents where they are called by syscall(); fallocate, ftruncate,
 * fsync, fdatasync, sync_file_range, mmap, rename, unlink, mkdir, and the locks of fcntl and flock.
 * All of them reach the kernel unless it is their turn to fail. What goes past these (a page of a
 * mapping that can't be read) it cannot fail.
 *
 *   FAULTS_ROOT     the folder
 *   FAULTS_CONTROL  a file of a page, shared with whoever drives the test: struct control
 *   FAULTS_DROP     keep what unsynced writes replaced, so that DROP can put it back
 *
 * A sync that fails and DROPs takes along what was written since the last one that succeeded, as
 * a kernel does that forgets pages it could not write: who then only syncs again, and says that
 * all is well, has lost it.
 */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "../unit/aio_double.h"

/* The order of both is that of the lists in inject.py. */
enum kind {
    KIND_OPEN,
    KIND_READ,
    KIND_WRITE,
    KIND_SYNC_WRITE, /* through a descriptor with O_DSYNC: its own sync */
    KIND_SUBMIT,
    KIND_ALLOCATE,
    KIND_PUNCH,
    KIND_TRUNCATE,
    KIND_SYNC,
    KIND_SYNC_RANGE,
    KIND_MAP,
    KIND_RENAME,
    KIND_UNLINK,
    KIND_MKDIR,
    KIND_LOCK,
    KINDS,
};

enum file {
    FILE_DATA,
    FILE_LOCK,
    FILE_BLOCKS,
    FILE_LOG,
    FILE_SESSION,
    FILE_PROCESSES,
    FILE_RESERVE,
    FILE_BELL,
    FILE_FOLDER,
    FILE_OTHER,
    FILES,
};

/* Beside the numbers of errors. */
enum how {
    HOW_SHORT = 1000, /* does half of it and says so */
    HOW_HALF = 1001,  /* does half of it and fails with EIO */
    HOW_LATE = 1002,  /* does it and fails with EIO */
    HOW_DROP = 1003,  /* a sync: EIO, and what it was for is gone */
};

#define FOR_EVER UINT32_MAX

struct control {
    _Atomic uint32_t armed;
    uint32_t kind, file, how;
    _Atomic int32_t before; /* calls that pass first */
    _Atomic uint32_t times; /* calls that fail then */
    _Atomic uint32_t fired;
    _Atomic uint32_t dropped; /* bytes that DROP took back */
    uint32_t unused[8];
    _Atomic uint32_t counts[KINDS][FILES];
};

static char root[PATH_MAX];
static size_t root_len;
static struct control *control;
static bool keeps;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void give_up(const char *what)
{
    static const char begin[] = "faults: ";
    syscall(SYS_write, 2, begin, sizeof begin - 1);
    syscall(SYS_write, 2, what, strlen(what));
    syscall(SYS_write, 2, "\n", (size_t)1);
    _exit(99);
}

static void set_up(void)
{
    const char *folder = getenv("FAULTS_ROOT"), *path = getenv("FAULTS_CONTROL");
    keeps = getenv("FAULTS_DROP") != NULL;
    if (!folder || !path)
        return;
    if (!realpath(folder, root))
        give_up("FAULTS_ROOT does not exist");
    root_len = strlen(root);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    void *map = (void *)syscall(SYS_mmap, NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED,
                                fd, 0L);
    if (fd < 0 || map == MAP_FAILED)
        give_up("FAULTS_CONTROL can't be mapped");
    syscall(SYS_close, fd);
    control = map;
}

static bool watching(void)
{
    pthread_once(&once, set_up);
    return control != NULL;
}

/* ---- which file ---- */

static int file_of_path(const char *path)
{
    static const struct {
        const char *name;
        enum file file;
    } names[] = {{"data.mdb", FILE_DATA},       {"lock.mdb", FILE_LOCK},
                 {"blocks", FILE_BLOCKS},       {"processes", FILE_PROCESSES},
                 {"reserve", FILE_RESERVE},     {"bell", FILE_BELL}};
    if (strncmp(path, root, root_len) != 0 || (path[root_len] != '/' && path[root_len] != '\0'))
        return -1;
    const char *name = strrchr(path, '/');
    if (!name)
        return FILE_FOLDER;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(name + 1, names[i].name) == 0)
            return (int)names[i].file;
    if (name - path > 4 && strncmp(name - 4, "/log", 4) == 0)
        return FILE_LOG;
    if (name - path > 8 && strncmp(name - 8, "/session", 8) == 0)
        return FILE_SESSION;
    return FILE_OTHER;
}

static int file_of(int fd)
{
    char link[40], path[PATH_MAX];
    struct stat sb;
    if (fd < 0 || !watching())
        return -1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0 || path[0] != '/')
        return -1;
    path[n] = '\0';
    int file = file_of_path(path);
    if (file < 0)
        return -1;
    return fstat(fd, &sb) == 0 && S_ISDIR(sb.st_mode) ? (int)FILE_FOLDER : file;
}

/* Of a name; its folder has to be there. */
static int file_named(int at, const char *path)
{
    char folder[PATH_MAX], full[2 * PATH_MAX];
    if (!watching())
        return -1;
    const char *slash = strrchr(path, '/');
    if (path[0] != '/') {
        char link[40];
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t n = at == AT_FDCWD ? (getcwd(folder, sizeof folder) ? (ssize_t)strlen(folder) : -1)
                                   : readlink(link, folder, sizeof folder - 1);
        if (n <= 0)
            return -1;
        folder[n] = '\0';
        snprintf(full, sizeof full, "%s/%s", folder, path);
        return file_of_path(full);
    }
    if ((size_t)(slash - path) >= sizeof full)
        return -1;
    snprintf(full, sizeof full, "%.*s", (int)(slash - path), path);
    if (!realpath(full[0] ? full : "/", folder))
        return -1;
    snprintf(full, sizeof full, "%s%s", folder, slash);
    return file_of_path(full);
}

/* ---- whether it is its turn ---- */

/* 0: it passes; else an error, or one of enum how. */
static int turn(enum kind kind, int file)
{
    if (file < 0)
        return 0;
    atomic_fetch_add(&control->counts[kind][file], 1);
    if (!atomic_load(&control->armed) || control->kind != (uint32_t)kind ||
        control->file != (uint32_t)file)
        return 0;
    if (atomic_fetch_sub(&control->before, 1) > 0)
        return 0;
    uint32_t times = atomic_load(&control->times);
    do {
        if (times == 0)
            return 0;
    } while (times != FOR_EVER &&
             !atomic_compare_exchange_weak(&control->times, &times, times - 1));
    atomic_fetch_add(&control->fired, 1);
    return (int)control->how;
}

/* For calls that are done or not: *done is whether it is to be done all the same. */
static int fails_whole(enum kind kind, int file, bool *done)
{
    int how = turn(kind, file);
    *done = how == 0 || how == HOW_LATE;
    return how >= HOW_SHORT ? EIO : how;
}

static int refuse(int error)
{
    errno = error;
    return -1;
}

/* ---- what unsynced writes replaced ---- */

struct kept {
    struct kept *next; /* an older one */
    dev_t dev;
    ino_t ino;
    off_t at;
    size_t len;
    uint8_t bytes[];
};

static struct kept *all_kept;

static int reopened(int fd, int flags)
{
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return (int)syscall(SYS_openat, AT_FDCWD, link, flags | O_CLOEXEC);
}

/* With the lock held. */
static void keep(int fd, off_t at, size_t len)
{
    struct stat sb;
    int from = reopened(fd, O_RDONLY);
    struct kept *k = calloc(1, sizeof *k + len);
    if (from < 0 || !k || fstat(fd, &sb) < 0)
        give_up("what a write replaces can't be kept");
    k->dev = sb.st_dev;
    k->ino = sb.st_ino;
    k->at = at;
    k->len = len;
    k->next = all_kept;
    all_kept = k;
    for (size_t done = 0; done < len;) {
        long n = syscall(SYS_pread64, from, k->bytes + done, len - done, at + (off_t)done);
        if (n <= 0)
            break; /* behind its end: zeros */
        done += (size_t)n;
    }
    syscall(SYS_close, from);
}

/* Takes out what is kept of the file behind `fd`, the newest first; NULL: no more. */
static struct kept *kept_pop(const struct stat *sb)
{
    for (struct kept **at = &all_kept; *at; at = &(*at)->next) {
        struct kept *k = *at;
        if (k->dev == sb->st_dev && k->ino == sb->st_ino) {
            *at = k->next;
            return k;
        }
    }
    return NULL;
}

/* With the lock held. */
static void kept_end(int fd, bool put_back)
{
    struct stat sb;
    struct kept *k;
    int to = put_back ? reopened(fd, O_WRONLY) : -1;
    if (fstat(fd, &sb) < 0 || (put_back && to < 0))
        give_up("what a write replaced can't be put back");
    while ((k = kept_pop(&sb))) {
        if (put_back) {
            if (syscall(SYS_pwrite64, to, k->bytes, k->len, k->at) != (long)k->len)
                give_up("what a write replaced can't be put back");
            atomic_fetch_add(&control->dropped, (uint32_t)k->len);
        }
        free(k);
    }
    if (to >= 0)
        syscall(SYS_close, to);
}

/* ---- writes ---- */

static ssize_t really_write(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
    if (at < 0)
        return syscall(SYS_writev, fd, iov, n);
    return syscall(SYS_pwritev2, fd, iov, n, at, 0, flags);
}

/* About the first half of `iov`: whole units where there are any, as a disk takes them. */
static size_t half_of(const struct iovec *iov, int n, struct iovec *half, int *n_half)
{
    size_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    size_t want = len >= 8192 ? len / 2 / 4096 * 4096 : len / 2, left = want;
    for (*n_half = 0; left > 0; ++*n_half) {
        half[*n_half] = iov[*n_half];
        if (half[*n_half].iov_len > left)
            half[*n_half].iov_len = left;
        left -= half[*n_half].iov_len;
    }
    return want;
}

static ssize_t do_write(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
    int file = file_of(fd);
    if (file < 0)
        return really_write(fd, iov, n, at, flags);
    bool syncs = fcntl(fd, F_GETFL) & (O_DSYNC | O_SYNC);
    struct iovec half[IOV_MAX];
    int n_half;
    int how = turn(syncs ? KIND_SYNC_WRITE : KIND_WRITE, file);
    if (how && how < HOW_SHORT)
        return refuse(how);
    if (n > IOV_MAX)
        give_up("a write of too many pieces");
    size_t len = half_of(iov, n, half, &n_half);
    if (how != HOW_SHORT && how != HOW_HALF) {
        memcpy(half, iov, (size_t)n * sizeof *iov);
        n_half = n;
        len = 0;
        for (int i = 0; i < n; i++)
            len += iov[i].iov_len;
    }
    pthread_mutex_lock(&lock);
    if (keeps && !syncs && len > 0)
        keep(fd, at >= 0 ? at : lseek(fd, 0, SEEK_CUR), len);
    ssize_t did = len > 0 ? really_write(fd, half, n_half, at, flags) : 0;
    int why = errno;
    pthread_mutex_unlock(&lock);
    errno = why;
    return how == HOW_HALF || how == HOW_LATE || how == HOW_DROP ? refuse(EIO) : did;
}

ssize_t write(int fd, const void *data, size_t len)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};
    return file_of(fd) < 0 ? syscall(SYS_write, fd, data, len) : do_write(fd, &iov, 1, -1, 0);
}

ssize_t writev(int fd, const struct iovec *iov, int n)
{
    return do_write(fd, iov, n, -1, 0);
}

ssize_t pwrite(int fd, const void *data, size_t len, off_t at)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};
    return do_write(fd, &iov, 1, at, 0);
}

ssize_t pwrite64(int fd, const void *data, size_t len, off_t at)
{
    return pwrite(fd, data, len, at);
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t at)
{
    return do_write(fd, iov, n, at, 0);
}

ssize_t pwritev64(int fd, const struct iovec *iov, int n, off_t at)
{
    return do_write(fd, iov, n, at, 0);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
    return do_write(fd, iov, n, at, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
    return do_write(fd, iov, n, at, flags);
}

/* ---- reads ---- */

/* What a read of `len` bytes that went well gives after all. */
static ssize_t read_done(int how, ssize_t did)
{
    if (did < 0 || how == 0)
        return did;
    if (how == HOW_SHORT)
        return did / 2;
    return refuse(how < HOW_SHORT ? how : EIO);
}

ssize_t read(int fd, void *data, size_t len)
{
    int how = turn(KIND_READ, file_of(fd));
    /* What is not given must not be taken from the file either. */
    if (how && how != HOW_SHORT)
        return refuse(how < HOW_SHORT ? how : EIO);
    return syscall(SYS_read, fd, data, how && len > 1 ? len / 2 : len);
}

ssize_t pread(int fd, void *data, size_t len, off_t at)
{
    int how = turn(KIND_READ, file_of(fd));
    return read_done(how, syscall(SYS_pread64, fd, data, len, at));
}

ssize_t pread64(int fd, void *data, size_t len, off_t at)
{
    return pread(fd, data, len, at);
}

ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
    int how = turn(KIND_READ, file_of(fd));
    return read_done(how, syscall(SYS_preadv2, fd, iov, n, at, 0, flags));
}

ssize_t preadv64v2(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
    return preadv2(fd, iov, n, at, flags);
}

ssize_t preadv(int fd, const struct iovec *iov, int n, off_t at)
{
    int how = turn(KIND_READ, file_of(fd));
    return read_done(how, syscall(SYS_preadv, fd, iov, n, at, 0));
}

ssize_t preadv64(int fd, const struct iovec *iov, int n, off_t at)
{
    return preadv(fd, iov, n, at);
}

/* ---- asynchronous ones ---- */

static int submit_fails(const long a[6])
{
    struct iocb **iocbs = (struct iocb **)(uintptr_t)a[2];
    int how = a[1] > 0 ? turn(KIND_SUBMIT, file_of((int)iocbs[0]->aio_fildes)) : 0;
    return how >= HOW_SHORT ? EAGAIN : how;
}

static void events_spoil(struct io_event *events, long n)
{
    for (long i = 0; i < n; i++) {
        const struct iocb *iocb = (const struct iocb *)(uintptr_t)events[i].obj;
        if (iocb->aio_lio_opcode != IOCB_CMD_PREADV && iocb->aio_lio_opcode != IOCB_CMD_PREAD)
            continue;
        int how = turn(KIND_READ, file_of((int)iocb->aio_fildes));
        if (how && events[i].res > 0)
            events[i].res = how == HOW_SHORT    ? events[i].res / 2
                            : how >= HOW_SHORT ? -EIO
                                               : -how;
    }
}

long syscall(long call, ...)
{
    static long (*real)(long, ...);
    long a[6], result;
    va_list args;
    va_start(args, call);
    aio_double_arguments(a, args);
    va_end(args);
    if (!real) {
        void *f = dlsym(RTLD_NEXT, "syscall");
        memcpy(&real, &f, sizeof real);
    }
    if ((call == SYS_io_submit || call == SYS_io_getevents) && watching()) {
        int error = call == SYS_io_submit ? submit_fails(a) : 0;
        if (error)
            return refuse(error);
        if (aio_double_call(call, a, pwritev, &result))
            return result;
    }
    result = real(call, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (call == SYS_io_getevents && result > 0 && watching())
        events_spoil((struct io_event *)(uintptr_t)a[3], result);
    return result;
}

/* ---- syncs ---- */

static int do_sync(int fd, long call)
{
    int file = file_of(fd), how = turn(KIND_SYNC, file);
    if (file < 0)
        return (int)syscall(call, fd);
    if (how && how != HOW_LATE && how != HOW_DROP)
        return refuse(how < HOW_SHORT ? how : EIO);
    pthread_mutex_lock(&lock);
    int rc = how == HOW_DROP ? 0 : (int)syscall(call, fd), why = errno;
    if (rc == 0 && keeps && file != FILE_FOLDER)
        kept_end(fd, how == HOW_DROP);
    pthread_mutex_unlock(&lock);
    errno = why;
    return how ? refuse(EIO) : rc;
}

int fsync(int fd)
{
    return do_sync(fd, SYS_fsync);
}

int fdatasync(int fd)
{
    return do_sync(fd, SYS_fdatasync);
}

int sync_file_range(int fd, off_t at, off_t len, unsigned flags)
{
    bool done;
    int error = fails_whole(KIND_SYNC_RANGE, file_of(fd), &done);
    int rc = done ? (int)syscall(SYS_sync_file_range, fd, at, len, flags) : 0;
    return error ? refuse(error) : rc;
}

/* ---- the rest ---- */

int fallocate(int fd, int mode, off_t at, off_t len)
{
    bool done;
    int error = fails_whole(mode & FALLOC_FL_PUNCH_HOLE ? KIND_PUNCH : KIND_ALLOCATE, file_of(fd),
                            &done);
    int rc = done ? (int)syscall(SYS_fallocate, fd, mode, at, len) : 0;
    return error ? refuse(error) : rc;
}

int fallocate64(int fd, int mode, off_t at, off_t len)
{
    return fallocate(fd, mode, at, len);
}

int posix_fallocate(int fd, off_t at, off_t len)
{
    return fallocate(fd, 0, at, len) == 0 ? 0 : errno;
}

int posix_fallocate64(int fd, off_t at, off_t len)
{
    return posix_fallocate(fd, at, len);
}

int ftruncate(int fd, off_t len)
{
    bool done;
    int error = fails_whole(KIND_TRUNCATE, file_of(fd), &done);
    int rc = done ? (int)syscall(SYS_ftruncate, fd, len) : 0;
    return error ? refuse(error) : rc;
}

int ftruncate64(int fd, off_t len)
{
    return ftruncate(fd, len);
}

void *mmap(void *address, size_t len, int protection, int flags, int fd, off_t at)
{
    bool done = true;
    int error = fd >= 0 ? fails_whole(KIND_MAP, file_of(fd), &done) : 0;
    if (error) {
        errno = error;
        return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, address, len, protection, flags, fd, at);
}

void *mmap64(void *address, size_t len, int protection, int flags, int fd, off_t at)
{
    return mmap(address, len, protection, flags, fd, at);
}

static int do_open(int at, const char *path, int flags, mode_t mode)
{
    bool done;
    int error = fails_whole(KIND_OPEN, file_named(at, path), &done);
    return error ? refuse(error) : (int)syscall(SYS_openat, at, path, flags, mode);
}

#define MODE_OF(flags)                                                                             \
    mode_t mode = 0;                                                                               \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) {                               \
        va_list args;                                                                              \
        va_start(args, flags);                                                                     \
        mode = va_arg(args, mode_t);                                                               \
        va_end(args);                                                                              \
    }

int open(const char *path, int flags, ...)
{
    MODE_OF(flags)
    return do_open(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE_OF(flags)
    return do_open(AT_FDCWD, path, flags, mode);
}

int openat(int at, const char *path, int flags, ...)
{
    MODE_OF(flags)
    return do_open(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...)
{
    MODE_OF(flags)
    return do_open(at, path, flags, mode);
}

static int do_rename(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
    bool done;
    int error = fails_whole(KIND_RENAME, file_named(from_at, from), &done);
    int rc = done ? (int)syscall(SYS_renameat2, from_at, from, to_at, to, flags) : 0;
    return error ? refuse(error) : rc;
}

int rename(const char *from, const char *to)
{
    return do_rename(AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
    return do_rename(from_at, from, to_at, to, 0);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
    return do_rename(from_at, from, to_at, to, flags);
}

int unlinkat(int at, const char *path, int flags)
{
    bool done;
    int error = fails_whole(KIND_UNLINK, file_named(at, path), &done);
    int rc = done ? (int)syscall(SYS_unlinkat, at, path, flags) : 0;
    return error ? refuse(error) : rc;
}

int unlink(const char *path)
{
    return unlinkat(AT_FDCWD, path, 0);
}

int rmdir(const char *path)
{
    return unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}

int mkdirat(int at, const char *path, mode_t mode)
{
    bool done;
    int error = fails_whole(KIND_MKDIR, file_named(at, path), &done);
    int rc = done ? (int)syscall(SYS_mkdirat, at, path, mode) : 0;
    return error ? refuse(error) : rc;
}

int mkdir(const char *path, mode_t mode)
{
    return mkdirat(AT_FDCWD, path, mode);
}

int flock(int fd, int operation)
{
    bool done;
    int error = operation & LOCK_UN ? 0 : fails_whole(KIND_LOCK, file_of(fd), &done);
    return error ? refuse(error) : (int)syscall(SYS_flock, fd, operation);
}

static int do_fcntl(int fd, int command, void *arg)
{
    bool done;
    bool locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK ||
                 command == F_OFD_SETLKW || command == F_GETLK || command == F_OFD_GETLK;
    int error = locks ? fails_whole(KIND_LOCK, file_of(fd), &done) : 0;
    return error ? refuse(error) : (int)syscall(SYS_fcntl, fd, command, arg);
}

int fcntl(int fd, int command, ...)
{
    va_list args;
    va_start(args, command);
    void *arg = va_arg(args, void *);
    va_end(args);
    return do_fcntl(fd, command, arg);
}

int fcntl64(int fd, int command, ...)
{
    va_list args;
    va_start(args, command);
    void *arg = va_arg(args, void *);
    va_end(args);
    return do_fcntl(fd, command, arg);
}
