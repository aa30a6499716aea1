#!/usr/bin/python3
"""A second, tiny NBD server behind fdb-nbd's command line: the tests' own test.

A test is only worth something if a correct server passes it and a wrong one
does not. This one is written from the protocol document, apart from fdb-nbd,
as plainly as possible: volumes in memory, one append-only log that is replayed
at the start. It can be made wrong on purpose, REFERENCE_BUG names how:

  flush_noop     FLUSH is answered without a sync
  fua_noop       so is FUA
  answer_first   a write is answered before it is in the log
  swap           now and then two writes reach the log in the wrong order
  unchecked      a torn record at the end of the log is replayed all the same
  streaming      a write changes the volume while it is still being received

Run the tests against it with
  FDB_NBD="/usr/bin/python3 tests/harness/reference.py" pytest tests/protocol
It is a double for the tests only; nothing that ships uses it.
"""

import json
import mmap
import os
import random
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import zlib

BUG = os.environ.get("REFERENCE_BUG", "")
HANDSHAKE_S = float(os.environ.get("REFERENCE_HANDSHAKE_S", "3"))
PIECE = 4 << 20
BLOCK = 4096
NAME_MAX = 4096
OPTION_MAX = 65536
PAYLOAD_MAX = 32 << 20

ERR = 1 << 31
UNSUP, POLICY, INVALID, UNKNOWN, TOO_BIG, EXT_REQD = (ERR + n for n in (1, 2, 3, 6, 9, 10))


