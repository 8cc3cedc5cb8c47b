"""Who holds what, what is poisoned, who trains in a round and in which order: every draw but the initial weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsweep.errors import DataError
from fedsweep.fl.data import ImageData
from fedsweep.fl.partition import partition_data_dirichlet, split_validation
from fedsweep.fl.poison import Poisoning, poison
from fedsweep.fl.streams import permutation, rounded, stream
from fedsweep.plan.experiment import Experiment

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Federation:
    """The division of a training set. All positions count in the whole training set, [N]."""

    validation: Indices  # positions of the validation samples, sorted
    clients: tuple[Indices, ...]  # for each client the positions of its samples, sorted
    poisoning: Poisoning


def form_federation(experiment: Experiment, data: ImageData) -> Federation:
    """Set the validation samples aside, divide the others among the clients, and poison them.

    Raises:
        PartitionError: the samples cannot be divided so.
        DataError: the attack names a class that the data set does not have, or there is but one class.
    """
    return poisoned_federation(experiment, data, divide(experiment, data))


@dataclass(frozen=True)
class Division:
    """Who holds which sample, before any attack; the same for experiments that differ in nothing else than the attack.

    All positions count in the whole training set.
    """

    validation: Indices
    clients: tuple[Indices, ...]


def division_key(experiment: Experiment) -> tuple[object, ...]:
    """What decides an experiment's `Division` of a data set."""
    split_seed = experiment.seed if experiment.split_seed is None else experiment.split_seed
    partition_seed = experiment.seed if experiment.partition_seed is None else experiment.partition_seed
    names = ("validation_split", "num_clients", "alpha", "partition", "min_client_size")
    return split_seed, partition_seed, *(getattr(experiment, name) for name in names)


def divide(experiment: Experiment, data: ImageData) -> Division:
    """Set the validation samples aside and divide the others among the clients.

    Raises:
        PartitionError: the samples cannot be divided so.
    """
    labels = data.train_labels.cpu().numpy()
    split_seed = experiment.seed if experiment.split_seed is None else experiment.split_seed
    partition_seed = experiment.seed if experiment.partition_seed is None else experiment.partition_seed
    training, validation = split_validation(len(labels), experiment.validation_split, split_seed)
    parts = partition_data_dirichlet(
        labels[training],
        experiment.num_clients,
        experiment.alpha,
        seed=partition_seed,
        min_client_size=experiment.min_client_size,
        method=experiment.partition,
    )
    return Division(validation, tuple(training[part] for part in parts))


def poisoned_federation(experiment: Experiment, data: ImageData, division: Division) -> Federation:
    """The federation of a division of the training set, poisoned.

    Raises:
        DataError: the attack names a class that the data set does not have, or there is but one class.
    """
    _check_classes(experiment, data)
    labels = data.train_labels.cpu().numpy()
    poisoning = poison(experiment, labels, division.clients, data.num_classes)
    return Federation(division.validation, division.clients, poisoning)


def _check_classes(experiment: Experiment, data: ImageData) -> None:
    """Refuse what no grid can know before the data is read."""
    if data.num_classes < 2:
        raise DataError(f"{data.name} has images of one class only; there is nothing to tell apart")
    if experiment.is_targeted and experiment.poison_ratio > 0:  # without an attack its target means nothing
        for name in ("target_class", "poison_label"):
            found = getattr(experiment, name)
            if found >= data.num_classes:
                raise DataError(f"{name} is {found}, but {data.name} has the classes 0 to {data.num_classes - 1}")


def participants(experiment: Experiment, round: int) -> list[int]:
    """The clients that train in a round, sorted."""
    order = permutation(stream(experiment.seed, "participation", round), experiment.num_clients)
    return sorted(order[: max(1, rounded(experiment.fraction_fit, experiment.num_clients))].tolist())


def epoch_orders(experiment: Experiment, poisoned: NDArray[np.bool_], round: int, client: int) -> list[Indices]:
    """For each local epoch the order in which a client sees its n samples: positions 0 … n-1 among its own.

    One permutation of all samples is drawn for an epoch, whatever the attack and the ordering; `good_bad` and
    `bad_good` part it into clean and poisoned samples and keep its order within each.

    Args:
        experiment: ordering, local epochs and seed.
        poisoned: [n], of the client's samples.
        round: counted from 1.
        client: counted from 0.
    """
    generator = stream(experiment.seed, "order", round, client)
    shuffled = [permutation(generator, len(poisoned)) for _ in range(experiment.local_epochs)]
    return [ORDERINGS[experiment.data_ordering](order, poisoned) for order in shuffled]


def _as_shuffled(order: Indices, poisoned: NDArray[np.bool_]) -> Indices:
    return order


def _clean_first(order: Indices, poisoned: NDArray[np.bool_]) -> Indices:
    late = poisoned[order]
    return np.concatenate((order[~late], order[late]))


def _poisoned_first(order: Indices, poisoned: NDArray[np.bool_]) -> Indices:
    return _clean_first(order, ~poisoned)


ORDERINGS: dict[str, Callable[[Indices, NDArray[np.bool_]], Indices]] = {
    "shuffle": _as_shuffled,
    "good_bad": _clean_first,
    "bad_good": _poisoned_first,
}
