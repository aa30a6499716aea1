"""Who is refused and what is said of it, the files credentials come from, and their reload."""

import os
import shutil
import signal
import ssl
import subprocess

import nbd
import pytest

import pki as made
import tlsnbd
from harness import rawnbd
from harness.server import SLOW, wait_until
from pki import context


@pytest.fixture(scope="module")
def server(pki, module_servers):
    return module_servers.start(
        {"v": "16M"}, ["--tls", "require", "--tls-certificates", pki.server, "--tls-verify-peer",
                       "--tls-psk", pki.psk])


def psk_client(server, keys, name="alice"):
    h = nbd.NBD()
    h.set_tls(nbd.TLS_REQUIRE)
    h.set_tls_psk_file(str(keys))
    h.set_tls_username(name)
    h.connect_unix(str(server.socket_path))
    return h


def fails(uri):
    """A libnbd client in a process of its own, whose end closes its socket."""
    done = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(done.stderr)


def psk_fails(server, keys, name="alice"):
    fails(f"nbds+unix://{name}@/v?socket={server.socket_path}&tls-psk-file={keys}")


def is_refused(server, connect, *words):
    """The client gets nowhere, and one line of the log says why."""
    before = len(server.log())
    with pytest.raises((ssl.SSLError, OSError, nbd.Error, rawnbd.Closed)):
        connect()
    wait_until(lambda: "refused at its TLS handshake: " in server.log()[before:], 20 * SLOW,
               "the log tells of it")
    said = server.log()[before:]
    for word in words:
        assert word in said, said
    assert "entered export" not in said
    server.check_alive()


# -- who is refused -----------------------------------------------------------------------------


def test_certificate_of_another_ca(server, pki):
    is_refused(server, lambda: tlsnbd.connect(server, context(pki.other)),
               "the client's certificate (CN=mallory,O=fdb-nbd) is not accepted",
               f"signed by the CA in {pki.server}/ca-cert.pem")


def test_expired_certificate(server, pki):
    is_refused(server, lambda: tlsnbd.connect(server, context(pki.old)),
               "the client's certificate (CN=old,O=fdb-nbd) is not accepted", "expired")


def test_certificate_for_servers(server, pki):
    is_refused(server, lambda: tlsnbd.connect(server, context(pki.wrong_purpose)),
               "the client's certificate (CN=host,O=fdb-nbd) is not accepted", "purpose")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_certificate_for_servers_in_pieces(server, pki, version):
    """What the server does for others meanwhile changes nothing."""
    alice = context(pki.alice)

    def put(sock, data):
        for at in range(0, len(data), 97):
            sock.sendall(data[at:at + 97])
            other = tlsnbd.connect(server, alice)
            other.write(0, b"A" * 100000)
            other.disc()

    before = len(server.log())
    wrong = context(pki.wrong_purpose, minimum_version=version, maximum_version=version)
    with pytest.raises((OSError, rawnbd.Closed)):
        tlsnbd.connect(server, wrong, put=put)
    wait_until(lambda: "CN=host,O=fdb-nbd) is not accepted" in server.log()[before:], 20 * SLOW,
               "the log tells of it")
    assert "purpose" in server.log()[before:]
    server.check_alive()


def test_no_certificate(server, pki):
    is_refused(server, lambda: tlsnbd.connect(server, context(ca=pki.ca.cert)),
               "the client has no certificate, which --tls-verify-peer asks for",
               "client-cert.pem and client-key.pem")


def test_revoked_certificate(servers, pki, folder):
    files = folder / "files"
    shutil.copytree(pki.server, files)
    pki.ca.revoke(pki.bob / "client-cert.pem", files / "ca-crl.pem")
    server = servers.start({"v": "16M"}, ["--tls", "require", "--tls-certificates", files,
                                          "--tls-verify-peer"])
    is_refused(server, lambda: tlsnbd.connect(server, context(pki.bob)),
               "(CN=bob,O=fdb-nbd) is not accepted", "revoked")
    tlsnbd.connect(server, context(pki.alice)).disc()


