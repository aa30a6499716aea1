"""`fdb-nbd device`: kernel devices that outlive their servers (D1, D2, D7, D12).

A real Linux kernel attaches volumes with it, puts file systems on them, and has its servers killed,
replaced and moved under load; nothing of that may reach a file system.
"""

import json
import shlex

import pytest

from harness import uml
from harness.commands import assert_one_sentence
from harness.server import SLOW, program, wait_until

pytestmark = pytest.mark.lmdb("about the client; failover/test_mounted.py has it on two gateways")

PORT = 10809
MIB = 1 << 20
SIZE = 192 * MIB
# Waited for in place of the default, so that tests are quick.
QUICK = "--size-poll-ms 200 --resend-ms 1000"
FDB_NBD = shlex.join(program())


@pytest.fixture(scope="module")
def server(namespace, module_servers):
    names = ("killed", "two", "grown", "alone", "snapped", "held", "moved")
    return module_servers.start({name: str(SIZE) for name in names}, host=uml.HOST_ADDRESS,
                                port=PORT, prefix=namespace.enter, reachable=False)


class Devices:
    """`fdb-nbd device` in the guest."""

    def __init__(self, guest):
        self.guest = guest

    def run(self, words, status=0, before=""):
        """What it said: on stdout, or where it is to fail on stderr."""
        said = self.guest.run(f"""
status=0
{before} {FDB_NBD} device {words} >/tmp/stdout 2>/tmp/stderr || status=$?
cat /tmp/stdout; echo @@; cat /tmp/stderr; echo @@ $status
""")
        out, err, ended = said.split("@@")
        assert int(ended) == status, said
        if status:
            assert_one_sentence(err.lstrip())
        return (err if status else out).strip()

    def uri(self, name):
        return f"nbd://{uml.HOST_ADDRESS}:{PORT}/{name}"

    def attach(self, name, more=QUICK):
        assert self.run(f"attach {self.uri(name)} /dev/nbd0 {more}") == "/dev/nbd0"
        return self.about(0)

    def list(self):
        return json.loads(self.run("list --json"))["devices"]

    def about(self, index):
        """What the list says of one device; None: it is not attached."""
        for one in self.list():
            if one["device"] == f"/dev/nbd{index}":
                return one
        return None

    def wait_state(self, state, limit_s=30):
        wait_until(lambda: self.about(0)["state"] == state, limit_s * SLOW, f"nbd0 is {state}", 0.1)

    def size(self):
        return int(self.guest.run("cat /sys/block/nbd0/size")) * 512

    def detach(self, more=""):
        assert "/dev/nbd0 is detached" in self.run(f"detach /dev/nbd0 {more}")
        assert self.about(0) is None
        assert "fdb-nbd" not in self.guest.run("ps -e -o comm= || true")

    def no_errors(self):
        self.guest.run("if dmesg | grep -i -e 'I/O error' -e abort; then exit 1; fi")


@pytest.fixture
def devices(request, guest, server):
    guest.run("dmesg --clear")
    made = Devices(guest)
    yield made
    if request.node.report_call.failed and guest.process.poll() is None:
        print(guest.run(f"""
{FDB_NBD} device list --json; dmesg | tail -40
for i in 0 1; do
    cat /proc/*/mountinfo | grep -q /dev/nbd$i && umount -l /dev/nbd$i
    {FDB_NBD} device detach --force /dev/nbd$i
done
""", check=False))
        if not server.running():
            server.start()


class Load:
    """A mounted ext4 on the device, with a writer on it."""

    def __init__(self, guest):
        self.guest = guest
        guest.run("mkfs.ext4 -F -q /dev/nbd0; mount /dev/nbd0 /tmp/mnt", limit_s=120)
        guest.run("""
rm -f /tmp/over /tmp/stop /tmp/sums; : >/tmp/sums
(set -e
 i=0
 until test -e /tmp/stop; do
    i=$((i + 1))
    dd if=/dev/urandom of=/tmp/mnt/$((i % 400)) bs=64k count=4 conv=fsync status=none
    sha256sum /tmp/mnt/$((i % 400)) >>/tmp/sums
 done; echo over >/tmp/over) >/tmp/said 2>&1 &
""")

    def files(self):
        return int(self.guest.run("cat /tmp/said; wc -l </tmp/sums"))

    def goes_on(self, more=5):
        """Until so many more files have been written and synced."""
        aim = self.files() + more
        wait_until(lambda: self.files() >= aim, 60 * SLOW, "files are written")

    def finish(self):
        """No write failed, the file system is clean, and all that was synced is there."""
        self.guest.run("""
touch /tmp/stop
for i in $(seq 2000); do test -e /tmp/over && break; sleep 0.02; done
cat /tmp/said
test ! -s /tmp/said
test -e /tmp/over
grep -q ' /tmp/mnt ext4 rw' /proc/mounts
umount /tmp/mnt
fsck.ext4 -f -n /dev/nbd0
echo 3 >/proc/sys/vm/drop_caches
mount -o ro /dev/nbd0 /tmp/mnt
# What a name held last.
tac /tmp/sums | awk '!seen[$2]++' | sha256sum --quiet -c -
umount /tmp/mnt
""", limit_s=60)


