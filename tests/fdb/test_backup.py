"""FoundationDB's own backup, as docs/foundationdb.md has it: taken while gateways write, restored
into another cluster, served there (G1, G2, G3)."""

import os
import time

import pytest

from harness import cluster as clusters
from harness.fixtures import new_folder
from harness.gateway import gateway
from harness.history import Check, keep_evidence
from harness.load import Background, Load, Shape, content
from harness.rawnbd import connect
from harness.server import CLI_LIMIT_S, SLOW, wait_until

pytestmark = pytest.mark.fdb

MIB = 1 << 20
SIZE = 16 * MIB + 512
LEASE_MS = 3000


@pytest.fixture
def tools():
    try:
        return clusters.BackupTools()
    except clusters.Missing as e:
        # Half of them is an installation that is broken.
        if "fdbbackup" not in str(e) and os.environ.get("REQUIRE_FDB", "0") not in ("", "0"):
            pytest.fail(f"{e}, and REQUIRE_FDB is set", pytrace=False)
        pytest.skip(str(e))


def fill(server, name, first):
    with connect(server, name) as c:
        for at in range(0, SIZE, MIB):
            c.write(at, content(first, at, min(at + MIB, SIZE)))
        return c.read_all()


@pytest.mark.limit(420)
def test_backup_under_load_and_restore(tools, folder, rng):
    with clusters.Cluster() as source, clusters.Cluster() as target:
        store = source.uri("volumes")
        gateways = [gateway(source, folder / f"a{i}", {name: SIZE}, store=store,
                            lease_ms=LEASE_MS).start() for i, name in enumerate("vw")]
        before = [fill(s, name, 1) for s, name in zip(gateways, "vw")]
        gateways[0].cli("snapshot", "create", "v@first")
        shape = Shape(SIZE, connections=2, depth=4, ops=1 << 30, pace_us=5000)
        loads = [Load(s, name, shape, rng, 2 + (i << 24))
                 for i, (s, name) in enumerate(zip(gateways, "vw"))]
        with Background(loads[0], 300 * SLOW) as one, Background(loads[1], 300 * SLOW) as two:
            wait_until(lambda: all(len(load.ops) > 100 for load in loads), 60 * SLOW, "a load")
            with source.backup_agent():
                asked_ns = time.monotonic_ns()
                url = source.backup(folder / "backup", limit_s=200)
                done_ns = time.monotonic_ns()
            assert one.running() and two.running()
        for load in loads:
            load.close()
        # The gateways live on, and cannot be asked for anything there: it is another cluster.
        with target.backup_agent():
            target.restore(url, limit_s=100)
        with gateway(target, folder / "b", store=target.uri("volumes"), lease_ms=LEASE_MS) as s:
            for i, name in enumerate("vw"):
                with connect(s, name, timeout_s=60 * SLOW) as c:
                    after = c.read_all()
                ops = [op for op in loads[i].sent() if op.sent_ns < done_ns]
                required = {op for op in ops if op.answered_ns is not None and not op.error
                            and op.answered_ns < asked_ns}
                assert required
                try:
                    Check(before[i], ops, after, required).run()
                except AssertionError as e:
                    kept = keep_evidence(new_folder() / "backup", before[i], ops, after)
                    raise AssertionError(f"{name}: {e}\nkept: {kept}") from None
                s.cli("verify", name, limit_s=CLI_LIMIT_S)
            with connect(s, "v@first") as c:
                assert c.read_all() == before[0]
            # It goes on there.
            with connect(s, "v") as c:
                c.write(0, b"x" * 4096)
                assert c.read(0, 4096) == b"x" * 4096
        for s in gateways:
            s.stop()


def test_store_backup_points_to_it(run, folder):
    run("create", "v", "8M")
    done = run("store", "backup", folder / "copy", check=False)
    assert done.returncode == 1
    assert "fdbbackup" in done.stderr and "docs/foundationdb.md" in done.stderr
    assert not (folder / "copy").exists() and not (folder / "copy.partial").exists()
