/*
 * Log lines. Each is put together in one buffer and leaves in one call, so that lines of several
 * threads don't mix.
 *
 * Under systemd stderr is a stream of the journal, which takes the severity from a "<N>" prefix
 * and has clocks of its own. Fields beside the text go there only through journald's own socket.
 */
#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SD_JOURNAL_SUPPRESS_LOCATION
#include <systemd/sd-journal.h>

#define TEXT_BYTES_MAX 2048
#define FIELD_BYTES_MAX 320
#define JOURNAL_SOCKET "/run/systemd/journal/socket"

const char *const log_level_names[] = {"debug", "info", "warning", "error", NULL};
const char *const log_format_names[] = {"text", "json", "journal", NULL};

static const int severities[] = {7, 6, 4, 3};

static _Atomic int threshold = LOG_LEVEL_INFO;
static _Atomic int chosen_format = LOG_FORMAT_TEXT;

/* What a line says, made safe. */
struct line {
    enum log_level level;
    char text[TEXT_BYTES_MAX], volume[FIELD_BYTES_MAX], client[FIELD_BYTES_MAX];
    bool has_volume, has_client;
};

void log_set_level(enum log_level level)
{
    atomic_store_explicit(&threshold, (int)level, memory_order_relaxed);
}

/* libsystemd takes a missing journald for a success. */
static bool has_journald(void)
{
    return access(JOURNAL_SOCKET, F_OK) == 0;
}

bool log_set_format(enum log_format format)
{
    if (format == LOG_FORMAT_JOURNAL && !has_journald())
        return false;
    atomic_store_explicit(&chosen_format, (int)format, memory_order_relaxed);
    return true;
}

enum log_format log_format(void)
{
    return (enum log_format)atomic_load_explicit(&chosen_format, memory_order_relaxed);
}

bool log_stderr_is_journal(void)
{
    /* The variable may be inherited by one whose stderr is something else by now. */
    const char *stream = getenv("JOURNAL_STREAM");
    struct stat file;
    char own[48];
    if (!stream || fstat(STDERR_FILENO, &file) != 0)
        return false;
    snprintf(own, sizeof own, "%ju:%ju", (uintmax_t)file.st_dev, (uintmax_t)file.st_ino);
    return strcmp(stream, own) == 0;
}

/* --- making text safe ------------------------------------------------------------------- */

/* The length of the UTF-8 character at `s`, and the character; 0 where there is none. Does not
 * read past the end of the text, where 0 bytes follow. */
static size_t character_at(const unsigned char *s, uint32_t *c)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t len = s[0] < 0x80 ? 1 : s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : s[0] >= 0xc2 ? 2 : 0;
    if (len == 0 || s[0] > 0xf4)
        return 0;
    *c = len == 1 ? s[0] : s[0] & (0x7fu >> len);
    for (size_t i = 1; i < len; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 0;
        *c = *c << 6 | (s[i] & 0x3fu);
    }
    return *c < least[len] || *c > 0x10ffff || (*c >= 0xd800 && *c < 0xe000) ? 0 : len;
}

static bool is_harmless(uint32_t c)
{
    bool control = c < 0x20 || (c >= 0x7f && c < 0xa0);
    bool separator = c == 0x2028 || c == 0x2029;
    bool direction = c == 0x200e || c == 0x200f || (c >= 0x202a && c <= 0x202e) ||
                     (c >= 0x2066 && c <= 0x2069);
    return !control && !separator && !direction;
}

/* In place; it only gets shorter. */
static void make_safe(char *text)
{
    unsigned char *from = (unsigned char *)text, *to = from;
    while (*from) {
        uint32_t c = 0;
        size_t len = character_at(from, &c);
        if (len > 0 && is_harmless(c)) {
            memmove(to, from, len);
            to += len;
        } else {
            *to++ = c == '\n' ? ' ' : '?';
        }
        from += len > 0 ? len : 1;
    }
    *to = '\0';
}

static bool take_field(char out[FIELD_BYTES_MAX], const char *value)
{
    if (!value)
        return false;
    snprintf(out, FIELD_BYTES_MAX, "%s", value);
    make_safe(out);
    return true;
}

