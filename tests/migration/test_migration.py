"""Live migration of a virtual machine that writes its disk all the time (G1, G4).

qemu's destination opens the volume while the source still holds it. The volume moves when the
source has stopped and the destination first needs it, and back when it comes to nothing. The
guest (guest.s) reads back what it wrote in earlier rounds, wherever it then ran: a write that
was lost or done twice over a newer one stops it.

Wherever source and destination are: at two gateways, at one, and at one but on two hosts.
"""

import contextlib

import pytest

import vm
from harness import rawnbd, stores
from harness.gateway import elsewhere
from harness.netns import Namespace
from harness.server import SLOW, Server, wait_until
from vm import SPAN, Vm

PORT = 10809
HOPS = 3
ARGS = [
    # `owner show` takes up to a third of it on FoundationDB.
    "--lease-ms", 3000,
    # For so long qemu's destination waits in vain when it starts, and then goes on: it looks
    # for a partition table, to guess the disk's geometry, while the source is busy.
    "--owner-wait", f"{1000 * SLOW:.0f}ms",
]


class Place:
    """Where a virtual machine can run, and the gateway it uses there."""

    def __init__(self, server, address=None, prefix=()):
        self.server, self.prefix = server, prefix
        self.address = address or (server.host, server.port)


@contextlib.contextmanager
def two_gateways(folder):
    first = Server(folder / "1", {"v": vm.DISK_BYTES}, ARGS, store=folder / "store")
    # On FoundationDB it takes itself for another machine; the embedded store is on one.
    second = Server(folder / "2", args=ARGS, store=folder / "store",
                    prefix=elsewhere(folder) if stores.on_fdb() else ())
    with first, second:
        yield Place(first), Place(second)


@contextlib.contextmanager
def one_gateway(folder):
    with Server(folder / "1", {"v": vm.DISK_BYTES}, ARGS, store=folder / "store") as server:
        yield Place(server), Place(server)


@contextlib.contextmanager
def two_hosts(folder):
    """One gateway, whose clients have different addresses."""
    with contextlib.ExitStack() as stack:
        middle = Namespace()
        stack.callback(middle.end)
        server = Server(folder / "1", {"v": vm.DISK_BYTES}, ARGS, store=folder / "store",
                        host="0.0.0.0", port=PORT, prefix=middle.enter, reachable=False)
        places = []
        for n in (1, 2):
            host = Namespace(inside=middle)
            stack.callback(host.end)
            middle.run(f"ip link add to{n} type veth peer name eth netns {host.holder.pid}")
            for one, device, end in ((middle, f"to{n}", 1), (host, "eth", 2)):
                one.run(f"ip addr add 10.98.{n}.{end}/24 dev {device}")
                one.run(f"ip link set {device} up")
            places.append(Place(server, (f"10.98.{n}.1", PORT), host.enter))
        with server:
            yield places


@pytest.fixture(params=[two_gateways, one_gateway,
                        pytest.param(two_hosts, marks=pytest.mark.lmdb(
                            "who may write is settled above the store; a cluster would have to "
                            "be in the gateway's namespace"))],
                ids=lambda param: param.__name__)
def places(request, folder):
    why = vm.missing()
    if why:
        pytest.skip(f"no virtual machine here: {why}")
    with request.param(folder) as (first, second):
        yield first, second
        # What a person is told when it fails.
        for server in {first.server, second.server}:
            print(server.log_tail())


class Guest:
    """The guest, and the qemu processes that it ran in one after the other."""

    def __init__(self, folder, place, device):
        self.folder, self.device = folder, device
        self.program = vm.boot_sector(folder)
        with rawnbd.connect(place.server, "v") as c:
            c.write(0, self.program)
        self.made = []
        self.ran = [self.start(place)]

    def start(self, place, incoming=False):
        """A new process; it is not the guest's yet where it is `incoming`."""
        one = Vm(self.folder / f"vm{len(self.made)}", place.address, device=self.device,
                 incoming=incoming, prefix=place.prefix)
        self.made.append(one)
        return one

    @property
    def vm(self):
        return self.ran[-1]

    def rounds(self):
        """How many rounds it has done: none left out, none done twice, none found wrong."""
        lines = "".join(one.printed() for one in self.ran).split("\n")[:-1]
        wrong = [(n, line) for n, line in enumerate(lines, 1) if line != f"{n:08x}"]
        assert not wrong, f"in round and what the guest said: {wrong[:3]}\n{self.vm.said()}"
        return len(lines)

    def go_on(self, rounds):
        """Until it has done so many more."""
        enough = self.rounds() + rounds
        wait_until(lambda: self.rounds() >= enough, 30 * SLOW, f"{rounds} more rounds", 0.05)

    def check_errors(self):
        for one in self.made:
            if one.process.poll() is None:
                assert not one.io_errors(), one.said()

    def end(self, place):
        """It stops where it is; the volume then holds what it said it wrote."""
        self.vm.call("stop")
        self.check_errors()
        for one in self.made:
            if one.process.poll() is None:
                one.quit()
        last = self.rounds()
        image = bytearray(vm.DISK_BYTES)
        image[:vm.SECTOR] = self.program
        for n in range(max(1, last - SPAN + 1), last + 1):
            put(image, n)
        with rawnbd.connect(place.server, "v", structured=True) as c:
            found = c.read_all()
        same = found == image
        # The round it was stopped in may have got as far as its write.
        put(image, last + 1)
        assert same or found == image, f"the volume is not what round {last} left"

    def kill(self):
        for one in self.made:
            if one.process.poll() is None:
                one.kill()


