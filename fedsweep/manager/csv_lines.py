"""A results file as it lies on the disk, read line by line: whatever wrote it, was cut off, or edited it."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass

from fedsweep.manager.columns import RESULT_COLUMNS, line
from fedsweep.plan.experiment import NAMED_COLUMNS

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Header:
    """The first line of a results file."""

    columns: tuple[str, ...]
    delimiter: str
    is_plain: bool  # byte for byte as we would write it

    @property
    def starts_as_ours(self) -> bool:
        """Whether the columns that come first are those of every results file."""
        return self.columns[: len(RESULT_COLUMNS)] == RESULT_COLUMNS


def split(content: bytes) -> tuple[list[bytes], bytes]:
    """The complete lines of a file without their line ends, and what follows the last line end."""
    *lines, tail = content.split(b"\n")
    return lines, tail


def read_header(raw: bytes) -> Header | None:
    """The header in this line, or None if it is none of a results file."""
    try:
        words = raw.removeprefix(BYTE_ORDER_MARK).decode().removesuffix("\r")
        delimiter = ";" if words.count(";") > words.count(",") else ","
        (columns,) = csv.reader([words], delimiter=delimiter, strict=True)
    except (ValueError, csv.Error):
        return None
    named = [name for name in columns if name]
    if len(set(named)) < len(named) or not _is_of_results(set(named)):
        return None
    return Header(tuple(columns), delimiter, is_plain=raw == line(columns))


def _is_of_results(names: set[str]) -> bool:
    return "mean_test_acc" in names and (names.issuperset(NAMED_COLUMNS) or "signature" in names)


def read_row(raw: bytes, header: Header) -> dict[str, str]:
    """The fields of a line by column.

    A line with as many fields as the oldest results files have columns is one that an old tool appended.

    Raises:
        ValueError: this is no row; the message says why.
    """
    if b"\0" in raw:
        raise ValueError("it has bytes that are zero, as a file has after a power loss")
    try:
        words = raw.decode().removesuffix("\r")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    try:
        (fields,) = csv.reader([words], delimiter=header.delimiter, strict=True)
    except (ValueError, csv.Error) as error:
        is_long = "field limit" in str(error)
        raise ValueError("a field of it is too long" if is_long else "its quotes do not close") from None
    if header.delimiter == ";":
        fields = [field.replace(",", ".") if DECIMAL_COMMA.fullmatch(field) else field for field in fields]
    columns = header.columns
    if len(fields) == len(RESULT_COLUMNS) and header.starts_as_ours:
        columns = RESULT_COLUMNS
    if len(fields) != len(columns):
        raise ValueError(f"it has {len(fields)} fields where the header has {len(columns)}")
    return {name: field for name, field in zip(columns, fields, strict=True) if name}
