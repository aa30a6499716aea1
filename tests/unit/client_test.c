/* The client: URIs. */
#include "test.h"

#include <stdio.h>

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tcp_uris_are_read),
        cmocka_unit_test(unix_uris_are_read),
        cmocka_unit_test(other_uris_are_refused),
        cmocka_unit_test(names_have_a_length),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
