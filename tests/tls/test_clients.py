"""The clients people use, over TLS: certificates and pre-shared keys, TCP and Unix sockets."""

import filecmp
import json
import subprocess
import urllib.parse

import nbd
import pytest

MIB = 1 << 20
WAYS = [(proof, tcp) for proof in ("certificates", "psk") for tcp in (True, False)]


@pytest.fixture(scope="module")
def server(pki, module_servers):
    return module_servers.start(
        {"v": "64M", "w": "64M"},
        ["--threads", "2", "--tls", "require", "--tls-certificates", pki.server,
         "--tls-verify-peer", "--tls-psk", pki.psk])


@pytest.fixture(params=WAYS, ids=[f"{proof}-{'tcp' if tcp else 'unix'}" for proof, tcp in WAYS])
def way(request):
    return request.param


def uri(server, pki, way, name="v"):
    proof, tcp = way
    user = "alice@" if proof == "psk" else ""
    query = {"tls-psk-file": str(pki.psk)} if user else {"tls-certificates": str(pki.alice)}
    if tcp:
        return f"nbds://{user}localhost:{server.port}/{name}?{urllib.parse.urlencode(query)}"
    query["socket"] = str(server.socket_path)
    return f"nbds+unix://{user}/{name}?{urllib.parse.urlencode(query)}"


def qemu(server, pki, way, name="v"):
    """The words that name an export to qemu's tools."""
    proof, tcp = way
    if proof == "psk":
        # qemu looks for keys.psk in a folder.
        tls = f"tls-creds-psk,id=tls0,endpoint=client,username=alice,dir={pki.psk.parent}"
    else:
        tls = f"tls-creds-x509,id=tls0,endpoint=client,dir={pki.alice}"
    where = (f"server.type=inet,server.host=localhost,server.port={server.port}" if tcp
             else f"server.type=unix,server.path={server.socket_path}")
    host = ",tls-hostname=localhost" if proof != "psk" and not tcp else ""
    return ["--object", tls, "--image-opts",
            f"driver=nbd,{where},export={name},tls-creds=tls0{host}"]


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def entered(proof):
    return "PSK identity alice" if proof == "psk" else "certificate CN=alice,O=fdb-nbd"


def test_nbdinfo(server, pki, way):
    said = json.loads(run("nbdinfo", "--json", uri(server, pki, way)))
    assert said["TLS"] is True and said["exports"][0]["export-size"] == 64 * MIB
    assert f", {entered(way[0])} entered export v over TLS1.3 (AES-" in server.log()
    names = json.loads(run("nbdinfo", "--list", "--json", uri(server, pki, way)))
    assert [e["export-name"] for e in names["exports"]] == ["v", "w"]


def test_libnbd_moves_large_requests(server, pki, way, rng):
    data = rng.randbytes(32 * MIB)
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri(server, pki, way))
    assert h.get_tls_negotiated()
    h.pwrite(data, 12345)
    h.flush()
    assert h.pread(len(data), 12345) == data
    h.shutdown()


def test_nbdcopy(server, pki, way, folder, rng):
    source, copy = folder / "source", folder / "copy"
    source.write_bytes(rng.randbytes(64 * MIB))
    run("nbdcopy", source, uri(server, pki, way, "w"))
    run("nbdcopy", uri(server, pki, way, "w"), copy)
    assert filecmp.cmp(source, copy, shallow=False)


def test_qemu_img(server, pki, way, folder, rng):
    source, copy = folder / "source", folder / "copy"
    source.write_bytes(rng.randbytes(64 * MIB))
    words = qemu(server, pki, way)
    tls, image = words[:2], words[-1]
    run("qemu-img", "convert", "-n", *tls, "--target-image-opts", "-f", "raw", source, image)
    run("qemu-img", "convert", *tls, "--image-opts", image, "-O", "raw", copy)
    assert filecmp.cmp(source, copy, shallow=False)
    said = json.loads(run("qemu-img", "info", "--output=json", *words))
    assert said["virtual-size"] == 64 * MIB


def test_nbd_client_lists(server, pki):
    said = run("nbd-client", "-l", "localhost", str(server.port), "-certfile",
               pki.alice / "client-cert.pem", "-keyfile", pki.alice / "client-key.pem",
               "-cacertfile", pki.alice / "ca-cert.pem", "-tlshostname", "localhost", "-x")
    assert said.split()[-2:] == ["v", "w"]


def test_the_examples_at_the_start_work(server, pki):
    """With what only the client knows put in."""
    line = next(line for line in server.log().splitlines() if line.startswith("  nbdinfo "))
    uri = line.split("'")[1].replace("IDENTITY", "alice").replace("FILE", str(pki.psk))
    assert "nbd-client" not in server.log()
    assert json.loads(run("nbdinfo", "--json", uri))["TLS"] is True


def test_without_tls_nobody_is_served(server):
    done = subprocess.run(["nbdcopy", server.uri("v", tcp=True), "null:"], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode != 0, done
    assert "refused: it came without TLS, which this server requires" in server.log()
