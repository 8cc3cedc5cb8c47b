"""One experiment: its result as it is submitted, its rounds, its clients side by side in processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime

import psutil
import pytest
import torch

from fedsweep.datasets import load_global_dataset
from fedsweep.errors import DataError, PartitionError
from fedsweep.fl import LogisticRegression, ScalableCNN
from fedsweep.fl import reference as engine
from fedsweep.fl.data import ImageData
from fedsweep.manager.protocol import PROVENANCE_FIELDS, ResultData
from fedsweep.plan.experiment import from_config
from fedsweep.worker import create_model, run_single_experiment, train_client_worker
from fedsweep.worker.result import Progress
from fedsweep.worker.runner import _job

CONFIG = {
    "dataset": "digits",
    "model_type": "cnn",
    "width_factor": 3,
    "depth": 1,
    "num_clients": 3,
    "global_rounds": 3,
    "poison_ratio": 0.3,
    "batch_size": 64,
}


REFERENCE = CONFIG | {"engine": "reference"}


def reference(config: dict[str, object], seed: int) -> engine.Outcome:
    rounds = engine.run(from_config(config | {"seed": seed}), load_global_dataset("digits"))
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            return end.value


def without_provenance(result: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in result.items() if name not in PROVENANCE_FIELDS}


@pytest.mark.parametrize("engine", ["reference", "batched"])
def test_a_result_is_what_the_engine_found(engine, plain_loop):
    result, history = run_single_experiment(CONFIG | {"engine": engine}, 5, threads=2)
    outcome = reference(CONFIG, 5)
    assert result["plan"] == {"reference": "reference", "batched": "loop"}[engine]
    assert without_provenance(result) == {
        "outcome": "ok",
        "mean_test_acc": outcome.test_acc,
        "std_test_acc": 0.0,
        "mean_test_loss": outcome.test_loss,
        "std_test_loss": 0.0,
        "mean_val_acc": outcome.val_acc,
        "std_val_acc": 0.0,
        "mean_val_loss": outcome.val_loss,
        "std_val_loss": 0.0,
        "num_parameters": outcome.num_parameters,
        "best_epoch": outcome.best_epoch,
        "attack_success_rate": outcome.attack_success_rate,
        "poisoned_clients": outcome.poisoned_clients,
        "poisoned_samples": outcome.poisoned_samples,
        "nonfinite_clients": 0,
        "rounds_run": 3,
        "per_class_test_acc": list(outcome.per_class_test_acc or ()),
    }
    assert history == [vars(report) for report in outcome.history]
    assert len(history) == 3
    assert result["mean_test_acc"] > 0.2


def test_a_result_is_a_whole_message_and_says_where_it_came_from():
    result, history = run_single_experiment(CONFIG, 5)
    message = ResultData.model_validate_json(json.dumps(result | {"history": history, "worker": "w"}, allow_nan=False))
    assert set(result) | {"history", "worker"} == set(ResultData.model_fields)
    assert message.device == "cpu"
    assert message.torch_version == torch.__version__
    assert datetime.fromisoformat(message.finished_at or "").utcoffset() is not None
    assert message.wall_time_s is not None and message.wall_time_s > 0


def test_the_seed_is_the_argument_and_run_options_change_nothing():
    result, _ = run_single_experiment(CONFIG | {"seed": 4, "output_dir": "x", "project_name": "y", "device": "z"}, 5)
    assert without_provenance(result) == without_provenance(run_single_experiment(CONFIG, 5)[0])
    assert without_provenance(result) != without_provenance(run_single_experiment(CONFIG, 4)[0])


def test_every_round_is_told_and_may_end_the_experiment():
    seen: list[Progress] = []
    _, history = run_single_experiment(CONFIG, 5, on_round=seen.append)
    assert [(each.round, each.rounds) for each in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [(each.val_loss, each.val_acc) for each in seen] == [(each["val_loss"], each["val_acc"]) for each in history]

    def stop(progress: Progress) -> None:
        raise InterruptedError(f"after round {progress.round}")

    with pytest.raises(InterruptedError, match="after round 1"):
        run_single_experiment(CONFIG, 5, on_round=stop)


def test_what_is_not_finite_becomes_none_and_is_told_so():
    seen: list[Progress] = []
    config = CONFIG | {"model_type": "lr", "lr": 1e30, "max_grad_norm": None}
    result, history = run_single_experiment(config, 5, on_round=seen.append)
    assert result["outcome"] == "diverged"
    assert result["nonfinite_clients"] == 3
    assert result["num_parameters"] > 0
    assert history == [{"round": 1, "val_loss": None, "val_acc": None, "nonfinite_clients": 3}]
    assert seen == [Progress(1, 3, None, None)]


def test_torch_uses_one_thread_so_that_rows_do_not_depend_on_the_machine():
    torch.set_num_threads(2)
    torch.backends.cudnn.allow_tf32 = True
    run_single_experiment(CONFIG | {"global_rounds": 1}, 5)
    assert torch.get_num_threads() == 1
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(PartitionError, match="lower num_clients or min_client_size"):
        run_single_experiment(CONFIG | {"num_clients": 500}, 5)
    with pytest.raises(DataError, match="no_such_folder"):
        run_single_experiment(CONFIG | {"dataset": "parquet:no_such_folder"}, 5, data_dir=tmp_path)


def images(channels: int, side: int) -> ImageData:
    pictures, labels = torch.zeros(2, channels, side, side, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    return ImageData("made up", pictures, labels, pictures, labels, 10)


@pytest.mark.parametrize(
    ("model_type", "width", "depth", "data", "kind", "count"),
    [
        ("cnn", 1, 16, images(1, 28), ScalableCNN, 212),
        ("cnn", 4, 1, images(1, 28), ScalableCNN, 31_418),
        ("cnn", 64, 64, images(3, 32), ScalableCNN, 2_337_098),
        ("lr", 4, 4, images(1, 28), LogisticRegression, 3_282),
    ],
)
def test_create_model_makes_the_model_of_the_configuration(model_type, width, depth, data, kind, count):
    model = create_model({"model_type": model_type, "width_factor": width, "depth": depth, "output_dir": "x"}, data)
    assert isinstance(model, kind)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# ---- clients side by side


def test_a_client_trained_from_plain_values_has_the_same_bits():
    data = load_global_dataset("digits")
    jobs: list[engine.ClientJob] = []

    def keep(given):
        jobs.extend(given)
        return [engine.train_one_client(job) for job in given]

    next(engine.run(from_config(CONFIG | {"local_epochs": 2, "data_ordering": "bad_good"}), data, "cpu", keep))
    assert len(jobs) == 3
    for job in jobs:
        expected = engine.train_one_client(job)
        weights = train_client_worker(_job(job, 10))["weights"]
        assert weights.keys() == expected.keys()
        assert all(torch.equal(torch.from_numpy(weights[name]), expected[name]) for name in expected)


def test_processes_change_no_bit_and_leave_nothing_behind():
    alone, rounds_alone = run_single_experiment(REFERENCE, 5)
    told: list[int] = []
    together, rounds = run_single_experiment(
        REFERENCE | {"num_parallel_workers": 2},
        5,
        on_round=lambda _: told.append(len(multiprocessing.active_children())),
    )
    assert told == [2, 2, 2], "it did not run in two processes"
    assert without_provenance(together) == without_provenance(alone)
    assert rounds == rounds_alone
    assert multiprocessing.active_children() == []


# One client, so one process; a round of this takes minutes.
LONG_ROUND = {"model_type": "cnn", "width_factor": 64, "depth": 8, "num_clients": 1, "local_epochs": 1000}
LONG_ROUND |= {"engine": "reference"}
IMPORT_S = 4.0  # of CPU time, more than a process takes before it trains


def children_busy_for(pid: int, seconds: float) -> list[psutil.Process]:
    """The process that trains for `pid`, once it has used so much CPU time."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = [each for each in psutil.Process(pid).children() if "spawn_main" in " ".join(each.cmdline())]
        if children and all(sum(each.cpu_times()[:2]) > seconds for each in children):
            return children
        time.sleep(0.05)
    pytest.fail("no process began to train")


def test_processes_end_when_their_round_is_interrupted():
    """A worker that is asked to stop does not wait for the clients in training."""
    found: list[psutil.Process] = []

    def interrupt_once_it_trains() -> None:
        found.extend(children_busy_for(os.getpid(), IMPORT_S))
        os.kill(os.getpid(), signal.SIGUSR1)

    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=interrupt_once_it_trains)
    watcher.start()
    try:
        with pytest.raises(InterruptedError):
            run_single_experiment(LONG_ROUND | {"num_parallel_workers": 2}, 1)
    finally:
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(found) == 1
    assert multiprocessing.active_children() == []


PARENT = """
from fedsweep.worker import run_single_experiment
if __name__ == "__main__":
    run_single_experiment(%r | dict(num_parallel_workers=2), 1)
"""


def test_processes_end_when_the_worker_is_killed(tmp_path):
    """It could tell nobody."""
    (tmp_path / "parent.py").write_text(PARENT % LONG_ROUND)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"])
    try:
        children = children_busy_for(parent.pid, 0.3)
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
