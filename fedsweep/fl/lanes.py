"""Lanes: the clients of many experiments as rows of tensors, and what trains them.

A *lane* is one client of one experiment. Models are rows of floating-point numbers, [P], in the order of the state dict
(`StateLayout`), so that a round is tensors in, tensors out: global weights [E, P] to client weights [E, S, P], with E
experiments and S clients a round. How that is computed is a `Trainer`'s business: one lane after another by the plain
modules (`fl.loop`), stacked along a leading axis (`fl.stacked`), or by compiled kernels (`fl.native`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsweep.fl.data import ImageData
from fedsweep.fl.models import MODELS
from fedsweep.fl.threads import Threads
from fedsweep.plan.experiment import Experiment


@dataclass(frozen=True)
class ModelShape:
    """What decides the tensors of a model."""

    model_type: str  # a key of `MODELS`
    width_factor: int
    depth: int
    num_classes: int
    in_channels: int
    img_size: int

    @classmethod
    def of(cls, experiment: Experiment, data: ImageData) -> ModelShape:
        """The shape of an experiment's model on these images."""
        return cls(
            experiment.model_type,
            experiment.width_factor,
            experiment.depth,
            data.num_classes,
            data.in_channels,
            data.img_size,
        )

    def build(self) -> nn.Module:
        """A model of this shape without storage, on the device `meta`."""
        with torch.device("meta"):
            model: nn.Module = MODELS[self.model_type](
                self.num_classes, self.width_factor, self.depth, self.in_channels, self.img_size
            )
        return model

    @cached_property
    def layout(self) -> StateLayout:
        """Where each tensor of the model lies in a row of numbers."""
        return StateLayout.of(self.build())


@dataclass(frozen=True)
class StateLayout:
    """Where each floating-point tensor of a state dict lies in a row of P numbers.

    Whole-number tensors (`num_batches_tracked`) count the same steps in every layer: one number beside the row.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    counters: tuple[str, ...]  # names of the whole-number tensors

    @classmethod
    def of(cls, model: nn.Module) -> StateLayout:
        """The layout of a model's state dict."""
        state = model.state_dict()
        floating = {name: tensor.shape for name, tensor in state.items() if tensor.is_floating_point()}
        return cls(tuple(floating), tuple(floating.values()), tuple(name for name in state if name not in floating))

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """P, the numbers of all tensors."""
        return sum(self.sizes)

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """A state dict as a row [P]."""
        return torch.cat([state[name].detach().reshape(-1) for name in self.names])

    def unflatten(self, row: Tensor, steps: int = 0) -> dict[str, Tensor]:
        """A row [..., P] as a state dict of views [..., *shape]; every counter is `steps`."""
        parts = torch.split(row, self.sizes, dim=-1)
        state = {
            name: part.reshape(*row.shape[:-1], *shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        return state | {name: torch.tensor(steps, device=row.device) for name in self.counters}


@dataclass(frozen=True)
class LaneInputs:
    """What E experiments of one cohort bring to a round."""

    weights: Tensor  # floating [E, P], the global models
    labels: Tensor  # int64 [E, N], as training sees them, for every sample of the training set
    lr: Tensor  # float64 [E], on the CPU, as are the next three
    momentum: Tensor
    weight_decay: Tensor
    max_grad_norm: Tensor  # inf: not clipped


@dataclass(frozen=True)
class ClientWork:
    """One client's training in a round, for all experiments in which it sees the same images in the same order."""

    lanes: tuple[int, ...]  # rows of `LaneInputs`, one or more
    slots: tuple[int, ...]  # for each of them the client's place among the participants, 0 … S-1
    epochs: int
    samples: int  # n
    draw: Callable[[], NDArray[np.int64]]  # makes `order`, when it is asked for: other clients may be training by then

    @classmethod
    def of(cls, lanes: tuple[int, ...], slots: tuple[int, ...], order: NDArray[np.int64]) -> ClientWork:
        """Work in a given order, [local_epochs, n]."""
        epochs, samples = order.shape
        return cls(lanes, slots, epochs, samples, lambda: order)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Positions in the whole training set, [local_epochs, n]."""
        return self.draw()

    @property
    def images(self) -> int:
        """Images that each lane sees."""
        return self.epochs * self.samples

    def steps(self, batch_size: int) -> int:
        """Training steps: batches of one sample are left out."""
        return int(self.epochs * (self.samples // batch_size + (self.samples % batch_size > 1)))


@dataclass(frozen=True)
class Trained:
    """What a round made of the clients of E experiments. The tensors are the caller's until the next round."""

    weights: Tensor  # [E, S, P]; where no client was trained, anything
    finite: NDArray[np.bool_]  # [E, S], whether all numbers of a client are; where none was trained, anything

    @classmethod
    def of(cls, weights: Tensor) -> Trained:
        """Look for numbers that are not finite."""
        finite = weights.sum(dim=2).isfinite()  # fast; a sum may overflow where no number has
        for row, slot in (~finite).nonzero().tolist():
            finite[row, slot] = weights[row, slot].isfinite().all()
        return cls(weights, finite.cpu().numpy())


Aggregate = Callable[[Tensor, Sequence[int]], Tensor]  # weights [E, K, P] and K sample counts to [E, P]


class Trainer(Protocol):
    """Trains lanes and applies models, for experiments of one shape, batch size and number of local epochs.

    The same inputs give the same bits, and a lane's do not depend on which other lanes there are.
    """

    plan: str  # a short name, written into the row: which kernels these are
    threads: Threads  # that it trains with

    @property
    def aggregators(self) -> Mapping[str, Aggregate]:
        """Some of `aggregate.AGGREGATORS` for E experiments of K clients, faster, with the same bits."""

    def train(self, inputs: LaneInputs, works: Sequence[ClientWork], num_slots: int) -> Trained:
        """Train every client of `works` from its experiment's global weights, as `reference.train_client` does."""

    def logits(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits [E, M, L] of images uint8 [M, C, S, S] by models [E, P] in evaluation mode."""
