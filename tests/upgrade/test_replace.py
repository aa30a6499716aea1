"""serve --replace: a new process on the addresses of the one that serves there (D1, D12).

The old one ends by itself when it has answered what was under way; clients that reconnect go
on at the new one, lose nothing that was answered (G1) and see no error.
"""

import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from callers import Callers
from harness import history, rawnbd
from harness.load import Background, Reconnecting, Shape, longest_pause_s
from harness.server import SLOW, wait_until

MIB = 1 << 20
SHAPE = dict(size=32 * MIB, ops=1 << 30, pace_us=2500,
             lengths=((512, 8), (4096, 8), (16384, 4), (65536, 2)), odd=0.1, hot=0.2)


@pytest.mark.limit(240)
@pytest.mark.parametrize("way", ["tcp", "unix"])
@pytest.mark.parametrize("threads", [1, 3])
def test_G1_upgrades_under_load(servers, rng, way, threads):
    """Several in a row, under many busy connections to two volumes."""
    server = servers.start({"v": "32M", "w": "32M"}, ["--threads", threads])
    address = server.addresses()[way == "tcp"]
    before = bytes(32 * MIB)
    loads = [Reconnecting(server, name, Shape(**SHAPE, connections=n), rng, address=address)
             for name, n in (("v", 12), ("w", 3))]
    lived_s = []
    with Background(loads[0], 200 * SLOW) as v, Background(loads[1], 200 * SLOW) as w:
        for _ in range(4):
            aims = [(load, len(load.ops) + 100, load.reconnects + load.shape.connections)
                    for load in loads]
            lived_s.append(server.upgrade())
            wait_until(lambda: not (v.running() and w.running())
                       or all(len(load.ops) > n and load.reconnects >= m for load, n, m in aims),
                       60 * SLOW, "all connections are made again, and the load goes on")
            assert v.running() and w.running()
    pauses_s = [longest_pause_s(load.ops) for load in loads]
    print(f"from the start of the new to the end of the old: {[round(s, 2) for s in lived_s]} s; "
          f"longest pauses: {[round(s, 2) for s in pauses_s]} s")
    for load, name in zip(loads, ("v", "w")):
        wrong = [str(op) for op in load.ops if op.answered_ns is None or op.error]
        assert not wrong, wrong[:10]
        with rawnbd.connect(server, name) as reader:
            history.check_death(before, load.ops, reader.read_all())
        load.close()
    assert max(pauses_s) < 5 * SLOW


def test_no_connection_is_lost_between_the_two(servers):
    """Clients that connect all the time are all served, by the old one or the new one: their
    connections are neither refused nor reset nor closed during the handshake."""
    server = servers.start({"v": "1M"})
    unix, tcp = server.addresses()
    with Callers(tcp, 4) as a, Callers(unix, 2) as b:
        for _ in range(4):
            now = a.calls, b.calls
            server.upgrade()
            wait_until(lambda: a.calls > now[0] + 50 and b.calls > now[1] + 50, 60 * SLOW, "calls")
    print(f"{a.calls} over TCP, {b.calls} over a Unix socket")
    assert not a.problems and not b.problems, (a.problems[:5], b.problems[:5])


def test_server_that_ends_while_it_waits_for_a_volume(servers):
    """Its clients see a closed connection, not an error: they will find the volume elsewhere."""
    first = servers.start({"v": "16M"})
    second = servers.start(store=first.store)
    a = rawnbd.connect(first, "v")
    a.write(0, b"a" * 512)  # the volume is the first server's from here on
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            a.write(0, b"a" * 512)
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with rawnbd.connect(second, "v") as b:
            b.request(rawnbd.CMD_TRIM, 0, 1 << 20)
            b.request(rawnbd.CMD_WRITE, 512, payload=b"b" * 512)
            b.request(rawnbd.CMD_READ, 0, 512)
            b.expect_silent(0.5)
            took = time.monotonic()
            second.stop()
            took = time.monotonic() - took
            b.expect_closed()
    finally:
        stop.set()
        thread.join()
    assert took < 2 * SLOW
    assert a.read(0, 1024) == b"a" * 512 + bytes(512)
    a.close()


# --- what is refused, and what is not ------------------------------------------------------------


def start_like(server, *more, prefix=()):
    """Runs another server with that one's command line to its end, which is to be a failure;
    gives what it said."""
    done = subprocess.run([*prefix, *server.command(), *more], capture_output=True, text=True,
                          timeout=60 * SLOW, env=dict(os.environ, **server.store_env))
    assert done.returncode == 1, done
    return done.stderr


def serves(server):
    server.check_alive()
    for address in server.addresses():
        with rawnbd.connect(server, "v", address=address) as c:
            c.read(0, 512)
    return True


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_a_second_server_is_refused_without_replace(servers, way):
    server = servers.start({"v": "1M"}, tcp=way == "tcp", unix=way == "unix")
    pid = server.pid
    assert "in use" in start_like(server)
    assert serves(server)
    # An address that was taken over is as safe.
    server.upgrade()
    assert server.pid != pid
    assert "in use" in start_like(server)
    assert serves(server)


