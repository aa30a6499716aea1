"""Lets this folder run alone with the options and fixtures all tests share."""

import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from harness import preload  # noqa: E402
from harness.fixtures import *  # noqa: E402,F401,F403
from harness.fixtures import new_folder  # noqa: E402


@pytest.fixture(scope="session")
def shim():
    """powercut.c, built: what stands between a server and its files."""
    with preload.built(HERE / "powercut" / "powercut.c") as library:
        yield library


@pytest.fixture
def fast_folder():
    """Memory where there is enough of it: hundreds of images are written and dropped."""
    where = None
    try:
        if shutil.disk_usage("/dev/shm").free > 3 << 30 and os.access("/dev/shm", os.W_OK):
            where = "/dev/shm"
    except OSError:
        pass
    path = new_folder(where)
    yield path
    shutil.rmtree(path, ignore_errors=True)
