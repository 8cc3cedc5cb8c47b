"""The ledger against a model of thirty lines: any order of hand-outs, messages, late messages, silence and restarts."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedsweep.manager.clock import Clock
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.records import Adoption
from fedsweep.plan.cohort import cohort_key
from fedsweep.plan.config import Source, parse
from fedsweep.plan.grid import expand

LEASE_S = 60.0
WHOLE = expand(parse([Source("a", "p: {combinations: [{width_factor: [1, 4]}, {lr: [0.1, 0.2]}]}")])).tasks
PART = expand(parse([Source("a", "p: {combinations: [{width_factor: [4, 1]}, {lr: [0.2]}]}")])).tasks
COHORTS = sorted({cohort_key(task.experiment) for task in WHOLE})


@dataclass
class Model:
    """What a task must look like."""

    failures: int = 0
    losses: int = 0
    attempt: int | None = None
    holder: str = ""
    lease_end: float = 0.0
    result: float | None = None
    attempts: list[int] = field(default_factory=list)  # every one ever
    orphaned: bool = False

    @property
    def status(self) -> str:
        if self.result is not None:
            return "complete"
        if self.attempt is not None:
            return "assigned"
        return "failed" if self.failures >= 4 or self.losses >= 5 else "pending"

    @property
    def is_alone(self) -> bool:
        return self.failures > 0 or self.losses > 1

    def lose(self, now: float) -> None:
        if self.attempt is not None and self.lease_end <= now:
            self.attempt, self.losses = None, self.losses + 1


class LedgerMachine(RuleBasedStateMachine):
    """Drives a ledger and the model side by side."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-"))
        self.clock = HeldClock()
        self.ledger = Ledger(self.folder / "ledger.sqlite3", self.clock)
        self.ledger._db.execute("PRAGMA synchronous = OFF")
        self.ledger.store_plan(WHOLE)
        self.models = {task.signature: Model() for task in WHOLE}
        self.ids = {task.signature: task.task_id for task in self.ledger.view.all_tasks()}
        self.last_attempt = 0

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.close()
            shutil.rmtree(self.folder)

    def pick(self, choice: int) -> tuple[str, Model]:
        signature = sorted(self.models)[choice % len(self.models)]
        return self.ids[signature], self.models[signature]

    @rule(
        max_tasks=st.integers(1, 4),
        worker=st.sampled_from("vw"),
        cohort=st.sampled_from([None, None, None, *COHORTS]),
        workers=st.integers(1, 3),
    )
    def hand_out(self, max_tasks, worker, cohort, workers):
        waiting = {sig for sig, model in self.models.items() if model.status == "pending" and not model.orphaned}
        held = [model for model in self.models.values() if model.status == "assigned" and model.holder == worker]
        tasks = self.ledger.hand_out(worker, LEASE_S, max_tasks, cohort=cohort, workers=workers)
        if cohort is None and (max_tasks == 1 or not held):
            assert bool(tasks) == bool(waiting)
        if cohort is None and max_tasks > 1 and workers == 1 and not any(model.is_alone for model in held):
            assert tasks or all(self.models[signature].is_alone for signature in waiting)
        assert len(tasks) <= max_tasks
        assert len({task.cohort for task in tasks} | ({cohort} if cohort and tasks else set())) <= 1
        if cohort is not None or max_tasks > 1:
            together = [*held, *(self.models[task.signature] for task in tasks)]
            assert not tasks or len(together) == 1 or not any(model.is_alone for model in together)
        for task in tasks:
            assert task.signature in waiting
            assert task.attempt > self.last_attempt
            self.last_attempt = task.attempt
            model = self.models[task.signature]
            model.attempt, model.holder, model.lease_end = task.attempt, worker, self.clock.seconds + LEASE_S
            model.attempts.append(task.attempt)

    @rule(choice=st.integers(0, 9), which=st.integers(0, 9), message=st.sampled_from(["fail", "release", "renew"]))
    def send(self, choice, which, message):
        """A message from some attempt of a task: the open one, or one that ended long ago."""
        task_id, model = self.pick(choice)
        attempt = model.attempts[which % len(model.attempts)] if model.attempts else 12345
        more = ("ValueError",) if message == "fail" else ()
        applied = getattr(self.ledger, message)(task_id, "w", *more, attempt=attempt)
        assert bool(applied) == (attempt == model.attempt)
        if applied and message == "renew":
            model.lease_end = self.clock.seconds + LEASE_S
        elif applied:
            model.attempt, model.failures = None, model.failures + (message == "fail")

    @precondition(lambda self: any(model.attempts for model in self.models.values()))
    @rule(choice=st.integers(0, 9), which=st.integers(0, 9), accuracy=st.sampled_from([0.25, 0.5]))
    def deliver(self, choice, which, accuracy):
        """A result of any attempt that ever was."""
        task_id, model = self.pick(choice)
        if model.attempts:
            attempt = model.attempts[which % len(model.attempts)]
            verdict = self.ledger.accept(task_id, "w", {"mean_test_acc": accuracy}, attempt)
            assert verdict == ("accepted" if model.result is None else "duplicate")
            if model.result is None:
                model.result, model.attempt = accuracy, None

    @rule(choice=st.integers(0, 9))
    def adopt(self, choice):
        task_id, model = self.pick(choice)
        adopted = self.ledger.adopt(
            [Adoption(task=self.ledger.view.task(task_id).number, data={"mean_test_acc": 1.0}, source="x")]
        )
        assert bool(adopted) == (model.result is None)
        if adopted:
            model.result, model.attempt = 1.0, None

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def wait(self, seconds):
        self.clock.seconds += seconds
        self.ledger.lose_stale()
        for model in self.models.values():
            model.lose(self.clock.seconds)

    @rule(seconds=st.sampled_from([0.0, 500.0]))
    def restart(self, seconds):
        """The manager dies and comes back after a while; leases begin anew."""
        self.ledger.close()
        self.clock.seconds += seconds
        self.ledger = Ledger(self.folder / "ledger.sqlite3", self.clock)
        self.ledger._db.execute("PRAGMA synchronous = OFF")
        for model in self.models.values():
            model.lease_end = self.clock.seconds + LEASE_S

    @rule(tasks=st.sampled_from([WHOLE, PART]))
    def edit_the_grid(self, tasks):
        present = {task.signature for task in tasks}
        before = {signature: model.orphaned for signature, model in self.models.items()}
        change = self.ledger.store_plan(tasks)
        for signature, model in self.models.items():
            model.orphaned = signature not in present
            if model.orphaned and not before[signature]:
                model.attempt = None
        assert change.added == 0
        assert change.removed == sum(not before[sig] and model.orphaned for sig, model in self.models.items())
        assert change.restored == sum(before[sig] and not model.orphaned for sig, model in self.models.items())
        assert change.kept == sum(not before[sig] and not model.orphaned for sig, model in self.models.items())

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "models"):
            return
        counts = dict.fromkeys(("pending", "assigned", "complete", "failed", "orphaned"), 0)
        for signature, model in self.models.items():
            task = self.ledger.view.task_with_signature(signature)
            assert (task.status, task.attempt, task.orphaned) == (model.status, model.attempt, model.orphaned)
            assert (task.failures, task.losses) == (model.failures, model.losses)
            assert task.task_id == self.ids[signature]
            counts["orphaned" if model.orphaned else model.status] += 1
            if model.result is not None:
                assert self.ledger.view.result(task.number) == {"mean_test_acc": model.result}
        found = self.ledger.view.counts()
        assert {name: getattr(found, name) for name in counts} == counts
        assert found.total == sum(counts.values()) - counts["orphaned"]

    @invariant()
    def no_two_leases_of_one_task(self):
        if hasattr(self, "ledger"):
            rows = self.ledger._db.execute(
                "SELECT task FROM attempts WHERE ended_as IS NULL GROUP BY task HAVING count(*) > 1"
            )
            assert rows.fetchall() == []


class HeldClock(Clock):
    """A monotonic clock that is moved by hand; the time of day jumps about."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


LedgerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLedgerMachine = LedgerMachine.TestCase
