"""Shows that tests can fail: plants one fault at a time in a copy of the source, builds it, and
lets a test say whether it noticed.

A mutant is a list of small replacements. One whose place is no longer found, that does not build,
or that is judged otherwise than it should be, is WRONG. One copy and one build folder serve all
mutants, so that only what changed is compiled.
"""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Mutant:
    name: str
    replacements: list          # (file, what stands there, what stands there instead)
    must_fail: bool = True      # False: a control, or what is built on it shows nothing
    test: object = None         # what to run, as the judge knows it


class Tree:
    """A copy of the source to plant faults in."""

    def __init__(self, folder, options=()):
        self.folder = Path(folder)
        self.build = self.folder / "build"
        self.setup = ["meson", "setup", str(self.build), str(self.folder), *options]
        names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT,
                               check=True, capture_output=True, text=True).stdout.split("\n")
        for name in filter(None, names):
            source = ROOT / name
            if source.is_file():
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    @contextmanager
    def planted(self, replacements):
        """Yields None, or why they can't be planted. Afterwards the source is as before."""
        originals = {}
        problem = None
        for file, old, new in replacements:
            path = self.folder / file
            text = path.read_text()
            if text.count(old) != 1:
                problem = f"its place is found {text.count(old)} times in {file}"
                break
            originals.setdefault(path, text)
            path.write_text(text.replace(old, new))
        try:
            yield problem
        finally:
            for path, text in originals.items():
                path.write_text(text)

    def make(self, targets):
        """None, or the end of what the compiler said."""
        commands = [["ninja", "-C", str(self.build), *targets]]
        if not self.build.exists():
            commands.insert(0, self.setup)
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return done.stdout[-1500:] + done.stderr[-500:]
        return None


@contextmanager
def tree(options=()):
    """A tree in a folder that goes away again."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        yield Tree(folder, options)


def run(tree, mutants, targets, judge, only=None):
    """Plants each in turn and prints what came of it. `judge(mutant)` gives (whether the test
    failed, what happened), or None for the first where it did not run. Returns how many are
    WRONG."""
    wrong = 0
    for mutant in mutants:
        if only and only not in mutant.name:
            continue
        with tree.planted(mutant.replacements) as problem:
            problem = problem or tree.make(targets)
            failed, what = (None, problem) if problem else judge(mutant)
        good = failed is mutant.must_fail
        word = ("caught" if failed else "passed") if good else "WRONG"
        wrong += not good
        print(f"{word:8}  {mutant.name}: {what}", flush=True)
    return wrong


def environment(**more):
    return dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **more)
