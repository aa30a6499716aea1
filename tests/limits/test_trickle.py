"""Clients that begin large writes and then send next to nothing must not keep all others from
writing (G6): memory they were granted is taken back while others wait.
"""

import threading
import time

import nbd
import pytest

from harness import rawnbd
from harness.server import SLOW, Server

MIB = 1 << 20


@pytest.mark.limit(200)
def test_G6_trickling_writers_do_not_stop_others(tmp_path):
    with Server(tmp_path, {"v": "256M"}, ["--cache-size", "32M"], tcp=False) as server:
        slow = []
        for n in range(8):
            c = rawnbd.Client(str(server.socket_path))
            c.handshake()
            c.go("v")
            c.send(c.header(rawnbd.CMD_WRITE, n * 4 * MIB, 4 * MIB, cookie=n) + bytes(100_000))
            slow.append(c)
        stop = threading.Event()

        def trickle():
            while not stop.wait(1):
                for c in slow:
                    try:
                        c.sock.send(b"x")
                    except OSError:
                        pass

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            h = nbd.NBD()
            h.connect_uri(server.uri("v"))
            began = time.monotonic()
            h.pwrite(b"honest" + bytes(506), 200 * MIB)
            took = time.monotonic() - began
            print(f"an honest write took {took:.1f} s")
            assert took < 40 * SLOW
            assert h.pread(6, 200 * MIB) == b"honest"
            # What was half sent never took effect (G3).
            assert h.pread(4096, 0) == bytes(4096)
            h.shutdown()
            # The log says which limit it was.
            assert "the rest of a write did not come within 10000 ms" in server.log()
            assert "30000 ms" not in server.log()
        finally:
            stop.set()
            thread.join()
            for c in slow:
                c.close()
