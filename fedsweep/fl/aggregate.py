"""From the clients' weights to the global model's.

An aggregator takes the state dicts of K clients and their sample counts. It computes in float64 and gives every tensor
back in its own type. Running statistics of batch norm follow the rule of the weights; whole-number tensors
(`num_batches_tracked`) are counts, of which the maximum is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

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
    # All coordinates at once through a sorting network: on a CPU many times faster than sorting each by itself.
    if len(tensors) == 1:
        return tensors[0].clone()
    values = list(tensors)
    for low, high, wants_low, wants_high in _network(len(values)):
        one, other = values[low], values[high]
        if wants_low:
            values[low] = torch.minimum(one, other)
        if wants_high:
            values[high] = torch.maximum(one, other)
    middle = len(values) // 2
    if len(values) % 2 == 1:
        return values[middle]
    return values[middle - 1].double().add_(values[middle]).div_(2)


@cache
def _network(size: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """What to compare so that the middle one or two of so many values come to their places.

    Batcher's merge exchange (Knuth, *The Art of Computer Programming* 3, 5.2.2, algorithm M), less what the middle does
    not need.

    Returns:
        In order: two places, and whether the smaller one at the first and the larger one at the second is needed.
    """
    top = 1 << max(0, (size - 1).bit_length() - 1)
    comparisons = []
    step = top
    while step > 0:
        reach, offset, apart = top, 0, step
        while True:
            comparisons += [(low, low + apart) for low in range(size - apart) if low & step == offset]
            if reach == step:
                break
            apart, reach, offset = reach - step, reach // 2, step
        step //= 2
    needed = {size // 2, (size - 1) // 2}
    kept = []
    for low, high in reversed(comparisons):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


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
