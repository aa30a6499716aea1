/* Replies to the byte, in the three styles. */
#include "test.h"

#include "nbd/reply.h"
#include "nbd/request.h"

static const uint64_t cookie = 0x1122334455667788u;

static struct nbd_reply_to to(bool structured, bool extended)
{
    return (struct nbd_reply_to){
        .cookie = cookie, .offset = 0x1000, .structured = structured, .extended = extended};
}

static void check_bytes(const uint8_t *got, size_t got_len, const char *hex)
{
    size_t len = strlen(hex) / 2;
    assert_int_equal(got_len, len);
    for (size_t i = 0; i < len; i++) {
        const char pair[] = {hex[2 * i], hex[2 * i + 1], 0};
        assert_int_equal(got[i], strtoul(pair, NULL, 16));
    }
}

/* The cookie leaves as the bytes that came in, whatever the machine's byte order. */
#define COOKIE "8877665544332211"

static void simple_replies(void **state)
{
    (void)state;
    uint8_t p[NBD_REPLY_HEAD_MAX];
    struct nbd_reply_to t = to(false, false);
    check_bytes(p, nbd_put_simple(p, cookie, 0), "67446698" "00000000" COOKIE);
    check_bytes(p, nbd_put_success(p, &t, true), "67446698" "00000000" COOKIE);
    check_bytes(p, nbd_put_error(p, &t, NBD_EIO, 0), "67446698" "00000005" COOKIE);
}

static void structured_replies(void **state)
{
    (void)state;
    uint8_t p[NBD_REPLY_HEAD_MAX];
    struct nbd_reply_to t = to(true, false);
    check_bytes(p, nbd_put_success(p, &t, false), "67446698" "00000000" COOKIE);
    check_bytes(p, nbd_put_success(p, &t, true), "668e33ef" "0001" "0000" COOKIE "00000000");
    check_bytes(p, nbd_put_data(p, &t, 0, 0x2000, 512),
                "668e33ef" "0000" "0001" COOKIE "00000208" "0000000000002000");
    check_bytes(p, nbd_put_hole(p, &t, NBD_REPLY_FLAG_DONE, 0x2000, 512),
                "668e33ef" "0001" "0002" COOKIE "0000000c" "0000000000002000" "00000200");
    check_bytes(p, nbd_put_status(p, &t, 1, 7, 2), "668e33ef" "0001" "0005" COOKIE "00000014"
                                                   "00000007");
    check_bytes(p, nbd_put_extent(p, false, 4096, 3), "00001000" "00000003");
    check_bytes(p, nbd_put_error(p, &t, NBD_EPERM, 0),
                "668e33ef" "0001" "8001" COOKIE "00000006" "00000001" "0000");
    check_bytes(p, nbd_put_error(p, &t, NBD_EPERM, 300),
                "668e33ef" "0001" "8001" COOKIE "00000132" "00000001" "012c");
    check_bytes(p, nbd_put_error_offset(p, &t, NBD_EIO, 0x3000),
                "668e33ef" "0001" "8002" COOKIE "0000000e" "00000005" "0000" "0000000000003000");
}

#define EXTENDED_OFFSET "0000000000001000"

static void extended_replies(void **state)
{
    (void)state;
    uint8_t p[NBD_REPLY_HEAD_MAX];
    struct nbd_reply_to t = to(true, true);
    check_bytes(p, nbd_put_success(p, &t, false),
                "6e8a278c" "0001" "0000" COOKIE EXTENDED_OFFSET "0000000000000000");
    check_bytes(p, nbd_put_data(p, &t, 1, 0x2000, 512),
                "6e8a278c" "0001" "0001" COOKIE EXTENDED_OFFSET "0000000000000208"
                "0000000000002000");
    check_bytes(p, nbd_put_hole(p, &t, 0, 0x2000, 512),
                "6e8a278c" "0000" "0002" COOKIE EXTENDED_OFFSET "000000000000000c"
                "0000000000002000" "00000200");
    check_bytes(p, nbd_put_status(p, &t, 0, 7, 1),
                "6e8a278c" "0000" "0006" COOKIE EXTENDED_OFFSET "0000000000000018"
                "00000007" "00000001");
    check_bytes(p, nbd_put_extent(p, true, 1ull << 40, 3), "0000010000000000" "0000000000000003");
    check_bytes(p, nbd_put_error(p, &t, NBD_ENOSPC, 0),
                "6e8a278c" "0001" "8001" COOKIE EXTENDED_OFFSET "0000000000000006"
                "0000001c" "0000");
    size_t n = nbd_put_error_offset(p, &t, NBD_EIO, 0x3000);
    assert_true(n <= NBD_REPLY_HEAD_MAX);
}

static void errors(void **state)
{
    (void)state;
    assert_int_equal(nbd_error_of(ST_OK), NBD_SUCCESS);
    assert_int_equal(nbd_error_of(ST_IO), NBD_EIO);
    assert_int_equal(nbd_error_of(ST_NOSPC), NBD_ENOSPC);
    assert_int_equal(nbd_error_of(ST_PERM), NBD_EPERM);
    assert_int_equal(nbd_error_of(ST_SHUTDOWN), NBD_ESHUTDOWN);
    for (int st = ST_IO; st <= ST_FORMAT; st++) {
        uint32_t error = nbd_error_of((enum status)st);
        assert_int_not_equal(error, NBD_SUCCESS);
        assert_int_not_equal(error, NBD_ENOTSUP);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(simple_replies),
        cmocka_unit_test(structured_replies),
        cmocka_unit_test(extended_replies),
        cmocka_unit_test(errors),
    };
    return cmocka_run_group_tests_name("nbd_reply", tests, NULL, NULL);
}
