/*
 * Any bytes as what is stored in small values: records, index rows, keys.
 *
 * At stake: G5, everything stored is what was written or an error. The hash stops what a medium does
 * to it; here most inputs get a right one, so that what stands behind it is reached: a decode hands
 * out only what an encode could have been given, and reads nothing beyond the bytes.
 *
 * An input: which kind (1 byte), whether the hash is set right (1 byte), then the value, without its
 * hash where that is set.
 *
 * Oracle: what decodes keeps the limits that records.h and rows.h state, encodes again, and that
 * decodes to the same; it is byte for byte what was given where it is of the version that an encode
 * writes. A changed bit or another key does not decode. A key that can be taken apart is the key of
 * its parts.
 *
 * Code: src/volume/records.c src/volume/rows.c src/volume/keys.c
 */
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/mem.h"
#include "volume/records.h"
#include "volume/rows.h"

#define HASH_BYTES 8u

static struct slice key, other_key;

/* As all records and rows are sealed. */
static size_t seal(uint8_t *bytes, size_t len)
{
    put_le64(bytes + len, hash64(bytes, len, hash64(key.data, key.len, 0)));
    return len + HASH_BYTES;
}

static bool power_of_two(uint64_t v)
{
    return v && (v & (v - 1)) == 0;
}

static void check_size(uint64_t size)
{
    CHECK(size >= 512 && size % 512 == 0 && size <= 1ull << 62);
}

/* What holds of each kind beyond being encoded again. */
static void meta_check(const struct meta_record *r)
{
    (void)r;
}
#define counter_check(r) ((void)(r))
#define name_check(r) ((void)(r))
#define child_check(r) ((void)(r))

static void header_check(const struct header_record *r)
{
    check_size(r->size);
    CHECK(r->block_size >= 4096 && r->block_size <= 65536 && power_of_two(r->block_size));
    CHECK(r->epoch >= 1 && r->import_base < r->epoch);
    CHECK(strnlen(r->description, sizeof r->description) <= DESCRIPTION_BYTES_MAX);
}

static void ancestry_check(const struct ancestry_record *r)
{
    CHECK(r->n_segments <= ANCESTRY_STORED_MAX);
    for (uint32_t i = 0; i < r->n_segments; i++)
        CHECK(r->segments[i].branch > 0 && r->segments[i].after < r->segments[i].upto);
}

static void snapshot_check(const struct snapshot_record *r)
{
    check_size(r->size);
    CHECK(name_valid(r->name) && r->removed <= 1);
}

static void check_host(const char text[HOST_BYTES_MAX + 1])
{
    CHECK(strnlen(text, HOST_BYTES_MAX + 1) <= HOST_BYTES_MAX);
}

static void owner_check(const struct owner_record *r)
{
    check_host(r->host);
    check_host(r->address);
}

static void state_check(const struct state_record *r)
{
    CHECK(r->n_logs <= STATE_LOGS_MAX && r->changed <= r->generation);
}

static void session_check(const struct session_record *r)
{
    CHECK(r->state == SESSION_LIVE || r->state == SESSION_FENCED);
    check_host(r->host);
    check_host(r->address);
}

static void trash_check(const struct trash_record *r)
{
    CHECK(r->after < r->epoch && r->first_block <= r->end_block);
}

static void removed_check(const struct removed_record *r)
{
    CHECK(strnlen(r->name, sizeof r->name) <= NAME_BYTES_MAX);
}

static void mail_check(const struct mail_record *r)
{
    CHECK(r->shrink <= 1);
    check_host(r->from);
    CHECK(strnlen(r->name, sizeof r->name) <= NAME_BYTES_MAX);
    CHECK(strnlen(r->to, sizeof r->to) <= NAME_BYTES_MAX);
}

static void answer_check(const struct answer_record *r)
{
    CHECK(strnlen(r->text, sizeof r->text) < sizeof r->text);
}

