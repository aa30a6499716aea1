/*
 * Streams of export from the choices of an input: mostly such as a writer makes, with what is wrong
 * in them wrong on purpose; so that a fuzzer gets beyond the hash of the first frame.
 *
 * An input: first whether and where a bit is changed in the end, then frames. Each begins with a byte
 * that says its kind and how it is made.
 */
#ifndef FUZZ_STREAMS_H
#define FUZZ_STREAMS_H

#include <stdlib.h>

#include "base/hash.h"
#include "base/mem.h"
#include "cli/stream.h"
#include "fuzz.h"

#define MADE_BYTES_MAX (256u << 10)
#define MADE_FRAME_BYTES_MAX (1u << 20)
#define MADE_FRAMES_MAX 200u

struct made_stream {
    uint8_t *bytes;
    size_t len;
    bool flipped; /* a bit of it was changed: it must not be taken */
};

static inline void made_text(struct fuzz_input *in, char *out, size_t max)
{
    size_t len = fuzz_take(in, 1) % 16 == 15 ? max : fuzz_take(in, 1) % 5;
    memset(out, 'a' + (int)(fuzz_take(in, 1) % 3), len);
    out[len] = '\0';
}

/* A frame whose fields are all the input's, hashed as if a writer had made it. */
static inline size_t made_raw(struct stream_writer *w, struct fuzz_input *in, uint8_t *out)
{
    size_t len = min_u64(fuzz_take(in, 2) % 2000, fuzz_left(in));
    bool keeps_length = fuzz_take(in, 1) % 4 == 0;
    memset(out, 0, STREAM_HEAD_BYTES);
    for (unsigned i = 0; i < 24; i++)
        out[i] = (uint8_t)fuzz_take(in, 1);
    len = min_u64(len, fuzz_left(in));
    memcpy(out + STREAM_HEAD_BYTES, in->at, len);
    in->at += len;
    if (!keeps_length)
        put_le32(out + 4, (uint32_t)len);
    w->chain = hash64(out + STREAM_HEAD_BYTES, len, hash64(out, 24, w->chain));
    put_le64(out + 24, w->chain);
    return STREAM_HEAD_BYTES + len;
}

static inline size_t made_data(struct stream_writer *w, struct fuzz_input *in, bool pack,
                               uint64_t *at, uint8_t *out)
{
    uint32_t length = (uint32_t)(1 + fuzz_take(in, 2) * (fuzz_take(in, 1) % 8 == 0 ? 8 : 1));
    uint64_t seed = fuzz_take(in, 1);
    static uint8_t bytes[8 << 16];
    uint8_t *body = out + STREAM_HEAD_BYTES;
    /* Half of it noise, half alike, as chance has it. */
    for (uint32_t i = 0; i < length; i++)
        bytes[i] = (uint8_t)(seed & 1 ? hash_mix(seed, i / 4) >> 8 * (i % 4) : seed);
    size_t n = pack && length > 1 ? stream_pack(bytes, length, body) : 0;
    if (n == 0)
        memcpy(body, bytes, n = length);
    else if (seed > 240) /* packed data that can't be unpacked, or to another length */
        body[seed % n] ^= (uint8_t)(1u << seed % 8);
    n += stream_put_data(w, *at, length, body, n, out);
    *at += length;
    return n;
}

static inline size_t made_right(struct stream_writer *w, struct fuzz_input *in, unsigned how,
                                struct stream_section *last, uint64_t *at, uint8_t *out)
{
    unsigned flag = how / 8 % 2;
    switch (how % 8) {
    case 1: {
        struct stream_volume v = {.n_sections = fuzz_take(in, 1),
                                  .block_size = 4096u << fuzz_take(in, 1) % 6,
                                  .codec = (uint8_t)(fuzz_take(in, 1) % 4),
                                  .codec_level = (uint8_t)fuzz_take(in, 1)};
        made_text(in, v.name, NAME_BYTES_MAX);
        made_text(in, v.description, DESCRIPTION_BYTES_MAX);
        return stream_put_volume(w, &v, out);
    }
    case 2: {
        struct stream_section s = {.snapshot = flag,
                                   .size = 512 * (1 + fuzz_take(in, 2) % 4096),
                                   .created_ns = flag ? fuzz_take(in, 2) : 0};
        if (s.snapshot) {
            memset(s.id, (int)fuzz_take(in, 1), sizeof s.id);
            made_text(in, s.name, NAME_BYTES_MAX);
        }
        memcpy(s.base, last->id, sizeof s.base);
        strcpy(s.base_name, last->name);
        if (how >= 240) {
            memset(s.base, (int)fuzz_take(in, 1), sizeof s.base);
            made_text(in, s.base_name, NAME_BYTES_MAX);
        }
        *last = s;
        *at = 0;
        return stream_put_section(w, &s, out);
    }
    case 3:
        *at += fuzz_take(in, 2);
        return made_data(w, in, flag, at, out);
    case 4: {
        uint64_t length = 1 + fuzz_take(in, 3);
        *at += fuzz_take(in, 2);
        size_t n = stream_put_zero(w, *at, length, flag, out);
        *at += length;
        return n;
    }
    case 5:
        return stream_put_section_end(w, out);
    case 6:
        return stream_put_end(w, out);
    default:
        return made_raw(w, in, out);
    }
}

static inline size_t made_frame(struct stream_writer *w, struct fuzz_input *in,
                                struct stream_section *last, uint64_t *at, uint8_t *out)
{
    unsigned how = (unsigned)fuzz_take(in, 1);
    uint64_t chain = w->chain;
    size_t n = made_right(w, in, how, last, at, out);
    if (how / 16 == 14) { /* a byte is another, and the hash right all the same */
        size_t where = fuzz_take(in, 1) % n;
        out[where] ^= (uint8_t)fuzz_take(in, 1);
        w->chain = hash64(out + STREAM_HEAD_BYTES, n - STREAM_HEAD_BYTES, hash64(out, 24, chain));
        put_le64(out + 24, w->chain);
    }
    return n;
}

/* made->bytes is freed with free(). */
static inline void made_stream(struct made_stream *made, struct fuzz_input *in)
{
    struct stream_writer w;
    struct stream_section last = {0};
    uint64_t at = 0, flip = fuzz_take(in, 1), where = fuzz_take(in, 3);
    static uint8_t bytes[MADE_BYTES_MAX + MADE_FRAME_BYTES_MAX];
    size_t len = stream_put_begin(&w, bytes);
    for (unsigned n = 0; n < MADE_FRAMES_MAX && fuzz_left(in) && len < MADE_BYTES_MAX; n++)
        len += made_frame(&w, in, &last, &at, bytes + len);
    if (flip >= 240)
        bytes[where / 8 % len] ^= (uint8_t)(1u << where % 8);
    else if (flip >= 224)
        len = where % (len + 1);
    *made = (struct made_stream){mem_alloc(len + (len == 0)), len, flip >= 240};
    memcpy(made->bytes, bytes, len);
}

#endif
