/* Sizes, error sentences, growing arrays, hashes, memory that is given back. */
#include <pthread.h>
#include <stdio.h>

#include "test.h"

#include "base/bytes.h"
#include "base/hash.h"
#include "base/list.h"
#include "base/mem.h"
#include "base/size.h"
#include "base/status.h"

static void sizes_are_read(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {
        {"0", 0},
        {"4096", 4096},
        {"4096B", 4096},
        {"1K", 1024},
        {"64KiB", 65536},
        {"64kb", 65536},
        {"512M", 512ull << 20},
        {"10G", 10ull << 30},
        {"1.5T", 3ull << 39},
        {"64T", 64ull << 40},
        {"1P", 1ull << 50},
        {"0.5K", 512},
        {"9223372036854775807", INT64_MAX},
        {"7E", 7ull << 60},
    };
    static const char *const bad[] = {
        "",    "G",    "-1",  "+1", " 1",   "1 G", "1GG", "1X",   "1Ki1",
        "1.G", "1.5", "1.5B", "8E", ".5G", "0x10", "9223372036854775808", "1Gib ", "1.0000000001G",
    };
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        uint64_t bytes = 1;
        assert_true(size_parse(good[i].text, &bytes));
        assert_int_equal(bytes, good[i].bytes);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        uint64_t bytes;
        if (size_parse(bad[i], &bytes))
            fail_msg("\"%s\" was taken for a size", bad[i]);
    }
}

static void sizes_are_written(void **state)
{
    (void)state;
    char out[24];
    assert_string_equal(size_format(0, out), "0 B");
    assert_string_equal(size_format(1023, out), "1023 B");
    assert_string_equal(size_format(1024, out), "1.0 KiB");
    assert_string_equal(size_format(1ull << 30, out), "1.0 GiB");
    assert_string_equal(size_format((1ull << 30) - 1, out), "1023.9 MiB");
    assert_string_equal(size_format(3ull << 39, out), "1.5 TiB");
    assert_string_equal(size_format(UINT64_MAX, out), "15.9 EiB");
}

static void sentences(void **state)
{
    (void)state;
    struct err e = {0};
    assert_int_equal(fail(&e, ST_IO, "cannot open %s", "x"), ST_IO);
    assert_string_equal(e.text, "cannot open x");
    assert_int_equal(fail(&e, ST_UNAVAIL, "no store: %s", e.text), ST_UNAVAIL);
    assert_string_equal(e.text, "no store: cannot open x");
    assert_int_equal(e.st, ST_UNAVAIL);
    assert_int_equal(fail(NULL, ST_PERM, "unheard"), ST_PERM);
    for (int st = ST_OK; st <= ST_FORMAT; st++)
        assert_string_not_equal(status_text((enum status)st), "unknown status");
}

static void arrays_grow(void **state)
{
    (void)state;
    uint64_t *items = NULL;
    size_t cap = 0;
    for (size_t i = 0; i < 1000; i++) {
        mem_grow(&items, &cap, i + 1, sizeof *items);
        items[i] = i;
    }
    for (size_t i = 0; i < 1000; i++)
        assert_int_equal(items[i], i);
    free(items);
}

static void hashes(void **state)
{
    (void)state;
    /* The published XXH3 value of the empty input: the stored format depends on it. */
    assert_true(hash64("", 0, 0) == 0x2d06800538d394c2u);
    assert_true(hash64("abc", 3, 1) != hash64("abc", 3, 2));
    assert_true(hash_mix(1, 2) != hash_mix(2, 1));
}

static void lists(void **state)
{
    (void)state;
    struct item {
        int n;
        struct list link;
    } items[3] = {{.n = 0}, {.n = 1}, {.n = 2}};
    struct list a = LIST_INIT(a), b = LIST_INIT(b);
    for (int i = 0; i < 3; i++)
        list_add_tail(&a, &items[i].link);
    list_remove(&items[1].link);
    list_remove(&items[1].link);
    list_add_head(&b, &items[1].link);
    list_splice_tail(&b, &a);
    assert_true(list_empty(&a));
    static const int order[] = {1, 0, 2};
    int at = 0;
    list_for_each (pos, &b)
        assert_int_equal(container_of(pos, struct item, link)->n, order[at++]);
    assert_int_equal(at, 3);
    assert_ptr_equal(list_pop(&b), &items[1].link);
}

#define BURSTS 4
#define BURST_PARTS 32
#define PART_BYTES (600u << 10)

static pthread_barrier_t burst_over, looked;

static void *burst(void *arg)
{
    uint8_t *parts[BURST_PARTS];
    for (int i = 0; i < BURST_PARTS; i++)
        memset(parts[i] = mem_alloc(PART_BYTES), 1, PART_BYTES);
    for (int i = BURST_PARTS; i-- > 0;)
        free(parts[i]);
    pthread_barrier_wait(&burst_over);
    pthread_barrier_wait(&looked);
    return arg;
}

static uint64_t anonymous_kib(void)
{
    char line[200];
    unsigned long kib = 0;
    FILE *f = fopen("/proc/self/status", "re");
    assert_non_null(f);
    while (fgets(line, sizeof line, f) && sscanf(line, "RssAnon: %lu", &kib) != 1)
        continue;
    fclose(f);
    return kib;
}

/* G6: what threads that live on took for a moment does not stay with them. */
static void bursts_are_given_back(void **state)
{
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    print_message("# the sanitizer has an allocator of its own\n");
    return;
#endif
    mem_give_back();
    /* A large block first, as there is in any program: glibc would learn from it to keep more. */
    uint8_t *large = mem_alloc(24u << 20);
    memset(large, 1, 24u << 20);
    free(large);
    uint64_t before = anonymous_kib();
    pthread_t threads[BURSTS];
    pthread_barrier_init(&burst_over, NULL, BURSTS + 1);
    pthread_barrier_init(&looked, NULL, BURSTS + 1);
    for (int i = 0; i < BURSTS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, burst, NULL), 0);
    pthread_barrier_wait(&burst_over);
    uint64_t after = anonymous_kib();
    pthread_barrier_wait(&looked);
    for (int i = 0; i < BURSTS; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&burst_over);
    pthread_barrier_destroy(&looked);
    print_message("# %lu KiB before, %lu after\n", (unsigned long)before, (unsigned long)after);
    assert_true(after < before + BURSTS * (4u << 10));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_are_read), cmocka_unit_test(sizes_are_written),
        cmocka_unit_test(sentences),      cmocka_unit_test(arrays_grow),
        cmocka_unit_test(hashes),         cmocka_unit_test(lists),
        cmocka_unit_test(bursts_are_given_back),
    };
    return cmocka_run_group_tests_name("base_misc", tests, NULL, NULL);
}
