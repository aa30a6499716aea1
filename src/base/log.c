/*
 * Log lines on stderr. Each line is formatted into one buffer and leaves in one write
 * call, so that lines of several threads don't mix. Under systemd stderr is the journal,
 * which takes the severity from a "<N>" prefix and has clocks of its own; anywhere else
 * the line carries a time.
 */
#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LOG_LINE_BYTES_MAX 2048

static _Atomic int log_threshold = LOG_LEVEL_INFO;

void log_set_level(enum log_level level)
{
    atomic_store_explicit(&log_threshold, (int)level, memory_order_relaxed);
}

static int put_prefix(char *line, size_t size, enum log_level level)
{
    static const char *const names[] = {"debug", "info", "warning", "error"};
    static const int journal_severity[] = {7, 6, 4, 3};

    if (getenv("JOURNAL_STREAM"))
        return snprintf(line, size, "<%d>", journal_severity[level]);

    struct timespec now;
    struct tm utc;
    char when[32] = "";
    clock_gettime(CLOCK_REALTIME, &now);
    if (gmtime_r(&now.tv_sec, &utc))
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &utc);
    return snprintf(line, size, "%s.%03ldZ %s: ", when, now.tv_nsec / 1000000, names[level]);
}

void log_line(enum log_level level, const char *format, ...)
{
    if ((int)level < atomic_load_explicit(&log_threshold, memory_order_relaxed))
        return;

    int saved_errno = errno;
    char line[LOG_LINE_BYTES_MAX];
    int prefix = put_prefix(line, sizeof line, level);
    if (prefix < 0)
        prefix = 0;
    size_t len = (size_t)prefix;

    va_list args;
    va_start(args, format);
    int text = vsnprintf(line + len, sizeof line - len - 1, format, args);
    va_end(args);
    if (text > 0) {
        size_t room = sizeof line - len - 2;
        len += (size_t)text < room ? (size_t)text : room;
    }

    for (size_t i = (size_t)prefix; i < len; i++) {
        unsigned char c = (unsigned char)line[i];
        if (c == '\n')
            line[i] = ' ';
        else if (c < 0x20 || c == 0x7f)
            line[i] = '?';
    }
    line[len++] = '\n';

    /* Nobody is left to tell when stderr itself fails. */
    ssize_t ignored = write(STDERR_FILENO, line, len);
    (void)ignored;
    errno = saved_errno;
}
