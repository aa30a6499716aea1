/*
 * The handshake: whatever a client sends before it may touch a volume, fed to the machine of
 * nbd/handshake.h in pieces of any size, with an owner that has exports of odd names, lists that
 * fail, contexts by the dozen, TLS or none.
 *
 * At stake: a client without any right can send all of this (G6, and that nobody enters an export
 * that was not opened for it; checklist A).
 *
 * An input is the choices of the server, then the client's bytes: as they are, or (which reaches
 * deeper) as options to be put together, with lengths that lie.
 *
 * Oracle: a second reading of the protocol. It goes through the client's bytes option by option
 * and says what the server must have answered to each, byte for byte except for the text of errors,
 * and where it must stand now. The same bytes in one piece must be answered the same. What the
 * machine holds stays bounded.
 *
 * Code: src/nbd/handshake.c
 */
#include "fuzz.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "nbd/handshake.h"
#include "nbd/proto.h"

#define STREAM_BYTES_MAX (512u << 10)
/* As the server feeds it. */
#define PIECE_BYTES_MAX (64u << 10)
#define PIECES_MAX 2000u /* about */
/* An option of 16 bytes may be answered with a sentence; a question ends what one piece gives. */
#define OUTPUT_BYTES_MAX ((PIECE_BYTES_MAX / NBD_OPTION_HEADER_BYTES) * 256u)
#define CONTEXTS_OFFERED 20u
#define LONG_NAME_BYTES NBD_STRING_BYTES_MAX
/* A list that is more than the machine takes at once, and questions to a conversation. */
#define MANY 40u
#define QUESTIONS_MAX 24u

/* --- the server of this input ------------------------------------------------------------- */

static char long_name[LONG_NAME_BYTES + 1];
static const char *const names[] = {"disk",        "other",  "gr\xc3\xbc\xc3\x9f\x65 \xe2\x82\xac",
                                    "disk@monday", long_name, "broken",
                                    "a:b, c\n",    "gone"};
#define N_NAMES (sizeof names / sizeof names[0])

struct server {
    enum nbd_tls_mode tls;
    bool read_only, list_fails, offers_asked_only, has_identity, many;
    uint8_t exports; /* a bit for each of names */
    unsigned n_contexts;
    enum status broken; /* what opening "broken" gives; ST_OK: it is an export like others */
    unsigned stops_at;  /* the server ends at this question */
};

static struct server server;
static char contexts[CONTEXTS_OFFERED][48];
static const char *context_names[CONTEXTS_OFFERED];

static void take_server(struct fuzz_input *in)
{
    uint64_t a = fuzz_take(in, 1), b = fuzz_take(in, 1), c = fuzz_take(in, 1);
    static const enum status faults[] = {ST_OK, ST_NOTFOUND, ST_SHUTDOWN, ST_IO};
    server = (struct server){.tls = (enum nbd_tls_mode)(a % 3),
                             .read_only = a & 4,
                             .list_fails = a & 8,
                             .offers_asked_only = a & 16,
                             .has_identity = a & 32,
                             .many = (a & 0xc0) == 0xc0,
                             .exports = (uint8_t)b,
                             .n_contexts = (unsigned)(c & 31) % (CONTEXTS_OFFERED + 1),
                             .broken = faults[c >> 5 & 3],
                             .stops_at =
                                 QUESTIONS_MAX - (unsigned)fuzz_take(in, 1) % QUESTIONS_MAX};
}

/* What a name opens: a place in names, or -1. */
static int export_of(const char *name)
{
    for (size_t i = 0; i < N_NAMES; i++)
        if (server.exports & (1u << i) && (!*name || strcmp(names[i], name) == 0))
            return (int)i;
    return -1;
}

static enum status export_status(int export)
{
    return export < 0 ? ST_NOTFOUND : strcmp(names[export], "broken") == 0 ? server.broken : ST_OK;
}

static uint64_t size_of(int export)
{
    return (uint64_t)(export + 1) << (8 * export);
}

static const char *description_of(int export)
{
    return export % 2 ? "" : names[export];
}

static unsigned list_length(void)
{
    unsigned n = 0;
    for (size_t i = 0; i < N_NAMES; i++)
        n += server.exports >> i & 1u;
    return server.many ? MANY * n : n;
}

