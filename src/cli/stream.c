/* The stream of export and import, between records and bytes; see stream.h. */
#include "cli/stream.h"

#include <inttypes.h>
#include <zstd.h>

#include "base/check.h"
#include "base/hash.h"

#define VERSION 1u
#define HASHED_BYTES 24u /* of a frame's fixed part */
#define SIZE_UNIT 512u
#define SIZE_BYTES_MAX (1ull << 62)
#define BLOCK_BYTES_MIN 4096u
#define BLOCK_BYTES_MAX 65536u
/* Fast rather than small: the volume's own blocks are not compressed any harder either. */
#define PACK_LEVEL 1

enum { DATA_PLAIN = 0, DATA_PACKED = 1 };
enum { ZERO_HOLE = 0, ZERO_ALLOCATED = 1 };

/* No image begins like that by chance: with fewer of them changed, it is a damaged stream. */
#define MARK_SAME_MIN 12u

static const uint8_t mark_bytes[STREAM_MARK_BYTES + 1] = "fdb-nbd stream\r\n";

/* Bodies of fixed size, and where their texts begin. */
#define VOLUME_TEXT_AT 24u
#define SECTION_TEXT_AT 56u
#define SECTION_END_BYTES 24u
#define END_BYTES 8u

bool stream_no_id(const uint8_t id[SNAPSHOT_ID_BYTES])
{
    static const uint8_t none[SNAPSHOT_ID_BYTES];
    return memcmp(id, none, sizeof none) == 0;
}

static uint64_t frame_hash(uint64_t chain, const uint8_t head[HASHED_BYTES], const void *body,
                           size_t len)
{
    return hash64(body, len, hash64(head, HASHED_BYTES, chain));
}

/* --- writing ------------------------------------------------------------------------------- */

static void put_head(struct stream_writer *w, enum stream_kind kind, unsigned how, uint64_t offset,
                     uint64_t length, const void *body, size_t body_len, uint8_t *out)
{
    memset(out, 0, STREAM_HEAD_BYTES);
    out[0] = (uint8_t)kind;
    out[1] = (uint8_t)how;
    put_le32(out + 4, (uint32_t)body_len);
    put_le64(out + 8, offset);
    put_le64(out + 16, length);
    w->chain = frame_hash(w->chain, out, body, body_len);
    put_le64(out + HASHED_BYTES, w->chain);
}

/* A frame whose body stands behind the fixed part already. */
static size_t put_record(struct stream_writer *w, enum stream_kind kind, size_t body_len,
                         uint8_t *out)
{
    put_head(w, kind, 0, 0, 0, out + STREAM_HEAD_BYTES, body_len, out);
    return STREAM_HEAD_BYTES + body_len;
}

static uint8_t *put_text(uint8_t *at, const char *text)
{
    size_t len = strlen(text);
    put_le16(at, (uint16_t)len);
    memcpy(at + 2, text, len);
    return at + 2 + len;
}

size_t stream_put_begin(struct stream_writer *w, uint8_t out[STREAM_BEGIN_BYTES])
{
    memcpy(out, mark_bytes, STREAM_MARK_BYTES);
    put_le32(out + STREAM_MARK_BYTES, VERSION);
    put_le32(out + STREAM_MARK_BYTES + 4, 0);
    *w = (struct stream_writer){.chain = hash64(out, STREAM_BEGIN_BYTES, 0)};
    return STREAM_BEGIN_BYTES;
}

size_t stream_put_volume(struct stream_writer *w, const struct stream_volume *v,
                         uint8_t out[STREAM_RECORD_BYTES_MAX])
{
    uint8_t *body = out + STREAM_HEAD_BYTES;
    memset(body, 0, VOLUME_TEXT_AT);
    put_le64(body, v->n_sections);
    put_le32(body + 8, v->block_size);
    body[12] = v->codec;
    body[13] = v->codec_level;
    put_le64(body + 16, v->created_ns);
    uint8_t *end = put_text(put_text(body + VOLUME_TEXT_AT, v->name), v->description);
    return put_record(w, STREAM_VOLUME, (size_t)(end - body), out);
}

