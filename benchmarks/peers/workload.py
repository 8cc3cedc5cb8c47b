"""A workload as every peer reads it: one npz file with images, labels, batches, and the weights to begin with.

A *group* is a seed: its experiments have the same initial weights and see the same images in the same order, and differ
in labels and aggregator. The file says what to compute to the last batch, so that no peer draws anything itself.
Needs NumPy only; nothing here imports fedsweep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

State = dict[str, NDArray]


@dataclass(frozen=True)
class Settings:
    """Model and local training, the same for all experiments of a workload."""

    model_type: str  # "cnn" or "lr"
    width: int
    depth: int
    num_classes: int
    in_channels: int
    img_size: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    max_grad_norm: float


@dataclass(frozen=True)
class Member:
    """One experiment."""

    group: int
    aggregator: str  # "fedavg" or "median"
    config: dict[str, object]  # what fedsweep makes its experiment of; no business of the peers


@dataclass(frozen=True)
class Work:
    """One client's local epoch."""

    client: int
    order: NDArray[np.int64]  # positions in the whole training set, in the order of training

    def batches(self, batch_size: int) -> list[NDArray[np.int64]]:
        """The batches to train on. One of a single sample is left out: batch norm has no variance there."""
        parts = (self.order[start : start + batch_size] for start in range(0, len(self.order), batch_size))
        return [part for part in parts if len(part) > 1]


@dataclass(frozen=True)
class Workload:
    """What to train."""

    name: str
    settings: Settings
    members: tuple[Member, ...]
    images: NDArray[np.uint8]  # [N, C, S, S]
    true_labels: NDArray[np.uint8]  # [N]
    labels: NDArray[np.uint8]  # [E, N] as the training of each experiment sees them
    initial: tuple[State, ...]  # for each group
    rounds: tuple[tuple[tuple[Work, ...], ...], ...]  # [group][round][participant]

    def works(self, experiment: int, round: int) -> tuple[Work, ...]:
        """What the participants of a round (from 0) train on."""
        return self.rounds[self.members[experiment].group][round]

    def client_steps(self, experiments: Sequence[int], rounds: int) -> int:
        """Training steps of all clients of these experiments."""
        size = self.settings.batch_size
        steps = [[sum(len(work.batches(size)) for work in works) for works in group[:rounds]] for group in self.rounds]
        return sum(sum(steps[self.members[experiment].group]) for experiment in experiments)


def save(workload: Workload, path: Path) -> None:
    """Write a workload; 48 MB for all of MNIST."""
    meta = {
        "name": workload.name,
        "settings": asdict(workload.settings),
        "members": [asdict(member) for member in workload.members],
        "groups": len(workload.initial),
        "rounds": len(workload.rounds[0]),
    }
    arrays: State = {
        "images": workload.images,
        "true_labels": workload.true_labels,
        "labels": workload.labels,
        "meta": np.array(json.dumps(meta)),
    }
    for group, state in enumerate(workload.initial):
        arrays |= {f"initial/{group}/{name}": tensor for name, tensor in state.items()}
        for number, works in enumerate(workload.rounds[group]):
            arrays[f"clients/{group}/{number}"] = np.array([work.client for work in works])
            arrays[f"sizes/{group}/{number}"] = np.array([len(work.order) for work in works])
            arrays[f"orders/{group}/{number}"] = np.concatenate([work.order for work in works]).astype(np.int32)
    np.savez(path, **arrays)


def load(path: str | Path) -> Workload:
    """Read a workload."""
    with np.load(path) as arrays:
        meta = json.loads(str(arrays["meta"]))
        groups, rounds = range(meta["groups"]), range(meta["rounds"])
        names = {group: f"initial/{group}/" for group in groups}
        return Workload(
            name=meta["name"],
            settings=Settings(**meta["settings"]),
            members=tuple(Member(**member) for member in meta["members"]),
            images=arrays["images"],
            true_labels=arrays["true_labels"],
            labels=arrays["labels"],
            initial=tuple(
                {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
                for prefix in names.values()
            ),
            rounds=tuple(tuple(_works(arrays, group, number) for number in rounds) for group in groups),
        )


def _works(arrays: np.lib.npyio.NpzFile, group: int, number: int) -> tuple[Work, ...]:
    orders = arrays[f"orders/{group}/{number}"].astype(np.int64)
    ends = np.cumsum(arrays[f"sizes/{group}/{number}"])[:-1]
    clients = arrays[f"clients/{group}/{number}"].tolist()
    return tuple(Work(client, order) for client, order in zip(clients, np.split(orders, ends), strict=True))
