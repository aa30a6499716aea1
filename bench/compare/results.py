"""What a run measured, and what it means: kept as JSON with every round's figures, so that tables
and charts can be made again from it; medians, ratios and the targets.

A ratio is the median of the ratios within the rounds, in which both were measured within seconds of
each other. Where durability is asked for (all that writes), only servers that keep what was flushed
count as peers: one that has it in memory is shown, but it does less.
"""

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from .servers import ALL, OURS, RAW
from .workloads import SUSTAINED_S, WORKLOADS

FORMAT = 1
KEPT = {"iops": 0, "mb_per_s": 1, "p50_us": 1, "p99_us": 1, "cpu_us": 2, "client_cpu_us": 2}
# Of one core; a client that uses more cannot ask for more.
CLIENT_BUSY = 0.9
NBDKIT = ("nbdkit-memory", "nbdkit-file")


def new(profile, machine, versions):
    return {"format": FORMAT, "profile": profile, "machine": machine, "versions": versions,
            "memory_limit": "", "stages": {}, "left_out": [], "turn_s": {}, "cells": {}}


def add(result, workload, server, got):
    cell = result["cells"].setdefault(workload, {}).setdefault(server, {k: [] for k in KEPT})
    for key, digits in KEPT.items():
        value = got.get(key)
        cell[key].append(None if value is None else round(value, digits))


def save(result, path):
    """One line for each server's figures, so that files can be compared."""
    head = {k: v for k, v in result.items() if k != "cells"}
    lines = [f" {json.dumps(k)}: {json.dumps(v)}," for k, v in head.items()]
    blocks = []
    for workload, cells in result["cells"].items():
        rows = ",\n".join(f"   {json.dumps(s)}: {json.dumps(c)}" for s, c in cells.items())
        blocks.append(f"  {json.dumps(workload)}: {{\n{rows}\n  }}")
    text = "{\n" + "\n".join(lines) + '\n "cells": {\n' + ",\n".join(blocks) + "\n }\n}\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(path.name + ".new")
    made.write_text(text)
    os.replace(made, path)


def load(path):
    result = json.loads(Path(path).read_text())
    if result.get("format") != FORMAT:
        raise ValueError(f"{path}: not a result of this format")
    return result


# Figures ---------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A median, and the least and the greatest."""
    median: float
    low: float
    high: float

    @staticmethod
    def of(values):
        values = [v for v in values if v is not None]
        return Spread(statistics.median(values), min(values), max(values)) if values else None


def figures(result, workload, server, metric):
    return result["cells"].get(workload, {}).get(server, {}).get(metric, [])


def spread(result, workload, server, metric):
    return Spread.of(figures(result, workload, server, metric))


def peers(workload, among=None):
    """Who counts in a comparison."""
    return [n for n, s in ALL.items() if n not in OURS and (among is None or n in among)
            and (s.durable or not WORKLOADS[workload].writes)]


def best(result, workload, metric, among=None, least=False):
    """The peer with the best median; not the best of each round, which would be the luckiest.
    None where no peer was measured."""
    found = {n: s.median for n in peers(workload, among)
             if (s := spread(result, workload, n, metric))}
    return (min if least else max)(found, key=found.get) if found else None


def ratio(result, workload, ours, other, metric):
    """Ours by the other's, round by round."""
    pairs = zip(figures(result, workload, ours, metric), figures(result, workload, other, metric))
    return Spread.of([a / b for a, b in pairs if a is not None and b])


def cores(result, workload, server, metric="cpu_us"):
    """How many cores a server ("cpu_us") or its client ("client_cpu_us") used."""
    return Spread.of([c * n / 1e6 for c, n in zip(figures(result, workload, server, metric),
                                                  figures(result, workload, server, "iops"))
                      if c is not None])


# Targets ---------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A ratio that one of ours must reach beside the best of `among`, or stay under."""
    text: str
    workload: str
    metric: str
    at_least: float = None
    at_most: float = None
    among: tuple = None
    # Whether a client without a core left to ask for more excuses it.
    client_matters: bool = False
    # Turns have to be as long.
    seconds_min: float = 0

    def bound(self):
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def other(self, result):
        if self.among == ("bare",):
            return "bare"
        return best(result, self.workload, self.metric, self.among, self.at_most is not None)

    def judge(self, result, ours):
        """(the ratio's Spread, whom to, whether it is reached); None where not measured."""
        other = self.other(result)
        found = other and ratio(result, self.workload, ours, other, self.metric)
        if not found:
            return None
        good = (found.median >= self.at_least if self.at_least is not None
                else found.median <= self.at_most)
        return found, other, good

    def note(self, result, ours):
        """What has to be known beside it."""
        client = cores(result, self.workload, ours, "client_cpu_us")
        if self.client_matters and client and client.median >= CLIENT_BUSY:
            return f"the client was the limit, it used {client.median:.2f} cores"
        turn_s = result["turn_s"].get(self.workload, 0)
        return f"for {turn_s:g} s only" if turn_s < self.seconds_min else ""


TARGETS = (
    Target("1. Cached 4 KiB random read, depth 32: CPU by nbdkit's", "randread-d32", "cpu_us",
           at_most=0.25, among=NBDKIT),
    Target("1. ... requests/s by nbdkit's", "randread-d32", "iops", at_least=4, among=NBDKIT,
           client_matters=True),
    Target("1. ... depth 128: CPU by nbdkit's", "randread-d128", "cpu_us", at_most=0.25,
           among=NBDKIT),
    Target("1. ... requests/s by nbdkit's", "randread-d128", "iops", at_least=4, among=NBDKIT,
           client_matters=True),
    Target("2. 4 KiB random write, depth 32, 60 s, 1 GiB", "sustained-1g", "iops", at_least=2,
           seconds_min=SUSTAINED_S),
    Target("2. ... 8 GiB", "sustained-8g", "iops", at_least=2, seconds_min=SUSTAINED_S),
    Target("3. 4 KiB write and FLUSH, depth 1", "flush", "iops", at_least=1),
    Target("3. ... by a bare loop of pwrite and fdatasync", "flush", "iops",
           at_least=round(1 / 1.5, 3), among=("bare",)),
    Target("3. ... 16 connections", "flush-16c", "iops", at_least=4),
    Target("4. Cached 4 KiB random read, depth 1: median latency", "randread-d1", "p50_us",
           at_most=0.7),
    Target("5. 1 MiB sequential read, cached", "read-1m", "mb_per_s", at_least=1.3),
    Target("5. 1 MiB sequential write, past the cache", "large-write-1m", "mb_per_s", at_least=1),
    Target("6. Cold 4 KiB random read, by the best raw peer", "cold-randread-d32", "iops",
           at_least=1, among=RAW),
)
