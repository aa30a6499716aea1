#!/usr/bin/python3
"""Shows that the crash tests can fail, by faults planted in the source (harness/mutants.py).
`make mutants` runs it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import mutants  # noqa: E402
from harness.mutants import Mutant  # noqa: E402

SMALL_GENERATIONS = (
    "src/volume/shard.c",
    "min_u64(s->store->limits.batch_bytes_max, config->cache_bytes / 8);",
    "256u << 10;")

# name, replacements, whether the test has to fail, test
MUTANTS = [
    Mutant("FLUSH is a no-op", [
        ("src/volume/write.c",
         """    else
        log_sync(vol, io);
}

void volume_flush(""",
         """    else
        io_finish_soon(vol, io, ST_OK);
}

void volume_flush(""")],
     True, "tests/crash/powercut"),
    Mutant("writes are answered before the log write", [
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
     True, "tests/crash/kill"),
    Mutant("control: small generations", [SMALL_GENERATIONS], False, "tests/crash/kill"),
    Mutant("generations are swapped", [
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
     True, "tests/crash/kill"),
    Mutant("the payload sync is left out", [
        ("src/store/lmdb/commit.c",
         "if (wrote && fdatasync(lm->blocks_fd) < 0)",
         "if (wrote && lm->blocks_fd < 0)")],
     True, "tests/crash/powercut"),
    Mutant("a half-sent write is applied", [
        ("src/server/transmission.c",
         "    volume_write_abort(c->vol, &p->io);\n    piece_over(p);",
         """    if (p->io.n_segs) {
        volume_write_commit(c->vol, &p->io, NULL);
        return;
    }
    volume_write_abort(c->vol, &p->io);
    piece_over(p);""")],
     True, "tests/crash/kill"),
    Mutant("the log is not replayed", [
        ("src/volume/replay.c", "        write_replay(vol, rec);\n", "")],
     True, "tests/crash/kill"),
]


def judge(tree, mutant, seed):
    """(whether the suite failed with the mutant, what it said of its first failure)"""
    env = mutants.environment(FDB_NBD=str(tree.build / "fdb-nbd"))
    done = subprocess.run(["/usr/bin/python3", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                           "--seed", str(seed), str(mutants.ROOT / mutant.test)],
                          env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        return None, f"{mutant.test} did not run: exit status {done.returncode}"
    lines = [line.lstrip("E ") for line in done.stdout.splitlines() if line.startswith("E  ")]
    return done.returncode == 1, "; ".join(lines[:2]) or f"{mutant.test} passed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="run mutants whose name contains this")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(f"seed: {args.seed}")
    with mutants.tree() as tree:
        wrong = mutants.run(tree, MUTANTS, ["fdb-nbd"],
                            lambda mutant: judge(tree, mutant, args.seed), args.only)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
