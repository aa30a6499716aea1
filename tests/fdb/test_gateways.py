"""Several gateways and several command lines on one cluster at once (G4).

Nobody on another machine knows whether a silent owner is dead: its volumes are taken after a
lease, and an owner that comes back finds itself fenced. The second gateway here, and its
commands, take themselves to be on such a machine.
"""

import os
import signal
import threading
import time

import nbd
import pytest

from harness import rawnbd
from harness.gateway import elsewhere, gateway
from harness.server import SLOW, wait_until

pytestmark = pytest.mark.fdb

LEASE_MS = 3000
# A lease, the margin for clock rates, and what a loaded machine takes.
TAKEN_S = (2.5 * LEASE_MS / 1000 + 5) * SLOW
MIB = 1 << 20


def connect(server, name="v"):
    h = nbd.NBD()
    h.connect_uri(server.uri(name))
    return h


@pytest.fixture
def two(cluster, store, folder):
    first = gateway(cluster, folder / "1", {"v": "64M"}, lease_ms=LEASE_MS, store=store)
    second = gateway(cluster, folder / "2", lease_ms=LEASE_MS, store=store,
                     prefix=elsewhere(folder))
    second.cli_prefix = second.prefix
    with first, second:
        yield first, second


def owner(server, name="v"):
    return server.json("owner", "show", name)["owner"]


def read_when_it_can(server, length, offset, limit_s, name="v"):
    """The bytes, as soon as the server has the volume, and how long that took."""
    began = time.monotonic()

    def ask():
        h = nbd.NBD()
        try:
            h.connect_uri(server.uri(name))
            return h.pread(length, offset)
        except nbd.Error:
            return None
    return wait_until(ask, limit_s, "the volume is taken over", 0.1), time.monotonic() - began


