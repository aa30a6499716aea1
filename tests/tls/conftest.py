"""Lets this folder run alone with the options and fixtures all tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.fixtures import *  # noqa: E402,F401,F403

import pytest  # noqa: E402

from pki import Pki  # noqa: E402


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    """Certificates and keys, made anew for each run."""
    return Pki(tmp_path_factory.mktemp("pki"))
