"""P0: a plain, well-written PyTorch loop over rounds, clients and batches. The peer that matters.

Written to be as fast as can be without training clients or experiments together; `local.py` says how.
"""

from __future__ import annotations

import local
import modules
import running
import torch
from running import Prepared
from torch import Tensor
from workload import State, Workload


def prepare(workload: Workload, threads: int, experiments: tuple[int, ...]) -> Prepared:
    """Load the data, and tune."""
    torch.set_num_threads(threads)
    trainer = local.prepare(workload)
    labels = torch.from_numpy(workload.labels).long()
    return Prepared(lambda index, rounds: train(trainer, workload, labels, index, rounds), trainer.choice.words)


def train(trainer: local.Local, workload: Workload, labels: Tensor, index: int, rounds: int) -> State:
    """Train one experiment; its global weights after the first round."""
    weights, steps = local.start_of(trainer, workload, index), 0
    first: State = {}
    for number in range(rounds):
        works = workload.works(index, number)
        batches = [local.batches_of(work, workload.settings) for work in works]
        clients = [trainer.train(weights, each, labels[index]) for each in batches]
        sizes = [len(work.order) for work in works]
        weights = combine(workload.members[index].aggregator, clients, sizes)
        steps += max(map(len, batches))
        if number == 0:
            first = modules.arrays(local.state_of(trainer, weights, steps))
    return first


def combine(aggregator: str, clients: list[list[Tensor]], sizes: list[int]) -> list[Tensor]:
    """All tensors of the clients at once."""
    shapes = [tensor.shape for tensor in clients[0]]
    rows = torch.stack([torch.cat([tensor.reshape(-1) for tensor in client]) for client in clients])  # [K, P]
    if aggregator == "median":
        row = modules.middle(rows)
    else:
        row = torch.tensor(sizes, dtype=torch.float64).div_(sum(sizes)).float() @ rows
    parts = row.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


if __name__ == "__main__":
    running.main(prepare, modules.versions)
