"""The models of the benchmark as plain `nn.Module`s, with the names of tensors that the initial weights have.

The same as `fedsweep.fl.models` builds, written again: no peer imports fedsweep.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from workload import Settings, State


class Classifier(nn.Module):
    """Images [B, C, S, S] to logits [B, L]."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def build(settings: Settings) -> Classifier:
    """The model, with PyTorch's own initial weights."""
    return Classifier(_cnn(settings) if settings.model_type == "cnn" else _lr(settings))


def _cnn(settings: Settings) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels, side = settings.in_channels, settings.img_size
    for block in range(1, settings.depth + 1):
        layers.append(nn.Conv2d(channels, settings.width, kernel_size=3, padding=1))
        layers += [nn.BatchNorm2d(settings.width), nn.ReLU(inplace=True)]
        channels = settings.width
        if block % 2 == 0 and side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return [*layers, nn.Flatten(), nn.Linear(channels * side * side, settings.num_classes)]


def _lr(settings: Settings) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    units = settings.in_channels * settings.img_size**2
    for _ in range(settings.depth):
        layers += [nn.Linear(units, settings.width), nn.ReLU(inplace=True), nn.BatchNorm1d(settings.width)]
        units = settings.width
    return [*layers, nn.Linear(units, settings.num_classes)]


def tensors(state: State) -> dict[str, Tensor]:
    """A state dict of arrays as one of tensors of its own."""
    copies = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    return {
        name: copy.to(torch.get_default_dtype()) if copy.is_floating_point() else copy for name, copy in copies.items()
    }


def arrays(state: Mapping[str, Tensor]) -> State:
    """A state dict of tensors as one of arrays of its own."""
    return {name: np.array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in state.items()}


def normalised(images: Tensor) -> Tensor:
    """Bytes as numbers from -1 to 1, rounded to float32 whatever they are then used as."""
    return images.to(torch.float32).div_(255).sub_(0.5).mul_(2).to(torch.get_default_dtype())


def combine(aggregator: str, states: list[Mapping[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """`fedavg` (by sample counts) or `median` (mean of the two middle values) of state dicts, tensor by tensor."""
    total = sum(sizes)
    combined = {}
    for name, first in states[0].items():
        stacked = torch.stack([state[name] for state in states])
        if not first.is_floating_point():
            combined[name] = stacked.amax(dim=0)
        elif aggregator == "median":
            combined[name] = middle(stacked)
        else:
            shares = torch.tensor(sizes, dtype=torch.float64).div_(total).to(first.dtype)
            combined[name] = torch.tensordot(shares, stacked, dims=1)
    return combined


def middle(stacked: Tensor) -> Tensor:
    """The median along the first axis, [K, …]."""
    ordered, count = stacked.sort(dim=0).values, len(stacked)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def versions() -> dict[str, str]:
    """Of what these peers are made of."""
    return {"torch": torch.__version__, "numpy": np.__version__}
