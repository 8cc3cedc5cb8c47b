"""Comparing a results file with what the ledger says it must hold. Looks only; `projection` acts on what is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsweep.manager.adoption import describe, has_signature, is_row_of, match, read_result
from fedsweep.manager.columns import OWN_COLUMNS, RowFormat, header, line, unguard
from fedsweep.manager.csv_lines import Header, read_header, read_row, split
from fedsweep.manager.ledger import differs
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.records import Adoption, Task


@dataclass
class Survey:
    """What a results file holds beside, instead of or without what it must hold."""

    columns: tuple[str, ...]  # its header, or the one that it must get
    ours: Sequence[bytes] = ()  # the lines that it must hold, under these columns
    missing: list[bytes] = field(default_factory=list)  # lines of ours that are not there
    foreign: list[dict[str, str]] = field(default_factory=list)  # rows of no cell of ours: kept
    cut: list[bytes] = field(default_factory=list)  # what cannot stay, and lies nowhere else
    adoptions: list[Adoption] = field(default_factory=list)
    matched_by_columns: list[int] = field(default_factory=list)  # line numbers
    ambiguous: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was wrong with single lines
    has_tail: bool = False  # the last line has no end: torn, or still being written
    is_sound: bool = True  # nothing stands in it that must be changed or go

    def messages(self) -> list[str]:
        """What a person should know of the rows that others wrote."""
        messages = list(self.notes)
        if self.matched_by_columns:
            count = len(self.matched_by_columns)
            messages.append(
                f"{count} row{'s' * (count > 1)} without a signature ({describe(self.matched_by_columns)}) matched on "
                "dataset to batch_size and seed alone; taken as done"
            )
        if self.ambiguous:
            where = describe(self.ambiguous)
            messages.append(f"more than one experiment has the values of {where}; not counted as done")
        return messages


class Surveyor:
    """Surveys the file of one output folder."""

    def __init__(self, view: LedgerView, output_dir: str, path: str) -> None:
        self._view = view
        self._output_dir = output_dir
        self._path = path
        self._ours = header(view.varying(output_dir))

    def survey(self, content: bytes) -> Survey:
        """Compare `content`, the whole file, with the ledger."""
        lines, tail = split(content)
        found_header = read_header(lines[0]) if lines else None
        survey = self._begin(content, found_header)
        survey.ours = list(map(RowFormat(survey.columns), self._view.rows_in(self._output_dir)))
        expected = dict.fromkeys(survey.ours, False)
        first_row = 0 if found_header is None else 1
        header_line = line(survey.columns)
        for number, raw in enumerate(lines[first_row:], start=first_row + 1):
            if expected.get(raw) is False:
                expected[raw] = True
            elif raw in expected or raw == header_line or not raw.strip():
                survey.is_sound = False  # a second copy, or nothing: can go
            else:
                self._place(survey, number, raw, found_header)
        if tail:
            survey.has_tail, survey.is_sound = True, False
            if tail not in expected and tail != header_line:
                survey.cut.append(tail)
        survey.missing = [raw for raw, is_there in expected.items() if not is_there]
        return survey

    def _begin(self, content: bytes, found: Header | None) -> Survey:
        """A file keeps its header if all our columns are in it; others may have added theirs."""
        if found is not None and found.is_plain and found.starts_as_ours and set(self._ours) <= set(found.columns):
            return Survey(columns=found.columns)
        return Survey(columns=self._ours, is_sound=not content)

    def _place(self, survey: Survey, number: int, raw: bytes, found: Header | None) -> None:
        """Decide what becomes of a line that is not one of ours to the byte."""
        try:
            if found is None:
                raise ValueError("there is no header above it")
            row = read_row(raw, found)
        except ValueError as error:
            survey.is_sound = False
            survey.cut.append(raw)
            survey.notes.append(f"line {number} is no row and was cut out: {error}")
            return
        tasks = match(row, self._view)
        if len(tasks) == 1 and self._is_ours(tasks[0], row):
            survey.is_sound = False  # a cell has one row, and its values are those of the ledger
            if not _is_held(row, self._view.result(tasks[0].number)):
                survey.cut.append(raw)
        elif len(tasks) == 1 and tasks[0].status != "complete":
            self._adopt(survey, number, tasks[0], row)
        else:
            survey.foreign.append(row)
            if len(row) < len(set(survey.columns) - {""}):
                survey.is_sound = False  # an old tool appended it, without the columns that came later
            if tasks and any(task.status != "complete" for task in tasks):
                survey.ambiguous.append(number)

    def _adopt(self, survey: Survey, number: int, task: Task, row: dict[str, str]) -> None:
        try:
            result = read_result(row)
        except ValueError as error:
            survey.foreign.append(row)
            survey.notes.append(f"line {number} does not count as done: {error}")
            return
        survey.adoptions.append(Adoption(task=task.number, data=result, source=f"{self._path}:{number}"))
        if not has_signature(row):
            survey.matched_by_columns.append(number)

    def _is_ours(self, task: Task, row: dict[str, str]) -> bool:
        """Whether this is the row of a cell that has its result, however it is written.

        A row without a signature may name an attack that the cell spells otherwise, where none takes place.
        """
        cells = [cell for cell in self._view.rows_of(task.number) if cell.output_dir == self._output_dir]
        if not has_signature(row):
            return any(cell.phase == unguard(row.get("phase", "")) for cell in cells)
        return any(is_row_of(cell.spelled, cell.phase, row) for cell in cells)


def _is_held(row: dict[str, str], result: dict[str, Any]) -> bool:
    """Whether nothing that the row says is lost when the one that is made from this result takes its place."""
    if any(value for name, value in row.items() if name not in OWN_COLUMNS):
        return False
    try:
        return not differs(result, read_result(row))
    except ValueError:
        return False


def whole_columns(survey: Survey) -> tuple[str, ...]:
    """The header of a file that is written anew: ours, then what rows of others have besides."""
    others = (name for row in survey.foreign for name, value in row.items() if value)
    return tuple(dict.fromkeys((*survey.columns, *others)))


def foreign_line(columns: Sequence[str], row: dict[str, str]) -> bytes:
    """A row of others under these columns."""
    return line([row.get(name, "") for name in columns])
