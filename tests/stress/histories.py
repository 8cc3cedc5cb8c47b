"""What every client said to the manager and what it heard, written down as it happens, and read back.

One file for each process, one line of JSON for each event. A line is written before a request is sent and after its
answer came, so a killed client leaves at most a request without an answer, which is what it then was. Times are those
of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsweep.manager.protocol import decode
from fedsweep.worker.client import ManagerClient

SUFFIX = ".jsonl"
_write = os.write  # as it is before anything is put around it


@dataclass(frozen=True)
class Exchange:
    """One request on its way once, and what came of it."""

    client: str
    sent: float  # seconds
    request: Mapping[str, Any]
    heard: float | None = None  # when the answer was there; None: none ever came
    answer: Mapping[str, Any] | None = None

    @property
    def is_refused(self) -> bool:
        """Whether the answer is an error."""
        return self.answer is not None and self.answer.get("type") == "error"


class Recorder:
    """Writes down what this process asks and hears."""

    def __init__(self, folder: Path, client: str) -> None:
        """Write to a file in `folder` that bears the client's name."""
        self._descriptor = os.open(folder / f"{client}{SUFFIX}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._numbers = itertools.count()

    def sent(self, request: Mapping[str, Any]) -> int:
        """Note a request before it is sent; the number of this exchange."""
        number = next(self._numbers)
        self._line(number, {"request": {name: value for name, value in request.items() if name != "token"}})
        return number

    def heard(self, number: int, answer: Mapping[str, Any]) -> None:
        """Note the answer of an exchange."""
        self._line(number, {"answer": answer})

    def _line(self, number: int, event: Mapping[str, Any]) -> None:
        _write(self._descriptor, json.dumps({"exchange": number, "at": time.monotonic(), **event}).encode() + b"\n")

    def listen_in(self) -> None:
        """Note every exchange of every `ManagerClient` of this process."""
        exchange, recorder = ManagerClient._exchange, self

        def noted(client: ManagerClient, request: bytes) -> dict[str, Any]:
            number = recorder.sent(decode(request))
            answer = exchange(client, request)
            recorder.heard(number, answer)
            return answer

        ManagerClient._exchange = noted  # type: ignore[method-assign]


def read_history(folder: Path) -> list[Exchange]:
    """Every exchange of every client, in the order in which the requests were sent."""
    found = [exchange for path in sorted(folder.glob(f"*{SUFFIX}")) for exchange in _read(path)]
    return sorted(found, key=lambda exchange: exchange.sent)


def _read(path: Path) -> Iterable[Exchange]:
    exchanges: dict[int, Exchange] = {}
    for line in path.read_bytes().split(b"\n")[:-1]:  # a line without an end is of a process that was killed
        event = json.loads(line)
        number, at = event["exchange"], event["at"]
        if "request" in event:
            exchanges[number] = Exchange(path.name.removesuffix(SUFFIX), at, event["request"])
        else:
            before = exchanges[number]
            exchanges[number] = Exchange(before.client, before.sent, before.request, at, event["answer"])
    return exchanges.values()
