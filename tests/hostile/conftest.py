"""Lets this folder run alone with the options and fixtures all tests share."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tls"))

from harness.fixtures import *  # noqa: E402,F401,F403

import pytest  # noqa: E402

from pki import Pki  # noqa: E402
from siege import Siege  # noqa: E402


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def attack_program(tmp_path_factory):
    out = tmp_path_factory.mktemp("attack") / "attack"
    subprocess.run(["gcc", "-O2", "-o", out, Path(__file__).with_name("attack.c")], check=True)
    return out


@pytest.fixture
def siege(attack_program, folder, request):
    """siege(server) watches it; see siege.py."""
    made = []

    def begin(server, **more):
        made.append(Siege(server, attack_program, folder, request.node.name, **more))
        return made[-1]

    yield begin
    for one in made:
        one.end()