static const char *listed(unsigned at)
{
    unsigned every = server.many ? MANY : 1;
    for (size_t i = 0; i < N_NAMES; i++)
        if (server.exports & (1u << i)) {
            if (at < every)
                return names[i];
            at -= every;
        }
    return NULL;
}

/* --- the client's bytes ------------------------------------------------------------------- */

static uint8_t stream[STREAM_BYTES_MAX];
static size_t stream_len;

static void put(const void *p, size_t n)
{
    n = min_u64(n, sizeof stream - stream_len);
    if (n)
        memcpy(stream + stream_len, p, n);
    stream_len += n;
}

static void put_n(uint64_t v, unsigned bytes)
{
    uint8_t p[8];
    put_be64(p, v);
    put(p + 8 - bytes, bytes);
}

/* Bytes of the input as they are. */
static void put_raw(struct fuzz_input *in, size_t n)
{
    n = min_u64(n, fuzz_left(in));
    put(in->at, n);
    in->at += n;
}

static void put_string(struct fuzz_input *in, const char *const *choices, size_t n_choices)
{
    uint64_t choice = fuzz_take(in, 1);
    if (choice < n_choices) {
        put_n(strlen(choices[choice]), 4);
        put(choices[choice], strlen(choices[choice]));
    } else if (choice == 0xff) {
        put_n(fuzz_take(in, 4), 4); /* a length of its own mind */
    } else if (choice == 0xfe) {
        size_t n = fuzz_take(in, 2) % (NBD_STRING_BYTES_MAX + 2);
        put_n(n, 4);
        for (size_t i = 0; i < n; i++)
            put("n", 1);
    } else {
        size_t n = min_u64(choice % 32, fuzz_left(in));
        put_n(n, 4);
        put_raw(in, n);
    }
}

static void put_infos(struct fuzz_input *in)
{
    uint64_t n = fuzz_take(in, 1);
    put_string(in, names, N_NAMES);
    put_n(n & 0x80 ? fuzz_take(in, 2) : n % 16, 2);
    for (uint64_t i = 0; i < n % 16; i++)
        put_n(fuzz_take(in, 1) % 6, 2);
}

static void put_queries(struct fuzz_input *in)
{
    static const char *choices[CONTEXTS_OFFERED + 6];
    const char *const others[6] = {"base:",    "qemu:", "qemu:dirty-bitmap:",
                                   "fdb-nbd:", "",      "nothing"};
    memcpy(choices, context_names, sizeof context_names);
    memcpy(choices + CONTEXTS_OFFERED, others, sizeof others);
    uint64_t n = fuzz_take(in, 1);
    put_string(in, names, N_NAMES);
    put_n(n & 0x80 ? fuzz_take(in, 4) : n % 32, 4);
    for (uint64_t i = 0; i < n % 32; i++)
        put_string(in, choices, CONTEXTS_OFFERED + 6);
}

static void put_option(struct fuzz_input *in)
{
    static const uint32_t numbers[16] = {
        NBD_OPT_GO,       NBD_OPT_EXPORT_NAME,      NBD_OPT_ABORT,
        NBD_OPT_LIST,     NBD_OPT_STARTTLS,         NBD_OPT_INFO,
        NBD_OPT_GO,       NBD_OPT_STRUCTURED_REPLY, NBD_OPT_LIST_META_CONTEXT,
        NBD_OPT_SET_META_CONTEXT, NBD_OPT_EXTENDED_HEADERS, 0, 4, 12, 0xffffffff, 77};
    uint64_t kind = fuzz_take(in, 1);
    uint32_t number = numbers[kind % 16];
    size_t begin = stream_len;
    if (kind >> 4 == 15) {
        put_raw(in, kind % 16 + 1);
        return;
    }
    unsigned times = kind >> 4 == 14 ? (unsigned)fuzz_take(in, 2) % 1100 : 1;
    put_n(NBD_OPTION_MAGIC, 8);
    put_n(number, 4);
    put_n(0, 4);
    size_t data = stream_len;
    if (number == NBD_OPT_GO || number == NBD_OPT_INFO) {
        put_infos(in);
    } else if (number == NBD_OPT_SET_META_CONTEXT || number == NBD_OPT_LIST_META_CONTEXT) {
        put_queries(in);
    } else if (number == NBD_OPT_EXPORT_NAME) {
        uint64_t name = fuzz_take(in, 1);
        if (name < N_NAMES)
            put(names[name], strlen(names[name]));
        else
            put_raw(in, name % 32);
    }
    if (kind & 0x10) /* more than belongs there */
        put_raw(in, fuzz_take(in, 1) % 32);
    if (kind >> 4 == 12) {
        static const uint8_t zeros[4096];
        for (uint64_t left = fuzz_take(in, 3) % (200u << 10), n; left; left -= n) {
            n = min_u64(left, sizeof zeros);
            put(zeros, n);
        }
    }
    uint64_t len = stream_len - data;
    if (kind & 0x20)
        len = kind & 0x40 ? fuzz_take(in, 4) : len + fuzz_take(in, 1) - 128;
    if (stream_len - begin >= 16)
        put_be32(stream + begin + 12, (uint32_t)len);
    size_t whole = stream_len - begin;
    for (unsigned i = 1; i < times && stream_len + whole <= sizeof stream; i++)
        put(stream + begin, whole);
}

