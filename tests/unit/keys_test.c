/* Keys: the bytes of the tuple encoding, its order, and parsing of what is not a key. */
#include "test.h"

#include "chance.h"
#include "volume/keys.h"

#define ROUNDS 20000

static int compare_keys(const struct key *a, const struct key *b)
{
    int c = memcmp(a->bytes, b->bytes, a->len < b->len ? a->len : b->len);
    if (c != 0)
        return c < 0 ? -1 : 1;
    return a->len < b->len ? -1 : a->len > b->len;
}

static int compare_u64(uint64_t a, uint64_t b)
{
    return a < b ? -1 : a > b;
}

static void assert_bytes(const struct key *k, const char *bytes, size_t len)
{
    assert_int_equal(k->len, len);
    assert_memory_equal(k->bytes, bytes, len);
}

/* What FoundationDB's own bindings pack for the same tuples: the stored format. */
static void bytes_are_those_of_the_tuple_layer(void **state)
{
    (void)state;
    struct key k;
#define BYTES(text) assert_bytes(&k, text, sizeof(text) - 1)
    key_store_meta(&k);
    BYTES("\x02m\0");
    key_branch_counter(&k);
    BYTES("\x02"
          "c\0");
    key_name(&k, "example");
    BYTES("\x02n\0\x02"
          "example\0");
    key_header(&k, 0);
    BYTES("\x02h\0\x14");
    key_owner(&k, 1);
    BYTES("\x02o\0\x15\x01");
    key_state(&k, 255);
    BYTES("\x02"
          "a\0\x15\xff");
    key_mailbox(&k, 256);
    BYTES("\x02q\0\x16\x01\0");
    key_answer(&k, UINT64_MAX);
    BYTES("\x02r\0\x1c\xff\xff\xff\xff\xff\xff\xff\xff");
    key_trash(&k, 3, 65536);
    BYTES("\x02t\0\x15\x03\x17\x01\0\0");
    key_removed(&k, 7);
    BYTES("\x02g\0\x15\x07");
    key_row(&k, 2, 1, 300, 4);
    BYTES("\x02i\0\x15\x02\x15\x01\x16\x01\x2c\x15\x04");
    key_block(&k, 2, 4, 0);
    BYTES("\x02"
          "b\0\x15\x02\x15\x04\x14");
    key_prefix(&k, 'n');
    key_prefix_end(&k);
    BYTES("\x02n\0\xff");
    static const uint8_t id[16] = {1, 0, 2, 0xff, 0, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0};
    key_session(&k, id);
    BYTES("\x02s\0\x01\x01\0\xff\x02\xff\0\xff\0\xff\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\0\xff\0");
#undef BYTES
}

static void keys_come_apart_as_they_were_made(void **state)
{
    (void)state;
    struct chance c = chance_begin("keys");
    for (int i = 0; i < ROUNDS; i++) {
        struct key k;
        uint64_t a = chance_wide(&c), b = chance_wide(&c), d = chance_wide(&c), x, y, z;
        unsigned level;
        key_block(&k, a, b, d);
        assert_true(key_parse_block(key_slice(&k), &x, &y, &z));
        assert_true(x == a && y == b && z == d);
        assert_false(key_parse_trash(key_slice(&k), &x, &y));
        unsigned of = 1 + (unsigned)chance_below(&c, 2);
        key_row(&k, a, of, b, d);
        assert_true(key_parse_row(key_slice(&k), &x, &level, &y, &z));
        assert_true(x == a && level == of && y == b && z == d);
        key_trash(&k, a, b);
        assert_true(key_parse_trash(key_slice(&k), &x, &y));
        assert_true(x == a && y == b);
        key_header(&k, a);
        assert_true(key_parse_branch(key_slice(&k), 'h', &x));
        assert_true(x == a);
        assert_false(key_parse_branch(key_slice(&k), 'o', &x));

        uint8_t id[16], id2[16];
        chance_fill(&c, id, sizeof id);
        id[chance_below(&c, 16)] = 0;
        id[chance_below(&c, 16)] = 0xff;
        key_session(&k, id);
        assert_true(key_parse_session(key_slice(&k), id2));
        assert_memory_equal(id, id2, 16);

        static const char alphabet[] =
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
        char name[NAME_BYTES_MAX + 1] = "", back[NAME_BYTES_MAX + 1];
        size_t len = 1 + chance_below(&c, NAME_BYTES_MAX);
        for (size_t n = 0; n < len; n++)
            name[n] = alphabet[chance_below(&c, n == 0 ? 62 : sizeof alphabet - 1)];
        assert_true(name_valid(name));
        key_name(&k, name);
        assert_true(key_parse_name(key_slice(&k), back));
        assert_string_equal(name, back);
    }
}

/* The order of the bytes is the order of the parts, and everything below a prefix lies
 * between it and its end. */
