/*
 * A copy of a store that others go on changing.
 *
 * One LMDB read transaction, held to the end, is what is copied: as long as it is
 * open no process uses the space again that its version names (space.h), so the
 * bodies stay what they are. Writers do not wait for it; what they replace
 * meanwhile takes new space, so the copy is given up before it lets the store's disk
 * run full.
 *
 * The write logs are copied before that transaction begins. What the logs had by then
 * is in the copy of the log, or was committed before the transaction began and is in the
 * keys; a log that is newer than the copies of the logs has nothing that was answered before the
 * copy was asked for. So the copy holds a prefix of every volume's writes that
 * reaches at least that far, as after a crash (G1, G2), and nobody needs to be asked to
 * commit: owners that are dead or stuck are copied as well as others.
 *
 * The copy is a store of its own, filled through this engine: bodies lie in the order
 * of their keys, without free space between them, and the logs are as long as their
 * records. It is made under another name and gets its own when it is complete.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "store/engines.h"
#include "store/lmdb/engine.h"

#define BATCH_BODY_BYTES (16u << 20)
#define BATCH_ENTRIES_MAX 16384u
#define BATCH_TEXT_BYTES (8u << 20)
#define LOGS_MAX 65536u
#define FILES_MAX 65536u

/* The copy stops rather than leave the store's disk less than this, or than half of what it had. */
#define LEAVE_BYTES_MAX (1ull << 30)

/* In the folder of a copy in the making: names it as one, and is locked while it is worked on. */
static const char marker[] = "backup";

struct log_copy {
    uint64_t id;
    struct lm_log_start start;
    bool there; /* in the version that is copied */
};

/* A key with its value, on its way. */
struct entry {
    size_t key_at, head_at; /* in `text`; raw: head_at is the whole stored value */
    uint32_t key_len, head_len, body_len;
    uint64_t unit; /* of the body in the copy's data file */
    bool raw;      /* damaged: copied as it is */
    bool stray;    /* not behind the key before it */
};

/* A piece of a body, to be read. */
struct piece {
    uint64_t from; /* bytes */
    size_t to;     /* in `bodies` */
    size_t len;
};

struct copy {
    struct lm *lm, *to;
    struct store_backup *backup;
    struct err *e;

    char path[sizeof((struct lm *)0)->dir]; /* of the folder while it is made */
    char final_path[sizeof((struct lm *)0)->dir];
    int folder_fd, marker_fd;

    struct log_copy *logs;
    size_t n_logs, cap_logs;

    struct lm_reader *reader;
    uint64_t leave_bytes;
    uint64_t from_units; /* length of the store's data file */
    uint64_t next_unit;  /* of the copy's */

    struct entry *entries;
    size_t n_entries;
    struct piece *pieces;
    size_t n_pieces, cap_pieces;
    uint8_t *text, *bodies, *value;
    size_t text_len, bodies_len;
};

static enum status fail_errno(struct copy *c, const char *what, const char *where)
{
    int why = errno;
    enum status st = why == ENOSPC || why == EDQUOT ? ST_NOSPC : ST_UNAVAIL;
    return fail(c->e, st, "cannot %s %s: %s", what, where, strerror(why));
}

/* ---- the folder ---- */

/* Removes what is in the folder `name` below `folder_fd`, files only. */
static void clear_folder(int folder_fd, const char *name)
{
    DIR *dir =
        lm_folder_list(openat(folder_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!dir)
        return;
    struct dirent *ent;
    for (unsigned n = 0; n < FILES_MAX && (ent = readdir(dir)); n++)
        if (strcmp(ent->d_name, ".") != 0 && strcmp(ent->d_name, "..") != 0)
            unlinkat(dirfd(dir), ent->d_name, 0);
    closedir(dir);
}

/* Removes the files of a store, by their names: whatever else is there stays. */
static void clear_store(int folder_fd)
{
    static const char *const files[] = {"data.mdb",  "lock.mdb", "blocks",
                                        "processes", "bell",     "reserve", "making"};
    static const char *const folders[] = {"log", "session"};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++)
        unlinkat(folder_fd, files[i], 0);
    for (size_t i = 0; i < sizeof folders / sizeof folders[0]; i++) {
        clear_folder(folder_fd, folders[i]);
        unlinkat(folder_fd, folders[i], AT_REMOVEDIR);
    }
}

