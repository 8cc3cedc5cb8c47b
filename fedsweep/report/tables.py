"""The summary as a table: for a terminal, as Markdown, as records for JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsweep.report.coverage import COUNTS, coverage_note, is_plan_known, lacking, reasons, runs
from fedsweep.report.labels import constants, is_empty, parameters, sorted_cells, varying

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from fedsweep.report import FolderReport, Report

SHOWN_ROWS = 40
DIVERGED = "diverged"
NOTHING = "—"
METRIC_HEADINGS = (
    "test accuracy (%)",
    "95 % CI",
    "drop (points)",
    "attack success (%)",
    "seeds",
    "diverged",
    "no result",
)


def show_report(report: Report, *, as_json: bool = False, console: Console | None = None) -> None:
    """Print a report: tables in a terminal, Markdown into a pipe, or one JSON object; then where the files are."""
    from rich.console import Console

    if as_json:
        print(json.dumps(as_records(report), allow_nan=False))
        return
    console = console or Console()
    for folder in report.folders:
        for line in _notes(folder):
            console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
        for phase, cells in by_phase(folder.cells):
            _show_phase(console, phase, cells, f"{folder.folder / 'summary.csv'}")
        if not len(folder.cells):
            console.print(f"{folder.folder}: no results yet", markup=False, highlight=False)
    for folder in report.folders:
        kinds = ", ".join(dict.fromkeys(f"*{path.suffix}" for path in folder.plots))
        plots = f"; {len(folder.plots)} plots in {folder.plots[0].parent} ({kinds})" if folder.plots else ""
        line = f"{folder.folder}: rows in final_results.csv, over seeds in summary.csv{plots}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _notes(folder: FolderReport) -> Iterator[str]:
    """What the tables of a folder do not show."""
    if folder.note:
        yield f"{folder.folder}: which cells have no result is not known: {folder.note}"
    if folder.left_out:
        are, them = ("is", "it") if folder.left_out == 1 else ("are", "them")
        rows = f"{_count(folder.left_out, 'row')} of an earlier configuration {are} left out"
        yield f"{folder.folder}: {rows} (`fedsweep report --all` shows {them})"


def _show_phase(console: Console, phase: str, cells: pd.DataFrame, rest: str) -> None:
    from rich.measure import Measurement

    missing, spread = missing_line(cells), spread_line(cells)
    if console.is_terminal:
        console.print(heading(phase, cells), style="bold", markup=False, highlight=False)
        console.print(constants_line(cells), style="dim", markup=False, highlight=False)
        if missing:
            console.print(missing, style="yellow", markup=False, highlight=False)
        table = summary_table(cells)
        needed = Measurement.get(console, console.options.update(max_width=10_000), table).minimum
        console.print(table, width=max(console.width, needed), soft_wrap=True)
        if spread:
            console.print(spread, style="dim", markup=False, highlight=False)
    else:
        paragraphs = [heading(phase, cells), constants_line(cells), missing, markdown(cells), spread]
        console.print("\n\n".join(filter(None, paragraphs)), markup=False, highlight=False, soft_wrap=True)
    hidden = runs(cells.iloc[SHOWN_ROWS:]) > 0
    if len(hidden):
        bare = f"; {(~hidden).sum()} more without a result" if not hidden.all() else ""
        line = f"… and {hidden.sum()} more rows in {rest}{bare}"
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print()


def by_phase(summary: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The cells of each phase, phases by name, cells in the order of their values."""
    return [(str(phase), sorted_cells(cells)) for phase, cells in summary.groupby("phase")]


def heading(phase: str, cells: pd.DataFrame) -> str:
    """What a table is of: `attack: 24 cells, 3 seeds each`; `attack: 24 cells, 70 runs, 2 runs diverged`."""
    seeds, diverged = runs(cells) + lacking(cells), int(cells["n_diverged"].sum())
    if seeds.nunique() == 1:
        counted = f"{_count(int(seeds.iloc[0]), 'seed')}{' each' if len(cells) > 1 else ''}"
    else:
        counted = _count(int(seeds.sum()), "run")
    note = f", {_count(diverged, 'run')} diverged" if diverged else ""
    return f"{phase}: {_count(len(cells), 'cell')}, {counted}{note}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def constants_line(cells: pd.DataFrame) -> str:
    """The parameters that all cells share, in one line."""
    line = ", ".join(_pair(name, value) for name, value in constants(cells).items())
    return line if is_plan_known(cells) or not line else f"in all rows: {line}"


def missing_line(cells: pd.DataFrame) -> str:
    """What of these cells has no result, and what to do; empty if nothing is known to be missing."""
    note = coverage_note(cells, _pair)
    failed = is_plan_known(cells) and cells["n_failed"].any()
    return f"{note}.{' `fedsweep failures` says why.' if failed else ''}" if note else ""


def spread_line(cells: pd.DataFrame) -> str:
    """What stands behind ± in the table; empty where nothing does."""
    seeds = cells.loc[cells["n_seeds"] > 0, "n_seeds"]
    if not (seeds > 1).any():
        return ""
    over = f"{seeds.iloc[0]} seeds" if seeds.nunique() == 1 else "the seeds of the row"
    return f"a ± b: mean and standard deviation over {over}; 95 % CI: half width of the interval of that mean"


