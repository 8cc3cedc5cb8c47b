"""Results that the manager has not acknowledged yet, on disk.

A result is written here before it is first sent, and removed once it is acknowledged. A file is either whole or not
there: it is written under another name, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SUFFIX = ".result.json"
ASIDE = ".unreadable"
MAX_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True)
class Undelivered:
    """A result that waits in the spool."""

    path: Path
    task_id: str
    attempt: int | None
    result_data: dict[str, Any]


def put(folder: Path, task_id: str, attempt: int | None, result_data: Mapping[str, Any]) -> Undelivered:
    """Keep a result until it is delivered; it survives a crash from the moment that this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(task_id.encode()).hexdigest()[:16]
    path = folder / f"{name}-{attempt or 0}{SUFFIX}"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    content = {"task_id": task_id, "attempt": attempt, "result_data": dict(result_data)}
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    _sync_folder(folder)
    return Undelivered(path, task_id, attempt, dict(result_data))


def pending(folder: Path) -> list[Undelivered]:
    """Every result that waits, oldest first. What cannot be read is set aside with a line in the log."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=_age):
        try:
            found.append(_read(path))
        except FileNotFoundError:
            continue  # another worker of this host has delivered it
        except (OSError, ValueError) as error:
            set_aside(path, error)
    return found


def remove(undelivered: Undelivered) -> None:
    """Forget a result that is delivered; another worker of this host may have been quicker."""
    undelivered.path.unlink(missing_ok=True)


def _read(path: Path) -> Undelivered:
    # Not following links and not waiting for the other end of a FIFO: only a plain file can be a result.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a plain file")
        if facts.st_size > MAX_BYTES:
            raise ValueError(f"it has {facts.st_size:,} bytes; a result has at most {MAX_BYTES:,}")
        content = json.loads(stream.read())
    match content:
        case {"task_id": str(task_id), "attempt": int() | None as attempt, "result_data": dict(result_data)}:
            return Undelivered(path, task_id, attempt, result_data)
    raise ValueError("it holds something else than a result")


def set_aside(path: Path, error: Exception) -> None:
    """Keep a file under another name, so that it is not tried again."""
    log.warning("%s cannot be delivered and is set aside: %s", path, error)
    try:
        os.replace(path, path.with_name(path.name + ASIDE))
    except OSError as failure:
        log.warning("%s cannot be set aside: %s", path, failure)


def _age(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
