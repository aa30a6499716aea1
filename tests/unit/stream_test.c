/* The stream of export and import: what is written is read again, and nothing else is. */
#include "test.h"

#include <stdio.h>

#include "chance.h"
#include "cli/stream.h"

#define STREAM_BYTES_MAX (8u << 20)
#define SECTIONS 3u
#define VOLUME_BYTES 16384u

/* A stream and what it says: the bytes of each state. */
static struct made {
    uint8_t bytes[STREAM_BYTES_MAX];
    size_t len;
    size_t frames[1000]; /* where each begins */
    unsigned n_frames;
    uint8_t states[SECTIONS][VOLUME_BYTES];
    struct stream_volume volume;
    struct stream_section sections[SECTIONS];
} made;

static uint8_t *next_frame(void)
{
    made.frames[made.n_frames++] = made.len;
    return made.bytes + made.len;
}

static void put_state(struct chance *c, struct stream_writer *w, unsigned n)
{
    uint8_t *state = made.states[n];
    static uint8_t packed[STREAM_DATA_BYTES_MAX];
    if (n > 0)
        memcpy(state, made.states[n - 1], VOLUME_BYTES);
    for (uint64_t at = chance_below(c, 3000); at < VOLUME_BYTES; at += chance_below(c, 3000)) {
        uint64_t len = min_u64(1 + chance_below(c, 4000), VOLUME_BYTES - at);
        if (chance_below(c, 3) == 0) {
            memset(state + at, 0, len);
            made.len += stream_put_zero(w, at, len, chance_below(c, 2), next_frame());
        } else {
            if (chance_below(c, 2))
                chance_fill(c, state + at, len);
            else
                memset(state + at, (int)chance_below(c, 256), len);
            size_t body_len = stream_pack(state + at, len, packed);
            const uint8_t *body = body_len ? packed : state + at;
            body_len = body_len ? body_len : len;
            made.len += stream_put_data(w, at, (uint32_t)len, body, body_len, next_frame());
            memcpy(made.bytes + made.len, body, body_len);
            made.len += body_len;
        }
        at += len;
    }
}

static void make(struct chance *c)
{
    struct stream_writer w;
    memset(&made, 0, sizeof made);
    made.len = stream_put_begin(&w, made.bytes);
    made.volume = (struct stream_volume){.n_sections = SECTIONS,
                                         .block_size = 16384,
                                         .codec = CODEC_ZSTD,
                                         .codec_level = 3,
                                         .created_ns = chance_u64(c),
                                         .name = "disk",
                                         .description = "h\u00e9"};
    made.len += stream_put_volume(&w, &made.volume, next_frame());
    for (unsigned n = 0; n < SECTIONS; n++) {
        struct stream_section *s = &made.sections[n];
        *s = (struct stream_section){.size = VOLUME_BYTES, .snapshot = n < SECTIONS - 1};
        if (n > 0) {
            memcpy(s->base, made.sections[n - 1].id, sizeof s->base);
            strcpy(s->base_name, made.sections[n - 1].name);
        }
        if (s->snapshot) {
            chance_fill(c, s->id, sizeof s->id);
            s->created_ns = chance_u64(c);
            snprintf(s->name, sizeof s->name, "snap%u", n);
        }
        made.len += stream_put_section(&w, s, next_frame());
        put_state(c, &w, n);
        made.len += stream_put_section_end(&w, next_frame());
    }
    made.len += stream_put_end(&w, next_frame());
    assert_true(made.len < STREAM_BYTES_MAX / 2 && made.n_frames < 1000);
}

