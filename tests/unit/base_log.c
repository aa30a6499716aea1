/* Log lines: their forms, and that nothing a client says begins a line or ends a string. */
#include "test.h"

#include <jansson.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/loglimit.h"

/* What `say` writes to stderr. */
static char *heard(void (*say)(const char *text), const char *text)
{
    static char out[16384];
    int pipes[2], kept = dup(STDERR_FILENO);
    assert_return_code(pipe(pipes), 0);
    assert_true(kept >= 0 && dup2(pipes[1], STDERR_FILENO) >= 0);
    say(text);
    assert_true(dup2(kept, STDERR_FILENO) >= 0);
    close(pipes[1]);
    ssize_t n = read(pipes[0], out, sizeof out - 1);
    assert_true(n >= 0);
    out[n] = '\0';
    close(pipes[0]);
    close(kept);
    return out;
}

static void warn(const char *text)
{
    log_client_warning(text, text, "client %s said", text);
}

static void whisper(const char *text)
{
    log_debug("%s", text);
}

static void info(const char *text)
{
    log_info("%s", text);
}

static const struct {
    const char *said, *safe;
} texts[] = {
    {"plain", "plain"},
    {"two\nlines", "two lines"},
    {"a\r\033[31mb\tc\x7f", "a??[31mb?c?"},
    {"quote\" and \\n", "quote\" and \\n"},
    {"\xc3\xa9\xe2\x82\xac\xf0\x9f\x90\x91", "\xc3\xa9\xe2\x82\xac\xf0\x9f\x90\x91"},
    /* Control characters of 8 bits, line separators, turned writing. */
    {"\xc2\x9b" "1m\xe2\x80\xa8x\xe2\x80\xaey\xe2\x81\xa6z", "?1m?x?y?z"},
    /* No UTF-8: a lone byte, one cut short, an overlong slash, a surrogate, past the last. */
    {"\xff\xc3", "??"},
    {"\xc0\xaf\xe0\x80\xaf", "?????"},
    {"\xed\xa0\x80\xf4\x90\x80\x80\xf5", "????????"},
    {"\xe2\x82", "??"},
};

static void text_lines(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        char *line = heard(warn, texts[i].said);
        char wanted[200];
        snprintf(wanted, sizeof wanted, "Z warning: client %s said\n", texts[i].safe);
        /* 2026-11-23T14:00:00.000Z */
        assert_true(strlen(line) > 23);
        assert_string_equal(line + 23, wanted);
    }
}

static void json_lines(void **state)
{
    (void)state;
    assert_true(log_set_format(LOG_FORMAT_JSON));
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        char *line = heard(warn, texts[i].said);
        char wanted[200];
        assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
        json_t *object = json_loads(line, JSON_REJECT_DUPLICATES, NULL);
        assert_non_null(object);
        assert_int_equal(json_object_size(object), 5);
        snprintf(wanted, sizeof wanted, "client %s said", texts[i].safe);
        assert_string_equal(json_string_value(json_object_get(object, "message")), wanted);
        assert_string_equal(json_string_value(json_object_get(object, "volume")), texts[i].safe);
        assert_string_equal(json_string_value(json_object_get(object, "client")), texts[i].safe);
        assert_string_equal(json_string_value(json_object_get(object, "level")), "warning");
        assert_int_equal(strlen(json_string_value(json_object_get(object, "time"))), 24);
        json_decref(object);
    }
    /* What a line is not about is not in it. */
    json_t *object = json_loads(heard(info, "x"), 0, NULL);
    assert_int_equal(json_object_size(object), 3);
    json_decref(object);
    assert_true(log_set_format(LOG_FORMAT_TEXT));
}

/* The longest line is still one line, and whole in JSON; a character is never cut in half. */
static void long_lines(void **state)
{
    (void)state;
    static char text[10000];
    for (size_t lead = 0; lead < 4; lead++) {
        memset(text, '"', lead);
        for (size_t i = lead; i + 3 < sizeof text; i += 3)
            memcpy(text + i, "\xe2\x82\xac", 4);
        assert_true(log_set_format(LOG_FORMAT_JSON));
        json_t *object = json_loads(heard(warn, text), 0, NULL);
        assert_non_null(object);
        assert_true(json_string_length(json_object_get(object, "message")) > 2000);
        json_decref(object);
        memset(text, '"', sizeof text - 1);
        object = json_loads(heard(warn, text), 0, NULL);
        assert_non_null(object);
        assert_true(json_string_length(json_object_get(object, "message")) > 2000);
        json_decref(object);
        assert_true(log_set_format(LOG_FORMAT_TEXT));
        char *line = heard(warn, text);
        assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
    }
}

static void levels(void **state)
{
    (void)state;
    assert_string_equal(heard(whisper, "x"), "");
    log_set_level(LOG_LEVEL_DEBUG);
    assert_non_null(strstr(heard(whisper, "x"), " debug: x\n"));
    log_set_level(LOG_LEVEL_ERROR);
    assert_string_equal(heard(warn, "x"), "");
    log_set_level(LOG_LEVEL_INFO);
}

/* A thousand at once, some a moment later, and those of the next window. */
static void refuse(const char *text)
{
    struct log_limit l = {.what = "refusals", .level = LOG_LEVEL_WARNING, .lines_max = 3};
    uint64_t now_ns = 7 * LOG_LIMIT_WINDOW_NS;
    (void)text;
    for (int i = 0; i < 1000; i++)
        if (log_limit_may(&l, now_ns, 1))
            log_warning("refused %d", i);
    log_limit_tick(&l, now_ns + LOG_LIMIT_WINDOW_NS - 1);
    assert_false(log_limit_may(&l, now_ns + LOG_LIMIT_WINDOW_NS - 1, 5));
    log_limit_tick(&l, now_ns + LOG_LIMIT_WINDOW_NS);
    log_limit_tick(&l, now_ns + LOG_LIMIT_WINDOW_NS);
    if (log_limit_may(&l, now_ns + LOG_LIMIT_WINDOW_NS, 1))
        log_warning("again");
}

static void limits(void **state)
{
    (void)state;
    const char *all = heard(refuse, "");
    assert_non_null(strstr(all, "refused 2"));
    assert_null(strstr(all, "refused 3"));
    const char *told = strstr(all, "warning: refusals: 1002 more were not shown\n");
    assert_non_null(told);
    assert_null(strstr(strchr(told, '\n'), "not shown"));
    assert_non_null(strstr(told, "again"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_lines),
        cmocka_unit_test(json_lines),
        cmocka_unit_test(long_lines),
        cmocka_unit_test(levels),
        cmocka_unit_test(limits),
    };
    return cmocka_run_group_tests_name("base_log", tests, NULL, NULL);
}
