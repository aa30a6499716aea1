/*
 * The handshake as a machine of bytes; handshake.h says what the parts are for.
 *
 * Each option goes the same way: header, data (kept whole where it is short enough to be
 * looked at, read over otherwise), then one function that answers. So every refused option
 * has consumed its data, and the stream stays in step whatever a client sends.
 */
#include "nbd/handshake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/mem.h"
#include "nbd/proto.h"

enum state {
    STATE_CLIENT_FLAGS,
    STATE_OPTION_HEADER,
    STATE_OPTION_DATA,
    STATE_ASKED, /* the owner has a question to answer */
    STATE_OVER,
};

/* --- output ---------------------------------------------------------------------- */

static uint8_t *out_room(struct handshake *h, size_t n)
{
    mem_grow(&h->out, &h->out_cap, h->out_len + n, 1);
    uint8_t *p = h->out + h->out_len;
    h->out_len += n;
    return p;
}

/* The header of an option reply with room for `len` bytes of data, which it returns. */
static uint8_t *put_reply(struct handshake *h, uint32_t type, size_t len)
{
    uint8_t *p = out_room(h, NBD_OPTION_REPLY_BYTES + len);
    put_be64(p, NBD_OPTION_REPLY_MAGIC);
    put_be32(p + 8, h->option);
    put_be32(p + 12, type);
    put_be32(p + 16, (uint32_t)len);
    return p + NBD_OPTION_REPLY_BYTES;
}

static void put_text(uint8_t *p, const char *text, size_t len)
{
    if (len)
        memcpy(p, text, len);
}

static void free_option(struct handshake *h)
{
    free(h->data);
    free(h->queries);
    free(h->asked_name);
    h->data = NULL;
    h->queries = NULL;
    h->n_queries = 0;
    h->asked_name = NULL;
}

static void next_option(struct handshake *h)
{
    free_option(h);
    h->head_len = 0;
    h->state = STATE_OPTION_HEADER;
    h->want = HANDSHAKE_BYTES;
}

static void give_up(struct handshake *h)
{
    free_option(h);
    h->state = STATE_OVER;
    h->want = HANDSHAKE_CLOSE;
}

static void ack(struct handshake *h)
{
    put_reply(h, NBD_REP_ACK, 0);
    next_option(h);
}

/* Ends the option with an error and a sentence for a person. */
static void refuse(struct handshake *h, uint32_t type, const char *why)
{
    size_t len = strnlen(why, NBD_STRING_BYTES_MAX);
    put_text(put_reply(h, type, len), why, len);
    next_option(h);
}

/* --- strings ---------------------------------------------------------------------- */

/* Whether the bytes are UTF-8 (RFC 3629: shortest forms, no surrogates, up to U+10FFFF)
 * without NULs. */
static bool is_utf8(const uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len;) {
        uint8_t c = p[i];
        size_t more;
        uint32_t low, code;
        if (c == 0)
            return false;
        if (c < 0x80) {
            i++;
            continue;
        } else if (c >= 0xc2 && c <= 0xdf) {
            more = 1, low = 0x80, code = c & 0x1fu;
        } else if (c >= 0xe0 && c <= 0xef) {
            more = 2, low = 0x800, code = c & 0x0fu;
        } else if (c >= 0xf0 && c <= 0xf4) {
            more = 3, low = 0x10000, code = c & 0x07u;
        } else {
            return false;
        }
        if (len - i <= more)
            return false;
        for (size_t k = 1; k <= more; k++) {
            if ((p[i + k] & 0xc0) != 0x80)
                return false;
            code = code << 6 | (p[i + k] & 0x3fu);
        }
        if (code < low || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff))
            return false;
        i += more + 1;
    }
    return true;
}

static char *dup_bytes(const uint8_t *p, size_t len)
{
    char *s = mem_alloc(len + 1);
    memcpy(s, p, len);
    s[len] = '\0';
    return s;
}

