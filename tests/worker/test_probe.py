"""The estimate of a sweep's cost: its arithmetic by hand, and what it says of what it left out. No speed is tested."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fedsweep.fl.data import ImageData
from fedsweep.plan.experiment import Experiment
from fedsweep.worker import probe as probe_module
from fedsweep.worker.probe import Cost, Estimate, Shape, multiply_adds, probe, seconds_of, shape_of

TINY = Experiment(model_type="lr", width_factor=2, depth=0, num_clients=2, global_rounds=1)


def images(train: int = 100, test: int = 20, channels: int = 1, side: int = 8) -> ImageData:
    return ImageData(
        "made up",
        torch.zeros(train, channels, side, side, dtype=torch.uint8),
        torch.zeros(train, dtype=torch.int64),
        torch.zeros(test, channels, side, side, dtype=torch.uint8),
        torch.zeros(test, dtype=torch.int64),
        10,
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes that are timed; each costs a second a step, and nothing else."""
    shapes: list[Shape] = []

    def measure(experiment: Experiment, data: ImageData) -> Cost:
        shapes.append(shape_of(experiment))
        return Cost(setup=0.0, client=0.0, step=1.0, image=0.0)

    monkeypatch.setattr(probe_module, "measure", measure)
    return shapes


def test_the_time_of_an_experiment_by_hand():
    """1,000 images, 100 of them for validation; half of 10 clients train on 90 each, in 3 rounds of 2 epochs."""
    experiment = Experiment(
        num_clients=10, fraction_fit=0.5, batch_size=30, local_epochs=2, global_rounds=3, validation_split=0.1
    )
    # A client has 3 batches of an epoch and half a one more on average: 5 x 2 x 3.5 steps a round.
    expected = 7.0 + 3 * (5 * 0.5 + 35 * 0.01 + 100 * 0.001) + 200 * 0.001
    cost = Cost(setup=7.0, client=0.5, step=0.01, image=0.001)
    assert seconds_of(experiment, images(1000, 200), cost) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "data", "expected"),
    [
        (Shape("", "lr", 4, 0, 32), images(side=28), 784 * 10),
        (Shape("", "lr", 4, 2, 32), images(side=28), 784 * 4 + 4 * 4 + 4 * 10),
        (Shape("", "cnn", 8, 0, 32), images(channels=3, side=4), 3 * 16 * 10),
        (Shape("", "cnn", 8, 1, 32), images(side=28), 9 * 8 * 784 + 8 * 784 * 10),
        # Pooled after the second block: 28 -> 14.
        (Shape("", "cnn", 4, 3, 32), images(side=28), 9 * 4 * 784 + 9 * 16 * 784 + 9 * 16 * 196 + 4 * 196 * 10),
    ],
)
def test_multiply_adds_by_hand(shape, data, expected):
    assert multiply_adds(shape, data) == expected


def test_every_shape_is_timed_once_and_the_whole_is_the_sum(measured):
    wide = TINY.model_copy(update={"width_factor": 8, "depth": 1})
    experiments = [TINY, wide, TINY.model_copy(update={"seed": 2, "poison_ratio": 0.5, "aggregator": "median"})]
    estimate = probe(experiments, device="cpu")
    # Digits: 1,437 training images less a tenth; 2 clients; batches of 32.
    seconds = 1437 * 0.9 / 32 + 1
    assert sorted(map(str, measured)) == ["digits lr w2 d0 batch 32", "digits lr w8 d1 batch 32"]
    assert estimate == Estimate(
        seconds=pytest.approx(3 * seconds),
        device="cpu",
        seconds_per_experiment={
            "digits lr w2 d0 batch 32": pytest.approx(seconds),
            "digits lr w8 d1 batch 32": pytest.approx(seconds),
        },
        notes=(),
    )


def test_the_most_work_is_timed_first_and_the_rest_follows_from_it(measured):
    small, large = ({"width_factor": width, "depth": 1} for width in (4, 64))
    cnn = {"model_type": "cnn", "width_factor": 64, "depth": 2}
    estimate = probe([TINY.model_copy(update=update) for update in (small, large, cnn)], device="cpu", budget_s=-1)
    assert [str(shape) for shape in measured] == ["digits cnn w64 d2 batch 32"]
    assert estimate.notes == (
        "1 of 3 shapes were timed, in -1 s; the others are estimated from them by their multiply-adds.",
    )
    seconds = estimate.seconds_per_experiment
    ratio = (64 * 4 + 4 * 10) / (64 * 64 + 64 * 10)
    assert seconds["digits lr w4 d1 batch 32"] == pytest.approx(ratio * seconds["digits lr w64 d1 batch 32"])
    assert seconds["digits lr w64 d1 batch 32"] < seconds["digits cnn w64 d2 batch 32"] / 10


def test_a_data_set_that_cannot_be_had_is_left_out_and_named(tmp_path):
    missing = TINY.model_copy(update={"dataset": "parquet:nowhere"})
    estimate = probe([TINY, missing, missing], tmp_path, "cpu")
    assert estimate.seconds is not None
    assert list(estimate.seconds_per_experiment) == ["digits lr w2 d0 batch 32"]
    (note,) = estimate.notes
    assert note.startswith("2 experiments on parquet:nowhere are not in the estimate: ")
    assert probe([missing], tmp_path, "cpu").seconds is None


def test_a_real_probe_is_positive_and_can_be_sent_as_json():
    """Also where the batch is larger than the time allows, or than the data set."""
    shapes = [
        TINY,
        *(TINY.model_copy(update=update) for update in ({"model_type": "cnn", "depth": 3}, {"batch_size": 5000})),
    ]
    estimate = probe(shapes, device="cpu")
    assert len(estimate.seconds_per_experiment) == 3
    assert all(0 < seconds < 60 for seconds in estimate.seconds_per_experiment.values())
    assert json.loads(json.dumps(dataclasses.asdict(estimate)))["device"] == "cpu"


@pytest.mark.parametrize(
    ("timed", "images", "expected"),
    [([(2, 0.5)], 32, 8.0), ([(2, 9.0), (8, 1.0), (32, 2.0)], 128, 6.0), ([(2, 1.0), (8, 0.5)], 32, 0.5)],
)
def test_times_are_read_off_a_line(timed, images, expected):
    assert probe_module._at(images, timed) == pytest.approx(expected)


def test_growing_stops_when_the_time_is_up(monkeypatch):
    """A size is begun only if three runs of it fit; the second size always, unless it is far too slow."""
    clock = [0.0]
    monkeypatch.setattr(probe_module.time, "monotonic", lambda: clock[0])

    def run(images: int) -> float:
        clock[0] += images * 0.001
        return images * 0.001

    assert [size for size, _ in probe_module._growing(run, 1000, deadline=1.0)] == [2, 8, 32, 128]
    clock[0] = 0.0
    assert [size for size, _ in probe_module._growing(run, 20, deadline=1.0)] == [2, 8, 20]
    clock[0] = 0.0
    assert [size for size, _ in probe_module._growing(run, 1000, deadline=0.0)] == [2, 8]
    assert [size for size, _ in probe_module._growing(lambda images: run(100 * images), 1000, deadline=0.0)] == [2]