static void take_stream(struct fuzz_input *in)
{
    uint64_t how = fuzz_take(in, 1);
    stream_len = 0;
    if (how & 0x80) {
        put_raw(in, fuzz_left(in));
        return;
    }
    put_n(how & 0x40 ? fuzz_take(in, 4) : how & 3, 4);
    while (fuzz_left(in))
        put_option(in);
}

/* --- what must be answered ---------------------------------------------------------------- */

struct outcome {
    uint8_t *bytes;
    size_t len, cap, at;
    unsigned n_questions;
    enum handshake_want want;
    bool structured, extended, lacked_tls, spoke_before_tls;
    uint16_t flags;
    uint32_t n_contexts;
    char name[LONG_NAME_BYTES + 1];
    bool has_name;
};

/* The protocol's view of the conversation. */
struct view {
    struct outcome *o;
    size_t at; /* in the stream */
    const size_t *ends; /* of the pieces it was fed in */
    bool fixed, no_zeroes, tls, structured, extended;
    int selected_for; /* export the contexts are for; -1: none */
    unsigned n_selected;
    unsigned n_options, n_questions;
};

static bool is_text(const uint8_t *p, size_t len)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    for (size_t i = 0; i < len;) {
        unsigned n = p[i] < 0x80       ? 1
                     : p[i] >> 5 == 6  ? 2
                     : p[i] >> 4 == 14 ? 3
                     : p[i] >> 3 == 30 ? 4
                                       : 0;
        uint32_t code = n == 1 ? p[i] : p[i] & (0x7fu >> n);
        if (!n || !p[i] || n > len - i)
            return false;
        for (unsigned k = 1; k < n; k++) {
            if (p[i + k] >> 6 != 2)
                return false;
            code = code * 64 + p[i + k] % 64;
        }
        if (code < least[n] || code > 0x10ffff || (code >> 11) == 0x1b)
            return false;
        i += n;
    }
    return true;
}

static const uint8_t *answered(struct view *v, size_t n)
{
    CHECK(v->o->len - v->o->at >= n);
    const uint8_t *p = v->o->bytes + v->o->at;
    v->o->at += n;
    return p;
}

/* The next reply, to this option. */
static uint32_t reply(struct view *v, uint32_t option, const uint8_t **data, uint32_t *len)
{
    const uint8_t *p = answered(v, NBD_OPTION_REPLY_BYTES);
    CHECK(get_be64(p) == NBD_OPTION_REPLY_MAGIC && get_be32(p + 8) == option);
    *len = get_be32(p + 16);
    *data = answered(v, *len);
    return get_be32(p + 12);
}

static void is_refused(struct view *v, uint32_t option, uint32_t type)
{
    const uint8_t *text;
    uint32_t len;
    uint32_t got = reply(v, option, &text, &len);
    CHECK(got == type);
    CHECK(len && len <= NBD_STRING_BYTES_MAX && is_text(text, len));
}

static void is_acked(struct view *v, uint32_t option)
{
    const uint8_t *data;
    uint32_t len;
    uint32_t got = reply(v, option, &data, &len);
    CHECK(got == NBD_REP_ACK && len == 0);
}

static uint32_t error_of(enum status st)
{
    return st == ST_NOTFOUND   ? NBD_REP_ERR_UNKNOWN
           : st == ST_SHUTDOWN ? NBD_REP_ERR_SHUTDOWN
                               : NBD_REP_ERR_POLICY;
}

