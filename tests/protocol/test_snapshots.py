"""Snapshots over NBD, byte by byte: VOLUME@SNAPSHOT as an export, what has changed since one
(checklist B.25, D.10), and how deep in a chain of clones data lies.

Most tests run over structured and over extended replies.
"""

import struct
import threading

import pytest

from harness.rawnbd import (
    CAN_MULTI_CONN, CMD_BLOCK_STATUS, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EINVAL, EPERM,
    FLAG_NO_HOLE, FLAG_PAYLOAD_LEN, FLAG_REQ_ONE, INFO_DESCRIPTION, INFO_NAME, OPT_GO,
    OPT_SET_META_CONTEXT, READ_ONLY, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, SEND_TRIM,
    SEND_WRITE_ZEROES, STATE_HOLE, STATE_ZERO, Client, OptionError)
from harness.server import SLOW, wait_until

MIB = 1 << 20
A = "base:allocation"
DEPTH = "qemu:allocation-depth"
STYLES = {"structured": {"structured": True}, "extended": {"extended": True}}
DIRTY = 1
BLOCK = 4096


def bitmap(name):
    return f"qemu:dirty-bitmap:{name}"


@pytest.fixture(params=list(STYLES))
def chunked(request):
    return STYLES[request.param]


@pytest.fixture(scope="module")
def server(module_servers):
    return module_servers.start({"many": "1M"})


def volume(server, name, size):
    server.cli("create", name, size, "--block-size", "4K")
    return name


@pytest.fixture
def raw(server):
    """A connection in the middle of the handshake, with structured replies."""
    made = []

    def make(at=None):
        c = Client(at or server)
        made.append(c)
        c.handshake()
        return c.structured_reply()

    yield make
    for c in made:
        c.close()


_numbers = iter(range(1000))


@pytest.fixture
def v(server):
    return volume(server, f"v{next(_numbers)}", "8M")


def extents_of(c, context, offset, length, flags=0):
    """[(offset, length, status)] of a whole range, asking again where a reply was shorter."""
    out, at = [], offset
    while at < offset + length:
        for n, status in c.block_status(at, offset + length - at, flags)[context]:
            n = min(n, offset + length - at)
            out.append((at, n, status))
            at += n
    return out


# -- the export -------------------------------------------------------------------


def test_a_snapshot_is_an_export_for_reading(server, clients, chunked, v, rng):
    w = clients(server, v)
    old = rng.randbytes(MIB)
    w.write(12345, old)
    server.cli("snapshot", "create", f"{v}@daily")
    w.write(12345, rng.randbytes(MIB))
    w.trim(0, 8 * MIB)
    server.cli("resize", v, "12M")
    c = clients(server, f"{v}@daily", **chunked)
    assert c.export.size == 8 * MIB
    assert c.export.flags & READ_ONLY and c.export.flags & CAN_MULTI_CONN
    assert not c.export.flags & (SEND_TRIM | SEND_WRITE_ZEROES)
    assert c.export.name == f"{v}@daily"
    assert c.export.description.startswith(f"snapshot daily of {v}, 20")
    assert c.read(12345, MIB) == old
    assert c.read(0, 12345) == bytes(12345)
    c.flush()
    c.cache(0, MIB)
    # B.17: the payload is consumed, and the connection goes on.
    assert c.error_of(CMD_WRITE, 0, payload=b"x" * 70000) == EPERM
    assert c.error_of(CMD_TRIM, 0, 4096) == EPERM
    assert c.error_of(CMD_WRITE_ZEROES, 0, 4096) == EPERM
    assert c.read(12345, MIB) == old


