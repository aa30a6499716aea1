#!/usr/bin/python3
"""How fast the server is on FoundationDB, beside what FoundationDB itself gives.

  fdb.py compare   in one run: (a) a bare loop on FoundationDB's client library (fdb_bare.c), the
                   best of 1 to 8 MB in flight; (b) the simplest design (simple_design.py); and
                   the server: 128 KiB requests, 32 in flight, incompressible
  fdb.py blocks    block sizes and codecs against each other: what docs/benchmarks.md shows

Each run starts a cluster of one process in a temporary folder. What is compared is measured in
turns of a few seconds, in another order each round, so that what else goes on in the machine
meets all alike; a figure is the median of the rounds, and a ratio the median of the ratios within
a round. Before each turn the cluster may catch up with what it has taken in, because it takes more
for some seconds than it can for long, and what other programs used meanwhile is noted; a turn
in which that was much is repeated.

CPU times are of processes and so hardly depend on what else the machine does: where the rates are
noisy, ms of CPU for each MB tell more.

Build first: ninja -C build fdb-nbd tests/fdb_bare. --folder /dev/shm puts the
cluster's files into memory, which shows the programs instead of the disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from harness.cluster import Cluster  # noqa: E402
from harness.server import Server, cli, program  # noqa: E402
from harness.waiting import wait_until  # noqa: E402

MIB = 1 << 20
SETTLE_LIMIT_S = 120
SETTLED_BYTES = 64 * MIB
QUIET_LIMIT_S = 5
PACKS_PERCENT = 67  # what "3 : 1" means


def tool(name):
    return str(Path(os.environ.get("BUILD", HERE.parent / "build")) / "tests" / name)


def cpu_s(pid):
    """What all threads of a process used until now."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_s():
    """What everybody used."""
    with open("/proc/stat") as f:
        user, nice, system, _idle, _wait, irq, soft, stolen = map(int, f.readline().split()[1:9])
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


class World:
    """A cluster, and what talks to it."""

    def __init__(self, options):
        self.options = options
        if options.folder:
            tempfile.tempdir = options.folder
        self.cluster = Cluster(1, options.engine)
        self.folder = Path(tempfile.mkdtemp(prefix="fdbnbd-bench-", dir="/tmp"))
        self.processes = []

    def __enter__(self):
        self.cluster.start()
        return self

    def __exit__(self, *unused):
        for p in self.processes:
            p.kill()
            p.wait()
        self.cluster.end()
        subprocess.run(["rm", "-rf", str(self.folder)], check=True)

    @staticmethod
    def spilled(rates):
        """Whether the last rates are well above those before, after a decline."""
        return len(rates) > 12 and min(rates[-2:]) > 1.7 * statistics.median(rates[-12:-2])

    def warm_up(self):
        """A new cluster takes in less and less until its log, of which it keeps the first 1.5 GB
        in memory, has been brought to disk for the first time: some minutes."""
        until, rates = time.monotonic() + self.options.warm, []
        while time.monotonic() < until and not self.spilled(rates):
            out = self.bare("write", name="warm", inflight=4, seconds=1, keys=16384)
            rates.append(out["mb_per_s"])
            self.settle()
        if rates:
            say("warming up, MB/s: " + " ".join(f"{r:.0f}" for r in rates))

    @property
    def fdbserver(self):
        return self.cluster.processes[0].pid

    def store(self):
        return self.cluster.uri("bench")

    def env(self):
        return self.cluster.client_env()

    def settle(self):
        """Waits until the cluster has brought to disk what it took in."""
        def settled():
            told = self.cluster.status().get("cluster", {}).get("processes", {}).values()
            roles = [r for p in told for r in p["roles"] if r["role"] == "storage"]
            return roles and all(r["input_bytes"]["counter"] - r["durable_bytes"]["counter"] <
                                 SETTLED_BYTES for r in roles)
        try:
            wait_until(settled, SETTLE_LIMIT_S, "the cluster has caught up", 0.5)
        except AssertionError as e:
            # What was measured so far shall not be lost for it.
            say(f"{e}; going on")

    def run(self, words, pids=None):
        """The JSON line of a program, and the CPU that it and `pids` took meanwhile."""
        pids = {"fdbserver": self.fdbserver, **(pids or {})}
        before, all_before = {name: cpu_s(pid) for name, pid in pids.items()}, machine_cpu_s()
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True,
                              env=dict(os.environ, **self.env()))
        if done.returncode != 0:
            raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
        used = machine_cpu_s() - all_before
        out = json.loads(done.stdout)
        if "client_cpu_us_per_request" in out:
            out["bytes"] = out["requests"] * out["block_size"]
            out["cpu_s"] = out["client_cpu_us_per_request"] * out["requests"] / 1e6
        out["cpu"] = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
        out["cpu"]["client"] = out["cpu_s"]
        out["others"] = max(0, used - sum(out["cpu"].values())) / out["seconds"]
        return out

    def quietly(self, turn):
        """turn(), when the machine has nothing else to do, as far as that can be had."""
        limit = self.options.others
        for attempt in range(self.options.tries):
            self.settle()
            until = time.monotonic() + QUIET_LIMIT_S
            while time.monotonic() < until:
                used, ours = machine_cpu_s(), cpu_s(self.fdbserver)
                time.sleep(0.5)
                if machine_cpu_s() - used - (cpu_s(self.fdbserver) - ours) < limit * 0.5:
                    break
            out = turn()
            if not attempt or out["others"] < best["others"]:
                best = out
            if best["others"] < limit:
                break
        return best

    def bare(self, kind, **words):
        return self.run([tool("fdb_bare"), kind, f"cluster={self.cluster.file}", "keep=1",
                         *(f"{k}={v}" for k, v in words.items())])

    def load(self, socket, export, kind, random, pid, **options):
        """Options of `fdb-nbd bench`, with _ for -."""
        words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
        return self.run([*program(), "--json", "bench", f"nbd+unix:///{export}?socket={socket}",
                         "--workload", f"{'rand' if random else ''}{kind}", "--overwrite", *words],
                        {"server": pid})

    def server(self, args=()):
        return Server(self.folder, args=args, store=self.store(), env=self.env(), tcp=False)

    def simple(self, size):
        path = self.folder / "simple"
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "/usr/bin/python3",
             str(HERE / "simple_design.py"), str(path), str(size), str(self.cluster.file)],
            env=dict(os.environ, LIBFDB_C=self.cluster.programs.client))
        self.processes.append(process)
        wait_until(path.exists, 20, "the simple server listens")
        return str(path), process.pid


