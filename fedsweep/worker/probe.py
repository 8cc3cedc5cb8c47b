"""What a sweep will cost: a few real training steps of each shape, scaled to the whole."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsweep.datasets import load_global_dataset
from fedsweep.errors import DataError
from fedsweep.fl.data import ImageData
from fedsweep.fl.evaluate import evaluate_model
from fedsweep.fl.reference import ClientDataloader, initial_model, train_client
from fedsweep.fl.streams import rounded
from fedsweep.plan.experiment import Experiment
from fedsweep.worker.runner import prepare_torch

SHAPE_BUDGET_S = 0.3  # of training steps, for one shape
STEPS = (2, 50)  # at least and at most, for one shape


@dataclass(frozen=True)
class Shape:
    """What decides the time of a training step."""

    dataset: str
    model_type: str
    width_factor: int
    depth: int
    batch_size: int


@dataclass(frozen=True)
class ShapeCost:
    """What one shape was measured to cost."""

    shape: Shape
    experiments: int
    step_s: float  # one training step
    image_s: float  # evaluating one image
    seconds: float  # all experiments of this shape, on one worker


@dataclass(frozen=True)
class Estimate:
    """What a sweep will cost on one worker."""

    seconds: float | None  # None where nothing could be measured
    device: str
    shapes: tuple[ShapeCost, ...]
    notes: tuple[str, ...]  # what was left out, and why


def probe(experiments: Sequence[Experiment], *, data_dir: Path | None = None, device: str = "auto") -> Estimate:
    """Estimate the time of experiments on one worker, without early stopping, by the reference engine."""
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    prepare_torch()
    costs, notes = [], []
    for name, count in Counter(experiment.dataset for experiment in experiments).items():
        try:
            data = load_global_dataset(name, data_dir).to(device)
        except DataError as error:
            notes.append(f"{count} experiments on {name} are not in the estimate: {error}")
            continue
        costs += _costs([each for each in experiments if each.dataset == name], data)
    seconds = sum(cost.seconds for cost in costs) if costs else None
    return Estimate(seconds, device, tuple(costs), tuple(notes))


def _costs(experiments: Sequence[Experiment], data: ImageData) -> list[ShapeCost]:
    groups: dict[Shape, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault(_shape(experiment), []).append(experiment)
    return [_cost(shape, members, data) for shape, members in groups.items()]


def _shape(experiment: Experiment) -> Shape:
    return Shape(
        experiment.dataset,
        experiment.model_type,
        experiment.width_factor,
        experiment.depth,
        experiment.batch_size,
    )


def _cost(shape: Shape, members: Sequence[Experiment], data: ImageData) -> ShapeCost:
    step_s, image_s = _measure(members[0], data)
    seconds = sum(_steps(each, data) * step_s + _images(each, data) * image_s for each in members)
    return ShapeCost(shape, len(members), step_s, image_s, seconds)


def _measure(experiment: Experiment, data: ImageData) -> tuple[float, float]:
    """Seconds of one training step, and of evaluating one image; the first of each is not counted."""
    model = initial_model(experiment, data).to(data.train_images.device)
    order = torch.arange(min(len(data.train_labels), experiment.batch_size), device=data.train_images.device)

    def train(steps: int) -> float:
        loader = ClientDataloader(data.train_images, data.train_labels, [order] * steps, experiment.batch_size)
        return _timed(lambda: train_client(model, loader, experiment))

    train(1)
    first = train(STEPS[0]) / STEPS[0]
    steps = max(STEPS[0], min(STEPS[1], int(SHAPE_BUDGET_S / first)))
    images = data.test_images[: experiment.batch_size], data.test_labels[: experiment.batch_size]
    evaluate_model(model, *images)
    return train(steps) / steps, _timed(lambda: evaluate_model(model, *images)) / len(images[1])


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _steps(experiment: Experiment, data: ImageData) -> float:
    """Training steps of an experiment that makes all its rounds."""
    samples = len(data.train_labels) * (1 - experiment.validation_split) * experiment.fraction_fit
    clients = max(1, rounded(experiment.fraction_fit, experiment.num_clients))
    # The last batch of each client is half full on average.
    epoch = samples / experiment.batch_size + clients / 2
    return epoch * experiment.local_epochs * experiment.global_rounds


def _images(experiment: Experiment, data: ImageData) -> float:
    """Images that are evaluated: the validation set in every round, and the test set once."""
    validation = len(data.train_labels) * experiment.validation_split
    return validation * experiment.global_rounds + len(data.test_labels)
