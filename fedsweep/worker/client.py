"""The worker's side of the protocol. "Unreachable", "wait" and "all done" are three different things."""

from __future__ import annotations

import logging
import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import ValidationError

from fedsweep.address import Address
from fedsweep.errors import ManagerNotTrusted, ManagerUnreachable, ProtocolError
from fedsweep.manager.protocol import MAX_ERROR, MAX_MESSAGE, FrameReader, TaskMessage, decode, encode
from fedsweep.worker.pinned import secure, stays_here

log = logging.getLogger(__name__)

RETRIES = 3
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
DEFAULT_RETRY_AFTER_S = 1.0
LONGEST_RETRY_AFTER_S = 60.0
# Errors that pass: the request was right, the manager could not serve it just then.
PASSING = ("retry_later", "internal", "timeout", "too_many_connections")
# Errors of a manager that does not speak as we do: with TLS, or without.
OTHER_SPEECH = ("tls_on_plain_port", "plain_on_tls_port")
_CHUNK = 65_536


@dataclass(frozen=True)
class TaskReply:
    """What came of asking for tasks."""

    kind: Literal["task", "wait", "done", "set_aside", "unreachable"]
    tasks: tuple[TaskMessage, ...] = ()  # with `task`: one or more, which may be trained together
    retry_after: float = 0.0  # with `wait`: seconds
    message: str = ""  # why there is no task, where the manager says so or does not answer

    @property
    def task(self) -> TaskMessage | None:
        """The first task, if there is one."""
        return self.tasks[0] if self.tasks else None


