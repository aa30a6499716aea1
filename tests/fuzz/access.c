/*
 * Any bytes as an access file, and clients that ask by it; of the target "text".
 *
 * At stake: nobody opens what no line grants (docs/access.md); a file that is wrong in any way is
 * refused whole, with a sentence that names file and line.
 *
 * An input: who the client is (a few bytes), then the file.
 *
 * Oracle: a second, simple reading of the rules that were taken, as docs/access.md states them, gives
 * the same right for each of some volumes and snapshots; nobody may write a snapshot; a line in
 * addition takes nothing away; without a rule that fits nothing is allowed. The file "any rw *" in
 * front of it changes everything to allowed.
 */
#include "text.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "server/access.h"

#define WORDS_MAX 64u
#define BLANKS " \t\r" /* at a line's ends */

static bool find_user(const char *name, uint32_t *uid)
{
    *uid = 1000 + (uint32_t)name[0] % 2;
    return name[0] >= 'a' && name[0] <= 'f';
}

static const char *const names[] = {"", "a", "ab", "alice", "CN=a,O=b", "*", "a b"};
static const char *const volumes[][2] = {{"a", ""},  {"a", "s"},    {"vm7-a", ""}, {"vm7-a", "b"},
                                         {"A.b", ""}, {"aa", "a-a"}, {"images-1", "released"}};

static void take_name(struct fuzz_input *in, char name[PEER_NAME_BYTES])
{
    strcpy(name, names[fuzz_take(in, 1) % (sizeof names / sizeof *names)]);
}

static struct peer take_peer(struct fuzz_input *in)
{
    struct peer p = {.way = fuzz_take(in, 1) % 2 ? PEER_TCP : PEER_UNIX};
    if (p.way == PEER_UNIX) {
        p.has_uid = fuzz_take(in, 1) % 4 != 0;
        p.uid = p.has_uid ? 1000 + (uint32_t)fuzz_take(in, 1) % 3 : 0;
    } else {
        p.ip_bytes = fuzz_take(in, 1) % 2 ? 16 : 4;
        for (unsigned i = 0; i < 4; i++)
            p.ip[i * p.ip_bytes / 4] = (uint8_t)fuzz_take(in, 1);
    }
    p.tls = (enum peer_tls)(fuzz_take(in, 1) % 3);
    if (p.tls != PEER_PLAIN)
        take_name(in, p.tls_name);
    if (p.tls == PEER_TLS_CERTIFICATE)
        take_name(in, p.tls_common_name);
    return p;
}

/* --- the rules, read simply ---------------------------------------------------------------- */

/* By all lengths of the text that the pattern so far fits. */
static bool fits(const char *pattern, const char *text)
{
    bool fit[PEER_NAME_BYTES] = {true};
    size_t len = strlen(text);
    for (; *pattern; pattern++) {
        for (size_t i = 1; *pattern == '*' && i <= len; i++)
            fit[i] |= fit[i - 1];
        for (size_t i = len + 1; *pattern != '*' && i-- > 0;)
            fit[i] = i > 0 && fit[i - 1] && text[i - 1] == *pattern;
    }
    return fit[len];
}

/* The words of a line, without quotes, each its own allocation; how many, 0 of a comment. */
static unsigned words_of(const char *at, size_t len, char *words[WORDS_MAX])
{
    const char *end = at + len;
    unsigned n = 0;
    while (at < end && strchr(BLANKS, *at))
        at++;
    while (at < end && strchr(BLANKS, end[-1]))
        end--;
    while (at < end && n < WORDS_MAX) {
        while (at < end && strchr(" \t", *at))
            at++;
        if (at == end || *at == '#')
            break;
        char *word = words[n++] = mem_zalloc(len + 1);
        for (bool quoted = false; at < end && (quoted || !strchr(" \t", *at)); at++) {
            if (*at == '"')
                quoted = !quoted;
            else if (quoted && *at == '\\' && at + 1 < end && strchr("\"\\", at[1]))
                *word++ = *++at;
            else
                *word++ = *at;
        }
    }
    return n;
}

