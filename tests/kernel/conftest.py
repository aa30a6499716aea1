"""Lets this folder run alone with the options and fixtures all tests share, and boots a guest for
each file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import stores, uml  # noqa: E402
from harness.cluster import Cluster  # noqa: E402
from harness.fixtures import *  # noqa: E402,F401,F403


@pytest.fixture(scope="module")
def namespace():
    why = uml.missing()
    if why:
        pytest.skip(f"no user-mode-linux here: {why}")
    made = uml.Namespace()
    one = None
    try:
        if stores.on_fdb():
            # The server in the namespace reaches no cluster outside.
            one = Cluster(prefix=made.enter).start()
            stores.use_cluster(one)
        yield made
    finally:
        stores.use_cluster(None)
        if one:
            one.end()
        made.end()


@pytest.fixture(scope="module")
def guest(namespace, module_folder):
    made = uml.Guest(module_folder, namespace)
    yield made
    made.end()
