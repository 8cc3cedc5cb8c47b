"""Bringing the tasks of a JSON state into a ledger."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from datetime import datetime

from fedsweep.manager.enrolment import enrol
from fedsweep.manager.state_json import State, StateTask


@dataclass(frozen=True, kw_only=True)
class TakeOver:
    """What a take-over brought."""

    added: int
    known: int
    still_assigned: int  # handed out so lately that their workers may still bring a result
    called_complete: tuple[str, ...]  # signatures that the state calls complete without a result
    results: tuple[tuple[int, StateTask], ...]  # task in the ledger, state with its result


def take_over(db: sqlite3.Connection, state: State, now: datetime, lease_s: float) -> TakeOver:
    """Add the tasks of a state, each under its id where that is free. Runs in the caller's transaction.

    Tasks that the ledger knows already keep what it knows. A task that was handed out within `lease_s` stays with its
    worker; one handed out before that waits again, but a late result of it is recognised.
    """
    known = {row["signature"] for row in db.execute("SELECT signature FROM tasks")}
    present = [task for task in state.tasks if not task.is_orphaned or task.result is not None]
    given_ids = {task.planned.signature: task.task_id for task in present}
    change = enrol(db, [task.planned for task in present], now.isoformat(), keep_others=True, given_ids=given_ids)
    _reserve_attempts(db, state.last_attempt)
    numbers = {row["signature"]: row["number"] for row in db.execute("SELECT signature, number FROM tasks")}
    still_assigned = 0
    for task in present:
        if task.planned.signature not in known:
            still_assigned += _restore(db, numbers[task.planned.signature], task, now, lease_s)
    return TakeOver(
        added=change.added,
        known=len(given_ids) - change.added,
        still_assigned=still_assigned,
        called_complete=tuple(
            task.planned.signature for task in present if task.status == "complete" and task.result is None
        ),
        results=tuple((numbers[task.planned.signature], task) for task in present if task.result is not None),
    )


def _reserve_attempts(db: sqlite3.Connection, last_attempt: int) -> None:
    """Let attempts count on from where the state's left off, so that none of its numbers comes again."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'attempts'").fetchone()
    if row is None:
        db.execute("INSERT INTO sqlite_sequence VALUES ('attempts', ?)", (last_attempt,))
    elif row["seq"] < last_attempt:
        db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'attempts'", (last_attempt,))


def _restore(db: sqlite3.Connection, number: int, task: StateTask, now: datetime, lease_s: float) -> bool:
    """Give a new task the past that the state tells of; whether its worker keeps it."""
    db.execute(
        "UPDATE tasks SET status = ?, failures = ?, losses = ?, setbacks = ?, last_error = ?, orphaned = ? "
        "WHERE number = ?",
        (
            "failed" if task.status == "failed" else "pending",
            task.failures,
            task.losses,
            task.failures + task.losses,
            task.last_error,
            int(task.is_orphaned),
            number,
        ),
    )
    if task.status != "assigned":
        return False
    started_at = task.assigned_at or now
    is_fresh = (now - started_at).total_seconds() < lease_s and not task.is_orphaned
    attempt = db.execute(
        "INSERT INTO attempts (task, worker, lease_s, started_at, ended_at, ended_as) VALUES (?, ?, ?, ?, ?, ?)",
        (
            number,
            task.assigned_to or "unknown",
            lease_s,
            started_at.isoformat(),
            None if is_fresh else now.isoformat(),
            None if is_fresh else "released",
        ),
    ).lastrowid
    if is_fresh:
        db.execute("UPDATE tasks SET status = 'assigned', attempt = ? WHERE number = ?", (attempt, number))
    return is_fresh
