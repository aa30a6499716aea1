"""fdb-nbd bench: a load for any NBD server."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import zlib

import nbd
import pytest

from harness.commands import DONE, FAILED, NOTFOUND, USAGE, assert_one_sentence
from harness.server import CLI_LIMIT_S, program
from harness.waiting import SLOW, free_port, wait_until

MIB = 1 << 20
SHORT = ("--time", "0.3")
WORKLOADS = {"randread": "r", "read": "r", "randwrite": "w", "write": "w", "randrw": "rw",
             "rw": "rw"}


def bench(uri, *words, status=DONE, limit_s=CLI_LIMIT_S):
    """Runs it with --json; gives the JSON where there is some, else the sentence."""
    done = subprocess.run([*program(), "--json", "bench", uri, *(str(w) for w in words)],
                          capture_output=True, text=True, timeout=limit_s,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}{done.stderr}"
    if status == DONE:
        assert done.stderr == ""
        return json.loads(done.stdout)
    assert_one_sentence(done.stderr)
    return done.stderr


def listens(path):
    """Whether somebody does on this socket. Asked without a connection, for some servers end with
    their first one."""
    with open("/proc/net/unix", encoding="utf-8") as f:
        return any(line.endswith(f" {path}\n") and int(line.split()[3], 16) & 0x10000 for line in f)


class Other:
    """Another NBD server on a unix socket, ended with the test."""

    def __init__(self, folder, words):
        self.path = folder / "other"
        self.path.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL",
             *(str(w).replace("SOCKET", str(self.path)) for w in words)],
            stdin=subprocess.DEVNULL)
        wait_until(lambda: listens(self.path) or self.process.poll() is not None, 20 * SLOW,
                   "the other server listens")
        assert self.process.poll() is None

    @property
    def uri(self):
        return f"nbd+unix:///?socket={self.path}"

    def end(self):
        self.process.terminate()
        self.process.wait(20 * SLOW)


@pytest.fixture
def other(folder):
    """other(words...) starts it; SOCKET in them becomes its socket's path."""
    made = []

    def start(*words):
        if not shutil.which(words[0]):
            pytest.skip(f"{words[0]} is not installed")
        made.append(Other(folder, words))
        return made[-1]
    yield start
    for one in made:
        one.end()


def nbdkit(*words):
    return ("nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET", *words)


def contents(uri):
    client = nbd.NBD()
    client.connect_uri(uri)
    size = client.get_size()
    data = b"".join(client.pread(min(MIB, size - at), at) for at in range(0, size, MIB))
    client.shutdown()
    return data


# --- what is reported -----------------------------------------------------------------------


KEYS = {"uri", "workload", "block_size", "depth", "connections", "flush_every", "fua",
        "compressible_percent", "size", "seed", "seconds", "requests", "errors", "iops", "mb_per_s",
        "read", "write", "flush", "final_flush_ms", "client_cpu_us_per_request",
        "server_cpu_us_per_request"}
LATENCIES = ["p50", "p90", "p99", "p99_9", "max"]


def check_report(told, kinds):
    assert set(told) == KEYS
    assert told["errors"] == 0 and told["requests"] > 0
    parts = [told[k] for k in ("read", "write") if told[k]]
    assert ("r" in kinds) == (told["read"] is not None)
    assert ("w" in kinds) == (told["write"] is not None) == (told["final_flush_ms"] is not None)
    assert sum(p["requests"] for p in parts) == told["requests"]
    for part in parts:
        assert set(part) == {"requests", "iops", "mb_per_s", "latency_us"}
        assert part["iops"] == pytest.approx(part["requests"] / told["seconds"])
        assert part["mb_per_s"] == pytest.approx(part["iops"] * told["block_size"] / 1e6)
    assert sum(p["iops"] for p in parts) == pytest.approx(told["iops"])
    for part in parts + ([told["flush"]] if told["flush"] else []):
        times = part["latency_us"]
        assert set(times) == {"mean", *LATENCIES}
        values = [times[k] for k in LATENCIES]
        assert 0 < values[0] and values == sorted(values) and 0 < times["mean"] <= times["max"]
        assert times["max"] <= told["seconds"] * 1e6
    assert told["client_cpu_us_per_request"] > 0


