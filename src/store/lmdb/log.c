/*
 * The write log of a reactor: a ring in a file that was written through when it
 * was made, so that a sync writes data and nothing else.
 *
 * A record is its header and payload, and begins at a multiple of 8 bytes; one
 * that meets the end of the ring goes on at its front. Positions are counted from
 * the first byte ever appended, the place in the file is that modulo the
 * capacity. What was appended is written by one pwritev in the submitting thread:
 * it goes to the page cache and does not wait for a disk. Syncs are done by a
 * thread of the log's own, one at a time, for all that wait.
 *
 * Behind the last record stands a mark, over which the next one is written. It says up to
 * where a sync has succeeded, which the last records can't say of themselves: without it
 * nothing would tell damage in them from a write that a power cut came before. It goes out
 * with the records, and again when a sync has ended, before that is answered. It is itself
 * not synced until the next time: it is there after the death of the process, and after that
 * of the machine if the disk got it in time.
 *
 * LMDB holds where the records that are still needed begin. It moves inside the
 * commits that make records unneeded, so the two can't disagree.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define LOG_BYTES_MIN (4ull << 20)
#define LOG_BYTES_MAX (4ull << 30)
#define PAGE_BYTES 4096u
#define FILL_BYTES (1u << 20)
#define IOVS_PER_CALL 1024
#define GATHER_IOVS 4096
#define GATHER_RECORDS 512
#define RECORD_IOVS_MAX 1100
#define MARKS 4096u
#define START_BYTES 48u

static const char header_magic[8] = {'f', 'n', 'b', 'd', 'l', 'o', 'g', '1'};
static const uint8_t zeros[PAGE_BYTES];

/* Where a record begins; one is kept for about every 4096th part of the ring. */
struct mark {
    uint64_t seq, offset;
};

/* The zeros that fill the record before up to a multiple of 8 go out with a header. */
struct gathered_header {
    uint8_t fill[8];
    uint8_t bytes[LM_LOG_RECORD_BYTES];
};

struct lm_log {
    struct store_log base;
    struct lm *lm;
    struct env *env;
    int fd;
    uint64_t id, capacity;
    uint8_t session[STORE_ID_BYTES];

    uint64_t next_seq;
    uint64_t end;         /* of the last record appended, without the fill behind it */
    uint64_t written_end; /* of the last one written */
    struct mark keep;     /* the first that is needed, as of the last commit answered */
    struct mark *marks;   /* a ring of MARKS + 1, from marks_first */
    uint32_t marks_first, n_marks;

    struct iovec *iov;
    int n_iov;
    struct gathered_header *headers;
    int n_headers;
    struct gathered_header mark;
    uint64_t marked_seq; /* the mark in the file, or a record, says that those below are synced */

    _Atomic bool poisoned;
    _Atomic uint64_t written_seq; /* records below were written */
    _Atomic uint64_t synced_seq;  /* records below survive the machine */

    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    struct list waiting; /* struct store_log_sync */
    bool stopping;
};

static struct lm_log *log_of(struct store_log *log)
{
    return (struct lm_log *)(void *)log;
}

static const struct lm_log *log_of_const(const struct store_log *log)
{
    return (const struct lm_log *)(const void *)log;
}

/* ---- the start of what is needed, in LMDB ---- */

static enum status start_parse(const MDB_val *v, uint64_t id, struct lm_log_start *start)
{
    uint8_t rec[START_BYTES];
    if (v->mv_size != sizeof rec)
        return ST_IO;
    memcpy(rec, v->mv_data, sizeof rec);
    if (get_le64(rec) != hash64(rec + 8, sizeof rec - 8, id))
        return ST_IO;
    memcpy(start->session, rec + 8, STORE_ID_BYTES);
    start->capacity = get_le64(rec + 24);
    start->offset = get_le64(rec + 32);
    start->seq = get_le64(rec + 40);
    return ST_OK;
}

