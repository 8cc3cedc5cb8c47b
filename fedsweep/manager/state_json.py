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
from typing import Any

from pydantic import ValidationError

from fedsweep.errors import ConfigError, Problem, StateError
from fedsweep.files import fsync, open_fresh, read_plain
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.protocol import ResultData
from fedsweep.manager.records import Task
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
from fedsweep.plan.words import did_you_mean

FORMAT = "fedsweep-state"
MOST = 2**53  # of a count
STATUSES = ("pending", "assigned", "complete", "failed")


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
    advice = "nothing was changed"
    try:
        content = json.loads(read_plain(path).decode())
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path} is not JSON ({error}); {advice}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise StateError(f'{path} is no state of an experiment manager: it has no "tasks"; {advice}')
    if content.get("format", FORMAT) != FORMAT or content.get("version", 1) != 1:
        raise StateError(f"{path} was written by a newer fedsweep or another program; {advice}")
    reading = _Reading(str(path))
    tasks = [_read_task(reading, key, task, content) for key, task in content["tasks"].items()]
    last_attempt = 0
    try:
        last_attempt = _count(content.get("last_attempt"))
    except ValueError as error:
        reading.note("last_attempt", str(error))
    if reading.problems:
        raise ConfigError(reading.problems)
    return State(tasks=_merged(task for task in tasks if task is not None), last_attempt=last_attempt)


def _merged(tasks: Iterable[StateTask]) -> tuple[StateTask, ...]:
    """The tasks, those that compute the same (`0` and `0.0` were two tasks once) made one with the cells of both."""
    merged: dict[str, StateTask] = {}
    for task in tasks:
        first = merged.setdefault(task.planned.signature, task)
        if first is not task:
            cells = tuple(dict.fromkeys((*first.planned.cells, *task.planned.cells)))
            merged[task.planned.signature] = replace(first, planned=replace(first.planned, cells=cells))
    return tuple(merged.values())


def _read_task(reading: _Reading, key: str, task: Any, content: Mapping[str, Any]) -> StateTask | None:
    """One task, or None after noting what is wrong with it."""
    path = f"tasks.{key}"
    if not isinstance(task, dict) or not isinstance(task.get("config"), dict):
        reading.note(path, 'expected a task with a "config"')
        return None
    values = _read_config(reading, f"{path}.config", {**task["config"], **_seed_of(task)})
    if values is None:
        return None
    if task.get("status", "pending") not in STATUSES:
        reading.note(f"{path}.status", f"{task['status']!r} is no status ({', '.join(STATUSES)})")
        return None
    try:
        return _build_task(reading, key, task, values, content)
    except ValidationError as error:
        problem = error.errors()[0]
        reading.note(path, f"cells: {'.'.join(map(str, problem['loc']))}: {problem['msg']}")
        return None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reading.note(path, f"a field is missing or of the wrong type ({error})")
        return None


def _build_task(
    reading: _Reading, key: str, task: Mapping[str, Any], values: Mapping[str, Any], content: Mapping[str, Any]
) -> StateTask:
    path = f"tasks.{key}"
    planned = _plan(task, _text(task.get("task_id")) or _text(key) or "", values)
    holder = content.get("assigned_tasks", {}).get(key)
    holder = holder if isinstance(holder, dict) else {}
    return StateTask(
        task_id=_text(task.get("task_id")) or key,
        planned=planned,
        status=task.get("status", "pending"),
        failures=_count(task.get("retry_count")),
        losses=_count(task.get("losses")),
        last_error=_text(task.get("last_error")),
        assigned_to=_text(task.get("assigned_to") or holder.get("assigned_to") or holder.get("worker_id")),
        assigned_at=_read_time(reading, path, task.get("assigned_at") or holder.get("assigned_at")),
        result=_read_result(reading, path, content.get("results", {}).get(planned.signature)),
        is_orphaned=bool(task.get("orphaned", False)),
    )


def _seed_of(task: Mapping[str, Any]) -> dict[str, Any]:
    return {"seed": task["seed"]} if "seed" in task else {}


def _read_config(reading: _Reading, path: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Every parameter of a task, or None after noting what is wrong."""
    values, before = defaults(), len(reading.problems)
    for name, value in config.items():
        if name not in PARAMETERS:
            reading.note(f"{path}.{name}", f"there is no such parameter{did_you_mean(name, PARAMETERS)}")
            continue
        try:
            values[name] = check_value(name, value)
        except ValueError as error:
            reading.note(f"{path}.{name}", str(error))
    if len(reading.problems) == before and (clash := check_together(values)) is not None:
        reading.note(f"{path}.{clash[0]}", clash[1])
    return values if len(reading.problems) == before else None


def _plan(task: Mapping[str, Any], task_id: str, values: Mapping[str, Any]) -> PlannedTask:
    """The task with its cells: those that are listed, or one for each of its output folders."""
    phase = _text(task.get("phase")) or task_id.rsplit("_", 2)[0]
    experiment = from_config(values)
    folders = task.get("output_dirs") or [task.get("output_dir") or values["output_dir"]]
    if not isinstance(folders, list):
        raise ValueError(f"output_dirs is {folders!r:.80}, not a list")
    listed = task.get("cells") or [{"phase": phase, "output_dir": folder, "config": values} for folder in folders]
    cells = tuple(
        Cell(_text(cell["phase"]) or "", _folder(cell["output_dir"]), from_config({**values, **cell["config"]}))
        for cell in listed
    )
    run = {name: value for name, value in values.items() if not is_scientific(name)}
    options = RunOptions(**{**run, "output_dir": cells[0].output_dir})
    parts = task_id.rsplit("_", 2)
    number = int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else 0
    return PlannedTask(experiment, options, number, tuple(dict.fromkeys(cells)))


def _count(value: Any) -> int:
    """How often something happened; what is missing happened never."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise ValueError(f"{value!r:.80} is no count; expected a whole number from 0 to {MOST:,}")
    return value


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is no text")
    value.encode()  # half of a surrogate pair cannot be stored
    return value


def _folder(value: Any) -> str:
    folder = _text(value)
    if not folder or "\0" in folder:
        raise ValueError(f"{value!r:.80} is no folder")
    return os.path.normpath(folder)


def _read_time(reading: _Reading, path: str, words: Any) -> datetime | None:
    """A time in ISO 8601; one without a zone is local, as old managers wrote it."""
    if words is None:
        return None
    try:
        return datetime.fromisoformat(words).astimezone()
    except (TypeError, ValueError):
        reading.note(f"{path}.assigned_at", f"{words!r} is no time in ISO 8601")
        return None


def _read_result(reading: _Reading, path: str, result: Any) -> dict[str, Any] | None:
    if result is None:
        return None
    try:
        return ResultData.model_validate(result).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        problem = error.errors()[0]
        reading.note(path, f"result: {'.'.join(map(str, problem['loc']))}: {problem['msg']}")
        return None
