"""One experiment from its configuration to its result."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsweep.datasets import load_global_dataset
from fedsweep.fl.data import ImageData
from fedsweep.fl.engine import Cohort
from fedsweep.fl.outcome import Outcome, RoundReport
from fedsweep.fl.reference import (
    ClientDataloader,
    ClientJob,
    TrainClients,
    initial_model,
    run,
    train_client,
)
from fedsweep.plan.experiment import Experiment, from_config
from fedsweep.worker.device import prepare_torch
from fedsweep.worker.plans import choose_trainer
from fedsweep.worker.result import Progress, records, result_of

REFERENCE_PLAN = "reference"


def create_model(config: Mapping[str, Any], data: ImageData) -> nn.Module:
    """The global model of an experiment before its first round, a CNN or (`model_type: lr`) an MLP, on the CPU."""
    return initial_model(from_config(config), data)


def run_single_experiment(
    config: Mapping[str, Any],
    seed: int,
    data: ImageData | None = None,
    device: str = "cpu",
    *,
    data_dir: str | Path | None = None,
    on_round: Callable[[Progress], None] | None = None,
    threads: int = 1,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run an experiment.

    Args:
        config: every parameter, flat, with or without run options. `engine` says which engine runs it: `batched`
            (the default) or `reference`. For the latter, on a CPU, `num_parallel_workers` above 1 trains the clients of
            a round in that many processes; the result is the same bit for bit.
        seed: replaces `seed` in the config.
        data: the data set; loaded by its name if not given.
        device: a torch device.
        data_dir: folder with the official files.
        on_round: told after every round; what it raises ends the experiment.
        threads: that the batched engine trains in, on a CPU; they change no bit.

    Returns:
        The result as it is submitted, without the history: metrics that are not finite are None, as all are where the
        experiment diverged. And the history: for each round `round`, `val_loss`, `val_acc`, `nonfinite_clients`.

    Raises:
        DataError: the data set is missing or damaged.
        PartitionError: the samples cannot be divided so.
    """
    prepare_torch()
    experiment = from_config({**config, "seed": seed})
    if data is None:
        data = load_global_dataset(experiment.dataset, data_dir)
    started_at = time.monotonic()
    if config.get("engine", "batched") == "reference":
        num_processes = int(config.get("num_parallel_workers", 1)) if device == "cpu" else 1
        with _client_trainer(num_processes, data) as train_clients:
            outcome = _drain(run(experiment, data, device, train_clients), experiment.global_rounds, on_round)
        plan = REFERENCE_PLAN
    else:
        data = data.to(device)
        trainer = choose_trainer([experiment], data, threads)
        outcome, plan = _run_batched(experiment, Cohort(data, trainer), on_round), trainer.plan
    result = result_of(outcome, device=device, plan=plan, seconds=time.monotonic() - started_at)
    return result, records(outcome.history)


def _run_batched(experiment: Experiment, cohort: Cohort, on_round: Callable[[Progress], None] | None) -> Outcome:
    cohort.join("", experiment)
    while True:
        (end,) = cohort.run_round()
        if end.error is not None:
            raise end.error
        if end.report is not None and on_round is not None:
            on_round(Progress.after(end.report, experiment.global_rounds))
        if end.outcome is not None:
            return end.outcome


def _drain(
    rounds: Generator[RoundReport, None, Outcome], total: int, on_round: Callable[[Progress], None] | None
) -> Outcome:
    while True:
        try:
            report = next(rounds)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        if on_round is not None:
            on_round(Progress.after(report, total))


# ---- the clients of a round, side by side


def train_client_worker(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train one client. Jobs and results are plain values and numpy arrays, so that any process can do it.

    Args:
        job: `config` (every parameter), `num_classes`, `weights` (the global model's, by name), `images`
            (uint8 [n, C, S, S]) and `labels` (int64 [n]) of the client, and `epochs`: for each local epoch the order
            in which it sees them (int64 [n]).

    Returns:
        `weights`: the client's, by name.
    """
    images, labels = torch.from_numpy(job["images"]), torch.from_numpy(job["labels"])
    own = ImageData("client", images, labels, images[:0], labels[:0], job["num_classes"])
    experiment = from_config(job["config"])
    model = create_model(job["config"], own)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in job["weights"].items()})
    epochs = [torch.from_numpy(order) for order in job["epochs"]]
    train_client(model, ClientDataloader(images, labels, epochs, experiment.batch_size), experiment)
    return {"weights": _arrays(model)}


def _arrays(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _job(job: ClientJob, num_classes: int) -> dict[str, Any]:
    """A client's training as plain values."""
    return {
        "config": job.experiment.model_dump(),
        "num_classes": num_classes,
        "weights": _arrays(job.model),
        "images": job.loader.images.numpy(),
        "labels": job.loader.labels.numpy(),
        "epochs": [order.numpy() for order in job.loader.epochs],
    }


@contextmanager
def _client_trainer(num_processes: int, data: ImageData) -> Iterator[TrainClients | None]:
    """What trains the clients of a round side by side; None for one after another, in this process."""
    if num_processes == 1:
        yield None
        return
    others = set(multiprocessing.active_children())
    # Forking a process that has threads (heartbeats, torch) can dead-lock the child; spawning cannot.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin_client_process) as pool:

        def train(jobs: Sequence[ClientJob]) -> Iterable[Mapping[str, Tensor]]:
            trained = pool.map(train_client_worker, [_job(job, data.num_classes) for job in jobs])
            return [{name: torch.from_numpy(array) for name, array in each["weights"].items()} for each in trained]

        try:
            yield train
        except BaseException:
            # Leaving the pool waits for the clients in training, which may take longer than a worker has to stop.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise


def _begin_client_process() -> None:
    prepare_torch()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the worker sees to its processes
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()


def _end_with_parent() -> None:
    """A process of a pool waits for jobs for ever, also when the worker was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