/* A string with its length in front; the error it deserves, or 0. */
static uint32_t string(const uint8_t **p, const uint8_t *end, const uint8_t **text, uint32_t *len)
{
    if (end - *p < 4)
        return NBD_REP_ERR_INVALID;
    *len = get_be32(*p);
    *text = *p + 4;
    if ((uint64_t)(end - *text) < *len)
        return NBD_REP_ERR_INVALID;
    if (*len > NBD_STRING_BYTES_MAX)
        return NBD_REP_ERR_TOO_BIG;
    *p = *text + *len;
    return is_text(*text, *len) ? 0 : NBD_REP_ERR_INVALID;
}

static int export_at(const uint8_t *name, size_t len)
{
    char text[LONG_NAME_BYTES + 1];
    memcpy(text, name, len);
    text[len] = '\0';
    return export_of(text);
}

static uint16_t flags_of(const struct view *v, int export)
{
    unsigned flags = 1 | 4 | 8 | 1u << 8 | 1u << 10; /* FLUSH, FUA, MULTI_CONN, CACHE */
    flags |= server.read_only ? 2 : 1u << 5 | 1u << 6 | 1u << 11; /* TRIM, ZEROES, FAST_ZERO */
    if (v->structured || v->extended)
        flags |= 1u << 7; /* DF */
    if (v->extended && v->n_selected && v->selected_for == export)
        flags |= 1u << 12; /* BLOCK_STATUS_PAYLOAD */
    return (uint16_t)flags;
}

/* The server ends at a question: true where this is the one. */
static bool server_stops(struct view *v, uint32_t option)
{
    if (++v->n_questions != server.stops_at)
        return false;
    if (option != NBD_OPT_EXPORT_NAME)
        is_refused(v, option, NBD_REP_ERR_SHUTDOWN);
    return true;
}

static void entered(struct view *v, int export)
{
    const struct outcome *o = v->o;
    CHECK(o->has_name && strcmp(o->name, names[export]) == 0);
    CHECK(o->flags == flags_of(v, export));
    CHECK(o->n_contexts == (v->selected_for == export ? v->n_selected : 0));
}

/* Each returns where the machine stands after the option. */
static enum handshake_want saw_export_name(struct view *v, const uint8_t *data, uint32_t len)
{
    if (len > NBD_STRING_BYTES_MAX || !is_text(data, len) || v->extended)
        return HANDSHAKE_CLOSE;
    int export = export_at(data, len);
    if (server_stops(v, NBD_OPT_EXPORT_NAME) || export_status(export) != ST_OK)
        return HANDSHAKE_CLOSE;
    const uint8_t *p = answered(v, v->no_zeroes ? 10 : 134);
    CHECK(get_be64(p) == size_of(export) && get_be16(p + 8) == flags_of(v, export));
    for (unsigned i = 10; !v->no_zeroes && i < 134; i++)
        CHECK(p[i] == 0);
    entered(v, export);
    return HANDSHAKE_READY;
}

static void saw_infos(struct view *v, uint32_t option, int export, const uint8_t *asked, unsigned n)
{
    unsigned told = 0;
    for (;;) {
        const uint8_t *p;
        uint32_t len, type = reply(v, option, &p, &len);
        if (type == NBD_REP_ACK) {
            CHECK(len == 0 && told & 1u);
            break;
        }
        CHECK(type == NBD_REP_INFO && len >= 2);
        unsigned info = get_be16(p);
        CHECK(info <= 3 && !(told & 1u << info));
        told |= 1u << info;
        const char *text = info == 1 ? names[export] : description_of(export);
        if (info == NBD_INFO_EXPORT)
            CHECK(len == 12 && get_be64(p + 2) == size_of(export) &&
                  get_be16(p + 10) == flags_of(v, export));
        else if (info == NBD_INFO_BLOCK_SIZE)
            CHECK(len == 14 && get_be32(p + 2) == 1 && get_be32(p + 6) == 16384 &&
                  get_be32(p + 10) == 32u << 20);
        else
            CHECK(len == 2 + strlen(text) && memcmp(p + 2, text, len - 2) == 0);
    }
    unsigned must = 1;
    for (unsigned i = 0; i < n; i++) {
        unsigned info = get_be16(asked + 2 * i);
        if (info <= 3 && (info != 2 || *description_of(export)))
            must |= 1u << info;
    }
    CHECK(told == must);
}

