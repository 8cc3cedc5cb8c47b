"""The worker's side of the protocol. "Unreachable", "wait" and "all done" are three different things."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import ValidationError

from fedsweep.errors import ManagerUnreachable, ProtocolError
from fedsweep.manager.protocol import FrameReader, TaskMessage, decode, encode

log = logging.getLogger(__name__)

RETRIES = 3
FIRST_PAUSE_S = 0.1
DEFAULT_RETRY_AFTER_S = 1.0
# Errors that pass: the request was right, the manager could not serve it just then.
PASSING = ("retry_later", "internal", "timeout", "too_many_connections")


@dataclass(frozen=True)
class TaskReply:
    """What came of asking for a task."""

    kind: Literal["task", "wait", "done", "unreachable"]
    task: TaskMessage | None = None  # with `task`
    retry_after: float = 0.0  # with `wait`: seconds


class ManagerClient:
    """Talks to one manager over a connection that it keeps, and opens again when it broke.

    Every request may be sent twice (a connection can break after the manager acted and before its answer came), which
    the protocol allows: a result that arrives twice counts once, and a task that was handed out unheard comes back
    when its lease ends.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str | None,
        timeout: float = 30.0,
        *,
        retries: int = RETRIES,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.host = host
        self.port = port
        self.token = token
        self.timeout = timeout
        self.retries = retries
        self.sleep = sleep
        self.jitter = jitter
        self.connection: socket.socket | None = None
        self.frames = FrameReader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.close()
        self.connection = None
        self.frames = FrameReader()

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ManagerUnreachable: no answer after the retries.
            ProtocolError: the manager refused the request, or answered what is no message.
        """
        request = encode(message if self.token is None else {**message, "token": self.token})
        for attempt in range(self.retries + 1):
            if attempt:
                self.sleep(FIRST_PAUSE_S * 2**attempt * (0.5 + self.jitter()))
            try:
                reply = self._exchange(request)
                break
            except OSError as error:
                reason = error
                self.close()
            except ProtocolError:
                self.close()
                raise
        else:
            raise ManagerUnreachable(f"no manager answers at {self.host}:{self.port} ({reason})")
        if reply.get("type") == "error":
            raise ProtocolError(str(reply.get("code")), str(reply.get("message")))
        return reply

    def _exchange(self, request: bytes) -> dict[str, Any]:
        if self.connection is None:
            self.connection = socket.create_connection((self.host, self.port), timeout=self.timeout)
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.sendall(request)
        while True:
            data = self.connection.recv(65_536)
            if not data:
                raise ConnectionResetError("the manager closed the connection")
            if frames := self.frames.feed(data):
                if not frames[0].newline:
                    self.close()  # an old manager: one request for a connection
                return decode(frames[0].raw)


def request_task_from_manager(
    client: ManagerClient,
    worker_id: str,
    gpu_id: int | None = None,
    worker_type: str = "cpu",
    device: str | None = None,
) -> TaskReply:
    """Ask for a task; never raises for a manager that is away.

    Raises:
        ProtocolError: the manager refused the request (a wrong token, say).
    """
    message: dict[str, Any] = {"type": "request_task", "worker_id": worker_id, "worker_type": worker_type}
    message |= {name: value for name, value in (("gpu_id", gpu_id), ("device", device)) if value is not None}
    try:
        reply = client.ask(message)
    except ManagerUnreachable:
        return TaskReply("unreachable")
    except ProtocolError as error:
        if error.code not in PASSING:
            raise
        log.warning("the manager has no task for us now: %s", error)
        return TaskReply("unreachable")
    if reply.get("type") == "task":
        try:
            return TaskReply("task", TaskMessage.model_validate(reply["task"]))
        except (KeyError, ValidationError) as error:
            raise ProtocolError("bad_field", f"the manager's task cannot be read: {error}") from None
    if reply.get("type") != "no_task":
        raise ProtocolError("unknown_type", f"the manager answered {reply.get('type')} to a request for a task")
    # An old manager says no more than `no_task`, and means the end.
    if reply.get("done", True):
        return TaskReply("done")
    return TaskReply("wait", retry_after=float(reply.get("retry_after", DEFAULT_RETRY_AFTER_S)))


def submit_result_to_manager(
    client: ManagerClient, task_id: str, worker_id: str, result_data: Mapping[str, Any], attempt: int | None = None
) -> bool:
    """Bring a result; True once the manager has it on disk, False while it is away or cannot store it.

    Raises:
        ProtocolError: the manager refused the result for good.
    """
    message = {"type": "submit_result", "task_id": task_id, "worker_id": worker_id, "result_data": dict(result_data)}
    try:
        client.ask(_with_attempt(message, attempt))
    except ManagerUnreachable:
        return False
    except ProtocolError as error:
        if error.code in PASSING:
            log.warning("the manager cannot take the result of %s now: %s", task_id, error)
            return False
        raise
    return True


def notify_task_complete(client: ManagerClient, task_id: str, worker_id: str, attempt: int | None = None) -> bool:
    """Whether the manager has the result of a task; False also while it is away."""
    return _notify(client, {"type": "task_complete", "task_id": task_id, "worker_id": worker_id}, attempt)


def notify_task_failed(
    client: ManagerClient, task_id: str, worker_id: str, error: str, attempt: int | None = None
) -> bool:
    """Give a task back because its code raised; whether the manager heard."""
    message = {"type": "task_failed", "task_id": task_id, "worker_id": worker_id}
    # What was raised may hold anything; half a surrogate pair could not be sent.
    message["error"] = error[-8_000:].encode("utf-8", "replace").decode()
    return _notify(client, message, attempt)


def release_task(client: ManagerClient, task_id: str, worker_id: str, attempt: int | None = None) -> bool:
    """Give a task back without blame; whether the manager heard."""
    return _notify(client, {"type": "release", "task_id": task_id, "worker_id": worker_id}, attempt)


def _notify(client: ManagerClient, message: dict[str, Any], attempt: int | None) -> bool:
    try:
        client.ask(_with_attempt(message, attempt))
    except (ManagerUnreachable, ProtocolError) as error:
        log.warning("%s of %s: %s", message["type"], message["task_id"], error)
        return False
    return True


def _with_attempt(message: dict[str, Any], attempt: int | None) -> dict[str, Any]:
    return message if attempt is None else {**message, "attempt": attempt}
