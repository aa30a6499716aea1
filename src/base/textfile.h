/* Small text files that people write: read whole, taken apart line by line. */
#ifndef BASE_TEXTFILE_H
#define BASE_TEXTFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* Reads `path` whole into *out (freed with free(); *len bytes and a NUL). ST_INVAL, with a sentence
 * that names it as `what` ("configuration"): it can't be opened or read, is a folder, or has more
 * than `max` bytes. Blocks. */
enum status textfile_read(const char *path, const char *what, size_t max, char **out, size_t *len,
                          struct err *e);

/* A text on its way through its lines. */
struct textfile_lines {
    char *at, *end;
    unsigned line; /* of the one that was given last; from 1 */
};

/* At the beginning of `text`, which has `len` bytes and room for one more; the mark that editors of
 * other systems put before UTF-8 is none of its bytes. */
struct textfile_lines textfile_begin(char *text, size_t len);

/* Cuts the next line off, without the blanks around it, as a string in place: the text has room
 * for a NUL at `end`. NULL: there is none. */
char *textfile_line(struct textfile_lines *l);

/* Cuts the blanks at both ends of a string off, in place. */
char *textfile_trim(char *text);

/* Whether the text holds no control characters but blanks, line ends and tabs. *line: else the
 * first line with one. */
bool textfile_is_text(const char *text, size_t len, unsigned *line);

#endif
