"""A bare Debian in a folder, and the same booted with systemd.

debootstrap's result is kept as an archive below the cache folder, so that later runs take seconds
and need no network.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.server import SLOW
from harness.waiting import wait_until

MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fdb-nbd"
LIMIT_S = 120 * SLOW
BOOT_LIMIT_S = 30 * SLOW
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
               "DEBIAN_FRONTEND": "noninteractive"}


def archive(packages):
    """The bare system with these packages in it, as a tar archive."""
    key = hashlib.sha256(" ".join(sorted(packages)).encode()).hexdigest()[:16]
    path = CACHE / f"bookworm-{key}.tar.zst"
    if path.exists():
        return path
    if subprocess.run(["timeout", "20", "apt-get", "-q", "download", "--print-uris", "libc6"],
                      capture_output=True).returncode:
        pytest.skip("Debian's packages cannot be reached")
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = Path(f"{path}.{os.getpid()}")
    try:
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(sorted(packages))}",
             "bookworm", folder, MIRROR], capture_output=True, text=True, timeout=5 * LIMIT_S)
        if done.returncode:
            if "Failed getting release file" in done.stdout + done.stderr:
                pytest.skip("Debian's packages cannot be reached")
            pytest.fail(f"debootstrap: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        shutil.rmtree(folder / "var/cache/apt/archives")
        part = Path(f"{folder}.tar")
        subprocess.run(["tar", "--zstd", "-C", folder, "-cf", part, "."], check=True)
        part.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


class System:
    def __init__(self, folder, packages):
        self.root = folder
        folder.mkdir()
        folder.chmod(0o755)
        subprocess.run(["tar", "--zstd", "-C", folder, "-xpf", archive(packages)], check=True)

    def words(self, *words):
        """What runs a program in it, beside those of the machine."""
        return ["unshare", "--mount", "sh", "-c",
                f"mount --bind /proc {self.root}/proc && exec chroot {self.root} \"$@\"", "sh",
                *(str(w) for w in words)]

    def run(self, *words, check=True):
        done = subprocess.run(self.words(*words), stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=LIMIT_S, env=ENVIRONMENT)
        assert not check or done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done

    def path(self, inside):
        return self.root / inside.lstrip("/")

    def traces(self, name):
        """All paths with this name in them."""
        found = subprocess.run(["find", self.root, "-xdev", "-path", f"*{name}*"],
                               capture_output=True, text=True, check=True).stdout
        return [line[len(str(self.root)):] for line in found.splitlines()]


class Booted:
    """The system with systemd as its first process, in namespaces of its own, its network too."""

    def __init__(self, system):
        self.system = system
        self.log = system.root.parent / "boot.log"
        self.nspawn = None

    def __enter__(self):
        with open(self.log, "wb") as out:
            self.nspawn = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "systemd-nspawn", "--quiet",
                 f"--directory={self.system.root}", "--register=no", "--keep-unit", "--boot",
                 "--private-network", "--kill-signal=SIGRTMIN+3"], stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_until(self._up, BOOT_LIMIT_S, "systemd is up")
        except AssertionError:
            said = self.log.read_text(errors="replace")[-2000:]
            self._end()
            pytest.skip(f"systemd cannot be booted in a folder here: {said}")
        return self

    def _first(self):
        path = Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children")
        children = path.read_text().split() if path.exists() else []
        return int(children[0]) if children else None

    def _up(self):
        assert self.nspawn.poll() is None, "it ended"
        self.first = self._first()
        if not self.first:
            return False
        done = self.run("systemctl is-system-running", check=False)
        return done.stdout.strip() in ("running", "degraded")

    def run(self, script, check=True):
        done = subprocess.run(["nsenter", "--all", f"--target={self.first}", "bash", "-c", script],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=LIMIT_S, start_new_session=True)
        if check and done.returncode:
            journal = self.run("journalctl -q --no-pager -n 30", check=False).stdout
            raise AssertionError(f"{script}\n{done.stdout}{done.stderr}\n{journal}")
        return done

    def show(self, prop, unit="fdb-nbd.service"):
        return self.run(f"systemctl show --value -p {prop} {shlex.quote(unit)}").stdout.strip()

    def _end(self):
        first = self._first()
        self.nspawn.kill()
        self.nspawn.wait()
        if first:
            # (All of its processes end with it.)
            subprocess.run(["kill", "-KILL", str(first)], capture_output=True)

    def __exit__(self, *unused):
        try:
            self.run("systemctl poweroff", check=False)
            self.nspawn.wait(30 * SLOW)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._end()
