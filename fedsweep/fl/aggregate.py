"""From the clients' weights to the global model's.

An aggregator takes the state dicts of K clients and their sample counts. It computes in float64 and gives every tensor
back in its own type. Running statistics of batch norm follow the rule of the weights; whole-number tensors
(`num_batches_tracked`) are counts, of which the maximum is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def fed_avg(states: Sequence[State], num_samples: Sequence[int]) -> dict[str, Tensor]:
    """The mean of the clients by their sample counts: sum of n_k w_k / sum of n_k (FedAvg; McMahan et al. 2017)."""
    return _combined(states, lambda tensors: _mean(tensors, num_samples))


def fed_avg_uniform(states: Sequence[State], num_samples: Sequence[int] = ()) -> dict[str, Tensor]:
    """The plain mean of the clients; `num_samples` does not matter."""
    return _combined(states, lambda tensors: _mean(tensors, [1] * len(tensors)))


def fed_median(states: Sequence[State], num_samples: Sequence[int] = ()) -> dict[str, Tensor]:
    """The coordinate-wise median (Yin et al. 2018): for an even number of clients the mean of the two middle values.

    `num_samples` does not matter. (`torch.median` would take the lower of the two.)
    """
    return _combined(states, _median)


def _mean(tensors: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    # One client after another, so that the last bit of the sum depends on nothing but the order of the clients.
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.div_(sum(weights))


def _median(tensors: Sequence[Tensor]) -> Tensor:
    ordered = torch.stack(tuple(tensors)).sort(dim=0).values  # [K, …]
    middle = len(tensors) // 2
    if len(tensors) % 2 == 1:
        return ordered[middle]
    return ordered[middle - 1].double().add_(ordered[middle]).div_(2)


def _combined(states: Sequence[State], rule: Callable[[Sequence[Tensor]], Tensor]) -> dict[str, Tensor]:
    if not states:
        raise ValueError("there are no clients to aggregate")
    combined = {}
    for name, first in states[0].items():
        tensors = [state[name] for state in states]
        if first.is_floating_point():
            combined[name] = rule(tensors).to(first.dtype)
        else:
            combined[name] = torch.stack(tensors).amax(dim=0)
    return combined


AGGREGATORS: dict[str, Callable[[Sequence[State], Sequence[int]], dict[str, Tensor]]] = {
    "fedavg": fed_avg,
    "fedavg_uniform": fed_avg_uniform,
    "median": fed_median,
}


def is_finite(state: State) -> bool:
    """Whether every number of a state dict is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in state.values())
