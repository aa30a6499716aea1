"""Snapshots, clones and rollbacks: what the commands do, with and without a server that has the
volume in use, what they refuse, and what clients see of it (G7)."""

import os
import re
import signal
import subprocess
import threading
import time

import nbd
import pytest

from harness import stores
from harness.commands import (DONE, FAILED, NOTFOUND, USAGE, assert_one_sentence, connect,
                              on_terminal, owner, wait_until_free)
from harness.server import CLI_LIMIT_S, SLOW, program, wait_until

MIB = 1 << 20
BLOCK = 4096
REQUEST = 16 * MIB
# A freeze that nobody ends is over after five seconds.
FREEZE_LIMIT_S = 20 * SLOW


def write(server, name, data, at=0):
    client = connect(server, name)
    for first in range(0, len(data), REQUEST):
        client.pwrite(data[first:first + REQUEST], at + first)
    client.shutdown()


def read(server, name, length, at=0):
    client = connect(server, name)
    data = b"".join(client.pread(min(REQUEST, length - first), at + first)
                    for first in range(0, length, REQUEST))
    client.shutdown()
    return data


def snapshots(server, name):
    return [s["name"] for s in server.json("snapshot", "list", name)["snapshots"]]


def refused(server, *words, status=FAILED):
    done = server.cli(*words, check=False)
    assert done.returncode == status, f"{words}: {done.stdout}{done.stderr}"
    assert_one_sentence(done.stderr)
    return done.stderr


@pytest.fixture(params=["free", "in use"])
def served(request, servers):
    """A server with volume a, which a client uses or which the command has to take itself."""
    server = servers.start({"a": "8M", "b": "8M"})
    holders = []
    if request.param == "in use":
        for name in ("a", "b"):
            client = connect(server, name)
            client.pwrite(b"held".ljust(512), 8 * MIB - 512)
            holders.append(client)
    yield server
    if request.param == "in use":
        assert owner(server, "a")["pid"] == server.pid
    for client in holders:
        client.shutdown()


# --- snapshots --------------------------------------------------------------------------


