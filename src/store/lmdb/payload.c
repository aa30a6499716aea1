/*
 * Bodies on their way into the data file.
 *
 * They go past the page cache where the file system takes that: nobody reads them
 * soon (blocks just written are in the cache of volumes), and copying them into
 * fresh pages is several times the work of everything else that is done to them.
 * Writes past the page cache wait for the disk, so bodies are gathered into batches
 * that writer threads of the store's own bring there, several at a time, while the
 * commit thread goes on with the index.
 *
 * Whole units are written. What does not begin and end on a unit's border in memory
 * is copied to where it does: the rest of a body behind its last whole unit, mostly.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define BATCH_UNITS 128u
#define WRITERS 4u
#define BATCHES (WRITERS + 2u)
#define PIECES_HERE_MAX 2u

/* Writeback is started behind what went to the page cache, so that the sync finds it under way. */
#define WRITE_BEHIND_BYTES (512u << 10)

/* Bytes that lie side by side in the file. */
struct piece {
    uint64_t offset;
    uint32_t bytes, n_iov;
};

struct batch {
    struct list link;
    struct lm_payload *payload;
    uint32_t units, n_pieces, n_iov, n_copied;
    struct piece pieces[BATCH_UNITS];
    struct iovec iov[BATCH_UNITS];
    uint8_t *copies; /* BATCH_UNITS units, made when first needed */
};

struct lm_payload {
    struct lm *lm;
    int direct_fd; /* -1: everything goes through the page cache */
    struct batch *filling;
    bool wrote;

    pthread_mutex_t lock;
    pthread_cond_t work_cond, done_cond;
    struct list queue, unused;
    unsigned n_running;
    enum status result; /* the first failure since the last wait */
    bool stopping;
    _Atomic bool direct_refused;

    unsigned n_threads;
    bool no_threads;
    pthread_t threads[WRITERS];
    struct batch batches[BATCHES];
};

static bool goes_direct(struct lm_payload *p)
{
    return p->direct_fd >= 0 && !atomic_load(&p->direct_refused);
}

/* What a write past the page cache gave: `n` bytes, or less than none, with `error`. */
static enum status piece_written(struct lm_payload *p, struct iovec *iov, const struct piece *piece,
                                 ssize_t n, int error)
{
    struct lm *lm = p->lm;
    if (n == (ssize_t)piece->bytes)
        return ST_OK;
    if (n < 0 && error != EINVAL)
        return error == ENOSPC || error == EDQUOT ? ST_NOSPC : ST_IO;
    /* A short one is written again: what remains may not begin on a border. */
    if (n < 0)
        atomic_store(&p->direct_refused, true);
    enum status st = lm_write_all(lm->blocks_fd, iov, (int)piece->n_iov, piece->offset);
    if (!st && piece->bytes >= WRITE_BEHIND_BYTES)
        (void)sync_file_range(lm->blocks_fd, (off_t)piece->offset, piece->bytes,
                              SYNC_FILE_RANGE_WRITE);
    return st;
}

static enum status piece_write(struct lm_payload *p, struct iovec *iov, const struct piece *piece)
{
    ssize_t n = -1;
    int error = EINVAL;
    if (goes_direct(p)) {
        do
            n = pwritev(p->direct_fd, iov, (int)piece->n_iov, (off_t)piece->offset);
        while (n < 0 && errno == EINTR);
        error = errno;
    }
    return piece_written(p, iov, piece, n, error);
}

