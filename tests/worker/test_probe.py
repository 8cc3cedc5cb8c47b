"""The estimate of a sweep's cost: its arithmetic by hand, and what it says of what it left out. No speed is tested."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fedsweep.fl.data import ImageData
from fedsweep.plan.experiment import Experiment
from fedsweep.worker import probe as probe_module
from fedsweep.worker.probe import Cost, Group, arithmetic, probe, seconds_of
from fedsweep.worker.room import bytes_per_experiment

TINY = Experiment(model_type="lr", width_factor=2, depth=0, num_clients=2, global_rounds=1)
NOTHING = Cost(division=0.0, setup=0.0, order=0.0, aggregation=0.0, trained=0.0, evaluated=0.0)


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
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cohorts that are timed; each costs a second an image trained on, and nothing else."""
    names: list[str] = []

    def measure(group: Group, data: ImageData, threads: int) -> tuple[Cost, str]:
        names.append(str(group))
        return dataclasses.replace(NOTHING, trained=1.0), "loop"

    monkeypatch.setattr(probe_module, "measure", measure)
    return names


EXPERIMENT = Experiment(num_clients=10, fraction_fit=0.5, local_epochs=2, global_rounds=3, validation_split=0.1)
PIECES = [
    ("division", 1.0),  # for both
    ("setup", 2.0),
    ("order", 3.0 * 5),  # 3 rounds of 5 clients, for both
    ("aggregation", 2 * 3.0),
    ("trained", 2 * 3.0 * 5 * 2 * 90),  # 3 rounds, 5 clients, 2 epochs, 90 images each
    ("evaluated", 2 * (3 * 100 + 200.0)),  # 100 of 1,000 images are for validation; 200 are tested on
]


@pytest.mark.parametrize(("piece", "seconds"), PIECES)
def test_the_time_of_a_cohort_by_hand(piece, seconds):
    """Two experiments that differ in the learning rate alone divide and order their images alike."""
    pair = Group((EXPERIMENT, EXPERIMENT.model_copy(update={"lr": 0.5})), "batched")
    cost = dataclasses.replace(NOTHING, **{piece: 1.0})
    assert seconds_of(pair, images(1000, 200), cost) == pytest.approx(seconds)


def test_experiments_that_share_nothing_divide_and_order_for_themselves():
    pair = Group((EXPERIMENT, EXPERIMENT.model_copy(update={"seed": 7})), "batched")
    data = images(1000, 200)
    assert seconds_of(pair, data, dataclasses.replace(NOTHING, division=1.0)) == 2
    assert seconds_of(pair, data, dataclasses.replace(NOTHING, order=1.0)) == 2 * 15


