/* The handshake machine, line by line of checklist A. Each conversation is fed whole, then
 * byte by byte, and must give the same answer. */
#include "test.h"

#include <stdio.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "nbd/handshake.h"
#include "nbd/proto.h"

/* A client's bytes. */
struct script {
    uint8_t bytes[400000];
    size_t len;
};

static struct script in;

static void raw(const void *p, size_t n)
{
    assert_true(in.len + n <= sizeof in.bytes);
    if (n)
        memcpy(in.bytes + in.len, p, n);
    in.len += n;
}

static void u16(uint16_t v)
{
    uint8_t p[2];
    put_be16(p, v);
    raw(p, 2);
}

static void u32(uint32_t v)
{
    uint8_t p[4];
    put_be32(p, v);
    raw(p, 4);
}

static void text(const char *s)
{
    u32((uint32_t)strlen(s));
    raw(s, strlen(s));
}

static void begin(uint32_t client_flags)
{
    in.len = 0;
    u32(client_flags);
}

static void option(uint32_t number, uint32_t len)
{
    uint8_t p[8];
    put_be64(p, NBD_OPTION_MAGIC);
    raw(p, 8);
    u32(number);
    u32(len);
}

static void go(uint32_t number, const char *name, uint16_t n_infos, const uint16_t *infos)
{
    option(number, (uint32_t)(4 + strlen(name) + 2 + 2 * n_infos));
    text(name);
    u16(n_infos);
    for (uint16_t i = 0; i < n_infos; i++)
        u16(infos[i]);
}

static void meta_all(uint32_t number, const char *name, uint32_t n, const char *const *queries)
{
    size_t len = 4 + strlen(name) + 4;
    for (uint32_t i = 0; i < n; i++)
        len += 4 + strlen(queries[i]);
    option(number, (uint32_t)len);
    text(name);
    u32(n);
    for (uint32_t i = 0; i < n; i++)
        text(queries[i]);
}

static void meta(uint32_t number, const char *name, const char *query)
{
    meta_all(number, name, query ? 1 : 0, &query);
}

/* What the server said, and where it ended. */
struct outcome {
    uint8_t bytes[1 << 20];
    size_t len, at;
    size_t used;
    enum handshake_want want;
    bool structured, extended;
    uint16_t flags;
    uint32_t n_contexts;
    char name[300];
};

static enum nbd_tls_mode tls_mode;
static bool read_only;

static void drain(struct handshake *h, struct outcome *o)
{
    size_t n;
    const uint8_t *p = handshake_output(h, &n);
    assert_true(o->len + n <= sizeof o->bytes);
    if (n)
        memcpy(o->bytes + o->len, p, n);
    o->len += n;
    handshake_sent(h, n);
}

/* An owner with two exports, "disk" (the default) and "other". */
static void answer(struct handshake *h, struct outcome *o)
{
    static const char *const contexts[] = {"base:allocation", "qemu:allocation-depth",
                                           "qemu:dirty-bitmap:monday"};
    if (h->want == HANDSHAKE_LIST) {
        assert_true(handshake_list_item(h, "disk", "a disk"));
        assert_true(handshake_list_item(h, "other", ""));
        handshake_list_done(h, ST_OK, NULL);
    } else if (h->want == HANDSHAKE_EXPORT) {
        bool opens;
        const char *name = handshake_export_name(h, &opens);
        struct nbd_export e = {.name = "disk",
                               .description = "a disk",
                               .size = 1 << 20,
                               .block_size = 16384,
                               .read_only = read_only,
                               .contexts = contexts,
                               .n_contexts = 3,
                               .identity = "fdb-nbd:volume:7"};
        if (strcmp(name, "other") == 0) {
            e.name = "other";
            e.description = "";
        } else if (strcmp(name, "") != 0 && strcmp(name, "disk") != 0) {
            handshake_export(h, ST_NOTFOUND, NULL, "no such export");
            return;
        }
        handshake_export(h, ST_OK, &e, NULL);
    } else if (h->want == HANDSHAKE_TLS) {
        drain(h, o);
        handshake_tls_started(h);
    }
}

static void converse_in_steps(struct outcome *o, size_t step)
{
    struct handshake h;
    handshake_init(&h, tls_mode);
    o->len = o->at = 0;
    size_t at = 0;
    while (h.want != HANDSHAKE_READY && h.want != HANDSHAKE_CLOSE && at < in.len) {
        size_t n = min_u64(step, in.len - at);
        size_t used = handshake_feed(&h, in.bytes + at, n);
        assert_true(used <= n);
        at += used;
        drain(&h, o);
        while (h.want != HANDSHAKE_BYTES && h.want != HANDSHAKE_READY &&
               h.want != HANDSHAKE_CLOSE)
            answer(&h, o);
        drain(&h, o);
    }
    o->used = at;
    o->want = h.want;
    o->structured = h.result.structured;
    o->extended = h.result.extended;
    o->flags = h.result.flags;
    o->n_contexts = h.result.n_contexts;
    snprintf(o->name, sizeof o->name, "%s", h.result.name ? h.result.name : "");
    handshake_free(&h);
}

