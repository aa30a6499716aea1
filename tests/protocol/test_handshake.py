"""Checklist A: the handshake, byte by byte.

One test (or a few) for each line; A8, A9 and the TLS half of A12 are with the
TLS tests. Whatever a client sends, the server answers as the NBD protocol
document says, stays in step, or closes; it never dies and never stops serving
others.
"""

import socket
import struct
import time
from pathlib import Path

import pytest

from harness.rawnbd import (
    BLOCK_STATUS_PAYLOAD, CAN_MULTI_CONN, CMD_BLOCK_STATUS, CMD_READ, EINVAL, FIXED_NEWSTYLE,
    HAS_FLAGS, IHAVEOPT, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME, NO_ZEROES,
    OPT_ABORT, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_INFO, OPT_LIST,
    OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STARTTLS, OPT_STRUCTURED_REPLY, READ_ONLY,
    REP_ACK, REP_ERR, REP_ERR_INVALID, REP_ERR_POLICY, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN,
    REP_ERR_UNSUP, REP_INFO, SEND_CACHE, SEND_DF, SEND_FAST_ZERO, SEND_FLUSH, SEND_FUA,
    SEND_RESIZE, SEND_TRIM, SEND_WRITE_ZEROES, Closed, OptionError, ProtocolError)
from harness.server import SLOW, wait_until

MIB = 1 << 20
DESCRIPTION = "a volume that is described"

# An option the server knows but is asked wrongly. TOO_BIG and UNKNOWN are as good a
# refusal as INVALID where a name is longer than any name may be.
WRONG_NAME = (REP_ERR_INVALID, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN)


@pytest.fixture(scope="module")
def server(module_servers):
    s = module_servers.make({"a": "64M", "odd": 1049088})
    s.cli("create", "described", "1M", "--description", DESCRIPTION)
    return s.start()


@pytest.fixture
def raw(server, clients):
    """A connection behind the greeting, before any option."""
    def connect(flags=FIXED_NEWSTYLE | NO_ZEROES):
        client = clients.raw(server)
        client.handshake(flags)
        return client
    return connect


def in_step(client):
    """The next option is understood as what it is."""
    names = [name for name, _ in client.list()]
    assert "a" in names


# -- A1 ---------------------------------------------------------------------------


def test_A01_offers_fixed_newstyle_and_no_zeroes_only(server, clients):
    assert clients.raw(server).greeting() == FIXED_NEWSTYLE | NO_ZEROES


@pytest.mark.parametrize("flags", [4, 7, 1 << 16, 1 << 31, 0xFFFFFFFF])
def test_A01_unknown_client_flags_close(server, clients, flags):
    c = clients.raw(server)
    c.handshake(flags)
    try:
        # Behind the flags comes a good option: it must not be answered any more.
        c.send_option(OPT_LIST)
    except ConnectionError:
        return
    c.expect_closed()


@pytest.mark.parametrize("flags", [0, FIXED_NEWSTYLE, NO_ZEROES, FIXED_NEWSTYLE | NO_ZEROES])
def test_A01_every_legal_set_of_client_flags_is_served(raw, flags):
    c = raw(flags)
    export = c.export_name("a")
    assert export.size == 64 * MIB
    assert c.read(0, 512) == bytes(512)


@pytest.mark.parametrize("magic", [0, IHAVEOPT + 1, 0x3E889045565A9])
def test_A01_an_option_without_its_magic_closes(raw, magic):
    c = raw()
    c.send(struct.pack(">QLL", magic, OPT_LIST, 0))
    c.expect_closed()


# -- A2 ---------------------------------------------------------------------------


