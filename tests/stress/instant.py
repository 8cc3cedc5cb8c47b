"""A trainer that computes nothing: everything else of a worker is as it is."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedsweep.datasets import load_global_dataset
from fedsweep.fl.data import ImageData
from fedsweep.fl.engine import Progress
from fedsweep.fl.outcome import Outcome, RoundReport
from fedsweep.plan.experiment import Experiment
from fedsweep.worker import client, cohort_run, held, worker

ROUNDS = 2
FAILS_ONCE = 23  # one task in so many
DEADLY_SEED = 13


class Trainer:
    """Only has a name."""

    plan = "loop"


class Cohort:
    """Experiments that end after two rounds, with numbers that follow from their signature."""

    data: ImageData
    habit: str  # one of `HABITS`
    raised: Path
    gate: Path  # a round begins when this file is there

    def __init__(self, data: object, trainer: Trainer) -> None:
        self.trainer = trainer
        self.most_at_once = 0
        self._rounds: dict[str, int] = {}
        self._experiments: dict[str, Experiment] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Those that have not ended."""
        return tuple(self._rounds)

    def join(self, name: str, experiment: Experiment, saved: object = None) -> None:
        """Take one in."""
        self._rounds[name] = 0
        self._experiments[name] = experiment

    def leave(self, name: str) -> None:
        """Let one go."""
        del self._rounds[name]

    def save(self, name: str) -> dict[str, Any]:
        """Nothing is worth saving."""
        return {"history": ()}

    def run_round(self) -> list[Progress]:
        """Run a round of each."""
        while not self.gate.exists():
            time.sleep(0.005)
        ends = []
        for name in self.names:
            self._rounds[name] += 1
            ends.append(self._end(name, self._experiments[name], self._rounds[name]))
            if ends[-1].report is None or ends[-1].outcome is not None:
                self.leave(name)
        return ends

    def _end(self, name: str, experiment: Experiment, number: int) -> Progress:
        try:
            HABITS[self.habit](experiment, self.raised)
        except RuntimeError as error:
            return Progress(name, None, error=error)
        share = _number_of(experiment) / 16**8
        report = RoundReport(number, 1 / number, share, 0)
        return Progress(name, report, _outcome(share) if number == ROUNDS else None)


def _number_of(experiment: Experiment) -> int:
    return int(hashlib.sha256(experiment.signature.encode()).hexdigest()[:8], 16)


# ---- what an experiment does in each round besides; RuntimeError: it has failed


def _nothing(experiment: Experiment, raised: Path) -> None:
    pass


def _fail_now_and_then(experiment: Experiment, raised: Path) -> None:
    """Some raise the first time that anyone runs them. A file says of which this is known."""
    if _number_of(experiment) % FAILS_ONCE == 0:
        try:
            (raised / hashlib.sha256(experiment.signature.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return
        raise RuntimeError("this raises the first time")


def _fail(experiment: Experiment, raised: Path) -> None:
    raise RuntimeError(f"CUDA error: an illegal memory access was encountered at {id(experiment):#x}")


def _kill_with_one_seed(experiment: Experiment, raised: Path) -> None:
    if experiment.seed == DEADLY_SEED:
        os.kill(os.getpid(), signal.SIGKILL)


HABITS: dict[str, Callable[[Experiment, Path], None]] = {
    "no task fails": _nothing,
    "some tasks fail once": _fail_now_and_then,
    "every task fails": _fail,
    "one task kills": _kill_with_one_seed,
}


def _outcome(share: float) -> Outcome:
    history = tuple(RoundReport(number, 1 / number, share, 0) for number in range(1, ROUNDS + 1))
    return Outcome(
        outcome="ok",
        test_acc=share,
        test_loss=1 / 3,
        val_acc=0.1,
        val_loss=2.5,
        best_epoch=ROUNDS,
        num_parameters=650,
        attack_success_rate=None,
        per_class_test_acc=None,
        poisoned_clients=0,
        poisoned_samples=0,
        nonfinite_clients=0,
        rounds_run=ROUNDS,
        history=history,
    )


def load() -> None:
    """Load what processes that are forked from this one will need."""
    torch.set_num_threads(1)
    Cohort.data = load_global_dataset("digits")


def install(folder: Path, together: int, habit: str = "some tasks fail once", gate: str = "gate") -> None:
    """Put it in the place of the real trainer, in this process, and make pauses short.

    Each computation leaves a mark of its own in its result, where a plan stands: rows do not depend on it.

    Args:
        folder: of the sweep.
        together: how many tasks train at once.
        habit: of tasks in this worker's hands, one of `HABITS`.
        gate: the file in the folder without which no round begins.
    """
    result_of = cohort_run.result_of
    Cohort.habit, Cohort.raised, Cohort.gate = habit, folder / "raised", folder / gate

    def marked(*arguments: Any, **options: Any) -> dict[str, Any]:
        return result_of(*arguments, **options) | {"plan": f"instant {uuid.uuid4().hex}"}

    replaced: dict[Any, dict[str, Any]] = {
        cohort_run: {
            "Cohort": Cohort,
            "choose_trainer": lambda *_, **__: Trainer(),
            "how_many_fit": lambda *_: together,
            "load_global_dataset": lambda *_: Cohort.data,
            "result_of": marked,
        },
        worker: {"MOST_TOGETHER": together, "FIRST_PAUSE_S": 0.02, "LONGEST_PAUSE_S": 0.2, "LONGEST_WAIT_S": 0.1},
        client: {"FIRST_PAUSE_S": 0.02, "LONGEST_PAUSE_S": 0.2},
        held: {"AWAY_S": 0.2},
    }
    for module, values in replaced.items():
        for name, value in values.items():
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, value)
