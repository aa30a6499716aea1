"""The man pages say what the program says of itself, all of it and no more, and are well-formed."""

import re
import shutil
import subprocess

import pytest

import program
from harness.server import REPO

FOLDER = REPO / "docs" / "man"
PAGES = sorted(FOLDER.glob("*.[1-8]"))
OTHER_PAGES = {"fdb-nbd.1", "fdb-nbd.conf.5", "fdb-nbd-access.5", "fdb-nbd-format.5"}


def page_of(command):
    found = list(FOLDER.glob(f"fdb-nbd-{command}.[18]"))
    assert len(found) == 1, f"one page for {command}, not {found}"
    return found[0].read_text()


def items(text):
    """{option: (its value's name, what is said of it)} of a page's lists."""
    found = {}
    for item in re.split(r"^\.It ", text, flags=re.M)[1:]:
        head, _, body = item.partition("\n")
        m = re.fullmatch(r"Fl -(\S+)(?: Ar (.*))?", head)
        if m:
            found[m[1]] = (re.sub(r" |\b(Ns|Ar)\b", "", m[2] or ""), body.split("\n.El")[0])
    return found


def check_options(text, options):
    said = items(text)
    assert set(said) == {o.name for o in options}
    for option in options:
        arg, body = said[option.name]
        assert arg == option.arg, f"--{option.name} {option.arg}, not {arg}"
        # A default that is a value, and no phrase, is said too.
        default = re.search(r"\(default: (\d\w*|localhost:\d+|[a-z]+\d+|randread|info)\b", option.help)
        if default:
            assert default[1] in body, f"--{option.name}: default {default[1]}\n{body}"


@pytest.mark.parametrize("command", program.commands(), ids=lambda c: c.name)
def test_a_commands_page_has_its_options(command):
    text = page_of(command.name)
    check_options(text, command.options)
    parts = re.findall(r"^\.It Cm (\w+)", text, re.M)
    assert sorted(parts) == sorted(command.parts)
    for part in command.parts:
        assert re.search(rf"^\.(Nm fdb-nbd|Cm) {command.name} {part}$", text, re.M), f"synopsis of {part}"


def test_the_overview_has_all_commands_and_global_options():
    text = (FOLDER / "fdb-nbd.1").read_text()
    check_options(text, program.global_options())
    assert sorted(re.findall(r"^\.It Cm (\w+)", text, re.M)) == sorted(
        c.name for c in program.commands())


def test_no_page_is_of_a_command_that_is_not_there():
    names = {c.name for c in program.commands()}
    for page in PAGES:
        assert page.name in OTHER_PAGES or page.stem.removeprefix("fdb-nbd-") in names, page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_is_well_formed(page):
    text = page.read_text()
    title = re.match(r"\.Dd .*\n\.Dt (\S+) (\d)\n", text)
    assert (title[1].lower(), title[2]) == (page.stem, page.suffix[1:])
    for name, section in re.findall(r"^\.Xr (fdb-nbd\S*) (\d)", text, re.M):
        assert (FOLDER / f"{name}.{section}").exists(), f"{page.name} points to {name}({section})"
    for words in (["mandoc", "-Tlint", "-W", "warning"],
                  ["man", "--warnings", "-E", "UTF-8", "-Tutf8", "-Z", "-l"]):
        if not shutil.which(words[0]):
            pytest.skip(f"{words[0]} is not installed")
        done = subprocess.run([*words, page], capture_output=True, text=True)
        said = done.stderr + (done.stdout if words[0] == "mandoc" else "")
        assert done.returncode == 0 and not said, said


def test_all_pages_are_installed():
    listed = re.findall(r"'(.*)'", (FOLDER / "meson.build").read_text())
    assert sorted(listed) == [p.name for p in PAGES]


def test_the_readme_names_all_commands():
    table = (REPO / "README.md").read_text().partition("\n## Commands\n")[2].partition("\n## ")[0]
    named = {w for row in table.splitlines() if row.startswith("| ")
             for w in re.findall(r"`([a-z]+)", row.split(" | ")[0])}
    assert {c.name for c in program.commands()} <= named
