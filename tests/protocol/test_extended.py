"""Checklist B26 and B29: extended headers.

No client of Debian 12 speaks them, so everything about them is tested here and,
style by style, in test_transmission.py. That every reply is an extended one,
echoes the offset of its request, and that block status always comes in its
extended form is checked by the client on each reply.
"""

import struct

import pytest

from harness.rawnbd import (
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    EINVAL, EXT_REQUEST_MAGIC, FLAG_FUA, FLAG_PAYLOAD_LEN, FLAG_REQ_ONE, OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS, OPT_GO, OPT_STRUCTURED_REPLY, REP_ACK, REP_ERR_EXT_HEADER_REQD,
    REP_ERR_INVALID, Closed)

MIB = 1 << 20
GIB = 1 << 30
A, DEPTH = "base:allocation", "qemu:allocation-depth"


@pytest.fixture(scope="module")
def server(module_servers):
    return module_servers.start({"a": "64M", "big": "16G"})


@pytest.fixture
def raw(server, clients):
    def connect():
        client = clients.raw(server)
        client.handshake()
        return client
    return connect


@pytest.fixture
def c(server, clients):
    return clients(server, "a", extended=True)


def test_B26_export_name_is_barred(raw):
    c = raw()
    c.extended_headers()
    c.send_option(OPT_EXPORT_NAME, b"a")
    c.expect_closed()


def test_B26_structured_reply_afterwards_is_refused(raw):
    c = raw()
    c.extended_headers()
    assert c.option(OPT_STRUCTURED_REPLY)[1] == REP_ERR_EXT_HEADER_REQD
    # In step, and nothing was downgraded.
    c.go("a")
    assert c.read(0, 512) == bytes(512)


def test_B26_structured_reply_before_is_fine(raw):
    c = raw()
    c.structured_reply()
    c.extended_headers()
    c.go("a")
    assert c.read(5, 512) == bytes(512)


def test_B26_asked_for_twice(raw):
    c = raw()
    c.extended_headers()
    assert c.option(OPT_EXTENDED_HEADERS)[1] in (REP_ACK, REP_ERR_INVALID)
    c.go("a")
    assert c.read(0, 512) == bytes(512)


def test_B26_meta_contexts_need_no_structured_replies_then(raw):
    c = raw()
    c.extended_headers()
    assert [n for _, n in c.set_meta_context("a", A)] == [A]
    c.go("a")
    assert c.block_status(0, MIB)[A]


def test_B26_without_them_the_extended_request_is_not_understood(server, clients):
    c = clients(server, "a", structured=True)
    c.send(struct.pack(">LHHQQQ", EXT_REQUEST_MAGIC, 0, CMD_READ, 1, 0, 512))
    c.expect_closed()


@pytest.mark.parametrize("kind", [CMD_READ, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES,
                                  CMD_BLOCK_STATUS, 9, 0xFFFF])
