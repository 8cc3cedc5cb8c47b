"""What people decide about tasks: to try them again, or not to run them; and which tasks they mean by a name."""

from __future__ import annotations

import difflib
import sqlite3
from collections.abc import Sequence

from fedsweep.errors import UsageError
from fedsweep.manager.failure_view import FailureView
from fedsweep.manager.failures import CANCELLED_ERROR
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.records import UnknownTask

NEAREST_AMONG = 10_000  # names; the search looks at each
WAITED = 0  # in the place of an attempt, of a task that was not under way


class UnknownName(UsageError):
    """No task, phase or group of failures has this name. `fedsweep failures` names the groups."""


def retry(db: sqlite3.Connection, task: int) -> bool:
    """Let a failed task wait again; whether it had failed.

    Its failures and losses are forgiven. It goes out after tasks without a past, beside its like: a task that kills
    whatever runs beside it may still do so.
    """
    retried = db.execute(
        "UPDATE tasks SET status = 'pending', failures = 0, losses = 0, last_error = NULL "
        "WHERE number = ? AND status = 'failed' AND orphaned = 0",
        (task,),
    ).rowcount
    if retried:
        db.execute(
            "UPDATE attempts SET ended_as = 'forgiven' WHERE task = ? AND ended_as IN ('failed', 'lost')", (task,)
        )
    return bool(retried)


def cancel(db: sqlite3.Connection, task: int, now: str) -> int | None:
    """Let a task not be run; the attempt that this ended (or `WAITED`), None if the task is complete or failed."""
    found = db.execute("SELECT status, attempt FROM tasks WHERE number = ?", (task,)).fetchone()
    if found["status"] not in ("pending", "assigned"):
        return None
    if found["attempt"] is not None:
        db.execute("UPDATE attempts SET ended_at = ?, ended_as = 'released' WHERE number = ?", (now, found["attempt"]))
    db.execute(
        "UPDATE tasks SET status = 'failed', attempt = NULL, last_error = ? WHERE number = ?", (CANCELLED_ERROR, task)
    )
    return int(found["attempt"] or WAITED)


def select(view: LedgerView, failures: FailureView, names: Sequence[str], *, shared: bool) -> list[int]:
    """The present tasks that are meant by names of tasks, of phases, and of groups of failures.

    Args:
        view: of the ledger.
        failures: likewise.
        names: a name that a task and a phase have means the task.
        shared: whether a phase means also the tasks that a phase which is not named asks for.

    Raises:
        UnknownName: the first name that means nothing.
    """
    tasks: dict[int, None] = {}
    phases = [name for name in names if not _is_task(view, name)]
    phases = [name for name in phases if view.has_phase(name)]
    for name in names:
        if _is_task(view, name):
            tasks[view.task(name).number] = None
        elif name not in phases:
            found = failures.tasks_of(name)
            if not found:
                raise UnknownName(f"{name[:80]!r} is no task, no phase and no group of failures{_nearest(view, name)}")
            tasks.update(dict.fromkeys(found))
    tasks.update(dict.fromkeys(view.tasks_of_phases(phases, shared=shared)))
    return list(tasks)


def _is_task(view: LedgerView, name: str) -> bool:
    try:
        return not view.task(name).orphaned
    except UnknownTask:
        return False


def _nearest(view: LedgerView, name: str) -> str:
    known = [*view.phases(), *view.task_ids()]
    close = difflib.get_close_matches(name, known, n=1) if len(known) <= NEAREST_AMONG else []
    return f"; did you mean {close[0]!r}?" if close else "; `fedsweep failures` names the groups"