def size_of(text):
    m = re.fullmatch(r"(\d+)([KMGT]?)", text)
    return int(m[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[m[2]]


class Volume:
    """Bytes that read as zeros until written, and which blocks hold data."""

    def __init__(self, number, name, size, description=""):
        self.number, self.name, self.size, self.description = number, name, size, description
        self.bytes = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | 0x4000)  # MAP_NORESERVE
        self.data_blocks = set()

    def write(self, offset, data):
        self.bytes[offset:offset + len(data)] = data
        self.data_blocks.update(range(offset // BLOCK, (offset + len(data) + BLOCK - 1) // BLOCK))

    def zero(self, offset, length):
        end = offset + length
        first, last = -(-offset // BLOCK), end // BLOCK
        if end == self.size and end % BLOCK and offset <= last * BLOCK:
            self.bytes[last * BLOCK:end] = bytes(end - last * BLOCK)
            self.data_blocks.discard(last)
        if first >= last:
            self.bytes[offset:end] = bytes(length)
            return
        self.bytes[offset:first * BLOCK] = bytes(first * BLOCK - offset)
        self.bytes[last * BLOCK:end] = bytes(end - last * BLOCK)
        self.bytes.madvise(mmap.MADV_DONTNEED, first * BLOCK, (last - first) * BLOCK)
        if last - first < len(self.data_blocks):
            self.data_blocks.difference_update(range(first, last))
        else:
            self.data_blocks = {b for b in self.data_blocks if not first <= b < last}

    def extents(self, offset, length, most):
        """[(length, is_hole)...] from offset on; blocks after the last are holes."""
        out, at, end = [], offset, offset + length
        blocks = sorted(b for b in self.data_blocks
                        if offset // BLOCK <= b <= (end - 1) // BLOCK)
        for b in blocks + [None]:
            low = end if b is None else max(b * BLOCK, offset)
            high = end if b is None else min((b + 1) * BLOCK, end)
            if low > at:
                out.append([low - at, True])
            if high > low:
                if out and not out[-1][1]:
                    out[-1][0] += high - low
                else:
                    out.append([high - low, False])
            at = high
            if len(out) > most:
                return out[:most]
        return out[:most]


class Store:
    """Volumes, and the log that brings them back."""

    def __init__(self, folder):
        self.folder = folder
        self.volumes = {}
        self.lock = threading.Lock()
        self.held = None
        self.random = random.Random(1)
        self.log = None

    def open(self, write):
        if write:
            os.makedirs(self.folder, exist_ok=True)
        try:
            with open(f"{self.folder}/volumes.json") as f:
                for number, v in enumerate(json.load(f)):
                    self.volumes[v["name"]] = Volume(number, **v)
        except FileNotFoundError:
            if not write:
                raise
        path = f"{self.folder}/log"
        good = 0
        if os.path.exists(path):
            with open(path, "rb") as f:
                good = self.replay(f)
        if write:
            self.log = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self.end = good
            # Cut off what was torn, so that it cannot be met again behind newer records.
            os.ftruncate(self.log, good)
            os.fdatasync(self.log)

    def replay(self, f):
        by_number = {v.number: v for v in self.volumes.values()}
        good = 0
        while True:
            header = f.read(29)
            if len(header) < 29:
                return good
            magic, crc, kind, number, offset, length = struct.unpack(">LLBLQQ", header)
            payload = f.read(length) if kind == 1 else b""
            if magic != 0x52454652:
                return good
            if BUG != "unchecked" and (zlib.crc32(header[8:] + payload) != crc):
                return good
            v = by_number[number]
            if kind == 1:
                v.write(offset, payload)
            else:
                v.zero(offset, length)
            good = f.tell()

    def create(self, name, size, description=""):
        if name in self.volumes:
            return
        self.volumes[name] = Volume(len(self.volumes), name, size, description)
        text = json.dumps([{"name": v.name, "size": v.size, "description": v.description}
                           for v in self.volumes.values()])
        with open(f"{self.folder}/volumes.json.new", "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.rename(f"{self.folder}/volumes.json.new", f"{self.folder}/volumes.json")

    def change(self, v, kind, offset, length, payload):
        with self.lock:
            while True:
                n = min(length, PIECE)
                part = bytes(payload[:n]) if kind == 1 else b""
                rest = struct.pack(">BLQQ", kind, v.number, offset, n)
                record = struct.pack(">LL", 0x52454652, zlib.crc32(rest + part)) + rest + part
                if kind == 1:
                    v.write(offset, part)
                else:
                    v.zero(offset, n)
                self.append(record)
                length, offset, payload = length - n, offset + n, payload[n:]
                if not length:
                    return

    def append(self, record):
        if BUG == "answer_first" or (BUG == "swap" and self.held is None
                                     and self.random.random() < 0.2):
            record, self.held = self.held, record
        elif BUG == "swap" and self.held is not None:
            self._put(record)
            record, self.held = self.held, None
        if record:
            self._put(record)

    def _put(self, record):
        os.pwrite(self.log, record, self.end)
        self.end += len(record)

    def sync(self, fua=False):
        with self.lock:
            if self.held is not None and BUG == "swap":
                self._put(self.held)
                self.held = None
        if BUG != ("fua_noop" if fua else "flush_noop"):
            os.fdatasync(self.log)


class End(Exception):
    pass


class Connection:
    def __init__(self, sock, store, options):
        self.sock, self.store, self.options = sock, store, options
        self.structured = self.extended = False
        self.contexts, self.context_export = {}, None

    def recv(self, n):
        out = bytearray(n)
        view = memoryview(out)
        while len(view):
            got = self.sock.recv_into(view)
            if not got:
                raise End
            view = view[got:]
        return bytes(out)

    def drop(self, n):
        while n:
            n -= len(self.recv(min(n, 1 << 20)))

    def run(self):
        try:
            # The whole handshake has one deadline, however slowly the bytes trickle in.
            timer = threading.Timer(HANDSHAKE_S, self.hang_up)
            timer.daemon = True
            timer.start()
            v = self.handshake()
            timer.cancel()
            if v:
                self.transmission(v)
        except (End, OSError):
            pass
        finally:
            timer.cancel()
            self.sock.close()

    def hang_up(self):
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    # -- handshake ---------------------------------------------------------

    def reply(self, option, kind, data=b""):
        self.sock.sendall(struct.pack(">QLLL", 0x3E889045565A9, option, kind, len(data)) + data)

    def flags(self):
        f = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048
        if self.options.read_only:
            f |= 2
        if self.structured or self.extended:
            f |= 128
        if self.extended and self.contexts:
            f |= 4096
        return f

    def find(self, raw):
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            return None
        return self.store.volumes.get(name or self.options.default)

    def handshake(self):
        self.sock.sendall(struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3))
        (flags,) = struct.unpack(">L", self.recv(4))
        if flags & ~3:
            return None
        while True:
            magic, option, length = struct.unpack(">QLL", self.recv(16))
            if magic != 0x49484156454F5054:
                return None
            if option == 1:
                raw = self.recv(length) if length <= NAME_MAX else b"\xff"
                v = self.find(raw)
                if not v or self.extended:
                    return None
                if self.context_export != v.name:
                    self.contexts = {}
                self.sock.sendall(struct.pack(">QH", v.size, self.flags())
                                  + (b"" if flags & 2 else bytes(124)))
                return v
            if length > OPTION_MAX:
                if length > 1 << 24:
                    return None
                self.drop(length)
                self.reply(option, TOO_BIG)
                continue
            data = self.recv(length)
            if option == 2:
                self.reply(2, 1)
                return None
            if option in (3, 8, 11) and data:
                self.reply(option, INVALID)
            elif option == 3:
                for v in self.store.volumes.values():
                    raw = v.name.encode()
                    self.reply(3, 2, struct.pack(">L", len(raw)) + raw + v.description.encode())
                self.reply(3, 1)
            elif option == 8:
                if self.extended:
                    self.reply(8, EXT_REQD)
                else:
                    self.structured = True
                    self.reply(8, 1)
            elif option == 11:
                self.extended = True
                self.reply(11, 1)
            elif option in (6, 7):
                v = self.info(option, data)
                if v and option == 7:
                    return v
            elif option in (9, 10):
                self.meta(option, data)
            elif option == 5:
                self.reply(5, INVALID if data else POLICY)
            else:
                self.reply(option, UNSUP)

    def info(self, option, data):
        if len(data) < 6:
            return self.reply(option, INVALID)
        (n,) = struct.unpack_from(">L", data)
        if n > len(data) - 6:
            return self.reply(option, INVALID)
        (count,) = struct.unpack_from(">H", data, 4 + n)
        if 6 + n + 2 * count != len(data):
            return self.reply(option, INVALID)
        if n > NAME_MAX:
            return self.reply(option, TOO_BIG)
        wanted = struct.unpack_from(f">{count}H", data, 6 + n)
        v = self.find(data[4:4 + n])
        if not v:
            return self.reply(option, UNKNOWN)
        if option == 7 and self.context_export != v.name:
            self.contexts = {}
        self.reply(option, 3, struct.pack(">HQH", 0, v.size, self.flags()))
        if 1 in wanted:
            self.reply(option, 3, struct.pack(">H", 1) + v.name.encode())
        if 2 in wanted and v.description:
            self.reply(option, 3, struct.pack(">H", 2) + v.description.encode())
        if 3 in wanted:
            self.reply(option, 3, struct.pack(">HLLL", 3, 1, BLOCK, PAYLOAD_MAX))
        self.reply(option, 1)
        return v

    def meta(self, option, data):
        if option == 10:
            self.contexts = {}
        if not self.structured and not self.extended:
            return self.reply(option, INVALID)
        try:
            (n,) = struct.unpack_from(">L", data)
            if n > len(data) - 8:
                raise struct.error
            raw, at = data[4:4 + n], 8 + n
            (count,) = struct.unpack_from(">L", data, 4 + n)
            queries = []
            for _ in range(min(count, len(data))):
                (q,) = struct.unpack_from(">L", data, at)
                if q > len(data) - at - 4:
                    raise struct.error
                queries.append(data[at + 4:at + 4 + q])
                at += 4 + q
            if len(queries) != count or at != len(data):
                raise struct.error
        except struct.error:
            return self.reply(option, INVALID)
        v = self.find(raw)
        if not v:
            return self.reply(option, UNKNOWN)
        known = [b"base:allocation", b"qemu:allocation-depth"]
        if not queries:
            found = known if option == 9 else []
        else:
            found = [k for k in known if k in queries or (
                option == 9 and k.split(b":")[0] + b":" in queries)]
        if option == 10:
            self.contexts = {i + 1: k for i, k in enumerate(found)}
            self.context_export = v.name
        for i, k in enumerate(found):
            self.reply(option, 4, struct.pack(">L", i + 1 if option == 10 else 0) + k)
        self.reply(option, 1)

    # -- transmission ------------------------------------------------------

    def send(self, cookie, offset, chunks):
        """chunks: [(type, payload)...], the last gets DONE."""
        out = []
        for i, (kind, payload) in enumerate(chunks):
            done = 1 if i == len(chunks) - 1 else 0
            if self.extended:
                out.append(struct.pack(">LHHQQQ", 0x6E8A278C, done, kind, cookie, offset,
                                       len(payload)))
            else:
                out.append(struct.pack(">LHHQL", 0x668E33EF, done, kind, cookie, len(payload)))
            out.append(payload)
        self.sock.sendall(b"".join(out))

    def answer(self, cookie, offset, error=0, structured=False):
        if self.extended or (structured and self.structured):
            chunk = (0x8001, struct.pack(">LH", error, 0)) if error else (0, b"")
            self.send(cookie, offset, [chunk])
        else:
            self.sock.sendall(struct.pack(">LLQ", 0x67446698, error, cookie))

    def transmission(self, v):
        while True:
            if self.extended:
                magic, flags, kind, cookie, offset, length = struct.unpack(
                    ">LHHQQQ", self.recv(32))
                good = 0x21E41C71
            else:
                magic, flags, kind, cookie, offset, length = struct.unpack(
                    ">LHHQQL", self.recv(28))
                good = 0x25609513
            if magic != good or kind == 2:
                return
            has_payload = flags & 32 if self.extended else kind == 1
            payload = b""
            if has_payload:
                if length > PAYLOAD_MAX:
                    return
                if BUG == "streaming" and kind == 1:
                    payload = self.streamed(v, offset, length)
                else:
                    payload = self.recv(length)
            self.one(v, flags & ~1, bool(flags & 1), kind, cookie, offset, length, payload,
                     bool(has_payload))

    def streamed(self, v, offset, length):
        payload = b""
        while len(payload) < length:
            part = self.recv(min(65536, length - len(payload)))
            self.store.change(v, 1, offset + len(payload), len(part), part)
            payload += part
        return payload

    def one(self, v, flags, fua, kind, cookie, offset, length, payload, has_payload):
        def error(e):
            self.answer(cookie, offset, e, structured=True)

        allowed = {0: 4 if self.structured or self.extended else 0, 1: 0, 3: 0, 4: 0, 5: 0,
                   6: 2 | 16, 7: 8}.get(kind)
        ids = list(self.contexts)
        if self.extended and has_payload:
            flags &= ~32
            if kind == 7 and self.contexts and length >= 12 and length % 4 == 0:
                (length,) = struct.unpack_from(">Q", payload)
                ids = [i for (i,) in struct.iter_unpack(">L", payload[8:])]
                if len(set(ids)) != len(ids) or not set(ids) <= set(self.contexts):
                    return error(22)
            elif kind != 1:
                return error(22)
        elif self.extended and kind == 1:
            return error(22)
        if allowed is None or flags & ~allowed:
            return error(22)
        if kind in (1, 4, 6) and self.options.read_only:
            return error(1)
        if kind != 3 and (offset > v.size or length > v.size - offset):
            return error(28 if kind in (1, 6) else 22)
        if kind == 3 and (offset or length):
            return error(22)
        if kind == 0:
            if length > PAYLOAD_MAX:
                return error(75 if flags & 4 else 22)
            return self.read(v, cookie, offset, length)
        if kind == 7:
            return self.status(v, cookie, offset, length, flags & 8, ids) \
                if self.contexts and length else error(22)
        if kind == 1 and length:
            self.store.change(v, 1, offset, length, payload)
        elif kind in (4, 6) and length:
            self.store.change(v, 2, offset, length, b"")
            if flags & 2:
                v.data_blocks.update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
        try:
            if kind == 3:
                self.store.sync()
            elif fua and kind in (1, 4, 6):
                self.store.sync(fua=True)
        except OSError:
            return error(5)
        self.answer(cookie, offset)

    def read(self, v, cookie, offset, length):
        data = v.bytes[offset:offset + length]
        if not (self.structured or self.extended):
            self.sock.sendall(struct.pack(">LLQ", 0x67446698, 0, cookie) + data)
        elif length:
            self.send(cookie, offset, [(1, struct.pack(">Q", offset) + data)])
        else:
            self.send(cookie, offset, [(0, b"")])

    def status(self, v, cookie, offset, length, one, ids):
        chunks = []
        for i in ids:
            extents = v.extents(offset, length, 1 if one else 1 << 20)
            if self.contexts[i] == b"base:allocation":
                extents = [(n, 3 if hole else 0) for n, hole in extents]
            else:
                extents = [(n, 0 if hole else 1) for n, hole in extents]
            if self.extended:
                chunks.append((6, struct.pack(">LL", i, len(extents)) + b"".join(
                    struct.pack(">QQ", *e) for e in extents)))
            else:
                chunks.append((5, struct.pack(">L", i) + b"".join(
                    struct.pack(">LL", *e) for e in extents)))
        if not chunks:
            chunks = [(0, b"")]
        self.send(cookie, offset, chunks)


class Options:
    read_only = False
    default = ""


def serve(store, words):
    options, listen, it = Options(), [], iter(words)
    store.open(write=True)
    for w in it:
        if w == "--listen":
            listen.append(next(it))
        elif w == "--create":
            name, size = next(it).rsplit(":", 1)
            store.create(name, size_of(size))
        elif w == "--default":
            options.default = next(it)
        elif w == "--read-only":
            options.read_only = True
        elif w in ("--cache-size", "--threads", "--lease-ms", "--owner-wait"):
            next(it)
        elif w != "--shared":
            sys.exit(f"unknown: {w}")
    signal.signal(signal.SIGTERM, lambda *unused: os._exit(0))
    sockets = []
    for text in listen:
        if text.startswith("unix:"):
            s = socket.socket(socket.AF_UNIX)
            if os.path.exists(text[5:]):
                os.unlink(text[5:])
            s.bind(text[5:])
        else:
            host, port = text.rsplit(":", 1)
            host = host.strip("[]")
            s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((host, int(port)))
        s.listen(1024)
        sockets.append(s)
    while True:
        for s in select.select(sockets, [], [])[0]:
            c, _ = s.accept()
            if s.family != socket.AF_UNIX:
                c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=Connection(c, store, options).run, daemon=True).start()


def main(words):
    folder, as_json, it = None, False, iter(words)
    for w in it:
        if w == "--store":
            folder = next(it).removeprefix("lmdb:")
        elif w == "--json":
            as_json = True
        else:
            break
    rest = list(it)
    store = Store(folder)
    if w == "serve":
        serve(store, rest)
    elif w == "create":
        store.open(write=True)
        description = rest[rest.index("--description") + 1] if "--description" in rest else ""
        store.create(rest[0], size_of(rest[1]), description)
    elif w == "info":
        store.open(write=False)
        v = store.volumes.get(rest[0])
        if not v:
            sys.exit(3)
        out = {"name": v.name, "size_bytes": v.size, "used_bytes": len(v.data_blocks) * BLOCK}
        print(json.dumps(out) if as_json else out)
    else:
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