static struct outcome out, again;

static void converse(void)
{
    converse_in_steps(&out, in.len);
    /* At the end, bytes fed together are swallowed on purpose. */
    static const size_t steps[] = {1, 2, 3, 7, 16, 17};
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        converse_in_steps(&again, steps[i]);
        assert_int_equal(again.want, out.want);
        assert_int_equal(again.len, out.len);
        assert_memory_equal(again.bytes, out.bytes, out.len);
        assert_string_equal(again.name, out.name);
    }
    assert_true(out.len >= 18);
    assert_true(get_be64(out.bytes) == NBD_MAGIC && get_be64(out.bytes + 8) == NBD_OPTION_MAGIC);
    assert_int_equal(get_be16(out.bytes + 16), 3);
    out.at = 18;
}

/* Takes the next option reply; returns its data. */
static const uint8_t *reply(uint32_t number, uint32_t type, uint32_t *len)
{
    assert_true(out.len - out.at >= 20);
    const uint8_t *p = out.bytes + out.at;
    assert_true(get_be64(p) == NBD_OPTION_REPLY_MAGIC);
    assert_int_equal(get_be32(p + 8), number);
    assert_int_equal(get_be32(p + 12), type);
    uint32_t n = get_be32(p + 16);
    assert_true(out.len - out.at - 20 >= n);
    out.at += 20 + n;
    if (len)
        *len = n;
    else if (type == NBD_REP_ACK)
        assert_int_equal(n, 0);
    return p + 20;
}

static void nothing_more(enum handshake_want want)
{
    assert_int_equal(out.at, out.len);
    assert_int_equal(out.want, want);
}

static int setup(void **state)
{
    (void)state;
    tls_mode = NBD_TLS_OFF;
    read_only = false;
    return 0;
}

static void unknown_client_flags_close(void **state) /* A.1 */
{
    (void)state;
    for (unsigned bit = 2; bit < 32; bit++) {
        begin(1u << bit | 3);
        option(NBD_OPT_LIST, 0);
        converse();
        nothing_more(HANDSHAKE_CLOSE);
    }
}

static void unknown_options_keep_in_step(void **state) /* A.2 */
{
    (void)state;
    static const uint32_t lengths[] = {0, 1, 100, 65536, 65537, 200000};
    static const uint8_t junk[200000];
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        begin(3);
        option(99, lengths[i]);
        raw(junk, lengths[i]);
        option(4, 0);
        option(NBD_OPT_ABORT, 0);
        converse();
        reply(99, NBD_REP_ERR_UNSUP, NULL);
        reply(4, NBD_REP_ERR_UNSUP, NULL);
        reply(NBD_OPT_ABORT, NBD_REP_ACK, NULL);
        nothing_more(HANDSHAKE_CLOSE);
    }
}

static void inner_lengths(void **state) /* A.3 */
{
    (void)state;
    static const uint32_t numbers[] = {NBD_OPT_GO, NBD_OPT_INFO, NBD_OPT_SET_META_CONTEXT,
                                       NBD_OPT_LIST_META_CONTEXT};
    for (size_t i = 0; i < 4; i++) {
        for (uint32_t len = 0; len < 40; len++) {
            static const uint32_t name_lengths[] = {0xffffffff, 0xfffffffb, 4097, 41, 40};
            for (size_t k = 0; k < 5; k++) {
                begin(3);
                option(NBD_OPT_STRUCTURED_REPLY, 0);
                option(numbers[i], len);
                for (uint32_t b = 0; b < len; b++) {
                    uint8_t c = (uint8_t)(b < 4 ? name_lengths[k] >> (24 - 8 * b) : 'a');
                    raw(&c, 1);
                }
                option(99, 0);
                converse_in_steps(&out, in.len);
                out.at = 18;
                reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
                reply(numbers[i], NBD_REP_ERR_INVALID, NULL);
                reply(99, NBD_REP_ERR_UNSUP, NULL);
                nothing_more(HANDSHAKE_BYTES);
            }
        }
    }
}

static void long_names(void **state) /* A.3 */
{
    (void)state;
    static const uint32_t lengths[] = {257, 4096, 4097, 60000};
    for (size_t i = 0; i < 4; i++) {
        char *name = mem_zalloc(lengths[i] + 1);
        memset(name, 'n', lengths[i]);
        begin(3);
        go(NBD_OPT_GO, name, 0, NULL);
        go(NBD_OPT_INFO, name, 0, NULL);
        option(NBD_OPT_EXPORT_NAME, lengths[i]);
        raw(name, lengths[i]);
        converse();
        uint32_t type = lengths[i] <= 4096 ? NBD_REP_ERR_UNKNOWN : NBD_REP_ERR_TOO_BIG;
        reply(NBD_OPT_GO, type, NULL);
        reply(NBD_OPT_INFO, type, NULL);
        nothing_more(HANDSHAKE_CLOSE);
        free(name);
    }
}

