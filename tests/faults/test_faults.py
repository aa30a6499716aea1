"""System calls that fail beneath a running server, and one that starts (G1, G5, G6).

faults.c lets one call of a kind on one of the store's files fail, or every one from then on: with
EIO, ENOSPC or EINTR, by doing less than was asked for, by doing it and failing all the same, and
syncs also by dropping what they were for. Whatever it is,

  - what was answered is there, and every read gives the right bytes or an error (G1, G5), also
    after kill -9 and for another server;
  - a FLUSH that was answered covers its data, also when an earlier sync failed and took what it
    was for along;
  - the server goes on, or refuses, or ends with a sentence that says why: nothing waits for ever
    once the disk is well again.

Every kind of call on every file that the server makes is tried, in every way it can fail, at
FAULTS places (plan.py).
"""

import random
import time
from dataclasses import replace

import pytest

import inject
from harness.history import Check, answered, check_death, flushed
from harness.load import FLUSH, WRITE, Load, Op, content
from harness.rawnbd import Closed, NbdError, OptionError, connect
from harness.server import SLOW, Died, Server, cli, copy_store
from harness.waiting import wait_until
from plan import PLACES, SHAPE, SIZE, cases, chosen, read_all, run_cases, start_plain

pytestmark = pytest.mark.lmdb("about the files of the embedded store")

PIECE = 256 << 10
HOLD_S = 1.0            # how long a lasting fault lasts
AFTER_S = 45 * SLOW     # until all that waited has been answered


def told_why(server):
    """The server ended: it has to have said why, and not to have crashed."""
    status, log = server.process.returncode, server.log()
    server.check_log()
    if status < 0:
        # It may stop itself where no answer would be true.
        assert status == -6 and "stopping, so that nothing false is answered" in log, (
            f"the server ended by signal {-status}\n{server.log_tail()}")
    else:
        assert status != 0, "the server ended, and called it a success"
        last = log.strip().splitlines()[-1] if log.strip() else ""
        assert "error" in log or last.startswith("fdb-nbd: "), server.log_tail()


def reads_under_fault(server, known):
    """Reads everything in pieces while reads fail; each is right or an error."""
    errors = 0
    try:
        with connect(server, "v", structured=True, timeout_s=20 * SLOW) as c:
            for at in range(0, SIZE, PIECE):
                length = min(PIECE, SIZE - at)
                try:
                    got = c.read(at, length)
                except NbdError:
                    errors += 1
                    continue
                assert got == known[at:at + length], f"wrong bytes in {at}..{at + length}"
    except (Closed, OptionError, OSError):
        errors += 1
    return errors


class Enough(Exception):
    """While the disk fails requests may wait: they have, for long enough."""


def load_under_fault(server, control, fault, rng, dies):
    """A load into which the fault falls, until all is answered and the disk well again; or the
    server is killed as soon as all was sent, before what is flushed need be committed."""
    # A trim without space for it leaves what it covers of a block in part, and is answered.
    shape = replace(SHAPE, trims=SHAPE.trims if fault.file == "log" else 0)
    if dies:
        # Few blocks, or they are committed at once.
        shape = replace(shape, ops=60, flush_every=0.3, fua=0.2, hot=0.9, hot_part=64,
                        lengths=((512, 6), (4096, 6)))
    load = Load(server, "v", shape, rng, 2)
    control.arm(fault)
    since = []

    def held(load):
        if control.fired and not since:
            since.append(time.monotonic())
        if fault.always and since and time.monotonic() - since[0] > HOLD_S:
            raise Enough
        return False
    try:
        load.run(held, limit_s=30 * SLOW)
    except Enough:
        pass
    if dies:
        server.kill()
        load.drain()
        return load
    if fault.always and server.running():
        # Whoever leaves has the volume committed and given back, under the fault.
        time.sleep(0.2)
    control.disarm()
    load.run(lambda _: True, limit_s=AFTER_S)
    return load


