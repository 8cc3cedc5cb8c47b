"""Reading results back: the rows of an output folder, what they say over seeds, and what is finished."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsweep.errors import DataError
from fedsweep.files import fsync, open_fresh, read_plain
from fedsweep.manager.adoption import INTEGER_FIELDS, NUMBER_FIELDS, TEXT_FIELDS, match, read_result
from fedsweep.manager.columns import FILE_NAME, RESULT_COLUMNS, unguard
from fedsweep.manager.csv_lines import Header, read_header, read_row, split
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

    Text has the type str, numbers float64, whole numbers int64 (Int64 in columns where one is missing). A last line
    that has no end yet counts if it is a row.

    Raises:
        DataError: there is no such file, it is none of results, or a line is no row; says which.
    """
    path = Path(folder) / FILE_NAME
    try:
        content = read_plain(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return parse_results(str(path), content)


def parse_results(name: str, content: bytes) -> pd.DataFrame:
    """The rows that stand in a file of this name; see `read_results`."""
    import pandas as pd

    lines = io.BytesIO(content)
    first = lines.readline()
    header = read_header(first[:-1]) if first.endswith(b"\n") else None
    if header is None:
        raise DataError(f"{name} is no results file: its first line is not the header of one")
    if missing := [column for column in RESULT_COLUMNS if column not in header.columns]:
        raise DataError(f"{name} is no results file: it has no column {missing[0]}")
    columns = [column for column in header.columns if column]
    rows = _parsed(name, lines, header)
    parts = [_typed_rows(columns, part) for part in iter(lambda: list(itertools.islice(rows, AT_ONCE)), [])]
    return pd.concat(parts, ignore_index=True) if parts else _typed_rows(columns, [])


def _parsed(name: str, lines: Iterable[bytes], header: Header) -> Iterator[Mapping[str, str]]:
    """The rows behind the header."""
    for number, raw in enumerate(lines, start=2):
        if not raw.strip():
            continue
        try:
            yield read_row(raw.removesuffix(b"\n"), header)
        except ValueError as error:
            if not raw.endswith(b"\n"):  # it is still being written
                return
            advice = "remove it, or let `fedsweep doctor --repair` cut it out"
            raise DataError(f"{name}: line {number} is no row ({error}); {advice}") from None


def _typed_rows(columns: Iterable[str], rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({column: _typed(column, [row.get(column, "") for row in rows]) for column in columns})


def _typed(name: str, fields: Sequence[str]) -> pd.Series[Any]:
    import pandas as pd

    if name in _NUMBERS:
        return pd.Series([_number(float, field) for field in fields], dtype="float64")
    if name in _INTEGERS:
        numbers = pd.Series([_number(_int64, field) for field in fields], dtype="Int64")
        return numbers if numbers.isna().any() else numbers.astype("int64")
    if name in _TEXT:
        fields = [sys.intern(unguard(field)) for field in fields]  # the same text, once in memory
    return pd.Series(fields, dtype="str")


def _int64(field: str) -> int:
    """A whole number.

    Raises:
        ValueError: it is none, or none that 64 bits hold.
    """
    number = int(field)
    if not -(2**63) <= number < 2**63:
        raise ValueError("out of range")
    return number


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
    with open_fresh(fresh) as stream:
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
        lines, _ = split(read_plain(path))
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
