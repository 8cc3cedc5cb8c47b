"""Looking into the ledger for what failed and why: failures of one cause together."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence

from fedsweep.manager.failures import CANCELLED, CANCELLED_ERROR, LOST, Failure, Group, group_of, host_of

SHOWN_TASKS = 20  # of one group
SHOWN_WORKERS = 20

# Every reason that a task without a result has: an attempt that raised; of tasks that were lost too often each loss; of
# cancelled tasks that; and what an earlier tool's state says of tasks that failed there.
_CAUSES = f"""
SELECT t.number AS task, t.task_id, t.position, t.status, a.number AS attempt, a.worker, a.ended_at AS at,
    iif(json_valid(a.error), json_extract(a.error, '$.host'), '') AS host,
    iif(json_valid(a.error), json_extract(a.error, '$.group'), group_of(a.error)) AS cause
FROM attempts a JOIN tasks t ON t.number = a.task
WHERE a.ended_as = 'failed' AND t.status != 'complete' AND t.orphaned = :orphaned
UNION ALL
SELECT t.number, t.task_id, t.position, t.status, a.number, a.worker, a.ended_at, '', '{LOST}'
FROM tasks t INDEXED BY failed_tasks JOIN attempts a ON a.task = t.number AND a.ended_as = 'lost'
WHERE t.status = 'failed' AND t.orphaned = :orphaned AND t.losses >= :max_losses
UNION ALL
SELECT number, task_id, position, status, NULL, NULL, NULL, '',
    iif(last_error = '{CANCELLED_ERROR.replace("'", "''")}', '{CANCELLED}', group_of(last_error))
FROM tasks t INDEXED BY failed_tasks
WHERE status = 'failed' AND orphaned = :orphaned AND (last_error = '{CANCELLED_ERROR.replace("'", "''")}'
    OR NOT EXISTS (SELECT 1 FROM attempts a WHERE a.task = t.number AND a.ended_as IN ('failed', 'lost')))
"""


class FailureView:
    """What a ledger says of failures. Reads only."""

    def __init__(self, db: sqlite3.Connection, max_losses: int) -> None:
        self._db = db
        self._max_losses = max_losses
        db.create_function("group_of", 1, group_of, deterministic=True)

    def groups(self, *, orphaned: bool = False) -> list[Group]:
        """Every cause of a failure of a task that has no result, those that failed the most tasks for good first.

        Of the present tasks, or of those that left the configuration.
        """
        gathered: dict[str, list[sqlite3.Row]] = {}
        for row in self._causes(orphaned=orphaned):
            gathered.setdefault(row["cause"], []).append(row)
        groups = [self._group(name, rows) for name, rows in gathered.items()]
        return sorted(groups, key=lambda group: (group.group == CANCELLED, -group.failed, -group.failures))

    def tasks_of(self, group: str) -> list[int]:
        """The tasks with a failure of this group."""
        return list(dict.fromkeys(row["task"] for row in self._causes() if row["cause"] == group))

    def earlier(self) -> int:
        """How many tasks that left the configuration have failed and have no result."""
        return len({row["task"] for row in self._causes(orphaned=True)})

    def failed_by_themselves(self) -> list[int]:
        """The present tasks that failed, without the cancelled ones."""
        query = "SELECT number FROM tasks WHERE status = 'failed' AND orphaned = 0 AND last_error IS NOT ?"
        return [row["number"] for row in self._db.execute(query, (CANCELLED_ERROR,))]

    def cancelled(self) -> int:
        """How many of the present tasks are cancelled."""
        query = "SELECT count(*) FROM tasks WHERE status = 'failed' AND orphaned = 0 AND last_error = ?"
        return int(self._db.execute(query, (CANCELLED_ERROR,)).fetchone()[0])

    def given_up(self) -> dict[str, bool]:
        """The signatures of all tasks that failed, those of an earlier configuration too; whether each is cancelled."""
        rows = self._db.execute("SELECT signature, last_error FROM tasks WHERE status = 'failed'")
        return {row["signature"]: row["last_error"] == CANCELLED_ERROR for row in rows}

    def _causes(self, *, orphaned: bool = False) -> Iterator[sqlite3.Row]:
        query = f"SELECT * FROM ({_CAUSES}) ORDER BY status = 'failed' DESC, position, attempt"
        return iter(self._db.execute(query, {"max_losses": self._max_losses, "orphaned": int(orphaned)}))

    def _group(self, name: str, rows: Sequence[sqlite3.Row]) -> Group:
        failed = {row["task"] for row in rows if row["status"] == "failed"}
        times = sorted(row["at"] for row in rows if row["at"] is not None)
        attempts = [row for row in rows if row["attempt"] is not None]
        failure = self._example(rows)
        is_plain = name not in (LOST, CANCELLED)
        words = {LOST: f"lost: contact with its worker ended {self._max_losses} times", CANCELLED: "cancelled"}
        return Group(
            group=name,
            cause=failure.cause if is_plain else words[name],
            frame=failure.frame if is_plain else "",
            failures=len(attempts),
            failed=len(failed),
            open=len({row["task"] for row in rows}) - len(failed),
            task_ids=_some((row["task_id"] for row in rows), SHOWN_TASKS),
            workers=_some((row["worker"] for row in attempts), SHOWN_WORKERS),
            hosts=_some((row["host"] or host_of(row["worker"]) for row in attempts), SHOWN_WORKERS),
            first_at=times[0] if times else None,
            last_at=times[-1] if times else None,
            text=failure.text,
        )

    def _example(self, rows: Sequence[sqlite3.Row]) -> Failure:
        """What the first task of a group failed with last: that is the task which people will look at."""
        task = rows[0]["task"]
        attempts = [row["attempt"] for row in rows if row["task"] == task and row["attempt"] is not None]
        if attempts:
            found = self._db.execute("SELECT error FROM attempts WHERE number = ?", (max(attempts),)).fetchone()
            kept = found["error"]
        else:
            kept = None
        if kept is None:
            kept = self._db.execute("SELECT last_error FROM tasks WHERE number = ?", (task,)).fetchone()[0]
        return Failure.read(kept or "")


def _some(names: Iterable[str], limit: int) -> tuple[str, ...]:
    """The first of these, each once."""
    return tuple(dict.fromkeys(names))[:limit]
