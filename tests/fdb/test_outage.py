"""The whole cluster stands still under load (G6): memory stays inside its
budget, requests wait, and everything answered is there afterwards. With --store-timeout waiting
turns into EIO, and G1 and G2 hold all the same.

OUTAGE_S seconds (default 8; 60 with LONG=1).
"""

import errno
import os
import threading
import time

import nbd
import pytest

from harness import rawnbd
from harness.cluster import Cluster
from harness.fixtures import new_folder
from harness.flood import Flood, peak_kib
from harness.gateway import gateway
from harness.history import check_death, keep_evidence
from harness.load import Background, Load, Shape, content
from harness.rawnbd import connect
from harness.server import SLOW, wait_until

pytestmark = pytest.mark.fdb

MIB = 1 << 20
OUTAGE_S = float(os.environ.get("OUTAGE_S", "60" if os.environ.get("LONG") else "8"))
SIZE = 24 * MIB + 512
CACHE_MIB = 128
CONNECTIONS = 64
SHAPE = dict(connections=4, depth=8, ops=1 << 30, pace_us=3000,
             lengths=((512, 6), (4096, 8), (16384, 4), (65536, 2), (1 << 20, 1)))


@pytest.fixture(scope="module")
def own():
    """A cluster that stands still without others noticing."""
    with Cluster() as made:
        yield made


def filled(server):
    with connect(server, "v", timeout_s=120 * SLOW) as c:
        for at in range(0, SIZE, MIB):
            c.write(at, content(1, at, min(at + MIB, SIZE)))
        return c.read_all()


def judge(server, before, ops, after):
    try:
        check_death(before, ops, after)
    except AssertionError as e:
        kept = keep_evidence(new_folder() / "outage", before, ops, after)
        raise AssertionError(f"{e}\nkept: {kept}\n{server.log_tail()}") from None


def volume(server):
    with connect(server, "v", timeout_s=120 * SLOW) as c:
        return c.read_all()


def stand_still(own, load):
    """Stops all its processes and gives when the last answer had come in."""
    own.pause()
    seen = [answered(load), time.monotonic()]

    def silent():
        if answered(load) != seen[0]:
            seen[:] = [answered(load), time.monotonic()]
        return time.monotonic() - seen[1] > 1
    wait_until(silent, 30 * SLOW, "nothing is answered any more", 0.1)
    return seen[0]


def answered(load):
    return sum(op.answered_ns is not None for op in list(load.ops))


@pytest.mark.limit(240 + OUTAGE_S)
def test_G1_G2_G6_requests_wait_for_the_cluster(own, folder, rng):
    with gateway(own, folder / "s", {"v": SIZE}, lease_ms=3000, tcp=False) as server:
        before = filled(server)
        load = Load(server, "v", Shape(SIZE, **SHAPE), rng, 2)
        try:
            with Background(load, (OUTAGE_S + 180) * SLOW) as beside:
                wait_until(lambda: answered(load) > 100 or not beside.running(), 60 * SLOW,
                           "the load is under way")
                count = stand_still(own, load)
                # Not a wait for anything: so long it is gone.
                time.sleep(OUTAGE_S)
                assert answered(load) == count, "answered although nothing can be committed"
                server.check_alive()
                own.resume()
                wait_until(lambda: answered(load) > count + 100 or not beside.running(),
                           120 * SLOW, "requests go on where they waited")
        finally:
            own.resume()
        errors = [op for op in load.ops if op.error]
        assert not errors, f"{errors[0]}\n{server.log_tail()}"
        assert all(op.answered_ns for op in load.sent())
        assert "FoundationDB" in server.log()
        print(f"{count} answers before {OUTAGE_S:g} s of silence, {answered(load) - count} after")
        server.kill()
        load.close()
        server.start()
        judge(server, before, load.sent(), volume(server))


