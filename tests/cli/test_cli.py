"""The command line: what each command does, prints, refuses and ends with."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading

import nbd
import pytest

from harness import stores
from harness.commands import (DONE, FAILED, NOTFOUND, STORE, USAGE, assert_one_sentence, connect,
                              on_terminal)
from harness.server import CLI_LIMIT_S, SLOW, cli, program, wait_until

COMMANDS = ["create", "list", "info", "rename", "resize", "remove", "snapshot", "clone", "flatten",
            "diff", "export", "import", "usage", "verify", "serve", "owner", "store", "bench"]
MIB = 1 << 20


def bare(*words, env=None, **more):
    """The program without a --store of the harness's."""
    return subprocess.run(program() + list(words), capture_output=True, text=True,
                          timeout=CLI_LIMIT_S, env=env, stdin=subprocess.DEVNULL, **more)


def clean_env(**more):
    keep = {k: v for k, v in os.environ.items()
            if k not in ("FDB_NBD_STORE", "FDB_NBD_LOG", "XDG_DATA_HOME")}
    return dict(keep, **more)


# --- help and usage ---------------------------------------------------------------------


def test_help_names_every_command():
    done = bare("--help")
    assert done.returncode == DONE
    for command in COMMANDS:
        assert re.search(rf"^  {command}\b", done.stdout, re.M), done.stdout
    assert "FDB_NBD_STORE" in done.stdout and "exit status" in done.stdout
    assert "fdb:[CLUSTER_FILE][?prefix=TEXT]" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command):
    done = bare(command, "--help")
    assert done.returncode == DONE and done.stderr == ""
    assert done.stdout.startswith(f"usage: fdb-nbd {command}")
    assert bare(command, "-h").stdout == done.stdout


def test_help_has_the_defaults():
    text = bare("serve", "--help").stdout
    for default in ("localhost:10809", "256M", "10000", "default: 1)", "never (default: 0)",
                    "no limit"):
        assert default in text
    text = bare("create", "--help").stdout
    assert "lmdb: 16K" in text and "default: lz4" in text


def test_version():
    done = bare("--version")
    assert done.returncode == DONE
    assert re.fullmatch(r"fdb-nbd \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("words", [
    [], ["--bad"], ["bad"], ["list", "--bad"], ["list", "more"], ["create"], ["create", "a"],
    ["create", "a", "1G", "more"], ["create", "a", "1G", "--block-size"],
    ["create", "a", "1G", "--block-size", "5K"], ["create", "a", "1G", "--block-size", "2K"],
    ["create", "a", "1G", "--block-size", "128K"], ["create", "a", "1G", "--block-size", "x"],
    ["create", "a", "1G", "--compression", "gzip"], ["create", "a", "1G", "--compression", "lz4:3"],
    ["create", "a", "1G", "--compression", "zstd:0"],
    ["create", "a", "1G", "--compression", "zstd:20"],
    ["create", "a", "1G", "--compression", "zstd:"],
    ["create", "a", "1G", "--compression", "zstdx"],
    ["create", "a", "1G", "--description", "x" * 1025],
    ["create", "a", "1G", "--description", "\x1b[31mred"],
    ["info"], ["info", "a", "b"], ["rename", "a"], ["resize", "a"], ["resize", "a", "x"],
    ["resize", "a", "513"], ["remove"], ["remove", "a", "--yes=1"], ["owner"], ["owner", "show"],
    ["owner", "take", "a"], ["store"], ["store", "bad"], ["serve", "more"],
    ["serve", "--threads", "0"], ["serve", "--threads", "65"], ["serve", "--threads", "x"],
    ["serve", "--cache-size", "31M"], ["serve", "--cache-size", "x"],
    ["serve", "--threads", "9", "--cache-size", "256M"],
    ["serve", "--lease-ms", "999"], ["serve", "--lease-ms", "600001"],
    ["serve", "--store-timeout", "x"], ["serve", "--store-timeout", "-1"],
    ["serve", "--store-timeout", "99ms"], ["serve", "--store-timeout", "86401"],
    ["serve", "--store-timeout", "1m"], ["serve", "--store-timeout", "ms"],
    ["serve", "--quota", "x"], pytest.param(["serve", "--quota", "1G"], marks=pytest.mark.lmdb("it has none")),
    ["serve", "--lease-ms", "-1"], ["serve", "--create", "a"], ["serve", "--create", "a:"],
    ["serve", "--create", ":1G"], ["serve", "--create", "a b:1G"], ["serve", "--create", "a:1"],
    ["serve", "--default", "/"], ["--log-level", "loud", "list"], ["--config", "/none", "list"],
])
def test_bad_usage(run, folder, words):
    run(*words, status=USAGE)
    assert not (folder / "store").exists()


