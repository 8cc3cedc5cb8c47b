"""Lanes stacked into one tensor program: the same weights as one lane after another, whoever the neighbours are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsweep.fl.data import ImageData
from fedsweep.fl.engine import Cohort
from fedsweep.fl.lanes import ClientWork, LaneInputs, ModelShape, Trainer
from fedsweep.fl.loop import LoopTrainer
from fedsweep.fl.models import build_model
from fedsweep.fl.stacked import StackedTrainer
from fedsweep.fl.stacked_graph import TileProgram, captured
from fedsweep.plan.experiment import Experiment

# Every way through the code: one work a tile with batches of their own size or over fixed buffers, and several works.
TILES: list[dict[str, Any]] = [
    {"kernel": "grouped", "lanes": 3},
    {"kernel": "unfold", "lanes": 3},
    {"kernel": "grouped", "lanes": 3, "static": True},
    {"kernel": "unfold", "lanes": 3, "static": True},
    {"kernel": "grouped", "lanes": 2, "works": 3},
    {"kernel": "unfold", "lanes": 2, "works": 3},
]
EVERY_TILE = pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, tile.values())))
BOTH_MODELS = pytest.mark.parametrize("model_type", ["lr", "cnn"])


def experiment(**parameters: object) -> Experiment:
    return Experiment(**{"batch_size": 32, "width_factor": 3, **parameters})  # type: ignore[arg-type]


def round_of(
    trainer: Trainer, data: ImageData, experiments: Sequence[Experiment], dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """The global models after one round, trained together."""
    cohort = Cohort(data, trainer, dtype)
    for number, each in enumerate(experiments):
        cohort.join(str(number), each)
    for member, lost in cohort.train_round():
        assert lost == 0, f"{member.name}: {lost!r}"[:500]
    return [cohort.weights(name) for name in cohort.names]


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest of any tensor, relative to its largest number."""
    assert ours.keys() == theirs.keys()
    return max(largest_difference(tensor.double(), theirs[name].double()) for name, tensor in ours.items())


# --------------------------------------------------------------------------------------------------- equal to the loop

SETTINGS = list(itertools.product(["lr", "cnn"], [0, 1, 2, 4], [1.0, 0.4], [100.0, 0.1]))


@pytest.mark.parametrize(("model_type", "depth", "fraction", "alpha"), SETTINGS)
def test_a_round_gives_the_weights_of_the_loop(
    digits: ImageData, model_type: str, depth: int, fraction: float, alpha: float
) -> None:
    """Three orderings, so that some experiments share their images and others do not; clients of any sizes."""
    attacked = partial(
        experiment, model_type=model_type, depth=depth, fraction_fit=fraction, alpha=alpha, poison_ratio=0.3
    )
    together = [
        attacked(data_ordering="shuffle"),
        attacked(data_ordering="shuffle", poison_type="random_noise"),
        attacked(data_ordering="good_bad"),
        attacked(data_ordering="bad_good", aggregator="median"),
        attacked(seed=3),
    ]
    exact = round_of(LoopTrainer(together[0], digits, dtype=torch.float64), digits, together, torch.float64)
    rounded = round_of(LoopTrainer(together[0], digits), digits, together, torch.float32)
    # Batch norm of a unit that is hardly ever on makes much of a rounding error, in the loop as here.
    unavoidable = max(difference(*pair) for pair in zip(rounded, exact, strict=True))
    for tile in (TILES[0], TILES[5]):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, max(1e-5, 5 * unavoidable))):
            got = round_of(StackedTrainer(together[0], digits, **tile), digits, together, dtype)
            for ours, theirs in zip(got, exact, strict=True):
                assert difference(ours, theirs) <= tolerance


@BOTH_MODELS
@EVERY_TILE
def test_every_lane_has_its_own_rate_momentum_decay_and_norm(
    digits: ImageData, model_type: str, tile: dict[str, Any]
) -> None:
    together = [
        experiment(model_type=model_type, local_epochs=2, lr=lr, momentum=momentum, weight_decay=decay, max_grad_norm=m)
        for lr, momentum, decay, m in [
            (0.02, 0.9, 0.0, 1.0), (0.05, 0.0, 0.1, None), (0.01, 0.5, 0.01, 0.05), (0.1, 0.0, 0.0, 1e-3)
        ]
    ]  # fmt: skip
    expected = round_of(LoopTrainer(together[0], digits, dtype=torch.float64), digits, together, torch.float64)
    got = round_of(StackedTrainer(together[0], digits, **tile), digits, together, torch.float64)
    for ours, theirs in zip(got, expected, strict=True):
        assert difference(ours, theirs) <= 1e-10


