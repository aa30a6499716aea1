"""Kill -9 at random moments under a write load; then everything answered is there.

G1: an answered write survives the death of the process. G2: what is there is the
effect of a first part of the requests in the order they were taken. G3: each
request is there whole or not at all.

KILLS (default 60) rounds; each starts where the last one was killed, so recovery
is tested on recovered stores. --seed replays the choices, not the timing: a kill
hits where it hits.
"""

import os
import random
import struct
import threading
import time

import pytest

from harness import stores
from harness.fixtures import new_folder
from harness.history import check_death, keep_evidence
from harness.load import Load, Shape, content
from harness.rawnbd import CMD_WRITE, connect
from harness.server import SLOW

MIB = 1 << 20
KILLS = int(os.environ.get("KILLS", "30" if stores.on_fdb() else "60"))
SIZE = 24 * MIB + 512

SHAPES = {
    # Many small ones: kills between answers.
    "small": Shape(SIZE, connections=4, depth=8, ops=1500,
                   lengths=((512, 6), (4096, 8), (16384, 4), (65536, 1))),
    # All sizes over each other.
    "mixed": Shape(SIZE, connections=3, depth=6, ops=500),
    # Some of many MiB: more than one piece of 4 MiB, more than one generation.
    "large": Shape(SIZE, connections=2, depth=3, ops=60, flush_every=0.15,
                   lengths=((4096, 4), (1 << 20, 3), (5 * MIB, 2), (9 * MIB, 1))),
    # One at a time on one connection: the total order is known.
    "single": Shape(SIZE, connections=1, depth=1, ops=1500,
                    lengths=((512, 6), (4096, 8), (16384, 6), (65536, 1))),
    # Deep, everything in one place: each request lies over the ones just before it.
    "hot": Shape(SIZE, connections=1, depth=32, ops=1500, hot=0.9, hot_part=128, fua=0.02,
                 lengths=((512, 6), (4096, 8), (16384, 6), (65536, 2))),
    "hot many": Shape(SIZE, connections=4, depth=8, ops=1500, hot=0.9, hot_part=128, fua=0.02,
                      lengths=((512, 6), (4096, 8), (16384, 6), (65536, 2))),
    "zeros": Shape(SIZE, connections=3, depth=6, ops=800, zeros=0.3, trims=0.3,
                   lengths=((512, 4), (4096, 8), (16384, 6), (262144, 3), (6 * MIB, 1))),
}


def kill_after(rng, shape):
    """Stops a load by killing its server after a random number of answers or moments."""
    if rng.random() < 0.5:
        count = rng.randrange(1, shape.ops)
        return lambda load: sum(op.answered_ns is not None for op in load.ops) >= count
    wait_ns = int(rng.choice([0.002, 0.02, 0.1, 0.5]) * rng.random() * 1e9)
    started = []

    def now(load):
        if load.ops and not started:
            started.append(time.monotonic_ns())
        return bool(started) and time.monotonic_ns() - started[0] >= wait_ns
    return now


