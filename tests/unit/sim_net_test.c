/*
 * The simulated network: what sim/net.h says of its streams holds, from many seeds.
 */
#include <errno.h>
#include <stdio.h>

#include "../sim/net.h"
#include "base/check.h"
#include "base/hash.h"
#include "base/mem.h"
#include "server/wire.h"
#include "test.h"

#define SEEDS 200u
#define STEPS_MAX 2000000u
#define SECOND_NS 1000000000ull
#define CLIENT_HOST 1u
#define SERVER_HOST 2u
#define BUFFER_BYTES_MAX (256u << 10)

/* Worlds are not taken apart: not for the leak sanitizer. */
int __lsan_is_turned_off(void);
int __lsan_is_turned_off(void)
{
    return 1;
}

struct reactor {
    struct sim_env *env;
};

struct env *reactor_env(struct reactor *r)
{
    return &r->env->base;
}

/* One client, one server that takes what comes, and what either saw. */
struct pair {
    struct sim *sim;
    struct net *net;
    struct sim_env *client_env;
    struct reactor reactors[2];
    unsigned at; /* the one that has the wire */
    struct stream *stream;
    struct wire *wire;
    bool idle; /* the server does not watch */
    bool connected, closed, reset;
    bool detached;
    uint8_t *got, *back; /* by the server, by the client */
    size_t n_got, cap_got, n_back, cap_back;
    bool ended;
    int broke; /* errno; -1: on_events(0) */
    uint64_t ended_ns, hash;
};

static void note(struct pair *p, uint64_t what)
{
    uint64_t line[3] = {p->hash, sim_now_ns(p->sim), what};
    p->hash = hash64(line, sizeof line, 0);
}

static uint8_t byte_at(uint64_t i)
{
    return (uint8_t)(i * 2654435761u >> 13);
}

static void assert_prefix(const uint8_t *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        assert_int_equal(bytes[i], byte_at(i));
}

static void on_events(void *arg, int events)
{
    struct pair *p = arg;
    assert_false(p->detached);
    assert_ptr_equal(sim_running(p->sim), p->reactors[p->at].env);
    note(p, (uint64_t)events);
    if (!events) {
        p->broke = -1;
        p->ended_ns = sim_now_ns(p->sim);
        return;
    }
    if (!(events & WIRE_READABLE))
        return;
    uint8_t bytes[3][3000];
    struct iovec iov[3];
    for (int i = 0; i < 3; i++)
        iov[i] = (struct iovec){bytes[i], 1 + sim_below(p->sim, sizeof bytes[i])};
    uint8_t ahead[100];
    ssize_t peeked = wire_peek(p->wire, ahead, sizeof ahead);
    ssize_t n = wire_receive(p->wire, iov, 3);
    if (n <= 0) {
        assert_int_equal(peeked, n);
        if (n == 0)
            p->ended = true;
        else
            p->broke = errno;
        p->ended_ns = sim_now_ns(p->sim);
        wire_watch(p->wire, 0);
        return;
    }
    mem_grow(&p->got, &p->cap_got, p->n_got + (size_t)n, 1);
    size_t left = (size_t)n, first = p->n_got;
    for (int i = 0; i < 3 && left; i++) {
        size_t part = iov[i].iov_len < left ? iov[i].iov_len : left;
        memcpy(p->got + p->n_got, bytes[i], part);
        p->n_got += part;
        left -= part;
    }
    assert_true(peeked > 0);
    size_t same = (size_t)(peeked < n ? peeked : n);
    assert_memory_equal(ahead, p->got + first, same);
}

static void accepted(void *arg, int fd, unsigned from_host)
{
    struct pair *p = arg;
    assert_int_equal(from_host, CLIENT_HOST);
    assert_null(p->wire);
    p->wire = wire_new(fd);
    wire_attach(p->wire, &p->reactors[0], on_events, p);
    if (!p->idle)
        wire_watch(p->wire, WIRE_READABLE | WIRE_HANG_UP);
    note(p, 100);
}

static void on_connected(void *arg)
{
    struct pair *p = arg;
    assert_false(p->connected || p->closed);
    p->connected = true;
    note(p, 101);
}

static void on_data(void *arg, const uint8_t *bytes, size_t len)
{
    struct pair *p = arg;
    assert_true(p->connected && !p->closed && len > 0);
    mem_grow(&p->back, &p->cap_back, p->n_back + len, 1);
    memcpy(p->back + p->n_back, bytes, len);
    p->n_back += len;
    note(p, len);
}

static void on_closed(void *arg, bool reset)
{
    struct pair *p = arg;
    assert_false(p->closed);
    p->closed = true;
    p->reset = reset;
    p->ended_ns = sim_now_ns(p->sim);
    note(p, 102);
}

