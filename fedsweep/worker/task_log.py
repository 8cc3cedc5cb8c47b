"""The log of one experiment, beside its results."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import traceback
from datetime import datetime
from pathlib import Path

from fedsweep.files import open_plain
from fedsweep.manager.protocol import TaskMessage

log = logging.getLogger(__name__)

LONGEST_NAME = 200  # of a log file; file systems allow 255 bytes


class TaskLog:
    """The experiment's own log, `logs/{task_id}.log` in its output folder. Another attempt appends to it.

    Where it cannot be written the experiment runs without, and the worker's own log says so. The file is open only
    while a line is written: hundreds of experiments train together.
    """

    def __init__(self, task: TaskMessage) -> None:
        self.path: Path | None = Path(task.output_dir) / "logs" / log_name(task.task_id)
        self._task_id = task.task_id
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._do_without(error)

    def line(self, text: str) -> None:
        """Write a line with the time."""
        if self.path is None:
            return
        now = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
        try:
            descriptor = open_plain(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(f"{now} {text}\n")
        except OSError as error:
            self._do_without(error)

    def failure(self, error: BaseException) -> None:
        """Write what was raised, with its traceback."""
        self.line("failed\n" + "".join(traceback.format_exception(error)).rstrip())

    def _do_without(self, error: OSError) -> None:
        self.path = None
        log.warning("%s has no log: %s", self._task_id, error)


def log_name(task_id: str) -> str:
    """The name of a task's log file. A task_id that is no file name (a phase may have any name) is made one."""
    name = re.sub(r"[^\w.+=@ -]", "_", task_id)
    while len(name.encode()) > LONGEST_NAME:
        name = name[:-1]
    return f"{name}.log" if name == task_id else f"{name}-{hashlib.sha256(task_id.encode()).hexdigest()[:8]}.log"
