"""fdb-nbd status, clients, drain: which servers they find, what they show, what they refuse."""

import json
import os
import pty
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from fcntl import ioctl

import pytest

from fake import Fake, World
from harness import rawnbd
from harness.commands import DONE, FAILED, NOTFOUND, USAGE, assert_one_sentence
from harness.load import Background, Load, Shape
from harness.server import SLOW, cli, free_port, program, wait_until

MIB = 1 << 20
SHAPE = dict(size=16 * MIB, ops=1 << 30, pace_us=500, connections=2, lengths=((4096, 4), (65536, 2)))


class Host:
    """A place where no other servers run: their control sockets lie in a folder of its own."""

    def __init__(self, folder):
        self.prefix, self.env, self.holder = [], {}, None
        if os.geteuid() == 0:
            # Root's is always /run/fdb-nbd, so this is another /run.
            self.holder = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private",
                 "sh", "-c", "mount -t tmpfs run /run && echo ready && exec cat"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self.holder.stdout.readline() == b"ready\n"
            self.prefix = ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt"]
            self.sockets = f"/proc/{self.holder.pid}/root/run/fdb-nbd"
        else:
            self.env = {"XDG_RUNTIME_DIR": str(folder)}
            self.sockets = str(folder / "fdb-nbd")

    def run(self, *words, status=DONE):
        """As commands.run, without a store: these commands need none."""
        done = cli("lmdb:/nonexistent", *words, check=False, env=self.env, prefix=self.prefix)
        assert done.returncode == status, (
            f"{words} gave {done.returncode}, not {status}\n{done.stdout}{done.stderr}")
        if status != DONE:
            assert_one_sentence(done.stderr)
        return done

    def json(self, *words):
        return json.loads(self.run("--json", *words).stdout)

    def end(self):
        if self.holder:
            self.holder.kill()
            self.holder.wait()
            self.holder.stdin.close()
            self.holder.stdout.close()


@pytest.fixture
def host(folder):
    one = Host(folder)
    yield one
    one.end()


@pytest.fixture
def start(servers, host):
    def go(volumes, *args):
        return servers.start(volumes, args, prefix=host.prefix, env=host.env)
    return go


# --- what is shown ----------------------------------------------------------------------------------


def test_under_load(start, host, rng):
    port = free_port()
    server = start({"v": "16M", "w": "1G"}, "--http", f"127.0.0.1:{port}")
    load = Load(server, "v", Shape(**SHAPE), rng)
    with Background(load, 200 * SLOW):
        def busy():
            rates = [v["rates"] for v in host.json("status")["servers"][0]["volumes"]
                     if v["name"] == "v"][0]
            return rates["write_bytes"] > 0
        wait_until(busy, 20 * SLOW, "a second of load is over")
        def has_dirty():
            nonlocal said
            said = host.run("status").stdout
            return said.splitlines()[-2].split()[8:] not in ([], ["0B"])
        said = ""
        wait_until(has_dirty, 20 * SLOW, "something waits for its commit")
        head, _, table = said.partition("\n\n")
        assert f":{server.pid}  serving  {server.store}" in head and f"127.0.0.1:{server.port}" in head
        assert "2 clients, 1 volumes open, 1 owned" in head and "dirty" in head
        title, v, others = table.splitlines()
        assert title.split()[:4] == ["VOLUME", "SIZE", "OWNER", "CLIENTS"]
        cells = v.split()
        assert cells[0] == "v" and cells[1] == "16M" and cells[2].endswith(f":{server.pid}")
        assert cells[3] == "2" and cells[5] != "0B" and cells[7] != "-" and cells[8] != "0B"
        assert others.startswith("and 1 volume not in use here")
        # The same through the address, and for programs.
        assert host.run("status", "--http", f"localhost:{port}").stdout.split()[0] == said.split()[0]
        whole = host.json("status", "--http", f"127.0.0.1:{port}")["servers"][0]
        assert whole["server"]["pid"] == server.pid and len(whole["volumes"]) == 2

        rows = host.run("clients").stdout.splitlines()
        assert len(rows) == 3 and rows[0].startswith("CLIENT")
        assert sum("v" in row.split() for row in rows[1:]) == 2, rows
        def all_wrote():
            clients = host.json("clients")["servers"][0]["clients"]
            return [c["export"] for c in clients if c["written_bytes"] > 0] == ["v", "v"]
        wait_until(all_wrote, 20 * SLOW, "both clients have written")
    load.close()
    with rawnbd.connect(server, "w"):
        wait_until(lambda: host.run("clients").stdout.count("\n") == 2, 20 * SLOW, "one is left")
        assert "w" in host.run("clients").stdout.splitlines()[1].split()
    wait_until(lambda: "nobody is connected" in host.run("clients").stdout, 20 * SLOW, "it has left")


def watch(host, *words, **how):
    return subprocess.Popen([*host.prefix, *program(), "status", "--watch", *words],
                            env={**os.environ, **host.env}, **how)


def test_watch_into_a_pipe_is_plain(start, host):
    start({"v": "1M"})
    process = watch(host, stdout=subprocess.PIPE, text=True)
    pictures, line = 0, None
    while pictures < 3:
        line = process.stdout.readline()
        assert line and "\033" not in line
        pictures += " serving " in line
    process.send_signal(signal.SIGINT)
    # Not closed before: it may be about to write the next one.
    assert process.wait(20 * SLOW) == -signal.SIGINT
    process.stdout.close()


