"""The same bits from the same inputs, on a GPU too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cudnn


@contextmanager
def repeatable() -> Iterator[None]:
    """While it lasts (a `with` block, or a call of a decorated function), convolutions on a GPU repeat bit for bit.

    Left to itself cuDNN chooses its algorithms by timing them, some of which add in no fixed order, and rounds to TF32.
    """
    with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
