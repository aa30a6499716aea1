/*
 * Records between structures and bytes.
 *
 * One writer and one reader carry a cursor over the bytes; each record's two functions
 * name its fields in the stored order, so that the format can be read off here. A decode
 * checks the hash before it looks at a field, and what it looks at it still bounds: a
 * structure it hands out is one that an encode could have been given.
 */
#include "volume/records.h"

#include "base/check.h"
#include "base/hash.h"

#define RECORD_VERSION 1
#define SESSION_VERSION 2 /* 1 did not say which process it was */
#define STATE_VERSION 2   /* 1 did not say what clients changed last */
#define HEADER_VERSION_IMPORT 2 /* with the base of an import that is not complete */
#define MAIL_VERSION 2    /* with what is asked about a volume's history */
#define ANSWER_VERSION 2  /* with a number */
#define TRASH_VERSION 2   /* of several epochs */
#define HASH_BYTES 8u
#define SIZE_UNIT 512u
#define SIZE_MAX_BYTES (1ull << 62)

struct writer {
    uint8_t *out;
    size_t len;
};

static uint8_t *put_room(struct writer *w, size_t n)
{
    CHECK(n <= RECORD_BYTES_MAX - HASH_BYTES - w->len);
    uint8_t *at = w->out + w->len;
    w->len += n;
    return at;
}

static void put_u8(struct writer *w, uint8_t v)
{
    *put_room(w, 1) = v;
}

static void put_u32(struct writer *w, uint32_t v)
{
    put_le32(put_room(w, 4), v);
}

static void put_u64(struct writer *w, uint64_t v)
{
    put_le64(put_room(w, 8), v);
}

static void put_raw(struct writer *w, const void *data, size_t len)
{
    memcpy(put_room(w, len), data, len);
}

/* `max`: the most bytes the text may have; it is zero-terminated within max + 1. */
static void put_text(struct writer *w, const char *text, size_t max)
{
    size_t len = strnlen(text, max + 1);
    CHECK(len <= max);
    put_le16(put_room(w, 2), (uint16_t)len);
    put_raw(w, text, len);
}

static struct writer write_begin_version(uint8_t *out, uint8_t version)
{
    struct writer w = {.out = out};
    put_u8(&w, version);
    return w;
}

static struct writer write_begin(uint8_t *out)
{
    return write_begin_version(out, RECORD_VERSION);
}

static uint64_t record_hash(struct slice key, const uint8_t *bytes, size_t len)
{
    return hash64(bytes, len, hash64(key.data, key.len, 0));
}

static size_t write_end(struct writer *w, struct slice key)
{
    put_le64(w->out + w->len, record_hash(key, w->out, w->len));
    return w->len + HASH_BYTES;
}

/* `ok` goes false at the first field that is not whole or not possible; what is read
 * after that is zero. */
struct reader {
    const uint8_t *at, *end;
    uint8_t version;
    bool ok;
};

static const uint8_t *get_room(struct reader *r, size_t n)
{
    if (!r->ok || (size_t)(r->end - r->at) < n) {
        r->ok = false;
        return NULL;
    }
    const uint8_t *at = r->at;
    r->at += n;
    return at;
}

static uint8_t get_u8(struct reader *r)
{
    const uint8_t *at = get_room(r, 1);
    return at ? *at : 0;
}

static uint32_t get_u32(struct reader *r)
{
    const uint8_t *at = get_room(r, 4);
    return at ? get_le32(at) : 0;
}

static uint64_t get_u64(struct reader *r)
{
    const uint8_t *at = get_room(r, 8);
    return at ? get_le64(at) : 0;
}

static void get_raw(struct reader *r, void *out, size_t len)
{
    const uint8_t *at = get_room(r, len);
    if (at)
        memcpy(out, at, len);
}

static void get_text(struct reader *r, char *out, size_t max)
{
    const uint8_t *at = get_room(r, 2);
    size_t len = at ? get_le16(at) : 0;
    if (len > max)
        r->ok = false;
    at = get_room(r, len);
    out[0] = '\0';
    if (!at)
        return;
    if (memchr(at, 0, len)) {
        r->ok = false;
        return;
    }
    memcpy(out, at, len);
    out[len] = '\0';
}