/* The export that an option is about, or -1: it was refused, for its form (`error`) or by the server,
 * or the server ends, and `want` is what comes next. */
static int export_asked(struct view *v, uint32_t option, uint32_t error, const uint8_t *name,
                        uint32_t len, enum handshake_want *want)
{
    *want = HANDSHAKE_BYTES;
    if (error) {
        is_refused(v, option, error);
        return -1;
    }
    int export = export_at(name, len);
    if (server_stops(v, option)) {
        *want = HANDSHAKE_CLOSE;
        return -1;
    }
    if (export_status(export) != ST_OK) {
        is_refused(v, option, error_of(export_status(export)));
        return -1;
    }
    return export;
}

static enum handshake_want saw_info(struct view *v, uint32_t option, const uint8_t *data,
                                    uint32_t len)
{
    const uint8_t *p = data, *end = data + len, *name = NULL;
    uint32_t name_len = 0, error = 0;
    if (len > HANDSHAKE_OPTION_BYTES_MAX)
        error = NBD_REP_ERR_TOO_BIG;
    if (!error)
        error = string(&p, end, &name, &name_len);
    if (!error && (end - p < 2 || end - p != 2 + 2 * (long)get_be16(p)))
        error = NBD_REP_ERR_INVALID;
    enum handshake_want want;
    int export = export_asked(v, option, error, name, name_len, &want);
    if (export < 0)
        return want;
    saw_infos(v, option, export, p + 2, get_be16(p));
    if (option == NBD_OPT_INFO)
        return HANDSHAKE_BYTES;
    entered(v, export);
    return HANDSHAKE_READY;
}

/* Whether the queries at `p` name the context, or on a list what it begins with. */
static bool queried(const uint8_t *p, const uint8_t *end, uint32_t n, const char *context,
                    bool listing)
{
    const uint8_t *text;
    uint32_t len;
    if (listing && !n)
        return true;
    while (p < end && string(&p, end, &text, &len) == 0) {
        if (len == strlen(context) && memcmp(text, context, len) == 0)
            return true;
        if (listing && len && text[len - 1] == ':' && len <= strlen(context) &&
            memcmp(text, context, len) == 0)
            return true;
    }
    return false;
}

static enum handshake_want saw_meta_context(struct view *v, uint32_t option, const uint8_t *data,
                                            uint32_t len)
{
    bool listing = option == NBD_OPT_LIST_META_CONTEXT;
    const uint8_t *p = data, *end = data + len, *name = NULL, *text, *queries = NULL;
    uint32_t name_len = 0, error = 0, n = 0, got;
    if (!listing)
        v->n_selected = 0, v->selected_for = -1;
    if (!v->structured && !v->extended)
        error = NBD_REP_ERR_INVALID;
    else if (len > HANDSHAKE_OPTION_BYTES_MAX)
        error = NBD_REP_ERR_TOO_BIG;
    if (!error)
        error = string(&p, end, &name, &name_len);
    if (!error && end - p < 4)
        error = NBD_REP_ERR_INVALID;
    if (!error) {
        n = get_be32(p);
        queries = p += 4;
    }
    for (uint32_t i = 0; i < n && !error; i++) {
        error = string(&p, end, &text, &got);
        if (!error && i >= HANDSHAKE_QUERIES_MAX)
            error = NBD_REP_ERR_TOO_BIG;
    }
    if (!error && p != end)
        error = NBD_REP_ERR_INVALID;
    enum handshake_want want;
    int export = export_asked(v, option, error, name, name_len, &want);
    if (export < 0)
        return want;
    unsigned told = 0;
    for (unsigned i = 0; i < server.n_contexts; i++) {
        if (!queried(queries, end, n, contexts[i], listing))
            continue;
        uint32_t type = reply(v, option, &text, &got);
        if (!listing && told == HANDSHAKE_CONTEXTS_MAX) {
            CHECK(type == NBD_REP_ERR_TOO_BIG);
            return HANDSHAKE_BYTES;
        }
        told++;
        CHECK(type == NBD_REP_META_CONTEXT && got == 4 + strlen(contexts[i]));
        CHECK(memcmp(text + 4, contexts[i], got - 4) == 0);
        CHECK(get_be32(text) == (listing ? 0 : told));
    }
    if (listing && server.has_identity && n && queried(queries, end, n, "fdb-nbd:", false)) {
        uint32_t type = reply(v, option, &text, &got);
        CHECK(type == NBD_REP_META_CONTEXT && got == 4 + 16 &&
              memcmp(text + 4, "fdb-nbd:volume:7", 16) == 0);
    }
    is_acked(v, option);
    if (!listing)
        v->n_selected = told, v->selected_for = export;
    return HANDSHAKE_BYTES;
}