/* Has all pieces of a batch under way at once. */
static enum status batch_write_at_once(struct batch *b, aio_context_t aio)
{
    struct lm_payload *p = b->payload;
    struct iocb iocbs[BATCH_UNITS], *list[BATCH_UNITS];
    struct iovec *iovs[BATCH_UNITS], *iov = b->iov;
    for (uint32_t i = 0; i < b->n_pieces; i++) {
        const struct piece *piece = &b->pieces[i];
        list[i] = &iocbs[i];
        iovs[i] = iov;
        iocbs[i] = (struct iocb){.aio_data = i,
                                 .aio_lio_opcode = IOCB_CMD_PWRITEV,
                                 .aio_fildes = (uint32_t)p->direct_fd,
                                 .aio_buf = (uintptr_t)iov,
                                 .aio_nbytes = piece->n_iov,
                                 .aio_offset = (int64_t)piece->offset};
        iov += piece->n_iov;
    }
    uint32_t n_taken = 0;
    while (n_taken < b->n_pieces) {
        long rc = syscall(SYS_io_submit, aio, (long)(b->n_pieces - n_taken), list + n_taken);
        if (rc < 0 && errno == EINTR)
            continue;
        if (rc <= 0)
            break;
        n_taken += (uint32_t)rc;
    }
    enum status st = ST_OK;
    for (uint32_t n_ended = 0; n_ended < n_taken;) {
        struct io_event events[BATCH_UNITS];
        long n = syscall(SYS_io_getevents, aio, 1L, (long)(n_taken - n_ended), events, NULL);
        if (n < 0 && errno == EINTR)
            continue;
        CHECK(n > 0);
        for (long e = 0; e < n; e++) {
            uint32_t i = (uint32_t)events[e].data;
            ssize_t res = (ssize_t)events[e].res;
            enum status of = piece_written(p, iovs[i], &b->pieces[i], res < 0 ? -1 : res,
                                           res < 0 ? (int)-res : 0);
            st = st ? st : of;
        }
        n_ended += (uint32_t)n;
    }
    for (uint32_t i = n_taken; i < b->n_pieces && !st; i++)
        st = piece_write(p, iovs[i], &b->pieces[i]);
    return st;
}

/* `aio`: of the calling thread; 0 where there is none. */
static enum status batch_write(struct batch *b, aio_context_t aio)
{
    if (aio && b->n_pieces > 1 && goes_direct(b->payload))
        return batch_write_at_once(b, aio);
    enum status st = ST_OK;
    struct iovec *iov = b->iov;
    for (uint32_t i = 0; i < b->n_pieces && !st; i++) {
        st = piece_write(b->payload, iov, &b->pieces[i]);
        iov += b->pieces[i].n_iov;
    }
    return st;
}

/* With the lock held. */
static void batch_done(struct lm_payload *p, struct batch *b, enum status st)
{
    if (!p->result)
        p->result = st;
    list_add_tail(&p->unused, &b->link);
    p->n_running--;
    pthread_cond_signal(&p->done_cond);
}

static void *writer_thread(void *arg)
{
    struct lm_payload *p = arg;
    aio_context_t aio = 0;
    if (p->direct_fd >= 0)
        (void)syscall(SYS_io_setup, BATCH_UNITS, &aio);
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (list_empty(&p->queue) && !p->stopping)
            pthread_cond_wait(&p->work_cond, &p->lock);
        struct list *l = list_pop(&p->queue);
        if (!l)
            break;
        struct batch *b = container_of(l, struct batch, link);
        pthread_mutex_unlock(&p->lock);
        enum status st = batch_write(b, aio);
        pthread_mutex_lock(&p->lock);
        batch_done(p, b, st);
    }
    pthread_mutex_unlock(&p->lock);
    if (aio)
        syscall(SYS_io_destroy, aio);
    return NULL;
}

/* Threads are started by the first commit that has more than one batch. */
static bool threads_start(struct lm_payload *p)
{
    while (p->n_threads < WRITERS && !p->no_threads) {
        if (pthread_create(&p->threads[p->n_threads], NULL, writer_thread, p))
            p->no_threads = true;
        else
            p->n_threads++;
    }
    return p->n_threads > 0;
}

/* Hands the batch that is being filled to a writer, or writes it here: the last one, which has
 * to be waited for anyway. */
static void batch_send(struct lm_payload *p, bool here)
{
    struct batch *b = p->filling;
    p->filling = NULL;
    /* One that has many pieces is quicker there, all at once. */
    here = (here && b->n_pieces <= PIECES_HERE_MAX) || !threads_start(p);
    enum status st = here ? batch_write(b, 0) : ST_OK;
    pthread_mutex_lock(&p->lock);
    p->n_running++;
    if (here) {
        batch_done(p, b, st);
    } else {
        list_add_tail(&p->queue, &b->link);
        pthread_cond_signal(&p->work_cond);
    }
    pthread_mutex_unlock(&p->lock);
    lm_lock_progress(p->lm);
}

static struct batch *batch_take(struct lm_payload *p)
{
    pthread_mutex_lock(&p->lock);
    while (list_empty(&p->unused))
        pthread_cond_wait(&p->done_cond, &p->lock);
    struct batch *b = container_of(list_pop(&p->unused), struct batch, link);
    pthread_mutex_unlock(&p->lock);
    b->units = b->n_pieces = b->n_iov = b->n_copied = 0;
    return b;
}

