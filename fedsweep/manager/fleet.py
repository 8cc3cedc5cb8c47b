"""The workers that the manager hears of: what each one does, and which are broken."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedsweep.manager.clock import Clock
from fedsweep.manager.failures import Failure, SetAside, host_of
from fedsweep.manager.protocol import TaskProgress
from fedsweep.manager.records import Task

LIVE_S = 60.0  # a worker that was silent for longer takes part in no decision
BROKEN_AFTER = 3  # strikes: failures of different tasks, each after another hand-out, without a success between them
SET_ASIDE_S = 600.0
HEARING_S = 2.0  # after an answer: a worker of ours that it did not reach has asked again by then
REMEMBERED = 4096
SHOWN_SET_ASIDE = 20  # the last of them
# What follows from an experiment's parameters alone, so that no worker is to blame for it.
BLAMELESS = ("PartitionError",)


@dataclass
class Worker:
    """One worker, as far as the manager knows."""

    worker_id: str
    last_seen: float  # monotonic
    device: str | None = None
    tasks: tuple[TaskProgress, ...] = ()
    completed: int = 0
    failed: int = 0
    hand_outs: int = 0  # answers with tasks in them
    failing: dict[str, int] = field(default_factory=dict)  # task -> hand-outs until it failed; since the last success
    unforgiven: list[int] = field(default_factory=list)  # attempts that failed since then
    failed_at: float = 0.0  # monotonic
    knows_at: float = math.inf  # monotonic: from when on it is taken to know that there is no more for it

    @property
    def is_doubtful(self) -> bool:
        """Whether it has failed too often in a row, and with different tasks.

        A whole cohort may fail at once for one reason, so failures with no hand-out between them are one strike. It is
        the next hand-outs that show whether the worker was the reason.
        """
        return len(set(self.failing.values())) >= BROKEN_AFTER


class Fleet:
    """The workers heard of since the manager started. Nothing here needs to survive a crash.

    Args:
        clock: tells how long a worker has been silent.
        expected: how many workers will come within the first minute, if that is known.
    """

    def __init__(self, clock: Clock, expected: int = 1) -> None:
        self._clock = clock
        self._expected = expected
        self._began = clock.monotonic()
        self._workers: dict[str, Worker] = {}
        self.set_aside: list[SetAside] = []  # as people shall see them, also after they have left

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

    def asks(self, worker_id: str, device: str | None = None) -> Worker:
        """Note that a worker asks for work: it does not know of an end."""
        worker = self.see(worker_id, device)
        worker.knows_at = math.inf
        return worker

    def live(self) -> list[Worker]:
        """The workers heard of within the last minute."""
        oldest = self._clock.monotonic() - LIVE_S
        return [worker for worker in self._workers.values() if worker.last_seen >= oldest]

    def sharers(self) -> int:
        """Among how many workers the work is shared: those that live and are not set aside, and those expected."""
        count = sum(not self.is_set_aside(worker) for worker in self.live())
        is_early = self._clock.monotonic() - self._began < LIVE_S
        return max(1, count, self._expected if is_early else 0)

    def handed_out(self, worker: Worker, tasks: Iterable[Task]) -> None:
        """Note what a worker was given."""
        given = tuple(TaskProgress(task_id=task.task_id, attempt=task.attempt) for task in tasks)
        worker.hand_outs += bool(given)
        worker.tasks += given

    def succeeded(self, worker_id: str, task_id: str) -> None:
        """Note a result."""
        worker = self.see(worker_id)
        worker.completed += 1
        worker.knows_at = math.inf  # it was told while it trained, and will ask again
        worker.failing.clear()
        worker.unforgiven.clear()
        self._drop(worker, task_id)

    def failed(self, worker_id: str, task_id: str, attempt: int, failure: Failure) -> list[int]:
        """Note a failure; the attempts to be forgiven because this worker, and not its tasks, must be broken."""
        worker = self.see(worker_id)
        worker.failed += 1
        worker.knows_at = math.inf
        self._drop(worker, task_id)
        if failure.exception in BLAMELESS:
            return []
        worker.failing[task_id] = worker.hand_outs
        worker.unforgiven.append(attempt)
        worker.failed_at = self._clock.monotonic()
        if not self.is_set_aside(worker):
            return []
        forgiven, worker.unforgiven = worker.unforgiven, []
        self._show_set_aside(worker, failure, len(forgiven))
        return forgiven

    def _show_set_aside(self, worker: Worker, failure: Failure, failures: int) -> None:
        before = [each for each in self.set_aside if each.worker_id == worker.worker_id]
        others = [each for each in self.set_aside if each.worker_id != worker.worker_id]
        now = SetAside(
            worker_id=worker.worker_id,
            host=failure.host or host_of(worker.worker_id),
            device=worker.device,
            reason=failure.brief,
            failures=failures + sum(each.failures for each in before),
            at=self._clock.now().isoformat(timespec="seconds"),
        )
        self.set_aside = [*others, now][-SHOWN_SET_ASIDE:]

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

    def told(self, worker: Worker, *, asks_again: bool = True) -> None:
        """Note that an answer says that there is no more for a worker.

        The answer may be lost on its way. A worker that `asks_again` when it hears nothing does so within `HEARING_S`.
        """
        worker.knows_at = self._clock.monotonic() + (HEARING_S if asks_again else 0.0)

    def left(self, worker_id: str) -> None:
        """Forget a worker that has heard that there is no more for it, and ends."""
        self._workers.pop(worker_id, None)

    def all_know(self) -> bool:
        """Whether every live worker knows that there is no more for it."""
        now = self._clock.monotonic()
        return all(worker.knows_at <= now for worker in self.live())
