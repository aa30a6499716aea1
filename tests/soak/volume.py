"""A volume under load, and what must be on it.

It lives in rounds. In a round some connections of all kinds write, zero, trim, flush, read and ask
for block status, for some seconds; clients die, and the server is killed or replaced under
them. At its end all answers are awaited, the whole volume is read and judged by
harness/history.py: an order of the requests must explain every byte. Every read meanwhile
must show, in each place, something that can have been there between its sending and its
answer. What was read at the end is the beginning of the next round.

In some rounds clients that lost their connection send again what was not answered, as Linux and
qemu do; in others it is given up, so that it may be there or not, but whole and in order (G2, G3).

Snapshots are judged the same way when they are made, and compared with that later.
"""

import bisect
import copy
import dataclasses
import hashlib
import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from harness import rawnbd
from harness.history import PIECE, Check, Violation, answered, check_death, keep_evidence
from harness.load import FLUSH, TRIM, WRITE, ZERO, Op, content

import tlsnbd
from world import Defect, now_ns

READ, STATUS = rawnbd.CMD_READ, rawnbd.CMD_BLOCK_STATUS
CHANGES = (WRITE, ZERO, TRIM)
MIB = 1 << 20
LOST = (OSError, rawnbd.Closed, rawnbd.OptionError, ssl.SSLError)
ANSWER_LIMIT_S = 120
# Where servers cut reads at the latest (CONN_REPLY_BYTES_SHORT); each part is of one moment.
READ_PIECE = 64 << 10
ROUND_OPS = 2500
SNAPSHOTS = 4
# (length, weight): mostly small, some large enough for several generations.
LENGTHS = ((512, 6), (4096, 16), (16384, 6), (65536, 4), (262144, 2), (MIB, 1), (5 * MIB, 0.05))
NAMES = {WRITE: "writes", ZERO: "zeroes", TRIM: "trims", FLUSH: "flushes", READ: "reads",
         STATUS: "block status"}


class Snapshot:
    """born: which of the volume's it is, in the order in which they were made."""

    def __init__(self, name, path, digest, born):
        self.name, self.path, self.digest, self.born = name, path, digest, born
        self.clones = 0


