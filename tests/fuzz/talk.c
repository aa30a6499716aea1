/* A client's conversation, and its judge; talk.h says by what rules. */
#include "talk.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/mem.h"

#define PIECE_BYTES (4u << 20)
#define PAYLOAD_BYTES_MAX (32u << 20)
#define CONTEXTS 3u

enum { READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS };
enum { FUA = 1, NO_HOLE = 2, DF = 4, REQ_ONE = 8, FAST_ZERO = 16, PAYLOAD_LEN = 32 };
enum { EPERM = 1, EIO = 5, EINVAL = 22, ENOSPC = 28, EOVERFLOW = 75 };

struct talk_weather talk_weather;

static const char *const names[] = {"a", "b", "big", "a@s", "nothing"};
static const uint64_t sizes[] = {SERVED_A_BYTES, SERVED_B_BYTES, SERVED_BIG_BYTES, SERVED_A_BYTES,
                                 SERVED_A_BYTES};
static const char *const contexts[CONTEXTS] = {"base:allocation", "qemu:allocation-depth",
                                               "qemu:dirty-bitmap:s"};

/* A request that was sent, whole or not. */
struct asked {
    struct asked *next;
    uint64_t cookie; /* as it lies in memory */
    uint16_t command, flags;
    uint64_t offset, length;
    uint64_t payload, payload_got;
    uint32_t error; /* it must be refused with this; 0: it need not be */
    uint64_t begun;
    struct effect *effects[PAYLOAD_BYTES_MAX / PIECE_BYTES + 1];
    unsigned n_effects;
    uint64_t next_offset; /* READ: answered up to here */
    unsigned statuses, wanted; /* STATUS: contexts answered, and asked for */
};

struct bytes {
    uint8_t *data;
    size_t len, cap;
};

enum stage { GREETING, OPTIONS, SERVING };

struct talk {
    struct talk_config config;
    struct link *link;
    struct model *model; /* NULL: no export will be entered */
    enum stage stage;
    unsigned n_options, n_answered; /* of the handshake */
    bool chunks, extended, read_only;
    unsigned n_contexts;
    uint32_t ids[CONTEXTS]; /* of the contexts; 0: not selected */
    bool unjudged, doomed, left, reads, succeeded;
    struct bytes sent; /* not yet understood */
    struct bytes heard;
    struct asked *asked; /* not answered, newest first */
    uint64_t cookie;
};

/* --- bytes -------------------------------------------------------------------------------- */

static void put(struct bytes *b, const void *data, size_t len)
{
    mem_grow(&b->data, &b->cap, b->len + len, 1);
    if (len)
        memcpy(b->data + b->len, data, len);
    b->len += len;
}

static void put_n(struct bytes *b, uint64_t v, unsigned n)
{
    uint8_t p[8];
    put_be64(p, v);
    put(b, p + 8 - n, n);
}

static void put_text(struct bytes *b, const char *text)
{
    put_n(b, strlen(text), 4);
    put(b, text, strlen(text));
}

static void drop(struct bytes *b, size_t n)
{
    b->len -= n;
    if (b->len)
        memmove(b->data, b->data + n, b->len);
}

/* --- the handshake ------------------------------------------------------------------------ */

static void option(struct bytes *b, uint32_t number, const struct bytes *data)
{
    put(b, "IHAVEOPT", 8);
    put_n(b, number, 4);
    put_n(b, data->len, 4);
    put(b, data->data, data->len);
}

