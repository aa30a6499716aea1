"""What lies in the cluster is readable with FoundationDB's own tools, as docs/format.md and
docs/format-fdb.md have it; and what was damaged there is an I/O error, never wrong data (G5)."""

import errno
import re
from pathlib import Path

import nbd
import pytest

from harness import tuples
from harness.gateway import gateway
from harness.server import SLOW, wait_until

pytestmark = pytest.mark.fdb

BLOCK = 16384
DOCS = Path(__file__).resolve().parents[2] / "docs"
# How the tables there write the elements of a key.
KINDS = {"NAME": str, "ID": bytes, "WRITER": bytes}


def shapes():
    """{letter: [type of each further element]} of the keys that the documents list."""
    out = {}
    text = (DOCS / "format.md").read_text() + (DOCS / "format-fdb.md").read_text()
    for inside in re.findall(r"^\| `\((?:\"fdb-nbd\", )?(\"[a-z]\"[^`]*)\)`", text, re.M):
        letter, *more = [w.strip() for w in inside.split(",")]
        # format-fdb.md repeats some of them with examples in place of names.
        out.setdefault(letter.strip('"'), [KINDS.get(w, int) for w in more])
    return out


@pytest.fixture
def served(cluster, store, folder):
    with gateway(cluster, folder / "s", {"example": "8M", "other": "1M"}, store=store) as s:
        yield s


def connect(s, name="example"):
    h = nbd.NBD()
    h.connect_uri(s.uri(name))
    return h


def test_keys_are_tuples_as_the_format_says(cluster, store, served, rng):
    prefix = cluster.prefix_in(store)
    h = connect(served)
    block = block_bytes(served)
    for n in (0, 3, 300):
        h.pwrite(rng.randbytes(block), n * block)
    h.flush()
    keys = {key for key, _ in cluster.rows(prefix)}
    known = shapes()
    assert len(known) >= 13, known
    for letter, *more in keys:
        assert letter in known, f"no document names {(letter, *more)}"
        assert [type(e) for e in more] == known[letter], (letter, *more)
    branch = served.json("info", "example")["branch"]
    epoch = served.json("info", "example")["epoch"]
    for key in (("m",), ("c",), ("n", "example"), ("n", "other"), ("h", branch), ("o", branch),
                ("a", branch), ("i", branch, 1, 0, epoch)):
        assert key in keys, key
    assert {k for k in keys if k[0] == "b"} == {("b", branch, epoch, n) for n in (0, 3, 300)}
    assert len([k for k in keys if k[0] == "s"]) == 1
    # Readable at a glance too: letters and numbers, the name of the volume in plain text.
    said = cluster.cli(f"getrangekeys {prefix_begin(prefix)} {prefix_begin(prefix)}\\xff")
    assert f"\\x02{prefix}\\x00\\x02n\\x00\\x02example\\x00" in said
    h.shutdown()
    served.stop()
    # Nothing of a server stays once it ended cleanly.
    left = {key[0] for key, _ in cluster.rows(prefix)}
    assert not left & {"s", "q", "r", "x"}, left


def prefix_begin(prefix):
    return tuples.escape(tuples.pack(prefix))


def block_bytes(s):
    return s.json("info", "example")["block_size_bytes"]


def test_nothing_lies_outside_the_prefix(cluster, store, served):
    before = outside(cluster)
    with_data = connect(served)
    with_data.pwrite(b"x" * 512, 0)
    with_data.shutdown()
    served.cli("create", "more", "1M")
    served.cli("remove", "other", "--yes")
    assert outside(cluster) == before


def outside(cluster):
    """The first elements of all keys."""
    said = cluster.cli("getrangekeys \\x00 \\xff 100000")
    keys = [tuples.unescape(line[1:-1]) for line in said.splitlines() if line.startswith("`")]
    return {tuples.unpack(k)[0] for k in keys}


@pytest.mark.parametrize("how", ["gone", "changed", "cut", "of another block"])
def test_G5_a_damaged_block_is_an_error_for_itself_alone(cluster, store, served, rng, how):
    prefix = cluster.prefix_in(store)
    h = connect(served)
    block = block_bytes(served)
    data = [rng.randbytes(block) for _ in range(8)]
    for n, d in enumerate(data):
        h.pwrite(d, n * block)
    h.flush()
    rows = dict(cluster.rows(prefix, "b"))
    (key,) = [k for k in rows if k[-1] == 5]
    h.shutdown()
    served.stop()
    value, where = bytearray(rows[key]), tuples.pack(prefix, *key)
    if how == "gone":
        cluster.clear(where)
    elif how == "changed":
        value[rng.randrange(24, len(value))] ^= 1 << rng.randrange(8)
        cluster.set(where, value)
    elif how == "cut":
        cluster.set(where, value[:-1])
    else:
        cluster.set(where, rows[(*key[:-1], 6)])
    served.start()
    h = connect(served)
    for n, d in enumerate(data):
        if n != 5:
            assert h.pread(block, n * block) == d
            continue
        with pytest.raises(nbd.Error) as e:
            h.pread(512, n * block)
        assert e.value.errnum == errno.EIO
    with pytest.raises(nbd.Error):
        h.pread(3 * block, 4 * block)
    # Overwritten whole it is healthy again.
    h.pwrite(data[5], 5 * block)
    assert h.pread(8 * block, 0) == b"".join(data)
    h.shutdown()


def test_G5_a_damaged_record_is_said_by_name(cluster, store, served):
    prefix = cluster.prefix_in(store)
    served.stop()
    branch = served.json("info", "example")["branch"]
    key = ("h", branch)
    value = bytearray(dict(cluster.rows(prefix, "h"))[key])
    value[len(value) // 2] ^= 4
    cluster.set(tuples.pack(prefix, *key), value)
    done = served.cli("info", "example", check=False)
    assert done.returncode != 0 and "damaged" in done.stderr, done
    assert done.stderr.count("\n") == 1
    # The others are none the worse for it.
    served.volumes = {}
    served.start()
    h = connect(served, "other")
    h.pwrite(b"x" * 512, 0)
    h.shutdown()
    wait_until(lambda: served.json("info", "other")["used_bytes"] > 0, 30 * SLOW,
               "the other volume is in use")
