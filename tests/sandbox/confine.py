#!/usr/bin/python3
"""confine.py UNIT UID:GID WRITABLE... -- PROGRAM...: runs a program in the sandbox that a unit
asks for, on machines without systemd too.

Of the unit's directives: SystemCallFilter=, SystemCallArchitectures=native, RestrictAddressFamilies=,
RestrictNamespaces=, RestrictRealtime=, MemoryDenyWriteExecute=, LockPersonality=, NoNewPrivileges=,
CapabilityBoundingSet= (empty), User= and Group= (the numbers given), and ProtectSystem=strict with
the WRITABLE folders. A directive that should be there and is not is an error. What they refuse ends
the program with SIGSYS, where the unit has it answered with EPERM: so whatever is needed, or only
tried, shows, but for what REFUSED names. The groups of system calls are those that systemd-analyze knows.
"""

import ctypes
import ctypes.util
import os
import re
import subprocess
import sys

libc = ctypes.CDLL(None, use_errno=True)
seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
seccomp.seccomp_init.restype = ctypes.c_void_p
seccomp.seccomp_init.argtypes = [ctypes.c_uint32]
seccomp.seccomp_load.argtypes = [ctypes.c_void_p]

KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
NE, EQ, MASKED_EQ = 1, 4, 7
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 38, 24
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1
PROT_WRITE, PROT_EXEC, SHM_EXEC, CLONE_NEW_ANY = 2, 4, 0o100000, 0x7E020080
# What is tried and done without: files get the owner of their folder where that may be.
REFUSED = ("chown", "fchown", "fchownat", "lchown")
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}


class Compare(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64),
                ("b", ctypes.c_uint64)]


seccomp.seccomp_rule_add_array.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int,
                                           ctypes.c_uint, ctypes.POINTER(Compare)]


def check(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno() or -result, f"{what}: {os.strerror(-result)}")


def settings_of(unit):
    """Directive -> its values, in the order they stand."""
    found = {}
    for line in open(unit):
        match = re.fullmatch(r"([A-Z]\w*)=(.*)\n?", line)
        if match:
            found.setdefault(match[1], []).append(match[2])
    return found


def known_groups():
    """Group -> the system calls and groups in it, as systemd knows them."""
    said = subprocess.run(["systemd-analyze", "--no-pager", "syscall-filter"], capture_output=True,
                          text=True, check=True).stdout
    groups, group = {}, None
    for line in said.splitlines():
        if line.startswith("@"):
            group = groups.setdefault(line.strip(), [])
        elif line.startswith("    ") and not line.strip().startswith("#") and group is not None:
            group.append(line.strip())
        elif line.startswith("#"):
            group = None  # what this version of systemd does not know
    return groups


def allowed_calls(filters):
    groups = known_groups()

    def calls(words):
        return set().union(*(calls(groups[w]) if w.startswith("@") else {w} for w in words))

    allowed = calls(["@default"])
    for line in filters:
        names = calls(line.lstrip("~").split())
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed


class Filter:
    def __init__(self):
        self.context = seccomp.seccomp_init(KILL_PROCESS)

    def add(self, name, *compares, action=ALLOW):
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return  # of another architecture, or of a newer kernel
        array = (Compare * max(1, len(compares)))(*compares)
        check(seccomp.seccomp_rule_add_array(self.context, action, number, len(compares), array),
              name)

    def load(self):
        check(seccomp.seccomp_load(self.context), "seccomp_load")


def build(settings):
    """The filter of the directives that are about system calls."""
    def masked(arg, mask, value=0):
        return Compare(arg, MASKED_EQ, mask, value)

    for wanted in ("RestrictNamespaces=yes", "RestrictRealtime=yes", "MemoryDenyWriteExecute=yes",
                   "LockPersonality=yes", "NoNewPrivileges=yes", "CapabilityBoundingSet=",
                   "ProtectSystem=strict", "SystemCallArchitectures=native"):
        name, value = wanted.split("=")
        assert settings.get(name) == [value], f"the unit has no {wanted}"
    families = [FAMILIES[f] for line in settings["RestrictAddressFamilies"] for f in line.split()]
    special = {
        "socket": [[Compare(0, EQ, f, 0)] for f in families],
        "mmap": [[masked(2, PROT_EXEC)], [masked(2, PROT_WRITE | PROT_EXEC, PROT_EXEC)]],
        "mprotect": [[masked(2, PROT_EXEC)]],
        "pkey_mprotect": [[masked(2, PROT_EXEC)]],
        "shmat": [[masked(2, SHM_EXEC)]],
        "clone": [[masked(0, CLONE_NEW_ANY)]],
        "sched_setscheduler": [[Compare(1, EQ, policy, 0)] for policy in (0, 3, 5)],
        "personality": [[Compare(0, EQ, 0, 0)]],
        "unshare": [], "setns": []}
    made, allowed = Filter(), allowed_calls(settings["SystemCallFilter"])
    for name in REFUSED:
        if name not in allowed:
            made.add(name, action=ERRNO | 1)
    for name in sorted(allowed):
        if name == "clone3":
            # Its flags are in memory, so systemd has it look as if it were not there.
            made.add(name, action=ERRNO | 38)
            continue
        for compares in special.get(name, [[]]):
            made.add(name, *compares)
    return made


def set_mount(path, recursive, readonly):
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY if readonly else 0,
                                       0 if readonly else MOUNT_ATTR_RDONLY, 0, 0)
    done = libc.syscall(SYS_MOUNT_SETATTR, -100, path.encode(), AT_RECURSIVE if recursive else 0,
                        attributes, 32)
    check(-ctypes.get_errno() if done < 0 else 0, f"mount_setattr {path}")


def protect(writable):
    """All is read-only but these folders."""
    for path in writable:
        check(-ctypes.get_errno() if libc.mount(path.encode(), path.encode(), None, MS_BIND, None)
              else 0, f"mount {path}")
    set_mount("/", True, True)
    for path in writable:
        set_mount(path, False, False)


def main():
    unit, who, rest = sys.argv[1], sys.argv[2], sys.argv[3:]
    at = rest.index("--")
    uid, gid = (int(x) for x in who.split(":"))
    made = build(settings_of(unit))
    check(-ctypes.get_errno() if libc.unshare(CLONE_NEWNS) else 0, "unshare")
    libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    protect(rest[:at])
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    # (The user need not be able to come to it.)
    program = os.open(rest[at + 1], os.O_RDONLY | os.O_CLOEXEC)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    made.load()
    os.execve(program, rest[at + 1:], os.environ)


if __name__ == "__main__":
    main()
