"""serve --user: what a server that root starts is when it serves, and that all it does works still."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from harness import http, rawnbd
from harness.commands import FAILED, USAGE
from harness.server import SLOW, cli, wait_until
from harness.waiting import free_port

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's server"),
    pytest.mark.lmdb("about processes and files, which are the same on all"),
]
USER, GROUP = 64321, 64322  # nobody in particular
RULES = f"user:0 rw *\nuser:{USER} rw *\n"


def owned(path, mode=None):
    os.chown(path, USER, GROUP)
    if mode is not None:
        path.chmod(mode)
    return path


@pytest.fixture
def home(folder):
    """Folders and files as somebody makes them who reads the manual."""
    folder.chmod(0o755)
    for name in "store", "tls":
        (folder / name).mkdir()
        owned(folder / name, 0o700)
    subprocess.run(["psktool", "-u", "alice", "-p", folder / "tls/psk"], check=True,
                   capture_output=True)
    owned(folder / "tls/psk", 0o600)
    (folder / "access").write_text(RULES)
    return folder


def make(servers, home, *args, volumes=None, user=f"{USER}:{GROUP}", **more):
    server = servers.make(volumes if volumes is not None else {"v": "8M"},
                          ["--user", user, *args], store=home / "store", **more)
    owned(server.folder)
    return server


def status_of(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines())


def has_nothing_left(pid):
    """Every thread of it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        of = status_of(f"{pid}/task/{task.name}")
        assert of["Uid"].split() == [str(USER)] * 4 and of["Gid"].split() == [str(GROUP)] * 4
        assert of["Groups"].split() == [str(GROUP)], of["Groups"]
        for name in "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
            assert int(of[name], 16) == 0, (name, of[name])
        assert of["NoNewPrivs"] == "1"


def strangers(place):
    return [f"{p} {p.lstat().st_uid}:{p.lstat().st_gid}" for p in [place, *place.rglob("*")]
            if (p.lstat().st_uid, p.lstat().st_gid) != (USER, GROUP)]


def test_root_becomes_somebody_else_for_good(servers, home):
    ports = free_port(), next(p for p in range(700, 1024) if is_free(p))
    at = "127.0.0.1", ports[0]
    server = make(servers, home, "--http", f"127.0.0.1:{ports[0]}", "--threads", 2,
                  "--listen", f"127.0.0.1:{ports[1]}", "--access", home / "access",
                  "--tls", "on", "--tls-psk", home / "tls/psk", "--control", home / "tls/control")
    with server:
        has_nothing_left(server.pid)
        assert f"running as uid {USER}, gid {GROUP}, without capabilities" in server.log()
        assert "running as root" not in server.log()
        with rawnbd.connect(server, "v") as client:
            client.write(0, b"a" * 4096)
            client.flush()
            server.cli("snapshot", "create", "v@s")
            assert http.get_json(at, "/v1/server")["ready"]
            assert http.get_json(home / "tls/control", "/v1/clients")["total"] == 1
        with socket.create_connection(("127.0.0.1", ports[1]), 10) as below_1024:
            assert below_1024.recv(8) == b"NBDMAGIC"
        # What was read when it began can be read again.
        os.kill(server.pid, signal.SIGHUP)
        for what in "the access rules", "the TLS credentials":
            wait_until(lambda: f"{what} were read again" in server.log(),  # noqa: B023
                       20 * SLOW, "SIGHUP")
        assert not strangers(home / "store")
        # A new one takes its place.
        server.upgrade()
        has_nothing_left(server.pid)
        with rawnbd.connect(server, "v") as client:
            assert client.read(0, 4096) == b"a" * 4096
    assert not strangers(home / "store")
    assert not server.socket_path.exists() and not (home / "tls/control").exists()


def is_free(port):
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
            return True
        except OSError:
            return False


