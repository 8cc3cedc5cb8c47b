"""The ledger: which tasks there are, who works on them, and what came back. The truth; every CSV is made from it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsweep.errors import TransitionRefused
from fedsweep.manager import decisions
from fedsweep.manager.clock import Clock
from fedsweep.manager.enrolment import dump, enrol
from fedsweep.manager.failure_view import FailureView
from fedsweep.manager.failures import Failure
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.opening import open_database
from fedsweep.manager.protocol import SCIENCE_FIELDS
from fedsweep.manager.queue import choose
from fedsweep.manager.records import Adoption, PlanChange, Task, UnknownAttempt, UnknownTask, Verdict
from fedsweep.manager.state_json import State
from fedsweep.manager.takeover import TakeOver, take_over
from fedsweep.manager.transactions import Transactions
from fedsweep.plan.grid import PlannedTask

MAX_FAILURES = 4  # the first try and three retries
MAX_LOSSES = 5


class Ledger:
    """A SQLite file with every task, attempt and result of a sweep. One process holds it; one thread at a time uses it.

    A *task* is known by its signature and is in one of four states. It is `pending` until it is handed out, `assigned`
    while one attempt of it is open, `complete` from the moment it has a result, and `failed` once a budget is spent.
    Every change of state names the state that it leaves and is refused (`TransitionRefused`) if the task is in another.
    Every change is one transaction, on disk before the method returns; see `together` for several.

    An *attempt* is one hand-out. Its number never repeats, over restarts too, and at most one attempt of a task is
    open. Its lease runs on the monotonic clock, lives in memory, and is renewed in full when the ledger is opened: a
    worker does not lose its task because the manager was away. A `fail`, `release` or `renew` that does not come
    from the open attempt changes nothing and says so (None, False).

    A *result* is taken from whichever attempt brings it first, in whatever state the task is, and never changes
    afterwards; a task has one result at most. A later one is a `duplicate`; if it differs in what must repeat
    bit for bit, it is kept as a conflict. Tasks that left the configuration are *orphans*: never handed out, never
    counted, never deleted.

    A *cancelled* task is `failed` without having failed; only a result, or `retry`, makes it anything else. `retry`
    forgives a failed task all that is held against it.

    Raises:
        StateError: the file is not a ledger that this version can use.
        LedgerUnwritable: (every method that changes something) the disk refuses; nothing was changed.
    """

    def __init__(self, path: str | Path, clock: Clock | None = None) -> None:
        self.path = Path(path)
        self.clock = clock or Clock()
        self._db = open_database(self.path)
        self._transactions = Transactions(self._db)
        self._transaction = self._transactions.change
        self.view = LedgerView(self._db)
        self.failures = FailureView(self._db, MAX_LOSSES)
        self._lease_ends: dict[int, float] = {}
        self._renew_all()

    def _renew_all(self) -> None:
        now = self.clock.monotonic()
        open_attempts = self._db.execute("SELECT number, lease_s FROM attempts WHERE ended_as IS NULL")
        self._lease_ends = {row["number"]: now + row["lease_s"] for row in open_attempts}

    def close(self) -> None:
        """Write everything into the main file and let it go."""
        self._db.close()

    def checkpoint(self) -> None:
        """Bring the main file up to date with the log beside it, as far as the disk lets it: both together hold all."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Changes that are made together are one transaction: all are on disk when this ends, or none was made.

        One that raises is undone alone, unless it was the disk that refused it. If none was made, leases that any of
        them ended run anew.
        """
        known = self._lease_ends
        try:
            with self._transactions.together():
                yield
        except BaseException:
            self._renew_all()
            self._lease_ends.update((attempt, end) for attempt, end in known.items() if attempt in self._lease_ends)
            raise

    # ---- the plan -------------------------------------------------------------------------------------------------

    def store_plan(self, tasks: Sequence[PlannedTask], plan_digest: str = "") -> PlanChange:
        """Make the grid's tasks the present ones: add the new, keep the known, orphan those that are gone.

        What is known keeps its id, its state and its result. `plan_digest` names the configuration that the grid is of.
        """
        with self._transaction() as db:
            change = enrol(db, tasks, self._now())
            self._set_meta(db, "plan_digest", plan_digest)
        for attempt in change.ended_attempts:
            self._lease_ends.pop(attempt, None)
        return change

    def take_over(self, state: State, lease_s: float) -> TakeOver:
        """Bring in the tasks, results and hand-outs of a JSON state; what this ledger knows already stays as it is."""
        with self._transaction() as db:
            brought = take_over(db, state, self.clock.now(), lease_s)
            self._set_meta(db, "taken_over", self._now())  # its failures and losses come without attempts
            ended = [self._store_result(db, number, task.result or {}) for number, task in brought.results]
        self._renew_all()
        for attempts in ended:
            self._after_result(attempts)
        return brought

    def set_meta(self, key: str, value: str) -> None:
        """Keep a note with the ledger."""
        with self._transaction() as db:
            self._set_meta(db, key, value)

    @staticmethod
    def _set_meta(db: sqlite3.Connection, key: str, value: str) -> None:
        db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value))

    # ---- hand-outs ------------------------------------------------------------------------------------------------

    def hand_out(
        self, worker: str, lease_s: float, max_tasks: int = 1, *, cohort: str | None = None, workers: int = 1
    ) -> list[Task]:
        """The next task, and up to `max_tasks` - 1 more that train together with it; empty if none is for this worker.

        See `queue.choose`, also for what the arguments mean.
        """
        with self._transaction() as db:
            numbers = choose(db, worker, max_tasks=max_tasks, cohort=cohort, workers=workers)
            attempts = [self._open_attempt(db, number, worker, lease_s) for number in numbers]
        lease_end = self.clock.monotonic() + lease_s
        self._lease_ends.update(dict.fromkeys(attempts, lease_end))
        return [self.view.task_number(number) for number in numbers]

    def _open_attempt(self, db: sqlite3.Connection, task: int, worker: str, lease_s: float) -> int:
        cursor = db.execute(
            "INSERT INTO attempts (task, worker, lease_s, started_at) VALUES (?, ?, ?, ?)",
            (task, worker, lease_s, self._now()),
        )
        attempt = int(cursor.lastrowid or 0)
        self._move(db, task, leaves="pending", enters="assigned", attempt=attempt)
        return attempt

    def renew(self, task_id: str, worker: str, attempt: int | None = None) -> bool:
        """Start the lease of the open attempt anew; False if this is not the open attempt."""
        open_attempt = self._open_attempt_of(task_id, worker, attempt)
        if open_attempt is None:
            return False
        self._lease_ends[open_attempt["attempt"]] = self.clock.monotonic() + open_attempt["lease_s"]
        return True

    def fail(self, task_id: str, worker: str, error: str | Failure, attempt: int | None = None) -> int | None:
        """Note that the task's own code failed; the task waits again, or is `failed` the fourth time.

        Returns:
            The number of the attempt that this ended, or None if it was not the open one and nothing changed.
        """
        failure = error if isinstance(error, Failure) else Failure.of(error)
        return self._give_back(task_id, worker, attempt, "failed", failure)

    def release(self, task_id: str, worker: str, attempt: int | None = None) -> bool:
        """Take the task back without blame: its worker was asked to stop."""
        return self._give_back(task_id, worker, attempt, "released", None) is not None

    def take_back(self, tasks: Iterable[Task]) -> None:
        """Take tasks back that were handed out but cannot be told to their worker."""
        with self._transaction() as db:
            for task in tasks:
                if task.attempt is not None:
                    self._end_attempt(db, task.attempt, "released", None)
                    self._move(db, task.number, leaves="assigned", enters="pending", attempt=None)
                    self._lease_ends.pop(task.attempt, None)

    def _give_back(
        self, task_id: str, worker: str, attempt: int | None, ended_as: str, failure: Failure | None
    ) -> int | None:
        with self._transaction() as db:
            found = self._open_attempt_of(task_id, worker, attempt)
            if found is None:
                return None
            self._end_attempt(db, found["attempt"], ended_as, None if failure is None else failure.dump())
            if failure is None:
                self._move(db, found["number"], leaves="assigned", enters="pending", attempt=None)
            else:
                failures = found["failures"] + 1
                self._move(
                    db,
                    found["number"],
                    leaves="assigned",
                    enters="failed" if failures >= MAX_FAILURES else "pending",
                    attempt=None,
                    failures=failures,
                    setbacks=found["setbacks"] + 1,
                    last_error=failure.text,
                )
        self._lease_ends.pop(found["attempt"], None)
        return int(found["attempt"])

    def lose_stale(self) -> list[Task]:
        """Take back every task whose lease has ended; a task that was lost five times is `failed`. Those tasks."""
        now = self.clock.monotonic()
        stale = [attempt for attempt, end in self._lease_ends.items() if end <= now]
        if not stale:
            return []
        with self._transaction() as db:
            numbers = [self._lose(db, attempt) for attempt in stale]
        for attempt in stale:
            del self._lease_ends[attempt]
        return [self.view.task_number(number) for number in numbers]

    def _lose(self, db: sqlite3.Connection, attempt: int) -> int:
        found = db.execute(
            "SELECT t.number, t.losses, t.setbacks, t.last_error FROM attempts a JOIN tasks t ON t.number = a.task "
            "WHERE a.number = ?",
            (attempt,),
        ).fetchone()
        self._end_attempt(db, attempt, "lost", None)
        losses = found["losses"] + 1
        is_spent = losses >= MAX_LOSSES
        self._move(
            db,
            found["number"],
            leaves="assigned",
            enters="failed" if is_spent else "pending",
            attempt=None,
            losses=losses,
            setbacks=found["setbacks"] + 1,
            last_error=self._losers(db, found["number"]) if is_spent else found["last_error"],
        )
        return int(found["number"])

    @staticmethod
    def _losers(db: sqlite3.Connection, task: int) -> str:
        rows = db.execute("SELECT worker FROM attempts WHERE task = ? AND ended_as = 'lost' ORDER BY number", (task,))
        workers = [row["worker"] for row in rows]
        return f"lost {len(workers)} times: contact ended with {', '.join(workers)}"

    def forgive(self, attempts: Iterable[int]) -> None:
        """Take back the failures of these attempts: their worker was broken, not the tasks."""
        with self._transaction() as db:
            for attempt in attempts:
                self._forgive(db, attempt)

    def _forgive(self, db: sqlite3.Connection, attempt: int) -> None:
        found = db.execute(
            "SELECT t.number, t.status, t.failures FROM attempts a JOIN tasks t ON t.number = a.task "
            "WHERE a.number = ? AND a.ended_as = 'failed'",
            (attempt,),
        ).fetchone()
        if found is None:
            return
        db.execute("UPDATE attempts SET ended_as = 'forgiven' WHERE number = ?", (attempt,))
        db.execute("UPDATE tasks SET failures = failures - 1 WHERE number = ?", (found["number"],))
        if found["status"] == "failed" and found["failures"] == MAX_FAILURES:
            self._move(db, found["number"], leaves="failed", enters="pending")

    def retry(self, tasks: Iterable[int]) -> int:
        """Let those of these tasks that failed wait again, with all their budgets; how many. Attempts count on."""
        with self._transaction() as db:
            return sum(decisions.retry(db, task) for task in tasks)

    def cancel(self, tasks: Iterable[int]) -> tuple[int, int]:
        """Let tasks not be run: they are `failed`, and who runs them hears it with the next heartbeat.

        Returns:
            How many were waiting, and how many under way. Those that are complete or failed stay as they are.
        """
        with self._transaction() as db:
            ended = [attempt for task in tasks if (attempt := decisions.cancel(db, task, self._now())) is not None]
        for attempt in ended:
            self._lease_ends.pop(attempt, None)
        return ended.count(decisions.WAITED), len(ended) - ended.count(decisions.WAITED)

    def _open_attempt_of(self, task_id: str, worker: str, attempt: int | None) -> sqlite3.Row | None:
        """The open attempt, if it is this one (or, for clients that know no attempts, this worker's)."""
        found: sqlite3.Row | None = self._db.execute(
            "SELECT t.number, t.failures, t.setbacks, t.attempt, a.lease_s, a.worker "
            "FROM tasks t LEFT JOIN attempts a ON a.number = t.attempt WHERE t.task_id = ?",
            (task_id,),
        ).fetchone()
        if found is None:
            raise UnknownTask(f"no task has the id {task_id[:80]!r}")
        if found["attempt"] is None:
            return None
        is_it = found["worker"] == worker if attempt is None else found["attempt"] == attempt
        return found if is_it else None

    def _end_attempt(self, db: sqlite3.Connection, attempt: int, ended_as: str, error: str | None) -> None:
        cursor = db.execute(
            "UPDATE attempts SET ended_at = ?, ended_as = ?, error = ? WHERE number = ? AND ended_as IS NULL",
            (self._now(), ended_as, error, attempt),
        )
        if cursor.rowcount != 1:
            raise TransitionRefused(f"attempt {attempt} is not open")

    @staticmethod
    def _move(db: sqlite3.Connection, task: int, *, leaves: str, enters: str, **changes: object) -> None:
        """Change the state of a task; refused unless it is in the state that this leaves."""
        assignments = "".join(f", {name} = ?" for name in changes)
        cursor = db.execute(
            f"UPDATE tasks SET status = ?{assignments} WHERE number = ? AND status = ?",
            (enters, *changes.values(), task, leaves),
        )
        if cursor.rowcount != 1:
            raise TransitionRefused(f"task {task} is not {leaves}")

    # ---- results --------------------------------------------------------------------------------------------------

    def accept(self, task_id: str, worker: str, data: Mapping[str, Any], attempt: int | None = None) -> Verdict:
        """Keep the result of a task that has none yet.

        Raises:
            UnknownTask: no task has this id.
            UnknownAttempt: the task was never handed out under this number (or, without one, never at all).
        """
        with self._transaction() as db:
            found = db.execute("SELECT number, status FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
            if found is None:
                raise UnknownTask(f"no task has the id {task_id[:80]!r}")
            self._check_attempt(db, found["number"], task_id, attempt)
            ended = self._store_result(db, found["number"], data, attempt=attempt, worker=worker)
            if ended is None:
                self._keep_conflict(db, found["number"], data, attempt=attempt, worker=worker)
        return self._after_result(ended)

    def adopt(self, adoptions: Iterable[Adoption]) -> list[int]:
        """Keep results that others computed, where the task has none yet; the numbers of the tasks they completed."""
        with self._transaction() as db:
            stored = [(one.task, self._store_result(db, one.task, one.data, source=one.source)) for one in adoptions]
        return [task for task, ended in stored if self._after_result(ended) == "accepted"]

    def _after_result(self, ended: list[int] | None) -> Verdict:
        for attempt in ended or ():
            self._lease_ends.pop(attempt, None)
        return "duplicate" if ended is None else "accepted"

    @staticmethod
    def _check_attempt(db: sqlite3.Connection, task: int, task_id: str, attempt: int | None) -> None:
        if attempt is None:
            known = db.execute("SELECT 1 FROM attempts WHERE task = ? LIMIT 1", (task,)).fetchone()
        else:
            known = db.execute("SELECT 1 FROM attempts WHERE number = ? AND task = ?", (attempt, task)).fetchone()
        if known is None:
            which = "was never handed out" if attempt is None else f"has no attempt {attempt}"
            raise UnknownAttempt(f"task {task_id[:80]!r} {which}")

    def _store_result(
        self,
        db: sqlite3.Connection,
        task: int,
        data: Mapping[str, Any],
        *,
        attempt: int | None = None,
        worker: str | None = None,
        source: str | None = None,
    ) -> list[int] | None:
        """Store a result and complete its task; the attempts that this ended, or None if there was a result already."""
        plain = {name: value for name, value in data.items() if name != "history"}
        history = json.dumps(data["history"], allow_nan=False) if "history" in data else None
        cursor = db.execute(
            "INSERT INTO results (task, attempt, worker, source, received_at, wall_time_s, data, history) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (task) DO NOTHING",
            (task, attempt, worker, source, self._now(), data.get("wall_time_s"), dump(plain), history),
        )
        if cursor.rowcount == 0:
            return None
        standing = db.execute("SELECT status, attempt FROM tasks WHERE number = ?", (task,)).fetchone()
        open_attempt = standing["attempt"]
        if open_attempt is not None:
            self._end_attempt(db, open_attempt, "result" if open_attempt == attempt else "overtaken", None)
        diverged = int(data.get("outcome") == "diverged")
        self._move(db, task, leaves=standing["status"], enters="complete", attempt=None, diverged=diverged)
        return [] if open_attempt is None else [open_attempt]

    def _keep_conflict(
        self, db: sqlite3.Connection, task: int, data: Mapping[str, Any], *, attempt: int | None, worker: str
    ) -> None:
        if differs(self.view.result(task), data):
            db.execute(
                "INSERT INTO conflicts (task, attempt, worker, received_at, data) VALUES (?, ?, ?, ?, ?)",
                (task, attempt, worker, self._now(), dump(data)),
            )

    def _now(self) -> str:
        return self.clock.now().isoformat()


def differs(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two results of one experiment disagree in something that must repeat; what only one of them has is no
    disagreement (rows of older tools have fewer fields).
    """
    return any(first[name] != second[name] for name in SCIENCE_FIELDS if name in first and name in second)