def test_client_that_does_not_believe_the_server(server, pki, folder):
    """GnuTLS and OpenSSL say so in different ways."""
    is_refused(server, lambda: tlsnbd.connect(server, context(ca=pki.other_ca.cert)),
               "it may not accept this server's certificate", "ca-cert.pem")
    shutil.copy(pki.other_ca.cert, folder / "ca-cert.pem")
    is_refused(server, lambda: fails(f"nbds://localhost:{server.port}/v?tls-certificates={folder}"),
               "the client broke off during the handshake: it may not accept this server's "
               "certificate")


def test_wrong_key(server, pki, folder):
    keys = pki.keys(folder / "wrong.psk", "alice")
    is_refused(server, lambda: psk_fails(server, keys),
               f'the client\'s key for the identity "alice" is not the one in {pki.psk}')


def test_unknown_identity(server, pki, folder):
    keys = pki.keys(folder / "mallory.psk", "mallory")
    is_refused(server, lambda: psk_fails(server, keys, "mallory"),
               f'{pki.psk} has no key for the identity "mallory"')


def test_a_key_that_is_lost_opens_nothing_that_was_sent(servers, pki, folder):
    """No session whose keys went encrypted with that of the certificate, as TLS 1.2 could."""
    files = folder / "files"
    shutil.copytree(pki.server, files)
    key, info = files / "server-key.pem", folder / "info"
    made.run("certtool", "--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", key)
    key.chmod(0o600)
    made.write(info, "cn = localhost", "tls_www_server", "signing_key", "encryption_key",
               "dns_name = localhost")
    made.run("certtool", "--generate-certificate", "--load-ca-certificate", pki.ca.cert,
             "--load-ca-privkey", pki.ca.key, "--load-privkey", key, "--template", info,
             "--outfile", files / "server-cert.pem")
    server = servers.start({"v": "16M"}, ["--tls", "require", "--tls-certificates", files])
    old = ssl.TLSVersion.TLSv1_2
    tlsnbd.connect(server, context(ca=pki.ca.cert, maximum_version=old)).disc()
    wait_until(lambda: "entered export" in server.log(), 20 * SLOW, "the log tells of the client")
    without = context(ca=pki.ca.cert, maximum_version=old)
    without.set_ciphers("kRSA")
    is_refused(server, lambda: tlsnbd.connect(server, without), "no way in common")


def test_keys_where_only_certificates_are(servers, pki):
    server = servers.start({"v": "16M"}, ["--tls", "on", "--tls-certificates", pki.server])
    is_refused(server, lambda: psk_fails(server, pki.psk),
               "or want to use a pre-shared key (--tls-psk)")


def test_certificates_where_only_keys_are(servers, pki):
    server = servers.start({"v": "16M"}, ["--tls", "on", "--tls-psk", pki.psk])
    is_refused(server, lambda: tlsnbd.connect(server, context(pki.alice)),
               "no way in common: this server takes pre-shared keys, no certificates")
    psk_client(server, pki.psk).shutdown()


def test_without_verify_peer_nobody_is_asked(servers, pki, folder):
    """Certificates of clients are not looked at, so their names are not believed either; and the
    server needs no CA."""
    files = folder / "files"
    shutil.copytree(pki.server, files)
    (files / "ca-cert.pem").unlink()
    server = servers.start({"v": "16M"}, ["--tls", "require", "--tls-certificates", files])
    tlsnbd.connect(server, context(ca=pki.ca.cert)).disc()
    tlsnbd.connect(server, context(pki.other)).disc()
    wait_until(lambda: server.log().count("no certificate") == 2, 20 * SLOW, "both entered")
    assert "mallory" not in server.log()


# -- the files ------------------------------------------------------------------------------------


def serve_fails(folder, *words):
    """The one sentence that `serve` ends with."""
    done = subprocess.run([*os.environ.get("FDB_NBD", "build/fdb-nbd").split(), "--store",
                           f"lmdb:{folder}/st", "serve", "--create", "v:1M", "--listen",
                           f"unix:{folder}/s", *(str(w) for w in words)],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2), done
    # Besides it there are log lines, with a time in front.
    lines = [line for line in done.stderr.splitlines() if not line[0].isdigit()]
    assert len(lines) == 1 or done.returncode == 2, done.stderr
    return done.returncode, lines[0]


