"""STARTTLS and what is before and behind it (checklist A8, A9, A12)."""

import os
import select
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest

import tlsnbd
from harness import rawnbd
from harness.rawnbd import (
    OPT_ABORT, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_INFO, OPT_LIST,
    OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STARTTLS, OPT_STRUCTURED_REPLY, REP_ACK,
    REP_ERR_INVALID, REP_ERR_TLS_REQD, REP_ERR_UNSUP, SEND_DF)
from harness.server import SLOW, wait_until
from pki import context

MIB = 1 << 20


@pytest.fixture(scope="module")
def certificates(pki):
    return ["--tls-certificates", pki.server, "--tls-verify-peer"]


@pytest.fixture(scope="module")
def choosing(module_servers, certificates):
    """A server where clients may use TLS."""
    return module_servers.start({"v": "64M"}, ["--tls", "on", *certificates])


@pytest.fixture(scope="module")
def strict(module_servers, certificates):
    """One where they have to."""
    return module_servers.start({"v": "64M"}, ["--tls", "require", *certificates])


@pytest.fixture(scope="module")
def alice(pki):
    return context(pki.alice)


@pytest.fixture
def fresh():
    """fresh(server): a connection whose flags are exchanged."""
    made = []

    def connect(server, tcp=True):
        client = tlsnbd.Client(server.addresses()[1 if tcp else 0])
        made.append(client)
        client.handshake()
        return client

    yield connect
    for client in made:
        client.close()


def logs_meanwhile(server, text):
    """A call that waits until the server has logged it, counting from now."""
    before = len(server.log())
    return lambda: wait_until(lambda: text in server.log()[before:], 20 * SLOW, f"log: {text}")


def works(client):
    data = os.urandom(70000)
    client.write(4096, data)
    assert client.read(4096, len(data)) == data
    client.disc()


# -- A9: who has to ---------------------------------------------------------------------------


def test_A9_plain_and_tls_side_by_side(choosing, fresh, alice):
    plain = fresh(choosing)
    plain.go("v")
    secret = tlsnbd.connect(choosing, alice)
    plain.write(0, b"plain")
    assert secret.read(0, 5) == b"plain"
    works(secret)
    works(plain)


@pytest.mark.parametrize("option", [OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY,
                                    OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT,
                                    OPT_EXTENDED_HEADERS, 4711])
def test_A9_everything_else_needs_tls(strict, fresh, option):
    told = logs_meanwhile(strict, "came without TLS, which this server requires")
    client = fresh(strict)
    for data in (b"", client.go_data("v")):
        replies, kind, text = client.option(option, data)
        assert (replies, kind) == ([], REP_ERR_TLS_REQD) and b"requires TLS" in text
    told()
    assert client.option(OPT_ABORT)[1] == REP_ACK
    client.expect_closed()


def test_A9_export_name_without_tls_closes(strict, fresh):
    told = logs_meanwhile(strict, "came without TLS, which this server requires")
    client = fresh(strict)
    client.send_option(OPT_EXPORT_NAME, b"v")
    client.expect_closed()
    told()


def test_A9_never_required_once_there(strict, fresh, alice):
    client = fresh(strict).starttls(alice)
    assert client.option(4711)[1] == REP_ERR_UNSUP
    assert [name for name, _ in client.list()] == ["v"]
    client.export_name("v")
    works(client)


# -- A8: what counts afterwards ---------------------------------------------------------------


def test_A8_all_that_was_agreed_is_forgotten(choosing, fresh, alice):
    client = fresh(choosing)
    client.structured_reply()
    assert client.set_meta_context("v", "base:allocation")
    client.starttls(alice)
    # Contexts need structured replies, which are not agreed any more.
    assert client.option(OPT_SET_META_CONTEXT, client.meta_data("v", ["base:allocation"]))[1] == \
        REP_ERR_INVALID
    client.contexts = {}
    export = client.go("v")
    assert not export.flags & SEND_DF
    works(client)  # simple replies, or rawnbd would complain


def test_A8_extended_headers_are_forgotten(choosing, fresh, alice):
    client = fresh(choosing)
    client.extended_headers()
    client.starttls(alice)
    client.structured_reply()  # with extended headers it would be refused
    client.go("v")
    works(client)