def ms_per_mb(out, name):
    return out["cpu"].get(name, 0) * 1e3 / max(out["bytes"] / 1e6, 1e-9)


def say(*words):
    print(*words, flush=True)


def describe_machine(world):
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                if line.startswith("model name")), "?")
    said = subprocess.run([world.cluster.programs.server, "--version"], capture_output=True,
                          text=True).stdout.splitlines()[0]
    say(f"{os.cpu_count()} x {cpu}, Linux {os.uname().release}; {said}, one process, engine "
        f"{world.cluster.engine}, files in {world.cluster.folder.parent}; load "
        f"{os.getloadavg()[0]:.1f}")


# --- compare ---------------------------------------------------------------------------------


class Compare:
    def __init__(self, world, options):
        self.world, self.o = world, options
        self.results = {}   # mode -> participant -> [out of each round]
        self.best = {}      # mode -> the bare loops that are worth another round
        # Reads of the simple design stay in what was written of it.
        self.simple_size = min(options.size, 96 * MIB)

    def prepare(self):
        o, w = self.o, self.world
        cli(w.store(), "create", "v", o.size, "--block-size", o.block_size, "--compression",
            o.compression, env=w.env())
        # Not the cache is to be measured.
        self.server = w.server(["--cache-size", "32M"]).start()
        self.simple, self.simple_pid = w.simple(self.simple_size)
        say("filling ...")
        self.fill(lambda at, n: self.ours("write", 0, start=at, size=n, bytes=n, time=1000), o.size)
        self.fill(lambda at, n: self.simply("write", 0, start=at, size=n, bytes=n, time=1000),
                  self.simple_size)
        self.fill(lambda at, n: self.bare("write", 0, inflight=2, seconds=1000, bytes=n), o.size)

    def fill(self, write, size):
        """In pieces that the cluster takes in without trouble."""
        done = 0
        while done < size:
            n = min(128 * MIB, size - done)
            write(done, n)
            done += n
            self.world.settle()

    def bare(self, kind, random, inflight, **words):
        o = self.o
        return self.world.bare(kind, value=o.block_size, request=o.request, random=random,
                               keys=o.size // o.block_size, inflight=inflight,
                               **{"seconds": o.seconds, **words})

    def _load(self, socket, export, pid, kind, random, **options):
        o = self.o
        return self.world.load(socket, export, kind, random, pid, depth=o.depth,
                               block_size=o.request, **{"time": o.seconds, **options})

    def ours(self, kind, random, **options):
        return self._load(self.server.socket_path, "v", self.server.pid, kind, random,
                          **{"size": self.o.size, **options})

    def simply(self, kind, random, **options):
        return self._load(self.simple, "example", self.simple_pid, kind, random,
                          **{"size": self.simple_size, **options})

    def participants(self, mode):
        kind, random = mode
        kinds = ["write"] if kind == "write" else ["gets", "ranges"]
        bare = self.best.get(mode) or [(k, n) for k in kinds for n in self.o.inflight]
        found = [(f"{k} {n}", lambda k=k, n=n: self.bare(k, random, n)) for k, n in bare]
        return [*found, ("ours", lambda: self.ours(kind, random)),
                ("simple", lambda: self.simply(kind, random))]

    def round(self, number, mode):
        turns = self.participants(mode)
        # Another order each time.
        turns = turns[::-1] if number % 2 else turns
        results = self.results.setdefault(mode, [])
        this = {}
        for name, turn in turns:
            this[name] = self.world.quietly(turn)
        results.append(this)
        bare = sorted((n for n in this if n not in ("ours", "simple")),
                      key=lambda n: -this[n]["mb_per_s"])
        if mode not in self.best:
            self.best[mode] = [(n.split()[0], int(n.split()[1])) for n in bare[:3]]
        say(f"round {number + 1} {mode[0]} {'random' if mode[1] else 'sequential'}: "
            + ", ".join(f"{n} {this[n]['mb_per_s']:.0f}" for n in [*bare, "ours", "simple"])
            + f" MB/s; others {max(o['others'] for o in this.values()):.1f} cores")

    @staticmethod
    def best_bare(rounds):
        """The one of the bare loops that was in all rounds and has the best median. Not the best
        of each round, which would be the luckiest where the machine is noisy."""
        names = set.intersection(*(set(this) for this in rounds)) - {"ours", "simple"}
        return max(names, key=lambda n: statistics.median(this[n]["mb_per_s"] for this in rounds))

    def table(self):
        say("\nMB/s (ms of CPU for each MB: server or loop, fdbserver, load)\n")
        say("| | bare loop | server | simple design | server / bare | server / simple |")
        say("|---|---|---|---|---|---|")
        for mode, rounds in self.results.items():
            cells, bare = [], self.best_bare(rounds)
            for who in ("bare", "ours", "simple"):
                outs = [this[bare if who == "bare" else who] for this in rounds]

                def median(of, outs=outs):
                    return statistics.median(of(out) for out in outs)
                server = median(lambda out: ms_per_mb(out, "client" if who == "bare" else "server"))
                cells.append(
                    f"{median(lambda out: out['mb_per_s']):.0f} ({server:.1f}, "
                    f"{median(lambda out: ms_per_mb(out, 'fdbserver')):.1f}"
                    + (f"; {bare}" if who == "bare" else f", {median(lambda o: ms_per_mb(o, 'client')):.1f}")
                    + ")")
            for other in ("bare", "simple"):
                ratios = [this["ours"]["mb_per_s"] /
                          this[bare if other == "bare" else other]["mb_per_s"] for this in rounds]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                             f"{max(ratios):.2f})")
            say(f"| {mode[0]} {'random' if mode[1] else 'sequential'} | " + " | ".join(cells)
                + " |")

    def run(self):
        modes = [(kind, random) for kind in self.o.kinds for random in self.o.random]
        self.prepare()
        for number in range(self.o.rounds):
            for mode in modes:
                self.round(number, mode)
        self.server.stop()
        self.table()


