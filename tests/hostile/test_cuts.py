"""Disconnects at every byte of the protocol.

A session with every option and every command, in each style of replies, is cut off after each of its
bytes, those of the client and those of the server, with FIN and with RST; over TLS after some bytes of
the ciphertext. What was whole and answered is done, what was not whole is not (G3), what was whole and
not answered is done or not, and nothing stays behind in the server.

Many sessions at once, each at a place of its own on the volume. LONG=1 cuts also at each byte of a large
payload and of the ciphertext.
"""

import itertools
import os
import shutil
import socket
import struct

import pytest

import tlsnbd
from harness import http, rawnbd
from harness.fixtures import new_folder
from harness.rawnbd import (
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, FLAG_DF, FLAG_FUA, FLAG_NO_HOLE, FLAG_PAYLOAD_LEN, FLAG_REQ_ONE, IHAVEOPT,
    OPT_EXTENDED_HEADERS, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT,
    OPT_STARTTLS, OPT_STRUCTURED_REPLY, Client)
from harness.server import SLOW, wait_until
from pki import context
from siege import FLAGS, LONG, MEASURES_MEMORY, descriptors, option, status_kib

CACHE_MIB = 32
LANES = 64
STRIDE = 4096
LARGE_LANES = 16
LARGE_STRIDE = 512 << 10
STYLES = ("simple", "structured", "extended")
# What a session writes, from where it is on the volume; a large payload comes behind them.
PLACES = ((0, 48), (500, 30), (1000, 48), (2000, 48))
LARGE_AT = 4096

pytestmark = pytest.mark.limit(240 if not LONG else 3600)


class Session:
    """The messages of one, for the volume `name`, whose places begin at `base`; changes[n](content) is
    what message n does to the volume once it is there whole."""

    def __init__(self, style, name="v", base=0):
        self.base = base
        self.style = style
        self.cookies = itertools.count(1)
        self.messages = []
        self.changes = []
        contexts = Client.meta_data(name, ["base:allocation"])
        self.add(FLAGS)
        self.add(option(99, b"an unknown one"))
        self.add(option(OPT_STARTTLS))
        self.add(option(OPT_LIST))
        if style != "simple":
            self.add(option(OPT_STRUCTURED_REPLY))
        if style == "extended":
            self.add(option(OPT_EXTENDED_HEADERS))
        if style != "simple":
            self.add(option(OPT_LIST_META_CONTEXT, Client.meta_data(name, [])))
            self.add(option(OPT_SET_META_CONTEXT, contexts))
        self.add(option(OPT_INFO, Client.go_data(name, [0, 1, 2, 3])))
        self.add(option(OPT_INFO, Client.go_data("not there")))
        self.add(option(OPT_GO, Client.go_data(name, [3])))

    def add(self, data, change=None):
        self.messages.append(data)
        self.changes.append(change)

    def request(self, kind, offset=0, length=0, flags=0, payload=b"", change=None):
        cookie = next(self.cookies)
        if self.style == "extended":
            if kind == CMD_WRITE:
                flags |= FLAG_PAYLOAD_LEN
            head = struct.pack(">LHHQQQ", rawnbd.EXT_REQUEST_MAGIC, flags, kind, cookie, offset,
                               length or len(payload))
        else:
            head = struct.pack(">LHHQQL", rawnbd.REQUEST_MAGIC, flags, kind, cookie, offset,
                               length or len(payload))
        self.add(head + payload, change)

    def write(self, offset, data, flags=0):
        offset += self.base

        def change(content):
            content[offset:offset + len(data)] = data
        self.request(CMD_WRITE, offset, 0, flags, data, change)

    def clear(self, kind, offset, length, flags=0):
        offset += self.base

        def change(content):
            content[offset:offset + length] = bytes(length)
        self.request(kind, offset, length, flags, b"", change)

    def requests(self, value, large=b""):
        """Every command. What is written is of `value`, so that it can be told from what other
        sessions wrote."""
        mark, base = struct.pack(">Q", value) * 6, self.base
        self.write(0, mark)
        self.write(500, mark[:30], FLAG_FUA)
        self.request(CMD_READ, base, 60)
        if self.style != "simple":
            self.request(CMD_READ, base + 490, 60, FLAG_DF)
            self.request(CMD_BLOCK_STATUS, base, 4096)
            self.request(CMD_BLOCK_STATUS, base, 4096, FLAG_REQ_ONE)
        if self.style == "extended":
            self.request(CMD_BLOCK_STATUS, base, 0, FLAG_PAYLOAD_LEN, struct.pack(">Q", 4096))
        self.request(CMD_CACHE, base, 4096)
        self.request(CMD_FLUSH)
        self.write(1000, mark)
        self.clear(CMD_WRITE_ZEROES, 1010, 5)
        self.clear(CMD_WRITE_ZEROES, 1030, 8, FLAG_NO_HOLE)
        self.write(2000, mark)
        self.clear(CMD_TRIM, 2010, 30)
        self.request(77, base, 10)
        self.request(CMD_READ, 1 << 40, 10)
        if large:
            self.write(LARGE_AT, large)
            self.write(LARGE_AT + 100, mark[:40])
        return self

    def ends(self):
        """Where each message ends in the whole."""
        return list(itertools.accumulate(len(m) for m in self.messages))

    def bytes(self):
        return b"".join(self.messages)

    def measure(self, address):
        """How many bytes the server has sent when it has answered each message."""
        got, total = [], 0
        with connect(address) as s:
            total += len(receive(s, 18))
            for message in self.messages:
                s.sendall(message)
                total += self.answer(s, message)
                got.append(total)
        return got

    def answer(self, s, message):
        """Reads all replies to one message: their length."""
        if message == FLAGS:
            return 0
        total = 0
        if message[:8] == struct.pack(">Q", IHAVEOPT):
            while True:
                head = receive(s, 20)
                kind, length = struct.unpack(">LL", head[12:])
                total += 20 + len(receive(s, length))
                if kind == rawnbd.REP_ACK or kind & rawnbd.REP_ERR:
                    return total
        kind = struct.unpack(">H", message[6:8])[0]
        length = int.from_bytes(message[24:32 if self.style == "extended" else 28], "big")
        while True:
            magic = receive(s, 4)
            total += 4
            if magic == struct.pack(">L", rawnbd.SIMPLE_REPLY_MAGIC):
                error = struct.unpack(">L", receive(s, 12)[:4])[0]
                return total + 12 + (len(receive(s, length)) if kind == CMD_READ and not error else 0)
            extended = magic == struct.pack(">L", rawnbd.EXT_REPLY_MAGIC)
            head = receive(s, 28 if extended else 16)
            size = int.from_bytes(head[20:28] if extended else head[12:16], "big")
            total += len(head) + len(receive(s, size))
            if struct.unpack(">H", head[:2])[0] & rawnbd.REPLY_FLAG_DONE:
                return total


