"""Other people's clients: libnbd, qemu, fio and nbdfuse, byte for byte.

Each reads what another wrote, so that a mistake that one client and the server
share does not go unseen. Sizes are a multiple of 512 but not of 4096, offsets
and lengths are odd.
"""

import hashlib
import json
import os
import shutil
import subprocess

import pytest

from harness.rawnbd import connect
from harness.server import SLOW, wait_until

nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")

MIB = 1 << 20
# 17 MiB and 7 sectors: the last block of any size is a partial one.
ODD = 17 * MIB + 7 * 512


def run(*words, check=True, limit_s=120, **more):
    done = subprocess.run([str(w) for w in words], capture_output=True, timeout=limit_s * SLOW,
                          **more)
    if check:
        assert done.returncode == 0, (f"{words}\ngave {done.returncode}\n"
                                      f"{done.stdout.decode(errors='replace')}"
                                      f"{done.stderr.decode(errors='replace')}")
    return done


def need(program):
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def server(module_servers):
    volumes = {name: ODD for name in ("nbdcopy", "nbdsh", "aio", "qemu", "qemuio", "fuse", "info",
                                      "sparse")}
    return module_servers.start({**volumes, "fio": "64M"})


@pytest.fixture(params=["unix", "tcp"])
def uri(server, request):
    return lambda name: server.uri(name, tcp=request.param == "tcp")


def odd_image(rng, path, size=ODD):
    """A file with random data, zeros that are written and holes, at odd borders."""
    with open(path, "wb") as f:
        f.truncate(size)
        for _ in range(60):
            at = rng.randrange(size)
            f.seek(at)
            length = min(rng.choice([1, 100, 511, 4097, 65536, 300001]), size - at)
            f.write(rng.randbytes(length) if rng.random() < 0.8 else bytes(length))
        f.seek(size - 3)
        f.write(b"end")
    return path


def digest(data):
    return hashlib.sha256(data).hexdigest()


def content(server, name):
    with connect(server, name, structured=True) as c:
        return c.read_all()


# -- libnbd -----------------------------------------------------------------------


def test_nbdinfo(uri):
    need("nbdinfo")
    told = json.loads(run("nbdinfo", "--json", uri("info")).stdout)["exports"][0]
    assert told["export-size"] == ODD
    assert told["is_read_only"] is False
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df",
                    "can_cache", "can_fast_zero"):
        assert told[ability] is True, ability
    assert told["block_size_minimum"] == 1
    assert "base:allocation" in told["contexts"]


def test_nbdinfo_list(server):
    need("nbdinfo")
    told = json.loads(run("nbdinfo", "--json", "--list", server.uri()).stdout)
    assert {e["export-name"] for e in told["exports"]} >= {"info", "fio", "qemu"}


def test_nbdinfo_map(server, rng):
    need("nbdinfo")
    with connect(server, "info") as c:
        c.trim(0, ODD)
        c.write(MIB, rng.randbytes(2 * MIB))
    told = json.loads(run("nbdinfo", "--map", "--json", server.uri("info")).stdout)
    assert sum(e["length"] for e in told) == ODD
    data = [e for e in told if e["type"] == 0]
    assert sum(e["length"] for e in data) == 2 * MIB
    assert data[0]["offset"] == MIB
    assert all(e["type"] == 3 for e in told if e not in data)


def test_nbdcopy_both_ways(server, uri, folder, rng):
    need("nbdcopy")
    source = odd_image(rng, folder / "in")
    run("nbdcopy", "--flush", source, uri("nbdcopy"))
    want = source.read_bytes()
    assert digest(content(server, "nbdcopy")) == digest(want)
    run("nbdcopy", uri("nbdcopy"), folder / "out")
    assert digest((folder / "out").read_bytes()) == digest(want)
    # Onto what is there already: what is a hole in the source must become zeros.
    second = odd_image(rng, folder / "in2")
    run("nbdcopy", "--flush", "--connections=4", "--requests=32", second, uri("nbdcopy"))
    assert digest(content(server, "nbdcopy")) == digest(second.read_bytes())


def test_nbdcopy_keeps_it_sparse(server, folder):
    need("nbdcopy")
    with open(folder / "in", "wb") as f:
        f.truncate(ODD)
        f.seek(5 * MIB)
        f.write(os.urandom(65536))
    run("nbdcopy", "--flush", folder / "in", server.uri("sparse"))
    wait_until(lambda: 65536 <= server.used_bytes("sparse") <= MIB, 60 * SLOW,
               "64 KiB of data take about as much")


def test_nbdcopy_from_volume_to_volume(server, folder, rng):
    need("nbdcopy")
    source = odd_image(rng, folder / "in")
    run("nbdcopy", source, server.uri("nbdcopy"))
    run("nbdcopy", "--flush", server.uri("nbdcopy"), server.uri("nbdsh"))
    assert digest(content(server, "nbdsh")) == digest(source.read_bytes())


