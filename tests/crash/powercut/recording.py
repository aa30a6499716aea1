"""What the tests of power cuts record: loads of several shapes, with powercut.c in between."""

import os
import time

from harness.load import Shape

MIB = 1 << 20
SIZE = 8 * MIB + 512
# How many cuts; CUTS=every: all there are, which is another test's business (test_prefixes.py).
EVERY = os.environ.get("CUTS") == "every"
CUTS = 300 if EVERY else int(os.environ.get("CUTS", "300"))

SMALL = ((512, 6), (4096, 8), (16384, 6), (65536, 2))
# name, load, how many microseconds longer each sync takes
SHAPES = [
    # One request at a time: the order is total and each FLUSH covers all before it.
    ("single", Shape(SIZE, connections=1, depth=1, ops=400, pace_us=6000, flush_every=0.1,
                     lengths=SMALL), "100-4000"),
    # Several connections, deep, with all sizes.
    ("mixed", Shape(SIZE, connections=3, depth=4, ops=350, pace_us=10000,
                    lengths=SMALL + ((300000, 1), (5 * MIB, 0.3))), "100-4000"),
    # A small part of the volume, over and over: old versions of a block abound.
    ("hot", Shape(SIZE, connections=1, depth=16, ops=700, pace_us=4000, hot=0.95, hot_part=32,
                  flush_every=0.04, fua=0.04, lengths=SMALL), "100-4000"),
    # A disk so slow that the next generation is ready before the last one is in.
    ("slow", Shape(SIZE, connections=1, depth=32, ops=500, pace_us=9000, hot=0.7, hot_part=64,
                   flush_every=0.01, fua=0.005, lengths=SMALL), "200000-800000"),
    # In bursts without pauses, so that generations fill while others are committed.
    ("burst", Shape(SIZE, connections=2, depth=16, ops=500, flush_every=0.03, fua=0.02,
                    lengths=SMALL + ((1 << 20, 1),)), "100-4000"),
    # Zeroes and trims beside writes: space is given back and used again.
    ("trims", Shape(SIZE, connections=2, depth=4, ops=400, pace_us=8000, zeros=0.25, trims=0.25,
                    lengths=SMALL + ((300000, 2), (3 * MIB, 1))), "100-4000"),
]


def under(shim, root, trace, seed, sync_us):
    return ["env", f"LD_PRELOAD={shim}", f"POWERCUT_ROOT={root}", f"POWERCUT_TRACE={trace}",
            f"POWERCUT_SYNC_US={sync_us}", f"POWERCUT_SEED={seed}",
            # A sanitizer's library would want to be the first one loaded.
            "ASAN_OPTIONS=verify_asan_link_order=0"]


def quiet(trace, for_s):
    """True once nothing has been added to the trace for a while."""
    seen = [trace.stat().st_size, time.monotonic()]

    def check():
        size = trace.stat().st_size
        if size != seen[0]:
            seen[:] = [size, time.monotonic()]
        return time.monotonic() - seen[1] >= for_s
    return check
