"""What history costs: nothing for readers (G7), and a moment for whoever makes a snapshot.

Reads are measured as requests a second and as the server's CPU time for one, the places that
are compared in turns, each time by a server that has just been started, with a cache of a
tenth of the volume. The machine may have other things to do, so it is the ratio that counts, and
the better of the two.
"""

import json
import os
import shutil
import statistics
import subprocess
import time

import nbd
import pytest

from harness import stores
from harness.inflight import drain
from harness.server import SLOW, Server, program

LONG = os.environ.get("LONG", "0") not in ("", "0")
MIB = 1 << 20
SIZE = 320 * MIB  # ten times the smallest cache
BLOCK = 4096
LOAD_S = 2.0 if LONG else 0.7
ROUNDS = 7 if LONG else 3


def load(server, export):
    """Random reads from a cold cache: (requests a second, microseconds of the server's CPU for one)."""
    server.restart()
    said = subprocess.run([*program(), "--json", "bench", server.uri(export), "--block-size",
                           str(BLOCK), "--depth", "8", "--time", str(LOAD_S), "--pid",
                           str(server.pid)], capture_output=True, text=True, check=True,
                          timeout=60 * SLOW)
    told = json.loads(said.stdout)
    return told["iops"], told["server_cpu_us_per_request"]


def compare(server, exports, what):
    """Reads of each are as good as of the first one."""
    seen = {name: [] for name in exports}
    for _ in range(ROUNDS):
        for name in exports:
            seen[name].append(load(server, name))
    rates, cpus = ({name: statistics.median(s[i] for s in seen[name]) for name in exports}
                   for i in (0, 1))
    first = exports[0]
    for name in exports:
        slower, dearer = rates[first] / rates[name], cpus[name] / cpus[first]
        print(f"{what} {name}: {rates[name]:.0f} reads/s ({slower:.2f} times slower), "
              f"{cpus[name]:.1f} us of CPU ({dearer:.2f})")
        # (Short runs are for what is grossly wrong.)
        assert min(slower, dearer) < (1.2 if LONG else 1.4), (name, seen)


def connect(server, name):
    handle = nbd.NBD()
    handle.connect_uri(server.uri(name))
    return handle


def fill(handle, rng):
    data = nbd.Buffer.from_bytearray(bytearray(rng.randbytes(MIB)))
    for at in range(0, handle.get_size(), MIB):
        handle.pwrite(data.to_bytearray(), at)
    handle.flush()


@pytest.mark.limit(3000 if LONG else 300)
def test_reads_cost_the_same_after_many_snapshots(tmp_path, rng):
    """Random 4 KiB reads after 0, 10, 100 (and 1000) snapshots, with the same blocks rewritten
    between them."""
    counts = (0, 10, 100, 1000) if LONG else (0, 10, 100)
    with Server(tmp_path, {f"after-{n}": SIZE for n in counts}, args=["--cache-size", "32M"],
                tcp=False) as server:
        places = [rng.randrange(SIZE // BLOCK) * BLOCK for _ in range(400)]
        for n in counts:
            h = connect(server, f"after-{n}")
            fill(h, rng)
            for i in range(n):
                data = rng.randbytes(BLOCK)
                for at in places:
                    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at)
                    if h.aio_in_flight() >= 64:
                        drain(h)
                drain(h)
                server.cli("snapshot", "create", f"after-{n}@{i}")
            if n:
                assert h.pread(BLOCK, places[0]) == data
            h.shutdown()
        compare(server, [f"after-{n}" for n in counts], "snapshots:")


@pytest.mark.limit(1200 if LONG else 300)
def test_reads_cost_the_same_however_long_the_chain(tmp_path, rng):
    """A volume, and clones 1, 5 and 20 deep, each of which wrote something of its own."""
    with Server(tmp_path, {"depth-0": SIZE}, args=["--cache-size", "32M"], tcp=False) as server:
        h = connect(server, "depth-0")
        fill(h, rng)
        written = {}
        for depth in range(1, 21):
            h.shutdown()
            server.cli("snapshot", "create", f"depth-{depth - 1}@s")
            server.cli("clone", f"depth-{depth - 1}@s", f"depth-{depth}")
            h = connect(server, f"depth-{depth}")
            for _ in range(20):
                at, data = rng.randrange(SIZE // BLOCK) * BLOCK, rng.randbytes(BLOCK)
                h.pwrite(data, at)
                written[at] = data
        for at, data in written.items():
            assert h.pread(BLOCK, at) == data
        h.shutdown()
        compare(server, ["depth-1", "depth-5", "depth-20"], "clones:")


@pytest.mark.limit(200)
def test_snapshots_are_made_in_a_moment(tmp_path):
    """Under 50 ms from the command's start to its end, whatever the volume's size, while a client
    writes 5000 random blocks of 4 KiB a second."""
    if stores.on_fdb():
        pytest.skip("LONG=1: the limit is the embedded store's")
    if not shutil.which("fio"):
        pytest.skip("fio is not installed")
    with Server(tmp_path, {"small": "64M", "huge": "64T"}, tcp=False) as server:
        for name in ("small", "huge"):
            # (--thread: else what writes is another process, which outlives the kill.)
            fio = subprocess.Popen(
                ["fio", "--name=w", "--thread", "--ioengine=nbd", f"--uri={server.uri(name)}",
                 "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=64M", "--time_based",
                 "--runtime=120", "--rate_iops=5000"], cwd=tmp_path, stdout=subprocess.DEVNULL)
            try:
                time.sleep(2)  # until it writes at its rate
                took = []
                for i in range(20):
                    began = time.monotonic()
                    server.cli("snapshot", "create", f"{name}@{i}")
                    took.append(time.monotonic() - began)
                    time.sleep(0.2)
                assert fio.poll() is None
            finally:
                fio.kill()
                fio.wait()
            took.sort()
            print(f"snapshot create of {name} under load: median {took[10] * 1000:.0f} ms, "
                  f"longest {took[-1] * 1000:.0f} ms")
            assert took[10] < 0.05 * SLOW
