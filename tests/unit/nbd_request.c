/* Every rule of the transmission phase's requests (checklist B): which are taken, which are
 * answered with which error, and how many bytes of payload each brings. */
#include "test.h"

#include "base/bytes.h"
#include "nbd/proto.h"
#include "nbd/request.h"

#define SIZE ((uint64_t)1 << 30)

static const uint32_t ids[] = {1, 2};

static const struct nbd_session compact = {.size = SIZE};
static const struct nbd_session structured = {
    .structured = true, .size = SIZE, .n_contexts = 2, .context_ids = ids};
static const struct nbd_session extended = {
    .extended = true, .size = SIZE, .n_contexts = 2, .context_ids = ids};
static const struct nbd_session read_only = {.structured = true, .read_only = true, .size = SIZE};

static struct nbd_request request;

static enum nbd_verdict parse(const struct nbd_session *s, unsigned command, unsigned flags,
                              uint64_t offset, uint64_t length)
{
    uint8_t head[32];
    memset(&request, 0xee, sizeof request);
    put_be32(head, s->extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);
    put_be16(head + 4, (uint16_t)flags);
    put_be16(head + 6, (uint16_t)command);
    memcpy(head + 8, "\x01\x02\x03\x04\x05\x06\x07\x08", 8);
    put_be64(head + 16, offset);
    if (s->extended)
        put_be64(head + 24, length);
    else
        put_be32(head + 24, (uint32_t)length);
    enum nbd_verdict v = nbd_request_parse(s, head, &request);
    assert_memory_equal(&request.cookie, "\x01\x02\x03\x04\x05\x06\x07\x08", 8);
    return v;
}

static void ok(const struct nbd_session *s, unsigned command, unsigned flags, uint64_t offset,
               uint64_t length, uint32_t payload)
{
    assert_int_equal(parse(s, command, flags, offset, length), NBD_REQUEST_OK);
    assert_int_equal(request.command, command);
    assert_int_equal(request.payload_len, payload);
    assert_true(request.offset == offset && request.length == length);
}

static void refused(const struct nbd_session *s, unsigned command, unsigned flags,
                    uint64_t offset, uint64_t length, uint32_t error, uint32_t payload)
{
    assert_int_equal(parse(s, command, flags, offset, length), NBD_REQUEST_REFUSE);
    assert_int_equal(request.error, error);
    assert_int_equal(request.payload_len, payload);
}

static void magic(void **state)
{
    (void)state;
    uint8_t head[32] = {0};
    assert_int_equal(nbd_request_parse(&compact, head, &request), NBD_REQUEST_DISCONNECT);
    assert_int_equal(nbd_request_parse(&extended, head, &request), NBD_REQUEST_DISCONNECT);
    put_be32(head, NBD_EXTENDED_REQUEST_MAGIC);
    assert_int_equal(nbd_request_parse(&compact, head, &request), NBD_REQUEST_DISCONNECT);
    put_be32(head, NBD_REQUEST_MAGIC);
    assert_int_equal(nbd_request_parse(&extended, head, &request), NBD_REQUEST_DISCONNECT);
}

static void plain(void **state)
{
    (void)state;
    ok(&compact, NBD_CMD_READ, 0, 0, 4096, 0);
    ok(&compact, NBD_CMD_READ, 0, 1, 1, 0);
    ok(&compact, NBD_CMD_READ, NBD_CMD_FLAG_FUA, SIZE - 1, 1, 0);
    ok(&compact, NBD_CMD_WRITE, 0, 5, 7, 7);
    ok(&compact, NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 0, 32u << 20, 32u << 20);
    ok(&compact, NBD_CMD_DISC, 0, 0, 0, 0);
    ok(&compact, NBD_CMD_DISC, 0xffff, 99, 99, 0);
    /* Nothing is waited for behind it, whatever it announces. */
    ok(&extended, NBD_CMD_DISC, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 12288, 0);
    ok(&compact, NBD_CMD_FLUSH, NBD_CMD_FLAG_FUA, 0, 0, 0);
    ok(&compact, NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, 0, SIZE, 0);
    ok(&compact, NBD_CMD_CACHE, 0, 0, SIZE, 0);
    ok(&compact, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, 0, SIZE, 0);
    ok(&structured, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, 0, SIZE, 0);
    ok(&structured, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 65536, 0);
    ok(&extended, NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 100, 100);
}

static void length_zero(void **state)
{
    (void)state;
    ok(&compact, NBD_CMD_READ, 0, 0, 0, 0);
    ok(&compact, NBD_CMD_WRITE, 0, SIZE, 0, 0);
    ok(&compact, NBD_CMD_TRIM, 0, 0, 0, 0);
    ok(&compact, NBD_CMD_WRITE_ZEROES, 0, 0, 0, 0);
    ok(&extended, NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 0, 0);
    refused(&structured, NBD_CMD_BLOCK_STATUS, 0, 0, 0, NBD_EINVAL, 0);
}

