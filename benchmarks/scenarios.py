"""The workloads of the engine's benchmark, and what ratio to each peer is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from peers.workload import Member, Settings, Work, Workload

from fedsweep.fl.data import ImageData
from fedsweep.fl.federation import Federation, epoch_orders, form_federation, participants
from fedsweep.fl.models import build_model
from fedsweep.plan.experiment import Experiment

SEEDS = (42, 101, 2024, 7, 99)
ALL_RATIOS = (0.1, 0.2, 0.3, 0.4)
TYPES = ("label_flip", "random_noise")


@dataclass(frozen=True)
class Scenario:
    """Experiments of one shape."""

    model_type: str
    width: int
    depth: int
    seeds: int = 1
    ratios: tuple[float, ...] = ALL_RATIOS
    aggregators: tuple[str, ...] = ("fedavg", "median")
    common: Mapping[str, object] = field(default_factory=dict)  # further parameters of every experiment
    share: float = 1.0  # of the training images; the others are left out, for everyone alike
    rounds: int = 1  # in one run
    required: Mapping[str, float] = field(default_factory=dict)  # experiments per hour, ours to the peer's

    def experiments(self) -> list[Experiment]:
        """Every combination."""
        grid = product(SEEDS[: self.seeds], self.ratios, TYPES, self.aggregators)
        return [
            Experiment(
                dataset="mnist",
                model_type=self.model_type,
                width_factor=self.width,
                depth=self.depth,
                batch_size=128,
                local_epochs=1,
                lr=0.02,
                momentum=0.9,
                weight_decay=5e-4,
                max_grad_norm=1.0,
                validation_split=0.1,
                global_rounds=1000,  # so that nobody stops before the benchmark does
                seed=seed,
                poison_ratio=ratio,
                poison_type=kind,
                aggregator=aggregator,
                **({"alpha": 1.0, "num_clients": 10} | dict(self.common)),
            )
            for seed, ratio, kind, aggregator in grid
        ]

    def short(self) -> Scenario:
        """The same experiments on fewer images, so that no client makes more than some ten steps."""
        if self.common.get("num_clients", 10) > 10:
            return replace(self, rounds=1)
        return replace(self, share=min(self.share, 0.1), rounds=1)

    def quick(self) -> Scenario:
        """A small one of the same shape, to see whether everything runs."""
        return replace(self.short(), seeds=1, ratios=self.ratios[:1])


# With alpha 0.1 no division leaves every one of 1,000 clients an image.
MANY_CLIENTS = {"alpha": 0.2, "num_clients": 1000, "min_client_size": 1, "fraction_fit": 0.1}
FEW = {"ratios": (0.1, 0.4), "aggregators": ("fedavg",)}

SCENARIOS: dict[str, Scenario] = {
    "S1": Scenario("lr", 4, 4, rounds=3, required={"P0": 7, "P1": 12, "P2": 4, "P3": 60}),
    "S2": Scenario(
        "lr", 4, 4, seeds=5, aggregators=("fedavg",), rounds=2, required={"P0": 5, "P1": 8, "P2": 3, "P3": 40}
    ),
    "S3": Scenario("lr", 64, 2, rounds=3, required={"P0": 1.5, "P1": 2.5, "P2": 1.5, "P3": 15}),
    "S4": Scenario("cnn", 4, 4, share=0.5, required={"P0": 2, "P1": 3, "P2": 2, "P3": 4}),
    "S5": Scenario("cnn", 16, 4, share=0.2, required={"P0": 1.1, "P3": 2}),
    "S6": Scenario("cnn", 64, 4, **FEW, share=0.1, required={"P0": 1.0, "P3": 1.3}),
    "S7": Scenario("lr", 16, 1, **FEW, common=MANY_CLIENTS, rounds=40, required={"P0": 5, "P2": 3, "P3": 60}),
}


def export(name: str, scenario: Scenario, data: ImageData, rounds: int) -> Workload:
    """Everything that is to be computed, as every side reads it."""
    few = part_of(data, scenario.share)
    experiments = scenario.experiments()
    seeds = list(dict.fromkeys(experiment.seed for experiment in experiments))
    first = {seed: next(each for each in experiments if each.seed == seed) for seed in seeds}
    federations = [form_federation(experiment, few) for experiment in experiments]
    groups = [seeds.index(experiment.seed) for experiment in experiments]
    one = experiments[0]
    return Workload(
        name=name,
        settings=Settings(
            model_type=one.model_type,
            width=one.width_factor,
            depth=one.depth,
            num_classes=few.num_classes,
            in_channels=few.in_channels,
            img_size=few.img_size,
            batch_size=one.batch_size,
            lr=one.lr,
            momentum=one.momentum,
            weight_decay=one.weight_decay,
            max_grad_norm=one.max_grad_norm or float("inf"),
        ),
        members=tuple(
            Member(group, experiment.aggregator, experiment.model_dump())
            for group, experiment in zip(groups, experiments, strict=True)
        ),
        images=few.train_images.numpy(),
        true_labels=few.train_labels.numpy().astype(np.uint8),
        labels=np.stack([federation.poisoning.labels for federation in federations]).astype(np.uint8),
        initial=tuple(_initial(first[seed], few) for seed in seeds),
        rounds=tuple(
            tuple(_works(first[seed], federations[groups.index(group)], number + 1) for number in range(rounds))
            for group, seed in enumerate(seeds)
        ),
    )


def part_of(data: ImageData, share: float) -> ImageData:
    """The first images of the training set."""
    count = round(len(data.train_labels) * share)
    return replace(data, train_images=data.train_images[:count], train_labels=data.train_labels[:count])


def full_client_steps(scenario: Scenario, data: ImageData) -> float:
    """Client-steps of a round of one experiment on all training images, mean over the experiments."""
    steps = {}
    for experiment in scenario.experiments():
        if experiment.seed not in steps:
            clients = form_federation(experiment, data).clients
            sizes = [len(clients[client]) for client in participants(experiment, 1)]
            size = experiment.batch_size
            steps[experiment.seed] = sum(each // size + (each % size > 1) for each in sizes)
    return sum(steps.values()) / len(steps)


def _initial(experiment: Experiment, data: ImageData) -> dict[str, np.ndarray]:
    model = build_model(experiment, data.num_classes, data.in_channels, data.img_size)
    return {name: tensor.contiguous().numpy() for name, tensor in model.state_dict().items()}


def _works(experiment: Experiment, federation: Federation, number: int) -> tuple[Work, ...]:
    # All experiments of a seed see their images in this order, whatever the attack: `data_ordering` is "shuffle".
    poisoned = federation.poisoning.poisoned
    works = []
    for client in participants(experiment, number):
        own = federation.clients[client]
        works.append(Work(client, own[epoch_orders(experiment, poisoned[own], number, client)[0]]))
    return tuple(works)
