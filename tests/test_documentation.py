"""The documents are true where a machine can tell: links lead somewhere, commands exist, examples are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedsweep.cli import app
from fedsweep.plan.config import Source, parse
from fedsweep.plan.grid import expand

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_shows_every_command():
    shown = set(re.findall(r"fedsweep (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert shown >= COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_exist(page):
    for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for command in re.findall(r"^(?:\$ )?(?:\.venv/bin/)?fedsweep (\w+)", block, re.MULTILINE):
            assert command in COMMANDS, f"{page.name} shows `fedsweep {command}`"


def test_the_tests_that_are_named_exist():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    known = {name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE)}
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for page in PAGES:
        named = set(re.findall(r"\btest_\w+", page.read_text(encoding="utf-8")))
        assert named <= known | files, f"{page.name} names tests that are not there"


def test_the_study_in_the_readme_is_a_good_configuration():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    study = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert study
    assert expand(parse([Source("study.yaml", study.group(1))])).unique == 3 * 3 * 2 * 3


@pytest.mark.parametrize("name", ["quickstart.yaml", "mnist_small.yaml"])
def test_the_configurations_that_come_along_are_good(name):
    grid = expand(parse([Source(name, (ROOT / "configs" / name).read_text(encoding="utf-8"))]))
    assert (grid.unique, grid.duplicates) == {"quickstart.yaml": (78, 18), "mnist_small.yaml": (48, 16)}[name]
