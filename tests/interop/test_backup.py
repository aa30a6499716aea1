"""A nightly backup as its user runs it: the scripts of docs/operations.md, as they stand there, on a
volume that is written meanwhile; full, then what changed; restored, and compared."""

import os
import re
import shlex
import shutil
import subprocess
import threading

import pytest

from harness import stores
from harness.rawnbd import connect
from harness.server import REPO, SLOW, program

nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")

MIB = 1 << 20
SIZE = 12 * MIB + 5 * 512
NIGHTS = 4
SCRIPT_LIMIT_S = 60 * SLOW


def need(*programs):
    for name in programs:
        if not shutil.which(name):
            pytest.skip(f"{name} is not installed")


class Scripts:
    """The scripts of the guide, and an fdb-nbd in their PATH that finds its store."""

    def __init__(self, folder, store):
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.env = dict(os.environ, **stores.env(), PATH=f"{self.bin}:{os.environ['PATH']}")
        self.use(store)
        guide = (REPO / "docs" / "operations.md").read_text()
        for text in re.findall(r"^```sh\n(#!/bin/sh.*?)^```$", guide, re.M | re.S):
            name = re.match(r"#!.*\n# ([\w-]+\.sh) ", text).group(1)
            self._write(self.bin / name, text)

    def use(self, store):
        self._write(self.bin / "fdb-nbd",
                    f"#!/bin/sh\nexec {shlex.join([*program(), '--store', store])} \"$@\"\n")

    @staticmethod
    def _write(path, text):
        path.write_text(text)
        path.chmod(0o755)

    def run(self, name, *words, check=True):
        done = subprocess.run([str(self.bin / name), *(str(w) for w in words)], env=self.env,
                              capture_output=True, text=True, timeout=SCRIPT_LIMIT_S,
                              stdin=subprocess.DEVNULL)
        if check:
            assert done.returncode == 0, f"{name} gave {done.returncode}\n{done.stdout}{done.stderr}"
        return done


@pytest.fixture
def scripts(folder, server):
    return Scripts(folder, server.store)


@pytest.fixture
def server(servers):
    return servers.start({"disk": SIZE})


@pytest.fixture
def backups(folder):
    (folder / "backups").mkdir()
    return folder / "backups"


class Client:
    """Writes all the time, also while the backup is made."""

    def __init__(self, server, rng):
        self.handle = nbd.NBD()
        self.handle.connect_uri(server.uri("disk"))
        self.rng = rng
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._go_on, daemon=True)
        self.writes = 0

    def write(self, n=25):
        for _ in range(n):
            length = self.rng.choice([512, 4096, 30000, 200000])
            at = self.rng.randrange(SIZE - length)
            kind = self.rng.randrange(6)
            if kind == 0:
                self.handle.trim(length, at)
            elif kind == 1:
                self.handle.zero(length, at)
            else:
                self.handle.pwrite(self.rng.randbytes(length), at)
        self.handle.flush()

    def _go_on(self):
        while not self.stopped.is_set():
            self.write(2)
            self.writes += 1
            # As busy as a disk at night.
            self.stopped.wait(0.02)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *unused):
        self.stopped.set()
        self.thread.join()
        self.handle.shutdown()


def content(server, name):
    with connect(server, name, structured=True) as c:
        return bytes(c.read_all())


def names(server, volume):
    return [s["name"] for s in server.json("snapshot", "list", volume)["snapshots"]]


def in_another_second(scripts, *words):
    """The scripts name snapshots by the second, which a night is longer than."""
    done = scripts.run(*words, check=False)
    for _ in range(100):
        if done.returncode == 0 or "already" not in done.stderr:
            break
        threading.Event().wait(0.1)
        done = scripts.run(*words, check=False)
    assert done.returncode == 0, f"{words} gave {done.returncode}\n{done.stdout}{done.stderr}"


def nights(server, rng, run):
    """Runs a backup NIGHTS times under a client; gives what the volume held, by the snapshot's
    name, read over NBD."""
    held = {}
    for n in range(NIGHTS):
        with Client(server, rng) as client:
            client.write()
            run()
            assert client.writes > 0
        now = names(server, "disk")
        assert len(now) == 1 and now[0] not in held, "one snapshot is kept, for the next night"
        held[now[0]] = content(server, f"disk@{now[0]}")
    assert len(set(held.values())) == NIGHTS
    return held


@pytest.mark.limit(300)
def test_nightly_streams(server, servers, scripts, backups, folder, rng):
    held = nights(server, rng, lambda: in_another_second(scripts, "nightly.sh", "disk", backups))
    files = sorted(backups.iterdir())
    assert [f.name for f in files] == [f"{name}.stream" for name in held]

    # Into another store, and into a new volume of the same.
    target = servers.start({"first": "1M"})
    scripts.use(target.store)
    scripts.run("restore.sh", backups, "again")
    assert names(target, "again") == list(held)
    for name, data in held.items():
        assert content(target, f"again@{name}") == data
    assert content(target, "again") == list(held.values())[-1]
    scripts.use(server.store)
    scripts.run("restore.sh", backups, "beside")
    assert content(server, "beside") == list(held.values())[-1]
    # Once more: it is there.
    done = scripts.run("restore.sh", backups, "beside", check=False)
    assert done.returncode == 1 and "already" in done.stderr
    assert content(server, "beside") == list(held.values())[-1]


def test_a_night_that_fails_is_made_up_for(server, scripts, backups, rng):
    with Client(server, rng) as client:
        client.write()
        in_another_second(scripts, "nightly.sh", "disk", backups)
    first = names(server, "disk")
    # There is no room, say: the file can't be made.
    done = scripts.run("nightly.sh", "disk", backups / "none", check=False)
    assert done.returncode != 0 and names(server, "disk") == first
    with Client(server, rng) as client:
        client.write()
    in_another_second(scripts, "nightly.sh", "disk", backups)
    assert len(names(server, "disk")) == 1 and names(server, "disk") != first
    scripts.run("restore.sh", backups, "again")
    assert content(server, "again") == content(server, "disk")


@pytest.mark.limit(300)
def test_nightly_qcow2(server, scripts, backups, folder, rng):
    need("qemu-img", "qemu-io", "nbdinfo")
    held = nights(server, rng, lambda: in_another_second(
        scripts, "nightly-qcow2.sh", "disk", backups, server.socket_path))
    files = sorted(backups.iterdir())
    assert [f.name for f in files] == [f"{name}.qcow2" for name in held]
    for file, (name, data) in zip(files, held.items()):
        image = folder / "image"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", file, image], check=True)
        assert image.read_bytes() == data, name
    scripts.run("restore-qcow2.sh", files[-1], "again", server.socket_path)
    assert content(server, "again") == list(held.values())[-1]


def test_a_raw_image_with_nbdcopy(server, folder, rng):
    need("nbdcopy")
    with Client(server, rng) as client:
        client.write()
        server.cli("snapshot", "create", "disk@monday")
        data = content(server, "disk@monday")
        for words in (["nbdcopy", server.uri("disk@monday"), folder / "a.img"],
                      [*program(), "--store", server.store, "export", "disk@monday",
                       folder / "b.img"]):
            subprocess.run(words, check=True, timeout=SCRIPT_LIMIT_S, capture_output=True,
                           env=dict(os.environ, **stores.env()))
    assert (folder / "a.img").read_bytes() == (folder / "b.img").read_bytes() == data
    # And back.
    server.cli("create", "again", SIZE)
    subprocess.run(["nbdcopy", folder / "a.img", server.uri("again")], check=True,
                   timeout=SCRIPT_LIMIT_S)
    assert content(server, "again") == data
