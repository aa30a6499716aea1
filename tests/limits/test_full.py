"""A disk that fills up (G6): ENOSPC for writes, and for nothing else.

The store lies on a small ext4 file system of its own, its log and all. When it is full, writes are
refused, FLUSH still succeeds, reads and trims go on, everything that was answered
is there, and there is room again without a restart after a trim, when a volume or a snapshot was
removed, when the disk has grown, and when another program gives back what it had taken. Commands
whose output does not fit say so and leave nothing behind.
"""

import errno
import os
import re
import threading

import nbd
import pytest

from harness.commands import assert_one_sentence
from harness.disk import disk, grow, memory_disk
from harness.server import SLOW, Server, wait_until

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


SMALL_MIB = 192


@pytest.fixture
def smaller_disk(tmp_path):
    with disk(tmp_path, SMALL_MIB) as mount:
        yield mount


class Filled:
    """A volume of which is known what it holds; pieces are written one after the other."""

    def __init__(self, server, name, seed):
        self.h = nbd.NBD()
        self.h.connect_uri(server.uri(name))
        self.seed = f"{seed}/{name}"
        self.held = {}
        self.number = 0

    def write(self, at):
        """Whether piece `at` was taken; anything else than ENOSPC is a failure."""
        self.number += 1
        data = pattern(self.number, self.seed)
        try:
            self.h.pwrite(data, at * PIECE)
        except nbd.Error as e:
            assert e.errnum == errno.ENOSPC, e
            return False
        self.held[at] = data
        return True

    def fill(self, start=0):
        at = start
        while self.write(at):
            at += 1
            assert at < start + 2 * SMALL_MIB, "the disk never filled up"
        return at - start

    def trim(self, at):
        self.h.trim(PIECE, at * PIECE)
        self.held[at] = bytes(PIECE)

    def check(self):
        self.h.flush()
        for at, data in self.held.items():
            assert self.h.pread(PIECE, at * PIECE) == data, f"piece {at} is not what was written"


def room_comes(volume, pieces, start):
    """So many pieces more are taken, soon."""
    for i in range(pieces):
        wait_until(lambda: volume.write(start + i), 30 * SLOW, f"there is room for piece {i}", 0.1)


def serve(folder, mount, volumes, **more):
    return Server(folder, volumes, ["--cache-size", "32M"], store=mount / "store", tcp=False,
                  **more)


@pytest.mark.limit(400)
def test_G6_space_comes_back_without_a_restart(tmp_path, smaller_disk, rng):
    """Several volumes on one full disk: what one gives back another can use."""
    seed = rng.randrange(1 << 30)
    with serve(tmp_path / "srv", smaller_disk,
               {"a": "1G", "b": "1G", "gone": "1G"}) as server:
        a, b, gone = (Filled(server, name, seed) for name in ("a", "b", "gone"))
        for at in range(20):
            assert gone.write(at) and b.write(at)
        gone.h.shutdown()
        server.cli("snapshot", "create", "b@s")
        for at in range(20):
            assert b.write(at)
        taken = a.fill(100)
        print(f"{taken} MiB more on a disk of {SMALL_MIB} MiB")
        b.fill(100)
        for volume in (a, b):
            volume.check()

        server.cli("remove", "--yes", "gone")
        room_comes(b, 12, 300)
        a.fill(300)
        b.fill(400)

        server.cli("snapshot", "remove", "b@s")
        room_comes(a, 12, 500)
        a.fill(600)
        b.fill(600)

        for at in range(100, 112):
            a.trim(at)
        room_comes(b, 8, 700)
        b.fill(800)
        a.fill(800)

        for volume in (a, b):
            volume.check()
            volume.h.shutdown()
        server.stop()
    # All of it is still there for another process.
    with serve(tmp_path / "srv2", smaller_disk, {}) as server:
        for volume, name in ((a, "a"), (b, "b")):
            volume.h = nbd.NBD()
            volume.h.connect_uri(server.uri(name))
            volume.check()
            volume.h.shutdown()