def read_case(base, folder, fault, rng):
    """One fault under a server of which is read what is stored. What became of it, in a word."""
    store = copy_store(base.clean, folder / "store")
    with inject.controlled(folder / "control") as control:
        server = Server(folder / "s", store=store, tcp=False, args=["--cache-size", "32M"],
                        prefix=inject.words(base.shim, store, control))
        server.start()
        try:
            control.arm(fault)
            errors = reads_under_fault(server, base.clean_bytes)
            control.disarm()
            server.check_alive()
            assert wait_for_read(server) == base.clean_bytes
            return ("errors" if errors else "unharmed") if control.fired else "not reached"
        finally:
            server.kill()


def load_case(base, folder, fault, rng):
    """One fault under a server that takes a load. What became of it, in a word."""
    store = copy_store(base.clean, folder / "store")
    with inject.controlled(folder / "control") as control:
        server = Server(folder / "s", store=store, tcp=False, args=["--cache-size", "32M"],
                        prefix=inject.words(base.shim, store, control, drop=fault.how == "drop"))
        server.start()
        try:
            ops, outcome = load_judged(base, server, control, fault, rng)
            dropped, fired = control.dropped, control.fired
        finally:
            server.kill()
    after_death(base, folder, store, ops, dropped)
    return outcome if fired else "not reached"


def load_judged(base, server, control, fault, rng):
    dies = fault.file == "log" and (fault.how == "drop" or rng.random() < 0.5)
    load = load_under_fault(server, control, fault, rng, dies)
    ops = load.sent()
    load.close()
    errors = [op for op in ops if op.error]
    if dies:
        return excused(ops), "killed"
    if not server.running():
        told_why(server)
        return excused(ops), "ended"
    waiting = [op for op in ops if op.answered_ns is None]
    assert not waiting, f"never answered, and the server is there: {waiting[0]}"
    try:
        with connect(server, "v", timeout_s=AFTER_S) as c:
            mark = Op(900001, 90, WRITE, 0, 4096, sent_ns=time.monotonic_ns())
            c.write(0, content(mark.number, 0, mark.length))
            mark.answered_ns = time.monotonic_ns()
            flush = Op(900002, 90, FLUSH, sent_ns=time.monotonic_ns())
            c.flush()
            flush.answered_ns = time.monotonic_ns()
    except (NbdError, OptionError) as e:
        raise AssertionError(f"the disk is well again, the server is not: {e}\n"
                             f"{server.log_tail()}") from None
    ops = excused(ops) + [mark, flush]
    # Everybody was gone, so this is what was committed, or is to be replayed by nobody.
    check_death(base.clean_bytes, ops, wait_for_read(server))
    return ops, "errors" if errors else "unharmed"


def excused(ops):
    """Told that a change failed, the client expects nothing: it may be there or not, and it had no
    place in the order of its connection."""
    for op in ops:
        if op.error and op.kind != FLUSH:
            op.error, op.answered_ns, op.connection = 0, None, 1000 + op.number
    return ops


def after_death(base, folder, store, ops, dropped):
    """Another server finds what it must, and everything that is stored is whole."""
    server = start_plain(folder / "after", store)
    try:
        after = read_all(server)
    finally:
        server.kill()
    # What a sync dropped may have been answered, and lost to the death of the process after that.
    required = flushed(ops, time.monotonic_ns()) if dropped else answered(ops)
    Check(base.clean_bytes, ops, after, required).run()
    done = cli(f"lmdb:{store}", "verify", "v", check=False)
    assert done.returncode == 0, f"verify: {done.stdout}{done.stderr}"


@pytest.mark.limit(100000)
def test_under_a_load(base, fast_folder, seed):
    rng = random.Random(f"{seed}:load")
    run_cases("load", base, fast_folder, seed, chosen(cases(base.counts_load, rng), rng, 4),
              load_case)