@pytest.mark.parametrize("option", [0, 4, 12, 1000, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 300, 9000])
def test_A02_unknown_option_is_unsup_and_its_payload_consumed(raw, option, length):
    c = raw()
    # The payload looks like options itself, so that a server out of step shows it.
    payload = (struct.pack(">QLL", IHAVEOPT, OPT_ABORT, 0) * (length // 16 + 1))[:length]
    assert c.option(option, payload)[1] == REP_ERR_UNSUP
    assert c.option(option, payload)[1] == REP_ERR_UNSUP
    in_step(c)


def test_A02_refused_options_consume_their_payload(raw):
    c = raw()
    junk = struct.pack(">QLL", IHAVEOPT, OPT_ABORT, 0) * 20
    for option in (OPT_LIST, OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS, OPT_INFO, OPT_GO,
                   OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STARTTLS):
        kind = c.option(option, junk)[1]
        assert kind & REP_ERR, f"option {option} took nonsense: {kind}"
        in_step(c)


def test_A02_options_in_one_segment_are_answered_one_by_one(raw):
    c = raw()
    batch = b"".join(struct.pack(">QLL", IHAVEOPT, option, len(data)) + data for option, data in
                     [(77, b"xyz"), (OPT_LIST, b""), (78, b""), (OPT_LIST, b"no"),
                      (OPT_INFO, c.go_data("a"))])
    c.send(batch)
    assert c.collect_option(77)[1] == REP_ERR_UNSUP
    assert c.collect_option(OPT_LIST)[1] == REP_ACK
    assert c.collect_option(78)[1] == REP_ERR_UNSUP
    assert c.collect_option(OPT_LIST)[1] == REP_ERR_INVALID
    assert c.collect_option(OPT_INFO)[1] == REP_ACK


def test_A02_bytes_that_come_one_at_a_time(server, clients):
    """Whatever the sizes of the pieces the kernel hands over."""
    c = clients.raw(server)
    c.greeting()
    c.no_zeroes = True
    stream = (struct.pack(">L", 3) + struct.pack(">QLL", IHAVEOPT, 99, 3) + b"abc"
              + struct.pack(">QLL", IHAVEOPT, OPT_STRUCTURED_REPLY, 0)
              + struct.pack(">QLL", IHAVEOPT, OPT_GO, len(c.go_data("a"))) + c.go_data("a"))
    for i in range(len(stream)):
        c.send(stream[i:i + 1])
    assert c.collect_option(99)[1] == REP_ERR_UNSUP
    assert c.collect_option(OPT_STRUCTURED_REPLY)[1] == REP_ACK
    assert c.collect_option(OPT_GO)[1] == REP_ACK
    c.structured = True
    header = c.request(CMD_READ, 0, 4096, send=False)
    for i in range(len(header[1])):
        c.send(header[1][i:i + 1])
    assert c.result(header[0]).check().data == bytes(4096)


# -- A3 ---------------------------------------------------------------------------


def info(name_length, name, count, infos=b""):
    return struct.pack(">L", name_length) + name + struct.pack(">H", count) + infos


@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
@pytest.mark.parametrize("data", [
    b"", b"\0", b"\0\0\0\0", b"\0\0\0\0\0",
    info(0xFFFFFFFF, b"a", 0), info(0xFFFFFFFA, b"a", 0), info(0x7FFFFFFF, b"a", 0),
    info(2, b"a", 0), info(3, b"a", 0), info(0, b"a", 0),
    info(1, b"a", 1), info(1, b"a", 0xFFFF), info(1, b"a", 2, b"\0\3"), info(1, b"a", 1, b"\0"),
    info(1, b"a", 0, b"\0\3"), info(1, b"a", 1, b"\0\3\0"),
], ids=lambda d: d.hex() or "empty")
def test_A03_inner_lengths_of_info_and_go(raw, option, data):
    c = raw()
    assert c.option(option, data)[1] in (REP_ERR_INVALID, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN)
    in_step(c)


def meta(name_length, name, count, *queries):
    return (struct.pack(">L", name_length) + name + struct.pack(">L", count)
            + b"".join(struct.pack(">L", n) + q for n, q in queries))


@pytest.mark.parametrize("option", [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT])
@pytest.mark.parametrize("data", [
    b"", b"\0\0\0\0", b"\0\0\0\0\0\0\0",
    meta(0xFFFFFFFF, b"a", 0), meta(0xFFFFFFF8, b"a", 0), meta(2, b"a", 0), meta(5, b"a", 0),
    meta(1, b"a", 1), meta(1, b"a", 0xFFFFFFFF), meta(1, b"a", 0x40000000),
    meta(1, b"a", 1, (0xFFFFFFFF, b"base:allocation")),
    meta(1, b"a", 1, (16, b"base:allocation")),
    meta(1, b"a", 2, (15, b"base:allocation")),
    meta(1, b"a", 1, (14, b"base:allocation")),
    meta(1, b"a", 0, (15, b"base:allocation")),
], ids=lambda d: d.hex() or "empty")
def test_A03_inner_lengths_of_meta_contexts(raw, option, data):
    c = raw()
    c.structured_reply()
    assert c.option(option, data)[1] in (REP_ERR_INVALID, REP_ERR_TOO_BIG)
    in_step(c)


@pytest.mark.parametrize("length", [257, 1000, 4095, 4096])
def test_A03_long_but_legal_names_are_only_unknown(raw, length):
    c = raw()
    name = ("é" * length).encode()[:length // 2 * 2].ljust(length, b"x")
    for option in (OPT_INFO, OPT_GO):
        assert c.option(option, c.go_data(name))[1] == REP_ERR_UNKNOWN
    c.structured_reply()
    kind = c.option(OPT_SET_META_CONTEXT, c.meta_data(name, ["base:allocation"]))[1]
    assert kind == REP_ERR_UNKNOWN
    in_step(c)


@pytest.mark.parametrize("length", [4097, 8192, 65000])
def test_A03_names_over_4096_are_refused(raw, server, length):
    c = raw()
    for option in (OPT_INFO, OPT_GO):
        assert c.option(option, c.go_data("x" * length))[1] in WRONG_NAME
        in_step(c)
    c = raw()
    c.send_option(OPT_EXPORT_NAME, b"x" * length)
    c.expect_closed()


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"a\0",
                                  b"\0", b"a\0b"])
def test_A03_names_that_are_no_strings(raw, name):
    c = raw()
    for option in (OPT_INFO, OPT_GO):
        assert c.option(option, c.go_data(name))[1] in WRONG_NAME
    in_step(c)
    c.send_option(OPT_EXPORT_NAME, name)
    c.expect_closed()


def resident_bytes(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


@pytest.mark.parametrize("option", [OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO,
                                    OPT_GO, OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT,
                                    OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS, 12345])
def test_A03_an_option_of_4_GiB(server, clients, option):
    """Closed or skipped as it comes, but never stored."""
    before = resident_bytes(server.pid)
    c = clients.raw(server)
    c.handshake()
    c.send_option(option, length=0xFFFFFFFF)
    piece, sent = b"\0" * MIB, 0
    try:
        # 96 MiB are enough to tell: who stores them has grown by as much.
        while sent < 96:
            c.send(piece)
            sent += 1
    except (ConnectionError, TimeoutError):
        pass
    assert resident_bytes(server.pid) < before + 48 * MIB
    server.check_alive()
    in_step_elsewhere = clients.raw(server)
    in_step_elsewhere.handshake()
    in_step(in_step_elsewhere)


# -- A4 ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, FIXED_NEWSTYLE, NO_ZEROES, FIXED_NEWSTYLE | NO_ZEROES])
def test_A04_export_name_and_the_124_zeros(raw, flags):
    """10 bytes, then 124 zeros only without NO_ZEROES; the next byte is a reply."""
    c = raw(flags)
    c.send_option(OPT_EXPORT_NAME, b"a")
    size, transmission = struct.unpack(">QH", c.recv(10))
    assert size == 64 * MIB and transmission & HAS_FLAGS
    if not flags & NO_ZEROES:
        assert c.recv(124) == bytes(124)
    assert c.read(4096, 16) == bytes(16)


@pytest.mark.parametrize("flags", [FIXED_NEWSTYLE, FIXED_NEWSTYLE | NO_ZEROES])
def test_A04_never_zeros_after_go(raw, flags):
    c = raw(flags)
    assert c.go("a").size == 64 * MIB
    # recv_chunk() fails on anything that does not begin with a reply's magic.
    assert c.read(4096, 16) == bytes(16)


# -- A5 ---------------------------------------------------------------------------


@pytest.mark.parametrize("option", [OPT_LIST, OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS,
                                    OPT_STARTTLS])
@pytest.mark.parametrize("data", [b"\0", b"a", b"x" * 500])
def test_A05_options_that_carry_no_data_are_invalid_with_some(raw, option, data):
    c = raw()
    kind = c.option(option, data)[1]
    # A server without TLS may say so first.
    allowed = (REP_ERR_INVALID, REP_ERR_UNSUP, REP_ERR_POLICY) if option == OPT_STARTTLS \
        else (REP_ERR_INVALID,)
    assert kind in allowed
    in_step(c)
    # And it had no effect: replies are still simple.
    c.go("a")
    assert c.read(0, 8) == bytes(8)


def test_A05_starttls_without_tls(raw):
    c = raw()
    assert c.option(OPT_STARTTLS)[1] in (REP_ERR_UNSUP, REP_ERR_POLICY)
    in_step(c)


@pytest.mark.parametrize("data", [b"", b"x", b"y" * 1000])
def test_A05_abort_is_acknowledged_data_or_not(raw, data):
    c = raw()
    assert c.abort(data)[1] == REP_ACK
    c.expect_closed()


def test_A05_list_names_and_describes(raw):
    listed = dict(raw().list())
    assert {"a", "odd", "described"} <= set(listed)
    assert listed["described"] in ("", DESCRIPTION)


def test_A05_a_client_may_close_without_reading(server, clients):
    """At every place where it can hang up, and with an answer under way."""
    for option, data in [(OPT_ABORT, b""), (OPT_LIST, b""), (OPT_GO, b"\0\0\0\1a\0\0"), (99, b"")]:
        for reset in (False, True):
            c = clients.raw(server)
            c.handshake()
            c.send_option(option, data)
            if reset:
                c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            c.close()
    for sent in (b"", b"\0", struct.pack(">L", 3), struct.pack(">LQ", 3, IHAVEOPT),
                 struct.pack(">LQLL", 3, IHAVEOPT, OPT_GO, 1000) + b"\0\0\0"):
        c = clients.raw(server)
        c.send(sent)
        c.close()
    server.check_alive()
    c = clients.raw(server)
    c.handshake()
    in_step(c)


# -- A6 ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing", "A", "a ", " a", "a/", "../a", "a@", "a@nothing",
                                  "x" * 128])
