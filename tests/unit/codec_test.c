/* Blocks to their stored form and back, and refusal of anything else (G5). */
#include <pthread.h>

#include "test.h"

#include "chance.h"
#include "base/hash.h"
#include "volume/codec.h"
#include "volume/mask.h"

#define UNIT 4096u

static const struct codec codecs[] = {
    {CODEC_NONE, 0}, {CODEC_LZ4, 0}, {CODEC_ZSTD, 0}, {CODEC_ZSTD, 1}, {CODEC_ZSTD, 19}};
#define N_CODECS (sizeof codecs / sizeof *codecs)

struct stored {
    uint8_t head[BLOCK_HEAD_BYTES_MAX + 100], body[BLOCK_SIZE_MAX];
    size_t head_len;
    uint32_t body_len;
};

static void encode(struct codec codec, const struct block_place *place, const uint8_t *data,
                   uint32_t len, struct slice mask, struct stored *out)
{
    static uint8_t packed[BLOCK_SIZE_MAX];
    struct slice body;
    out->head_len = block_encode(codec, place, 77, data, len, UNIT, mask, packed, out->head, &body);
    assert_true(out->head_len <= BLOCK_HEAD_BYTES_MAX + mask.len && body.len <= len);
    assert_true(body.data == packed || body.data == data);
    if (body.data == packed)
        assert_true(round_up_u64(body.len, UNIT) < round_up_u64(len, UNIT));
    memcpy(out->body, body.data, body.len);
    out->body_len = (uint32_t)body.len;
}

static bool decode(const struct block_place *place, const struct stored *s, uint8_t *data,
                   uint32_t len, struct slice *mask)
{
    memcpy(data, s->body, s->body_len);
    return block_decode(place, (struct slice){s->head, s->head_len}, data, s->body_len, len, mask);
}

/* Contents between all alike and all random. */
static void fill(struct chance *c, uint8_t *data, uint32_t len)
{
    uint64_t random_share = chance_below(c, 101);
    for (uint32_t i = 0; i < len; i++)
        data[i] = chance_below(c, 100) < random_share ? (uint8_t)chance_u64(c) : (uint8_t)(i >> 8);
}

static void blocks_come_back(void **state)
{
    (void)state;
    struct chance c = chance_begin("codec");
    static uint8_t data[BLOCK_SIZE_MAX], back[BLOCK_SIZE_MAX];
    static struct stored s;
    bool packed = false, plain = false;
    for (int round = 0; round < 250; round++) {
        uint32_t len = BLOCK_SIZE_MIN << chance_below(&c, 5);
        fill(&c, data, len);
        struct block_place place = {chance_wide(&c), chance_wide(&c), chance_wide(&c)};
        uint8_t mask_bytes[100];
        chance_fill(&c, mask_bytes, sizeof mask_bytes);
        struct slice mask = {mask_bytes, chance_below(&c, 2) ? 0 : chance_below(&c, 101)}, got;
        encode(codecs[chance_below(&c, N_CODECS)], &place, data, len, mask, &s);
        *(s.body_len < len ? &packed : &plain) = true;
        assert_true(decode(&place, &s, back, len, &got));
        assert_memory_equal(data, back, len);
        assert_int_equal(got.len, mask.len);
        if (mask.len)
            assert_memory_equal(got.data, mask_bytes, mask.len);

        struct block_place other = place;
        switch (chance_below(&c, 3)) {
        case 0:
            other.branch++;
            break;
        case 1:
            other.epoch++;
            break;
        default:
            other.block++;
        }
        assert_false(decode(&other, &s, back, len, &got));
        if (len < BLOCK_SIZE_MAX)
            assert_false(decode(&place, &s, back, len * 2, &got));
    }
    assert_true(packed && plain);
}

static void incompressible_blocks_are_plain(void **state)
{
    (void)state;
    struct chance c = chance_begin("incompressible");
    static uint8_t data[BLOCK_SIZE_MAX];
    static struct stored s;
    struct block_place place = {1, 2, 3};
    chance_fill(&c, data, sizeof data);
    for (size_t i = 0; i < N_CODECS; i++) {
        encode(codecs[i], &place, data, 16384, (struct slice){NULL, 0}, &s);
        assert_int_equal(s.body_len, 16384);
        assert_memory_equal(s.body, data, 16384);
    }
    /* A block of one unit can't take less than one: no work is spent on it. */
    memset(data, 'a', sizeof data);
    encode(codecs[1], &place, data, UNIT, (struct slice){NULL, 0}, &s);
    assert_int_equal(s.body_len, UNIT);
    encode(codecs[1], &place, data, 2 * UNIT, (struct slice){NULL, 0}, &s);
    assert_true(s.body_len < UNIT);
}