def test_A8_twice(choosing, fresh, alice):
    client = fresh(choosing)
    assert client.option(OPT_STARTTLS, b"data")[1] == REP_ERR_INVALID
    client.starttls(alice)
    for _ in range(3):
        assert client.option(OPT_STARTTLS)[1] == REP_ERR_INVALID
    client.go("v")
    works(client)


@pytest.mark.parametrize("option", [OPT_STRUCTURED_REPLY, OPT_LIST, OPT_ABORT])
def test_A8_data_behind_starttls_in_one_segment(choosing, fresh, option):
    told = logs_meanwhile(choosing, "closed: it sent data behind STARTTLS")
    client = fresh(choosing)
    client.send(struct.pack(">QLL", rawnbd.IHAVEOPT, OPT_STARTTLS, 0) +
                struct.pack(">QLL", rawnbd.IHAVEOPT, option, 0))
    kind, text = client.recv_option_reply(OPT_STARTTLS)
    assert kind == REP_ERR_INVALID and b"behind STARTTLS" in text
    client.expect_closed()
    told()


def test_A8_data_behind_starttls_in_another_segment(choosing, fresh, alice):
    """Whoever sits between puts an option in front of the client's first TLS message."""
    told = logs_meanwhile(choosing, "what came after STARTTLS is not TLS")
    client = fresh(choosing)
    client.option_ok(OPT_STARTTLS)
    client.send_option(OPT_STRUCTURED_REPLY)
    with pytest.raises((ssl.SSLError, OSError)):
        tlsnbd.TlsSocket(client.sock, alice).handshake()
    told()
    client.expect_closed()


# -- A12: what a client may come with ----------------------------------------------------------


def test_garbage_instead_of_a_session(choosing, fresh, alice, rng):
    for n in (1, 5, 6, 100, 5000, 200000):
        told = logs_meanwhile(choosing, "refused at its TLS handshake")
        client = fresh(choosing)
        client.option_ok(OPT_STARTTLS)
        try:
            client.send(rng.randbytes(n))
            client.sock.shutdown(socket.SHUT_WR)
            while client.sock.recv(4096):
                pass  # an alert
        except OSError:
            pass
        told()
    works(tlsnbd.connect(choosing, alice))


def test_a_long_first_message_is_refused(choosing, fresh):
    """A handshake message that claims 16 MiB is not waited for, nor kept."""
    client = fresh(choosing)
    client.option_ok(OPT_STARTTLS)
    told = logs_meanwhile(choosing, "longer than any handshake has to be")
    record = b"\x16\x03\x01" + struct.pack(">H", 16000) + b"\x01\xff\xff\xff\x03\x03" + bytes(15994)
    try:
        for _ in range(20):
            client.send(record)
    except OSError:
        pass
    told()


def test_one_byte_at_a_time(strict, alice):
    def trickle(sock, data):
        for i in range(len(data)):
            sock.sendall(data[i:i + 1])

    for tcp in (True, False):
        client = tlsnbd.connect(strict, alice, put=trickle, tcp=tcp)
        client.write(100, b"x" * 2000)
        assert client.read(99, 2002) == client.read(99, 1) + b"x" * 2000 + client.read(2100, 1)
        client.disc()


def sockets(server):
    """How many the server has, connections among them."""
    folder = f"/proc/{server.pid}/fd"
    n = 0
    for fd in os.listdir(folder):
        try:
            n += os.readlink(f"{folder}/{fd}").startswith("socket:")
        except FileNotFoundError:
            pass  # closed meanwhile
    return n


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_cut_off_anywhere(servers, certificates, alice, reset):
    """After each number of bytes, during the handshake and behind it; nothing stays behind."""
    # Its own: it uses up what the server may say about failed handshakes for a while.
    strict = servers.start({"v": "64M"}, ["--tls", "require", *certificates])
    before = sockets(strict)

    limit = 0
    while True:
        client = tlsnbd.Client(strict.addresses()[1])
        try:
            client.handshake()
            client.starttls(alice, tlsnbd.cut_after(limit, reset))
            client.go("v")
            client.write(0, bytes(3000))
            client.read(0, 3000)
            break
        except tlsnbd.Cut:
            pass
        finally:
            client.close()
        limit += 37
    assert limit > 4000  # it went on into the transmission
    wait_until(lambda: sockets(strict) <= before, 20 * SLOW, "all connections are closed")
    works(tlsnbd.connect(strict, alice))