def _pair(name: str, value: Any) -> str:
    return f"{name} {_text(value)}"


def summary_table(cells: pd.DataFrame, shown: int = SHOWN_ROWS) -> Table:
    """The first `shown` cells as a table for a terminal: what varies, then what was measured."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    headings, rows = _grid(cells.head(shown))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column, name in enumerate(headings):
        heading = name.replace("_", " ")  # a narrow terminal folds it between words; values it does not fold
        widest = max(map(len, [*heading.split(), *(row[column] for row in rows)]))
        table.add_column(heading, justify=_justify(column, rows), min_width=widest)
    for row in rows:
        table.add_row(*(Text(field) for field in row))
    return table


def markdown(cells: pd.DataFrame, shown: int = SHOWN_ROWS) -> str:
    """The first `shown` cells as a Markdown table, aligned so that it can be read as it is."""
    headings, rows = _grid(cells.head(shown))
    rows = [[field.replace("|", "\\|") for field in row] for row in rows]
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    rights = [_justify(column, rows) == "right" for column in range(len(headings))]
    rule = [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, rights, strict=True)]
    lines = []
    for row in [headings, rule, *rows]:
        fields = [
            field.rjust(width) if right else field.ljust(width)
            for field, width, right in zip(row, widths, rights, strict=True)
        ]
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines)


def as_records(report: Report) -> dict[str, Any]:
    """The report as plain values for JSON: shares from 0 to 1 as in summary.csv, null for what is empty."""
    folders = [
        {
            "folder": str(folder.folder),
            "cells": [
                {str(name): _plain(value) for name, value in row.items()} for row in folder.summary.to_dict("records")
            ],
            "without_result": _incomplete(folder.cells),
            "rows_left_out": folder.left_out,
        }
        for folder in report.folders
    ]
    return {"folders": folders, "files": [str(path) for path in report.files]}


def _incomplete(cells: pd.DataFrame) -> list[dict[str, Any]] | None:
    """The cells some of whose seeds have no result: phase, parameters, how many seeds stand how. None: not known."""
    if not is_plan_known(cells):
        return None
    names = ["phase", *parameters(cells), "n_seeds", "n_diverged", *COUNTS]
    incomplete = cells[lacking(cells) > 0]
    return [{name: _plain(row[name]) for name in names} for row in incomplete.to_dict("records")]


def _grid(cells: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text. A metric that no cell has gets no column."""
    names = [name for name in varying(cells) if name != "poison_ratio"]
    names += ["poison_ratio"] if "poison_ratio" in varying(cells) else []
    columns = [(name, [_text(value) for value in cells[name]]) for name in names]
    columns += zip(METRIC_HEADINGS, _metric_columns(cells), strict=True)
    kept = [(name, fields) for name, fields in columns if name in names or any(fields)]
    return [name for name, _ in kept], [list(row) for row in zip(*(fields for _, fields in kept), strict=True)]


def _metric_columns(cells: pd.DataFrame) -> list[list[str]]:
    several = bool((cells["n_seeds"] > 1).any())
    success = cells.get("attack_success_rate", [None] * len(cells))
    return [
        [_accuracy(row, several) for row in cells.to_dict("records")],
        [_signed(half, "± {:.1f}") for half in cells["ci95_test_acc"]],
        [
            _signed(drop, "{:.1f}") + (_signed(deviation, " ± {:.1f}") if several else "")
            for drop, deviation in zip(cells["accuracy_drop"], cells["accuracy_drop_std"], strict=True)
        ],
        [_signed(share, "{:.1f}") for share in success],
        _seeds(cells) if cells["n_seeds"].nunique() > 1 or lacking(cells).any() else [],
        [str(count) for count in cells["n_diverged"]] if cells["n_diverged"].any() else [],
        [reasons(row) for row in cells[list(COUNTS)].to_dict("records")] if is_plan_known(cells) else [],
    ]


def _seeds(cells: pd.DataFrame) -> list[str]:
    lost = lacking(cells)
    planned = runs(cells) + lost
    return [
        f"{count} of {asked}" if missing else str(count)
        for count, asked, missing in zip(cells["n_seeds"], planned, lost, strict=True)
    ]


def _accuracy(row: Mapping[Any, Any], several: bool) -> str:
    if not row["n_seeds"]:
        return DIVERGED if row["n_diverged"] else NOTHING
    deviation = _signed(row["std_test_acc"], " ± {:.1f}") if several else ""
    return _signed(row["mean_test_acc"], "{:.1f}") + deviation


def _signed(share: Any, form: str) -> str:
    """A share as a percentage in this form; nothing for an empty one, and never -0.0."""
    return "" if is_empty(share) else form.format(round(100 * share, 1) + 0.0)


def _text(value: Any) -> str:
    if is_empty(value):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _justify(column: int, rows: Sequence[Sequence[str]]) -> Any:
    """Numbers to the right, words to the left."""
    fields = [row[column] for row in rows if row[column] not in ("", DIVERGED, NOTHING)]
    return "right" if all(field[:1].isdigit() or field[:1] in "-±" for field in fields) else "left"


def _plain(value: Any) -> Any:
    if is_empty(value):
        return None
    return value.item() if hasattr(value, "item") else value
