"""Two servers on one store (G1, G4).

A volume is served by one of them at a time. It moves when its owner's clients are
idle, is waited for and then refused with the owner's name while they are not, is taken at
once from a process that died, and after a lease from one that was stopped, which is ended
for good.
"""

import os
import signal
import threading
import time

import nbd
import pytest

from harness import rawnbd
from harness.server import SLOW, Server, wait_until

LEASE_MS = 3000  # the least there is on FoundationDB
OWNER_WAIT_S = 3


def connect(server, name="v"):
    h = nbd.NBD()
    h.connect_uri(server.uri(name))
    return h


@pytest.fixture
def two(tmp_path):
    first = Server(tmp_path / "1", {"v": "64M"}, ["--lease-ms", LEASE_MS],
                   store=tmp_path / "store", tcp=False)
    second = Server(tmp_path / "2",
                    args=["--lease-ms", LEASE_MS, "--owner-wait", OWNER_WAIT_S],
                    store=tmp_path / "store", tcp=False)
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
    the source still holds it, then the source falls silent. On the way back the target is new."""
    first, second = two
    source = connect(first)
    for turn in range(4):
        target = connect(second if turn % 2 == 0 else first)
        source.pwrite(bytes([turn + 1]) * 4096, turn * 4096)
        assert target.pread(4096, turn * 4096) == bytes([turn + 1]) * 4096
        source.pwrite(bytes([turn + 2]) * 4096, turn * 4096)
        source.flush()
        target.pwrite(b"moved" + bytes(507), 1 << 20)
        source.shutdown()
        source = target
    for turn in range(4):
        assert source.pread(4096, turn * 4096) == bytes([turn + 2]) * 4096
    source.shutdown()


def test_G4_client_from_before_does_not_write_over_what_others_wrote(two):
    """An idle mounted file system here, somebody who mounts the volume at the other server, and
    then a write here: it would destroy both."""
    first, second = two
    a, mate = rawnbd.connect(first, "v", structured=True), connect(first)
    a.write(0, b"a" * 512)
    assert mate.pread(512, 0) == b"a" * 512
    # Reading elsewhere, and administration, harm nobody.
    b = connect(second)
    assert b.pread(512, 0) == b"a" * 512
    second.cli("resize", "v", "80M")
    assert b.pread(512, 0) == b"a" * 512
    a.write(0, b"A" * 512)
    b.pwrite(b"b" * 512, 512)
    done = a.call(rawnbd.CMD_WRITE, 0, payload=b"bad" + bytes(509))
    assert done.error == rawnbd.EPERM
    said = done.chunks[-1].message
    assert f"process {second.pid} on " in said and "connect again" in said
    assert a.error_of(rawnbd.CMD_WRITE_ZEROES, 0, 4096) == rawnbd.EPERM
    assert a.error_of(rawnbd.CMD_TRIM, 0, 4096) == rawnbd.EPERM
    b.pwrite(b"b" * 512, 1024)
    assert a.read(0, 1536) == b"A" * 512 + b"b" * 1024
    assert first.log().count("changed its data") == 1
    # One that has not written has nothing to lose; a new connection neither.
    mate.pwrite(b"m" * 512, 2048)
    again = connect(first)
    again.pwrite(b"n" * 512, 2560)
    assert a.error_of(rawnbd.CMD_WRITE, 0, payload=bytes(512)) == rawnbd.EPERM
    with pytest.raises(nbd.Error):
        b.pwrite(b"bad" + bytes(509), 0)
    assert b.pread(1024, 2048) == b"m" * 512 + b"n" * 512
    a.close()
    for h in (mate, b, again):
        h.shutdown()


def test_shared_servers_let_clients_take_turns(two):
    first, second = two
    for server in two:
        server.stop()
        server.args.append("--shared")
        server.start()
    a, b = connect(first), connect(second)
    for n in range(3):
        a.pwrite(bytes([n]) * 512, 0)
        b.pwrite(bytes([n]) * 512, 512)
    assert a.pread(1024, 0) == bytes([2]) * 1024
    a.shutdown()
    b.shutdown()


class Busy:
    """A client that writes all the time, so that its server does not hand the volume over."""

    def __init__(self, h):
        self.h, self.stop = h, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.stop.is_set():
            self.h.pwrite(b"y" * 512, 512)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *unused):
        self.stop.set()
        self.thread.join()


@pytest.mark.parametrize("how", ["simple", "structured", "extended"])
def test_G4_volume_in_use_is_refused_with_its_owner(two, how):
    first, second = two
    a = connect(first)
    a.pwrite(b"x" * 512, 0)
    b = rawnbd.connect(second, "v", structured=how == "structured", extended=how == "extended")
    with Busy(a):
        began = time.monotonic()
        done = b.call(rawnbd.CMD_WRITE, 1024, payload=b"z" * 512)
        took = time.monotonic() - began
    assert done.error == rawnbd.EPERM
    assert OWNER_WAIT_S <= took < OWNER_WAIT_S + 3 * SLOW
    said = [line for line in second.log().splitlines() if f"process {first.pid}" in line]
    assert len(said) == 1, second.log_tail()
    for part in ("volume v ", f"unix:{first.socket_path}", " since 20", os.uname().nodename):
        assert part in said[0]
        if how != "simple":
            assert part in done.chunks[-1].message
    assert a.pread(512, 1024) == bytes(512)
    a.shutdown()
    # Now that the first is gone the same connection gets through.
    b.write(1024, b"z" * 512)
    assert b.read(0, 512) == b"x" * 512
    b.close()


def test_G4_volume_in_use_is_waited_for(two):
    first, second = two
    a, b = connect(first), rawnbd.connect(second, "v")
    a.pwrite(b"x" * 512, 0)
    with Busy(a):
        cookie = b.request(rawnbd.CMD_WRITE, 1024, payload=b"z" * 512)
        b.expect_silent(1)
    began = time.monotonic()
    b.result(cookie).check()
    assert time.monotonic() - began < 1.5 * SLOW
    assert b.read(0, 512) == b"x" * 512 and b.read(512, 512) == b"y" * 512
    a.shutdown()
    b.close()


def test_who_waits_for_an_owner_does_not_keep_a_server_from_ending(two):
    first, second = two
    a = connect(first)
    a.pwrite(b"x" * 512, 0)
    second.stop()
    second.args[-1] = "60"
    second.start()
    b = rawnbd.connect(second, "v")
    with Busy(a):
        b.request(rawnbd.CMD_READ, 0, 512)
        b.expect_silent(0.5)
        began = time.monotonic()
        second.stop()
        assert time.monotonic() - began < 5 * SLOW
    second.start()
    a.shutdown()


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


class Persistent:
    """A client that writes all the time and connects again at once when it is cut off, for as
    long as the volume is there."""

    def __init__(self, server, name="v"):
        self.server, self.name = server, name
        self.writes = self.connections = 0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while True:
            h = nbd.NBD()
            try:
                h.connect_uri(self.server.uri(self.name))
            except nbd.Error:
                return
            self.connections += 1
            try:
                while True:
                    h.pwrite(b"p" * 4096, 4096)
                    self.writes += 1
            except nbd.Error:
                pass


def test_remove_with_force_cuts_off_a_client_that_keeps_coming_back(two):
    first, second = two
    client = Persistent(first)
    wait_until(lambda: client.writes > 10, 10 * SLOW, "it writes")
    # Without force nothing happens to it.
    done = second.cli("remove", "v", "--yes", check=False)
    assert done.returncode == 1 and f"pid {first.pid}" in done.stderr and "--force" in done.stderr
    assert client.connections == 1
    second.cli("remove", "v", "--force", "--yes")
    client.thread.join(10 * SLOW)
    assert not client.thread.is_alive()
    assert second.json("list")["volumes"] == []
    # The name is free, and nothing of the old volume or its client is in the new one.
    second.cli("create", "v", "32M")
    h = connect(first)
    assert h.pread(1 << 20, 0) == bytes(1 << 20)
    h.pwrite(b"new" + bytes(509), 0)
    h.shutdown()
    # Where nobody uses it, force is no different.
    second.cli("remove", "v", "--force", "--yes")
    assert first.json("list")["volumes"] == []