def test_the_same_user_goes_on_without_root(servers, home):
    """What root started is replaced by what its user starts, also where the settings name him."""
    with make(servers, home) as server:
        server.prefix = ["setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups"]
        server.upgrade()
        assert status_of(server.pid)["NoNewPrivs"] == "1"
        with rawnbd.connect(server, "v") as client:
            client.read(0, 512)


def test_a_name_stands_for_its_number_and_groups(servers, home):
    import pwd
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        pytest.skip("there is no user nobody here")
    for path in home / "store", home / "tls":
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    server = servers.make({"v": "8M"}, ["--user", "nobody"], store=home / "store")
    os.chown(server.folder, nobody.pw_uid, nobody.pw_gid)
    with server:
        of = status_of(server.pid)
        assert of["Uid"].split() == [str(nobody.pw_uid)] * 4
        assert of["Gid"].split() == [str(nobody.pw_gid)] * 4
        environment = Path(f"/proc/{server.pid}/environ").read_text()
        assert "\0PATH=" in "\0" + environment


def test_root_that_stays_root_is_told(servers):
    """And served, as ever."""
    with servers.make({"v": "8M"}) as server:
        wait_until(lambda: "warning: running as root: " in server.log(), 20 * SLOW, "it says so")
        assert status_of(server.pid)["NoNewPrivs"] == "1"
        with rawnbd.connect(server, "v") as client:
            client.write(0, b"x" * 512)
    with servers.make({"v": "8M"}, ["--user", "root"]) as server:
        wait_until(lambda: "info: running as root" in server.log(), 20 * SLOW, "it says so")
        assert "warning: " not in server.log()


@pytest.mark.parametrize("user, said", [
    ("no-such-user", 'there is no user "no-such-user"'), ("", "is not NAME or NAME:GROUP"),
    ("root:no-such-group", 'there is no group "no-such-group"'), (":", "is not NAME"),
    ("root:", "is not NAME"), (str(USER), f"add one, {USER}:GROUP"),
    ("4294967295:0", "there is no user"), ("x" * 300, "is not NAME")])
def test_who_is_nobody(folder, user, said):
    done = cli(f"lmdb:{folder}/store", "serve", "--create", "v:1M", "--user", user, check=False)
    assert done.returncode == USAGE and said in done.stderr and done.stderr.count("\n") == 1, done
    assert not (folder / "store").exists()


@pytest.mark.parametrize("what, said", [
    ("store", "Permission denied"), ("psk", "Permission denied"), ("access", "Permission denied"),
    ("socket", "Permission denied")])
def test_what_the_user_may_not_is_not_done_for_him(home, what, said):
    """Not even at the start, when it could be: SIGHUP and the next start could not."""
    path = {"store": home / "store", "psk": home / "tls/psk", "access": home / "access",
            "socket": home / "tls"}[what]
    os.chown(path, 0, 0)
    path.chmod(0o700 if path.is_dir() else 0o600)
    done = cli(f"lmdb:{home}/store", "serve", "--create", "v:1M", "--user", f"{USER}:{GROUP}",
               "--listen", f"unix:{home}/tls/s" if what == "socket" else "127.0.0.1:0",
               "--control", "off", "--access", home / "access", "--tls", "on", "--tls-psk",
               copy_of_key(home) if what == "socket" else home / "tls/psk", check=False)
    assert done.returncode != 0 and said in done.stderr, done
    assert str(path) in done.stderr
    assert not list((home / "store").iterdir())


def copy_of_key(home):
    path = home / "psk"
    path.write_bytes((home / "tls/psk").read_bytes())
    return owned(path, 0o600)


def test_only_root_can(home):
    done = cli(f"lmdb:{home}/store", "serve", "--create", "v:1M", "--user", "root", check=False,
               prefix=["setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups"])
    assert done.returncode == FAILED and "only root can change into another user" in done.stderr
    assert not list((home / "store").iterdir())


