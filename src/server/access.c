/* The access file; access.h says what it means. */
#include "server/access.h"

#include <arpa/inet.h>
#include <errno.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/textfile.h"
#include "volume/keys.h"

#define PASSWD_BYTES_MAX (1u << 20)

enum client_kind {
    CLIENT_ANY,
    CLIENT_USER,
    CLIENT_ADDRESS,
    CLIENT_COMMON_NAME,
    CLIENT_DISTINGUISHED_NAME,
    CLIENT_PSK,
};

/* Volumes, or where `snapshot` is not NULL snapshots. Both are patterns, in the text. */
struct volumes {
    const char *volume, *snapshot;
};

struct rule {
    enum client_kind kind;
    enum access_right right;
    uint32_t uid;
    uint8_t ip[16];
    unsigned ip_bytes, ip_bits;
    const char *name; /* a pattern, in the text; of CLIENT_DISTINGUISHED_NAME a name */
    size_t first_volumes, n_volumes;
};

struct access {
    atomic_uint references;
    char *text;
    struct rule *rules;
    size_t n_rules, cap_rules;
    struct volumes *volumes;
    size_t n_volumes, cap_volumes;
};

struct access_view {
    struct access *access;
    size_t n;
    const struct rule *rules[];
};

/* --- matching ------------------------------------------------------------------------ */

/* Whether the pattern, in which * stands for any text, fits all of `text`. */
static bool fits(const char *pattern, const char *text)
{
    const char *star = NULL, *taken = NULL; /* the last *, and the end of what it stands for */
    while (*text) {
        if (*pattern == '*') {
            star = pattern++;
            taken = text;
        } else if (*pattern == *text) {
            pattern++;
            text++;
        } else if (star) {
            pattern = star + 1;
            text = ++taken;
        } else {
            return false;
        }
    }
    while (*pattern == '*')
        pattern++;
    return !*pattern;
}

/* What was not proved is "", which no rule fits, not even *. */
static bool fits_proved(const char *pattern, const char *name)
{
    return name[0] && fits(pattern, name);
}

static bool is_within(const uint8_t *ip, const uint8_t *net, unsigned bits)
{
    unsigned whole = bits / 8, rest = bits % 8;
    return memcmp(ip, net, whole) == 0 && (!rest || !((ip[whole] ^ net[whole]) >> (8 - rest)));
}

static bool fits_client(const struct rule *r, const struct peer *p)
{
    switch (r->kind) {
    case CLIENT_ANY:
        return true;
    case CLIENT_USER:
        return p->has_uid && p->uid == r->uid;
    case CLIENT_ADDRESS:
        return p->way == PEER_TCP && p->ip_bytes == r->ip_bytes &&
               is_within(p->ip, r->ip, r->ip_bits);
    case CLIENT_COMMON_NAME:
        return p->tls == PEER_TLS_CERTIFICATE && fits_proved(r->name, p->tls_common_name);
    case CLIENT_DISTINGUISHED_NAME:
        return p->tls == PEER_TLS_CERTIFICATE && p->tls_name[0] &&
               strcmp(r->name, p->tls_name) == 0;
    case CLIENT_PSK:
        return p->tls == PEER_TLS_PSK && fits_proved(r->name, p->tls_name);
    }
    return false;
}

struct access_view *access_view_new(struct access *a, const struct peer *p)
{
    if (!a)
        return NULL;
    struct access_view *v = mem_alloc(sizeof *v + a->n_rules * sizeof *v->rules);
    v->access = access_hold(a);
    v->n = 0;
    for (size_t i = 0; i < a->n_rules; i++)
        if (fits_client(&a->rules[i], p))
            v->rules[v->n++] = &a->rules[i];
    /* Kept for as long as a question is under way, maybe for many clients. */
    return mem_realloc(v, sizeof *v + v->n * sizeof *v->rules);
}

void access_view_free(struct access_view *v)
{
    if (v)
        access_release(v->access);
    free(v);
}

