"""The workers that the manager hears of: what each one does, and which are broken."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsweep.manager.clock import Clock
from fedsweep.manager.protocol import TaskProgress

LIVE_S = 60.0  # a worker that was silent for longer takes part in no decision
BROKEN_AFTER = 3  # failures of different tasks without a success between them
SET_ASIDE_S = 600.0
REMEMBERED = 4096


@dataclass
class Worker:
    """One worker, as far as the manager knows."""

    worker_id: str
    last_seen: float  # monotonic
    device: str | None = None
    tasks: tuple[TaskProgress, ...] = ()
    completed: int = 0
    failed: int = 0
    failing: dict[str, int] = field(default_factory=dict)  # task -> attempt: failures since the last success
    failed_at: float = 0.0  # monotonic
    was_told_done: bool = False

    @property
    def is_doubtful(self) -> bool:
        """Whether it has failed too many different tasks in a row."""
        return len(self.failing) >= BROKEN_AFTER


class Fleet:
    """The workers heard of since the manager started. Nothing here needs to survive a crash."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._workers: dict[str, Worker] = {}

    def see(self, worker_id: str, device: str | None = None) -> Worker:
        """Note a sign of life."""
        now = self._clock.monotonic()
        worker = self._workers.pop(worker_id, None) or Worker(worker_id, now)
        self._workers[worker_id] = worker  # the one seen last stands last
        worker.last_seen = now
        worker.device = device or worker.device
        while len(self._workers) > REMEMBERED:
            del self._workers[next(iter(self._workers))]
        return worker

    def live(self) -> list[Worker]:
        """The workers heard of within the last minute."""
        oldest = self._clock.monotonic() - LIVE_S
        return [worker for worker in self._workers.values() if worker.last_seen >= oldest]

    def succeeded(self, worker_id: str, task_id: str) -> None:
        """Note a result."""
        worker = self.see(worker_id)
        worker.completed += 1
        worker.failing.clear()
        self._drop(worker, task_id)

    def failed(self, worker_id: str, task_id: str, attempt: int) -> list[int]:
        """Note a failure; the attempts to be forgiven because this worker, and not its tasks, must be broken."""
        worker = self.see(worker_id)
        worker.failed += 1
        worker.failing[task_id] = attempt
        worker.failed_at = self._clock.monotonic()
        self._drop(worker, task_id)
        return list(worker.failing.values()) if self.is_set_aside(worker) else []

    def gave_back(self, worker_id: str, task_id: str) -> None:
        """Note that a worker gave a task back without blame."""
        self._drop(self.see(worker_id), task_id)

    @staticmethod
    def _drop(worker: Worker, task_id: str) -> None:
        worker.tasks = tuple(task for task in worker.tasks if task.task_id != task_id)

    def is_set_aside(self, worker: Worker) -> bool:
        """Whether this worker gets no task for now.

        Only where another live worker is in good standing: if all of them fail, the tasks are to blame.
        """
        if not worker.is_doubtful or self._clock.monotonic() - worker.failed_at >= SET_ASIDE_S:
            return False
        return any(not other.is_doubtful for other in self.live() if other is not worker)

    def all_told_done(self) -> bool:
        """Whether every live worker knows that nothing is left."""
        return all(worker.was_told_done for worker in self.live())
