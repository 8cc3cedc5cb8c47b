"""Managers and workers as real processes that a test can kill, and what they left behind.

They are forked from a process that has imported everything (see `zygote`), so one starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facts import Ledger, read_files, read_ledger
from histories import Exchange, read_history
from judge import Handout, handouts, problems

from fedsweep.errors import ManagerUnreachable
from fedsweep.manager.invariants import check
from fedsweep.worker.client import ManagerClient

FOLDERS = ("history", "points", "raised")
PARTING_S = 5.0  # in which workers end after their manager


class Zygote:
    """Starts managers or workers."""

    def __init__(self, role: str, log: Path) -> None:
        self.role = role
        self._errors = log.open("ab")
        script = Path(__file__).with_name("zygote.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, *command: object) -> Any:
        """Have a command obeyed; the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline().strip()):
            raise RuntimeError(f"the zygote of the {self.role}s has ended; see {self._errors.name}")
        return json.loads(line)

    def wait_ready(self) -> None:
        """Wait until everything is imported."""
        assert self._heard() == "ready"

    def start(self, folder: Path, port: int, name: str, **options: Any) -> Process:
        """Start one in a folder; for options see `zygote`."""
        return Process(self, name, self.ask("start", str(folder), port, name, options))

    def close(self) -> None:
        """Kill all that are left."""
        self._process.communicate(timeout=30)
        self._errors.close()


@dataclass
class Process:
    """A manager or a worker; its name is its own in its folder."""

    zygote: Zygote
    name: str
    pid: int
    _status: int | None = None

    @property
    def status(self) -> int | None:
        """The exit status, once it has ended; negative where a signal ended it."""
        if self._status is None:
            self._status = self.zygote.ask("ended", self.pid)
        return self._status

    def kill(self) -> int:
        """Kill it and wait for its end; the exit status."""
        if self.status is None:
            self._status = self.zygote.ask("kill", self.pid)
        assert self._status is not None
        return self._status

    def signal(self, kind: int) -> None:
        """Send it a signal, if it is still there."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, kind)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(folder: Path, config: str) -> None:
    """Put into a folder what the processes of a sweep need there."""
    for name in FOLDERS:
        (folder / name).mkdir()
    (folder / "sweep.yaml").write_text(config)


def arm(folder: Path, name: str, point: str, count: int = 1, kind: int = signal.SIGKILL) -> None:
    """Have a process, there already or to come, send itself a signal when it is at a point for that many times."""
    fresh = folder / "points" / f"{name}.arming"
    fresh.write_text(f"{int(kind)} {count} {point}")
    os.replace(fresh, fresh.with_suffix(".armed"))


def wrong_at_the_end(folder: Path, history: list[Exchange], ledger: Ledger) -> list[str]:
    """Everything that is wrong with a sweep that is over."""
    violations = check(folder / ".fedsweep", folder=folder, has_ended=True)
    return [*problems(history, ledger, read_files(folder, ledger)), *map(str, violations)]


def until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Poll until a condition holds; an AssertionError that says `what` where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.01)


@dataclass
class RealSweep:
    """A sweep of real processes in an empty folder, for a test of one fault."""

    folder: Path
    zygotes: Mapping[str, Zygote]
    port: int = field(default_factory=free_port)
    _started: list[Process] = field(default_factory=list)

    def _start(self, role: str, options: dict[str, Any]) -> Process:
        number = 1 + sum(each.zygote.role == role for each in self._started)
        process = self.zygotes[role].start(self.folder, self.port, f"{role}-{number}", **options)
        self._started.append(process)
        return process

    def manager(self, **options: Any) -> Process:
        """Start a manager, and wait until it listens."""
        manager = self._start("manager", options)
        until(lambda: manager.status is not None or self.status(), "a manager that answers")
        return manager

    def worker(self, **options: Any) -> Process:
        """Start a worker; before a gate is opened it trains nothing."""
        return self._start("worker", {"habit": "no task fails", **options})

    def open(self, gate: str = "gate") -> None:
        """Let workers train."""
        (self.folder / gate).touch()

    def clear(self) -> None:
        """Kill whatever still runs."""
        for process in self._started:
            process.kill()

    # ---- what can be seen from outside

    def history(self, worker: Process | None = None) -> list[Exchange]:
        """What the workers (or one of them) have said and heard until now."""
        return [each for each in read_history(self.folder / "history") if worker is None or each.client == worker.name]

    def given(self, worker: Process | None = None) -> list[Handout]:
        """The hand-outs that the workers (or one of them) have heard of until now."""
        return handouts(self.history(worker))

    def ask(self, kind: str, **fields: Any) -> dict[str, Any] | None:
        """Ask the manager something; None while it does not answer."""
        token = self.folder / ".fedsweep/token"
        if not token.exists():
            return None
        with ManagerClient("127.0.0.1", self.port, token.read_text().strip(), timeout=5.0, retries=0) as client:
            try:
                return client.ask({"type": kind, **fields})
            except ManagerUnreachable:
                return None

    def status(self) -> dict[str, Any]:
        """What the manager says of the sweep; nothing while it does not answer."""
        answer = self.ask("status")
        return {} if answer is None else answer["status"]

    def spooled(self) -> list[dict[str, Any]]:
        """The results that lie in the spool."""
        return [json.loads(path.read_text()) for path in (self.folder / ".fedsweep/spool").glob("*.result.json")]

    def wait_for(self, process: Process, seconds: float) -> int:
        """The exit status of a process that ends in time."""
        until(lambda: process.status is not None, f"the end of {process.name}", seconds)
        assert process.status is not None
        return process.status

    def see_the_end(self, manager: Process, *workers: Process, status: int = 0) -> Ledger:
        """Wait until the manager and the workers have ended in order, and check every invariant; the ledger.

        Raises:
            AssertionError: something is wrong.
        """
        assert self.wait_for(manager, 60) == status, self.log("manager")
        deadline = time.monotonic() + PARTING_S
        while any(worker.status is None for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.01)
        for worker in workers:
            worker.signal(signal.SIGTERM)  # it came too late to hear that all is done
        assert {worker.name: self.wait_for(worker, 30) for worker in workers} == {each.name: 0 for each in workers}
        ledger = read_ledger(self.folder / ".fedsweep/ledger.sqlite3")
        wrong = wrong_at_the_end(self.folder, self.history(), ledger)
        assert not wrong, wrong
        return ledger

    def log(self, role: str) -> str:
        """The end of what the managers or the workers have logged."""
        path = self.folder / f"{role}.log"
        return path.read_text()[-3000:] if path.exists() else ""
