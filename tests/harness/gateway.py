"""Servers on FoundationDB in particular, whatever engine a test run is on."""

from .server import Server


def gateway(cluster, folder, volumes=None, args=(), *, lease_ms=None, env=None, **more):
    """A server on a store in that cluster: `store`, or a new one."""
    if lease_ms:
        args = [*args, "--lease-ms", lease_ms]
    more.setdefault("store", cluster.store())
    return Server(folder, volumes, args, env={**cluster.client_env(), **(env or {})}, **more)
