"""The models of a sweep: a CNN and a multilayer perceptron, scaled in width and depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedsweep.fl.streams import stream, words
from fedsweep.plan.experiment import Experiment


class ScalableCNN(nn.Module):
    """`depth` blocks of [3x3 convolution, batch norm, ReLU] with `width_factor` channels, then a linear layer.

    A 2x2 max-pool follows every second block while the side is above 1. Images [B, C, S, S] to logits [B, L].
    """

    def __init__(self, num_classes: int, width_factor: int, depth: int, in_channels: int, img_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = in_channels, img_size
        for block in range(1, depth + 1):
            layers.append(nn.Conv2d(channels, width_factor, kernel_size=3, padding=1))
            layers.append(nn.BatchNorm2d(width_factor))
            layers.append(nn.ReLU(inplace=True))
            channels = width_factor
            if block % 2 == 0 and side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, L] of images [B, C, S, S]."""
        logits: Tensor = self.layers(images)
        return logits


class LogisticRegression(nn.Module):
    """`depth` blocks of [linear, ReLU, batch norm] with `width_factor` units, then a linear layer.

    With depth 0 it is logistic regression proper. Images [B, C, S, S] to logits [B, L].
    """

    def __init__(self, num_classes: int, width_factor: int, depth: int, in_channels: int, img_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        units = in_channels * img_size * img_size
        for _ in range(depth):
            layers.append(nn.Linear(units, width_factor))
            layers.append(nn.ReLU(inplace=True))
            layers.append(nn.BatchNorm1d(width_factor))
            units = width_factor
        self.layers = nn.Sequential(*layers, nn.Linear(units, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, L] of images [B, C, S, S]."""
        logits: Tensor = self.layers(images)
        return logits


MODELS: dict[str, type[ScalableCNN] | type[LogisticRegression]] = {"cnn": ScalableCNN, "lr": LogisticRegression}


def build_model(experiment: Experiment, num_classes: int, in_channels: int, img_size: int) -> nn.Module:
    """The experiment's model on the CPU, with the initial weights that its seed gives."""
    with torch.device("meta"):  # there, building a layer draws no random numbers
        model: nn.Module = MODELS[experiment.model_type](
            num_classes, experiment.width_factor, experiment.depth, in_channels, img_size
        )
    model = model.to_empty(device="cpu")
    # The Mersenne Twister keeps the low 32 bits of its seed, so that is how many initial models there are.
    initialise(model, torch.Generator().manual_seed(int(words(stream(experiment.seed, "init"), 1)[0])))
    # A matter of memory layout only: on a CPU, convolutions of larger images are faster so.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from PyTorch's annotations
    return model


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every layer the weights that PyTorch's constructors would, drawn from `generator` alone.

    Linear and convolution: weights and bias uniform within ± 1 / sqrt(fan_in). Batch norm: scale and variance 1, shift
    and mean 0. Layers are drawn in the order in which they were added to the model.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)  # bound is 1 / sqrt(fan_in)
            if layer.bias is not None:
                bound = 1 / math.sqrt(layer.weight[0].numel())
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_parameters()  # draws nothing


def count_parameters(model: nn.Module) -> int:
    """Number of trainable weights."""
    return sum(parameter.numel() for parameter in model.parameters())
