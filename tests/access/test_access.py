"""The access file: who sees, opens, reads and writes which volumes, and what a change of the file
does to those who are there. docs/access.md is the manual.

Clients on the loopback come from different addresses, which is all that tells them apart.
"""

import errno
import json
import os
import signal
import subprocess

import nbd
import pytest

from harness import rawnbd
from harness.rawnbd import (
    CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EPERM, OPT_EXPORT_NAME, OPT_GO, OPT_INFO,
    OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, READ_ONLY, REP_ERR_UNKNOWN, OptionError)
from harness.server import SLOW, greets, wait_until

MIB = 1 << 20
ALICE, BOB, CAROL, NOBODY = "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"
BITMAP = "qemu:dirty-bitmap:"
RULES = f"""\
# alice writes one, bob reads two, carol some snapshots of one, nobody nothing
user:{os.getuid()}    rw *
address:{ALICE}       rw a
address:127.0.0.3/32  ro a b   # and its snapshots
address:{CAROL}       ro b@daily-*
"""


class Guarded:
    """A server with an access file, and clients by their addresses."""

    def __init__(self, servers, folder, rules=RULES, volumes=None, args=(), **more):
        self.path = folder / "access"
        self.path.write_text(rules)
        self.server = servers.start(volumes or {"a": "1M", "b": "2M", "hidden": "1M"},
                                    ["--access", self.path, *args], **more)
        self.clients = []

    def begin(self, source=None):
        """Somebody in the middle of the handshake; without an address through the Unix socket."""
        server = self.server
        address = (server.host, server.port) if source else str(server.socket_path)
        client = rawnbd.Client(address, source=source)
        self.clients.append(client)
        client.handshake()
        return client.structured_reply()

    def open(self, source, name):
        client = self.begin(source)
        client.go(name)
        return client

    def refusal(self, source, name):
        """The sentence with which an export is refused, or "" where it is there."""
        try:
            self.begin(source).info(name)
            return ""
        except OptionError as e:
            assert e.type == REP_ERR_UNKNOWN
            return e.data.decode()

    def reread(self, rules, marks=("were read again", "stay as they were")):
        def count():
            return sum(self.server.log().count(mark) for mark in marks)

        before = count()
        self.path.write_text(rules)
        os.kill(self.server.pid, signal.SIGHUP)
        wait_until(lambda: count() > before, 20 * SLOW, "the rules are read again")

    def close(self):
        for client in self.clients:
            client.close()