static void send_handshake(struct talk *t)
{
    const struct talk_config *c = &t->config;
    struct bytes b = {0}, none = {0}, data = {0};
    put_n(&b, 3, 4);
    if (c->how & TALK_STRUCTURED) {
        option(&b, 8, &none);
        t->n_options++;
    }
    if (c->how & TALK_EXTENDED) {
        option(&b, 11, &none);
        t->n_options++;
    }
    if (c->contexts) {
        put_text(&data, names[c->export]);
        put_n(&data, (uint64_t)__builtin_popcount(c->contexts), 4);
        for (unsigned i = 0; i < CONTEXTS; i++)
            if (c->contexts & 1u << i)
                put_text(&data, contexts[i]);
        option(&b, 10, &data);
        t->n_options++;
        data.len = 0;
    }
    if (c->how & TALK_BY_NAME) {
        put(&data, names[c->export], strlen(names[c->export]));
        option(&b, 1, &data);
    } else {
        put_text(&data, names[c->export]);
        put_n(&data, c->how & TALK_INFO ? 3 : 0, 2);
        for (unsigned i = 1; c->how & TALK_INFO && i <= 3; i++)
            put_n(&data, i, 2);
        option(&b, 7, &data);
    }
    t->n_options++;
    link_send(t->link, b.data, b.len);
    free(b.data);
    free(data.data);
}

struct talk *talk_open(const struct talk_config *config)
{
    struct link *link = link_open(config->host, config->is_tcp);
    if (!link)
        return NULL;
    struct talk *t = mem_zalloc(sizeof *t);
    t->config = *config;
    t->link = link;
    t->reads = true;
    t->extended = config->how & TALK_EXTENDED;
    t->chunks = t->extended || config->how & TALK_STRUCTURED;
    t->unjudged = config->raw;
    talk_weather.unmodelled |= config->raw;
    bool barred = t->extended && config->how & TALK_BY_NAME;
    if (!config->raw && !barred && config->export != TALK_NONE)
        t->model = &talk_weather.models[config->export];
    t->read_only = config->export == TALK_A_THEN;
    for (unsigned i = 0; i < CONTEXTS && t->chunks && t->model; i++)
        if (config->contexts & 1u << i && (i < 2 || config->export == TALK_A))
            t->n_contexts++;
    if (!config->raw)
        send_handshake(t);
    return t;
}

/* The server does not let it in: only the store can be the reason, or what was asked for. */
static void turned_away(struct talk *t)
{
    CHECK(!t->model || talk_weather.failing);
    t->unjudged = true;
}

static void hear_option(struct talk *t, uint32_t number, uint32_t type, const uint8_t *data,
                        uint32_t len)
{
    if (type & 0x80000000u) {
        t->n_answered++;
        if (number == 7)
            turned_away(t);
        else
            CHECK(number == 10 && (!t->chunks || !t->model || talk_weather.failing));
        if (number == 10 && t->model && t->chunks)
            t->unjudged = true;
    } else if (type == 1) {
        t->n_answered++;
        CHECK(len == 0);
        if (number == 7)
            t->stage = SERVING;
    } else if (type == 4) {
        CHECK(number == 10 && len > 4);
        for (unsigned i = 0; i < CONTEXTS; i++)
            if (strlen(contexts[i]) == len - 4 && memcmp(contexts[i], data + 4, len - 4) == 0)
                t->ids[i] = get_be32(data);
    } else {
        CHECK(type == 3 && number == 7);
        if (get_be16(data) == 0)
            CHECK(t->model && get_be64(data + 2) == t->model->size &&
                  !(get_be16(data + 10) & 2) == !t->read_only);
    }
}

/* Bytes used; 0: more are needed. */
static size_t hear_handshake(struct talk *t, const uint8_t *p, size_t len)
{
    if (t->stage == GREETING) {
        if (len < 18)
            return 0;
        CHECK(memcmp(p, "NBDMAGICIHAVEOPT\0\3", 18) == 0);
        t->stage = OPTIONS;
        return 18;
    }
    if (t->config.how & TALK_BY_NAME && t->n_answered + 1 == t->n_options) {
        if (len < 10)
            return 0;
        CHECK(t->model && get_be64(p) == t->model->size);
        t->stage = SERVING;
        return 10;
    }
    if (len < 20 || len - 20 < get_be32(p + 16))
        return 0;
    CHECK(get_be64(p) == 0x0003e889045565a9u && t->n_answered < t->n_options);
    hear_option(t, get_be32(p + 8), get_be32(p + 12), p + 20, get_be32(p + 16));
    return 20 + get_be32(p + 16);
}

