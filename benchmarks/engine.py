"""The batched engine beside its peers: a plain PyTorch loop, the usual way, pfl-research, Flower, and `vmap`.

To repeat: `python benchmarks/engine.py` in the project's environment, on an otherwise idle machine; add
`--json benchmarks/results/engine-$(date +%F).json` to keep the numbers, `--workloads S1,S4 --peers P0,P3` for a part
of it, `--quick` to see in a few minutes whether everything runs. MNIST is looked for in `--data-dir`, else in the
folder that FEDSWEEP_DATA names, else in ../shared/data. The peers run in environments of their own, which are made on
first use (`--venvs`), with the versions that `benchmarks/peers/*.txt` pin. The CPU build of PyTorch is enough.

How it is fair: every side is a process of its own that reads the same file (images, labels, batches, weights to begin
with) and trains the same batches; nobody evaluates; start-up (imports, data, warm-up, tuning) is shown apart. Sides run
in turn (ours, P0, ours, P1, …), `--repeats` times. P0 to P2 may use one process with all cores or one process for each
core, whichever is faster in trials beforehand, which are reported. Slow peers train some of the experiments; their
time, as everyone's, is counted for each client-step. An experiment per hour is one of 20 rounds on all of MNIST.
What each peer is and leaves out, says the head of its script in `benchmarks/peers/`.

How it is valid: all sides train a round of the same experiments on a tenth of the images, in float64, by the same
programs (ours by the same plan, with fewer lanes where a vector holds fewer numbers). After it P0's global weights must
be ours within 1e-5 of the largest value of each tensor, in every experiment; if not, the script says INVALID and ends
with 1. After whole epochs, or in float32, nothing could be told: batch norm over nearly constant units multiplies
rounding errors, and after a float32 round of lr w4 d4 on all images the reference engine is as far from itself, begun
from weights that differ by 1e-7, as from anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import floor
import machine
import numpy as np
import scenarios
import venvs
from peers import workload as workloads
from peers.workload import Workload

from fedsweep.datasets import load_global_dataset

HERE = Path(__file__).resolve().parent
ROUNDS_OF_AN_EXPERIMENT = 20
TOLERANCE = 1e-5
LONGEST_RUN_S = 3600
OURS = "ours"
TIMED, COMPARED = "workload.npz", "short.npz"
Found = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """How a side uses the cores."""

    processes: int
    threads: int  # of each process

    def __str__(self) -> str:
        return f"{self.processes} process{'es' * (self.processes > 1)} x {self.threads}"


@dataclass(frozen=True)
class Side:
    """One of those compared."""

    script: Path
    title: str
    venv: str | None  # None: the project's own environment
    in_processes: tuple[bool, ...] = (False,)  # whether to try one process, a process for each core, or both
    most_experiments: int | None = None
    most_rounds: int | None = None

    def modes(self, cores: int) -> list[Mode]:
        """What to try."""
        return [Mode(cores, 1) if split else Mode(1, cores) for split in self.in_processes]


BOTH = (False, True)
PEERS = HERE / "peers"
SIDES: dict[str, Side] = {
    OURS: Side(PEERS / "ours.py", "fedsweep", None),
    "P0": Side(PEERS / "p0_loop.py", "plain loop", "torch", BOTH),
    "P1": Side(PEERS / "p1_dataloader.py", "DataLoader", "torch", BOTH, most_experiments=4, most_rounds=1),
    "P2": Side(PEERS / "p2_pfl.py", "pfl", "pfl", BOTH, most_experiments=4, most_rounds=2),
    "P3": Side(PEERS / "p3_flower.py", "Flower", "flower", (True,), most_experiments=2, most_rounds=2),
    "P4": Side(PEERS / "p4_vmap.py", "vmap", "torch", most_experiments=8, most_rounds=1),
}
VMAP_RUNS = ("S1", "S2", "S3", "S4")  # elsewhere activations or padding leave it nothing


def main() -> None:
    args = arguments()
    wanted = args.workloads.split(",")
    data = load_global_dataset("mnist", args.data_dir)
    peaks = floor.measure(args.cores)
    results: dict[str, Found] = {}
    valid = True
    for name in wanted:
        scenario = scenarios.SCENARIOS[name].quick() if args.quick else scenarios.SCENARIOS[name]
        rounds = args.rounds or scenario.rounds
        say(f"{name}: preparing")
        with tempfile.TemporaryDirectory(prefix="fedsweep-") as folder:
            workload = scenarios.export(name, scenario, data, rounds)
            workloads.save(workload, Path(folder) / TIMED)
            workloads.save(scenarios.export(name, scenario.short(), data, 1), Path(folder) / COMPARED)
            bench = Bench(workload, Path(folder), rounds, args)
            runs = bench.run(peers_for(name, scenario, args.peers))
            differences = bench.differences(runs)
        full = scenarios.full_client_steps(scenario, data) * ROUNDS_OF_AN_EXPERIMENT
        results[name] = summary(workload, scenario, runs, differences, full, peaks)
        print(table(name, scenario, results[name]), flush=True)
        valid = valid and differences.get("P0", 0.0) <= TOLERANCE
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = about(args) | {"peaks": asdict(peaks), "workloads": results, "valid": valid}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
        say(f"written to {args.json}")
    if not valid:
        sys.exit(f"INVALID: P0 and ours do not compute the same (more than {TOLERANCE:g} apart after a round)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = HERE.parent.parent / "shared" / "data"
    parser.add_argument("--data-dir", default=os.environ.get("FEDSWEEP_DATA") or (known if known.exists() else None))
    parser.add_argument("--workloads", default=",".join(scenarios.SCENARIOS), help="such as S1,S4")
    parser.add_argument("--peers", help="such as P0,P3; those with a required ratio, and P4, if left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, help="in one run; each workload has its own number if left out")
    parser.add_argument("--quick", action="store_true", help="a tenth of the images and few experiments")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--venvs", type=Path, default=venvs.default_folder(), help="where the peers' environments are")
    parser.add_argument("--ours", type=Path, default=SIDES[OURS].script, help="another script in place of ours")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser.parse_args()


def peers_for(name: str, scenario: scenarios.Scenario, asked: str | None) -> list[str]:
    """The peers that are run on a workload."""
    if asked is not None:
        return [peer for peer in asked.split(",") if peer]
    return [*scenario.required, *(["P4"] if name in VMAP_RUNS else [])]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was found of a side."""

    mode: Mode
    trials: dict[Mode, list[float]]  # microseconds a client-step; empty where there is but one mode
    runs: list[Found]