@pytest.mark.limit(200)
def test_G6_the_disk_grows(tmp_path, rng):
    with memory_disk(tmp_path, SMALL_MIB) as mount, \
            serve(tmp_path / "srv", mount, {"v": "1G"}) as server:
        v = Filled(server, "v", rng.randrange(1 << 30))
        taken = v.fill()
        assert not v.write(900)
        grow(mount, SMALL_MIB + 64)
        room_comes(v, 30, taken)
        v.check()
        v.h.shutdown()
        server.stop()


def take_all(path):
    """Writes to a file until not a block is left."""
    with open(path, "ab", buffering=0) as f:
        for size in (1 << 20, 4096):
            try:
                while f.write(bytes(size)) == size:
                    pass
            except OSError as e:
                assert e.errno == errno.ENOSPC, e
        try:
            os.fsync(f.fileno())
        except OSError:
            pass


@pytest.mark.limit(400)
def test_G6_another_program_fills_the_disk(tmp_path, smaller_disk, rng):
    """Whatever it takes, and whenever, what was answered is there, and no FLUSH fails."""
    seed = rng.randrange(1 << 30)
    others = smaller_disk / "others"
    with serve(tmp_path / "srv", smaller_disk, {"v": "1G"}) as server:
        v = Filled(server, "v", seed)
        for turn in range(2):
            thief = threading.Thread(target=take_all, args=(others,))
            refused = 0
            for i in range(60):
                if i == 4:
                    thief.start()
                # New places and old ones: those need space until they are committed.
                refused += not v.write(200 * turn + i if i % 3 else rng.randrange(40))
                if i % 8 == 0:
                    v.h.flush()
            thief.join()
            v.fill(200 * turn + 100)
            v.check()
            # With not a block left, trims and what they give still go.
            for at in range(200 * turn + 1, 200 * turn + 5):
                v.trim(at)
            v.check()
            print(f"turn {turn}: {refused} of 60 writes refused")
            if turn == 1:
                v.h.shutdown()
                server.kill()
                server.start()
                v.h = nbd.NBD()
                v.h.connect_uri(server.uri("v"))
                v.check()
            others.unlink()
            room_comes(v, 4, 200 * turn + 150)
        v.check()
        v.h.shutdown()


@pytest.mark.limit(200)
def test_commands_whose_output_does_not_fit(tmp_path, rng):
    """backup, export and import, of more than there is room for."""
    with disk(tmp_path, 64) as mount:
        outputs_that_do_not_fit(tmp_path, mount, rng, 72)


def outputs_that_do_not_fit(tmp_path, mount, rng, mib):
    image = tmp_path / "image"
    image.write_bytes(rng.randbytes(mib << 20))
    with Server(tmp_path / "srv", {"v": f"{mib}M"}, tcp=False) as server:
        h = nbd.NBD()
        h.connect_uri(server.uri("v"))
        for at in range(mib):
            h.pwrite(rng.randbytes(PIECE), at * PIECE)
        h.flush()
        h.shutdown()
        there = sorted(p.name for p in mount.iterdir())
        for words in (("store", "backup", mount / "copy"),
                      ("export", "v", mount / "out"),
                      ("export", "--stream", "v", mount / "out")):
            done = server.cli(*words, check=False)
            assert done.returncode != 0
            assert_one_sentence(done.stderr)
            assert re.search("space|full|room", done.stderr), done.stderr
            assert sorted(p.name for p in mount.iterdir()) == there, words
    with serve(tmp_path / "srv2", mount, {"other": "16M"}) as server:
        done = server.cli("import", image, "w", check=False)
        assert done.returncode != 0
        assert_one_sentence(done.stderr)
        assert re.search("space|full|room", done.stderr), done.stderr
        assert [line.split()[0] for line in server.cli("list").stdout.splitlines()[1:]] == ["other"]
        other = Filled(server, "other", rng.randrange(1 << 30))
        room_comes(other, 8, 0)
        other.check()
        other.h.shutdown()