/* --- what is sent ------------------------------------------------------------------------- */

static struct asked **find(struct talk *t, uint64_t cookie)
{
    for (struct asked **a = &t->asked; *a; a = &(*a)->next)
        if ((*a)->cookie == cookie)
            return a;
    return NULL;
}

static bool is_whole(const struct asked *a)
{
    return a->payload_got == a->payload;
}

static bool is_inside(const struct talk *t, const struct asked *a)
{
    return a->offset <= t->model->size && a->length <= t->model->size - a->offset;
}

/* What it must be refused with, whatever the state of the volume. */
static uint32_t refusal(const struct talk *t, const struct asked *a)
{
    unsigned flags = FUA;
    bool inside = is_inside(t, a), is_long = a->length > PAYLOAD_BYTES_MAX;
    switch (a->command) {
    case READ:
        flags |= t->chunks ? DF : 0;
        break;
    case WRITE:
        flags |= t->extended ? PAYLOAD_LEN : 0;
        break;
    case ZEROES:
        flags |= NO_HOLE | FAST_ZERO;
        break;
    case STATUS:
        flags |= REQ_ONE | (t->extended && t->n_contexts ? PAYLOAD_LEN : 0);
        break;
    }
    if (a->command > STATUS || a->flags & ~flags)
        return EINVAL;
    switch (a->command) {
    case READ:
        return !inside ? EINVAL : !is_long ? 0 : a->flags & DF ? EOVERFLOW : EINVAL;
    case WRITE:
        if (t->extended && !(a->flags & PAYLOAD_LEN))
            return EINVAL;
        return t->read_only ? EPERM : !inside ? ENOSPC : is_long ? EINVAL : 0;
    case ZEROES:
        return t->read_only ? EPERM : inside ? 0 : ENOSPC;
    case TRIM:
        return t->read_only ? EPERM : inside ? 0 : EINVAL;
    case FLUSH:
        return a->offset || a->length ? EINVAL : 0;
    case STATUS:
        if (!t->n_contexts)
            return EINVAL;
        if (a->flags & PAYLOAD_LEN)
            return a->payload < 12 || a->payload > 8 + 4 * t->n_contexts || a->payload % 4 ? EINVAL
                                                                                         : 0;
        return a->length && inside ? 0 : EINVAL;
    default:
        return inside ? 0 : EINVAL;
    }
}

/* The payload of a STATUS has come. */
static void read_wanted(struct talk *t, struct asked *a, const uint8_t *payload)
{
    a->length = get_be64(payload);
    a->wanted = 0;
    /* Whoever has not read the handshake does not know what to ask for. */
    if (t->stage != SERVING)
        t->unjudged = true;
    for (uint64_t at = 8; at < a->payload && !a->error; at += 4) {
        unsigned i = 0;
        while (i < CONTEXTS && (!t->ids[i] || t->ids[i] != get_be32(payload + at)))
            i++;
        if (i == CONTEXTS || a->wanted & 1u << i)
            a->error = EINVAL;
        else
            a->wanted |= 1u << i;
    }
    if (!a->length || !is_inside(t, a))
        a->error = EINVAL;
}

static void take_effect(struct talk *t, struct asked *a, uint64_t from, uint64_t len,
                        const uint8_t *data)
{
    CHECK(a->n_effects < sizeof a->effects / sizeof a->effects[0]);
    a->effects[a->n_effects++] = model_begin(t->model, a->offset + from, len, data);
}

