"""Which faults are tried, and what is judged to begin from: shared by the tests of this folder.

FAULTS  how many places of each kind of call, file and way to fail (all: 3); without it a sample of
        all cases, drawn by the seed, is run
FAULTS_PART  "2/5": the second fifth of them
"""

import os
import random
import shutil
from collections import Counter

import inject
from harness.history import check_death
from harness.load import Load, Shape, content
from harness.rawnbd import connect
from harness.server import SLOW, Server, copy_store
from inject import Fault

MIB = 1 << 20
SIZE = 8 * MIB + 512
ALL = os.environ.get("FAULTS", "")
PLACES = 3 if ALL == "all" else int(ALL or 1)
PART = os.environ.get("FAULTS_PART", "1/1")
SHAPE = Shape(SIZE, connections=3, depth=4, ops=150, pace_us=2000, flush_every=0.1, zeros=0.12,
              trims=0.1, lengths=((512, 6), (4096, 8), (16384, 6), (65536, 3), (300000, 1)))



def read_all(server, limit_s=60):
    with connect(server, "v", structured=True, timeout_s=limit_s * SLOW) as c:
        return c.read_all()


def start_plain(folder, store):
    return Server(folder, store=store, tcp=False, args=["--cache-size", "32M"]).start()


def load_alone(server):
    load = Load(server, "v", SHAPE, random.Random(5), 2)
    load.run(limit_s=60 * SLOW)
    load.close()


class Base:
    """Stores to begin from: one that was left in good order, and one whose server was killed
    with writes in its log; what is on their volumes; which calls are made on them."""

    def __init__(self, folder, shim):
        self.folder, self.shim = folder, shim
        folder.mkdir()
        self.clean, self.killed = folder / "clean", folder / "killed"
        rng = random.Random(7)
        server = Server(folder / "s", {"v": SIZE}, ["--cache-size", "32M"], store=self.clean,
                        tcp=False).start()
        with connect(server, "v") as c:
            for at in range(0, SIZE, MIB):
                c.write(at, content(1, at, min(at + MIB, SIZE)))
            c.flush()
            self.clean_bytes = bytes(c.read_all())
        server.stop()
        copy_store(self.clean, self.killed)
        # Little, so that nothing is committed before the kill.
        server = start_plain(folder / "k", self.killed)
        load = Load(server, "v", Shape(SIZE, ops=40, lengths=((512, 1), (4096, 2), (16384, 1))),
                    rng, 2)
        load.run()
        server.kill()
        load.drain()
        load.close()
        assert any(op.answered_ns for op in load.ops)
        probe = copy_store(self.killed, folder / "probe")
        server = start_plain(folder / "p", probe)
        self.killed_bytes = bytes(read_all(server))
        assert "replayed" in server.log()
        check_death(self.clean_bytes, load.sent(), self.killed_bytes)
        server.kill()
        self.counts_open = self._count(self.killed, None)
        self.counts_read = self._count(self.clean, read_all)
        self.counts_load = self._count(self.clean, load_alone)

    def _count(self, store, what):
        """The calls that are made at the start, or by what is done then."""
        store = copy_store(store, self.folder / "count")
        with inject.controlled(self.folder / "control") as control:
            server = Server(self.folder / "c", store=store, tcp=False, args=["--cache-size", "32M"],
                            prefix=inject.words(self.shim, store, control))
            server.start()
            counts = control.counts()
            if what:
                what(server)
                counts = inject.since(control.counts(), counts)
            server.kill()
        return counts


def cases(counts, rng, places=PLACES):
    """[Fault...]: every kind and file and way, at some of the places."""
    out = []
    for (kind, file), n in sorted(counts.items()):
        for how in inject.hows_for(kind):
            for always in (False, True):
                for _ in range(places):
                    # Not the very last: another run may make fewer.
                    nth = 1 + rng.randrange(max(1, n * 3 // 4))
                    out.append(Fault(kind, file, how, nth, always))
    # EINTR for ever is no disk's way.
    return [c for c in out if not (c.how == "EINTR" and c.always)]


def chosen(all_cases, rng, sample):
    if not ALL:
        # Of each kind and file at least one, as far as the sample goes.
        rng.shuffle(all_cases)
        seen, first, rest = set(), [], []
        for c in all_cases:
            (rest if (c.kind, c.file) in seen else first).append(c)
            seen.add((c.kind, c.file))
        return (first + rest)[:sample]
    part, parts = map(int, PART.split("/"))
    return all_cases[part - 1::parts]


def run_cases(what, base, folder, seed, picked, judge):
    outcomes, by_kind, failures = Counter(), Counter(), []
    for i, fault in enumerate(picked):
        rng = random.Random(f"{seed}:{what}:{fault}")
        place = folder / f"{what}{i}"
        place.mkdir()
        try:
            outcome = judge(base, place, fault, rng)
            outcomes[outcome] += 1
            by_kind[fault.kind] += outcome != "not reached"
        except Exception as e:
            log = "".join(p.read_text(errors="replace")[-1500:]
                          for p in sorted(place.glob("*/server.log")))
            failures.append(f"{fault}\n{type(e).__name__}: {e}\n{log}")
        shutil.rmtree(place, ignore_errors=True)
        if len(failures) >= (1000 if ALL else 5):
            break
    print(f"{what}: {len(picked)} faults, "
          + ", ".join(f"{n} {word}" for word, n in outcomes.most_common())
          + "; by kind: " + ", ".join(f"{k} {n}" for k, n in by_kind.most_common()))
    assert not failures, f"{len(failures)} of {len(picked)}:\n" + "\n\n".join(failures)