@pytest.mark.parametrize("workload", WORKLOADS)
def test_each_workload_on_our_server(servers, workload):
    server = servers.start({"v": "64M"})
    kinds = WORKLOADS[workload]
    words = ["--overwrite"] if "w" in kinds else []
    told = bench(server.uri("v"), "--workload", workload, *SHORT, "--pid", server.pid, *words)
    check_report(told, kinds)
    assert told["workload"] == workload and told["size"] == 64 * MIB
    assert (told["block_size"], told["depth"], told["connections"]) == (4096, 32, 1)
    assert 0.3 <= told["seconds"] < 20 * SLOW
    assert told["server_cpu_us_per_request"] > 0
    if kinds == "rw":
        # 70 to 30, of hundreds at least.
        assert 0.6 < told["read"]["requests"] / told["requests"] < 0.8


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("connections,depth,size", [(1, 1, 4096), (4, 8, 4096), (3, 2, 1 << 20)])
def test_connections_depths_and_sizes(servers, kind, connections, depth, size):
    server = servers.start({"v": "64M"})
    told = bench(server.uri("v", tcp=kind == "tcp"), "--workload", "randrw", "--overwrite", *SHORT,
                 "--connections", connections, "--depth", depth, "--block-size", size)
    check_report(told, "rw")
    assert (told["connections"], told["depth"], told["block_size"]) == (connections, depth, size)


@pytest.mark.parametrize("words", [nbdkit("memory", "64M"),
                                   nbdkit("--filter=blocksize-policy", "memory", "64M",
                                          "blocksize-minimum=512", "blocksize-maximum=1M")])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_each_workload_on_nbdkit(other, words, workload):
    told = bench(other(*words).uri, "--workload", workload, "--overwrite", *SHORT,
                 "--connections", 2)
    check_report(told, WORKLOADS[workload])


def test_on_qemu_nbd(other, folder):
    image = folder / "image"
    with open(image, "wb") as f:
        f.truncate(64 * MIB)
    server = other("qemu-nbd", "--persistent", "--shared=4", "-f", "raw", "-k", "SOCKET", image)
    for workload, kinds in WORKLOADS.items():
        check_report(bench(server.uri, "--workload", workload, "--overwrite", *SHORT,
                           "--connections", 2, "--block-size", "64K"), kinds)


def test_on_nbd_server(other, folder):
    if not shutil.which("nbd-server"):
        pytest.skip("nbd-server is not installed")
    image, config = folder / "image", folder / "config"
    with open(image, "wb") as f:
        f.truncate(64 * MIB)
    # It takes the settings for its own user's group only where it is root.
    config.write_text(f"[generic]\nunixsock = {folder}/other\n[disk]\nexportname = {image}\n"
                      "flush = true\nfua = true\n")
    server = other("nbd-server", "-d", "-C", config, "-p", folder / "pid")
    uri = server.uri.replace("///", "///disk")
    check_report(bench(uri, "--workload", "randrw", "--overwrite", "--fua", *SHORT), "rw")


def test_requests_larger_than_any_buffer(other):
    """Replies come while requests are only half sent: neither side waits for the other."""
    told = bench(other(*nbdkit("memory", "256M")).uri, "--workload", "rw", "--block-size", "32M",
                 "--depth", 16, "--overwrite", "--time", "1", "--reads", 50)
    check_report(told, "rw")


def test_report_for_people(servers):
    server = servers.start({"v": "1M"})
    done = subprocess.run([*program(), "bench", server.uri("v"), "--workload", "randrw", "--seed",
                           "42", "--overwrite", "--flush-every", "3", *SHORT, "--pid",
                           str(server.pid)], capture_output=True, text=True, timeout=CLI_LIMIT_S)
    assert done.returncode == DONE and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and "randrw" in lines[0] and "seed 42" in lines[0]
    assert [line.split()[0] for line in lines[1:5]] == ["requests", "read", "write", "flush"]
    assert re.match(r"[\d.]+ s; final FLUSH [\d.]+ ms; CPU us per request: client [\d.]+, "
                    r"server [\d.]+$", lines[5])


