"""Parquet folders in the layout that image data sets have on the Hugging Face hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsweep.datasets.readers import Split
from fedsweep.errors import DataError
from fedsweep.plan.experiment import PARQUET_PREFIX

MODES = ("L", "RGB")
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label")
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class _Columns:
    """Which columns hold the images and the labels, and the number of classes where the file says it."""

    image: str
    label: str
    num_classes: int | None


def read_parquet(path: str, bases: Sequence[Path]) -> tuple[Split, Split, int]:
    """Training set, test set and number of classes of the folder `path`, relative to the first base that has it.

    The folder has train*.parquet and test*.parquet, with an image column struct<bytes, path> and a column of whole
    numbers, found by their types and, where several fit, by their names. All images have the same size and are
    8-bit grey or RGB. The number of classes is the one in the file's metadata, else the largest label and one.

    Raises:
        DataError: there is no such folder, or a file or an image is not so; the message names file and row.
    """
    files = parquet_files(path, bases)
    train, num_classes = _read_split(files["train"])
    test, _ = _read_split(files["test"])
    return train, test, num_classes or 1 + int(max(train.labels.max(), test.labels.max()))


def parquet_files(path: str, bases: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of "train" and "test", in the order of their names.

    Raises:
        DataError: there is no such folder, or it has none for one of the two.
    """
    folder = _folder(path, bases)
    files = {split: sorted(folder.glob(f"{split}*.parquet")) for split in ("train", "test")}
    for split, found in files.items():
        if not found:
            deeper = sorted(folder.glob(f"*/{split}*.parquet"))
            hint = f"; did you mean {PARQUET_PREFIX}{deeper[0].parent}?" if deeper else ""
            raise DataError(f"{folder}: found no {split}*.parquet in it{hint}")
    return files


def _folder(path: str, bases: Sequence[Path]) -> Path:
    tried = [base / Path(path).expanduser() for base in bases]
    found = next((folder for folder in tried if folder.is_dir()), None)
    if found is None:
        places = [place for place in dict.fromkeys(map(str, tried)) if place != path]
        looked = f" (looked for {', '.join(places)})" if places else ""
        raise DataError(f"{PARQUET_PREFIX}{path}: no such folder{looked}; expected one with Parquet files")
    return found


def _read_split(files: Sequence[Path]) -> tuple[Split, int | None]:
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    columns = [_columns(file) for file in files]
    for file, named in zip(files, columns, strict=True):
        for place, content, label in _rows(file, named):
            images.append(_pixels(content, place))
            labels.append(label)
            if images[-1].shape != images[0].shape:
                raise DataError(
                    f"{place}: found an image of {_size(images[-1])}; expected {_size(images[0])} as in the first row"
                )
    if not images:
        raise DataError(f"{files[0]}: found no image")
    return Split(np.stack(images), np.array(labels, np.int64), str(files[0])), columns[0].num_classes


def _rows(file: Path, columns: _Columns) -> Iterator[tuple[str, bytes, int]]:
    """Of each row: its place for people, the encoded image, the label."""
    import pyarrow.parquet as pq

    number = 0
    with _as_data_errors(file), pq.ParquetFile(file) as table:
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[columns.image, columns.label]):
            pictures, labels = batch.column(columns.image).to_pylist(), batch.column(columns.label).to_pylist()
            for picture, label in zip(pictures, labels, strict=True):
                place = f"{file} row {number}"
                if not picture or picture["bytes"] is None:
                    raise DataError(f"{place}: {columns.image} has no bytes; expected an encoded image")
                if label is None:
                    raise DataError(f"{place}: {columns.label} is empty; expected a whole number")
                yield place, picture["bytes"], label
                number += 1


@contextmanager
def _as_data_errors(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet: {error}") from error


def _columns(file: Path) -> _Columns:
    import pyarrow.parquet as pq

    with _as_data_errors(file):
        schema = pq.read_schema(file)
    image = _choose([field.name for field in schema if _is_image(field.type)], IMAGE_NAMES)
    label = _choose([field.name for field in schema if _is_integer(field.type)], LABEL_NAMES)
    if image is None or label is None:
        what = (
            "one image column struct<bytes: binary, path: string>" if image is None else "one label column of integers"
        )
        names = IMAGE_NAMES if image is None else LABEL_NAMES
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(f"{file}: expected {what} (of several, the one called {' or '.join(names)}); found {found}")
    return _Columns(image, label, _num_classes(schema.metadata, label))


def _is_integer(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(kind))


def _is_image(kind: Any) -> bool:
    import pyarrow.types as types

    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    content = kind.field("bytes").type
    return bool(types.is_binary(content) or types.is_large_binary(content))


def _choose(fitting: Sequence[str], names: Sequence[str]) -> str | None:
    if len(fitting) == 1:
        return fitting[0]
    return next((name for name in names if name in fitting), None)


def _num_classes(metadata: dict[bytes, bytes] | None, label: str) -> int | None:
    """The number of class names that the hub's `datasets` library wrote into the file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return len(features[label]["names"]) or None
    except (KeyError, TypeError, ValueError):
        return None


def _pixels(content: bytes, place: str) -> npt.NDArray[np.uint8]:
    """The decoded image [C, H, W]."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            mode, pixels = picture.mode, np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{place}: cannot be decoded as an image: {error}") from error
    if mode not in MODES:
        raise DataError(f"{place}: found an image of mode {mode}; expected {' or '.join(MODES)} (8 bits a channel)")
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _size(image: npt.NDArray[np.uint8]) -> str:
    return "×".join(map(str, image.shape))
