"""Starts, stops, stops dead and resumes FoundationDB clusters for tests.

A cluster here is a few fdbserver processes on free loopback ports with their data in a
temporary folder. Nothing of the machine's own FoundationDB is touched. Everything waits on
conditions: a cluster is up when its own status says so. Processes are ended by pid, and all of
them die with the test run.

fdbserver, fdbcli and libfdb_c.so are taken from where the environment says (FDBSERVER, FDBCLI,
LIBFDB_C), else from PATH and LD_LIBRARY_PATH, else from where FoundationDB's packages put them.
"""

import atexit
import contextlib
import ctypes.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from . import tuples
from .waiting import SLOW, free_port, wait_until

MISSING = "FoundationDB is not on this machine"
# A small machine is slow to give a new cluster its roles.
START_LIMIT_S = 90 * SLOW
# What a process may take; its own defaults are made for machines it has for itself.
MEMORY = ["--memory", "3GiB", "--cache-memory", "128MiB", "--storage-memory", "1GiB"]


class Missing(Exception):
    """FoundationDB, or a part of it, cannot be found."""


def _find_program(variable, name, places):
    named = os.environ.get(variable)
    if named:
        if not os.access(named, os.X_OK):
            raise Missing(f"{MISSING}: {variable} names {named}, which is no program")
        return named
    found = shutil.which(name) or next(
        (str(Path(p) / name) for p in places if os.access(Path(p) / name, os.X_OK)), None)
    if not found:
        raise Missing(f"{MISSING}: no {name} on PATH nor in {', '.join(places)} "
                      f"({variable} can name it)")
    return found


def _find_library():
    named = os.environ.get("LIBFDB_C")
    if named:
        if not os.path.isfile(named):
            raise Missing(f"{MISSING}: LIBFDB_C names {named}, which is no file")
        return named
    folders = [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    folders += ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/lib/x86_64-linux-gnu",
                "/usr/lib/aarch64-linux-gnu"]
    for folder in folders:
        if (Path(folder) / "libfdb_c.so").is_file():
            return str(Path(folder) / "libfdb_c.so")
    if ctypes.util.find_library("fdb_c"):
        return "libfdb_c.so"
    raise Missing(f"{MISSING}: no libfdb_c.so on LD_LIBRARY_PATH nor in {', '.join(folders[-5:])} "
                  "(LIBFDB_C can name it)")


class Programs:
    """Where the parts of FoundationDB are; Missing where one is not."""

    def __init__(self):
        self.server = _find_program("FDBSERVER", "fdbserver", ["/usr/sbin", "/usr/local/sbin"])
        self.cli = _find_program("FDBCLI", "fdbcli", ["/usr/bin", "/usr/local/bin"])
        self.client = _find_library()

    def client_env(self):
        """What makes fdb-nbd load this library."""
        return {"FDB_NBD_LIBFDB_C": self.client} if "/" in self.client else {}


class BackupTools:
    """Where FoundationDB's own backup programs are; Missing where one is not."""

    def __init__(self):
        self.backup = _find_program("FDBBACKUP", "fdbbackup", ["/usr/bin", "/usr/local/bin"])
        self.restore = _find_program("FDBRESTORE", "fdbrestore", ["/usr/bin", "/usr/local/bin"])
        self.agent = _find_program("FDB_BACKUP_AGENT", "backup_agent",
                                   ["/usr/lib/foundationdb/backup_agent",
                                    "/usr/local/foundationdb/backup_agent"])


def why_missing():
    """One sentence that starts with MISSING, or None where all is there."""
    try:
        Programs()
    except Missing as e:
        return str(e)
    return None


