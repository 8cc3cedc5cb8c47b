"""Sweeps in an empty folder, a clock that a test holds, and the invariants that must hold whatever happened."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedsweep.manager import ExperimentManager
from fedsweep.manager.clock import Clock
from fedsweep.manager.columns import RESULT_COLUMNS
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.schema import APPLICATION_ID
from fedsweep.plan.config import Source, parse
from fedsweep.plan.grid import Grid, expand

# 2 seeds; `first` has 8 cells that are 6 experiments (clean ones differ in nothing but the name of the attack),
# `second` has 4 cells, of which 2 are computed by `first`.
TWO_PHASES = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: "out/{phase}"}
seeds: [1, 2]
first:
  combinations:
    - poison_ratio: [0.0, 0.5]
    - poison_type: [label_flip, random_noise]
second:
  combinations:
    - poison_ratio: [0.0]
    - lr: [0.01, 0.02]
"""
TASKS, CELLS = 8, {"out/first": 8, "out/second": 4}
# A ledger as version 1 left it: ten tasks of three shapes; one complete, one failed once, one held, one given back.
VERSION_1 = Path(__file__).resolve().parents[1] / "golden" / "ledger_v1.sql"


class FakeClock(Clock):
    """A clock that stands still until it is moved; its time of day can be set apart."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.time_of_day = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time_of_day

    def monotonic(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        self.time_of_day += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, on a disk that nobody waits for: no test that uses it pulls a plug."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return tmp_path


def grid_of(text: str) -> Grid:
    return expand(parse([Source("grid.yaml", text)]))


@pytest.fixture(scope="session")
def make_grid() -> Callable[[str], Grid]:
    return grid_of


@pytest.fixture
def two_phases() -> str:
    return TWO_PHASES


@pytest.fixture
def ledgers(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[[], Ledger]]:
    """Open the ledger of this test again and again, each time as a new process would."""
    opened: list[Ledger] = []

    def reopen() -> Ledger:
        for ledger in opened:
            ledger.close()
        opened[:] = [Ledger(tmp_path / "ledger.sqlite3", clock)]
        return opened[0]

    yield reopen
    for ledger in opened:
        ledger.close()


def write_version_1(path: Path) -> None:
    """Write a ledger as version 1 left it."""
    db = sqlite3.connect(path)
    db.executescript(VERSION_1.read_text("utf-8"))
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A ledger of version 1."""
    write_version_1(tmp_path / "ledger.sqlite3")
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def managers(folder: Path, clock: FakeClock) -> Iterator[Callable[..., ExperimentManager]]:
    """Make the manager of a YAML text, with its tasks, as `start` does; the one before it is closed."""
    made: list[ExperimentManager] = []

    def make(text: str | None = TWO_PHASES, **options: Any) -> ExperimentManager:
        for manager in made:
            manager.close()
        configs = []
        if text is not None:
            (folder / "sweep.yaml").write_text(text)
            configs = ["sweep.yaml"]
        manager = ExperimentManager(configs, port=0, **{"clock": clock, **options})
        made.append(manager)
        manager.sweep.ledger._db.execute("PRAGMA synchronous = OFF")
        if configs:
            manager.load_all_configs()
            if not manager.load_state():
                manager.generate_all_tasks()
            manager.load_completed_tasks()
        return manager

    yield make
    for manager in made:
        manager.close()


