"""What a sweep will cost: a few real training steps of each shape, scaled to the whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsweep.datasets import load_global_dataset
from fedsweep.errors import DataError
from fedsweep.fl.aggregate import AGGREGATORS
from fedsweep.fl.data import ImageData
from fedsweep.fl.evaluate import BATCH_SIZE, evaluate_model
from fedsweep.fl.federation import form_federation, participants
from fedsweep.fl.reference import ClientDataloader, ClientJob, initial_model, train_one_client
from fedsweep.plan.experiment import Experiment
from fedsweep.worker.device import claim_device, prepare_torch

BUDGET_S = 10.0
SHAPE_S = 0.3  # for one shape, about
MOST_STEPS = 30
AGGREGATED = 4  # clients whose aggregation is timed


@dataclass(frozen=True)
class Estimate:
    """What experiments will cost on one worker, if none stops early."""

    seconds: float | None  # of all together; None where nothing could be timed
    device: str
    seconds_per_experiment: dict[str, float]  # the mean for each shape, as in `mnist cnn w4 d2 batch 32`
    notes: tuple[str, ...]  # what was left out or not timed itself, and why


@dataclass(frozen=True)
class Shape:
    """What decides the time of a training step."""

    dataset: str
    model_type: str
    width_factor: int
    depth: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.dataset} {self.model_type} w{self.width_factor} d{self.depth} batch {self.batch_size}"


@dataclass(frozen=True)
class Cost:
    """Seconds of the pieces that an experiment is made of."""

    setup: float  # once
    client: float  # each time that a client trains, besides its steps
    step: float  # one training step with a full batch
    image: float  # evaluating one image


def probe(
    experiments: Sequence[Experiment],
    data_dir: str | Path | None = None,
    device: str = "auto",
    budget_s: float = BUDGET_S,
) -> Estimate:
    """Estimate the time of experiments on one worker, by timing a few steps of the reference engine for each shape.

    The shapes with the most work are timed first. Those that the budget leaves no time for are estimated from the most
    similar one by their multiply-adds, and a note says so. A data set that cannot be had leaves its experiments out.
    """
    claimed = claim_device(device)
    try:
        prepare_torch()
        data, notes = _load(experiments, data_dir, claimed.torch_name)
        groups: dict[Shape, list[Experiment]] = {}
        for experiment in experiments:
            if experiment.dataset in data:
                groups.setdefault(shape_of(experiment), []).append(experiment)
        costs, timed = _costs(groups, data, budget_s)
    finally:
        claimed.release()
    if timed < len(groups):
        notes.append(
            f"{timed} of {len(groups)} shapes were timed, in {budget_s:g} s; the others are estimated from them by "
            "their multiply-adds."
        )
    totals = {
        shape: sum(seconds_of(each, data[shape.dataset], costs[shape]) for each in members)
        for shape, members in groups.items()
    }
    return Estimate(
        seconds=sum(totals.values()) if totals else None,
        device=claimed.torch_name,
        seconds_per_experiment={str(shape): total / len(groups[shape]) for shape, total in totals.items()},
        notes=tuple(notes),
    )


def shape_of(experiment: Experiment) -> Shape:
    """The shape of an experiment."""
    return Shape(
        experiment.dataset,
        experiment.model_type,
        experiment.width_factor,
        experiment.depth,
        experiment.batch_size,
    )


def _load(
    experiments: Sequence[Experiment], data_dir: str | Path | None, device: str
) -> tuple[dict[str, ImageData], list[str]]:
    """The data sets that can be had, and a note for each that cannot."""
    data, notes = {}, []
    for name in dict.fromkeys(experiment.dataset for experiment in experiments):
        try:
            data[name] = load_global_dataset(name, data_dir).to(device)
        except DataError as error:
            count = sum(experiment.dataset == name for experiment in experiments)
            notes.append(f"{count} experiments on {name} are not in the estimate: {error}")
    return data, notes


# ---- from pieces to the whole


def seconds_of(experiment: Experiment, data: ImageData, cost: Cost) -> float:
    """The time of an experiment that makes all its rounds."""
    clients = len(participants(experiment, 1))
    validation = len(data.train_labels) * experiment.validation_split
    samples = (len(data.train_labels) - validation) * clients / experiment.num_clients
    # The last batch of each client is half full on average, and takes nearly as long as a full one.
    steps = experiment.local_epochs * (samples / experiment.batch_size + clients / 2)
    a_round = clients * cost.client + steps * cost.step + validation * cost.image
    return cost.setup + experiment.global_rounds * a_round + len(data.test_labels) * cost.image


def multiply_adds(shape: Shape, data: ImageData) -> int:
    """Multiplications of weights and activations for one image, forward."""
    total, side = 0, data.img_size
    features = data.in_channels if shape.model_type == "cnn" else data.in_channels * side**2
    for block in range(1, shape.depth + 1):
        total += features * shape.width_factor * (9 * side**2 if shape.model_type == "cnn" else 1)
        features = shape.width_factor
        if block % 2 == 0 and side > 1:  # a CNN's pooling
            side //= 2
    return total + features * (side**2 if shape.model_type == "cnn" else 1) * data.num_classes


def _costs(
    groups: dict[Shape, list[Experiment]], data: dict[str, ImageData], budget_s: float
) -> tuple[dict[Shape, Cost], int]:
    """The cost of each shape, and how many were timed themselves (at least one)."""

    def work(shape: Shape) -> float:
        return multiply_adds(shape, data[shape.dataset]) * len(groups[shape])

    costs: dict[Shape, Cost] = {}
    deadline = time.monotonic() + budget_s
    by_work = sorted(groups, key=work, reverse=True)
    for shape in by_work:
        if costs and time.monotonic() > deadline:
            break
        costs[shape] = measure(groups[shape][0], data[shape.dataset])
    timed = list(costs)
    for shape in by_work[len(timed) :]:
        nearest = min(timed, key=lambda other: _difference(shape, other, data))
        costs[shape] = _scaled(costs[nearest], shape, nearest, data)
    return costs, len(timed)


def _difference(shape: Shape, other: Shape, data: dict[str, ImageData]) -> tuple[bool, bool, float]:
    """How little two shapes have in common: the kind of model, the data set, the size."""
    ratio = multiply_adds(shape, data[shape.dataset]) / multiply_adds(other, data[other.dataset])
    return shape.model_type != other.model_type, shape.dataset != other.dataset, abs(math.log(ratio))


def _scaled(cost: Cost, shape: Shape, timed: Shape, data: dict[str, ImageData]) -> Cost:
    per_image = multiply_adds(shape, data[shape.dataset]) / multiply_adds(timed, data[timed.dataset])
    per_step = per_image * shape.batch_size / timed.batch_size
    return Cost(cost.setup, cost.client, cost.step * per_step, cost.image * per_image)


# ---- timing one shape


def measure(experiment: Experiment, data: ImageData, seconds: float = SHAPE_S) -> Cost:
    """Time the pieces of an experiment, in about so many seconds."""
    deadline = time.monotonic() + seconds
    full = min(experiment.batch_size, len(data.train_labels))
    model = initial_model(experiment, data).to(data.train_images.device)

    def train(images: int, steps: int) -> float:
        order = torch.arange(images, device=data.train_images.device)
        loader = ClientDataloader(data.train_images[:images], data.train_labels[:images], [order] * steps, images)
        return _timed(lambda: train_one_client(ClientJob(experiment, model, loader)), data)

    def evaluate(images: int) -> float:
        return _timed(lambda: evaluate_model(model, data.test_images[:images], data.test_labels[:images]), data)

    one_step = _at(full, _growing(lambda images: train(images, 1), full, deadline - seconds / 2))
    steps = min(MOST_STEPS, int((deadline - time.monotonic()) / 2 / one_step))
    step = min(one_step, train(full, steps) / steps) if steps > 1 else one_step
    shown = min(len(data.test_labels), BATCH_SIZE)
    # Dividing equally, which never has to be drawn again, costs what any division does.
    whole = experiment.model_copy(update={"partition": "iid"})
    return Cost(
        setup=_timed(lambda: form_federation(whole, data), data),
        client=one_step - step + _aggregation(experiment, model, data),
        step=step,
        image=_at(shown, _growing(evaluate, shown, deadline)) / shown,
    )


def _growing(run: Callable[[int], float], most: int, deadline: float) -> list[tuple[int, float]]:
    """Time `run` with 2, 8, 32, … up to `most` images until the time is up; each (images, seconds)."""
    timed: list[tuple[int, float]] = []
    images = min(2, most)
    while True:
        run(images)  # what runs for the first time is slow
        timed.append((images, min(run(images), run(images))))
        if images == most:
            return timed
        images = min(4 * images, most)
        # Of a small step most is overhead, so one time alone says little of larger ones.
        expected = _at(images, timed) if len(timed) > 1 else 2 * timed[0][1]
        is_late = time.monotonic() + 3 * expected > deadline
        if is_late and (len(timed) > 1 or expected > SHAPE_S / 3):
            return timed


def _at(images: int, timed: Sequence[tuple[int, float]]) -> float:
    """Seconds for so many images, on the line through the last two times; through none if there is but one."""
    (first, first_s), (last, last_s) = timed[-2:] if len(timed) > 1 else ((0, 0.0), timed[0])
    return last_s + max(0.0, last_s - first_s) / (last - first) * (images - last)


def _aggregation(experiment: Experiment, model: torch.nn.Module, data: ImageData) -> float:
    """Seconds that one client adds to the aggregation."""
    weights = [model.state_dict()] * AGGREGATED
    return _timed(lambda: AGGREGATORS[experiment.aggregator](weights, [1] * AGGREGATED), data) / AGGREGATED


def _timed(work: Callable[[], object], data: ImageData) -> float:
    on_gpu = data.train_images.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
