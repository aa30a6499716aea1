"""Memory stays inside the budget, whatever clients do (G6).

64 connections write 32 MiB requests as fast as they can to a store whose disk is
made slow (slowdisk.c, a double). What the process ever had resident may be the
cache, 64 MiB, and 64 KiB for each connection.
"""

import selectors
import socket
import subprocess
import time
from pathlib import Path

import pytest

from harness import rawnbd
from harness.server import SLOW, Server

CONNECTIONS = 64
CACHE_MIB = 128
REQUEST = 32 << 20
SECONDS = 12


@pytest.fixture(scope="module")
def slowdisk(tmp_path_factory):
    out = tmp_path_factory.mktemp("shim") / "slowdisk.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", out,
                    Path(__file__).with_name("slowdisk.c"), "-ldl"], check=True)
    return out


def peak_kib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM")


class Writer:
    """Sends one 32 MiB write after the other without ever waiting for an answer first."""

    def __init__(self, server, number):
        client = rawnbd.Client(str(server.socket_path))
        client.handshake()
        client.go("big")
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


@pytest.mark.limit(300)
def test_G6_memory_with_64_connections_of_32_mib_writes_to_a_slow_store(tmp_path, slowdisk):
    env = {"LD_PRELOAD": str(slowdisk), "SLOW_SYNC_MS": "100", "SLOW_BYTES_PER_S": "50000000"}
    with Server(tmp_path, {"big": "16G"}, ["--cache-size", f"{CACHE_MIB}M"], env=env) as server:
        writers = [Writer(server, n) for n in range(CONNECTIONS)]
        selector = selectors.DefaultSelector()
        for w in writers:
            selector.register(w.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, w)
        end = time.monotonic() + SECONDS * SLOW
        while time.monotonic() < end:
            for key, events in selector.select(timeout=0.5):
                try:
                    if events & selectors.EVENT_READ:
                        key.data.read_some()
                    if events & selectors.EVENT_WRITE:
                        key.data.write_some()
                except (BlockingIOError, socket.timeout):
                    pass
            server.check_alive()
        limit = CACHE_MIB * 1024 + 64 * 1024 + CONNECTIONS * 64
        peak = peak_kib(server.pid)
        sent = sum(w.sent for w in writers)
        answered = sum(w.answered for w in writers)
        print(f"sent {sent >> 20} MiB, {answered} requests answered, "
              f"peak {peak >> 10} MiB of {limit >> 10} MiB")
        assert sent > 2 * CACHE_MIB << 20, "the load was too small to prove anything"
        assert peak <= limit
        for w in writers:
            w.socket.close()