@pytest.fixture
def guarded(servers, folder):
    made = []

    def make(*args, **more):
        made.append(Guarded(servers, folder, *args, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def shared(module_servers, module_folder):
    """For tests that change no rules."""
    made = Guarded(module_servers, module_folder)
    for name in "daily-1", "weekly", "daily-2":
        made.server.cli("snapshot", "create", f"b@{name}")
    made.server.cli("snapshot", "create", "a@s")
    yield made
    made.close()


def names(client):
    return [name for name, _ in client.list()]


def is_open(client):
    """Whether the server serves the connection still."""
    try:
        return client.read(0, 512) is not None
    except (rawnbd.Closed, ConnectionError):
        return False


# --- what one may not open is not there ----------------------------------------------------


def test_only_what_is_granted_is_listed(shared):
    assert names(shared.begin(ALICE)) == ["a"]
    assert names(shared.begin(BOB)) == ["a", "b"]
    assert names(shared.begin(CAROL)) == []
    assert names(shared.begin(NOBODY)) == []
    assert names(shared.begin()) == ["a", "b", "hidden"]


@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
def test_hidden_and_missing_volumes_are_told_apart_by_nothing(shared, option):
    """Not by the error, nor by its words, which name no other volume either."""
    for name in "hidden", "b", "b@weekly", "hidden@s", "@", "b@", "hidde", "/etc/passwd":
        answers = []
        for asked in name, "z" * len(name):
            with pytest.raises(OptionError) as refused:
                shared.begin(ALICE).info(asked, option=option)
            assert refused.value.type == REP_ERR_UNKNOWN
            answers.append(refused.value.data.decode().replace(asked, "?"))
        assert answers[0] == answers[1] and "hidden" not in answers[0], answers


def test_what_is_missing_among_what_one_may_open_gives_no_hints(guarded):
    own = guarded("any rw secret-1 vm*\n", {"vm1": "1M", "secret-12": "1M"})
    assert own.refusal(ALICE, "vm2") == own.refusal(ALICE, "vm3").replace("vm3", "vm2")
    assert "secret-12" not in own.refusal(ALICE, "secret-1")
    assert "vm1" not in own.refusal(ALICE, "vm2")


def test_export_name_of_a_hidden_volume_closes(shared):
    for name in b"hidden", b"zzzzzz":
        client = shared.begin(ALICE)
        client.send_option(OPT_EXPORT_NAME, name)
        client.expect_closed(20 * SLOW)


@pytest.mark.parametrize("option", [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT])
def test_contexts_of_hidden_volumes(shared, option):
    for name in "hidden", "zzzzzz":
        with pytest.raises(OptionError) as refused:
            shared.begin(ALICE).meta_context(option, name, ["base:allocation"])
        assert refused.value.type == REP_ERR_UNKNOWN
    assert shared.begin(ALICE).meta_context(option, "a", ["base:allocation"])


def test_a_flood_of_refusals_is_answered(guarded):
    # Of its own: it uses up what the server may say about refusals for a while.
    own = guarded("any rw a\n", {"a": "1M", "hidden": "1M"})
    client = own.begin(ALICE)
    for _ in range(900):
        client.send_option(OPT_GO, client.go_data("hidden"))
    for _ in range(900):
        assert client.collect_option(OPT_GO)[1] == REP_ERR_UNKNOWN
    client.go("a")
    assert is_open(client)


def test_refusals_are_in_the_log_with_who_asked(shared):
    client = shared.begin(NOBODY)
    port = client.sock.getsockname()[1]
    with pytest.raises(OptionError):
        client.go("hidden")
    assert (f'client {NOBODY}:{port}: no export for it: there is no volume "hidden" that you may '
            "open here (no access rule grants it)") in shared.server.log()


# --- reading and writing ---------------------------------------------------------------------


def test_who_may_only_read_can_not_write(shared, rng):
    data = rng.randbytes(4096)
    writer, reader = shared.open(ALICE, "a"), shared.open(BOB, "a")
    assert not writer.export.flags & READ_ONLY and reader.export.flags & READ_ONLY
    writer.write(8192, data)
    assert reader.error_of(CMD_WRITE, 8192, payload=bytes(4096)) == EPERM
    assert reader.error_of(CMD_WRITE_ZEROES, 8192, 4096) == EPERM
    assert reader.error_of(CMD_TRIM, 8192, 4096) == EPERM
    assert reader.read(8192, 4096) == data == writer.read(8192, 4096)
    writer.write(8192, data[::-1])
    assert reader.read(8192, 4096) == data[::-1]


def test_the_user_of_a_unix_socket(guarded):
    own = guarded(f"user:{os.getuid() + 1} rw b\nuser:{os.getuid()} ro a\naddress:0.0.0.0/0 rw *\n")
    assert names(own.begin()) == ["a"]
    assert own.open(None, "a").export.flags & READ_ONLY
    assert own.refusal(None, "b")
    assert f"unix socket (uid {os.getuid()})" in own.server.log()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's server")
def test_another_user_by_name(guarded):
    own = guarded("user:nobody rw b\nuser:root ro a\n")
    own.server.socket_path.parent.chmod(0o755)
    own.server.folder.parent.chmod(0o755)
    own.server.socket_path.chmod(0o777)

    def seen(*prefix):
        return subprocess.run([*prefix, "nbdinfo", "--list", "--json", own.server.uri()],
                              capture_output=True, text=True, check=False).stdout

    assert '"export-name": "a"' in seen() and '"export-name": "b"' not in seen()
    nobodys = seen("setpriv", "--reuid", "nobody", "--clear-groups")
    assert '"export-name": "b"' in nobodys and '"export-name": "a"' not in nobodys


def test_libnbd_meets_it_too(shared):
    client = nbd.NBD()
    client.connect_uri(shared.server.uri("b"))
    assert client.get_size() == 2 * MIB
    client.shutdown()
    with pytest.raises(nbd.Error, match="no export named 'a'"):
        client = nbd.NBD()
        client.connect_uri(shared.server.uri("a", tcp=True))


# --- the default export ----------------------------------------------------------------------


def test_the_default_export_is_the_only_one_that_one_may_open(shared):
    assert shared.open(ALICE, "").export.name == "a"
    assert "you may open 2 volumes" in shared.refusal(BOB, "")
    assert "you may open 0 volumes" in shared.refusal(NOBODY, "")


def test_a_default_that_one_may_not_open(guarded):
    own = guarded(args=["--default", "b"])
    assert own.open(BOB, "").export.size == 2 * MIB
    words = own.refusal(ALICE, "")
    assert "no default export" in words and '"b"' not in words


# --- snapshots -------------------------------------------------------------------------------


def test_a_volume_includes_its_snapshots_and_not_the_other_way_round(shared):
    assert shared.open(ALICE, "a@s").export.flags & READ_ONLY
    assert shared.open(BOB, "b@weekly").export.flags & READ_ONLY
    assert shared.open(CAROL, "b@daily-1").export.flags & READ_ONLY
    assert shared.refusal(CAROL, "b@weekly") and shared.refusal(CAROL, "b")
    assert shared.refusal(ALICE, "b@daily-1")


def test_dirty_bitmaps_show_no_hidden_snapshots(shared):
    """What changed since a snapshot tells something of it, and its name does too."""
    def bitmaps(source, name):
        return [n for _, n in shared.begin(source).list_meta_context(name, BITMAP)]

    assert bitmaps(BOB, "b@daily-2") == [BITMAP + "weekly", BITMAP + "daily-1"]
    assert bitmaps(CAROL, "b@daily-2") == [BITMAP + "daily-1"]
    client = shared.begin(CAROL)
    assert client.set_meta_context("b@daily-2", BITMAP + "weekly") == []
    client = shared.begin(CAROL)
    assert client.set_meta_context("b@daily-2", BITMAP + "daily-1")
    client.go("b@daily-2")
    assert client.block_status(0, MIB) == {BITMAP + "daily-1": [(MIB, 0)]}


# --- the file is read again ------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_connections_that_lose_their_access_are_closed(guarded, threads):
    own = guarded(args=["--threads", threads])
    own.server.cli("snapshot", "create", "b@daily-1")
    own.server.cli("snapshot", "create", "b@weekly")
    alice, bob_a, bob_b = own.open(ALICE, "a"), own.open(BOB, "a"), own.open(BOB, "b")
    daily, weekly = own.open(CAROL, "b@daily-1"), own.open(BOB, "b@weekly")
    root = own.open(None, "a")
    everybody = [alice, bob_a, bob_b, daily, weekly, root]
    assert all(map(is_open, everybody))
    alice.write(0, b"x" * 512)

    own.reread(RULES)
    assert all(map(is_open, everybody))

    own.reread(f"user:{os.getuid()} rw *\naddress:{BOB} ro a\naddress:{CAROL} ro b@daily-1\n")
    for client in alice, bob_b, weekly:
        client.expect_closed(20 * SLOW)
    assert all(map(is_open, [bob_a, daily, root]))
    assert bob_a.read(0, 512) == b"x" * 512
    root.write(0, b"y" * 512)
    assert own.refusal(ALICE, "a") and not own.refusal(BOB, "a") and own.refusal(BOB, "b")
    assert "the access rules do not let it open a any more" in own.server.log()

    # What is granted again is there again.
    own.reread(RULES)
    assert is_open(own.open(ALICE, "a"))


def test_one_who_may_only_read_from_now_on_is_closed_and_comes_back_to_read(guarded):
    own = guarded()
    alice, bob = own.open(ALICE, "a"), own.open(BOB, "a")
    own.reread(RULES.replace(f"address:{ALICE}       rw a", f"address:{ALICE} ro a"))
    alice.expect_closed(20 * SLOW)
    assert "do not let it write a any more" in own.server.log()
    assert is_open(bob)
    assert own.open(ALICE, "a").export.flags & READ_ONLY
    # More than it has does not disturb one who reads.
    own.reread(RULES.replace("ro a b", "rw a b"))
    assert is_open(bob) and bob.error_of(CMD_WRITE, 0, payload=b"z") == EPERM
    assert not own.open(BOB, "a").export.flags & READ_ONLY


def test_a_handshake_under_way_meets_the_new_rules(guarded):
    own = guarded()
    client = own.begin(ALICE)
    client.info("a")
    own.reread("any ro b\n")
    with pytest.raises(OptionError):
        client.go("a")
    assert names(client) == ["b"]
    client.go("b")
    assert is_open(client)


@pytest.mark.parametrize("broken", [RULES + "anybody ro *\n", "address:10.0.0.1/8 rw *\n",
                                    "user:no-such-user rw *\n", None])
def test_a_broken_new_file_keeps_the_old_rules(guarded, broken):
    own = guarded()
    alice = own.open(ALICE, "a")
    if broken is None:
        own.path.unlink()
        os.mkdir(own.path)
        os.kill(own.server.pid, signal.SIGHUP)
        wait_until(lambda: "stay as they were" in own.server.log(), 20 * SLOW, "it says so")
        line = "cannot read the access file"
    else:
        own.reread(broken)
        line = f"{own.path}:{len(broken.splitlines())}: "
    assert "the access rules stay as they were, the new ones are not used: " + line \
        in own.server.log()
    assert is_open(alice) and own.refusal(ALICE, "b") and not own.refusal(BOB, "b")


def test_a_change_while_the_one_before_is_being_read(guarded):
    """A pipe in the place of the file is read for as long as we like. Everybody is served
    meanwhile, and the second change is not lost."""
    own = guarded()
    alice = own.open(ALICE, "a")
    pipe = own.path.with_name("pipe")
    os.mkfifo(pipe)
    os.rename(pipe, own.path)

    def open_pipe():
        try:
            return os.open(own.path, os.O_WRONLY | os.O_NONBLOCK) + 1
        except OSError as e:
            assert e.errno == errno.ENXIO  # nobody reads it yet
            return 0

    os.kill(own.server.pid, signal.SIGHUP)
    writes = wait_until(open_pipe, 20 * SLOW, "the rules are being read") - 1
    os.unlink(own.path)
    own.path.write_text(f"address:{BOB} ro hidden\n")
    os.kill(own.server.pid, signal.SIGHUP)
    assert is_open(alice) and names(own.begin(BOB)) == ["a", "b"]
    os.write(writes, b"any ro b\n")
    os.close(writes)
    wait_until(lambda: names(own.begin(BOB)) == ["hidden"], 20 * SLOW, "the second rules hold")
    wait_until(lambda: not is_open(alice), 20 * SLOW, "alice is cut off")


def test_many_changes_at_once(guarded, rng):
    """Whatever is read again how often, in the end exactly the last rules hold."""
    own = guarded("any rw *\n", args=["--threads", "2"])
    sources = [f"127.0.1.{i}" for i in range(1, 5)]
    for _ in range(6):
        granted = {s: {v: rng.choice(["", "ro", "rw"]) for v in "ab"} for s in sources}
        opened = []
        for source in sources:
            for name in "ab":
                if not own.refusal(source, name):
                    opened.append((source, name, own.open(source, name)))
        for _ in range(rng.randrange(3)):
            own.path.write_text(RULES)
            os.kill(own.server.pid, signal.SIGHUP)
        lines = [f"address:{s} {right} {v}\n" for s, of in granted.items()
                 for v, right in of.items() if right]
        rng.shuffle(lines)
        own.path.write_text("".join(lines))
        os.kill(own.server.pid, signal.SIGHUP)

        def in_force():
            return all(names(own.begin(s)) == [v for v in "ab" if of[v]]
                       for s, of in granted.items())

        wait_until(in_force, 20 * SLOW, "the last rules are in force")
        for source, name, client in opened:
            right = granted[source][name]
            writes = not client.export.flags & READ_ONLY
            if not right or (writes and right == "ro"):
                wait_until(lambda: not is_open(client), 20 * SLOW,  # noqa: B023
                           f"{source} is cut off from {name}")


def test_hup_without_anything_to_read_again(servers):
    server = servers.start({"a": "1M"})
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: "neither access rules nor" in server.log(), 20 * SLOW, "it says so")
    server.check_alive()


def test_hup_ends_a_server_whose_terminal_is_gone(servers):
    server = servers.make({"a": "1M"}, tcp=False)
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "setsid", "--ctty", *server.command()], stdin=theirs,
        stdout=theirs, stderr=theirs, env=dict(os.environ, **server.store_env))
    os.close(theirs)
    try:
        wait_until(lambda: greets(str(server.socket_path)), 20 * SLOW, "it serves")
        os.close(ours)
        assert process.wait(20 * SLOW) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another user's server")
