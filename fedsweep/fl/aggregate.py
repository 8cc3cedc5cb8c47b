"""From the clients' weights to the global model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def fed_avg(states: Sequence[State], num_samples: Sequence[int]) -> dict[str, Tensor]:
    """Mean weighted by sample counts: sum of n_k w_k / sum of n_k (McMahan et al. 2017, FedAvg).

    Args:
        states: the state dicts of K clients, all of the same shapes.
        num_samples: n_k for each client.

    Returns:
        One state dict. Running statistics of batch norm follow the same rule; counters take their maximum.
    """
    shares = torch.tensor(num_samples, dtype=torch.float64) / sum(num_samples)
    return _combined(states, lambda stacked: torch.tensordot(shares.to(stacked.device), stacked.double(), dims=1))


def fed_avg_uniform(states: Sequence[State], num_samples: Sequence[int]) -> dict[str, Tensor]:
    """Mean in which every client counts the same; arguments as `fed_avg`."""
    return fed_avg(states, [1] * len(states))


def fed_median(states: Sequence[State], num_samples: Sequence[int] = ()) -> dict[str, Tensor]:
    """Coordinate-wise median (Yin et al. 2018): for an even number of clients the mean of the two middle values.

    Arguments as `fed_avg`; sample counts do not matter. (`torch.median` takes the lower of the two.)
    """
    return _combined(states, _middle)


def _middle(stacked: Tensor) -> Tensor:
    ordered = stacked.double().sort(dim=0).values
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def _combined(states: Sequence[State], rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Apply a rule over the clients' axis [K, …] of every tensor, in float64; counters take their maximum."""
    result = {}
    for name, first in states[0].items():
        stacked = torch.stack([state[name] for state in states])
        result[name] = rule(stacked).to(first.dtype) if first.is_floating_point() else stacked.amax(dim=0)
    return result


AGGREGATORS: dict[str, Callable[[Sequence[State], Sequence[int]], dict[str, Tensor]]] = {
    "fedavg": fed_avg,
    "fedavg_uniform": fed_avg_uniform,
    "median": fed_median,
}


def is_finite(state: State) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
