"""Streams are functions of their key alone, and never change from version to version."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from fedsweep.fl.streams import PURPOSES, permutation, rounded, stream


def test_numbers_that_every_row_ever_computed_depends_on():
    assert PURPOSES == {
        "split": 1,
        "partition": 2,
        "malicious": 3,
        "poison": 4,
        "init": 5,
        "participation": 6,
        "order": 7,
    }
    assert permutation(stream(42, "split"), 8).tolist() == GOLDEN_SPLIT
    assert permutation(stream(42, "order", 3, 1), 8).tolist() == GOLDEN_ORDER
    assert stream(7, "poison").integers(1, 10, 6).tolist() == GOLDEN_POISON
    assert stream(7, "partition").dirichlet([0.5, 0.5, 0.5]).round(12).tolist() == GOLDEN_DIRICHLET


GOLDEN_SPLIT = [1, 6, 4, 7, 0, 2, 3, 5]
GOLDEN_ORDER = [1, 6, 0, 4, 3, 2, 7, 5]
GOLDEN_POISON = [6, 3, 4, 1, 2, 4]
GOLDEN_DIRICHLET = [0.021303196549, 0.962530287674, 0.016166515777]


def test_every_part_of_the_key_matters():
    keys = list(product([1, 2], ["split", "order"], [0, 1], [0, 1]))
    first_words = {stream(*key).bit_generator.random_raw() for key in keys}
    assert len(first_words) == len(keys)


def test_streams_do_not_run_into_each_other():
    words = np.concatenate([stream(1, "order", 1, client).bit_generator.random_raw(5_000) for client in range(20)])
    assert len(np.unique(words)) == len(words)


def test_draws_do_not_touch_or_depend_on_global_random_state():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = permutation(stream(5, "order", 1), 50)
    np.random.seed(1)
    assert (permutation(stream(5, "order", 1), 50) == first).all()
    np.random.seed(0)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


def test_unknown_purpose_is_refused():
    with pytest.raises(KeyError):
        stream(1, "colour")


def test_permutations_are_uniform():
    """Each of 5 elements is in each of 5 places equally often: chi-square with 16 degrees of freedom, 0.1 % level."""
    counts = np.zeros((5, 5))
    for seed in range(4_000):
        counts[np.arange(5), permutation(stream(seed, "order"), 5)] += 1
    assert ((counts - 800) ** 2 / 800).sum() < 39.25


@pytest.mark.parametrize(
    ("share", "whole", "count"),
    [
        (0, 10, 0),
        (1, 10, 10),
        (0.25, 10, 3),
        (0.24, 10, 2),
        (0.15, 10, 2),
        (0.35, 10, 4),
        (0.5, 5, 3),
        (0.1, 1617, 162),
    ],
)
def test_shares_are_rounded_half_up(share, whole, count):
    assert rounded(share, whole) == count
