/* What the load is made of: percentiles, what it writes. */
#include "test.h"

#include <stdio.h>

#include "base/bytes.h"
#include "bench/latency.h"
#include "bench/payload.h"
#include "chance.h"

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
