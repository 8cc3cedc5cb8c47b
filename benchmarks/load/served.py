"""A manager as people start it, by its command line, and what the system says of its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from simulated import result_data

from fedsweep.manager.ledger import Ledger
from fedsweep.manager.state_dir import LEDGER_FILE

START_S, END_S = 300.0, 60.0
PROJECT = Path(__file__).resolve().parents[2]
FILLER, FILLED_AT_ONCE = "filling-0-0", 256
# 120,000 points, of which 20,000 are computed by others: a clean experiment is the same under both attacks.
SWEEP = """\
defaults: {{dataset: mnist, model_type: lr, depth: 2, num_clients: 10, global_rounds: 20, output_dir: results}}
seeds: {seeds}
load:
  combinations:
    - poison_ratio: [0.0, 0.2, 0.4]
    - poison_type: [label_flip, random_noise]
    - aggregator: [fedavg, median]
    - alpha: [0.1, 0.3, 1, 10, 100]
    - width_factor: [1, 4, 16, 64]
    - lr: {rates}
"""
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.2)
TASKS_OF_A_RATE = 200  # and a seed


def write_sweep(folder: Path, num_tasks: int) -> None:
    """A configuration of so many tasks (a multiple of 1,000)."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = RATES if num_tasks % (TASKS_OF_A_RATE * len(RATES)) == 0 else RATES[::2]
    seeds = range(1, num_tasks // (TASKS_OF_A_RATE * len(rates)) + 1)
    (folder / "sweep.yaml").write_text(SWEEP.format(seeds=list(seeds), rates=list(rates)))


def fill(folder: Path, num_results: int) -> None:
    """Bring the sweep of a folder, while no manager runs, to so many results: handed out, delivered, all of it real."""
    ledger = Ledger(folder / ".fedsweep" / LEDGER_FILE)
    try:
        missing = num_results - ledger.view.counts().complete
        while missing > 0:
            with ledger.together():
                tasks = ledger.hand_out(FILLER, 3600.0, min(FILLED_AT_ONCE, missing))
                for task in tasks:
                    ledger.accept(task.task_id, FILLER, result_data(task.number), task.attempt)
            missing -= len(tasks)
    finally:
        ledger.close()


@dataclass(frozen=True)
class Usage:
    """What a process takes, in MB where it is memory."""

    rss_mb: float
    pss_mb: float
    open_files: int


class ServingManager:
    """The manager of the sweep in a folder, as a process of its own; stopped by SIGTERM at the end.

    With `tls` it listens on every address of this machine, and so speaks TLS.
    """

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        self.folder = folder
        self.tls = tls
        self.address_file = folder / ".fedsweep" / "manager.json"
        self.address_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "fedsweep", "manager", "sweep.yaml", "--port", "0"]
        command += ["--host", "0.0.0.0"] if tls else []
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        began = time.perf_counter()
        with (folder / "manager.log").open("a") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        self.port = self._await_port()
        self.start_s = time.perf_counter() - began
        self.seen = psutil.Process(self.process.pid)

    def _await_port(self) -> int:
        """The port, once it listens there."""
        patience = time.monotonic() + START_S
        while not self.address_file.exists():
            if self.process.poll() is not None or time.monotonic() > patience:
                log = (self.folder / "manager.log").read_text()[-2000:]
                sys.exit(f"the manager in {self.folder} did not begin to listen:\n{log}")
            time.sleep(0.005)
        return int(json.loads(self.address_file.read_text())["port"])

    @property
    def token_file(self) -> Path:
        return self.folder / ".fedsweep" / "token"

    def usage(self) -> Usage:
        """What it takes now."""
        memory = self.seen.memory_full_info()
        return Usage(memory.rss / 1e6, memory.pss / 1e6, self.seen.num_fds())

    def peak_mb(self) -> float:
        """The most memory (RSS) that it ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (kilobytes,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        return int(kilobytes) * 1024 / 1e6

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        times = self.seen.cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        """End it in order."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def swarm(manager: ServingManager, how: str, **options: Any) -> dict[str, Any]:
    """Let simulated workers loose on a manager, in another process; what they saw, and what the manager took."""
    script = Path(__file__).with_name("swarm.py")
    command = [sys.executable, str(script), how, "--port", str(manager.port), "--token-file", str(manager.token_file)]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--tls"] if manager.tls else []
    used_before, usages = manager.cpu_s(), [manager.usage()]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while running.poll() is None:
        usages.append(manager.usage())
        time.sleep(0.25)
    assert running.stdout is not None
    told = running.stdout.read()
    if running.returncode != 0:
        sys.exit(f"the simulated workers ended with {running.returncode}")
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return {
        **found,
        "manager_cpu_us_per_request": (manager.cpu_s() - used_before) * 1e6 / max(found["answered"], 1),
        "manager_rss_mb": max(usage.rss_mb for usage in usages),
        "manager_pss_mb": max(usage.pss_mb for usage in usages),
        "manager_open_files": max(usage.open_files for usage in usages),
    }
