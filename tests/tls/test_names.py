"""What clients proved over TLS, as the access file sees it (docs/access.md)."""

import os
import signal

import nbd
import pytest

from harness import rawnbd
from harness.rawnbd import CMD_WRITE, EPERM, READ_ONLY
from harness.server import SLOW, wait_until
from pki import context
from tlsnbd import Client, connect

VOLUMES = {"mine": "1M", "both": "1M", "keyed": "1M", "open": "1M"}
RULES = """\
cn:alice rw mine both
dn:"CN=bob,O=fdb-nbd" ro both
psk:alice rw keyed
cn:* ro open
"""


def start(servers, pki, rules, *args, mode="on", verify=True, **more):
    path = servers.folder / f"rules-{len(servers.made)}"
    path.write_text(rules)
    proof = ["--tls", mode, "--tls-certificates", pki.server, "--tls-psk", pki.psk]
    server = servers.start(
        VOLUMES,
        [*proof, *(["--tls-verify-peer"] if verify else []), "--access", path, *args], **more)
    server.rules = path
    return server


@pytest.fixture(scope="module")
def server(pki, module_servers):
    return start(module_servers, pki, RULES)


def listed(server, *, certificates=None, psk=None, tls=nbd.TLS_REQUIRE):
    client, names = nbd.NBD(), []
    client.set_opt_mode(True)
    client.set_tls(tls)
    client.set_tls_verify_peer(True)
    if certificates:
        client.set_tls_certificates(str(certificates))
    if psk:
        client.set_tls_psk_file(str(psk))
        client.set_tls_username("alice")
    client.connect_tcp("localhost", str(server.port))
    client.opt_list(lambda name, description: names.append(name))
    client.opt_abort()
    return names


def test_each_sees_what_its_name_is_granted(server, pki):
    assert listed(server, certificates=pki.alice) == ["both", "mine", "open"]
    assert listed(server, certificates=pki.bob) == ["both", "open"]
    assert listed(server, psk=pki.psk) == ["keyed"]
    assert listed(server, tls=nbd.TLS_DISABLE) == []


def test_rights_by_name(server, pki):
    alice = connect(server, context(pki.alice), "both")
    bob = connect(server, context(pki.bob), "both")
    assert not alice.export.flags & READ_ONLY and bob.export.flags & READ_ONLY
    alice.write(0, b"a" * 512)
    assert bob.error_of(CMD_WRITE, 0, payload=b"b" * 512) == EPERM
    assert bob.read(0, 512) == b"a" * 512
    with pytest.raises(rawnbd.OptionError) as refused:
        connect(server, context(pki.bob), "mine")
    assert refused.value.type == rawnbd.REP_ERR_UNKNOWN
    assert ', certificate CN=bob,O=fdb-nbd: no export for it: there is no volume "mine"' \
        in server.log()


def test_one_is_who_one_is_after_starttls(server, pki):
    """What was asked in plain text was nobody's question, and its answer nobody's."""
    client = Client(server.addresses()[1])
    client.handshake()
    assert client.list() == []
    with pytest.raises(rawnbd.OptionError):
        client.info("mine")
    client.starttls(context(pki.alice))
    assert [name for name, _ in client.list()] == ["both", "mine", "open"]
    client.go("mine")
    client.write(0, bytes(512))
    client.close()


def test_names_that_nobody_verified_count_for_nothing(servers, pki):
    server = start(servers, pki, RULES, verify=False)
    assert listed(server, certificates=pki.alice) == []
    assert listed(server, psk=pki.psk) == ["keyed"]
    assert "access rules about certificates (3) fit nobody" in server.log()


def test_rules_for_keys_that_the_server_has_not(servers, pki, folder):
    path = folder / "rules"
    path.write_text(RULES)
    server = servers.start(VOLUMES, ["--access", path])
    assert "access rules about certificates (3) fit nobody" in server.log()
    assert "access rules about pre-shared keys (1) fit nobody" in server.log()


def test_a_name_that_loses_its_access_is_cut_off(servers, pki):
    server = start(servers, pki, RULES, "--threads", "2")
    alice = connect(server, context(pki.alice), "both")
    bob = connect(server, context(pki.bob), "both")
    server.rules.write_text(RULES.replace("cn:alice rw mine both", ""))
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: "the TLS credentials were read again" in server.log() and
               "the access rules were read again" in server.log(), 20 * SLOW, "both are read again")
    with pytest.raises((rawnbd.Closed, ConnectionError)):
        alice.read(0, 512)
    assert bob.read(0, 512) is not None
    assert listed(server, certificates=pki.alice) == ["open"]


@pytest.mark.parametrize("mode,verify,said", [
    ("on", True, "nobody has to prove who he is, and data can be read"),
    ("require", False, "nobody has to prove who he is;"), ("require", True, None)])
def test_a_server_open_to_the_network_says_so(servers, pki, mode, verify, said):
    server = servers.start(
        VOLUMES, ["--tls", mode, "--tls-certificates", pki.server,
                  *(["--tls-verify-peer"] if verify else [])], host="0.0.0.0")
    server.stop()
    assert "listening on" in server.log()
    assert said in server.log() if said else "OPEN" not in server.log()
