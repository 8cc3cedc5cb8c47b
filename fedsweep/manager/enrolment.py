"""Making a grid's tasks the present ones of a ledger, without touching what is known of them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedsweep.manager.records import PlanChange
from fedsweep.plan.experiment import Experiment
from fedsweep.plan.grid import PlannedTask

# Experiments that agree in these have tensors of the same shapes, so one worker may train them together.
COHORT_PARAMETERS = ("dataset", "model_type", "width_factor", "depth", "batch_size", "local_epochs", "num_clients")
# Parameters that are never normalised away, so that equal experiments agree in them however they are spelled.
MATCH_PARAMETERS = ("dataset", "model_type", "depth", "poison_ratio", "aggregator", "batch_size", "seed")
PARAMETERS = tuple(Experiment.model_fields)


def enrol(
    db: sqlite3.Connection,
    tasks: Sequence[PlannedTask],
    now: str,
    *,
    keep_others: bool = False,
    given_ids: Mapping[str, str] | None = None,
) -> PlanChange:
    """Add new tasks, keep known ones, orphan those that are gone (unless told to keep them), restore those that return.

    Runs in the caller's transaction. A known task keeps its id, state and result; its run options, phase and cells
    become those of the grid. Cells that are gone stay where a result fills them or may still do so. `given_ids` has
    the ids, by signature, that new tasks have already; a new task without one gets the next.
    """
    rows = db.execute("SELECT number, signature, orphaned, attempt FROM tasks").fetchall()
    planned = {task.signature for task in tasks}
    removed = [row for row in rows if not (keep_others or row["orphaned"] or row["signature"] in planned)]
    restored = sum(1 for row in rows if row["orphaned"] and row["signature"] in planned)
    numbers = {row["signature"]: row["number"] for row in rows}
    _orphan(db, removed, now)
    added = _store_tasks(db, tasks, numbers, given_ids or {})
    if not keep_others:
        db.execute("UPDATE cells SET active = 0 WHERE active = 1")
    _store_cells(db, tasks, numbers)
    _store_output_dirs(db)
    db.execute("DELETE FROM counts")
    db.execute("INSERT INTO counts SELECT status, orphaned, diverged, count(*) FROM tasks GROUP BY 1, 2, 3")
    return PlanChange(
        added=added,
        kept=len(planned) - added - restored,
        removed=len(removed),
        restored=restored,
        ended_attempts=tuple(row["attempt"] for row in removed if row["attempt"] is not None),
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


def _store_tasks(
    db: sqlite3.Connection, tasks: Sequence[PlannedTask], numbers: dict[str, int], given_ids: Mapping[str, str]
) -> int:
    """Insert the new tasks, noting their `numbers`, and bring the known ones up to date; how many are new."""
    known = [(position, task) for position, task in enumerate(tasks) if task.signature in numbers]
    new = [(position, task) for position, task in enumerate(tasks) if task.signature not in numbers]
    present = ((_present_columns(position, task), numbers[task.signature]) for position, task in known)
    db.executemany(
        "UPDATE tasks SET phase = ?1, output_dir = ?2, options = ?3, position = ?4, orphaned = 0 WHERE number = ?5 "
        "AND (phase, output_dir, options, position, orphaned) IS NOT (?1, ?2, ?3, ?4, 0)",
        ((*columns, number) for columns, number in present),
    )
    ids = TaskIds((row["task_id"] for row in db.execute("SELECT task_id FROM tasks")), given_ids)
    ids.reserve(tasks)
    first = db.execute("SELECT coalesce(max(number), 0) + 1 FROM tasks").fetchone()[0]
    numbers.update((task.signature, number) for number, (_, task) in enumerate(new, start=first))
    db.executemany(
        "INSERT INTO tasks "
        "(number, signature, task_id, seed, match_key, cohort, experiment, phase, output_dir, options, position) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (numbers[task.signature], *_identity_columns(task, ids), *_present_columns(position, task))
            for position, task in new
        ),
    )
    return len(new)


def _identity_columns(task: PlannedTask, ids: TaskIds) -> tuple[str, str, int, str, str, str]:
    values = parameters(task.experiment)
    task_id = ids.take(task)
    keys = (join(values, MATCH_PARAMETERS), join(values, COHORT_PARAMETERS))
    return (task.signature, task_id, values["seed"], *keys, dump(values))


def _present_columns(position: int, task: PlannedTask) -> tuple[str, str, str, int]:
    return task.phase, task.output_dir, dump(task.options.model_dump()), position


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


def _store_cells(db: sqlite3.Connection, tasks: Sequence[PlannedTask], numbers: Mapping[str, int]) -> None:
    db.executemany(
        "INSERT INTO cells (task, digest, phase, output_dir, spelled, position) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (task, digest) DO UPDATE SET active = 1, position = excluded.position",
        ((*columns, position) for position, columns in enumerate(_cell_columns(tasks, numbers))),
    )
    db.execute(
        "DELETE FROM cells WHERE active = 0 AND task NOT IN (SELECT task FROM results) "
        "AND task NOT IN (SELECT task FROM attempts)"
    )


def _cell_columns(tasks: Iterable[PlannedTask], numbers: Mapping[str, int]) -> Iterator[tuple[object, ...]]:
    for task in tasks:
        for cell in task.cells:
            spelled = dump(parameters(cell.experiment))
            digest = hashlib.sha256(f"{dump([cell.phase, cell.output_dir])}{spelled}".encode()).digest()[:12]
            yield numbers[task.signature], digest, cell.phase, cell.output_dir, spelled


def _store_output_dirs(db: sqlite3.Connection) -> None:
    """Note every folder that has cells, and in which parameters those differ: its rows need these as columns."""
    differences: dict[str, _Differences] = {}
    active: set[str] = set()
    for row in db.execute("SELECT output_dir, spelled, active FROM cells"):
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