@pytest.mark.limit(100000)
def test_under_reads(base, fast_folder, seed):
    rng = random.Random(f"{seed}:read")
    counts = {(kind, file): n for (kind, file), n in base.counts_read.items()
              if kind in ("read", "submit")}
    run_cases("read", base, fast_folder, seed, chosen(cases(counts, rng, 3 * PLACES), rng, 2),
              read_case)


def open_case(base, folder, fault, rng):
    """One fault while a server starts and takes in what its dead predecessor left."""
    store = copy_store(base.killed, folder / "store")
    # What a replayed write leaves of a block is lost if it could not be read for some seconds.
    lossy = fault.kind == "read" and fault.file == "blocks" and fault.always
    with inject.controlled(folder / "control") as control:
        server = Server(folder / "s", store=store, tcp=False, args=["--cache-size", "32M"],
                        prefix=inject.words(base.shim, store, control, drop=fault.how == "drop"))
        control.arm(fault)
        server.start(wait=False)
        try:
            wait_until(lambda: settled(server) or (fault.always and "error" in server.log()),
                       30 * SLOW, "it starts, or ends, or says what it waits for")
            if not settled(server):
                # As long as the disk fails; and it says so.
                time.sleep(HOLD_S)
                control.disarm()
                wait_until(lambda: settled(server), 30 * SLOW, "the disk is well, and it starts")
                outcome = well_again(server, base, lossy) or "waited"
            elif server.running():
                errors = reads_under_fault(server, base.killed_bytes)
                outcome = "errors" if errors else "unharmed"
                control.disarm()
                wait_until(lambda: settled(server), 30 * SLOW, "it goes on, or ends")
                outcome = well_again(server, base, lossy) or outcome
            else:
                told_why(server)
                one_sentence(server.log(), fault)
                outcome = "did not start"
            if not control.fired:
                outcome = "not reached"
        except AssertionError as e:
            raise AssertionError(f"{e}\n{server.log_tail()}") from None
        finally:
            server.kill()
    server = start_plain(folder / "after", store)
    try:
        if outcome == "lost blocks":
            assert reads_under_fault(server, base.killed_bytes)
        else:
            got = read_all(server)
            assert got == base.killed_bytes, "not what had been answered, afterwards"
    finally:
        server.kill()
    if outcome == "lost blocks":
        return outcome
    done = cli(f"lmdb:{store}", "verify", "v", check=False)
    assert done.returncode == 0, f"verify: {done.stdout}{done.stderr}"
    return outcome


def settled(server):
    """Whether it serves, or has ended."""
    try:
        return not server.running() or server._ready()
    except Died:
        return True


def well_again(server, base, lossy):
    """What a server does now that its disk is well: "ended", "lost blocks" or None."""
    if not server.running():
        told_why(server)
        return "ended"
    if lossy:
        return "lost blocks" if reads_under_fault(server, base.killed_bytes) else None
    got = wait_for_read(server)
    assert got == base.killed_bytes, "not what had been answered"
    return None


def wait_for_read(server):
    """The disk is well: a volume may take a moment to come back, not for ever."""
    got = []

    def try_it():
        try:
            got.append(read_all(server))
            return True
        except (NbdError, OptionError, Closed, OSError):
            return not server.running()
    wait_until(try_it, AFTER_S, f"the volume can be read again\n{server.log_tail()}", 0.2)
    assert got, f"it ended instead\n{server.log_tail()}"
    return got[0]


def one_sentence(log, fault):
    lines = [line for line in log.splitlines() if line.startswith("fdb-nbd: ")]
    assert lines, f"it ended without a sentence\n{log}"


@pytest.mark.limit(100000)
def test_while_a_store_is_opened_and_replayed(base, fast_folder, seed):
    rng = random.Random(f"{seed}:open")
    run_cases("open", base, fast_folder, seed, chosen(cases(base.counts_open, rng), rng, 5),
              open_case)
