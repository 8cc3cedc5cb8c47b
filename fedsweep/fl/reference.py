"""The reference engine: one experiment, one client, one `nn.Module` at a time. Slow and obvious.

`prepare` draws everything that is fixed before training; `run` makes the rounds. It yields a report after every round
and returns the outcome, so that its caller can log, send a heartbeat or stop in between.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedsweep.fl.aggregate import AGGREGATORS, is_finite
from fedsweep.fl.data import ImageData, normalised
from fedsweep.fl.evaluate import attack_success_rate, evaluate_model, per_class_accuracy
from fedsweep.fl.models import build_model, count_parameters
from fedsweep.fl.partition import partition, split_validation
from fedsweep.fl.poison import Poisoning, poison
from fedsweep.fl.stopping import EarlyStopping
from fedsweep.fl.streams import permutation, rounded, stream
from fedsweep.plan.experiment import Experiment

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """What is drawn once for an experiment, before any training. Positions count in the whole training set, [N]."""

    validation: Indices  # positions of the validation samples, sorted
    clients: tuple[Indices, ...]  # for each client the positions of its samples, sorted
    poisoning: Poisoning


@dataclass(frozen=True)
class RoundReport:
    """How a round ended."""

    round: int  # from 1
    val_loss: float  # of the global model; may be nan or inf
    val_acc: float  # nan where there was no global model to evaluate
    nonfinite_clients: int  # updates left out because a weight was not finite


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment: that of its round with the least validation loss. Diverged: metrics are None."""

    outcome: Literal["ok", "diverged"]
    test_acc: float | None
    test_loss: float | None
    val_acc: float | None
    val_loss: float | None
    best_epoch: int | None  # the round that the result is of, from 1
    num_parameters: int
    attack_success_rate: float | None
    per_class_test_acc: tuple[float | None, ...] | None
    poisoned_clients: int
    poisoned_samples: int
    nonfinite_clients: int  # over all rounds
    rounds_run: int
    history: tuple[RoundReport, ...]


class ClientDataloader:
    """The batches that a client trains on in a round: (images float32 [B, C, S, S], labels int64 [B]).

    Images lie in memory as bytes and are normalised as a batch is gathered. A batch of one sample is left out, because
    batch norm has no variance there.
    """

    def __init__(self, images: Tensor, labels: Tensor, epochs: Sequence[Tensor], batch_size: int) -> None:
        """Take whole tensors [N, …] and, for each local epoch, the order of the client's samples."""
        self.images = images
        self.labels = labels
        self.epochs = epochs
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for order in self.epochs:
            for batch in torch.split(order, self.batch_size):
                if len(batch) > 1:
                    yield normalised(self.images[batch]), self.labels[batch]


@dataclass(frozen=True)
class ClientJob:
    """One client's training in one round; complete in itself, so that another process can do it."""

    experiment: Experiment
    model: nn.Module  # the global model; not changed
    loader: ClientDataloader


def prepare(experiment: Experiment, data: ImageData) -> Prepared:
    """Split off the validation set, divide the rest among the clients, and poison it.

    Raises:
        PartitionError: the samples cannot be divided so.
        ValueError: the attack names a class that the data set does not have.
    """
    target = max(experiment.target_class or 0, experiment.poison_label or 0)
    if target >= data.num_classes:
        raise ValueError(
            f"the attack names class {target}, but {data.name} has the classes 0 to {data.num_classes - 1}"
        )
    labels = data.train_labels.cpu().numpy()
    split_seed = experiment.seed if experiment.split_seed is None else experiment.split_seed
    training, validation = split_validation(len(labels), experiment.validation_split, split_seed)
    if len(validation) == 0:
        raise ValueError(
            f"validation_split={experiment.validation_split} of {len(labels)} samples leaves none to validate on"
        )
    clients = tuple(training[own] for own in partition(experiment, labels[training]))
    return Prepared(validation, clients, poison(experiment, labels, clients, data.num_classes))


