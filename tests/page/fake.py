"""A server that answers as docs/http.md says, with whatever a test wants the page to see.

For what a real server can't be brought to say on demand: thousands of volumes, markup in every
text, silence, another process behind the same address.
"""

import json
import math
import random
import socket
import threading
import urllib.parse
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "src" / "server" / "page"
FILES = {"/": ("index.html", "text/html; charset=utf-8"),
         "/page.css": ("page.css", "text/css; charset=utf-8"),
         "/page.js": ("page.js", "text/javascript; charset=utf-8"),
         "/icon.svg": ("icon.svg", "image/svg+xml")}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
STARTED = datetime(2026, 11, 23, 9, 0, tzinfo=timezone.utc)
SECONDS = 120
MIB, GIB = 1 << 20, 1 << 30


def when(ms_ago=0):
    return (datetime.now(timezone.utc) - timedelta(milliseconds=ms_ago)).strftime(
        "%Y-%m-%dT%H:%M:%SZ")


def series(rng, share=1.0):
    """Two minutes that look like some load; share 0: like none."""
    def walk(mean):
        value, out = mean, []
        for i in range(SECONDS):
            value += (mean - value) * 0.2 + rng.gauss(0, mean * 0.12)
            out.append(max(0, int(value * (1 + 0.3 * math.sin(i / 9)))))
        return out

    def latency(mean):
        return [max(1, int(v)) if share else None for v in walk(mean)]

    reads, writes = walk(9000 * share), walk(3000 * share)
    return {"step_s": 1, "end": when(),
            "read_requests": reads, "read_bytes": [n * 16384 for n in reads],
            "write_requests": writes, "write_bytes": [n * 24576 for n in writes],
            "read_p50_us": latency(14), "read_p99_us": latency(120),
            "write_p50_us": latency(45), "write_p99_us": latency(900)}


def rates(of):
    return {name: values[-1] for name, values in of.items() if isinstance(values, list)}


def counters(n=0):
    return {"requests": n, "bytes": n * 4096, "errors": 0}


