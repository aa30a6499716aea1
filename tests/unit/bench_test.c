/* What the load is made of: URIs, percentiles, what it writes. */
#include "test.h"

#include <stdio.h>

#include "base/bytes.h"
#include "bench/latency.h"
#include "bench/payload.h"
#include "bench/uri.h"
#include "chance.h"

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

/* --- latencies ----------------------------------------------------------------------------- */

static struct latency times;

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void assert_near(double got, uint64_t want)
{
    if (got < (double)want * 0.99 || got > (double)want * 1.01)
        fail_msg("%.1f where %llu is right", got, (unsigned long long)want);
}

static void nothing_counted_is_zero(void **state)
{
    (void)state;
    times = (struct latency){0};
    assert_true(latency_percentile_ns(&times, 50) == 0 && latency_mean_ns(&times) == 0);
}

static void percentiles_of_known_times(void **state)
{
    (void)state;
    times = (struct latency){0};
    for (uint64_t i = 1; i <= 1000; i++)
        latency_count(&times, i * 1000);
    assert_near(latency_percentile_ns(&times, 50), 500000);
    assert_near(latency_percentile_ns(&times, 90), 900000);
    assert_near(latency_percentile_ns(&times, 99), 990000);
    assert_near(latency_percentile_ns(&times, 99.9), 999000);
    assert_true(latency_percentile_ns(&times, 100) == 1000000);
    assert_true(latency_mean_ns(&times) == 500500);
    assert_int_equal(times.max_ns, 1000000);

    /* One that is far away is seen from where it counts on. */
    times = (struct latency){0};
    for (int i = 0; i < 999; i++)
        latency_count(&times, 20);
    latency_count(&times, 7000000);
    assert_true(latency_percentile_ns(&times, 99.9) == 20);
    assert_true(latency_percentile_ns(&times, 99.91) == 7000000);
}

static void percentiles_are_within_a_hundredth(void **state)
{
    (void)state;
    struct chance chance = chance_begin("percentiles");
    static uint64_t values[10000];
    for (int round = 0; round < 50; round++) {
        times = (struct latency){0};
        size_t n = 1 + chance_below(&chance, 10000);
        for (size_t i = 0; i < n; i++) {
            values[i] = chance_wide(&chance) >> (64 - LATENCY_VALUE_BITS);
            latency_count(&times, values[i]);
        }
        qsort(values, n, sizeof *values, by_value);
        for (unsigned tenths = 1; tenths <= 1000; tenths += 37) {
            size_t rank = (tenths * n + 999) / 1000;
            assert_near(latency_percentile_ns(&times, tenths / 10.0), values[rank - 1]);
        }
    }
}

static void every_time_has_a_bucket(void **state)
{
    (void)state;
    uint32_t last = 0;
    for (uint64_t ns = 0; ns < 100000; ns++) {
        uint32_t bucket = latency_bucket(ns);
        assert_true(bucket == last || bucket == last + 1);
        last = bucket;
    }
    assert_int_equal(latency_bucket((1ull << LATENCY_VALUE_BITS) - 1), LATENCY_BUCKETS - 1);
    assert_int_equal(latency_bucket(1ull << LATENCY_VALUE_BITS), LATENCY_BUCKETS - 1);
    assert_int_equal(latency_bucket(UINT64_MAX), LATENCY_BUCKETS - 1);
}

/* --- what is written ----------------------------------------------------------------------- */

/* The bytes `from` to `to` of a payload, however many calls that takes. */
static void collect(const struct payload *p, uint64_t first_unit, uint64_t from, uint64_t to,
                    unsigned max, uint8_t *out)
{
    static struct payload_stamps stamps;
    struct iovec iov[16];
    while (from < to) {
        size_t bytes = 0, copied = 0;
        stamps.used = 0;
        unsigned n = payload_put(p, first_unit, from, to, &stamps, iov, max, &bytes);
        assert_true(n > 0 && n <= max && bytes > 0);
        for (unsigned i = 0; i < n; i++) {
            memcpy(out + copied, iov[i].iov_base, iov[i].iov_len);
            copied += iov[i].iov_len;
        }
        assert_int_equal(copied, bytes);
        out += bytes;
        from += bytes;
    }
    assert_int_equal(from, to);
}