@pytest.mark.parametrize("words, said", [
    (["--tls", "maybe"], "off, on or require, not maybe"),
    (["--tls", "on"], "--tls needs --tls-certificates or --tls-psk"),
    (["--tls", "on", "--tls-psk", "x", "--tls-verify-peer"],
     "--tls-verify-peer needs --tls-certificates"),
    (["--tls-psk", "x"], "--tls on or --tls require"),
])
def test_options_that_make_no_sense(folder, words, said):
    status, sentence = serve_fails(folder, *words)
    assert status == 2 and said in sentence




@pytest.mark.parametrize("name, content, said", [
    ("server-cert.pem", None, "cannot read {}: No such file"),
    ("server-key.pem", None, "cannot read {}: No such file"),
    ("ca-cert.pem", None, "cannot read {}: No such file"),
    ("server-cert.pem", b"nothing", "{} holds no certificate in PEM format"),
    ("server-key.pem", b"", "cannot use the key {}"),
    ("ca-cert.pem", b"nothing", "{} holds no certificate in PEM format"),
    ("ca-crl.pem", b"nothing", "{} holds no revocation list in PEM format"),
    ("keys.psk", None, "cannot read {}: No such file"),
    ("keys.psk", b"", "{} has no keys: psktool -u NAME"),
    ("keys.psk", b"alice\n", "{}: line 1 is not identity:key"),
    ("keys.psk", b"\n:00112233445566778899aabbccddeeff\n", "{}: line 2 has an identity that is not"),
    ("keys.psk", b"a" * 129 + b":" + b"00" * 16, "{}: line 1 has an identity that is not 1 to 128"),
    ("keys.psk", b"a\tb:" + b"00" * 16, "{}: line 1 has an identity with a control character"),
    ("keys.psk", b"alice:" + b"00" * 16 + b"\nbob:5eC2et" + b"zz" * 20,
     "{}: line 2 has a key that is not"),
    ("keys.psk", b"alice:00112233", "{}: line 1 has a key of fewer than 16 bytes"),
    ("keys.psk", b"alice:" + b"0" * 33, "{}: line 1 has a key that is not"),
    ("keys.psk", b"a:" + b"00" * 16 + b"\na:" + b"11" * 16, '{} has two keys for "a"'),
])
def test_files_that_make_no_sense(pki, folder, name, content, said):
    files = folder / "files"
    shutil.copytree(pki.server, files)
    shutil.copy(pki.psk, files / "keys.psk")
    (files / name).unlink(missing_ok=True)
    if content is not None:
        (files / name).write_bytes(content)
        (files / name).chmod(0o600)
    status, sentence = serve_fails(folder, "--tls", "on", "--tls-certificates", files,
                                   "--tls-verify-peer", "--tls-psk", files / "keys.psk")
    assert status == 1 and said.format(files / name) in sentence
    assert "5eC2et" not in sentence


def test_key_of_another_certificate(pki, folder):
    files = folder / "files"
    shutil.copytree(pki.server, files)
    shutil.copy(pki.alice / "client-key.pem", files / "server-key.pem")
    _, sentence = serve_fails(folder, "--tls", "on", "--tls-certificates", files)
    assert f"{files}/server-key.pem is not the key of the certificate {files}/server-cert.pem" in \
        sentence


def test_unwise_files(servers, pki, folder):
    """Allowed, and said; secrets are not."""
    files = pki.ca.issue(folder / "files", "server", "localhost", *made.EXPIRED)
    keys = files / "keys.psk"
    shutil.copy(pki.psk, keys)
    keys.chmod(0o644)
    (files / "server-key.pem").chmod(0o604)
    server = servers.start({"v": "16M"}, ["--tls", "require", "--tls-certificates", files,
                                          "--tls-psk", keys])
    log = server.log()
    assert f"{keys} holds a secret key and every user of this machine has access to it" in log
    assert f"{files}/server-key.pem holds a secret key" in log
    assert f"{files}/server-cert.pem has expired on 2020-01-01" in log
    psk_client(server, keys).shutdown()
    server.stop()
    log = server.log()
    for line in keys.read_text().split():
        assert line.split(":")[1][:16] not in log
    assert "PRIVATE KEY" not in log