#define TRY_RECORD(kind)                                                                           \
    static void try_##kind(struct slice bytes)                                                     \
    {                                                                                              \
        struct kind##_record rec, back;                                                            \
        uint8_t again[RECORD_BYTES_MAX], twice[RECORD_BYTES_MAX];                                  \
        if (!kind##_decode(key, bytes, &rec))                                                      \
            return;                                                                                \
        kind##_check(&rec);                                                                        \
        size_t len = kind##_encode(&rec, key, again);                                              \
        CHECK(again[0] != *(const uint8_t *)bytes.data ||                                          \
              (len == bytes.len && memcmp(again, bytes.data, len) == 0));                          \
        CHECK(kind##_decode(key, (struct slice){again, len}, &back));                              \
        CHECK(kind##_encode(&back, key, twice) == len && memcmp(again, twice, len) == 0);          \
        CHECK(!kind##_decode(other_key, bytes, &back));                                            \
        again[len / 2] ^= 0x10;                                                                    \
        CHECK(!kind##_decode(key, (struct slice){again, len}, &back));                             \
    }

TRY_RECORD(meta)
TRY_RECORD(counter)
TRY_RECORD(name)
TRY_RECORD(header)
TRY_RECORD(ancestry)
TRY_RECORD(snapshot)
TRY_RECORD(child)
TRY_RECORD(owner)
TRY_RECORD(state)
TRY_RECORD(session)
TRY_RECORD(trash)
TRY_RECORD(removed)
TRY_RECORD(mail)
TRY_RECORD(answer)

static uint8_t row_bytes[ROW_BYTES_MAX];

static void try_row1(struct slice bytes)
{
    struct row1 row, back;
    if (!row1_decode(&row, key, bytes)) {
        CHECK(!row.sources && row1_uniform(&row) == SOURCE_ABSENT);
        return;
    }
    uint32_t n_data = 0;
    CHECK(row.n_sources <= INDEX_FANOUT);
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        CHECK(row.source[i] < SOURCE_FIRST + row.n_sources);
        n_data += row.source[i] >= SOURCE_FIRST;
    }
    CHECK(row.n_data == n_data);
    size_t len = row1_encode(&row, key, row_bytes);
    CHECK(len == bytes.len && memcmp(row_bytes, bytes.data, len) == 0);
    CHECK(len <= row1_bytes_max(row.n_sources));
    CHECK(!row1_decode(&back, other_key, bytes) && !back.sources);

    /* What goes on with a row that was read: it is changed and written again. */
    const uint8_t *b = bytes.data;
    for (size_t at = 0; at + 4 <= bytes.len && at < 400; at += 4) {
        unsigned i = get_le16(b + at) % INDEX_FANOUT;
        if (b[at + 3] % 4 == 3)
            row1_fill(&row, i, i + (INDEX_FANOUT - i) * b[at + 2] / 255, b[at + 3] % 3);
        else
            row1_set_data(&row, i, b[at + 2] % 3, b[at + 3]);
    }
    len = row1_encode(&row, key, row_bytes);
    CHECK(row1_decode(&back, key, (struct slice){row_bytes, len}) && back.n_data == row.n_data);
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        const struct row_source *s = row1_data(&row, i), *t = row1_data(&back, i);
        CHECK(!s == !t);
        CHECK(s ? s->branch == t->branch && s->epoch == t->epoch : row.source[i] == back.source[i]);
    }
    row1_free(&back);
    row1_free(&row);
}

static void try_row2(struct slice bytes)
{
    static struct row2 row, back;
    uint64_t epoch = 0, branch = 0;
    if (!row2_decode(&row, key, bytes)) {
        CHECK(row2_n_data(&row) == 0);
        return;
    }
    for (unsigned i = 0; i < INDEX_FANOUT; i++) {
        CHECK(row.entry[i].kind <= ROW2_ROW && row.entry[i].n_data <= INDEX_FANOUT);
        epoch = max_u64(epoch, row.entry[i].epoch);
        branch = max_u64(branch, row.entry[i].branch);
    }
    size_t len = row2_encode(&row, key, row_bytes);
    CHECK(len == bytes.len && memcmp(row_bytes, bytes.data, len) == 0);
    CHECK(len <= row2_bytes_max(epoch, branch));
    CHECK(row2_n_data(&row) <= INDEX_FANOUT * INDEX_FANOUT);
    CHECK(!row2_decode(&back, other_key, bytes));
}

static void check_same(const struct key *k, struct slice bytes)
{
    CHECK(k->len == bytes.len && memcmp(k->bytes, bytes.data, k->len) == 0);
}

static void try_key(struct slice bytes)
{
    static const char tags[] = "hoaqrgl";
    char name[NAME_BYTES_MAX + 1], snapshot[NAME_BYTES_MAX + 1];
    uint64_t a, b, c;
    unsigned level;
    uint8_t id[16];
    struct key k;
    if (key_parse_name(bytes, name)) {
        key_name(&k, name);
        check_same(&k, bytes);
    }
    for (const char *tag = tags; *tag; tag++)
        if (key_parse_branch(bytes, *tag, &a)) {
            key_prefix_branch(&k, *tag, a);
            check_same(&k, bytes);
        }
    if (key_parse_trash(bytes, &a, &b)) {
        key_trash(&k, a, b);
        check_same(&k, bytes);
    }
    uint64_t row;
    if (key_parse_row(bytes, &a, &level, &row, &b)) {
        CHECK(level == 1 || level == 2);
        key_row(&k, a, level, row, b);
        check_same(&k, bytes);
    }
    if (key_parse_block(bytes, &a, &b, &c)) {
        key_block(&k, a, b, c);
        check_same(&k, bytes);
    }
    if (key_parse_session(bytes, id)) {
        key_session(&k, id);
        check_same(&k, bytes);
    }
    if (key_parse_snapshot(bytes, &a, &b)) {
        key_snapshot(&k, a, b);
        check_same(&k, bytes);
    }
    if (key_parse_child(bytes, &a, &b, &c)) {
        key_child(&k, a, b, c);
        check_same(&k, bytes);
    }

    /* The name of a volume or a snapshot, as a client or a user gives it. */
    char *text = mem_alloc(bytes.len + 1);
    memcpy(text, bytes.data, bytes.len);
    text[bytes.len] = '\0';
    if (name_split(text, name, snapshot)) {
        char full[FULL_NAME_BYTES];
        CHECK(name_valid(name) && (!snapshot[0] || name_valid(snapshot)));
        strcpy(full, name);
        if (snapshot[0])
            strcat(strcat(full, "@"), snapshot);
        CHECK(strcmp(full, text) == 0);
    }
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const tries[])(struct slice) = {
        try_meta,  try_counter, try_name,  try_header,  try_ancestry, try_snapshot,
        try_child, try_owner,   try_state, try_session, try_trash,    try_removed,
        try_mail,  try_answer,  try_row1,  try_row2,    try_key};
    static struct key k, other;
    struct fuzz_input in = fuzz_input(data, size);
    unsigned kind = (unsigned)fuzz_take(&in, 1) % (sizeof tries / sizeof *tries);
    bool sealed = fuzz_take(&in, 1) % 8 != 0 && tries[kind] != try_key;
    key_header(&k, 7);
    key_header(&other, 8);
    key = key_slice(&k);
    other_key = key_slice(&other);
    /* In memory of exactly the length, so that a sanitizer sees a read beyond it. */
    size_t len = fuzz_left(&in);
    uint8_t *bytes = mem_alloc(len + (sealed ? HASH_BYTES : 0) + (len == 0));
    if (len > 0)
        memcpy(bytes, in.at, len);
    if (sealed)
        len = seal(bytes, len);
    tries[kind]((struct slice){bytes, len});
    free(bytes);
    return 0;
}