static uint8_t *copy_unit(struct batch *b, const uint8_t *data, size_t len)
{
    if (!b->copies)
        b->copies = mem_alloc_aligned(SPACE_UNIT_BYTES, BATCH_UNITS * SPACE_UNIT_BYTES);
    uint8_t *to = b->copies + (size_t)b->n_copied++ * SPACE_UNIT_BYTES;
    memcpy(to, data, len);
    memset(to + len, 0, SPACE_UNIT_BYTES - len);
    return to;
}

static void iov_add(struct batch *b, uint8_t *data, uint32_t bytes, uint64_t offset)
{
    struct piece *piece = b->n_pieces ? &b->pieces[b->n_pieces - 1] : NULL;
    if (!piece || piece->offset + piece->bytes != offset) {
        piece = &b->pieces[b->n_pieces++];
        *piece = (struct piece){.offset = offset};
    }
    struct iovec *last = piece->n_iov ? &b->iov[b->n_iov - 1] : NULL;
    if (last && (uint8_t *)last->iov_base + last->iov_len == data) {
        last->iov_len += bytes;
    } else {
        b->iov[b->n_iov++] = (struct iovec){data, bytes};
        piece->n_iov++;
    }
    piece->bytes += bytes;
    b->units += bytes / SPACE_UNIT_BYTES;
}

void lm_payload_add(struct lm_payload *p, uint64_t offset, const void *data, size_t len)
{
    CHECK(offset % SPACE_UNIT_BYTES == 0);
    uint8_t *from = (uint8_t *)(uintptr_t)data;
    bool in_place = (uintptr_t)from % SPACE_UNIT_BYTES == 0;
    p->wrote |= len > 0;
    while (len > 0) {
        if (!p->filling)
            p->filling = batch_take(p);
        struct batch *b = p->filling;
        size_t bytes = min_u64(len, (BATCH_UNITS - b->units) * SPACE_UNIT_BYTES);
        if (in_place && bytes >= SPACE_UNIT_BYTES) {
            bytes -= bytes % SPACE_UNIT_BYTES;
            iov_add(b, from, (uint32_t)bytes, offset);
        } else {
            bytes = min_u64(bytes, SPACE_UNIT_BYTES);
            iov_add(b, copy_unit(b, from, bytes), SPACE_UNIT_BYTES, offset);
        }
        from += bytes;
        len -= bytes;
        offset += bytes;
        if (b->units == BATCH_UNITS)
            batch_send(p, false);
    }
}

/* Waits for all that was sent. */
static enum status drain(struct lm_payload *p)
{
    pthread_mutex_lock(&p->lock);
    while (p->n_running > 0) {
        pthread_cond_wait(&p->done_cond, &p->lock);
        lm_lock_progress(p->lm);
    }
    enum status st = p->result;
    p->result = ST_OK;
    pthread_mutex_unlock(&p->lock);
    p->wrote = false;
    return st;
}

enum status lm_payload_finish(struct lm_payload *p, bool *wrote)
{
    *wrote = p->wrote;
    if (p->filling)
        batch_send(p, true);
    return drain(p);
}

void lm_payload_cancel(struct lm_payload *p)
{
    if (p->filling)
        list_add_tail(&p->unused, &p->filling->link);
    p->filling = NULL;
    (void)drain(p);
}

struct lm_payload *lm_payload_new(struct lm *lm)
{
    struct lm_payload *p = mem_zalloc(sizeof *p);
    p->lm = lm;
    p->direct_fd = openat(lm->dir_fd, "blocks", O_WRONLY | O_DIRECT | O_CLOEXEC);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work_cond, NULL);
    pthread_cond_init(&p->done_cond, NULL);
    list_init(&p->queue);
    list_init(&p->unused);
    for (unsigned i = 0; i < BATCHES; i++) {
        p->batches[i].payload = p;
        list_add_tail(&p->unused, &p->batches[i].link);
    }
    return p;
}

void lm_payload_free(struct lm_payload *p)
{
    pthread_mutex_lock(&p->lock);
    p->stopping = true;
    pthread_cond_broadcast(&p->work_cond);
    pthread_mutex_unlock(&p->lock);
    for (unsigned i = 0; i < p->n_threads; i++)
        pthread_join(p->threads[i], NULL);
    for (unsigned i = 0; i < BATCHES; i++)
        free(p->batches[i].copies);
    if (p->direct_fd >= 0)
        close(p->direct_fd);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->work_cond);
    pthread_cond_destroy(&p->done_cond);
    free(p);
}
