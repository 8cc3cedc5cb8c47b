"""The official file formats: IDX (MNIST and its kin), CIFAR binary, CIFAR Python pickles. Bytes in, arrays out."""

from __future__ import annotations

import io
import math
import pickle
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsweep.errors import DataError

IDX_UNSIGNED_BYTE = 0x08
CIFAR_SHAPE = (3, 32, 32)
CIFAR_PIXELS = math.prod(CIFAR_SHAPE)


@dataclass(frozen=True)
class Blob:
    """The decompressed content of a file, and the file's name for people."""

    path: str
    content: bytes


@dataclass(frozen=True)
class Split:
    """Images with their labels, and the file that the labels came from."""

    images: npt.NDArray[np.uint8]  # [N, C, H, W]
    labels: npt.NDArray[np.int64]  # [N]
    path: str


def read_idx(images: Blob, labels: Blob) -> Split:
    """Images [N, 1, H, W] and labels [N] of a pair of IDX files.

    Raises:
        DataError: a file is not IDX, not of unsigned bytes, of another number of axes, too short or too long.
    """
    pixels = _idx_array(images, axes=3)
    return Split(pixels[:, None], _idx_array(labels, axes=1).astype(np.int64), labels.path)


def _idx_array(blob: Blob, axes: int) -> npt.NDArray[np.uint8]:
    expected_magic = struct.pack(">HBB", 0, IDX_UNSIGNED_BYTE, axes)
    header = 4 + 4 * axes
    if blob.content[:4] != expected_magic:
        raise DataError(
            f"{blob.path}: begins with 0x{blob.content[:4].hex()}; expected 0x{expected_magic.hex()} "
            f"(an IDX file of unsigned bytes with {axes} {'axis' if axes == 1 else 'axes'})"
        )
    if len(blob.content) < header:
        raise DataError(f"{blob.path}: found {len(blob.content)} bytes; expected a header of {header}: it is cut off")
    shape = struct.unpack(f">{axes}I", blob.content[4:header])
    _check_length(blob, header + math.prod(shape), f"for {'×'.join(map(str, shape))} values")
    return np.frombuffer(blob.content, np.uint8, offset=header).reshape(shape).copy()


def _check_length(blob: Blob, expected: int, what: str) -> None:
    found = len(blob.content)
    if found != expected:
        fault = "it is cut off" if found < expected else "it has bytes after its end"
        raise DataError(f"{blob.path}: found {found} bytes; expected {expected} {what}: {fault}")


def read_cifar_binary(parts: list[Blob], label_bytes: int) -> Split:
    """Images [N, 3, 32, 32] and labels [N] of CIFAR binary files, joined in the given order.

    A record is `label_bytes` labels, of which the last counts (CIFAR-100: coarse, then fine), and 3,072 pixels.

    Raises:
        DataError: a file is not a whole number of records.
    """
    record = label_bytes + CIFAR_PIXELS
    records = []
    for part in parts:
        whole = -(-len(part.content) // record) * record
        _check_length(part, whole, f"for whole records of {record}")
        records.append(np.frombuffer(part.content, np.uint8).reshape(-1, record))
    table = np.concatenate(records)
    images = table[:, label_bytes:].reshape(-1, *CIFAR_SHAPE).copy()
    return Split(images, table[:, label_bytes - 1].astype(np.int64), parts[0].path)


def read_cifar_pickles(parts: list[Blob], label_key: str) -> Split:
    """Images [N, 3, 32, 32] and labels [N] of CIFAR's Python files, joined in the given order.

    Raises:
        DataError: a file is no pickle, asks for anything but plain values and arrays, or has other content.
    """
    batches = [_cifar_batch(part, label_key) for part in parts]
    return Split(
        np.concatenate([images for images, _ in batches]),
        np.concatenate([labels for _, labels in batches]),
        parts[0].path,
    )


def _cifar_batch(part: Blob, label_key: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    batch = _plain_pickle(part)
    pixels, labels = (batch.get("data"), batch.get(label_key)) if isinstance(batch, dict) else (None, None)
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
        raise DataError(f'{part.path}: expected a dictionary with an array "data" and a list "{label_key}"')
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != CIFAR_PIXELS:
        raise DataError(
            f"{part.path}: found data of {pixels.dtype} {list(pixels.shape)}; expected uint8 [N, {CIFAR_PIXELS}]"
        )
    if len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise DataError(f"{part.path}: found {len(labels)} labels; expected {len(pixels)} whole numbers")
    return pixels.reshape(-1, *CIFAR_SHAPE), np.array(labels, np.int64)


# What CIFAR's files, written by Python 2, call by name. Arrays make themselves from plain values through these.
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _PlainUnpickler(pickle.Unpickler):
    """Admits arrays and nothing else that has a name, so that a pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """The object called `module.name`, if CIFAR's files need it."""
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return ADMITTED[module, name]


def _plain_pickle(part: Blob) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(part.content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise DataError(f"{part.path}: cannot be read as one of CIFAR's Python files: {error}") from error
