/*
 * Reading bodies out of the data file: many at once, from one thread.
 *
 * Pieces that lie side by side are one run, read by one call. What is added is started
 * together, so that the disk has all of it in its queue and is told once. There are two ways:
 *
 * - Past the page cache (Linux AIO on a descriptor with O_DIRECT), where the store's user has
 *   most of the memory there is for a cache of its own: the page cache could hold only what is
 *   there already, at the price of a copy and of a page made and thrown away for each read.
 *   The thread is woken by the same eventfd that new reads wake it by.
 * - Through the page cache else, and for what AIO can't do: all runs that are not in it are
 *   asked for first, then waited for one after the other.
 *
 * (AIO rather than io_uring, which containers mostly forbid; where neither is to be had the
 * second way is taken. docs/benchmarks.md has what each of them gave.)
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/mem.h"
#include "store/lmdb/engine.h"

#define RUNS 256u
#define SEGMENTS 32u
#define EVENTS_AT_ONCE 64

/* A piece of a body on its way into memory. */
struct segment {
    uint8_t *to;
    uint32_t len, padded; /* the padding of the last unit is read over, into `to` or nowhere */
    struct store_get *get;
};

struct run {
    struct iocb iocb;
    struct run *next; /* free, or ready to be started */
    struct store_read *read;
    uint64_t offset, end;
    bool direct;
    unsigned n;
    struct segment segs[SEGMENTS];
    struct iovec iov[2 * SEGMENTS]; /* of as much as was asked for */
    unsigned n_iov;
    size_t bytes;
};

struct lm_bodies {
    int fd, direct_fd, wake_fd;
    aio_context_t aio;
    unsigned n_flying;
    struct run *free, *ready, **ready_last;
    struct run *open; /* the last one in `ready`; more may be added */
    uint8_t padding[SPACE_UNIT_BYTES];
    struct run runs[RUNS];
};

struct lm_bodies *lm_bodies_new(int fd, int direct_fd, int wake_fd)
{
    struct lm_bodies *b = mem_alloc(sizeof *b);
    b->fd = fd;
    b->direct_fd = direct_fd;
    b->wake_fd = wake_fd;
    b->aio = 0;
    b->n_flying = 0;
    b->free = b->ready = b->open = NULL;
    b->ready_last = &b->ready;
    for (unsigned i = RUNS; i-- > 0;) {
        b->runs[i].next = b->free;
        b->free = &b->runs[i];
    }
    if (direct_fd >= 0 && syscall(SYS_io_setup, RUNS, &b->aio) < 0)
        b->direct_fd = -1;
    return b;
}

void lm_bodies_free(struct lm_bodies *b)
{
    if (b->aio)
        syscall(SYS_io_destroy, b->aio);
    free(b);
}

/* ---- ends ---- */

