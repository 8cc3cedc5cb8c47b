"""Early stopping on the validation loss."""

from __future__ import annotations

import math


class EarlyStopping:
    """Remembers the best round and says when to stop.

    The best round is the one with the least validation loss. The counter counts rounds in a row whose loss is not below
    the best before it by more than `min_delta`, or is not finite.
    """

    def __init__(self, patience: int | None = 10, min_delta: float = 0.0) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.best_loss = math.inf
        self.best_round: int | None = None
        self.rounds_without_progress = 0

    def update(self, round_number: int, loss: float) -> bool:
        """Take in the validation loss of a round; whether this round is the best so far."""
        makes_progress = math.isfinite(loss) and loss < self.best_loss - self.min_delta
        self.rounds_without_progress = 0 if makes_progress else self.rounds_without_progress + 1
        is_best = math.isfinite(loss) and loss < self.best_loss
        if is_best:
            self.best_loss, self.best_round = loss, round_number
        return is_best

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.rounds_without_progress >= self.patience
