"""Which samples an attack relabels, and with what.

An attack sees the true label of every sample by the sample's position in the whole training set, and answers in the
same positions; nothing here ever counts within a subset, so a label cannot land on another image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsweep.fl.streams import permutation, rounded, stream
from fedsweep.plan.experiment import Experiment

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Poisoning:
    """What the clients train on instead of the truth."""

    labels: Labels  # [N] the label that training sees, for every sample of the training set
    is_poisoned: NDArray[np.bool_]  # [N]
    poisoned_clients: int  # clients that hold at least one poisoned sample
    malicious: NDArray[np.int64]  # the malicious clients (poison_level: client), sorted

    @property
    def poisoned_samples(self) -> int:
        """Number of poisoned training samples."""
        return int(self.is_poisoned.sum())


def poison(experiment: Experiment, labels: Labels, clients: Sequence[NDArray[np.int64]], num_classes: int) -> Poisoning:
    """Poison a training set that is divided among clients.

    Args:
        experiment: ratio, type, level and target of the attack.
        labels: [N], the true labels of the whole training set; not changed.
        clients: for each client the positions of its samples in `labels`.
        num_classes: L.
    """
    malicious = malicious_clients(experiment) if experiment.poison_level == "client" else np.arange(0)
    chosen = [_chosen(experiment, labels, clients[k], k, malicious) for k in range(len(clients))]
    is_poisoned = np.zeros(len(labels), dtype=np.bool_)
    is_poisoned[np.concatenate(chosen)] = True
    wanted = POISONS[experiment.poison_type](experiment, labels, num_classes)
    return Poisoning(
        labels=np.where(is_poisoned, wanted, labels),
        is_poisoned=is_poisoned,
        poisoned_clients=sum(len(part) > 0 for part in chosen),
        malicious=malicious,
    )


def malicious_clients(experiment: Experiment) -> NDArray[np.int64]:
    """The malicious clients, sorted. Those at a smaller ratio are among those at a larger one of the same seed."""
    order = permutation(stream(experiment.seed, "malicious"), experiment.num_clients)
    return np.sort(order[: rounded(experiment.poison_ratio, experiment.num_clients)])


def _chosen(
    experiment: Experiment, labels: Labels, own: NDArray[np.int64], client: int, malicious: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The positions of the samples that this client poisons."""
    if experiment.is_targeted:
        own = own[labels[own] == experiment.target_class]
    if experiment.poison_level == "client":
        return own if client in malicious else own[:0]
    order = permutation(stream(experiment.seed, "poison", client=client + 1), len(own))
    return own[order[: rounded(experiment.poison_ratio, len(own))]]


def flipped(experiment: Experiment, labels: Labels, num_classes: int) -> Labels:
    """The label L-1-y for each y; with a target, `poison_label` for each `target_class`. Shape of `labels`."""
    if not experiment.is_targeted:
        return num_classes - 1 - labels
    return np.where(labels == experiment.target_class, np.int64(experiment.poison_label or 0), labels)


def _random_other(experiment: Experiment, labels: Labels, num_classes: int) -> Labels:
    """One of the other labels, each as likely; drawn once for every sample, whether or not it will be poisoned."""
    generator = stream(experiment.seed, "poison")
    return (labels + generator.integers(1, num_classes, size=len(labels))) % num_classes


POISONS = {"label_flip": flipped, "random_noise": _random_other}
