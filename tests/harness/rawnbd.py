"""An NBD client that puts raw bytes on a socket.

It exists because ordinary client libraries refuse to send what a server must
survive, and because the clients of Debian 12 know no extended headers. It
speaks fixed newstyle, every option, and simple, structured and extended
replies; anything malformed goes out through send() and send_option().

Replies are checked against the protocol as they are collected: a chunk outside
its request, an overlap, a gap in a successful read, a DONE that is not last, a
reply in the wrong style is a ProtocolError in whichever test meets it.

Written from the NBD protocol document alone.
"""

import itertools
import select
import socket
import struct
import time
from dataclasses import dataclass, field

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPT_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXT_REQUEST_MAGIC = 0x21E41C71
EXT_REPLY_MAGIC = 0x6E8A278C

# handshake and client flags
FIXED_NEWSTYLE = 1
NO_ZEROES = 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST = 1, 2, 3
OPT_STARTTLS, OPT_INFO, OPT_GO = 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10
OPT_EXTENDED_HEADERS = 11

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR = 1 << 31
REP_ERR_UNSUP = REP_ERR + 1
REP_ERR_POLICY = REP_ERR + 2
REP_ERR_INVALID = REP_ERR + 3
REP_ERR_PLATFORM = REP_ERR + 4
REP_ERR_TLS_REQD = REP_ERR + 5
REP_ERR_UNKNOWN = REP_ERR + 6
REP_ERR_SHUTDOWN = REP_ERR + 7
REP_ERR_BLOCK_SIZE_REQD = REP_ERR + 8
REP_ERR_TOO_BIG = REP_ERR + 9
REP_ERR_EXT_HEADER_REQD = REP_ERR + 10

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

# transmission flags
HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
ROTATIONAL = 1 << 4
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
SEND_DF = 1 << 7
CAN_MULTI_CONN = 1 << 8
SEND_RESIZE = 1 << 9
SEND_CACHE = 1 << 10
SEND_FAST_ZERO = 1 << 11
BLOCK_STATUS_PAYLOAD = 1 << 12

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH = 0, 1, 2, 3
CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS, CMD_RESIZE = 4, 5, 6, 7, 8

FLAG_FUA = 1 << 0
FLAG_NO_HOLE = 1 << 1
FLAG_DF = 1 << 2
FLAG_REQ_ONE = 1 << 3
FLAG_FAST_ZERO = 1 << 4
FLAG_PAYLOAD_LEN = 1 << 5

REPLY_FLAG_DONE = 1

TYPE_NONE, TYPE_OFFSET_DATA, TYPE_OFFSET_HOLE = 0, 1, 2
TYPE_BLOCK_STATUS, TYPE_BLOCK_STATUS_EXT = 5, 6
TYPE_ERROR, TYPE_ERROR_OFFSET = 0x8001, 0x8002

STATE_HOLE, STATE_ZERO = 1, 2

EPERM, EIO, ENOMEM, EINVAL, ENOSPC = 1, 5, 12, 22, 28
EOVERFLOW, ENOTSUP, ESHUTDOWN = 75, 95, 108
KNOWN_ERRORS = {0, EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN}

STRING_MAX = 4096
PAYLOAD_MAX = 32 << 20


class ProtocolError(AssertionError):
    """The server broke the protocol."""


class Closed(Exception):
    """The server closed the connection where an answer was expected."""


class OptionError(Exception):
    """The server refused an option; type is its error reply."""

    def __init__(self, option, kind, data):
        self.option, self.type, self.data = option, kind, data
        super().__init__(f"option {option} refused with {kind & ~REP_ERR}: {data!r}")


class NbdError(Exception):
    """The server answered a request with an error."""

    def __init__(self, result):
        self.result, self.error = result, result.error
        super().__init__(f"command {result.request.type} failed with {result.error}")


@dataclass
class Request:
    cookie: int
    type: int
    offset: int
    length: int
    flags: int
    sent_ns: int = 0
    effect_length: int = 0


