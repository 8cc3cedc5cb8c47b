"""While a task runs, a thread tells the manager so and hears whether the task is still wanted."""

from __future__ import annotations

import logging
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from fedsweep.errors import ManagerUnreachable, ProtocolError
from fedsweep.manager.protocol import TaskMessage
from fedsweep.worker.client import ManagerClient
from fedsweep.worker.runner import Progress

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 10.0  # for the answer to a heartbeat


class Heartbeat:
    """Beats every `heartbeat_s` of the task while entered, over a connection of its own."""

    def __init__(self, client: ManagerClient, worker_id: str, device: str, task: TaskMessage) -> None:
        """Talk to the manager of `client`, for the worker that holds `task` on `device` (a name for people)."""
        self.client = ManagerClient(
            client.host, client.port, client.token, timeout=min(task.heartbeat_s, LONGEST_WAIT_S), retries=0
        )
        self.worker_id = worker_id
        self.device = device
        self.task = task
        self.progress: Progress | None = None  # the newest; set by whoever runs the task
        self.dropped = False  # whether the manager no longer wants the task from this worker
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_ended, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not waited for: a beat that is under way changes nothing for a task that has ended.
        self._ended.set()

    def _beat_until_ended(self) -> None:
        with self.client:
            while not self._ended.wait(self.task.heartbeat_s):
                if not self._beat():
                    return

    def _beat(self) -> bool:
        """Send one; whether there is a point in sending more."""
        held: dict[str, Any] = {"task_id": self.task.task_id, "attempt": self.task.attempt}
        if self.progress is not None:
            held |= asdict(self.progress)
        message = {"type": "heartbeat", "worker_id": self.worker_id, "device": self.device, "tasks": [held]}
        try:
            reply = self.client.ask(message)
        except ManagerUnreachable as error:
            log.debug("heartbeat: %s", error)
            return True
        except ProtocolError as error:
            log.debug("heartbeat: %s", error)
            return error.code != "unknown_type"  # an old manager knows none
        drop = reply.get("drop")
        if isinstance(drop, list) and self.task.task_id in drop:
            self.dropped = True
        return True
