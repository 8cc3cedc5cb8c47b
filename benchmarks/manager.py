"""The manager under load, beside task queues that one could take instead: RQ and Celery on Redis.

To repeat: `python benchmarks/manager.py` in the project's environment, on an otherwise idle machine (about a quarter
of an hour); add `--json benchmarks/results/manager-$(date +%F).json` to keep the numbers, `--parts load` or `--parts
queues` for half of it, `--quick` to see in two minutes whether everything runs (with 10,000 tasks and 200 workers, so
its verdicts say nothing). The queues need `redis-server` (Debian: `apt-get install redis-server`) and are left out
where there is none; RQ and Celery are installed into environments of their own on first use (`--venvs`), in the
versions that `benchmarks/peers/rq.txt` and `celery.txt` pin. `--tls` has the load come over TLS, as from elsewhere.

What is measured: the manager as it is started by its command line, with its token, and simulated workers in another
process, each with a connection that it keeps open, one request at a time on it, as real workers do. A worker asks for a
task, says twice that it lives, and brings a result as long as a real one of 20 rounds (2 % fail, 2 % are given back),
so that half of all requests change the ledger. Those are answered after the commit (`synchronous=FULL`) and the sync of
SQLite's log; how long a sync takes on this disk is measured, too. An onlooker asks for the status every second.
Requests come on a fixed schedule, whether answers come or not, and their times run from when they were due: what waits
behind a pause is counted as waiting. `--work-dir` names the disk.

Exit status 0, also where something that is required was MISSED: look at the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import venvs

sys.path.insert(0, str(Path(__file__).resolve().parent / "load"))
import queues
from figures import Requirement, latencies, spread
from served import ServingManager, fill, swarm, write_sweep

HERE = Path(__file__).resolve().parent
EARLY, LATE = 0.01, 0.9  # shares of the tasks that are done
CALM = 150.0  # requests a second
OFFERED = 1100.0  # requests a second, of which 1,000 are asked
SYNCS = 300

Found = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    tasks: int = 100_000
    workers: int = 1000
    repeats: int = 3
    calm_s: float = 20.0  # of one repeat
    busy_s: float = 15.0
    tiny_tasks: int = 1000
    enqueued: float = 1.0  # share of the tasks that are enqueued


QUICK = Size(tasks=10_000, workers=200, repeats=1, calm_s=4.0, busy_s=4.0, tiny_tasks=1000, enqueued=0.02)
PARTS = ("load", "queues")


def main() -> None:
    args = arguments()
    size = QUICK if args.quick else Size()
    found: Found = machine.about() | {"quick": args.quick, "tls": args.tls, "size": size.__dict__}
    tables = []
    with scratch(args.work_dir) as folder:
        found["sync_ms"] = sync_times(folder)
        if "load" in args.parts:
            found["load"] = load(folder, size, tls=args.tls)
        if "queues" in args.parts:
            found["queues"] = compare(folder, size, args.processes, args.venvs)
    requirements = judge(found)
    found["requirements"] = [{**each.__dict__, "is_reached": each.is_reached} for each in requirements]
    tables += [required_table(requirements, found["sync_ms"])]
    tables += [latency_table(found["load"])] if "load" in found else []
    tables += [queue_table(found["queues"])] if "queues" in found else []
    print("\n\n".join(tables))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n")
        say(f"written to {args.json}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=parts, default=PARTS, help="load, queues, or both (load,queues)")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything: only whether it runs")
    parser.add_argument("--tls", action="store_true", help="the load with TLS, as between machines")
    parser.add_argument("--processes", type=int, default=8, help="workers of the comparison with queues")
    parser.add_argument(
        "--work-dir", type=Path, help="folder on the disk to measure; one in the current folder if left out"
    )
    parser.add_argument("--venvs", type=Path, default=venvs.default_folder(), help="where the peers' environments are")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser.parse_args()


def parts(text: str) -> tuple[str, ...]:
    """The parts that a text names."""
    named = tuple(text.split(","))
    if unknown := [name for name in named if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; expected load, queues or load,queues")
    return named


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A folder for sweeps, on a real disk: the usual place for temporary files may lie in memory."""
    with tempfile.TemporaryDirectory(prefix="fedsweep-load-", dir=parent or Path.cwd()) as folder:
        yield Path(folder)


