"""A crash at every point where something reaches the disk: nothing acknowledged is lost, no file stays torn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("crash_points.py")


@pytest.mark.parametrize(("again_after", "journal"), [(0, "log"), (5, "log"), (5, "rollback")])
def test_a_crash_at_any_point_needs_no_hand(tmp_path, again_after, journal):
    """Each point once; and again with a second crash, some points into the recovery from the first.

    With SQLite's write-ahead log, and with a rollback journal as on a network file system.
    """
    arguments = [str(tmp_path), str(again_after), journal]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    hits = Counter(report["hits"])
    # A run that never hit a kind of point has shown nothing about it.
    assert set(hits) == {
        f"{when} {kind}" for when in ("before", "after") for kind in ("commit", "write", "fsync", "rename")
    } | {"in write"}
    assert hits == Counter(report["points"])
    assert hits["before commit"] >= 10
    assert hits["in write"] >= 3
