"""What an administrator, and a clumsy one, does with volumes while clients use them: commands of
all kinds, some killed half way, each checked by what must come of it; and clients that are up
to no good."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time

from harness import http, rawnbd
from harness.load import content
from harness.server import program

from volume import LOST, MIB, SNAPSHOTS, digest
from world import Defect, now_ns

USED = ("use", "client")


class Chores:
    """scratch: a volume whose content nobody checks but `verify`, for clients that can't say what
    they did."""

    def __init__(self, world, volumes, scratch):
        self.world, self.volumes, self.scratch = world, volumes, scratch
        self.rng = world.rng("chores")
        self.files = world.folder / "files"
        self.files.mkdir()
        self.numbers = 0
        self.last_scrape = {}

    def every(self, mean_s, name, run):
        """A thread that does one of these again and again."""
        def go():
            rng = self.world.rng(name)
            while not self.world.over.wait(rng.expovariate(1 / mean_s)):
                run(rng)
        return self.world.thread(name, go)

    def kill_after(self, rng):
        """Now and then a command is killed, at any point of its short life."""
        return rng.random() ** 2 * 0.08 if rng.random() < 0.2 else None

    # -- beside the load -----------------------------------------------------------------

    def under_load(self, rng):
        busy = [v for v in self.volumes if not v.ending.is_set() and v.exists]
        if not busy:
            return
        v = rng.choice(busy)
        if not v.between.acquire(blocking=False):
            return
        try:
            if v.ending.is_set():
                return
            what = rng.choices((self.snapshot, self.snapshot_removed, self.snapshot_checked,
                                self.snapshot_renamed, self.verified, self.grown, self.victim,
                                self.exported, self.evicted, self.flattened, self.shown),
                               (20, 10, 6, 4, 8, 4, 16, 5, 2, 3, 6))[0]
            what(v, rng)
        finally:
            v.between.release()

    def snapshot(self, v, rng):
        if len(v.snapshots) >= SNAPSHOTS:
            self.snapshot_removed(v, rng)
        else:
            v.create_snapshot(self.kill_after(rng))

    def free_snapshots(self, v):
        return [s.name for s in v.snapshots.values() if not s.clones]

    def snapshot_removed(self, v, rng):
        free = self.free_snapshots(v)
        if free:
            v.remove_snapshot(rng.choice(free), self.kill_after(rng))

    def snapshot_checked(self, v, rng):
        if v.snapshots:
            v.check_snapshot(rng.choice(list(v.snapshots)))

    def snapshot_renamed(self, v, rng):
        free = self.free_snapshots(v)
        if not free:
            return
        name, new = rng.choice(free), v.new_name("r")
        if self.world.command("snapshot", "rename", f"{v.name}@{name}", new) is None:
            # It may have happened, or may still.
            v.maybe.update((name, new))
            v.forget(name)
            return
        s = v.snapshots.pop(name)
        s.name = new
        v.snapshots[new] = s
        v.check_snapshot(new)

    def verified(self, v, rng, kill=True):
        verify(self.world, v.name, self.kill_after(rng) if kill else None)

    def grown(self, v, rng):
        """Behind the part that is used; what is there is looked at when it shrinks again."""
        if not v.base:
            self.world.command("resize", v.name, v.span + 65536 * rng.randrange(1, 64),
                               may_say=("--shrink",))

    def victim(self, v, rng):
        v.run_victim(rng)

    def exported(self, v, rng):
        """A snapshot into a file or a stream, and the stream into a new volume."""
        if not v.snapshots or v.base:
            return
        s = rng.choice(list(v.snapshots.values()))
        self.numbers += 1
        path = self.files / f"export{self.numbers}"
        stream = rng.random() < 0.6
        words = ["export", f"{v.name}@{s.name}", path] + (["--stream"] if stream else [])
        if self.world.command(*words, kill_after_s=self.kill_after(rng)) is None:
            if path.exists() and not self.world.was_upset(now_ns()):
                # Killed after its end.
                self.world.count("exports")
            for left in self.files.glob(f"{path.name}*"):
                left.unlink()
            return
        self.world.count("exports")
        if not stream:
            with open(path, "rb") as f:
                if digest(f.read(v.span)) != s.digest:
                    raise Defect(f"the export {path} of {v.name}@{s.name} differs from {s.path}")
        else:
            self.imported(v, s, path, rng)
        path.unlink()

    def imported(self, v, s, path, rng):
        name = f"i{self.numbers}"
        kill = self.kill_after(rng)
        done = self.world.command("import", path, name, kill_after_s=kill)
        if done is None:
            # Whatever became of it, again, so that nothing of the first attempt stays.
            self.retry(lambda: self.world.command("import", "--force", "--yes", path, name))
        v_data = v.read_export(name)
        if digest(v_data) != s.digest:
            raise Defect(f"{name}, imported from {path}, differs from {s.path}")
        self.world.count("imports")
        self.world.count("verified bytes", len(v_data))
        self.remove_volume(name, self.kill_after(rng))

    def retry(self, run, limit_s=120):
        """Until a command has not met the end of a server."""
        deadline = time.monotonic() + limit_s
        while True:
            done = run()
            if done is not None:
                return done
            if time.monotonic() > deadline:
                raise Defect(f"a command fails for {limit_s} s")
            time.sleep(0.2)

    def remove_volume(self, name, kill_after_s=None):
        if kill_after_s is not None:
            self.world.command("remove", "--yes", "--snapshots", name, kill_after_s=kill_after_s)
        deadline = time.monotonic() + 120
        while name in self.names():
            self.world.command("remove", "--yes", "--snapshots", name, may_say=(*USED, "no volume"))
            if time.monotonic() > deadline:
                raise Defect(f"the volume {name} can't be removed for 120 s")
            time.sleep(0.1)

    def settle(self):
        """A change whose process was killed in the last step of its commit is there for everybody
        once somebody else has changed something (LMDB: by the next who takes the writer's lock)."""
        self.numbers += 1
        name = f"settle{self.numbers}"
        self.retry(lambda: self.world.command("create", name, "4K") or name in self.names() or None)
        self.remove_volume(name)

    def names(self):
        done = self.retry(lambda: self.world.command("--json", "list"))
        return [v["name"] for v in json.loads(done.stdout)["volumes"]]

    def evicted(self, v, rng):
        v.evicted_until_ns = now_ns() + 60 * 10**9
        self.world.command("owner", "evict", "--yes", v.name, may_say=("nobody", "not in use"))
        v.evicted_until_ns = now_ns() + 5 * 10**9

    def flattened(self, v, rng):
        if v.origin:
            self.world.command("flatten", v.name, kill_after_s=self.kill_after(rng),
                               may_say=("snapshot", "no clone", "not a clone"))

    def shown(self, v, rng):
        for words in (("--json", "info", v.name), ("--json", "usage", v.name), ("--json", "list"),
                      ("--json", "owner", "show", v.name)):
            done = self.world.command(*words)
            if done:
                json.loads(done.stdout)
        if v.snapshots:
            self.world.command("diff", "--since", rng.choice(list(v.snapshots)), v.name,
                               may_say=("no snapshot",))

    # -- between rounds ------------------------------------------------------------------

    def between_rounds(self, v, rng):
        """Nobody has the volume open."""
        v.sweep()
        if v.origin is not None and rng.random() < 0.25:
            self.cloned_anew(v, rng)
            return
        what = rng.choices((None, self.rolled_back, self.shrunk, self.verified), (6, 2, 2, 1))[0]
        if what:
            what(v, rng)
        if v.snapshots and rng.random() < 0.3:
            v.check_snapshot(rng.choice(list(v.snapshots)))
        up = [s for s in self.world.slots if s.accepting.is_set()]
        if up and rng.random() < 0.3:
            there = rng.choice(up)
            if there is not v.home:
                v.home = there
                self.world.count("volumes moved between two servers, by their clients")

    def rolled_back(self, v, rng):
        # Newer ones would have to go; those that have clones can't.
        last_cloned = max((s.born for s in v.snapshots.values() if s.clones), default=0)
        possible = [s for s in v.snapshots.values() if s.born >= last_cloned]
        if not possible:
            return
        s = rng.choice(possible)
        kill = self.kill_after(rng)
        done = self.world.command("snapshot", "rollback", "--destroy-newer", "--yes",
                                  f"{v.name}@{s.name}", kill_after_s=kill, may_say=USED)
        if done is None and kill is None and not self.world.was_upset(now_ns()):
            return
        now = v.read_window()
        there = v.stored_snapshots()
        while there is None:
            there = v.stored_snapshots()
        if digest(now) == s.digest:
            self.world.count("rollbacks")
            v.before = bytes(now)
        elif done is not None or now != v.before:
            raise Defect(f"{v.name} was rolled back to {s.name} and does not hold what that "
                         f"does: {v.keep('rollback', now)}, {s.path}")
        for name in [one.name for one in v.snapshots.values() if one.born > s.born]:
            if name not in there:
                v.forget(name)

    def shrunk(self, v, rng):
        """Cut off and given back: zeros. Also what was grown goes."""
        if v.base:
            return
        size = 512 * rng.randrange(v.span // 1024, v.span // 512)
        if self.world.command("resize", "--shrink", "--yes", v.name, size) is None:
            # Perhaps: what counts is what is there.
            info = json.loads(self.retry(
                lambda: self.world.command("--json", "info", v.name)).stdout)
            if info["size_bytes"] >= v.span:
                return
            size = info["size_bytes"]
        self.retry(lambda: self.world.command("resize", v.name, v.span))
        v.before = v.before[:size] + bytes(v.span - size)
        self.world.count("resizes")
        v.judge()

    def cloned_anew(self, v, rng):
        """The volume that is a clone goes, and comes again as one of another snapshot."""
        self.remove_volume(v.name, self.kill_after(rng))
        v.exists = False
        if v.origin:
            v.origin[1].clones -= 1
        for name in list(v.snapshots):
            v.forget(name)
        v.maybe.clear()
        v.origin = ()
        while not v.origin and not self.world.over.is_set():
            self.clone(v, rng)
        v.name_number += 1

    def clone(self, v, rng):
        sources = [u for u in self.volumes if u is not v and u.origin is None and u.span == v.span
                   and u.snapshots]
        if not sources:
            self.world.over.wait(0.5)
            return
        source = rng.choice(sources)
        if not source.between.acquire(timeout=5):
            return
        try:
            # Not while its owner of before may still change what is there.
            if source.ending.is_set() or not source.snapshots:
                return
            s = rng.choice(list(source.snapshots.values()))
            name = f"c{v.name_number}"
            kill = self.kill_after(rng)
            done = self.world.command("clone", f"{source.name}@{s.name}", name, kill_after_s=kill)
            if done is None:
                self.settle()
                if name not in self.names():
                    v.name_number += 1
                    return
            s.clones += 1
            v.name, v.base = name, source.base
            v.origin = (source, s)
            v.exists = True
            v.before = s.path.read_bytes()
        finally:
            source.between.release()
        v.judge()
        self.world.count("clones")

    # -- whole servers and stores ---------------------------------------------------------

    def observed(self, rng):
        """Metrics over HTTP, which must never go back, and what the commands say of servers."""
        for slot in self.world.slots:
            if not slot.accepting.is_set():
                continue
            instance, began = slot.instances[-1], now_ns()
            try:
                metrics = http.scrape(http.control(instance.pid))
                status = rng.choice(("/v1/status", "/healthz", "/", "/readyz", "/nothing"))
                http.request(http.control(instance.pid), status)
            except OSError as e:
                if not self.world.was_upset(began):
                    raise Defect(f"no metrics of server {instance.name}: {e}") from None
                continue
            before = self.last_scrape.get(instance)
            if before:
                metrics.check_after(before)
            self.last_scrape[instance] = metrics
            self.world.count("HTTP scrapes")
        # By their sockets: other servers of this user are none of ours.
        named = [word for slot in self.world.slots if slot.accepting.is_set()
                 for word in ("--control", http.control(slot.instances[-1].pid))]
        if named:
            self.world.command(rng.choice(("status", "clients")), *named)

    def hung_up(self, rng):
        for slot in self.world.slots:
            if slot.accepting.is_set():
                # Not to one that is only being started: until it can, it ends by that.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(slot.instances[-1].pid, signal.SIGHUP)
                    self.world.count("SIGHUP")

    def backed_up(self, rng):
        """A copy of the whole store in use; it must be whole."""
        folder = self.files / "backup"
        done = self.world.command("store", "backup", folder,
                                  kill_after_s=self.kill_after(rng))
        if done is not None:
            v = rng.choice([v for v in self.volumes if v.origin is None])
            # What a volume's owner was asked for is in the copy too, and is done there first.
            self.retry(lambda: verify(self.world, v.name, store=f"lmdb:{folder}",
                                      may_say=("is being resized: try again",)) or None)
            self.world.count("backups of the store")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"{folder}.partial", ignore_errors=True)

    # -- clients that nobody checks ----------------------------------------------------------

    def bench(self, rng):
        """Large sequential ones, fast; sometimes killed."""
        slot = self.scratch.home
        if not slot.accepting.is_set():
            return
        began = now_ns()
        words = [*program(), "bench", slot.server.uri(self.scratch.name), "--workload",
                 rng.choice(("rw", "write", "read", "randrw")), "--block-size",
                 rng.choice(("1M", "4M", "256K")), "--bytes", f"{rng.randrange(12, 64)}M",
                 "--connections", str(rng.randrange(1, 4)), "--depth", "4", "--overwrite",
                 "--time", "20"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        if rng.random() < 0.4:
            try:
                process.communicate(timeout=rng.random() * 0.5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                self.world.count("kills: a client's process")
            return
        said, _ = process.communicate(timeout=300)
        self.world.count("large sequential runs")
        if process.returncode != 0 and not self.world.was_upset(began):
            raise Defect(f"bench: {said}")

    def hostile(self, rng):
        slot = rng.choice(self.world.slots)
        if not slot.accepting.is_set():
            return
        what = rng.choice((self.garbage, self.half_handshake, self.half_request, self.never_reading,
                           self.absurd, self.trickle))
        try:
            what(slot, rng)
        except (*LOST, rawnbd.ProtocolError):
            pass
        self.world.count("hostile clients")

    def raw(self, slot, rng):
        return rawnbd.Client(slot.address(rng.random() < 0.5), 10)

    def into_scratch(self, rng):
        return rawnbd.connect(None, self.scratch.name, timeout_s=10,
                              address=self.scratch.home.address(rng.random() < 0.5))

    def garbage(self, slot, rng):
        with self.raw(slot, rng) as c:
            if rng.random() < 0.5:
                c.handshake()
            c.send(rng.randbytes(rng.randrange(1, 100_000)))

    def half_handshake(self, slot, rng):
        with self.raw(slot, rng) as c:
            c.handshake()
            data = struct.pack(">QLL", rawnbd.IHAVEOPT, rng.choice((1, 2, 5, 6, 7, 8, 9, 10, 99)),
                               rng.choice((0, 8, 4096, 1 << 31)))
            c.send(data[:rng.randrange(len(data) + 1)])
            time.sleep(rng.random())

    def half_request(self, slot, rng):
        with self.into_scratch(rng) as c:
            data = c.header(rawnbd.CMD_WRITE, 0, MIB, cookie=1) + content(1, 0, MIB)
            c.send(data[:rng.randrange(len(data))])
            if rng.random() < 0.5:
                c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def never_reading(self, slot, rng):
        """Asks for much and takes nothing of it, for a while."""
        with self.into_scratch(rng) as c:
            c.sock.settimeout(1)
            c.sock.sendall(b"".join(c.header(rawnbd.CMD_READ, 0, 8 * MIB, cookie=n)
                                    for n in range(rng.randrange(1, 64))))
            self.world.over.wait(rng.uniform(0.5, 6))

    def absurd(self, slot, rng):
        with self.into_scratch(rng) as c:
            for _ in range(5):
                c.send(c.header(rng.randrange(12), rng.choice((0, 1 << 63, (1 << 64) - 1)),
                                rng.choice((0, 1, (1 << 32) - 1)), rng.randrange(1 << 16), 7))
            c.sock.settimeout(1)
            c.sock.recv(65536)

    def trickle(self, slot, rng):
        with self.raw(slot, rng) as c:
            data = struct.pack(">LQLL", 3, rawnbd.IHAVEOPT, rawnbd.OPT_LIST, 0)
            for byte in data[:rng.randrange(17)]:
                c.send(bytes([byte]))
                time.sleep(0.05)


def verify(world, name, kill_after_s=None, store=None, may_say=()):
    """No damage, ever. That it could not look, because servers were ended, is no damage."""
    done = world.command("--json", "verify", name, kill_after_s=kill_after_s, limit_s=300,
                         store=store, may_say=may_say)
    if done is None:
        return False
    told = json.loads(done.stdout)
    if told["wrong"] or told["findings"]:
        raise Defect(f"verify {name}: {done.stdout}")
    world.count("verify runs")
    world.count("verified bytes", told["bytes"])
    return True
