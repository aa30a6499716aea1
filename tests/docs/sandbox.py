"""Machines for examples to be run on, as they stand in the manual.

A machine here is a few namespaces: mounts, network, processes and host name of its own. Its root
is a folder in memory with the programs of this machine in it (/usr, read by all), a copy of /etc,
and nothing else: /var/lib, /run, /root, /mnt and all that is written there is the machine's, and
goes with it. Several machines on one Network reach each other under addresses, as hosts do.

What differs from a real one, all of it in /usr/local/bin:
  fdb-nbd    the program that is tested
  sudo       runs its words: one is root there
  systemctl  starts what units say, and FoundationDB (systemctl.py)
  qemu-system-x86_64   without a window
and SERVER and SERVICE, which stand for hosts in examples, are names of localhost.
What belongs to the kernel (nbd-client, mkfs, mount) is run in a Linux guest (harness/uml.py) that
has the machine's files and reaches what listens on the machine's localhost as its own localhost.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from harness import netns, uml
from harness.server import REPO, program
from harness.waiting import SLOW, wait_until

START_LIMIT_S = 30 * SLOW

# In the new namespaces, as their root: builds the machine's root folder and waits in it.
SETUP = """set -e
root=$1 name=$2 repo=$3 folder=$4
mount --make-rprivate /
mount -t tmpfs none "$root"
for d in /bin /sbin /lib /lib32 /lib64 /libx32; do
    if [ -L "$d" ]; then cp -P "$d" "$root/"; elif [ -d "$d" ]; then
        mkdir "$root/$d"; mount --rbind "$d" "$root/$d"; fi