def test_A06_unknown_export(raw, name):
    c = raw()
    for option in (OPT_INFO, OPT_GO):
        replies, kind, _ = c.option(option, c.go_data(name))
        assert kind == REP_ERR_UNKNOWN
        assert replies == []
    # It goes on: the very same connection can still take what there is.
    assert c.go("a").size == 64 * MIB
    assert c.read(0, 1) == b"\0"
    c = raw()
    c.send_option(OPT_EXPORT_NAME, name.encode())
    c.expect_closed()


def test_A06_the_default_export(servers, clients):
    s = servers.start({"one": "1M", "two": "2M"}, ["--default", "two"])
    for style in ("go", "export_name"):
        c = clients.raw(s)
        c.handshake()
        assert getattr(c, style)("").size == 2 * MIB
    c = clients.raw(s)
    c.handshake()
    assert c.info("", [INFO_NAME]).name in ("two", "")


# -- A7 ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "odd", "described"])
@pytest.mark.parametrize("infos", [[], [INFO_BLOCK_SIZE], [INFO_EXPORT],
                                   [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, INFO_EXPORT]])
def test_A07_info_then_go_say_the_same(raw, name, infos):
    for structured in (False, True):
        c = raw()
        if structured:
            c.structured_reply()
        first = c.info(name, infos)
        second = c.go(name, infos)
        assert sorted(first.infos) == sorted(second.infos)
        assert first.flags == second.flags and first.size == second.size


