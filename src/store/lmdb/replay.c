/*
 * Reading the log of a session that is gone, copying one that may be in use, and
 * clearing away logs that nobody needs.
 *
 * A replay begins where LMDB says and ends at the first record that does not
 * fit: the number after the last one's, hashes that are this log's. So it yields
 * a prefix, whatever of the rest had reached the disk. Where a later record says
 * that the one missing had been synced, the log is damaged, and that is an error
 * and not its end.
 *
 * One log holds the records of several streams, and each stream's prefix is its own: a
 * payload of another stream is none of this replay's business, damaged or not.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define WINDOW_BYTES (8u << 20)
#define COPY_UNIT_BYTES 4096u
#define COPY_TRIES 5
#define COPY_PAUSE_US 2000u
#define FILES_MAX 65536u

/* A window over the ring, by positions that only rise. */
struct scan {
    int fd;
    uint64_t id, capacity;
    uint64_t limit; /* no record ends beyond */
    uint8_t *window;
    uint64_t at;
    size_t len;
    bool read_failed;
    int read_errno; /* 0: the file ends before its ring does */
};

/* Bytes [offset, offset + len) of the ring in one piece, or NULL. */
static const uint8_t *scan_bytes(struct scan *s, uint64_t offset, size_t len)
{
    if (len > WINDOW_BYTES || offset + len > s->limit)
        return NULL;
    if (offset < s->at || offset + len > s->at + s->len) {
        s->at = offset;
        s->len = 0;
        size_t want = min_u64(WINDOW_BYTES, s->limit - offset);
        while (s->len < want) {
            uint64_t place = (offset + s->len) % s->capacity;
            size_t part = min_u64(want - s->len, s->capacity - place);
            ssize_t n =
                pread(s->fd, s->window + s->len, part, (off_t)(LM_LOG_HEADER_BYTES + place));
            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0) {
                s->read_failed = true;
                s->read_errno = n < 0 ? errno : 0;
                return NULL;
            }
            s->len += (size_t)n;
        }
    }
    return s->window + (offset - s->at);
}

static bool header_fits(const struct scan *s, const uint8_t *h)
{
    return get_le32(h) == LM_LOG_RECORD_MAGIC && get_le32(h + 4) <= STORE_LOG_PAYLOAD_MAX &&
           get_le64(h + 72) == lm_log_header_hash(h, s->id);
}

/* Where record `seq` is to be: its header. */
static bool is_record(const struct scan *s, const uint8_t *h, uint64_t seq)
{
    return header_fits(s, h) && get_le64(h + 8) == seq && get_le64(h + 16) != LM_LOG_MARK_STREAM;
}

enum tail {
    TAIL_EMPTY,  /* no record of this log follows */
    TAIL_LATER,  /* later ones do: the disk took them in another order, or lost one */
    TAIL_SYNCED, /* one that follows knows that the missing one had been synced */
};

/* What lies behind `offset`, where the record numbered `seq` is missing. */
static enum tail tail_at(struct scan *s, uint64_t offset, uint64_t seq)
{
    enum tail tail = TAIL_EMPTY;
    for (uint64_t at = offset; at + LM_LOG_RECORD_BYTES <= s->limit; at += 8) {
        const uint8_t *h = scan_bytes(s, at, LM_LOG_RECORD_BYTES);
        if (!h)
            break;
        if (get_le32(h) != LM_LOG_RECORD_MAGIC || get_le64(h + 8) <= seq || !header_fits(s, h))
            continue;
        if (get_le64(h + 64) > seq)
            return TAIL_SYNCED;
        tail = TAIL_LATER;
    }
    return tail;
}

static enum status read_error(const struct scan *s, struct err *e)
{
    if (s->read_errno)
        return fail(e, ST_IO, "write log %016" PRIx64 " can't be read: %s", s->id,
                    strerror(s->read_errno));
    return fail(e, ST_IO,
                "write log %016" PRIx64 " is cut short: its file is shorter than its "
                "header says",
                s->id);
}

