"""Which tasks go out next: the longest first, those that train well together beside each other, fair shares for all."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

WAITING = "status = 'pending' AND orphaned = 0"
TOGETHER = f"{WAITING} AND alone = 0"
# A cut that would part experiments that share their images moves to before them if it keeps this much of the portion.
KEPT_AT_A_BOUNDARY = 0.75
ROUNDING = 1e-6  # of a share; costs are sums of large numbers


def choose(
    db: sqlite3.Connection, worker: str, *, max_tasks: int = 1, cohort: str | None = None, workers: int = 1
) -> list[int]:
    """The tasks that this worker gets next: none, one, or several that train together.

    Tasks that never failed and were never lost go first, and of those the most expensive, so that no long one is left
    for the end; then in the order of the grid. The first decides the cohort. Those that share its images follow it,
    then the next of the cohort with those that share theirs.

    A task that failed, or was lost twice, is handed out alone, to a worker that holds nothing, which then gets nothing
    until it is done. So a task that brings down whatever runs beside it is found, and no other loses more than one
    failure and two losses of its budgets through it. One that was lost once goes out beside its like only, and joins
    nothing that is under way.

    Args:
        db: the ledger, in a transaction.
        worker: who asks.
        max_tasks: how many it takes. A worker that takes one and names no cohort runs one after another.
        cohort: only tasks with this key, for a worker that trains such and has room.
        workers: among how many what is unfinished is shared, see `portion`.
    """
    if max_tasks == 1 and cohort is None:
        lead = _lead(db)
        return [] if lead is None else [lead["number"]]
    held = _held(db, worker)
    lead = _lead(db) if cohort is None else _lead_of(db, cohort)
    if lead is None or held["alone"] or (lead["alone"] and held["amount"]):
        return []
    if lead["alone"]:
        return [lead["number"]]
    queued = _together(db, lead["cohort"], lead["setbacks"], max_tasks)
    if workers > 1:
        share = _unfinished(db) / workers * (1 - ROUNDING)
        costs, groups = [row["cost"] for row in queued], [row["sharing"] for row in queued]
        queued = queued[: portion(costs, groups, share - held["cost"])]
    return [row["number"] for row in queued]


def portion(costs: Sequence[float], groups: Sequence[str], room: float) -> int:
    """How many of these tasks, taken in order, a worker gets that has so much room left in its fair share.

    Each worker shall hold no more than an equal part of what is unfinished. Else the first to ask takes the last tasks
    of a sweep, 256 at once, and trains them while the others look on. The task that fills the room still belongs to the
    portion, so all are handed out although nothing divides evenly, and who holds nothing gets something.

    A cut within a group (equal neighbours in `groups`: experiments that share their images) moves to before the group
    where that keeps most of the portion; what it costs in balance, the next request makes up for.
    """
    count, filled = 0, 0.0
    while count < len(costs) and filled < room:
        filled += costs[count]
        count += 1
    if not 0 < count < len(costs) or groups[count - 1] != groups[count]:
        return count
    boundary = count - 1
    while boundary > 0 and groups[boundary - 1] == groups[count]:
        boundary -= 1
    return boundary if boundary and sum(costs[:boundary]) >= KEPT_AT_A_BOUNDARY * filled else count


def _lead(db: sqlite3.Connection) -> sqlite3.Row | None:
    """The first task of the queue."""
    found: sqlite3.Row | None = db.execute(
        f"SELECT number, cohort, setbacks, alone FROM tasks INDEXED BY queue WHERE {WAITING} "
        "ORDER BY alone, setbacks, cost DESC, position LIMIT 1"
    ).fetchone()
    return found


def _lead_of(db: sqlite3.Connection, cohort: str) -> sqlite3.Row | None:
    """The first task of a cohort that may join others that are under way."""
    found: sqlite3.Row | None = db.execute(
        f"SELECT number, cohort, setbacks, alone FROM tasks INDEXED BY cohort_queue WHERE {TOGETHER} AND cohort = ? "
        "AND setbacks = 0 ORDER BY cost DESC, position LIMIT 1",
        (cohort,),
    ).fetchone()
    return found


def _together(db: sqlite3.Connection, cohort: str, setbacks: int, limit: int) -> list[sqlite3.Row]:
    """The first tasks of a cohort, each with those that share its images behind it."""
    chosen: dict[int, sqlite3.Row] = {}
    leads = db.execute(
        f"SELECT number, sharing FROM tasks INDEXED BY cohort_queue WHERE {TOGETHER} AND cohort = ? AND setbacks = ? "
        "ORDER BY cost DESC, position",
        (cohort, setbacks),
    )
    for lead in leads:
        if len(chosen) == limit:
            break
        if lead["number"] not in chosen:
            siblings = db.execute(
                f"SELECT number, cost, sharing FROM tasks INDEXED BY sharing_queue WHERE {TOGETHER} AND cohort = ? "
                "AND setbacks = ? AND sharing = ? ORDER BY cost DESC, position LIMIT ?",
                (cohort, setbacks, lead["sharing"], limit - len(chosen)),
            )
            chosen.update((row["number"], row) for row in siblings)
    return list(chosen.values())


def _held(db: sqlite3.Connection, worker: str) -> sqlite3.Row:
    """What a worker holds: how many tasks, their cost, and whether one of them was handed out alone."""
    found: sqlite3.Row = db.execute(
        "SELECT count(*) AS amount, total(t.cost) AS cost, max(t.alone) AS alone "
        "FROM attempts a INDEXED BY open_attempts_by_worker JOIN tasks t ON t.number = a.task "
        "WHERE a.worker = ? AND a.ended_as IS NULL",
        (worker,),
    ).fetchone()
    return found


def _unfinished(db: sqlite3.Connection) -> float:
    """The cost of everything that waits or is under way."""
    return float(db.execute("SELECT total(cost * amount) FROM unfinished").fetchone()[0])