/* Reads a stream as import does. ST_OK: it is whole, and all states are those of `made`. */
static enum status take(const uint8_t *bytes, size_t len, struct err *e)
{
    static uint8_t state[VOLUME_BYTES], unpacked[STREAM_DATA_BYTES_MAX];
    struct stream_reader r;
    struct stream_frame f;
    enum status st;
    memset(state, 0, sizeof state);
    if (len < STREAM_BEGIN_BYTES)
        return fail(e, ST_IO, "too short for byte 0");
    if ((st = stream_take_begin(&r, bytes, e)) != ST_OK)
        return st;
    for (;;) {
        size_t left = len - r.position;
        if (r.last == STREAM_END || left < STREAM_HEAD_BYTES)
            return stream_ended(&r, left, e);
        if ((st = stream_take_head(&r, bytes + r.position, &f, e)) != ST_OK)
            return st;
        assert_true(f.body_len <= STREAM_DATA_BYTES_MAX);
        const uint8_t *body = bytes + r.position;
        if (len - r.position < f.body_len)
            return stream_ended(&r, len - r.position, e);
        if ((st = stream_take_body(&r, &f, body, e)) != ST_OK)
            return st;
        switch (f.kind) {
        case STREAM_DATA:
            assert_true(f.offset + f.length <= VOLUME_BYTES);
            if (f.packed) {
                if ((st = stream_unpack(&f, body, unpacked, e)) != ST_OK)
                    return st;
                body = unpacked;
            }
            memcpy(state + f.offset, body, f.length);
            break;
        case STREAM_ZERO:
            assert_true(f.offset + f.length <= VOLUME_BYTES);
            memset(state + f.offset, 0, f.length);
            break;
        case STREAM_SECTION:
            assert_memory_equal(&r.section, &made.sections[r.n_sections - 1], sizeof r.section);
            break;
        case STREAM_SECTION_END:
            assert_memory_equal(state, made.states[r.n_sections - 1], VOLUME_BYTES);
            break;
        case STREAM_VOLUME:
            assert_int_equal(r.volume.n_sections, SECTIONS);
            assert_int_equal(r.volume.block_size, 16384);
            assert_int_equal(r.volume.codec, CODEC_ZSTD);
            assert_int_equal(r.volume.codec_level, 3);
            assert_int_equal(r.volume.created_ns, made.volume.created_ns);
            assert_string_equal(r.volume.name, "disk");
            assert_string_equal(r.volume.description, made.volume.description);
            break;
        case STREAM_END:
            break;
        }
    }
}

static void refused(const uint8_t *bytes, size_t len, const char *what, size_t at)
{
    struct err e = {0};
    enum status st = take(bytes, len, &e);
    if (st != ST_IO && st != ST_UNSUP)
        fail_msg("taken although %s at %zu of %zu", what, at, len);
    if (!strstr(e.text, " byte ") || strchr(e.text, '\n'))
        fail_msg("the sentence about %s does not name the position: %s", what, e.text);
}

static void streams_come_back(void **state)
{
    (void)state;
    struct chance c = chance_begin("stream");
    bool packed = false, plain = false;
    for (int round = 0; round < 100; round++) {
        struct err e = {0};
        make(&c);
        if (take(made.bytes, made.len, &e) != ST_OK)
            fail_msg("refused: %s", e.text);
        for (unsigned i = 0; i < made.n_frames; i++)
            if (made.bytes[made.frames[i]] == STREAM_DATA)
                *(made.bytes[made.frames[i] + 1] ? &packed : &plain) = true;
    }
    assert_true(packed && plain);
}

static void every_cut_is_noticed(void **state)
{
    (void)state;
    struct chance c = chance_begin("cuts");
    make(&c);
    for (size_t len = 0; len < made.len; len++)
        refused(made.bytes, len, "it was cut", len);
}

static void every_flipped_bit_is_noticed(void **state)
{
    (void)state;
    struct chance c = chance_begin("flips");
    for (int round = 0; round < 3; round++) {
        make(&c);
        for (size_t at = 0; at < made.len; at++) {
            uint8_t bit = (uint8_t)(1u << chance_below(&c, 8));
            made.bytes[at] ^= bit;
            refused(made.bytes, made.len, "a bit was flipped", at);
            made.bytes[at] ^= bit;
        }
    }
}

static size_t frame_end(unsigned i)
{
    return i + 1 < made.n_frames ? made.frames[i + 1] : made.len;
}

/* Frames that are all right by themselves, but in the wrong place. */
static void every_other_order_is_noticed(void **state)
{
    (void)state;
    struct chance c = chance_begin("orders");
    static uint8_t other[STREAM_BYTES_MAX];
    make(&c);
    for (unsigned i = 0; i < made.n_frames; i++) {
        size_t begin = made.frames[i], end = frame_end(i);
        /* Left out. */
        memcpy(other, made.bytes, begin);
        memcpy(other + begin, made.bytes + end, made.len - end);
        refused(other, made.len - (end - begin), "a frame was left out", i);
        /* Twice. */
        memcpy(other, made.bytes, end);
        memcpy(other + end, made.bytes + begin, made.len - begin);
        refused(other, made.len + (end - begin), "a frame came twice", i);
        /* Changed places with the next. */
        if (i + 1 < made.n_frames) {
            size_t next = frame_end(i + 1);
            memcpy(other, made.bytes, made.len);
            memcpy(other + begin, made.bytes + end, next - end);
            memcpy(other + begin + (next - end), made.bytes + begin, end - begin);
            refused(other, made.len, "two frames changed places", i);
        }
    }
    /* A byte, or another stream, behind the end. */
    memcpy(other, made.bytes, made.len);
    other[made.len] = 0;
    refused(other, made.len + 1, "a byte follows", made.len);
    memcpy(other + made.len, made.bytes, made.len);
    refused(other, 2 * made.len, "a stream follows", made.len);
}