static enum status scan_records(struct scan *s, const struct lm_log_start *start, uint64_t stream,
                                uint64_t after_seq,
                                bool (*take)(void *arg, const struct store_log_record *rec),
                                void *arg, struct err *e)
{
    uint64_t offset = start->offset, seq = start->seq;
    for (;;) {
        const uint8_t *h = scan_bytes(s, offset, LM_LOG_RECORD_BYTES);
        if (!h || !is_record(s, h, seq))
            break;
        uint32_t len = get_le32(h + 4);
        if (get_le64(h + 16) != stream) {
            offset += store_log_record_bytes(len);
            seq++;
            continue;
        }
        h = scan_bytes(s, offset, LM_LOG_RECORD_BYTES + len);
        if (!h || hash64(h + LM_LOG_RECORD_BYTES, len, 0) != get_le64(h + 56))
            break;
        struct store_log_record rec = {.seq = seq,
                                       .stream = get_le64(h + 16),
                                       .payload = h + LM_LOG_RECORD_BYTES,
                                       .payload_len = len};
        memcpy(rec.meta, h + 24, sizeof rec.meta);
        if (seq > after_seq && !take(arg, &rec))
            return ST_OK;
        offset += store_log_record_bytes(len);
        seq++;
    }
    if (s->read_failed)
        return read_error(s, e);
    enum tail tail = tail_at(s, offset, seq);
    if (s->read_failed && tail != TAIL_SYNCED)
        return read_error(s, e);
    if (tail == TAIL_SYNCED)
        return fail(e, ST_IO,
                    "write log %016" PRIx64 " is damaged at record %" PRIu64
                    ", which had reached the disk: writes that were answered may be lost",
                    s->id, seq);
    if (tail == TAIL_LATER)
        log_warning("write log %016" PRIx64 " ends at record %" PRIu64
                    ", and later ones follow: expected after a power cut, damage otherwise",
                    s->id, seq);
    return ST_OK;
}

enum status lm_log_replay(struct store *store, uint64_t log_id, uint64_t stream, uint64_t after_seq,
                          bool (*take)(void *arg, const struct store_log_record *rec), void *arg,
                          struct err *e)
{
    struct lm *lm = lm_of(store);
    struct lm_reader *reader;
    struct lm_log_start start;
    enum status st = lm_read_begin(lm, &reader);
    if (st)
        return fail(e, st, "cannot read the store %s", lm->dir);
    st = lm_log_start_get(&reader->tree, log_id, &start);
    lm_read_end(lm, reader);
    if (st)
        return fail(e, st, "the store %s %s write log %016" PRIx64, lm->dir,
                    st == ST_NOTFOUND ? "has no" : "has a damaged record of", log_id);
    char name[24];
    snprintf(name, sizeof name, "%016" PRIx64, log_id);
    int fd = openat(lm->log_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return fail(e, errno == ENOENT ? ST_NOTFOUND : ST_IO,
                    "cannot open the write log %s/log/%s: %s", lm->dir, name, strerror(errno));
    uint64_t id, capacity;
    uint8_t session[STORE_ID_BYTES];
    if (lm_log_header_read(fd, &id, session, &capacity) || id != log_id ||
        capacity != start.capacity || capacity == 0) {
        close(fd);
        return fail(e, ST_IO, "the header of write log %s/log/%s is damaged", lm->dir, name);
    }
    struct scan s = {.fd = fd,
                     .id = id,
                     .capacity = capacity,
                     .limit = start.offset + capacity,
                     .window = mem_alloc(WINDOW_BYTES)};
    st = scan_records(&s, &start, stream, after_seq, take, arg, e);
    free(s.window);
    close(fd);
    return st;
}

/* ---- a copy ---- */

/*
 * Whoever owns the log may append to it and use the room of records again that a commit made
 * unneeded. So what does not fit is looked at again, then LMDB is asked whether it is needed at
 * all, and the copy begins anew behind it where it is not. Records are written in order, header before
 * payload: one that follows proves that those before it had been written.
 */
struct copying {
    struct scan s;
    struct lm_log_start base; /* of the first record in the copy */
    uint64_t offset, seq;     /* of the next one */
    int to_fd;
    uint64_t n_damaged;
};

enum found { FOUND_NONE, FOUND_WHOLE, FOUND_DAMAGED };

static enum found record_look(struct copying *c, uint32_t *len)
{
    const uint8_t *h = scan_bytes(&c->s, c->offset, LM_LOG_RECORD_BYTES);
    if (!h || !is_record(&c->s, h, c->seq))
        return FOUND_NONE;
    *len = get_le32(h + 4);
    h = scan_bytes(&c->s, c->offset, LM_LOG_RECORD_BYTES + *len);
    if (!h)
        return FOUND_NONE;
    return hash64(h + LM_LOG_RECORD_BYTES, *len, 0) == get_le64(h + 56) ? FOUND_WHOLE
                                                                       : FOUND_DAMAGED;
}

static enum found record_find(struct copying *c, uint32_t *len)
{
    enum found found = record_look(c, len);
    if (found == FOUND_WHOLE)
        return found;
    /* The window was filled before the record was written, perhaps. */
    c->s.len = 0;
    found = record_look(c, len);
    if (found != FOUND_DAMAGED)
        return found;
    const uint8_t *next =
        scan_bytes(&c->s, c->offset + store_log_record_bytes(*len), LM_LOG_RECORD_BYTES);
    if (!next || !header_fits(&c->s, next) || get_le64(next + 8) != c->seq + 1)
        return FOUND_NONE; /* still on its way, or cut short by the end of its process */
    c->s.len = 0;
    return record_look(c, len);
}

static enum status copy_write(struct copying *c, uint64_t offset, const void *data, size_t len)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};
    return lm_write_all(c->to_fd, &iov, 1, LM_LOG_HEADER_BYTES + (offset - c->base.offset));
}

