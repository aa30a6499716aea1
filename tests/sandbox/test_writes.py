"""Nothing is written, made, changed or removed outside of the store, but for sockets and the files
that a command was told to write; nothing else is connected to; no program is run."""

import os
import re
import subprocess
import sys

import pytest

from harness.cluster import Cluster
from harness.gateway import gateway
from harness.server import CLI_LIMIT_S, program

# What makes, changes or removes something that has a name, or reaches somebody.
CALLS = ("open,openat,openat2,creat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,"
         "link,linkat,symlink,symlinkat,mknod,mknodat,chmod,fchmod,fchmodat,chown,fchown,fchownat,"
         "lchown,truncate,setxattr,lsetxattr,fsetxattr,removexattr,utimensat,utime,utimes,bind,"
         "connect,mount,umount2,pivot_root,chroot,execve,execveat,kill,tgkill,pidfd_send_signal,"
         "ptrace,process_vm_writev,mq_open,shmget,swapon,init_module,finit_module")
LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
# A descriptor, and what strace says it is.
AT = re.compile(r"^(?:AT_FDCWD|\d+)<((?:[^<>\\]|\\.|->)*)>")
WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND|O_TMPFILE")
DEVICES = ("/dev/null", "/dev/tty")
# Clients of TCP, the system's log, the system's cache of users.
ELSEWHERE = ("AF_INET", "AF_INET6", "AF_UNSPEC", "/dev/log", "/var/run/nscd/socket")


class Traced:
    def __init__(self, folder):
        self.folder = folder
        self.files = []

    def words(self):
        path = self.folder / f"trace{len(self.files)}"
        self.files.append(path)
        return ["strace", "-D", "-f", "-qq", "-y", "--seccomp-bpf", "-s", "4096", "-e",
                f"trace={CALLS}", "-e", "signal=none", "-o", str(path)]

    def deeds(self):
        """(call, paths or addresses, the whole line) of all that was more than looking."""
        for path in self.files:
            for number, line in enumerate(path.read_text().splitlines()):
                match = LINE.match(line)
                if match and not (number == 0 and match[2] == "execve"):
                    yield from self.deed(match[2], match[3], line)

    @staticmethod
    def deed(call, rest, line):
        if call.startswith("open") and not WRITES.search(STRING.sub("", rest)):
            return
        if call in ("kill", "tgkill", "pidfd_send_signal"):
            yield call, [], line
            return
        if call in ("bind", "connect"):
            unix = re.search(r'sun_path=(@?)"([^"]*)"', rest)
            inet = re.search(r"sa_family=(AF_INET6?|AF_UNSPEC)", rest)
            yield call, [unix[1] + unix[2] if unix else inet[1] if inet else rest], line
            return
        if call.startswith("f") and not call.endswith("at"):
            yield call, [AT.match(rest)[1]], line
            return
        # A path behind each folder, or by itself.
        folder, paths = os.getcwd(), []
        for part in re.findall(r'(?:AT_FDCWD|\d+)<[^>]*>|"(?:[^"\\]|\\.)*"', rest):
            if part.startswith('"'):
                paths.append(os.path.join(folder, part[1:-1]))
            else:
                folder = AT.match(part)[1]
        yield call, [os.path.normpath(p) for p in paths], line


def is_beneath(path, places):
    return any(f"{path}/".startswith(f"{p}/") for p in places)


def commands(traced, server):
    """Gives command(words...), which runs one of the program's under the tracer."""
    def command(*words):
        done = subprocess.run([*traced.words(), *program(), "--store", server.store,
                               *(str(w) for w in words)], stdin=subprocess.DEVNULL,
                              env={**os.environ, **server.env}, capture_output=True, text=True,
                              timeout=CLI_LIMIT_S)
        assert done.returncode == 0, done.stderr
    return command


