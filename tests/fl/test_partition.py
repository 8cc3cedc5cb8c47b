from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsweep.errors import PartitionError
from fedsweep.fl.partition import PARTITIONS, partition_data_dirichlet, split_validation

METHODS = tuple(PARTITIONS)


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    """Labels with `counts` samples of each class, in random order."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(labels)


def class_counts(labels: np.ndarray, parts: list[np.ndarray], num_classes: int) -> np.ndarray:
    """Samples of each class that each client holds, [K, L]."""
    return np.array([np.bincount(labels[part], minlength=num_classes) for part in parts])


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(METHODS),
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0),
    num_clients=st.integers(1, 12),
    alpha=st.sampled_from([5e-324, 1e-300, 1e-3, 0.1, 1.0, 100.0, 1e9]),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_sample_goes_to_exactly_one_client(
    method: str, counts: list[int], num_clients: int, alpha: float, seed: int
) -> None:
    labels = labels_of(counts)
    try:
        parts = partition_data_dirichlet(labels, num_clients, alpha, seed=seed, min_client_size=1, method=method)
    except PartitionError:
        assert method == "dirichlet_class" or len(labels) < num_clients
        return
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all(part.tolist() == sorted(part.tolist()) and len(part) > 0 for part in parts)
    if method != "dirichlet_class":
        assert {len(part) for part in parts} <= {len(labels) // num_clients, -(-len(labels) // num_clients)}


@pytest.mark.parametrize("method", METHODS)
def test_a_partition_is_a_function_of_its_seed(method: str) -> None:
    labels = labels_of([100] * 10)

    def draw(seed: int) -> list[list[int]]:
        parts = partition_data_dirichlet(labels, 5, 1.0, seed=seed, method=method)
        return [part.tolist() for part in parts]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_partition_takes_labels_as_a_tensor_too() -> None:
    labels = labels_of([30] * 3)
    from_array = partition_data_dirichlet(labels, 3, 1.0, seed=1)
    from_tensor = partition_data_dirichlet(torch.from_numpy(labels), 3, 1.0, seed=1)
    assert [part.tolist() for part in from_array] == [part.tolist() for part in from_tensor]


def test_partitions_keep_their_values() -> None:
    """Rows that were computed once must come out again."""
    labels = labels_of([20, 20, 20])
    sizes = {}
    for method in METHODS:
        parts = partition_data_dirichlet(labels, 4, 1.0, seed=42, min_client_size=5, method=method)
        sizes[method] = class_counts(labels, parts, 3).tolist()
    assert sizes == {
        "dirichlet_class": [[4, 3, 7], [8, 4, 2], [4, 3, 10], [4, 10, 1]],
        "dirichlet_client": [[0, 9, 6], [2, 10, 3], [3, 1, 11], [15, 0, 0]],
        "iid": [[5, 5, 5], [4, 6, 5], [5, 4, 6], [6, 5, 4]],
    }


def test_every_client_has_the_least_size() -> None:
    labels = labels_of([200] * 10)

    def smallest(min_client_size: int) -> list[int]:
        return [
            min(
                len(part)
                for part in partition_data_dirichlet(labels, 10, 0.2, seed=seed, min_client_size=min_client_size)
            )
            for seed in range(20)
        ]

    assert min(smallest(60)) >= 60
    assert sum(size < 60 for size in smallest(1)) > 10  # a single draw seldom is enough


def test_a_least_size_that_just_fits_is_met() -> None:
    assert [len(part) for part in partition_data_dirichlet(labels_of([7, 5]), 1, 0.5, seed=1, min_client_size=12)] == [
        12
    ]


def test_an_alpha_that_cannot_work_says_what_to_change() -> None:
    labels = labels_of([10] * 10)  # at this alpha every class goes to one client: nobody has 11
    with pytest.raises(PartitionError) as caught:
        partition_data_dirichlet(labels, 9, 1e-6, seed=0, min_client_size=11)
    assert str(caught.value) == (
        "none of 1,000 draws with alpha=1e-06 divided 100 training samples among num_clients=9 clients so that each "
        "has min_client_size=11; raise alpha, or lower num_clients or min_client_size"
    )


def test_too_few_samples_for_the_least_size_say_so() -> None:
    with pytest.raises(PartitionError) as caught:
        partition_data_dirichlet(labels_of([33, 66]), 10, 1.0, seed=0, min_client_size=10)
    assert str(caught.value) == (
        "99 training samples are not enough to give each of num_clients=10 clients min_client_size=10; "
        "lower num_clients or min_client_size"
    )


@pytest.mark.parametrize("method", METHODS)
def test_fewer_samples_than_clients_say_so(method: str) -> None:
    with pytest.raises(PartitionError) as caught:
        partition_data_dirichlet([0, 1, 0], 4, 1.0, seed=0, method=method)
    assert str(caught.value) == "3 training samples cannot be divided among num_clients=4; lower num_clients"


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_class_shares_have_the_moments_of_the_dirichlet_distribution(alpha: float) -> None:
    """A share of Dir(alpha 1_K) has mean 1/K and variance (1/K)(1 - 1/K) / (K alpha + 1).

    Every one of 400 classes is a draw of its own; the bounds are four standard errors and more.
    """
    num_classes, size, num_clients = 400, 300, 5
    labels = labels_of([size] * num_classes)
    parts = partition_data_dirichlet(labels, num_clients, alpha, seed=3, min_client_size=1)
    shares = class_counts(labels, parts, num_classes) / size  # [K, L]
    variance = (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
    assert shares.sum(axis=0) == pytest.approx(np.ones(num_classes))
    assert shares.mean(axis=1) == pytest.approx(
        np.full(num_clients, 1 / num_clients), abs=4.5 * (variance / 400) ** 0.5
    )
    assert shares.var(axis=1).mean() == pytest.approx(variance, rel=0.12)


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_client_mixes_have_the_moments_of_the_dirichlet_distribution(alpha: float) -> None:
    """A share among n samples of a mix q ~ Dir(alpha p) has mean p and variance p (1-p) / (1+alpha) * (1 + alpha/n).

    (The Dirichlet-multinomial distribution.) The first of 50 clients takes so little that no class runs out.
    """
    labels = labels_of([2_500, 1_500, 1_000])
    prior, size, draws = np.array([0.5, 0.3, 0.2]), 100, 300
    first = [
        partition_data_dirichlet(labels, 50, alpha, seed=seed, method="dirichlet_client")[0] for seed in range(draws)
    ]
    mixes = class_counts(labels, first, 3) / size
    variance = prior * (1 - prior) / (1 + alpha) * (1 + alpha / size)
    assert (np.abs(mixes.mean(axis=0) - prior) < 4.5 * (variance / draws) ** 0.5).all()
    assert mixes.var(axis=0) == pytest.approx(variance, rel=0.25)


@pytest.mark.parametrize("method", ["dirichlet_class", "dirichlet_client"])
def test_a_large_alpha_is_nearly_iid_and_a_small_one_is_not(method: str) -> None:
    labels = labels_of([500] * 10)

    def largest_share(alpha: float) -> float:
        """The share of a client's most frequent class, over the clients."""
        parts = partition_data_dirichlet(labels, 10, alpha, seed=5, min_client_size=10, method=method)
        counts = class_counts(labels, parts, 10)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert largest_share(1e6) < 0.15  # iid: 0.1 and the noise of 500 samples
    assert largest_share(0.1) > 0.45