class ManagerClient:
    """Talks to one manager over a connection that it keeps, and opens again when it broke.

    Every request may be sent twice (a connection can break after the manager acted and before its answer came), which
    the protocol allows: a result that arrives twice counts once, and a task that was handed out unheard comes back
    when its lease ends. Managers of old, which answer one request without a newline and close, are understood too.

    Whom it must not trust gets neither token nor request. Where that is so from the start, the caller hears why. Later
    it only counts as a manager that is away: a stranger on the line shall not end a worker that holds results.

    Args:
        host: where the manager listens.
        port: likewise.
        token: the manager's token; None for a manager of old.
        timeout: seconds that one attempt at a request may take.
        pin: SHA-256 of the manager's certificate, 64 hex digits; None: it speaks plain text.
        insecure_plaintext: send the token to another machine although nothing is encrypted.
        retries: attempts after the first.
        sleep: waits that many seconds between attempts.
        clock: seconds of a clock that never goes back.
        jitter: draws from [0, 1), so that workers which lost the manager together do not return together.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str | None,
        timeout: float = 30.0,
        *,
        pin: str | None = None,
        insecure_plaintext: bool = False,
        retries: int = RETRIES,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.address = Address(host, port, pin)
        self.token = token
        self.timeout = timeout
        self.insecure_plaintext = insecure_plaintext
        self.has_met_manager = False
        self.retries = retries
        self.sleep = sleep
        self.clock = clock
        self.jitter = jitter
        self.connection: socket.socket | None = None

    def another(self, *, timeout: float, retries: int) -> ManagerClient:
        """A client of the same manager, with a connection of its own."""
        made = ManagerClient(
            self.address.host,
            self.address.port,
            self.token,
            timeout,
            pin=self.address.pin,
            insecure_plaintext=self.insecure_plaintext,
            retries=retries,
        )
        made.has_met_manager = self.has_met_manager
        return made

    def move_to(self, address: Address) -> None:
        """Talk to this address from now on."""
        if address != self.address:
            self.close()
            self.address = address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ManagerUnreachable: no manager answered, after the retries.
            ManagerNotTrusted: what answers is not the manager that was named, and never was.
            ProtocolError: the manager refused the request, or it is too large to be sent.
        """
        request = encode(message if self.token is None else {**message, "token": self.token})
        if len(request) > MAX_MESSAGE:
            raise ProtocolError("too_large", f"a message has {len(request):,} bytes; at most {MAX_MESSAGE:,} are read")
        reply = self._try(request)
        if reply.get("type") == "error":
            raise ProtocolError(str(reply.get("code")), str(reply.get("message")))
        return reply

    def _try(self, request: bytes) -> dict[str, Any]:
        for attempt in range(self.retries + 1):
            if attempt:
                self.sleep(min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S) * (0.5 + self.jitter()))
            try:
                reply = self._exchange(request)
            except OSError as error:
                reason = f"no manager answers at {self.address.place} ({error.strerror or error})"
                self.close()
            except ProtocolError as error:
                # Whoever this is did not refuse the request: it did not understand it.
                reason = f"what answers at {self.address.place} is no manager ({error})"
                self.close()
                break
            except ManagerNotTrusted as error:
                self.close()
                if not self.has_met_manager:
                    raise
                reason = str(error)
                break
            except BaseException:  # a signal's, say: the answer that is still to come belongs to no later request
                self.close()
                raise
            else:
                self.has_met_manager = True
                return reply
        raise ManagerUnreachable(reason)

    def _connect(self) -> socket.socket:
        """A connection to the manager, over which the token may go."""
        host, port, pin = self.address.host, self.address.port, self.address.pin
        connection = socket.create_connection((host, port), timeout=self.timeout)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if pin is not None:
                return secure(connection, pin, self.address.place)
            if self.token is not None and not (self.insecure_plaintext or stays_here(connection)):
                raise ManagerNotTrusted(
                    f"{self.address.place} is another machine, and the token would cross the network unencrypted. Use "
                    "the join string that the manager printed (--join), or accept the risk with --insecure-plaintext."
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _exchange(self, request: bytes) -> dict[str, Any]:
        deadline = self.clock() + self.timeout
        if self.connection is None or _has_ended(self.connection):
            self.close()
            self.connection = self._connect()
        self.connection.settimeout(self._until(deadline))
        self.connection.sendall(request)
        frames = FrameReader()
        while True:
            self.connection.settimeout(self._until(deadline))
            data = self.connection.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("it closed the connection without an answer")
            for frame in frames.feed(data):
                reply = decode(frame.raw)
                self._check_speech(reply)
                if not frame.newline:
                    self.close()  # an old manager: one request for a connection
                return reply

    def _check_speech(self, reply: Mapping[str, Any]) -> None:
        """Tell errors of the line from refusals of the manager, which never saw the request then."""
        code, message = reply.get("code"), reply.get("message")
        if reply.get("type") != "error":
            return
        if code == "truncated":
            raise ConnectionResetError("the request was cut off on its way")
        if code in OTHER_SPEECH:
            raise ManagerNotTrusted(f"the manager at {self.address.place} says: {message}")

    def _until(self, deadline: float) -> float:
        left = deadline - self.clock()
        if left <= 0:
            raise TimeoutError(f"it gave no answer in {self.timeout:g} s")
        return left


def _has_ended(connection: socket.socket) -> bool:
    """Whether the manager closed a connection on which nobody waits (or said something on it, which is as bad)."""
    connection.setblocking(False)  # MSG_DONTWAIT alone would not do: with a time-out, Python itself waits
    try:
        socket.socket.recv(connection, 1, socket.MSG_PEEK)  # the bytes themselves, under TLS too
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def request_task_from_manager(
    client: ManagerClient,
    worker_id: str,
    gpu_id: int | None = None,
    worker_type: str = "cpu",
    device: str | None = None,
    *,
    max_tasks: int = 1,
    cohort: str | None = None,
) -> TaskReply:
    """Ask for a task, or several; never raises for a manager that is away.

    Args:
        client: talks to the manager.
        worker_id: who asks.
        gpu_id: number of its GPU.
        worker_type: `gpu` or `cpu`.
        device: name of its device, for people.
        max_tasks: how many tasks are wanted at most. A manager of old gives one.
        cohort: take only tasks of this cohort; None: of any.

    Raises:
        ProtocolError: the manager refused the request (a wrong token, say).
    """
    message: dict[str, Any] = {"type": "request_task", "worker_id": worker_id, "worker_type": worker_type}
    known = {"gpu_id": gpu_id, "device": device, "cohort": cohort, "max_tasks": max_tasks if max_tasks > 1 else None}
    message |= {name: value for name, value in known.items() if value is not None}
    try:
        reply = client.ask(message)
    except ManagerUnreachable as error:
        return TaskReply("unreachable", message=str(error))
    except ProtocolError as error:
        if error.code not in PASSING:
            raise
        return TaskReply("unreachable", message=f"no manager has a task for us: {error}")
    if reply.get("type") == "task":
        try:
            given = reply["tasks"] if reply.get("tasks") else [reply["task"]]
            return TaskReply("task", tuple(map(TaskMessage.model_validate, given)))
        except (KeyError, TypeError, ValidationError) as error:
            raise ProtocolError("bad_field", f"the manager's task cannot be read: {error}") from None
    if reply.get("type") != "no_task":
        raise ProtocolError("unknown_type", f"the manager answered {reply.get('type')} to a request for a task")
    why = str(reply.get("message", ""))
    if reply.get("set_aside"):
        return TaskReply("set_aside", message=why)
    # An old manager says no more than `no_task`, and means the end.
    if reply.get("done", True):
        return TaskReply("done", message=why)
    return TaskReply("wait", retry_after=_pause(reply.get("retry_after")))


def _pause(said: object) -> float:
    """Seconds to wait, as the manager said them, within reason."""
    if not isinstance(said, (int, float)) or said < 0:
        return DEFAULT_RETRY_AFTER_S
    return min(float(said), LONGEST_RETRY_AFTER_S)


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
    client: ManagerClient,
    task_id: str,
    worker_id: str,
    error: str,
    attempt: int | None = None,
    *,
    details: Mapping[str, str] | None = None,
) -> bool:
    """Give a task back because its code raised; whether the manager heard.

    Args:
        client: talks to the manager.
        task_id: the task.
        worker_id: who failed.
        error: what was raised, for people; its end is sent.
        attempt: number of the hand-out.
        details: `exception`, `message`, `frame` and `host`, by which failures of one cause are put together.
    """
    message = {"type": "task_failed", "task_id": task_id, "worker_id": worker_id, "error": _sendable(error)}
    return _notify(client, message | {name: _sendable(text) for name, text in (details or {}).items()}, attempt)


