"""docs/configuration.md says what the parameters say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fedsweep.plan.config import Source, parse
from fedsweep.plan.experiment import PARAMETERS
from fedsweep.plan.grid import expand
from fedsweep.plan.reference import render

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make_configuration(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "configuration.md")
    return module


def test_the_page_in_the_repository_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == render()


def test_every_parameter_has_its_row():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", render(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(PARAMETERS)
    assert all(len(re.split(r"(?<!\\)\|", rest)) == 4 for _, rest in rows)


def test_the_example_is_right_and_counts_what_the_text_says():
    (example,) = re.findall(r"```yaml\n(.*?)```", render(), flags=re.DOTALL)
    grid = expand(parse([Source("example.yaml", example)]))
    assert [phase.experiments for phase in grid.phases.values()] == [36, 9]
    assert "4 × 3 × 3 = 36" in render()


def test_making_the_page_and_checking_it(make_configuration, capsys):
    assert make_configuration.main(["--check"]) == 1
    assert make_configuration.main([]) == 0
    assert make_configuration.PAGE.read_text(encoding="utf-8") == render()
    assert make_configuration.main(["--check"]) == 0
    make_configuration.PAGE.write_text("stale", encoding="utf-8")
    capsys.readouterr()
    assert make_configuration.main(["--check"]) == 1
    assert capsys.readouterr().err == (
        "docs/configuration.md is not what the parameters say; run `make docs` and commit it\n"
    )
    assert make_configuration.main(["--chekc"]) == 2