/* What is wrong with an option: a reply type and a sentence. */
struct fault {
    uint32_t type; /* 0: nothing */
    const char *why;
};

static struct fault fault(uint32_t type, const char *why)
{
    return (struct fault){type, why};
}

/* Reads a length and that many bytes of a string at *at of the option's data. */
static struct fault take_string(const struct handshake *h, size_t *at, const uint8_t **text,
                                uint32_t *len)
{
    if (h->option_len - *at < 4)
        return fault(NBD_REP_ERR_INVALID, "the option's data ends before a length");
    *len = get_be32(h->data + *at);
    if (h->option_len - *at - 4 < *len)
        return fault(NBD_REP_ERR_INVALID, "a string is longer than the option's data");
    if (*len > NBD_STRING_BYTES_MAX)
        return fault(NBD_REP_ERR_TOO_BIG, "a string is longer than 4096 bytes");
    *text = h->data + *at + 4;
    *at += 4 + (size_t)*len;
    if (!is_utf8(*text, *len))
        return fault(NBD_REP_ERR_INVALID, "a string is not UTF-8");
    return fault(0, NULL);
}

/* --- questions to the owner ---------------------------------------------------------- */

static void ask_export(struct handshake *h, const uint8_t *name, size_t len)
{
    h->asked_name = dup_bytes(name, len);
    h->state = STATE_ASKED;
    h->want = HANDSHAKE_EXPORT;
}

static void forget_contexts(struct handshake *h)
{
    for (uint32_t i = 0; i < h->result.n_contexts; i++)
        free(h->result.contexts[i].name);
    h->result.n_contexts = 0;
    free(h->contexts_name);
    h->contexts_name = NULL;
}

uint16_t nbd_transmission_flags(bool read_only, bool structured, bool extended, bool contexts)
{
    unsigned flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA |
                     NBD_FLAG_SEND_CACHE | NBD_FLAG_CAN_MULTI_CONN;
    if (read_only)
        flags |= NBD_FLAG_READ_ONLY;
    else
        flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    if (structured || extended)
        flags |= NBD_FLAG_SEND_DF;
    if (extended && contexts)
        flags |= NBD_FLAG_BLOCK_STATUS_PAYLOAD;
    return (uint16_t)flags;
}

bool handshake_selected_for(const struct handshake *h, const char *name)
{
    return h->result.n_contexts && h->contexts_name && strcmp(h->contexts_name, name) == 0;
}

static uint16_t flags_for(const struct handshake *h, const struct nbd_export *export)
{
    /* Contexts set for another export don't count for this one. */
    return nbd_transmission_flags(export->read_only, h->result.structured, h->result.extended,
                                  handshake_selected_for(h, export->name));
}

static void enter_transmission(struct handshake *h, const struct nbd_export *export)
{
    h->result.flags = flags_for(h, export);
    if (h->contexts_name && strcmp(h->contexts_name, export->name) != 0)
        forget_contexts(h);
    h->result.name = mem_strdup(export->name);
    free_option(h);
    h->state = STATE_OVER;
    h->want = HANDSHAKE_READY;
}

/* --- the options ------------------------------------------------------------------------ */

static void answer_export_name(struct handshake *h, const struct nbd_export *export)
{
    size_t zeroes = h->no_zeroes ? 0 : NBD_EXPORT_NAME_ZEROES;
    uint8_t *p = out_room(h, 10 + zeroes);
    put_be64(p, export->size);
    put_be16(p + 8, flags_for(h, export));
    memset(p + 10, 0, zeroes);
    enter_transmission(h, export);
}

static void put_info_text(struct handshake *h, uint16_t type, const char *text)
{
    size_t len = strnlen(text, NBD_STRING_BYTES_MAX);
    uint8_t *p = put_reply(h, NBD_REP_INFO, 2 + len);
    put_be16(p, type);
    put_text(p + 2, text, len);
}

