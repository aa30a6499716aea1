"""One limit for all the memory a server uses: its own and the page cache of its files.

Servers differ in where they keep data (their own cache, the kernel's, or all of it in memory), so
only a limit on both together compares them. That is what a memory cgroup counts: version 2 where
its root has the memory controller, else version 1. Groups are made at the root of the hierarchy,
because version 2 lets no group that has processes of its own hand controllers down.
"""

import contextlib
import itertools
import os
import time
from pathlib import Path

V2_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
V1_ROOT = Path("/sys/fs/cgroup/memory")
REMOVE_LIMIT_S = 5

numbers = itertools.count(1)


def find():
    """(version, root) of the memory controller; (0, why not) where none can be used."""
    for root in V2_ROOTS:
        with contextlib.suppress(OSError):
            if "memory" not in (root / "cgroup.controllers").read_text().split():
                continue
            if "memory" not in (root / "cgroup.subtree_control").read_text().split():
                (root / "cgroup.subtree_control").write_text("+memory")
            return (2, root) if os.access(root, os.W_OK) else (0, f"{root} cannot be written")
    if (V1_ROOT / "memory.limit_in_bytes").exists():
        return (1, V1_ROOT) if os.access(V1_ROOT, os.W_OK) else (0, f"{V1_ROOT} cannot be written")
    return 0, "no memory controller of cgroups can be used here"


class Limit:
    """A cgroup of `size` bytes; without one (`find` says why) everything works, unlimited."""

    def __init__(self, size):
        version, root = find()
        self.folder = None
        if not version:
            return
        self.peak_file = "memory.peak" if version == 2 else "memory.max_usage_in_bytes"
        self.folder = root / f"fdb-nbd-bench-{os.getpid()}-{next(numbers)}"
        self.folder.mkdir()
        try:
            (self.folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(
                str(size))
        except OSError:
            self.end()
            raise
        # Where there is swap, and it is counted: none of it.
        with contextlib.suppress(OSError):
            if version == 2:
                (self.folder / "memory.swap.max").write_text("0")
            else:
                (self.folder / "memory.memsw.limit_in_bytes").write_text(str(size))

    def wrap(self, words):
        """The command, in the group from its first moment."""
        if not self.folder:
            return words
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.folder / "cgroup.procs"), *words]

    def peak_bytes(self):
        """The most that was ever used, or None where the kernel does not say."""
        with contextlib.suppress(OSError, TypeError):
            return int((self.folder / self.peak_file).read_text())
        return None

    def end(self):
        """Once its processes have ended. The kernel may need a moment more."""
        until = time.monotonic() + REMOVE_LIMIT_S
        while self.folder:
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                print(f"left behind: {self.folder}", flush=True)
            self.folder = None