def put(image, n):
    at = vm.sector_of(n) * vm.SECTOR
    image[at:at + vm.SECTOR] = vm.content_of(n)


@pytest.fixture
def guest(places, folder):
    """begin(device) starts the guest at the first place."""
    made = []

    def begin(device="virtio-blk-pci"):
        made.append(Guest(folder, places[0], device))
        return made[0]
    yield begin
    for one in made:
        one.kill()


def wait_owner(place):
    """A gateway where nothing was asked for a while may have lost the volume for a moment: to
    the destination, which looks for a partition table when it starts."""
    server = place.server

    def owns():
        owner = server.json("info", "v")["owner"]
        return owner and owner["pid"] == server.pid
    wait_until(owns, 10 * SLOW, f"process {server.pid} owns the volume", 0.1)


def check_shown(place):
    """`owner show` waits for a sign of life where those are what tells the living."""
    owner = place.server.json("owner", "show", "v")["owner"]
    assert owner["pid"] == place.server.pid and owner["alive"]


def migrate(guest, source_place, target_place):
    """Moves the guest; gives the process that it left, which is still there."""
    source, target = guest.vm, guest.start(target_place, incoming=True)
    guest.go_on(20)
    wait_owner(source_place)
    source.migrate_to(target)
    source.wait_migration("completed")
    target.wait_state("running")
    guest.ran.append(target)
    guest.go_on(20)
    wait_owner(target_place)
    assert source.state() == "postmigrate"
    return source


@pytest.mark.parametrize("device", ["virtio-blk-pci", "ide-hd"])
def test_G4_to_and_fro(guest, places, device):
    """Each with a new destination. The sources go away while the guest is elsewhere, but for
    one that is still there when it has come back. (The BIOS has every write of a virtio disk
    made durable, and none of an IDE disk's.)"""
    guest = guest(device)
    guest.go_on(SPAN + 20)
    check_shown(places[0])
    left = []
    for hop in range(HOPS):
        here, there = places[hop % 2], places[(hop + 1) % 2]
        left.append(migrate(guest, here, there))
        # Everything that was written over there is read here.
        guest.go_on(SPAN)
        guest.check_errors()
        if hop != 1:
            while left:
                left.pop().quit()
        guest.go_on(20)
        wait_owner(there)
    check_shown(there)
    guest.end(places[0])


def test_G4_a_migration_that_fails(guest, places):
    """The source goes on as if nothing had been, also when it had already stopped and flushed
    for the destination; and can be migrated afterwards."""
    guest = guest()
    guest.go_on(40)
    source = guest.vm
    for late in (False, True):
        # So slow that it does not come to an end, or a halt before the last step.
        source.call("migrate-set-parameters", **{"max-bandwidth": 1 << 30 if late else 1 << 14})
        source.call("migrate-set-capabilities", capabilities=[
            {"capability": "pause-before-switchover", "state": late}])
        for killed in (False, True):
            target = guest.start(places[1], incoming=True)
            source.migrate_to(target)
            if late:
                source.wait_migration("pre-switchover")
                assert source.state() == "finish-migrate"
            else:
                source.wait_migration("active")
                guest.go_on(20)
            if killed:
                target.kill()
                if late:
                    source.call("migrate-continue", state="pre-switchover")
                source.wait_migration("failed")
            else:
                source.call("migrate_cancel")
                source.wait_migration("cancelled")
                target.kill()
            source.wait_state("running")
            guest.go_on(40)
            wait_owner(places[0])
            guest.check_errors()
    source.call("migrate-set-capabilities", capabilities=[
        {"capability": "pause-before-switchover", "state": False}])
    migrate(guest, *places).quit()
    guest.go_on(SPAN)
    guest.end(places[0])
