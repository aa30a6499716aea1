/*
 * Index rows in memory and as stored bytes.
 *
 * Stored, a row is a version byte, then (level 1 only) the table of sources, then runs
 * of equal entries that cover exactly INDEX_FANOUT, then a hash bound to the key. All
 * integers are varints of seven bits a byte, lowest first, in their shortest form. The
 * table is in the order in which the runs first use its entries, and neighbouring runs
 * differ: one row has one stored form.
 */
#include "volume/rows.h"

#include <stdlib.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"

#define ROW_VERSION 1
#define ROW2_VERSION_BRANCHES 2 /* level 2 with entries of other branches */
#define HASH_BYTES 8u
#define VARINT_BYTES_MAX 10u
#define TABLE_CAP_MIN 4u
#define TABLE_CAP_MAX (2 * INDEX_FANOUT) /* so that dropping unused ones always frees half */
#define TABLE_STALE_MIN 64u

/* The longest row 1: a table of INDEX_FANOUT sources and as many runs of one. */
_Static_assert(1 + 2 + INDEX_FANOUT * (2 * VARINT_BYTES_MAX + 1 + 2) + HASH_BYTES <= ROW_BYTES_MAX,
               "a row of nothing but differing sources fits");
_Static_assert(1 + INDEX_FANOUT * (2 + VARINT_BYTES_MAX + 2) + HASH_BYTES <= ROW_BYTES_MAX,
               "a level-2 row of nothing but differing rows fits");

void row1_init(struct row1 *row)
{
    memset(row, 0, sizeof *row);
}

void row1_free(struct row1 *row)
{
    free(row->sources);
    row->sources = NULL;
    row->n_sources = row->cap_sources = 0;
}

void row2_init(struct row2 *row)
{
    memset(row, 0, sizeof *row);
}

void row1_fill(struct row1 *row, unsigned first, unsigned end, uint16_t fixed)
{
    CHECK(first <= end && end <= INDEX_FANOUT && fixed < SOURCE_FIRST);
    for (unsigned i = first; i < end; i++) {
        row->n_data -= row->source[i] >= SOURCE_FIRST;
        row->source[i] = fixed;
    }
}

/* Numbers the sources that entries name in the order of their first use: order[new] is the
 * old index, renumbered[old] the new one plus 1, 0 where unused. Returns how many. */
static unsigned used_sources(const struct row1 *row, uint16_t *order, uint16_t *renumbered)
{
    unsigned n = 0;
    memset(renumbered, 0, row->n_sources * sizeof *renumbered);
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        if (row->source[i] < SOURCE_FIRST)
            continue;
        uint16_t old = (uint16_t)(row->source[i] - SOURCE_FIRST);
        if (renumbered[old] == 0) {
            order[n++] = old;
            renumbered[old] = (uint16_t)n;
        }
    }
    return n;
}

/* Makes room for one more source: drops unused ones, and doubles the table where that did
 * not free half of it, so that the cost stays small per source added. */
static void make_room(struct row1 *row)
{
    if (row->n_sources >= TABLE_STALE_MIN) {
        uint16_t order[INDEX_FANOUT], renumbered[TABLE_CAP_MAX];
        struct row_source kept[INDEX_FANOUT];
        unsigned n = used_sources(row, order, renumbered);
        for (unsigned i = 0; i < n; i++)
            kept[i] = row->sources[order[i]];
        for (unsigned i = 0; i < INDEX_FANOUT; i++)
            if (row->source[i] >= SOURCE_FIRST)
                row->source[i] =
                    (uint16_t)(renumbered[row->source[i] - SOURCE_FIRST] - 1 + SOURCE_FIRST);
        memcpy(row->sources, kept, n * sizeof *kept);
        row->n_sources = (uint16_t)n;
        if (n <= row->cap_sources / 2)
            return;
    }
    unsigned cap = row->cap_sources ? 2u * row->cap_sources : TABLE_CAP_MIN;
    if (cap > TABLE_CAP_MAX)
        cap = TABLE_CAP_MAX;
    CHECK(row->n_sources < cap);
    row->sources = mem_realloc(row->sources, cap * sizeof *row->sources);
    row->cap_sources = (uint16_t)cap;
}

bool row1_set_data(struct row1 *row, unsigned i, uint64_t branch, uint64_t epoch)
{
    CHECK(i < INDEX_FANOUT);
    uint16_t had = row->source[i];
    if (had >= SOURCE_FIRST) {
        const struct row_source *s = &row->sources[had - SOURCE_FIRST];
        if (s->branch == branch && s->epoch == epoch)
            return false;
    } else {
        row->n_data++;
    }

    /* From the end: a commit adds its own epoch last and then names it again and again. */
    for (unsigned n = row->n_sources; n-- > 0;) {
        if (row->sources[n].epoch == epoch && row->sources[n].branch == branch) {
            row->source[i] = (uint16_t)(n + SOURCE_FIRST);
            return true;
        }
    }
    /* The entry must not keep the source it is about to lose. */
    row->source[i] = SOURCE_ABSENT;
    if (row->n_sources == row->cap_sources)
        make_room(row);
    row->sources[row->n_sources] = (struct row_source){branch, epoch};
    row->source[i] = (uint16_t)(row->n_sources++ + SOURCE_FIRST);
    return true;
}