@pytest.mark.parametrize("structured", [False, True])
def test_nbdsh_random_requests_against_an_array(server, uri, rng, structured):
    """libnbd's synchronous calls at any offset and length, checked against plain bytes."""
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    # libnbd's own check of alignment and bounds is not what is tested.
    h.set_strict_mode(0)
    h.connect_uri(uri("nbdsh"))
    assert h.get_size() == ODD
    h.zero(ODD, 0)
    model = bytearray(ODD)
    for _ in range(300):
        at = rng.randrange(ODD)
        length = min(rng.choice([1, 2, 511, 513, 4096, 16385, 100000, 2 * MIB + 1]), ODD - at)
        what = rng.random()
        flags = rng.choice([0, 0, 0, nbd.CMD_FLAG_FUA])
        if what < 0.4:
            data = rng.randbytes(length)
            h.pwrite(data, at, flags)
            model[at:at + length] = data
        elif what < 0.5:
            h.zero(length, at, flags | rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
            model[at:at + length] = bytes(length)
        elif what < 0.6:
            h.trim(length, at, flags)
            model[at:at + length] = bytes(length)
        elif what < 0.65:
            h.flush()
        elif what < 0.7:
            h.cache(length, at)
        else:
            assert h.pread(length, at) == model[at:at + length]
    assert h.pread(ODD, 0) == model
    h.shutdown()


def test_nbdsh_block_status_agrees_with_what_is_read(server, rng):
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(server.uri("nbdsh"))
    h.trim(ODD, 0)
    for _ in range(10):
        at = rng.randrange(ODD - 100000)
        h.pwrite(rng.randbytes(100000), at)
    at = 0
    while at < ODD:
        found = []
        h.block_status(ODD - at, at, lambda context, offset, entries, error: found.extend(entries))
        for length, status in zip(found[::2], found[1::2]):
            length = min(length, ODD - at)
            data = h.pread(length, at)
            if status & nbd.STATE_ZERO:
                assert data == bytes(length)
            at += length
    h.shutdown()


def test_nbdsh_many_in_flight_on_several_connections(server, uri, rng):
    """Asynchronous writes over four connections, no two at the same place, then reads."""
    handles = []
    for _ in range(4):
        h = nbd.NBD()
        h.connect_uri(uri("aio"))
        handles.append(h)
    unit = 40961
    model = bytearray(ODD)
    cookies = []
    for i in range(ODD // unit):
        data = rng.randbytes(unit)
        model[i * unit:(i + 1) * unit] = data
        h = handles[i % 4]
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        cookies.append((h, h.aio_pwrite(buffer, i * unit)))
    for h, cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
    handles[0].flush()
    model[ODD // unit * unit:] = handles[1].pread(ODD - ODD // unit * unit, ODD // unit * unit)
    for h in handles:
        assert h.pread(ODD, 0) == model
        h.shutdown()


# -- qemu -------------------------------------------------------------------------


def test_qemu_img_convert_and_compare(server, uri, folder, rng):
    need("qemu-img")
    source = odd_image(rng, folder / "in")
    for options in ([], ["-S", "0"], ["-W", "-m", "16"], ["--target-is-zero"]):
        if options == ["--target-is-zero"]:
            with connect(server, "qemu") as c:
                c.trim(0, ODD)
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", *options, source, uri("qemu"))
        assert digest(content(server, "qemu")) == digest(source.read_bytes())
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri("qemu"))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri("qemu"), folder / "out.qcow2")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", folder / "out.qcow2", uri("qemu"))
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", folder / "out.qcow2", folder / "out")
    assert digest((folder / "out").read_bytes()) == digest(source.read_bytes())
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri("qemu")).stdout)
    assert told["virtual-size"] == ODD


def test_qemu_img_map(server, rng):
    need("qemu-img")
    with connect(server, "qemu") as c:
        c.trim(0, ODD)
        c.write(3 * MIB, rng.randbytes(MIB))
    told = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw",
                          server.uri("qemu")).stdout)
    assert sum(e["length"] for e in told) == ODD
    assert [(e["start"], e["length"]) for e in told if not e["zero"]] == [(3 * MIB, MIB)]


def test_qemu_img_bench(uri):
    """Deep queues of aligned writes with flushes between, and reads."""
    need("qemu-img")
    for options in (["-w", "--flush-interval=64", "--pattern=7"], []):
        run("qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "2000", "-d", "64", "-s", "4096",
            *options, uri("qemuio"))


