"""A server under attack, and what that does to an honest client.

The attackers are attack.c, niced a little, since on other machines they would not take the server's
processors. The honest client is at another address (127.0.0.2), on a volume of its own that the same
reactor serves. Figures are printed: pytest -s.
"""

import json
import os
import resource
import signal
import struct
import subprocess
import threading
import time
from contextlib import contextmanager

from harness import rawnbd
from harness.server import SLOW, wait_until

MIB = 1 << 20
HONEST = "127.0.0.2"
LONG = os.environ.get("LONG", "0") not in ("", "0")
# The sanitizers keep what was freed.
MEASURES_MEMORY = "ASAN_OPTIONS" not in os.environ
SECONDS = 5 if LONG else 0.8
# What a noisy machine may make of a request that takes a fraction of a millisecond.
P50_LIMIT_S = 0.05
P99_LIMIT_S = 0.25
MAX_LIMIT_S = 3
NEWCOMER_LIMIT_S = 5
# What the store keeps for reads and writes of its files, made when they are first needed.
STORE_FILES = 32
# A server says so much about clients in a window of five seconds, and of an attack two are seen.
LOG_LINES_MAX = 2 * (500 + 6 * 50)


FLAGS = struct.pack(">L", rawnbd.FIXED_NEWSTYLE | rawnbd.NO_ZEROES)


def option(number, data=b"", length=None):
    """length: what it claims to have."""
    return (struct.pack(">QLL", rawnbd.IHAVEOPT, number, len(data) if length is None else length)
            + data)


def connections(wanted):
    """As many as the machine lets one process have, with some to spare."""
    return min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500)


def status_kib(pid, field):
    with open(f"/proc/{pid}/status", encoding="ascii") as f:
        for line in f:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    raise AssertionError(f"no {field}")


def descriptors(pid):
    """(sockets, other files)"""
    folder, n = f"/proc/{pid}/fd", [0, 0]
    for fd in os.listdir(folder):
        try:
            n[not os.readlink(f"{folder}/{fd}").startswith("socket:")] += 1
        except FileNotFoundError:
            pass  # closed meanwhile
    return tuple(n)


class Latency:
    def __init__(self, taken_s):
        self.taken = sorted(taken_s)

    def at(self, share):
        return self.taken[min(int(len(self.taken) * share), len(self.taken) - 1)]

    def __str__(self):
        p50, p99, most = (1000 * s for s in (self.at(0.5), self.at(0.99), self.taken[-1]))
        return f"p50 {p50:.2f} p99 {p99:.2f} max {most:.1f} ms ({len(self.taken)})"


class Probe:
    """What the honest client's requests took."""

    def __init__(self, reads, writes):
        self.reads, self.writes = Latency(reads), Latency(writes)

    def __str__(self):
        return f"reads {self.reads}, writes {self.writes}"


