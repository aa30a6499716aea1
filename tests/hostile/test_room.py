"""Who gets a place when there are fewer than clients."""

import struct
import subprocess

import pytest

from harness import rawnbd
from harness.server import SLOW, wait_until

pytestmark = pytest.mark.limit(60)


def silent(server, source="127.0.0.1"):
    """A connection that has said nothing."""
    client = rawnbd.Client((server.host, server.port), source=source)
    client.greeting()
    return client


def finish(client, name="v"):
    client.no_zeroes = True
    client.send(struct.pack(">L", rawnbd.FIXED_NEWSTYLE | rawnbd.NO_ZEROES))
    client.go(name)
    assert client.read(0, 512) == bytes(512)


def test_a_silent_client_gives_its_place_to_one_that_speaks(servers, clients):
    server = servers.start({"v": "1M"}, ["--connections-max", 3], unix=False)
    served = [clients(server, "v") for _ in range(2)]
    mute = silent(server)
    served.append(clients(server, "v"))
    mute.expect_closed(limit_s=10 * SLOW)
    mute.close()
    # All that are left are served; one more is turned away, and told of, and they stay.
    with rawnbd.Client((server.host, server.port)) as fourth:
        fourth.expect_closed(limit_s=10 * SLOW)
    assert "turned away: there are 3 connections already" in server.log()
    for client in served:
        assert client.read(0, 512) == bytes(512)
    served[0].disc()
    served[0].expect_closed(limit_s=10 * SLOW)
    wait_until(lambda: get_in(server), 10 * SLOW, "there is room again")


def get_in(server):
    try:
        with rawnbd.connect(server, "v") as client:
            return client.read(0, 512) == bytes(512)
    except (OSError, rawnbd.Closed):
        return False


def test_a_crowd_at_one_address_pushes_out_its_own(servers):
    """Two that take their time at other addresses stay, although they came first."""
    server = servers.start({"v": "1M"}, ["--connections-max", 200], unix=False)
    slow = [silent(server, source) for source in ("127.0.0.2", "127.0.0.3")]
    crowd = [silent(server) for _ in range(400)]
    for client in slow:
        finish(client)
        client.close()
    # The oldest of the crowd are gone, the newest are there.
    crowd[0].expect_closed(limit_s=10 * SLOW)
    finish(crowd[-1])
    for client in crowd:
        client.close()


def test_the_oldest_gives_way_where_no_address_has_most(servers):
    server = servers.start({"v": "1M"}, ["--connections-max", 200], unix=False)
    crowd = [silent(server, f"127.0.{i % 4}.{i % 100 + 1}") for i in range(300)]
    crowd[0].expect_closed(limit_s=10 * SLOW)
    finish(crowd[-1])
    for client in crowd:
        client.close()


def test_more_connections_than_files_are_refused(servers):
    server = servers.make({"v": "1M"}, ["--connections-max", 500],
                          prefix=["prlimit", "--nofile=300:300"], tcp=False)
    done = subprocess.run(["setpriv", "--pdeathsig", "KILL", *server.prefix, *server.command()],
                          capture_output=True, text=True, timeout=60 * SLOW)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if "cannot serve" in line]
    assert "500 connections" in said and "300 files" in said
    assert "LimitNOFILE=" in said and "--connections-max" in said


@pytest.mark.parametrize("given", ["0", "100001", "many"])
def test_a_number_that_makes_no_sense(servers, given):
    server = servers.make({"v": "1M"})
    done = server.cli("serve", "--connections-max", given, check=False)
    assert done.returncode != 0 and "from 1 to 100000" in done.stderr
