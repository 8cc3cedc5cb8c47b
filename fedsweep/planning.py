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

from fedsweep.manager.at_rest import given_up
from fedsweep.manager.output_roots import check_output_dirs
from fedsweep.manager.results import finished_signatures
from fedsweep.manager.sources import read_sources, split_arguments
from fedsweep.plan.config import parse
from fedsweep.plan.grid import Grid, PlannedTask, expand
from fedsweep.report.display import duration

if TYPE_CHECKING:
    from fedsweep.worker.probe import CohortEstimate, Estimate

SHOWN = 20  # cohorts in the table
NOT_TIMED = "not timed"
PLANS = {  # in words, by how the names of plans begin
    "native": "native xN: compiled kernels, N experiments at a time",
    "stacked": "stacked: PyTorch operators, many experiments at a time",
    "loop": "loop: plain PyTorch, one experiment after another",
    "reference": "reference: the slow engine, as the configuration asks",
    NOT_TIMED: "not timed: estimated from the most similar one",
}


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
    failed: int  # for good, so that they are not run again
    cancelled: int
    phases: dict[str, PhasePlan]
    estimate: Estimate | None  # of what is still to be run, on one worker

    @property
    def waiting(self) -> int:
        """How many experiments are still to be run."""
        return self.unique - self.complete - self.failed - self.cancelled


def make_plan(
    arguments: Sequence[str],
    *,
    state_dir: Path,
    data_dir: Path | None,
    device: str,
    max_tasks: int,
    output_roots: Sequence[Path] = (),
    with_probe: bool,
    quiet: bool,
) -> Plan:
    """Count, look for finished rows and for what failed, and (with_probe) time a few training steps.

    Raises:
        ConfigError: the configuration is wrong.
        StateError: there is a ledger in `state_dir`, but it cannot be read.
    """
    paths, overrides = split_arguments(arguments)
    config = parse(read_sources(paths), overrides)
    grid = expand(config, max_tasks)
    check_output_dirs(config, grid, output_roots)
    finished = finished_signatures(grid)
    not_run = {name: cancelled for name, cancelled in given_up(state_dir).items() if name not in finished}
    waiting = [task for task in grid.tasks if task.signature not in finished | not_run.keys()]
    causes = [not_run[task.signature] for task in grid.tasks if task.signature in not_run]
    estimate = _estimate(waiting, data_dir, device, quiet=quiet) if with_probe and waiting else None
    return Plan(
        total=grid.total,
        unique=grid.unique,
        duplicates=grid.duplicates,
        complete=len(finished),
        failed=causes.count(False),
        cancelled=causes.count(True),
        phases=_phases(grid, finished),
        estimate=estimate,
    )


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
        return probe(
            [task.experiment for task in tasks],
            data_dir=data_dir,
            device=device,
            engines=[task.options.engine for task in tasks],
        )


def show_plan(plan: Plan, *, as_json: bool = False, option: str = "") -> None:
    """Print a plan for people, or as one JSON object; `option` is what commands need to find the state directory."""
    if as_json:
        print(json.dumps(_as_json(plan)))
        return
    console = Console()
    console.print(_phase_table(plan))
    console.print(f"\n{plan.waiting} of {plan.unique} distinct experiments are still to be run.")
    for line in _not_run_lines(plan, option):
        console.print(line, soft_wrap=True, markup=False)
    if plan.estimate is not None:
        for each in plan.estimate.missing:
            words = (
                f"Missing: {each.dataset}, for {each.experiments} of them; `fedsweep run` does not start without it."
            )
            console.print(words, style="bold red", markup=False, highlight=False)
            console.print(each.reason, soft_wrap=True, markup=False, highlight=False)
        if plan.estimate.cohorts:
            console.print(_cohort_table(plan.estimate.cohorts))
        for line in _estimate_lines(plan.estimate):
            console.print(line)


def _not_run_lines(plan: Plan, option: str) -> list[str]:
    lines = []
    if plan.failed:
        verb = "is" if plan.failed == 1 else "are"
        lines.append(f"{plan.failed} failed for good and {verb} not run again, unless by `fedsweep retry{option}`.")
    if plan.cancelled:
        verb = "is" if plan.cancelled == 1 else "are"
        lines.append(f"{plan.cancelled} {verb} cancelled, unless by `fedsweep retry cancelled{option}`.")
    return lines


def _phase_table(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("phase")
    for name in ("experiments", "duplicates", "complete"):
        table.add_column(name, justify="right")
    if plan.duplicates:
        table.add_column("the same as in")
    for name, phase in plan.phases.items():
        same = (f"{'itself' if other == name else other} ({count})" for other, count in phase.duplicate_of.items())
        counts = map(str, (phase.experiments, phase.duplicates, phase.complete))
        table.add_row(name, *counts, *([", ".join(same)] if plan.duplicates else []))
    table.add_row("all", *map(str, (plan.total, plan.duplicates, plan.complete)), style="bold")
    return table


def _as_json(plan: Plan) -> dict[str, Any]:
    return asdict(plan)


def _cohort_table(cohorts: Sequence[CohortEstimate]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("trained together")
    for name in ("experiments", "plan", "seconds each", "memory"):
        table.add_column(name, justify="right")
    for each in cohorts[:SHOWN]:
        plan, seconds = each.plan or NOT_TIMED, f"{each.seconds_per_experiment:.3g}"
        table.add_row(each.name, str(each.experiments), plan, seconds, _megabytes(each.memory_bytes))
    if len(cohorts) > SHOWN:
        table.add_row(f"and {len(cohorts) - SHOWN} more", str(sum(each.experiments for each in cohorts[SHOWN:])))
    return table


def _estimate_lines(estimate: Estimate) -> list[str]:
    lines = [f"({words})"] if (words := _plan_words(estimate.cohorts[:SHOWN])) else []
    if estimate.seconds is not None and estimate.experiments_per_hour is not None:
        where = f"one worker ({estimate.device}"
        where += f", {estimate.threads} thread{'s' * (estimate.threads > 1)})" if estimate.device == "cpu" else ")"
        rate = f"{estimate.experiments_per_hour:,.0f} experiments per hour on {where}"
        lines.append(f"About {duration(estimate.seconds)}, {rate}; early stopping may make it less.")
    if estimate.memory_bytes is not None:
        lines.append(f"A worker takes about {_megabytes(estimate.memory_bytes)} of memory.")
    return [*lines, *estimate.notes]


def _plan_words(cohorts: Sequence[CohortEstimate]) -> str:
    """What the names of these cohorts' plans mean."""
    plans = {each.plan or NOT_TIMED for each in cohorts}
    return "; ".join(words for name, words in PLANS.items() if any(plan.startswith(name) for plan in plans))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