@pytest.mark.limit(300 + OUTAGE_S)
def test_G6_memory_while_the_cluster_is_gone(own, folder):
    """64 connections write 32 MiB requests as fast as they can; the bound is that of
    limits/test_memory.py."""
    args = ["--cache-size", f"{CACHE_MIB}M"]
    with gateway(own, folder / "s", {"big": "16G"}, args) as server:
        idle = peak_kib(server.pid)
        flood = Flood(server, "big", CONNECTIONS)
        try:
            flood.run(3 * SLOW)
            own.pause()
            flood.run(OUTAGE_S)
            stuck = flood.answered()
            own.resume()
            end = time.monotonic() + 120 * SLOW
            while flood.answered() <= stuck and time.monotonic() < end:
                flood.step()
            assert flood.answered() > stuck, "nothing went on after the outage"
        finally:
            own.resume()
        limit = CACHE_MIB * 1024 + 64 * 1024 + CONNECTIONS * 64
        peak = peak_kib(server.pid)
        print(f"sent {flood.sent() >> 20} MiB, {flood.answered()} requests answered, "
              f"peak {peak >> 10} MiB of {limit >> 10} MiB (idle {idle >> 10} MiB)")
        assert flood.sent() > CACHE_MIB << 20, "the load was too small to prove anything"
        assert peak <= limit
        flood.close()


@pytest.mark.limit(300)
def test_G1_G2_store_timeout_turns_waiting_into_eio(own, folder, rng):
    """An error says that the write may or may not be there; one answered well is there, and none
    that failed comes back once something newer was answered."""
    args = ["--store-timeout", 3]
    # Longer than the test: a session in doubt holds all answers back, errors too.
    with gateway(own, folder / "s", {"v": SIZE}, args, lease_ms=60000, tcp=False) as server:
        before, number = filled(server), 2
        for turn in range(2):
            load = Load(server, "v", Shape(SIZE, **SHAPE), rng, number)
            try:
                with Background(load, 120 * SLOW) as beside:
                    wait_until(lambda: answered(load) > 100 or not beside.running(), 60 * SLOW,
                               "the load is under way")
                    stopped = time.monotonic_ns()
                    own.pause()
                    wait_until(lambda: any(op.error for op in list(load.ops)), 30 * SLOW,
                               "requests are refused")
                # The block's end waited until all were answered, with the cluster still gone.
                errors = {op.error for op in load.ops if op.error}
                assert errors <= {errno.EIO}, errors
                first = min(op.answered_ns for op in load.ops if op.error)
                print(f"first EIO {(first - stopped) / 1e9:.1f} s after the cluster stood still; "
                      f"{sum(op.error != 0 for op in load.ops)} in all")
                assert first - stopped > 2e9, "too soon"
                # Newcomers are refused too, at the latest when they flush.
                with pytest.raises(nbd.Error):
                    h = nbd.NBD()
                    h.connect_uri(server.uri("v"))
                    h.flush()
            except BaseException:
                own.resume()
                raise
            own.resume()
            own.wait_available()
            load.close()
            server.check_alive()
            # Those that failed may be there or not; nothing more is known of them.
            for op in load.ops:
                if op.error:
                    op.error, op.answered_ns = 0, None
            after = wait_until(lambda: readable(server), 60 * SLOW, "the volume can be read again",
                               0.2)
            judge(server, before, load.sent(), after)
            # Settled: what it holds now is what it holds after newer writes and a death.
            number, before = load.number, after
            load = Load(server, "v", Shape(SIZE, **{**SHAPE, "ops": 200}), rng, number)
            load.run(limit_s=60 * SLOW)
            errors = [op for op in load.ops if op.error]
            assert not errors, f"{errors[0]}\n{server.log_tail()}"
            server.kill()
            load.close()
            server.start()
            number, after = load.number, volume(server)
            judge(server, before, load.sent(), after)
            before = after


def readable(server):
    try:
        return volume(server)
    except (rawnbd.NbdError, rawnbd.Closed, rawnbd.OptionError, OSError):
        return None


@pytest.mark.limit(200)
def test_commands_during_the_outage_end_with_a_sentence(own, folder):
    with gateway(own, folder / "s", {"v": "1M"}) as server:
        own.pause()
        try:
            done = []
            threads = [threading.Thread(target=lambda w=w: done.append(
                server.cli(*w, check=False, limit_s=60 * SLOW)))
                for w in (["list"], ["info", "v"], ["create", "w", "1M"], ["resize", "v", "2M"])]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            for d in done:
                assert d.returncode == 4 and "does not answer" in d.stderr, d
                assert d.stderr.count("\n") == 1, d.stderr
        finally:
            own.resume()
        own.wait_available()
        assert "v" in server.cli("list").stdout.split()
