/*
 * A double of asynchronous writes, for programs that have a double of pwritev: what io_submit is
 * given is written by that one, and only when io_getevents asks for its end. So what is written
 * this way is recorded, or fails, like any other write, and who does not wait for the end has not
 * written. Reads are left to the kernel.
 */
#ifndef TESTS_AIO_DOUBLE_H
#define TESTS_AIO_DOUBLE_H

#include <errno.h>
#include <linux/aio_abi.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#define AIO_DOUBLE_WRITES_MAX 1024u

/* What this thread submitted. Threads don't share contexts in the programs that are tested. */
static __thread struct {
    struct iocb *writes[AIO_DOUBLE_WRITES_MAX];
    size_t begin, end;
} aio_double;

/* The arguments of syscall() behind its number. */
static inline void aio_double_arguments(long a[6], va_list args)
{
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(args, long);
}

/* A call of syscall() with arguments `a`: false where it is none of a double's; else *result is
 * what it gives. */
static inline bool aio_double_call(long number, const long a[6],
                                   ssize_t (*write)(int fd, const struct iovec *iov, int n,
                                                    off_t at),
                                   long *result)
{
    if (number == SYS_io_submit) {
        struct iocb **iocbs = (struct iocb **)(uintptr_t)a[2];
        if (a[1] < 1 || iocbs[0]->aio_lio_opcode != IOCB_CMD_PWRITEV)
            return false;
        if (aio_double.begin == aio_double.end)
            aio_double.begin = aio_double.end = 0;
        *result = 0;
        while (*result < a[1] && aio_double.end < AIO_DOUBLE_WRITES_MAX)
            aio_double.writes[aio_double.end++] = iocbs[(*result)++];
        return true;
    }
    if (number != SYS_io_getevents || aio_double.begin == aio_double.end)
        return false;
    struct io_event *events = (struct io_event *)(uintptr_t)a[3];
    for (*result = 0; *result < a[2] && aio_double.begin < aio_double.end; ++*result) {
        const struct iocb *iocb = aio_double.writes[aio_double.begin++];
        ssize_t n = write((int)iocb->aio_fildes, (const struct iovec *)(uintptr_t)iocb->aio_buf,
                          (int)iocb->aio_nbytes, (off_t)iocb->aio_offset);
        events[*result] = (struct io_event){.data = iocb->aio_data,
                                            .obj = (uintptr_t)iocb,
                                            .res = n < 0 ? -errno : n};
    }
    return true;
}

#endif
