/*
 * The file an import comes from: an image, or a stream of export. Both are read, checked and
 * unpacked on a worker thread, into batches of ranges that hold data or zeros, so that one batch
 * is made while the one before is written to a volume.
 */
#ifndef CLI_SOURCE_H
#define CLI_SOURCE_H

#include "cli/run.h"
#include "cli/stream.h"

#define SOURCE_ITEMS_MAX 256u
#define SOURCE_BATCH_BYTES (4u << 20)

/* What comes behind a batch. */
enum source_event {
    SOURCE_MORE,        /* the next batch */
    SOURCE_SECTION,     /* a state begins: batch.section */
    SOURCE_SECTION_END, /* it is complete */
    SOURCE_END,         /* all is complete, and whole */
};

struct source_item {
    uint64_t offset, length;
    const uint8_t *bytes; /* the batch's; NULL: zeros */
    bool hole;            /* zeros: they take no space */
};

struct source_batch {
    struct source_item items[SOURCE_ITEMS_MAX];
    unsigned n;
    enum source_event event;
    struct stream_section section;
    uint64_t position; /* bytes of the file that were taken so far */

    uint8_t *bytes; /* private */
    size_t len;
};

struct source {
    bool is_stream;
    struct stream_volume volume; /* of a stream */
    uint64_t image_bytes;        /* of an image; UINT64_MAX: not known before its end */
    uint64_t file_bytes;         /* how many there will be; 0: not known */

    struct run *run; /* private, from here on */
    const char *name;
    int fd;
    bool seekable;
    uint64_t position;
    uint8_t *in; /* what was read ahead: [in_at, in_end) */
    size_t in_at, in_end;
    bool ended;
    struct stream_reader reader;
    struct source_batch batches[2];
    unsigned filling;
    struct env_work work;
    bool working, started;
    enum status st;
    struct err err;
};

/* Opens FILE, "-" being standard input, and reads its beginning. `name` must stay. */
enum status source_open(struct source *s, struct run *run, const char *name, struct err *e);

/* The next batch: until the next call. ST_IO with a sentence that names the position: it is damaged,
 * or cut off. */
enum status source_next(struct source *s, const struct source_batch **out, struct err *e);

/* Always to be called. */
void source_close(struct source *s);

#endif
