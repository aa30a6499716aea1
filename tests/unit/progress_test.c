/* The progress line, and being interrupted. */
#include "test.h"

#include <signal.h>

#include "cli/progress.h"

#define MIB (1ull << 20)
#define GIB (1ull << 30)

static const char *line(size_t width, uint64_t done, uint64_t total, uint64_t rate, uint64_t elapsed)
{
    static char out[PROGRESS_LINE_BYTES];
    size_t len =
        progress_format(out, width, "exporting disk@a", done, total, rate, elapsed);
    assert_int_equal(len, strlen(out));
    return out;
}

static void lines_say_rate_and_time_left(void **state)
{
    (void)state;
    assert_string_equal(line(200, 25 * GIB, 100 * GIB, 256 * MIB, 77),
                        "exporting disk@a: 25.0 GiB of 100.0 GiB (25%), 256.0 MiB/s, 5:00 left");
    assert_string_equal(line(200, 0, 10 * GIB, MIB, 0),
                        "exporting disk@a: 0 B of 10.0 GiB (0%), 1.0 MiB/s, 2:50:40 left");
    assert_string_equal(line(200, 10 * GIB, 10 * GIB, MIB, 0),
                        "exporting disk@a: 10.0 GiB of 10.0 GiB (100%), 1.0 MiB/s, 0:00 left");
    assert_string_equal(line(200, 0, 1ull << 62, 1, 0),
                        "exporting disk@a: 0 B of 4.0 EiB (0%), 1 B/s, 53375995583650 days left");
}

static void lines_without_an_end_say_how_long(void **state)
{
    (void)state;
    assert_string_equal(line(200, 3 * GIB, 0, 10 * MIB, 67),
                        "exporting disk@a: 3.0 GiB, 10.0 MiB/s, 1:07");
    assert_string_equal(line(200, 0, 10 * GIB, 0, 3661),
                        "exporting disk@a: 0 B of 10.0 GiB (0%), 0 B/s, 1:01:01");
    /* More than was announced: there is no share of it. */
    assert_string_equal(line(200, 3 * GIB, 2 * GIB, 10 * MIB, 5),
                        "exporting disk@a: 3.0 GiB, 10.0 MiB/s, 0:05");
}

static void lines_fit_the_terminal(void **state)
{
    (void)state;
    assert_string_equal(line(20, 25 * GIB, 100 * GIB, 256 * MIB, 77), "exporting disk@a: 25");
    assert_string_equal(line(0, 25 * GIB, 100 * GIB, 256 * MIB, 77), "");
    char out[PROGRESS_LINE_BYTES], what[2 * PROGRESS_LINE_BYTES];
    memset(what, 'x', sizeof what - 1);
    what[sizeof what - 1] = '\0';
    assert_int_equal(progress_format(out, 1000, what, 1, 2, 3, 4), PROGRESS_LINE_BYTES - 1);
    assert_int_equal(strlen(out), PROGRESS_LINE_BYTES - 1);
}

static void a_signal_is_noted_once(void **state)
{
    (void)state;
    struct sigaction now;
    interrupt_catch();
    assert_false(interrupted());
    raise(SIGTERM);
    assert_true(interrupted());
    sigaction(SIGTERM, NULL, &now);
    assert_true(now.sa_handler == SIG_DFL);
    sigaction(SIGINT, NULL, &now);
    assert_true(now.sa_handler != SIG_DFL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_say_rate_and_time_left),
        cmocka_unit_test(lines_without_an_end_say_how_long),
        cmocka_unit_test(lines_fit_the_terminal),
        cmocka_unit_test(a_signal_is_noted_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
