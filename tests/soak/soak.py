#!/usr/bin/python3
"""A soak: servers under mixed load for an hour, with clients, servers, commands and parts of the
store killed at random, and everything verified all the time.

Two servers share one store. Server A is killed (SIGKILL, also while it recovers; SIGTERM;
SIGSTOP for longer than its lease), replaced, drained; server B lives on, so that its memory and
descriptors can be seen over its age, until the last part of the run, when it is killed as well.
volume.py is the load and its judge, chores.py the commands, what else clients do, and what
nobody should do.

Ends with 0 when nothing is wrong. The table at the end tells what was done. SEED replays the
choices, not the timing. SIGUSR1 has it tell where it stands. KEEP=1 leaves the folder; it is left
as well when something is wrong.
"""

import argparse
import faulthandler
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tls")]

from harness import cluster, http, stores  # noqa: E402
from harness.fixtures import new_folder  # noqa: E402
from harness.waiting import SLOW, wait_until  # noqa: E402

import pki  # noqa: E402
from chores import Chores, verify  # noqa: E402
from volume import MIB, Volume  # noqa: E402
from world import (CACHE_MIB, GROWTH_AGE_S, GROWTH_LIMIT_KIB, LEASE_MS,  # noqa: E402
                   MEMORY_LIMIT_KIB, MORE_LIMIT, OWNER_WAIT_S, Defect, Slot, World)

# What the threads that read for the embedded store keep open; there may be 16 of them.
READERS_FDS = 48
# Until then server B is spared.
SPARED_SHARE = 0.7
SPAN = 12 * MIB + 512
FAR = (700 << 30) + 12288 + 512


