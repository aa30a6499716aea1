"""All that a server does in its life, with every way in open, and all commands beside it: what it may
do, and where it may write and what it may say, is watched meanwhile."""

import os
import signal
from pathlib import Path

import nbd

from harness import http, rawnbd
from harness.server import SLOW, wait_until
from harness.waiting import free_port
from pki import Authority, run, write

USER, GROUP = 64321, 64322  # nobody in particular
PAGES = ("/", "/page.css", "/page.js", "/icon.svg", "/metrics", "/healthz", "/readyz", "/v1/server",
         "/v1/volumes?series=1", "/v1/volumes/v", "/v1/volumes/v/heat", "/v1/clients", "/none")


class Life:
    """
    files  what the server reads       store  its store
    run    its control socket (root's is elsewhere)
    out    what commands write
    """

    def __init__(self, folder):
        self.folder = folder
        folder.chmod(0o755)
        self.store_is_embedded = True
        for name in "files", "store", "run", "out":
            (folder / name).mkdir()
        self.files, self.store, self.run, self.out = (
            folder / name for name in ("files", "store", "run", "out"))
        self.psk, self.access = self.files / "keys.psk", self.files / "access"
        run("psktool", "-u", "alice", "-p", self.psk)
        self.authority = Authority(folder / "ca", "the CA")
        self.authority.issue(self.files, "server", "localhost")
        self.client = self.authority.issue(folder / "client", "client", "bob")
        write(self.access, "psk:alice rw *", "cn:bob ro v*", f"user:{os.getuid()} rw *")
        self.http_port = free_port()

    def args(self):
        return ["--threads", 2, "--tls", "on", "--tls-certificates", self.files,
                "--tls-verify-peer", "--tls-psk", self.psk, "--access", self.access,
                "--http", f"127.0.0.1:{self.http_port}", "--slow-ms", 1, "--default", "v"]

    def env(self):
        return {"RUNTIME_DIRECTORY": str(self.run)}

    def control(self, server):
        own = self.run / f"{server.pid}.sock"
        return own if own.exists() else Path(http.control(server.pid))

    def owned_by(self, uid, gid):
        for path in (self.folder, *self.folder.rglob("*")):
            if path.name != "client-key.pem":
                os.lchown(path, uid, gid)

    # -- clients ---------------------------------------------------------------------------------

    def by_key(self, server, export="v"):
        h = nbd.NBD()
        h.set_tls(nbd.TLS_REQUIRE)
        h.set_tls_psk_file(str(self.psk))
        h.set_tls_username("alice")
        h.set_export_name(export)
        h.connect_tcp("127.0.0.1", str(server.port))
        return h

    def by_certificate(self, server, export="v"):
        h = nbd.NBD()
        h.set_tls(nbd.TLS_REQUIRE)
        h.set_tls_certificates(str(self.client))
        h.set_export_name(export)
        h.connect_tcp("localhost", str(server.port))
        return h

    def load(self, server, rng):
        """Reads, writes, trims of all kinds, and requests that are refused."""
        h = self.by_key(server)
        for i in range(40):
            data = rng.randbytes(64) * 1024
            h.pwrite(data, rng.randrange(0, 48) << 20)
            h.pwrite(data[:rng.randrange(1, 5000)], rng.randrange(1, 40 << 20), nbd.CMD_FLAG_FUA)
            h.zero(1 << 20, rng.randrange(0, 40) << 20)
            h.trim(1 << 20, rng.randrange(0, 40) << 20)
            h.pread(1 << 18, rng.randrange(0, 48) << 20)
            if i % 10 == 0:
                h.flush()
        h.shutdown()
        h = self.by_certificate(server)
        h.pread(1 << 20, 0)
        for refused in (lambda: h.pwrite(b"x" * 512, 0), lambda: self.by_certificate(server, "w")):
            try:
                refused()
                raise AssertionError("it was let through")
            except nbd.Error:
                pass
        h.shutdown()

    def whole(self, server, rng, command):
        """`command(words...)` runs one on the store, and gives what it said."""
        at, control = ("127.0.0.1", self.http_port), self.control(server)
        with rawnbd.connect(server, "v") as client:
            self.load(server, rng)
            self.history(command)
            for path in PAGES:
                http.request(at, path)
            http.request(control, "/v1/server")
            http.request(at, "/v1/drain", "POST")
            client.write(0, b"held" * 1024)
            command("status", "--control", control)
            command("clients", "--control", control)
            before = server.log().count("were read again")
            os.kill(server.pid, signal.SIGHUP)
            wait_until(lambda: server.log().count("were read again") == before + 2, 20 * SLOW,
                       "SIGHUP")
            self.load(server, rng)

    def history(self, command):
        """All commands that work on the store."""
        file, stream, copy = self.out / "image", self.out / "stream", self.out / "copy"
        for words in (
                ("create", "x", "8M", "--compression", "zstd"), ("rename", "x", "y"),
                ("resize", "y", "16M"), ("snapshot", "create", "v@a", "y@a"),
                ("snapshot", "rename", "v@a", "b"), ("snapshot", "list", "v"),
                ("clone", "v@b", "c"), ("flatten", "c"), ("diff", "v", "--since", "b"),
                ("snapshot", "rollback", "y@a", "--yes"), ("export", "v@b", file),
                ("export", "v@b", stream, "--stream"), ("import", file, "i"),
                ("import", "--stream", stream, "s"), ("verify", "i"), ("usage",), ("usage", "v"),
                ("list",), ("info", "v"), ("owner", "show", "v"), ("store", "info"),
                ("remove", "i", "--yes"), ("remove", "c", "--yes"),
                ("snapshot", "remove", "v@b")):
            command(*words)
        if self.store_is_embedded:
            command("store", "backup", copy)
