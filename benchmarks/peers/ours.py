"""fedsweep's batched engine. All that the benchmark knows of it is in this file.

Start-up includes making the plan (timing the candidates, building kernels) and a warm-up round with one client of each
experiment. The engine draws its own batches, from the same streams that the workload's were drawn from.
"""

from __future__ import annotations

import time
from pathlib import Path

import modules
import running
import torch
import workload as workloads
from workload import Workload

from fedsweep.fl.candidates import candidates
from fedsweep.fl.data import ImageData
from fedsweep.fl.engine import Cohort
from fedsweep.fl.lanes import Trainer
from fedsweep.fl.loop import LoopTrainer
from fedsweep.plan.experiment import Experiment
from fedsweep.worker.device import prepare_torch
from fedsweep.worker.kernels import load_kernels
from fedsweep.worker.plans import choose_trainer, sharing


def make_trainer(experiments: list[Experiment], data: ImageData, request: running.Request) -> Trainer:
    """What trains a cohort of these experiments: chosen on this machine now.

    For float64 the same plan; or, where vectors hold too few of those for its lanes, that with the most.
    """
    trainer = choose_trainer(experiments, data, threads=request.threads, cache_dir=Path(request.path).parent)
    if request.dtype == "float32":
        return trainer
    if trainer.plan == "loop":
        return LoopTrainer(experiments[0], data, request.threads, dtype=torch.float64)
    library = load_kernels(torch.float64)
    possible = candidates(experiments[0], data, request.threads, sharing(experiments), library)
    return possible.get(trainer.plan, next(iter(possible.values())))()


def image_data(workload: Workload) -> ImageData:
    """The images of a workload. Nothing is tested here, so a few of them stand in for the test set."""
    images, labels = torch.from_numpy(workload.images), torch.from_numpy(workload.true_labels).long()
    return ImageData("mnist", images, labels, images[:100], labels[:100], workload.settings.num_classes)


def cohort_of(experiments: dict[str, Experiment], data: ImageData, trainer: Trainer, dtype: torch.dtype) -> Cohort:
    """A cohort before its first round."""
    cohort = Cohort(data, trainer, dtype)
    for name, experiment in experiments.items():
        cohort.join(name, experiment)
    return cohort


def train_round(cohort: Cohort) -> None:
    """One round of every experiment, which has to go well."""
    if failed := [str(lost) for _, lost in cohort.train_round() if lost != 0]:
        raise RuntimeError(f"clients were lost: {failed[0]}")


def main() -> None:
    request = running.parse()
    prepare_torch()
    workload = workloads.load(request.path)
    indices = running.chosen(request, workload)
    experiments = {str(index): Experiment(**workload.members[index].config) for index in indices}
    data = image_data(workload)
    begin = time.perf_counter()
    trainer = make_trainer(list(experiments.values()), data, request)
    planning = time.perf_counter() - begin
    one_client = {"fraction_fit": 1 / workload.members[0].config["num_clients"]}
    warm_up = {name: experiment.model_copy(update=one_client) for name, experiment in experiments.items()}
    dtype = getattr(torch, request.dtype)
    train_round(cohort_of(warm_up, data, trainer, dtype))
    cohort = cohort_of(experiments, data, trainer, dtype)

    begin, started = time.perf_counter(), time.time()
    weights = {}
    for number in range(request.rounds):
        train_round(cohort)
        if number == 0:
            weights = {index: modules.arrays(cohort.weights(str(index))) for index in indices}
    seconds = time.perf_counter() - begin
    running.report(
        request,
        workload,
        seconds=seconds,
        start_up=started - request.started,
        peak=running.peak_mb(),
        weights=weights,
        versions=modules.versions(),
        choices={"plan": trainer.plan, "planning_s": round(planning, 2)},
    )


if __name__ == "__main__":
    main()