def test_life_of_snapshots(served, rng):
    data = [rng.randbytes(MIB) for _ in range(3)]
    write(served, "a", data[0])
    assert '"a@one"' in served.cli("snapshot", "create", "a@one").stdout
    write(served, "a", data[1])
    served.cli("snapshot", "create", "a@two")
    write(served, "a", data[2])

    listed = served.json("snapshot", "list", "a")
    assert listed["store"] == served.store and listed["volume"] == "a"
    one, two = listed["snapshots"]
    assert one["name"] == "one" and two["name"] == "two"
    assert one["size_bytes"] == 8 * MIB and MIB <= one["used_bytes"] <= MIB + 64 * 1024
    assert one["clones"] == [] and one["epoch"] < two["epoch"]
    assert re.fullmatch("[0-9a-f]{32}", one["id"]) and one["id"] != two["id"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", one["created"])
    table = served.cli("snapshot", "list", "a")
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["NAME", "CREATED", "SIZE", "USED", "CLONES"]
    assert [line.split()[0] for line in lines[1:]] == ["one", "two"]
    assert "2 snapshots" in table.stderr and served.store in table.stderr
    assert served.json("info", "a")["snapshots"] == 2
    assert served.json("list")["volumes"][0]["snapshots"] == 2
    assert "snapshots:    2" in served.cli("info", "a").stdout

    for name, wanted in (("a@one", data[0]), ("a@two", data[1]), ("a", data[2])):
        assert read(served, name, MIB) == wanted, name

    served.cli("snapshot", "rename", "a@one", "eins")
    assert snapshots(served, "a") == ["eins", "two"]
    assert read(served, "a@eins", MIB) == data[0]
    assert '"one"' in refused(served, "snapshot", "rename", "a@one", "x", status=NOTFOUND)
    assert '"two"' in refused(served, "snapshot", "rename", "a@eins", "two")
    assert '"two"' in refused(served, "snapshot", "create", "a@two")
    assert snapshots(served, "a") == ["eins", "two"]

    served.cli("snapshot", "remove", "a@eins")
    assert snapshots(served, "a") == ["two"]
    refused(served, "snapshot", "remove", "a@eins", status=NOTFOUND)
    assert read(served, "a@two", MIB) == data[1] and read(served, "a", MIB) == data[2]
    served.cli("snapshot", "create", "a@eins")
    served.cli("snapshot", "remove", "a@two", "a@eins")
    assert snapshots(served, "a") == [] and read(served, "a", MIB) == data[2]


@pytest.mark.lmdb("a cluster estimates what is stored")
def test_removal_gives_space_back(served, rng):
    write(served, "a", rng.randbytes(4 * MIB))

    def stored():
        return served.json("info", "a")["stored_bytes"]

    wait_until(lambda: stored() >= 4 * MIB, 30 * SLOW, "the data is in the store")
    once = stored()
    for i in range(3):
        served.cli("snapshot", "create", f"a@{i}")
        write(served, "a", rng.randbytes(4 * MIB))
    wait_until(lambda: stored() >= 16 * MIB, 30 * SLOW, "all four are in the store")
    served.cli("snapshot", "remove", "a@1")
    wait_until(lambda: stored() <= 3 * once, 30 * SLOW, "one is given back")
    served.cli("snapshot", "remove", "a@0", "a@2")
    wait_until(lambda: stored() <= once, 30 * SLOW, "all are given back")


@pytest.mark.parametrize("words", [
    ["snapshot"], ["snapshot", "make", "a@x"], ["snapshot", "create"], ["snapshot", "create", "a"],
    ["snapshot", "create", "a@"], ["snapshot", "create", "@x"], ["snapshot", "create", "a@x@y"],
    ["snapshot", "create", "a@-x"], ["snapshot", "create", "a@x", "a@y"],
    ["snapshot", "create", "a@" + "x" * 129], ["snapshot", "create", "a@x", "--yes"],
    ["snapshot", "create"] + [f"v{i}@x" for i in range(65)],
    ["snapshot", "list"], ["snapshot", "list", "a", "b"], ["snapshot", "rename", "a@x"],
    ["snapshot", "rename", "a@s", "a@y"], ["snapshot", "rename", "a@s", ""],
    ["snapshot", "remove"], ["snapshot", "list", "a", "--destroy-newer"],
    ["snapshot", "rollback"], ["snapshot", "rollback", "a@s", "a@t"],
    ["clone", "a@s"], ["clone", "a@s", "b", "c"], ["clone", "a@s", "no name"], ["clone", "a@s", ""],
    ["clone", "a", "b"], ["snapshot", "list", "a@s"], ["verify", "a@s"],
    ["snapshot", "remove", "a@s", "a@s"], ["clone", "a@s", "x" * 129],
    ["clone", "a@s", "b", "--description", "x" * 1025]])
def test_bad_usage(run, words):
    run("create", "a", "1M")
    run("snapshot", "create", "a@s")
    run(*words, status=USAGE)
    assert run.json("info", "a")["snapshots"] == 1
    assert len(run.json("list")["volumes"]) == 1


def test_what_is_not_there(run, store):
    run("create", "example", "1M")
    run("snapshot", "create", "example@monday")
    for words in (["remove", "example@munday"], ["rename", "example@munday", "x"],
                  ["rollback", "example@munday", "--yes"]):
        done = run("snapshot", *words, status=NOTFOUND)
        assert 'did you mean "example@monday"?' in done.stderr and store in done.stderr
    assert "monday" in run("clone", "example@Monday", "b", status=NOTFOUND).stderr
    for words in (["create", "exmaple@x"], ["list", "exmaple"], ["remove", "exmaple@monday"]):
        assert '"example"' in run("snapshot", *words, status=NOTFOUND).stderr


def test_commands_for_volumes_leave_snapshots_alone(run):
    run("create", "a", "1M")
    run("snapshot", "create", "a@s")
    for words in (["remove", "a@s", "--yes"], ["resize", "a@s", "2M"], ["info", "a@s"],
                  ["owner", "evict", "a@s", "--yes"], ["rename", "a@s", "b"],
                  ["snapshot", "list", "a@s"]):
        run(*words, status=USAGE)
    for words in (["snapshot", "remove", "a"], ["clone", "a", "b"],
                  ["snapshot", "rollback", "a", "--yes"]):
        run(*words, status=USAGE)
    assert run.json("info", "a")["snapshots"] == 1


def test_a_snapshot_has_all_that_was_answered(servers, rng):
    """Also what has not left the server's memory yet, whatever is written meanwhile."""
    server = servers.start({"a": "8M"})
    client = connect(server, "a")
    for i in range(20):
        before = rng.randbytes(BLOCK)
        client.pwrite(before, BLOCK * i)
        server.cli("snapshot", "create", f"a@{i}")
        client.pwrite(rng.randbytes(BLOCK), BLOCK * i)
        assert read(server, f"a@{i}", BLOCK, BLOCK * i) == before
    client.shutdown()


def test_large_writes_go_on_behind_snapshots(servers, rng):
    """They wait for room for the rows that they copy, beside other connections."""
    server = servers.start({"a": "8M"})
    holder = connect(server, "a")
    client = connect(server, "a")
    for i in range(15):
        holder.pwrite(b"held".ljust(512), 8 * MIB - 512)
        client.pwrite(rng.randbytes(4 * MIB), 0)
        server.cli("snapshot", "create", f"a@{i}")
        client.pwrite(bytes(8 * MIB - 512), 0)
        assert bytes(holder.pread(4 * MIB, 0)) == bytes(4 * MIB)
    client.shutdown()
    holder.shutdown()


# --- clones -----------------------------------------------------------------------------


def test_clones(served, rng):
    old, new, own = (rng.randbytes(MIB) for _ in range(3))
    write(served, "a", old)
    served.cli("snapshot", "create", "a@s")
    write(served, "a", new)
    said = served.cli("clone", "a@s", "c", "--description", "of a").stdout
    assert '"a@s"' in said and '"c"' in said
    assert read(served, "c", MIB) == old
    write(served, "c", own[:BLOCK], BLOCK)
    wanted = old[:BLOCK] + own[:BLOCK] + old[2 * BLOCK:]
    assert read(served, "c", MIB) == wanted
    assert read(served, "a", MIB) == new and read(served, "a@s", MIB) == old

    info = served.json("info", "c")
    assert info["parent"] == "a@s" and info["description"] == "of a" and info["snapshots"] == 0
    assert info["size_bytes"] == 8 * MIB
    assert "clone of:     a@s" in served.cli("info", "c").stdout
    parents = {v["name"]: v["parent"] for v in served.json("list")["volumes"]}
    assert parents == {"a": None, "b": None, "c": "a@s"}
    assert served.json("snapshot", "list", "a")["snapshots"][0]["clones"] == ["c"]

    # A clone of the clone; and each is in the way of what it hangs on.
    served.cli("snapshot", "create", "c@t")
    served.cli("clone", "c@t", "d")
    assert read(served, "d", MIB) == wanted
    assert '"c"' in refused(served, "snapshot", "remove", "a@s")
    assert '"d"' in refused(served, "snapshot", "remove", "c@t")
    assert '"d"' in refused(served, "remove", "c", "--snapshots", "--yes")
    assert '"c"' in refused(served, "clone", "a@s", "c")
    served.cli("remove", "d", "--yes")
    assert '"t"' in refused(served, "remove", "c", "--yes")
    served.cli("remove", "c", "--snapshots", "--yes")
    served.cli("snapshot", "remove", "a@s")
    assert read(served, "a", MIB) == new


def test_removing_what_has_snapshots(servers):
    server = servers.start({"a": "1M"})
    server.cli("snapshot", "create", "a@one")
    server.cli("snapshot", "create", "a@two")
    said = refused(server, "remove", "a", "--yes")
    assert '"one" and "two"' in said and "--snapshots" in said
    # Refused before any client is cut off.
    client = connect(server, "a")
    client.pwrite(b"x" * BLOCK, 0)
    refused(server, "remove", "a", "--force", "--yes")
    assert bytes(client.pread(BLOCK, 0)) == b"x" * BLOCK
    client.shutdown()
    view = connect(server, "a@one")
    command = program() + ["--store", server.store, "remove", "a", "--snapshots"]
    status, said = on_terminal(command, "no\n")
    assert status == FAILED and '"one" and "two"' in said
    server.cli("remove", "a", "--snapshots", "--yes")
    assert server.json("list")["volumes"] == []

    def is_over():
        # Never other bytes than the snapshot's.
        try:
            assert bytes(view.pread(BLOCK, 0)) == bytes(BLOCK)
        except nbd.Error:
            return True
        return False

    wait_until(is_over, 30 * SLOW, "who reads a snapshot that is gone gets errors")


# --- rollback ---------------------------------------------------------------------------


def test_rollback(servers, rng):
    server = servers.start({"a": "8M"})
    old, new = rng.randbytes(MIB), rng.randbytes(2 * MIB)
    write(server, "a", old)
    server.cli("snapshot", "create", "a@old")
    client = connect(server, "a")
    client.pwrite(new, 0)
    said = refused(server, "snapshot", "rollback", "a@old", "--yes")
    assert str(server.pid) in said
    assert bytes(client.pread(2 * MIB, 0)) == new
    client.shutdown()
    server.cli("resize", "a", "16M")
    assert "--yes" in refused(server, "snapshot", "rollback", "a@old")

    server.cli("snapshot", "rollback", "a@old", "--yes")
    assert read(server, "a", 2 * MIB) == old + bytes(MIB)
    info = server.json("info", "a")
    assert info["size_bytes"] == 8 * MIB and info["snapshots"] == 1
    assert read(server, "a@old", 2 * MIB) == old + bytes(MIB)

    # Twice, with newer ones, and changes after each.
    for name in ("two", "three"):
        write(server, "a", rng.randbytes(BLOCK), 3 * MIB)
        server.cli("snapshot", "create", f"a@{name}")
    said = refused(server, "snapshot", "rollback", "a@old", "--yes")
    assert '"two" and "three"' in said and "--destroy-newer" in said
    server.cli("clone", "a@two", "c")
    assert '"c"' in refused(server, "snapshot", "rollback", "a@old", "--destroy-newer", "--yes")
    two = read(server, "a@two", 4 * MIB)
    server.cli("snapshot", "rollback", "a@two", "--destroy-newer", "--yes")
    assert snapshots(server, "a") == ["old", "two"]
    assert read(server, "a", 4 * MIB) == two == read(server, "c", 4 * MIB)
    server.cli("remove", "c", "--yes")

    command = program() + ["--store", server.store, "snapshot", "rollback", "a@old",
                           "--destroy-newer"]
    status, said = on_terminal(command, "no\n")
    assert status == FAILED and '"two"' in said and "nothing was done" in said
    assert snapshots(server, "a") == ["old", "two"]
    status, said = on_terminal(command, "yes\n")
    assert status == DONE, said
    assert snapshots(server, "a") == ["old"]
    assert read(server, "a", 4 * MIB) == old + bytes(3 * MIB)
    write(server, "a", new, MIB)
    server.restart()
    assert read(server, "a", 4 * MIB) == old + new + bytes(MIB)


@pytest.mark.lmdb("a cluster estimates what is stored")
def test_rollback_gives_space_back(servers, rng):
    server = servers.start({"a": "16M"})
    write(server, "a", rng.randbytes(MIB))
    server.cli("snapshot", "create", "a@s")
    once = server.json("info", "a")["stored_bytes"]
    for _ in range(3):
        write(server, "a", rng.randbytes(8 * MIB))
    server.cli("snapshot", "rollback", "a@s", "--yes")
    # Nobody had the volume in use, so the command did it.
    assert server.json("info", "a")["stored_bytes"] <= once
    wait_until_free(server, "a")


def test_rollback_after_the_server_died(servers, rng):
    """What it had not committed is gone with what it had."""
    server = servers.start({"a": "8M"})
    old = rng.randbytes(MIB)
    write(server, "a", old)
    server.cli("snapshot", "create", "a@s")
    client = connect(server, "a")
    client.pwrite(rng.randbytes(MIB), 0)
    server.kill()
    server.cli("snapshot", "rollback", "a@s", "--yes")
    server.start()
    assert read(server, "a", MIB) == old


# --- groups -----------------------------------------------------------------------------


class Pairs(threading.Thread):
    """Writes ascending numbers to one volume and then to the other, until it is told to stop."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.clients = [connect(server, name) for name in ("a", "b")]
        self.number, self.stopping, self.error = 0, False, None
        for client in self.clients:
            client.pwrite(bytes(512), 0)
        self.start()

    def run(self):
        try:
            while not self.stopping:
                self.number += 1
                for client in self.clients:
                    client.pwrite(self.number.to_bytes(8, "little").ljust(512, b"\0"), 0)
        except nbd.Error as e:
            self.error = e

    def goes_on(self):
        """Whether it writes, from a moment after this was asked."""
        assert not self.error, self.error
        was = self.number
        wait_until(lambda: self.number >= was + 2, FREEZE_LIMIT_S, "clients' writes go on")

    def stop(self):
        self.stopping = True
        self.join(FREEZE_LIMIT_S)
        assert not self.is_alive() and not self.error, self.error
        for client in self.clients:
            client.shutdown()


def number_of(server, name):
    return int.from_bytes(read(server, name, 8), "little")


def test_a_group_is_of_one_instant(servers):
    server = servers.start({"b": "1M", "a": "1M"}, ["--threads", "2", "--cache-size", "64M"])
    pairs = Pairs(server)
    # A writer that is never between two writes would show nothing.
    seen = set()
    for i in range(15 if stores.on_fdb() else 40):
        server.cli("snapshot", "create", f"a@{i}", f"b@{i}")
        first, second = number_of(server, f"a@{i}"), number_of(server, f"b@{i}")
        assert second in (first, first - 1), f"snapshot {i}: {first}, then {second}"
        seen.add(first)
    pairs.goes_on()
    pairs.stop()
    assert len(seen) > 5


def test_a_group_of_free_volumes(servers):
    server = servers.start({"a": "1M", "b": "1M", "c": "1M"})
    holder = connect(server, "b")
    holder.pwrite(b"b" * 512, 0)
    server.cli("snapshot", "create", "c@g", "b@g", "a@g")
    for name in "abc":
        assert snapshots(server, name) == ["g"]
    wait_until_free(server, "a")
    assert owner(server, "b")["pid"] == server.pid
    holder.pwrite(b"c" * 512, 0)
    assert read(server, "b@g", 512) == b"b" * 512
    holder.shutdown()


def test_a_group_is_made_whole_or_not_at_all(served):
    served.cli("create", "c", "1M")
    served.cli("snapshot", "create", "b@taken")
    for words in (["a@taken", "b@taken"], ["c@taken", "b@taken", "a@taken"]):
        said = refused(served, "snapshot", "create", *words)
        assert '"taken"' in said and "none of the" in said
        assert snapshots(served, "a") == [] and snapshots(served, "c") == []
        assert snapshots(served, "b") == ["taken"]
    refused(served, "snapshot", "create", "a@x", "nowhere@x", status=NOTFOUND)
    assert snapshots(served, "a") == []
    write(served, "a", b"x" * 512)
    served.cli("snapshot", "create", "a@taken", "c@taken")


def test_two_groups_at_once(served):
    """In opposite orders, and each time both get through."""
    command = program() + ["--store", served.store, "snapshot", "create"]
    env = dict(os.environ, **served.store_env)
    for i in range(5):
        made = [subprocess.Popen(command + [f"{v}@{i}-{k}" for v in volumes], text=True, env=env,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                for k, volumes in enumerate(("ab", "ba"))]
        said = [p.communicate(timeout=CLI_LIMIT_S) for p in made]
        assert [p.returncode for p in made] == [DONE, DONE], said
    for name in "ab":
        assert len(snapshots(served, name)) == 10


def test_a_group_command_that_dies_holds_nobody_up(servers, rng):
    server = servers.start({"a": "1M", "b": "1M"})
    pairs = Pairs(server)
    command = program() + ["--store", server.store, "snapshot", "create"]
    for i in range(6):
        process = subprocess.Popen(command + [f"a@{i}", f"b@{i}"],
                                   env=dict(os.environ, **server.store_env),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        process.wait()
        pairs.goes_on()
    pairs.stop()
    # Nothing is left in the way of the next one.
    server.cli("snapshot", "create", "a@after", "b@after")


# --- flatten ----------------------------------------------------------------------------


def test_flatten(served, rng):
    old, own = rng.randbytes(4 * MIB), rng.randbytes(MIB)
    write(served, "a", old)
    served.cli("snapshot", "create", "a@s")
    served.cli("clone", "a@s", "c")
    write(served, "c", own, MIB)
    client = connect(served, "c")
    client.trim(MIB, 3 * MIB)
    client.shutdown()
    wanted = old[:MIB] + own + old[2 * MIB:3 * MIB] + bytes(2 * MIB)
    assert '"c"' in served.cli("flatten", "c").stdout
    assert served.json("info", "c")["parent"] is None
    assert read(served, "c", 5 * MIB) == wanted
    assert "not a clone" in served.cli("flatten", "c").stdout
    assert "not a clone" in served.cli("flatten", "a").stdout
    served.cli("snapshot", "remove", "a@s")
    write(served, "a", bytes(8 * MIB - 512))
    assert read(served, "c", 5 * MIB) == wanted
    wait_until_free(served, "c")


def test_flatten_refuses(run):
    run("create", "a", "1M")
    run("snapshot", "create", "a@s")
    run("clone", "a@s", "c")
    run("snapshot", "create", "c@one")
    run("snapshot", "create", "c@two")
    assert '"one" and "two"' in run("flatten", "c", status=FAILED).stderr
    assert run.json("info", "c")["parent"] == "a@s"
    run("flatten", "nowhere", status=NOTFOUND)
    run("flatten", "a@s", status=USAGE)
    run("flatten", status=USAGE)


def test_flatten_under_a_client(servers, rng):
    """What is written while it goes on stays, whether the clone was in use before or is taken
    while the command has it."""
    server = servers.start({"a": "64M"})
    model = bytearray(rng.randbytes(32 * MIB) + bytes(32 * MIB))
    write(server, "a", bytes(model[:32 * MIB]))
    server.cli("snapshot", "create", "a@s")
    for name in ("before", "meanwhile"):
        server.cli("clone", "a@s", name)
        now = bytearray(model)
        client = connect(server, name)
        if name == "before":
            client.pwrite(bytes(512), 0)
            now[:512] = bytes(512)
        process = subprocess.Popen(program() + ["--store", server.store, "flatten", name],
                                   env=dict(os.environ, **server.store_env), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wrote = 0
        while process.poll() is None or wrote < 20:
            at = rng.randrange(40 * MIB // BLOCK) * BLOCK
            data = rng.randbytes(BLOCK)
            client.pwrite(data, at)
            now[at:at + BLOCK] = data
            wrote += 1
        _, said = process.communicate(timeout=CLI_LIMIT_S)
        assert process.returncode == DONE, said
        client.shutdown()
        assert server.json("info", name)["parent"] is None
        assert read(server, name, 64 * MIB) == now
    server.cli("snapshot", "remove", "a@s")


def test_flatten_can_be_interrupted(servers, rng):
    server = servers.start({"a": "64M"})
    data = rng.randbytes(48 * MIB)
    write(server, "a", data)
    server.cli("snapshot", "create", "a@s")
    server.cli("clone", "a@s", "c")
    for _ in range(3):
        process = subprocess.Popen(program() + ["--store", server.store, "flatten", "c"],
                                   env=dict(os.environ, **server.store_env), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_until(lambda: process.poll() is not None or owner(server, "c") is not None,
                   30 * SLOW, "the command has the clone")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=CLI_LIMIT_S)
        if process.returncode == DONE:
            break
        assert process.returncode == FAILED and "run it again" in said, said
        wait_until_free(server, "c")
        assert read(server, "c", 48 * MIB) == data
        assert server.json("info", "c")["parent"] == "a@s"
    server.cli("flatten", "c")
    assert server.json("info", "c")["parent"] is None
    server.cli("snapshot", "remove", "a@s")
    server.cli("remove", "a", "--yes")
    assert read(server, "c", 48 * MIB) == data


# --- interruptions ----------------------------------------------------------------------


@pytest.mark.parametrize("words", [["snapshot", "remove", "a@s"],
                                   ["snapshot", "rollback", "a@s", "--yes"]])
def test_clearing_can_be_interrupted(servers, rng, words):
    """The change is made, the volume is free at once, and who uses it next goes on clearing."""
    server = servers.start({"a": "64M"})
    old, new = rng.randbytes(16 * MIB), rng.randbytes(16 * MIB)
    write(server, "a", old)
    server.cli("snapshot", "create", "a@s")
    write(server, "a", new)
    process = subprocess.Popen(program() + ["--store", server.store, *words], text=True,
                               env=dict(os.environ, **server.store_env), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert '"a' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=CLI_LIMIT_S)
    assert process.returncode in (DONE, -signal.SIGINT), said
    if process.returncode == DONE:
        # Or it came before or after there was anything to interrupt.
        wait_until_free(server, "a")
    assert read(server, "a", 16 * MIB) == (new if words[1] == "remove" else old)
    assert snapshots(server, "a") == ([] if words[1] == "remove" else ["s"])
    if stores.on_fdb():
        return
    holder = connect(server, "a")
    holder.pwrite(b"x" * 512, 0)
    wait_until(lambda: server.json("info", "a")["stored_bytes"] <= 16 * MIB + 64 * 1024, 30 * SLOW,
               "what is not named any more is given back")
    holder.shutdown()