enum status lm_log_start_get(struct lm_tree *tree, uint64_t id, struct lm_log_start *start)
{
    uint8_t key[8];
    put_be64(key, id);
    MDB_val v;
    enum status st = lm_tree_get(tree, LM_DB_LOGS, (struct slice){key, sizeof key}, &v);
    return st ? st : start_parse(&v, id, start);
}

/* As the write transaction at hand sees it. */
static enum status start_get_now(struct lm *lm, MDB_txn *txn, uint64_t id,
                                 struct lm_log_start *start)
{
    uint8_t key[8];
    put_be64(key, id);
    MDB_val k = {sizeof key, key}, v;
    enum status st = lm_guard_key(lm->guard, LM_DB_LOGS, (struct slice){key, sizeof key}, 0);
    if (st)
        return st;
    int rc = mdb_get(txn, lm->logs_dbi, &k, &v);
    return rc ? lm_status(rc) : start_parse(&v, id, start);
}

enum status lm_log_start_remove(struct lm *lm, MDB_txn *txn, uint64_t id)
{
    uint8_t key[8];
    put_be64(key, id);
    MDB_val k = {sizeof key, key};
    enum status st = lm_guard_around(lm->guard, LM_DB_LOGS, (struct slice){key, sizeof key});
    if (st)
        return st;
    int rc = mdb_del(txn, lm->logs_dbi, &k, NULL);
    return rc == MDB_NOTFOUND ? ST_OK : lm_status(rc);
}

enum status lm_log_start_put(struct lm *lm, MDB_txn *txn, uint64_t id,
                             const struct lm_log_start *start)
{
    uint8_t key[8], rec[START_BYTES];
    put_be64(key, id);
    memcpy(rec + 8, start->session, STORE_ID_BYTES);
    put_le64(rec + 24, start->capacity);
    put_le64(rec + 32, start->offset);
    put_le64(rec + 40, start->seq);
    put_le64(rec, hash64(rec + 8, sizeof rec - 8, id));
    MDB_val k = {sizeof key, key}, v = {sizeof rec, rec};
    enum status st = lm_guard_key(lm->guard, LM_DB_LOGS, (struct slice){key, sizeof key}, 0);
    return st ? st : lm_status(mdb_put(txn, lm->logs_dbi, &k, &v, 0));
}

/* ---- the file's header ---- */

void lm_log_header_build(uint8_t block[LM_LOG_HEADER_BYTES], uint64_t id,
                         const uint8_t session[STORE_ID_BYTES], uint64_t capacity)
{
    memset(block, 0, LM_LOG_HEADER_BYTES);
    memcpy(block, header_magic, sizeof header_magic);
    put_le64(block + 8, id);
    memcpy(block + 16, session, STORE_ID_BYTES);
    put_le64(block + 32, capacity);
    put_le32(block + 40, 1);
    put_le64(block + 48, hash64(block, 48, 0));
}

enum status lm_log_header_read(int fd, uint64_t *id, uint8_t session[STORE_ID_BYTES],
                               uint64_t *capacity)
{
    uint8_t block[64];
    if (pread(fd, block, sizeof block, 0) != (ssize_t)sizeof block)
        return ST_IO;
    if (memcmp(block, header_magic, sizeof header_magic) != 0 || get_le32(block + 40) != 1 ||
        get_le64(block + 48) != hash64(block, 48, 0))
        return ST_IO;
    *id = get_le64(block + 8);
    memcpy(session, block + 16, STORE_ID_BYTES);
    *capacity = get_le64(block + 32);
    return ST_OK;
}

uint64_t lm_log_header_hash(const uint8_t header[LM_LOG_RECORD_BYTES], uint64_t log_id)
{
    return hash64(header, LM_LOG_RECORD_BYTES - 8, log_id);
}

