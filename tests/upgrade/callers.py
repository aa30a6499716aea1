"""Clients that come all the time, and notice when one of them is not served."""

import threading

from harness import rawnbd
from harness.server import SLOW


class Callers:
    """Keeps connecting and asks for the list of volumes; what goes wrong is kept."""

    def __init__(self, address, count):
        self.address, self.calls, self.problems = address, 0, []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def _run(self):
        while not self._stop.is_set():
            try:
                with rawnbd.Client(self.address, timeout_s=30 * SLOW) as c:
                    c.handshake()
                    assert ("v", "") in c.list()
                    c.abort()
                self.calls += 1
            except (OSError, AssertionError, rawnbd.Closed, rawnbd.OptionError) as e:
                self.problems.append(repr(e))

    def __enter__(self):
        for t in self._threads:
            t.start()
        return self

    def __exit__(self, *unused):
        self._stop.set()
        for t in self._threads:
            t.join()
