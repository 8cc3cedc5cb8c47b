"""A ledger and its results files as plain values, read by SQL alone, so that a checker needs nothing of ours."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """A task of the ledger."""

    task_id: str
    signature: str
    status: str
    failures: int = 0
    losses: int = 0


@dataclass(frozen=True)
class Attempt:
    """A hand-out in the ledger."""

    number: int
    task_id: str
    worker: str
    ended_as: str | None = None
    started_at: str = ""  # ISO 8601


@dataclass(frozen=True)
class Result:
    """A result in the ledger, with its history."""

    task_id: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A place in a results file that has a row once its task has a result."""

    output_dir: str
    phase: str
    task_id: str
    spelled: Mapping[str, Any]


@dataclass(frozen=True)
class Ledger:
    """All that a checker wants to know."""

    tasks: tuple[Task, ...]
    attempts: tuple[Attempt, ...] = ()
    results: tuple[Result, ...] = ()
    cells: tuple[Cell, ...] = ()
    counted: Mapping[str, int] | None = None  # state -> tasks, as the ledger itself counts them


def read_ledger(path: Path) -> Ledger:
    """The ledger in this file, which no manager holds any more."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return Ledger(
            tasks=tuple(
                Task(*row) for row in db.execute("SELECT task_id, signature, status, failures, losses FROM tasks")
            ),
            attempts=tuple(
                Attempt(*row)
                for row in db.execute(
                    "SELECT a.number, t.task_id, a.worker, a.ended_as, a.started_at "
                    "FROM attempts a JOIN tasks t ON t.number = a.task"
                )
            ),
            results=tuple(
                Result(task_id, json.loads(data) | ({} if history is None else {"history": json.loads(history)}))
                for task_id, data, history in db.execute(
                    "SELECT t.task_id, r.data, r.history FROM results r JOIN tasks t ON t.number = r.task"
                )
            ),
            cells=tuple(
                Cell(output_dir, phase, task_id, json.loads(spelled))
                for output_dir, phase, task_id, spelled in db.execute(
                    "SELECT c.output_dir, c.phase, t.task_id, c.spelled FROM cells c JOIN tasks t ON t.number = c.task "
                    "WHERE c.active = 1"
                )
            ),
            counted=dict(db.execute("SELECT status, sum(amount) FROM counts GROUP BY status HAVING sum(amount) != 0")),
        )
    finally:
        db.close()


def read_files(folder: Path, ledger: Ledger) -> dict[str, bytes]:
    """The results files of the ledger's output folders, by folder; what is not there is empty."""
    paths = {cell.output_dir: folder / cell.output_dir / "final_results.csv" for cell in ledger.cells}
    return {name: path.read_bytes() if path.exists() else b"" for name, path in paths.items()}
