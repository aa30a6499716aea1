"""A store of the service's user, which the administrator's commands, run as root, work on too:
neither locks the other out, and the service can end a command that stands in its way."""

import os
import signal
import subprocess

import pytest

from harness import rawnbd
from harness.server import CLI_LIMIT_S, SLOW, cli, program

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's server"),
    pytest.mark.lmdb("about the files of a store"),
]
USER = 64321  # nobody in particular
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]


@pytest.fixture
def place(folder):
    """A folder of the user's, as the package makes it, and a way to it."""
    folder.chmod(0o755)
    place = folder / "store"
    place.mkdir(mode=0o700)
    os.chown(place, USER, USER)
    return place


@pytest.fixture
def service(servers, place):
    """The server as the service runs it."""
    def start():
        server = servers.make(store=place, prefix=AS_USER)
        os.chown(server.folder, USER, USER)
        return server.start()
    return start


def root(place, *words, **more):
    return cli(f"lmdb:{place}", *words, **more)


def strangers(place):
    """What in the store is not the user's, or that others may look into."""
    out = []
    for path in [place, *place.rglob("*")]:
        stat = path.lstat()
        if (stat.st_uid, stat.st_gid) != (USER, USER) or stat.st_mode & 0o077:
            out.append(f"{path} {stat.st_uid}:{stat.st_gid} {stat.st_mode:o}")
    return out


def test_a_new_store_is_its_users_alone(folder):
    """Whatever the umask: whoever can read its files can read all volumes."""
    words = [*program(), "--store", f"lmdb:{folder}/a/store", "create", "v", "8M"]
    subprocess.run(words, check=True, capture_output=True, umask=0, timeout=CLI_LIMIT_S)
    for path in [folder / "a/store", *(folder / "a/store").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_root_makes_the_store_and_the_service_serves_it(place, service):
    root(place, "create", "v", "8M")
    assert not strangers(place)
    server = service()
    with rawnbd.connect(server, "v") as client:
        client.write(0, b"a" * 4096)
        client.flush()
        root(place, "snapshot", "create", "v@s")
        root(place, "create", "w", "8M")
        # Where only root may write, and may read.
        hidden = place.parent / "hidden"
        hidden.mkdir(mode=0o700)
        root(place, "export", "v@s", str(hidden / "image"))
        assert (hidden / "image").read_bytes()[:4096] == b"a" * 4096
        assert (hidden / "image").stat().st_uid == 0
        root(place, "import", str(hidden / "image"), "x")
        root(place, "store", "backup", str(hidden / "copy"))
        root(place, "verify", "v")
        root(place, "snapshot", "remove", "v@s")
        root(place, "remove", "w", "--yes")
        client.write(0, b"b" * 4096)
    assert not strangers(place)
    server.restart("kill")
    with rawnbd.connect(server, "v") as v, rawnbd.connect(server, "x") as x:
        assert v.read(0, 4096) == b"b" * 4096 and x.read(0, 4096) == b"a" * 4096
    assert not strangers(place)


def test_root_serves_and_the_service_goes_on(place, servers, service):
    """Its write log, too, is the user's."""
    with servers.make({"v": "8M"}, store=place) as server:
        with rawnbd.connect(server, "v") as client:
            client.write(0, b"a" * 4096)
        server.kill()
    assert not strangers(place)
    server = service()
    with rawnbd.connect(server, "v") as client:
        assert client.read(0, 4096) == b"a" * 4096, "replayed from that log"


def test_a_store_that_came_back_without_its_lock_file(place, service):
    """As after restoring a copy; root's command makes the file anew."""
    root(place, "create", "v", "8M")
    (place / "lock.mdb").unlink()
    root(place, "list")
    assert not strangers(place)
    with rawnbd.connect(service(), "v") as client:
        client.read(0, 512)


def test_the_service_may_end_a_command_of_root(place):
    root(place, "create", "v", "8M")
    words = [*program(), "--store", f"lmdb:{place}", "export", "v", "-"]
    command = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        command.stdout.read(1)  # it has the store open, and its pipe takes no more
        subprocess.run([*AS_USER, "kill", "-KILL", str(command.pid)], check=True,
                       timeout=CLI_LIMIT_S)
        assert command.wait(30 * SLOW) == -signal.SIGKILL
    finally:
        command.kill()
        command.stdout.close()
        command.wait()


LINKED = ["bell", "processes", "reserve", "blocks", "data.mdb", "lock.mdb", "making"]


@pytest.mark.parametrize("content", [b"", b"root's\n", None], ids=["empty", "a line", "missing"])
@pytest.mark.parametrize("name", LINKED)
def test_a_link_leads_root_to_nobody_elses_file(place, name, content):
    """Who has the store, has not root's files, whatever he puts in the place of his own."""
    root(place, "create", "v", "8M")
    target = place.parent / "target"
    if content is not None:
        target.write_bytes(content)
        target.chmod(0o600)
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(target)
    for words in (["list"], ["create", "w", "8M"]):
        root(place, *words, check=False)
        if content is None:
            assert not target.exists()
        else:
            stat = target.stat()
            assert (stat.st_uid, stat.st_mode & 0o777) == (0, 0o600)
            assert target.read_bytes() == content


@pytest.mark.parametrize("name", ["session", "log"])
def test_a_link_leads_root_to_no_other_folder(place, name):
    """Sessions and logs are made with root's rights."""
    root(place, "create", "v", "8M")
    target = place.parent / "target"
    target.mkdir()
    (place / name).rename(place.parent / f"old-{name}")
    (place / name).symlink_to(target)
    result = root(place, "create", "w", "8M", check=False)
    assert result.returncode == 4 and not list(target.iterdir())


def test_root_has_a_way_that_the_user_has_not(folder):
    """Of the store, that is; the files in it are the user's."""
    place = folder / "store"
    place.mkdir(mode=0o700)
    os.chown(place, USER, USER)
    folder.chmod(0o700)
    root(place, "create", "v", "8M")
    root(place, "snapshot", "create", "v@s")
    assert not strangers(place)