def test_a_user_whom_the_server_cannot_know_is_not_nobody(servers, folder):
    """In a user namespace without all users the kernel gives strangers the number of "nobody"."""
    rules = folder / "rules"
    rules.write_text("user:0 rw a\nuser:65534 rw a b\n")
    server = servers.make({"a": "1M", "b": "1M"}, ["--access", rules], tcp=False,
                          prefix=["unshare", "--user", "--map-root-user"])
    folder.chmod(0o755)
    with server:
        server.folder.chmod(0o755)
        server.socket_path.chmod(0o777)
        assert len(list_as(server, 0)) == 1
        assert list_as(server, 64321) == list_as(server, 65534) == []
    # Where all are known that number is somebody.
    server.prefix = []
    with server:
        server.socket_path.chmod(0o777)
        assert len(list_as(server, 65534)) == 2 and list_as(server, 64321) == []


def list_as(server, uid):
    """The names that nbdinfo shows a user."""
    done = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "nbdinfo", "--list",
         "--json", server.uri()], capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)["exports"] if done.returncode == 0 else []


# --- the start -------------------------------------------------------------------------------


@pytest.mark.parametrize("text,line", [("", 0), ("nobody ro v\n", 1), ("any rw v\nany rw\n", 2)])
def test_a_server_does_not_start_with_a_broken_file(servers, folder, text, line):
    path = folder / "rules"
    if line:
        path.write_text(text)
    server = servers.make({"a": "1M"})
    done = server.cli("serve", "--create", "a:1M", "--access", path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert (f"{path}:{line}: " if line else f"cannot open the access file {path}") in done.stderr
    assert server.cli("list", check=False).returncode != 0  # there is no store


def test_an_empty_file_lets_nobody_in(guarded):
    own = guarded("# later\n")
    assert names(own.begin()) == [] and own.refusal(None, "a")
    assert "the access rules let nobody in" in own.server.log()


OPEN = "OPEN TO THE NETWORK: whoever reaches 0.0.0.0:{} can read"


def test_a_server_open_to_the_network_says_so(servers, folder):
    rules = folder / "rules"
    rules.write_text("any ro a\n")
    server = servers.make({"a": "1M"}, host="0.0.0.0")
    server.start()
    said = OPEN.format(server.port) + " and overwrite every volume"
    wait_until(lambda: said in server.log(), 20 * SLOW, "it says so")
    server.stop()
    server.log_path.unlink()
    server.args = ["--read-only"]
    server.start()
    said = (OPEN.format(server.port) +
            " every volume, since nobody has to prove who he is, and data can be read")
    wait_until(lambda: said in server.log(), 20 * SLOW, "it says so")
    server.stop()
    open_to, plain = "OPEN TO THE NETWORK", "NOT ENCRYPTED: whoever is on the way between 0.0.0.0:"
    key = folder / "key"
    subprocess.run(["psktool", "-u", "a", "-p", key], check=True, capture_output=True)
    key.chmod(0o600)
    psk = ["--tls-psk", key, "--access", rules, "--tls"]
    for args, host, encrypted in (
            ([], "127.0.0.1", True), (["--access", rules], "127.0.0.1", True),
            (["--access", rules], "0.0.0.0", False), ([*psk, "on"], "0.0.0.0", False),
            ([*psk, "require"], "0.0.0.0", True)):
        server.log_path.unlink()
        server.args, server.host = args, host
        server.start()
        server.stop()
        assert "listening on" in server.log() and open_to not in server.log()
        assert (plain not in server.log()) == encrypted, (args, host)
