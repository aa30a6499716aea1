"""The owner of a volume is stopped or killed under a writing client, and another server goes on
(G1, G2, G4, G8).

On FoundationDB the two gateways take each other's machine for another one, so that only silence
tells; an owner that comes back after its lease commits nothing and answers nothing. On the
embedded store a stopped owner is ended and a dead one is known at once.
"""

import contextlib
import os
import signal
import time

import pytest

from harness import cluster as clusters
from harness import rawnbd
from harness.fixtures import new_folder
from harness.gateway import elsewhere, gateway
from harness.history import check_death, keep_evidence
from harness.load import Background, Load, Shape, content
from harness.server import SLOW, Server, wait_until

MIB = 1 << 20
LOAD = 8 * MIB
# Behind what the load writes: the tests' own.
OWN = LOAD
SIZE = LOAD + MIB
SHAPE = Shape(LOAD, connections=4, depth=8, ops=1 << 30, pace_us=500,
              lengths=((512, 8), (4096, 8), (16384, 4), (65536, 2), (1 << 20, 1)))
# The least there is on FoundationDB.
LEASE_MS = 3000


def filled(server):
    with rawnbd.connect(server, "v", timeout_s=60 * SLOW) as c:
        for at in range(0, LOAD, MIB):
            c.write(at, content(1, at, at + MIB))
        return c.read_all()[:LOAD]


def answered(load):
    return sum(op.answered_ns is not None for op in list(load.ops))


def under_way(load, beside):
    count = answered(load)
    wait_until(lambda: answered(load) > count + 200 or not beside.running(), 60 * SLOW,
               "the load is under way")
    assert beside.running(), beside.problem


def judge(server, before, load, after):
    errors = [op for op in load.ops if op.error]
    assert not errors, f"{errors[0]}\n{server.log_tail()}"
    try:
        check_death(before, load.sent(), after)
    except AssertionError as e:
        kept = keep_evidence(new_folder() / "takeover", before, load.sent(), after)
        raise AssertionError(f"{e}\nkept: {kept}\n{server.log_tail()}") from None


def persistent(server, request, limit_s):
    """What request(connection) gives at `server`, by a client that connects again at once
    whenever its connection ends; and that connection, still open. An error is none to it: a
    file system would not survive it."""
    deadline = time.monotonic() + limit_s
    while True:
        c = None
        try:
            c = rawnbd.connect(server, "v", timeout_s=limit_s)
            return request(c), c
        except (rawnbd.Closed, rawnbd.OptionError, OSError):
            if c:
                c.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def goes_on(server, before, ops, rng, number):
    """The volume as it now is takes a new load."""
    load = Load(server, "v", Shape(**{**vars(SHAPE), "ops": 300}), rng, number)
    load.run(limit_s=60 * SLOW)
    with rawnbd.connect(server, "v", timeout_s=60 * SLOW) as c:
        judge(server, before, load, c.read_all()[:LOAD])
    load.close()


@contextlib.contextmanager
def two_gateways(folder, lease_ms):
    cluster = clusters.shared()
    store = cluster.store()
    made = []
    for n in (1, 2):
        place = folder / str(n)
        place.mkdir()
        made.append(gateway(cluster, place, {"v": SIZE} if n == 1 else {}, lease_ms=lease_ms,
                            store=store, prefix=elsewhere(place), tcp=False))
        made[-1].cli_prefix = made[-1].prefix
    with made[0], made[1]:
        yield cluster, *made


def look_at_keys(cluster, server):
    """Who owns the volume and how far its commits are: every commit of its changes these."""
    prefix = cluster.prefix_in(server.store)
    return [row for kind in ("o", "a", "h") for row in cluster.rows(prefix, kind)]


def look_at_all_keys(cluster, server):
    """Every key of the store but those of sessions and commit numbers, once they stand still:
    the one who serves may have something left to write."""
    def look():
        rows = cluster.rows(cluster.prefix_in(server.store))
        return {key: value for key, value in rows if key[0] not in ("s", "x")}
    seen = [look(), time.monotonic()]

    def still():
        now = look()
        if now != seen[0]:
            seen[:] = [now, time.monotonic()]
        return time.monotonic() - seen[1] > 1.5
    wait_until(still, 60 * SLOW, "the volume's keys stand still", 0.1)
    return seen[0]


