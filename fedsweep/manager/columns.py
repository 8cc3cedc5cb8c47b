"""The columns of `final_results.csv`, and one row as its text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from fedsweep.manager.records import Row
from fedsweep.plan.experiment import Experiment

FILE_NAME = "final_results.csv"

# The columns that the first tools of this field wrote; they come first and in this order.
RESULT_COLUMNS = (
    "phase",
    "dataset",
    "model_type",
    "width_factor",
    "depth",
    "poison_ratio",
    "poison_type",
    "alpha",
    "data_ordering",
    "aggregator",
    "batch_size",
    "mean_test_acc",
    "std_test_acc",
    "mean_test_loss",
    "std_test_loss",
    "mean_val_acc",
    "std_val_acc",
    "mean_val_loss",
    "std_val_loss",
    "num_parameters",
    "best_epoch",
    "seed",
)
# What else is known of a result, and where it came from.
PROVENANCE_COLUMNS = (
    "signature",
    "outcome",
    "attack_success_rate",
    "poisoned_clients",
    "poisoned_samples",
    "nonfinite_clients",
    "rounds_run",
    "wall_time_s",
    "device",
    "plan",
    "worker",
    "fedsweep_version",
    "torch_version",
    "finished_at",
)
PARAMETERS = tuple(Experiment.model_fields)
OWN_COLUMNS = frozenset((*RESULT_COLUMNS, *PARAMETERS, *PROVENANCE_COLUMNS))
METRICS = ("test_acc", "test_loss", "val_acc", "val_loss")
RUNS_IN_A_SPREADSHEET = "=+-@"


def header(varying: Iterable[str]) -> tuple[str, ...]:
    """The columns of a folder whose cells differ in these parameters."""
    differing = set(varying)
    others = [name for name in PARAMETERS if name in differing and name not in RESULT_COLUMNS]
    return (*RESULT_COLUMNS, *others, *PROVENANCE_COLUMNS)


def format_row(columns: Sequence[str], row: Row) -> bytes:
    """The line of a row under these columns; a column that is not ours stays empty."""
    values = {**_result_values(row.result), **row.spelled, "phase": row.phase, "signature": row.signature}
    return line([text(values.get(name)) for name in columns])


def _result_values(result: dict[str, Any]) -> dict[str, Any]:
    values = {"outcome": "ok", **result}
    for metric in METRICS:  # one row is one seed; without a mean there is no deviation either
        has_mean = values.get(f"mean_{metric}") is not None
        values[f"std_{metric}"] = values.get(f"std_{metric}", 0.0) if has_mean else None
    return values


def text(value: object) -> str:
    """A value as its field reads: shortest decimals that give the same number again, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    return guard(value) if isinstance(value, str) else str(value)


def guard(words: str) -> str:
    """Free text as a spreadsheet shows it and does not run it, on one line."""
    plain = "".join(character if character.isprintable() else " " for character in words)
    return f"'{plain}" if plain.startswith((*RUNS_IN_A_SPREADSHEET, "'")) else plain


def unguard(field: str) -> str:
    """The free text that `guard` made this field from."""
    is_guarded = len(field) > 1 and field[0] == "'" and field[1] in f"{RUNS_IN_A_SPREADSHEET}'"
    return field[1:] if is_guarded else field


def line(fields: Iterable[str]) -> bytes:
    """Fields as one line of CSV, without the line end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(fields)
    return buffer.getvalue().encode()
