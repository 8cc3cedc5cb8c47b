"""Models: sizes, pooling, and initial weights equal to PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsweep.fl import LogisticRegression, ScalableCNN
from fedsweep.fl.models import MODELS, build_model, count_parameters

MNIST = {"num_classes": 10, "in_channels": 1, "img_size": 28}
CIFAR = {"num_classes": 10, "in_channels": 3, "img_size": 32}


@pytest.mark.parametrize(
    ("kind", "data", "width", "depth", "count"),
    [
        ("cnn", MNIST, 1, 16, 212),
        ("cnn", MNIST, 4, 1, 31_418),
        ("cnn", CIFAR, 64, 64, 2_337_098),
        ("lr", MNIST, 4, 4, 3_282),
        ("lr", MNIST, 4, 0, 7_850),  # 784 * 10 + 10: logistic regression proper
    ],
)
def test_parameter_counts(kind, data, width, depth, count):
    with torch.device("meta"):
        assert count_parameters(MODELS[kind](width_factor=width, depth=depth, **data)) == count


@pytest.mark.parametrize(("depth", "pools"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (8, 4), (10, 4), (16, 4)])
def test_a_pool_after_every_second_block_while_the_side_is_above_one(depth, pools):
    model = ScalableCNN(width_factor=2, depth=depth, **MNIST)  # sides 28, 14, 7, 3, 1
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in model.features) == pools
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_order_of_layers_in_a_block():
    assert [type(layer) for layer in ScalableCNN(width_factor=2, depth=2, **MNIST).features] == [
        *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
        *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
        nn.MaxPool2d,
    ]
    layers = LogisticRegression(width_factor=2, depth=1, **MNIST).features
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.BatchNorm1d]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_initial_weights_are_those_of_pytorch_bit_for_bit(kind, depth):
    torch.manual_seed(11)
    theirs = MODELS[kind](width_factor=5, depth=depth, **CIFAR).state_dict()
    ours = build_model(
        kind, width_factor=5, depth=depth, generator=torch.Generator().manual_seed(11), **CIFAR
    ).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_building_a_model_leaves_global_random_state_alone():
    before = torch.get_rng_state()
    build_model("cnn", width_factor=2, depth=2, generator=torch.Generator().manual_seed(1), **MNIST)
    assert torch.equal(before, torch.get_rng_state())
