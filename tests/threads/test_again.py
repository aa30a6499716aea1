"""Leaks: a server that opens its store, serves a load, and closes again and again, leaves nothing
behind, neither in one process that does so many times (serve_again.c) nor at the end of one that
did it once.

Built with AddressSanitizer, a program that ends with something allocated that nothing points to
ends with a status of its own, and says where it was allocated; without, what is there after each
round is compared all the same.
"""

import os
import re
import signal
from pathlib import Path

import pytest

from harness import http, rawnbd
from harness.load import Load, Shape
from harness.server import SLOW, Server, program, wait_until
from planted import planted_library

MIB = 1 << 20
SIZE = 4 * MIB
ROUNDS = int(os.environ.get("LIVES", "20"))
SHAPE = dict(size=SIZE, ops=40, lengths=((512, 8), (4096, 8), (65536, 4), (700000, 1)))
# The first lives make what is kept for the next ones (buffers of the C library, of GnuTLS).
WARM = 4


class Again(Server):
    """One process with many lives."""

    def command(self):
        path = Path(program()[-1]).parent / "tests" / "serve_again"
        return [str(path), str(ROUNDS), *super().command()[len(program()):]]


def one_life(server, rng, n):
    """Everything that takes memory and descriptors, on every reactor."""
    for name in ("v", "w"):
        load = Load(server, name, Shape(**SHAPE, connections=2), rng, 1 + 1000 * n)
        load.run(limit_s=60 * SLOW)
        assert not [op for op in load.ops if op.error]
        with rawnbd.connect(server, name, structured=True, contexts=("base:allocation",)) as c:
            c.read_all()
            c.block_status(0, SIZE)
        load.close()
    # One is left in the middle of a request, another one in the middle of the handshake.
    half = rawnbd.connect(server, "v")
    half.request(rawnbd.CMD_WRITE, 0, length=65536, payload=bytes(1000))
    silent = rawnbd.Client(server.addresses()[0])
    http.scrape(server.folder / "c")
    http.get(server.folder / "c", "/v1/clients")
    server.cli("snapshot", "create", f"v@{n}")
    os.kill(server.pid, signal.SIGHUP)
    return half, silent


@pytest.mark.lmdb("FoundationDB's library can't be begun twice in a process")
@pytest.mark.limit(300)
def test_many_lives_of_one_process(folder, rng):
    access = folder / "access"
    access.write_text("any rw *\n")
    server = Again(folder / "s", {"v": SIZE, "w": SIZE},
                   ["--threads", "2", "--cache-size", "64M", "--access", str(access)], tcp=False)
    server.args += ["--control", str(server.folder / "c")]
    pattern = re.compile(r"^status (\d+) descriptors (\d+) threads (\d+) bytes (\d+)$", re.M)
    server.start()
    for n in range(ROUNDS):
        wait_until(server._ready, 60 * SLOW, "it serves again")
        left = one_life(server, rng, n)
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: len(pattern.findall(server.log())) > n, 60 * SLOW,
                   "a life ends")
        for client in left:
            client.close()
    status = server.process.wait(60 * SLOW)
    lives = [tuple(map(int, life)) for life in pattern.findall(server.log())]
    print("\n".join(f"{d} descriptors, {t} threads, {b} bytes" for _, d, t, b in lives))
    assert status == 0, server.log_tail(100)
    server.check_log()
    assert len(lives) == ROUNDS and not any(life[0] for life in lives)
    settled = lives[WARM:]
    assert len({life[1] for life in settled}) == 1, "descriptors are left open"
    assert len({life[2] for life in settled}) == 1, "threads are left"
    grown = settled[-1][3] - settled[0][3]
    assert grown <= 0, f"{grown} bytes more after {len(settled)} lives"


LEAK = """
#include <stdlib.h>
__attribute__((constructor)) static void leak(void)
{
    for (int i = 0; i < 10; i++) {
        char *volatile lost = malloc(1000);
        lost[0] = 1;
        lost = NULL;
    }
}
"""


@pytest.mark.lmdb("it has to do with no store")
def test_a_leak_would_be_noticed(folder):
    """By everything that stops a server in good order: so by most tests."""
    if b"__asan_init" not in Path(program()[-1]).read_bytes():
        pytest.skip("the program is not built with AddressSanitizer")
    options = os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"
    server = Server(folder / "s", {"v": "4M"}, tcp=False,
                    env={"LD_PRELOAD": planted_library(folder, LEAK), "ASAN_OPTIONS": options})
    with pytest.raises(AssertionError, match="LeakSanitizer"):
        server.start().stop()
