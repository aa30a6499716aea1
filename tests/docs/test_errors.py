"""The messages of docs/guides/errors.md are those of the program."""

import re

from harness.server import REPO

# What clients and the kernel say, not we.
NOT_OURS = re.compile(r"nbd-client:|qemu:|libnbd:|No space left on device|Operation not permitted")


def sentences():
    """All texts in the source, with … where something is filled in."""
    found = []
    one = r'"(?:[^"\\]|\\.)*"'
    for path in (REPO / "src").rglob("*.c"):
        for literals in re.findall(rf"{one}(?:\s*(?:PRI\w+)?\s*{one})*", path.read_text()):
            literal = "".join(s[1:-1] for s in re.findall(one, literals)).replace('\\"', '"')
            found.append(" ".join(re.sub(r"%[-#.*0-9]*(?:ll|z|h)?[a-zA-Z]?", "…", literal).split()))
    return "\n".join(found)


def test_every_message_is_in_the_source():
    said = sentences()
    guide = (REPO / "docs" / "guides" / "errors.md").read_text()
    rows = [r for r in guide.splitlines() if r.startswith("| ") and not r.startswith("| what is said")]
    missing, looked_at = [], 0
    for row in rows:
        cell = row.split(" | ")[0]
        for message in re.findall(r"`([^`]+)`", cell):
            if NOT_OURS.search(cell) and message not in said:
                continue
            for piece in re.split(r"…", message):
                piece = piece.strip(' "(),;:')
                if len(piece) < 6:
                    continue
                looked_at += 1
                if piece not in said:
                    missing.append(f"{message}: \"{piece}\"")
    assert not missing, "\n".join(missing)
    assert looked_at > 60
