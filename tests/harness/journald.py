"""A double of journald's socket, and a server that takes it for the real one."""

import socket


class Journald:
    """A socket that stands for journald's, and a namespace in which it is in that place."""

    def __init__(self, folder):
        self.folder = folder / "j"
        self.folder.mkdir()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.folder / "socket"))
        self.prefix = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /run && "
                       "mkdir -p /run/systemd/journal && "
                       f"mount --bind {self.folder} /run/systemd/journal && exec \"$@\"", "sh"]
        self.entries = []

    def drain(self):
        """All entries so far, each a dictionary of text."""
        self.socket.setblocking(False)
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return self.entries
            # (None of our values has a newline in it, which would be sent in another way.)
            self.entries.append(dict(line.split("=", 1) for line in data.decode().splitlines()))

    def keep_draining(self, stop):
        """Takes in what comes until `stop` is set: one that is full holds up whoever writes."""
        while not stop.wait(0.01):
            self.drain()

    def has(self, text):
        return [e for e in self.drain() if text in e["MESSAGE"]]


def under_systemd(server):
    """As systemd starts it: stderr is a stream of the journal."""
    server.log_path.touch()
    stat = server.log_path.stat()
    server.env["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
    return server