@dataclass
class Chunk:
    """One reply message: a simple reply is shown as one chunk with kind 'simple'."""
    kind: str
    flags: int
    type: int
    cookie: int
    payload: bytes
    offset: int = None
    error: int = 0
    message: str = ""
    error_offset: int = None


@dataclass
class Result:
    """The whole answer to one request."""
    request: Request
    chunks: list = field(default_factory=list)
    error: int = 0
    data: bytes = None
    answered_ns: int = 0
    # (offset, length, is_hole) of each content chunk, in order of arrival
    content: list = field(default_factory=list)
    # context id -> [(length, status), ...]
    extents: dict = field(default_factory=dict)

    def check(self):
        if self.error:
            raise NbdError(self)
        return self


@dataclass
class Export:
    size: int
    flags: int
    name: str = None
    description: str = None
    block_size: tuple = None
    infos: list = field(default_factory=list)


class Client:
    """One connection. Nothing happens by itself except connecting."""

    def __init__(self, address, timeout_s=60, source=None):
        """address: a socket path, or (host, port), or anything with addresses(). source: the
        address to come from, over TCP."""
        if hasattr(address, "addresses"):
            address = address.addresses()[0]
        if isinstance(address, (tuple, list)):
            self.sock = socket.create_connection(tuple(address), timeout=timeout_s,
                                                 source_address=source and (source, 0))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout_s)
            self.sock.connect(str(address))
        self.address = address
        self.structured = False
        self.extended = False
        self.export = None
        self.contexts = {}              # id -> name, as selected
        self.pending = {}               # cookie -> Request
        self.partial = {}               # cookie -> Result still collecting chunks
        self.finished = {}              # cookie -> Result nobody asked for yet
        self._early = bytearray()       # came while we were sending
        self._cookies = itertools.count(0x1122334400000001)

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()

    # -- bytes -------------------------------------------------------------

    def send(self, data):
        """All of data. Takes in replies meanwhile, as a server may stop reading requests
        while its replies are not being read."""
        view = memoryview(data)
        limit_s = self.sock.gettimeout()
        self.sock.setblocking(False)
        try:
            while len(view):
                try:
                    view = view[self.sock.send(view):]
                    continue
                except BlockingIOError:
                    pass
                readable, writable, _ = select.select([self.sock], [self.sock], [], limit_s)
                if not readable and not writable:
                    raise TimeoutError("the server reads nothing")
                if readable and not writable:
                    more = self.sock.recv(1 << 20)
                    if not more:
                        raise ConnectionResetError("closed by the server")
                    self._early += more
        finally:
            self.sock.settimeout(limit_s)

    def recv(self, count):
        """Exactly count bytes; Closed if the server ends the connection first."""
        out = bytearray(count)
        view = memoryview(out)
        have = min(count, len(self._early))
        if have:
            out[:have] = self._early[:have]
            del self._early[:have]
        while have < count:
            try:
                got = self.sock.recv_into(view[have:])
            except ConnectionError as e:
                raise Closed(str(e)) from e
            if got == 0:
                raise Closed(f"end of stream after {have} of {count} bytes")
            have += got
        return bytes(out)

    def expect_closed(self, limit_s=None):
        """The server closes without another byte."""
        if limit_s is not None:
            self.sock.settimeout(limit_s)
        try:
            data = self.sock.recv(4096)
        except ConnectionError:
            return
        except (TimeoutError, socket.timeout):
            raise ProtocolError("the server neither answered nor closed") from None
        if data:
            raise ProtocolError(f"expected the connection to end, got {data[:64].hex()}")

    def expect_silent(self, seconds):
        """No byte comes and the connection stays open; for what must not be answered."""
        old = self.sock.gettimeout()
        self.sock.settimeout(seconds)
        try:
            data = self.sock.recv(4096)
        except (TimeoutError, socket.timeout):
            return
        finally:
            self.sock.settimeout(old)
        raise ProtocolError(f"unexpected {'bytes ' + data[:64].hex() if data else 'end'}")

    # -- handshake ---------------------------------------------------------

    def greeting(self):
        """Reads the server's greeting and gives its handshake flags."""
        magic, opt, flags = struct.unpack(">QQH", self.recv(18))
        if magic != NBDMAGIC or opt != IHAVEOPT:
            raise ProtocolError(f"greeting {magic:#x} {opt:#x}")
        return flags

    def handshake(self, client_flags=FIXED_NEWSTYLE | NO_ZEROES):
        self.no_zeroes = bool(client_flags & NO_ZEROES)
        flags = self.greeting()
        self.send(struct.pack(">L", client_flags))
        return flags

    def send_option(self, option, data=b"", length=None):
        """length: what the header claims, where that is to differ from the truth."""
        self.send(struct.pack(">QLL", IHAVEOPT, option, len(data) if length is None else length)
                  + data)

    def recv_option_reply(self, option=None):
        magic, for_option, kind, length = struct.unpack(">QLLL", self.recv(20))
        if magic != OPT_REPLY_MAGIC:
            raise ProtocolError(f"option reply magic {magic:#x}")
        if length > 64 << 10:
            raise ProtocolError(f"an option reply of {length} bytes")
        data = self.recv(length)
        if option is not None and for_option != option:
            raise ProtocolError(f"a reply to option {for_option}, expected {option}")
        if kind & REP_ERR:
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                raise ProtocolError(f"an error message that is not UTF-8: {data!r}") from None
            if "\0" in text or len(data) > STRING_MAX:
                raise ProtocolError(f"an error message that is no string: {data!r}")
        return kind, data

    def collect_option(self, option):
        """All replies up to the final one: ([(type, data)...], final type, final data)."""
        replies = []
        while True:
            kind, data = self.recv_option_reply(option)
            if kind == REP_ACK:
                if data:
                    raise ProtocolError(f"an ACK with data: {data!r}")
                return replies, kind, data
            if kind & REP_ERR:
                return replies, kind, data
            replies.append((kind, data))

    def option(self, option, data=b"", length=None):
        self.send_option(option, data, length)
        return self.collect_option(option)

    def option_ok(self, option, data=b""):
        replies, kind, text = self.option(option, data)
        if kind != REP_ACK:
            raise OptionError(option, kind, text)
        return replies

    def structured_reply(self):
        self.option_ok(OPT_STRUCTURED_REPLY)
        self.structured = True
        return self

    def extended_headers(self):
        self.option_ok(OPT_EXTENDED_HEADERS)
        self.extended = True
        return self

    def list(self):
        """[(name, description)...]"""
        out = []
        for kind, data in self.option_ok(OPT_LIST):
            if kind != REP_SERVER:
                raise ProtocolError(f"LIST gave a reply of type {kind}")
            (length,) = struct.unpack_from(">L", data)
            if length > len(data) - 4:
                raise ProtocolError("LIST: name longer than its reply")
            out.append((data[4:4 + length].decode(), data[4 + length:].decode()))
        return out

    @staticmethod
    def go_data(name, infos=()):
        raw = name.encode() if isinstance(name, str) else name
        return (struct.pack(">L", len(raw)) + raw + struct.pack(">H", len(infos))
                + b"".join(struct.pack(">H", i) for i in infos))

    def info(self, name, infos=(INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION), option=OPT_INFO):
        export = None
        replies = self.option_ok(option, self.go_data(name, infos))
        seen = {}
        for kind, data in replies:
            if kind != REP_INFO:
                raise ProtocolError(f"INFO/GO gave a reply of type {kind}")
            (what,) = struct.unpack_from(">H", data)
            if what in seen:
                raise ProtocolError(f"information {what} twice")
            seen[what] = data[2:]
        if INFO_EXPORT not in seen or len(seen[INFO_EXPORT]) != 10:
            raise ProtocolError(f"no proper INFO_EXPORT among {sorted(seen)}")
        export = Export(*struct.unpack(">QH", seen[INFO_EXPORT]))
        export.infos = [(struct.unpack_from(">H", d)[0], d[2:]) for _, d in replies]
        if not export.flags & HAS_FLAGS:
            raise ProtocolError("HAS_FLAGS is not set")
        if INFO_NAME in seen:
            export.name = seen[INFO_NAME].decode()
        if INFO_DESCRIPTION in seen:
            export.description = seen[INFO_DESCRIPTION].decode()
        if INFO_BLOCK_SIZE in seen:
            if len(seen[INFO_BLOCK_SIZE]) != 12:
                raise ProtocolError("INFO_BLOCK_SIZE of the wrong length")
            export.block_size = struct.unpack(">LLL", seen[INFO_BLOCK_SIZE])
        return export

    def go(self, name, infos=(INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION)):
        self.export = self.info(name, infos, OPT_GO)
        return self.export

    def export_name(self, name):
        raw = name.encode() if isinstance(name, str) else name
        self.send_option(OPT_EXPORT_NAME, raw)
        size, flags = struct.unpack(">QH", self.recv(10))
        if not self.no_zeroes:
            if self.recv(124) != bytes(124):
                raise ProtocolError("the 124 reserved bytes are not zero")
        self.export = Export(size, flags)
        return self.export

    @staticmethod
    def meta_data(name, queries):
        raw = name.encode() if isinstance(name, str) else name
        out = struct.pack(">L", len(raw)) + raw + struct.pack(">L", len(queries))
        for q in queries:
            q = q.encode() if isinstance(q, str) else q
            out += struct.pack(">L", len(q)) + q
        return out

    def meta_context(self, option, name, queries):
        """[(id, name)...] of LIST_META_CONTEXT or SET_META_CONTEXT."""
        if option == OPT_SET_META_CONTEXT:
            self.contexts = {}
        out = []
        for kind, data in self.option_ok(option, self.meta_data(name, queries)):
            if kind != REP_META_CONTEXT:
                raise ProtocolError(f"a meta context reply of type {kind}")
            out.append((struct.unpack_from(">L", data)[0], data[4:].decode()))
        if option == OPT_SET_META_CONTEXT:
            if len({i for i, _ in out}) != len(out):
                raise ProtocolError(f"context ids are not unique: {out}")
            self.contexts = dict(out)
        return out

    def set_meta_context(self, name, *queries):
        return self.meta_context(OPT_SET_META_CONTEXT, name, queries)

    def list_meta_context(self, name, *queries):
        return self.meta_context(OPT_LIST_META_CONTEXT, name, queries)

    def abort(self, data=b""):
        return self.option(OPT_ABORT, data)

    # -- requests ----------------------------------------------------------

    def new_cookie(self):
        return next(self._cookies)

    def header(self, kind, offset=0, length=0, flags=0, cookie=0, magic=None):
        if magic is None:
            magic = EXT_REQUEST_MAGIC if self.extended else REQUEST_MAGIC
        if self.extended:
            return struct.pack(">LHHQQQ", magic, flags, kind, cookie,
                               offset, length)
        return struct.pack(">LHHQQL", magic, flags, kind, cookie, offset, length)

    def request(self, kind, offset=0, length=None, flags=0, payload=b"", cookie=None,
                send=True, effect_length=None):
        """Sends one request; gives its cookie (or, with send=False, the cookie and the bytes)."""
        if cookie is None:
            cookie = self.new_cookie()
        if length is None:
            length = len(payload)
        if self.extended and kind == CMD_WRITE:
            flags |= FLAG_PAYLOAD_LEN
        data = self.header(kind, offset, length, flags, cookie)
        r = Request(cookie, kind, offset, length, flags, time.monotonic_ns(),
                    length if effect_length is None else effect_length)
        self.pending[cookie] = r
        if not send:
            return cookie, data + payload
        if payload:
            # One call, so that a small request is one segment.
            if len(payload) < 65536:
                self.send(data + payload)
            else:
                self.send(data)
                self.send(payload)
        else:
            self.send(data)
        return cookie

    def recv_chunk(self):
        """The next reply message, whatever request it belongs to."""
        (magic,) = struct.unpack(">L", self.recv(4))
        if magic == SIMPLE_REPLY_MAGIC:
            if self.extended:
                raise ProtocolError("a simple reply although extended headers were agreed")
            error, cookie = struct.unpack(">LQ", self.recv(12))
            request = self._pending(cookie)
            if self.structured and request.type == CMD_READ:
                raise ProtocolError("a simple reply to READ although structured were agreed")
            if self.structured and request.type == CMD_BLOCK_STATUS and not error:
                raise ProtocolError("a simple reply to a successful BLOCK_STATUS")
            payload = b""
            if request.type == CMD_READ and not error:
                payload = self.recv(request.length)
            chunk = Chunk("simple", REPLY_FLAG_DONE, TYPE_NONE, cookie, payload, error=error)
        elif magic == STRUCTURED_REPLY_MAGIC:
            if not self.structured or self.extended:
                raise ProtocolError("a structured reply that was not agreed")
            flags, kind, cookie, length = struct.unpack(">HHQL", self.recv(16))
            self._pending(cookie)
            if length > PAYLOAD_MAX + 1024:
                raise ProtocolError(f"a chunk of {length} bytes")
            chunk = Chunk("structured", flags, kind, cookie, self.recv(length))
        elif magic == EXT_REPLY_MAGIC:
            if not self.extended:
                raise ProtocolError("an extended reply that was not agreed")
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.recv(28))
            request = self._pending(cookie)
            if offset != request.offset:
                raise ProtocolError(f"offset {offset} echoed for a request at {request.offset}")
            if length > PAYLOAD_MAX + 1024:
                raise ProtocolError(f"a chunk of {length} bytes")
            chunk = Chunk("extended", flags, kind, cookie, self.recv(length), offset)
        else:
            raise ProtocolError(f"reply magic {magic:#x}")
        if chunk.kind != "simple":
            self._parse(chunk)
        if chunk.error not in KNOWN_ERRORS:
            raise ProtocolError(f"error {chunk.error} is not one of the protocol")
        return chunk

    def _pending(self, cookie):
        request = self.pending.get(cookie)
        if request is None:
            raise ProtocolError(f"a reply with cookie {cookie:#x}, which no open request has")
        return request

    def _parse(self, chunk):
        """Checks one chunk by itself and, for errors, takes it apart."""
        if chunk.flags & ~REPLY_FLAG_DONE:
            raise ProtocolError(f"reply flags {chunk.flags:#x}")
        if chunk.type & 0x8000:
            if len(chunk.payload) < 6:
                raise ProtocolError("an error chunk that is too short")
            chunk.error, length = struct.unpack_from(">LH", chunk.payload)
            rest = chunk.payload[6 + length:]
            if len(chunk.payload) < 6 + length or length > STRING_MAX:
                raise ProtocolError("an error message longer than its chunk")
            chunk.message = chunk.payload[6:6 + length].decode("utf-8")
            if chunk.error == 0:
                raise ProtocolError("an error chunk without an error")
            if chunk.type == TYPE_ERROR and rest:
                raise ProtocolError("stray bytes behind an error chunk")
            if chunk.type == TYPE_ERROR_OFFSET:
                if len(rest) != 8:
                    raise ProtocolError("an error chunk without its offset")
                (chunk.error_offset,) = struct.unpack(">Q", rest)
        elif chunk.type == TYPE_NONE:
            if chunk.payload or not chunk.flags & REPLY_FLAG_DONE:
                raise ProtocolError("a NONE chunk with payload or without DONE")

    def _add(self, chunk):
        """Adds a chunk to its request's result, checking it against those before it."""
        request = self.pending[chunk.cookie]
        result = self.partial.setdefault(chunk.cookie, Result(request))
        result.chunks.append(chunk)
        low, high = request.offset, request.offset + request.length
        if chunk.kind == "simple":
            result.error = chunk.error
            if request.type == CMD_READ and not chunk.error:
                result.data = chunk.payload
                result.content = [(low, request.length, False)]
        elif chunk.error:
            result.error = result.error or chunk.error
            if chunk.error_offset is not None and not low <= chunk.error_offset < max(high, low + 1):
                raise ProtocolError(f"error offset {chunk.error_offset} outside the request")
        elif chunk.type in (TYPE_OFFSET_DATA, TYPE_OFFSET_HOLE):
            if request.type != CMD_READ:
                raise ProtocolError(f"content in the reply to command {request.type}")
            self._content(result, chunk, low, high)
        elif chunk.type in (TYPE_BLOCK_STATUS, TYPE_BLOCK_STATUS_EXT):
            if request.type != CMD_BLOCK_STATUS:
                raise ProtocolError(f"block status in the reply to command {request.type}")
            self._status(result, chunk)
        elif chunk.type != TYPE_NONE:
            raise ProtocolError(f"chunk type {chunk.type}")
        if not chunk.flags & REPLY_FLAG_DONE:
            return None
        self._complete(result)
        result.answered_ns = time.monotonic_ns()
        del self.partial[chunk.cookie]
        del self.pending[chunk.cookie]
        return result

    @staticmethod
    def _content(result, chunk, low, high):
        if chunk.type == TYPE_OFFSET_DATA:
            if len(chunk.payload) < 9:
                raise ProtocolError("a data chunk without data")
            (offset,) = struct.unpack_from(">Q", chunk.payload)
            length, hole = len(chunk.payload) - 8, False
        else:
            if len(chunk.payload) != 12:
                raise ProtocolError("a hole chunk of the wrong length")
            offset, length = struct.unpack(">QL", chunk.payload)
            hole = True
            if length == 0:
                raise ProtocolError("a hole of no bytes")
        if offset < low or offset + length > high:
            raise ProtocolError(f"content {offset}+{length} outside the request {low}..{high}")
        for other, other_length, _ in result.content:
            if offset < other + other_length and other < offset + length:
                raise ProtocolError(f"content {offset}+{length} overlaps {other}+{other_length}")
        if result.request.flags & FLAG_DF and result.content:
            raise ProtocolError("a second content chunk although DF was set")
        for earlier in result.chunks[:-1]:
            if earlier.error_offset is not None and offset <= earlier.error_offset < offset + length:
                raise ProtocolError("content behind the error chunk that covers it")
        result.content.append((offset, length, hole))

    def _status(self, result, chunk):
        if chunk.type == TYPE_BLOCK_STATUS:
            if self.extended:
                raise ProtocolError("BLOCK_STATUS although extended headers were agreed")
            if len(chunk.payload) < 12 or (len(chunk.payload) - 4) % 8:
                raise ProtocolError(f"a block status chunk of {len(chunk.payload)} bytes")
            (context,) = struct.unpack_from(">L", chunk.payload)
            extents = list(struct.iter_unpack(">LL", chunk.payload[4:]))
        else:
            if not self.extended:
                raise ProtocolError("BLOCK_STATUS_EXT although it was not agreed")
            if len(chunk.payload) < 24 or (len(chunk.payload) - 8) % 16:
                raise ProtocolError(f"a block status chunk of {len(chunk.payload)} bytes")
            context, count = struct.unpack_from(">LL", chunk.payload)
            extents = list(struct.iter_unpack(">QQ", chunk.payload[8:]))
            if count != len(extents):
                raise ProtocolError(f"descriptor count {count}, but {len(extents)} are there")
        if context not in self.contexts:
            raise ProtocolError(f"status of context {context}, which was not selected")
        if context in result.extents:
            raise ProtocolError(f"two chunks for context {context}")
        if any(length == 0 for length, _ in extents):
            raise ProtocolError("an extent of no bytes")
        if len(extents) > 1 << 20:
            raise ProtocolError(f"{len(extents)} extents")
        wanted = result.request.effect_length
        if result.request.flags & FLAG_REQ_ONE:
            if len(extents) != 1 or extents[0][0] > wanted:
                raise ProtocolError(f"REQ_ONE of {wanted} gave {extents[:4]}")
        elif sum(length for length, _ in extents[:-1]) >= wanted > 0:
            raise ProtocolError("extents that begin behind the end of the request")
        if self.export and result.request.offset + sum(e[0] for e in extents) > self.export.size:
            raise ProtocolError("extents that end behind the end of the export")
        result.extents[context] = extents

    def _complete(self, result):
        request = result.request
        if request.type == CMD_READ:
            if not result.error:
                covered = sum(length for _, length, _ in result.content)
                if covered != request.length:
                    raise ProtocolError(f"{covered} of {request.length} bytes came")
                if result.data is None:
                    data = bytearray(request.length)
                    for chunk in result.chunks:
                        if chunk.type == TYPE_OFFSET_DATA:
                            (offset,) = struct.unpack_from(">Q", chunk.payload)
                            at = offset - request.offset
                            data[at:at + len(chunk.payload) - 8] = chunk.payload[8:]
                    result.data = bytes(data)
        elif request.type == CMD_BLOCK_STATUS and not result.error:
            # With the payload form only some contexts answer; that test counts itself.
            if not request.flags & FLAG_PAYLOAD_LEN and set(result.extents) != set(self.contexts):
                raise ProtocolError(f"status of {sorted(result.extents)}, "
                                    f"selected {sorted(self.contexts)}")

    def result(self, cookie):
        """The whole answer to one request; answers to others are kept for their own result()."""
        while cookie not in self.finished:
            done = self._add(self.recv_chunk())
            if done:
                self.finished[done.request.cookie] = done
        return self.finished.pop(cookie)

    def any_result(self):
        """The next whole answer, to whichever request."""
        if self.finished:
            return self.finished.pop(next(iter(self.finished)))
        while True:
            done = self._add(self.recv_chunk())
            if done:
                return done

    def call(self, kind, offset=0, length=None, flags=0, payload=b"", **more):
        return self.result(self.request(kind, offset, length, flags, payload, **more))

    def error_of(self, kind, offset=0, length=None, flags=0, payload=b"", **more):
        return self.call(kind, offset, length, flags, payload, **more).error

    def read(self, offset, length, flags=0):
        return self.call(CMD_READ, offset, length, flags).check().data

    def write(self, offset, data, flags=0):
        self.call(CMD_WRITE, offset, flags=flags, payload=data).check()

    def zero(self, offset, length, flags=0):
        self.call(CMD_WRITE_ZEROES, offset, length, flags).check()

    def trim(self, offset, length, flags=0):
        self.call(CMD_TRIM, offset, length, flags).check()

    def flush(self):
        self.call(CMD_FLUSH).check()

    def cache(self, offset, length):
        self.call(CMD_CACHE, offset, length).check()

    def block_status(self, offset, length, flags=0):
        """context name -> [(length, status)...]"""
        result = self.call(CMD_BLOCK_STATUS, offset, length, flags).check()
        return {self.contexts[i]: e for i, e in result.extents.items()}

    def disc(self):
        self.send(self.header(CMD_DISC, cookie=self.new_cookie()))

    def read_all(self, piece=8 << 20):
        """The whole export, several reads in flight."""
        out = bytearray(self.export.size)
        cookies = []
        for at in range(0, self.export.size, piece):
            length = min(piece, self.export.size - at)
            cookies.append((at, self.request(CMD_READ, at, length)))
            if len(cookies) >= 4:
                at, cookie = cookies.pop(0)
                data = self.result(cookie).check().data
                out[at:at + len(data)] = data
        for at, cookie in cookies:
            data = self.result(cookie).check().data
            out[at:at + len(data)] = data
        return out


def connect(server, name="", *, structured=False, extended=False, contexts=(), timeout_s=60,
            address=None):
    """A connection that has reached transmission in the style asked for."""
    client = Client(address or server, timeout_s)
    try:
        client.handshake()
        if structured:
            client.structured_reply()
        if extended:
            client.extended_headers()
        if contexts:
            client.set_meta_context(name, *contexts)
        client.go(name)
    except BaseException:
        client.close()
        raise
    return client
