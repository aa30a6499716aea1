"""A write load that remembers what it sent and what was answered.

Every write carries bytes that only it could have written, at every place
(content()), so that whatever is found on a volume afterwards can be traced to the
request it came from; history.py judges it. Over simple replies, on several
connections, with several requests in flight on each.
"""

import random
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass

from . import rawnbd
from .rawnbd import CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, FLAG_FUA, FLAG_NO_HOLE

PAGE = 4096
WRITE, ZERO, TRIM, FLUSH = CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM, CMD_FLUSH


@dataclass(eq=False)
class Op:
    number: int                 # unique in a run; names the bytes of a write
    connection: int
    kind: int
    offset: int = 0
    length: int = 0
    fua: bool = False
    sent_ns: int = None         # before the first byte of it went out
    answered_ns: int = None     # after its answer had come in
    error: int = 0

    @property
    def no_hole(self):
        """Every other zeroing keeps its space."""
        return self.kind == ZERO and self.number % 2 == 1

    @property
    def overtakable(self):
        """May be overtaken by later requests of its connection: it may have to wait for room
        while what comes behind it is read on."""
        return self.kind in (ZERO, TRIM)

    def __str__(self):
        what = {WRITE: "write", ZERO: "zero", TRIM: "trim", FLUSH: "flush"}.get(
            self.kind, f"command {self.kind}")
        state = ("unanswered" if self.answered_ns is None else
                 f"answered {self.answered_ns}" if not self.error else f"error {self.error}")
        flags = (" FUA" if self.fua else "") + (" NO_HOLE" if self.no_hole else "")
        return (f"#{self.number} {what}{flags} {self.offset}+{self.length} "
                f"on {self.connection}, sent {self.sent_ns}, {state}")


_tails = {}


