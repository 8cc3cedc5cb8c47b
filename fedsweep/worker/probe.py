"""What a sweep will cost: real training with the plan that each cohort would get, scaled to all of its rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from fedsweep.datasets import load_global_dataset
from fedsweep.errors import DataError
from fedsweep.fl.aggregate import AGGREGATORS
from fedsweep.fl.data import ImageData
from fedsweep.fl.federation import divide, division_key, epoch_orders, poisoned_federation
from fedsweep.fl.lanes import Trainer
from fedsweep.fl.loop import LoopTrainer
from fedsweep.plan.cohort import cohort_key, forward_cost, sharing_key
from fedsweep.plan.experiment import Experiment
from fedsweep.worker.cpus import available_cpus
from fedsweep.worker.device import claim_device, prepare_torch
from fedsweep.worker.plans import choose_trainer, sharing
from fedsweep.worker.room import bytes_per_experiment, free_memory, how_many_fit
from fedsweep.worker.runner import REFERENCE_PLAN
from fedsweep.worker.timing import Amounts, affordable_piece, median_of

BUDGET_S = 10.0
PIECE_S = 0.05  # what is timed, for one cohort, about; it is trained four times
TIMES = 3


@dataclass(frozen=True)
class CohortEstimate:
    """What the experiments of one cohort will cost."""

    name: str  # as in `mnist cnn w4 d2 batch 32, 10 clients, 1 epoch`
    experiments: int
    plan: str | None  # which kernels; None where it was not timed itself
    seconds_per_experiment: float  # the mean
    memory_bytes: int  # of those that train together, besides the process and its data


@dataclass(frozen=True)
class Missing:
    """A data set that cannot be had, so that its experiments are not in the estimate."""

    dataset: str
    experiments: int
    reason: str  # and what to do


@dataclass(frozen=True)
class Estimate:
    """What experiments will cost on one worker, if none stops early."""

    seconds: float | None  # of all together; None where nothing could be timed
    device: str
    seconds_per_experiment: dict[str, float]  # the mean for each cohort, by its name
    notes: tuple[str, ...]  # what was not timed itself
    missing: tuple[Missing, ...] = ()
    experiments_per_hour: float | None = None
    memory_bytes: int | None = None  # of the worker, at its largest
    threads: int = 1
    cohorts: tuple[CohortEstimate, ...] = ()  # the one with the most work first


@dataclass(frozen=True)
class Group:
    """The experiments of one cohort."""

    experiments: tuple[Experiment, ...]
    engine: str

    @property
    def example(self) -> Experiment:
        """One of them."""
        return self.experiments[0]

    def __str__(self) -> str:
        it = self.example
        engine = "" if self.engine == "batched" else f", {self.engine}"
        epochs = f"{it.local_epochs} epoch{'s' * (it.local_epochs > 1)}"
        shape = f"{it.dataset} {it.model_type} w{it.width_factor} d{it.depth} batch {it.batch_size}"
        return f"{shape}, {it.num_clients} clients, {epochs}{engine}"


@dataclass(frozen=True)
class Cost:
    """Seconds of the pieces that an experiment is made of."""

    division: float  # dividing the training set, once for all that divide it alike
    setup: float  # once for an experiment
    order: float  # drawing the order of a client's images for a round, once for all that share it
    aggregation: float  # in each round
    trained: float  # one image, each time that it is trained on
    evaluated: float  # one image, each time that it is evaluated


def probe(
    experiments: Sequence[Experiment],
    data_dir: str | Path | None = None,
    device: str = "auto",
    budget_s: float = BUDGET_S,
    *,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
) -> Estimate:
    """Estimate the time of experiments on one worker, by training a little with the plan that each cohort would get.

    The cohorts with the most work are timed first. Those that the budget leaves no time for are estimated from the most
    similar one by their arithmetic, and a note says so. A data set that cannot be had leaves its experiments out.

    Args:
        experiments: what is to be run.
        data_dir: folder with the official files.
        device: `auto`, `cpu` or `cuda:N`.
        budget_s: after so many seconds no other cohort is timed.
        engines: of each experiment; `batched` if not given.
        threads: of the worker; as many as there are CPUs if not given.
    """
    threads = threads or available_cpus()
    claimed = claim_device(device)
    try:
        prepare_torch()
        data, missing = _load(experiments, data_dir, claimed.torch_name)
        groups = _groups(experiments, engines or ["batched"] * len(experiments), data)
        costs, plans = _costs(groups, data, threads, budget_s)
        cohorts = tuple(
            _estimated(group, data[group.example.dataset], costs[name], plans.get(name), claimed.torch_name)
            for name, group in groups.items()
        )
    finally:
        claimed.release()
    notes: tuple[str, ...] = ()
    if len(plans) < len(groups):
        notes = (
            f"{len(plans)} of {len(groups)} shapes were timed, in {budget_s:g} s; the others are estimated from them "
            "by their arithmetic.",
        )
    seconds = sum(each.experiments * each.seconds_per_experiment for each in cohorts) if cohorts else None
    return Estimate(
        seconds=seconds,
        device=claimed.torch_name,
        seconds_per_experiment={each.name: each.seconds_per_experiment for each in cohorts},
        notes=notes,
        missing=missing,
        experiments_per_hour=sum(each.experiments for each in cohorts) / seconds * 3600 if seconds else None,
        memory_bytes=_base_memory(data, claimed.torch_name) + max(each.memory_bytes for each in cohorts)
        if cohorts
        else None,
        threads=threads,
        cohorts=cohorts,
    )


def _load(
    experiments: Sequence[Experiment], data_dir: str | Path | None, device: str
) -> tuple[dict[str, ImageData], tuple[Missing, ...]]:
    """The data sets that can be had, and those that cannot."""
    data: dict[str, ImageData] = {}
    missing: list[Missing] = []
    for name in dict.fromkeys(experiment.dataset for experiment in experiments):
        try:
            data[name] = load_global_dataset(name, data_dir).to(device)
        except DataError as error:
            count = sum(experiment.dataset == name for experiment in experiments)
            missing.append(Missing(name, count, str(error)))
    return data, tuple(missing)


def _groups(
    experiments: Sequence[Experiment], engines: Sequence[str], data: Mapping[str, ImageData]
) -> dict[str, Group]:
    """The experiments by what they can train with, the most work first. Those of the reference engine by their like."""
    found: dict[tuple[str, str], list[Experiment]] = {}
    for experiment, engine in zip(experiments, engines, strict=True):
        if experiment.dataset in data:
            found.setdefault((cohort_key(experiment), engine), []).append(experiment)
    groups = [Group(tuple(members), engine) for (_, engine), members in found.items()]
    groups.sort(key=lambda group: -_work(group, data[group.example.dataset]))
    return {str(group): group for group in groups}


# ---- from pieces to the whole


def seconds_of(group: Group, data: ImageData, cost: Cost) -> float:
    """The time of a cohort whose experiments make all their rounds."""
    seconds = cost.division * len({division_key(each) for each in group.experiments})
    for experiment in group.experiments:
        amounts = Amounts.of(experiment, data)
        trained = amounts.clients * experiment.local_epochs * amounts.images
        a_round = trained * cost.trained + amounts.validation * cost.evaluated + cost.aggregation
        seconds += cost.setup + experiment.global_rounds * a_round + len(data.test_labels) * cost.evaluated
    longest: dict[str, int] = {}
    for experiment in group.experiments:
        key = sharing_key(experiment)
        longest[key] = max(longest.get(key, 0), experiment.global_rounds * Amounts.of(experiment, data).clients)
    return seconds + cost.order * sum(longest.values())


def _estimated(group: Group, data: ImageData, cost: Cost, plan: str | None, device: str) -> CohortEstimate:
    count = len(group.experiments)
    together = 1 if group.engine == "reference" else min(count, how_many_fit(group.example, data, free_memory(device)))
    return CohortEstimate(
        name=str(group),
        experiments=count,
        plan=plan,
        seconds_per_experiment=seconds_of(group, data, cost) / count,
        memory_bytes=together * bytes_per_experiment(group.example, data),
    )


def _base_memory(data: Mapping[str, ImageData], device: str) -> int:
    """Bytes that a worker takes besides what it trains: of the GPU its data, of the CPU this process as it is now."""
    if device.startswith("cuda"):
        images = [tensor for each in data.values() for tensor in (each.train_images, each.test_images)]
        return sum(tensor.nbytes for tensor in images)
    return int(psutil.Process().memory_info().rss)


def arithmetic(experiment: Experiment, data: ImageData) -> float:
    """What one image costs forward, for comparing."""
    return forward_cost(
        experiment.model_type,
        experiment.width_factor,
        experiment.depth,
        in_channels=data.in_channels,
        img_size=data.img_size,
        num_classes=data.num_classes,
    )


def _work(group: Group, data: ImageData) -> float:
    rounds = sum(experiment.global_rounds for experiment in group.experiments)
    return arithmetic(group.example, data) * rounds * group.example.local_epochs * len(data.train_labels)


def _costs(
    groups: Mapping[str, Group], data: Mapping[str, ImageData], threads: int, budget_s: float
) -> tuple[dict[str, Cost], dict[str, str]]:
    """The cost of each cohort, and the plans of those that were timed themselves (at least one)."""
    costs: dict[str, Cost] = {}
    plans: dict[str, str] = {}
    deadline = time.monotonic() + budget_s
    for name, group in groups.items():
        if costs and time.monotonic() > deadline:
            break
        costs[name], plans[name] = measure(group, data[group.example.dataset], threads)
    for name, group in groups.items():
        if name not in plans:
            nearest = min(plans, key=lambda other: _difference(group, groups[other], data))
            costs[name] = _scaled(costs[nearest], group, groups[nearest], data)
    return costs, plans


def _ratio(group: Group, other: Group, data: Mapping[str, ImageData]) -> float:
    first, second = (arithmetic(each.example, data[each.example.dataset]) for each in (group, other))
    return first / second


def _difference(group: Group, other: Group, data: Mapping[str, ImageData]) -> tuple[bool, bool, bool, float]:
    """How little two cohorts have in common: the engine, the kind of model, the data set, the size."""
    it, that = group.example, other.example
    return (
        group.engine != other.engine,
        it.model_type != that.model_type,
        it.dataset != that.dataset,
        abs(math.log(_ratio(group, other, data))),
    )


def _scaled(cost: Cost, group: Group, timed: Group, data: Mapping[str, ImageData]) -> Cost:
    ratio = _ratio(group, timed, data)
    return replace(cost, trained=cost.trained * ratio, evaluated=cost.evaluated * ratio)


# ---- timing one cohort


def measure(group: Group, data: ImageData, threads: int) -> tuple[Cost, str]:
    """Time the pieces of a cohort's experiments; with the name of the plan that trained them."""
    example = group.example
    trainer: Trainer
    if group.engine == "reference":
        trainer, plan, lanes, threads = LoopTrainer(example, data), REFERENCE_PLAN, 1, 1
    else:
        trainer = choose_trainer(group.experiments, data, threads)
        plan, lanes = trainer.plan, sharing(group.experiments)
    piece = affordable_piece(trainer, example, data, lanes=lanes, threads=threads, seconds=PIECE_S)
    shown = data.test_images[: max(1, len(piece.validation))]

    def train() -> None:
        trainer.train(piece.inputs, piece.works, len(piece.works))

    def evaluate() -> None:
        trainer.logits(piece.inputs.weights, shown)

    def aggregate() -> None:
        states = [{"weights": piece.inputs.weights}] * Amounts.of(example, data).clients
        AGGREGATORS[example.aggregator](states, [1] * len(states))["weights"].isfinite().all()

    train()  # what runs for the first time is slow
    evaluate()
    # Dividing equally, which never has to be drawn again, costs what any division does.
    whole = example.model_copy(update={"partition": "iid"})
    division = divide(whole, data)
    poisoned = poisoned_federation(whole, data, division).poisoning.poisoned[division.clients[0]]
    cost = Cost(
        division=median_of(1, lambda: divide(whole, data), data),
        setup=median_of(1, lambda: poisoned_federation(whole, data, division), data),
        order=median_of(TIMES, lambda: epoch_orders(example, poisoned, 1, 0), data),
        aggregation=median_of(TIMES, aggregate, data) / piece.lanes,
        trained=median_of(TIMES, train, data) / piece.lane_images,
        evaluated=median_of(TIMES, evaluate, data) / (piece.lanes * len(shown)),
    )
    return cost, plan