static void past_the_end(void **state)
{
    (void)state;
    static const struct nbd_session *const all[] = {&compact, &structured, &extended};
    for (size_t i = 0; i < 3; i++) {
        const struct nbd_session *s = all[i];
        unsigned payload = s->extended ? NBD_CMD_FLAG_PAYLOAD_LEN : 0;
        static const uint64_t offsets[] = {SIZE, SIZE - 99, UINT64_MAX, UINT64_MAX - 99};
        for (size_t k = 0; k < 4; k++) {
            refused(s, NBD_CMD_READ, 0, offsets[k], 100, NBD_EINVAL, 0);
            refused(s, NBD_CMD_TRIM, 0, offsets[k], 100, NBD_EINVAL, 0);
            refused(s, NBD_CMD_CACHE, 0, offsets[k], 100, NBD_EINVAL, 0);
            refused(s, NBD_CMD_BLOCK_STATUS, 0, offsets[k], 100, NBD_EINVAL, 0);
            refused(s, NBD_CMD_WRITE, payload, offsets[k], 100, NBD_ENOSPC, 100);
            refused(s, NBD_CMD_WRITE_ZEROES, 0, offsets[k], 100, NBD_ENOSPC, 0);
        }
    }
    refused(&extended, NBD_CMD_TRIM, 0, 1, UINT64_MAX, NBD_EINVAL, 0);
    refused(&extended, NBD_CMD_WRITE_ZEROES, 0, 1, UINT64_MAX, NBD_ENOSPC, 0);
    refused(&extended, NBD_CMD_READ, 0, 1, UINT64_MAX, NBD_EINVAL, 0);
}

static void too_long(void **state)
{
    (void)state;
    const uint32_t most = 32u << 20;
    refused(&compact, NBD_CMD_READ, 0, 0, most + 1, NBD_EINVAL, 0);
    refused(&structured, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, most + 1, NBD_EOVERFLOW, 0);
    refused(&compact, NBD_CMD_WRITE, 0, 0, most + 1, NBD_EINVAL, most + 1);
    assert_int_equal(parse(&compact, NBD_CMD_WRITE, 0, 0, UINT32_MAX), NBD_REQUEST_DISCONNECT);
    assert_int_equal(parse(&extended, NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, most + 1),
                     NBD_REQUEST_DISCONNECT);
    assert_int_equal(parse(&extended, NBD_CMD_READ, NBD_CMD_FLAG_PAYLOAD_LEN, 0, UINT64_MAX),
                     NBD_REQUEST_DISCONNECT);

    struct nbd_session big = extended;
    big.size = 1ull << 62;
    ok(&big, NBD_CMD_TRIM, 0, 0, 1ull << 62, 0);
    ok(&big, NBD_CMD_WRITE_ZEROES, 0, 0, 1ull << 62, 0);
    ok(&big, NBD_CMD_BLOCK_STATUS, 0, 0, 1ull << 62, 0);
    big.extended = false;
    big.structured = true;
    ok(&big, NBD_CMD_TRIM, 0, 1ull << 61, UINT32_MAX, 0);
    ok(&big, NBD_CMD_BLOCK_STATUS, 0, 0, UINT32_MAX, 0);
}

static void flags(void **state)
{
    (void)state;
    refused(&compact, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 1, NBD_EINVAL, 0);
    refused(&structured, NBD_CMD_READ, NBD_CMD_FLAG_NO_HOLE, 0, 1, NBD_EINVAL, 0);
    refused(&structured, NBD_CMD_WRITE, NBD_CMD_FLAG_DF, 0, 9, NBD_EINVAL, 9);
    refused(&structured, NBD_CMD_WRITE, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 9, NBD_EINVAL, 9);
    refused(&compact, NBD_CMD_TRIM, NBD_CMD_FLAG_FAST_ZERO, 0, 1, NBD_EINVAL, 0);
    refused(&compact, NBD_CMD_FLUSH, NBD_CMD_FLAG_NO_HOLE, 0, 0, NBD_EINVAL, 0);
    refused(&compact, NBD_CMD_CACHE, NBD_CMD_FLAG_REQ_ONE, 0, 1, NBD_EINVAL, 0);
    refused(&compact, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_DF, 0, 1, NBD_EINVAL, 0);
    refused(&structured, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_DF, 0, 1, NBD_EINVAL, 0);
    for (unsigned bit = 6; bit < 16; bit++)
        refused(&extended, NBD_CMD_READ, 1u << bit, 0, 1, NBD_EINVAL, 0);
}

static void unknown_commands(void **state)
{
    (void)state;
    refused(&compact, 8, 0, 0, 1, NBD_EINVAL, 0);
    refused(&compact, 0xffff, 0, 0, 1, NBD_EINVAL, 0);
    refused(&extended, 77, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 50, NBD_EINVAL, 50);
    refused(&compact, NBD_CMD_FLUSH, 0, 1, 0, NBD_EINVAL, 0);
    refused(&compact, NBD_CMD_FLUSH, 0, 0, 1, NBD_EINVAL, 0);
}

