"""The tasks that a worker holds, from their hand-out to the end of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from fedsweep.errors import ProtocolError
from fedsweep.manager.failures import Failure
from fedsweep.manager.protocol import TaskMessage
from fedsweep.plan.experiment import from_config
from fedsweep.worker import spool
from fedsweep.worker.checkpoints import Checkpoints
from fedsweep.worker.client import notify_task_failed, submit_result_to_manager
from fedsweep.worker.delivery import deliver_spool, details_of, give_back, keep, last_words, reason_of
from fedsweep.worker.heartbeat import Heartbeat
from fedsweep.worker.result import Progress
from fedsweep.worker.station import Station
from fedsweep.worker.task_log import TaskLog

log = logging.getLogger(__name__)

AWAY_PAUSE_S = 5.0  # before a result that could not even be kept is sent again
AWAY_S = 30.0  # before a manager that could not take a result is tried again: each try costs seconds of training
LAST_WORDS_S = 2.0  # for giving tasks back; those that are left come back when their leases end


class HeldTasks:
    """Tasks in this worker's hands. While entered, heartbeats are sent for them.

    Each ends in one way of five: delivered (or in the spool), failed, dropped, given back, or, where this process is
    killed, lost.
    """

    def __init__(self, station: Station) -> None:
        self.station = station
        self.checkpoints = Checkpoints(station.checkpoint_dir)
        self.has_undelivered = False  # whether a result waits in the spool
        self._tasks: dict[str, TaskMessage] = {}
        self._logs: dict[str, TaskLog] = {}
        self._away_until = -float("inf")
        self._heartbeat = Heartbeat(station.client, station.worker_id, station.device_name, station.stop)

    def __enter__(self) -> Self:
        self._heartbeat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.__exit__(kind, error, trace)

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._tasks

    def take(self, tasks: Iterable[TaskMessage]) -> list[TaskMessage]:
        """Hold these tasks; those that are new. One that is held already goes on, under its new attempt."""
        new = []
        for task in tasks:
            if task.task_id not in self._tasks:
                new.append(task)
                self._logs[task.task_id] = TaskLog(task)
                who = f"{self.station.worker_id} on {self.station.device.torch_name}"
                config = json.dumps({**task.config, "seed": task.seed}, sort_keys=True)
                self.note(task.task_id, f"start: try {task.retry_count + 1} by {who}: {config}")
            self._tasks[task.task_id] = task
            self._heartbeat.hold(task)
        return new

    def note(self, task_id: str, text: str) -> None:
        """Write a line into a task's own log."""
        self._logs[task_id].line(text)

    def tell(self, task_id: str, progress: Progress) -> None:
        """Say how a task's round ended, in its log and in the next heartbeat."""
        self._heartbeat.tell(task_id, progress)
        self.note(
            task_id,
            f"round {progress.round}/{progress.rounds}: "
            f"validation loss {progress.val_loss}, accuracy {progress.val_acc}",
        )

    def dropped(self) -> list[str]:
        """The tasks that are held and that the manager no longer wants from us."""
        return [task_id for task_id in self._heartbeat.dropped() if task_id in self._tasks]

    # ---- the five ends

    def drop(self, task_id: str) -> None:
        """Leave a task that the manager no longer wants from us."""
        reason = "The manager no longer wants this task from this worker."
        self.note(task_id, f"left: {reason}")
        log.info("%s: %s", task_id, reason)
        self._end(task_id)

    def fail(self, task_id: str, error: Exception) -> None:
        """Report what a task's own code raised."""
        self._logs[task_id].failure(error)
        self._report_failure(task_id, error)

    def finish(self, task_id: str, result: Mapping[str, Any]) -> None:
        """Put a task's result into the spool, then send it."""
        result = {**result, "worker": self.station.worker_id}
        self.note(
            task_id,
            f"result: {result['outcome']}, test accuracy {result['mean_test_acc']}, {result['wall_time_s']} s",
        )
        task = self._tasks[task_id]
        kept = keep(task, result, self.station.spool_dir)
        if kept is not None:
            self._end(task_id)
        try:
            if not self._submit(task, result, kept):
                return
        except ProtocolError as error:
            if error.code == "unauthorized":  # the next request of the worker will look for another token
                self.has_undelivered = True
                self._end(task_id)
                return
            if kept is not None:
                spool.set_aside(kept.path, error)
            self._tasks[task_id] = task
            self._report_failure(task_id, error)
            return
        if kept is not None:
            spool.remove(kept)
        self._end(task_id)
        log.info("%s: %s, test accuracy %s", task_id, result["outcome"], result["mean_test_acc"])

    def give_back_all(self) -> None:
        """Release every task, in a short time: this worker was asked to stop."""
        client = last_words(self.station.client)
        deadline = self.station.clock() + LAST_WORDS_S
        with client:
            for task in list(self._tasks.values()):
                self.note(task.task_id, "left: the worker was asked to stop")
                if self.station.clock() < deadline:
                    give_back(task, client, self.station.worker_id)
        self._tasks.clear()

    def _end(self, task_id: str) -> None:
        """Hold a task no longer. Nobody will go on with it from where it was saved."""
        self._heartbeat.let_go(task_id)
        task = self._tasks.pop(task_id, None)
        if task is not None and (signature := signature_of(task)):
            self.checkpoints.remove(signature)

    def _report_failure(self, task_id: str, error: Exception) -> None:
        task, reason, details = self._tasks[task_id], reason_of(error), details_of(error)
        self._log_failure(task, Failure.of(reason, **details))
        self._end(task_id)
        notify_task_failed(self.station.client, task_id, self.station.worker_id, reason, task.attempt, details=details)

    def _log_failure(self, task: TaskMessage, failure: Failure) -> None:
        """Say why a task failed: of each cause once in full, since thousands of tasks may fail for the same one."""
        which = task.task_id + " failed" + (f" (try {task.retry_count + 1})" if task.retry_count else "")
        first = self.station.causes.get(failure.group)
        if first is None:
            self.station.causes[failure.group] = task.task_id
            log.warning("%s: %s", which, failure.text.splitlines()[-1])
        else:
            like = "before" if first == task.task_id else first
            log.warning("%s: the same %s as %s", which, failure.exception, like)

    # ---- a manager that is away

    @property
    def is_manager_away(self) -> bool:
        """Whether the manager could not take a result just now."""
        return self.station.clock() < self._away_until

    def _submit(self, task: TaskMessage, result: Mapping[str, Any], kept: spool.Undelivered | None) -> bool:
        """Send a result; False where it waits in the spool. One that could not be kept is sent until it arrives."""
        station = self.station
        while kept is None or not self.is_manager_away:
            if submit_result_to_manager(station.client, task.task_id, station.worker_id, result, task.attempt):
                return True
            self._away_until = station.clock() + AWAY_S
            if kept is None:
                station.stop.sleep(AWAY_PAUSE_S)
        self.has_undelivered = True
        log.warning("%s: the manager cannot take the result now; it waits in %s", task.task_id, kept.path)
        return False

    def deliver_waiting(self) -> None:
        """Try again to deliver what waits in the spool, from time to time."""
        if not self.has_undelivered or self.is_manager_away:
            return
        try:
            self.has_undelivered = not deliver_spool(
                self.station.spool_dir, self.station.client, self.station.worker_id
            )
        except ProtocolError as error:
            log.debug("what waits cannot be delivered now: %s", error)
        self._away_until = self.station.clock() + AWAY_S if self.has_undelivered else -float("inf")


def signature_of(task: TaskMessage) -> str | None:
    """The signature of a task's experiment, which managers of old do not tell; None where it is none."""
    try:
        return task.signature or from_config({**task.config, "seed": task.seed}).signature
    except ValueError:
        return None
