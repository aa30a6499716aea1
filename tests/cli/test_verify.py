"""verify and usage: what they say of volumes that are whole, in use, damaged, and full of
snapshots (G5, G7)."""

import json
import os
import re
import signal
import subprocess

import nbd
import pytest

from harness import stores, tuples
from harness.commands import (DONE, FAILED, NOTFOUND, USAGE, assert_one_sentence, connect,  # noqa: F401
                              run, store, wait_until_free)
from harness.load import Background, Load, Shape
from harness.server import CLI_LIMIT_S, SLOW, cli, program, wait_until

MIB = 1 << 20
BLOCK = 16384


@pytest.fixture
def server(servers):
    """With a volume of blocks of one size, stored as they are, on either engine."""
    store = servers.make()
    cli(store.store, "create", "v", "64M", "--block-size", "16K", "--compression", "none",
        env=store.store_env, prefix=store.cli_prefix)
    return store.start()


def verify(server, name="v", *words, status=DONE):
    done = server.cli("--json", "verify", name, *words, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout)


def damage(server, data):
    """Flips a bit of the stored block that has these bytes, behind everybody's back."""
    if not stores.on_fdb():
        path = server.store_folder / "blocks"
        with open(path, "r+b") as f:
            at = f.read().index(data) + len(data) // 2
            f.seek(at)
            byte = f.read(1)
            f.seek(at)
            f.write(bytes([byte[0] ^ 1]))
        return
    cluster = stores._fdb()
    prefix = cluster.prefix_in(server.store)
    key, value = next((k, v) for k, v in cluster.rows(prefix, "b") if data in v)
    at = value.index(data) + len(data) // 2
    cluster.set(tuples.pack(prefix, *key), value[:at] + bytes([value[at] ^ 1]) + value[at + 1:])


def snapshots(server, name="v"):
    return [s["name"] for s in server.json("snapshot", "list", name)["snapshots"]]


@pytest.mark.parametrize("in_use", [False, True])
def test_nothing_is_wrong(server, rng, in_use):
    client = connect(server, "v")
    for _ in range(20):
        client.pwrite(rng.randbytes(BLOCK), rng.randrange(64) * BLOCK)
    server.cli("snapshot", "create", "v@one")
    client.pwrite(rng.randbytes(4 * BLOCK), 8 * BLOCK)
    client.trim(4 * BLOCK, 40 * BLOCK)
    server.cli("snapshot", "create", "v@two")
    server.cli("clone", "v@one", "w")
    client.pwrite(rng.randbytes(BLOCK), 0)
    if not in_use:
        client.shutdown()
    done = server.cli("verify", "v")
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert 'volume "v" and 2 snapshots' in done.stdout and "nothing is wrong" in done.stdout
    told = verify(server)
    assert told["wrong"] == 0 and told["findings"] == [] and told["snapshots"] == 2
    assert told["blocks"] * BLOCK == told["bytes"] and told["blocks"] >= 5
    assert "0 snapshots" in server.cli("verify", "w").stdout
    # The snapshot it was made at is gone.
    assert snapshots(server) == ["one", "two"] and snapshots(server, "w") == []
    if in_use:
        client.shutdown()


@pytest.mark.limit(300)
def test_while_everything_changes(server, rng):
    """Writes, trims, snapshots and their removal are never taken for damage."""
    load = Load(server, "v", Shape(64 * MIB, connections=2, depth=4, ops=1 << 30, zeros=0.2, trims=0.2,
                                   pace_us=2000), rng)
    with Background(load, 240 * SLOW):
        for i in range(12):
            server.cli("snapshot", "create", f"v@s{i}")
            process = subprocess.Popen(
                [*server.cli_prefix, *program(), "--store", server.store, "verify", "v"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **server.store_env})
            if i > 2:
                server.cli("snapshot", "remove", f"v@s{rng.choice(snapshot_numbers(server))}")
            out, err = process.communicate(timeout=CLI_LIMIT_S)
            assert process.returncode == DONE and "nothing is wrong" in out, out + err
    load.close()
    server.stop()
    verify(server, "v")
    verify(server, "v", "--repair")


