"""The ledger against a model of thirty lines: any order of hand-outs, messages, late messages, silence and restarts.

`FEDSWEEP_EXAMPLES` says how many orders are tried (150).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedsweep.manager.clock import Clock
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.records import Adoption, LedgerUnwritable
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

    losses: int = 0
    attempt: int | None = None
    holder: str = ""
    lease_end: float = 0.0
    result: float | None = None
    attempts: list[int] = field(default_factory=list)  # every one ever
    failed: list[int] = field(default_factory=list)  # those that count as failures
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

    @property
    def failures(self) -> int:
        return len(self.failed)

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
            model.failed += [attempt] if message == "fail" else []
            model.attempt = None

    @rule(data=st.data())
    def forgive(self, data):
        """A worker turns out to be broken: some attempts do not count, whichever way they ended."""
        every = sorted(attempt for model in self.models.values() for attempt in model.attempts)
        attempts = data.draw(st.lists(st.sampled_from(every), max_size=5)) if every else [12345]
        self.ledger.forgive(attempts)
        for model in self.models.values():
            model.failed = [attempt for attempt in model.failed if attempt not in attempts]

    @rule(days=st.integers(-400, 400))
    def set_the_clock(self, days):
        """Someone sets the time of day, which no lease runs on."""
        self.clock.day += timedelta(days=days)
        assert self.ledger.lose_stale() == []

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

    @rule(data=st.data())
    def together(self, data):
        """Several changes are one."""
        with self.ledger.together():
            for _ in range(data.draw(st.integers(1, 3))):
                change = data.draw(st.sampled_from(["hand_out", "send", "deliver"]))
                if change == "hand_out":
                    self.hand_out(data.draw(st.integers(1, 4)), data.draw(st.sampled_from("vw")), None, 1)
                elif change == "send":
                    message = st.sampled_from(["fail", "release", "renew"])
                    self.send(data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)), data.draw(message))
                else:
                    self.deliver(data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)), 0.25)

    @rule(seconds=st.sampled_from([0.0, 30.0, 61.0]), results=st.integers(0, 2))
    def refused(self, seconds, results):
        """Several changes were to be one, and the disk refused it: nothing has happened; leases that ended run anew."""
        open_attempts = [model for model in self.models.values() if model.attempt is not None]
        self.clock.seconds += seconds
        with contextlib.suppress(LedgerUnwritable), self.ledger.together():
            self.ledger.lose_stale()
            self.ledger.hand_out("v", LEASE_S, 2)
            for signature, model in self.models.items():
                if model in open_attempts[:results]:
                    self.ledger.accept(self.ids[signature], "w", {"mean_test_acc": 0.75}, model.attempt)
            raise LedgerUnwritable
        for place, model in enumerate(open_attempts):
            if place < results or model.lease_end <= self.clock.seconds:
                model.lease_end = self.clock.seconds + LEASE_S

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
        """I5, said of the file alone."""
        assert self.select("SELECT task FROM attempts WHERE ended_as IS NULL GROUP BY task HAVING count(*) > 1") == []

    @invariant()
    def attempts_of_a_task_only_grow(self):
        """I4, said of the file alone: none was used again, and the order of numbers is that of the hand-outs."""
        if hasattr(self, "models"):
            rows = self.select("SELECT t.signature, a.number FROM attempts a JOIN tasks t ON t.number = a.task")
            for signature, model in self.models.items():
                assert sorted(number for owner, number in rows if owner == signature) == model.attempts

    @invariant()
    def failed_only_by_its_own_code_or_five_losses(self):
        """I7, said of the file alone."""
        ended = "(SELECT count(*) FROM attempts a WHERE a.task = t.number AND a.ended_as = '{}')"
        failures, losses = ended.format("failed"), ended.format("lost")
        wrong = f"t.failures != {failures} OR t.losses != {losses}"
        assert self.select(f"SELECT t.task_id FROM tasks t WHERE {wrong}") == []
        too_soon = f"t.status = 'failed' AND {failures} < 4 AND {losses} < 5"
        assert self.select(f"SELECT t.task_id FROM tasks t WHERE {too_soon}") == []

    def select(self, query: str) -> list[tuple[object, ...]]:
        return [tuple(row) for row in self.ledger._db.execute(query)] if hasattr(self, "ledger") else []


class HeldClock(Clock):
    """A monotonic clock that is moved by hand; the time of day is set at will."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.day = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return min(max(self.day, datetime(1970, 1, 2, tzinfo=UTC)), datetime(9000, 1, 1, tzinfo=UTC))

    def monotonic(self) -> float:
        return self.seconds


LedgerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("FEDSWEEP_EXAMPLES", "150")),
    stateful_step_count=40,
    deadline=None,
    derandomize="FEDSWEEP_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLedgerMachine = LedgerMachine.TestCase
