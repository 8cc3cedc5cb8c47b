"""Data sets as uint8 tensors: the official files, Parquet folders, scikit-learn's digits. The one place that downloads.

A data set was published in one or more forms (CIFAR-10: an archive of Python pickles, and a binary one). Each is
looked for in the folders that the user names, under its publisher's file names; only then is it downloaded, with its
checksum, into a cache that all processes share.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsweep.datasets.official import ensure, read_official
from fedsweep.datasets.parquet import parquet_files, read_parquet
from fedsweep.datasets.readers import Split
from fedsweep.datasets.sources import SOURCES
from fedsweep.errors import DataError
from fedsweep.plan.experiment import PARQUET_PREFIX

if TYPE_CHECKING:
    from fedsweep.fl.data import ImageData

__all__ = ["default_data_dirs", "load_global_dataset", "prepare"]

DATA_VARIABLE = "FEDSWEEP_DATA"
DIGITS = "digits"

logger = logging.getLogger(__name__)


def load_global_dataset(name: str, data_dir: str | Path | None = None) -> ImageData:
    """The whole data set `name`: images uint8 [N, C, H, W] and labels int64 [N], for training and for testing.

    Looked for in `data_dir`, then in the folder that FEDSWEEP_DATA names, in each with or without a sub-folder of
    the data set's name; then downloaded, once for all processes. Loaded once in a process.

    `parquet:PATH` is a folder with train*.parquet and test*.parquet, relative to the current folder or to one of
    those above. `digits` comes with scikit-learn: its values 0..16 are scaled to 0..255 (halves up), and its test set
    is every fifth image, those with the indices 0, 5, 10, …

    Raises:
        DataError: it is in no folder and cannot be downloaded, or a file is damaged; the message names the file.
    """
    return _load(name, _folders(data_dir), Path.cwd())


def default_data_dirs() -> list[Path]:
    """The folders in which data is looked for besides the one that a user names: that of FEDSWEEP_DATA."""
    named = os.environ.get(DATA_VARIABLE)
    return [Path(named).absolute()] if named else []


def prepare(name: str, data_dir: str | Path | None = None) -> None:
    """See that data set `name` is there; download it if not, with a progress bar where stderr is a terminal.

    Reads no image and loads no torch, so a command can do this before it starts its workers.

    Raises:
        DataError: it is in no folder and cannot be downloaded.
    """
    if name.startswith(PARQUET_PREFIX):
        parquet_files(name.removeprefix(PARQUET_PREFIX), (Path.cwd(), *_folders(data_dir)))
    elif name in SOURCES:
        ensure(name, _folders(data_dir))
    elif name != DIGITS:
        raise _unknown(name)


def _folders(data_dir: str | Path | None) -> tuple[Path, ...]:
    return (*([Path(data_dir).absolute()] if data_dir else []), *default_data_dirs())


@lru_cache(maxsize=8)
def _load(name: str, folders: Sequence[Path], current: Path) -> ImageData:
    if name == DIGITS:
        train, test, num_classes = _digits()
    elif name.startswith(PARQUET_PREFIX):
        train, test, num_classes = read_parquet(name.removeprefix(PARQUET_PREFIX), (current, *folders))
    elif name in SOURCES:
        train, test, num_classes = *read_official(name, folders), SOURCES[name].num_classes
    else:
        raise _unknown(name)
    return _checked(name, train, test, num_classes)


def _unknown(name: str) -> DataError:
    return DataError(f'no data set is called "{name}" (known: {DIGITS}, {", ".join(SOURCES)}, {PARQUET_PREFIX}PATH)')


def _digits() -> tuple[Split, Split, int]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    is_test = np.arange(len(labels)) % 5 == 0
    train = Split(images[~is_test], labels[~is_test], "scikit-learn's digits")
    return train, Split(images[is_test], labels[is_test], "scikit-learn's digits"), 10


def _checked(name: str, train: Split, test: Split, num_classes: int) -> ImageData:
    import torch

    from fedsweep.fl.data import ImageData

    for split in (train, test):
        _check_split(split, num_classes)
    shape, other = train.images.shape[1:], test.images.shape[1:]
    if shape != other:
        raise DataError(f"{test.path}: found images of {_size(other)}; expected {_size(shape)} as in {train.path}")
    if shape[1] != shape[2]:
        raise DataError(f"{train.path}: found images of {_size(shape)}; expected square ones, as the models do")
    logger.info("%s: %d training and %d test images of %s", name, len(train.labels), len(test.labels), _size(shape))
    return ImageData(
        name=name,
        train_images=torch.from_numpy(train.images),
        train_labels=torch.from_numpy(train.labels),
        test_images=torch.from_numpy(test.images),
        test_labels=torch.from_numpy(test.labels),
        num_classes=num_classes,
    )


def _check_split(split: Split, num_classes: int) -> None:
    if len(split.images) != len(split.labels):
        raise DataError(f"{split.path}: found {len(split.labels)} labels for {len(split.images)} images")
    if not len(split.labels):
        raise DataError(f"{split.path}: found no image")
    wrong = split.labels[(split.labels < 0) | (split.labels >= num_classes)]
    if len(wrong):
        raise DataError(f"{split.path}: found label {wrong[0]}; expected 0 to {num_classes - 1}")


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
