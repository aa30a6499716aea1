/* The form of the configuration file: src/cli/config.h. */
#include "test.h"

#include "base/mem.h"
#include "chance.h"
#include "cli/config.h"

static enum status parse(struct config *c, const char *text, struct err *e)
{
    *e = (struct err){0};
    return config_parse(c, "F", (const uint8_t *)text, strlen(text), e);
}

static void settings_stand_in_their_order(void **state)
{
    (void)state;
    struct config c;
    struct err e;
    assert_int_equal(parse(&c, "# first\n\n a=b\n\tlisten = :1 # not a comment \r\n#x = y\na = = c",
                           &e), ST_OK);
    assert_int_equal(c.n, 3);
    static const struct {
        const char *key, *value;
        unsigned line;
    } want[] = {
        {"a", "b", 3}, {"listen", ":1 # not a comment", 4}, {"a", "= c", 6}};
    for (size_t i = 0; i < 3; i++) {
        assert_string_equal(c.settings[i].key, want[i].key);
        assert_string_equal(c.settings[i].value, want[i].value);
        assert_int_equal(c.settings[i].line, want[i].line);
    }
    config_free(&c);
    assert_int_equal(parse(&c, "", &e), ST_OK);
    assert_int_equal(c.n, 0);
    config_free(&c);
}

static void a_byte_order_mark_is_no_part_of_the_first_line(void **state)
{
    (void)state;
    struct config c;
    struct err e;
    assert_int_equal(parse(&c, "\xef\xbb\xbfstore = x\nb = \xef\xbb\xbf\n", &e), ST_OK);
    assert_int_equal(c.n, 2);
    assert_string_equal(c.settings[0].key, "store");
    assert_string_equal(c.settings[1].value, "\xef\xbb\xbf");
    config_free(&c);
    assert_int_equal(parse(&c, "\xef\xbb\xbf", &e), ST_OK);
    assert_int_equal(c.n, 0);
    config_free(&c);
    assert_int_equal(parse(&c, "\xef\xbb", &e), ST_INVAL);
    config_free(&c);
}

static void what_is_wrong_is_named_with_its_line(void **state)
{
    (void)state;
    static const char *const wrong[][2] = {
        {"a = b\nc\n", "F:2: this line is not of the form"}, {"= b", "F:1: there is no name"},
        {"\n\na =\n", "F:3: \"a\" has no value"}, {"a = \x1b\n", "F:1: there is a control char"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct config c;
        struct err e;
        assert_int_equal(parse(&c, wrong[i][0], &e), ST_INVAL);
        assert_memory_equal(e.text, wrong[i][1], strlen(wrong[i][1]));
        config_free(&c);
    }
}

static void limits_hold(void **state)
{
    (void)state;
    struct config c;
    struct err e = {0};
    char *text = mem_alloc(CONFIG_BYTES_MAX + 1);
    memset(text, 'a', CONFIG_BYTES_MAX + 1);
    assert_int_equal(config_parse(&c, "F", (uint8_t *)text, CONFIG_BYTES_MAX + 1, &e), ST_INVAL);
    config_free(&c);
    text[1] = '=';
    assert_int_equal(config_parse(&c, "F", (uint8_t *)text, CONFIG_LINE_BYTES_MAX + 1, &e),
                     ST_INVAL);
    config_free(&c);
    assert_int_equal(config_parse(&c, "F", (uint8_t *)text, CONFIG_LINE_BYTES_MAX, &e), ST_OK);
    config_free(&c);
    for (unsigned i = 0; i <= CONFIG_LINES_MAX; i++)
        memcpy(text + 4 * i, "a=b\n", 4);
    assert_int_equal(config_parse(&c, "F", (uint8_t *)text, 4 * CONFIG_LINES_MAX, &e), ST_OK);
    assert_int_equal(c.n, CONFIG_LINES_MAX);
    config_free(&c);
    assert_int_equal(config_parse(&c, "F", (uint8_t *)text, 4 * (CONFIG_LINES_MAX + 1), &e),
                     ST_INVAL);
    config_free(&c);
    free(text);
}

/* Whatever the bytes: an answer, and the bytes untouched. */
static void any_bytes_are_answered(void **state)
{
    (void)state;
    static const char alphabet[] = "ab=# \t\r\n\0\"\xff";
    struct chance chance = chance_begin(__func__);
    for (int round = 0; round < 20000; round++) {
        uint8_t bytes[64], copy[64];
        size_t len = chance_below(&chance, sizeof bytes + 1);
        for (size_t i = 0; i < len; i++)
            bytes[i] = (uint8_t)alphabet[chance_below(&chance, sizeof alphabet - 1)];
        memcpy(copy, bytes, sizeof copy);
        struct config c;
        struct err e = {0};
        enum status st = config_parse(&c, "F", bytes, len, &e);
        assert_true(st == ST_OK ? !e.text[0] : strncmp(e.text, "F:", 2) == 0);
        for (size_t i = 0; i < c.n; i++)
            assert_true(c.settings[i].key[0] && c.settings[i].value[0]);
        assert_memory_equal(bytes, copy, len);
        config_free(&c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(settings_stand_in_their_order),
        cmocka_unit_test(a_byte_order_mark_is_no_part_of_the_first_line),
        cmocka_unit_test(what_is_wrong_is_named_with_its_line),
        cmocka_unit_test(limits_hold),
        cmocka_unit_test(any_bytes_are_answered),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