def test_several_volumes_each(two, rng):
    """Both serve their own at the same time; each sees all names."""
    first, second = two
    names = [f"n{n}" for n in range(8)]
    for n, name in enumerate(names):
        two[n % 2].cli("create", name, "16M")
    data = {name: rng.randbytes(MIB) for name in names}
    open_ = {name: connect(two[n % 2], name) for n, name in enumerate(names)}

    def write(name):
        for at in range(0, 16 * MIB, MIB):
            open_[name].pwrite(data[name], at)
    threads = [threading.Thread(target=write, args=(name,)) for name in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n, name in enumerate(names):
        assert owner(first, name)["pid"] == two[n % 2].pid
        assert open_[name].pread(MIB, 15 * MIB) == data[name]
        open_[name].shutdown()
    # And the other way round.
    for n, name in enumerate(names):
        h = connect(two[(n + 1) % 2], name)
        assert h.pread(MIB, 7 * MIB) == data[name]
        h.pwrite(b"x", 0)
        assert owner(first, name)["pid"] == two[(n + 1) % 2].pid
        h.shutdown()


def test_commands_on_both_sides_at_once(two):
    """create, list, resize, rename and remove, through either, of volumes that the other
    serves, all at once: each succeeds or is refused with a sentence, and the end is right."""
    first, second = two
    names = [f"n{n}" for n in range(6)]
    for name in names:
        first.cli("create", name, "1M")
    held = [connect(two[n % 2], name) for n, name in enumerate(names[:4])]
    for h in held:
        h.pwrite(b"held" * 128, 0)
    problems = []

    def turns(n):
        me, other = two[n % 2], two[(n + 1) % 2]
        mine = names[n]
        try:
            other.cli("resize", mine, "2M")
            me.cli("rename", mine, f"{mine}-new")
            assert mine in me.cli("list").stdout
            other.cli("create", f"extra{n}", "1M")
            other.cli("resize", f"{mine}-new", "3M")
            me.cli("remove", f"extra{n}", "--yes")
            other.cli("rename", f"{mine}-new", mine)
        except BaseException as e:
            problems.append(e)
    threads = [threading.Thread(target=turns, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not problems, "\n".join(map(str, problems))
    listed = {v["name"]: v["size_bytes"] for v in second.json("list")["volumes"]}
    assert listed == {"v": 64 * MIB, **{name: 3 * MIB for name in names}}
    for n, h in enumerate(held):
        assert h.pread(512, 0) == b"held" * 128
        h.pwrite(b"more" * 128, 0)
        assert owner(first, names[n])["pid"] == two[n % 2].pid
        # In use: not removed, whoever asks.
        done = two[(n + 1) % 2].cli("remove", names[n], "--yes", check=False)
        assert done.returncode == 1 and str(two[n % 2].pid) in done.stderr, done
        h.shutdown()
    for name in names:
        second.cli("remove", name, "--yes")
    assert [v["name"] for v in first.json("list")["volumes"]] == ["v"]


def test_commands_from_another_host_while_a_client_writes(two):
    """resize, rename and remove of a volume that a gateway on another machine serves."""
    first, second = two
    a = rawnbd.connect(first, "v", timeout_s=30 * SLOW)
    stop, ended = threading.Event(), []

    def busy():
        try:
            while not stop.is_set():
                a.write(0, b"w" * 4096)
        except (rawnbd.Closed, rawnbd.NbdError, OSError) as e:
            ended.append(e)
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        second.cli("resize", "v", "80M")
        second.cli("resize", "v", "48M", "--shrink", "--yes")
        second.cli("rename", "v", "u")
        assert [(v["name"], v["size_bytes"]) for v in second.json("list")["volumes"]] == [
            ("u", 48 * MIB)]
        assert owner(second, "u")["pid"] == first.pid and not ended
        done = second.cli("remove", "u", "--yes", check=False)
        assert done.returncode == 1 and str(first.pid) in done.stderr, done
        assert not ended
        second.cli("remove", "u", "--force", "--yes")
        wait_until(lambda: ended, 10 * SLOW, "the client is cut off")
    finally:
        stop.set()
        thread.join()
    assert isinstance(ended[0], (rawnbd.Closed, OSError)), ended
    assert second.json("list")["volumes"] == []
    first.check_alive()
    first.volumes = {}


def test_remove_with_force_after_kill_9(two):
    first, second = two
    a = connect(first)
    a.pwrite(b"1" * 4096, 0)
    first.kill()
    began = time.monotonic()
    second.cli("remove", "v", "--force", "--yes", limit_s=60 * SLOW)
    assert LEASE_MS / 1000 * 0.5 < time.monotonic() - began < TAKEN_S
    assert second.json("list")["volumes"] == []
    first.volumes = {}
    first.start()


def test_new_size_is_seen_by_the_other_gateway(two):
    first, second = two
    a = connect(first)
    a.pwrite(b"a" * 512, 0)
    second.cli("resize", "v", "80M")
    a.shutdown()
    b = connect(second)
    assert b.get_size() == 80 * MIB
    b.pwrite(b"b" * 512, 80 * MIB - 512)
    b.shutdown()
    assert connect(first).pread(512, 80 * MIB - 512) == b"b" * 512


def test_G1_takeover_after_kill_9(two, rng):
    first, second = two
    a = connect(first)
    data = rng.randbytes(MIB)
    a.pwrite(data, 12345)
    first.kill()
    got, took = read_when_it_can(second, MIB, 12345, TAKEN_S)
    assert got == data
    print(f"taken over after {took:.1f} s with a lease of {LEASE_MS} ms")
    assert took >= LEASE_MS / 1000 * 0.5, "it can't have known that the other is dead"
    assert owner(second) is None or owner(second)["pid"] == second.pid
    first.volumes = {}
    first.start()
    assert connect(first).pread(MIB, 12345) == data


def test_G1_a_death_on_the_same_machine_is_known_at_once(two, rng):
    first, _ = two
    a = connect(first)
    data = rng.randbytes(MIB)
    a.pwrite(data, 12345)
    first.restart("kill")
    got, took = read_when_it_can(first, MIB, 12345, TAKEN_S)
    assert got == data and took < 1 * SLOW, f"{took:.1f} s"


def test_clean_stop_needs_no_lease(two, rng):
    first, second = two
    a = connect(first)
    data = rng.randbytes(MIB)
    a.pwrite(data, 12345)
    first.stop()
    got, took = read_when_it_can(second, MIB, 12345, TAKEN_S)
    assert got == data and took < 1 * SLOW, f"{took:.1f} s"
    first.start()


def test_commands_after_kill_9(two, rng):
    """They take over from a dead gateway as another one would, after its lease."""
    first, second = two
    first.cli("create", "w", "1M")
    clients = [connect(first), connect(first, "w")]
    for h in clients:
        h.pwrite(b"1" * 4096, 0)
    first.kill()
    second.cli("resize", "v", "70M", limit_s=60 * SLOW)
    second.cli("remove", "w", "--yes", limit_s=60 * SLOW)
    h = connect(second)
    assert h.get_size() == 70 * MIB and h.pread(4096, 0) == b"1" * 4096
    h.shutdown()
    first.volumes = {}
    first.start()


def test_G4_stopped_owner_is_fenced(two, rng):
    """It was stopped for longer than its lease; when it goes on it neither writes nor answers,
    not even a read that it has in its cache. Then it begins a new incarnation and serves."""
    first, second = two
    a = rawnbd.connect(first, "v", timeout_s=30 * SLOW)
    data = rng.randbytes(70000)
    a.write(999, data)
    assert a.read(999, 512) == data[:512]
    os.kill(first.pid, signal.SIGSTOP)
    try:
        got, took = read_when_it_can(second, len(data), 999, TAKEN_S)
        assert got == data
        print(f"taken over after {took:.1f} s with a lease of {LEASE_MS} ms")
        b = connect(second)
        b.pwrite(b"new" + bytes(509), 999)
        # They lie in its socket until it wakes up.
        a.request(rawnbd.CMD_READ, 999, 512)
        a.request(rawnbd.CMD_WRITE, 0, payload=b"bad" + bytes(509))
    finally:
        os.kill(first.pid, signal.SIGCONT)
    with pytest.raises(rawnbd.Closed):
        a.any_result()
    assert b.pread(512, 0) == bytes(512)
    assert b.pread(3, 999) == b"new"
    b.shutdown()
    first.check_alive()
    got, _ = read_when_it_can(first, 3, 999, TAKEN_S)
    assert got == b"new"
    h = connect(first)
    h.pwrite(b"again" + bytes(507), 0)
    h.shutdown()
    assert connect(second).pread(5, 0) == b"again"


def test_G4_forced_double_open_is_refused_by_the_owner_key(two):
    """A second gateway that does not wait for the lease: the first one's next commit fails its
    check, its client gets no answer, and the log says why."""
    first, second = two
    a = rawnbd.connect(first, "v", timeout_s=30 * SLOW)
    a.write(0, b"first" + bytes(507))
    second.stop()
    second.env["FDB_NBD_TEST_SKIP_LEASE"] = "1"
    second.start()
    began = time.monotonic()
    # A write keeps the first one busy, so that it does not hand the volume over by itself.
    stop = threading.Event()
    answered = []

    def busy():
        n = 0
        try:
            while not stop.is_set():
                a.write(4096, n.to_bytes(4, "big") * 128)
                answered.append(time.monotonic())
                n += 1
        except (rawnbd.Closed, rawnbd.NbdError, OSError) as e:
            answered.append(e)
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        b = rawnbd.connect(second, "v", timeout_s=30 * SLOW)
        b.write(0, b"second" + bytes(506))
        taken = time.monotonic()
        print(f"taken by force after {taken - began:.2f} s")
        wait_until(lambda: not thread.is_alive(), 30 * SLOW, "the loser ends its connection")
    finally:
        stop.set()
        thread.join()
    end = answered.pop()
    assert isinstance(end, (rawnbd.Closed, OSError)), f"answered: {end}\n{first.log_tail()}"
    late = [t for t in answered if t > taken]
    assert not late, f"{len(late)} writes answered after the other had written"
    assert b.read(0, 6) == b"second"
    # What the loser had answered is there (G1).
    assert b.read(4096, 4) == (len(answered) - 1).to_bytes(4, "big")
    log = first.log()
    assert "lost" in log or "fenced" in log or "taken" in log, first.log_tail()
    first.check_alive()
    b.close()


def test_evict_from_a_gateway_that_stands_still(two):
    """It can't answer, so the command waits like any challenger; nobody is ended."""
    first, second = two
    a = connect(first)
    a.pwrite(b"1" * 4096, 0)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second.cli("owner", "evict", "v", "--yes", limit_s=60 * SLOW)
        b = connect(second)
        assert b.pread(4096, 0) == b"1" * 4096
        b.pwrite(b"2" * 4096, 0)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    with pytest.raises(nbd.Error):
        for _ in range(100):
            a.pread(512, 0)
    first.check_alive()
    assert b.pread(4096, 0) == b"2" * 4096
    b.shutdown()


def test_other_volumes_of_a_fenced_gateway_are_free_at_once(two):
    """Whoever fenced one volume's owner has fenced its session, so nobody waits again."""
    first, second = two
    for name in ("w", "x"):
        first.cli("create", name, "1M")
    held = [connect(first, name) for name in ("v", "w", "x")]
    for h in held:
        h.pwrite(b"1" * 512, 0)
    first.kill()
    _, took = read_when_it_can(second, 512, 0, TAKEN_S)
    for name in ("w", "x"):
        got, again = read_when_it_can(second, 512, 0, TAKEN_S, name)
        assert got == b"1" * 512
        assert again < LEASE_MS / 1000 * SLOW, f"{name} took {again:.1f} s more"
    first.volumes = {}
    first.start()