# --- create -----------------------------------------------------------------------------


def test_create_list_info(run, store):
    done = run("create", "plain", "10G")
    assert "plain" in done.stdout and store in done.stdout
    run("create", "other", "1536", "--block-size", "4K", "--compression", "zstd:7",
        "--description", "h\u00e9 \u20ac")
    run("create", "none", "1M", "--compression", "none", "--block-size", "64K")

    table = run("list")
    lines = table.stdout.splitlines()
    assert lines[0].split() == ["NAME", "SIZE", "USED", "BLOCK", "CODEC", "SNAPSHOTS", "PARENT",
                                "OWNER"]
    assert [line.split() for line in lines[1:]] == [
        ["none", "1M", "0B", "64K", "none", "0", "-", "-"],
        ["other", "1.5K", "0B", "4K", "zstd:7", "0", "-", "-"],
        ["plain", "10G", "0B", "16K", "lz4", "0", "-", "-"]]
    assert store in table.stderr and "3 volumes" in table.stderr

    listed = run.json("list")
    assert listed["store"] == store
    assert [v["name"] for v in listed["volumes"]] == ["none", "other", "plain"]

    info = run.json("info", "other")
    assert info["name"] == "other" and info["size_bytes"] == 1536
    assert info["block_size_bytes"] == 4096 and info["compression"] == "zstd:7"
    assert info["description"] == "h\u00e9 \u20ac" and info["used_bytes"] == 0
    assert info["stored_bytes"] == 0 and info["epoch"] == 1 and info["generation"] == 0
    assert info["owner"] is None and info["store"] == store
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", info["created"])
    text = run("info", "other").stdout
    for part in ("1536 bytes", "zstd:7", "h\u00e9 \u20ac", "nobody", store):
        assert part in text

    done = run("create", "plain", "1G", status=FAILED)
    assert "plain" in done.stderr and store in done.stderr
    assert run.json("info", "plain")["size_bytes"] == 10 << 30


def test_options_may_stand_anywhere(run):
    run("create", "--block-size", "8K", "a", "--compression=none", "1M")
    assert json.loads(run("info", "--json", "a").stdout)["block_size_bytes"] == 8192


@pytest.mark.parametrize("size,bytes", [
    ("512", 512), ("1536", 1536), ("1000000512", 1000000512), ("64T", 64 << 40),
    (str((64 << 40) + 512), (64 << 40) + 512), ("65T", 65 << 40), ("1P", 1 << 50),
    ("4E", 1 << 62), ("1.5G", 3 << 29), ("10GiB", 10 << 30), ("0.5K", 512)])
def test_sizes(run, size, bytes):
    run("create", "a", size)
    assert run.json("info", "a")["size_bytes"] == bytes
    run("list")
    run("info", "a")


@pytest.mark.parametrize("size", ["0", "1", "511", "513", "1000", "-1", "", "G", "1.5", "10X", "1 G",
                                  "5E", "8E", "99999999999999999999", "0x200", "1G "])
def test_bad_sizes(run, folder, size):
    assert "size" in run("create", "--", "a", size, status=USAGE).stderr
    assert not (folder / "store").exists()


@pytest.mark.parametrize("name", ["a", "0", "a" * 128, "A-b_c.d", "1..2", "x-"])
def test_names(run, name):
    run("create", name, "1M")
    assert run.json("info", name)["name"] == name
    assert run("list").stdout.splitlines()[1].split()[0] == name


@pytest.mark.parametrize("name", ["", ".a", "_a", "a b", "a/b", "a@b", "a:b", "\u00e4", "a\n",
                                  "a" * 129, "a" * 5000])
def test_bad_names(run, folder, name):
    run("create", "--", name, "1M", status=USAGE)
    assert not (folder / "store").exists()
    run("create", "good", "1M")
    run("rename", "--", "good", name, status=USAGE)
    run("info", "--", name, status=USAGE if "@" in name else NOTFOUND)


