"""Which samples an attack relabels, and with what.

Everything here counts samples by their position in the whole training set, labels and clients alike, and never by their
place within a subset: so the label that changes is the label of that very image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsweep.fl.streams import below, permutation, rounded, stream
from fedsweep.plan.experiment import Experiment

Labels = NDArray[np.int64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Poisoning:
    """What the clients train on."""

    labels: Labels  # [N] the label that training sees, for every sample of the training set
    poisoned: NDArray[np.bool_]  # [N] whether the attack took the sample
    poisoned_clients: int  # clients that hold at least one poisoned sample

    @property
    def poisoned_samples(self) -> int:
        """How many samples the attack took."""
        return int(self.poisoned.sum())


def poison(experiment: Experiment, labels: Labels, clients: Sequence[Indices], num_classes: int) -> Poisoning:
    """Poison a training set that is divided among clients.

    A sample counts as poisoned when the attack took it, also where the label that it wanted is the one it found (the
    middle one of an odd number of classes under `label_flip`).

    Args:
        experiment: the attack, and the seed of its draws.
        labels: [N], the true labels of the whole training set. Left as they are.
        clients: for each client the positions of its samples in `labels`.
        num_classes: L.
    """
    taken = _taken_at_level[experiment.poison_level](experiment, labels, clients)
    poisoned = np.zeros(len(labels), dtype=np.bool_)
    for positions in taken:
        poisoned[positions] = True
    return Poisoning(
        labels=np.where(poisoned, POISONS[experiment.poison_type](experiment, labels, num_classes), labels),
        poisoned=poisoned,
        poisoned_clients=sum(len(positions) > 0 for positions in taken),
    )


def malicious_clients(seed: int, num_clients: int, ratio: float) -> Indices:
    """The clients that poison all they have, sorted. Those at a smaller ratio are among those at a larger one."""
    order = permutation(stream(seed, "malicious"), num_clients)
    return np.sort(order[: rounded(ratio, num_clients)])


def _taken_from_malicious(experiment: Experiment, labels: Labels, clients: Sequence[Indices]) -> list[Indices]:
    """For each client the samples that are poisoned: all that may be where it is malicious, else none."""
    malicious = set(malicious_clients(experiment.seed, len(clients), experiment.poison_ratio).tolist())
    return [
        own[_may_be_poisoned(experiment, labels[own])] if client in malicious else own[:0]
        for client, own in enumerate(clients)
    ]


def _taken_from_all(experiment: Experiment, labels: Labels, clients: Sequence[Indices]) -> list[Indices]:
    """For each client the samples that are poisoned: the same share of those that may be."""
    taken = []
    for client, own in enumerate(clients):
        shuffled = own[permutation(stream(experiment.seed, "poison", client=client), len(own))]
        candidates = shuffled[_may_be_poisoned(experiment, labels[shuffled])]
        taken.append(candidates[: rounded(experiment.poison_ratio, len(candidates))])
    return taken


def _may_be_poisoned(experiment: Experiment, labels: Labels) -> NDArray[np.bool_]:
    """Whether the attack is after samples with these labels."""
    if experiment.is_targeted:
        return np.asarray(labels == experiment.target_class)
    return np.full(len(labels), True)


_taken_at_level = {"sample": _taken_from_all, "client": _taken_from_malicious}


def wanted_labels(experiment: Experiment, labels: Labels, num_classes: int) -> Labels:
    """What `label_flip` wants each label to be: L-1-y; with a target, `poison_label` where y is `target_class`."""
    if experiment.is_targeted:
        return np.where(labels == experiment.target_class, np.int64(experiment.poison_label or 0), labels)
    return num_classes - 1 - labels


def _random_others(experiment: Experiment, labels: Labels, num_classes: int) -> Labels:
    """For each label one of the L-1 others, each as likely.

    Drawn for every sample of the training set, poisoned or not, so that a sample's noise is the same at every ratio and
    level.
    """
    offsets = 1 + below(stream(experiment.seed, "poison"), num_classes - 1, len(labels))
    return (labels + offsets) % num_classes


POISONS: dict[str, Callable[[Experiment, Labels, int], Labels]] = {
    "label_flip": wanted_labels,
    "random_noise": _random_others,
}
