#!/usr/bin/python3
"""Builds and runs the fuzzers (libFuzzer; docs/fuzzing.md is the manual).

  run.py run [TARGET...]       each for FUZZ_S seconds, two at once (FUZZ_JOBS)
  run.py merge [TARGET...]     keeps what is worth keeping of build-fuzz/corpus in tests/fuzz/corpus
  run.py coverage [TARGET...]  lines of the sources a target is for that its inputs reach

A target is tests/fuzz/NAME.c; a line "Code:" in its opening comment names those sources. Inputs that
were found go to build-fuzz/corpus/NAME and are used the next time; an input that fails is kept below
build-fuzz/crashes/NAME. Without TARGET: all of them, or those in the variable TARGET.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build-fuzz"
COVERAGE = ROOT / "build-fuzz-coverage"

INPUT_BYTES_MAX = 65536
# One that takes longer is a defect: they take 2 s at most, of a machine that does nothing else.
INPUT_S = 60
MEMORY_MB = 512
# What a run may take beyond its seconds: for the inputs there are, and a last one.
GRACE_S = 300
CORPUS_BYTES_MAX = 100_000  # of one target, in the repository

ENV = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:quarantine_size_mb=16",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def targets():
    return sorted(path.stem for path in HERE.glob("*.c") if sources(path.stem))


def sources(target):
    """The files a target is for."""
    found = re.search(r"^ \* Code:((?: \S+|\n \*  +)+)$", (HERE / f"{target}.c").read_text(), re.M)
    return found.group(1).replace("*", " ").split() if found else []


def program(target, build=BUILD):
    return build / "tests" / "fuzz" / f"fuzz_{target}"


def build(folder=BUILD, kind="run"):
    """Makes the fuzzers; says why and ends where that fails."""
    if not (folder / "build.ninja").exists():
        subprocess.run(["meson", "setup", folder, f"-Dfuzz={kind}", "-Dtests=enabled",
                        "-Doptimization=1"], cwd=ROOT, env=dict(os.environ, CC="clang"),
                       stdout=subprocess.DEVNULL, check=True)
    made = subprocess.run(["ninja", "-C", folder, "fuzzers"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace")
    if made.returncode != 0:
        raise SystemExit(f"{made.stdout}\nbuilding the fuzzers in {folder.name} failed")


def inputs(target):
    """The folders a target's inputs are in; new ones go to the first."""
    new = BUILD / "corpus" / target
    new.mkdir(parents=True, exist_ok=True)
    return [new] + [folder for folder in (HERE / "corpus" / target, HERE / "regress" / target)
                    if folder.is_dir()]


def words(target, *options):
    """The command line that runs a target, but for its inputs."""
    found = [program(target), f"-max_len={INPUT_BYTES_MAX}", f"-timeout={INPUT_S}",
             f"-rss_limit_mb={MEMORY_MB}", *options]
    dictionary = HERE / f"{target}.dict"
    if dictionary.exists():
        found.append(f"-dict={dictionary}")
    return [str(word) for word in found]


def call(command, limit_s, env=None):
    """Runs a fuzzer out of the way of everything else; what it leaves in TMPDIR, which is memory
    where there is some, is removed. (status, all it said)"""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as folder:
        process = subprocess.Popen(["nice", *command], cwd=ROOT, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace",
                                   env={**os.environ, **ENV, "TMPDIR": folder, **(env or {})})
        try:
            text, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            text += f"\nERROR: stopped, since it had not ended after {limit_s} s\n"
    return process.returncode, text


@dataclass
class Outcome:
    """A run's end."""
    target: str
    status: int
    text: str
    wall_s: float
    crashes: list  # inputs that fail, as files

    def number(self, pattern):
        found = re.findall(pattern, self.text)
        return int(found[-1]) if found else 0

    @property
    def executions(self):
        return self.number(r"stat::number_of_executed_units: *(\d+)") or self.number(r"#(\d+)\t")

    @property
    def edges(self):
        return self.number(r"cov: (\d+)")

    def line(self):
        return (f"{self.target:<13} {self.executions:>11} executions "
                f"{self.executions / max(self.wall_s, 1):>8.0f}/s  corpus "
                f"{self.number(r'corp: ([0-9]+)'):>5}  edges {self.edges:>5}  "
                f"seed {self.number(r'Seed: ([0-9]+)')}  {self.wall_s:.0f} s"
                + ("" if self.status == 0 else f"  FAILED (status {self.status})"))

    def failure(self):
        """What a person has to see of one that failed."""
        kept = self.text.splitlines()
        begin = next((i for i, line in enumerate(kept)
                      if re.search(r"ERROR|runtime error|failed|DEADLYSIGNAL", line)), 0)
        return "\n".join(kept[begin:begin + 60] + [f"input kept: {c.relative_to(ROOT)}"
                                                   for c in self.crashes])


