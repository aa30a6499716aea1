"""What the tests of the command line share: the program run to its end, exit statuses, a terminal."""

import json
import os
import pty
import subprocess

import nbd
import pytest

from . import stores
from .server import CLI_LIMIT_S, cli
from .waiting import SLOW, wait_until

DONE, FAILED, USAGE, NOTFOUND, STORE = range(5)


@pytest.fixture
def store(folder):
    return stores.uri(folder / "store")


@pytest.fixture
def run(store):
    """run(words...) gives the finished process; run(..., status=N) wants that exit status."""
    def go(*words, status=DONE, env=None, stdin=""):
        done = cli(store, *words, check=False, env={**stores.env(), **(env or {})}, stdin=stdin)
        assert done.returncode == status, (
            f"{words} gave {done.returncode}, not {status}\n{done.stdout}{done.stderr}")
        if status != DONE:
            assert_one_sentence(done.stderr)
        return done
    go.json = lambda *words: json.loads(go("--json", *words).stdout)
    return go


def assert_one_sentence(text):
    assert text.startswith("fdb-nbd: "), text
    assert text.count("\n") == 1 and text.endswith("\n"), text


def on_terminal(words, typed):
    """Runs the words with a terminal as stdin and stderr; gives status and what it said there."""
    main, other = pty.openpty()
    process = subprocess.Popen(words, stdin=other, stdout=subprocess.PIPE, stderr=other, text=True)
    os.close(other)
    said = b""
    try:
        while b": " not in said.split(b"Type", 1)[-1] or b"Type" not in said:
            said += os.read(main, 4096)
        os.write(main, typed.encode())
        process.wait(CLI_LIMIT_S)
        while True:
            more = os.read(main, 4096)
            if not more:
                break
            said += more
    except OSError:
        pass  # the other end was closed: the process is over
    finally:
        os.close(main)
        process.kill()
        process.stdout.close()
        process.wait()
    return process.returncode, said.decode()


def connect(server, name):
    client = nbd.NBD()
    client.connect_uri(server.uri(name))
    return client


def owner(server, name):
    return server.json("owner", "show", name)["owner"]


def wait_until_free(server, name):
    """A server whose last client has just left takes a moment to commit and let go."""
    wait_until(lambda: owner(server, name) is None, 30 * SLOW, f"nobody has {name}")
