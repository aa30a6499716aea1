"""Charts from a result: rows of bars, one panel for each workload, because their scales differ.

Text stays text in the SVG files, and nothing in them changes from one drawing to the next.
"""

from pathlib import Path

from .results import spread
from .servers import ALL, OURS

OUR_COLOURS = {"fdb-nbd": "#1f6fb4", "fdb-nbd-plain": "#7fb2dd", "fdb-nbd-4k": "#b4d2ec"}
PEER_COLOUR = "#b8b8b8"
# (file, title, metric, (workload, short title), ...)
CHARTS = (
    ("reads", "4 KiB random reads, thousands of requests/s", "iops",
     ("randread-d1", "depth 1"), ("randread-d32", "depth 32"), ("randread-d128", "depth 128"),
     ("randread-16c", "16 connections"), ("cold-randread-d32", "depth 32, cold")),
    ("writes", "4 KiB random writes, thousands of requests/s", "iops",
     ("randwrite-d32", "depth 32"), ("flush", "FLUSH after each"),
     ("flush-16c", "the same, 16 conn."), ("sustained-1g", "1 GiB, 60 s"),
     ("sustained-8g", "8 GiB, 60 s")),
    ("cpu", "CPU of the server for each request, µs (less is better)", "cpu_us",
     ("randread-d1", "read, depth 1"), ("randread-d32", "read, depth 32"),
     ("randwrite-d32", "write, depth 32"), ("flush", "write and FLUSH"),
     ("read-1m", "1 MiB read")),
    ("sequential", "Sequential, MB/s", "mb_per_s",
     ("read-64k", "64 KiB read"), ("read-1m", "1 MiB read"), ("write-64k", "64 KiB write"),
     ("write-1m", "1 MiB write"), ("large-write-1m", "1 MiB write, past the cache")),
)


def draw(result, folder):
    """Writes the charts for which there are figures; gives (title, path) of each."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fdb-nbd",
                                "font.family": "sans-serif", "font.size": 8})
    from matplotlib import pyplot

    drawn = []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, title, metric, *panels in CHARTS:
        panels = [p for p in panels if any(spread(result, p[0], n, metric) for n in ALL)]
        names = [n for n in ALL if any(spread(result, w, n, metric) for w, _ in panels)]
        if not panels:
            continue
        figure, axes = pyplot.subplots(1, len(panels), sharey=True, squeeze=False,
                                       figsize=(1.2 + 1.75 * len(panels), 0.7 + 0.24 * len(names)))
        for axis, (workload, short) in zip(axes[0], panels):
            panel(axis, result, workload, short, metric, names)
        noted = "" if all(ALL[n].durable for n in names) else "      * keeps nothing on disk"
        figure.suptitle(title + noted, fontsize=9, x=0.01, ha="left")
        figure.tight_layout(pad=0.4)
        path = folder / f"{file}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
        drawn.append((title, path))
    return drawn


def panel(axis, result, workload, short, metric, names):
    scale = 1e3 if metric == "iops" else 1
    found = [(at, name, s) for at, name in enumerate(names)
             if (s := spread(result, workload, name, metric))]
    most = max((s.high for _, _, s in found), default=1) / scale
    for at, name, s in found:
        axis.barh(at, s.median / scale, height=0.7, clip_on=False,
                  color=OUR_COLOURS.get(name, PEER_COLOUR))
        if s.high > s.low:
            # From the least to the greatest of the rounds.
            axis.plot([s.low / scale, s.high / scale], [at, at], color="#404040", linewidth=0.8,
                      clip_on=False)
        value = s.median / scale
        axis.text(s.high / scale + most * 0.03, at, f"{value:.0f}" if value >= 99.5 else
                  f"{value:.1f}", va="center", fontsize=7)
    axis.set_yticks(range(len(names)), [label_of(ALL[n]) for n in names])
    for label, name in zip(axis.get_yticklabels(), names):
        label.set_fontweight("bold" if name in OURS else "normal")
    axis.set_title(short, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, most * 1.3)
    # Each bar says its value.
    axis.set_xticks([])
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def label_of(server):
    return server.title if server.durable else f"{server.title} *"
