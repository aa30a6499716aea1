"""Files that hand back other bytes than were written (G5): flipped bits, sectors of 512 bytes and
pages that are torn, zeroed or another one's, in every file of the store but LMDB's.

Stored data: each damaged block is EIO, every other one reads right, and `verify` names exactly the
damaged ones. The write log: what was flushed is there, or the volume is refused; where a write is
missing that was not flushed, the log says that it ended early. The files without meaning: nothing
is lost.

FLIPS (default 100; "all": 4000) flips in stored data, a tenth as many in the log, each with a start
of a server. LMDB's own pages: tests/unit/store_flips.c.
"""

import json
import os
import random
import shutil
import struct
import time
from collections import Counter

import pytest

from harness.history import Check, answered, flushed
from harness.load import FLUSH, Load, Op, Shape, content
from harness.rawnbd import Closed, NbdError, OptionError, connect
from harness.server import Server, cli, copy_store
from plan import MIB, SIZE, read_all, start_plain

pytestmark = pytest.mark.lmdb("about the files of the embedded store")

BLOCK = 16384
UNIT = 4096
SECTOR = 512
FLIPS = 4000 if os.environ.get("FLIPS") == "all" else int(os.environ.get("FLIPS") or 100)
PER_ROUND = 100


def damaged(data, rng, other):
    """What a disk may make of `data` (a unit): anything but that."""
    out = bytearray(data)
    while out == data:
        how = rng.randrange(6)
        at = rng.randrange(len(data))
        sector = at // SECTOR * SECTOR
        if how <= 2:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 3:
            out[sector:sector + SECTOR] = bytes(SECTOR)
        elif how == 4:
            out[sector:sector + SECTOR] = other[sector:sector + SECTOR]
        else:
            # Torn: the rest is of what was there before.
            cut = rng.randrange(1, len(data) // SECTOR) * SECTOR if len(data) > SECTOR else 0
            out[cut:] = other[cut:]
    return bytes(out)


@pytest.fixture(scope="module")
def stored(fast_folder):
    """A store with a volume that was written over and trimmed around a snapshot; what both hold."""
    folder = fast_folder / "stored"
    store = folder / "store"
    folder.mkdir()
    cli(f"lmdb:{store}", "create", "v", str(SIZE), "--block-size", "16K", "--compression", "none")
    server = start_plain(folder / "s", store)
    rng = random.Random(3)
    number = 1
    with connect(server, "v") as c:
        for at in range(0, SIZE, MIB):
            c.write(at, content(number, at, min(at + MIB, SIZE)))
        server.cli("snapshot", "create", "v@s")
        for _ in range(60):
            number += 1
            at = rng.randrange(SIZE // UNIT - 40) * UNIT
            c.write(at, content(number, at, at + rng.randrange(1, 40) * UNIT))
        c.trim(20 * BLOCK, 10 * BLOCK)
        c.flush()
    with connect(server, "v") as c:
        now = bytes(c.read_all())
    with connect(server, "v@s") as c:
        then = bytes(c.read_all())
    server.stop()
    return store, {"v": now, "v@s": then}


def live_units(store, contents):
    """{unit of the data file: {(view, block)...} whose data lies there}, of those whose bytes are
    nowhere else (a block overwritten in part shares some with the old one); all units that have
    such data; how many there are."""
    holders = {}
    for view, data in contents.items():
        for at in range(0, SIZE // UNIT * UNIT, UNIT):
            holders.setdefault(data[at:at + UNIT], set()).add((view, at // BLOCK))
    holders.pop(bytes(UNIT), None)
    places, unit = {}, 0
    with open(store / "blocks", "rb") as f:
        while data := f.read(UNIT):
            if data in holders:
                places.setdefault(data, []).append(unit)
            unit += 1
    return ({units[0]: holders[data] for data, units in places.items() if len(units) == 1},
            {u for units in places.values() for u in units}, unit)


def blocks_of_view(server, view):
    """{block: bytes, or None where it can't be read}."""
    out = {}
    with connect(server, view, structured=True) as c:
        for at in range(0, SIZE, BLOCK):
            length = min(BLOCK, SIZE - at)
            try:
                out[at // BLOCK] = c.read(at, length)
            except NbdError:
                out[at // BLOCK] = None
    return out


@pytest.mark.limit(100000)
def test_G5_flips_in_stored_data(stored, fast_folder, seed):
    store, contents = stored
    live, not_free, n_units = live_units(store, contents)
    assert len(live) > SIZE // UNIT // 2
    rng = random.Random(f"{seed}:blocks")
    flips = found = 0
    while flips < FLIPS:
        copy = copy_store(store, fast_folder / "flipped")
        hit, units = set(), rng.sample(sorted(live), PER_ROUND)
        # Some where nothing is stored.
        free = [u for u in rng.sample(range(1, n_units), PER_ROUND // 4) if u not in not_free]
        with open(copy / "blocks", "r+b") as f:
            for unit in units + free:
                f.seek(unit * UNIT)
                data = f.read(UNIT)
                f.seek(rng.choice(units) * UNIT)
                other = f.read(UNIT)
                f.seek(unit * UNIT)
                f.write(damaged(data, rng, bytes(UNIT) if other == data else other))
                hit |= live.get(unit, set())
        flips += len(units)
        done = cli(f"lmdb:{copy}", "--json", "verify", "v", check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        told = {(view, at // BLOCK)
                for f in json.loads(done.stdout)["findings"] if f["what"] == "block damaged"
                for view in {f["first"], f["last"]}
                for at in range(f["offset"], f["offset"] + f["length"], BLOCK)}
        assert told == hit, (f"verify missed {sorted(hit - told)[:5]}, "
                             f"and took {sorted(told - hit)[:5]} for damaged")
        found += len(told)
        server = start_plain(fast_folder / "fs", copy)
        try:
            for view, data in contents.items():
                for block, got in blocks_of_view(server, view).items():
                    want = data[block * BLOCK:(block + 1) * BLOCK]
                    if (view, block) in hit:
                        assert got is None, f"{view}, block {block} is damaged, and was read"
                    else:
                        assert got == want, f"{view}, block {block} is not what was written"
        finally:
            server.kill()
        shutil.rmtree(copy)
        shutil.rmtree(fast_folder / "fs")
    print(f"{flips} units of stored data damaged, {found} blocks of views, all found and refused")


def test_G5_flips_in_the_head_of_the_data_file(stored, fast_folder, rng):
    """It names the store it belongs to: a damaged one is refused with a sentence."""
    store, contents = stored
    for at in rng.sample(range(40), 8) + [100, 4000]:
        copy = copy_store(store, fast_folder / "head")
        with open(copy / "blocks", "r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << rng.randrange(8)]))
        done = cli(f"lmdb:{copy}", "list", check=False)
        # The zeros in it have no meaning.
        if at < 40:
            assert done.returncode != 0 and "restore the whole folder" in done.stderr
            assert done.stderr.count("\n") == 1
        else:
            assert done.returncode == 0, done.stderr
    shutil.rmtree(fast_folder / "head")


class Logged:
    """A store whose server was killed: writes, a FLUSH that was answered, and some more writes."""

    def __init__(self, folder, base):
        self.before = base.clean_bytes
        self.store = copy_store(base.clean, folder / "store")
        rng = random.Random(11)
        server = start_plain(folder / "s", self.store)
        shape = Shape(SIZE, connections=1, depth=1, ops=30, flush_every=0, fua=0, trims=0.05,
                      lengths=((512, 2), (4096, 3), (16384, 2)))
        load = Load(server, "v", shape, rng, 2).run()
        with connect(server, "v") as c:
            flush = Op(load.number, 9, FLUSH, sent_ns=time.monotonic_ns())
            c.flush()
            flush.answered_ns = time.monotonic_ns()
            shape.ops = 5
            last = Load(server, "v", shape, rng, load.number + 1).run()
            server.kill()
        self.ops = load.sent() + [flush] + last.sent()
        self.logs = [p for p in (self.store / "log").iterdir() if p.name != "spare"]
        assert len(answered(self.ops)) == 35 and len(self.logs) == 1
        whole = copy_store(self.store, folder / "whole")
        server = start_plain(folder / "w", whole)
        self.after = bytes(read_all(server))
        assert "replayed 35 writes" in server.log()
        server.kill()

    def end(self):
        """Where the last record ends; what follows is a mark."""
        data = self.logs[0].read_bytes()
        at = 4096
        while True:
            magic, length, _, stream = struct.unpack_from("<LLQQ", data, at)
            if magic != 0x676f4c57 or stream == 2**64 - 1:
                return at
            at += 80 + (length + 7) // 8 * 8


@pytest.fixture(scope="module")
def logged(fast_folder, base):
    (fast_folder / "logged").mkdir()
    return Logged(fast_folder / "logged", base)


def what_is_served(folder, store):
    """What a server makes of the store: the volume's bytes, or None where it refuses; its log."""
    server = Server(folder, store=store, tcp=False, args=["--cache-size", "32M"])
    server.start()
    try:
        try:
            return read_all(server), server.log()
        except (NbdError, OptionError, Closed, OSError):
            server.check_alive()
            return None, server.log()
    finally:
        server.kill()


@pytest.mark.limit(100000)
def test_G5_flips_in_the_write_log(logged, fast_folder, seed):
    rng = random.Random(f"{seed}:log")
    end = logged.end()
    assert end > 4096 + 35 * 80
    outcomes = Counter()
    for i in range(max(8, FLIPS // 10)):
        copy = copy_store(logged.store, fast_folder / "flipped")
        path = copy / "log" / logged.logs[0].name
        data = path.read_bytes()
        # The head now and then; the last flushed record and what follows it as often as the rest.
        low, high = rng.choice([(0, 56), (4096, end), (4096, end), (end - 80000, end),
                                (end, end + 4096)])
        at = rng.randrange(max(low, 0), high)
        # One that takes the last record and the mark behind it leaves nothing to tell by.
        blind = False
        with open(path, "r+b") as f:
            if rng.random() < 0.6:
                f.seek(at)
                f.write(bytes([data[at] ^ 1 << rng.randrange(8)]))
            else:
                sector = at // SECTOR * SECTOR
                old = data[sector:sector + SECTOR]
                blind = sector < end + 80 and sector + SECTOR > end
                f.seek(sector)
                f.write(damaged(old, rng, rng.randbytes(SECTOR)))
        after, log = what_is_served(fast_folder / "ls", copy)
        where = f"flip {i} of {logged.logs[0].name} at {at}"
        if after is None:
            assert "can't be replayed" in log, f"{where}\n{log}"
            outcomes["refused"] += 1
        elif after == logged.after:
            outcomes["whole"] += 1
        else:
            required = flushed(logged.ops, time.monotonic_ns())
            try:
                Check(logged.before, logged.ops, after, required).run()
            except AssertionError as e:
                raise AssertionError(f"{where}: {e}\n{log}") from None
            told = "and later ones follow" in log
            assert told or blind, f"{where}: nothing says that writes are missing"
            outcomes["shortened, and said so" if told else "cut in the last sector"] += 1
        shutil.rmtree(copy)
        shutil.rmtree(fast_folder / "ls")
    print("log: " + ", ".join(f"{n} {what}" for what, n in outcomes.items()))
    assert outcomes["refused"] >= 1


@pytest.mark.limit(100000)
@pytest.mark.parametrize("name", ["processes", "bell", "reserve", "lock.mdb", "session", "spare"])
def test_G5_flips_in_files_without_meaning(logged, fast_folder, rng, name):
    """Nothing is lost by them: they say who is at work, and nobody is."""
    for i in range(2 if FLIPS < 1000 else 30):
        copy = copy_store(logged.store, fast_folder / "flipped")
        if name == "session":
            path = next((copy / "session").iterdir())
        elif name == "spare":
            path = copy / "log" / "spare"
            if not path.exists():
                path.write_bytes(rng.randbytes(4096 + (16 << 20)))
        else:
            path = copy / name
        data = bytearray(path.read_bytes() or bytes(1))
        how = rng.randrange(4)
        for _ in range(rng.randrange(1, 40)):
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
        if how == 1:
            data = bytearray(rng.randbytes(len(data)))
        elif how == 2:
            del data[rng.randrange(len(data)):]
        path.write_bytes(data)
        after, log = what_is_served(fast_folder / "ss", copy)
        assert after == logged.after, f"{name}, {i}\n{log}"
        shutil.rmtree(copy)
        shutil.rmtree(fast_folder / "ss")
