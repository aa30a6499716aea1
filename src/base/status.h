/*
 * Outcomes of operations, and sentences that explain them.
 *
 * The data path passes `enum status` only; whoever talks to a person also
 * fills a `struct err`, which carries what was tried, on what, and what to do.
 */
#ifndef BASE_STATUS_H
#define BASE_STATUS_H

#include <stdarg.h>
#include <stdbool.h>

enum status {
    ST_OK = 0,
    ST_IO,          /* the medium failed, or what it gave does not match its hash */
    ST_NOSPC,       /* no room in the store */
    ST_NOTFOUND,    /* no such volume, key, file */
    ST_EXISTS,      /* it is there already */
    ST_CONFLICT,    /* a commit's check failed: nothing happened */
    ST_PERM,        /* not allowed: read-only, or owned by somebody else */
    ST_INVAL,       /* the arguments make no sense */
    ST_UNAVAIL,     /* the store can't be reached or opened */
    ST_NOMEM,       /* a limit on memory */
    ST_BUSY,        /* in use; may succeed later */
    ST_SHUTDOWN,    /* this process is stopping */
    ST_UNSUP,       /* not supported here */
    ST_FORMAT,      /* a stored format or feature this build does not know */
};

/* A short English name of `st`, for log lines; static storage. */
const char *status_text(enum status st);

/* A sentence for a person. `text` is empty while nothing failed. */
struct err {
    enum status st;
    char text[600];
};

/* Fills `e` (may be NULL) from a format and returns `st`, so that a function can
 * `return fail(e, ST_IO, "cannot open %s: %s", ...)`. Replaces an earlier text. */
enum status fail(struct err *e, enum status st, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