def result_of(task: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A result that depends on the experiment alone, as results do."""
    share = int(task["signature"][-6:], 16) / 16**6
    history = [{"round": number, "val_loss": 1 / number, "val_acc": share, "nonfinite_clients": 0} for number in (1, 2)]
    plain = {"mean_test_acc": share, "mean_test_loss": 1 / 3, "mean_val_acc": 0.1, "mean_val_loss": 2.5}
    return {**plain, "outcome": "ok", "num_parameters": 33, "best_epoch": 2, "history": history, **changes}


@pytest.fixture(scope="session")
def make_result() -> Callable[..., dict[str, Any]]:
    return result_of


def rows_of(path: Path | str) -> list[dict[str, str]]:
    """The rows of a results file, strictly read: every row has as many fields as the header."""
    with Path(path).open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream, strict=True)
    assert tuple(header[: len(RESULT_COLUMNS)]) == RESULT_COLUMNS
    assert len(set(header)) == len(header)
    assert all(len(row) == len(header) for row in rows), f"a torn row in {path}"
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path | str], list[dict[str, str]]]:
    return rows_of


def assert_sound(ledger_file: Path | str, acknowledged: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Check what must hold of a ledger and its results files, read here by SQL and `csv` alone.

    At most one result and one open attempt for each task; counts that add up; every acknowledged result there; in
    each results file exactly one row for each cell with a result, with that cell's values and that result's.
    """
    db = sqlite3.connect(f"file:{ledger_file}?mode=ro", uri=True)
    try:
        _assert_tasks_are_sound(db)
        results = dict(db.execute("SELECT t.signature, r.data FROM results r JOIN tasks t ON t.number = r.task"))
        for signature, result in (acknowledged or {}).items():
            kept = json.loads(results[signature])
            assert {name: value for name, value in result.items() if name != "history"} == kept
        for (output_dir,) in db.execute("SELECT path FROM output_dirs WHERE active = 1").fetchall():
            _assert_file_is_sound(db, output_dir)
    finally:
        db.close()


def _assert_tasks_are_sound(db: sqlite3.Connection) -> None:
    def values(query: str) -> list[tuple[Any, ...]]:
        return db.execute(query).fetchall()

    assert not values("SELECT task FROM results GROUP BY task HAVING count(*) > 1")
    assert not values("SELECT task FROM attempts WHERE ended_as IS NULL GROUP BY task HAVING count(*) > 1")
    assert not values("SELECT number FROM tasks WHERE (status = 'complete') != (number IN (SELECT task FROM results))")
    assert not values(
        "SELECT t.number FROM tasks t LEFT JOIN attempts a ON a.task = t.number AND a.ended_as IS NULL "
        "WHERE t.attempt IS NOT a.number"
    )
    counted = Counter({tuple(row): amount for *row, amount in values("SELECT * FROM counts") if amount})
    assert counted == Counter(values("SELECT status, orphaned, diverged FROM tasks"))
    unfinished = dict(values("SELECT cost, amount FROM unfinished WHERE amount != 0"))
    open_or_waiting = "status IN ('pending', 'assigned') AND orphaned = 0"
    assert unfinished == dict(values(f"SELECT cost, count(*) FROM tasks WHERE {open_or_waiting} GROUP BY cost"))


def _assert_file_is_sound(db: sqlite3.Connection, output_dir: str) -> None:
    expected = Counter[tuple[Any, ...]]()
    names: set[str] = set()
    query = (
        "SELECT c.phase, c.spelled, t.signature, r.data FROM cells c JOIN tasks t ON t.number = c.task "
        "JOIN results r ON r.task = c.task WHERE c.output_dir = ?"
    )
    cells = db.execute(query, (output_dir,)).fetchall()
    path = Path(output_dir) / "final_results.csv"
    if not cells:
        return
    rows = rows_of(path)
    names = set(json.loads(cells[0][1])) & set(rows[0])
    for phase, spelled, signature, data in cells:
        values = {name: "" if value is None else str(value) for name, value in json.loads(spelled).items()}
        accuracy = json.loads(data).get("mean_test_acc")
        cell = (phase, signature, "" if accuracy is None else repr(accuracy))
        expected[(*cell, *(values[name] for name in sorted(names)))] += 1
    ours = {signature for _, _, signature, _ in cells}
    found = Counter(
        (row["phase"], row["signature"], row["mean_test_acc"], *(row[name] for name in sorted(names)))
        for row in rows
        if row["signature"] in ours
    )
    assert found == expected
    assert set(expected.values()) == {1}, "two cells of one folder cannot be told apart"


@pytest.fixture(scope="session")
def check_sound() -> Callable[..., None]:
    return assert_sound