static void require(struct reader *r, bool possible)
{
    if (!possible)
        r->ok = false;
}

/* Takes records of versions 1 to `newest`. */
static struct reader read_begin_version(struct slice key, struct slice bytes, uint8_t newest)
{
    struct reader r = {.ok = bytes.len >= 1 + HASH_BYTES && bytes.len <= RECORD_BYTES_MAX};
    if (!r.ok)
        return r;
    r.at = bytes.data;
    r.end = r.at + bytes.len - HASH_BYTES;
    r.ok = get_le64(r.end) == record_hash(key, r.at, bytes.len - HASH_BYTES);
    r.version = get_u8(&r);
    r.ok = r.ok && r.version >= 1 && r.version <= newest;
    return r;
}

static struct reader read_begin(struct slice key, struct slice bytes)
{
    return read_begin_version(key, bytes, RECORD_VERSION);
}

static bool read_end(const struct reader *r)
{
    return r->ok && r->at == r->end;
}

static void put_features(struct writer *w, const struct features *f)
{
    put_u64(w, f->compat);
    put_u64(w, f->ro_compat);
    put_u64(w, f->incompat);
}

static void get_features(struct reader *r, struct features *f)
{
    f->compat = get_u64(r);
    f->ro_compat = get_u64(r);
    f->incompat = get_u64(r);
}

size_t meta_encode(const struct meta_record *rec, struct slice key, uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin(out);
    put_u32(&w, rec->format);
    put_features(&w, &rec->features);
    put_raw(&w, rec->uuid, sizeof rec->uuid);
    put_u64(&w, rec->created_ns);
    return write_end(&w, key);
}

bool meta_decode(struct slice key, struct slice bytes, struct meta_record *rec)
{
    struct reader r = read_begin(key, bytes);
    *rec = (struct meta_record){.format = get_u32(&r)};
    get_features(&r, &rec->features);
    get_raw(&r, rec->uuid, sizeof rec->uuid);
    rec->created_ns = get_u64(&r);
    return read_end(&r);
}

size_t counter_encode(const struct counter_record *rec, struct slice key,
                      uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin(out);
    put_u64(&w, rec->next_branch);
    return write_end(&w, key);
}

bool counter_decode(struct slice key, struct slice bytes, struct counter_record *rec)
{
    struct reader r = read_begin(key, bytes);
    *rec = (struct counter_record){.next_branch = get_u64(&r)};
    return read_end(&r);
}

size_t name_encode(const struct name_record *rec, struct slice key, uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin(out);
    put_u64(&w, rec->branch);
    return write_end(&w, key);
}

bool name_decode(struct slice key, struct slice bytes, struct name_record *rec)
{
    struct reader r = read_begin(key, bytes);
    *rec = (struct name_record){.branch = get_u64(&r)};
    return read_end(&r);
}

size_t header_encode(const struct header_record *rec, struct slice key,
                     uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w =
        write_begin_version(out, rec->import_base ? HEADER_VERSION_IMPORT : RECORD_VERSION);
    put_features(&w, &rec->features);
    put_u64(&w, rec->size);
    put_u32(&w, rec->block_size);
    put_u8(&w, rec->codec);
    put_u8(&w, rec->codec_level);
    put_u64(&w, rec->epoch);
    put_u64(&w, rec->parent_branch);
    put_u64(&w, rec->parent_epoch);
    put_u64(&w, rec->created_ns);
    put_text(&w, rec->description, DESCRIPTION_BYTES_MAX);
    if (rec->import_base)
        put_u64(&w, rec->import_base);
    return write_end(&w, key);
}