/* Reads a header; false: there is none yet, or no more. */
static bool understand_header(struct talk *t)
{
    size_t head = t->extended ? 32 : 28;
    const uint8_t *p = t->sent.data;
    if (t->sent.len < head)
        return false;
    if (get_be32(p) != (t->extended ? 0x21e41c71u : 0x25609513u)) {
        t->doomed = true;
        return false;
    }
    struct asked *a = mem_zalloc(sizeof *a);
    a->flags = get_be16(p + 4);
    a->command = get_be16(p + 6);
    memcpy(&a->cookie, p + 8, 8);
    a->offset = a->next_offset = get_be64(p + 16);
    a->length = t->extended ? get_be64(p + 24) : get_be32(p + 24);
    if (t->extended ? a->flags & PAYLOAD_LEN : a->command == WRITE)
        a->payload = a->length;
    if (a->payload > (t->extended ? 1u : 2u) * (uint64_t)PAYLOAD_BYTES_MAX) {
        t->doomed = true;
        free(a);
        return false;
    }
    if (a->command == DISC) {
        t->left = true;
        free(a);
        return false;
    }
    a->error = refusal(t, a);
    a->begun = model_now();
    for (unsigned i = 0; i < CONTEXTS; i++)
        if (t->config.contexts & 1u << i && (i < 2 || t->config.export == TALK_A))
            a->wanted |= 1u << i;
    if (find(t, a->cookie))
        t->unjudged = true;
    a->next = t->asked;
    t->asked = a;
    drop(&t->sent, head);
    if (!a->error && a->length && (a->command == TRIM || a->command == ZEROES))
        take_effect(t, a, 0, a->length, NULL);
    return true;
}

/* Goes on with what was sent; false: no further. */
static bool understand(struct talk *t)
{
    struct asked *a = t->asked;
    if (!a || is_whole(a))
        return understand_header(t);
    uint64_t left = a->payload - a->payload_got;
    if (a->error) {
        uint64_t n = min_u64(left, t->sent.len);
        drop(&t->sent, n);
        a->payload_got += n;
        return n;
    }
    /* Longer writes take effect in pieces. */
    uint64_t n = min_u64(left, PIECE_BYTES);
    if (t->sent.len < n)
        return false;
    if (a->command == STATUS)
        read_wanted(t, a, t->sent.data);
    else
        take_effect(t, a, a->payload_got, n, t->sent.data);
    drop(&t->sent, n);
    a->payload_got += n;
    return true;
}

void talk_send(struct talk *t, const uint8_t *bytes, size_t len)
{
    if (!t->model || t->doomed || t->left) {
        link_send(t->link, bytes, len);
        return;
    }
    put(&t->sent, bytes, len);
    while (understand(t))
        continue;
    link_send(t->link, bytes, len);
}

size_t talk_header(struct talk *t, const struct talk_request *r, uint8_t out[32])
{
    put_be32(out, t->extended ? 0x21e41c71u : 0x25609513u);
    put_be16(out + 4, r->flags);
    put_be16(out + 6, r->command);
    put_be64(out + 8, ++t->cookie);
    put_be64(out + 16, r->offset);
    if (t->extended)
        put_be64(out + 24, r->length);
    else
        put_be32(out + 24, (uint32_t)r->length);
    return t->extended ? 32 : 28;
}

bool talk_has_payload(const struct talk *t, const struct talk_request *r)
{
    return t->extended ? r->flags & PAYLOAD_LEN : r->command == WRITE;
}

/* --- what is answered --------------------------------------------------------------------- */

static void forget(struct asked **at, bool happened)
{
    struct asked *a = *at;
    for (unsigned i = 0; i < a->n_effects; i++)
        model_end(a->effects[i], happened);
    *at = a->next;
    free(a);
}

static bool is_change(const struct asked *a)
{
    return a->command == WRITE || a->command == TRIM || a->command == ZEROES;
}

static bool may_fail(const struct asked *a, uint32_t error)
{
    switch (error) {
    case EIO:
        return talk_weather.failing;
    case ENOSPC:
        return talk_weather.full && (a->command == WRITE || a->command == ZEROES);
    case EPERM:
        return talk_weather.hosts && is_change(a);
    case EOVERFLOW:
        return a->command == READ && a->flags & DF && a->length > 64u << 10;
    default:
        return false;
    }
}