def test_a_line_on_a_terminal(servers):
    server = servers.start({"v": "1M"})
    main, side = pty.openpty()
    process = subprocess.Popen([*program(), "bench", server.uri("v"), "--time", "1.5"],
                               stdout=subprocess.PIPE, stderr=side, text=True)
    os.close(side)
    said = b""
    try:
        while True:
            said += os.read(main, 4096)
    except OSError:
        pass  # the process is over
    os.close(main)
    report = process.communicate(timeout=CLI_LIMIT_S)[0]
    assert process.returncode == DONE and "randread" in report
    assert re.search(r"\rrandread: \d+ IOPS: [\d.]+ [KMG]iB, [\d.]+ [KMG]iB/s, 0:0\d",
                     said.decode())


# --- what is asked for ----------------------------------------------------------------------


def stats(folder, uri_of, *words):
    """Runs a load on nbdkit, which tells how many requests of which kind it had."""
    path = folder / "stats"
    server = uri_of(*nbdkit("--filter=stats", "memory", "64M", f"statsfile={path}"))
    told = bench(server.uri, *words)
    server.end()
    text = path.read_text()
    return told, {kind: int((re.search(rf"^{kind}: (\d+) ops", text, re.M) or [0, 0])[1])
                  for kind in ("read", "write", "flush")}


def test_flushes_are_sent(folder, other):
    told, seen = stats(folder, other, "--workload", "randwrite", "--overwrite", "--bytes",
                       1000 * 4096, "--flush-every", 10, "--time", 60)
    assert (told["requests"], told["flush"]["requests"]) == (1000, 100)
    assert (seen["write"], seen["read"]) == (1000, 0)
    assert seen["flush"] == 101  # and the final one


def test_flushes_of_each_connection(folder, other):
    told, seen = stats(folder, other, "--workload", "write", "--overwrite", "--bytes",
                       1001 * 4096, "--flush-every", 7, "--connections", 4, "--time", 60)
    assert told["requests"] == seen["write"] == 1001
    assert told["flush"]["requests"] == 251 // 7 + 3 * (250 // 7)
    assert seen["flush"] == told["flush"]["requests"] + 4


def test_only_the_final_flush(folder, other):
    told, seen = stats(folder, other, "--workload", "randwrite", "--overwrite", "--bytes", MIB)
    assert told["flush"] is None and seen["flush"] == 1 and told["final_flush_ms"] > 0


def test_readers_never_flush(folder, other):
    told, seen = stats(folder, other, "--bytes", MIB)
    assert seen == {"read": 256, "write": 0, "flush": 0} and told["final_flush_ms"] is None


def test_a_flush_waits_for_its_writes_and_the_next_write_for_it(folder, other):
    log = folder / "log"
    server = other(*nbdkit("--filter=log", "--filter=delay", "memory", "64M", "wdelay=1ms",
                           f"logfile={log}"))
    bench(server.uri, "--workload", "randwrite", "--overwrite", "--bytes", 40 * 4096,
          "--flush-every", 4, "--depth", 16)
    server.end()
    in_flight, order = set(), ""
    for line in log.read_text().splitlines():
        begun = re.search(r" (Write|Flush) id=(\d+)", line)
        ended = re.search(r" \.\.\.(Write|Flush) id=(\d+)", line)
        if ended:
            in_flight.remove(ended.groups())
        elif begun:
            assert not in_flight or {k for k, _ in in_flight} == {begun[1]} == {"Write"}
            in_flight.add(begun.groups())
            order += begun[1][0]
    assert order == "WWWWF" * 10 + "F"


def test_fua_is_on_each_write(folder, other):
    log = folder / "log"
    server = other(*nbdkit("--filter=log", "memory", "64M", f"logfile={log}"))
    bench(server.uri, "--workload", "randrw", "--overwrite", "--bytes", MIB, "--fua")
    server.end()
    writes = [line for line in log.read_text().splitlines() if " Write id=" in line]
    assert 40 < len(writes) < 120 and all("fua=1" in line for line in writes)