def test_several_clients_of_several_snapshots_at_once(server, clients, v, rng):
    w = clients(server, v)
    data = []
    for i in range(3):
        data.append(rng.randbytes(300000))
        w.write(i * 1000, data[i])
        server.cli("snapshot", "create", f"{v}@s{i}")
    at_once = [clients(server, f"{v}@s{i}") for i in range(3) for _ in range(2)]
    for i, c in enumerate(at_once):
        assert c.read((i // 2) * 1000, 300000) == data[i // 2]
    w.write(0, bytes(MIB))
    for i, c in enumerate(at_once):
        assert c.read((i // 2) * 1000, 300000) == data[i // 2]


def test_what_there_is_by_name(server, raw, v):
    """Unknown ones are refused in step; the list has volumes only; EXPORT_NAME works."""
    server.cli("snapshot", "create", f"{v}@a")
    c = raw()
    for name in (f"{v}@b", f"{v}@", f"@{v}", f"{v}@a@a", "nothing@a", f"{v}@" + "x" * 200):
        for option in (OPT_GO, 6):
            assert c.option(option, c.go_data(name))[1] == REP_ERR_UNKNOWN, name
    assert c.info(f"{v}@a", [INFO_NAME, INFO_DESCRIPTION]).flags == c.go(f"{v}@a").flags
    c = raw()
    names = [name for name, _ in c.list()]
    assert v in names and not any("@" in name for name in names)
    assert c.export_name(f"{v}@a").flags & READ_ONLY
    assert c.read(0, 100) == bytes(100)


def test_another_server_serves_the_snapshot_of_a_volume_in_use(servers, clients, rng):
    """Without ownership, and without disturbing whoever writes."""
    one = servers.start({"v": "8M"})
    two = servers.start(store=one.store)
    w = clients(one, "v")
    old = rng.randbytes(MIB)
    w.write(0, old)
    two.cli("snapshot", "create", "v@s")
    c = clients(two, "v@s", structured=True, contexts=[A])
    for i in range(20):
        w.write(i * 4096, rng.randbytes(MIB))
        assert c.read(i, MIB - i) == old[i:]
    assert extents_of(c, A, 0, MIB) == [(0, MIB, 0)]
    assert one.json("owner", "show", "v")["owner"] is not None
    assert w.read(0, 1) != b""


# -- what there is to choose ------------------------------------------------------


def test_contexts_of_snapshots_are_listed_and_set_by_name(server, raw, v):
    for name in ("old", "mid", "new"):
        server.cli("snapshot", "create", f"{v}@{name}")
    c = raw()
    always = {A, DEPTH}
    all_three = {bitmap("old"), bitmap("mid"), bitmap("new")}

    def listed(*queries, export=v):
        return [name for _, name in c.list_meta_context(export, *queries)]

    assert set(listed()) == always | all_three and len(listed()) == 5
    assert set(listed("qemu:")) == {DEPTH} | all_three
    assert listed("qemu:dirty-bitmap:") == [bitmap("new"), bitmap("mid"), bitmap("old")]
    assert listed(bitmap("mid"), "x:y") == [bitmap("mid")]
    assert listed("base:") == [A] and listed("qemu") == [] and listed(bitmap("o")) == []
    # What has changed in a snapshot is told since those before it.
    assert set(listed("qemu:", export=f"{v}@mid")) == {DEPTH, bitmap("old")}
    assert set(listed(export=f"{v}@old")) == always
    for queries in (["qemu:"], ["qemu:dirty-bitmap:"], [bitmap("none")], [bitmap("")]):
        assert c.set_meta_context(v, *queries) == []
    assert c.set_meta_context(f"{v}@mid", bitmap("mid"), bitmap("new")) == []
    got = c.set_meta_context(v, bitmap("new"), A, bitmap("old"), bitmap("new"))
    assert {name for _, name in got} == {A, bitmap("new"), bitmap("old")}
    assert len({i for i, _ in got}) == 3
    c.go(v)
    assert set(c.block_status(0, MIB)) == {A, bitmap("new"), bitmap("old")}


def test_only_so_many_contexts_at_once(server, raw):
    names = [f"s{i}" for i in range(20)]
    for name in names:
        server.cli("snapshot", "create", f"many@{name}")
    c = raw()
    assert len(c.list_meta_context("many", "qemu:dirty-bitmap:")) == 20
    kind = c.option(OPT_SET_META_CONTEXT,
                    c.meta_data("many", [bitmap(n) for n in names[:17]]))[1]
    assert kind == REP_ERR_TOO_BIG
    assert len(c.set_meta_context("many", *[bitmap(n) for n in names[:16]])) == 16
    c.go("many")
    assert len(c.block_status(0, MIB)) == 16


# -- what has changed -------------------------------------------------------------


def test_D10_B25_dirty_is_what_has_changed_since_then(server, clients, chunked, v, rng):
    """Random changes between three snapshots, of which the newest is looked at, too: whatever
    differs is dirty, whatever was not touched is not."""
    size = 8 * MIB
    w = clients(server, v)
    states, touched = [], []
    for i in range(4):
        blocks = set()
        for _ in range(12):
            at = rng.randrange(size)
            length = min(rng.choice([1, 100, 4096, 5000, 65536, 400000]), size - at)
            what = rng.random()
            if what < 0.6:
                w.write(at, rng.randbytes(length))
            elif what < 0.8:
                w.zero(at, length, rng.choice([0, FLAG_NO_HOLE]))
            else:
                w.trim(at, length)
            blocks |= set(range(at // BLOCK, (at + length - 1) // BLOCK + 1))
        touched.append(blocks)
        states.append(w.read(0, size))
        if i < 3:
            server.cli("snapshot", "create", f"{v}@s{i}")
    exports = {f"{v}@s1": 1, f"{v}@s2": 2, v: 3}
    for export, now in exports.items():
        since = list(range(now))
        c = clients(server, export, contexts=[A, DEPTH, *(bitmap(f"s{i}") for i in since)],
                    **chunked)
        assert c.read(0, size) == states[now]
        for i in since:
            extents = extents_of(c, bitmap(f"s{i}"), 0, size, rng.choice([0, FLAG_REQ_ONE]))
            dirty = set()
            for at, length, status in extents:
                assert status in (0, DIRTY)
                if status:
                    dirty |= set(range(at // BLOCK, (at + length - 1) // BLOCK + 1))
            differs = {b for b in range(size // BLOCK)
                       if states[i][b * BLOCK:(b + 1) * BLOCK]
                       != states[now][b * BLOCK:(b + 1) * BLOCK]}
            assert differs <= dirty
            assert dirty <= set().union(*touched[i + 1:now + 1])
        for _ in range(30):
            at = rng.randrange(size - 1)
            for extents in c.block_status(at, rng.randrange(1, size - at + 1),
                                          rng.choice([0, FLAG_REQ_ONE])).values():
                assert extents


def test_B25_some_of_the_contexts_by_payload(server, clients, v, rng):
    w = clients(server, v)
    w.write(0, rng.randbytes(MIB))
    server.cli("snapshot", "create", f"{v}@s")
    w.write(MIB // 2, rng.randbytes(MIB))
    c = clients(server, v, extended=True, contexts=[A, DEPTH, bitmap("s")])
    ids = {name: i for i, name in c.contexts.items()}
    for names in ([bitmap("s")], [DEPTH, bitmap("s")], [bitmap("s"), A]):
        payload = struct.pack(">Q", 2 * MIB) + b"".join(struct.pack(">L", ids[n]) for n in names)
        result = c.call(CMD_BLOCK_STATUS, 0, len(payload), FLAG_PAYLOAD_LEN, payload,
                        effect_length=2 * MIB).check()
        assert set(result.extents) == {ids[n] for n in names}
        assert result.extents[ids[bitmap("s")]] == [(MIB // 2, 0), (MIB, DIRTY), (MIB // 2, 0)]


def test_D10_a_snapshot_has_all_that_was_answered_before(server, clients, v):
    """Under a client that writes all the time: its writes are there up to one that was not yet
    answered when the command began, and none that was asked for after it ended."""
    w = clients(server, v)
    answered, asked, stop = [0], [0], threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            asked[0] = number
            w.write(number % 500 * BLOCK, struct.pack("<Q", number) * (BLOCK // 8))
            answered[0] = number

    thread = threading.Thread(target=write)
    thread.start()
    try:
        bounds = []
        for i in range(5):
            wait_until(lambda n=answered[0]: answered[0] > n + 50, 60 * SLOW, "writes go on")
            before = answered[0]
            server.cli("snapshot", "create", f"{v}@s{i}")
            bounds.append((before, asked[0]))
    finally:
        stop.set()
        thread.join()
    for i, (low, high) in enumerate(bounds):
        c = clients(server, f"{v}@s{i}")
        found = [struct.unpack("<Q", c.read(n * BLOCK, 8))[0] for n in range(500)]
        newest = max(found)
        assert low <= newest <= high
        # A prefix: each place has the last write up to the newest one.
        for n, number in enumerate(found):
            last = newest - (newest - n) % 500
            assert number == max(last, 0)


# -- what goes away ---------------------------------------------------------------


def test_clients_of_a_removed_snapshot_are_closed(server, clients, v, rng):
    w = clients(server, v)
    w.write(0, rng.randbytes(MIB))
    server.cli("snapshot", "create", f"{v}@gone")
    server.cli("snapshot", "create", f"{v}@stays")
    c = clients(server, f"{v}@gone")
    other = clients(server, f"{v}@stays")
    assert len(c.read(0, 100)) == 100
    server.cli("snapshot", "remove", f"{v}@gone")
    c.expect_closed(60 * SLOW)
    assert f"info: {v}@gone: the snapshot was removed" in server.log()
    assert other.read(0, MIB) == w.read(0, MIB)


def test_a_dirty_bitmap_from_a_removed_snapshot(server, clients, raw, chunked, v):
    """Is an error by itself; the connection goes on, and so do other contexts' requests."""
    server.cli("snapshot", "create", f"{v}@gone")
    w = clients(server, v)
    w.write(0, b"x" * 4096)
    c = clients(server, v, contexts=[bitmap("gone")], **chunked)
    assert extents_of(c, bitmap("gone"), 0, MIB) == [(0, 4096, DIRTY), (4096, MIB - 4096, 0)]
    selected = raw()
    assert len(selected.set_meta_context(v, A, bitmap("gone"))) == 2
    server.cli("snapshot", "remove", f"{v}@gone")
    wait_until(lambda: c.error_of(CMD_BLOCK_STATUS, 0, MIB) == EINVAL, 60 * SLOW,
               "the bitmap is an error")
    assert c.read(0, 4096) == b"x" * 4096
    # Selected before it went, entered afterwards.
    with pytest.raises(OptionError) as refused:
        selected.go(v)
    assert refused.value.type == REP_ERR_UNKNOWN
    assert [n for _, n in selected.set_meta_context(v, A, bitmap("gone"))] == [A]
    selected.go(v)
    assert set(selected.block_status(0, MIB)) == {A}


def test_a_new_snapshot_of_an_old_name_is_another_one(server, clients, v):
    w = clients(server, v)
    server.cli("snapshot", "create", f"{v}@s")
    w.write(0, b"x" * 4096)
    server.cli("snapshot", "remove", f"{v}@s")
    server.cli("snapshot", "create", f"{v}@s")
    w.write(8192, b"y" * 4096)
    c = clients(server, v, structured=True, contexts=[bitmap("s")])
    assert extents_of(c, bitmap("s"), 0, 16384) == [(0, 8192, 0), (8192, 4096, DIRTY),
                                                    (12288, 4096, 0)]
    assert clients(server, f"{v}@s").read(0, 4096) == b"x" * 4096


# -- how deep it lies -------------------------------------------------------------


def test_B25_depth_counts_the_clones(server, clients, chunked, v, rng):
    w = clients(server, v)
    w.write(0, rng.randbytes(3 * MIB))
    w.trim(2 * MIB, MIB)
    server.cli("snapshot", "create", f"{v}@s")
    server.cli("clone", f"{v}@s", f"{v}-b")
    b = clients(server, f"{v}-b")
    b.write(MIB, rng.randbytes(MIB // 2))
    server.cli("snapshot", "create", f"{v}-b@s")
    server.cli("clone", f"{v}-b@s", f"{v}-c")
    c = clients(server, f"{v}-c", contexts=[DEPTH, A], **chunked)
    c.write(MIB // 2, rng.randbytes(MIB // 2))
    c.trim(MIB + MIB // 4, MIB // 4)
    half, quarter = MIB // 2, MIB // 4
    wanted = [(half, 3), (half, 1), (quarter, 2), (quarter, 1), (half, 3), (6 * MIB, 0)]
    got = extents_of(c, DEPTH, 0, 8 * MIB)
    assert [(n, depth) for _, n, depth in got] == wanted
    allocation = [(n, s) for _, n, s in extents_of(c, A, 0, 8 * MIB)]
    assert allocation == [(MIB + quarter, 0), (quarter, STATE_HOLE | STATE_ZERO), (half, 0),
                          (6 * MIB, STATE_HOLE | STATE_ZERO)]
    # The snapshot of the clone, and the volume in the middle.
    for name in (f"{v}-b@s", f"{v}-b"):
        m = clients(server, name, contexts=[DEPTH], **chunked)
        assert [(n, depth) for _, n, depth in extents_of(m, DEPTH, 0, 8 * MIB)] == [
            (MIB, 2), (half, 1), (half, 2), (6 * MIB, 0)]