/* The final reply. */
static void over(struct talk *t, struct asked **at, uint32_t error)
{
    struct asked *a = *at;
    CHECK(is_whole(a));
    CHECK(a->error ? error == a->error : !error || may_fail(a, error));
    if (!error && a->command == READ)
        CHECK(a->next_offset == a->offset + a->length);
    if (!error && a->command == STATUS)
        CHECK(a->statuses == a->wanted);
    t->succeeded = !error;
    /* A trim is advice: where there is no space for it, blocks it covers in part stay as they
     * are. */
    forget(at, !error && !(a->command == TRIM && talk_weather.full));
}

static void judge(const struct talk *t, const struct asked *a, uint64_t offset, uint64_t len,
                  const uint8_t *data)
{
    if (talk_weather.unmodelled || model_allows(t->model, offset, len, data, a->begun))
        return;
    model_explain(t->model, offset, len, data, a->begun);
    CHECK(!"contents as the model allows");
}

/* A part of a READ; NULL: zeros. */
static void hear_data(struct talk *t, struct asked *a, uint64_t offset, uint64_t len,
                      const uint8_t *data)
{
    CHECK(a->command == READ && !a->error && len && offset == a->next_offset &&
          len <= a->offset + a->length - offset);
    judge(t, a, offset, len, data);
    a->next_offset += len;
}

static void hear_extents(struct talk *t, struct asked *a, uint32_t id, const uint8_t *p, size_t n)
{
    size_t size = t->extended ? 16 : 8;
    unsigned context = 0;
    uint64_t at = a->offset, end = a->offset + a->length;
    CHECK(a->command == STATUS && !a->error && id);
    while (context < CONTEXTS && t->ids[context] != id)
        context++;
    CHECK(context < CONTEXTS && a->wanted & 1u << context && !(a->statuses & 1u << context));
    a->statuses |= 1u << context;
    CHECK(n >= 1 && n <= (a->flags & REQ_ONE ? 1 : 1u << 20));
    for (size_t i = 0; i < n; i++, p += size) {
        uint64_t len = t->extended ? get_be64(p) : get_be32(p);
        uint64_t flags = t->extended ? get_be64(p + 8) : get_be32(p + 4);
        CHECK(len && len <= end - at);
        if (context == 0) {
            CHECK(flags <= 3);
            if (flags & 2)
                judge(t, a, at, len, NULL);
        } else if (context == 2) {
            CHECK(flags <= 1);
            if (!flags)
                judge(t, a, at, len, served_a_then + at);
        }
        at += len;
    }
}

static void hear_chunk(struct talk *t, struct asked **at, unsigned flags, unsigned type,
                       const uint8_t *p, uint64_t len)
{
    struct asked *a = *at;
    bool done = flags & 1;
    CHECK(flags <= 1);
    CHECK(t->extended || a->command == READ || a->command == STATUS || type & 0x8000);
    uint32_t error = 0;
    switch (type) {
    case 0:
        CHECK(len == 0 && done);
        break;
    case 1:
        CHECK(len > 8);
        hear_data(t, a, get_be64(p), len - 8, p + 8);
        CHECK(!(a->flags & DF) || done);
        break;
    case 2:
        CHECK(len == 12);
        hear_data(t, a, get_be64(p), get_be32(p + 8), NULL);
        CHECK(!(a->flags & DF) || done);
        break;
    case 5:
        CHECK(!t->extended && len >= 12 && (len - 4) % 8 == 0);
        hear_extents(t, a, get_be32(p), p + 4, (len - 4) / 8);
        break;
    case 6:
        CHECK(t->extended && len >= 24 && (len - 8) % 16 == 0);
        CHECK(get_be32(p + 4) == (len - 8) / 16);
        hear_extents(t, a, get_be32(p), p + 8, (len - 8) / 16);
        break;
    default:
        CHECK(type == 0x8001 || type == 0x8002);
        CHECK(len >= 6 && get_be16(p + 4) + (type == 0x8002 ? 14u : 6u) == len);
        error = get_be32(p);
        CHECK(error && done);
        if (type == 0x8002) {
            uint64_t where = get_be64(p + len - 8);
            CHECK(a->command == READ && where >= a->offset && where < a->offset + a->length);
        }
        break;
    }
    if (done)
        over(t, at, error);
}

