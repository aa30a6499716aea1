"""Completion in bash and zsh: all commands and options of the program, and what is in the store."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import time

import pytest

import program
from harness.server import REPO
from harness.server import program as words
from harness.waiting import SLOW

BASH = REPO / "completion" / "fdb-nbd.bash"
ZSH = REPO / "completion" / "_fdb-nbd"
# Calls the function as bash would, and prints what it found.
ASK_BASH = """
COMP_WORDBREAKS=$' \\t\\n"\\'@><=;|&(:'
. "$1"
COMP_LINE=$2 COMP_POINT=${#2}
_fdb_nbd fdb-nbd
printf '%s\\n' "${COMPREPLY[@]}"
"""
# The functions of zsh's completion system that ours ends in, replaced by ones that print.
ASK_ZSH = """
compadd() {
    local -a words
    local suffix
    while [[ $1 == -* && $1 != -- && $1 != --* ]]; do
        case $1 in
        -S) suffix=$2; shift 2 ;;
        -a) words=(${(P)2}); shift 2 ;;
        esac
    done
    [[ $1 == -- ]] && shift
    words+=("$@")
    for word in $words; do [[ $word == $PREFIX* ]] && print -r -- $word; done
}
_describe() {
    [[ $1 == -o ]] && shift
    local -a words=(${(P)2})
    words=(${words%%:*})
    compadd -- $words
}
_files() { print FILES }
words=(${(z)2})
[[ $2 == *' ' ]] && words+=('')
CURRENT=$#words
PREFIX=$words[-1]
. $1
"""


@pytest.fixture(scope="module")
def store(module_folder):
    """A store with volumes and snapshots, and an fdb-nbd in the PATH."""
    path = module_folder / "bin"
    path.mkdir()
    (path / "fdb-nbd").write_text(f"#!/bin/sh\nexec {shlex.join(words())} \"$@\"\n")
    (path / "fdb-nbd").chmod(0o755)
    env = dict(os.environ, PATH=f"{path}:{os.environ['PATH']}", LC_ALL="C.UTF-8",
               FDB_NBD_STORE=f"lmdb:{module_folder}/store")
    for line in ("create disk 1M", "create data 1M", "snapshot create disk@monday", "snapshot create disk@may",
                 "snapshot create data@now", f"--store lmdb:{module_folder}/other create else 1M"):
        subprocess.run(["fdb-nbd", *line.split()], env=env, check=True, capture_output=True)
    env["OTHER"] = f"lmdb:{module_folder}/other"
    return env


def ask_bash(line, env):
    done = subprocess.run(["bash", "-c", ASK_BASH, "bash", BASH, line], env=env,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    # bash keeps what stands before an @.
    kept, at, _ = line.rpartition(" ")[2].rpartition("@")
    return [kept + f for f in done.stdout.split()]


def ask_zsh(line, env):
    done = subprocess.run(["zsh", "-f", "-c", ASK_ZSH, "zsh", ZSH, line], env=env,
                          capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout.split()


@pytest.fixture(params=["bash", "zsh"])
def ask(request, store):
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    go = ask_bash if request.param == "bash" else ask_zsh
    return lambda line: sorted(go(line, store))


def test_all_commands_and_global_options(ask):
    assert ask("fdb-nbd ") == sorted(c.name for c in program.commands())
    assert ask("fdb-nbd --") == sorted("--" + o.name for o in program.global_options())
    assert ask("fdb-nbd re") == ["remove", "rename", "resize"]
    assert ask("fdb-nbd --json --store lmdb:/x li") == ["list"]


def test_all_options_and_parts_of_each_command(ask):
    everywhere = ["--" + o.name for o in program.global_options()]
    for command in program.commands():
        assert ask(f"fdb-nbd {command.name} --") == sorted(
            everywhere + ["--" + o.name for o in command.options])
        if command.parts:
            assert ask(f"fdb-nbd {command.name} ") == sorted(command.parts)


def test_volumes_and_snapshots(ask, store):
    assert ask("fdb-nbd info ") == ["data", "disk"]
    assert ask("fdb-nbd info di") == ["disk"]
    assert ask("fdb-nbd rename data ") == []
    assert ask("fdb-nbd create ") == []
    assert ask("fdb-nbd owner show d") == ["data", "disk"]
    assert [f.rstrip("@") for f in ask("fdb-nbd snapshot remove d")] == ["data", "disk"]
    assert [f.rstrip("@") for f in ask("fdb-nbd snapshot create data@x di")] == ["disk"]
    assert ask("fdb-nbd snapshot remove disk@") == ["disk@may", "disk@monday"]
    assert ask("fdb-nbd snapshot remove disk@may disk@mo") == ["disk@monday"]
    assert ask("fdb-nbd snapshot list ") == ["data", "disk"]
    assert ask("fdb-nbd clone disk@mo") == ["disk@monday"]
    assert ask("fdb-nbd diff disk --since m") == ["may", "monday"]
    assert ask("fdb-nbd export data@") == ["data@now"]
    assert ask("fdb-nbd export --since now da") == ["data"]
    assert ask(f"fdb-nbd --store {store['OTHER']} info ") == ["else"]
    assert ask("fdb-nbd --store lmdb:/nowhere info ") == []


def test_values(ask):
    assert ask("fdb-nbd create new 1G --compression ") == ["lz4", "none", "zstd"]
    assert ask("fdb-nbd serve --default d") == ["data", "disk"]
    assert ask("fdb-nbd --log-level in") == ["info"]
    assert ask("fdb-nbd serve --tls re") == ["require"]
    assert ask("fdb-nbd --log-format j") == ["journal", "json"]


def test_a_person_at_bash(store, module_folder):
    """What is typed and what stands on the line after a tab, in a terminal."""
    rc = module_folder / "rc"
    rc.write_text(f". {BASH}\nPS1='ready> '\nbind 'set enable-bracketed-paste off'\n")
    pid, fd = pty.fork()
    if pid == 0:
        os.execvpe("bash", ["bash", "--rcfile", str(rc), "-i"], dict(store, TERM="dumb"))
    said = ""

    def until(text):
        nonlocal said
        deadline = time.monotonic() + 30 * SLOW
        while text not in said:
            assert time.monotonic() < deadline, f"no {text!r} in {said!r}"
            if select.select([fd], [], [], 0.1)[0]:
                said += os.read(fd, 4096).decode(errors="replace")

    try:
        until("ready> ")
        said = ""
        os.write(fd, b"fdb-nbd sna\tlis\tdi\t\r")
        until("fdb-nbd snapshot list disk \r\n")
        until("monday")
        until("ready> ")
        said = ""
        os.write(fd, b"fdb-nbd snapshot rename disk@mo\ttuesday\r")
        until("fdb-nbd snapshot rename disk@monday tuesday\r\n")
        until("ready> ")
        os.write(fd, b"fdb-nbd snapshot rename disk@tu\tmonday; exit\r")
        until("disk@tuesday monday; exit")
        os.waitpid(pid, 0)
        pid = 0
    finally:
        if pid:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        os.close(fd)
