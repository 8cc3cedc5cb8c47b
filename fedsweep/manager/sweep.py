"""A sweep that is open: tasks go out, results come in, files follow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsweep.files import fsync_folder
from fedsweep.manager.clock import Clock
from fedsweep.manager.fleet import Fleet
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.outputs import Outputs
from fedsweep.manager.projection import Projection
from fedsweep.manager.protocol import MAX_MESSAGE, TaskProgress, encode
from fedsweep.manager.records import LedgerUnwritable, Task, UnknownTask, Verdict
from fedsweep.manager.server import ensure_token
from fedsweep.manager.state_dir import LEDGER_FILE, TOKEN_FILE, StateLock
from fedsweep.manager.status import StatusReporter, brief

log = logging.getLogger(__name__)

LEGACY_LEASE_S = 6 * 3600.0  # old clients send no heartbeats
MAX_HAND_OUT = 256  # tasks in one answer; each takes about 1.1 kB of it, more where its output folders are many or long
ENVELOPE = 256  # bytes of an answer besides its tasks
LONGEST_WAIT_S = 5.0


class OpenSweep:
    """The state directory, held for this process, and everything that workers ask for.

    Every method takes the lock, so it may be called from any thread; each is one change or one look.

    Raises:
        StateError: the state cannot be used, or another manager holds it.
    """

    def __init__(
        self,
        state_dir: Path,
        lock: threading.RLock,
        clock: Clock,
        *,
        heartbeat_s: float,
        lease_s: float,
        expected_workers: int = 1,
    ) -> None:
        self.lock = lock
        self.clock = clock
        self.heartbeat_s = heartbeat_s
        self.lease_s = lease_s
        self.hands_out = True
        self._held = StateLock(state_dir)
        try:
            self.ledger = Ledger(state_dir / LEDGER_FILE, clock)
            self.token = ensure_token(state_dir / TOKEN_FILE)
            fsync_folder(state_dir)  # workers elsewhere have this token
        except BaseException:
            self._held.release()
            raise
        self.projection = Projection(self.ledger, clock)
        self.fleet = Fleet(clock, expected_workers)
        self.outputs = Outputs(self.ledger.view, lock)
        self._reporter = StatusReporter(self.ledger.view, self.fleet)

    def close(self) -> None:
        """Let the state directory go."""
        self.ledger.close()
        self._held.release()

    # ---- tasks ----------------------------------------------------------------------------------------------------

    def hand_out(
        self,
        worker_id: str,
        *,
        max_tasks: int = 1,
        cohort: str | None = None,
        device: str | None = None,
        legacy: bool = False,
    ) -> list[Task]:
        """Tasks for a worker, which may be trained together; empty if there are none for it now.

        See `queue.choose` for which. They fit into one message.
        """
        with self.lock:
            self.take_back_stale()
            worker = self.fleet.see(worker_id, device)
            if not self.hands_out or self.fleet.is_set_aside(worker):
                return []
            tasks = self.ledger.hand_out(
                worker_id,
                LEGACY_LEASE_S if legacy else self.lease_s,
                1 if legacy else min(max_tasks, MAX_HAND_OUT),
                cohort=cohort,
                workers=1 if max_tasks == 1 and cohort is None else self.fleet.sharers(),
            )
            fitting = self._count_fitting(tasks)
            if tasks[fitting:]:
                self.ledger.take_back(tasks[fitting:])
            self.fleet.handed_out(worker, tasks[:fitting])
            return tasks[:fitting]

    def _count_fitting(self, tasks: Sequence[Task]) -> int:
        """How many of these tasks fit into one answer; one at least. The first stands in it twice."""
        if len(tasks) < 2:
            return len(tasks)
        room = MAX_MESSAGE - ENVELOPE
        for count, task in enumerate(tasks):
            room -= len(encode(self.task_message(task))) * (2 if count == 0 else 1)
            if room < 0:
                return max(1, count)
        return len(tasks)

    def task_message(self, task: Task) -> dict[str, Any]:
        """A task as its worker gets it."""
        return {
            **task.as_dict(),
            "assigned_at": None if task.assigned_at is None else task.assigned_at.isoformat(),
            "last_error": None if task.last_error is None else brief(task.last_error),
            "cohort": task.cohort,
            "attempt": task.attempt,
            "lease_s": self.lease_s,
            "heartbeat_s": self.heartbeat_s,
        }

    def take_back_stale(self) -> list[str]:
        """Take back the tasks of workers that were silent for too long; their ids."""
        with self.lock:
            try:
                lost = self.ledger.lose_stale()
            except LedgerUnwritable as error:
                log.warning("tasks of silent workers could not be taken back: %s", error)
                return []
        for task in lost:
            log.warning("%s: no sign of its worker; lost %d times, now %s", task.task_id, task.losses, task.status)
        return [task.task_id for task in lost]

    def renew(self, worker_id: str, held: Sequence[TaskProgress], *, device: str | None = None) -> list[str]:
        """Renew the leases of the tasks that a worker holds; the ids of those that it should drop."""
        with self.lock:
            dropped = [task.task_id for task in held if not self._renew(worker_id, task)]
            worker = self.fleet.see(worker_id, device)
            worker.tasks = tuple(task for task in held if task.task_id not in dropped)
            return dropped

    def _renew(self, worker_id: str, task: TaskProgress) -> bool:
        try:
            return self.ledger.renew(task.task_id, worker_id, task.attempt)
        except UnknownTask:
            return False

    def save_result(
        self, task_id: str, worker_id: str, result_data: Mapping[str, Any], attempt: int | None = None
    ) -> Verdict:
        """Keep a result: in the ledger on disk, then as a row in every output folder. Only then is it acknowledged.

        Raises:
            UnknownTask, UnknownAttempt: no such task was handed out.
            LedgerUnwritable: nothing was kept; the worker must try again.
        """
        with self.lock:
            verdict = self.ledger.accept(task_id, worker_id, result_data, attempt)
            self.fleet.succeeded(worker_id, task_id)
            if verdict == "accepted":
                self.projection.add(self.ledger.view.rows_of(self.ledger.view.task(task_id).number))
            return verdict

    def has_result(self, task_id: str, worker_id: str) -> bool:
        """Whether the result of the task is here, as a worker says.

        Raises:
            UnknownTask: no task has this id.
        """
        with self.lock:
            self.fleet.see(worker_id)
            return self.ledger.view.task(task_id).status == "complete"

    def mark_failed(self, task_id: str, worker_id: str, error: str, attempt: int | None = None) -> bool:
        """Note that the task's code failed; False if this was not its open attempt and changes nothing."""
        with self.lock:
            ended = self.ledger.fail(task_id, worker_id, error, attempt)
            if ended is None:
                return False
            forgiven = self.fleet.failed(worker_id, task_id, ended)
            self.ledger.forgive(forgiven)
        if forgiven:
            log.warning(
                "%s failed %d tasks in a row and is set aside; the tasks go to others", worker_id, len(forgiven)
            )
        return True

    def release(self, task_id: str, worker_id: str, attempt: int | None = None) -> bool:
        """Take a task back without blame; False if this was not its open attempt and changes nothing."""
        with self.lock:
            self.fleet.gave_back(worker_id, task_id)
            return self.ledger.release(task_id, worker_id, attempt)

    # ---- where the sweep stands -----------------------------------------------------------------------------------

    def is_over(self) -> bool:
        """Whether every task is complete or failed for good."""
        with self.lock:
            return self.ledger.view.counts().is_terminal

    def status(self) -> dict[str, Any]:
        """How the sweep is getting on, see docs/protocol.md."""
        with self.lock:
            return self._reporter.status(self.projection.lagging, self.clock.monotonic())

    def tell_done(self, worker_id: str) -> bool:
        """Whether nothing is left to do; a worker that is told so need not be waited for."""
        with self.lock:
            is_over = self.is_over()
            self.fleet.see(worker_id).was_told_done = is_over
            return is_over

    def has_told_everyone(self) -> bool:
        """Whether every worker heard of lately knows that all is done."""
        with self.lock:
            return self.fleet.all_told_done()

    @property
    def retry_after_s(self) -> float:
        """After how long a worker that got no task may ask again."""
        return min(self.heartbeat_s, LONGEST_WAIT_S)

    # ---- files ----------------------------------------------------------------------------------------------------

    def sync(self, *, patient: bool) -> int:
        """Look at the results files that are not as we left them; how many tasks rows of others completed.

        A patient look leaves a last line that may still be being written alone.
        """
        adopted = 0
        with self.lock:
            due = self.projection.due()
        for output_dir in due:
            with self.lock:  # for one folder at a time, so that requests are answered in between
                adopted += self.projection.sync(output_dir, patient=patient)
        if adopted:
            log.info("%d experiments were completed by rows that others wrote", adopted)
        return adopted

    def is_up_to_date(self) -> bool:
        """Whether every results file can be written."""
        return not self.projection.lagging

    def write_outputs(self) -> None:
        """Bring `summary.csv` and `history.parquet` of every output folder up to date."""
        with self.lock:
            output_dirs = self.ledger.view.output_dirs()
        self.outputs.write(output_dirs)