def test_iid_does_not_look_at_classes() -> None:
    one = partition_data_dirichlet(labels_of([30, 30]), 4, 1.0, seed=9, method="iid")
    other = partition_data_dirichlet(labels_of([1, 59]), 4, 1e-3, seed=9, method="iid")
    assert [part.tolist() for part in one] == [part.tolist() for part in other]


def test_equal_clients_take_from_other_classes_when_theirs_run_out() -> None:
    """At a tiny alpha every client wants one class only; 7 clients share 3 classes, so some must take what is left."""
    labels = labels_of([70, 7, 7])
    parts = partition_data_dirichlet(labels, 7, 1e-6, seed=1, method="dirichlet_client")
    assert [len(part) for part in parts] == [12] * 7
    assert class_counts(labels, parts, 3).sum(axis=0).tolist() == [70, 7, 7]


def test_validation_is_a_random_share_and_disjoint() -> None:
    training, validation = split_validation(1437, 0.1, seed=42)
    assert len(validation) == 144  # 143.7
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(1437))
    assert split_validation(1437, 0.1, seed=42)[1].tolist() == validation.tolist()
    assert split_validation(1437, 0.1, seed=43)[1].tolist() != validation.tolist()
    assert set(validation.tolist()) <= set(split_validation(1437, 0.2, seed=42)[1].tolist())
    assert 600 < validation.mean() < 840  # not the first or the last samples: 718 ± 3 standard errors of 34


@pytest.mark.parametrize(("share", "count"), [(0.04, 0), (0.96, 10)])
def test_a_split_that_leaves_a_side_empty_is_refused(share: float, count: int) -> None:
    with pytest.raises(PartitionError) as caught:
        split_validation(10, share, seed=0)
    assert str(caught.value) == (
        f"validation_split={share} of 10 samples leaves {count} for validation and {10 - count} for training; "
        "choose it so that both have some"
    )
