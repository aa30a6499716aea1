"""The user's own path: a real Linux kernel formats, mounts and checks a volume.

One guest is booted for the whole file. Each journey attaches a volume with
nbd-client by its export name, makes a file system, writes files, makes the
kernel forget them, compares, unmounts and checks; deleted files must give their
space back in `fdb-nbd info` after fstrim. Over one connection and over two,
since with several the kernel spreads requests and flushes over all of them
(checklist B23, and what CAN_MULTI_CONN promises).
"""

import time

import pytest

from harness import uml
from harness.server import SLOW, wait_until

PORT = 10809
MIB = 1 << 20

MAKE = {
    "ext4": "mkfs.ext4 -F -q /dev/nbd0",
    "xfs": "mkfs.xfs -f -q /dev/nbd0",
}
CHECK = {
    "ext4": "fsck.ext4 -f -n /dev/nbd0",
    "xfs": "xfs_repair -n /dev/nbd0",
}


@pytest.fixture(scope="module")
def server(namespace, module_servers):
    volumes = {f"{fs}-{c}": "512M" for fs in MAKE for c in (1, 2)}
    volumes["upgraded"] = volumes["history"] = "512M"
    return module_servers.start(volumes, host=uml.HOST_ADDRESS, port=PORT,
                                prefix=namespace.enter, reachable=False)


@pytest.fixture(autouse=True)
def nothing_attached(request, guest):
    """One test's failure must not be the next one's."""
    yield
    if request.node.report_call.failed and guest.process.poll() is None:
        guest.run("cd /; umount -l /tmp/mnt; nbd-client -d /dev/nbd0", check=False)


def settled_used_bytes(server, name):
    """What is in use once the server has nothing left to commit.

    A write is answered before it takes space in the store, a trim before it gives
    it back, so the number follows with a delay: it has to have stood still.
    """
    seen = [server.used_bytes(name), time.monotonic()]

    def still():
        now = server.used_bytes(name)
        if now != seen[0]:
            seen[:] = [now, time.monotonic()]
        return time.monotonic() - seen[1] > 1.7
    wait_until(still, 60 * SLOW, f"{name}: the space in use stands still", 0.1)
    return seen[0]


def attach(guest, name, more=""):
    guest.run(f"nbd-client -N {name} {uml.HOST_ADDRESS} {PORT} /dev/nbd0 {more}\n"
              "test $(blockdev --getsize64 /dev/nbd0) = 536870912\n")


def detach(guest):
    # The device goes away when its last user has, which may be udev-like helpers.
    guest.run("nbd-client -d /dev/nbd0\n"
              "for i in $(seq 500); do test -e /sys/block/nbd0/pid || exit 0; sleep 0.02; done\n"
              "echo still attached; exit 1\n")


def test_list_names_every_volume(guest, server):
    """`nbd-client -l` lists what is there (A5: LIST)."""
    said = guest.run(f"nbd-client -l {uml.HOST_ADDRESS} {PORT}")
    for name in ("ext4-1", "ext4-2", "xfs-1", "xfs-2"):
        assert name in said.split()


