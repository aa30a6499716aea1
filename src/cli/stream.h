/*
 * The stream of export and import, between records and bytes (docs/stream.md). No files, no
 * volumes, no waiting: so it can be tested against any bytes. It stands with the commands, since
 * nothing below them knows of it.
 *
 * A writer makes one frame after the other. A reader is given the fixed part of a frame, says
 * how long the rest is, is given that, and says what the frame was; what is not exactly what a
 * writer could have made is refused with a sentence that names the position.
 */
#ifndef CLI_STREAM_H
#define CLI_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "base/status.h"
#include "volume/records.h"

#define STREAM_BEGIN_BYTES 24u /* before the first frame */
#define STREAM_MARK_BYTES 16u  /* of these, what it is known by */
#define STREAM_HEAD_BYTES 32u  /* the fixed part of a frame */
#define STREAM_DATA_BYTES_MAX (1u << 20) /* of the volume, in one frame; no body is longer */
#define STREAM_SECTIONS_MAX (SNAPSHOTS_MAX + 1ull)
/* The longest frame that is not DATA. */
#define STREAM_RECORD_BYTES_MAX (STREAM_HEAD_BYTES + 64u + 2 * NAME_BYTES_MAX + DESCRIPTION_BYTES_MAX)

struct stream_volume {
    uint64_t n_sections;
    uint32_t block_size;
    uint8_t codec, codec_level;
    uint64_t created_ns;
    char name[NAME_BYTES_MAX + 1];
    char description[DESCRIPTION_BYTES_MAX + 1];
};

struct stream_section {
    bool snapshot; /* else the volume itself: without name, id, created_ns */
    uint8_t id[SNAPSHOT_ID_BYTES], base[SNAPSHOT_ID_BYTES]; /* base all 0: complete */
    uint64_t size;                                          /* bytes */
    uint64_t created_ns;
    char name[NAME_BYTES_MAX + 1];
    char base_name[NAME_BYTES_MAX + 1]; /* for messages; empty where it is complete */
};

/* Whether an id is all 0. */
bool stream_no_id(const uint8_t id[SNAPSHOT_ID_BYTES]);

/* --- writing ------------------------------------------------------------------------------- */

struct stream_writer {
    uint64_t chain; /* hash of the last frame */
    uint64_t n_sections, n_frames, data_bytes, zero_bytes;
};

/* Each writes to `out`, all of a frame but of DATA, and returns how many bytes. The order is the
 * caller's duty. */
size_t stream_put_begin(struct stream_writer *w, uint8_t out[STREAM_BEGIN_BYTES]);
size_t stream_put_volume(struct stream_writer *w, const struct stream_volume *v,
                         uint8_t out[STREAM_RECORD_BYTES_MAX]);
size_t stream_put_section(struct stream_writer *w, const struct stream_section *s,
                          uint8_t out[STREAM_RECORD_BYTES_MAX]);
/* The fixed part; the body, `body_len` bytes at `body`, goes behind it: `length` bytes of the
 * volume, packed where that is shorter. */
size_t stream_put_data(struct stream_writer *w, uint64_t offset, uint32_t length, const void *body,
                       size_t body_len, uint8_t out[STREAM_HEAD_BYTES]);
size_t stream_put_zero(struct stream_writer *w, uint64_t offset, uint64_t length, bool hole,
                       uint8_t out[STREAM_HEAD_BYTES]);
size_t stream_put_section_end(struct stream_writer *w, uint8_t out[STREAM_RECORD_BYTES_MAX]);
size_t stream_put_end(struct stream_writer *w, uint8_t out[STREAM_RECORD_BYTES_MAX]);

/* Packs `len` bytes into `out`, which has room for `len`. Returns the packed length, or 0 where it
 * would not be shorter: the bytes themselves are the body then. Any thread. */
size_t stream_pack(const void *data, size_t len, void *out);

/* --- reading ------------------------------------------------------------------------------- */

enum stream_kind {
    STREAM_VOLUME = 1,
    STREAM_SECTION,
    STREAM_DATA,
    STREAM_ZERO,
    STREAM_SECTION_END,
    STREAM_END,
};

struct stream_frame {
    enum stream_kind kind;
    uint64_t at;       /* where it begins in the stream */
    uint32_t body_len; /* bytes */
    uint64_t offset, length; /* DATA, ZERO */
    bool packed;             /* DATA: stream_unpack() gives the bytes */
    bool hole;               /* ZERO */
    uint64_t chain, hash;    /* the reader's */
};

struct stream_reader {
    uint64_t position; /* bytes taken so far */
    uint64_t chain;
    enum stream_kind last; /* 0: none */
    struct stream_volume volume;   /* from its frame on */
    struct stream_section section; /* the one in progress, or the last */
    uint64_t n_sections, next_offset, n_frames, data_bytes, zero_bytes;
};

/* Whether a file whose first `len` bytes these are is a stream of ours, of whatever version, or one
 * that is damaged there or was cut off: then stream_take_begin() refuses it, or stream_ended(). */
bool stream_is(const uint8_t *mark, size_t len);

/* The bytes before the first frame. All that follow: ST_IO or (another version) ST_UNSUP with a sentence, after
 * which the reader is not used any more. */
enum status stream_take_begin(struct stream_reader *r, const uint8_t begin[STREAM_BEGIN_BYTES],
                              struct err *e);

/* The fixed part of the next frame. Only frame->body_len means something yet; it is at most
 * STREAM_DATA_BYTES_MAX. */
enum status stream_take_head(struct stream_reader *r, const uint8_t head[STREAM_HEAD_BYTES],
                             struct stream_frame *frame, struct err *e);

/* The frame's body: now all of it can be believed. */
enum status stream_take_body(struct stream_reader *r, struct stream_frame *frame, const void *body,
                             struct err *e);

/* The bytes of a DATA frame that is packed: frame->length bytes to `out`. Any thread. */
enum status stream_unpack(const struct stream_frame *frame, const void *body, void *out,
                          struct err *e);

/* There are only `got` more bytes where `want` were asked for: whether that is the right end (it is
 * behind END, with got == 0), or the sentence about what is wrong. */
enum status stream_ended(const struct stream_reader *r, size_t got, struct err *e);

#endif