size_t stream_put_section(struct stream_writer *w, const struct stream_section *s,
                          uint8_t out[STREAM_RECORD_BYTES_MAX])
{
    uint8_t *body = out + STREAM_HEAD_BYTES;
    memset(body, 0, SECTION_TEXT_AT);
    body[0] = s->snapshot;
    memcpy(body + 8, s->id, SNAPSHOT_ID_BYTES);
    memcpy(body + 24, s->base, SNAPSHOT_ID_BYTES);
    put_le64(body + 40, s->size);
    put_le64(body + 48, s->created_ns);
    uint8_t *end = put_text(put_text(body + SECTION_TEXT_AT, s->name), s->base_name);
    w->n_sections++;
    w->n_frames = w->data_bytes = w->zero_bytes = 0;
    return put_record(w, STREAM_SECTION, (size_t)(end - body), out);
}

size_t stream_put_data(struct stream_writer *w, uint64_t offset, uint32_t length, const void *body,
                       size_t body_len, uint8_t out[STREAM_HEAD_BYTES])
{
    CHECK(length > 0 && length <= STREAM_DATA_BYTES_MAX && body_len <= length);
    w->n_frames++;
    w->data_bytes += length;
    put_head(w, STREAM_DATA, body_len < length ? DATA_PACKED : DATA_PLAIN, offset, length, body,
             body_len, out);
    return STREAM_HEAD_BYTES;
}

size_t stream_put_zero(struct stream_writer *w, uint64_t offset, uint64_t length, bool hole,
                       uint8_t out[STREAM_HEAD_BYTES])
{
    CHECK(length > 0);
    w->n_frames++;
    w->zero_bytes += length;
    put_head(w, STREAM_ZERO, hole ? ZERO_HOLE : ZERO_ALLOCATED, offset, length, NULL, 0, out);
    return STREAM_HEAD_BYTES;
}

size_t stream_put_section_end(struct stream_writer *w, uint8_t out[STREAM_RECORD_BYTES_MAX])
{
    uint8_t *body = out + STREAM_HEAD_BYTES;
    put_le64(body, w->n_frames);
    put_le64(body + 8, w->data_bytes);
    put_le64(body + 16, w->zero_bytes);
    return put_record(w, STREAM_SECTION_END, SECTION_END_BYTES, out);
}

size_t stream_put_end(struct stream_writer *w, uint8_t out[STREAM_RECORD_BYTES_MAX])
{
    put_le64(out + STREAM_HEAD_BYTES, w->n_sections);
    return put_record(w, STREAM_END, END_BYTES, out);
}

size_t stream_pack(const void *data, size_t len, void *out)
{
    /* An error is that it needs more room: it would not be shorter. */
    size_t n = ZSTD_compress(out, len - 1, data, len, PACK_LEVEL);
    return ZSTD_isError(n) ? 0 : n;
}

/* --- reading ------------------------------------------------------------------------------- */

static enum status damaged(uint64_t at, struct err *e, const char *what)
{
    return fail(e, ST_IO, "the stream is damaged at byte %" PRIu64 ": %s", at, what);
}

bool stream_is(const uint8_t *mark, size_t len)
{
    unsigned same = 0;
    if (len < STREAM_MARK_BYTES)
        return len > 0 && memcmp(mark, mark_bytes, len) == 0;
    for (size_t i = 0; i < STREAM_MARK_BYTES; i++)
        same += mark[i] == mark_bytes[i];
    return same >= MARK_SAME_MIN;
}

enum status stream_take_begin(struct stream_reader *r, const uint8_t begin[STREAM_BEGIN_BYTES],
                              struct err *e)
{
    uint32_t version = get_le32(begin + STREAM_MARK_BYTES);
    *r = (struct stream_reader){.position = STREAM_BEGIN_BYTES,
                                .chain = hash64(begin, STREAM_BEGIN_BYTES, 0)};
    if (memcmp(begin, mark_bytes, STREAM_MARK_BYTES) != 0)
        return damaged(0, e, "it does not begin as one");
    if (version != VERSION)
        return fail(e, ST_UNSUP,
                    "the stream has version %u at byte %u, and this fdb-nbd knows version %u only: "
                    "if it is not damaged, use a newer fdb-nbd",
                    version, STREAM_MARK_BYTES, VERSION);
    if (get_le32(begin + STREAM_MARK_BYTES + 4) != 0)
        return damaged(STREAM_MARK_BYTES + 4, e, "its beginning is not one of this version");
    return ST_OK;
}

