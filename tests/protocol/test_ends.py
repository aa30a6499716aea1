"""Checklist B27 and B28, and G3 at the socket: how connections end.

A disconnect finishes what is in flight; a shutdown drains or says so; a client
that dies in the middle of a write changes nothing; what a connection that hung
up left behind is never applied after something newer was answered.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import termios
import time
from pathlib import Path

import pytest

from harness.rawnbd import (
    CMD_DISC, CMD_FLUSH, CMD_READ, CMD_WRITE, ESHUTDOWN, FLAG_FUA, Closed, connect)
from harness.server import SLOW, STOP_LIMIT_S, wait_until

MIB = 1 << 20
STYLES = {"simple": {}, "structured": {"structured": True}, "extended": {"extended": True}}


@pytest.fixture(scope="module")
def server(module_servers):
    return module_servers.start({"a": "64M", "t": "64M", "g": "64M"})


@pytest.fixture(params=list(STYLES))
def style(request):
    return STYLES[request.param]


# -- B27 --------------------------------------------------------------------------


def test_B27_disc_finishes_what_is_in_flight(server, clients, style, rng):
    """Everything before it is answered, itself is not, then the connection ends."""
    c = clients(server, "a", **style)
    data = [rng.randbytes(65536) for _ in range(40)]
    parts, cookies = [], []
    for i, d in enumerate(data):
        cookie, raw = c.request(CMD_WRITE, i * 65536, payload=d, send=False)
        parts.append(raw)
        cookies.append(cookie)
    cookie, raw = c.request(CMD_FLUSH, send=False)
    parts.append(raw)
    cookies.append(cookie)
    parts.append(c.header(CMD_DISC, cookie=c.new_cookie()))
    c.send(b"".join(parts))
    for cookie in cookies:
        c.result(cookie).check()
    c.expect_closed()
    assert clients(server, "a").read(0, 40 * 65536) == b"".join(data)


def test_B27_disc_alone_gets_no_reply(server, clients, style):
    c = clients(server, "a", **style)
    c.disc()
    c.expect_closed()


def test_B27_nothing_behind_disc_is_obeyed(server, clients, style):
    c = clients(server, "a", **style)
    c.write(0, b"old!" * 128)
    _, more = c.request(CMD_WRITE, 0, payload=b"new!" * 128, send=False)
    c.send(c.header(CMD_DISC, cookie=1) + more)
    c.expect_closed()
    assert clients(server, "a").read(0, 512) == b"old!" * 128


def test_B27_cookies_are_opaque(server, clients, style):
    c = clients(server, "a", **style)
    c.write(0, bytes(range(256)) * 2)
    for cookie in (0, 1, (1 << 64) - 1, 1 << 63, 0x67446698668E33EF):
        assert c.call(CMD_READ, 0, 512, cookie=cookie).check().data == bytes(range(256)) * 2
    # One that is free again may be used again at once.
    for _ in range(20):
        assert c.call(CMD_READ, 0, 16, cookie=5).check().data == bytes(range(16))


def test_B27_tcp_nodelay_is_set(server):
    """Read off the server's own sockets: a timing would say little on a noisy machine."""
    c = connect(server, "a", address=(server.host, server.port))
    local, remote = c.sock.getsockname()[1], c.sock.getpeername()[1]
    inode = None
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if int(words[1].split(":")[1], 16) == remote and int(words[2].split(":")[1], 16) == local:
            inode = words[9]
    assert inode
    libc = ctypes.CDLL(None, use_errno=True)
    SYS_pidfd_open, SYS_pidfd_getfd = 434, 438
    pidfd = libc.syscall(SYS_pidfd_open, server.pid, 0)
    if pidfd < 0:
        pytest.skip(f"no pidfd_open here: {os.strerror(ctypes.get_errno())}")
    for fd in Path(f"/proc/{server.pid}/fd").iterdir():
        try:
            if os.readlink(fd) != f"socket:[{inode}]":
                continue
        except FileNotFoundError:
            continue
        mine = libc.syscall(SYS_pidfd_getfd, pidfd, int(fd.name), 0)
        if mine < 0:
            pytest.skip(f"no pidfd_getfd here: {os.strerror(ctypes.get_errno())}")
        with socket.socket(fileno=mine) as s:
            assert s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        break
    else:
        raise AssertionError("the server's end of the connection was not found")
    os.close(pidfd)
    c.close()


def test_B27_shutdown_drains_or_says_so(servers, clients, style, rng):
    """SIGTERM under load: each request is answered, refused with ESHUTDOWN, or the
    connection ends; whatever was answered is there afterwards."""
    s = servers.start({"v": "64M"})
    c = clients(s, "v", **style)
    sent, answered = {}, {}
    stop_at = 60

    def one(i):
        data = struct.pack(">Q", i) * 8192
        try:
            cookie = c.request(CMD_WRITE, i * 65536, payload=data)
        except OSError:
            return False
        sent[cookie] = (i, data)
        return True

    for i in range(stop_at):
        one(i)
    s.process.send_signal(signal.SIGTERM)
    more = stop_at
    try:
        while len(answered) < len(sent):
            result = c.any_result()
            answered[result.request.cookie] = result.error
            if more < 400 and one(more):
                more += 1
    except (Closed, OSError):
        pass
    s.process.wait(STOP_LIMIT_S)
    s.stop()
    assert set(answered.values()) <= {0, ESHUTDOWN}
    s.start()
    c = clients(s, "v")
    for cookie, error in answered.items():
        i, data = sent[cookie]
        if not error:
            assert c.read(i * 65536, 65536) == data


