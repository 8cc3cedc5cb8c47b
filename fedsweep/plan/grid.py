"""A `SweepConfig` to tasks: counted before it is expanded, and every distinct computation once."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fedsweep.errors import ConfigError, Problem
from fedsweep.plan.config import Phase, SweepConfig
from fedsweep.plan.experiment import Experiment, RunOptions, is_scientific
from fedsweep.plan.output_dirs import fill, placeholders


@dataclass(frozen=True, slots=True)
class Cell:
    """What a grid asks for: a phase, an output folder, and the values as this grid spells them."""

    phase: str
    output_dir: str  # placeholders filled in; as relative as the user wrote it
    experiment: Experiment


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One computation, with every cell that asks for it."""

    experiment: Experiment  # of the first cell
    options: RunOptions  # of the first cell, its output folder filled in
    number: int  # index of the combination in its phase, the same for all its seeds
    cells: tuple[Cell, ...]  # distinct, first seen first

    @property
    def signature(self) -> str:
        """What identifies the computation."""
        return self.experiment.signature

    @property
    def phase(self) -> str:
        """The phase that asks first."""
        return self.cells[0].phase

    @property
    def output_dir(self) -> str:
        """The output folder of the first cell."""
        return self.cells[0].output_dir

    @property
    def output_dirs(self) -> tuple[str, ...]:
        """Every output folder that gets a row, first seen first."""
        return tuple(dict.fromkeys(cell.output_dir for cell in self.cells))

    @property
    def config(self) -> dict[str, Any]:
        """All parameters of the first cell, flat."""
        return self.experiment.model_dump() | self.options.model_dump()


@dataclass(frozen=True)
class PhaseCount:
    """How many grid points a phase has, and how many of them an earlier point computes already."""

    experiments: int
    duplicates: int
    duplicate_of: dict[str, int]  # the phase that has it first (or this one) -> how many


@dataclass(frozen=True)
class Grid:
    """Every task of a sweep, and how its phases share them."""

    tasks: tuple[PlannedTask, ...]
    phases: dict[str, PhaseCount]

    @property
    def total(self) -> int:
        """Grid points: combinations times seeds, over all phases."""
        return sum(phase.experiments for phase in self.phases.values())

    @property
    def unique(self) -> int:
        """Tasks: distinct computations."""
        return len(self.tasks)

    @property
    def duplicates(self) -> int:
        """Grid points that an earlier one computes already."""
        return self.total - self.unique


def count(sweep: SweepConfig) -> int:
    """The number of grid points; nothing is expanded."""
    return sum(_points(phase) for phase in sweep.phases)


def expand(sweep: SweepConfig, max_tasks: int = 1_000_000) -> Grid:
    """The tasks of a sweep.

    Raises:
        ConfigError: the sweep has more than `max_tasks` grid points; it is not expanded.
    """
    if (total := count(sweep)) > max_tasks:
        raise ConfigError([_too_large(sweep, total, max_tasks)])
    drafts: dict[str, _TaskDraft] = {}
    points: dict[str, int] = {}
    duplicate_of: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    combinations: dict[str, int] = defaultdict(int)  # a phase of two files goes on counting
    for phase in sweep.phases:
        points[phase.name] = points.get(phase.name, 0) + _points(phase)
        first_number = combinations[phase.name]
        combinations[phase.name] += _points(phase) // len(phase.seeds)
        for number, cell, options in _cells(phase):
            draft = drafts.get(cell.experiment.signature)
            if draft is None:
                drafts[cell.experiment.signature] = _TaskDraft(first_number + number, options, {cell: None})
            else:
                draft.cells.setdefault(cell)
                duplicate_of[phase.name][draft.phase] += 1
    tasks = tuple(draft.task() for draft in drafts.values())
    counts = {
        name: PhaseCount(number, sum(duplicate_of[name].values()), dict(duplicate_of[name]))
        for name, number in points.items()
    }
    return Grid(tasks, counts)


@dataclass(slots=True)
class _TaskDraft:
    """A task that still gathers cells."""

    number: int
    options: RunOptions
    cells: dict[Cell, None] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        return next(iter(self.cells)).phase

    def task(self) -> PlannedTask:
        cells = tuple(self.cells)
        return PlannedTask(cells[0].experiment, self.options, self.number, cells)


def _points(phase: Phase) -> int:
    return math.prod(len(values) for values in phase.varied.values()) * len(phase.seeds)


def _cells(phase: Phase) -> Iterator[tuple[int, Cell, RunOptions]]:
    """Every grid point of a phase, with the number of its combination and its run options."""
    science = {name: value for name, value in phase.base.items() if is_scientific(name)}
    run = {name: value for name, value in phase.base.items() if not is_scientific(name)}
    template = run["output_dir"]
    names_filled_in = placeholders(template)
    options_by_dir: dict[str, RunOptions] = {}
    for number, combination in enumerate(itertools.product(*phase.varied.values())):
        values = science | dict(zip(phase.varied, combination, strict=True))
        for seed in phase.seeds:
            # Every value is checked already, which takes many times longer than making the experiment.
            experiment = Experiment.model_construct(_ALL_FIELDS, **values, seed=seed)
            known = run | values | {"phase": phase.name, "seed": seed} if names_filled_in else {}
            output_dir = fill(template, known)
            if output_dir not in options_by_dir:
                options_by_dir[output_dir] = RunOptions.model_construct(**run | {"output_dir": output_dir})
            yield number, Cell(phase.name, output_dir, experiment), options_by_dir[output_dir]


_ALL_FIELDS = set(Experiment.model_fields)


def _too_large(sweep: SweepConfig, total: int, max_tasks: int) -> Problem:
    """The problem of a sweep with too many grid points, where it is largest."""
    phase = max(sweep.phases, key=_points)
    sizes = [f"{len(values):,} {name}" for name, values in phase.varied.items()] + [f"{len(phase.seeds):,} seeds"]
    message = (
        f"{' × '.join(sizes)} are {_points(phase):,} of {total:,} experiments in all, and more than {max_tasks:,} are "
        f"refused; shorten the lists, or allow them by --max-tasks {total}"
    )
    return Problem(phase.file, phase.line, f"{phase.name}.combinations", message)