static void answer_info(struct handshake *h, const struct nbd_export *export)
{
    uint8_t *p = put_reply(h, NBD_REP_INFO, 12);
    put_be16(p, NBD_INFO_EXPORT);
    put_be64(p + 2, export->size);
    put_be16(p + 10, flags_for(h, export));

    /* Each at most once, however often it was asked for. */
    bool name = false, description = false, block_size = false;
    size_t at = 4 + (size_t)get_be32(h->data);
    uint16_t n = get_be16(h->data + at);
    for (uint16_t i = 0; i < n; i++) {
        uint16_t type = get_be16(h->data + at + 2 + 2 * (size_t)i);
        name |= type == NBD_INFO_NAME;
        description |= type == NBD_INFO_DESCRIPTION;
        block_size |= type == NBD_INFO_BLOCK_SIZE;
    }
    if (name)
        put_info_text(h, NBD_INFO_NAME, export->name);
    if (description && export->description[0])
        put_info_text(h, NBD_INFO_DESCRIPTION, export->description);
    if (block_size) {
        p = put_reply(h, NBD_REP_INFO, 14);
        put_be16(p, NBD_INFO_BLOCK_SIZE);
        put_be32(p + 2, NBD_BLOCK_SIZE_MIN);
        put_be32(p + 6, (uint32_t)max_u64(export->block_size, NBD_BLOCK_SIZE_PREFERRED_MIN));
        put_be32(p + 10, NBD_PAYLOAD_BYTES_MAX);
    }
    if (h->option == NBD_OPT_GO) {
        put_reply(h, NBD_REP_ACK, 0);
        enter_transmission(h, export);
    } else {
        ack(h);
    }
}

static void option_info(struct handshake *h)
{
    size_t at = 0;
    const uint8_t *name;
    uint32_t len;
    struct fault wrong = take_string(h, &at, &name, &len);
    if (wrong.type) {
        refuse(h, wrong.type, wrong.why);
        return;
    }
    if (h->option_len - at < 2 ||
        h->option_len - at != 2 + 2 * (size_t)get_be16(h->data + at)) {
        refuse(h, NBD_REP_ERR_INVALID, "the number of information requests does not fit");
        return;
    }
    ask_export(h, name, len);
}

/* --- metadata contexts ------------------------------------------------------------------- */

/* There may be many queries and many contexts, so the former are sorted. */
struct meta_query {
    const uint8_t *text;
    uint32_t len;
};

static int compare_texts(const uint8_t *a, size_t a_len, const uint8_t *b, size_t b_len)
{
    size_t len = min_u64(a_len, b_len);
    int c = len ? memcmp(a, b, len) : 0;
    return c ? c : a_len < b_len ? -1 : a_len > b_len;
}

static int compare_queries(const void *a, const void *b)
{
    const struct meta_query *x = a, *y = b;
    return compare_texts(x->text, x->len, y->text, y->len);
}

static bool has_query(const struct handshake *h, const char *text, size_t len)
{
    uint32_t low = 0, high = h->n_queries;
    while (low < high) {
        uint32_t at = (low + high) / 2;
        const struct meta_query *q = &h->queries[at];
        int c = compare_texts(q->text, q->len, (const uint8_t *)text, len);
        if (c == 0)
            return true;
        if (c < 0)
            low = at + 1;
        else
            high = at;
    }
    return false;
}

static bool is_listing(const struct handshake *h)
{
    return h->option == NBD_OPT_LIST_META_CONTEXT;
}

static bool asks_contexts(const struct handshake *h)
{
    return is_listing(h) || h->option == NBD_OPT_SET_META_CONTEXT;
}

/* Whether the client lists everything that begins with a part of `name` that ends with a colon
 * ("base:", "qemu:", "qemu:dirty-bitmap:"), or everything. */
static bool lists_part_of(const struct handshake *h, const char *name)
{
    if (!is_listing(h))
        return false;
    if (!h->n_queries)
        return true;
    for (const char *colon = strchr(name, ':'); colon; colon = strchr(colon + 1, ':'))
        if (has_query(h, name, (size_t)(colon + 1 - name)))
            return true;
    return false;
}

