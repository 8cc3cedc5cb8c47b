"""Sweeps as real processes that a test can kill, and what must hold of their files afterwards."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TIME_AND_PLACE = {"wall_time_s", "device", "plan", "worker", "fedsweep_version", "torch_version", "finished_at"}


@dataclass
class Processes:
    """The manager and the workers of one sweep in `folder`, each in a process group of its own."""

    folder: Path
    config: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{arguments[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedsweep", *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def manager(self, port: int) -> subprocess.Popen[bytes]:
        return self._start("manager", self.config, "--port", str(port), "--heartbeat-s", "0.5")

    def worker(self, port: int) -> subprocess.Popen[bytes]:
        return self._start("worker", "--manager", f"127.0.0.1:{port}", "--device", "cpu")

    def stop_all(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[str], Processes]]:
    """Start the processes of a sweep; whatever still runs at the end is killed."""
    made: list[Processes] = []

    def make(config: str) -> Processes:
        made.append(Processes(tmp_path, config))
        return made[-1]

    yield make
    for each in made:
        each.stop_all()


def until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll until the condition holds; fail with `what` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not in {timeout_s:.0f} s: {what}")
        time.sleep(0.02)


def rows_of(csv_file: Path) -> list[dict[str, str]]:
    """The rows of a results file, strictly read: every row has as many fields as the header."""
    with csv_file.open(newline="") as stream:
        lines = list(csv.reader(stream, strict=True))
    header, rows = lines[0], lines[1:]
    assert all(len(row) == len(header) for row in rows), f"a torn row in {csv_file}"
    return [dict(zip(header, row, strict=True)) for row in rows]


def science_of(csv_file: Path) -> list[str]:
    """The rows without the columns of time and place, sorted: what must repeat byte for byte."""
    kept = [{name: value for name, value in row.items() if name not in TIME_AND_PLACE} for row in rows_of(csv_file)]
    return sorted(json.dumps(row, sort_keys=True) for row in kept)


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], list[dict[str, str]]]:
    return rows_of


@pytest.fixture(scope="session")
def read_science() -> Callable[[Path], list[str]]:
    return science_of


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object], float, str], None]:
    return until