static void order_is_that_of_the_parts(void **state)
{
    (void)state;
    struct chance c = chance_begin("order");
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t v[2][3];
        for (int s = 0; s < 2; s++)
            for (int n = 0; n < 3; n++)
                v[s][n] =
                    s && chance_below(&c, 2) ? v[0][n] + chance_below(&c, 2) : chance_wide(&c);
        int want = compare_u64(v[0][0], v[1][0]);
        if (!want)
            want = compare_u64(v[0][1], v[1][1]);
        if (!want)
            want = compare_u64(v[0][2], v[1][2]);
        struct key a, b, begin, end;
        key_block(&a, v[0][0], v[0][1], v[0][2]);
        key_block(&b, v[1][0], v[1][1], v[1][2]);
        assert_int_equal(compare_keys(&a, &b), want);

        key_prefix_blocks(&begin, v[1][0], v[1][1]);
        end = begin;
        key_prefix_end(&end);
        bool inside = compare_keys(&begin, &a) <= 0 && compare_keys(&a, &end) < 0;
        assert_int_equal(inside, v[0][0] == v[1][0] && v[0][1] == v[1][1]);

        key_row(&a, v[0][0], 1, v[0][1], v[0][2]);
        key_prefix_rows(&begin, v[0][0], 1);
        end = begin;
        key_prefix_end(&end);
        assert_true(compare_keys(&begin, &a) < 0 && compare_keys(&a, &end) < 0);
        key_prefix_rows(&begin, v[0][0], 2);
        assert_true(compare_keys(&a, &begin) < 0);
        key_prefix_branch(&begin, 'i', v[0][0]);
        assert_true(compare_keys(&begin, &a) < 0);
    }
    struct key a, b;
    key_name(&a, "vol");
    key_name(&b, "vol-1");
    assert_int_equal(compare_keys(&a, &b), -1);
}

/* Cut anywhere, with a byte more, or with any byte changed, a key either is refused or is
 * exactly the key of what it parses to. */
static void nothing_else_parses(void **state)
{
    (void)state;
    struct chance c = chance_begin("hostile keys");
    for (int i = 0; i < 300; i++) {
        struct key k;
        uint64_t x, y, z;
        unsigned level;
        key_block(&k, chance_wide(&c), chance_wide(&c), chance_wide(&c));
        for (size_t len = 0; len < k.len; len++)
            assert_false(key_parse_block((struct slice){k.bytes, len}, &x, &y, &z));
        struct key longer = k;
        longer.bytes[longer.len++] = (uint8_t)chance_u64(&c);
        assert_false(key_parse_block(key_slice(&longer), &x, &y, &z));
        for (size_t at = 0; at < k.len; at++) {
            struct key bad = k, again;
            bad.bytes[at] ^= (uint8_t)(1 + chance_below(&c, 255));
            if (!key_parse_block(key_slice(&bad), &x, &y, &z))
                continue;
            key_block(&again, x, y, z);
            assert_int_equal(compare_keys(&bad, &again), 0);
        }

        key_row(&k, chance_wide(&c), 2, chance_wide(&c), chance_wide(&c));
        for (size_t len = 0; len < k.len; len++)
            assert_false(key_parse_row((struct slice){k.bytes, len}, &x, &level, &y, &z));

        uint8_t id[16] = {0};
        chance_fill(&c, id, 4);
        key_session(&k, id);
        for (size_t len = 0; len < k.len; len++)
            assert_false(key_parse_session((struct slice){k.bytes, len}, id));
        char name[NAME_BYTES_MAX + 1];
        key_name(&k, "abc");
        for (size_t len = 0; len < k.len; len++)
            assert_false(key_parse_name((struct slice){k.bytes, len}, name));
    }
    uint64_t x, y, z;
    unsigned level;
    static const uint8_t leading_zero[] = "\x02h\0\x16\0\x01";
    assert_false(key_parse_branch((struct slice){leading_zero, 6}, 'h', &x));
    static const uint8_t too_wide[] = "\x02h\0\x1d\1\1\1\1\1\1\1\1\1";
    assert_false(key_parse_branch((struct slice){too_wide, 13}, 'h', &x));
    static const uint8_t level_3[] = "\x02i\0\x15\1\x15\3\x15\1\x15\1";
    assert_false(key_parse_row((struct slice){level_3, 11}, &x, &level, &y, &z));
    char name[NAME_BYTES_MAX + 1];
    static const uint8_t zero_inside[] = "\x02n\0\x02"
                                         "a\0\xff"
                                         "b\0";
    assert_false(key_parse_name((struct slice){zero_inside, 9}, name));
    uint8_t long_name[200] = "\x02n\0\x02";
    memset(long_name + 4, 'a', 129);
    assert_false(key_parse_name((struct slice){long_name, 4 + 129 + 1}, name));
    long_name[4 + 128] = 0;
    assert_true(key_parse_name((struct slice){long_name, 4 + 128 + 1}, name));
    assert_int_equal(strlen(name), 128);
}

static void names(void **state)
{
    (void)state;
    static const char *const good[] = {"a", "0", "Z9", "a.b_c-d", "example", "1..2"};
    static const char *const bad[] = {"", ".a", "-a", "_a", "a b", "a/b", "a@b", "\xc3\xa4", "a\n"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_true(name_valid(good[i]));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(name_valid(bad[i]));
    char longest[NAME_BYTES_MAX + 2];
    memset(longest, 'x', sizeof longest);
    longest[NAME_BYTES_MAX + 1] = '\0';
    assert_false(name_valid(longest));
    longest[NAME_BYTES_MAX] = '\0';
    assert_true(name_valid(longest));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_are_those_of_the_tuple_layer),
        cmocka_unit_test(keys_come_apart_as_they_were_made),
        cmocka_unit_test(order_is_that_of_the_parts),
        cmocka_unit_test(nothing_else_parses),
        cmocka_unit_test(names),
    };
    return cmocka_run_group_tests_name("keys", tests, NULL, NULL);
}
