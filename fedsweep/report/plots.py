"""Every figure of an output folder, drawn and saved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsweep.report.accuracy import accuracy_figures
from fedsweep.report.coverage import runs
from fedsweep.report.curves import curve_figures
from fedsweep.report.heatmap import heat_figures
from fedsweep.report.labels import varying
from fedsweep.report.look import Scales, save, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plot_folder(
    cells: pd.DataFrame, history: pd.DataFrame | None, folder: Path, scales: Scales, formats: Sequence[str]
) -> tuple[Path, ...]:
    """Draw every figure that the cells of a folder allow, and save it in `folder`; the files written.

    `cells` are what `with_gaps` gives, `history` the rounds with the parameters of their cells, or None. A phase
    without any row has no figure.
    """
    written: list[Path] = []
    names: set[str] = set()
    with style():
        for phase, own in cells.groupby("phase"):
            if not runs(own).any():
                continue
            rounds = None if history is None else history[history["phase"] == phase]
            for kind, pages in figures(str(phase), own, rounds, scales):
                for number, figure in enumerate(pages, 1):
                    page = f"_{number}" if number > 1 else ""
                    stem = _unused(f"{_file_name(str(phase))}_{kind}{page}", names)
                    written += save(figure, folder / stem, formats)
    return tuple(written)


def figures(
    phase: str, cells: pd.DataFrame, rounds: pd.DataFrame | None, scales: Scales
) -> Iterator[tuple[str, Iterator[Figure]]]:
    """The kinds of figures of a phase, each with its pages."""
    yield "accuracy", accuracy_figures(phase, cells, scales)
    if {"width_factor", "depth"} <= set(varying(cells)):
        yield "width_depth", heat_figures(phase, cells)
    if rounds is not None and len(rounds):
        yield "validation", curve_figures(phase, cells, rounds, scales)


def _file_name(phase: str) -> str:
    return re.sub(r"[^\w.-]+", "_", phase).strip("._") or "phase"


def _unused(stem: str, names: set[str]) -> str:
    while stem.lower() in names:
        stem += "_"
    names.add(stem.lower())
    return stem
