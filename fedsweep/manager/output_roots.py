"""Where a sweep may write: inside the current folder, and in folders that the command line admits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedsweep.errors import ConfigError, Problem, StateError
from fedsweep.manager.columns import FILE_NAME
from fedsweep.plan.config import SweepConfig
from fedsweep.plan.grid import Grid
from fedsweep.plan.words import shown

ADVICE = "the rows of a sweep stay inside the current folder"


def outside(output_dirs: Iterable[str], roots: Iterable[Path]) -> dict[str, str]:
    """Those of the folders that lie in none of the roots nor in the current folder, links followed.

    Returns:
        Where each of them really is, by the name it was given.
    """
    allowed = [os.path.realpath(root) for root in (Path.cwd(), *roots)]
    real = {folder: _place_of_rows(folder) for folder in dict.fromkeys(output_dirs)}
    return {folder: path for folder, path in real.items() if not any(_is_in(path, root) for root in allowed)}


def _place_of_rows(folder: str) -> str:
    """A folder, or the file elsewhere to which a link in it leads its rows."""
    rows = os.path.join(folder, FILE_NAME)
    return os.path.realpath(rows if os.path.islink(rows) else folder)


def _is_in(path: str, root: str) -> bool:
    return os.path.commonpath((path, root)) == root


def check_output_dirs(sweep: SweepConfig, grid: Grid, roots: Sequence[Path]) -> None:
    """Refuse a sweep that would write elsewhere than it may.

    Args:
        sweep: says where each phase's output folder was set.
        grid: its tasks, with every folder filled in.
        roots: folders that are allowed besides the current one.

    Raises:
        ConfigError: with the line of every setting that leads outside.
    """
    asked = {(cell.phase, cell.output_dir): None for task in grid.tasks for cell in task.cells}
    refused = outside((folder for _, folder in asked), roots)
    problems: dict[tuple[str, int, str], Problem] = {}
    for phase, folder in asked:
        if folder in refused:
            message = _refusal(folder, refused[folder])
            for place in {each.output_dir_place for each in sweep.phases if each.name == phase}:
                problems.setdefault(place, Problem(*place, message))
    if problems:
        raise ConfigError(problems.values())


def check_known_dirs(output_dirs: Iterable[str], roots: Sequence[Path], source: str) -> None:
    """Refuse to go on with folders that lie elsewhere, whoever wrote them down.

    Raises:
        StateError: names the first of them.
    """
    for folder, path in outside(output_dirs, roots).items():
        raise StateError(f"{source}: output_dir: {_refusal(folder, path)}")


def _refusal(folder: str, path: str) -> str:
    where = "" if os.path.abspath(folder) == path else f", by a link, at {shown(path)}"
    return f"{shown(folder)} lies outside{where}; {ADVICE}, or in one that --allow-output-root names"