class World:
    """What the server says; tests change it as they like."""

    def __init__(self, volumes=3, seed=1):
        self.rng = random.Random(seed)
        self.series = {}
        self.volumes = [self.volume(f"disk-{i:04}", i) for i in range(volumes)]
        self.clients = [self.client(i, v["name"]) for i, v in enumerate(self.volumes[:8])
                        if v["open"]]
        self.pid, self.started = 4711, STARTED
        self.draining = False
        self.reachable = True
        self.silent = False  # connections are accepted and never answered

    def volume(self, name, i=0, used=None):
        busy = i % 7 < 3
        share = (0.2 + self.rng.random()) / (1 + i) if busy else 0
        self.series[name] = series(self.rng, share)
        size = (4 << i % 9) * GIB
        return {"name": name, "size_bytes": size,
                "used_bytes": int(size * self.rng.random()) if used is None else used,
                "block_size_bytes": 16384, "description": "",
                "owner": None if i % 7 == 6 else {
                    "ours": i % 7 < 4, "host": "gw1" if i % 7 < 4 else "gw2", "pid": 4711 + i % 2,
                    "address": "127.0.0.1:10809", "since": when(90000)},
                "open": busy, "clients": 1 + i % 2 if busy else 0,
                "read": counters(1000 * i), "write": counters(100 * i), "trim": counters(),
                "zero": counters(), "flush": {"requests": 3, "errors": 0}, "cache": counters(),
                "status": {"requests": 0, "errors": 0}, "rates": rates(self.series[name]),
                "cache_hits": 990, "cache_misses": 10,
                "cached_bytes": 48 * MIB if busy else 0,
                "dirty_bytes": int(3.5 * MIB) if busy else 0,
                "generation_age_ms": 420 if busy else None}

    def client(self, i, export):
        return {"id": i, "address": f"192.0.2.{10 + i}:{40000 + i}",
                "peer": "CN=host-%d" % i if i % 2 else None, "export": export,
                "phase": "serving", "since": when(1000 * (i + 1) ** 5), "read_only": i % 3 == 2,
                "requests": 123456 * (i + 1), "read_bytes": (i + 1) * 7 * GIB,
                "written_bytes": i * GIB, "errors": 0, "in_flight": i * 3}

    def advance(self):
        """One more second goes by."""
        for one in self.series.values():
            for values in one.values():
                if isinstance(values, list):
                    values.append(values.pop(0))
        for v in self.volumes:
            v["rates"] = rates(self.series[v["name"]])

    def total(self):
        out = {"step_s": 1, "end": when()}
        some = [s for s in self.series.values() if s["read_p50_us"][0] is not None]
        for name in series(random.Random(0)):
            if name.endswith(("requests", "bytes")):
                out[name] = [sum(s[name][i] for s in some) for i in range(SECONDS)]
            elif name.endswith("_us"):
                out[name] = [max((s[name][i] for s in some), default=None) for i in range(SECONDS)]
        return out

    def server(self):
        now = self.total()
        return {"version": "0.1.0", "pid": self.pid, "host": "gw1",
                "started": self.started.strftime("%Y-%m-%dT%H:%M:%SZ"), "uptime_s": 96151,
                "now": when(),
                "store": {"uri": "lmdb:/var/lib/fdb-nbd", "engine": "lmdb",
                          "reachable": self.reachable, "silent_ms": 0 if self.reachable else 4200,
                          "used_bytes": 612 * GIB, "free_bytes": 4096, "available_bytes": 1300 * GIB},
                "listen": ["127.0.0.1:10809", "unix:/run/fdb-nbd.sock"],
                "http": ["127.0.0.1:9181"], "control": "/run/fdb-nbd/4711.sock", "threads": 2,
                "read_only": False, "ready": not self.draining, "draining": self.draining,
                "stopping": False,
                "cache": {"limit_bytes": 256 * MIB, "used_bytes": 205 * MIB,
                          "dirty_bytes": 31 * MIB},
                "connections": len(self.clients), "connections_max": 1024,
                "volumes_owned": sum(1 for v in self.volumes
                                     if v["owner"] and v["owner"]["ours"]),
                "volumes_open": sum(v["open"] for v in self.volumes),
                "read": counters(5000), "write": counters(3000), "rates": rates(now),
                "series": now}

    def heat(self, v):
        rng = random.Random(v["name"])
        n = 256
        spots = [(rng.randrange(n), rng.random() * 4000, rng.random() < 0.5) for _ in range(5)]
        kinds = [[sum(size * math.exp(-((i - at) / 9) ** 2) for at, size, w in spots if w == is_write)
                  * rng.random() if v["open"] else 0.0 for i in range(n)]
                 for is_write in (False, True)]
        return {"name": v["name"], "size_bytes": v["size_bytes"],
                "cell_bytes": v["size_bytes"] // n, "half_life_s": 60,
                "reads": kinds[0], "writes": kinds[1]}

    def answer(self, path, query):
        if path == "/v1/server":
            self.advance()
            return self.server()
        if path == "/v1/clients":
            return {"now": when(), "total": len(self.clients), "clients": self.clients}
        if path == "/v1/volumes":
            shown = self.volumes[:1000]
            if "series" in query:
                shown = [dict(v, series=self.series[v["name"]]) if v["open"] and i < 100 else v
                         for i, v in enumerate(shown)]
            return {"now": when(), "total": len(self.volumes),
                    "truncated": len(self.volumes) > 1000, "age_ms": 350, "volumes": shown}
        name, _, what = path.removeprefix("/v1/volumes/").partition("/")
        for v in self.volumes:
            if v["name"] == urllib.parse.unquote(name):
                return self.heat(v) if what == "heat" else dict(v, series=self.series[v["name"]])
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused):
        pass

    def do_GET(self):
        world = self.server.world
        path, _, query = self.path.partition("?")
        if world.silent:
            world.goes_on.wait(60)
            self.close_connection = True
            return
        if path in FILES:
            name, kind = FILES[path]
            self.reply(200, kind, (PAGE / name).read_bytes())
            return
        found = world.answer(path, query)
        self.reply(200 if found is not None else 404, "application/json",
                   json.dumps(found if found is not None else {"error": "no such thing"}).encode())

    def reply(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


class Listener(ThreadingHTTPServer):
    """Its connections end with it, as those of a process do."""
    daemon_threads = True

    def __init__(self, *args):
        self.open = set()
        super().__init__(*args)

    def process_request(self, request, address):
        self.open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def end(self):
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Fake:
    """The server at an address of its own; gone() and back() as a real one would."""

    def __init__(self, world):
        self.world = world
        world.goes_on = threading.Event()
        self.port = 0
        self.http = None
        self.back()

    def back(self):
        self.http = Listener(("127.0.0.1", self.port), Handler)
        self.http.world = self.world
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def gone(self):
        if self.http:
            self.http.end()
            self.http = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"

    def close(self):
        self.world.goes_on.set()
        self.gone()