static void names_are_utf8(void **state) /* A.3 */
{
    (void)state;
    static const char *const bad[] = {"\xff",         "\xc0\x80",     "a\x80",     "\xe2\x82",
                                      "\xed\xa0\x80", "\xf5\x80\x80\x80", "\xe0\x80\x80",
                                      "\xf0\x80\x80\x80", "\xc3" "a"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        begin(3);
        go(NBD_OPT_GO, bad[i], 0, NULL);
        converse();
        reply(NBD_OPT_GO, NBD_REP_ERR_INVALID, NULL);
        nothing_more(HANDSHAKE_BYTES);

        begin(3);
        option(NBD_OPT_EXPORT_NAME, (uint32_t)strlen(bad[i]));
        raw(bad[i], strlen(bad[i]));
        converse();
        nothing_more(HANDSHAKE_CLOSE);
    }
    begin(3);
    option(NBD_OPT_GO, 4 + 3 + 2);
    u32(3);
    raw("a\0b", 3);
    u16(0);
    go(NBD_OPT_GO, "gr\xc3\xbc\xc3\x9f \xe2\x82\xac \xf0\x9f\x90\xa7", 0, NULL);
    converse();
    reply(NBD_OPT_GO, NBD_REP_ERR_INVALID, NULL);
    reply(NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, NULL);
    nothing_more(HANDSHAKE_BYTES);
}

static void enormous_options_close(void **state) /* A.3 */
{
    (void)state;
    static const uint32_t numbers[] = {NBD_OPT_EXPORT_NAME, NBD_OPT_GO, NBD_OPT_LIST, 77};
    for (size_t i = 0; i < 4; i++) {
        begin(3);
        option(numbers[i], 0xffffffff);
        converse();
        if (numbers[i] != NBD_OPT_EXPORT_NAME)
            reply(numbers[i], NBD_REP_ERR_TOO_BIG, NULL);
        nothing_more(HANDSHAKE_CLOSE);
    }
}

static void wrong_magic_closes(void **state)
{
    (void)state;
    begin(3);
    raw("GET / HTTP/1.1\r\n\r\n", 18);
    converse();
    nothing_more(HANDSHAKE_CLOSE);
}

static void too_many_options_close(void **state)
{
    (void)state;
    begin(3);
    for (uint32_t i = 0; i <= HANDSHAKE_OPTIONS_MAX; i++)
        option(99, 0);
    converse_in_steps(&out, 1000);
    out.at = 18;
    for (uint32_t i = 0; i < HANDSHAKE_OPTIONS_MAX; i++)
        reply(99, NBD_REP_ERR_UNSUP, NULL);
    nothing_more(HANDSHAKE_CLOSE);
}

static void export_name(void **state) /* A.4, A.6 */
{
    (void)state;
    for (uint32_t flags = 0; flags < 4; flags++) {
        begin(flags);
        option(NBD_OPT_EXPORT_NAME, 4);
        raw("disk", 4);
        converse();
        size_t zeroes = flags & 2 ? 0 : 124;
        assert_int_equal(out.len - out.at, 10 + zeroes);
        assert_true(get_be64(out.bytes + out.at) == 1 << 20);
        assert_int_equal(get_be16(out.bytes + out.at + 8), out.flags);
        for (size_t i = 0; i < zeroes; i++)
            assert_int_equal(out.bytes[out.at + 10 + i], 0);
        assert_int_equal(out.want, HANDSHAKE_READY);
        assert_string_equal(out.name, "disk");
    }
    begin(3);
    option(NBD_OPT_EXPORT_NAME, 0);
    converse();
    assert_string_equal(out.name, "disk");

    begin(3);
    option(NBD_OPT_EXPORT_NAME, 7);
    raw("nothing", 7);
    converse();
    nothing_more(HANDSHAKE_CLOSE);

    /* Without fixed newstyle there is no other option. */
    begin(0);
    option(NBD_OPT_LIST, 0);
    converse();
    nothing_more(HANDSHAKE_CLOSE);
}

static void options_without_data(void **state) /* A.5 */
{
    (void)state;
    static const uint32_t numbers[] = {NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY,
                                       NBD_OPT_EXTENDED_HEADERS};
    static const uint8_t junk[70000];
    for (size_t i = 0; i < 4; i++) {
        static const uint32_t lengths[] = {1, 70000};
        for (size_t k = 0; k < 2; k++) {
            begin(3);
            option(numbers[i], lengths[k]);
            raw(junk, lengths[k]);
            option(NBD_OPT_ABORT, 5);
            raw("hello", 5);
            converse();
            reply(numbers[i], NBD_REP_ERR_INVALID, NULL);
            reply(NBD_OPT_ABORT, NBD_REP_ACK, NULL);
            nothing_more(HANDSHAKE_CLOSE);
            assert_false(out.structured || out.extended);
        }
    }
}

