"""The batched engine against the reference engine, and against itself with other neighbours."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fedsweep.fl import reference
from fedsweep.fl.aggregate import AGGREGATORS
from fedsweep.fl.data import ImageData
from fedsweep.fl.engine import Cohort, Progress
from fedsweep.fl.federation import form_federation, participants
from fedsweep.fl.lanes import ClientWork, LaneInputs, Trained, Trainer
from fedsweep.fl.loop import LoopTrainer
from fedsweep.fl.native import NativeTrainer
from fedsweep.fl.outcome import Outcome
from fedsweep.plan.experiment import Experiment

Kernels = Callable[[torch.dtype], ctypes.CDLL]
MakeTrainer = Callable[[Experiment, ImageData], Trainer]

ATTACKS: list[dict[str, object]] = [
    {"poison_ratio": 0.0},
    {"poison_ratio": 0.3},
    {"poison_ratio": 0.3, "poison_type": "random_noise"},
    {"poison_ratio": 0.4, "poison_level": "client"},
    {"poison_ratio": 0.5, "target_class": 3, "poison_label": 5},
]
EVERYTHING = [
    {**attack, "data_ordering": ordering, "aggregator": aggregator, "fraction_fit": fraction, "alpha": alpha}
    for attack in ATTACKS
    for ordering in ("shuffle", "good_bad", "bad_good")
    for aggregator in ("fedavg", "fedavg_uniform", "median")
    for fraction in (1.0, 0.3)
    for alpha in (100.0, 0.1)
]


@pytest.fixture(params=["loop", "native x1", "native x4"])
def make_trainer(request: pytest.FixtureRequest, kernels: Kernels) -> MakeTrainer:
    """Each trainer of a CPU."""
    if request.param == "loop":
        return lambda example, data: LoopTrainer(example, data, threads=2)
    lanes = int(request.param.removeprefix("native x"))
    return lambda example, data: NativeTrainer(example, data, kernels(torch.float32), threads=2, lanes=lanes)


def cohort_of(
    experiments: Sequence[Experiment], data: ImageData, trainer: Trainer, dtype: torch.dtype = torch.float32
) -> Cohort:
    cohort = Cohort(data, trainer, dtype)
    for place, experiment in enumerate(experiments):
        cohort.join(str(place), experiment)
    return cohort


def finish(cohort: Cohort) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    while cohort.names:
        outcomes |= {each.name: each.outcome for each in checked(cohort.run_round()) if each.outcome is not None}
    return outcomes


def checked(progress: Sequence[Progress]) -> Sequence[Progress]:
    for each in progress:
        if each.error is not None:
            raise each.error
    return progress


# ------------------------------------------------------------------------------------------- equal to the reference


def reference_round(experiment: Experiment, data: ImageData, dtype: torch.dtype) -> dict[str, Tensor]:
    """The global model after the first round, by the reference engine's own functions, one client after another."""
    clients = reference._client_data(form_federation(experiment, data), data)
    model = reference.initial_model(experiment, data).to(dtype)
    jobs = []
    for client in participants(experiment, 1):
        loader = reference.get_client_dataloader(experiment, clients[client], 1, client)
        batches = [(images.to(dtype), labels) for images, labels in loader]
        jobs.append((reference.ClientJob(experiment, model, batches), len(clients[client].labels)))  # type: ignore[arg-type]
    return AGGREGATORS[experiment.aggregator](
        [reference.train_one_client(job) for job, _ in jobs], [size for _, size in jobs]
    )


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """How far apart two models are, relative to the length of the second."""
    assert found.keys() == expected.keys()
    floating = [name for name in expected if expected[name].is_floating_point()]
    assert all(torch.equal(found[name], expected[name]) for name in expected if name not in floating)
    first, second = (torch.cat([state[name].double().flatten() for name in floating]) for state in (found, expected))
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize("model_type", ["lr", "cnn"])
def test_a_round_of_the_compiled_kernels_is_that_of_the_reference(
    model_type: str, depth: int, dtype: torch.dtype, digits: ImageData, kernels: Kernels
) -> None:
    experiments = [Experiment(model_type=model_type, depth=depth, **each) for each in EVERYTHING]  # type: ignore[arg-type]
    cohort = cohort_of(experiments, digits, NativeTrainer(experiments[0], digits, kernels(dtype), 2, 8), dtype)
    cohort.train_round()
    distances = []
    seen: dict[str, dict[str, Tensor]] = {}  # clean experiments of several attacks are one
    for name, experiment in zip(cohort.names, experiments, strict=True):
        if experiment.signature not in seen:
            seen[experiment.signature] = reference_round(experiment, digits, dtype)
        distances.append(distance(cohort.weights(name), seen[experiment.signature]))
    if dtype == torch.float64:
        assert max(distances) <= 1e-10
    else:
        # Where a ReLU or a pooling window is decided by the last bit, float32 engines part by a sample's gradient, and
        # the reference parts from itself in float64. Which experiments that befalls depends on the processor. At most
        # lr * max_grad_norm / (1 - momentum) / batch_size = 0.006 of it reaches the weights of a client, of length > 3.
        assert sorted(distances)[len(distances) * 8 // 10] <= 1e-6
        assert max(distances) <= 2e-3


SOME = [
    {**attack, "aggregator": aggregator, "data_ordering": ordering, "fraction_fit": fraction, "alpha": alpha}
    for attack, (aggregator, ordering, fraction, alpha) in zip(
        ATTACKS,
        [
            ("fedavg", "shuffle", 1.0, 1.0),
            ("median", "good_bad", 1.0, 100.0),
            ("fedavg", "bad_good", 0.5, 1.0),
            ("fedavg_uniform", "shuffle", 1.0, 0.1),
            ("median", "shuffle", 0.5, 1.0),
        ],
        strict=True,
    )
]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("model_type", ["lr", "cnn"])
def test_after_ten_rounds_the_result_is_that_of_the_reference(
    model_type: str, depth: int, digits: ImageData, make_trainer: MakeTrainer, finish_reference: Callable[..., Outcome]
) -> None:
    experiments = [Experiment(model_type=model_type, depth=depth, **each) for each in SOME]  # type: ignore[arg-type]
    outcomes = finish(cohort_of(experiments, digits, make_trainer(experiments[0], digits)))
    for name, experiment in enumerate(experiments):
        found, expected = outcomes[str(name)], finish_reference(experiment, digits)
        assert found.best_epoch == expected.best_epoch
        assert (found.test_acc, found.val_acc) == (expected.test_acc, expected.val_acc)
        assert found.test_loss == pytest.approx(expected.test_loss, rel=1e-4)
        assert found.rounds_run == expected.rounds_run == 10
        assert (found.poisoned_clients, found.poisoned_samples) == (
            expected.poisoned_clients,
            expected.poisoned_samples,
        )
        assert found.num_parameters == expected.num_parameters


@pytest.fixture(name="finish_reference")
def _finish_reference(finish: Callable[..., Outcome]) -> Callable[..., Outcome]:
    return finish


def test_the_loop_gives_the_bits_of_the_reference(digits: ImageData, finish_reference: Callable[..., Outcome]) -> None:
    experiments = [Experiment(model_type="cnn", global_rounds=3, **each) for each in SOME]  # type: ignore[arg-type]
    outcomes = finish(cohort_of(experiments, digits, LoopTrainer(experiments[0], digits, threads=2)))
    for name, experiment in enumerate(experiments):
        assert outcomes[str(name)] == finish_reference(experiment, digits)


# -------------------------------------------------------------------------------------------- whoever sits beside it


def random_experiment(chance: random.Random) -> Experiment:
    """An experiment that differs from others in everything that one cohort allows."""
    return Experiment(
        model_type="lr",
        depth=2,
        global_rounds=chance.choice([1, 2, 4]),
        num_clients=5,
        seed=chance.choice([1, 2]),
        alpha=chance.choice([0.5, 1.0, 100.0]),
        fraction_fit=chance.choice([0.6, 1.0]),
        aggregator=chance.choice(["fedavg", "fedavg_uniform", "median"]),
        data_ordering=chance.choice(["shuffle", "good_bad", "bad_good"]),
        lr=chance.choice([0.01, 0.05, 1e30]),
        momentum=chance.choice([0.0, 0.9]),
        weight_decay=chance.choice([0.0, 5e-4]),
        max_grad_norm=chance.choice([None, 1.0]),
        early_stopping_patience=chance.choice([None, 1, 2]),
        **chance.choice(ATTACKS),  # type: ignore[arg-type]
    )


def test_an_experiment_is_the_same_alone_and_in_fifty_random_cohorts(digits: ImageData, kernels: Kernels) -> None:
    chance = random.Random(4)
    pool = [random_experiment(chance) for _ in range(60)]
    trainer = NativeTrainer(pool[0], digits, kernels(torch.float32), threads=2, lanes=16)
    alone = {experiment: finish(cohort_of([experiment], digits, trainer))["0"] for experiment in pool}
    assert {outcome.outcome for outcome in alone.values()} == {"ok", "diverged"}
    for _ in range(50):
        together = chance.sample(pool, chance.randint(2, 40))
        outcomes = finish(cohort_of(together, digits, trainer))
        assert [repr(outcomes[str(place)]) for place in range(len(together))] == [
            repr(alone[each]) for each in together
        ]


def test_experiments_may_join_and_leave_at_any_round(digits: ImageData, make_trainer: MakeTrainer) -> None:
    experiments = [Experiment(model_type="lr", global_rounds=4, **each) for each in SOME]  # type: ignore[arg-type]
    trainer = make_trainer(experiments[0], digits)
    expected = finish(cohort_of(experiments, digits, trainer))
    cohort = cohort_of(experiments[:2], digits, trainer)
    cohort.run_round()
    cohort.join("2", experiments[2])
    cohort.join("3", experiments[3])
    cohort.run_round()
    cohort.leave("3")
    outcomes = {each.name: each.outcome for _ in range(2) for each in cohort.run_round() if each.outcome}
    assert cohort.names == ("2",)
    outcomes |= finish(cohort)
    assert outcomes == {name: expected[name] for name in ("0", "1", "2")}


def test_a_saved_experiment_goes_on_with_the_same_row(digits: ImageData, make_trainer: MakeTrainer) -> None:
    experiments = [
        Experiment(model_type="cnn", depth=1, global_rounds=6, early_stopping_patience=2, **each)  # type: ignore[arg-type]
        for each in SOME
    ]
    trainer = make_trainer(experiments[0], digits)
    expected = finish(cohort_of(experiments, digits, trainer))
    cohort = cohort_of(experiments, digits, trainer)
    for _ in range(3):
        cohort.run_round()
    resumed = Cohort(digits, trainer)
    for name in reversed(cohort.names):
        resumed.join(name, experiments[int(name)], cohort.save(name))
    outcomes = finish(resumed)
    assert outcomes and outcomes == {name: expected[name] for name in outcomes}


# ------------------------------------------------------------------------------------------------- what cannot train


class Small:
    """A trainer with memory for so many experiments, that refuses one learning rate altogether."""

    plan = "small"

    def __init__(self, inner: Trainer, room: int, refused_lr: float | None = None) -> None:
        self.inner, self.room, self.refused_lr = inner, room, refused_lr
        self.threads, self.aggregators = inner.threads, inner.aggregators
        self.sizes: list[int] = []

    def train(self, inputs: LaneInputs, works: Sequence[ClientWork], num_slots: int) -> Trained:
        self.sizes.append(len(inputs.weights))
        if len(inputs.weights) > self.room:
            raise torch.OutOfMemoryError("no room")
        if self.refused_lr in inputs.lr.tolist():
            raise RuntimeError("this one cannot be trained")
        return self.inner.train(inputs, works, num_slots)

    def logits(self, weights: Tensor, images: Tensor) -> Tensor:
        assert len(weights) <= self.room
        return self.inner.logits(weights, images)


def test_where_memory_is_short_the_cohort_is_halved_and_goes_on(digits: ImageData) -> None:
    experiments = [Experiment(model_type="lr", global_rounds=2, seed=seed) for seed in range(7)]
    loop = LoopTrainer(experiments[0], digits)
    small = Small(loop, room=2)
    assert finish(cohort_of(experiments, digits, small)) == finish(cohort_of(experiments, digits, loop))
    assert max(small.sizes[-4:]) <= 2  # it has learned


def test_one_that_cannot_be_trained_is_named_and_the_others_go_on(digits: ImageData) -> None:
    experiments = [Experiment(model_type="lr", global_rounds=2, lr=lr) for lr in (0.01, 0.02, 0.03)]
    loop = LoopTrainer(experiments[0], digits)
    cohort = cohort_of(experiments, digits, Small(loop, room=9, refused_lr=0.02))
    first = {each.name: each for each in cohort.run_round()}
    assert str(first["1"].error) == "this one cannot be trained"
    assert first["1"].report is None
    assert cohort.names == ("0", "2")
    expected = finish(cohort_of(experiments, digits, loop))
    assert finish(cohort) == {name: expected[name] for name in ("0", "2")}


def test_lanes_that_see_the_same_images_are_trained_as_one_work(digits: ImageData) -> None:
    """Sharing is what makes the engine fast; it must not be lost unnoticed, nor given where orders differ."""
    seen: list[Sequence[ClientWork]] = []

    class Spy(Small):
        def train(self, inputs: LaneInputs, works: Sequence[ClientWork], num_slots: int) -> Trained:
            seen.append(works)
            return super().train(inputs, works, num_slots)

    grid = [{"poison_ratio": ratio, "aggregator": rule} for ratio in (0.0, 0.3) for rule in ("fedavg", "median")]
    grid += [{"poison_ratio": 0.3, "data_ordering": "good_bad"}, {"poison_ratio": 0.3, "seed": 7}]
    experiments = [Experiment(model_type="lr", **each) for each in grid]  # type: ignore[arg-type]
    cohort_of(experiments, digits, Spy(LoopTrainer(experiments[0], digits), 99)).train_round()
    together = sorted({work.lanes for work in seen[0]})
    # In rows, the averaged ones come first, of these the one of seed 7.
    assert together == [(0,), (1, 2, 4, 5), (3,)]
    assert len(seen[0]) == 30
