"""The power goes: what the server never synced may be lost, in any part and any order.

A server runs under a write load with powercut.c between it and its files. From the
journal of that run, folders are built as the disk could hold them after a cut at
many moments (images.py), a server is started on each, and the volume is read:

 G1  every write whose FLUSH was answered before the cut, and every answered FUA
     write, is there;
 G2  what is there is the effect of a first part of the requests, in the order taken;
 G3  each request is there whole or not at all;
 G5  nothing reads as EIO: a cut is no damage.

Some cuts are followed by another one, during the recovery from the first; after
others the volume is written again, flushed, and its server killed.

CUTS (default 300) in all; test_prefixes.py goes through every prefix instead. --seed replays
the choices; the timing of a run it cannot replay, so a failing image is kept, and its path is
printed.
"""

import os
import random
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import images
from recording import CUTS, MIB, SHAPES, SIZE, quiet, under
from harness.fixtures import new_folder
from harness.history import check_cut, flushed, keep_evidence
from harness.load import FLUSH, WRITE, Load, Op, content
from harness.rawnbd import FLAG_FUA, connect
from harness.server import SLOW, Server, copy_store, wait_until

pytestmark = pytest.mark.lmdb("it cuts between a server and its files")


class Run:
    """One load under the shim: the volume before, the requests, the journal."""

    def __init__(self, folder, shim, shape, sync_us, rng):
        self.store, self.base, self.trace = folder / "store", folder / "base", folder / "trace"
        server = Server(folder / "run", {"v": SIZE}, store=self.store, tcp=False)
        server.start()
        with connect(server, "v") as c:
            for at in range(0, SIZE, MIB):
                c.write(at, content(1, at, min(at + MIB, SIZE)))
            c.flush()
            self.before = c.read_all()
        server.stop()
        copy_store(self.store, self.base)
        server.prefix = under(shim, self.store, self.trace, rng.randrange(1 << 30), sync_us)
        server.start()
        try:
            self.ops, number = [], 2
            # Two loads with a rest between: what is done when nothing is asked for
            # (commits, the reuse of the log) has its cuts too.
            for part in (0.6, 0.4):
                load = Load(server, "v", replace(shape, ops=int(shape.ops * part)), rng, number)
                load.run(limit_s=90 * SLOW)
                load.close()
                number = load.number
                self.ops += load.sent()
                wait_until(quiet(self.trace, 1), 30 * SLOW, "the server comes to rest", 0.05)
        finally:
            server.kill()
        errors = [op for op in self.ops if op.error]
        assert not errors, f"{errors[0]}\n{server.log_tail()}"
        images.check_complete(self.base, self.trace, self.store, rng, folder / "complete")
        shutil.rmtree(folder / "complete")

    def cut_times(self, rng, count):
        """Just after answers that promise durability, around syncs and writes, anywhere."""
        records = images.read_trace(self.trace)
        first, last = records[0].begun_ns, max(r.ended_ns for r in records)
        promised = [op.answered_ns for op in self.ops
                    if op.answered_ns and (op.fua or op.kind == FLUSH)]
        syncs = [r.at_ns for r in records if r.kind in (images.SYNC, images.DONE)]
        near = [t for r in records for t in (r.begun_ns, r.ended_ns)]
        out = []
        for _ in range(count):
            x = rng.random()
            if x < 0.3 and promised:
                out.append(rng.choice(promised))
            elif x < 0.55 and syncs:
                out.append(rng.choice(syncs) + rng.choice([-1, 0, 1, 50_000]))
            elif x < 0.8:
                out.append(rng.choice(near) + rng.choice([-1, 0, 1]))
            else:
                out.append(rng.randrange(first, last))
        return sorted(out)


def read_volume(folder, store):
    """Starts a server on the store, reads the whole volume, and kills the server."""
    server = Server(folder, store=store, tcp=False).start()
    try:
        with connect(server, "v", structured=True, timeout_s=60 * SLOW) as c:
            assert c.export.size == SIZE
            return c.read_all()
    finally:
        server.kill()


def judge(run, shim, image, folder, time_ns, seed):
    """Everything one cut is asked. In a thread of its own."""
    rng = random.Random(seed)
    told = ""
    x = rng.random()
    if x < 0.2:
        # A second cut, while the server recovers from the first or soon after.
        trace = folder / "trace"
        copy_store(image, folder / "base")
        server = Server(folder / "first", store=image, tcp=False,
                        prefix=under(shim, image, trace, rng.randrange(1 << 30), "50-1000"))
        server.start()
        if rng.random() < 0.5:
            with connect(server, "v") as c:
                c.read(0, MIB)
                c.flush()
        server.kill()
        disk = images.Disk(folder / "base", trace, image)
        if disk.records:
            times = [r.at_ns for r in disk.records]
            disk.advance(rng.choice(times) + rng.choice([-1, 0, 1]))
            told = "; then " + disk.build(folder / "second", rng)
            image = folder / "second"
    after = read_volume(folder / "s", image)
    check_cut(run.before, run.ops, after, time_ns)
    if 0.2 <= x < 0.35:
        # Life goes on: what is written now is not lost either, nor what was there.
        server = Server(folder / "next", store=image, tcp=False).start()
        with connect(server, "v") as c:
            for i in range(5):
                at = rng.randrange(SIZE - 100000)
                data = content(1_000_000 + i, at, at + rng.randrange(1, 100000))
                c.write(at, data)
                after[at:at + len(data)] = data
            c.flush()
        server.kill()
        assert read_volume(folder / "again", image) == after, \
            "written after the recovery, and lost by kill -9"
    return told


