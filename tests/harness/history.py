"""Judges what is on a volume by what was sent and answered (G1, G2, G3).

Given the volume before, the requests with their times, and the volume after, it
asks: is there an order of the requests, in agreement with what is known of it, so
that the volume holds exactly the effect of some first part of that order, and
every request in `required` is in that part?

Known of the order: a request that was answered before another was sent came first;
requests on one connection are taken in the order sent. Only a zero or trim may be
overtaken by later ones on its connection: where it covers blocks in part it may have
to wait for room, which those need not, and NBD promises no order among requests in
flight. (A write waits too, but nothing behind its payload has been read then.)
A request of more than 4 MiB is a sequence of pieces of 4 MiB (G3).

The volume is cut into cells, the ranges between any two borders of requests. All
of a cell must come from one request (G3), from none that another one in the part
must have overwritten (G1, G2), and all cells together must allow one order (G3).
"""

import bisect
import heapq
import json
from collections import defaultdict
from dataclasses import dataclass

from .load import FLUSH, WRITE, Op, content

PIECE = 4 << 20


class Violation(AssertionError):
    pass


@dataclass(eq=False)
class Unit:
    """A request, or one piece of a long one."""
    op: object
    offset: int
    length: int
    connection: int
    place: int                  # among the units of its connection
    sent_ns: int
    index: int = 0
    done_ns: float = float("inf")   # it has certainly been taken by then

    def __str__(self):
        piece = "" if self.length == self.op.length else f" [{self.offset}+{self.length}]"
        return f"{self.op}{piece}"


def writer_of(volume, where, last_number):
    """Which request the bytes at `where` come from, of all numbers up to the last."""
    have = bytes(volume[where:where + 64])
    if not any(have):
        return "nobody (zeros)"
    for length in (len(have), 16):
        for number in range(last_number, 0, -1):
            if content(number, where, where + length) == have[:length]:
                return f"#{number}"
    return f"nobody known ({have[:16].hex()})"


def flushed(ops, until_ns):
    """The requests a power cut at until_ns must not undo: FUA ones that were answered,
    and all that were answered before a FLUSH was sent which was answered."""
    flush = max((op.sent_ns for op in ops if op.kind == FLUSH and op.answered_ns is not None
                 and op.answered_ns <= until_ns and not op.error), default=-1)
    return {op for op in ops if op.kind != FLUSH and op.answered_ns is not None and not op.error
            and (op.answered_ns < flush or (op.fua and op.answered_ns <= until_ns))}


def answered(ops):
    """The requests that the death of the process must not undo."""
    return {op for op in ops
            if op.kind != FLUSH and op.answered_ns is not None and not op.error}


