"""Clients in numbers: silent ones, ones that send a byte at a time, that claim lengths without end, that
take no replies, that come and go. Whoever is served goes on being served, newcomers get in, and the
server stays inside its memory (G6), its files and a log of bounded length.
"""

import struct

import pytest

from harness import rawnbd
from harness.rawnbd import (
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, OPT_ABORT,
    OPT_EXTENDED_HEADERS, OPT_GO, OPT_INFO, OPT_LIST, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY,
    REQUEST_MAGIC)
from siege import FLAGS, MIB, SECONDS, connections, option

CACHE_MIB = 64
# The cache, 64 MiB, and 64 KiB for each connection (docs/guarantees.md, G6).
CONNECTIONS_MAX = 1024
BUDGET_KIB = (CACHE_MIB + 64) * 1024 + CONNECTIONS_MAX * 64
VOLUMES = {"v": "64M", "bad": "4G"}
MANY = 10000

pytestmark = pytest.mark.limit(90)


def request(kind, offset=0, length=0, flags=0, cookie=1):
    return struct.pack(">LHHQQL", REQUEST_MAGIC, flags, kind, cookie, offset, length)


def go(name="bad"):
    return option(OPT_GO, rawnbd.Client.go_data(name))


@pytest.fixture(scope="module")
def server(module_servers):
    return module_servers.start(VOLUMES, ["--cache-size", f"{CACHE_MIB}M"], unix=False)


@pytest.fixture
def begin(server, siege):
    return lambda: siege(server, budget_kib=BUDGET_KIB)


# -- silence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", FLAGS + option(OPT_GO, length=100)],
                         ids=["nothing", "half an option"])
def test_silent_handshakes(begin, said):
    """Ten thousand at a server that takes 1024. The oldest handshake makes room for the next, so that
    who speaks gets in: here one at the attackers' own address."""
    s = begin()
    s.attack(connections(MANY), said, "hold", seconds=2 * SECONDS, least=2 * CONNECTIONS_MAX)
    (did,) = s.stand(newcomers_from="127.0.0.1")
    assert did["made"] >= 2 * CONNECTIONS_MAX
    assert s.fds_most <= sum(s.fds) + CONNECTIONS_MAX + 100


@pytest.mark.limit(300)
def test_silent_clients_that_all_fit(servers, siege):
    """Ten thousand that have opened a volume and then say nothing."""
    n = connections(MANY)
    server = servers.start(VOLUMES, ["--cache-size", f"{CACHE_MIB}M", "--connections-max", n + 200],
                           unix=False)
    s = siege(server, budget_kib=(CACHE_MIB + 64) * 1024 + n * 64)
    s.attack(n, FLAGS + go(), "hold", seconds=SECONDS + 2, least=n + 1)
    s.wait_for_sockets(n)
    s.enough(s.attackers[0])
    (did,) = s.stand()
    assert did["open_at_end"] == n


# -- lengths without end -------------------------------------------------------------------------


def test_options_of_4_gib(begin):
    """Their data comes as fast as it can."""
    s = begin()
    for number in (99, OPT_GO, OPT_SET_META_CONTEXT):
        s.attack(20, FLAGS + option(number, length=0xffffffff), ("flood", bytes(MIB)))
    assert all(did["sent_bytes"] > MIB for did in s.stand())


def test_requests_of_4_gib(begin):
    """One after another, and behind a write its payload."""
    s = begin()
    for kind in (CMD_READ, CMD_WRITE, CMD_CACHE, CMD_BLOCK_STATUS):
        data = bytes(MIB) if kind == CMD_WRITE else b""
        s.attack(12, FLAGS + go(), "got:30", ("flood", request(kind, 0, 0xffffffff) + data))
    s.stand()


def test_trims_of_4_gib(begin):
    """These are done: the honest client's writes have their turn among them."""
    s = begin()
    for kind in (CMD_TRIM, CMD_WRITE_ZEROES):
        s.attack(25, FLAGS + go(), "got:30", ("flood", request(kind, 0, 0xffffffff)))
    s.stand(writes_p99_limit_s=2)


def test_extended_requests_of_all_bits(begin):
    """A length of 64 bits, and a payload that is said to be as long."""
    s = begin()
    for kind in (CMD_READ, CMD_WRITE, CMD_TRIM, CMD_BLOCK_STATUS):
        head = struct.pack(">LHHQQQ", rawnbd.EXT_REQUEST_MAGIC, rawnbd.FLAG_PAYLOAD_LEN, kind, 1, 0,
                           (1 << 64) - 1)
        s.attack(12, FLAGS + option(OPT_EXTENDED_HEADERS) + go(), "got:50", head,
                 ("flood", bytes(MIB)))
    s.stand()


# -- slow ones -------------------------------------------------------------------------------------


def session():
    """A whole one: options of all kinds, and requests."""
    return (FLAGS + option(OPT_LIST) + option(77, b"x" * 50) + option(OPT_STRUCTURED_REPLY)
            + option(OPT_SET_META_CONTEXT, rawnbd.Client.meta_data("bad", ["base:allocation"]))
            + option(OPT_INFO, rawnbd.Client.go_data("bad")) + go()
            + request(CMD_WRITE, 0, 3000) + bytes(3000) + request(CMD_READ, 0, 3000)
            + request(CMD_BLOCK_STATUS, 0, 1 << 20) + request(rawnbd.CMD_FLUSH)
            + request(rawnbd.CMD_DISC))


def test_a_byte_at_a_time(begin):
    s = begin()
    s.attack(200, ("bytes", session()), "read")
    (did,) = s.stand()
    assert did["sent_bytes"] > 200


def test_replies_that_nobody_reads(begin):
    """Reads of 32 MiB, one after another, from 64 clients that take nothing."""
    s = begin()
    s.attack(64, FLAGS + go(), ("flood", request(CMD_READ, 0, 32 * MIB)))
    s.stand()


def test_handshake_replies_that_nobody_reads(begin):
    s = begin()
    s.attack(64, FLAGS, ("flood", option(OPT_LIST) * 1000))
    s.stand()


def test_writes_of_32_mib(begin):
    """As fast as 64 clients can: the honest client's writes wait for the disk as theirs do."""
    s = begin()
    s.attack(64, FLAGS + go(), ("flood", request(CMD_WRITE, 0, 32 * MIB) + b"w" * 32 * MIB),
             seconds=2 * SECONDS)
    (did,) = s.stand(writes_p99_limit_s=3)
    assert did["sent_bytes"] > 64 * MIB


# -- coming and going -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset"])
def test_coming_and_going(begin, server, end):
    s = begin()
    for said in (b"", FLAGS + option(OPT_ABORT), FLAGS + go("nothing of that name"),
                 FLAGS + go() + request(CMD_READ, 0, MIB)):
        s.attack(25, said, *([] if not said else ["got:50"]), end, least=200)
    assert all(did["made"] >= 200 for did in s.stand())
    log = server.log()[s.log_bytes:]
    assert log.count("no export for it") <= 100
