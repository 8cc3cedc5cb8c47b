"""The token: what every request carries, made at the first start of a manager."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedsweep.errors import UsageError
from fedsweep.files import StrangeFile
from fedsweep.manager.private_files import read_private, write_private

_MOST = 4096  # bytes of a token file


def ensure_token(path: Path) -> str:
    """The token in the file; made now, readable by its owner alone, where there is none.

    Raises:
        UsageError: there is a file, and it holds no token.
    """
    if not os.path.lexists(path):
        write_private(path, f"{secrets.token_urlsafe(32)}\n".encode())
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in the file.

    Raises:
        UsageError: the file is missing, unreadable or empty, or holds something else.
    """
    try:
        token = read_private(path, _MOST).decode("ascii").strip()
        if not token.isprintable() or len(token.split()) > 1:
            raise ValueError
    except (OSError, ValueError) as error:
        reason = "it is not a text file with a token"
        if isinstance(error, OSError) and not isinstance(error, StrangeFile):
            reason = str(error.strerror)
        raise UsageError(
            f"no token in {path} ({reason}); it lies in the manager's state directory: name it by --token-file"
        ) from None
    if not token:
        raise UsageError(f"the token file {path} is empty; delete it and start the manager again")
    return token