class Siege:
    """budget_kib: what the server may have in anonymous memory."""

    def __init__(self, server, program, folder, name, *, volume="v", budget_kib=None, client=None):
        self.server, self.program, self.folder, self.name = server, program, folder, name
        self.budget_kib = budget_kib
        self.volume = volume
        self.attackers, self.clients = [], []
        self.client = client or self.honest()
        self.files = 0
        self.peak_kib = 0
        self.newcomers = []
        self.fds_most = 0
        self.before = self.probe(0.3)
        self.fds = descriptors(server.pid)
        self.log_bytes = len(server.log())

    def address(self):
        return f"{self.server.host}:{self.server.port}"

    def honest(self, source=HONEST):
        client = rawnbd.Client((self.server.host, self.server.port), source=source)
        try:
            client.handshake()
            client.go(self.volume)
        except BaseException:
            client.close()
            raise
        return client

    def probe(self, seconds):
        """Small reads and writes, one at a time."""
        reads, writes, block = [], [], b"x" * 4096
        until = time.monotonic() + seconds * SLOW
        while time.monotonic() < until or len(writes) < 20 or self.attacked():
            at = len(reads) * 4096 % (4 * MIB)
            for call, taken in ((lambda: self.client.read(at, 4096), reads),
                                (lambda: self.client.write(at, block), writes)):
                began = time.monotonic()
                call()
                taken.append(time.monotonic() - began)
        return Probe(reads, writes)

    @staticmethod
    def enough(process):
        """It ends when its time is over."""
        process.send_signal(signal.SIGUSR1)

    def attacked(self):
        return any(p.poll() is None for p in self.attackers)

    def file(self, data):
        self.files += 1
        path = self.folder / f"step{self.files}"
        path.write_bytes(data)
        return path

    def attack(self, count, *steps, seconds=SECONDS, least=0, to=None):
        """steps: bytes are sent; else as attack.c has them, with bytes in place of files."""
        words = [f"send:{self.file(s)}" if isinstance(s, bytes) else
                 f"{s[0]}:{self.file(s[1])}" if isinstance(s, tuple) else s for s in steps]
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "5", self.program,
             to or self.address(), str(count), f"{seconds * SLOW:g}", f"least:{least}", *words],
            stdout=subprocess.PIPE, text=True)
        self.attackers.append(process)
        return process

    def besides(self, client):
        """One more client that is there while the server stands, and is closed then."""
        self.clients.append(client)
        return client

    def _watch(self, over):
        while not over.wait(0.02):
            self.peak_kib = max(self.peak_kib, status_kib(self.server.pid, "RssAnon"))
            self.fds_most = max(self.fds_most, len(os.listdir(f"/proc/{self.server.pid}/fd")))

    def _newcomers(self, over, source):
        while not over.wait(0.05):
            began = time.monotonic()
            try:
                with self.honest(source) as client:
                    client.read(0, 4096)
                self.newcomers.append(time.monotonic() - began)
            except Exception as e:  # whatever it was, it did not get in
                self.newcomers.append(e)

    @contextmanager
    def watched(self, newcomers_from=HONEST):
        """What happens to the server and to those who come to it."""
        over = threading.Event()
        threads = [threading.Thread(target=self._watch, args=(over,), daemon=True)]
        if newcomers_from:
            threads.append(threading.Thread(target=self._newcomers, args=(over, newcomers_from),
                                            daemon=True))
        for t in threads:
            t.start()
        try:
            yield
        finally:
            over.set()
            for t in threads:
                t.join()

    def stand(self, newcomers_from=HONEST, writes_p99_limit_s=P99_LIMIT_S):
        """Until the attackers have done what they came for; then all is checked and told."""
        with self.watched(newcomers_from):
            during = self.probe(0)
        return self.over(during, newcomers_from, writes_p99_limit_s)

    def over(self, during, newcomers_from=HONEST, writes_p99_limit_s=P99_LIMIT_S):
        did = [json.loads(p.communicate(timeout=60 * SLOW)[0]) for p in self.attackers]
        self.attackers.clear()
        for client in self.clients:
            client.close()
        lines = self.server.log()[self.log_bytes:].count("\n")
        arrived = [t for t in self.newcomers if not isinstance(t, Exception)]
        print(f"\n{self.name}\n  before: {self.before}\n  during: {during}\n"
              f"  anonymous memory at most {self.peak_kib / 1024:.1f} MiB, "
              f"files {sum(self.fds)} before, {self.fds_most} at most, log lines {lines}")
        if newcomers_from:
            print(f"  newcomers: {len(arrived)} of {len(self.newcomers)} got in, "
                  f"the slowest after {1000 * max(arrived, default=0):.0f} ms")
        for one in did:
            print(f"  attackers: {one}")
        self.server.check_alive()
        for latency, p99_s in ((during.reads, P99_LIMIT_S), (during.writes, writes_p99_limit_s)):
            assert latency.at(0.5) <= P50_LIMIT_S * SLOW or p99_s > P99_LIMIT_S
            assert latency.at(0.99) <= p99_s * SLOW
            assert latency.taken[-1] <= MAX_LIMIT_S * SLOW
        if newcomers_from:
            assert arrived == self.newcomers and arrived, \
                [e for e in self.newcomers if isinstance(e, Exception)][:3]
            assert max(arrived) <= NEWCOMER_LIMIT_S * SLOW
        if self.budget_kib and MEASURES_MEMORY:
            assert self.peak_kib <= self.budget_kib
        assert lines <= LOG_LINES_MAX * SLOW
        wait_until(lambda: descriptors(self.server.pid)[0] <= self.fds[0], 20 * SLOW,
                   "all sockets of the attackers are closed")
        assert descriptors(self.server.pid)[1] <= self.fds[1] + STORE_FILES
        self.client.read(0, 4096)
        return did

    def wait_for_sockets(self, n):
        wait_until(lambda: descriptors(self.server.pid)[0] >= n, 150 * SLOW, f"{n} are connected",
                   pause_s=0.1)

    def end(self):
        for p in self.attackers:
            p.kill()
            p.wait()
        for client in [self.client, *self.clients]:
            client.close()
