/* The file an import comes from; see source.h. */
#include "cli/source.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "cli/progress.h"
#include "server/reactor.h"

#define IN_BYTES (2u << 20)
#define LOOK_MS 200
/* Zeros of an image are looked for in steps of this many bytes. */
#define GRAIN_BYTES 16384u

_Static_assert(IN_BYTES >= STREAM_DATA_BYTES_MAX + STREAM_HEAD_BYTES, "a frame fits");
_Static_assert(SOURCE_BATCH_BYTES >= 2 * STREAM_DATA_BYTES_MAX, "batches hold frames");

/* --- bytes (on a worker thread) ------------------------------------------------------------ */

/* Reads more into `in`; at the end of the file sets `ended`. */
static enum status read_more(struct source *s)
{
    if (s->in_at > 0) {
        memmove(s->in, s->in + s->in_at, s->in_end - s->in_at);
        s->in_end -= s->in_at;
        s->in_at = 0;
    }
    for (;;) {
        struct pollfd ready = {.fd = s->fd, .events = POLLIN};
        if (interrupted())
            return fail(&s->err, ST_SHUTDOWN, "interrupted");
        if (poll(&ready, 1, LOOK_MS) <= 0)
            continue;
        ssize_t n = read(s->fd, s->in + s->in_end, IN_BYTES - s->in_end);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n < 0)
            return fail(&s->err, ST_IO, "cannot read %s from byte %llu on: %s", s->name,
                        (unsigned long long)(s->position + s->in_end - s->in_at), strerror(errno));
        s->in_end += (size_t)n;
        s->ended = n == 0;
        return ST_OK;
    }
}

static size_t in_bytes(const struct source *s)
{
    return s->in_end - s->in_at;
}

/* Has `want` bytes read ahead, or all that there are. */
static enum status have(struct source *s, size_t want)
{
    enum status st = ST_OK;
    while (st == ST_OK && in_bytes(s) < want && !s->ended)
        st = read_more(s);
    return st;
}

static const uint8_t *take(struct source *s, size_t n)
{
    const uint8_t *at = s->in + s->in_at;
    s->in_at += n;
    s->position += n;
    return at;
}

/* --- images -------------------------------------------------------------------------------- */

static bool is_zero(const uint8_t *bytes, size_t len)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, len - 1) == 0;
}

/* Goes on behind a hole of the file, where it knows of any. */
static enum status skip_hole(struct source *s)
{
    if (!s->seekable || in_bytes(s) > 0 || s->position >= s->image_bytes)
        return ST_OK;
    off_t data = lseek(s->fd, (off_t)s->position, SEEK_DATA);
    if (data < 0 && errno == ENXIO)
        data = (off_t)s->image_bytes;
    if (data < 0)
        data = (off_t)s->position;
    s->position = min_u64((uint64_t)data / GRAIN_BYTES * GRAIN_BYTES, s->image_bytes);
    if ((uint64_t)data >= s->image_bytes)
        s->position = s->image_bytes;
    if (lseek(s->fd, (off_t)s->position, SEEK_SET) < 0)
        return fail(&s->err, ST_IO, "cannot read %s: %s", s->name, strerror(errno));
    return ST_OK;
}

static void add_data(struct source_batch *b, uint64_t offset, const uint8_t *bytes, size_t len)
{
    struct source_item *last = b->n > 0 ? &b->items[b->n - 1] : NULL;
    uint8_t *to = b->bytes + b->len;
    memcpy(to, bytes, len);
    b->len += len;
    if (last && last->offset + last->length == offset)
        last->length += len;
    else
        b->items[b->n++] = (struct source_item){.offset = offset, .length = len, .bytes = to};
}

static enum status fill_image(struct source *s, struct source_batch *b)
{
    enum status st = ST_OK;
    b->event = SOURCE_MORE;
    while (st == ST_OK && b->n < SOURCE_ITEMS_MAX && b->len + GRAIN_BYTES <= SOURCE_BATCH_BYTES) {
        st = skip_hole(s);
        uint64_t left = s->image_bytes - s->position;
        if (st == ST_OK && left > 0)
            st = have(s, GRAIN_BYTES);
        if (st != ST_OK)
            return st;
        size_t n = (size_t)min_u64(min_u64(in_bytes(s), GRAIN_BYTES), left);
        if (n == 0) {
            if (left > 0 && s->image_bytes != UINT64_MAX)
                return fail(&s->err, ST_IO, "%s has become shorter: it ends at byte %llu", s->name,
                            (unsigned long long)s->position);
            b->event = SOURCE_END;
            break;
        }
        uint64_t offset = s->position;
        const uint8_t *bytes = take(s, n);
        if (!is_zero(bytes, n))
            add_data(b, offset, bytes, n);
    }
    return st;
}

/* --- streams ------------------------------------------------------------------------------- */

/* Reads one frame; *body is there until the next. */
static enum status read_frame(struct source *s, struct stream_frame *frame, const uint8_t **body)
{
    struct stream_reader *r = &s->reader;
    enum status st = have(s, STREAM_HEAD_BYTES);
    if (st == ST_OK && in_bytes(s) < STREAM_HEAD_BYTES)
        return stream_ended(r, in_bytes(s), &s->err);
    if (st == ST_OK)
        st = stream_take_head(r, take(s, STREAM_HEAD_BYTES), frame, &s->err);
    if (st == ST_OK)
        st = have(s, frame->body_len);
    if (st == ST_OK && in_bytes(s) < frame->body_len)
        return stream_ended(r, in_bytes(s), &s->err);
    if (st == ST_OK) {
        *body = take(s, frame->body_len);
        st = stream_take_body(r, frame, *body, &s->err);
    }
    return st;
}

