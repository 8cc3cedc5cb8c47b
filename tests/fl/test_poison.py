from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedsweep.fl.poison import Poisoning, malicious_clients, poison, wanted_labels
from fedsweep.plan.experiment import Experiment

# Ten classes, dealt to eight clients of 125 samples each, none of which has its samples in the order of the whole set.
LABELS = np.arange(1_000) * 7 % 10
CLIENTS = np.array_split(np.random.default_rng(0).permutation(1_000), 8)
TARGET = {"target_class": 4, "poison_label": 0}


def attack(clients: Sequence[np.ndarray] = CLIENTS, **parameters: object) -> Poisoning:
    return poison(Experiment(num_clients=len(clients), **parameters), LABELS, clients, 10)


def test_label_flip_by_hand() -> None:
    flip = Experiment(poison_ratio=1.0)
    assert wanted_labels(flip, np.arange(10), 10).tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert wanted_labels(flip, np.arange(5), 5).tolist() == [4, 3, 2, 1, 0]
    assert attack(poison_ratio=1.0).labels[:5].tolist() == [9, 2, 5, 8, 1]  # of 0 7 4 1 8


def test_targeted_label_flip_by_hand() -> None:
    flip = Experiment(poison_ratio=1.0, target_class=1, poison_label=3)
    assert wanted_labels(flip, np.array([0, 1, 2, 3, 1]), 5).tolist() == [0, 3, 2, 3, 3]


@pytest.mark.parametrize("level", ["sample", "client"])
def test_a_targeted_flip_takes_one_class_only(level: str) -> None:
    poisoning = attack(poison_ratio=1.0, poison_level=level, **TARGET)
    assert poisoning.labels.tolist() == np.where(LABELS == 4, 0, LABELS).tolist()
    assert (poisoning.poisoned_clients, poisoning.poisoned_samples) == (8, 100)


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0), (0.1, 13), (0.3, 38), (0.5, 63), (0.9, 113), (1.0, 125)])
def test_at_sample_level_every_client_poisons_its_share(ratio: float, share: int) -> None:
    """Of 125 samples: 12.5, 37.5, 62.5 and 112.5, halves up."""
    poisoning = attack(poison_ratio=ratio)
    assert [int(poisoning.poisoned[own].sum()) for own in CLIENTS] == [share] * 8
    assert (poisoning.poisoned_clients, poisoning.poisoned_samples) == (8 if share else 0, 8 * share)


def test_a_targeted_flip_counts_the_share_of_the_target_class() -> None:
    poisoning = attack(poison_ratio=0.5, **TARGET)
    for own in CLIENTS:
        targets = own[LABELS[own] == 4]
        assert poisoning.poisoned[own].sum() == poisoning.poisoned[targets].sum() == (len(targets) + 1) // 2


@pytest.mark.parametrize(
    ("ratio", "num_clients", "expected"),
    [
        (0.04, 10, 0),
        (0.05, 10, 1),
        (0.15, 10, 2),
        (0.25, 10, 3),
        (0.35, 10, 4),
        (1.0, 10, 10),
        (0.5, 1, 1),
        (0.3, 8, 2),
    ],
)
def test_the_number_of_malicious_clients_is_rounded_half_up(ratio: float, num_clients: int, expected: int) -> None:
    assert len(malicious_clients(1, num_clients, ratio)) == expected


def test_malicious_clients_poison_everything_and_the_others_nothing() -> None:
    poisoning = attack(poison_ratio=0.3, poison_level="client")
    shares = [float(poisoning.poisoned[own].mean()) for own in CLIENTS]
    assert sorted(shares) == [0.0] * 6 + [1.0] * 2
    assert [client for client, share in enumerate(shares) if share] == malicious_clients(42, 8, 0.3).tolist()
    assert (poisoning.poisoned_clients, poisoning.poisoned_samples) == (2, 250)


def test_a_malicious_client_without_the_target_class_is_no_poisoned_client() -> None:
    by_class = [np.flatnonzero(LABELS == 4), np.flatnonzero(LABELS != 4)]
    poisoning = attack(by_class, poison_ratio=1.0, poison_level="client", **TARGET)
    assert (poisoning.poisoned_clients, poisoning.poisoned_samples) == (1, 100)