bool handshake_asks_for(const struct handshake *h, const char *context)
{
    CHECK(h->want == HANDSHAKE_EXPORT);
    return asks_contexts(h) &&
           (has_query(h, context, strlen(context)) || lists_part_of(h, context));
}

bool handshake_asks_below(const struct handshake *h, const char *prefix)
{
    size_t len = strlen(prefix);
    CHECK(h->want == HANDSHAKE_EXPORT);
    if (!asks_contexts(h) || lists_part_of(h, prefix))
        return asks_contexts(h);
    for (uint32_t i = 0; i < h->n_queries; i++)
        if (h->queries[i].len > len && memcmp(h->queries[i].text, prefix, len) == 0)
            return true;
    return false;
}

static void put_context(struct handshake *h, uint32_t id, const char *name)
{
    size_t len = strlen(name);
    uint8_t *p = put_reply(h, NBD_REP_META_CONTEXT, 4 + len);
    put_be32(p, id);
    put_text(p + 4, name, len);
}

static void answer_meta_context(struct handshake *h, const struct nbd_export *export)
{
    bool listing = is_listing(h);
    for (size_t i = 0; i < export->n_contexts; i++) {
        const char *name = export->contexts[i];
        if (!handshake_asks_for(h, name))
            continue;
        if (listing) {
            put_context(h, 0, name);
            continue;
        }
        if (h->result.n_contexts == HANDSHAKE_CONTEXTS_MAX) {
            forget_contexts(h);
            refuse(h, NBD_REP_ERR_TOO_BIG, "too many metadata contexts");
            return;
        }
        uint32_t id = h->result.n_contexts + 1;
        h->result.contexts[h->result.n_contexts].id = id;
        h->result.contexts[h->result.n_contexts].name = mem_strdup(name);
        h->result.n_contexts++;
        put_context(h, id, name);
    }
    if (!listing)
        h->contexts_name = mem_strdup(export->name);
    else if (export->identity && has_query(h, NBD_NAMESPACE_OURS, sizeof NBD_NAMESPACE_OURS - 1))
        put_context(h, 0, export->identity);
    ack(h);
}

/* Reads `n` queries at *at of the option's data. */
static struct fault take_queries(struct handshake *h, size_t *at, uint32_t n)
{
    struct fault wrong = fault(0, NULL);
    uint32_t keep = (uint32_t)min_u64(n, HANDSHAKE_QUERIES_MAX);
    h->queries = mem_alloc(keep * sizeof *h->queries);
    /* A number that the data cannot hold is found at its first missing query. */
    for (uint32_t i = 0; i < n && !wrong.type; i++) {
        struct meta_query q;
        wrong = take_string(h, at, &q.text, &q.len);
        if (!wrong.type && i >= HANDSHAKE_QUERIES_MAX)
            wrong = fault(NBD_REP_ERR_TOO_BIG, "too many queries");
        else if (!wrong.type)
            h->queries[h->n_queries++] = q;
    }
    return wrong;
}

static void option_meta_context(struct handshake *h)
{
    /* Whatever becomes of this one, the earlier selection is gone. */
    if (h->option == NBD_OPT_SET_META_CONTEXT)
        forget_contexts(h);
    if (!h->result.structured && !h->result.extended) {
        refuse(h, NBD_REP_ERR_INVALID, "metadata contexts need structured replies");
        return;
    }
    if (!h->data) {
        refuse(h, NBD_REP_ERR_TOO_BIG, "too much data for this option");
        return;
    }

    size_t at = 0;
    const uint8_t *name;
    uint32_t name_len;
    struct fault wrong = take_string(h, &at, &name, &name_len);
    if (!wrong.type && h->option_len - at < 4)
        wrong = fault(NBD_REP_ERR_INVALID, "the option's data ends before the number of queries");
    if (!wrong.type) {
        uint32_t n = get_be32(h->data + at);
        at += 4;
        wrong = take_queries(h, &at, n);
        if (!wrong.type && at != h->option_len)
            wrong = fault(NBD_REP_ERR_INVALID, "there is data behind the last query");
    }
    if (wrong.type) {
        refuse(h, wrong.type, wrong.why);
        return;
    }
    if (h->n_queries)
        qsort(h->queries, h->n_queries, sizeof *h->queries, compare_queries);
    ask_export(h, name, name_len);
}

