"""What comes of an experiment, whichever engine runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedsweep.fl.data import ImageData
from fedsweep.fl.evaluate import Evaluation, attack_success_rate
from fedsweep.fl.federation import Federation
from fedsweep.plan.experiment import Experiment


@dataclass(frozen=True)
class RoundReport:
    """How a round ended."""

    round: int  # counted from 1
    val_loss: float  # of the global model; may be nan or inf, and is nan where no client was left to make one
    val_acc: float  # nan where no client was left
    nonfinite_clients: int  # clients left out because a weight was not finite


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment, which is that of its round with the least validation loss.

    An experiment diverged where in some round no client had finite weights, or where no round had a finite validation
    loss. Everything that would be measured on the best round is then None.
    """

    outcome: Literal["ok", "diverged"]
    test_acc: float | None
    test_loss: float | None
    val_acc: float | None
    val_loss: float | None
    best_epoch: int | None  # the number of the best round, from 1
    num_parameters: int
    attack_success_rate: float | None  # `evaluate.attack_success_rate` says where there is none
    per_class_test_acc: tuple[float | None, ...] | None
    poisoned_clients: int  # clients that hold at least one poisoned sample
    poisoned_samples: int
    nonfinite_clients: int  # sum over the rounds
    rounds_run: int
    history: tuple[RoundReport, ...]


def diverged(num_parameters: int, federation: Federation, history: Sequence[RoundReport]) -> Outcome:
    """The outcome of an experiment without a best round."""
    return Outcome(
        outcome="diverged",
        test_acc=None,
        test_loss=None,
        val_acc=None,
        val_loss=None,
        best_epoch=None,
        num_parameters=num_parameters,
        attack_success_rate=None,
        per_class_test_acc=None,
        poisoned_clients=federation.poisoning.poisoned_clients,
        poisoned_samples=federation.poisoning.poisoned_samples,
        nonfinite_clients=sum(report.nonfinite_clients for report in history),
        rounds_run=len(history),
        history=tuple(history),
    )


def tested(
    experiment: Experiment,
    data: ImageData,
    test: Evaluation,
    num_parameters: int,
    federation: Federation,
    history: Sequence[RoundReport],
    best_round: int,
) -> Outcome:
    """The outcome of an experiment whose weights of `best_round` were tested."""
    best = history[best_round - 1]
    return replace(
        diverged(num_parameters, federation, history),
        outcome="ok",
        test_acc=test.accuracy,
        test_loss=test.loss,
        val_acc=best.val_acc,
        val_loss=best.val_loss,
        best_epoch=best_round,
        attack_success_rate=attack_success_rate(experiment, test.predictions, data.test_labels, data.num_classes),
        per_class_test_acc=test.per_class_accuracy,
    )