# --- blocks ----------------------------------------------------------------------------------


class Blocks:
    """Volumes of each block size and codec, served one after the other."""

    WORKS = [("write", 1, 4096), ("write", 0, 4096), ("write", 1, 131072), ("write", 0, 131072),
             ("read", 1, 4096), ("read", 0, 4096), ("read", 1, 131072), ("read", 0, 131072)]

    def __init__(self, world, options):
        self.world, self.o = world, options
        self.results = {}   # (codec, packs, block size) -> work -> [out of each round]

    def name(self, codec, packs, size):
        return f"{codec}-{'packs' if packs else 'noise'}-{size // 1024}k"

    def kinds(self):
        return [(codec, packs, size) for codec, packs in self.columns()
                for size in self.o.block_sizes]

    def columns(self):
        # What is not compressed costs the same whatever it is.
        return [(c, p) for c in self.o.codecs for p in self.o.packs if c != "none" or not p]

    def prepare(self):
        o, w = self.o, self.world
        for codec, packs, size in self.kinds():
            name = self.name(codec, packs, size)
            cli(w.store(), "create", name, o.size, "--block-size", size, "--compression", codec,
                env=w.env())
        with w.server(["--cache-size", "32M"]) as server:
            for codec, packs, size in self.kinds():
                w.load(server.socket_path, self.name(codec, packs, size), "write", 0, server.pid,
                       block_size=131072, time=1000, bytes=o.size,
                       compressible=PACKS_PERCENT if packs else 0)
                w.settle()

    def work(self, server, kind, work):
        codec, packs, size = kind
        what, random, request = work
        out = self.world.quietly(lambda: self.world.load(
            server.socket_path, self.name(*kind), what, random, server.pid, block_size=request,
            compressible=PACKS_PERCENT if packs else 0, time=self.o.seconds))
        self.results.setdefault(kind, {}).setdefault(work, []).append(out)

    def round(self, number):
        for work in self.o.works:
            # What a volume's reads leave in the cache is not to be read again.
            with self.world.server(["--cache-size", "32M"]) as server:
                kinds = self.kinds()
                for kind in kinds[::-1] if number % 2 else kinds:
                    self.work(server, kind, work)
            say(f"round {number + 1}, {self.title(work)}: " + ", ".join(
                f"{self.name(*k)} {self.results[k][work][-1]['mb_per_s']:.1f}"
                for k in self.kinds()) + " MB/s; others " + format(max(
                    self.results[k][work][-1]["others"] for k in self.kinds()), ".1f") + " cores")

    @staticmethod
    def title(work):
        return (f"{'random' if work[1] else 'sequential'} {work[0]} "
                f"{work[2] // 1024} KiB")

    def table(self):
        for work in self.o.works:
            small = work[2] < 65536
            say(f"\n### {self.title(work)}\n")
            say(f"{'requests/s' if small else 'MB/s'} (CPU µs for each request: server, "
                "fdbserver)\n")
            columns = self.columns()
            say("| block | " + " | ".join(f"{c}, {'3 : 1' if p else 'noise'}"
                                          for c, p in columns) + " |")
            say("|---" * (len(columns) + 1) + "|")
            for size in self.o.block_sizes:
                cells = []
                for codec, packs in columns:
                    outs = self.results[codec, packs, size][work]
                    rate = statistics.median(
                        o["iops" if small else "mb_per_s"] for o in outs)
                    cpus = [statistics.median(1e6 * o["cpu"][p] / max(o["requests"], 1)
                                              for o in outs) for p in ("server", "fdbserver")]
                    cells.append(f"{rate:.0f} ({cpus[0]:.0f}, {cpus[1]:.0f})")
                say(f"| {size // 1024}K | " + " | ".join(cells) + " |")

    def run(self):
        self.prepare()
        for number in range(self.o.rounds):
            self.round(number)
        self.table()