static void record_header_build(uint8_t header[LM_LOG_RECORD_BYTES], uint64_t log_id, uint64_t seq,
                                uint64_t stream, const uint8_t meta[32], uint32_t payload_len,
                                uint64_t hash, uint64_t synced_seq)
{
    put_le32(header, LM_LOG_RECORD_MAGIC);
    put_le32(header + 4, payload_len);
    put_le64(header + 8, seq);
    put_le64(header + 16, stream);
    memcpy(header + 24, meta, 32);
    put_le64(header + 56, hash);
    put_le64(header + 64, synced_seq);
    put_le64(header + 72, lm_log_header_hash(header, log_id));
}

void lm_log_mark_build(uint8_t header[LM_LOG_RECORD_BYTES], uint64_t log_id, uint64_t seq,
                       uint64_t synced_seq)
{
    record_header_build(header, log_id, seq, LM_LOG_MARK_STREAM, zeros, 0, hash64(zeros, 0, 0),
                        synced_seq);
}

/* ---- appending ---- */

static uint64_t aligned(uint64_t offset)
{
    return round_up_u64(offset, 8);
}

static uint64_t log_room(const struct store_log *base)
{
    const struct lm_log *log = log_of_const(base);
    return log->capacity - (aligned(log->end) - log->keep.offset);
}

/* Writes `left` pieces from position `log->written_end` on. Changes `iov`. */
static enum status write_pieces(struct lm_log *log, struct iovec *iov, int left)
{
    uint64_t offset = log->written_end;
    while (left > 0) {
        uint64_t place = offset % log->capacity, room = log->capacity - place, bytes = 0;
        struct iovec rest = {NULL, 0};
        int n = 0;
        while (n < left && n < IOVS_PER_CALL && bytes < room) {
            if (iov[n].iov_len > room - bytes) {
                size_t part = room - bytes;
                rest = (struct iovec){(char *)iov[n].iov_base + part, iov[n].iov_len - part};
                iov[n].iov_len = part;
            }
            bytes += iov[n].iov_len;
            n++;
        }
        enum status st = lm_write_all(log->fd, iov, n, LM_LOG_HEADER_BYTES + place);
        if (st)
            return st;
        offset += bytes;
        if (rest.iov_len) {
            n--;
            iov[n] = rest;
        }
        iov += n;
        left -= n;
    }
    return ST_OK;
}

static void log_poison(struct lm_log *log)
{
    atomic_store(&log->poisoned, true);
    log_error("store %s: cannot write the write log: %s; it takes no more", log->lm->dir,
              strerror(errno));
}

/* Whether bytes up to position `end` lie over no record that is still needed. */
static bool fits_up_to(const struct lm_log *log, uint64_t end)
{
    return end <= log->keep.offset + log->capacity;
}

/* The mark for the place where record `seq` will be. */
static void mark_build(struct lm_log *log, uint64_t seq)
{
    log->marked_seq = atomic_load(&log->synced_seq);
    lm_log_mark_build(log->mark.bytes, log->id, seq, log->marked_seq);
}

static enum status write_gathered(struct lm_log *log)
{
    if (log->n_headers == 0)
        return ST_OK;
    /* A mark, and zeros up to the end of the page, so that the kernel does not have to read a page
     * that it forgot since the last time round. */
    uint64_t at = aligned(log->end), end = at + LM_LOG_RECORD_BYTES;
    uint64_t fill = round_up_u64(end, PAGE_BYTES) - end;
    if (fits_up_to(log, end)) {
        size_t gap = at - log->end;
        mark_build(log, log->next_seq);
        log->iov[log->n_iov++] =
            (struct iovec){log->mark.bytes - gap, LM_LOG_RECORD_BYTES + gap};
        if (fill > 0 && fits_up_to(log, end + fill))
            log->iov[log->n_iov++] = (struct iovec){(void *)(uintptr_t)zeros, fill};
    }
    enum status st = write_pieces(log, log->iov, log->n_iov);
    log->n_iov = 0;
    log->n_headers = 0;
    if (st) {
        log_poison(log);
        return ST_IO;
    }
    log->written_end = aligned(log->end);
    atomic_store(&log->written_seq, log->next_seq);
    return ST_OK;
}

