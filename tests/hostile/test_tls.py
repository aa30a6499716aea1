"""Attackers of a server with TLS: what sessions cost is paid by those who begin them."""

import ssl

import pytest

import tlsnbd
from harness import rawnbd
from harness.rawnbd import CMD_READ, OPT_STARTTLS
from pki import context
from siege import FLAGS, HONEST, MIB, SECONDS, connections, option

STARTTLS = FLAGS + option(OPT_STARTTLS)
# The greeting, and the answer to STARTTLS; what the server says of its own session comes behind them.
PROMISED = 18 + 20
CACHE_MIB = 64
CONNECTIONS_MAX = 1024
BUDGET_KIB = (CACHE_MIB + 64) * 1024 + CONNECTIONS_MAX * 64

pytestmark = pytest.mark.limit(90)


def hello(alice):
    """A client's first message."""
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        alice.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    return out.read()


@pytest.fixture(scope="module")
def server(module_servers, pki):
    return module_servers.start({"v": "64M", "bad": "64M"},
                                ["--cache-size", f"{CACHE_MIB}M", "--tls", "on",
                                 "--tls-certificates", pki.server, "--tls-verify-peer"],
                                unix=False)


@pytest.fixture(scope="module")
def alice(pki):
    made = context(pki.alice)
    # The server's choice; it need not ask for another key first.
    made.set_ecdh_curve("prime256v1")
    return made


@pytest.fixture
def begin(server, siege):
    return lambda **more: siege(server, budget_kib=BUDGET_KIB, **more)


def honest_over_tls(server, alice):
    """Comes as newcomers do, and has what it takes."""
    client = tlsnbd.Client((server.host, server.port), source=HONEST)
    client.handshake()
    client.starttls(alice)
    client.go("v")
    return client


@pytest.mark.parametrize("end", ["close", "reset"])
def test_handshakes_in_a_loop(begin, server, alice, end):
    """Clients that have the server prove itself and go. Who is served does not wait for that; nor does
    one who comes with TLS for long, from another address."""
    s = begin()
    s.honest = lambda source: honest_over_tls(server, alice)
    s.attack(300, STARTTLS, f"got:{PROMISED}", hello(alice), f"got:{PROMISED + 500}", end,
             least=600)
    (did,) = s.stand()
    assert did["over"] > 100


def test_sessions_that_stop(begin, server, alice):
    """Ten thousand, behind the promise, in the middle of their first message, and behind it."""
    s = begin()
    first = hello(alice)
    s.honest = lambda source: honest_over_tls(server, alice)
    n = connections(10000) // 3
    s.attack(n, STARTTLS, "hold", seconds=2 * SECONDS)
    s.attack(n, STARTTLS, f"got:{PROMISED}", first[:100], "hold", seconds=2 * SECONDS)
    s.attack(n, STARTTLS, f"got:{PROMISED}", first, "hold", seconds=2 * SECONDS)
    s.stand()
    assert s.fds_most <= sum(s.fds) + CONNECTIONS_MAX + 100


def test_messages_without_end(begin, alice):
    """One that claims 16 MiB, and records of nothing."""
    s = begin()
    claims = b"\x16\x03\x01\x3e\x80\x01\xff\xff\xff\x03\x03" + bytes(15994)
    record = b"\x16\x03\x01\x3e\x80" + bytes(16000)
    s.attack(30, STARTTLS, f"got:{PROMISED}", claims, ("flood", record))
    s.attack(30, STARTTLS, f"got:{PROMISED}", ("flood", b"\x17\x03\x03\x00\x01\x00"))
    s.attack(30, STARTTLS, f"got:{PROMISED}", ("flood", bytes(range(256)) * 256))
    s.stand()


def test_a_byte_at_a_time(begin, alice):
    s = begin()
    s.attack(200, STARTTLS, f"got:{PROMISED}", ("bytes", hello(alice)), "read")
    (did,) = s.stand()
    assert did["sent_bytes"] > 200 * len(STARTTLS)


def test_replies_that_nobody_reads(begin, server, alice):
    """Reads of 32 MiB over sixteen sessions, whose clients take nothing."""
    s = begin()
    for _ in range(16):
        client = s.besides(tlsnbd.connect(server, alice, "bad", tcp=False))
        for _ in range(8):
            client.request(CMD_READ, 0, 32 * MIB)
    s.attack(1, "hold")
    s.stand()


def test_half_a_session(begin, server, alice):
    """A served client's socket that stops in the middle of a record holds up nobody."""
    s = begin()
    for _ in range(50):
        client = s.besides(tlsnbd.connect(server, alice, "bad", tcp=False))
        kept = []
        client.sock.put = lambda sock, data, kept=kept: kept.append(data)
        client.send(client.header(rawnbd.CMD_WRITE, 0, 16000, cookie=1) + bytes(16000))
        client.sock.sock.sendall(b"".join(kept)[:-7])
    s.attack(1, "hold")
    s.stand()
