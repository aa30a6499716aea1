"""B28 and G8 where it is hardest: a connection that the server has stopped reading.

A slow store (powercut.c makes its syncs and writes take their time) makes the
server pause connections. Requests pile up in their sockets, whose clients may by
then have given up and sent the same places anew over another connection. What a
connection that has hung up left unread must never come after that.
"""

import socket
import struct
import time

import pytest

from harness.load import content
from harness.rawnbd import CMD_WRITE, connect
from harness.server import SLOW

MIB = 1 << 20
PLACE = 65536           # the bytes that both clients write
SIZE = 256 * MIB


def request(offset, payload, cookie):
    return struct.pack(">LHHQQL", 0x25609513, 0, CMD_WRITE, cookie, offset, len(payload)) + payload


def fill(sock, limit_s):
    """Sends large writes elsewhere with small ones to PLACE between them, until the
    server has read nothing for a second; gives how many bytes went out."""
    small = b"".join(request(i * 4096, content(100 + i, i * 4096, (i + 1) * 4096), i)
                     for i in range(PLACE // 4096))
    sock.setblocking(False)
    sent, turn, moved = 0, 0, time.monotonic()
    deadline = moved + limit_s
    rest = b""
    while time.monotonic() - moved < 1 and time.monotonic() < deadline:
        if not rest:
            at = MIB + turn * MIB % (SIZE - 2 * MIB)
            rest = memoryview(request(at, content(1000 + turn, at, at + MIB), 99) + small)
            turn += 1
        try:
            n = sock.send(rest)
        except BlockingIOError:
            # Answers are not left to stand in the way: only the store is to be slow.
            try:
                sock.recv(1 << 20)
            except BlockingIOError:
                pass
            time.sleep(0.002)
            continue
        sent += n
        rest, moved = rest[n:], time.monotonic()
    return sent, time.monotonic() - moved >= 1


@pytest.mark.limit(240)
@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("tcp", [False, True])
def test_B28_what_a_paused_connection_left_unread_is_thrown_away(servers, shim, how, tcp):
    s = servers.make({"v": SIZE}, ["--cache-size", "32M"])
    s.store_folder.mkdir(parents=True)
    s.prefix = ["env", f"LD_PRELOAD={shim}", f"POWERCUT_ROOT={s.store_folder}",
                "POWERCUT_SYNC_US=200000-400000", "POWERCUT_WRITE_US=20000-40000",
                "ASAN_OPTIONS=verify_asan_link_order=0"]
    s.start()
    address = (s.host, s.port) if tcp else str(s.socket_path)
    old = connect(s, "v", address=address)
    sent, paused = fill(old.sock, 60 * SLOW)
    assert paused, f"{sent} bytes went out and nothing ever had to wait: the store is not slow"
    if how == "reset":
        old.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    old.close()
    data = content(7, 0, PLACE)
    with connect(s, "v", address=address, timeout_s=120 * SLOW) as new:
        new.write(0, data)
        # Until everything the server had taken from the old one is long committed.
        until = time.monotonic() + 6
        while time.monotonic() < until:
            assert new.read(0, PLACE) == data, "an older write came after a newer one"
            time.sleep(0.05)
        new.flush()
    s.kill()
    s.prefix = []
    s.start()
    with connect(s, "v") as c:
        assert c.read(0, PLACE) == data, "an older write came after a newer one"
