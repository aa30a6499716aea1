"""A virtual machine in qemu, without KVM and without an operating system, that can be migrated.

What it runs is guest.s: it writes its disk, reads back, and prints the number of each round.
qemu is told what to do over QMP.
"""

import json
import shutil
import socket
import subprocess
from pathlib import Path

from harness.server import SLOW, wait_until

SECTOR = 512
# Which sectors the guest writes (guest.s).
FIRST, STEP, SPAN, STRIDE = 1, 31, 61, 25
DISK_BYTES = 2 << 20

QEMU = "qemu-system-x86_64"
QMP_LIMIT_S = 30 * SLOW


def missing():
    """Why no guest can be had on this machine, or None."""
    for program in (QEMU, "as", "ld"):
        if not shutil.which(program):
            return f"{program} is not installed"
    return None


def boot_sector(folder):
    """The guest's program, assembled."""
    source = Path(__file__).with_name("guest.s")
    compiled, linked = folder / "guest.o", folder / "guest.bin"
    names = {"FIRST": FIRST, "STEP": STEP, "SPAN": SPAN, "STRIDE": STRIDE}
    subprocess.run(["as", "--32", *(w for n, v in names.items() for w in ("--defsym", f"{n}={v}")),
                    "-o", compiled, source], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary",
                    "-o", linked, compiled], check=True)
    return linked.read_bytes()


def sector_of(n):
    """The sector that round n writes."""
    return FIRST + STEP * (n * STRIDE % SPAN)


def content_of(n):
    """What it writes there."""
    return (n.to_bytes(4, "little") + sector_of(n).to_bytes(4, "little")) * (SECTOR // 8)


class Vm:
    """One qemu process on the disk `uri`.

    device     how the guest sees its disk: virtio-blk-pci or ide-hd
    incoming   True: it waits for a migration instead of starting
    prefix     words put before the program (a namespace)
    """

    def __init__(self, folder, address, export="v", *, device="virtio-blk-pci", incoming=False,
                 prefix=()):
        self.folder = Path(folder)
        self.folder.mkdir()
        self.output = self.folder / "debug"
        self.output.touch()
        self.events = []
        self._said = self.folder / "qemu.log"
        self._control = self.folder / "c"
        self._incoming = self.folder / "i"
        host, port = address
        disk = {"driver": "raw", "node-name": "disk",
                "file": {"driver": "nbd", "export": export, "reconnect-delay": 30,
                         "server": {"type": "inet", "host": host, "port": str(port)}}}
        words = [QEMU, "-nodefaults", "-no-user-config", "-display", "none",
                 "-machine", "pc,accel=tcg", "-m", "16", "-blockdev", json.dumps(disk),
                 "-device", f"{device},drive=disk,bootindex=0",
                 "-chardev", f"file,id=debug,path={self.output}",
                 "-device", "isa-debugcon,iobase=0xe9,chardev=debug",
                 "-qmp", f"unix:{self._control},server=on,wait=off"]
        if incoming:
            words += ["-incoming", f"unix:{self._incoming}"]
        with open(self._said, "wb") as said:
            # It must not outlive the test that started it, however that one ends.
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *prefix, *words], stdin=subprocess.DEVNULL,
                stdout=said, stderr=said)
        try:
            self._open_control()
        except BaseException:
            self.kill()
            raise

    # -- QMP -----------------------------------------------------------------

    def _open_control(self):
        self._qmp = socket.socket(socket.AF_UNIX)
        self._qmp.settimeout(QMP_LIMIT_S)

        def connected():
            self.check_alive()
            try:
                self._qmp.connect(str(self._control))
                return True
            except OSError:
                return False
        wait_until(connected, QMP_LIMIT_S, "qemu's control socket is there")
        self._lines = self._qmp.makefile("r")
        assert "QMP" in self._next(), self.said()
        self.call("qmp_capabilities")

    def _next(self):
        line = self._lines.readline()
        assert line, f"qemu ended\n{self.said()}"
        return json.loads(line)

    def call(self, command, **arguments):
        """One command's result; events that come before it are kept in `events`."""
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self._next()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise AssertionError(f"{command}: {message['error']}\n{self.said()}")
            else:
                return message["return"]

    def state(self):
        return self.call("query-status")["status"]

    def wait_state(self, *wanted, limit_s=30 * SLOW):
        wait_until(lambda: self.state() in wanted, limit_s, f"the state is {' or '.join(wanted)}")

    # -- migration -------------------------------------------------------------

    def migrate_to(self, target):
        """Begins to send everything to `target`, which was made with `incoming`."""
        self.call("migrate", uri=f"unix:{target._incoming}")

    def migration(self):
        return self.call("query-migrate").get("status")

    def wait_migration(self, *wanted, limit_s=30 * SLOW):
        def over():
            status = self.migration()
            assert status in wanted or status not in ("failed", "cancelled", "completed"), (
                f"the migration is {status}: {self.call('query-migrate')}\n{self.said()}")
            return status in wanted
        wait_until(over, limit_s, f"the migration is {' or '.join(wanted)}")

    # -- the guest ---------------------------------------------------------------

    def printed(self):
        return self.output.read_text()

    def io_errors(self):
        """What it said about requests that failed; nothing where all is well."""
        self.call("query-status")  # so that all events up to now are here
        return [e for e in self.events if e["event"] in ("BLOCK_IO_ERROR", "BLOCK_JOB_ERROR")]

    # -- the process -----------------------------------------------------------

    def said(self):
        return "--- qemu ---\n" + self._said.read_text(errors="replace")

    def check_alive(self):
        assert self.process.poll() is None, f"qemu ended\n{self.said()}"

    def quit(self):
        """As a management program ends it, once it is of no more use."""
        self._qmp.sendall(b'{"execute": "quit"}')
        self._end(self.process.wait, 30 * SLOW)
        assert self.process.returncode == 0, self.said()

    def kill(self):
        self.process.kill()
        self._end(self.process.wait)

    def _end(self, wait, *limit):
        wait(*limit)
        if hasattr(self, "_lines"):
            self._lines.close()
        self._qmp.close()
