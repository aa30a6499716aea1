"""Network namespaces that live as long as a process that holds them.

Nothing on the host's own network is touched or in the way. Without root a user namespace gives
the right to make devices inside; namespaces that are to be connected are made within one
another, so that they share it.
"""

import os
import subprocess
from pathlib import Path

from .waiting import SLOW, wait_until


class Namespace:
    """One network namespace. `inside` is another one whose rights it shares."""

    def __init__(self, inside=None):
        user = [] if os.geteuid() == 0 or inside else ["--map-root-user"]
        self.holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *(inside.enter if inside else []),
             "unshare", "--net", *user, "sleep", "infinity"], stdin=subprocess.DEVNULL)
        wait_until(self._made, 30 * SLOW, "the network namespace exists")
        # What is put before a command that is to run inside.
        self.enter = ["nsenter", f"--target={self.holder.pid}", "--net",
                      *([] if os.geteuid() == 0 else ["--user", "--preserve-credentials"])]
        self.run(["ip", "link", "set", "lo", "up"])

    def _made(self):
        assert self.holder.poll() is None, "the namespace could not be made"
        return Path(f"/proc/{self.holder.pid}/comm").read_text().strip() == "sleep"

    def run(self, words, **more):
        if isinstance(words, str):
            words = words.split()
        return subprocess.run(self.enter + words, check=True, **more)

    def end(self):
        self.holder.kill()
        self.holder.wait()
