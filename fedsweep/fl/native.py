"""Compiled kernels as a trainer for CPUs: one client of up to 16 experiments at once, see `kernels.cpp`.

The kernels come as a loaded library, since compiling and loading them is not for this room (`worker.kernels` does it).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedsweep.fl.data import ImageData, normalised
from fedsweep.fl.lanes import Aggregate, ClientWork, LaneInputs, ModelShape, Trained
from fedsweep.fl.threads import Threads
from fedsweep.plan.experiment import Experiment

VECTORS = 4  # that a convolution's kernels take: channels times lanes must fit into them
CALLS = 8  # of the kernels a thread in a round, if there are so many clients: each call has to wait for Python
APPLIED = 64  # images at once where models are only applied


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int32) for name in ("is_cnn", "width", "depth", "classes", "channels", "side", "batch", "lanes")
    )


def lane_counts(shape: ModelShape, vector_length: int) -> list[int]:
    """How many lanes a tile may have for models of this shape, the fewest first; none where the kernels do not fit."""
    counts = [count for count in (1, 2, 4, 8, 16) if count <= vector_length]
    if shape.model_type == "cnn" and shape.depth > 0:
        return [count for count in counts if count * shape.width_factor <= VECTORS * vector_length]
    return counts


def tiles(num_lanes: int, most: int) -> list[int]:
    """Tile sizes, powers of two, for so many lanes: full ones first, and one quarter empty at most."""
    sizes = [most] * (num_lanes // most)
    left = num_lanes % most
    while left:
        size = 1 << (left - 1).bit_length()  # the power of two that holds all that are left
        if left < 3 * size // 4:
            size //= 2
        sizes.append(size)
        left -= min(size, left)
    return sizes


@dataclass(frozen=True)
class _Tile:
    """What the clients of a round have in common that are trained for the same lanes."""

    shape: _Shape
    labels: ctypes.Array[ctypes.c_void_p]  # for each lane [N]
    packed: Tensor  # the global models
    settings: Tensor  # [4, T]: learning rate, momentum, weight decay, largest norm
    setting_rows: ctypes.Array[ctypes.c_void_p]


@dataclass(frozen=True)
class _Client:
    """A client that is trained for the lanes of a tile."""

    work: ClientWork
    slots: tuple[int, ...]


class NativeTrainer:
    """Trains tiles of lanes by the compiled kernels, each in one call, so many at the same time."""

    def __init__(
        self,
        example: Experiment,
        data: ImageData,
        library: ctypes.CDLL,
        threads: int = 1,
        lanes: int = 16,
    ) -> None:
        """Serve cohorts of the shape, batch size and local epochs of `example`, `lanes` lanes a tile at most.

        Args:
            example: one of the experiments.
            data: on the CPU.
            library: the kernels, compiled for the type of the weights that will be given (float32 or float64).
            threads: tiles that are trained at the same time.
            lanes: one of `lane_counts`.
        """
        self.plan = f"native x{lanes}"
        self.example = example
        self.data = data
        self.shape = ModelShape.of(example, data)
        self.lanes = lanes
        self._library = library
        self.threads = Threads(threads)
        self.aggregators: Mapping[str, Aggregate] = {
            "fedavg": self._mean,
            "fedavg_uniform": lambda clients, counts: self._mean(clients, [1] * len(counts)),
        }
        self._spaces = threading.local()
        self._trained: Tensor | None = None
        library.fedsweep_workspace.restype = library.fedsweep_packed.restype = ctypes.c_size_t

    def workspace_bytes(self, lanes: int) -> int:
        """Memory that training a tile of so many lanes takes, besides the weights."""
        return int(self._library.fedsweep_workspace(ctypes.byref(self._shape(lanes, self.example.batch_size)), 1))

    def fixed_bytes(self) -> int:
        """Memory that all threads take for the tiles that they train."""
        return self.threads.count * self.workspace_bytes(self.lanes)

    def train(self, inputs: LaneInputs, works: Sequence[ClientWork], num_slots: int) -> Trained:
        """Train every client of `works`; see `Trainer.train`."""
        weights, labels = inputs.weights.contiguous(), inputs.labels.contiguous()
        trained = self._room_for(len(weights), num_slots, weights)
        finite = np.zeros((len(weights), num_slots), dtype=bool)
        start, row = trained.data_ptr(), trained.stride(1) * trained.element_size()
        table = _table(weights.dtype)
        settings = torch.stack([inputs.lr, inputs.momentum, inputs.weight_decay, inputs.max_grad_norm])
        settings = settings.to(weights.dtype)  # [4, E]

        @cache
        def tile(lanes: tuple[int, ...], size: int) -> _Tile:
            filled = _filled(lanes, size)
            shape = self._shape(size, self.example.batch_size)
            packed = self._packed(shape, weights, filled)
            own = settings[:, filled].contiguous()
            return _Tile(shape, _rows(labels, filled), packed, own, _rows(own, range(4)))

        def job(lanes: tuple[int, ...], size: int, clients: Sequence[_Client]) -> Callable[[], None]:
            own = tile(lanes, size)
            orders = [np.ascontiguousarray(client.work.order) for client in clients]
            epochs = np.array([client.work.epochs for client in clients], dtype=np.int64)
            samples = np.array([client.work.samples for client in clients], dtype=np.int64)
            found = np.empty((len(clients), size), dtype=np.uint8)
            places = []
            for client in clients:
                used = [start + (lane * num_slots + slot) * row for lane, slot in zip(lanes, client.slots, strict=True)]
                places += used + [0] * (size - len(used))

            def run() -> None:
                self._library.fedsweep_train(
                    ctypes.byref(own.shape),
                    _at(self.data.train_images),
                    _at(table),
                    ctypes.c_int64(len(clients)),
                    _pointers([order.ctypes.data for order in orders]),
                    ctypes.c_void_p(epochs.ctypes.data),
                    ctypes.c_void_p(samples.ctypes.data),
                    own.labels,
                    _at(own.packed),
                    _pointers(places),
                    ctypes.c_void_p(found.ctypes.data),
                    own.setting_rows,
                    self._space(own.shape, trains=True),
                )
                for client, each in zip(clients, found, strict=True):
                    finite[list(lanes), list(client.slots)] = each[: len(lanes)]

            return run

        together = -(-len(works) // (CALLS * self.threads.count))
        self.threads.run(job(*alike) for alike in self._in_calls(works, together))
        return Trained(trained, finite)

    def _in_calls(
        self, works: Sequence[ClientWork], together: int
    ) -> Iterator[tuple[tuple[int, ...], int, list[_Client]]]:
        """The works, the longest first, cut into tiles: lanes, tile size and up to so many clients for one call."""
        waiting: dict[tuple[tuple[int, ...], int], list[_Client]] = {}
        for work in sorted(works, key=lambda work: -work.images):
            first = 0
            for size in tiles(len(work.lanes), self.lanes):
                part = slice(first, first + size)
                key = work.lanes[part], size
                waiting.setdefault(key, []).append(_Client(work, work.slots[part]))
                if len(waiting[key]) == together:
                    yield *key, waiting.pop(key)
                first += size
        for key, clients in waiting.items():
            yield *key, clients

    def _room_for(self, experiments: int, num_slots: int, weights: Tensor) -> Tensor:
        """Where the clients' weights go: the same memory round after round, since new memory is slow to touch."""
        size = (experiments, num_slots, weights.shape[1])
        if self._trained is None or self._trained.shape != size or self._trained.dtype != weights.dtype:
            self._trained = torch.zeros(size, dtype=weights.dtype)
        return self._trained

    def logits(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits of images by each model; see `Trainer.logits`."""
        weights, images = weights.contiguous(), images.contiguous()
        out = torch.empty(len(weights), len(images), self.shape.num_classes, dtype=weights.dtype)
        table = _table(weights.dtype)

        def job(shape: _Shape, packed: Tensor, rows: range, first: int, last: int) -> Callable[[], None]:
            def run() -> None:
                part = out[:, first:last]
                self._library.fedsweep_logits(
                    ctypes.byref(shape),
                    _at(images[first:last]),
                    _at(table),
                    ctypes.c_int64(last - first),
                    _at(packed),
                    _pointers([part[row].data_ptr() for row in rows] + [0] * (shape.lanes - len(rows))),
                    self._space(shape, trains=False),
                )

            return run

        def jobs() -> Iterator[Callable[[], None]]:
            row = 0
            for size in tiles(len(weights), self.lanes):
                rows = range(row, min(row + size, len(weights)))
                shape = self._shape(size, APPLIED)
                packed = self._packed(shape, weights, _filled(tuple(rows), size))
                for first in range(0, len(images), 16 * APPLIED):
                    yield job(shape, packed, rows, first, min(first + 16 * APPLIED, len(images)))
                row += size

        self.threads.run(jobs())
        return out

    def _mean(self, clients: Tensor, counts: Sequence[int]) -> Tensor:
        """`aggregate.fed_avg` of clients [E, K, P] with so many samples each, [E, P]."""
        combined = torch.empty_like(clients[:, 0])
        shares = torch.tensor(counts, dtype=torch.float64)

        def job(row: int, first: int, last: int) -> Callable[[], None]:
            places = _rows(clients[row, :, first:last], range(len(counts)))
            own = combined[row, first:last]
            return lambda: self._library.fedsweep_mean(
                ctypes.c_int64(len(counts)), places, _at(shares), ctypes.c_int64(last - first), _at(own)
            )

        cuts = [clients.shape[2] * part // self.threads.count for part in range(self.threads.count + 1)]
        self.threads.run(job(row, *cut) for row in range(len(clients)) for cut in pairwise(cuts))
        return combined

    def _packed(self, shape: _Shape, weights: Tensor, rows: Sequence[int]) -> Tensor:
        """The models of a tile as the kernels take them."""
        packed = torch.empty(int(self._library.fedsweep_packed(ctypes.byref(shape))), dtype=weights.dtype)
        self._library.fedsweep_pack(ctypes.byref(shape), _rows(weights, rows), _at(packed))
        return packed

    def _shape(self, lanes: int, batch: int) -> _Shape:
        shape = self.shape
        return _Shape(
            shape.model_type == "cnn",
            shape.width_factor,
            shape.depth,
            shape.num_classes,
            shape.in_channels,
            shape.img_size,
            batch,
            lanes,
        )

    def _space(self, shape: _Shape, *, trains: bool) -> ctypes.c_void_p:
        """Memory of the calling thread for one call; it grows to the largest that was asked for."""
        size = int(self._library.fedsweep_workspace(ctypes.byref(shape), int(trains)))
        if not hasattr(self._spaces, "memory") or len(self._spaces.memory) < size + 64:
            self._spaces.memory = torch.empty(size + 64, dtype=torch.uint8)
        address = self._spaces.memory.data_ptr()
        return ctypes.c_void_p(address + -address % 64)


def _table(dtype: torch.dtype) -> Tensor:
    """What each byte of an image becomes."""
    return normalised(torch.arange(256, dtype=torch.uint8)).to(dtype)


def _filled(lanes: tuple[int, ...], size: int) -> list[int]:
    """The lanes of a tile; places that are left repeat the first, and what comes of them is dropped."""
    return [*lanes, *[lanes[0]] * (size - len(lanes))]


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _rows(matrix: Tensor, rows: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    """Pointers to rows of a contiguous matrix."""
    stride = matrix.stride(0) * matrix.element_size()
    return _pointers([matrix.data_ptr() + row * stride for row in rows])


def _pointers(addresses: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*addresses)
