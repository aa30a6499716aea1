"""Two servers on one store (G1, G4).

A volume is served by one of them at a time. It moves when its owner's clients are
idle, is refused with the owner's name while they are not, is taken at once from a
process that died, and after a lease from one that was stopped, which is ended for
good.
"""

import os
import signal
import threading
import time

import nbd
import pytest

from harness.server import SLOW, Server, wait_until

LEASE_MS = 3000  # the least there is on FoundationDB


def connect(server, name="v"):
    h = nbd.NBD()
    h.connect_uri(server.uri(name))
    return h


@pytest.fixture
def two(tmp_path):
    first = Server(tmp_path / "1", {"v": "64M"}, ["--lease-ms", LEASE_MS],
                   store=tmp_path / "store", tcp=False)
    second = Server(tmp_path / "2", args=["--lease-ms", LEASE_MS], store=tmp_path / "store",
                    tcp=False)
    with first, second:
        yield first, second


def owner_pid(server):
    return server.json("owner", "show", "v")["owner"]["pid"]


def test_G4_volume_moves_when_its_clients_left(two):
    first, second = two
    a = connect(first)
    a.pwrite(b"one" + bytes(509), 0)
    a.shutdown()
    b = connect(second)
    assert b.pread(3, 0) == b"one"
    b.pwrite(b"two" + bytes(509), 0)
    b.shutdown()
    a = connect(first)
    assert a.pread(3, 0) == b"two"
    a.shutdown()


def test_G4_volume_moves_from_an_idle_client_and_back(two):
    """What a live migration of a virtual machine does: the target opens the volume while
    the source still holds it, then the source falls silent."""
    first, second = two
    a, b = connect(first), connect(second)
    for turn in range(4):
        writer, reader = (a, b) if turn % 2 == 0 else (b, a)
        writer.pwrite(bytes([turn + 1]) * 4096, turn * 4096)
        assert reader.pread(4096, turn * 4096) == bytes([turn + 1]) * 4096
    for turn in range(4):
        assert a.pread(4096, turn * 4096) == bytes([turn + 1]) * 4096
    a.shutdown()
    b.shutdown()


def test_G4_volume_in_use_is_refused_with_its_owner(two):
    first, second = two
    a = connect(first)
    a.pwrite(b"x" * 512, 0)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            a.pwrite(b"y" * 512, 512)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        b = connect(second)
        with pytest.raises(nbd.Error):
            b.pwrite(b"z" * 512, 1024)
        assert f"process {first.pid}" in second.log()
    finally:
        stop.set()
        thread.join()
    assert a.pread(512, 1024) == bytes(512)
    a.shutdown()
    # Now that the first is silent the same connection gets through.
    b.pwrite(b"z" * 512, 1024)
    assert b.pread(512, 0) == b"x" * 512
    b.shutdown()


@pytest.mark.lmdb("only here a process is known to be dead; fdb/test_gateways.py")
def test_G1_dead_owner_is_replaced_at_once(two, rng):
    first, second = two
    a = connect(first)
    data = rng.randbytes(1 << 20)
    a.pwrite(data, 12345)
    first.kill()
    began = time.monotonic()
    b = connect(second)
    assert b.pread(len(data), 12345) == data
    assert time.monotonic() - began < 1.5 * SLOW, "it must not wait for a lease"
    b.shutdown()


@pytest.mark.lmdb("elsewhere it is fenced; fdb/test_gateways.py")
def test_G4_stopped_owner_is_ended(two, rng):
    first, second = two
    a = connect(first)
    data = rng.randbytes(70000)
    a.pwrite(data, 999)
    os.kill(first.pid, signal.SIGSTOP)
    b = connect(second)
    assert b.pread(len(data), 999) == data
    b.pwrite(b"new" + bytes(509), 0)
    # It was not fenced but ended: it can't come back and write.
    wait_until(lambda: first.process.poll() is not None, 10 * SLOW, "the stopped owner is ended")
    assert first.process.returncode == -signal.SIGKILL
    first.process = None
    assert b.pread(3, 0) == b"new"
    b.shutdown()
    first.start()
    assert connect(first).pread(3, 0) == b"new"


def test_G4_evict_takes_the_volume_from_a_busy_server(two):
    first, second = two
    a = connect(first)
    a.pwrite(b"x" * 512, 0)
    assert owner_pid(second) == first.pid
    second.cli("owner", "evict", "v", "--yes")
    with pytest.raises(nbd.Error):
        for _ in range(100):
            a.pread(512, 0)
    b = connect(second)
    assert b.pread(512, 0) == b"x" * 512
    b.pwrite(b"y" * 512, 0)
    b.shutdown()
