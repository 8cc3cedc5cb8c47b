"""The batched engine: all clients of all experiments of a cohort, round by round.

Training and applying models is the work of a `Trainer`, over tensors with the leading axes [E, S] (experiments, clients
of a round). Everything else is here: who takes part, which lanes share their inputs, aggregation, evaluation, early
stopping, and experiments that join and leave. Nothing here mixes numbers of two experiments, so an experiment's result
does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsweep.fl.aggregate import AGGREGATORS
from fedsweep.fl.data import ImageData
from fedsweep.fl.evaluate import Evaluation, evaluation_of
from fedsweep.fl.federation import (
    Division,
    Federation,
    divide,
    division_key,
    epoch_orders,
    participants,
    poisoned_federation,
)
from fedsweep.fl.lanes import ClientWork, LaneInputs, ModelShape, Trained, Trainer
from fedsweep.fl.models import build_model, count_parameters
from fedsweep.fl.outcome import Outcome, RoundReport, diverged, tested
from fedsweep.fl.stopping import EarlyStopping
from fedsweep.plan.experiment import Experiment

Saved = Mapping[str, Any]  # an experiment between two rounds, as plain numbers, lists and tensors


@dataclass(frozen=True)
class Progress:
    """What a round brought an experiment."""

    name: str
    report: RoundReport | None  # None where the round failed
    outcome: Outcome | None = None  # where the experiment has ended; it has left the cohort
    error: Exception | None = None  # where it cannot be trained, not even alone; it has left the cohort


@dataclass
class Member:
    """One experiment of a cohort, between two rounds."""

    name: str
    experiment: Experiment
    federation: Federation
    labels: Tensor  # int64 [N], as training sees them
    weights: Tensor  # [P], the global model
    stopping: EarlyStopping
    steps: int = 0  # what batch norm has tracked
    history: list[RoundReport] = field(default_factory=list)

    @property
    def next_round(self) -> int:
        """The round that comes next, from 1."""
        return len(self.history) + 1

    @property
    def has_ended(self) -> bool:
        """Whether no round is left to be made."""
        return self.stopping.should_stop or len(self.history) >= self.experiment.global_rounds


@dataclass(frozen=True)
class _Failed:
    """An experiment that the trainer cannot train."""

    error: Exception


class Cohort:
    """Experiments of one shape that train together. Each may join before any round, and leaves when it has ended.

    Args:
        data: on the device of the trainer.
        trainer: made for the shape, batch size and local epochs of these experiments.
        dtype: of weights and activations.
    """

    def __init__(self, data: ImageData, trainer: Trainer, dtype: torch.dtype = torch.float32) -> None:
        self.data = data
        self.trainer = trainer
        self.dtype = dtype
        self.most_at_once: int | None = None  # experiments that fit into memory together; None: all that were tried
        self._members: dict[str, Member] = {}
        self._divisions: dict[tuple[object, ...], Division] = {}
        self._stacked_labels: tuple[tuple[str, ...], Tensor] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The experiments that have not ended."""
        return tuple(self._members)

    def join(self, name: str, experiment: Experiment, saved: Saved | None = None) -> None:
        """Take an experiment in, from its beginning or from where it was saved.

        Raises:
            PartitionError: the samples cannot be divided so.
            DataError: the experiment does not fit the data.
        """
        key = division_key(experiment)
        if key not in self._divisions:
            self._divisions[key] = divide(experiment, self.data)
        federation = poisoned_federation(experiment, self.data, self._divisions[key])
        shape = ModelShape.of(experiment, self.data)
        model = build_model(experiment, shape.num_classes, shape.in_channels, shape.img_size)
        member = Member(
            name,
            experiment,
            federation,
            labels=torch.from_numpy(federation.poisoning.labels).to(self._device),
            weights=shape.layout.flatten(model.state_dict()).to(self._device, self.dtype),
            stopping=EarlyStopping(experiment.early_stopping_patience, experiment.min_delta),
        )
        self._members[name] = member if saved is None else _restored(member, saved)

    def leave(self, name: str) -> None:
        """Forget an experiment."""
        del self._members[name]

    def save(self, name: str) -> Saved:
        """An experiment as `join` takes it in again, in this process or another."""
        member = self._members[name]
        stopping = member.stopping
        return {
            "weights": member.weights.cpu(),
            "steps": member.steps,
            "history": [[each.round, each.val_loss, each.val_acc, each.nonfinite_clients] for each in member.history],
            "best_weights": {name: tensor.cpu() for name, tensor in stopping.best_weights.items()},
            "best_round": stopping.best_round,
            "best_loss": stopping.best_loss,
            "rounds_without_progress": stopping.rounds_without_progress,
        }

    def weights(self, name: str) -> dict[str, Tensor]:
        """The global model of an experiment, as a state dict."""
        member = self._members[name]
        return self._shape(member).layout.unflatten(member.weights, member.steps)

    def run_round(self) -> list[Progress]:
        """Train, aggregate and evaluate one round of every experiment; those that end with it leave."""
        trained = self.train_round()
        evaluations = self._validated([member for member, lost in trained if isinstance(lost, int)])
        progress = [self._after_round(member, lost, evaluations.get(member.name)) for member, lost in trained]
        return self._with_tests(progress)

    def train_round(self) -> list[tuple[Member, int | _Failed | None]]:
        """Train and aggregate one round of every experiment, without evaluating it.

        Returns:
            For each experiment how many clients were left out because their weights were not finite; None where none
            was left; or why it cannot be trained.
        """
        # Those that are aggregated alike next to each other, so that their weights need not be copied together.
        members = sorted(
            self._members.values(), key=lambda each: (each.experiment.aggregator, division_key(each.experiment))
        )
        at_once = self.most_at_once or len(members)
        results: dict[str, int | _Failed | None] = {}
        for start in range(0, len(members), at_once):
            results |= {member.name: lost for member, lost in self._train(members[start : start + at_once])}
        return [(member, results[name]) for name, member in self._members.items()]

    # ---- one round ------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.data.train_labels.device

    def _shape(self, member: Member) -> ModelShape:
        return ModelShape.of(member.experiment, self.data)

    def _train(self, members: Sequence[Member]) -> list[tuple[Member, int | _Failed | None]]:
        """Train members together; if that fails (memory, most likely) the halves apart, down to single experiments."""
        taking_part = [participants(member.experiment, member.next_round) for member in members]
        works = _works(members, taking_part)
        try:
            trained = self.trainer.train(self._inputs(members), works, max(map(len, taking_part)))
        except Exception as error:
            if len(members) == 1:
                return [(members[0], _Failed(error))]
            half = (len(members) + 1) // 2
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                self.most_at_once = half
            return [*self._train(members[:half]), *self._train(members[half:])]
        return list(zip(members, self._aggregated(members, taking_part, works, trained), strict=True))

    def _inputs(self, members: Sequence[Member]) -> LaneInputs:
        names = tuple(member.name for member in members)
        if self._stacked_labels is None or self._stacked_labels[0] != names:
            self._stacked_labels = names, torch.stack([member.labels for member in members])

        def setting(name: str) -> Tensor:
            values = [getattr(member.experiment, name) for member in members]
            return torch.tensor([math.inf if value is None else value for value in values], dtype=torch.float64)

        return LaneInputs(
            weights=torch.stack([member.weights for member in members]),
            labels=self._stacked_labels[1],
            lr=setting("lr"),
            momentum=setting("momentum"),
            weight_decay=setting("weight_decay"),
            max_grad_norm=setting("max_grad_norm"),
        )

    def _aggregated(
        self,
        members: Sequence[Member],
        taking_part: Sequence[Sequence[int]],
        works: Sequence[ClientWork],
        trained: Trained,
    ) -> list[int | None]:
        """Give every member its new global weights; how many clients of each were lost, None where all were."""
        steps = _steps(members, works, trained.finite)
        alike: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[int]] = {}
        lost: list[int | None] = []
        for row, (member, clients) in enumerate(zip(members, taking_part, strict=True)):
            kept = tuple(slot for slot in range(len(clients)) if trained.finite[row, slot])
            lost.append(len(clients) - len(kept) if kept else None)
            if kept:
                sizes = tuple(len(member.federation.clients[clients[slot]]) for slot in kept)
                alike.setdefault((member.experiment.aggregator, kept, sizes), []).append(row)
        for (aggregator, kept, sizes), rows in alike.items():
            is_range = rows[-1] - rows[0] == len(rows) - 1
            own = trained.weights[rows[0] : rows[-1] + 1] if is_range else trained.weights[rows]
            combined = self._combined(aggregator, own, kept, sizes)
            for row, weights in zip(rows, combined, strict=True):
                members[row].weights = weights
                members[row].steps += steps[row]
        return lost

    def _combined(self, aggregator: str, clients: Tensor, kept: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Global weights [E, P] of clients' weights [E, S, P]."""
        if aggregator in self.trainer.aggregators and len(kept) == clients.shape[1]:
            return self.trainer.aggregators[aggregator](clients, sizes)
        return AGGREGATORS[aggregator]([{"weights": clients[:, slot]} for slot in kept], sizes)["weights"]

    def _validated(self, members: Sequence[Member]) -> dict[str, Evaluation]:
        """Evaluate the global models of members on their validation samples."""
        sets: dict[int, list[Member]] = {}
        for member in members:
            sets.setdefault(id(member.federation.validation), []).append(member)
        evaluations = {}
        for together in sets.values():
            positions = torch.from_numpy(together[0].federation.validation).to(self._device)
            images, labels = self.data.train_images[positions], self.data.train_labels[positions]
            weights = [member.weights for member in together]
            for member, evaluation in zip(together, self._evaluated(weights, images, labels), strict=True):
                evaluations[member.name] = evaluation
        return evaluations

    def _evaluated(self, weights: Sequence[Tensor], images: Tensor, labels: Tensor) -> Iterable[Evaluation]:
        at_once = self.most_at_once or len(weights)
        for start in range(0, len(weights), at_once):
            for logits in self.trainer.logits(torch.stack(list(weights[start : start + at_once])), images):
                yield evaluation_of(logits, labels)

    def _after_round(
        self, member: Member, lost: int | _Failed | None, evaluation: Evaluation | None
    ) -> tuple[Member, Progress]:
        """Note how a round ended."""
        if isinstance(lost, _Failed):
            return member, Progress(member.name, None, error=lost.error)
        clients = len(participants(member.experiment, member.next_round))
        if evaluation is None:
            report = RoundReport(member.next_round, math.nan, math.nan, clients)
            member.history.append(report)
            return member, Progress(member.name, report, self._diverged(member))
        report = RoundReport(member.next_round, evaluation.loss, evaluation.accuracy, lost or 0)
        member.history.append(report)
        member.stopping.update(report.round, report.val_loss, {"weights": member.weights})
        has_diverged = member.has_ended and member.stopping.best_round is None
        return member, Progress(member.name, report, self._diverged(member) if has_diverged else None)

    def _with_tests(self, progress: Sequence[tuple[Member, Progress]]) -> list[Progress]:
        """Test the best models of the members that have ended, and let those leave."""
        ended = [member for member, each in progress if each.outcome is None and not each.error and member.has_ended]
        best = [member.stopping.best_weights["weights"] for member in ended]
        tests = self._evaluated(best, self.data.test_images, self.data.test_labels) if best else []
        outcomes = {member.name: self._tested(member, test) for member, test in zip(ended, tests, strict=True)}
        finished = [replace(each, outcome=outcomes.get(each.name, each.outcome)) for _, each in progress]
        for each in finished:
            if each.outcome is not None or each.error is not None:
                self.leave(each.name)
        return finished

    def _num_parameters(self, member: Member) -> int:
        return count_parameters(self._shape(member).build())

    def _diverged(self, member: Member) -> Outcome:
        return diverged(self._num_parameters(member), member.federation, member.history)

    def _tested(self, member: Member, test: Evaluation) -> Outcome:
        return tested(
            member.experiment,
            self.data,
            test,
            self._num_parameters(member),
            member.federation,
            member.history,
            member.stopping.best_round or 0,
        )


def _restored(member: Member, saved: Saved) -> Member:
    stopping = member.stopping
    device, dtype = member.weights.device, member.weights.dtype
    stopping.best_weights = {name: tensor.to(device, dtype) for name, tensor in saved["best_weights"].items()}
    stopping.best_round, stopping.best_loss = saved["best_round"], saved["best_loss"]
    stopping.rounds_without_progress = saved["rounds_without_progress"]
    return replace(
        member,
        weights=saved["weights"].to(device, dtype),
        steps=saved["steps"],
        history=[RoundReport(*each) for each in saved["history"]],
    )


def _works(members: Sequence[Member], taking_part: Sequence[Sequence[int]]) -> list[ClientWork]:
    """What is to be trained: each client once for all the experiments that see its images in the same order."""
    lanes: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    orders: dict[tuple[object, ...], tuple[int, int, Callable[[], np.ndarray[Any, Any]]]] = {}
    for row, (member, clients) in enumerate(zip(members, taking_part, strict=True)):
        division = id(member.federation.clients)
        for slot, client in enumerate(clients):
            key = (division, member.experiment.seed, member.next_round, client, *_ordering(member, client))
            lanes.setdefault(key, []).append((row, slot))
            if key not in orders:
                orders[key] = _order_of(member, client)
    return [
        ClientWork(tuple(row for row, _ in places), tuple(slot for _, slot in places), *orders[key])
        for key, places in lanes.items()
    ]


def _ordering(member: Member, client: int) -> tuple[object, ...]:
    """What of an attack decides the order in which a client sees its samples."""
    if member.experiment.data_ordering == "shuffle":
        return ("shuffle",)
    poisoned = member.federation.poisoning.poisoned[member.federation.clients[client]]
    if poisoned.all() or not poisoned.any():
        return ("shuffle",)
    return member.experiment.data_ordering, poisoned.tobytes()


def _order_of(member: Member, client: int) -> tuple[int, int, Callable[[], np.ndarray[Any, Any]]]:
    """Epochs, samples, and what draws their order."""
    own, number = member.federation.clients[client], member.next_round

    def draw() -> np.ndarray[Any, Any]:
        poisoned = member.federation.poisoning.poisoned[own]
        return own[np.stack(epoch_orders(member.experiment, poisoned, number, client))]

    return member.experiment.local_epochs, len(own), draw


def _steps(members: Sequence[Member], works: Sequence[ClientWork], finite: np.ndarray[Any, Any]) -> list[int]:
    """For each experiment the most steps that a client with finite weights made: what batch norm has counted."""
    most = [0] * len(members)
    for work in works:
        for row, slot in zip(work.lanes, work.slots, strict=True):
            if finite[row, slot]:
                most[row] = max(most[row], work.steps(members[row].experiment.batch_size))
    return most
