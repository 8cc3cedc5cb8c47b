"""Which trainers can train experiments of one shape: what a plan is chosen from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

from fedsweep.fl.data import ImageData
from fedsweep.fl.lanes import ModelShape, Trainer
from fedsweep.fl.loop import LoopTrainer
from fedsweep.fl.native import NativeTrainer, lane_counts
from fedsweep.fl.stacked import StackedTrainer, plan_name
from fedsweep.fl.stacked_model import Kernel
from fedsweep.plan.experiment import Experiment

NATIVE = "native"  # how the plans of the compiled kernels begin
GPU_WORKS = (1, 8)  # clients of one tile, on a GPU


def candidates(
    example: Experiment, data: ImageData, threads: int, lanes: int, library: ctypes.CDLL | None = None
) -> dict[str, Callable[[], Trainer]]:
    """Trainers by the name of their plan; those most likely fast first, the plain loop last.

    Args:
        example: one of the experiments.
        data: on the device to train on.
        threads: of this process, for training on a CPU.
        lanes: how many experiments share their images at most.
        library: the compiled kernels, for training on a CPU.
    """
    found: dict[str, Callable[[], Trainer]] = {}
    if library is not None and not data.train_images.is_cuda:
        for count in reversed(_worth_trying(example, data, library, lanes)):
            found[f"{NATIVE} x{count}"] = _native(example, data, library, threads, count)
    if data.train_images.is_cuda:
        for works in GPU_WORKS:
            found |= _stacked(example, data, threads, lanes, works)
    elif not found:
        found |= _stacked(example, data, threads, lanes, works=1)
    found["loop"] = lambda: LoopTrainer(example, data, threads)
    return found


def arithmetic(plan: str) -> str:
    """What decides the bits of what a plan computes: the kernels give the same ones in tiles of any size."""
    return NATIVE if plan.startswith(f"{NATIVE} ") else plan


def _stacked(
    example: Experiment, data: ImageData, threads: int, lanes: int, works: int
) -> dict[str, Callable[[], Trainer]]:
    """All lanes of some works as one program; a multilayer perceptron has no convolution to choose."""
    kernels: tuple[Kernel, ...] = ("grouped", "unfold") if example.model_type == "cnn" else ("grouped",)
    made: dict[str, Callable[[], Trainer]] = {}
    for kernel in kernels:
        make = partial(StackedTrainer, example, data, kernel=kernel, lanes=lanes, works=works, threads=threads)
        made[plan_name(kernel, lanes, works)] = make
    return made


def _worth_trying(example: Experiment, data: ImageData, library: ctypes.CDLL, lanes: int) -> list[int]:
    """Lanes a tile: up to what is there to fill them."""
    counts = lane_counts(ModelShape.of(example, data), int(library.fedsweep_vector_length()))
    return [count for count in counts if count == 1 or count < 2 * lanes]


def _native(
    example: Experiment, data: ImageData, library: ctypes.CDLL, threads: int, count: int
) -> Callable[[], Trainer]:
    return lambda: NativeTrainer(example, data, library, threads, count)
