/*
 * Log lines for people, programs and the journal: one line each, written whole, to stderr or to
 * journald. The data path never formats one on success.
 */
#ifndef BASE_LOG_H
#define BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>

enum log_level { LOG_LEVEL_DEBUG, LOG_LEVEL_INFO, LOG_LEVEL_WARNING, LOG_LEVEL_ERROR };

enum log_format {
    LOG_FORMAT_TEXT,    /* stderr: "TIME LEVEL: MESSAGE"; to the journal "<SEVERITY>MESSAGE" */
    LOG_FORMAT_JSON,    /* stderr: an object a line: time, level, message, and volume, client */
    LOG_FORMAT_JOURNAL, /* journald's socket: MESSAGE, PRIORITY, VOLUME, CLIENT */
};

/* "debug", "text" and so on; NULL at the end of each. In the order of the enums. */
extern const char *const log_level_names[];
extern const char *const log_format_names[];

/* Lines below `level` are dropped. Any thread; set once at start. */
void log_set_level(enum log_level level);

/* Any thread; set once at start, LOG_FORMAT_TEXT before. False, and nothing is changed: there is
 * no journald here. One that goes away later is stood in for by text on stderr. */
bool log_set_format(enum log_format format);
enum log_format log_format(void);

/* Whether stderr is a stream of the journal's (JOURNAL_STREAM), as under systemd. */
bool log_stderr_is_journal(void);

/* Writes one line. Any thread. `volume`, `client`: what it is about, for programs, NULL where it
 * is about none; the text names them too. Names and messages may come from outside, so nothing in
 * them begins a line or moves a cursor: a newline becomes a space; control characters, whatever
 * turns the direction of writing, and bytes that are no UTF-8 become '?'. */
void log_line(enum log_level level, const char *volume, const char *client, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

#define log_debug(...) log_line(LOG_LEVEL_DEBUG, NULL, NULL, __VA_ARGS__)
#define log_info(...) log_line(LOG_LEVEL_INFO, NULL, NULL, __VA_ARGS__)
#define log_warning(...) log_line(LOG_LEVEL_WARNING, NULL, NULL, __VA_ARGS__)
#define log_error(...) log_line(LOG_LEVEL_ERROR, NULL, NULL, __VA_ARGS__)

#define log_volume_debug(volume, ...) log_line(LOG_LEVEL_DEBUG, volume, NULL, __VA_ARGS__)
#define log_volume_info(volume, ...) log_line(LOG_LEVEL_INFO, volume, NULL, __VA_ARGS__)
#define log_volume_warning(volume, ...) log_line(LOG_LEVEL_WARNING, volume, NULL, __VA_ARGS__)
#define log_volume_error(volume, ...) log_line(LOG_LEVEL_ERROR, volume, NULL, __VA_ARGS__)

#define log_client_debug(client, volume, ...) log_line(LOG_LEVEL_DEBUG, volume, client, __VA_ARGS__)
#define log_client_info(client, volume, ...) log_line(LOG_LEVEL_INFO, volume, client, __VA_ARGS__)
#define log_client_warning(client, volume, ...) \
    log_line(LOG_LEVEL_WARNING, volume, client, __VA_ARGS__)

#endif
