#!/usr/bin/python3
"""Builds the program three times (as shipped, with the sanitizers of memory, with that of threads),
runs every test suite and adds up what they say.

Every suite writes JUnit XML; that is what is counted, so a suite that dies without a report is
a failure. The last line is "N passed, N failed, N skipped", also left in
build/check-summary.txt. Tests that are skipped because they belong to the long run are not
counted. Any other skip must have a reason that begins as one of SKIPS_ALLOWED, or the run
fails: what is not tested must not look tested.

Where FoundationDB is (tests/harness/cluster.py finds it), clusters are started and most suites
run a second time on it. Elsewhere those tests are skipped, each by name; REQUIRE_FDB=1 makes
them fail instead.

Many suites mostly wait: for leases, timeouts, reconnects, disks, clusters that come up again. They
run in two lanes, one suite after the other, beside the lane of those that mostly compute. What is
about memory and time limits runs after them, with the machine for itself. A suite's output is
printed when it is over, so that the lanes do not mix; --in-turn has one lane only. Suites share
nothing: each makes its folders, ports, clusters and network namespaces anew.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
ASAN = ROOT / "build-asan"
TSAN = ROOT / "build-tsan"
RESULTS = BUILD / "check"
# What a machine may truly not have. All else can be installed.
SKIPS_ALLOWED = (
    "/dev/fuse cannot be opened",
    "no loop mounts on this machine",
    "no loop devices on this machine",
    "no pidfd_open here",
    "no pidfd_getfd here",
    "only root has another user's server",
    "only root gives a command another /dev",
    "only root can make a Debian system in a folder",
    "Debian's packages cannot be reached",
    "systemd cannot be booted in a folder here",
)
if os.environ.get("REQUIRE_FDB", "0") in ("", "0"):
    SKIPS_ALLOWED += ("FoundationDB is not on this machine",)
LONG_RUN_ONLY = "LONG=1"
# Each of these folders runs on both engines.
ON_BOTH_COMPUTING = ("cli", "interop", "crash")
ON_BOTH_WAITING = ("owner", "upgrade", "migration", "kernel")
# These have limits in time; and what G8 promises over TCP has some on a machine that does not keep up.
ON_BOTH_ALONE = ("protocol", "limits")
SUITE_LIMIT_S = 1800
# Unit tests at once. One of the longest only waits.
UNIT_PROCESSES = (os.cpu_count() or 1) + 1

ASAN_ENV = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "SLOW": "4",
}
TSAN_ENV = {
    "TSAN_OPTIONS": f"suppressions={ROOT / 'tests' / 'threads' / 'tsan.supp'}",
    "SLOW": "4",
}
# What is built with ThreadSanitizer; with --long all there is.
TSAN_TARGETS = ["fdb-nbd", "tests/test_server_reactor", "tests/test_store_warm"]


@dataclass
class Suite:
    name: str
    words: list
    env: dict
    report: Path  # JUnit XML


class Totals:
    def __init__(self):
        self.lock = threading.Lock()
        self.passed = 0
        self.failed = []
        self.skipped = []

    def add_suite(self, suite, status):
        """What a suite that has ended with `status` says."""
        with self.lock:
            failures_before = len(self.failed)
            if not self.add_report(suite.name, suite.report):
                self.failed.append(
                    f"{suite.name}: the suite ended without a report (status {status})")
            elif status != 0 and len(self.failed) == failures_before:
                self.failed.append(
                    f"{suite.name}: all its tests passed, yet it ended with status {status}")

    def add_report(self, suite, report):
        """Adds a JUnit file; False where there is none or it cannot be read."""
        try:
            cases = list(ElementTree.parse(report).iter("testcase"))
        except (OSError, ElementTree.ParseError):
            return False
        for case in cases:
            name = f"{suite}: {case.get('classname', '')} {case.get('name', '')}"
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                self.failed.append(name)
            elif skipped is not None:
                reason = skipped.get("message") or (skipped.text or "").strip() or "no reason given"
                if not reason.startswith(LONG_RUN_ONLY):
                    self.skipped.append((name, reason))
            else:
                self.passed += 1
        return bool(cases)

    def line(self):
        return (f"{self.passed} passed, {len(self.failed)} failed, "
                f"{len(self.skipped)} skipped")


class Runner:
    """Runs commands below the project's root, from several threads, and ends them all when the
    run is given up."""

    def __init__(self):
        self.lock = threading.Lock()
        self.running = set()
        self.given_up = False

    def run(self, words, env=None, limit_s=SUITE_LIMIT_S, out=None):
        """A command's exit status, or None when it took too long. `out`: where all it says goes."""
        with self.lock:
            if self.given_up:
                return None
            process = subprocess.Popen(
                [str(w) for w in words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT if out else None, env=dict(os.environ, **(env or {})))
            self.running.add(process)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self.say(f"stopped after {limit_s} s: {' '.join(str(w) for w in words)}")
            return None
        finally:
            with self.lock:
                self.running.discard(process)

    def say(self, text):
        with self.lock:
            print(text, flush=True)

    def give_up(self):
        with self.lock:
            self.given_up = True
            for process in self.running:
                process.terminate()


def build(runner, folder, options, targets=()):
    options = ["-Dwerror=true", "-Dtests=enabled"] + options
    if (folder / "build.ninja").exists():
        setup = ["meson", "configure", folder] + options
    else:
        setup = ["meson", "setup", folder] + options
    return runner.run(setup) == 0 and runner.run(["ninja", "-C", folder, *targets]) == 0


def stages(long_run):
    """What runs after one another; each a list of lanes, each a list of suites."""
    counts = {"LONG": "1"} if long_run else {}
    on_fdb = dict(counts, STORE="fdb")

    def plain(*folders):
        return [pytest_suite(folder, folder, BUILD, counts) for folder in folders]

    def fdb(*folders):
        return [pytest_suite(f"{folder} on FoundationDB", folder, BUILD, on_fdb)
                for folder in folders]

    def races(name, counts):
        return pytest_suite(name, "threads/test_threads.py", TSAN, dict(counts, **TSAN_ENV))

    def sanitized(*folders):
        return [pytest_suite(f"{folder} (sanitizers)", folder, ASAN, dict(counts, **ASAN_ENV))
                for folder in folders]

    computing = [unit_suite("unit", BUILD, counts), *plain(*ON_BOTH_COMPUTING, "access"),
                 *sanitized("access"), *plain("fuzz"),
                 unit_suite("unit (sanitizers)", ASAN, dict(counts, **ASAN_ENV))]
    waiting = [*plain(*ON_BOTH_WAITING), *fdb(*ON_BOTH_WAITING),
               *plain("bench", "http", "page", "tls", "service", "sandbox", "failover", "soak",
                      "faults", "docs")]
    clusters = [*plain("fdb"), *fdb(*ON_BOTH_COMPUTING), races("threads", counts),
                races("threads on FoundationDB", on_fdb),
                pytest_suite("threads (leaks)", "threads/test_again.py", ASAN,
                             dict(counts, **ASAN_ENV)), *plain("package")]
    alone = [*plain(*ON_BOTH_ALONE, "hostile"), *fdb(*ON_BOTH_ALONE),
             *sanitized("protocol", "tls", *(["hostile"] if long_run else []))]
    return [[computing, waiting, clusters], [alone]]


def unit_suite(name, build_folder, env):
    return Suite(name,
                 ["meson", "test", "-C", build_folder, "--no-rebuild", "--print-errorlogs",
                  "--num-processes", UNIT_PROCESSES,
                  "--timeout-multiplier", "4" if build_folder == ASAN else "1"],
                 env, build_folder / "meson-logs" / "testlog.junit.xml")


def pytest_suite(name, folder, build_folder, env):
    report = RESULTS / (file_name(name) + ".xml")
    return Suite(name,
                 ["/usr/bin/python3", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
                  "--junit-xml", report, ROOT / "tests" / folder],
                 dict({"STORE": "lmdb"}, **env, FDB_NBD=str(build_folder / "fdb-nbd"),
                      PYTHONDONTWRITEBYTECODE="1"),
                 report)


def file_name(suite_name):
    return suite_name.replace(" ", "-").replace("(", "").replace(")", "")


def run_suite(runner, suite, totals, limit_s):
    suite.report.unlink(missing_ok=True)
    log = RESULTS / (file_name(suite.name) + ".log")
    runner.say(f"--- {suite.name}: begins")
    started = time.monotonic()
    with open(log, "wb") as out:
        status = runner.run(suite.words, suite.env, limit_s, out)
    took_s = time.monotonic() - started
    if runner.given_up:
        return
    runner.say(f"\n--- {suite.name}\n{log.read_text(errors='replace').strip()}\n"
               f"--- {suite.name}: {took_s:.0f} s\n")
    totals.add_suite(suite, status)


def run_lanes(runner, lanes, totals, limit_s):
    """The lanes beside one another, until all have ended."""
    def run_lane(lane):
        for suite in lane:
            run_suite(runner, suite, totals, limit_s)

    with ThreadPoolExecutor(len(lanes)) as pool:
        try:
            for done in as_completed([pool.submit(run_lane, lane) for lane in lanes]):
                done.result()
        except BaseException:
            runner.give_up()
            raise


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--long", action="store_true", help="the large counts (hours)")
    parser.add_argument("--in-turn", action="store_true", help="one suite at a time")
    args = parser.parse_args()
    limit_s = 24 * 3600 if args.long else SUITE_LIMIT_S

    runner = Runner()
    for folder, options, targets in (
            (BUILD, [], []),
            (ASAN, ["-Db_sanitize=address,undefined", "-Db_lundef=false"], []),
            (TSAN, ["-Db_sanitize=thread", "-Db_lundef=false"],
             [] if args.long else TSAN_TARGETS)):
        if not build(runner, folder, options, targets):
            print(f"building {folder.name} failed")
            print("0 passed, 1 failed, 0 skipped")
            return 1

    RESULTS.mkdir(exist_ok=True)
    totals = Totals()
    started = time.monotonic()
    for lanes in stages(args.long):
        if args.in_turn:
            lanes = [[suite for lane in lanes for suite in lane]]
        run_lanes(runner, lanes, totals, limit_s)

    bad_skips = [name for name, reason in totals.skipped if not reason.startswith(SKIPS_ALLOWED)]
    for name in totals.failed:
        print(f"FAILED   {name}")
    for name, reason in totals.skipped:
        print(f"skipped  {name}: {reason}")
    for name in bad_skips:
        print(f"not a reason to skip a test: {name}")
    print(f"{time.monotonic() - started:.0f} s")
    (BUILD / "check-summary.txt").write_text(totals.line() + "\n")
    print(totals.line())
    return 1 if totals.failed or bad_skips else 0


if __name__ == "__main__":
    sys.exit(main())