static void mark_add(struct lm_log *log, uint64_t seq, uint64_t offset)
{
    uint64_t last = log->keep.offset;
    if (log->n_marks > 0)
        last = log->marks[(log->marks_first + log->n_marks - 1) % (MARKS + 1)].offset;
    if (offset - last < log->capacity / MARKS || log->n_marks == MARKS)
        return;
    log->marks[(log->marks_first + log->n_marks++) % (MARKS + 1)] = (struct mark){seq, offset};
}

static uint64_t payload_hash(const struct iovec *iov, int n_iov)
{
    if (n_iov == 1)
        return hash64(iov[0].iov_base, iov[0].iov_len, 0);
    XXH3_state_t state;
    XXH3_64bits_reset(&state);
    for (int i = 0; i < n_iov; i++)
        XXH3_64bits_update(&state, iov[i].iov_base, iov[i].iov_len);
    return XXH3_64bits_digest(&state);
}

static uint64_t log_append(struct store_log *base, uint64_t stream, const uint8_t meta[32],
                           const struct iovec *iov, int n_iov, uint32_t payload_len)
{
    struct lm_log *log = log_of(base);
    CHECK(n_iov >= 0 && n_iov <= RECORD_IOVS_MAX && payload_len <= STORE_LOG_PAYLOAD_MAX);
    CHECK(store_log_record_bytes(payload_len) <= log_room(base) && stream != LM_LOG_MARK_STREAM);
    if (log->n_headers == GATHER_RECORDS || log->n_iov + n_iov + 2 > GATHER_IOVS)
        (void)write_gathered(log); /* a failure poisons the log, which submit reports */

    uint64_t seq = log->next_seq++, at = aligned(log->end);
    struct gathered_header *h = &log->headers[log->n_headers];
    record_header_build(h->bytes, log->id, seq, stream, meta, payload_len,
                        payload_hash(iov, n_iov),
                        atomic_load_explicit(&log->synced_seq, memory_order_relaxed));
    size_t gap = log->n_headers > 0 ? at - log->end : 0;
    log->n_headers++;
    log->iov[log->n_iov++] = (struct iovec){h->bytes - gap, LM_LOG_RECORD_BYTES + gap};
    size_t sum = 0;
    for (int i = 0; i < n_iov; i++) {
        sum += iov[i].iov_len;
        if (iov[i].iov_len)
            log->iov[log->n_iov++] = iov[i];
    }
    CHECK(sum == payload_len);
    mark_add(log, seq, at);
    log->end = at + LM_LOG_RECORD_BYTES + payload_len;
    return seq;
}

static enum status log_submit(struct store_log *base)
{
    struct lm_log *log = log_of(base);
    if (atomic_load_explicit(&log->poisoned, memory_order_relaxed)) {
        log->n_iov = log->n_headers = 0;
        return ST_IO;
    }
    return write_gathered(log);
}

/* ---- syncs ---- */

/* Says in the file what has been synced by now, where nothing there says so. Records that are
 * gathered will be written over it, with a mark of their own behind them. */
static void mark_renew(struct lm_log *log)
{
    if (log->marked_seq >= atomic_load(&log->synced_seq) || atomic_load(&log->poisoned) ||
        !fits_up_to(log, log->written_end + LM_LOG_RECORD_BYTES))
        return;
    mark_build(log, atomic_load(&log->written_seq));
    struct iovec iov[2] = {{log->mark.bytes, LM_LOG_RECORD_BYTES}};
    if (write_pieces(log, iov, 1))
        log_poison(log);
}

static void sync_answer(struct env_task *task)
{
    struct store_log_sync *sync = container_of(task, struct store_log_sync, task);
    if (sync->result == ST_OK)
        mark_renew(log_of(sync->log));
    sync->done(sync, sync->result);
}

