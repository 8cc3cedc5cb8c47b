"""The models of a sweep: a CNN and a multilayer perceptron, scaled by width and depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ScalableCNN(nn.Module):
    """`depth` blocks of 3x3 convolution, batch norm and ReLU with `width_factor` channels, then a linear layer.

    A 2x2 max-pool follows every second block while the side is above 1. Input [B, C, S, S], output logits [B, L].
    """

    def __init__(self, num_classes: int, width_factor: int, depth: int, in_channels: int, img_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = in_channels, img_size
        for block in range(1, depth + 1):
            layers += [nn.Conv2d(channels, width_factor, 3, padding=1), nn.BatchNorm2d(width_factor), nn.ReLU()]
            channels = width_factor
            if block % 2 == 0 and side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, L] of images [B, C, S, S]."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


class LogisticRegression(nn.Module):
    """`depth` blocks of linear, ReLU and batch norm with `width_factor` units, then a linear layer.

    With depth 0 it is logistic regression proper. Input [B, C, S, S], output logits [B, L].
    """

    def __init__(self, num_classes: int, width_factor: int, depth: int, in_channels: int, img_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        units = in_channels * img_size * img_size
        for _ in range(depth):
            layers += [nn.Linear(units, width_factor), nn.ReLU(), nn.BatchNorm1d(width_factor)]
            units = width_factor
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(units, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, L] of images [B, C, S, S]."""
        logits: Tensor = self.classifier(self.features(images.flatten(1)))
        return logits


MODELS: dict[str, type[ScalableCNN] | type[LogisticRegression]] = {"cnn": ScalableCNN, "lr": LogisticRegression}


def build_model(
    model_type: str,
    *,
    num_classes: int,
    width_factor: int,
    depth: int,
    in_channels: int,
    img_size: int,
    generator: torch.Generator,
) -> nn.Module:
    """A model with PyTorch's default initial weights, drawn from `generator`; global random state is left alone."""
    with torch.device("meta"):  # on this device building a layer draws nothing
        model = MODELS[model_type](num_classes, width_factor, depth, in_channels, img_size)
    model = model.to_empty(device="cpu")
    initialise(model, generator)
    return model


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights as PyTorch's layers do by default, in the order of the layers.

    Linear and convolution: weight and bias uniform within ± 1/sqrt(fan_in), which is what `kaiming_uniform_` with
    a = sqrt(5) comes to. Batch norm: weight and variance 1, bias and mean 0.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                bound = 1 / math.sqrt(layer.weight[0].numel())
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable weights."""
    return sum(parameter.numel() for parameter in model.parameters())