@pytest.mark.limit(240)
@pytest.mark.parametrize("connections", [1, 2])
@pytest.mark.parametrize("fs", list(MAKE))
def test_journey(guest, server, fs, connections):
    name = f"{fs}-{connections}"
    attach(guest, name, f"-C {connections}")
    sockets = guest.run(f"ss -Htn state established dport = :{PORT}")
    assert len(sockets.splitlines()) == connections
    guest.run(MAKE[fs], limit_s=120)
    guest.run(f"""
mount -t {fs} /dev/nbd0 /tmp/mnt
cd /tmp/mnt
mkdir -p some/deep/folder many
# Sizes around sector, page and block borders, and large ones.
for n in 1 511 512 513 4095 4096 4097 16383 16384 16385 65537 1048577 5000000; do
    dd if=/dev/urandom of=some/deep/folder/$n bs=$n count=1 iflag=fullblock status=none
done
for i in $(seq 300); do echo "file $i" >many/$i; done
# Holes, and overwrites in place at odd offsets.
truncate -s 8M sparse
for at in 1 4095 70000 1234567 8000000; do
    printf 'x%s' $at | dd of=sparse bs=1 seek=$at conv=notrunc status=none
done
ln -s some/deep/folder/4096 link
find . -xdev -type f | sort | xargs sha256sum >/tmp/sums-{name}
wc -l </tmp/sums-{name}
sync
""")
    compare = f"cd /tmp/mnt && sha256sum --quiet -c /tmp/sums-{name}"
    guest.run(f"echo 3 >/proc/sys/vm/drop_caches\n{compare}")

    # What was deleted comes back to the store (D8), and only that.
    before = settled_used_bytes(server, name)
    guest.run("dd if=/dev/urandom of=/tmp/mnt/large bs=1M count=48 status=none; sync")
    wait_until(lambda: server.used_bytes(name) >= before + 40 * MIB, 60 * SLOW,
               f"{name}: 48 MiB more are in use")
    guest.run("rm /tmp/mnt/large; sync; fstrim -v /tmp/mnt", limit_s=120)
    wait_until(lambda: server.used_bytes(name) <= before + 8 * MIB, 60 * SLOW,
               f"{name}: fstrim gave the space back "
               f"(before {before}, now {server.used_bytes(name)})")
    guest.run(f"echo 3 >/proc/sys/vm/drop_caches\n{compare}")

    guest.run("cd /; umount /tmp/mnt")
    guest.run(CHECK[fs], limit_s=120)
    detach(guest)

    # A new connection has only what the server kept.
    attach(guest, name, f"-C {connections}")
    guest.run(f"mount -t {fs} -o ro /dev/nbd0 /tmp/mnt\n{compare}\ncd /; umount /tmp/mnt")
    detach(guest)
    assert "I/O error" not in guest.console()


def test_discard_of_the_whole_device(guest, server):
    """Quick (D9), gives all space back (D8), and everything reads as zeros afterwards."""
    name = "ext4-1"
    attach(guest, name)
    guest.run("""
blkdiscard /dev/nbd0
echo 3 >/proc/sys/vm/drop_caches
cmp -n 134217728 /dev/nbd0 /dev/zero
""", limit_s=120)
    wait_until(lambda: server.used_bytes(name) < 1 * MIB, 60 * SLOW,
               "the discarded volume takes no space")
    detach(guest)


@pytest.mark.limit(240)
def test_upgrades_under_a_mounted_file_system(guest, server):
    """D1, D12: the server is replaced by a new process, several times, with Debian's own programs
    as clients: nbd-client, and between it and the server a qemu-nbd, which reconnects."""
    guest.run(f"""
qemu-nbd --socket=/tmp/v.sock --export-name=upgraded --persistent --shared=0 --discard=unmap \\
    --fork --pid-file=/tmp/proxy --image-opts driver=nbd,server.type=inet,\\
server.host={uml.HOST_ADDRESS},server.port={PORT},export=upgraded,reconnect-delay=3600
nbd-client -unix /tmp/v.sock -N upgraded /dev/nbd0
for i in $(seq 500); do test "$(cat /sys/block/nbd0/size)" = 1048576 && break; sleep 0.02; done
dmesg --clear
mkfs.ext4 -F -q /dev/nbd0
mount /dev/nbd0 /tmp/mnt
rm -f /tmp/over /tmp/stop /tmp/sums
(set -e
 i=0
 until test -e /tmp/stop; do
    i=$((i + 1))
    dd if=/dev/urandom of=/tmp/mnt/$i bs=64k count=4 conv=fsync status=none
    sha256sum /tmp/mnt/$i >>/tmp/sums
 done; echo over >/tmp/over) >/tmp/said 2>&1 &
""", limit_s=120)

    def files():
        return int(guest.run("cat /tmp/said; cat /tmp/sums 2>/dev/null | wc -l"))
    for _ in range(3):
        aim = files() + 5
        wait_until(lambda: files() >= aim, 60 * SLOW, "files are written")
        server.upgrade()
    aim = files() + 5
    wait_until(lambda: files() >= aim, 60 * SLOW, "files are written")
    print(guest.run("""
touch /tmp/stop
for i in $(seq 2000); do test -e /tmp/over && break; sleep 0.02; done
cat /tmp/said
grep -q ' /tmp/mnt ext4 rw' /proc/mounts
umount /tmp/mnt
fsck.ext4 -f -n /dev/nbd0
mount -o ro /dev/nbd0 /tmp/mnt
sha256sum --quiet -c /tmp/sums
umount /tmp/mnt
dmesg | grep -i -e 'I/O error' -e 'abort' && exit 1
wc -l </tmp/sums
""", limit_s=90))
    detach(guest)
    guest.run("kill $(cat /tmp/proxy)")


