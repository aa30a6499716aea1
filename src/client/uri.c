/* NBD URIs; see uri.h. */
#include "client/uri.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Decodes `len` characters into `out` of `cap` bytes. False where they do not fit, a percent sign
 * has no two digits behind it, or a NUL would be in the middle. */
static bool decode(const char *text, size_t len, char *out, size_t cap)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        char c = text[i];
        if (c == '%') {
            int high = i + 1 < len ? hex_digit(text[i + 1]) : -1;
            int low = i + 2 < len ? hex_digit(text[i + 2]) : -1;
            if (high < 0 || low < 0 || (high == 0 && low == 0))
                return false;
            c = (char)(high << 4 | low);
            i += 2;
        }
        if (n + 1 >= cap)
            return false;
        out[n++] = c;
    }
    out[n] = '\0';
    return true;
}

/* HOST, HOST:PORT, [ADDRESS], [ADDRESS]:PORT, or nothing: localhost. */
static bool parse_authority(const char *text, size_t len, struct nbd_uri *uri)
{
    const char *end = text + len, *host = text, *host_end;
    if (len > 0 && text[0] == '[') {
        host++;
        host_end = memchr(host, ']', (size_t)(end - host));
        if (!host_end || host_end == host)
            return false;
        text = host_end + 1;
    } else {
        host_end = memchr(text, ':', len);
        if (!host_end)
            host_end = end;
        text = host_end;
    }
    strcpy(uri->port, NBD_URI_PORT);
    if (text < end) {
        size_t digits = (size_t)(end - text - 1);
        if (*text != ':' || digits > 5)
            return false;
        if (digits > 0) {
            memcpy(uri->port, text + 1, digits);
            uri->port[digits] = '\0';
            long port = strtol(uri->port, NULL, 10);
            if (strspn(uri->port, "0123456789") != digits || port < 1 || port > 65535)
                return false;
            /* One number, one text. */
            size_t zeros = strspn(uri->port, "0");
            memmove(uri->port, uri->port + zeros, digits - zeros + 1);
        }
    }
    if (host_end == host)
        strcpy(uri->host, "localhost");
    return host_end == host || decode(host, (size_t)(host_end - host), uri->host, sizeof uri->host);
}

/* Finds the value of socket= among the parameters. */
static const char *find_socket(const char *query, size_t *len)
{
    while (query) {
        size_t n = strcspn(query, "&;");
        if (strncmp(query, "socket=", 7) == 0) {
            *len = n - 7;
            return query + 7;
        }
        query = query[n] ? query + n + 1 : NULL;
    }
    return NULL;
}

enum status nbd_uri_parse(const char *text, struct nbd_uri *uri, struct err *e)
{
    *uri = (struct nbd_uri){0};
    const char *rest = strstr(text, "://");
    size_t scheme_len = rest ? (size_t)(rest - text) : 0;
    uri->is_unix = scheme_len == 8 && strncasecmp(text, "nbd+unix", 8) == 0;
    bool tcp = scheme_len == 3 && strncasecmp(text, "nbd", 3) == 0;
    if (scheme_len > 3 && strncasecmp(text, "nbds", 4) == 0)
        return fail(e, ST_INVAL, "\"%.200s\" asks for TLS, which this command does not speak",
                    text);
    if (!tcp && !uri->is_unix)
        return fail(e, ST_INVAL,
                    "\"%.200s\" is not a URI of the form nbd://HOST[:PORT][/EXPORT] or "
                    "nbd+unix:///[EXPORT]?socket=PATH",
                    text);
    rest += 3;
    if (strpbrk(rest, "# "))
        return fail(e, ST_INVAL, "\"%.200s\": blanks and # are written %%20 and %%23 in a URI",
                    text);
    size_t authority_len = strcspn(rest, "/?");
    const char *authority = rest, *path = rest + authority_len;
    if (memchr(authority, '@', authority_len))
        return fail(e, ST_INVAL, "\"%.200s\" names a user, which only TLS has a use for", text);
    size_t path_len = strcspn(path, "?");
    const char *query = path[path_len] ? path + path_len + 1 : NULL;
    if (path_len > 0 && !decode(path + 1, path_len - 1, uri->export, sizeof uri->export))
        return fail(e, ST_INVAL,
                    "\"%.200s\": the name of the export can't be decoded, or is too long", text);
    size_t socket_len = 0;
    const char *socket = find_socket(query, &socket_len);
    if (tcp && socket)
        return fail(e, ST_INVAL, "\"%.200s\" names a socket: begin it with nbd+unix://", text);
    if (tcp && !parse_authority(authority, authority_len, uri))
        return fail(e, ST_INVAL, "\"%.200s\": \"%.*s\" is not HOST or HOST:PORT", text,
                    (int)(authority_len > 100 ? 100 : authority_len), authority);
    if (tcp)
        return ST_OK;
    if (authority_len > 0)
        return fail(e, ST_INVAL,
                    "\"%.200s\": nothing stands between the second and the third slash", text);
    if (!socket || socket_len == 0)
        return fail(e, ST_INVAL, "\"%.200s\" has no ?socket=PATH", text);
    if (!decode(socket, socket_len, uri->socket, sizeof uri->socket))
        return fail(e, ST_INVAL,
                    "\"%.200s\": the socket's path can't be decoded, or is longer than "
                    "%zu bytes",
                    text, sizeof uri->socket - 1);
    return ST_OK;
}

/* Appends `text`, encoding all but unreserved characters and those of `plain`. */
static char *encode(char *at, const char *text, const char *plain)
{
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        bool letter = (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
        bool digit = c >= '0' && c <= '9';
        if (letter || digit || strchr("-._~", c) || strchr(plain, c))
            *at++ = (char)c;
        else
            at += sprintf(at, "%%%02X", c);
    }
    *at = '\0';
    return at;
}

const char *nbd_uri_format(const struct nbd_uri *uri, char out[NBD_URI_TEXT_BYTES])
{
    char *at = out + sprintf(out, uri->is_unix ? "nbd+unix://" : "nbd://");
    if (!uri->is_unix) {
        const char *brackets = strchr(uri->host, ':') ? "[]" : "";
        at += sprintf(at, "%.1s", brackets);
        at = encode(at, uri->host, ":");
        at += sprintf(at, "%s:%s", brackets[0] ? "]" : "", uri->port);
    }
    *at++ = '/';
    at = encode(at, uri->export, "/@:+,");
    if (uri->is_unix) {
        at += sprintf(at, "?socket=");
        encode(at, uri->socket, "/@:,");
    }
    return out;
}