def test_A07_info_export_comes_before_ack(raw):
    c = raw()
    replies, kind, _ = c.option(OPT_INFO, c.go_data("a"))
    assert kind == REP_ACK
    assert [k for k, _ in replies].count(REP_INFO) == len(replies)
    assert [d[:2] for _, d in replies].count(b"\0\0") == 1


@pytest.mark.parametrize("infos", [[4], [77], [0xFFFF, 3, 9999], list(range(100, 400))])
def test_A07_unknown_information_requests_are_ignored(raw, infos):
    c = raw()
    assert c.info("a", infos).size == 64 * MIB
    export = c.go("a", infos)
    # Only what is known may come back.
    assert {kind for kind, _ in export.infos} <= {0, 1, 2, 3}
    if 3 in infos:
        assert export.block_size
    assert c.read(0, 4) == bytes(4)


def test_A07_what_is_asked_for_is_told(raw):
    export = raw().info("described", [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE])
    assert export.name == "described"
    assert export.description == DESCRIPTION
    minimum, preferred, payload = export.block_size
    # Any offset and length down to one byte, payloads up to 32 MiB (B19, B20).
    assert minimum == 1
    assert preferred >= 512 and preferred & (preferred - 1) == 0
    assert payload >= 32 * MIB and payload >= preferred


