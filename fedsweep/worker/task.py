"""Tasks from their hand-out to the acknowledgement of their results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsweep.errors import FedsweepError, Preempted
from fedsweep.manager.protocol import TaskMessage
from fedsweep.worker.client import ManagerClient
from fedsweep.worker.cohort_run import key_of, run_cohort
from fedsweep.worker.device import CPU, Device
from fedsweep.worker.held import HeldTasks
from fedsweep.worker.result import Progress
from fedsweep.worker.runner import run_single_experiment
from fedsweep.worker.station import Station
from fedsweep.worker.stopping import StopSignals


class Dropped(FedsweepError):
    """The manager no longer wants this task from this worker."""


def run_task(
    task: TaskMessage,
    client: ManagerClient,
    *,
    worker_id: str,
    spool_dir: Path,
    device: Device = CPU,
    data_dir: str | Path | None = None,
    stop: StopSignals | None = None,
    threads: int = 1,
    checkpoint_dir: Path | None = None,
) -> bool:
    """Run a task and deliver its result; whether no result of it waits in the spool. See `run_tasks`.

    Raises:
        Preempted: a stop signal came; the task has been given back, or its result waits in the spool.
    """
    station = Station(
        client=client,
        worker_id=worker_id,
        spool_dir=spool_dir,
        device=device,
        data_dir=data_dir,
        stop=stop or StopSignals(),
        threads=threads,
        checkpoint_dir=checkpoint_dir,
    )
    return run_tasks([task], station)


def run_tasks(tasks: Sequence[TaskMessage], station: Station) -> bool:
    """Run tasks and deliver their results; False where one that the manager cannot take now waits in the spool.

    Those that can train together do. What an experiment's own code raises is reported as that task's failure, and the
    others go on. Weights that are not finite are none: that result is `diverged`. When a stop signal comes, experiments
    are saved and the tasks given back without blame.

    Raises:
        Preempted: a stop signal came; every task has been given back, or its result waits in the spool.
    """
    with HeldTasks(station) as held:
        try:
            waiting = held.take(tasks)
            while waiting:
                waiting = _run_first(waiting, station, held)
        except Preempted:
            station.stop.settle()
            held.give_back_all()
            raise
        return not held.has_undelivered


def _run_first(tasks: Sequence[TaskMessage], station: Station, held: HeldTasks) -> list[TaskMessage]:
    """Run the first task with all that can train with it; what is then still to be run."""
    for task_id in held.dropped():
        held.drop(task_id)
    keys = {task.task_id: key_of(task, held) for task in tasks if task.task_id in held}
    tasks = [task for task in tasks if task.task_id in held]
    if not tasks:
        return []
    key = keys[tasks[0].task_id]
    together = [task for task in tasks if keys[task.task_id] == key]
    others = [task for task in tasks if keys[task.task_id] != key]
    if tasks[0].config.get("engine") == "reference":
        for task in together:
            _run_alone(task, station, held)
        return others
    return others + run_cohort(station, held, str(key), together)


def _run_alone(task: TaskMessage, station: Station, held: HeldTasks) -> None:
    """Run a task by the reference engine."""

    def on_round(progress: Progress) -> None:
        held.tell(task.task_id, progress)
        if task.task_id in held.dropped():
            raise Dropped

    try:
        with station.stop.interruptible():
            result, history = run_single_experiment(
                task.config,
                task.seed,
                device=station.device.torch_name,
                data_dir=station.data_dir,
                on_round=on_round,
                threads=station.threads,
            )
    except Preempted:
        raise
    except Dropped:
        held.drop(task.task_id)
    except Exception as error:
        held.fail(task.task_id, error)
    else:
        held.finish(task.task_id, {**result, "history": history})
