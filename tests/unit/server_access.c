/* The access file, its rules and whom they fit: src/server/access.h; and who a client is: peer.h. */
#include "test.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/mem.h"
#include "chance.h"
#include "server/access.h"

static bool find_user(const char *name, uint32_t *uid)
{
    *uid = 1000;
    return strcmp(name, "alice") == 0;
}

static enum status parse(struct access **a, const char *text, struct err *e)
{
    *e = (struct err){0};
    return access_parse(a, "F", (const uint8_t *)text, strlen(text), find_user, e);
}

static struct access *rules(const char *text)
{
    struct access *a;
    struct err e;
    if (parse(&a, text, &e) != ST_OK)
        fail_msg("%s", e.text);
    return a;
}

static enum access_right right(struct access *a, const struct peer *p, const char *volume,
                               const char *snapshot)
{
    struct access_view *view = access_view_new(a, p);
    enum access_right is = access_view_right(view, volume, snapshot);
    access_view_free(view);
    return is;
}

static struct peer local(uint32_t uid)
{
    return (struct peer){.way = PEER_UNIX, .has_uid = true, .uid = uid};
}

static struct peer remote(const char *address)
{
    struct peer p;
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(5)};
    struct sockaddr_in6 in6 = {.sin6_family = AF_INET6, .sin6_port = htons(5)};
    if (inet_pton(AF_INET, address, &in.sin_addr) == 1) {
        peer_fill(&p, -1, (struct sockaddr *)&in, sizeof in);
    } else {
        assert_int_equal(inet_pton(AF_INET6, address, &in6.sin6_addr), 1);
        peer_fill(&p, -1, (struct sockaddr *)&in6, sizeof in6);
    }
    return p;
}

static struct peer certified(const char *dn, const char *cn)
{
    struct peer p = remote("192.0.2.1");
    p.tls = PEER_TLS_CERTIFICATE;
    snprintf(p.tls_name, sizeof p.tls_name, "%s", dn);
    snprintf(p.tls_common_name, sizeof p.tls_common_name, "%s", cn);
    return p;
}

static void without_rules_all_is_allowed(void **state)
{
    (void)state;
    struct peer p = remote("192.0.2.1");
    assert_int_equal(right(NULL, &p, "v", ""), ACCESS_WRITE);
    assert_int_equal(right(NULL, &p, "v", "s"), ACCESS_READ);
}

static void what_no_rule_grants_is_denied(void **state)
{
    (void)state;
    struct access *none = rules("# nobody\n\n"), *one = rules("user:alice rw v");
    struct peer alice = local(1000), root = local(0), far = remote("192.0.2.1"), odd = {0};
    assert_int_equal(right(none, &root, "v", ""), ACCESS_NONE);
    assert_int_equal(right(one, &alice, "v", ""), ACCESS_WRITE);
    assert_int_equal(right(one, &alice, "v2", ""), ACCESS_NONE);
    assert_int_equal(right(one, &root, "v", ""), ACCESS_NONE);
    assert_int_equal(right(one, &far, "v", ""), ACCESS_NONE);
    /* A socket whose other side is not known is nobody, not uid 0. */
    access_release(one);
    one = rules("user:0 rw *");
    assert_int_equal(right(one, &root, "v", ""), ACCESS_WRITE);
    assert_int_equal(right(one, &odd, "v", ""), ACCESS_NONE);
    access_release(one);
    access_release(none);
}

static void grants_add_up_in_any_order(void **state)
{
    (void)state;
    static const char *const orders[] = {"any ro *\nuser:1000 rw v\nuser:1000 ro v\n",
                                         "user:1000 ro v\nuser:1000 rw v\nany ro *\n"};
    for (int i = 0; i < 2; i++) {
        struct access *a = rules(orders[i]);
        struct peer alice = local(1000), bob = local(1001);
        assert_int_equal(right(a, &alice, "v", ""), ACCESS_WRITE);
        assert_int_equal(right(a, &alice, "w", ""), ACCESS_READ);
        assert_int_equal(right(a, &bob, "v", ""), ACCESS_READ);
        assert_int_equal(access_count(a).rules, 3);
        access_release(a);
    }
}

