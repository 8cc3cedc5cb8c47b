"""A client of the manager that says exactly the bytes that it is given; nothing of ours."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any


class Client:
    """A raw socket. What `ask` says has these fields besides its own."""

    def __init__(
        self, port: int, *, secure: Callable[[socket.socket], socket.socket] | None = None, **fields: object
    ) -> None:
        self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if secure is not None:
            self.socket = secure(self.socket)
        self.fields = fields
        self.received = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> dict[str, Any]:
        """The next line."""
        while b"\n" not in self.received:
            data = self.socket.recv(65_536)
            assert data, f"closed after {self.received!r}"
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, **message: object) -> dict[str, Any]:
        self.send(json.dumps({**self.fields, **message}).encode() + b"\n")
        return self.answer()

    def is_closed(self) -> bool:
        """Whether the server closes without another word."""
        try:
            return not self.received and not self.socket.recv(1)
        except ConnectionError:
            return True
