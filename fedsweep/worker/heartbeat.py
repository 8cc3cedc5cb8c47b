"""While tasks run, a thread tells the manager so and hears which of them are still wanted."""

from __future__ import annotations

import logging
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from fedsweep.errors import ManagerUnreachable, ProtocolError
from fedsweep.manager.protocol import TaskMessage
from fedsweep.worker.client import ManagerClient
from fedsweep.worker.result import Progress
from fedsweep.worker.stopping import StopSignals

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 10.0  # for the answer to a heartbeat


class Heartbeat:
    """Beats for all tasks that a worker holds, while entered, over a connection of its own.

    As often as the task says that wants it most often.
    """

    def __init__(self, client: ManagerClient, worker_id: str, device: str, stop: StopSignals) -> None:
        """Talk to the manager of `client`, for a worker on `device` (a name for people); it may ask us to `stop`."""
        self.client = client.another(timeout=LONGEST_WAIT_S, retries=0)
        self.worker_id = worker_id
        self.device = device
        self._stop = stop
        self._tasks: dict[str, TaskMessage] = {}
        self._progress: dict[str, Progress] = {}
        self._dropped: set[str] = set()
        self._lock = threading.Lock()
        self._pause_s = LONGEST_WAIT_S
        self._changed = threading.Event()  # a task was taken: it may want to be heard of sooner
        self._ended = False
        self._thread = threading.Thread(target=self._beat_until_ended, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not waited for: a beat that is under way changes nothing for a task that has ended.
        self._ended = True
        self._changed.set()

    def hold(self, task: TaskMessage) -> None:
        """Beat for a task, from now on; for one that is held already under its new attempt."""
        with self._lock:
            self._tasks[task.task_id] = task
            self._dropped.discard(task.task_id)
            pause_s = min(each.heartbeat_s for each in self._tasks.values())
            is_sooner, self._pause_s = pause_s < self._pause_s, pause_s
        if is_sooner:
            self._changed.set()

    def let_go(self, task_id: str) -> None:
        """Beat for a task no longer."""
        with self._lock:
            self._tasks.pop(task_id, None)
            self._progress.pop(task_id, None)
            self._dropped.discard(task_id)

    def tell(self, task_id: str, progress: Progress) -> None:
        """Say in the next beat how far a task is."""
        with self._lock:
            self._progress[task_id] = progress

    def dropped(self) -> set[str]:
        """The tasks that the manager no longer wants from this worker."""
        with self._lock:
            return set(self._dropped)

    def _beat_until_ended(self) -> None:
        with self.client:
            while not self._ended:
                if self._changed.wait(self._pause_s):
                    self._changed.clear()
                elif not self._beat():
                    return

    def _message(self) -> dict[str, Any] | None:
        with self._lock:
            held = [
                {"task_id": task.task_id, "attempt": task.attempt}
                | (asdict(self._progress[task.task_id]) if task.task_id in self._progress else {})
                for task in self._tasks.values()
            ]
        if not held:
            return None
        return {"type": "heartbeat", "worker_id": self.worker_id, "device": self.device, "tasks": held}

    def _beat(self) -> bool:
        """Send one; whether there is a point in sending more."""
        message = self._message()
        if message is None:
            return True
        try:
            reply = self.client.ask(message)
        except ManagerUnreachable as error:
            log.debug("heartbeat: %s", error)
            return True
        except ProtocolError as error:
            log.debug("heartbeat: %s", error)
            return error.code != "unknown_type"  # an old manager knows none
        if reply.get("stop"):
            self._stop.request()
        if isinstance(reply.get("drop"), list):
            self._note_dropped(reply["drop"], message["tasks"])
        return True

    def _note_dropped(self, drop: list[Any], told: list[dict[str, Any]]) -> None:
        """What the manager said of attempts that are not ours any more by now does not count."""
        attempts = {(each["task_id"], each["attempt"]) for each in told}
        with self._lock:
            self._dropped |= {
                task.task_id
                for task in self._tasks.values()
                if task.task_id in drop and (task.task_id, task.attempt) in attempts
            }
