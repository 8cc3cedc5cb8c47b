"""Putting a ledger right that breaks an invariant, as far as what it says elsewhere allows."""

from __future__ import annotations

import sqlite3

from fedsweep.manager.enrolment import count_again
from fedsweep.manager.failures import CANCELLED_ERROR
from fedsweep.manager.invariants import COUNTED, NO_TAKE_OVER, is_result
from fedsweep.manager.ledger import MAX_FAILURES, MAX_LOSSES

_SPENT = f"(failures >= {MAX_FAILURES} OR losses >= {MAX_LOSSES} OR last_error IS '{CANCELLED_ERROR}')"
_HAS_RESULT = "number IN (SELECT task FROM results)"
_OPEN = "(SELECT max(a.number) FROM attempts a WHERE a.task = tasks.number AND a.ended_as IS NULL)"
_WAITS = f"iif({_SPENT}, 'failed', 'pending')"
_FAILURES, _LOSSES = (COUNTED.format(kind).replace("t.number", "tasks.number") for kind in ("failed", "lost"))

# In this order: first what a task is by its result and its attempts, then the amounts. `?1` is the time of day.
_MENDS = (
    # Of several open attempts the last counts; one of a task that is done, failed for good or orphaned counts no more.
    "UPDATE attempts SET ended_at = ?1, ended_as = 'overtaken' WHERE ended_as IS NULL "
    "AND task IN (SELECT task FROM results)",
    "UPDATE attempts SET ended_at = ?1, ended_as = 'released' WHERE ended_as IS NULL AND (number < "
    "(SELECT max(b.number) FROM attempts b WHERE b.task = attempts.task AND b.ended_as IS NULL) "
    "OR task IN (SELECT number FROM tasks WHERE orphaned = 1 OR status = 'failed'))",
    f"UPDATE tasks SET status = 'complete', attempt = NULL, "
    "diverged = (SELECT json_extract(r.data, '$.outcome') IS 'diverged' FROM results r WHERE r.task = tasks.number) "
    f"WHERE {_HAS_RESULT} AND (status != 'complete' OR attempt IS NOT NULL)",
    f"UPDATE tasks SET failures = min(failures, {_FAILURES}), losses = min(losses, {_LOSSES}) "
    f"WHERE (failures > {_FAILURES} OR losses > {_LOSSES}) AND {NO_TAKE_OVER}",
    f"UPDATE tasks SET status = iif({_OPEN} IS NULL, {_WAITS}, 'assigned'), attempt = {_OPEN}, diverged = 0 "
    f"WHERE NOT {_HAS_RESULT} AND (status NOT IN ('pending', 'assigned', 'failed') OR attempt IS NOT {_OPEN} "
    f"OR (status = 'assigned') != ({_OPEN} IS NOT NULL) OR (status = 'failed' AND NOT {_SPENT}))",
    "INSERT INTO sqlite_sequence (name, seq) SELECT 'attempts', 0 "
    "WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'attempts')",
    "UPDATE sqlite_sequence SET seq = (SELECT max(number) FROM attempts) "
    "WHERE name = 'attempts' AND seq < (SELECT max(number) FROM attempts)",
)


def mend(db: sqlite3.Connection, now: str) -> None:
    """Make tasks, attempts and amounts agree with each other and with the results. In one transaction, or not at all.

    A result that cannot be read is moved to the conflicts, and its task waits again. `now` is the time of day.

    Raises:
        sqlite3.DatabaseError: the file does not let itself be mended; nothing was changed.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute("REINDEX")
        _move_unreadable_results(db)
        for statement in _MENDS:
            db.execute(statement, (now,) if "?1" in statement else ())
        count_again(db)
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _move_unreadable_results(db: sqlite3.Connection) -> None:
    rows = db.execute("SELECT number, data, history FROM results").fetchall()
    for number in [row["number"] for row in rows if not is_result(row["data"], row["history"])]:
        db.execute(
            "INSERT INTO conflicts (task, attempt, worker, received_at, data) "
            "SELECT task, attempt, worker, received_at, data FROM results WHERE number = ?",
            (number,),
        )
        db.execute("DELETE FROM results WHERE number = ?", (number,))