class Chaos:
    """What happens to servers, one thing after the other. In the main thread, whose end is that of
    the servers it started (prctl(2), PR_SET_PDEATHSIG)."""

    def __init__(self, world, parts):
        self.world, self.parts = world, parts      # parts: processes of a cluster
        self.rng = world.rng("chaos")

    def run(self, until_s, spared):
        w = self.world
        gap_s = min(14, max(1.5, w.seconds / 120))
        while w.age_s() < until_s and not w.over.wait(self.rng.expovariate(1 / gap_s)):
            kinds = [(self.killed, 20), (self.killed_in_recovery, 5), (self.stopped, 9),
                     (self.paused, 5), (self.terminated, 8), (self.replaced, 10),
                     (self.drained, 6)]
            if spared is None:
                kinds.append((self.all_killed, 6))
            if self.parts:
                kinds += [(self.part_killed, 14), (self.part_paused, 6)]
            what = self.rng.choices([k for k, _ in kinds], [n for _, n in kinds])[0]
            slot = self.rng.choice([s for s in w.slots if s is not spared])
            began = time.monotonic()
            with w.upset():
                what(slot)
            w.say(f"{what.__name__} {slot.name}: {time.monotonic() - began:.1f} s; "
                  f"{w.counts['requests']} requests, pause {1000 * w.pause_s:.0f} ms")

    def at(self, slot):
        return [v for v in self.world.volumes if v.home is slot]

    def other(self, slot):
        return next(s for s in self.world.slots if s is not slot)

    def move(self, slot, how):
        """Clients of a server that is away go to the other one."""
        for v in self.at(slot):
            v.home = self.other(slot)
            self.world.count(how)

    def end_rounds(self, volumes):
        """So that each kill is followed by full checks; of some only later, after more of them."""
        for v in volumes:
            if self.rng.random() < 0.8:
                v.end_round()

    def gone(self, slot, volumes):
        """A server was ended: who had it waits for it or goes to the other one."""
        if self.rng.random() < 0.5 and self.other(slot).accepting.is_set():
            self.move(slot, "takeovers: of a volume whose server was ended")
            self.end_rounds(volumes)
            self.world.over.wait(self.rng.uniform(0, 3))
        else:
            self.end_rounds(volumes)

    def killed(self, slot):
        self.ended(slot, slot.server.kill, "kills: a server, SIGKILL")

    def ended(self, slot, end, what):
        slot.accepting.clear()
        volumes = self.at(slot)
        end()
        self.world.count(what)
        self.gone(slot, volumes)
        slot.start()

    def killed_in_recovery(self, slot):
        slot.accepting.clear()
        volumes = self.at(slot)
        slot.server.kill()
        for _ in range(self.rng.randrange(1, 4)):
            slot.server.start(wait=False)
            # Not a wait for anything: the moment of death, somewhere in its start.
            time.sleep(self.rng.random() * 0.12)
            slot.server.kill()
            self.world.count("kills: a server, SIGKILL in its start")
        self.gone(slot, volumes)
        slot.start()

    def all_killed(self, _):
        volumes = list(self.world.volumes)
        for slot in self.world.slots:
            slot.accepting.clear()
            slot.server.process.kill()
        for slot in self.world.slots:
            slot.server.kill()
            self.world.count("kills: a server, SIGKILL, with all others")
        self.end_rounds(volumes)
        for slot in self.world.slots:
            slot.start()

    def terminated(self, slot):
        self.ended(slot, slot.server.stop, "servers ended by SIGTERM")

    def stopped(self, slot):
        """Longer than its lease; its clients go to the other server, which takes their volumes."""
        slot.accepting.clear()
        volumes = self.at(slot)
        os.kill(slot.server.pid, signal.SIGSTOP)
        self.world.count("servers stopped for longer than their lease")
        self.move(slot, "takeovers: of a volume whose server stood still")
        for v in volumes:
            v.cut()
        self.end_rounds(volumes)
        time.sleep(LEASE_MS / 1000 * self.rng.uniform(1.3, 2.5))
        os.kill(slot.server.pid, signal.SIGCONT)
        if self.ended_by_others(slot):
            # Where a lock may be held by who stands still, that one is ended.
            slot.server.kill()
            self.world.count("servers ended by another one, having stood still")
            slot.start()
        else:
            slot.server.check_alive()
            slot.accepting.set()

    @staticmethod
    def ended_by_others(slot):
        try:
            slot.server.process.wait(0.5)
            return True
        except subprocess.TimeoutExpired:
            return False

    def paused(self, slot):
        """Shorter than its lease: everybody waits."""
        os.kill(slot.server.pid, signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.1, LEASE_MS / 2500))
        os.kill(slot.server.pid, signal.SIGCONT)
        self.world.count("servers stopped for less than their lease")

    def replaced(self, slot):
        slot.server.upgrade()
        slot.note_process()
        self.world.count("servers replaced (serve --replace)")

    def drained(self, slot):
        control = http.control(slot.server.pid)
        slot.accepting.clear()
        self.world.command("drain", "--wait", "--control", control)
        self.move(slot, "hand-overs: of a volume whose server was drained")
        self.world.count("servers drained")
        slot.server.stop()
        slot.start()

    def part_killed(self, _):
        """A process of the cluster, which keeps everything twice."""
        part = self.rng.choice(self.parts)
        part.kill()
        self.world.count("kills: a process of the cluster")
        self.world.over.wait(self.rng.uniform(0.5, 6))
        part.start()
        part.cluster.wait_whole(180 * SLOW)

    def part_paused(self, _):
        part = self.rng.choice(self.parts)
        part.pause()
        self.world.over.wait(self.rng.uniform(0.5, 5))
        part.resume()
        self.world.count("processes of the cluster that stood still")
        part.cluster.wait_whole(180 * SLOW)


