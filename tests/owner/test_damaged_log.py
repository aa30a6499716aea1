"""A write log with a damaged record (G5): the volume it belongs to is refused, and nobody
else suffers: not the other volumes of that log, not the servers that were asked for it.
"""

import nbd
import pytest

from harness.server import SLOW, Server

pytestmark = pytest.mark.lmdb("only it has a write log")

LEASE_MS = 2000


def connect(server, name):
    h = nbd.NBD()
    h.connect_uri(server.uri(name))
    return h


def flip_in_logs(store, marker):
    """Changes one byte of the record that holds `marker`; how many logs had it."""
    found = 0
    for log in (store / "log").iterdir():
        data = log.read_bytes()
        at = data.find(marker)
        if at >= 0:
            with open(log, "r+b") as f:
                f.seek(at + 5)
                f.write(bytes([data[at + 5] ^ 1]))
            found += 1
    return found


@pytest.mark.limit(200)
def test_G5_damaged_log_record_costs_its_volume_alone(tmp_path, rng):
    store = tmp_path / "store"
    marker = rng.randbytes(32)
    first = Server(tmp_path / "1", {"bad": "16M", "good": "16M"}, ["--lease-ms", LEASE_MS],
                   store=store, tcp=False)
    first.start()
    bad, good = connect(first, "bad"), connect(first, "good")
    good.pwrite(b"before" + bytes(506), 0, nbd.CMD_FLAG_FUA)
    bad.pwrite(marker + rng.randbytes(4064), 8192, nbd.CMD_FLAG_FUA)
    bad.pwrite(rng.randbytes(4096), 65536, nbd.CMD_FLAG_FUA)
    good.pwrite(b"after" + bytes(507), 4096, nbd.CMD_FLAG_FUA)
    first.kill()
    if not flip_in_logs(store, marker):
        pytest.fail("the write had left the log before the server was killed")

    second = Server(tmp_path / "2", args=["--lease-ms", LEASE_MS], store=store, tcp=False)
    with first, second:
        good = connect(first, "good")
        assert good.pread(6, 0) == b"before" and good.pread(5, 4096) == b"after"
        for server in (first, second, first):
            bad = connect(server, "bad")
            with pytest.raises(nbd.Error):
                bad.pread(4096, 8192)
        assert "can't be replayed" in first.log() + second.log()
        # Longer than a lease: nobody was ended for a volume that nobody can have.
        assert good.pread(6, 0) == b"before"
        first.check_alive()
        second.check_alive()
        good.shutdown()