/* --- the forms of a line ----------------------------------------------------------------- */

static void put_time(char out[40])
{
    struct timespec now;
    struct tm utc;
    char when[32] = "";
    clock_gettime(CLOCK_REALTIME, &now);
    if (gmtime_r(&now.tv_sec, &utc))
        strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(out, 40, "%s.%03ldZ", when, now.tv_nsec / 1000000);
}

static void write_out(const char *line, size_t len)
{
    /* Nobody is left to tell when stderr itself fails. */
    ssize_t ignored = write(STDERR_FILENO, line, len);
    (void)ignored;
}

static void write_text(const struct line *l)
{
    char out[TEXT_BYTES_MAX + 64], when[40];
    int len;
    if (log_stderr_is_journal()) {
        len = snprintf(out, sizeof out, "<%d>%s\n", severities[l->level], l->text);
    } else {
        put_time(when);
        len = snprintf(out, sizeof out, "%s %s: %s\n", when, log_level_names[l->level], l->text);
    }
    write_out(out, (size_t)len);
}

/* Appends a string as JSON has it; `text` is safe but for what JSON itself uses. */
static char *put_string(char *to, const char *text)
{
    *to++ = '"';
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            *to++ = '\\';
        *to++ = *text;
    }
    *to++ = '"';
    return to;
}

static char *put_member(char *to, const char *name, const char *value)
{
    to += sprintf(to, "%c\"%s\":", name[0] == 't' ? '{' : ',', name);
    return put_string(to, value);
}

static void write_json(const struct line *l)
{
    char out[2 * (TEXT_BYTES_MAX + 2 * FIELD_BYTES_MAX) + 160], when[40];
    put_time(when);
    char *to = put_member(out, "time", when);
    to = put_member(to, "level", log_level_names[l->level]);
    to = put_member(to, "message", l->text);
    if (l->has_volume)
        to = put_member(to, "volume", l->volume);
    if (l->has_client)
        to = put_member(to, "client", l->client);
    *to++ = '}';
    *to++ = '\n';
    write_out(out, (size_t)(to - out));
}

/* "NAME=VALUE" in `out`. */
static struct iovec field(char *out, size_t size, const char *name, const char *value)
{
    int len = snprintf(out, size, "%s=%s", name, value);
    return (struct iovec){.iov_base = out, .iov_len = (size_t)len};
}

static bool send_to_journal(const struct line *l)
{
    char message[TEXT_BYTES_MAX + 16], priority[16], identifier[32];
    char volume[FIELD_BYTES_MAX + 16], client[FIELD_BYTES_MAX + 16];
    struct iovec fields[5];
    int n = 0;
    if (!has_journald())
        return false;
    char severity[2] = {(char)('0' + severities[l->level]), '\0'};
    fields[n++] = field(message, sizeof message, "MESSAGE", l->text);
    fields[n++] = field(priority, sizeof priority, "PRIORITY", severity);
    fields[n++] = field(identifier, sizeof identifier, "SYSLOG_IDENTIFIER", "fdb-nbd");
    if (l->has_volume)
        fields[n++] = field(volume, sizeof volume, "VOLUME", l->volume);
    if (l->has_client)
        fields[n++] = field(client, sizeof client, "CLIENT", l->client);
    return sd_journal_sendv(fields, n) == 0;
}

void log_line(enum log_level level, const char *volume, const char *client, const char *format, ...)
{
    if ((int)level < atomic_load_explicit(&threshold, memory_order_relaxed))
        return;

    int saved_errno = errno;
    struct line l = {.level = level};
    va_list args;
    va_start(args, format);
    vsnprintf(l.text, sizeof l.text, format, args);
    va_end(args);
    make_safe(l.text);
    l.has_volume = take_field(l.volume, volume);
    l.has_client = take_field(l.client, client);

    if (log_format() == LOG_FORMAT_JSON)
        write_json(&l);
    else if (log_format() == LOG_FORMAT_TEXT || !send_to_journal(&l))
        write_text(&l);
    errno = saved_errno;
}
