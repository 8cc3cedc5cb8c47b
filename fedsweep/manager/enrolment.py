"""Making a grid's tasks the present ones of a ledger, without touching what is known of them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsweep.manager.records import PlanChange
from fedsweep.plan.cohort import cohort_key, expected_cost, sharing_key
from fedsweep.plan.experiment import Experiment
from fedsweep.plan.grid import Cell, PlannedTask

# Parameters that are never normalised away, so that equal experiments agree in them however they are spelled.
MATCH_PARAMETERS = ("dataset", "model_type", "depth", "poison_ratio", "aggregator", "batch_size", "seed")
PARAMETERS = tuple(Experiment.model_fields)
PAGE = 1000  # tasks that are written at once

Rows = Sequence[tuple[object, ...]]


def enrol(
    db: sqlite3.Connection,
    tasks: Sequence[PlannedTask],
    now: str,
    *,
    keep_others: bool = False,
    given_ids: Mapping[str, str] | None = None,
) -> PlanChange:
    """Add new tasks, keep known ones, orphan those that are gone (unless told to keep them), restore those that return.

    Runs in the caller's transaction. A known task keeps its id, state and result; its run options, phase, cells and
    place in the queue become those of the grid. Cells that are gone stay where a result fills them or may still do so.
    `given_ids` has the ids, by signature, that new tasks have already; a new task without one gets the next.
    """
    rows = db.execute("SELECT number, signature, orphaned, attempt FROM tasks").fetchall()
    planned = {task.signature for task in tasks}
    removed = [row for row in rows if not (keep_others or row["orphaned"] or row["signature"] in planned)]
    restored = sum(1 for row in rows if row["orphaned"] and row["signature"] in planned)
    _orphan(db, removed, now)
    if not keep_others:
        db.execute("UPDATE cells SET active = 0 WHERE active = 1")
    ids = TaskIds((row["task_id"] for row in db.execute("SELECT task_id FROM tasks")), given_ids or {})
    ids.reserve(tasks)
    writer = _Writer(db, {row["signature"]: row["number"] for row in rows}, ids)
    for start in range(0, len(tasks), PAGE):
        writer.store(start, tasks[start : start + PAGE])
    _forget_unused_cells(db)
    _store_output_dirs(db, writer.differences, every_cell=keep_others)
    count_again(db)
    return PlanChange(
        added=writer.added,
        kept=len(planned) - writer.added - restored,
        removed=len(removed),
        restored=restored,
        ended_attempts=tuple(row["attempt"] for row in removed if row["attempt"] is not None),
    )


def count_again(db: sqlite3.Connection) -> None:
    """Make the amounts that are kept beside the tasks those of the tasks."""
    db.execute("DELETE FROM counts")
    db.execute("INSERT INTO counts SELECT status, orphaned, diverged, count(*) FROM tasks GROUP BY 1, 2, 3")
    db.execute("DELETE FROM unfinished")
    db.execute(
        "INSERT INTO unfinished "
        "SELECT cost, count(*) FROM tasks WHERE status IN ('pending', 'assigned') AND orphaned = 0 GROUP BY cost"
    )


def _orphan(db: sqlite3.Connection, removed: Sequence[sqlite3.Row], now: str) -> None:
    """Orphan these tasks, and take those back that are handed out."""
    db.executemany("UPDATE tasks SET orphaned = 1 WHERE number = ?", ((row["number"],) for row in removed))
    held = [row for row in removed if row["attempt"] is not None]
    db.executemany(
        "UPDATE tasks SET status = 'pending', attempt = NULL WHERE number = ?", ((row["number"],) for row in held)
    )
    db.executemany(
        "UPDATE attempts SET ended_at = ?, ended_as = 'released' WHERE number = ?",
        ((now, row["attempt"]) for row in held),
    )


class _Writer:
    """Writes tasks with their cells, page by page: a grid of 100,000 is never in memory twice."""

    def __init__(self, db: sqlite3.Connection, numbers: dict[str, int], ids: TaskIds) -> None:
        self.added = 0
        self.differences: dict[str, _Differences] = {}
        self._db = db
        self._numbers = numbers
        self._ids = ids
        self._next_number = max(numbers.values(), default=0) + 1
        self._next_cell = 0

    def store(self, start: int, tasks: Sequence[PlannedTask]) -> None:
        """Store a page of tasks, the first of which has the position `start`."""
        inserts, updates, cells = [], [], []
        for position, task in enumerate(tasks, start):
            values = parameters(task.experiment)
            spelled = dump(values)
            present = (
                *(task.phase, task.output_dir, dump(task.options.__dict__), position),
                *(cohort_key(task.experiment, task.options.engine), sharing_key(task.experiment)),
                expected_cost(task.experiment),
            )
            number = self._numbers.get(task.signature)
            if number is None:
                number = self._numbers[task.signature] = self._next_number
                self._next_number += 1
                match_key = join(values, MATCH_PARAMETERS)
                fixed = (number, task.signature, self._ids.take(task), values["seed"], match_key, spelled)
                inserts.append((*fixed, *present))
            else:
                updates.append((*present, number))
            cells += [self._cell(number, cell, task, spelled) for cell in task.cells]
        self._write(inserts, updates, cells)
        self.added += len(inserts)

    def _cell(self, task_number: int, cell: Cell, task: PlannedTask, spelled: str) -> tuple[object, ...]:
        if cell.experiment is not task.experiment:
            spelled = dump(parameters(cell.experiment))
        self.differences.setdefault(cell.output_dir, _Differences()).note(cell.experiment.__dict__)
        digest = hashlib.sha256(f"{cell.phase}\0{cell.output_dir}\0{spelled}".encode()).digest()[:12]
        self._next_cell += 1
        return task_number, digest, cell.phase, cell.output_dir, spelled, self._next_cell

    def _write(self, inserts: Rows, updates: Rows, cells: Rows) -> None:
        self._db.executemany(
            "INSERT INTO tasks (number, signature, task_id, seed, match_key, experiment, "
            "phase, output_dir, options, position, cohort, sharing, cost) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            inserts,
        )
        self._db.executemany(
            "UPDATE tasks SET orphaned = 0, phase = ?1, output_dir = ?2, options = ?3, position = ?4, cohort = ?5, "
            "sharing = ?6, cost = ?7 WHERE number = ?8 AND (orphaned, phase, output_dir, options, position, cohort, "
            "sharing, cost) IS NOT (0, ?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            updates,
        )
        self._db.executemany(
            "INSERT INTO cells (task, digest, phase, output_dir, spelled, position) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (task, digest) DO UPDATE SET active = 1, position = excluded.position",
            cells,
        )


class TaskIds:
    """Hands out `{phase}_{number}_{seed}`; an id that once named another computation is never used again."""

    def __init__(self, taken: Iterable[str], given: Mapping[str, str]) -> None:
        self._taken = set(taken)
        self._given = given
        self._highest: dict[str, int] = {}
        self._moved: dict[tuple[str, int], int] = {}
        for task_id in self._taken:
            parts = task_id.rsplit("_", 2)  # ids that came with another tool's state may look otherwise
            if len(parts) == 3 and parts[1].isdecimal():
                self._note(parts[0], int(parts[1]))

    def reserve(self, tasks: Iterable[PlannedTask]) -> None:
        """Leave the numbers of this grid to the combinations that have them."""
        for task in tasks:
            self._note(task.phase, task.number)

    def _note(self, phase: str, number: int) -> None:
        self._highest[phase] = max(self._highest.get(phase, -1), number)

    def take(self, task: PlannedTask) -> str:
        """The id of a new task. Where it is taken, the combination moves to the next free number of its phase."""
        task_id = self._given.get(task.signature, "")
        if not task_id or task_id in self._taken:
            task_id = self._next(task.phase, task.number, task.experiment.seed)
        self._taken.add(task_id)
        return task_id

    def _next(self, phase: str, number: int, seed: int) -> str:
        wanted = f"{phase}_{self._moved.get((phase, number), number)}_{seed}"
        if wanted in self._taken:
            self._highest[phase] = self._moved[phase, number] = self._highest.get(phase, number) + 1
            wanted = f"{phase}_{self._moved[phase, number]}_{seed}"
        return wanted


def _forget_unused_cells(db: sqlite3.Connection) -> None:
    """Delete cells that are gone and whose task never ran: no row can come of them."""
    db.execute(
        "DELETE FROM cells WHERE active = 0 AND task NOT IN (SELECT task FROM results) "
        "AND task NOT IN (SELECT task FROM attempts)"
    )


def _store_output_dirs(db: sqlite3.Connection, differences: dict[str, _Differences], *, every_cell: bool) -> None:
    """Note every folder that has cells, and in which parameters those differ: its rows need these as columns.

    `differences` has the cells that were just written; the others are read.
    """
    active = set(differences)
    condition = "" if every_cell else "WHERE active = 0"
    for row in db.execute(f"SELECT output_dir, spelled, active FROM cells {condition}"):
        differences.setdefault(row["output_dir"], _Differences()).note(json.loads(row["spelled"]))
        if row["active"]:
            active.add(row["output_dir"])
    db.execute("DELETE FROM output_dirs")
    db.executemany(
        "INSERT INTO output_dirs (path, varying, active) VALUES (?, ?, ?)",
        ((path, dump(sorted(its.varying)), int(path in active)) for path, its in differences.items()),
    )


class _Differences:
    """The parameters in which the values that were noted differ."""

    def __init__(self) -> None:
        self.varying: set[str] = set()
        self._first: tuple[object, ...] | None = None

    def note(self, values: Mapping[str, Any]) -> None:
        these = tuple(map(values.get, PARAMETERS))
        self._first = self._first or these
        if these != self._first:
            pairs = zip(PARAMETERS, these, self._first, strict=True)
            self.varying.update(name for name, value, first in pairs if value != first)


def parameters(experiment: Experiment) -> dict[str, Any]:
    """The parameters of an experiment, which hold plain values only (so that no slower copy is needed)."""
    values = experiment.__dict__
    return {name: values[name] for name in PARAMETERS}


def join(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """The values of these parameters as one string."""
    return "|".join(str(values[name]) for name in names)


def dump(value: object) -> str:
    """Compact JSON; NaN is refused."""
    return _ENCODER.encode(value)


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
