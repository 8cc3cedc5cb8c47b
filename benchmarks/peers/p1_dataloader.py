"""P1: the way most scripts of this field are written.

A `DataLoader` over a `TensorDataset` for each client, a fresh model and a fresh `torch.optim.SGD` for each client,
`clip_grad_norm_`, a check of each parameter for NaN after every step, the loss read back after every step, and
aggregation over state dicts. Images are normalised once, when they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import modules
import numpy as np
import running
import torch
from running import Prepared
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from workload import State, Work, Workload


class InOrder(Sampler):
    """The samples of a client in the order that the workload says, one by one as a shuffling sampler gives them."""

    def __init__(self, places: list[int]) -> None:
        self.places = places

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def prepare(workload: Workload) -> Prepared:
    """Load the data, and warm up on one client."""
    images = modules.normalised(torch.from_numpy(workload.images))
    labels = torch.from_numpy(workload.labels).long()
    work = workload.works(0, 0)[0]
    train_client(workload, modules.tensors(workload.initial[0]), loader(workload, images, labels[0], work))
    return Prepared(lambda index, rounds: train(workload, images, labels[index], index, rounds))


def train(workload: Workload, images: Tensor, labels: Tensor, index: int, rounds: int) -> State:
    """Train one experiment; its global weights after the first round."""
    member = workload.members[index]
    weights: dict[str, Tensor] = modules.tensors(workload.initial[member.group])
    first: State = {}
    for number in range(rounds):
        works = workload.works(index, number)
        clients = [train_client(workload, weights, loader(workload, images, labels, work)) for work in works]
        weights = modules.combine(member.aggregator, clients, [len(work.order) for work in works])
        if number == 0:
            first = modules.arrays(weights)
    return first


def loader(workload: Workload, images: Tensor, labels: Tensor, work: Work) -> DataLoader:
    """A client's batches."""
    own = np.sort(work.order)
    positions = torch.from_numpy(own)
    sampler = InOrder(np.searchsorted(own, work.order).tolist())
    size = workload.settings.batch_size
    return DataLoader(TensorDataset(images[positions], labels[positions]), batch_size=size, sampler=sampler)


def train_client(workload: Workload, weights: dict[str, Tensor], batches: DataLoader) -> dict[str, Tensor]:
    """Train one client from the global weights."""
    settings = workload.settings
    model = modules.build(settings)
    model.load_state_dict(weights)
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    criterion = nn.CrossEntropyLoss()
    total_loss = 0.0
    for images, labels in batches:
        if len(images) < 2:
            continue
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        total_loss += loss.item()
        if any(bool(torch.isnan(parameter).any()) for parameter in model.parameters()):
            break
    return model.state_dict()


if __name__ == "__main__":
    running.main(prepare, modules.versions)