def test_B27_shutdown_does_not_wait_for_a_client_that_is_silent(servers, clients):
    """Idle connections, half a request, half a write: none of them holds it up."""
    s = servers.start({"v": "4M"})
    clients(s, "v")
    half = clients(s, "v")
    half.send(half.header(CMD_WRITE, 0, 65536)[:10])
    torn = clients(s, "v")
    torn.send(torn.header(CMD_WRITE, 0, 65536) + b"x" * 1000)
    deaf = clients(s, "v")
    for _ in range(64):
        deaf.request(CMD_READ, 0, MIB)
    started = time.monotonic()
    s.stop()
    assert time.monotonic() - started < 30 * SLOW


# -- G3: a client that dies in the middle of a write ------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("sent", [0, 1, 511, 4096, 65536, 500000, MIB - 1])
def test_G3_a_write_cut_off_leaves_the_old_bytes(server, clients, rng, sent, how, tcp):
    address = (server.host, server.port) if tcp else None
    volume = "t" if tcp else "g"
    c = clients(server, volume, address=address)
    offset = rng.choice([0, 4096, 12345])
    old = rng.randbytes(MIB)
    c.write(offset, old)
    dying = clients(server, volume, address=address)
    dying.send(dying.header(CMD_WRITE, offset, MIB, cookie=1) + rng.randbytes(sent))
    if how == "shutdown":
        dying.sock.shutdown(socket.SHUT_WR)
        dying.expect_closed()
    else:
        if how == "reset":
            dying.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        dying.close()
    assert c.read(offset, MIB) == old
    c.flush()
    # Whether the server has noticed the end by now or not.
    other = clients(server, volume, address=address)
    assert other.read(offset, MIB) == old


def test_G3_several_writes_of_which_the_last_is_cut_off(server, clients, rng):
    c = clients(server, "g")
    c.write(0, b"\1" * (8 * MIB))
    dying = clients(server, "g")
    for i in range(4):
        dying.send(dying.header(CMD_WRITE, i * MIB, MIB, cookie=i) + b"\2" * MIB)
        dying.pending[i] = dying.request(CMD_WRITE, i * MIB, MIB, cookie=i, send=False)
    dying.send(dying.header(CMD_WRITE, 4 * MIB, MIB, cookie=9) + b"\2" * (MIB - 1))
    dying.close()

    def whole_or_not():
        got = [c.read(i * MIB, MIB) for i in range(5)]
        assert all(g in (b"\1" * MIB, b"\2" * MIB) for g in got)
        assert got[4] == b"\1" * MIB
        return got
    for _ in range(20):
        whole_or_not()


# -- B28 --------------------------------------------------------------------------


def hang_up_with_a_backlog(server, address, volume, rounds, value):
    """Leaves requests behind that the server may not have read yet, as a client does
    whose request timed out. False: some of it, or its end, is still held back by this side's
    kernel, behind a closed window, which is where the guarantee ends."""
    old = connect(server, volume, address=address)
    old.sock.setblocking(False)
    # Small ones, since a Unix socket's buffer holds few; all inside the first 64 KiB.
    backlog = b"".join(old.header(CMD_WRITE, i % 16 * 4096, 4096, cookie=1) + value * 4096
                       for i in range(rounds))
    sent = 0
    deadline = time.monotonic() + 0.02
    while sent < len(backlog) and time.monotonic() < deadline:
        try:
            sent += old.sock.send(backlog[sent:])
        except BlockingIOError:
            pass
    arrived = address is None
    deadline = time.monotonic() + 0.5
    while not arrived and time.monotonic() < deadline:
        arrived = struct.unpack("i", fcntl.ioctl(old.sock, termios.TIOCOUTQ, bytes(4))) == (0,)
    old.close()
    return arrived


@pytest.mark.parametrize("tcp", [False, True])
def test_B28_nothing_left_over_comes_after_something_newer(server, clients, tcp):
    """G8: requests that a closed connection left unread never undo a later answered write."""
    address = (server.host, server.port) if tcp else None
    volume = "t" if tcp else "a"
    counted = 0
    for round_ in range(25):
        new = clients(server, volume, address=address)
        # Over TCP as much as the first window takes.
        arrived = hang_up_with_a_backlog(server, address, volume, 14 if tcp else 3000,
                                         bytes([1 + round_]))
        counted += arrived
        data = struct.pack(">L", 0xFEED0000 + round_) * 16384
        new.write(0, data, FLAG_FUA if round_ % 2 else 0)
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline:
            assert new.read(0, 65536) == data or not arrived
        new.close()
    assert counted >= 10


def test_B28_hung_up_while_replies_are_not_read(server, clients):
    """The server's own replies are stuck: what it has not begun is thrown away too."""
    volume = "a"
    for round_ in range(10):
        old = connect(server, volume)
        old.sock.setblocking(False)
        batch = b"".join(old.header(CMD_READ, 0, MIB, cookie=1)
                         + old.header(CMD_WRITE, 0, 512, cookie=2) + b"old." * 128
                         for _ in range(50))
        try:
            while batch:
                batch = batch[old.sock.send(batch):]
        except BlockingIOError:
            pass
        old.close()
        new = connect(server, volume)
        new.write(0, b"new." * 128)
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline:
            assert new.read(0, 512) == b"new." * 128
        new.close()
    wait_until(lambda: clients(server, volume).read(0, 4) == b"new.", 5, "the last one stays")