static enum status start_now(struct lm *lm, uint64_t id, struct lm_log_start *start)
{
    struct lm_reader *reader;
    enum status st = lm_read_begin(lm, &reader);
    if (st)
        return st;
    st = lm_log_start_get(&reader->tree, id, start);
    lm_read_end(lm, reader);
    return st;
}

/* Up to the first record that is not there. ST_NOTFOUND: the log is needed no more. */
static enum status copy_records(struct lm *lm, struct copying *c, enum tail *tail, struct err *e)
{
    for (int tries = 0;;) {
        uint32_t len;
        enum found found = record_find(c, &len);
        if (found != FOUND_NONE) {
            const uint8_t *h = scan_bytes(&c->s, c->offset, LM_LOG_RECORD_BYTES + len);
            enum status st = copy_write(c, c->offset, h, LM_LOG_RECORD_BYTES + len);
            if (st)
                return fail(e, st, "cannot copy write log %016" PRIx64 ": %s", c->s.id,
                            strerror(errno));
            c->n_damaged += found == FOUND_DAMAGED;
            c->offset += store_log_record_bytes(len);
            c->seq++;
            tries = 0;
            continue;
        }
        struct lm_log_start start;
        enum status st = start_now(lm, c->s.id, &start);
        if (st)
            return st == ST_NOTFOUND ? st : fail(e, st, "cannot read the store %s", lm->dir);
        if (start.seq > c->seq) {
            c->base = start;
            c->offset = start.offset;
            c->seq = start.seq;
            if (ftruncate(c->to_fd, 0) < 0)
                return fail(e, ST_IO, "cannot copy write log %016" PRIx64 ": %s", c->s.id,
                            strerror(errno));
            continue;
        }
        if (c->s.read_failed)
            return read_error(&c->s, e);
        *tail = tail_at(&c->s, c->offset, c->seq);
        if (c->s.read_failed && *tail != TAIL_SYNCED)
            return read_error(&c->s, e);
        if (*tail == TAIL_EMPTY || tries++ == COPY_TRIES)
            return ST_OK;
        usleep(COPY_PAUSE_US);
    }
}

/* What is behind a record that is lost, so that the copy is found damaged too. */
static enum status copy_rest(struct copying *c)
{
    enum status st = ST_OK;
    c->n_damaged++;
    while (!st && c->offset < c->s.limit) {
        size_t len = min_u64(COPY_UNIT_BYTES, c->s.limit - c->offset);
        const uint8_t *data = scan_bytes(&c->s, c->offset, len);
        if (!data)
            return ST_IO;
        st = copy_write(c, c->offset, data, len);
        c->offset += len;
    }
    return st;
}

/* Says behind the last record that all of them are synced, as they are before the copy is complete;
 * fills the ring up and puts the header before it. */
