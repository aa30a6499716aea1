"""A thousand volumes that nobody writes to cost next to nothing: the process has one session, and
one heartbeat, however many volumes it serves."""

import os
import time

import pytest

from harness import rawnbd
from harness.gateway import gateway
from harness.server import SLOW, wait_until

pytestmark = pytest.mark.fdb

VOLUMES = int(os.environ.get("IDLE_VOLUMES", "1000"))
WATCHED_S = 15


def cpu_s(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.limit(400)
def test_a_thousand_idle_volumes(cluster, folder, store):
    prefix = cluster.prefix_in(store)
    names = [f"v{n}" for n in range(VOLUMES)]
    server = gateway(cluster, folder / "s", {name: "16M" for name in names}, store=store)
    began = time.monotonic()
    server.start()
    print(f"{VOLUMES} volumes created in {time.monotonic() - began:.1f} s")
    clients = []
    try:
        began = time.monotonic()
        for n, name in enumerate(names):
            c = rawnbd.connect(server, name)
            c.write(0, bytes([n % 251 + 1]) * 4096)
            clients.append(c)
        print(f"{VOLUMES} volumes opened and written in {time.monotonic() - began:.1f} s")
        # What is done behind the writes must be over.
        wait_until(lambda: quiet(cluster, prefix), 60 * SLOW, "nothing but heartbeats is written",
                   0.1)
        before, cpu, began = dict(cluster.rows(prefix)), cpu_s(server.pid), time.monotonic()
        # Not a wait for anything: the time that is looked at.
        time.sleep(WATCHED_S)
        used, took = cpu_s(server.pid) - cpu, time.monotonic() - began
        after = dict(cluster.rows(prefix))
        print(f"{used:.2f} s of CPU in {took:.1f} s: {100 * used / took:.2f}% of a core")
        # The keys under "x" number the commits, of which each heartbeat is one.
        changed = {k for k in {*before, *after} if before.get(k) != after.get(k)}
        assert len([k for k in changed if k[0] != "x"]) == 1, changed
        assert {k[0] for k in changed} == {"s", "x"}, changed
        assert len([k for k in after if k[0] == "s"]) == 1
        commits = sum(number(after.get(k)) - number(before.get(k)) for k in changed if k[0] == "x")
        print(f"{commits} commits")
        # A lease is 10 s, and a heartbeat comes a few times in that.
        assert 1 <= commits <= WATCHED_S
        assert used / took < 0.01 * SLOW
        # All of them are still there and theirs.
        for n, c in enumerate(clients):
            assert c.read(0, 4096) == bytes([n % 251 + 1]) * 4096
    finally:
        for c in clients:
            c.close()
        server.stop() if server.running() else server.kill()


def quiet(cluster, prefix):
    """Whether only session keys change while one looks twice."""
    first = {k: v for k, v in cluster.rows(prefix) if k[0] not in "sx"}
    time.sleep(1)
    return first == {k: v for k, v in cluster.rows(prefix) if k[0] not in "sx"}


def number(value):
    """The commit number that such a key holds (docs/format-fdb.md)."""
    return int.from_bytes((value or b"")[:8], "little")