static void noise_is_refused(void **state)
{
    (void)state;
    struct chance c = chance_begin("noise");
    static uint8_t bytes[STREAM_BYTES_MAX];
    for (int round = 0; round < 5000; round++) {
        make(&c);
        size_t len = made.len, at = chance_below(&c, len), n = 1 + chance_below(&c, 64);
        memcpy(bytes, made.bytes, len);
        if (chance_below(&c, 2))
            at = made.frames[chance_below(&c, made.n_frames)];
        n = min_u64(n, len - at);
        chance_fill(&c, bytes + at, n);
        if (memcmp(bytes, made.bytes, len) != 0)
            refused(bytes, len, "noise was laid over it", at);
    }
}

/* --- what no writer makes, under right hashes --------------------------------------------- */

struct crafted {
    struct stream_writer w;
    uint8_t bytes[STREAM_BYTES_MAX];
    size_t len;
} crafted;

static void craft_begin(const struct stream_volume *v, const struct stream_section *s)
{
    crafted.len = stream_put_begin(&crafted.w, crafted.bytes);
    crafted.len += stream_put_volume(&crafted.w, v, crafted.bytes + crafted.len);
    if (s)
        crafted.len += stream_put_section(&crafted.w, s, crafted.bytes + crafted.len);
}

static void craft_end(void)
{
    crafted.len += stream_put_section_end(&crafted.w, crafted.bytes + crafted.len);
    crafted.len += stream_put_end(&crafted.w, crafted.bytes + crafted.len);
}

static enum status take_crafted(void)
{
    struct stream_reader r;
    struct stream_frame f;
    struct err e;
    enum status st = stream_take_begin(&r, crafted.bytes, &e);
    while (st == ST_OK && r.last != STREAM_END) {
        if (crafted.len - r.position < STREAM_HEAD_BYTES)
            return stream_ended(&r, 0, &e);
        st = stream_take_head(&r, crafted.bytes + r.position, &f, &e);
        if (st == ST_OK)
            st = stream_take_body(&r, &f, crafted.bytes + r.position, &e);
    }
    return st;
}

static const struct stream_volume good_volume = {.n_sections = 1, .block_size = 4096, .name = "a"};
static const struct stream_section good_section = {
    .snapshot = true, .id = {1}, .size = 4096, .name = "s"};

static void volumes_that_cannot_be_are_refused(void **state)
{
    (void)state;
    craft_begin(&good_volume, &good_section);
    craft_end();
    assert_int_equal(take_crafted(), ST_OK);
    for (int i = 0; i < 8; i++) {
        struct stream_volume v = good_volume;
        switch (i) {
        case 0:
            v.n_sections = 0;
            break;
        case 1:
            v.n_sections = STREAM_SECTIONS_MAX + 1;
            break;
        case 2:
            v.n_sections = 2;
            break;
        case 3:
            v.block_size = 2048;
            break;
        case 4:
            v.block_size = 128 << 10;
            break;
        case 5:
            v.block_size = 5000;
            break;
        case 6:
            v.codec = CODEC_ZSTD + 1;
            break;
        default:
            strcpy(v.name, "../a");
        }
        craft_begin(&v, &good_section);
        craft_end();
        assert_int_equal(take_crafted(), ST_IO);
    }
}

static void sections_that_cannot_be_are_refused(void **state)
{
    (void)state;
    for (int i = 0; i < 10; i++) {
        struct stream_section s = good_section;
        switch (i) {
        case 0:
            s.size = 0;
            break;
        case 1:
            s.size = 4097;
            break;
        case 2:
            s.size = (1ull << 62) + 512;
            break;
        case 3:
            memset(s.id, 0, sizeof s.id);
            break;
        case 4:
            memcpy(s.base, s.id, sizeof s.id);
            break;
        case 5:
            s.name[0] = '\0';
            break;
        case 6:
            s.snapshot = false;
            break;
        case 7:
            s.base[0] = 9;
            break;
        case 8:
            strcpy(s.base_name, "b");
            break;
        default:
            s.name[0] = '@';
        }
        craft_begin(&good_volume, &s);
        craft_end();
        assert_int_equal(take_crafted(), ST_IO);
    }
    /* One that does not go on where the one before was, and one behind the volume itself. */
    struct stream_volume two = good_volume;
    two.n_sections = 2;
    struct stream_section second = good_section, head = {.size = 4096};
    second.id[0] = 2;
    second.name[0] = 't';
    for (int i = 0; i < 4; i++) {
        memcpy(second.base, good_section.id, sizeof second.base);
        strcpy(second.base_name, i == 3 ? "x" : "s");
        if (i == 1)
            second.base[0]++;
        if (i == 2) {
            memcpy(second.base, head.id, sizeof second.base);
            second.base_name[0] = '\0';
        }
        craft_begin(&two, i == 2 ? &head : &good_section);
        crafted.len += stream_put_section_end(&crafted.w, crafted.bytes + crafted.len);
        crafted.len += stream_put_section(&crafted.w, &second, crafted.bytes + crafted.len);
        craft_end();
        assert_int_equal(take_crafted(), i == 0 ? ST_OK : ST_IO);
    }
}