static enum handshake_want saw_list(struct view *v, uint32_t len)
{
    if (len) {
        is_refused(v, NBD_OPT_LIST, NBD_REP_ERR_INVALID);
        return HANDSHAKE_BYTES;
    }
    if (server_stops(v, NBD_OPT_LIST))
        return HANDSHAKE_CLOSE;
    for (unsigned i = 0; i < list_length(); i++) {
        const uint8_t *p;
        uint32_t got, type = reply(v, NBD_OPT_LIST, &p, &got);
        const char *name = listed(i);
        CHECK(type == NBD_REP_SERVER && got == 4 + strlen(name) + 3);
        CHECK(get_be32(p) == strlen(name) && memcmp(p + 4, name, got - 7) == 0);
    }
    if (server.list_fails)
        is_refused(v, NBD_OPT_LIST, NBD_REP_ERR_POLICY);
    else
        is_acked(v, NBD_OPT_LIST);
    return HANDSHAKE_BYTES;
}

static enum handshake_want saw_starttls(struct view *v, uint32_t len)
{
    if (len || server.tls == NBD_TLS_OFF || v->tls) {
        is_refused(v, NBD_OPT_STARTTLS,
                   !len && server.tls == NBD_TLS_OFF ? NBD_REP_ERR_UNSUP : NBD_REP_ERR_INVALID);
        return HANDSHAKE_BYTES;
    }
    size_t end = 0;
    while (v->ends[end] < v->at)
        end++;
    if (v->ends[end] > v->at) {
        is_refused(v, NBD_OPT_STARTTLS, NBD_REP_ERR_INVALID);
        CHECK(v->o->spoke_before_tls);
        return HANDSHAKE_CLOSE;
    }
    is_acked(v, NBD_OPT_STARTTLS);
    v->tls = true;
    v->structured = v->extended = false;
    v->n_selected = 0;
    v->selected_for = -1;
    return HANDSHAKE_BYTES;
}

static enum handshake_want saw_option(struct view *v)
{
    const uint8_t *head = stream + v->at;
    size_t left = stream_len - v->at;
    if (left < NBD_OPTION_HEADER_BYTES)
        return HANDSHAKE_BYTES;
    uint32_t option = get_be32(head + 8), len = get_be32(head + 12);
    if (memcmp(head, "IHAVEOPT", 8) != 0 || ++v->n_options > HANDSHAKE_OPTIONS_MAX)
        return HANDSHAKE_CLOSE;
    if (len > HANDSHAKE_SKIP_BYTES_MAX) {
        if (option != NBD_OPT_EXPORT_NAME)
            is_refused(v, option, NBD_REP_ERR_TOO_BIG);
        return HANDSHAKE_CLOSE;
    }
    if (left - NBD_OPTION_HEADER_BYTES < len)
        return HANDSHAKE_BYTES;
    const uint8_t *data = head + NBD_OPTION_HEADER_BYTES;
    v->at += NBD_OPTION_HEADER_BYTES + len;

