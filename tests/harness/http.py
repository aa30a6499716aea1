"""HTTP to a server, over TCP or its control socket, and Prometheus' text format.

parse() is as strict as promtool: a sample without HELP and TYPE before it, a family in two
pieces, a name or unit against the conventions, a histogram that falls or lacks +Inf is an
AssertionError in whichever test meets it.
"""

import http.client
import json
import os
import re
import socket

NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
SAMPLE = re.compile(r'([a-z][a-z0-9_]*)(?:\{(.*)\})? (\S+)\Z')
LABEL = re.compile(r'([a-z][a-z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|\Z)')
# Base units alone, and "total" last.
BAD_UNITS = re.compile(r"_(ms|us|ns|milliseconds|microseconds|minutes|hours|kb|mb|kib|mib|percent)"
                       r"(_|\Z)")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def connection(where, timeout_s=30):
    """`where`: (host, port) or the path of a Unix socket."""
    if isinstance(where, tuple):
        return http.client.HTTPConnection(*where, timeout=timeout_s)
    return _UnixConnection(str(where), timeout_s)


def request(where, path, method="GET", body=None, timeout_s=30, headers=None):
    """Status, headers, body as text."""
    c = connection(where, timeout_s)
    try:
        c.request(method, path, body, headers or {})
        answer = c.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        c.close()


def get(where, path, expect=200):
    status, _, text = request(where, path)
    assert status == expect, f"{path}: {status} {text[:500]}"
    return text


def get_json(where, path, expect=200):
    return json.loads(get(where, path, expect))


def control(pid):
    """The control socket of a server of this user's, where it is by default."""
    if os.geteuid() == 0:
        return f"/run/fdb-nbd/{pid}.sock"
    if os.environ.get("XDG_RUNTIME_DIR"):
        return f"{os.environ['XDG_RUNTIME_DIR']}/fdb-nbd/{pid}.sock"
    return f"/tmp/fdb-nbd-{os.geteuid()}/{pid}.sock"


def scrape(where):
    status, headers, text = request(where, "/metrics")
    assert status == 200, text[:500]
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4"), headers
    return Metrics(text)


class Metrics:
    """samples: (name, ((label, value), ...)) -> number; types: family -> type."""

    def __init__(self, text):
        self.text = text
        self.samples, self.types, self.helps = {}, {}, {}
        assert text.endswith("\n")
        family = None
        for line in text.splitlines():
            if line.startswith("# HELP "):
                _, _, family, words = line.split(" ", 3)
                assert NAME.match(family) and family not in self.helps, line
                assert words.strip(), line
                self.helps[family] = words
            elif line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ")
                assert name == family and name not in self.types, line
                assert kind in ("counter", "gauge", "histogram"), line
                self.types[name] = kind
                self._check_name(name, kind)
            else:
                self._take(line, family)
        for family, kind in self.types.items():
            if kind == "histogram":
                self._check_histogram(family)

    @staticmethod
    def _check_name(name, kind):
        assert not BAD_UNITS.search(name), f"not a base unit: {name}"
        assert name.endswith("_total") == (kind == "counter"), f"{kind} {name}"
        assert not re.search(r"_(bucket|sum|count|info)\Z", name) or name.endswith("_info"), name
        assert name.startswith(("fdbnbd_", "process_")), name
        if "duration" in name or "age" in name:
            assert name.endswith("_seconds"), name

    def _take(self, line, family):
        match = SAMPLE.match(line)
        assert match, f"no sample: {line!r}"
        name, labels, value = match.groups()
        pairs = LABEL.findall(labels or "")
        assert sum(len(k) + len(v) + 3 for k, v in pairs) + max(len(pairs) - 1, 0) == \
            len(labels or ""), f"labels: {line}"
        assert len({k for k, _ in pairs}) == len(pairs), line
        kind = self.types[family]
        names = ({family + s for s in ("_bucket", "_sum", "_count")} if kind == "histogram"
                 else {family})
        assert name in names, f"{name} stands under {family}"
        key = (name, tuple(sorted(pairs)))
        assert key not in self.samples, f"twice: {line}"
        self.samples[key] = float(value)

    def _check_histogram(self, family):
        rows = {}
        for (name, labels), value in self.samples.items():
            if name == family + "_bucket":
                of = tuple(p for p in labels if p[0] != "le")
                rows.setdefault(of, []).append((float(dict(labels)["le"]), value))
        for of, row in rows.items():
            assert row == sorted(row), f"{family}{of}: bounds out of order"
            assert all(a[1] <= b[1] for a, b in zip(row, row[1:])), f"{family}{of} falls"
            assert row[-1][0] == float("inf"), f"{family}{of}: no +Inf"
            assert row[-1][1] == self.samples[family + "_count", of], f"{family}{of}: count"
            assert (family + "_sum", of) in self.samples
        counts = {labels for name, labels in self.samples if name == family + "_count"}
        assert counts == set(rows)

    def value(self, name, default=None, **labels):
        key = (name, tuple(sorted(labels.items())))
        if default is not None:
            return self.samples.get(key, default)
        assert key in self.samples, f"no {name} {labels}"
        return self.samples[key]

    def counters(self):
        """All that must never go back."""
        ends = tuple(f + s for f, kind in self.types.items() if kind == "histogram"
                     for s in ("_bucket", "_count", "_sum"))
        return {key: value for key, value in self.samples.items()
                if self.types.get(key[0]) == "counter" or key[0] in ends}

    def check_after(self, before):
        for key, value in before.counters().items():
            assert self.samples.get(key, -1) >= value, \
                f"{key} went from {value} to {self.samples.get(key)}"
