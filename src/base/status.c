/* Names of outcomes, and the filling of error sentences. */
#include "base/status.h"

#include <stdio.h>

const char *status_text(enum status st)
{
    switch (st) {
    case ST_OK:
        return "ok";
    case ST_IO:
        return "input/output error";
    case ST_NOSPC:
        return "no space left";
    case ST_NOTFOUND:
        return "not found";
    case ST_EXISTS:
        return "already exists";
    case ST_CONFLICT:
        return "changed meanwhile";
    case ST_PERM:
        return "not permitted";
    case ST_INVAL:
        return "invalid argument";
    case ST_UNAVAIL:
        return "store unavailable";
    case ST_NOMEM:
        return "out of memory";
    case ST_BUSY:
        return "busy";
    case ST_SHUTDOWN:
        return "shutting down";
    case ST_UNSUP:
        return "not supported";
    case ST_FORMAT:
        return "unknown format";
    }
    return "unknown status";
}

enum status fail(struct err *e, enum status st, const char *format, ...)
{
    if (e) {
        /* The arguments may point into e->text (a sentence wrapped in another), so the new
         * text is built beside it. */
        char text[sizeof e->text];
        va_list args;
        va_start(args, format);
        if (vsnprintf(text, sizeof text, format, args) < 0)
            text[0] = '\0';
        va_end(args);
        e->st = st;
        snprintf(e->text, sizeof e->text, "%s", text);
    }
    return st;
}
