"""Races between threads: a server with ThreadSanitizer and several reactors does all at once.

What it may do beside its clients' requests is done while they are under way: connections come,
and go in the middle of a request; snapshots come and go; volumes grow, are made and removed;
metrics and clients are looked at; access rules are read anew; the server is replaced, and
drained. A race is a report in the server's log (harness/server.py looks for it) and an exit
status of its own.

`scripts/check.py` builds the program so and runs this with it (build-tsan); with another build
it shows that nothing breaks, and no more. THREADS_S (default 4) is how long the load lasts.
"""

import itertools
import os
import random
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from harness import history, http, rawnbd
from harness.load import Background, Load, Reconnecting, Shape
from harness.server import SLOW, Server, program, wait_until
from planted import planted_library

MIB = 1 << 20
SIZE = 16 * MIB
LOAD_S = float(os.environ.get("THREADS_S", "4"))
UNITS = ["server_reactor", "store_contract", "store_commit", "store_log", "store_warm"]
BUILD = Path(program()[-1]).parent
SHAPE = dict(size=SIZE, ops=1 << 30, pace_us=1500, zeros=0.1, trims=0.1,
             lengths=((512, 8), (4096, 8), (16384, 4), (65536, 2), (700000, 0.2)))


class Crowd:
    """Threads that do something again and again until the block is left; what goes wrong in one is
    raised there."""

    def __init__(self):
        self.over = threading.Event()
        self.turns, self.problems, self.threads = {}, [], []

    def add(self, name, turn, pause_s=0.0):
        """turn(n) is called for n = 0, 1, ...; it has no more than `pause_s` between two."""
        self.turns[name] = 0

        def run():
            try:
                for n in itertools.count():
                    if self.over.wait(pause_s):
                        return
                    turn(n)
                    self.turns[name] += 1
            except BaseException as e:
                self.problems.append(f"{name}: {type(e).__name__}: {e}")

        self.threads.append(threading.Thread(target=run, daemon=True))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def __exit__(self, kind, value, trace):
        self.stop()
        if kind is None:
            assert not self.problems, self.problems


def reader(server, name, seed):
    """One connection that asks for everything that changes nothing."""
    rng = random.Random(seed)
    client = rawnbd.connect(server, name, structured=True, contexts=("base:allocation",))

    def turn(n):
        at = rng.randrange(SIZE - 200000)
        client.read(at, rng.randrange(1, 200000))
        if n % 5 == 0:
            client.block_status(at, 100000)
            client.cache(at, 100000)
    return turn


def stranger(server, name, seed):
    """Connections that come and go, some in the middle of what they say."""
    rng = random.Random(seed)

    def turn(n):
        with rawnbd.Client(rng.choice(server.addresses())) as c:
            c.handshake()
            if n % 4 == 0:
                c.list()
                c.abort()
            elif n % 4 == 1:
                c.go(name)
                c.request(rawnbd.CMD_WRITE, 0, length=65536, payload=bytes(30000))
            elif n % 4 == 2:
                c.go(name)
                for i in range(8):
                    c.request(rawnbd.CMD_READ, i * 65536, length=65536)
            else:
                c.send(bytes(5))
    return turn


def looker(server, control):
    pages = ["/metrics", "/v1/clients", "/v1/volumes", "/v1/volumes/a", "/v1/volumes/b/heat",
             "/v1/server", "/healthz", "/readyz", "/"]

    def turn(n):
        where = control if n % 2 else ("127.0.0.1", server.http_port)
        status, _, text = http.request(where, pages[n % len(pages)])
        assert status in (200, 404, 503), f"{pages[n % len(pages)]}: {status} {text[:200]}"
    return turn


def changer(server):
    """Commands that change volumes, as an administrator gives them."""
    sizes = itertools.cycle((SIZE + MIB, SIZE + 2 * MIB))

    def turn(n):
        for words in (["snapshot", "create", "a@now"],
                      ["resize", "grown", next(sizes), "--shrink", "--yes"],
                      ["create", "passing", "4M"], ["list"], ["info", "a"],
                      ["snapshot", "remove", "a@now"], ["remove", "passing", "--yes"]):
            server.cli(*words)
    return turn


