"""A store that fills up is told of before it is full, once for each step."""

import pytest

from harness import http, rawnbd
from harness.disk import disk
from harness.server import SLOW, Server, wait_until
from harness.waiting import free_port

MIB = 1 << 20
DISK_MIB = 320
BUSY_S = 30


def space(where):
    """What is left in the store and what there is in all, in bytes. Asking for it looks anew."""
    store = http.get_json(where, "/v1/server")["store"]
    free = store["available_bytes"] + store["free_bytes"]
    return free, free + store["used_bytes"]


def fill(c, where, at, part, rng):
    """Writes until about that part of the store is left, which it waits for."""
    free, whole = space(where)
    end = at + (int(free - part * whole) // MIB) * MIB
    while at < end:
        c.write(at, rng.randbytes(MIB))
        at += MIB
    c.flush()
    wait_until(lambda: http.get_json(where, "/v1/volumes/v")["dirty_bytes"] == 0, BUSY_S * SLOW,
               "it is in the store")
    wait_until(lambda: space(where)[0] < (part + 0.015) * whole, BUSY_S * SLOW, "it is seen", 0.1)
    return at


@pytest.mark.lmdb("about the disk its files are on")
@pytest.mark.limit(120)
def test_a_store_that_fills_up_is_told_of(folder, rng):
    where = "127.0.0.1", free_port()
    with disk(folder, DISK_MIB) as mount:
        with Server(folder / "s", {"v": "1G"}, ["--http", f"127.0.0.1:{where[1]}", "--cache-size",
                                                "32M"], store=mount / "store") as server:
            free, whole = space(where)
            assert free > 0.9 * whole and "filling up" not in server.log()
            with rawnbd.connect(server, "v") as c:
                # (The first writes make the log, which is no longer room then.)
                at = fill(c, where, 0, 0.4, rng)
                assert "filling up" not in server.log()
                at = fill(c, where, at, 0.075, rng)
                wait_until(lambda: "filling up" in server.log(), BUSY_S * SLOW, "a warning")
                fill(c, where, at, 0.025, rng)
                wait_until(lambda: server.log().count("filling up") == 2, BUSY_S * SLOW,
                           "another one")
                assert http.scrape(where).value("fdbnbd_store_available_bytes") < 0.05 * whole
                # A little more room does not arm it again.
                c.trim(0, 4 * MIB)
                wait_until(lambda: space(where)[0] > 0.035 * whole, BUSY_S * SLOW, "there is room",
                           0.1)
                c.write(0, rng.randbytes(4 * MIB))
                c.flush()
                wait_until(lambda: space(where)[0] < 0.035 * whole, BUSY_S * SLOW, "there is not",
                           0.1)
            assert server.log().count("filling up") == 2