def inputs_of(experiments: Sequence[Experiment], data: ImageData, dtype: torch.dtype = torch.float64) -> LaneInputs:
    layout = ModelShape.of(experiments[0], data).layout
    models = [build_model(each, data.num_classes, data.in_channels, data.img_size) for each in experiments]

    def setting(name: str) -> Tensor:
        values = [getattr(each, name) for each in experiments]
        return torch.tensor([float("inf") if value is None else value for value in values], dtype=torch.float64)

    return LaneInputs(
        weights=torch.stack([layout.flatten(model.state_dict()) for model in models]).to(dtype),
        labels=torch.stack([(data.train_labels + number) % data.num_classes for number in range(len(experiments))]),
        lr=setting("lr"),
        momentum=setting("momentum"),
        weight_decay=setting("weight_decay"),
        max_grad_norm=setting("max_grad_norm"),
    )


def orders(epochs: int, samples: int, seed: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(200)[:samples] for _ in range(epochs)])


@BOTH_MODELS
@EVERY_TILE
@pytest.mark.parametrize("samples", [[1, 9, 2], [8, 17, 16, 7], [1], [24, 1, 25, 10, 3]])
def test_last_batches_of_every_size(
    digits: ImageData, model_type: str, tile: dict[str, Any], samples: list[int]
) -> None:
    """Also of one sample, which is left out, at the end of any epoch; and clients of different numbers of steps."""
    together = [experiment(model_type=model_type, batch_size=8, seed=seed) for seed in range(4)]
    inputs = inputs_of(together, digits)
    works = [
        ClientWork.of((number % 4, (number + 1) % 4), (number, number), orders(2, count, seed=number))
        for number, count in enumerate(samples)
    ]
    expected = LoopTrainer(together[0], digits, dtype=torch.float64).train(inputs, works, len(samples)).weights
    got = StackedTrainer(together[0], digits, **tile).train(inputs, works, len(samples)).weights
    for work in works:
        for lane, slot in zip(work.lanes, work.slots, strict=True):
            assert largest_difference(got[lane, slot], expected[lane, slot]) <= 1e-10
            if work.order.shape[1] == 1:
                assert torch.equal(got[lane, slot], inputs.weights[lane])


@EVERY_TILE
def test_images_in_colour_of_an_odd_side(random_data: Any, tile: dict[str, Any]) -> None:
    data = random_data(channels=3, side=5, num_classes=4, train=200)
    together = [experiment(depth=6, batch_size=8, seed=seed) for seed in range(2)]
    works = [ClientWork.of((0, 1), (0, 0), orders(1, 20, seed=0))]
    inputs = inputs_of(together, data)
    expected = LoopTrainer(together[0], data, dtype=torch.float64).train(inputs, works, 1).weights
    got = StackedTrainer(together[0], data, **tile).train(inputs, works, 1).weights
    assert largest_difference(got, expected) <= 1e-9


@BOTH_MODELS
@EVERY_TILE
@pytest.mark.parametrize("depth", [0, 3])
def test_logits_are_those_of_the_loop(digits: ImageData, model_type: str, tile: dict[str, Any], depth: int) -> None:
    together = [experiment(model_type=model_type, depth=depth, seed=seed) for seed in range(5)]
    weights = inputs_of(together, digits).weights
    weights += 0.1 * torch.rand(weights.shape, generator=torch.Generator().manual_seed(1), dtype=weights.dtype)
    images = digits.test_images[:150]  # more than one chunk
    expected = LoopTrainer(together[0], digits, dtype=torch.float64).logits(weights, images)
    got = StackedTrainer(together[0], digits, **tile).logits(weights, images)
    assert got.shape == (5, 150, 10)
    assert largest_difference(got, expected) <= 1e-12


