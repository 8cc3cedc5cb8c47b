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


def prepare(workload: Workload) -> Prepared:
    """Load the data, and tune."""
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
        clients = torch.stack([trainer.train(weights, each, labels[index]) for each in batches])  # [K, P]
        if workload.members[index].aggregator == "median":
            weights = modules.middle(clients)
        else:
            shares = torch.tensor([len(work.order) for work in works], dtype=torch.float64)
            weights = shares.div_(shares.sum()).to(clients.dtype) @ clients
        steps += max(map(len, batches))
        if number == 0:
            first = modules.arrays(trainer.state_of(weights, steps))
    return first


if __name__ == "__main__":
    running.main(prepare, modules.versions)
