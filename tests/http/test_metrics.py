"""/metrics: its format, and that what it counts is what was sent."""

import collections
import threading

import nbd
import pytest

from harness import http, rawnbd
from harness.server import SLOW, Server, wait_until
from harness.waiting import free_port

KINDS = {rawnbd.CMD_READ: "read", rawnbd.CMD_WRITE: "write", rawnbd.CMD_FLUSH: "flush",
         rawnbd.CMD_TRIM: "trim", rawnbd.CMD_CACHE: "cache", rawnbd.CMD_WRITE_ZEROES: "zero",
         rawnbd.CMD_BLOCK_STATUS: "status"}
SIZE = 64 << 20
# More than a buffer of the library's own threads, so that pieces and waits are among them.
LENGTHS = (512, 4096, 16384, 70000, 1 << 20, 5 << 20)


@pytest.fixture
def port():
    return free_port()


def serve(folder, port, volumes=None, args=()):
    volumes = volumes or {"v": "64M"}
    return Server(folder / "s", volumes, ["--http", f"127.0.0.1:{port}", *args])


class Sent:
    """What clients have sent and how it was answered, by volume and command."""

    def __init__(self):
        self.lock = threading.Lock()
        self.requests, self.errors, self.bytes = (collections.Counter() for _ in range(3))

    def add(self, volume, kind, length, failed):
        with self.lock:
            key = volume, KINDS.get(kind, "other")
            self.requests[key] += 1
            self.errors[key] += failed
            if not failed and kind not in (rawnbd.CMD_FLUSH, rawnbd.CMD_BLOCK_STATUS):
                self.bytes[key] += length

    def check(self, metrics):
        for name, mine in (("fdbnbd_requests_total", self.requests),
                           ("fdbnbd_request_duration_seconds_count", self.requests),
                           ("fdbnbd_request_errors_total", self.errors),
                           ("fdbnbd_request_bytes_total", self.bytes)):
            told = {(dict(labels)["volume"], dict(labels)["command"]): value
                    for (of, labels), value in metrics.samples.items() if of == name}
            assert +collections.Counter(told) == +mine, name


def send(client, sent, volume, rng, count, bad):
    """`count` requests, up to 16 in flight; with `bad` some that must be refused."""
    waiting = {}
    for _ in range(count):
        kind = rng.choice([*KINDS, rawnbd.CMD_READ, rawnbd.CMD_WRITE])
        length = 0 if kind == rawnbd.CMD_FLUSH else rng.choice(LENGTHS)
        offset = 0 if kind == rawnbd.CMD_FLUSH else rng.randrange(SIZE - length)
        if bad and rng.random() < 0.2:
            kind, offset, length = rng.choice([
                (rawnbd.CMD_READ, SIZE, 4096), (rawnbd.CMD_WRITE, SIZE - 512, 4096),
                (rawnbd.CMD_TRIM, SIZE, 1 << 20), (77, 0, 0)])
        payload = bytes(length) if kind == rawnbd.CMD_WRITE else b""
        cookie = client.request(kind, offset, length, payload=payload)
        waiting[cookie] = kind, length
        while len(waiting) > 16:
            settle(client, sent, volume, waiting)
    while waiting:
        settle(client, sent, volume, waiting)


def settle(client, sent, volume, waiting):
    cookie = next(iter(waiting))
    kind, length = waiting.pop(cookie)
    sent.add(volume, kind, length, client.result(cookie).error != 0)


@pytest.mark.limit(180)
def test_requests_counted_equal_requests_sent(folder, port, rng):
    """Exactly, by volume and command, over several volumes, connections and threads, with errors
    among them; and while they come nothing counted goes back."""
    volumes = {f"v{n}": "64M" for n in range(3)}
    with serve(folder, port, volumes, ["--threads", "2"]) as server:
        sent, failures, seeds = Sent(), [], [rng.randrange(1 << 32) for _ in range(9)]

        def client(n):
            import random
            try:
                with rawnbd.connect(server, f"v{n % 3}", structured=True,
                                    contexts=("base:allocation",)) as c:
                    send(c, sent, f"v{n % 3}", random.Random(seeds[n]), 150, n >= 3)
                    c.disc()
            except BaseException as e:
                failures.append(e)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(9)]
        before = http.scrape(("127.0.0.1", port))
        for t in threads:
            t.start()
        while any(t.is_alive() for t in threads):
            now = http.scrape(("127.0.0.1", port))
            now.check_after(before)
            before = now
        for t in threads:
            t.join()
        assert not failures, failures
        after = http.scrape(("127.0.0.1", port))
        after.check_after(before)
        sent.check(after)
        assert sum(sent.errors.values()) > 20 and sum(sent.requests.values()) == 9 * 150
        # The volumes are closed by now or soon, and what they counted stays.
        wait_until(lambda: http.scrape(("127.0.0.1", port)).value("fdbnbd_volumes_open") == 0,
                   20 * SLOW, "all volumes are given back")
        end = http.scrape(("127.0.0.1", port))
        end.check_after(after)
        sent.check(end)
        reads = sum(v for (_, kind), v in sent.requests.items() if kind == "read")
        bad = sum(v for (_, kind), v in sent.errors.items() if kind == "read")
        looked = sum(end.value(f"fdbnbd_cache_{what}_total", volume=v)
                     for v in volumes for what in ("hits", "misses"))
        assert looked >= reads - bad
        assert sum(end.value("fdbnbd_commit_duration_seconds_count", 0, volume=v)
                   for v in volumes) > 0
        assert end.value("fdbnbd_handshakes_total", result="entered") == 9
        assert end.value("fdbnbd_connections_accepted_total") >= 9


