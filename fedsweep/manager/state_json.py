"""The state as JSON: for people to read, and to take over from the first experiment managers.

Ours holds everything that the ledger does. That of an old manager has tasks by id, the signatures that it took for
complete, and no results; what it calls complete counts only where a row is found.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from fedsweep.errors import ConfigError, Problem, ProtocolError, StateError
from fedsweep.files import fsync, open_fresh, read_plain
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.protocol import Error, Id, Key, ResultData, decode
from fedsweep.manager.records import Status, Task
from fedsweep.manager.wrong_fields import wrong_fields
from fedsweep.plan.experiment import (
    PARAMETERS,
    RunOptions,
    check_together,
    check_value,
    defaults,
    from_config,
    is_scientific,
)
from fedsweep.plan.grid import Cell, PlannedTask
from fedsweep.plan.types import MAX_COUNT
from fedsweep.plan.words import did_you_mean, shown_key

FORMAT = "fedsweep-state"
ADVICE = "nothing was changed"
MAX_ATTEMPT = 2**62  # SQLite counts to twice that


@dataclass(frozen=True, kw_only=True)
class StateTask:
    """A task in a JSON state."""

    task_id: str
    planned: PlannedTask
    status: str
    failures: int
    losses: int
    last_error: str | None
    assigned_to: str | None
    assigned_at: datetime | None
    result: dict[str, Any] | None
    is_orphaned: bool


@dataclass(frozen=True, kw_only=True)
class State:
    """What a JSON state says."""

    tasks: tuple[StateTask, ...] = ()
    last_attempt: int = 0  # attempts go on counting from here


def _time(words: object) -> object:
    """A time in ISO 8601; one without a zone is local, as old managers wrote it."""
    if words is None:
        return None
    try:
        return datetime.fromisoformat(words).astimezone() if isinstance(words, str) else _no_time()
    except (ValueError, OverflowError):
        return _no_time()


def _no_time() -> NoReturn:
    raise ValueError("expected a time in ISO 8601")


Tries = Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)]
Folder = Key  # of any length


class _CellFields(BaseModel):
    """A cell as our own states have it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    phase: Id
    output_dir: Folder
    config: dict[str, Any]


class _TaskFields(BaseModel):
    """What a task has besides the parameters of its experiment."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    task_id: Id
    phase: Id | None = None
    output_dir: Folder | None = None
    output_dirs: tuple[Folder, ...] | None = None
    status: Status = "pending"
    retry_count: Tries | None = None
    losses: Tries | None = None
    last_error: Error | None = None
    assigned_to: Id | None = None
    assigned_at: Annotated[datetime | None, BeforeValidator(_time)] = None
    orphaned: StrictBool = False
    cells: tuple[_CellFields, ...] | None = None


class _File(BaseModel):
    """What a state has besides its format."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    tasks: dict[str, Any]
    assigned_tasks: dict[str, Any] = {}
    results: dict[str, Any] = {}
    last_attempt: Annotated[StrictInt, Field(ge=0, le=MAX_ATTEMPT)] = 0


@dataclass
class _Reading:
    """A file that is being read, and everything found wrong with it."""

    name: str
    problems: list[Problem] = field(default_factory=list)

    def note(self, path: str, message: str) -> None:
        self.problems.append(Problem(self.name, 0, path, message))


def write_state(path: Path, view: LedgerView, now: datetime) -> None:
    """Write the whole ledger as JSON; the file is replaced at once or not at all."""
    tasks = {task.task_id: _task_json(view, task) for task in view.all_tasks()}
    state = {
        "format": FORMAT,
        "version": 1,
        "saved_at": now.isoformat(),
        "last_attempt": view.last_attempt(),
        "tasks": tasks,
        "completed_tasks": view.complete_signatures(),
        "assigned_tasks": {key: task for key, task in tasks.items() if task["status"] == "assigned"},
        "results": dict(view.results()),
    }
    fresh = path.with_name(f".{path.name}.tmp")
    with io.TextIOWrapper(open_fresh(fresh), encoding="utf-8") as stream:
        json.dump(state, stream, indent=1, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, path)
    fsync(path.parent)


def _task_json(view: LedgerView, task: Task) -> dict[str, Any]:
    assigned_at = None if task.assigned_at is None else task.assigned_at.isoformat()
    cells = [
        {"phase": phase, "output_dir": output_dir, "config": spelled}
        for phase, output_dir, spelled in view.cells_of(task.number)
    ]
    more = {"losses": task.losses, "attempt": task.attempt, "orphaned": task.orphaned, "cells": cells}
    return {**task.as_dict(), "assigned_at": assigned_at, **more}


def read_state(path: Path) -> State:
    """Read a JSON state, ours or an old manager's.

    Raises:
        StateError: the file cannot be read, or is no such state.
        ConfigError: tasks in it are not experiments of ours; with every problem.
    """
    try:
        content = read_plain(path)
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None
    return parse_state(str(path), content)


def parse_state(name: str, content: bytes) -> State:
    """The state that stands in a file of this name; raises as `read_state` does."""
    file = _read_file(name, content)
    reading = _Reading(name)
    tasks = [_read_task(reading, key, task, file) for key, task in file.tasks.items()]
    if reading.problems:
        raise ConfigError(reading.problems)
    return State(tasks=_merged(task for task in tasks if task is not None), last_attempt=file.last_attempt)