def test_A07_sizes_are_exact(raw):
    c = raw()
    assert c.info("odd").size == 1049088
    assert c.info("a").size == 64 * MIB


# -- A10 --------------------------------------------------------------------------


def status_error(client, offset=0, length=4096):
    return client.error_of(CMD_BLOCK_STATUS, offset, length)


def test_A10_set_meta_context_needs_structured_replies(raw):
    c = raw()
    kind = c.option(OPT_SET_META_CONTEXT, c.meta_data("a", ["base:allocation"]))[1]
    assert kind == REP_ERR_INVALID
    in_step(c)
    c.go("a")
    assert status_error(c) == EINVAL


@pytest.mark.parametrize("failing", ["unknown export", "invalid", "nothing selected", "no queries"])
def test_A10_a_later_set_replaces_the_earlier_even_when_it_fails(raw, failing):
    c = raw()
    c.structured_reply()
    assert c.set_meta_context("a", "base:allocation")
    if failing == "unknown export":
        kind = c.option(OPT_SET_META_CONTEXT, c.meta_data("nothing", ["base:allocation"]))[1]
        assert kind == REP_ERR_UNKNOWN
    elif failing == "invalid":
        assert c.option(OPT_SET_META_CONTEXT, b"\0\0\0\1a")[1] == REP_ERR_INVALID
    elif failing == "nothing selected":
        assert c.set_meta_context("a", "base:nothing") == []
    else:
        assert c.set_meta_context("a") == []
    c.contexts = {}
    c.go("a")
    assert status_error(c) == EINVAL
    assert c.read(0, 8) == bytes(8)


def test_A10_the_set_must_name_the_export_go_opens(raw):
    c = raw()
    c.structured_reply()
    c.set_meta_context("odd", "base:allocation")
    c.contexts = {}
    c.go("a")
    assert status_error(c) == EINVAL
    # In the other order of names it works, so it was the name.
    c = raw()
    c.structured_reply()
    c.set_meta_context("odd", "base:allocation")
    c.set_meta_context("a", "base:allocation")
    c.go("a")
    assert "base:allocation" in c.block_status(0, 4096)


@pytest.mark.parametrize("queries", [["x-unknown:thing"], ["nbd-server:stuff"], ["y:"], ["é:ß"],
                                     ["base:unknown"], ["base:allocatio"],
                                     ["base:allocation2"], ["qemu:unknown"]])
