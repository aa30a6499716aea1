"""Export, import and diff: images, the stream that carries a volume's history, and what happens
when it is damaged, does not fit, or the command dies in the middle."""

import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import time

import nbd
import pytest

from harness import cluster, stores
from harness.server import CLI_LIMIT_S, SLOW, program, wait_until

DONE, FAILED, USAGE, NOTFOUND, STORE = range(5)
MIB = 1 << 20
BLOCK = 16384
# What a command has to say it in: the lease of one that died, and more.
LONG_S = 120


class Store:
    """A store and the commands on it."""

    def __init__(self, path, uri=None, env=None):
        self.path = path
        self.uri = uri or stores.uri(path)
        self.env = stores.env() if env is None else env

    def words(self, *words):
        return [*program(), "--store", self.uri, *(str(w) for w in words)]

    def start(self, *words, **more):
        return subprocess.Popen(self.words(*words), env=dict(os.environ, **self.env),
                                **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                                   "stderr": subprocess.PIPE, **more})

    def run(self, *words, status=DONE, stdin=b""):
        done = subprocess.run(self.words(*words), input=stdin, capture_output=True,
                              timeout=CLI_LIMIT_S, env=dict(os.environ, **self.env))
        said = done.stderr.decode()
        assert done.returncode == status, f"{words} gave {done.returncode}, not {status}\n{said}"
        if status != DONE:
            assert said.startswith("fdb-nbd: ") and said.count("\n") == 1, said
        return done

    def refused(self, *words, status=FAILED, stdin=b""):
        return self.run(*words, status=status, stdin=stdin).stderr.decode()

    def json(self, *words):
        return json.loads(self.run("--json", *words).stdout)

    def volumes(self):
        return [v["name"] for v in self.json("list")["volumes"]]

    def snapshots(self, volume):
        return [s["name"] for s in self.json("snapshot", "list", volume)["snapshots"]]

    def created(self, volume):
        return {s["name"]: s["created"] for s in self.json("snapshot", "list", volume)["snapshots"]}

    def content(self, name):
        return self.run("export", name, "-").stdout

    def import_bytes(self, name, data, *more, status=DONE):
        return self.run("import", "-", name, *more, status=status, stdin=bytes(data))


@pytest.fixture
def store(folder):
    return Store(folder / "store")


@pytest.fixture
def other(folder):
    return Store(folder / "other")


def image(rng, size, share=0.3):
    """Bytes with holes, zeros, and data that shrinks or does not."""
    data = bytearray(size)
    at = 0
    while at < size:
        length = min(rng.choice([100, 5000, 70000, 400000]), size - at)
        if rng.random() < share:
            data[at:at + length] = (rng.randbytes(length) if rng.random() < 0.5 else
                                    rng.randbytes(1) * length)
        at += length
    return data