static void ranges_that_cannot_be_are_refused(void **state)
{
    (void)state;
    static const struct {
        uint64_t offset, length, then;
        enum status st;
    } cases[] = {
        {0, 4096, 0, ST_OK},       {4095, 1, 0, ST_OK},           {4096, 1, 0, ST_IO},
        {0, 4097, 0, ST_IO},    {1, 4096, 0, ST_IO},        {UINT64_MAX, 2, 0, ST_IO},
        {2, UINT64_MAX, 0, ST_IO}, {0, 100, 100, ST_OK},       {0, 100, 99, ST_IO},
        {100, 100, 1, ST_IO},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        craft_begin(&good_volume, &good_section);
        crafted.len += stream_put_zero(&crafted.w, cases[i].offset, cases[i].length, true,
                                       crafted.bytes + crafted.len);
        if (cases[i].then)
            crafted.len += stream_put_zero(&crafted.w, cases[i].then, 10, false,
                                           crafted.bytes + crafted.len);
        craft_end();
        assert_int_equal(take_crafted(), cases[i].st);
    }
}

/* Packed data under a right hash that unpacks to something else than was said. */
static void packed_data_has_its_length(void **state)
{
    (void)state;
    static uint8_t data[8192], packed[8192], out[8192];
    struct stream_frame f = {.kind = STREAM_DATA, .packed = true};
    struct err e;
    size_t n = stream_pack(data, 4096, packed);
    assert_true(n > 0 && n < 4096);
    f.body_len = (uint32_t)n;
    f.length = 4096;
    assert_int_equal(stream_unpack(&f, packed, out, &e), ST_OK);
    f.length = 4095;
    assert_int_equal(stream_unpack(&f, packed, out, &e), ST_IO);
    f.length = 4097;
    assert_int_equal(stream_unpack(&f, packed, out, &e), ST_IO);
    f.length = 4096;
    f.body_len--;
    assert_int_equal(stream_unpack(&f, packed, out, &e), ST_IO);
    /* What does not shrink is not packed. */
    struct chance c = chance_begin("pack");
    chance_fill(&c, data, sizeof data);
    assert_int_equal(stream_pack(data, sizeof data, packed), 0);
    assert_int_equal(stream_pack(data, 1, packed), 0);
}

static void other_versions_are_named(void **state)
{
    (void)state;
    struct stream_reader r;
    struct err e;
    craft_begin(&good_volume, NULL);
    assert_true(stream_is(crafted.bytes, STREAM_MARK_BYTES));
    put_le32(crafted.bytes + STREAM_MARK_BYTES, 2);
    assert_true(stream_is(crafted.bytes, STREAM_MARK_BYTES));
    assert_int_equal(stream_take_begin(&r, crafted.bytes, &e), ST_UNSUP);
    assert_non_null(strstr(e.text, "version 2"));
}

static void damaged_beginnings_are_no_images(void **state)
{
    (void)state;
    struct stream_reader r;
    struct err e;
    craft_begin(&good_volume, NULL);
    assert_false(stream_is(crafted.bytes, 0));
    for (size_t len = 1; len <= STREAM_MARK_BYTES; len++)
        assert_true(stream_is(crafted.bytes, len));
    for (unsigned n = 1; n <= 5; n++) {
        crafted.bytes[3 * n - 1] ^= 0x40;
        assert_int_equal(stream_is(crafted.bytes, STREAM_MARK_BYTES), n <= 4);
        assert_int_equal(stream_take_begin(&r, crafted.bytes, &e), ST_IO);
        assert_non_null(strstr(e.text, "damaged at byte 0"));
    }
    assert_false(stream_is(crafted.bytes, 3));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(streams_come_back),
        cmocka_unit_test(every_cut_is_noticed),
        cmocka_unit_test(every_flipped_bit_is_noticed),
        cmocka_unit_test(every_other_order_is_noticed),
        cmocka_unit_test(noise_is_refused),
        cmocka_unit_test(volumes_that_cannot_be_are_refused),
        cmocka_unit_test(sections_that_cannot_be_are_refused),
        cmocka_unit_test(ranges_that_cannot_be_are_refused),
        cmocka_unit_test(packed_data_has_its_length),
        cmocka_unit_test(other_versions_are_named),
        cmocka_unit_test(damaged_beginnings_are_no_images),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
