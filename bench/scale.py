#!/usr/bin/python3
"""What grows with the number of volumes, of snapshots and of bytes: what docs/scaling.md shows.

  scale.py volumes COUNT...      a store with so many volumes: the time of list and info, and of a
                                 server's start; then 200 of the volumes in use: memory of each, CPU
                                 while nobody does anything
  scale.py gateways COUNT...     FoundationDB: so many idle gateways on one volume's store; commits
                                 of all of them in a second, the cluster's CPU
  scale.py bytes                 embedded store: what the index takes for 1 GiB of random data

--engine fdb or lmdb; --folder: where the store's or the cluster's files are. Each COUNT has a new
store. The cluster is one process.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from harness import rawnbd  # noqa: E402
from harness.cluster import Cluster  # noqa: E402
from harness.server import Server, cli  # noqa: E402

IN_USE = 200
IDLE_S = 5
MIB, GIB = 1 << 20, 1 << 30
CREATED_AT_ONCE = 1000


def cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_kib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])


def took_ms(do, rounds=5):
    times = []
    for _ in range(rounds):
        began = time.monotonic()
        do()
        times.append(1000 * (time.monotonic() - began))
    return statistics.median(times)


class Place:
    """Stores on one engine."""

    def __init__(self, engine, folder):
        self.folder = Path(tempfile.mkdtemp(prefix="fdbnbd-scale-", dir=folder))
        if engine == "fdb":
            tempfile.tempdir = str(folder) if folder else None
        self.cluster = Cluster().start() if engine == "fdb" else None
        self.made = 0

    def server(self, store=None, args=(), volumes=None):
        self.made += 1
        store = store or (self.cluster.store() if self.cluster else
                          f"lmdb:{self.folder}/store{self.made}")
        return Server(self.folder / f"n{self.made}", volumes, args, store=store, tcp=False,
                      env=self.cluster.client_env() if self.cluster else {})

    def end(self):
        if self.cluster:
            self.cluster.end()
        shutil.rmtree(self.folder, ignore_errors=True)


def volumes(place, count):
    names = [f"v{n:06}" for n in range(count)]
    server, began = place.server(), time.monotonic()
    for at in range(0, count, CREATED_AT_ONCE):
        server.volumes = {n: "1G" for n in names[at:at + CREATED_AT_ONCE]}
        server.start()
        server.stop()
    made_s = time.monotonic() - began
    server.volumes = {}
    began = time.monotonic()
    server.start()
    start_ms = 1000 * (time.monotonic() - began)
    go = lambda *words: cli(server.store, *words, env=server.env)  # noqa: E731
    list_ms = took_ms(lambda: go("list"))
    info_ms = took_ms(lambda: go("info", names[count // 2]))
    before_kib = resident_kib(server.pid)
    clients, used = [], min(IN_USE, count)
    open_ms = []
    for n in range(used):
        began = time.monotonic()
        clients.append(rawnbd.connect(server, names[n * count // used]))
        clients[-1].read(0, 4096)
        open_ms.append(1000 * (time.monotonic() - began))
    after_kib = resident_kib(server.pid)
    time.sleep(1)
    cpu = cpu_s(server.pid)
    time.sleep(IDLE_S)
    cpu = cpu_s(server.pid) - cpu
    for c in clients:
        c.close()
    server.stop()
    print(f"| {count:,} | {1000 * made_s / count:.1f} | {list_ms:.0f} | {info_ms:.0f} | {start_ms:.0f} "
          f"| {statistics.median(open_ms):.1f} | {(after_kib - before_kib) / used:.0f} "
          f"| {100 * cpu / IDLE_S:.2f} |", flush=True)


def gateways(place, count):
    first = place.server(volumes={"v": "1G"}).start()
    others = [place.server(store=first.store).start() for _ in range(count - 1)]
    commits = lambda: place.cluster.status()["cluster"]["workload"]["transactions"]["committed"]  # noqa: E731
    pid = place.cluster.processes[0].pid
    time.sleep(2)
    before, cpu, began = commits()["counter"], cpu_s(pid), time.monotonic()
    time.sleep(3 * IDLE_S)
    after, took = commits()["counter"], time.monotonic() - began
    print(f"| {count} | {(after - before) / took:.1f} | {100 * (cpu_s(pid) - cpu) / took:.1f} |", flush=True)
    for server in [first, *others]:
        server.stop()


def stored_bytes(place):
    rng = random.Random(1)
    for block in ("4K", "16K", "64K"):
        server = place.server()
        cli(server.store, "create", "v", GIB, "--block-size", block, "--compression", "none")
        server.start()
        with rawnbd.connect(server, "v") as c:
            for at in range(0, GIB, MIB):
                c.write(at, rng.randbytes(MIB))
            c.flush()
        server.stop()
        # A copy has no pages that are free or half empty.
        copy = place.folder / f"copy{block}"
        cli(server.store, "store", "backup", copy)
        index = (copy / "data.mdb").stat().st_blocks * 512
        whole = (Path(server.store.split(":", 1)[1]) / "data.mdb").stat().st_blocks * 512
        print(f"| {block} | {index / MIB:.1f} | {100 * index / GIB:.2f}% | {whole / MIB:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["volumes", "gateways", "bytes"])
    parser.add_argument("counts", type=int, nargs="*")
    parser.add_argument("--engine", choices=["lmdb", "fdb"], default="lmdb")
    parser.add_argument("--folder")
    args = parser.parse_args()
    place = Place("fdb" if args.what == "gateways" else args.engine, args.folder)
    try:
        if args.what == "bytes":
            stored_bytes(place)
        for count in args.counts:
            (volumes if args.what == "volumes" else gateways)(place, count)
    finally:
        place.end()


main()
