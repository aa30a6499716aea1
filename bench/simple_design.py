#!/usr/bin/python3
"""The simplest design of a block device on FoundationDB, as a measure for the real one.

It stands for what a first program of this kind looks like, and most people would write: blocks
of 1 KiB, each compressed with zlib, under a key of (export, number of the block); one
transaction for each request, which sets the blocks of a write or gets those of a read; the
answer goes out when the transaction has ended, and then the next request is read. Written from
scratch for this comparison, and not made slow on purpose: blocks are set blindly (a request that
covers blocks only in part reads them first), a read is one range read of all its blocks and not
a get for each, zlib works at its fastest level, and FoundationDB's client runs in its own thread
outside of Python's lock. There is no Python binding of FoundationDB in Debian: ctypes on its C
library does the same.

  simple_design.py SOCKET SIZE [CLUSTER_FILE]

LIBFDB_C names the library where it is not found by itself. --no-store answers without storing
anything, which shows what Python itself costs.
"""

import ctypes
import os
import socket
import struct
import sys
import threading
import zlib

BLOCK = 1024
LEVEL = 1
API_VERSION = 630
WANT_ALL = -2
READ_YOUR_WRITES_DISABLE = 51

REQUEST = struct.Struct(">LHHQQL")
READ, WRITE, DISC, FLUSH = range(4)
EIO, EINVAL = 5, 22


class KeyValue(ctypes.Structure):
    _pack_ = 4
    _fields_ = [("key", ctypes.c_void_p), ("key_length", ctypes.c_int),
                ("value", ctypes.c_void_p), ("value_length", ctypes.c_int)]


class Failed(Exception):
    def __init__(self, code):
        super().__init__(f"FoundationDB error {code}")
        self.code = code


class Database:
    def __init__(self, cluster_file):
        self.c = c = ctypes.CDLL(os.environ.get("LIBFDB_C", "libfdb_c.so"))
        p, n, out = ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
        for name, result, arguments in (
                ("transaction_destroy", None, [p]),
                ("transaction_set", None, [p, ctypes.c_char_p, n, ctypes.c_char_p, n]),
                ("transaction_commit", p, [p]),
                ("transaction_on_error", p, [p, n]),
                ("transaction_set_option", n, [p, n, ctypes.c_char_p, n]),
                ("transaction_get_range", p, [p, ctypes.c_char_p, n, n, n, ctypes.c_char_p,
                                              n, n, n, n, n, n, n, n, n]),
                ("future_block_until_ready", n, [p]),
                ("future_get_error", n, [p]),
                ("future_get_keyvalue_array", n, [p, out, out, out]),
                ("future_destroy", None, [p]),
                ("create_database", n, [ctypes.c_char_p, out]),
                ("database_create_transaction", n, [p, out])):
            function = getattr(c, "fdb_" + name)
            function.restype, function.argtypes = result, arguments
        self.check(c.fdb_select_api_version_impl(API_VERSION, API_VERSION))
        self.check(c.fdb_setup_network())
        threading.Thread(target=c.fdb_run_network, daemon=True).start()
        self.db = ctypes.c_void_p()
        name = cluster_file.encode() if cluster_file else None
        self.check(c.fdb_create_database(name, ctypes.byref(self.db)))

    @staticmethod
    def check(code):
        if code:
            raise Failed(code)

    def wait(self, future):
        """Until it is ready; the caller destroys it."""
        self.check(self.c.fdb_future_block_until_ready(future))
        self.check(self.c.fdb_future_get_error(future))

    def run(self, body):
        """body(transaction), then its commit; again after errors that pass."""
        c = self.c
        tr = ctypes.c_void_p()
        self.check(c.fdb_database_create_transaction(self.db, ctypes.byref(tr)))
        try:
            while True:
                try:
                    result = body(tr)
                    self.done(c.fdb_transaction_commit(tr))
                    return result
                except Failed as e:
                    self.done(c.fdb_transaction_on_error(tr, e.code))
        finally:
            c.fdb_transaction_destroy(tr)

    def done(self, future):
        try:
            self.wait(future)
        finally:
            self.c.fdb_future_destroy(future)

    def get_range(self, tr, begin, end):
        """[(key, value)...] of all keys in [begin, end)."""
        out = []
        behind, more = 0, True
        pairs, count, left = ctypes.POINTER(KeyValue)(), ctypes.c_int(), ctypes.c_int()
        while more:
            future = self.c.fdb_transaction_get_range(
                tr, begin, len(begin), behind, 1, end, len(end), 0, 1, 0, 0, WANT_ALL, 1, 0, 0)
            try:
                self.wait(future)
                self.check(self.c.fdb_future_get_keyvalue_array(
                    future, ctypes.byref(pairs), ctypes.byref(count), ctypes.byref(left)))
                for i in range(count.value):
                    kv = pairs[i]
                    out.append((ctypes.string_at(kv.key, kv.key_length),
                                ctypes.string_at(kv.value, kv.value_length)))
                more = bool(left.value and count.value)
            finally:
                self.c.fdb_future_destroy(future)
            if more:
                begin, behind = out[-1][0], 1
        return out


