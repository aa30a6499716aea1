"""A real Linux kernel as a process: Debian's user-mode-linux with nbd.ko.

It boots in two seconds without KVM, uses the host's own root folder (read-only)
as its root, so that nbd-client, mkfs, mount and fsck are the installed ones, and
reaches the server over a tap device. Device and server live in a network
namespace made for the test, so nothing on the host's network is touched or in
the way.

The guest runs one shell that takes the number of a script from its console,
runs it, and says its exit status on the console; scripts and their output go
through a folder both sides see.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

from . import netns
from .waiting import SLOW

HOST_ADDRESS, GUEST_ADDRESS = "10.99.0.1", "10.99.0.2"
MODULES = Path("/usr/lib/uml/modules")
REPO = Path(__file__).resolve().parents[2]

INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C
mount -t proc none /proc
mount -t sysfs none /sys
mountpoint -q /dev || mount -t devtmpfs none /dev
mount -t tmpfs none /tmp
mount -t tmpfs none /run
mkdir -p /tmp/out /tmp/mnt /tmp/lib/modules
mount -t hostfs none /tmp/out -o @OUT@
@REPO@
ip link set lo up
ip addr add @GUEST@/24 dev vec0
ip link set vec0 up
ln -s @MODULES@/$(uname -r) /tmp/lib/modules/
modprobe -d /tmp nbd max_part=0
cd /tmp
echo "@@READY"
while read -r number; do
    case $number in
    off) break ;;
    esac
    sh -eu /tmp/out/$number.sh >/tmp/out/$number.txt 2>&1 </dev/null
    echo "@@DONE $number $?"
done
echo o >/proc/sysrq-trigger
sleep 60
"""


def missing():
    """Why no guest can be had on this machine, or None."""
    for program in ("linux", "nbd-client", "modprobe", "ip", "unshare", "nsenter"):
        if not shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
            return f"{program} is not installed"
    if not list(MODULES.glob("*/kernel/drivers/block/nbd.ko*")):
        return f"no nbd.ko under {MODULES}"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened"
    return None


class Namespace(netns.Namespace):
    """With one tap device, by which a guest reaches what listens on HOST_ADDRESS."""

    def __init__(self):
        super().__init__()
        self.run("ip tuntap add dev tap0 mode tap")
        self.run(f"ip addr add {HOST_ADDRESS}/24 dev tap0")
        self.run("ip link set tap0 up")


class Guest:
    """One booted guest inside a namespace."""

    def __init__(self, folder, namespace, memory="384M"):
        self.folder = Path(folder)
        self.out = self.folder / "out"
        self.out.mkdir()
        init = self.folder / "init"
        # What is built lies where it lies outside, also where the guest has a folder of its own.
        hidden = REPO.parts[1] in ("tmp", "run")
        repo = f"mkdir -p '{REPO}'; mount -t hostfs none '{REPO}' -o '{REPO}'" if hidden else ""
        init.write_text(INIT.replace("@OUT@", str(self.out)).replace("@GUEST@", GUEST_ADDRESS)
                        .replace("@MODULES@", str(MODULES)).replace("@REPO@", repo))
        init.chmod(0o755)
        self.lines = []
        self._more = threading.Condition()
        self._numbers = 0
        env = dict(os.environ, HOME=str(self.folder), TMPDIR=str(self.folder))
        # Its memory is a file; on a disk that would be written out.
        if os.access("/dev/shm", os.W_OK):
            env["TMPDIR"] = "/dev/shm"
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *namespace.enter, "linux", f"mem={memory}",
             "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}", "quiet",
             "vec0:transport=tap,ifname=tap0,depth=128,gro=1",
             "con=null", "con0=fd:0,fd:1", "ssl=null", f"umid=fdbnbd{os.getpid()}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=env, start_new_session=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._await("@@READY", 120 * SLOW)

    def _read(self):
        for raw in self.process.stdout:
            with self._more:
                self.lines.append(raw.decode(errors="replace").strip())
                self._more.notify_all()
        with self._more:
            self.lines.append("@@END")
            self._more.notify_all()

    def _await(self, start, limit_s):
        """The console line that begins so."""
        deadline = time.monotonic() + limit_s
        with self._more:
            while True:
                for line in self.lines:
                    if line.startswith(start):
                        return line
                left = deadline - time.monotonic()
                if left <= 0 or "@@END" in self.lines:
                    raise AssertionError(f"no '{start}' from the guest within {limit_s:g} s\n"
                                         + self.console())
                self._more.wait(left)

    def console(self):
        return "--- console ---\n" + "\n".join(self.lines[-60:])

    def run(self, script, limit_s=60, check=True):
        """Runs a shell script in the guest (with -e) and gives what it printed."""
        self._numbers += 1
        number = self._numbers
        (self.out / f"{number}.sh").write_text(script)
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()
        line = self._await(f"@@DONE {number} ", limit_s * SLOW)
        status = int(line.split()[2])
        text = (self.out / f"{number}.txt").read_text(errors="replace")
        if check:
            assert status == 0, f"in the guest:\n{script}\ngave {status}:\n{text}\n{self.console()}"
        return text

    def end(self):
        if self.process.poll() is None:
            try:
                self.process.stdin.write(b"off\n")
                self.process.stdin.flush()
                self.process.wait(5 * SLOW)
            except (OSError, subprocess.TimeoutExpired):
                pass
        # The kernel's helper processes are in the session made for it.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self._reader.join(10)