def test_A10_unknown_namespaces_and_leaves_are_ignored(raw, queries):
    c = raw()
    c.structured_reply()
    assert c.list_meta_context("a", *queries) == []
    assert c.set_meta_context("a", *queries) == []
    # Between known ones they do not disturb.
    got = c.set_meta_context("a", queries[0], "base:allocation", queries[0])
    assert [name for _, name in got] == ["base:allocation"]
    c.go("a")
    assert "base:allocation" in c.block_status(0, 4096)


def test_A10_base_alone_lists_on_list_and_selects_nothing_on_set(raw):
    c = raw()
    c.structured_reply()
    assert [n for _, n in c.list_meta_context("a", "base:")] == ["base:allocation"]
    assert c.set_meta_context("a", "base:") == []
    c.go("a")
    assert status_error(c) == EINVAL


def test_A10_list_without_queries_lists_all(raw):
    c = raw()
    c.structured_reply()
    names = [n for _, n in c.list_meta_context("a")]
    assert {"base:allocation", "qemu:allocation-depth"} <= set(names)
    assert len(set(names)) == len(names)
    # LIST selects nothing.
    c.go("a")
    assert status_error(c) == EINVAL


def test_A10_list_with_queries_lists_what_matches(raw):
    c = raw()
    c.structured_reply()
    assert [n for _, n in c.list_meta_context("a", "base:allocation")] == ["base:allocation"]
    assert "qemu:allocation-depth" in [n for _, n in c.list_meta_context("a", "qemu:")]
    assert c.option(OPT_LIST_META_CONTEXT, c.meta_data("nothing", ["base:"]))[1] \
        == REP_ERR_UNKNOWN


def test_A10_several_contexts_have_ids_of_their_own(raw):
    c = raw()
    c.structured_reply()
    got = c.set_meta_context("a", "qemu:allocation-depth", "base:allocation", "base:allocation")
    assert sorted(n for _, n in got) == ["base:allocation", "qemu:allocation-depth"]
    c.go("a")
    assert set(c.block_status(0, 4096)) == {"base:allocation", "qemu:allocation-depth"}


def test_A10_contexts_work_with_export_name_too(raw):
    c = raw()
    c.structured_reply()
    c.set_meta_context("a", "base:allocation")
    c.export_name("a")
    assert "base:allocation" in c.block_status(0, 4096)


def test_A10_a_query_of_the_wrong_form_is_refused_or_ignored(raw):
    for query in ("", "nocolon", ":", ":leaf"):
        c = raw()
        c.structured_reply()
        try:
            assert c.set_meta_context("a", query) == []
        except OptionError as e:
            assert e.type == REP_ERR_INVALID
        in_step(c)


def test_A10_many_queries(raw):
    """Up to a limit they are answered; past it refused, in step."""
    for count in (100, 5000):
        c = raw()
        c.structured_reply()
        queries = ["x-a:b"] * (count - 1) + ["base:allocation"]
        try:
            assert [n for _, n in c.set_meta_context("a", *queries)] == ["base:allocation"]
        except OptionError as e:
            assert count > 100 and e.type in (REP_ERR_TOO_BIG, REP_ERR_INVALID)
        except (Closed, ConnectionError):
            # 5000 of them are more bytes than any option needs.
            assert count > 100
            continue
        in_step(c)


# -- A11 --------------------------------------------------------------------------


def test_A11_flags_of_a_writable_export(raw):
    flags = raw().info("a").flags
    expected = (HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES
                | CAN_MULTI_CONN | SEND_CACHE | SEND_FAST_ZERO)
    assert flags & expected == expected
    assert not flags & (READ_ONLY | SEND_RESIZE)
    assert flags < 1 << 13


def test_A11_df_only_with_structured_replies(raw):
    c = raw()
    assert not c.info("a").flags & SEND_DF
    c.structured_reply()
    assert c.info("a").flags & SEND_DF
    assert c.go("a").flags & SEND_DF
    assert not raw().export_name("a").flags & SEND_DF
    c = raw()
    c.structured_reply()
    assert c.export_name("a").flags & SEND_DF


