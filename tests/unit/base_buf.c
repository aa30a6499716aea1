/* Block buffers: alignment, counting, reuse order, and that memory goes back. */
#include "test.h"

#include "base/buf.h"

static void sizes_and_alignment(void **state)
{
    (void)state;
    struct buf_pool *pool = buf_pool_new(1 << 20);
    for (uint32_t size = 4096; size <= 65536; size *= 2) {
        struct buf *b = buf_new(pool, size);
        assert_int_equal(b->size, size);
        assert_int_equal(b->refs, 1);
        assert_int_equal((uintptr_t)b->data % size, 0);
        memset(b->data, 0xaa, size);
        assert_int_equal(buf_pool_used(pool), size);
        buf_ref(b);
        buf_unref(b);
        assert_int_equal(buf_pool_used(pool), size);
        buf_unref(b);
        assert_int_equal(buf_pool_used(pool), 0);
    }
    buf_pool_free(pool);
}

static void last_freed_is_first_taken(void **state)
{
    (void)state;
    struct buf_pool *pool = buf_pool_new(1 << 20);
    struct buf *a = buf_new(pool, 4096), *b = buf_new(pool, 4096), *c = buf_new(pool, 4096);
    buf_unref(a);
    buf_unref(b);
    assert_ptr_equal(buf_new(pool, 4096), b);
    assert_ptr_equal(buf_new(pool, 4096), a);
    buf_unref(a);
    buf_unref(b);
    buf_unref(c);
    buf_pool_free(pool);
}

static void budget_is_counted_not_enforced(void **state)
{
    (void)state;
    struct buf_pool *pool = buf_pool_new(65536 + 4096);
    struct buf *a = buf_new(pool, 65536);
    assert_int_equal(buf_pool_room(pool), 4096);
    struct buf *b = buf_new(pool, 65536);
    assert_int_equal(buf_pool_room(pool), 0);
    assert_int_equal(buf_pool_used(pool), 131072);
    assert_int_equal(buf_pool_budget(pool), 65536 + 4096);
    buf_unref(a);
    buf_unref(b);
    buf_pool_free(pool);
}

/* Many slabs filled and emptied in random order: no buffer is handed out twice. */
static void churn(void **state)
{
    (void)state;
    enum { N = 3000 };
    struct buf_pool *pool = buf_pool_new(1 << 20);
    struct buf **held = calloc(N, sizeof *held);
    unsigned seed = 7;
    for (int step = 0; step < 40000; step++) {
        int i = rand_r(&seed) % N;
        if (held[i]) {
            assert_int_equal(*(uint32_t *)(void *)held[i]->data, i);
            buf_unref(held[i]);
            held[i] = NULL;
        } else {
            held[i] = buf_new(pool, 4096u << (rand_r(&seed) % 5));
            *(uint32_t *)(void *)held[i]->data = (uint32_t)i;
        }
    }
    uint64_t sum = 0;
    for (int i = 0; i < N; i++)
        sum += held[i] ? held[i]->size : 0;
    assert_int_equal(buf_pool_used(pool), sum);
    for (int i = 0; i < N; i++) {
        if (held[i])
            buf_unref(held[i]);
    }
    free(held);
    assert_int_equal(buf_pool_used(pool), 0);
    buf_pool_free(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_and_alignment),
        cmocka_unit_test(last_freed_is_first_taken),
        cmocka_unit_test(budget_is_counted_not_enforced),
        cmocka_unit_test(churn),
    };
    return cmocka_run_group_tests_name("base_buf", tests, NULL, NULL);
}