def test_half_a_write_is_none(strict, alice):
    """An end without close_notify, in the middle of a request (G3)."""
    client = tlsnbd.connect(strict, alice)
    client.write(0, b"a" * MIB)
    head = client.header(rawnbd.CMD_WRITE, 0, MIB, cookie=7)
    client.send(head + b"b" * (MIB - 1))
    client.close()
    other = tlsnbd.connect(strict, alice)
    assert other.read(0, MIB) == b"a" * MIB
    other.disc()


def test_close_notify_ends_it(strict, alice):
    """The client says that it is done and leaves its socket open."""
    client = tlsnbd.connect(strict, alice)
    works_first = client.read(0, 10)
    assert len(works_first) == 10
    client.sock.say_goodbye()
    raw = client.sock.sock
    raw.settimeout(20 * SLOW)
    while raw.recv(4096):
        pass
    client.close()


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
def test_what_a_client_sent_before_it_left_is_done(strict, alice, rng, tcp):
    """Writes, DISC, close_notify and the end, all at once, without waiting for an answer."""
    other = tlsnbd.connect(strict, alice, tcp=tcp)
    other.write(0, b"the volume is this server's from here on")
    for _ in range(10):
        # (Of more than a receive buffer the server does not look for the end.)
        data = rng.randbytes(40960)
        client = tlsnbd.connect(strict, alice, tcp=tcp)
        for at in range(0, len(data), 4096):
            client.request(rawnbd.CMD_WRITE, at, payload=data[at:at + 4096])
        try:
            client.disc()
            client.sock.say_goodbye()
            client.sock.sock.shutdown(socket.SHUT_WR)
            while client.sock.sock.recv(1 << 16):
                pass
        except OSError:
            pass  # the server need not wait for what comes behind DISC
        client.close()
        wait_until(lambda: other.read(0, len(data)) == data, 20 * SLOW, "all writes are done")
    other.disc()


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_large_requests(strict, alice, rng, structured):
    data = rng.randbytes(32 * MIB)
    client = tlsnbd.connect(strict, alice, structured=structured)
    client.write(1234567, data)
    assert client.read(1234567, len(data)) == data
    client.disc()


def test_replies_nobody_reads(strict, alice, rng):
    """A client that takes no replies holds up itself alone, and gets all of them later."""
    data = rng.randbytes(32 * MIB)
    idle = tlsnbd.connect(strict, alice)
    idle.write(0, data)
    asked = [(at, idle.request(rawnbd.CMD_READ, at, MIB))
             for at in (i * MIB for i in rng.choices(range(31), k=60))]
    other = tlsnbd.connect(strict, alice, tcp=False)
    for _ in range(50):
        assert other.read(4096, 4096) == data[4096:8192]
    other.disc()
    for at, cookie in asked:
        assert idle.result(cookie).check().data == data[at:at + MIB]
    idle.disc()


def test_small_requests_in_any_pieces(strict, alice, rng):
    """Many requests at once, and their ciphertext in pieces of any size."""
    def crumble(sock, data):
        while data:
            n = rng.choice((1, 5, 6, 29, 1000, 16384, 100000))
            sock.sendall(data[:n])
            data = data[n:]

    client = tlsnbd.connect(strict, alice, put=crumble)
    known = bytearray(rng.randbytes(MIB))
    client.write(0, known)
    for _ in range(20):
        asked = []
        out = b""
        for _ in range(rng.randrange(1, 60)):
            at, n = rng.randrange(MIB - 9000), rng.choice((1, 512, 4096, 9000))
            if rng.random() < 0.5:
                known[at:at + n] = rng.randbytes(n)
                cookie = client.request(rawnbd.CMD_WRITE, at, payload=bytes(known[at:at + n]))
                asked.append((cookie, None))
            else:
                asked.append((client.request(rawnbd.CMD_READ, at, n), bytes(known[at:at + n])))
        for cookie, expected in asked:
            result = client.result(cookie).check()
            assert expected is None or result.data == expected
    client.disc()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_versions(strict, pki, version):
    wanted = getattr(ssl.TLSVersion, version)
    client = tlsnbd.connect(strict, context(pki.alice, maximum_version=wanted,
                                            minimum_version=wanted))
    works(client)
    said = [line for line in strict.log().splitlines() if "entered export" in line][-1]
    assert "certificate CN=alice" in said
    assert said.endswith(f"over {version.replace('v1_', '1.')} (AES-256-GCM)")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_are_refused(strict, fresh, pki):
    told = logs_meanwhile(strict, "refused at its TLS handshake")
    old = context(pki.alice)
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, rawnbd.Closed, OSError)):
        fresh(strict).starttls(old)
    told()