@pytest.mark.parametrize("workload", ["write", "randwrite"])
def test_nothing_outside_the_range_is_written(other, workload):
    server = other(*nbdkit("memory", "8M"))
    told = bench(server.uri, "--workload", workload, "--overwrite", *SHORT, "--start", "1M",
                 "--size", 2 * MIB + 1000, "--connections", 3, "--block-size", "8K")
    assert told["size"] == 2 * MIB + 1000
    data = contents(server.uri)
    assert not any(data[:MIB]) and not any(data[3 * MIB:])
    # Thousands of writes to 256 places.
    blocks = [data[at:at + 8192] for at in range(MIB, 3 * MIB, 8192)]
    assert sum(any(b) for b in blocks) > 200 and len(set(b for b in blocks if any(b))) > 200


def test_connections_share_a_sequence(other):
    """Each has its own part, and together they have all of it."""
    server = other(*nbdkit("memory", "4M"))
    told = bench(server.uri, "--workload", "write", "--overwrite", "--bytes", 4 * MIB,
                 "--connections", 5, "--depth", 3)
    assert told["requests"] == 1024
    data = contents(server.uri)
    blocks = [data[at:at + 4096] for at in range(0, 4 * MIB, 4096)]
    assert all(any(b) for b in blocks) and len(set(blocks)) == 1024


def written(other, *words):
    server = other(*nbdkit("memory", "8M"))
    bench(server.uri, "--overwrite", *words)
    data = contents(server.uri)
    server.end()
    return data


@pytest.mark.parametrize("words", [
    ("--workload", "randwrite", "--bytes", "4M"),
    ("--workload", "write", "--bytes", "8M", "--block-size", "1M", "--connections", "3")])
def test_data_is_what_the_seed_says(other, words):
    # (Two writes to one place may be in flight at once otherwise.)
    words += ("--depth", "1")
    first = written(other, *words, "--seed", 5)
    assert first == written(other, *words, "--seed", 5)
    assert first != written(other, *words, "--seed", 6)


def test_data_does_not_compress(other):
    data = written(other, "--workload", "write", "--bytes", "8M")
    assert len(zlib.compress(data, 1)) > 0.99 * len(data)
    assert len({data[at:at + 512] for at in range(0, len(data), 4096)}) == len(data) // 4096


@pytest.mark.parametrize("percent", [25, 50, 75, 100])
def test_data_compresses_as_asked(other, percent):
    data = written(other, "--workload", "write", "--bytes", "8M", "--compressible", percent)
    for at in range(0, 8 * MIB, MIB):
        # Also block by block.
        packed = sum(len(zlib.compress(data[b:b + 4096])) for b in range(at, at + MIB, 4096)) / MIB
        assert abs(1 - packed - percent / 100) < 0.03, packed
    assert len({data[at:at + 4096] for at in range(0, len(data), 4096)}) == len(data) // 4096


def test_the_seed_is_reported(other):
    server = other(*nbdkit("memory", "8M"))
    assert bench(server.uri, *SHORT, "--seed", 12345)["seed"] == 12345
    seeds = {bench(server.uri, "--bytes", 4096)["seed"] for _ in range(3)}
    assert len(seeds) == 3


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize("workload", [w for w, kinds in WORKLOADS.items() if "w" in kinds])
def test_writing_needs_overwrite(servers, workload):
    server = servers.start({"v": "1M"})
    said = bench(server.uri("v"), "--workload", workload, *SHORT, status=FAILED)
    assert "--overwrite" in said and workload in said
    assert not any(contents(server.uri("v")))


@pytest.mark.parametrize("words", [
    ["http://localhost/x"], ["nbds://localhost/x"], ["nbd+unix:///x"], ["nbd://localhost:0/"], [],
    ["nbd://h/x", "nbd://h/y"], ["nbd://h/x", "--depth", "0"], ["nbd://h/x", "--depth", "1025"],
    ["nbd://h/x", "--connections", "257"], ["nbd://h/x", "--block-size", "511"],
    ["nbd://h/x", "--block-size", "33M"], ["nbd://h/x", "--workload", "trim"],
    ["nbd://h/x", "--reads", "101"], ["nbd://h/x", "--compressible", "-1"],
    ["nbd://h/x", "--time", "0"], ["nbd://h/x", "--time", "soon"], ["nbd://h/x", "--bytes", "0"],
    ["nbd://h/x", "--pid", str((1 << 22) + 1)], ["nbd://h/x", "--fua"],
    ["nbd://h/x", "--flush-every", "2"]])
