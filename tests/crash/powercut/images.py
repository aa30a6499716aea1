"""Folders as a disk could hold them after the power went, from powercut.c's journal.

A cut at time T knows:
 - a change that a returned sync covers (it had returned before that sync began), or
   that was made through an O_DSYNC file and had returned, is there;
 - any other change that had begun may be there, in whole, in part, or not at all;
 - nothing that began later is there;
 - what a failed sync should have made durable, no later sync does: Linux takes the
   pages for clean after the error. Only writing to a page again changes that.

Parts are sectors of 512 bytes, or pages of 4096: each keeps one of its versions, the
durable one or that after any later change to it, since a page in memory holds all
changes up to its writing. The size of a file keeps one of its versions likewise. A
truncation counts from the moment a size that came after it counts, as file systems
order the two.

Creating, renaming and removing files change a folder. What an fsync of that folder covers
is there; of what came after it, a first part may be: file systems keep the order of
changes within a folder. What is in a folder that is not there is lost with it.
"""

import bisect
import os
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

RECORD = struct.Struct("<LBBHLLQQQQQ")
MAGIC = 0x54554350
(FILE_SEEN, WRITE, TRUNCATE, ALLOCATE, SYNC, DONE, RENAME, REMOVE, MAPPED, MAKE_FOLDER,
 UNSOUND, FAILED) = range(1, 13)
DURABLE, ZEROS, EVERYTHING, FOLDER = 1, 2, 4, 8
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
SECTOR, PAGE = 512, 4096
NEVER = 1 << 62

# Shared memory that happens to have a name, and means nothing once the processes are
# gone: LMDB's reader table, and who has the store open (docs/format-lmdb.md). After a
# cut they hold pages of any moment.
MAPPED_ALLOWED = ("lock.mdb", "processes")


class Unsound(AssertionError):
    """The journal does not tell everything that happened to the files."""


@dataclass
class Record:
    kind: int
    flags: int
    file: tuple                 # process, number
    extra: tuple                # process, number; of ALLOCATE: number
    begun_ns: int
    ended_ns: int
    offset: int
    length: int
    data: memoryview
    position: int

    @property
    def at_ns(self):
        return self.ended_ns if self.kind in (DONE, FAILED) else self.begun_ns


def read_trace(path):
    raw = memoryview(Path(path).read_bytes())
    records, at = [], 0
    while at + RECORD.size <= len(raw):
        magic, kind, flags, process, file, extra, begun, ended, offset, length, n = \
            RECORD.unpack_from(raw, at)
        if magic != MAGIC:
            raise Unsound(f"no record at {at} of the trace")
        if at + RECORD.size + n > len(raw):
            break               # the process was killed while it wrote this one
        at += RECORD.size
        records.append(Record(kind, flags, (process, file),
                              extra if kind == ALLOCATE else (process, extra), begun, ended,
                              offset, length, raw[at:at + n], len(records)))
        at += n
    return records


@dataclass(eq=False)
class Change:
    """Bytes that became other bytes, or a size that became another."""
    position: int
    offset: int
    length: int
    data: memoryview = None         # None: zeros
    size: int = None                # new size of the file, if it changed
    truncates: bool = False
    returned: int = NEVER           # position in the journal from which a sync covers it
    lost: bool = False              # a sync of it failed
    settled: list = field(default_factory=list)     # ranges already in the durable state

    def pieces(self, low, high):
        """(offset, data) inside low..high, but for what is settled."""
        parts = [(max(self.offset, low), min(self.offset + self.length, high))]
        for a, b in self.settled:
            parts = [q for x, y in parts for q in ((x, min(y, a)), (max(x, b), y)) if q[0] < q[1]]
        for a, b in parts:
            if a < b:
                yield a, b, (None if self.data is None
                             else self.data[a - self.offset:b - self.offset])


