"""The local step of a tile of lanes, over fixed buffers also as a CUDA graph: one launch for all its kernels.

The graph has not been run on a GPU yet. What is captured is the very function that runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedsweep.fl.data import normalised
from fedsweep.fl.stacked_model import Mask, Packing, StackedModel

WARM_UP = 3  # runs before capturing, in which libraries choose and load their kernels


def captured(function: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], bool]:
    """A function that does the same, and whether it is a graph. On a CPU, or where capturing fails, it is the function.

    The function is run a few times, so what its buffers hold afterwards means nothing. It allocates nothing that
    outlives it, and never waits for the device.

    Raises:
        OutOfMemoryError: the graph's memory does not fit.
    """
    if device.type != "cuda":
        return function, False
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return function, False
    return graph.replay, True


@dataclass(frozen=True)
class Batch:
    """What the G works of a tile see in one step, and what their lanes are told it is."""

    positions: Tensor  # int64 [G, B], in the training set; padding repeats any sample
    labels: Tensor  # int64 [T, B]
    sizes: Tensor  # int64 [G], real samples; 0 where a work has ended


class TileProgram:
    """The training of one tile: weights and what belongs to them, and the step that changes them in place.

    Args:
        model: of the tile's size.
        packing: of its weights.
        images: uint8 [N, C, S, S], the training set.
        batch_size: run every step over buffers of this many samples, as a CUDA graph where that is possible. None: run
            each over the batch as it comes.
        dtype: of weights and activations.
        autocast: gives the context of a forward pass.
    """

    def __init__(
        self,
        model: StackedModel,
        packing: Packing,
        images: Tensor,
        batch_size: int | None,
        dtype: torch.dtype,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self._model, self._packing, self._images, self._autocast = model, packing, images, autocast
        blank = torch.zeros(model.places, model.shape.layout.size, dtype=dtype, device=images.device)
        self._weights = packing.pack(blank)  # [T, Q]
        self._velocity = torch.zeros_like(self._weights)
        self._stats = packing.stats(blank)
        self._settings = blank.new_zeros(4, model.places)
        self._buffers: Batch | None = None
        self.uses_graphs = False
        if batch_size is not None:
            self._use_buffers(batch_size)

    def _use_buffers(self, batch_size: int) -> None:
        model = self._model

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self._images.device)

        self._buffers = Batch(
            zeros(model.works, batch_size), zeros(model.places, batch_size), zeros(model.works).fill_(batch_size)
        )
        runs = {
            masked: captured(partial(self.eager_step, self._buffers, masked=masked), self._images.device)
            for masked in ((True,) if model.works > 1 else (True, False))
        }
        self._runs = {masked: run for masked, (run, _) in runs.items()}
        self.uses_graphs = all(is_graph for _, is_graph in runs.values())

    def start(self, rows: Tensor, settings: Tensor) -> None:
        """Begin with weights [T, P] and with lr, momentum, weight decay and greatest norm [4, T]."""
        self._weights.copy_(self._packing.pack(rows))
        self._velocity.zero_()
        for name, stat in self._packing.stats(rows).items():
            self._stats[name].copy_(stat)
        self._settings.copy_(settings)

    def rows(self) -> Tensor:
        """The weights as they are now, [T, P]."""
        return self._packing.rows(self._weights, self._stats)

    def step(self, batch: Batch, *, masked: bool) -> None:
        """One step of every lane.

        Args:
            batch: of full size where there are buffers.
            masked: whether not all of its samples count.
        """
        if self._buffers is None:
            self.eager_step(batch, masked=masked)
            return
        self._buffers.positions.copy_(batch.positions)
        self._buffers.labels.copy_(batch.labels)
        self._buffers.sizes.copy_(batch.sizes)
        self._runs[masked]()

    @torch.no_grad()
    def eager_step(self, batch: Batch, *, masked: bool) -> None:
        """The step itself: nothing in it waits for the device, and it keeps nothing but what it changes in place."""
        model, dtype = self._model, self._weights.dtype
        images = normalised(self._images.index_select(0, batch.positions.flatten())).to(dtype)
        images = images.view(*batch.positions.shape, *images.shape[1:])  # [G, B, C, S, S]
        mask = _mask(batch, model.lanes, dtype) if masked else None
        weights = self._weights.detach().requires_grad_()
        with torch.enable_grad(), self._autocast():
            logits = model.logits(self._packing.tensors(weights), self._stats, images, training=True, mask=mask)
        by_logits = _loss_gradient(logits.detach().to(dtype), batch.labels, mask)
        (gradient,) = torch.autograd.grad(logits, weights, by_logits.to(logits.dtype))
        self._descend(gradient, None if mask is None else mask.active)

    def _descend(self, gradient: Tensor, active: Tensor | None) -> None:
        """Clipping as by `nn.utils.clip_grad_norm_`, then the step of `torch.optim.SGD`, with gradients [T, Q]."""
        lr, momentum, weight_decay, max_norm = self._settings[..., None]  # [T, 1] each
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        kept = torch.where(max_norm.isinf(), torch.ones_like(norm), (max_norm / (norm + 1e-6)).clamp(max=1))
        velocity = self._velocity * momentum + (gradient * kept).addcmul_(self._weights, weight_decay)
        weights = torch.addcmul(self._weights, velocity, lr, value=-1)
        if active is not None:  # a lane that has ended stays so: its velocity no longer matters
            weights = torch.where(active, weights, self._weights)
        self._velocity.copy_(velocity)
        self._weights.copy_(weights)


def for_lanes(by_work: Tensor, lanes: int) -> Tensor:
    """[G, …] as [G · X, …], each row X times."""
    return by_work[:, None].expand(-1, lanes, *by_work.shape[1:]).flatten(0, 1)


def _mask(batch: Batch, lanes: int, dtype: torch.dtype) -> Mask:
    sizes = for_lanes(batch.sizes, lanes)[:, None]  # [T, 1]
    is_real = torch.arange(batch.positions.shape[1], device=sizes.device) < sizes
    return Mask(is_real.to(dtype), sizes.flatten().to(dtype), sizes > 0)


def _loss_gradient(logits: Tensor, labels: Tensor, mask: Mask | None) -> Tensor:
    """The gradient, by logits [T, L, B], of the sum over lanes of the mean cross-entropy with labels [T, B]."""
    gradient = torch.softmax(logits, dim=1)
    chosen = labels[:, None]
    gradient.scatter_(1, chosen, gradient.gather(1, chosen) - 1)
    if mask is None:
        return gradient / labels.shape[1]
    return gradient * (mask.samples / mask.counts.clamp(min=1)[:, None])[:, None]