def snapshot_numbers(server):
    return [int(s[1:]) for s in snapshots(server) if re.fullmatch(r"s\d+", s)]


def test_a_damaged_block(server, rng):
    """What is wrong, of which bytes, since which snapshot; it stays so until it is overwritten."""
    blocks = [rng.randbytes(BLOCK) for _ in range(4)]
    client = connect(server, "v")
    for i, data in enumerate(blocks):
        client.pwrite(data, (10 + i) * BLOCK)
    server.cli("snapshot", "create", "v@one")
    client.pwrite(rng.randbytes(BLOCK), 10 * BLOCK)
    server.cli("snapshot", "create", "v@two")
    client.flush()
    client.shutdown()
    server.stop()
    damage(server, blocks[0])
    damage(server, blocks[2])
    told = verify(server, status=FAILED)
    assert told["wrong"] == 2 and told["repaired"] == 0
    found = sorted(told["findings"], key=lambda f: f["offset"])
    branch = server.json("info", "v")["branch"]
    for f, i, last in ((found[0], 10, "v@one"), (found[1], 12, "v")):
        assert f["what"] == "block damaged" and not f["repaired"]
        assert (f["offset"], f["length"]) == (i * BLOCK, BLOCK)
        assert (f["first"], f["last"]) == ("v@one", last)
        assert f["key"] == f'("b", {branch}, 1, {i})'
    said = server.cli("verify", "v", check=False)
    assert said.returncode == FAILED and said.stderr == ""
    assert f"block damaged: bytes {12 * BLOCK} to {13 * BLOCK - 1} of v@one to v;" in said.stdout
    assert "2 things are wrong" in said.stdout
    assert "overwrite those ranges, or restore" in said.stdout.splitlines()[-2]
    # A repair does not invent data.
    assert verify(server, "v", "--repair", status=FAILED)["repaired"] == 0
    server.start()
    client = connect(server, "v")
    with pytest.raises(nbd.Error) as e:
        client.pread(BLOCK, 12 * BLOCK)
    assert e.value.errno == "EIO"
    assert client.pread(BLOCK, 13 * BLOCK) == blocks[3]
    client.pwrite(blocks[2], 12 * BLOCK)
    assert client.pread(BLOCK, 12 * BLOCK) == blocks[2]
    client.shutdown()
    found = sorted(verify(server, status=FAILED)["findings"], key=lambda f: f["offset"])
    assert [(f["first"], f["last"]) for f in found] == [("v@one", "v@one"), ("v@one", "v@two")]
    server.cli("snapshot", "remove", "v@one", "v@two")
    assert verify(server)["wrong"] == 0


def test_repair_is_for_volumes_nobody_uses(server):
    client = connect(server, "v")
    client.pwrite(b"x" * 512, 0)
    done = server.cli("verify", "v", "--repair", check=False, limit_s=CLI_LIMIT_S)
    assert done.returncode == FAILED and done.stdout == ""
    assert_one_sentence(done.stderr)
    assert "in use" in done.stderr
    # What its owner has answered when it dies is verified with the rest.
    server.kill()
    assert verify(server, "v", "--repair")["blocks"] == 1


def test_refusals(run):
    run("create", "v", "8M")
    assert "no volume" in run("verify", "x", status=NOTFOUND).stderr
    assert "no volume" in run("usage", "x", status=NOTFOUND).stderr
    run("usage", "v@s", status=USAGE)


