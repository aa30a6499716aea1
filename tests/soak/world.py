"""What all parts of a soak share: its servers and what they take of the machine, what went wrong,
what was counted, and how fast the load may be.

A Slot is a place where a server is: an address that stays, and one server process after the
other. Each process is an Instance, sampled all the time: memory by its age, descriptors,
threads.
"""

import contextlib
import os
import random
import socket
import statistics
import subprocess
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from harness.server import SANITIZER_MARKS, Server, program

LEASE_MS = 3000
# A request waits this long for a volume that moves: longer than any lease here.
OWNER_WAIT_S = 30
CACHE_MIB = 96
# G6: the cache, 64 MiB, and 64 KiB for each connection; there are never as many as this.
MEMORY_LIMIT_KIB = (CACHE_MIB + 64 << 10) + 64 * 128
# What an instance may still grow once it is warm. Its memory swings by some 30 MiB within seconds,
# with what its clients send and how many slabs its buffers are spread over.
GROWTH_LIMIT_KIB = 16 << 10
# Descriptors and threads that an old instance may have more in its second half than before.
MORE_LIMIT = 8
# Below this age growth says nothing; an instance younger than WARM_SHARE of its life still fills its
# cache.
GROWTH_AGE_S = 600
WARM_SHARE = 1 / 3
SAMPLE_S = 2


class Defect(AssertionError):
    """What a soak is there to find."""


def now_ns():
    return time.monotonic_ns()


