"""Cost of an experiment against the size of its cohort and the number of its clients, and memory against its plan.

    python benchmarks/scaling.py --data-dir DIR --plot docs/images/scaling.png

Real MNIST, `lr` of width 4 and depth 4, batch size 128, experiments of one seed, evaluation off. Each point is a
process of its own, so that its peak of memory is its own; the median of three rounds is shown, after one that warms
up. Times are of a shared machine: read the shape of the curves, not the last digit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
CLIENTS = (10, 30, 100, 300, 1000)
ROUNDS = 3
FEW = 16  # experiments of a cohort while the clients grow


def measure(num_experiments: int, num_clients: int, data_dir: str) -> dict[str, Any]:
    """One point, in this process."""
    from fedsweep.datasets import load_global_dataset
    from fedsweep.fl.engine import Cohort
    from fedsweep.plan.experiment import Experiment
    from fedsweep.worker.device import prepare_torch
    from fedsweep.worker.plans import choose_trainer
    from fedsweep.worker.room import bytes_per_experiment, fixed_bytes

    prepare_torch()
    data = load_global_dataset("mnist", data_dir)
    experiments = [
        Experiment(
            dataset="mnist",
            model_type="lr",
            width_factor=4,
            depth=4,
            batch_size=128,
            num_clients=num_clients,
            partition="dirichlet_client",
            poison_ratio=(place + 1) / (num_experiments + 1),
        )
        for place in range(num_experiments)
    ]
    trainer = choose_trainer(experiments, data, threads=2)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    cohort = Cohort(data, trainer)
    for place, experiment in enumerate(experiments):
        cohort.join(str(place), experiment)
    cohort.run_round()
    seconds = [_timed(cohort.train_round) for _ in range(ROUNDS)]
    planned = fixed_bytes(trainer) + num_experiments * bytes_per_experiment(experiments[0], data, trainer)
    return {
        "experiments": num_experiments,
        "clients": num_clients,
        "plan": trainer.plan,
        "seconds_per_experiment": statistics.median(seconds) / num_experiments,
        "planned_mb": planned / 1e6,
        "taken_mb": (_resident("VmHWM") - before) / 1e6,
    }


def _resident(which: str) -> int:
    """Bytes in memory, now (VmRSS) or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_a_process(num_experiments: int, num_clients: int, data_dir: str) -> dict[str, Any]:
    """One point, in a process of its own."""
    command = [sys.executable, __file__, "--one", str(num_experiments), str(num_clients), "--data-dir", data_dir]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    print(
        f"{found['experiments']:4d} experiments, {found['clients']:4d} clients: "
        f"{1000 * found['seconds_per_experiment']:7.1f} ms an experiment and round, "
        f"{found['taken_mb']:6.0f} MB taken, {found['planned_mb']:6.0f} MB planned ({found['plan']})",
        file=sys.stderr,
    )
    return found


def draw(by_size: Sequence[dict[str, Any]], by_clients: Sequence[dict[str, Any]], path: Path) -> None:
    """Both curves, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, points, name in ((left, by_size, "experiments"), (right, by_clients, "clients")):
        axes.plot([p[name] for p in points], [1000 * p["seconds_per_experiment"] for p in points], "o-", color="C0")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([p[name] for p in points], [str(p[name]) for p in points], minor=False)
        axes.set_xticks([], minor=True)
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:g}")
        axes.grid(True, which="both", alpha=0.25)
        axes.set_ylabel("ms for an experiment's round")
    left.set_xlabel("experiments of one seed in the cohort (10 clients)")
    right.set_xlabel(f"clients ({FEW} experiments)")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="../shared/data", help="folder with the official MNIST files")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.data_dir)))
        return
    by_size = [in_a_process(size, 10, arguments.data_dir) for size in SIZES]
    by_clients = [in_a_process(FEW, clients, arguments.data_dir) for clients in CLIENTS]
    if arguments.plot:
        draw(by_size, by_clients, arguments.plot)


if __name__ == "__main__":
    main()
