from __future__ import annotations

import math

import pytest
import torch

from fedsweep.fl import EarlyStopping

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stops_after", "best"),
    [
        (2, 0.0, [3, 2, 2, 2], 4, 2),  # equal is not below
        (2, 0.0, [3, 2, 2.5, 1, 1, 1], 6, 4),  # progress sets the counter back
        (1, 0.0, [3, 3], 2, 1),
        (1, 0.0, [3, 2, 1], None, 3),
        (3, 0.0, [1, 2, 3, 4], 4, 1),
        (2, 0.0, [1, NAN, INF], 3, 1),
        (2, 0.0, [NAN, NAN], 2, None),
        (2, 0.0, [INF, INF], 2, None),
        (2, 0.0, [1, -INF, NAN], 3, 1),
        (3, 0.0, [NAN, 2, 3, 1], None, 4),
        (2, 0.5, [3, 2.75, 2.5], 3, 3),  # small steps are no progress, and yet the least loss is the best
        (2, 0.5, [3, 2.75, 2.125, 2.0, 1.25], None, 5),
        (2, 0.5, [3, 2.5, 2.0], 3, 3),  # below by exactly min_delta is not below best - min_delta
        (2, 0.5, [3, 2.75, 2.4375], 3, 3),  # the best is 2.75 by now, not 3
        (None, 0.0, [1, 2, 2, 2, 2, NAN, NAN], None, 1),
    ],
)
def test_by_table(
    patience: int | None, min_delta: float, losses: list[float], stops_after: int | None, best: int | None
) -> None:
    stopping = EarlyStopping(patience, min_delta)
    stopped = None
    for number, loss in enumerate(losses, start=1):
        stopping.update(number, loss, {"w": torch.tensor(float(number))})
        if stopping.should_stop and stopped is None:
            stopped = number
    assert (stopped, stopping.best_round) == (stops_after, best)
    assert stopping.best_loss == (INF if best is None else losses[best - 1])
    assert stopping.best_weights == ({} if best is None else {"w": torch.tensor(float(best))})


def test_of_equal_rounds_the_first_is_the_best() -> None:
    stopping = EarlyStopping(None)
    for number in (1, 2, 3):
        stopping.update(number, 1.0, {})
    assert stopping.best_round == 1


def test_the_best_weights_are_a_copy() -> None:
    """Weights that go on being trained in place must not change the result."""
    weights = {"w": torch.tensor([1.0])}
    stopping = EarlyStopping(None)
    stopping.update(1, 0.5, weights)
    weights["w"].fill_(99)
    assert stopping.best_weights["w"].tolist() == [1.0]
