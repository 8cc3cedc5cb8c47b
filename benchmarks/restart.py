"""How long a manager that was killed takes to serve again, with a large sweep behind it.

    python benchmarks/restart.py                            # 10,000 and 100,000 tasks: about five minutes
    python benchmarks/restart.py --tasks 10000 --repeats 5 --json

Every task is complete and has a row in each of two output folders, with a history of ten rounds; but for one, which a
worker holds, so that the manager does not end by itself. The manager is SIGKILLed and started again by the command that
people type; the time runs from the start of that process, Python's own start included, to the first answer to a
`request_task`. In the torn runs each results file has lost half of its last row, or all of its second half. The files
are in the page cache, as they are after a kill (not after a power loss).
On a machine that does other things meanwhile, compare the CPU seconds: starting is the work of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsweep.manager import ExperimentManager
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.records import Task

LIMITS_S = {10_000: 2.0, 100_000: 10.0}  # what docs/reliability.md promises
STATE, FOLDERS = Path(".fedsweep"), ("first", "second")
SEEDS, ROUNDS = 100, 10
GIVE_UP_S = 120.0
SWEEP = """\
defaults: {{dataset: mnist, num_clients: 10, output_dir: "out/{{phase}}"}}
seeds: {seeds}
first: {{combinations: [{{lr: {rates}}}]}}
second: {{combinations: [{{lr: {rates}}}]}}
"""


def build(num_tasks: int) -> None:
    """A finished sweep in the current folder."""
    rates = [round(1e-5 * (place + 1), 10) for place in range(num_tasks // SEEDS)]
    Path("sweep.yaml").write_text(SWEEP.format(seeds=list(range(SEEDS)), rates=rates))
    with ExperimentManager(["sweep.yaml"]) as manager:
        manager.load_all_configs()
        manager.generate_all_tasks()
        ledger = manager.sweep.ledger
        ledger._db.execute("PRAGMA synchronous = OFF")  # it is the restart that is timed
        for task in held_one_by_one(ledger, num_tasks - 1):
            ledger.accept(task.task_id, "worker", result_of(task.number), task.attempt)
        manager.load_completed_tasks()
        assert manager.get_status()["pending"] == 1


def held_one_by_one(ledger: Ledger, count: int) -> Iterator[Task]:
    """So many tasks, handed out in cohorts."""
    while count > 0:
        tasks = ledger.hand_out("worker", 3600.0, max_tasks=min(count, 256))
        count -= len(tasks)
        yield from tasks


def result_of(number: int) -> dict[str, Any]:
    """A result with as many digits as real ones have."""
    share = number % 9973 / 9973
    rounds = [
        {"round": r, "val_loss": share / r, "val_acc": share, "nonfinite_clients": 0} for r in range(1, ROUNDS + 1)
    ]
    metrics = {
        f"{kind}_{metric}": share / 3
        for metric in ("test_acc", "test_loss", "val_acc", "val_loss")
        for kind in ("mean", "std")
    }
    origin = {"device": "cpu", "plan": "native x16", "fedsweep_version": "0.1.0", "torch_version": "2.13.0+cpu"}
    times = {"wall_time_s": share, "finished_at": "2026-01-01T00:00:00+00:00"}
    return {
        "outcome": "ok",
        **metrics,
        "num_parameters": 34826,
        "best_epoch": ROUNDS,
        "rounds_run": ROUNDS,
        "nonfinite_clients": 0,
        **origin,
        **times,
        "history": rounds,
    }


# ---- starting and killing


def start() -> tuple[subprocess.Popen[bytes], float, Any]:
    """Start the manager of the current folder; it, the seconds until it served a request, and the answer."""
    (STATE / "manager.json").unlink(missing_ok=True)
    with Path("manager.log").open("wb") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsweep", "manager", "sweep.yaml", "--port", "0"], stdout=log, stderr=log
        )
    try:
        while (answer := ask(type="request_task")) is None:
            if process.poll() is not None or time.perf_counter() - began > GIVE_UP_S:
                raise RuntimeError(f"the manager does not serve:\n{Path('manager.log').read_text()[-2000:]}")
            time.sleep(0.005)
    except BaseException:
        process.kill()
        raise
    return process, time.perf_counter() - began, answer


def ask(**message: Any) -> Any:
    """The answer to a worker; None where nobody listens yet."""
    try:
        port = json.loads((STATE / "manager.json").read_text())["port"]
        with socket.create_connection(("127.0.0.1", port), timeout=GIVE_UP_S) as connection:
            request = {"worker_id": "w", "token": (STATE / "token").read_text().strip(), **message}
            connection.sendall(json.dumps(request).encode() + b"\n")
            return json.loads(connection.makefile("rb").readline())
    except (OSError, ValueError):
        return None


def kill(process: subprocess.Popen[bytes]) -> float:
    """Kill a manager; the CPU seconds that it has used."""
    os.kill(process.pid, signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


# ---- what happened to the files meanwhile


def nothing() -> None:
    """The files are as the manager left them."""


def tear_last_row() -> None:
    """Each file has lost half of its last row."""
    tear(lambda content: content[: content.rstrip(b"\n").rfind(b"\n") + 100])


def tear_half() -> None:
    """Each file has lost its second half."""
    tear(lambda content: content[: len(content) // 2])


def tear(change: Callable[[bytes], bytes]) -> None:
    for folder in FOLDERS:
        path = Path("out") / folder / "final_results.csv"
        path.write_bytes(change(path.read_bytes()))


def sizes() -> list[int]:
    """How many bytes each results file has."""
    return [Path(f"out/{folder}/final_results.csv").stat().st_size for folder in FOLDERS]


CASES: Mapping[str, Callable[[], None]] = {"whole": nothing, "last row torn": tear_last_row, "half torn": tear_half}


def measure(num_tasks: int, repeats: int) -> list[dict[str, Any]]:
    """The times of each case, in a folder of its own."""
    found = []
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fedsweep-restart-") as folder:
        os.chdir(folder)
        try:
            build(num_tasks)
            kill(start()[0])
            whole = sizes()
            for case, change in CASES.items():
                seconds, cpu = [], []
                for _ in range(repeats):
                    change()
                    process, took, answer = start()
                    cpu.append(kill(process))
                    seconds.append(took)
                    assert answer["type"] == "no_task", answer
                    assert sizes() == whole, f"{case}: {sizes()} bytes where there were {whole}"
                found.append(
                    {
                        "tasks": num_tasks,
                        "files": case,
                        "median_s": statistics.median(seconds),
                        "max_s": max(seconds),
                        "cpu_s": statistics.median(cpu),
                        "limit_s": LIMITS_S.get(num_tasks),
                    }
                )
        finally:
            os.chdir(here)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=list(LIMITS_S), help="multiples of 100")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    found = [row for num_tasks in arguments.tasks for row in measure(num_tasks, arguments.repeats)]
    machine = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if arguments.json:
        print(json.dumps({"restart": found, "repeats": arguments.repeats, **machine}, indent=1))
        return
    print(f"{'tasks':>8}  {'results files':<14} {'median':>8} {'longest':>8} {'CPU':>8} {'limit':>7}")
    for row in found:
        limit = f"{row['limit_s']:.0f} s" if row["limit_s"] else "none"
        seconds = " ".join(f"{row[name]:6.2f} s" for name in ("median_s", "max_s", "cpu_s"))
        print(f"{row['tasks']:8,}  {row['files']:<14} {seconds} {limit:>7}")
    print(f"to the first answered request, {arguments.repeats} restarts each; {machine}")


if __name__ == "__main__":
    main()
