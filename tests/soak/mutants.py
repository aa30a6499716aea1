#!/usr/bin/python3
"""Shows that the soak notices what it is there to notice: plants faults of the crash tests' and the
simulator's lists (harness/mutants.py) in the program, one at a time, and soaks it for two minutes.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from harness import mutants  # noqa: E402

CHOSEN = {
    "crash": ("writes are answered before the log write", "the log is not replayed",
              "a half-sent write is applied"),
    "sim": ("a snapshot misses writes that were answered",
            "what a removed snapshot and an older one name is cleared",
            "what a removed snapshot and a younger one name is cleared",
            "a rollback leaves rows that are newer"),
}


def listed(folder):
    """name -> Mutant, of another folder's list."""
    spec = importlib.util.spec_from_file_location(f"{folder}_mutants",
                                                  HERE.parent / folder / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {m.name: m for m in module.MUTANTS}


def judge(tree, seconds, seed):
    done = subprocess.run(["/usr/bin/python3", str(HERE / "soak.py"), "--seconds", str(seconds),
                           "--seed", str(seed)],
                          env=mutants.environment(FDB_NBD=str(tree.build / "fdb-nbd")),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = [line.strip() for line in done.stdout.splitlines() if "DEFECT" in line]
    for line in done.stdout.splitlines():
        if "kept: /" in line and not line.startswith("kept"):
            subprocess.run(["rm", "-rf", line.split("kept: ")[1]])
    return done.returncode != 0, (seen or ["nothing was seen"])[0][:160]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="run mutants whose name contains this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=120)
    args = parser.parse_args()
    os.environ["STORE"] = "lmdb"
    planted = [listed(folder)[name] for folder, names in CHOSEN.items() for name in names]
    planted.append(mutants.Mutant("control: the program as it is", [], must_fail=False))
    with mutants.tree() as tree:
        wrong = mutants.run(tree, planted, ["fdb-nbd"],
                            lambda mutant: judge(tree, args.seconds, args.seed), args.only)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