@pytest.mark.limit(240)
def test_clone_of_a_snapshot_of_a_mounted_file_system(guest, server):
    """G7: a snapshot taken while ext4 writes holds what was on the disk then: its clone mounts, is
    clean, and has the files as they were, whatever was done to them later; and so has the
    snapshot itself, read-only."""
    attach(guest, "history")
    guest.run("""
mkfs.ext4 -F -q /dev/nbd0
mount /dev/nbd0 /tmp/mnt
cd /tmp/mnt
mkdir kept churn
for n in $(seq 60); do dd if=/dev/urandom of=kept/$n bs=$((n * 3001)) count=1 status=none; done
sync
sha256sum kept/* >/tmp/kept
rm -f /tmp/over /tmp/stop /tmp/sums
(set -e
 i=0
 until test -e /tmp/stop; do
    i=$((i + 1))
    dd if=/dev/urandom of=churn/$((i % 25)) bs=20k count=5 conv=fsync status=none
    dd if=/dev/urandom of=churn/once-$i bs=7k count=1 conv=fsync status=none
    sha256sum churn/once-$i >>/tmp/sums
 done; echo over >/tmp/over) >/tmp/said 2>&1 &
until [ "$(cat /tmp/sums 2>/dev/null | wc -l)" -ge 20 ]; do sleep 0.01; done
""", limit_s=120)
    # What had reached the disk before the snapshot was asked for has to be in it.
    guest.run("cp /tmp/sums /tmp/sums-then")
    server.cli("snapshot", "create", "history@then")
    guest.run("""
at=$(wc -l </tmp/sums)
until [ "$(wc -l </tmp/sums)" -ge $((at + 20)) ]; do sleep 0.01; done
touch /tmp/stop
for i in $(seq 2000); do test -e /tmp/over && break; sleep 0.02; done
cat /tmp/said
test -e /tmp/over
cd /tmp/mnt
for n in $(seq 60); do
    case $((n % 3)) in
    0) rm kept/$n ;;
    1) dd if=/dev/urandom of=kept/$n bs=9000 seek=1 count=2 conv=notrunc status=none ;;
    esac
done
rm -r churn
dd if=/dev/urandom of=more bs=1M count=24 status=none
fstrim /tmp/mnt
cd /; umount /tmp/mnt
fsck.ext4 -f -n /dev/nbd0
""", limit_s=120)
    detach(guest)

    server.cli("clone", "history@then", "again")
    compare = "cd /tmp/mnt && sha256sum --quiet -c /tmp/kept && sha256sum --quiet -c /tmp/sums-then; "
    attach(guest, "again")
    guest.run(f"""
mount /dev/nbd0 /tmp/mnt
{compare}
echo new >kept/new
cd /; umount /tmp/mnt
fsck.ext4 -f -n /dev/nbd0
mount /dev/nbd0 /tmp/mnt
test "$(cat /tmp/mnt/kept/new)" = new
{compare}
cd /; umount /tmp/mnt
""", limit_s=120)
    detach(guest)

    # The snapshot is as it was, also after its clone was written to.
    server.cli("clone", "history@then", "third")
    server.cli("remove", "again", "--yes")
    attach(guest, "third")
    guest.run(f"""
mount /dev/nbd0 /tmp/mnt
{compare}
test ! -e /tmp/mnt/kept/new
cd /; umount /tmp/mnt
fsck.ext4 -f -n /dev/nbd0
""", limit_s=120)
    detach(guest)
    attach(guest, "history@then")
    guest.run("""
test "$(cat /sys/block/nbd0/ro)" = 1
mount -t ext4 -o ro,noload /dev/nbd0 /tmp/mnt
cd /tmp/mnt && sha256sum --quiet -c /tmp/kept
cd /; umount /tmp/mnt
""")
    detach(guest)
    assert "I/O error" not in guest.console()
