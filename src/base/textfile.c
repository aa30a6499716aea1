/* Small text files that people write; textfile.h has the contracts. */
#include "base/textfile.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

enum status textfile_read(const char *path, const char *what, size_t max, char **out, size_t *len,
                          struct err *e)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return fail(e, ST_INVAL, "cannot open the %s %s: %s", what, path, strerror(errno));
    char *text = mem_alloc(max + 1);
    size_t n = fread(text, 1, max + 1, file);
    bool failed = ferror(file);
    int why = errno;
    fclose(file);
    if (failed || n > max) {
        free(text);
        return failed ? fail(e, ST_INVAL, "cannot read the %s %s: %s", what, path, strerror(why))
                      : fail(e, ST_INVAL, "the %s %s has more than %zu bytes", what, path, max);
    }
    text = mem_realloc(text, n + 1);
    text[n] = '\0';
    *out = text;
    *len = n;
    return ST_OK;
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r';
}

char *textfile_trim(char *text)
{
    while (is_blank(*text))
        text++;
    size_t len = strlen(text);
    while (len > 0 && is_blank(text[len - 1]))
        len--;
    text[len] = '\0';
    return text;
}

struct textfile_lines textfile_begin(char *text, size_t len)
{
    static const char mark[] = "\xef\xbb\xbf";
    size_t skip = len >= 3 && memcmp(text, mark, 3) == 0 ? 3 : 0;
    return (struct textfile_lines){.at = text + skip, .end = text + len};
}

char *textfile_line(struct textfile_lines *l)
{
    if (l->at == l->end)
        return NULL;
    char *line = l->at;
    char *stop = memchr(line, '\n', (size_t)(l->end - line));
    l->at = stop ? stop + 1 : l->end;
    *(stop ? stop : l->end) = '\0';
    l->line++;
    return textfile_trim(line);
}

bool textfile_is_text(const char *text, size_t len, unsigned *line)
{
    *line = 1;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)text[i];
        if ((c < 0x20 && !is_blank((char)c) && c != '\n') || c == 0x7f)
            return false;
        *line += c == '\n';
    }
    return true;
}