int row1_uniform(const struct row1 *row)
{
    uint16_t first = row->source[0];
    if (first >= SOURCE_FIRST)
        return -1;
    /* Each entry equal to the next one. */
    return memcmp(row->source, row->source + 1, sizeof row->source - sizeof first) == 0 ? first
                                                                                        : -1;
}

uint64_t row2_n_data(const struct row2 *row)
{
    uint64_t n = 0;
    for (unsigned i = 0; i < INDEX_FANOUT; i++)
        n += row->entry[i].kind == ROW2_ROW ? row->entry[i].n_data : 0;
    return n;
}

static uint8_t *put_varint(uint8_t *at, uint64_t v)
{
    while (v >= 0x80) {
        *at++ = (uint8_t)(v | 0x80);
        v >>= 7;
    }
    *at++ = (uint8_t)v;
    return at;
}

/* The bytes of a row after its version and before its hash; `ok` goes false at the first
 * thing that can't be. */
struct reader {
    const uint8_t *at, *end;
    uint8_t version;
    bool ok;
};

/* Reads a varint of at most `max`; one that is cut, too long, or longer than need be is
 * refused. */
static uint64_t get_varint(struct reader *r, uint64_t max)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < VARINT_BYTES_MAX && r->at < r->end; i++) {
        uint8_t byte = *r->at++;
        if (i == VARINT_BYTES_MAX - 1 && byte > 1)
            break;
        v |= (uint64_t)(byte & 0x7f) << (7 * i);
        if (byte < 0x80) {
            if ((byte == 0 && i > 0) || v > max)
                break;
            return v;
        }
    }
    r->ok = false;
    return 0;
}

static size_t varint_bytes(uint64_t v)
{
    size_t n = 1;
    for (; v >= 0x80; v >>= 7)
        n++;
    return n;
}

/* Runs of one are the shortest and together the longest: a run twice as long never takes twice
 * the bytes. */
size_t row1_bytes_max(unsigned n_sources)
{
    CHECK(n_sources <= INDEX_FANOUT);
    return 1 + varint_bytes(n_sources) + n_sources * 2u * VARINT_BYTES_MAX +
           INDEX_FANOUT * (varint_bytes(SOURCE_FIRST + n_sources) + 1) + HASH_BYTES;
}

size_t row2_bytes_max(uint64_t epoch, uint64_t branch)
{
    return 1 +
           INDEX_FANOUT * (1 + varint_bytes(epoch) + varint_bytes(INDEX_FANOUT) +
                           (branch ? varint_bytes(branch) : 0)) +
           HASH_BYTES;
}

static uint64_t row_hash(struct slice key, const uint8_t *bytes, size_t len)
{
    return hash64(bytes, len, hash64(key.data, key.len, 0));
}

static size_t seal(uint8_t *out, const uint8_t *end, struct slice key)
{
    size_t len = (size_t)(end - out);
    CHECK(len <= ROW_BYTES_MAX - HASH_BYTES);
    put_le64(out + len, row_hash(key, out, len));
    return len + HASH_BYTES;
}

/* Checks hash and version, which is one of 1 .. `version_max`. */
static struct reader unseal(struct slice key, struct slice bytes, uint8_t version_max)
{
    struct reader r = {.ok = bytes.len >= 1 + HASH_BYTES && bytes.len <= ROW_BYTES_MAX};
    if (!r.ok)
        return r;
    r.at = bytes.data;
    r.end = r.at + bytes.len - HASH_BYTES;
    r.version = *r.at++;
    r.ok = get_le64(r.end) == row_hash(key, bytes.data, bytes.len - HASH_BYTES) &&
           r.version >= ROW_VERSION && r.version <= version_max;
    return r;
}

size_t row1_encode(const struct row1 *row, struct slice key, uint8_t out[ROW_BYTES_MAX])
{
    uint16_t order[INDEX_FANOUT], renumbered[TABLE_CAP_MAX];
    unsigned n = used_sources(row, order, renumbered);
    uint8_t *at = out;
    *at++ = ROW_VERSION;
    at = put_varint(at, n);
    for (unsigned i = 0; i < n; i++) {
        at = put_varint(at, row->sources[order[i]].branch);
        at = put_varint(at, row->sources[order[i]].epoch);
    }
    for (unsigned i = 0; i < INDEX_FANOUT;) {
        unsigned end = i + 1;
        while (end < INDEX_FANOUT && row->source[end] == row->source[i])
            end++;
        uint16_t s = row->source[i];
        at =
            put_varint(at, s < SOURCE_FIRST ? s : renumbered[s - SOURCE_FIRST] - 1u + SOURCE_FIRST);
        at = put_varint(at, end - i);
        i = end;
    }
    return seal(out, at, key);
}