@pytest.mark.limit(180 + KILLS * 10)
def test_kill_9_under_load(servers, seed):
    """G1, G2, G3 after each of KILLS kills."""
    s = servers.start({"v": SIZE}, tcp=False)
    with connect(s, "v") as c:
        for at in range(0, SIZE, MIB):
            c.write(at, content(1, at, min(at + MIB, SIZE)))
        before = c.read_all()
    number, cut_short = 2, 0
    rounds = []
    for round_ in range(KILLS):
        rng = random.Random(f"{seed}:kill:{round_}")
        name = rng.choice(list(SHAPES))
        shape = SHAPES[name]
        load = Load(s, "v", shape, rng, number)
        # Sooner than the load's own end, mostly; the process dies in the middle of a
        # step of the loop below, so requests are sent to the last moment.
        stop = kill_after(rng, shape)
        killed = []

        def dead(load):
            if not killed and stop(load):
                # From a thread of its own, so that sending goes on meanwhile.
                t = threading.Timer(rng.random() * 0.003, s.process.kill)
                t.start()
                killed.append(t)
            return bool(killed) and not killed[0].is_alive()
        load.run(dead, limit_s=60 * SLOW)
        if killed:
            killed[0].join()
        s.kill()
        load.drain()
        load.close()
        number = load.number
        ops = load.sent()
        rounds = rounds[-5:] + [(round_, name, ops[0].number if ops else number, number - 1)]
        errors = [op for op in ops if op.error]
        assert not errors, f"round {round_}: {errors[0]}\n{s.log_tail()}"
        cut_short += any(op.answered_ns is None for op in ops)
        s.start()
        with connect(s, "v", timeout_s=60 * SLOW) as c:
            after = c.read_all()
        try:
            check_death(before, ops, after)
        except AssertionError as e:
            raise AssertionError(
                f"round {round_} of seed {seed} ({name}, {len(ops)} requests): {e}\n"
                f"requests of the last rounds: {rounds}\n"
                f"kept: {keep_evidence(new_folder() / 'kill', before, ops, after)}") from None
        # What is there after one death must not be undone by the next.
        before = after
    # Kills that all came when nothing was under way would prove little.
    assert cut_short >= KILLS // 4, f"only {cut_short} of {KILLS} kills interrupted anything"


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_restart_of_an_idle_server_changes_nothing(servers, rng, how):
    """G1 without a load: also what was never flushed, after kill -9 and after SIGTERM."""
    s = servers.start({"v": SIZE}, tcp=False)
    model = bytearray(SIZE)
    for round_ in range(4):
        with connect(s, "v") as c:
            assert c.read_all() == model
            for i in range(30):
                at = rng.randrange(SIZE - 70000)
                data = content(100 + 30 * round_ + i, at, at + rng.randrange(1, 70000))
                c.write(at, data)
                model[at:at + len(data)] = data
        s.restart(how)
    with connect(s, "v") as c:
        assert c.read_all() == model


def test_killed_again_and_again_during_recovery(servers, rng):
    """A server that dies while it recovers leaves a store that the next one recovers."""
    s = servers.start({"v": SIZE}, tcp=False)
    load = Load(s, "v", SHAPES["mixed"], rng)
    load.run(limit_s=60 * SLOW)
    load.close()
    with connect(s, "v") as c:
        before = c.read_all()
    for _ in range(8):
        s.kill()
        s.start(wait=False)
        # Not a wait for anything: the moment of death, somewhere in its start.
        time.sleep(rng.random() * 0.08)
    s.kill()
    s.start()
    with connect(s, "v") as c:
        assert c.read_all() == before


@pytest.mark.parametrize("sent", [0, 1, 4096, 500001, MIB - 1])
@pytest.mark.parametrize("then", ["nothing", "kill", "stop"])
def test_G3_client_killed_while_sending_1_MiB(servers, rng, sent, then):
    """The old bytes stay: at once, after the death of the server, and after a restart."""
    s = servers.start({"v": "8M"}, tcp=False)
    old = content(7, 0, 8 * MIB)
    with connect(s, "v") as c:
        c.write(0, old)
    for offset in (0, 4096, 12345, 3 * MIB + 1):
        # A process of its own, killed as a process is: its socket closes by itself.
        pid = os.fork()
        if pid == 0:
            try:
                c = connect(s, "v")
                new = content(8, offset, offset + MIB)
                c.send(struct.pack(">LHHQQL", 0x25609513, 0, CMD_WRITE, 1, offset, MIB)
                       + new[:sent])
                os.kill(os.getpid(), 9)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        with connect(s, "v") as c:
            assert c.read_all() == old
            c.flush()
            assert c.read_all() == old
    if then != "nothing":
        s.restart(then)
        with connect(s, "v") as c:
            assert c.read_all() == old
