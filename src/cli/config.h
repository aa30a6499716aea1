/*
 * The configuration file: "name = value" lines, as a table of settings.
 *
 *     # What stands behind a # at the begin of a line is a comment.
 *     store = lmdb:/var/lib/fdb-nbd
 *     listen = :10809
 *     listen = unix:/run/fdb-nbd/socket
 *     read-only = yes
 *
 * A value reaches to the end of its line, without the blanks around it; there are no quotes and
 * no escapes, and a # inside it is part of it. Which names there are, and what their values mean,
 * is the caller's (cli.c); here is only the form.
 */
#ifndef CLI_CONFIG_H
#define CLI_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define CONFIG_BYTES_MAX (1u << 20)
#define CONFIG_LINE_BYTES_MAX 4096u
#define CONFIG_LINES_MAX 10000u

struct config_setting {
    char *key, *value; /* neither is empty; in `text` */
    unsigned line;     /* from 1 */
};

struct config {
    const char *file; /* its name, for sentences; the caller's */
    char *text;
    struct config_setting *settings; /* in the order of the file */
    size_t n, cap;
};

/* Takes `len` bytes apart, which the caller keeps. ST_INVAL with a sentence that begins with
 * FILE:LINE: the first line that is neither a setting nor a comment, or a limit. Pure: the same
 * bytes, the same answer. What it holds is freed by config_free(), also after a failure. */
enum status config_parse(struct config *c, const char *file, const uint8_t *bytes, size_t len,
                         struct err *e);

/* Reads the file and parses it. ST_INVAL where it can't be read, too. */
enum status config_load(struct config *c, const char *file, struct err *e);

void config_free(struct config *c);

#endif
