"""What must stay secret stands in no log, answer, error, list of processes or metric, whatever is
logged: keys, what clients write, what they send over HTTP that is none of ours, the cluster's file;
and what was read of a key is not left in memory as it stood in its file."""

import base64
import json
import os
import re
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from harness import http, rawnbd
from harness.cluster import Cluster
from harness.gateway import gateway
from harness.journald import Journald
from harness.server import CLI_LIMIT_S, SLOW, program, wait_until
from life import PAGES
from pki import run as tool

TOKEN = "hq7Zw2mN9xKfT4vB"
CONTENT = b"what a client wrote: 5uP3rS3cr3t"


def forms(secret):
    """The ways in which its bytes could be shown."""
    encoded = base64.b64encode(secret).decode()
    return {secret.decode("latin-1"), secret.hex(), secret.hex().upper(), encoded,
            encoded.rstrip("="), base64.urlsafe_b64encode(secret).decode().rstrip("="),
            ":".join(f"{b:02x}" for b in secret), " ".join(f"{b:02x}" for b in secret)}


def pem_lines(path):
    """The lines of the key in it."""
    text = path.read_text()
    return re.search(r"-----BEGIN .*-----\n([^-]+)\n-----END", text)[1].split("\n")


def secrets_of(life):
    found = set()
    for line in life.psk.read_text().split():
        found |= forms(bytes.fromhex(line.split(":")[1]))
    for key in (life.files / "server-key.pem", life.client / "client-key.pem", life.authority.key):
        found |= {line for line in pem_lines(key) if len(line) > 24}
        text = tool("openssl", "ec", "-in", key, "-noout", "-text")
        number = re.search(r"priv:\n((?: +[0-9a-f:]+\n)+)", text)[1]
        found |= forms(bytes.fromhex(re.sub(r"[\s:]", "", number)))
    return found | forms(TOKEN.encode()) | forms(CONTENT)


PART = 24


def find(secrets, told):
    """{where: secret} of those that stand in what was told, also cut off, as long words are."""
    return {where: secret for where, text in told.items() for secret in secrets
            if secret[:PART] in text or secret[-PART:] in text}


def in_memory(pid, wanted):
    """What of these bytes is in a process's own memory."""
    found = set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw..? \S+ \S+ 0 *(.*)", line)
            if not match or match[3] not in ("", "[heap]", "[stack]"):
                continue
            low, high = int(match[1], 16), int(match[2], 16)
            try:
                memory.seek(low)
                data = memory.read(high - low) or b""
            except OSError:
                continue
            found |= {w for w in wanted if w in data}
    return found


def pester(life, server, told):
    """Requests with something secret in them that are none of ours, or wrong."""
    at = ("127.0.0.1", life.http_port)
    headers = {"Authorization": f"Bearer {TOKEN}", "Cookie": f"session={TOKEN}",
               "X-Api-Key": TOKEN}
    for path in (*PAGES, f"/v1/volumes?token={TOKEN}", f"/metrics?key={TOKEN}"):
        for method in "GET", "POST":
            _, answered, text = http.request(at, path, method, f"password={TOKEN}", headers=headers)
            told[f"{method} {path}"] = f"{answered}{text}"
    for raw in (f"GET /metrics HTTP/9.9\r\nAuthorization: {TOKEN}\r\n\r\n",
                f"GET / HTTP/1.1\r\nCookie {TOKEN}\r\n\r\n", f"{TOKEN}\r\n\r\n",
                f"GET / HTTP/1.1\r\nContent-Length: {TOKEN}\r\n\r\n"):
        with socket.create_connection(at, 10) as s:
            s.sendall(raw.encode())
            s.settimeout(5 * SLOW)
            try:
                told[raw] = s.recv(65536).decode("latin-1")
            except (TimeoutError, ConnectionError):
                pass
    with rawnbd.connect(server, "v") as client:
        client.write(1 << 20, CONTENT * 200)
        client.error_of(rawnbd.CMD_WRITE, 1 << 40, 512, payload=CONTENT[:32] * 16)


