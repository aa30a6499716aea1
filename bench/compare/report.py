"""Tables from a result, and their place in a document."""

from .results import TARGETS, best, cores, ratio, spread
from .servers import ALL, OURS
from .workloads import STAGES, SUSTAINED, WORKLOADS

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
NONE = "–"


def number(value):
    """Three digits, and thousands as k."""
    if value is None:
        return NONE
    if value >= 99_950:
        return f"{value / 1e3:.0f}k"
    if value >= 9_995:
        return f"{value / 1e3:.1f}k"
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def ranged(found):
    """A ratio with its range."""
    if not found:
        return NONE
    if found.low == found.high:
        return f"{found.median:.2f}"
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def table(heads, rows):
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def measured(result, stage):
    """The workloads of a stage that were measured, and the servers that took part."""
    found = [w for w in WORKLOADS.values() if w.stage == stage and result["cells"].get(w.name)]
    names = [n for n in ALL if any(n in result["cells"][w.name] for w in found)]
    return found, names


def targets(result):
    rows = []
    for t in TARGETS:
        row = [t.text, t.bound()]
        for ours in OURS:
            judged = t.judge(result, ours)
            if not judged:
                row += ["not measured", NONE]
                continue
            found, other, good = judged
            title = ALL[other].title if other in ALL else "bare loop"
            note = t.note(result, ours)
            row += [f"{ranged(found)}, {title}",
                    ("yes" if good else "**no**") + (f": {note}" if note else "")]
        rows.append(row)
    heads = [h for n in OURS for h in (f"{ALL[n].title} / best peer", "reached")]
    return table(["target", "must be", *heads], rows)


def rates(result, stage):
    found, names = measured(result, stage)
    rows = []
    for w in found:
        turn_s = result["turn_s"].get(w.name, 0)
        row = [w.title + (f", {turn_s:g} s" if w.name in SUSTAINED else "")
               + (", MB/s" if w.unit == "mb_per_s" else "")]
        for name in names:
            rate, cpu = (spread(result, w.name, name, m) for m in (w.unit, "cpu_us"))
            row.append(f"{number(rate.median)} ({number(cpu.median)})" if rate and cpu else NONE)
        for ours in OURS:
            other = best(result, w.name, w.unit)
            if ours in names:
                row.append(ranged(other and ratio(result, w.name, ours, other, w.unit)))
        rows.append(row)
    heads = [""] + [ALL[n].title for n in names]
    heads += [f"{ALL[n].title} / best peer" for n in OURS if n in names]
    return table(heads, rows)


def latencies(result):
    """Where one request waits for the other: how long they take."""
    rows = []
    chosen = [w for w in WORKLOADS.values() if w.depth == 1 and not w.flush_every
              and w.stage in ("cached", "tcp", "large") and result["cells"].get(w.name)]
    names = [n for n in ALL if any(n in result["cells"][w.name] for w in chosen)]
    for w in chosen:
        row = [w.title]
        for name in names:
            p50, p99 = (spread(result, w.name, name, m) for m in ("p50_us", "p99_us"))
            row.append(f"{number(p50.median)}, {number(p99.median)}" if p50 and p99 else NONE)
        rows.append(row)
    return table(["µs, median and 99 of 100"] + [ALL[n].title for n in names], rows) if rows else ""


def memory(result):
    names = [n for n in ALL if any(n in s["peak_mb"] for s in result["stages"].values())]
    rows = [[s["title"], str(s["memory"] >> 20), str(s["cache_size"] >> 20)] +
            [str(s["peak_mb"].get(n, NONE)) for n in names]
            for s in result["stages"].values() if s["peak_mb"]]
    if not rows:
        return ""
    return table(["", "limit, MiB", "our cache, MiB"] + [ALL[n].title + ", MB" for n in names],
                 rows)


def busy(result):
    """How many cores servers used where that tells what the limit was."""
    chosen = [w for w in WORKLOADS.values() if w.name in result["cells"]
              and w.name in ("randread-d32", "read-1m", "large-write-1m", "sustained-1g",
                             "sustained-8g", "cold-randread-d32")]
    names = [n for n in ALL if any(n in result["cells"][w.name] for w in chosen)]
    rows = []
    for w in chosen:
        row = [w.title]
        for n in names:
            server = cores(result, w.name, n)
            client = cores(result, w.name, n, "client_cpu_us")
            row.append(f"{server.median:.2f}, {client.median:.2f}" if server and client else NONE)
        rows.append(row)
    return table(["cores used: server, client"] + [ALL[n].title for n in names], rows) \
        if rows else ""


def about(result):
    m, v = result["machine"], result["versions"]
    lines = [
        f"- {m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB of memory, Linux {m['kernel']}; "
        f"all files on one disk ({m['file_system']}).",
        "- " + ", ".join(f"{name} {version}" for name, version in v.items() if name != "commit")
        + f"; fdb-nbd of commit {v.get('commit', 'unknown')}.",
        f"- Profile {result['profile']}. Memory limits: {result['memory_limit']}.",
    ]
    for out in result["left_out"]:
        name = ALL[out["server"]].title if out["server"] in ALL else out["server"]
        lines.append(f"- Left out ({out['where']}): {name}: {' '.join(out['why'].split())[:200]}.")
    return "\n".join(lines)


def text(result, charts=()):
    """All of it; `charts` are (title, path of the file from the document's folder)."""
    parts = [about(result), "### Targets", targets(result)]
    parts += [f"![{title}]({path})" for title, path in charts]
    for stage in STAGES.values():
        if measured(result, stage.name)[0]:
            # As it was run; sizes may have been others than they are now.
            parts += [f"### {result['stages'].get(stage.name, {}).get('title', stage.title)}",
                      "Requests/s or MB/s, in brackets µs of the server's CPU for each request.",
                      rates(result, stage.name)]
    for title, body in (("Latency", latencies(result)), ("Who was busy", busy(result)),
                        ("Memory used", memory(result))):
        if body:
            parts += [f"### {title}", body]
    if result.get("fdb"):
        parts += ["### On FoundationDB, beside the bare loop",
                  "MB/s, in brackets ms of CPU for each MB: the loop or the server, fdbserver, "
                  "the load.",
                  "\n".join(result["fdb"])]
    return "\n\n".join(parts)


def between_marks(document, body):
    """The document with `body` in the place of what stood between the marks."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or \
            document.index(BEGIN) > document.index(END):
        raise ValueError(f"the document needs one {BEGIN} and one {END} behind it")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}"
