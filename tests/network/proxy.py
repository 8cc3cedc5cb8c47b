"""Somebody on the line between clients of ours and a manager, who does to each exchange what a test says.

A client of ours ends a request with a newline and waits for the answer before it sends the next one, so exchanges can
be told apart here. One thread serves one connection. What a fault does to the manager is over before the client
notices anything, where that can be seen: what it asks next comes after.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

CUTS = {
    "request": ("cut request", "half close request", "reset request"),
    "answer": ("cut answer", "half close answer", "reset answer"),
}
DELAYS = ("delay request", "delay answer")
REPEATS = ("repeat", "repeat elsewhere", "repeat later")
DROP = "drop answer"
TURN = "turn"
PATIENCE_S = 20.0  # for the manager, a client, or another's turn; then the test is wrong


@dataclass(frozen=True)
class Fault:
    """What happens to one exchange.

    `cut request` (or `answer`): `at` bytes pass, then both connections end. `reset …`: by a reset. `half close
    request`: `at` bytes pass, then that side ends, and what the manager says to it passes. `half close answer`:
    `at` bytes pass, then that side ends, and the client's is left open. `delay …`: `at` bytes pass, then after a
    pause the others. `drop answer`: the client hears nothing and no end. `repeat`: the request arrives twice on one
    connection, and both answers pass. `repeat elsewhere`: it arrives on another connection first. `repeat later`: it
    arrives again after `at` other exchanges. `turn`: the request waits until `at` others have been answered.
    """

    kind: str
    at: int = 0
    pause_s: float = 0.0


class BadNetwork:
    """A port that leads to a manager. While entered, it is open.

    Args:
        manager_port: where the manager listens, on this machine.
        choose: what happens to the exchange with this request; None: nothing. Called from many threads.
        repeats: called with a request before it is sent once more than its client did.
        is_sealed: TLS is spoken. What passes cannot be read: `choose` is asked of each connection, with no bytes, and
            may name one of the `CUTS`, which happens at that byte of all that passes on that side.
    """

    def __init__(
        self,
        manager_port: int,
        choose: Callable[[bytes], Fault | None],
        repeats: Callable[[bytes], object],
        *,
        is_sealed: bool = False,
    ) -> None:
        self.manager_port = manager_port
        self.choose = choose
        self.repeats = repeats
        self.is_sealed = is_sealed
        self.hits: Counter[str] = Counter()
        self.sizes: list[dict[str, int]] = []  # of every exchange: bytes of the request, and of its answer if it came
        self.turn = 0  # how many of those that wait for their turn have been answered
        self._late: list[tuple[int, bytes]] = []  # how many exchanges are still to come before, and what is repeated
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._is_up = True
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    # ---- the line as a whole

    def go_down(self) -> None:
        """Refuse and end every connection."""
        self.hits["went down"] += 1
        self._close()

    def _close(self) -> None:
        self._is_up = False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def come_up(self) -> None:
        """Be there again, on the same port."""
        self._is_up = True
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self._listen()

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            far = socket.create_connection(("127.0.0.1", self.manager_port), timeout=PATIENCE_S)
            with far:
                for each in (near, far):
                    each.settimeout(PATIENCE_S)
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open |= {near, far}
                if self._is_up:
                    self._serve_between(Lines(near), Lines(far))
                self._open -= {near, far}

    def _serve_between(self, client: Lines, manager: Lines) -> None:
        if self.is_sealed:
            self._relay(client, manager, self.choose(b""))
            return
        while (request := client.next()) and self._exchange(client, manager, request):
            self._repeat_what_is_due()

    # ---- one connection that cannot be read

    def _relay(self, client: Lines, manager: Lines, fault: Fault | None) -> None:
        """Pass bytes on both ways until one side ends, or to where they are cut."""
        passed = {"request": 0, "answer": 0}
        sides = {client.socket: ("request", manager), manager.socket: ("answer", client)}
        while True:
            for source in select.select([*sides], [], [], PATIENCE_S)[0]:
                side, sink = sides[source]
                if not (data := source.recv(65_536)):
                    return
                if fault is not None and fault.kind in CUTS[side] and passed[side] + len(data) >= fault.at:
                    sink.send(data[: fault.at - passed[side]])
                    self.hits[f"{fault.kind} under TLS"] += 1
                    self._cut(client, manager, fault)
                    return
                sink.send(data)
                passed[side] += len(data)
                self.sizes.append(dict(passed))

    # ---- one exchange

    def _exchange(self, client: Lines, manager: Lines, request: bytes) -> bool:
        """Pass a request on and its answer back; whether the connection goes on."""
        fault = self.choose(request)
        self.sizes.append({"request": len(request), "answer": 0})
        if fault is None:
            return self._pass(client, manager, request)
        self.hits[fault.kind] += 1
        at = fault.at
        if fault.kind in CUTS["request"]:
            manager.send(request[:at])
            return self._cut(client, manager, fault)
        if fault.kind == "repeat elsewhere":
            self._ask_elsewhere(request)
        elif fault.kind == "repeat later":
            with self._changed:
                self._late.append((at, request))
        elif fault.kind == "repeat":
            self.repeats(request)
            manager.send(request)
        elif fault.kind == TURN:
            self._await_turn(at)
        elif fault.kind == "delay request":
            manager.send(request[:at])
            time.sleep(fault.pause_s)
            request = request[at:]
        manager.send(request)
        answer = self._answer(manager)
        if fault.kind == TURN:
            self._next_turn()
        elif fault.kind == "repeat":
            answer += manager.next()
        elif fault.kind == "delay answer":
            client.send(answer[:at])
            time.sleep(fault.pause_s)
            answer = answer[at:]
        elif fault.kind in CUTS["answer"]:
            client.send(answer[:at])
            return self._cut(client, manager, fault)
        elif fault.kind == DROP:
            client.next()  # it says nothing more, and leaves when it has lost patience
            return False
        client.send(answer)
        return bool(answer)

    def _pass(self, client: Lines, manager: Lines, request: bytes) -> bool:
        manager.send(request)
        answer = self._answer(manager)
        client.send(answer)
        return bool(answer)

    def _answer(self, manager: Lines) -> bytes:
        answer = manager.next()
        self.sizes[-1]["answer"] = len(answer)
        return answer

    def _cut(self, client: Lines, manager: Lines, fault: Fault) -> bool:
        """End a connection here; whether it goes on, which it does not."""
        if fault.kind.startswith("reset"):
            for each in (manager, client):
                each.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault.kind in CUTS["request"]:
            said = manager.rest()
            client.send(said if fault.kind == "half close request" else b"")
        elif fault.kind == "half close answer":
            client.rest()
        manager.socket.close()
        client.socket.close()
        return False

    def _ask_elsewhere(self, request: bytes) -> None:
        self.repeats(request)
        with socket.create_connection(("127.0.0.1", self.manager_port), timeout=PATIENCE_S) as other:
            other.sendall(request)
            Lines(other).next()

    def _repeat_what_is_due(self) -> None:
        with self._changed:
            due = [request for left, request in self._late if left <= 0]
            self._late = [(left - 1, request) for left, request in self._late if left > 0]
        for request in due:
            self._ask_elsewhere(request)

    def _await_turn(self, place: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.turn >= place, PATIENCE_S)

    def _next_turn(self) -> None:
        with self._changed:
            self.turn += 1
            self._changed.notify_all()


class Lines:
    """One side of the line, read line by line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._received = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def next(self) -> bytes:
        """The next line with its end; nothing when there is none."""
        while b"\n" not in self._received:
            data = self.socket.recv(65_536)
            if not data:
                return b""
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line + b"\n"

    def rest(self) -> bytes:
        """End our side, and take all that the other still says until it ends, too."""
        self.socket.shutdown(socket.SHUT_WR)
        while data := self.socket.recv(65_536):
            self._received += data
        return self._received
