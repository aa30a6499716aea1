/* Records: round trips, and refusal of everything that was cut, flipped or moved (G5). */
#include "test.h"

#include "chance.h"
#include "base/hash.h"
#include "volume/records.h"

#define ROUNDS 500

static void random_text(struct chance *c, char *out, size_t max)
{
    size_t len = chance_below(c, 4) == 0 ? max : chance_below(c, max + 1);
    for (size_t i = 0; i < len; i++)
        out[i] = (char)(1 + chance_below(c, 255));
    out[len] = '\0';
}

static void assert_hostile_bytes_refused(bool (*decodes)(struct slice key, struct slice bytes),
                                         struct slice key, const uint8_t *bytes, size_t len)
{
    /* In memory of exactly the length, so that a sanitizer sees a read beyond it. */
    uint8_t *copy = malloc(len + 1);
    assert_non_null(copy);
    for (size_t cut = 0; cut < len; cut++) {
        uint8_t *shorter = malloc(cut ? cut : 1);
        assert_non_null(shorter);
        memcpy(shorter, bytes, cut);
        assert_false(decodes(key, (struct slice){shorter, cut}));
        free(shorter);
    }
    memcpy(copy, bytes, len);
    copy[len] = 0;
    assert_false(decodes(key, (struct slice){copy, len + 1}));
    for (size_t bit = 0; bit < len * 8; bit++) {
        copy[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        assert_false(decodes(key, (struct slice){copy, len}));
        copy[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    free(copy);
}

/* For each kind of record: fill one at random, take it there and back, and see the bytes
 * refused when changed, and under another key. */
#define ROUND_TRIP(name, make_key, FILL)                                                           \
    static bool name##_decodes(struct slice key, struct slice bytes)                               \
    {                                                                                              \
        struct name##_record rec;                                                                  \
        return name##_decode(key, bytes, &rec);                                                    \
    }                                                                                              \
    static void name##_round_trip(void **state)                                                    \
    {                                                                                              \
        (void)state;                                                                               \
        struct chance c = chance_begin(#name);                                                     \
        for (int round = 0; round < ROUNDS; round++) {                                             \
            struct key key, other;                                                                 \
            uint64_t branch = chance_wide(&c);                                                     \
            make_key(&key, branch);                                                                \
            make_key(&other, branch + 1);                                                          \
            struct name##_record rec, back;                                                        \
            memset(&rec, 0, sizeof rec);                                                           \
            FILL;                                                                                  \
            uint8_t bytes[RECORD_BYTES_MAX];                                                       \
            size_t len = name##_encode(&rec, key_slice(&key), bytes);                              \
            struct slice stored = {bytes, len};                                                    \
            assert_true(name##_decode(key_slice(&key), stored, &back));                            \
            uint8_t again[RECORD_BYTES_MAX];                                                       \
            assert_int_equal(name##_encode(&back, key_slice(&key), again), len);                   \
            assert_memory_equal(bytes, again, len);                                                \
            assert_false(name##_decodes(key_slice(&other), stored));                               \
            if (round < 3)                                                                         \
                assert_hostile_bytes_refused(name##_decodes, key_slice(&key), bytes, len);         \
        }                                                                                          \
    }

#define TEXT(field) random_text(&c, rec.field, sizeof rec.field - 1)
#define BYTES(field) chance_fill(&c, rec.field, sizeof rec.field)
#define WIDE(field) rec.field = chance_wide(&c)
#define NARROW(field) rec.field = (uint32_t)chance_wide(&c)

static void meta_key(struct key *k, uint64_t n)
{
    if (n & 1)
        key_store_meta(k);
    else
        key_branch_counter(k);
}

ROUND_TRIP(meta, meta_key, NARROW(format); WIDE(features.compat); WIDE(features.ro_compat);
           WIDE(features.incompat); BYTES(uuid); WIDE(created_ns))
ROUND_TRIP(counter, meta_key, WIDE(next_branch))
ROUND_TRIP(name, key_header, WIDE(branch))
ROUND_TRIP(
    header, key_header, WIDE(features.compat); WIDE(features.ro_compat); WIDE(features.incompat);
    rec.size = 512 * (1 + chance_below(&c, 1ull << 53));
    rec.block_size = 4096u << chance_below(&c, 5); rec.codec = (uint8_t)chance_below(&c, 3);
    rec.codec_level = (uint8_t)chance_below(&c, 20); rec.epoch = 1 + chance_wide(&c) / 2;
    if (chance_below(&c, 2)) {
        rec.parent_branch = 1 + chance_wide(&c) / 2;
        rec.parent_epoch = 1 + chance_wide(&c) / 2;
    };
    if (chance_below(&c, 2)) rec.import_base = chance_below(&c, rec.epoch);
    WIDE(created_ns); TEXT(description))
ROUND_TRIP(owner, key_owner, WIDE(token); BYTES(session); WIDE(since_ns); NARROW(pid); TEXT(host);
           TEXT(address))
ROUND_TRIP(
    state, key_state, WIDE(generation); WIDE(data_blocks); WIDE(trash_next);
    rec.changed = chance_below(&c, 2) ? rec.generation : rec.generation / 3;
    rec.n_logs = (uint32_t)chance_below(&c, STATE_LOGS_MAX + 1);
    for (uint32_t i = 0; i < rec.n_logs; i++) {
        WIDE(logs[i].log_id);
        WIDE(logs[i].applied_seq);
    })
ROUND_TRIP(session, key_owner, rec.state = (uint8_t)(1 + chance_below(&c, 2)); WIDE(counter);
           NARROW(lease_ms); WIDE(started_ns); BYTES(process.boot); WIDE(process.pid_namespace);
           WIDE(process.time_namespace); WIDE(process.start_ticks); NARROW(process.pid); TEXT(host);
           TEXT(address))
ROUND_TRIP(trash, key_removed, rec.epoch = 1 + chance_wide(&c) / 2;
           rec.after = chance_below(&c, 2) ? rec.epoch - 1 : chance_below(&c, rec.epoch);
           rec.first_block = chance_wide(&c) / 2;
           rec.end_block = rec.first_block + chance_wide(&c) / 2)
ROUND_TRIP(removed, key_removed, WIDE(removed_ns); TEXT(name))
ROUND_TRIP(mail, key_mailbox, WIDE(id); rec.kind = (uint8_t)chance_u64(&c); WIDE(size);
           rec.shrink = (uint8_t)chance_below(&c, 2); TEXT(from))
ROUND_TRIP(answer, key_answer, WIDE(id); rec.status = (uint8_t)chance_u64(&c); TEXT(text))

/* A record with a right hash and impossible contents: what a broken writer could leave. */
static void impossible_records_are_refused(void **state)
{
    (void)state;
    struct key k;
    key_header(&k, 1);
    uint8_t bytes[RECORD_BYTES_MAX];
    struct header_record good = {.size = 512, .block_size = 4096, .epoch = 1}, back;
    for (int wrong = 0; wrong < 10; wrong++) {
        struct header_record h = good;
        switch (wrong) {
        case 0:
            break;
        case 1:
            h.size = 0;
            break;
        case 2:
            h.size = 513;
            break;
        case 3:
            h.size = (1ull << 62) + 512;
            break;
        case 4:
            h.block_size = 0;
            break;
        case 5:
            h.block_size = 12288;
            break;
        case 6:
            h.block_size = 131072;
            break;
        case 7:
            h.epoch = 0;
            break;
        case 8:
            h.import_base = h.epoch;
            break;
        default:
            h.parent_branch = 5;
        }
        size_t len = header_encode(&h, key_slice(&k), bytes);
        assert_int_equal(header_decode(key_slice(&k), (struct slice){bytes, len}, &back),
                         wrong == 0);
    }

    uint64_t seed = hash64(k.bytes, k.len, 0);
#define SEALED(decode, rec, ...)                                                                   \
    do {                                                                                           \
        static const uint8_t fields[] = {__VA_ARGS__};                                             \
        memcpy(bytes, fields, sizeof fields);                                                      \
        put_le64(bytes + sizeof fields, hash64(fields, sizeof fields, seed));                      \
        assert_false(decode(key_slice(&k), (struct slice){bytes, sizeof fields + 8}, rec));        \
    } while (0)
    struct removed_record removed;
    struct counter_record counter;
    struct state_record st;
    SEALED(removed_decode, &removed, 1, 0, 0, 0, 0, 0, 0, 0, 0, 129, 0);         /* text too long */
    SEALED(removed_decode, &removed, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 'a');      /* text cut */
    SEALED(removed_decode, &removed, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 'a', 0);   /* zero inside */
    SEALED(removed_decode, &removed, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 'a', 'b'); /* more behind */
    SEALED(counter_decode, &counter, 2, 1, 0, 0, 0, 0, 0, 0, 0);                 /* later version */
    SEALED(state_decode, &st, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
           0, 0, 17);
#undef SEALED
}

/* What version 1 wrote: no word of which process it was, so nobody calls it dead for that. */
static void old_session_records_are_read(void **state)
{
    (void)state;
    struct key k;
    uint8_t bytes[128] = {1, SESSION_FENCED};
    static const uint8_t id[16] = {5};
    static const struct process_id nobody;
    struct session_record rec;
    key_session(&k, id);
    put_le64(bytes + 2, 7);
    put_le32(bytes + 10, 10000);
    put_le32(bytes + 14, 4711);
    put_le64(bytes + 18, 99);
    bytes[26] = 1;
    bytes[28] = 'h';
    bytes[29] = 2;
    memcpy(bytes + 31, "at", 2);
    put_le64(bytes + 33, hash64(bytes, 33, hash64(k.bytes, k.len, 0)));
    assert_true(session_decode(key_slice(&k), (struct slice){bytes, 41}, &rec));
    assert_int_equal(rec.state, SESSION_FENCED);
    assert_int_equal(rec.counter, 7);
    assert_int_equal(rec.lease_ms, 10000);
    assert_int_equal(rec.started_ns, 99);
    assert_int_equal(rec.process.pid, 4711);
    assert_memory_equal(rec.process.boot, nobody.boot, sizeof nobody.boot);
    assert_string_equal(rec.host, "h");
    assert_string_equal(rec.address, "at");
    /* A later one is not guessed at. */
    bytes[0] = 3;
    put_le64(bytes + 33, hash64(bytes, 33, hash64(k.bytes, k.len, 0)));
    assert_false(session_decode(key_slice(&k), (struct slice){bytes, 41}, &rec));
}

/* What version 1 wrote: not what clients changed last, so all of it may be theirs. */
static void old_state_records_are_read(void **state)
{
    (void)state;
    struct key k;
    uint8_t bytes[64] = {1};
    struct state_record rec;
    key_state(&k, 5);
    put_le64(bytes + 1, 12);
    put_le64(bytes + 9, 34);
    put_le64(bytes + 17, 56);
    bytes[25] = 1;
    put_le64(bytes + 26, 78);
    put_le64(bytes + 34, 90);
    put_le64(bytes + 42, hash64(bytes, 42, hash64(k.bytes, k.len, 0)));
    assert_true(state_decode(key_slice(&k), (struct slice){bytes, 50}, &rec));
    assert_int_equal(rec.generation, 12);
    assert_int_equal(rec.data_blocks, 34);
    assert_int_equal(rec.trash_next, 56);
    assert_int_equal(rec.changed, 12);
    assert_int_equal(rec.n_logs, 1);
    assert_int_equal(rec.logs[0].log_id, 78);
    assert_int_equal(rec.logs[0].applied_seq, 90);
    bytes[0] = 3;
    put_le64(bytes + 42, hash64(bytes, 42, hash64(k.bytes, k.len, 0)));
    assert_false(state_decode(key_slice(&k), (struct slice){bytes, 50}, &rec));
}

/* Of one epoch it is what it always was; the epochs of another have to be some. */
static void trash_of_one_epoch_has_its_old_form(void **state)
{
    (void)state;
    struct key k;
    uint8_t bytes[RECORD_BYTES_MAX];
    struct trash_record rec = {.after = 6, .epoch = 7, .first_block = 8, .end_block = 9}, back;
    key_trash(&k, 5, 1);
    assert_int_equal(trash_encode(&rec, key_slice(&k), bytes), 33);
    assert_int_equal(bytes[0], 1);
    assert_true(trash_decode(key_slice(&k), (struct slice){bytes, 33}, &back));
    assert_int_equal(back.after, 6);
    rec.after = 3;
    size_t len = trash_encode(&rec, key_slice(&k), bytes);
    assert_int_equal(bytes[0], 2);
    assert_true(trash_decode(key_slice(&k), (struct slice){bytes, len}, &back));
    assert_int_equal(back.after, 3);
    assert_int_equal(back.epoch, 7);
    rec.after = 7;
    len = trash_encode(&rec, key_slice(&k), bytes);
    assert_false(trash_decode(key_slice(&k), (struct slice){bytes, len}, &back));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(meta_round_trip),    cmocka_unit_test(counter_round_trip),
        cmocka_unit_test(name_round_trip),    cmocka_unit_test(header_round_trip),
        cmocka_unit_test(owner_round_trip),   cmocka_unit_test(state_round_trip),
        cmocka_unit_test(session_round_trip), cmocka_unit_test(trash_round_trip),
        cmocka_unit_test(trash_of_one_epoch_has_its_old_form),
        cmocka_unit_test(removed_round_trip), cmocka_unit_test(mail_round_trip),
        cmocka_unit_test(answer_round_trip),  cmocka_unit_test(impossible_records_are_refused),
        cmocka_unit_test(old_session_records_are_read),
        cmocka_unit_test(old_state_records_are_read),
    };
    return cmocka_run_group_tests_name("records", tests, NULL, NULL);
}