static bool segment_read(int fd, const struct segment *seg, uint64_t offset)
{
    size_t done = 0;
    while (done < seg->len) {
        ssize_t n = pread(fd, seg->to + done, seg->len - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        done += (size_t)n;
    }
    return true;
}

static void run_end(struct lm_bodies *b, struct run *run, bool whole)
{
    uint64_t offset = run->offset;
    /* One by one, so that a bad sector fails only what lies on it. */
    for (unsigned i = 0; i < run->n && !whole; i++) {
        if (!segment_read(b->fd, &run->segs[i], offset))
            run->segs[i].get->st = ST_IO;
        offset += run->segs[i].padded;
    }
    struct store_read *read = run->read;
    run->next = b->free;
    b->free = run;
    lm_read_body_ended(read);
}

static void reap(struct lm_bodies *b, long at_least)
{
    static const struct timespec at_once;
    struct io_event events[EVENTS_AT_ONCE];
    while (b->n_flying > 0) {
        struct timespec none = at_once;
        long n = syscall(SYS_io_getevents, b->aio, at_least, (long)EVENTS_AT_ONCE, events,
                         at_least ? NULL : &none);
        if (n < 0 && errno == EINTR)
            continue;
        CHECK(n >= 0);
        b->n_flying -= (unsigned)n;
        for (long i = 0; i < n; i++) {
            struct run *run = (struct run *)(uintptr_t)events[i].data;
            run_end(b, run, events[i].res >= 0 && (size_t)events[i].res == run->bytes);
        }
        if (n < EVENTS_AT_ONCE)
            return;
        at_least = 0;
    }
}

void lm_bodies_reap(struct lm_bodies *b)
{
    reap(b, 0);
}

bool lm_bodies_flying(const struct lm_bodies *b)
{
    return b->n_flying > 0;
}

/* ---- beginnings ---- */

/* Hands them to the kernel; how many it took. */
static unsigned submit(struct lm_bodies *b, struct iocb **iocbs, unsigned n)
{
    unsigned taken = 0;
    while (taken < n) {
        long rc = syscall(SYS_io_submit, b->aio, (long)(n - taken), iocbs + taken);
        if (rc < 0 && errno == EINTR)
            continue;
        if (rc <= 0)
            break;
        taken += (unsigned)rc;
    }
    b->n_flying += taken;
    return taken;
}

static void start_direct(struct lm_bodies *b, struct run **runs, unsigned n)
{
    struct iocb *iocbs[RUNS];
    for (unsigned i = 0; i < n; i++) {
        struct run *run = runs[i];
        iocbs[i] = &run->iocb;
        run->iocb = (struct iocb){.aio_data = (uintptr_t)run,
                                  .aio_lio_opcode = IOCB_CMD_PREADV,
                                  .aio_fildes = (uint32_t)b->direct_fd,
                                  .aio_buf = (uintptr_t)run->iov,
                                  .aio_nbytes = run->n_iov,
                                  .aio_offset = (int64_t)run->offset,
                                  .aio_flags = IOCB_FLAG_RESFD,
                                  .aio_resfd = (uint32_t)b->wake_fd};
    }
    for (unsigned i = submit(b, iocbs, n); i < n; i++)
        run_end(b, runs[i], false);
}

static void read_buffered(struct lm_bodies *b, struct run **runs, unsigned n)
{
    struct run *absent[RUNS];
    unsigned n_absent = 0;
    for (unsigned i = 0; i < n; i++) {
        struct run *run = runs[i];
        if (n > 1 && preadv2(b->fd, run->iov, (int)run->n_iov, (off_t)run->offset, RWF_NOWAIT) ==
                         (ssize_t)run->bytes)
            run_end(b, run, true);
        else
            absent[n_absent++] = run;
    }
    for (unsigned i = 0; i < n_absent && n_absent > 1; i++)
        (void)posix_fadvise(b->fd, (off_t)absent[i]->offset, (off_t)absent[i]->bytes,
                            POSIX_FADV_WILLNEED);
    for (unsigned i = 0; i < n_absent; i++) {
        struct run *run = absent[i];
        run_end(b, run, preadv(b->fd, run->iov, (int)run->n_iov, (off_t)run->offset) ==
                            (ssize_t)run->bytes);
    }
}

void lm_bodies_start(struct lm_bodies *b)
{
    struct run *direct[RUNS], *buffered[RUNS];
    unsigned n_direct = 0, n_buffered = 0;
    for (struct run *run = b->ready; run; run = run->next) {
        if (run->direct)
            direct[n_direct++] = run;
        else
            buffered[n_buffered++] = run;
    }
    b->ready = b->open = NULL;
    b->ready_last = &b->ready;
    start_direct(b, direct, n_direct);
    read_buffered(b, buffered, n_buffered);
}

static struct run *run_new(struct lm_bodies *b, struct store_read *read, uint64_t offset,
                           bool direct)
{
    if (!b->free) {
        lm_bodies_start(b);
        while (!b->free)
            reap(b, 1);
    }
    struct run *run = b->free;
    b->free = run->next;
    run->next = NULL;
    run->read = read;
    run->offset = run->end = offset;
    run->direct = direct;
    run->n = 0;
    run->n_iov = 0;
    run->bytes = 0;
    *b->ready_last = run;
    b->ready_last = &run->next;
    b->open = run;
    read->bodies_pending++;
    return run;
}

static void run_add_iov(struct run *run, void *to, size_t len)
{
    run->iov[run->n_iov++] = (struct iovec){to, len};
    run->bytes += len;
}

static void segment_add(struct lm_bodies *b, struct store_read *read, uint64_t offset,
                        const struct segment *seg, bool direct)
{
    struct run *run = b->open;
    if (!run || run->read != read || run->end != offset || run->direct != direct ||
        run->n == SEGMENTS)
        run = run_new(b, read, offset, direct);
    /* Of the last segment the padding need not be there, nor be read. */
    if (!direct && run->n > 0) {
        const struct segment *before = &run->segs[run->n - 1];
        if (before->padded > before->len)
            run_add_iov(run, b->padding, before->padded - before->len);
    }
    run_add_iov(run, seg->to, direct ? seg->padded : seg->len);
    run->segs[run->n++] = *seg;
    run->end = offset + seg->padded;
}

void lm_bodies_add(struct lm_bodies *b, struct store_read *read, struct store_get *get,
                   const struct lm_value *v)
{
    uint32_t left = v->body_len, room = get->body_cap;
    uint8_t *to = get->body;
    for (uint32_t i = 0; i < v->n_pieces && left > 0; i++) {
        struct space_extent ext = space_unpack(get_le64(v->pieces + 8 * (size_t)i));
        uint32_t padded = (uint32_t)min_u64(ext.units, 256) * SPACE_UNIT_BYTES;
        uint32_t len = left < padded ? left : padded;
        /* Only whole units of the disk, into memory of that alignment. */
        bool direct = b->direct_fd >= 0 && padded <= room &&
                      ((uintptr_t)to & (SPACE_UNIT_BYTES - 1)) == 0;
        struct segment seg = {to, len, padded, get};
        segment_add(b, read, ext.start * SPACE_UNIT_BYTES, &seg, direct);
        to += len;
        room -= len;
        left -= len;
    }
    if (left > 0)
        get->st = ST_IO;
}
