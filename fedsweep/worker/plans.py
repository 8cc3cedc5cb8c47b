"""Which trainer a cohort gets: the fastest on this machine, found by training a little with each, and remembered."""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from fedsweep import __version__
from fedsweep.datasets.download import cache_dir as default_cache_dir
from fedsweep.files import read_word
from fedsweep.fl import candidates as makers
from fedsweep.fl.data import ImageData
from fedsweep.fl.lanes import ModelShape, Trainer
from fedsweep.plan.cohort import sharing_key
from fedsweep.plan.experiment import Experiment
from fedsweep.worker import kernels
from fedsweep.worker.device import device_name
from fedsweep.worker.timing import Piece, affordable_piece, timed, work_through

log = logging.getLogger(__name__)

FILE = "plans.json"
Candidates = dict[str, Callable[[], Trainer]]

BUCKETS = (1, 2, 4, 8, 16)  # experiments that share their images; more are like the last
PIECE_S = 0.1  # that the plain loop takes for what is timed
FINAL_S = 0.4  # the same of the first of the finalists, with tiles of one lane
CHOICE_S = 2.0
SAMPLES = 3
CLOSE = 1.2  # times as long
HALF_AGAIN = 1.5  # times as long
HOPELESS = 3.0  # times slower than the best: not timed again
PLAIN = "loop"


def choose_trainer(
    experiments: Sequence[Experiment],
    data: ImageData,
    threads: int = 1,
    *,
    cache_dir: Path | None = None,
    prefer: Collection[str] = (),
) -> Trainer:
    """The fastest trainer for these experiments.

    The candidates are timed on a few steps, once for each shape, batch size, number of experiments that share images,
    device, number of threads and version; the choice is kept in `plans.json`. The plain loop is one of them. A
    candidate that raises is left out with a line in the log. The piece of work that all are timed with is small, since
    the loop has to do it too; those that compute the same as the fastest and are close to it are timed again with more.

    Args:
        experiments: of one cohort.
        data: on the device to train on.
        threads: that may train at the same time, on a CPU.
        cache_dir: where the choices are kept; the user's cache folder if not given.
        prefer: the arithmetic (`candidates.arithmetic`) under which some of the experiments began, the most common
            first. Only under the same can they go on, so the candidates are those of the first that there is.
    """
    example, lanes = experiments[0], sharing(experiments)
    library = None if data.train_images.is_cuda else kernels.load_kernels()
    possible = makers.candidates(example, data, threads, lanes, library)
    for kind in prefer:
        if alike := _of_kind(kind, possible) or _of_kind(kind, _for_any_lanes(example, data, threads, library)):
            possible = alike
            break
    if len(possible) == 1:
        return next(iter(possible.values()))()
    choices = Choices((cache_dir or default_cache_dir()) / FILE)
    key = _key(example, data, threads, lanes)
    known = choices.plan(key)
    if known in possible and (trainer := _made(known, possible)) is not None:
        return trainer
    made = {plan: trainer for plan in possible if (trainer := _made(plan, possible)) is not None}
    seconds = time_trainers(made, example, data, threads, lanes)
    if not seconds:
        return made.get(PLAIN) or possible[PLAIN]()  # what is wrong shows in training, each experiment for itself
    best = fastest(seconds)
    if len(finalists := {plan: made[plan] for plan in alike_and_close(seconds, best)}) > 1:
        seconds |= (again := time_trainers(finalists, example, data, threads, lanes, final=True))
        best = fastest(again) if again else best
    choices.remember(key, best, seconds)
    log.info("%s, %d sharing images: %s is the fastest of %d plans", example.model_type, lanes, best, len(seconds))
    return made[best]


def _of_kind(kind: str, possible: Candidates) -> Candidates:
    return {plan: make for plan, make in possible.items() if makers.arithmetic(plan) == kind}


def _for_any_lanes(example: Experiment, data: ImageData, threads: int, library: ctypes.CDLL | None) -> Candidates:
    """Also what is not worth trying for as few experiments as are left of a cohort."""
    found: Candidates = {}
    for lanes in BUCKETS:
        found |= makers.candidates(example, data, threads, lanes, library)
    return found