    if (option == NBD_OPT_ABORT) {
        is_acked(v, option);
        return HANDSHAKE_CLOSE;
    }
    if (server.tls == NBD_TLS_REQUIRE && !v->tls && option != NBD_OPT_STARTTLS) {
        CHECK(v->o->lacked_tls);
        if (option == NBD_OPT_EXPORT_NAME)
            return HANDSHAKE_CLOSE;
        is_refused(v, option, NBD_REP_ERR_TLS_REQD);
        return HANDSHAKE_BYTES;
    }
    if (!v->fixed && option != NBD_OPT_EXPORT_NAME)
        return HANDSHAKE_CLOSE;
    switch (option) {
    case NBD_OPT_EXPORT_NAME:
        return saw_export_name(v, data, len);
    case NBD_OPT_LIST:
        return saw_list(v, len);
    case NBD_OPT_STARTTLS:
        return saw_starttls(v, len);
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        return saw_info(v, option, data, len);
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        return saw_meta_context(v, option, data, len);
    case NBD_OPT_STRUCTURED_REPLY:
        if (len || v->extended) {
            is_refused(v, option, len ? NBD_REP_ERR_INVALID : NBD_REP_ERR_EXT_HEADER_REQD);
            return HANDSHAKE_BYTES;
        }
        is_acked(v, option);
        v->structured = true;
        return HANDSHAKE_BYTES;
    case NBD_OPT_EXTENDED_HEADERS:
        if (len) {
            is_refused(v, option, NBD_REP_ERR_INVALID);
            return HANDSHAKE_BYTES;
        }
        is_acked(v, option);
        v->extended = true;
        return HANDSHAKE_BYTES;
    default:
        is_refused(v, option, NBD_REP_ERR_UNSUP);
        return HANDSHAKE_BYTES;
    }
}

static void check_outcome(struct outcome *o, const size_t *ends)
{
    struct view v = {.o = o, .ends = ends, .selected_for = -1};
    enum handshake_want want = HANDSHAKE_BYTES;
    const uint8_t *greeting = answered(&v, NBD_GREETING_BYTES);
    CHECK(memcmp(greeting, "NBDMAGICIHAVEOPT\0\3", NBD_GREETING_BYTES) == 0);
    if (stream_len >= 4) {
        uint32_t flags = get_be32(stream);
        v.at = 4;
        v.fixed = flags & 1;
        v.no_zeroes = flags & 2;
        if (flags > 3)
            want = HANDSHAKE_CLOSE;
        for (size_t before = 0; want == HANDSHAKE_BYTES && v.at > before;) {
            before = v.at;
            want = saw_option(&v);
        }
    }
    CHECK(o->want == want);
    CHECK(o->at == o->len);
    CHECK(want != HANDSHAKE_READY ||
          (o->structured == v.structured && o->extended == v.extended));
    CHECK(want == HANDSHAKE_READY || !o->has_name);
}

/* --- the conversation --------------------------------------------------------------------- */

static void drain(struct handshake *h, struct outcome *o)
{
    size_t n;
    const uint8_t *p = handshake_output(h, &n);
    CHECK(n <= OUTPUT_BYTES_MAX);
    if (!n)
        return;
    mem_grow(&o->bytes, &o->cap, o->len + n, 1);
    memcpy(o->bytes + o->len, p, n);
    o->len += n;
    /* In two goes, as a socket may take it. */
    handshake_sent(h, n / 3);
    handshake_sent(h, n - n / 3);
}

static void answer_list(struct handshake *h, struct outcome *o)
{
    for (unsigned i = 0; i < list_length(); i++)
        while (!handshake_list_item(h, listed(i), "abc"))
            drain(h, o);
    handshake_list_done(h, server.list_fails ? ST_IO : ST_OK, "the list can't be read");
}

static void answer_export(struct handshake *h)
{
    bool opens;
    int export = export_of(handshake_export_name(h, &opens));
    enum status st = export_status(export);
    if (st != ST_OK) {
        handshake_export(h, st, NULL, "it can't be opened");
        return;
    }
    const char *offered[CONTEXTS_OFFERED];
    size_t n = 0;
    for (unsigned i = 0; i < server.n_contexts; i++)
        if (!server.offers_asked_only || handshake_asks_for(h, contexts[i]))
            offered[n++] = contexts[i];
    handshake_asks_below(h, NBD_CONTEXT_BITMAP_PREFIX);
    struct nbd_export e = {.name = names[export],
                           .description = description_of(export),
                           .size = size_of(export),
                           .block_size = 16384,
                           .read_only = server.read_only,
                           .contexts = offered,
                           .n_contexts = n,
                           .identity = server.has_identity ? "fdb-nbd:volume:7" : NULL};
    handshake_export(h, ST_OK, &e, NULL);
}

static void answer(struct handshake *h, struct outcome *o)
{
    if (h->want == HANDSHAKE_TLS) {
        drain(h, o);
        handshake_tls_started(h);
    } else if (++o->n_questions == server.stops_at) {
        handshake_shutdown(h);
    } else if (h->want == HANDSHAKE_LIST) {
        answer_list(h, o);
    } else {
        answer_export(h);
    }
}

