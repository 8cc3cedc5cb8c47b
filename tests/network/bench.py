"""A manager of many tasks, a bad line to it and a good one, and how it is judged what came of all that was said."""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from facts import read_files, read_ledger
from histories import Recorder, read_history
from judge import problems
from proxy import BadNetwork, Fault
from storm import sweep_of

from fedsweep.manager import ExperimentManager
from fedsweep.manager.clock import Clock
from fedsweep.manager.invariants import check
from fedsweep.manager.protocol import TaskMessage, decode
from fedsweep.worker.client import (
    ManagerClient,
    release_task,
    request_task_from_manager,
    submit_result_to_manager,
)

EXAMPLES = int(os.environ.get("FEDSWEEP_EXAMPLES", "1"))
LEASE_S = 120.0
WORKER = "node7-4711-a3f0c1"
# Each time these are asked for another task.
CHANGING = ("request_task", "submit_result", "task_complete", "task_failed", "release", "cancel", "retry")


class MovableClock(Clock):
    """The clock of this machine, which a test can put forward."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


class Notes(Recorder):
    """Also keeps the last answer at hand, and counts."""

    def __init__(self, folder: Path, client: str) -> None:
        super().__init__(folder, client)
        self.answer: Mapping[str, Any] = {}
        self.heard_of: Counter[str] = Counter()  # types of answers
        self.tries = 0

    def sent(self, request: Mapping[str, Any]) -> int:
        self.tries += 1
        return super().sent(request)

    def heard(self, number: int, answer: Mapping[str, Any]) -> None:
        self.answer = answer
        self.heard_of[answer["type"]] += 1
        super().heard(number, answer)


class Bench:
    """A manager of so many tasks, a bad line to it and a good one, and a client of ours on each."""

    def __init__(self, tasks: int, **options: Any) -> None:
        Path("sweep.yaml").write_text(sweep_of(tasks))
        Path("history").mkdir()
        self.tasks = tasks
        self.clock = MovableClock()
        options = {"stay": True, "lease_s": LEASE_S, "clock": self.clock, **options}
        self.manager = ExperimentManager(["sweep.yaml"], port=0, **options)
        self.thread = threading.Thread(target=self.manager.start)
        self.held: TaskMessage | None = None
        self.faults: list[Fault] = []  # of the next exchanges over the bad line
        self.notes = Notes(Path("history"), "client")
        self.notes.listen_in()

    def __enter__(self) -> Bench:
        self.thread.start()
        until(lambda: self.manager.running or not self.thread.is_alive(), "the manager listens")
        self.manager.sweep.ledger._db.execute("PRAGMA synchronous = OFF")
        echo = Recorder(Path("history"), "network")
        self.network = BadNetwork(
            self.manager.port,
            choose=lambda request: self.faults.pop(0) if self.faults else None,
            repeats=lambda request: echo.sent(decode(request)),
            is_sealed=self.manager.identity is not None,
        )
        self.network.__enter__()
        self.good, self.bad = self.client(self.manager.port), self.client(self.network.port)
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.good, self.bad, self.network):
            each.__exit__(None, None, None)
        while self.thread.is_alive():
            self.manager.stop()
            self.thread.join(0.5)

    def client(self, port: int, **options: Any) -> ManagerClient:
        """One that never waits before it tries again."""
        pin = None if self.manager.identity is None else self.manager.identity.pin
        options = {"timeout": 10.0, "sleep": lambda _: None, "pin": pin, **options}
        return ManagerClient("127.0.0.1", port, self.manager.sweep.token, **options)

    def take(self, worker_id: str = WORKER) -> TaskMessage:
        """A task, over the good line."""
        task = request_task_from_manager(self.good, worker_id).task
        assert task is not None
        return task

    def task_for(self, kind: str) -> TaskMessage:
        """A task to ask something about; the same one again, for requests that change nothing."""
        if kind in CHANGING:
            task = self.take()
            if kind == "task_complete":
                self.finish_task(task)
            if kind in ("cancel", "retry"):  # somebody else's word: for the judge nobody may hold it then
                assert release_task(self.good, task.task_id, WORKER, task.attempt)
            if kind == "retry":
                self.good.ask({"type": "cancel", "names": [task.task_id]})
            return task
        if self.held is None:
            self.held = self.take()
        return self.held

    def finish_task(self, task: TaskMessage) -> None:
        """Bring a result of it, over the good line."""
        assert submit_result_to_manager(self.good, task.task_id, WORKER, result_of(task), task.attempt)

    @property
    def attempts(self) -> int:
        """How many there were."""
        with self.manager.lock:
            return int(self.manager.sweep.ledger._db.execute("SELECT count(*) FROM attempts").fetchone()[0])

    def finish(self) -> list[str]:
        """Do all that is left, also what was handed out and nobody heard of; end the manager; what is wrong."""
        if self.held is not None:
            self.finish_task(self.held)
        until(self._does_next, "everything is done")
        return self.judge()

    def _does_next(self) -> bool:
        """Do what a worker is given next; whether all is done.

        Leases end before, also of what was just now handed out to a request that was repeated late.
        """
        self.clock.ahead_s += 2 * LEASE_S
        reply = request_task_from_manager(self.good, WORKER)
        for task in reply.tasks:
            self.finish_task(task)
        return reply.kind == "done"

    def judge(self) -> list[str]:
        """End the manager, and say what is wrong."""
        self.__exit__()
        ledger = read_ledger(Path(".fedsweep/ledger.sqlite3"))
        assert len(ledger.tasks) == self.tasks
        return [
            *problems(read_history(Path("history")), ledger, read_files(Path(), ledger)),
            *map(str, check(Path(".fedsweep"), folder=Path(), has_ended=True)),
            *(f"{task} did not complete" for task in ledger.tasks if task.status != "complete"),
        ]


def until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.005)


def result_of(task: TaskMessage) -> dict[str, Any]:
    """A result that can be told from every other."""
    history = [{"round": number, "val_loss": 1 / number, "val_acc": 0.25, "nonfinite_clients": 0} for number in (1, 2)]
    proof = {"mean_test_acc": random.random(), "num_parameters": 650, "plan": f"made {uuid.uuid4().hex}"}
    return {"outcome": "ok", **proof, "mean_test_loss": 1 / 3, "worker": WORKER, "history": history}
