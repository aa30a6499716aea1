"""What everything that starts processes needs: time limits, waiting, free ports."""

import os
import socket
import time

# One factor for every time limit: a loaded machine or a sanitizer build is slow,
# not wrong.
SLOW = float(os.environ.get("SLOW", "1"))


def wait_until(condition, limit_s, what, pause_s=0.01):
    """Polls until condition() is true and gives that value; fails naming what was awaited."""
    deadline = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s:g} s: {what}")
        time.sleep(pause_s)


def free_port(host="127.0.0.1"):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def greets(address):
    """Whether an NBD server is at work there: (host, port), or the path of a socket."""
    family = socket.AF_UNIX if isinstance(address, str) else (
        socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    with socket.socket(family) as s:
        s.settimeout(5)
        try:
            s.connect(address)
            # The greeting too: a listener may exist before anybody serves it.
            return s.recv(8) == b"NBDMAGIC"
        except OSError:
            return False
