"""What many volumes, many connections and a very large volume cost.

Memory is what the process has resident (VmRSS), before and after; the cache is small and stays the
same. What a connection or an open volume costs is not counted in --cache-size, so these are the
figures that tell how far one server goes.
"""

import os
import resource
import time
from pathlib import Path

import nbd
import pytest

from harness.inflight import drain
from harness.server import SLOW, Server, wait_until

TIB = 1 << 40
CONNECTIONS = 1000
VOLUMES = 1000


def resident_kib(server):
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def connect(server, volume):
    h = nbd.NBD()
    h.connect_uri(server.uri(volume))
    return h


@pytest.fixture
def many_files():
    """The tests' own end of so many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("a process may not open 4096 files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def exchange(handles, rng):
    """All of them at once: a write, and then a read of what was written, each in a place of its own."""
    data = [rng.randbytes(4096) for _ in handles]
    places = [i * 4096 for i in range(len(handles))]
    for h, block, at in zip(handles, data, places):
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(block)), at)
    for h in handles:
        drain(h)
    buffers = [nbd.Buffer(4096) for _ in handles]
    for h, buffer, at in zip(handles, buffers, places):
        h.aio_pread(buffer, at)
    for h in handles:
        drain(h)
    for buffer, block in zip(buffers, data):
        assert buffer.to_bytearray() == block


@pytest.mark.lmdb("a limit of the server, whatever the store")
@pytest.mark.limit(120)
def test_thousand_connections_and_what_an_idle_one_costs(tmp_path, rng, many_files):
    # The server raises its own limit of open files as far as it may.
    prefix = ["prlimit", "--nofile=256:4096"]
    with Server(tmp_path, {"v": "64M"}, ["--cache-size", "32M"], prefix=prefix,
                tcp=False) as server:
        first = connect(server, "v")
        exchange([first], rng)
        before = resident_kib(server)
        handles = [connect(server, "v") for _ in range(CONNECTIONS)]
        idle = (resident_kib(server) - before) / CONNECTIONS
        exchange(handles, rng)
        after = (resident_kib(server) - before) / CONNECTIONS
        print(f"{CONNECTIONS} connections: {idle:.1f} KiB each before their first request, "
              f"{after:.1f} KiB after reads and writes (blocks in the cache included)")
        assert idle < 64
        assert after < 64
        for h in handles:
            h.shutdown()
        first.shutdown()


@pytest.mark.lmdb("a limit of the server, whatever the store")
@pytest.mark.limit(60)
def test_a_limit_of_open_files_that_is_too_low_is_named(tmp_path, many_files):
    with Server(tmp_path, {"v": "1M"}, prefix=["prlimit", "--nofile=64:64"], tcp=False) as server:
        handles = []
        for _ in range(48):
            h = nbd.NBD()
            handles.append(h)
            h.set_opt_mode(True)
            h.aio_connect_unix(str(server.socket_path))
        wait_until(lambda: "LimitNOFILE" in server.log(), 20 * SLOW, "the limit is named")
        assert "64" in [line for line in server.log().splitlines() if "LimitNOFILE" in line][0]
        handles.clear()
        del h
        # With room again it goes on.
        connect(server, "v").shutdown()


@pytest.mark.lmdb("on FoundationDB a thousand volumes are a thousand commits of milliseconds each")
@pytest.mark.limit(240)
def test_thousand_volumes_in_one_process(tmp_path, rng, many_files):
    volumes = {f"v{i}": "64M" for i in range(VOLUMES)}
    with Server(tmp_path, volumes, ["--cache-size", "32M"], tcp=False) as server:
        server.volumes = {}
        before = resident_kib(server)
        began = time.monotonic()
        handles = [connect(server, name) for name in volumes]
        exchange(handles, rng)
        took = time.monotonic() - began
        each = (resident_kib(server) - before) / VOLUMES
        print(f"{VOLUMES} volumes opened, written and read in {took:.1f} s; {each:.1f} KiB each, "
              f"with their connections and blocks")
        assert each < 128
        for h in handles:
            h.shutdown()
        # And what was written is there after a restart.
        data = connect(server, "v7")
        block = data.pread(4096, 7 * 4096)
        data.shutdown()
        server.restart()
        data = connect(server, "v7")
        assert data.pread(4096, 7 * 4096) == block
        assert any(block)
        data.shutdown()


@pytest.mark.limit(120)
def test_opening_64_tib_takes_50_ms_and_16_mib(tmp_path, rng):
    with Server(tmp_path, {"huge": "64T"}, tcp=False) as server:
        h = connect(server, "huge")
        places = [rng.randrange(64 * TIB // 512) * 512 for _ in range(2000)]
        for at in places:
            h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(os.urandom(512))), at)
            if h.aio_in_flight() >= 128:
                drain(h, 64)
        drain(h, 0)
        h.shutdown()
        server.restart()
        before = resident_kib(server)
        took, most = [], 0
        for _ in range(5):
            began = time.monotonic()
            h = connect(server, "huge")
            assert any(h.pread(512, places[0]))
            took.append(time.monotonic() - began)
            most = max(most, resident_kib(server) - before)
            h.shutdown()
        print(f"open and first read: {min(took) * 1000:.1f} ms, {most / 1024:.1f} MiB")
        assert min(took) < 0.05 * SLOW
        assert most < 16 << 10
