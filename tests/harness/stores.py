"""Which engine the tests run on: --store=lmdb (the default) or --store=fdb, or STORE.

A test that needs a store names it by a path. On the embedded engine that is the folder it lies
in; on FoundationDB it stands for a prefix of its own in the cluster that the test run shares.
"""

import os

from . import cluster

ENGINES = ("lmdb", "fdb")
# A server in a network namespace reaches only a cluster in there: kernel tests put one here.
_cluster = None
_engine = os.environ.get("STORE") or "lmdb"


def choose(engine):
    global _engine
    if engine not in ENGINES:
        raise ValueError(f"no such store engine: {engine}")
    _engine = engine


def engine():
    return _engine


def on_fdb():
    return _engine == "fdb"


def use_cluster(one):
    """All stores from now on are in this cluster; None: in the one that is shared."""
    global _cluster
    _cluster = one


def _fdb():
    return _cluster or cluster.shared()


def uri(path):
    """The store that `path` stands for."""
    return _fdb().store(path) if on_fdb() else f"lmdb:{path}"


def env():
    """What a program needs in its environment to reach it."""
    return _fdb().client_env() if on_fdb() else {}


def prefix():
    """The words before a command that is to reach it."""
    return _fdb().prefix if on_fdb() else []