/* Most rows have few runs, and long ones. */
static void fill_sources(uint16_t *at, unsigned n, uint16_t source)
{
    uint64_t four = source * 0x0001000100010001ull;
    unsigned i = 0;
    for (; i + 4 <= n; i += 4)
        memcpy(at + i, &four, 8);
    for (; i < n; i++)
        at[i] = source;
}

static bool row1_decode_body(struct row1 *row, struct reader *r)
{
    unsigned n = (unsigned)get_varint(r, INDEX_FANOUT);
    if (!r->ok)
        return false;
    if (n > 0) {
        row->sources = mem_alloc(n * sizeof *row->sources);
        row->n_sources = row->cap_sources = (uint16_t)n;
    }
    for (unsigned i = 0; i < n; i++) {
        row->sources[i].branch = get_varint(r, UINT64_MAX);
        row->sources[i].epoch = get_varint(r, UINT64_MAX);
    }

    unsigned n_seen = 0, before = UINT16_MAX;
    for (unsigned i = 0; i < INDEX_FANOUT;) {
        unsigned s = (unsigned)get_varint(r, SOURCE_FIRST + INDEX_FANOUT);
        unsigned len = (unsigned)get_varint(r, INDEX_FANOUT - i);
        /* A source is one seen before or the next of the table. */
        if (!r->ok || len == 0 || s == before || s > SOURCE_FIRST + n_seen)
            return false;
        if (s == SOURCE_FIRST + n_seen && ++n_seen > n)
            return false;
        fill_sources(row->source + i, len, (uint16_t)s);
        i += len;
        if (s >= SOURCE_FIRST)
            row->n_data += len;
        before = s;
    }
    return r->ok && r->at == r->end && n_seen == n;
}

bool row1_decode(struct row1 *row, struct slice key, struct slice bytes)
{
    row1_init(row);
    struct reader r = unseal(key, bytes, ROW_VERSION);
    if (r.ok && row1_decode_body(row, &r))
        return true;
    row1_free(row);
    row1_init(row);
    return false;
}

static bool row2_same(const struct row2_entry *a, const struct row2_entry *b)
{
    return a->kind == b->kind &&
           (a->kind != ROW2_ROW ||
            (a->epoch == b->epoch && a->n_data == b->n_data && a->branch == b->branch));
}

/* Rows without entries of other branches keep the form that builds from before clones know. */
static uint8_t row2_version(const struct row2 *row)
{
    for (unsigned i = 0; i < INDEX_FANOUT; i++)
        if (row->entry[i].kind == ROW2_ROW && row->entry[i].branch)
            return ROW2_VERSION_BRANCHES;
    return ROW_VERSION;
}

size_t row2_encode(const struct row2 *row, struct slice key, uint8_t out[ROW_BYTES_MAX])
{
    uint8_t *at = out, version = row2_version(row);
    *at++ = version;
    for (unsigned i = 0; i < INDEX_FANOUT;) {
        const struct row2_entry *e = &row->entry[i];
        CHECK(e->kind <= ROW2_ROW && e->n_data <= INDEX_FANOUT);
        unsigned end = i + 1;
        while (end < INDEX_FANOUT && row2_same(e, &row->entry[end]))
            end++;
        at = put_varint(at, (end - i) << 2 | e->kind);
        if (e->kind == ROW2_ROW) {
            at = put_varint(at, e->epoch);
            at = put_varint(at, e->n_data);
            if (version == ROW2_VERSION_BRANCHES)
                at = put_varint(at, e->branch);
        }
        i = end;
    }
    return seal(out, at, key);
}

static bool row2_decode_body(struct row2 *row, struct reader *r)
{
    bool branches = false;
    for (unsigned i = 0; i < INDEX_FANOUT;) {
        unsigned head = (unsigned)get_varint(r, (INDEX_FANOUT - i) << 2 | ROW2_ROW);
        unsigned len = head >> 2;
        struct row2_entry e = {.kind = (uint8_t)(head & 3)};
        if (e.kind == ROW2_ROW) {
            e.epoch = get_varint(r, UINT64_MAX);
            e.n_data = (uint16_t)get_varint(r, INDEX_FANOUT);
            if (r->version == ROW2_VERSION_BRANCHES)
                e.branch = get_varint(r, UINT64_MAX);
            branches |= e.branch != 0;
        }
        if (!r->ok || len == 0 || (i > 0 && row2_same(&e, &row->entry[i - 1])))
            return false;
        for (unsigned end = i + len; i < end; i++)
            row->entry[i] = e;
    }
    /* A row has one stored form. */
    return r->at == r->end && branches == (r->version == ROW2_VERSION_BRANCHES);
}

bool row2_decode(struct row2 *row, struct slice key, struct slice bytes)
{
    row2_init(row);
    struct reader r = unseal(key, bytes, ROW2_VERSION_BRANCHES);
    if (r.ok && row2_decode_body(row, &r))
        return true;
    row2_init(row);
    return false;
}