def same(now, then):
    """Of volumes, without showing them."""
    if now != then:
        at = next(n for n in range(len(then)) if now[n] != then[n])
        raise AssertionError(f"it changed the volume at {at}")


def drained(load):
    """Nothing has come in for a while: what it gave before it was stopped has been read."""
    seen = [answered(load), time.monotonic()]

    def silent():
        if answered(load) != seen[0]:
            seen[:] = [answered(load), time.monotonic()]
        return time.monotonic() - seen[1] > 0.5
    wait_until(silent, 30 * SLOW, "nothing more is answered", 0.05)


def rest(client):
    """All bytes that still come on this connection until it ends."""
    out = bytearray()
    client.sock.settimeout(30 * SLOW)
    try:
        while data := client.sock.recv(65536):
            out += data
    except ConnectionError:
        pass
    return bytes(out)


@pytest.mark.fdb
@pytest.mark.limit(90)
@pytest.mark.parametrize("look", [look_at_keys, look_at_all_keys])
def test_G4_G8_stopped_owner_commits_and_answers_nothing(folder, rng, look):
    """SIGSTOP under load, for longer than the lease; the other writes; SIGCONT.

    Looking at a few keys is quick: the stopped one goes on while FoundationDB would still take
    a transaction that it began before (five seconds). Looking at all takes longer than that.
    """
    with two_gateways(folder, LEASE_MS) as (cluster, first, second):
        before = filled(first)
        # What it has in its cache when it is stopped, it could answer without the cluster.
        asking = [rawnbd.connect(first, "v", timeout_s=60 * SLOW) for _ in range(4)]
        for c in asking:
            c.write(OWN, b"old" + bytes(4093))
            assert c.read(OWN, 3) == b"old"
        load = Load(first, "v", SHAPE, rng, 2)
        with Background(load, 60 * SLOW) as beside:
            under_way(load, beside)
            os.kill(first.pid, signal.SIGSTOP)
            try:
                stopped = time.monotonic()
                _, b = persistent(second, lambda c: c.write(OWN, b"new" + bytes(4093)),
                                  30 * SLOW)
                print(f"the other wrote {time.monotonic() - stopped:.2f} s after the stop")
                after = b.read_all()
                # They lie in its sockets when it wakes up; one has not even said its name.
                asking[0].request(rawnbd.CMD_READ, OWN, 4096)
                asking[1].request(rawnbd.CMD_READ, 0, 65536)
                asking[2].request(rawnbd.CMD_WRITE, OWN, payload=b"bad" + bytes(4093))
                asking[2].request(rawnbd.CMD_FLUSH)
                asking[3].request(rawnbd.CMD_FLUSH)
                asking[3].request(rawnbd.CMD_TRIM, OWN, 4096)
                asking[3].request(rawnbd.CMD_BLOCK_STATUS, 0, 4096)
                keys = look(cluster, second)
                count = answered(load)
                print(f"woken up {time.monotonic() - stopped:.2f} s after it")
            finally:
                os.kill(first.pid, signal.SIGCONT)
            for n, c in enumerate(asking):
                assert rest(c) == b"", f"connection {n} was answered\n{first.log_tail()}"
            wait_until(lambda: not beside.running(), 30 * SLOW, "it ends the load's connections")
        assert answered(load) == count, "the load was answered"
        judge(second, before, load, after[:LOAD])
        assert not any(lane.input for lane in load.lanes), "a part of an answer came"
        wait_until(lambda: "fenced" in first.log() or "lost" in first.log(), 30 * SLOW,
                   f"it finds itself fenced\n{first.log_tail()}")
        assert look(cluster, second) == keys, "it changed the volume"
        same(b.read_all(), after)
        load.close()
        # It serves on under a new session, and has nothing of the old one in its cache.
        first.check_alive()
        b.close()
        got, c = persistent(first, lambda c: c.read(OWN, 3), 30 * SLOW)
        assert got == b"new"
        same(c.read_all(), after)
        c.close()
        goes_on(first, after[:LOAD], load.sent(), rng, load.number)