def test_a_byte_order_mark_is_no_part_of_a_name(servers, pki, folder):
    keys = folder / "keys.psk"
    keys.write_bytes(b"\xef\xbb\xbf" + pki.psk.read_bytes())
    keys.chmod(0o600)
    server = servers.start({"v": "16M"}, ["--tls", "require", "--tls-psk", keys])
    for name in "alice", "bob":
        psk_client(server, pki.psk, name).shutdown()


def test_no_warning_without_a_reason(server):
    assert "holds a secret key" not in server.log() and "expire" not in server.log().split(
        "listening on")[0]


# -- SIGHUP ---------------------------------------------------------------------------------------


def reload(server, expected):
    before = len(server.log())
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: expected in server.log()[before:], 20 * SLOW, f"log: {expected}")
    return server.log()[before:]


def serial(client):
    return client.sock.tls.getpeercert()["serialNumber"]


def test_reload_under_sessions(servers, pki, folder):
    files, keys = folder / "files", folder / "keys.psk"
    shutil.copytree(pki.server, files)
    pki.keys(keys, "alice")
    server = servers.start({"v": "16M"},
                           ["--threads", "2", "--tls", "require", "--tls-certificates", files,
                            "--tls-verify-peer", "--tls-psk", keys])
    alice = context(pki.alice)
    old = tlsnbd.connect(server, alice)
    old_psk = psk_client(server, keys)
    old.write(0, b"before")

    # Nothing of this takes effect, though some of the files are good.
    pki.ca.issue(files, "server", "localhost")
    keys.write_text(keys.read_text() + "bob\n")
    said = reload(server, "the TLS credentials stay as they were")
    assert f"{keys}: line 2 is not identity:key" in said
    client = tlsnbd.connect(server, alice)
    assert serial(client) == serial(old)
    client.disc()

    keys.unlink()
    pki.keys(keys, "alice", "bob")
    reload(server, "the TLS credentials were read again")
    client = tlsnbd.connect(server, alice)
    assert serial(client) != serial(old) and client.read(0, 6) == b"before"
    client.disc()
    psk_client(server, keys, "bob").shutdown()

    # Another CA: whoever is inside stays, and does not come again.
    shutil.copy(pki.other_ca.cert, files / "ca-cert.pem")
    reload(server, "the TLS credentials were read again")
    is_refused(server, lambda: tlsnbd.connect(server, alice), "(CN=alice,O=fdb-nbd) is not accepted")
    tlsnbd.connect(server, context(pki.other)).disc()
    old.write(0, b"after!")
    assert old.read(0, 6) == b"after!"
    assert old_psk.pread(6, 0) == b"after!"
    old.disc()
    old_psk.shutdown()


def test_replace_with_tls(servers, pki):
    """A new server takes over from the old one; a client that connects again goes on there."""
    server = servers.start({"v": "16M"}, ["--tls", "require", "--tls-certificates", pki.server,
                                          "--tls-verify-peer"])
    alice = context(pki.alice)
    old = tlsnbd.connect(server, alice)
    old.write(4096, b"answered by the old one")
    server.upgrade()
    old.expect_closed(limit_s=20 * SLOW)
    for tcp in (True, False):
        client = tlsnbd.connect(server, alice, tcp=tcp)
        assert client.read(4096, 23) == b"answered by the old one"
        client.disc()


def test_replace_with_broken_files_leaves_the_old_one(servers, pki, folder):
    files = folder / "files"
    shutil.copytree(pki.server, files)
    server = servers.start({"v": "16M"}, ["--tls", "require", "--tls-certificates", files,
                                          "--tls-verify-peer"])
    (files / "server-key.pem").write_bytes(b"")
    done = server.cli("serve", "--replace", "--listen", f"unix:{server.socket_path}",
                      *server.args, check=False)
    assert done.returncode == 1 and f"cannot use the key {files}/server-key.pem" in done.stderr
    tlsnbd.connect(server, context(pki.alice)).disc()
