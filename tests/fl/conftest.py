"""Small data and whole runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedsweep.fl.data import ImageData
from fedsweep.fl.reference import Outcome, run
from fedsweep.plan.experiment import Experiment


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> ImageData:
    raw = load_digits()
    images = torch.from_numpy(np.floor(raw.images * 255 / 16 + 0.5).astype(np.uint8))[:, None]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    is_test = torch.arange(len(labels)) % 5 == 0
    return ImageData("digits", images[~is_test], labels[~is_test], images[is_test], labels[is_test], 10)


@pytest.fixture(scope="session")
def run_to_end(digits: ImageData) -> Callable[..., Outcome]:
    """Run an experiment on the digits; arguments are its parameters."""

    def to_end(**parameters: object) -> Outcome:
        small = {"model_type": "lr", "width_factor": 4, "depth": 1, "num_clients": 4, "global_rounds": 3}
        rounds = run(Experiment(**{**small, **parameters}), digits)
        while True:
            try:
                next(rounds)
            except StopIteration as end:
                return end.value

    return to_end
