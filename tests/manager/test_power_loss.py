"""Power goes at any moment, and of what was not synced any part is there: nothing that was promised is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("power_loss.py")


def lose_power(
    folder: Path, first: int, last: int, forgotten: str | None = None, journal: str = "log"
) -> dict[str, Any]:
    """Lose power for each seed from `first` to before `last`, with syncs of one kind forgotten if told so."""
    forget = [forgotten] if forgotten else []
    arguments = [sys.executable, str(SCRIPT), str(folder), str(first), str(last), journal, *forget]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("first", range(0, int(os.environ.get("FEDSWEEP_EXAMPLES", "500")), 250))
def test_nothing_that_was_promised_is_lost(tmp_path: Path, first: int) -> None:
    report = lose_power(tmp_path, first, first + 250)
    assert report["problems"] == []
    # A run that never hit a kind of moment has shown nothing about it.
    moments = ("write", "sync", "rename", "promise", "name", "file")
    assert {kind for kind in moments if report["hits"].get(kind)} == set(moments), report["hits"]
    assert {kind for kind in moments if report["hits"].get(f"second {kind}")} >= {"write", "sync", "promise"}
    assert min(report["hits"]["ended"], report["hits"]["spooled"]) >= 5
    assert len(report["traces"]) >= 3


def test_with_a_rollback_journal_nothing_is_lost_either(tmp_path: Path) -> None:
    """What the ledger has on a network file system."""
    report = lose_power(tmp_path, 0, 60, journal="rollback")
    assert report["problems"] == []
    moments = ("write", "sync", "rename", "promise", "name")
    assert {kind for kind in moments if report["hits"].get(kind)} == set(moments), report["hits"]


def test_a_journal_that_is_not_synced_would_be_found(tmp_path: Path) -> None:
    problems = lose_power(tmp_path, 0, 24, "the ledger's journal", "rollback")["problems"]
    assert problems


@pytest.mark.parametrize(
    ("forgotten", "words"),
    [
        ("the ledger's log", "acknowledged, but not in the ledger"),
        ("the ledger", "ledger"),
        ("results files", "not all rows stand in"),
        ("the spool", "is not in the spool"),
        ("checkpoints", "no checkpoint of"),
        ("folders", "acknowledged"),
    ],
)
def test_a_sync_that_is_forgotten_would_be_found(tmp_path: Path, forgotten: str, words: str) -> None:
    problems = lose_power(tmp_path, 0, 40, forgotten)["problems"]
    assert any(words in problem for _, _, problem in problems), problems
