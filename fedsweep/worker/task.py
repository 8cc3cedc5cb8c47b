"""One task from its hand-out to its result's acknowledgement."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedsweep.errors import FedsweepError, Preempted, ProtocolError
from fedsweep.manager.protocol import TaskMessage
from fedsweep.worker import spool
from fedsweep.worker.client import ManagerClient, notify_task_failed, release_task, submit_result_to_manager
from fedsweep.worker.device import CPU, Device, device_name
from fedsweep.worker.heartbeat import Heartbeat
from fedsweep.worker.runner import Progress, run_single_experiment
from fedsweep.worker.stopping import StopSignals

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0
ERROR_LINES = 20  # of a traceback, sent to the manager
AWAY_PAUSE_S = 5.0
LONGEST_NAME = 200  # of a log file; file systems allow 255 bytes


class Dropped(FedsweepError):
    """The manager no longer wants this task from this worker."""


def run_task(
    task: TaskMessage,
    client: ManagerClient,
    *,
    worker_id: str,
    spool_dir: Path,
    device: Device = CPU,
    data_dir: str | Path | None = None,
    stop: StopSignals | None = None,
) -> bool:
    """Run a task and deliver its result; whether the manager has it. One that it cannot take now waits in the spool.

    What the experiment's code raises is reported as the task's failure. Weights that are not finite are none: that
    result is `diverged`. When a stop signal comes, the task is given back without blame.

    Raises:
        Preempted: a stop signal came; the task has been given back, or its result waits in the spool.
    """
    stop = stop or StopSignals()
    with task_log(task) as lines:
        lines.info("start: attempt %s by %s on %s: %s", task.attempt, worker_id, device.torch_name, _as_json(task))
        heartbeat = Heartbeat(client, worker_id, device_name(device.torch_name), task)
        try:
            with heartbeat, stop.interruptible():
                result = _compute(task, heartbeat, device, data_dir, lines)
        except Preempted:
            stop.settle()
            lines.info("left: the worker was asked to stop")
            give_back(task, client, worker_id)
            raise
        except Dropped as reason:
            lines.info("left: %s", reason)
            log.info("%s: %s", task.task_id, reason)
            return False
        except Exception as error:
            lines.exception("failed")
            _report_failure(task, client, worker_id, error)
            return False
        lines.info(
            "result: %s, test accuracy %s, %s s",
            *(result[name] for name in ("outcome", "mean_test_acc", "wall_time_s")),
        )
    return _deliver(task, client, worker_id, {**result, "worker": worker_id}, spool_dir, stop)


def _compute(
    task: TaskMessage, heartbeat: Heartbeat, device: Device, data_dir: str | Path | None, lines: logging.Logger
) -> dict[str, Any]:
    def on_round(progress: Progress) -> None:
        heartbeat.progress = progress
        lines.info(
            "round %d/%d: validation loss %s, accuracy %s",
            *(progress.round, progress.rounds, progress.val_loss, progress.val_acc),
        )
        if heartbeat.dropped:
            raise Dropped

    result, history = run_single_experiment(
        task.config, task.seed, device=device.torch_name, data_dir=data_dir, on_round=on_round
    )
    return {**result, "history": history}


def _deliver(
    task: TaskMessage,
    client: ManagerClient,
    worker_id: str,
    result: dict[str, Any],
    spool_dir: Path,
    stop: StopSignals,
) -> bool:
    """Put the result into the spool, then send it: from here on no crash loses it."""
    kept = _keep(task, result, spool_dir)
    try:
        while not submit_result_to_manager(client, task.task_id, worker_id, result, task.attempt):
            if kept is not None:
                log.warning("%s: the manager cannot take the result now; it waits in %s", task.task_id, kept.path)
                return False
            stop.sleep(AWAY_PAUSE_S)
    except Preempted:
        if kept is None:
            stop.settle()
            give_back(task, client, worker_id)
        raise
    except ProtocolError as error:
        if error.code == "unauthorized":  # the next request of the worker will look for another token
            return False
        if kept is not None:
            spool.set_aside(kept.path, error)
        _report_failure(task, client, worker_id, error)
        return False
    if kept is not None:
        spool.remove(kept)
    log.info("%s: %s, test accuracy %s", task.task_id, result["outcome"], result["mean_test_acc"])
    return True


def _keep(task: TaskMessage, result: dict[str, Any], spool_dir: Path) -> spool.Undelivered | None:
    try:
        return spool.put(spool_dir, task.task_id, task.attempt, result)
    except OSError as error:
        log.error(
            "%s: the result cannot be kept in %s (%s); it is sent until it arrives", task.task_id, spool_dir, error
        )
        return None


def give_back(task: TaskMessage, client: ManagerClient, worker_id: str) -> None:
    """Release a task, over a new connection: a stop signal may have come in the middle of an exchange."""
    log.info("%s is given back", task.task_id)
    last_words = ManagerClient(client.host, client.port, client.token, timeout=RELEASE_TIMEOUT_S, retries=0)
    with last_words:
        release_task(last_words, task.task_id, worker_id, task.attempt)


def _report_failure(task: TaskMessage, client: ManagerClient, worker_id: str, error: Exception) -> None:
    reason = reason_of(error)
    log.warning("%s failed: %s", task.task_id, reason.splitlines()[-1])
    notify_task_failed(client, task.task_id, worker_id, reason, task.attempt)


def reason_of(error: Exception) -> str:
    """Why a task failed: the message of an error made for people, else the last lines of the traceback."""
    if isinstance(error, FedsweepError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"CUDA out of memory: the experiment does not fit on this GPU. {error}"
    return "\n".join("".join(traceback.format_exception(error)).splitlines()[-ERROR_LINES:])


# ---- the log of one experiment


@contextmanager
def task_log(task: TaskMessage) -> Iterator[logging.Logger]:
    """The experiment's own log, `logs/{task_id}.log` in its output folder. Another attempt appends to it.

    Where it cannot be written the experiment runs without, and the worker's own log says so.
    """
    path = Path(task.output_dir) / "logs" / log_name(task.task_id)
    lines = logging.Logger(task.task_id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.warning("%s has no log: %s", task.task_id, error)
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    lines.addHandler(handler)
    try:
        yield lines
    finally:
        handler.close()


def log_name(task_id: str) -> str:
    """The name of a task's log file. A task_id that is no file name (a phase may have any name) is made one."""
    name = re.sub(r"[^\w.+=@ -]", "_", task_id)
    while len(name.encode()) > LONGEST_NAME:
        name = name[:-1]
    return f"{name}.log" if name == task_id else f"{name}-{hashlib.sha256(task_id.encode()).hexdigest()[:8]}.log"


def _as_json(task: TaskMessage) -> str:
    return json.dumps({**task.config, "seed": task.seed}, sort_keys=True)
