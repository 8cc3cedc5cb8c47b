"""Data sets and helpers for the tests of the science."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from sklearn.datasets import load_digits

from fedsweep.fl.data import ImageData
from fedsweep.fl.outcome import Outcome
from fedsweep.fl.reference import run
from fedsweep.plan.experiment import Experiment
from fedsweep.worker.kernels import load_kernels


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> ImageData:
    """Scikit-learn's 1,797 real digits, every fifth for testing."""
    bunch = load_digits()
    images = torch.from_numpy((bunch.images * 255 / 16).round().astype("uint8"))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.arange(len(labels)) % 5 == 0
    return ImageData("digits", images[~is_test], labels[~is_test], images[is_test], labels[is_test], 10)


@pytest.fixture(scope="session")
def random_data() -> Callable[..., ImageData]:
    """Random images: `random_data(num_classes=…, channels=…, side=…, train=…, test=…)`."""

    def make(num_classes: int = 10, channels: int = 1, side: int = 4, train: int = 300, test: int = 40) -> ImageData:
        generator = torch.Generator().manual_seed(7)

        def images(count: int) -> torch.Tensor:
            return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)

        def labels(count: int) -> torch.Tensor:
            return torch.randint(0, num_classes, (count,), generator=generator)

        return ImageData("random", images(train), labels(train), images(test), labels(test), num_classes)

    return make


@pytest.fixture(scope="session")
def finish() -> Callable[..., Outcome]:
    """Run an experiment to its end: `finish(experiment, data, …)` with the arguments of `run`."""

    def to_the_end(experiment: Experiment, data: ImageData, **arguments: object) -> Outcome:
        rounds = run(experiment, data, **arguments)  # type: ignore[arg-type]
        while True:
            try:
                next(rounds)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome

    return to_the_end


@pytest.fixture(scope="session")
def kernels() -> Callable[[torch.dtype], ctypes.CDLL]:
    """The compiled kernels for float32 or float64; the test is skipped where there is no compiler."""

    def load(dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
        library = load_kernels(dtype)
        if library is None:
            pytest.skip("needs a C++ compiler (g++ or clang++)")
        return library

    return load