static void sync_post(struct lm_log *log, struct store_log_sync *sync, enum status st)
{
    sync->result = st;
    sync->task.run = sync_answer;
    env_post(log->env, &sync->task);
}

static void *sync_thread(void *arg)
{
    struct lm_log *log = arg;
    for (;;) {
        struct list batch = LIST_INIT(batch);
        pthread_mutex_lock(&log->lock);
        while (list_empty(&log->waiting) && !log->stopping)
            pthread_cond_wait(&log->cond, &log->lock);
        list_splice_tail(&batch, &log->waiting);
        pthread_mutex_unlock(&log->lock);
        if (list_empty(&batch))
            return NULL;
        uint64_t seq = atomic_load(&log->written_seq);
        enum status st = ST_IO;
        if (!atomic_load(&log->poisoned)) {
            if (fdatasync(log->fd) == 0) {
                st = ST_OK;
                atomic_store(&log->synced_seq, seq);
            } else {
                atomic_store(&log->poisoned, true);
                log_error("store %s: cannot sync the write log: %s; it takes no more", log->lm->dir,
                          strerror(errno));
            }
        }
        struct list *pos;
        while ((pos = list_pop(&batch)))
            sync_post(log, container_of(pos, struct store_log_sync, link), st);
    }
}

static void log_sync(struct store_log *base, struct store_log_sync *sync)
{
    struct lm_log *log = log_of(base);
    sync->log = base;
    if (!atomic_load(&log->poisoned) &&
        atomic_load(&log->synced_seq) >= atomic_load(&log->written_seq)) {
        sync_post(log, sync, ST_OK);
        return;
    }
    pthread_mutex_lock(&log->lock);
    list_add_tail(&log->waiting, &sync->link);
    pthread_cond_signal(&log->cond);
    pthread_mutex_unlock(&log->lock);
}

/* ---- room ---- */

void lm_log_commit_begin(struct store_commit *commit)
{
    struct lm_log *log = log_of(commit->log);
    struct mark found = log->keep;
    if (commit->log_keep_from >= log->next_seq) {
        found = (struct mark){log->next_seq, aligned(log->end)};
    } else {
        for (uint32_t i = 0; i < log->n_marks; i++) {
            struct mark m = log->marks[(log->marks_first + i) % (MARKS + 1)];
            if (m.seq > commit->log_keep_from)
                break;
            found = m;
        }
    }
    commit->log_start[0] = found.offset;
    commit->log_start[1] = found.seq;
}

enum status lm_log_commit_apply(struct lm *lm, MDB_txn *txn, const struct store_commit *commit)
{
    struct lm_log_start start;
    uint64_t id = log_of(commit->log)->id;
    enum status st = start_get_now(lm, txn, id, &start);
    if (st) {
        log_error("store %s: the record of write log %016" PRIx64 " is %s", lm->dir, id,
                  st == ST_NOTFOUND ? "gone" : "damaged");
        return ST_IO;
    }
    if (commit->log_start[0] <= start.offset)
        return ST_OK;
    start.offset = commit->log_start[0];
    start.seq = commit->log_start[1];
    return lm_log_start_put(lm, txn, id, &start);
}

void lm_log_commit_answered(struct store_commit *commit)
{
    struct lm_log *log = log_of(commit->log);
    if (commit->log_start[0] <= log->keep.offset)
        return;
    log->keep = (struct mark){commit->log_start[1], commit->log_start[0]};
    while (log->n_marks > 0 && log->marks[log->marks_first].offset <= log->keep.offset) {
        log->marks_first = (log->marks_first + 1) % (MARKS + 1);
        log->n_marks--;
    }
}

/* ---- making and ending ---- */

