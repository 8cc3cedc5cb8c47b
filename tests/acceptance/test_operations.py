"""What people do to a running sweep, with real managers and workers."""

from __future__ import annotations

import json
import shutil
import socket

import pytest

pytestmark = pytest.mark.acceptance

# Two cohorts, so that one worker leaves the other waiting while it trains the first.
SLOW = """\
defaults: {dataset: digits, model_type: lr, depth: 1, num_clients: 4, global_rounds: 600, output_dir: out,
  early_stopping_patience: 50000}
seeds: [1]
slow:
  combinations:
    - width_factor: [2, 3]
    - poison_ratio: [0.0, 0.3]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(processes, tmp_path, fedsweep, wait_until):
    """Start a manager and a worker on a sweep of so many rounds; what tells what `status` says once it trains."""

    def started(rounds: int):
        (tmp_path / "slow.yaml").write_text(SLOW.replace("600", str(rounds)))
        sweep = processes("slow.yaml")
        port = free_port()
        manager = sweep.manager(port)
        wait_until((tmp_path / ".fedsweep" / "token").exists, 30, "a token")
        worker = sweep.worker(port)

        def status() -> dict:
            done = fedsweep("status", "--manager", f"127.0.0.1:{port}", "--json")
            return json.loads(done.stdout) if done.returncode == 0 else {}

        wait_until(lambda: status().get("assigned"), 60, "a task under way")
        return manager, worker, status

    return started


def test_drain_lets_workers_finish_what_they_hold_and_hands_out_nothing_more(start, tmp_path, fedsweep, read_rows):
    manager, worker, status = start(600)
    held = status()["assigned"]
    assert held < 4
    assert fedsweep("drain").returncode == 0
    assert (worker.wait(90), manager.wait(30)) == (0, 0)
    assert len(read_rows(tmp_path / "out" / "final_results.csv")) == held
    *_, counts, where = (tmp_path / "manager.log").read_text().splitlines()
    assert counts.endswith(f" {held} complete, 0 failed, {4 - held} left; the same command goes on from there")
    assert where.endswith(" rows are in each folder's final_results.csv; tables and plots: fedsweep report out")
    assert fedsweep("doctor").returncode == 0


def test_stop_saves_what_is_under_way_and_ends_everything(start, tmp_path, fedsweep, wait_until):
    manager, worker, status = start(50_000)  # minutes
    wait_until(lambda: any(each["round"] for each in status().get("workers", [])), 60, "a finished round")
    assert fedsweep("stop").returncode == 0
    assert (worker.wait(20), manager.wait(40)) == (0, 0)
    assert any((tmp_path / ".fedsweep" / "checkpoints").iterdir())
    assert fedsweep("doctor").returncode == 0


def test_a_repeated_experiment_is_the_same_experiment(tmp_path, fedsweep, read_rows):
    (tmp_path / "quick.yaml").write_text(SLOW.replace("600", "2"))
    assert fedsweep("run", "quick.yaml", "--device", "cpu", "--quiet").returncode == 0
    rows = {
        (row["width_factor"], row["poison_ratio"]): row for row in read_rows(tmp_path / "out" / "final_results.csv")
    }
    done = fedsweep("repeat", "slow_3_1", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    row = rows["3", "0.3"]
    assert [repr(result[name]) for name in ("mean_test_acc", "mean_test_loss")] == [
        row["mean_test_acc"],
        row["mean_test_loss"],
    ]


def test_a_worker_joins_over_tls(processes, tmp_path, wait_until, read_rows):
    (tmp_path / "quick.yaml").write_text(SLOW.replace("600", "2"))
    sweep, port = processes("quick.yaml"), free_port()
    manager = sweep._start("manager", "quick.yaml", "--host", "0.0.0.0", "--port", str(port))
    log = tmp_path / "manager.log"
    wait_until(lambda: "#sha256:" in log.read_text(), 30, "a join string")
    fingerprint = next(line for line in log.read_text().splitlines() if "#sha256:" in line).split("#")[-1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / ".fedsweep" / "token", elsewhere / "token")
    worker = sweep._start(
        "worker",
        *("--join", f"127.0.0.1:{port}#{fingerprint}", "--token-file", str(elsewhere / "token")),
        *("--state-dir", str(elsewhere / "state"), "--device", "cpu"),
    )
    assert (worker.wait(90), manager.wait(30)) == (0, 0)
    assert len(read_rows(tmp_path / "out" / "final_results.csv")) == 4
    assert (tmp_path / ".fedsweep" / "token").read_text().strip() not in (tmp_path / "worker.log").read_text()
