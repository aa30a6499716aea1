"""store backup: a copy of an embedded store that is in use holds every write answered before the
command was started, in an order that could have been, and harms nobody (G1, G2, G3, G6)."""

import os
import random
import signal
import stat
import subprocess
import time

import pytest

from harness.commands import (DONE, FAILED, USAGE, assert_one_sentence, connect,  # noqa: F401
                              run, store)
from harness.fixtures import new_folder
from harness.history import Check, keep_evidence
from harness.load import Background, Load, Shape, content
from harness.rawnbd import connect as raw_connect
from harness.server import SLOW, Server, program, wait_until

MIB = 1 << 20
SIZE = 24 * MIB + 512
pytestmark = pytest.mark.lmdb("copies the embedded engine's files")


def served_copy(folder, path):
    return Server(folder, store=f"lmdb:{path}", tcp=False)


def bytes_of(path):
    """What the files of a folder take on the disk."""
    return sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file())


def answered_before(ops, ns):
    return {op for op in ops if op.answered_ns is not None and op.answered_ns < ns
            and not op.error}


@pytest.mark.limit(300)
def test_backup_under_load(servers, folder, seed):
    """Several loads one after the other, with copies made in their midst."""
    rounds = 6
    server = servers.start({"v": SIZE, "w": "8M"}, ["--cache-size", "64M"], tcp=False)
    with raw_connect(server, "v") as c:
        for at in range(0, SIZE, MIB):
            c.write(at, content(1, at, min(at + MIB, SIZE)))
        before = c.read_all()
    number, late = 2, 0
    for round_ in range(rounds):
        rng = random.Random(f"{seed}:backup:{round_}")
        shape = Shape(SIZE, connections=3, depth=6, ops=4000, pace_us=200, hot=rng.random())
        load = Load(server, "v", shape, rng, number)
        copy = folder / f"copy{round_}"
        with Background(load, 120 * SLOW) as background:
            wait_until(lambda: len(load.ops) > 50 + 200 * rng.random(), 60, "a load")
            asked_ns = time.monotonic_ns()
            server.cli("store", "backup", copy)
            done_ns = time.monotonic_ns()
            assert background.running(), "the load was over before the copy was"
        load.close()
        ops = load.sent()
        number = load.number
        late += sum(asked_ns < op.sent_ns < done_ns for op in ops)
        with served_copy(folder / f"c{round_}", copy) as other:
            with raw_connect(other, "v") as c:
                after = c.read_all()
            assert other.cli("verify", "v").returncode == DONE
        # Nothing that was sent only when it was complete can be in it.
        ops_then = [op for op in ops if op.sent_ns < done_ns]
        try:
            Check(before, ops_then, after, answered_before(ops, asked_ns)).run()
        except AssertionError as e:
            raise AssertionError(
                f"round {round_} of seed {seed}: {e}\n"
                f"kept: {keep_evidence(new_folder() / 'backup', before, ops_then, after)}") from None
        with raw_connect(server, "v") as c:
            before = c.read_all()
    assert late > 0


def test_writes_of_an_owner_that_died_are_in_the_copy(servers, folder, rng):
    """G1: what was answered from a log that nobody has replayed yet."""
    server = servers.start({"v": SIZE}, tcp=False)
    load = Load(server, "v", Shape(SIZE, ops=300), rng)
    load.run(limit_s=60 * SLOW)
    load.close()
    server.kill()
    server.cli("store", "backup", folder / "copy")
    server.start()
    with raw_connect(server, "v") as c:
        wanted = c.read_all()
    with served_copy(folder / "c", folder / "copy") as other, raw_connect(other, "v") as c:
        assert c.read_all() == wanted


def test_the_copy_is_a_store_of_its_own(servers, folder, rng):
    server = servers.start({"v": SIZE}, tcp=False)
    data = rng.randbytes(3 * MIB)
    client = connect(server, "v")
    client.pwrite(data, 0)
    server.cli("snapshot", "create", "v@s")
    server.cli("clone", "v@s", "w")
    client.pwrite(bytes(MIB), 0)
    done = server.cli("store", "backup", f"{folder}/copy/")
    assert str(folder / "copy") in done.stdout and done.stderr == ""
    assert not (folder / "copy.partial").exists()
    # Whoever has the volume in use there has it there only.
    store = f"lmdb:{folder}/copy"
    assert server.json("owner", "show", "v")["owner"]["pid"] == server.pid
    with served_copy(folder / "c", folder / "copy") as other:
        assert {v["name"] for v in other.json("list")["volumes"]} == {"v", "w"}
        theirs = connect(other, "v")
        assert theirs.pread(MIB, 0) == bytes(MIB) and theirs.pread(2 * MIB, MIB) == data[MIB:]
        theirs.pwrite(b"x" * 4096, 0)
        theirs.shutdown()
        for name in ("v@s", "w"):
            theirs = connect(other, name)
            assert theirs.pread(3 * MIB, 0) == data, name
            theirs.shutdown()
    assert client.pread(4096, 0) == bytes(4096)
    client.shutdown()
    # As accessible as the store itself.
    assert stat.S_IMODE((folder / "copy").stat().st_mode) == \
        stat.S_IMODE(server.store_folder.stat().st_mode)
    # A copy can be copied, also with nobody there.
    done = subprocess.run([*program(), "--store", store, "store", "backup", folder / "again"],
                          capture_output=True, text=True)
    assert done.returncode == DONE, done.stderr
    for path in (folder / "copy", folder / "again"):
        done = subprocess.run([*program(), "--store", f"lmdb:{path}", "verify", "v"],
                              capture_output=True, text=True)
        assert done.returncode == DONE and "nothing is wrong" in done.stdout, done