def connect(address):
    s = socket.create_connection(address, timeout=60)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s


def receive(s, count):
    out = bytearray()
    while len(out) < count:
        more = s.recv(count - len(out))
        assert more, f"the server ended it after {len(out)} of {count} bytes"
        out += more
    return out


def end(s, reset):
    if reset:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


class Rounds:
    """Sessions on one volume that are cut off, a round of them at a time, each in a lane of its own."""

    def __init__(self, server, name, lanes, stride):
        self.server, self.name, self.lanes, self.stride = server, name, lanes, stride
        self.address = (server.host, server.port)
        self.size = lanes * stride
        self.client = rawnbd.connect(server, name)
        # All of it is there from the beginning, so that answers are as long each time.
        self.content = bytearray(b"\xee" * self.size)
        self.client.write(0, bytes(self.content))
        self.client.flush()
        self.sockets = descriptors(server.pid)[0]
        self.values = itertools.count(int.from_bytes(os.urandom(4), "big") << 20)
        self.places = PLACES
        self.round = []
        self.n = 0

    def session(self, style, lane=0, large=b""):
        made = Session(style, self.name, lane * self.stride).requests(next(self.values), large)
        if large:
            self.places = (*PLACES, (LARGE_AT, len(large)))
        return made

    def measure(self, style):
        """A whole session, of small requests: where its messages end, and Session.measure() of it."""
        self.check()
        session = self.session(style)
        got = session.measure(self.address)
        for change in session.changes:
            if change:
                change(self.content)
        return session.ends(), got

    def cut(self, style, sent, taken, reset, whole, answered, large=b""):
        """A session of which `sent` bytes are sent (None: all), `taken` bytes of answers are read; so
        many of its messages are whole then, and answered."""
        session = self.session(style, len(self.round), large)
        s = connect(self.address)
        s.sendall(session.bytes()[:sent])
        self.add(session, whole, answered, s, taken, reset)

    def add(self, session, whole, answered, s=None, taken=0, reset=False):
        self.round.append((session, whole, answered, s, taken, reset))
        self.n += 1
        if len(self.round) == self.lanes:
            self.check()

    def check(self):
        """Ends the sessions of this round. Each place holds what the last answered change left there,
        or a later one of those that were sent whole; never a mixture."""
        for _, _, _, s, taken, reset in self.round:
            if s:
                receive(s, taken)
                end(s, reset)
        wait_until(lambda: descriptors(self.server.pid)[0] <= self.sockets, 20 * SLOW,
                   "all sockets are closed", pause_s=0.002)
        found = self.client.read(0, self.size)
        for session, whole, answered, *_ in self.round:
            for at, length in self.places:
                self._check_place(session, whole, answered, session.base + at, length, found)
        self.round.clear()
        assert found == self.content

    def _check_place(self, session, whole, answered, at, length, found):
        may = [self.content[at:at + length]]
        scratch = bytearray(self.content[session.base:session.base + self.stride])
        # The changes speak of the whole volume.
        view = Shifted(scratch, session.base)
        for n, change in enumerate(session.changes[:whole]):
            if not change:
                continue
            change(view)
            now = scratch[at - session.base:at - session.base + length]
            if now != may[-1]:
                may = [now] if n < answered else [*may, now]
        data = found[at:at + length]
        assert data in may, f"at {at}: {data.hex()}"
        self.content[at:at + length] = data