class Volume:
    """name, base (where the part that is used begins), span (its length), numbers: of all
    requests of a run, so that bytes of one volume on another show."""

    def __init__(self, world, name, span, numbers, context, base=0, options=()):
        self.world, self.name, self.span, self.base = world, name, span, base
        self.numbers, self.context, self.options = numbers, context, options
        self.rng = world.rng("volume", name)
        self.before = bytes(span)
        self.ops = []
        self.home = None
        self.connections = 0
        self.round = 0
        self.ending = threading.Event()
        self.send_again = True
        # Held but while a round runs; who takes it then keeps the round from being judged.
        self.between = threading.Lock()
        self.between.acquire()
        self.snapshots = {}
        self.maybe = set()              # snapshots that a killed command may still make
        self.names = 0
        self.lanes = []
        self.thread = None
        self.origin = None              # (volume, Snapshot): of what it is a clone
        self.exists = False
        self.evicted_until_ns = 0       # its clients may be cut off until then

    # -- connections -------------------------------------------------------------

    def connect(self, slot, unix, tls, style, name=None):
        client = tlsnbd.Client(slot.address(unix), ANSWER_LIMIT_S)
        name = name or self.name
        try:
            client.handshake()
            if tls:
                client.starttls(self.context)
            if style == "structured":
                client.structured_reply()
            elif style == "extended":
                client.extended_headers()
            if style != "simple":
                client.set_meta_context(name, "base:allocation")
            client.go(name)
        except BaseException:
            client.close()
            raise
        self.world.count("connections")
        return client

    def connect_home(self, unix=True, tls=False, style="structured"):
        """To wherever the volume is at home by now; its server may be on its way back."""
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while True:
            slot = self.home
            try:
                return self.connect(slot, unix, tls, style), slot
            except LOST as e:
                if time.monotonic() > deadline:
                    raise Defect(f"no connection to {self.name} at server {slot.name} within "
                                 f"{ANSWER_LIMIT_S} s: {e}") from None
                time.sleep(0.05)

    # -- requests ------------------------------------------------------------------

    def next_op(self, rng, connection):
        op = Op(next(self.numbers), connection, WRITE)
        kinds = ((WRITE, 44), (READ, 34), (ZERO, 7), (TRIM, 5), (FLUSH, 5), (STATUS, 5))
        op.kind = rng.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
        if op.kind == FLUSH:
            return op
        lengths, weights = zip(*LENGTHS)
        length = rng.choices(lengths, weights)[0]
        hot = rng.random() < 0.4
        op.offset = rng.randrange(self.span // 16 if hot else self.span)
        if rng.random() < 0.3:
            # Less than a block, and off all borders.
            length = rng.randrange(max(1, length // 2), length + length // 2 + 2)
        else:
            op.offset -= op.offset % min(length, 4096)
        op.length = min(length, self.span - op.offset)
        op.fua = op.kind in (WRITE, ZERO, TRIM) and rng.random() < 0.06
        return op

    def encode(self, client, op):
        """The cookie and the bytes of it."""
        flags = (rawnbd.FLAG_FUA if op.fua else 0) | (rawnbd.FLAG_NO_HOLE if op.no_hole else 0)
        data = (content(op.number, op.offset, op.offset + op.length) if op.kind == WRITE else b"")
        offset = 0 if op.kind == FLUSH else self.base + op.offset
        return client.request(op.kind, offset, op.length, flags, data, send=False)

    def explain(self, low, data, sent_ns, answered_ns, piece):
        """Each place of what was read must show something that can have been there in that time:
        of a request sent before the answer, and not overwritten for sure before the reading began.
        A read is carried out in pieces, as a long write is; `piece`: the shortest they can be."""
        high = low + len(data)
        near = [op for op in list(self.ops) if op.kind in CHANGES and op.offset < high
                and low < op.offset + op.length and op.sent_ns is not None
                and op.sent_ns < answered_ns and not op.error]
        borders = sorted({low, high, *range(low, high, piece)}
                         | {min(max(b, low), high) for op in near
                            for b in (*range(op.offset, op.offset + op.length, PIECE),
                                      op.offset + op.length)})
        cells = [[] for _ in borders]
        for op in near:
            i = bisect.bisect_left(borders, max(low, op.offset))
            end = min(high, op.offset + op.length)
            while borders[i] < end:
                cells[i].append(op)
                i += 1
        data = memoryview(data)
        for a, b, there in zip(borders, borders[1:], cells):
            found = data[a - low:b - low]
            settled = [op for op in there
                       if op.answered_ns is not None and op.answered_ns < sent_ns]
            last = max((op.sent_ns for op in settled), default=None)
            if last is None and found == self.before[a:b]:
                continue
            for op in reversed(there):
                done = op.answered_ns if op.answered_ns is not None else float("inf")
                if (last is None or done >= last) and self.holds(op, a, b, found):
                    break
            else:
                return (f"bytes {a}..{b} of a read of {low}..{high} (sent {sent_ns}, answered "
                        f"{answered_ns}) are {bytes(found[:24]).hex()}..., which cannot have been "
                        f"there then; touched by:\n  " + "\n  ".join(map(str, there[-12:])))
        self.world.count("verified bytes", len(data))
        return None

    @staticmethod
    def holds(op, low, high, found):
        if op.kind == WRITE:
            glance = min(high, low + 16)
            return (content(op.number, low, glance) == found[:glance - low]
                    and content(op.number, low, high) == found)
        return op.kind in (ZERO, TRIM) and found == bytes(high - low)

    def check_read(self, offset, data, sent_ns, answered_ns, what="read"):
        self.world.count("reads checked")
        wrong = self.explain(offset, data, sent_ns, answered_ns,
                             self.span if "snapshot" in what else READ_PIECE)
        if wrong:
            raise Defect(f"{what} of {self.name}, round {self.round}: {wrong}\n"
                         f"kept: {self.keep('read', data)}")

    def check_status(self, op, result):
        """What is told to be zeros must have been that."""
        for extents in result.extents.values():
            at = op.offset
            for length, flags in extents:
                length = min(length, op.offset + op.length - at)
                if length <= 0:
                    break
                if flags & rawnbd.STATE_ZERO:
                    self.check_read(at, bytes(length), op.sent_ns, result.answered_ns,
                                    "block status")
                at += length

    def keep(self, what, after):
        folder = self.world.folder / "evidence" / f"{self.name}-{self.round}-{what}"
        plain = [Op(**{f.name: getattr(op, f.name) for f in dataclasses.fields(Op)})
                 for op in self.changes()]
        return keep_evidence(folder, self.before, plain, bytes(after))

    def changes(self):
        """The requests that a verdict is about."""
        return [op for op in list(self.ops)
                if op.kind not in (READ, STATUS) and op.sent_ns is not None]

    # -- rounds ------------------------------------------------------------------------

    def run(self, chores):
        """Until the run is over. chores(volume, rng) is called between rounds, with all
        connections closed."""
        while not self.world.over.is_set():
            self.a_round()
            if not self.world.over.is_set():
                chores(self, self.rng)

    def a_round(self):
        rng = self.rng
        self.round += 1
        self.ops = []
        self.ending.clear()
        self.send_again = rng.random() < 0.5
        self.lanes = [Lane(self, rng.randrange(1 << 62)) for _ in range(rng.choice((2, 3, 3, 4)))]
        self.between.release()
        threads = [self.world.thread(f"{self.name} round {self.round} lane {i}", lane.run)
                   for i, lane in enumerate(self.lanes)]
        end = time.monotonic() + min(rng.uniform(4, 16), max(2, self.world.seconds / 5))
        while (time.monotonic() < end and not self.ending.is_set() and len(self.ops) < ROUND_OPS
               and not self.world.over.wait(0.05)):
            pass
        self.between.acquire()
        self.ending.set()
        for t in threads:
            t.join()
        if self.world.failed.is_set():
            return
        self.judge()
        self.lanes = []

    def judge(self):
        after = self.read_window()
        try:
            check_death(self.before, self.changes(), after)
        except Violation as e:
            raise Defect(f"{self.name} at the end of round {self.round}: {e}\n"
                         f"kept: {self.keep('end', after)}") from None
        self.world.count("full checks")
        self.world.count("verified bytes", len(after))
        self.before = bytes(after)
        self.ops = []

    def read_window(self):
        """All of it, however often the server goes away meanwhile; nothing changes it."""
        out = bytearray(self.span)
        at, client = 0, None
        piece = 4 * MIB
        deadline = time.monotonic() + 3 * ANSWER_LIMIT_S
        while at < self.span:
            if time.monotonic() > deadline:
                raise Defect(f"{self.name} can't be read for {3 * ANSWER_LIMIT_S} s")
            length = min(piece, self.span - at)
            try:
                if client is None:
                    client, _ = self.connect_home(unix=self.rng.random() < 0.5)
                out[at:at + length] = client.read(self.base + at, length)
                at += length
            except LOST:
                client = None
        client.close()
        return out

    def end_round(self):
        self.ending.set()

    def cut(self):
        """Ends all connections of a round, as one does who takes its server for dead."""
        for lane in self.lanes:
            lane.cut()

    # -- snapshots; the caller has taken `between`, or is the volume's own thread ----------

    def read_export(self, name):
        """The window of VOLUME@SNAPSHOT or of any other volume of the same measures."""
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while True:
            slots = [s for s in self.world.slots if s.accepting.is_set()] or self.world.slots
            # Snapshots need no owner: any server has them.
            slot = self.rng.choice(slots) if "@" in name else self.home
            try:
                with self.connect(slot, True, False, "structured", name) as client:
                    out = bytearray(self.span)
                    for at in range(0, self.span, 4 * MIB):
                        length = min(4 * MIB, self.span - at)
                        out[at:at + length] = client.read(self.base + at, length)
                    return out
            except LOST as e:
                if time.monotonic() > deadline:
                    raise Defect(f"{name} can't be read at {slot.name}: {e}") from None
                time.sleep(0.05)

    def stored_snapshots(self):
        """Their names as the store has them; None while servers are ended."""
        done = self.world.command("--json", "snapshot", "list", self.name)
        return done and [s["name"] for s in json.loads(done.stdout)["snapshots"]]

    def new_name(self, what="s"):
        self.names += 1
        return f"{what}{self.names}"

    def create_snapshot(self, kill_after_s=None):
        """Under load; judged at once."""
        name = self.new_name()
        began = now_ns()
        done = self.world.command("snapshot", "create", f"{self.name}@{name}",
                                  kill_after_s=kill_after_s)
        if done is None:
            there = self.stored_snapshots()
            if there is None or name not in there:
                self.maybe.add(name)
                return
        self.judge_snapshot(name, began, now_ns())

    def judge_snapshot(self, name, began_ns, ended_ns):
        data = self.read_export(f"{self.name}@{name}")
        ops = [copy.copy(op) for op in self.changes() if op.sent_ns <= ended_ns]
        required = answered([op for op in ops if op.answered_ns is not None
                             and op.answered_ns < began_ns])
        try:
            if any(getattr(op, "again", False) for op in ops):
                # What was sent twice may have been taken twice, with others in between.
                self.check_read(0, bytes(data), began_ns, ended_ns, f"snapshot {name}")
            else:
                Check(self.before, ops, data, required, ended_ns).run()
        except Violation as e:
            raise Defect(f"{self.name}@{name}, begun {began_ns}, ended {ended_ns}: {e}\n"
                         f"kept: {self.keep(name, data)}") from None
        self.world.count("snapshots made")
        self.world.count("verified bytes", len(data))
        path = self.world.folder / "snapshots" / f"{self.name}@{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        self.snapshots[name] = Snapshot(name, path, digest(data), self.names)

    def check_snapshot(self, name):
        """It holds what it held."""
        s = self.snapshots[name]
        data = self.read_export(f"{self.name}@{name}")
        if digest(data) != s.digest:
            kept = s.path.with_name(f"{s.path.name}.changed")
            kept.write_bytes(data)
            raise Defect(f"{self.name}@{name} is not what it was: {s.path} and {kept}")
        self.world.count("snapshots compared")
        self.world.count("verified bytes", len(data))

    def remove_snapshot(self, name, kill_after_s=None):
        self.world.command("snapshot", "remove", f"{self.name}@{name}", kill_after_s=kill_after_s)
        there = self.stored_snapshots()
        if there is not None and name not in there:
            self.forget(name)
            self.world.count("snapshots removed")
        elif there is not None and kill_after_s is None and not self.world.was_upset(now_ns()):
            raise Defect(f"{self.name}@{name} was removed and is there")
        elif there is None or kill_after_s is not None:
            # Perhaps its owner still removes it: from now on nothing is expected of it.
            self.forget(name)
            self.maybe.add(name)

    def forget(self, name):
        one = self.snapshots.pop(name, None)
        if one:
            one.path.unlink(missing_ok=True)

    def sweep(self):
        """All snapshots that are expected are there, and no others but what killed commands left,
        which goes now."""
        there = self.stored_snapshots()
        if there is None:
            return False
        missing = set(self.snapshots) - set(there)
        if missing:
            raise Defect(f"{self.name}: snapshots are gone that nobody removed: {sorted(missing)}")
        for name in set(there) - set(self.snapshots):
            if name not in self.maybe and not name.startswith(("verify-", "export-", "diff-")):
                raise Defect(f"{self.name}@{name}: a snapshot that nobody made")
            if name.startswith(("verify-", "export-", "diff-")):
                self.world.count("snapshots left by killed commands, removed")
            self.world.command("snapshot", "remove", f"{self.name}@{name}",
                               may_say=("no snapshot", "does not exist", "has no"))
        return True

    # -- a client in a process of its own ------------------------------------------------

    def run_victim(self, rng):
        """Kills one while it sends; called while a round runs."""
        connection = self.new_connection()
        ops = []
        while len(ops) < 60:
            op = self.next_op(rng, connection)
            if op.kind in (WRITE, ZERO, TRIM, FLUSH):
                ops.append(op)
        told = {"address": self.home.address(rng.random() < 0.5), "volume": self.name,
                "base": self.base, "ops": [vars(op) for op in ops]}
        told["address"] = told["address"] if isinstance(told["address"], str) \
            else list(told["address"])
        moved_from = self.home
        told = json.dumps(told)
        for op in ops:
            op.sent_ns = now_ns()       # not before this
        self.ops.extend(ops)
        victim = subprocess.Popen([sys.executable, str(Path(__file__).with_name("victim.py"))],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True)
        victim.stdin.write(told)
        victim.stdin.close()
        first = victim.stdout.readline()
        time.sleep(rng.random() * 0.15)
        victim.kill()
        lines = [first, *victim.stdout.read().splitlines()]
        victim.wait()
        victim.stdout.close()
        sent, by_number = set(), {op.number: op for op in ops}
        for line in lines:
            words = line.split()
            if len(words) == 2 and words[0] == "s" and words[1].isdigit():
                sent.add(int(words[1]))
            elif len(words) == 4 and words[0] == "a":
                op = by_number[int(words[1])]
                op.answered_ns, op.error = int(words[2]), int(words[3])
                if op.error and self.home is moved_from:
                    raise Defect(f"{self.name}: a client got error {op.error}: {op}")
                self.world.count("requests")
        for op in ops:
            if op.number not in sent:
                op.sent_ns = None
        if sent:
            self.world.count("kills: a client's process")

    def new_connection(self):
        self.connections += 1
        return self.connections


class Lane:
    """One client: one connection after the other."""

    def __init__(self, volume, seed):
        self.v, self.world = volume, volume.world
        self.rng = volume.world.rng("lane", seed)
        self.unix = self.rng.random() < 0.5
        self.tls = self.rng.random() < 0.25
        self.style = self.rng.choice(("simple", "structured", "extended"))
        # Over TLS what is sent waits for what is read: nothing deep.
        self.depth = 2 if self.tls else self.rng.choice((1, 2, 4, 8))
        self.large = self.rng.random() < 0.15
        self.at = 0
        self.client = self.slot = None
        self.number = 0
        self.pending = []               # sent or to be sent again, not answered, in order

    def run(self):
        while not self.world.failed.is_set():
            if self.v.ending.is_set() and not self.pending:
                break
            self.turn()
            time.sleep(self.world.pause_s * self.rng.expovariate(1)
                       * (1 + len(self.v.lanes)))
        self.close()

    def close(self):
        if self.client:
            self.client.close()
        self.client = None

    def cut(self):
        client = self.client
        if client:
            sock = client.sock.sock if isinstance(client.sock, tlsnbd.TlsSocket) else client.sock
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def turn(self):
        v = self.v
        if self.client and self.slot is not v.home:
            self.close()
        if not self.client:
            self.client, self.slot = v.connect_home(self.unix, self.tls, self.style)
            self.number = v.new_connection()
            for op in self.pending:
                op.connection = self.number
        if not self.pending:
            self.pending = self.batch()
            v.ops.extend(self.pending)
        try:
            self.exchange()
        except TimeoutError as e:
            raise Defect(f"{v.name} at server {self.slot.name}: no answer within "
                         f"{ANSWER_LIMIT_S} s ({e}): "
                         + "; ".join(map(str, self.pending[:5]))) from None
        except LOST:
            self.lost()

    def batch(self):
        ops = [self.v.next_op(self.rng, self.number)
               for _ in range(self.rng.randint(1, self.depth))]
        if self.style == "simple":
            ops = [op for op in ops if op.kind != STATUS] or [
                Op(next(self.v.numbers), self.number, FLUSH)]
        if self.large:
            # One after the other through the volume, half a MiB each.
            for op in ops:
                if op.kind in (READ, WRITE):
                    op.offset = self.at % self.v.span
                    op.length = min(MIB // 2, self.v.span - op.offset)
                    self.at += op.length
        return ops

    def exchange(self):
        """Sends what is pending and takes in the answers. Sometimes the client dies meanwhile."""
        client = self.client
        encoded = [self.v.encode(client, op) for op in self.pending]
        data = b"".join(data for _, data in encoded)
        dies = self.rng.random() < 0.004 and not self.v.ending.is_set()
        for op in self.pending:
            op.again = op.sent_ns is not None
            op.sent_ns = op.sent_ns or now_ns()
        if dies:
            self.die(encoded, data)
            return
        client.send(data)
        for (cookie, _), op in zip(encoded, list(self.pending)):
            self.took(op, client.result(cookie))

    def took(self, op, result):
        op.error = result.error
        op.answered_ns = result.answered_ns or now_ns()
        if op.error:
            raise Defect(f"{self.v.name} at server {self.slot.name}: {op}: "
                         f"{result.chunks[-1].message or 'no message'}")
        self.world.count("requests")
        self.world.count(NAMES[op.kind])
        if op.kind in (READ, WRITE):
            self.world.count("bytes " + NAMES[op.kind], op.length)
        if op.kind == READ:
            self.v.check_read(op.offset, result.data, op.sent_ns, op.answered_ns)
        elif op.kind == STATUS:
            self.v.check_status(op, result)
        self.pending.remove(op)

    def die(self, encoded, data):
        """In the middle of its requests, or with all of them sent and nothing read."""
        cut = self.rng.choice((len(data), self.rng.randrange(1, len(data) + 1)))
        sock = self.client.sock
        plain = sock.sock if isinstance(sock, tlsnbd.TlsSocket) else sock
        try:
            self.client.send(data[:cut])
        finally:
            if not self.unix:
                # Nothing may stay on its way behind the end of the connection (see G8's limits).
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.world.count("kills: a client's connection"
                             + (", in the middle of a request" if cut < len(data) else ""))
            at = 0
            for (_, one), op in zip(encoded, self.pending):
                at += len(one)
                if at > cut and not op.again:
                    op.sent_ns = None   # it was never there as a whole
        self.lost(died=True)

    def lost(self, died=False):
        """The connection is gone. What it did not get an answer to is sent again or given up; what
        was sent twice already can only be sent again."""
        self.close()
        self.world.count("connections lost")
        if not died and not self.world.was_upset(now_ns()) and now_ns() > self.v.evicted_until_ns:
            # A server may close one that it could not serve for 10 s (G8), on a slow machine.
            self.world.count("connections lost for no reason that is known")
        self.pending = [op for op in self.pending if op.kind not in (READ, STATUS)]
        if not self.v.send_again and not any(op.again for op in self.pending):
            self.world.count("requests given up", len(self.pending))
            self.pending = []


def digest(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()
