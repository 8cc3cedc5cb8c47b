"""Small files of the state directory that are for their owner's eyes alone."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from pathlib import Path

from fedsweep.files import StrangeFile, open_plain

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
        StrangeFile: it is no plain file, or has more than `most` bytes.
        OSError: it cannot be read.
    """
    with os.fdopen(open_plain(path), "rb") as stream:
        facts = os.fstat(stream.fileno())
        if facts.st_size > most:
            raise StrangeFile(errno.EFBIG, f"it has {facts.st_size:,} bytes")
        if facts.st_mode & 0o077:
            log.warning("others can read %s, which holds a secret; make it yours alone: chmod 600", path)
        return stream.read()