/* Whether a frame of this kind may stand here. */
static bool may_follow(const struct stream_reader *r, enum stream_kind kind)
{
    bool in_section = r->last == STREAM_SECTION || r->last == STREAM_DATA || r->last == STREAM_ZERO;
    switch (kind) {
    case STREAM_VOLUME:
        return r->last == 0;
    case STREAM_SECTION:
        return (r->last == STREAM_VOLUME || r->last == STREAM_SECTION_END) &&
               r->n_sections < r->volume.n_sections && (r->n_sections == 0 || r->section.snapshot);
    case STREAM_DATA:
    case STREAM_ZERO:
    case STREAM_SECTION_END:
        return in_section;
    case STREAM_END:
        return r->last == STREAM_SECTION_END && r->n_sections == r->volume.n_sections;
    }
    return false;
}

/* Whether the body can be of this length. */
static bool length_possible(const struct stream_frame *f)
{
    switch (f->kind) {
    case STREAM_VOLUME:
        return f->body_len >= VOLUME_TEXT_AT + 4 &&
               f->body_len <= VOLUME_TEXT_AT + 4 + NAME_BYTES_MAX + DESCRIPTION_BYTES_MAX;
    case STREAM_SECTION:
        return f->body_len >= SECTION_TEXT_AT + 4 &&
               f->body_len <= SECTION_TEXT_AT + 4 + 2 * NAME_BYTES_MAX;
    case STREAM_DATA:
        return f->length > 0 && f->length <= STREAM_DATA_BYTES_MAX &&
               (f->packed ? f->body_len > 0 && f->body_len < f->length : f->body_len == f->length);
    case STREAM_ZERO:
        return f->body_len == 0;
    case STREAM_SECTION_END:
        return f->body_len == SECTION_END_BYTES;
    case STREAM_END:
        return f->body_len == END_BYTES;
    }
    return false;
}

enum status stream_take_head(struct stream_reader *r, const uint8_t head[STREAM_HEAD_BYTES],
                             struct stream_frame *f, struct err *e)
{
    uint8_t kind = head[0], how = head[1];
    *f = (struct stream_frame){.kind = (enum stream_kind)kind,
                               .at = r->position,
                               .body_len = get_le32(head + 4),
                               .offset = get_le64(head + 8),
                               .length = get_le64(head + 16),
                               .packed = kind == STREAM_DATA && how == DATA_PACKED,
                               .hole = kind == STREAM_ZERO && how == ZERO_HOLE,
                               .chain = hash64(head, HASHED_BYTES, r->chain),
                               .hash = get_le64(head + HASHED_BYTES)};
    bool ranged = kind == STREAM_DATA || kind == STREAM_ZERO;
    if (kind < STREAM_VOLUME || kind > STREAM_END || !may_follow(r, f->kind))
        return damaged(f->at, e, "no such part belongs here");
    if (how > (ranged ? 1 : 0) || get_le16(head + 2) != 0 ||
        (!ranged && (f->offset != 0 || f->length != 0)) || !length_possible(f))
        return damaged(f->at, e, "the head of a part makes no sense");
    if (ranged && (f->length == 0 || f->offset < r->next_offset || f->offset > r->section.size ||
                   f->length > r->section.size - f->offset))
        return damaged(f->at, e, "a range is not where one can be");
    r->position += STREAM_HEAD_BYTES;
    return ST_OK;
}

/* Reads a text, and moves *at behind it. */
static bool take_text(const uint8_t **at, const uint8_t *end, char *out, size_t max)
{
    if (end - *at < 2)
        return false;
    size_t len = get_le16(*at);
    *at += 2;
    if (len > max || (size_t)(end - *at) < len || memchr(*at, 0, len))
        return false;
    memcpy(out, *at, len);
    out[len] = '\0';
    *at += len;
    return true;
}