static enum status copy_finish(struct copying *c, struct lm_log_start *start)
{
    static const uint8_t zeros[COPY_UNIT_BYTES];
    uint8_t mark[LM_LOG_RECORD_BYTES];
    lm_log_mark_build(mark, c->s.id, c->seq, c->seq);
    uint64_t used = c->offset - c->base.offset + sizeof mark;
    enum status st = copy_write(c, c->offset, mark, sizeof mark);
    *start = (struct lm_log_start){.capacity = round_up_u64(used, COPY_UNIT_BYTES),
                                   .seq = c->base.seq};
    memcpy(start->session, c->base.session, STORE_ID_BYTES);
    if (!st && start->capacity > used)
        st = copy_write(c, c->offset + sizeof mark, zeros, start->capacity - used);
    uint8_t block[LM_LOG_HEADER_BYTES];
    lm_log_header_build(block, c->s.id, start->session, start->capacity);
    struct iovec iov = {block, sizeof block};
    if (!st)
        st = lm_write_all(c->to_fd, &iov, 1, 0);
    /* The last record may end short of a multiple of 8. */
    if (!st && ftruncate(c->to_fd, (off_t)(LM_LOG_HEADER_BYTES + start->capacity)) < 0)
        st = ST_IO;
    return !st && fsync(c->to_fd) < 0 ? ST_IO : st;
}