def test_capabilities_of_others_are_given_up(servers, home):
    """As a unit with AmbientCapabilities=CAP_NET_BIND_SERVICE gives one, for the port."""
    port = next(p for p in range(700, 1024) if is_free(p))
    server = make(servers, home, "--listen", f"127.0.0.1:{port}",
                  prefix=["setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups",
                          "--inh-caps=+net_bind_service", "--ambient-caps=+net_bind_service"])
    with server:
        of = status_of(server.pid)
        for name in "CapInh", "CapPrm", "CapEff", "CapAmb":
            assert int(of[name], 16) == 0, (name, of[name])
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            assert client.recv(8) == b"NBDMAGIC"


# --- the order in which things are done ---------------------------------------------------------

def untouched(folder):
    return not (folder / "store").exists()


@pytest.mark.parametrize("fault", [
    "tls", "access", "listen", "listen-unix", "listen-folder", "http", "default", "lease"])
def test_what_cannot_serve_makes_nothing(folder, fault):
    """Neither the volume nor the store."""
    (folder / "bad").write_text("nonsense\n")
    (folder / "bad").chmod(0o600)
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(str(folder / "taken"))
        unix.listen()
        taken = "127.0.0.1:%d" % tcp.getsockname()[1]
        words = {"tls": ["--tls", "on", "--tls-psk", folder / "bad"],
                 "access": ["--access", folder / "bad"],
                 "listen": ["--listen", taken],
                 "listen-unix": ["--listen", f"unix:{folder}/taken"],
                 "listen-folder": ["--listen", f"unix:{folder}/none/s"],
                 "http": ["--http", taken],
                 "default": ["--default", "w"],
                 "lease": ["--lease-ms", "2000"]}[fault]
        store = "fdb:/none/cluster" if fault == "lease" else f"lmdb:{folder}/store"
        done = cli(store, "serve", "--create", "v:1M", "--listen", f"unix:{folder}/s", *words,
                   check=False)
    assert done.returncode != 0 and done.stderr.count("\n") == 1, done
    assert untouched(folder), done
    assert not (folder / "s").exists()


def test_a_default_that_is_missing_makes_no_volume_beside(folder):
    store = f"lmdb:{folder}/store"
    cli(store, "create", "a", "1M")
    listen = ["--listen", f"unix:{folder}/s"]
    done = cli(store, "serve", *listen, "--create", "v:1M", "--default", "w", check=False)
    assert done.returncode == 3 and '"w"' in done.stderr
    assert re.findall(r"^(\w+) ", cli(store, "list").stdout, re.MULTILINE)[1:] == ["a"]


# --- SIGHUP before it serves --------------------------------------------------------------------

def test_a_hangup_before_it_serves_is_kept(servers, folder):
    """It holds where the server reads a file: the end of a pipe that nobody has written to."""
    pipe = folder / "access"
    os.mkfifo(pipe)
    server = servers.make({"v": "8M"}, ["--access", pipe])
    server.start(wait=False)
    wait_until(lambda: opens_for_reading(server.pid), 20 * SLOW, "it opens the access file")
    os.kill(server.pid, signal.SIGHUP)
    # The signal has it open the file again, by its name: the pipe must have it until it does.
    wait_until(lambda: opens_for_reading(server.pid), 20 * SLOW, "it took the signal, and waits")
    # What it reads at last is not what it reads for the signal.
    old = pipe.rename(folder / "old")
    pipe.write_text("any rw *\n")
    fd = os.open(old, os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, b"any ro *\n")
    os.close(fd)
    wait_until(lambda: "the access rules were read again" in server.log(), 20 * SLOW, "reload")
    with rawnbd.connect(server, "v") as client:
        assert not client.export.flags & rawnbd.READ_ONLY
    server.stop()


def opens_for_reading(pid):
    """Whether it waits in the kernel for somebody to open the other end, with a handler for SIGHUP,
    and none that it has yet to take."""
    try:
        status = status_of(pid)
        waits = "wait_for_partner" in Path(f"/proc/{pid}/wchan").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    bit = 1 << (signal.SIGHUP - 1)
    pending = (int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)) & bit
    return waits and int(status["SigCgt"], 16) & bit and not pending
