"""Drives faults.c: says which call of a program is to fail, and how, and counts its calls."""

import mmap
import os
import struct
from contextlib import contextmanager
from dataclasses import dataclass

# In the order of faults.c.
KINDS = ("open", "read", "write", "sync write", "submit", "allocate", "punch", "truncate", "sync",
         "sync range", "map", "rename", "unlink", "mkdir", "lock")
FILES = ("data.mdb", "lock.mdb", "blocks", "log", "session", "processes", "reserve", "bell",
         "folder", "other")
EINTR, EIO, ENOSPC = 4, 5, 28
HOWS = {"EINTR": EINTR, "EIO": EIO, "ENOSPC": ENOSPC, "short": 1000, "half": 1001, "late": 1002,
        "drop": 1003}
ALWAYS = 0xFFFFFFFF

_ARM = struct.Struct("<IIIIiIII")
_COUNTS_AT = 64


@dataclass(frozen=True)
class Fault:
    kind: str
    file: str
    how: str
    nth: int = 1            # of such calls from the arming on; the first that fails
    always: bool = False    # and so does every later one

    def __str__(self):
        which = f"from the {self.nth}. on" if self.always else f"the {self.nth}."
        return f"{self.kind} of {self.file}, {which}: {self.how}"


class Control:
    """The page that a program under faults.c shares with the test."""

    def __init__(self, path):
        self.path = path
        path.write_bytes(bytes(4096))
        with open(path, "r+b") as f:
            self.map = mmap.mmap(f.fileno(), 4096)

    def close(self):
        self.map.close()

    def arm(self, fault):
        self.disarm()
        values = (KINDS.index(fault.kind), FILES.index(fault.file), HOWS[fault.how],
                  fault.nth - 1, ALWAYS if fault.always else 1, 0, 0)
        _ARM.pack_into(self.map, 0, 0, *values)
        # Armed last: the program looks there first.
        self.map[0:4] = struct.pack("<I", 1)

    def disarm(self):
        self.map[0:4] = bytes(4)

    @property
    def fired(self):
        return _ARM.unpack_from(self.map, 0)[6]

    @property
    def dropped(self):
        return _ARM.unpack_from(self.map, 0)[7]

    def counts(self):
        """{(kind, file): calls so far}, of those that were made at all."""
        flat = struct.unpack_from(f"<{len(KINDS) * len(FILES)}I", self.map, _COUNTS_AT)
        return {(kind, file): flat[k * len(FILES) + f] for k, kind in enumerate(KINDS)
                for f, file in enumerate(FILES) if flat[k * len(FILES) + f]}


def since(counts, before):
    return {key: n - before.get(key, 0) for key, n in counts.items() if n > before.get(key, 0)}


def words(shim, root, control, drop=False):
    """What goes before a command that is to run under the shim."""
    out = ["env", f"LD_PRELOAD={shim}", f"FAULTS_ROOT={root}", f"FAULTS_CONTROL={control.path}",
           # A sanitizer's library would want to be the first one loaded.
           "ASAN_OPTIONS=verify_asan_link_order=0"]
    return out + ["FAULTS_DROP=1"] if drop else out


@contextmanager
def controlled(path):
    control = Control(path)
    try:
        yield control
    finally:
        control.close()
        os.unlink(path)


def hows_for(kind):
    """In which ways such a call can fail."""
    return {"read": ("EIO", "short", "EINTR"),
            "write": ("EIO", "ENOSPC", "short", "half", "late", "EINTR"),
            "sync write": ("EIO", "ENOSPC", "short", "half", "late"),
            "submit": ("EIO", "EINTR"),
            "sync": ("EIO", "ENOSPC", "late", "drop"),
            "sync range": ("EIO",),
            "allocate": ("EIO", "ENOSPC", "EINTR"),
            "punch": ("EIO",),
            "rename": ("EIO", "ENOSPC", "late"),
            "unlink": ("EIO", "late"),
            "mkdir": ("EIO", "ENOSPC"),
            "open": ("EIO", "ENOSPC"),
            "lock": ("EIO",),
            }.get(kind, ("EIO", "ENOSPC"))