enum status lm_log_copy(struct lm *lm, uint64_t id, int to_fd, struct lm_log_start *start,
                        uint64_t *n_damaged, struct err *e)
{
    struct copying c = {.to_fd = to_fd};
    enum status st = start_now(lm, id, start);
    if (st)
        return st == ST_NOTFOUND
                   ? st
                   : fail(e, st, "the record of write log %016" PRIx64 " is damaged", id);
    char name[24];
    snprintf(name, sizeof name, "%016" PRIx64, id);
    int fd = openat(lm->log_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    uint64_t header_id, capacity;
    uint8_t session[STORE_ID_BYTES];
    if (fd < 0 || lm_log_header_read(fd, &header_id, session, &capacity) || header_id != id ||
        capacity != start->capacity || capacity == 0) {
        if (fd >= 0)
            close(fd);
        /* Its file was given away, or it is damaged, as the empty file in the copy then is. */
        st = start_now(lm, id, start);
        *n_damaged += st == ST_OK;
        return st;
    }
    c.s = (struct scan){.fd = fd,
                        .id = id,
                        .capacity = capacity,
                        .limit = start->offset + capacity,
                        .window = mem_alloc(WINDOW_BYTES)};
    c.base = *start;
    c.offset = start->offset;
    c.seq = start->seq;
    enum tail tail = TAIL_EMPTY;
    st = copy_records(lm, &c, &tail, e);
    if (!st) {
        if (tail == TAIL_SYNCED)
            st = copy_rest(&c);
        if (!st)
            st = copy_finish(&c, start);
        if (st)
            fail(e, st, "cannot copy write log %016" PRIx64 ": %s", id, strerror(errno));
    }
    *n_damaged += c.n_damaged;
    free(c.s.window);
    close(fd);
    return st;
}

/* ---- logs that nobody needs ---- */

struct unused {
    uint64_t *ids;
    size_t n, cap;
    uint8_t (*sessions)[STORE_ID_BYTES]; /* of the logs that stay */
    size_t n_sessions, cap_sessions;
    const uint64_t *needed;
    size_t n_needed;
};

static void judge(struct lm *lm, struct unused *u, uint64_t id, const uint8_t *session)
{
    bool keep = !session || lm_session_probe(&lm->base, session) != STORE_SESSION_DEAD;
    for (size_t i = 0; i < u->n_needed && !keep; i++)
        keep = u->needed[i] == id;
    if (keep && session) {
        mem_grow(&u->sessions, &u->cap_sessions, u->n_sessions + 1, STORE_ID_BYTES);
        memcpy(u->sessions[u->n_sessions++], session, STORE_ID_BYTES);
    } else if (!keep) {
        mem_grow(&u->ids, &u->cap, u->n + 1, sizeof *u->ids);
        u->ids[u->n++] = id;
    }
}

/* Logs that LMDB knows. */
static enum status judge_records(struct lm *lm, struct unused *u)
{
    struct lm_reader *reader;
    enum status st = lm_read_begin(lm, &reader);
    if (st)
        return st;
    struct lm_cursor c = lm_cursor(&reader->tree, LM_DB_LOGS);
    MDB_val k, v;
    st = lm_cursor_first(&c, &k, &v);
    for (unsigned n = 0; !st && n < FILES_MAX; n++) {
        struct lm_log_start start;
        if (k.mv_size == 8) {
            uint64_t id = get_be64(k.mv_data);
            bool good = lm_log_start_get(&reader->tree, id, &start) == ST_OK;
            judge(lm, u, id, good ? start.session : NULL);
        }
        st = lm_cursor_next(&c, &k, &v);
    }
    lm_read_end(lm, reader);
    return st == ST_NOTFOUND ? ST_OK : st;
}

/* Reads "0123456789abcdef" and nothing behind it. */
static bool hex_u64(const char *text, uint64_t *v)
{
    char *end;
    if (strlen(text) != 16 || strspn(text, "0123456789abcdef") != 16)
        return false;
    *v = strtoull(text, &end, 16);
    return *end == '\0';
}

static bool hex_session(const char *text, uint8_t id[STORE_ID_BYTES])
{
    for (size_t i = 0; i < STORE_ID_BYTES; i++) {
        unsigned v;
        if (sscanf(text + 2 * i, "%2x", &v) != 1)
            return false;
        id[i] = (uint8_t)v;
    }
    return true;
}

/* Files left by processes that died while they made or removed a log. */
static void sweep_files(struct lm *lm)
{
    DIR *dir = lm_folder_list(openat(lm->log_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!dir)
        return;
    struct dirent *ent;
    for (unsigned looked = 0; looked < FILES_MAX && (ent = readdir(dir)) != NULL; looked++) {
        uint8_t session[STORE_ID_BYTES];
        uint64_t id, header_id, capacity;
        bool orphan = false;
        if (strncmp(ent->d_name, ".new-", 5) == 0 && strlen(ent->d_name) == 5 + 32 + 1 + 16) {
            orphan = hex_session(ent->d_name + 5, session);
        } else if (hex_u64(ent->d_name, &id)) {
            struct lm_reader *reader;
            struct lm_log_start start;
            int log_fd = openat(lm->log_fd, ent->d_name, O_RDONLY | O_CLOEXEC);
            if (log_fd >= 0) {
                orphan = lm_log_header_read(log_fd, &header_id, session, &capacity) == ST_OK;
                close(log_fd);
            }
            if (orphan && lm_read_begin(lm, &reader) == ST_OK) {
                orphan = lm_log_start_get(&reader->tree, id, &start) == ST_NOTFOUND;
                lm_read_end(lm, reader);
            } else {
                orphan = false;
            }
        }
        if (orphan && lm_session_probe(&lm->base, session) == STORE_SESSION_DEAD)
            unlinkat(lm->log_fd, ent->d_name, 0);
    }
    closedir(dir);
}

struct forget_job {
    struct lm_job job;
    struct lm *lm;
    const struct unused *unused;
};

static enum status forget_run(struct lm_job *job, MDB_txn *txn)
{
    struct forget_job *fj = container_of(job, struct forget_job, job);
    for (size_t i = 0; i < fj->unused->n; i++) {
        enum status st = lm_log_start_remove(fj->lm, txn, fj->unused->ids[i]);
        if (st)
            return st;
    }
    return ST_OK;
}

enum status lm_log_remove_unused(struct store *store, const uint64_t *needed, size_t n_needed,
                                 struct err *e)
{
    struct lm *lm = lm_of(store);
    struct unused u = {.needed = needed, .n_needed = n_needed};
    enum status st = judge_records(lm, &u);
    if (!st && u.n > 0) {
        struct forget_job fj = {.job.run = forget_run, .lm = lm, .unused = &u};
        st = lm_job_run(lm, &fj.job);
    }
    if (st) {
        fail(e, st, "cannot clear unused write logs out of the store %s", lm->dir);
    } else {
        for (size_t i = 0; i < u.n; i++)
            lm_log_file_discard(lm, u.ids[i]);
        sweep_files(lm);
        lm_sessions_sweep(lm, (const uint8_t(*)[STORE_ID_BYTES])u.sessions, u.n_sessions);
    }
    free(u.ids);
    free(u.sessions);
    return st;
}
