"""B28 and G8 where it is hardest: a connection that the server has stopped reading.

A slow store (powercut.c makes its syncs and writes take their time) makes the
server pause connections. Requests pile up in their sockets, whose clients may by
then have given up and sent the same places anew over another connection. What a
connection that has hung up left unread must never come after that.
"""

import socket
import struct
import time
from pathlib import Path

import pytest

from harness.load import content
from harness.rawnbd import CMD_WRITE, FLAG_FUA, connect
from harness.server import SLOW, wait_until

pytestmark = pytest.mark.lmdb("it makes files slow; fdb/test_outage.py makes a cluster slow")

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


def slow(s, shim, *more):
    s.store_folder.mkdir(parents=True)
    s.prefix = ["env", f"LD_PRELOAD={shim}", f"POWERCUT_ROOT={s.store_folder}",
                "ASAN_OPTIONS=verify_asan_link_order=0", *more]
    return s.start()


def give_up(old, how):
    if how == "reset":
        old.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    old.close()


def only_newer(s, new, seconds):
    """What the new connection writes to PLACE stays, for now and after a restart."""
    data = content(7, 0, PLACE)
    new.write(0, data)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert new.read(0, PLACE) == data, "an older write came after a newer one"
        time.sleep(0.05)
    new.flush()
    s.kill()
    s.prefix = []
    s.start()
    with connect(s, "v") as c:
        assert c.read(0, PLACE) == data, "an older write came after a newer one"


@pytest.mark.limit(240)
@pytest.mark.parametrize("tcp,how", [(False, "close"), (False, "reset"), (True, "reset")])
def test_B28_a_paused_connection_whose_end_can_be_seen(servers, shim, tcp, how):
    """Its end is noticed at once, and nothing more is read of it."""
    s = slow(servers.make({"v": SIZE}, ["--cache-size", "32M"]), shim,
             "POWERCUT_SYNC_US=200000-400000", "POWERCUT_WRITE_US=20000-40000")
    address = (s.host, s.port) if tcp else str(s.socket_path)
    old = connect(s, "v", address=address)
    sent, paused = fill(old.sock, 60 * SLOW)
    assert paused, f"{sent} bytes went out and nothing ever had to wait: the store is not slow"
    give_up(old, how)
    with connect(s, "v", address=address, timeout_s=120 * SLOW) as new:
        # Until everything the server had taken from the old one is long committed.
        only_newer(s, new, 6)


@pytest.mark.limit(240)
def test_B28_a_paused_connection_whose_end_is_behind_a_closed_window(servers, shim, folder):
    """Over TCP a FIN stands in line behind the data. A connection that was paused for
    some seconds, while there is another one, is closed with what is unread of it."""
    hold = folder / "hold"
    s = slow(servers.make({"v": SIZE}, ["--cache-size", "32M"]), shim,
             f"POWERCUT_FAULT={hold}")
    address = (s.host, s.port)
    with connect(s, "v", address=address, timeout_s=120 * SLOW) as new:
        new.write(0, b"warm" * 128, FLAG_FUA)
        hold.write_text("sync 0\n")
        old = connect(s, "v", address=address)
        port = old.sock.getsockname()[1]
        sent, paused = fill(old.sock, 60 * SLOW)
        assert paused, f"{sent} bytes went out although nothing can be synced"
        give_up(old, "close")
        assert open_tcp(port), "the kernel had nothing left to send: nothing was paused"
        wait_until(lambda: not open_tcp(port), 40 * SLOW,
                   "the connection that is paused for so long is closed by the server", 0.05)
        hold.unlink()
        only_newer(s, new, 4)


def open_tcp(port):
    """Whether the client's end of a connection from this port still has its data to send."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        # Not TIME_WAIT, not CLOSE.
        if int(words[1].split(":")[1], 16) == port and words[3] not in ("06", "07"):
            return True
    return False