def test_qemu_io_patterns(server, uri):
    """qemu-io checks its own patterns; odd offsets make qemu read, change and write."""
    need("qemu-io")
    steps = [
        f"discard 0 {ODD}",
        "write -P 0x11 0 1M", "write -P 0x22 4095 8195", "write -z 65537 70001",
        "write -z -u 300000 4096", "write -f -P 0x33 1048575 3",
        f"write -P 0x44 {ODD - 1000} 1000", "discard 524288 65536",
        "write -P 0x66 2M 9M", "flush",
        "read -P 0x11 0 4095", "read -P 0x22 4095 8195", "read -P 0 65537 70001",
        "read -P 0 300000 4096", "read -P 0x33 1048575 3", f"read -P 0x44 {ODD - 1000} 1000",
        "read -P 0 524288 65536", "read -P 0x66 2M 9M", "read -P 0x11 135538 1000",
    ]
    words = [w for s in steps for w in ("-c", s)]
    for cache in ("none", "writethrough"):
        done = run("qemu-io", "-f", "raw", "-t", cache, *words, uri("qemuio"))
        text = done.stdout.decode() + done.stderr.decode()
        assert "failed" not in text.lower(), text


def test_qemu_reconnects_to_a_restarted_server(servers):
    """D1: with reconnect-delay a request waits for the server to come back and is answered.

    qemu-io sleeps between its two halves; the server is killed while it does, and
    started again only when qemu has noticed.
    """
    need("qemu-io")
    s = servers.start({"v": ODD}, tcp=False)
    options = ("driver=nbd,server.type=unix,server.path=" + str(s.socket_path)
               + ",export=v,reconnect-delay=60")
    process = subprocess.Popen(
        ["qemu-io", "--image-opts", options], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    try:
        def say(line):
            process.stdin.write(line + "\n")
            process.stdin.flush()

        say("write -P 0x5a 1234 70000")
        # The prompt comes back once the write has been answered.
        text = ""
        while "ops" not in text:
            more = process.stdout.readline()
            assert more, text
            text += more
        s.kill()
        say("read -P 0x5a 1234 70000")
        say("write -P 0x77 4096 4096")
        say("flush")
        say("quit")
        s.start()
        out, _ = process.communicate(timeout=90 * SLOW)
    finally:
        process.kill()
        process.wait()
    assert "failed" not in out.lower() and "error" not in out.lower(), out
    with connect(s, "v") as c:
        assert c.read(4096, 4096) == b"\x77" * 4096
        assert c.read(1234, 2862) == b"\x5a" * 2862

# -- snapshots ----------------------------------------------------------------------


def written_and_snapped(server, name, rng):
    """A volume with the snapshots mon and tue and changes behind the second; gives what they hold."""
    server.cli("create", name, ODD)
    states = {}
    with connect(server, name) as c:
        for snapshot in ("mon", "tue"):
            for _ in range(20):
                at = rng.randrange(ODD - 300000)
                c.write(at, rng.randbytes(rng.choice([1, 511, 16384, 300000])))
            c.trim(rng.randrange(ODD - MIB), MIB // 2)
            server.cli("snapshot", "create", f"{name}@{snapshot}")
            states[snapshot] = bytes(c.read_all())
        c.write(0, rng.randbytes(MIB))
    return states


def differing(a, b, extents, unit=64 << 10):
    """Checks that whatever differs lies in the extents, and that they are not all there is."""
    inside = bytearray(len(a))
    for at, length in extents:
        inside[at:at + length] = b"\1" * length
    for at in range(0, len(a), unit):
        if a[at:at + unit] != b[at:at + unit]:
            for i in range(at, min(at + unit, len(a))):
                assert a[i] == b[i] or inside[i], i
    assert 0 < inside.count(1) < len(a)


def test_nbdinfo_map_of_snapshots(server, rng):
    """B.25, D.10: what nbdinfo shows of a snapshot, and of what has changed since one."""
    need("nbdinfo")
    states = written_and_snapped(server, "mapped", rng)
    told = json.loads(run("nbdinfo", "--json", server.uri("mapped@tue")).stdout)["exports"][0]
    assert told["is_read_only"] and told["can_multi_conn"] and told["export-size"] == ODD
    assert "qemu:dirty-bitmap:mon" in told["contexts"]
    assert "qemu:dirty-bitmap:tue" not in told["contexts"]
    told = json.loads(run("nbdinfo", "--map", "--json", server.uri("mapped@mon")).stdout)
    assert sum(e["length"] for e in told) == ODD
    for e in told:
        assert e["type"] in (0, 2, 3)
        part = states["mon"][e["offset"]:e["offset"] + e["length"]]
        assert e["type"] == 0 or part == bytes(len(part))
    told = json.loads(run("nbdinfo", "--map=qemu:dirty-bitmap:mon", "--json",
                          server.uri("mapped@tue")).stdout)
    assert sum(e["length"] for e in told) == ODD
    assert {e["description"] for e in told} == {"clean", "dirty"}
    differing(states["mon"], states["tue"],
              [(e["offset"], e["length"]) for e in told if e["type"] == 1])


def qemu_options(server, export, bitmap=None):
    options = f"driver=nbd,server.type=unix,server.path={server.socket_path},export={export}"
    return options + (f",x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}" if bitmap else "")


def test_qemu_img_map_of_a_dirty_bitmap(server, rng):
    need("qemu-img")
    states = written_and_snapped(server, "qemumap", rng)
    told = json.loads(run("qemu-img", "map", "--output=json", "--image-opts",
                          qemu_options(server, "qemumap@tue", "mon")).stdout)
    assert sum(e["length"] for e in told) == ODD
    # qemu shows the bit of the bitmap as it shows a hole.
    differing(states["mon"], states["tue"],
              [(e["start"], e["length"]) for e in told if not e["data"]])


def test_D10_qemu_style_incremental_pull(server, folder, rng):
    """A full backup of one snapshot; then, of the next, what the bitmap says, read into an overlay
    by copy-on-read, as scripts around qemu do it. The overlay on the full backup is the second
    snapshot, and holds little more than what changed."""
    need("qemu-img")
    need("qemu-io")
    states = written_and_snapped(server, "pulled", rng)
    full, part = folder / "mon.qcow2", folder / "tue.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri("pulled@mon"), full)
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", server.uri("pulled@tue"), part)
    told = json.loads(run("qemu-img", "map", "--output=json", "--image-opts",
                          qemu_options(server, "pulled@tue", "mon")).stdout)
    reads = [w for e in told if not e["data"] for w in ("-c", f"read {e['start']} {e['length']}")]
    run("qemu-io", "-C", "-f", "qcow2", *reads, part)
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", full, part)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", part, folder / "restored")
    # qcow2 rounds sizes up to its sectors, which this one is a multiple of.
    assert digest((folder / "restored").read_bytes()) == digest(states["tue"])
    dirty = sum(e["length"] for e in told if not e["data"])
    assert part.stat().st_blocks * 512 < dirty + 4 * MIB


def test_D10_nbdcopy_of_a_snapshot_under_writes(server, folder, rng):
    need("nbdcopy")
    states = written_and_snapped(server, "copied", rng)
    with connect(server, "copied") as c:
        copy = subprocess.Popen(["nbdcopy", server.uri("copied@mon"), folder / "out"])
        while copy.poll() is None:
            c.write(rng.randrange(ODD - 65536), rng.randbytes(65536))
    assert copy.returncode == 0
    assert digest((folder / "out").read_bytes()) == digest(states["mon"])


# -- fio --------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["randwrite", "write", "randrw", "trimwrite"])
def test_fio_verify(server, uri, folder, job):
    """fio writes blocks that carry their own checksum, and reads them all again."""
    need("fio")
    if "nbd" not in run("fio", "--enghelp").stdout.decode():
        pytest.skip("this fio has no nbd engine")
    sizes = {"randwrite": "--bsrange=512-64k", "write": "--bs=256k", "randrw": "--bs=4k",
             "trimwrite": "--bs=16k"}[job]
    rw = "randrw" if job == "randrw" else job
    run("fio", "--name=v", "--ioengine=nbd", f"--uri={uri('fio')}", f"--rw={rw}", sizes,
        "--size=48M", "--io_size=24M", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1",
        "--do_verify=1", "--fsync=64", "--randrepeat=0", "--bs_unaligned=1", "--norandommap=0",
        cwd=folder, limit_s=180)


# -- nbdfuse ----------------------------------------------------------------------


def test_nbdfuse(server, folder, rng):
    need("nbdfuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened")
    need("fusermount3")
    where = folder / "mnt"
    where.mkdir()
    with connect(server, "fuse") as c:
        c.trim(0, ODD)
    process = subprocess.Popen(["nbdfuse", where, server.uri("fuse")], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    try:
        path = where / "nbd"

        def mounted():
            assert process.poll() is None, process.stdout.read().decode()
            return path.exists()
        wait_until(mounted, 60 * SLOW, "nbdfuse has mounted the volume")
        assert path.stat().st_size == ODD
        model = bytearray(ODD)
        with open(path, "r+b", buffering=0) as f:
            for _ in range(80):
                at = rng.randrange(ODD)
                data = rng.randbytes(min(rng.choice([1, 513, 4097, 200001]), ODD - at))
                f.seek(at)
                assert f.write(data) == len(data)
                model[at:at + len(data)] = data
            os.fsync(f.fileno())
        assert digest(path.read_bytes()) == digest(model)
    finally:
        if process.poll() is None:
            run("fusermount3", "-u", where, check=False)
            try:
                process.wait(30 * SLOW)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    assert digest(content(server, "fuse")) == digest(model)