@pytest.mark.limit(120)
@pytest.mark.parametrize("name,more", [
    ("killed", QUICK),
    ("two", "--connections 2 --request-timeout 2"),
])
def test_server_is_killed_and_replaced(devices, server, name, more):
    """G1, D1, D2, D12: killed under load and started again, then twice replaced by another process
    on the same store: writers wait, and nothing fails."""
    about = devices.attach(name, more)
    assert about["state"] == "connected" and about["error"] is None
    assert about["uri"] == devices.uri(name) and about["size_bytes"] == SIZE
    assert about["connections"] == (2 if name == "two" else 1) and not about["read_only"]
    load = Load(devices.guest)
    load.goes_on()
    server.kill()
    devices.wait_state("reconnecting")
    wait_until(lambda: devices.about(0)["error"], 10 * SLOW, "the list says why", 0.1)
    assert "Connection refused" in devices.about(0)["error"]
    before = load.files()
    server.start()
    devices.wait_state("connected")
    load.goes_on()
    for _ in range(2):
        server.upgrade()
        load.goes_on()
    print(f"{before} files before, {load.files() - before} after")
    load.finish()
    devices.no_errors()
    devices.detach()


@pytest.mark.limit(120)
def test_device_grows_and_never_shrinks(devices, server):
    """D7: a mounted device grows with its volume, its file system with it, and neither a new
    connection nor a volume that was shrunk takes that back."""
    guest = devices.guest
    devices.attach("grown")
    load = Load(guest)
    load.goes_on(2)
    server.cli("resize", "grown", str(2 * SIZE))
    wait_until(lambda: devices.size() == 2 * SIZE, 20 * SLOW, "the device has grown", 0.1)
    guest.run("resize2fs /dev/nbd0; test $(df --output=size -k /tmp/mnt | tail -1) -gt 300000")
    server.restart("kill")
    load.goes_on()
    assert devices.size() == 2 * SIZE
    assert devices.about(0)["size_bytes"] == 2 * SIZE
    load.finish()

    # It grows while nobody is connected, too.
    server.kill()
    server.cli("resize", "grown", str(3 * SIZE))
    server.start()
    wait_until(lambda: devices.size() == 3 * SIZE, 20 * SLOW, "the device has grown", 0.1)

    # What is smaller is not taken for the same volume, until it is large enough again.
    server.kill()
    server.cli("resize", "grown", str(SIZE), "--shrink", "--yes")
    server.start()
    wait_until(lambda: "shrunk" in (devices.about(0)["error"] or ""), 20 * SLOW,
               "the list says that it was shrunk", 0.1)
    assert devices.about(0)["state"] == "reconnecting" and devices.size() == 3 * SIZE
    server.cli("resize", "grown", str(3 * SIZE))
    devices.wait_state("connected")
    assert devices.size() == 3 * SIZE
    guest.run("fsck.ext4 -f -n /dev/nbd0 || test $? -le 4")
    devices.no_errors()
    devices.detach()


