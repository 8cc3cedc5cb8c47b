"""The folder that holds a manager's state, and the lock that keeps a second manager out of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsweep.address import ADDRESS_FILE, Address
from fedsweep.errors import StateError, StateHeldError
from fedsweep.files import StrangeFile, make_folder, open_fresh, open_plain

LEDGER_FILE = "ledger.sqlite3"
TOKEN_FILE = "token"
TLS_FILE = "tls.pem"
STATUS_FILE = "last_status.json"
LOCK_FILE = "manager.lock"


class StateLock:
    """Holds a state directory for this process. The lock is the operating system's, so it cannot outlive its holder.

    Raises:
        StateHeldError: another manager holds it; the message names its process and host.
        StateError: the directory cannot be used.
    """

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / LOCK_FILE
        try:
            make_folder(state_dir)
            self._descriptor = open_plain(path, os.O_RDWR | os.O_CREAT, follow=False)
        except OSError as error:
            if os.path.islink(path) or isinstance(error, StrangeFile):
                raise StateError(f"{path} is not a plain file; delete it, or name another --state-dir") from None
            raise StateError(
                f"{state_dir} cannot hold the state ({error.strerror}); name another --state-dir"
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 1000, 0).decode(errors="replace").strip() or "another manager"
            os.close(self._descriptor)
            option = "" if state_dir == Path(".fedsweep") else f" --state-dir {shlex.quote(str(state_dir))}"
            raise StateHeldError(
                f"{state_dir} is in use by {holder}; `fedsweep status{option}` shows its sweep, "
                f"`fedsweep stop{option}` ends it; or name another --state-dir"
            ) from None
        except OSError as error:  # as on Lustre mounted without `flock`, or NFS without its lock service
            os.close(self._descriptor)
            raise StateError(
                f"{path} cannot be locked ({error.strerror}): its file system has no locks; "
                "name a --state-dir on a local disk"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let the directory go."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def refuse_if_held(state_dir: Path) -> None:
    """See whether a manager holds a state directory. Makes nothing, where there is none.

    Raises:
        StateHeldError: one does.
        StateError: the directory cannot be used.
    """
    if os.path.lexists(state_dir / LOCK_FILE):
        StateLock(state_dir).release()


def write_address(state_dir: Path, address: Address) -> None:
    """Leave word where the manager of this state directory listens, and by which certificate it is known.

    Raises:
        StateError: it cannot be written, so that no worker would find this manager.
    """
    path = state_dir / ADDRESS_FILE
    word = {"host": address.host, "port": address.port, "pin": address.pin, "pid": os.getpid()}
    try:
        _write_json(path, word)
    except OSError as error:
        raise StateError(
            f"{path} cannot be written ({error.strerror}), and workers look there; move away what is in its place"
        ) from None


def remove_address(state_dir: Path) -> None:
    """Take that word back."""
    with contextlib.suppress(OSError):  # one that lies there too long is told by its process
        (state_dir / ADDRESS_FILE).unlink(missing_ok=True)


def write_last_status(state_dir: Path, status: Mapping[str, Any]) -> None:
    """Leave word how the sweep stood when its manager ended."""
    _write_json(state_dir / STATUS_FILE, status)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Put a file in place whole: whoever reads it finds the old content or the new."""
    fresh = path.with_name(f"{path.name}.tmp")
    with open_fresh(fresh) as stream:
        stream.write(json.dumps(content).encode() + b"\n")
    os.replace(fresh, path)
