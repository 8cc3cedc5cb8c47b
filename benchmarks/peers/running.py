"""What the scripts of all peers have in common: their command line, their processes, and how they report.

A script prints one line of JSON. Start-up (from the start of its process to the first timed step: imports, data,
warm-up, tuning) is apart from the seconds of training, which run from the first process's first step to the last's end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import workload as workloads
from workload import State, Workload


@dataclass(frozen=True)
class Request:
    """What a script is asked to do."""

    path: str
    rounds: int
    threads: int  # of each process
    processes: int
    experiments: tuple[int, ...]
    dtype: str  # of weights and activations; float32 but where two sides are compared
    weights: str | None  # where to put the global weights after the first round
    started: float  # time.time() when the process was started


@dataclass(frozen=True)
class Prepared:
    """A peer that is ready to train: its data loaded, itself warmed up."""

    train: Callable[[int, int], State]  # (experiment, rounds) to the global weights after the first round
    choices: Mapping[str, Any] = field(default_factory=dict)  # what it tuned itself to


def parse(argv: Sequence[str] | None = None) -> Request:
    """The request of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", metavar="WORKLOAD.npz")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="each trains experiments of its own")
    parser.add_argument("--experiments", default="", help="which, such as 0,4,8; all if left out")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--weights", help="npz to write the global weights after the first round to")
    parser.add_argument("--started", type=float, default=time.time(), help="when this process was started (time.time)")
    given = vars(parser.parse_args(argv))
    given["experiments"] = tuple(int(index) for index in given["experiments"].split(",") if index)
    return Request(**given)


def configure(request: Request) -> None:
    """Have PyTorch use the threads and the type that were asked for."""
    import torch

    torch.set_num_threads(request.threads)
    torch.set_default_dtype(getattr(torch, request.dtype))


def chosen(request: Request, workload: Workload) -> tuple[int, ...]:
    """The experiments to train."""
    return request.experiments or tuple(range(len(workload.members)))


def peak_mb() -> float:
    """The most memory that this process and the largest of its ended children held."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024


def report(
    request: Request,
    workload: Workload,
    *,
    seconds: float,
    start_up: float,
    peak: float,
    weights: Mapping[int, State],
    versions: Mapping[str, str],
    choices: Mapping[str, Any],
) -> None:
    """Write the weights, and print what was found."""
    experiments = chosen(request, workload)
    if request.weights:
        flat = {f"{index}/{name}": tensor for index, state in weights.items() for name, tensor in state.items()}
        np.savez(request.weights, **flat)
    steps = workload.client_steps(experiments, request.rounds)
    found = {
        "seconds": seconds,
        "client_steps": steps,
        "us_per_client_step": seconds / steps * 1e6,
        "start_up_s": start_up,
        "peak_mb": round(peak),
        "experiments": len(experiments),
        "rounds": request.rounds,
        "threads": request.threads,
        "processes": request.processes,
        "choices": dict(choices),
        "versions": {"python": platform.python_version(), **versions},
    }
    print(json.dumps(found), flush=True)


# ---- peers that train one experiment after another, in one process or several ----------------------------------------


Prepare = Callable[[Workload], Prepared]


def main(prepare: Prepare, versions: Callable[[], Mapping[str, str]]) -> None:
    """Run a peer, which `prepare` makes ready in each process."""
    request = parse()
    workload = workloads.load(request.path)
    experiments = chosen(request, workload)
    if request.processes == 1:
        configure(request)
        prepared = prepare(workload)
        begin, started = time.perf_counter(), time.time()
        weights = {index: prepared.train(index, request.rounds) for index in experiments}
        seconds, peak, choices = time.perf_counter() - begin, peak_mb(), prepared.choices
    else:
        seconds, started, peak, choices, weights = _in_processes(request, prepare, experiments)
    report(
        request,
        workload,
        seconds=seconds,
        start_up=started - request.started,
        peak=peak,
        weights=weights,
        versions=versions(),
        choices=choices,
    )


def _in_processes(
    request: Request, prepare: Prepare, experiments: tuple[int, ...]
) -> tuple[float, float, float, Mapping[str, Any], dict[int, State]]:
    """Processes of the same peer, each of which takes the next experiment when it has finished one."""
    context = multiprocessing.get_context("spawn")
    ready, next_one, answers = context.Barrier(request.processes), context.Value("i", 0), context.Queue()
    args = (request, prepare, experiments, ready, next_one, answers)
    # The name, because pfl takes a process of any other for a loader of data, in which it cannot train.
    workers = [context.Process(target=_worker, args=args, name="MainProcess") for _ in range(request.processes)]
    for worker in workers:
        worker.start()
    found = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    if any(answer is None for answer in found):
        sys.exit("a process of this peer failed; see above")
    begins, ends, starts, peaks, choices, weights = zip(*found, strict=True)
    together = {index: state for states in weights for index, state in states.items()}
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return max(ends) - min(begins), max(starts), sum(peaks) + own, choices[0], together


def _worker(request: Request, prepare, experiments, ready, next_one, answers) -> None:
    try:
        configure(request)
        prepared = prepare(workloads.load(request.path))
        ready.wait(timeout=600)
        begin, started = time.perf_counter(), time.time()
        weights = {}
        while (index := _take(next_one)) < len(experiments):
            weights[experiments[index]] = prepared.train(experiments[index], request.rounds)
        answers.put((begin, time.perf_counter(), started, peak_mb(), prepared.choices, weights))
    except BaseException:
        ready.abort()
        answers.put(None)
        raise


def _take(counter) -> int:
    with counter.get_lock():
        counter.value += 1
        return counter.value - 1


def here() -> Path:
    """The folder of these scripts."""
    return Path(__file__).resolve().parent