static enum access_right right_by(const struct access_view *v, const struct rule *r,
                                  const char *volume, const char *snapshot)
{
    for (size_t i = 0; i < r->n_volumes; i++) {
        const struct volumes *some = &v->access->volumes[r->first_volumes + i];
        if (!fits(some->volume, volume))
            continue;
        if (!some->snapshot && !snapshot[0])
            return r->right;
        if (snapshot[0] && (!some->snapshot || fits(some->snapshot, snapshot)))
            return ACCESS_READ;
    }
    return ACCESS_NONE;
}

enum access_right access_view_right(const struct access_view *v, const char *volume,
                                    const char *snapshot)
{
    enum access_right best = ACCESS_NONE;
    if (!v)
        return snapshot[0] ? ACCESS_READ : ACCESS_WRITE;
    for (size_t i = 0; i < v->n && best != ACCESS_WRITE; i++) {
        enum access_right right = right_by(v, v->rules[i], volume, snapshot);
        if (right > best)
            best = right;
    }
    return best;
}

struct access_count access_count(const struct access *a)
{
    struct access_count n = {.rules = a->n_rules};
    for (size_t i = 0; i < a->n_rules; i++) {
        enum client_kind kind = a->rules[i].kind;
        n.certificates += kind == CLIENT_COMMON_NAME || kind == CLIENT_DISTINGUISHED_NAME;
        n.psk += kind == CLIENT_PSK;
    }
    return n;
}

struct access *access_hold(struct access *a)
{
    if (a)
        atomic_fetch_add(&a->references, 1);
    return a;
}

void access_release(struct access *a)
{
    if (!a || atomic_fetch_sub(&a->references, 1) > 1)
        return;
    free(a->text);
    free(a->rules);
    free(a->volumes);
    free(a);
}

/* --- parsing ------------------------------------------------------------------------- */

struct parser {
    struct access *access;
    const char *file;
    unsigned line;
    bool (*find_user)(const char *name, uint32_t *uid);
    struct err *e;
};

static enum status bad(const struct parser *p, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static enum status bad(const struct parser *p, const char *format, ...)
{
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return fail(p->e, ST_INVAL, "%s:%u: %s", p->file, p->line, text);
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t';
}

/* Cuts the next word off *at, in place: up to a blank outside of quotes, without the quotes; inside
 * them \" and \\ stand for " and \. *word NULL: there is none, or a comment. */
static enum status next_word(const struct parser *p, char **at, char **word)
{
    char *in = *at, *out;
    bool quoted = false;
    *word = NULL;
    while (is_blank(*in))
        in++;
    if (!*in || *in == '#') {
        *at = in + strlen(in);
        return ST_OK;
    }
    for (*word = out = in; *in && (quoted || !is_blank(*in)); in++) {
        if (*in == '"') {
            quoted = !quoted;
            continue;
        }
        if (quoted && *in == '\\' && (in[1] == '"' || in[1] == '\\'))
            in++;
        *out++ = *in;
    }
    if (quoted)
        return bad(p, "a quoted name has no end: the second \" is missing");
    *at = *in ? in + 1 : in;
    *out = '\0';
    return ST_OK;
}

static enum status parse_user(const struct parser *p, struct rule *r, const char *text)
{
    char *end;
    errno = 0;
    unsigned long uid = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end) {
        if (!p->find_user(text, &r->uid))
            return bad(p, "there is no user \"%.64s\" on this machine", text);
        return ST_OK;
    }
    /* (The last number means nobody at all.) */
    if (errno || uid >= UINT32_MAX)
        return bad(p, "%.64s is not the number of a user", text);
    r->uid = (uint32_t)uid;
    return ST_OK;
}

/* Whether the address has bits set behind its first ones. */
static bool has_host_bits(const struct rule *r)
{
    for (unsigned bit = r->ip_bits; bit < r->ip_bytes * 8; bit++)
        if (r->ip[bit / 8] & (0x80u >> bit % 8))
            return true;
    return false;
}

