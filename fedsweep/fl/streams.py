"""Counter-based random streams, keyed by (seed, purpose, round, client) and by nothing else.

Attack, aggregator, ratio and place in a batch are not in the key, so experiments that differ in these alone make the
same draws. The generator is Philox 4x64 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011): a
function of a key and a counter, so streams need no order among them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The number of a purpose is part of every row ever computed: never change one, only add.
PURPOSES = {
    "split": 1,
    "partition": 2,
    "malicious": 3,
    "poison": 4,
    "init": 5,
    "participation": 6,
    "order": 7,
}
_KEY = 0x6665647377656570  # "fedsweep" in ASCII: sets our streams apart from other uses of Philox with a small seed


def stream(seed: int, purpose: str, round_number: int = 0, client: int = 0) -> np.random.Generator:
    """The stream of draws for one purpose.

    Args:
        seed: 0 to 2**63 - 1.
        purpose: a key of `PURPOSES`.
        round_number: from 1; 0 where the draw belongs to no round.
        client: from 0; for draws that belong to no client, 0.

    Raises:
        KeyError: unknown purpose.
    """
    # The lowest word of the counter runs; the other three name the stream, so no two streams meet.
    counter = np.array([0, PURPOSES[purpose], round_number, client], dtype=np.uint64)
    key = np.array([seed, _KEY], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def permutation(generator: np.random.Generator, size: int) -> NDArray[np.int64]:
    """A permutation of 0 … size-1, drawn from raw 64-bit words, which no version of NumPy changes."""
    words = np.asarray(generator.bit_generator.random_raw(size), dtype=np.uint64)
    return np.argsort(words, kind="stable")


def rounded(share: float, whole: int) -> int:
    """`share` of `whole` things, rounded to the nearest number, halves up.

    A share is meant as the decimal that it is written as: 0.15 of 10 is 1.5, so 2, although the double nearest to 0.15
    is a little below it. Errors of that size are far below 1e-9 of a thing.
    """
    return int(np.floor(share * whole + 0.5 + 1e-9))