@pytest.fixture
def server(servers, folder):
    access = folder / "access"
    access.write_text("any rw *\n")
    server = servers.make({name: SIZE for name in ("a", "b", "c", "grown")},
                          ["--threads", "3", "--cache-size", "128M"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        server.http_port = s.getsockname()[1]
    server.args += ["--http", f"127.0.0.1:{server.http_port}", "--slow-ms", "50",
                    "--access", str(access)]
    return server.start()


def judge(server, loads):
    """G1, though that is not what this is for: a load that was not served would show no races."""
    for name, load in loads.items():
        wrong = [str(op) for op in load.ops if op.answered_ns is None or op.error]
        assert not wrong, f"{name}: {wrong[:5]}"
        assert len(load.ops) > 20
        with rawnbd.connect(server, name) as c:
            history.check_death(bytes(SIZE), load.ops, c.read_all())
        load.close()


@pytest.mark.limit(300)
def test_everything_at_once(server, rng):
    loads = {name: Load(server, name, Shape(**SHAPE, connections=2), rng) for name in "abc"}
    crowd = Crowd()
    for name in "abc":
        crowd.add(f"reader {name}", reader(server, name, rng.random()), 0.002)
    crowd.add("strangers", stranger(server, "b", rng.random()), 0.005)
    crowd.add("looker", looker(server, http.control(server.pid)), 0.01)
    crowd.add("changer", changer(server), 0.05)
    crowd.add("rules", lambda n: os.kill(server.pid, signal.SIGHUP), 0.2)
    with Background(loads["a"], 250 * SLOW), Background(loads["b"], 250 * SLOW), \
            Background(loads["c"], 250 * SLOW), crowd:
        end = time.monotonic() + LOAD_S
        wait_until(lambda: crowd.problems or (time.monotonic() > end
                                              and min(crowd.turns.values()) >= 2),
                   200 * SLOW, "all have done their part")
    print(f"{ {name: len(load.ops) for name, load in loads.items()} } requests, {crowd.turns}")
    judge(server, loads)


@pytest.mark.limit(300)
def test_replaced_and_drained(server, rng):
    """Twice another process takes over under load, and the last one gives everything back."""
    address = server.addresses()[0]
    loads = {name: Reconnecting(server, name, Shape(**SHAPE, connections=2), rng, address=address)
             for name in "ab"}
    with Background(loads["a"], 250 * SLOW) as a, Background(loads["b"], 250 * SLOW) as b:
        for _ in range(2):
            aims = [(load, len(load.ops) + 50, load.reconnects + 2) for load in loads.values()]
            server.upgrade()
            wait_until(lambda: not (a.running() and b.running())
                       or all(len(load.ops) > n and load.reconnects >= m for load, n, m in aims),
                       100 * SLOW, "the loads go on")
    judge(server, loads)
    server.cli("drain", "--control", http.control(server.pid), "--wait")


@pytest.mark.lmdb("the programs bring their stores")
@pytest.mark.limit(300)
@pytest.mark.parametrize("name", UNITS)
def test_unit(name):
    """Programs of the unit tests whose threads are real."""
    path = BUILD / "tests" / f"test_{name}"
    if not path.exists():
        pytest.skip("LONG=1: the others are only built then")
    done = subprocess.run([path], capture_output=True, text=True, timeout=250 * SLOW)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


RACE = """
#include <pthread.h>
static int shared;
static void *add(void *unused)
{
    for (int i = 0; i < 1000; i++)
        shared++;
    return unused;
}
__attribute__((constructor)) static void race(void)
{
    pthread_t a, b;
    pthread_create(&a, NULL, add, NULL);
    pthread_create(&b, NULL, add, NULL);
    pthread_join(a, NULL);
    pthread_join(b, NULL);
}
"""


@pytest.mark.lmdb("it has to do with no store")
def test_a_race_would_be_noticed(folder):
    """By everything that stops a server in good order."""
    if b"__tsan_init" not in Path(program()[-1]).read_bytes():
        pytest.skip("the program is not built with ThreadSanitizer")
    planted = planted_library(folder, RACE, "-fsanitize=thread")
    server = Server(folder / "s", {"v": "4M"}, tcp=False, env={"LD_PRELOAD": planted})
    with pytest.raises(AssertionError, match="ended with 66"):
        server.start().stop()
