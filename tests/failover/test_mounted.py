"""A mounted file system under load loses its gateway, and goes on at another one (G1, G4, D1).

A real Linux kernel. Two gateways on networks of their own, a service address that is on one of
them, and the tests in the role of whoever moves it: an operator, or keepalived with a health check.

The kernel gives up a device whose connection ends, and nbd-client's -persist does not prevent
that: it reconnects only where an ioctl fails, which Linux stopped doing in 4.10, and ignores the
option where it configures the device by netlink, as it does by default. So:

  device  `fdb-nbd device attach`, whose keeper gives the kernel new connections for dead ones
  proxy   an unmodified nbd-client on a socket of qemu-nbd on the same machine, which holds
          requests and sends them again when the gateway is gone
"""

import shlex
import shutil
import threading
import time
from pathlib import Path

import network
import pytest

from harness import rawnbd, uml
from harness.cluster import Cluster
from harness.gateway import elsewhere, gateway
from harness.server import SLOW, program, wait_until

pytestmark = pytest.mark.fdb

# The least there is on FoundationDB.
LEASE_MS = 3000
WRITERS = 4

# How the kernel gets the volume, and gives it back.
FDB_NBD = shlex.join(program())
ATTACH = {
    "device": f"""
{FDB_NBD} device attach nbd://{network.SERVICE}:{network.PORT}/v /dev/nbd0 --resend-ms 1000
""",
    "proxy": f"""
qemu-nbd --socket=/tmp/v.sock --export-name=v --persistent --shared=0 --discard=unmap \\
    --fork --pid-file=/tmp/helper --image-opts driver=nbd,server.type=inet,\\
server.host={network.SERVICE},server.port={network.PORT},server.keep-alive=on,\\
export=v,reconnect-delay=3600
nbd-client -unix /tmp/v.sock -N v /dev/nbd0 -persist
# It learns of a gateway that went without a word, or of the address having moved, only by asking.
echo 3 >/proc/sys/net/ipv4/tcp_keepalive_time
echo 1 >/proc/sys/net/ipv4/tcp_keepalive_intvl
echo 3 >/proc/sys/net/ipv4/tcp_keepalive_probes
""",
}
DETACH = {
    "device": f"{FDB_NBD} device detach /dev/nbd0",
    "proxy": """
nbd-client -d /dev/nbd0
for i in $(seq 500); do test -e /sys/block/nbd0/pid || break; sleep 0.02; done
kill $(cat /tmp/helper)
""",
}


@pytest.fixture(scope="module")
def net():
    why = uml.missing()
    if why:
        pytest.skip(f"no user-mode-linux here: {why}")
    made = network.Network()
    yield made
    made.end()


@pytest.fixture(scope="module")
def cluster(net):
    with Cluster(prefix=net.back.enter, host=network.BACK) as made:
        yield made


@pytest.fixture(scope="module")
def guest(net, module_folder):
    made = uml.Guest(module_folder, net.front)
    shutil.copy(Path(__file__).parent / "writer.py", made.out)
    yield made
    made.end()


def went_well(node):
    report = getattr(node, "report_call", None)
    return report is not None and report.passed


@pytest.fixture
def gateways(request, net, cluster, folder):
    """Both at work, the service address on the first."""
    store = cluster.store()
    made = []
    for n in range(2):
        place = folder / str(n)
        place.mkdir()
        one = gateway(cluster, place, {"v": "256M"} if n == 0 else {},
                      ["--listen", f"0.0.0.0:{network.PORT}"], lease_ms=LEASE_MS, store=store,
                      tcp=False, prefix=net.gateways[n].enter + elsewhere(place))
        one.cli_prefix = net.gateways[n].enter
        made.append(one.start())
    net.give_service(0)
    yield made
    net.restore()
    passed = went_well(request.node)
    for one in made:
        if not passed:
            print(one.log_tail())
        one.stop() if passed else one.kill()