@pytest.mark.fdb
@pytest.mark.limit(90)
@pytest.mark.parametrize("lease_ms", [LEASE_MS, 10000])
def test_G1_client_of_a_dead_owner_goes_on_elsewhere(folder, rng, lease_ms):
    """Kill -9 under load: within the lease and two seconds, with all that was answered."""
    with two_gateways(folder, lease_ms) as (_, first, second):
        before = filled(first)
        load = Load(first, "v", SHAPE, rng, 2)
        with Background(load, 60 * SLOW) as beside:
            under_way(load, beside)
            killed = time.monotonic()
            os.kill(first.pid, signal.SIGKILL)
            _, c = persistent(second, lambda c: c.write(OWN, b"on" + bytes(510)), 60 * SLOW)
            took = time.monotonic() - killed
            first.kill()
        print(f"answered by the other {took:.2f} s after the death, lease {lease_ms} ms")
        assert took > lease_ms / 1000 * 0.5, "it can't have known that the other is dead"
        assert took < (lease_ms / 1000 + 2) * SLOW
        after = c.read_all()
        judge(second, before, load, after[:LOAD])
        load.close()
        c.close()
        goes_on(second, after[:LOAD], load.sent(), rng, load.number)
        first.volumes = {}
        first.start()


@pytest.fixture
def two_servers(folder):
    first = Server(folder / "1", {"v": SIZE}, ["--lease-ms", LEASE_MS], store=folder / "store",
                   tcp=False)
    second = Server(folder / "2", args=["--lease-ms", LEASE_MS], store=folder / "store",
                    tcp=False)
    with first, second:
        yield first, second


@pytest.mark.lmdb("elsewhere it is fenced")
def test_G4_stopped_owner_is_ended(two_servers, rng):
    """SIGSTOP under load: the other ends it for good, so there is nothing that could come back."""
    first, second = two_servers
    before = filled(first)
    load = Load(first, "v", SHAPE, rng, 2)
    with Background(load, 60 * SLOW) as beside:
        under_way(load, beside)
        os.kill(first.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        _, c = persistent(second, lambda c: c.write(OWN, b"new" + bytes(509)), 30 * SLOW)
        took = time.monotonic() - stopped
        # It was dead before the other wrote, not only some time later.
        assert first.process.wait(0.1) == -signal.SIGKILL
        first.process = None
        drained(load)
        count = answered(load)
        after = c.read_all()
    print(f"the other wrote {took:.2f} s after the stop")
    assert answered(load) == count
    judge(second, before, load, after[:LOAD])
    load.close()
    c.close()
    goes_on(second, after[:LOAD], load.sent(), rng, load.number)
    first.volumes = {}
    first.start()


@pytest.mark.lmdb("elsewhere only silence tells")
def test_G1_dead_owner_is_replaced_at_once(two_servers, rng):
    """Kill -9 under load, several times back and forth: no lease is waited for."""
    before, number = filled(two_servers[0]), 2
    for turn in range(4):
        first, second = two_servers[turn % 2], two_servers[1 - turn % 2]
        first.volumes = {}
        load = Load(first, "v", SHAPE, rng, number)
        with Background(load, 60 * SLOW) as beside:
            under_way(load, beside)
            killed = time.monotonic()
            os.kill(first.pid, signal.SIGKILL)
            _, c = persistent(second, lambda c: c.write(OWN, b"on" + bytes(510)), 30 * SLOW)
            took = time.monotonic() - killed
            first.kill()
        print(f"answered by the other {took:.2f} s after the death")
        assert took < 1.5 * SLOW, "it must not wait for a lease"
        after = c.read_all()
        judge(second, before, load, after[:LOAD])
        load.close()
        c.close()
        before, number = after[:LOAD], load.number
        first.start()
