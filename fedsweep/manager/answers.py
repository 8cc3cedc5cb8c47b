"""What the manager answers to each request: from a message to a method of the sweep, and back to a message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedsweep.errors import ProtocolError
from fedsweep.manager.decisions import UnknownName
from fedsweep.manager.failures import Failure
from fedsweep.manager.protocol import (
    Cancel,
    Control,
    Drain,
    Failures,
    Heartbeat,
    Leave,
    Release,
    Request,
    RequestTask,
    Retry,
    ShowTask,
    Status,
    Stop,
    SubmitResult,
    TaskComplete,
    TaskFailed,
)
from fedsweep.manager.records import LedgerUnwritable, UnknownAttempt, UnknownTask
from fedsweep.manager.sweep import OpenSweep

ACK: dict[str, Any] = {"type": "ack"}


def answer(sweep: OpenSweep, request: Request, legacy: bool) -> dict[str, Any]:
    """The answer to a request; `legacy` says that an old client sent it.

    Raises:
        ProtocolError: the request cannot be served; the code says why.
    """
    if legacy and isinstance(request, Control):
        raise ProtocolError("unauthorized", f"{request.type} needs the token, which old clients do not send")
    try:
        return ANSWERS[type(request)](sweep, request, legacy)
    except UnknownName as error:
        raise ProtocolError("unknown_name", str(error)) from None
    except UnknownTask as error:
        raise ProtocolError("unknown_task", str(error)) from None
    except UnknownAttempt as error:
        raise ProtocolError("unknown_attempt", str(error)) from None
    except LedgerUnwritable as error:
        raise ProtocolError("retry_later", str(error)) from None


def answer_together(sweep: OpenSweep, asked: Sequence[tuple[Request, bool]]) -> list[dict[str, Any] | Exception]:
    """The answers to requests that change something, or what `answer` raised for them.

    All that they changed is one transaction, on disk when this returns. Where the disk refuses that, each is answered
    by itself, so that only those that cannot be served hear so.
    """
    try:
        with sweep.together():
            return [_answer_or_error(sweep, *each) for each in asked]
    except LedgerUnwritable:
        return [_answer_or_error(sweep, *each) for each in asked]


def _answer_or_error(sweep: OpenSweep, request: Request, legacy: bool) -> dict[str, Any] | Exception:
    try:
        return answer(sweep, request, legacy)
    except Exception as error:
        return error


def _request_task(sweep: OpenSweep, request: RequestTask, legacy: bool) -> dict[str, Any]:
    device = request.device or (f"cuda:{request.gpu_id}" if request.gpu_id is not None else request.worker_type)
    tasks = sweep.hand_out(
        request.worker_id, max_tasks=request.max_tasks, cohort=request.cohort, device=device, legacy=legacy
    )
    if not tasks:
        return sweep.no_task(request.worker_id, legacy=legacy)
    messages = [sweep.task_message(task) for task in tasks]
    return {"type": "task", "task": messages[0]} | ({"tasks": messages} if request.max_tasks > 1 else {})


def _submit_result(sweep: OpenSweep, request: SubmitResult, legacy: bool) -> dict[str, Any]:
    data = request.result_data.model_dump(mode="json", exclude_unset=True)
    verdict = sweep.save_result(request.task_id, request.worker_id, data, request.attempt)
    return {"type": "ack", "status": verdict}


def _task_complete(sweep: OpenSweep, request: TaskComplete, legacy: bool) -> dict[str, Any]:
    if not sweep.has_result(request.task_id, request.worker_id):
        raise ProtocolError("no_result", f"task {request.task_id[:80]!r} has no result here; send submit_result first")
    return ACK


def _task_failed(sweep: OpenSweep, request: TaskFailed, legacy: bool) -> dict[str, Any]:
    failure = Failure.of(
        request.error,
        exception=request.exception,
        message=request.message,
        frame=request.frame,
        host=request.host,
    )
    has_counted = sweep.mark_failed(request.task_id, request.worker_id, failure, request.attempt)
    return _ack(request.task_id, has_counted)


def _release(sweep: OpenSweep, request: Release, legacy: bool) -> dict[str, Any]:
    return _ack(request.task_id, sweep.release(request.task_id, request.worker_id, request.attempt))


def _ack(task_id: str, has_counted: bool) -> dict[str, Any]:
    """An ack; it names the task in `drop` where it came from an attempt that is not the open one."""
    return ACK if has_counted else {**ACK, "drop": [task_id]}


def _heartbeat(sweep: OpenSweep, request: Heartbeat, legacy: bool) -> dict[str, Any]:
    answer = {**ACK, "drop": sweep.renew(request.worker_id, request.tasks, device=request.device)}
    return {**answer, "stop": True} if sweep.ending == "stop" else answer


def _leave(sweep: OpenSweep, request: Leave, legacy: bool) -> dict[str, Any]:
    sweep.leave(request.worker_id)
    return ACK


def _status(sweep: OpenSweep, request: Status, legacy: bool) -> dict[str, Any]:
    return {"type": "status", "status": sweep.status()}


def _show_task(sweep: OpenSweep, request: ShowTask, legacy: bool) -> dict[str, Any]:
    return {"type": "task", "task": sweep.show_task(request.task_id)}


def _failures(sweep: OpenSweep, request: Failures, legacy: bool) -> dict[str, Any]:
    return {"type": "failures", **sweep.failures(earlier=request.earlier)}


def _retry(sweep: OpenSweep, request: Retry, legacy: bool) -> dict[str, Any]:
    return {**ACK, **sweep.retry(request.names)}


def _cancel(sweep: OpenSweep, request: Cancel, legacy: bool) -> dict[str, Any]:
    return {**ACK, **sweep.cancel(request.names)}


def _end(sweep: OpenSweep, request: Drain | Stop, legacy: bool) -> dict[str, Any]:
    return {**ACK, **sweep.end(request.type)}


ANSWERS: dict[type[Request], Callable[[OpenSweep, Any, bool], dict[str, Any]]] = {
    RequestTask: _request_task,
    SubmitResult: _submit_result,
    TaskComplete: _task_complete,
    TaskFailed: _task_failed,
    Release: _release,
    Heartbeat: _heartbeat,
    Leave: _leave,
    Status: _status,
    ShowTask: _show_task,
    Failures: _failures,
    Retry: _retry,
    Cancel: _cancel,
    Drain: _end,
    Stop: _end,
}