def test_wrong_command_lines(words):
    done = subprocess.run([*program(), "bench", *words], capture_output=True, text=True,
                          timeout=CLI_LIMIT_S)
    assert done.returncode == USAGE and done.stdout == ""
    assert_one_sentence(done.stderr)


def test_nobody_there(folder):
    assert "No such file" in bench(f"nbd+unix:///?socket={folder}/none", status=FAILED)
    assert "refused" in bench(f"nbd://127.0.0.1:{free_port()}/", status=FAILED)
    assert "host" in bench("nbd://no-such-host.invalid/", status=FAILED)


def test_no_such_export(servers):
    server = servers.start({"v": "1M"})
    assert '"w"' in bench(server.uri("w"), status=NOTFOUND)


def test_no_such_process(servers):
    server = servers.start({"v": "1M"})
    # The end of all process numbers: none ever has it.
    assert "no process 4194304" in bench(server.uri("v"), "--pid", 1 << 22, status=NOTFOUND)


OVER = ("--workload", "write", "--overwrite")


def unflushable(folder):
    """For nbdkit: an export with neither FLUSH nor FUA."""
    script = folder / "script"
    script.write_text("#!/bin/sh\ncase $1 in get_size) echo 1M;; can_write) exit 0;; "
                      "pwrite) cat >/dev/null;; *) exit 2;; esac\n")
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("words,options,sentence", [
    (("-r", "memory", "1M"), OVER, "read-only"),
    (("sh", "script"), (*OVER, "--fua"), "FUA"),
    (("sh", "script"), (*OVER, "--flush-every", "1"), "FLUSH"),
    (("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=8K",
      "blocksize-preferred=8K"), (), "8192"),
    (("--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=4K"),
     ("--start", "512"), "--start"),
    (("--filter=blocksize-policy", "memory", "1M", "blocksize-maximum=64K"),
     ("--block-size", "128K"), "65536"),
    (("memory", "1M"), ("--size", "2M"), "1048576"),
    (("memory", "1M"), ("--start", "1025K"), "1048576"),
    (("memory", "1M"), ("--block-size", "2M"), "1048576"),
    (("memory", "1M"), ("--workload", "read", "--block-size", "512K", "--connections", "3"),
     "each connection"),
    (("--tls=require", "--tls-psk=/dev/null", "memory", "1M"), (), "TLS"),
    (("-o", "memory", "1M"), (), "old NBD handshake"),
])
def test_what_the_server_does_not_offer(other, folder, words, options, sentence):
    if words[0] == "sh":
        words = ("sh", unflushable(folder))
    assert sentence in bench(other(*nbdkit(*words)).uri, *options, status=FAILED)


def test_no_final_flush_where_there_is_none(other, folder):
    told = bench(other(*nbdkit("sh", unflushable(folder))).uri, *OVER, "--bytes", "64K")
    assert told["requests"] == 16 and told["final_flush_ms"] is None


# --- what goes wrong on the way -------------------------------------------------------------


