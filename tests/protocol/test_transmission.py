"""Checklist B, lines 13 to 25: requests and replies, byte by byte.

Most tests run three times: over simple, structured and extended replies. That
each reply has the right style, that chunks lie inside the request, do not
overlap and cover it, and that DONE comes last is checked by the client
(harness/rawnbd.py) on every reply of every test, not only in those named for it.
"""

import os
import struct

import pytest

from harness.rawnbd import (
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, EINVAL, EIO, ENOSPC, ENOTSUP, EOVERFLOW, EPERM, FLAG_DF, FLAG_FAST_ZERO,
    FLAG_FUA, FLAG_NO_HOLE, FLAG_PAYLOAD_LEN, FLAG_REQ_ONE, READ_ONLY, STATE_HOLE, STATE_ZERO,
    TYPE_ERROR_OFFSET, Closed)
from harness.server import SLOW, wait_until

MIB = 1 << 20
GIB = 1 << 30
STYLES = {
    "simple": {},
    "structured": {"structured": True},
    "extended": {"extended": True},
}
# BLOCK_STATUS needs replies in chunks.
CHUNKED = ["structured", "extended"]
A = "base:allocation"
DEPTH = "qemu:allocation-depth"


@pytest.fixture(scope="module")
def server(module_servers):
    return module_servers.start({"a": "64M", "odd": 1049088, "big": "16G", "status": "16G",
                                 "zero": "64M", "tiny": 512})


@pytest.fixture(params=list(STYLES))
def style(request):
    return STYLES[request.param]


@pytest.fixture(params=CHUNKED)
def chunked(request):
    return STYLES[request.param]


@pytest.fixture
def c(server, clients, style):
    return clients(server, "a", **style)


def pattern(rng, length):
    return rng.randbytes(length)


# -- B13, B14 ---------------------------------------------------------------------


def test_B13_read_errors_are_chunks_once_structured(server, clients, chunked):
    """Whatever is wrong with a READ; the client refuses a simple reply to one."""
    c = clients(server, "a", **chunked)
    for offset, length, flags in [(64 * MIB, 1, 0), (64 * MIB - 1, 2, 0), (1 << 63, 512, 0),
                                  (0, 512, FLAG_NO_HOLE), (0, 512, 1 << 12)]:
        result = c.call(CMD_READ, offset, length, flags)
        assert result.error == EINVAL
        assert result.chunks[0].kind != "simple"
        assert result.content == []
    assert len(c.read(0, 512)) == 512


def test_B14_reads_of_any_shape_are_covered_exactly(server, clients, style, rng):
    """Data beside holes beside zeros, read at every alignment."""
    c = clients(server, "a", **style)
    model = bytearray(MIB)
    c.trim(0, MIB)
    for _ in range(40):
        offset = rng.randrange(MIB)
        length = min(rng.choice([1, 7, 512, 4096, 5000, 16384, 70000]), MIB - offset)
        what = rng.randrange(3)
        if what == 0:
            data = pattern(rng, length)
            c.write(offset, data)
            model[offset:offset + length] = data
        else:
            c.zero(offset, length, rng.choice([0, FLAG_NO_HOLE]))
            model[offset:offset + length] = bytes(length)
    assert c.read(0, MIB) == model
    for _ in range(150):
        offset = rng.randrange(MIB)
        length = rng.randrange(1, min(200000, MIB - offset) + 1)
        assert c.read(offset, length) == model[offset:offset + length]


def test_B14_replies_to_many_requests_in_flight(server, clients, style, rng):
    """Chunks of different replies may interleave; each reply is whole by its cookie."""
    c = clients(server, "a", **style)
    base = 8 * MIB
    data = pattern(rng, 4 * MIB)
    c.write(base, data)
    wanted = {}
    for _ in range(200):
        offset = rng.randrange(4 * MIB)
        length = min(rng.choice([1, 512, 4096, 65536]), 4 * MIB - offset)
        wanted[c.request(CMD_READ, base + offset, length)] = data[offset:offset + length]
    for _ in range(len(wanted)):
        result = c.any_result().check()
        assert result.data == wanted.pop(result.request.cookie)


