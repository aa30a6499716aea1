"""What is measured, and in which surroundings.

A stage is a set of servers on volumes of one size, started and filled together, with its limit of
memory; its workloads are measured one after the other, each by all servers in turns. A profile
says which stages and workloads a run has, how often and how long.
"""

from dataclasses import dataclass, replace

from . import servers

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# So that the store is in it.
SUSTAINED_S = 60
EVERYBODY = tuple(servers.ALL)
# Over TCP and by fio: one of each kind.
FEW = ("fdb-nbd", "nbdkit-memory", "nbdkit-file", "qemu-nbd-raw", "nbd-server")


@dataclass(frozen=True)
class Stage:
    name: str
    size: int            # of each volume
    memory: int          # what each server may use of it, the page cache of its files included
    transport: str = "unix"
    who: tuple = EVERYBODY
    # One server after the other instead of all beside each other: for volumes of which the disk
    # holds no eight.
    alone: bool = False
    # Read once before anything is measured, so that what fits is in memory.
    read_once: bool = True

    @property
    def title(self):
        way = "TCP on the loopback interface" if self.transport == "tcp" else "Unix socket"
        return f"Volumes of {size_text(self.size)}, {size_text(self.memory)} of memory, {way}"

    @property
    def cache_size(self):
        """Ours: half, because the page cache of the store's files, its index and what is being
        written and sent need theirs."""
        return self.memory // 2


def size_text(size):
    return f"{size // GIB} GiB" if size % GIB == 0 else f"{size / MIB:g} MiB"


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    stage: str
    rw: str              # as fdb-nbd bench and fio name it
    block_size: int
    depth: int           # requests in flight on each connection
    connections: int = 1
    flush_every: int = 0
    client: str = "bench"
    seconds: float = 1.1
    # A bare loop on the disk that does the same takes part.
    bare: bool = False

    @property
    def writes(self):
        return self.rw not in ("read", "randread")

    @property
    def unit(self):
        """What is compared: requests of small blocks, bytes of large ones."""
        return "iops" if self.block_size < 64 * KIB else "mb_per_s"


STAGES = {s.name: s for s in (
    Stage("cached", 256 * MIB, GIB),
    Stage("tcp", 256 * MIB, GIB, "tcp", FEW),
    Stage("large", 2 * GIB, 512 * MIB, read_once=False),
    Stage("sustained-1g", GIB, GIB, read_once=False),
    Stage("sustained-8g", 8 * GIB, GIB, alone=True, read_once=False),
)}


def small(rw, name, stage="cached", **more):
    """4 KiB requests at the depths that are looked at."""
    for depth in (1, 32, 128):
        yield Workload(f"{name}-d{depth}", f"4 KiB {name_of(rw)}, depth {depth}", stage, rw,
                       4 * KIB, depth, **more)


def name_of(rw):
    return {"randread": "random read", "randwrite": "random write", "read": "sequential read",
            "write": "sequential write", "randrw": "random, 70% reads"}[rw]


def sequential(rw):
    for short, block_size, depth in (("64k", 64 * KIB, 16), ("128k", 128 * KIB, 16),
                                     ("1m", MIB, 8)):
        size = f"{block_size // KIB} KiB" if block_size < MIB else "1 MiB"
        yield Workload(f"{rw}-{short}", f"{size} {name_of(rw)}, depth {depth}", "cached", rw,
                       block_size, depth)