def sync_times(folder: Path) -> Found:
    """How long this disk takes to keep 4 kB, which is the least that an answer costs."""
    times = []
    descriptor = os.open(folder / "sync", os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(SYNCS):
            os.write(descriptor, bytes(4096))
            began = time.perf_counter()
            os.fdatasync(descriptor)
            times.append(time.perf_counter() - began)
    finally:
        os.close(descriptor)
    return latencies(times)


# ---- load ------------------------------------------------------------------------------------------------------------


def load(folder: Path, size: Size, *, tls: bool = False) -> Found:
    """The manager under load, with few and with most tasks done, in turn."""
    early, late = folder / "early", folder / "late"
    found: Found = store(folder, early, size)
    say(f"filling: {EARLY:.0%} and {LATE:.0%} of the tasks done …")
    fill(early, round(size.tasks * EARLY))
    shutil.copytree(early, late)
    fill(late, round(size.tasks * LATE))
    with ServingManager(early, tls=tls) as few, ServingManager(late, tls=tls) as most:
        found["start_s"] = {"early": few.start_s, "late": most.start_s}
        say(f"started with {EARLY:.0%} done in {few.start_s:.1f} s, with {LATE:.0%} in {most.start_s:.1f} s")
        found["at_once"] = repeated(size, "all at once", lambda: swarm(few, "at-once", workers=size.workers))
        calm = {"workers": size.workers, "rate": CALM, "seconds": size.calm_s}
        found["calm_early"], found["calm_late"] = [], []
        for repeat in range(size.repeats):
            for name, manager in (("calm_early", few), ("calm_late", most)):
                found[name].append(told(f"{name} {repeat + 1}", swarm(manager, "open", seed=repeat, **calm)))
        busy = {"workers": size.workers, "rate": OFFERED, "seconds": size.busy_s}
        found["busy"] = repeated(size, "busy", lambda: swarm(few, "open", seed=100, **busy))
        found["most"] = told("as much as it can", swarm(few, "closed", workers=size.workers, seconds=size.busy_s))
        found["peak_mb"] = {"early": few.peak_mb(), "late": most.peak_mb()}
    return found


def store(folder: Path, kept: Path, size: Size) -> Found:
    """From the command to the manager that listens, with every task stored; the last state is kept."""
    times, peaks = [], []
    for repeat in range(size.repeats):
        place = kept if repeat == size.repeats - 1 else folder / f"stored-{repeat}"
        write_sweep(place, size.tasks)
        with ServingManager(place) as manager:
            times.append(manager.start_s)
            peaks.append(manager.peak_mb())
            say(f"{size.tasks:,} tasks expanded, de-duplicated and stored in {times[-1]:.1f} s, {peaks[-1]:.0f} MB")
        if place != kept:
            shutil.rmtree(place)
    return {"store_s": times, "store_peak_mb": peaks}


def repeated(size: Size, name: str, once: Callable[[], Found]) -> list[Found]:
    return [told(f"{name} {repeat + 1}", once()) for repeat in range(size.repeats)]


def told(name: str, run: Found) -> Found:
    every = run["all"]
    trouble = f", refused {run['refused']}, lost {run['lost']}" if run["refused"] or run["lost"] else ""
    say(
        f"{name:20} {run['answered_per_s']:7.0f}/s, p50 {every['p50_ms']:.1f}, p99 {every['p99_ms']:.1f}, p99.9 "
        f"{every['p99.9_ms']:.1f} ms; manager {run['manager_rss_mb']:.0f} MB, {run['manager_open_files']} files, "
        f"{run['manager_cpu_us_per_request']:.0f} us a request{trouble}"
    )
    return run


# ---- queues ----------------------------------------------------------------------------------------------------------


def compare(folder: Path, size: Size, processes: int, venv_folder: Path) -> Found:
    """Tiny tasks end to end: ours and the peers, in turn."""
    found: Found = {"processes": processes, "tasks": size.tiny_tasks, "ours": [], "peers": {}, "enqueue": {}}
    peers = queues.ALL if queues.is_possible() else ()
    if peers:
        found["redis"] = queues.redis_version()
    else:
        say("no redis-server on PATH: RQ and Celery are left out (Debian: apt-get install redis-server)")
    sides = [(peer, mode) for mode in queues.REDIS for peer in peers]
    for repeat in range(size.repeats):
        ours = queues.ours_end_to_end(size.tiny_tasks, processes, folder / f"ours-{repeat}")
        found["ours"].append(ours)
        say(f"tiny tasks {repeat + 1}: fedsweep {ours['per_s']:.0f}/s")
        for peer, mode in sides:
            place = folder / f"redis-{repeat}-{len(found['peers'])}-{peer.venv}-{time.monotonic_ns()}"
            run = queues.end_to_end(peer, mode, size.tiny_tasks, processes, place, venv_folder)
            found["peers"].setdefault(f"{peer.title}, {mode}", []).append(run)
            say(f"tiny tasks {repeat + 1}: {peer.title}, Redis {mode}: {run['per_s']:.0f}/s")
    for peer, mode in sides:
        if mode in peer.enqueued:
            count = round(peer.enqueued[mode] * size.enqueued)
            run = queues.enqueue(peer, mode, count, folder / f"enqueued-{peer.venv}-{len(mode)}", venv_folder)
            found["enqueue"][f"{peer.title}, {mode}"] = run
            took = f"{count:,} tasks enqueued in {run['seconds']:.1f} s, {run['redis_mb']:.0f} MB"
            say(f"{peer.title}, Redis {mode}: {took}")
    return found


# ---- telling ---------------------------------------------------------------------------------------------------------


def judge(found: Found) -> list[Requirement]:
    """What is required, and what was found; of several repeats the median."""
    required = []
    if "load" in found:
        its = found["load"]
        early, late = middle(its["calm_early"], "p99_ms"), middle(its["calm_late"], "p99_ms")
        every = [*its["at_once"], *its["calm_early"], *its["calm_late"], *its["busy"], its["most"]]
        at_once = max(run["all_served_s"] for run in its["at_once"])
        most_mb = max(max(run["manager_rss_mb"] for run in every), *its["peak_mb"].values(), *its["store_peak_mb"])
        sustained = spread([run["answered_per_s"] for run in its["busy"]])["median"]
        required += [
            Requirement("mixed requests of all workers, sustained", sustained, 1000, "requests/s", at_least=True),
            Requirement(f"p99 at {CALM:.0f} requests/s", early, 50, "ms"),
            Requirement("all workers connect at once: the last is served after", at_once, 5, "s"),
            Requirement("… of whom were refused, lost or told an error", sum(map(troubles, every)), 0, "requests"),
            Requirement("all tasks expanded, de-duplicated and stored", spread(its["store_s"])["median"], 15, "s"),
            Requirement("memory with all tasks and workers, at its peak", most_mb, 400, "MB"),
            Requirement(f"p99 with {LATE:.0%} done against {EARLY:.0%}", late / early, 2, "times"),
        ]
    if "queues" in found:
        tiny = spread([run["per_s"] for run in found["queues"]["ours"]])["median"]
        required.append(Requirement("tiny tasks end to end", tiny, 300, "tasks/s", at_least=True))
    return required


def troubles(run: Found) -> int:
    return int(run["lost"]) + sum(run["refused"].values())


def middle(runs: Sequence[Found], name: str) -> float:
    """The median of a figure over repeats."""
    return spread([run["all"][name] for run in runs])["median"]


def required_table(requirements: Sequence[Requirement], sync_ms: Found) -> str:
    disk = f"A sync of 4 kB takes {sync_ms['p50_ms']:.2f} ms on this disk (p99 {sync_ms['p99_ms']:.2f})."
    return "\n".join([disk, f"{'':62} {'found':>10} {'':11} {'must':>9}", *(each.line() for each in requirements)])


def latency_table(its: Found) -> str:
    """Each kind of load, the median of its repeats."""
    head = (
        f"{'':30} {'requests/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'p99.9 ms':>9} {'longest':>8} {'MB':>6} {'files':>6}"
    )
    named = {
        f"{CALM:.0f}/s, {EARLY:.0%} done": its["calm_early"],
        f"{CALM:.0f}/s, {LATE:.0%} done": its["calm_late"],
        f"{OFFERED:.0f}/s offered": its["busy"],
        "as much as it can": [its["most"]],
        "all connect at once": its["at_once"],
    }
    return "\n".join([head, *(latency_line(name, runs) for name, runs in named.items())])


def latency_line(name: str, runs: Sequence[Found]) -> str:
    rate = spread([run["answered_per_s"] for run in runs])["median"]
    times = [middle(runs, each) for each in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")]
    memory = max(run["manager_rss_mb"] for run in runs)
    files = max(run["manager_open_files"] for run in runs)
    waits = f"{times[0]:8.1f} {times[1]:8.1f} {times[2]:9.1f} {times[3]:8.1f}"
    return f"{name:30} {rate:10.0f} {waits} {memory:6.0f} {files:6}"


def queue_table(its: Found) -> str:
    """Tasks a second of every side, and what enqueueing took."""
    ours = spread([run["per_s"] for run in its["ours"]])
    what = f"{its['tasks']:,} tiny tasks, {its['processes']} worker processes"
    lines = [
        f"{what:52} {'tasks/s':>8} {'min … max':>16} {'ours/it':>8}",
        f"{'fedsweep, every write synced':52} {ours['median']:8.0f} {around(ours):>16}",
    ]
    for name, runs in its["peers"].items():
        rate = spread([run["per_s"] for run in runs])
        lines.append(f"{name:52} {rate['median']:8.0f} {around(rate):>16} {ours['median'] / rate['median']:8.2f}")
    for name, run in its["enqueue"].items():
        lines.append(
            f"{name}: {run['tasks']:,} tasks enqueued in {run['seconds']:.1f} s "
            f"({run['tasks'] / run['seconds']:,.0f}/s), Redis {run['redis_mb_empty']:.0f} -> {run['redis_mb']:.0f} MB"
        )
    return "\n".join(lines)


def around(rate: Found) -> str:
    return f"{rate['min']:.0f} … {rate['max']:.0f}"


if __name__ == "__main__":
    main()
