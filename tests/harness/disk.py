"""A small file system of a test's own, to be filled."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def disk(folder, mib):
    """An ext4 of so many MiB, mounted in `folder`; skips the test where nothing can be mounted."""
    image, mount = folder / "disk.img", folder / "disk"
    mount.mkdir()
    with open(image, "wb") as f:
        f.truncate(mib << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    with mounted(["-o", "loop", image], mount):
        yield mount


@contextlib.contextmanager
def memory_disk(folder, mib):
    """The same in memory: a tmpfs, which can grow while it is in use."""
    mount = folder / "memory"
    mount.mkdir()
    with mounted(["-t", "tmpfs", "-o", f"size={mib}M", "fdb-nbd-test"], mount):
        yield mount


@contextlib.contextmanager
def mounted(what, mount):
    done = subprocess.run(["mount", *what, mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop mounts on this machine: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", mount], check=True)


def grow(mount, mib):
    """Makes a disk in memory that large."""
    subprocess.run(["mount", "-o", f"remount,size={mib}M", mount], check=True)
