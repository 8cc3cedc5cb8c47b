"""Files that survive a power loss, and reading what lies on disk without trusting what it is."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

WORD_BYTES = 1024 * 1024  # at most, of a file that one of our programs left for another


class StrangeFile(OSError):
    """What lies there is no plain file, or too large to be what it should be."""


def fsync(path: Path) -> None:
    """Make what a file holds survive a power loss; of a folder, what was made, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing, so that they survive a power loss.

    Raises:
        OSError: it cannot be made.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync(folder.parent)


def open_plain(path: Path, flags: int = os.O_RDONLY, *, follow: bool = True) -> int:
    """The descriptor of a plain file. Nobody waits for the other end of a FIFO, and nothing is read from a device.

    Raises:
        StrangeFile: it is no plain file.
        OSError: it cannot be opened, or is a link that shall not be followed.
    """
    links = 0 if follow else os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | links | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ENXIO):  # a folder; a socket, or a FIFO that nobody reads
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise StrangeFile(errno.EINVAL, "it is not a plain file")


def read_plain(path: Path, most: int | None = None, *, follow: bool = True) -> bytes:
    """What is in a plain file.

    Raises:
        StrangeFile: it is no plain file, or has more than `most` bytes.
        OSError: see `open_plain`.
    """
    with os.fdopen(open_plain(path, follow=follow), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if most is not None and size > most:
            raise StrangeFile(errno.EFBIG, f"it has {size:,} bytes; at most {most:,} are expected")
        return stream.read()


def read_word(path: Path) -> dict[str, Any]:
    """The JSON object that one of our programs left for another; empty where there is none, or something else."""
    try:
        found = json.loads(read_plain(path, WORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def open_fresh(path: Path) -> BinaryIO:
    """A new file under a name that is ours alone: what lies there goes, also a link or a FIFO.

    Raises:
        OSError: it cannot be made, or a folder is in the way.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")