@dataclass(frozen=True)
class Bench:
    """All sides on one workload."""

    workload: Workload
    folder: Path
    rounds: int
    args: argparse.Namespace

    def run(self, peers: Sequence[str]) -> dict[str, Measured]:
        """Every side in turn, `--repeats` times, each in the mode that was better in a short trial."""
        measured = {name: self._tried(name) for name in (OURS, *peers)}
        for repeat in range(self.args.repeats):
            for name in turns(peers):
                found = self._once(name, measured[name].mode, self.rounds)
                measured[name].runs.append(found)
                self._say(f"{repeat + 1}/{self.args.repeats}", name, measured[name].mode, found)
        return measured

    def _tried(self, name: str) -> Measured:
        """The better mode of a side, by two experiments in each, two times in turn."""
        modes = SIDES[name].modes(self.args.cores)
        trials: dict[Mode, list[float]] = {mode: [] for mode in modes}
        if len(modes) > 1:
            for mode in modes * 2:
                found = self._once(name, mode, rounds=1, most_experiments=2)
                trials[mode].append(found["us_per_client_step"])
                self._say("trial", name, mode, found)
        return Measured(min(modes, key=lambda mode: min(trials[mode], default=0.0)), trials, [])

    def _say(self, when: str, name: str, mode: Mode, found: Found) -> None:
        say(
            f"{self.workload.name} {when:5} {name:4} {mode!s:15} {found['us_per_client_step']:10.1f} us a client-step,"
            f" {found['seconds']:7.2f} s (start-up {found['start_up_s']:.1f} s, {found['peak_mb']} MB)"
            f" {found['choices'] or ''}"
        )

    def _once(
        self, name: str, mode: Mode, rounds: int, most_experiments: int | None = None, compared: str | None = None
    ) -> Found:
        """One run: of the workload, or of the one that is compared, in the type `compared`."""
        side = SIDES[name]
        script = self.args.ours if name == OURS else side.script
        python = sys.executable if side.venv is None else venvs.python_of(side.venv, self.args.venvs)
        experiments = some_of(len(self.workload.members), most_experiments or side.most_experiments)
        options = {
            "rounds": min(rounds, side.most_rounds or rounds),
            "threads": mode.threads,
            "processes": mode.processes,
            "experiments": ",".join(map(str, experiments)),
            "started": time.time(),
        }
        if compared:
            options |= {"dtype": compared, "weights": self._weights(name)}
        command = [str(python), str(script), str(self.folder / (COMPARED if compared else TIMED))]
        command += [f"--{option}={value}" for option, value in options.items()]
        threads = str(mode.threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "PYTHONPATH": str(PEERS),  # for processes that a peer starts by itself
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST_RUN_S)
        if done.returncode != 0:
            sys.exit(f"{self.workload.name}: {name} ended with {done.returncode}\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def _weights(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def differences(self, measured: dict[str, Measured]) -> dict[str, float]:
        """How far the global weights of each peer are from ours after a short round in float64."""
        say(f"{self.workload.name}: comparing")
        for name, each in measured.items():
            self._once(name, each.mode, rounds=1, compared="float64")
        return {name: self._from_ours(name) for name in measured if name != OURS}

    def _from_ours(self, name: str) -> float:
        with np.load(self._weights(OURS)) as ours, np.load(self._weights(name)) as theirs:
            return difference(ours, theirs, self._comparable(name))

    def _comparable(self, name: str) -> set[str]:
        """The experiments in which a peer has the workload's aggregator."""
        members = enumerate(self.workload.members)
        return {str(index) for index, member in members if name != "P2" or member.aggregator == "fedavg"}


def turns(peers: Sequence[str]) -> Iterator[str]:
    """Ours before every peer that is fast enough for it to matter, and once before all others."""
    if not peers:
        yield OURS
    for peer in peers:
        if peer in ("P0", "P1") or peer == peers[0]:
            yield OURS
        yield peer


def some_of(count: int, most: int | None) -> list[int]:
    """So many experiments, evenly spaced, so that they differ in attack and aggregator."""
    if most is None or most >= count:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)})