static const struct stream_events events = {on_connected, on_data, on_closed};

static void pair_begin(struct pair *p, uint64_t seed)
{
    *p = (struct pair){.sim = sim_new(seed)};
    p->net = net_new(p->sim);
    p->client_env = sim_env_new(p->sim);
    for (int i = 0; i < 2; i++)
        p->reactors[i].env = sim_env_new(p->sim);
    if (seed % 3 == 0)
        net_set_delays(p->net, 1000000, 50);
}

static void listen_here(struct pair *p)
{
    net_listen(p->net, SERVER_HOST, p->reactors[0].env, accepted, p);
}

static void connect_there(struct pair *p)
{
    p->stream =
        net_connect(p->net, p->client_env, CLIENT_HOST, SERVER_HOST, &events, p);
}

static void settle(struct pair *p)
{
    assert_true(sim_run_idle(p->sim, STEPS_MAX));
}

static void run_for(struct pair *p, uint64_t ns)
{
    uint64_t until = sim_now_ns(p->sim) + ns;
    while (sim_step_by(p->sim, until))
        continue;
}

static void pair_open(struct pair *p, uint64_t seed)
{
    pair_begin(p, seed);
    listen_here(p);
    connect_there(p);
    run_for(p, 5 * SECOND_NS);
    assert_true(p->connected && p->wire);
}

static void pair_end(struct pair *p)
{
    free(p->got);
    free(p->back);
}

static void send_bytes(struct pair *p, size_t from, size_t n)
{
    uint8_t *bytes = mem_alloc(n);
    for (size_t i = 0; i < n; i++)
        bytes[i] = byte_at(from + i);
    for (size_t at = 0; at < n;) {
        size_t part = 1 + sim_below(p->sim, n - at);
        stream_send(p->stream, bytes + at, part);
        at += part;
    }
    free(bytes);
}

/* Sends from the server what it takes; how much that was. */
static size_t send_back(struct pair *p, size_t from, size_t n)
{
    uint8_t *bytes = mem_alloc(n);
    for (size_t i = 0; i < n; i++)
        bytes[i] = byte_at(from + i);
    struct iovec iov[2] = {{bytes, n / 2}, {bytes + n / 2, n - n / 2}};
    ssize_t sent = wire_send(p->wire, iov, 2);
    free(bytes);
    if (sent < 0)
        assert_int_equal(errno, EAGAIN);
    return sent < 0 ? 0 : (size_t)sent;
}

/* --- in good order ----------------------------------------------------------------------- */

static uint64_t both_ways(uint64_t seed)
{
    struct pair p;
    size_t n = 1 + seed * 997, back = 0;
    pair_open(&p, seed);
    send_bytes(&p, 0, n);
    for (unsigned i = 0; back < n && i < STEPS_MAX; i++) {
        back += send_back(&p, back, n - back);
        sim_step(p.sim);
    }
    assert_int_equal(back, n);
    settle(&p);
    assert_int_equal(p.n_got, n);
    assert_int_equal(p.n_back, n);
    assert_prefix(p.got, n);
    assert_prefix(p.back, n);
    assert_int_equal(stream_unsent(p.stream), 0);
    assert_false(p.ended || p.broke || p.closed);

    send_bytes(&p, n, n);
    stream_close(p.stream);
    settle(&p);
    assert_int_equal(p.n_got, 2 * n);
    assert_prefix(p.got, 2 * n);
    assert_true(p.ended && !p.broke && !p.closed);
    uint64_t hash = p.hash;
    pair_end(&p);
    return hash;
}

static void bytes_arrive_in_order_both_ways(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= SEEDS; seed++)
        both_ways(seed);
}

static void same_seed_same_everything(void **state)
{
    (void)state;
    uint64_t before = 0;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        uint64_t hash = both_ways(seed);
        assert_int_equal(hash, both_ways(seed));
        assert_int_not_equal(hash, before);
        before = hash;
    }
}

static void close_wire(void *arg)
{
    struct pair *p = arg;
    wire_close(p->wire);
    p->wire = NULL;
}

static void the_servers_end_comes_behind_its_bytes(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct pair p;
        pair_open(&p, seed);
        size_t n = send_back(&p, 0, 100000);
        assert_true(n > 0);
        p.detached = true;
        wire_detach(p.wire, close_wire);
        settle(&p);
        assert_null(p.wire);
        assert_int_equal(p.n_back, n);
        assert_prefix(p.back, n);
        assert_true(p.closed && !p.reset);
        pair_end(&p);
    }
}

static void nobody_listens(void **state)
{
    (void)state;
    struct pair p;
    pair_begin(&p, 1);
    connect_there(&p);
    settle(&p);
    assert_true(p.closed && p.reset && !p.connected);
    pair_end(&p);
}

/* --- bounds -------------------------------------------------------------------------------- */