static void option_starttls(struct handshake *h)
{
    if (h->option_len) {
        refuse(h, NBD_REP_ERR_INVALID, "STARTTLS takes no data");
    } else if (h->tls_mode == NBD_TLS_OFF) {
        refuse(h, NBD_REP_ERR_UNSUP, "this server has no TLS (it is started with serve --tls)");
    } else if (h->tls_active) {
        refuse(h, NBD_REP_ERR_INVALID, "TLS is in use already");
    } else {
        free_option(h);
        h->state = STATE_ASKED;
        h->want = HANDSHAKE_TLS;
    }
}

/* The answer to a STARTTLS that `more` bytes came along with. A client has to wait for the answer,
 * so these are a fault of its, or somebody on the way put them there. */
static void answer_starttls(struct handshake *h, size_t more)
{
    if (!more) {
        put_reply(h, NBD_REP_ACK, 0);
        return;
    }
    h->spoke_before_tls = true;
    refuse(h, NBD_REP_ERR_INVALID, "there is data behind STARTTLS, sent before its answer");
    give_up(h);
}

static void option_extended_headers(struct handshake *h)
{
    if (h->option_len) {
        refuse(h, NBD_REP_ERR_INVALID, "EXTENDED_HEADERS takes no data");
        return;
    }
    h->result.extended = true;
    ack(h);
}

static void option_structured_reply(struct handshake *h)
{
    if (h->option_len) {
        refuse(h, NBD_REP_ERR_INVALID, "STRUCTURED_REPLY takes no data");
    } else if (h->result.extended) {
        refuse(h, NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are agreed already");
    } else {
        h->result.structured = true;
        ack(h);
    }
}

static void option_list(struct handshake *h)
{
    if (h->option_len) {
        refuse(h, NBD_REP_ERR_INVALID, "LIST takes no data");
        return;
    }
    h->state = STATE_ASKED;
    h->want = HANDSHAKE_LIST;
}

static void option_export_name(struct handshake *h)
{
    /* There is no way to refuse but to close. */
    if (!h->data || h->option_len > NBD_STRING_BYTES_MAX || !is_utf8(h->data, h->option_len) ||
        h->result.extended) {
        give_up(h);
        return;
    }
    ask_export(h, h->data, h->option_len);
}

/* An option has arrived whole (h->data NULL: its data was too long to keep). */
static void run_option(struct handshake *h)
{
    if (h->option == NBD_OPT_ABORT) {
        put_reply(h, NBD_REP_ACK, 0);
        give_up(h);
        return;
    }
    bool needs_tls = h->tls_mode == NBD_TLS_REQUIRE && !h->tls_active;
    if (needs_tls && h->option != NBD_OPT_STARTTLS) {
        h->lacked_tls = true;
        if (h->option == NBD_OPT_EXPORT_NAME)
            give_up(h);
        else
            refuse(h, NBD_REP_ERR_TLS_REQD,
                   "this server requires TLS: connect with it (nbds:// instead of nbd://, or the "
                   "client's TLS option)");
        return;
    }
    /* Without fixed newstyle a client knows EXPORT_NAME only, and no replies to others. */
    if (!h->fixed && h->option != NBD_OPT_EXPORT_NAME) {
        give_up(h);
        return;
    }

    switch (h->option) {
    case NBD_OPT_EXPORT_NAME:
        option_export_name(h);
        break;
    case NBD_OPT_LIST:
        option_list(h);
        break;
    case NBD_OPT_STARTTLS:
        option_starttls(h);
        break;
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        if (h->data)
            option_info(h);
        else
            refuse(h, NBD_REP_ERR_TOO_BIG, "too much data for this option");
        break;
    case NBD_OPT_STRUCTURED_REPLY:
        option_structured_reply(h);
        break;
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        option_meta_context(h);
        break;
    case NBD_OPT_EXTENDED_HEADERS:
        option_extended_headers(h);
        break;
    default:
        refuse(h, NBD_REP_ERR_UNSUP, "unknown option");
        break;
    }
}

/* --- the machine ------------------------------------------------------------------------- */

static void client_flags(struct handshake *h)
{
    uint32_t flags = get_be32(h->head);
    if (flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)) {
        give_up(h);
        return;
    }
    h->fixed = flags & NBD_FLAG_C_FIXED_NEWSTYLE;
    h->no_zeroes = flags & NBD_FLAG_C_NO_ZEROES;
    next_option(h);
}