# -- B15 --------------------------------------------------------------------------


def damage(folder, needle):
    """Flips a byte inside needle wherever it lies in the store's files; counts the places."""
    found = 0
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        at = content.find(needle)
        while at >= 0:
            with open(path, "r+b") as f:
                f.seek(at + len(needle) // 2)
                f.write(bytes([content[at + len(needle) // 2] ^ 0xFF]))
            found += 1
            at = content.find(needle, at + 1)
    return found


@pytest.mark.lmdb("it damages files; fdb/test_keys.py damages keys")
def test_B15_a_read_that_fails_half_way(servers, clients, rng):
    """G5: a damaged block is EIO for what touches it, never wrong bytes, never zeros.

    With simple replies the server fails the whole reply or ends the connection;
    with chunks it says so in an error chunk, and what it did send is right.
    """
    s = servers.make()
    s.cli("create", "d", "4M", "--compression", "none")
    s.start()
    c = clients(s, "d")
    data = pattern(rng, 4 * MIB)
    c.write(0, data)
    c.flush()
    wait_until(lambda: s.used_bytes("d") >= 4 * MIB, 60 * SLOW, "the data has left the log")
    s.stop()
    spot = 2 * MIB + 4096
    assert damage(s.store_folder, data[spot:spot + 512]) >= 1, "the payload was not found on disk"
    s.start()

    for name, style in STYLES.items():
        c = clients(s, "d", **style)
        try:
            result = c.call(CMD_READ, 0, 4 * MIB)
        except Closed:
            assert name == "simple"
            c = clients(s, "d", **style)
        else:
            assert result.error == EIO
            for chunk in result.chunks:
                if chunk.type == TYPE_ERROR_OFFSET:
                    assert spot - 65536 <= chunk.error_offset <= spot + 65536
        # Other blocks are none the worse for it, on the same connection.
        assert c.read(0, MIB) == data[:MIB]
        assert c.read(3 * MIB, MIB) == data[3 * MIB:]
        assert c.error_of(CMD_READ, spot, 512) == EIO
    # Overwritten whole, it is healthy again.
    c.write(MIB, data[MIB:3 * MIB])
    assert c.read(0, 4 * MIB) == data


# -- B16 --------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 512, 4096, 65535, 65536])
def test_B16_df_up_to_64_KiB_is_one_chunk(server, clients, chunked, rng, length):
    c = clients(server, "a", **chunked)
    # Data and holes by turns, so that there is a reason to fragment.
    base = 16 * MIB
    c.trim(base, 256 << 10)
    for at in range(0, 256 << 10, 32768):
        c.write(base + at, pattern(rng, 8192))
    for offset in (base, base + 8000, base + 8193, base + 16384):
        plain = c.read(offset, length)
        result = c.call(CMD_READ, offset, length, FLAG_DF).check()
        assert len(result.content) == 1
        assert result.data == plain


def test_B16_df_of_a_large_read_is_one_chunk_or_overflow(server, clients, chunked):
    c = clients(server, "a", **chunked)
    for length in (MIB, 32 * MIB):
        result = c.call(CMD_READ, 0, length, FLAG_DF)
        assert result.error in (0, EOVERFLOW)
        if result.error:
            assert result.content == []
        else:
            assert len(result.content) == 1


def test_B16_df_is_invalid_with_simple_replies(server, clients):
    c = clients(server, "a")
    assert c.error_of(CMD_READ, 0, 512, FLAG_DF) == EINVAL
    assert len(c.read(0, 512)) == 512


# -- B17 --------------------------------------------------------------------------


def lookalike(length):
    """A payload of requests: a server out of step takes them for what they look like."""
    one = struct.pack(">LHHQQL", 0x25609513, 0, CMD_DISC, 0, 0, 0)
    return (one * (length // len(one) + 1))[:length]


@pytest.mark.parametrize("length", [1, 512, 70000, 3 * MIB])
def test_B17_a_failed_write_consumes_its_payload(c, length):
    payload = lookalike(length)
    before = c.read(64 * MIB - 512, 512)
    assert c.error_of(CMD_WRITE, 64 * MIB - length + 1, payload=payload) == ENOSPC
    assert c.error_of(CMD_WRITE, 1 << 60, payload=payload) == ENOSPC
    assert c.error_of(CMD_WRITE, 0, flags=FLAG_NO_HOLE, payload=payload) == EINVAL
    assert c.error_of(CMD_WRITE, 0, flags=1 << 14, payload=payload) == EINVAL
    # Half inside, half outside: nothing of it is there.
    assert c.read(64 * MIB - 512, 512) == before


def test_B17_read_only(servers, clients, style):
    s = servers.start({"r": "4M"})
    c = clients(s, "r")
    c.write(0, b"kept" * 128)
    c.flush()
    s.stop()
    s.args = ["--read-only"]
    s.start()
    c = clients(s, "r", **style)
    assert c.export.flags & READ_ONLY
    payload = lookalike(70000)
    for kind, kwargs in [(CMD_WRITE, {"payload": payload}), (CMD_TRIM, {"length": 4096}),
                         (CMD_WRITE_ZEROES, {"length": 4096}),
                         (CMD_WRITE, {"payload": payload, "flags": FLAG_FUA})]:
        assert c.error_of(kind, 0, **kwargs) == EPERM
        assert c.read(0, 512) == b"kept" * 128
    assert c.error_of(CMD_FLUSH) == 0
    assert c.error_of(CMD_CACHE, 0, 4096) == 0


def test_B17_a_payload_over_the_maximum(server, clients, style):
    """Over 32 MiB: refused in step, or the connection ends; never obeyed in part."""
    c = clients(server, "a", **style)
    before = c.read(0, 4096)
    c.request(CMD_WRITE, 0, length=33 * MIB, cookie=1)
    try:
        for _ in range(33):
            c.send(lookalike(MIB))
        assert c.result(1).error in (EINVAL, EOVERFLOW)
    except (Closed, ConnectionError, TimeoutError):
        c = clients(server, "a", **style)
    assert c.read(0, 4096) == before
    server.check_alive()


# -- B18, B19 ---------------------------------------------------------------------

PAST_END = [
    (64 * MIB, 1), (64 * MIB - 1, 2), (64 * MIB - 512, 1024), (0, 64 * MIB + 1),
    (64 * MIB + 1, 1), (1 << 40, 512), (1 << 63, 512), ((1 << 64) - 512, 512),
    ((1 << 64) - 1, 1), ((1 << 64) - 1, 2), ((1 << 64) - 512, 1024), ((1 << 63) - 1, 1 << 20),
    (0, 0xFFFFFFFF), (1, 0xFFFFFFFF), ((1 << 64) - 0xFFFFFFFF, 0xFFFFFFFF),
]


@pytest.mark.parametrize("offset,length", PAST_END)
def test_B18_past_the_end(c, offset, length):
    """Also where offset + length overflows."""
    for kind, error in [(CMD_READ, EINVAL), (CMD_TRIM, EINVAL), (CMD_CACHE, EINVAL),
                        (CMD_WRITE_ZEROES, ENOSPC)]:
        assert c.error_of(kind, offset, length) == error, f"command {kind}"
    if length <= MIB:
        assert c.error_of(CMD_WRITE, offset, payload=b"x" * length) == ENOSPC
    assert len(c.read(64 * MIB - 1, 1)) == 1


@pytest.mark.parametrize("offset,length", PAST_END)
def test_B18_block_status_past_the_end(server, clients, chunked, offset, length):
    c = clients(server, "a", contexts=[A], **chunked)
    assert c.error_of(CMD_BLOCK_STATUS, offset, length) == EINVAL
    assert c.block_status(64 * MIB - 512, 512)


def test_B18_the_last_bytes_are_inside(server, clients, style, rng):
    for name, size in [("odd", 1049088), ("a", 64 * MIB), ("tiny", 512)]:
        c = clients(server, name, **style)
        data = pattern(rng, 512)
        c.write(size - 512, data, FLAG_FUA)
        assert c.read(size - 512, 512) == data
        c.zero(size - 1, 1)
        assert c.read(size - 2, 2) == data[510:511] + b"\0"
        c.trim(size - 512, 512)
        c.write(size - 1, b"!")
        assert c.read(size - 1, 1) == b"!"
        assert c.error_of(CMD_WRITE, size - 511, payload=data) == ENOSPC
        assert c.error_of(CMD_READ, size - 511, 512) == EINVAL


def test_B19_single_bytes_anywhere(c, rng):
    """The minimum block is 1: no alignment is ever refused, and neighbours stay."""
    assert c.export.block_size[0] == 1
    base = 20 * MIB + 4096
    model = bytearray(pattern(rng, 40000))
    c.write(base, bytes(model))
    for _ in range(200):
        at = rng.randrange(len(model) - 3)
        length = rng.choice([1, 1, 2, 3])
        if rng.random() < 0.3:
            c.zero(base + at, length)
            model[at:at + length] = bytes(length)
        else:
            data = pattern(rng, length)
            c.write(base + at, data)
            model[at:at + length] = data
    assert c.read(base, len(model)) == model
    for at in (0, 511, 512, 4095, 4096, 16383, 16384, 39999):
        assert c.read(base + at, 1) == model[at:at + 1]


def test_B19_trim_of_a_few_bytes_leaves_the_others(c, rng):
    base = 21 * MIB
    data = pattern(rng, 65536)
    c.write(base, data)
    c.trim(base + 5000, 30001)
    got = c.read(base, 65536)
    assert got[:5000] == data[:5000] and got[35001:] == data[35001:]
    # G3: a trim is there whole; what it took reads as zeros.
    assert got[5000:35001] == bytes(30001)


# -- B20, B21 ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [16 * MIB, 32 * MIB])
@pytest.mark.parametrize("offset", [0, 4097])
def test_B20_payloads_up_to_32_MiB(c, rng, length, offset):
    data = pattern(rng, length)
    c.write(offset, data)
    assert c.read(offset, length) == data
    assert c.read(offset + length - 5, 5) == data[-5:]


def test_B20_effects_of_4_GiB_less_one(server, clients, style, rng):
    c = clients(server, "big", **style)
    far = 4 * GIB + 123456
    marks = [0, 1, 4096, GIB, 4 * GIB - 1, 4 * GIB, far]
    for command in (c.trim, c.zero):
        for at in marks:
            c.write(at, b"#")
        command(1, (1 << 32) - 1)
        assert [c.read(at, 1) for at in marks] == [b"#", b"\0", b"\0", b"\0", b"\0", b"#", b"#"]


def test_B20_block_status_of_4_GiB_less_one(server, clients, chunked):
    c = clients(server, "status", contexts=[A, DEPTH], **chunked)
    c.trim(0, 0xFFFFFFFF)
    c.write(3 * GIB, b"data" * 16384)
    got = c.block_status(0, 0xFFFFFFFF)
    for extents in got.values():
        assert sum(n for n, _ in extents) > 0
    assert hole_at(c, 0) and hole_at(c, 3 * GIB - 1) and not hole_at(c, 3 * GIB)


def test_B20_beyond_4_GiB_with_extended_headers(server, clients):
    c = clients(server, "big", extended=True, contexts=[A])
    c.write(0, b"#")
    c.write(10 * GIB, b"#")
    c.write(16 * GIB - 1, b"#")
    c.zero(1, 10 * GIB)
    assert c.read(0, 1) == b"#" and c.read(10 * GIB, 1) == b"\0"
    assert c.read(16 * GIB - 1, 1) == b"#"
    c.trim(0, 16 * GIB, FLAG_FUA)
    assert c.read(0, 1) == b"\0" and c.read(16 * GIB - 1, 1) == b"\0"
    (extents,) = c.block_status(0, 16 * GIB).values()
    # 64 bits of length are there to be used.
    assert extents[0][0] > 1 << 32 and extents[0][1] == STATE_HOLE | STATE_ZERO
    c.cache(0, 16 * GIB)
    assert c.error_of(CMD_TRIM, 1, 16 * GIB) == EINVAL
    assert c.error_of(CMD_WRITE_ZEROES, 1, 16 * GIB) == ENOSPC
    assert c.error_of(CMD_TRIM, 1, (1 << 64) - 1) == EINVAL
    assert c.error_of(CMD_WRITE_ZEROES, 512, (1 << 64) - 512) == ENOSPC
    assert c.error_of(CMD_BLOCK_STATUS, 512, (1 << 64) - 512) == EINVAL


def test_B20_a_read_over_the_maximum_is_refused_or_right(server, clients, style):
    c = clients(server, "a", **style)
    result = c.call(CMD_READ, 0, 33 * MIB)
    if result.error:
        assert result.error in (EINVAL, EOVERFLOW)
    assert len(c.read(0, 512)) == 512


def test_B20_a_read_of_4_GiB_ends_no_one(server, clients, style):
    c = clients(server, "big", **style)
    result = c.call(CMD_READ, 0, 0xFFFFF000) if style else None
    if result is not None and result.error:
        assert result.error in (EINVAL, EOVERFLOW)
    if not style:
        # With simple replies it could only be answered with 4 GiB of payload.
        assert c.error_of(CMD_READ, 0, 0xFFFFF000) in (EINVAL, EOVERFLOW)
    assert len(c.read(0, 512)) == 512


@pytest.mark.parametrize("offset", [0, 1, 4096, 64 * MIB])
def test_B21_length_zero_never_disconnects(c, offset):
    c.write(4096, b"x" * 512)
    for kind in (CMD_READ, CMD_WRITE, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_FLUSH):
        result = c.call(kind, 0 if kind == CMD_FLUSH else offset, 0)
        # What it answers is not specified, only that it goes on.
        assert result.error in (0, EINVAL, ENOSPC)
        if kind == CMD_READ and not result.error:
            assert result.data == b""
    assert c.read(4096, 512) == b"x" * 512


def test_B21_block_status_of_length_zero(server, clients, chunked):
    c = clients(server, "a", contexts=[A], **chunked)
    for flags in (0, FLAG_REQ_ONE):
        assert c.error_of(CMD_BLOCK_STATUS, 0, 0, flags) in (0, EINVAL)
    assert c.block_status(0, 512)


# -- B22 --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [8, 9, 100, 0x7FFF, 0xFFFF])
def test_B22_unknown_commands(c, kind):
    assert c.error_of(kind, 0, 512) == EINVAL
    assert c.error_of(kind, 0, 0, FLAG_FUA) == EINVAL
    assert len(c.read(0, 512)) == 512


APPLIES = {
    CMD_READ: FLAG_DF,
    CMD_WRITE: 0,
    CMD_FLUSH: 0,
    CMD_TRIM: 0,
    CMD_CACHE: 0,
    CMD_WRITE_ZEROES: FLAG_NO_HOLE | FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: FLAG_REQ_ONE,
}


@pytest.mark.parametrize("kind", list(APPLIES))
def test_B22_flags_that_do_not_apply(server, clients, style, kind, rng):
    contexts = [A] if style else []
    c = clients(server, "a", contexts=contexts, **style)
    data = pattern(rng, 512)
    c.write(30 * MIB, data)
    # Another payload, so that a refused write that was done all the same shows.
    payload = pattern(rng, 512) if kind == CMD_WRITE else b""
    for bit in range(1, 16):
        flag = 1 << bit
        if flag & APPLIES[kind]:
            continue
        if flag == FLAG_PAYLOAD_LEN and c.extended:
            continue  # changes what follows the header; has tests of its own (B26)
        offset, length = (0, 0) if kind == CMD_FLUSH else (30 * MIB, 512)
        assert c.error_of(kind, offset, length, flag, payload) == EINVAL, f"flag {flag:#x}"
        assert c.read(30 * MIB, 512) == data, f"flag {flag:#x} had an effect"


def test_B22_fua_is_accepted_on_any_command(server, clients, style):
    contexts = [A] if style else []
    c = clients(server, "a", contexts=contexts, **style)
    assert c.error_of(CMD_READ, 0, 512, FLAG_FUA) == 0
    assert c.error_of(CMD_WRITE, 0, flags=FLAG_FUA, payload=b"f" * 512) == 0
    assert c.error_of(CMD_FLUSH, flags=FLAG_FUA) == 0
    assert c.error_of(CMD_TRIM, 4096, 512, FLAG_FUA) == 0
    assert c.error_of(CMD_CACHE, 0, 512, FLAG_FUA) == 0
    assert c.error_of(CMD_WRITE_ZEROES, 4096, 512, FLAG_FUA) == 0
    assert c.error_of(CMD_WRITE_ZEROES, 4096, 512, FLAG_FUA | FLAG_NO_HOLE) == 0
    if contexts:
        assert c.error_of(CMD_BLOCK_STATUS, 0, 512, FLAG_FUA) == 0


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x12560953, 0x67446698])
def test_B22_a_request_without_its_magic_closes(c, magic):
    c.send(c.header(CMD_READ, 0, 512, 0, 1, magic=magic))
    c.expect_closed()


def test_B22_the_other_headers_magic_closes(server, clients):
    c = clients(server, "a")
    c.send(c.header(CMD_READ, 0, 512, 0, 1, magic=0x21E41C71))
    c.expect_closed()
    c = clients(server, "a", extended=True)
    c.send(c.header(CMD_READ, 0, 512, 0, 1, magic=0x25609513))
    c.expect_closed()


# -- B23 --------------------------------------------------------------------------


def test_B23_one_volume_behind_all_connections(server, clients, style, rng):
    """What one connection was answered, every other one reads."""
    group = [clients(server, "a", **style) for _ in range(4)]
    for round_ in range(50):
        writer, flusher, reader = rng.sample(group, 3)
        offset = 40 * MIB + rng.randrange(MIB)
        data = pattern(rng, rng.choice([1, 100, 4096, 40000]))
        writer.write(offset, data, rng.choice([0, FLAG_FUA]))
        if round_ % 2:
            flusher.flush()
        assert reader.read(offset, len(data)) == data


def test_B23_flush_with_stray_offset_or_length_does_not_disconnect(c):
    for offset, length in [(512, 0), (0, 512), (1 << 63, 1)]:
        assert c.error_of(CMD_FLUSH, offset, length) in (0, EINVAL)
    c.flush()


# -- B24 --------------------------------------------------------------------------


@pytest.mark.parametrize("offset,length", [(0, 4096), (0, 65536), (1, 511), (5, 70001),
                                           (0, 8 * MIB), (16384, 16384)])
@pytest.mark.parametrize("hole", [0, FLAG_NO_HOLE])
def test_B24_fast_zero_does_it_all_or_not_at_all(server, clients, style, rng, offset, length, hole):
    c = clients(server, "zero", **style)
    base = 2 * MIB
    data = pattern(rng, offset + length + 4096)
    c.write(base, data)
    error = c.error_of(CMD_WRITE_ZEROES, base + offset, length, FLAG_FAST_ZERO | hole)
    assert error in (0, ENOTSUP)
    got = c.read(base, len(data))
    if error:
        assert got == data
    # Without the flag there is no such refusal.
    c.zero(base + offset, length, hole)
    got = c.read(base, len(data))
    assert got == data[:offset] + bytes(length) + data[offset + length:]


def test_B24_fast_zero_of_a_whole_volume(server, clients, style, rng):
    """What qemu-img and nbdcopy ask first; ENOTSUP would cost them a second pass."""
    c = clients(server, "zero", **style)
    c.write(5 * MIB, pattern(rng, 8192))
    assert c.error_of(CMD_WRITE_ZEROES, 0, 64 * MIB, FLAG_FAST_ZERO) in (0, ENOTSUP)


def extents_of(c, offset, length):
    """base:allocation of a whole range, asking again where a reply was shorter."""
    out, at = [], offset
    while at < offset + length:
        for n, status in c.block_status(at, offset + length - at)[A]:
            n = min(n, offset + length - at)
            out.append((at, n, status))
            at += n
    return out


def hole_at(c, offset):
    return bool(c.block_status(offset, 1)[A][0][1] & STATE_HOLE)


def test_B24_no_hole_is_honoured(server, clients, chunked, rng):
    """The range is provisioned: not reported as a hole, and still zeros."""
    c = clients(server, "zero", contexts=[A], **chunked)
    c.trim(0, 64 * MIB)
    c.write(10 * MIB, pattern(rng, 100000))
    for offset, length in [(10 * MIB, 65536), (20 * MIB, MIB), (30 * MIB + 17, 5000)]:
        c.zero(offset, length, FLAG_NO_HOLE)
        for _, _, status in extents_of(c, offset, length):
            assert not status & STATE_HOLE
        assert c.read(offset, length) == bytes(length)
    # And without it the space comes back.
    c.zero(20 * MIB, MIB)
    assert all(status & STATE_HOLE for _, _, status in extents_of(c, 20 * MIB, MIB))


# -- B25 --------------------------------------------------------------------------


def test_B25_block_status_without_a_context(c):
    assert c.error_of(CMD_BLOCK_STATUS, 0, 4096) == EINVAL
    assert len(c.read(0, 512)) == 512


def test_B25_data_and_holes_are_told_apart(server, clients, chunked, rng):
    """Never "zero" or "hole" where there is data; holes where nothing was ever written."""
    c = clients(server, "zero", contexts=[A, DEPTH], **chunked)
    c.trim(0, 64 * MIB)
    written = []
    for _ in range(20):
        offset, length = rng.randrange(32 * MIB), rng.randrange(1, 100000)
        c.write(offset, pattern(rng, length))
        written.append((offset, length))
    c.write(50 * MIB, bytes(65536))
    for offset, length in written:
        for at, n, status in extents_of(c, offset, length):
            assert not status & STATE_ZERO and not status & STATE_HOLE
    for at, n, status in extents_of(c, 0, 64 * MIB):
        assert status in (0, STATE_ZERO, STATE_HOLE | STATE_ZERO)
        if status & STATE_ZERO:
            assert c.read(at, n if n < 32 * MIB else 32 * MIB).count(0) == min(n, 32 * MIB)
    assert hole_at(c, 40 * MIB)
    # Any offset may be asked, not only where a block begins.
    for _ in range(200):
        at = rng.randrange(64 * MIB - 1)
        flags = rng.choice([0, FLAG_REQ_ONE])
        for extents in c.block_status(at, rng.randrange(1, 64 * MIB - at + 1), flags).values():
            assert extents


def test_B25_depth_is_one_where_there_is_data(server, clients, chunked, rng):
    c = clients(server, "zero", contexts=[DEPTH], **chunked)
    c.trim(0, 64 * MIB)
    c.write(8 * MIB, pattern(rng, 65536))
    (n, depth), *_ = c.block_status(8 * MIB, 65536)[DEPTH]
    assert depth == 1 and n >= 65536
    (n, depth), *_ = c.block_status(0, 4096)[DEPTH]
    assert depth == 0


@pytest.mark.parametrize("length", [1, 511, 512, 4096, 5000, 16384, MIB, 0xFFFFFFFF])
def test_B25_req_one_is_exactly_one_and_not_longer(server, clients, chunked, rng, length):
    """The client checks it on every reply; here over data, holes and their borders."""
    c = clients(server, "status", contexts=[A, DEPTH], **chunked)
    c.trim(0, GIB)
    for at in range(0, 512 << 10, 32768):
        c.write(at, pattern(rng, 16384))
    for offset in (0, 1, 16383, 16384, 16385, 500000, MIB, 5 * GIB, 5 * GIB + 1):
        got = c.block_status(offset, length, FLAG_REQ_ONE)
        for extents in got.values():
            assert len(extents) == 1 and 1 <= extents[0][0] <= length


def test_B25_no_extent_wraps_in_the_short_form(server, clients, rng):
    """A hole of 12 GiB does not fit 32 bits: shortened, never taken modulo 4 GiB."""
    c = clients(server, "status", contexts=[A], structured=True)
    for at in range(0, 16 * GIB, 2 * GIB):
        c.trim(at, 2 * GIB)
    c.write(14 * GIB, pattern(rng, 65536))
    for start in (0, 1, GIB, 4 * GIB, 9 * GIB + 12345):
        for flags in (0, FLAG_REQ_ONE):
            at, steps = start, 0
            while at < 14 * GIB:
                want = min(0xFFFFFFFF, 16 * GIB - at)
                for n, status in c.block_status(at, want, flags)[A]:
                    assert at + n <= 14 * GIB and status & STATE_HOLE or at >= 14 * GIB
                    at += n
                    if at >= 14 * GIB:
                        break
                steps += 1
                assert steps < 1000, "no progress"


def test_B25_many_extents(server, clients, chunked, rng):
    """Data and holes by turns in 4000 places; every border is where it should be."""
    c = clients(server, "status", contexts=[A], **chunked)
    c.trim(0, 0xFFFFFFFF)
    unit = 64 << 10
    count = 2000
    cookies = [c.request(CMD_WRITE, i * 2 * unit, payload=b"\1" * unit) for i in range(count)]
    for cookie in cookies:
        c.result(cookie).check()
    expected = [(i * unit, unit, 0 if i % 2 == 0 else STATE_HOLE | STATE_ZERO)
                for i in range(2 * count)]
    assert extents_of(c, 0, 2 * count * unit) == expected


@pytest.mark.limit(900)
@pytest.mark.skipif(not os.environ.get("LONG"), reason="LONG=1: writes 700,000 blocks")
def test_B25_at_most_2_to_the_20_extents(servers, clients):
    """More borders than one reply may hold, which only a request over 4 GiB can meet."""
    s = servers.make()
    s.cli("create", "many", "8G", "--block-size", "4K")
    s.start()
    c = clients(s, "many", extended=True, contexts=[A])
    count = 700_000
    for first in range(0, count, 1000):
        parts, cookies = [], []
        for i in range(first, first + 1000):
            cookie, data = c.request(CMD_WRITE, i * 8192, payload=b"\1", send=False)
            parts.append(data)
            cookies.append(cookie)
        c.send(b"".join(parts))
        for cookie in cookies:
            c.result(cookie).check()
    extents = c.block_status(0, count * 8192)[A]
    # That there are no more than 2^20 is checked by the client, which a test of one
    # block in two would have passed without.
    assert len(extents) > 1000
    at = 0
    for n, status in extents:
        assert bool(status & STATE_HOLE) == (at // 4096 % 2 == 1)
        at += n