def difference(ours: Any, theirs: Any, experiments: set[str]) -> float:
    """The largest difference of a tensor, relative to its largest value, of the tensors that a peer has.

    Counts (`num_batches_tracked`) are left out: they train nothing, and Flower averages them.
    """
    largest = 0.0
    for key in theirs.files:
        if key.split("/")[0] in experiments and ours[key].dtype.kind == "f":
            expected, found = ours[key].astype(np.float64), theirs[key].astype(np.float64)
            worst = np.abs(expected - found).max() / (np.abs(expected).max() or 1.0)
            largest = max(largest, worst if np.isfinite(worst) else np.inf)
    return float(largest)


# ---- reporting -------------------------------------------------------------------------------------------------------


def summary(
    workload: Workload,
    scenario: scenarios.Scenario,
    runs: dict[str, Measured],
    differences: dict[str, float],
    full_client_steps: float,
    peaks: floor.Peaks,
) -> Found:
    """What is printed and kept of a workload."""
    every = range(len(workload.members))
    rounds = len(workload.rounds[0])
    counted = floor.count(workload, every, rounds)
    least, streamed = floor.floor_seconds(counted, peaks)
    steps = workload.client_steps(every, rounds)
    sides = {name: side_summary(measured, full_client_steps) for name, measured in runs.items()}
    for name, side in sides.items():
        side["times_the_floor"] = side["us_per_client_step"]["median"] * 1e-6 * steps / least
        if name != OURS:
            side["ratio"] = side["us_per_client_step"]["median"] / sides[OURS]["us_per_client_step"]["median"]
            side["required"] = scenario.required.get(name)
            side["difference_in_float64"] = differences[name]
    return {
        "experiments": len(workload.members),
        "client_steps_of_a_whole_experiment": full_client_steps,
        "share_of_the_images": scenario.share,
        "floor": asdict(counted) | {"us_per_client_step": least / steps * 1e6, "streamed_us": streamed / steps * 1e6},
        "sides": sides,
    }


