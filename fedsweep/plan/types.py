"""The types that parameters are made of, stricter than Python's: no string is a number, no truth value is 1."""

from __future__ import annotations

import posixpath
from typing import Annotated

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Strict

DATASETS = ("digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100")
PARQUET_PREFIX = "parquet:"
MAX_SEED = 2**63 - 1
MAX_COUNT = 1_000_000_000


def _integral(value: object) -> object:
    """A whole number written as 4.0 is 4."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_sign_of_zero(value: float) -> float:
    """-0.0 becomes 0.0, every other number itself, so that one number has one spelling."""
    return value + 0.0


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("it has a character that cannot be printed")
    return value


def _dataset_name(value: str) -> str:
    if value in DATASETS:
        return value
    if value.startswith(PARQUET_PREFIX) and len(value) > len(PARQUET_PREFIX):
        return PARQUET_PREFIX + posixpath.normpath(value.removeprefix(PARQUET_PREFIX))
    raise ValueError("not a dataset")


Integer = Annotated[int, Strict(), BeforeValidator(_integral)]
Number = Annotated[float, Strict(), AllowInfNan(False), AfterValidator(_without_sign_of_zero)]
Text = Annotated[str, Strict(), AfterValidator(_printable)]
Dataset = Annotated[Text, AfterValidator(_dataset_name)]
