"""Aggregators against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fedsweep.fl import fed_avg, fed_median
from fedsweep.fl.aggregate import AGGREGATORS, is_finite


def states(*rows: list[float]) -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.tensor(row), "n": torch.tensor(10 * i)} for i, row in enumerate(rows, start=1)]


def test_fedavg_weighs_by_samples():
    # (1*1 + 2*2 + 5*4) / 7 = 25/7, (0 + 2*7 + 5*0) / 7 = 2
    mean = fed_avg(states([1.0, 0.0], [2.0, 7.0], [4.0, 0.0]), [1, 2, 4])
    assert mean["w"].tolist() == pytest.approx([(1 + 4 + 16) / 7, 2.0])


def test_fedavg_of_equal_counts_is_the_plain_mean():
    assert fed_avg(states([1.0], [2.0], [6.0]), [3, 3, 3])["w"].tolist() == [3.0]


def test_uniform_mean_does_not_look_at_the_counts():
    assert AGGREGATORS["fedavg_uniform"](states([1.0], [2.0], [6.0]), [1, 1, 1_000])["w"].tolist() == [3.0]


def test_median_of_an_odd_number_is_the_middle_value():
    assert fed_median(states([5.0, 1.0], [1.0, 2.0], [3.0, 9.0]), [1, 1, 9])["w"].tolist() == [3.0, 2.0]


def test_median_of_an_even_number_is_the_mean_of_the_middle_two():
    assert fed_median(states([4.0], [1.0], [2.0], [100.0]))["w"].tolist() == [3.0]


def test_median_of_one_and_of_two():
    assert fed_median(states([4.0]))["w"].tolist() == [4.0]
    assert fed_median(states([4.0], [1.0]))["w"].tolist() == [2.5]


def test_median_ignores_one_outlier_and_the_mean_does_not():
    rows = states([1.0], [1.2], [1e6])
    assert fed_median(rows)["w"].item() == pytest.approx(1.2)
    assert fed_avg(rows, [1, 1, 1])["w"].item() > 1e5


@pytest.mark.parametrize("name", AGGREGATORS)
def test_counters_take_their_maximum_and_types_stay(name):
    result = AGGREGATORS[name](states([1.0], [2.0], [6.0]), [1, 2, 3])
    assert result["n"].item() == 30
    assert result["n"].dtype == torch.int64
    assert result["w"].dtype == torch.float32


def test_fedavg_sums_in_double_precision():
    """A sum in single precision loses the small ones: 1 + 4096 * 2^-24 would stay 1."""
    rows = states([1.0], *[[2.0**-24]] * 4096)
    mean = fed_avg(rows, [1] * 4097)["w"].item() * 4097
    assert mean == pytest.approx(1 + 4096 * 2.0**-24, rel=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_state_with_one_bad_number_is_not_finite(bad):
    assert is_finite({"a": torch.ones(3), "n": torch.tensor(1)})
    assert not is_finite({"a": torch.ones(3), "b": torch.tensor([1.0, bad])})
