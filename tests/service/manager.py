"""A service manager's ear (NOTIFY_SOCKET): what was said, and by which process."""

import socket
import struct
import time

from harness.waiting import SLOW


class Ear:
    def __init__(self, folder):
        self.path = folder / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(str(self.path))
        self.said = []  # (pid, "KEY=VALUE")

    def close(self):
        self.socket.close()

    def listen(self, limit_s=0.0):
        """Takes in one message, and gives whether there was one within the time."""
        self.socket.settimeout(limit_s or 0.001)
        try:
            text, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
        except TimeoutError:
            return False
        pid = struct.unpack("iII", ancillary[0][2])[0]
        self.said += [(pid, line) for line in text.decode().split("\n")]
        return True

    def drain(self):
        while self.listen():
            pass
        return self.said

    def hears(self, wanted, pid=None, limit_s=60.0):
        """Waits until a line that begins so was said (by this process); gives it, and takes all up
        to it off the list."""
        until = time.monotonic() + limit_s * SLOW
        while True:
            for at, (who, line) in enumerate(self.said):
                if line.startswith(wanted) and pid in (None, who):
                    del self.said[:at + 1]
                    return line
            left_s = until - time.monotonic()
            assert left_s > 0, f"{wanted!r} was not said; but {self.said}"
            self.listen(left_s)