static void list(void **state)
{
    (void)state;
    begin(3);
    option(NBD_OPT_LIST, 0);
    converse();
    uint32_t len;
    const uint8_t *p = reply(NBD_OPT_LIST, NBD_REP_SERVER, &len);
    assert_int_equal(len, 14);
    assert_int_equal(get_be32(p), 4);
    assert_memory_equal(p + 4, "diska disk", 10);
    p = reply(NBD_OPT_LIST, NBD_REP_SERVER, &len);
    assert_int_equal(len, 9);
    assert_memory_equal(p + 4, "other", 5);
    reply(NBD_OPT_LIST, NBD_REP_ACK, NULL);
    nothing_more(HANDSHAKE_BYTES);
}

static void long_lists_wait(void **state)
{
    (void)state;
    struct handshake h;
    handshake_init(&h, NBD_TLS_OFF);
    begin(3);
    option(NBD_OPT_LIST, 0);
    handshake_sent(&h, 18);
    assert_int_equal(handshake_feed(&h, in.bytes, in.len), in.len);
    size_t total = 0, waits = 0;
    for (unsigned i = 0; i < 100000; i++) {
        while (!handshake_list_item(&h, "some-volume-name", "with a description")) {
            size_t n;
            handshake_output(&h, &n);
            assert_true(n < HANDSHAKE_OUTPUT_BYTES_SOFT + 8192);
            handshake_sent(&h, n);
            total += n;
            waits++;
        }
    }
    handshake_list_done(&h, ST_OK, NULL);
    size_t n;
    handshake_output(&h, &n);
    assert_int_equal(total + n, 100000 * (20 + 4 + 16 + 18) + 20);
    assert_true(waits > 10);
    handshake_free(&h);
}

static void info_then_go(void **state) /* A.6, A.7 */
{
    (void)state;
    static const uint16_t infos[] = {NBD_INFO_BLOCK_SIZE, 77, NBD_INFO_NAME, NBD_INFO_DESCRIPTION,
                                     NBD_INFO_EXPORT, NBD_INFO_NAME};
    begin(1);
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    go(NBD_OPT_GO, "nothing", 0, NULL);
    go(NBD_OPT_INFO, "", 6, infos);
    go(NBD_OPT_GO, "", 6, infos);
    raw("first request", 13);
    converse();
    reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    reply(NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, NULL);
    size_t start = out.at;
    for (int k = 0; k < 2; k++) {
        uint32_t number = k ? NBD_OPT_GO : NBD_OPT_INFO;
        uint32_t len;
        const uint8_t *p = reply(number, NBD_REP_INFO, &len);
        assert_int_equal(len, 12);
        assert_int_equal(get_be16(p), NBD_INFO_EXPORT);
        assert_true(get_be64(p + 2) == 1 << 20);
        assert_int_equal(get_be16(p + 10), out.flags);
        p = reply(number, NBD_REP_INFO, &len);
        assert_int_equal(get_be16(p), NBD_INFO_NAME);
        assert_memory_equal(p + 2, "disk", 4);
        p = reply(number, NBD_REP_INFO, &len);
        assert_int_equal(get_be16(p), NBD_INFO_DESCRIPTION);
        p = reply(number, NBD_REP_INFO, &len);
        assert_int_equal(len, 14);
        assert_int_equal(get_be32(p + 2), 1);
        assert_int_equal(get_be32(p + 6), 16384);
        assert_int_equal(get_be32(p + 10), 32 << 20);
        reply(number, NBD_REP_ACK, NULL);
    }
    nothing_more(HANDSHAKE_READY);
    assert_int_equal((out.len - start) % 2, 0);
    assert_true(out.structured);
    /* What follows a GO is not the handshake's. */
    assert_int_equal(out.used, in.len - 13);
}

static void starttls_unconfigured(void **state) /* A.5 */
{
    (void)state;
    begin(3);
    option(NBD_OPT_STARTTLS, 0);
    option(NBD_OPT_STARTTLS, 1);
    raw("x", 1);
    converse();
    reply(NBD_OPT_STARTTLS, NBD_REP_ERR_UNSUP, NULL);
    reply(NBD_OPT_STARTTLS, NBD_REP_ERR_INVALID, NULL);
    nothing_more(HANDSHAKE_BYTES);
}

static void starttls_forgets(void **state) /* A.8 */
{
    (void)state;
    struct handshake h;
    handshake_init(&h, NBD_TLS_ON);
    static struct outcome o;
    o.len = 0;
    begin(3);
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:allocation");
    size_t at = 0;
    while (at < in.len) {
        at += handshake_feed(&h, in.bytes + at, in.len - at);
        answer(&h, &o);
    }
    assert_int_equal(h.result.n_contexts, 1);
    in.len = 0;
    option(NBD_OPT_STARTTLS, 0);
    assert_int_equal(handshake_feed(&h, in.bytes, in.len), in.len);
    assert_int_equal(h.want, HANDSHAKE_TLS);
    answer(&h, &o);
    assert_true(o.len >= 20);
    assert_int_equal(get_be32(o.bytes + o.len - 20 + 8), NBD_OPT_STARTTLS);
    assert_int_equal(get_be32(o.bytes + o.len - 20 + 12), NBD_REP_ACK);
    assert_false(h.result.structured);
    assert_int_equal(h.result.n_contexts, 0);

    o.len = 0;
    in.len = 0;
    option(NBD_OPT_STARTTLS, 0);
    assert_int_equal(handshake_feed(&h, in.bytes, in.len), in.len);
    drain(&h, &o);
    assert_int_equal(get_be32(o.bytes + 12), NBD_REP_ERR_INVALID);
    handshake_free(&h);
}