static void cut_and_flipped_blocks_are_refused(void **state)
{
    (void)state;
    struct chance c = chance_begin("hostile blocks");
    static uint8_t data[BLOCK_SIZE_MAX], back[BLOCK_SIZE_MAX];
    static struct stored good;
    struct block_place place = {5, 6, 7};
    struct slice got;
    const uint32_t len = 8192;
    for (size_t i = 0; i < N_CODECS; i++) {
        for (unsigned with_mask = 0; with_mask < 2; with_mask++) {
            struct slice mask = {"\x03\x05\x02", with_mask ? 3 : 0};
            for (uint32_t n = 0; n < len; n++)
                data[n] = (uint8_t)(n % 64 ? n >> 8 : chance_u64(&c));
            encode(codecs[i], &place, data, len, mask, &good);
            struct stored bad = good;
            for (size_t bit = 0; bit < good.head_len * 8; bit++) {
                bad.head[bit / 8] ^= (uint8_t)(1u << (bit % 8));
                assert_false(decode(&place, &bad, back, len, &got));
                bad.head[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            }
            for (size_t bit = 0; bit < good.body_len * 8u; bit++) {
                bad.body[bit / 8] ^= (uint8_t)(1u << (bit % 8));
                assert_false(decode(&place, &bad, back, len, &got));
                bad.body[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            }
            for (bad.head_len = 0; bad.head_len < good.head_len; bad.head_len++)
                assert_false(decode(&place, &bad, back, len, &got));
            bad.head_len = good.head_len + 1;
            bad.head[good.head_len] = 0;
            assert_false(decode(&place, &bad, back, len, &got));
            bad.head_len = good.head_len;
            for (bad.body_len = 0; bad.body_len < good.body_len; bad.body_len += 7)
                assert_false(decode(&place, &bad, back, len, &got));
            bad.body_len = len + 1;
            assert_false(block_decode(&place, (struct slice){bad.head, bad.head_len}, back,
                                      bad.body_len, len, &got));
            assert_true(decode(&place, &good, back, len, &got));
        }
    }
}

static void zeros_are_found(void **state)
{
    (void)state;
    static uint8_t data[BLOCK_SIZE_MAX];
    assert_true(block_is_zero(data, 0));
    assert_true(block_is_zero(data, 1));
    assert_true(block_is_zero(data, sizeof data));
    for (size_t i = 0; i < sizeof data; i += i < 200 ? 1 : 97) {
        data[i] = 1;
        assert_false(block_is_zero(data, sizeof data));
        assert_true(block_is_zero(data, i));
        data[i] = 0;
    }
    data[sizeof data - 1] = 0x80;
    assert_false(block_is_zero(data, sizeof data));
    data[sizeof data - 1] = 0;
}

static void *use_scratch(void *arg)
{
    uint8_t *ok = arg;
    static const uint8_t zeros[8192];
    uint8_t out[8192], head[BLOCK_HEAD_BYTES_MAX], back[8192];
    struct block_place place = {1, 1, 1};
    struct slice body, mask;
    *ok = 1;
    for (size_t i = 0; i < N_CODECS; i++) {
        size_t len = block_encode(codecs[i], &place, 1, zeros, sizeof zeros, 1,
                                  (struct slice){NULL, 0}, out, head, &body);
        memcpy(back, body.data, body.len);
        *ok &= block_decode(&place, (struct slice){head, len}, back, (uint32_t)body.len, 8192,
                            &mask) &&
               block_is_zero(back, sizeof back);
    }
    return codec_scratch_get();
}

/* Each thread has its own scratch, which goes with it (a leak checker sees to that). */
static void threads_have_their_own_scratch(void **state)
{
    (void)state;
    pthread_t threads[4];
    uint8_t ok[4] = {0};
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, use_scratch, &ok[i]), 0);
    for (int i = 0; i < 4; i++) {
        void *scratch;
        assert_int_equal(pthread_join(threads[i], &scratch), 0);
        assert_true(ok[i]);
        assert_ptr_not_equal(scratch, codec_scratch_get());
    }
    assert_ptr_equal(codec_scratch_get(), codec_scratch_get());
}

/* A base with single valid bytes below a block that was written in whole sectors: what was written
 * stays, also where the base's bytes begin within a sector. */
static void bases_do_not_cover_what_was_written(void **state)
{
    (void)state;
    static const struct {
        uint32_t begin, end;
    } had[] = {{100, 200}, {500, 700}, {1500, 1600}, {3999, 4096}};
    struct mask written, base_valid;
    uint8_t data[4096], base[4096];
    for (size_t i = 0; i < sizeof had / sizeof *had; i++) {
        mask_init(&written);
        mask_init(&base_valid);
        mask_add(&written, sizeof data, 0, 512);
        mask_add(&written, sizeof data, 1024, 4096);
        mask_add(&base_valid, sizeof data, had[i].begin, had[i].end);
        memset(data, 1, sizeof data);
        memset(base, 2, sizeof base);
        mask_merge(&written, sizeof data, data, base, &base_valid);
        for (uint32_t at = 0; at < sizeof data; at++) {
            bool is_written = at < 512 || at >= 1024, was = at >= had[i].begin && at < had[i].end;
            assert_int_equal(data[at], !is_written && was ? 2 : 1);
            assert_int_equal(mask_covers(&written, at, at + 1), is_written || was);
        }
        mask_free(&written);
        mask_free(&base_valid);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_come_back),
        cmocka_unit_test(incompressible_blocks_are_plain),
        cmocka_unit_test(cut_and_flipped_blocks_are_refused),
        cmocka_unit_test(zeros_are_found),
        cmocka_unit_test(threads_have_their_own_scratch),
        cmocka_unit_test(bases_do_not_cover_what_was_written),
    };
    return cmocka_run_group_tests_name("codec", tests, NULL, NULL);
}