static void what_is_not_read_stays_bounded(void **state)
{
    (void)state;
    const size_t n = 2u << 20;
    for (uint64_t seed = 1; seed <= SEEDS / 10; seed++) {
        struct pair p;
        pair_begin(&p, seed);
        p.idle = true;
        listen_here(&p);
        connect_there(&p);
        stream_read(p.stream, false);
        settle(&p);
        send_bytes(&p, 0, n);
        settle(&p);
        assert_in_range(stream_unsent(p.stream), n - BUFFER_BYTES_MAX, n - 1);
        size_t back = 0;
        for (size_t one = 1; one; back += one) {
            one = send_back(&p, back, n - back);
            settle(&p);
        }
        assert_in_range(back, 1, 2 * BUFFER_BYTES_MAX);

        wire_watch(p.wire, WIRE_READABLE);
        stream_read(p.stream, true);
        settle(&p);
        assert_int_equal(p.n_got, n);
        assert_prefix(p.got, n);
        assert_int_equal(p.n_back, back);
        assert_prefix(p.back, back);
        pair_end(&p);
    }
}

/* --- clients that go ------------------------------------------------------------------------- */

/* G8: the end of a dead client comes behind what its server has not read. */
static void what_is_unread_outlives_its_client(void **state)
{
    (void)state;
    const size_t n = 1u << 20;
    unsigned n_ended = 0, n_broke = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct pair p;
        pair_begin(&p, seed);
        p.idle = true;
        listen_here(&p);
        connect_there(&p);
        settle(&p);
        send_bytes(&p, 0, n);
        settle(&p);
        size_t there = n - stream_unsent(p.stream);
        stream_kill(p.stream);
        run_for(&p, 40 * SECOND_NS);
        assert_int_equal(p.broke, 0);
        wire_watch(p.wire, WIRE_READABLE);
        settle(&p);
        assert_prefix(p.got, p.n_got);
        assert_true(p.n_got <= there);
        assert_true(p.ended != (p.broke != 0));
        assert_false(p.ended && p.n_got < there);
        n_ended += p.ended;
        n_broke += p.broke != 0;
        pair_end(&p);
    }
    assert_true(n_ended > SEEDS / 4 && n_broke > SEEDS / 8);
}

static void a_killed_client_leaves_a_part(void **state)
{
    (void)state;
    unsigned n_all = 0, n_cut = 0, n_ended = 0, n_broke = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct pair p;
        pair_open(&p, seed);
        size_t n = 50000;
        send_bytes(&p, 0, n);
        run_for(&p, sim_below(p.sim, 300000));
        size_t there = p.n_got;
        stream_kill(p.stream);
        settle(&p);
        assert_prefix(p.got, p.n_got);
        assert_true(p.n_got >= there && p.n_got <= n);
        assert_true(p.ended != (p.broke != 0));
        assert_false(p.closed);
        n_all += p.n_got == n;
        n_cut += p.n_got < n;
        n_ended += p.ended;
        n_broke += p.broke != 0;
        pair_end(&p);
    }
    assert_true(n_all > SEEDS / 20 && n_cut > SEEDS / 4);
    assert_true(n_ended > SEEDS / 4 && n_broke > SEEDS / 8);
}

static void of_a_vanished_client_nothing_is_heard(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct pair p;
        pair_open(&p, seed);
        send_bytes(&p, 0, 50000);
        run_for(&p, sim_below(p.sim, 300000));
        stream_vanish(p.stream);
        uint64_t gone_ns = sim_now_ns(p.sim);
        run_for(&p, SECOND_NS);
        size_t there = p.n_got;
        settle(&p);
        assert_int_equal(p.n_got, there);
        assert_prefix(p.got, p.n_got);
        assert_int_equal(p.broke, -1);
        assert_in_range(p.ended_ns, gone_ns + 20 * SECOND_NS, gone_ns + 31 * SECOND_NS);
        pair_end(&p);
    }
}

/* --- cuts and deaths -------------------------------------------------------------------------- */

static void a_cut_delays_or_ends_streams(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct pair p;
        bool is_short = seed % 2;
        size_t n = 300000;
        pair_open(&p, seed);
        send_bytes(&p, 0, n);
        run_for(&p, sim_below(p.sim, 300000));
        net_cut(p.net, CLIENT_HOST, SERVER_HOST, true);
        run_for(&p, 100000000);
        size_t there = p.n_got;
        run_for(&p, (is_short ? 19 : 31) * SECOND_NS);
        assert_int_equal(p.n_got, there);
        assert_int_equal(p.closed, !is_short);
        net_cut(p.net, CLIENT_HOST, SERVER_HOST, false);
        settle(&p);
        assert_prefix(p.got, p.n_got);
        assert_int_equal(p.n_got, is_short ? n : there);
        assert_false(p.ended);
        if (is_short)
            assert_false(p.broke || p.closed);
        else
            assert_true(p.broke && p.reset);
        pair_end(&p);
    }
}