static void data_behind_starttls_closes(void **state) /* A.8 */
{
    (void)state;
    for (size_t n = 1; n <= 16; n++) {
        struct handshake h;
        static struct outcome o;
        o.len = 0;
        handshake_init(&h, NBD_TLS_ON);
        begin(3);
        option(NBD_OPT_STARTTLS, 0);
        size_t len = in.len;
        option(NBD_OPT_STRUCTURED_REPLY, 0); /* or a part of it */
        assert_int_equal(handshake_feed(&h, in.bytes, len + n), len + n);
        assert_int_equal(h.want, HANDSHAKE_CLOSE);
        assert_true(h.spoke_before_tls && !h.result.structured);
        drain(&h, &o);
        assert_int_equal(get_be32(o.bytes + 18 + 12), NBD_REP_ERR_INVALID);
        handshake_free(&h);
    }
}

static void tls_required(void **state) /* A.9 */
{
    (void)state;
    tls_mode = NBD_TLS_REQUIRE;
    begin(3);
    option(NBD_OPT_LIST, 0);
    go(NBD_OPT_GO, "disk", 0, NULL);
    option(1234, 3);
    raw("abc", 3);
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    option(NBD_OPT_ABORT, 0);
    converse();
    reply(NBD_OPT_LIST, NBD_REP_ERR_TLS_REQD, NULL);
    reply(NBD_OPT_GO, NBD_REP_ERR_TLS_REQD, NULL);
    reply(1234, NBD_REP_ERR_TLS_REQD, NULL);
    reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_TLS_REQD, NULL);
    reply(NBD_OPT_ABORT, NBD_REP_ACK, NULL);
    nothing_more(HANDSHAKE_CLOSE);

    begin(3);
    option(NBD_OPT_EXPORT_NAME, 4);
    raw("disk", 4);
    converse();
    nothing_more(HANDSHAKE_CLOSE);

    struct handshake h;
    static struct outcome o;
    o.len = 0;
    handshake_init(&h, NBD_TLS_REQUIRE);
    begin(3);
    option(NBD_OPT_STARTTLS, 0);
    handshake_feed(&h, in.bytes, in.len);
    answer(&h, &o);
    o.len = 0;
    in.len = 0;
    option(999, 0);
    handshake_feed(&h, in.bytes, in.len);
    drain(&h, &o);
    assert_int_equal(get_be32(o.bytes + 12), NBD_REP_ERR_UNSUP);
    handshake_free(&h);
}

static void meta_contexts(void **state) /* A.10 */
{
    (void)state;
    begin(3);
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:allocation");
    meta(NBD_OPT_LIST_META_CONTEXT, "disk", "base:");
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    meta(NBD_OPT_LIST_META_CONTEXT, "disk", "base:");
    meta(NBD_OPT_LIST_META_CONTEXT, "disk", NULL);
    meta(NBD_OPT_LIST_META_CONTEXT, "disk", "qemu:dirty-bitmap:");
    meta(NBD_OPT_LIST_META_CONTEXT, "disk", "x-unknown:thing");
    meta(NBD_OPT_LIST_META_CONTEXT, "nothing", "base:");
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:");
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:other");
    meta(NBD_OPT_SET_META_CONTEXT, "disk", NULL);
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:allocation");
    go(NBD_OPT_GO, "", 0, NULL);
    converse();
    reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_INVALID, NULL);
    reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_ERR_INVALID, NULL);
    reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    uint32_t len;
    const uint8_t *p = reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT, &len);
    assert_int_equal(len, 4 + 15);
    assert_memory_equal(p + 4, "base:allocation", 15);
    reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK, NULL);
    for (int i = 0; i < 3; i++)
        reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT, &len);
    reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK, NULL);
    p = reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT, &len);
    assert_memory_equal(p + 4, "qemu:dirty-bitmap:monday", len - 4);
    reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK, NULL);
    reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK, NULL);
    reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_ERR_UNKNOWN, NULL);
    for (int i = 0; i < 3; i++)
        reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
    p = reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT, &len);
    assert_int_equal(get_be32(p), 1);
    reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
    reply(NBD_OPT_GO, NBD_REP_INFO, &len);
    reply(NBD_OPT_GO, NBD_REP_ACK, NULL);
    nothing_more(HANDSHAKE_READY);
    /* Set for "disk", opened as the default, which is the same. */
    assert_int_equal(out.n_contexts, 1);
}

