"""Health, JSON, the control socket and drain."""

import json
import os
import socket
import stat
import time

import pytest

from harness import http, rawnbd
from harness.cluster import Cluster
from harness.gateway import gateway
from harness.server import SLOW, Server, wait_until
from harness.waiting import free_port

MIB = 1 << 20


@pytest.fixture
def port():
    return free_port()


def serve(folder, port, volumes=None, args=(), **more):
    return Server(folder / "s", volumes or {"v": "64M"}, ["--http", f"127.0.0.1:{port}", *args],
                  **more)


# --- JSON ---------------------------------------------------------------------------------


def test_server(folder, port):
    with serve(folder, port) as server:
        told = http.get_json(("127.0.0.1", port), "/v1/server")
        assert told["pid"] == server.pid and told["store"]["uri"] == server.store
        assert told["store"]["reachable"] and told["ready"] and not told["draining"]
        assert f"127.0.0.1:{server.port}" in told["listen"]
        assert told["http"] == [f"127.0.0.1:{port}"]
        assert told["control"] == http.control(server.pid)
        assert told["cache"]["limit_bytes"] == 256 * MIB
        assert told["threads"] == 1 and told["connections"] == 0
        # The same from the control socket.
        assert http.get_json(http.control(server.pid), "/v1/server")["pid"] == server.pid
    assert not os.path.exists(http.control(told["pid"]))


def test_volumes_and_clients(folder, port):
    at = "127.0.0.1", port
    with serve(folder, port, {"v": "64M", "w": "1M"}) as server:
        with rawnbd.connect(server, "v") as c:
            c.write(0, b"x" * MIB)
            for _ in range(20):
                c.read(0, 4096)
            told = http.get_json(at, "/v1/volumes")
            assert told["total"] == 2 and not told["truncated"]
            v, w = told["volumes"]
            assert (v["name"], w["name"]) == ("v", "w")
            assert v["open"] and v["clients"] == 1 and v["size_bytes"] == 64 * MIB
            assert v["owner"]["ours"] and v["owner"]["pid"] == server.pid
            assert v["read"] == {"requests": 20, "bytes": 20 * 4096, "errors": 0}
            assert v["write"] == {"requests": 1, "bytes": MIB, "errors": 0}
            assert v["cached_bytes"] == MIB and v["cache_hits"] == 20
            assert not w["open"] and w["owner"] is None and w["read"]["requests"] == 0
            (client,) = http.get_json(at, "/v1/clients")["clients"]
            assert client["export"] == "v" and client["phase"] == "serving"
            assert client["requests"] == 21 and client["written_bytes"] == MIB
            assert client["in_flight"] == 0 and client["errors"] == 0
            assert client["peer"] == f"uid {os.getuid()}" and not client["tls"]
            with rawnbd.Client(server) as other:
                other.greeting()
                assert http.get_json(at, "/v1/clients")["total"] == 2

            # A second after the requests they are in the series.
            def last():
                series = http.get_json(at, "/v1/volumes/v")["series"]
                return series if sum(series["read_requests"]) == 20 else None

            series = wait_until(last, 10 * SLOW, "the second is over", 0.1)
            assert sum(series["read_bytes"]) == 20 * 4096 and sum(series["write_requests"]) == 1
            i = next(i for i, n in enumerate(series["read_requests"]) if n)
            assert 0 <= series["read_p50_us"][i] <= series["read_p99_us"][i] < 10_000_000
            assert len({len(x) for x in series.values() if isinstance(x, list)}) == 1
            whole = http.get_json(at, "/v1/server")
            assert sum(whole["series"]["read_requests"]) == 20
            assert "series" in http.get_json(at, "/v1/volumes?series=1")["volumes"][0]
        assert http.get_json(at, "/v1/volumes/w")["name"] == "w"
        assert http.get_json(at, "/v1/volumes/%76")["name"] == "v"
        for missing in "none", "v%00x", "v%00", "%76%00/heat":
            http.get_json(at, f"/v1/volumes/{missing}", 404)
        http.get_json(at, "/v1/nothing", 404)
        http.get_json(at, "/v1/server%00", 404)


