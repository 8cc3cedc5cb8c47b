"""A crash at every point where something leaves a manager: nothing acknowledged is lost, no file stays torn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("crash_points.py")
# One point of so many, and the first of each kind; 1: every point, both with a second crash and without.
STRIDE = int(os.environ.get("FEDSWEEP_STRIDE", "8"))


def around(*kinds: str, also_in: bool = False) -> set[str]:
    return {f"{when} {kind}" for kind in kinds for when in ("before", "after", *(["in"] if also_in else []))}


def all_around(what: str, kinds: Iterable[str], also_in: bool = False) -> set[str]:
    return around(*(f"{what} {kind}" for kind in kinds), also_in=also_in)


DERIVED = ("options_of", "cohort_of", "sharing_of", "cost_of")
WANTED = {
    "a sweep": all_around("commit of", ["store_plan", "adopt", "together", "set_meta"])
    | all_around("send", ["task", "ack", "no_task"], also_in=True)
    | around("write final_results.csv", "migration", also_in=True)
    | all_around("fsync", ["first", "second", "out", ".final_results.csv.tmp", "final_results.csv", "token.tmp"])
    | all_around("fsync", ["final_results.csv.torn-1", ".summary.csv.tmp", ".history.parquet.tmp"])
    | all_around("rename", ["ledger.sqlite3", "token", "final_results.csv", "summary.csv", "history.parquet"])
    | around("rename last_status.json"),
    "a migration": around("migration", "commit of store_plan", "rename final_results.csv", also_in=False)
    | {f"in migration, {name}" for name in DERIVED},
    "a first import": around("migration", also_in=True)
    | all_around("commit of", ["take_over", "adopt"])
    | all_around("rename", ["ledger.sqlite3", "final_results.csv"])
    | around("fsync final_results.csv.torn-1"),
}


WANTED["a sweep on a network file system"] = WANTED["a sweep"]


def crash(folder: Path, scene: str, again: str) -> dict[str, Any]:
    arguments = [sys.executable, str(SCRIPT), str(folder), scene, "--stride", str(STRIDE), "--again", again]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc to tell files by")
@pytest.mark.timeout(900 if STRIDE == 1 else 300)
@pytest.mark.parametrize("again", ["even", "odd"] if STRIDE == 1 else ["even"])
@pytest.mark.parametrize("scene", WANTED)
def test_a_crash_at_any_point_needs_no_hand(tmp_path, scene, again):
    """Every second time the manager crashes once more, some points into the recovery from the first."""
    report = crash(tmp_path, scene, again)
    hits, points = Counter(report["hits"]), Counter(report["points"])
    crashes = f"{hits.total()} crashes at {points.total()} points of {len(points)} kinds"
    print(f"figures: {scene}: {crashes}, a second one in the recovery from {again} points")
    assert report["problems"] == []
    # A run that never hit a kind of point has shown nothing about it.
    assert set(hits) == set(points) >= WANTED[scene]
    assert STRIDE > 1 or hits == points
