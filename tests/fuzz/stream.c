/*
 * Any bytes as a stream of export: what import reads, complete and incremental.
 *
 * At stake: G5, a stream that is not what a writer made is refused before anything of it is used;
 * docs/stream.md says what one is.
 *
 * An input: whether it is the stream itself (1 byte), or says how to make one (streams.h).
 *
 * Oracle: all that was taken, written again, is byte for byte what was read; frames stand in the order
 * and at the places that docs/stream.md allows; nothing is taken behind a bit that was changed. A
 * refusal is ST_IO, or ST_UNSUP of a version, with a sentence. Bytes are read where they are told to
 * be and nowhere else.
 *
 * Code: src/cli/stream.c
 */
#include "streams.h"

#include <stdlib.h>

/* Bytes in memory of exactly the length, so that a sanitizer sees a read beyond it. */
static uint8_t *exact(const uint8_t *bytes, size_t len)
{
    uint8_t *copy = mem_alloc(len + (len == 0));
    if (len > 0)
        memcpy(copy, bytes, len);
    return copy;
}

static bool refused(enum status st, const struct err *e)
{
    CHECK(st == ST_OK || ((st == ST_IO || st == ST_UNSUP) && e->st == st && e->text[0]));
    return st != ST_OK;
}

/* What a writer says where the reader said `f`, `body`. */
static size_t write_again(struct stream_writer *w, const struct stream_reader *r,
                          const struct stream_frame *f, const uint8_t *body, uint8_t *out)
{
    switch (f->kind) {
    case STREAM_VOLUME:
        return stream_put_volume(w, &r->volume, out);
    case STREAM_SECTION:
        return stream_put_section(w, &r->section, out);
    case STREAM_DATA: {
        CHECK(f->packed == (f->body_len < f->length));
        size_t n = stream_put_data(w, f->offset, (uint32_t)f->length, body, f->body_len, out);
        memcpy(out + n, body, f->body_len);
        return n + f->body_len;
    }
    case STREAM_ZERO:
        return stream_put_zero(w, f->offset, f->length, f->hole, out);
    case STREAM_SECTION_END:
        return stream_put_section_end(w, out);
    case STREAM_END:
        return stream_put_end(w, out);
    }
    CHECK(false);
    return 0;
}

static void check_frame(const struct stream_reader *r, const struct stream_frame *f,
                        enum stream_kind before, uint64_t *end)
{
    bool ranged = f->kind == STREAM_DATA || f->kind == STREAM_ZERO;
    bool inside = before == STREAM_SECTION || before == STREAM_DATA || before == STREAM_ZERO;
    CHECK((f->kind == STREAM_VOLUME) == (before == 0));
    CHECK(!(ranged || f->kind == STREAM_SECTION_END) || inside);
    CHECK(f->kind != STREAM_SECTION || before == STREAM_VOLUME || before == STREAM_SECTION_END);
    CHECK(f->kind != STREAM_END || before == STREAM_SECTION_END);
    if (f->kind == STREAM_SECTION)
        *end = 0;
    if (ranged) {
        CHECK(f->length > 0 && f->offset >= *end && f->length <= r->section.size - f->offset);
        CHECK(f->kind == STREAM_ZERO || f->length <= STREAM_DATA_BYTES_MAX);
        *end = f->offset + f->length;
    }
    if (f->kind == STREAM_VOLUME)
        CHECK(name_valid(r->volume.name) && r->volume.codec <= CODEC_ZSTD);
    if (f->kind == STREAM_SECTION)
        CHECK(r->section.size % 512 == 0 && r->section.size > 0 &&
              r->section.snapshot == !stream_no_id(r->section.id));
}

/* Whether all of it was taken. */
static bool read_stream(const uint8_t *bytes, size_t len)
{
    struct stream_reader r;
    struct stream_writer w;
    struct stream_frame f;
    struct err e = {0};
    uint8_t begin[STREAM_BEGIN_BYTES];
    static uint8_t again[STREAM_RECORD_BYTES_MAX + STREAM_DATA_BYTES_MAX];
    uint64_t end = 0;
    (void)stream_is(bytes, len);
    if (len < STREAM_BEGIN_BYTES || refused(stream_take_begin(&r, bytes, &e), &e))
        return false;
    CHECK(stream_is(bytes, len) && stream_put_begin(&w, begin) == STREAM_BEGIN_BYTES);
    CHECK(memcmp(begin, bytes, sizeof begin) == 0);
    for (;;) {
        size_t at = r.position, left = len - at;
        enum stream_kind before = r.last;
        if (r.last == STREAM_END || left < STREAM_HEAD_BYTES) {
            bool whole = stream_ended(&r, left, &e) == ST_OK;
            CHECK(whole == (r.last == STREAM_END && left == 0));
            return whole;
        }
        uint8_t *head = exact(bytes + at, STREAM_HEAD_BYTES);
        enum status st = stream_take_head(&r, head, &f, &e);
        free(head);
        if (refused(st, &e))
            return false;
        CHECK(f.body_len <= STREAM_DATA_BYTES_MAX && f.at == at);
        if (len - r.position < f.body_len) {
            CHECK(stream_ended(&r, len - r.position, &e) == ST_IO);
            return false;
        }
        uint8_t *body = exact(bytes + r.position, f.body_len);
        st = stream_take_body(&r, &f, body, &e);
        if (!refused(st, &e)) {
            check_frame(&r, &f, before, &end);
            size_t n = write_again(&w, &r, &f, body, again);
            CHECK(n == r.position - at && memcmp(again, bytes + at, n) == 0);
            if (f.packed) {
                uint8_t *out = mem_alloc(f.length);
                (void)refused(stream_unpack(&f, body, out, &e), &e);
                free(out);
            }
        }
        free(body);
        if (st != ST_OK)
            return false;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = fuzz_input(data, size);
    if (fuzz_take(&in, 1) % 4 == 0) {
        uint8_t *bytes = exact(in.at, fuzz_left(&in));
        (void)read_stream(bytes, fuzz_left(&in));
        free(bytes);
        return 0;
    }
    struct made_stream made;
    made_stream(&made, &in);
    CHECK(!read_stream(made.bytes, made.len) || !made.flipped);
    free(made.bytes);
    return 0;
}
