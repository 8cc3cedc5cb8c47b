"""One experiment from its configuration to its result."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsweep import __version__
from fedsweep.datasets import load_global_dataset
from fedsweep.fl.data import ImageData
from fedsweep.fl.reference import ClientJob, Outcome, RoundReport, initial_model, run, train_one_client
from fedsweep.plan.experiment import Experiment, from_config


@dataclass(frozen=True)
class Progress:
    """How far an experiment is."""

    round: int
    rounds: int
    val_loss: float | None
    val_acc: float | None


def prepare_torch() -> None:
    """Settings under which rows repeat: one thread on the CPU, since the order of a sum depends on their number."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def create_model(config: Mapping[str, Any], data: ImageData) -> nn.Module:
    """The global model of an experiment before its first round, on the CPU."""
    return initial_model(from_config(config), data)


def train_client_worker(job: Mapping[str, Any]) -> dict[str, Tensor]:
    """Train one client, in whatever process this runs.

    Args:
        job: `experiment`, `model` (the global one; not changed) and `loader` (the client's batches).

    Returns:
        The client's weights.
    """
    if multiprocessing.parent_process() is not None:
        prepare_torch()
    return train_one_client(ClientJob(**job))


def run_single_experiment(
    config: Mapping[str, Any],
    seed: int,
    *,
    data: ImageData | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
    on_round: Callable[[Progress], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run an experiment.

    Args:
        config: every parameter, flat.
        seed: replaces `seed` in the config.
        data: the data set, where it is loaded already.
        data_dir: folder with the official files.
        device: a torch device.
        on_round: told after every round; what it raises ends the experiment.

    Returns:
        The result as it is submitted (without the history), and the history: for each round its number, validation
        loss and accuracy, and the clients left out.
    """
    experiment = from_config({**config, "seed": seed})
    started_at = time.monotonic()
    if data is None:
        data = load_global_dataset(experiment.dataset, data_dir)
    with _client_trainer(int(config.get("num_parallel_workers", 1)), device) as train_clients:
        rounds = run(experiment, data, device, **train_clients)
        outcome = _drain(rounds, experiment, on_round)
    return _result(outcome, device, time.monotonic() - started_at), [_record(report) for report in outcome.history]


def _drain(
    rounds: Generator[RoundReport, None, Outcome], experiment: Experiment, on_round: Callable[[Progress], None] | None
) -> Outcome:
    while True:
        try:
            report = next(rounds)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        if on_round is not None:
            total = experiment.global_rounds
            on_round(Progress(report.round, total, _finite(report.val_loss), _finite(report.val_acc)))


@contextmanager
def _client_trainer(num_processes: int, device: str) -> Iterator[dict[str, Any]]:
    """How the clients of a round are trained: one after another, or, on a CPU, in several processes."""
    if num_processes <= 1 or device != "cpu":
        yield {}
        return
    # Forking a process that has threads (heartbeats, torch) can dead-lock the child; spawning cannot.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:

        def train(jobs: Iterable[ClientJob]) -> Iterable[Mapping[str, Tensor]]:
            return pool.map(train_client_worker, [vars(job) for job in jobs])

        yield {"train_clients": train}


def _result(outcome: Outcome, device: str, seconds: float) -> dict[str, Any]:
    std = 0.0 if outcome.outcome == "ok" else None  # a row is one seed
    return {
        "outcome": outcome.outcome,
        "mean_test_acc": _finite(outcome.test_acc),
        "std_test_acc": std,
        "mean_test_loss": _finite(outcome.test_loss),
        "std_test_loss": std,
        "mean_val_acc": _finite(outcome.val_acc),
        "std_val_acc": std,
        "mean_val_loss": _finite(outcome.val_loss),
        "std_val_loss": std,
        "num_parameters": outcome.num_parameters,
        "best_epoch": outcome.best_epoch,
        "attack_success_rate": outcome.attack_success_rate,
        "poisoned_clients": outcome.poisoned_clients,
        "poisoned_samples": outcome.poisoned_samples,
        "nonfinite_clients": outcome.nonfinite_clients,
        "rounds_run": outcome.rounds_run,
        "per_class_test_acc": None if outcome.per_class_test_acc is None else list(outcome.per_class_test_acc),
        "wall_time_s": round(seconds, 3),
        "device": device_name(device),
        "fedsweep_version": __version__,
        "torch_version": torch.__version__,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _record(report: RoundReport) -> dict[str, Any]:
    return {
        "round": report.round,
        "val_loss": _finite(report.val_loss),
        "val_acc": _finite(report.val_acc),
        "nonfinite_clients": report.nonfinite_clients,
    }


def _finite(value: float | None) -> float | None:
    """The value, or None where it is not a finite number, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def device_name(device: str) -> str:
    """What the row says about where it was computed."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
