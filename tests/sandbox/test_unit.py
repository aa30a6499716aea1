"""The service's sandbox without systemd: nothing that it refuses is needed, or as much as tried.

(Under systemd itself, and with exactly its sandbox: tests/package/test_package.py.)
"""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cluster import Cluster
from harness.gateway import gateway
from harness.server import REPO
from life import GROUP, USER

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's server")
UNIT = REPO / "packaging/fdb-nbd.service.in"
CONFINE = Path(__file__).resolve().parent / "confine.py"


def confined(*writable):
    return [sys.executable, CONFINE, UNIT, f"{USER}:{GROUP}", *writable, "--"]


def lives(life, server, rng):
    with server:
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert "Seccomp:\t2\n" in status and "CapEff:\t0000000000000000\n" in status
        life.whole(server, rng, server.cli)
        server.upgrade()
        life.by_key(server).shutdown()
        server.cli("drain", "--control", life.control(server))


def test_the_whole_life_under_its_filter(servers, life, rng):
    server = servers.make({"v": "64M", "w": "8M"}, life.args(), store=life.store, env=life.env())
    server.prefix = [str(w) for w in confined(life.store, life.run, server.folder)]
    life.owned_by(USER, GROUP)
    lives(life, server, rng)


@pytest.mark.fdb
def test_the_whole_life_on_foundationdb(folder, life, rng):
    life.store_is_embedded = False
    with Cluster() as cluster:
        # (Its user reads its file.)
        Path(cluster.folder).chmod(0o755)
        server = gateway(cluster, folder / "g", {"v": "64M", "w": "8M"}, life.args(),
                         env=life.env())
        server.prefix = [str(w) for w in confined(life.run, server.folder)]
        life.owned_by(USER, GROUP)
        lives(life, server, rng)


TRIED = """
import ctypes, mmap, os, socket, sys
libc = ctypes.CDLL(None)
for name, tried in (
        ("unix", lambda: socket.socket(socket.AF_UNIX)),
        ("inet6", lambda: socket.socket(socket.AF_INET6)),
        ("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
        ("w^x", lambda: mmap.mmap(-1, 4096, prot=7)),
        ("fifo", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
        ("userns", lambda: libc.unshare(0x10000000)),
        ("mount", lambda: libc.mount(b"a", b"/", None, 32, None)),
        ("ptrace", lambda: libc.ptrace(0, 0, 0, 0)),
        ("chroot", lambda: os.chroot("/")),
        ("inside", lambda: os.open(sys.argv[1] + "/file", os.O_CREAT)),
        ("outside", lambda: os.open(sys.argv[2] + "/file", os.O_CREAT))):
    pid = os.fork()
    if not pid:
        try:
            tried()
        except OSError as e:
            os._exit(e.errno)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_the_sandbox_itself(folder):
    """What is tested in here is confined."""
    folder.chmod(0o755)
    for name in "writable", "other":
        (folder / name).mkdir()
        os.chown(folder / name, USER, GROUP)
    words = [*confined(folder / "writable"), "/usr/bin/python3", "-c", TRIED, folder / "writable",
             folder / "other"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=60)
    ended = dict(line.split() for line in done.stdout.splitlines())
    killed = str(-signal.SIGSYS)
    assert ended == {"unix": "0", "inet6": "0", "netlink": killed, "w^x": killed, "fifo": killed,
                     "userns": killed, "mount": killed, "ptrace": killed, "chroot": killed,
                     "inside": "0", "outside": str(errno.EROFS)}, done