static enum status parse_address(const struct parser *p, struct rule *r, const char *text)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
    char address[INET6_ADDRSTRLEN];
    const char *slash = strchr(text, '/');
    size_t len = slash ? (size_t)(slash - text) : strlen(text);
    bool is_v6 = memchr(text, ':', len);
    r->ip_bytes = is_v6 ? 16 : 4;
    r->ip_bits = r->ip_bytes * 8;
    snprintf(address, sizeof address, "%.*s", (int)len, text);
    if (len >= sizeof address || inet_pton(is_v6 ? AF_INET6 : AF_INET, address, r->ip) != 1)
        return bad(p, "\"%.64s\" is not an address like 192.0.2.1, 10.0.0.0/8 or 2001:db8::/32",
                   text);
    if (is_v6 && memcmp(r->ip, mapped, sizeof mapped) == 0)
        return bad(p, "\"%.64s\": write it as an IPv4 address; clients that come that way are "
                   "taken for that", text);
    if (slash) {
        char *end;
        unsigned long bits = strtoul(slash + 1, &end, 10);
        if (slash[1] < '0' || slash[1] > '9' || *end || bits > r->ip_bits)
            return bad(p, "\"%.64s\": what is behind the / is a number from 0 to %u", text,
                       r->ip_bits);
        r->ip_bits = (unsigned)bits;
    }
    if (has_host_bits(r))
        return bad(p, "\"%.64s\" has more bits set than its first %u: which addresses are meant?",
                   text, r->ip_bits);
    return ST_OK;
}

static enum status parse_client(const struct parser *p, struct rule *r, const char *word)
{
    static const struct {
        const char *prefix;
        enum client_kind kind;
    } kinds[] = {{"user:", CLIENT_USER},         {"address:", CLIENT_ADDRESS},
                 {"cn:", CLIENT_COMMON_NAME},    {"dn:", CLIENT_DISTINGUISHED_NAME},
                 {"psk:", CLIENT_PSK}};
    if (strcmp(word, "any") == 0)
        return ST_OK;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        size_t len = strlen(kinds[i].prefix);
        if (strncmp(word, kinds[i].prefix, len) != 0)
            continue;
        r->kind = kinds[i].kind;
        r->name = word + len;
        if (!*r->name)
            return bad(p, "\"%s\" lacks the name behind it", kinds[i].prefix);
        if (strlen(r->name) >= PEER_NAME_BYTES)
            return bad(p, "the client's name is longer than %u bytes", PEER_NAME_BYTES - 1);
        if (r->kind == CLIENT_USER)
            return parse_user(p, r, r->name);
        return r->kind == CLIENT_ADDRESS ? parse_address(p, r, r->name) : ST_OK;
    }
    /* Nothing behind a colon: a file of pre-shared keys may have been given by mistake. */
    int len = (int)strcspn(word, ":") + (strchr(word, ':') != NULL);
    return bad(p, "\"%.*s\" is no client: a line begins with user:, address:, cn:, dn: or psk: "
               "and a name, or with any", len < 64 ? len : 64, word);
}

/* A name as volumes and snapshots have them, with * for any text. */
static bool is_pattern(const char *text)
{
    char name[NAME_BYTES_MAX + 1];
    size_t len = strlen(text);
    if (len == 0 || len > NAME_BYTES_MAX)
        return false;
    for (size_t i = 0; i <= len; i++)
        name[i] = text[i] == '*' ? 'x' : text[i];
    return name_valid(name);
}

static enum status take_volumes(const struct parser *p, struct rule *r, char *word)
{
    struct access *a = p->access;
    struct volumes some = {.volume = word};
    char *at = strchr(word, '@');
    if (at) {
        *at = '\0';
        some.snapshot = at + 1;
    }
    if (!is_pattern(some.volume) || (at && !is_pattern(some.snapshot)))
        return bad(p, "\"%.140s%s%.140s\" is neither VOLUME nor VOLUME@SNAPSHOT, where * may stand "
                   "for any text", some.volume, at ? "@" : "", at ? some.snapshot : "");
    if (at && r->right == ACCESS_WRITE)
        return bad(p, "nobody can write a snapshot: grant \"%.140s@%.140s\" with ro", some.volume,
                   some.snapshot);
    if (a->n_volumes == ACCESS_VOLUMES_MAX)
        return bad(p, "more than %u volumes in all", ACCESS_VOLUMES_MAX);
    mem_grow(&a->volumes, &a->cap_volumes, a->n_volumes + 1, sizeof *a->volumes);
    a->volumes[a->n_volumes++] = some;
    r->n_volumes++;
    return ST_OK;
}

