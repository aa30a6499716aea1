"""Two client hosts on one volume of one server (G4).

They destroy a file system as surely as through two servers, so one of them has the writing
role; it moves where one leaves all in order, which is what a migrating machine does. The rules
stand at the head of server/exports.h. All clients on Unix sockets and the loopback are one host;
the other one here uses an address of this machine's that others could reach.
"""

import subprocess
import time

import pytest

from harness import rawnbd
from harness.rawnbd import CMD_READ, CMD_WRITE, EPERM
from harness.server import SLOW, Server

OWNER_WAIT_S = 1
# What the first host has to be silent for, and what a loaded machine takes.
MOVED_S = 0.1 + 1 * SLOW
BLOCK = 4096


def address():
    """Some address of this machine's beside the loopback."""
    known = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    if not known:
        pytest.skip("this machine has no address but the loopback's")
    return known[0]


def serve(folder, *args):
    return Server(folder, {"v": "64M"}, args, host=address())


def here(server, **style):
    return rawnbd.connect(server, "v", **style)


def there(server, **style):
    return rawnbd.connect(server, "v", address=(server.host, server.port), **style)


def refused(client, offset=0):
    """A write is refused; how long that took and what the client was told."""
    began = time.monotonic()
    done = client.call(CMD_WRITE, offset, payload=b"bad" + bytes(BLOCK - 3))
    assert done.error == EPERM
    return time.monotonic() - began, done.chunks[-1].message


@pytest.fixture
def server(tmp_path):
    with serve(tmp_path / "1", "--owner-wait", OWNER_WAIT_S) as s:
        yield s


def test_G4_second_host_is_refused_after_a_wait(server):
    a, b, c = here(server), there(server, structured=True), there(server)
    a.write(0, b"a" * BLOCK)
    a.flush()
    late = there(server, structured=True)
    a.write(BLOCK, b"a" * BLOCK)
    for client in (b, late):
        cookie = client.request(CMD_WRITE, 0, payload=b"bad" + bytes(BLOCK - 3))
        began = time.monotonic()
        # Only that connection waits.
        a.write(2 * BLOCK, b"a" * BLOCK)
        assert a.read(0, BLOCK) == c.read(BLOCK, BLOCK) == b"a" * BLOCK
        done = client.result(cookie)
        assert OWNER_WAIT_S - 0.1 <= time.monotonic() - began < OWNER_WAIT_S + 1 * SLOW
        assert done.error == EPERM and "written by local" in done.chunks[-1].message
        assert client.read(0, BLOCK) == b"a" * BLOCK
    assert server.log().count("may not write volume v: ") == 2
    # Who has gone is in nobody's way.
    cookie = b.request(CMD_WRITE, 0, payload=b"b" * BLOCK)
    a.close()
    b.result(cookie).check()
    assert c.read(0, BLOCK) == b"b" * BLOCK
    for client in (b, c, late):
        client.close()


def test_G4_machine_that_migrates_takes_its_role_along(server):
    """What qemu does: the destination opens the image and looks at it while the source runs; the
    source drains and flushes; the destination writes; the source is still connected."""
    source, idle = here(server, structured=True), here(server)
    source.write(0, b"1" * BLOCK)
    target = there(server, structured=True)
    assert target.read(0, BLOCK) == b"1" * BLOCK
    source.write(0, b"2" * BLOCK)
    cookie = target.request(CMD_WRITE, BLOCK, payload=b"3" * BLOCK)
    target.request(CMD_READ, 0, 512)  # behind it, so it waits too
    target.expect_silent(0.3)
    source.flush()
    flushed = time.monotonic()
    target.result(cookie).check()
    assert 0.1 <= time.monotonic() - flushed < MOVED_S
    # From here on neither connection of the source writes, whatever it does.
    for client in (source, idle):
        took, _ = refused(client)
        assert took < 0.5 * SLOW
    _, why = refused(source, BLOCK)
    assert f"{server.host} writes this volume" in why
    again = here(server)
    took, _ = refused(again)
    assert took >= OWNER_WAIT_S - 0.1
    target.write(2 * BLOCK, b"4" * BLOCK)
    assert source.read(0, 3 * BLOCK) == b"2" * BLOCK + b"3" * BLOCK + b"4" * BLOCK
    assert server.log().count(f"volume v: {server.host} may write from now on") == 1
    target.close()
    again.write(0, b"5" * BLOCK)
    refused(source)
    for client in (source, idle, again):
        client.close()


def test_G4_flush_before_the_second_host_came_does_not_count(server):
    """A mounted file system that is idle, and somebody who mounts it a second time."""
    a = here(server)
    a.write(0, b"1" * BLOCK)
    a.flush()
    b = there(server)
    assert b.read(0, BLOCK) == b"1" * BLOCK
    refused(b)
    a.write(0, b"2" * BLOCK)
    assert b.read(0, BLOCK) == b"2" * BLOCK
    a.close()
    b.close()


def test_no_owner_wait_refuses_at_once(tmp_path):
    with serve(tmp_path / "1", "--owner-wait", 0) as server:
        a, b = here(server), there(server)
        a.write(0, b"1" * BLOCK)
        took, _ = refused(b)
        assert took < 0.5 * SLOW
        # A long payload is thrown away, and the stream stays in step.
        assert b.error_of(CMD_WRITE, 0, payload=bytes(3 << 20)) == EPERM
        assert b.read(0, BLOCK) == b"1" * BLOCK
        a.close()
        b.close()


def test_shared_lets_hosts_write_together(tmp_path):
    with serve(tmp_path / "1", "--shared") as server:
        a, b = here(server), there(server)
        for n in range(20):
            a.write(0, bytes([n]) * BLOCK)
            b.write(BLOCK, bytes([n]) * BLOCK)
        assert a.read(BLOCK, BLOCK) == b.read(0, BLOCK) == bytes([19]) * BLOCK
        a.close()
        b.close()
