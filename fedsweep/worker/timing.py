"""Timing a trainer on a piece of a round: real images, real batches, as many experiments together as will be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsweep.fl.data import ImageData
from fedsweep.fl.federation import participants
from fedsweep.fl.lanes import ClientWork, LaneInputs, ModelShape, Trainer
from fedsweep.fl.reference import initial_model
from fedsweep.plan.experiment import Experiment

FIRST_IMAGES = 16  # of the first batch, which tells how large a piece can be timed
MANY = 8  # clients a thread


@dataclass(frozen=True)
class Amounts:
    """What an experiment does in a round; means over clients."""

    clients: int  # that take part
    images: int  # that each of them holds
    validation: int  # images that the global model is evaluated on

    @classmethod
    def of(cls, experiment: Experiment, data: ImageData) -> Amounts:
        """The amounts of an experiment on these images."""
        validation = max(1, round(len(data.train_labels) * experiment.validation_split))
        held = (len(data.train_labels) - validation) // experiment.num_clients
        return cls(len(participants(experiment, 1)), max(2, held), validation)


@dataclass(frozen=True)
class Piece:
    """A part of a round of experiments that see the same images: some of their clients, some of the images of each."""

    inputs: LaneInputs
    works: tuple[ClientWork, ...]
    validation: Tensor  # uint8 [m, C, S, S]: as large a share of the validation images as of the training

    @property
    def lanes(self) -> int:
        """Experiments."""
        return len(self.inputs.weights)

    @property
    def lane_images(self) -> int:
        """Images that are trained on, counted for each experiment."""
        return self.lanes * sum(work.images for work in self.works)


def piece_of(example: Experiment, data: ImageData, *, lanes: int, clients: int, images: int) -> Piece:
    """A piece with so many experiments, clients of each, and images of each client in all its local epochs."""
    amounts = Amounts.of(example, data)
    own = min(images, amounts.images)
    epochs = max(1, min(images // own, example.local_epochs))
    chance = np.random.default_rng(0)
    works = tuple(
        ClientWork.of(
            lanes=tuple(range(lanes)),
            slots=(slot,) * lanes,
            order=np.stack([chance.permutation(len(data.train_labels))[:own] for _ in range(epochs)]),
        )
        for slot in range(clients)
    )
    share = clients * epochs * own / (amounts.clients * example.local_epochs * amounts.images)
    shown = max(1, min(round(share * amounts.validation), len(data.train_labels)))
    return Piece(_inputs(example, data, lanes), works, data.train_images[:shown])


def _inputs(example: Experiment, data: ImageData, lanes: int) -> LaneInputs:
    device = data.train_labels.device
    row = ModelShape.of(example, data).layout.flatten(initial_model(example, data).state_dict())
    norm = float("inf") if example.max_grad_norm is None else example.max_grad_norm

    def setting(value: float) -> Tensor:
        return torch.full((lanes,), value, dtype=torch.float64)

    return LaneInputs(
        weights=row.repeat(lanes, 1).to(device),
        labels=data.train_labels.repeat(lanes, 1),
        lr=setting(example.lr),
        momentum=setting(example.momentum),
        weight_decay=setting(example.weight_decay),
        max_grad_norm=setting(norm),
    )


def affordable_piece(
    trainer: Trainer,
    example: Experiment,
    data: ImageData,
    *,
    lanes: int,
    threads: int,
    seconds: float,
    many_clients: bool = False,
) -> Piece:
    """A piece that takes this trainer about so many seconds, or less where a whole round does; never much more.

    The number of experiments is kept, since kernels differ in how they use it; clients, down to one a thread, then
    images are cut. With `many_clients` there are as many as keep all threads busy to the end, as in a round.
    """
    amounts = Amounts.of(example, data)
    first = piece_of(example, data, lanes=1, clients=1, images=min(FIRST_IMAGES, amounts.images))
    work_through(trainer, first)  # what runs for the first time is slow
    image_s = timed(lambda: work_through(trainer, first), data) / first.lane_images
    lane_images = seconds * threads / image_s
    # Rather fewer experiments than a piece that takes ten times as long, as that of a huge model would.
    lanes = max(1, min(lanes, int(10 * lane_images / first.lane_images)))
    batch = min(example.batch_size, amounts.images)
    if many_clients:
        clients = max(MANY * threads, int(lane_images / (lanes * _whole(example, amounts))))
    else:
        clients = max(threads, min(2 * threads, int(lane_images / (lanes * batch))))
    clients = min(clients, amounts.clients)
    images = max(min(FIRST_IMAGES, batch), min(int(lane_images / (lanes * clients)), _whole(example, amounts)))
    return piece_of(example, data, lanes=lanes, clients=clients, images=images)


def _whole(example: Experiment, amounts: Amounts) -> int:
    return amounts.images * example.local_epochs


def work_through(trainer: Trainer, piece: Piece) -> None:
    """Train and evaluate a piece."""
    trainer.train(piece.inputs, piece.works, len(piece.works))
    trainer.logits(piece.inputs.weights, piece.validation)


def median_of(times: int, call: Callable[[], object], data: ImageData) -> float:
    """The median of so many times."""
    return statistics.median(timed(call, data) for _ in range(times))


def timed(call: Callable[[], object], data: ImageData) -> float:
    """Seconds that a call takes, with everything that it starts on the device of the data."""
    on_gpu = data.train_images.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return max(time.perf_counter() - start, 1e-9)