static enum status take_line(const struct parser *p, char *text)
{
    struct access *a = p->access;
    struct rule r = {.kind = CLIENT_ANY, .first_volumes = a->n_volumes};
    char *word;
    enum status st = next_word(p, &text, &word);
    if (st != ST_OK || !word)
        return st;
    if (a->n_rules == ACCESS_RULES_MAX)
        return bad(p, "more than %u rules", ACCESS_RULES_MAX);
    st = parse_client(p, &r, word);
    if (st == ST_OK)
        st = next_word(p, &text, &word);
    if (st != ST_OK)
        return st;
    if (!word || (strcmp(word, "ro") != 0 && strcmp(word, "rw") != 0))
        return bad(p, "behind the client stands ro (read only) or rw (read and write)%s%.64s%s",
                   word ? ", not \"" : "", word ? word : "", word ? "\"" : "");
    r.right = strcmp(word, "rw") == 0 ? ACCESS_WRITE : ACCESS_READ;
    while ((st = next_word(p, &text, &word)) == ST_OK && word)
        if ((st = take_volumes(p, &r, word)) != ST_OK)
            break;
    if (st == ST_OK && r.n_volumes == 0)
        st = bad(p, "which volumes? Their names stand at the end of the line, or * for all");
    if (st != ST_OK)
        return st;
    mem_grow(&a->rules, &a->cap_rules, a->n_rules + 1, sizeof *a->rules);
    a->rules[a->n_rules++] = r;
    return ST_OK;
}

/* Takes `text` over: `len` bytes and a NUL. */
static enum status take_text(struct access **out, const char *file, char *text, size_t len,
                             bool (*find_user)(const char *name, uint32_t *uid), struct err *e)
{
    struct access *a = mem_zalloc(sizeof *a);
    struct parser p = {.access = a, .file = file, .find_user = find_user, .e = e};
    struct textfile_lines lines = textfile_begin(text, len);
    enum status st = ST_OK;
    char *line;
    atomic_init(&a->references, 1);
    a->text = text;
    if (!textfile_is_text(text, len, &p.line))
        st = bad(&p, "there is a control character in the line: is this an access file?");
    while (st == ST_OK && (line = textfile_line(&lines))) {
        p.line = lines.line;
        if (p.line > ACCESS_LINES_MAX)
            st = bad(&p, "more than %u lines", ACCESS_LINES_MAX);
        else if (strlen(line) > ACCESS_LINE_BYTES_MAX)
            st = bad(&p, "the line has more than %u bytes", ACCESS_LINE_BYTES_MAX);
        else
            st = take_line(&p, line);
    }
    if (st == ST_OK)
        *out = a;
    else
        access_release(a);
    return st;
}

enum status access_parse(struct access **out, const char *file, const uint8_t *bytes, size_t len,
                         bool (*find_user)(const char *name, uint32_t *uid), struct err *e)
{
    if (len > ACCESS_BYTES_MAX)
        return fail(e, ST_INVAL, "the access file %s has more than %u bytes", file,
                    ACCESS_BYTES_MAX);
    char *text = mem_alloc(len + 1);
    if (len > 0)
        memcpy(text, bytes, len);
    text[len] = '\0';
    return take_text(out, file, text, len, find_user, e);
}

static bool find_user(const char *name, uint32_t *uid)
{
    struct passwd entry, *found = NULL;
    size_t size = 1024;
    char *buffer = mem_alloc(size);
    while (getpwnam_r(name, &entry, buffer, size, &found) == ERANGE && size < PASSWD_BYTES_MAX)
        buffer = mem_realloc(buffer, size *= 2);
    if (found)
        *uid = found->pw_uid;
    free(buffer);
    return found;
}

enum status access_load(struct access **out, const char *file, struct err *e)
{
    char *text;
    size_t len;
    enum status st = textfile_read(file, "access file", ACCESS_BYTES_MAX, &text, &len, e);
    return st == ST_OK ? take_text(out, file, text, len, find_user, e) : st;
}
