/* The client: URIs, and handshakes with servers of all kinds. */
#include "test.h"

#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "client/connect.h"
#include "client/uri.h"

/* --- URIs ---------------------------------------------------------------------------------- */

static struct nbd_uri parsed(const char *text)
{
    struct nbd_uri uri;
    struct err e = {0};
    if (nbd_uri_parse(text, &uri, &e) != ST_OK)
        fail_msg("%s: %s", text, e.text);
    return uri;
}

static void tcp_uris_are_read(void **state)
{
    (void)state;
    static const struct {
        const char *text, *host, *port, *export;
    } cases[] = {
        {"nbd://example.org", "example.org", "10809", ""},
        {"nbd://example.org/", "example.org", "10809", ""},
        {"NBD://example.org:1/disk", "example.org", "1", "disk"},
        {"nbd://10.0.0.1:65535/a/b//c", "10.0.0.1", "65535", "a/b//c"},
        {"nbd://[::1]/x", "::1", "10809", "x"},
        {"nbd://[fe80::1%25eth0]:99/x", "fe80::1%eth0", "99", "x"},
        {"nbd://h:/x", "h", "10809", "x"},
        {"nbd://h:00080/x", "h", "80", "x"},
        {"nbd:///x", "localhost", "10809", "x"},
        {"nbd://:5/x", "localhost", "5", "x"},
        {"nbd://h//x", "h", "10809", "/x"},
        {"nbd://h/vol%40snap%20%e2%82%AC%3f", "h", "10809", "vol@snap \xe2\x82\xac?"},
        {"nbd://h/vol@snap:1", "h", "10809", "vol@snap:1"},
        {"nbd://h/x?tls-certificates=/dir", "h", "10809", "x"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct nbd_uri uri = parsed(cases[i].text);
        assert_false(uri.is_unix);
        assert_string_equal(uri.host, cases[i].host);
        assert_string_equal(uri.port, cases[i].port);
        assert_string_equal(uri.export, cases[i].export);
    }
}

static void unix_uris_are_read(void **state)
{
    (void)state;
    static const struct {
        const char *text, *socket, *export;
    } cases[] = {
        {"nbd+unix:///?socket=/tmp/s", "/tmp/s", ""},
        {"nbd+unix://?socket=/tmp/s", "/tmp/s", ""},
        {"nbd+unix:///disk?socket=relative", "relative", "disk"},
        {"nbd+unix:///a/b?x=1&socket=/a%20b%26&y=2", "/a b&", "a/b"},
        {"nbd+unix:////?socket=/s", "/s", "/"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct nbd_uri uri = parsed(cases[i].text);
        assert_true(uri.is_unix);
        assert_string_equal(uri.socket, cases[i].socket);
        assert_string_equal(uri.export, cases[i].export);
    }
}

static void other_uris_are_refused(void **state)
{
    (void)state;
    static const char *const cases[] = {
        "",
        "disk",
        "/dev/nbd0",
        "nbd",
        "nbd:",
        "nbd:/",
        "nbd:h:10809",
        "http://h/x",
        "nbds://h/x",
        "nbds+unix:///x?socket=/s",
        "nbd+vsock://1/x",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=",
        "nbd+unix:///x?sockets=/s",
        "nbd+unix://h/x?socket=/s",
        "nbd://h/x?socket=/s",
        "nbd://user@h/x",
        "nbd://h:0/x",
        "nbd://h:65536/x",
        "nbd://h:123456/x",
        "nbd://h:-1/x",
        "nbd://h:1a/x",
        "nbd://h:+1/x",
        "nbd://[::1/x",
        "nbd://[]/x",
        "nbd://[::1]1/x",
        "nbd://::1/x",
        "nbd://h/%",
        "nbd://h/%4",
        "nbd://h/%4g",
        "nbd://h/%00",
        "nbd://h/a b",
        "nbd://h/x#y",
        "nbd+unix:///x?socket=/%",
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct nbd_uri uri;
        struct err e = {0};
        if (nbd_uri_parse(cases[i], &uri, &e) != ST_INVAL || e.text[0] == '\0')
            fail_msg("\"%s\" was taken", cases[i]);
    }
}

/* "nbd+unix:///" of so many bytes and "?socket=" of so many. */
static enum status parse_long(size_t export, size_t socket, struct nbd_uri *uri)
{
    static char text[8192];
    struct err e;
    size_t n = (size_t)sprintf(text, "nbd+unix:///");
    memset(text + n, 'e', export);
    n += export;
    n += (size_t)sprintf(text + n, "?socket=");
    memset(text + n, 's', socket);
    text[n + socket] = '\0';
    return nbd_uri_parse(text, uri, &e);
}

static void names_have_a_length(void **state)
{
    (void)state;
    struct nbd_uri uri;
    assert_int_equal(parse_long(4096, 107, &uri), ST_OK);
    assert_int_equal(strlen(uri.export), 4096);
    assert_int_equal(strlen(uri.socket), 107);
    assert_int_equal(parse_long(4097, 107, &uri), ST_INVAL);
    assert_int_equal(parse_long(4096, 108, &uri), ST_INVAL);
    char text[400] = "nbd://";
    memset(text + 6, 'h', 255);
    assert_int_equal(strlen(parsed(text).host), 255);
    text[6 + 255] = 'h';
    struct err e;
    assert_int_equal(nbd_uri_parse(text, &uri, &e), ST_INVAL);
}

static void uris_have_one_form(void **state)
{
    (void)state;
    static const struct {
        const char *text, *form;
    } cases[] = {
        {"NBD://h", "nbd://h:10809/"},
        {"nbd:///disk@snap", "nbd://localhost:10809/disk@snap"},
        {"nbd://[fe80::1%25eth0]:99/x", "nbd://[fe80::1%25eth0]:99/x"},
        {"nbd://h:1/a/b//%e2%82%AC%3F%20c", "nbd://h:1/a/b//%E2%82%AC%3F%20c"},
        {"nbd://h:1/%61?x=y", "nbd://h:1/a"},
        {"nbd+unix:///a%2Fb?socket=/a%20b%26&y=2", "nbd+unix:///a/b?socket=/a%20b%26"},
        {"nbd+unix://?socket=/s", "nbd+unix:///?socket=/s"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct nbd_uri uri = parsed(cases[i].text), again;
        char text[NBD_URI_TEXT_BYTES];
        assert_string_equal(nbd_uri_format(&uri, text), cases[i].form);
        again = parsed(text);
        assert_memory_equal(&again, &uri, sizeof uri);
    }
    /* The longest there is fits. */
    struct nbd_uri uri = {.is_unix = true};
    char text[NBD_URI_TEXT_BYTES];
    memset(uri.export, 1, NBD_STRING_BYTES_MAX);
    memset(uri.socket, 2, sizeof uri.socket - 1);
    assert_true(strlen(nbd_uri_format(&uri, text)) < sizeof text);
    uri.is_unix = false;
    memset(uri.host, 3, NBD_URI_HOST_BYTES_MAX);
    strcpy(uri.port, "65535");
    assert_true(strlen(nbd_uri_format(&uri, text)) < sizeof text);
}

/* --- handshakes ---------------------------------------------------------------------------- */

/* A server of one connection, which says what it is told to and listens to nothing. */
static struct script {
    struct nbd_uri uri;
    int listener;
    pthread_t thread;
    uint8_t say[8192];
    size_t len;
    bool hangs;          /* then says nothing more; else it hangs up when the client has spoken */
    uint8_t heard[4096]; /* what the client said */
    size_t heard_len;
} script;

static void say(const void *bytes, size_t len)
{
    assert_true(script.len + len <= sizeof script.say);
    memcpy(script.say + script.len, bytes, len);
    script.len += len;
}

static void say_greeting(uint64_t magic, uint64_t option_magic, uint16_t flags)
{
    uint8_t b[NBD_GREETING_BYTES];
    put_be64(b, magic);
    put_be64(b + 8, option_magic);
    put_be16(b + 16, flags);
    say(b, sizeof b);
}

static void say_reply(uint64_t magic, uint32_t option, uint32_t type, uint32_t len,
                      const void *data, size_t data_len)
{
    uint8_t b[NBD_OPTION_REPLY_BYTES];
    put_be64(b, magic);
    put_be32(b + 8, option);
    put_be32(b + 12, type);
    put_be32(b + 16, len);
    say(b, sizeof b);
    say(data, data_len);
}

static void say_info(uint32_t option, uint64_t size, uint16_t flags)
{
    uint8_t b[12] = {0, NBD_INFO_EXPORT};
    put_be64(b + 2, size);
    put_be16(b + 10, flags);
    say_reply(NBD_OPTION_REPLY_MAGIC, option, NBD_REP_INFO, sizeof b, b, sizeof b);
}

static void say_blocks(uint32_t option, uint32_t min, uint32_t max)
{
    uint8_t b[14] = {0, NBD_INFO_BLOCK_SIZE};
    put_be32(b + 2, min);
    put_be32(b + 6, 4096);
    put_be32(b + 10, max);
    say_reply(NBD_OPTION_REPLY_MAGIC, option, NBD_REP_INFO, sizeof b, b, sizeof b);
}

static void say_end(uint32_t option, uint32_t type)
{
    say_reply(NBD_OPTION_REPLY_MAGIC, option, type, 0, "", 0);
}

static void *serve(void *arg)
{
    (void)arg;
    int fd = accept(script.listener, NULL, NULL);
    for (size_t sent = 0; sent < script.len;) {
        ssize_t n = send(fd, script.say + sent, script.len - sent, MSG_NOSIGNAL);
        if (n < 0)
            break;
        sent += (size_t)n;
    }
    if (!script.hangs)
        shutdown(fd, SHUT_WR);
    ssize_t n;
    while (script.heard_len < sizeof script.heard &&
           (n = recv(fd, script.heard + script.heard_len, sizeof script.heard - script.heard_len,
                     0)) > 0)
        script.heard_len += (size_t)n;
    close(fd);
    return NULL;
}

static int begin_script(void **state)
{
    (void)state;
    memset(&script, 0, sizeof script);
    script.uri.is_unix = true;
    strcpy(script.uri.export, "disk");
    char folder[] = "/tmp/client-test-XXXXXX";
    assert_non_null(mkdtemp(folder));
    snprintf(script.uri.socket, sizeof script.uri.socket, "%s/s", folder);
    script.listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    strcpy(to.sun_path, script.uri.socket);
    assert_int_equal(bind(script.listener, (struct sockaddr *)&to, sizeof to), 0);
    assert_int_equal(listen(script.listener, 1), 0);
    return 0;
}

static int end_script(void **state)
{
    (void)state;
    close(script.listener);
    unlink(script.uri.socket);
    *strrchr(script.uri.socket, '/') = '\0';
    rmdir(script.uri.socket);
    return 0;
}

/* A handshake with the server of the script. The socket, if there is one, is closed. */
static enum status shake(bool look, uint64_t timeout_ns, struct nbd_client_export *export,
                         struct err *e)
{
    *e = (struct err){0};
    assert_int_equal(pthread_create(&script.thread, NULL, serve, NULL), 0);
    int fd = -1;
    enum status st = look ? nbd_client_look(&script.uri, timeout_ns, export, e)
                          : nbd_client_connect(&script.uri, timeout_ns, &fd, export, e);
    assert_int_equal(fd >= 0, st == ST_OK && !look);
    if (fd >= 0)
        close(fd);
    pthread_join(script.thread, NULL);
    assert_int_equal(e->text[0] == '\0', st == ST_OK);
    return st;
}

#define GREETING NBD_MAGIC, NBD_OPTION_MAGIC, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES

/* What the client is told after a proper greeting has to be refused, with a sentence. */
static void refuses(enum status st, const char *part)
{
    struct nbd_client_export export;
    struct err e;
    assert_int_equal(shake(false, 10 * NS_PER_S, &export, &e), st);
    if (!strstr(e.text, part))
        fail_msg("\"%s\" in place of \"%s\"", e.text, part);
}

static void enters_an_export(void **state)
{
    (void)state;
    struct nbd_client_export export;
    struct err e;
    say_greeting(GREETING);
    say_blocks(NBD_OPT_GO, 512, 1 << 20);
    say_info(NBD_OPT_GO, 1ull << 40, NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH);
    say_end(NBD_OPT_GO, NBD_REP_ACK);
    assert_int_equal(shake(false, 10 * NS_PER_S, &export, &e), ST_OK);
    assert_true(export.size == 1ull << 40 && export.block_min == 512);
    assert_true(export.payload_max == 1 << 20);
    assert_int_equal(export.flags, NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH);
}

static void looks_and_leaves(void **state)
{
    (void)state;
    struct nbd_client_export export;
    struct err e;
    say_greeting(GREETING);
    say_end(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_UNSUP);
    say_info(NBD_OPT_INFO, 123, NBD_FLAG_HAS_FLAGS);
    say_end(NBD_OPT_INFO, NBD_REP_ACK);
    assert_int_equal(shake(true, 10 * NS_PER_S, &export, &e), ST_OK);
    assert_true(export.size == 123);
    assert_string_equal(export.identity, "");
    /* The last thing it said was ABORT, without data. */
    assert_true(script.heard_len >= 16);
    const uint8_t *last = script.heard + script.heard_len - 16;
    assert_true(get_be64(last) == NBD_OPTION_MAGIC && get_be32(last + 8) == NBD_OPT_ABORT);
    assert_int_equal(get_be32(last + 12), 0);
}

static void say_context(const char *name, size_t len)
{
    uint8_t b[300] = {0};
    memcpy(b + 4, name, len);
    say_reply(NBD_OPTION_REPLY_MAGIC, NBD_OPT_LIST_META_CONTEXT, NBD_REP_META_CONTEXT,
              (uint32_t)(4 + len), b, 4 + len);
}

/* The identity a look gives where the server lists a context of that name. */
static void identity_of(const char *name, size_t len, const char *identity)
{
    struct nbd_client_export export;
    struct err e;
    begin_script(NULL);
    say_greeting(GREETING);
    say_end(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK);
    say_context(name, len);
    say_end(NBD_OPT_LIST_META_CONTEXT, NBD_REP_ACK);
    say_info(NBD_OPT_INFO, 123, NBD_FLAG_HAS_FLAGS);
    say_end(NBD_OPT_INFO, NBD_REP_ACK);
    assert_int_equal(shake(true, 10 * NS_PER_S, &export, &e), ST_OK);
    assert_string_equal(export.identity, identity);
    end_script(NULL);
}

static void looks_which_volume_it_is(void **state)
{
    (void)state;
    char longest[NBD_CLIENT_IDENTITY_BYTES + 1];
    memset(longest, 'x', sizeof longest);
    memcpy(longest, NBD_CONTEXT_IDENTITY_PREFIX, sizeof NBD_CONTEXT_IDENTITY_PREFIX - 1);
    longest[sizeof longest - 1] = '\0';
    identity_of("fdb-nbd:volume:7-8-9", 20, "fdb-nbd:volume:7-8-9");
    identity_of("base:allocation", 15, "");
    identity_of("fdb-nbd:volume:", 15, "");
    identity_of("fdb-nbd:volume:\0-8", 18, "");
    identity_of("", 0, "");
    identity_of(longest, sizeof longest - 1, "");
    longest[sizeof longest - 2] = '\0';
    identity_of(longest, sizeof longest - 2, longest);
}

static void enters_by_name_where_a_server_knows_no_go(void **state)
{
    (void)state;
    struct nbd_client_export export;
    struct err e;
    uint8_t b[10];
    say_greeting(GREETING);
    say_end(NBD_OPT_GO, NBD_REP_ERR_UNSUP);
    put_be64(b, 4096);
    put_be16(b + 8, NBD_FLAG_HAS_FLAGS);
    say(b, sizeof b);
    assert_int_equal(shake(false, 10 * NS_PER_S, &export, &e), ST_OK);
    assert_true(export.size == 4096 && export.block_min == 512);
}

static void nobody_speaks(void **state)
{
    (void)state;
    refuses(ST_IO, "closed the connection");
}

static void something_else_speaks(void **state)
{
    (void)state;
    say("SSH-2.0-OpenSSH_9.2p1 Debian", 28);
    refuses(ST_UNSUP, "no NBD server");
}

static void an_old_server_speaks(void **state)
{
    (void)state;
    say_greeting(NBD_MAGIC, 0x00420281861253ull, 0);
    refuses(ST_UNSUP, "old NBD handshake");
}

static void a_server_without_fixed_newstyle(void **state)
{
    (void)state;
    say_greeting(NBD_MAGIC, NBD_OPTION_MAGIC, 0);
    refuses(ST_UNSUP, "fixed newstyle");
}

static void a_greeting_is_cut_off(void **state)
{
    (void)state;
    say_greeting(GREETING);
    script.len = 17;
    refuses(ST_IO, "closed the connection");
}

static void a_reply_is_cut_off(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_info(NBD_OPT_GO, 1, 0);
    script.len--;
    refuses(ST_IO, "closed the connection");
}

static void a_server_falls_silent(void **state)
{
    (void)state;
    struct nbd_client_export export;
    struct err e;
    say_greeting(GREETING);
    script.hangs = true;
    uint64_t began = now_ns();
    assert_int_equal(shake(false, 100 * NS_PER_MS, &export, &e), ST_IO);
    assert_non_null(strstr(e.text, "within 0.1 s"));
    assert_true(now_ns() - began >= 100 * NS_PER_MS);
}

static void a_reply_with_another_magic(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_reply(NBD_OPTION_REPLY_MAGIC + 1, NBD_OPT_GO, NBD_REP_ACK, 0, "", 0);
    refuses(ST_IO, "not NBD's");
}

static void a_reply_to_another_option(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_info(NBD_OPT_INFO, 1, 0);
    refuses(ST_IO, "not NBD's");
}

/* The length is not believed: nothing of that size is allocated or waited for. */
static void a_reply_of_four_gigabytes(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_reply(NBD_OPTION_REPLY_MAGIC, NBD_OPT_GO, NBD_REP_INFO, UINT32_MAX, "", 0);
    script.hangs = true;
    refuses(ST_IO, "not NBD's");
}

static void replies_without_end(void **state)
{
    (void)state;
    static const uint8_t unknown[2] = {0x7f, 0xff};
    say_greeting(GREETING);
    for (int i = 0; i < 200; i++)
        say_reply(NBD_OPTION_REPLY_MAGIC, NBD_OPT_GO, NBD_REP_INFO, 2, unknown, 2);
    script.hangs = true;
    refuses(ST_IO, "not NBD's");
}

static void an_export_is_not_described(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_end(NBD_OPT_GO, NBD_REP_ACK);
    refuses(ST_IO, "not NBD's");
}

static void a_description_is_too_short(void **state)
{
    (void)state;
    static const uint8_t b[11] = {0, NBD_INFO_EXPORT};
    say_greeting(GREETING);
    say_reply(NBD_OPTION_REPLY_MAGIC, NBD_OPT_GO, NBD_REP_INFO, sizeof b, b, sizeof b);
    refuses(ST_UNSUP, "not NBD's");
}

static void an_information_without_its_number(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_reply(NBD_OPTION_REPLY_MAGIC, NBD_OPT_GO, NBD_REP_INFO, 1, "", 1);
    refuses(ST_UNSUP, "not NBD's");
}

static void blocks_of_nothing(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_blocks(NBD_OPT_GO, 0, 1 << 20);
    refuses(ST_UNSUP, "blocks of 0 bytes");
}

static void more_bytes_than_there_can_be(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_info(NBD_OPT_GO, 1ull << 63, 0);
    say_end(NBD_OPT_GO, NBD_REP_ACK);
    refuses(ST_UNSUP, "9223372036854775808 bytes");
}

static void no_such_export(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_reply(NBD_OPTION_REPLY_MAGIC, NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, 7, "no disk", 7);
    refuses(ST_NOTFOUND, "no export \"disk\": no disk");
}

static void a_refusal_with_a_reason(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_reply(NBD_OPTION_REPLY_MAGIC, NBD_OPT_GO, NBD_REP_ERR_POLICY, 11, "not for you", 11);
    refuses(ST_IO, "not for you");
}

static void tls_is_wanted(void **state)
{
    (void)state;
    say_greeting(GREETING);
    say_end(NBD_OPT_GO, NBD_REP_ERR_TLS_REQD);
    refuses(ST_UNSUP, "TLS");
}

#define HANDSHAKE(name) cmocka_unit_test_setup_teardown(name, begin_script, end_script)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tcp_uris_are_read),
        cmocka_unit_test(unix_uris_are_read),
        cmocka_unit_test(other_uris_are_refused),
        cmocka_unit_test(names_have_a_length),
        cmocka_unit_test(uris_have_one_form),
        HANDSHAKE(enters_an_export),
        HANDSHAKE(looks_and_leaves),
        cmocka_unit_test(looks_which_volume_it_is),
        HANDSHAKE(enters_by_name_where_a_server_knows_no_go),
        HANDSHAKE(nobody_speaks),
        HANDSHAKE(something_else_speaks),
        HANDSHAKE(an_old_server_speaks),
        HANDSHAKE(a_server_without_fixed_newstyle),
        HANDSHAKE(a_greeting_is_cut_off),
        HANDSHAKE(a_reply_is_cut_off),
        HANDSHAKE(a_server_falls_silent),
        HANDSHAKE(a_reply_with_another_magic),
        HANDSHAKE(a_reply_to_another_option),
        HANDSHAKE(a_reply_of_four_gigabytes),
        HANDSHAKE(replies_without_end),
        HANDSHAKE(an_export_is_not_described),
        HANDSHAKE(a_description_is_too_short),
        HANDSHAKE(an_information_without_its_number),
        HANDSHAKE(blocks_of_nothing),
        HANDSHAKE(more_bytes_than_there_can_be),
        HANDSHAKE(no_such_export),
        HANDSHAKE(a_refusal_with_a_reason),
        HANDSHAKE(tls_is_wanted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
