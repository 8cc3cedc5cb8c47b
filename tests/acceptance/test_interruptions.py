"""The same rows with one worker, with three, and interrupted; nothing lost and nothing doubled when killed."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.acceptance

# 72 grid points, 52 experiments, two folders that share rows. They train together and end in several rounds, far enough
# apart to be interrupted between them.
SWEEP = """\
defaults:
  dataset: digits
  model_type: lr
  width_factor: 4
  depth: 1
  num_clients: 4
  global_rounds: 10
  local_epochs: 20
  early_stopping_patience: null
  poison_level: client
seeds: [1, 2]
first:
  defaults: {output_dir: out/first}
  combinations:
    - model_type: [lr, cnn]
    - poison_ratio: [0.0, 0.5]
    - poison_type: [label_flip, random_noise]
    - global_rounds: [5, 10, 15, 20]
second:
  defaults: {output_dir: out/second}
  combinations:
    - poison_ratio: [0.0, 0.5]
    - aggregator: [fedavg, median]
"""

# 201 experiments of a few milliseconds each; 25 of the 76 grid points of the second phase are in the first, too.
FIRST_SEEDS, SECOND_SEEDS = list(range(75)), list(range(50, 88))
TINY_SWEEP = f"""\
defaults:
  {{dataset: digits, model_type: lr, width_factor: 1, depth: 0, num_clients: 2, global_rounds: 1, batch_size: 256}}
first:
  defaults: {{output_dir: out/first}}
  combinations:
    - lr: [0.01, 0.02]
    - seed: {FIRST_SEEDS}
second:
  defaults: {{output_dir: out/second, lr: 0.02}}
  combinations:
    - momentum: [0.9, 0.5]
    - seed: {SECOND_SEEDS}
"""
FILES = ("out/first/final_results.csv", "out/second/final_results.csv")


def run(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedsweep", "run", "sweep.yaml", "--device", "cpu", *options],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def count_rows(folder: Path) -> int:
    return sum(len((folder / name).read_text().splitlines()) - 1 for name in FILES if (folder / name).exists())


def test_same_rows_with_one_worker_three_workers_and_five_interruptions(tmp_path, read_science, wait_until):
    folders = {name: tmp_path / name for name in ("one", "three", "interrupted")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "sweep.yaml").write_text(SWEEP)

    assert finish(run(folders["one"], "--workers", "1", "--quiet")) == (0, "")
    assert finish(run(folders["three"], "--workers", "3", "--quiet")) == (0, "")
    for _ in range(5):
        before = count_rows(folders["interrupted"])
        process = run(folders["interrupted"], "--workers", "1", "--quiet")
        wait_until(lambda before=before: count_rows(folders["interrupted"]) > before, 60, "a new row")
        process.send_signal(signal.SIGINT)
        assert finish(process) == (130, "")
    unfinished = count_rows(folders["interrupted"])
    assert 5 <= unfinished < 72, "the interruptions came too late to test anything"
    assert finish(run(folders["interrupted"], "--workers", "2", "--quiet")) == (0, "")

    for name in FILES:
        rows = read_science(folders["one"] / name)
        assert rows == read_science(folders["three"] / name) == read_science(folders["interrupted"] / name)
    assert [len(read_science(folders["one"] / name)) for name in FILES] == [64, 8]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_sixty_kills_lose_nothing_and_double_nothing(tmp_path, processes, read_rows, wait_until):
    (tmp_path / "sweep.yaml").write_text(TINY_SWEEP)
    sweep, port, dice = processes("sweep.yaml"), free_port(), random.Random(20260101)
    manager, workers = sweep.manager(port), [sweep.worker(port), sweep.worker(port)]
    hit: Counter[str] = Counter()

    while sum(hit.values()) < 60:
        # Wait for progress now and then, so that the kills are spread over the whole sweep.
        before = count_rows(tmp_path)
        deadline = time.monotonic() + dice.choice([0.1, 0.4, 0.8, 1.6])
        while time.monotonic() < deadline and count_rows(tmp_path) < before + 2:
            time.sleep(0.02)
        if manager.poll() is not None:
            break
        if dice.random() < 0.6:
            manager.kill()
            manager.wait()
            manager = sweep.manager(port)
            hit["manager"] += 1
        else:
            index = dice.randrange(2)
            workers[index].kill()
            workers[index].wait()
            workers[index] = sweep.worker(port)
            hit["worker"] += 1
    assert hit["manager"] >= 20, f"too few kills to mean anything: {hit}"
    assert hit["worker"] >= 10, f"too few kills to mean anything: {hit}"
    assert sum(hit.values()) == 60, f"the sweep ended before the kills did: {hit}"

    wait_until(lambda: manager.poll() is not None, 120, "the end of the sweep")
    assert manager.returncode == 0, (tmp_path / "manager.log").read_text()[-2000:]
    first, second = (read_rows(tmp_path / name) for name in FILES)
    assert Counter((row["lr"], row["seed"]) for row in first) == {
        (lr, str(seed)): 1 for lr in ("0.01", "0.02") for seed in FIRST_SEEDS
    }
    assert Counter((row["momentum"], row["seed"]) for row in second) == {
        (momentum, str(seed)): 1 for momentum in ("0.9", "0.5") for seed in SECOND_SEEDS
    }
    assert all(row["outcome"] == "ok" for row in first + second)
