"""Which experiments train together, which of them see the same images, and what each is expected to cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedsweep.datasets import load_global_dataset
from fedsweep.fl.federation import epoch_orders, form_federation, participants
from fedsweep.fl.models import MODELS
from fedsweep.plan.cohort import (
    ELEMENTWISE,
    IMAGE_FORMATS,
    cohort_key,
    expected_cost,
    forward_cost,
    sharing_key,
)
from fedsweep.plan.experiment import DATASETS, Experiment

BASE = Experiment(dataset="digits", model_type="lr", width_factor=2, depth=1, num_clients=3, poison_ratio=0.4, seed=1)
SHAPES = {
    "dataset": "mnist",
    "model_type": "cnn",
    "width_factor": 8,
    "depth": 2,
    "batch_size": 64,
    "local_epochs": 2,
    "num_clients": 4,
}
FREE = {
    **{"seed": 2, "poison_ratio": 0.2, "poison_type": "random_noise", "poison_level": "client", "aggregator": "median"},
    **{"data_ordering": "good_bad", "alpha": 0.1, "partition": "iid", "min_client_size": 380, "fraction_fit": 0.5},
    **{"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "max_grad_norm": None, "early_stopping_patience": 2},
    **{"global_rounds": 3, "validation_split": 0.2, "min_delta": 0.1, "split_seed": 5, "partition_seed": 6},
}


def with_(**changes: object) -> Experiment:
    return Experiment(**{**BASE.model_dump(), **changes})


# ---- what trains together


def test_every_parameter_decides_the_shape_or_is_free():
    with_a_target = {"target_class", "poison_label"}
    assert {*SHAPES, *FREE} == set(Experiment.model_fields) - with_a_target
    targeted = with_(target_class=1, poison_label=2)
    assert cohort_key(targeted) == cohort_key(BASE)


@pytest.mark.parametrize("name", SHAPES)
def test_experiments_of_different_shapes_do_not_train_together(name):
    assert cohort_key(with_(**{name: SHAPES[name]})) != cohort_key(BASE)


@pytest.mark.parametrize("name", FREE)
def test_experiments_of_one_shape_train_together(name):
    assert cohort_key(with_(**{name: FREE[name]})) == cohort_key(BASE)


def test_width_decides_nothing_where_there_is_no_hidden_layer():
    assert cohort_key(with_(depth=0, width_factor=8)) == cohort_key(with_(depth=0)) != cohort_key(BASE)


def test_no_two_shapes_have_one_key_whatever_the_folder_is_called():
    one, other = with_(dataset="parquet:a|cnn"), with_(dataset="parquet:a%7Ccnn")
    assert cohort_key(one) != cohort_key(other)
    assert cohort_key(one).count("|") == len(SHAPES) - 1


def test_experiments_for_the_reference_engine_train_alone():
    keys = {cohort_key(with_(seed=seed), engine) for seed in (1, 2) for engine in ("batched", "reference")}
    assert len(keys) == 3
    assert sum(key.startswith("reference|") for key in keys) == 2


# ---- who sees the same images in the same order


DATA = load_global_dataset("digits")
VARIANTS = [
    *({name: value} for name, value in FREE.items()),
    {"alpha": 1},
    {"seed": 2, "partition_seed": 1},
    {"seed": 2, "split_seed": 1},
    {"partition_seed": 1, "split_seed": 1},
    {"partition": "iid", "alpha": 0.3},
    {"partition": "iid", "min_client_size": 3},
    {"partition": "dirichlet_client", "min_client_size": 3},
    {"data_ordering": "bad_good"},
    {"data_ordering": "good_bad", "poison_type": "random_noise"},
    {"data_ordering": "good_bad", "poison_ratio": 0.2},
    {"data_ordering": "good_bad", "poison_ratio": 0.0},
    {"data_ordering": "bad_good", "poison_ratio": 1.0},
    {"data_ordering": "good_bad", "poison_level": "client"},
    {"data_ordering": "good_bad", "target_class": 1, "poison_label": 2},
    {"data_ordering": "good_bad", "target_class": 1, "poison_label": 3},
    {"data_ordering": "good_bad", "target_class": 4, "poison_label": 3},
    {"data_ordering": "good_bad", "target_class": 1, "poison_label": 2, "poison_level": "client"},
    {"data_ordering": "good_bad", "lr": 0.1, "aggregator": "median"},
]


def what_is_seen(experiment: Experiment) -> list[list[int]]:
    """For each participant of the first round the positions of the images in the order in which it sees them."""
    federation = form_federation(experiment, DATA)
    seen = [federation.validation.tolist()]
    for client in participants(experiment, 1):
        own = federation.clients[client]
        orders = epoch_orders(experiment, federation.poisoning.poisoned[own], 1, client)
        seen.append([client, *own[np.concatenate(orders)].tolist()])
    return seen


def test_one_sharing_key_means_the_same_images_in_the_same_order():
    experiments = [BASE, *(with_(**changes) for changes in VARIANTS)]
    seen = [what_is_seen(experiment) for experiment in experiments]
    keys = [sharing_key(experiment) for experiment in experiments]
    for one, its_key in zip(seen, keys, strict=True):
        assert [other == one for other in seen] == [key == its_key for key in keys]


# ---- what it costs


def counted(model: nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """Multiply-adds of convolutions and linear layers, and activations that batch norm goes over, in a real pass."""
    products, activations = [], [images.numel()]

    def note(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            products.append(layer.weight[0].numel() * output.numel())
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            activations.append(output.numel())

    for layer in model.modules():
        layer.register_forward_hook(note)
    model.eval()(images)
    return sum(products), sum(activations)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(("width_factor", "depth"), [(1, 0), (4, 1), (4, 2), (3, 5), (1, 16)])
@pytest.mark.parametrize(("in_channels", "img_size", "num_classes"), [(1, 28, 10), (3, 32, 100)])
def test_the_cost_of_an_image_is_what_a_model_does(model_type, width_factor, depth, in_channels, img_size, num_classes):
    model = MODELS[model_type](num_classes, width_factor, depth, in_channels, img_size)
    products, activations = counted(model, torch.zeros(1, in_channels, img_size, img_size))
    cost = forward_cost(
        model_type, width_factor, depth, in_channels=in_channels, img_size=img_size, num_classes=num_classes
    )
    assert cost == products + ELEMENTWISE * activations


def test_costs_grow_with_the_work():
    cost = expected_cost(BASE)
    assert expected_cost(with_(global_rounds=20)) == pytest.approx(2 * cost)
    assert expected_cost(with_(local_epochs=2)) == pytest.approx(cost * (2 * 3 * 0.9 + 0.1) / (3 * 0.9 + 0.1))
    assert expected_cost(with_(fraction_fit=0.5)) == pytest.approx(cost * (0.5 * 3 * 0.9 + 0.1) / (3 * 0.9 + 0.1))
    assert expected_cost(with_(fraction_fit=0.01)) == expected_cost(with_(fraction_fit=1 / 3))  # one client at least
    assert cost < expected_cost(with_(width_factor=4)) < expected_cost(with_(model_type="cnn", width_factor=4))
    assert expected_cost(with_(dataset="mnist")) > 40 * cost
    assert expected_cost(with_(aggregator="median", seed=9, poison_ratio=0.0)) == cost


def test_experiments_with_one_signature_cost_the_same_and_share():
    one, other = with_(depth=0, width_factor=64, partition="iid", alpha=3), with_(depth=0, partition="iid")
    assert one.signature == other.signature
    assert (expected_cost(one), sharing_key(one)) == (expected_cost(other), sharing_key(other))


def test_every_named_data_set_has_its_sizes_and_a_folder_is_taken_for_a_usual_one():
    assert set(IMAGE_FORMATS) == set(DATASETS)
    digits = IMAGE_FORMATS["digits"]
    assert (digits.train_images, digits.in_channels, digits.img_size, digits.num_classes) == (
        *(len(DATA.train_labels), DATA.in_channels, DATA.img_size, DATA.num_classes),
    )
    assert expected_cost(with_(dataset="parquet:somewhere")) > expected_cost(BASE)
