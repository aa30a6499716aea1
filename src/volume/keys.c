/*
 * Keys: FoundationDB's tuple encoding, as far as the layout needs it.
 *
 * A text is 02, its bytes, 00; a byte string is 01, its bytes, 00; inside both a zero
 * byte is written 00 ff. An integer of n significant bytes is 14+n and those bytes,
 * most significant first. So the bytes of two keys compare as their parts do. Parsing
 * takes a key apart only where encoding the parts again gives the same bytes: there is
 * one key for a thing, and one thing for a key.
 */
#include "volume/keys.h"

#include "base/check.h"

#define TUPLE_BYTES 0x01
#define TUPLE_TEXT 0x02
#define TUPLE_INT 0x14
#define ROW_LEVEL_MAX 2

static void put_byte(struct key *k, uint8_t byte)
{
    CHECK(k->len < sizeof k->bytes);
    k->bytes[k->len++] = byte;
}

static void put_string(struct key *k, uint8_t type, const void *data, size_t len)
{
    const uint8_t *bytes = data;
    put_byte(k, type);
    for (size_t i = 0; i < len; i++) {
        put_byte(k, bytes[i]);
        if (bytes[i] == 0)
            put_byte(k, 0xff);
    }
    put_byte(k, 0);
}

static void put_int(struct key *k, uint64_t v)
{
    unsigned n = 0;
    while (n < 8 && v >> (8 * n))
        n++;
    put_byte(k, (uint8_t)(TUPLE_INT + n));
    while (n-- > 0)
        put_byte(k, (uint8_t)(v >> (8 * n)));
}

void key_prefix(struct key *k, char tag)
{
    k->len = 0;
    put_string(k, TUPLE_TEXT, &tag, 1);
}

void key_prefix_branch(struct key *k, char tag, uint64_t branch)
{
    key_prefix(k, tag);
    put_int(k, branch);
}

void key_prefix_rows(struct key *k, uint64_t branch, unsigned level)
{
    key_prefix_branch(k, 'i', branch);
    put_int(k, level);
}

void key_prefix_blocks(struct key *k, uint64_t branch, uint64_t epoch)
{
    key_prefix_branch(k, 'b', branch);
    put_int(k, epoch);
}

void key_prefix_end(struct key *k)
{
    /* No part begins with ff. */
    put_byte(k, 0xff);
}

void key_store_meta(struct key *k)
{
    key_prefix(k, 'm');
}

void key_branch_counter(struct key *k)
{
    key_prefix(k, 'c');
}

void key_name(struct key *k, const char *name)
{
    size_t len = strnlen(name, NAME_BYTES_MAX + 1);
    CHECK(len <= NAME_BYTES_MAX);
    key_prefix(k, 'n');
    put_string(k, TUPLE_TEXT, name, len);
}

void key_header(struct key *k, uint64_t branch)
{
    key_prefix_branch(k, 'h', branch);
}

void key_owner(struct key *k, uint64_t branch)
{
    key_prefix_branch(k, 'o', branch);
}

void key_state(struct key *k, uint64_t branch)
{
    key_prefix_branch(k, 'a', branch);
}

void key_mailbox(struct key *k, uint64_t branch)
{
    key_prefix_branch(k, 'q', branch);
}

void key_answer(struct key *k, uint64_t branch)
{
    key_prefix_branch(k, 'r', branch);
}

void key_session(struct key *k, const uint8_t id[16])
{
    key_prefix(k, 's');
    put_string(k, TUPLE_BYTES, id, 16);
}

void key_trash(struct key *k, uint64_t branch, uint64_t n)
{
    key_prefix_branch(k, 't', branch);
    put_int(k, n);
}

void key_removed(struct key *k, uint64_t branch)
{
    key_prefix_branch(k, 'g', branch);
}

void key_ancestry(struct key *k, uint64_t branch)
{
    key_prefix_branch(k, 'l', branch);
}

void key_snapshot(struct key *k, uint64_t branch, uint64_t epoch)
{
    key_prefix_branch(k, 'v', branch);
    put_int(k, epoch);
}

void key_prefix_children(struct key *k, uint64_t branch, uint64_t epoch)
{
    key_prefix_branch(k, 'd', branch);
    put_int(k, epoch);
}

void key_child(struct key *k, uint64_t branch, uint64_t epoch, uint64_t child)
{
    key_prefix_children(k, branch, epoch);
    put_int(k, child);
}

void key_row(struct key *k, uint64_t branch, unsigned level, uint64_t row, uint64_t epoch)
{
    key_prefix_rows(k, branch, level);
    put_int(k, row);
    put_int(k, epoch);
}

void key_block(struct key *k, uint64_t branch, uint64_t epoch, uint64_t block)
{
    key_prefix_blocks(k, branch, epoch);
    put_int(k, block);
}

/* A key being taken apart; `ok` goes false at the first thing out of place. */
struct parser {
    const uint8_t *at, *end;
    bool ok;
};

static struct parser parse_begin(struct slice k, char tag)
{
    const uint8_t *bytes = k.data;
    struct parser p = {.ok = k.len >= 3 && bytes[0] == TUPLE_TEXT && bytes[1] == (uint8_t)tag &&
                             bytes[2] == 0};
    if (p.ok) {
        p.at = bytes + 3;
        p.end = bytes + k.len;
    }
    return p;
}

