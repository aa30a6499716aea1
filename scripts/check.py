#!/usr/bin/python3
"""Builds the program twice (as shipped, and with sanitizers), runs every test suite and adds
up what they say.

Every suite writes JUnit XML; that is what is counted, so a suite that dies without a report is
a failure. The last line is "N passed, N failed, N skipped", also left in
build/check-summary.txt. Tests that are skipped because they belong to the long run are not
counted. Any other skip must have a reason that begins as one of SKIPS_ALLOWED, or the run
fails: what is not tested must not look tested.

Where FoundationDB is (tests/harness/cluster.py finds it), clusters are started and most suites
run a second time on it. Elsewhere those tests are skipped, each by name; REQUIRE_FDB=1 makes
them fail instead.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
ASAN = ROOT / "build-asan"
RESULTS = BUILD / "check"
# What a machine may truly not have. All else can be installed.
SKIPS_ALLOWED = (
    "/dev/fuse cannot be opened",
    "no loop mounts on this machine",
    "no loop devices on this machine",
    "no pidfd_open here",
    "no pidfd_getfd here",
    "only root has another user's server",
)
if os.environ.get("REQUIRE_FDB", "0") in ("", "0"):
    SKIPS_ALLOWED += ("FoundationDB is not on this machine",)
LONG_RUN_ONLY = "LONG=1"
# Each runs on both engines.
FOLDERS = ("protocol", "cli", "owner", "upgrade", "interop", "migration", "kernel", "limits", "crash")
SUITE_LIMIT_S = 1800

ASAN_ENV = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "SLOW": "4",
}


class Totals:
    def __init__(self):
        self.passed = 0
        self.failed = []
        self.skipped = []

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


def run(words, env=None, limit_s=SUITE_LIMIT_S):
    """Runs a command below the project's root; its exit status, or None when it took too long."""
    process = subprocess.Popen([str(w) for w in words], cwd=ROOT, stdin=subprocess.DEVNULL,
                               env=dict(os.environ, **(env or {})))
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print(f"stopped after {limit_s} s: {' '.join(str(w) for w in words)}")
        return None
    except BaseException:
        process.terminate()
        process.wait()
        raise


def build(folder, options):
    options = ["-Dwerror=true", "-Dtests=enabled"] + options
    if (folder / "build.ninja").exists():
        setup = ["meson", "configure", folder] + options
    else:
        setup = ["meson", "setup", folder] + options
    return run(setup) == 0 and run(["ninja", "-C", folder]) == 0


def suites(long_run):
    """(name, command, environment, report) of each suite, the quick ones first."""
    counts = {"LONG": "1"} if long_run else {}
    for name, folder, env in (("unit", BUILD, {}), ("unit (sanitizers)", ASAN, ASAN_ENV)):
        multiplier = "4" if folder == ASAN else "1"
        yield (name,
               ["meson", "test", "-C", folder, "--no-rebuild", "--print-errorlogs",
                "--timeout-multiplier", multiplier],
               dict(counts, **env), folder / "meson-logs" / "testlog.junit.xml")

    for folder in FOLDERS:
        yield pytest_suite(folder, folder, BUILD, counts)
    yield pytest_suite("fdb", "fdb", BUILD, counts)
    yield pytest_suite("failover", "failover", BUILD, counts)
    for folder in FOLDERS:
        yield pytest_suite(f"{folder} on FoundationDB", folder, BUILD, dict(counts, STORE="fdb"))
    yield pytest_suite("protocol (sanitizers)", "protocol", ASAN, dict(counts, **ASAN_ENV))


def pytest_suite(name, folder, build_folder, env):
    report = RESULTS / (name.replace(" ", "-").strip("()") + ".xml")
    return (name,
            ["/usr/bin/python3", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
             "--junit-xml", report, ROOT / "tests" / folder],
            dict({"STORE": "lmdb"}, **env, FDB_NBD=str(build_folder / "fdb-nbd"), PYTHONDONTWRITEBYTECODE="1"),
            report)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--long", action="store_true", help="the large counts (hours)")
    args = parser.parse_args()
    limit_s = 24 * 3600 if args.long else SUITE_LIMIT_S

    for folder, options in ((BUILD, []), (ASAN, ["-Db_sanitize=address,undefined",
                                                 "-Db_lundef=false"])):
        if not build(folder, options):
            print(f"building {folder.name} failed")
            print("0 passed, 1 failed, 0 skipped")
            return 1

    RESULTS.mkdir(exist_ok=True)
    totals = Totals()
    for name, words, env, report in suites(args.long):
        report.unlink(missing_ok=True)
        print(f"\n--- {name}", flush=True)
        started = time.monotonic()
        failures_before = len(totals.failed)
        status = run(words, env, limit_s)
        if not totals.add_report(name, report):
            totals.failed.append(f"{name}: the suite ended without a report (status {status})")
        elif status != 0 and len(totals.failed) == failures_before:
            totals.failed.append(f"{name}: all its tests passed, yet it ended with status {status}")
        print(f"--- {name}: {time.monotonic() - started:.0f} s", flush=True)

    print()
    bad_skips = [name for name, reason in totals.skipped if not reason.startswith(SKIPS_ALLOWED)]
    for name in totals.failed:
        print(f"FAILED   {name}")
    for name, reason in totals.skipped:
        print(f"skipped  {name}: {reason}")
    for name in bad_skips:
        print(f"not a reason to skip a test: {name}")
    (BUILD / "check-summary.txt").write_text(totals.line() + "\n")
    print(totals.line())
    return 1 if totals.failed or bad_skips else 0


if __name__ == "__main__":
    sys.exit(main())