static void read_only_exports(void **state)
{
    (void)state;
    refused(&read_only, NBD_CMD_WRITE, 0, 0, 10, NBD_EPERM, 10);
    refused(&read_only, NBD_CMD_WRITE, 0, SIZE, 10, NBD_EPERM, 10);
    refused(&read_only, NBD_CMD_WRITE_ZEROES, 0, 0, 10, NBD_EPERM, 0);
    refused(&read_only, NBD_CMD_TRIM, 0, 0, 10, NBD_EPERM, 0);
    ok(&read_only, NBD_CMD_FLUSH, 0, 0, 0, 0);
    ok(&read_only, NBD_CMD_READ, 0, 0, 10, 0);
    ok(&read_only, NBD_CMD_CACHE, 0, 0, 10, 0);
}

static void stray_payloads(void **state)
{
    (void)state;
    refused(&extended, NBD_CMD_READ, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 512, NBD_EINVAL, 512);
    refused(&extended, NBD_CMD_TRIM, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 512, NBD_EINVAL, 512);
    refused(&extended, NBD_CMD_FLUSH, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 512, NBD_EINVAL, 512);
    refused(&extended, NBD_CMD_WRITE, 0, 0, 512, NBD_EINVAL, 0);
}

static void block_status(void **state)
{
    (void)state;
    refused(&compact, NBD_CMD_BLOCK_STATUS, 0, 0, 10, NBD_EINVAL, 0);
    struct nbd_session none = extended;
    none.n_contexts = 0;
    refused(&none, NBD_CMD_BLOCK_STATUS, 0, 0, 10, NBD_EINVAL, 0);
    refused(&none, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 12, NBD_EINVAL, 12);

    static const uint32_t bad[] = {1, 8, 11, 13, 14, 20, 4096};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        refused(&extended, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_PAYLOAD_LEN, 0, bad[i], NBD_EINVAL,
                bad[i]);

    uint8_t payload[16];
    uint32_t wanted;
    put_be64(payload, SIZE);
    put_be32(payload + 8, 2);
    ok(&extended, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 12, 12);
    assert_true(nbd_request_has_status_payload(&request));
    assert_int_equal(nbd_request_parse_status(&extended, payload, &request, &wanted),
                     NBD_REQUEST_OK);
    assert_int_equal(wanted, 2);
    assert_true(request.length == SIZE);

    put_be32(payload + 12, 1);
    ok(&extended, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_PAYLOAD_LEN, 0, 16, 16);
    assert_int_equal(nbd_request_parse_status(&extended, payload, &request, &wanted),
                     NBD_REQUEST_OK);
    assert_int_equal(wanted, 3);

    /* The same context twice, one that was not selected, a length outside, a length of 0. */
    put_be32(payload + 12, 2);
    assert_int_equal(nbd_request_parse_status(&extended, payload, &request, &wanted),
                     NBD_REQUEST_REFUSE);
    put_be32(payload + 12, 3);
    assert_int_equal(nbd_request_parse_status(&extended, payload, &request, &wanted),
                     NBD_REQUEST_REFUSE);
    put_be32(payload + 12, 1);
    put_be64(payload, SIZE + 1);
    assert_int_equal(nbd_request_parse_status(&extended, payload, &request, &wanted),
                     NBD_REQUEST_REFUSE);
    put_be64(payload, 0);
    assert_int_equal(nbd_request_parse_status(&extended, payload, &request, &wanted),
                     NBD_REQUEST_REFUSE);
    assert_int_equal(request.error, NBD_EINVAL);
}

/* Any header whatever gets a verdict, and never more payload than may be borne. */
static void any_bytes(void **state)
{
    (void)state;
    unsigned seed = 1;
    for (int i = 0; i < 200000; i++) {
        const struct nbd_session *s = i & 1 ? &extended : &structured;
        uint8_t head[32];
        for (size_t k = 0; k < sizeof head; k++)
            head[k] = (uint8_t)rand_r(&seed);
        put_be32(head, s->extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);
        if (i & 2)
            put_be16(head + 6, (uint16_t)(rand_r(&seed) % 9));
        if (i & 4)
            put_be64(head + 16, (uint64_t)rand_r(&seed) % (SIZE + 9));
        struct nbd_request r;
        if (nbd_request_parse(s, head, &r) == NBD_REQUEST_DISCONNECT)
            continue;
        assert_true(r.payload_len <= 64u << 20);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(magic),          cmocka_unit_test(plain),
        cmocka_unit_test(length_zero),    cmocka_unit_test(past_the_end),
        cmocka_unit_test(too_long),       cmocka_unit_test(flags),
        cmocka_unit_test(unknown_commands), cmocka_unit_test(read_only_exports),
        cmocka_unit_test(stray_payloads), cmocka_unit_test(block_status),
        cmocka_unit_test(any_bytes),
    };
    return cmocka_run_group_tests_name("nbd_request", tests, NULL, NULL);
}