class Tls:
    """A certificate authority and one certificate for everybody, made with openssl."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.ca, self.key, self.certificate = (
            str(self.folder / name) for name in ("ca.pem", "key.pem", "cert.pem"))
        ca_key, request = (str(self.folder / name) for name in ("ca-key.pem", "request.pem"))
        self._openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                      "-subj", "/CN=test authority", "-keyout", ca_key, "-out", self.ca)
        self._openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test",
                      "-keyout", self.key, "-out", request)
        self._openssl("x509", "-req", "-days", "2", "-in", request, "-CA", self.ca,
                      "-CAkey", ca_key, "-CAcreateserial", "-out", self.certificate)

    @staticmethod
    def _openssl(*words):
        done = subprocess.run(["openssl", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def server_words(self):
        return ["--tls-certificate-file", self.certificate, "--tls-key-file", self.key,
                "--tls-ca-file", self.ca]

    def client_env(self):
        return {"FDB_TLS_CERTIFICATE_FILE": self.certificate, "FDB_TLS_KEY_FILE": self.key,
                "FDB_TLS_CA_FILE": self.ca}


class Process:
    """One fdbserver; start() after kill() is the same one again, with its data."""

    def __init__(self, cluster, number, port):
        self.cluster, self.number, self.port = cluster, number, port
        self.data = cluster.folder / f"data{number}"
        self.output = cluster.folder / f"out{number}"
        self.process = None

    @property
    def address(self):
        return f"{self.cluster.host}:{self.port}{':tls' if self.cluster.tls else ''}"

    @property
    def pid(self):
        return self.process.pid

    def running(self):
        return self.process is not None and self.process.poll() is None

    def start(self):
        assert not self.running(), "already running"
        c = self.cluster
        # Each one its own machine and zone, so that copies lie on different ones.
        words = [c.programs.server, "--public-address", self.address, "--cluster-file",
                 str(c.file), "--datadir", str(self.data), "--logdir", str(c.logs),
                 "--machine-id", f"m{self.number}", "--maxlogssize", "20MiB", *MEMORY,
                 *(c.tls.server_words() if c.tls else []), *c.server_words]
        with open(self.output, "ab") as out:
            # It must not outlive the test run, however that one ends.
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *c.prefix, *words],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=c.folder,
                start_new_session=True)
        return self

    def signal(self, number):
        self.process.send_signal(number)

    def pause(self):
        """It stands still: its sockets stay open and nothing answers."""
        self.signal(signal.SIGSTOP)

    def resume(self):
        self.signal(signal.SIGCONT)

    def kill(self):
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process = None


class Cluster:
    """processes  how many fdbserver; three keep everything twice and survive one's death
    engine     "ssd" or "memory"
    tls        True: all speak TLS with certificates made for it
    prefix     words put before each program (a network namespace)
    host       the address they listen on
    knobs      more words for each fdbserver
    """

    def __init__(self, processes=1, engine="ssd", *, tls=False, prefix=(), host="127.0.0.1",
                 server_words=()):
        self.programs = Programs()
        self.folder = Path(tempfile.mkdtemp(prefix="fdbnbd-fdb-"))
        self.logs = self.folder / "log"
        self.logs.mkdir()
        self.file = self.folder / "fdb.cluster"
        self.engine = engine
        self.redundancy = "single" if processes == 1 else "double"
        self.prefix = [str(w) for w in prefix]
        self.host = host
        self.server_words = [str(w) for w in server_words]
        self.tls = Tls(self.folder) if tls else None
        self.processes = [Process(self, n + 1, None) for n in range(processes)]
        self._prefixes = {}
        atexit.register(self.end)

    # -- the processes -----------------------------------------------------

    def prepare(self):
        """The cluster file of a cluster that is to be started later."""
        for p in self.processes:
            p.port = free_port()
        coordinators = ",".join(p.address for p in self.processes)
        self.file.write_text(f"test:test@{coordinators}\n")

    def start(self, wait=True):
        for attempt in range(3):
            # What others have read of the file by now must hold.
            if attempt or not self.file.exists():
                self.prepare()
            for p in self.processes:
                p.start()
            try:
                self._configure()
                break
            except _PortTaken:
                # Between our look for a free port and the server's bind.
                self.kill()
                if attempt == 2:
                    raise
        if wait:
            self.wait_available()
        return self

    def _configure(self):
        """Makes a database of the processes, once they have found each other."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            said = self.cli(f"configure new {self.redundancy} {self.engine}", check=False,
                            limit_s=10)
            if "Database created" in said or "already exists" in said:
                return
            for p in self.processes:
                if not p.running():
                    text = p.output.read_text(errors="replace")
                    if "in use" in text or "could not bind" in text.lower():
                        raise _PortTaken(text)
                    raise AssertionError(f"fdbserver ended with {p.process.returncode}: {text}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no database within {START_LIMIT_S:g} s: {said}")

    def wait_available(self, limit_s=START_LIMIT_S):
        """Until transactions go through."""
        wait_until(lambda: self.status().get("client", {}).get("database_status", {})
                   .get("available"), limit_s, "the cluster is available", 0.2)

    def wait_whole(self, limit_s=START_LIMIT_S):
        """Until all processes take part, none of them is behind, and the death of one more
        would do no harm where there are three. (What data distribution thinks of it comes
        half a minute later and changes nothing.)"""
        def whole():
            told = self.status()
            cluster = told.get("cluster", {})
            processes = cluster.get("processes", {}).values()
            losses = cluster.get("fault_tolerance", {}).get(
                "max_zone_failures_without_losing_data", -1)
            lags = [r.get("data_lag", {}).get("seconds", 1e9) for p in processes
                    for r in p["roles"] if r["role"] == "storage"]
            return (told.get("client", {}).get("database_status", {}).get("available")
                    and len(processes) == len(self.processes) and lags and max(lags) < 2
                    and losses >= (1 if len(self.processes) > 1 else 0))
        wait_until(whole, limit_s, "the cluster is whole", 0.3)

    def pause(self):
        for p in self.processes:
            p.pause()

    def resume(self):
        for p in self.processes:
            p.resume()

    def kill(self):
        for p in self.processes:
            p.kill()

    def restart(self):
        """After kill(): the same processes with their data."""
        for p in self.processes:
            p.start()
        self.wait_available()

    def end(self):
        self.kill()
        atexit.unregister(self.end)
        if os.environ.get("KEEP"):
            print(f"kept: {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *unused):
        self.end()

    # -- asking it ---------------------------------------------------------

    def cli(self, *commands, check=True, limit_s=30):
        """What fdbcli prints for these commands, one after the other."""
        words = [*self.prefix, self.programs.cli, "-C", str(self.file), "--timeout",
                 str(int(limit_s * SLOW)), "--exec", "; ".join(commands)]
        env = dict(os.environ, **self.client_env())
        done = subprocess.run(words, capture_output=True, text=True, errors="surrogateescape", env=env,
                              stdin=subprocess.DEVNULL, timeout=2 * limit_s * SLOW + 30)
        if check:
            assert done.returncode == 0, f"{commands}: {done.stdout}{done.stderr}"
        return done.stdout

    def rows(self, prefix, *elements):
        """[(tuple without the prefix, value)...] of the keys under the tuple (prefix, elements...),
        as fdbcli shows them."""
        under = tuples.escape(tuples.pack(prefix, *elements))
        said = self.cli(f"getrange {under}\\x00 {under}\\xff 100000")
        out = []
        for line in said.splitlines():
            if line.startswith("`") and "' is `" in line:
                key, value = line[1:-1].split("' is `", 1)
                out.append((tuples.unpack(tuples.unescape(key))[1:], tuples.unescape(value)))
        return out

    def set(self, key, value):
        """Behind everybody's back."""
        self.cli("writemode on", f"set {tuples.escape(key)} {tuples.escape(value)}")

    def clear(self, key):
        self.cli("writemode on", f"clear {tuples.escape(key)}")

    def status(self):
        """The cluster's status as a dict; empty when it does not even give one."""
        said = self.cli("status json", check=False, limit_s=15)
        try:
            return json.loads(said[said.index("{"):])
        except ValueError:
            return {}

    def with_role(self, role, without=()):
        """The processes that now have this role and none of `without`."""
        told = self.status().get("cluster", {}).get("processes", {}).values()
        roles = {p["address"]: {r["role"] for r in p["roles"]} for p in told}
        return [p for p in self.processes
                if role in roles.get(p.address, ()) and not roles[p.address] & set(without)]

    # -- how programs name it ----------------------------------------------

    def uri(self, prefix):
        return f"fdb:{self.file}?prefix={prefix}"

    def prefix_of(self, what):
        """A prefix of its own for whatever it is; the same one for the same."""
        return self._prefixes.setdefault(what, f"t{len(self._prefixes) + 1}")

    @staticmethod
    def prefix_in(store):
        """The prefix that a store's URI names."""
        return store.split("?prefix=")[1]

    def store(self, what=None):
        """The URI of a store of its own for `what`; a new one for None."""
        return self.uri(self.prefix_of(object() if what is None else str(what)))

    def client_env(self):
        env = self.programs.client_env()
        if self.tls:
            env.update(self.tls.client_env())
        return env

    # -- backups -----------------------------------------------------------

    @contextlib.contextmanager
    def backup_agent(self):
        """A process of FoundationDB's that does the work of its backups, while the block runs."""
        words = [*self.prefix, BackupTools().agent, "-C", str(self.file), "--logdir", str(self.logs)]
        with open(self.folder / "agent", "ab") as out:
            process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *words],
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                       cwd=self.folder, start_new_session=True)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def backup(self, folder, limit_s=120):
        """A backup of all of it below a folder, of one moment after the call; gives its URL."""
        self._tool(BackupTools().backup, "start", "-C", str(self.file), "-d", f"file://{folder}",
                   "-w", limit_s=limit_s)
        (made,) = Path(folder).iterdir()
        return f"file://{made}"

    def restore(self, url, limit_s=120):
        """What is in a backup, into a cluster that is empty."""
        self._tool(BackupTools().restore, "start", "--dest-cluster-file", str(self.file), "-r", url,
                   "-w", limit_s=limit_s)

    def _tool(self, *words, limit_s):
        done = subprocess.run([*self.prefix, *words], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=limit_s * SLOW, cwd=self.folder)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def problems(self):
        """What its processes logged as errors (severity 40): they would explain a lot."""
        found = []
        for path in self.logs.glob("*.xml"):
            for line in path.read_text(errors="replace").splitlines():
                if 'Severity="40"' in line:
                    found.append(line)
        return found


class _PortTaken(AssertionError):
    pass


_shared = None


def shared():
    """The one cluster of one process that all tests of a run share; started when first needed."""
    global _shared
    if _shared is None:
        _shared = Cluster().start()
    return _shared


def end_shared():
    global _shared
    if _shared is not None:
        _shared.end()
        _shared = None
