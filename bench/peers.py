#!/usr/bin/python3
"""fdb-nbd beside other NBD servers: nbdkit, qemu-nbd and nbd-server, on the same disk, with the
same client, the same limit of memory and, where something is written, the same durability.

  peers.py run PROFILE|WORKLOAD...   measures (full, quick, sustained, or workloads by name)
  peers.py show FILE                 prints the tables of a result
  peers.py report FILE               puts them into docs/benchmarks.md, and charts beside it
  peers.py list                      names the profiles and workloads

`make bench` runs it; at the end of a full run it keeps the result in bench/results/ and reports it.
How what is measured is kept comparable is said in compare/turns.py, what counts as a peer in
compare/results.py. Build first: ninja -C build fdb-nbd tests/bare_sync.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(REPO / "tests"))

from compare import charts, clients, report, results, turns, workloads  # noqa: E402
from harness import cluster  # noqa: E402

DOCUMENT = REPO / "docs" / "benchmarks.md"
CHARTS = REPO / "docs" / "benchmarks"
KEPT = HERE / "results" / "peers.json"
FDB_WORDS = ["compare", "--rounds", "2", "--warm", "60", "--inflight", "2,4,8"]
FDB_LIMIT_S = 1800


def size_of(text):
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


def with_fdb(result, out):
    """The comparison on FoundationDB, by its own program (fdb.py)."""
    why = cluster.why_missing()
    if why:
        turns.say(f"left out: the comparison on FoundationDB: {why}")
        result["left_out"].append({"where": "FoundationDB", "server": "all", "why": why})
    else:
        turns.say("--- on FoundationDB")
        words = [sys.executable, HERE / "fdb.py", *FDB_WORDS]
        if os.access("/dev/shm", os.W_OK):
            # The programs are compared, not their disks.
            words += ["--folder", "/dev/shm"]
        done = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, text=True,
                              timeout=FDB_LIMIT_S, check=False)
        print(done.stdout, flush=True)
        if done.returncode:
            result["left_out"].append({"where": "FoundationDB", "server": "all",
                                       "why": f"fdb.py ended with {done.returncode}"})
        else:
            result["fdb"] = [line for line in done.stdout.splitlines() if line.startswith("|")]
    results.save(result, out)


def run(options):
    try:
        profile = workloads.profile_of(options.what)
    except ValueError as e:
        sys.exit(f"peers.py: {e}")
    if options.servers:
        who = tuple(options.servers.split(","))
        if unknown := [n for n in who if n not in workloads.EVERYBODY]:
            sys.exit(f"peers.py: no server {' '.join(unknown)}; there are "
                     + ", ".join(workloads.EVERYBODY))
        profile = workloads.replace(profile, who=who)
    bare_sync = Path(os.environ.get("BUILD", REPO / "build")) / "tests" / "bare_sync"
    needed = [bare_sync] if any(workloads.WORKLOADS[w].bare for w in profile.workloads) else []
    for program in [*needed, Path(clients.FdbNbd.program)]:
        if not program.exists():
            sys.exit(f"peers.py: {program} is not built")
    out = Path(options.out or REPO / "build" / "bench" / f"{profile.name}.json")
    # Ended from outside, it cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))
    minutes = turns.expected_s(profile, options.rounds, options.seconds) / 60
    turns.say(f"{profile.name}: about {minutes:.0f} minutes; results in {out}")
    # Not /tmp, which may be in memory.
    with tempfile.TemporaryDirectory(prefix="fdb-nbd-bench-", dir=options.folder) as folder:
        result = turns.Run(profile, Path(folder), out, bare_sync, options.rounds, options.seconds,
                           options.memory, options.size).go()
    if profile.name == "full" and not options.no_fdb:
        with_fdb(result, out)
    print("\n" + report.text(result))
    if profile.name == "full" and not options.out:
        results.save(result, KEPT)
        write_report(result)
    # A peer that is not there is no failure; one of ours that was left out is.
    return 1 if any(o["server"] in turns.servers.OURS for o in result["left_out"]) else 0


def write_report(result):
    drawn = [(title, path.relative_to(DOCUMENT.parent))
             for title, path in charts.draw(result, CHARTS)]
    DOCUMENT.write_text(report.between_marks(DOCUMENT.read_text(), report.text(result, drawn)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run")
    p.add_argument("what", nargs="+", help="a profile, or workloads by their names")
    p.add_argument("--folder", default="/var/tmp", help="on the disk to use (%(default)s)")
    p.add_argument("--out", help="where the result goes (build/bench/PROFILE.json)")
    p.add_argument("--servers", help="only these, with commas between them")
    p.add_argument("--rounds", type=int, help="instead of what the profile says")
    p.add_argument("--seconds", type=float, help="of each turn, instead of what is said for it")
    p.add_argument("--memory", type=size_of, help="of each server, instead of the stage's")
    p.add_argument("--size", type=size_of, help="of each volume, instead of the stage's")
    p.add_argument("--no-fdb", action="store_true", help="leave the one on FoundationDB out")
    for name in ("show", "report"):
        p = commands.add_parser(name)
        p.add_argument("file")
    commands.add_parser("list")
    options = parser.parse_args()
    if options.command == "run":
        return run(options)
    if options.command == "list":
        for profile in workloads.PROFILES.values():
            print(f"{profile.name:20} about {turns.expected_s(profile) / 60:.0f} minutes")
        for w in workloads.WORKLOADS.values():
            print(f"{w.name:20} {w.title}")
        return 0
    result = results.load(options.file)
    if options.command == "show":
        print(report.text(result))
        return 0
    write_report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