static void a_volume_comes_with_its_snapshots_and_not_the_other_way_round(void **state)
{
    (void)state;
    struct access *a = rules("any rw v\nany ro w@daily-* x*@s");
    struct peer p = local(5);
    assert_int_equal(right(a, &p, "v", ""), ACCESS_WRITE);
    assert_int_equal(right(a, &p, "v", "any"), ACCESS_READ);
    assert_int_equal(right(a, &p, "w", ""), ACCESS_NONE);
    assert_int_equal(right(a, &p, "w", "daily-1"), ACCESS_READ);
    assert_int_equal(right(a, &p, "w", "weekly-1"), ACCESS_NONE);
    assert_int_equal(right(a, &p, "xyz", "s"), ACCESS_READ);
    assert_int_equal(right(a, &p, "xyz", "t"), ACCESS_NONE);
    access_release(a);
}

static void stars_stand_for_any_text(void **state)
{
    (void)state;
    static const struct {
        const char *pattern, *name;
        bool fit;
    } cases[] = {{"*", "v", true},          {"vm*", "vm", true},     {"vm*", "vn1", false},
                 {"*-disk", "a-disk", true}, {"*-disk", "disk", false}, {"a*b*c", "a-b-b-c", true},
                 {"a*b*c", "a-b-b", false}, {"v", "v1", false},      {"v1", "v", false},
                 {"**", "x", true},         {"*a*a*b", "aaaa", false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char line[64];
        struct peer p = local(1);
        snprintf(line, sizeof line, "any ro %s", cases[i].pattern);
        struct access *a = rules(line);
        assert_int_equal(right(a, &p, cases[i].name, "") == ACCESS_READ, cases[i].fit);
        access_release(a);
    }
}

static void addresses_fit_their_ranges(void **state)
{
    (void)state;
    static const struct {
        const char *range, *address;
        bool fit;
    } cases[] = {{"10.0.0.0/8", "10.255.0.1", true},
                 {"10.0.0.0/8", "11.0.0.1", false},
                 {"192.0.2.1", "192.0.2.1", true},
                 {"192.0.2.1", "192.0.2.2", false},
                 {"192.0.2.128/25", "192.0.2.127", false},
                 {"192.0.2.128/25", "192.0.2.255", true},
                 {"0.0.0.0/0", "8.8.8.8", true},
                 {"0.0.0.0/0", "2001:db8::1", false},
                 {"::/0", "2001:db8::1", true},
                 {"::/0", "10.0.0.1", false},
                 {"2001:db8::/33", "2001:db8:7fff::1", true},
                 {"2001:db8::/33", "2001:db8:8000::1", false},
                 {"::1", "::1", true},
                 /* How an IPv4 client looks on a socket for both. */
                 {"10.0.0.0/8", "::ffff:10.1.2.3", true},
                 {"::/0", "::ffff:10.1.2.3", false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char line[80];
        struct peer p = remote(cases[i].address), u = local(0);
        snprintf(line, sizeof line, "address:%s ro *", cases[i].range);
        struct access *a = rules(line);
        assert_int_equal(right(a, &p, "v", "") == ACCESS_READ, cases[i].fit);
        assert_int_equal(right(a, &u, "v", ""), ACCESS_NONE);
        access_release(a);
    }
}

static void names_of_certificates_and_keys(void **state)
{
    (void)state;
    struct access *a = rules("cn:vm-* ro a\n"
                             "dn:\"CN=vm-1,O=Ex \\\"am\\\" ple\" ro b\n"
                             "psk:alice ro c\n"
                             "cn:* ro d\npsk:* ro e\n"
                             "dn:CN=Doe\\,J,O=* ro f\n");
    struct peer vm = certified("CN=vm-1,O=Ex \"am\" ple", "vm-1");
    struct peer other = certified("CN=other", "other"), unverified = certified("", "");
    struct peer plain = vm, key = vm, keyless = vm, doe = certified("CN=Doe\\,J,O=x", "");
    plain.tls = PEER_PLAIN;
    key.tls = keyless.tls = PEER_TLS_PSK;
    strcpy(key.tls_name, "alice");
    keyless.tls_name[0] = '\0';
    assert_int_equal(right(a, &vm, "a", ""), ACCESS_READ);
    assert_int_equal(right(a, &vm, "b", ""), ACCESS_READ);
    assert_int_equal(right(a, &vm, "c", ""), ACCESS_NONE);
    assert_int_equal(right(a, &vm, "d", ""), ACCESS_READ);
    assert_int_equal(right(a, &vm, "e", ""), ACCESS_NONE);
    assert_int_equal(right(a, &other, "a", ""), ACCESS_NONE);
    assert_int_equal(right(a, &other, "b", ""), ACCESS_NONE);
    assert_int_equal(right(a, &other, "d", ""), ACCESS_READ);
    assert_int_equal(right(a, &key, "c", ""), ACCESS_READ);
    assert_int_equal(right(a, &key, "e", ""), ACCESS_READ);
    /* (A common name left over from before does not count with a key.) */
    assert_int_equal(right(a, &key, "a", ""), ACCESS_NONE);
    static const char *const volumes[] = {"a", "b", "c", "d", "e", "f"};
    for (int i = 0; i < 6; i++) {
        assert_int_equal(right(a, &plain, volumes[i], ""), ACCESS_NONE);
        assert_int_equal(right(a, &unverified, volumes[i], ""), ACCESS_NONE);
        assert_int_equal(right(a, &keyless, volumes[i], ""), ACCESS_NONE);
    }
    /* In a whole name a star is a star: else a name could be made up that fits. */
    assert_int_equal(right(a, &doe, "f", ""), ACCESS_NONE);
    strcpy(doe.tls_name, "CN=Doe\\,J,O=*");
    assert_int_equal(right(a, &doe, "f", ""), ACCESS_READ);
    assert_int_equal(access_count(a).certificates, 4);
    assert_int_equal(access_count(a).psk, 2);
    access_release(a);
}

static void a_byte_order_mark_is_no_part_of_the_first_line(void **state)
{
    (void)state;
    struct access *a;
    struct err e = {0};
    const char *text = "\xef\xbb\xbf" "any rw v\n";
    assert_int_equal(access_parse(&a, "F", (const uint8_t *)text, strlen(text), find_user, &e),
                     ST_OK);
    assert_int_equal(access_count(a).rules, 1);
    access_release(a);
}

static void what_is_wrong_is_named_with_its_line(void **state)
{
    (void)state;
    static const char *const wrong[][2] = {
        {"any rw v\nall rw v\n", "F:2: \"all\" is no client"},
        {"alice:0123456789abcdef\n", "F:1: \"alice:\" is no client"},
        {"any\n", "F:1: behind the client stands ro"},
        {"any # ro v\n", "F:1: behind the client stands ro"},
        {"any read v\n", "F:1: behind the client stands ro (read only) or rw (read and write), not"},
        {"\n\nany ro # v\n", "F:3: which volumes?"},
        {"any ro v,w", "F:1: \"v,w\" is neither"},
        {"any ro v@", "F:1: \"v@\" is neither"},
        {"any ro @s", "F:1: \"@s\" is neither"},
        {"any ro v@s@t", "F:1: \"v@s@t\" is neither"},
        {"any ro /v", "F:1: \"/v\" is neither"},
        {"any ro \"\"", "F:1: \"\" is neither"},
        {"any rw v v@s", "F:1: nobody can write a snapshot"},
        {"user: ro v", "F:1: \"user:\" lacks the name"},
        {"user:bob ro v", "F:1: there is no user \"bob\""},
        {"user:4294967295 ro v", "F:1: 4294967295 is not the number"},
        {"user:99999999999999999999 ro v", "F:1: 99999999999999999999 is not"},
        {"user:-1 ro v", "F:1: there is no user \"-1\""},
        {"address:10.0.0 ro v", "F:1: \"10.0.0\" is not an address"},
        {"address:host ro v", "F:1: \"host\" is not an address"},
        {"address:10.0.0.0/33 ro v", "F:1: \"10.0.0.0/33\": what is behind"},
        {"address:10.0.0.0/ ro v", "F:1: \"10.0.0.0/\": what is behind"},
        {"address:10.0.0.0/8x ro v", "F:1: \"10.0.0.0/8x\": what is behind"},
        {"address:10.0.0.1/8 ro v", "F:1: \"10.0.0.1/8\" has more bits"},
        {"address:2001:db8::1/32 ro v", "F:1: \"2001:db8::1/32\" has more bits"},
        {"address:::ffff:10.0.0.1 ro v", "F:1: \"::ffff:10.0.0.1\": write it as an IPv4"},
        {"cn:\"a ro v", "F:1: a quoted name has no end"},
        {"any ro v\n\nany ro \x01\n", "F:3: there is a control character"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct access *a;
        struct err e;
        if (parse(&a, wrong[i][0], &e) != ST_INVAL ||
            strncmp(e.text, wrong[i][1], strlen(wrong[i][1])) != 0)
            fail_msg("%s: %s, not %s", wrong[i][0], e.text, wrong[i][1]);
    }
}

/* `n` times the line. */
static enum status parse_many(const char *line, size_t n, struct err *e)
{
    size_t len = strlen(line);
    char *text = mem_alloc(n * len + 1);
    struct access *a;
    for (size_t i = 0; i < n; i++)
        memcpy(text + i * len, line, len + 1);
    *e = (struct err){0};
    enum status st = access_parse(&a, "F", (uint8_t *)text, n * len, find_user, e);
    if (st == ST_OK)
        access_release(a);
    free(text);
    return st;
}

static void limits_hold(void **state)
{
    (void)state;
    struct err e;
    assert_int_equal(parse_many("any ro v\n", ACCESS_RULES_MAX, &e), ST_OK);
    assert_int_equal(parse_many("any ro v\n", ACCESS_RULES_MAX + 1, &e), ST_INVAL);
    assert_string_equal(e.text, "F:10001: more than 10000 rules");
    assert_int_equal(parse_many("any ro v v v\n", ACCESS_VOLUMES_MAX / 3, &e), ST_OK);
    assert_int_equal(parse_many("any ro v v v\n", ACCESS_VOLUMES_MAX / 3 + 1, &e), ST_INVAL);
    assert_int_equal(parse_many("\n", ACCESS_LINES_MAX, &e), ST_OK);
    assert_int_equal(parse_many("\n", ACCESS_LINES_MAX + 1, &e), ST_INVAL);
    assert_int_equal(parse_many("#", ACCESS_LINE_BYTES_MAX, &e), ST_OK);
    assert_int_equal(parse_many("#", ACCESS_LINE_BYTES_MAX + 1, &e), ST_INVAL);
    assert_int_equal(parse_many("#", ACCESS_BYTES_MAX + 1, &e), ST_INVAL);

    char line[400];
    memset(line, 'a', sizeof line);
    memcpy(line, "cn:", 3);
    strcpy(line + 3 + PEER_NAME_BYTES - 1, " ro v");
    assert_int_equal(parse_many(line, 1, &e), ST_OK);
    strcpy(line + 3 + PEER_NAME_BYTES - 1, "a ro v");
    assert_int_equal(parse_many(line, 1, &e), ST_INVAL);
}

/* Whatever the bytes: an answer, and the bytes untouched. */
static void any_bytes_are_answered(void **state)
{
    (void)state;
    static const char *const pieces[] = {"any", "ro", "rw", " ", "\t", "\n", "v", "@", "*", "\"",
                                         "\\", "user:", "address:", "10.0.0.0", "/8", "cn:", "dn:",
                                         "psk:", "#", "::", "0", "alice", "\r", "\x80", "\x01"};
    struct chance chance = chance_begin(__func__);
    struct peer p = certified("CN=v", "v");
    unsigned good = 0;
    for (int round = 0; round < 50000; round++) {
        char text[128] = "", copy[128];
        size_t len = 0;
        for (uint64_t n = chance_below(&chance, 12); n > 0; n--) {
            uint64_t which = chance_below(&chance, 2 * sizeof pieces / sizeof *pieces);
            const char *piece = which % 2 ? pieces[which / 2] : " ";
            memcpy(text + len, piece, strlen(piece) + 1);
            len += strlen(piece);
        }
        memcpy(copy, text, sizeof copy);
        struct access *a = NULL;
        struct err e = {0};
        enum status st = access_parse(&a, "F", (uint8_t *)text, len, find_user, &e);
        assert_true(st == ST_OK ? a && !e.text[0] : strncmp(e.text, "F:", 2) == 0);
        assert_memory_equal(text, copy, sizeof copy);
        if (st != ST_OK)
            continue;
        right(a, &p, "v", "v");
        good += access_count(a).rules > 0;
        access_release(a);
    }
    assert_true(good > 0);
}

static void a_view_outlives_the_rules_that_are_replaced(void **state)
{
    (void)state;
    struct access *a = rules("any rw v");
    struct peer p = local(1);
    struct access_view *view = access_view_new(a, &p);
    access_release(a);
    assert_int_equal(access_view_right(view, "v", ""), ACCESS_WRITE);
    access_view_free(view);
}

static void peers_are_who_they_are(void **state)
{
    (void)state;
    struct peer p = remote("::ffff:192.0.2.7");
    assert_string_equal(p.address, "192.0.2.7:5");
    assert_string_equal(p.host, "192.0.2.7");
    p = remote("2001:db8::7");
    assert_string_equal(p.address, "[2001:db8::7]:5");
    assert_string_equal(p.host, "2001:db8::7");
    assert_int_equal(p.ip_bytes, 16);
    assert_int_equal(p.port, 5);
    static const char *const here[] = {"127.0.0.1", "127.3.0.1", "::1", "::ffff:127.0.0.1"};
    for (size_t i = 0; i < 4; i++) {
        p = remote(here[i]);
        assert_string_equal(p.host, "local");
    }

    int pair[2];
    char text[PEER_TEXT_BYTES], want[64];
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    peer_fill(&p, pair[0], (struct sockaddr *)&un, sizeof un.sun_family);
    assert_true(p.way == PEER_UNIX && p.has_uid && p.uid == getuid() && p.gid == getgid());
    assert_string_equal(p.host, "local");
    snprintf(want, sizeof want, "unix socket (uid %u)", getuid());
    assert_string_equal(peer_text(&p, text), want);
    close(pair[0]);
    close(pair[1]);

    p = certified("CN=a", "a");
    assert_string_equal(peer_text(&p, text), "192.0.2.1:5, certificate CN=a");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_rules_all_is_allowed),
        cmocka_unit_test(what_no_rule_grants_is_denied),
        cmocka_unit_test(grants_add_up_in_any_order),
        cmocka_unit_test(a_volume_comes_with_its_snapshots_and_not_the_other_way_round),
        cmocka_unit_test(stars_stand_for_any_text),
        cmocka_unit_test(addresses_fit_their_ranges),
        cmocka_unit_test(names_of_certificates_and_keys),
        cmocka_unit_test(a_byte_order_mark_is_no_part_of_the_first_line),
        cmocka_unit_test(what_is_wrong_is_named_with_its_line),
        cmocka_unit_test(limits_hold),
        cmocka_unit_test(any_bytes_are_answered),
        cmocka_unit_test(a_view_outlives_the_rules_that_are_replaced),
        cmocka_unit_test(peers_are_who_they_are),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
