"""The comparison with other servers (bench/peers.py): what it makes of figures, that it runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compare import charts, limits, report, results, servers, turns, workloads
from compare.servers import Failed
from harness.waiting import wait_until

PEERS = Path(__file__).resolve().parents[2] / "bench" / "peers.py"
RUN_LIMIT_S = 120


def made_up(**cells):
    """A result: workload=dict(server=dict(metric=[each round]))."""
    result = results.new("full", {"cpu": "a processor", "cores": 2, "memory_gb": 4,
                                  "kernel": "6.1", "file_system": "ext4"},
                         {"fdb-nbd": "1.0", "commit": "abc"})
    for workload, servers in cells.items():
        workload = workload.replace("_", "-")
        for server, metrics in servers.items():
            server = server.replace("_", "-")
            rounds = max(map(len, metrics.values()))
            for i in range(rounds):
                results.add(result, workload, server, {m: v[i] for m, v in metrics.items()})
    return result


def target(workload, metric, among=None):
    return next(t for t in results.TARGETS if (t.workload, t.metric) == (workload, metric)
                and (among is None or t.among == among))


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    # The medians are equal. Within the rounds it was 10, 1 and 2 times.
    result = made_up(randread_d32={"fdb_nbd": {"iops": [10, 20, 60]},
                                   "nbdkit_file": {"iops": [1, 20, 30]}})
    found = results.ratio(result, "randread-d32", "fdb-nbd", "nbdkit-file", "iops")
    assert (found.median, found.low, found.high) == (2, 1, 10)


def test_the_best_peer_has_the_best_median_and_not_the_luckiest_round():
    result = made_up(randread_d32={"nbdkit_file": {"iops": [10, 11, 90]},
                                   "qemu_nbd_raw": {"iops": [20, 20, 20]},
                                   "fdb_nbd_plain": {"iops": [99, 99, 99]}})
    assert results.best(result, "randread-d32", "iops") == "qemu-nbd-raw"


def test_who_keeps_nothing_is_a_peer_for_reads_only():
    servers = {"nbdkit_memory": {"iops": [50]}, "nbdkit_file": {"iops": [10]}}
    result = made_up(randread_d32=servers, flush=servers)
    assert results.best(result, "randread-d32", "iops") == "nbdkit-memory"
    assert results.best(result, "flush", "iops") == "nbdkit-file"


@pytest.mark.parametrize("ours,good", [(24.9, True), (25.1, False)])
def test_less_is_better_in_cpu(ours, good):
    result = made_up(randread_d32={"fdb_nbd": {"cpu_us": [ours]},
                                   "nbdkit_file": {"cpu_us": [120]},
                                   "nbdkit_memory": {"cpu_us": [100]},
                                   "nbd_server": {"cpu_us": [1]}})
    _, other, reached = target("randread-d32", "cpu_us").judge(result, "fdb-nbd")
    assert (other, reached) == ("nbdkit-memory", good)


@pytest.mark.parametrize("ours,good", [(70, True), (60, False)])
def test_the_bare_loop_is_held_against_the_flush(ours, good):
    result = made_up(flush={"fdb_nbd": {"iops": [ours]}, "bare": {"iops": [100]}})
    aim = target("flush", "iops", ("bare",))
    assert aim.judge(result, "fdb-nbd")[2] is good
    assert aim.judge(result, "fdb-nbd-plain") is None


def test_a_missed_target_says_when_the_client_was_the_limit():
    def told(client_cpu_us):
        result = made_up(randread_d32={
            "fdb_nbd": {"iops": [200_000], "client_cpu_us": [client_cpu_us]},
            "nbdkit_file": {"iops": [100_000]}})
        return report.targets(result)
    assert "the client was the limit, it used 1.00 cores" in told(5)
    assert "the client" not in told(4)


def test_only_reports_what_was_measured():
    result = made_up(randread_d32={"fdb_nbd": {"iops": [150_000], "cpu_us": [2.5]},
                                   "nbdkit_file": {"iops": [100_000], "cpu_us": [8]}})
    text = report.text(result)
    assert "| 4 KiB random read, depth 32 | 150k (2.50) | 100k (8.00) | 1.50 |" in text
    assert "| 2. ... 8 GiB | ≥ 2 | not measured |" in text
    assert "TCP" not in text and "qemu" not in text


def test_figures_survive_being_kept(tmp_path):
    result = made_up(flush={"fdb_nbd": {"iops": [1, 2]}}, read_1m={"nbd_server": {"p50_us": [3]}})
    results.save(result, tmp_path / "folder" / "kept.json")
    assert results.load(tmp_path / "folder" / "kept.json") == result
    (tmp_path / "other.json").write_text(json.dumps(dict(result, format=0)))
    with pytest.raises(ValueError):
        results.load(tmp_path / "other.json")


def test_the_report_takes_the_place_of_the_last_one():
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.between_marks(document, "new")
    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.between_marks(once, "new") == once
    for wrong in ("no marks", f"{report.END} {report.BEGIN}", document + document):
        with pytest.raises(ValueError):
            report.between_marks(wrong, "new")


def test_charts_are_the_same_each_time(tmp_path):
    result = made_up(randread_d32={"fdb_nbd": {"iops": [150_000, 170_000]},
                                   "nbdkit_file": {"iops": [100_000, 110_000]}})
    first = charts.draw(result, tmp_path / "a")
    charts.draw(result, tmp_path / "b")
    assert [path.name for _, path in first] == ["reads.svg"]
    text = first[0][1].read_text()
    assert text == (tmp_path / "b" / "reads.svg").read_text()
    assert "nbdkit file" in text and "thousands of requests/s" in text and "160" in text


def test_a_server_that_fails_is_left_out_and_named(tmp_path):
    class Broken:
        pid, stopped = None, False

        def stop(self):
            self.stopped = True
    run = turns.Run(workloads.PROFILES["quick"], tmp_path, tmp_path / "out", None)
    broken = Broken()
    up = {"nbdkit-file": broken}
    with run.or_without("flush", up, "nbdkit-file"):
        raise Failed("it said no")
    assert up == {} and broken.stopped
    assert "Left out (flush): nbdkit file: it said no." in report.about(run.result)


def test_each_target_has_its_workload_in_the_full_run():
    full = workloads.PROFILES["full"].workloads
    assert {t.workload for t in results.TARGETS} <= set(full)
    for name in workloads.QUICK:
        assert name in full
    assert set(full) == {w.name for _, chosen in
                         workloads.stages_of(workloads.PROFILES["full"]) for w in chosen}


def test_the_cpu_of_a_server_is_that_of_all_it_forked():
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    # The first has ended when the second begins, which lives on.
    script = '"$0" -c "$1"; "$0" -c "$1time.sleep(60)"; true'
    with subprocess.Popen(["sh", "-c", script, sys.executable, burn]) as parent:
        try:
            wait_until(lambda: servers.family_cpu_s(parent.pid) >= 0.55, 30, "both are counted")
        finally:
            for pid in reversed(servers.family(parent.pid)):
                os.kill(pid, signal.SIGKILL)


def left_in_cgroups():
    _, root = limits.find()
    return [f for f in os.listdir(root) if f.startswith("fdb-nbd-bench-")] \
        if os.path.isdir(root) else []


def test_a_run(tmp_path):
    """Small, but real: our server and nbdkit, read and written, with their memory limited."""
    out, folder, before = tmp_path / "out.json", tmp_path / "files", left_in_cgroups()
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, PEERS, "run", "randread-d32", "flush", "--servers",
         "fdb-nbd,nbdkit-memory", "--size", "16M", "--memory", "256M", "--rounds", "2",
         "--seconds", "0.1", "--folder", folder, "--out", out],
        capture_output=True, text=True, timeout=RUN_LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    result = results.load(out)
    assert result["left_out"] == []
    for workload in ("randread-d32", "flush"):
        for server in ("fdb-nbd", "nbdkit-memory"):
            for metric in ("iops", "p50_us", "p99_us", "client_cpu_us"):
                got = results.figures(result, workload, server, metric)
                assert len(got) == 2 and min(got) > 0, (workload, server, metric)
    assert min(results.figures(result, "flush", "bare", "iops")) > 0
    assert "| 4 KiB random read, depth 32 |" in done.stdout
    limited = result["memory_limit"].startswith("cgroup")
    assert bool(result["stages"]["cached"]["peak_mb"]) == limited
    assert max(result["stages"]["cached"]["peak_mb"].values(), default=0) <= 256 * 1.05
    assert os.listdir(folder) == []
    assert left_in_cgroups() == before