@pytest.mark.limit(120)
def test_another_keeper_goes_on(devices, server):
    """The process behind a device is killed: the device stays, requests wait when the server goes
    too, and the same attach as before goes on with all of it."""
    guest = devices.guest
    pid = devices.attach("alone")["pid"]
    load = Load(guest)
    load.goes_on(2)
    guest.run(f"kill -9 {pid}")
    wait_until(lambda: devices.about(0)["state"] == "unkept", 10 * SLOW, "the list says so", 0.1)
    assert "attach it again" in guest.run(f"{FDB_NBD} device list 2>&1")
    load.goes_on(2)
    server.restart("kill")
    # Without the keeper nobody connects it again.
    before = guest.run("sync -f /tmp/mnt & sleep 1; kill -0 $!; wc -l </tmp/sums")
    assert load.files() == int(before)
    # No device has to be named.
    assert devices.run(f"attach {devices.uri('alone')} {QUICK}") == "/dev/nbd0"
    about = devices.about(0)
    assert about["state"] == "connected" and about["pid"] != pid and about["size_bytes"] == SIZE
    load.goes_on()
    # One that is told to end leaves the device as it is.
    guest.run(f"kill {about['pid']}")
    wait_until(lambda: devices.about(0)["state"] == "unkept", 10 * SLOW, "it has ended", 0.1)
    # In the foreground, as a service runs it.
    guest.run("rm -r /run/fdb-nbd-device; umask 077\n"
              f"{FDB_NBD} device attach --foreground {devices.uri('alone')} /dev/nbd0 {QUICK} "
              ">/tmp/device 2>/tmp/log & echo $! >/tmp/keeper\n"
              "for i in $(seq 500); do grep -q /dev/nbd0 /tmp/device && exit 0; sleep 0.02; done\n"
              "cat /tmp/log; exit 1")
    assert devices.about(0)["pid"] == int(guest.run("cat /tmp/keeper"))
    # Others see that, too.
    said = guest.run("setpriv --reuid 65534 --regid 65534 --clear-groups "
                     f"{FDB_NBD} device list 2>&1")
    assert "connected" in said and "attach it again" not in said, said
    server.restart("kill")
    load.goes_on()
    load.finish()
    devices.no_errors()
    devices.detach()
    assert "is detached" in guest.run("cat /tmp/log") or "told to end" in guest.run("cat /tmp/log")


@pytest.mark.limit(120)
def test_another_volume_of_that_name(devices, server):
    """What was meant for one volume never goes to another, though that has its name and its size:
    neither by the keeper nor by one that follows it."""
    guest = devices.guest
    pid = devices.attach("moved")["pid"]
    guest.run("mkfs.ext4 -F -q /dev/nbd0; mount /dev/nbd0 /tmp/mnt")
    server.kill()
    server.cli("rename", "moved", "aside")
    guest.run("(echo kept >/tmp/mnt/file; sync -f /tmp/mnt; touch /tmp/synced) >/dev/null 2>&1 &")
    server.start()  # and makes a new one of that name
    wait_until(lambda: "another volume" in (devices.about(0)["error"] or ""), 20 * SLOW,
               "the list says that it is another one", 0.1)
    guest.run(f"kill -9 {pid}")
    assert "another volume" in devices.run(f"attach {devices.uri('moved')} {QUICK}", 1)
    assert server.used_bytes("moved") == 0
    guest.run("test ! -e /tmp/synced")
    server.kill()
    server.cli("remove", "moved", "--yes")
    server.cli("rename", "aside", "moved")
    server.start()
    assert devices.run(f"attach {devices.uri('moved')} {QUICK}") == "/dev/nbd0"
    guest.run("for i in $(seq 500); do test -e /tmp/synced && break; sleep 0.02; done\n"
              "test -e /tmp/synced; umount /tmp/mnt; fsck.ext4 -f -n /dev/nbd0")
    devices.no_errors()
    devices.detach()


@pytest.mark.limit(120)
def test_snapshot_is_read_only(devices, server):
    """A snapshot is a device that can't be written to, over restarts too; and so is a volume that is
    attached so."""
    guest = devices.guest
    devices.attach("snapped")
    guest.run("mkfs.ext4 -F -q /dev/nbd0; mount /dev/nbd0 /tmp/mnt; echo then >/tmp/mnt/file; sync")
    server.cli("snapshot", "create", "snapped@then")
    guest.run("echo now >/tmp/mnt/file; umount /tmp/mnt")
    devices.detach()
    assert devices.attach("snapped@then")["read_only"]
    guest.run("mount -t ext4 -o ro,noload /dev/nbd0 /tmp/mnt")
    server.restart("kill")
    devices.wait_state("connected")
    guest.run("""
echo 3 >/proc/sys/vm/drop_caches
test "$(cat /tmp/mnt/file)" = then
umount /tmp/mnt
! dd if=/dev/zero of=/dev/nbd0 count=1 status=none
""")
    devices.detach()
    assert devices.attach("snapped", "--read-only")["read_only"]
    guest.run("! dd if=/dev/zero of=/dev/nbd0 count=1 status=none")
    devices.detach()


