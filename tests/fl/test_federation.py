"""Who validates and who holds what, together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedsweep.errors import PartitionError
from fedsweep.fl.data import ImageData
from fedsweep.fl.federation import Federation, form_federation
from fedsweep.plan.experiment import Experiment


def test_every_training_image_validates_or_belongs_to_one_client(digits: ImageData) -> None:
    for partition in ("dirichlet_class", "dirichlet_client", "iid"):
        federation = form_federation(Experiment(num_clients=7, partition=partition), digits)
        positions = np.concatenate([federation.validation, *federation.clients])
        assert len(federation.validation) == 144  # 143.7
        assert sorted(positions.tolist()) == list(range(1437))


def test_classes_are_divided_by_the_labels_of_the_training_images(digits: ImageData) -> None:
    """At a tiny alpha every class belongs to a single client: the first of images and labels must match."""
    labels = digits.train_labels.numpy()
    federation = form_federation(Experiment(num_clients=3, alpha=1e-6), digits)
    held = [set(labels[own].tolist()) for own in federation.clients]
    assert sum(map(len, held)) == 10
    assert set.union(*held) == set(range(10))


def test_split_and_partition_have_seeds_of_their_own(digits: ImageData) -> None:
    def form(**seeds: int) -> Federation:
        return form_federation(Experiment(num_clients=4, poison_ratio=0.3, **seeds), digits)

    def same(one: Federation, other: Federation) -> tuple[bool, bool]:
        clients = zip(one.clients, other.clients, strict=True)
        return (
            np.array_equal(one.validation, other.validation),
            all(np.array_equal(mine, theirs) for mine, theirs in clients),
        )

    base = form(seed=1)
    assert same(base, form(seed=1, split_seed=1, partition_seed=1)) == (True, True)
    assert same(base, form(seed=2)) == (False, False)
    assert same(base, form(seed=1, partition_seed=2)) == (True, False)
    assert same(base, form(seed=1, split_seed=2)) == (False, False)
    held = form(seed=1, split_seed=42, partition_seed=42), form(seed=2, split_seed=42, partition_seed=42)
    assert same(*held) == (True, True)
    assert not np.array_equal(held[0].poisoning.poisoned, held[1].poisoning.poisoned)


def test_the_division_does_not_depend_on_the_attack(digits: ImageData) -> None:
    clean = form_federation(Experiment(num_clients=4), digits)
    for attack in ({"poison_level": "client"}, {"poison_type": "random_noise"}, {"target_class": 1, "poison_label": 2}):
        attacked = form_federation(Experiment(num_clients=4, poison_ratio=0.5, aggregator="median", **attack), digits)
        assert np.array_equal(attacked.validation, clean.validation)
        assert all(np.array_equal(*pair) for pair in zip(attacked.clients, clean.clients, strict=True))


def test_a_validation_share_that_leaves_no_image_is_refused(random_data: Callable[..., ImageData]) -> None:
    with pytest.raises(PartitionError, match=r"validation_split=0\.001 of 300 samples leaves 0 for validation"):
        form_federation(Experiment(validation_split=0.001), random_data())
