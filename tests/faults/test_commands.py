"""System calls that fail beneath a command (G5, G6): `store backup`, `verify`, `export`, `import`,
`snapshot create` and `create` succeed, and then what they made is right, or end with one sentence
and leave nothing half done.

Every kind of call on every file that a command makes is tried in every way it can fail, at FAULTS
places (plan.py).
"""

import random
import re
import shutil
import subprocess

import pytest

import inject
from harness.server import SANITIZER_MARKS, SLOW, copy_store, program
from plan import cases, chosen, run_cases

pytestmark = pytest.mark.lmdb("about the files of the embedded store")


class Place:
    """A folder with a store and what a command is to make."""

    def __init__(self, base, folder):
        self.base, self.folder = base, folder
        self.store = copy_store(base.clean, folder / "store")
        self.uri = f"lmdb:{self.store}"
        self.image = folder / "image"
        self.image.write_bytes(base.clean_bytes)
        self.out, self.copy = folder / "out", folder / "copy"

    def run(self, *words, prefix=(), waits=None):
        """waits(): called when it has not ended after a while; it must end then."""
        process = subprocess.Popen([*prefix, *program(), "--store", self.uri, *map(str, words)],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        try:
            try:
                out, err = process.communicate(timeout=(8 if waits else 60) * SLOW)
            except subprocess.TimeoutExpired:
                if not waits:
                    raise
                waits()
                out, err = process.communicate(timeout=60 * SLOW)
                assert "error" in err, f"it waited, and did not say for what\n{err}"
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def names(self):
        return {line.split()[0] for line in self.run("list").stdout.splitlines()[1:]}

    def bytes_of(self, uri, name):
        out = self.folder / "check"
        done = subprocess.run([*program(), "--store", uri, "export", name, out],
                              capture_output=True, text=True, timeout=60 * SLOW)
        assert done.returncode == 0, done.stderr
        got = out.read_bytes()
        out.unlink()
        return got

    def left_over(self, fault):
        """Files that nobody asked for; the shim may keep a command from removing its own."""
        if fault.kind == "unlink":
            return []
        known = {"store", "image", "out", "copy", "check", "control"}
        return [p.name for p in self.folder.iterdir() if p.name not in known]


def backup_made(place):
    assert place.bytes_of(f"lmdb:{place.copy}", "v") == place.base.clean_bytes


def backup_not_made(place):
    assert not place.copy.exists(), "a backup that failed is there"


def export_made(place):
    assert place.out.read_bytes() == place.base.clean_bytes


def export_not_made(place):
    # Complete, where only its name could not be synced.
    if place.out.exists():
        export_made(place)


def import_made(place):
    assert place.bytes_of(place.uri, "w") == place.base.clean_bytes


def import_not_made(place):
    assert "w" not in place.names(), "a volume whose import failed is there"


def snapshot_made(place):
    assert place.bytes_of(place.uri, "v@s") == place.base.clean_bytes


def snapshot_not_made(place):
    listed = place.run("snapshot", "list", "v").stdout
    there = "v@s" in listed or "\ns " in listed
    assert not there, f"a snapshot that failed is there:\n{listed}"


def create_made(place):
    assert "x" in place.names()


def nothing(place):
    pass


# Words, what has to be so when it succeeded, and when it failed.
COMMANDS = {
    "backup": (lambda p: ("store", "backup", p.copy), backup_made, backup_not_made),
    "verify": (lambda p: ("verify", "v"), nothing, nothing),
    "export": (lambda p: ("export", "v", p.out), export_made, export_not_made),
    "import": (lambda p: ("import", p.image, "w"), import_made, import_not_made),
    "snapshot": (lambda p: ("snapshot", "create", "v@s"), snapshot_made, snapshot_not_made),
    "create": (lambda p: ("create", "x", "16M"), create_made, nothing),
}


def command_case(command):
    def judge(base, folder, fault, rng):
        words, made, not_made = COMMANDS[command]
        place = Place(base, folder)
        with inject.controlled(folder / "control") as control:
            control.arm(fault)
            # What has to be committed is tried for as long as the disk fails.
            done = place.run(*words(place), prefix=inject.words(base.shim, folder, control),
                             waits=control.disarm if fault.always else None)
            fired = control.fired
        said = f"{done.returncode}: {done.stdout}{done.stderr}"
        assert not any(mark in done.stderr for mark in SANITIZER_MARKS), said
        if done.returncode == 0:
            made(place)
        elif done.returncode == -6:
            # It may stop itself where no answer would be true.
            assert "stopping, so that nothing false is answered" in done.stderr, said
        else:
            assert 0 < done.returncode < 10, said
            # What the store logged may stand before it; a verdict on the volume is no failure.
            sentences = [line for line in done.stderr.splitlines() if line.startswith("fdb-nbd: ")]
            verdict = command == "verify" and "wrong" in done.stdout
            # One says what failed; where that failed too, others what it could not take away again.
            left = sentences and re.search(r'the snapshot "v@[^"]+", made for this command alone, '
                                           r'may be there still|cannot remove "w\.importing-\w+" in',
                                           sentences[-1])
            assert verdict or len(sentences) == 1 or left and len(sentences) <= 3, said
            # What fails although it was done, or could not be undone, is found there.
            if fault.kind not in ("rename", "unlink") or fault.how != "late":
                not_made(place)
        if place.left_over(fault) == ["copy.partial"] and (
                fault.kind == "lock" or done.returncode == -6):
            # It could not tell whose that is, or do anything any more: the next one takes it over.
            again = place.run(*words(place))
            assert again.returncode == 0, again.stderr
            made(place)
        if done.returncode == -6 and command == "export":
            for p in place.folder.glob("out.partial-*"):
                p.unlink()
        assert not place.left_over(fault), f"{place.left_over(fault)} left behind\n{said}"
        # The volume there was is what it was.
        assert place.bytes_of(place.uri, "v") == base.clean_bytes
        if not fired:
            return "not reached"
        return "stopped" if done.returncode == -6 else "failed" if done.returncode else "unharmed"
    return judge


def counts_of(base, folder, command):
    folder.mkdir()
    place = Place(base, folder)
    with inject.controlled(folder / "control") as control:
        done = place.run(*COMMANDS[command][0](place),
                         prefix=inject.words(base.shim, folder, control))
        assert done.returncode == 0, done.stderr
        COMMANDS[command][1](place)
        return control.counts()


@pytest.mark.limit(100000)
@pytest.mark.parametrize("command", list(COMMANDS))
def test_command(base, fast_folder, seed, command):
    rng = random.Random(f"{seed}:{command}")
    counts = counts_of(base, fast_folder / f"count-{command}", command)
    shutil.rmtree(fast_folder / f"count-{command}")
    run_cases(command, base, fast_folder, seed, chosen(cases(counts, rng), rng, 2),
              command_case(command))
