/*
 * A double for a slow disk: preloaded beneath the server, it makes every sync take
 * SLOW_SYNC_MS longer and every positioned write wait as if the disk took
 * SLOW_BYTES_PER_S. Only time is added; the calls themselves are the real ones.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static void pause_ns(long long ns)
{
    struct timespec t = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    nanosleep(&t, NULL);
}

static long long setting(const char *name)
{
    const char *text = getenv(name);
    return text ? atoll(text) : 0;
}

int fdatasync(int fd)
{
    static int (*real)(int);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "fdatasync");
    pause_ns(setting("SLOW_SYNC_MS") * 1000000);
    return real(fd);
}

/* Large writes only: those of a commit's payloads, not the log's records. */
ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t offset)
{
    static ssize_t (*real)(int, const struct iovec *, int, off_t);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pwritev");
    ssize_t done = real(fd, iov, n, offset);
    long long rate = setting("SLOW_BYTES_PER_S");
    if (rate && done > 0)
        pause_ns(done * 1000000000LL / rate);
    return done;
}

ssize_t pwritev64(int fd, const struct iovec *iov, int n, off_t offset)
    __attribute__((alias("pwritev")));
