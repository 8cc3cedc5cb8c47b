"""How many threads a worker trains with, from the command line to the trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedsweep import run as run_module
from fedsweep.run import RunRequest
from fedsweep.worker import task as task_module
from fedsweep.worker import worker as worker_module
from fedsweep.worker.cpus import available_cpus


def test_the_cpus_are_those_that_this_process_may_use():
    everything = os.sched_getaffinity(0)
    assert available_cpus() == len(everything)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, everything)


@pytest.mark.parametrize(("given", "trains_with"), [(None, 5), (3, 3)])
def test_a_worker_trains_with_all_cpus_unless_told_otherwise(make_manager, work, monkeypatch, given, trains_with):
    seen: list[Any] = []
    monkeypatch.setattr(worker_module, "available_cpus", lambda: 5)
    monkeypatch.setattr(worker_module, "run_tasks", lambda tasks, station: seen.append(station.threads) or True)
    assert work(make_manager({"task_id": "a"}), threads=given) == 0
    assert seen == [trains_with]
    assert task_module.Station(None, "w", Path()).threads == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("cpus", "workers", "threads"), [(8, 1, "8"), (8, 3, "2"), (2, 5, "1")])
def test_run_shares_the_cpus_among_its_workers(monkeypatch, cpus, workers, threads):
    monkeypatch.setattr(run_module, "available_cpus", lambda: cpus)
    request = RunRequest(
        arguments=(),
        state_dir=Path("state"),
        data_dir=None,
        num_workers=None,
        device="cpu",
        host="127.0.0.1",
        port=0,
        max_tasks=1,
        quiet=True,
        as_json=False,
    )
    arguments = run_module._worker_arguments(request, "cpu", workers)
    assert arguments[arguments.index("--threads") + 1] == threads
    assert run_module._workers_and_device(request, print) == (1, "cpu")
