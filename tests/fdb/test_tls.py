"""FoundationDB's own settings reach its library: TLS, and external client libraries."""

import shutil
from pathlib import Path

import nbd
import pytest

from harness.cluster import Cluster
from harness.gateway import gateway

pytestmark = pytest.mark.fdb


def journey(server, rng):
    data = rng.randbytes(300000)
    h = nbd.NBD()
    h.connect_uri(server.uri("v"))
    h.pwrite(data, 12345)
    assert h.pread(len(data), 12345) == data
    h.shutdown()
    server.stop()
    server.start()
    h = nbd.NBD()
    h.connect_uri(server.uri("v"))
    assert h.pread(len(data), 12345) == data
    h.shutdown()
    assert "v" in server.cli("list").stdout.split()


@pytest.fixture(scope="module")
def secured():
    with Cluster(tls=True) as made:
        yield made


def test_tls(secured, folder, rng):
    with gateway(secured, folder / "s", {"v": "16M"}) as server:
        journey(server, rng)


@pytest.mark.limit(200)
def test_tls_without_a_certificate_says_that_nobody_answers(secured, folder):
    server = gateway(secured, folder / "s", {"v": "16M"})
    for name in secured.tls.client_env():
        server.env.pop(name)
    done = server.cli("list", check=False)
    assert done.returncode == 4 and "does not answer" in done.stderr, done
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_external_client_library(cluster, folder, rng, threads):
    """A copy of the library in a folder, and the one that was loaded first not used at all: that
    is how a gateway outlives an upgrade of its cluster."""
    libraries = folder / "libraries"
    libraries.mkdir()
    library = Path(cluster.programs.client)
    if not library.is_file():
        pytest.fail("set LIBFDB_C: this library was found by name only")
    shutil.copy(library, libraries / "libfdb_c_other.so")
    env = {"FDB_NETWORK_OPTION_EXTERNAL_CLIENT_DIRECTORY": str(libraries),
           "FDB_NETWORK_OPTION_DISABLE_LOCAL_CLIENT": ""}
    if threads > 1:
        del env["FDB_NETWORK_OPTION_DISABLE_LOCAL_CLIENT"]
        env["FDB_NETWORK_OPTION_CLIENT_THREADS_PER_VERSION"] = str(threads)
    with gateway(cluster, folder / "s", {"v": "16M"}, env=env) as server:
        mapped = Path(f"/proc/{server.pid}/maps").read_text()
        assert "libfdb_c_other" in mapped, [
            line for line in mapped.splitlines() if "fdb_c" in line]
        journey(server, rng)
