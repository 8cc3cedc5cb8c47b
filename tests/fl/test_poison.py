"""Attacks: nested sets, the wanted labels, counts, and no dependence on what must not matter."""

from __future__ import annotations

import numpy as np
import pytest

from fedsweep.fl.poison import malicious_clients, poison
from fedsweep.plan.experiment import Experiment

LABELS = np.arange(1_000) * 7 % 10
CLIENTS = np.array_split(np.random.default_rng(0).permutation(1_000), 8)


def attack(**parameters: object):
    return poison(Experiment(num_clients=8, **parameters), LABELS, CLIENTS, 10)


def test_label_flip_by_hand():
    flipped = attack(poison_ratio=1.0)
    assert flipped.labels[:5].tolist() == [9, 2, 5, 8, 1]  # of 0 7 4 1 8
    assert (flipped.poisoned_clients, flipped.poisoned_samples) == (8, 1_000)


def test_targeted_flip_changes_one_class_only():
    targeted = attack(poison_ratio=1.0, target_class=4, poison_label=0)
    assert (targeted.labels == np.where(LABELS == 4, 0, LABELS)).all()
    assert targeted.poisoned_samples == 100


def test_random_labels_are_uniform_over_the_other_labels():
    """chi-square over 9 labels, 8 degrees of freedom, 0.1 % level."""
    offsets = np.concatenate(
        [(attack(poison_ratio=1.0, poison_type="random_noise", seed=s).labels - LABELS) % 10 for s in range(9)]
    )
    counts = np.bincount(offsets, minlength=10)
    assert counts[0] == 0
    assert ((counts[1:] - 1_000) ** 2 / 1_000).sum() < 26.12


@pytest.mark.parametrize("kind", ["label_flip", "random_noise"])
@pytest.mark.parametrize("level", ["sample", "client"])
def test_what_is_poisoned_at_a_smaller_ratio_is_poisoned_alike_at_a_larger(kind, level):
    before = attack(poison_ratio=0.0, poison_type=kind, poison_level=level)
    assert not before.is_poisoned.any()
    for ratio in (0.1, 0.25, 0.5, 0.75, 1.0):
        now = attack(poison_ratio=ratio, poison_type=kind, poison_level=level)
        assert now.is_poisoned[before.is_poisoned].all()
        assert (now.labels[before.is_poisoned] == before.labels[before.is_poisoned]).all()
        assert (now.labels[~now.is_poisoned] == LABELS[~now.is_poisoned]).all()
        assert now.poisoned_samples > before.poisoned_samples
        before = now


def test_each_client_poisons_its_share_of_its_own_samples():
    poisoned = attack(poison_ratio=0.3)
    assert [int(poisoned.is_poisoned[own].sum()) for own in CLIENTS] == [38] * 8  # 37.5 of 125, half up
    assert poisoned.poisoned_clients == 8


def test_malicious_clients_poison_everything_and_the_others_nothing():
    poisoned = attack(poison_ratio=0.3, poison_level="client")
    assert len(poisoned.malicious) == poisoned.poisoned_clients == 2  # 2.4 of 8
    for client, own in enumerate(CLIENTS):
        assert poisoned.is_poisoned[own].all() == (client in poisoned.malicious)
        assert poisoned.is_poisoned[own].any() == (client in poisoned.malicious)


def test_malicious_clients_are_rounded_half_up():
    counts = [
        len(malicious_clients(Experiment(num_clients=10, poison_ratio=r))) for r in (0.04, 0.05, 0.15, 0.25, 0.35)
    ]
    assert counts == [0, 1, 2, 3, 4]


def test_a_malicious_client_without_the_target_class_is_no_poisoned_client():
    labels = np.repeat([1, 2], 10)
    clients = [np.arange(10), np.arange(10, 20)]
    experiment = Experiment(num_clients=2, poison_ratio=1.0, poison_level="client", target_class=1, poison_label=0)
    poisoned = poison(experiment, labels, clients, 3)
    assert (poisoned.poisoned_clients, poisoned.poisoned_samples) == (1, 10)


def test_the_true_labels_are_left_alone():
    before = LABELS.copy()
    attack(poison_ratio=1.0)
    assert (before == LABELS).all()
