"""All lanes of a round as one tensor program in plain PyTorch, meant for GPUs.

Lanes are trained in tiles of a fixed number of places (see `fl.stacked_model`); places that are left over repeat a lane
and what comes of them is dropped. Works are sorted by their number of steps, so the works of a tile end at about the
same step, and a tile ends with its longest: a small client costs nothing after its last batch. Batches line up by the
number of the step. With one work a tile a batch has its own size; where several share a tile, and on a GPU, batches are
padded to the full size, and a mask says which samples count.

On a GPU the step is captured as a CUDA graph and replayed. Neither the graph nor anything else here has been run on a
GPU yet; the function that is captured is the one that runs on a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.backends import cudnn

from fedsweep.fl.data import ImageData, normalised
from fedsweep.fl.lanes import Aggregate, ClientWork, LaneInputs, ModelShape, Trained
from fedsweep.fl.stacked_graph import Batch, TileProgram, for_lanes
from fedsweep.fl.stacked_model import Kernel, Packing, StackedModel
from fedsweep.fl.threads import Threads
from fedsweep.plan.experiment import Experiment

Precision = Literal["float32", "tf32", "bf16"]

APPLIED = 128  # images at once where models are only applied


def plan_name(kernel: Kernel, lanes: int, works: int = 1, precision: Precision = "float32") -> str:
    """What the plan of such a trainer is called."""
    size = f"x{lanes}" if works == 1 else f"{works}x{lanes}"
    return f"stacked {kernel} {size}" + ("" if precision == "float32" else f" {precision}")


class StackedTrainer:
    """Trains tiles of `works` clients with `lanes` experiments each, every tile as one program.

    Attributes:
        plan: see `Trainer`.
        uses_graphs: whether the last tile ran as a CUDA graph; None where none has run yet.
    """

    def __init__(
        self,
        example: Experiment,
        data: ImageData,
        *,
        kernel: Kernel = "grouped",
        lanes: int = 16,
        works: int = 1,
        precision: Precision = "float32",
        threads: int = 1,
        static: bool | None = None,
    ) -> None:
        """Serve cohorts of the shape, batch size and local epochs of `example` on `data`, which lies on its device.

        Args:
            example: one of the experiments.
            data: on the device.
            kernel: how to convolve.
            lanes: experiments of one work in a tile.
            works: works in a tile.
            precision: of products and convolutions: as the weights are, rounded to TF32, or in bfloat16.
            threads: tiles at the same time, on a CPU.
            static: whether every step runs over the same buffers. None: on a GPU, and with several works a tile.
        """
        self.data = data
        self.shape = ModelShape.of(example, data)
        self.uses_graphs: bool | None = None
        self.plan = plan_name(kernel, lanes, works, precision)
        self._batch_size = example.batch_size
        self._precision: Precision = precision
        self._static = data.train_images.is_cuda or works > 1 if static is None else static
        # On a CPU sums over channels-last maps depend on the place of a channel, except those of PyTorch's batch norm.
        channels_last = data.train_images.is_cuda or not self._static
        self._model = StackedModel(self.shape, works, lanes, kernel, channels_last)
        self._applied_model = StackedModel(self.shape, 1, works * lanes, kernel)
        self._packing = Packing(self.shape, data.train_images.device)
        self.aggregators: Mapping[str, Aggregate] = {}
        self.threads = Threads(1 if data.train_images.is_cuda else threads)
        self._local = threading.local()

    @property
    def _device(self) -> torch.device:
        return self.data.train_images.device

    def train(self, inputs: LaneInputs, works: Sequence[ClientWork], num_slots: int) -> Trained:
        """Train every client of `works`; see `Trainer.train`."""
        trained = inputs.weights.new_empty(len(inputs.weights), num_slots, inputs.weights.shape[1])
        settings = torch.stack([inputs.lr, inputs.momentum, inputs.weight_decay, inputs.max_grad_norm])  # [4, E]
        settings = settings.to(self._device, inputs.weights.dtype)
        tiles = _tiles(works, self._model.works, self._model.lanes, self._batch_size, self._device)
        self._run([partial(self._train_tile, inputs, settings, tile, trained) for tile in tiles])
        return Trained.of(trained)

    def logits(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits of images by each model; see `Trainer.logits`."""
        out = weights.new_empty(len(weights), len(images), self.shape.num_classes)
        places = self._model.places
        jobs = []
        for first in range(0, len(weights), places):
            part = weights[first : first + places]
            filled = torch.cat([part, part[:1].expand(places - len(part), -1)])
            jobs.append(partial(self._apply, filled, images, out[first : first + places]))
        self._run(jobs)
        return out

    def _run(self, jobs: Sequence[Callable[[], None]]) -> None:
        with _rounding(self._precision):
            self.threads.run(jobs)

    def _autocast(self) -> torch.autocast:
        # Nothing is cached: what a graph has captured must not live on outside of it.
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16", cache_enabled=False)

    @torch.no_grad()
    def _apply(self, rows: Tensor, images: Tensor, out: Tensor) -> None:
        weights, stats = self._packing.tensors(self._packing.pack(rows)), self._packing.stats(rows)
        with self._autocast():
            for batch, part in zip(torch.split(images, APPLIED), torch.split(out, APPLIED, dim=1), strict=True):
                pixels = normalised(batch).to(rows.dtype)[None]
                logits = self._applied_model.logits(weights, stats, pixels, training=False)  # [T, L, B]
                part.copy_(logits[: len(part)].transpose(1, 2))

    @torch.no_grad()
    def _train_tile(self, inputs: LaneInputs, settings: Tensor, tile: _Tile, trained: Tensor) -> None:
        program = self._program(inputs.weights.dtype)
        program.start(inputs.weights.index_select(0, tile.lanes), settings.index_select(1, tile.lanes))
        for number, sizes in enumerate(tile.host_sizes):
            positions = tile.positions[number]  # [G, B]
            if not self._static:
                positions = positions[:, : sizes[0]]
            labels = inputs.labels[tile.lanes[:, None], for_lanes(positions, self._model.lanes)]  # [T, B]
            is_full = len(sizes) == 1 and sizes[0] == positions.shape[1]
            program.step(Batch(positions, labels, tile.sizes[number]), masked=not is_full)
        self.uses_graphs = program.uses_graphs
        trained[tile.kept_lanes, tile.kept_slots] = program.rows().index_select(0, tile.kept)

    def _program(self, dtype: torch.dtype) -> TileProgram:
        """The program of the calling thread."""
        if getattr(self._local, "dtype", None) is not dtype:
            self._local.program = TileProgram(
                self._model,
                self._packing,
                self.data.train_images,
                self._batch_size if self._static else None,
                dtype,
                self._autocast,
            )
            self._local.dtype = dtype
        program: TileProgram = self._local.program
        return program