def participants(experiment: Experiment, round_number: int) -> Indices:
    """The clients that train in a round, sorted."""
    count = max(1, rounded(experiment.fraction_fit, experiment.num_clients))
    order = permutation(stream(experiment.seed, "participation", round_number), experiment.num_clients)
    return np.sort(order[:count])


def epoch_orders(
    experiment: Experiment, own: Indices, is_poisoned: NDArray[np.bool_], round_number: int, client: int
) -> list[Indices]:
    """For each local epoch the order in which a client sees its samples (positions in the whole training set).

    The permutation does not depend on the attack. `good_bad` and `bad_good` part it into clean and poisoned samples and
    keep its order within each.
    """
    generator = stream(experiment.seed, "order", round_number, client)
    orders = [own[permutation(generator, len(own))] for _ in range(experiment.local_epochs)]
    if experiment.data_ordering == "shuffle":
        return orders
    clean_first = experiment.data_ordering == "good_bad"
    return [np.concatenate(_parted(order, is_poisoned, clean_first=clean_first)) for order in orders]


def _parted(order: Indices, is_poisoned: NDArray[np.bool_], *, clean_first: bool) -> tuple[Indices, Indices]:
    clean, poisoned = order[~is_poisoned[order]], order[is_poisoned[order]]
    return (clean, poisoned) if clean_first else (poisoned, clean)


def get_client_dataloader(
    experiment: Experiment,
    prepared: Prepared,
    images: Tensor,
    labels: Tensor,
    round_number: int,
    client: int,
) -> ClientDataloader:
    """The batches of a client in a round.

    Args:
        experiment: ordering, batch size, local epochs and seed.
        prepared: who holds what, and what is poisoned.
        images: uint8 [N, C, S, S], the whole training set.
        labels: int64 [N], the labels that training sees (`prepared.poisoning.labels`), on the device of the images.
        round_number: from 1.
        client: from 0.
    """
    own, is_poisoned = prepared.clients[client], prepared.poisoning.is_poisoned
    orders = epoch_orders(experiment, own, is_poisoned, round_number, client)
    epochs = [torch.from_numpy(order).to(images.device) for order in orders]
    return ClientDataloader(images, labels, epochs, experiment.batch_size)


def train_client(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], experiment: Experiment) -> None:
    """Train a client's model in place, with a fresh SGD optimiser, on every batch of the loader.

    The loss is mean cross-entropy. Gradients of the whole model are clipped to the norm `max_grad_norm`.
    """
    model.train()
    parameters = list(model.parameters())
    optimiser = torch.optim.SGD(
        parameters,
        lr=experiment.lr,
        momentum=experiment.momentum,
        weight_decay=experiment.weight_decay,
        foreach=True,
    )
    for images, labels in loader:
        optimiser.zero_grad()
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        if experiment.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, experiment.max_grad_norm, foreach=True)
        optimiser.step()


def train_one_client(job: ClientJob) -> dict[str, Tensor]:
    """Train a copy of the global model on one client's batches; its weights."""
    model = copy.deepcopy(job.model)
    train_client(model, job.loader, job.experiment)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _one_after_another(jobs: Iterable[ClientJob]) -> Iterable[Mapping[str, Tensor]]:
    return map(train_one_client, jobs)