def test_heat_shows_where(folder, port):
    at = "127.0.0.1", port
    with serve(folder, port, {"v": "64M"}) as server:
        with rawnbd.connect(server, "v") as c:
            for _ in range(50):
                c.read(32 * MIB, 4096)
            c.write(63 * MIB, b"z" * MIB)

            def warm():
                heat = http.get_json(at, "/v1/volumes/v/heat")
                return heat if sum(heat["reads"]) > 0 and sum(heat["writes"]) > 0 else None

            heat = wait_until(warm, 10 * SLOW, "the second is over", 0.1)
        cell = heat["cell_bytes"]
        assert len(heat["reads"]) == len(heat["writes"]) == -(-64 * MIB // cell) <= 256
        assert [i for i, n in enumerate(heat["reads"]) if n] == [32 * MIB // cell]
        assert 40 < max(heat["reads"]) <= 50
        hot = [i for i, n in enumerate(heat["writes"]) if n]
        assert hot == list(range(63 * MIB // cell, 64 * MIB // cell))
        http.get_json(at, "/v1/volumes/none/heat", 404)


# --- health -------------------------------------------------------------------------------


def test_health(folder, port):
    at = "127.0.0.1", port
    with serve(folder, port):
        assert http.get(at, "/healthz") == "ok\n"
        assert http.get(at, "/readyz") == "ready\n"
        status, headers, body = http.request(at, "/healthz", "HEAD")
        assert status == 200 and body == ""
        assert http.request(at, "/healthz", "DELETE")[0] == 405


@pytest.mark.fdb
@pytest.mark.limit(180)
def test_not_ready_while_the_cluster_is_away(folder, port):
    at = "127.0.0.1", port
    with Cluster() as cluster:
        server = gateway(cluster, folder / "s", {"v": "64M"}, ["--http", f"127.0.0.1:{port}"])
        with server:
            assert http.get(at, "/readyz") == "ready\n"
            cluster.pause()
            try:
                # As soon as it does not answer, and again at once.
                for _ in range(2):
                    assert http.get(at, "/readyz", 503).startswith("store: ")
                began = time.monotonic()
                m = http.scrape(at)
                told = http.get_json(at, "/v1/server")
                assert time.monotonic() - began < 5 * SLOW
                assert m.value("fdbnbd_store_up") == 0
                assert m.value("fdbnbd_store_silent_seconds") > 0
                assert not told["ready"] and not told["store"]["reachable"]
                assert http.get(at, "/healthz") == "ok\n"
                assert http.get_json(at, "/v1/volumes")["volumes"] is not None
            finally:
                cluster.resume()
            wait_until(lambda: http.request(at, "/readyz")[0] == 200, 60 * SLOW,
                       "it is ready again", 0.2)


# --- control socket and drain -----------------------------------------------------------


def test_control_socket_is_the_users_alone(folder):
    path = folder / "c"
    with Server(folder / "s", {"v": "1M"}, ["--control", path]) as server:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert http.get_json(path, "/v1/server")["control"] == str(path)
        assert not os.path.exists(http.control(server.pid))
        server.kill()
        # It is left behind; the next one takes its place.
        assert path.exists()
        server.start()
        assert http.get_json(path, "/v1/server")["pid"] == server.pid
    assert not path.exists()
    with Server(folder / "t", {"v": "1M"}) as server:
        where = http.control(server.pid)
        assert stat.S_IMODE(os.stat(os.path.dirname(where)).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(where).st_mode) == 0o600
        server.kill()
        assert os.path.exists(where)
        server.start()
        assert not os.path.exists(where)
        where = http.control(server.pid)
        assert http.get(where, "/healthz") == "ok\n"
    assert not os.path.exists(where)


def test_without_a_control_socket(folder):
    with Server(folder / "s", {"v": "1M"}, ["--control", "off"]) as server:
        assert not os.path.exists(http.control(server.pid))
    (folder / "file").write_text("")
    with Server(folder / "t", {"v": "1M"}, ["--control", folder / "file"]) as server:
        assert "no control socket" in server.log() and "no socket" in server.log()
        with rawnbd.connect(server, "v") as c:
            c.read(0, 512)
    with Server(folder / "u", {"v": "1M"}, ["--control", folder / "none" / "x"]) as server:
        assert "no control socket" in server.log()


def test_drain_gives_all_back(folder, port):
    at = "127.0.0.1", port
    with serve(folder, port, {"v": "64M"}) as server:
        assert http.request(at, "/v1/drain", "POST")[0] == 403
        c = rawnbd.connect(server, "v")
        c.write(0, b"x" * MIB)
        where = http.control(server.pid)
        http.get_json(where, "/v1/drain", 405)
        status, _, text = http.request(where, "/v1/drain", "POST", "{}")
        assert status == 200 and json.loads(text)["draining"]
        c.expect_closed()
        c.close()

        def empty():
            told = http.get_json(at, "/v1/server")
            return told["connections"] == told["volumes_open"] == told["volumes_owned"] == 0

        wait_until(empty, 20 * SLOW, "all volumes are given back", 0.05)
        assert http.get(at, "/readyz", 503).startswith("draining: ")
        with rawnbd.Client(server) as late:
            late.handshake()
            with pytest.raises(rawnbd.OptionError) as refused:
                late.go("v")
            assert refused.value.type == rawnbd.REP_ERR_SHUTDOWN
        # Another server can have it at once, and nothing is lost.
        with Server(folder / "t", args=["--owner-wait", "0"], store=server.store) as other:
            with rawnbd.connect(other, "v") as c:
                assert c.read(0, MIB) == b"x" * MIB
        assert http.get(at, "/healthz") == "ok\n"


# --- addresses and hostile clients -------------------------------------------------------


def test_addresses(folder, port):
    with serve(folder, port, args=["--http", f"unix:{folder}/h"]) as server:
        assert http.get(str(folder / "h"), "/healthz") == "ok\n"
        assert "beyond this machine" not in server.log()
        taken = Server(folder / "t", {"v": "1M"}, ["--http", f"127.0.0.1:{port}"])
        taken.start(wait=False)
        assert taken.process.wait(20 * SLOW) != 0
        assert f"cannot listen on 127.0.0.1:{port}" in taken.log()
        taken.process = None
    assert not (folder / "h").exists()
    with Server(folder / "u", {"v": "1M"}, ["--http", f"0.0.0.0:{port}"]) as server:
        assert "beyond this machine" in server.log()


def test_names_that_others_chose_are_refused(folder, port):
    """A page in a browser on this machine can give its own name our address, and would then be let
    read what it gets (DNS rebinding); the browser says by which name it came."""
    def ask(where, host, path="/v1/volumes"):
        return http.request(where, path, headers={"Host": host})[0]

    with serve(folder, port, args=["--http", f"unix:{folder}/h"]) as server:
        at = "127.0.0.1", port
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "[evil]",
                     "127.0.0.1.evil.example", "x" * 4000):
            for path in ("/", "/metrics", "/v1/volumes", "/v1/clients"):
                assert ask(at, host, path) == 403, (host, path)
        for host in ("localhost", f"LocalHost:{port}", "127.0.0.1", f"127.0.0.1:{port}",
                     f"[::1]:{port}", "[::1]", "10.1.2.3:80", "", f":{port}"):
            assert ask(at, host) == 200, host
        # No browser comes there.
        assert ask(str(folder / "h"), "anything") == 200
        assert ask(http.control(server.pid), "anything") == 200
    with Server(folder / "u", {"v": "1M"}, ["--http", f"0.0.0.0:{port}"]):
        assert ask(at, "gw1.example") == 200


def resident(pid):
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.limit(180)
def test_hostile_clients_are_bounded(folder, port):
    """A thousand connections, heads without end, bodies without end, and clients that take nothing:
    the server stays small and goes on serving NBD."""
    with serve(folder, port) as server:
        before = resident(server.pid)
        crowd = []
        for n in range(1000):
            s = socket.socket()
            s.settimeout(10)
            try:
                s.connect(("127.0.0.1", port))
                s.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            except OSError:
                pass
            crowd.append(s)
            if n in (20, 100):
                for _ in range(200):
                    try:
                        s.sendall(b"y" * 4096)
                    except OSError:
                        break
        with rawnbd.connect(server, "v") as c:
            c.write(0, b"x" * MIB)
            assert c.read(0, 4096) == b"x" * 4096
        # Here nobody is kept out by that.
        assert http.get(http.control(server.pid), "/healthz") == "ok\n"
        assert len(os.listdir(f"/proc/{server.pid}/fd")) < 200
        assert resident(server.pid) - before < 32 * MIB
        for s in crowd:
            s.close()
        wait_until(lambda: answers(port), 30 * SLOW, "HTTP answers again", 0.1)

        with socket.create_connection(("127.0.0.1", port)) as s:
            s.settimeout(10 * SLOW)
            try:
                s.sendall(b"GET /" + b"a" * (64 << 10) + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                first = s.recv(100)
            except ConnectionError:
                first = b""
            assert first == b"" or first.split()[1] in (b"413", b"414", b"431", b"400"), first
        with socket.create_connection(("127.0.0.1", port)) as s:
            s.settimeout(10 * SLOW)
            try:
                s.sendall(b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
                s.sendall(b"b" * (1 << 20))
                while s.recv(4096):
                    pass
            except ConnectionError:
                pass
        assert http.get(("127.0.0.1", port), "/healthz") == "ok\n"
        assert http.get_json(http.control(server.pid), "/v1/server")["draining"] is False


def answers(port):
    try:
        return http.request(("127.0.0.1", port), "/healthz", timeout_s=2)[0] == 200
    except OSError:
        return False


@pytest.mark.limit(120)
def test_a_client_that_never_finishes_is_cut_off(folder, port):
    """A byte every second is no silence; the end comes all the same."""
    with serve(folder, port):
        with socket.create_connection(("127.0.0.1", port)) as s:
            s.settimeout(1)
            began = time.monotonic()
            s.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
            while time.monotonic() - began < 60 * SLOW:
                try:
                    s.sendall(b"y")
                    if s.recv(100) == b"":
                        break
                except socket.timeout:
                    continue
                except ConnectionError:
                    break
            assert 10 < time.monotonic() - began < 30 * SLOW
