"""That a store is there, and is finished, must be durable before anything is written to it (G1)."""

import os
import re
import subprocess

import pytest

from harness.server import program

pytestmark = pytest.mark.lmdb("about the files of the embedded store")


def test_the_folder_is_synced_before_anything_is_written(folder):
    """Whoever made the store may have died between the removal of "making" and the sync of it."""
    store, trace = folder / "store", folder / "trace"
    command = [*program(), "--store", f"lmdb:{store}", "create"]
    subprocess.run([*command, "v", "1M"], check=True, stdout=subprocess.DEVNULL)
    # Leaks can't be looked for under a tracer.
    env = dict(os.environ, ASAN_OPTIONS="detect_leaks=0:" + os.environ.get("ASAN_OPTIONS", ""))
    subprocess.run(["strace", "-f", "-qq", "-y", "-o", trace, "-e",
                    "trace=fsync,write,writev,pwrite64,pwritev,pwritev2", *command, "w", "1M"],
                   check=True, stdout=subprocess.DEVNULL, env=env)
    calls = trace.read_text(errors="replace").splitlines()
    synced = next(i for i, line in enumerate(calls) if "fsync(" in line and f"<{store}>" in line)
    written = next(i for i, line in enumerate(calls)
                   if re.search(rf"write\w*\(\d+<{store}/(data.mdb|blocks|log/\w+)>", line))
    assert synced < written, calls[written]