class Shifted:
    """A part of a volume, under the offsets it has there."""

    def __init__(self, data, base):
        self.data, self.base = data, base

    def __setitem__(self, where, value):
        self.data[where.start - self.base:where.stop - self.base] = value


@pytest.fixture(scope="module")
def memory_folder():
    """Every session flushes, and there are thousands: in memory, where that takes no time."""
    path = new_folder("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def server(module_servers, memory_folder):
    return module_servers.start({"v": LANES * STRIDE, "large": LARGE_LANES * LARGE_STRIDE},
                                ["--cache-size", f"{CACHE_MIB}M"], unix=False,
                                store=memory_folder / "plain")


@pytest.fixture
def rounds(server):
    """rounds(name, lanes, stride); nothing of what goes on there is left when it is over."""
    made, before_kib = [], status_kib(server.pid, "RssAnon")

    def begin(name="v", lanes=LANES, stride=STRIDE):
        made.append(Rounds(server, name, lanes, stride))
        return made[-1]

    yield begin
    (r,) = made
    r.check()
    clients = http.get_json(http.control(server.pid), "/v1/clients")["clients"]
    assert len(clients) == 1 and clients[0]["in_flight"] == 0, clients
    after_kib = status_kib(server.pid, "RssAnon")
    print(f"\n{r.n} cuts; anonymous memory {before_kib} KiB before, {after_kib} KiB after")
    if MEASURES_MEMORY:
        assert after_kib - before_kib < (CACHE_MIB + 16) << 10
    r.client.close()


def count(ends, at):
    return sum(e <= at for e in ends)


@pytest.mark.parametrize("style", STYLES)
def test_after_each_byte_of_the_client(rounds, style):
    """What is whole is answered before the client goes."""
    r = rounds()
    ends, got = r.measure(style)
    for k, reset in itertools.product(range(ends[-1] + 1), (False, True)):
        whole = count(ends, k)
        r.cut(style, k, got[whole - 1] if whole else 18, reset, whole, whole)


@pytest.mark.parametrize("style", STYLES)
def test_after_each_byte_without_waiting(rounds, style):
    """The client goes at once; what it sent is on its way, or lies in the server's buffers."""
    r = rounds()
    ends, _ = r.measure(style)
    for k, reset in itertools.product(range(ends[-1] + 1), (False, True)):
        r.cut(style, k, 0, reset, count(ends, k), 0)


@pytest.mark.parametrize("style", STYLES)
def test_after_each_byte_of_the_server(rounds, style):
    """The client sends all, takes so many bytes of the answers, and goes."""
    r = rounds()
    ends, got = r.measure(style)
    for j, reset in itertools.product(range(got[-1] + 1), (False, True)):
        r.cut(style, None, j, reset, len(ends), count(got, j))


def test_inside_a_large_payload(rounds, rng):
    """One that the server takes into blocks of its cache while it comes."""
    large = rng.randbytes(70_000)
    r = rounds("large", LARGE_LANES, LARGE_STRIDE)
    for style in STYLES:
        ends, got = r.measure(style)
        first, last = ends[-1] + 1, ends[-1] + 24 + len(large)
        cuts = range(first, last) if LONG else sorted(rng.sample(range(first, last), 40)) + [last]
        for k, reset in itertools.product(cuts, (False, True)):
            r.cut(style, k, got[-1], reset, len(ends), len(ends), large)
    assert r.n > 200


def test_over_tls(servers, memory_folder, pki, rng):
    """After bytes of the client's ciphertext, during the handshake and behind it."""
    server = servers.start({"v": LANES * STRIDE},
                           ["--cache-size", f"{CACHE_MIB}M", "--tls", "on", "--tls-verify-peer",
                            "--tls-certificates", pki.server], unix=False,
                           store=memory_folder / "tls")
    alice, r = context(pki.alice), Rounds(server, "v", LANES, STRIDE)
    before_kib = status_kib(server.pid, "RssAnon")

    k, reached = 0, False
    while not reached:
        for reset in (False, True):
            session = r.session(STYLES[r.n % 3], len(r.round))
            whole = answered = 0
            client = tlsnbd.Client(r.address)
            try:
                client.handshake()
                client.starttls(alice, tlsnbd.cut_after(k, reset))
                for message in session.messages[1:]:  # the flags went in plain text
                    client.send(message)
                    whole += 1
                    session.answer(client.sock, message)
                    answered += 1
                reached = True
            except tlsnbd.Cut:
                pass
            client.close()
            r.add(session, whole + 1, answered + 1)
        k += 1 if LONG else rng.randrange(1, 160)
    r.check()
    print(f"\n{r.n} cuts over TLS, up to byte {k}; anonymous memory {before_kib} KiB before, "
          f"{status_kib(server.pid, 'RssAnon')} KiB after")
    r.client.close()