@pytest.mark.lmdb("how long it takes is known there")
def test_interrupted(server, rng):
    client = connect(server, "v")
    for at in range(0, 64 * MIB, 8 * MIB):
        client.pwrite(rng.randbytes(8 * MIB), at)
    client.flush()
    for _ in range(20):
        process = subprocess.Popen([*program(), "--store", server.store, "verify", "v"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: process.poll() is not None or snapshots(server), 20, "it begins")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert snapshots(server) == []
        if process.returncode == FAILED:
            break
    assert process.returncode == FAILED and out == ""
    assert_one_sentence(err)
    assert "interrupted" in err
    client.shutdown()


# --- usage ------------------------------------------------------------------------------


def usage(server, name="v"):
    (volume,) = server.json("usage", name)["volumes"]
    return volume, {s["name"]: s for s in volume["snapshots"]}


def blocks_of(line, what):
    assert line[what + "_bytes"] % BLOCK == 0
    return line[what + "_bytes"] // BLOCK


def test_usage_of_a_few(server, rng):
    client = connect(server, "v")
    client.pwrite(rng.randbytes(10 * BLOCK), 0)
    server.cli("snapshot", "create", "v@one")
    client.pwrite(rng.randbytes(4 * BLOCK), 0)          # four of the first are only in "one"
    server.cli("snapshot", "create", "v@two")
    client.pwrite(rng.randbytes(3 * BLOCK), 2 * BLOCK)  # two of "two", one of both
    client.trim(BLOCK, 9 * BLOCK)
    client.shutdown()
    server.cli("clone", "v@one", "w")
    theirs = connect(server, "w")
    theirs.pwrite(rng.randbytes(2 * BLOCK), 9 * BLOCK)
    theirs.shutdown()
    wait_until_free(server, "v")
    wait_until_free(server, "w")
    volume, snaps = usage(server)
    assert volume["complete"] and volume["stored_is"] == ("estimated" if stores.on_fdb() else "measured")
    assert blocks_of(volume, "used") == 9 and blocks_of(volume, "exclusive") == 3
    assert [(n, blocks_of(s, "used"), blocks_of(s, "exclusive")) for n, s in snaps.items()] == [
        ("one", 10, 4), ("two", 10, 2)]
    clone, snaps = usage(server, "w")
    assert snaps == {}
    assert blocks_of(clone, "used") == 11 and blocks_of(clone, "inherited") == 9
    assert blocks_of(clone, "exclusive") == 2
    if not stores.on_fdb():
        assert 17 * BLOCK <= volume["stored_bytes"] <= 18 * BLOCK
    table = server.cli("usage").stdout.splitlines()
    assert table[0].split() == ["NAME", "SIZE", "USED", "INHERITED", "EXCLUSIVE", "STORED", "FREED"]
    assert [line.split()[0] for line in table[1:]] == ["v@one", "v@two", "v", "w"]
    assert {v["name"] for v in server.json("usage")["volumes"]} == {"v", "w"}


@pytest.mark.lmdb("counts keys by what they take, which only this engine tells exactly")
def test_usage_says_what_removing_frees(server, rng):
    """Random histories: each removal frees what was foretold, and what was foretold of the others
    then is what they have."""
    client = connect(server, "v")

    def stored_blocks():
        # Each has its key and head besides: less than one block in all.
        return usage(server)[0]["stored_bytes"] // BLOCK

    for i in range(8):
        for _ in range(rng.randrange(6)):
            n = rng.randrange(1, 6)
            at = rng.randrange(30) * BLOCK
            if rng.random() < 0.3:
                client.trim(n * BLOCK, at)
            else:
                client.pwrite(rng.randbytes(n * BLOCK), at)
        server.cli("snapshot", "create", f"v@s{i}")
    client.shutdown()
    wait_until_free(server, "v")
    left = list(range(8))
    rng.shuffle(left)
    for i in left:
        volume, snaps = usage(server)
        before = stored_blocks()
        foretold = blocks_of(snaps[f"s{i}"], "exclusive")
        assert abs(snaps[f"s{i}"]["freed_bytes"] - foretold * BLOCK) <= BLOCK
        server.cli("snapshot", "remove", f"v@s{i}")
        assert before - stored_blocks() == foretold, (i, left)
    volume, snaps = usage(server)
    assert snaps == {} and blocks_of(volume, "exclusive") == blocks_of(volume, "used")
    assert stored_blocks() == blocks_of(volume, "used")