@pytest.mark.parametrize("length", [1, 32, 512, 70000, MIB])
def test_B26_a_stray_payload_is_consumed(c, kind, length):
    """EINVAL, no effect, and the next request is found behind the payload."""
    c.write(0, b"kept" * 16384)
    payload = (struct.pack(">LHHQQQ", EXT_REQUEST_MAGIC, 0, CMD_TRIM, 7, 0, MIB)
               * (length // 32 + 1))[:length]
    assert c.error_of(kind, 0, flags=FLAG_PAYLOAD_LEN, payload=payload) == EINVAL
    assert c.read(0, 65536) == b"kept" * 16384


def test_B26_stray_payloads_in_a_row(c):
    cookies = [c.request(kind, 0, flags=FLAG_PAYLOAD_LEN, payload=b"\xff" * n)
               for kind in (CMD_READ, CMD_TRIM, 77) for n in (1, 4097, 200000)]
    for cookie in cookies:
        assert c.result(cookie).error == EINVAL


def test_B26_a_write_without_the_payload_flag(c):
    """Its length is then an effect length: no payload follows, nothing is written."""
    c.write(0, b"kept" * 128)
    cookie = c.new_cookie()
    c.pending[cookie] = r = c.pending[c.request(CMD_CACHE, 0, 0, cookie=cookie, send=False)[0]]
    r.type, r.length = CMD_WRITE, 512
    c.send(struct.pack(">LHHQQQ", EXT_REQUEST_MAGIC, 0, CMD_WRITE, cookie, 0, 512))
    assert c.result(cookie).error == EINVAL
    assert c.read(0, 512) == b"kept" * 128


@pytest.mark.parametrize("length", [1 << 32, (1 << 32) + 512, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("kind", [CMD_WRITE, CMD_READ])
def test_B26_a_payload_too_long_to_be_meant(server, clients, c, kind, length):
    """Ends the connection (its length must not be cut to 32 bits)."""
    c.write(0, b"kept" * 128)
    try:
        c.send(struct.pack(">LHHQQQ", EXT_REQUEST_MAGIC, FLAG_PAYLOAD_LEN, kind, 1, 0, length))
        c.send(b"\xee" * 512)
        c.expect_closed()
    except ConnectionError:
        pass
    assert clients(server, "a").read(0, 512) == b"kept" * 128


def test_B26_offsets_are_echoed_where_the_chunk_has_its_own(server, clients, rng):
    """Offset of the request in the header, of the chunk in the payload."""
    c = clients(server, "a", extended=True)
    data = rng.randbytes(200000)
    c.write(MIB + 3, data)
    c.zero(MIB + 70000, 65536)
    result = c.call(CMD_READ, MIB + 3, 200000).check()
    assert {chunk.offset for chunk in result.chunks} == {MIB + 3}
    assert result.data == data[:69997] + bytes(65536) + data[135533:]
    for kind in (CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE):
        offset = 0 if kind == CMD_FLUSH else 12345
        assert c.call(kind, offset, 0 if kind == CMD_FLUSH else 1).check().chunks


def status(c, ids, offset=0, effect=MIB, flags=0, payload=None):
    if payload is None:
        payload = struct.pack(">Q", effect) + b"".join(struct.pack(">L", i) for i in ids)
    return c.call(CMD_BLOCK_STATUS, offset, flags=flags | FLAG_PAYLOAD_LEN, payload=payload,
                  effect_length=effect)


@pytest.fixture
def two(server, clients):
    c = clients(server, "big", extended=True, contexts=[A, DEPTH])
    return c, {name: number for number, name in c.contexts.items()}


def test_B26_block_status_with_a_payload_names_its_contexts(two):
    c, ids = two
    c.trim(0, 16 * GIB)
    c.write(8 * GIB, b"x" * 65536)
    for chosen in ([A], [DEPTH], [A, DEPTH], [DEPTH, A]):
        for offset, effect in [(0, MIB), (0, 16 * GIB), (8 * GIB, 1), (8 * GIB, 4 * GIB)]:
            for flags in (0, FLAG_REQ_ONE, FLAG_FUA):
                result = status(c, [ids[n] for n in chosen], offset, effect, flags).check()
                assert set(result.extents) == {ids[n] for n in chosen}
    # The same as without a payload.
    (whole,) = status(c, [ids[A]], 0, 16 * GIB).check().extents.values()
    assert whole == c.block_status(0, 16 * GIB)[A]


def test_B26_block_status_payload_with_wrong_contexts(two):
    c, ids = two
    unknown = next(i for i in range(1000) if i not in ids.values())
    for wrong in ([ids[A], ids[A]], [unknown], [ids[A], unknown], [ids[A], ids[DEPTH], ids[A]],
                  [0xFFFFFFFF]):
        assert status(c, wrong).error == EINVAL
        assert status(c, [ids[A]]).check().extents


@pytest.mark.parametrize("length", [1, 4, 7, 9, 10, 11, 13, 15, 17])
def test_B26_block_status_payload_of_the_wrong_length(two, length):
    c, ids = two
    good = struct.pack(">QLL", MIB, ids[A], ids[DEPTH]) + bytes(8)
    assert status(c, [], payload=good[:length]).error == EINVAL
    assert status(c, [ids[A]]).check().extents


def test_B26_block_status_payload_without_any_context_id(two):
    c, ids = two
    result = status(c, [])
    assert result.error in (0, EINVAL) and not result.extents
    assert status(c, [ids[A]]).check().extents


def test_B26_block_status_payload_past_the_end(two):
    c, ids = two
    for offset, effect in [(0, 16 * GIB + 1), (16 * GIB - 1, 2), (16 * GIB, 1),
                           (1, (1 << 64) - 1), (1 << 63, 1 << 63)]:
        assert status(c, [ids[A]], offset, effect).error == EINVAL
    assert status(c, [ids[A]]).check().extents


def test_B26_block_status_payload_far_too_long(two):
    """Thousands of ids: consumed and refused, since some must be there twice."""
    c, ids = two
    assert status(c, [ids[A]] * 5000).error == EINVAL
    assert status(c, [ids[A]]).check().extents


def test_B26_block_status_payload_without_contexts(c):
    assert status(c, [1]).error == EINVAL
    assert c.read(0, 1)


def test_B29_a_copy_over_extended_headers(server, clients, rng):
    """Written extended, read back in every style, at odd offsets and over holes."""
    c = clients(server, "a", extended=True)
    c.trim(0, 64 * MIB)
    model = bytearray(64 * MIB)
    pending = []
    for _ in range(100):
        offset = rng.randrange(63 * MIB)
        data = rng.randbytes(rng.choice([1, 513, 4096, 65536, 300001]))
        pending.append(c.request(CMD_WRITE, offset, payload=data))
        model[offset:offset + len(data)] = data
    for cookie in pending:
        c.result(cookie).check()
    c.flush()
    assert c.read_all() == model
    assert clients(server, "a", structured=True).read_all() == model
    assert clients(server, "a").read_all() == model
