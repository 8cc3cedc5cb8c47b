from __future__ import annotations

import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsweep.fl.streams import PURPOSES, below, permutation, rounded, stream, words

MASK = 2**64 - 1
FEDSWEEP = int.from_bytes(b"fedsweep", "big")


def philox4x64(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds of Philox 4x64, written down from the paper (Salmon et al. 2011, section 3.3)."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = x0 * 0xD2E7470EE14C6C93, x2 * 0xCA5A826395121157
        x0, x1, x2, x3 = (
            (product1 >> 64) ^ x1 ^ k0,
            product1 & MASK,
            (product0 >> 64) ^ x3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return x0, x1, x2, x3


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (MASK,) * 4,
            (MASK,) * 2,
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        ),
    ],
)
def test_the_twin_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The known answers that come with the authors' Random123 library."""
    assert philox4x64(counter, key) == expected


@pytest.mark.parametrize(
    ("seed", "purpose", "round", "client", "name"),
    [
        (42, "init", 0, None, (5, 0, 0)),
        (42, "order", 3, 0, (7, 3, 1)),
        (2**63 - 1, "poison", 0, 99_999, (4, 0, 100_000)),
        (0, "participation", 10**9, None, (6, 10**9, 0)),
    ],
)
def test_a_stream_is_philox_keyed_by_seed_purpose_round_and_client(
    seed: int, purpose: str, round: int, client: int | None, name: tuple[int, int, int]
) -> None:
    blocks = [philox4x64((block, *name), (seed, FEDSWEEP)) for block in (1, 2, 3)]
    assert words(stream(seed, purpose, round, client), 12).tolist() == [word for block in blocks for word in block]


def test_streams_keep_their_values() -> None:
    """Rows that were computed once must come out again: these numbers may never change."""
    assert PURPOSES == {
        "split": 1,
        "partition": 2,
        "malicious": 3,
        "poison": 4,
        "init": 5,
        "participation": 6,
        "order": 7,
    }
    assert int(words(stream(42, "init"), 1)[0]) == 0x6848D210B3497684
    assert permutation(stream(42, "order", 3, 2), 10).tolist() == [3, 5, 9, 8, 2, 0, 7, 4, 1, 6]
    assert below(stream(42, "poison"), 9, 10).tolist() == [1, 5, 8, 0, 2, 5, 6, 8, 2, 3]


def test_every_part_of_the_key_makes_another_stream() -> None:
    first = {
        (seed, purpose, round, client): int(words(stream(seed, purpose, round, client), 1)[0])
        for seed, purpose, round, client in product((0, 1, 42), PURPOSES, (0, 1, 2), (None, 0, 1, 2))
    }
    assert len(set(first.values())) == len(first)


def test_a_stream_does_not_move_another() -> None:
    expected = words(stream(1, "order", 1, 1), 8).tolist()
    mine, other = stream(1, "order", 1, 1), stream(1, "order", 1, 2)
    taken = []
    for _ in range(8):
        taken.append(int(words(mine, 1)[0]))
        words(other, 1000)
    assert taken == expected


def test_streams_neither_use_nor_change_global_random_state() -> None:
    expected = permutation(stream(5, "split"), 100).tolist()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert permutation(stream(5, "split"), 100).tolist() == expected
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_an_unknown_purpose_is_refused() -> None:
    with pytest.raises(KeyError):
        stream(1, "oder")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_a_permutation_holds_every_number_once(size: int) -> None:
    assert sorted(permutation(stream(3, "split"), size).tolist()) == list(range(size))


def test_permutations_are_equally_likely() -> None:
    """Chi-square over the 24 permutations of four: below the 99.9th percentile for 23 degrees of freedom (49.7)."""
    draws = 24_000
    generator = stream(11, "order", 1, 1)
    counts = Counter(tuple(permutation(generator, 4).tolist()) for _ in range(draws))
    assert len(counts) == 24
    assert sum((count - draws / 24) ** 2 / (draws / 24) for count in counts.values()) < 49.7


def test_below_is_uniform() -> None:
    """Chi-square over nine values: below the 99.9th percentile for 8 degrees of freedom (26.1)."""
    draws = 90_000
    counts = np.bincount(below(stream(11, "poison"), 9, draws))
    assert len(counts) == 9
    assert ((counts - draws / 9) ** 2 / (draws / 9)).sum() < 26.1


@pytest.mark.parametrize(
    ("share", "whole", "expected"),
    [
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.25, 10, 3),  # 2.5, halves up (Python's round gives 2)
        (0.15, 10, 2),  # 1.5; the double is 0.1499999999999999944
        (0.45, 10, 5),  # 4.5; the same
        (0.145, 100, 15),  # 14.5; in doubles 14.499999999999998
        (0.285, 100, 29),  # 28.5; in doubles 28.499999999999996
        (1.005, 100, 101),  # 100.5; in doubles 100.49999999999999
        (0.1, 5, 1),  # 0.5
        (0.1, 4, 0),  # 0.4
        (0.04999, 10, 0),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (1 / 3, 10, 3),
        (2 / 3, 10, 7),
        (1e-9, 500_000_000, 1),  # 0.5, from a share that is written with an exponent
        (0.1, 1797, 180),
        (0, 7, 0),
        (1, 7, 7),
    ],
)
def test_rounded(share: float, whole: int, expected: int) -> None:
    assert rounded(share, whole) == expected


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_rounded_grows_with_the_share_and_stays_within_the_whole(one: float, other: float, whole: int) -> None:
    small, large = sorted((one, other))
    assert 0 <= rounded(small, whole) <= rounded(large, whole) <= whole
    assert abs(rounded(small, whole) - small * whole) <= 0.5 + 1e-6