def started(uri, *words, **more):
    return subprocess.Popen([*program(), "--json", "bench", uri, *words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, **more)


@pytest.mark.parametrize("connections", ["1", "3"])
@pytest.mark.parametrize("workload", ["randread", "randrw"])
def test_a_server_that_dies(servers, connections, workload):
    server = servers.start({"v": "64M"})
    before = server.cpu_s()
    process = started(server.uri("v"), "--time", "600", "--overwrite", "--workload", workload,
                      "--connections", connections)
    wait_until(lambda: server.cpu_s() > before + 0.1, 30 * SLOW, "the load runs")
    server.kill()
    out, said = process.communicate(timeout=10 * SLOW)
    assert process.returncode == FAILED and out == ""
    assert_one_sentence(said)
    assert "closed the connection" in said


@pytest.mark.parametrize("connections", ["1", "3"])
def test_a_server_that_stops_answering(servers, connections):
    server = servers.start({"v": "64M"})
    before = server.cpu_s()
    process = started(server.uri("v"), "--time", "600", "--timeout", "1", "--connections",
                      connections)
    wait_until(lambda: server.cpu_s() > before + 0.1, 30 * SLOW, "the load runs")
    server.process.send_signal(signal.SIGSTOP)
    try:
        out, said = process.communicate(timeout=30 * SLOW)
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert process.returncode == FAILED and out == ""
    assert_one_sentence(said)
    assert "not answered for 1 s" in said


def test_ctrl_c_ends_it_with_a_report(servers):
    server = servers.start({"v": "64M"})
    before = server.cpu_s()
    process = started(server.uri("v"), "--time", "600", "--workload", "randwrite", "--overwrite")
    wait_until(lambda: server.cpu_s() > before + 0.1, 30 * SLOW, "the load runs")
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=10 * SLOW)
    assert process.returncode == DONE and said == ""
    told = json.loads(out)
    check_report(told, "w")
    assert told["seconds"] < 60 * SLOW


@pytest.mark.parametrize("workload,kind", [("randread", "READ"), ("randwrite", "WRITE")])
def test_a_request_that_fails(other, workload, kind):
    server = other(*nbdkit("--filter=error", "memory", "64M", "error=ENOSPC", "error-rate=1%"))
    done = subprocess.run([*program(), "--json", "bench", server.uri, "--workload", workload,
                           "--overwrite"], capture_output=True, text=True, timeout=CLI_LIMIT_S)
    assert done.returncode == FAILED
    assert_one_sentence(done.stderr)
    assert re.search(rf"a {kind} of 4096 bytes at \d+ with (EIO|ENOSPC)", done.stderr), done.stderr
    told = json.loads(done.stdout)
    assert 1 <= told["errors"] <= 32 and told["seconds"] < 9


# --- servers of other kinds -----------------------------------------------------------------


class Puppet:
    """A server that says what `talk(connection)` says, on a unix socket."""

    def __init__(self, folder, talk):
        self.path = folder / "puppet"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(8)
        self.talk = talk
        self.made = []
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def uri(self):
        return f"nbd+unix:///disk?socket={self.path}"

    def _serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.made.append(connection)
            try:
                self.talk(connection)
            except (OSError, EOFError):
                pass

    def end(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.made:
            connection.close()


@pytest.fixture
def puppet(folder):
    made = []

    def start(talk):
        made.append(Puppet(folder, talk))
        return made[-1]
    yield start
    for one in made:
        one.end()


def take(connection, n):
    data = b""
    while len(data) < n:
        more = connection.recv(n - len(data))
        if not more:
            raise EOFError
        data += more
    return data


GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 1)
SIZE = 1 << 20


def old_handshake(connection, flags=1):
    """Of a server that knows EXPORT_NAME alone, and no NO_ZEROES."""
    connection.sendall(GREETING)
    assert take(connection, 4) == b"\0\0\0\1"
    while True:
        magic, option, length = struct.unpack(">8sII", take(connection, 16))
        data = take(connection, length)
        assert magic == b"IHAVEOPT"
        if option == 1:
            assert data == b"disk"
            connection.sendall(struct.pack(">QH", SIZE, flags) + bytes(124))
            return
        connection.sendall(struct.pack(">QIII", 0x3e889045565a9, option, 0x80000001, 0))


def requests(connection):
    while True:
        magic, flags, kind, cookie, offset, length = struct.unpack(
            ">IHHQQI", take(connection, 28))
        assert magic == 0x25609513
        if kind == 2:
            return
        yield kind, cookie, offset, length


def test_a_server_without_go(puppet):
    def talk(connection):
        old_handshake(connection)
        for kind, cookie, offset, length in requests(connection):
            assert kind == 0 and offset + length <= SIZE
            connection.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(length))
    check_report(bench(puppet(talk).uri, *SHORT), "r")