def test_snapshots_count_for_their_volume(folder, port):
    with serve(folder, port, {"v": "1M"}, ["--threads", "2"]) as server:
        server.cli("snapshot", "create", "v@s")
        for name in "v", "v@s":
            with rawnbd.connect(server, name) as c:
                c.read(0, 4096)
        m = http.scrape(("127.0.0.1", port))
        assert m.value("fdbnbd_requests_total", volume="v", command="read") == 2
        assert m.value("fdbnbd_request_bytes_total", volume="v", command="read") == 8192


def test_gauges(folder, port):
    """What is held just now: by volume, and altogether."""
    with serve(folder, port) as server:
        with rawnbd.connect(server, "v") as c:
            c.write(0, b"x" * (1 << 20))
            m = http.scrape(("127.0.0.1", port))
            assert m.value("fdbnbd_volume_cached_bytes", volume="v") == 1 << 20
            assert m.value("fdbnbd_cache_used_bytes") >= 1 << 20
            assert m.value("fdbnbd_volume_size_bytes", volume="v") == SIZE
            assert m.value("fdbnbd_volume_clients", volume="v") == 1
            assert m.value("fdbnbd_volume_owned", volume="v") == 1
            assert m.value("fdbnbd_connections") == 1
            assert m.value("fdbnbd_store_up") == 1
            assert m.value("fdbnbd_reactors_answering") == m.value("fdbnbd_reactors") == 1
            c.flush()
            wait_until(lambda: http.scrape(("127.0.0.1", port)).value(
                "fdbnbd_volume_dirty_bytes", volume="v") == 0, 20 * SLOW, "it is committed")
            assert http.scrape(("127.0.0.1", port)).value(
                "fdbnbd_volume_generation_age_seconds", volume="v") == 0
            c.trim(0, 1 << 20)
            m = http.scrape(("127.0.0.1", port))
            assert m.value("fdbnbd_volume_cached_bytes", volume="v") == 0


def test_handshakes(folder, port):
    with serve(folder, port) as server:
        with rawnbd.Client(server) as c:
            c.handshake()
            c.list()
            c.abort()
        with rawnbd.Client(server) as c:
            c.greeting()
            c.send(b"\xff" * 64)
            c.expect_closed()
        wait_until(lambda: http.scrape(("127.0.0.1", port)).value("fdbnbd_connections") == 0,
                   10 * SLOW, "both are gone")
        m = http.scrape(("127.0.0.1", port))
        assert m.value("fdbnbd_handshakes_total", result="failed") == 1
        assert m.value("fdbnbd_handshakes_total", result="left") >= 1
        assert m.value("fdbnbd_handshakes_total", result="entered") == 0


def test_slow_requests_are_logged(folder, port):
    with serve(folder, port, args=["--slow-ms", "1"]) as server:
        h = nbd.NBD()
        h.connect_uri(server.uri("v"))
        for n in range(40):
            h.pwrite(b"y" * (4 << 20), (n % 16) << 22, nbd.CMD_FLAG_FUA)
        h.shutdown()
        m = http.scrape(("127.0.0.1", port))
        slow = m.value("fdbnbd_slow_requests_total")
        assert slow >= 11, "4 MiB are on the disk in a millisecond?"
        lines = [x for x in server.log().splitlines() if "slow request:" in x]
        assert len(lines) == 10
        assert f"write of {4 << 20} bytes at 0 took" in lines[0] and "export v" in lines[0]
        wait_until(lambda: "more were not shown" in server.log(), 30 * SLOW,
                   "what was left out is said", 0.1)


@pytest.mark.limit(180)
def test_a_thousand_volumes(folder, port):
    """From the thousandth on they count together, and the answer stays small."""
    many, extra = 1000, 5
    with serve(folder, port, {f"v{n}": "1M" for n in range(many)}) as server:
        for n in range(extra):
            server.cli("create", f"w{n}", "1M")
        for name in [*server.volumes, *(f"w{n}" for n in range(extra))]:
            with rawnbd.connect(server, name) as c:
                c.read(0, 512)
        m = http.scrape(("127.0.0.1", port))
        counted = {dict(labels)["volume"]: value for (name, labels), value in m.samples.items()
                   if name == "fdbnbd_requests_total"}
        assert len(counted) == many + 1
        assert counted["(others)"] == extra
        assert sum(counted.values()) == many + extra
        assert len(m.text) < 4 << 20
        listed = http.get_json(("127.0.0.1", port), "/v1/volumes")
        assert listed["total"] == many + extra and listed["truncated"]
        assert len(listed["volumes"]) == 1000