def run(target, seconds, seed=0, env=None, crashes=None, options=()):
    """One target for some seconds. seed 0: from the clock. `crashes`: where failing inputs go."""
    crashes = crashes or BUILD / "crashes" / target
    crashes.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    seed = seed or time.time_ns() % 0xffffffff
    started = time.monotonic()
    status, text = call(words(target, f"-max_total_time={seconds}", f"-seed={seed}",
                              f"-artifact_prefix={crashes}/", "-print_final_stats=1",
                              *options, *map(str, inputs(target))), seconds + GRACE_S, env)
    return Outcome(target, status, text, time.monotonic() - started,
                   sorted(set(crashes.iterdir()) - before))


def replay(target, files, env=None, options=()):
    """Runs inputs once each. (status, text)"""
    return call(words(target, *options, *map(str, files)), GRACE_S, env)


def run_all(names, seconds, jobs, seed):
    failed = []
    print(f"{len(names)} targets, {seconds} s each, {jobs} at once", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(run, name, seconds, seed) for name in names]):
            outcome = done.result()
            print(outcome.line(), flush=True)
            if outcome.status != 0:
                failed.append(outcome)
    for outcome in failed:
        print(f"\n--- {outcome.target}\n{outcome.failure()}")
    return 1 if failed else 0


def merge(names):
    """As few inputs as reach all that is reached, short ones first."""
    for name in names:
        kept = HERE / "corpus" / name
        fresh = BUILD / "merged" / name
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        status, text = call(words(name, "-set_cover_merge=1", "-use_counters=0",
                                  str(fresh), *map(str, inputs(name))), 3600)
        if status != 0:
            print(text)
            return 1
        files = sorted(fresh.iterdir(), key=lambda path: path.stat().st_size)
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        size = 0
        for path in files:
            size += path.stat().st_size
            if size > CORPUS_BYTES_MAX:
                break
            shutil.copy(path, kept / path.name[:12])
        print(f"{name}: {len(list(kept.iterdir()))} of {len(files)} inputs kept, "
              f"{min(size, CORPUS_BYTES_MAX)} bytes")
    return 0


def coverage(names):
    build(COVERAGE, "coverage")
    print(f"{'target':<13} {'source':<32} {'lines':>7} {'reached':>8}")
    for name in names:
        raw, data = COVERAGE / f"{name}.profraw", COVERAGE / f"{name}.profdata"
        raw.unlink(missing_ok=True)
        status, text = call([str(program(name, COVERAGE)), "-runs=0", "-rss_limit_mb=0",
                             *map(str, inputs(name))], 3600, {"LLVM_PROFILE_FILE": str(raw)})
        if status != 0:
            print(text)
            return 1
        subprocess.run(["llvm-profdata", "merge", "-sparse", raw, "-o", data], check=True)
        report = subprocess.run(
            ["llvm-cov", "export", "-summary-only", program(name, COVERAGE),
             f"-instr-profile={data}"],
            stdout=subprocess.PIPE, check=True, text=True).stdout
        for entry in json.loads(report)["data"][0]["files"]:
            source, lines = os.path.relpath(entry["filename"], ROOT), entry["summary"]["lines"]
            if source in sources(name):
                print(f"{name:<13} {source:<32} {lines['count']:>7} {lines['percent']:>7.1f}%")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "merge", "coverage"])
    parser.add_argument("target", nargs="*")
    parser.add_argument("--seed", type=int, default=0, help="as an earlier run printed it")
    args = parser.parse_args()
    names = args.target or os.environ.get("TARGET", "").split() or targets()
    unknown = sorted(set(names) - set(targets()))
    if unknown:
        print(f"there is no target {unknown[0]}; there are {', '.join(targets())}",
              file=sys.stderr)
        return 2
    build()
    if args.what == "merge":
        return merge(names)
    if args.what == "coverage":
        return coverage(names)
    return run_all(names, int(os.environ.get("FUZZ_S") or 30),
                   int(os.environ.get("FUZZ_JOBS") or min(2, os.cpu_count() or 1)), args.seed)


if __name__ == "__main__":
    sys.exit(main())
