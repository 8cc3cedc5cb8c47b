"""fedsweep's batched engine. All that the benchmark knows of it is in this file.

Start-up includes making the plan (timing the candidates, building kernels) and a warm-up round with one client of each
experiment. The engine draws its own batches, from the same streams that the workload's were drawn from.
"""

from __future__ import annotations

import time

import modules
import running
import torch
import workload as workloads
from workload import Workload

from fedsweep.fl.data import ImageData
from fedsweep.fl.engine import Cohort
from fedsweep.plan.experiment import Experiment


def make_trainer(experiments: list[Experiment], data: ImageData, threads: int):
    """What trains a cohort of these experiments."""
    from fedsweep.worker.plans import choose_trainer

    return choose_trainer(experiments, data, threads=threads)


def image_data(workload: Workload) -> ImageData:
    """The images of a workload. Nothing is tested here, so a few of them stand in for the test set."""
    images, labels = torch.from_numpy(workload.images), torch.from_numpy(workload.true_labels).long()
    return ImageData("mnist", images, labels, images[:100], labels[:100], workload.settings.num_classes)


def cohort_of(experiments: dict[str, Experiment], data: ImageData, trainer) -> Cohort:
    """A cohort before its first round."""
    cohort = Cohort(data, trainer)
    for name, experiment in experiments.items():
        cohort.join(name, experiment)
    return cohort


def main() -> None:
    request = running.parse()
    torch.set_num_threads(request.threads)
    workload = workloads.load(request.path)
    indices = running.chosen(request, workload)
    experiments = {str(index): Experiment(**workload.members[index].config) for index in indices}
    data = image_data(workload)
    begin = time.perf_counter()
    trainer = make_trainer(list(experiments.values()), data, request.threads)
    planning = time.perf_counter() - begin
    one_client = {"fraction_fit": 1 / workload.members[0].config["num_clients"]}
    warm_up = {name: experiment.model_copy(update=one_client) for name, experiment in experiments.items()}
    cohort_of(warm_up, data, trainer).train_round()
    cohort = cohort_of(experiments, data, trainer)

    begin, started = time.perf_counter(), time.time()
    weights = {}
    for number in range(request.rounds):
        cohort.train_round()
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
        choices={"plan": getattr(trainer, "plan", type(trainer).__name__), "planning_s": round(planning, 2)},
    )


if __name__ == "__main__":
    main()