class File:
    """One file: what is durable of it, and what was changed since."""

    def __init__(self, content=b""):
        self.state = bytearray(content)     # may be longer than size: never shorter
        self.size = len(content)
        self.now_size = self.size
        self.pages = set()
        self.pending = []
        self.mapped = False
        zero = bytes(PAGE)
        for p in range(0, len(content), PAGE):
            if content[p:p + PAGE] != zero[:len(content) - p]:
                self.pages.add(p // PAGE)

    def _put(self, a, b, data):
        if b > len(self.state):
            self.state.extend(bytes(b - len(self.state)))
        if data is None:
            self.state[a:b] = bytes(b - a)
        else:
            self.state[a:b] = data
            self.pages.update(range(a // PAGE, (b - 1) // PAGE + 1))

    def _zero(self, a, b):
        """Zeros only where there may be anything else; such ranges can be very long."""
        first, last = a // PAGE, (b - 1) // PAGE
        if last - first > len(self.pages):
            touched = [p for p in self.pages if first <= p <= last]
        else:
            touched = [p for p in range(first, last + 1) if p in self.pages]
        for p in touched:
            x, y = max(a, p * PAGE), min(b, (p + 1) * PAGE, len(self.state))
            if x < y:
                self.state[x:y] = bytes(y - x)

    def settle(self, changes):
        """These are durable now; later ones than others that share their sectors carry
        those along."""
        chosen = set(map(id, changes))
        left = []
        for change in self.pending:
            if id(change) not in chosen:
                left.append(change)
                continue
            for earlier in left:
                unit = PAGE if earlier.lost else SECTOR
                low = change.offset // unit * unit
                high = -(-(change.offset + change.length) // unit) * unit
                if change.length and earlier.offset < high \
                        and low < earlier.offset + earlier.length:
                    for a, b, data in list(earlier.pieces(low, high)):
                        self._put(a, b, data)
                    earlier.settled.append((low, high))
            for a, b, data in list(change.pieces(0, NEVER)):
                if data is None:
                    self._zero(a, b)
                else:
                    self._put(a, b, data)
            if change.size is not None:
                self.size = change.size
                if change.truncates:
                    self._zero(change.size, max(len(self.state), change.size + 1))
        self.pending = left

    # -- one possible content ----------------------------------------------

    def versions(self):
        """sector -> changes that touch it, in order; zeros over zeros are left out."""
        touched = {}
        for change in self.pending:
            if change.truncates or not change.length:
                continue
            first = change.offset // SECTOR
            last = (change.offset + change.length - 1) // SECTOR
            if change.data is None:
                sectors = [s for s in self._sectors_with_content(first, last, touched)]
            else:
                sectors = range(first, last + 1)
            for s in sectors:
                touched.setdefault(s, []).append(change)
        return touched

    def _sectors_with_content(self, first, last, touched):
        per = PAGE // SECTOR
        if last - first > len(self.pages) * per + len(touched):
            found = {s for p in self.pages for s in range(p * per, (p + 1) * per)
                     if first <= s <= last}
            found.update(s for s in touched if first <= s <= last)
            return found
        return [s for s in range(first, last + 1) if s // per in self.pages or s in touched]

    def choose(self, rng, mode):
        """(size, [(offset, data)...]): one of the contents a cut can leave."""
        if mode == "none" or not self.pending:
            return self.size, []
        if mode == "all":
            out = []
            for change in self.pending:
                if change.truncates:
                    out.append((change.size, None, NEVER))
                for a, b, data in change.pieces(0, NEVER):
                    out.append((a, data, b - a))
            return self.now_size, out
        sizes = [(-1, self.size)] + [(c.position, c.size) for c in self.pending
                                     if c.size is not None]
        touched = self.versions()
        limit = None
        if mode == "prefix":
            limit = rng.randrange(len(self.pending) + 1)
            cut = self.pending[limit].position if limit < len(self.pending) else NEVER
            size_position, size = [s for s in sizes if s[0] < cut][-1]

            def version(sector, changes):
                k = bisect.bisect_left([c.position for c in changes], cut)
                # The change at the cut itself may be torn.
                if k < len(changes) and changes[k].position == cut and rng.random() < 0.5:
                    k += 1
                return k
        else:
            size_position, size = rng.choice(sizes) if rng.random() < 0.5 else sizes[-1]
            if mode == "sectors":
                p = rng.choice([0.1, 0.5, 0.9, 0.99])

                def version(sector, changes):
                    return len(changes) if rng.random() < p else rng.randrange(len(changes) + 1)
            elif mode == "pages":
                cuts = {}

                def version(sector, changes):
                    page = sector * SECTOR // PAGE
                    if page not in cuts:
                        cuts[page] = rng.choice(
                            [-1, NEVER, self.pending[rng.randrange(len(self.pending))].position])
                    return bisect.bisect_right([c.position for c in changes], cuts[page])
            else:
                if mode == "changes":
                    p = rng.choice([0.1, 0.5, 0.9])
                    kept = {id(c) for c in self.pending if rng.random() < p}
                elif mode == "one missing":
                    kept = {id(c) for c in self.pending} - {id(rng.choice(self.pending))}
                elif mode == "only one":
                    kept = {id(rng.choice(self.pending))}
                elif mode == "suffix":
                    kept = {id(c) for c in self.pending[rng.randrange(len(self.pending)):]}
                else:
                    raise ValueError(mode)

                def version(sector, changes):
                    for k in range(len(changes), 0, -1):
                        if id(changes[k - 1]) in kept:
                            return k
                    return 0
        out = []
        for change in self.pending:
            if change.truncates and change.position <= size_position:
                out.append((change.size, None, NEVER))
        floor = max([c.position for c in self.pending
                     if c.truncates and c.position <= size_position], default=-1)
        for sector, changes in touched.items():
            k = version(sector, changes)
            if k == 0:
                continue
            low, high = sector * SECTOR, (sector + 1) * SECTOR
            content = bytearray(self.state[low:high])
            content.extend(bytes(SECTOR - len(content)))
            for change in changes[:k]:
                # Behind a truncation that counts, what it removed stays removed.
                if change.position < floor:
                    continue
                for a, b, data in change.pieces(low, high):
                    content[a - low:b - low] = bytes(b - a) if data is None else data
            out.append((low, content, SECTOR))
        return size, out

    def write(self, path, size, changes):
        """Writes the durable state with changes over it; zeros stay holes."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, max(size, len(self.state)))
            view = memoryview(self.state)
            pages = sorted(self.pages)
            i = 0
            while i < len(pages):
                j = i
                while j + 1 < len(pages) and pages[j + 1] == pages[j] + 1:
                    j += 1
                _pwrite(fd, view[pages[i] * PAGE:(pages[j] + 1) * PAGE], pages[i] * PAGE)
                i = j + 1
            view.release()
            end = max(size, len(self.state))
            for offset, data, length in changes:
                if data is not None:
                    _pwrite(fd, data, offset)
                    end = max(end, offset + length)
                else:
                    _zero_file(fd, offset, min(length, max(end - offset, 0)), end)
            os.ftruncate(fd, size)
        finally:
            os.close(fd)


def _pwrite(fd, data, offset):
    while len(data):
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def _zero_file(fd, offset, length, end):
    if length <= 0:
        return
    if offset + length >= end:
        # To the end: cutting it off and on again is the quickest way to zeros.
        os.ftruncate(fd, offset)
        os.ftruncate(fd, end)
        return
    zeros = bytes(min(length, 1 << 20))
    while length > 0:
        n = os.pwrite(fd, zeros[:min(length, len(zeros))], offset)
        length, offset = length - n, offset + n


MODES = ["all", "none", "prefix", "sectors", "pages", "changes", "one missing", "only one",
         "suffix"]


class Folder:
    """What stands for a folder among the names."""


@dataclass(eq=False)
class NameChange:
    """A name that came, went or became another."""
    position: int
    old: str = None
    new: str = None
    what: object = None         # a File or Folder that is new

    @property
    def folder(self):
        return os.path.dirname(self.new or self.old)

    def apply(self, names):
        if self.what:
            names[self.new] = self.what
            return
        beneath = self.old + "/"
        for name in [n for n in names if n == self.old or n.startswith(beneath)]:
            what = names.pop(name)
            if self.new:
                names[self.new + name[len(self.old):]] = what


class Disk:
    """The folder as it went through time; advance() only goes forward."""

    def __init__(self, base, trace, live=None):
        self.base = Path(base)
        # The folder as the run left it, for what was written through mappings.
        self.live = Path(live) if live else None
        self.records = read_trace(trace) if not isinstance(trace, list) else trace
        self.next = 0
        self.files = {}             # (process, number) -> File
        self.syncs = {}             # number -> position at which it began
        self.durable = {}           # number -> (file, change) under way
        self.names = {}             # name -> File or Folder, as programs see them
        for path in sorted(self.base.rglob("*")):
            name = str(path.relative_to(self.base))
            self.names[name] = Folder() if path.is_dir() else File(path.read_bytes())
        self.safe_names = dict(self.names)
        self.name_changes = []      # that are not durable

    def times(self):
        """Moments worth a cut: just after something was recorded, and just before."""
        out = set()
        for r in self.records:
            out.update((r.at_ns, r.at_ns - 1, r.ended_ns))
        return sorted(out)

    def advance(self, time_ns):
        while self.next < len(self.records) and self.records[self.next].at_ns <= time_ns:
            self.step()

    def step(self):
        """Takes one more record, and gives it."""
        record = self.records[self.next]
        self._take(record)
        self.next += 1
        return record

    def _take(self, r):
        if r.kind == FILE_SEEN:
            name = bytes(r.data).decode()
            if name not in self.names:
                if r.length and not name.endswith(MAPPED_ALLOWED):
                    raise Unsound(f"{name} has {r.length} bytes that nobody wrote")
                self._name(NameChange(r.position, new=name, what=File()))
            self.files[r.file] = self.names[name]
        elif r.kind == RENAME:
            old, new = bytes(r.data).decode().split("\0")
            if not old or not new:
                raise Unsound(f"a file came or went: {old} -> {new}")
            if os.path.dirname(old) != os.path.dirname(new):
                raise Unsound(f"a file went to another folder: {old} -> {new}")
            self._name(NameChange(r.position, old=old, new=new))
        elif r.kind == REMOVE:
            self._name(NameChange(r.position, old=bytes(r.data).decode()))
        elif r.kind == MAKE_FOLDER:
            self._name(NameChange(r.position, new=bytes(r.data).decode(), what=Folder()))
        elif r.kind == MAPPED:
            name = self.name_of(r.file)
            self.files[r.file].mapped = True
            if name and not name.endswith(MAPPED_ALLOWED):
                raise Unsound(f"{name} is written through a shared mapping")
        elif r.kind == UNSOUND:
            raise Unsound(bytes(r.data).decode(errors="replace"))
        elif r.kind == SYNC:
            self.syncs[r.extra] = r.position
        elif r.kind == DONE:
            self._done(r)
        elif r.kind == FAILED:
            self._failed(r)
        else:
            self._change(r)

    def _name(self, change):
        change.apply(self.names)
        self.name_changes.append(change)

    def name_of(self, number):
        return next((n for n, f in self.names.items() if f is self.files.get(number)), None)

    def _change(self, r):
        file = self.files[r.file]
        if r.kind == WRITE:
            change = Change(r.position, r.offset, r.length,
                            None if r.flags & ZEROS else r.data)
            end = r.offset + r.length
            if end > file.now_size:
                file.now_size = change.size = end
        elif r.kind == TRUNCATE:
            change = Change(r.position, r.length, 0, size=r.length,
                            truncates=r.length < file.now_size)
            file.now_size = r.length
        else:
            mode = r.extra
            if mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE):
                raise Unsound(f"fallocate mode {mode}")
            zeroed = mode & (PUNCH_HOLE | ZERO_RANGE)
            change = Change(r.position, r.offset, r.length if zeroed else 0)
            if not mode & KEEP_SIZE and r.offset + r.length > file.now_size:
                file.now_size = change.size = r.offset + r.length
        file.pending.append(change)
        if r.kind == WRITE and r.flags & DURABLE:
            self.durable[r.extra] = (file, change)
        else:
            change.returned = r.position

    def _done(self, r):
        if r.extra in self.durable:
            file, change = self.durable.pop(r.extra)
            change.returned = r.position
            file.settle([change])
            return
        began = self.syncs[r.extra]
        if r.flags & (EVERYTHING | FOLDER):
            folder, left = bytes(r.data).decode(), []
            for change in self.name_changes:
                if change.position < began and (r.flags & EVERYTHING or change.folder == folder):
                    change.apply(self.safe_names)
                else:
                    left.append(change)
            self.name_changes = left
        for file in ({self.files[r.file]} if not r.flags & (EVERYTHING | FOLDER) else
                     set(self.files.values()) if r.flags & EVERYTHING else ()):
            file.settle([c for c in file.pending if c.returned < began and not c.lost])

    def _failed(self, r):
        if r.flags & FOLDER:
            return
        if r.extra in self.durable:
            self.durable.pop(r.extra)[1].lost = True
            return
        for change in self.files[r.file].pending:
            if change.returned < self.syncs[r.extra]:
                change.lost = True

    def _names_left(self, rng, mode):
        """Names as a cut can leave them."""
        if mode == "all":
            return self.names, 0
        names, kept, counts = dict(self.safe_names), {}, {}
        for change in self.name_changes:
            counts[change.folder] = counts.get(change.folder, 0) + 1
        for folder, n in counts.items():
            kept[folder] = 0 if mode == "none" else n if rng.random() < 0.5 else rng.randrange(n)
        lost = 0
        for change in self.name_changes:
            if kept[change.folder] > 0:
                kept[change.folder] -= 1
                change.apply(names)
            else:
                lost += 1
        return {name: what for name, what in names.items()
                if all(str(p) in names for p in list(Path(name).parents)[:-1])}, lost

    def build(self, folder, rng, mode=None):
        """Makes folder as it could be if the power went now; gives a word on how."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mode = mode or rng.choice(MODES)
        mixed = mode not in ("all", "none") and rng.random() < 0.3
        names, lost = self._names_left(rng, mode)
        told = [f"{lost} changes of names lost"] if lost else []
        for name, what in names.items():
            path = folder / name
            if isinstance(what, Folder):
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            chosen = rng.choice(MODES) if mixed else mode
            size, changes = what.choose(rng, chosen)
            what.write(path, size, changes)
            if what.mapped and self.live and (self.live / name).exists():
                later = (self.live / name).read_bytes()
                with open(path, "r+b") as f:
                    for at in range(0, min(size, len(later)), PAGE):
                        if rng.random() < 0.5:
                            f.seek(at)
                            f.write(later[at:min(at + PAGE, size)])
            if what.pending:
                told.append(f"{name}: {chosen}, {len(what.pending)} open")
        return "; ".join(told) or "everything was durable"


def check_complete(base, trace, live, rng, scratch):
    """With every change applied, the journal gives the very files that are there.

    If not, something got past the shim, and no cut would mean anything.
    """
    disk = Disk(base, trace)
    disk.advance(NEVER)
    disk.build(scratch, rng, "all")
    live, scratch = Path(live), Path(scratch)
    for name, what in disk.names.items():
        if isinstance(what, Folder) or name.endswith(MAPPED_ALLOWED) or what.mapped:
            continue
        done = subprocess.run(["cmp", live / name, scratch / name], capture_output=True, text=True)
        if done.returncode:
            raise Unsound(f"{name} is not what its journal says: {done.stdout}{done.stderr}")
    there = {str(p.relative_to(live)) for p in live.rglob("*") if p.is_file()}
    known = {name for name, what in disk.names.items() if not isinstance(what, Folder)}
    if there != known:
        raise Unsound(f"files {sorted(there ^ known)} came or went unseen")
