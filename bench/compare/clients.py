"""What puts the load on: `fdb-nbd bench`, fio's nbd engine (libnbd) as the independent one, and
the bare loop on the disk that single durable writes are held against.

Each gives a turn: {"iops", "mb_per_s", "p50_us", "p99_us", "requests", "client_cpu_us"}. Latencies
are those of the requests themselves; a FLUSH counts in the rates, not in them.
"""

import json
import subprocess

from .servers import FdbNbd, Failed
from .workloads import MIB

# Beyond the time a client was told to take: its last requests and the last FLUSH.
GRACE_S = 120
FILL_LIMIT_S = 600


def run(words, limit_s, cwd=None):
    """The JSON a client prints."""
    try:
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=limit_s, cwd=cwd, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"the client did not end within {limit_s:g} s") from None
    if done.returncode:
        raise Failed(f"the client ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    try:
        # fio says other things before it.
        return json.loads(done.stdout[done.stdout.index("{"):])
    except ValueError:
        raise Failed(f"no JSON from the client: {done.stdout[-500:]}") from None


def bench(uri, limit_s, **options):
    words = [FdbNbd.program, "--json", "bench", uri]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", value]
    if options["workload"] not in ("read", "randread"):
        words.append("--overwrite")
    return run(words, limit_s)


def fill(uri, size):
    """Writes a volume from its beginning to its end."""
    bench(uri, FILL_LIMIT_S, workload="write", block_size=MIB, depth=8, bytes=size,
          time=FILL_LIMIT_S, seed=1)


def read_once(uri, size):
    bench(uri, FILL_LIMIT_S, workload="read", block_size=MIB, depth=8, bytes=size,
          time=FILL_LIMIT_S, seed=1)


def by_bench(uri, workload, seconds, seed):
    more = {"flush_every": workload.flush_every} if workload.flush_every else {}
    out = bench(uri, seconds + GRACE_S, workload=workload.rw, block_size=workload.block_size,
                depth=workload.depth, connections=workload.connections, time=seconds, seed=seed,
                **more)
    part = out["read"] or out["write"]
    return {
        "iops": out["iops"],
        "mb_per_s": out["mb_per_s"],
        "p50_us": part["latency_us"]["p50"] if part else None,
        "p99_us": part["latency_us"]["p99"] if part else None,
        "requests": out["requests"],
        "client_cpu_us": out["client_cpu_us_per_request"],
    }


def by_fio(uri, workload, seconds, seed, size, folder):
    words = ["fio", "--name=load", "--thread", "--ioengine=nbd", f"--uri={uri}",
             f"--rw={workload.rw}", f"--bs={workload.block_size}", f"--iodepth={workload.depth}",
             f"--numjobs={workload.connections}", f"--size={size}", "--time_based",
             f"--runtime={seconds * 1000:.0f}ms", f"--randseed={seed}", "--refill_buffers",
             "--end_fsync=1", "--group_reporting", "--output-format=json"]
    if workload.flush_every:
        words.append(f"--fsync={workload.flush_every}")
    if workload.rw == "randrw":
        words.append("--rwmixread=70")
    # fio may leave files where it runs.
    job = run(words, seconds + GRACE_S, folder)["jobs"][0]
    if job["error"]:
        raise Failed(f"fio: error {job['error']}")
    part = job["read"] if job["read"]["total_ios"] else job["write"]
    percentiles = part["clat_ns"].get("percentile", {})
    requests = job["read"]["total_ios"] + job["write"]["total_ios"]
    runtime_ms = max(job["read"]["runtime"], job["write"]["runtime"], 1)
    cpu_ms = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"]
    return {
        "iops": requests / runtime_ms * 1e3,
        "mb_per_s": (job["read"]["io_bytes"] + job["write"]["io_bytes"]) / runtime_ms / 1e3,
        "p50_us": percentiles.get("50.000000", 0) / 1e3,
        "p99_us": percentiles.get("99.000000", 0) / 1e3,
        "requests": requests,
        "client_cpu_us": cpu_ms * 1e3 / max(requests, 1),
    }


def by_bare_loop(program, file, seconds):
    out = run([program, file, seconds], seconds + GRACE_S)
    return {"iops": out["iops"], "mb_per_s": out["iops"] * 4096 / 1e6, "p50_us": out["p50_us"],
            "p99_us": out["p99_us"], "requests": out["requests"], "client_cpu_us": None,
            "cpu_us": out["cpu_us"]}