def only_these(traced, server, places, store):
    """Nothing was done but beneath these."""
    own = [*places, server.socket_path, "/run/fdb-nbd", *DEVICES]
    # (Under another name until it is moved over the old one's.)
    beside = re.compile(rf"{re.escape(str(server.socket_path))}\.\d+")

    def may(call, targets, line):
        if call in ("kill", "tgkill", "pidfd_send_signal"):
            # Whether others live, and the end of the one that is replaced.
            return re.search(r", 0(, |\))|SIGTERM", line)
        if call in ("bind", "connect") and targets[0] in ELSEWHERE:
            return True
        if call == "mkdir" and all(is_beneath(store, [t]) for t in targets):
            return True  # the folders that lead to it, where they are missing
        return targets and all(is_beneath(t, own) or beside.fullmatch(t) or
                               t.startswith("socket:[") for t in targets)

    deeds = list(traced.deeds())
    bad = [line for call, targets, line in deeds if not may(call, targets, line)]
    assert not bad, "\n".join(bad[:40])
    return len(deeds)


@pytest.mark.lmdb("about files")
def test_only_the_store_is_written(servers, folder, life, rng):
    server = servers.make({"v": "64M", "w": "8M"}, life.args(), store=life.store, env=life.env())
    traced = Traced(folder)
    server.prefix = traced.words()
    command = commands(traced, server)
    with server:
        life.whole(server, rng, command)
        # (The new one is under the same tracer's eyes.)
        server.prefix = traced.words()
        server.upgrade()
        life.by_key(server).shutdown()
        command("drain", "--control", life.control(server))
    assert only_these(traced, server, [life.store, life.out, life.run], life.store) > 300


@pytest.mark.fdb
def test_on_foundationdb_nothing_is_written(folder, life, rng):
    """Nor by the cluster's library, but for its file, which it keeps up to date."""
    with Cluster() as cluster:
        server = gateway(cluster, folder / "g", {"v": "64M", "w": "8M"}, life.args(),
                         env=life.env())
        traced = Traced(folder)
        server.prefix = traced.words()
        command = commands(traced, server)
        with server:
            life.load(server, rng)
            command("snapshot", "create", "v@s")
            command("export", "v@s", life.out / "image")
            command("verify", "w")
        only_these(traced, server, [life.out, life.run, cluster.file], cluster.file)
    assert (life.out / "image").exists()


def test_the_tracer_sees(folder):
    """What the test above looks for is found."""
    traced = Traced(folder)
    code = ("import os, socket; os.chdir('/tmp'); f = os.open('sub', os.O_CREAT | os.O_RDWR); "
            "os.fchmod(f, 0o600); os.rename('/tmp/sub', '/tmp/bus'); os.unlink('/tmp/../tmp/bus'); "
            "d = os.open('/tmp', 0); os.mkdir('m', dir_fd=d); os.rmdir('m', dir_fd=d); "
            "s = socket.socket(socket.AF_UNIX); "
            "s.connect_ex('/tmp/none'); os.kill(os.getpid(), 0); os.execv('/bin/true', ['true'])")
    subprocess.run([*traced.words(), "unshare", "--mount", "sh", "-c",
                    f"mount --bind {folder} /tmp && exec \"$@\"", "sh", sys.executable, "-c", code]
                   if os.geteuid() == 0 else [*traced.words(), sys.executable, "-c", code],
                   check=True, timeout=60)
    found = [(call, targets) for call, targets, _ in traced.deeds()]
    for call, target in (("openat", "/tmp/sub"), ("fchmod", "/tmp/sub"), ("unlink", "/tmp/bus"),
                         ("mkdirat", "/tmp/m"), ("unlinkat", "/tmp/m"), ("connect", "/tmp/none"),
                         ("execve", "/bin/true")):
        assert any(c == call and target in t for c, t in found), (call, found[-20:])
    assert any(c.startswith("rename") and t == ["/tmp/sub", "/tmp/bus"] for c, t in found), found[-20:]
    assert any(c == "kill" for c, _ in found)
