#!/usr/bin/python3
"""Shows that the crash tests can fail: plants one fault at a time in a copy of the source,
builds it, and runs the test that has to notice.

Each mutant is a small replacement in one file. A mutant whose place is no longer found, that
does not build, or that the tests let pass, fails this program. `make mutants` runs it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SMALL_GENERATIONS = (
    "src/volume/shard.c",
    "min_u64(s->store->limits.batch_bytes_max, config->cache_bytes / 8);",
    "256u << 10;")

# name, replacements (file, what stands there, what stands there instead), test, whether the
# test has to fail; the controls must pass, or a mutant built on them shows nothing
MUTANTS = [
    ("FLUSH is a no-op", [
        ("src/volume/write.c",
         """    else
        log_sync(vol, io);
}

void volume_flush(""",
         """    else
        io_finish_soon(vol, io, ST_OK);
}

void volume_flush(""")],
     "tests/crash/powercut", True),
    ("writes are answered before the log write", [
        ("src/store/lmdb/log.c",
         "        return ST_IO;\n    }\n    return write_gathered(log);",
         """        return ST_IO;
    }
    static unsigned turn;
    if (++turn % 64 == 0) {
        /* As if the process had died between this answer and its write. */
        log->n_iov = log->n_headers = 0;
        return ST_OK;
    }
    return write_gathered(log);""")],
     "tests/crash/kill", True),
    ("control: small generations", [SMALL_GENERATIONS], "tests/crash/kill", False),
    ("generations are swapped", [
        SMALL_GENERATIONS,
        ("src/volume/generation.c",
         "    g->stage = GEN_SEALED;\n    vol->gens_queued++;\n",
         """    g->stage = GEN_SEALED;
    vol->gens_queued++;
    struct list *swapped = g->link.prev;
    if (swapped != &vol->gens && container_of(swapped, struct gen, link)->stage == GEN_SEALED) {
        list_remove(&g->link);
        list_add_tail(swapped, &g->link);
    }
""")],
     "tests/crash/kill", True),
    ("the payload sync is left out", [
        ("src/store/lmdb/commit.c",
         "if (r->wrote && fdatasync(lm->blocks_fd) < 0)",
         "if (r->wrote && lm->blocks_fd < 0)")],
     "tests/crash/powercut", True),
    ("a half-sent write is applied", [
        ("src/server/transmission.c",
         "    volume_write_abort(c->vol, &p->io);\n    piece_over(p);",
         """    if (p->io.n_segs) {
        volume_write_commit(c->vol, &p->io, NULL);
        return;
    }
    volume_write_abort(c->vol, &p->io);
    piece_over(p);""")],
     "tests/crash/kill", True),
    ("the log is not replayed", [
        ("src/volume/replay.c", "        write_replay(vol, rec);\n", "")],
     "tests/crash/kill", True),
]


def copy_tree(target):
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def plant(tree, replacements):
    for file, old, new in replacements:
        path = tree / file
        text = path.read_text()
        if text.count(old) != 1:
            return f"its place is found {text.count(old)} times in {file}"
        path.write_text(text.replace(old, new))
    return None


def run_suite(tree, suite, seed):
    """The suite's exit status with the mutant, and what it said of its first failure."""
    env = dict(os.environ, FDB_NBD=str(tree / "build" / "fdb-nbd"), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(["/usr/bin/python3", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                           "--seed", str(seed), str(ROOT / suite)],
                          env=env, capture_output=True, text=True)
    lines = [line.lstrip("E ") for line in done.stdout.splitlines() if line.startswith("E  ")]
    return done.returncode, "; ".join(lines[:2])


def judge(tree, replacements, suite, must_fail, seed):
    """(as it should be, what happened)"""
    problem = plant(tree, replacements)
    if problem:
        return False, problem
    build = subprocess.run(f"meson setup {tree}/build {tree} && ninja -C {tree}/build fdb-nbd",
                           shell=True, capture_output=True, text=True)
    if build.returncode:
        return False, "it does not build: " + build.stdout[-500:]
    status, how = run_suite(tree, suite, seed)
    if status not in (0, 1):
        return False, f"{suite} did not run: exit status {status}"
    return (status == 1) == must_fail, how or f"{suite} passed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="run mutants whose name contains this")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    wrong = 0
    print(f"seed: {args.seed}")
    for name, replacements, suite, must_fail in MUTANTS:
        if args.only and args.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            copy_tree(Path(folder))
            good, what = judge(Path(folder), replacements, suite, must_fail, args.seed)
        word = ("caught" if must_fail else "passed") if good else "WRONG"
        wrong += not good
        print(f"{word:8}  {name}: {what}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