bool header_decode(struct slice key, struct slice bytes, struct header_record *rec)
{
    struct reader r = read_begin_version(key, bytes, HEADER_VERSION_IMPORT);
    *rec = (struct header_record){0};
    get_features(&r, &rec->features);
    rec->size = get_u64(&r);
    rec->block_size = get_u32(&r);
    rec->codec = get_u8(&r);
    rec->codec_level = get_u8(&r);
    rec->epoch = get_u64(&r);
    rec->parent_branch = get_u64(&r);
    rec->parent_epoch = get_u64(&r);
    rec->created_ns = get_u64(&r);
    get_text(&r, rec->description, DESCRIPTION_BYTES_MAX);
    if (r.version >= HEADER_VERSION_IMPORT) {
        rec->import_base = get_u64(&r);
        require(&r, rec->import_base > 0 && rec->import_base < rec->epoch);
    }
    /* Everything above divides by the block size and multiplies up to the size. */
    require(&r, rec->block_size >= 4096 && rec->block_size <= 65536 &&
                    (rec->block_size & (rec->block_size - 1)) == 0);
    require(&r,
            rec->size >= SIZE_UNIT && rec->size % SIZE_UNIT == 0 && rec->size <= SIZE_MAX_BYTES);
    require(&r, rec->epoch >= 1 && (rec->parent_branch == 0) == (rec->parent_epoch == 0));
    return read_end(&r);
}

size_t ancestry_encode(const struct ancestry_record *rec, struct slice key,
                       uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin(out);
    CHECK(rec->n_segments <= ANCESTRY_STORED_MAX);
    put_u64(&w, rec->after);
    put_u8(&w, (uint8_t)rec->n_segments);
    for (uint32_t i = 0; i < rec->n_segments; i++) {
        put_u64(&w, rec->segments[i].branch);
        put_u64(&w, rec->segments[i].after);
        put_u64(&w, rec->segments[i].upto);
    }
    return write_end(&w, key);
}

bool ancestry_decode(struct slice key, struct slice bytes, struct ancestry_record *rec)
{
    struct reader r = read_begin(key, bytes);
    *rec = (struct ancestry_record){.after = get_u64(&r)};
    rec->n_segments = get_u8(&r);
    if (rec->n_segments > ANCESTRY_STORED_MAX) {
        rec->n_segments = 0;
        return false;
    }
    for (uint32_t i = 0; i < rec->n_segments; i++) {
        struct ancestry_segment *s = &rec->segments[i];
        s->branch = get_u64(&r);
        s->after = get_u64(&r);
        s->upto = get_u64(&r);
        require(&r, s->branch > 0 && s->after < s->upto && s->upto < UINT64_MAX);
    }
    return read_end(&r);
}

size_t snapshot_encode(const struct snapshot_record *rec, struct slice key,
                       uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin(out);
    put_text(&w, rec->name, NAME_BYTES_MAX);
    put_raw(&w, rec->id, sizeof rec->id);
    put_u8(&w, rec->removed);
    put_u64(&w, rec->size);
    put_u64(&w, rec->data_blocks);
    put_u64(&w, rec->created_ns);
    return write_end(&w, key);
}

bool snapshot_decode(struct slice key, struct slice bytes, struct snapshot_record *rec)
{
    struct reader r = read_begin(key, bytes);
    *rec = (struct snapshot_record){0};
    get_text(&r, rec->name, NAME_BYTES_MAX);
    get_raw(&r, rec->id, sizeof rec->id);
    rec->removed = get_u8(&r);
    rec->size = get_u64(&r);
    rec->data_blocks = get_u64(&r);
    rec->created_ns = get_u64(&r);
    require(&r, rec->removed <= 1 && name_valid(rec->name));
    require(&r,
            rec->size >= SIZE_UNIT && rec->size % SIZE_UNIT == 0 && rec->size <= SIZE_MAX_BYTES);
    return read_end(&r);
}

size_t child_encode(const struct child_record *rec, struct slice key, uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin(out);
    put_u64(&w, rec->created_ns);
    return write_end(&w, key);
}

bool child_decode(struct slice key, struct slice bytes, struct child_record *rec)
{
    struct reader r = read_begin(key, bytes);
    *rec = (struct child_record){.created_ns = get_u64(&r)};
    return read_end(&r);
}

size_t owner_encode(const struct owner_record *rec, struct slice key, uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin(out);
    put_u64(&w, rec->token);
    put_raw(&w, rec->session, sizeof rec->session);
    put_u64(&w, rec->since_ns);
    put_u32(&w, rec->pid);
    put_text(&w, rec->host, HOST_BYTES_MAX);
    put_text(&w, rec->address, HOST_BYTES_MAX);
    return write_end(&w, key);
}