done
cd "$root"
mkdir usr dev proc sys tmp run root home mnt srv backup var var/lib var/lib/dpkg var/tmp var/log var/cache
chmod 1777 tmp var/tmp
ln -s ../run var/run
cp -a /etc etc 2>/dev/null || true
mount --rbind /usr usr
mount --rbind /dev dev
mount -t tmpfs none dev/shm  # FoundationDB knows by it what is on one machine
mount --rbind /sys sys
mount -t proc none proc
mount --bind /var/lib/dpkg var/lib/dpkg
mount -t tmpfs none usr/local
mkdir -p usr/local/bin usr/local/guest ".$repo" ".$folder"
mount --bind "$repo" ".$repo"
mount --bind "$folder" ".$folder"
printf '127.0.0.1 localhost SERVER SERVICE\\n::1 localhost\\n127.0.1.1 %s\\n' "$name" > etc/hosts
hostname "$name"
ip link set lo up
cd /
exec chroot "$root" sleep infinity
"""

SHIMS = {
    "bin/fdb-nbd": f"exec {shlex.join(program())} \"$@\"",
    "bin/systemctl": f"exec {sys.executable} {Path(__file__).with_name('systemctl.py')} \"$@\"",
    "bin/sudo": "exec \"$@\"",
    "bin/qemu-system-x86_64": "exec /usr/bin/qemu-system-x86_64 -display none \"$@\"",
    # Before /usr/sbin in the guest's PATH: its modules are where they were put for it.
    "guest/modprobe": "exec /usr/sbin/modprobe -d /tmp \"$@\"",
}
PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
ENVIRONMENT = {"HOME": "/root", "PATH": PATH, "LC_ALL": "C.UTF-8", "TERM": "dumb"}
# How a guest reaches the machine's localhost.
TUNNEL_PORTS = {10809: 20809}


class Network:
    """What machines are plugged into."""

    def __init__(self):
        self._namespace = netns.Namespace()
        self.enter = self._namespace.enter
        self._namespace.run("ip link add br0 type bridge")
        self._namespace.run("ip link set br0 up")
        self._ports = 0

    def plug(self, machine):
        port = f"port{self._ports}"
        self._ports += 1
        self._namespace.run(f"ip link add {port} type veth peer name eth0 netns {machine.pid}")
        self._namespace.run(f"ip link set {port} master br0 up")
        machine.run(["ip", "addr", "add", f"{machine.address}/24", "dev", "eth0"])
        machine.run("ip link set eth0 up".split())

    def end(self):
        self._namespace.end()


class Machine:
    """`folder` is seen under the same name inside. `network`, address: where it is plugged in."""

    def __init__(self, folder, name="example", env=None, network=None, address=None):
        self.name, self.folder = name, Path(folder)
        self.env = dict(ENVIRONMENT, **(env or {}))
        self.address = address
        self.root = self.folder / f"root-{name}"
        self.root.mkdir()
        self._guest = None
        self._running = []
        inside = network.enter if network else []
        user = [] if os.geteuid() == 0 or network else ["--map-root-user"]
        # Whatever runs in there ends with the first process of its process namespace.
        self._said = self.folder / f"setup-{name}"
        with open(self._said, "wb") as said:
            self._unshare = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *inside,
                 "unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", *user,
                 "sh", "-c", SETUP, "setup", self.root, name, REPO, self.folder],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        self.pid = wait_until(self._made, START_LIMIT_S, f"the machine {name} is there")
        self.enter = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--pid",
                      "--root", "--wd",
                      *([] if os.geteuid() == 0 else ["--user", "--preserve-credentials"])]
        if network:
            network.plug(self)
        for path, text in SHIMS.items():
            self.write(f"/usr/local/{path}", f"#!/bin/sh\n{text}\n", 0o755)

    def _made(self):
        assert self._unshare.poll() is None, (
            f"no machine could be made: {self._said.read_text(errors='replace')}")
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text()
        for child in children.split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "sleep":
                return child
        return None

    # -- files and commands ---------------------------------------------------

    def write(self, path, text, mode=0o644):
        """A file of the machine's."""
        self.run(["sh", "-c", 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"', "sh",
                  path, f"{mode:o}"], input=text)

    def read(self, path):
        return self.run(["cat", path]).stdout

    def words(self, words):
        return [*self.enter, "env", "-i", *(f"{k}={v}" for k, v in self.env.items()),
                "sh", "-c", 'cd "$HOME" && exec "$@"', "sh", *(str(w) for w in words)]

    def run(self, words, *, input="", check=True, limit_s=60):
        done = subprocess.run(self.words(words), input=input, capture_output=True, text=True,
                              timeout=limit_s * SLOW)
        if check:
            assert done.returncode == 0, (
                f"on {self.name}: {words}\ngave {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def start(self, words, log):
        """Runs on until stop() or the machine's end; what it says is in the file `log`."""
        with open(log, "ab") as out:
            process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *self.words(words)],
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                       start_new_session=True)
        self._running.append(process)
        return process

    # -- the kernel -------------------------------------------------------------

    def guest(self):
        """The machine's Linux guest; booted when first asked for."""
        if self._guest is None:
            self.run("ip tuntap add dev tap0 mode tap".split())
            self.run(["ip", "addr", "add", f"{uml.HOST_ADDRESS}/24", "dev", "tap0"])
            self.run("ip link set tap0 up".split())
            self._guest = uml.Guest(self.folder, self)
            forward = Path(__file__).with_name("forward.py")
            for port, tunnel in TUNNEL_PORTS.items():
                self.start([sys.executable, forward, f"{uml.HOST_ADDRESS}:{tunnel}",
                            f"127.0.0.1:{port}"], self.folder / "forward")
                self._guest.run(
                    f"setsid {sys.executable} {forward} 127.0.0.1:{port} "
                    f"{uml.HOST_ADDRESS}:{tunnel} >/dev/null 2>&1 </dev/null &\n"
                    f"until (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.05; done\n"
                    .join(["bash -c '", "'"]))
        return self._guest

    def end(self):
        if self._guest:
            self._guest.end()
        self._unshare.send_signal(signal.SIGKILL)
        self._unshare.wait()
        for process in self._running:
            process.kill()
            process.wait()