@contextmanager
def _rounding(precision: Precision) -> Iterator[None]:
    """Whether a GPU rounds to TF32; its convolutions repeat bit for bit (`fl.repeatable`)."""
    matmul, tf32 = torch.backends.cuda.matmul, precision == "tf32"
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32
    try:
        with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        matmul.allow_tf32 = before


# ---- the tiles of a round --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """G works with X lanes each: what they see in each step, and where their weights come from and go."""

    positions: Tensor  # int64 [steps, G, B]
    sizes: Tensor  # int64 [steps, G]
    host_sizes: NDArray[np.int64]  # the same
    lanes: Tensor  # int64 [T], rows of `LaneInputs`
    kept: Tensor  # int64 [k], places of real lanes
    kept_lanes: Tensor  # int64 [k], their rows
    kept_slots: Tensor  # int64 [k]


@dataclass(frozen=True)
class _Part:
    """Up to X lanes of a work."""

    lanes: tuple[int, ...]
    slots: tuple[int, ...]
    positions: NDArray[np.int64]  # [steps, B]
    sizes: NDArray[np.int64]  # [steps]


def _tiles(
    works: Sequence[ClientWork], per_tile: int, lanes: int, batch_size: int, device: torch.device
) -> list[_Tile]:
    """The tiles of a round, the longest first. All their indices go to the device at once."""
    parts = []
    for work in works:
        positions, sizes = _batches(work.order, batch_size)
        for first in range(0, len(work.lanes), lanes):
            part = slice(first, first + lanes)
            parts.append(_Part(work.lanes[part], work.slots[part], positions, sizes))
    parts.sort(key=lambda part: -len(part.sizes))  # stable
    tables = [_tables(parts[first : first + per_tile], per_tile, lanes) for first in range(0, len(parts), per_tile)]
    moved = iter(_moved([table for group in tables for table in group], device))
    tiles = []
    for group in tables:
        positions_, sizes_, own_lanes, kept, kept_lanes, kept_slots = (next(moved) for _ in group)
        tiles.append(_Tile(positions_, sizes_, group[1], own_lanes, kept, kept_lanes, kept_slots))
    return tiles


def _batches(order: NDArray[np.int64], batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The batches of all epochs, [steps, B], padded with their first sample; and their sizes, [steps]."""
    epochs, samples = order.shape
    count = -(-samples // batch_size)
    sizes = np.minimum(batch_size, samples - batch_size * np.arange(count))
    padded = np.repeat(order[:, ::batch_size], batch_size, axis=1)
    padded[:, :samples] = order
    kept = sizes > 1
    batches = padded.reshape(epochs, count, batch_size)[:, kept]
    return batches.reshape(-1, batch_size), np.tile(sizes[kept], epochs)


def _tables(parts: Sequence[_Part], works: int, lanes: int) -> tuple[NDArray[np.int64], ...]:
    """The index tables of a tile, in the order of `_Tile`; works that are missing have no samples."""
    steps, batch_size = parts[0].positions.shape
    positions = np.zeros((steps, works, batch_size), dtype=np.int64)
    sizes = np.zeros((steps, works), dtype=np.int64)
    filled = np.full((works, lanes), parts[0].lanes[0], dtype=np.int64)
    for place, part in enumerate(parts):
        positions[: len(part.sizes), place] = part.positions
        sizes[: len(part.sizes), place] = part.sizes
        filled[place] = part.lanes[0]
        filled[place, : len(part.lanes)] = part.lanes
    kept = [place * lanes + lane for place, part in enumerate(parts) for lane in range(len(part.lanes))]
    slots = [slot for part in parts for slot in part.slots]
    return positions, sizes, filled.flatten(), np.array(kept), filled.flatten()[kept], np.array(slots)


def _moved(tables: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Tables of whole numbers on the device, by one transfer."""
    flat = torch.from_numpy(np.concatenate([table.reshape(-1) for table in tables]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = torch.split(flat, [table.size for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]
