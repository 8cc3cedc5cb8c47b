"""The columns of `final_results.csv`, and one row as its text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
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


class RowFormat:
    """Makes the lines of rows under some columns; a column that is not ours stays empty."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._empty: dict[str, Any] = {**dict.fromkeys(columns), "outcome": "ok"}
        self._pick = itemgetter(*columns)
        self._write = csv.writer(_Encoder(), lineterminator="").writerow

    def __call__(self, row: Row) -> bytes:
        """The line of a row, without the line end."""
        values = {**self._empty, **_DEVIATIONS, **row.result, **row.spelled}
        values["phase"], values["signature"] = row.phase, row.signature
        for mean, deviation in _MEANS:  # without a mean there is no deviation either
            if values.get(mean) is None:
                values[deviation] = None
        fields = [guard(value) if isinstance(value, str) else value for value in self._pick(values)]
        encoded: bytes = self._write(fields)
        return encoded


class _Encoder:
    """A file whose `write` gives back what it was given, as bytes; so does then the `writerow` of its writer."""

    write = staticmethod(str.encode)


_MEANS = tuple((f"mean_{metric}", f"std_{metric}") for metric in METRICS)
_DEVIATIONS = dict.fromkeys((deviation for _, deviation in _MEANS), 0.0)  # one row is one seed


@lru_cache(maxsize=4096)
def guard(words: str) -> str:
    """Free text as a spreadsheet shows it and does not run it, on one line."""
    plain = words
    if not words.isprintable():
        plain = "".join(character if character.isprintable() else " " for character in words)
    return f"'{plain}" if plain.startswith((*RUNS_IN_A_SPREADSHEET, "'")) else plain


def unguard(field: str) -> str:
    """The free text that `guard` made this field from."""
    is_guarded = len(field) > 1 and field[0] == "'" and field[1] in f"{RUNS_IN_A_SPREADSHEET}'"
    return field[1:] if is_guarded else field


def line(fields: Iterable[object]) -> bytes:
    """Fields as one line of CSV, without the line end.

    Of a number the shortest decimals that give the same number again; nothing for None. A carriage return in a field is
    quoted, without which no reader takes it for a part of the field.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(fields)  # it quotes what stands in a line's end
    return buffer.getvalue().removesuffix("\r\n").encode()
