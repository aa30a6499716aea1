"""The log's formats: what programs and the journal get of it, and that clients can't forge lines."""

import json
import re

import pytest

from harness import rawnbd
from harness.commands import USAGE
from harness.journald import Journald, under_systemd
from harness.server import SLOW, cli, wait_until

# What begins a line of its own, moves a cursor, turns writing round, or ends a string.
HOSTILE = 'x"\\\n2026-01-01T00:00:00.000Z error: forged\r\x1b[2J\x9b1m\u2028\u202e{"level":"error"}'
SAFE = 'x"\\ 2026-01-01T00:00:00.000Z error: forged??[2J?1m??{"level":"error"}'


def ask_for(server, name):
    """A client that asks for an export that is not there."""
    with rawnbd.Client(server.addresses()[0]) as client:
        client.handshake()
        with pytest.raises(rawnbd.OptionError):
            client.go(name)


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json(servers):
    server = servers.start({"v": "8M"}, ["--log-format", "json"])
    ask_for(server, HOSTILE)
    with rawnbd.connect(server, "v") as client:
        client.read(0, 512)
    server.stop()
    lines = json_lines("\n".join(
        line for line in server.log().splitlines() if not line.startswith("created volume")))
    assert all(list(line)[:3] == ["time", "level", "message"] for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
               for line in lines)
    ours = [line for line in lines if "running as root" not in line["message"]]
    assert {line["level"] for line in ours} == {"info"}
    entered = [line for line in lines if "entered export v" in line["message"]]
    assert len(entered) == 1 and entered[0]["volume"] == "v"
    assert entered[0]["client"] in entered[0]["message"]
    assert [line for line in lines if SAFE in line["message"]], lines


def test_text_forges_nothing(servers):
    server = servers.start({"v": "8M"})
    ask_for(server, HOSTILE)
    server.stop()
    assert SAFE in server.log()
    assert "\n2026-01-01" not in server.log() and "\x1b" not in server.log()


def test_what_cannot_start_says_so_in_the_same_format(folder):
    done = cli(f"lmdb:{folder}/none", "serve", "--log-format", "json", check=False)
    assert done.returncode == 4
    line, = json_lines(done.stderr)
    assert line["level"] == "error" and "there is no store" in line["message"]


@pytest.mark.parametrize("words, said", [
    (["--log-format", "xml"], '"xml" is not a log format (text, json, journal)'),
    (["--log-level", "loud"], '"loud" is not a log level (debug, info, warning, error)'),
])
def test_what_is_refused(store, run, words, said):
    assert said in run("list", *words, status=USAGE).stderr


# --- journald ---------------------------------------------------------------------------------

@pytest.fixture
def journald(folder):
    made = Journald(folder)
    yield made
    made.socket.close()


def test_the_journal_gets_fields(servers, journald):
    server = under_systemd(servers.make({"v": "8M"}, prefix=journald.prefix))
    with server:
        ask_for(server, HOSTILE)
        with rawnbd.connect(server, "v") as client:
            client.read(0, 512)
        wait_until(lambda: journald.has("entered export v"), 60 * SLOW, "it is in the journal")
    entry, = journald.has("entered export v")
    assert entry["VOLUME"] == "v" and entry["CLIENT"] in entry["MESSAGE"]
    assert entry["PRIORITY"] == "6" and entry["SYSLOG_IDENTIFIER"] == "fdb-nbd"
    assert journald.has(SAFE) and journald.has("fdb-nbd ") and journald.has("asked to end: stopping")
    assert all(set(e) <= {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "VOLUME", "CLIENT"}
               for e in journald.entries)
    # Nothing is said twice, and no examples for a terminal.
    assert server.log() == 'created volume "v" of 8M\n'


def test_errors_have_their_priority(folder, journald):
    done = cli(f"lmdb:{folder}/none", "serve", "--log-format", "journal", check=False,
               prefix=journald.prefix)
    assert done.returncode == 4 and done.stderr == ""
    entry, = journald.drain()
    assert entry["PRIORITY"] == "3" and "there is no store" in entry["MESSAGE"]


def test_a_journal_that_goes_away_is_stood_in_for(servers, journald):
    server = under_systemd(servers.make({"v": "8M"}, prefix=journald.prefix))
    with server:
        (journald.folder / "socket").unlink()
        with rawnbd.connect(server, "v") as client:
            client.read(0, 512)
    assert re.search(r"^<6>client .+ entered export v$", server.log(), re.MULTILINE)


def test_text_in_the_journal_has_severities(servers):
    server = under_systemd(servers.make({"v": "8M"}, ["--log-format", "text"]))
    with server:
        pass
    assert "\n<6>asked to end: stopping\n" in server.log()


def test_an_inherited_journal_stream_is_not_taken_for_stderr(servers):
    server = servers.make({"v": "8M"})
    server.env["JOURNAL_STREAM"] = "1:1"
    with server:
        pass
    assert "Z info: asked to end: stopping\n" in server.log()


def test_no_journald_is_said_at_the_start(folder, journald):
    (journald.folder / "socket").unlink()
    done = cli(f"lmdb:{folder}/none", "serve", "--log-format", "journal", check=False,
               prefix=journald.prefix)
    assert done.returncode == USAGE
    assert "there is no journald on this machine; use text or json" in done.stderr


def test_the_format_may_stand_in_the_settings_file(folder):
    settings = folder / "settings"
    settings.write_text("log-format = json\nlog-level = debug\n")
    done = cli(f"lmdb:{folder}/none", "serve", "--config", str(settings), check=False)
    assert json_lines(done.stderr)
    done = cli(f"lmdb:{folder}/none", "serve", "--config", str(settings), "--log-format", "text",
               check=False)
    assert done.stderr.startswith("fdb-nbd: "), "the command line comes first"
