"""Starts, stops and kills one fdb-nbd server, and runs its command line.

Every test that needs a server goes through here, so that all of them wait on
conditions instead of sleeping, end only processes they started themselves, and
show the server's own log when something goes wrong.

FDB_NBD names the program (default <repo>/build/fdb-nbd). It may be several
words, so that another server behind the same command line can take its place
when the tests themselves are to be checked (see reference.py).
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
import urllib.parse
from pathlib import Path

from . import stores
from .waiting import SLOW, free_port, greets, wait_until  # noqa: F401

REPO = Path(__file__).resolve().parents[2]

START_LIMIT_S = 60 * SLOW
STOP_LIMIT_S = 60 * SLOW
CLI_LIMIT_S = 60 * SLOW

SANITIZER_MARKS = ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "runtime error:",
                   "WARNING: ThreadSanitizer", "AddressSanitizer:DEADLYSIGNAL")


def program():
    """The words that start fdb-nbd."""
    words = os.environ.get("FDB_NBD")
    return shlex.split(words) if words else [str(REPO / "build" / "fdb-nbd")]


class Died(AssertionError):
    """The server ended although nobody asked it to."""


class Server:
    """One server process on one store; start() may be called again after stop() or kill().

    volumes  name -> size, created by `serve --create` if they do not exist yet
    args     more arguments for `serve`
    store    a path that stands for the store (stores.py), or a store's URI
    prefix   words put before the program (a namespace, a preloaded shim)
    reachable  False where the TCP address is in a namespace this process is not in
    """

    def __init__(self, folder, volumes=None, args=(), *, store=None, prefix=(), env=None,
                 tcp=True, unix=True, host="127.0.0.1", port=None, reachable=True):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        store = store or self.folder / "store"
        if ":" in str(store):
            # A store of the test's own: what else it takes to reach it is in `env`.
            self.store, self.store_env, self.cli_prefix = str(store), {}, []
        else:
            self.store, self.store_env, self.cli_prefix = (
                stores.uri(store), stores.env(), stores.prefix())
        # Where the embedded engine's files are.
        self.store_folder = (
            Path(self.store.split(":", 1)[1]) if self.store.startswith("lmdb:") else None)
        self.volumes = dict(volumes or {})
        self.args = [str(a) for a in args]
        self.prefix = [str(w) for w in prefix]
        self.env = dict(env or {})
        self.host = host
        self._fixed_port = port
        self.port = port
        self._tcp = tcp
        self._reachable = reachable
        # A socket's path has to stay under 108 bytes, a test's own folder often does not.
        self.socket_path = self.folder / "s" if unix else None
        if unix and len(str(self.socket_path)) > 100:
            raise ValueError(f"folder too long for a socket: {self.socket_path}")
        self.log_path = self.folder / "server.log"
        self.process = None
        self.pass_fds = ()

    # -- the process -------------------------------------------------------

    def command(self):
        words = program() + ["--store", self.store, "serve"]
        if self.socket_path:
            words += ["--listen", f"unix:{self.socket_path}"]
        if self._tcp:
            host = f"[{self.host}]" if ":" in self.host else self.host
            words += ["--listen", f"{host}:{self.port}"]
        for name, size in self.volumes.items():
            words += ["--create", f"{name}:{size}"]
        return words + self.args

    def start(self, wait=True):
        assert not self.running(), "already running"
        for attempt in range(3):
            if self._tcp and self._fixed_port is None:
                self.port = free_port(self.host)
            if self.socket_path and self.socket_path.exists():
                # Only so that the wait below cannot meet a left-over of the last run; a
                # server has to cope with it by itself, which has its own test.
                self.socket_path.unlink()
            self._spawn()
            if not wait:
                return self
            try:
                wait_until(self._ready, START_LIMIT_S, "the server accepts connections")
                return self
            except Died:
                # Between our look for a free port and the server's bind, another
                # program may have taken it.
                if attempt == 2 or "in use" not in self.log():
                    raise
        return self

    def _spawn(self, more=()):
        env = dict(os.environ, **self.store_env, **self.env)
        # A server must not outlive the test that started it, however that one ends.
        words = ["setpriv", "--pdeathsig", "KILL"] + self.prefix + self.command() + list(more)
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, env=env, pass_fds=self.pass_fds,
                                            start_new_session=True)

    def upgrade(self, more=()):
        """A new process takes over from the one that runs (--replace) and ends it; gives how
        long the old one lived on."""
        self.check_alive()
        old, began = self.process, time.monotonic()
        self._spawn(["--replace", *more])
        try:
            wait_until(lambda: self.check_alive() or old.poll() is not None, STOP_LIMIT_S,
                       "the replaced server ends")
        except BaseException:
            old.kill()
            raise
        finally:
            old.wait()
        assert old.returncode == 0, f"the old server ended with {old.returncode}\n{self.log_tail()}"
        took_s = time.monotonic() - began
        wait_until(self._ready, START_LIMIT_S, "the new server accepts connections")
        return took_s

    def _ready(self):
        self.check_alive()
        return all(greets(a) for a in self.addresses())

    def addresses(self):
        out = []
        if self.socket_path:
            out.append(str(self.socket_path))
        if self._tcp and self._reachable:
            out.append((self.host, self.port))
        return out

    @property
    def pid(self):
        return self.process.pid

    def cpu_s(self):
        """What the server has used of the processors so far, all its threads."""
        after_name = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def running(self):
        return self.process is not None and self.process.poll() is None

    def check_alive(self):
        if not self.running():
            raise Died(f"the server ended with {self.process.returncode}\n{self.log_tail()}")

    def stop(self, check=True, limit_s=STOP_LIMIT_S):
        """SIGTERM and wait; a clean stop is exit status 0 and no sanitizer report."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(limit_s)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(
                    f"the server did not end within {limit_s:g} s of SIGTERM\n{self.log_tail()}")
        status = self.process.returncode
        self.process = None
        if check:
            assert status == 0, f"the server ended with {status}\n{self.log_tail()}"
            self.check_log()
        return status

    def kill(self):
        """kill -9: the death of the process, not of the machine."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process = None

    def restart(self, how="stop"):
        self.stop() if how == "stop" else self.kill()
        return self.start()

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, value, trace):
        if kind is None:
            self.stop()
        else:
            self.kill()

    # -- what it said ------------------------------------------------------

    def log(self):
        try:
            return self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def log_tail(self, lines=40):
        return "--- server log ---\n" + "\n".join(self.log().splitlines()[-lines:])

    def check_log(self):
        text = self.log()
        for mark in SANITIZER_MARKS:
            assert mark not in text, self.log_tail(120)

    # -- the command line --------------------------------------------------

    def cli(self, *words, check=True, stdin="", limit_s=CLI_LIMIT_S):
        return cli(self.store, *words, check=check, stdin=stdin, limit_s=limit_s,
                   env={**self.store_env, **self.env}, prefix=self.cli_prefix)

    def json(self, *words):
        return json.loads(self.cli("--json", *words).stdout)

    def used_bytes(self, name):
        """How much of the store the volume takes, as `info --json` says."""
        return self.json("info", name)["used_bytes"]

    # -- how clients name it -----------------------------------------------

    def uri(self, name="", tcp=False):
        name = urllib.parse.quote(name)
        if tcp:
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"nbd://{host}:{self.port}/{name}"
        return f"nbd+unix:///{name}?socket={self.socket_path}"


def cli(store, *words, check=True, stdin="", limit_s=CLI_LIMIT_S, env=None, prefix=()):
    """Runs `fdb-nbd --store STORE words...` to its end and gives status, stdout and stderr."""
    command = [*prefix, *program(), "--store", store, *(str(w) for w in words)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True,
                          timeout=limit_s, env=dict(os.environ, **(env or {})))
    for mark in SANITIZER_MARKS:
        assert mark not in done.stderr, done.stderr
    if check:
        assert done.returncode == 0, (
            f"{' '.join(command)} gave {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def copy_store(source, target):
    """A copy that keeps holes, for stores whose files are long and mostly empty."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)
    return Path(target)
