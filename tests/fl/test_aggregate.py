from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsweep.fl import fed_avg, fed_median
from fedsweep.fl.aggregate import AGGREGATORS, is_finite

NAN, INF = float("nan"), float("inf")


def states(*rows: list[float]) -> list[dict[str, Tensor]]:
    """One client for each row of weights; client k has seen 10 k batches."""
    return [{"w": torch.tensor(row), "seen": torch.tensor(10 * k)} for k, row in enumerate(rows, start=1)]


def test_fedavg_weighs_by_sample_counts() -> None:
    """(1 * 1 + 2 * 2 + 5 * 4) / 8 = 3.125 and (0 + 2 * 8 + 5 * (-2)) / 8 = 0.75."""
    assert fed_avg(states([1.0, 0.0], [2.0, 8.0], [4.0, -2.0]), [1, 2, 5])["w"].tolist() == [3.125, 0.75]


def test_fedavg_of_equal_counts_is_the_plain_mean() -> None:
    assert fed_avg(states([1.0], [2.0], [6.0]), [7, 7, 7])["w"].tolist() == [3.0]


def test_uniform_fedavg_does_not_look_at_the_counts() -> None:
    assert AGGREGATORS["fedavg_uniform"](states([1.0], [2.0], [6.0]), [1, 1, 1000])["w"].tolist() == [3.0]


def test_the_median_of_an_odd_number_is_the_middle_value_of_each_coordinate() -> None:
    assert fed_median(states([5.0, 1.0], [1.0, 2.0], [3.0, 9.0]), [1, 1, 99])["w"].tolist() == [3.0, 2.0]


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert fed_median(states([4.0, 0.0], [1.0, 7.0], [2.0, -1.0], [100.0, 1.0]))["w"].tolist() == [3.0, 0.5]


def test_the_median_of_one_and_of_two() -> None:
    assert fed_median(states([4.0]))["w"].tolist() == [4.0]
    assert fed_median(states([4.0], [1.0]))["w"].tolist() == [2.5]


@pytest.mark.parametrize("clients", range(1, 13))
def test_the_median_finds_the_middle_of_zeros_and_ones_in_any_order(clients: int) -> None:
    # What sorts every row of zeros and ones sorts everything (the 0-1 principle; Knuth, volume 3, 5.3.4, theorem Z).
    rows = torch.tensor(list(product((0.0, 1.0), repeat=clients))).T  # [K, 2^K]
    expected = np.median(rows.numpy(), axis=0)
    assert fed_median([{"w": row} for row in rows])["w"].tolist() == expected.tolist()


@pytest.mark.parametrize("clients", [99, 100, 257])
def test_the_median_of_many_clients(clients: int) -> None:
    rows = torch.randn(clients, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(clients))
    assert fed_median([{"w": row} for row in rows])["w"].tolist() == np.median(rows.numpy(), axis=0).tolist()


def test_the_median_of_two_large_values_does_not_overflow() -> None:
    assert fed_median(states([3e38], [3e38]))["w"].tolist() == torch.tensor([3e38]).tolist()


def test_the_median_ignores_an_outlier_and_the_mean_does_not() -> None:
    rows = states([1.0], [1.5], [1e6])
    assert fed_median(rows)["w"].item() == 1.5
    assert fed_avg(rows, [1, 1, 1])["w"].item() > 1e5


@pytest.mark.parametrize("name", AGGREGATORS)
def test_counts_take_their_maximum_and_types_and_shapes_stay(name: str) -> None:
    given = [
        {"w": torch.full((2, 3), float(k)), "seen": torch.tensor(k), "half": torch.ones(1, dtype=torch.float16)}
        for k in (3, 9, 6)
    ]
    found = AGGREGATORS[name](given, [100, 1, 1])
    assert found["seen"].item() == 9
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        key: tensor.dtype for key, tensor in given[0].items()
    }
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in given[0].items()
    }


@pytest.mark.parametrize(
    ("name", "mean", "variance"),
    [("fedavg", 5.5, 2.5), ("fedavg_uniform", 4.0, 2.0), ("median", 4.0, 2.0)],
)
def test_running_statistics_follow_the_same_rule(name: str, mean: float, variance: float) -> None:
    """Two clients with means 2 and 6, variances 1 and 3, and 1 and 7 samples: (2 + 42) / 8 and (1 + 21) / 8 = 2.75."""
    layers = [nn.BatchNorm1d(1), nn.BatchNorm1d(1)]
    for layer, running_mean, running_var, batches in zip(layers, (2.0, 6.0), (1.0, 3.0), (4, 5), strict=True):
        layer.running_mean.fill_(running_mean)
        layer.running_var.fill_(running_var)
        layer.num_batches_tracked.fill_(batches)
    found = AGGREGATORS[name]([layer.state_dict() for layer in layers], [1, 7])
    assert found["running_mean"].item() == mean
    assert found["running_var"].item() == (2.75 if name == "fedavg" else variance)
    assert found["num_batches_tracked"].item() == 5


@pytest.mark.parametrize("name", AGGREGATORS)
def test_equal_clients_give_back_their_weights_exactly(name: str) -> None:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    found = AGGREGATORS[name]([{"w": weights.clone()} for _ in range(7)], [3, 1, 4, 1, 5, 9, 2])
    assert torch.equal(found["w"], weights)


def test_fedavg_sums_in_double_precision() -> None:
    """In single precision 2**24 + 1 is 2**24, and 100 such steps would be lost."""
    rows = states([float(2**24)], *[[1.0]] * 100)
    assert fed_avg(rows, [1] * 101)["w"].item() == pytest.approx((2**24 + 100) / 101, rel=1e-7)


def test_given_states_are_left_alone() -> None:
    rows = states([1.0], [5.0])
    for aggregate in AGGREGATORS.values():
        found = aggregate(rows, [1, 1])
        found["w"].fill_(77)
        found["seen"].fill_(77)
    fed_median(rows[:1])["w"].fill_(77)
    assert [row["w"].item() for row in rows] == [1.0, 5.0]
    assert [row["seen"].item() for row in rows] == [10, 20]


@pytest.mark.parametrize("aggregate", AGGREGATORS.values())
def test_nobody_to_aggregate_is_an_error(aggregate: object) -> None:
    with pytest.raises(ValueError, match="no clients"):
        aggregate([], [])  # type: ignore[operator]


def test_counts_and_clients_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        fed_avg(states([1.0], [2.0]), [1])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_state_with_one_bad_number_is_not_finite(bad: float) -> None:
    assert is_finite({"a": torch.ones(3), "seen": torch.tensor(1)})
    assert not is_finite({"a": torch.ones(3), "b": torch.tensor([1.0, bad])})
