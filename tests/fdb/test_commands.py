"""What keeps FoundationDB from being used is said in one clear sentence, soon, and with an exit
status that says the store is unavailable. Only a server that was started before its cluster
waits for it."""

import ctypes.util
import os
import subprocess
import time

import nbd
import pytest

from harness.cluster import Cluster
from harness.gateway import gateway
from harness.server import SLOW, cli, free_port, program, wait_until

pytestmark = pytest.mark.fdb

USAGE, STORE = 2, 4
SOON_S = 30 * SLOW


def refused(store, *words, env=None, status=STORE, prefix=()):
    """What the command says when it does not get to its store."""
    began = time.monotonic()
    done = cli(store, *words, check=False, env=env, prefix=prefix)
    took = time.monotonic() - began
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stderr.startswith("fdb-nbd: ") and done.stderr.endswith("\n"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert took < SOON_S, f"said after {took:.1f} s: {done.stderr}"
    print(f"{took:.1f} s: {done.stderr}")
    return done.stderr


COMMANDS = [["list"], ["create", "a", "1M"], ["info", "a"]]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda w: w[0])
def test_named_library_that_is_not_there(store, words):
    said = refused(store, *words, env={"FDB_NBD_LIBFDB_C": "/nowhere/libfdb_c.so"})
    assert "FDB_NBD_LIBFDB_C" in said and "/nowhere/libfdb_c.so" in said


@pytest.mark.parametrize("words", [*COMMANDS, ["serve", "--listen", "localhost:0"]],
                         ids=lambda w: w[0])
def test_no_library(store, words):
    """Hidden in a mount namespace of the command's own: an empty file lies over each one."""
    places = [f"{folder}/libfdb_c.so" for folder in
              ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/lib/x86_64-linux-gnu")]
    found = [p for p in places if os.path.exists(p)]
    if not found or ctypes.util.find_library("fdb_c") and not found:
        pytest.fail(f"libfdb_c.so is in none of {places}: name its folder here")
    hide = "; ".join(f"mount --bind /dev/null {p}" for p in found) + '; exec "$@"'
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    said = refused(store, *words, env={"LD_LIBRARY_PATH": ""},
                   prefix=["unshare", "--mount", *user, "sh", "-ec", hide, "sh"])
    assert "install the foundationdb-clients package" in said


def test_library_that_is_another_one(store):
    libc = next(line.split()[-1] for line in open("/proc/self/maps") if "libc.so" in line)
    said = refused(store, "list", env={"FDB_NBD_LIBFDB_C": libc})
    assert "lacks fdb_" in said


@pytest.mark.parametrize("words", [*COMMANDS, ["serve", "--listen", "localhost:0"]],
                         ids=lambda w: w[0])
def test_no_cluster_file(folder, words):
    said = refused(f"fdb:{folder}/none.cluster", *words)
    assert f"{folder}/none.cluster" in said and "cluster file" in said


def test_no_cluster_file_where_every_tool_looks(folder):
    """FDB_CLUSTER_FILE is obeyed, and named when it is wrong."""
    said = refused("fdb:", "list", env={"FDB_CLUSTER_FILE": f"{folder}/from-env"})
    assert f"{folder}/from-env" in said


def test_cluster_file_from_the_environment(cluster, store, run):
    run("create", "a", "1M")
    short = "fdb:?" + store.split("?")[1]
    done = cli(short, "list", env={**cluster.client_env(), "FDB_CLUSTER_FILE": str(cluster.file)})
    assert "a" in done.stdout.split()


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n", "a:b@\n", "a:b@127.0.0.1\n",
                                  "a:b@127.0.0.1:99999999\n", "\0\1\2", "x" * 100000])
def test_malformed_cluster_file(folder, text):
    (folder / "bad.cluster").write_text(text)
    said = refused(f"fdb:{folder}/bad.cluster", "list")
    assert "bad.cluster" in said


def test_cluster_file_that_may_not_be_read(folder):
    """A folder in its place: nobody can read that, root included."""
    (folder / "dir.cluster").mkdir()
    assert "dir.cluster" in refused(f"fdb:{folder}/dir.cluster", "list")


def test_nobody_there(folder):
    (folder / "fdb.cluster").write_text(f"a:b@127.0.0.1:{free_port()}\n")
    said = refused(f"fdb:{folder}/fdb.cluster", "list")
    assert "does not answer" in said and "fdbcli" in said


@pytest.mark.limit(200)
def test_cluster_that_stands_still(folder):
    with Cluster() as own:
        own.pause()
        said = refused(own.store(), "list", env=own.client_env())
        assert "does not answer" in said
        own.resume()


@pytest.mark.parametrize("query", ["?prefix=", "?prefix=a b", "?prefix=" + "x" * 5000,
                                   "?colour=red", "?prefix=a?prefix=b"])
def test_bad_store_text(cluster, query):
    done = cli(f"fdb:{cluster.file}{query}", "list", check=False, env=cluster.client_env())
    assert done.returncode in (USAGE, STORE), done
    assert done.stderr.startswith("fdb-nbd: ") and done.stderr.count("\n") == 1, done.stderr


def test_stores_of_two_prefixes_do_not_meet(cluster):
    """Not even where one prefix begins as the other does."""
    stores = [cluster.uri(p) for p in ("shared", "shared2", "shared/3")]
    env = cluster.client_env()
    for n, store in enumerate(stores):
        cli(store, "create", f"v{n}", "1M", env=env)
    for n, store in enumerate(stores):
        assert f"v{n}" in cli(store, "list", env=env).stdout
        for other in {0, 1, 2} - {n}:
            assert f"v{other}" not in cli(store, "list", env=env).stdout
    cli(stores[0], "remove", "v0", "--yes", env=env)
    assert "v1" in cli(stores[1], "list", env=env).stdout


@pytest.mark.limit(200)
def test_server_started_before_its_cluster(folder):
    """It waits, says so, and serves when the cluster comes; a client of the first hour
    is served too."""
    own = Cluster()
    try:
        own.prepare()
        server = gateway(own, folder / "s", {"a": "1M"})
        server.start(wait=False)
        try:
            wait_until(lambda: "waiting for FoundationDB" in server.log(), 30 * SLOW,
                       "the server says that it waits")
            server.check_alive()
            own.start()
            wait_until(server._ready, 60 * SLOW, "the server serves")
            assert "FoundationDB answers" in server.log()
            h = nbd.NBD()
            h.connect_uri(server.uri("a"))
            h.pwrite(b"x" * 512, 0)
            assert h.pread(512, 0) == b"x" * 512
            h.shutdown()
            server.stop()
        finally:
            server.kill()
    finally:
        own.end()


def test_waiting_server_ends_on_sigterm(folder):
    own = Cluster()
    try:
        own.prepare()
        server = gateway(own, folder / "s", {"a": "1M"})
        server.start(wait=False)
        wait_until(lambda: "waiting for FoundationDB" in server.log(), 30 * SLOW,
                   "the server says that it waits")
        server.stop(check=False, limit_s=10 * SLOW)
    finally:
        own.end()


def test_commands_do_not_need_the_library_for_lmdb(folder):
    """Who has no FoundationDB is not asked for it."""
    done = subprocess.run([*program(), "--store", f"lmdb:{folder}/store", "create", "a", "1M"],
                          env=dict(os.environ, FDB_NBD_LIBFDB_C="/nowhere"), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
