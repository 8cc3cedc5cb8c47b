"""Small files of the state directory that are for their owner's eyes alone."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def write_private(path: Path, content: bytes) -> None:
    """Put a file in place, whole and on disk, readable by its owner alone from its first moment on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)  # mode 0600
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def read_private(path: Path, most: int) -> bytes:
    """What is in a file; a warning where others can read it too.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no plain file, or has more than `most` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # not waiting for the other end of a FIFO
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most:
            raise ValueError
        if facts.st_mode & 0o077:
            log.warning("others can read %s, which holds a secret; make it yours alone: chmod 600", path)
        return os.read(descriptor, most)
    finally:
        os.close(descriptor)
