"""Lets this folder run alone with the options and fixtures all tests share."""

import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from harness import preload  # noqa: E402
from harness.fixtures import *  # noqa: E402,F401,F403
from harness.fixtures import new_folder  # noqa: E402
from plan import Base  # noqa: E402


@pytest.fixture(scope="session")
def faults():
    """faults.c, built: what stands between a program and the system calls on its files."""
    with preload.built(HERE / "faults.c") as library:
        yield library


@pytest.fixture(scope="session")
def fast_folder():
    """Memory where there is enough of it: a store is copied for every case."""
    where = "/dev/shm" if (os.access("/dev/shm", os.W_OK)
                           and shutil.disk_usage("/dev/shm").free > 3 << 30) else None
    path = new_folder(where)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def base(fast_folder, faults):
    return Base(fast_folder / "base", faults)
