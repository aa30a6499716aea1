"""Each change to a volume is in a log, with who made it: in that of the server that made it for
a command, and in the system's where the command made it itself."""

import os
import pwd
import re
import socket
import subprocess

import pytest

from harness import rawnbd
from harness.server import CLI_LIMIT_S, Server, program

ME = pwd.getpwuid(os.geteuid()).pw_name


def run_with_dev(server, made, *words):
    """Runs a command with a /dev of its own, in which `made` made something."""
    script = ("mount -t tmpfs none /dev; mknod /dev/null c 1 3; mknod /dev/urandom c 1 9; "
              f'{made}; exec "$@"')
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script, "sh", *program(), "--store", server.store,
         *words], env={**os.environ, **server.env}, capture_output=True, text=True,
        timeout=CLI_LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def system_log(folder):
    """Takes what commands send to /dev/log, in a /dev of their own; run(words) runs one there."""
    if os.geteuid() != 0:
        pytest.skip("only root gives a command another /dev")
    path = folder / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(str(path))
        s.setblocking(False)

        def run(server, *words):
            run_with_dev(server, f"ln -s {path} /dev/log", *words)
            lines = []
            try:
                while True:
                    lines.append(s.recv(4096).decode())
            except BlockingIOError:
                return lines

        yield run


@pytest.mark.lmdb("about commands, which are the same on all")
def test_commands_tell_the_system(folder, system_log):
    server = Server(folder / "s", {"v": "1M"})
    for words, told in (
            (("create", "w", "1M"), 'created volume "w" of 1M'),
            (("rename", "w", "x"), 'renamed volume "w" to "x"'),
            (("resize", "x", "2M"), 'resized volume "x"'),
            (("snapshot", "create", "x@a"), 'created snapshot "x@a"'),
            (("snapshot", "rename", "x@a", "b"), 'renamed snapshot "x@a" to "b"'),
            (("clone", "x@b", "y"), 'cloned "x@b" to volume "y"'),
            (("flatten", "y"), 'flattened volume "y"'),
            (("snapshot", "rollback", "x@b", "--yes"), 'rolled volume "x" back to "b"'),
            (("snapshot", "remove", "x@b"), 'removed snapshot "x@b"'),
            (("remove", "x", "--yes"), 'removed volume "x"'),
            (("list",), None)):
        lines = system_log(server, *words)
        assert len(lines) == (told is not None), lines
        if told:
            assert re.search(rf"fdb-nbd\[\d+\]: audit: {ME}.*, process \d+ on "
                             rf"{socket.gethostname()}, ", lines[0]), lines
            assert told in lines[0] and server.store in lines[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a command another /dev")
@pytest.mark.lmdb("about commands, which are the same on all")
def test_without_a_system_log_commands_tell_whoever_asks(folder):
    server = Server(folder / "s", {"v": "1M"})
    assert run_with_dev(server, "true", "create", "w", "1M").stderr == ""
    said = run_with_dev(server, "true", "--log-level", "info", "create", "x", "1M").stderr
    assert re.search(rf'info: audit: {ME}.*, process \d+ on {socket.gethostname()}, '
                     r'created volume "x"', said), said


def test_a_server_tells_whom_it_obeyed(folder):
    with Server(folder / "s", {"v": "1M"}) as server:
        assert f"audit: {ME}" in server.log() and 'created volume "v"' in server.log()
        with rawnbd.connect(server, "v") as c:
            c.write(0, b"x" * 512)
            server.cli("resize", "v", "2M")
            server.cli("snapshot", "create", "v@a")
            server.cli("snapshot", "rename", "v@a", "b")
            server.cli("snapshot", "remove", "v@b")
            server.cli("owner", "evict", "v", "--yes")
            c.expect_closed()
        lines = [x for x in server.log().splitlines() if "audit: " in x]
        told = [x for x in lines if re.search(rf"audit: \S+ pid \d+ user {ME}: ", x)]
        for what in (f'resized volume "v" to {2 << 20} bytes', 'created snapshot "v@a"',
                     'renamed snapshot "v@a" to "b"', 'removed snapshot "v@b"',
                     'evicted volume "v"'):
            assert sum(what in x for x in told) == 1, (what, lines)