def test_every_cohort_is_timed_once_and_the_whole_is_the_sum(measured):
    wide = TINY.model_copy(update={"width_factor": 8, "depth": 1})
    experiments = [TINY, wide, TINY.model_copy(update={"seed": 2, "poison_ratio": 0.5, "aggregator": "median"})]
    estimate = probe(experiments, device="cpu", threads=3)
    # Digits: 1,437 training images less a tenth; 2 clients.
    seconds = 2 * ((1437 - 144) // 2)
    names = ["digits lr w8 d1 batch 32, 2 clients, 1 epoch", "digits lr w2 d0 batch 32, 2 clients, 1 epoch"]
    assert sorted(measured) == sorted(names)
    assert estimate.seconds == pytest.approx(3 * seconds)
    assert estimate.seconds_per_experiment == {name: pytest.approx(seconds) for name in names}
    assert estimate.experiments_per_hour == pytest.approx(3600 / seconds)
    assert (estimate.device, estimate.threads, estimate.notes) == ("cpu", 3, ())
    assert {each.name: (each.experiments, each.plan) for each in estimate.cohorts} == {
        names[0]: (1, "loop"),
        names[1]: (2, "loop"),
    }


def test_what_differs_in_cohort_or_engine_is_timed_for_itself(measured):
    updates = [{}, {"num_clients": 3}, {"local_epochs": 2}, {"batch_size": 16}, {}]
    experiments = [TINY.model_copy(update=update) for update in updates]
    estimate = probe(experiments, device="cpu", engines=["batched"] * 4 + ["reference"])
    assert len(measured) == len(estimate.cohorts) == 5
    assert "digits lr w2 d0 batch 32, 2 clients, 1 epoch, reference" in measured
    assert "digits lr w2 d0 batch 32, 2 clients, 2 epochs" in measured


def test_the_most_work_is_timed_first_and_the_rest_follows_from_it(measured):
    small, large = ({"width_factor": width, "depth": 1} for width in (4, 64))
    cnn = {"model_type": "cnn", "width_factor": 64, "depth": 2}
    experiments = [TINY.model_copy(update=update) for update in (small, large, cnn)]
    estimate = probe(experiments, device="cpu", budget_s=-1)
    assert measured == ["digits cnn w64 d2 batch 32, 2 clients, 1 epoch"]
    assert estimate.notes == (
        "1 of 3 shapes were timed, in -1 s; the others are estimated from them by their arithmetic.",
    )
    assert [each.plan for each in estimate.cohorts] == ["loop", None, None]
    seconds = [each.seconds_per_experiment for each in estimate.cohorts]  # the cnn, the large one, the small one
    ratios = [arithmetic(each, images()) for each in reversed(experiments)]
    assert seconds[1] / seconds[2] == pytest.approx(ratios[1] / ratios[2])
    assert seconds[0] / seconds[1] == pytest.approx(ratios[0] / ratios[1])
    assert seconds[1] < seconds[0] / 10


def test_memory_is_that_of_all_that_train_together(measured, monkeypatch):
    monkeypatch.setattr(probe_module, "_base_memory", lambda *_: 1_000_000)
    experiments = [TINY.model_copy(update={"seed": seed}) for seed in range(5)]
    estimate = probe(experiments, device="cpu", threads=1)
    each = bytes_per_experiment(TINY, images(1437, 360))
    assert estimate.cohorts[0].memory_bytes == 5 * each
    assert estimate.memory_bytes == 1_000_000 + 5 * each
    alone = probe(experiments, device="cpu", threads=1, engines=["reference"] * 5)
    assert alone.cohorts[0].memory_bytes == each


def test_a_data_set_that_cannot_be_had_is_left_out_and_named(tmp_path):
    missing = TINY.model_copy(update={"dataset": "parquet:nowhere"})
    estimate = probe([TINY, missing, missing], tmp_path, "cpu")
    assert estimate.seconds is not None
    assert list(estimate.seconds_per_experiment) == ["digits lr w2 d0 batch 32, 2 clients, 1 epoch"]
    (lacking,) = estimate.missing
    assert (lacking.dataset, lacking.experiments) == ("parquet:nowhere", 2)
    assert "nowhere" in lacking.reason
    nothing = probe([missing], tmp_path, "cpu")
    assert nothing.seconds is nothing.experiments_per_hour is nothing.memory_bytes is None


def test_a_real_probe_is_positive_and_can_be_sent_as_json():
    """Also where the batch is larger than the data set."""
    shapes = [
        TINY,
        *(TINY.model_copy(update=update) for update in ({"model_type": "cnn", "depth": 3}, {"batch_size": 5000})),
        TINY,
    ]
    estimate = probe(shapes, device="cpu", engines=["batched"] * 3 + ["reference"])
    assert len(estimate.seconds_per_experiment) == 4
    assert all(0 < seconds < 60 for seconds in estimate.seconds_per_experiment.values())
    assert [each.plan == "reference" for each in estimate.cohorts].count(True) == 1
    sent = json.loads(json.dumps(dataclasses.asdict(estimate)))
    assert sent["device"] == "cpu"
    assert all(each["memory_bytes"] > 0 and each["plan"] for each in sent["cohorts"])
