"""Sockets of a service manager (LISTEN_FDS, as systemd's): they stay open while the server is
restarted, so that no client is ever refused (D1, D12)."""

import socket
import stat

import pytest

from callers import Callers
from harness import history, rawnbd
from harness.load import Background, Reconnecting, Shape
from harness.server import SLOW, Server, program, wait_until

MIB = 1 << 20
# Puts the descriptors it is told where a service manager puts them, names the process that is
# meant, and becomes the server.
HAND_OVER = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 100) for n in sys.argv[1].split(",")]
for place, fd in enumerate(fds):
    os.dup2(fd, 3 + place)
os.environ.update(LISTEN_PID=sys.argv[2] or str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Activated(Server):
    """A server on sockets that the test opened: a TCP and a Unix socket."""

    def __init__(self, folder, volumes=None, args=(), *, pid="", **more):
        super().__init__(folder, volumes, args, **more)
        self.held = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.port = self._fixed_port = self.held[0].getsockname()[1]
        self.held[1].bind(str(self.socket_path))
        self.held[1].listen(100)
        self.hand_over(self.held, pid)

    def hand_over(self, files, pid=""):
        self.pass_fds = tuple(f.fileno() for f in files)
        self.prefix = ["/usr/bin/python3", "-c", HAND_OVER, ",".join(map(str, self.pass_fds)), pid]

    def command(self):
        creates = [w for name, size in self.volumes.items() for w in ("--create", f"{name}:{size}")]
        return program() + ["--store", self.store, "serve"] + creates + self.args

    def start(self, wait=True):
        assert not self.running(), "already running"
        # (The socket's file belongs to the manager.)
        self._spawn()
        if wait:
            wait_until(self._ready, 60 * SLOW, "the server accepts connections")
        return self

    def fails(self):
        self.start(wait=False)
        assert self.process.wait(60 * SLOW) == 2
        self.process = None
        return self.log()


@pytest.fixture
def activated(folder):
    made = []

    def make(*args, **more):
        made.append(Activated(folder / f"a{len(made)}", {"v": "32M"}, *args, **more))
        return made[-1]
    yield make
    for server in made:
        server.kill()
        for f in server.held:
            f.close()


def test_the_sockets_are_served_and_stay(activated):
    server = activated()
    with server:
        for address in server.addresses():
            with rawnbd.connect(server, "v", address=address) as c:
                c.write(0, b"x" * 512)
        log = server.log()
        assert f"listening on 127.0.0.1:{server.port}\n" in log
        assert f"listening on unix:{server.socket_path}\n" in log
        assert "10809" not in log, "the default address is not taken besides"
    assert stat.S_ISSOCK(server.socket_path.stat().st_mode)
    # Who comes now waits for the next server.
    with rawnbd.Client(server.addresses()[1]) as tcp, rawnbd.Client(server.addresses()[0]) as unix:
        with server:
            for c in (tcp, unix):
                c.handshake()
                c.go("v")
                assert c.read(0, 512) == b"x" * 512


@pytest.mark.limit(240)
def test_G1_restarts_under_load(activated, rng):
    """No connection is refused or reset, whenever it is made, and no write is lost."""
    server = activated().start()
    unix, tcp = server.addresses()
    shape = Shape(size=32 * MIB, ops=1 << 30, pace_us=2500, connections=8, odd=0.1, hot=0.2,
                  lengths=((512, 8), (4096, 8), (16384, 4), (65536, 2)))
    load = Reconnecting(server, "v", shape, rng, address=tcp)
    with Background(load, 200 * SLOW) as running, Callers(tcp, 2) as a, Callers(unix, 2) as b:
        for _ in range(3):
            aims = len(load.ops) + 100, load.reconnects + 8, a.calls + 20, b.calls + 20
            server.stop()
            server.start()
            wait_until(lambda: not running.running() or all(
                n >= aim for n, aim in zip((len(load.ops), load.reconnects, a.calls, b.calls),
                                           aims)), 60 * SLOW, "all goes on")
            assert running.running()
    wrong = [str(op) for op in load.ops if op.answered_ns is None or op.error]
    assert not wrong, wrong[:10]
    # A server that ends closes handshakes under way; nothing else may go wrong.
    refused = [p for p in a.problems + b.problems if "Refused" in p]
    assert not refused, refused[:5]
    with rawnbd.connect(server, "v") as reader:
        history.check_death(bytes(32 * MIB), load.ops, reader.read_all())
    load.close()
    server.stop()


def test_listen_adds_addresses(activated, servers):
    more = servers.make()
    server = activated(["--listen", f"unix:{more.socket_path}"])
    with server:
        for address in [*server.addresses(), str(more.socket_path)]:
            with rawnbd.connect(server, "v", address=address) as c:
                c.read(0, 512)
    # That one is its own.
    assert not more.socket_path.exists() and server.socket_path.exists()


def test_what_is_refused(activated):
    said = activated(["--replace"]).fails()
    assert "--replace is not for the sockets of a service manager" in said, said
    server = activated()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        server.hand_over([other])
        said = server.fails()
        assert "descriptor 3 is no TCP or Unix socket that listens" in said, said


def test_sockets_meant_for_another_process_are_left_alone(activated, servers):
    more = servers.make()
    server = activated(["--listen", f"unix:{more.socket_path}"], pid="1")
    server.start(wait=False)
    wait_until(lambda: server.check_alive() or f"listening on unix:{more.socket_path}\n" in
               server.log(), 60 * SLOW, "it serves")
    assert str(server.port) not in server.log()
    server.stop()
