"""The reference engine: one experiment, one client, one `nn.Module` at a time. Slow and obvious."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.sgd import sgd

from fedsweep.fl.aggregate import AGGREGATORS, is_finite
from fedsweep.fl.data import ImageData, normalised
from fedsweep.fl.evaluate import evaluate_model
from fedsweep.fl.federation import Federation, epoch_orders, form_federation, participants
from fedsweep.fl.models import build_model, count_parameters
from fedsweep.fl.outcome import Outcome, RoundReport, diverged, tested
from fedsweep.fl.repeatable import repeatable
from fedsweep.fl.stopping import EarlyStopping
from fedsweep.plan.experiment import Experiment

Batch = tuple[Tensor, Tensor]  # images float32 [B, C, S, S], labels int64 [B]


@dataclass(frozen=True)
class ClientData:
    """What a client trains on."""

    images: Tensor  # uint8 [n, C, S, S]
    labels: Tensor  # int64 [n], as training sees them
    poisoned: Tensor  # bool [n]


@dataclass(frozen=True)
class ClientDataloader:
    """A client's batches, epoch after epoch. Images are normalised as a batch is gathered.

    The last batch of an epoch may be smaller. A batch of one sample is left out: batch norm has no variance there.
    """

    images: Tensor  # uint8 [n, C, S, S]
    labels: Tensor  # int64 [n]
    epochs: Sequence[Tensor]  # for each local epoch the order of the samples, int64 [n]
    batch_size: int

    def __iter__(self) -> Iterator[Batch]:
        for order in self.epochs:
            for batch in torch.split(order, self.batch_size):
                if len(batch) > 1:
                    yield normalised(self.images.index_select(0, batch)), self.labels.index_select(0, batch)


@dataclass(frozen=True)
class ClientJob:
    """One client's training in one round, complete in itself, so that any process can do it."""

    experiment: Experiment
    model: nn.Module  # the global model; shared by the jobs of a round, so never changed
    loader: ClientDataloader


TrainClients = Callable[[Sequence[ClientJob]], Iterable[Mapping[str, Tensor]]]


def get_client_dataloader(experiment: Experiment, own: ClientData, round: int, client: int) -> ClientDataloader:
    """The batches that a client trains on in a round: images float32 [B, C, S, S] from -1 to 1, labels int64 [B].

    Args:
        experiment: batch size, local epochs, ordering and seed.
        own: the client's data.
        round: counted from 1.
        client: counted from 0.
    """
    orders = epoch_orders(experiment, own.poisoned.cpu().numpy(), round, client)
    epochs = [torch.from_numpy(order).to(own.labels.device) for order in orders]
    return ClientDataloader(own.images, own.labels, epochs, experiment.batch_size)


@repeatable()
def train_client(model: nn.Module, loader: Iterable[Batch], experiment: Experiment) -> None:
    """Train a client's model in place on all batches of the loader, with a fresh SGD optimiser.

    The loss is the mean cross-entropy of a batch. With g its gradient over the whole model, scaled down to the norm
    `max_grad_norm` where it is longer (None: never), a step is v = momentum * v + g + weight_decay * w and
    w = w - lr * v, beginning with v = 0.
    """
    model.train()
    weights = list(model.parameters())
    velocities: list[Tensor | None] = [None] * len(weights)
    for images, labels in loader:
        for weight in weights:
            weight.grad = None
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        if experiment.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(weights, experiment.max_grad_norm)
        _sgd_step(experiment, weights, velocities)


@torch.no_grad()
def _sgd_step(experiment: Experiment, weights: Sequence[Tensor], velocities: list[Tensor | None]) -> None:
    # The function inside torch.optim.SGD. The class, when first used, loads PyTorch's compiler, which takes a process
    # longer than many an experiment.
    sgd(
        list(weights),
        [weight.grad for weight in weights if weight.grad is not None],
        velocities,
        fused=True,
        has_sparse_grad=False,
        lr=experiment.lr,
        momentum=experiment.momentum,
        weight_decay=experiment.weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def train_one_client(job: ClientJob, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Train one client from the global model; its weights.

    Args:
        job: the client's training.
        model: a model of the same shape to train in, whatever its weights. None: a new one.
    """
    if model is None:
        model = copy.deepcopy(job.model)
    else:
        model.load_state_dict(job.model.state_dict())
    train_client(model, job.loader, job.experiment)
    return _copy(model.state_dict())


def initial_model(experiment: Experiment, data: ImageData) -> nn.Module:
    """The global model before the first round, on the CPU."""
    return build_model(experiment, data.num_classes, data.in_channels, data.img_size)


def run(
    experiment: Experiment,
    data: ImageData,
    device: str | torch.device = "cpu",
    train_clients: TrainClients | None = None,
) -> Generator[RoundReport, None, Outcome]:
    """Run an experiment. Yields a report after every round and returns the outcome.

    Args:
        experiment: what to run.
        data: moved to `device` if it is not there.
        device: where to train.
        train_clients: does the jobs of a round, for instance by `train_one_client` in several processes, and gives the
            weights of each, in the order of the jobs. None: one after another, in this process.

    Raises:
        PartitionError: the samples cannot be divided as the experiment asks.
        DataError: the experiment does not fit the data.
    """
    data = data.to(device)
    federation = form_federation(experiment, data)
    clients = _client_data(federation, data)
    validation = torch.from_numpy(federation.validation).to(device)
    val_images, val_labels = data.train_images[validation], data.train_labels[validation]
    model = initial_model(experiment, data).to(device)
    train = _one_after_another(copy.deepcopy(model)) if train_clients is None else train_clients
    stopping = EarlyStopping(experiment.early_stopping_patience, experiment.min_delta)
    history: list[RoundReport] = []
    for number in range(1, experiment.global_rounds + 1):
        jobs = [
            ClientJob(experiment, model, get_client_dataloader(experiment, clients[client], number, client))
            for client in participants(experiment, number)
        ]
        finite = [(job, weights) for job, weights in zip(jobs, train(jobs), strict=True) if is_finite(weights)]
        lost = len(jobs) - len(finite)
        if not finite:
            history.append(RoundReport(number, math.nan, math.nan, lost))
            yield history[-1]
            return diverged(count_parameters(model), federation, history)
        weights = AGGREGATORS[experiment.aggregator](
            [weights for _, weights in finite], [len(job.loader.labels) for job, _ in finite]
        )
        model.load_state_dict(weights)
        validated = evaluate_model(model, val_images, val_labels)
        history.append(RoundReport(number, validated.loss, validated.accuracy, lost))
        stopping.update(number, validated.loss, weights)
        yield history[-1]
        if stopping.should_stop:
            break
    if stopping.best_round is None:
        return diverged(count_parameters(model), federation, history)
    model.load_state_dict(stopping.best_weights)
    test = evaluate_model(model, data.test_images, data.test_labels)
    return tested(experiment, data, test, count_parameters(model), federation, history, stopping.best_round)


def _client_data(federation: Federation, data: ImageData) -> list[ClientData]:
    device = data.train_labels.device
    labels = torch.from_numpy(federation.poisoning.labels).to(device)
    poisoned = torch.from_numpy(federation.poisoning.poisoned).to(device)
    positions = [torch.from_numpy(own).to(device) for own in federation.clients]
    return [ClientData(data.train_images[own], labels[own], poisoned[own]) for own in positions]


def _one_after_another(model: nn.Module) -> TrainClients:
    return lambda jobs: [train_one_client(job, model) for job in jobs]


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