def _read_file(name: str, content: bytes) -> _File:
    try:
        message = decode(content)
    except ProtocolError as error:
        if error.code == "not_an_object":
            raise StateError(f'{name} is no state of an experiment manager: it has no "tasks"; {ADVICE}') from None
        raise StateError(f"{name} is not JSON as it is read here ({error}); {ADVICE}") from None
    if not isinstance(message.get("tasks"), dict):
        raise StateError(f'{name} is no state of an experiment manager: it has no "tasks"; {ADVICE}')
    if message.get("format", FORMAT) != FORMAT or message.get("version", 1) != 1:
        raise StateError(f"{name} was written by a newer fedsweep or another program; {ADVICE}")
    try:
        return _File.model_validate(message)
    except ValidationError as error:
        path, what = next(wrong_fields(error, _File))
        raise StateError(f"{name} is no state of an experiment manager: {path} {what}; {ADVICE}") from None


def _merged(tasks: Iterable[StateTask]) -> tuple[StateTask, ...]:
    """The tasks, those that compute the same (`0` and `0.0` were two tasks once) made one with the cells of both."""
    merged: dict[str, StateTask] = {}
    for task in tasks:
        first = merged.setdefault(task.planned.signature, task)
        if first is not task:
            cells = tuple(dict.fromkeys((*first.planned.cells, *task.planned.cells)))
            merged[task.planned.signature] = replace(first, planned=replace(first.planned, cells=cells))
    return tuple(merged.values())


def _read_task(reading: _Reading, key: str, task: Any, file: _File) -> StateTask | None:
    """One task, or None after noting what is wrong with it."""
    path = f"tasks.{shown_key(key)}"
    if not isinstance(task, dict) or not isinstance(task.get("config"), dict):
        reading.note(path, 'expected a task with a "config"')
        return None
    holder = file.assigned_tasks.get(key)
    holder = holder if isinstance(holder, dict) else {}
    given = {"task_id": key, **task}
    given["assigned_to"] = task.get("assigned_to") or holder.get("assigned_to") or holder.get("worker_id")
    given["assigned_at"] = task.get("assigned_at") or holder.get("assigned_at")
    values = _read_config(reading, f"{path}.config", {**task["config"], **_seed_of(task)}, defaults())
    try:
        fields = _TaskFields.model_validate(given)
    except ValidationError as error:
        for field_path, what in wrong_fields(error, _TaskFields):
            reading.note(f"{path}.{field_path}", what.removeprefix("is "))
        return None
    return None if values is None else _build_task(reading, path, fields, values, file)


def _build_task(
    reading: _Reading, path: str, fields: _TaskFields, values: Mapping[str, Any], file: _File
) -> StateTask | None:
    planned = _plan(reading, path, fields, values)
    if planned is None:
        return None
    return StateTask(
        task_id=fields.task_id,
        planned=planned,
        status=fields.status,
        failures=fields.retry_count or 0,
        losses=fields.losses or 0,
        last_error=fields.last_error,
        assigned_to=fields.assigned_to,
        assigned_at=fields.assigned_at,
        result=_read_result(reading, path, file.results.get(planned.signature)),
        is_orphaned=fields.orphaned,
    )


def _seed_of(task: Mapping[str, Any]) -> dict[str, Any]:
    return {"seed": task["seed"]} if "seed" in task else {}


def _read_config(
    reading: _Reading, path: str, config: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Every parameter of a task, with what `config` does not name as in `others`; None after noting what is wrong."""
    values, before = dict(others), len(reading.problems)
    for name, value in config.items():
        place = f"{path}.{shown_key(name)}"
        if name not in PARAMETERS:
            reading.note(place, f"there is no such parameter{did_you_mean(name, PARAMETERS)}")
            continue
        try:
            values[name] = check_value(name, value)
        except ValueError as error:
            reading.note(place, str(error))
    if len(reading.problems) == before and (clash := check_together(values)) is not None:
        reading.note(f"{path}.{clash[0]}", clash[1])
    return values if len(reading.problems) == before else None


def _plan(reading: _Reading, path: str, fields: _TaskFields, values: Mapping[str, Any]) -> PlannedTask | None:
    """The task with its cells: those that are listed, or one for each of its output folders."""
    phase = fields.phase or fields.task_id.rsplit("_", 2)[0] or "_"
    experiment = from_config(values)
    folders = fields.output_dirs or (fields.output_dir or values["output_dir"],)
    cells = [Cell(phase, os.path.normpath(folder), experiment) for folder in folders]
    if fields.cells:
        cells = []
        for index, cell in enumerate(fields.cells):
            place = f"{path}.cells.{index}.config"
            spelled = _read_config(reading, place, cell.config, values)
            if spelled is None:
                return None
            cells.append(Cell(cell.phase, os.path.normpath(cell.output_dir), from_config(spelled)))
            if cells[-1].experiment.signature != experiment.signature:
                reading.note(place, "another experiment than that of the task")
                return None
    run = {name: value for name, value in values.items() if not is_scientific(name)}
    options = RunOptions(**{**run, "output_dir": cells[0].output_dir})
    parts = fields.task_id.rsplit("_", 2)
    number = int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else 0
    return PlannedTask(experiment, options, number, tuple(dict.fromkeys(cells)))


def _read_result(reading: _Reading, path: str, result: Any) -> dict[str, Any] | None:
    if result is None:
        return None
    try:
        return ResultData.model_validate(result).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        for field_path, what in wrong_fields(error, ResultData):
            reading.note(path, f"its result: {field_path} {what}")
        return None