def test_A11_fast_zero_only_with_write_zeroes(raw, servers, clients):
    def check(flags):
        if flags & SEND_FAST_ZERO:
            assert flags & SEND_WRITE_ZEROES
    check(raw().info("a").flags)
    s = servers.start({"r": "1M"}, ["--read-only"])
    c = clients.raw(s)
    c.handshake()
    flags = c.info("r").flags
    assert flags & READ_ONLY
    check(flags)


def test_A11_block_status_payload_only_with_extended_headers_and_contexts(raw):
    c = raw()
    c.structured_reply()
    c.set_meta_context("a", "base:allocation")
    assert not c.info("a").flags & BLOCK_STATUS_PAYLOAD
    c = raw()
    c.extended_headers()
    assert not c.info("a").flags & BLOCK_STATUS_PAYLOAD
    c.set_meta_context("a", "base:allocation")
    assert c.go("a").flags & BLOCK_STATUS_PAYLOAD


# -- A12 --------------------------------------------------------------------------

HANDSHAKE_LIMIT_S = 60


@pytest.mark.limit(HANDSHAKE_LIMIT_S + 60)
def test_A12_silent_slow_and_half_open_handshakes_end(server, clients):
    """However it is drawn out, a handshake is over within a minute.

    And one that has been completed has no limit left: that connection may stay quiet.
    """
    quiet = clients(server, "a")
    silent = clients.raw(server)
    half = clients.raw(server)
    half.handshake()
    half.send(struct.pack(">QLL", IHAVEOPT, OPT_GO, 100) + b"\0\0")
    # These two keep sending: the limit is on the handshake, not on the pause.
    trickle = clients.raw(server)
    trickle.handshake()
    chatty = clients.raw(server)
    chatty.handshake()
    started = time.monotonic()
    open_ones = {silent: b"", half: b"", trickle: None, chatty: None}
    stream = struct.pack(">QLL", IHAVEOPT, 99, 30000) + bytes(30000)
    at = 0
    for c in open_ones:
        c.sock.setblocking(False)
    while open_ones:
        for c in list(open_ones):
            try:
                if c is trickle:
                    c.sock.send(stream[at:at + 1])
                    at += 1
                elif c is chatty:
                    c.sock.send(struct.pack(">QLL", IHAVEOPT, OPT_LIST, 0))
                if c.sock.recv(65536) == b"":
                    del open_ones[c]
            except BlockingIOError:
                pass
            except ConnectionError:
                del open_ones[c]
        left = [name for name, c in (("silent", silent), ("half", half), ("trickle", trickle),
                                     ("chatty", chatty)) if c in open_ones]
        assert time.monotonic() - started < HANDSHAKE_LIMIT_S * SLOW, f"still open: {left}"
        time.sleep(0.1)
    assert quiet.read(0, 512) == bytes(512)
    server.check_alive()


@pytest.mark.limit(HANDSHAKE_LIMIT_S + 60)
def test_A12_many_silent_connections_do_not_keep_a_client_out(servers, clients):
    """Their number is bounded, or their time: either way the next client gets its turn."""
    s = servers.start({"a": "64M"})
    before = resident_bytes(s.pid)
    crowd = []
    for _ in range(400):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        crowd.append(sock)
        try:
            sock.connect(str(s.socket_path))
        except (BlockingIOError, ConnectionError):
            # The queue of connections nobody has accepted yet is full: that is a bound too.
            pass

    def served():
        c = None
        try:
            c = clients.raw(s, timeout_s=5)
            c.handshake()
            c.go("a")
            return c.read(0, 512) == bytes(512)
        except (OSError, Closed):
            return False
        finally:
            if c:
                c.close()

    wait_until(served, HANDSHAKE_LIMIT_S * SLOW, "a client is served among 400 silent ones", 0.1)
    assert resident_bytes(s.pid) < before + 64 * MIB
    for sock in crowd:
        sock.close()
    s.check_alive()
