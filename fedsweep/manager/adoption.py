"""Rows that someone else wrote: which experiment a row belongs to, and the result that it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from fedsweep.manager.columns import METRICS, PARAMETERS, unguard
from fedsweep.manager.enrolment import MATCH_PARAMETERS, join
from fedsweep.manager.protocol import ResultData
from fedsweep.manager.wrong_fields import wrong_fields
from fedsweep.plan.experiment import Experiment, check_value

TEXT_FIELDS = ("outcome", "device", "plan", "worker", "fedsweep_version", "torch_version", "finished_at")
INTEGER_FIELDS = (
    "num_parameters",
    "best_epoch",
    "poisoned_clients",
    "poisoned_samples",
    "nonfinite_clients",
    "rounds_run",
)
SHARE_FIELDS = ("mean_test_acc", "mean_val_acc", "attack_success_rate")
NUMBER_FIELDS = (
    *(f"{kind}_{metric}" for metric in METRICS for kind in ("mean", "std")),
    "attack_success_rate",
    "wall_time_s",
)


class Known(Protocol):
    """An experiment that a row may belong to: a task of the ledger or of a grid."""

    @property
    def signature(self) -> str:
        """What identifies the computation."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Every parameter."""
        ...


K_co = TypeVar("K_co", bound=Known, covariant=True)


class Candidates(Protocol[K_co]):
    """Where the experiments are that rows may belong to."""

    def task_with_signature(self, signature: str) -> K_co | None:
        """The experiment with this signature."""
        ...

    def tasks_with_match_key(self, match_key: str) -> Sequence[K_co]:
        """The experiments with these values of `MATCH_PARAMETERS`."""
        ...


def has_signature(row: Mapping[str, str]) -> bool:
    """Whether the row says exactly which computation it is."""
    return bool(row.get("signature"))


def match(row: Mapping[str, str], candidates: Candidates[K_co]) -> list[K_co]:
    """The experiments that the row may belong to: none, one, or several where the row says too little.

    A row with a signature belongs to that computation or to none. One without is matched on the columns that name
    parameters, however their values are spelled.
    """
    if has_signature(row):
        found = candidates.task_with_signature(unguard(row["signature"]))
        return [] if found is None else [found]
    try:
        values = read_parameters(row)
        key = join(values, MATCH_PARAMETERS)
    except (ValueError, KeyError):
        return []
    return [task for task in candidates.tasks_with_match_key(key) if _is_same(task, values)]


def _is_same(task: Known, values: dict[str, Any]) -> bool:
    """Whether the task's experiment with the row's values in place of its own is the same computation."""
    mixed = {name: task.config[name] for name in PARAMETERS} | values
    return Experiment.model_construct(**mixed).signature == task.signature  # every value was checked one by one


def read_parameters(row: Mapping[str, str]) -> dict[str, Any]:
    """The parameters that the row names, typed; an empty field says nothing, or null where that is a value.

    Raises:
        ValueError: a field holds no value of its parameter.
    """
    values: dict[str, Any] = {}
    for name in PARAMETERS:
        if name not in row:
            continue
        field = row[name].strip()
        if field:
            values[name] = check_value(name, _number_or_text(field))
        elif _takes_null(name):
            values[name] = None
    return values


def _number_or_text(field: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(field)
        except ValueError:
            continue
    return unguard(field)


def _takes_null(name: str) -> bool:
    return Experiment.model_fields[name].default is None


def read_result(row: Mapping[str, str]) -> dict[str, Any]:
    """The result that the row holds, with those fields that it has.

    Raises:
        ValueError: a number cannot be read, is not finite or out of range, or there is no accuracy; says which.
    """
    values: dict[str, Any] = {name: unguard(row[name]) for name in TEXT_FIELDS if row.get(name)}
    for name in (*NUMBER_FIELDS, *INTEGER_FIELDS):
        field = row.get(name, "").strip()
        if field:
            values[name] = _number(name, field)
    if values.get("outcome", "ok") == "ok" and "mean_test_acc" not in values:
        raise ValueError("mean_test_acc is empty")
    try:
        return ResultData(**{"mean_test_acc": None, **values}).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        name, what = next(wrong_fields(error, ResultData))
        raise ValueError(f"{name} {what}") from None


def _number(name: str, field: str) -> float | int:
    try:
        number = float(field)
    except ValueError:
        raise ValueError(f"{name} is {field[:80]!r}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {field[:80]!r}, not a finite number")
    if name in SHARE_FIELDS and not 0 <= number <= 1:
        raise ValueError(f"{name} is {field[:80]!r}; a share is from 0 to 1")
    if name not in INTEGER_FIELDS:
        return number
    if not number.is_integer():
        raise ValueError(f"{name} is {field[:80]!r}, not a whole number")
    return int(number)


def is_row_of(spelled: Mapping[str, Any], phase: str, row: Mapping[str, str]) -> bool:
    """Whether the row is that of the cell with this phase and these values."""
    try:
        values = read_parameters(row)
    except ValueError:
        return False
    return unguard(row.get("phase", "")) == phase and all(spelled.get(name) == values[name] for name in values)


def describe(lines: Iterable[int], limit: int = 5) -> str:
    """Line numbers for a message: `lines 3, 7, 9 and 12 more`."""
    numbers = list(lines)
    shown = ", ".join(map(str, numbers[:limit]))
    more = f" and {len(numbers) - limit} more" if len(numbers) > limit else ""
    return f"line{'s' * (len(numbers) > 1)} {shown}{more}"