def test_threads_change_nothing(digits: ImageData) -> None:
    together = [experiment(alpha=0.5, seed=seed) for seed in (1, 1, 2)]
    one, two = (
        round_of(StackedTrainer(together[0], digits, lanes=2, threads=threads), digits, together, torch.float32)
        for threads in (1, 2)
    )
    for ours, theirs in zip(one, two, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------ independent of neighbours


@BOTH_MODELS
@EVERY_TILE
@pytest.mark.parametrize("width", [1, 3])
def test_an_experiment_alone_gives_the_bits_that_it_gives_among_others(
    digits: ImageData, model_type: str, tile: dict[str, Any], width: int
) -> None:
    """Alone, and in cohorts of neighbours in any order: of the same seed, so that they share tiles, and of others."""
    base = partial(experiment, model_type=model_type, width_factor=width, depth=3, alpha=0.5, poison_ratio=0.3)
    others = [
        *(base(lr=0.01 * (1 + number)) for number in range(5)),
        base(data_ordering="good_bad"),
        base(seed=5),
        base(seed=6, data_ordering="bad_good"),
    ]
    trainer = StackedTrainer(base(), digits, **tile)
    images = digits.test_images[:140]

    def outcome(cohort: Sequence[Experiment]) -> tuple[dict[str, Tensor], Tensor]:
        models = round_of(trainer, digits, cohort, torch.float32)
        layout = ModelShape.of(base(), digits).layout
        logits = trainer.logits(torch.stack([layout.flatten(model) for model in models]), images)
        place = list(cohort).index(base())
        return models[place], logits[place]

    alone, logits = outcome([base()])
    generator = np.random.default_rng(width)
    for _ in range(2):
        chosen = generator.permutation(len(others))[: generator.integers(1, len(others) + 1)]
        cohort = [others[number] for number in chosen]
        cohort.insert(int(generator.integers(len(cohort) + 1)), base())
        among, logits_among = outcome(cohort)
        assert all(torch.equal(among[name], alone[name]) for name in alone)
        assert torch.equal(logits, logits_among)


@BOTH_MODELS
@EVERY_TILE
def test_a_lane_that_diverges_leaves_the_others_alone(digits: ImageData, model_type: str, tile: dict[str, Any]) -> None:
    calm = [experiment(model_type=model_type, seed=7), experiment(model_type=model_type, seed=7, lr=0.01)]
    wild = experiment(model_type=model_type, seed=7, lr=1e30, max_grad_norm=None)
    works = [ClientWork.of((0, 1, 2), (number,) * 3, orders(2, 40 + 9 * number, seed=number)) for number in range(3)]
    trainer = StackedTrainer(calm[0], digits, **tile)
    quiet = trainer.train(inputs_of([calm[0], calm[0], calm[1]], digits, torch.float32), works, 3).weights
    disturbed = trainer.train(inputs_of([calm[0], wild, calm[1]], digits, torch.float32), works, 3).weights
    assert not disturbed[1].isfinite().all(dim=1).any(), "the wild one does diverge"
    assert torch.equal(disturbed[0], quiet[0])
    assert torch.equal(disturbed[2], quiet[2])


# ------------------------------------------------------------------------------------------------ precision and plans


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({}, "stacked grouped x16"),
        ({"kernel": "unfold", "lanes": 8}, "stacked unfold x8"),
        ({"lanes": 2, "works": 5}, "stacked grouped 5x2"),
        ({"precision": "tf32"}, "stacked grouped x16 tf32"),
        ({"precision": "bf16"}, "stacked grouped x16 bf16"),
    ],
)
def test_a_plan_says_how_its_numbers_come_about(digits: ImageData, options: dict[str, Any], plan: str) -> None:
    assert StackedTrainer(experiment(), digits, **options).plan == plan


@BOTH_MODELS
@EVERY_TILE
def test_bfloat16_comes_near(digits: ImageData, model_type: str, tile: dict[str, Any]) -> None:
    together = [experiment(model_type=model_type, depth=1)]
    exact, rounded = (
        round_of(StackedTrainer(together[0], digits, **tile, precision=precision), digits, together, torch.float32)
        for precision in ("float32", "bf16")
    )
    assert 1e-4 < difference(rounded[0], exact[0]) < 0.1


def test_rounding_to_tf32_is_left_as_it_was(digits: ImageData) -> None:
    matmul, before = torch.backends.cuda.matmul, torch.backends.cudnn.allow_tf32
    seen = []

    class Watching(StackedTrainer):
        def _apply(self, *arguments: Any) -> None:
            seen.append((matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    for precision in ("float32", "tf32", "bf16"):
        trainer = Watching(experiment(), digits, precision=precision)  # type: ignore[arg-type]
        trainer.logits(inputs_of([experiment()], digits).weights, digits.test_images[:2])
        assert (matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, before)
    assert seen == [(False, False), (True, True), (False, False)]


# --------------------------------------------------------------------------------------------------- the graphed step


def test_what_a_graph_captures_is_the_eager_step_over_the_buffers(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step goes through a function without arguments that was made before any data came."""
    runs = []

    def recorded(function: Any, device: torch.device) -> tuple[Any, bool]:
        assert function.func.__func__ is TileProgram.eager_step

        def replay() -> None:
            runs.append(function.keywords["masked"])
            function()

        return replay, True

    monkeypatch.setattr("fedsweep.fl.stacked_graph.captured", recorded)
    together = [experiment(batch_size=8)]
    inputs, works = inputs_of(together, digits), [ClientWork.of((0,), (0,), orders(2, 19, seed=0))]
    trainer = StackedTrainer(together[0], digits, lanes=2, static=True)
    expected = StackedTrainer(together[0], digits, lanes=2).train(inputs, works, 1).weights
    assert trainer.uses_graphs is None
    assert largest_difference(trainer.train(inputs, works, 1).weights, expected) <= 1e-12
    assert runs == [False, False, True] * 2, "two full batches and a padded one an epoch"
    assert trainer.uses_graphs is True


def test_without_a_gpu_there_is_no_graph(digits: ImageData) -> None:
    def function() -> None:
        raise AssertionError("nothing is to be run beforehand")

    assert captured(function, torch.device("cpu")) == (function, False)
    trainer = StackedTrainer(experiment(), digits, lanes=2, static=True)
    trainer.train(inputs_of([experiment()], digits), [ClientWork.of((0,), (0,), orders(1, 40, seed=0))], 1)
    assert trainer.uses_graphs is False