static uint64_t parse_int(struct parser *p)
{
    if (!p->ok || p->at == p->end || *p->at < TUPLE_INT || *p->at > TUPLE_INT + 8) {
        p->ok = false;
        return 0;
    }
    size_t n = (size_t)(*p->at++ - TUPLE_INT);
    /* A leading zero byte would be a second spelling of the same number. */
    if ((size_t)(p->end - p->at) < n || (n > 0 && *p->at == 0)) {
        p->ok = false;
        return 0;
    }
    uint64_t v = 0;
    while (n-- > 0)
        v = v << 8 | *p->at++;
    return v;
}

/* Reads a string of at most `cap` bytes into `out` and returns its length. */
static size_t parse_string(struct parser *p, uint8_t type, uint8_t *out, size_t cap)
{
    if (!p->ok || p->at == p->end || *p->at != type) {
        p->ok = false;
        return 0;
    }
    p->at++;
    size_t len = 0;
    while (p->at < p->end) {
        uint8_t byte = *p->at++;
        if (byte == 0) {
            if (p->at == p->end || *p->at != 0xff)
                return len;
            p->at++;
        }
        if (len == cap)
            break;
        out[len++] = byte;
    }
    p->ok = false;
    return 0;
}

static bool parse_done(const struct parser *p)
{
    return p->ok && p->at == p->end;
}

bool key_parse_name(struct slice k, char name[NAME_BYTES_MAX + 1])
{
    struct parser p = parse_begin(k, 'n');
    uint8_t text[NAME_BYTES_MAX];
    size_t len = parse_string(&p, TUPLE_TEXT, text, sizeof text);
    if (!parse_done(&p) || memchr(text, 0, len))
        return false;
    memcpy(name, text, len);
    name[len] = '\0';
    return name_valid(name);
}

bool key_parse_branch(struct slice k, char tag, uint64_t *branch)
{
    struct parser p = parse_begin(k, tag);
    *branch = parse_int(&p);
    return parse_done(&p);
}

bool key_parse_trash(struct slice k, uint64_t *branch, uint64_t *n)
{
    struct parser p = parse_begin(k, 't');
    *branch = parse_int(&p);
    *n = parse_int(&p);
    return parse_done(&p);
}

bool key_parse_snapshot(struct slice k, uint64_t *branch, uint64_t *epoch)
{
    struct parser p = parse_begin(k, 'v');
    *branch = parse_int(&p);
    *epoch = parse_int(&p);
    return parse_done(&p);
}

bool key_parse_child(struct slice k, uint64_t *branch, uint64_t *epoch, uint64_t *child)
{
    struct parser p = parse_begin(k, 'd');
    *branch = parse_int(&p);
    *epoch = parse_int(&p);
    *child = parse_int(&p);
    return parse_done(&p);
}

bool key_parse_row(struct slice k, uint64_t *branch, unsigned *level, uint64_t *row,
                   uint64_t *epoch)
{
    struct parser p = parse_begin(k, 'i');
    *branch = parse_int(&p);
    uint64_t any_level = parse_int(&p);
    *row = parse_int(&p);
    *epoch = parse_int(&p);
    if (!parse_done(&p) || any_level < 1 || any_level > ROW_LEVEL_MAX)
        return false;
    *level = (unsigned)any_level;
    return true;
}

bool key_parse_block(struct slice k, uint64_t *branch, uint64_t *epoch, uint64_t *block)
{
    struct parser p = parse_begin(k, 'b');
    *branch = parse_int(&p);
    *epoch = parse_int(&p);
    *block = parse_int(&p);
    return parse_done(&p);
}

bool key_parse_session(struct slice k, uint8_t id[16])
{
    struct parser p = parse_begin(k, 's');
    size_t len = parse_string(&p, TUPLE_BYTES, id, 16);
    return parse_done(&p) && len == 16;
}

static bool is_alnum(char c)
{
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
}

bool name_valid(const char *name)
{
    if (!is_alnum(name[0]))
        return false;
    size_t len = 1;
    for (; name[len]; len++)
        if (len == NAME_BYTES_MAX ||
            !(is_alnum(name[len]) || name[len] == '.' || name[len] == '_' || name[len] == '-'))
            return false;
    return true;
}

bool name_split(const char *text, char volume[NAME_BYTES_MAX + 1],
                char snapshot[NAME_BYTES_MAX + 1])
{
    const char *at = strchr(text, '@');
    size_t len = at ? (size_t)(at - text) : strnlen(text, NAME_BYTES_MAX + 1);
    volume[0] = snapshot[0] = '\0';
    if (len > NAME_BYTES_MAX || (at && (strnlen(at + 1, NAME_BYTES_MAX + 1) > NAME_BYTES_MAX)))
        return false;
    memcpy(volume, text, len);
    volume[len] = '\0';
    if (at)
        memcpy(snapshot, at + 1, strlen(at + 1) + 1);
    return name_valid(volume) && (!at || name_valid(snapshot));
}