static bool is_client(const char *word, const struct peer *p)
{
    uint8_t ip[16];
    char text[64];
    if (strcmp(word, "any") == 0)
        return true;
    const char *name = strchr(word, ':') + 1;
    if (strncmp(word, "user:", 5) == 0) {
        uint32_t uid = 0;
        if (!find_user(name, &uid))
            uid = (uint32_t)strtoul(name, NULL, 10);
        return p->has_uid && p->uid == uid;
    }
    if (strncmp(word, "address:", 8) == 0) {
        const char *slash = strchr(name, '/');
        snprintf(text, sizeof text, "%.*s", slash ? (int)(slash - name) : 60, name);
        bool v6 = strchr(text, ':');
        if (inet_pton(v6 ? AF_INET6 : AF_INET, text, ip) != 1 || p->way != PEER_TCP ||
            p->ip_bytes != (v6 ? 16 : 4))
            return false;
        unsigned bits = slash ? (unsigned)atoi(slash + 1) : 8 * p->ip_bytes;
        for (unsigned i = 0; i < bits; i++)
            if (((ip[i / 8] ^ p->ip[i / 8]) >> (7 - i % 8)) & 1)
                return false;
        return true;
    }
    if (strncmp(word, "cn:", 3) == 0)
        return p->tls == PEER_TLS_CERTIFICATE && *p->tls_common_name &&
               fits(name, p->tls_common_name);
    if (strncmp(word, "dn:", 3) == 0)
        return p->tls == PEER_TLS_CERTIFICATE && strcmp(name, p->tls_name) == 0;
    return p->tls == PEER_TLS_PSK && *p->tls_name && fits(name, p->tls_name);
}

static enum access_right grants(char *const *words, unsigned n, const struct peer *p,
                                const char *volume, const char *snapshot)
{
    enum access_right best = ACCESS_NONE;
    if (n < 3 || !is_client(words[0], p))
        return ACCESS_NONE;
    for (unsigned i = 2; i < n; i++) {
        char *at = strchr(words[i], '@');
        char *pattern = strndup(words[i], at ? (size_t)(at - words[i]) : strlen(words[i]));
        bool fit = fits(pattern, volume) &&
                   (at ? *snapshot && fits(at + 1, snapshot) : true);
        free(pattern);
        enum access_right right =
            *snapshot || strcmp(words[1], "ro") == 0 ? ACCESS_READ : ACCESS_WRITE;
        if (fit && right > best)
            best = right;
    }
    return best;
}

/* False where a line has more words than are counted here. */
static bool simply(const uint8_t *bytes, size_t len, const struct peer *p,
                   enum access_right rights[], size_t n_rights, size_t *n_rules)
{
    const char *at = (const char *)bytes, *end = at + len;
    bool known = true;
    *n_rules = 0;
    if (len >= 3 && memcmp(at, "\xef\xbb\xbf", 3) == 0) /* a byte order mark */
        at += 3;
    for (size_t i = 0; i < n_rights; i++)
        rights[i] = ACCESS_NONE;
    while (at < end) {
        const char *eol = memchr(at, '\n', (size_t)(end - at));
        size_t n = eol ? (size_t)(eol - at) : (size_t)(end - at);
        char *words[WORDS_MAX];
        unsigned n_words = words_of(at, n, words);
        known = known && n_words < WORDS_MAX;
        *n_rules += n_words > 0;
        for (size_t i = 0; i < n_rights; i++) {
            enum access_right right = grants(words, n_words, p, volumes[i][0], volumes[i][1]);
            if (right > rights[i])
                rights[i] = right;
        }
        while (n_words > 0)
            free(words[--n_words]);
        at += n + 1;
    }
    return known;
}

void try_access(const uint8_t *data, size_t size)
{
    enum { N = sizeof volumes / sizeof *volumes };
    static const char all[] = "any rw *\n";
    struct fuzz_input in = fuzz_input(data, size);
    struct peer p = take_peer(&in);
    struct access *a = NULL, *more = NULL;
    struct err e = {0};
    size_t len = fuzz_left(&in), n_rules;
    enum access_right want[N];
    enum status st = access_parse(&a, "FILE", in.at, len, find_user, &e);
    if (st != ST_OK) {
        CHECK(st == ST_INVAL && !a && strstr(e.text, "FILE"));
        return;
    }
    struct access_view *v = access_view_new(a, &p);
    bool known = simply(in.at, len, &p, want, N, &n_rules);
    CHECK(access_count(a).rules == n_rules);
    for (size_t i = 0; i < N; i++) {
        enum access_right right = access_view_right(v, volumes[i][0], volumes[i][1]);
        CHECK(right == want[i] || !known);
        CHECK(right != ACCESS_WRITE || !*volumes[i][1]);
    }
    access_view_free(v);

    char *text = mem_alloc(sizeof all + len);
    memcpy(text, all, sizeof all - 1);
    memcpy(text + sizeof all - 1, in.at, len);
    if (access_parse(&more, "FILE", (uint8_t *)text, sizeof all - 1 + len, find_user, &e) == ST_OK) {
        v = access_view_new(more, &p);
        for (size_t i = 0; i < N; i++)
            CHECK(access_view_right(v, volumes[i][0], volumes[i][1]) ==
                  (*volumes[i][1] ? ACCESS_READ : ACCESS_WRITE));
        access_view_free(v);
        access_release(more);
    }
    free(text);
    access_release(a);
}
