"""Tables and plots from the rows of finished experiments, and the live display of those that run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsweep.errors import DataError, StateError, UsageError
from fedsweep.files import open_plain

if TYPE_CHECKING:
    import pandas as pd

    from fedsweep.manager.gaps import FolderPlan, Gap

__all__ = ["FolderReport", "Report", "has_results", "report", "words_without_results"]


@dataclass(frozen=True)
class FolderReport:
    """What one output folder holds."""

    folder: Path
    summary: pd.DataFrame  # one row for each cell of the present grid, as in summary.csv, with the settings of all
    cells: pd.DataFrame  # the same and the cells without any row, see `coverage.with_gaps`
    plots: tuple[Path, ...]
    note: str = ""  # why it is not known which results are missing, if it is not
    left_out: int = 0  # rows of an earlier configuration that the tables and plots are without


@dataclass(frozen=True)
class Report:
    """What `report` found and wrote."""

    folders: tuple[FolderReport, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every summary and plot of the folders."""
        return tuple(
            path for each in self.folders for path in (each.folder / "summary.csv", *each.plots) if path.exists()
        )


def report(
    dirs: Sequence[str | Path],
    out: str | Path | None = None,
    formats: Sequence[str] = ("png", "pdf"),
    state_dir: Path | None = None,
    every_row: bool = False,
) -> Report:
    """Summarise and plot the results of output folders.

    Writes `summary.csv` where it is missing or older than the rows, and the plots of each folder into its `plots`
    folder, or below `out` if that is given (in a sub-folder for each where there are several). The same value has the
    same colour in all plots of a call.

    Which cells should have results is looked up in the ledger in `state_dir`; if that is not given, in the first that
    is of a sweep that writes there: `.fedsweep` in the current folder, then in the output folder and those above it.
    Without a ledger, only the rows are known. With it, rows of an earlier configuration are left out of tables and
    plots, unless `every_row`.

    Raises:
        UsageError: a folder has no results, or the plots cannot be written.
    """
    from fedsweep.manager.results import summarise
    from fedsweep.report.coverage import with_gaps
    from fedsweep.report.present import planned_rows

    folders = list(dict.fromkeys(Path(folder) for folder in dirs))
    plans, notes = _plans(folders, state_dir)
    gaps = {folder: plan.gaps for folder, plan in plans.items()}
    whole = {folder: _read(folder, gaps.get(folder)) for folder in folders}
    rows = {folder: planned_rows(frame, plans.get(folder), every_row) for folder, frame in whole.items()}
    summaries = {folder: summarise(frame) for folder, frame in rows.items()}
    cells = {folder: with_gaps(summaries[folder], rows[folder], gaps.get(folder)) for folder in folders}
    for folder in folders:
        _refresh_summary(folder)
    places = {folder: folder / "plots" if out is None else Path(out) for folder in folders}
    if out is not None and len(folders) > 1:
        places = {folder: Path(out) / name for folder, name in zip(folders, _distinct_names(folders), strict=True)}
    plots = _plot(rows, cells, places, formats)
    return Report(
        tuple(
            FolderReport(
                folder,
                summaries[folder],
                cells[folder],
                plots[folder],
                notes.get(folder, ""),
                left_out=len(whole[folder]) - len(rows[folder]),
            )
            for folder in folders
        )
    )


def has_results(folder: Path) -> bool:
    """Whether an output folder has a row yet."""
    from fedsweep.manager.columns import FILE_NAME

    try:
        with os.fdopen(open_plain(folder / FILE_NAME), "rb") as rows:
            return sum(1 for _ in rows) > 1
    except OSError:
        return False


def words_without_results(folders: Sequence[Path], state_dir: Path) -> list[str]:
    """Of each of these folders, none of which has a row, that it has none and why, as far as the ledger knows."""
    plans, _ = _plans(folders, state_dir)
    return [_no_results(folder, plans[folder].gaps) for folder in folders if folder in plans and plans[folder].gaps]