def size_of(text):
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


def listed(of):
    return lambda text: [of(word) for word in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("compare", "blocks"):
        p = commands.add_parser(name)
        p.add_argument("--engine", choices=("ssd", "memory"), default="ssd")
        p.add_argument("--folder", help="where the cluster's files are (the temporary folder)")
        p.add_argument("--rounds", type=int, default=3)
        p.add_argument("--seconds", type=float, default=2)
        p.add_argument("--warm", type=int, default=300,
                       help="seconds of writing at most before anything is measured (%(default)s)")
        p.add_argument("--others", type=float, default=0.4,
                       help="cores that other programs may use during a measurement (%(default)s)")
        p.add_argument("--tries", type=int, default=3, help="until that is so (%(default)s)")
        p.add_argument("--json", help="write all figures there")
        p.add_argument("--size", type=size_of, default=size_of("1G" if name == "compare"
                                                               else "192M"))
    c = commands.choices["compare"]
    c.add_argument("--block-size", type=size_of, default=16384)
    c.add_argument("--compression", default="lz4")
    c.add_argument("--request", type=size_of, default=131072)
    c.add_argument("--depth", type=int, default=32)
    c.add_argument("--inflight", type=listed(int), default=list(range(1, 9)))
    c.add_argument("--kinds", type=listed(str), default=["write", "read"])
    c.add_argument("--random", type=listed(int), default=[0, 1])
    b = commands.choices["blocks"]
    b.add_argument("--block-sizes", type=listed(size_of),
                   default=[4096, 8192, 16384, 32768, 65536])
    b.add_argument("--codecs", type=listed(str), default=["lz4", "none"])
    b.add_argument("--packs", type=listed(int), default=[1, 0])
    b.add_argument("--works", type=listed(int), default=list(range(len(Blocks.WORKS))),
                   help="numbers of " + ", ".join(
                       f"{i} {Blocks.title(w)}" for i, w in enumerate(Blocks.WORKS)))
    options = parser.parse_args()
    if options.command == "blocks":
        options.works = [Blocks.WORKS[i] for i in options.works]
    with World(options) as world:
        describe_machine(world)
        world.warm_up()
        what = (Compare if options.command == "compare" else Blocks)(world, options)
        what.run()
        if options.json:
            Path(options.json).write_text(json.dumps(
                [[str(k), v if isinstance(v, list) else [[str(w), o] for w, o in v.items()]]
                 for k, v in what.results.items()]))


if __name__ == "__main__":
    main()