static bool take_volume(struct stream_reader *r, const uint8_t *body, size_t len)
{
    struct stream_volume *v = &r->volume;
    const uint8_t *at = body + VOLUME_TEXT_AT, *end = body + len;
    v->n_sections = get_le64(body);
    v->block_size = get_le32(body + 8);
    v->codec = body[12];
    v->codec_level = body[13];
    v->created_ns = get_le64(body + 16);
    return get_le16(body + 14) == 0 && v->n_sections > 0 && v->n_sections <= STREAM_SECTIONS_MAX &&
           v->block_size >= BLOCK_BYTES_MIN && v->block_size <= BLOCK_BYTES_MAX &&
           (v->block_size & (v->block_size - 1)) == 0 && v->codec <= CODEC_ZSTD &&
           take_text(&at, end, v->name, NAME_BYTES_MAX) && name_valid(v->name) &&
           take_text(&at, end, v->description, DESCRIPTION_BYTES_MAX) && at == end;
}

static bool take_section(struct stream_reader *r, const uint8_t *body, size_t len)
{
    static const uint8_t zeros[7];
    const struct stream_section last = r->section;
    struct stream_section *s = &r->section;
    const uint8_t *at = body + SECTION_TEXT_AT, *end = body + len;
    *s = (struct stream_section){.snapshot = body[0] == 1};
    memcpy(s->id, body + 8, SNAPSHOT_ID_BYTES);
    memcpy(s->base, body + 24, SNAPSHOT_ID_BYTES);
    s->size = get_le64(body + 40);
    s->created_ns = get_le64(body + 48);
    if (body[0] > 1 || memcmp(body + 1, zeros, sizeof zeros) != 0 ||
        !take_text(&at, end, s->name, NAME_BYTES_MAX) ||
        !take_text(&at, end, s->base_name, NAME_BYTES_MAX) || at != end || s->size < SIZE_UNIT ||
        s->size > SIZE_BYTES_MAX || s->size % SIZE_UNIT != 0)
        return false;
    if (stream_no_id(s->base) ? s->base_name[0] != '\0' : !name_valid(s->base_name))
        return false;
    if (r->n_sections > 0 && (memcmp(s->base, last.id, SNAPSHOT_ID_BYTES) != 0 ||
                              strcmp(s->base_name, last.name) != 0))
        return false;
    r->n_sections++;
    r->next_offset = r->n_frames = r->data_bytes = r->zero_bytes = 0;
    if (s->snapshot)
        return !stream_no_id(s->id) && name_valid(s->name) &&
               memcmp(s->id, s->base, SNAPSHOT_ID_BYTES) != 0;
    return stream_no_id(s->id) && s->name[0] == '\0' && s->created_ns == 0 &&
           r->n_sections == r->volume.n_sections;
}

enum status stream_take_body(struct stream_reader *r, struct stream_frame *f, const void *body,
                             struct err *e)
{
    const uint8_t *bytes = body;
    if (hash64(body, f->body_len, f->chain) != f->hash)
        return damaged(f->at, e, "the hash is not that of what stands there and before");
    bool good = true;
    switch (f->kind) {
    case STREAM_VOLUME:
        good = take_volume(r, bytes, f->body_len);
        break;
    case STREAM_SECTION:
        good = take_section(r, bytes, f->body_len);
        break;
    case STREAM_DATA:
    case STREAM_ZERO:
        r->next_offset = f->offset + f->length;
        r->n_frames++;
        *(f->kind == STREAM_DATA ? &r->data_bytes : &r->zero_bytes) += f->length;
        break;
    case STREAM_SECTION_END:
        good = get_le64(bytes) == r->n_frames && get_le64(bytes + 8) == r->data_bytes &&
               get_le64(bytes + 16) == r->zero_bytes;
        break;
    case STREAM_END:
        good = get_le64(bytes) == r->n_sections;
        break;
    }
    if (!good)
        return damaged(f->at, e, "a part says what can't be");
    r->chain = f->hash;
    r->last = f->kind;
    r->position += f->body_len;
    return ST_OK;
}

enum status stream_unpack(const struct stream_frame *f, const void *body, void *out, struct err *e)
{
    if (ZSTD_decompress(out, f->length, body, f->body_len) != f->length)
        return damaged(f->at, e, "packed data can't be unpacked");
    return ST_OK;
}

enum status stream_ended(const struct stream_reader *r, size_t got, struct err *e)
{
    if (r->last != STREAM_END)
        return fail(e, ST_IO, "the stream is cut off at byte %" PRIu64 ": it has no end",
                    r->position + got);
    if (got > 0)
        return damaged(r->position, e, "something follows behind its end");
    return ST_OK;
}