def fastest(seconds: Mapping[str, float]) -> str:
    """The plan that took the least time; the compiled kernels also where the loop is faster by less than `CLOSE`.

    Their bits differ. Where both take about as long, the noise of a timing must not decide which bits a row has.
    """
    best = min(seconds, key=lambda plan: seconds[plan])
    kernels_only = {plan: each for plan, each in seconds.items() if makers.arithmetic(plan) == makers.NATIVE}
    if best == PLAIN and kernels_only:
        alternative = min(kernels_only, key=lambda plan: kernels_only[plan])
        return alternative if seconds[alternative] < CLOSE * seconds[best] else best
    return best


def alike_and_close(seconds: Mapping[str, float], best: str) -> list[str]:
    """The plans that compute the same bits as the best and are so near to it that a longer look has to decide."""
    kind = makers.arithmetic(best)
    return [
        plan for plan, each in seconds.items() if makers.arithmetic(plan) == kind and each < HALF_AGAIN * seconds[best]
    ]


def sharing(experiments: Sequence[Experiment]) -> int:
    """How many experiments see the same images, for the most part: one of `BUCKETS`, rounded down."""
    groups = Counter(map(sharing_key, experiments)).values()
    typical = sum(size * size for size in groups) / sum(groups)  # the size of the group of a typical experiment
    return max(bucket for bucket in BUCKETS if bucket <= typical)


def _made(plan: str, possible: Mapping[str, Any]) -> Trainer | None:
    try:
        trainer: Trainer = possible[plan]()
    except Exception as error:
        log.warning("the plan %s is left out: %s", plan, error)
        return None
    return trainer


def _key(example: Experiment, data: ImageData, threads: int, lanes: int) -> str:
    """What decides which trainer is the fastest."""
    device = device_name(str(data.train_images.device))
    versions = (__version__, torch.__version__, kernels.kernel_version())
    shape = astuple(ModelShape.of(example, data))
    return json.dumps([shape, example.batch_size, lanes, device, threads, versions])


# ---- timing


def time_trainers(
    trainers: Mapping[str, Trainer],
    example: Experiment,
    data: ImageData,
    threads: int,
    lanes: int,
    *,
    final: bool = False,
) -> dict[str, float]:
    """Seconds of each trainer for the same piece of a round, but of those that raise or that no time was left for.

    The loop goes first, and the others in their order. One that is far behind after its first time is not timed again.
    """
    seconds: dict[str, float] = {}
    deadline = time.monotonic() + CHOICE_S
    order = sorted(trainers, key=lambda plan: plan != PLAIN)
    try:
        piece = affordable_piece(
            trainers[order[0]],
            example,
            data,
            lanes=lanes,
            threads=threads,
            seconds=FINAL_S if final else PIECE_S,
            many_clients=final,
        )
    except Exception as error:
        log.warning("no plan could be timed: %s", error)
        return {}
    for plan in order:
        if seconds and time.monotonic() > deadline:
            log.debug("no time was left to try %s", plan)
            continue
        try:
            seconds[plan] = _time_one(trainers[plan], piece, data, min(seconds.values(), default=None))
        except Exception as error:
            log.warning("the plan %s is left out: %s", plan, error)
    return seconds


def _time_one(trainer: Trainer, piece: Piece, data: ImageData, best: float | None) -> float:
    def once() -> float:
        return timed(lambda: work_through(trainer, piece), data)

    once()  # what runs for the first time is slow
    samples = [once()]
    while len(samples) < SAMPLES and (best is None or samples[0] <= HOPELESS * best):
        samples.append(once())
    return statistics.median(samples)


# ---- remembering


class Choices:
    """The file with what was chosen, for all processes of this user. One that cannot be read counts as empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def plan(self, key: str) -> str | None:
        """The plan that was chosen; None where none was."""
        entry = self._read().get(key)
        plan = entry.get("plan") if isinstance(entry, dict) else None
        return plan if isinstance(plan, str) else None

    def remember(self, key: str, plan: str, seconds: Mapping[str, float]) -> None:
        """Keep a choice, with the times that decided it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._write({**self._read(), key: {"plan": plan, "seconds": dict(seconds)}})
        except OSError as error:
            log.warning("the choice of a plan cannot be kept in %s: %s", self.path, error)

    def _read(self) -> dict[str, Any]:
        return read_word(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let nobody else change the file meanwhile."""
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, content: Mapping[str, Any]) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=f"{FILE}-", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "w") as stream:
                json.dump(content, stream, indent=1)
            os.replace(temporary, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
