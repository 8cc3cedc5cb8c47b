"""Who holds what: every sample once, the asked-for spread, and errors that say what cannot work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsweep.errors import PartitionError
from fedsweep.fl.partition import PARTITIONS, partition_data_dirichlet, split_validation

LABELS = np.arange(6_000) % 10


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(sorted(PARTITIONS)),
    num_clients=st.integers(1, 12),
    alpha=st.sampled_from([0.05, 0.5, 5.0, 1e6]),
    seed=st.integers(0, 2**63 - 1),
    num_samples=st.integers(12, 400),
)
def test_every_sample_goes_to_exactly_one_client(method, num_clients, alpha, seed, num_samples):
    labels = (np.arange(num_samples) * 7) % 5
    clients = partition_data_dirichlet(labels, num_clients, alpha, seed, min_client_size=0, method=method)
    assert len(clients) == num_clients
    assert np.array_equal(np.sort(np.concatenate(clients)), np.arange(num_samples))


@pytest.mark.parametrize("method", ["dirichlet_client", "iid"])
def test_equal_sizes_where_they_are_promised(method):
    sizes = [len(own) for own in partition_data_dirichlet(LABELS, 7, 0.1, 3, method=method)]
    assert max(sizes) - min(sizes) <= 1


def test_every_client_has_the_least_size():
    for seed in range(20):
        clients = partition_data_dirichlet(LABELS, 10, 0.1, seed, min_client_size=10)
        assert min(map(len, clients)) >= 10


def test_shares_of_a_class_have_the_moments_of_the_dirichlet_distribution():
    """p ~ Dir(alpha * 1_K): E p = 1/K, Var p = (K-1) / (K^2 (K alpha + 1)); 4,000 draws of each."""
    num_clients, alpha = 4, 0.5
    shares = []
    for seed in range(400):
        clients = partition_data_dirichlet(LABELS, num_clients, alpha, seed, min_client_size=1)
        shares += [[(LABELS[own] == label).sum() / 600 for own in clients] for label in range(10)]
    shares = np.array(shares)
    expected = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    assert shares.mean(axis=0) == pytest.approx(np.full(4, 0.25), abs=0.015)
    assert shares.var() == pytest.approx(expected, rel=0.05)


def test_class_mix_of_a_client_has_the_moments_of_the_dirichlet_distribution():
    """The first client draws from full classes: q ~ Dir(alpha * prior), so E q = prior, Var q = p(1-p)/(alpha+1)."""
    labels = np.repeat([0, 1], [3_000, 9_000])
    first = [
        (labels[partition_data_dirichlet(labels, 20, 2.0, seed, method="dirichlet_client")[0]] == 0).mean()
        for seed in range(1_500)
    ]
    sampling = 0.25 * 0.75 / 600  # the client's own samples are drawn from q
    assert np.mean(first) == pytest.approx(0.25, abs=0.02)
    assert np.var(first) == pytest.approx(0.25 * 0.75 / 3 + sampling, rel=0.1)


def test_large_alpha_approaches_iid_and_small_alpha_does_not():
    def spread(alpha: float) -> float:
        clients = partition_data_dirichlet(LABELS, 10, alpha, 1)
        return float(np.std([np.bincount(LABELS[own], minlength=10) / len(own) for own in clients], axis=0).mean())

    assert spread(1e6) < 0.005 < 0.1 < spread(0.1)


def test_what_cannot_work_is_said():
    with pytest.raises(PartitionError) as caught:
        partition_data_dirichlet(LABELS[:100], 20, 0.1, 1, min_client_size=10)
    assert str(caught.value) == (
        "in 1000 draws with alpha=0.1 no division of 100 training samples among 20 clients gave each at least "
        "min_client_size=10; raise alpha, or lower num_clients or min_client_size"
    )
    with pytest.raises(PartitionError, match="3 training samples cannot be divided among 4 clients"):
        partition_data_dirichlet(LABELS[:3], 4, 1.0, 1, method="iid")


def test_validation_and_training_share_nothing_and_miss_nothing():
    training, validation = split_validation(1_437, 0.1, 42)
    assert len(validation) == 144
    assert np.array_equal(np.sort(np.concatenate([training, validation])), np.arange(1_437))
    assert not np.array_equal(validation, split_validation(1_437, 0.1, 43)[1])
