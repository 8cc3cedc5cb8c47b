"""Places in the code of a manager and of a worker where a test can have it killed, or stopped.

A process is armed by a file `NAME.armed` that holds a signal, a number k and a point: it sends itself that signal
(SIGKILL, as from outside) when it is at that point for the k-th time from then on. The file may be there before the
process is, or come later.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsweep.worker.client import ManagerClient

MANAGER_POINTS = (
    "before commit",
    "after commit",  # on disk; neither in the file nor acknowledged
    "before write",
    "in write",  # half of the row is in the file
    "after write",
    "before send",  # in the file; not acknowledged
    "in send",  # half of the answer is out
    "after send",
)
# Where a file is written anew, or word is left where the manager listens.
REPAIR_POINTS = ("before fsync", "after fsync", "before rename", "after rename")
WORKER_POINTS = (
    "before fsync",  # computed; nothing in the spool
    "before rename",
    "after rename",  # in the spool; not sent
    "after send",  # sent; no answer heard
    "after answer",  # acknowledged; still in the spool
    "after unlink",
)


class Plug:
    """Pulls itself at the point that it is armed for."""

    def __init__(self, folder: Path, name: str) -> None:
        self._armed_file = folder / f"{name}.armed"
        self._hit_file = folder / f"{name}.hit"
        self._write = os.write
        self._armed = ("", 0)  # the point, and how often it is still to be passed
        self._signal = 0

    def at(self, point: str) -> None:
        """Be at a point; does not return where this process is killed."""
        if self.is_due(point):
            self.pull(point)

    def is_due(self, point: str) -> bool:
        """Whether this is the point."""
        if not self._armed[0]:
            try:
                kind, count, armed_for = self._armed_file.read_text().split(" ", 2)
            except FileNotFoundError:
                return False
            self._armed, self._signal = (armed_for, int(count)), int(kind)
        if point != self._armed[0]:
            return False
        self._armed = point, self._armed[1] - 1
        return self._armed[1] == 0

    def pull(self, point: str) -> None:
        """Die here, or stand still until someone lets this process go on."""
        self._hit_file.write_text(point)
        os.kill(os.getpid(), self._signal)

    def around(self, kind: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """The action, with a point before and after it."""

        def guarded(*arguments: Any, **options: Any) -> Any:
            self.at(f"before {kind}")
            value = action(*arguments, **options)
            self.at(f"after {kind}")
            return value

        return guarded

    def half(self, kind: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """The action on (something, bytes), with points before and after it and in its middle."""
        whole = self.around(kind, action)

        def guarded(target: Any, content: bytes) -> Any:
            if self.is_due(f"in {kind}"):
                action(target, content[: len(content) // 2])
                self.pull(f"in {kind}")
            return whole(target, content)

        return guarded

    def install_in_manager(self) -> None:
        """Put points around all that a manager leaves on the disk or says."""
        commit = self.around

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
                run = super().execute
                return (commit("commit", run) if statement == "COMMIT" else run)(statement, *arguments)

        connect = sqlite3.connect
        sqlite3.connect = lambda path, **options: connect(path, factory=Connection, **options)  # type: ignore[assignment]
        os.write = self.half("write", os.write)
        os.fsync = self.around("fsync", os.fsync)
        os.replace = self.around("rename", os.replace)
        asyncio.StreamWriter.write = self.half("send", asyncio.StreamWriter.write)  # type: ignore[method-assign]

    def install_in_worker(self) -> None:
        """Put points around all that a worker does with a result."""
        os.fsync = self.around("fsync", os.fsync)
        os.replace = self.around("rename", os.replace)
        os.unlink = self.around("unlink", os.unlink)
        exchange, sendall = ManagerClient._exchange, socket.socket.sendall
        is_result = b'"submit_result"'

        def answered(client: ManagerClient, request: bytes) -> dict[str, Any]:
            answer = exchange(client, request)
            if is_result in request:
                self.at("after answer")
            return answer

        def sent(connection: socket.socket, content: bytes) -> None:
            sendall(connection, content)
            if is_result in content:
                self.at("after send")

        ManagerClient._exchange = answered  # type: ignore[method-assign]
        socket.socket.sendall = sent  # type: ignore[assignment, method-assign]