/* Bytes used; 0: more are needed. */
static size_t hear_reply(struct talk *t, const uint8_t *p, size_t len)
{
    uint64_t cookie;
    if (len < 16)
        return 0;
    memcpy(&cookie, p + 8, 8);
    struct asked **at = find(t, cookie);
    CHECK(at);
    struct asked *a = *at;
    if (get_be32(p) == 0x67446698u) {
        CHECK(!t->extended && (!t->chunks || a->command != READ));
        uint32_t error = get_be32(p + 4);
        uint64_t data = a->command == READ && !error ? a->length : 0;
        CHECK(!t->chunks || !error);
        if (len - 16 < data)
            return 0;
        if (data)
            hear_data(t, a, a->offset, data, p + 16);
        over(t, at, error);
        return 16 + data;
    }
    size_t head = t->extended ? 32 : 20;
    CHECK(t->chunks && get_be32(p) == (t->extended ? 0x6e8a278cu : 0x668e33efu));
    if (len < head)
        return 0;
    uint64_t more = t->extended ? get_be64(p + 24) : get_be32(p + 16);
    CHECK(more <= (PAYLOAD_BYTES_MAX) + 8u);
    if (t->extended)
        CHECK(get_be64(p + 16) == a->offset);
    if (len - head < more)
        return 0;
    hear_chunk(t, at, get_be16(p + 4), get_be16(p + 6), p + head, more);
    return head + more;
}

void talk_hear(struct talk *t)
{
    size_t n, used = 0, len;
    if (!t->reads)
        return;
    const uint8_t *p = link_received(t->link, &n);
    put(&t->heard, p, n);
    link_took(t->link, n);
    talk_weather.received += n;
    while (!t->unjudged && used < t->heard.len) {
        if (t->stage == SERVING)
            len = hear_reply(t, t->heard.data + used, t->heard.len - used);
        else
            len = hear_handshake(t, t->heard.data + used, t->heard.len - used);
        if (!len)
            break;
        used += len;
    }
    /* An end may come in the middle of a reply. */
    drop(&t->heard, t->unjudged || talk_is_closed(t) ? t->heard.len : used);
    if (talk_is_closed(t))
        while (t->asked)
            forget(&t->asked, false);
}

void talk_set_reading(struct talk *t, bool on)
{
    t->reads = on;
}

void talk_end(struct talk *t, bool reset)
{
    link_end(t->link, reset);
}

void talk_free(struct talk *t)
{
    CHECK(talk_is_closed(t));
    while (t->asked)
        forget(&t->asked, false);
    link_free(t->link);
    free(t->sent.data);
    free(t->heard.data);
    free(t);
}

bool talk_is_serving(const struct talk *t)
{
    return t->stage == SERVING && !talk_is_closed(t);
}

bool talk_is_closed(const struct talk *t)
{
    return link_is_closed(t->link);
}

bool talk_must_end(const struct talk *t)
{
    return !t->model || t->doomed || t->left;
}

bool talk_is_judged(const struct talk *t)
{
    return !t->unjudged;
}

unsigned talk_unanswered(const struct talk *t)
{
    unsigned n = 0;
    for (const struct asked *a = t->asked; a; a = a->next)
        n += is_whole(a);
    return n;
}

bool talk_succeeded(const struct talk *t)
{
    return t->succeeded;
}

uint64_t talk_size(const struct talk *t)
{
    return sizes[t->config.export];
}

struct link *talk_link(struct talk *t)
{
    return t->link;
}