static enum status add_frame(struct source *s, struct source_batch *b,
                             const struct stream_frame *frame, const uint8_t *body)
{
    struct source_item *item = &b->items[b->n++];
    *item = (struct source_item){.offset = frame->offset, .length = frame->length,
                                 .hole = frame->hole};
    if (frame->kind == STREAM_ZERO)
        return ST_OK;
    uint8_t *to = b->bytes + b->len;
    item->bytes = to;
    b->len += frame->length;
    if (frame->packed)
        return stream_unpack(frame, body, to, &s->err);
    memcpy(to, body, frame->length);
    return ST_OK;
}

static enum status fill_stream(struct source *s, struct source_batch *b)
{
    enum status st = ST_OK;
    b->event = SOURCE_MORE;
    while (st == ST_OK && b->event == SOURCE_MORE && b->n < SOURCE_ITEMS_MAX &&
           b->len + STREAM_DATA_BYTES_MAX <= SOURCE_BATCH_BYTES) {
        struct stream_frame frame;
        const uint8_t *body;
        st = read_frame(s, &frame, &body);
        if (st != ST_OK)
            break;
        switch (frame.kind) {
        case STREAM_DATA:
        case STREAM_ZERO:
            st = add_frame(s, b, &frame, body);
            break;
        case STREAM_SECTION:
            b->section = s->reader.section;
            b->event = SOURCE_SECTION;
            break;
        case STREAM_SECTION_END:
            b->event = SOURCE_SECTION_END;
            break;
        case STREAM_END:
            st = have(s, 1);
            if (st == ST_OK)
                st = stream_ended(&s->reader, in_bytes(s), &s->err);
            b->event = SOURCE_END;
            break;
        case STREAM_VOLUME:
            break;
        }
    }
    return st;
}

/* --- batches ------------------------------------------------------------------------------- */

static void fill(struct env_work *work)
{
    struct source *s = container_of(work, struct source, work);
    struct source_batch *b = &s->batches[s->filling];
    b->n = 0;
    b->len = 0;
    s->st = s->is_stream ? fill_stream(s, b) : fill_image(s, b);
    b->position = s->position;
}

static void filled(struct env_work *work)
{
    container_of(work, struct source, work)->working = false;
}

static void start(struct source *s)
{
    s->work = (struct env_work){.work = fill, .done = filled};
    s->working = true;
    env_work(s->run->env, &s->work);
}

static void wait(struct source *s)
{
    while (s->working)
        reactor_run_once(s->run->env);
}

enum status source_next(struct source *s, const struct source_batch **out, struct err *e)
{
    if (!s->started)
        start(s);
    s->started = true;
    wait(s);
    if (s->st != ST_OK) {
        *e = s->err;
        return s->st;
    }
    *out = &s->batches[s->filling];
    s->filling ^= 1;
    if ((*out)->event != SOURCE_END)
        start(s);
    return ST_OK;
}

/* Reads the beginning: what it is. */
static void begin(void *arg)
{
    struct source *s = arg;
    s->st = have(s, STREAM_BEGIN_BYTES);
    s->is_stream = s->st == ST_OK && stream_is(s->in, in_bytes(s));
    if (!s->is_stream)
        return;
    if (in_bytes(s) < STREAM_BEGIN_BYTES) {
        s->st = stream_ended(&s->reader, in_bytes(s), &s->err);
        return;
    }
    struct stream_frame frame;
    const uint8_t *body;
    s->st = stream_take_begin(&s->reader, take(s, STREAM_BEGIN_BYTES), &s->err);
    if (s->st == ST_OK)
        s->st = read_frame(s, &frame, &body);
    s->volume = s->reader.volume;
}

enum status source_open(struct source *s, struct run *run, const char *name, struct err *e)
{
    struct stat now;
    bool standard = strcmp(name, "-") == 0;
    *s = (struct source){.run = run, .name = standard ? "standard input" : name,
                         .image_bytes = UINT64_MAX};
    s->fd = standard ? STDIN_FILENO : open(name, O_RDONLY | O_CLOEXEC);
    if (s->fd < 0 || fstat(s->fd, &now) != 0)
        return fail(e, errno == ENOENT ? ST_NOTFOUND : ST_IO, "cannot open %s: %s", s->name,
                    strerror(errno));
    if (standard && isatty(s->fd))
        return fail(e, ST_INVAL, "a volume's bytes do not come from a terminal: redirect the input");
    if (S_ISDIR(now.st_mode))
        return fail(e, ST_INVAL, "%s is a folder", s->name);
    /* What stands before the present position of a standard input is not meant. */
    bool fixed = S_ISREG(now.st_mode) || S_ISBLK(now.st_mode);
    off_t size = fixed && !standard ? lseek(s->fd, 0, SEEK_END) : -1;
    s->seekable = size >= 0 && lseek(s->fd, 0, SEEK_SET) == 0;
    if (s->seekable)
        s->image_bytes = s->file_bytes = (uint64_t)size;
    s->in = mem_alloc(IN_BYTES);
    for (unsigned i = 0; i < 2; i++)
        s->batches[i].bytes = mem_alloc(SOURCE_BATCH_BYTES);
    run_aside(run, begin, s);
    if (s->st != ST_OK)
        *e = s->err;
    else if (!s->is_stream && in_bytes(s) == 0)
        /* More likely what a command that failed wrote into a pipe than an image of nothing. */
        s->st = fail(e, ST_IO, "%s is empty: there is nothing to import", s->name);
    return s->st;
}

void source_close(struct source *s)
{
    wait(s);
    if (s->fd >= 0 && s->fd != STDIN_FILENO)
        close(s->fd);
    free(s->in);
    free(s->batches[0].bytes);
    free(s->batches[1].bytes);
}