class Writer:
    """Changes a volume of a server as a client does, and knows what it must hold."""

    def __init__(self, server, name, rng, data):
        self.server, self.name, self.rng, self.data = server, name, rng, data

    def some(self, n=15):
        handle = nbd.NBD()
        handle.connect_uri(self.server.uri(self.name))
        size = len(self.data)
        for _ in range(n):
            at = self.rng.randrange(size)
            length = min(self.rng.choice([1, 700, 16384, 90000, 300000]), size - at)
            kind = self.rng.choice(["write", "write", "zero", "trim"])
            if kind == "write":
                new = self.rng.randbytes(length)
                handle.pwrite(new, at)
            elif kind == "zero":
                new = bytes(length)
                handle.zero(length, at, flags=self.rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
            else:
                new = bytes(length)
                handle.trim(length, at)
            self.data[at:at + length] = new
        handle.flush()
        handle.shutdown()


class History:
    """A volume of a server with snapshots: what each holds."""

    def __init__(self, servers, store, rng, n, size=6 * MIB, resizes=True):
        self.states = {}
        self.store = store
        store.import_bytes("disk", image(rng, size))
        data = bytearray(store.content("disk"))
        server = servers.start(store=store.path)
        writer = Writer(server, "disk", rng, data)
        for i in range(n):
            if resizes and i:
                new = (size + rng.randrange(-2 * MIB, 2 * MIB)) // 512 * 512
                server.cli("resize", "disk", new, "--shrink", "--yes")
                del writer.data[new:]
                writer.data.extend(bytes(new - len(writer.data)))
            writer.some()
            server.cli("snapshot", "create", f"disk@s{i}")
            self.states[f"s{i}"] = bytes(writer.data)
        writer.some()
        self.head = bytes(writer.data)
        server.stop()

    def check(self, store, name, upto=None, head=True):
        names = list(self.states)[:upto]
        assert store.snapshots(name) == names
        for snapshot in names:
            assert store.content(f"{name}@{snapshot}") == self.states[snapshot], snapshot
        if head:
            assert store.content(name) == self.head


# --- images -----------------------------------------------------------------------------------


def test_image_and_back(store, folder, rng):
    data = image(rng, 5 * MIB + 777)
    path, back = folder / "a.img", folder / "b.img"
    path.write_bytes(data)
    store.run("import", path, "disk")
    whole = bytes(data) + bytes(-len(data) % 512)
    done = store.run("export", "disk", back)
    assert b"exported disk" in done.stdout and done.stderr == b""
    assert back.read_bytes() == whole
    assert store.content("disk") == whole
    assert store.json("info", "disk")["size_bytes"] == len(whole)
    assert os.listdir(folder).count("b.img") == 1
    assert not [name for name in os.listdir(folder) if "partial" in name]
    assert store.snapshots("disk") == []


def test_holes_stay_holes(store, folder, rng):
    path, back = folder / "a.img", folder / "b.img"
    with open(path, "wb") as f:
        f.truncate(1 << 40)
        f.seek(700 << 30)
        f.write(rng.randbytes(100000))
    store.run("import", path, "disk")
    info = store.json("info", "disk")
    assert info["size_bytes"] == 1 << 40 and info["used_bytes"] <= 8 * BLOCK
    store.run("export", "disk", back)
    assert back.stat().st_size == 1 << 40 and back.stat().st_blocks * 512 < MIB
    with open(path, "rb") as a, open(back, "rb") as b:
        for f in (a, b):
            f.seek((700 << 30) - 1000)
        assert a.read(200000) == b.read(200000)


def test_zeros_take_no_space(store):
    store.import_bytes("disk", bytes(3 * MIB) + b"x" * 100 + bytes(3 * MIB))
    assert store.json("info", "disk")["used_bytes"] == BLOCK


def test_pipes_need_not_say_how_long_they_are(store, rng):
    # More than the first guess of the import, and not a multiple of anything.
    data = bytes(70 * MIB) + rng.randbytes(100001) + bytes(70 * MIB + 1) + b"end"
    store.import_bytes("disk", data)
    assert store.content("disk") == data + bytes(-len(data) % 512)


def test_an_image_while_clients_write(store, servers, folder, rng):
    """Whoever has it in use: all that was answered before the command is in it."""
    store.import_bytes("disk", image(rng, 4 * MIB))
    server = servers.start(store=store.path)
    writer = Writer(server, "disk", rng, bytearray(store.content("disk")))
    handle = nbd.NBD()
    handle.connect_uri(server.uri("disk"))
    for _ in range(3):
        writer.some(5)
        assert store.content("disk") == bytes(writer.data)
    assert store.snapshots("disk") == []
    handle.shutdown()


def test_files_are_not_overwritten(store, folder):
    store.import_bytes("disk", b"a" * 512)
    path = folder / "f"
    path.write_bytes(b"mine")
    assert "--force" in store.refused("export", "disk", path)
    assert path.read_bytes() == b"mine"
    store.run("export", "disk", path, "--force")
    assert path.read_bytes() == b"a" * 512
    link = folder / "link"
    link.symlink_to(path)
    store.import_bytes("two", b"b" * 512)
    store.run("export", "two", link, "--force")
    assert link.is_symlink() and path.read_bytes() == b"b" * 512


def waits_to_open(pid):
    with open(f"/proc/{pid}/wchan") as f:
        return f.read() in ["fifo_open", "wait_for_partner"]


def test_files_that_cannot_be(store, folder):
    store.run("create", "disk", "64T")
    (folder / "link").symlink_to(folder / "nothing")
    for force in [[], ["--force"]]:
        assert "is a link to" in store.refused("export", "disk", folder / "link", *force)
        assert "empty" in store.refused("export", "disk", "", *force, status=USAGE)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    process = store.start("export", "disk", folder / "large", preexec_fn=limit)
    said = process.communicate(timeout=CLI_LIMIT_S)[1].decode()
    assert process.returncode == FAILED and said.count("\n") == 1 and "--stream writes" in said, said
    store.run("export", "disk", folder / "small", "--stream")
    os.mkfifo(folder / "pipe")
    process = store.start("export", "disk", folder / "pipe")
    wait_until(lambda: waits_to_open(process.pid), CLI_LIMIT_S, "it waits for a reader")
    assert end(process, signal.SIGTERM, FAILED) == "fdb-nbd: interrupted; run it again\n"
    assert "diff" in store.refused("export", "disk", "-", "--since", "p@1", status=USAGE)
    assert store.snapshots("disk") == []
    assert not any("partial" in name or name == "large" for name in os.listdir(folder))


def test_what_fails_leaves_no_file(store, folder):
    store.import_bytes("disk", b"a" * 512)
    before = set(os.listdir(folder))
    store.refused("export", "dusk", folder / "f", status=NOTFOUND)
    store.refused("export", "disk@none", folder / "f", status=NOTFOUND)
    store.refused("export", "disk", folder / "f", "--since", "none", status=NOTFOUND)
    store.refused("export", "disk", folder / "none" / "f")
    assert set(os.listdir(folder)) == before
    assert store.snapshots("disk") == []


def test_devices_are_written_in_place(store, folder, rng):
    backing = folder / "backing"
    backing.write_bytes(b"\xff" * (2 * MIB))
    made = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True,
                          text=True)
    if made.returncode:
        pytest.skip(f"no loop devices on this machine: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        data = bytes(image(rng, MIB))
        store.import_bytes("disk", data)
        store.import_bytes("large", bytes(3 * MIB))
        assert "--force" in store.refused("export", "disk", device)
        assert "bytes" in store.refused("export", "large", device, "--force")
        store.run("export", "disk", device, "--force")
        # The kernel's cache of the device, not of the file, was written.
        with open(device, "rb") as f:
            assert f.read() == data + b"\xff" * MIB
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_names_that_are_taken(store, servers, rng):
    store.import_bytes("disk", b"old" * 512)
    assert "--force" in store.import_bytes("disk", b"new", status=FAILED).stderr.decode()
    assert store.content("disk")[:3] == b"old"
    store.run("snapshot", "create", "disk@s")
    store.run("clone", "disk@s", "copy")
    said = store.import_bytes("disk", b"new", "--force", status=FAILED).stderr.decode()
    assert '"copy"' in said
    store.run("remove", "copy", "--yes")
    server = servers.start(store=store.path)
    handle = nbd.NBD()
    handle.connect_uri(server.uri("disk"))
    handle.pwrite(b"x" * 512, 0)
    said = store.import_bytes("disk", b"new", "--force", status=FAILED).stderr.decode()
    assert "in use" in said
    assert bytes(handle.pread(512, 0)) == b"x" * 512
    handle.shutdown()
    store.import_bytes("disk", b"new", "--force")
    assert store.content("disk")[:3] == b"new" and store.snapshots("disk") == []
    assert store.volumes() == ["disk"]


@pytest.mark.parametrize("name", ["a b", "../a", "a@b", "-", "x" * 129])
def test_bad_names(store, name):
    store.import_bytes("good", b"x")
    assert store.import_bytes(name, b"x", status=USAGE)
    assert store.volumes() == ["good"]


def test_nothing_to_import(store, folder):
    (folder / "empty").write_bytes(b"")
    store.import_bytes("good", b"x")
    before = store.content("good")
    assert "empty" in store.refused("import", folder / "empty", "a")
    assert "input is empty" in store.refused("import", "-", "a")
    assert "input is empty" in store.refused("import", "-", "good", "--force")
    assert "empty" in store.refused("import", folder / "empty", "good", "--force")
    assert store.content("good") == before
    assert "folder" in store.refused("import", folder, "a", status=USAGE)
    store.refused("import", folder / "none", "a", status=NOTFOUND)
    assert store.volumes() == ["good"]


# --- the stream -------------------------------------------------------------------------------


@pytest.mark.limit(300)
def test_history_goes_with_it(store, other, servers, folder, rng):
    history = History(servers, store, rng, 5)
    history.check(store, "disk")
    path = folder / "stream"
    store.run("export", "disk", path, "--all-snapshots")
    other.run("import", path, "copy")
    history.check(other, "copy")
    # Only up to a snapshot; and on from there.
    store.run("export", "disk@s2", path, "--all-snapshots", "--force")
    other.run("import", path, "part")
    history.check(other, "part", upto=3, head=False)
    store.run("export", "disk@s4", path, "--since", "s2", "--all-snapshots", "--force")
    other.run("import", path, "part")
    history.check(other, "part", head=False)
    assert other.content("part") == history.states["s4"]
    store.run("export", "disk", path, "--since", "s4", "--force")
    other.run("import", path, "part")
    history.check(other, "part")
    # It is a volume like any other.
    server = servers.start(store=other.path)
    writer = Writer(server, "part", rng, bytearray(history.head))
    writer.some()
    assert other.content("part") == bytes(writer.data)
    assert other.content("part@s1") == history.states["s1"]


def test_properties_go_with_it(store, other):
    store.run("create", "disk", "3M", "--block-size", "4K", "--compression", "zstd:5",
              "--description", "h\u00e9 \u20ac")
    store.run("snapshot", "create", "disk@s")
    other.run("import", "-", "copy", stdin=store.run("export", "disk@s", "-", "--stream").stdout)
    info = other.json("info", "copy")
    assert info["block_size_bytes"] == 4096 and info["compression"] == "zstd:5"
    assert info["description"] == "h\u00e9 \u20ac" and info["size_bytes"] == 3 * MIB


def test_snapshots_keep_when_they_were_made(store, other):
    store.run("create", "disk", "1M")
    for name in ["a", "b", "c"]:
        store.run("snapshot", "create", f"disk@{name}")
        time.sleep(1)  # the times that are compared are in seconds
    made = store.created("disk")
    other.import_bytes("copy", store.run("export", "disk@b", "-", "--all-snapshots").stdout)
    assert other.created("copy") == {name: made[name] for name in ["a", "b"]}
    other.import_bytes("copy", store.run("export", "disk@c", "-", "--since", "b").stdout)
    assert other.created("copy") == made


def test_one_state_alone(store, other, servers, rng):
    history = History(servers, store, rng, 3)
    full = store.run("export", "disk@s1", "-", "--stream").stdout
    other.import_bytes("copy", full)
    assert other.snapshots("copy") == ["s1"]
    assert other.content("copy@s1") == other.content("copy") == history.states["s1"]
    other.import_bytes("copy", store.run("export", "disk@s2", "-", "--since", "s1").stdout)
    assert other.snapshots("copy") == ["s1", "s2"]
    assert other.content("copy") == history.states["s2"]


@pytest.mark.fdb
@pytest.mark.lmdb("it names both engines itself")
@pytest.mark.limit(300)
def test_between_engines(folder, servers, rng):
    """From the embedded store to FoundationDB and back: every snapshot is the same."""
    shared = cluster.shared()
    first, last = Store(folder / "first"), Store(folder / "last")
    middle = Store(None, uri=shared.store(folder / "middle"), env=shared.client_env())
    history = History(servers, first, rng, 4)
    for source, target in ((first, middle), (middle, last)):
        process = source.start("export", "disk", "-", "--all-snapshots")
        done = subprocess.run(target.words("import", "-", "disk"), stdin=process.stdout,
                              capture_output=True, env=dict(os.environ, **target.env),
                              timeout=CLI_LIMIT_S)
        assert done.returncode == 0, done.stderr
        assert process.wait(CLI_LIMIT_S) == 0
        process.stdout.close()
        process.stderr.close()
        history.check(target, "disk")


def test_only_onto_the_right_base(store, other, servers, rng):
    history = History(servers, store, rng, 3)
    full = store.run("export", "disk@s0", "-", "--stream").stdout
    one = store.run("export", "disk@s1", "-", "--since", "s0").stdout
    two = store.run("export", "disk@s2", "-", "--since", "s1").stdout
    head = store.run("export", "disk", "-", "--since", "s2").stdout
    old = store.run("export", "disk", "-", "--since", "s0").stdout
    refused = lambda name, data: other.import_bytes(name, data, status=FAILED).stderr.decode()

    assert "copy" in other.import_bytes("copy", one, status=NOTFOUND).stderr.decode()
    other.import_bytes("copy", full)
    assert "s1" in refused("copy", two)
    assert "--force" in refused("copy", full)
    assert other.import_bytes("copy", one, "--force", status=USAGE)
    other.import_bytes("copy", one)
    assert "already" in refused("copy", one)
    other.import_bytes("copy", two)
    assert "newer" in refused("copy", old)
    other.import_bytes("copy", head)
    history.check(other, "copy")
    # Changed since: by that very import, or by a client.
    assert "changed since" in refused("copy", head)
    other.run("snapshot", "rollback", "copy@s2", "--yes")
    server = servers.start(store=other.path)
    handle = nbd.NBD()
    handle.connect_uri(server.uri("copy"))
    handle.pwrite(b"x", 5)
    handle.shutdown()
    assert "changed since" in refused("copy", head)
    changed = bytearray(history.states["s2"])
    changed[5:6] = b"x"
    assert other.content("copy") == bytes(changed)
    # In use, idle or not.
    other.run("snapshot", "rollback", "copy@s2", "--yes")
    handle = nbd.NBD()
    handle.connect_uri(server.uri("copy"))
    handle.pread(1, 0)
    assert "in use" in refused("copy", head)
    handle.shutdown()
    other.import_bytes("copy", head)
    assert other.content("copy") == history.head
    # A volume that only looks like it: the same bytes, another snapshot.
    other.import_bytes("like", history.states["s0"])
    other.run("snapshot", "create", "like@s0")
    assert "has not got" in refused("like", one)
    assert other.volumes() == ["copy", "like"]


def test_damaged_streams_change_nothing(store, other, servers, rng):
    """Flips, cuts and exchanges anywhere: one sentence that names the place."""
    history = History(servers, store, rng, 2, size=2 * MIB)
    full = store.run("export", "disk", "-", "--all-snapshots").stdout
    first = store.run("export", "disk@s0", "-", "--stream").stdout
    rest = store.run("export", "disk", "-", "--since", "s0", "--all-snapshots").stdout
    other.import_bytes("copy", first)
    for round in range(24):
        good = rng.choice([full, rest])
        bad = bytearray(good)
        kind = round % 4
        # (With more than a few of the first 16 bytes changed it is no stream any more.)
        at = rng.randrange(16 if kind == 2 else 1, len(bad))
        if kind == 0:
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del bad[at:]
        elif kind == 2:
            length = rng.randrange(1, 5000)
            bad[at:at + length] = rng.randbytes(len(bad[at:at + length]))
        else:
            bad += rng.randbytes(rng.randrange(1, 100))
        name = "new" if good is full else "copy"
        said = other.import_bytes(name, bad, status=FAILED).stderr.decode()
        assert re.search(r"the stream .* byte \d+", said), said
        assert other.volumes() == ["copy"] and other.snapshots("copy") == ["s0"]
    assert other.content("copy") == history.states["s0"]
    other.import_bytes("copy", rest)
    history.check(other, "copy")


def test_what_was_a_stream_is_no_image(store, other, rng):
    """Damaged in the bytes it is known by, or cut off in them."""
    store.run("create", "disk", "1M")
    good = store.run("export", "disk", "-", "--stream").stdout
    other.import_bytes("copy", b"x")
    for n_changed in range(1, 5):
        bad = bytearray(good)
        for at in rng.sample(range(16), n_changed):
            bad[at] ^= rng.randrange(1, 256)
        said = other.import_bytes("new", bad, status=FAILED).stderr.decode()
        assert "damaged at byte 0" in said, said
    for length in [1, 15, 16, 23]:
        said = other.import_bytes("new", good[:length], status=FAILED).stderr.decode()
        assert re.search(r"the stream .* byte \d+", said), said
    assert other.volumes() == ["copy"]


def test_only_a_stream(store, other, rng):
    store.run("create", "disk", "1M")
    good = store.run("export", "disk", "-", "--stream").stdout
    for bad in [b"x", rng.randbytes(100000), b"fdb-nbd is no stream, this is text"]:
        said = other.import_bytes("disk", bad, "--stream", status=FAILED).stderr.decode()
        assert "standard input does not begin as a stream" in said, said
        assert other.volumes() == []
        other.import_bytes("image", bad)
        other.run("remove", "image", "--yes")
    other.import_bytes("disk", good, "--stream")
    assert other.volumes() == ["disk"]
    other.import_bytes("disk", b"x", "--stream", "--force", status=FAILED)
    assert other.content("disk") == bytes(MIB)


# --- death and interruption -------------------------------------------------------------------


def feed(process, data):
    """Gives a command `data` on its standard input, which stays open."""
    process.stdin.write(data)
    process.stdin.flush()


def end(process, number, status):
    process.send_signal(number)
    out, said = process.communicate(timeout=CLI_LIMIT_S)
    assert process.returncode == status, said
    return said.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_nothing(store, rng, number):
    store.import_bytes("keep", b"x")
    process = store.start("import", "-", "disk", stdin=subprocess.PIPE)
    feed(process, rng.randbytes(12 * MIB))
    wait_until(lambda: len(store.volumes()) == 2, CLI_LIMIT_S, "the import is under way")
    said = end(process, number, FAILED)
    assert said == "fdb-nbd: interrupted; run it again\n"
    assert store.volumes() == ["keep"]


@pytest.mark.limit(LONG_S)
def test_a_killed_import_leaves_nothing_under_the_name(store, rng):
    process = store.start("import", "-", "disk", stdin=subprocess.PIPE)
    feed(process, rng.randbytes(12 * MIB))
    found = wait_until(lambda: volumes_now(store), CLI_LIMIT_S, "the import is under way")
    assert len(found) == 1 and re.fullmatch(r"disk\.importing-[0-9a-f]{8}", found[0])
    end(process, signal.SIGKILL, -signal.SIGKILL)
    assert store.volumes() == found
    store.import_bytes("disk", b"all of it")
    assert store.volumes() == ["disk"]
    assert store.content("disk")[:9] == b"all of it"


def volumes_now(store):
    """As store.volumes(), where the store itself may not be there yet."""
    done = subprocess.run(store.words("--json", "list"), capture_output=True,
                          env=dict(os.environ, **store.env), timeout=CLI_LIMIT_S)
    return [v["name"] for v in json.loads(done.stdout)["volumes"]] if done.returncode == 0 else []


@pytest.mark.limit(2 * LONG_S)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_import_into_a_volume_is_all_or_nothing(store, other, servers, rng, number):
    """Killed in the middle it shows nothing of what it had done, and the next one begins anew."""
    history = History(servers, store, rng, 1, resizes=False)
    first = store.run("export", "disk@s0", "-", "--stream").stdout
    server = servers.start(store=store.path)
    writer = Writer(server, "disk", rng, bytearray(history.head))
    for i in (1, 2):
        handle = nbd.NBD()
        handle.connect_uri(server.uri("disk"))
        for at in range(0, 6 * MIB, MIB):
            new = rng.randbytes(MIB)
            handle.pwrite(new, at)
            writer.data[at:at + MIB] = new
        handle.shutdown()
        server.cli("snapshot", "create", f"disk@s{i}")
        history.states[f"s{i}"] = bytes(writer.data)
    history.head = bytes(writer.data)
    server.stop()
    rest = store.run("export", "disk@s2", "-", "--since", "s0", "--all-snapshots").stdout
    assert len(rest) > 10 * MIB
    other.import_bytes("copy", first)

    process = other.start("import", "-", "copy", stdin=subprocess.PIPE)
    feed(process, rest[:-MIB])
    # Far enough that it has made a snapshot, which nobody can read yet.
    wait_until(lambda: other.snapshots("copy") == ["s0", "s1"], CLI_LIMIT_S, "it is half way")
    assert "not complete" in other.refused("export", "copy@s1", "-")
    assert other.content("copy@s0") == history.states["s0"]
    end(process, number, FAILED if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert other.snapshots("copy") == ["s0"]
        assert other.content("copy") == history.states["s0"]
    else:
        # Nobody gets to see what it is.
        served = servers.start(store=other.path)
        handle = nbd.NBD()
        with pytest.raises(nbd.Error):
            handle.connect_uri(served.uri("copy"))
        assert other.content("copy@s0") == history.states["s0"]
        served.stop()
    other.import_bytes("copy", rest)
    history.check(other, "copy")


def test_clients_see_all_of_an_import_or_nothing(store, other, servers, rng):
    """Also one that was connected all the time."""
    history = History(servers, store, rng, 2, resizes=False)
    other.import_bytes("copy", store.run("export", "disk@s0", "-", "--stream").stdout)
    rest = store.run("export", "disk", "-", "--since", "s0", "--all-snapshots").stdout
    server = servers.start(store=other.path)
    handle, reader = nbd.NBD(), nbd.NBD()
    handle.connect_uri(server.uri("copy"))
    reader.connect_uri(server.uri("copy@s0"))
    process = other.start("import", "-", "copy", stdin=subprocess.PIPE)
    feed(process, rest[:-100])
    wait_until(lambda: other.snapshots("copy") == ["s0", "s1"], CLI_LIMIT_S, "it is half way")
    with pytest.raises(nbd.Error):
        handle.pread(4096, 0)
    with pytest.raises(nbd.Error):
        handle.pwrite(bytes(4096), 0)
    late = nbd.NBD()
    with pytest.raises(nbd.Error):
        late.connect_uri(server.uri("copy"))
        late.pread(4096, 0)
    size = len(history.states["s0"])
    assert bytes(reader.pread(size, 0)) == history.states["s0"]
    feed(process, rest[-100:])
    out, said = process.communicate(timeout=CLI_LIMIT_S)
    assert process.returncode == DONE, said
    assert bytes(handle.pread(size, 0)) == history.head
    assert bytes(reader.pread(size, 0)) == history.states["s0"]
    handle.shutdown()
    reader.shutdown()
    history.check(other, "copy")


def test_nothing_else_is_done_to_a_volume_meanwhile(store, other, servers, rng):
    """What an import may have to go back to stays; and one whose volume is taken away ends."""
    history = History(servers, store, rng, 2, resizes=False)
    other.import_bytes("copy", store.run("export", "disk@s0", "-", "--stream").stdout)
    rest = store.run("export", "disk", "-", "--since", "s0", "--all-snapshots").stdout
    process = other.start("import", "-", "copy", stdin=subprocess.PIPE)
    feed(process, rest[:-100])
    wait_until(lambda: other.snapshots("copy") == ["s0", "s1"], CLI_LIMIT_S, "it is half way")
    for words in (["snapshot", "remove", "copy@s0"], ["snapshot", "create", "copy@new"],
                  ["snapshot", "rename", "copy@s0", "new"], ["resize", "copy", "1G"]):
        assert "import" in other.refused(*words), words
    assert "in use" in other.refused("remove", "copy", "--snapshots", "--yes")
    assert "in use" in other.import_bytes("copy", rest, status=FAILED).stderr.decode()
    assert other.snapshots("copy") == ["s0", "s1"]
    other.run("owner", "evict", "copy", "--yes")
    # It finds out when it goes on.
    feed(process, rest[-100:])
    out, said = process.communicate(timeout=CLI_LIMIT_S)
    assert process.returncode == FAILED and b"cannot write" in said, said
    assert other.snapshots("copy") == ["s0"]
    assert other.content("copy") == history.states["s0"]
    other.import_bytes("copy", rest)
    history.check(other, "copy")


@pytest.mark.limit(LONG_S)
def test_a_killed_import_can_be_taken_back_by_hand(store, other, servers, rng):
    """Also while a client waits at a gateway, which must not take the volume for its own."""
    history = History(servers, store, rng, 2, resizes=False)
    other.import_bytes("copy", store.run("export", "disk@s0", "-", "--stream").stdout)
    rest = store.run("export", "disk", "-", "--since", "s0", "--all-snapshots").stdout
    server = servers.start(store=other.path)
    handle = nbd.NBD()
    handle.connect_uri(server.uri("copy"))
    process = other.start("import", "-", "copy", stdin=subprocess.PIPE)
    feed(process, rest[:-100])
    wait_until(lambda: other.snapshots("copy") == ["s0", "s1"], CLI_LIMIT_S, "it is half way")
    end(process, signal.SIGKILL, -signal.SIGKILL)
    size = len(history.states["s0"])
    with pytest.raises(nbd.Error):
        handle.pread(size, 0)
    other.run("snapshot", "rollback", "copy@s0", "--destroy-newer", "--yes")
    assert bytes(handle.pread(size, 0)) == history.states["s0"]
    handle.shutdown()
    other.import_bytes("copy", rest)
    history.check(other, "copy")


def test_an_interrupted_export_leaves_nothing(store, folder, rng):
    store.import_bytes("disk", rng.randbytes(4 * MIB))
    # Nobody reads the pipe: it waits in the middle.
    process = store.start("export", "disk", "-")
    wait_until(lambda: store.snapshots("disk"), CLI_LIMIT_S, "the export is under way")
    wait_until(lambda: select.select([process.stdout], [], [], 0)[0], CLI_LIMIT_S, "it writes")
    said = end(process, signal.SIGINT, FAILED)
    assert said == "fdb-nbd: interrupted; run it again\n"
    assert store.snapshots("disk") == []


def test_an_export_whose_reader_goes_away(store, rng):
    store.import_bytes("disk", rng.randbytes(4 * MIB))
    process = store.start("export", "disk", "-")
    process.stdout.read(1000)
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(CLI_LIMIT_S) == FAILED and "standard output" in said
    assert store.snapshots("disk") == []


# --- diff -------------------------------------------------------------------------------------


def marked(extents):
    """Which blocks lie in the extents."""
    blocks = set()
    for e in extents:
        blocks.update(range(e["offset"] // BLOCK, -(-(e["offset"] + e["length"]) // BLOCK)))
    return blocks


def differing(a, b):
    n = -(-max(len(a), len(b)) // BLOCK)
    at = lambda data, i: data[i * BLOCK:(i + 1) * BLOCK]
    return {i for i in range(n) if at(a, i) != at(b, i)}


def test_diff(store, servers, rng):
    history = History(servers, store, rng, 3, resizes=False)
    states = [*history.states.items(), (None, history.head)]
    for i, (since, old) in enumerate(states[:-1]):
        for to, new in states[i:]:
            name = f"disk@{to}" if to else "disk"
            found = store.json("diff", name, "--since", since)
            extents = found["extents"]
            assert found["since"] == f"disk@{since}"
            ends = [(e["offset"], e["offset"] + e["length"]) for e in extents]
            assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:]))
            assert all(e["length"] > 0 for e in extents) and (not ends or ends[-1][1] <= len(new))
            changed = differing(old, new)
            assert changed <= marked(extents)
            if since == to:
                assert extents == []
            for e in extents:
                if e["zero"]:
                    assert not any(new[e["offset"]:e["offset"] + e["length"]])
            assert found["data_bytes"] == sum(e["length"] for e in extents if not e["zero"])
            text = store.run("diff", name, "--since", since)
            lines = text.stdout.decode().splitlines()
            assert lines[0].split() == ["OFFSET", "LENGTH", "TYPE"]
            assert [line.split() for line in lines[1:]] == [
                [str(e["offset"]), str(e["length"]), "zero" if e["zero"] else "data"]
                for e in extents]
            assert f"since disk@{since}" in text.stderr.decode()
    assert store.snapshots("disk") == list(history.states)
    assert "not a state" in store.refused("diff", "disk@s0", "--since", "s1")
    store.refused("diff", "disk", "--since", "none", status=NOTFOUND)
    store.refused("diff", "disk", status=USAGE)


def test_diff_of_a_clone(store, servers, rng):
    history = History(servers, store, rng, 2, resizes=False)
    store.run("clone", "disk@s0", "one")
    store.run("snapshot", "create", "one@c")
    store.run("clone", "one@c", "two")
    server = servers.start(store=store.path)
    writer = Writer(server, "two", rng, bytearray(history.states["s0"]))
    writer.some()
    server.stop()
    for since in ("disk@s0", "one@c"):
        extents = store.json("diff", "two", "--since", since)["extents"]
        changed = differing(history.states["s0"], bytes(writer.data))
        assert changed and changed <= marked(extents)
        assert sum(e["length"] for e in extents) < len(writer.data)
    for since in ("disk@s1", "two@none"):
        store.refused("diff", "two", "--since", since,
                      status=FAILED if since == "disk@s1" else NOTFOUND)
    assert "not a state" in store.refused("diff", "disk", "--since", "one@c")


# --- what is shown ----------------------------------------------------------------------------


def test_progress_on_a_terminal(store, rng):
    main, side = pty.openpty()
    process = store.start("import", "-", "disk", stdin=subprocess.PIPE, stderr=side)
    os.close(side)
    said = b""
    deadline = time.monotonic() + 30 * SLOW
    while not re.search(rb"\rimporting disk: [^\r]* [KM]iB, [^\r]*/s, 0:0\d", said):
        assert time.monotonic() < deadline, said
        feed(process, rng.randbytes(100000))
        if select.select([main], [], [], 0.05)[0]:
            said += os.read(main, 4096)
    process.stdin.close()
    process.stdin = None
    try:
        while True:
            more = os.read(main, 4096)
            if not more:
                break
            said += more
    except OSError:
        pass  # the other end was closed
    os.close(main)
    assert process.wait(CLI_LIMIT_S) == DONE
    process.stdout.close()
    # The line is wiped at the end.
    assert re.search(rb"\r +\r$", said), said


def test_not_for_terminals(store):
    store.import_bytes("disk", b"x")
    main, side = pty.openpty()
    for words, what in ((["export", "disk", "-"], "stdout"), (["import", "-", "new"], "stdin")):
        process = store.start(*words, **{what: side})
        out, said = process.communicate(timeout=CLI_LIMIT_S)
        assert process.returncode == USAGE and b"terminal" in said
    os.close(main)
    os.close(side)
    assert store.volumes() == ["disk"]