class Soak:
    def __init__(self, seconds, seed, load, samples):
        self.world = World(new_folder(), seed, seconds, load)
        self.samples = samples
        self.cluster = None
        self.idle_fds = None

    def run(self):
        w = self.world
        w.say(f"seed {w.seed}, {w.seconds} s on {stores.engine()}, {w.load:g} of a processor, "
              f"in {w.folder}")
        try:
            self.begin()
            chores = Chores(w, w.volumes, self.scratch)
            clone, rng = w.volumes[-1], w.rng("clone")
            while not clone.origin:
                chores.clone(clone, rng)
            threads = self.begin_load(chores)
            chaos = Chaos(w, self.cluster.processes if self.cluster else ())
            a, b = w.slots
            chaos.run(SPARED_SHARE * w.seconds, spared=b)
            chaos.run(w.seconds, spared=None)
            w.over.set()
            for t in threads:
                t.join()
            if not w.failed.is_set():
                self.end(chores)
        except Exception as e:
            w.fail_with(e)
        finally:
            took_s = w.age_s()
            self.tell(took_s)
            for slot in w.slots:
                slot.server.kill()
            if self.cluster:
                self.cluster.end()
            if w.problems:
                w.say(f"kept: {w.folder}")
            elif os.environ.get("KEEP"):
                w.say(f"kept: {w.folder}")
            else:
                shutil.rmtree(w.folder, ignore_errors=True)
        return 1 if w.problems else 0

    # -- the beginning ---------------------------------------------------------------------

    def begin(self):
        w = self.world
        if stores.on_fdb():
            self.cluster = cluster.Cluster(3).start()
            stores.use_cluster(self.cluster)
            self.cluster.wait_whole()
        (w.folder / "pki").mkdir()
        certificates = pki.Pki(w.folder / "pki")
        (w.folder / "access").write_text("any rw *\n")
        store = w.folder / "store"
        for name, threads in (("A", 2), ("B", 3)):
            w.slots.append(Slot(w, name, store, [
                "--create-store", "--threads", threads, "--cache-size", f"{CACHE_MIB}M",
                "--lease-ms", LEASE_MS, "--owner-wait", OWNER_WAIT_S, "--tls", "on",
                "--tls-certificates", certificates.server, "--tls-verify-peer",
                "--access", w.folder / "access", "--slow-ms", 0]))
        for slot in w.slots:
            slot.start()
        self.idle_fds = max(slot.instances[-1].samples[-1][3] for slot in w.slots)
        context = pki.context(certificates.alice)
        numbers = itertools.count(1)

        def volume(name, span, words, base=0, size=None):
            v = Volume(w, name, span, numbers, context, base)
            v.home = w.slots[len(w.volumes) % 2]
            if size is not None:
                w.command("create", name, size, *words)
                v.exists = True
            v.name_number = 1
            return v
        w.volumes.append(volume("a", SPAN, ("--block-size", "16K", "--compression", "lz4"),
                                size=SPAN))
        w.volumes.append(volume("b", SPAN, ("--block-size", "4K", "--compression", "zstd"),
                                size=SPAN))
        w.volumes.append(volume("d", 8 * MIB, ("--block-size", "64K", "--compression", "none"),
                                size=8 * MIB))
        w.volumes.append(volume("e", 8 * MIB, ("--block-size", "8K"), FAR, "1T"))
        self.scratch = volume("scratch", MIB, ("--block-size", "32K"), size="2G")
        # Now and then it moves, as the others.
        self.scratch.home = w.slots[1]
        w.volumes[0].create_snapshot()
        w.volumes.append(volume("c0", SPAN, ()))
        w.volumes[0].between.release()

    def begin_load(self, chores):
        w = self.world
        # The source of the first clone was held open for it.
        w.volumes[0].between.acquire()
        threads = [w.thread(f"volume {v.name}", v.run, chores.between_rounds) for v in w.volumes]
        threads.append(w.thread("watch", w.watch))
        rate = min(1, max(0.2, w.seconds / 300))
        for mean_s, name, run in ((1.2, "under load", chores.under_load),
                                  (4, "observed", chores.observed),
                                  (9, "hung up", chores.hung_up),
                                  (10, "bench", chores.bench),
                                  (2.5, "hostile", chores.hostile)):
            threads.append(chores.every(mean_s * rate, name, run))
        if not stores.on_fdb():
            threads.append(chores.every(60 * rate, "backed up", chores.backed_up))
        return threads

    # -- the end ---------------------------------------------------------------------------

    def end(self, chores):
        w = self.world
        w.say("the load is over: the last looks")
        self.stays(w.slots)
        # A clone may just have been removed, and none come in its place.
        w.volumes = [v for v in w.volumes if v.exists]
        for v in w.volumes:
            wait_until(v.sweep, 60 * SLOW, f"a look at the snapshots of {v.name}")
            if not verify(w, v.name):
                raise Defect(f"verify {v.name} gave nothing")
        verify(w, self.scratch.name)
        w.sample()
        for slot in w.slots:
            slot.server.stop()
        fresh = Slot(w, "fresh", w.slots[0].server.store,
                     ["--tls", "off", "--threads", 2, "--cache-size", f"{CACHE_MIB}M"])
        fresh.server.store_env = w.slots[0].server.store_env
        fresh.start()
        old, w.slots = w.slots, [fresh]
        for v in w.volumes:
            v.home = fresh
            v.judge()
            for name in v.snapshots:
                v.check_snapshot(name)
        self.only_named_keys(chores)
        fresh.server.stop()
        w.slots = old
        self.leftovers(old + [fresh])

    def stays(self, slots):
        """An idle server has no more open than a new one, but what it needs for volumes it had."""
        for slot in slots:
            one = slot.instances[-1]
            wait_until(lambda: one.sample() and one.samples[-1][3] <= self.idle_fds + READERS_FDS,
                       30 * SLOW, f"server {one.name} closes what its clients had open: "
                       f"{self.idle_fds} descriptors")

    def only_named_keys(self, chores):
        """With everything removed nothing is left but what a new store has."""
        w = self.world
        clones = [v for v in w.volumes if v.origin]
        for v in clones + [v for v in w.volumes if not v.origin] + [self.scratch]:
            chores.remove_volume(v.name)
        left = chores.names()
        if left:
            raise Defect(f"volumes that nobody made: {left}")

        def look():
            return [k for k in self.keys() if k not in ("m", "c", "s", "x")]
        try:
            wait_until(lambda: not look(), 60 * SLOW, "keys of removed volumes are cleared", 0.3)
        except AssertionError:
            kinds = look()
            raise Defect(f"{len(kinds)} keys are left that nothing names: "
                         f"{ {k: kinds.count(k) for k in set(kinds)} }") from None
        info = json.loads(w.command("--json", "store", "info").stdout)
        w.say(f"the empty store: {info['bytes_used']} bytes used")
        w.counts["bytes used by the store in the end"] = info["bytes_used"] or 0

    def keys(self):
        """The kind (first letter) of each key in the store."""
        w = self.world
        store = w.slots[0].server.store
        if self.cluster:
            return [key[0] for key, _ in self.cluster.rows(self.cluster.prefix_in(store))]
        done = subprocess.run(["mdb_dump", "-s", "keys", store.split(":", 1)[1]],
                              capture_output=True, text=True)
        if done.returncode != 0:
            raise Defect(f"mdb_dump: {done.stderr}")
        lines = [line.strip() for line in done.stdout.split("HEADER=END")[1].splitlines()
                 if line.startswith(" ")]
        return [chr(bytes.fromhex(key)[1]) for key in lines[::2]]

    def leftovers(self, slots):
        w = self.world
        found = []
        folder = w.slots[0].server.store_folder
        if folder:
            found += [str(p) for name in ("session", "log") for p in (folder / name).iterdir()
                      if p.name != "spare"]
            known = {"data.mdb", "blocks", "log", "session", "lock.mdb", "processes", "reserve",
                     "bell"}
            found += [str(p) for p in folder.iterdir() if p.name not in known]
        found += [str(p) for p in (w.folder / "files").iterdir()]
        for slot in slots:
            for one in slot.instances:
                if Path(http.control(one.pid)).exists() and not Path(f"/proc/{one.pid}").exists():
                    found.append(http.control(one.pid))
        if found:
            raise Defect(f"left behind: {found}")

    # -- the report ------------------------------------------------------------------------

    def tell(self, took_s):
        w = self.world
        instances = [one for slot in w.slots for one in slot.instances if one.samples]
        oldest = max(instances, key=lambda one: one.age_s, default=None)
        for one in instances:
            most = max(s[1] for s in one.samples)
            if most > MEMORY_LIMIT_KIB:
                w.fail(f"server {one.name} had {most} KiB, and its limit is {MEMORY_LIMIT_KIB}")
        if oldest and not w.problems:
            grown = oldest.growth_kib()
            if oldest.age_s >= GROWTH_AGE_S and grown > GROWTH_LIMIT_KIB:
                w.fail(f"server {oldest.name} has grown by {grown:.0f} KiB; the limit is "
                       f"{GROWTH_LIMIT_KIB}")
            for what, column in (("descriptors", 3), ("threads", 4)):
                more = oldest.more_than_before(column)
                if oldest.age_s >= GROWTH_AGE_S and more > MORE_LIMIT:
                    w.fail(f"server {oldest.name} has {more} more {what} than before")
        print(f"\n| soak of {took_s:.0f} s on {stores.engine()}, seed {w.seed} | |\n|---|---|")
        for what in sorted(w.counts):
            n = w.counts[what]
            shown = f"{n / 1e9:.2f} GB" if "bytes" in what and n > 10**8 else f"{n:,}"
            print(f"| {what} | {shown} |")
        used = w.used_cores
        print(f"| processors used, on the average | {sum(used) / max(1, len(used)):.2f} |")
        if w.store_mib:
            third = w.store_mib[len(w.store_mib) // 3]
            print(f"| the store's files, MiB: after a third, last, maximum | {third}, "
                  f"{w.store_mib[-1]}, {max(w.store_mib)} |")
        print(f"| server processes | {len(instances)} |")
        print(f"| problems | {len(w.problems)} |")
        if oldest:
            self.tell_memory(oldest, instances)
        sys.stdout.flush()
        if self.samples:
            lines = ["server,age_s,anonymous_kib,pss_kib,descriptors,threads"]
            lines += [f"{one.name},{age:.1f},{','.join(map(str, rest))}"
                      for one in instances for age, *rest in one.samples]
            Path(self.samples).write_text("\n".join(lines) + "\n")

    @staticmethod
    def tell_memory(oldest, instances):
        warm = oldest.warm()
        print(f"\n| server {oldest.name}, {oldest.age_s:.0f} s old | at first | after "
              f"{warm[0][0]:.0f} s | last | maximum |\n|---|---|---|---|---|")
        for title, i in (("anonymous memory, KiB", 1), ("PSS, KiB", 2), ("descriptors", 3),
                         ("threads", 4)):
            column = [s[i] for s in oldest.samples]
            print(f"| {title} | {column[0]} | {warm[0][i]} | {column[-1]} | {max(column)} |")
        grown, hours = oldest.growth_kib(), (warm[-1][0] - warm[0][0]) / 3600
        print(f"\nGrowth of its anonymous memory from {warm[0][0]:.0f} s on: {grown:.0f} KiB, "
              f"{grown / max(hours, 1e-9):.0f} an hour "
              f"(an age of {GROWTH_AGE_S} s or more fails above {GROWTH_LIMIT_KIB} KiB).")
        print(f"In the second half of that time it had {oldest.more_than_before(3):+g} descriptors "
              f"and {oldest.more_than_before(4):+g} threads, at the median.")
        print("\n| age of a server, s | servers | anonymous memory, KiB: median | most |\n"
              "|---|---|---|---|")
        edges = [0, 10, 30, 60, 120, 300, 600, 1200, 2400, 3600, 10**9]
        for low, high in zip(edges, edges[1:]):
            values = [(s[1], one) for one in instances for s in one.samples if low <= s[0] < high]
            if values:
                sizes = sorted(v for v, _ in values)
                servers = len({one for _, one in values})
                print(f"| {low} to {high if high < 10**9 else '...'} | {servers} | "
                      f"{sizes[len(sizes) // 2]} | {sizes[-1]} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SOAK_S") or 3600))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED") or
                                                        random.SystemRandom().randrange(1 << 32)))
    parser.add_argument("--store", choices=stores.ENGINES, default=stores.engine())
    parser.add_argument("--load", type=float, default=float(os.environ.get("SOAK_LOAD") or 0.5),
                        help="processors that driver and servers together may use")
    parser.add_argument("--samples", help="a file for what was sampled of each server, as CSV")
    args = parser.parse_args()
    stores.choose(args.store)
    # Where all its threads are, should it stand still.
    faulthandler.register(signal.SIGUSR1)
    if stores.on_fdb() and cluster.why_missing():
        print(cluster.why_missing(), file=sys.stderr)
        return 1
    return Soak(args.seconds, args.seed, args.load, args.samples).run()


if __name__ == "__main__":
    sys.exit(main())
