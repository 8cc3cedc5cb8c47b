"""Looking into the ledger: every question that changes nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from pydantic_core import from_json

from fedsweep.errors import StateError
from fedsweep.manager.failures import CANCELLED_ERROR
from fedsweep.manager.records import Counts, History, Holder, Row, Status, Task, UnknownTask


class LedgerView:
    """What a ledger says. Reads only; the present grid's tasks are *present*, orphans are not."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def counts(self) -> Counts:
        """How many tasks are in which state."""
        amounts: dict[str, int] = {}
        for row in self._db.execute("SELECT status, orphaned, diverged, amount FROM counts"):
            state = "orphaned" if row["orphaned"] else row["status"]
            amounts[state] = amounts.get(state, 0) + row["amount"]
            if row["diverged"] and not row["orphaned"]:
                amounts["diverged"] = amounts.get("diverged", 0) + row["amount"]
        return Counts(**amounts)

    def task(self, task_id: str) -> Task:
        """The task with this id.

        Raises:
            UnknownTask: there is none.
        """
        return self._task("task_id = ?", task_id)

    def task_number(self, number: int) -> Task:
        """The task in this row of the ledger."""
        return self._task("number = ?", number)

    def all_tasks(self) -> Iterator[Task]:
        """Every task, orphans too, in the order in which they were added."""
        for row in self._db.execute("SELECT number FROM tasks ORDER BY number").fetchall():
            yield self.task_number(row["number"])

    def cells_of(self, task: int) -> list[tuple[str, str, dict[str, Any]]]:
        """The cells of a task that the present grid asks for: phase, output folder, parameters as spelled there."""
        rows = self._db.execute(
            "SELECT phase, output_dir, spelled FROM cells WHERE task = ? AND active = 1 ORDER BY position", (task,)
        )
        return [(row["phase"], row["output_dir"], json.loads(row["spelled"])) for row in rows]

    def last_attempt(self) -> int:
        """The highest number that an attempt ever had."""
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'attempts'").fetchone()
        return 0 if row is None else int(row["seq"])

    def meta(self, key: str) -> str | None:
        """A note kept with the ledger, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row["value"])

    def task_with_signature(self, signature: str) -> Task | None:
        """The task of this computation, or None."""
        try:
            return self._task("signature = ?", signature)
        except UnknownTask:
            return None

    def tasks_with_match_key(self, match_key: str) -> list[Task]:
        """The present tasks that a row with these values may belong to, see `enrolment.MATCH_PARAMETERS`."""
        rows = self._db.execute("SELECT number FROM tasks WHERE match_key = ? AND orphaned = 0", (match_key,))
        return [self.task_number(row["number"]) for row in rows.fetchall()]

    def task_ids(self, status: Status | None = None) -> list[str]:
        """Ids of the present tasks (in that state), in the order of the grid."""
        condition = "" if status is None else " AND status = ?"
        values = () if status is None else (status,)
        query = f"SELECT task_id FROM tasks WHERE orphaned = 0{condition} ORDER BY position"
        return [row["task_id"] for row in self._db.execute(query, values)]

    def complete_signatures(self) -> list[str]:
        """Signatures of the present tasks that have a result, in the order of the grid."""
        query = "SELECT signature FROM tasks WHERE orphaned = 0 AND status = 'complete' ORDER BY position"
        return [row["signature"] for row in self._db.execute(query)]

    def failed(self, limit: int = 20) -> list[tuple[str, str]]:
        """Id and last error of the present tasks that failed for good, the first ones of them; not the cancelled."""
        rows = self._db.execute(
            "SELECT task_id, last_error FROM tasks WHERE status = 'failed' AND orphaned = 0 AND last_error IS NOT ? "
            "ORDER BY position LIMIT ?",
            (CANCELLED_ERROR, limit),
        )
        return [(row["task_id"], row["last_error"] or "") for row in rows]

    def failed_attempts(self) -> int:
        """How many attempts failed of the present tasks that are tried again. Reads those and the open attempts."""
        waiting = "FROM tasks INDEXED BY queue WHERE status = 'pending' AND orphaned = 0 AND alone = 1"
        running = "FROM attempts a JOIN tasks t ON t.number = a.task WHERE a.ended_as IS NULL"
        query = f"SELECT (SELECT total(failures) {waiting}) + (SELECT total(t.failures) {running})"
        return int(self._db.execute(query).fetchone()[0])

    def phases(self) -> list[str]:
        """The phases of the present grid, in its order."""
        rows = self._db.execute("SELECT phase FROM cells WHERE active = 1 GROUP BY phase ORDER BY min(position)")
        return [row["phase"] for row in rows]

    def has_phase(self, phase: str) -> bool:
        """Whether the present grid has a phase of this name."""
        return self._db.execute("SELECT 1 FROM cells WHERE active = 1 AND phase = ?", (phase,)).fetchone() is not None

    def tasks_of_phases(self, phases: Sequence[str], *, shared: bool) -> list[int]:
        """The tasks that these phases ask for; if not `shared`, without those that another phase asks for too."""
        marks = ", ".join("?" * len(phases))
        condition = f"max(phase IN ({marks}))" if shared else f"min(phase IN ({marks}))"
        query = f"SELECT task FROM cells WHERE active = 1 GROUP BY task HAVING {condition} ORDER BY min(position)"
        return [row["task"] for row in self._db.execute(query, tuple(phases))]

    def workers_since(self, moment: datetime) -> list[str]:
        """Workers with an open attempt, or one that ended after that moment."""
        rows = self._db.execute(
            "SELECT DISTINCT worker FROM attempts WHERE ended_at IS NULL OR ended_at >= ?", (moment.isoformat(),)
        )
        return [row["worker"] for row in rows]

    def holders(self) -> list[Holder]:
        """The workers that hold tasks, those that hold the most first."""
        rows = self._db.execute(
            "SELECT worker, count(*) AS tasks, max(lease_s) AS lease_s FROM attempts WHERE ended_as IS NULL "
            "GROUP BY worker ORDER BY tasks DESC, worker"
        )
        return [Holder(worker_id=row["worker"], tasks=row["tasks"], lease_s=row["lease_s"]) for row in rows]

    def _task(self, condition: str, value: object) -> Task:
        found = self._db.execute(
            "SELECT t.*, a.worker, a.started_at FROM tasks t LEFT JOIN attempts a ON a.number = t.attempt "
            f"WHERE t.{condition}",
            (value,),
        ).fetchone()
        if found is None:
            raise UnknownTask(f"no task has the id {str(value)[:80]!r}")
        return _task_of(found, self._output_dirs_of(found["number"]) or (found["output_dir"],))

    def _output_dirs_of(self, task: int) -> tuple[str, ...]:
        rows = self._db.execute("SELECT output_dir FROM cells WHERE task = ? AND active = 1 ORDER BY position", (task,))
        return tuple(dict.fromkeys(row["output_dir"] for row in rows))

    def rows_of(self, task: int) -> list[Row]:
        """The rows that the result of this task has: one for each of its cells, in the order of the grid."""
        return list(self._rows("c.task = ? ORDER BY c.position", task))

    def rows_in(self, output_dir: str) -> Iterator[Row]:
        """All rows that the CSV of this folder must have, in the order in which the results came.

        Read to its end before the ledger is changed.
        """
        return self._rows("c.output_dir = ? ORDER BY r.number, c.position", output_dir)

    def _rows(self, condition: str, value: object) -> Iterator[Row]:
        rows = self._db.execute(
            "SELECT c.output_dir, c.phase, c.spelled, t.signature, r.data FROM cells c "
            f"JOIN results r ON r.task = c.task JOIN tasks t ON t.number = c.task WHERE {condition}",
            (value,),
        )
        for row in rows:
            yield Row(
                output_dir=row["output_dir"],
                phase=row["phase"],
                spelled=from_json(row["spelled"]),
                signature=row["signature"],
                result=_result(row["data"], row["signature"]),
            )

    def without_result(self, output_dir: str) -> Iterator[tuple[str, dict[str, Any], Status, str | None]]:
        """The cells of this folder in the present grid that have no result.

        Phase, parameters as spelled there, how its task stands, and the last error of that.
        """
        rows = self._db.execute(
            "SELECT c.phase, c.spelled, t.status, t.last_error FROM cells c JOIN tasks t ON t.number = c.task "
            "WHERE c.output_dir = ? AND c.active = 1 AND t.orphaned = 0 AND t.status != 'complete' ORDER BY c.position",
            (output_dir,),
        )
        for row in rows:
            yield row["phase"], from_json(row["spelled"]), row["status"], row["last_error"]

    def cells_in(self, output_dirs: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
        """Every cell of these folders, those that are not in the present grid first.

        Phase, signature, parameters as spelled there, and whether it is in the present grid.
        """
        marks = ", ".join("?" * len(output_dirs))
        rows = self._db.execute(
            "SELECT c.phase, t.signature, c.spelled, c.active FROM cells c JOIN tasks t ON t.number = c.task "
            f"WHERE c.output_dir IN ({marks}) ORDER BY c.active, c.position",
            tuple(output_dirs),
        )
        for row in rows:
            yield row["phase"], row["signature"], from_json(row["spelled"]), bool(row["active"])

    def output_dirs(self) -> dict[str, bool]:
        """Every folder that has cells, and whether the present grid writes to it."""
        rows = self._db.execute("SELECT path, active FROM output_dirs ORDER BY path")
        return {row["path"]: bool(row["active"]) for row in rows}

    def varying(self, output_dir: str) -> tuple[str, ...]:
        """The parameters in which the cells of this folder differ."""
        row = self._db.execute("SELECT varying FROM output_dirs WHERE path = ?", (output_dir,)).fetchone()
        return () if row is None else tuple(json.loads(row["varying"]))

    def result(self, task: int) -> dict[str, Any]:
        """The result of a task, history included, exactly as it was accepted.

        Raises:
            UnknownTask: it has none.
        """
        found = self._db.execute("SELECT data, history FROM results WHERE task = ?", (task,)).fetchone()
        if found is None:
            raise UnknownTask(f"task {task} has no result")
        return _whole(found)

    def results(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every signature with its result, in the order of acceptance. Read to its end before the ledger is changed."""
        rows = self._db.execute(
            "SELECT t.signature, r.data, r.history FROM results r JOIN tasks t ON t.number = r.task ORDER BY r.number"
        )
        for row in rows:
            yield row["signature"], _whole(row)

    def histories(self, output_dir: str, after: int = 0, limit: int = 50) -> list[History]:
        """Results of this folder that have a history, in the order of acceptance, from behind place `after`."""
        # With its `+` the folder is looked at in the few cells of a task, not the task in all cells of the folder.
        rows = self._db.execute(
            "SELECT r.number, t.signature, t.task_id, t.seed, r.data, r.history "
            "FROM results r JOIN tasks t ON t.number = r.task WHERE r.number > ? AND r.history IS NOT NULL "
            "AND EXISTS (SELECT 1 FROM cells c WHERE c.task = r.task AND +c.output_dir = ?) ORDER BY r.number LIMIT ?",
            (after, output_dir, limit),
        )
        return [
            History(row["number"], row["signature"], row["task_id"], row["seed"], _whole(row))
            for row in rows.fetchall()
        ]

    def conflicts(self) -> list[dict[str, Any]]:
        """Results that came second and differ from the first: signature, worker, attempt, data."""
        rows = self._db.execute(
            "SELECT t.signature, c.worker, c.attempt, c.data FROM conflicts c JOIN tasks t ON t.number = c.task"
        )
        return [{**dict(row), "data": json.loads(row["data"])} for row in rows]

    def unfinished_cost(self) -> float:
        """The expected cost of everything that waits or is under way."""
        return float(self._db.execute("SELECT total(cost * amount) FROM unfinished").fetchone()[0])

    def cost(self, task_id: str) -> float:
        """The expected cost of a task, see `plan.cohort.expected_cost`; 0 where there is none of this id."""
        row = self._db.execute("SELECT cost FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        return 0.0 if row is None else float(row["cost"])


def _result(data: str, signature: str) -> dict[str, Any]:
    try:
        result: dict[str, Any] = from_json(data)
    except ValueError:
        reason = f"the result of {signature} cannot be read; `fedsweep doctor` says what to do"
        raise StateError(reason) from None
    return result


def _whole(row: sqlite3.Row) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(row["data"])
    return data if row["history"] is None else {**data, "history": json.loads(row["history"])}


def _task_of(row: sqlite3.Row, output_dirs: tuple[str, ...]) -> Task:
    started_at = row["started_at"]
    return Task(
        number=row["number"],
        task_id=row["task_id"],
        signature=row["signature"],
        phase=row["phase"],
        config=json.loads(row["experiment"]) | json.loads(row["options"]),
        seed=row["seed"],
        cohort=row["cohort"],
        output_dir=row["output_dir"],
        output_dirs=output_dirs,
        status=row["status"],
        orphaned=bool(row["orphaned"]),
        attempt=row["attempt"],
        assigned_to=row["worker"],
        assigned_at=None if started_at is None else datetime.fromisoformat(started_at),
        failures=row["failures"],
        losses=row["losses"],
        last_error=row["last_error"],
    )