bool owner_decode(struct slice key, struct slice bytes, struct owner_record *rec)
{
    struct reader r = read_begin(key, bytes);
    *rec = (struct owner_record){.token = get_u64(&r)};
    get_raw(&r, rec->session, sizeof rec->session);
    rec->since_ns = get_u64(&r);
    rec->pid = get_u32(&r);
    get_text(&r, rec->host, HOST_BYTES_MAX);
    get_text(&r, rec->address, HOST_BYTES_MAX);
    return read_end(&r);
}

size_t state_encode(const struct state_record *rec, struct slice key, uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin_version(out, STATE_VERSION);
    put_u64(&w, rec->generation);
    put_u64(&w, rec->data_blocks);
    put_u64(&w, rec->trash_next);
    put_u64(&w, rec->changed);
    CHECK(rec->n_logs <= STATE_LOGS_MAX);
    put_u8(&w, (uint8_t)rec->n_logs);
    for (uint32_t i = 0; i < rec->n_logs; i++) {
        put_u64(&w, rec->logs[i].log_id);
        put_u64(&w, rec->logs[i].applied_seq);
    }
    return write_end(&w, key);
}

bool state_decode(struct slice key, struct slice bytes, struct state_record *rec)
{
    struct reader r = read_begin_version(key, bytes, STATE_VERSION);
    *rec = (struct state_record){.generation = get_u64(&r)};
    rec->data_blocks = get_u64(&r);
    rec->trash_next = get_u64(&r);
    rec->changed = r.version >= 2 ? get_u64(&r) : rec->generation;
    rec->n_logs = get_u8(&r);
    if (rec->n_logs > STATE_LOGS_MAX) {
        rec->n_logs = 0;
        return false;
    }
    for (uint32_t i = 0; i < rec->n_logs; i++) {
        rec->logs[i].log_id = get_u64(&r);
        rec->logs[i].applied_seq = get_u64(&r);
    }
    require(&r, rec->changed <= rec->generation);
    return read_end(&r);
}

size_t session_encode(const struct session_record *rec, struct slice key,
                      uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin_version(out, SESSION_VERSION);
    put_u8(&w, rec->state);
    put_u64(&w, rec->counter);
    put_u32(&w, rec->lease_ms);
    put_u32(&w, rec->process.pid);
    put_u64(&w, rec->started_ns);
    put_raw(&w, rec->process.boot, sizeof rec->process.boot);
    put_u64(&w, rec->process.pid_namespace);
    put_u64(&w, rec->process.time_namespace);
    put_u64(&w, rec->process.start_ticks);
    put_text(&w, rec->host, HOST_BYTES_MAX);
    put_text(&w, rec->address, HOST_BYTES_MAX);
    return write_end(&w, key);
}

bool session_decode(struct slice key, struct slice bytes, struct session_record *rec)
{
    struct reader r = read_begin_version(key, bytes, SESSION_VERSION);
    *rec = (struct session_record){.state = get_u8(&r)};
    rec->counter = get_u64(&r);
    rec->lease_ms = get_u32(&r);
    rec->process.pid = get_u32(&r);
    rec->started_ns = get_u64(&r);
    if (r.version >= 2) {
        get_raw(&r, rec->process.boot, sizeof rec->process.boot);
        rec->process.pid_namespace = get_u64(&r);
        rec->process.time_namespace = get_u64(&r);
        rec->process.start_ticks = get_u64(&r);
    }
    get_text(&r, rec->host, HOST_BYTES_MAX);
    get_text(&r, rec->address, HOST_BYTES_MAX);
    require(&r, rec->state == SESSION_LIVE || rec->state == SESSION_FENCED);
    return read_end(&r);
}

