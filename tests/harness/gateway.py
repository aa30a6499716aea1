"""Servers on FoundationDB in particular, whatever engine a test run is on."""

import os
import uuid

from .server import Server


def gateway(cluster, folder, volumes=None, args=(), *, lease_ms=None, env=None, **more):
    """A server on a store in that cluster: `store`, or a new one."""
    if lease_ms:
        args = [*args, "--lease-ms", lease_ms]
    more.setdefault("store", cluster.store())
    return Server(folder, volumes, args, env={**cluster.client_env(), **(env or {})}, **more)


def elsewhere(folder):
    """Words before a program that is to take this machine for another one, and so cannot tell
    whether a process of ours lives: its /proc shows another boot."""
    boot = folder / "boot"
    boot.write_text(f"{uuid.uuid4()}\n")
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--mount", *user, "sh", "-ec",
            f'mount --bind {boot} /proc/sys/kernel/random/boot_id; exec "$@"', "sh"]