/* Which volume it is learns who asks for that, and nobody selects it. */
static void identity_is_for_who_asks(void **state)
{
    (void)state;
    begin(3);
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    meta(NBD_OPT_LIST_META_CONTEXT, "disk", "fdb-nbd:");
    meta(NBD_OPT_LIST_META_CONTEXT, "disk", "fdb-nbd:volume:7");
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "fdb-nbd:");
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "fdb-nbd:volume:7");
    converse();
    reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    uint32_t len;
    const uint8_t *p = reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT, &len);
    assert_int_equal(len, 4 + 16);
    assert_memory_equal(p + 4, "fdb-nbd:volume:7", 16);
    for (int i = 0; i < 2; i++)
        reply(NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK, NULL);
    for (int i = 0; i < 2; i++)
        reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, NULL);
    nothing_more(HANDSHAKE_BYTES);
}

/* A handshake that waits for an answer about the contexts of "disk". */
static void ask_contexts(struct handshake *h, uint32_t number, uint32_t n,
                         const char *const *queries)
{
    begin(3);
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    meta_all(number, "disk", n, queries);
    handshake_init(h, NBD_TLS_OFF);
    size_t used = handshake_feed(h, in.bytes, in.len);
    assert_int_equal(used, in.len);
    assert_int_equal(h->want, HANDSHAKE_EXPORT);
    handshake_sent(h, h->out_len);
}

