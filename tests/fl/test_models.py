from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsweep.fl import LogisticRegression, ScalableCNN
from fedsweep.fl.models import MODELS, build_model, count_parameters, initialise
from fedsweep.plan.experiment import Experiment

MNIST = {"num_classes": 10, "in_channels": 1, "img_size": 28}
CIFAR = {"num_classes": 10, "in_channels": 3, "img_size": 32}


def kinds(model: ScalableCNN | LogisticRegression) -> list[type[nn.Module]]:
    return [type(layer) for layer in model.layers]


@pytest.mark.parametrize(
    ("model_type", "data", "width", "depth", "expected"),
    [
        ("cnn", MNIST, 1, 16, 212),
        ("cnn", MNIST, 4, 1, 31_418),
        ("cnn", CIFAR, 64, 64, 2_337_098),
        ("lr", MNIST, 4, 4, 3_282),
        ("lr", MNIST, 4, 0, 7_850),  # 784 * 10 + 10: logistic regression proper
        ("cnn", CIFAR, 4, 0, 30_730),  # 3072 * 10 + 10: the same of colour images
    ],
)
def test_parameter_counts(model_type: str, data: dict[str, int], width: int, depth: int, expected: int) -> None:
    with torch.device("meta"):
        model = MODELS[model_type](width_factor=width, depth=depth, **data)
    assert count_parameters(model) == expected


def test_a_cnn_block_is_convolution_batch_norm_relu_with_a_pool_after_every_second() -> None:
    model = ScalableCNN(10, 3, 3, 2, 8)
    block = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds(model) == [*block, *block, nn.MaxPool2d, *block, nn.Flatten, nn.Linear]
    first, second = model.layers[0], model.layers[3]
    assert (first.in_channels, first.out_channels, first.kernel_size, first.padding) == (2, 3, (3, 3), (1, 1))
    assert first.bias is not None
    assert (second.in_channels, second.out_channels) == (3, 3)
    assert (model.layers[-1].in_features, model.layers[-1].out_features) == (3 * 4 * 4, 10)


def test_an_lr_block_is_linear_relu_batch_norm() -> None:
    model = LogisticRegression(10, 3, 2, 2, 8)
    block = [nn.Linear, nn.ReLU, nn.BatchNorm1d]
    assert kinds(model) == [nn.Flatten, *block, *block, nn.Linear]
    assert [layer.in_features for layer in model.layers if isinstance(layer, nn.Linear)] == [128, 3, 3]


@pytest.mark.parametrize(
    ("depth", "side", "pools", "last_side"),
    [
        (0, 28, 0, 28),
        (1, 28, 0, 28),
        (2, 28, 1, 14),
        (5, 28, 2, 7),
        (6, 28, 3, 3),  # 7 halves to 3
        (8, 28, 4, 1),
        (16, 28, 4, 1),  # no more of them at side 1
        (64, 32, 5, 1),
        (6, 8, 3, 1),
        (8, 8, 3, 1),
        (2, 1, 0, 1),
    ],
)
def test_pools_halve_the_side_until_it_is_one(depth: int, side: int, pools: int, last_side: int) -> None:
    model = ScalableCNN(10, 2, depth, 1, side)
    assert kinds(model).count(nn.MaxPool2d) == pools
    assert model.layers[-1].in_features == (2 if depth else 1) * last_side**2
    assert model.eval()(torch.zeros(2, 1, side, side)).shape == (2, 10)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_initial_weights_are_those_of_pytorch_bit_for_bit(model_type: str, depth: int) -> None:
    torch.manual_seed(123)
    theirs = MODELS[model_type](10, 5, depth, 3, 8)
    torch.manual_seed(999)
    ours = MODELS[model_type](10, 5, depth, 3, 8)
    for tensor in ours.state_dict().values():
        tensor.fill_(77)
    initialise(ours, torch.Generator().manual_seed(123))
    for layer in ours.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (layer.weight.tolist(), layer.bias.tolist()) == ([1.0] * 5, [0.0] * 5)
            assert (layer.running_mean.tolist(), layer.running_var.tolist()) == ([0.0] * 5, [1.0] * 5)
            assert layer.num_batches_tracked.item() == 0
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("model_type", MODELS)
def test_a_built_model_is_a_function_of_the_seed_alone(model_type: str) -> None:
    def build(**parameters: object) -> dict[str, torch.Tensor]:
        return build_model(Experiment(model_type=model_type, **parameters), 10, 3, 8).state_dict()

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    expected = build(seed=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert same(build(seed=1), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(build(seed=1, poison_ratio=0.5, aggregator="median", alpha=0.1, batch_size=7), expected)
    assert not same(build(seed=2), expected)


def test_initial_weights_keep_their_values() -> None:
    """Rows that were computed once must come out again."""
    model = build_model(Experiment(model_type="lr", depth=0, seed=42), 2, 1, 2)
    assert model.state_dict()["layers.1.weight"].flatten().tolist() == pytest.approx(
        [-0.2493934, 0.40147275, 0.15007603, 0.12279379, 0.33561361, -0.10758948, 0.06892449, 0.03761703],
        abs=1e-7,
    )


def test_a_model_works_at_depth_0_whatever_the_width() -> None:
    for model_type in MODELS:
        narrow = build_model(Experiment(model_type=model_type, depth=0, width_factor=1), 10, 1, 8).state_dict()
        wide = build_model(Experiment(model_type=model_type, depth=0, width_factor=64), 10, 1, 8).state_dict()
        assert all(torch.equal(narrow[name], wide[name]) for name in narrow | wide)
