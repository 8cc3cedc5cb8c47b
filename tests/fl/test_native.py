"""The compiled kernels: shapes at the edges, and the same bits however lanes are tiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsweep.fl.aggregate import AGGREGATORS
from fedsweep.fl.data import ImageData
from fedsweep.fl.engine import Cohort
from fedsweep.fl.lanes import ClientWork, LaneInputs, ModelShape
from fedsweep.fl.loop import LoopTrainer
from fedsweep.fl.native import NativeTrainer, lane_counts, tiles
from fedsweep.fl.reference import initial_model
from fedsweep.plan.experiment import Experiment

Kernels = Callable[[torch.dtype], ctypes.CDLL]
DOUBLE_LANES = 8  # that fill a vector of doubles


@given(st.integers(1, 500), st.sampled_from([1, 2, 4, 8, 16]))
def test_tiles_hold_every_lane_and_are_a_quarter_empty_at_most(lanes: int, most: int) -> None:
    sizes = tiles(lanes, most)
    assert all(size in (1, 2, 4, 8, 16) and size <= most for size in sizes)
    assert lanes <= sum(sizes)
    assert sum(sizes) - lanes <= sizes[-1] // 4


def test_a_convolution_has_as_many_lanes_as_its_channels_leave_room_for() -> None:
    def counts(model_type: str, width: int, depth: int, vector_length: int = 16) -> list[int]:
        return lane_counts(ModelShape(model_type, width, depth, 10, 1, 8), vector_length)

    assert counts("cnn", 4, 2) == [1, 2, 4, 8, 16]
    assert counts("cnn", 16, 2) == [1, 2, 4]
    assert counts("cnn", 64, 2) == [1]
    assert counts("cnn", 65, 2) == []
    assert counts("cnn", 65, 0) == counts("lr", 4096, 3) == [1, 2, 4, 8, 16]
    assert counts("cnn", 16, 2, vector_length=8) == [1, 2]


def trained(experiments: list[Experiment], data: ImageData, trainer: object, dtype: torch.dtype) -> torch.Tensor:
    """The global models [E, P] after a round."""
    cohort = Cohort(data, trainer, dtype)  # type: ignore[arg-type]
    for place, experiment in enumerate(experiments):
        cohort.join(str(place), experiment)
    cohort.train_round()
    layout = ModelShape.of(experiments[0], data).layout
    return torch.stack([layout.flatten(cohort.weights(name)) for name in cohort.names])


EDGES = [
    {"model_type": "cnn", "width_factor": 3, "depth": 5},  # pools down to one pixel, then blocks without pooling
    {"model_type": "cnn", "width_factor": 1, "depth": 2},
    {"model_type": "cnn", "width_factor": 17, "depth": 3},  # 17 channels: three vectors of doubles, half empty
    {"model_type": "cnn", "width_factor": 32, "depth": 5},  # wide enough for convolutions of transformed tiles
    {"model_type": "lr", "width_factor": 1, "depth": 1},
    {"model_type": "lr", "width_factor": 70, "depth": 3},  # several blocks of columns
    {"model_type": "lr", "width_factor": 9, "depth": 9},
]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("classes", "channels", "side"), [(10, 1, 7), (3, 3, 5), (101, 2, 4)])
def test_shapes_at_the_edges(
    edge: dict[str, object],
    classes: int,
    channels: int,
    side: int,
    random_data: Callable[..., ImageData],
    kernels: Kernels,
) -> None:
    data = random_data(num_classes=classes, channels=channels, side=side, train=260)
    experiments = [
        Experiment(num_clients=3, batch_size=16, local_epochs=2, poison_ratio=ratio, lr=0.01 + ratio / 10, **edge)  # type: ignore[arg-type]
        for ratio in (0.0, 0.1, 0.2, 0.3, 0.4)
    ]
    expected = trained(experiments, data, LoopTrainer(experiments[0], data, dtype=torch.float64), torch.float64)
    library = kernels(torch.float64)
    for lanes in lane_counts(ModelShape.of(experiments[0], data), DOUBLE_LANES):
        found = trained(experiments, data, NativeTrainer(experiments[0], data, library, 2, lanes), torch.float64)
        assert float((found - expected).norm() / expected.norm()) < 1e-9


def test_wide_convolutions_of_large_images(random_data: Callable[..., ImageData], kernels: Kernels) -> None:
    """Images of so many tiles that they are transformed in several pieces, the last one smaller, and an odd side."""
    data = random_data(side=31, train=40)
    experiment = Experiment(
        model_type="cnn", width_factor=32, depth=2, num_clients=2, batch_size=8, partition="iid", lr=0.01
    )
    exact = trained([experiment], data, LoopTrainer(experiment, data, dtype=torch.float64), torch.float64)
    found = trained([experiment], data, NativeTrainer(experiment, data, kernels(torch.float64)), torch.float64)
    assert float((found - exact).norm() / exact.norm()) < 1e-12
    plain = trained([experiment], data, LoopTrainer(experiment, data), torch.float32)
    ours = trained([experiment], data, NativeTrainer(experiment, data, kernels(torch.float32)), torch.float32)
    assert float((ours - exact).norm()) < 2 * float((plain - exact).norm())


@pytest.mark.parametrize("edge", [*EDGES, {"model_type": "cnn", "width_factor": 4, "depth": 4}])
def test_neither_tiles_nor_threads_change_a_bit(edge: dict[str, object], digits: ImageData, kernels: Kernels) -> None:
    experiments = [
        Experiment(poison_ratio=ratio, aggregator=rule, num_clients=4, **edge)  # type: ignore[arg-type]
        for ratio in (0.1, 0.2, 0.3)
        for rule in ("fedavg", "median", "fedavg_uniform")
    ]
    library = kernels(torch.float32)
    found = [
        trained(experiments, digits, NativeTrainer(experiments[0], digits, library, threads, lanes), torch.float32)
        for lanes in lane_counts(ModelShape.of(experiments[0], digits), 16)
        for threads in (1, 3)
    ]
    assert all(torch.equal(found[0], other) for other in found)


def test_each_work_says_how_many_epochs_it_has(digits: ImageData, kernels: Kernels) -> None:
    """A piece of a round that is timed may have fewer than the experiment."""
    experiment = Experiment(model_type="lr", local_epochs=5)
    row = initial_model(experiment, digits).state_dict()
    weights = ModelShape.of(experiment, digits).layout.flatten(row)[None]
    one = torch.ones(1, dtype=torch.float64)
    inputs = LaneInputs(weights, digits.train_labels[None], 0.01 * one, 0.9 * one, 0 * one, one)
    orders = [np.arange(epochs * samples).reshape(epochs, samples) for epochs, samples in ((1, 40), (3, 70), (2, 33))]
    works = [ClientWork.of((0,), (slot,), order) for slot, order in enumerate(orders)]
    expected = LoopTrainer(experiment, digits).train(inputs, works, 3)
    found = NativeTrainer(experiment, digits, kernels(torch.float32)).train(inputs, works, 3)
    assert found.finite.all()
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-3, atol=1e-4)


def test_a_batch_of_one_is_no_step(random_data: Callable[..., ImageData], kernels: Kernels) -> None:
    data = random_data(train=60)
    experiment = Experiment(model_type="lr", num_clients=3, batch_size=17, partition="iid", validation_split=0.1)
    expected = trained([experiment], data, LoopTrainer(experiment, data), torch.float32)  # 18 samples: 17 and 1
    found = trained([experiment], data, NativeTrainer(experiment, data, kernels(torch.float32)), torch.float32)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [5, 1024, 2500])
def test_the_mean_of_clients_has_the_bits_of_the_plain_one(
    size: int, threads: int, digits: ImageData, kernels: Kernels
) -> None:
    trainer = NativeTrainer(Experiment(model_type="lr"), digits, kernels(torch.float32), threads)
    clients = torch.randn(3, 7, size, generator=torch.Generator().manual_seed(size))
    counts = [1, 17, 6000, 3, 54, 999, 12345]
    states = [{"w": clients[:, client]} for client in range(7)]
    for name, aggregate in trainer.aggregators.items():
        assert torch.equal(aggregate(clients, counts), AGGREGATORS[name](states, counts)["w"])


@pytest.mark.parametrize("shape", [{"model_type": "lr", "depth": 1}, {"model_type": "cnn", "depth": 2}])
def test_clients_whose_numbers_are_not_finite_are_told(
    shape: dict[str, object], digits: ImageData, kernels: Kernels
) -> None:
    """The lanes beside them are not blamed."""
    rates = [0.01, 1e30, 0.02]
    experiments = [Experiment(lr=rate, max_grad_norm=None, num_clients=4, **shape) for rate in rates]  # type: ignore[arg-type]
    trainer = NativeTrainer(experiments[0], digits, kernels(torch.float32), 2, 4)
    cohort = Cohort(digits, trainer)
    for name, experiment in enumerate(experiments):
        cohort.join(str(name), experiment)
    assert [lost for _, lost in cohort.train_round()] == [0, None, 0]


def test_models_are_applied_as_the_reference_applies_them(
    random_data: Callable[..., ImageData], kernels: Kernels
) -> None:
    data = random_data(side=7, channels=3, test=1100)
    for model_type in ("lr", "cnn"):
        experiment = Experiment(model_type=model_type, depth=3, num_clients=3)
        native = NativeTrainer(experiment, data, kernels(torch.float32), 2, 8)
        weights = trained(
            [experiment.model_copy(update={"seed": seed}) for seed in range(11)], data, native, torch.float32
        )
        expected = LoopTrainer(experiment, data).logits(weights, data.test_images)
        torch.testing.assert_close(native.logits(weights, data.test_images), expected, rtol=1e-4, atol=1e-5)
