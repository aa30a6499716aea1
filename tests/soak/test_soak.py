"""A short soak, so that the driver itself stays true; `make soak` is the hour."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("SOAK_S") or 25)


@pytest.mark.limit(SECONDS + 300)
def test_soak(seed):
    done = subprocess.run([sys.executable, Path(__file__).with_name("soak.py"), "--seconds",
                           str(SECONDS), "--seed", str(seed)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0
    counts = dict(re.findall(r"^\| (.+) \| (.+) \|$", done.stdout, re.MULTILINE))
    # A soak in which nothing happened would prove little.
    for what in ("requests", "full checks", "reads checked", "snapshots made", "verify runs",
                 "kills: a client's connection", "hostile clients", "HTTP scrapes"):
        assert int(counts[what].replace(",", "")) > 0, what
    assert any(what.startswith(("kills: a server", "servers ")) for what in counts)