def test_replies_in_any_order_and_in_pieces(puppet):
    def talk(connection):
        old_handshake(connection)
        waiting = []
        for kind, cookie, offset, length in requests(connection):
            waiting.append(struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(length))
            if len(waiting) < 8:
                continue
            data = b"".join(reversed(waiting))
            for at in range(0, len(data), 1021):
                connection.sendall(data[at:at + 1021])
            waiting = []
    told = bench(puppet(talk).uri, "--depth", 8, "--block-size", 1000 + 24, "--bytes", 800 * 1024)
    assert told["requests"] == 800


@pytest.mark.parametrize("reply,sentence", [
    (lambda cookie: struct.pack(">IIQ", 0x668e33ef, 0, cookie), "not a simple reply"),
    (lambda cookie: struct.pack(">IIQ", 0x67446698, 0, cookie + 1), "not made"),
    (lambda cookie: struct.pack(">IIQ", 0x67446698, 0, 1 << 60), "not made"),
    (lambda cookie: struct.pack(">IIQ", 0x67446698, 5, cookie) * 2, "not made"),
])
def test_answers_that_are_not_nbd(puppet, reply, sentence):
    def talk(connection):
        old_handshake(connection)
        for _, cookie, *_ in requests(connection):
            connection.sendall(reply(cookie))
    assert sentence in bench(puppet(talk).uri, "--depth", 1, status=FAILED)


@pytest.mark.parametrize("greeting,sentence", [
    (b"", "handshake"), (b"NBDMAG", "handshake"),
    (b"HTTP/1.1 400 Bad Request\r\n", "no NBD server"),
    (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0", "old NBD handshake"),
    (b"NBDMAGICIHAVEOPT\0\0", "fixed newstyle"),
])
def test_greetings_that_are_not_nbd(puppet, greeting, sentence):
    def talk(connection):
        connection.sendall(greeting)
        connection.shutdown(socket.SHUT_WR)
    assert sentence in bench(puppet(talk).uri, status=FAILED)


@pytest.mark.parametrize("answer,sentence", [
    (b"x" * 20, "GO"),
    (struct.pack(">QIII", 0x3e889045565a9, 7, 1, 0), "GO"),  # ACK, and no word about the export
    (struct.pack(">QIII", 0x3e889045565a9, 7, 3, 1 << 31), "GO"),
    (struct.pack(">QIIIH", 0x3e889045565a9, 7, 3, 2, 0), "describes"),
    (struct.pack(">QIII", 0x3e889045565a9, 7, 0x80000002, 9) + b"not\ntoday", "not?today"),
    (struct.pack(">QIIIHQH", 0x3e889045565a9, 7, 3, 12, 0, 1, 1) * 200, "GO"),
])
def test_answers_to_go_that_are_not_nbd(puppet, answer, sentence):
    def talk(connection):
        connection.sendall(GREETING)
        take(connection, 4 + 16 + 4 + 4 + 4)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
    assert sentence in bench(puppet(talk).uri, status=FAILED)


@pytest.mark.parametrize("said", [b"", GREETING, GREETING[:5]])
def test_a_handshake_that_is_never_finished(puppet, said):
    told = bench(puppet(lambda connection: connection.sendall(said)).uri, "--timeout", "0.5",
                 status=FAILED)
    assert "handshake within 0.5 s" in told


def test_a_second_connection_that_is_not_served(other, folder):
    image = folder / "image"
    with open(image, "wb") as f:
        f.truncate(MIB)
    server = other("qemu-nbd", "--persistent", "-f", "raw", "-k", "SOCKET", image)
    said = bench(server.uri, "--connections", "2", "--timeout", "1", status=FAILED)
    assert "connection 2 of 2" in said


def test_little_cpu_while_it_waits(puppet):
    """A slow server is waited for, not asked again and again."""
    def talk(connection):
        old_handshake(connection)
        for _, cookie, _, length in requests(connection):
            time.sleep(0.05)
            connection.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(length))
    told = bench(puppet(talk).uri, "--depth", 1, "--time", "1")
    assert told["client_cpu_us_per_request"] < 5000 * SLOW
    assert told["read"]["latency_us"]["p50"] >= 50000
