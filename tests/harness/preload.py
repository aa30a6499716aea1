"""Libraries for LD_PRELOAD, built of a source of the tests: what stands between a program and the
system calls on its files."""

import contextlib
import os
import shutil
import subprocess

from harness.fixtures import new_folder


@contextlib.contextmanager
def built(source):
    """The library's path, as long as it lasts."""
    folder = new_folder()
    out = folder / f"{source.stem}.so"
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared",
                    "-fPIC", "-o", out, source, "-lpthread", "-ldl"], check=True)
    try:
        yield out
    finally:
        shutil.rmtree(folder, ignore_errors=True)