def run(
    experiment: Experiment,
    data: ImageData,
    device: str | torch.device = "cpu",
    train_clients: Callable[[Iterable[ClientJob]], Iterable[Mapping[str, Tensor]]] = _one_after_another,
) -> Generator[RoundReport, None, Outcome]:
    """Run an experiment: yields a report after every round and returns the outcome.

    Args:
        experiment: every parameter.
        data: the data set; moved to the device if it lies elsewhere.
        device: where to train.
        train_clients: maps the jobs of a round, in order, to the trained weights, in that order.

    Raises:
        PartitionError: the samples cannot be divided as asked.
    """
    data = data.to(device)
    prepared = prepare(experiment, data)
    labels = torch.from_numpy(prepared.poisoning.labels).to(device)
    validation = torch.from_numpy(prepared.validation).to(device)
    val_images, val_labels = data.train_images[validation], data.train_labels[validation]
    model = initial_model(experiment, data).to(device)
    stopping = EarlyStopping(experiment.early_stopping_patience, experiment.min_delta)
    history: list[RoundReport] = []
    best_state: dict[str, Tensor] = {}
    for round_number in range(1, experiment.global_rounds + 1):
        chosen = participants(experiment, round_number)
        loaders = [
            get_client_dataloader(experiment, prepared, data.train_images, labels, round_number, int(client))
            for client in chosen
        ]
        states = list(train_clients(ClientJob(experiment, model, loader) for loader in loaders))
        sizes = [len(prepared.clients[client]) for client in chosen]
        finite = [(state, size) for state, size in zip(states, sizes, strict=True) if is_finite(state)]
        nonfinite = len(states) - len(finite)
        if not finite:
            history.append(RoundReport(round_number, math.nan, math.nan, nonfinite))
            yield history[-1]
            return _diverged(model, prepared, history)
        kept, kept_sizes = zip(*finite, strict=True)
        model.load_state_dict(AGGREGATORS[experiment.aggregator](kept, kept_sizes))
        evaluation = evaluate_model(model, val_images, val_labels)
        history.append(RoundReport(round_number, evaluation.loss, evaluation.accuracy, nonfinite))
        if stopping.update(round_number, evaluation.loss):
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        yield history[-1]
        if stopping.should_stop:
            break
    if stopping.best_round is None:
        return _diverged(model, prepared, history)
    model.load_state_dict(best_state)
    return _tested(experiment, data, model, prepared, history, stopping.best_round)


def initial_model(experiment: Experiment, data: ImageData) -> nn.Module:
    """The global model before the first round, drawn from the stream `init`."""
    generator = torch.Generator().manual_seed(int(stream(experiment.seed, "init").integers(2**63)))
    return build_model(
        experiment.model_type,
        num_classes=data.num_classes,
        width_factor=experiment.width_factor,
        depth=experiment.depth,
        in_channels=data.in_channels,
        img_size=data.img_size,
        generator=generator,
    )


def _diverged(model: nn.Module, prepared: Prepared, history: Sequence[RoundReport]) -> Outcome:
    return Outcome(
        outcome="diverged",
        test_acc=None,
        test_loss=None,
        val_acc=None,
        val_loss=None,
        best_epoch=None,
        num_parameters=count_parameters(model),
        attack_success_rate=None,
        per_class_test_acc=None,
        poisoned_clients=prepared.poisoning.poisoned_clients,
        poisoned_samples=prepared.poisoning.poisoned_samples,
        nonfinite_clients=sum(report.nonfinite_clients for report in history),
        rounds_run=len(history),
        history=tuple(history),
    )


def _tested(
    experiment: Experiment,
    data: ImageData,
    model: nn.Module,
    prepared: Prepared,
    history: Sequence[RoundReport],
    best_round: int,
) -> Outcome:
    """The outcome of the best round, whose weights the model has."""
    test = evaluate_model(model, data.test_images, data.test_labels)
    best = history[best_round - 1]
    return Outcome(
        outcome="ok",
        test_acc=test.accuracy,
        test_loss=test.loss,
        val_acc=best.val_acc,
        val_loss=best.val_loss,
        best_epoch=best_round,
        num_parameters=count_parameters(model),
        attack_success_rate=attack_success_rate(experiment, test.predictions, data.test_labels, data.num_classes),
        per_class_test_acc=per_class_accuracy(test.predictions, data.test_labels, data.num_classes),
        poisoned_clients=prepared.poisoning.poisoned_clients,
        poisoned_samples=prepared.poisoning.poisoned_samples,
        nonfinite_clients=sum(report.nonfinite_clients for report in history),
        rounds_run=len(history),
        history=tuple(history),
    )
