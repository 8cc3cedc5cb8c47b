"""Which round is the result, and when to stop looking for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


class EarlyStopping:
    """Remembers the round with the least validation loss, and counts the rounds since the last progress.

    A round makes progress when its loss is below the best before it by more than `min_delta`; a loss that is not finite
    never does. The best round is that of the least loss whatever `min_delta` is; of equal ones the first.

    Attributes:
        best_round: its number; None while no round had a finite loss.
        best_loss: its validation loss; inf while there is none.
        best_weights: a copy of its weights.
        rounds_without_progress: how many in a row, up to now.
    """

    def __init__(self, patience: int | None, min_delta: float = 0.0) -> None:
        """Stop after `patience` rounds in a row without progress; None: never."""
        self.patience = patience
        self.min_delta = min_delta
        self.best_round: int | None = None
        self.best_loss = math.inf
        self.best_weights: dict[str, Tensor] = {}
        self.rounds_without_progress = 0

    def update(self, round: int, loss: float, weights: Mapping[str, Tensor]) -> None:
        """Take in the validation loss of a round, and the weights that it is of."""
        if not math.isfinite(loss):
            self.rounds_without_progress += 1
            return
        made_progress = loss < self.best_loss - self.min_delta
        self.rounds_without_progress = 0 if made_progress else self.rounds_without_progress + 1
        if loss < self.best_loss:
            self.best_round, self.best_loss = round, loss
            self.best_weights = {name: tensor.detach().clone() for name, tensor in weights.items()}

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.rounds_without_progress >= self.patience
