"""A run: starts the servers of each stage, gives each its turn in each round, and keeps what came.

What is compared is measured within seconds of each other and in another order each round, so that
what else goes on in the machine meets all alike. Between turns it waits until the server that had
its turn is idle again; what it did until then counts as its CPU time. A server that fails is left
out from there on, and the result says why.
"""

import contextlib
import platform
import shutil
import subprocess
import time
import zlib
from pathlib import Path

from . import clients, limits, results, servers, workloads
from .servers import Failed, REPO

# Free besides what the volumes take.
DISK_RESERVE = 2 << 30
# Of a volume, in the memory limit of a server that keeps it there.
MEMORY_SHARE_MAX = 0.8
WARM_UP_S = 0.3
# Longer turns warm up by themselves.
WARM_UP_BELOW_S = 10
SETTLE_LIMIT_S = 30
# For the estimate of how long a run takes.
TURN_OVERHEAD_S = 0.4
FILL_BYTES_PER_S = 500e6
BARE = "bare"


def say(text):
    print(text, flush=True)


class Run:
    def __init__(self, profile, folder, out, bare_sync, rounds=None, seconds=None, memory=None,
                 size=None):
        """`rounds`, `seconds`, `memory` and `size` take the place of what the profile, the
        workloads and the stages say."""
        self.profile, self.folder, self.out, self.bare_sync = profile, folder, out, bare_sync
        self.rounds, self.seconds, self.memory, self.size = rounds, seconds, memory, size
        self.result = results.new(profile.name, machine(folder), {})

    def go(self):
        servers.adopt_orphans()
        version, where = limits.find()
        self.result["memory_limit"] = f"cgroup v{version}" if version else f"none: {where}"
        if not version:
            say(f"no limits of memory: {where}")
        self.describe_servers()
        began = time.monotonic()
        for stage, chosen in workloads.stages_of(self.profile):
            if self.memory or self.size:
                stage = workloads.replace(stage, memory=self.memory or stage.memory,
                                          size=self.size or stage.size)
            say(f"--- {stage.name}: {stage.title[0].lower()}{stage.title[1:]}")
            stage_began = time.monotonic()
            self.stage(stage, chosen)
            say(f"--- {stage.name}: {time.monotonic() - stage_began:.0f} s")
            results.save(self.result, self.out)
        self.result["seconds"] = round(time.monotonic() - began)
        results.save(self.result, self.out)
        return self.result

    def describe_servers(self):
        for name in self.profile.who:
            kind = servers.ALL[name]
            why = kind.missing()
            if why:
                self.leave_out("all", name, why)
            elif kind.program not in self.result["versions"]:
                self.result["versions"][Path(kind.program).name] = kind.version()
        if shutil.which("fio"):
            done = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False)
            self.result["versions"]["fio"] = servers.first_version(done.stdout)
        self.result["versions"]["commit"] = commit()

    def leave_out(self, where, name, why):
        say(f"left out ({where}): {name}: {why}")
        self.result["left_out"].append({"where": where, "server": name, "why": why})

    # Stages ------------------------------------------------------------------

    def stage(self, stage, chosen):
        names = [n for n in stage.who if n in self.profile.who and not servers.ALL[n].missing()]
        for name in list(names):
            if not servers.ALL[name].spills and stage.size > stage.memory * MEMORY_SHARE_MAX:
                self.leave_out(stage.name, name, "its memory cannot hold the volume")
                names.remove(name)
        takes = [servers.ALL[n].disk_factor * stage.size for n in names]
        need = (max(takes, default=0) if stage.alone else sum(takes)) + DISK_RESERVE
        free = shutil.disk_usage(self.folder).free
        if need > free:
            self.leave_out(stage.name, "all", f"{need / 1e9:.0f} GB must be free in {self.folder}, "
                           f"{free / 1e9:.0f} are")
            return
        self.result["stages"][stage.name] = {
            "title": stage.title, "size": stage.size, "memory": stage.memory,
            "cache_size": stage.cache_size, "transport": stage.transport, "peak_mb": {}}
        if stage.alone:
            for number in range(self.rounds_of(chosen[0])):
                for name in turned(names, number):
                    with self.started(stage, [name]) as up:
                        for workload in chosen:
                            self.round(workload, up, number)
            return
        with self.started(stage, names) as up:
            for workload in chosen:
                self.warm_up(workload, up)
                for number in range(self.rounds_of(workload)):
                    self.round(workload, up, number)
                results.save(self.result, self.out)

    @contextlib.contextmanager
    def started(self, stage, names):
        """The servers, their volumes filled, by name; in the end all are gone and their files."""
        up, all_limits = {}, []
        try:
            for name in names:
                limit = limits.Limit(stage.memory)
                all_limits.append(limit)
                server = servers.ALL[name](self.folder / f"{stage.name}-{name}", stage, limit)
                up[name] = server
                with self.or_without(stage.name, up, name):
                    server.start()
                    clients.fill(server.uri(), stage.size)
                    server.settle(True, SETTLE_LIMIT_S)
                    if stage.read_once:
                        clients.read_once(server.uri(), stage.size)
            yield up
            for name, server in up.items():
                peak = server.limit.peak_bytes()
                if peak:
                    self.result["stages"][stage.name]["peak_mb"][name] = round(peak / 1e6)
        finally:
            for server in up.values():
                server.stop()
            for limit in all_limits:
                limit.end()

    @contextlib.contextmanager
    def or_without(self, where, up, name):
        """Goes on without a server that fails."""
        try:
            yield
        except (Failed, OSError, subprocess.SubprocessError) as e:
            server = up.pop(name, None)
            why = str(e)
            if server:
                if server.pid is not None and not server.alive():
                    why += f" (the server ended: {server.log_tail()[-300:]})"
                server.stop()
            self.leave_out(where, name, why)

    # Turns -------------------------------------------------------------------

    def rounds_of(self, workload):
        if self.rounds:
            return self.rounds
        long = workload.name in workloads.SUSTAINED
        return self.profile.sustained_rounds if long else self.profile.rounds

    def seconds_of(self, workload):
        return self.seconds or min(workload.seconds, self.profile.seconds_max)

    def warm_up(self, workload, up):
        if self.seconds_of(workload) >= WARM_UP_BELOW_S:
            return
        for name in list(up):
            with self.or_without(workload.name, up, name):
                self.turn(workload, up[name], WARM_UP_S, -1)

    def round(self, workload, up, number):
        told = []
        names = turned(list(up), number)
        for name in names:
            with self.or_without(workload.name, up, name):
                got = self.turn(workload, up[name], self.seconds_of(workload), number)
                results.add(self.result, workload.name, name, got)
                self.result["turn_s"][workload.name] = self.seconds_of(workload)
                told.append(f"{name} {rate(workload, got)} ({got['cpu_us']:.1f} us)")
        if workload.bare:
            got = clients.by_bare_loop(self.bare_sync, self.folder / "bare",
                                       self.seconds_of(workload))
            results.add(self.result, workload.name, BARE, got)
            told.append(f"bare loop {rate(workload, got)}")
        say(f"{workload.name} {number + 1}: " + ", ".join(told))

    def turn(self, workload, server, seconds, number):
        server.check_alive()
        # The same places for all servers, and others each time, which nobody has cached for that
        # reason.
        seed = zlib.crc32(f"{workload.name} {number}".encode())
        before = server.cpu_s()
        if workload.client == "fio":
            got = clients.by_fio(server.uri(), workload, seconds, seed, server.size, self.folder)
        else:
            got = clients.by_bench(server.uri(), workload, seconds, seed)
        server.settle(workload.writes, SETTLE_LIMIT_S)
        got["cpu_us"] = (server.cpu_s() - before) * 1e6 / max(got["requests"], 1)
        return got


