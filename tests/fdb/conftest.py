"""Lets this folder run alone with the options and fixtures all tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.fixtures import *  # noqa: E402,F401,F403

import pytest  # noqa: E402

from harness import cluster as clusters  # noqa: E402
from harness.server import cli  # noqa: E402


@pytest.fixture(scope="session")
def cluster():
    """The cluster of one process that a test run shares."""
    return clusters.shared()


@pytest.fixture
def store(cluster):
    """A store of the test's own in the shared cluster."""
    return cluster.store()


@pytest.fixture
def run(cluster, store):
    """run(words...) runs the command line on `store`."""
    def go(*words, **more):
        more.setdefault("env", cluster.client_env())
        return cli(store, *words, **more)
    return go


@pytest.fixture(scope="module")
def three():
    """A cluster of three processes that keeps everything twice."""
    with clusters.Cluster(3) as made:
        yield made
