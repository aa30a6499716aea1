"""Attackers of the HTTP listener and of the control socket, beside which NBD is served."""

import pytest

from harness import http, rawnbd
from harness.server import SLOW, free_port, wait_until
from siege import FLAGS, MIB, SECONDS, option

CACHE_MIB = 64
# HTTP: 64 connections of 16 KiB on each socket, and 64 MiB of answers that wait.
BUDGET_KIB = (CACHE_MIB + 64 + 64) * 1024 + 1024 * 64
HEAD = b"GET /v1/clients HTTP/1.1\r\nHost: localhost\r\n"
ASK = HEAD + b"\r\n"

pytestmark = pytest.mark.limit(90)


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def server(module_servers, port):
    return module_servers.start({"v": "64M"}, ["--cache-size", f"{CACHE_MIB}M",
                                               "--http", f"127.0.0.1:{port}"])


@pytest.fixture(params=["listener", "control socket"])
def place(request, server, port):
    """Where to attack, and the other one, which has to go on."""
    places = (("127.0.0.1", port), http.control(server.pid))
    return places if request.param == "listener" else places[::-1]


@pytest.fixture
def begin(server, siege, place):
    """A siege of the first place; `other` is the second. Afterwards the first one answers again."""
    attacked, other = place
    s = siege(server, budget_kib=BUDGET_KIB)
    s.to = ":".join(map(str, attacked)) if isinstance(attacked, tuple) else attacked
    s.other = other
    yield s

    def answers():
        try:
            return http.request(attacked, "/healthz", timeout_s=5 * SLOW)[0] == 200
        except OSError:
            return False

    wait_until(answers, 40 * SLOW, "HTTP answers again", 0.1)


def test_silence_and_halves(begin):
    s = begin
    s.attack(300, "hold", to=s.to)
    s.attack(300, HEAD[:20], "hold", to=s.to)
    s.attack(300, HEAD, "hold", to=s.to)
    assert http.get(s.other, "/healthz") == "ok\n"
    s.stand()
    assert s.fds_most < sum(s.fds) + 300


def test_heads_and_bodies_without_end(begin):
    s = begin
    s.attack(40, HEAD, ("flood", b"X-More: " + b"y" * 4000 + b"\r\n"), to=s.to)
    s.attack(40, b"GET /", ("flood", b"a" * MIB), to=s.to)
    s.attack(40, b"POST /v1/drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
             ("flood", b"b" * MIB), to=s.to)
    assert http.get(s.other, "/healthz") == "ok\n"
    s.stand()


def test_a_byte_at_a_time(begin):
    s = begin
    s.attack(64, ("bytes", HEAD + b"X: " + b"y" * 8000), "hold", to=s.to)
    s.stand()


def test_answers_that_nobody_reads(begin):
    s = begin
    s.attack(64, ("flood", ASK * 100), to=s.to)
    s.stand()


def test_questions_about_many_clients(begin):
    """Nine hundred of them, asked for in a loop: they are copied between two turns of the reactor that
    serves the honest one."""
    s = begin
    s.attack(900, FLAGS + option(rawnbd.OPT_GO, rawnbd.Client.go_data("v")), "hold",
             seconds=SECONDS + 2, least=901)
    s.wait_for_sockets(900)
    s.attack(16, ASK, "got:100", "close", least=30, to=s.to)
    s.enough(s.attackers[0])
    _, did = s.stand()
    assert did["made"] > 16