def refusals(life, server):
    """What commands and servers say that are given something wrong."""
    wrong = life.folder / "wrong"
    wrong.mkdir()
    key = life.psk.read_text().split()[0].split(":")[1]
    (wrong / "short.psk").write_text(f"alice:{key[:20]}\n")
    (wrong / "odd.psk").write_text(f"alice:{key}x\n")
    (wrong / "two.psk").write_text(f"a:{key}\na:{key}\n")
    (wrong / "bare.psk").write_text(f"{key}\n")
    for name in "server-cert.pem", "ca-cert.pem":
        (wrong / name).write_bytes((life.files / name).read_bytes())
    pem = (life.files / "server-key.pem").read_text()
    for name, text in (("cut", pem[:len(pem) // 2]), ("password", None)):
        folder = wrong / name
        folder.mkdir()
        for certificate in "server-cert.pem", "ca-cert.pem":
            (folder / certificate).write_bytes((life.files / certificate).read_bytes())
        if text:
            (folder / "server-key.pem").write_text(text)
        else:
            tool("openssl", "pkcs8", "-topk8", "-in", life.files / "server-key.pem", "-out",
                 folder / "server-key.pem", "-passout", f"pass:{TOKEN}")
    for path in wrong.rglob("*.p??"):
        path.chmod(0o600)
    # (Taken for a settings file, or an access file.)
    for words in ([["--tls", "on", "--tls-psk", p] for p in sorted(wrong.glob("*.psk"))] +
                  [["--tls", "on", "--tls-certificates", wrong / n] for n in ("cut", "password")] +
                  [["--access", life.psk], ["--access", life.files / "server-key.pem"],
                   ["--config", life.psk], ["--config", life.files / "server-key.pem"]]):
        done = subprocess.run(
            [*program(), "--log-level", "debug", "--store", server.store, "serve", "--listen",
             "127.0.0.1:0", "--control", "off", *(str(w) for w in words)], capture_output=True,
            text=True, timeout=CLI_LIMIT_S, env={**os.environ, **server.env})
        assert done.returncode != 0 and done.stderr
        yield " ".join(str(w) for w in words), done.stdout + done.stderr


@pytest.mark.lmdb("about what is said, which is the same on all")
@pytest.mark.parametrize("how", ["text", "json", "journal"])
def test_secrets_stay_secret(servers, life, rng, how):
    secrets = secrets_of(life)
    journal, stop = Journald(life.folder) if how == "journal" else None, threading.Event()
    if journal:
        reader = threading.Thread(target=journal.keep_draining, args=(stop,), daemon=True)
        reader.start()
    server = servers.make({"v": "64M", "w": "8M"},
                          [*life.args(), "--log-format", how, "--log-level", "debug"],
                          store=life.store, env=life.env(),
                          prefix=journal.prefix if journal else ())
    told = {}

    def command(*words):
        done = server.cli("--log-level", "debug", *words)
        told[f"command {words}"] = done.stdout + done.stderr
        return done

    with server:
        if how == "text":
            life.whole(server, rng, command)
        else:
            life.load(server, rng)
        pester(life, server, told)
        if not journal:  # (whose server has a /run of its own)
            command("status", "--control", life.control(server))
        for name in "cmdline", "environ", "comm", "status", "stat", "maps":
            told[name] = Path(f"/proc/{server.pid}/{name}").read_text(errors="replace")
        told.update(refusals(life, server))
        # As they stand in their files, keys are not kept. (GnuTLS leaves a copy of a PEM file's
        # text behind when it decodes it, without line ends.)
        pem = pem_lines(life.files / "server-key.pem")
        texts = {f"{a[-20:]}\n{b[:20]}".encode() for a, b in zip(pem, pem[1:])}
        texts |= {line.split(":")[1].encode() for line in life.psk.read_text().split()}
        assert not in_memory(server.pid, texts)
        # (A look at memory finds what is there.)
        assert in_memory(server.pid, {b"alice"})
        if not journal:
            server.upgrade()
            life.by_key(server).shutdown()
        else:
            stop.set()
            reader.join()
            told["journal"] = json.dumps(journal.drain())
            journal.socket.close()
    told["log"] = server.log()
    # What nobody wrote into a log is not in there for want of a log.
    assert "entered export v" in told["journal" if journal else "log"]
    assert ('"PRIORITY": "7"' in told["journal"]) if journal else "debug" in told["log"]
    if how == "json":
        assert all(json.loads(x) for x in told["log"].splitlines() if x.startswith("{"))
    assert not find(secrets, told)


def test_the_search_finds(life):
    secrets = secrets_of(life)
    key = life.psk.read_text().split()[0].split(":")[1]
    for text in (key, base64.b64encode(bytes.fromhex(key)).decode(), TOKEN,
                 life.authority.key.read_text(), "5uP3rS3cr3t and more " + CONTENT.decode()):
        assert find(secrets, {"x": f"a log with {text} in it"})
    assert find(secrets, {"x": f'"{f"alice:{key}"[:64]}" is no client'})


@pytest.mark.fdb
def test_what_is_in_the_clusters_file(folder):
    """Whoever has its words can come to the cluster."""
    with Cluster() as cluster:
        file = Path(cluster.file).read_text().strip()
        words = re.match(r"(\w+):(\w+)@", file)
        server = gateway(cluster, folder / "g", {"v": "1M"}, ["--log-level", "debug"])
        with server:
            with rawnbd.connect(server, "v") as client:
                client.write(0, b"x" * 512)
            said = server.cli("--log-level", "debug", "store", "info").stdout
            said += server.cli("--log-level", "debug", "info", "v").stdout
            where = http.control(server.pid)
            said += "".join(http.request(where, path)[2] for path in PAGES)
            wait_until(lambda: "entered export v" in server.log(), 20 * SLOW, "it is in the log")
            said += server.log() + Path(f"/proc/{server.pid}/cmdline").read_text()
        assert f"{words[1]}:{words[2]}" not in said and f"{words[2]}@" not in said
