"""What a finished experiment sends: its outcome as plain numbers, and where it was computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from fedsweep import __version__
from fedsweep.fl.outcome import Outcome, RoundReport
from fedsweep.worker.device import device_name


@dataclass(frozen=True)
class Progress:
    """How far an experiment is."""

    round: int  # the last one that has ended, from 1
    rounds: int  # at most
    val_loss: float | None  # after that round; None where not finite
    val_acc: float | None

    @classmethod
    def after(cls, report: RoundReport, rounds: int) -> Progress:
        """How far an experiment of so many rounds is after this one."""
        return cls(report.round, rounds, _finite(report.val_loss), _finite(report.val_acc))


def result_of(outcome: Outcome, *, device: str, plan: str, seconds: float) -> dict[str, Any]:
    """The result of an experiment without its history: what was found, then how and where.

    Args:
        outcome: what was found; what is not finite becomes None.
        device: as torch knows it.
        plan: which kernels computed it.
        seconds: from when the experiment began, or joined others, to its end. Experiments that train together each
            have the whole of that time, so their sum is more than the time that passed.
    """
    return _science(outcome) | {
        "wall_time_s": round(seconds, 3),
        "device": device_name(device),
        "plan": plan,
        "fedsweep_version": __version__,
        "torch_version": torch.__version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def records(history: Sequence[RoundReport]) -> list[dict[str, Any]]:
    """The history as it is sent: for each round `round`, `val_loss`, `val_acc` and `nonfinite_clients`."""
    return [
        {
            "round": report.round,
            "val_loss": _finite(report.val_loss),
            "val_acc": _finite(report.val_acc),
            "nonfinite_clients": report.nonfinite_clients,
        }
        for report in history
    ]


def _science(outcome: Outcome) -> dict[str, Any]:
    std = 0.0 if outcome.outcome == "ok" else None  # a row is one seed
    per_class = outcome.per_class_test_acc
    return {
        "outcome": outcome.outcome,
        "mean_test_acc": _finite(outcome.test_acc),
        "std_test_acc": std,
        "mean_test_loss": _finite(outcome.test_loss),
        "std_test_loss": std,
        "mean_val_acc": _finite(outcome.val_acc),
        "std_val_acc": std,
        "mean_val_loss": _finite(outcome.val_loss),
        "std_val_loss": std,
        "num_parameters": outcome.num_parameters,
        "best_epoch": outcome.best_epoch,
        "attack_success_rate": outcome.attack_success_rate,
        "poisoned_clients": outcome.poisoned_clients,
        "poisoned_samples": outcome.poisoned_samples,
        "nonfinite_clients": outcome.nonfinite_clients,
        "rounds_run": outcome.rounds_run,
        "per_class_test_acc": None if per_class is None else list(per_class),
    }


def _finite(value: float | None) -> float | None:
    """The value, or None where it is not a finite number, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