def turned(names, number):
    at = number % len(names) if names else 0
    return names[at:] + names[:at]


def rate(workload, got):
    if workload.unit == "iops":
        return f"{got['iops'] / 1e3:.1f}k/s"
    return f"{got['mb_per_s']:.0f} MB/s"


def commit():
    done = subprocess.run(["git", "-C", str(REPO), "describe", "--always", "--dirty",
                           "--exclude", "*"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine(folder):
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines()
                if ":" in line)
    names = {k.strip(): v.strip() for k, v in info.items()}
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    kind = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", str(folder)], capture_output=True,
                          text=True, check=False).stdout.strip()
    return {"cpu": names.get("model name", platform.machine()),
            "cores": len(servers.os.sched_getaffinity(0)), "memory_gb": round(memory_kb / 1e6),
            "kernel": platform.release(), "file_system": kind or "unknown"}


def expected_s(profile, rounds=None, seconds=None):
    """About how long a run takes; without the part on FoundationDB."""
    total = 0
    for stage, chosen in workloads.stages_of(profile):
        who = len([n for n in stage.who if n in profile.who])
        fills = (rounds or profile.sustained_rounds) if stage.alone else 1
        total += who * fills * (2 + stage.size / FILL_BYTES_PER_S)
        for w in chosen:
            n = rounds or (profile.sustained_rounds if w.name in workloads.SUSTAINED
                           else profile.rounds)
            turn_s = seconds or min(w.seconds, profile.seconds_max)
            warm_up_s = WARM_UP_S + TURN_OVERHEAD_S if turn_s < WARM_UP_BELOW_S else 0
            total += who * (n * (turn_s + TURN_OVERHEAD_S) + warm_up_s)
            if w.writes:
                total += (n + 1) * sum(servers.ALL[name].defers_s for name in stage.who
                                       if name in profile.who)
    return total
