"""More writes than any server can take in at once: 32 MiB each, on many connections."""

import selectors
import socket
import time
from pathlib import Path

from . import rawnbd

REQUEST = 32 << 20


def peak_kib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


class Writer:
    """Sends one 32 MiB write after the other without ever waiting for an answer first."""

    def __init__(self, server, volume, number):
        client = rawnbd.Client(str(server.socket_path))
        client.handshake()
        client.go(volume)
        self.client = client
        self.socket = client.sock
        self.socket.setblocking(False)
        self.number = number
        self.sent = 0
        self.answered = 0
        self.requests = 0
        self.pending = b""
        self.payload = memoryview(bytes([number + 1]) * (1 << 20))
        self.left = 0
        self.reply = b""

    def write_some(self):
        if not self.pending and not self.left:
            offset = (self.number * 4 + self.requests % 4) * REQUEST
            self.pending = self.client.header(rawnbd.CMD_WRITE, offset, REQUEST,
                                              cookie=self.requests)
            self.left = REQUEST
            self.requests += 1
        if self.pending:
            self.pending = self.pending[self.socket.send(self.pending):]
        else:
            n = self.socket.send(self.payload[:min(self.left, len(self.payload))])
            self.left -= n
            self.sent += n

    def read_some(self):
        got = self.socket.recv(65536)
        assert got, "the server closed a connection that was being paused"
        self.reply += got
        while len(self.reply) >= 16:
            assert self.reply[4:8] == b"\0\0\0\0", f"error {self.reply[4:8].hex()}"
            self.reply = self.reply[16:]
            self.answered += 1


class Flood:
    """As many writers, driven from one thread."""

    def __init__(self, server, volume, connections):
        self.server = server
        self.writers = [Writer(server, volume, n) for n in range(connections)]
        self.selector = selectors.DefaultSelector()
        for w in self.writers:
            self.selector.register(w.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, w)

    def run(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.step()

    def step(self):
        for key, events in self.selector.select(timeout=0.5):
            try:
                if events & selectors.EVENT_READ:
                    key.data.read_some()
                if events & selectors.EVENT_WRITE:
                    key.data.write_some()
            except (BlockingIOError, socket.timeout):
                pass
        self.server.check_alive()

    def sent(self):
        return sum(w.sent for w in self.writers)

    def answered(self):
        return sum(w.answered for w in self.writers)

    def close(self):
        for w in self.writers:
            w.socket.close()