def _tail(number):
    """The bytes of a page behind its number: noise for most writes, compressible for some."""
    tail = _tails.get(number)
    if tail is None:
        rng = random.Random(number)
        if number % 3 == 0:
            tail = rng.randbytes(64) * (PAGE // 64)
        else:
            tail = rng.randbytes(PAGE)
        if len(_tails) > 4096:
            _tails.clear()
        _tails[number] = tail = tail[8:]
    return tail


def content(number, low, high):
    """What write `number` puts at bytes low..high of the volume."""
    tail = _tail(number)
    mark = (number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    first, last = low // PAGE, (high - 1) // PAGE
    pages = b"".join([struct.pack("<Q", p ^ mark) + tail for p in range(first, last + 1)])
    return pages[low - first * PAGE:high - first * PAGE]


@dataclass
class Shape:
    """What a load is made of."""
    size: int                       # of the volume
    connections: int = 3
    depth: int = 4
    ops: int = 200                  # how many to send at most
    flush_every: float = 0.06       # share of requests
    fua: float = 0.08
    zeros: float = 0.12
    trims: float = 0.08
    lengths: tuple = ((512, 8), (4096, 8), (16384, 6), (65536, 4), (262144, 2), (1 << 20, 1))
    odd: float = 0.3                # share of offsets and lengths off any alignment
    hot: float = 0.4                # share that goes to the hot first part of the volume
    hot_part: int = 16              # which is this part of it
    pace_us: int = 0                # at least so long from one request to the next


class Load:
    """Sends; run() comes back when all is answered, the server is gone, or stop() says so."""

    def __init__(self, server, volume, shape, rng, first_number=1, address=None, structured=False):
        self.shape, self.rng = shape, rng
        self.ops = []
        self.number = first_number
        self.clients = [rawnbd.connect(server, volume, address=address)
                        for _ in range(shape.connections)]
        self.lanes = [self._lane(i, c.sock) for i, c in enumerate(self.clients)]

    def _lane(self, number, sock):
        return _Lane(number, sock)

    def _next(self, connection):
        s, rng = self.shape, self.rng
        op = Op(self.number, connection, WRITE)
        self.number += 1
        x = rng.random()
        if x < s.flush_every:
            op.kind = FLUSH
            return op
        x = rng.random()
        op.kind = ZERO if x < s.zeros else TRIM if x < s.zeros + s.trims else WRITE
        op.fua = rng.random() < s.fua
        lengths, weights = zip(*s.lengths)
        length = rng.choices(lengths, weights)[0]
        span = s.size // s.hot_part if rng.random() < s.hot else s.size
        offset = rng.randrange(span)
        if rng.random() < s.odd:
            length = rng.randrange(max(1, length // 2), length + length // 2 + 2)
        else:
            unit = min(length, 4096)
            offset = offset // unit * unit
        op.offset = min(offset, s.size - 1)
        op.length = min(length, s.size - op.offset)
        return op

    def _bytes(self, op):
        flags = FLAG_FUA if op.fua else 0
        if op.no_hole:
            flags |= FLAG_NO_HOLE
        head = struct.pack(">LHHQQL", rawnbd.REQUEST_MAGIC, flags, op.kind, op.number,
                           op.offset, op.length)
        if op.kind == WRITE:
            return head + content(op.number, op.offset, op.offset + op.length)
        return head

    def run(self, stop=lambda load: False, limit_s=60):
        """stop(self) is asked after each step; true ends the sending."""
        for c in self.clients:
            c.sock.setblocking(False)
        deadline = time.monotonic() + limit_s
        sending = True
        next_ns = 0
        while True:
            if stop(self):
                sending = False
            if sending and len(self.ops) >= self.shape.ops:
                sending = False
            open_lanes = [lane for lane in self.lanes if not lane.gone]
            for lane in open_lanes:
                while (sending and len(lane.waiting) < self.shape.depth
                       and not lane.backlogged() and len(self.ops) < self.shape.ops):
                    if self.shape.pace_us:
                        if time.monotonic_ns() < next_ns:
                            break
                        next_ns = time.monotonic_ns() + 1000 * self.shape.pace_us
                    op = self._next(lane.number)
                    lane.add(op, self._bytes(op))
                    self.ops.append(op)
            busy = [lane for lane in open_lanes if lane.waiting or lane.out]
            if not busy:
                if sending and open_lanes:
                    time.sleep(min(0.001, self.shape.pace_us / 1e6))
                    continue
                return self
            if time.monotonic() > deadline:
                stuck = [str(op) for lane in busy for op in lane.waiting.values()]
                raise AssertionError(f"no answer within {limit_s} s: {stuck[:5]}")
            readable, writable, _ = select.select(
                [lane.sock for lane in busy], [lane.sock for lane in busy if lane.out], [],
                0.001 if self.shape.pace_us and sending else 0.05)
            for lane in busy:
                if lane.sock in readable:
                    lane.read()
                if lane.sock in writable and not lane.gone:
                    lane.write()

    def drain(self):
        """After the server's death: takes in the answers it had still given."""
        for lane in self.lanes:
            lane.sock.settimeout(10)
            while not lane.gone:
                lane.read()

    def close(self):
        for c in self.clients:
            c.close()

    def sent(self):
        return [op for op in self.ops if op.sent_ns is not None]


class Background:
    """A load that runs beside what the test does; leaving the block ends the sending and waits
    for the answers. What goes wrong in it is raised there."""

    def __init__(self, load, limit_s):
        self.load, self.limit_s = load, limit_s
        self.problem = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        try:
            self.load.run(lambda load: self._stop.is_set(), self.limit_s)
        except BaseException as e:
            self.problem = e

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, kind, value, trace):
        self._stop.set()
        self._thread.join()
        if kind is None and self.problem:
            raise self.problem

    def running(self):
        return self._thread.is_alive()


def longest_pause_s(ops):
    """The longest time in which nothing was answered while something was waiting for it."""
    longest, last = 0, None
    for at in sorted(op.answered_ns for op in ops if op.answered_ns is not None):
        if last is not None:
            longest = max(longest, at - last)
        last = at
    return longest / 1e9


class _Lane:
    """One connection's bytes: what is to go out, and whose answers are awaited."""

    def __init__(self, number, sock):
        self.number, self.sock = number, sock
        self.out = []               # [op, bytes still to send]
        self.waiting = {}
        self.input = bytearray()
        self.gone = False

    def backlogged(self):
        return sum(len(data) for _, data in self.out) > 8 << 20

    def add(self, op, data):
        self.out.append([op, memoryview(data)])
        self.waiting[op.number] = op
        self.write()

    def write(self):
        while self.out:
            op, data = self.out[0]
            if op.sent_ns is None:
                op.sent_ns = time.monotonic_ns()
            try:
                n = self.sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                # There may still be answers to read.
                self.out.clear()
                return
            if n == len(data):
                self.out.pop(0)
            else:
                self.out[0][1] = data[n:]

    def ended(self):
        self.gone = True
        self.waiting.clear()

    def read(self):
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return
        except (TimeoutError, socket.timeout):
            raise AssertionError("a dead server's connection stays open") from None
        except OSError:
            data = b""
        if not data:
            self.ended()
            return
        now = time.monotonic_ns()
        self.input += data
        while len(self.input) >= 16:
            magic, error, number = struct.unpack_from(">LLQ", self.input)
            if magic != rawnbd.SIMPLE_REPLY_MAGIC:
                raise rawnbd.ProtocolError(f"reply magic {magic:#x}")
            del self.input[:16]
            op = self.waiting.pop(number, None)
            if op is None:
                raise rawnbd.ProtocolError(f"an answer to request {number}, which is not open")
            op.answered_ns, op.error = now, error


class Reconnecting(Load):
    """A load whose connections are made again when the server closes them, as the clients that
    survive a restart do: what was not answered is sent again, in order, on the new one."""

    def __init__(self, server, volume, shape, rng, reconnect_s=30, **more):
        self.server, self.volume, self.address = server, volume, more.get("address")
        self.reconnect_s = reconnect_s
        self.reconnects = 0
        super().__init__(server, volume, shape, rng, **more)

    def _lane(self, number, sock):
        return _ReconnectingLane(number, sock, self)

    def _next(self, connection):
        # Whoever had its turn is last in the row: at any pace all connections are used, and so
        # notice that they were closed.
        self.lanes.append(self.lanes.pop(0))
        return super()._next(connection)

    def connect_again(self, number):
        """A new socket for a lane, and the number of the connection it is."""
        deadline = time.monotonic() + self.reconnect_s
        while True:
            try:
                client = rawnbd.connect(self.server, self.volume, address=self.address)
                break
            except (OSError, rawnbd.Closed, rawnbd.OptionError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.reconnects += 1
        self.clients[number].close()
        self.clients[number] = client
        client.sock.setblocking(False)
        return client.sock, self.shape.connections + self.reconnects


class _ReconnectingLane(_Lane):
    def __init__(self, number, sock, load):
        super().__init__(number, sock)
        self.load, self.place = load, number

    def ended(self):
        again = sorted(self.waiting.values(), key=lambda op: op.number)
        self.input.clear()
        self.out.clear()
        # Each connection is one of its own to the judge, who knows nothing of the order between
        # requests on different ones but their times.
        self.sock, self.number = self.load.connect_again(self.place)
        for op in again:
            op.connection = self.number
            self.out.append([op, memoryview(self.load._bytes(op))])
        self.write()
