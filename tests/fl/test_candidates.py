"""What a plan is chosen from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from fedsweep.fl.candidates import arithmetic, candidates
from fedsweep.fl.data import ImageData
from fedsweep.plan.experiment import Experiment


def test_kernels_come_with_as_many_lanes_as_can_be_filled(
    digits: ImageData, kernels: Callable[[torch.dtype], ctypes.CDLL]
) -> None:
    library = kernels(torch.float32)
    assert list(candidates(Experiment(), digits, 1, 1, library)) == ["native x1", "loop"]
    assert list(candidates(Experiment(), digits, 1, 4, library)) == ["native x4", "native x2", "native x1", "loop"]
    assert next(iter(candidates(Experiment(width_factor=16), digits, 1, 16, library))) == "native x4"
    wide = Experiment(width_factor=128)
    assert list(candidates(wide, digits, 1, 4, library)) == ["stacked grouped x4", "stacked unfold x4", "loop"]


def test_without_kernels_there_is_the_stacked_step_and_the_loop(digits: ImageData) -> None:
    assert list(candidates(Experiment(), digits, 1, 4)) == ["stacked grouped x4", "stacked unfold x4", "loop"]
    assert list(candidates(Experiment(model_type="lr"), digits, 1, 16)) == ["stacked grouped x16", "loop"]


def test_a_candidate_has_the_plan_that_it_is_named_by(
    digits: ImageData, kernels: Callable[[torch.dtype], ctypes.CDLL]
) -> None:
    for library in (kernels(torch.float32), None):
        for name, make in candidates(Experiment(), digits, 2, 8, library).items():
            assert make().plan == name


def test_tiles_of_any_size_count_as_the_same_arithmetic() -> None:
    assert arithmetic("native x16") == arithmetic("native x1") == "native"
    assert arithmetic("stacked grouped x4") != arithmetic("stacked grouped x16")
    assert arithmetic("loop") == "loop"
