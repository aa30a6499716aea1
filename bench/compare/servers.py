"""The servers: how each is started as its manual advises, reached, ended, and what CPU it used.

Each serves one volume called "v", from files in a folder of its own, over one Unix socket or one
TCP port (that is all some of them can do at once). Each instance lives as long as the stage it is
measured in (workloads.py).
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))

from harness import rawnbd  # noqa: E402
from harness.waiting import free_port, greets, wait_until  # noqa: E402

START_LIMIT_S = 30
STOP_LIMIT_S = 60
TOOL_LIMIT_S = 60
PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A server that does not start, ended by itself, or cannot be asked."""


def adopt_orphans():
    """Makes this process the parent of servers that put themselves in the background, so that
    it learns of their end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stat_fields(pid):
    """What follows the name in /proc/PID/stat; None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def family(pid):
    """A process and all below it."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat_fields(entry)):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def family_cpu_s(pid):
    """What all threads of a process used until now, and all processes below it, those included
    that have ended and were waited for: some servers fork for each connection."""
    ticks = 0
    for one in family(pid):
        if fields := stat_fields(one):
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


class Server:
    name = title = package = ""
    # Whether what was flushed survives a power failure.
    durable = True
    # Whether files take the volume's place on the disk, and how many times its size.
    disk_factor = 1.1
    # Its data may be larger than its memory.
    spills = True
    # How long it may look idle with work of earlier writes still to be done.
    defers_s = 0
    program = ""

    def __init__(self, folder, stage, limit):
        self.folder, self.stage, self.limit = Path(folder), stage, limit
        self.size = stage.size
        self.tcp = stage.transport == "tcp"
        self.port = free_port() if self.tcp else None
        self.socket = self.folder / "s"
        self.image = self.folder / "image"
        self.pid = None
        self.log = None
        # A client that is connected all the time, as of a device that is mounted: between its
        # last client and the next a server may give up what it has in its cache.
        self.stays = None

    # What each server is ---------------------------------------------------

    def prepare(self):
        """Makes what is served."""
        with open(self.image, "wb") as f:
            f.truncate(self.size)

    def words(self):
        raise NotImplementedError

    @classmethod
    def version(cls):
        out = subprocess.run([cls.program, "--version"], capture_output=True, text=True,
                             timeout=TOOL_LIMIT_S, check=False)
        return first_version(out.stdout + out.stderr)

    @classmethod
    def missing(cls):
        """Why it cannot be measured, or None."""
        return None if shutil.which(cls.program) else f"{cls.program} is not installed"

    # The process -----------------------------------------------------------

    def uri(self):
        if self.tcp:
            return f"nbd://127.0.0.1:{self.port}/v"
        return f"nbd+unix:///v?socket={urllib.parse.quote(str(self.socket))}"

    def start(self):
        self.folder.mkdir(parents=True)
        self.log = open(self.folder / "log", "ab")  # noqa: SIM115 (closed by stop)
        self.prepare()
        self.spawn()
        try:
            wait_until(self.answers, START_LIMIT_S, f"{self.name} accepts connections", 0.02)
            self.stays = rawnbd.connect(None, "v", address=self.address(),
                                        timeout_s=START_LIMIT_S)
            self.stays.read(0, 4096)
        except (AssertionError, OSError, rawnbd.ProtocolError) as e:
            raise Failed(f"{e}\n{self.log_tail()}") from None

    def spawn(self):
        self.pid = self.run_words(self.words()).pid

    def run_words(self, words):
        # A server must not outlive this program, however it ends.
        return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *self.limit.wrap(words)],
                                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=self.log,
                                stderr=self.log)

    def address(self):
        return ("127.0.0.1", self.port) if self.tcp else str(self.socket)

    def answers(self):
        self.check_alive()
        return greets(self.address())

    def alive(self):
        try:
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:
            return False

    def check_alive(self):
        if not self.alive():
            raise Failed(f"{self.name} ended by itself\n{self.log_tail()}")

    def log_tail(self):
        return (self.folder / "log").read_text(errors="replace")[-2000:].strip()

    def cpu_s(self):
        return family_cpu_s(self.pid)

    def settle(self, wrote, limit_s):
        """Waits until the server has nothing left to do, so that it does not disturb the next
        one and what it does later is counted with what caused it."""
        now = time.monotonic()
        least, until = now + (self.defers_s if wrote else 0), now + limit_s
        used = self.cpu_s()
        while time.monotonic() < until:
            time.sleep(0.1)
            before, used = used, self.cpu_s()
            if used - before < 1.5 / TICKS and time.monotonic() > least:
                return

    def stop(self):
        """Ends it, with all below it, and removes what it kept."""
        if self.stays:
            self.stays.close()
        if self.pid is not None:
            below = family(self.pid)[1:]
            self.end(self.pid, signal.SIGTERM) or self.end(self.pid, signal.SIGKILL)
            # Whom it left behind is our child now (adopt_orphans).
            for pid in below:
                self.end(pid, signal.SIGKILL)
            self.pid = None
        if self.log:
            self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def end(pid, how):
        """Whether the process ended of it in time. One that is no child of ours has ended."""
        until = time.monotonic() + STOP_LIMIT_S
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                os.kill(pid, how)
                while os.waitpid(pid, os.WNOHANG)[0] == 0:
                    if time.monotonic() > until:
                        return False
                    time.sleep(0.02)
        except ChildProcessError:
            pass
        return True


def first_version(text):
    found = re.search(r"\d+\.\d+[\w.+~-]*", text)
    return found[0] if found else "?"


class FdbNbd(Server):
    name, title = "fdb-nbd", "fdb-nbd"
    program = os.environ.get("FDB_NBD", str(REPO / "build" / "fdb-nbd"))
    # Blocks are written out of place, and there is a log.
    disk_factor = 1.6
    # What was written last is in the log, and is committed when it is a second old.
    defers_s = 1.2
    create_words = ("--compression", "lz4")

    def store(self):
        return ["--store", f"lmdb:{self.folder / 'store'}"]

    def prepare(self):
        done = subprocess.run([self.program, *self.store(), "create", "v", str(self.size),
                               *self.create_words], capture_output=True, text=True,
                              timeout=TOOL_LIMIT_S, check=False)
        if done.returncode:
            raise Failed(f"create: {done.stderr.strip()}")

    def words(self):
        listen = f"127.0.0.1:{self.port}" if self.tcp else f"unix:{self.socket}"
        return [self.program, *self.store(), "serve", "--listen", listen, "--cache-size",
                str(self.stage.cache_size)]


class FdbNbdPlain(FdbNbd):
    """Without compression. Hashing cannot be switched off: what is read is always checked."""
    name, title = "fdb-nbd-plain", "fdb-nbd, no compression"
    create_words = ("--compression", "none")


class FdbNbdSmall(FdbNbd):
    """Blocks as large as the requests of the random workloads: nothing is written around them, but
    the index is four times as large, and compression saves nothing."""
    name, title = "fdb-nbd-4k", "fdb-nbd, 4 KiB blocks"
    create_words = ("--block-size", "4K")


class NbdkitMemory(Server):
    name, title = "nbdkit-memory", "nbdkit memory"
    program = "nbdkit"
    durable, spills, disk_factor = False, False, 0

    def prepare(self):
        pass

    def listen(self):
        return ["-i", "127.0.0.1", "-p", str(self.port)] if self.tcp else ["-U", str(self.socket)]

    def words(self):
        return ["nbdkit", "-f", *self.listen(), "memory", str(self.size)]


class NbdkitFile(NbdkitMemory):
    name, title = "nbdkit-file", "nbdkit file"
    durable, spills, disk_factor = True, True, 1.1

    def prepare(self):
        Server.prepare(self)

    def words(self):
        return ["nbdkit", "-f", *self.listen(), "file", str(self.image)]


class QemuRaw(Server):
    name, title = "qemu-nbd-raw", "qemu-nbd raw"
    program = "qemu-nbd"
    format = "raw"

    def listen(self):
        return ["-b", "127.0.0.1", "-p", str(self.port)] if self.tcp else ["-k", str(self.socket)]

    def words(self):
        # As people use it who let their guests discard.
        return ["qemu-nbd", "-f", self.format, "-x", "v", "-t", "-e", "0", "--cache=writeback",
                "--discard=unmap", *self.listen(), str(self.image)]


class QemuQcow2(QemuRaw):
    name, title = "qemu-nbd-qcow2", "qemu-nbd qcow2"
    format = "qcow2"

    def prepare(self):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(self.image),
                        str(self.size)], check=True, timeout=TOOL_LIMIT_S)


class NbdServer(Server):
    name, title = "nbd-server", "nbd-server"
    program = "nbd-server"

    @classmethod
    def version(cls):
        out = subprocess.run([cls.program, "-V"], capture_output=True, text=True,
                             timeout=TOOL_LIMIT_S, check=False)
        return first_version(out.stdout + out.stderr)

    def words(self):
        listen = (f"listenaddr = 127.0.0.1\nport = {self.port}" if self.tcp
                  else f"unixsock = {self.socket}")
        (self.folder / "config").write_text(
            f"[generic]\n{listen}\n[v]\nexportname = {self.image}\n"
            "flush = true\nfua = true\ntrim = true\n")
        return ["nbd-server", "-C", str(self.folder / "config"), "-p", str(self.folder / "pid")]

    def spawn(self):
        # It can only serve more than one client as a daemon.
        if self.run_words(self.words()).wait(START_LIMIT_S):
            raise Failed(f"{self.name} did not start\n{self.log_tail()}")
        pid = wait_until(lambda: (self.folder / "pid").exists() and
                         (self.folder / "pid").read_text().strip(), START_LIMIT_S,
                         f"{self.name} names its process", 0.02)
        self.pid = int(pid)


ALL = {s.name: s for s in (FdbNbd, FdbNbdPlain, FdbNbdSmall, NbdkitMemory, NbdkitFile, QemuRaw,
                           QemuQcow2, NbdServer)}
OURS = ("fdb-nbd", "fdb-nbd-plain", "fdb-nbd-4k")
# Peers that keep a volume as a plain file.
RAW = ("nbdkit-file", "qemu-nbd-raw", "nbd-server")
