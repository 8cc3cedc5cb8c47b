"""Results that the manager has not acknowledged yet, on disk.

A result is written here before it is first sent, and removed once it is acknowledged. A file is either whole or not
there: it is written under another name, synced, and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsweep.errors import ProtocolError
from fedsweep.files import StrangeFile, fsync, make_folder, read_plain
from fedsweep.manager.protocol import decode

log = logging.getLogger(__name__)

SUFFIX = ".result.json"
UNFINISHED = ".part"
ASIDE = ".unreadable"
MAX_BYTES = 2 * 1024 * 1024
LEFT_BEHIND_S = 3600.0  # writing takes less; an older unfinished file belongs to a process that was killed

# What the file itself is to blame for. Other errors (too many open files, a disk that hangs) may pass.
_FOR_GOOD = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)


@dataclass(frozen=True)
class Undelivered:
    """A result that waits in the spool."""

    path: Path
    task_id: str
    attempt: int | None
    result_data: dict[str, Any]


def put(folder: Path, task_id: str, attempt: int | None, result_data: Mapping[str, Any]) -> Undelivered:
    """Keep a result until it is delivered; it survives a crash from the moment that this returns.

    Raises:
        ValueError: the result has a number that is not finite.
        OSError: it cannot be written; nothing is left of it.
    """
    content = {"task_id": task_id, "attempt": attempt, "result_data": dict(result_data)}
    raw = json.dumps(content, allow_nan=False).encode()
    make_folder(folder)
    name = hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    path = folder / f"{name}-{attempt or 0}{SUFFIX}"
    descriptor, temporary = tempfile.mkstemp(prefix=f"{name}-", suffix=UNFINISHED, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(descriptor)
        if path.is_dir() and not path.is_symlink():
            set_aside(path, IsADirectoryError("it is a folder"))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync(folder)
    return Undelivered(path, task_id, attempt, dict(result_data))


def pending(folder: Path) -> list[Undelivered]:
    """Every result that waits, oldest first. What cannot be read is set aside with a line in the log."""
    _clear_left_behind(folder)
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=_written_at):
        try:
            found.append(_read(path))
        except FileNotFoundError:
            continue  # another worker of this host has delivered it
        except (ProtocolError, ValueError, StrangeFile) as error:
            set_aside(path, error)
        except OSError as error:
            if error.errno in _FOR_GOOD:
                set_aside(path, error)
            else:
                log.warning("%s cannot be read now: %s", path, error)
    return found


def remove(undelivered: Undelivered) -> None:
    """Forget a result that is delivered; another worker of this host may have been quicker."""
    undelivered.path.unlink(missing_ok=True)


def _read(path: Path) -> Undelivered:
    match decode(read_plain(path, MAX_BYTES, follow=False)):
        case {"task_id": str(task_id), "attempt": int() | None as attempt, "result_data": dict(result_data)} if (
            not isinstance(attempt, bool)
        ):
            return Undelivered(path, task_id, attempt, result_data)
    raise ValueError("it holds something else than a result")


def set_aside(path: Path, error: Exception) -> None:
    """Keep a file under another name, so that it is not tried again."""
    log.warning("%s cannot be delivered and is set aside: %s", path, error)
    names = (path.with_name(f"{path.name}.{number}{ASIDE}") for number in itertools.count(1))
    try:
        os.rename(path, next(name for name in names if not os.path.lexists(name)))
    except FileNotFoundError:
        pass  # another worker of this host has done it
    except OSError as failure:
        log.warning("%s cannot be set aside: %s", path, failure)


def _clear_left_behind(folder: Path) -> None:
    """Delete what writers that were killed have left unfinished; it was never promised to anyone."""
    for path in folder.glob(f"*{UNFINISHED}"):
        if time.time() - _written_at(path) > LEFT_BEHIND_S:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be deleted: %s", path, error)


def _written_at(path: Path) -> float:
    """When the file was written last, in seconds of the epoch; never long ago where that cannot be told."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()
