"""A discard of any size is quick, and so is opening a large volume (checklist D.9), and telling what
is in it (D.11)."""

import os
import shutil
import subprocess
import time

import nbd
import pytest

from harness import stores
from harness.inflight import drain
from harness.server import SLOW, Server, wait_until

SIZE = 64 << 40
WRITES = 100_000
BLOCK = 4096
# What Linux sends at most in one discard: UINT_MAX bytes, down to a multiple of 4 KiB.
PIECE = (4 << 30) - 4096


def scatter(handle, rng):
    """Writes all over the volume; where."""
    data = nbd.Buffer.from_bytearray(bytearray(rng.randbytes(BLOCK)))
    places = [rng.randrange(SIZE // BLOCK) * BLOCK for _ in range(WRITES)]
    for at in places:
        handle.aio_pwrite(data, at)
        if handle.aio_in_flight() >= 128:
            drain(handle, 64)
    drain(handle, 0)
    handle.flush()
    assert handle.pread(BLOCK, places[0]) == data.to_bytearray()
    return places, bytes(data.to_bytearray())


def discard(server, handle, what):
    """All of it, as Linux would. Seconds; those of the server where others have the machine."""
    began, used = time.monotonic(), server.cpu_s()
    for at in range(0, SIZE, PIECE):
        handle.aio_trim(min(PIECE, SIZE - at), at)
        if handle.aio_in_flight() >= 128:
            drain(handle, 64)
    drain(handle, 0)
    handle.flush()
    took = time.monotonic() - began
    used = server.cpu_s() - used
    print(f"discard of 64 TiB with {WRITES} scattered writes{what}: {took:.3f} s, "
          f"{used:.2f} s of the server's CPU")
    return min(took, used)


@pytest.mark.limit(600)
def test_D09_discard_of_64_tib_with_scattered_writes(tmp_path, rng):
    """G7: plain, with a snapshot of them, and on a clone; where a snapshot holds them, they stay."""
    # In a cluster the thousands of index rows take that many commits' worth of bytes.
    limit_s = (20 if stores.on_fdb() else 2.0) * SLOW
    with Server(tmp_path, {"huge": "64T"}, tcp=False) as server:
        def connect(name):
            handle = nbd.NBD()
            handle.connect_uri(server.uri(name))
            assert handle.get_size() == SIZE
            return handle

        h = connect("huge")
        places, data = scatter(h, rng)
        server.cli("snapshot", "create", "huge@s")
        server.cli("clone", "huge@s", "clone")
        c = connect("clone")
        took = discard(server, c, ", on a clone of a snapshot of them")
        assert took < limit_s
        for at in rng.sample(places, 20):
            assert c.pread(BLOCK, at) == bytes(BLOCK)
            assert h.pread(BLOCK, at) == data
        c.shutdown()
        took = discard(server, h, ", with a snapshot of them")
        assert took < limit_s
        view = nbd.NBD()
        view.connect_uri(server.uri("huge@s"))
        for at in rng.sample(places, 20):
            assert h.pread(BLOCK, at) == bytes(BLOCK)
            assert view.pread(BLOCK, at) == data
        view.shutdown()

        places, data = scatter(h, rng)
        assert discard(server, h, "") < limit_s
        for at in rng.sample(places, 50):
            assert h.pread(BLOCK, at) == bytes(BLOCK)
        h.shutdown()
        server.cli("remove", "clone", "--yes")
        server.cli("snapshot", "remove", "huge@s")
        # The space comes back by itself, in batches.
        h = connect("huge")
        h.pread(BLOCK, 0)
        wait_until(lambda: server.json("info", "huge")["stored_bytes"] == 0, 120 * SLOW,
                   "the space behind the discard is given back")
        h.shutdown()


@pytest.mark.limit(200)
def test_D09_opening_64_tib_takes_no_time(tmp_path, rng):
    with Server(tmp_path, {"huge": "64T"}, tcp=False) as server:
        h = nbd.NBD()
        h.connect_uri(server.uri("huge"))
        for _ in range(2000):
            h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(os.urandom(512))),
                         rng.randrange(SIZE // 512) * 512)
            if h.aio_in_flight() >= 128:
                drain(h, 64)
        drain(h, 0)
        h.shutdown()
        server.restart()
        times = []
        for _ in range(5):
            began = time.monotonic()
            h = nbd.NBD()
            h.connect_uri(server.uri("huge"))
            h.pread(512, 0)
            times.append(time.monotonic() - began)
            h.shutdown()
        print("open and first read:", ", ".join(f"{t * 1000:.1f} ms" for t in times))
        assert min(times) < 0.05 * SLOW


def timed_map(uri, context=None):
    """Whole seconds and all: nbdinfo starts, asks for everything, and sums up."""
    option = f"--map={context}" if context else "--map"
    began = time.monotonic()
    done = subprocess.run(["nbdinfo", option, "--totals", uri], capture_output=True, text=True,
                          check=True, timeout=120 * SLOW)
    took = time.monotonic() - began
    totals = {}
    for line in done.stdout.splitlines():
        length, _, kind, *_ = line.split()
        totals[int(kind)] = int(length)
    return took, totals


@pytest.mark.limit(300)
def test_D11_maps_of_large_volumes(tmp_path, rng):
    """A million extents over 8 TiB, two for each of the index rows of level 1; and what has changed
    since a snapshot of that. On FoundationDB an eighth of it: there each row is a key to be asked
    for over the network."""
    if not shutil.which("nbdinfo"):
        pytest.skip("nbdinfo is not installed")
    rows = (64 << 10) if stores.on_fdb() else (512 << 10)
    span, block = 16 << 20, 16384
    size = rows * span
    with Server(tmp_path, {"small": "1M"}, tcp=False) as server:
        server.cli("create", "big", size, "--block-size", "16K")
        h = nbd.NBD()
        h.connect_uri(server.uri("big"))
        for row in range(rows):
            h.aio_zero(block, row * span, flags=nbd.CMD_FLAG_NO_HOLE)
            if h.aio_in_flight() >= 256:
                drain(h, 128)
        drain(h, 0)
        h.flush()
        server.cli("snapshot", "create", "big@s")
        changed = {rng.randrange(size // block) for _ in range(1000)}
        for no in changed:
            h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(rng.randbytes(block))), no * block)
            if h.aio_in_flight() >= 128:
                drain(h, 64)
        drain(h, 0)
        h.shutdown()
        # Nothing of it is in memory.
        server.restart()
        took, totals = timed_map(server.uri("big@s"))
        print(f"map of {2 * rows} extents over {size >> 40} TiB: {took:.3f} s")
        assert totals == {2: rows * block, 3: size - rows * block}
        assert took < 1.0 * SLOW
        took, totals = timed_map(server.uri("big"), "qemu:dirty-bitmap:s")
        print(f"map of {len(changed)} changed blocks in it: {took:.3f} s")
        assert totals == {0: size - len(changed) * block, 1: len(changed) * block}
        assert took < 1.0 * SLOW
