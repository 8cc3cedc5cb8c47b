"""Bringing results to the manager, by way of the spool: from there on no crash loses them."""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fedsweep
from fedsweep.errors import FedsweepError, ProtocolError
from fedsweep.manager.protocol import TaskMessage
from fedsweep.worker import spool
from fedsweep.worker.client import ManagerClient, release_task, submit_result_to_manager

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 2.0
LONGEST_NAME = 256
PACKAGE = str(Path(fedsweep.__file__).parent) + os.sep
ERROR_LINES = 20  # of a traceback, sent to the manager


def keep(task: TaskMessage, result: Mapping[str, Any], spool_dir: Path) -> spool.Undelivered | None:
    """Put a result into the spool; None, with a line in the log, where that cannot be done."""
    try:
        return spool.put(spool_dir, task.task_id, task.attempt, result)
    except OSError as error:
        log.error(
            "%s: the result cannot be kept in %s (%s); it is sent until it arrives", task.task_id, spool_dir, error
        )
        return None


def deliver_spool(spool_dir: Path, client: ManagerClient, worker_id: str) -> bool:
    """Deliver what lies in the spool, of this worker or of another; False where the manager is away.

    A result that the manager refuses for good is set aside in the spool with a line in the log.

    Raises:
        ProtocolError: the manager does not accept our token.
    """
    for waiting in spool.pending(spool_dir):
        try:
            delivered = submit_result_to_manager(
                client, waiting.task_id, worker_id, waiting.result_data, waiting.attempt
            )
        except ProtocolError as error:
            if error.code == "unauthorized":
                raise
            spool.set_aside(waiting.path, error)
            continue
        if not delivered:
            return False
        spool.remove(waiting)
        log.info("%s: the result that waited is delivered", waiting.task_id)
    return True


def last_words(client: ManagerClient) -> ManagerClient:
    """A new connection to the same manager: a stop signal may have come in the middle of an exchange on the old one."""
    return client.another(timeout=RELEASE_TIMEOUT_S, retries=0)


def give_back(task: TaskMessage, client: ManagerClient, worker_id: str) -> bool:
    """Release a task; whether the manager heard."""
    log.info("%s is given back", task.task_id)
    return release_task(client, task.task_id, worker_id, task.attempt)


def details_of(error: BaseException) -> dict[str, str]:
    """What tells the cause of a failure from others, as `task_failed` carries it; what is not known is left out."""
    frames = [
        f"fedsweep/{frame.filename.removeprefix(PACKAGE)}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(PACKAGE)
    ]
    details = {"exception": type(error).__name__, "message": str(error), "host": socket.gethostname()}
    if frames:
        details["frame"] = frames[-1]
    # Names are printable and at most so long, or the manager would refuse all of it.
    names = {name: "".join(filter(str.isprintable, text))[:LONGEST_NAME] for name, text in details.items()}
    return {name: text for name, text in (names | {"message": details["message"]}).items() if text}


def reason_of(error: Exception) -> str:
    """Why a task failed: the message of an error made for people, else the last lines of the traceback."""
    if isinstance(error, FedsweepError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"CUDA out of memory: the experiment does not fit on this GPU. {error}"
    return "\n".join("".join(traceback.format_exception(error)).splitlines()[-ERROR_LINES:])
