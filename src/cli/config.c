/* The configuration file; config.h says what it looks like. */
#include "cli/config.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "base/textfile.h"

static enum status take_line(struct config *c, char *text, unsigned line, struct err *e)
{
    char *equals = strchr(text, '=');
    if (text[0] == '\0' || text[0] == '#')
        return ST_OK;
    if (!equals)
        /* (Which line says enough: a file of keys may have been given by mistake.) */
        return fail(e, ST_INVAL, "%s:%u: this line is not of the form \"name = value\"", c->file,
                    line);
    *equals = '\0';
    char *key = textfile_trim(text), *value = textfile_trim(equals + 1);
    if (key[0] == '\0')
        return fail(e, ST_INVAL, "%s:%u: there is no name before the \"=\"", c->file, line);
    if (value[0] == '\0')
        return fail(e, ST_INVAL, "%s:%u: \"%.64s\" has no value", c->file, line, key);
    mem_grow(&c->settings, &c->cap, c->n + 1, sizeof *c->settings);
    c->settings[c->n++] = (struct config_setting){key, value, line};
    return ST_OK;
}

/* c->text is there, `len` bytes and a NUL. */
static enum status take_text(struct config *c, size_t len, struct err *e)
{
    struct textfile_lines lines = textfile_begin(c->text, len);
    enum status st = ST_OK;
    unsigned bad;
    char *text;
    if (!textfile_is_text(c->text, len, &bad))
        return fail(e, ST_INVAL, "%s:%u: there is a control character in the line: is this a "
                    "configuration?", c->file, bad);
    while (st == ST_OK && (text = textfile_line(&lines))) {
        if (lines.line > CONFIG_LINES_MAX)
            st = fail(e, ST_INVAL, "%s:%u: more than %u lines", c->file, lines.line,
                      CONFIG_LINES_MAX);
        else if (strlen(text) > CONFIG_LINE_BYTES_MAX)
            st = fail(e, ST_INVAL, "%s:%u: the line has more than %u bytes", c->file, lines.line,
                      CONFIG_LINE_BYTES_MAX);
        else
            st = take_line(c, text, lines.line, e);
    }
    return st;
}

enum status config_parse(struct config *c, const char *file, const uint8_t *bytes, size_t len,
                         struct err *e)
{
    *c = (struct config){.file = file};
    if (len > CONFIG_BYTES_MAX)
        return fail(e, ST_INVAL, "the configuration %s has more than %u bytes", file,
                    CONFIG_BYTES_MAX);
    c->text = mem_alloc(len + 1);
    if (len > 0)
        memcpy(c->text, bytes, len);
    c->text[len] = '\0';
    return take_text(c, len, e);
}

enum status config_load(struct config *c, const char *file, struct err *e)
{
    size_t len;
    *c = (struct config){.file = file};
    enum status st = textfile_read(file, "configuration", CONFIG_BYTES_MAX, &c->text, &len, e);
    return st == ST_OK ? take_text(c, len, e) : st;
}

void config_free(struct config *c)
{
    free(c->settings);
    free(c->text);
    *c = (struct config){0};
}
