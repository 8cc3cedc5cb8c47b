"""What the `status` message answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedsweep.manager.fleet import Fleet, Worker
from fedsweep.manager.labels import label
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.records import Counts, UnknownTask

SHOWN_FAILURES = 20
SHOWN_ERROR = 300  # characters
REMEMBERED_LABELS = 10_000


class StatusReporter:
    """Puts together how a sweep is getting on, from counts that are kept anyway: asking costs next to nothing."""

    def __init__(self, view: LedgerView, fleet: Fleet) -> None:
        self._view = view
        self._fleet = fleet
        self._labels: dict[str, tuple[str, str]] = {}

    def status(self, lagging: Mapping[str, str], now: float) -> dict[str, Any]:
        """The answer, see docs/protocol.md. `now` is monotonic; `lagging` has the folders whose CSV lags, and why."""
        counts = self._view.counts()
        finished = counts.complete + counts.failed
        return {
            "total": counts.total,
            "pending": counts.pending,
            "assigned": counts.assigned,
            "complete": counts.complete,
            "failed": counts.failed,
            "progress": finished / counts.total if counts.total else 1.0,
            "diverged": counts.diverged,
            "orphaned": counts.orphaned,
            "duplicates_dropped": int(self._view.meta("duplicates") or 0),
            "config_change": json.loads(self._view.meta("plan_change") or "null"),
            "eta_s": self._seconds_left(counts),
            "lagging": sorted(lagging),
            "failures": [{"task_id": task_id, "error": brief(error)} for task_id, error in self._failed(counts)],
            "workers": [self._worker(worker, now) for worker in self._fleet.live()],
            "done": counts.is_terminal,
        }

    def _failed(self, counts: Counts) -> list[tuple[str, str]]:
        return self._view.failed(SHOWN_FAILURES) if counts.failed else []

    def _seconds_left(self, counts: Counts) -> float | None:
        """What is left at the pace of the experiments finished last, shared among the live workers."""
        workers, times = len(self._fleet.live()), self._view.last_wall_times()
        if not workers or not times:
            return None
        return (counts.pending + counts.assigned) * sum(times) / len(times) / workers

    def _worker(self, worker: Worker, now: float) -> dict[str, Any]:
        task = worker.tasks[0] if worker.tasks else None
        phase, words = ("", "") if task is None else self._label(task.task_id)
        return {
            "worker_id": worker.worker_id,
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
            if len(self._labels) >= REMEMBERED_LABELS:
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