/* Feeds the pieces that end at `ends`, the last of which is the stream's. */
static void converse(const size_t *ends, struct outcome *o)
{
    struct handshake h;
    handshake_init(&h, server.tls);
    drain(&h, o);
    size_t at = 0;
    while (h.want == HANDSHAKE_BYTES && at < stream_len) {
        while (*ends <= at)
            ends++;
        /* A copy, so that reading behind it shows. */
        size_t n = *ends - at;
        uint8_t *piece = mem_alloc(n);
        memcpy(piece, stream + at, n);
        size_t used = handshake_feed(&h, piece, n);
        free(piece);
        CHECK(used <= n && (used == n || h.want != HANDSHAKE_BYTES));
        at += used;
        drain(&h, o);
        while (h.want != HANDSHAKE_BYTES && h.want != HANDSHAKE_READY &&
               h.want != HANDSHAKE_CLOSE) {
            answer(&h, o);
            drain(&h, o);
        }
    }
    o->want = h.want;
    o->structured = h.result.structured;
    o->extended = h.result.extended;
    o->lacked_tls = h.lacked_tls;
    o->spoke_before_tls = h.spoke_before_tls;
    o->flags = h.result.flags;
    o->n_contexts = h.result.n_contexts;
    o->has_name = h.result.name;
    snprintf(o->name, sizeof o->name, "%s", h.result.name ? h.result.name : "");
    handshake_free(&h);
}

/* --- pieces ------------------------------------------------------------------------------- */

static size_t ends[STREAM_BYTES_MAX + 2], few_ends[STREAM_BYTES_MAX + 2];

/* The end of the first STARTTLS behind `at`, where an honest client waits; or of the stream. */
static size_t next_starttls(size_t at)
{
    for (size_t option = 4; option + NBD_OPTION_HEADER_BYTES <= stream_len;) {
        uint32_t len = get_be32(stream + option + 12);
        bool is_tls = get_be32(stream + option + 8) == NBD_OPT_STARTTLS && !len;
        if (len > stream_len)
            break;
        option += NBD_OPTION_HEADER_BYTES + len;
        if (is_tls && option > at && option <= stream_len)
            return option;
    }
    return stream_len;
}

/* Cuts the stream: sizes up to `max`, from a seed. */
static void cut(size_t *to, size_t max, uint32_t seed, bool honest)
{
    size_t at = 0, n = 0, tls = honest ? next_starttls(0) : stream_len;
    while (at < stream_len) {
        seed = seed * 1664525u + 1013904223u;
        at += max == PIECE_BYTES_MAX ? max : 1 + (seed >> 8) % max;
        if (at >= tls) {
            at = tls;
            tls = honest ? next_starttls(at) : stream_len;
        }
        to[n++] = at;
    }
    to[n] = stream_len;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    memset(long_name, 'L', LONG_NAME_BYTES);
    for (unsigned i = 0; i < CONTEXTS_OFFERED; i++) {
        if (i < 2)
            snprintf(contexts[i], sizeof contexts[i], "%s",
                     i ? NBD_CONTEXT_DEPTH : NBD_CONTEXT_ALLOCATION);
        else
            snprintf(contexts[i], sizeof contexts[i], NBD_CONTEXT_BITMAP_PREFIX "day:%u", i);
        context_names[i] = contexts[i];
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = fuzz_input(data, size);
    take_server(&in);
    uint8_t how = (uint8_t)fuzz_take(&in, 1);
    uint32_t seed = (uint32_t)fuzz_take(&in, 2);
    bool honest = !(how & 0x80);
    take_stream(&in);

    struct outcome o = {0}, whole = {0};
    static const size_t sizes[] = {1, 3, 17, 40, 300, 5000, PIECE_BYTES_MAX, 2};
    cut(ends, max_u64(sizes[how % 8], min_u64(stream_len / PIECES_MAX, PIECE_BYTES_MAX)), seed,
        honest);
    converse(ends, &o);
    check_outcome(&o, ends);
    if (honest) {
        cut(few_ends, PIECE_BYTES_MAX, 0, true);
        converse(few_ends, &whole);
        CHECK(whole.want == o.want && whole.len == o.len);
        CHECK(memcmp(whole.bytes, o.bytes, o.len) == 0);
    }
    free(o.bytes);
    free(whole.bytes);
    return 0;
}