def start_backup(server, to):
    return subprocess.Popen([*program(), "--store", server.store, "store", "backup", str(to)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def big(servers, rng):
    """A server with much to copy."""
    server = servers.start({"v": "256M"}, ["--cache-size", "64M"], tcp=False)
    client = connect(server, "v")
    data = rng.randbytes(8 * MIB)
    for at in range(0, 256 * MIB, 8 * MIB):
        client.pwrite(data[at % 4096:] + data[:at % 4096], at)
    client.flush()
    return server, client, data


@pytest.mark.limit(180)
def test_kill_9_of_the_backup(servers, folder, rng):
    """It dies in the middle: nobody notices, the space it held is used again, and the next one
    clears away what it left."""
    server, client, data = big(servers, rng)
    copy, partial = folder / "copy", folder / "copy.partial"
    killed = 0
    for _ in range(20):
        process = start_backup(server, copy)
        wait_until(lambda: process.poll() is not None or (partial / "blocks").exists(), 20,
                   "the copy begins")
        wait_s = rng.random() * 0.1
        began = time.monotonic()
        while time.monotonic() - began < wait_s:
            client.pwrite(rng.randbytes(65536), rng.randrange(4000) * 65536)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == DONE:
            subprocess.run(["rm", "-r", str(copy)], check=True)
            continue
        assert not copy.exists()
    assert killed > 3
    # What it pinned is free: the store does not grow by what is written over and over.
    client.flush()
    before = bytes_of(server.store_folder)
    for round_ in range(6):
        for at in range(0, 64 * MIB, 8 * MIB):
            client.pwrite(data, at)
        client.flush()
    assert bytes_of(server.store_folder) < before + 5 * 64 * MIB
    server.cli("store", "backup", copy)
    assert not partial.exists()
    client.shutdown()
    server.stop()
    with served_copy(folder / "c", copy) as other:
        assert other.cli("verify", "v").returncode == DONE


def test_interrupted(servers, folder, rng):
    """SIGINT: nothing is left, and the same command makes it afterwards."""
    server, client, _ = big(servers, rng)
    copy, partial = folder / "copy", folder / "copy.partial"
    for _ in range(10):
        process = start_backup(server, copy)
        wait_until(lambda: process.poll() is not None or (partial / "blocks").exists(), 20,
                   "the copy begins")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        if process.returncode == FAILED:
            break
        subprocess.run(["rm", "-r", str(copy)], check=True)
    assert process.returncode == FAILED and out == ""
    assert_one_sentence(err)
    assert "interrupted" in err
    assert not copy.exists() and not partial.exists()
    server.cli("store", "backup", copy)
    client.shutdown()


def test_refusals(servers, folder, run):
    run("create", "v", "8M")
    full = folder / "full"
    full.mkdir()
    (full / "file").write_text("")
    assert "something in" in run("store", "backup", full, status=FAILED).stderr
    assert "no folder" in run("store", "backup", full / "file", status=FAILED).stderr
    assert "cannot" in run("store", "backup", folder / "no" / "way", status=FAILED).stderr
    for words in (["backup"], ["info", "x"], ["copy", "x"]):
        done = run("store", *words, status=USAGE) if words != ["backup"] else None
        if done is None:
            done = subprocess.run([*program(), "store", "backup"], capture_output=True, text=True)
            assert done.returncode == USAGE
    assert os.listdir(full) == ["file"]


def test_not_into_the_store_itself(servers, folder):
    server = servers.start({"v": "8M"})
    inside = server.store_folder
    (folder / "link").symlink_to(inside)
    (folder / "log").symlink_to(inside / "log")
    before = sorted(os.listdir(inside))
    for to in [inside, inside / "copy", inside / "log", inside / "log" / "copy", folder / "link",
               folder / "link" / "copy", folder / "log", "copy", "."]:
        done = subprocess.run([*program(), "--store", server.store, "store", "backup", str(to)],
                              capture_output=True, text=True, cwd=inside)
        assert done.returncode == FAILED and "of the store itself" in done.stderr, (to, done)
    assert sorted(os.listdir(inside)) == before
    server.cli("store", "backup", folder / "store2")
