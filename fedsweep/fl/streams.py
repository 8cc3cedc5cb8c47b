"""Counter-based random streams, keyed by (seed, purpose, round, client) and by nothing else.

Attack, ratio, aggregator, place in a batch and machine are not in the key, so experiments that differ in these alone
make the same draws: they see the same images in the same batches, from the same initial weights. The generator is
Philox 4x64 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011), a function of a key and a counter;
drawing from one stream never moves another.
"""

from __future__ import annotations

from decimal import ROUND_FLOOR, Decimal
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Purpose = Literal["split", "partition", "malicious", "poison", "init", "participation", "order"]

# A purpose's number is part of every result ever computed: add to these, never change one.
PURPOSES: dict[Purpose, int] = {
    "split": 1,
    "partition": 2,
    "malicious": 3,
    "poison": 4,
    "init": 5,
    "participation": 6,
    "order": 7,
}
_KEY = 0x6665647377656570  # "fedsweep" in ASCII: keeps these streams apart from other uses of Philox with a small seed


def stream(seed: int, purpose: Purpose, round: int = 0, client: int | None = None) -> np.random.Generator:
    """The stream of draws for one purpose, from its beginning.

    Args:
        seed: 0 to 2**64 - 1.
        purpose: a key of `PURPOSES`.
        round: counted from 1; 0 for what is drawn once for an experiment.
        client: counted from 0; None for what is drawn for all clients together.
    """
    # The lowest word of the counter runs while numbers are drawn; the others name the stream, so no two can meet.
    counter = np.array([0, PURPOSES[purpose], round, 0 if client is None else client + 1], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed, _KEY], dtype=np.uint64)))


def words(generator: np.random.Generator, size: int) -> NDArray[np.uint64]:
    """The next `size` 64-bit words of a stream. NumPy keeps these the same for ever, unlike its distributions."""
    return np.asarray(generator.bit_generator.random_raw(size), dtype=np.uint64)


def permutation(generator: np.random.Generator, size: int) -> NDArray[np.int64]:
    """A permutation of 0 … size-1, every one as likely."""
    return np.argsort(words(generator, size), kind="stable")


def below(generator: np.random.Generator, bound: int, size: int) -> NDArray[np.int64]:
    """`size` whole numbers from 0 to bound-1, each as likely (up to bound / 2**64)."""
    return (words(generator, size) % np.uint64(bound)).astype(np.int64)


def rounded(share: float, whole: int) -> int:
    """`share` of `whole` things, rounded to the nearest number, halves up.

    The share is the decimal number that it is written as. 0.145 of 100 are 14.5 and so 15, although the double nearest
    to 0.145 is a little below it and 0.145 * 100 gives 14.499999999999998.
    """
    exact = Decimal(str(float(share))) * whole
    return int((exact + Decimal("0.5")).to_integral_value(ROUND_FLOOR))
