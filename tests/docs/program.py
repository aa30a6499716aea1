"""What the program says of itself: its commands, their parts and options, from --help."""

import re
import subprocess
from dataclasses import dataclass

from harness.server import program


@dataclass
class Option:
    name: str
    arg: str  # what stands for its value; empty: a flag
    help: str


@dataclass
class Command:
    name: str
    parts: list  # "create", "list" ... of a command that is several
    options: list


def _help(*words):
    done = subprocess.run([*program(), *words, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def _options(text):
    found = []
    for line in text.partition("\noptions:\n")[2].split("\n\n")[0].splitlines():
        m = re.fullmatch(r"  --([a-z-]+)(?: (\S+))?\s+(\S.*)", line)
        assert m, f"not as options are shown: {line!r}"
        found.append(Option(m[1], m[2] or "", m[3]))
    return found


def global_options():
    return _options(_help())


def commands():
    """All of them, in the order of the help."""
    listed = _help().partition("\ncommands:\n")[2].split("\n\n")[0]
    found = []
    for name in re.findall(r"^  ([a-z]+) ", listed, re.M):
        text = _help(name)
        parts = re.match(r"usage: fdb-nbd \S+ ([a-z]+(?:\|[a-z]+)+)(?: |\n)", text)
        found.append(Command(name, parts[1].split("|") if parts else [], _options(text)))
    return found
