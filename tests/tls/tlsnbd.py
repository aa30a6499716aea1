"""rawnbd's client over TLS, with every byte of the ciphertext in the test's hands."""

import socket
import ssl
import struct

from harness import rawnbd

FLAGS = rawnbd.FIXED_NEWSTYLE | rawnbd.NO_ZEROES


class Cut(Exception):
    """The connection was cut, by this side."""


def cut_after(limit, reset):
    """For `put`: sends so many bytes of ciphertext, and cuts the connection when there is one more to
    be sent; by RST if `reset`."""
    left = limit

    def put(sock, data):
        nonlocal left
        sock.sendall(data[:left])
        if len(data) > left:
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise Cut
        left -= len(data)
    return put


class TlsSocket:
    """A socket with TLS in between, as far as rawnbd.Client uses one. `put(sock, data)` sends
    ciphertext; the default sends it as it is."""

    def __init__(self, sock, context, put=None):
        self.sock = sock
        self.put = put or (lambda s, data: s.sendall(data))
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    def flush(self):
        data = self.outgoing.read()
        if data:
            self.put(self.sock, data)

    def step(self, call, *args):
        """What the call gives, with as much going to and fro as it needs."""
        while True:
            try:
                got = call(*args)
                self.flush()
                return got
            except ssl.SSLWantReadError:
                self.flush()
            except ssl.SSLError:
                self.flush()  # the alert that says what is wrong
                raise
            data = self.sock.recv(1 << 20)
            if data:
                self.incoming.write(data)
            else:
                self.incoming.write_eof()

    def handshake(self):
        self.step(self.tls.do_handshake)
        return self

    def sendall(self, data):
        view = memoryview(data)
        while len(view):
            view = view[self.step(self.tls.write, view[:1 << 20]):]

    def recv_into(self, view):
        try:
            return self.step(self.tls.read, len(view), view)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return 0

    def recv(self, count):
        data = bytearray(count)
        return bytes(data[:self.recv_into(memoryview(data))])

    def say_goodbye(self):
        """close_notify; the socket stays open."""
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass
        self.flush()

    def gettimeout(self):
        return self.sock.gettimeout()

    def settimeout(self, seconds):
        self.sock.settimeout(seconds)

    def close(self):
        self.sock.close()


class Client(rawnbd.Client):
    def starttls(self, context, put=None):
        self.option_ok(rawnbd.OPT_STARTTLS)
        self.structured = self.extended = False
        self.sock = TlsSocket(self.sock, context, put).handshake()
        return self

    def send(self, data):
        if isinstance(self.sock, TlsSocket):
            self.sock.sendall(data)
        else:
            super().send(data)


def connect(server, context, name="v", *, put=None, structured=True, tcp=True):
    """A connection over TLS that has reached transmission."""
    client = Client(server.addresses()[1 if tcp else 0])
    try:
        client.handshake()
        client.starttls(context, put)
        if structured:
            client.structured_reply()
        client.go(name)
    except BaseException:
        client.close()
        raise
    return client
