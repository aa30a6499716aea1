"""Lets this folder run alone with the options and fixtures all tests share."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "tls")]

from harness.fixtures import *  # noqa: E402,F401,F403

import pytest  # noqa: E402

from life import Life  # noqa: E402


@pytest.fixture
def life(folder):
    return Life(folder)