class Device:
    """The blocks of one export."""

    def __init__(self, db, name, size):
        self.db, self.size = db, size
        self.prefix = b"\x02simple\x00\x02" + name.encode() + b"\x00"

    def key(self, block):
        return self.prefix + struct.pack(">Q", block)

    def _load(self, tr, first, end):
        data = bytearray((end - first) * BLOCK)
        for key, value in self.db.get_range(tr, self.key(first), self.key(end)):
            at = (struct.unpack(">Q", key[-8:])[0] - first) * BLOCK
            data[at:at + BLOCK] = zlib.decompress(value)
        return data

    def read(self, offset, length):
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        if self.db is None:
            return bytes(length)
        data = self.db.run(lambda tr: self._load(tr, first, end))
        return data[offset - first * BLOCK:][:length]

    def write(self, offset, data):
        if offset % BLOCK == 0 and len(data) % BLOCK == 0:
            blocks = self._pack(offset // BLOCK, data)
            if self.db is not None:
                self.db.run(lambda tr: self._set(tr, blocks))
            return
        first, end = offset // BLOCK, -(-(offset + len(data)) // BLOCK)

        def body(tr):
            whole = self._load(tr, first, end)
            at = offset - first * BLOCK
            whole[at:at + len(data)] = data
            self._set(tr, self._pack(first, whole))
        self.db.run(body)

    def _pack(self, first, data):
        return [(self.key(first + i), zlib.compress(data[i * BLOCK:(i + 1) * BLOCK], LEVEL))
                for i in range(len(data) // BLOCK)]

    def _set(self, tr, blocks):
        put = self.db.c.fdb_transaction_set
        for key, value in blocks:
            put(tr, key, len(key), value, len(value))


class Connection:
    def __init__(self, sock, device):
        self.sock, self.device = sock, device
        self.buffer = bytearray(1 << 25)

    def receive(self, n):
        view = memoryview(self.buffer)[:n]
        at = 0
        while at < n:
            got = self.sock.recv_into(view[at:])
            if not got:
                raise EOFError
            at += got
        return view

    def handshake(self):
        """Fixed newstyle, the name of the export is not looked at."""
        self.sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        flags = 1 | 4  # has flags, FLUSH
        no_zeroes = self.receive(4)[3] & 2
        while True:
            _, option, length = struct.unpack(">QLL", self.receive(16))
            self.receive(length)
            answer = struct.pack(">QL", 0x3e889045565a9, option)
            info = struct.pack(">QH", self.device.size, flags)
            if option == 1:    # EXPORT_NAME
                self.sock.sendall(info + (b"" if no_zeroes else bytes(124)))
                return True
            if option == 7:    # GO
                self.sock.sendall(answer + struct.pack(">LLH", 3, 12, 0) + info +
                                  answer + struct.pack(">LL", 1, 0))
                return True
            if option == 2:    # ABORT
                self.sock.sendall(answer + struct.pack(">LL", 1, 0))
                return False
            self.sock.sendall(answer + struct.pack(">LL", 0x80000001, 0))

    def serve(self):
        if not self.handshake():
            return
        device, send = self.device, self.sock.sendall
        while True:
            magic, _, command, cookie, offset, length = REQUEST.unpack(self.receive(28))
            if magic != 0x25609513 or command == DISC:
                return
            error, data = 0, b""
            payload = self.receive(length) if command == WRITE else b""
            if command in (READ, WRITE) and offset + length > device.size:
                error = EINVAL
            else:
                try:
                    if command == READ:
                        data = device.read(offset, length)
                    elif command == WRITE:
                        device.write(offset, payload)
                    elif command != FLUSH:
                        error = EINVAL
                except Failed as e:
                    print(e, file=sys.stderr)
                    error, data = EIO, b""
            send(struct.pack(">LLQ", 0x67446698, error, cookie) + data)


def serve(sock, device):
    try:
        Connection(sock, device).serve()
    except (EOFError, ConnectionError):
        pass
    finally:
        sock.close()


def main():
    words = sys.argv[1:]
    no_store = "--no-store" in words
    words = [w for w in words if w != "--no-store"]
    if len(words) not in (2, 3):
        print(__doc__.strip(), file=sys.stderr)
        sys.exit(2)
    db = None if no_store else Database(words[2] if len(words) == 3 else None)
    device = Device(db, "example", int(words[1]))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(words[0])
    listener.listen()
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock, device), daemon=True).start()


if __name__ == "__main__":
    main()