@pytest.mark.limit(120)
def test_detach_spares_who_uses_it(devices, server):
    """A device in use is not taken away, with a sentence that says who uses it; --force does, also
    where the server is gone."""
    guest = devices.guest
    devices.attach("held")
    guest.run("mkfs.ext4 -F -q /dev/nbd0; mount /dev/nbd0 /tmp/mnt")
    assert "/dev/nbd0 is mounted on /tmp/mnt" in devices.run("detach /dev/nbd0", 1)
    guest.run("umount /tmp/mnt; sleep 1000 </dev/nbd0 & echo $! >/tmp/sleeper")
    assert "open: sleep (pid " in devices.run("detach /dev/nbd0", 1)
    assert devices.about(0)["state"] == "connected"
    guest.run("kill $(cat /tmp/sleeper)")
    devices.detach()
    assert "is not attached" in devices.run("detach /dev/nbd0", 1)

    # A writer that waits for a server that is gone is let go, with an error.
    devices.attach("held")
    server.kill()
    devices.wait_state("reconnecting")
    guest.run("(dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 oflag=direct || echo failed >/tmp/wrote) "
              ">/dev/null 2>&1 & sleep 0.2; test ! -e /tmp/wrote")
    assert "open: dd (pid " in devices.run("detach /dev/nbd0", 1)
    devices.run("detach /dev/nbd0 --force")
    guest.run("for i in $(seq 500); do test -s /tmp/wrote && break; sleep 0.02; done\n"
              "test $(cat /tmp/wrote) = failed; rm /tmp/wrote")
    wait_until(lambda: devices.about(0) is None, 10 * SLOW, "the device is free", 0.1)
    server.start()


@pytest.mark.limit(120)
def test_what_goes_wrong_is_one_sentence(devices, server):
    guest = devices.guest
    assert "no export \"nothing\"" in devices.run(f"attach {devices.uri('nothing')}", 3)
    assert "Connection refused" in devices.run(f"attach nbd://{uml.HOST_ADDRESS}:1/held", 1)
    assert "cannot connect to /tmp/nobody" in devices.run(
        "attach 'nbd+unix:///held?socket=/tmp/nobody'", 1)
    assert "TLS" in devices.run(f"attach nbds://{uml.HOST_ADDRESS}/held", 2)
    assert "only root" in devices.run(f"attach {devices.uri('held')}", 1, "setpriv --reuid 1")
    assert "only root" in devices.run("detach /dev/nbd0", 1, "setpriv --reuid 1")
    assert "CAP_SYS_ADMIN" in devices.run(f"attach {devices.uri('held')}", 1,
                                          "setpriv --bounding-set -sys_admin")
    devices.attach("held")
    assert devices.run("list", before="setpriv --reuid 1").count("/dev/nbd") == 1
    assert "attached already: it is /dev/nbd0" in devices.run(f"attach {devices.uri('held')}", 1)
    assert "in use: it is attached to nbd://" in devices.run(
        f"attach {devices.uri('snapped')} /dev/nbd0", 1)
    guest.run(f"nbd-client -N snapped {uml.HOST_ADDRESS} {PORT} /dev/nbd1")
    assert devices.about(1)["state"] == "foreign"
    assert "nbd1 is in use" in devices.run(f"attach {devices.uri('two')} /dev/nbd1", 1)
    devices.run("detach /dev/nbd1")
    # One that others detach: its keeper has to go, and the device can be had again at once.
    guest.run("nbd-client -d /dev/nbd0\n"
              "for i in $(seq 500); do test -e /sys/block/nbd0/pid || break; sleep 0.02; done")
    devices.attach("two")
    devices.detach()
    guest.run("rmmod nbd")
    assert "modprobe nbd" in devices.run(f"attach {devices.uri('held')}", 4)
    assert "modprobe nbd" in devices.run("list", 1)
    guest.run("modprobe -d /tmp nbd max_part=0")


@pytest.mark.limit(120)
def test_other_servers_and_addresses(devices):
    """Unix sockets and IPv6, and a server that is not ours: nbdkit, killed and started again."""
    guest = devices.guest
    guest.run("modprobe -d /tmp ipv6; rm -f /tmp/disk; truncate -s 64M /tmp/disk")
    for listen, uri in (("-U /tmp/s", "'nbd+unix:///?socket=s'"), ("-i ::1 -p 10810", "nbd://[::1]:10810")):
        start = f"rm -f /tmp/s; nbdkit -P /tmp/kit {listen} file /tmp/disk"
        guest.run(start)
        # (The folder of the command is /tmp.)
        assert devices.run(f"attach {uri} {QUICK}") == "/dev/nbd0"
        guest.run("mkfs.ext4 -F -q /dev/nbd0; mount /dev/nbd0 /tmp/mnt; echo kept >/tmp/mnt/file\n"
                  "kill -9 $(cat /tmp/kit)")
        devices.wait_state("reconnecting")
        guest.run(start)
        guest.run("sync -f /tmp/mnt; umount /tmp/mnt; fsck.ext4 -f -n /dev/nbd0\n"
                  "mount -o ro /dev/nbd0 /tmp/mnt; test $(cat /tmp/mnt/file) = kept; umount /tmp/mnt")
        devices.no_errors()
        devices.detach()
        guest.run("kill $(cat /tmp/kit)")