@pytest.mark.limit(60)
def test_A12_stalled_handshakes_hold_up_nobody(choosing, fresh, alice):
    """Silent before STARTTLS, behind it, and in the middle of the client's first message: others
    are served meanwhile, and all of these are closed when their time is over."""
    began = time.monotonic()
    silent = [fresh(choosing) for _ in range(12)]
    for client in silent[4:]:
        client.option_ok(OPT_STARTTLS)
    for client in silent[8:]:
        hello = ssl.MemoryBIO()
        try:
            alice.wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
        except ssl.SSLWantReadError:
            pass
        client.send(hello.read()[:100])
    for _ in range(20):
        works(tlsnbd.connect(choosing, alice))
    assert time.monotonic() - began < 5 * SLOW
    for client in silent:
        client.expect_closed(limit_s=15 * SLOW)
    assert time.monotonic() - began >= 9
    assert choosing.log().count("its TLS handshake did not come to an end within 10000 ms") == 8


# -- what clients may do later in a session ------------------------------------------------------


class Relay:
    """Does the part before TLS and passes the rest on, so that `openssl s_client` can connect.
    With `gather`, what the client sends goes on in pieces of at least so many bytes."""

    gather = 0

    def __init__(self, server):
        self.nbd = tlsnbd.Client(server.addresses()[1])
        self.nbd.handshake()
        self.nbd.option_ok(OPT_STARTTLS)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        client, _ = self.listener.accept()
        pair = {client: self.nbd.sock, self.nbd.sock: client}
        held = b""
        while True:
            for sock in select.select(list(pair), [], [])[0]:
                try:
                    data = sock.recv(1 << 16)
                    if sock is client and data:
                        held += data
                        if len(held) < self.gather:
                            continue
                        self.nbd.sock.sendall(held)
                        held = b""
                    else:
                        pair[sock].sendall(data)
                except OSError:
                    data = b""
                if not data:
                    client.close()
                    self.nbd.close()
                    return


def read_until(stream, text):
    said = b""
    while text not in said:
        piece = os.read(stream.fileno(), 4096)
        assert piece, said
        said += piece


@pytest.mark.limit(30)
@pytest.mark.parametrize("version, command, answer, served", [
    ("-tls1_3", b"K", b"KEYUPDATE", True),   # both sides take new keys
    ("-tls1_3", b"k", b"KEYUPDATE", True),   # the client alone
    ("-tls1_2", b"R", b"RENEGOTIATING", False),  # another handshake is refused
])
def test_new_keys_and_another_handshake(choosing, pki, alice, version, command, answer, served):
    relay = Relay(choosing)
    s_client = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{relay.port}", version, "-quiet",
         "-no_ign_eof", "-cert", pki.alice / "client-cert.pem", "-key",
         pki.alice / "client-key.pem"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    try:
        lone = struct.pack(">QLL", rawnbd.IHAVEOPT, 4711, 0)
        expected = struct.pack(">QLLL", rawnbd.OPT_REPLY_MAGIC, 4711, REP_ERR_UNSUP, 14)
        for _ in range(3):
            s_client.stdin.write(lone)
            reply = b""
            while len(reply) < 34:
                piece = os.read(s_client.stdout.fileno(), 34 - len(reply))
                if not piece:
                    break
                reply += piece
            if not served and not reply:
                break
            assert reply == expected + b"unknown option"
            if served:
                relay.gather = 27 + 38  # the new keys and the next option come together
            s_client.stdin.write(command + b"\n")
            read_until(s_client.stderr, answer)
    except BrokenPipeError:
        assert not served
    finally:
        s_client.kill()
        s_client.communicate()
        relay.thread.join(20 * SLOW)
    works(tlsnbd.connect(choosing, alice))
