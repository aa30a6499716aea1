"""What a Unix socket holds of replies that nobody takes yet."""

import fcntl
import struct
import termios
from pathlib import Path

from harness.rawnbd import CMD_READ
from harness.waiting import wait_until

MIB = 1 << 20
WMEM_DEFAULT = Path("/proc/sys/net/core/wmem_default")


def unread(c):
    return struct.unpack("i", fcntl.ioctl(c.sock, termios.FIONREAD, bytes(4)))[0]


def test_a_long_reply_leaves_in_few_parts(servers, clients, rng):
    """More of it is in the socket than one has room for by itself."""
    server = servers.start({"a": "8M"})
    c = clients(server, "a", address=server.socket_path)
    data = rng.randbytes(MIB)
    c.write(0, data)
    cookie = c.request(CMD_READ, 0, MIB)
    wait_until(lambda: unread(c) > int(WMEM_DEFAULT.read_text()) * 5 // 4, 10, "more is sent")
    assert c.result(cookie).check().data == data