#define LONG_BYTES (10 * PAYLOAD_UNIT_BYTES + 1000u)

static void payloads_are_the_same_in_pieces(void **state)
{
    (void)state;
    struct chance chance = chance_begin("payload");
    struct payload p;
    static uint8_t whole[LONG_BYTES], pieces[LONG_BYTES];
    payload_init(&p, 7, 0);
    collect(&p, 100, 0, LONG_BYTES, 16, whole);
    for (int round = 0; round < 200; round++) {
        for (uint64_t at = 0, to; at < LONG_BYTES; at = to) {
            /* Also within a stamp. */
            to = min_u64(LONG_BYTES,
                         at + 1 + chance_below(&chance, chance_below(&chance, 2) ? 20 : 9000));
            collect(&p, 100, at, to, 2 + (unsigned)chance_below(&chance, 15), pieces + at);
        }
        assert_memory_equal(whole, pieces, LONG_BYTES);
    }
    payload_free(&p);
}

static void no_two_units_are_the_same(void **state)
{
    (void)state;
    enum { UNITS = 20000 };
    struct payload p;
    payload_init(&p, 7, 100);
    static uint64_t stamps[UNITS];
    for (uint64_t i = 0; i < UNITS; i++) {
        /* Of two connections. */
        uint8_t stamp[8];
        collect(&p, i % 2 ? i : (1ull << 48) + i, 0, 8, 2, stamp);
        stamps[i] = get_le64(stamp);
    }
    qsort(stamps, UNITS, sizeof *stamps, by_value);
    for (size_t i = 1; i < UNITS; i++)
        assert_true(stamps[i] != stamps[i - 1]);
    payload_free(&p);
}

static void a_share_of_the_data_is_zeros(void **state)
{
    (void)state;
    static const unsigned percents[] = {0, 1, 25, 50, 67, 99, 100};
    static uint8_t data[LONG_BYTES];
    for (size_t i = 0; i < sizeof percents / sizeof *percents; i++) {
        struct payload p;
        size_t zeros = 0;
        payload_init(&p, 7, percents[i]);
        collect(&p, 0, 0, LONG_BYTES, 16, data);
        for (size_t at = 0; at < LONG_BYTES; at++)
            zeros += data[at] == 0;
        /* Of noise, one byte in 256 is zero; stamps are noise. */
        double percent = 100.0 * (double)zeros / LONG_BYTES;
        if (percent < percents[i] - 1.0 || percent > percents[i] + 1.5)
            fail_msg("%u percent are %.2f", percents[i], percent);
        payload_free(&p);
    }
}

static void data_is_what_the_seed_says(void **state)
{
    (void)state;
    struct payload a, b, c;
    static uint8_t of_a[LONG_BYTES], of_b[LONG_BYTES], of_c[LONG_BYTES];
    payload_init(&a, 7, 0);
    payload_init(&b, 7, 0);
    payload_init(&c, 8, 0);
    collect(&a, 5, 0, LONG_BYTES, 16, of_a);
    collect(&b, 5, 0, LONG_BYTES, 16, of_b);
    collect(&c, 5, 0, LONG_BYTES, 16, of_c);
    assert_memory_equal(of_a, of_b, LONG_BYTES);
    for (size_t at = 0; at < LONG_BYTES; at += 512)
        assert_memory_not_equal(of_a + at, of_c + at, min_u64(512, LONG_BYTES - at));
    payload_free(&a);
    payload_free(&b);
    payload_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tcp_uris_are_read),
        cmocka_unit_test(unix_uris_are_read),
        cmocka_unit_test(other_uris_are_refused),
        cmocka_unit_test(names_have_a_length),
        cmocka_unit_test(nothing_counted_is_zero),
        cmocka_unit_test(percentiles_of_known_times),
        cmocka_unit_test(percentiles_are_within_a_hundredth),
        cmocka_unit_test(every_time_has_a_bucket),
        cmocka_unit_test(payloads_are_the_same_in_pieces),
        cmocka_unit_test(no_two_units_are_the_same),
        cmocka_unit_test(a_share_of_the_data_is_zeros),
        cmocka_unit_test(data_is_what_the_seed_says),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
