"""What a service manager is told (sd_notify), on a socket that stands for systemd's."""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest

from harness import rawnbd
from harness.server import SLOW, wait_until
from manager import Ear

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207


@pytest.fixture
def ear(folder):
    made = Ear(folder)
    yield made
    made.close()


@pytest.fixture
def service(servers, ear):
    def make(args=(), **env):
        server = servers.make({"v": "8M"}, args)
        server.env["NOTIFY_SOCKET"] = str(ear.path)
        server.env.update(env)
        return server
    return make


def test_from_the_start_to_the_end(service, ear):
    server = service()
    server.start(wait=False)
    assert ear.hears("STATUS=", server.pid) == f"STATUS=opening {server.store}"
    ear.hears("READY=1", server.pid)
    # Whoever was told so can connect at once.
    with rawnbd.connect(server, "v") as client:
        client.read(0, 512)
        line = ear.hears("STATUS=serving on ", server.pid)
        while not line.endswith("; connections: 1"):
            line = ear.hears("STATUS=serving on ", server.pid)
        assert line == f"STATUS=serving on unix:{server.socket_path} and 1 more; connections: 1"
    ear.drain()
    pid = server.pid
    server.stop()
    assert ear.hears("STOPPING=1", pid)
    # What was not asked for is not told.
    assert not [line for _, line in ear.drain() if line.startswith(("WATCHDOG", "MAINPID"))]


def test_a_server_that_cannot_start_is_never_ready(service, ear, servers):
    other = servers.start({"v": "8M"})
    server = service()
    server.port = server._fixed_port = other.port
    server.start(wait=False)
    assert server.process.wait(60 * SLOW) == 1
    server.process = None
    assert not [line for _, line in ear.drain() if line.startswith("READY")]


def test_hangup_reloads_and_ends_nothing(service, ear):
    server = service().start()
    ear.hears("READY=1", server.pid)
    with rawnbd.connect(server, "v") as client:
        for _ in range(3):
            os.kill(server.pid, signal.SIGHUP)
            ear.hears("RELOADING=1", server.pid)
            assert int(ear.hears("MONOTONIC_USEC=", server.pid).split("=")[1]) > 0
            ear.hears("READY=1", server.pid)
        client.read(0, 512)
    server.stop()


def threads_but_the_first(pid):
    return [int(t.name) for t in Path(f"/proc/{pid}/task").iterdir() if int(t.name) != pid]


def test_signs_of_life_are_those_of_all_lanes(service, ear):
    server = service(["--threads", 2], WATCHDOG_USEC="400000").start()
    ear.hears("READY=1", server.pid)
    began = time.monotonic()
    for _ in range(10):
        ear.hears("WATCHDOG=1", server.pid)
    assert time.monotonic() - began < 4 * SLOW
    # Another lane stands still while the first one goes on.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    tids = threads_but_the_first(server.pid)
    for tid in tids:
        assert libc.ptrace(PTRACE_SEIZE, tid, None, None) == 0, os.strerror(ctypes.get_errno())
        assert libc.ptrace(PTRACE_INTERRUPT, tid, None, None) == 0
        os.waitpid(tid, 0x40000000)  # __WALL
    try:
        ear.drain()
        ear.said.clear()
        ear.listen(0.2)  # one that was due may come
        ear.said.clear()
        time.sleep(1.2)  # three times what the manager would wait for
        assert ear.drain() == []
    finally:
        for tid in tids:
            libc.ptrace(PTRACE_DETACH, tid, None, None)
    ear.hears("WATCHDOG=1", server.pid)
    server.stop()


def test_signs_meant_for_another_process_are_not_given(service, ear):
    server = service(WATCHDOG_USEC="100000", WATCHDOG_PID="1").start()
    ear.hears("READY=1", server.pid)
    with rawnbd.connect(server, "v") as client:
        client.read(0, 512)
        ear.hears("STATUS=serving", server.pid)
    server.stop()
    assert not [line for _, line in ear.drain() if line.startswith("WATCHDOG")]


@pytest.mark.parametrize("env", [{}, {"WATCHDOG_USEC": "400000", "WATCHDOG_PID": "1"}])
def test_the_place_of_the_main_process_goes_over(service, ear, env):
    """serve --replace: the new one is the main process before the old one ends, and the old one's
    end is not told as the service's."""
    server = service(**env).start()
    old = server.pid
    ear.hears("READY=1", old)
    ear.drain()
    server.upgrade()
    new = server.pid
    ear.drain()
    said = [(pid, line) for pid, line in ear.said if line.startswith(("MAINPID", "READY"))]
    assert said == [(new, f"MAINPID={new}"), (new, "READY=1")], ear.said
    since = ear.said[ear.said.index((new, f"MAINPID={new}")):]
    assert not [line for pid, line in since if pid == old], "the old one speaks on"
    # systemd says nothing of a watchdog to one that it did not start as the main process; or the
    # environment names the process that was asked first.
    ear.hears("WATCHDOG=1", new)
    log = server.log()
    assert f"process {new} takes the place of this one: stopping" in log
    with rawnbd.connect(server, "v") as client:
        client.read(0, 512)
    # It ends as any.
    os.kill(new, signal.SIGTERM)
    ear.hears("STOPPING=1", new)
    wait_until(lambda: not server.running(), 60 * SLOW, "the server ends")
    server.stop()