size_t trash_encode(const struct trash_record *rec, struct slice key, uint8_t out[RECORD_BYTES_MAX])
{
    bool one = rec->after + 1 == rec->epoch;
    struct writer w = write_begin_version(out, one ? RECORD_VERSION : TRASH_VERSION);
    put_u64(&w, rec->epoch);
    put_u64(&w, rec->first_block);
    put_u64(&w, rec->end_block);
    if (!one)
        put_u64(&w, rec->after);
    return write_end(&w, key);
}

bool trash_decode(struct slice key, struct slice bytes, struct trash_record *rec)
{
    struct reader r = read_begin_version(key, bytes, TRASH_VERSION);
    *rec = (struct trash_record){.epoch = get_u64(&r)};
    rec->first_block = get_u64(&r);
    rec->end_block = get_u64(&r);
    rec->after = r.version == RECORD_VERSION ? rec->epoch - 1 : get_u64(&r);
    require(&r, rec->first_block <= rec->end_block && rec->after < rec->epoch);
    return read_end(&r);
}

size_t removed_encode(const struct removed_record *rec, struct slice key,
                      uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin(out);
    put_u64(&w, rec->removed_ns);
    put_text(&w, rec->name, NAME_BYTES_MAX);
    return write_end(&w, key);
}

bool removed_decode(struct slice key, struct slice bytes, struct removed_record *rec)
{
    struct reader r = read_begin(key, bytes);
    *rec = (struct removed_record){.removed_ns = get_u64(&r)};
    get_text(&r, rec->name, NAME_BYTES_MAX);
    return read_end(&r);
}

size_t mail_encode(const struct mail_record *rec, struct slice key, uint8_t out[RECORD_BYTES_MAX])
{
    bool plain = rec->kind <= MAIL_KIND_PLAIN_MAX;
    struct writer w = write_begin_version(out, plain ? RECORD_VERSION : MAIL_VERSION);
    put_u64(&w, rec->id);
    put_u8(&w, rec->kind);
    put_u64(&w, rec->size);
    put_u8(&w, rec->shrink);
    put_text(&w, rec->from, HOST_BYTES_MAX);
    if (!plain) {
        put_text(&w, rec->name, NAME_BYTES_MAX);
        put_text(&w, rec->to, NAME_BYTES_MAX);
        put_raw(&w, rec->snapshot_id, sizeof rec->snapshot_id);
        put_u64(&w, rec->token);
        put_u64(&w, rec->number);
    }
    return write_end(&w, key);
}

/* A kind this build does not know still decodes: the owner answers that it can't. */
bool mail_decode(struct slice key, struct slice bytes, struct mail_record *rec)
{
    struct reader r = read_begin_version(key, bytes, MAIL_VERSION);
    *rec = (struct mail_record){.id = get_u64(&r)};
    rec->kind = get_u8(&r);
    rec->size = get_u64(&r);
    rec->shrink = get_u8(&r);
    get_text(&r, rec->from, HOST_BYTES_MAX);
    if (r.version >= MAIL_VERSION) {
        get_text(&r, rec->name, NAME_BYTES_MAX);
        get_text(&r, rec->to, NAME_BYTES_MAX);
        get_raw(&r, rec->snapshot_id, sizeof rec->snapshot_id);
        rec->token = get_u64(&r);
        rec->number = get_u64(&r);
    }
    require(&r, rec->shrink <= 1);
    return read_end(&r);
}

size_t answer_encode(const struct answer_record *rec, struct slice key,
                     uint8_t out[RECORD_BYTES_MAX])
{
    struct writer w = write_begin_version(out, rec->number ? ANSWER_VERSION : RECORD_VERSION);
    put_u64(&w, rec->id);
    put_u8(&w, rec->status);
    put_text(&w, rec->text, sizeof rec->text - 1);
    if (rec->number)
        put_u64(&w, rec->number);
    return write_end(&w, key);
}

bool answer_decode(struct slice key, struct slice bytes, struct answer_record *rec)
{
    struct reader r = read_begin_version(key, bytes, ANSWER_VERSION);
    *rec = (struct answer_record){.id = get_u64(&r)};
    rec->status = get_u8(&r);
    get_text(&r, rec->text, sizeof rec->text - 1);
    rec->number = r.version >= ANSWER_VERSION ? get_u64(&r) : 0;
    return read_end(&r);
}
