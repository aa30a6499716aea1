"""G8 behind TLS, after a server stood still: what a client had sent by then may be sent elsewhere and
be overtaken there, so the server does not take it any more. Of a record that is there in part, a
look at the plain text sees nothing.
"""

import os
import signal
import socket
import time

import pytest

import tlsnbd
from harness import rawnbd
from harness.server import SLOW, wait_until
from pki import context

# Longer than connection.h's pause_close_ms.
STOOD_S = 11


def held_back(client, offset, data):
    """Begins a write: sends all of its ciphertext but the last byte, which this gives."""
    kept = []
    put, client.sock.put = client.sock.put, lambda sock, cipher: kept.append(cipher)
    client.send(client.header(rawnbd.CMD_WRITE, offset, len(data), cookie=1) + data)
    client.sock.put = put
    cipher = b"".join(kept)
    client.sock.sock.sendall(cipher[:-1])
    return cipher[-1:]


def unread(server_port, client):
    """What lies on the server's side of the connection, as the kernel counts it."""
    local = client.sock.sock.getsockname()[1]
    with open("/proc/net/tcp", encoding="ascii") as table:
        for line in table:
            words = line.split()
            if words[1].endswith(f":{server_port:04X}") and words[2].endswith(f":{local:04X}"):
                return int(words[4].split(":")[1], 16)
    raise AssertionError("no such connection")


def is_over(client, limit_s):
    client.sock.sock.settimeout(limit_s)
    try:
        while client.sock.sock.recv(1 << 16):
            pass
    except (TimeoutError, socket.timeout):
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.limit(90)
def test_G8_part_of_a_record_is_old_after_a_standstill(servers, pki):
    server = servers.start({"v": "8M"}, ["--tls", "require", "--tls-certificates", pki.server,
                                         "--tls-verify-peer"])
    alice = context(pki.alice)
    taken, lying, idle, used = (tlsnbd.connect(server, alice) for _ in range(4))
    used.write(0, b"old" * 1000)

    # One record has gone into the session already, and the socket has nothing more ...
    last_taken = held_back(taken, 0, b"ghost" * 1000)
    wait_until(lambda: unread(server.port, taken) == 0, 20 * SLOW, "the part is taken in")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        # ... the other one lies there when the server wakes up.
        last_lying = held_back(lying, 4096, b"ghost" * 100)
        time.sleep(STOOD_S)
    finally:
        os.kill(server.pid, signal.SIGCONT)

    for client, last in ((taken, last_taken), (lying, last_lying)):
        try:
            client.sock.sock.sendall(last)
        except OSError:
            pass
        assert is_over(client, 20 * SLOW), "it is served as if nothing had happened"
    assert server.log().count("this server stood still") == 2
    # Nothing of those two was done, and those of whom nothing lay there go on.
    assert used.read(0, 3000) == b"old" * 1000
    assert idle.read(4096, 500) == bytes(500)
    assert idle.read(0, 5000) == b"old" * 1000 + bytes(2000)