def test_watch_on_a_terminal_stays_on_it(start, host):
    """Each picture is drawn over the one before and cut to the terminal; a server that ends is
    no end of the watching."""
    server = start({f"volume-{i:02}": "1M" for i in range(12)})
    clients = [rawnbd.connect(server, f"volume-{i:02}") for i in range(12)]
    main, other = pty.openpty()
    ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 40, 0, 0))
    process = watch(host, stdin=other, stdout=other, stderr=other)
    os.close(other)
    said = b""

    def pictures():
        nonlocal said
        said += os.read(main, 65536)
        return said.split(b"\033[H")[1:-1]  # (the last one may not be whole)
    try:
        while len(pictures()) < 2:
            pass
        for picture in pictures():
            lines = picture.replace(b"\033[K", b"").replace(b"\033[J", b"").split(b"\r\n")
            assert len(lines) <= 10 and max(map(len, lines)) <= 40, lines
            assert b" serving " in lines[0] and any(b"volume-00" in line for line in lines)
        for c in clients:
            c.close()
        server.stop()
        while b"no server of this user" not in pictures()[-1]:
            pass
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_nothing_that_others_chose_reaches_the_terminal(host):
    world = World(2)
    name = "a\033[2Jb\u009b2Jc\n"
    world.series[name] = world.series[world.volumes[0]["name"]]
    world.volumes[0]["name"] = name
    world.clients[0].update(peer="\033]0;x\007", export="v\r", address="\u0085")
    double = Fake(world)
    try:
        for command in ("status", "clients"):
            said = host.run(command, "--http", f"127.0.0.1:{double.port}").stdout
            assert not set(said) & set("\033\007\r\u009b\u0085"), said
        assert "a?[2Jb??2Jc?" in host.run("status", "--http", f"127.0.0.1:{double.port}").stdout
    finally:
        double.close()


# --- which servers are found ---------------------------------------------------------------------------


def test_no_server(host):
    for words in (["status"], ["clients"], ["drain"], ["status", "--watch"]):
        said = host.run(*words, status=NOTFOUND).stderr
        assert "no server" in said and "--http HOST:PORT" in said


def test_what_a_dead_server_left_is_removed(start, host):
    dead, alive = start({"v": "1M"}), start({"v": "1M"})
    left = f"{host.sockets}/{dead.pid}.sock"
    assert len(host.json("status")["servers"]) == 2
    dead.kill()
    assert os.path.exists(left)
    servers = host.json("status")["servers"]
    assert [s["server"]["pid"] for s in servers] == [alive.pid]
    assert not os.path.exists(left)
    assert os.listdir(host.sockets) == [f"{alive.pid}.sock"]
    # A socket of a process that lives is nobody's to remove, whatever it is.
    mine = f"{host.sockets}/{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(mine)
    host.run("status")
    assert os.path.exists(mine)


def test_one_of_several_does_not_answer(start, host):
    server = start({"v": "1M"})
    done = host.run("status", "--control", f"{host.sockets}/{server.pid}.sock",
                    "--http", f"127.0.0.1:{free_port()}", status=FAILED)
    assert " serving " in done.stdout and "refused" in done.stderr


@pytest.mark.parametrize("answer", [
    b"", b"hello\r\n", b"HTTP/1.1 200 OK\r\n\r\n<html>", b"HTTP/1.1 200 OK\r\n\r\n[1]",
    b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a":1}', b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 5000,
    b'HTTP/1.1 503 no\r\nContent-Length: 15\r\n\r\n{"error":"hmm"}'],
    ids=["nothing", "no HTTP", "no JSON", "no object", "cut off", "deep", "an error"])
def test_what_answers_is_no_server(host, answer):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve():
            with listener.accept()[0] as s:
                s.recv(4096)
                s.sendall(answer)
        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        said = host.run("clients", "--http", f"127.0.0.1:{port}", status=FAILED).stderr
        thread.join()
        assert f"127.0.0.1:{port}" in said


def test_a_server_that_hangs(host):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()
        said = host.run("clients", "--http", f"127.0.0.1:{listener.getsockname()[1]}",
                        status=FAILED).stderr
        assert "timed out" in said and time.monotonic() - began < 15 * SLOW


@pytest.mark.parametrize("words", [
    ["status", "--http", "nowhere"], ["status", "--http", "h:0"], ["status", "--watch", "--json"],
    ["drain", "--http", "localhost:1"], ["clients", "extra"], ["status", "--http", "h:99999"],
    ["status", "--control", "x" * 300]])
def test_what_makes_no_sense(host, words):
    host.run(*words, status=USAGE)


# --- drain (under load: tests/upgrade/test_drain.py) ------------------------------------------------------


def test_drain_does_not_guess(start, host):
    first, second = start({"v": "1M"}), start({"v": "1M"})
    said = host.run("drain", status=FAILED).stderr
    assert "2 servers" in said and "--all" in said and f"{first.pid}.sock" in said
    assert not any(s["server"]["draining"] for s in host.json("status")["servers"])
    host.run("drain", "--wait", "--control", f"/run/fdb-nbd/{first.pid}.sock"
             if host.holder else f"{host.sockets}/{first.pid}.sock")
    assert [s["server"]["drained"] for s in host.json("status")["servers"]] == [
        s["server"]["pid"] == first.pid for s in host.json("status")["servers"]]
    assert host.run("drain", "--all", "--wait").stdout.count("all volumes are given back") == 2
    assert host.run("status").stdout.count("  drained  ") == 2
    assert second.running() and first.running()


def test_drain_is_for_the_control_socket(start, host):
    """An HTTP address only ever reads."""
    address = f"{host.sockets}-http" if not host.holder else "/run/http.sock"
    start({"v": "1M"}, "--http", f"unix:{address}")
    host.run("status", "--http", f"unix:{address}")
    said = host.run("drain", "--control", address, status=FAILED).stderr
    assert "control socket" in said
    assert not host.json("status")["servers"][0]["server"]["draining"]
