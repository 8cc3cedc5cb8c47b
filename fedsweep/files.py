"""Making files, folders and names survive a power loss."""

from __future__ import annotations

import os
from pathlib import Path


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