def side_summary(measured: Measured, full_client_steps: float) -> Found:
    """The runs of a side, and what the trials of its modes took."""
    runs = measured.runs
    times = [found["us_per_client_step"] for found in runs]
    return {
        "mode": str(measured.mode),
        "us_per_client_step": spread(times),
        "experiments_per_hour": 3600 / (statistics.median(times) * 1e-6 * full_client_steps),
        "start_up_s": spread([found["start_up_s"] for found in runs]),
        "peak_mb": max(found["peak_mb"] for found in runs),
        "us_per_client_step_in_trials": {str(mode): times for mode, times in measured.trials.items()},
        "one_run": {key: runs[0][key] for key in ("experiments", "rounds", "client_steps", "seconds")},
        "choices": runs[-1]["choices"],
        "versions": runs[0]["versions"],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "min": min(values), "max": max(values), "iqr": float(high - low)}


COLUMNS = (
    f"{'':4} {'':11} {'exp./hour':>10} {'us/client-step':>14} {'min … max (IQR)':>26} {'ours/it':>8}"
    f" {'asked':>6} {'':11} {'x floor':>8} {'start s':>8} {'MB':>6} {'float64':>10}  mode"
)


def table(name: str, scenario: scenarios.Scenario, found: Found) -> str:
    """A workload, one side a line."""
    lines = [
        f"\n{name}: {scenario.model_type} w{scenario.width} d{scenario.depth}, {found['experiments']} experiments,"
        f" {found['client_steps_of_a_whole_experiment']:.0f} client-steps in each; floor"
        f" {found['floor']['us_per_client_step']:.2f} us a client-step ({found['floor']['streamed_us']:.1f} if"
        " activations went through memory)",
        COLUMNS,
        *(line(side, each) for side, each in found["sides"].items()),
    ]
    return "\n".join(lines)


def line(name: str, side: Found) -> str:
    times = side["us_per_client_step"]
    around = f"{times['min']:.1f} … {times['max']:.1f} ({times['iqr']:.1f})"
    ratio, required = side.get("ratio"), side.get("required")
    reached = "" if not required else "reached" if ratio >= required else "NOT REACHED"
    scaled = " (some experiments)" if SIDES[name].most_experiments else ""
    return (
        f"{name:4} {SIDES[name].title:11} {side['experiments_per_hour']:10.1f} {times['median']:14.1f} {around:>26}"
        f" {f'{ratio:.2f}' if ratio else '':>8} {required or '':>6} {reached:11} {side['times_the_floor']:8.1f}"
        f" {side['start_up_s']['median']:8.1f} {side['peak_mb']:6}"
        f" {format(side['difference_in_float64'], '.1e') if ratio else '':>10}  {side['mode']}{scaled}"
    )


def about(args: argparse.Namespace) -> Found:
    """When, where and with what."""
    asked = {"cores": args.cores, "repeats": args.repeats, "quick": args.quick}
    return machine.about() | asked | {"rounds_of_an_experiment": ROUNDS_OF_AN_EXPERIMENT}


if __name__ == "__main__":
    main()
