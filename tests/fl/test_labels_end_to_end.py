"""Every image carries its number in its pixels, and is followed to where the training step receives it.

What is expected is worked out here, from the true labels and the parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fedsweep.fl import reference
from fedsweep.fl.data import ImageData
from fedsweep.fl.outcome import Outcome
from fedsweep.plan.experiment import Experiment

Pairs = list[tuple[int, int]]  # numbers of images, and the labels that came with them

# With these no client ends an epoch with a batch of one sample, which would be left out and so stay unseen.
CLIENTS, ROUNDS, EPOCHS, BATCH_SIZE, RATIO = 5, 2, 2, 20, 0.4
KINDS = ("digits", "mnist", "cifar10", "cifar100", "seven classes")
ATTACKS: dict[str, dict[str, object]] = {
    "label_flip": {"poison_type": "label_flip"},
    "targeted": {"poison_type": "label_flip", "target_class": 1, "poison_label": 4},
    "random_noise": {"poison_type": "random_noise"},
}
SMALL = {
    "model_type": "lr",
    "depth": 0,
    "num_clients": CLIENTS,
    "global_rounds": ROUNDS,
    "local_epochs": EPOCHS,
    "batch_size": BATCH_SIZE,
}


def numbered(images: Tensor, first: int) -> Tensor:
    """The images with the numbers `first`, `first` + 1, … written into their first two bytes."""
    numbers = torch.arange(first, first + len(images))
    images = images.clone()
    images[:, 0, 0, 0] = (numbers % 256).to(torch.uint8)
    images[:, 0, 0, 1] = (numbers // 256).to(torch.uint8)
    return images


def numbers_in(images: Tensor) -> list[int]:
    """The numbers of images, be they bytes or as a model receives them."""
    if images.is_floating_point():
        images = ((images * 0.5 + 0.5) * 255).round()
    low, high = images[:, 0, 0, 0].long(), images[:, 0, 0, 1].long()
    return (low + 256 * high).tolist()


@pytest.fixture(scope="module")
def data_of_kind(digits: ImageData, random_data: Callable[..., ImageData]) -> dict[str, ImageData]:
    """Data of every shape, the real digits among them. Training images are numbered from 0, then the test images."""
    kinds = {
        "digits": digits,
        "mnist": random_data(side=28, train=210),
        "cifar10": random_data(channels=3, side=32, train=210),
        "cifar100": random_data(num_classes=100, channels=3, side=32, train=310),
        "seven classes": random_data(num_classes=7, train=260),
    }
    return {
        kind: replace(
            data,
            train_images=numbered(data.train_images, 0),
            test_images=numbered(data.test_images, len(data.train_images)),
        )
        for kind, data in kinds.items()
    }


@dataclass
class Observed:
    """An experiment, and what its training steps and evaluations received."""

    experiment: Experiment
    data: ImageData
    outcome: Outcome
    training: list[Pairs] = field(default_factory=list)  # for each round and, within it, client
    evaluations: list[Pairs] = field(default_factory=list)

    @cached_property
    def truth(self) -> dict[int, int]:
        """The true label of every training image."""
        return dict(enumerate(self.data.train_labels.tolist()))

    @cached_property
    def labels(self) -> dict[int, int]:
        """The label that training saw of every image."""
        return {number: label for pairs in self.training for number, label in pairs}

    @cached_property
    def samples(self) -> list[set[int]]:
        """For each client the images that it trained on."""
        return [
            {number for pairs in self.training[client::CLIENTS] for number, _ in pairs} for client in range(CLIENTS)
        ]

    @cached_property
    def candidates(self) -> list[set[int]]:
        """For each client those of its images that the attack is after."""
        if not self.experiment.is_targeted:
            return self.samples
        return [
            {number for number in own if self.truth[number] == self.experiment.target_class} for own in self.samples
        ]

    @cached_property
    def middle(self) -> set[int]:
        """Images whose label a flip would leave as it is: no label can tell whether they are poisoned."""
        if self.experiment.is_targeted or self.experiment.poison_type == "random_noise":
            return set()
        return {number for number, label in self.truth.items() if 2 * label == self.data.num_classes - 1}

    @cached_property
    def relabelled(self) -> set[int]:
        """The images that training saw with another label than their own."""
        return {number for number, label in self.labels.items() if label != self.truth[number]}


def observe(experiment: Experiment, data: ImageData, finish: Callable[..., Outcome]) -> Observed:
    """Run an experiment, looking over the shoulder of the training step and of the evaluation."""
    training: list[Pairs] = []
    evaluations: list[Pairs] = []
    train, evaluate = reference.train_client, reference.evaluate_model

    def watched_training(model: nn.Module, loader: Iterable[reference.Batch], experiment: Experiment) -> None:
        pairs: Pairs = []
        training.append(pairs)

        def watched() -> Iterator[reference.Batch]:
            for images, labels in loader:
                pairs.extend(zip(numbers_in(images), labels.tolist(), strict=True))
                yield images, labels

        train(model, watched(), experiment)

    def watched_evaluation(model: nn.Module, images: Tensor, labels: Tensor) -> object:
        evaluations.append(list(zip(numbers_in(images), labels.tolist(), strict=True)))
        return evaluate(model, images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "train_client", watched_training)
        patch.setattr(reference, "evaluate_model", watched_evaluation)
        outcome = finish(experiment, data)
    return Observed(experiment, data, outcome, training, evaluations)


@pytest.fixture(
    scope="module",
    params=list(product(KINDS, ATTACKS, ("sample", "client"), ("shuffle", "good_bad", "bad_good"))),
    ids="-".join,
)
def observed(
    request: pytest.FixtureRequest, data_of_kind: dict[str, ImageData], finish: Callable[..., Outcome]
) -> Observed:
    kind, attack, level, ordering = request.param
    attacked = {"poison_ratio": RATIO, "poison_level": level, "data_ordering": ordering, **ATTACKS[attack]}
    return observe(Experiment(**SMALL, **attacked), data_of_kind[kind], finish)


def half_up(number: float) -> int:
    return math.floor(number + 0.5)


def test_every_label_is_the_images_own_or_the_one_that_the_attack_wants_for_it(observed: Observed) -> None:
    for number in observed.relabelled:
        truth, label = observed.truth[number], observed.labels[number]
        if observed.experiment.is_targeted:
            assert (truth, label) == (1, 4)
        elif observed.experiment.poison_type == "label_flip":
            assert label == observed.data.num_classes - 1 - truth
        else:
            assert 0 <= label < observed.data.num_classes


def test_an_image_has_one_label_in_all_rounds_and_epochs(observed: Observed) -> None:
    for pairs in observed.training:
        assert all(observed.labels[number] == label for number, label in pairs)


def test_validation_and_test_are_untouched_and_nobody_trains_on_them(observed: Observed) -> None:
    *validated, tested = observed.evaluations
    assert len(validated) == ROUNDS
    assert all(pairs == validated[0] for pairs in validated)
    held_out = dict(validated[0])
    assert all(observed.truth[number] == label for number, label in held_out.items())
    assert len(held_out) == len(validated[0]) == half_up(0.1 * len(observed.truth))
    test_numbers = range(len(observed.truth), len(observed.truth) + len(observed.data.test_labels))
    assert tested == list(zip(test_numbers, observed.data.test_labels.tolist(), strict=True))
    assert set(observed.labels) == set(observed.truth) - set(held_out), "all others are trained on"


def test_an_image_belongs_to_one_client(observed: Observed) -> None:
    assert len(observed.training) == CLIENTS * ROUNDS
    assert sum(map(len, observed.samples)) == len(observed.labels)


def test_as_many_samples_are_poisoned_as_the_ratio_says(observed: Observed) -> None:
    wanted = {}  # the number of poisoned samples of each client
    if observed.experiment.poison_level == "client":
        malicious = {client for client in range(CLIENTS) if observed.samples[client] & observed.relabelled}
        nothing_to_poison = sum(not own for own in observed.candidates)
        assert 2 - nothing_to_poison <= len(malicious) <= half_up(RATIO * CLIENTS) == 2
        wanted = {client: len(observed.candidates[client]) if client in malicious else 0 for client in range(CLIENTS)}
    else:
        wanted = {client: half_up(RATIO * len(observed.candidates[client])) for client in range(CLIENTS)}
    for client, count in wanted.items():
        seen = len(observed.samples[client] & observed.relabelled)
        assert count - len(observed.candidates[client] & observed.middle) <= seen <= count
    assert observed.outcome.poisoned_samples == sum(wanted.values())
    assert observed.outcome.poisoned_clients == sum(count > 0 for count in wanted.values())


def test_the_order_within_each_local_epoch_is_the_one_asked_for(observed: Observed) -> None:
    ordering = observed.experiment.data_ordering
    unsorted = 0
    for client, pairs in enumerate(observed.training):
        size = len(observed.samples[client % CLIENTS])
        epochs = [[number for number, _ in pairs[start : start + size]] for start in range(0, len(pairs), size)]
        assert len(epochs) == EPOCHS
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]
        for epoch in epochs:
            flags = [number in observed.relabelled for number in epoch if number not in observed.middle]
            if ordering == "good_bad":
                assert flags == sorted(flags)
            elif ordering == "bad_good":
                assert flags == sorted(flags, reverse=True)
            unsorted += flags not in (sorted(flags), sorted(flags, reverse=True))
    one_kind_each = observed.experiment.poison_level == "client" and not observed.experiment.is_targeted
    if ordering != "shuffle" or one_kind_each:
        assert unsorted == 0
    elif len(observed.relabelled) > 10:
        assert unsorted > 0


@pytest.mark.parametrize(
    "other",
    [
        {"poison_ratio": 0.4},
        {"poison_ratio": 0.4, "poison_level": "client"},
        {"poison_ratio": 0.2, "poison_type": "random_noise"},
        {"poison_ratio": 0.4, "target_class": 1, "poison_label": 4},
        {"aggregator": "median"},
        {"lr": 0.5, "momentum": 0.0, "max_grad_norm": None},
        {"model_type": "cnn", "width_factor": 3},
    ],
)
def test_experiments_of_one_seed_see_the_same_images_in_the_same_batches(
    other: dict[str, object], data_of_kind: dict[str, ImageData], finish: Callable[..., Outcome]
) -> None:
    base = {**SMALL, "fraction_fit": 0.6}
    one = observe(Experiment(**base), data_of_kind["mnist"], finish)
    two = observe(Experiment(**{**base, **other}), data_of_kind["mnist"], finish)
    numbers = [[[number for number, _ in pairs] for pairs in each.training] for each in (one, two)]
    assert len(numbers[0]) == 3 * ROUNDS
    assert numbers[0] == numbers[1]
    assert (one.training != two.training) == ("poison_ratio" in other), "labels differ where there is an attack"


@pytest.mark.parametrize("level", ["sample", "client"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_poisoned_at_a_smaller_ratio_is_poisoned_alike_at_a_larger(
    attack: str, level: str, data_of_kind: dict[str, ImageData], finish: Callable[..., Outcome]
) -> None:
    smaller: dict[int, int] = {}
    for ratio in (0.2, 0.6, 1.0):
        attacked = {"poison_ratio": ratio, "poison_level": level, **ATTACKS[attack]}
        now = observe(Experiment(**SMALL, **attacked), data_of_kind["mnist"], finish)
        larger = {number: now.labels[number] for number in now.relabelled}
        assert len(larger) > len(smaller)
        assert larger.items() >= smaller.items()
        smaller = larger
