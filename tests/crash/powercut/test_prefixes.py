"""The power goes at every point: each prefix of what a busy store wrote and synced.

A server under several loads is recorded as in test_powercut.py: two volumes, snapshots that
come and go, a store that is made during the recording or one whose space is used again, data
files that grow, holes that are punched, a log that goes round. Then, record by record of the
journal, folders are built as the disk could hold them if the power went right behind that
record (images.py): with all that was not synced, with none of it, with some writes of it,
with only the last ones, with single sectors; new names whose folder was not synced may be
gone. A program (opener.c) opens each as a server does and shows all volumes and snapshots:

 G1, G2, G3  each volume holds a prefix of its requests that reaches as far as was promised
             by the moment before the next record; each snapshot that was made is there, and
             holds a prefix with all that was answered before it was asked for;
 G5          nothing reads as an error; the store opens.

`make check` looks at some of the prefixes; CUTS=every goes through all of them, in all ways, for
every shape of load. ROUNDS=N: for the first N; OPS=N: N requests to the first volume (90).
"""

import hashlib
import os
import random
import shutil
import struct
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import images
from recording import EVERY, MIB, SHAPES, SMALL, quiet, under
from harness.fixtures import new_folder
from harness.history import Check, Violation, answered, flushed, keep_evidence
from harness.load import Background, Load, Shape, content
from harness.rawnbd import connect
from harness.server import SLOW, Server, cli, copy_store, program, wait_until

pytestmark = pytest.mark.lmdb("it cuts between a server and its files")