def test_creates_at_once(run, store):
    """Of one name exactly one gets through; of several names all do, each its own volume."""
    def start(name):
        return subprocess.Popen(program() + ["--store", store, "create", name, "1M"],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    made = [start("same") for _ in range(6)] + [start(f"v{i}") for i in range(6)]
    ends = [(p.communicate(timeout=CLI_LIMIT_S)[1], p.returncode) for p in made]
    assert sorted(status for _, status in ends[:6]) == [DONE] + [FAILED] * 5, ends
    assert [status for _, status in ends[6:]] == [DONE] * 6, ends
    volumes = [run.json("info", v["name"]) for v in run.json("list")["volumes"]]
    assert len({v["branch"] for v in volumes}) == len(volumes) == 7


# --- which store ------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ["list"], ["info", "a"], ["rename", "a", "b"], ["resize", "a", "1G"], ["remove", "a", "--yes"],
    ["owner", "show", "a"], ["owner", "evict", "a", "--yes"], ["store", "info"],
    ["store", "upgrade"], ["serve", "--listen", "localhost:0"]])
def test_only_create_makes_a_store(run, folder, store, words):
    done = run(*words, status=STORE)
    assert store.split(":", 1)[1] in done.stderr
    run("list", status=STORE)
    assert not (folder / "store").exists()


@pytest.mark.lmdb("about its files")
def test_store_that_can_not_be(run, folder):
    (folder / "store").write_text("a file")
    run("list", status=STORE)
    run("create", "a", "1G", status=STORE)
    assert (folder / "store").read_text() == "a file"


@pytest.mark.parametrize("uri", ["", "nonsense", "nope:/x", "/abs/path", "lmdb:"])
def test_store_uri_that_means_nothing(uri):
    done = cli(uri, "list", check=False)
    assert done.returncode in (USAGE, STORE), done
    assert_one_sentence(done.stderr)


@pytest.mark.lmdb("about its files")
def test_damaged_store(run, folder):
    run("create", "a", "1M")
    for path in (folder / "store").iterdir():
        if path.is_file() and path.stat().st_size >= 8192:
            with open(path, "r+b") as f:
                f.write(os.urandom(8192))
    done = cli(f"lmdb:{folder}/store", "list", check=False)
    assert done.returncode in (FAILED, STORE), done
    assert_one_sentence(done.stderr)


def test_store_from_the_environment(folder, run, store):
    run("create", "a", "1M")
    env = clean_env(FDB_NBD_STORE=store)
    done = bare("--json", "list", env=env)
    assert json.loads(done.stdout)["store"] == store
    # The option comes first.
    done = bare("--store", f"lmdb:{folder}/none", "list", env=env)
    assert done.returncode == STORE and f"{folder}/none" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/usr/bin/setpriv"),
                    reason="needs another user than root")
@pytest.mark.lmdb("it is the default")
def test_default_store_of_a_user(folder):
    """As another user where this runs as root: root's default is the machine's own."""
    os.chmod(folder, 0o777)
    words = program()
    if os.geteuid() == 0:
        # The tree may lie where only root can read it.
        copy = shutil.copy(shutil.which(words[0]), folder / "program")
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                 str(copy)] + words[1:]

    def user(*command, **env):
        return subprocess.run(words + list(command), capture_output=True, text=True,
                              timeout=CLI_LIMIT_S, env=clean_env(**env))

    home = str(folder / "home")
    os.mkdir(home, 0o777)
    os.chmod(home, 0o777)
    assert user("create", "a", "1M", HOME=home).returncode == DONE
    assert (folder / "home/.local/share/fdb-nbd").is_dir()
    data = str(folder / "data")
    done = user("list", HOME=home, XDG_DATA_HOME=data)
    assert done.returncode == STORE and f"{data}/fdb-nbd" in done.stderr
    done = user("--json", "list", HOME=home, XDG_DATA_HOME="relative")
    assert json.loads(done.stdout)["store"] == f"lmdb:{home}/.local/share/fdb-nbd"


# --- the configuration file -------------------------------------------------------------


def test_settings_file(folder, run, store):
    run("create", "a", "1M")
    config = folder / "config"
    config.write_text(f"# where it is\n\n  store =  {store}  \nlisten = localhost:10809\n"
                      "listen = unix:/run/x\nread-only = no\nshared = YES\nlog-level = error\n"
                      "cache-size = 64M\n")
    env = clean_env(FDB_NBD_STORE=f"lmdb:{folder}/none")
    done = bare("--config", str(config), "--json", "list", env=env)
    assert json.loads(done.stdout)["store"] == store, done
    done = bare("list", "--config", str(config), "--store", f"lmdb:{folder}/other", env=env)
    assert done.returncode == STORE and "other" in done.stderr