/* What the owner is told of the question, so that it need not look up what nobody wants. */
static void owners_learn_what_is_asked_for(void **state)
{
    (void)state;
    static const char below[] = "qemu:dirty-bitmap:", tuesday[] = "qemu:dirty-bitmap:tuesday";
    static const struct {
        uint32_t number, n;
        const char *queries[3];
        bool asks_below, asks_tuesday, asks_base;
    } cases[] = {
        {NBD_OPT_LIST_META_CONTEXT, 0, {NULL}, true, true, true},
        {NBD_OPT_LIST_META_CONTEXT, 1, {"base:"}, false, false, true},
        {NBD_OPT_LIST_META_CONTEXT, 1, {"qemu:"}, true, true, false},
        {NBD_OPT_LIST_META_CONTEXT, 2, {"x:", "qemu:dirty-bitmap:"}, true, true, false},
        {NBD_OPT_LIST_META_CONTEXT, 1, {"qemu"}, false, false, false},
        {NBD_OPT_LIST_META_CONTEXT, 1, {"qemu:dirty-bitmap:monday"}, true, false, false},
        {NBD_OPT_SET_META_CONTEXT, 0, {NULL}, false, false, false},
        {NBD_OPT_SET_META_CONTEXT, 1, {"qemu:dirty-bitmap:"}, false, false, false},
        {NBD_OPT_SET_META_CONTEXT, 2, {"base:allocation", "qemu:"}, false, false, true},
        {NBD_OPT_SET_META_CONTEXT, 3, {tuesday, "a", "qemu:dirty-bitmap:t"}, true, true, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct handshake h;
        ask_contexts(&h, cases[i].number, cases[i].n, cases[i].queries);
        assert_int_equal(handshake_asks_below(&h, below), cases[i].asks_below);
        assert_int_equal(handshake_asks_for(&h, tuesday), cases[i].asks_tuesday);
        assert_int_equal(handshake_asks_for(&h, "base:allocation"), cases[i].asks_base);
        handshake_free(&h);
    }
    /* To enter an export is no question about contexts. */
    struct handshake h;
    begin(3);
    go(NBD_OPT_GO, "disk", 0, NULL);
    handshake_init(&h, NBD_TLS_OFF);
    handshake_feed(&h, in.bytes, in.len);
    assert_int_equal(h.want, HANDSHAKE_EXPORT);
    assert_false(handshake_asks_below(&h, below) || handshake_asks_for(&h, tuesday));
    handshake_free(&h);
}

enum { BITMAPS = 3000 };

/* An export with as many dirty bitmaps; answers what is asked, and gives the number of contexts
 * that were named in the reply. */
static uint32_t answer_bitmaps(struct handshake *h, uint32_t *last_reply)
{
    static char names[BITMAPS][32];
    static const char *contexts[BITMAPS];
    for (unsigned i = 0; i < BITMAPS; i++) {
        snprintf(names[i], sizeof names[i], "qemu:dirty-bitmap:s%u", i);
        contexts[i] = names[i];
    }
    struct nbd_export e = {.name = "disk",
                           .description = "",
                           .size = 1 << 20,
                           .block_size = 16384,
                           .contexts = contexts,
                           .n_contexts = BITMAPS};
    handshake_export(h, ST_OK, &e, NULL);
    size_t len;
    const uint8_t *p = handshake_output(h, &len);
    uint32_t n = 0;
    for (size_t at = 0; at < len; at += NBD_OPTION_REPLY_BYTES + get_be32(p + at + 16)) {
        *last_reply = get_be32(p + at + 12);
        n += *last_reply == NBD_REP_META_CONTEXT;
    }
    handshake_sent(h, len);
    return n;
}

static void contexts_of_many_snapshots(void **state) /* A.10 */
{
    (void)state;
    struct handshake h;
    uint32_t last;
    ask_contexts(&h, NBD_OPT_LIST_META_CONTEXT, 1, (const char *[]){"qemu:dirty-bitmap:"});
    assert_int_equal(answer_bitmaps(&h, &last), BITMAPS);
    assert_int_equal(last, NBD_REP_ACK);
    handshake_free(&h);

    /* In any order, and each one once. */
    ask_contexts(&h, NBD_OPT_SET_META_CONTEXT, 4,
                 (const char *[]){"qemu:dirty-bitmap:s7", "qemu:dirty-bitmap:s2999",
                                  "qemu:dirty-bitmap:s7", "qemu:dirty-bitmap:s3000"});
    assert_int_equal(answer_bitmaps(&h, &last), 2);
    assert_int_equal(last, NBD_REP_ACK);
    assert_int_equal(h.result.n_contexts, 2);
    assert_string_equal(h.result.contexts[0].name, "qemu:dirty-bitmap:s7");
    assert_string_equal(h.result.contexts[1].name, "qemu:dirty-bitmap:s2999");
    assert_true(handshake_selected_for(&h, "disk"));
    assert_false(handshake_selected_for(&h, "disk@monday"));
    handshake_free(&h);

    /* As many as there can be at once, and one more. */
    for (uint32_t n = HANDSHAKE_CONTEXTS_MAX; n <= HANDSHAKE_CONTEXTS_MAX + 1; n++) {
        char names[HANDSHAKE_CONTEXTS_MAX + 1][32];
        const char *queries[HANDSHAKE_CONTEXTS_MAX + 1];
        for (uint32_t i = 0; i < n; i++) {
            snprintf(names[i], sizeof names[i], "qemu:dirty-bitmap:s%u", 2000 - i);
            queries[i] = names[i];
        }
        ask_contexts(&h, NBD_OPT_SET_META_CONTEXT, n, queries);
        answer_bitmaps(&h, &last);
        bool fits = n == HANDSHAKE_CONTEXTS_MAX;
        assert_int_equal(last, fits ? NBD_REP_ACK : NBD_REP_ERR_TOO_BIG);
        assert_int_equal(h.result.n_contexts, fits ? n : 0);
        assert_int_equal(handshake_selected_for(&h, "disk"), fits);
        handshake_free(&h);
    }
}

static void failed_set_clears(void **state) /* A.10 */
{
    (void)state;
    static const char *const second[] = {"nothing", NULL};
    for (int i = 0; i < 2; i++) {
        begin(3);
        option(NBD_OPT_STRUCTURED_REPLY, 0);
        meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:allocation");
        if (second[i]) {
            meta(NBD_OPT_SET_META_CONTEXT, second[i], "base:allocation");
        } else {
            option(NBD_OPT_SET_META_CONTEXT, 2);
            raw("xx", 2);
        }
        go(NBD_OPT_GO, "disk", 0, NULL);
        converse();
        assert_int_equal(out.want, HANDSHAKE_READY);
        assert_int_equal(out.n_contexts, 0);
    }
    /* Set for one export, another one opened. */
    begin(3);
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:allocation");
    go(NBD_OPT_GO, "other", 0, NULL);
    converse();
    assert_int_equal(out.want, HANDSHAKE_READY);
    assert_string_equal(out.name, "other");
    assert_int_equal(out.n_contexts, 0);
}

static void too_many_queries(void **state)
{
    (void)state;
    begin(3);
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    option(NBD_OPT_SET_META_CONTEXT, 4 + 4 + 4 + 4 * 2000);
    text("disk");
    u32(2000);
    for (int i = 0; i < 2000; i++)
        u32(0);
    option(NBD_OPT_SET_META_CONTEXT, 12);
    text("disk");
    u32(0xffffffff);
    converse();
    reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NULL);
    reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_TOO_BIG, NULL);
    reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_INVALID, NULL);
    nothing_more(HANDSHAKE_BYTES);
}

static void transmission_flags(void **state) /* A.11 */
{
    (void)state;
    uint16_t f = nbd_transmission_flags(false, false, false, false);
    assert_true(f & NBD_FLAG_HAS_FLAGS && f & NBD_FLAG_SEND_FLUSH && f & NBD_FLAG_SEND_FUA);
    assert_true(f & NBD_FLAG_SEND_TRIM && f & NBD_FLAG_SEND_WRITE_ZEROES);
    assert_true(f & NBD_FLAG_CAN_MULTI_CONN && f & NBD_FLAG_SEND_CACHE);
    assert_false(f & NBD_FLAG_SEND_DF || f & NBD_FLAG_READ_ONLY || f & NBD_FLAG_SEND_RESIZE);
    assert_true(nbd_transmission_flags(false, true, false, false) & NBD_FLAG_SEND_DF);
    for (unsigned i = 0; i < 16; i++) {
        f = nbd_transmission_flags(i & 1, i & 2, i & 4, i & 8);
        assert_int_equal(!(f & NBD_FLAG_READ_ONLY), !(i & 1));
        if (f & NBD_FLAG_SEND_FAST_ZERO)
            assert_true(f & NBD_FLAG_SEND_WRITE_ZEROES);
        assert_int_equal(!(f & NBD_FLAG_BLOCK_STATUS_PAYLOAD), !((i & 4) && (i & 8)));
    }
    read_only = true;
    begin(3);
    go(NBD_OPT_GO, "disk", 0, NULL);
    converse();
    assert_true(out.flags & NBD_FLAG_READ_ONLY);
}

