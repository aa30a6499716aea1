/*
 * The embedded store's own forms from any bytes: values as they stand in LMDB, and write logs, which
 * are replayed and copied.
 *
 * At stake: G1 and G2, a replay gives the prefix of what was written, all of what had been synced, or
 * an error; G5, nothing of a value or a record is used that is not what was written.
 *
 * An input: what to do (1 byte). A value: whether its hash is set right, then its bytes. A log: which
 * of some logs, that begin at different places of their rings, is replayed from where, and what to
 * write to its ring: records, whole or with some part wrong, gaps, and any bytes.
 *
 * Oracle: a value is taken apart as it was put together, and lies within its bytes. A log is read a
 * second time by a model that knows no windows and no rings: both give the same records and the same
 * end. A copy replays as the original does, or damage is told.
 *
 * Code: src/store/lmdb/value.c src/store/lmdb/replay.c
 */
#include "fuzz.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "store/lmdb/engine.h"

#define RING_BYTES 8192u
#define PAYLOAD_BYTES_MAX 3000u
#define STREAMS 3u
#define TAKEN_MAX (RING_BYTES / LM_LOG_RECORD_BYTES + 1)

/* Where the records that are needed begin. */
static const struct {
    uint64_t offset, seq;
} starts[] = {{0, 1}, {4096, 7}, {RING_BYTES - 40, 300}, {3 * RING_BYTES + 8000, 1ull << 40}};
#define N_LOGS (sizeof starts / sizeof *starts)
#define COPY_ID 99u

static struct store *store;
static char dir[200];

int __wrap_usleep(useconds_t us);

/* A copy waits for a record that may be on its way. */
int __wrap_usleep(useconds_t us)
{
    (void)us;
    return 0;
}

/* --- logs ---------------------------------------------------------------------------------- */

struct put_start {
    struct lm_job job;
    uint64_t id;
    struct lm_log_start start;
};

static enum status put_start(struct lm_job *job, MDB_txn *txn)
{
    struct put_start *p = container_of(job, struct put_start, job);
    return lm_log_start_put(lm_of(store), txn, p->id, &p->start);
}

static void log_put(uint64_t id, const struct lm_log_start *start)
{
    struct put_start p = {.job.run = put_start, .id = id, .start = *start};
    CHECK(lm_job_run(lm_of(store), &p.job) == ST_OK);
}