class Check:
    """One verdict; call run(). `until_ns` hides what was sent or answered later."""

    def __init__(self, before, ops, after, required, until_ns=None):
        self.before, self.after = before, after
        self.required = required
        self.until_ns = until_ns
        self.units = []
        self.why = {}               # unit -> how we know that it is part of the volume
        lanes = defaultdict(list)
        for op in sorted((op for op in ops if op.kind != FLUSH and op.sent_ns is not None),
                         key=lambda op: op.number):
            if until_ns is not None and op.sent_ns > until_ns:
                continue
            if op.error:
                # Refused as a whole: it may not have any effect.
                continue
            for at in range(0, op.length, PIECE):
                unit = Unit(op, op.offset + at, min(PIECE, op.length - at), op.connection,
                            len(lanes[op.connection]), op.sent_ns, len(self.units))
                lanes[op.connection].append(unit)
                self.units.append(unit)
        self.lanes = lanes
        for lane in lanes.values():
            # Whoever was answered took everything before it first.
            done = float("inf")
            for unit in reversed(lane):
                own = self._answered_ns(unit.op)
                done = min(done, own)
                unit.done_ns = own if unit.op.overtakable else done

    def _answered_ns(self, op):
        if op.answered_ns is None or (self.until_ns is not None
                                      and op.answered_ns > self.until_ns):
            return float("inf")
        return op.answered_ns

    @staticmethod
    def _before(a, b):
        """a is known to have been taken before b."""
        if a.connection == b.connection and (not a.op.overtakable or a.op is b.op):
            return a.place < b.place
        return a.done_ns < b.sent_ns

    def _holds(self, unit, low, high):
        found = memoryview(self.after)[low:high]
        if unit.op.kind == WRITE:
            # A glance first: most candidates are not it.
            glance = min(high, low + 32)
            return (self.after[low:glance] == content(unit.op.number, low, glance)
                    and found == content(unit.op.number, low, high))
        return found == memoryview(bytes(high - low))

    def _cells(self):
        """[(low, high, units that touch it)...] of every range that somebody touched."""
        borders = sorted({u.offset for u in self.units}
                         | {u.offset + u.length for u in self.units})
        cells = [[] for _ in borders]
        for u in self.units:
            i = bisect.bisect_left(borders, u.offset)
            end = u.offset + u.length
            while borders[i] < end:
                cells[i].append(u)
                i += 1
        return [(low, high, touching) for low, high, touching
                in zip(borders, borders[1:] + [None], cells) if touching], borders

    def run(self):
        cells, borders = self._cells()
        self._untouched(cells)
        # None stands for what was there before.
        holders = []
        for low, high, touching in cells:
            found = {u for u in touching if self._holds(u, low, high)}
            if self.after[low:high] == self.before[low:high]:
                found.add(None)
            if not found:
                raise Violation(self._torn(low, high, touching))
            holders.append(found)

        included = {u for u in self.units if u.op in self.required}
        while True:
            self._close(included)
            grown = False
            for (low, high, touching), found in zip(cells, holders):
                there = [u for u in touching if u in included]
                possible = {c for c in found
                            if (c is None and not there)
                            or (c is not None and not any(self._before(c, t) for t in there))}
                if not possible:
                    raise Violation(self._lost(low, high, found, there))
                if len(possible) == 1:
                    (only,) = possible
                    if only is not None and only not in included:
                        included.add(only)
                        self.why[only] = f"bytes {low}..{high} are from it"
                        grown = True
            if not grown:
                break
        self._one_order(cells, holders, included)
        return included

    def _untouched(self, cells):
        at = 0
        for low, high, _ in cells + [(len(self.before), None, None)]:
            if self.before[at:low] != self.after[at:low]:
                where = next(i for i in range(at, low) if self.before[i] != self.after[i])
                last = max((u.op.number for u in self.units), default=1)
                raise Violation(f"byte {where} changed, which nobody wrote to: it was of "
                                f"{writer_of(self.before, where, last)}, it is of "
                                f"{writer_of(self.after, where, last)}")
            at = high

    def _close(self, included):
        """Adds whatever came before anything that is included."""
        while True:
            size = len(included)
            last = max(included, key=lambda u: u.sent_ns, default=None)
            lanes = {}
            for u in included:
                if u.connection not in lanes or u.place > lanes[u.connection].place:
                    lanes[u.connection] = u
            for u in self.units:
                if u in included:
                    continue
                later = lanes.get(u.connection)
                if later and u.place < later.place and self._before(u, later):
                    self.why[u] = f"came before {later}"
                elif last and u.done_ns < last.sent_ns:
                    self.why[u] = f"had been taken when {last} was sent"
                else:
                    continue
                included.add(u)
            if len(included) == size:
                return

    def _one_order(self, cells, holders, included):
        """A cycle in who must have come before whom means there is no such order."""
        n = len(self.units)
        shown = {}                  # edge -> the bytes that show it
        times = sorted({u.done_ns for u in self.units if u.done_ns != float("inf")})
        after = [[] for _ in range(n + len(times))]
        for lane in self.lanes.values():
            last = None
            for a, b in zip([None] + lane, lane):
                if a and a.op.overtakable and a.op is b.op:
                    after[a.index].append(b.index)
                elif last:
                    after[last.index].append(b.index)
                if not b.op.overtakable:
                    last = b
        for i in range(len(times) - 1):
            after[n + i].append(n + i + 1)
        for u in self.units:
            if u.done_ns != float("inf"):
                after[u.index].append(n + bisect.bisect_left(times, u.done_ns))
            # The last moment before it was sent.
            i = bisect.bisect_left(times, u.sent_ns) - 1
            if i >= 0:
                after[n + i].append(u.index)
        for (low, high, touching), found in zip(cells, holders):
            there = [u for u in touching if u in included]
            possible = {c for c in found if c is not None
                        and not any(self._before(c, t) for t in there)}
            if None in found and not there:
                continue
            if len(possible) != 1:
                continue
            (only,) = possible
            for t in there:
                if t is not only:
                    after[t.index].append(only.index)
                    shown[t.index, only.index] = f"bytes {low}..{high} are of the later one"
        waits = [0] * len(after)
        for targets in after:
            for t in targets:
                waits[t] += 1
        ready = [i for i, w in enumerate(waits) if w == 0]
        heapq.heapify(ready)
        done = 0
        while ready:
            i = heapq.heappop(ready)
            done += 1
            for t in after[i]:
                waits[t] -= 1
                if waits[t] == 0:
                    heapq.heappush(ready, t)
        if done != len(after):
            raise Violation("no order of the requests gives this volume (G2, G3):"
                            + self._circle(after, waits, shown))

    def _circle(self, after, waits, shown):
        """One circle of requests of which each must have come before the next."""
        stuck = {i for i, w in enumerate(waits) if w > 0}
        came_from = {}
        for i in stuck:
            for t in after[i]:
                if t in stuck:
                    came_from[t] = i
        seen, i = [], next(iter(stuck))
        while i not in seen:
            seen.append(i)
            i = came_from[i]
        circle = list(reversed(seen[seen.index(i):]))
        out = ""
        for a, b in zip(circle, circle[1:] + circle[:1]):
            if a >= len(self.units):
                continue            # a moment between an answer and a sending
            why = shown.get((a, b), "answered before the next was sent" if b >= len(self.units)
                            else "sent before the next on its connection")
            out += f"\n  {self.units[a]}\n    before the next: {why}"
        return out

    # -- what to say -------------------------------------------------------

    def _torn(self, low, high, touching):
        return (f"bytes {low}..{high} are of no single request and not the old ones (G3); "
                f"touched by:\n  " + "\n  ".join(str(u) for u in touching)
                + f"\n  first bytes: {bytes(self.after[low:low + 32]).hex()}"
                + self._by_sector(low, high, touching))

    def _by_sector(self, low, high, touching):
        out, last = "", None
        for a in range(low, min(high, low + (1 << 20)), 512):
            b = min(a + 512, high)
            who = [f"#{u.op.number}" for u in touching if self._holds(u, a, b)]
            if self.after[a:b] == self.before[a:b]:
                who.append("old")
            if self.after[a:b].count(0) == b - a:
                who.append("zeros")
            if who != last:
                out += f"\n    from {a}: {', '.join(who) or 'unknown'}"
                last = who
        return out

    def _lost(self, low, high, found, there):
        held = ", ".join("what was there before" if c is None else str(c) for c in found)
        newer = [t for t in there if all(c is None or self._before(c, t) for c in found)]
        why = [f"{t} ({'required: G1' if t.op in self.required else self.why.get(t)})"
               for t in newer or there]
        return (f"bytes {low}..{high} hold {held}, but these came after it and are part of the "
                f"volume (G1, G2):\n  " + "\n  ".join(why))


def keep_evidence(folder, before, ops, after):
    """What a verdict was made of; recall() takes it up again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "before").write_bytes(before)
    (folder / "after").write_bytes(after)
    (folder / "requests.json").write_text(json.dumps([vars(op) for op in ops], indent=0))
    (folder / "requests").write_text("\n".join(map(str, ops)))
    return folder


def recall(folder):
    """(before, ops, after) as kept."""
    ops = [Op(**fields) for fields in json.loads((folder / "requests.json").read_text())]
    return (folder / "before").read_bytes(), ops, bytearray((folder / "after").read_bytes())


def check_death(before, ops, after):
    """After kill -9: everything answered is there."""
    return Check(before, ops, after, answered(ops)).run()


def check_cut(before, ops, after, until_ns):
    """After a power cut at until_ns: everything flushed is there, nothing newer than the cut."""
    return Check(before, ops, after, flushed(ops, until_ns), until_ns).run()
