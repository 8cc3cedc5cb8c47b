"""What the `status` message answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedsweep.manager.failure_view import FailureView
from fedsweep.manager.failures import host_of
from fedsweep.manager.fleet import Fleet, Worker
from fedsweep.manager.labels import label
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.pace import Pace
from fedsweep.manager.protocol import TaskProgress
from fedsweep.manager.records import Counts, UnknownTask

SHOWN_FAILURES = 20
SHOWN_ERROR = 300  # characters
SILENT_HEARTBEATS = 2.5  # a worker that was silent for longer may be gone
REMEMBERED = 10_000  # labels, and costs, of tasks


class StatusReporter:
    """Puts together how a sweep is getting on, from counts that are kept anyway: asking costs next to nothing."""

    def __init__(self, view: LedgerView, failures: FailureView, fleet: Fleet, heartbeat_s: float) -> None:
        self.pace = Pace()
        self._view = view
        self._failures = failures
        self._fleet = fleet
        self._silent_s = SILENT_HEARTBEATS * heartbeat_s
        self._labels: dict[str, tuple[str, str]] = {}
        self._costs: dict[str, float] = {}
        self._cancelled: tuple[Counts, int] = Counts(), 0  # what was counted when the counts were these
        self._failed_attempts: tuple[Counts, int] | None = None  # the same of these
        self._seconds_left: float | None = None
        self._paced_ending: str | None = None

    def status(self, lagging: Mapping[str, str], now: float, ending: str | None = None) -> dict[str, Any]:
        """The answer, see docs/protocol.md.

        Args:
            lagging: the folders whose CSV lags, and why.
            now: monotonic.
            ending: why nothing more is handed out, if so.
        """
        counts = self._view.counts()
        finished = counts.complete + counts.failed
        return {
            "total": counts.total,
            "pending": counts.pending,
            "assigned": counts.assigned,
            "complete": counts.complete,
            "failed": counts.failed,
            "progress": finished / counts.total if counts.total else 1.0,
            "cancelled": self._count_cancelled(counts),
            "failed_attempts": self._count_failed_attempts(counts),
            "diverged": counts.diverged,
            "orphaned": counts.orphaned,
            "duplicates_dropped": int(self._view.meta("duplicates") or 0),
            "config_change": json.loads(self._view.meta("plan_change") or "null"),
            "eta_s": self.look_at_pace(now, ending),
            "lagging": sorted(lagging),
            "failures": [{"task_id": task_id, "error": brief(error)} for task_id, error in self._failed(counts)],
            "workers": [self._worker(worker, now) for worker in self._fleet.live()],
            "set_aside": [worker.as_dict() for worker in self._fleet.set_aside],
            "ending": ending,
            "done": counts.is_terminal,
        }

    def _failed(self, counts: Counts) -> list[tuple[str, str]]:
        return self._view.failed(SHOWN_FAILURES) if counts.failed else []

    def recount(self) -> None:
        """Count anew what the counts do not tell: tasks were cancelled or brought back, or an attempt failed."""
        self._cancelled = Counts(), 0
        self._failed_attempts = None

    def _count_cancelled(self, counts: Counts) -> int:
        if counts != self._cancelled[0]:
            self._cancelled = counts, self._failures.cancelled() if counts.failed else 0
        return self._cancelled[1]

    def _count_failed_attempts(self, counts: Counts) -> int:
        """The attempts that failed of tasks that are tried again; looked up only where there may be some."""
        known = self._failed_attempts
        if known is None or (known[1] and counts != known[0]):
            known = self._failed_attempts = counts, self._view.failed_attempts()
        return known[1]

    # ---- the time that is left

    def look_at_pace(self, now: float, ending: str | None = None) -> float | None:
        """The seconds that are left at the pace of late, None if that cannot be told; looked at now and then.

        Of a sweep that is drained it is the time of what still runs; one that is stopped ends as soon as it can.
        """
        if ending in ("stop", "signal"):
            return None
        if ending != self._paced_ending or self.pace.is_due(now):
            self._paced_ending = ending
            self._seconds_left = self._look(now, is_draining=ending == "drain")
        return self._seconds_left

    def _look(self, now: float, *, is_draining: bool) -> float | None:
        workers = [worker for worker in self._fleet.live() if not self._fleet.is_set_aside(worker)]
        costs, done = self._held(workers)
        at_work = sum(bool(worker.tasks) for worker in workers)
        self.pace.sample(now, sum(done), at_work, is_idle=not workers)
        waiting = 0.0 if is_draining else max(self._view.unfinished_cost() - sum(costs), 0.0)
        holders = [worker for worker in workers if worker.tasks]
        if holders and all(now - worker.last_seen > self._silent_s for worker in holders):
            return None  # while nobody gets on, it would grow
        held = [cost - part for cost, part in zip(costs, done, strict=True)]
        return self.pace.seconds_left(waiting, held)

    def _held(self, workers: Sequence[Worker]) -> tuple[list[float], list[float]]:
        """Of what each worker holds the expected cost, and that of the rounds that are done."""
        costs, done = [], []
        for worker in workers:
            parts = [(self._cost(task.task_id), _part_done(task)) for task in worker.tasks]
            costs.append(sum(cost for cost, _ in parts))
            done.append(sum(cost * part for cost, part in parts))
        return costs, done

    def _cost(self, task_id: str) -> float:
        """The expected cost of a task; looked up once."""
        if task_id not in self._costs:
            if len(self._costs) >= REMEMBERED:
                self._costs.clear()
            self._costs[task_id] = self._view.cost(task_id)
        return self._costs[task_id]

    # ---- workers

    def _worker(self, worker: Worker, now: float) -> dict[str, Any]:
        task = worker.tasks[0] if worker.tasks else None
        phase, words = ("", "") if task is None else self._label(task.task_id)
        return {
            "worker_id": worker.worker_id,
            "host": host_of(worker.worker_id),
            "device": worker.device,
            "task_id": None if task is None else task.task_id,
            "phase": phase or None,
            "label": words or None,
            "round": None if task is None else task.round,
            "rounds": None if task is None else task.rounds,
            "val_acc": None if task is None else task.val_acc,
            "completed": worker.completed,
            "failed": worker.failed,
            "set_aside": self._fleet.is_set_aside(worker),
            "last_seen_s": round(now - worker.last_seen, 3),
        }

    def _label(self, task_id: str) -> tuple[str, str]:
        """Phase and label of a task; looked up once."""
        if task_id not in self._labels:
            if len(self._labels) >= REMEMBERED:
                self._labels.clear()
            try:
                task = self._view.task(task_id)
            except UnknownTask:
                return "", ""
            self._labels[task_id] = task.phase, label(task.config, self._view.varying(task.output_dir))
        return self._labels[task_id]


def _part_done(task: TaskProgress) -> float:
    return min(task.round / task.rounds, 1.0) if task.round and task.rounds else 0.0


def brief(error: str) -> str:
    """The last line of an error, where a traceback says what happened; cut for a table."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    return last if len(last) <= SHOWN_ERROR else last[: SHOWN_ERROR - 1] + "…"
