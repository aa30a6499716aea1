"""fdb-nbd drain: a server gives its volumes back and takes no new clients, and goes on running.

Clients that connect again find the volumes at another server at once, and lose nothing that was
answered (G1).
"""

import threading
import time

import pytest

from harness import history, rawnbd
from harness.commands import owner
from harness.load import Background, Reconnecting, Shape, longest_pause_s
from harness.server import SLOW, wait_until

MIB = 1 << 20
SHAPE = dict(size=32 * MIB, ops=1 << 30, pace_us=2500,
             lengths=((512, 8), (4096, 8), (16384, 4), (65536, 2)), odd=0.1, hot=0.2)


def start(servers, *args, **more):
    server = servers.make({"v": "32M", "w": "32M"}, **more)
    server.args += ["--control", str(server.folder / "c"), *map(str, args)]
    return server.start()


def drain(server, *words, **more):
    return server.cli("drain", *words, "--control", server.folder / "c", **more)


def status(server):
    return server.json("status", "--control", server.folder / "c")["servers"][0]["server"]


def assert_refused(server):
    """Whatever a new client asks for."""
    for address in server.addresses():
        for ask in (lambda c: c.go("v"), lambda c: c.info("v"), lambda c: c.list()):
            with rawnbd.Client(address) as c:
                c.handshake()
                with pytest.raises(rawnbd.OptionError) as refused:
                    ask(c)
                assert refused.value.type == rawnbd.REP_ERR_SHUTDOWN
                assert b"no clients any more" in refused.value.data
                c.expect_closed()
        with rawnbd.Client(address) as c:
            c.handshake()
            c.send_option(rawnbd.OPT_EXPORT_NAME, b"v")
            c.expect_closed()


@pytest.mark.limit(240)
@pytest.mark.parametrize("threads", [1, 3])
def test_G1_another_server_goes_on_under_load(servers, rng, threads):
    first = start(servers, "--threads", threads)
    second = start(servers, "--threads", threads, store=first.store)
    before = bytes(32 * MIB)
    loads = [Reconnecting(first, name, Shape(**SHAPE, connections=n), rng,
                          address=str(first.socket_path)) for name, n in (("v", 6), ("w", 2))]
    with Background(loads[0], 200 * SLOW) as v, Background(loads[1], 200 * SLOW) as w:
        wait_until(lambda: all(len(load.ops) > 200 for load in loads), 60 * SLOW, "it writes")
        assert owner(first, "v")["pid"] == first.pid
        for load in loads:
            load.address = str(second.socket_path)
        drain(first, "--wait")
        now = status(first)
        assert now["draining"] and not now["ready"]
        assert now["volumes_open"] == now["volumes_owned"] == 0
        aims = [len(load.ops) + 200 for load in loads]
        wait_until(lambda: not (v.running() and w.running())
                   or all(len(load.ops) > n for load, n in zip(loads, aims)),
                   60 * SLOW, "the load goes on at the other server")
        assert v.running() and w.running()
        assert owner(first, "v")["pid"] == owner(first, "w")["pid"] == second.pid
        assert_refused(first)
    pauses_s = [longest_pause_s(load.ops) for load in loads]
    print(f"longest pauses: {[round(s, 2) for s in pauses_s]} s")
    for load, name in zip(loads, ("v", "w")):
        wrong = [str(op) for op in load.ops if op.answered_ns is None or op.error]
        assert not wrong, wrong[:10]
        with rawnbd.connect(second, name) as reader:
            history.check_death(before, load.ops, reader.read_all())
        load.close()
    assert max(pauses_s) < 5 * SLOW
    # Again is the same, and the end of the process a clean one.
    drain(first, "--wait")
    first.stop()


def test_what_is_not_finished(servers, clients):
    """Half a write is undone, as at any end of a connection; a request that waits for the volume
    of another server ends without an answer, for its client to ask there."""
    first = start(servers)
    second = start(servers, "--owner-wait", 60, store=first.store)
    half, holder = clients(second, "w"), clients(first, "v")
    half.write(0, b"x" * 65536)
    half.send(half.header(rawnbd.CMD_WRITE, 0, 65536, cookie=7) + b"y" * 4096)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            holder.write(0, b"x" * 512)
    holder.write(0, b"x" * 512)
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        waits = clients(second, "v")
        waits.request(rawnbd.CMD_TRIM, 0, 4096)
        waits.request(rawnbd.CMD_READ, 0, 512)
        waits.request(rawnbd.CMD_WRITE, 0, payload=b"z" * 512)
        waits.expect_silent(0.5)
        drain(second, "--wait")
        waits.expect_closed()
        half.expect_closed()
    finally:
        stop.set()
        thread.join()
    assert status(second)["volumes_owned"] == 0
    assert holder.read(0, 512) == b"x" * 512
    with rawnbd.connect(first, "w") as c:
        assert c.read(0, 65536) == b"x" * 65536


@pytest.mark.lmdb("about connections, not stores")
def test_a_client_that_takes_no_replies(servers, clients):
    """It is waited for as long as at the end of a process, and no longer."""
    server = start(servers)
    c = clients(server, "v")
    for _ in range(8):
        c.request(rawnbd.CMD_READ, 0, 32 * MIB)
    c.recv(4)  # it has taken them
    drain(server)
    assert not status(server)["drained"]
    began = time.monotonic()
    drain(server, "--wait")
    assert 5 < time.monotonic() - began < 15 * SLOW
    assert status(server)["volumes_open"] == 0


def test_several_servers_at_once(servers):
    first, second = start(servers), start(servers)
    done = first.cli("drain", "--control", first.folder / "c", "--control", second.folder / "c",
                     "--wait")
    assert done.stdout.count("all volumes are given back") == 2
    assert status(first)["draining"] and status(second)["draining"]
