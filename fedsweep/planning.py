"""`fedsweep plan`: how many experiments, duplicates and finished ones a sweep has, and what the rest will cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fedsweep.manager.results import finished_signatures
from fedsweep.manager.sources import read_sources, split_arguments
from fedsweep.plan.config import parse
from fedsweep.plan.grid import Grid, PlannedTask, expand
from fedsweep.report.display import duration

if TYPE_CHECKING:
    from fedsweep.worker.probe import Estimate


@dataclass(frozen=True)
class PhasePlan:
    """What a phase asks for: grid points, those that are the same as an earlier one, those that are done."""

    experiments: int
    duplicates: int
    duplicate_of: dict[str, int]  # the phase that has it first -> how many
    complete: int


@dataclass(frozen=True)
class Plan:
    """What a sweep will do."""

    total: int
    unique: int
    duplicates: int
    complete: int
    phases: dict[str, PhasePlan]
    estimate: Estimate | None  # of what is not complete, on one worker


def make_plan(
    arguments: Sequence[str], *, data_dir: Path | None, device: str, max_tasks: int, with_probe: bool, quiet: bool
) -> Plan:
    """Count, look for finished rows, and (with_probe) time a few training steps.

    Raises:
        ConfigError: the configuration is wrong.
    """
    paths, overrides = split_arguments(arguments)
    grid = expand(parse(read_sources(paths), overrides), max_tasks)
    finished = finished_signatures(grid)
    waiting = [task for task in grid.tasks if task.signature not in finished]
    estimate = _estimate(waiting, data_dir, device, quiet=quiet) if with_probe and waiting else None
    return Plan(grid.total, grid.unique, grid.duplicates, len(finished), _phases(grid, finished), estimate)


def _phases(grid: Grid, finished: set[str]) -> dict[str, PhasePlan]:
    complete: Counter[str] = Counter()
    for task in grid.tasks:
        if task.signature in finished:
            complete.update({cell.phase for cell in task.cells})
    return {
        name: PhasePlan(count.experiments, count.duplicates, count.duplicate_of, complete[name])
        for name, count in grid.phases.items()
    }


def _estimate(tasks: Sequence[PlannedTask], data_dir: Path | None, device: str, *, quiet: bool) -> Estimate:
    from fedsweep.worker.probe import probe

    console = Console(stderr=True, quiet=quiet)
    with console.status("timing a few training steps …"):
        return probe([task.experiment for task in tasks], data_dir=data_dir, device=device)


def show_plan(plan: Plan, *, as_json: bool = False) -> None:
    """Print a plan for people, or as one JSON object."""
    if as_json:
        print(json.dumps(_as_json(plan)))
        return
    console = Console()
    table = Table(box=None, header_style="bold")
    table.add_column("phase")
    for name in ("experiments", "duplicates", "complete"):
        table.add_column(name, justify="right")
    table.add_column("the same as in")
    for name, phase in plan.phases.items():
        same = ", ".join(
            f"{'itself' if other == name else other} ({count})" for other, count in phase.duplicate_of.items()
        )
        table.add_row(name, str(phase.experiments), str(phase.duplicates), str(phase.complete), same)
    table.add_row("all", str(plan.total), str(plan.duplicates), str(plan.complete), "", style="bold")
    console.print(table)
    waiting = plan.unique - plan.complete
    console.print(f"\n{waiting} of {plan.unique} distinct experiments are still to be run.")
    if plan.estimate is not None:
        for line in _estimate_lines(plan.estimate, waiting):
            console.print(line)


def _as_json(plan: Plan) -> dict[str, Any]:
    return asdict(plan)


def _estimate_lines(estimate: Estimate, waiting: int) -> list[str]:
    lines = []
    if estimate.seconds is not None:
        per_hour = waiting / estimate.seconds * 3600
        rate = f"{per_hour:,.0f} experiments per hour on one worker ({estimate.device})"
        lines.append(f"About {duration(estimate.seconds)}, {rate}; early stopping may make it less.")
    return [*lines, *estimate.notes]