static void extended_headers(void **state) /* B.26 */
{
    (void)state;
    begin(3);
    option(NBD_OPT_EXTENDED_HEADERS, 0);
    option(NBD_OPT_STRUCTURED_REPLY, 0);
    meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:allocation");
    go(NBD_OPT_GO, "disk", 0, NULL);
    converse();
    reply(NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, NULL);
    reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_EXT_HEADER_REQD, NULL);
    assert_int_equal(out.want, HANDSHAKE_READY);
    assert_true(out.extended);
    assert_true(out.flags & NBD_FLAG_BLOCK_STATUS_PAYLOAD);

    begin(3);
    option(NBD_OPT_EXTENDED_HEADERS, 0);
    option(NBD_OPT_EXPORT_NAME, 4);
    raw("disk", 4);
    converse();
    reply(NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, NULL);
    nothing_more(HANDSHAKE_CLOSE);
}

static void shutdown_answers(void **state)
{
    (void)state;
    struct handshake h;
    static struct outcome o;
    o.len = 0;
    handshake_init(&h, NBD_TLS_OFF);
    handshake_sent(&h, 18);
    begin(3);
    option(NBD_OPT_LIST, 0);
    handshake_feed(&h, in.bytes, in.len);
    handshake_shutdown(&h);
    drain(&h, &o);
    assert_int_equal(get_be32(o.bytes + 12), NBD_REP_ERR_SHUTDOWN);
    assert_int_equal(h.want, HANDSHAKE_CLOSE);
    handshake_free(&h);
}

/* Random bytes, and random damage to a good conversation: no crash, and always a verdict. */
static void any_bytes(void **state)
{
    (void)state;
    unsigned seed = 3;
    for (int i = 0; i < 3000; i++) {
        begin(3);
        option(NBD_OPT_STRUCTURED_REPLY, 0);
        meta(NBD_OPT_SET_META_CONTEXT, "disk", "base:allocation");
        static const uint16_t infos[] = {1, 2, 3};
        go(NBD_OPT_INFO, "disk", 3, infos);
        option(NBD_OPT_LIST, 0);
        go(NBD_OPT_GO, "other", 3, infos);
        for (int k = rand_r(&seed) % 4; k >= 0; k--)
            in.bytes[(size_t)rand_r(&seed) % in.len] = (uint8_t)rand_r(&seed);
        tls_mode = (enum nbd_tls_mode)(rand_r(&seed) % 3);
        converse_in_steps(&out, 1 + (size_t)rand_r(&seed) % in.len);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(unknown_client_flags_close, setup),
        cmocka_unit_test_setup(unknown_options_keep_in_step, setup),
        cmocka_unit_test_setup(inner_lengths, setup),
        cmocka_unit_test_setup(long_names, setup),
        cmocka_unit_test_setup(names_are_utf8, setup),
        cmocka_unit_test_setup(enormous_options_close, setup),
        cmocka_unit_test_setup(wrong_magic_closes, setup),
        cmocka_unit_test_setup(too_many_options_close, setup),
        cmocka_unit_test_setup(export_name, setup),
        cmocka_unit_test_setup(options_without_data, setup),
        cmocka_unit_test_setup(list, setup),
        cmocka_unit_test_setup(long_lists_wait, setup),
        cmocka_unit_test_setup(info_then_go, setup),
        cmocka_unit_test_setup(starttls_unconfigured, setup),
        cmocka_unit_test_setup(starttls_forgets, setup),
        cmocka_unit_test_setup(data_behind_starttls_closes, setup),
        cmocka_unit_test_setup(tls_required, setup),
        cmocka_unit_test_setup(meta_contexts, setup),
        cmocka_unit_test_setup(identity_is_for_who_asks, setup),
        cmocka_unit_test_setup(owners_learn_what_is_asked_for, setup),
        cmocka_unit_test_setup(contexts_of_many_snapshots, setup),
        cmocka_unit_test_setup(failed_set_clears, setup),
        cmocka_unit_test_setup(too_many_queries, setup),
        cmocka_unit_test_setup(transmission_flags, setup),
        cmocka_unit_test_setup(extended_headers, setup),
        cmocka_unit_test_setup(shutdown_answers, setup),
        cmocka_unit_test_setup(any_bytes, setup),
    };
    return cmocka_run_group_tests_name("nbd_handshake", tests, NULL, NULL);
}