def _sendable(text: str) -> str:
    """The end of a text that may hold anything: half a surrogate pair could not be sent."""
    return text[-MAX_ERROR:].encode("utf-8", "replace").decode()


def release_task(client: ManagerClient, task_id: str, worker_id: str, attempt: int | None = None) -> bool:
    """Give a task back without blame; whether the manager heard."""
    return _notify(client, {"type": "release", "task_id": task_id, "worker_id": worker_id}, attempt)


def leave_manager(client: ManagerClient, worker_id: str) -> None:
    """Say that this worker ends, having heard that there is no more for it, so that the manager may end too.

    Nothing depends on it: managers of old do not know the message, and one of ours ends without it a little later.
    """
    try:
        client.ask({"type": "leave", "worker_id": worker_id})
    except (ManagerUnreachable, ProtocolError) as error:
        log.debug("leave: %s", error)


def _notify(client: ManagerClient, message: dict[str, Any], attempt: int | None) -> bool:
    try:
        client.ask(_with_attempt(message, attempt))
    except (ManagerUnreachable, ProtocolError) as error:
        log.warning("%s of %s: %s", message["type"], message["task_id"], error)
        return False
    return True


def _with_attempt(message: dict[str, Any], attempt: int | None) -> dict[str, Any]:
    return message if attempt is None else {**message, "attempt": attempt}
