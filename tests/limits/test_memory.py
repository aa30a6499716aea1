"""Memory stays inside the budget, whatever clients do (G6).

64 connections write 32 MiB requests as fast as they can to a store whose disk is
made slow (slowdisk.c, a double). What the process ever had resident may be the
cache, 64 MiB, and 64 KiB for each connection.
"""

import subprocess
from pathlib import Path

import pytest

from harness.flood import Flood, peak_kib
from harness.server import SLOW, Server

pytestmark = pytest.mark.lmdb("it makes a disk slow; fdb/test_outage.py stops a cluster")

CONNECTIONS = 64
CACHE_MIB = 128
SECONDS = 12


@pytest.fixture(scope="module")
def slowdisk(tmp_path_factory):
    out = tmp_path_factory.mktemp("shim") / "slowdisk.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", out,
                    Path(__file__).with_name("slowdisk.c"), "-ldl"], check=True)
    return out


@pytest.mark.limit(300)
def test_G6_memory_with_64_connections_of_32_mib_writes_to_a_slow_store(tmp_path, slowdisk):
    env = {"LD_PRELOAD": str(slowdisk), "SLOW_SYNC_MS": "100", "SLOW_BYTES_PER_S": "50000000"}
    with Server(tmp_path, {"big": "16G"}, ["--cache-size", f"{CACHE_MIB}M"], env=env) as server:
        flood = Flood(server, "big", CONNECTIONS)
        flood.run(SECONDS * SLOW)
        limit = CACHE_MIB * 1024 + 64 * 1024 + CONNECTIONS * 64
        peak = peak_kib(server.pid)
        print(f"sent {flood.sent() >> 20} MiB, {flood.answered()} requests answered, "
              f"peak {peak >> 10} MiB of {limit >> 10} MiB")
        assert flood.sent() > 2 * CACHE_MIB << 20, "the load was too small to prove anything"
        assert peak <= limit
        flood.close()
