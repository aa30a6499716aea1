/*
 * Any bytes as a configuration file; of the target "text".
 *
 * At stake: what a user types wrong gives one clear sentence, whatever it is; limits hold (G6).
 *
 * Oracle: a refusal is ST_INVAL with a sentence that names the file. What was taken is within the
 * limits, stands in order, without blanks at its ends, and is taken again, the same, when it is
 * written out as a file; the same bytes give the same answer.
 */
#include "text.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "cli/config.h"

static void check_text(const char *text)
{
    size_t len = strlen(text);
    CHECK(len > 0 && len <= CONFIG_LINE_BYTES_MAX);
    CHECK(!strchr(" \t\r\n", text[0]) && !strchr(" \t\r\n", text[len - 1]));
    for (size_t i = 0; i < len; i++)
        CHECK((unsigned char)text[i] >= ' ' || text[i] == '\t' || text[i] == '\r');
}

static void check_taken(const struct config *c)
{
    CHECK(c->n <= CONFIG_LINES_MAX);
    for (size_t i = 0; i < c->n; i++) {
        const struct config_setting *s = &c->settings[i];
        check_text(s->key);
        check_text(s->value);
        CHECK(!strchr(s->key, '=') && s->key[0] != '#');
        CHECK(s->line >= 1 && s->line <= CONFIG_LINES_MAX);
        CHECK(i == 0 || s->line > c->settings[i - 1].line);
    }
}

/* As a file, each setting on its own line; the first is empty, for what begins with the bytes of a
 * byte order mark. */
static uint8_t *write_out(const struct config *c, size_t *len)
{
    size_t room = 2;
    for (size_t i = 0; i < c->n; i++)
        room += strlen(c->settings[i].key) + strlen(c->settings[i].value) + 2;
    char *text = mem_alloc(room), *at = text;
    *at++ = '\n';
    for (size_t i = 0; i < c->n; i++) {
        at = stpcpy(at, c->settings[i].key);
        *at++ = '=';
        at = stpcpy(at, c->settings[i].value);
        *at++ = '\n';
    }
    *len = (size_t)(at - text);
    return (uint8_t *)text;
}

void try_config(const uint8_t *data, size_t size)
{
    struct config c, again;
    struct err e = {0}, e_again = {0};
    enum status st = config_parse(&c, "FILE", data, size, &e);
    CHECK(config_parse(&again, "FILE", data, size, &e_again) == st && again.n == c.n);
    CHECK(strcmp(e.text, e_again.text) == 0);
    config_free(&again);
    if (st != ST_OK) {
        CHECK(st == ST_INVAL && e.st == st && strstr(e.text, "FILE"));
        config_free(&c);
        return;
    }
    check_taken(&c);

    size_t len;
    uint8_t *text = write_out(&c, &len);
    CHECK(config_parse(&again, "FILE", text, len, &e) == ST_OK && again.n == c.n);
    for (size_t i = 0; i < c.n; i++) {
        CHECK(strcmp(again.settings[i].key, c.settings[i].key) == 0);
        CHECK(strcmp(again.settings[i].value, c.settings[i].value) == 0);
    }
    free(text);
    config_free(&again);
    config_free(&c);
}