/* Whether there is nothing in a folder, but for the marker; -1: it can't be looked at. */
static int folder_empty(int at_fd, const char *path)
{
    DIR *dir = lm_folder_list(openat(at_fd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!dir)
        return -1;
    bool empty = true;
    struct dirent *ent;
    while (empty && (ent = readdir(dir)))
        empty = strcmp(ent->d_name, ".") == 0 || strcmp(ent->d_name, "..") == 0 ||
                strcmp(ent->d_name, marker) == 0;
    closedir(dir);
    return empty;
}

/* Takes the marker, which an unfinished copy has and nothing else. */
static enum status marker_take(struct copy *c)
{
    bool fresh = folder_empty(c->folder_fd, ".") == 1;
    c->marker_fd =
        openat(c->folder_fd, marker, O_RDWR | O_NOFOLLOW | O_CLOEXEC | (fresh ? O_CREAT : 0), 0600);
    if (c->marker_fd < 0 && errno == ENOENT)
        return fail(c->e, ST_EXISTS,
                    "%s is there already and is no unfinished backup: move it away", c->path);
    if (c->marker_fd < 0)
        return fail_errno(c, "write in", c->path);
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    struct stat sb;
    enum status st = ST_OK;
    if (fcntl(c->marker_fd, F_OFD_SETLK, &whole) < 0)
        st = errno == EAGAIN || errno == EACCES
                 ? fail(c->e, ST_BUSY, "another process is making a backup in %s", c->path)
                 : fail_errno(c, "lock a file in", c->path);
    else if (fstat(c->marker_fd, &sb) < 0 || sb.st_nlink == 0)
        st = fail(c->e, ST_BUSY, "another process has just made a backup in %s", c->final_path);
    if (st) {
        /* Not ours to remove. */
        close(c->marker_fd);
        c->marker_fd = -1;
    }
    return st;
}

/* Whether the folder is the store's own, or somewhere in it. One that is not there is in none. */
static bool in_store(const struct copy *c, const char *path)
{
    struct stat store, at, below = {0};
    int fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    bool inside = false;
    if (fstat(c->lm->dir_fd, &store) < 0)
        store = (struct stat){0};
    while (fd >= 0 && fstat(fd, &at) == 0 && !inside &&
           (at.st_dev != below.st_dev || at.st_ino != below.st_ino)) {
        inside = at.st_dev == store.st_dev && at.st_ino == store.st_ino;
        below = at;
        int up = openat(fd, "..", O_PATH | O_DIRECTORY | O_CLOEXEC);
        close(fd);
        fd = up;
    }
    if (fd >= 0)
        close(fd);
    return inside;
}

static enum status folder_begin(struct copy *c)
{
    const char *to = c->backup->to;
    size_t len = strlen(to);
    while (len > 1 && to[len - 1] == '/')
        len--;
    if (len == 0 || len + sizeof ".partial" > sizeof c->path)
        return fail(c->e, ST_INVAL, "a backup goes to a folder, whose path has at most %zu bytes",
                    sizeof c->path - sizeof ".partial");
    snprintf(c->final_path, sizeof c->final_path, "%.*s", (int)len, to);
    snprintf(c->path, sizeof c->path, "%.*s.partial", (int)len, to);
    /* Also where a link stands in for the folder: what counts is where it is made. */
    char parent[sizeof c->path];
    const char *slash = strrchr(c->final_path, '/');
    if (slash)
        snprintf(parent, sizeof parent, "%.*s/", (int)(slash - c->final_path), c->final_path);
    else
        strcpy(parent, ".");
    if (in_store(c, c->final_path) || in_store(c, parent))
        return fail(c->e, ST_INVAL, "%s is in the folder of the store itself: choose one outside",
                    c->final_path);
    int empty = folder_empty(AT_FDCWD, c->final_path);
    if (empty < 0 && errno != ENOENT)
        return errno == ENOTDIR
                   ? fail(c->e, ST_EXISTS, "%s is there already and is no folder", c->final_path)
                   : fail_errno(c, "look into", c->final_path);
    if (empty == 0)
        return fail(c->e, ST_EXISTS, "there is something in %s already", c->final_path);
    bool made = mkdir(c->path, 0700) == 0;
    if (!made && errno != EEXIST)
        return fail_errno(c, "make the folder", c->path);
    enum status st = ST_OK;
    c->folder_fd = open(c->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (c->folder_fd < 0) {
        st = fail_errno(c, "open the folder", c->path);
        if (made)
            (void)rmdir(c->path);
        return st;
    }
    st = marker_take(c);
    if (st)
        return st;
    clear_store(c->folder_fd);
    if (folder_empty(c->folder_fd, ".") != 1)
        return fail(c->e, ST_EXISTS,
                    "there is something in %s that belongs to no backup: move it away", c->path);
    /* As the store's own folder is, as far as may be. */
    struct stat sb;
    if (fstat(c->lm->dir_fd, &sb) == 0) {
        if (fchown(c->folder_fd, sb.st_uid, sb.st_gid) < 0)
            (void)!fchown(c->folder_fd, (uid_t)-1, sb.st_gid);
        (void)fchmod(c->folder_fd, sb.st_mode & 07777);
    }
    return ST_OK;
}

/* Removes a copy that is not complete, or not sure to last; `path`: where it is by now. */
static void folder_drop(struct copy *c, const char *path)
{
    if (c->marker_fd < 0)
        return;
    clear_store(c->folder_fd);
    unlinkat(c->folder_fd, marker, 0);
    (void)!rmdir(path);
}

/* The copy is complete: it gets its name, or is removed. */
static enum status folder_finish(struct copy *c)
{
    char parent[sizeof c->final_path];
    snprintf(parent, sizeof parent, "%s", c->final_path);
    char *slash = strrchr(parent, '/');
    if (slash == parent)
        slash[1] = '\0';
    else if (slash)
        *slash = '\0';
    else
        snprintf(parent, sizeof parent, ".");
    if (unlinkat(c->folder_fd, marker, 0) < 0 || fsync(c->folder_fd) < 0) {
        enum status st = fail_errno(c, "write in", c->path);
        folder_drop(c, c->path);
        return st;
    }
    if (rename(c->path, c->final_path) < 0) {
        if (errno == ENOTEMPTY || errno == EEXIST)
            return fail(c->e, ST_EXISTS, "there is something in %s by now: the backup is in %s",
                        c->final_path, c->path);
        enum status st = fail_errno(c, "give the backup its name,", c->final_path);
        folder_drop(c, c->path);
        return st;
    }
    int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    enum status st = ST_OK;
    if (fd < 0 || fsync(fd) < 0) {
        st = fail_errno(c, "sync the folder", parent);
        folder_drop(c, c->final_path);
    }
    if (fd >= 0)
        close(fd);
    return st;
}

/* ---- logs ---- */

/* The logs in one version of LMDB. */
static enum status logs_list(struct copy *c, struct lm_reader *reader,
                             void (*each)(struct copy *c, uint64_t id))
{
    struct lm_cursor cursor = lm_cursor(&reader->tree, LM_DB_LOGS);
    MDB_val k, v;
    enum status st = lm_cursor_first(&cursor, &k, &v);
    for (unsigned n = 0; !st && n < LOGS_MAX; n++) {
        if (k.mv_size == 8)
            each(c, get_be64(k.mv_data));
        st = lm_cursor_next(&cursor, &k, &v);
    }
    return st == ST_NOTFOUND ? ST_OK : st;
}

static void log_note(struct copy *c, uint64_t id)
{
    mem_grow(&c->logs, &c->cap_logs, c->n_logs + 1, sizeof *c->logs);
    c->logs[c->n_logs++] = (struct log_copy){.id = id};
}

static int log_file(struct copy *c, uint64_t id, int flags)
{
    char name[24];
    snprintf(name, sizeof name, "%016" PRIx64, id);
    int fd = openat(c->to->log_fd, name, O_RDWR | O_CLOEXEC | flags, 0600);
    if (fd >= 0)
        lm_file_adopt(c->to, fd);
    return fd;
}

static enum status logs_copy(struct copy *c)
{
    struct lm_reader *reader;
    enum status st = lm_read_begin(c->lm, &reader);
    if (!st) {
        st = logs_list(c, reader, log_note);
        lm_read_end(c->lm, reader);
    }
    if (st)
        return fail(c->e, st, "cannot read which write logs the store %s has", c->lm->dir);
    for (size_t i = 0; i < c->n_logs && !st; i++) {
        struct log_copy *log = &c->logs[i];
        int fd = log_file(c, log->id, O_CREAT | O_EXCL);
        if (fd < 0)
            return fail_errno(c, "make a write log in", c->path);
        st = lm_log_copy(c->lm, log->id, fd, &log->start, &c->backup->n_damaged, c->e);
        close(fd);
        if (st == ST_NOTFOUND)
            st = ST_OK; /* `there` will tell */
    }
    return st;
}

/* A log in the version that is copied. */
static void log_wanted(struct copy *c, uint64_t id)
{
    for (size_t i = 0; i < c->n_logs; i++) {
        if (c->logs[i].id == id) {
            c->logs[i].there = true;
            return;
        }
    }
    /* Begun since the others were copied: empty here. */
    struct lm_log_start start;
    int fd = log_file(c, id, O_CREAT | O_EXCL);
    bool known = lm_log_start_get(&c->reader->tree, id, &start) == ST_OK;
    if (fd < 0 || !known) {
        if (fd >= 0)
            close(fd);
        c->backup->n_damaged++;
        return;
    }
    uint8_t block[2 * LM_LOG_HEADER_BYTES] = {0};
    start.capacity = LM_LOG_HEADER_BYTES;
    start.offset = 0;
    lm_log_header_build(block, id, start.session, start.capacity);
    struct iovec iov = {block, sizeof block};
    if (lm_write_all(fd, &iov, 1, 0) || fsync(fd) < 0)
        c->backup->n_damaged++;
    close(fd);
    log_note(c, id);
    c->logs[c->n_logs - 1].start = start;
    c->logs[c->n_logs - 1].there = true;
}

static enum status logs_match(struct copy *c)
{
    enum status st = logs_list(c, c->reader, log_wanted);
    if (st)
        return fail(c->e, st, "cannot read which write logs the store %s has", c->lm->dir);
    size_t kept = 0;
    for (size_t i = 0; i < c->n_logs; i++) {
        if (c->logs[i].there) {
            c->logs[kept++] = c->logs[i];
            continue;
        }
        char name[24];
        snprintf(name, sizeof name, "%016" PRIx64, c->logs[i].id);
        unlinkat(c->to->log_fd, name, 0);
    }
    c->n_logs = kept;
    return ST_OK;
}

/* ---- keys and bodies ---- */

static size_t text_add(struct copy *c, const void *data, size_t len)
{
    size_t at = c->text_len;
    if (len)
        memcpy(c->text + at, data, len);
    c->text_len += len;
    return at;
}

/* Notes where a body is to be read from. Whole units: what a body leaves of its last is zeros. */
static bool body_note(struct copy *c, const struct lm_value *v)
{
    uint64_t left = round_up_u64(v->body_len, SPACE_UNIT_BYTES);
    size_t first = c->n_pieces, to = c->bodies_len;
    for (uint32_t i = 0; i < v->n_pieces && left > 0; i++) {
        struct space_extent ext = space_unpack(get_le64(v->pieces + 8 * (size_t)i));
        uint64_t len = min_u64(ext.units * SPACE_UNIT_BYTES, left);
        if (ext.start == 0 || ext.start + ext.units > c->from_units)
            break;
        mem_grow(&c->pieces, &c->cap_pieces, c->n_pieces + 1, sizeof *c->pieces);
        c->pieces[c->n_pieces++] = (struct piece){ext.start * SPACE_UNIT_BYTES, to, len};
        to += len;
        left -= len;
    }
    if (left > 0) {
        c->n_pieces = first;
        return false;
    }
    c->bodies_len = to;
    return true;
}

static void entry_add(struct copy *c, const MDB_val *k, const MDB_val *data)
{
    struct entry *x = &c->entries[c->n_entries], *last = c->n_entries ? x - 1 : NULL;
    *x = (struct entry){.key_len = (uint32_t)min_u64(k->mv_size, STORE_KEY_BYTES_MAX)};
    x->key_at = text_add(c, k->mv_data, x->key_len);
    if (last) {
        uint32_t both = last->key_len < x->key_len ? last->key_len : x->key_len;
        int order = memcmp(c->text + last->key_at, c->text + x->key_at, both);
        x->stray = order > 0 || (order == 0 && last->key_len >= x->key_len);
    }
    struct lm_value v;
    x->unit = c->next_unit + c->bodies_len / SPACE_UNIT_BYTES;
    if (lm_value_parse(k, data, &v) || v.body_len > LM_BODY_BYTES_MAX || !body_note(c, &v)) {
        x->raw = true;
        x->head_len = (uint32_t)min_u64(data->mv_size, LM_VALUE_BYTES_MAX);
        x->head_at = text_add(c, data->mv_data, x->head_len);
    } else {
        x->body_len = v.body_len;
        x->head_len = (uint32_t)v.head.len;
        x->head_at = text_add(c, v.head.data, v.head.len);
    }
    c->backup->n_damaged += x->raw || x->stray;
    c->n_entries++;
}

static int piece_compare(const void *a, const void *b)
{
    const struct piece *x = a, *y = b;
    return x->from < y->from ? -1 : x->from > y->from;
}

static bool read_exactly(int fd, uint8_t *to, size_t len, uint64_t from)
{
    while (len > 0) {
        ssize_t n = pread(fd, to, len, (off_t)from);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        to += n;
        from += (uint64_t)n;
        len -= (size_t)n;
    }
    return true;
}

/* Reads the bodies of a batch in the order in which they lie. What can't be read is zeros in the
 * copy, and found there by its hash. */
static void bodies_read(struct copy *c)
{
    if (c->n_pieces > 1)
        qsort(c->pieces, c->n_pieces, sizeof *c->pieces, piece_compare);
    for (size_t i = 0; i < c->n_pieces;) {
        struct piece p = c->pieces[i++];
        while (i < c->n_pieces && c->pieces[i].from == p.from + p.len &&
               c->pieces[i].to == p.to + p.len)
            p.len += c->pieces[i++].len;
        if (read_exactly(c->lm->blocks_fd, c->bodies + p.to, p.len, p.from))
            continue;
        for (size_t at = 0; at < p.len; at += SPACE_UNIT_BYTES) {
            if (read_exactly(c->lm->blocks_fd, c->bodies + p.to + at, SPACE_UNIT_BYTES,
                             p.from + at))
                continue;
            log_error("store %s: byte %" PRIu64 " of the data file can't be read: %s", c->lm->dir,
                      p.from + at, strerror(errno));
            memset(c->bodies + p.to + at, 0, SPACE_UNIT_BYTES);
            c->backup->n_damaged++;
        }
    }
}

struct put_job {
    struct lm_job job;
    struct copy *c;
};

static enum status put_run(struct lm_job *job, MDB_txn *txn)
{
    struct copy *c = container_of(job, struct put_job, job)->c;
    enum status ends_st = lm_guard_ends(c->to->guard, LM_DB_KEYS);
    if (ends_st)
        return ends_st;
    for (size_t i = 0; i < c->n_entries; i++) {
        const struct entry *x = &c->entries[i];
        MDB_val k = {x->key_len, c->text + x->key_at}, v = {x->head_len, c->text + x->head_at};
        if (!x->raw) {
            uint64_t units = (x->body_len + SPACE_UNIT_BYTES - 1) / SPACE_UNIT_BYTES;
            uint64_t piece = space_pack(x->unit, units);
            v.mv_data = c->value;
            v.mv_size = lm_value_build(c->value, &k, mdb_txn_id(txn),
                                       (struct slice){c->text + x->head_at, x->head_len},
                                       x->body_len, &piece, units ? 1 : 0);
        }
        enum status guard_st =
            lm_guard_key(c->to->guard, LM_DB_KEYS, (struct slice){k.mv_data, k.mv_size}, v.mv_size);
        if (guard_st)
            return guard_st;
        int rc = x->stray ? MDB_KEYEXIST : mdb_put(txn, c->to->keys_dbi, &k, &v, MDB_APPEND);
        if (rc == MDB_KEYEXIST) {
            rc = mdb_put(txn, c->to->keys_dbi, &k, &v, MDB_NOOVERWRITE);
            if (rc == MDB_KEYEXIST)
                rc = 0;
        }
        if (rc)
            return lm_status(rc);
    }
    return ST_OK;
}

static enum status batch_write(struct copy *c)
{
    bodies_read(c);
    if (c->bodies_len > 0) {
        uint64_t at = c->next_unit * SPACE_UNIT_BYTES;
        struct iovec iov = {c->bodies, c->bodies_len};
        if (lm_write_all(c->to->blocks_fd, &iov, 1, at))
            return fail_errno(c, "write the data file in", c->path);
        /* So that the sync at the end has little left to do. */
        (void)sync_file_range(c->to->blocks_fd, (off_t)at, (off_t)c->bodies_len,
                              SYNC_FILE_RANGE_WRITE);
    }
    struct put_job pj = {.job.run = put_run, .c = c};
    enum status st = lm_job_run(c->to, &pj.job);
    if (st)
        return fail(c->e, st, "cannot write keys in %s: %s", c->path, status_text(st));
    c->next_unit += c->bodies_len / SPACE_UNIT_BYTES;
    atomic_fetch_add(&c->backup->done_bytes, c->bodies_len);
    c->n_entries = c->n_pieces = c->text_len = c->bodies_len = 0;
    return ST_OK;
}

static uint64_t available(int fd)
{
    struct statvfs vfs;
    return fstatvfs(fd, &vfs) < 0 ? 0 : (uint64_t)vfs.f_bavail * vfs.f_frsize;
}

/* Between two batches. */
static enum status look_around(struct copy *c)
{
    if (c->backup->progress && !c->backup->progress(c->backup))
        return fail(c->e, ST_SHUTDOWN, "the backup was interrupted");
    lm_map_trim(c->lm);
    uint64_t left = available(c->lm->dir_fd);
    if (left < c->leave_bytes)
        return fail(c->e, ST_NOSPC,
                    "the disk of the store %s has only %" PRIu64
                    " MiB left: the backup was given up, "
                    "since until its end no space of the store can be used again",
                    c->lm->dir, left >> 20);
    return ST_OK;
}

static enum status keys_copy(struct copy *c)
{
    struct lm_cursor cursor = lm_cursor(&c->reader->tree, LM_DB_KEYS);
    MDB_val k, data;
    enum status key_st = lm_cursor_first(&cursor, &k, &data);
    while (!key_st) {
        if (c->n_entries == BATCH_ENTRIES_MAX || c->text_len > BATCH_TEXT_BYTES ||
            c->bodies_len > BATCH_BODY_BYTES) {
            enum status st = batch_write(c);
            if (!st)
                st = look_around(c);
            if (st)
                return st;
        }
        entry_add(c, &k, &data);
        key_st = lm_cursor_next(&cursor, &k, &data);
    }
    if (key_st != ST_NOTFOUND)
        return fail(c->e, ST_IO,
                    "the index of the store %s is damaged (the log names a page): no copy was made",
                    c->lm->dir);
    return c->n_entries ? batch_write(c) : ST_OK;
}

/* ---- all of it ---- */

static enum status end_run(struct lm_job *job, MDB_txn *txn)
{
    struct copy *c = container_of(job, struct put_job, job)->c;
    for (size_t i = 0; i < c->n_logs; i++) {
        enum status st = lm_log_start_put(c->to, txn, c->logs[i].id, &c->logs[i].start);
        if (st)
            return st;
    }
    struct space sp;
    uint64_t token;
    enum status st = space_load(&sp, txn, &c->to->space_dbis, c->to->guard);
    if (!st && getrandom(&token, sizeof token, 0) != (ssize_t)sizeof token)
        st = ST_UNAVAIL;
    if (!st) {
        sp.data_units = c->next_unit;
        st = space_save(&sp, token);
    }
    space_release(&sp);
    return st;
}

/* Begins the version that is copied, and sees that it fits. */
static enum status version_begin(struct copy *c)
{
    enum status st = lm_read_begin(c->lm, &c->reader);
    if (st)
        return fail(c->e, st, "cannot read the store %s", c->lm->dir);
    struct space sp;
    st = lm_space_read(c->reader, &sp);
    if (st)
        return fail(c->e, st, "the record of free space in the store %s is damaged", c->lm->dir);
    c->from_units = sp.data_units;
    uint64_t unused = 1 + sp.free_units + sp.hole_units + sp.pending_units;
    uint64_t total = sp.data_units - min_u64(unused, sp.data_units);
    total *= SPACE_UNIT_BYTES;
    atomic_store(&c->backup->total_bytes, total);
    uint64_t left = available(c->lm->dir_fd);
    c->leave_bytes = min_u64(left / 2, LEAVE_BYTES_MAX);
    uint64_t room = available(c->folder_fd);
    struct stat a, b;
    bool shared =
        fstat(c->folder_fd, &a) == 0 && fstat(c->lm->dir_fd, &b) == 0 && a.st_dev == b.st_dev;
    if (shared)
        room -= min_u64(room, c->leave_bytes);
    if (room < total)
        return fail(c->e, ST_NOSPC,
                    "the backup takes %" PRIu64 " MiB, and %s has room for %" PRIu64 " MiB",
                    total >> 20, c->final_path, room >> 20);
    return ST_OK;
}

static enum status copy_run(struct copy *c)
{
    struct store *to;
    struct store_options options = {.flags = STORE_CREATE, .lease_ms = c->lm->lease_ms};
    enum status st = store_engine_lmdb.open(c->path, &options, &to, c->e);
    if (st)
        return st;
    c->to = lm_of(to);
    c->next_unit = 1;
    st = logs_copy(c);
    if (!st)
        st = version_begin(c);
    if (!st)
        st = logs_match(c);
    if (!st)
        st = look_around(c);
    if (!st)
        st = keys_copy(c);
    struct put_job pj = {.job.run = end_run, .c = c};
    if (!st) {
        st = lm_job_run(c->to, &pj.job);
        if (st)
            fail(c->e, st, "cannot write in %s: %s", c->path, status_text(st));
    }
    if (!st && (fsync(c->to->blocks_fd) < 0 || fsync(c->to->log_fd) < 0))
        st = fail_errno(c, "sync", c->path);
    if (c->reader)
        lm_read_end(c->lm, c->reader);
    store_close(to);
    return st;
}

enum status lm_backup(struct store *store, struct store_backup *backup, struct err *e)
{
    struct copy *c = mem_zalloc(sizeof *c);
    *c = (struct copy){
        .lm = lm_of(store), .backup = backup, .e = e, .folder_fd = -1, .marker_fd = -1};
    c->entries = mem_alloc(BATCH_ENTRIES_MAX * sizeof *c->entries);
    c->text = mem_alloc(BATCH_TEXT_BYTES + STORE_KEY_BYTES_MAX + LM_VALUE_BYTES_MAX);
    c->bodies = mem_alloc(BATCH_BODY_BYTES + LM_BODY_BYTES_MAX);
    c->value = mem_alloc(LM_VALUE_BYTES_MAX);
    enum status st = folder_begin(c);
    if (!st)
        st = copy_run(c);
    if (!st)
        st = folder_finish(c);
    else
        folder_drop(c, c->path);
    if (c->marker_fd >= 0)
        close(c->marker_fd);
    if (c->folder_fd >= 0)
        close(c->folder_fd);
    free(c->logs);
    free(c->entries);
    free(c->pieces);
    free(c->text);
    free(c->bodies);
    free(c->value);
    free(c);
    return st;
}