ROUNDS = max(1, min(len(SHAPES), CUTS // 20)) if CUTS < 500 else CUTS // 100


@pytest.mark.limit(240)
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_cuts(shim, fast_folder, seed, round_):
    """G1, G2, G3, G5 after each of many cuts of one run."""
    rng = random.Random(f"{seed}:powercut:{round_}")
    name, shape, sync_us = SHAPES[round_ % len(SHAPES)]
    run = Run(fast_folder / "run", shim, shape, sync_us, rng)
    count = max(1, CUTS // ROUNDS)
    disk = images.Disk(run.base, run.trace, run.store)
    waiting, failures = [], []
    judged = demanding = 0

    def settle(limit):
        nonlocal judged
        while len(waiting) > limit:
            future, what, folder, image = waiting.pop(0)
            try:
                future.result()
                judged += 1
            except Exception as e:
                kept = keep(run, folder)
                failures.append(f"{what}\n{type(e).__name__}: {e}\nkept: {kept}")
            shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(2) as pool:
        for i, time_ns in enumerate(run.cut_times(rng, count)):
            disk.advance(time_ns)
            folder = fast_folder / f"c{i}"
            folder.mkdir()
            image = folder / "store"
            how = disk.build(image, rng)
            what = f"{name}, cut {i} at {time_ns}: {how}"
            demanding += bool(flushed(run.ops, time_ns))
            waiting.append((pool.submit(judge, run, shim, image, folder, time_ns,
                                        rng.randrange(1 << 30)), what, folder, image))
            settle(3)
            if len(failures) >= 3:
                break
        settle(0)
    assert not failures, f"seed {seed}, round {round_}:\n" + "\n\n".join(failures[:3])
    assert judged == count
    # Cuts before anything was promised would be easy to survive.
    assert demanding >= count // 4


def keep(run, folder):
    """The image of a failure, its journal and the requests, for whoever has to find out."""
    kept = new_folder()
    shutil.copytree(folder, kept / "cut", symlinks=True, ignore_dangling_symlinks=True,
                    ignore=lambda d, names: [n for n in names if n == "s"
                                             and not os.path.isdir(os.path.join(d, n))])
    copy_store(run.base, kept / "base")
    shutil.copy(run.trace, kept / "trace")
    keep_evidence(kept / "requests", run.before, run.ops, b"")
    return kept


def test_the_journal_tells_everything(shim, fast_folder, rng):
    """If something got past the shim, no cut would prove anything; checked in each run too."""
    _, shape, sync_us = SHAPES[1]
    Run(fast_folder / "run", shim, shape, sync_us, rng)


def test_a_failed_sync_is_reported_and_not_forgotten(shim, fast_folder, rng):
    """B23, G6: no FLUSH and no FUA write succeeds while syncs fail, and none afterwards
    whose data is not in; a sync that is only repeated would not bring it in.
    """
    store, fault = fast_folder / "store", fast_folder / "fault"
    server = Server(fast_folder / "s", {"v": SIZE}, store=store, tcp=False).start()
    with connect(server, "v") as c:
        c.write(0, content(1, 0, SIZE))
        c.flush()
    server.stop()
    base, trace = copy_store(store, fast_folder / "base"), fast_folder / "trace"
    server.prefix = under(shim, store, trace, 1, "0-1000") + [f"POWERCUT_FAULT={fault}"]
    server.start()
    ops = []

    def send(c, number, kind, at=0, length=0, fua=False):
        op = Op(number, 0, kind, at, length, fua, time.monotonic_ns())
        payload = content(number, at, at + length) if kind == WRITE else b""
        c.request(kind, at, flags=FLAG_FUA if fua else 0, payload=payload, cookie=number)
        ops.append(op)
        return op

    def answer(c, op, limit_s=60):
        """True if it came, be it an error."""
        c.sock.settimeout(limit_s * SLOW)
        try:
            op.error = c.result(op.number).error
        except (TimeoutError, socket.timeout):
            return False
        op.answered_ns = time.monotonic_ns()
        return True

    try:
        with connect(server, "v") as c:
            answer(c, send(c, 2, WRITE, 4096, 8192))
            assert answer(c, send(c, 3, FLUSH)) and ops[-1].error == 0
            first = send(c, 4, WRITE, 100000, 50000)
            assert answer(c, first)
            fault.write_text("sync 5\n")
            flush = send(c, 5, FLUSH)
            assert answer(c, flush) and flush.error, "a FLUSH whose sync failed succeeded"
            # A write may wait for the disk, and so may FUA; it may not pretend.
            fua = send(c, 6, WRITE, 200000, 512, fua=True)
            if answer(c, fua, 2):
                assert fua.error, "a FUA write succeeded although nothing can be synced"
            again = send(c, 7, FLUSH)
            if answer(c, again, 2):
                assert again.error, "the second FLUSH succeeded although nothing can be synced"
            fault.unlink()
            for op in (fua, again):
                if op.answered_ns is None:
                    assert answer(c, op), "the disk is well again, but the request still waits"
            last = send(c, 8, FLUSH)
            assert answer(c, last), "FLUSH hangs although the disk is well again"
    finally:
        server.kill()
    for op in ops:
        if op.error and op.kind == WRITE:
            # Told that it failed, the client expects nothing: it may be there or not.
            op.error, op.answered_ns = 0, None
    if not last.error:
        assert first in flushed(ops, last.answered_ns)
    disk = images.Disk(base, trace, store)
    disk.advance(last.answered_ns)
    for i in range(12):
        image = fast_folder / f"i{i}"
        disk.build(image, rng, "none" if i == 0 else None)
        after = read_volume(fast_folder / f"r{i}", image)
        check_cut(content(1, 0, SIZE), ops, after, last.answered_ns)