static void a_process_dies_and_its_peers_hear_of_it(void **state)
{
    (void)state;
    unsigned n_reset = 0, n_end = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct pair p;
        pair_open(&p, seed);
        size_t back = send_back(&p, 0, 30000);
        if (seed % 2)
            send_bytes(&p, 0, 50000);
        run_for(&p, sim_below(p.sim, 200000));
        size_t there = p.n_back;
        sim_env_kill(p.reactors[0].env);
        net_process_died(p.net, &p.reactors[0].env, 1, false);
        run_for(&p, 10 * SECOND_NS);
        assert_true(p.closed);
        assert_true(p.n_back >= there && p.n_back <= back);
        assert_prefix(p.back, p.n_back);
        n_reset += p.reset;
        n_end += !p.reset;
        p.closed = p.connected = false;
        connect_there(&p);
        settle(&p);
        assert_true(p.closed && p.reset && !p.connected);
        pair_end(&p);
    }
    assert_true(n_reset > SEEDS / 8 && n_end > SEEDS / 8);
}

static void a_host_dies_in_silence(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct pair p;
        bool comes_back = seed % 2;
        pair_open(&p, seed);
        send_bytes(&p, 0, 50000);
        run_for(&p, sim_below(p.sim, 200000));
        sim_env_kill(p.reactors[0].env);
        net_process_died(p.net, &p.reactors[0].env, 1, true);
        uint64_t died_ns = sim_now_ns(p.sim);
        run_for(&p, 10 * SECOND_NS);
        assert_false(p.closed);
        if (comes_back) {
            p.wire = NULL;
            p.reactors[0] = p.reactors[1];
            listen_here(&p);
        }
        settle(&p);
        assert_true(p.closed && p.reset);
        if (comes_back)
            assert_in_range(p.ended_ns, died_ns, died_ns + 12 * SECOND_NS);
        else
            assert_in_range(p.ended_ns, died_ns + 20 * SECOND_NS, died_ns + 31 * SECOND_NS);
        p.closed = p.connected = false;
        connect_there(&p);
        uint64_t began_ns = sim_now_ns(p.sim);
        settle(&p);
        assert_int_equal(p.connected, comes_back);
        assert_int_equal(p.closed, !comes_back);
        if (!comes_back)
            assert_in_range(p.ended_ns, began_ns + 20 * SECOND_NS, began_ns + 31 * SECOND_NS);
        pair_end(&p);
    }
}

/* --- wires -------------------------------------------------------------------------------------- */

static void moved(void *arg)
{
    struct pair *p = arg;
    p->detached = false;
    p->at = 1;
    wire_attach(p->wire, &p->reactors[1], on_events, p);
    wire_watch(p->wire, WIRE_READABLE);
}

static void a_wire_moves_between_reactors(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct pair p;
        size_t n = 200000;
        pair_open(&p, seed);
        send_bytes(&p, 0, n);
        run_for(&p, sim_below(p.sim, 200000));
        p.detached = true;
        wire_detach(p.wire, moved);
        assert_true(p.detached);
        settle(&p);
        assert_int_equal(p.n_got, n);
        assert_prefix(p.got, n);
        pair_end(&p);
    }
}

static void a_paused_server_is_sent_to_and_reads_later(void **state)
{
    (void)state;
    struct pair p;
    pair_open(&p, 7);
    sim_env_pause(p.reactors[0].env);
    send_bytes(&p, 0, 1000);
    settle(&p);
    assert_int_equal(p.n_got, 0);
    assert_int_equal(stream_unsent(p.stream), 0);
    sim_env_resume(p.reactors[0].env);
    settle(&p);
    assert_int_equal(p.n_got, 1000);
    pair_end(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_arrive_in_order_both_ways),
        cmocka_unit_test(same_seed_same_everything),
        cmocka_unit_test(the_servers_end_comes_behind_its_bytes),
        cmocka_unit_test(nobody_listens),
        cmocka_unit_test(what_is_not_read_stays_bounded),
        cmocka_unit_test(what_is_unread_outlives_its_client),
        cmocka_unit_test(a_killed_client_leaves_a_part),
        cmocka_unit_test(of_a_vanished_client_nothing_is_heard),
        cmocka_unit_test(a_cut_delays_or_ends_streams),
        cmocka_unit_test(a_process_dies_and_its_peers_hear_of_it),
        cmocka_unit_test(a_host_dies_in_silence),
        cmocka_unit_test(a_wire_moves_between_reactors),
        cmocka_unit_test(a_paused_server_is_sent_to_and_reads_later),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