class Mounted:
    """The volume, mounted in the guest, with writers on it."""

    def __init__(self, guest, how):
        self.guest = guest
        self.how = how

    def start(self):
        guest = self.guest
        guest.run(ATTACH[self.how], limit_s=30)
        guest.run("""
for i in $(seq 500); do test "$(cat /sys/block/nbd0/size)" = 524288 && break; sleep 0.02; done
dmesg --clear
mkfs.ext4 -F -q /dev/nbd0
mount /dev/nbd0 /tmp/mnt
mkdir /tmp/notes
""")
        for n in range(WRITERS):
            guest.run(f": >/tmp/notes/{n}.count\n/usr/bin/python3 /tmp/out/writer.py run /tmp/mnt /tmp/notes {n} "
                      f">/tmp/notes/{n}.said 2>&1 &")
        self.wait_synced(5 * WRITERS)

    def synced(self):
        return int(self.guest.run("cat /tmp/notes/*.count | wc -c"))

    def wait_synced(self, more, limit_s=40):
        """Until so many more files have been synced, by all writers together."""
        goal = self.synced() + more

        def reached():
            said = self.guest.run("cat /tmp/notes/*.said")
            assert not said, f"a writer was told:\n{said}\n{self.guest.run('dmesg | tail -30')}"
            return self.synced() >= goal
        wait_until(reached, limit_s * SLOW, f"{more} more files synced", 0.1)

    def finish(self):
        """Ends the writers; then the file system is clean and all they synced is in it."""
        said = self.guest.run("""
touch /tmp/notes/stop
for i in $(seq 1500); do test $(ls /tmp/notes | grep -c '^[0-9]*$') = WRITERS && break; sleep 0.02; done
cat /tmp/notes/*.said
grep ' /tmp/mnt ext4 rw' /proc/mounts >&2
umount /tmp/mnt
fsck.ext4 -f -n /dev/nbd0 >&2
echo 3 >/proc/sys/vm/drop_caches
mount -o ro /dev/nbd0 /tmp/mnt
/usr/bin/python3 /tmp/out/writer.py check /tmp/mnt /tmp/notes >/tmp/checked
umount /tmp/mnt
dmesg | grep -i -e 'I/O error' -e 'abort' >&2 && exit 1
(DETACH) >&2
cat /tmp/checked
rm -r /tmp/notes
""".replace("WRITERS", str(WRITERS)).replace("DETACH", DETACH[self.how]), limit_s=60)
        return int(said.split()[-1])

    def drop(self):
        """After a failure, so that it is not the next test's."""
        print(self.guest.run(f"""
set +e
touch /tmp/notes/stop
{FDB_NBD} device detach --force /dev/nbd0
kill -9 $(cat /tmp/helper)
umount -l /tmp/mnt
rm -rf /tmp/notes /tmp/helper /tmp/v.sock
""", check=False))


@pytest.fixture(params=list(ATTACH))
def mounted(request, gateways, guest):
    made = Mounted(guest, request.param)
    try:
        made.start()
        yield made
    finally:
        if not went_well(request.node) and guest.process.poll() is None:
            made.drop()


def move_service(net):
    net.take_service(0)
    net.give_service(1)


def the_other_serves(gateways, mounted, since):
    mounted.wait_synced(1)
    print(f"the file system went on {time.monotonic() - since:.1f} s later")
    mounted.wait_synced(10 * WRITERS)
    assert gateways[1].json("owner", "show", "v")["owner"]["pid"] == gateways[1].pid


@pytest.mark.limit(90)
def test_G1_gateway_is_killed(net, gateways, mounted):
    began = time.monotonic()
    gateways[0].kill()
    before = mounted.synced()
    move_service(net)
    the_other_serves(gateways, mounted, began)
    print(f"{before} files synced before, {mounted.synced() - before} after")
    print(f"{mounted.finish()} files compared")


@pytest.mark.limit(90)
def test_G1_gateway_vanishes(net, gateways, mounted):
    """Its machine loses power: nobody is told that the connection is gone."""
    began = time.monotonic()
    net.cut_from_clients(0)
    net.cut_from_cluster(0)
    gateways[0].kill()
    net.give_service(1)
    the_other_serves(gateways, mounted, began)
    print(f"{mounted.finish()} files compared")


class Asking:
    """A client on the gateway's own machine that reads the same bytes over and over."""

    def __init__(self, server):
        self.last = None
        self.end = None
        self._client = rawnbd.connect(server, "v", timeout_s=60 * SLOW)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_until(lambda: self.last or self.end, 30 * SLOW, "it is answered")

    def _run(self):
        try:
            while True:
                self._client.read(0, 4096)
                self.last = time.monotonic()
                time.sleep(0.01)
        except (rawnbd.Closed, rawnbd.NbdError, OSError) as e:
            self.end = e

    def wait_end(self):
        wait_until(lambda: self.end, 30 * SLOW, "its connection ends")
        self._client.close()
        return self.end


@pytest.mark.limit(90)
def test_G4_gateway_is_cut_from_the_cluster(net, gateways, mounted):
    """It lives and can be reached, yet it may answer nothing once its lease is over, not even
    what it has in its cache; and it can't tell its clients to go. So its health is whether a
    command reaches the store from there, and whoever moves the address asks that."""
    first = gateways[0]
    asking = Asking(first)
    assert first.cli("store", "info").returncode == 0
    cut = time.monotonic()
    net.cut_from_cluster(0)
    wait_until(lambda: time.monotonic() - asking.last > 1, 30 * SLOW, "it falls silent", 0.1)
    silent = asking.last
    print(f"reads from its cache were answered until {silent - cut:.1f} s after the cut")
    assert silent - cut < LEASE_MS / 1000 + 0.2 * SLOW
    count = mounted.synced()
    done = first.cli("store", "info", check=False)
    assert done.returncode == 4, done
    print(f"a command found out {time.monotonic() - cut:.1f} s after it")
    assert mounted.synced() == count and asking.last == silent, "it answered"
    began = time.monotonic()
    move_service(net)
    the_other_serves(gateways, mounted, began)
    # Back in the cluster it finds that it was fenced, and bothers nobody.
    assert asking.last == silent and asking.end is None
    net.join_cluster(0)
    assert isinstance(asking.wait_end(), (rawnbd.Closed, OSError)), asking.end
    assert asking.last == silent
    mounted.wait_synced(5 * WRITERS)
    print(f"{mounted.finish()} files compared")
    first.check_alive()