def _plans(folders: Sequence[Path], state_dir: Path | None) -> tuple[dict[Path, FolderPlan], dict[Path, str]]:
    """What the ledger knows of these folders, and of the others why nothing is known."""
    plans: dict[Path, FolderPlan] = {}
    notes: dict[Path, str] = {}
    found: dict[Path, dict[Path, FolderPlan] | str] = {}  # by state directory
    for folder in folders:
        notes[folder] = _why_unknown(state_dir)
        for place in _state_dirs(folder) if state_dir is None else [state_dir]:
            if place not in found:
                found[place] = _look_up(place, folders, is_beside=state_dir is None)
            known = found[place]
            if isinstance(known, str):
                notes[folder] = known
            elif folder in known:
                plans[folder] = known[folder]
                del notes[folder]
                break
    return plans, notes


def _why_unknown(state_dir: Path | None) -> str:
    where = "a .fedsweep here or above it" if state_dir is None else str(state_dir)
    return f"no sweep in {where} writes there; --state-dir names that of the sweep"


def _state_dirs(folder: Path) -> list[Path]:
    """Where the ledger of the sweep that writes to a folder may lie, the likeliest first."""
    name = ".fedsweep"
    absolute = Path(os.path.abspath(folder))
    return [Path(name), *(above / name for above in (absolute, *absolute.parents))]


def _look_up(state_dir: Path, folders: Sequence[Path], *, is_beside: bool) -> dict[Path, FolderPlan] | str:
    """The plans of those folders that this ledger knows, or why it cannot be read."""
    from fedsweep.manager.gaps import find_plans
    from fedsweep.manager.state_dir import LEDGER_FILE

    if not os.path.exists(state_dir / LEDGER_FILE):
        return {}
    try:
        return find_plans(state_dir, folders, is_beside=is_beside)
    except StateError as error:
        return str(error)


def _no_results(folder: Path, gaps: Sequence[Gap]) -> str:
    from fedsweep.report.coverage import COUNTS, reasons

    counts = {name: sum(f"n_{gap.reason}" == name for gap in gaps) for name in COUNTS}
    return f"{folder} has no results; of its {len(gaps)} runs: {reasons(counts)}"


def _read(folder: Path, gaps: Sequence[Gap] | None) -> pd.DataFrame:
    from fedsweep.manager.columns import FILE_NAME
    from fedsweep.manager.results import read_results

    try:
        return read_results(folder)
    except DataError as error:
        if gaps and not os.path.lexists(folder / FILE_NAME):
            raise UsageError(_no_results(folder, gaps)) from error
        raise UsageError(f"{folder} is no folder of results: {error}") from error


def _refresh_summary(folder: Path) -> None:
    from fedsweep.manager.columns import FILE_NAME
    from fedsweep.manager.results import SUMMARY_FILE, write_summary

    summary = folder / SUMMARY_FILE
    if not summary.exists() or summary.stat().st_mtime_ns < (folder / FILE_NAME).stat().st_mtime_ns:
        try:
            write_summary(folder)
        except OSError as error:
            raise UsageError(f"{summary} cannot be written: {error}") from error


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its last part, with a number where two have the same."""
    names: list[str] = []
    for folder in folders:
        base = folder.absolute().name
        taken = sum(name == base or name.rpartition("_")[0] == base for name in names)
        names.append(f"{base}_{taken + 1}" if taken else base)
    return names


def _plot(
    rows: dict[Path, pd.DataFrame],
    cells: dict[Path, pd.DataFrame],
    places: dict[Path, Path],
    formats: Sequence[str],
) -> dict[Path, tuple[Path, ...]]:
    from fedsweep.report.look import scales
    from fedsweep.report.plots import plot_folder

    common = scales(cells.values())
    plots = {}
    for folder, own in cells.items():
        try:
            plots[folder] = plot_folder(own, _history(folder, rows[folder]), places[folder], common, formats)
        except OSError as error:
            raise UsageError(f"the plots of {folder} cannot be written: {error}") from error
    return plots


def _history(folder: Path, rows: pd.DataFrame) -> pd.DataFrame | None:
    """The rounds of the folder's experiments, each with the phase and the parameters of its cells."""
    import pandas as pd

    from fedsweep.manager.history import HISTORY_FILE
    from fedsweep.report.labels import parameters

    path = folder / HISTORY_FILE
    if not path.exists() or "signature" not in rows:
        return None
    try:
        rounds = pd.read_parquet(path, columns=["signature", "round", "val_loss", "val_acc"])
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; delete it, and the next run writes it again") from error
    cells = rows[["signature", "phase", "outcome", "seed", *parameters(rows)]]
    return cells[cells["signature"] != ""].drop_duplicates().merge(rounds, on="signature")