static int log_file(uint64_t id, int flags)
{
    char name[24];
    snprintf(name, sizeof name, "%016" PRIx64, id);
    int fd = openat(lm_of(store)->log_fd, name, O_CLOEXEC | O_RDWR | flags, 0600);
    CHECK(fd >= 0);
    return fd;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    char uri[sizeof dir + 8];
    struct err e = {0};
    snprintf(dir, sizeof dir, "%s/fuzz-store-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    CHECK(mkdtemp(dir));
    snprintf(uri, sizeof uri, "lmdb:%s", dir);
    log_set_level(LOG_LEVEL_ERROR);
    const struct store_options options = {.flags = STORE_CREATE, .lease_ms = 5000};
    CHECK(store_open(uri, &options, &store, &e) == ST_OK);
    for (size_t i = 0; i < N_LOGS; i++) {
        uint8_t header[LM_LOG_HEADER_BYTES];
        struct lm_log_start start = {
            .capacity = RING_BYTES, .offset = starts[i].offset, .seq = starts[i].seq};
        lm_log_header_build(header, i + 1, start.session, RING_BYTES);
        int fd = log_file(i + 1, O_CREAT);
        CHECK(pwrite(fd, header, sizeof header, 0) == (ssize_t)sizeof header);
        close(fd);
        log_put(i + 1, &start);
    }
    return 0;
}

/* The ring as its records see it: byte 0 is the one where they begin. */
struct ring {
    uint64_t id, first, seq;
    uint8_t bytes[RING_BYTES];
};

/* Fills the ring as the input says. */
static void ring_fill(struct ring *r, struct fuzz_input *in)
{
    uint64_t seq = r->seq, synced = 0;
    size_t at = 0;
    memset(r->bytes, 0, sizeof r->bytes);
    while (fuzz_left(in) > 0) {
        unsigned what = (unsigned)fuzz_take(in, 1), wrong = (unsigned)fuzz_take(in, 1);
        if (what % 8 == 7) { /* any bytes, anywhere */
            size_t to = fuzz_take(in, 2) % RING_BYTES;
            size_t n = min_u64(min_u64(wrong % 32, RING_BYTES - to), fuzz_left(in));
            memcpy(r->bytes + to, in->at, n);
            in->at += n;
            continue;
        }
        if (what % 8 == 6) { /* a gap */
            at += 8 * wrong;
            continue;
        }
        if (at + LM_LOG_RECORD_BYTES > RING_BYTES)
            return;
        uint8_t *h = r->bytes + at;
        if (what % 8 == 5) { /* a mark, which the next record replaces where it is not left there */
            lm_log_mark_build(h, r->id, seq, seq - wrong % 8);
            at += wrong >= 200 ? LM_LOG_RECORD_BYTES : 0;
            continue;
        }
        uint32_t len = (uint32_t)fuzz_take(in, 2) % PAYLOAD_BYTES_MAX;
        if (wrong % 16 == 1)
            synced = fuzz_take(in, 1) + r->seq;
        if (wrong % 16 == 2)
            seq += fuzz_take(in, 1) - 128;
        put_le32(h, LM_LOG_RECORD_MAGIC);
        put_le32(h + 4, wrong % 16 == 3 ? (uint32_t)fuzz_take(in, 4) : len);
        put_le64(h + 8, seq++);
        put_le64(h + 16, what % STREAMS);
        memset(h + 24, (int)what, 32);
        put_le64(h + 64, synced);
        uint8_t *payload = h + LM_LOG_RECORD_BYTES;
        size_t room = RING_BYTES - at - LM_LOG_RECORD_BYTES;
        memset(payload, (int)wrong, min_u64(len, room));
        put_le64(h + 56, len <= room ? hash64(payload, len, wrong % 16 == 4) : 0);
        put_le64(h + 72, lm_log_header_hash(h, wrong % 16 == 5 ? 0 : r->id));
        at += store_log_record_bytes(len);
        if (at > RING_BYTES)
            return;
    }
}

static void ring_write(const struct ring *r)
{
    int fd = log_file(r->id, 0);
    size_t place = r->first % RING_BYTES, n = RING_BYTES - place;
    CHECK(pwrite(fd, r->bytes, n, (off_t)(LM_LOG_HEADER_BYTES + place)) == (ssize_t)n);
    CHECK(pwrite(fd, r->bytes + n, place, LM_LOG_HEADER_BYTES) == (ssize_t)place);
    close(fd);
}

struct taken {
    unsigned n, max; /* it stops after that many */
    struct {
        uint64_t seq, hash;
    } records[TAKEN_MAX];
};

static void taken_add(struct taken *t, uint64_t seq, const uint8_t *meta, const uint8_t *payload,
                      uint32_t len)
{
    CHECK(t->n < TAKEN_MAX);
    t->records[t->n].seq = seq;
    t->records[t->n++].hash = hash64(payload, len, hash64(meta, 32, 0));
}

static bool take(void *arg, const struct store_log_record *rec)
{
    struct taken *t = arg;
    taken_add(t, rec->seq, rec->meta, rec->payload, rec->payload_len);
    return t->n < t->max;
}

static bool is_header(const struct ring *r, size_t at)
{
    if (at + LM_LOG_RECORD_BYTES > RING_BYTES)
        return false;
    const uint8_t *h = r->bytes + at;
    return get_le32(h) == LM_LOG_RECORD_MAGIC && get_le32(h + 4) <= STORE_LOG_PAYLOAD_MAX &&
           get_le64(h + 72) == lm_log_header_hash(h, r->id);
}

static bool is_record(const struct ring *r, size_t at, uint64_t seq)
{
    return is_header(r, at) && get_le64(r->bytes + at + 8) == seq &&
           get_le64(r->bytes + at + 16) != LM_LOG_MARK_STREAM;
}

/* What a replay is to give: ST_IO where something is lost that had been synced. */
static enum status model(const struct ring *r, uint64_t stream, uint64_t after, struct taken *t)
{
    uint64_t seq = r->seq;
    size_t at = 0;
    for (; is_record(r, at, seq); seq++) {
        const uint8_t *h = r->bytes + at, *payload = h + LM_LOG_RECORD_BYTES;
        uint32_t len = get_le32(h + 4);
        if (get_le64(h + 16) == stream) {
            if (at + LM_LOG_RECORD_BYTES + len > RING_BYTES ||
                hash64(payload, len, 0) != get_le64(h + 56))
                break;
            if (seq > after)
                taken_add(t, seq, h + 24, payload, len);
            if (seq > after && t->n == t->max)
                return ST_OK;
        }
        at += store_log_record_bytes(len);
    }
    for (; at + LM_LOG_RECORD_BYTES <= RING_BYTES; at += 8)
        if (is_header(r, at) && get_le64(r->bytes + at + 8) > seq &&
            get_le64(r->bytes + at + 64) > seq)
            return ST_IO;
    return ST_OK;
}

static void check_same(const struct taken *a, const struct taken *b)
{
    CHECK(a->n == b->n && memcmp(a->records, b->records, a->n * sizeof *a->records) == 0);
}

static void try_copy(const struct ring *r, uint64_t stream, enum status st, const struct taken *want)
{
    struct lm_log_start start;
    struct taken got = {.max = TAKEN_MAX};
    struct err e = {0};
    uint64_t n_damaged = 0;
    int fd = log_file(COPY_ID, O_CREAT | O_TRUNC);
    CHECK(lm_log_copy(lm_of(store), r->id, fd, &start, &n_damaged, &e) == ST_OK);
    CHECK(start.capacity <= RING_BYTES + 4096 && start.seq == r->seq);
    /* It replays under the identity of the original. */
    int original = log_file(r->id, 0);
    static uint8_t bytes[LM_LOG_HEADER_BYTES + RING_BYTES + 4096], kept[LM_LOG_HEADER_BYTES];
    ssize_t n = pread(fd, bytes, sizeof bytes, 0);
    CHECK(n == (ssize_t)(LM_LOG_HEADER_BYTES + start.capacity));
    CHECK(pread(original, kept, sizeof kept, 0) == (ssize_t)sizeof kept);
    CHECK(pwrite(original, bytes, (size_t)n, 0) == n);
    log_put(r->id, &start);
    enum status again = store_log_replay(store, r->id, stream, 0, take, &got, &e);
    /* What a copy says of which records had been synced may differ, which matters where one of them is
     * damaged. Then that is told. */
    CHECK(again == st || n_damaged > 0);
    CHECK(st == ST_OK || n_damaged > 0);
    check_same(&got, want);
    CHECK(pwrite(original, kept, sizeof kept, 0) == (ssize_t)sizeof kept);
    CHECK(ftruncate(original, LM_LOG_HEADER_BYTES + RING_BYTES) == 0);
    struct lm_log_start before = {.capacity = RING_BYTES, .offset = r->first, .seq = r->seq};
    log_put(r->id, &before);
    close(original);
    close(fd);
}

/* A file that is shorter than its header says, or has another header: nothing is read of it. */
static void try_damaged_file(const struct ring *r, bool cut, unsigned where)
{
    struct taken got = {.max = TAKEN_MAX};
    struct err e = {0};
    int fd = log_file(r->id, 0);
    uint8_t byte, flipped;
    off_t at = cut ? LM_LOG_HEADER_BYTES + (off_t)(where % RING_BYTES) : (off_t)(where % 56);
    CHECK(pread(fd, &byte, 1, at) == 1);
    flipped = (uint8_t)(byte ^ (1u << where / 56 % 8));
    CHECK(cut ? ftruncate(fd, at) == 0 : pwrite(fd, &flipped, 1, at) == 1);
    CHECK(store_log_replay(store, r->id, 0, 0, take, &got, &e) == ST_IO && e.text[0]);
    CHECK(got.n == 0);
    CHECK(cut ? ftruncate(fd, LM_LOG_HEADER_BYTES + RING_BYTES) == 0
              : pwrite(fd, &byte, 1, at) == 1);
    close(fd);
}

static void try_log(struct fuzz_input *in)
{
    static struct ring r;
    struct taken got = {.max = TAKEN_MAX}, want = {.max = TAKEN_MAX};
    struct err e = {0};
    unsigned which = (unsigned)fuzz_take(in, 1) % N_LOGS;
    uint64_t stream = fuzz_take(in, 1) % STREAMS;
    unsigned more = (unsigned)fuzz_take(in, 1);
    r.id = which + 1;
    r.first = starts[which].offset;
    r.seq = starts[which].seq;
    bool copies = more >= 240;
    uint64_t after = copies ? 0 : more % 8 + r.seq - 2;
    if (!copies && more / 8 % 8)
        got.max = want.max = more / 8 % 8;
    ring_fill(&r, in);
    ring_write(&r);
    if (more >= 200 && !copies) {
        try_damaged_file(&r, more % 2, (unsigned)fuzz_take(in, 2));
        return;
    }
    enum status expected = model(&r, stream, after, &want);
    enum status st = store_log_replay(store, r.id, stream, after, take, &got, &e);
    CHECK(st == expected && (st == ST_OK || e.text[0]));
    check_same(&got, &want);
    if (copies)
        try_copy(&r, stream, st, &want);
}

/* --- values -------------------------------------------------------------------------------- */

static void try_value(struct fuzz_input *in)
{
    static const uint8_t key_bytes[] = "key", other_bytes[] = "kez";
    MDB_val key = {3, (void *)(uintptr_t)key_bytes}, other = {3, (void *)(uintptr_t)other_bytes};
    struct lm_value v, back;
    bool sealed = fuzz_take(in, 1) % 8 != 0;
    size_t len = fuzz_left(in);
    uint8_t *bytes = mem_alloc(len + 1);
    memcpy(bytes, in->at, len);
    if (sealed && len >= 8)
        put_le64(bytes, hash64(bytes + 8, len - 8, lm_key_hash(key.mv_data, key.mv_size)));
    uint8_t *exact = mem_realloc(bytes, len + (len == 0));
    MDB_val data = {len, exact};
    if (lm_value_parse(&key, &data, &v) == ST_OK) {
        const uint8_t *head = v.head.data;
        CHECK(head >= exact + 16 && head + v.head.len == exact + len);
        CHECK(exact[8] == 1 || v.pieces + 8 * (size_t)v.n_pieces == head);
        CHECK(lm_value_parse(&other, &data, &back) == ST_IO);
        if (v.n_pieces <= 256 && v.head.len <= LM_HEAD_BYTES_MAX) {
            static uint8_t built[LM_VALUE_BYTES_MAX];
            uint64_t pieces[256];
            bool plain = exact[8] == 1;
            for (uint32_t i = 0; !plain && i < v.n_pieces; i++)
                pieces[i] = get_le64(v.pieces + 8 * (size_t)i);
            MDB_val again = {.mv_data = built};
            again.mv_size = lm_value_build(built, &key, 5, v.head, v.body_len, pieces,
                                           plain ? 0 : v.n_pieces);
            CHECK(lm_value_parse(&key, &again, &back) == ST_OK);
            CHECK(back.head.len == v.head.len);
            CHECK(memcmp(back.head.data, v.head.data, v.head.len) == 0);
            CHECK(back.body_len == v.body_len);
        }
    }
    free(exact);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = fuzz_input(data, size);
    if (fuzz_take(&in, 1) % 4 == 0)
        try_value(&in);
    else
        try_log(&in);
    return 0;
}
