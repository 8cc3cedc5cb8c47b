"""What the `status` message answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedsweep.manager.failure_view import FailureView
from fedsweep.manager.failures import host_of
from fedsweep.manager.fleet import Fleet, Worker
from fedsweep.manager.labels import label
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.pace import Pace
from fedsweep.manager.records import Counts, UnknownTask

SHOWN_FAILURES = 20
SHOWN_ERROR = 300  # characters
REMEMBERED = 10_000  # labels, and costs, of tasks


class StatusReporter:
    """Puts together how a sweep is getting on, from counts that are kept anyway: asking costs next to nothing."""

    def __init__(self, view: LedgerView, failures: FailureView, fleet: Fleet) -> None:
        self.pace = Pace()
        self._view = view
        self._failures = failures
        self._fleet = fleet
        self._labels: dict[str, tuple[str, str]] = {}
        self._costs: dict[str, float] = {}
        self._cancelled: tuple[Counts, int] = Counts(), 0  # what was counted when the counts were these
        self._seconds_left: float | None = None

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
            "diverged": counts.diverged,
            "orphaned": counts.orphaned,
            "duplicates_dropped": int(self._view.meta("duplicates") or 0),
            "config_change": json.loads(self._view.meta("plan_change") or "null"),
            "eta_s": self.look_at_pace(now),
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
        """Count the cancelled tasks anew: some were cancelled, or are no longer."""
        self._cancelled = Counts(), 0

    def _count_cancelled(self, counts: Counts) -> int:
        if counts != self._cancelled[0]:
            self._cancelled = counts, self._failures.cancelled() if counts.failed else 0
        return self._cancelled[1]

    # ---- the time that is left

    def look_at_pace(self, now: float) -> float | None:
        """The seconds that are left at the pace of late, None if that cannot be told; looked at now and then."""
        if self.pace.is_due(now):
            under_way, workers = self._under_way(), self._fleet.live()
            self.pace.sample(now, under_way, is_idle=not workers)
            left = self.pace.seconds_for(self._view.unfinished_cost(), now, under_way) if workers else None
            self._seconds_left = left
        return self._seconds_left

    def _under_way(self) -> float:
        """The expected cost of the rounds that are done of the experiments that have not ended."""
        return sum(
            self._cost(task.task_id) * min(task.round / task.rounds, 1.0)
            for worker in self._fleet.live()
            for task in worker.tasks
            if task.round and task.rounds
        )

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


def brief(error: str) -> str:
    """The last line of an error, where a traceback says what happened; cut for a table."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    return last if len(last) <= SHOWN_ERROR else last[: SHOWN_ERROR - 1] + "…"
