"""The examples of a Markdown file: its fenced blocks, and what is said of each to whoever runs them.

A block of `sh` is run, on the machine the file is about, and has to end with status 0. Anything
else is said in a comment right above it, which readers do not see; several of these parts, with a
`;` between them:

    <!-- example: PART; PART -->

    on NAME, NAME         on these machines, one after the other
    source                in the folder of the source, not in the user's
    kernel                in the machine's Linux guest (what needs a kernel: nbd-client, mount)
    stays until "TEXT"    it runs on until the end of the file; it is ready when it has said TEXT
    instead               what has stayed until here is ended first, as by Ctrl-C
    closes                the last one that stayed is ended first
    replaces              the last one that stayed ends by itself, with status 0
    ends with N           its exit status
    given COMMANDS        run before it: what the reader has, and the file does not make
    file PATH             a file: written there, mode 0755 where it begins with #!
    shows                 the last of what the block before it prints, but for numbers and blanks
    kills                 what stays on this machine need not do so any longer
    cluster               a FoundationDB cluster is needed; started with the first that says so
    in FILE               it is run by another test, which reads it from here
    not run: REASON       and why; it is still checked as far as its language can be

Of other languages (yaml, xml, ini, conf, text) each block needs such a comment.
"""

import re
from dataclasses import dataclass, field

COMMENT = re.compile(r"<!-- example:\s(.*?)\s-->", re.S)
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.M | re.S)
PARTS = ("on", "source", "kernel", "stays", "instead", "closes", "replaces", "ends", "given", "file", "shows", "kills", "cluster", "in", "not")


@dataclass
class Example:
    file: str
    line: int
    language: str
    text: str
    parts: dict = field(default_factory=dict)

    @property
    def place(self):
        return f"{self.file}:{self.line}"

    @property
    def why_not_run(self):
        """Why it is not run here, or None."""
        if "not" in self.parts:
            return self.parts["not"].partition(":")[2].strip()
        return f"run by {self.parts['in']}" if "in" in self.parts else None


def _parts(place, text):
    if text.startswith("not run:"):
        return {"not": " ".join(text.split()[1:]).replace("run:", ":", 1)}
    found = {}
    for part in re.split(rf";\s+(?=(?:{'|'.join(PARTS)})\b)", text):
        word, rest = (*part.split(None, 1), "")[:2]
        assert word in PARTS, f"{place}: \"{part.strip()}\" means nothing; see examples.py"
        found[word] = rest.strip()
    return found


def read(path, name):
    """All of a file's fenced blocks, in their order."""
    text = path.read_text()
    found, used = [], set()
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        before = text[:fence.start()].rstrip()
        comment = re.search(COMMENT.pattern + r"\Z", before[before.rfind("<!--"):], re.S) \
            if before.endswith("-->") else None
        if comment:
            used.add(before.rfind("<!--"))
        place = f"{name}:{line}"
        found.append(Example(name, line, fence[1], fence[2],
                             _parts(place, comment[1].strip()) if comment else {}))
    for comment in COMMENT.finditer(text):
        assert comment.start() in used, (
            f"{name}:{text.count(chr(10), 0, comment.start()) + 1}: nothing stands behind this comment")
    return found