/* Fills a new file, so that later writes and syncs move no metadata. */
static enum status fill_through(int fd, uint64_t bytes)
{
    if (fallocate(fd, 0, 0, (off_t)bytes) < 0 && errno != EOPNOTSUPP)
        return errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? ST_NOSPC : ST_IO;
    uint8_t *block = mem_zalloc(FILL_BYTES);
    enum status st = ST_OK;
    for (uint64_t at = 0; at < bytes && !st; at += FILL_BYTES) {
        struct iovec iov = {block, min_u64(FILL_BYTES, bytes - at)};
        st = lm_write_all(fd, &iov, 1, at);
    }
    free(block);
    return st;
}

/* Takes the spare file if it has the right size. Returns a descriptor or -1. */
static int spare_take(struct lm *lm, const char *name, uint64_t bytes)
{
    if (renameat(lm->log_fd, "spare", lm->log_fd, name) < 0)
        return -1;
    int fd = openat(lm->log_fd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    struct stat sb;
    if (fd >= 0 && fstat(fd, &sb) == 0 && (uint64_t)sb.st_size == bytes)
        return fd;
    if (fd >= 0)
        close(fd);
    unlinkat(lm->log_fd, name, 0);
    return -1;
}

/* Makes the log's file, complete and durable, under its name. */
static enum status file_make(struct lm_log *log)
{
    struct lm *lm = log->lm;
    char session[LM_ID_TEXT_BYTES], fresh[80], name[24];
    lm_id_text(log->session, session);
    snprintf(name, sizeof name, "%016" PRIx64, log->id);
    snprintf(fresh, sizeof fresh, ".new-%s-%s", session, name);
    uint64_t bytes = LM_LOG_HEADER_BYTES + log->capacity;
    enum status st = ST_OK;
    log->fd = spare_take(lm, fresh, bytes);
    if (log->fd < 0) {
        log->fd = openat(lm->log_fd, fresh, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (log->fd < 0)
            return errno == ENOSPC ? ST_NOSPC : ST_UNAVAIL;
        lm_file_adopt(lm, log->fd);
        lm_file_in_place(log->fd);
        st = fill_through(log->fd, bytes);
    }
    uint8_t block[LM_LOG_HEADER_BYTES];
    lm_log_header_build(block, log->id, log->session, log->capacity);
    struct iovec iov = {block, sizeof block};
    if (!st)
        st = lm_write_all(log->fd, &iov, 1, 0);
    if (!st && fsync(log->fd) < 0)
        st = errno == ENOSPC ? ST_NOSPC : ST_IO;
    if (!st && (renameat(lm->log_fd, fresh, lm->log_fd, name) < 0 || fsync(lm->log_fd) < 0))
        st = ST_UNAVAIL;
    if (st) {
        int why = errno;
        unlinkat(lm->log_fd, fresh, 0);
        errno = why;
    }
    return st;
}

struct record_job {
    struct lm_job job;
    struct lm *lm;
    const struct lm_log *log;
    bool remove;
};

static enum status record_run(struct lm_job *job, MDB_txn *txn)
{
    struct record_job *rj = container_of(job, struct record_job, job);
    const struct lm_log *log = rj->log;
    if (rj->remove)
        return lm_log_start_remove(rj->lm, txn, log->id);
    struct lm_log_start start = {.capacity = log->capacity, .offset = 0, .seq = 1};
    memcpy(start.session, log->session, STORE_ID_BYTES);
    return lm_log_start_put(rj->lm, txn, log->id, &start);
}

static void log_free(struct lm_log *log)
{
    if (log->fd >= 0)
        close(log->fd);
    free(log->marks);
    free(log->iov);
    free(log->headers);
    pthread_mutex_destroy(&log->lock);
    pthread_cond_destroy(&log->cond);
    free(log);
}

static struct lm_log *log_new(struct lm *lm, struct env *env, const uint8_t *session,
                              uint64_t bytes)
{
    struct lm_log *log = mem_zalloc(sizeof *log);
    log->base.store = &lm->base;
    log->lm = lm;
    log->env = env;
    log->fd = -1;
    log->capacity = round_up_u64(max_u64(min_u64(bytes, LOG_BYTES_MAX), LOG_BYTES_MIN), PAGE_BYTES);
    memcpy(log->session, session, STORE_ID_BYTES);
    env_random(env, &log->id, sizeof log->id);
    log->next_seq = 1;
    log->keep.seq = 1;
    log->marked_seq = 1;
    atomic_store(&log->written_seq, 1);
    atomic_store(&log->synced_seq, 1);
    log->marks = mem_alloc((MARKS + 1) * sizeof *log->marks);
    log->iov = mem_alloc((GATHER_IOVS + 2) * sizeof *log->iov);
    log->headers = mem_zalloc(GATHER_RECORDS * sizeof *log->headers);
    pthread_mutex_init(&log->lock, NULL);
    pthread_cond_init(&log->cond, NULL);
    list_init(&log->waiting);
    return log;
}

void lm_log_file_discard(struct lm *lm, uint64_t id)
{
    char name[24];
    snprintf(name, sizeof name, "%016" PRIx64, id);
    if (renameat2(lm->log_fd, name, lm->log_fd, "spare", RENAME_NOREPLACE) < 0)
        unlinkat(lm->log_fd, name, 0);
}

static enum status log_open(struct store *store, struct env *env,
                            const uint8_t session[STORE_ID_BYTES], uint64_t bytes,
                            struct store_log **out, struct err *e)
{
    struct lm *lm = lm_of(store);
    struct lm_log *log = log_new(lm, env, session, bytes);
    *out = NULL;
    enum status st = file_make(log);
    if (st) {
        fail(e, st, "cannot make a write log of %" PRIu64 " bytes in %s/log: %s", log->capacity,
             lm->dir, strerror(errno));
        log_free(log);
        return st;
    }
    struct record_job rj = {.job.run = record_run, .lm = lm, .log = log};
    st = lm_job_run(lm, &rj.job);
    if (st) {
        fail(e, st, "cannot register a write log in the store %s", lm->dir);
    } else {
        int rc = pthread_create(&log->thread, NULL, sync_thread, log);
        if (rc)
            st = fail(e, ST_UNAVAIL, "cannot start a thread: %s", strerror(rc));
    }
    if (st) {
        lm_log_file_discard(lm, log->id);
        log_free(log);
        return st;
    }
    *out = &log->base;
    return ST_OK;
}

static void log_close(struct store_log *base, bool remove)
{
    struct lm_log *log = log_of(base);
    pthread_mutex_lock(&log->lock);
    log->stopping = true;
    pthread_cond_signal(&log->cond);
    pthread_mutex_unlock(&log->lock);
    pthread_join(log->thread, NULL);
    if (remove) {
        struct record_job rj = {.job.run = record_run, .lm = log->lm, .log = log, .remove = true};
        /* A log that could not be taken out of LMDB keeps its file; the next clean-up of
         * unused logs finds both. */
        if (lm_job_run(log->lm, &rj.job) == ST_OK)
            lm_log_file_discard(log->lm, log->id);
    }
    log_free(log);
}

static uint64_t log_id(const struct store_log *log)
{
    return log_of_const(log)->id;
}

static uint64_t log_next_seq(const struct store_log *log)
{
    return log_of_const(log)->next_seq;
}

static uint64_t log_capacity(const struct store_log *log)
{
    return log_of_const(log)->capacity;
}

const struct store_log_ops lm_log_ops = {
    .open = log_open,
    .close = log_close,
    .id = log_id,
    .next_seq = log_next_seq,
    .room = log_room,
    .capacity = log_capacity,
    .append = log_append,
    .submit = log_submit,
    .sync = log_sync,
    .replay = lm_log_replay,
    .remove_unused = lm_log_remove_unused,
};
