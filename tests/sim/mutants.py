#!/usr/bin/python3
"""Shows that the simulator finds what it is there to find: plants one fault at a time in the
program (harness/mutants.py) and lets the simulator look for it, for 10,000 seeds at most.
`make simulate-mutants` runs it.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import mutants  # noqa: E402
from harness.mutants import Mutant  # noqa: E402

TARGETS = ["tests/simulate", "tests/fdb/libfdb_c.so"]
# A seed with a fault in it may come to no end.
SEED_LIMIT_S = 20

# On stores with heartbeats (FoundationDB) or with a write log, or on both: where the fault is.
LOG, FDB, BOTH = ["--log-only"], ["--fdb-only"], []

MUTANTS = [
    Mutant("control: the program as it is", [], must_fail=False, test=BOTH),

    Mutant("the owner key is not checked", [
        # Each commit of data goes through, whoever owns the volume by then.
        ("src/volume/generation.c",
         """    g->commit = (struct store_commit){.checks = &g->check,
                                      .n_checks = 1,""",
         """    g->commit = (struct store_commit){.checks = &g->check,
                                      .n_checks = 0,""")], test=FDB),

    Mutant("writes are answered before the commit", [
        ("src/volume/write.c",
         """    if (!shard_uses_log(s)) {
        list_add_tail(&g->waiters, &io->link);
        return;""",
         """    if (!shard_uses_log(s)) {
        io_finish_soon(vol, io, ST_OK);
        return;""")], test=FDB),

    Mutant("writes are answered before the log write", [
        # Every second batch is written together with the next one. (So long what it holds must
        # not change: it is copied.)
        ("src/volume/write.c",
         "    uint64_t seq = store_log_append(s->log, vol->branch, meta, iov, n_iov, payload);\n",
         """    struct iovec kept = {mem_alloc(payload + 1), 0};
    for (int i = 0; i < n_iov; i++) {
        memcpy((uint8_t *)kept.iov_base + kept.iov_len, iov[i].iov_base, iov[i].iov_len);
        kept.iov_len += iov[i].iov_len;
    }
    uint64_t seq = store_log_append(s->log, vol->branch, meta, &kept, payload ? 1 : 0, payload);
"""),
        ("src/volume/shard.c",
         "        enum status st = s->log_failed ? ST_IO : store_log_submit(s->log);\n",
         """        static unsigned turn;
        bool now = ++turn % 2;
        enum status st = s->log_failed ? ST_IO : now ? store_log_submit(s->log) : ST_OK;
""")], test=LOG),

    Mutant("generations are reordered before they are built", [
        ("src/volume/generation.c",
         "    g->stage = GEN_SEALED;\n    vol->gens_queued++;\n",
         """    g->stage = GEN_SEALED;
    vol->gens_queued++;
    struct list *swapped = g->link.prev;
    if (swapped != &vol->gens && container_of(swapped, struct gen, link)->stage < GEN_BUILT) {
        list_remove(&g->link);
        list_add_tail(swapped, &g->link);
    }
""")], test=BOTH),

    Mutant("generations are reordered: a commit does not wait for the one before", [
        ("src/volume/generation.c",
         "        if (g->stage == GEN_BUILT && !before)\n",
         "        if (g->stage == GEN_BUILT)\n")], test=FDB),

    Mutant("a read version older than the last own commit", [
        # One that is known stays until the next question.
        ("src/store/fdb/versions.c",
         "    } else if (version > fr->version) {\n",
         "    } else if (version > fr->version && !fr->version) {\n")], test=FDB),

    Mutant("a commit is sent at the version of one's own commit before", [
        # Others in the same batch, behind that one, have this version too.
        ("src/store/fdb/commit.c",
         "        lane_learn(c->lane, c->commit, version - 1, c->sent_ns);\n",
         "        lane_learn(c->lane, c->commit, version, c->sent_ns);\n")], test=FDB),

    Mutant("the lease is counted from the answer", [
        ("src/volume/session.c",
         "    uint64_t until = s->sent_ns + lease_ns(s);\n",
         "    uint64_t until = env_now_ns(s->env) + lease_ns(s);\n")], test=FDB),

    Mutant("a heartbeat does not check its own value", [
        ("src/volume/session.c",
         """                                      .n_checks = 1,
                                      .mutations = s->mutations,
                                      .n_mutations = 1,""",
         """                                      .n_checks = 0,
                                      .mutations = s->mutations,
                                      .n_mutations = 1,""")], test=FDB),

    Mutant("a takeover does not check the counter", [
        ("src/volume/owner.c",
         """        a->checks[n_checks++] = (struct store_check){.kind = STORE_CHECK_VALUE,
                                                     .key = key_slice(&a->sight.key),
                                                     .value = {a->sight.bytes, a->sight.len}};
        len = session_fenced_bytes""",
         """        len = session_fenced_bytes""")], test=FDB),

    Mutant("a write of a dead connection is applied late", [
        # What was not read when it hung up is taken in a second later.
        ("src/server/connection.c",
         """static void hang_up(struct conn *c)
{""",
         """static void take_late(struct env_timer *timer)
{
    struct conn *c = container_of(timer, struct conn, leftover.timer);
    c->leftover.waits = false;
    conn_wake(c);
}

static void hang_up(struct conn *c)
{"""),
        ("src/server/connection.c",
         """    if (c->phase == CONN_SERVING && !c->at_end)
        take_no_more(c);
}

/* Whether all""",
         """    if (c->phase == CONN_SERVING && !c->at_end) {
        c->leftover.waits = true;
        c->leftover.timer.fire = take_late;
        env_timer_start(c->lane->env, &c->leftover.timer, 1000);
    }
}

/* Whether all""")], test=BOTH),

    Mutant("a half-sent write is applied", [
        ("src/server/transmission.c",
         "    volume_write_abort(c->vol, &p->io);\n    piece_over(p);",
         """    if (p->io.n_segs) {
        volume_write_commit(c->vol, &p->io, NULL);
        return;
    }
    volume_write_abort(c->vol, &p->io);
    piece_over(p);""")], test=BOTH),

    Mutant("the base of a partial block is fetched behind a trim, and laid under it", [
        # A long trim that is not in the index yet is overlooked by a short write.
        ("src/volume/write.c",
         """    e = blocks_add(t, vol, vol->tag, no, entries_of(vol, no));
    if (overlay_lookup(vol, no) >= 0)
        e->zero = e->full = true;
    return e;""",
         """    e = blocks_add(t, vol, vol->tag, no, entries_of(vol, no));
    return e;""")], test=BOTH),

    Mutant("a base that was being fetched when a trim came is laid over it", [
        ("src/volume/fetch.c",
         """    if (e->full) {
        if (base)
            buf_unref(base);
        return;
    }
    if (e->buf) {""",
         """    if (e->full && e->zero && base) {
        e->buf = base;
        e->zero = e->hole = false;
        gen_touch(vol, e, NULL);
        return;
    }
    if (e->full) {
        if (base)
            buf_unref(base);
        return;
    }
    if (e->buf) {""")], test=BOTH),

    Mutant("the log is replayed beyond the takeover", [
        # An owner that stands still is not ended: it may wake up and go on writing its log.
        ("src/volume/owner.c",
         """        a->kill.work = kill_work;
        a->kill.done = kill_done;
        a->inflight = true;
        env_work(s->env, &a->kill);
        return;""",
         """        a->kill.work = kill_work;
        a->kill.done = kill_done;
        acquire_take(a);
        return;""")], test=LOG),

    Mutant("a snapshot misses writes that were answered", [
        # The block that was written last goes into the generation behind it.
        ("src/volume/snapshot.c",
         """    gen_seal(vol, true);
}
""",
         """    struct blk *last = list_empty(&g->dirty) ? NULL : container_of(g->dirty.prev, struct blk, dirty);
    if (last)
        gen_untouch(vol, last);
    gen_seal(vol, true);
    if (last)
        gen_touch(vol, last, NULL);
}
""")], test=LOG),

    Mutant("what a removed snapshot and an older one name is cleared", [
        ("src/volume/clean_snapshot.c",
         "    s->p = history_live_below(h, s->epoch);\n",
         "    s->p = 0;\n")], test=BOTH),

    Mutant("what a removed snapshot and a younger one name is cleared", [
        ("src/volume/clean_snapshot.c",
         "    s->q = history_live_at_or_above(&vol->history, s->epoch + 1);\n",
         "    s->q = 0;\n")], test=BOTH),

    Mutant("the volume clears what its newest snapshot names", [
        ("src/volume/snapshot.c",
         "    vol->protected_epoch = vol->header.epoch;\n",
         "    vol->protected_epoch = vol->header.epoch - 1;\n")], test=BOTH),

    Mutant("a rollback leaves rows that are newer", [
        ("src/volume/ancestry.c",
         "    to.after = last;\n",
         "    to.after = epoch;\n")], test=BOTH),

    Mutant("a volume that is frozen for a snapshot takes writes", [
        ("src/volume/owner.c",
         "    return vol->frozen && (io->kind == IO_WRITE || io->kind == IO_ZERO || io->kind == IO_TRIM ||",
         "    return !vol && (io->kind == IO_WRITE || io->kind == IO_ZERO || io->kind == IO_TRIM ||")],
        test=BOTH),
]


def simulate(program, first, seeds, jobs, engine):
    """(the seed that failed or None, how many there were, what was wrong)"""
    done = subprocess.run([str(program), "--first", str(first), "--seeds", str(seeds),
                           "--jobs", str(jobs), "--max-failures", "1",
                           "--limit", str(SEED_LIMIT_S), *engine],
                          env=mutants.environment(), capture_output=True, text=True,
                          errors="replace")
    total = re.search(r"^# (\d+) seeds, (\d+) failed$", done.stdout, re.M)
    if done.returncode not in (0, 1) or not total:
        raise RuntimeError(f"the simulator ended with {done.returncode}: {done.stderr[-500:]}")
    n = int(total.group(1))
    found = re.search(r"^# seed (\d+): (.*(?:\n#   (?!again:).*)*)", done.stdout, re.M)
    if not found:
        return None, n, "nothing"
    what = " | ".join(line.lstrip("# ") for line in found.group(2).split("\n"))
    return int(found.group(1)), n, what


def judge(tree, mutant, args):
    """(whether a seed failed because of the mutant, after how many and why)"""
    program = tree.build / "tests" / "simulate"
    if not mutant.must_fail:
        seed, n, what = simulate(program, args.first, args.control_seeds, args.jobs, mutant.test)
        return seed is not None, f"{n} seeds: {what}" + (f" (seed {seed})" if seed else "")
    seeds = 0
    while seeds < args.seeds:
        seed, n, what = simulate(program, args.first + seeds, args.seeds - seeds, args.jobs,
                                 mutant.test)
        if seed is None:
            break
        seeds = seed + 1 - args.first
        # What fails without it, too, was not found because of it.
        if simulate(args.unchanged, seed, 1, 1, mutant.test)[0] is None:
            return True, f"seed {seed}, after {seeds}: {what}"
        print(f"          (seed {seed} fails without a fault planted: {what[:200]})", flush=True)
    return False, f"nothing in {args.seeds} seeds"


def keep_unchanged(tree):
    """Builds the program without a fault, beside the one that will have them."""
    problem = tree.make(TARGETS)
    if problem:
        sys.exit(problem)
    return shutil.copy2(tree.build / "tests" / "simulate", tree.build / "tests" / "unchanged")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="run mutants whose name contains this")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=10000, help="at most so many")
    parser.add_argument("--control-seeds", type=int, default=500,
                        help="... without a fault")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with mutants.tree(["-Dtests=enabled"]) as tree:
        args.unchanged = keep_unchanged(tree)
        wrong = mutants.run(tree, MUTANTS, TARGETS, lambda mutant: judge(tree, mutant, args),
                            args.only)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