@pytest.mark.parametrize("text,line", [
    ("store = lmdb:x\ncolour = red\n", 2), ("listen\n", 1), ("# fine\n\nlisten =\n", 3),
    ("= x\n", 1), ("read-only = maybe\n", 1), ("help = yes\n", 1), ("yes = yes\n", 1),
    ("store = lmdb:" + "x" * 5000 + "\n", 1), ("config = x\n", 1), ("json = yes\n", 1),
    ("log-level = loud\n", 1), ("store = lmdb:x\n\nstore = lmdb:x\n", 3),
    ("threads = 1\nlisten = :1\nlisten = :2\nthreads = 1\n", 4), ("threads = 1\nx\0y\n", 2),
    ("\n" * 10000 + "threads = 1\n", 10001)])
def test_bad_settings_file(folder, run, text, line):
    config = folder / "config"
    config.write_text(text)
    done = run("--config", config, "list", status=USAGE)
    assert f"{config}:{line}:" in done.stderr


@pytest.mark.parametrize("text", ["threads = many\n", "lease-ms = 1\n", "cache-size = 1M\n",
                                  "create = a\n", "default = /\n", "store-timeout = 1h\n",
                                  "quota = all\n"])
def test_bad_values_in_the_settings_of_serve(folder, run, text):
    config = folder / "config"
    config.write_text("# one line before\n" + text)
    done = run("--config", config, "serve", status=USAGE)
    assert f"{config}:2:" in done.stderr
    assert not (folder / "store").exists()


# --- rename, resize, remove -------------------------------------------------------------


def test_not_found(run, store):
    run("create", "example", "1M")
    for words in (["info", "exmaple"], ["rename", "exmaple", "b"], ["resize", "exmaple", "1G"],
                  ["remove", "exmaple", "--yes"], ["owner", "show", "exmaple"],
                  ["owner", "evict", "exmaple", "--yes"]):
        done = run(*words, status=NOTFOUND)
        assert 'did you mean "example"?' in done.stderr and store in done.stderr


def test_rename(run):
    run("create", "a", "1M")
    run("create", "b", "2M")
    run("rename", "a", "b", status=FAILED)
    run("rename", "a", "a", status=FAILED)
    run("rename", "a", "c")
    assert [v["name"] for v in run.json("list")["volumes"]] == ["b", "c"]
    assert run.json("info", "c")["size_bytes"] == MIB


def test_resize(run, store):
    run("create", "a", "1M")
    run("resize", "a", "1M")
    run("resize", "a", "65T")
    assert run.json("info", "a")["size_bytes"] == 65 << 40
    run("resize", "a", "1536", status=FAILED)
    run("resize", "a", "1536", "--shrink", status=FAILED)
    assert run.json("info", "a")["size_bytes"] == 65 << 40
    run("resize", "a", "1536", "--shrink", "--yes")
    info = run.json("info", "a")
    assert info["size_bytes"] == 1536 and info["owner"] is None
    # --shrink is leave, not an order: growing needs no --yes either way.
    run("resize", "a", "1M", "--shrink")


def test_remove(run, folder):
    run("create", "a", "1M")
    run("create", "b", "1M")
    done = run("remove", "a", status=FAILED)
    assert "--yes" in done.stderr
    assert len(run.json("list")["volumes"]) == 2
    run("remove", "a", "--yes")
    run("info", "a", status=NOTFOUND)
    run("remove", "a", "--yes", status=NOTFOUND)
    run("create", "a", "2M")
    assert run.json("info", "a")["branch"] == 3


@pytest.mark.parametrize("words,change", [
    (["remove", "a"], lambda run: run("info", "a", status=NOTFOUND)),
    (["resize", "a", "1M", "--shrink"],
     lambda run: run.json("info", "a")["size_bytes"] == MIB or pytest.fail("not resized"))])
def test_asking_on_a_terminal(run, store, words, change):
    run("create", "a", "2M")
    command = program() + ["--store", store] + words
    for no in ("no\n", "\n", "y\n", "\x04"):
        status, said = on_terminal(command, no)
        assert status == FAILED and '"a"' in said and "nothing was done" in said
        assert run.json("info", "a")["size_bytes"] == 2 * MIB
    status, said = on_terminal(command, "yes\n")
    assert status == DONE, said
    change(run)


# --- owner, store -----------------------------------------------------------------------


def test_owner_of_a_free_volume(run):
    run("create", "a", "1M")
    assert "nobody" in run("owner", "show", "a").stdout
    assert run.json("owner", "show", "a")["owner"] is None
    assert "free" in run("owner", "evict", "a").stdout


