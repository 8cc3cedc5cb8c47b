"""Reading results back: the rows of an output folder, what they say over seeds, and what is finished."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsweep.errors import DataError
from fedsweep.files import fsync
from fedsweep.manager.adoption import INTEGER_FIELDS, NUMBER_FIELDS, TEXT_FIELDS, match, read_result
from fedsweep.manager.columns import FILE_NAME, RESULT_COLUMNS, unguard
from fedsweep.manager.csv_lines import read_header, read_row, split
from fedsweep.manager.enrolment import MATCH_PARAMETERS, join
from fedsweep.manager.summary import summarise
from fedsweep.plan.experiment import Experiment
from fedsweep.plan.grid import Grid, PlannedTask

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RESULT_COLUMNS", "finished_signatures", "read_results", "summarise", "write_summary"]

SUMMARY_FILE = "summary.csv"
AT_ONCE = 5_000  # rows that are text at one time: as text, a field takes many times the memory of a number
_DEFAULTS = {name: field.default for name, field in Experiment.model_fields.items()}
_TEXT = {"phase", "signature", *TEXT_FIELDS, *(name for name, value in _DEFAULTS.items() if isinstance(value, str))}
_NUMBERS = {*NUMBER_FIELDS, *(name for name, value in _DEFAULTS.items() if isinstance(value, float))}
_INTEGERS = {*INTEGER_FIELDS, *_DEFAULTS} - _TEXT - _NUMBERS


def read_results(folder: str | Path) -> pd.DataFrame:
    """The rows of a folder's `final_results.csv`, numbers exactly as they were written; what is empty is missing.

    Text has the type str, numbers float64, whole numbers int64 (Int64 in columns where one is missing).

    Raises:
        DataError: there is no such file, or it is none of results.
    """
    import pandas as pd

    path = Path(folder) / FILE_NAME
    try:
        with pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", chunksize=AT_ONCE) as parts:
            rows = pd.concat([_typed_rows(part) for part in parts])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    missing = [name for name in RESULT_COLUMNS if name not in rows]
    if missing:
        raise DataError(f"{path} is no results file: it has no column {missing[0]}")
    return rows


def _typed_rows(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(**{name: _typed(name, rows[name]) for name in map(str, rows.columns)})


def _typed(name: str, fields: pd.Series[str]) -> pd.Series[Any]:
    import pandas as pd

    if name in _NUMBERS:
        return pd.Series([_number(float, field) for field in fields], index=fields.index, dtype="float64")
    if name in _INTEGERS:
        numbers = pd.Series([_number(int, field) for field in fields], index=fields.index, dtype="Int64")
        return numbers if numbers.isna().any() else numbers.astype("int64")
    return fields.map(unguard).map(sys.intern) if name in _TEXT else fields  # the same text, once in memory


def _number(kind: Callable[[str], float], field: str) -> float | None:
    try:
        return kind(field)
    except ValueError:
        return None


def write_summary(folder: str | Path) -> Path:
    """Write `summary.csv` beside the rows that it is of.

    Raises:
        DataError: there are no rows to read.
    """
    path = Path(folder) / SUMMARY_FILE
    fresh = path.with_name(f".{path.name}.tmp")
    table = summarise(read_results(folder))
    with fresh.open("w", encoding="utf-8", newline="") as stream:
        table.to_csv(stream, index=False, lineterminator="\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, path)
    fsync(path.parent)
    return path


class _GridIndex:
    """Finds the tasks of a grid that a row may belong to."""

    def __init__(self, grid: Grid) -> None:
        self._by_signature = {task.signature: task for task in grid.tasks}
        self._by_key: dict[str, list[PlannedTask]] = {}
        for task in grid.tasks:
            self._by_key.setdefault(join(task.experiment.model_dump(), MATCH_PARAMETERS), []).append(task)

    def task_with_signature(self, signature: str) -> PlannedTask | None:
        return self._by_signature.get(signature)

    def tasks_with_match_key(self, match_key: str) -> list[PlannedTask]:
        return self._by_key.get(match_key, [])


def finished_signatures(grid: Grid) -> set[str]:
    """The signatures of the tasks that have a row in one of their output folders, whoever wrote it. Looks only."""
    index, finished = _GridIndex(grid), set[str]()
    folders = dict.fromkeys(output_dir for task in grid.tasks for output_dir in task.output_dirs)
    for folder in folders:
        for row in _rows(Path(folder) / FILE_NAME):
            tasks = match(row, index)
            if len(tasks) == 1 and _has_result(row):
                finished.add(tasks[0].signature)
    return finished


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a results file, as far as they can be read."""
    try:
        lines, _ = split(path.read_bytes())
    except OSError:
        return
    header = read_header(lines[0]) if lines else None
    if header is None:
        return
    for raw in lines[1:]:
        with contextlib.suppress(ValueError):
            yield read_row(raw, header)


def _has_result(row: Mapping[str, str]) -> bool:
    try:
        read_result(row)
    except ValueError:
        return False
    return True
