"""A kernel device over TLS: nbd-client speaks it for the kernel (docs/tls.md)."""

import sys
from pathlib import Path

import pytest

from harness import uml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tls"))

from pki import Pki  # noqa: E402

pytestmark = pytest.mark.lmdb("about the client")

PORT = 10809


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return Pki(tmp_path_factory.mktemp("pki"))


def test_a_file_system_over_tls(namespace, module_servers, guest, pki):
    """With alice's certificate; without one, or with that of another CA, there is no device."""
    server = module_servers.start(
        {"v": "128M"}, ["--tls", "require", "--tls-certificates", pki.server, "--tls-verify-peer"],
        host=uml.HOST_ADDRESS, port=PORT, prefix=namespace.enter, reachable=False)
    for name, folder in (("alice", pki.alice), ("other", pki.other)):
        for file in ("ca-cert", "client-cert", "client-key"):
            text = (folder / f"{file}.pem").read_text()
            guest.run(f"cat >/tmp/{name}-{file}.pem <<'END'\n{text}\nEND\n")

    def attach(name):
        return (f"nbd-client -N v {uml.HOST_ADDRESS} {PORT} /dev/nbd0 -x "
                f"-certfile /tmp/{name}-client-cert.pem -keyfile /tmp/{name}-client-key.pem "
                f"-cacertfile /tmp/{name}-ca-cert.pem -tlshostname localhost")

    guest.run(f"if nbd-client -N v {uml.HOST_ADDRESS} {PORT} /dev/nbd0; then exit 1; fi\n"
              f"if timeout 20 {attach('other')}; then exit 1; fi\n"
              "test $(cat /sys/block/nbd0/size) = 0")
    guest.run(f"""{attach('alice')}
mkfs.ext4 -F -q /dev/nbd0
mount /dev/nbd0 /tmp/mnt
head -c 20M /dev/urandom >/tmp/mnt/a
sha256sum </tmp/mnt/a >/tmp/sum
umount /tmp/mnt
blockdev --flushbufs /dev/nbd0
mount /dev/nbd0 /tmp/mnt
sha256sum </tmp/mnt/a | cmp - /tmp/sum
umount /tmp/mnt
fsck.ext4 -f -n /dev/nbd0
nbd-client -d /dev/nbd0
""")
    said = server.log()
    assert "certificate CN=alice,O=fdb-nbd entered export v over TLS" in said
    # (A client shows no certificate of a CA that the server did not name.)
    assert "came without TLS" in said and "the client has no certificate" in said
