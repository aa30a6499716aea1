"""What is damaged of one volume is no other volume's trouble: those that share a thread with it are
read and written as ever, and what is logged of it is bounded.
"""

import random
import struct
import threading
import time

import nbd
import pytest

from harness.server import SLOW, Server
from plan import MIB

pytestmark = pytest.mark.lmdb("about the files of the embedded store")

BLOCK = 16384
PAGE = 4096
LEAF = 2


def connect(server, name):
    h = nbd.NBD()
    h.connect_uri(server.uri(name))
    return h


def block_keys(branch):
    """What the keys of a volume's blocks begin with (docs/format.md)."""
    return b"\x02b\x00\x15" + bytes([branch]) + b"\x15\x01"


def keys_of(page):
    """The keys in a leaf of LMDB's; none where it is no leaf."""
    flags, lower, upper = struct.unpack_from("<HHH", page, 10)
    if flags != LEAF or not 16 < lower <= upper <= PAGE:
        return []
    keys = []
    for at in struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16):
        length, = struct.unpack_from("<H", page, at + 6)
        keys.append(page[at + 8:at + 8 + length])
    return keys


def damage_keys(store, prefix):
    """Flips a bit in each page of data.mdb that holds keys with that prefix and no others."""
    n = 0
    with open(store / "data.mdb", "r+b") as f:
        data = f.read()
        for at in range(2 * PAGE, len(data) - PAGE + 1, PAGE):
            keys = keys_of(data[at:at + PAGE])
            if keys and all(key.startswith(prefix) for key in keys):
                f.seek(at + PAGE - 1)
                f.write(bytes([data[at + PAGE - 1] ^ 1]))
                n += 1
    return n


@pytest.mark.limit(60)
def test_a_client_that_reads_damage_on_and_on_does_not_fill_the_log(tmp_path):
    with Server(tmp_path, {"v": "32M"}, tcp=False) as server:
        h = connect(server, "v")
        data = random.Random(2).randbytes(BLOCK)
        h.pwrite(data, 0)
        h.shutdown()
        server.stop()
        with open(server.store_folder / "blocks", "r+b") as f:
            at = f.read().index(data[:PAGE])
            f.seek(at)
            f.write(bytes([data[0] ^ 1]))
        server.start()
        h = connect(server, "v")
        for _ in range(500):
            with pytest.raises(nbd.Error):
                h.pread(512, 0)
        assert 50 <= server.log().count("block 0 can't be read") <= 200
        # And it says how much there was.
        until = time.monotonic() + 10 * SLOW
        while "more were not shown" not in server.log() and time.monotonic() < until:
            time.sleep(0.2)
        assert "blocks that can't be read: " in server.log()
        server.stop()


@pytest.mark.limit(120)
def test_G6_a_volume_that_cannot_commit_stops_no_other(tmp_path):
    rng = random.Random(1)
    with Server(tmp_path, {"bad": "32M", "good": "32M"}, tcp=False) as server:
        for name in "bad", "good":
            h = connect(server, name)
            for at in range(0, 16 * MIB, MIB):
                h.pwrite(rng.randbytes(MIB), at)
            h.shutdown()
        server.stop()
        assert damage_keys(server.store_folder, block_keys(1)) > 5
        server.start()
        bad, good = connect(server, "bad"), connect(server, "good")
        # One a second is sealed, and none is committed.
        until = time.monotonic() + 15

        def write_on():
            try:
                while time.monotonic() < until:
                    bad.pwrite(rng.randbytes(BLOCK), rng.randrange(1024) * BLOCK)
                    time.sleep(0.2)
            except nbd.Error:
                pass  # at the end of the server

        writer = threading.Thread(target=write_on, daemon=True)
        writer.start()
        done = []

        def write_good():
            while time.monotonic() < until + 2:
                began = time.monotonic()
                good.pwrite(b"x" * BLOCK, BLOCK)
                done.append(time.monotonic() - began)
                time.sleep(0.5)

        other = threading.Thread(target=write_good, daemon=True)
        other.start()
        other.join(30)
        print(f"{len(done)} writes, {max(done):.2f} s at most")
        assert "bad: a commit failed" in server.log()
        assert not other.is_alive(), "a write to another volume is not answered"
        assert max(done) < 5 * SLOW
        good.flush()
        assert good.pread(BLOCK, BLOCK) == b"x" * BLOCK
        server.kill()