def low_port():
    """A free port that no outgoing connection is given: a client that tries to reach a server that
    is away must not meet itself there."""
    while True:
        port = random.SystemRandom().randrange(12000, 30000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Instance:
    """One server process. samples: [(age_s, anonymous KiB, PSS KiB, descriptors, threads)...]"""

    def __init__(self, slot, number, pid):
        self.slot, self.number, self.pid = slot, number, pid
        self.began = time.monotonic()
        self.samples = []

    @property
    def name(self):
        return f"{self.slot.name}{self.number}"

    @property
    def age_s(self):
        return self.samples[-1][0] if self.samples else 0

    def sample(self):
        """False once the process is gone."""
        proc = Path(f"/proc/{self.pid}")
        try:
            status = dict(line.split(":", 1) for line in
                          (proc / "status").read_text().splitlines() if ":" in line)
            pss = next(int(line.split()[1]) for line in
                       (proc / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
            fds = len(os.listdir(proc / "fd"))
            self.samples.append((time.monotonic() - self.began, int(status["RssAnon"].split()[0]),
                                 pss, fds, int(status["Threads"])))
        except (OSError, KeyError, StopIteration, ValueError):
            return False
        return True

    def warm(self):
        return [s for s in self.samples if s[0] >= WARM_SHARE * self.age_s]

    def more_than_before(self, column):
        """How much more of these (descriptors: 3, threads: 4) there are in the second half of the
        warm time than in the first, at the median."""
        warm = [s[column] for s in self.warm()]
        half = len(warm) // 2
        return statistics.median(warm[half:]) - statistics.median(warm[:half]) if half else 0

    def growth_kib(self):
        """Of its anonymous memory while it was warm: a line through the least of each minute (least
        squares), from the beginning of that time to its end."""
        warm, least = self.warm(), {}
        for age_s, kib, *_ in warm:
            least[age_s // 60] = min(kib, least.get(age_s // 60, kib))
        if len(least) < 3:
            return 0.0
        line = statistics.linear_regression(list(least), list(least.values()))
        return line.slope * (warm[-1][0] - warm[0][0]) / 60


class Slot:
    """An address, and the server that is there now."""

    def __init__(self, world, name, store, args):
        self.world, self.name = world, name
        self.server = Server(world.folder / name, args=args, store=store, port=low_port())
        self.instances = []
        self.accepting = threading.Event()

    def start(self):
        self.server.start()
        self.accepting.set()
        self.note_process()

    def note_process(self):
        """After each change of the process."""
        if self.server.running() and (not self.instances
                                      or self.instances[-1].pid != self.server.pid):
            self.instances.append(Instance(self, len(self.instances) + 1, self.server.pid))
            self.instances[-1].sample()

    def address(self, unix):
        return self.server.addresses()[0 if unix else 1]


class World:
    """load: how much of a processor all of it may use, as far as its pace decides it."""

    def __init__(self, folder, seed, seconds, load):
        self.folder, self.seed, self.seconds, self.load = folder, seed, seconds, load
        self.began = time.monotonic()
        self.counts = Counter()
        self.problems = []
        self.over = threading.Event()       # no new rounds
        self.failed = threading.Event()
        self.slots = []
        self.volumes = []
        self.pause_s = 0.02
        self.used_cores = []                # a figure a second
        self.store_mib = []                 # what the store's files take, every SAMPLE_S
        self._lock = threading.Lock()
        self._upset = []                    # [begin_ns, end_ns or None] while servers are ended

    def rng(self, *what):
        return random.Random(":".join(map(str, (self.seed, *what))))

    def age_s(self):
        return time.monotonic() - self.began

    def say(self, text):
        with self._lock:
            print(f"{self.age_s():7.1f}  {text}", flush=True)

    def count(self, what, n=1):
        with self._lock:
            self.counts[what] += n

    def fail(self, text):
        """Something is wrong: the run ends, with all of it kept."""
        with self._lock:
            self.problems.append(text)
        self.say(f"DEFECT {text}")
        self.failed.set()
        self.over.set()

    def fail_with(self, e):
        self.fail(f"{threading.current_thread().name}: {type(e).__name__}: {e}\n"
                  + "".join(traceback.format_tb(e.__traceback__)[-6:]))

    def guard(self, run, *args):
        """A thread's main function: what goes wrong in it is a defect."""
        try:
            run(*args)
        except BaseException as e:
            self.fail_with(e)

    def thread(self, name, run, *args):
        t = threading.Thread(target=self.guard, args=(run, *args), name=name, daemon=True)
        t.start()
        return t

    # -- when servers are not to be relied on --------------------------------

    @contextlib.contextmanager
    def upset(self):
        """While a server or a part of the store is ended and comes back: commands may fail."""
        span = [now_ns(), None]
        self._upset.append(span)
        try:
            yield
        finally:
            span[1] = now_ns()

    def was_upset(self, since_ns):
        """Whether that happened since then, or shortly before, so that a command that ran meanwhile
        may have met it."""
        since_ns -= 2 * LEASE_MS * 1_000_000
        return any(end is None or end >= since_ns for _, end in self._upset[-50:])

    # -- commands --------------------------------------------------------------

    def words(self, *words):
        s = self.slots[0].server
        return [*s.cli_prefix, *program(), "--store", s.store, *map(str, words)]

    def command(self, *words, limit_s=120, kill_after_s=None, may_say=(), store=None):
        """Runs a command; gives the finished process, or None where it was killed or failed for a
        reason: servers were ended meanwhile, or it says one of `may_say`."""
        began = now_ns()
        s = self.slots[0].server
        full = self.words(*words)
        if store:
            full[full.index("--store") + 1] = store
        process = subprocess.Popen(full, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True,
                                   env=dict(os.environ, **s.store_env))
        self.count("commands")
        if kill_after_s is not None:
            try:
                process.communicate(timeout=kill_after_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                self.count("kills: a command")
            return None
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Defect(f"no end within {limit_s} s: {' '.join(map(str, words))}") from None
        for mark in SANITIZER_MARKS:
            if mark in err:
                raise Defect(f"{words}: {err}")
        if "damaged" in err:
            raise Defect(f"{' '.join(map(str, words))} gave {process.returncode}: {err}")
        if words[1:2] == ("verify",) and '"wrong"' in out and '"wrong": 0' not in out:
            raise Defect(f"{' '.join(map(str, words))}: {out}")
        if process.returncode != 0:
            said = err.strip().splitlines()[-1] if err.strip() else ""
            if any(text in err for text in may_say):
                self.count("commands refused, as they should be")
            elif self.was_upset(began) and process.returncode > 0:
                self.count("commands that failed while a server was ended")
                self.say(f"failed while a server was ended: {' '.join(map(str, words))}: {said}")
            else:
                raise Defect(f"{' '.join(map(str, words))} gave {process.returncode}: {out}{err}")
            return None
        return subprocess.CompletedProcess(full, 0, out, err)

    # -- pace and samples --------------------------------------------------------

    def cpu_s(self):
        """Of the driver, the commands and the servers, as far as they live."""
        t = os.times()
        total = t.user + t.system + t.children_user + t.children_system
        for slot in self.slots:
            with contextlib.suppress(OSError, AttributeError):
                total += slot.server.cpu_s()
        return total

    def watch(self):
        """Once a second: holds the load to its share of a processor, and samples the servers."""
        last, last_at, sampled = self.cpu_s(), time.monotonic(), 0
        while not self.over.wait(1):
            now, at = self.cpu_s(), time.monotonic()
            used = max(0.0, now - last) / (at - last_at)
            last, last_at = now, at
            self.used_cores.append(used)
            # Half of the way each time: what is measured swings.
            aim = self.pause_s * min(4, max(0.25, used / self.load))
            self.pause_s = min(1.0, max(0.0005, (self.pause_s + aim) / 2))
            if at - sampled >= SAMPLE_S:
                sampled = at
                self.sample()

    def sample(self):
        folder = self.slots[0].server.store_folder
        if folder:
            taken = 0
            for path in [folder, *folder.rglob("*")]:
                with contextlib.suppress(FileNotFoundError):
                    taken += path.stat().st_blocks * 512
            self.store_mib.append(taken >> 20)
        for slot in self.slots:
            if slot.instances:
                slot.instances[-1].sample()