static void option_header(struct handshake *h)
{
    h->option = get_be32(h->head + 8);
    h->option_len = get_be32(h->head + 12);
    h->option_got = 0;
    if (get_be64(h->head) != NBD_OPTION_MAGIC || ++h->n_options > HANDSHAKE_OPTIONS_MAX) {
        give_up(h);
        return;
    }
    if (h->option_len > HANDSHAKE_SKIP_BYTES_MAX) {
        /* Too long even to read over. The client may see the reason before the end. */
        if (h->option != NBD_OPT_EXPORT_NAME)
            refuse(h, NBD_REP_ERR_TOO_BIG, "far too much data for an option");
        give_up(h);
        return;
    }
    if (h->option_len <= HANDSHAKE_OPTION_BYTES_MAX)
        h->data = mem_alloc(h->option_len);
    h->state = STATE_OPTION_DATA;
    if (h->option_len == 0)
        run_option(h);
}

/* Gathers `want` bytes in h->head. */
static size_t gather(struct handshake *h, uint32_t want, const uint8_t *data, size_t len)
{
    size_t n = min_u64(want - h->head_len, len);
    memcpy(h->head + h->head_len, data, n);
    h->head_len += (uint32_t)n;
    return n;
}

size_t handshake_feed(struct handshake *h, const uint8_t *data, size_t len)
{
    size_t used = 0;
    bool began = h->want == HANDSHAKE_BYTES;
    while (used < len && h->want == HANDSHAKE_BYTES) {
        const uint8_t *p = data + used;
        size_t left = len - used;
        switch ((enum state)h->state) {
        case STATE_CLIENT_FLAGS:
            used += gather(h, NBD_CLIENT_FLAGS_BYTES, p, left);
            if (h->head_len == NBD_CLIENT_FLAGS_BYTES)
                client_flags(h);
            break;
        case STATE_OPTION_HEADER:
            used += gather(h, NBD_OPTION_HEADER_BYTES, p, left);
            if (h->head_len == NBD_OPTION_HEADER_BYTES)
                option_header(h);
            break;
        case STATE_OPTION_DATA: {
            size_t n = min_u64(h->option_len - h->option_got, left);
            if (h->data)
                memcpy(h->data + h->option_got, p, n);
            h->option_got += (uint32_t)n;
            used += n;
            if (h->option_got == h->option_len)
                run_option(h);
            break;
        }
        case STATE_ASKED:
        case STATE_OVER:
            CHECK(!"a machine that wants bytes");
        }
    }
    if (began && h->want == HANDSHAKE_TLS)
        answer_starttls(h, len - used);
    if (h->want == HANDSHAKE_CLOSE)
        used = len;
    return used;
}