def test_store_info(run, store):
    run("create", "a", "1M")
    info = run.json("store", "info")
    assert info["uri"] == store and info["format"] == 1
    assert info["engine"].split()[0] == stores.engine()
    assert info["volumes"] == 1
    if not stores.on_fdb():
        # A cluster has no end that it would name, and tells what is used after a while.
        assert info["bytes_available"] > 0 and info["bytes_used"] > 0
    assert info["state"] is None
    assert info["features"] == {"compat": 0, "ro_compat": 0, "incompat": 0}
    assert re.fullmatch("[0-9a-f]{32}", info["uuid"])
    assert store in run("store", "info").stdout
    assert "nothing to do" in run("store", "upgrade").stdout


def test_full_output(run, store):
    run("create", "a", "1M")
    with open("/dev/full", "w") as full:
        done = subprocess.run(program() + ["--store", store, "info", "a"], stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=CLI_LIMIT_S)
    assert done.returncode == FAILED
    assert_one_sentence(done.stderr)


@pytest.mark.parametrize("redirected", ["list >&-", "list <&-", "create b 1M <&- >&-", "create c 1M 2>&-"])
def test_closed_standard_descriptors(run, store, redirected):
    """They are not taken for the first file that is opened: an error or none, and no crash."""
    run("create", "a", "1M")
    words = " ".join(shlex.quote(w) for w in program() + ["--store", store])
    done = subprocess.run(["sh", "-c", f"exec {words} {redirected}"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
                          timeout=CLI_LIMIT_S)
    assert done.returncode == (FAILED if ">&-" in redirected.replace("2>&-", "") else DONE)
    assert run("info", "a").returncode == DONE


# --- serve ------------------------------------------------------------------------------


def test_serve_creates_once_and_says_so(servers):
    server = servers.start({"a": "1M", "b": "2M"})
    log = server.log()
    assert 'created volume "a" of 1M' in log and f"serves {server.store}" in log
    for hint in ("nbd-client", "nbdinfo", "qemu-img"):
        assert hint in log
    client = connect(server, "a")
    client.pwrite(b"x" * 512, 0)
    client.shutdown()
    server.stop()
    server.start()
    assert 'volume "a" is there already' in server.log()
    client = connect(server, "a")
    assert client.pread(512, 0) == b"x" * 512
    client.shutdown()


def test_serve_refuses(run, folder, store):
    run("create", "a", "1M")
    listen = ["--listen", f"unix:{folder}/s"]
    done = run("serve", *listen, "--default", "b", status=NOTFOUND)
    assert '"b"' in done.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli(store, "serve", "--listen", f"127.0.0.1:{port}", check=False)
        assert done.returncode == FAILED and "in use" in done.stderr, done
    for address in ("127.0.0.1:99999", "unix:", "127.0.0.1:x", "127.0.0.1", ""):
        run("serve", "--listen", address, status=USAGE)
    run("serve", *(["--listen", "localhost:1"] * 17), status=USAGE)


def test_a_configuration_that_is_no_file(folder, run):
    for path, why in (folder, "directory"), (folder / "none", "No such file"):
        done = run("--config", path, "list", status=USAGE)
        assert str(path) in done.stderr and why in done.stderr
    (folder / "big").write_bytes(b"#" * ((1 << 20) + 1))
    assert "more than" in run("--config", folder / "big", "list", status=USAGE).stderr


def test_settings_of_serve(servers, folder):
    """What the command line says replaces what the file says; the rest of the file counts."""
    config = folder / "config"
    config.write_text(f"create = fromfile:1M\nlisten = unix:{folder}/never\nread-only = yes\n"
                      "default = fromfile\n")
    server = servers.start({}, ["--config", str(config)])
    assert not (folder / "never").exists()
    client = nbd.NBD()
    client.connect_uri(server.uri(""))
    assert client.get_size() == MIB and client.is_read_only()
    client.shutdown()


def test_commands_while_a_server_serves(servers):
    server = servers.start({"a": "1M", "b": "1M"})
    info = server.json("info", "a")
    assert info["owner"] is None
    client = connect(server, "a")
    client.pwrite(b"1" * MIB, 0)
    owner = server.json("owner", "show", "a")["owner"]
    assert owner["alive"] is True and owner["pid"] == server.pid
    assert str(server.pid) in server.cli("list").stdout
    wait_until(lambda: server.used_bytes("a") == MIB, 30 * SLOW, "the data is counted")

    server.cli("create", "made-later", "2M")
    later = connect(server, "made-later")
    assert later.get_size() == 2 * MIB
    later.shutdown()

    server.cli("rename", "a", "renamed")
    assert client.pread(512, 0) == b"1" * 512
    client.pwrite(b"2" * 512, 0)
    again = connect(server, "renamed")
    assert again.pread(512, 0) == b"2" * 512
    again.shutdown()

    # In use: resized by its owner, at once for who connects now; not removed.
    server.cli("resize", "renamed", "3M")
    again = connect(server, "renamed")
    assert again.get_size() == 3 * MIB
    again.pwrite(b"3" * 512, 3 * MIB - 512)
    again.shutdown()
    done = server.cli("resize", "renamed", "512K", check=False)
    assert done.returncode == FAILED and "--shrink" in done.stderr
    server.cli("resize", "renamed", "2M", "--shrink", "--yes")
    assert server.json("info", "renamed")["size_bytes"] == 2 * MIB
    done = server.cli("remove", "renamed", "--yes", check=False)
    assert done.returncode == FAILED and str(server.pid) in done.stderr
    assert_one_sentence(done.stderr)
    assert client.pread(512, 0) == b"2" * 512
    client.shutdown()

    # Nobody uses it any more: removed while the server goes on with the others.
    server.cli("remove", "renamed", "--yes")
    with pytest.raises(nbd.Error):
        connect(server, "renamed")
    other = connect(server, "b")
    other.pwrite(b"b" * 512, 0)
    other.shutdown()


def test_evict(servers):
    server = servers.start({"a": "1M"})
    client = connect(server, "a")
    client.pwrite(b"1" * 512, 0)
    done = server.cli("owner", "evict", "a", check=False)
    assert done.returncode == FAILED and "--yes" in done.stderr
    server.cli("owner", "evict", "a", "--yes")
    with pytest.raises(nbd.Error):
        client.pread(512, 0)
        client.pread(512, 0)
    assert server.json("owner", "show", "a")["owner"] is None
    client = connect(server, "a")
    assert client.pread(512, 0) == b"1" * 512
    client.shutdown()


@pytest.mark.lmdb("elsewhere it is fenced; fdb/test_gateways.py")
def test_evict_from_a_server_that_stands_still(servers):
    """One that does not answer is ended; what it had answered is there (G1)."""
    server = servers.start({"a": "1M"})
    client = connect(server, "a")
    client.pwrite(b"1" * 4096, 0)
    os.kill(server.pid, signal.SIGSTOP)
    done = server.cli("owner", "evict", "a", "--yes")
    assert "did not answer" in done.stdout
    assert server.process.wait(10 * SLOW) == -signal.SIGKILL
    server.process = None
    server.start()
    client = connect(server, "a")
    assert client.pread(4096, 0) == b"1" * 4096
    client.shutdown()


@pytest.mark.lmdb("only here a process is known to be dead; fdb/test_gateways.py")
def test_volume_of_a_server_that_died(servers):
    """Commands take over from a dead server, with every answered write (G1)."""
    server = servers.start({"a": "1M", "b": "1M"})
    clients = [connect(server, name) for name in ("a", "b")]
    for client in clients:
        client.pwrite(b"1" * 4096, 0)
    server.kill()
    assert server.json("owner", "show", "a")["owner"]["alive"] is False
    assert "dead" in server.cli("list").stdout
    server.cli("resize", "a", "2M")
    assert server.json("info", "a")["owner"] is None
    server.cli("remove", "b", "--yes")
    server.volumes = {}
    server.start()
    client = connect(server, "a")
    assert client.get_size() == 2 * MIB and client.pread(4096, 0) == b"1" * 4096
    client.shutdown()


def test_many_commands_at_once_while_serving(servers):
    server = servers.start({"a": "1M"})
    client = connect(server, "a")
    client.pwrite(b"1" * 512, 0)
    ends = []

    def resize(size):
        ends.append(server.cli("resize", "a", size, check=False).returncode)

    threads = [threading.Thread(target=resize, args=(f"{n}M",)) for n in range(2, 6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    # One that comes after a larger one is refused for want of --shrink.
    assert set(ends) <= {DONE, FAILED} and DONE in ends, ends
    assert server.json("info", "a")["size_bytes"] == 5 * MIB or FAILED in ends
    assert client.pread(512, 0) == b"1" * 512
    client.shutdown()
