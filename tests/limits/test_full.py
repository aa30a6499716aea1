"""A disk that fills up (G6): ENOSPC for writes, and for nothing else.

The store lies on a small ext4 file system of its own. When it is full, writes are
refused, FLUSH still succeeds, reads and trims go on, everything that was answered
is there, and after a trim there is room again without a restart.
"""

import errno

import nbd
import pytest

from harness.disk import disk
from harness.server import SLOW, Server

pytestmark = pytest.mark.lmdb("about the disk its files are on")

DISK_MIB = 400
PIECE = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    with disk(tmp_path, DISK_MIB) as mount:
        yield mount


def pattern(number, rng_seed):
    import random
    return random.Random(f"{rng_seed}/{number}").randbytes(PIECE)


def fill(h, start, seed):
    """Writes pieces from `start` on until one is refused; gives the number of that one."""
    n = start
    while n < start + 2 * DISK_MIB:
        try:
            h.pwrite(pattern(n, seed), n * PIECE)
        except nbd.Error as e:
            assert e.errnum == errno.ENOSPC, e
            return n
        n += 1
    raise AssertionError("the disk never filled up")


@pytest.mark.limit(400)
def test_G6_full_disk(tmp_path, small_disk, rng):
    seed = rng.randrange(1 << 30)
    with Server(tmp_path / "srv", {"v": "2G"}, ["--cache-size", "64M"],
                store=small_disk / "store", tcp=False) as server:
        h = nbd.NBD()
        h.connect_uri(server.uri("v"))
        taken = fill(h, 0, seed)
        print(f"{taken} MiB taken on a disk of {DISK_MIB} MiB")
        assert taken >= DISK_MIB // 4
        h.flush()
        for n in rng.sample(range(taken), 20):
            assert h.pread(PIECE, n * PIECE) == pattern(n, seed)
        # What commits gave back meanwhile may take a little more; then it is full again.
        fill(h, 1500, seed)
        h.flush()

        for turn in range(3):
            gone = list(range(turn * 20, turn * 20 + 20))
            for n in gone:
                h.trim(PIECE, n * PIECE)
            h.flush()
            for n in gone[:10]:
                h.pwrite(pattern(n + 5000, seed), n * PIECE)
            h.flush()
            for n in gone:
                want = pattern(n + 5000, seed) if n in gone[:10] else bytes(PIECE)
                assert h.pread(PIECE, n * PIECE) == want

        h.shutdown()
        server.stop()

    # All of it is still there for another process.
    with Server(tmp_path / "srv2", args=["--cache-size", "64M"],
                store=small_disk / "store", tcp=False) as server:
        h = nbd.NBD()
        h.connect_uri(server.uri("v"))
        for n in range(60, taken):
            assert h.pread(PIECE, n * PIECE) == pattern(n, seed), n
        for n in range(60):
            new = n % 20 < 10
            assert h.pread(PIECE, n * PIECE) == (
                pattern(n + 5000, seed) if new else bytes(PIECE)), n
        h.shutdown()