@pytest.mark.parametrize("level", ["sample", "client"])
@pytest.mark.parametrize("kind", [{}, TARGET, {"poison_type": "random_noise"}])
def test_what_is_poisoned_at_a_smaller_ratio_is_poisoned_alike_at_a_larger(level: str, kind: dict[str, object]) -> None:
    smaller = attack(poison_ratio=0.0, poison_level=level, **kind)
    assert not smaller.poisoned.any()
    for ratio in (0.1, 0.25, 0.4, 0.5, 0.75, 1.0):
        larger = attack(poison_ratio=ratio, poison_level=level, **kind)
        assert larger.poisoned_samples > smaller.poisoned_samples
        assert larger.poisoned[smaller.poisoned].all()
        assert (larger.labels[smaller.poisoned] == smaller.labels[smaller.poisoned]).all()
        assert (larger.labels[~larger.poisoned] == LABELS[~larger.poisoned]).all()
        smaller = larger


def test_who_is_poisoned_does_not_depend_on_the_kind_of_attack() -> None:
    for level in ("sample", "client"):
        flip = attack(poison_ratio=0.3, poison_level=level)
        noise = attack(poison_ratio=0.3, poison_level=level, poison_type="random_noise")
        assert (flip.poisoned == noise.poisoned).all()


def test_random_noise_is_the_same_at_both_levels_and_for_every_partition() -> None:
    noise = {"poison_ratio": 1.0, "poison_type": "random_noise"}
    expected = attack(**noise).labels.tolist()
    assert attack(poison_level="client", **noise).labels.tolist() == expected
    assert attack([np.arange(500), np.arange(500, 1_000)], **noise).labels.tolist() == expected
    assert attack(seed=1, **noise).labels.tolist() != expected


def test_random_noise_is_uniform_over_the_other_labels() -> None:
    """Chi-square over nine offsets: below the 99.9th percentile for 8 degrees of freedom (26.1)."""
    labels = np.arange(90_000) % 10
    experiment = Experiment(num_clients=1, poison_ratio=1.0, poison_type="random_noise")
    noisy = poison(experiment, labels, [np.arange(90_000)], 10).labels
    assert noisy.min() == 0
    assert noisy.max() == 9
    counts = np.bincount((noisy - labels) % 10, minlength=10)
    assert counts[0] == 0
    assert ((counts[1:] - 10_000) ** 2 / 10_000).sum() < 26.1


def test_with_two_classes_random_noise_is_the_other_one() -> None:
    labels = np.array([0, 1, 1, 0])
    experiment = Experiment(num_clients=1, poison_ratio=1.0, poison_type="random_noise")
    assert poison(experiment, labels, [np.arange(4)], 2).labels.tolist() == [1, 0, 0, 1]


def test_the_middle_of_an_odd_number_of_classes_keeps_its_label_and_counts() -> None:
    labels = np.array([0, 1, 2])
    poisoning = poison(Experiment(num_clients=1, poison_ratio=1.0), labels, [np.arange(3)], 3)
    assert poisoning.labels.tolist() == [2, 1, 0]
    assert poisoning.poisoned_samples == 3


def test_poisoned_samples_are_drawn_at_random_and_by_client() -> None:
    poisoning = attack(poison_ratio=0.5)
    places = [tuple(poisoning.poisoned[own].tolist()) for own in CLIENTS]
    assert len(set(places)) == 8
    assert tuple([True] * 63 + [False] * 62) not in places
    assert attack(poison_ratio=0.5, seed=1).poisoned.tolist() != poisoning.poisoned.tolist()


def test_samples_outside_the_clients_and_the_labels_given_are_left_alone() -> None:
    before = LABELS.copy()
    clients = [np.arange(100, 300), np.arange(500, 600)]
    for level in ("sample", "client"):
        poisoning = attack(clients, poison_ratio=1.0, poison_level=level)
        assert np.flatnonzero(poisoning.poisoned).tolist() == [*range(100, 300), *range(500, 600)]
        assert (poisoning.labels == before).tolist() == (~poisoning.poisoned).tolist()
    assert (before == LABELS).all()


def test_attacks_keep_their_values() -> None:
    """Rows that were computed once must come out again."""
    assert malicious_clients(42, 10, 0.3).tolist() == [2, 5, 6]
    assert np.flatnonzero(attack(poison_ratio=0.01).poisoned).tolist() == [150, 299, 461, 684, 685, 749, 808, 866]
    assert attack(poison_ratio=1.0, poison_type="random_noise").labels[:10].tolist() == [2, 3, 3, 2, 1, 1, 9, 8, 9, 7]