SIZES = {"v": 2 * MIB + 512, "w": MIB // 2}
PAGE = 4096
WAYS = ["all", "none", "changes", "suffix", "sectors"]
# Images in all; CUTS=every: as many as there are.
IMAGES = 400

# Writes of a multiple of what the log holds.
WRAP = ("wrap", Shape(0, connections=2, depth=4, ops=110, pace_us=8000, zeros=0.05, trims=0.1,
                      lengths=((4096, 2), (65536, 2), (600000, 3))), "100-4000")
BESIDE = Shape(0, connections=1, depth=2, ops=60, pace_us=15000, trims=0.1, lengths=SMALL)


def shape_of(shape, volume, ops):
    """A load as large as one that is opened after each of its writes may be."""
    lengths = tuple((min(n, SIZES[volume] // 3), weight) for n, weight in shape.lengths)
    return replace(shape, size=SIZES[volume], lengths=lengths, ops=min(shape.ops, ops))


@dataclass
class Snapshot:
    volume: str
    begun_ns: int
    made_ns: int = images.NEVER
    going_ns: int = images.NEVER
    gone_ns: int = images.NEVER


@dataclass
class Recording:
    """What was asked of a server, and the journal of what it did to its files."""
    root: Path
    trace: Path
    base: Path
    before: dict                    # volume -> bytes
    served_ns: int = 0              # from then on the volumes are there
    ops: dict = field(default_factory=dict)
    snapshots: dict = field(default_factory=dict)


def record(folder, shim, shape, sync_us, rng, fresh, ops):
    """Runs a server under loads. `fresh`: the store is made while it is watched."""
    root, base, trace = folder / "root", folder / "base", folder / "trace"
    root.mkdir(parents=True)
    store = root / "deep" / "store"
    server = Server(folder / "run", SIZES, ["--cache-size", "32M"], store=store, tcp=False)
    before = {name: bytes(size) for name, size in SIZES.items()}
    if not fresh:
        server.start()
        for name, size in SIZES.items():
            before[name] = content(1, 0, size)
            with connect(server, name) as c:
                for at in range(0, size, MIB):
                    c.write(at, before[name][at:at + MIB])
                c.flush()
        server.stop()
    copy_store(root, base)
    words = under(shim, root, trace, rng.randrange(1 << 30), sync_us)
    server.prefix = words
    r = Recording(root, trace, base, before, ops={name: [] for name in SIZES})

    def snapshot(what, name):
        cli(server.store, "snapshot", what, f"v@{name}", prefix=words)
        return time.monotonic_ns()

    server.start()
    r.served_ns = time.monotonic_ns()
    number = 2
    try:
        beside = Load(server, "w", shape_of(BESIDE, "w", BESIDE.ops), rng)
        with Background(beside, 90 * SLOW):
            for part, name in enumerate(("one", "two", None)):
                load = Load(server, "v", shape_of(shape, "v", ops // 3), rng, number)
                if name:
                    with Background(load, 90 * SLOW):
                        wait_until(lambda: len(load.ops) > ops // 6, 60 * SLOW, "half is sent",
                                   0.005)
                        made = r.snapshots[f"v@{name}"] = Snapshot("v", time.monotonic_ns())
                        made.made_ns = snapshot("create", name)
                        wait_until(lambda: len(load.ops) >= ops // 3, 60 * SLOW, "all is sent",
                                   0.005)
                else:
                    r.snapshots["v@one"].going_ns = time.monotonic_ns()
                    r.snapshots["v@one"].gone_ns = snapshot("remove", "one")
                    load.run(limit_s=90 * SLOW)
                number = load.number
                r.ops["v"] += load.sent()
                load.close()
        r.ops["w"] = beside.sent()
        beside.close()
        # What is done when nothing is asked for: commits, clearing, the reuse of the log.
        wait_until(quiet(trace, 1), 30 * SLOW, "the server comes to rest", 0.05)
    finally:
        server.kill()
    for name, sent in r.ops.items():
        errors = [op for op in sent if op.error]
        assert not errors, f"{name}: {errors[0]}\n{server.log_tail()}"
    images.check_complete(base, trace, root, rng, folder / "complete")
    shutil.rmtree(folder / "complete")
    return r


class Judge:
    """Says whether what a volume (or a snapshot) holds may be there. A verdict on one content
    holds until more is promised than it was known to have: the requests sent meanwhile may
    be missing from it, and so may those be that came after them."""

    def __init__(self, name, before, ops):
        self.name, self.before, self.ops = name, before, ops
        self.known = {}             # hash of a content -> what it was found to have
        self.checks = 0

    def judge(self, after, required, until_ns):
        key = hashlib.sha1(after).digest()
        if required <= self.known.get(key, frozenset((None,))):
            return
        self.checks += 1
        try:
            included = Check(self.before, self.ops, after, required, until_ns).run()
        except Violation as e:
            raise Violation(f"{self.name}: {e}") from None
        pieces = {}
        for unit in included:
            pieces[unit.op] = pieces.get(unit.op, 0) + unit.length
        self.known[key] = {op for op, n in pieces.items() if n == op.length} | required | {None}


class Opener:
    """The program that opens images, and what it last showed of each volume."""

    def __init__(self, folder):
        self.log = open(folder / "opener.log", "ab")
        path = Path(program()[-1]).parent / "tests" / "cut_opener"
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log)
        self.contents = {}

    def send(self, image, recover):
        self.process.stdin.write(f"{image}{' recover' if recover else ''}\n".encode())
        self.process.stdin.flush()

    def answer(self):
        """(name -> content of what is there, what went wrong)."""
        there, wrong = {}, []
        out = self.process.stdout
        while True:
            line = out.readline().decode()
            if line == "end\n":
                return there, wrong
            word, _, rest = line.rstrip("\n").partition(" ")
            if word != "volume":
                wrong.append(line.strip() or f"it ended with {self.process.wait(60)}")
                if not line:
                    return there, wrong
                continue
            name, size, n = rest.split()
            size = int(size)
            now = self.contents.setdefault(name, bytearray())
            now.extend(bytes(max(0, -(-size // PAGE) * PAGE - len(now))))
            for _ in range(int(n)):
                (page,) = struct.unpack("<Q", out.read(8))
                now[page * PAGE:(page + 1) * PAGE] = out.read(PAGE)
            there[name] = now[:size]

    def close(self):
        self.process.stdin.close()
        status = self.process.wait(60 * SLOW)
        self.process.stdout.close()
        self.log.close()
        return status


class Prefixes:
    """Goes through the prefixes of one recording."""

    def __init__(self, recording, folder, rng):
        self.r, self.folder, self.rng = recording, folder, rng
        self.disk = images.Disk(recording.base, recording.trace, recording.root)
        self.judges = {name: Judge(name, recording.before[name], ops)
                       for name, ops in recording.ops.items()}
        self.judges.update({name: Judge(name, recording.before[s.volume], recording.ops[s.volume])
                            for name, s in recording.snapshots.items()})
        self.opener = Opener(folder)
        self.under_way = None
        self.failures = []
        self.prefixes = self.images = 0

    def judge(self, there, wrong, promised_ns, until_ns):
        if wrong:
            raise Violation(f"{wrong[:4]}")
        r = self.r
        for name, ops in r.ops.items():
            if name in there:
                self.judges[name].judge(there[name], flushed(ops, promised_ns), until_ns)
            elif promised_ns >= r.served_ns:
                raise Violation(f"volume {name} is gone")
        for name, s in r.snapshots.items():
            if name in there:
                if s.gone_ns <= promised_ns or s.begun_ns > until_ns:
                    raise Violation(f"there is a snapshot {name}")
                # Asked for, and not answered when the power went, it may have been made afterwards.
                ops = r.ops[s.volume]
                promised = (answered(ops) if s.made_ns <= promised_ns
                            else flushed(ops, promised_ns))
                required = {op for op in promised if op.answered_ns < s.begun_ns}
                self.judges[name].judge(there[name], required, min(until_ns, s.made_ns))
            elif s.made_ns <= promised_ns and s.going_ns > until_ns:
                raise Violation(f"snapshot {name} is gone")
        others = set(there) - set(r.ops) - set(r.snapshots)
        if others:
            raise Violation(f"there are {others}")

    def settle(self):
        if not self.under_way:
            return
        image, what, promised_ns, until_ns = self.under_way
        self.under_way = None
        there, wrong = self.opener.answer()
        try:
            self.judge(there, wrong, promised_ns, until_ns)
        except Violation as e:
            kept = new_folder()
            shutil.copytree(image, kept / "image", symlinks=True)
            for path in (self.r.base, self.r.trace):
                subprocess.run(["cp", "-a", "--sparse=always", path, kept], check=True)
            for name, ops in self.r.ops.items():
                keep_evidence(kept / name, self.r.before[name], ops, there.get(name, b""))
            (kept / "why").write_text(f"{what}: {e}\n")
            self.failures.append(f"{what}: {e}\nkept: {kept}")
            if self.opener.process.poll() is not None:
                self.opener = Opener(self.folder)
        shutil.rmtree(image)

    def run(self, every, count):
        """All prefixes in all ways, or `count` images of some."""
        records = self.disk.records
        next_ns = [images.NEVER] * (len(records) + 1)
        for i in range(len(records) - 1, -1, -1):
            next_ns[i] = min(next_ns[i + 1], records[i].at_ns)
        chosen = None if every else set(self.rng.sample(range(len(records)),
                                                        min(count, len(records))))
        latest = 0
        for i in range(len(records)):
            latest = max(latest, self.disk.step().at_ns)
            if chosen is not None and i not in chosen:
                continue
            self.prefixes += 1
            promised_ns = next_ns[i + 1] - 1
            ways = WAYS
            if not self.disk.name_changes and not any(
                    f.pending for f in self.disk.names.values() if isinstance(f, images.File)):
                ways = ["all"]
            for way in ways if every else [self.rng.choice(ways)]:
                image = self.folder / f"image{self.images}"
                how = self.disk.build(image, self.rng, way)
                self.settle()
                store = image / "deep" / "store"
                self.opener.send(store, self.rng.random() < 0.5)
                self.images += 1
                if self.images % 500 == 0:
                    print(f"... {self.images} images, {self.prefixes} of {len(records)} prefixes",
                          flush=True)
                self.under_way = (image, f"behind record {i} of {len(records)} "
                                         f"({records[i].kind}), {way}: {how}",
                                  promised_ns, max(promised_ns, latest))
                if len(self.failures) >= 3:
                    return
        self.settle()

    def end(self):
        self.settle()
        status = self.opener.close()
        assert status == 0, (self.folder / "opener.log").read_text(errors="replace")[-4000:]


def look(shim, folder, rng, name, shape, sync_us, fresh, ops, count):
    recording = record(folder / "recording", shim, shape, sync_us, rng, fresh, ops)
    began = time.monotonic()
    prefixes = Prefixes(recording, folder, rng)
    try:
        prefixes.run(EVERY, count)
    finally:
        prefixes.end()
    took_s = time.monotonic() - began
    checks = sum(judge.checks for judge in prefixes.judges.values())
    print(f"{name}: {len(prefixes.disk.records)} records, {prefixes.prefixes} prefixes, "
          f"{prefixes.images} images, {checks} contents judged, {took_s:.0f} s, "
          f"{prefixes.images / took_s:.0f} images/s")
    assert not prefixes.failures, f"{name}:\n" + "\n\n".join(prefixes.failures)
    return prefixes


LOADS = [*SHAPES, WRAP]
ROUNDS = int(os.environ.get("ROUNDS", len(LOADS))) if EVERY else 2
OPS = int(os.environ.get("OPS", "90"))


@pytest.mark.limit(3000 if EVERY else 120)
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_prefixes(shim, fast_folder, seed, round_):
    """G1, G2, G3, G5 behind each record of a journal, for what is not synced in several ways."""
    rng = random.Random(f"{seed}:prefixes:{round_}")
    # Each run of the short form has two of the loads, one of them with a store that is new.
    name, shape, sync_us = LOADS[round_ if EVERY else (seed + round_) % len(LOADS)]
    prefixes = look(shim, fast_folder, rng, name, shape, sync_us, round_ % 2 == 0,
                    OPS, IMAGES // ROUNDS)
    if EVERY:
        assert prefixes.prefixes == len(prefixes.disk.records)
