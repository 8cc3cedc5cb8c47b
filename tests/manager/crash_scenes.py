"""What `crash_points.py` plays: sweeps of ten tasks, each with a folder as it is before a manager comes to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import conftest
from test_migrations import GRID
from test_state_json import local_time, old_task, write_old

from fedsweep.manager import ExperimentManager

SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: "out/{phase}"}
seeds: [1, 2]
first:
  combinations:
    - poison_ratio: [0.0, 0.5]
    - poison_type: [label_flip, random_noise]
second:
  combinations:
    - poison_ratio: [0.0]
    - lr: [0.01, 0.02, 0.03]
"""
HEADER = ",".join(conftest.RESULT_COLUMNS) + "\n"
# What an old tool left: a finished row, and one that it did not finish.
OLD_ROWS = f"""\
{HEADER}first,digits,lr,2,1,0.5,label_flip,1.0,shuffle,fedavg,32,0.875,0,0.25,0,0.5,0,0.5,0,650,7,1
first,digits,lr,2,1,0.5,ran"""
RESULT = conftest.result_of({"signature": "123456"})  # of tasks that workers held before


@dataclass(frozen=True)
class Scene:
    """A sweep to be."""

    set_up: Callable[[Path], None]  # puts into a new folder what lies there before
    open: Callable[[ExperimentManager], None]  # makes the tasks known to a manager, at each of its starts
    rows: Mapping[str, int]  # in the end, by output folder
    configs: tuple[str, ...] = ("sweep.yaml",)
    spool: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # what workers hold, by task
    is_about_opening: bool = False  # whether nothing is to be tried once the manager serves
    is_on_a_network: bool = False  # whether the ledger has a rollback journal, as on a network file system


def _folder_of_a_sweep(folder: Path) -> None:
    (folder / "out/first").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(SWEEP)
    (folder / "out/first/final_results.csv").write_text(OLD_ROWS)


def _open_as_start_does(manager: ExperimentManager) -> None:
    manager.load_all_configs()
    if not manager.load_state():
        manager.generate_all_tasks()


def _folder_of_version_1(folder: Path) -> None:
    (folder / ".fedsweep").mkdir(parents=True)
    conftest.write_version_1(folder / ".fedsweep/ledger.sqlite3")
    (folder / "sweep.yaml").write_text(GRID)


def _folder_of_an_old_manager(folder: Path) -> None:
    """Seven tasks in one folder, two in another, one in both; of three there are rows, and of one half a row."""
    for name in ("first", "second"):
        (folder / "out" / name).mkdir(parents=True)
    now = datetime.now(UTC)
    tasks = [old_task(number) for number in range(3)]
    tasks += [old_task(number, status="complete") for number in (3, 4)]
    tasks.append(old_task(5, status="assigned", assigned_to="old-1", assigned_at=local_time(now - timedelta(hours=1))))
    tasks.append(old_task(6, status="assigned", assigned_to="old-2", assigned_at=local_time(now - timedelta(hours=7))))
    tasks.append(old_task(7, output_dirs=["./out/first", "./out/second"]))
    tasks += [old_task(number, output_dir="./out/second", output_dirs=["./out/second"]) for number in (8, 9)]
    write_old(folder / "state.json", *tasks)
    (folder / "out/first/final_results.csv").write_text(HEADER + _old_row(3) + _old_row(4) + _old_row(0)[:30])
    (folder / "out/second/final_results.csv").write_text(HEADER + _old_row(9))


def _old_row(number: int) -> str:
    width = number + 1
    return f"first,digits,lr,{width},1,0.5,label_flip,1,shuffle,fedavg,32,0.875,0,0.25,0,0.5,0,0.5,0,650,7,42\n"


def _take_over(manager: ExperimentManager) -> None:
    assert manager.load_state("state.json")


def _held(task_id: str, worker: str, attempt: int | None) -> dict[str, Any]:
    return {"task_id": task_id, "worker_id": worker, "attempt": attempt, "result_data": RESULT}


A_SWEEP = Scene(_folder_of_a_sweep, _open_as_start_does, rows={"out/first": 8, "out/second": 6})
SCENES = {
    "a sweep": A_SWEEP,
    "a sweep on a network file system": replace(A_SWEEP, is_on_a_network=True),
    "a migration": Scene(
        _folder_of_version_1,
        _open_as_start_does,
        rows={"out": 12},
        spool={"p_1_1": _held("p_1_1", "host-2", 3)},
        is_about_opening=True,
    ),
    "a first import": Scene(
        _folder_of_an_old_manager,
        _take_over,
        rows={"out/first": 8, "out/second": 3},
        configs=(),
        spool={
            "first_5_42": _held("first_5_42", "old-1", None),
            "first_6_42": _held("first_6_42", "old-2", None),
        },
        is_about_opening=True,
    ),
}