WORKLOADS = {w.name: w for w in (
    # Reads first: they find the volumes as they were filled.
    *small("randread", "randread"),
    Workload("randread-4c", "4 KiB random read, depth 32, 4 connections", "cached", "randread",
             4 * KIB, 32, 4),
    Workload("randread-16c", "4 KiB random read, depth 32, 16 connections", "cached", "randread",
             4 * KIB, 32, 16),
    *sequential("read"),
    *(replace(w, name=f"fio-{w.name}", title=w.title + " (fio)", client="fio")
      for w in small("randread", "randread") if w.depth < 128),
    *small("randwrite", "randwrite"),
    Workload("randwrite-4c", "4 KiB random write, depth 32, 4 connections", "cached", "randwrite",
             4 * KIB, 32, 4),
    Workload("randwrite-16c", "4 KiB random write, depth 32, 16 connections", "cached",
             "randwrite", 4 * KIB, 32, 16),
    Workload("mixed-d32", "4 KiB random, 70% reads, depth 32", "cached", "randrw", 4 * KIB, 32),
    Workload("flush", "4 KiB random write and FLUSH, depth 1", "cached", "randwrite", 4 * KIB, 1,
             flush_every=1, bare=True),
    Workload("flush-16c", "4 KiB random write and FLUSH, 16 connections", "cached", "randwrite",
             4 * KIB, 1, 16, flush_every=1),
    *sequential("write"),
    Workload("fio-randwrite-d32", "4 KiB random write, depth 32 (fio)", "cached", "randwrite",
             4 * KIB, 32, client="fio"),
    Workload("fio-flush", "4 KiB random write and FLUSH, depth 1 (fio)", "cached", "randwrite",
             4 * KIB, 1, flush_every=1, client="fio"),

    Workload("tcp-randread-d1", "4 KiB random read, depth 1, TCP", "tcp", "randread", 4 * KIB, 1),
    Workload("tcp-randread-d32", "4 KiB random read, depth 32, TCP", "tcp", "randread", 4 * KIB,
             32),
    Workload("tcp-read-1m", "1 MiB sequential read, depth 8, TCP", "tcp", "read", MIB, 8),
    Workload("tcp-randwrite-d32", "4 KiB random write, depth 32, TCP", "tcp", "randwrite", 4 * KIB,
             32),

    Workload("cold-randread-d32", "4 KiB random read, depth 32, data larger than memory", "large",
             "randread", 4 * KIB, 32, seconds=3),
    Workload("cold-randread-d1", "4 KiB random read, depth 1, data larger than memory", "large",
             "randread", 4 * KIB, 1, seconds=2),
    Workload("cold-read-1m", "1 MiB sequential read, depth 8, data larger than memory", "large",
             "read", MIB, 8, seconds=2),
    Workload("large-write-1m", "1 MiB sequential write, depth 8, past the cache", "large", "write",
             MIB, 8, seconds=6),

    Workload("sustained-1g", "4 KiB random write, depth 32, over 1 GiB", "sustained-1g",
             "randwrite", 4 * KIB, 32, seconds=SUSTAINED_S),
    Workload("sustained-8g", "4 KiB random write, depth 32, over 8 GiB", "sustained-8g",
             "randwrite", 4 * KIB, 32, seconds=SUSTAINED_S),
)}


@dataclass(frozen=True)
class Profile:
    name: str
    workloads: tuple
    rounds: int
    # Of sustained workloads, which take a minute each.
    sustained_rounds: int
    seconds_max: float = SUSTAINED_S
    who: tuple = EVERYBODY


QUICK = ("randread-d1", "randread-d32", "read-1m", "randwrite-d32", "flush", "flush-16c",
         "write-1m", "fio-randread-d32", "tcp-randread-d32", "cold-randread-d32", "large-write-1m",
         "sustained-1g")
SUSTAINED = tuple(w for w in WORKLOADS if w.startswith("sustained"))

PROFILES = {p.name: p for p in (
    Profile("full", tuple(WORKLOADS), 3, 1),
    Profile("quick", QUICK, 2, 1, seconds_max=10),
    Profile("sustained", SUSTAINED, 3, 2),
)}


def profile_of(words):
    """A profile by its name, or one of the named workloads; raises ValueError."""
    if len(words) == 1 and words[0] in PROFILES:
        return PROFILES[words[0]]
    unknown = [w for w in words if w not in WORKLOADS]
    if unknown or not words:
        raise ValueError(f"no profile and no workload: {' '.join(unknown)}")
    full = PROFILES["full"]
    return replace(full, name="selected", workloads=tuple(words))


def stages_of(profile):
    """(stage, its workloads of the profile), in the order they are measured."""
    for stage in STAGES.values():
        chosen = [w for w in WORKLOADS.values() if w.stage == stage.name and
                  w.name in profile.workloads]
        if chosen:
            yield stage, chosen
