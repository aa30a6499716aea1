"""What the usual clients see of an upgrade, with the settings that the manual gives for them
(D1). nbd-client is in kernel/test_kernel.py: it needs a kernel."""

import errno
import subprocess
import threading

import nbd
import pytest

from harness.server import SLOW, wait_until

KIB = 1 << 10


class QemuIo:
    """qemu-io with one connection, told by its standard input what to do."""

    def __init__(self, server, more=""):
        self.process = subprocess.Popen(
            ["qemu-io", "--image-opts", f"driver=nbd,host={server.host},port={server.port},"
             f"export=v{more}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, bufsize=1)

    def tell(self, command):
        """Gives the first line of its answer."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        while True:
            line = self.process.stdout.readline()
            assert line, "qemu-io ended"
            line = line.replace("qemu-io> ", "").strip()
            if line and not line.startswith("64 KiB, "):
                return line

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.kill()
        self.process.wait()


def test_qemu_with_reconnect_delay(servers):
    """Writes go on as if nothing had happened, and are there."""
    server = servers.start({"v": "64M"})
    stop, problems, patterns = threading.Event(), [], {}
    with QemuIo(server, ",reconnect-delay=60") as qemu:
        def write():
            n = 0
            try:
                while not stop.is_set():
                    place, pattern = n % 1000, n % 250 + 1
                    said = qemu.tell(f"write -P {pattern} {place * 64}k 64k")
                    assert said.startswith("wrote 65536/65536"), said
                    patterns[place] = pattern
                    n += 1
            except BaseException as e:
                problems.append(e)
        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(3):
            aim = min(len(patterns) + 30, 1000)
            wait_until(lambda: len(patterns) >= aim or problems, 60 * SLOW, "writes go on")
            server.upgrade()
        aim = min(len(patterns) + 30, 1000)
        wait_until(lambda: len(patterns) >= aim or problems, 60 * SLOW, "writes go on")
        stop.set()
        writer.join()
        assert not problems, problems
        for place, pattern in patterns.items():
            said = qemu.tell(f"read -P {pattern} {place * 64}k 64k")
            assert said.startswith("read 65536/65536"), said


def test_qemu_without_reconnect_delay(servers):
    """What the setting is for."""
    server = servers.start({"v": "1M"})
    with QemuIo(server) as qemu:
        assert qemu.tell("write 0 64k").startswith("wrote ")
        server.upgrade()
        assert qemu.tell("write 0 64k") == "write failed: Input/output error"


class Reconnecting:
    """What the manual tells an application that uses libnbd: a request that failed because the
    connection was gone is sent again on a new handle."""

    def __init__(self, uri):
        self.uri, self.connects = uri, 0
        self._connect()

    def _connect(self):
        def try_it():
            self.h = nbd.NBD()
            try:
                self.h.connect_uri(self.uri)
                return True
            except nbd.Error:
                return False
        wait_until(try_it, 60 * SLOW, "the server is back")
        self.connects += 1

    def call(self, name, *args):
        while True:
            try:
                return getattr(self.h, name)(*args)
            except nbd.Error:
                if not (self.h.aio_is_closed() or self.h.aio_is_dead()):
                    raise
                self._connect()


@pytest.mark.parametrize("tcp", [False, True])
def test_libnbd_application(servers, rng, tcp):
    server = servers.start({"v": "16M"})
    client = Reconnecting(server.uri("v", tcp=tcp))
    stop, problems, written = threading.Event(), [], {}

    def write():
        n = 0
        try:
            while not stop.is_set():
                data, at = rng.randbytes(8 * KIB), n % 500 * 16 * KIB
                client.call("pwrite", data, at)
                written[at] = data
                n += 1
                if n % 50 == 0:
                    client.call("flush")
        except BaseException as e:
            problems.append(e)
    thread = threading.Thread(target=write)
    thread.start()
    for n in range(3):
        server.upgrade()
        wait_until(lambda: client.connects > n + 1 or problems, 60 * SLOW, "it connects again")
    stop.set()
    thread.join()
    assert not problems, problems
    for at, data in written.items():
        assert client.call("pread", len(data), at) == data


def test_libnbd_has_no_reconnect_of_its_own(servers):
    """The request under way fails with ENOTCONN, later ones too, and the handle is of no more
    use."""
    server = servers.start({"v": "1M"})
    h = nbd.NBD()
    h.connect_uri(server.uri("v"))
    h.pwrite(bytes(512), 0)
    server.upgrade()
    with pytest.raises(nbd.Error) as first:
        h.pwrite(bytes(512), 0)
    assert first.value.errnum == errno.ENOTCONN
    assert h.aio_is_closed() or h.aio_is_dead()
    with pytest.raises(nbd.Error):
        h.pwrite(bytes(512), 0)