void handshake_init(struct handshake *h, enum nbd_tls_mode tls_mode)
{
    memset(h, 0, sizeof *h);
    h->tls_mode = tls_mode;
    h->state = STATE_CLIENT_FLAGS;
    h->want = HANDSHAKE_BYTES;
    uint8_t *p = out_room(h, NBD_GREETING_BYTES);
    put_be64(p, NBD_MAGIC);
    put_be64(p + 8, NBD_OPTION_MAGIC);
    put_be16(p + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
}

void handshake_free(struct handshake *h)
{
    free_option(h);
    forget_contexts(h);
    free(h->result.name);
    free(h->out);
    memset(h, 0, sizeof *h);
    h->state = STATE_OVER;
    h->want = HANDSHAKE_CLOSE;
}

const uint8_t *handshake_output(const struct handshake *h, size_t *len)
{
    *len = h->out_len - h->out_sent;
    return h->out ? h->out + h->out_sent : NULL;
}

void handshake_sent(struct handshake *h, size_t n)
{
    CHECK(n <= h->out_len - h->out_sent);
    h->out_sent += n;
    if (h->out_sent == h->out_len) {
        free(h->out);
        h->out = NULL;
        h->out_len = h->out_sent = h->out_cap = 0;
    }
}

bool handshake_list_item(struct handshake *h, const char *name, const char *description)
{
    CHECK(h->want == HANDSHAKE_LIST);
    if (h->out_len - h->out_sent > HANDSHAKE_OUTPUT_BYTES_SOFT)
        return false;
    size_t name_len = strnlen(name, NBD_STRING_BYTES_MAX);
    size_t description_len = strnlen(description, NBD_STRING_BYTES_MAX);
    uint8_t *p = put_reply(h, NBD_REP_SERVER, 4 + name_len + description_len);
    put_be32(p, (uint32_t)name_len);
    put_text(p + 4, name, name_len);
    put_text(p + 4 + name_len, description, description_len);
    return true;
}

static uint32_t reply_of(enum status st)
{
    switch (st) {
    case ST_NOTFOUND:
        return NBD_REP_ERR_UNKNOWN;
    case ST_SHUTDOWN:
        return NBD_REP_ERR_SHUTDOWN;
    default:
        return NBD_REP_ERR_POLICY;
    }
}

void handshake_list_done(struct handshake *h, enum status st, const char *why)
{
    CHECK(h->want == HANDSHAKE_LIST);
    if (st == ST_OK)
        ack(h);
    else
        refuse(h, reply_of(st), why);
}

const char *handshake_export_name(const struct handshake *h, bool *opens)
{
    CHECK(h->want == HANDSHAKE_EXPORT);
    *opens = h->option == NBD_OPT_GO || h->option == NBD_OPT_EXPORT_NAME;
    return h->asked_name;
}

void handshake_export(struct handshake *h, enum status st, const struct nbd_export *export,
                      const char *why)
{
    CHECK(h->want == HANDSHAKE_EXPORT);
    if (h->option == NBD_OPT_EXPORT_NAME) {
        if (st == ST_OK)
            answer_export_name(h, export);
        else
            give_up(h);
        return;
    }
    if (st != ST_OK) {
        refuse(h, reply_of(st), why);
        return;
    }
    if (h->option == NBD_OPT_INFO || h->option == NBD_OPT_GO)
        answer_info(h, export);
    else
        answer_meta_context(h, export);
}

void handshake_tls_started(struct handshake *h)
{
    CHECK(h->want == HANDSHAKE_TLS);
    h->tls_active = true;
    h->result.structured = h->result.extended = false;
    forget_contexts(h);
    next_option(h);
}

void handshake_shutdown(struct handshake *h)
{
    CHECK(h->want != HANDSHAKE_READY);
    /* A client that waits for an answer is told why it gets none. */
    if (h->state == STATE_ASKED && h->want != HANDSHAKE_TLS && h->option != NBD_OPT_EXPORT_NAME)
        refuse(h, NBD_REP_ERR_SHUTDOWN, "this server takes no clients any more");
    give_up(h);
}