def test_replace_where_nobody_serves(servers):
    """A plain start; also where a socket file was left behind."""
    server = servers.start({"v": "1M"}, ["--replace"])
    assert serves(server) and "replac" not in server.log()
    server.kill()
    assert server.socket_path.exists()
    server._spawn()
    wait_until(server._ready, 60 * SLOW, "it serves")
    assert serves(server)


@pytest.mark.parametrize("way,shares", [("tcp", False), ("tcp", True), ("unix", False)])
def test_another_program_is_not_replaced(servers, way, shares):
    server = servers.make({"v": "1M"}, tcp=way == "tcp", unix=way == "unix")
    with socket.socket(socket.AF_INET if way == "tcp" else socket.AF_UNIX) as other:
        if shares:
            # The kernel would let us listen there too.
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if way == "tcp":
            other.bind(("127.0.0.1", 0))
            server.port = other.getsockname()[1]
        else:
            other.bind(str(server.socket_path))
        other.listen()
        said = start_like(server, "--replace")
        wrong = [line for line in said.splitlines() if " info: " not in line]
        assert len(wrong) == 1 and "cannot listen" in wrong[0], said
        if way == "tcp":
            said = start_like(server, "--listen", f":{server.port}", "--replace")
            assert "cannot listen" in said, said
        # Nothing changed for it.
        with socket.socket(other.family) as client:
            client.connect(other.getsockname())
            other.settimeout(10)
            other.accept()[0].close()
    assert way == "tcp" or [p.name for p in server.folder.iterdir() if p.is_socket()] == ["s"]


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_a_server_of_another_store_is_not_replaced(servers, way):
    server = servers.start({"v": "1M"}, tcp=way == "tcp", unix=way == "unix")
    other = servers.make({"v": "1M"}, tcp=way == "tcp", unix=way == "unix")
    beside = servers.start({"v": "1M"}, store=other.store)
    other.port, other.socket_path = server.port, server.socket_path
    said = start_like(other, "--replace")
    assert "no server of this store" in said, said
    assert serves(server) and serves(beside)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's server")
@pytest.mark.lmdb("about users, not stores")
@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_a_server_of_another_user_is_not_replaced(servers, folder, way):
    store = folder / "open"
    store.mkdir(mode=0o777)
    store.chmod(0o777)
    folder.chmod(0o777)
    server = servers.make({"v": "1M"}, store=store, tcp=way == "tcp", unix=way == "unix")
    server.folder.chmod(0o777)
    server.start()
    if way == "unix":
        server.socket_path.chmod(0o777)
    said = start_like(server, "--replace",
                      prefix=["setpriv", "--reuid", "65534", "--clear-groups"])
    assert "another user" in said if way == "tcp" else "may not be told to end" in said, said
    assert serves(server)
    assert way == "tcp" or [p.name for p in server.folder.iterdir() if p.is_socket()] == ["s"]


def test_who_may_connect_stays_the_same(servers):
    """The new socket file has the rights of the old one."""
    server = servers.start({"v": "1M"})
    server.socket_path.chmod(0o640)
    server.upgrade()
    assert server.socket_path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in server.folder.iterdir() if p.is_socket()] == ["s"]


def test_several_new_servers_at_once(servers):
    """One of them stays."""
    server = servers.start({"v": "1M"}, unix=False)
    old, made = server.process, []
    for _ in range(3):
        server._spawn(["--replace"])
        made.append(server.process)
    wait_until(lambda: old.poll() is not None and sum(p.poll() is None for p in made) == 1,
               60 * SLOW, "one server is left")
    server.process = next(p for p in made if p.poll() is None)
    assert old.returncode == 0
    assert serves(server)


def test_a_server_that_stands_still_is_replaced(servers, rng):
    """It can't answer, so the new one ends or fences it after its lease, as ever. No new client
    comes to it any more."""
    server = servers.start({"v": "16M"}, ["--lease-ms", 3000])
    data = rng.randbytes(65536)
    with rawnbd.connect(server, "v") as c:
        c.write(4096, data)
    old = server.process
    os.kill(old.pid, signal.SIGSTOP)
    try:
        server._spawn(["--replace"])
        wait_until(lambda: f"told process {old.pid} to end" in server.log(), 60 * SLOW, "it is told")
        for address in server.addresses() * 20:
            with rawnbd.Client(address, timeout_s=10 * SLOW) as c:
                c.handshake()
        for address in server.addresses():
            with rawnbd.connect(server, "v", address=address) as c:
                assert c.read(4096, len(data)) == data
                c.write(0, b"new" * 512)
    finally:
        os.kill(old.pid, signal.SIGCONT)
        old.wait(60 * SLOW)
    assert serves(server)
