"""The example configuration says all there is to say, and all it says is true."""

import re
import subprocess

import pytest

from harness.server import REPO, cli

EXAMPLE = REPO / "packaging" / "fdb-nbd.conf"
SETTING = re.compile(r"#([a-z][a-z-]*) = (\S.*)")
EXAMPLES = [m for m in map(SETTING.fullmatch, EXAMPLE.read_text().splitlines()) if m]


def options(*words):
    """Out of the help: name -> whether it takes a value, and whether it may come again."""
    said = cli("lmdb:/none", *words, "--help").stdout
    found = re.findall(r"^  --([a-z-]+)( [A-Z:_]+)? (.*)", said, re.M)
    return {name: (bool(value), "repeatable" in text) for name, value, text in found}


def test_every_option_of_serve_stands_in_the_example():
    wanted = {*options("serve"), *(n for n, (value, _) in options().items() if value)} - {"config"}
    assert {m[1] for m in EXAMPLES} == wanted


def refused_at(folder, text):
    """The line of the first mistake; there has to be one, so that no server starts."""
    path = folder / "conf"
    path.write_text(text)
    done = cli(f"lmdb:{folder}/none", "--config", path, "serve", check=False)
    assert done.returncode == 2, done
    return int(re.fullmatch(r"fdb-nbd: " + re.escape(str(path)) + r":(\d+): .*\n", done.stderr)[1])


def test_the_example_as_it_comes(folder):
    text = EXAMPLE.read_text()
    assert refused_at(folder, text + "\nno-such = 1\n") == len(text.splitlines()) + 2


@pytest.mark.parametrize("name,value", [m.groups() for m in EXAMPLES])
def test_each_line_of_the_example(folder, name, value):
    """Uncommented it is taken, and what stands behind it is the first mistake."""
    text = EXAMPLE.read_text().replace(f"#{name} = {value}\n", f"{name} = {value}\n")
    assert text != EXAMPLE.read_text()
    assert refused_at(folder, text + "no-such = 1\n") == len(text.splitlines()) + 1


def test_every_option_may_stand_in_the_file_and_only_some_twice(folder):
    repeatable = {name for name, (_, again) in options("serve").items() if again}
    for name, value in (m.groups() for m in EXAMPLES):
        line = f"{name} = {value}\n"
        first_mistake = 3 if name in repeatable else 2
        assert refused_at(folder, line + line + "no-such = 1\n") == first_mistake, name


def test_what_the_file_says_is_done(servers, folder):
    """Not only taken: the rules that it names are in force."""
    rules = folder / "rules"
    rules.write_text("any ro b\n")
    conf = folder / "conf"
    conf.write_text(f"access = {rules}\ncreate = b:1M\ncreate = c:1M\n")
    server = servers.start({}, ["--config", conf])
    seen = subprocess.run(
        ["nbdinfo", "--list", server.uri()], capture_output=True, text=True, check=True).stdout
    assert 'export="b"' in seen and 'export="c"' not in seen
