"""A discard of any size is quick, and so is opening a large volume (checklist D.9)."""

import os
import time

import nbd
import pytest

from harness import stores
from harness.server import SLOW, Server, wait_until

SIZE = 64 << 40
WRITES = 100_000
BLOCK = 4096
# What Linux sends at most in one discard: UINT_MAX bytes, down to a multiple of 4 KiB.
PIECE = (4 << 30) - 4096


def drain(handle, below):
    while handle.aio_in_flight() > below:
        handle.poll(-1)
        while handle.aio_in_flight():
            cookie = handle.aio_peek_command_completed()
            if not cookie:
                break
            handle.aio_command_completed(cookie)


@pytest.mark.limit(400)
def test_D09_discard_of_64_tib_with_scattered_writes(tmp_path, rng):
    # In a cluster the thousands of index rows take that many commits' worth of bytes.
    cpu_limit_s = (20 if stores.on_fdb() else 1.0) * SLOW
    with Server(tmp_path, {"huge": "64T"}, tcp=False) as server:
        h = nbd.NBD()
        h.connect_uri(server.uri("huge"))
        assert h.get_size() == SIZE
        data = nbd.Buffer.from_bytearray(bytearray(rng.randbytes(BLOCK)))
        places = [rng.randrange(SIZE // BLOCK) * BLOCK for _ in range(WRITES)]
        for at in places:
            h.aio_pwrite(data, at)
            if h.aio_in_flight() >= 128:
                drain(h, 64)
        drain(h, 0)
        h.flush()
        assert h.pread(BLOCK, places[0]) == data.to_bytearray()

        began = time.monotonic()
        for at in range(0, SIZE, PIECE):
            h.aio_trim(min(PIECE, SIZE - at), at)
            if h.aio_in_flight() >= 128:
                drain(h, 64)
        drain(h, 0)
        h.flush()
        took = time.monotonic() - began
        print(f"discard of 64 TiB with {WRITES} scattered writes: {took:.3f} s")
        assert took < cpu_limit_s

        for at in rng.sample(places, 50):
            assert h.pread(BLOCK, at) == bytes(BLOCK)
        # The space comes back by itself, in batches.
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
