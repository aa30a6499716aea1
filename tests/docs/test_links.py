"""What the documents point to is there."""

import re

import pytest

from harness.server import REPO

FILES = sorted(p.relative_to(REPO) for p in [REPO / "README.md", REPO / "SECURITY.md",
                                             *(REPO / "docs").rglob("*.md")])


def anchors(path):
    """Those that GitHub and others make of headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-")
            for h in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("name", FILES, ids=str)
def test_links(name):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", (REPO / name).read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (REPO / name).parent / path if path else REPO / name
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, ", ".join(broken)


def test_files_that_are_named_exist():
    programs = set(re.findall(r"executable\('(\w+)'", (REPO / "tests" / "meson.build").read_text()))
    for name in FILES:
        text = (REPO / name).read_text()
        for path in re.findall(r"\b((?:tests|bench|docs|packaging|scripts)/[\w/.-]*\w)", text):
            assert ((REPO / path).exists() or list(REPO.glob(path + "*"))
                    or path.removeprefix("tests/") in programs), f"{name} names {path}"
